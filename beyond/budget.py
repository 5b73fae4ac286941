"""What more training buys: LLaDA and AR at several budgets, each a training of its own with its own decay; and the best of each.

Compute is counted, not clocked: a training costs three forward passes for each character that it reads (forward, and twice as
much backward), a forward pass two operations for each weight of a matrix and, for attention, four for each key and unit of width.
"""

import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond import quality
from beyond.ablations import bell_times, shortened
from beyond.vocabulary import multiplications


class Budget(NamedTuple):
    """One of so many `parts` of what a preset trains a model for; parts 0: as many steps as the preset trains LLaDA."""

    model: str  # "LLaDA" or "AR"
    preset: str
    parts: int = 1
    seeds: int = 3
    bell: bool = False  # times from a bell


_SMOKE = [Budget(model, "smoke", parts, 2) for model in ("LLaDA", "AR") for parts in (8, 4)]
_LONG = [Budget(model, "cpu_long", seeds=1) for model in ("LLaDA", "AR")]


def _ladder(preset: str, seeds: int) -> list[Budget]:
    ar = [Budget("AR", preset, parts, seeds) for parts in (27, 9, 3, 1, 0)]
    return [Budget("LLaDA", preset, parts, seeds) for parts in (9, 3, 1)] + ar + [Budget("LLaDA", preset, 1, seeds, bell=True)]


SIZES = {"smoke": (_SMOKE, _SMOKE), "cpu": (_SMOKE, _ladder("cpu", 3) + _LONG), "gpu": (_SMOKE, _ladder("gpu", 1))}
SIZES["cpu_long"] = SIZES["cpu"]

BACKWARD = 3  # a forward and a backward pass cost as much as three forward passes (Kaplan et al. 2020, arXiv:2001.08361)


def forward_flop(config: H.ModelConfig, length: int, keys: int) -> int:
    """Floating-point operations of a forward pass over `length` tokens of one sequence, which attend to `keys` tokens.

    Two for each multiplication, per layer 12 n_embd^2 in matrices and 2 keys n_embd in attention; the head. Nothing is halved for
    causal attention.
    """
    return 2 * length * multiplications(replace(config, seq_len=keys))


def training_flop(job: H.Job) -> int:
    """Operations of a whole training; the causal mask halves nothing here.

    >>> ids = torch.arange(4, 10)
    >>> job = H.Job(H.ModelConfig(10, 4, n_layer=1, n_head=1, n_embd=2), H.TrainConfig(steps=5, batch_size=2), ids, ids)
    >>> training_flop(job)  # 40 characters
    20160
    """
    length = job.model.seq_len
    return BACKWARD * job.train.steps * job.train.batch_size * forward_flop(job.model, length, length)


def trained(name: str, job: H.Job, **options) -> H.Run:
    """`H.train` to the end. KeyboardInterrupt: Ctrl-C stopped it; a half-trained model would be taken for the whole one."""
    run = H.train(name, job, **options)
    if not run.summary["complete"]:
        raise KeyboardInterrupt("no table is written; running the same again goes on")
    return run


