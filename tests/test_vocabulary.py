"""Byte pairs, and the experiment that sets them against characters."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import PAD, START

import llada_helpers as h
from beyond import experiments, vocabulary
from beyond.experiments import characters, main, run_jobs, suite_mark
from beyond.vocabulary import byte_pairs, vocabulary_jobs

ALPHABET = "abMASK []_.,'\n\té漢ж"
PAIRS = byte_pairs("a [MASK] bab,\n\n'MASK' aa[END]baba. MASK [MASK]\n" * 3, merges=25, alphabet=ALPHABET)
PIECES = st.lists(st.sampled_from([*ALPHABET, *h.SPECIAL_TOKENS[1:2], " [MASK]", "  ", "\n\n", "bab"]), max_size=20).map("".join)


@given(PIECES)
def test_byte_pairs_lose_nothing_and_spell_no_special_token(text):
    encoded = PAIRS.encode(text)
    assert PAIRS.decode(encoded.ids) == "".join(encoded.tokens) == text
    assert all(i >= 4 for i in encoded.ids)


def test_byte_pairs_begin_with_the_special_tokens():
    assert [PAIRS.id_to_token(i) for i in range(4)] == list(h.SPECIAL_TOKENS)


def test_byte_pairs_know_the_alphabet_beyond_their_text():
    pairs = byte_pairs("abab", merges=3, alphabet="xéb漢\n")
    assert pairs.decode(pairs.encode("é漢\nx").ids) == "é漢\nx"
    assert {pairs.id_to_token(i) for i in range(4, 10)} == set("abxé漢\n")


def random_text(seed, characters):
    """Invented words of unlike frequencies, with punctuation and lines."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeioubdfgklmnprst"), size=rng.integers(1, 9))) for _ in range(900)]
    chosen = rng.choice(words, size=characters // 3, p=(weights := 1 / np.arange(1, 901)) / weights.sum())
    ends = rng.choice([" ", " ", " ", " ", ", ", ".\n", ":\n\n", "--"], size=len(chosen))
    return "".join(w + e for w, e in zip(chosen, ends))[:characters]


@pytest.mark.parametrize("merges", [0, 1, 40, 400])
def test_merges_stay_within_words_and_within_their_number(merges):
    text = random_text(1, 20_000)
    pairs = byte_pairs(text, merges)
    size = 4 + len(set(text)) + merges
    assert pairs.get_vocab_size() == size
    tokens = [pairs.id_to_token(i) for i in range(4, size)]
    assert set(tokens[: size - merges - 4]) == set(text) and len(set(tokens)) == size - 4
    assert all(re.fullmatch(r" ?\w+|\W+", token) for token in tokens)
    if merges == 1:
        (merged,) = [token for token in tokens if len(token) > 1]
        words = re.findall(r" ?\w+|[^\w]+?(?= \w|\w|\Z)", text)
        counts = Counter(word[i : i + 2] for word in words for i in range(len(word) - 1))
        assert counts[merged] == max(counts.values())


def test_a_short_text_has_fewer_merges():
    assert byte_pairs("abab ab", merges=1000).get_vocab_size() <= 4 + 3 + 4


def test_byte_pairs_are_the_same_every_time():
    """Their ids enter the fingerprints of trainings; here most pairs are equally frequent."""
    text = " ".join(a + b + c for a in "abcdef" for b in "ghijk" for c in "lmnop")
    first, *others = [byte_pairs(text, 60).get_vocab() for _ in range(5)]
    assert all(other == first for other in others)


# --- characters against byte pairs ---

CUT, HELD = 96_000, 12_000  # HELD_OUT is more than the validation text has
TEXT = random_text(0, CUT + 50) + "é is in the second part alone" + random_text(1, 120_000)
TEXT = TEXT[:120_000]
CHARACTER_ROWS = ("LLaDA, characters", "AR, characters")


@pytest.fixture(scope="module")
def vocabularies():
    """The jobs of the smoke preset, longer, the lengths of their tokens, and the decoders of their ids by the variant's name."""
    decoders = {"characters": h.CharTokenizer.from_text(TEXT).decode}

    def recorded(text, merges, alphabet):
        pairs = byte_pairs(text, merges, alphabet)
        decoders[f"{merges:,} merges"] = lambda ids: pairs.decode(ids.tolist())
        return pairs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "byte_pairs", recorded)
        return *vocabulary_jobs(h.PRESETS["smoke"], h.TrainConfig(500, 16), TEXT), decoders


