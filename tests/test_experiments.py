"""Section 11 and the tables of section 5: losses to compare with, many trainings, one table, the command line."""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from oracle import MASK, PAD, ExactPredictor, WrongPredictor, enumerated_nelbo, within

import llada_helpers as h

VARIANTS = {
    f.__name__: f
    for f in (
        *(h.diffusion_batch, h.independent_times, h.one_time_per_batch, h.importance_times, h.complementary_masks),
        *(h.masked_mean, h.masked_mean_over_t),
    )
}
EQUATION_3 = [name for name in VARIANTS if not name.startswith("masked_mean")]
EXACT = ExactPredictor(length=3, symbols=3)
WRONG = WrongPredictor(EXACT.vocab_size)
SEQUENCE = EXACT.sequences[11]  # WRONG's loss on it falls from 3.9 at small t to 1.9 at t = 1: wrong times would be seen


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", EQUATION_3)
def test_every_form_of_equation_3_has_its_expectation(name, size):
    rows = SEQUENCE.expand(size, -1)
    everything = torch.ones_like(rows, dtype=torch.bool)
    batches = [VARIANTS[name](rows, seeded(seed), everything) for seed in range(4800 // (size + 2))]
    losses = [float(h.weighted_nll(WRONG, *batch)) for batch in batches]
    assert within(losses, enumerated_nelbo(WRONG, SEQUENCE, torch.ones(3, dtype=torch.bool)) / 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", [name for name in EQUATION_3 if name != "importance_times"])
def test_the_times_of_a_batch_are_uniform_on_average(name, size):
    """Read off the weights, which are 1 / (t n)."""
    rows = torch.full((size, 400), 4)
    means = []
    for seed in range(400):
        _, _, weight = VARIANTS[name](rows, seeded(seed), rows > 0)
        largest = weight.amax(dim=1)
        means.append(float(torch.where(largest > 0, 1 / (400 * largest), 0.0).mean()))
    assert within(means, 0.5)


@pytest.mark.parametrize("u", [2.0**-24 / 64, 2.0**-24, 1e-4, 0.5, 1.0])
def test_importance_sampling_inverts_its_distribution(monkeypatch, u):
    """Times have the cumulative distribution (t^2 + t) / 2; the smallest u that a batch of 64 can draw must not give t = 0."""
    monkeypatch.setattr(h, "stratified_times", lambda n, _: torch.full((n,), u))
    rows = torch.full((2, 5000), 4)
    times = []
    monkeypatch.setattr(h, "_check_times", lambda t, *_, check=h._check_times, **k: times.append(t) or check(t, *_, **k))
    _, _, weight = h.importance_times(rows, seeded(0), rows > 0)
    t = times[0].double()
    assert ((t**2 + t) / 2).tolist() == pytest.approx([u, u], rel=1e-2)
    counted = weight[weight > 0].double()
    assert torch.allclose(counted, 1 / (t[0] * 5000 * (0.5 + t[0])), rtol=1e-4)


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
    inputs, targets, _ = h.complementary_masks(rows, seeded(seed), learned)
    half, pairs = (len(rows) + 1) // 2, len(rows) // 2
    first, second = inputs[:half] == MASK, inputs[half:] == MASK
    assert torch.equal(targets, rows[:half].repeat(2, 1)[: len(rows)])
    assert torch.equal(first[:pairs] ^ second, learned[:pairs])


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_masked_mean_is_the_mean_over_the_masked_tokens_of_the_batch(data, seed):
    inputs, targets, weight = h.masked_mean(data[0], seeded(seed), data[1])
    mask = inputs == MASK
    assert weight[mask].unique().numel() <= 1
    assert float(weight.sum()) == pytest.approx(len(weight) if mask.any() else 0, rel=1e-5)
    if mask.any():
        nll = -WRONG(inputs).log_softmax(-1).gather(2, targets[..., None])[..., 0]
        assert float(h.weighted_nll(WRONG, inputs, targets, weight)) == pytest.approx(float(nll[mask].mean()), rel=1e-4)


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_masked_mean_over_t_is_each_rows_mean_over_t(data, seed):
    rows, learned = data
    inputs, _, weight = h.masked_mean_over_t(rows, seeded(seed), learned)
    t, masked = h.stratified_times(len(rows), seeded(seed)), (inputs == MASK).sum(dim=1)
    assert torch.allclose(weight.sum(dim=1), (masked > 0) / t, rtol=1e-4)
    assert all(row[row > 0].unique().numel() <= 1 for row in weight)


def test_masked_mean_over_t_weighs_a_row_by_its_harmonic_number():
    """The integral over t of (1 - (1-t)^n) / t is 1 + 1/2 + ... + 1/n: more than 1, yet finite (its square is not)."""
    for n in (1, 4, 20):
        rows = torch.full((200_000, n), 4)
        _, _, weight = h.masked_mean_over_t(rows, seeded(0), rows > 0)
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


KEPT = ["row", "complete", "parameters", "best validation", "tokens", "seconds", "device", "commit"]


def test_table_of_runs_keeps_the_columns_that_differ():
    a, b = h.train("a", job_of()), h.train("b", job_of(seed=3, muon_lr=0.0))
    table = h.runs_table()
    assert set(table) == {*KEPT, "seed", "muon_lr"}
    assert table.row.tolist() == [a.path.name, b.path.name] and table.complete.all()
    assert table.seed.tolist() == [0, 3] and table.muon_lr.tolist() == [0.02, 0.0]
    assert table["best validation"].tolist() == pytest.approx([a.summary["best"], b.summary["best"]])
    assert table.tokens.tolist() == [4 * 32, 4 * 32] and table.parameters.tolist() == [a.summary["parameters"]] * 2


def test_table_of_runs_tells_what_is_not_complete(monkeypatch):
    """Interrupted after a validation, and before any."""
    h.train("whole", job_of())

    class Bar(h.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(h, "tqdm", Bar)
    for stop in (1, 3):
        h.train(f"stopped at {stop}", job_of(seed=stop))
    table = h.runs_table().set_index(h.runs_table().row.str.split("-").str[0])
    assert table.complete.to_dict() == {"whole": True, "stopped at 1": False, "stopped at 3": False}
    assert table.tokens["stopped at 3"] == 2 * 32 and math.isnan(table.tokens["stopped at 1"])


def test_table_of_one_run_and_of_none(tmp_path):
    assert len(h.runs_table()) == 0
    h.train("a", job_of(), root=tmp_path / "deeper")
    assert list(h.runs_table(tmp_path / "deeper")) == KEPT and len(h.runs_table()) == 0


@pytest.mark.parametrize("clock", ["step", "tokens", "seconds"])
def test_curves_are_the_metrics(clock):
    axes = Figure().subplots()
    runs = {"ours": h.train("a", job_of()), "other": h.train("b", job_of(seed=1))}
    h.plot_curves(runs, axes, "train_loss", clock)
    assert [line.get_label() for line in axes.lines] == list(runs)
    for line, run in zip(axes.lines, runs.values()):
        assert line.get_xdata().tolist() == run.metrics[clock].tolist()
        assert line.get_ydata().tolist() == run.metrics.train_loss.tolist()
    assert (axes.get_xlabel(), axes.get_ylabel()) == (clock, "train_loss")


def jobs_of(**changes):
    """Two rows of two seeds."""
    return {row: [job_of(seed=seed, adamw_lr=lr, **changes) for seed in (0, 1)] for row, lr in (("a", 0.003), ("b", 0.01))}


def test_rows_of_a_table():
    table = h.run_jobs("t", jobs_of())
    runs = [[h.train("-", job) for job in trials] for trials in jobs_of().values()]
    sequences = job_of().validation_sequences()
    learned = h.real_tokens(sequences)
    nats = [torch.stack([h.validation_nats(r.model, sequences, learned, False) for r in trial]).mean(0) for trial in runs]
    for (_, line), trial, mine in zip(table.iterrows(), runs, nats):
        best = [run.summary["best"] for run in trial]
        assert line["nats/char"] == pytest.approx(sum(best) / 2, abs=1e-4)
        assert (line["lowest seed"], line["highest seed"]) == pytest.approx((min(best), max(best)), abs=1e-4)
        assert line["difference"] == pytest.approx(float((mine - nats[0]).sum() / learned.sum()), abs=1e-4)
        assert line["epochs"] == pytest.approx(4 * 32 / 200)
        assert line["fingerprint"] == "+".join(run.summary["fingerprint"] for run in trial)
    assert table["difference ±"][0] == 0 < table["difference ±"][1]
    pd.testing.assert_frame_equal(pd.read_csv("figures/tables/t.csv"), table, check_dtype=False)
    curves = pd.read_csv("figures/tables/t_curves.csv")
    assert len(curves) == 2 * 2 * 2 and curves[(curves.row == "b") & (curves.seed == 1)].val_loss.tolist() == pytest.approx(
        runs[1][1].metrics.val_loss.tolist(), abs=1e-4
    )


def test_difference_is_given_for_the_same_windows_only():
    """As many windows, but of other texts or of another length: a difference window by window would mean nothing."""
    short = h.ModelConfig(10, 4, 1, 2, 8)
    jobs = {"a": [job_of()], "shorter windows": [job_of(short)], "other text": [job_of(val_ids=VAL_IDS.flip(0))]}
    counts = [len(trials[0].validation_sequences()) for trials in jobs.values()]
    assert counts == [4, 4, 4]
    table = h.run_jobs("t", jobs)
    assert table.difference.isna().tolist() == [False, True, True]


def test_only_trains_what_matches_and_writes_no_table():
    table = h.run_jobs("t", jobs_of(), only="^b$")
    assert table.row.tolist() == ["b"] and len(list(Path("runs").iterdir())) == 2
    assert not Path("figures").exists()


FULL, SHORT = jobs_of(steps=6), {"a": [job_of(steps=2, evals=1)]}


def marks(jobs):
    return ["+".join(job.fingerprint() for job in trials) for trials in jobs.values()]


@pytest.fixture(scope="module")
def full_tables(tmp_path_factory):
    """The two files that `run_jobs` leaves for FULL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("full"))
        h.run_jobs("t", FULL)
        return {name: Path(f"figures/tables/{name}.csv").read_bytes() for name in ("t", "t_curves")}


@pytest.fixture
def lay(full_tables):
    def install(**changed):
        Path("figures/tables").mkdir(parents=True)
        for name, data in {**full_tables, **changed}.items():
            if data is not None:
                Path(f"figures/tables/{name}.csv").write_bytes(data)

    return install


def test_experiment_takes_the_full_table_as_it_is(lay, full_tables, monkeypatch):
    lay()
    monkeypatch.setattr(h, "train", None)
    table, curves = h.experiment("t", FULL, SHORT)
    assert table.fingerprint.tolist() == marks(FULL) and (table.steps == 6).all()
    assert set(curves.row) == {"a", "b"} and curves.step.max() == 6
    assert Path("figures/tables/t.csv").read_bytes() == full_tables["t"], "nothing is written"


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
    assert (h.experiment("t", jobs, SHORT)[0].steps == 6).all()


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
    table, curves = h.experiment("t", FULL, SHORT)
    assert table.fingerprint.tolist() == marks(SHORT) and curves.step.tolist() == [2]
    assert pd.read_csv("figures/tables/t.csv").fingerprint.tolist() == marks(SHORT)


@pytest.mark.parametrize("change", ["one seed", "a row more", "a row less", "another name"])
def test_experiment_trains_the_short_form_if_any_fingerprint_differs(lay, change):
    lay()
    full = {
        "one seed": {**FULL, "b": [FULL["b"][0], job_of(seed=7)]},
        "a row more": {**FULL, "c": [job_of()]},
        "a row less": {"a": FULL["a"]},
        "another name": {"a": FULL["a"], "B": FULL["b"]},
    }[change]
    assert h.experiment("t", full, SHORT)[0].fingerprint.tolist() == marks(SHORT)


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_jobs_of_every_preset(preset):
    """Each can be set up, and no row of the ablations is the same training as another."""
    ids = torch.full((2_000_000,), 5, dtype=torch.int64)
    jobs = [preset.jobs(69, ids, ids)]
    assert [job.autoregressive for job in jobs[0].values()] == [False, True]
    for form in (0, 1):
        ablations = h.ablation_jobs(preset, preset.ablation[form], 69, ids, ids)
        kinds = {row: [(j.model, j.train, j.batch_function, j.architecture) for j in trials] for row, trials in ablations.items()}
        twins = [(a, b) for a in kinds for b in kinds if a < b and kinds[a] == kinds[b]]
        assert not twins
        assert all([job.train.seed for job in trials] == [0, 1] for trials in ablations.values())
        assert not any(job.autoregressive for trials in ablations.values() for job in trials)
        crossover = h.crossover_jobs(preset.crossover[form], 69, ids, ids)
        sizes = preset.crossover[form]
        assert len(crossover) == 3 * len(sizes.characters) * len(sizes.steps)
        assert all(f"{trials[0].train_ids.numel():,} characters" in row for row, trials in crossover.items())
        recipe = h.recipe_jobs(preset, preset.recipe[form], 69, ids, ids)
        assert recipe["MDLM tutorial's recipe"][0].architecture is h.PostNormEncoder
        every = [job for suite in (ablations, crossover, recipe) for trials in suite.values() for job in trials]
        assert all(min(j.train.steps, j.train.batch_size, j.train.evals) >= 1 for j in [*every, *jobs[0].values()])


def test_same_depth_has_about_as_many_parameters():
    for preset in h.PRESETS.values():
        jobs = h.ablation_jobs(preset, preset.ablation[0], 69, TRAIN_IDS, VAL_IDS)
        rows = ["ours: Eq. 3, stratified t", "twice as deep, narrower", "half as deep, wider"]
        ours, *others = [12 * jobs[row][0].model.n_layer * jobs[row][0].model.n_embd ** 2 for row in rows]
        assert others == pytest.approx([ours] * 2, rel=0.3), preset.name


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The smoke preset, shrunk, and a short text."""
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question. " * 8)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "text.txt"))
    config, sizes = h.TrainConfig(2, 2, evals=1, eval_windows=2), h.Crossover(8, 1, 1, 8, 2, (50,), (10,))
    preset = dataclasses.replace(
        h.PRESETS["smoke"], seq_len=8, n_layer=1, n_head=1, n_embd=8, llada=config, ar=config, ablation=(config, config),
        crossover=(sizes, sizes), recipe=(1, 1),
    )  # fmt: skip
    monkeypatch.setitem(h.PRESETS, "smoke", preset)


@pytest.mark.parametrize("model", ["llada", "ar"])
def test_train_from_the_command_line(tiny, capsys, model):
    h.main(["train", "--preset", "smoke", "--model", model])
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    (run,) = Path("runs").iterdir()
    assert run.name == f"smoke-{model}-{summary['fingerprint']}" and json.loads((run / "final.json").read_text()) == summary
    assert json.loads((run / "run.json").read_text())["model"]["causal"] is (model == "ar")
    text = h.load_text()
    ids = h.split(h.CharTokenizer.from_text(text).encode(text))
    job = h.PRESETS["smoke"].jobs(h.CharTokenizer.from_text(text).vocab_size, *ids)[{"llada": "LLaDA", "ar": "AR"}[model]]
    assert job.fingerprint() == summary["fingerprint"], "the notebook finds it"
    h.main(["train", "--preset", "smoke", "--model", model])
    assert "complete since before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, only, row",
    [
        ("ablations", "^ours", "ours: Eq. 3, stratified t"),
        ("ablate", "AdamW", "AdamW only"),
        ("crossover", "^AR,.*50", "AR, 50 characters, 10 steps"),
        ("recipe", "ours", "ours"),
    ],
)
def test_one_row_of_an_experiment_from_the_command_line(tiny, capsys, command, only, row):
    h.main([command, "--preset", "smoke", "--only", only])
    assert row in capsys.readouterr().out and not Path("figures").exists()


def test_experiment_from_the_command_line_is_what_the_notebook_loads(tiny, monkeypatch):
    h.main(["crossover", "--preset", "smoke"])
    text = h.load_text()
    tokenizer = h.CharTokenizer.from_text(text)
    data = (tokenizer.vocab_size, *h.split(tokenizer.encode(text)))
    jobs = h.crossover_jobs(h.PRESETS["smoke"].crossover[1], *data)
    monkeypatch.setattr(h, "train", None)
    assert h.experiment("crossover", jobs, {})[0].row.tolist() == list(jobs)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        h.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for command in ("train", "ablations", "crossover", "recipe"):
        assert command in said
        with pytest.raises(SystemExit) as end:
            h.main([command, "--help"])
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
        h.main(arguments)
    assert end.value.code == 2 and named in capsys.readouterr().err
    assert not list(Path().iterdir()), "before anything is read or written"


def test_unknown_preset_in_the_environment(monkeypatch):
    monkeypatch.setenv("LLADA_PRESET", "huge")
    with pytest.raises(ValueError, match=r"huge.*smoke"):
        h.main(["train", "--model", "ar"])
