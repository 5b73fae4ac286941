"""What a decoder is worth, exactly: the probability of a text under the very loop that writes.

A decoder that chooses *where* to write without looking at what it has drawn is a distribution over texts. Its probabilities can
be computed (Turok et al. 2026, *DUEL*, arXiv:2603.01367): let `reverse_process` run, and in each pass tell it the true tokens
instead of drawing them. The product of the probabilities that it gave them is p(text), however many tokens a pass commits.

    nats = decoder_nll(model, windows, H.MASK_ID, steps=8, remasking=bit_reversed).sum(dim=1)
"""

import functools
import math

import torch
from torch import Tensor

import llada_helpers as H
from llada_helpers import MaskPredictor, Strategy

SHAPE_ONLY = {"size", "dim", "numel", "expand_as", "view_as", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like"}
SHAPE_ONLY |= {"new_zeros", "new_ones", "new_empty", "new_full"}


class Unseen(torch.Tensor):
    """Drawn tokens of which a strategy may know shape, type and device; whatever would tell their values is refused.

    >>> tokens = torch.zeros(2, 3, dtype=torch.long).as_subclass(Unseen)
    >>> tokens.shape, torch.ones(3).expand_as(tokens).sum().item()
    (torch.Size([2, 3]), 6.0)
    >>> tokens + 1
    Traceback (most recent call last):
    ValueError: the strategy looks at the drawn tokens (add); pass one that decides by what is visible
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {})) if name in (*SHAPE_ONLY, "__get__") else args
        made = "new" in name or "like" in name or not isinstance(args[0], Unseen)
        if found is args or (isinstance(found, torch.Tensor) and not made):
            raise ValueError(f"the strategy looks at the drawn tokens ({name}); pass one that decides by what is visible")
        return found


@H._checked()
@H._placed
def decoder_nll(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    steps: int,
    remasking: str | Strategy,
    maskable: Tensor | None = None,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p(x_i | what is visible when x_i is committed), FloatTensor[B, L], nats: a row's sum is -log p(x) under this decoder.

    The decoder is `reverse_process` with the same `steps`, `remasking`, `temperature` and `forbidden`, applied to the template
    whose `maskable` tokens (BoolTensor[B, L], default all) are masked; elsewhere the result is 0. It costs as many passes. A
    strategy that draws its order (random, ancestral) gives an unbiased estimate of an upper bound on -log p, Jensen's; averaged
    inside the logarithm over K orders, log K - logsumexp(-nats), it is a tighter one.

    Raises:
        ValueError: a strategy that looks at the drawn tokens (low confidence), since its order then depends on the dice;
            temperature 0 or less; logits that are not finite; what `reverse_process` refuses.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 9)  # 8 tokens are equally likely, as [MASK] is never drawn
    >>> nats = decoder_nll(blank, torch.tensor([[4, 5, 6]]), H.MASK_ID, steps=2, remasking="entropy")
    >>> (nats / math.log(8)).round(decimals=3).tolist()
    [[1.0, 1.0, 1.0]]
    """
    if not 0 < temperature < math.inf or bool((sequences == mask_id).any()):
        raise ValueError(f"temperature={temperature}: pass a positive one, and sequences without mask_id={mask_id}")
    strategy, unseen = H.named_strategy(remasking, generator), torch.zeros_like(sequences).as_subclass(Unseen)
    banned, truth = torch.tensor(sorted({mask_id, *forbidden}), device=sequences.device), sequences[..., None]
    logits, nll = torch.empty(0), torch.zeros(sequences.shape, dtype=torch.float64, device=sequences.device)

    def told(ids: Tensor) -> Tensor:
        """A predictor that knows the text, so that this is what the sampler draws; what the model says is kept."""
        nonlocal logits
        logits = model(ids).double()
        if not bool((logits < math.inf).all()):
            raise ValueError("the logits are not finite; pass a model without NaN and infinity")
        return torch.full_like(logits, -math.inf).scatter(-1, truth, 0.0)

    @functools.wraps(strategy)  # with its schedule
    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        nonlocal nll
        probs = logits.softmax(dim=-1) * masked[..., None]
        stay = strategy(unseen, probs, masked, count) & masked
        cost = -(logits.index_fill(-1, banned, -math.inf) / temperature).log_softmax(dim=-1).gather(-1, truth)[..., 0]
        nll = nll.where(~stay, cost)
        return stay

    if bool(maskable.any()):
        H.reverse_process(told, sequences.masked_fill(maskable, mask_id), mask_id=mask_id, steps=steps, remasking=commit)
    return nll.float()
