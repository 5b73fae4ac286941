"""Four other ways to draw the masks of the bound, to compare their noise with that of `likelihood.low_noise_nelbo`.

Each is a function (model, rows LongTensor[W, n], mask_id, K, generator) -> FloatTensor[W], nats: an unbiased estimate of each
row's NELBO from K forward passes, everything maskable. The generator is one of the CPU, wherever the model is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import llada_helpers as H
from beyond.likelihood import masked_nll
from llada_helpers import MaskPredictor


class Sizes(NamedTuple):
    """Sizes of the comparison, and of the any-order chains.

    >>> SIZES["smoke"].passes
    (4, 16, 32)
    """

    windows: int
    repeats: int
    passes: tuple[int, ...]
    chain_windows: int
    orders: int


SIZES = {
    "smoke": Sizes(4, 3, (4, 16, 32), chain_windows=4, orders=4),
    "cpu": Sizes(12, 16, (4, 16, 32), chain_windows=12, orders=12),
    "gpu": Sizes(16, 16, (4, 16, 64), chain_windows=16, orders=16),
}
SIZES["cpu_long"] = SIZES["cpu"]


def _weighted(model: MaskPredictor, rows: Tensor, mask_id: int, mask: Tensor, weight: Tensor) -> Tensor:
    """Mean over K of weight [K, W] times the summed cross-entropy under mask [K, W, n]; [W]."""
    each = rows.expand(len(mask), -1, -1).reshape(-1, rows.shape[1])
    nats = masked_nll(model, each, mask.reshape(each.shape).to(rows.device), mask_id).sum(dim=1)
    return (nats.view(weight.shape) * weight.to(nats.device)).mean(dim=0)


def _exactly(model: MaskPredictor, rows: Tensor, mask_id: int, count: Tensor, generator: torch.Generator) -> Tensor:
    """Eq. 6 with `count` LongTensor[K, W] tokens masked."""
    mask = H.exact_masks(count, torch.ones(rows.shape, dtype=torch.bool), generator)
    return _weighted(model, rows, mask_id, mask, rows.shape[1] / count)


def bernoulli(model: MaskPredictor, rows: Tensor, mask_id: int, K: int, generator: torch.Generator) -> Tensor:
    """Eq. 3: t uniform, each token masked with probability t, weight 1 / t.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> nats = bernoulli(blank, torch.full((1, 32), 5), H.MASK_ID, 4000, torch.Generator().manual_seed(0))
    >>> round(float(nats / 32 / torch.tensor(8).log()), 1)
    1.0
    """
    t = 1 - torch.rand(K, len(rows), generator=generator)
    return _weighted(model, rows, mask_id, torch.rand(K, *rows.shape, generator=generator) < t[..., None], 1 / t)


def fixed(model: MaskPredictor, rows: Tensor, mask_id: int, K: int, generator: torch.Generator) -> Tensor:
    """Eq. 6: exactly l tokens masked, l uniform in 1 ... n, weight n / l.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> nats = fixed(blank, torch.full((1, 32), 5), H.MASK_ID, 3, torch.Generator().manual_seed(0))
    >>> round(float(nats / 32 / torch.tensor(8).log()), 4)  # the number of masks is no source of noise
    1.0
    """
    n = rows.shape[1]
    count = 1 + (torch.rand(K, len(rows), generator=generator) * n).long().clamp(max=n - 1)
    return _exactly(model, rows, mask_id, count, generator)


def authors(model: MaskPredictor, rows: Tensor, mask_id: int, K: int, generator: torch.Generator) -> Tensor:
    """Eq. 6 with l spread evenly over 1 ... n from a random start, as in the LLaDA authors' get_log_likelihood.py.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> nats = authors(blank, torch.full((1, 32), 5), H.MASK_ID, 3, torch.Generator().manual_seed(0))
    >>> round(float(nats / 32 / torch.tensor(8).log()), 4)
    1.0
    """
    n = rows.shape[1]
    start = torch.randint(1, n + 1, (1, len(rows)), generator=generator)
    return _exactly(model, rows, mask_id, (start + torch.arange(K)[:, None] * n // K - 1) % n + 1, generator)


def antithetic(model: MaskPredictor, rows: Tensor, mask_id: int, K: int, generator: torch.Generator) -> Tensor:
    """Eq. 6 with K / 2 pairs of a mask and its complement, l and n - l, l stratified; and one pass more for l = n.

    ValueError unless K is even, and n at least 2.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> nats = antithetic(blank, torch.full((1, 32), 5), H.MASK_ID, 4, torch.Generator().manual_seed(0))
    >>> round(float(nats / 32 / torch.tensor(8).log()), 4)
    1.0
    """
    (W, n), half = rows.shape, K // 2
    if K < 2 or K % 2 or n < 2:
        raise ValueError(f"K={K} passes over {n} tokens: pass an even K >= 2 and at least 2 tokens")
    place = (torch.arange(half)[:, None] + torch.rand(half, W, generator=generator)) / half
    count = 1 + (place * (n - 1)).long().clamp(max=n - 2)
    mask = H.exact_masks(count, torch.ones(W, n, dtype=torch.bool), generator)
    pairs = _weighted(model, rows, mask_id, torch.cat((mask, ~mask)), torch.cat((n / count, n / (n - count))))  # l = 1 ... n - 1
    return pairs * (n - 1) / n + _weighted(model, rows, mask_id, torch.ones_like(mask[:1]), torch.ones(1, W)) / n
