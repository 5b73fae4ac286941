"""beyond/quality.py: one measure for all decoders."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from notebooks import ROOT, sources
from oracle import noisy_pair

import llada_helpers as H
from beyond import quality

TEXT = "to be, or not to be: that is the question\n" * 30


@pytest.fixture(scope="module")
def tokenizer():
    return H.CharTokenizer.from_text(TEXT)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return H.windows(tokenizer.encode(TEXT), 32)


@given(st.integers(12, 5_000))
def test_three_parts_are_the_whole_text_in_order(count):
    train, validation, test = quality.parts(torch.arange(count))
    assert torch.equal(torch.cat((train, validation, test)), torch.arange(count))
    assert len(train) == int(0.8 * count) and 0 <= len(test) - len(validation) <= 1


@pytest.mark.parametrize("name", ["EG_TakeHome_LLaDA.ipynb", "Beyond_the_Assignment.ipynb"])
def test_both_notebooks_cut_the_text_at_the_same_places(name):
    """The first one has no code of ours but the helper's, and so cuts by itself."""
    code = "\n".join(sources(ROOT / name, "code"))
    lines = re.findall(r"^\w+_ids, .* = .*(?:split|parts)\(.*$", code, re.M)
    ids, keep = torch.arange(997), SimpleNamespace(encode=lambda text: text)
    scope = {"H": H, "quality": quality, "ids": ids, "text": ids, "tokenizer": keep}
    exec("\n".join(lines), scope)
    for part, known in zip(("train_ids", "val_ids", "test_ids"), quality.parts(ids)):
        assert torch.equal(scope[part], known)


def test_prompts_keep_the_first_characters(windows):
    truth, template = quality.prompts(windows, 10)
    assert torch.equal(truth[:, : quality.PREFIX], template[:, : quality.PREFIX])
    assert bool((template[:, quality.PREFIX :] == H.MASK_ID).all())
    assert not bool((truth == H.PAD_ID).any())


def test_only_what_was_written_counts(tokenizer, windows):
    measure, sequences = quality.TextMeasure(tokenizer, TEXT), windows[: 2 * H.GROUPS]
    scores = measure(sequences)
    judged = [measure.judge(tokenizer.decode(ids), quality.PREFIX) for ids in sequences]
    assert scores["judge nats/char"] == pytest.approx(np.mean(judged))
    assert scores["known words"] == 1.0 and scores["copied"] == 1.0
    noise = torch.randint(4, tokenizer.vocab_size, sequences.shape, generator=torch.Generator().manual_seed(0))
    assert measure(noise)["judge nats/char"] > scores["judge nats/char"] + 1


def test_a_trial_counts_passes_and_characters(tokenizer, windows, monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(quality.time, "perf_counter", lambda: next(clock))
    _, template = quality.prompts(windows, H.GROUPS)
    llada = noisy_pair(tokenizer.vocab_size, 32, 0.1)["LLaDA"]
    trial = quality.TextMeasure(tokenizer, TEXT).trial(lambda: quality.write(llada, template, steps=4))
    assert trial["passes"] == 4 and trial["tokens/s"] == H.GROUPS * (32 - quality.PREFIX) / 2
    assert {"judge nats/char", "judge nats/char ±", "char entropy", "distinct-3", "known words ±"} <= set(trial)


@pytest.mark.parametrize("places", [[(0, 3), (0, 5)], [(0, 3), (1, 3), (1, 4)], [(0, 3), (1, 4)], []])
def test_ar_refuses_masks_that_are_not_one_run(tokenizer, places):
    template = torch.full((2, 8), 5)
    for place in places:
        template[place] = H.MASK_ID
    with pytest.raises(ValueError, match="pass"):
        quality.write(noisy_pair(tokenizer.vocab_size, 32, 0.1)["AR"], template)


def test_smoke_scores_the_beginning_and_other_presets_all():
    ids = torch.arange(9_000)
    assert torch.equal(quality.scored(H.PRESETS["smoke"], ids), ids[:8_192])
    assert all(quality.scored(H.PRESETS[name], ids) is ids for name in ("cpu", "cpu_long", "gpu"))
