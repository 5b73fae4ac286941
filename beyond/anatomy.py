"""A trained model taken apart: what a character costs by masking rate and by place, and how noisy its gradient is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llada_helpers as H
from beyond.likelihood import masked_nll


class Sizes(NamedTuple):
    """How much is measured; the more, the smaller the intervals.

    >>> SIZES["smoke"].probes
    16
    """

    probes: int  # windows for the loss by masking rate and by place
    gradient_batches: int  # batches per loss, for the noise of the gradient
    gradient_windows: int  # windows per t, each with a gradient of its own


SIZES = {"smoke": Sizes(16, 3, 4), "cpu": Sizes(256, 32, 64), "gpu": Sizes(256, 32, 64)}
SIZES["cpu_long"] = SIZES["cpu"]


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


def cost_by_rate(model, windows: Tensor, counts: list[int]) -> np.ndarray:
    """Mean cross-entropy of a masked character, nats, when exactly so many are masked: array [len(counts), N] for windows [N, L].

    The masks depend on nothing but the count, so that models are asked the same.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> (cost_by_rate(blank, torch.full((2, 6), 5), [1, 3, 6]) / np.log(8)).round(3).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    costs, everything = [], torch.ones_like(windows, dtype=torch.bool)
    for count in counts:
        sizes = torch.full((1, len(windows)), count)
        mask = H.exact_masks(sizes, everything, torch.Generator().manual_seed(count))[0]
        costs.append(masked_nll(model, windows, mask, H.MASK_ID).sum(dim=1).cpu().numpy() / count)
    return np.array(costs)


def area_under(counts: list[int], costs: np.ndarray) -> float:
    """The area under the mean of costs [len(counts), N] over the masking rate from 0 to 1: the NELBO per character, nats.

    Between the counts the cost is interpolated, below the first it is constant.

    >>> area_under([1, 4], np.array([[1.0], [3.0]]))  # 1 up to a rate of 1/4, from there a line up to 3
    1.75
    """
    rates, mean = np.array(counts) / counts[-1], costs.mean(axis=1)
    return float(np.trapezoid(np.r_[mean[0], mean], np.r_[0, rates]))


def table_by_rate(counts: list[int], costs: np.ndarray) -> pd.DataFrame:
    """A row per masking rate t: the mean of costs [len(counts), N], and its 95% interval over windows.

    >>> table_by_rate([1, 4], np.array([[1.0, 1.0], [3.0, 3.0]])).to_dict("list")
    {'t': [0.25, 1.0], 'nats/char': [1.0, 3.0], 'nats/char ±': [0.0, 0.0]}
    """
    ones = np.ones(costs.shape[1])
    mean, half = zip(*(H.per_character(cost, ones) for cost in costs))
    return pd.DataFrame({"t": np.array(counts) / counts[-1], "nats/char": mean, "nats/char ±": half})


def average(row: str, values: Tensor) -> dict[str, str | float]:
    """A line of a table: the mean of values [N] of a text's windows, in their order, and its 95% interval.

    >>> average("two", torch.tensor([2.0, 2.0]))
    {'row': 'two', 'nats/char': 2.0, '95% ±': 0.0}
    """
    mean, half = H.per_character(values, torch.ones_like(values))
    return {"row": row, "nats/char": mean, "95% ±": half}


