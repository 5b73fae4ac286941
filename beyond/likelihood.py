"""Likelihoods beyond the plain bound of `llada_helpers.nelbo`: with less noise, by chains, of answers, by masking rate.

All values are in nats. Guidance is a predictor, not an option: pass `decoding.guided(model, given, w)` as the model, with
`given` true for the prompt (and the suffix).
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import llada_helpers as H
from llada_helpers import MaskPredictor

MANY_SAMPLES = 16  # from here on, more of the masks are spent on small l
PROBES = {"smoke": 16, "cpu": 256, "cpu_long": 256, "gpu": 256}  # windows for the loss by masking rate


@H._checked()
@H._inference
def masked_nll(model: MaskPredictor, sequences: Tensor, mask: Tensor, mask_id: int) -> Tensor:
    """-log p(x_i | the tokens outside `mask`) where mask BoolTensor[B, L] is true, 0 elsewhere; FloatTensor[B, L], nats."""
    return H.token_nll(model, sequences.masked_fill(mask, mask_id), sequences, mask)


@H._checked()
@H._inference
def low_noise_nelbo(model: MaskPredictor, sequences: Tensor, mask_id: int, *, n_samples: int, maskable: Tensor | None = None,
                    common_masks: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """What `llada_helpers.nelbo` estimates, FloatTensor[B], nats (Eqs. 4 and 14), with less noise at the same K = `n_samples`.

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
    n, drawn = maskable.sum(dim=1), slice(0, 1) if common_masks else slice(None)
    power = 2 if n_samples >= MANY_SAMPLES else 1
    rank = 0 if common_masks else H._uniform((n_samples, len(n)), sequences, generator).argsort(dim=1)
    shift = (H._uniform((n_samples, 1), sequences, generator, torch.float64) + rank / len(n)) % 1
    edge = torch.arange(n_samples + 1, device=n.device, dtype=torch.float64)[:, None] / n_samples
    s = edge[:-1] + shift / n_samples  # [K, B], or [K, 1] if the masks are common
    x, weight = s**power, power * s ** (power - 1)
    count = torch.minimum((n[drawn] * x).long() + 1, n[drawn])
    mask = H.exact_masks(count, maskable[drawn], generator).expand(-1, *sequences.shape)
    x_0 = sequences.expand_as(mask)
    nll = H.token_nll(model, x_0.masked_fill(mask, mask_id), x_0, mask).double()
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
def any_order_nll(model: MaskPredictor, sequences: Tensor, mask_id: int, *, n_orders: int, maskable: Tensor | None = None,
                  generator: torch.Generator | None = None) -> Tensor:
    """-log p of each sequence when its tokens are revealed one by one in a random order (Eq. 15); FloatTensor[n_orders, B], nats.

    The mean over orders is the NELBO. The sampler that reveals uniformly one token at a time has p(x) = E_order exp(-nll), so
    that -log mean exp(-nll) over K orders is a tighter bound, exact as K grows. One forward pass per token and order.

    `maskable` BoolTensor[B, L] is what is scored, default everything. ValueError for n_orders < 1 or shapes that do not fit.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> chains = any_order_nll(blank, torch.tensor([[4, 5, 6]]), H.MASK_ID, n_orders=2)
    >>> (chains / torch.tensor(8).log()).round(decimals=3).tolist()
    [[3.0], [3.0]]
    """
    H._refuse(n_orders < 1, f"n_orders={n_orders}: pass at least 1")
    rows, free = (x.repeat(n_orders, 1) for x in (sequences, maskable))
    rank = H._uniform(rows.shape, rows, generator).masked_fill(~free, 2.0).argsort(dim=1).argsort(dim=1)
    total = torch.zeros(len(rows), device=rows.device, dtype=torch.float64)
    for step in range(int(free.sum(dim=1).max())):
        nll = masked_nll(model, rows, free & (rank >= step), mask_id)
        total += nll.masked_fill(rank != step, 0).sum(dim=1)
    return total.view(n_orders, len(sequences)).float()


def log_likelihood(model: MaskPredictor, prompt: Tensor, response: Tensor, mask_id: int, *, n_samples: int,
                   generator: torch.Generator | None = None) -> float:
    """Lower bound on log p(response | prompt), nats, at most 0; prompt LongTensor[P] stays visible (Eq. 6).

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> round(log_likelihood(blank, torch.tensor([4, 5]), torch.tensor([6]), H.MASK_ID, n_samples=2), 4)  # -ln 8
    -2.0794
    """
    return choose(model, prompt, [response], mask_id, n_samples=n_samples, generator=generator)[1][0]


