"""Little text, many epochs: what is trained, noise of the inputs, what is chosen by and what is scored, the table of the best."""

import itertools
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import llada_helpers as h
from beyond import crossover, decoding
from beyond.crossover import Crossover, Kind, crossover_best, crossover_jobs, crossover_measure
from beyond.experiments import run_jobs, suite, suite_mark
from beyond.quality import parts

TEXT = "to be, or not to be: that is the question. " * 20
TOKENIZER = h.CharTokenizer.from_text(TEXT)
TRAIN, VAL, TEST = parts(TOKENIZER.encode(TEXT))
LADDERS = {Kind("LLaDA"): (4,), Kind("LLaDA", 0.1, 0.1): (4, 8), Kind("AR"): (2, 4), Kind("AR", 0.5, 0.3): (4,)}
LADDERS |= {Kind("AR", 0.0, 0.1, "masked"): (4,), Kind("AR", 0.0, 0.1, "random"): (4,)}
TINY = Crossover(8, 1, 1, 8, 4, {64: LADDERS, 96: LADDERS}, seeds=2, windows=4)


def jobs_of(sizes=TINY, val_ids=VAL):
    return crossover_jobs(sizes, TOKENIZER.vocab_size, TRAIN, val_ids)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- what is trained ---


@pytest.mark.parametrize("preset", crossover.SIZES)
@pytest.mark.parametrize("form", [0, 1])
def test_each_row_reads_the_text_as_often_as_it_says(preset, form):
    sizes, ids = crossover.SIZES[preset][form], torch.arange(4, 30).repeat(20_000)
    for row, trials in crossover_jobs(sizes, 30, ids, ids).items():
        for seed, job in enumerate(trials):
            a_step = job.train.batch_size * job.model.seq_len
            *_, characters, epochs = (int(x) for x in row.replace(",", "").split() if x.isdigit())
            assert abs(job.train.steps * a_step - epochs * characters) <= a_step / 2 and job.train_ids.numel() == characters
            assert row.startswith("AR" if job.model.causal else "LLaDA") and job.train.seed == seed
            for name, value in {"dropout": job.model.dropout, "weight decay": job.train.weight_decay}.items():
                assert (f"{name} {value}" in row) == (name in row) == (value > 0)
            noise = next((name for name in ("masked", "random") if f"{name} inputs" in row), "")
            assert job.architecture is crossover.ARCHITECTURES[noise]


def test_rows_are_trainings_of_their_own():
    ids = torch.arange(4, 30).repeat(4_000)
    every = [job for trials in crossover_jobs(crossover.SIZES["cpu"][1], 30, ids, ids).values() for job in trials]
    assert max(Counter(job.fingerprint() for job in every).values()) == 1


def test_the_full_suite_on_a_cpu_is_four_hours_of_one_core():
    """A step of 16 x 64 characters takes about 30 ms."""
    sizes = crossover.SIZES["cpu"][1]
    steps = sum(sizes.steps(n, e) for n, ladders in sizes.ladders.items() for ladder in ladders.values() for e in ladder)
    assert sizes.seeds * steps * 0.03 <= 4 * 3600
    assert max(sizes.ladders[20_000][crossover.REGULARISED]) >= 4_000 and min(sizes.ladders[5_000][crossover.PLAIN]) <= 60


def test_training_never_sees_what_is_scored():
    cut = len(TEXT) - len(TEST)
    other = TEXT[:cut] + TEXT[cut:][::-1]
    ours, theirs = (suite("crossover", h.PRESETS["smoke"], text)[1].values() for text in (TEXT, other))
    assert other != TEXT and list(map(suite_mark, ours)) == list(map(suite_mark, theirs))


# --- noise of the inputs ---


