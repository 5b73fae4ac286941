"""Sections 8 to 10: metrics, tables, pictures, presets, and what README promises."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llada_helpers as h

ROOT = Path(__file__).parents[1]
TOKENIZER = h.CharTokenizer.from_text("ab<&>\n $\"'")


def test_per_character_is_a_ratio_with_the_right_spread():
    """Windows of unequal length: the mean is over characters, and the interval covers the truth 95 times in 100."""
    assert h.per_character(torch.tensor([2.0, 8.0]), torch.tensor([1, 4]))[0] == 2.0
    assert h.per_character(torch.tensor([2.0, 8.0, 6.0]), torch.tensor([1, 4, 3]))[1] == pytest.approx(0, abs=1e-12)
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        counts = torch.randint(1, 5, (80,), generator=generator)
        nats = counts * 1.5 + torch.randn(80, generator=generator)
        mean, half = h.per_character(nats, counts)
        covered += abs(mean - 1.5) <= half
    assert 360 <= covered <= 396


@given(st.text("ab", max_size=12), st.text("ab", max_size=30))
def test_longest_copy_is_the_longest_common_substring(text, corpus):
    pieces = {text[i:j] for i in range(len(text)) for j in range(i, len(text) + 1)}
    assert h.longest_copy(text, h.copy_index(corpus)) == max((len(p) for p in pieces if p in corpus), default=0)


def test_longest_copy_stops_at_its_limit():
    long = "".join(chr(97 + i % 26) for i in range(100))
    assert h.longest_copy(long, h.copy_index("x" + long)) == h.COPY_LIMIT


def test_text_metrics_by_hand():
    def metrics(texts, corpus, words):
        return h.text_metrics(texts, h.copy_index(corpus), words)

    got = metrics(["cut the cat sat off"], "the cat sat on the mat", {"the", "cat", "sat"})
    assert got["known words"] == 1.0, "the outer words may be cut and are not judged"
    assert got["longest copy"] == len("the cat sat o")
    assert metrics(["x the zzz y"], "the", {"the"})["known words"] == 0.5
    assert metrics(["aaaaaa"], "b", set())["distinct-3"] == 1 / 4
    assert metrics(["aaaa"], "b", set())["char entropy"] == 0
    assert metrics(["abab"], "b", set())["char entropy"] == pytest.approx(math.log(2))
    assert metrics([""], "b", set()) == {"known words": 0, "distinct-3": 0, "char entropy": 0, "longest copy": 0}


def test_grouped_gives_students_interval():
    got = h.grouped([{"x": float(v)} for v in (1, 2, 3, 4, 5, 6, 7, 8)])
    assert got["x"] == 4.5
    assert got["x ±"] == pytest.approx(2.3646 * math.sqrt(6 / 8), rel=1e-3)


def test_tables_are_written_rounded_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(h, "FIGURES", tmp_path)
    shown = h.save_table(pd.DataFrame({"row": ["a"], "x": [1 / 3]}), "t")
    assert (tmp_path / "tables" / "t.csv").read_bytes() == b"row,x\na,0.3333\n"
    assert shown["x"][0] == 0.3333
    assert [p.name for p in (tmp_path / "tables").iterdir()] == ["t.csv"]


GENERATION = h.Generation(torch.tensor([[4, 5, 6, 7, 8]]), torch.tensor([[-1, 1, 0, 2, 1]]), nfe=3)


def test_filmstrip_draws_each_character_once_per_strip(tmp_path):
    figure = h.filmstrip(GENERATION, TOKENIZER, frames=4)
    figure.savefig(tmp_path / "strip.png")
    glyphs = [t.get_text() for t in figure.axes[0].texts]
    assert len([g for g in glyphs if g.startswith("step ")]) == 4
    assert len(glyphs) == 4 + 4 * GENERATION.ids.shape[1]


def test_presets(monkeypatch):
    monkeypatch.setenv("LLADA_PRESET", "smoke")
    assert h.choose_preset().name == "smoke"
    monkeypatch.setenv("LLADA_PRESET", "huge")
    with pytest.raises(ValueError, match="smoke, cpu, gpu"):
        h.choose_preset()
    monkeypatch.delenv("LLADA_PRESET")
    assert h.choose_preset().name == ("gpu" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_presets_have_one_to_ten_million_parameters(name):
    """The exercise's range, with "about 10M" read generously, for both models alike."""
    sizes = {h.Transformer(h.PRESETS[name].model(69, causal)).n_parameters for causal in (False, True)}
    assert len(sizes) == 1 and 1e6 <= sizes.pop() <= 11e6


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=lambda p: p.name)
def test_preset_sizes_fit_together(preset):
    assert preset.texts % h.GROUPS == 0 and preset.texts >= (64 if preset.name != "smoke" else 1)
    assert max(preset.step_counts) <= preset.seq_len and preset.seq_len % 16 == 0


def test_readme_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_command_line_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        h.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--preset", "--model", "llada", "smoke"))
