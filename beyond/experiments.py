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
from beyond import ablations, blocks, budget, crossover, exact, vocabulary
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
    """What `run_jobs` keeps of a row: its line, its curves, and what differences to it need."""

    line: dict
    curves: list[pd.DataFrame]
    nats: list[float]  # nats per character of each seed's training
    job: H.Job


Measure = Callable[[H.Job, H.Run], dict]  # columns of a finished training


def _row(
    row: str, trials: list[H.Job], runs: list[H.Run], lengths: Tensor | None, measure: Measure | None, ours: Row | None
) -> Row:
    """One line of a table from its finished runs; `ours`: the row that it is a change of."""
    job, summary, line = trials[0], runs[0].summary, {"row": row}
    if measure:  # what is no number is that of the first seed
        further = pd.DataFrame([measure(trial, run) for trial, run in zip(trials, runs)])
        line |= further.iloc[0].to_dict() | further.mean(numeric_only=True).to_dict()
        each = further["nats/char"].tolist()
    else:
        sequences = job.validation_sequences()
        counts = characters(sequences, learned := job.learned(sequences), lengths)
        nats = torch.stack([job.validation_nats(run.model, sequences).cpu() for run in runs]).mean(dim=0)
        each = [run.summary["best"] * float(learned.sum() / counts.sum()) for run in runs]  # validation is per token
        score, interval = H.per_character(nats, counts)
        line |= {"scored on": "validation text", "nats/char": score, "95% ±": interval}
    made = Row(line, [run.metrics.assign(row=row, seed=trial.train.seed) for run, trial in zip(runs, trials)], each, job)
    line |= {"lowest seed": min(each), "highest seed": max(each), "over seeds ±": H.half_width(each)}
    line |= {f"seed {trial.train.seed}": value for trial, value in zip(trials, each)}
    ours = ours or made
    line |= _differences(each, ours.nats)
    usual = ours.job.settings()
    line["changed"] = ", ".join(f"{key}={value}" for key, value in job.settings().items() if value != usual[key])
    text = job.train_ids.view(1, -1) if job.train_ids.ndim == 1 else job.train_ids
    line |= {"parameters": summary["parameters"], "steps": summary["steps"], "tokens": summary["tokens"]}
    line["characters"] = int(characters(text, job.learned(text), lengths).sum())
    line["epochs"] = summary["tokens"] / text.numel()  # and no seconds: suites share their machine with other work
    line |= {"fingerprint": suite_mark(trials), "device": summary["device"], "commit": summary["commit"]}
    return made


def _differences(each: list[float], ours: list[float]) -> dict:
    apart = [mine - theirs for mine, theirs in zip(each, ours)]  # seed by seed
    return {"difference": sum(apart) / len(apart), "difference ±": H.half_width(apart)}


def _kept(known: pd.DataFrame, curves: pd.DataFrame, row: str, trials: list[H.Job], ours: Row | None) -> Row | None:
    """The row as the table `known` has it, if these trainings made it."""
    for line in known.to_dict("records") if len(curves) else ():
        nats = [line.get(f"seed {trial.train.seed}") for trial in trials]
        if (line["row"], line.get("fingerprint")) == (row, suite_mark(trials)) and None not in nats:
            return Row(line | _differences(nats, ours.nats if ours else nats), [curves[curves["row"] == row]], nats, trials[0])
    return None


def run_jobs(
    results: H.Results,
    name: str,
    jobs: Jobs,
    *,
    compiled: bool = False,
    only: str = "",
    done: bool = False,
    quiet: bool = False,
    lengths: dict[str, Tensor] | None = None,
    measure: Measure | None = None,
) -> pd.DataFrame:
    """Train every job (or load it); write tables/NAME.csv, a row for each entry of `jobs`, and tables/NAME_curves.csv.

    "95% ±" is over stretches of text, for the mean of a row's models. "seed 0" and so on are its trainings; "over seeds ±" is
    Student's interval over them, "difference ±" that of the differences, seed by seed, to the first row of the same model.

    Args:
        results: where to write.
        compiled: torch.compile the blocks of our Transformers.
        only: rows that match this regular expression; nothing is written then.
        done: train nothing; rows whose runs are complete, and those that the table already has from the same trainings.
        lengths: by row, the characters of each token, LongTensor[vocab_size], where they are not one each.
        measure: columns, a mean over seeds each, that take the place of nats per character of the validation windows: "nats/char"
            and "scored on", which says of which text it is, among them.
    """
    rows: list[Row] = []
    ours: dict[bool, Row] = {}
    firsts = {trials[0].model.causal: row for row, trials in reversed(jobs.items())}
    before = _read_tables(results.tables, name)
    for index, (row, trials) in enumerate(jobs.items()):
        if not re.search(only, row):
            continue
        base = ours.get(causal := trials[0].model.causal)
        if done and not all(map(complete_run, trials)):
            made = _kept(*before, row, trials, base)
        else:
            fast = compiled and issubclass(trials[0].architecture, H.Transformer)
            runs = [budget.trained(f"{name}-{index}-{trial.train.seed}", trial, compiled=fast, quiet=quiet) for trial in trials]
            made = _row(row, trials, runs, (lengths or {}).get(row), measure, base)
        if made:
            alone = not (base or only) and row != firsts[causal]
            H._refuse(alone, f"{row!r} is told as a difference to {firsts[causal]!r}: train that first")
            rows.append(made)
            ours.setdefault(causal, made)
    H._refuse(not rows, f"no row matches {only!r} and is trained; pass a part of one of {list(jobs)}")
    table = pd.DataFrame([row.line for row in rows])
    if only:
        return table.round(4)
    curves = pd.concat([curve for row in rows for curve in row.curves])
    results.table(curves[["row", "seed", "step", "tokens", "train_loss", "val_loss"]], f"{name}_curves")
    return results.table(table, name)