def test_every_vocabulary_has_the_same_text(vocabularies):
    """Trained on the first part, judged by the same characters of the rest, none of them lost or counted twice."""
    jobs, lengths, decoders = vocabularies
    assert list(jobs) == list(lengths) == [f"{model}, {name}" for model in ("LLaDA", "AR") for name in decoders]
    for row, trials in jobs.items():
        decode = decoders[row.split(", ", 1)[1]]
        assert [job.train.seed for job in trials] == [0, 1, 2]
        each = lengths[row]
        for job in trials:
            assert decode(job.train_ids) == TEXT[:CUT] and decode(job.val_ids) == TEXT[CUT : CUT + HELD]
            assert int(each[job.train_ids].sum()) == CUT and int(each[job.val_ids].sum()) == HELD
            assert len(each) == job.model.vocab_size
            assert max(int(ids.max()) for ids in (job.train_ids, job.val_ids)) < job.model.vocab_size
            sequences = job.validation_sequences()
            counted = characters(sequences, job.learned(sequences), each)
            assert int(counted.sum()) == HELD, "every window is judged, padding is no character"
            assert torch.equal(sequences[sequences != PAD], job.val_ids)


def test_all_are_judged_by_the_beginning_of_the_validation_text(monkeypatch):
    """A short stretch of it, and never what comes after it."""
    text = random_text(2, 4_000)
    decode = h.CharTokenizer.from_text(text).decode
    for held, judged in ((100, text[3_200:3_300]), (399, text[3_200:3_599]), (900, text[3_200:3_600])):
        monkeypatch.setattr(vocabulary, "HELD_OUT", held)
        jobs, _ = vocabulary_jobs(h.PRESETS["smoke"], h.TrainConfig(10, 16), text)
        assert decode(jobs["AR, characters"][0].val_ids) == judged


def all_multiplications(job):
    """Of all forward passes of a training: all matrices but the embedding, as the model has them, and queries, keys, values."""
    model, shape = h.Transformer(job.model), job.model
    matrices = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed"))
    attention = 2 * shape.n_layer * shape.seq_len * shape.n_embd
    return job.train.steps * job.train.batch_size * shape.seq_len * (matrices + attention)


def test_every_vocabulary_has_the_same_compute_and_as_much_in_sight(vocabularies):
    jobs, _, _ = vocabularies
    first = jobs[CHARACTER_ROWS[0]][0]
    assert len({job.model.vocab_size for trials in jobs.values() for job in trials}) == 1 + len(vocabulary.MERGES)
    for trials in jobs.values():
        for job in trials:
            assert all_multiplications(job) == pytest.approx(all_multiplications(first), rel=0.02)
            each = CUT / len(job.train_ids)
            assert abs(job.model.seq_len * each - first.model.seq_len) <= each / 2
            assert abs(job.train.batch_size * job.model.seq_len - 16 * 64) <= job.model.seq_len / 2
            assert (job.model.n_layer, job.model.n_embd) == (first.model.n_layer, first.model.n_embd)


def test_both_models_have_the_same_steps_and_batches(vocabularies):
    jobs, _, decoders = vocabularies
    for name in decoders:
        for llada, ar in zip(jobs[f"LLaDA, {name}"], jobs[f"AR, {name}"]):
            assert llada.train == ar.train and replace(llada.model, causal=True) == ar.model
            assert torch.equal(llada.train_ids, ar.train_ids)
            assert (llada.batch_function, ar.batch_function) == (h.diffusion_batch, h.next_token_batch)
    assert all(jobs[row][0].train.steps == 500 and jobs[row][0].train.batch_size == 16 for row in CHARACTER_ROWS)


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_vocabularies_of_every_preset_can_be_trained(preset, monkeypatch):
    monkeypatch.setattr(vocabulary, "MERGES", (50, 200))
    for config in vocabulary.SIZES[preset.name]:
        jobs, _ = vocabulary_jobs(preset, config, TEXT[:30_000])
        sizes = [(job.train.steps, job.train.batch_size, job.train.evals) for trials in jobs.values() for job in trials]
        assert len(jobs) == 6 and len(sizes) == 18 and min(map(min, sizes)) >= 1
        assert all(steps >= evals for steps, _, evals in sizes)


