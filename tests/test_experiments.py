"""Suites of trainings and their tables, the command line."""

import copy
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from notebooks import python_path
from oracle import seeded

import llada_helpers as h
from beyond import ablations, blocks, crossover, experiments, vocabulary
from beyond.experiments import experiment, main, run_jobs, suite
from beyond.quality import parts

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


def stop_after(patch, steps: int) -> None:
    """Ctrl-C once so many steps of a training have been made."""
    original = h.training_batch

    def batch(job, step):
        if step == steps:
            raise KeyboardInterrupt
        return original(job, step)

    patch.setattr(h, "training_batch", batch)


def jobs_of(**changes):
    """Two rows of two seeds."""
    return {row: [job_of(seed=seed, adamw_lr=lr, **changes) for seed in (0, 1)] for row, lr in (("a", 0.003), ("b", 0.01))}


def test_rows_of_a_table():
    table = run_jobs(RESULTS, "t", jobs_of())
    runs = [[h.train("-", job) for job in trials] for trials in jobs_of().values()]
    ours = [run.summary["best"] for run in runs[0]]
    for (_, line), trial in zip(table.iterrows(), runs):
        best = [run.summary["best"] for run in trial]
        assert line["nats/char"] == pytest.approx(sum(best) / 2, abs=1e-4)
        assert [line["lowest seed"], line["highest seed"]] == pytest.approx(sorted(best), abs=1e-4)
        assert [line["seed 0"], line["seed 1"]] == pytest.approx(best, abs=1e-4)
        assert line["over seeds ±"] == pytest.approx(12.706 * abs(best[0] - best[1]) / 2, abs=2e-4)
        apart = [mine - theirs for mine, theirs in zip(best, ours)]  # seed by seed
        assert line["difference"] == pytest.approx(sum(apart) / 2, abs=1e-4)
        assert line["difference ±"] == pytest.approx(12.706 * abs(apart[0] - apart[1]) / 2, abs=2e-4)
        assert line["epochs"] == pytest.approx(4 * 32 / 200)
        assert line["fingerprint"] == "+".join(run.path.name[-12:] for run in trial)
    assert table["difference ±"][0] == 0 < table["difference ±"][1]
    assert table["changed"].tolist() == ["", "adamw_lr=0.01"]
    pd.testing.assert_frame_equal(pd.read_csv(TABLES / "t.csv", keep_default_na=False), table, check_dtype=False)
    curves = pd.read_csv(TABLES / "t_curves.csv")
    assert len(curves) == 2 * 2 * 2 and curves[(curves.row == "b") & (curves.seed == 1)].val_loss.tolist() == pytest.approx(
        runs[1][1].metrics.val_loss.tolist(), abs=1e-4
    )


def test_differences_are_to_the_first_row_of_the_same_model():
    causal = dataclasses.replace(MODEL, causal=True)
    jobs = {"LLaDA": [job_of()], "AR": [job_of(causal)], "AR, changed": [job_of(causal, adamw_lr=0.01)]}
    table = run_jobs(RESULTS, "t", jobs)
    assert table["difference"][:2].tolist() == [0, 0] and table["changed"][2] == "adamw_lr=0.01"
    assert table["difference"][2] == pytest.approx(table["nats/char"][2] - table["nats/char"][1], abs=1e-4)


def test_one_seed_has_no_interval_over_seeds():
    table = run_jobs(RESULTS, "t", {"a": [job_of()]})
    assert table["over seeds ±"].isna().all() and table["95% ±"].notna().all()
    assert table["lowest seed"][0] == table["highest seed"][0]


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


def test_a_table_of_some_rows_says_how_many(lay, monkeypatch, capsys):
    results = copy.copy(RESULTS)
    results.tables = experiments.COMMITTED
    lay(experiments.COMMITTED)
    monkeypatch.setattr(h, "train", None)
    more = {**FULL, "c": [job_of()]}
    assert experiment(results, "t", more, SHORT)[0]["row"].tolist() == ["a", "b"]
    assert "t.csv, 2 of 3 rows, the others are not trained yet" in capsys.readouterr().out


