"""What more training buys: LLaDA and AR at several budgets, each a training of its own with its own decay.

Compute is counted, not clocked: a training costs three forward passes for each character that it reads (forward, and twice as
much backward), a forward pass two operations for each weight of a matrix and, for attention, four for each key and unit of width.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond import quality
from beyond.vocabulary import multiplications


class Budget(NamedTuple):
    """A share of what a preset trains, and with how many seeds."""

    preset: str
    share: float
    seeds: int = 1


def _shares(preset: str, *shares: int, seeds: int = 1) -> list[Budget]:
    return [Budget(preset, 1 / n, seeds) for n in (*shares, 1)]


_SMOKE = {"LLaDA": _shares("smoke", 2), "AR": _shares("smoke", 2)}
_LONG = [Budget("cpu_long", 1)]
_CPU = {"LLaDA": _shares("cpu", 9, 3, seeds=2) + _LONG, "AR": _shares("cpu", 27, 9, 3, seeds=2) + _LONG}
_GPU = {"LLaDA": _shares("gpu", 9, 3), "AR": _shares("gpu", 27, 9, 3)}
SIZES = {"smoke": (_SMOKE, _SMOKE), "cpu": (_SMOKE, _CPU), "cpu_long": (_SMOKE, _CPU), "gpu": (_SMOKE, _GPU)}


BACKWARD = 3  # a forward and a backward pass cost as much as three forward passes (Kaplan et al. 2020, arXiv:2001.08361)


def forward_flop(config: H.ModelConfig, length: int, keys: int) -> int:
    """Floating-point operations of a forward pass over `length` tokens of one sequence, which attend to `keys` tokens.

    Two for each multiplication, per layer 12 n_embd^2 in matrices and 2 keys n_embd in attention; the head. Nothing is halved for
    causal attention.

    >>> config = H.ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8)
    >>> forward_flop(config, length=6, keys=6), forward_flop(config, length=1, keys=6)
    (11328, 1888)
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


def budget_jobs(budgets: dict[str, list[Budget]], vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """A row for each model and budget: the preset's training with fewer steps.

    >>> ids = torch.arange(4, 30)
    >>> {row: [job.train.steps for job in trials] for row, trials in budget_jobs(SIZES["smoke"][1], 30, ids, ids).items()}
    {'LLaDA, smoke / 2': [100], 'LLaDA, smoke': [200], 'AR, smoke / 2': [100], 'AR, smoke': [200]}
    """
    jobs = {}
    for name, rows in budgets.items():
        for preset, share, seeds in rows:
            job = H.PRESETS[preset].jobs(vocab_size, train_ids, val_ids)[name]
            config = job.train
            if share < 1:
                config = replace(config, steps=round(share * config.steps), evals=max(1, round(share * config.evals)))
            row = f"{name}, {preset}" + (f" / {round(1 / share)}" if share < 1 else "")
            jobs[row] = [replace(job, train=replace(config, seed=config.seed + seed)) for seed in range(seeds)]
    return jobs


def window_nats(model: H.Transformer, ids: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Nats and characters of each window of the model's length in a text ids [n], [N] each: as Part 8 measures them.

    >>> model = H.Transformer(H.ModelConfig(vocab_size=9, seq_len=4, n_layer=1, n_head=1, n_embd=8, causal=True))
    >>> [[round(n, 2) for n in x.tolist()] for x in window_nats(model, torch.arange(4, 9), 1)]  # blank: ln 9 a character
    [[8.79, 2.2], [4, 1]]
    """
    windows = H.windows(ids, model.config.seq_len)
    real = windows != H.PAD_ID
    if model.config.causal:
        return H.ar_nll(model, windows, H.START_ID).cpu(), real.sum(dim=1)
    options = {"n_samples": samples, "maskable": real, "generator": torch.Generator().manual_seed(0)}
    return H.nelbo(model, windows, H.MASK_ID, **options).cpu(), real.sum(dim=1)


def budget_measure(preset: H.Preset, text: str, prompt: str = "ROMEO:") -> Callable[[H.Job, H.Run], dict]:
    """What `run_jobs` adds to a row: compute, nats per character of the whole test text, judge, known words, a sample.

    Texts are continued from prompts of the test text to one window of the preset, a shorter one if that is the model's; judge and
    words are those of Part 8. The sample begins with `prompt`, or as the test text does if the text lacks its characters.

    >>> text = "to be, or not to be " * 40
    >>> tokenizer = H.CharTokenizer.from_text(text)
    >>> shape = H.ModelConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_embd=8)
    >>> job = H.Job(shape, H.TrainConfig(1, 2), *quality.parts(tokenizer.encode(text))[:2])
    >>> run = H.Run(H.Transformer(shape), pd.DataFrame(), {}, None)
    >>> row = budget_measure(H.PRESETS["smoke"], text)(job, run)
    >>> row["model"], round(row["nats/char"], 2), len(row["sample"])  # blank: ln 12
    ('LLaDA', 2.48, 64)
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
        nats, interval = H.per_character(*window_nats(run.model, test_ids, preset.nelbo_samples))
        made, sample = (continued(run.model, x[:, : run.model.config.seq_len]) for x in (template, opening))
        score = {key: value for key, value in scores(made).items() if key.startswith(("judge", "known", "char"))}
        counted = {"scored on": "test text", "model": "AR" if job.model.causal else "LLaDA", "TFLOP": training_flop(job) / 1e12}
        return {**counted, "nats/char": nats, "95% ±": interval, **score, "sample": tokenizer.decode(sample[0])}

    return measure


def compute_ratio(table: pd.DataFrame) -> tuple[float, float]:
    """How many times AR's compute LLaDA needs for the same nats per character, at the least and at the most of the numbers that
    both curves pass; each curve is straight between its budgets in log compute. (NaN, NaN) where the curves have none in common.

    >>> curves = {"LLaDA": ((1, 2.5), (10, 2.0), (100, 1.5)), "AR": ((0.1, 2.5), (1, 2.0), (10, 1.5))}
    >>> rows = [{"model": name, "TFLOP": c, "nats/char": n} for name, curve in curves.items() for c, n in curve]
    >>> [round(ratio, 6) for ratio in compute_ratio(pd.DataFrame(rows))]
    [10.0, 10.0]
    """
    curves = {}
    for name, part in table.groupby("model"):
        part = part.sort_values("nats/char")
        curves[name] = part["nats/char"].to_numpy(), np.log(part["TFLOP"].to_numpy())
    low, high = (pick(curve[0][end] for curve in curves.values()) for pick, end in ((max, 0), (min, -1)))
    if low > high:
        return float("nan"), float("nan")
    at = np.array([n for nats, _ in curves.values() for n in nats if low <= n <= high])
    ratios = np.exp(np.interp(at, *curves["LLaDA"]) - np.interp(at, *curves["AR"]))
    return float(ratios.min()), float(ratios.max())
