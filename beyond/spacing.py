"""Strategies that spread what one pass commits over the text, for `reverse_process` with few passes.

Tokens committed in one pass are drawn from the product of their marginals. What that loses is their total correlation,

    KL(joint || product) = sum_i H(x_i | visible) - H(x_1, ..., x_k | visible),

and among characters most of it lies between neighbours. Neither `bit_reversed` nor `spaced` by entropy looks at what was drawn:
one by one, with an exact predictor, they draw from the true distribution.

    made = H.reverse_process(model, template, mask_id=H.MASK_ID, steps=16, temperature=1.0, remasking=spaced(8))
"""

import torch
from torch import Tensor

import llada_helpers as H
from llada_helpers import Strategy


def bit_reversed(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Strategy: commit positions in van der Corput's order, halfway between those before; the model is not asked.

    A position's rank is its number with the bits reversed (van der Corput 1935), as many bits as the last one needs. Whenever
    all of a lower rank are filled, the gaps between them differ at most by a factor of two. The number is that of the place in
    the sequence, not among the masks left, so that the order is one and the same in every pass.

    >>> masked, probs = torch.ones(1, 8, dtype=torch.bool), torch.full((1, 8, 2), 0.5)
    >>> [bit_reversed(masked.long(), probs, masked, torch.tensor([n]))[0].long().tolist() for n in (1, 2, 3)]
    [[1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0, 0, 0]]
    """
    place = torch.arange(masked.shape[1], device=masked.device)
    bits = max(1, (masked.shape[1] - 1).bit_length())
    rank = sum((place >> bit & 1) << (bits - 1 - bit) for bit in range(bits))
    return H.highest(-rank.expand_as(masked), masked, count)


def spaced(distance: int, by: Strategy = H.entropy) -> Strategy:
    """The strategy `by`, asked for one position after the other, each at least `distance` from the others of the same pass.

    Where no mask is that far from them, `by` chooses among the farthest: exactly as many are committed as the schedule wants,
    so that spacing costs no pass. distance=1 is `by` itself, and so is one token a pass. A distance beyond the length of the
    sequence is farthest-first traversal (Gonzalez 1985): no two are nearer than half of what is possible for so many.

    Raises:
        ValueError: distance < 1.

    >>> probs = torch.tensor([[[1.0, 0.0], [0.99, 0.01], [0.7, 0.3], [0.9, 0.1], [0.5, 0.5]]])
    >>> tokens, masked = probs.argmax(dim=-1), torch.ones(1, 5, dtype=torch.bool)
    >>> [spaced(d)(tokens, probs, masked, torch.tensor([2]))[0].long().tolist() for d in (1, 2, 9)]
    [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    """
    if distance < 1:
        raise ValueError(f"distance={distance}: pass at least 1, which is no restriction")

    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        place, chosen = torch.arange(masked.shape[1], device=masked.device), torch.zeros_like(masked)
        gap = torch.full_like(tokens, distance)  # to the nearest chosen one, but no more than `distance`
        for already in range(int(count.max())):
            free = gap.masked_fill(~masked, 0)  # 0 where chosen, too
            allowed = (free > 0) & (free == free.amax(dim=1, keepdim=True))
            new = by(tokens, probs, allowed, (count > already).long())
            to_new = (place - new.long().argmax(dim=1, keepdim=True)).abs()
            gap, chosen = torch.where(new.any(dim=1, keepdim=True), gap.minimum(to_new), gap), chosen | new
        return chosen

    return commit
