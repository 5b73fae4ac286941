"""Little text, many epochs: where the masked diffusion model overtakes the autoregressive one."""

from dataclasses import dataclass

from torch import Tensor

import llada_helpers as H


@dataclass(frozen=True)
class Crossover:
    """Sizes of the data-constrained experiment: each length of training text x each number of steps.

    >>> sizes = Crossover(64, 2, 2, 32, 16, characters=(1_000, 4_000), steps=(10, 40))
    >>> sizes.batch_size * sizes.seq_len * sizes.steps[1] / sizes.characters[0]  # most epochs
    40.96
    """

    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    characters: tuple[int, ...]
    steps: tuple[int, ...]


SMALL = Crossover(64, 2, 2, 32, 16, (400, 800, 1_600), (10, 40))
_CPU = Crossover(64, 3, 2, 64, 16, (10_000, 20_000, 40_000), (400, 800, 1_600))
SIZES = {  # the notebook's short form and the full one
    "smoke": (SMALL, SMALL),
    "cpu": (SMALL, _CPU),
    "cpu_long": (SMALL, _CPU),
    "gpu": (SMALL, Crossover(256, 6, 6, 384, 64, (80_000, 320_000, 892_315), (2_700, 10_900, 54_000))),
}


def crossover_jobs(sizes: Crossover, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """LLaDA, AR and regularised AR on the first so many characters, for so many steps, each with its own decay.

    >>> import torch
    >>> ids = torch.arange(4, 30)
    >>> list(crossover_jobs(SMALL, 30, ids, ids))[2]  # 3 lengths x 2 numbers of steps x 3 kinds
    'AR, regularised, 400 characters, 10 steps'
    """
    jobs, kinds = {}, {"LLaDA": (False, 0.0, 0.0), "AR": (True, 0.0, 0.0), "AR, regularised": (True, 0.2, 0.1)}
    for count in sizes.characters:
        for steps in sizes.steps:
            for kind, (causal, dropout, decay) in kinds.items():
                config = H.TrainConfig(steps, sizes.batch_size, weight_decay=decay, evals=min(10, steps // 10), eval_windows=256)
                shape = H.ModelConfig(vocab_size, sizes.seq_len, sizes.n_layer, sizes.n_head, sizes.n_embd, dropout, causal)
                jobs[f"{kind}, {count:,} characters, {steps:,} steps"] = [H.Job(shape, config, train_ids[:count], val_ids)]
    return jobs
