"""Section 4: Eq. 3 and Eq. 5 against enumeration, the AR loss against the entropy."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracle import (
    END,
    MASK,
    PAD,
    START,
    ExactAR,
    ExactPredictor,
    WrongPredictor,
    enumerated_bernoulli_loss,
    enumerated_nelbo,
    seeded,
    within,
)

import llada_helpers as h

assert (h.PAD_ID, h.MASK_ID, h.START_ID, h.END_ID) == (PAD, MASK, START, END)
EXACT = ExactPredictor(length=3, symbols=3)
WRONG = WrongPredictor(EXACT.vocab_size)
EVERYTHING = torch.ones(3, dtype=torch.bool)


def draw(n, seed):
    """Sequences [n, L] from the oracle's distribution."""
    return EXACT.sequences[torch.multinomial(EXACT.logp.exp(), n, replacement=True, generator=seeded(seed))]


def test_oracle_is_exact():
    """Who watches the watchmen: the chain rule over two orders gives back the joint."""
    for order in ((0, 1, 2), (2, 0, 1)):
        total = torch.zeros(len(EXACT.sequences))
        ids = torch.full_like(EXACT.sequences, MASK)
        for i in order:
            total += EXACT(ids)[torch.arange(len(ids)), i, EXACT.sequences[:, i]]
            ids[:, i] = EXACT.sequences[:, i]
        assert torch.allclose(total.double(), EXACT.logp, atol=1e-5)


def test_expected_loss_of_the_exact_predictor_is_the_entropy_per_token():
    losses = [float(h.llada_loss(EXACT, draw(64, seed), MASK, generator=seeded(seed + 10_000))) for seed in range(1000)]
    assert within(losses, EXACT.entropy / 3)


def test_no_time_weight_would_not_give_the_entropy():
    """The test above has the power to fail: without 1/t the same average misses the entropy by far."""
    values = []
    for seed in range(300):
        inputs, targets, weight = h.diffusion_batch(draw(64, seed), seeded(seed))
        values.append(float(h.weighted_nll(EXACT, inputs, targets, (weight > 0) / 3.0)))
    assert not within(values, EXACT.entropy / 3, errors=8)


@pytest.mark.parametrize("t", [0.1, 0.35, 0.8, 1.0])
@pytest.mark.parametrize("predict", [EXACT, WRONG], ids=["exact", "wrong"])
def test_loss_at_a_fixed_time_equals_enumeration(predict, t):
    sequence = EXACT.sequences[11]
    rows = sequence.expand(400, -1)
    losses = [float(h.llada_loss(predict, rows, MASK, t=t, generator=seeded(seed))) for seed in range(40)]
    expected = enumerated_bernoulli_loss(predict, sequence, EVERYTHING, t)
    assert within(losses, expected)
    if t == 1:
        assert losses[0] == pytest.approx(expected, abs=1e-5), "all masked: nothing is left to chance"


@pytest.mark.parametrize("predict", [EXACT, WRONG], ids=["exact", "wrong"])
def test_integral_over_time_is_the_bound(predict):
    """No sampling at all: Simpson's rule over t of the enumerated Eq. 3, times n, is the enumerated NELBO."""
    sequence, n = EXACT.sequences[5], 3
    grid = [1e-9 + (1 - 1e-9) * i / 20 for i in range(21)]
    values = [n * enumerated_bernoulli_loss(predict, sequence, EVERYTHING, t) for t in grid]
    integral = sum(v * (1 if i in (0, 20) else 4 if i % 2 else 2) for i, v in enumerate(values)) / 60
    assert integral == pytest.approx(enumerated_nelbo(predict, sequence, EVERYTHING), rel=1e-5)