def nats_by_hand(model, ids):
    """Exact, window by window, of a causal model."""
    total = 0.0
    for window in ids.split(model.config.seq_len):
        with torch.no_grad():
            logp = model(torch.cat((torch.tensor([START]), window[:-1]))[None])[0].log_softmax(dim=-1)
        total -= float(logp.gather(1, window[:, None]).sum())
    return total


def test_byte_pairs_are_reported_per_character(tmp_path, monkeypatch):
    """Nats of the held-out text over its characters, not its tokens; each seed's as well."""
    monkeypatch.chdir(tmp_path)
    shown, held = TEXT[:3000], TEXT[3000:3500]
    pairs, characters = byte_pairs(shown, 60, TEXT), h.CharTokenizer.from_text(TEXT)
    lengths = torch.tensor([len(pairs.id_to_token(i)) for i in range(pairs.get_vocab_size())])
    ids = {"characters": [characters.encode(part) for part in (shown, held)]}
    ids["pairs"] = [torch.tensor(pairs.encode(part).ids) for part in (shown, held)]
    sizes = {"characters": characters.vocab_size, "pairs": len(lengths)}
    jobs = {}
    for kind, size in sizes.items():
        config = h.TrainConfig(steps=8, batch_size=8, evals=2, eval_windows=1000)
        job = h.Job(h.ModelConfig(size, 8, 1, 1, 8, causal=True), config, *ids[kind])
        jobs[kind] = [replace(job, train=replace(config, seed=seed)) for seed in (0, 1)]
    results = h.Results(h.PRESETS["smoke"], TEXT)
    table = run_jobs(results, "t", jobs, quiet=True, lengths={"pairs": lengths}).set_index("row")
    for kind in ids:
        models = [h.train("-", job, quiet=True).model for job in jobs[kind]]
        by_hand = [nats_by_hand(model, ids[kind][1]) / len(held) for model in models]
        line = table.loc[kind]
        assert line["nats/char"] == pytest.approx(np.mean(by_hand), abs=2e-4)
        assert (line["lowest seed"], line["highest seed"]) == pytest.approx((min(by_hand), max(by_hand)), abs=2e-4)
    middle = (table["lowest seed"] + table["highest seed"]) / 2
    assert table["nats/char"].tolist() == pytest.approx(middle.tolist(), abs=2e-4)
    assert (table["lowest seed"] < table["highest seed"]).all() and (table["characters"] == len(shown)).all()
    assert table["difference"].tolist() == pytest.approx((middle - middle.iloc[0]).tolist(), abs=2e-4), "per character"


@pytest.mark.parametrize("only", ["", "^AR"])
def test_vocabulary_from_the_command_line(tmp_path, monkeypatch, capsys, only):
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text(TEXT[:4000])
    monkeypatch.setenv("LLADA_DATA", "own.txt")
    asked_for = []

    def recorded(results, name, jobs, **options):
        asked_for.append((results.folder, name, jobs, options))
        return pd.DataFrame({"row": list(jobs), "nats/char": 1.25})

    monkeypatch.setattr(experiments, "run_jobs", recorded)
    main(["vocabulary", "--preset", "smoke", *(["--only", only] if only else [])])
    ((folder, name, jobs, options),) = asked_for
    expected, lengths = vocabulary_jobs(h.PRESETS["smoke"], vocabulary.SIZES["smoke"][1], TEXT[:4000])
    assert (folder, name) == (Path("build/smoke/figures"), "vocabulary")
    assert all(torch.equal(lengths[row], each) for row, each in options.pop("lengths").items())
    assert options == {"compiled": False, "only": only, "done": False, "measure": None}
    assert {row: suite_mark(trials) for row, trials in jobs.items()} == {r: suite_mark(t) for r, t in expected.items()}
    assert "LLaDA, 1,024 merges" in capsys.readouterr().out