def budget_jobs(budgets: list[Budget], vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """A row for each model and budget: the preset's training with fewer steps, each with a decay of its own.

    >>> ids = torch.arange(4, 30)
    >>> jobs = budget_jobs([Budget("LLaDA", "cpu", 9), Budget("AR", "cpu"), Budget("AR", "cpu", 0)], 30, ids, ids)
    >>> {row: (trials[0].train.steps, len(trials)) for row, trials in jobs.items()}
    {'LLaDA, cpu / 9': (350, 3), 'AR, cpu': (1060, 3), 'AR, cpu, as many steps as LLaDA': (3150, 3)}
    """
    jobs = {}
    for name, preset, parts, seeds, bell in budgets:
        known = H.PRESETS[preset]
        job = replace(known.jobs(vocab_size, train_ids, val_ids)[name], make_batch=bell_times if bell else None)
        longer = {"steps": known.llada.steps, "evals": known.llada.evals}
        config = shortened(job.train, parts) if parts else replace(job.train, **longer)
        kind = f" / {parts}" if parts > 1 else "" if parts else ", as many steps as LLaDA"
        row = f"{name}, {preset}{kind}" + ", t from a bell" * bell
        jobs[row] = [replace(job, train=replace(config, seed=config.seed + seed)) for seed in range(seeds)]
    return jobs


def budget_measure(preset: H.Preset, text: str, prompt: str = "ROMEO:") -> Callable[[H.Job, H.Run], dict]:
    """What `run_jobs` adds to a row: compute, nats per character of the whole test text, judge, known words, a sample.

    Texts are continued from prompts of the test text to one window of the preset, a shorter one if that is the model's; judge and
    words are those of Part 8. The sample begins with `prompt`, or as the test text does if the text lacks its characters.
    """
    tokenizer = H.CharTokenizer.from_text(text)
    train_ids, _, test_ids = quality.parts(tokenizer.encode(text))
    length, scores = preset.seq_len, quality.TextMeasure(tokenizer, text[: len(train_ids)])
    _, template = quality.prompts(H.windows(test_ids, length), preset.texts)
    opening = torch.full((1, length), H.MASK_ID)
    start = prompt if set(prompt) <= set(text) else text[-len(test_ids) :][: len(prompt)]
    opening[0, : len(start)] = tokenizer.encode(start)

    def continued(model: H.Transformer, some: Tensor) -> Tensor:
        options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(0)}
        return quality.write(model, some.to(model.head.weight.device), **options).ids

    def measure(job: H.Job, run: H.Run) -> dict:
        nats, interval = H.per_character(*quality.window_nats(run.model, test_ids, preset.nelbo_samples))
        made, sample = (continued(run.model, x[:, : run.model.config.seq_len]) for x in (template, opening))
        score = {key: value for key, value in scores(made).items() if key.startswith(("judge", "known", "char"))}
        counted = {"scored on": "test text", "model": "AR" if job.model.causal else "LLaDA", "TFLOP": training_flop(job) / 1e12}
        return {**counted, "nats/char": nats, "95% ±": interval, **score, "sample": tokenizer.decode(sample[0])}

    return measure


def compute_ratio(table: pd.DataFrame) -> tuple[float, float]:
    """How many times AR's compute LLaDA needs for the same nats per character, at the least and at the most of the numbers that
    both curves pass; each curve is straight between its budgets in log compute. (NaN, NaN) where the curves have none in common.
    Rows of the larger `cpu_long` models and of another loss are no part of the curves.

    >>> curves = {"LLaDA": ((1, 2.5), (10, 2.0), (100, 1.5)), "AR": ((0.1, 2.5), (1, 2.0), (10, 1.5))}
    >>> rows = [{"row": name, "model": name, "TFLOP": c, "nats/char": n} for name, curve in curves.items() for c, n in curve]
    >>> [round(ratio, 6) for ratio in compute_ratio(pd.DataFrame(rows))]
    [10.0, 10.0]
    """
    curves, table = {}, table[~table["row"].str.contains("long|bell")]
    for name, part in table.groupby("model"):
        part = part.sort_values("nats/char")
        curves[name] = part["nats/char"].to_numpy(), np.log(part["TFLOP"].to_numpy())
    low, high = (pick(curve[0][end] for curve in curves.values()) for pick, end in ((max, 0), (min, -1)))
    if low > high:
        return float("nan"), float("nan")
    at = np.array([n for nats, _ in curves.values() for n in nats if low <= n <= high])
    ratios = np.exp(np.interp(at, *curves["LLaDA"]) - np.interp(at, *curves["AR"]))
    return float(ratios.min()), float(ratios.max())


STUDIED = {"dropout": (0.1, 0.2, 0.3), "weight decay": (0.0, 0.1)}  # and two widths, of two thirds of the heads and of all


def record_job(job: H.Job, settings: dict, share: float = 1.0, seed: int = 0) -> H.Job:
    """A preset's training with other settings, "heads" of the same width among them, or for a share of its steps."""
    shape, config = job.model, job.train
    heads = settings.get("heads", shape.n_head)
    width, dropout = shape.n_embd // shape.n_head * heads, settings.get("dropout", shape.dropout)
    decay = settings.get("weight decay", config.weight_decay)
    steps, evals = max(1, round(share * config.steps)), max(1, round(share * config.evals))
    train = replace(config, steps=steps, evals=evals, weight_decay=float(decay), seed=config.seed + seed)
    return replace(job, model=replace(shape, n_embd=width, n_head=int(heads), dropout=float(dropout)), train=train)


