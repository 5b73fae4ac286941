"""Where to draw t: a study of polynomial masking schedules, and the noise of the gradient that explains its outcome.

With t drawn from a density q and the weight divided by q, the loss is Eq. 3 in expectation whatever q is, and the second moment
of a window's gradient is the integral of m(t) / q(t), m being that of Eq. 3's integrand. It is smallest where q is proportional
to sqrt(m). A window at time t shows t n masked tokens, each weighted by 1 / (t n): if tokens were alike and independent, m would
be proportional to 1 / t, hence q to t^(-1/2), which is t = u^2. Tokens are easier at small t, so the best power is below 2.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import llada_helpers as H
from beyond.anatomy import gradient
from beyond.losses import polynomial

POWERS = (1, 1.25, 1.5, 1.75, 2)
_LITTLE = (H.TrainConfig(40, 16, evals=1), H.TrainConfig(767, 32, evals=4, eval_windows=512))
SIZES = {  # the notebook's short form, and a third of the preset's own training
    "smoke": (H.TrainConfig(5, 16, evals=1, eval_windows=32), H.TrainConfig(10, 16, evals=1, eval_windows=32)),
    "cpu": _LITTLE,
    "cpu_long": _LITTLE,
    "gpu": (H.TrainConfig(20, 16, evals=1), H.TrainConfig(2000, 64, evals=4, eval_windows=512, adamw_lr=2e-3)),
}


def schedule_jobs(
    preset: H.Preset,
    config: H.TrainConfig,
    vocab_size: int,
    train_ids: Tensor,
    val_ids: Tensor,
    powers: Sequence[float] = POWERS,
    seeds: int = 3,
) -> dict[str, list[H.Job]]:
    """LLaDA trained with t = u^p: Eq. 3 for every p, with other noise. All rows share windows, uniform numbers and first weights.

    The row of `H.POWER` is trained with the loss as it is, so that with `preset.llada` it is the preset's own training.

    >>> ids = torch.arange(4, 30)
    >>> jobs = schedule_jobs(H.PRESETS["smoke"], SIZES["smoke"][0], 30, ids, ids)
    >>> list(jobs)[::2], [job.train.seed for job in jobs["t = u^2"]]
    (['t = u^1', 't = u^1.5', 't = u^2'], [0, 1, 2])
    """
    shape = preset.model(vocab_size, causal=False)
    configs = [replace(config, seed=seed) for seed in range(seeds)]
    batches = {p: None if p == H.POWER else polynomial(p) for p in powers}
    return {f"t = u^{p}": [H.Job(shape, c, train_ids, val_ids, batches[p]) for c in configs] for p in powers}


def gradient_moment(
    model: nn.Module,
    ids: Tensor,
    seq_len: int,
    times: Sequence[float],
    batches: int,
    generator: torch.Generator | None = None,
) -> pd.DataFrame:
    """E ||g||^2 by t: g is the gradient of Eq. 3's integrand, weight 1 / (t n), for one window masked at time t.

    Args:
        model: a mask predictor with parameters, in evaluation mode.
        ids: a text, LongTensor[n], cut into windows of `seq_len`.
        times: in (0, 1].
        batches: of one window each, at least 2; every t has the same ones.

    Returns:
        a row for each t: "t", "second moment" (nats^2 per squared unit of the parameters), "second moment ±" (Student's t, 95%).

    Raises:
        ValueError: fewer than two batches.

    >>> model, ids = nn.Embedding(8, 8, _weight=torch.eye(8)), torch.arange(4, 8).repeat(10)  # logits by token alone
    >>> table = gradient_moment(model, ids, 8, (0.25, 1.0), 400, torch.Generator().manual_seed(0))
    >>> list(table), bool(table["second moment"][0] > 2 * table["second moment"][1])
    (['t', 'second moment', 'second moment ±'], True)
    """
    if batches < 2:
        raise ValueError(f"batches={batches}: pass at least 2, for the interval")
    windows, rows = H.windows(ids, seq_len), []
    chosen = windows[torch.randint(len(windows), (batches,), generator=generator)].split(1)
    for t in times:
        gradients = (gradient(model, H.diffusion_batch(window, generator, t=t))[1] for window in chosen)
        squares = [float(g.square().sum()) for g in gradients]
        rows.append({"t": t, "second moment": np.mean(squares), "second moment ±": H.half_width(squares)})
    return pd.DataFrame(rows)


def implied_power(table: pd.DataFrame) -> float:
    """The p whose density of t = u^p, (1/p) t^(1/p - 1), is nearest to proportional to sqrt(second moment).

    Least squares between the logarithms, over the rows of `gradient_moment`'s table; the factor of proportion is free.

    Raises:
        ValueError: fewer than two times, or moments that fall as fast as t^-2, which no power fits.

    >>> round(implied_power(pd.DataFrame({"t": [0.1, 0.4, 1.0], "second moment": [10.0, 2.5, 1.0]})), 6)  # 1 / t
    2.0
    """
    if table["t"].nunique() < 2:
        raise ValueError(f"{table['t'].nunique()} times: pass a table of two or more")
    slope = np.polyfit(np.log(table["t"]), np.log(table["second moment"]) / 2, 1)[0]
    if not slope > -1:
        raise ValueError(f"sqrt(second moment) falls as t^{slope:.2f}, no power fits; pass times farther from 0")
    return float(1 / (1 + slope))