@pytest.mark.parametrize("power", [1.0, h.POWER, 3.0])
@pytest.mark.parametrize("maskable", [[True, True, True], [False, True, True], [True, False, False]], ids=str)
@pytest.mark.parametrize("predict", [EXACT, WRONG], ids=["exact", "wrong"])
def test_expectation_under_the_default_times_is_the_bound(monkeypatch, predict, maskable, power):
    """No sampling at all: the batch's own times and weights, on a grid of u (Gauss-Legendre in its root), under every mask.

    Masks of k of n tokens at time t have probability t^k (1 - t)^(n - k); the expected loss must be the NELBO per token.
    """
    sequence, maskable = EXACT.sequences[11], torch.tensor(maskable)
    nodes, measure = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(12))
    root, du = (1 + nodes) / 2, measure / 2 * (1 + nodes)  # u = root^2, du = 2 root d(root)
    rows, where, times = sequence.expand(len(root), -1), maskable.nonzero()[:, 0].tolist(), []
    monkeypatch.setattr(h, "POWER", power)
    monkeypatch.setattr(h, "stratified_times", lambda size, generator: root.square().float())
    expected = 0.0
    for subset in (c for size in range(1, len(where) + 1) for c in itertools.combinations(where, size)):
        mask = torch.zeros_like(rows, dtype=torch.bool)
        mask[:, list(subset)] = True

        def masked_there(sequences, t, mask_id, free, generator, mask=mask):
            assert torch.equal(free, maskable.expand_as(mask))
            times.append(t.double())
            return sequences.masked_fill(mask, mask_id), mask

        monkeypatch.setattr(h, "forward_process", masked_there)
        inputs, targets, weight = h.diffusion_batch(rows, maskable=maskable.expand(len(rows), -1))
        nll = -predict(inputs).double().log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]
        loss = (weight * nll.where(weight > 0, 0)).sum(dim=1)
        k, t = len(subset), times[-1]
        expected += float((du * t**k * (1 - t) ** (len(where) - k) * loss).sum())
    assert torch.allclose(times[0], root.square() ** power, atol=1e-6)
    assert expected == pytest.approx(enumerated_nelbo(predict, sequence, maskable) / len(where), rel=1e-5)


def test_default_power_draws_small_times_more_often():
    """Not by accident that of the test above: t = u^POWER, and its density in the weight."""
    rows = torch.full((8, 4000), 4)
    inputs, _, weight = h.diffusion_batch(rows, seeded(0))
    u = h.stratified_times(8, seeded(0)).double()
    assert torch.allclose((inputs == MASK).double().mean(dim=1), u**h.POWER, atol=0.04)
    assert torch.allclose(weight.double().amax(dim=1) * 4000, h.POWER / u, rtol=1e-4) and h.POWER > 1


def test_the_smallest_number_of_a_batch_gives_no_time_zero(monkeypatch):
    monkeypatch.setattr(h, "stratified_times", lambda size, _: torch.full((size,), 2.0**-24 / 512))
    assert float(h.llada_loss(WRONG, EXACT.sequences, MASK, generator=seeded(0))) >= 0
    assert all(x.isfinite().all() for x in h.diffusion_batch(torch.full((512, 50), 4), seeded(0)))


def test_expected_loss_of_a_wrong_predictor_is_its_bound_per_token():
    sequence = EXACT.sequences[5]
    losses = [float(h.llada_loss(WRONG, sequence.expand(200, -1), MASK, generator=seeded(s))) for s in range(400)]
    assert within(losses, enumerated_nelbo(WRONG, sequence, EVERYTHING) / 3)


def test_prompt_that_is_not_maskable_gives_the_conditional():
    """Eq. 5: -log p(x_2, x_3 | x_1) per response token, with the prompt visible in every input."""
    sequence = EXACT.sequences[7]
    maskable = torch.tensor([False, True, True])
    seen = []

    def predict(ids):
        seen.append(ids)
        return EXACT(ids)

    rows, where = sequence.expand(200, -1), maskable.expand(200, -1)
    losses = [float(h.llada_loss(predict, rows, MASK, maskable=where, generator=seeded(s))) for s in range(400)]
    prompt = torch.tensor([[int(sequence[0]), MASK, MASK]])
    conditional = float(EXACT.log_prob(sequence[None]) - EXACT.log_prob(prompt))
    assert within(losses, -conditional / 2)
    assert all((ids[:, 0] == sequence[0]).all() for ids in seen)


def test_each_row_counts_alike_whatever_its_number_of_maskable_tokens():
    """Mean over rows of per-token means, not a mean over all tokens."""
    rows = EXACT.sequences[[3, 20]]
    maskable = torch.tensor([[True, False, False], [True, True, True]])
    together = float(h.llada_loss(WRONG, rows, MASK, t=1.0, maskable=maskable))
    apart = [float(h.llada_loss(WRONG, rows[i : i + 1], MASK, t=1.0, maskable=maskable[i : i + 1])) for i in (0, 1)]
    assert together == pytest.approx(sum(apart) / 2, abs=1e-5)


def test_explicit_time_per_row():
    rows = EXACT.sequences[[3, 20]].repeat(2000, 1)
    t = torch.tensor([0.2, 0.9]).repeat(2000)
    expected = [enumerated_bernoulli_loss(WRONG, rows[i], EVERYTHING, float(t[i])) for i in (0, 1)]
    losses = [float(h.llada_loss(WRONG, rows, MASK, t=t, generator=seeded(s))) for s in range(30)]
    assert within(losses, sum(expected) / 2)


@pytest.mark.parametrize("t", [0.0, -0.5, 1.5, math.nan])
def test_time_zero_cannot_be_weighted(t):
    with pytest.raises(ValueError, match=r"\bt\b"):
        h.llada_loss(WRONG, EXACT.sequences[:2], MASK, t=t)


