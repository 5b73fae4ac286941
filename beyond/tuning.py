"""What the presets' recipe is worth: LLaDA and AR with one of its choices changed.

LLaDA is trained on a quarter of the characters that `cpu` shows it, AR on nearly all, since what AR needs against learning the
text by heart does not show before. All rows of a table read the same number of characters. One seed each: rows of the same batch
see the same windows and the same uniform numbers.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

import llada_helpers as H
from beyond.losses import masked_mean, polynomial, switched
from beyond.variants import Averaged

SIZES = {  # characters: of the notebook's short form and of the full one, for LLaDA
    "smoke": (5_120, 10_240),
    "cpu": (40_960, 3_141_632),
    "cpu_long": (40_960, 3_141_632),
    "gpu": (32_768, 32_768_000),
}


def _jobs(
    shape: H.ModelConfig,
    characters: int,
    data: tuple[Tensor, Tensor],
    make_batch: Callable | None = None,
    architecture: type = H.Transformer,
    **changes,
) -> list[H.Job]:
    """Trainings of one row, 16 windows a step unless `changes` of the configuration say otherwise."""
    windows = changes.pop("batch_size", 16)
    steps = max(1, round(characters / (windows * shape.seq_len)))
    config = H.TrainConfig(steps, windows, evals=min(4, steps), eval_windows=min(512, characters // 1000), **changes)
    return [H.Job(shape, config, *data, make_batch, architecture=architecture)]


def llada_jobs(preset: H.Preset, characters: int, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """LLaDA with 16 windows a step, then with one thing changed in each row.

    >>> import torch
    >>> ids = torch.arange(4, 30)
    >>> jobs = llada_jobs(H.PRESETS["smoke"], 10_240, 30, ids, ids)
    >>> [jobs[row][0].train.steps for row in ("16 windows a step", "32 windows", "8 windows of twice the length")]
    [10, 5, 10]
    """
    shape, ours = preset.model(vocab_size, causal=False), polynomial(H.POWER)
    half = round(characters / (16 * shape.seq_len) / 2)
    rows = {
        "16 windows a step": {},
        "32 windows": {"batch_size": 32},
        "8 windows of twice the length": {"batch_size": 8, "shape": replace(shape, seq_len=2 * shape.seq_len)},
        "decay from the start": {"decay": 1.0},
        "Muon's rate x 1.5": {"muon_lr": 0.03},
        "Muon's rate / 1.5": {"muon_lr": 0.0133},
        "Muon's rate / 2.25": {"muon_lr": 0.0089},
        "AdamW's rate x 2": {"adamw_lr": 6e-3},
        "unweighted first, Eq. 3 in the decay": {"make_batch": switched(masked_mean, ours, half)},
    }
    defaults = {"shape": shape, "make_batch": ours}
    return {
        row: _jobs(characters=characters, data=(train_ids, val_ids), **defaults | row_changes)
        for row, row_changes in rows.items()
    }


def reshaped(shape: H.ModelConfig, n_layer: int) -> H.ModelConfig:
    """So many layers, of the width at which they have about as many weights.

    >>> reshaped(H.ModelConfig(vocab_size=10, seq_len=6, n_layer=5, n_head=4, n_embd=128), 3).n_embd
    168
    """
    unit = 2 * shape.n_head  # rotary positions turn pairs
    return replace(shape, n_layer=n_layer, n_embd=unit * round(shape.n_embd * (shape.n_layer / n_layer) ** 0.5 / unit))


def weight_jobs(preset: H.Preset, characters: int, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """LLaDA with 16 windows a step, then with its weights averaged or in another shape.

    >>> import torch
    >>> ids = torch.arange(4, 30)
    >>> [(trial.model.n_layer, trial.model.n_embd) for (trial,) in weight_jobs(H.PRESETS["cpu"], 9_999, 30, ids, ids).values()]
    [(5, 128), (5, 128), (5, 128), (3, 168), (9, 96)]
    """
    shape = preset.model(vocab_size, causal=False)
    rows = {
        "16 windows a step": {},
        "average of the weights": {"architecture": Averaged},
        "average instead of the decay": {"architecture": Averaged, "decay": 0.0},
        "two layers fewer, wider": {"shape": reshaped(shape, max(1, shape.n_layer - 2))},
        "four layers more, narrower": {"shape": reshaped(shape, shape.n_layer + 4)},
    }
    defaults = {"shape": shape, "characters": characters, "data": (train_ids, val_ids)}
    return {row: _jobs(**defaults | row_changes) for row, row_changes in rows.items()}


def ar_jobs(preset: H.Preset, characters: int, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """AR with 16 windows a step, then with one thing changed in each row, four thirds of so many characters.

    >>> import torch
    >>> ids = torch.arange(4, 30)
    >>> ar_jobs(H.PRESETS["smoke"], 10_240, 30, ids, ids)["dropout 0.1"][0].model.dropout
    0.1
    """
    shape = preset.model(vocab_size, causal=True)
    rows = {
        "16 windows a step": {},
        "Muon's rate / 1.5": {"muon_lr": 0.0133},
        "dropout 0.1": {"shape": replace(shape, dropout=0.1)},
        "weight decay 0.1": {"weight_decay": 0.1},
        "weight decay 0.3": {"weight_decay": 0.3},
    }
    defaults = {"shape": shape, "characters": round(characters * 4 / 3), "data": (train_ids, val_ids)}
    return {row: _jobs(**defaults | row_changes) for row, row_changes in rows.items()}
