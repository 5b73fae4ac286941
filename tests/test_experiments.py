"""Losses to compare with, suites of trainings and their tables, where to draw t, the command line."""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from notebooks import python_path
from oracle import MASK, PAD, ExactPredictor, WrongPredictor, enumerated_nelbo, seeded, within
from torch import nn

import llada_helpers as h
from beyond import ablations, blocks, crossover, experiments, losses, schedule, vocabulary
from beyond.experiments import experiment, main, run_jobs, suite
from beyond.quality import parts
from beyond.schedule import POWERS, gradient_moment, implied_power

POLYNOMIALS = {f.__name__: (f, power) for power in (0.5, *POWERS) for f in [losses.polynomial(power)]}
UNIFORM = (losses.uniform_times, losses.independent_times, losses.one_time_per_batch, losses.complementary_masks)
VARIANTS = {
    f.__name__: f
    for f in (
        *(h.diffusion_batch, losses.importance_times, *UNIFORM, *(f for f, _ in POLYNOMIALS.values())),
        *(losses.masked_mean, losses.masked_mean_over_t),
    )
}
EQUATION_3 = [name for name in VARIANTS if not name.startswith("masked_mean")]
EXACT = ExactPredictor(length=3, symbols=3)
WRONG = WrongPredictor(EXACT.vocab_size)
SEQUENCE = EXACT.sequences[11]  # WRONG's loss on it falls from 3.9 at small t to 1.9 at t = 1: wrong times would be seen


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", EQUATION_3)
def test_every_form_of_equation_3_has_its_expectation(name, size):
    rows = SEQUENCE.expand(size, -1)
    everything = torch.ones_like(rows, dtype=torch.bool)
    batches = [VARIANTS[name](rows, seeded(seed), everything) for seed in range(4800 // (size + 2))]
    losses = [float(h.weighted_nll(WRONG, *batch)) for batch in batches]
    assert within(losses, enumerated_nelbo(WRONG, SEQUENCE, torch.ones(3, dtype=torch.bool)) / 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", [f.__name__ for f in UNIFORM])
def test_the_times_of_a_batch_are_uniform_on_average(name, size):
    """Read off the weights, which are 1 / (t n)."""
    rows = torch.full((size, 400), 4)
    means = []
    for seed in range(400):
        _, _, weight = VARIANTS[name](rows, seeded(seed), rows > 0)
        largest = weight.amax(dim=1)
        means.append(float(torch.where(largest > 0, 1 / (400 * largest), 0.0).mean()))
    assert within(means, 0.5)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name, power", [("diffusion_batch", h.POWER), *((name, p) for name, (_, p) in POLYNOMIALS.items())])
def test_powers_of_uniform_numbers_are_stratified(name, power, size):
    """Read off the weights, which are p u^(p-1) / (u^p n) = p / (u n): one u in each of `size` parts of (0, 1]."""
    rows = torch.full((size, 4000), 4)
    for seed in range(20):
        _, _, weight = VARIANTS[name](rows, seeded(seed), rows > 0)
        largest = weight.double().amax(dim=1)
        u = (power / (4000 * largest))[largest > 0]
        part = size * u
        assert ((part.frac() - part[0].frac() + 0.5) % 1 - 0.5).abs().max() < 1e-4, "one number, shifted"
        assert part.ceil().unique().numel() == len(part) >= size - 1


def test_uniform_times_are_the_first_power():
    rows = torch.full((7, 30), 4)
    for batches in zip(losses.uniform_times(rows, seeded(1), rows > 0), losses.polynomial(1)(rows, seeded(1), rows > 0)):
        assert torch.equal(*batches)


@pytest.mark.parametrize("power", [0, -1.5, math.nan])
def test_power_must_be_positive(power):
    with pytest.raises(ValueError, match="positive"):
        losses.polynomial(power)


@pytest.mark.parametrize("u", [2.0**-24 / 64, 2.0**-24, 1e-4, 0.5, 1.0])
def test_importance_sampling_inverts_its_distribution(monkeypatch, u):
    """Times have the cumulative distribution (t^2 + t) / 2; the smallest u that a batch of 64 can draw must not give t = 0."""
    monkeypatch.setattr(h, "stratified_times", lambda n, _: torch.full((n,), u))
    rows = torch.full((2, 5000), 4)
    times = []
    original = h.diffusion_batch
    monkeypatch.setattr(h, "diffusion_batch", lambda *given, t: times.append(t) or original(*given, t=t))
    _, _, weight = losses.importance_times(rows, seeded(0), rows > 0)
    t = times[0].double()
    assert ((t**2 + t) / 2).tolist() == pytest.approx([u, u], rel=1e-2)
    counted = weight[weight > 0].double()
    assert torch.allclose(counted, 1 / (t[0] * 5000 * (0.5 + t[0])), rtol=1e-4)


@pytest.mark.parametrize("power", [0.5, *POWERS])
def test_the_smallest_number_of_a_batch_gives_no_time_zero(monkeypatch, power):
    monkeypatch.setattr(h, "stratified_times", lambda n, _: torch.full((n,), 2.0**-24 / 64))
    rows = torch.full((2, 5000), 4)
    _, _, weight = losses.polynomial(power)(rows, seeded(0), rows > 0)
    assert weight.isfinite().all()


@st.composite
def padded_rows(draw):
    """Ids, and which of the real ones are learned."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=7))
    rows = torch.randint(4, 7, (len(lengths), 7), generator=seeded(draw(st.integers(0, 10**6))))
    rows[torch.arange(7) >= torch.tensor(lengths)[:, None]] = PAD
    prompt = draw(st.integers(0, 3))
    return rows, (rows != PAD) & (torch.arange(7) >= prompt)


@pytest.mark.parametrize("name", VARIANTS)
@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_only_what_is_learned_is_masked_and_only_masked_tokens_count(name, data, seed):
    rows, learned = data
    inputs, targets, weight = VARIANTS[name](rows, seeded(seed), learned)
    assert inputs.shape == targets.shape == weight.shape == rows.shape, "odd batches keep their size"
    assert weight.isfinite().all() and (weight >= 0).all()
    assert torch.equal(weight > 0, inputs == MASK)
    known = {(tuple(r), tuple(m)) for r, m in zip(rows.tolist(), learned.tolist())}
    for given_ids, truth, mask in zip(inputs, targets, inputs == MASK):
        assert torch.equal(given_ids[~mask], truth[~mask])
        assert any(tuple(truth.tolist()) == row and not (mask & ~torch.tensor(free)).any() for row, free in known)


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_complementary_masks_share_out_the_learned_tokens(data, seed):
    """Each learned token is masked in exactly one of the two halves; a lone row of an odd batch has no partner."""
    rows, learned = data
    inputs, targets, _ = losses.complementary_masks(rows, seeded(seed), learned)
    half, pairs = (len(rows) + 1) // 2, len(rows) // 2
    first, second = inputs[:half] == MASK, inputs[half:] == MASK
    assert torch.equal(targets, rows[:half].repeat(2, 1)[: len(rows)])
    assert torch.equal(first[:pairs] ^ second, learned[:pairs])


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_masked_mean_is_the_mean_over_the_masked_tokens_of_the_batch(data, seed):
    inputs, targets, weight = losses.masked_mean(data[0], seeded(seed), data[1])
    mask = inputs == MASK
    assert weight[mask].unique().numel() <= 1
    assert float(weight.sum()) == pytest.approx(len(weight) if mask.any() else 0, rel=1e-5)
    if mask.any():
        nll = -WRONG(inputs).log_softmax(-1).gather(2, targets[..., None])[..., 0]
        assert float(h.weighted_nll(WRONG, inputs, targets, weight)) == pytest.approx(float(nll[mask].mean()), rel=1e-4)


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_masked_mean_over_t_is_each_rows_mean_over_t(data, seed):
    rows, learned = data
    inputs, _, weight = losses.masked_mean_over_t(rows, seeded(seed), learned)
    t, masked = h.stratified_times(len(rows), seeded(seed)), (inputs == MASK).sum(dim=1)
    assert torch.allclose(weight.sum(dim=1), (masked > 0) / t, rtol=1e-4)
    assert all(row[row > 0].unique().numel() <= 1 for row in weight)


def test_masked_mean_over_t_weighs_a_row_by_its_harmonic_number():
    """The integral over t of (1 - (1-t)^n) / t is 1 + 1/2 + ... + 1/n: more than 1, yet finite (its square is not)."""
    for n in (1, 4, 20):
        rows = torch.full((200_000, n), 4)
        _, _, weight = losses.masked_mean_over_t(rows, seeded(0), rows > 0)
        assert float(weight.sum(dim=1).mean()) == pytest.approx(sum(1 / k for k in range(1, n + 1)), abs=0.1)


MODEL = h.ModelConfig(10, 8, 1, 2, 8)
CONFIG = h.TrainConfig(steps=4, batch_size=4, evals=2, eval_windows=4)
TRAIN_IDS, VAL_IDS = (torch.randint(4, 10, (n,), generator=seeded(n)) for n in (200, 60))


def job_of(model=MODEL, train_ids=TRAIN_IDS, val_ids=VAL_IDS, make_batch=None, **changes):
    return h.Job(model, dataclasses.replace(CONFIG, **changes), train_ids, val_ids, make_batch)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs, checkpoints and tables are written relative to the working directory."""
    monkeypatch.chdir(tmp_path)


RESULTS = h.Results(h.PRESETS["smoke"], "a text")  # of no experiment: everything goes to build/smoke/figures
TABLES = Path("build", "smoke", "figures", "tables")
KEPT = ["row", "complete", "parameters", "best", "tokens", "seconds", "device", "commit"]


def test_table_of_runs_keeps_the_columns_that_differ():
    a, b = h.train("a", job_of()), h.train("b", job_of(seed=3, muon_lr=0.0))
    table = h.runs_table()
    assert set(table) == {*KEPT, "seed", "muon_lr"}
    assert table.row.tolist() == [a.path.name, b.path.name] and table.complete.all()
    assert table.seed.tolist() == [0, 3] and table.muon_lr.tolist() == [0.02, 0.0]
    assert table["best"].tolist() == pytest.approx([a.summary["best"], b.summary["best"]])
    assert table.tokens.tolist() == [4 * 32, 4 * 32] and table.parameters.tolist() == [a.summary["parameters"]] * 2


def stop_after(patch, steps: int) -> None:
    """Ctrl-C once so many steps of a training have been made."""
    original = h.training_batch

    def batch(job, step):
        if step == steps:
            raise KeyboardInterrupt
        return original(job, step)

    patch.setattr(h, "training_batch", batch)


def test_table_of_runs_tells_what_is_not_complete(monkeypatch):
    """Interrupted after a validation, and before any."""
    h.train("whole", job_of())
    for stop in (1, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            h.train(f"stopped at {stop}", job_of(seed=stop))
    table = h.runs_table().set_index(h.runs_table().row.str.split("-").str[0])
    assert table.complete.to_dict() == {"whole": True, "stopped at 1": False, "stopped at 3": False}
    assert table.tokens["stopped at 3"] == 2 * 32, "what it goes on from"
    assert math.isnan(table.best["stopped at 1"]) and table.best["stopped at 3"] < 3


def test_table_of_one_run_and_of_none(tmp_path):
    assert len(h.runs_table()) == 0
    h.train("a", job_of(), root=tmp_path / "deeper")
    assert sorted(h.runs_table(tmp_path / "deeper")) == sorted(KEPT) and len(h.runs_table()) == 0


def jobs_of(**changes):
    """Two rows of two seeds."""
    return {row: [job_of(seed=seed, adamw_lr=lr, **changes) for seed in (0, 1)] for row, lr in (("a", 0.003), ("b", 0.01))}


def test_rows_of_a_table():
    table = run_jobs(RESULTS, "t", jobs_of())
    runs = [[h.train("-", job) for job in trials] for trials in jobs_of().values()]
    sequences = job_of().validation_sequences()
    learned = h.real_tokens(sequences)
    nats = [torch.stack([job_of().validation_nats(r.model, sequences) for r in trial]).mean(0) for trial in runs]
    ours = [run.summary["best"] for run in runs[0]]
    for (_, line), trial, mine in zip(table.iterrows(), runs, nats):
        best = [run.summary["best"] for run in trial]
        assert line["nats/char"] == pytest.approx(sum(best) / 2, abs=1e-4)
        assert (line["lowest seed"], line["highest seed"]) == pytest.approx((min(best), max(best)), abs=1e-4)
        assert line["over seeds ±"] == pytest.approx(12.706 * abs(best[0] - best[1]) / 2, abs=1e-4)
        assert line["difference"] == pytest.approx(float((mine - nats[0]).sum() / learned.sum()), abs=1e-4)
        apart = (best[0] - ours[0]) - (best[1] - ours[1])  # seed by seed
        assert line["difference over seeds ±"] == pytest.approx(12.706 * abs(apart) / 2, abs=1e-4)
        assert line["epochs"] == pytest.approx(4 * 32 / 200)
        assert line["fingerprint"] == "+".join(run.path.name[-12:] for run in trial)
    assert table["difference ±"][0] == 0 < table["difference ±"][1]
    pd.testing.assert_frame_equal(pd.read_csv(TABLES / "t.csv"), table, check_dtype=False)
    curves = pd.read_csv(TABLES / "t_curves.csv")
    assert len(curves) == 2 * 2 * 2 and curves[(curves.row == "b") & (curves.seed == 1)].val_loss.tolist() == pytest.approx(
        runs[1][1].metrics.val_loss.tolist(), abs=1e-4
    )


def test_one_seed_has_no_interval_over_seeds():
    table = run_jobs(RESULTS, "t", {"a": [job_of()]})
    assert table["over seeds ±"].isna().all() and table["95% ±"].notna().all()
    assert table["lowest seed"][0] == table["highest seed"][0]


def test_difference_is_given_for_the_same_windows_only():
    """As many windows, but of other texts or of another length: a difference window by window would mean nothing."""
    short = h.ModelConfig(10, 4, 1, 2, 8)
    jobs = {"a": [job_of()], "shorter windows": [job_of(short)], "other text": [job_of(val_ids=VAL_IDS.flip(0))]}
    counts = [len(trials[0].validation_sequences()) for trials in jobs.values()]
    assert counts == [4, 4, 4]
    table = run_jobs(RESULTS, "t", jobs)
    assert table.difference.isna().tolist() == [False, True, True]


def test_only_trains_what_matches_and_writes_no_table():
    table = run_jobs(RESULTS, "t", jobs_of(), only="^b$")
    assert table.row.tolist() == ["b"] and len(list(Path("runs").iterdir())) == 2
    assert not (Path("figures").exists() or Path("build").exists())


def test_an_interrupted_suite_leaves_no_table_and_goes_on(monkeypatch):
    jobs = jobs_of(steps=6)
    whole = run_jobs(RESULTS, "whole", {"a": jobs["a"]})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="goes on"):
        stop_after(patch, 3)
        run_jobs(RESULTS, "t", jobs)
    assert len(list(Path("runs").iterdir())) == 3 and not (TABLES / "t.csv").exists()
    pd.testing.assert_frame_equal(run_jobs(RESULTS, "t", jobs)[:1], whole)


FULL, SHORT = jobs_of(steps=6), {"a": [job_of(steps=2, evals=1)]}


def marks(jobs):
    return ["+".join(job.fingerprint() for job in trials) for trials in jobs.values()]


@pytest.fixture(scope="module")
def full_tables(tmp_path_factory):
    """The two files that `run_jobs` leaves for FULL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("full"))
        run_jobs(RESULTS, "t", FULL)
        return {name: (TABLES / f"{name}.csv").read_bytes() for name in ("t", "t_curves")}


@pytest.fixture
def lay(full_tables):
    def install(folder=TABLES, **changed):
        folder.mkdir(parents=True)
        for name, data in {**full_tables, **changed}.items():
            if data is not None:
                (folder / f"{name}.csv").write_bytes(data)

    return install


@pytest.mark.parametrize("folder", [TABLES, Path("figures", "tables")], ids=["own", "committed"])
def test_experiment_takes_the_full_table_as_it_is(lay, full_tables, monkeypatch, folder):
    lay(folder)
    monkeypatch.setattr(h, "train", None)
    before = sorted(Path().rglob("*"))
    table, curves = experiment(RESULTS, "t", FULL, SHORT)
    assert table.fingerprint.tolist() == marks(FULL) and (table.steps == 6).all()
    assert set(curves.row) == {"a", "b"} and curves.step.max() == 6
    assert (folder / "t.csv").read_bytes() == full_tables["t"] and sorted(Path().rglob("*")) == before, "nothing is written"


def test_another_runs_committed_table_stays(lay, full_tables):
    """What was made by other trainings is neither read nor written over by a run that has its own place."""
    lay(Path("figures", "tables"))
    table, _ = experiment(RESULTS, "t", {"a": FULL["a"]}, SHORT)
    assert table.fingerprint.tolist() == marks(SHORT) and (TABLES / "t.csv").exists()
    assert Path("figures/tables/t.csv").read_bytes() == full_tables["t"]


@pytest.mark.parametrize("scored", [True, False])
def test_a_table_of_earlier_code_says_on_the_page_what_made_it(lay, full_tables, monkeypatch, capsys, scored):
    """On the named run hours of training tell more than minutes; older tables do not say on what text they were scored."""
    results = copy.copy(RESULTS)
    results.tables = experiments.COMMITTED
    table = pd.read_csv(io.BytesIO(full_tables["t"]), dtype=str).assign(commit=["none", "abc1234"])
    lay(experiments.COMMITTED, t=table.drop(columns=[] if scored else "scored on").to_csv(index=False).encode())
    monkeypatch.setattr(h, "train", None)
    later = {row: [job_of(steps=7)] for row in FULL}
    assert experiment(results, "t", later, SHORT)[0]["commit"].tolist() == ["none", "abc1234"]
    text = "validation text" if scored else "text of the last 20%, later validation and test"
    assert f"made at commit abc1234, unknown by earlier code and scored on {text};" in capsys.readouterr().out


def test_fingerprints_of_digits_alone_are_not_read_as_numbers(lay, full_tables, monkeypatch):
    """012345678901 and 12345e678901 are hexadecimal digits too."""
    jobs = {row: trials[:1] for row, trials in FULL.items()}
    text = full_tables["t"].decode()
    for trials, short in zip(FULL.values(), ("012345678901", "12345e678901")):
        text = text.replace("+".join(job.fingerprint() for job in trials), short)
    lay(t=text.encode())
    said = {id(jobs["a"][0]): "012345678901", id(jobs["b"][0]): "12345e678901"}
    monkeypatch.setattr(h.Job, "fingerprint", lambda job: said.get(id(job), "another"))
    monkeypatch.setattr(h, "train", None)
    assert (experiment(RESULTS, "t", jobs, SHORT)[0].steps == 6).all()


STALE = {
    "nothing": {"t": None, "t_curves": None},
    "no curves": {"t_curves": None},
    "empty": {"t": b""},
    "binary": {"t": b"\xff\xfe\x00\x81" * 50},
    "ragged": {"t": b"row,fingerprint\na,b,c,d,e\n1\n,,,,,,,,\n"},
    "half a line": {"t": b'row,fingerprint\n"a'},
    "other columns": {"t": b"row,steps\na,6\nb,6\n"},
    "header only": {"t": b"row,fingerprint\n"},
    "curves empty": {"t_curves": b""},
}


@pytest.mark.parametrize("case", STALE)
def test_experiment_trains_the_short_form_where_there_is_no_sound_table(lay, case):
    lay(**STALE[case])
    table, curves = experiment(RESULTS, "t", FULL, SHORT)
    assert table.fingerprint.tolist() == marks(SHORT) and curves.step.tolist() == [2]
    assert pd.read_csv(TABLES / "t.csv").fingerprint.tolist() == marks(SHORT)


@pytest.mark.parametrize("change", ["one seed", "a row more", "a row less", "another name"])
def test_experiment_trains_the_short_form_if_any_fingerprint_differs(lay, change):
    lay()
    full = {
        "one seed": {**FULL, "b": [FULL["b"][0], job_of(seed=7)]},
        "a row more": {**FULL, "c": [job_of()]},
        "a row less": {"a": FULL["a"]},
        "another name": {"a": FULL["a"], "B": FULL["b"]},
    }[change]
    assert experiment(RESULTS, "t", full, SHORT)[0].fingerprint.tolist() == marks(SHORT)


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_jobs_of_every_preset(preset):
    """Each can be set up, and no row of a suite is the same training as another."""
    ids = torch.full((2_000_000,), 5, dtype=torch.int64)
    jobs = [preset.jobs(69, ids, ids)]
    assert [job.batch_function for job in jobs[0].values()] == [h.diffusion_batch, h.next_token_batch]
    for form in (0, 1):
        suites = {
            "ablations": ablations.ablation_jobs(preset, ablations.SIZES[preset.name][form], 69, ids, ids),
            "schedule": schedule.schedule_jobs(preset, schedule.SIZES[preset.name][form], 69, ids, ids),
        }
        for name, seeds in (("ablations", 2), ("schedule", 3)):
            rows = suites[name]
            kinds = [[job.settings() for job in trials] for trials in rows.values()]
            assert not any(a == b for a, b in itertools.combinations(kinds, 2))
            assert all([job.train.seed for job in trials] == list(range(seeds)) for trials in rows.values())
            assert not any(job.batch_function is h.next_token_batch for trials in rows.values() for job in trials)
        sizes = crossover.SIZES[preset.name][form]
        suites["crossover"] = crossover.crossover_jobs(sizes, 69, ids, ids)
        assert len(suites["crossover"]) == len(sizes.characters) * sum(map(len, sizes.ladders.values()))
        assert all(f"{trials[0].train_ids.numel():,} characters" in row for row, trials in suites["crossover"].items())
        every = [job for rows in suites.values() for trials in rows.values() for job in trials]
        assert all(min(j.train.steps, j.train.batch_size, j.train.evals) >= 1 for j in [*every, *jobs[0].values()])


def test_fingerprints_of_the_rows_differ():
    """Batch functions are known by name: those of a factory must not share one."""
    for rows in (
        ablations.ablation_jobs(h.PRESETS["smoke"], CONFIG, 10, TRAIN_IDS, VAL_IDS),
        schedule.schedule_jobs(h.PRESETS["smoke"], CONFIG, 10, TRAIN_IDS, VAL_IDS),
    ):
        prints = [job.fingerprint() for trials in rows.values() for job in trials]
        assert len(set(prints)) == len(prints)


def test_same_depth_has_about_as_many_parameters():
    for preset in h.PRESETS.values():
        jobs = ablations.ablation_jobs(preset, ablations.SIZES[preset.name][0], 69, TRAIN_IDS, VAL_IDS)
        rows = [ablations.OURS, "twice as deep, narrower", "half as deep, wider"]
        ours, *others = [12 * jobs[row][0].model.n_layer * jobs[row][0].model.n_embd ** 2 for row in rows]
        assert others == pytest.approx([ours] * 2, rel=0.3), preset.name


# --- where to draw t ---


def test_first_row_of_the_schedule_is_uniform_and_ours_is_among_the_rows():
    rows = schedule.schedule_jobs(h.PRESETS["cpu"], CONFIG, 10, TRAIN_IDS, VAL_IDS)
    assert next(iter(rows)) == "t = u^1" and f"t = u^{h.POWER}" in rows
    few = schedule.schedule_jobs(h.PRESETS["cpu"], CONFIG, 10, TRAIN_IDS, VAL_IDS, powers=(1, h.POWER), seeds=2)
    assert {row: marks({row: rows[row][:2]}) for row in few} == {row: marks({row: few[row]}) for row in few}


def enumerated_moment(model, sequence, t):
    """The sum over all masks of their probability times the squared norm of the gradient, by hand."""
    value, n = 0.0, len(sequence)
    for mask in itertools.product([False, True], repeat=n):
        mask = torch.tensor(mask)
        logp = model(sequence.masked_fill(mask, MASK)[None])[0].log_softmax(dim=-1)
        loss = -(logp.gather(1, sequence[:, None])[:, 0] * mask).sum() / (t * n)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        value += t ** int(mask.sum()) * (1 - t) ** int((~mask).sum()) * sum(float(g.square().sum()) for g in gradient)
    return value


def test_second_moment_is_that_of_all_masks():
    torch.manual_seed(0)
    model, sequence = nn.Embedding(7, 7), torch.tensor([4, 5, 5, 6])
    times, repeats = (0.1, 0.5, 1.0), 3000
    table = gradient_moment(model, sequence, 4, times, repeats, seeded(0))
    exact = [enumerated_moment(model, sequence, t) for t in times]
    assert table.t.tolist() == list(times)
    for moment, half, true in zip(table["second moment"], table["second moment ±"], exact):
        assert abs(moment - true) <= 2 * half + 1e-6 * true, "4 standard errors"
    assert table["second moment ±"][2] < 1e-6 < table["second moment ±"][0], "at t = 1 there is one mask"


def test_every_time_has_the_same_windows_and_a_model_keeps_its_gradients():
    model = h.Transformer(MODEL)
    tables = [gradient_moment(model, TRAIN_IDS, 8, times, 5, seeded(3)) for times in ((1.0, 1.0), (1.0,))]
    assert tables[0]["second moment"][0] == tables[0]["second moment"][1] == tables[1]["second moment"][0] > 0
    assert all(p.grad is None for p in model.parameters())


def test_two_batches_at_least():
    with pytest.raises(ValueError, match="at least 2"):
        gradient_moment(nn.Embedding(7, 7), TRAIN_IDS, 8, (0.5,), 1)


@given(st.floats(0.3, 5), st.floats(1e-3, 1e3))
def test_implied_power_is_found_again(power, scale):
    t = torch.linspace(0.05, 1, 7, dtype=torch.float64)
    density = t ** (1 / power - 1) / power
    assert implied_power(pd.DataFrame({"t": t, "second moment": scale * density**2})) == pytest.approx(power, rel=1e-6)


def test_what_no_power_fits_is_refused():
    with pytest.raises(ValueError, match="no power fits"):
        implied_power(pd.DataFrame({"t": [0.1, 1.0], "second moment": [1000.0, 1.0]}))
    with pytest.raises(ValueError, match="two or more"):
        implied_power(pd.DataFrame({"t": [0.1, 0.1], "second moment": [1.0, 1.0]}))


# --- the command line ---


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The smoke preset, shrunk, and a short text."""
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question. " * 16)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "text.txt"))
    config = h.TrainConfig(2, 2, evals=1, eval_windows=2)
    ladders = {crossover.PLAIN: (1,), crossover.REGULARISED: (1, 2), crossover.AR[1]: (1,)}
    sizes = crossover.Crossover(8, 1, 1, 8, 2, (50,), ladders, seeds=2, windows=2)
    changes = {"seq_len": 8, "n_layer": 1, "n_head": 1, "n_embd": 8, "llada": config, "ar": config}
    monkeypatch.setitem(h.PRESETS, "smoke", dataclasses.replace(h.PRESETS["smoke"], **changes))
    for room in (ablations, schedule, vocabulary):
        monkeypatch.setitem(room.SIZES, "smoke", (config, config))
    monkeypatch.setitem(blocks.SIZES, "smoke", (("smoke", config), ("smoke", config)))
    monkeypatch.setitem(experiments.SUITES["schedule_full"].sizes, "smoke", (config, config))
    monkeypatch.setitem(crossover.SIZES, "smoke", (sizes, sizes))


@pytest.mark.parametrize("model", ["llada", "ar"])
def test_train_from_the_command_line(tiny, capsys, model):
    main(["train", "--preset", "smoke", "--model", model])
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (run,) = Path("runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert said == {"run": str(run), **{key: record[key] for key in ("best", "steps", "tokens", "seconds")}}
    assert record["complete"] and record["causal"] is (model == "ar")
    text = h.load_text()
    ids = parts(h.CharTokenizer.from_text(text).encode(text))[:2]
    job = h.PRESETS["smoke"].jobs(h.CharTokenizer.from_text(text).vocab_size, *ids)[{"llada": "LLaDA", "ar": "AR"}[model]]
    assert run.name == f"smoke-{model}-{job.fingerprint()}", "the notebook finds it"
    main(["train", "--preset", "smoke", "--model", model])
    assert "complete since before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, only, row",
    [
        ("ablations", "^ours", ablations.OURS),
        ("ablate", "AdamW", "AdamW only"),
        ("crossover", "^AR.*50", "AR, dropout 0.2, weight decay 0.1, 50 characters, 1 epochs"),
        ("schedule", "u.1$", "t = u^1"),
        ("schedule_full", str(h.POWER), f"t = u^{h.POWER}"),
        ("tuning", "^32 windows", "32 windows"),
        ("tuning_ar", "^dropout", "dropout 0.1"),
        ("vocabulary", "^AR, char", "AR, characters"),
    ],
)
def test_one_row_of_an_experiment_from_the_command_line(tiny, capsys, command, only, row):
    main([command, "--preset", "smoke", "--only", only])
    assert row in capsys.readouterr().out and not (Path("figures").exists() or Path("build").exists())


@pytest.mark.parametrize("name", ["crossover", "schedule"])
def test_experiment_from_the_command_line_is_what_the_notebook_loads(tiny, monkeypatch, name):
    main([name, "--preset", "smoke"])
    full, _, options = suite(name, h.PRESETS["smoke"], h.load_text())
    monkeypatch.setattr(h, "train", None)
    table, curves = experiment(h.Results(h.PRESETS["smoke"], h.load_text()), name, full, {}, **options)
    assert table.row.tolist() == list(full) and set(curves.row) == set(full)


@pytest.mark.parametrize("name", experiments.SUITES)
def test_every_suite_has_two_forms_for_every_preset(tiny, name):
    full, short, options = suite(name, h.PRESETS["smoke"], h.load_text())
    lengths = options["lengths"]
    assert full and short and set(experiments.SUITES[name].sizes) == set(h.PRESETS)
    assert lengths is None or set(lengths) == set(full) == set(short)
    assert all(len({job.train.seed for job in trials}) == len(trials) for trials in full.values())


def launched(*arguments):
    """What a launcher's processes say, in the working directory."""
    environment = {**os.environ, "PYTHONPATH": python_path(Path(h.__file__).parent), "OMP_NUM_THREADS": "1"}
    environment |= {"LLADA_DATA": "text.txt", "CUDA_VISIBLE_DEVICES": ""}  # there may be fewer GPUs than processes
    done = subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_launchers(tmp_path):
    """torchrun's two processes train one model; accelerate launch finds it complete."""
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question. " * 16)
    command = ["-m", "beyond.experiments", "train", "--preset", "smoke", "--model", "ar"]
    said = launched("torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)
    first, second = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert (first["run"], first["best"]) == (second["run"], second["best"])
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    said = launched("accelerate.commands.launch", "--cpu", "--num_processes", "1", *command)
    assert "complete since before" in said and json.loads(said.splitlines()[-1])["best"] == first["best"]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for command in ("train", *experiments.SUITES):
        assert command in said
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0 and "--preset" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["train", "--preset", "huge", "--model", "ar"], "smoke"),
        (["train", "--preset", "smoke", "--model", "gpt"], "llada"),
        (["train", "--preset", "smoke"], "--model"),
        (["evaluate"], "ablations"),
        ([], "command"),
    ],
)
def test_wrong_arguments_end_with_what_is_right(capsys, arguments, named):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and named in capsys.readouterr().err
    assert not list(Path().iterdir()), "before anything is read or written"


def test_unknown_preset_in_the_environment(monkeypatch):
    monkeypatch.setenv("LLADA_PRESET", "huge")
    with pytest.raises(ValueError, match=r"huge.*smoke"):
        main(["train", "--model", "ar"])
