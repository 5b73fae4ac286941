"""What more training buys, and the recipe's choices: jobs, compute, measures."""

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import with_noise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import llada_helpers as h
from beyond import budget, losses, quality, tuning
from beyond.experiments import main, run_jobs, suite
from beyond.vocabulary import multiplications

TEXT = "to be, or not to be: that is the question. " * 40
TOKENIZER = h.CharTokenizer.from_text(TEXT)
TRAIN, VAL, TEST = quality.parts(TOKENIZER.encode(TEXT))
DATA = (TOKENIZER.vocab_size, TRAIN, VAL)
SMOKE = h.PRESETS["smoke"]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("shape", [(80, 16, 2, 2, 32), (7, 5, 1, 1, 8), (40, 33, 3, 2, 12)])
def test_operations_are_those_that_torch_counts(shape):
    config = h.ModelConfig(*shape)
    model, ids = h.Transformer(config), torch.full((3, config.seq_len), 5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others go uncounted on a CPU
        model(ids)
    assert counter.get_total_flops() == 2 * multiplications(config) * ids.numel()


def test_a_training_costs_three_forward_passes():
    job = SMOKE.jobs(*DATA)["LLaDA"]
    job = replace(job, train=replace(job.train, steps=1, batch_size=4))
    model, batch = h.Transformer(job.model), h.training_batch(job, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        h.weighted_nll(model, *batch).backward()
    assert counter.get_total_flops() == pytest.approx(budget.training_flop(job), rel=0.05)


def test_whole_budgets_are_the_presets_own_trainings():
    jobs = budget.budget_jobs(budget.SIZES["cpu_long"][1], *DATA)
    for name in ("LLaDA", "AR"):
        for preset in ("cpu", "cpu_long"):
            assert jobs[f"{name}, {preset}"][0].fingerprint() == h.PRESETS[preset].jobs(*DATA)[name].fingerprint()
    for row, trials in jobs.items():
        share = 1 / int(row.partition(" / ")[2] or 1)
        whole = h.PRESETS[row.split(", ")[1].partition(" / ")[0]].jobs(*DATA)[row.split(",")[0]]
        assert all(trial.train.steps == round(share * whole.train.steps) for trial in trials)
        assert [trial.train.seed for trial in trials] == list(range(len(trials)))


def test_measure_is_that_of_part_8(in_folder):
    model = h.Transformer(SMOKE.model(TOKENIZER.vocab_size, causal=False))
    torch.manual_seed(0)
    with_noise(model, 0.1)
    job = SMOKE.jobs(*DATA)["LLaDA"]
    row = budget.budget_measure(SMOKE, TEXT, "to be")(job, h.Run(model, pd.DataFrame(), {}, None))
    windows = h.windows(TEST, SMOKE.seq_len)
    real, seeded = windows != h.PAD_ID, torch.Generator().manual_seed(0)
    nats = h.nelbo(model, windows, h.MASK_ID, n_samples=SMOKE.nelbo_samples, maskable=real, generator=seeded)
    assert row["nats/char"] == h.per_character(nats, real.sum(dim=1))[0]
    _, template = quality.prompts(windows, SMOKE.texts)
    made = quality.write(model, template, temperature=1.0, generator=torch.Generator().manual_seed(0))
    judge = quality.ngram_judge(TEXT[: len(TRAIN)])
    each = [judge(TOKENIZER.decode(ids), quality.PREFIX) for ids in made.ids]
    assert row["judge nats/char"] == pytest.approx(np.mean(each)) and row["sample"].startswith("to be")
    assert len(row["sample"]) == SMOKE.seq_len and row["TFLOP"] == budget.training_flop(job) / 1e12
    assert row["scored on"] == "test text"


def test_measured_columns_replace_and_average(in_folder):
    job = SMOKE.jobs(*DATA)["AR"]
    jobs = {"a": [replace(job, train=h.TrainConfig(1, 2, evals=1, eval_windows=2, seed=seed)) for seed in (0, 1)]}
    measure = lambda trial, run: {"nats/char": float(trial.train.seed), "text": f"seed {trial.train.seed}"}  # noqa: E731
    table = run_jobs(h.Results(SMOKE, TEXT), "t", jobs, quiet=True, measure=measure)
    assert table["scored on"].tolist() == ["validation text"] and "difference" in table
    elsewhere = lambda trial, run: measure(trial, run) | {"scored on": "test text"}  # noqa: E731
    other = run_jobs(h.Results(SMOKE, TEXT), "t", jobs, quiet=True, measure=elsewhere)
    assert other["scored on"].tolist() == ["test text"] and "difference" not in other, "differences are of validation windows"
    assert table.loc[0, ["nats/char", "lowest seed", "highest seed", "text"]].tolist() == [0.5, 0.0, 1.0, "seed 0"]
    assert table["over seeds ±"][0] == pytest.approx(12.706 * math.sqrt(0.5) / math.sqrt(2), rel=1e-3)


def test_from_the_command_line(in_folder, monkeypatch, capsys):
    short = h.TrainConfig(2, 2, evals=1, eval_windows=2)
    monkeypatch.setitem(h.PRESETS, "smoke", replace(SMOKE, llada=short, ar=short))
    Path("text.txt").write_text(TEXT)
    monkeypatch.setenv("LLADA_DATA", "text.txt")
    main(["budget", "--preset", "smoke"])
    table = pd.read_csv("build/smoke/figures/tables/budget.csv")
    assert table["row"].tolist() == ["LLaDA, smoke / 2", "LLaDA, smoke", "AR, smoke / 2", "AR, smoke"]
    assert table["TFLOP"].notna().all() and "AR, smoke" in capsys.readouterr().out


def test_written_texts_keep_their_prompts_and_have_no_special_tokens():
    template = torch.cat((torch.full((3, 2), 5), torch.full((3, 6), h.MASK_ID)), dim=1)
    for causal in (False, True):
        model = h.Transformer(h.ModelConfig(9, 8, n_layer=1, n_head=1, n_embd=8, causal=causal))
        made = quality.write(model, template, temperature=1.0, generator=torch.Generator().manual_seed(0))
        assert made.nfe == 6 and (made.ids[:, :2] == 5).all() and (made.ids >= 4).all()


def curve(name, points):
    return [{"model": name, "TFLOP": c, "nats/char": n} for c, n in points]


def test_compute_ratio_between_budgets():
    """LLaDA passes AR's 2.0 half-way, in the logarithm, between 4 and 64: at 16; AR passes LLaDA's 1.5 at 2."""
    table = pd.DataFrame(curve("LLaDA", [(64, 1.5), (4, 2.5)]) + curve("AR", [(1, 2.0), (4, 1.0)]))
    assert budget.compute_ratio(table) == pytest.approx((16.0, 32.0))
    apart = pd.DataFrame(curve("LLaDA", [(4, 2.5), (8, 2.1)]) + curve("AR", [(1, 2.0), (4, 1.0)]))
    assert all(map(math.isnan, budget.compute_ratio(apart)))


@pytest.mark.parametrize("name", ["tuning", "tuning_ar", "tuning_weights"])
def test_one_choice_is_changed_in_each_row(name):
    full, _, _ = suite(name, SMOKE, TEXT)
    first = next(iter(full.values()))[0]
    for row, trials in list(full.items())[1:]:
        parts = [(trials[0].model, first.model), (trials[0].train, first.train)]
        changed = {f.name for ours, base in parts for f in fields(ours) if getattr(ours, f.name) != getattr(base, f.name)}
        changed |= {"batch"} if trials[0].batch_function.__name__ != first.batch_function.__name__ else set()
        changed |= {"architecture"} if trials[0].architecture is not first.architecture else set()
        names = changed - {"steps", "evals"}  # the same number of characters
        pairs = ({"n_layer", "n_embd"}, {"batch_size", "seq_len"}, {"architecture", "decay"})
        assert len(names) == 1 or names in pairs, (row, changed)
        read = [t.train.steps * t.train.batch_size * t.model.seq_len for t in (trials[0], first)]
        assert read[0] == pytest.approx(read[1], rel=0.15), row


def test_a_batch_function_may_change_at_a_step():
    job = replace(SMOKE.jobs(*DATA)["LLaDA"], make_batch=losses.switched(losses.masked_mean, losses.uniform_times, 7))
    for seed in (0, 3):
        for step in (0, 6, 7, 8):
            seeded = replace(job, train=replace(job.train, seed=seed))
            expected = replace(seeded, make_batch=losses.masked_mean if step < 7 else losses.uniform_times)
            for ours, theirs in zip(h.training_batch(seeded, step), h.training_batch(expected, step)):
                assert torch.equal(ours, theirs), (seed, step)
    later = losses.switched(losses.masked_mean, losses.uniform_times, 8)
    assert job.fingerprint() != replace(job, make_batch=later).fingerprint()


def test_another_shape_has_about_as_many_weights():
    shape = h.PRESETS["cpu"].model(100, causal=False)
    for n_layer in range(1, 13):
        other = tuning.reshaped(shape, n_layer)
        counts = [sum(p.numel() for p in h.Transformer(config).blocks.parameters()) for config in (other, shape)]
        assert other.n_layer == n_layer and counts[0] == pytest.approx(counts[1], rel=0.1)  # widths come in steps of 8


def test_rows_of_the_recipe_are_all_different_trainings():
    for rows in (tuning.llada_jobs, tuning.ar_jobs, tuning.weight_jobs):
        jobs = rows(SMOKE, 10_240, *DATA)
        marks = [trial.fingerprint() for trials in jobs.values() for trial in trials]
        assert len(set(marks)) == len(marks)