def study_jobs(preset: H.Preset, vocab_size: int, train_ids: Tensor) -> list[tuple[dict, H.Job]]:
    """Settings and trainings of the grid, for LLaDA and AR: a quarter of the preset's steps, validated on the last ninth of
    `train_ids`, so that nothing is chosen on the text that is scored.
    """
    jobs, grid = preset.jobs(vocab_size, *H.split(train_ids, 8 / 9)), []
    for name, *values in itertools.product(jobs, sorted({max(1, preset.n_head * 2 // 3), preset.n_head}), *STUDIED.values()):
        settings = {"model": name, **dict(zip(("heads", *STUDIED), values))}
        grid.append((settings, record_job(jobs[name], settings, share=1 / 4)))
    return grid


def train_all(jobs: list[tuple[str, H.Job]], compiled: bool, side_by_side: int) -> list[H.Run]:
    """Train jobs under their names; several processes at a time make better use of a GPU that one small model leaves idle."""
    if side_by_side > 1:
        with ProcessPoolExecutor(side_by_side, multiprocessing.get_context("spawn")) as pool:
            for name, job in jobs:
                pool.submit(H.train, name, job, compiled=compiled, quiet=True)
    return [trained(name, job, compiled=compiled, quiet=True) for name, job in jobs]  # those that failed fail here, and say why


def study(preset: H.Preset, text: str, side_by_side: int = 1) -> pd.DataFrame:
    """The grid's table, the best first for each model: settings, steps, the best validation loss "nats/char", on the end of the
    training text, and where in the training it was reached."""
    tokenizer = H.CharTokenizer.from_text(text)
    train_ids, _ = H.split(tokenizer.encode(text), 0.9)
    grid = study_jobs(preset, tokenizer.vocab_size, train_ids)
    compiled = preset.compiled and side_by_side == 1  # each process would compile each setting, for longer than it trains
    runs = train_all([(f"{preset.name}-study", job) for _, job in grid], compiled, side_by_side)
    rows = []
    for (settings, job), run in zip(grid, runs):
        best = run.metrics.loc[run.metrics["val_loss"].idxmin()]
        row = settings | {"width": job.model.n_embd, "steps": job.train.steps, "nats/char": best["val_loss"]}
        rows.append(row | {"best at": best["step"] / job.train.steps, "last": run.metrics["val_loss"].iloc[-1]})
    return pd.DataFrame(rows).sort_values(["model", "nats/char"], ascending=[False, True])


def record(preset: H.Preset, text: str, settings: dict[str, dict], seeds: Sequence[int] = (0,)) -> pd.DataFrame:
    """LLaDA and AR as good as the preset makes them, on the split of nanoGPT: a row for each seed, scored on the whole last 10%.

    Trained on the first 90%, to the end: the part of it that is validated on only watches, and the scored text decides nothing.
    LLaDA's "nats/char" is a bound, AR's is exact. `settings`: by model, as `study` has them; what is missing is the preset's.
    """
    tokenizer, rows = H.CharTokenizer.from_text(text), []
    train_ids, test_ids = H.split(tokenizer.encode(text), 0.9)
    for name, job in preset.jobs(tokenizer.vocab_size, train_ids, train_ids[-len(test_ids) :]).items():
        for seed in seeds:
            made = record_job(job, settings.get(name, {}), seed=seed)
            run = trained(f"{preset.name}-record-{name.lower()}", made, compiled=preset.compiled)
            scores = quality.window_nats(run.model, test_ids, preset.nelbo_samples)
            nats, interval = H.per_character(*scores)
            row = {"model": name, "seed": seed, "parameters": run.summary["parameters"], "width": made.model.n_embd}
            row |= {"dropout": made.model.dropout, "weight decay": made.train.weight_decay, "steps": made.train.steps}
            row |= {"epochs": run.summary["tokens"] / len(train_ids), "nats/char": nats, "95% ±": interval}
            row |= {"bits/char": nats / math.log(2), "characters": int(scores[1].sum())}
            rows.append(row | {"minutes": run.summary["seconds"] / 60, "device": run.summary["device"]})
    return pd.DataFrame(rows)


def make_record(preset: H.Preset, text: str, seeds: Sequence[int], with_study: bool, side_by_side: int) -> pd.DataFrame:
    """What `python -m beyond.experiments record` does; tables/record.csv, and with a study tables/record_study.csv, whose best
    setting of each model is then the one that is trained."""
    results, settings = H.Results(preset, text), {}
    if with_study:
        table = results.table(study(preset, text, side_by_side), "record_study")
        print(table.round(4).to_string(index=False))
        settings = {name: part.iloc[0].to_dict() for name, part in table.groupby("model")}
    return results.table(record(preset, text, settings, seeds), "record")
