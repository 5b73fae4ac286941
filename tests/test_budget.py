"""What more training buys: jobs, compute, measures; the record."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import with_noise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import llada_helpers as h
from beyond import budget, quality
from beyond.ablations import bell_times
from beyond.experiments import main, run_jobs
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
        if "as many" not in row:
            parts = int(row.partition(" / ")[2] or 1)
            whole = h.PRESETS[row.split(", ")[1].partition(" / ")[0]].jobs(*DATA)[row.split(",")[0]]
            assert all(trial.train.steps == round(whole.train.steps / parts) for trial in trials)
        assert [trial.train.seed for trial in trials] == list(range(len(trials)))
        loss = bell_times if "bell" in row else h.diffusion_batch if row.startswith("LLaDA") else h.next_token_batch
        assert all(trial.batch_function is loss for trial in trials)
    assert sum("bell" in row for row in jobs) == 1


def test_equal_compute_is_a_row():
    jobs = budget.budget_jobs(budget.SIZES["cpu"][1], *DATA)
    assert budget.training_flop(jobs["AR, cpu, as many steps as LLaDA"][0]) == budget.training_flop(jobs["LLaDA, cpu"][0])


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
    assert "95% ±" not in table and run_jobs(h.Results(SMOKE, TEXT), "t", jobs, quiet=True)["95% ±"].notna().all()
    assert table.loc[0, ["nats/char", "lowest seed", "highest seed", "text"]].tolist() == [0.5, 0.0, 1.0, "seed 0"]
    assert table["over seeds ±"][0] == pytest.approx(12.706 * math.sqrt(0.5) / math.sqrt(2), rel=1e-3)


def test_from_the_command_line(in_folder, monkeypatch, capsys):
    short = h.TrainConfig(2, 2, evals=1, eval_windows=2)
    monkeypatch.setitem(h.PRESETS, "smoke", replace(SMOKE, llada=short, ar=short))
    Path("text.txt").write_text(TEXT)
    monkeypatch.setenv("LLADA_DATA", "text.txt")
    main(["budget", "--preset", "smoke"])
    table = pd.read_csv("build/smoke/figures/tables/budget.csv")
    assert table["row"].tolist() == ["LLaDA, smoke / 8", "LLaDA, smoke / 4", "AR, smoke / 8", "AR, smoke / 4"]
    assert table["TFLOP"].notna().all() and "AR, smoke / 4" in capsys.readouterr().out


def test_written_texts_keep_their_prompts_and_have_no_special_tokens():
    template = torch.cat((torch.full((3, 2), 5), torch.full((3, 6), h.MASK_ID)), dim=1)
    for causal in (False, True):
        model = h.Transformer(h.ModelConfig(9, 8, n_layer=1, n_head=1, n_embd=8, causal=causal))
        made = quality.write(model, template, temperature=1.0, generator=torch.Generator().manual_seed(0))
        assert made.nfe == 6 and (made.ids[:, :2] == 5).all() and (made.ids >= 4).all()


def curve(name, points):
    return [{"row": name, "model": name, "TFLOP": c, "nats/char": n} for c, n in points]


def test_compute_ratio_between_budgets():
    """LLaDA passes AR's 2.0 half-way, in the logarithm, between 4 and 64: at 16; AR passes LLaDA's 1.5 at 2."""
    table = pd.DataFrame(curve("LLaDA", [(64, 1.5), (4, 2.5)]) + curve("AR", [(1, 2.0), (4, 1.0)]))
    assert budget.compute_ratio(table) == pytest.approx((16.0, 32.0))
    larger = pd.DataFrame([{"row": "LLaDA, cpu_long", "model": "LLaDA", "TFLOP": 900, "nats/char": 1.0}])
    bell = larger.assign(row="LLaDA, cpu, t from a bell")
    for other in (larger, bell):
        assert budget.compute_ratio(pd.concat((table, other))) == budget.compute_ratio(table), "one curve, one size, one loss"
    apart = pd.DataFrame(curve("LLaDA", [(4, 2.5), (8, 2.1)]) + curve("AR", [(1, 2.0), (4, 1.0)]))
    assert all(map(math.isnan, budget.compute_ratio(apart)))


# --- the record ---

TINY = replace(SMOKE, **{name: h.TrainConfig(8, 4, evals=2, eval_windows=2) for name in ("llada", "ar")}, nelbo_samples=1)


def parts_of(text):
    """Training text of the study, what it is chosen on, what is scored: in this order, nothing left out."""
    ids = h.CharTokenizer.from_text(text).encode(text)
    train_ids, scored = h.split(ids, 0.9)
    return (*h.split(train_ids, 8 / 9), scored)


@pytest.fixture
def trained(monkeypatch):
    """The jobs that `train` is asked for."""
    jobs, train = [], h.train

    def noted(name, job, **options):
        jobs.append(job)
        return train(name, job, **options)

    monkeypatch.setattr(h, "train", noted)
    return jobs


def test_the_scored_text_decides_nothing(in_folder, trained):
    """Neither the study nor the record's own training is shown a character of it."""
    text = "".join(TOKENIZER.characters[i % 17 % len(TOKENIZER.characters)] for i in range(3000))
    fitted, chosen_on, scored = parts_of(text)
    budget.make_record(TINY, text, [0, 1], True, 1)
    assert len(trained) == 24 + 4
    for job in trained[:24]:
        assert torch.equal(job.train_ids, fitted) and torch.equal(job.val_ids, chosen_on) and job.train.steps == 2
    for job in trained[24:]:
        assert torch.equal(job.train_ids, torch.cat((fitted, chosen_on))) and job.train.steps == 8
        assert torch.equal(job.val_ids, job.train_ids[-len(scored) :])


