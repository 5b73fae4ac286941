"""Section 2: the forward process masks each token with probability t, and the times are stratified."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import seeded

import llada_helpers as h

MASK = h.MASK_ID


def ids_of(*shape):
    return torch.randint(4, 10, shape, generator=seeded(123))


@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.9])
def test_masked_fraction_is_t(t):
    """Overall within 4.5 binomial standard errors; so is each column, so no position is favoured."""
    sequences = ids_of(2000, 20)
    masked, mask = h.forward_process(sequences, t, MASK, generator=seeded(1))
    error = math.sqrt(t * (1 - t) / mask.numel())
    assert abs(float(mask.float().mean()) - t) < 4.5 * error
    assert float((mask.float().mean(dim=0) - t).abs().max()) < 4.5 * error * math.sqrt(20)
    assert ((masked == MASK) == mask).all()


def test_tokens_are_masked_independently():
    """The number masked per row has binomial variance n t (1 - t); a fixed count would have none."""
    t, n = 0.4, 30
    _, mask = h.forward_process(ids_of(4000, n), t, MASK, generator=seeded(2))
    counts = mask.sum(dim=1).double()
    assert float(counts.var()) == pytest.approx(n * t * (1 - t), rel=0.1)


def test_ends_of_time():
    sequences = ids_of(50, 40)
    masked, mask = h.forward_process(sequences, 0.0, MASK)
    assert not mask.any() and torch.equal(masked, sequences)
    masked, mask = h.forward_process(sequences, 1.0, MASK)
    assert mask.all() and (masked == MASK).all()


def test_time_per_row():
    t = torch.tensor([0.0, 1.0, 0.25, 0.75])
    _, mask = h.forward_process(ids_of(4, 4000), t, MASK, generator=seeded(3))
    fraction = mask.float().mean(dim=1)
    assert fraction[0] == 0 and fraction[1] == 1
    assert float((fraction - t).abs().max()) < 4.5 * math.sqrt(0.1875 / 4000)


@given(st.floats(0, 1), st.integers(0, 1000))
def test_only_maskable_tokens_change(t, seed):
    sequences = ids_of(3, 8)
    before = sequences.clone()
    maskable = torch.rand(3, 8, generator=seeded(seed)) < 0.5
    masked, mask = h.forward_process(sequences, t, MASK, maskable, seeded(seed))
    assert masked.dtype == torch.long and mask.dtype == torch.bool
    assert not (mask & ~maskable).any()
    assert torch.equal(masked[~mask], sequences[~mask]) and (masked[mask] == MASK).all()
    assert torch.equal(sequences, before), "the input is left alone"


def test_mask_id_is_the_callers():
    masked, _ = h.forward_process(ids_of(2, 5), 1.0, 77)
    assert (masked == 77).all()


def test_same_generator_state_same_masks():
    sequences = ids_of(4, 30)
    first, _ = h.forward_process(sequences, 0.5, MASK, generator=seeded(5))
    second, _ = h.forward_process(sequences, 0.5, MASK, generator=seeded(5))
    third, _ = h.forward_process(sequences, 0.5, MASK, generator=seeded(6))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("t", [-0.1, 1.0001, math.nan, torch.tensor([0.5, 1.5]), torch.tensor([0.5] * 3), torch.ones(2, 1)])
def test_bad_times(t):
    with pytest.raises(ValueError, match=r"\bt\b"):
        h.forward_process(ids_of(2, 4), t, MASK)


@pytest.mark.parametrize("maskable", [torch.ones(2, 5, dtype=torch.bool), torch.ones(4, dtype=torch.bool), torch.ones(2, 4)])
def test_bad_maskable(maskable):
    with pytest.raises(ValueError, match="maskable"):
        h.forward_process(ids_of(2, 4), 0.5, MASK, maskable)


def test_sequences_must_be_a_batch():
    with pytest.raises(ValueError, match="sequences"):
        h.forward_process(ids_of(4), 0.5, MASK)


@given(st.integers(1, 64), st.integers(0, 10_000))
def test_times_hit_each_stratum_once(batch_size, seed):
    t = h.stratified_times(batch_size, seeded(seed)).double()
    assert t.shape == (batch_size,) and bool((t > 0).all()) and bool((t <= 1).all())
    position = t.sort().values * batch_size - torch.arange(batch_size)
    assert bool((position > -1e-4).all()) and bool((position < 1 + 1e-4).all())


def test_each_time_is_uniform():
    """Any one row's time, over many batches, has mean 1/2 and variance 1/12 within its stratum's width."""
    t = torch.stack([h.stratified_times(1, seeded(seed)) for seed in range(2000)]).double()
    assert abs(float(t.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 2000)
    assert float(t.var()) == pytest.approx(1 / 12, rel=0.1)


@pytest.mark.parametrize("batch_size", [1, 8, 64, 128, 512])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_no_time_is_zero_even_at_the_ends_of_the_generator(monkeypatch, batch_size, number):
    """The largest float32 below 1 is drawn now and then in a long training; t = 0 would divide by zero."""
    monkeypatch.setattr(h.torch, "rand", lambda *shape, **_: torch.full((1,), number))
    t = h.stratified_times(batch_size)
    assert bool((t > 0).all()) and bool((t <= 1).all())