def noise_table(draws: dict[tuple[str, int], Tensor], reference: str) -> pd.DataFrame:
    """The noise of estimators: draws [R, W] by (scheme, passes), R repeats for each of W windows, nats per character.

    The variance is that over repeats, averaged over windows. Its ratio to the `reference` scheme's at as many passes has a 95%
    interval from resampling the repeats, since tails are heavy.

    >>> a = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    >>> noise_table({("a", 4): a, ("b", 4): a / 2}, "b")[["row", "variance / b"]].to_dict("list")
    {'row': ['a, K = 4', 'b, K = 4'], 'variance / b': [4.0, 1.0]}
    """
    rows, generator = [], torch.Generator().manual_seed(0)
    for (scheme, passes), drawn in draws.items():
        other, repeats = draws[reference, passes], len(drawn)
        variance = drawn.var(dim=0).mean().item()
        row = {"row": f"{scheme}, K = {passes}", "scheme": scheme, "passes": passes, "standard error": variance**0.5}
        mean = drawn.mean(dim=1)
        row |= {"mean": mean.mean().item(), "mean ±": H.half_width(mean.numpy()), "variance": variance}
        picks = torch.randint(repeats, (2, 300, repeats), generator=generator)
        ours, theirs = (x[pick].var(dim=1).mean(dim=1) for x, pick in zip((drawn, other), picks))
        row[f"variance / {reference.partition(',')[0]}"] = (drawn.var(dim=0).mean() / other.var(dim=0).mean()).item()
        row["ratio ±"] = float("nan") if scheme == reference else 1.96 * (ours / theirs).std().item()
        rows.append(row)
    return pd.DataFrame(rows)