class Seen(torch.nn.Module):
    """In place of the embedding: keeps the ids that it is asked for."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.ids = inner, None

    def forward(self, ids):
        self.ids = ids
        return self.inner(ids)


@pytest.mark.parametrize("noise", ["masked", "random"])
def test_a_share_of_the_inputs_is_noise_in_training_and_none_afterwards(noise):
    model = crossover.ARCHITECTURES[noise](h.ModelConfig(TOKENIZER.vocab_size, 64, 1, 1, 8, causal=True))
    model.embed = Seen(model.embed)
    ids = torch.randint(4, TOKENIZER.vocab_size, (200, 64), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    before = ids.clone()
    model(ids)
    changed = model.embed.ids[model.embed.ids != ids]
    expected = crossover.NOISE * (1 if noise == "masked" else 1 - 1 / (TOKENIZER.vocab_size - 4))  # some draw what was there
    assert len(changed) / ids.numel() == pytest.approx(expected, abs=4 * (0.15 * 0.85 / ids.numel()) ** 0.5)
    assert set(changed.tolist()) == ({h.MASK_ID} if noise == "masked" else set(range(4, TOKENIZER.vocab_size)))
    assert torch.equal(ids, before), "the targets are these"
    model.eval()(ids)
    assert torch.equal(model.embed.ids, ids)


def test_noisy_trainings_repeat_themselves_and_are_none_but_their_own(in_folder):
    plain, *noisy = (next(j for row, (j, _) in jobs_of().items() if row.startswith(start))
                     for start in ("AR, 64", "AR, masked", "AR, random"))  # fmt: skip
    same = [replace(job, model=plain.model, train=plain.train) for job in (plain, *noisy)]
    weights = []
    for again in range(2):
        for job in same:
            weights.append(h.train("noise", job, root=f"root-{again}", quiet=True).model.head.weight)
    first, second = weights[:3], weights[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


# --- chosen by the validation text, scored on the test text ---


def scored_by_hand(model, job):
    """Nats per character of all windows of the test text: there are fewer than would be scored at most."""
    windows = h.windows(TEST, 8)
    real = windows != h.PAD_ID
    if job.model.causal:
        return float(h.ar_nll(model, windows, h.START_ID).sum() / real.sum())
    nats = 0.0
    for row, ids in enumerate(windows):  # one character a pass, in the order of bit-reversed places
        left = real[row].clone()
        while left.any():
            place = decoding.bit_reversed(None, None, left[None], torch.tensor([1]))[0].nonzero().item()
            probs = model(ids.masked_fill(left, h.MASK_ID)[None])[0, place].softmax(dim=-1)
            nats -= (probs[ids[place]] / probs[4:].sum()).log().item()
            left[place] = False
    return nats / float(real.sum())


@pytest.mark.parametrize("kind", LADDERS)
def test_measure_scores_the_test_text_exactly(in_folder, kind):
    sizes = replace(TINY, ladders={96: {kind: (20,)}}, windows=8)
    job = jobs_of(sizes)[f"{kind.name}, 96 characters, 20 epochs"][1]
    run = h.train("measured", job, quiet=True)
    line = crossover_measure(TEXT)(job, run)
    assert (line["model"], line["kind"]) == (kind.model, kind.name)
    assert line["nats/char"] == pytest.approx(scored_by_hand(run.model, job), rel=1e-5)
    assert line["chosen by"] == min(run.metrics["val_loss"])
    if kind.model == "LLaDA":
        windows, options = h.windows(TEST, 8), {"n_samples": 4, "generator": torch.Generator().manual_seed(0)}
        bound = h.nelbo(run.model, windows, h.MASK_ID, maskable=windows != h.PAD_ID, **options).sum()
        assert line["NELBO"] == pytest.approx(float(bound / (windows != h.PAD_ID).sum()), rel=1e-5)


@pytest.mark.parametrize("row", ["LLaDA, 64 characters, 4 epochs", "AR, 64 characters, 4 epochs"])
def test_only_the_test_text_moves_the_scores(in_folder, row):
    job = jobs_of()[row][0]
    run = h.train("scored", job, quiet=True)
    cut = len(TEXT) - len(TEST)
    first, second = TEXT[: len(TRAIN)] + TEXT[len(TRAIN) : cut][::-1] + TEXT[cut:], TEXT[:cut] + TEXT[cut:][::-1]
    lines = [crossover_measure(text)(job, run) for text in (TEXT, first, second)]
    assert lines[0] == lines[1] and lines[0]["nats/char"] != lines[2]["nats/char"]
    assert lines[0]["chosen by"] == lines[2]["chosen by"]


# --- the table of the best ---

SEEDS = range(3)


def invented(rows):
    """A table of (model, characters, chosen by, scores)."""
    lines = []
    for i, (model, characters, chosen_by, scores) in enumerate(rows):
        line = {"model": model, "kind": f"{model} {i}", "characters": characters, "epochs": float(i), "chosen by": chosen_by}
        lines.append(line | {f"seed {seed}": score for seed, score in zip(SEEDS, scores)})
    return pd.DataFrame(lines)


def test_no_choice_looks_at_scores():
    good, bad = (1.0, 1.1, 1.2), (2.0, 2.3, 2.2)
    table = invented([("LLaDA", 50, 0.5, bad), ("LLaDA", 50, 0.7, good), ("AR", 50, 0.6, good), ("AR", 50, 0.8, bad)])
    best = crossover_best(table).set_index("row").loc["50 characters"]
    assert (best["LLaDA, kind"], best["AR, kind"], best["AR, epochs"]) == ("LLaDA 0", "AR 2", 2)
    each = [b - g for b, g in zip(bad, good)]
    assert best["LLaDA − AR"] == pytest.approx(statistics.mean(each))
    assert best["LLaDA − AR ±"] == pytest.approx(stats.t.ppf(0.975, 2) * statistics.stdev(each) / 3**0.5)


SCORES = st.tuples(*[st.integers(0, 10**6).map(lambda n: n / 10**5)] * 3)
LINES = st.lists(st.tuples(st.sampled_from(["LLaDA", "AR"]), st.sampled_from([50, 100]), SCORES), max_size=6)


@given(LINES, st.lists(SCORES, min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_best_by_enumeration(lines, least, random):
    """Each row has a rank of its own."""
    every = [*lines, *((m, n, s) for (m, n), s in zip([("LLaDA", 50), ("AR", 50), ("LLaDA", 100), ("AR", 100)], least))]
    ranks = random.sample(range(len(every)), len(every))
    best = crossover_best(invented([(m, n, a, x) for (m, n, x), a in zip(every, ranks)])).set_index("row")
    assert len(best) == 2
    ordered = [every[i] for i in sorted(range(len(every)), key=lambda i: ranks[i])]
    for n in (50, 100):
        llada, ar = (next(x[2] for x in ordered if x[:2] == (model, n)) for model in ("LLaDA", "AR"))
        line = best.loc[f"{n} characters"]
        for name, values in {"LLaDA": llada, "AR": ar, "LLaDA − AR": [a - b for a, b in zip(llada, ar)]}.items():
            assert line[name] == pytest.approx(statistics.mean(values), abs=1e-9)
            assert line[f"{name} ±"] == pytest.approx(stats.t.ppf(0.975, 2) * statistics.stdev(values) / 3**0.5, abs=1e-9)


def test_half_a_suite_has_no_best():
    some = (1.0, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="no AR on 1,000 characters; pass the table of the whole suite"):
        crossover_best(invented([("LLaDA", 1000, *some)]))


def test_a_suite_from_training_to_the_best(in_folder):
    """Trained for a few steps, written, read again."""
    options = {"measure": crossover_measure(TEXT), "quiet": True}
    made = run_jobs(h.Results(h.PRESETS["smoke"], TEXT), "crossover", jobs_of(), **options)
    table = pd.read_csv(Path("build", "smoke", "figures", "tables", "crossover.csv"))
    assert table["row"].tolist() == list(jobs_of()) == made["row"].tolist()
    seeds = table[["seed 0", "seed 1"]]
    assert table["nats/char"].tolist() == pytest.approx(seeds.mean(axis=1).tolist(), abs=1e-4)
    assert table.drop(columns=["changed", "NELBO"]).notna().all(axis=None)
    assert table["NELBO"].notna().tolist() == (table["model"] == "LLaDA").tolist()
    best = crossover_best(table)
    assert best["characters"].tolist() == [64, 96] and best.notna().all(axis=None)
    for _, line in best.iterrows():
        for model in ("LLaDA", "AR"):
            mine = table[(table["characters"] == line["characters"]) & (table["model"] == model)]
            chosen = mine[(mine["kind"] == line[f"{model}, kind"]) & (mine["epochs"] == line[f"{model}, epochs"])]
            assert chosen["chosen by"].item() == mine["chosen by"].min()
