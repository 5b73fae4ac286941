"""Sections 8 to 10: metrics, tables, pictures, presets."""

import ast
import hashlib
import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from notebooks import MAIN, ROOT, sources
from rapidfuzz.distance import Levenshtein

import llada_helpers as h
from beyond import quality


def windows_of(text_noise: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and characters of windows whose mean is 1.5 nats per character, from noise of standard deviation 1."""
    counts = torch.full((len(text_noise),), 4)
    return counts * 1.5 + torch.from_numpy(text_noise), counts


def dependent(n: int, memory: float, generator: np.random.Generator) -> np.ndarray:
    """Noise of which each value has this correlation with the next."""
    steps = generator.normal(size=n) * (1 - memory**2) ** 0.5
    noise = [generator.normal()]
    for step in steps[1:]:
        noise.append(memory * noise[-1] + step)
    return np.array(noise)


def test_per_character_is_a_ratio():
    """Windows of unequal length: the mean is over characters, and what is the same for each has no interval."""
    assert h.per_character(torch.tensor([2.0, 8.0]), torch.tensor([1, 4]))[0] == 2.0
    assert h.per_character(torch.tensor([2.0, 8.0, 6.0]), torch.tensor([1, 4, 3]))[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n, memory, claimed", [(2, 0.0, 90), (5, 0.0, 100), (900, 0.0, 100), (900, 0.6, 85)])
def test_the_interval_covers_the_truth(n, memory, claimed):
    """95 times in 100, within what 100 trials tell; also of few windows, and where neighbouring windows tell of the same."""
    generator, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(100):
        nats, counts = windows_of(dependent(n, memory, generator))
        mean, half = h.per_character(nats, counts)
        covered += abs(mean - 1.5) <= half
        naive += abs(mean - 1.5) <= 1.96 * float(nats.std()) / 4 / n**0.5
    assert covered >= 88 and naive <= claimed, "what windows taken for independent and many would claim"


def test_the_interval_is_no_wider_than_students():
    """Of independent characters, over thirty stretches: 2.045 standard errors."""
    generator = np.random.default_rng(0)
    halves = [h.per_character(*windows_of(generator.normal(size=900)))[1] for _ in range(50)]
    assert np.mean(halves) == pytest.approx(2.045 / 4 / 900**0.5, rel=0.1)


def test_a_single_window_has_no_interval():
    mean, half = h.per_character(torch.tensor([3.0]), torch.tensor([2]))
    assert mean == 1.5 and math.isnan(half)


def test_per_character_is_repeatable_and_takes_what_comes():
    nats, counts = windows_of(np.random.default_rng(0).normal(size=900))
    first = h.per_character(nats, counts)
    assert h.per_character(nats.numpy(), counts.numpy()) == first == h.per_character(nats, counts)


def test_differences_may_be_passed_as_nats():
    """A paired interval knows nothing of what both share, such as hard passages."""
    generator = np.random.default_rng(0)
    shared, counts = torch.from_numpy(100 * generator.normal(size=600)), torch.full((600,), 128)
    ours, theirs = shared + 1.28, shared + torch.from_numpy(generator.normal(size=600))
    mean, half = h.per_character(ours - theirs, counts)
    assert abs(mean - 0.01) < half < 0.1 * h.per_character(ours, counts)[1]


@pytest.mark.parametrize("count, quantile", [(2, 12.706), (3, 4.303), (8, 2.3646), (20, 2.093)])
def test_half_width_is_students(count, quantile):
    values = [0.1 * i**2 for i in range(count)]
    expected = quantile * float(torch.tensor(values).std()) / count**0.5
    assert h.half_width(values) == pytest.approx(expected, rel=1e-3)
    assert h.half_width(np.array([values, values[::-1]]).T) == pytest.approx([expected] * 2, rel=1e-3)
    assert math.isnan(h.half_width(values[:1]))


def test_share_is_wilsons():
    """By hand: with z = 1.96, centre (k + z^2 / 2) / (n + z^2), half z / (n + z^2) sqrt(k (n - k) / n + z^2 / 4)."""
    rate, half = h.share([1, 0, 0, 0])
    low = (1 + 1.9207 - 1.95996 * math.sqrt(3 / 4 + 0.9604)) / (4 + 3.8415)
    high = (1 + 1.9207 + 1.95996 * math.sqrt(3 / 4 + 0.9604)) / (4 + 3.8415)
    assert rate == 0.25 and half == pytest.approx(max(high - 0.25, 0.25 - low), rel=1e-3)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, pd.Series])
def test_share_takes_any_sequence(kind):
    for hits in ([True, False, True], [1, 0, 1], [1.0, 0.0, 1.0]):
        assert h.share(kind(hits)) == h.share([1, 0, 1])


@pytest.mark.parametrize("n", [5, 40, 1000])
def test_share_of_nothing_or_everything_is_not_certain(n):
    """None in n leaves room for z^2 / (n + z^2); all in n is its mirror."""
    assert h.share([0] * n)[1] == pytest.approx(h.share([1] * n)[1]) == pytest.approx(3.8415 / (n + 3.8415), rel=1e-3)


@pytest.mark.parametrize("n", [10, 40, 300])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_share_covers_the_truth(n, rate):
    """By the binomial distribution: nine times in ten at least, whatever the rate, and nearly 95 times in 100 for many."""
    covered = 0.0
    for hits in range(n + 1):
        found, half = h.share([1] * hits + [0] * (n - hits))
        covered += math.comb(n, hits) * rate**hits * (1 - rate) ** (n - hits) * (abs(found - rate) <= half)
    assert covered > (0.9 if n < 300 else 0.93)


@given(st.text("ab", max_size=12), st.integers(1, 5))
def test_runs_are_all_pieces_of_a_length(text, length):
    assert h.runs_of(text, length) == [text[i:j] for i in range(len(text)) for j in range(i, len(text) + 1) if j - i == length]


def test_text_metrics_by_hand():
    def metrics(texts, corpus, words):
        return h.text_metrics(texts, set(h.runs_of(corpus)), words)

    got = metrics(["cut the cat sat off"], "the cat sat on the mat", {"the", "cat", "sat"})
    assert got["known words"] == 1.0, "the outer words may be cut and are not judged"
    assert got["copied"] == 0 and metrics(["xthe cat sat on thx"], "the cat sat on the mat", set())["copied"] == 2 / 4
    assert metrics(["x the zzz y"], "the", {"the"})["known words"] == 0.5
    assert metrics(["aaaaaa"], "b", set())["distinct-3"] == 1 / 4
    assert metrics(["aaaa"], "b", set())["char entropy"] == 0
    assert metrics(["abab"], "b", set())["char entropy"] == pytest.approx(math.log(2))
    assert metrics([""], "b", set()) == {"known words": 0, "distinct-3": 0, "char entropy": 0, "copied": 0}


def test_grouped_gives_students_interval():
    got = h.grouped([{"x": float(v), "y": 1.0} for v in (1, 2, 3, 4, 5, 6, 7, 8)])
    assert list(got) == ["x", "x ±", "y", "y ±"] and got["x"] == 4.5 and got["y ±"] == 0
    assert got["x ±"] == pytest.approx(2.3646 * math.sqrt(6 / 8), rel=1e-3)
    assert h.grouped([{"x": float(v)} for v in (1, 2, 3)])["x ±"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)


@pytest.fixture(scope="module")
def diversity():
    """The main notebook's own function."""
    nodes = [n for source in sources(ROOT / MAIN, "code") if "def diversity(" in source for n in ast.parse(source).body]
    scope = {"combinations": itertools.combinations, "Levenshtein": Levenshtein, "np": np}
    exec(ast.unparse(next(n for n in nodes if getattr(n, "name", "") == "diversity")), scope)
    return scope["diversity"]


def edits(a, b):
    """Levenshtein's distance, as it is defined."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.lists(st.text("ab ", min_size=4, max_size=6), min_size=2, max_size=3))
def test_diversity_is_a_mean_over_pairs(diversity, texts):
    pairs = list(itertools.combinations(texts, 2))
    shared = []
    for pair in pairs:
        few, many = sorted(({text[i : i + 4] for i in range(len(text) - 3)} for text in pair), key=len)
        shared.append(len(few & many) / len(few))
    expected = {"distinct texts": len(set(texts)) / len(texts), "shared 4-grams": np.mean(shared)}
    expected["edit distance"] = np.mean([edits(a, b) / max(len(a), len(b)) for a, b in pairs])
    assert diversity(texts) == pytest.approx(expected)


def test_diversity_knows_the_same_from_the_different(diversity):
    same, other = ["to be or not"] * 3, ["to be or not", "XXXXXXXXXXXX", "????????????"]
    assert diversity(same) == pytest.approx({"distinct texts": 1 / 3, "shared 4-grams": 1, "edit distance": 0})
    assert diversity(other) == pytest.approx({"distinct texts": 1, "shared 4-grams": 0, "edit distance": 1})


@pytest.mark.parametrize("order", [1, 2, 4, 6])
@pytest.mark.parametrize("text", ["abracadabra", "aab", "abc", "ab" * 20 + "c", "a"])
def test_the_judges_probabilities_sum_to_one(text, order):
    """After every context, also one that stands at the end of the text alone, or nowhere."""
    judge, alphabet = quality.ngram_judge(text, order), sorted(set(text))
    for length in range(5):
        for context in map("".join, itertools.product(alphabet, repeat=length)):
            p = [math.exp(-judge(context + c, length)) for c in alphabet]
            assert sum(p) == pytest.approx(1) and min(p) > 0, context


def test_the_judge_by_hand():
    """Witten-Bell: a context seen n times with k kinds of successors leaves k / (n + k) to the shorter context."""
    judge = quality.ngram_judge("aab", order=2)
    b = (1 + 2 * (1 / 2)) / (3 + 2)  # 1 of 3 characters, 2 kinds, over a uniform 1/2
    after_a = (1 + 2 * b) / (2 + 2)  # "ab" once after two "a" that something follows
    assert judge("b", 0) == pytest.approx(-math.log(b))
    assert judge("ab", 1) == judge("aab", 2) == pytest.approx(-math.log(after_a)), "only order - 1 characters are looked at"
    assert judge("aabb", 2) == pytest.approx((judge("aab", 2) + judge("aabb", 3)) / 2), "a mean over what was written"
    assert judge("bb", 1) == pytest.approx(-math.log(b)), "nothing ever followed b: the shorter context decides"


def test_the_judge_prefers_what_it_has_read():
    text = "to be, or not to be: that is the question. " * 5
    judge = quality.ngram_judge(text)
    assert judge("to be, or not to be", 5) < 0.5 < 2 < judge("tqbhe r,oo:ubt to e", 5)


@pytest.mark.parametrize(
    "preset, text, folder",
    [
        *(("cpu", "the corpus", "figures"), ("gpu", "the corpus", "figures"), ("smoke", "the corpus", "build/smoke/figures")),
        *(("cpu", "my own", "build/cpu/figures"), ("smoke", "my own", "build/smoke/figures")),
    ],
)
def test_a_run_writes_where_it_may(tmp_path, monkeypatch, preset, text, folder):
    """What is committed is replaced by a full run on TinyShakespeare, and by nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(h, "CORPUS_SHA256", hashlib.sha256(b"the corpus").hexdigest())
    results = h.Results(h.PRESETS[preset], text)
    results.table(pd.DataFrame({"x": [1]}), "t")
    results.figure(plt.Figure(), "f")
    assert (results.folder, results.tables) == (Path(folder), Path(folder, "tables"))
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {f"{folder}/tables/t.csv", f"{folder}/f.png"}


def test_tables_are_written_rounded_and_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = h.Results(h.PRESETS["smoke"], "a text")
    shown = results.table(pd.DataFrame({"row": ["a"], "x": [1 / 3]}), "t")
    assert (results.tables / "t.csv").read_bytes() == b"row,x\na,0.3333\n"
    assert shown["x"][0] == 0.3333


TABLE = pd.DataFrame({"row": ["a", "b", "c"], "x": [1.9388, 1.5, None], "95% ±": [0.0088, None, None], "n": [1200, 5, 7]})
TABLE = TABLE.assign(**{"d": [0.1, -0.2, 0.0], "d ±": 0.05, "d over seeds ±": [0.0712, 0.1, 0.2], "ok": [True, False, True]})


def test_a_value_and_its_interval_share_a_cell():
    shown = h.pretty(TABLE)
    assert list(shown) == ["row", "x", "n", "d", "d over seeds ±", "ok"]
    assert shown["x"].tolist() == ["1.94 ± 0.01", "1.50", ""] and shown["n"].tolist() == ["1,200", "5", "7"]
    assert shown["d"].tolist() == ["0.10 ± 0.05", "−0.20 ± 0.05", "0.00 ± 0.05"], "another interval has a column of its own"
    assert shown["d over seeds ±"].tolist() == ["0.071", "0.100", "0.200"] and shown["ok"].tolist() == [True, False, True]
    assert h.pretty(shown).equals(shown), "what is pretty stays as it is"


def test_a_page_shows_at_most_eight_rows():
    long = pd.concat([TABLE] * 4, ignore_index=True)
    assert len(h.pretty(long)) == 8 and len(h.pretty(long, rows=None)) == 12 and len(h.pretty(long, rows=2)) == 2
    page = h.as_html(long)
    assert page.count("<tr") == 9 and "4 more rows" in page and "more rows" not in h.as_html(TABLE)


def test_tables_of_every_kind_are_shown():
    """Gaps in whole numbers, infinities, words among numbers, speeds, a pivoted table."""
    mixed = pd.DataFrame({"samples": ["exact", 16], "p = 1": [math.inf, 4.5], "steps": pd.array([None, 3150], dtype="Int64")})
    mixed["tokens/s"] = [13273, 363]
    shown = h.pretty(mixed)
    assert shown.astype(str).to_numpy().tolist() == [["exact", "inf", "", "13,300"], ["16", "4.50", "3,150", "363"]]
    speeds = pd.DataFrame({"model": ["a", "a"], "passes": [1, 2], "batch": [1, 32], "tokens/s": [5.0, 6.0]})
    assert h.pretty(speeds.pivot_table("tokens/s", ["model", "passes"], "batch")).shape == (2, 2)
    assert h.pretty(pd.DataFrame()).empty and h.pretty(TABLE[:0]).empty


def test_no_word_of_a_table_is_markup():
    assert "&lt;b&gt;" in h.as_html(pd.DataFrame({"row": ["<b>$5$</b>"]}))


def test_error_bars_are_those_of_the_table():
    table = pd.DataFrame({"steps": [8, 16], "nats": [2.0, 1.5], "nats ±": [0.1, 0.2]})
    ax = plt.Figure().subplots()
    h.errorbars(ax, table, "steps", "nats", label="LLaDA", color=h.LLADA_COLOR)
    (drawn,) = ax.containers
    assert drawn.get_label() == "LLaDA" and drawn[0].get_xydata().tolist() == [[8, 2.0], [16, 1.5]]
    bars = np.array(drawn[2][0].get_segments())[:, :, 1]
    assert bars == pytest.approx(np.array([[1.9, 2.1], [1.3, 1.7]]))


def test_a_logarithmic_axis_has_the_ticks_it_is_given():
    """matplotlib's own would be a single 10 on a narrow one."""
    ax = plt.Figure().subplots()
    ax.plot([8, 1500], [1, 2])
    h.log_ticks(ax, (8, 16, 1024))
    ax.figure.canvas.draw()
    assert ax.get_xscale() == "log" and ax.get_xticks().tolist() == [8, 16, 1024]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "16", "1,024"]
    assert not ax.xaxis.get_minorticklocs().size


