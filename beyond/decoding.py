"""Decoders beyond the paper's, by composition; `reverse_process` needs no option for any of them.

What changes a prediction is a function from mask predictor to mask predictor: `guided`, `cached`. What decides which masks are
committed is a strategy for its `remasking`: `threshold`, `entropy_bound`, `late`, `bit_reversed`, `spaced`. What comes after is a
loop around it: `revise`.

    made = H.reverse_process(guided(model, given, 1.0), template, mask_id=H.MASK_ID, steps=8, remasking=threshold(0.9))

Tokens committed in one pass are drawn from the product of their marginals. What that loses is their total correlation,

    KL(joint || product) = sum_i H(x_i | visible) - H(x_1, ..., x_k | visible),

and among characters most of it lies between neighbours: `bit_reversed` and `spaced` spread what one pass commits over the text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import llada_helpers as H
from llada_helpers import MaskPredictor, Strategy


@H._inference
def _guided(model: MaskPredictor, ids: Tensor, given: Tensor, w: float) -> Tensor:
    wrong = given.dtype != torch.bool or given.shape not in ((1, ids.shape[1]), ids.shape)
    H._refuse(wrong, f"given is {given.dtype} {tuple(given.shape)}; pass bool [1, {ids.shape[1]}] or {tuple(ids.shape)}")
    conditional, unconditional = model(torch.cat((ids, ids.masked_fill(given.to(ids.device), H.MASK_ID)))).chunk(2)
    logits = unconditional + (w + 1) * (conditional - unconditional)
    return logits.masked_fill(conditional.isneginf(), -math.inf)  # -inf - -inf would be NaN


def guided(model: MaskPredictor, given: Tensor | Callable[[Tensor], Tensor], w: float) -> MaskPredictor:
    """The mask predictor with classifier-free guidance of strength w >= 0 (Eq. 16); w = 0 is the model itself.

    Each call makes one pass of twice the rows: the unconditional half sees [MASK] wherever `given` is true. What the
    conditional half holds impossible (-inf) stays so. `given`: BoolTensor[B, L], or [1, L] for all rows alike, or a function from
    ids [B, L] to such a tensor, where L changes. ValueError: w negative or not finite, `given` of another shape than the ids.

    >>> def model(ids):  # favours 4 by 1 nat, and by 1 nat more where position 0 is seen
    ...     return torch.eye(8)[4] * (1.0 + (ids[:, :1, None] != H.MASK_ID)).expand(*ids.shape, 1)
    >>> ids = torch.tensor([[7, H.MASK_ID]])
    >>> [guided(model, ids != H.MASK_ID, w)(ids)[0, 1, 4].item() for w in (0.0, 1.0, 2.0)]
    [2.0, 3.0, 4.0]
    """
    H._refuse(not 0 <= w < math.inf, f"w={w}: pass a strength of guidance >= 0; 0 is none")
    return model if w == 0 else lambda ids: _guided(model, ids, given(ids) if callable(given) else given, w)


def cached(model: H.Transformer, template: Tensor, mask_id: int, block_length: int) -> MaskPredictor:
    """The Transformer as a predictor that remembers, for `reverse_process` with this template [B, L] and block length.

    The first pass of a block covers everything. Its further passes compute the block's columns alone, with the keys and values
    of all else from that first pass (dual cache of Fast-dLLM, Wu et al. 2025, arXiv:2505.22618): an approximation, exact where a
    block takes one pass or nothing lies outside it. Wherever ids differ outside it from those of the last full pass, there is
    another one. ValueError: a model without our Transformer's keys and values; block_length < 1; ids of another shape.

    >>> model = H.Transformer(H.ModelConfig(vocab_size=9, seq_len=6, n_layer=1, n_head=1, n_embd=8))
    >>> template = torch.tensor([[4, 5, *[H.MASK_ID] * 4]])
    >>> blocks = {"mask_id": H.MASK_ID, "block_length": 2}
    >>> H.reverse_process(cached(model, template, **blocks), template, steps=4, **blocks).nfe
    4
    """
    H._refuse(not isinstance(model, H.Transformer), f"pass a Transformer of ours, not {type(model).__name__}")
    H._refuse(block_length < 1, f"block_length={block_length}: pass a positive number of masks")
    masked = template == mask_id
    block_of = torch.where(masked, (masked.cumsum(dim=1) - 1) // block_length, -1)
    seen = cache = logits = None  # ids, keys and values of the last full pass; the logits, kept up to date

    @H._inference
    def predict(ask: MaskPredictor, ids: Tensor) -> Tensor:
        nonlocal seen, cache, logits
        H._refuse(ids.shape != template.shape, f"ids {tuple(ids.shape)}: pass {tuple(template.shape)}, as in the template")
        waiting = ids == mask_id
        blocks = block_of.to(ids.device)
        inside = blocks == blocks.masked_fill(~waiting, ids.shape[1]).min()
        if seen is None or bool((waiting | ~inside).all()) or not torch.equal(ids[~inside], seen[~inside]):
            seen, cache = ids.clone(), H.KVCache(model.config, len(ids), model.embed.weight)
            logits = ask(ids, cache=cache)
        else:
            columns = inside.any(dim=0).nonzero()[:, 0]
            start, stop = int(columns[0]), int(columns[-1]) + 1
            block = ask(ids[:, start:stop], cache=cache, start=start)
            logits = torch.cat((logits[:, :start], block, logits[:, stop:]), dim=1)
        return logits

    return lambda ids: predict(model, ids)


def threshold(p: float) -> Strategy:
    """Commit every token whose probability exceeds p, at least the likeliest of each row (Fast-dLLM, Wu et al. 2025).

    The schedule's count is disregarded: with steps=1 `order` counts the passes, as many as it takes. ValueError for p outside
    [0, 1].

    >>> probs = torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.0, 0.0]], [[0.6, 0.4], [0.3, 0.7], [0.3, 0.7]]])
    >>> masked = torch.tensor([[True, True, False], [True, False, False]])
    >>> threshold(0.7)(probs.argmax(dim=-1), probs, masked, count=masked.sum(dim=1)).tolist()
    [[True, False, False], [True, False, False]]
    """
    H._refuse(not 0 <= p <= 1, f"p={p}: pass a probability in [0, 1]")

    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        chosen = probs.gather(-1, tokens[..., None])[..., 0]
        return H.highest(chosen, masked, masked.any(dim=1).long()) | (masked & (chosen > p))

    return commit


def entropy_bound(nats: float) -> Strategy:
    """Commit each row's longest run of lowest entropies whose sum, less its largest term, is at most so many nats; at least one.

    That bounds what tokens committed together can know of each other (EB-Sampler, Ben-Hamu et al. 2025, arXiv:2505.24857).
    The schedule's count is disregarded: with steps=1 `order` counts the passes, as many as it takes. ValueError for nats < 0.

    >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]]])  # 0.69, 0 and 0.33 nats
    >>> tokens, masked = probs.argmax(dim=-1), torch.ones(1, 3, dtype=torch.bool)
    >>> [entropy_bound(nats)(tokens, probs, masked, count=torch.tensor([3]))[0].tolist() for nats in (0.0, 0.4)]
    [[False, True, True], [True, True, True]]
    """
    H._refuse(not nats >= 0, f"nats={nats}: pass a bound >= 0")

    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        entropy = torch.special.entr(probs).sum(dim=-1)
        ranked = entropy.masked_fill(~masked, math.inf).sort(dim=1).values  # ascending, so a run's largest term is its last
        run = (ranked.cumsum(dim=1) - ranked <= nats).sum(dim=1)
        return H.highest(-entropy, masked, run.minimum(masked.sum(dim=1)))

    return commit


def late(strategy: Strategy | str, ids: tuple[int, ...]) -> Strategy:
    """The strategy, but the proposals in `ids` wait until the other ones are committed, then come by their probability.

    [END] would otherwise be locked in early and cut the text short (LLaDA, appendix B.4). They come as the schedule wants
    them: with as many steps as masks, one a pass. `strategy`: a function, or "low_confidence", "entropy", "margin", else
    ValueError.

    >>> probs = torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]])
    >>> tokens, masked = probs.argmax(dim=-1), torch.ones(1, 3, dtype=torch.bool)
    >>> [late("low_confidence", (0,))(tokens, probs, masked, torch.tensor([count]))[0].tolist() for count in (1, 2)]
    [[True, False, False], [True, False, True]]
    """
    known = {f.__name__: f for f in (H.low_confidence, H.entropy, H.margin)}
    strategy = known.get(strategy, strategy)
    H._refuse(not callable(strategy), f"strategy={strategy!r}: pass one of {', '.join(known)}, or a function")
    last = torch.tensor(sorted(ids), dtype=torch.long)

    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        postponed = masked & torch.isin(tokens, last.to(tokens.device))
        early = masked & ~postponed
        first = strategy(tokens, probs, early, count.minimum(early.sum(dim=1)))
        missing = (count - early.sum(dim=1)).clamp(min=0).masked_fill((early & ~first).any(dim=1), 0)
        return first | H.low_confidence(tokens, probs, postponed, missing)

    commit.schedule = getattr(strategy, "schedule", H.evenly)
    return commit


def bit_reversed(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Strategy: commit positions in van der Corput's order, halfway between those before; the model is not asked.

    A position's rank is its number with the bits reversed (van der Corput 1935), as many bits as the last one needs; gaps between
    what is filled differ at most by a factor of two. For images, in two dimensions: Besnier et al. 2025, arXiv:2503.17076.

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

    Where no mask is that far from them, `by` chooses among the farthest, so that spacing costs no pass. distance=1 is `by`, and
    so is one token a pass. A distance beyond the sequence's length is farthest-first traversal (Gonzalez 1985): no two are nearer
    than half of what is possible for so many. ValueError: distance < 1.

    >>> probs = torch.tensor([[[1.0, 0.0], [0.99, 0.01], [0.7, 0.3], [0.9, 0.1], [0.5, 0.5]]])
    >>> tokens, masked = probs.argmax(dim=-1), torch.ones(1, 5, dtype=torch.bool)
    >>> [spaced(d)(tokens, probs, masked, torch.tensor([2]))[0].long().tolist() for d in (1, 2, 9)]
    [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    """
    H._refuse(distance < 1, f"distance={distance}: pass at least 1, which is no restriction")

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

    commit.schedule = getattr(by, "schedule", H.evenly)
    return commit


