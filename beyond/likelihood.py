"""Likelihoods beyond the plain bound of `llada_helpers.nelbo`: less noise, any-order chains, answers scored and chosen.

All values are in nats. Guidance is a predictor, not an option: pass `decoding.guided(model, given, w)` as the model, with
`given` true for the prompt (and the suffix).
"""

import torch
from torch import Tensor

import llada_helpers as H
from llada_helpers import MaskPredictor

MANY_SAMPLES = 16  # from here on, more of the masks are spent on small l


@H._checked()
@H._inference
def masked_nll(model: MaskPredictor, sequences: Tensor, mask: Tensor, mask_id: int) -> Tensor:
    """-log p(x_i | the tokens outside `mask`) where mask BoolTensor[B, L] is true, 0 elsewhere; FloatTensor[B, L], nats."""
    return H.token_nll(model, sequences.masked_fill(mask, mask_id), sequences, mask)


@H._checked()
@H._inference
def low_noise_nelbo(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    n_samples: int,
    maskable: Tensor | None = None,
    common_masks: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What `llada_helpers.nelbo` estimates, FloatTensor[B], nats (Eqs. 4 and 6), with less noise at the same K = `n_samples`.

    As there, mask k hides exactly l of a row's n maskable tokens and weighs their cross-entropies by n / l, where l / n is s,
    uniform in [k / K, (k + 1) / K), which the rows share in a random order. Two things more lower the noise and leave the
    expectation alone:

    - A mean over l tokens is the noisier, the fewer they are. With many samples l / n is therefore s^2, which makes small l more
      frequent, and dx = 2 s ds adds the weight 2 s.
    - What the *other* K - 1 masks say is a control variate r_i for mask k, with its exact expectation added back: a level (with
      many samples, a line in l / n), plus how much harder than that token i was. Mask k is independent of it, so
      E[w (n / l) sum_masked r_i] = E[w] sum_maskable r_i.

    Args:
        maskable: BoolTensor[B, L], what is scored; default everything.
        common_masks: all rows get the same masks (common random numbers; rows must be maskable in the same places).

    Raises:
        ValueError: n_samples < 1, or shapes that do not fit.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> bound = low_noise_nelbo(blank, torch.tensor([[4, 5, 6, 7]]), H.MASK_ID, n_samples=4)
    >>> (bound / torch.tensor(8).log()).round(decimals=3).tolist()
    [4.0]
    """
    (B, L), n = sequences.shape, maskable.sum(dim=1)
    drawn = slice(0, 1) if common_masks else slice(None)
    power = 2 if n_samples >= MANY_SAMPLES else 1
    rank = 0 if common_masks else H._uniform((n_samples, B), sequences, generator).argsort(dim=1)
    shift = (H._uniform((n_samples, 1), sequences, generator, torch.float64) + rank / B) % 1
    edge = torch.arange(n_samples + 1, device=n.device, dtype=torch.float64)[:, None] / n_samples
    s = edge[:-1] + shift / n_samples  # [K, B], or [K, 1] if the masks are common
    x, weight = s**power, power * s ** (power - 1)
    count = torch.minimum((n[drawn] * x).long() + 1, n[drawn])
    mask = H.exact_masks(count, maskable[drawn], generator).expand(n_samples, B, L)
    rows, masks = (z.expand_as(mask).reshape(-1, L) for z in (sequences, mask))
    nll = masked_nll(model, rows, masks, mask_id).view_as(mask).double()
    level, slope, harder = _what_others_say(nll, mask.double(), count, x, line=power == 2)
    baseline = (level + slope * x)[..., None] + harder
    w, wx = n_samples * (edge**power).diff(dim=0), n_samples * (edge ** (2 * power)).diff(dim=0) / 2  # means over s
    estimate = weight * n / count.clamp(min=1) * ((nll - baseline) * mask).sum(dim=-1)
    estimate = estimate + n * (level * w + slope * wx) + w * harder.sum(dim=-1)
    return estimate.mean(dim=0).float()


def _what_others_say(nll: Tensor, hidden: Tensor, count: Tensor, x: Tensor, line: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each mask, from the nll [K, B, L] under all the others: a token's cost, level + slope x, and what each adds to it.

    `hidden` DoubleTensor[K, B, L] are the masks, with `count` of a row's tokens, the share x. Returns level and slope [K, B], the
    latter 0 unless `line`, and [K, B, L].
    """

    def others(values: Tensor) -> Tensor:
        return values.sum(dim=0) - values

    known = nll.clamp(max=100.0)  # an impossible token costs infinity, but must not enter its own baseline as infinity - infinity
    total = known.sum(dim=-1)
    size, size_x, level = others(count.double()).clamp(min=1), others(count * x), others(total)
    slope = torch.zeros_like(level)
    if line:  # least squares, each mask's mean weighing l
        spread = size * others(count * x * x) - size_x**2
        slope = torch.where(spread > 0, (size * others(total * x) - size_x * level) / spread.clamp(min=1e-12), 0.0)
    level = (level - slope * size_x) / size
    seen = others(hidden)
    harder = others(known) - level[..., None] * seen - slope[..., None] * others(hidden * x[..., None])
    return level, slope, harder / (seen + 1)  # shrunk toward zero, since few masks say little


@H._checked()
@H._inference
def any_order_nll(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    n_orders: int,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p of each sequence when its tokens are revealed one by one in a random order (Eq. 15); FloatTensor[n_orders, B], nats.

    The mean over orders is the NELBO. The sampler that reveals uniformly one token at a time has p(x) = E_order exp(-nll), so
    that -log mean exp(-nll) over K orders is a tighter bound, exact as K grows. One forward pass per token and order.

    `maskable` BoolTensor[B, L] is what is scored, default everything. ValueError for n_orders < 1 or shapes that do not fit.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> chains = any_order_nll(blank, torch.tensor([[4, 5, 6]]), H.MASK_ID, n_orders=2)
    >>> (chains / torch.tensor(8).log()).round(decimals=3).tolist()
    [[3.0], [3.0]]
    """
    if n_orders < 1:
        raise ValueError(f"n_orders={n_orders}: pass at least 1")
    rows, free = (x.repeat(n_orders, 1) for x in (sequences, maskable))
    rank = H._uniform(rows.shape, rows, generator).masked_fill(~free, 2.0).argsort(dim=1).argsort(dim=1)
    total = torch.zeros(len(rows), device=rows.device, dtype=torch.float64)
    for step in range(int(free.sum(dim=1).max())):
        nll = masked_nll(model, rows, free & (rank >= step), mask_id)
        total += nll.masked_fill(rank != step, 0).sum(dim=1)
    return total.view(n_orders, len(sequences)).float()


def log_likelihood(
    model: MaskPredictor,
    prompt: Tensor,
    response: Tensor,
    mask_id: int,
    *,
    n_samples: int,
    generator: torch.Generator | None = None,
) -> float:
    """Lower bound on log p(response | prompt), nats, at most 0; prompt LongTensor[P] stays visible (Eq. 6).

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> round(log_likelihood(blank, torch.tensor([4, 5]), torch.tensor([6]), H.MASK_ID, n_samples=2), 4)  # -ln 8
    -2.0794
    """
    return choose(model, prompt, [response], mask_id, n_samples=n_samples, generator=generator)[1][0]


def choose(
    model: MaskPredictor,
    prompt: Tensor,
    options: list[Tensor],
    mask_id: int,
    *,
    n_samples: int,
    suffix: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[int, list[float]]:
    """Index of the likeliest option after prompt LongTensor[P], and each option's log-likelihood bound in nats (Eq. 6).

    `suffix` LongTensor[S]: what stands after the option and is seen too. Options of one length are scored in one batch, hidden by
    the same masks (common random numbers), which takes shared noise out of the comparison.

    Raises:
        ValueError: no option, an empty one, or shapes that are not vectors.

    >>> alphabet = lambda ids: 5 * torch.eye(8)[4:].expand(len(ids), -1, -1)  # sure of 4, 5, 6, 7
    >>> options = [torch.tensor([7, 6]), torch.tensor([6, 7])]
    >>> index, scores = choose(alphabet, torch.tensor([4, 5]), options, H.MASK_ID, n_samples=4)
    >>> index, [round(score, 2) for score in scores]
    (1, [-10.09, -0.09])
    """
    if not options or any(o.ndim != 1 or len(o) == 0 for o in options) or prompt.ndim != 1:
        raise ValueError("pass a prompt of shape [P] and at least one option of shape [R], R >= 1")
    suffix = prompt[:0] if suffix is None else suffix
    seed = int(H._uniform((1,), prompt, generator, torch.float64) * 2**53)
    scores = torch.zeros(len(options))
    for length in {len(option) for option in options}:
        chosen = [i for i, option in enumerate(options) if len(option) == length]
        rows = torch.stack([torch.cat((prompt, options[i], suffix)) for i in chosen])
        position = torch.arange(rows.shape[1], device=rows.device)
        maskable = ((position >= len(prompt)) & (position < len(prompt) + length)).expand_as(rows)
        same = {"common_masks": True, "generator": torch.Generator().manual_seed(seed)}
        bounds = low_noise_nelbo(model, rows, mask_id, n_samples=n_samples, maskable=maskable, **same)
        scores[chosen] = -bounds.cpu().clamp(min=0.0)  # the control variate may overshoot by a little, log p cannot
    return int(scores.argmax()), scores.tolist()