def test_every_training_behind_the_tables_is_recorded(monkeypatch):
    """Whatever this folder has trained: the suites' rows come from their tables."""
    monkeypatch.setitem(experiments.SUITES, "t", None)
    run_jobs(RESULTS, "t", FULL)
    shutil.rmtree("runs")
    own = h.train("a notebook's", job_of(seed=9))
    table = experiments.every_run(RESULTS)
    suite_rows = table[table["suite"] == "t"]
    assert sorted(suite_rows["fingerprint"]) == sorted(job.fingerprint() for trials in FULL.values() for job in trials)
    assert suite_rows[["row", "seed"]].values.tolist() == [["a", 0], ["a", 1], ["b", 0], ["b", 1]]
    assert suite_rows["best"].notna().all() and (suite_rows["steps"] == 6).all()
    (mine,) = table[table["suite"] == "notebooks"].to_dict("records")
    assert mine["fingerprint"] == own.path.name[-12:] and mine["best"] == pytest.approx(own.summary["best"], abs=1e-4)
    assert len(pd.read_csv(TABLES / "runs.csv")) == len(table) == 5
    shutil.rmtree("runs")
    pd.testing.assert_frame_equal(experiments.every_run(RESULTS), table)  # what the file has of runs that are gone stays
    again = h.train("a notebook's", job_of(seed=9, steps=2))  # and makes way for the same one, trained anew
    marks = experiments.every_run(RESULTS).query("suite == 'notebooks'")["fingerprint"]
    assert marks.tolist() == [again.path.name[-12:]]


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
    ids = torch.full((2_000_000,), 5, dtype=torch.int64)
    jobs = preset.jobs(69, ids, ids)
    assert [job.batch_function for job in jobs.values()] == [h.diffusion_batch, h.next_token_batch]
    for sizes in crossover.SIZES[preset.name]:
        rows = crossover.crossover_jobs(sizes, 69, ids, ids)
        assert len(rows) == sum(len(ladder) for ladders in sizes.ladders.values() for ladder in ladders.values())
        assert all(f"{trials[0].train_ids.numel():,} characters" in row for row, trials in rows.items())
        every = [job for trials in rows.values() for job in trials]
        assert all(min(j.train.steps, j.train.batch_size, j.train.evals) >= 1 for j in [*every, *jobs.values()])


# --- the command line ---


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The smoke preset, shrunk, and a short text."""
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question. " * 16)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "text.txt"))
    config = h.TrainConfig(2, 2, evals=1, eval_windows=2)
    ladders = {crossover.PLAIN: (1,), crossover.REGULARISED: (1, 2), crossover.Kind("AR"): (1,)}
    sizes = crossover.Crossover(8, 1, 1, 8, 2, {50: ladders}, seeds=2, windows=2)
    changes = {"seq_len": 8, "n_layer": 1, "n_head": 1, "n_embd": 8, "llada": config, "ar": config}
    monkeypatch.setitem(h.PRESETS, "smoke", dataclasses.replace(h.PRESETS["smoke"], **changes))
    monkeypatch.setitem(vocabulary.SIZES, "smoke", (config, config))
    monkeypatch.setitem(ablations.SIZES, "smoke", (3, 3))
    monkeypatch.setitem(blocks.SIZES, "smoke", (("smoke", config), ("smoke", config)))
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
        ("ablations", "AdamW", "LLaDA, AdamW alone"),
        ("crossover", "^AR.*50", "AR, 50 characters, 1 epochs"),
        ("vocabulary", "^AR, char", "AR, characters"),
    ],
)
def test_one_row_of_an_experiment_from_the_command_line(tiny, capsys, command, only, row):
    main([command, "--preset", "smoke", "--only", only])
    assert row in capsys.readouterr().out and not (Path("figures").exists() or Path("build").exists())


@pytest.mark.parametrize("name", ["crossover", "vocabulary"])
def test_experiment_from_the_command_line_is_what_the_notebook_loads(tiny, monkeypatch, name):
    main([name, "--preset", "smoke"])
    full, _, options = suite(name, h.PRESETS["smoke"], h.load_text())
    monkeypatch.setattr(h, "train", None)
    table, curves = experiment(h.Results(h.PRESETS["smoke"], h.load_text()), name, full, {}, **options)
    assert table.row.tolist() == list(full) and set(curves.row) == set(full)


def test_a_table_of_what_is_done_trains_nothing(tiny, monkeypatch):
    main(["vocabulary", "--preset", "smoke", "--only", "^AR"])
    monkeypatch.setattr(h, "training_batch", None)
    main(["vocabulary", "--preset", "smoke", "--done"])
    assert pd.read_csv(TABLES / "vocabulary.csv")["row"].str.startswith("AR").all()


def test_a_table_grows_by_what_is_done_elsewhere(monkeypatch):
    """Rows of the table stay without their runs, as long as their trainings are today's; differences are to the first row."""
    jobs = jobs_of()
    run_jobs(RESULTS, "whole", jobs)
    shutil.rmtree("runs")
    run_jobs(RESULTS, "t", {"a": jobs["a"]})
    shutil.rmtree("runs")
    run_jobs(RESULTS, "t", jobs, only="b")
    monkeypatch.setattr(h, "training_batch", None)
    for _ in range(2):  # the second time all rows are kept
        run_jobs(RESULTS, "t", jobs, done=True)
        for kind in ("", "_curves"):
            whole, grown = (pd.read_csv(TABLES / f"{name}{kind}.csv") for name in ("whole", "t"))
            pd.testing.assert_frame_equal(grown, whole, atol=2e-4)
        shutil.rmtree("runs", ignore_errors=True)
    other = {"a": jobs["a"], "b": jobs_of(steps=3)["b"]}
    assert run_jobs(RESULTS, "t", other, done=True).row.tolist() == ["a"]