def test_the_record_takes_the_studys_best_setting_of_each_model(in_folder, monkeypatch):
    best = {"LLaDA": (1, 0.3, 0.1), "AR": (2, 0.1, 0.0)}
    original = h.Job.validation_nats

    def biased(job, model, sequences):
        """The true loss, less one for the settings that are to win."""
        here = job.model.n_head, job.model.dropout, job.train.weight_decay
        return original(job, model, sequences) - 5 * len(sequences[0]) * (here == best["AR" if job.model.causal else "LLaDA"])

    monkeypatch.setattr(h.Job, "validation_nats", biased)
    table = budget.make_record(TINY, TEXT, [0, 3], True, 1)
    assert table[["model", "seed"]].values.tolist() == [["LLaDA", 0], ["LLaDA", 3], ["AR", 0], ["AR", 3]]
    for name, part in table.groupby("model"):
        heads, dropout, decay = best[name]
        assert set(part["width"]) == {16 * heads} and set(part["dropout"]) == {dropout} and set(part["weight decay"]) == {decay}
    tables = Path("build/smoke/figures/tables")
    pd.testing.assert_frame_equal(pd.read_csv(tables / "record.csv"), table, check_exact=False)
    study = pd.read_csv(tables / "record_study.csv")
    assert len(study) == 24 and study.groupby("model").first()["heads"].to_dict() == {"LLaDA": 1, "AR": 2}


def test_the_record_scores_the_whole_last_tenth(in_folder):
    """Blank models at first: ln V for each of its characters, and no other."""
    blank = replace(TINY, **{name: h.TrainConfig(1, 2, muon_lr=1e-9, adamw_lr=1e-9, evals=1) for name in ("llada", "ar")})
    table = budget.record(blank, TEXT, {})
    assert table["characters"].tolist() == [len(parts_of(TEXT)[2])] * 2 and (table["seed"] == 0).all()
    assert table["nats/char"].tolist() == pytest.approx([math.log(TOKENIZER.vocab_size)] * 2, abs=1e-4)
    assert table["bits/char"].tolist() == pytest.approx([math.log2(TOKENIZER.vocab_size)] * 2, abs=1e-4)
    assert (table["minutes"] > 0).all() and table["device"].str.len().min() > 2


def test_the_study_ranks_its_grid(in_folder):
    table = budget.study(TINY, TEXT)
    assert len(table) == 24 and (table["best at"].between(0, 1)).all()
    for _, part in table.groupby("model"):
        assert part["nats/char"].is_monotonic_increasing and (part["last"] >= part["nats/char"]).all()


def test_an_interrupted_record_is_none(in_folder, monkeypatch):
    """A half-trained model would be scored as the whole one."""

    def interrupted(job, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(h, "training_batch", interrupted)
    for with_study in (False, True):
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            budget.make_record(TINY, TEXT, [0], with_study, 1)
    with pytest.raises(KeyboardInterrupt, match="goes on"):
        budget.trained("a", budget.study_jobs(TINY, TOKENIZER.vocab_size, TRAIN)[0][1], quiet=True)
    assert not Path("build").exists()


def test_the_command_line_makes_the_record(in_folder, monkeypatch, capsys):
    monkeypatch.setitem(h.PRESETS, "smoke", TINY)
    monkeypatch.setattr(h, "load_text", lambda: TEXT)
    main(["record", "--preset", "smoke", "--seeds", "2", "5"])
    assert capsys.readouterr().out.count("LLaDA") >= 2
    assert pd.read_csv("build/smoke/figures/tables/record.csv")["seed"].tolist() == [2, 5] * 2
    assert not Path("build/smoke/figures/tables/record_study.csv").exists()


def test_trainings_side_by_side_are_those_made_one_after_the_other(in_folder):
    jobs = [("a", job) for _, job in budget.study_jobs(TINY, TOKENIZER.vocab_size, TRAIN)[:2]]
    together = budget.train_all(jobs, compiled=False, side_by_side=2)
    for (name, job), run in zip(jobs, together):
        alone = h.train(name, job, root="alone", quiet=True)
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), alone.model.parameters()))


def test_the_gpu_preset_takes_the_careful_setting():
    preset = h.PRESETS["gpu"]
    assert preset.dropout == 0.2 and preset.llada.weight_decay == preset.ar.weight_decay == 0.1 and preset.compiled
    assert preset.ar.steps <= preset.llada.steps / 2
    assert h.Transformer(preset.model(69, causal=True)).n_parameters == pytest.approx(10.7e6, rel=0.01)


def test_operations_by_length_and_a_window_as_part_8_measures_it():
    config = h.ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8)
    assert budget.forward_flop(config, 6, 6) == 6 * budget.forward_flop(config, 1, 6) == 2 * 6 * multiplications(config)
    model = h.Transformer(h.ModelConfig(9, 4, n_layer=1, n_head=1, n_embd=8, causal=True))
    nats, characters = quality.window_nats(model, torch.arange(4, 9), 1)
    assert nats.tolist() == pytest.approx([4 * math.log(9), math.log(9)]) and characters.tolist() == [4, 1]


def test_a_record_may_have_other_heads_and_a_share_of_the_steps():
    job = h.PRESETS["gpu"].jobs(10, TRAIN, VAL)["AR"]
    short = budget.record_job(job, {"heads": 4, "dropout": 0.3, "weight decay": 0.0}, share=1 / 4)
    assert (short.model.n_embd, short.model.dropout, short.train.steps, short.train.weight_decay) == (256, 0.3, 500, 0.0)
