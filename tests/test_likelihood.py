"""Section 7: the bound and the exact likelihood against enumeration."""

import itertools
import math

import pytest
import torch
from oracle import MASK, PAD, START, ChiSquare, ExactAR, ExactPredictor, WrongPredictor, enumerated_nelbo, seeded, within

import llada_helpers as h
from beyond.likelihood import low_noise_nelbo, masked_nll

EXACT = ExactPredictor(length=3, symbols=3)
LONG = ExactPredictor(length=4, symbols=2, seed=2)
WRONG = WrongPredictor(EXACT.vocab_size)
WRONG_LONG = WrongPredictor(LONG.vocab_size, seed=4)
EVERYTHING = torch.ones(3, dtype=torch.bool)


BOUNDS = pytest.mark.parametrize("bound", [h.nelbo, low_noise_nelbo])


def estimates(predict, sequence, runs, n_samples=1, bound=h.nelbo, **options):
    """One row at a time, so that nothing is shared between the estimates."""
    options = {"n_samples": n_samples, **options}
    return torch.stack([bound(predict, sequence[None], MASK, generator=seeded(s), **options)[0] for s in range(runs)])


@pytest.mark.parametrize("n_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [0, 13])
def test_mean_is_exact_for_the_exact_predictor(k, n_samples):
    assert within(estimates(EXACT, EXACT.sequences[k], 500, n_samples), -float(EXACT.logp[k]))


@pytest.mark.parametrize("n_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [4, 22])
def test_mean_is_the_enumerated_value_for_a_wrong_predictor(k, n_samples):
    expected = enumerated_nelbo(WRONG, EXACT.sequences[k], EVERYTHING)
    assert within(estimates(WRONG, EXACT.sequences[k], 500, n_samples), expected)


def test_enumeration_of_the_exact_predictor_is_log_p():
    """The identity behind the tests above, with no sampling: for a true conditional the bound is tight."""
    for oracle in (EXACT, LONG):
        for k in range(0, len(oracle.sequences), 5):
            everything = torch.ones(oracle.length, dtype=torch.bool)
            assert enumerated_nelbo(oracle, oracle.sequences[k], everything) == pytest.approx(-float(oracle.logp[k]), abs=1e-4)


def test_every_row_of_a_batch_is_unbiased():
    """Rows share the strata; each must still be unbiased by itself, at any place in the batch."""
    rows = EXACT.sequences[[0, 4, 13, 22, 26]]
    runs = torch.stack([h.nelbo(WRONG, rows, MASK, n_samples=2, generator=seeded(s)) for s in range(800)])
    for i, row in enumerate(rows):
        assert within(runs[:, i], enumerated_nelbo(WRONG, row, EVERYTHING))


def test_unequal_numbers_of_tokens():
    """Padding is not maskable: each row's bound is that of its own tokens, [PAD] stays visible, no token left gives 0."""
    rows = torch.tensor([[4, 5, 6], [5, 6, PAD], [6, PAD, PAD], [PAD, PAD, PAD]])
    seen = []

    def predict(ids):
        seen.append(ids)
        return WRONG(ids)

    runs = torch.stack([h.nelbo(predict, rows, MASK, n_samples=2, maskable=rows != PAD, generator=seeded(s)) for s in range(800)])
    for i in range(3):
        assert within(runs[:, i], enumerated_nelbo(WRONG, rows[i], rows[i] != PAD))
    assert (runs[:, 3] == 0).all()
    assert all(((ids.view(-1, 4, 3) == PAD) == (rows == PAD)).all() for ids in seen)
    assert float(runs[:, 2].std()) < 1e-6, "one token: nothing is left to chance"


def test_padded_row_of_the_exact_predictor():
    row = torch.tensor([5, 4, PAD])
    expected = -float(EXACT.log_prob(row[None]))
    assert within(estimates(EXACT, row, 500, maskable=(row != PAD)[None]), expected)


@BOUNDS
def test_given_tokens_condition(bound):
    k, maskable = 7, torch.tensor([False, True, True])
    sequence = EXACT.sequences[k]
    expected = float(EXACT.log_prob(torch.tensor([[int(sequence[0]), MASK, MASK]])) - EXACT.logp[k])
    assert within(estimates(EXACT, sequence, 500, bound=bound, maskable=maskable[None]), expected)


@BOUNDS
def test_number_masked_is_uniform_and_exact(bound):
    """n_samples = n hits every l once; a single sample's l is uniform; the masked set is uniform given l."""
    sequence = LONG.sequences[3]
    seen = []

    def predict(ids):
        seen.append(ids == MASK)
        return LONG(ids)

    for s in range(40):
        seen.clear()
        bound(predict, sequence[None], MASK, n_samples=4, generator=seeded(s))
        assert sorted(torch.cat(seen).sum(dim=1).tolist()) == [1, 2, 3, 4]
    seen.clear()
    estimates(predict, sequence, 1200, bound=bound)
    sets = torch.cat(seen)
    counts = torch.bincount(sets.sum(dim=1), minlength=5)
    assert counts[0] == 0 and float((counts[1:] - 300).abs().max()) < 4.5 * math.sqrt(300 * 0.75)
    ones = sets[sets.sum(dim=1) == 1].sum(dim=0)
    assert float((ones - ones.sum() / 4).abs().max()) < 4.5 * math.sqrt(float(ones.sum()) * 3 / 16)


@BOUNDS
def test_number_masked_covers_a_batch_evenly(bound):
    """16 rows of 4 tokens, one sample: every l four times (give or take where the random shift cuts)."""
    seen = []

    def predict(ids):
        seen.append(ids == MASK)
        return LONG(ids)

    for s in range(20):
        seen.clear()
        bound(predict, LONG.sequences, MASK, n_samples=1, generator=seeded(s))
        counts = torch.bincount(torch.cat(seen).sum(dim=1), minlength=5)
        assert counts[1:].min() >= 3 and counts[1:].max() <= 5


def numbers_masked(rows, runs, n_samples=1, length=60):
    """LongTensor[runs, n_samples, rows], how many of so many tokens each mask of each row hides, from as many calls of nelbo."""
    seen, sequences = [], torch.full((rows, length), 4)

    def blank(ids):
        seen.append((ids == MASK).sum(dim=1))
        return torch.zeros(*ids.shape, 8)

    for s in range(runs):
        h.nelbo(blank, sequences, MASK, n_samples=n_samples, generator=seeded(s))
    return torch.cat(seen).view(runs, n_samples, rows)


@pytest.mark.parametrize("n_samples", [1, 2])
def test_a_rows_masks_do_not_depend_on_its_place(n_samples):
    """The n of each row is uniform; the rows share a stratum in every order alike, and its other strata in another order."""
    numbers = numbers_masked(3, 1500, n_samples)
    for row in range(3):
        for k in range(n_samples):
            tenths = (numbers[:, k, row] - 1) * n_samples // 6 - 10 * k
            assert ChiSquare.of(torch.bincount(tenths, minlength=10), torch.full((10,), 0.1)).fits
    order = (numbers.argsort(dim=-1) * torch.tensor([9, 3, 1])).sum(dim=-1)
    orders, found = order.unique(return_inverse=True)
    assert len(orders) == 6
    joint = (found * 6 ** torch.arange(n_samples)).sum(dim=1)
    assert ChiSquare.of(torch.bincount(joint, minlength=6**n_samples), torch.full((6**n_samples,), 6.0**-n_samples)).fits


def test_neighbours_are_not_tied():
    """The next row may have any of the other shares of the stratum, not always the one above."""
    numbers = numbers_masked(6, 1000)[:, 0]
    apart = ((numbers[:, 1:] - numbers[:, :-1]) % 60).flatten()
    assert set(apart.tolist()) <= {10, 20, 30, 40, 50}
    assert ChiSquare.of(torch.bincount(apart // 10, minlength=6)[1:], torch.full((5,), 0.2)).fits


@pytest.mark.parametrize("n_samples", [1, 3, 8])
def test_what_costs_the_same_everywhere_is_known_without_noise(n_samples):
    """All 8 tokens equally likely: n ln 8, whichever n tokens count."""
    maskable = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    values = h.nelbo(lambda ids: torch.zeros(*ids.shape, 8), torch.full((3, 5), 4), MASK, n_samples=n_samples, maskable=maskable)
    assert values.tolist() == pytest.approx([5 * math.log(8), 2 * math.log(8), 0], rel=1e-6)


def test_stratified_samples_have_less_noise_than_independent_ones():
    """Equal forward passes: n_samples = n in one call against n calls of one sample, of a predictor that is the surer the more it
    sees, as all that have learned something are."""
    sequence = LONG.sequences[6]

    def predict(ids):
        seen = (ids != MASK).double().mean(dim=1)[:, None, None]
        return WRONG_LONG(ids) / 4 + 4 * seen * torch.nn.functional.one_hot(sequence, LONG.vocab_size)

    stratified = estimates(predict, sequence, 300, n_samples=4).double()
    independent = estimates(predict, sequence, 1200).double().view(300, 4).mean(dim=1)
    assert float(stratified.var()) < 0.4 * float(independent.var())
    assert abs(float(stratified.mean() - independent.mean())) < 4 * math.sqrt(float(stratified.var() + independent.var()) / 300)
    assert within(stratified, enumerated_nelbo(predict, sequence, torch.ones(4, dtype=torch.bool)))


def test_shape_and_reproducibility():
    rows = EXACT.sequences
    a, b, c = (h.nelbo(WRONG, rows, MASK, n_samples=2, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (len(rows),) and a.dtype == torch.float32


def test_what_the_model_holds_impossible_costs_infinity_not_nan():
    """Only for the rows that contain it."""

    def predict(ids):
        logits = WRONG(ids).clone()
        logits[..., 6] = -math.inf
        return logits

    values = h.nelbo(predict, torch.tensor([[4, 5, 6], [4, 5, 4]]), MASK, n_samples=6, generator=seeded(0))
    assert values[0] == math.inf and values[1].isfinite()


def test_many_rows_are_passed_a_part_at_a_time():
    """At most 2^14 tokens a pass, and the numbers that each row has by itself."""
    rows, sizes = EXACT.sequences.repeat(450, 1), []
    mask = torch.rand(rows.shape, generator=seeded(0)) < 0.5

    def counted(ids):
        sizes.append(len(ids))
        return WRONG(ids)

    values = masked_nll(counted, rows, mask, MASK)
    logp = WRONG(rows.masked_fill(mask, MASK)).log_softmax(-1).gather(-1, rows[..., None])[..., 0]
    assert torch.allclose(values, -logp * mask, atol=1e-6)
    assert sum(sizes) == len(rows) > max(sizes) and 3 * max(sizes) <= 2**14
    sizes.clear()
    h.nelbo(counted, rows[:5], MASK, n_samples=2000)
    assert sum(sizes) == 10_000 and 3 * max(sizes) <= 2**14
    assert torch.allclose(h.ar_nll(ExactAR(EXACT), rows, START).double(), -EXACT.logp.repeat(450), atol=1e-5)


def test_a_row_longer_than_a_pass_is_a_pass():
    rows = torch.full((2, 2**14 + 1), 4)
    values = h.ar_nll(lambda ids: torch.zeros(*ids.shape, 8), rows, START)
    assert values.tolist() == pytest.approx([(2**14 + 1) * math.log(8)] * 2, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"n_samples": 0},
        {"n_samples": -1},
        {"n_samples": 1, "maskable": torch.ones(1, 2, dtype=torch.bool)},
        {"n_samples": 1, "maskable": torch.ones(1, 3)},
        {"n_samples": 1, "sequences": torch.tensor([4, 5, 6])},
    ],
)
def test_nelbo_errors(options):
    options = {"sequences": torch.tensor([[4, 5, 6]]), **options}
    with pytest.raises(ValueError, match="pass"):
        h.nelbo(WRONG, options.pop("sequences"), MASK, **options)


# --- exact, left to right ---


def test_ar_nll_is_exact():
    assert torch.allclose(h.ar_nll(ExactAR(EXACT), EXACT.sequences, START).double(), -EXACT.logp, atol=1e-5)


def test_ar_nll_does_not_count_padding():
    rows = torch.tensor([[4, 5, 6], [5, PAD, PAD], [PAD, PAD, PAD]])
    values = h.ar_nll(ExactAR(EXACT), rows, START)
    assert torch.allclose(values[:2].double(), -EXACT.log_prob(rows[:2]), atol=1e-5)
    assert values[2] == 0


def test_ar_nll_of_a_row_does_not_depend_on_its_padding():
    """Through our Transformer: the shorter row has the likelihood of its unpadded self."""
    torch.manual_seed(0)
    model = h.Transformer(h.ModelConfig(10, 6, 2, 2, 16, causal=True))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    rows = torch.tensor([[4, 5, 6, 7, 8, 9], [9, 8, 7, PAD, PAD, PAD]])
    alone = h.ar_nll(model, rows[1:, :3], START)
    assert float(h.ar_nll(model, rows, START)[1]) == pytest.approx(float(alone), abs=1e-4)
    with torch.no_grad():
        mean = float(h.next_token_loss(model.eval(), rows, START))
    assert float(h.ar_nll(model, rows, START).sum()) / 9 == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("counted", [[True, True, True], [False, True, True], [True, False, False], [False] * 3])
def test_ar_nll_of_some_tokens_is_given_all_before_them(counted):
    counted = torch.tensor(counted)
    values = h.ar_nll(ExactAR(EXACT), EXACT.sequences, START, counted=counted.expand(len(EXACT.sequences), -1))
    for sequence, value in zip(EXACT.sequences, values):
        known = [EXACT.log_prob(torch.cat((sequence[:k], torch.full((3 - k,), MASK)))[None]) for k in range(4)]
        expected = sum(float(known[k] - known[k + 1]) for k in range(3) if counted[k])
        assert float(value) == pytest.approx(expected, abs=1e-5)


def test_counted_must_fit():
    for counted in (torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3)):
        with pytest.raises(ValueError, match="pass BoolTensor"):
            h.ar_nll(ExactAR(EXACT), EXACT.sequences[:1], START, counted=counted)


# --- masks ---


def test_masked_nll_is_that_of_the_masked_tokens_alone():
    rows = EXACT.sequences[[3, 20]]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = masked_nll(WRONG, rows, mask, MASK)
    logp = WRONG(rows.masked_fill(mask, MASK)).log_softmax(-1).gather(-1, rows[..., None])[..., 0]
    assert torch.allclose(values, -logp * mask, atol=1e-6) and (values[~mask] == 0).all()
    with pytest.raises(ValueError, match="pass BoolTensor"):
        masked_nll(WRONG, rows, mask[:, :2], MASK)


def test_exact_masks_have_exactly_so_many_and_stay_inside():
    maskable = torch.tensor([[True, True, False, True, True], [False, True, True, False, False]])
    count = torch.tensor([[0, 1], [4, 2], [3, 0]])
    masks = h.exact_masks(count, maskable, seeded(0))
    assert (masks.sum(dim=-1) == count).all() and not (masks & ~maskable).any()


def test_exact_masks_are_uniform_and_independent():
    """Every pair of four tokens alike, and whatever pair the next row has."""
    masks = h.exact_masks(torch.full((5000, 2), 2), torch.tensor([[True, True, False, True, True]]).expand(2, -1), seeded(0))
    pairs = torch.tensor([[i in pair for i in range(5)] for pair in itertools.combinations((0, 1, 3, 4), 2)])
    which = (masks[:, :, None] == pairs).all(dim=-1).long()
    assert (which.sum(dim=-1) == 1).all()
    joint = (which.argmax(dim=-1) * torch.tensor([6, 1])).sum(dim=1)
    assert ChiSquare.of(torch.bincount(joint, minlength=36), torch.full((36,), 1 / 36)).fits
