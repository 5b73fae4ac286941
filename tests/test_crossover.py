"""Little text, many epochs: what is trained, both checkpoints, what is chosen by and what is scored, the table of the best."""

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
from beyond import crossover
from beyond.crossover import Crossover, Kind, crossover_best, crossover_jobs, crossover_measure, last_model
from beyond.experiments import run_jobs, suite, suite_mark
from beyond.quality import parts

TEXT = "to be, or not to be: that is the question. " * 20
TOKENIZER = h.CharTokenizer.from_text(TEXT)
TRAIN, VAL, TEST = parts(TOKENIZER.encode(TEXT))
LADDERS = {Kind("LLaDA"): (4,), Kind("LLaDA", 0.1, 0.1): (4, 8), Kind("AR"): (2, 4), Kind("AR", 0.5, 0.3): (4,)}
TINY = Crossover(8, 1, 1, 8, 4, (64, 96), LADDERS, seeds=2, windows=4)


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
            assert (f"dropout {job.model.dropout}, weight decay {job.train.weight_decay}" in row) == (job.model.dropout > 0)


def test_rows_are_trainings_of_their_own():
    ids = torch.arange(4, 30).repeat(4_000)
    every = [job for trials in crossover_jobs(crossover.SIZES["cpu"][1], 30, ids, ids).values() for job in trials]
    assert max(Counter(job.fingerprint() for job in every).values()) == 1


def test_the_full_suite_on_a_cpu_is_four_hours_of_one_core():
    """A step of 16 x 64 characters takes about 25 ms; both LLaDAs go past 600 epochs of trials, or to 2,000."""
    sizes = crossover.SIZES["cpu"][1]
    epochs = {kind: sum(ladder) for kind, ladder in sizes.ladders.items()}
    steps = sum(sizes.steps(n, e) for n in sizes.characters for ladder in sizes.ladders.values() for e in ladder)
    assert steps == pytest.approx(sum(epochs.values()) * sum(sizes.characters) / 1024, rel=0.001)
    assert sizes.seeds * steps * 0.025 <= 4 * 3600
    assert max(sizes.ladders[crossover.REGULARISED]) >= 2_000


def test_training_never_sees_what_is_scored():
    cut = len(TEXT) - len(TEST)
    other = TEXT[:cut] + TEXT[cut:][::-1]
    ours, theirs = (suite("crossover", h.PRESETS["smoke"], text)[1].values() for text in (TEXT, other))
    assert other != TEXT and list(map(suite_mark, ours)) == list(map(suite_mark, theirs))