def suite_mark(trials: list[H.Job]) -> str:
    """The fingerprints of a row's trainings, joined: what its numbers in a table were made by."""
    return "+".join(job.fingerprint() for job in trials)


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype={"row": str, "fingerprint": str})
    except (OSError, ValueError):  # none, or none that can be read
        return pd.DataFrame()


def _read_tables(folder: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    return _read_table(folder / f"{name}.csv"), _read_table(folder / f"{name}_curves.csv")


def experiment(results: H.Results, name: str, full: Jobs, short: Jobs, **options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """NAME.csv and NAME_curves.csv if `full`'s trainings made them, else those of `short`, trained here.

    Looked for where `results` writes and among the committed tables. On the named run the committed table is shown even if some
    rows are missing or earlier code made it, which is then said: hours of training tell more than minutes. `options` are
    `run_jobs`'s.
    """
    wanted = {row: suite_mark(trials) for row, trials in full.items()}
    for tables in (results.tables, COMMITTED):
        known, curves = _read_tables(tables, name)
        marks = dict(zip(known["row"], known["fingerprint"])) if {"row", "fingerprint"} <= set(known) else {}
        said = "the full suite" if marks == wanted else f"{len(marks)} of {len(wanted)} rows, the others are not trained yet"
        if not marks.items() <= wanted.items():
            commits = ", ".join(sorted({*known["commit"].replace("none", "unknown")}))
            scored = f"scored on {known['scored on'][0] if 'scored on' in known else BEFORE}"
            said = f"made at commit {commits} by earlier code and {scored}; the command line remakes it"
        if len(curves) and marks and (marks == wanted or tables == results.tables == COMMITTED):
            print(f"{name}: read from {tables / name}.csv, {said}")
            return known, curves
    table = run_jobs(results, name, short, quiet=True, **options)
    return table, pd.read_csv(results.tables / f"{name}_curves.csv")


def every_run(results: H.Results) -> pd.DataFrame:
    """tables/runs.csv, every training behind a table, its best validation loss and what it was made by: a row each.

    The suites' trainings are read off their tables and curves (what an earlier table does not say is missing), whatever this
    folder has trained; the notebooks' own are the other complete runs of this folder and, where they are gone, the file's.
    """
    lines, kept = [], ("row", "changed", "steps", "tokens", "device", "commit")
    for name in SUITES:
        known, curves = _read_tables(results.tables, name)
        for line in known.to_dict("records") if len(curves) else ():
            best = curves[curves["row"].astype(str) == line["row"]].groupby("seed")["val_loss"].min()
            for (seed, loss), mark in zip(best.items(), line["fingerprint"].split("+")):
                shared = {key: line.get(key) for key in kept}
                lines.append({"suite": name, "seed": seed, **shared, "best": loss, "fingerprint": mark})
    known = {line["fingerprint"] for line in lines}
    for path in sorted(Path("runs").glob("*/run.json")):
        record, mark = json.loads(path.read_text()), path.parent.name[-12:]
        if record["complete"] and mark not in known:
            shared = {key: record.get(key) for key in (*kept, "seed", "best")} | {"row": record["name"]}
            lines.append({"suite": "notebooks", **shared, "fingerprint": mark})
    here = known | {(line["row"], line["seed"]) for line in lines}
    before = _read_table(results.tables / "runs.csv").to_dict("records")
    lines += [x for x in before if x.get("suite") == "notebooks" and not {x["fingerprint"], (x["row"], x["seed"])} & here]
    return results.table(pd.DataFrame(lines), "runs")


def complete_run(job: H.Job, root: Path = Path(".")) -> Path | None:
    """The directory of a complete run of the job under `root`, if there is one."""
    runs = root.glob(f"runs/*-{job.fingerprint()}/run.json")
    return next((path.parent for path in runs if json.loads(path.read_text())["complete"]), None)


def full_or_short(results: H.Results, name: str, mark: str, short: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """NAME.csv, where `results` writes or among the committed tables, if `mark` made it; else what `short` makes, written so."""
    for tables in (results.tables, COMMITTED):
        known = _read_table(tables / f"{name}.csv")
        if set(known.get("fingerprint", ())) == {mark}:
            print(f"{name}: the full table, read from {tables / name}.csv")
            return known
    return results.table(short().assign(fingerprint=f"{mark}, short"), name)


def exact_tables(results: H.Results, preset: H.Preset, text: str, full: bool = False, only: str = "") -> dict[str, pd.DataFrame]:
    """Those of `exact.tables`: the full ones if they are there, else short ones, of fewer windows; with `full`, made anew."""
    tokenizer = H.CharTokenizer.from_text(text)
    train_ids, val_ids, test_ids = parts(tokenizer.encode(text))
    jobs = preset.jobs(tokenizer.vocab_size, train_ids, val_ids)
    runs = {k: budget.trained(f"{preset.name}-{k.lower()}", job, compiled=preset.compiled, quiet=True) for k, job in jobs.items()}
    models = {name: run.model for name, run in runs.items()}
    val, test = (H.windows(ids, preset.seq_len) for ids in (val_ids, test_ids))
    short, large = (exact.tables(models, val, test, sizes) for sizes in exact.SIZES[preset.name])
    mark, names = suite_mark(list(jobs.values())), [name for name in large if re.search(only, name)]
    if full:
        for block in models["LLaDA"].blocks if preset.compiled else ():
            block.compile()  # twice as fast on a CPU
        commit = H.describe_machine()["commit"]
        text_of = {"exact_choice": "validation text", "gradient_noise": "validation text"}
        kept = {n: {"scored on": text_of.get(n, "test text"), "fingerprint": mark} for n in names}
        return {n: results.table(large[n]().assign(**kept[n], commit=commit), n) for n in names}
    return {name: full_or_short(results, name, mark, short[name]) for name in names}


class Suite(NamedTuple):
    """A table that the command line can make."""

    about: str
    sizes: dict[str, tuple]  # by preset: of the short form, and of the full one
    jobs: Callable  # (preset, size, text, (vocab_size, train_ids, val_ids)) -> (Jobs, lengths by row or None)
    measure: Callable[[H.Preset, str], Measure] | None = None  # as in `run_jobs`


SUITES = {
    "ablations": Suite(
        "LLaDA and AR with one choice changed at a time, three seeds",
        ablations.SIZES,
        lambda preset, size, text, data: (ablations.ablation_jobs(preset, size, *data), None),
        ablations.ablation_measure,
    ),
    "blocks": Suite(
        "block diffusion between AR and LLaDA, at equal compute, three seeds",
        blocks.SIZES,
        lambda preset, size, text, data: (blocks.block_jobs(H.PRESETS[size[0]], size[1], *data), None),
        blocks.block_measure,
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
}


def suite(name: str, preset: H.Preset, text: str) -> tuple[Jobs, Jobs, dict]:
    """The full and the short form of a suite, and `run_jobs`'s options for it, "lengths" and "measure": for `experiment`.

    >>> full, short, options = suite("crossover", H.PRESETS["smoke"], "to be, or not to be " * 20)
    >>> len(full), len(short), options["lengths"]
    (16, 16, None)
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
    abouts["exact"] = "of the preset's two models: exact nats of every decoder, the gradient's noise; tables/exact.csv and others"
    abouts["record"] = "the best LLaDA and AR of a preset, on nine tenths of the text, scored on the rest; tables/record.csv"
    for command, about in abouts.items():
        options = commands.add_parser(command, help=about, description=about)
        options.add_argument("--preset", choices=H.PRESETS, help="default: $LLADA_PRESET, else gpu if there is one, else cpu")
        if command == "train":
            options.add_argument("--model", choices=("llada", "ar"), required=True, help="the mask predictor or the baseline")
        elif command == "record":
            options.add_argument("--study", action="store_true", help="try a grid at a quarter of the length first")
            options.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
            options.add_argument("--side-by-side", type=int, default=1, metavar="N", help="trainings of the study at a time")
        else:
            said = "make matching tables only" if command == "exact" else "train matching rows only, and write no table"
            options.add_argument("--only", default="", metavar="REGEX", help=said)
        if command in SUITES:
            options.add_argument("--done", action="store_true", help="train nothing; a table of what is complete, here or in it")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line: `python -m beyond.experiments train --preset cpu --model llada`; see --help."""
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
    table = run_jobs(results, arguments.command, jobs, done=arguments.done, **options)
    print(table.iloc[:, :8].to_string(index=False))


if __name__ == "__main__":
    main()