def test_default_batches_do_not_count_padding():
    sequences = torch.tensor([[4, 5, 6], [5, PAD, PAD]])
    for seed in range(20):
        inputs, targets, weight = h.diffusion_batch(sequences, seeded(seed))
        assert (inputs[1, 1:] == PAD).all() and (weight[1, 1:] == 0).all()
        assert torch.equal(targets, sequences)
    _, _, weight = h.diffusion_batch(sequences, t=1.0)
    assert weight.sum(dim=1).tolist() == pytest.approx([1, 1]), "1 / (t n) with n the tokens that are not padding"


@pytest.mark.parametrize("time", [None, 1e-6, 1.0])
def test_gradients_are_finite(time):
    """Also when no token at all is masked, and when a row has nothing to mask."""
    model = h.Transformer(h.ModelConfig(7, 4, 1, 1, 8))
    torch.nn.init.normal_(model.head.weight)
    sequences = torch.tensor([[4, 5, 6, 4], [5, 5, PAD, PAD], [PAD] * 4])
    loss = h.llada_loss(model, sequences, MASK, t=time, maskable=sequences != PAD, generator=seeded(0))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_infinity_where_nothing_is_counted_does_no_harm():
    """A predictor may say anything about visible tokens; 0 * inf would be NaN."""

    def predict(ids):
        return WRONG(ids).masked_fill((ids != MASK)[:, :, None], -math.inf)

    weight = torch.tensor([[0.0, 1.0, 0.0]])
    inputs = torch.tensor([[4, MASK, 5]])
    targets = torch.tensor([[4, 6, 5]])
    expected = -float(WRONG(inputs)[0, 1].log_softmax(-1)[6])
    assert float(h.weighted_nll(predict, inputs, targets, weight)) == pytest.approx(expected, abs=1e-6)
    assert math.isfinite(h.llada_loss(predict, EXACT.sequences, MASK, generator=seeded(1)))


def test_weighted_nll_by_hand():
    weight = torch.tensor([[0.5, 2.0, 0.0], [0.0, 0.0, 3.0]])
    inputs = torch.tensor([[MASK, MASK, 5], [4, 5, MASK]])
    targets = torch.tensor([[4, 6, 5], [4, 5, 6]])
    logp = WRONG(inputs).log_softmax(-1)
    expected = -(0.5 * logp[0, 0, 4] + 2 * logp[0, 1, 6] + 3 * logp[1, 2, 6]) / 2
    assert float(h.weighted_nll(WRONG, inputs, targets, weight)) == pytest.approx(float(expected), abs=1e-6)


def test_next_token_loss_of_the_exact_ar_is_the_entropy_per_token():
    """Exactly: each sequence's loss is its -log p / L, and those average to the entropy."""
    losses = torch.tensor([float(h.next_token_loss(ExactAR(EXACT), s[None], START)) for s in EXACT.sequences]).double()
    assert torch.allclose(losses, -EXACT.logp / 3, atol=1e-5)
    assert float((EXACT.logp.exp() * losses).sum()) == pytest.approx(EXACT.entropy / 3, abs=1e-5)


def test_next_token_loss_does_not_count_padding():
    """The mean is over tokens: 3 + 1 of them here."""
    rows = torch.tensor([[4, 5, 6], [5, PAD, PAD]])
    ar = ExactAR(EXACT)
    nll = -float(EXACT.log_prob(rows[:1])) - float(EXACT.log_prob(torch.tensor([[5, MASK, MASK]])))
    assert float(h.next_token_loss(ar, rows, START)) == pytest.approx(nll / 4, abs=1e-5)
    moved = torch.where(rows == PAD, 6, rows)
    assert float(h.next_token_loss(ar, moved, START, pad_id=99)) != pytest.approx(nll / 4, abs=1e-3)


def test_next_token_inputs_are_shifted_by_one():
    inputs, targets, weight = h.next_token_batch(torch.tensor([[4, 5, 6], [6, 6, PAD]]))
    assert inputs.tolist() == [[START, 4, 5], [START, 6, 6]]
    assert targets.tolist() == [[4, 5, 6], [6, 6, PAD]]
    assert (weight > 0).tolist() == [[True] * 3, [True, True, False]]


def test_loss_is_reproducible_and_takes_the_callers_mask_id():
    a, b = (float(h.llada_loss(WRONG, EXACT.sequences, MASK, generator=seeded(3))) for _ in range(2))
    assert a == b
    seen = []

    def predict(ids):
        seen.append(ids)
        return torch.zeros(*ids.shape, 7)

    h.llada_loss(predict, EXACT.sequences, 6, t=1.0)
    assert (seen[0] == 6).all()