# --- both checkpoints ---


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A training on a few characters whose validation text is noise: the sooner it stops, the better."""
    noise = torch.randint(4, TOKENIZER.vocab_size, (200,), generator=torch.Generator().manual_seed(0))
    shape = h.ModelConfig(TOKENIZER.vocab_size, 8, 1, 1, 8, causal=True)
    job = h.Job(shape, h.TrainConfig(40, 4, evals=20, eval_windows=20), TRAIN[:30], noise)
    return job, h.train("overfitted", job, root=tmp_path_factory.mktemp("runs"), quiet=True)


def test_last_model_is_that_of_the_last_step(overfitted, tmp_path):
    """The same training validated once has its end for its best."""
    job, run = overfitted
    assert run.metrics["val_loss"].idxmin() < len(run.metrics) - 1, "nothing to tell apart"
    once = h.train("once", replace(job, train=replace(job.train, evals=1)), root=tmp_path, quiet=True).model.state_dict()
    last = last_model(job, run)
    assert not last.training
    for name, weight in last.state_dict().items():
        assert torch.equal(weight, once[name])
    assert not torch.equal(run.model.head.weight, once["head.weight"])


def test_last_model_keeps_what_is_there(overfitted):
    job, run = overfitted
    before = {path: path.read_bytes() for path in run.path.parents[1].rglob("*") if path.is_file()}
    last_model(job, run)
    assert before == {path: path.read_bytes() for path in run.path.parents[1].rglob("*") if path.is_file()}


def test_last_model_refuses_what_is_missing_damaged_or_of_another_job(overfitted, tmp_path):
    job, run = overfitted
    state = run.path.parents[1] / "checkpoints" / run.path.name / "last.state"
    copy = tmp_path / "checkpoints" / run.path.name / "last.state"
    moved = run._replace(path=tmp_path / "runs" / run.path.name)
    with pytest.raises(ValueError, match="LLADA_RETRAIN"):
        last_model(job, moved)
    copy.parent.mkdir(parents=True)
    data = bytearray(state.read_bytes())
    copy.write_bytes(data)
    last_model(job, moved)
    with pytest.raises(ValueError, match="another run"):
        last_model(replace(job, train=replace(job.train, seed=1)), moved)
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        last_model(job, moved)


# --- chosen by the validation text, scored on the test text ---


def scored_by_hand(model, job):
    """Nats per character of all windows of the test text: there are fewer than would be scored at most."""
    windows = h.windows(TEST, 8)
    real = windows != h.PAD_ID
    if job.model.causal:
        return float(h.ar_nll(model, windows, h.START_ID).sum() / real.sum())
    options = {"n_samples": 4, "maskable": real, "generator": torch.Generator().manual_seed(0)}
    return float(h.nelbo(model, windows, h.MASK_ID, **options).sum() / real.sum())


@pytest.mark.parametrize("kind", LADDERS)
def test_measure_scores_both_checkpoints_on_the_test_text(in_folder, kind):
    job = jobs_of(replace(TINY, ladders={kind: (20,)}, characters=(96,), windows=8))[f"{kind.name}, 96 characters, 20 epochs"][1]
    run = h.train("measured", job, quiet=True)
    line = crossover_measure(TEXT)(job, run)
    assert (line["model"], line["kind"]) == (kind.model, kind.name)
    assert line["nats/char"] == line["best, seed 1"] == pytest.approx(scored_by_hand(run.model, job), rel=1e-5)
    assert line["end, seed 1"] == pytest.approx(scored_by_hand(last_model(job, run), job), rel=1e-5)
    assert line["best, chosen by"] == min(run.metrics["val_loss"]) <= line["end, chosen by"] == run.metrics["val_loss"].iloc[-1]


def test_measure_tells_the_checkpoints_apart(overfitted):
    job, run = overfitted
    line = crossover_measure(TEXT)(job, run)
    assert line["best, chosen by"] < line["end, chosen by"] and line["best, seed 0"] != line["end, seed 0"]


def test_only_the_test_text_moves_the_scores(overfitted):
    job, run = overfitted
    cut = len(TEXT) - len(TEST)
    first, second = TEXT[: len(TRAIN)] + TEXT[len(TRAIN) : cut][::-1] + TEXT[cut:], TEXT[:cut] + TEXT[cut:][::-1]
    lines = [crossover_measure(text)(job, run) for text in (TEXT, first, second)]
    assert lines[0] == lines[1]
    for column in ("nats/char", "best, seed 0", "end, seed 0"):
        assert lines[0][column] != lines[2][column]
    assert lines[0]["best, chosen by"] == lines[2]["best, chosen by"]


# --- the table of the best ---

SEEDS = range(3)


def invented(rows):
    """A table of (model, characters, chosen by, scores) for each checkpoint alike, unless the last one says otherwise."""
    lines = []
    for i, (model, characters, best, end) in enumerate(rows):
        line = {"model": model, "kind": f"{model} {i}", "characters": characters, "epochs": float(i)}
        for checkpoint, (chosen_by, scores) in (("best", best), ("end", end)):
            line |= {f"{checkpoint}, chosen by": chosen_by, **{f"{checkpoint}, seed {s}": x for s, x in zip(SEEDS, scores)}}
        lines.append(line)
    return pd.DataFrame(lines)


def test_each_checkpoint_has_its_own_choice_and_no_choice_looks_at_scores():
    good, bad = (1.0, 1.1, 1.2), (2.0, 2.3, 2.2)
    table = invented([
        ("LLaDA", 50, (0.5, bad), (0.9, good)),
        ("LLaDA", 50, (0.7, good), (0.8, bad)),
        ("AR", 50, (0.6, good), (0.7, good)),
        ("AR", 50, (0.8, bad), (0.6, bad)),
    ])  # fmt: skip
    best = crossover_best(table).set_index("row")
    assert best["LLaDA, kind"].tolist() == ["LLaDA 0", "LLaDA 1"] and best["AR, kind"].tolist() == ["AR 2", "AR 3"]
    assert best["AR, epochs"].tolist() == [2, 3]
    difference = best.loc["50 characters, best"]
    each = [b - g for b, g in zip(bad, good)]
    assert difference["LLaDA − AR"] == pytest.approx(statistics.mean(each))
    assert difference["LLaDA − AR ±"] == pytest.approx(stats.t.ppf(0.975, 2) * statistics.stdev(each) / 3**0.5)
    assert best.loc["50 characters, end", ["LLaDA − AR", "LLaDA − AR ±"]].tolist() == [0, 0], "the same scores, seed by seed"


SCORES = st.tuples(*[st.integers(0, 10**6).map(lambda n: n / 10**5)] * 3)
LINES = st.lists(st.tuples(st.sampled_from(["LLaDA", "AR"]), st.sampled_from([50, 100]), SCORES, SCORES), max_size=6)


@given(LINES, st.lists(st.tuples(SCORES, SCORES), min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_best_by_enumeration(lines, least, random):
    """Each row has a rank of its own, for each checkpoint another."""
    every = [*lines, *((m, n, *s) for (m, n), s in zip([("LLaDA", 50), ("AR", 50), ("LLaDA", 100), ("AR", 100)], least))]
    ranks = [random.sample(range(len(every)), len(every)) for _ in range(2)]
    best = crossover_best(invented([(m, n, (a, x), (b, y)) for (m, n, x, y), a, b in zip(every, *ranks)])).set_index("row")
    assert len(best) == 4
    for which, checkpoint in enumerate(("best", "end")):
        ordered = [every[i] for i in sorted(range(len(every)), key=lambda i: ranks[which][i])]
        for n in (50, 100):
            llada, ar = (next(x[2 + which] for x in ordered if x[:2] == (model, n)) for model in ("LLaDA", "AR"))
            line = best.loc[f"{n} characters, {checkpoint}"]
            for name, values in {"LLaDA": llada, "AR": ar, "LLaDA − AR": [a - b for a, b in zip(llada, ar)]}.items():
                assert line[name] == pytest.approx(statistics.mean(values), abs=1e-9)
                assert line[f"{name} ±"] == pytest.approx(stats.t.ppf(0.975, 2) * statistics.stdev(values) / 3**0.5, abs=1e-9)


def test_half_a_suite_has_no_best():
    some = (1.0, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="no AR on 1,000 characters; pass the table of the whole suite"):
        crossover_best(invented([("LLaDA", 1000, some, some)]))


def test_a_suite_from_training_to_the_best(in_folder):
    """Trained for a few steps, written, read again."""
    options = {"measure": crossover_measure(TEXT), "quiet": True}
    made = run_jobs(h.Results(h.PRESETS["smoke"], TEXT), "crossover", jobs_of(), **options)
    table = pd.read_csv(Path("build", "smoke", "figures", "tables", "crossover.csv"))
    assert table["row"].tolist() == list(jobs_of()) == made["row"].tolist()
    seeds = table[["best, seed 0", "best, seed 1"]]
    assert table["nats/char"].tolist() == pytest.approx(seeds.mean(axis=1).tolist(), abs=1e-4)
    assert table["lowest seed"].tolist() == seeds.min(axis=1).tolist()
    assert (table["best, chosen by"] <= table["end, chosen by"]).all() and table.drop(columns="changed").notna().all(axis=None)
    best = crossover_best(table)
    assert best["characters"].tolist() == [64, 64, 96, 96] and best.notna().all(axis=None)
    for _, line in best.iterrows():
        for model in ("LLaDA", "AR"):
            chosen = table[(table["characters"] == line["characters"]) & (table["kind"] == line[f"{model}, kind"])]
            chosen = chosen[chosen["epochs"] == line[f"{model}, epochs"]]
            checkpoint = line["row"].split(", ")[1]
            mine = table[(table["characters"] == line["characters"]) & (table["model"] == model)]
            assert chosen[f"{checkpoint}, chosen by"].item() == mine[f"{checkpoint}, chosen by"].min()