def test_a_table_without_its_first_row_is_refused():
    """Differences would be to another row than the table says."""
    jobs = jobs_of()
    run_jobs(RESULTS, "t", jobs)
    before = (TABLES / "t.csv").read_bytes()
    for other, word in (({"a": jobs_of(steps=3)["a"], "b": jobs["b"]}, "train that first"), (jobs_of(steps=3), "no row matches")):
        shutil.rmtree("runs", ignore_errors=True)
        with pytest.raises(ValueError, match=word):
            run_jobs(RESULTS, "t", other, done=True)
    with pytest.raises(ValueError, match="no row matches 'c'"):
        run_jobs(RESULTS, "t", jobs, only="c")
    assert (TABLES / "t.csv").read_bytes() == before


def test_a_complete_run_is_told_from_an_interrupted_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = job_of()
    assert experiments.complete_run(job) is None
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        h.train("any name", job, quiet=True)
    assert experiments.complete_run(job) is None
    run = h.train("any name", job, quiet=True)
    assert experiments.complete_run(job).samefile(run.path) and experiments.complete_run(job_of(seed=1)) is None
    assert experiments.complete_run(job, Path("elsewhere")) is None


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
    first, second = map(json.loads, re.findall(r"\{.*?\}", said))  # one line may hold both: two processes write at once
    assert (first["run"], first["best"]) == (second["run"], second["best"])
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    said = launched("accelerate.commands.launch", "--cpu", "--num_processes", "1", *command)
    assert "complete since before" in said and json.loads(said.splitlines()[-1])["best"] == first["best"]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    all_of_it = capsys.readouterr().out
    assert end.value.code == 0
    for command in ("train", "exact", "record", *experiments.SUITES):
        assert command in all_of_it
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        said = capsys.readouterr().out
        assert end.value.code == 0 and "--preset" in said and ("--done" in said) == (command in experiments.SUITES)


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


def test_a_table_that_is_no_suite_is_made_shorter_where_the_full_one_is_missing():
    full = pd.DataFrame({"k": [1], "fingerprint": "a"})
    RESULTS.table(full, "demo")
    made = [experiments.full_or_short(RESULTS, "demo", mark, lambda: pd.DataFrame({"k": [2]})) for mark in "ab"]
    assert [(table["k"][0], table["fingerprint"][0]) for table in made] == [(1, "a"), (2, "b, short")]


def test_only_the_exact_tables_that_are_asked_for_are_made(tiny):
    preset = h.PRESETS["smoke"]
    assert experiments.exact_tables(h.Results(preset, ""), preset, h.load_text(), only="none") == {}