def choose(model: MaskPredictor, prompt: Tensor, options: list[Tensor], mask_id: int, *, n_samples: int,
           suffix: Tensor | None = None, generator: torch.Generator | None = None) -> tuple[int, list[float]]:
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
    wrong = not options or any(o.ndim != 1 or len(o) == 0 for o in options) or prompt.ndim != 1
    H._refuse(wrong, "pass a prompt of shape [P] and at least one option of shape [R], R >= 1")
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


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` windows LongTensor[count, L], evenly over all but the last, which may be padded.

    >>> spread(torch.arange(12).view(6, 2), 3)[:, 0].tolist()
    [0, 4, 8]
    """
    return windows[torch.linspace(0, max(0, len(windows) - 2), count).long()]


def mask_counts(seq_len: int, count: int = 11) -> list[int]:
    """Numbers of masked characters from 1 to all, evenly on a logarithmic axis.

    >>> mask_counts(64, 7)
    [1, 2, 4, 8, 16, 32, 64]
    """
    return sorted({round(x) for x in np.geomspace(1, seq_len, count)})


def cost_by_rate(model: MaskPredictor, windows: Tensor, counts: list[int]) -> np.ndarray:
    """Mean cross-entropy of a masked character, nats, when exactly so many are masked: array [len(counts), N] for windows [N, L].

    The masks depend on nothing but the count, so that models are asked the same.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> (cost_by_rate(blank, torch.full((2, 6), 5), [1, 6]) / np.log(8)).round(3).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    costs, everything = [], torch.ones_like(windows, dtype=torch.bool)
    for count in counts:
        sizes = torch.full((1, len(windows)), count)
        mask = H.exact_masks(sizes, everything, torch.Generator().manual_seed(count))[0]
        costs.append(masked_nll(model, windows, mask, H.MASK_ID).sum(dim=1).cpu().numpy() / count)
    return np.array(costs)


def area_under(counts: list[int], costs: np.ndarray) -> np.ndarray:
    """The area under costs [len(counts), N] over the masking rate from 0 to 1: each window's NELBO per character, [N], nats.

    Between the counts the cost is interpolated, below the first it is constant.

    >>> area_under([1, 4], np.array([[1.0], [3.0]])).tolist()  # 1 up to a rate of 1/4, from there a line up to 3
    [1.75]
    """
    return np.trapezoid(np.concatenate((costs[:1], costs)), np.r_[0, counts] / counts[-1], axis=0)


def average(row: str, values: Tensor | np.ndarray) -> dict[str, str | float]:
    """A line of a table: the mean of values [N] of a text's windows, in their order, and its 95% interval.

    >>> average("two", torch.tensor([2.0, 2.0]))
    {'row': 'two', 'nats/char': 2.0, '95% ±': 0.0}
    """
    mean, half = H.per_character(values, torch.ones(len(values)))
    return {"row": row, "nats/char": mean, "95% ±": half}


@H._inference
def cost_by_place(model: MaskPredictor, windows: Tensor, n_masks: int = 8, seed: int = 0) -> Tensor:
    """Nats of each character of windows [N, L], FloatTensor[N, L]: exact for a causal model, else estimates of the bound's terms.

    The bound is a sum over positions, each with the weight L / l of Eq. 14: a row's mean is its NELBO per character.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> (cost_by_place(blank, torch.full((500, 4), 5)).mean(dim=0) / np.log(8)).round(decimals=1).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    everything = torch.ones_like(windows, dtype=torch.bool)
    if getattr(getattr(model, "config", None), "causal", False):
        return H.token_nll(model, F.pad(windows[:, :-1], (1, 0), value=H.START_ID), windows, everything).cpu()
    L, generator = windows.shape[1], torch.Generator().manual_seed(seed)
    count = (L * H.stratified_shares(n_masks, windows, generator)).long() + 1
    mask = H.exact_masks(count, everything, generator)
    nll = masked_nll(model, windows.expand_as(mask).flatten(0, 1), mask.flatten(0, 1), H.MASK_ID).view(mask.shape)
    return (nll * (L / count)[..., None]).mean(dim=0).float().cpu()