@dataclass(kw_only=True)
class Revised(H.Generation):
    """A generation some of whose tokens were taken back: `order` tells the last commit, `state_after` every state.

    >>> first = H.Generation(torch.tensor([[4, 5]]), torch.tensor([[0, 0]]), nfe=1, confidence=torch.tensor([[0.9, 0.3]]))
    >>> last = {"ids": torch.tensor([[4, 6]]), "order": torch.tensor([[0, 1]]), "confidence": torch.tensor([[0.9, 0.8]])}
    >>> made = Revised(**last, nfe=2, before=first, states=[last["ids"]])
    >>> [made.state_after(step)[0].tolist() for step in (-1, 0, 1)], made.steps()
    ([[1, 1], [4, 5], [4, 6]], [0, 1])
    """

    before: H.Generation  # what was revised
    states: list[Tensor]  # LongTensor[B, L] each, the sequences after each revision

    def state_after(self, step: int, mask_id: int = H.MASK_ID) -> Tensor:
        """LongTensor[B, L]: the sequences after `step`; step -1 is the template."""
        revision = step - self.before.steps()[-1] - 1
        return self.before.state_after(step, mask_id) if revision < 0 else self.states[min(revision, len(self.states) - 1)]

    def steps(self) -> list[int]:
        """Those of what was revised, and each revision."""
        first = self.before.steps()
        return first + list(range(first[-1] + 1, first[-1] + 1 + len(self.states)))