def test_presets(monkeypatch, capsys):
    monkeypatch.setenv("LLADA_PRESET", "smoke")
    assert h.choose_preset().name == "smoke"
    monkeypatch.setenv("LLADA_PRESET", "huge")
    with pytest.raises(ValueError, match="smoke, cpu, gpu"):
        h.choose_preset()
    monkeypatch.delenv("LLADA_PRESET")
    for there, name in ((True, "gpu"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert h.choose_preset().name == name
        monkeypatch.setenv("LLADA_PRESET", "gpu")
        assert h.choose_preset().name == "gpu" and ("No GPU here" in capsys.readouterr().out) is not there
        monkeypatch.delenv("LLADA_PRESET")


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_presets_have_one_to_ten_million_parameters(name):
    """The exercise's range, with "about 10M" read generously, for both models alike."""
    sizes = {h.Transformer(h.PRESETS[name].model(69, causal)).n_parameters for causal in (False, True)}
    assert len(sizes) == 1 and 1e6 <= sizes.pop() <= 11e6


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=lambda p: p.name)
def test_preset_sizes_fit_together(preset):
    assert preset.texts % h.GROUPS == 0 and preset.texts >= (64 if preset.name != "smoke" else 1)
    assert max(preset.step_counts) <= preset.seq_len and preset.seq_len % 16 == 0