def cost_by_place(model, windows: Tensor, n_masks: int = 8, seed: int = 0) -> Tensor:
    """Nats of each character of windows [N, L], FloatTensor[N, L]: exact for a causal model, else estimates of the bound's terms.

    The bound is a sum over positions, each with the weight L / l of Eq. 6: a row's mean is its NELBO per character.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> cost = cost_by_place(blank, torch.full((500, 4), 5))
    >>> (cost.mean(dim=0) / np.log(8)).round(decimals=1).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if getattr(getattr(model, "config", None), "causal", False):
        inputs, targets, _ = H.next_token_batch(windows)
        with torch.no_grad():
            logits = model(inputs.to(next(model.parameters()).device)).cpu()
        return F.cross_entropy(logits.transpose(1, 2), targets.cpu(), reduction="none")
    (N, L), generator = windows.shape, torch.Generator().manual_seed(seed)
    everything, cost = torch.ones_like(windows, dtype=torch.bool), torch.zeros(windows.shape)
    for k in range(n_masks):
        rate = (k + torch.rand(N, generator=generator)) / n_masks
        count = ((rate * L).long() + 1).clamp(max=L)
        mask = H.exact_masks(count[None], everything, generator)[0]
        cost += masked_nll(model, windows, mask, H.MASK_ID).cpu() * (L / count[:, None] / n_masks)
    return cost


def places(seq_len: int) -> list[tuple[int, int]]:
    """Stretches (start, end) of a window, short at both ends.

    >>> places(40)
    [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 20), (20, 24), (24, 32), (32, 36), (36, 38), (38, 39), (39, 40)]
    """
    ends = [0, 1, 2, 4, 8, 16]
    edges = sorted({seq_len // 2, *ends, *(seq_len - end for end in ends)} & set(range(seq_len + 1)))
    return list(pairwise(edges))


def table_by_place(costs: dict[str, Tensor]) -> pd.DataFrame:
    """For each model's costs [N, L] a row per stretch of the window: its characters, nats/char, the 95% interval over windows.

    >>> table = table_by_place({"blank": torch.full((3, 8), 2.0)})
    >>> table["characters"].tolist(), table["nats/char"].unique().tolist()
    (['1', '2', '3-4', '5-6', '7', '8'], [2.0])
    """
    rows = []
    for name, cost in costs.items():
        for start, end in places(cost.shape[1]):
            chunk = cost[:, start:end].double().mean(dim=1)
            place = f"{end}" if end == start + 1 else f"{start + 1}-{end}"
            mean, half = H.per_character(chunk, torch.ones_like(chunk))
            rows.append({"model": name, "characters": place, "nats/char": mean, "nats/char ±": half})
    return pd.DataFrame(rows)


def gradient(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[float, Tensor]:
    """The loss of a batch (inputs, targets, weights) and its gradient with respect to all parameters, FloatTensor[P].

    >>> model = H.Transformer(H.ModelConfig(vocab_size=8, seq_len=3, n_layer=1, n_head=1, n_embd=4))
    >>> loss, g = gradient(model, H.next_token_batch(torch.tensor([[4, 5, 6]])))
    >>> round(loss, 4), len(g) == model.n_parameters  # ln 8, the blank model's loss
    (2.0794, True)
    """
    parameters = list(model.parameters())
    loss = H.weighted_nll(model, *(x.to(parameters[0].device) for x in batch))
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts)])


def gradient_noise(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, float]:
    """At fixed weights, over at least two batches: the loss, the gradient's norm, and E|g - mean|^2 / |mean|^2.

    The square of the mean's norm is estimated without bias; where that is not positive the ratio is infinite.

    >>> model = H.Transformer(H.ModelConfig(vocab_size=8, seq_len=3, n_layer=1, n_head=1, n_embd=4))
    >>> noise = gradient_noise(model, [H.next_token_batch(torch.tensor([[4, 5, 6]]))] * 3)  # the same batch: no noise
    >>> round(noise["expected loss"], 4), round(noise["noise / signal"], 4)
    (2.0794, 0.0)
    """
    values, squares, total = [], [], 0.0
    for batch in batches:
        value, g = gradient(model, batch)
        values.append(value)
        squares.append(float(g.double().square().sum()))
        total = total + g.double()
    count, norms, mean_square = len(values), np.sqrt(squares), float((total / len(values)).square().sum())
    scatter = max(0.0, (sum(squares) - count * mean_square) / (count - 1))
    signal = max(0.0, mean_square - scatter / count)
    return {
        "expected loss": float(np.mean(values)),
        "95% ±": float(H.half_width(values)),
        "gradient norm": float(norms.mean()),
        "variance of the norm": float(norms.var(ddof=1)),
        "noise / signal": scatter / signal if signal else float("inf"),
    }


def schedule_noise(times: np.ndarray, second: np.ndarray, power: float) -> float:
    """E|g|^2 of Eq. 3 with t = u^power, u uniform, from the second moments [T] of the gradient at ascending times [T].

    The density of t is q(t) = t^(1/power - 1) / power, the weight 1 / q, and E|g|^2 the integral of second(t) / q(t). Below the
    first time second(t) is taken to go on as 1 / t, as it must where single characters are masked: a window of n has one with
    probability t n, and its gradient then has the weight 1 / (t n). Hence infinite for power <= 1.

    >>> t = np.geomspace(0.01, 1, 200)
    >>> [round(schedule_noise(t, 1 / t, power), 2) for power in (1.0, 1.5, 2.0, 3.0)]  # power^2 / (power - 1)
    [inf, 4.5, 4.0, 4.5]
    """
    if power <= 1:
        return float("inf")
    tail = power**2 / (power - 1) * second[0] * times[0] ** (2 - 1 / power)
    return float(tail + np.trapezoid(power * second * times ** (2 - 1 / power), np.log(times)))  # dt = t d(log t)


def least_noise(times: np.ndarray, second: np.ndarray) -> float:
    """The smallest E|g|^2 that any density of t can reach, (integral of sqrt(second))^2, where it is in proportion to the root.

    >>> t = np.geomspace(0.01, 1, 200)
    >>> round(least_noise(t, 1 / t), 2)  # as t = u^2, whose density is proportional to t^(-1/2)
    4.0
    """
    root = np.sqrt(second)
    return float((2 * times[0] * root[0] + np.trapezoid(root * times, np.log(times))) ** 2)


def relative_noise(times: np.ndarray, second: np.ndarray, powers: Sequence[float]) -> np.ndarray:
    """`schedule_noise` of each power over `least_noise`, so that 1 is as good as any density of t can be.

    >>> t = np.geomspace(0.01, 1, 200)
    >>> relative_noise(t, 1 / t, (1, 1.5, 2)).round(3).tolist()
    [inf, 1.125, 1.0]
    """
    return np.array([schedule_noise(times, second, power) for power in powers]) / least_noise(times, second)