def revise(
    model: MaskPredictor,
    made: H.Generation,
    *,
    mask_id: int,
    passes: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    forbidden: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    per_pass: int | None = None,
) -> Revised:
    """So many further passes, each of which takes back a row's least certain tokens and decides them anew, all others in sight.

    In the spirit of ReMDM (Wang et al. 2025, arXiv:2503.00307). Certainty is `confidence`, updated as tokens are redone; what was
    given is not touched. `per_pass` tokens are taken back in each row, by default as many as a step of `made` committed, rounded
    up. ValueError: fewer than 1 pass or 1 token per pass, and what `reverse_process` refuses.

    >>> def model(ids):  # knows position 1 only where position 0 is seen
    ...     return torch.stack((9 * torch.eye(8)[4].expand(len(ids), -1), (ids[:, :1] == 4) * 9 * torch.eye(8)[5]), dim=1)
    >>> made = H.reverse_process(model, torch.full((1, 2), H.MASK_ID), mask_id=H.MASK_ID, steps=1)
    >>> again = revise(model, made, mask_id=H.MASK_ID, passes=1, per_pass=1)
    >>> made.ids.tolist(), again.ids.tolist(), again.order.tolist(), again.nfe
    ([[4, 0]], [[4, 5]], [[0, 1]], 2)
    """
    committed, steps = made.order >= 0, made.steps()[-1] + 1
    per_pass = -(-int(committed.sum(dim=1).max()) // steps) if per_pass is None else per_pass
    H._refuse(min(passes, per_pass) < 1, f"passes={passes}, per_pass={per_pass}: pass at least 1 of each")
    options = {"temperature": temperature, "top_p": top_p, "forbidden": forbidden, "generator": generator}
    ids, order, confidence, states = made.ids, made.order, made.confidence, []
    for step in range(steps, steps + passes):
        redone = H.highest(-confidence, committed, committed.sum(dim=1).clamp(max=per_pass))
        again = H.reverse_process(model, ids.masked_fill(redone, mask_id), mask_id=mask_id, steps=1, **options)
        ids, order = again.ids, order.masked_fill(redone, step)
        confidence = torch.where(redone, again.confidence, confidence)
        states.append(ids)
    return Revised(ids=ids, order=order, nfe=made.nfe + passes, confidence=confidence, before=made, states=states)
