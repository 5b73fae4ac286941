"""Many trainings, one table: suites of experiments, trained from the command line, read by the notebooks.

    python -m beyond.experiments train --preset cpu --model llada
    python -m beyond.experiments ablations --preset cpu

A suite is a dictionary from the rows of a table to their trainings, one for each seed. It has a full form, which the command
line trains, and a short one, which a notebook trains where the full one's table is missing or was made by other trainings.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond import ablations, blocks, budget, crossover, exact, knob, schedule, tuning, vocabulary
from beyond.quality import parts

Jobs = dict[str, list[H.Job]]
COMMITTED = Path("figures", "tables")
BEFORE = "text of the last 20%, later validation and test"  # what tables that do not say it were scored on


def characters(sequences: Tensor, learned: Tensor, lengths: Tensor | None = None) -> Tensor:
    """LongTensor[N]: the learned characters of each row; `lengths` LongTensor[vocab_size] if tokens are not one each.

    >>> rows = torch.tensor([[4, 5, H.PAD_ID]])
    >>> characters(rows, H.real_tokens(rows)).tolist(), characters(rows, rows > 0, torch.tensor([5, 6, 7, 8, 1, 3])).tolist()
    ([2], [4])
    """
    return (learned if lengths is None else lengths[sequences] * learned).sum(dim=1)


class Row(NamedTuple):
    """What `run_jobs` keeps of a row: its line, its curves, and what a paired difference needs."""

    line: dict
    curves: list[pd.DataFrame]
    sequences: Tensor  # LongTensor[N, L], the validation windows
    learned: Tensor  # BoolTensor[N, L]
    nats: Tensor  # FloatTensor[seeds, N]


Measure = Callable[[H.Job, H.Run], dict]  # further columns of a finished training, which replace those of the same name


def _row(
    row: str, trials: list[H.Job], runs: list[H.Run], lengths: Tensor | None, measure: Measure | None, first: Row | None
) -> Row:
    """One line of a table from its finished runs."""
    job, summary = trials[0], runs[0].summary
    sequences = job.validation_sequences()
    learned = job.learned(sequences)
    counts = characters(sequences, learned, lengths)
    nats = torch.stack([job.validation_nats(run.model, sequences).cpu() for run in runs])
    each = [run.summary["best"] * float(learned.sum() / counts.sum()) for run in runs]  # validation is per token
    result = Row({"row": row, "scored on": "validation text"}, [], sequences, learned, nats)
    line = result.line
    line["nats/char"], line["95% ±"] = H.per_character(nats.mean(dim=0), counts)
    if measure:  # what is no number is that of the first seed
        further = pd.DataFrame([measure(trial, run) for trial, run in zip(trials, runs)])
        line |= further.iloc[0].to_dict() | further.mean(numeric_only=True).to_dict()
        each = further["nats/char"].tolist()
    line |= {"lowest seed": min(each), "highest seed": max(each), "over seeds ±": H.half_width(each)}
    first = first or result
    same = torch.equal(sequences, first.sequences) and torch.equal(learned, first.learned)
    if same and line["scored on"] == "validation text":  # which is where `nats` are from
        line["difference"], line["difference ±"] = H.per_character(nats.mean(dim=0) - first.nats.mean(dim=0), counts)
        apart = [float((ours - theirs).sum() / counts.sum()) for ours, theirs in zip(nats, first.nats)]  # seed by seed
        line["difference over seeds ±"] = H.half_width(apart)
    text = job.train_ids.view(1, -1) if job.train_ids.ndim == 1 else job.train_ids
    line |= {"parameters": summary["parameters"], "steps": summary["steps"], "tokens": summary["tokens"]}
    line["characters"] = int(characters(text, job.learned(text), lengths).sum())
    line["epochs"] = summary["tokens"] / text.numel()  # and no seconds: suites share their machine with other work
    line |= {"fingerprint": suite_mark(trials), "device": summary["device"], "commit": summary["commit"]}
    result.curves.extend(run.metrics.assign(row=row, seed=trial.train.seed) for run, trial in zip(runs, trials))
    return result


def _train(name: str, job: H.Job, **options) -> H.Run:
    """Ctrl-C ends the suite: a table of half-trained rows would be taken for the whole one."""
    run = H.train(name, job, **options)
    if not run.summary["complete"]:
        raise KeyboardInterrupt("no table is written; running the same again goes on")
    return run


def run_jobs(
    results: H.Results,
    name: str,
    jobs: Jobs,
    *,
    compiled: bool = False,
    only: str = "",
    quiet: bool = False,
    lengths: dict[str, Tensor] | None = None,
    measure: Measure | None = None,
) -> pd.DataFrame:
    """Train every job (or load it); write tables/NAME.csv, a row for each entry of `jobs`, and tables/NAME_curves.csv.

    Each row's seeds are averaged window by window; "95% ±" is over windows. Where there are several seeds, "lowest seed",
    "highest seed" and "over seeds ±" (Student's t) say how far trainings differ. The difference to the first row is paired: the
    same windows and masks, and over seeds the same seed.

    Args:
        results: where to write.
        compiled: torch.compile the blocks of our Transformers.
        only: rows that match this regular expression; nothing is written then.
        lengths: by row, the characters of each token, LongTensor[vocab_size], where they are not one each.
        measure: further columns, a mean over seeds each; its "nats/char" takes the place of that of the validation windows, and
            "scored on" then says of which text it is (if not of validation text, there is no difference to the first row).

    >>> import os, tempfile
    >>> ids, here = torch.arange(4, 10).repeat(20), os.getcwd()
    >>> job = H.Job(H.ModelConfig(10, 8, n_layer=1, n_head=2, n_embd=8), H.TrainConfig(1, 2, evals=1), ids, ids)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.chdir(folder)  # runs/ and checkpoints/ are made where Python runs
    ...     table = run_jobs(H.Results(H.PRESETS["smoke"], "a text"), "demo", {"base": [job]}, quiet=True)
    ...     os.chdir(here)
    >>> table["row"].tolist(), table["steps"].tolist(), table["tokens"].tolist()
    (['base'], [1], [16])
    """
    rows: list[Row] = []
    for index, (row, trials) in enumerate(jobs.items()):
        if re.search(only, row):
            fast = compiled and issubclass(trials[0].architecture, H.Transformer)
            runs = [_train(f"{name}-{index}-{trial.train.seed}", trial, compiled=fast, quiet=quiet) for trial in trials]
            rows.append(_row(row, trials, runs, (lengths or {}).get(row), measure, rows[0] if rows else None))
    table = pd.DataFrame([row.line for row in rows])
    if only:
        return table.round(4)
    curves = pd.concat([curve for row in rows for curve in row.curves])
    results.table(curves[["row", "seed", "step", "tokens", "train_loss", "val_loss"]], f"{name}_curves")
    return results.table(table, name)


def suite_mark(trials: list[H.Job]) -> str:
    """The fingerprints of a row's trainings, joined: what its numbers in a table were made by.

    >>> ids = torch.arange(4, 10).repeat(10)
    >>> job = H.Job(H.ModelConfig(10, 8, n_layer=1, n_head=1, n_embd=8), H.TrainConfig(steps=2, batch_size=2), ids, ids)
    >>> len(suite_mark([job, job]))  # twelve digits each
    25
    """
    return "+".join(job.fingerprint() for job in trials)


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype={"row": str, "fingerprint": str})
    except (OSError, ValueError):  # none, or none that can be read
        return pd.DataFrame()


def experiment(results: H.Results, name: str, full: Jobs, short: Jobs, **options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """NAME.csv and NAME_curves.csv if `full`'s trainings made them, else those of `short`, trained here.

    Looked for where `results` writes and among the committed tables. On the named run a committed table of the same rows is shown
    even if earlier code made it, which is then said: hours of training tell more than minutes. `options` are `run_jobs`'s.

    >>> import os, tempfile
    >>> ids, here, results = torch.arange(4, 10).repeat(20), os.getcwd(), H.Results(H.PRESETS["smoke"], "a text")
    >>> job = H.Job(H.ModelConfig(10, 8, n_layer=1, n_head=2, n_embd=8), H.TrainConfig(1, 2, evals=1), ids, ids)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.chdir(folder)
    ...     _ = run_jobs(results, "demo", {"full": [job]}, quiet=True)  # what the command line leaves behind
    ...     table, curves = experiment(results, "demo", full={"full": [job]}, short={})
    ...     os.chdir(here)
    demo: the full suite, read from build/smoke/figures/tables/demo.csv
    """
    wanted = {row: suite_mark(trials) for row, trials in full.items()}
    for tables in (results.tables, COMMITTED):
        known, curves = (_read_table(tables / f"{file}.csv") for file in (name, f"{name}_curves"))
        marks = dict(zip(known["row"], known["fingerprint"])) if {"row", "fingerprint"} <= set(known) else {}
        if len(curves) and marks == wanted:
            print(f"{name}: the full suite, read from {tables / name}.csv")
            return known, curves
        if len(curves) and marks.keys() == wanted.keys() and tables == results.tables == COMMITTED:
            commits = ", ".join(sorted({*known["commit"].replace("none", "unknown")}))
            scored = f"scored on {known['scored on'][0] if 'scored on' in known else BEFORE}"
            made = f"made at commit {commits} by earlier code and {scored}; the command line remakes it"
            print(f"{name}: the full suite, read from {tables / name}.csv, {made}")
            return known, curves
    table = run_jobs(results, name, short, quiet=True, **options)
    return table, pd.read_csv(results.tables / f"{name}_curves.csv")


def full_or_short(results: H.Results, name: str, mark: str, short: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """NAME.csv, where `results` writes or among the committed tables, if `mark` made it; else what `short` makes, written so.

    >>> import os, tempfile
    >>> here, results = os.getcwd(), H.Results(H.PRESETS["smoke"], "a text")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.chdir(folder)
    ...     _ = results.table(pd.DataFrame({"k": [1], "fingerprint": "a"}), "demo")  # what the command line leaves behind
    ...     tables = [full_or_short(results, "demo", mark, lambda: pd.DataFrame({"k": [2]})) for mark in "ab"]
    ...     os.chdir(here)
    demo: the full table, read from build/smoke/figures/tables/demo.csv
    >>> [(table["k"][0].item(), table["fingerprint"][0]) for table in tables]
    [(1, 'a'), (2, 'b, short')]
    """
    for tables in (results.tables, COMMITTED):
        known = _read_table(tables / f"{name}.csv")
        if set(known.get("fingerprint", ())) == {mark}:
            print(f"{name}: the full table, read from {tables / name}.csv")
            return known
    return results.table(short().assign(fingerprint=f"{mark}, short"), name)


def exact_tables(results: H.Results, preset: H.Preset, text: str, full: bool = False, only: str = "") -> dict[str, pd.DataFrame]:
    """Those of `exact.tables`: the full ones if they are there, else short ones, of fewer windows; with `full`, made anew.

    >>> import os, tempfile
    >>> here, smoke = os.getcwd(), H.PRESETS["smoke"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.chdir(folder)
    ...     print(exact_tables(H.Results(smoke, ""), smoke, "to be, or not to be " * 64, only="none"))
    ...     os.chdir(here)
    {}
    """
    tokenizer = H.CharTokenizer.from_text(text)
    train_ids, val_ids, test_ids = parts(tokenizer.encode(text))
    jobs = preset.jobs(tokenizer.vocab_size, train_ids, val_ids)
    trained = {k: _train(f"{preset.name}-{k.lower()}", job, compiled=preset.compiled, quiet=True) for k, job in jobs.items()}
    models = {name: run.model for name, run in trained.items()}
    val, test = (H.windows(ids, preset.seq_len) for ids in (val_ids, test_ids))
    short, large = (exact.tables(models, val, test, sizes) for sizes in exact.SIZES[preset.name])
    mark, names = suite_mark(list(jobs.values())), [name for name in large if re.search(only, name)]
    if full:
        for block in models["LLaDA"].blocks if preset.compiled else ():
            block.compile()  # twice as fast on a CPU
        commit = H.describe_machine()["commit"]
        kept = {n: {"scored on": f"{'validation' if n == 'exact_choice' else 'test'} text", "fingerprint": mark} for n in names}
        return {n: results.table(large[n]().assign(**kept[n], commit=commit), n) for n in names}
    return {name: full_or_short(results, name, mark, short[name]) for name in names}


class Suite(NamedTuple):
    """A table that the command line can make.

    >>> SUITES["tuning"].sizes["smoke"]  # of the short form and of the full one
    (5120, 10240)
    """

    about: str
    sizes: dict[str, tuple]  # by preset
    jobs: Callable  # (preset, size, text, (vocab_size, train_ids, val_ids)) -> (Jobs, lengths by row or None)
    measure: Callable[[H.Preset, str], Measure] | None = None  # as in `run_jobs`


SUITES = {
    "ablations": Suite(
        "LLaDA and AR with one thing changed at a time, three seeds",
        ablations.SIZES,
        lambda preset, size, text, data: (ablations.ablation_jobs(preset, size, *data), None),
    ),
    "blocks": Suite(
        "block diffusion between AR and LLaDA, at equal steps and at equal compute",
        blocks.SIZES,
        lambda preset, size, text, data: (blocks.block_jobs(H.PRESETS[size[0]], size[1], *data), None),
        knob.knob_measure,
    ),
    "crossover": Suite(
        "LLaDA against AR on little text, for many epochs",
        crossover.SIZES,
        lambda preset, size, text, data: (crossover.crossover_jobs(size, *data), None),
        lambda preset, text: crossover.crossover_measure(text),
    ),
    "vocabulary": Suite(
        "characters against byte pairs, LLaDA and AR",
        vocabulary.SIZES,
        lambda preset, size, text, data: vocabulary.vocabulary_jobs(preset, size, text),
    ),
    "schedule": Suite(
        "LLaDA with t = u^p, p from 1 to 2, three seeds",
        schedule.SIZES,
        lambda preset, size, text, data: (schedule.schedule_jobs(preset, size, *data), None),
    ),
    "tuning": Suite(
        "LLaDA's recipe with one of its choices changed, at a quarter of the preset's training",
        tuning.SIZES,
        lambda preset, size, text, data: (tuning.llada_jobs(preset, size, *data), None),
    ),
    "tuning_ar": Suite(
        "AR's recipe with one of its choices changed",
        tuning.SIZES,
        lambda preset, size, text, data: (tuning.ar_jobs(preset, size, *data), None),
    ),
    "tuning_weights": Suite(
        "LLaDA with its weights averaged or in another shape, as long as tuning's",
        tuning.SIZES,
        lambda preset, size, text, data: (tuning.weight_jobs(preset, size, *data), None),
    ),
    "decoder": Suite(
        "LLaDA trained further for the decoder of eight bit-reversed passes, and as long on Eq. 3",
        exact.TRAINING,
        lambda preset, size, text, data: (exact.decoder_jobs(preset, size, *data), None),
        exact.decoder_measure,
    ),
    "budget": Suite(
        "what more training buys: LLaDA and AR at several budgets",
        budget.SIZES,
        lambda preset, size, text, data: (budget.budget_jobs(size, *data), None),
        budget.budget_measure,
    ),
    "schedule_full": Suite(
        "t = u against ours, as long as the preset trains, two seeds",
        {name: (schedule.SIZES[name][0], preset.llada) for name, preset in H.PRESETS.items()},
        lambda preset, size, text, data: (schedule.schedule_jobs(preset, size, *data, (1, H.POWER), seeds=2), None),
    ),
}


def suite(name: str, preset: H.Preset, text: str) -> tuple[Jobs, Jobs, dict]:
    """The full and the short form of a suite, and `run_jobs`'s options for it, "lengths" and "measure": for `experiment`.

    >>> full, short, options = suite("tuning", H.PRESETS["smoke"], "to be, or not to be " * 20)
    >>> [form["32 windows"][0].train.steps for form in (full, short)], options
    ([5, 2], {'lengths': None, 'measure': None})
    """
    tokenizer = H.CharTokenizer.from_text(text)
    data = (tokenizer.vocab_size, *parts(tokenizer.encode(text))[:2])
    known = SUITES[name]
    small, large = known.sizes[preset.name]
    (full, lengths), (short, _) = (known.jobs(preset, size, text, data) for size in (large, small))
    return full, short, {"lengths": lengths, "measure": known.measure and known.measure(preset, text)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m beyond.experiments",
        description="Train outside the notebooks, which then load the finished runs and tables. Training goes on where it was "
        "interrupted. LLADA_DATA: a text file of your own; LLADA_RETRAIN=1: train from the start.",
        epilog="Several processes or GPUs: accelerate launch -m beyond.experiments train ..., or torchrun --nproc-per-node 2 "
        "-m beyond.experiments train ...; they share each batch.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    abouts = {"train": "train one model of a preset; runs/ and checkpoints/ get the result"}
    abouts |= {name: f"{known.about}; tables/{name}.csv" for name, known in SUITES.items()}
    abouts["exact"] = "exact nats of every decoder, with the preset's two models; tables/exact.csv and others"
    abouts["record"] = "the best LLaDA and AR of a preset, on nine tenths of the text, scored on the rest; tables/record.csv"
    for command, about in abouts.items():
        aliases = ["ablate"] if command == "ablations" else []
        options = commands.add_parser(command, help=about, description=about, aliases=aliases)
        options.add_argument("--preset", choices=H.PRESETS, help="default: $LLADA_PRESET, else gpu if there is one, else cpu")
        if command == "train":
            options.add_argument("--model", choices=("llada", "ar"), required=True, help="the mask predictor or the baseline")
        elif command == "record":
            options.add_argument("--study", action="store_true", help="try a grid at a quarter of the length first")
            options.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
            options.add_argument("--side-by-side", type=int, default=1, metavar="N", help="trainings of the study at a time")
        else:
            options.add_argument("--only", default="", metavar="REGEX", help="train matching rows only, and write no table")
        options.set_defaults(command=command)  # an alias says the name
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line: `python -m beyond.experiments train --preset cpu --model llada`; see --help.

    >>> import contextlib, io
    >>> with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
    ...     main(["train", "--help"])
    >>> "--preset" in said.getvalue()
    True
    """
    arguments = _parser().parse_args(arguments)
    preset = H.PRESETS[arguments.preset] if arguments.preset else H.choose_preset()
    text = H.load_text()
    H.require(text, preset)
    if arguments.command == "train":
        tokenizer = H.CharTokenizer.from_text(text)
        jobs = preset.jobs(tokenizer.vocab_size, *parts(tokenizer.encode(text))[:2])
        job = jobs[{"llada": "LLaDA", "ar": "AR"}[arguments.model]]
        run = H.train(f"{preset.name}-{arguments.model}", job, compiled=preset.compiled)
        print(json.dumps({"run": str(run.path), **{key: run.summary[key] for key in ("best", "steps", "tokens", "seconds")}}))
        return
    if arguments.command == "exact":
        for table in exact_tables(H.Results(preset, text), preset, text, full=True, only=arguments.only).values():
            print(table.round(3).to_string(index=False))
        return
    if arguments.command == "record":
        table = budget.make_record(preset, text, arguments.seeds, arguments.study, arguments.side_by_side)
        print(table.round(4).to_string(index=False))
        return
    jobs, _, options = suite(arguments.command, preset, text)
    results, options = H.Results(preset, text), {"compiled": preset.compiled, "only": arguments.only, **options}
    table = run_jobs(results, arguments.command, jobs, **options)
    print(table.iloc[:, :8].to_string(index=False))


if __name__ == "__main__":
    main()
