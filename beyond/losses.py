"""Losses to compare with the project's own (`llada_helpers.diffusion_batch`): forms of Eq. 3, and two that are no bound.

Each is a batch function as `Job.make_batch` takes it: (sequences LongTensor[B, L], generator, learned BoolTensor[B, L]) ->
(inputs LongTensor[B, L], targets LongTensor[B, L], weights FloatTensor[B, L]), for `llada_helpers.weighted_nll`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import llada_helpers as H


def masked_mean(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The MDLM tutorial's loss: the mean cross-entropy over all masked tokens of the batch, whatever t. Not a bound.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> _, _, weight = masked_mean(ids, torch.Generator().manual_seed(0), learned)
    >>> len(weight[weight > 0].unique()), round(float(weight.sum()), 3)  # the same for all; a mean over rows divides by 4
    (1, 4.0)
    """
    t = 1 - torch.rand(len(sequences), generator=generator)
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask * (len(mask) / mask.sum().clamp(min=1))


def masked_mean_over_t(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exercise's sketch: each row's mean over its masked tokens, divided by t.

    A window then weighs 1 / t whenever anything is masked: 1 + 1/2 + ... + 1/n on average, with infinite variance.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> _, _, weight = masked_mean_over_t(ids, torch.Generator().manual_seed(0), learned)
    >>> [round(float(w), 1) for w in weight.sum(dim=1)]  # 1 / t, whatever the number of masks
    [1.1, 1.6, 2.7, 7.9]
    """
    t = H.stratified_times(len(sequences), generator)
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask / (t[:, None] * mask.sum(dim=1, keepdim=True).clamp(min=1))


def uniform_times(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 as it is written: t uniform, here stratified over the batch.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> inputs, _, _ = uniform_times(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == H.MASK_ID).sum(dim=1).tolist()  # one row from each quarter of the masking rates
    [45, 28, 22, 9]
    """
    return H.diffusion_batch(sequences, generator, learned, t=H.stratified_times(len(sequences), generator))


def independent_times(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 with one independent t per row.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> inputs, _, _ = independent_times(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == H.MASK_ID).sum(dim=1).tolist()  # masks in each row
    [27, 14, 47, 46]
    """
    return H.diffusion_batch(sequences, generator, learned, t=1 - torch.rand(len(sequences), generator=generator))


def one_time_per_batch(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 with one t for the whole batch (tutorial A).

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> inputs, _, _ = one_time_per_batch(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == H.MASK_ID).sum(dim=1).tolist()  # about as many masks in each row
    [29, 20, 30, 29]
    """
    return H.diffusion_batch(sequences, generator, learned, t=float(1 - torch.rand(1, generator=generator)))


def importance_times(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 with t from the density 1/2 + t, more often where more is masked, and the weight divided by that density.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> inputs, _, _ = importance_times(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == H.MASK_ID).sum(dim=1).tolist()  # stratified, and more than half are masked on average
    [46, 35, 30, 12]
    """
    u = H.stratified_times(len(sequences), generator)
    t = 2 * u / ((0.25 + 2 * u).sqrt() + 0.5)  # not sqrt - 0.5, which rounds to 0 for small u
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=t)
    return inputs, targets, weight / (0.5 + t[:, None])


def complementary_masks(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 with half as many windows, each under a mask and under its complement, at t and 1 - t.

    >>> ids, learned = torch.full((2, 6), 5), torch.ones(2, 6, dtype=torch.bool)
    >>> inputs, _, _ = complementary_masks(ids, torch.Generator().manual_seed(0), learned)
    >>> inputs.tolist()
    [[5, 1, 1, 1, 5, 1], [1, 5, 5, 5, 1, 5]]
    """
    half = sequences[: -(-len(sequences) // 2)]
    t = H.stratified_times(len(half), generator).clamp(1e-3, 1 - 1e-3)
    t = t[torch.randperm(len(half), generator=generator)]  # the row without a partner has any of them
    learned = learned[: len(half)]
    masked, mask = H.forward_process(half, t, H.MASK_ID, learned, generator)
    inputs = torch.cat((masked, half.masked_fill(learned & ~mask, H.MASK_ID)))
    weight = torch.cat((mask / t[:, None], (learned & ~mask) / (1 - t[:, None])))
    count = learned.sum(dim=1, keepdim=True).clamp(min=1).repeat(2, 1)
    keep = len(sequences)
    return inputs[:keep], half.repeat(2, 1)[:keep], (weight / count)[:keep]


def polynomial(power: float) -> Callable[[Tensor, torch.Generator, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Eq. 3 with t = u^power, u uniform and stratified, and the weight times dt/du: the same expectation for every power.

    A polynomial masking schedule (MD4, Shi et al. 2024, arXiv:2406.04329): masked with probability u^p, weight p / u. A larger
    power draws small t more often. The function is named after its power, since fingerprints of trainings hold the name.

    Raises:
        ValueError: the power is not positive.

    >>> ids, learned = torch.full((4, 500), 5), torch.ones(4, 500, dtype=torch.bool)
    >>> inputs, _, weight = polynomial(2)(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == H.MASK_ID).sum(dim=1).tolist(), polynomial(2).__name__
    ([384, 193, 78, 6], 'polynomial_2')
    >>> [round(2 / (500 * float(row.max())), 2) for row in weight]  # u, one in each quarter
    [0.88, 0.63, 0.38, 0.13]
    """
    if not power > 0:
        raise ValueError(f"power={power}: pass a positive one, 1 for uniform t")

    def batch(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = H.stratified_times(len(sequences), generator)
        inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=u**power)
        return inputs, targets, weight * (power * u ** (power - 1))[:, None]

    batch.__name__ = batch.__qualname__ = f"polynomial_{power}"
    return batch


def switched(
    first: Callable, then: Callable, step: int
) -> Callable[[Tensor, torch.Generator, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The batches of `first` before this step of a training, those of `then` from it on.

    The step is read off the generator, which `llada_helpers.training_batch` seeds with (seed, step).

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> batch = switched(masked_mean, uniform_times, 100)
    >>> [len(batch(ids, torch.Generator().manual_seed(step), learned)[2].unique()) - 1 for step in (99, 100)]  # kinds of weights
    [1, 4]
    """

    def batch(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = first if generator.initial_seed() % 1_000_003 < step else then
        return chosen(sequences, generator, learned)

    batch.__name__ = batch.__qualname__ = f"{first.__name__}_until_{step}_then_{then.__name__}"
    return batch
