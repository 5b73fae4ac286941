"""Section 7: the bound and the exact likelihood against enumeration."""

import itertools
import math

import pytest
import torch
from oracle import MASK, PAD, START, ExactAR, ExactPredictor, WrongPredictor, enumerated_nelbo, within

import llada_helpers as h

EXACT = ExactPredictor(length=3, symbols=3)
LONG = ExactPredictor(length=4, symbols=2, seed=2)
WRONG = WrongPredictor(EXACT.vocab_size)
WRONG_LONG = WrongPredictor(LONG.vocab_size, seed=4)
EVERYTHING = torch.ones(3, dtype=torch.bool)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def estimates(predict, sequence, runs, n_samples=1, **options):
    """One row at a time, so that nothing is shared between the estimates."""
    return torch.stack(
        [h.nelbo(predict, sequence[None], MASK, n_samples=n_samples, generator=seeded(s), **options)[0] for s in range(runs)]
    )


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
    """Rows share one random shift; each must still be unbiased by itself, at any place in the batch."""
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


def test_given_tokens_condition():
    k, maskable = 7, torch.tensor([False, True, True])
    sequence = EXACT.sequences[k]
    expected = float(EXACT.log_prob(torch.tensor([[int(sequence[0]), MASK, MASK]])) - EXACT.logp[k])
    assert within(estimates(EXACT, sequence, 500, maskable=maskable[None]), expected)


def test_number_masked_is_uniform_and_exact():
    """n_samples = n hits every l once; a single sample's l is uniform; the masked set is uniform given l."""
    sequence = LONG.sequences[3]
    seen = []

    def predict(ids):
        seen.append(ids == MASK)
        return LONG(ids)

    for s in range(40):
        seen.clear()
        h.nelbo(predict, sequence[None], MASK, n_samples=4, generator=seeded(s))
        assert sorted(torch.cat(seen).sum(dim=1).tolist()) == [1, 2, 3, 4]
    seen.clear()
    estimates(predict, sequence, 1200)
    sets = torch.cat(seen)
    counts = torch.bincount(sets.sum(dim=1), minlength=5)
    assert counts[0] == 0 and float((counts[1:] - 300).abs().max()) < 4.5 * math.sqrt(300 * 0.75)
    ones = sets[sets.sum(dim=1) == 1].sum(dim=0)
    assert float((ones - ones.sum() / 4).abs().max()) < 4.5 * math.sqrt(float(ones.sum()) * 3 / 16)


def test_number_masked_covers_a_batch_evenly():
    """16 rows of 4 tokens, one sample: every l four times (give or take where the random shift cuts)."""
    seen = []

    def predict(ids):
        seen.append(ids == MASK)
        return LONG(ids)

    for s in range(20):
        seen.clear()
        h.nelbo(predict, LONG.sequences, MASK, n_samples=1, generator=seeded(s))
        counts = torch.bincount(torch.cat(seen).sum(dim=1), minlength=5)
        assert counts[1:].min() >= 3 and counts[1:].max() <= 5


def test_stratified_samples_have_less_noise_than_independent_ones():
    """Equal forward passes: n_samples = n in one call against n calls of one sample."""
    sequence = LONG.sequences[6]
    stratified = estimates(WRONG_LONG, sequence, 300, n_samples=4).double()
    independent = estimates(WRONG_LONG, sequence, 1200).double().view(300, 4).mean(dim=1)
    assert float(stratified.var()) < 0.8 * float(independent.var())
    assert abs(float(stratified.mean() - independent.mean())) < 4 * math.sqrt(float(stratified.var() + independent.var()) / 300)


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


def test_passes_of_a_few_rows_give_the_same_numbers(monkeypatch):
    rows = EXACT.sequences
    ar = ExactAR(EXACT)
    whole = h.nelbo(WRONG, rows, MASK, n_samples=3, cfg_scale=0.5, generator=seeded(1)), h.ar_nll(ar, rows, START)
    sizes = []

    def counted(ids):
        sizes.append(len(ids))
        return WRONG(ids)

    monkeypatch.setattr(h, "_TOKENS_PER_PASS", 12)
    parts = h.nelbo(counted, rows, MASK, n_samples=3, cfg_scale=0.5, generator=seeded(1)), h.ar_nll(ar, rows, START)
    assert max(sizes) <= 8, "four rows of three tokens, twice for the guidance"
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, atol=1e-6)


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


# --- one token at a time, in random orders ---


def test_every_order_of_the_exact_predictor_gives_log_p():
    values = h.any_order_nll(EXACT, EXACT.sequences, MASK, n_orders=8, generator=seeded(0))
    assert values.shape == (8, len(EXACT.sequences))
    assert torch.allclose(values.double(), -EXACT.logp.expand(8, -1), atol=1e-4)


@pytest.mark.parametrize("maskable", [[True, True, True], [False, True, True], [True, False, False]])
def test_mean_over_orders_is_the_bound(maskable):
    """Eq. 15, for a wrong predictor: the chain and the masks have one expectation; each order's value is one of n! chains."""
    sequence, maskable = EXACT.sequences[22], torch.tensor(maskable)
    values = h.any_order_nll(WRONG, sequence[None], MASK, n_orders=3000, maskable=maskable[None], generator=seeded(1))[:, 0]
    assert within(values, enumerated_nelbo(WRONG, sequence, maskable))
    chains = []
    for order in itertools.permutations(maskable.nonzero()[:, 0].tolist()):
        row, chain = sequence.masked_fill(maskable, MASK), 0.0
        for i in order:
            chain -= float(WRONG(row[None])[0, i].log_softmax(-1)[sequence[i]])
            row[i] = sequence[i]
        chains.append(chain)
    assert sorted({round(float(v), 3) for v in values}) == pytest.approx(sorted({round(c, 3) for c in chains}), abs=2e-3)


def test_rows_with_fewer_tokens_stop_early():
    rows = torch.tensor([[4, 5, 6], [6, PAD, PAD], [PAD, PAD, PAD]])
    values = h.any_order_nll(WRONG, rows, MASK, n_orders=4, maskable=rows != PAD, generator=seeded(2))
    one = -float(WRONG(torch.tensor([[MASK, PAD, PAD]]))[0, 0].log_softmax(-1)[6])
    assert values[:, 1].tolist() == pytest.approx([one] * 4, abs=1e-5) and (values[:, 2] == 0).all()


def test_any_order_needs_an_order():
    with pytest.raises(ValueError, match="pass"):
        h.any_order_nll(WRONG, EXACT.sequences, MASK, n_orders=0)


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


# --- conditional ---


@pytest.mark.parametrize("split", [1, 2])
def test_log_likelihood_finds_the_true_conditional(split):
    sequence = LONG.sequences[9]
    prompt = torch.full((4,), MASK)
    prompt[:split] = sequence[:split]
    expected = float(LONG.logp[9] - LONG.log_prob(prompt[None]))
    values = [
        h.log_likelihood(LONG, sequence[:split], sequence[split:], MASK, n_samples=3, generator=seeded(s)) for s in range(400)
    ]
    assert within(values, expected)
    assert max(values) <= 0 and isinstance(values[0], float)


def test_log_likelihood_of_one_token_is_exact_with_one_pass():
    sequence = EXACT.sequences[20]
    prompt = torch.tensor([[*sequence[:2].tolist(), MASK]])
    expected = float(EXACT.logp[20] - EXACT.log_prob(prompt))
    assert h.log_likelihood(EXACT, sequence[:2], sequence[2:], MASK, n_samples=1) == pytest.approx(expected, abs=1e-5)


def test_log_likelihood_without_a_prompt():
    empty = torch.empty(0, dtype=torch.long)
    values = [h.log_likelihood(EXACT, empty, EXACT.sequences[8], MASK, n_samples=3, generator=seeded(s)) for s in range(400)]
    assert within(values, float(EXACT.logp[8]))


@pytest.mark.parametrize("cfg_scale", [0.5, 2.0])
def test_guided_log_likelihood_is_the_enumerated_one(cfg_scale):
    """Eq. 16: the unconditional pass hides the prompt and leaves the visible part of the response."""
    prompt, response = torch.tensor([6]), torch.tensor([4, 5])

    def guided(ids):
        blind = ids.clone()
        blind[:, 0] = MASK
        conditional, unconditional = WRONG(ids), WRONG(blind)
        return unconditional + (cfg_scale + 1) * (conditional - unconditional)

    expected = -enumerated_nelbo(guided, torch.cat((prompt, response)), torch.tensor([False, True, True]))
    options = {"n_samples": 100, "cfg_scale": cfg_scale}  # enough to tell it from hiding the response as well
    values = [h.log_likelihood(WRONG, prompt, response, MASK, generator=seeded(s), **options) for s in range(400)]
    assert within(values, expected)
    assert not within(values, -enumerated_nelbo(WRONG, torch.cat((prompt, response)), torch.tensor([False, True, True])))


def test_guidance_on_the_exact_predictor_stays_finite():
    value = h.log_likelihood(
        EXACT, torch.tensor([4]), torch.tensor([5, 6]), MASK, n_samples=8, cfg_scale=1.0, generator=seeded(0)
    )
    assert math.isfinite(value) and value <= 0


@pytest.mark.parametrize("first", [4, 5, 6])
def test_choose_takes_the_likeliest(first):
    """All nine continuations of a first token; the scores are near their true conditionals."""
    fits = EXACT.sequences[:, 0] == first
    options = list(EXACT.sequences[fits][:, 1:])
    truth = EXACT.logp[fits] - EXACT.logp[fits].logsumexp(0)
    index, scores = h.choose(EXACT, torch.tensor([first]), options, MASK, n_samples=600, generator=seeded(1))
    assert index == int(truth.argmax()) == max(range(9), key=lambda i: scores[i])
    assert isinstance(index, int) and len(scores) == 9 and max(scores) <= 0
    assert torch.allclose(torch.tensor(scores).double(), truth, atol=0.15)


def test_choose_takes_options_of_different_lengths():
    def predict(ids):  # as the oracle over four positions, whatever is missing on the right being unknown
        rows = torch.nn.functional.pad(ids, (0, 4 - ids.shape[1]), value=MASK)
        return LONG(rows)[:, : ids.shape[1]]

    sequence = LONG.sequences[5]
    options = [sequence[1:2], sequence[1:4]]
    _, scores = h.choose(predict, sequence[:1], options, MASK, n_samples=900, generator=seeded(0))
    prefix = [torch.cat((sequence[:k], torch.full((4 - k,), MASK)))[None] for k in (1, 2, 4)]
    base, short, long = (float(LONG.log_prob(p)) for p in prefix)
    assert scores[0] == pytest.approx(short - base, abs=1e-4)
    assert scores[1] == pytest.approx(long - base, abs=0.15)


def test_options_of_one_length_share_their_masks():
    """Common random numbers: what differs between the scores is the options, not the draw; ties go to the first."""
    option = torch.tensor([5, 6])
    index, scores = h.choose(WRONG, torch.tensor([4]), [option, option.clone()], MASK, n_samples=3, generator=seeded(0))
    assert scores[0] == scores[1] and index == 0


def test_choose_spreads_its_samples_over_l():
    """n_samples = 6 for three tokens: each l twice."""
    seen = []

    def predict(ids):
        seen.append((ids == MASK).sum(dim=1))
        return LONG(ids)

    h.choose(predict, LONG.sequences[0, :1], [LONG.sequences[0, 1:]], MASK, n_samples=6, generator=seeded(3))
    assert torch.bincount(torch.cat(seen), minlength=4).tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize(
    "prompt, options, n_samples",
    [
        (torch.tensor([4]), [], 1),
        (torch.tensor([4]), [torch.empty(0, dtype=torch.long)], 1),
        (torch.tensor([4]), [torch.tensor([[5]])], 1),
        (torch.tensor([[4]]), [torch.tensor([5])], 1),
        (torch.tensor([4]), [torch.tensor([5])], 0),
    ],
)
def test_choose_errors(prompt, options, n_samples):
    with pytest.raises(ValueError, match="pass"):
        h.choose(EXACT, prompt, options, MASK, n_samples=n_samples)


# --- many samples: more masks at small l, a line as baseline ---


@pytest.mark.parametrize("k, maskable", [(4, [True, True, True]), (22, [True, True, True]), (13, [False, True, True])])
def test_many_samples_are_unbiased_for_a_wrong_predictor(k, maskable):
    """From MANY_SAMPLES on, l is no longer uniform: the weights must make up for it exactly."""
    maskable = torch.tensor(maskable)
    values = estimates(WRONG, EXACT.sequences[k], 500, n_samples=h.MANY_SAMPLES, maskable=maskable[None])
    assert within(values, enumerated_nelbo(WRONG, EXACT.sequences[k], maskable))


def test_many_samples_are_unbiased_in_every_row_of_a_batch():
    rows = torch.tensor([[4, 5, 6], [5, 6, PAD], [6, PAD, PAD], [PAD, PAD, PAD]])
    options = {"n_samples": h.MANY_SAMPLES + 1, "maskable": rows != PAD}
    runs = torch.stack([h.nelbo(WRONG, rows, MASK, generator=seeded(s), **options) for s in range(400)])
    for i in range(3):
        assert within(runs[:, i], enumerated_nelbo(WRONG, rows[i], rows[i] != PAD))
    assert (runs[:, 3] == 0).all() and float(runs[:, 2].std()) < 1e-5


class Uneven:
    """A wrong predictor for which some tokens are easy and some hard, whatever is masked, as for real ones."""

    def __init__(self, length=32):
        self.base = WrongPredictor(12, longest=length, seed=9, scale=0.7)
        self.bias = 3 * torch.randn(length, 12, generator=seeded(1))

    def __call__(self, ids):
        return self.base(ids) + self.bias


def test_at_most_half_of_the_authors_variance_at_their_number_of_passes():
    """get_log_likelihood.py spreads l evenly from a random start; at 128 passes ours must be at least twice as precise."""
    model, n, K = Uneven(), 32, 128
    row = torch.randint(4, 12, (1, n), generator=seeded(0))
    ours, theirs = [], []
    for s in range(80):
        g = seeded(s)
        ours.append(float(h.nelbo(model, row, MASK, n_samples=K, generator=g)))
        start = int(torch.randint(1, n + 1, (1,), generator=g))
        count = ((start + torch.arange(K) * n // K - 1) % n + 1)[:, None]
        mask = h.exact_masks(count, torch.ones(1, n, dtype=torch.bool), g)[:, 0]
        nll = h.masked_nll(model, row.expand(K, -1), mask, MASK).sum(dim=1).double()
        theirs.append(float((nll * n / count[:, 0]).mean()))
    ours, theirs = torch.tensor(ours).double(), torch.tensor(theirs).double()
    assert abs(float(ours.mean() - theirs.mean())) < 4 * math.sqrt(float(ours.var() + theirs.var()) / 80)
    assert float(ours.var()) < 0.5 * float(theirs.var())


def test_common_masks_are_the_same_in_every_row():
    seen = []

    def predict(ids):
        seen.append(ids == MASK)
        return WRONG(ids)

    rows = EXACT.sequences[[4, 13, 22]]
    h.nelbo(predict, rows, MASK, n_samples=5, common_masks=True, generator=seeded(0))
    masks = torch.cat(seen).view(5, 3, 3)
    assert (masks == masks[:, :1]).all()
    runs = torch.stack([h.nelbo(WRONG, rows, MASK, n_samples=2, common_masks=True, generator=seeded(s)) for s in range(600)])
    for i, row in enumerate(rows):
        assert within(runs[:, i], enumerated_nelbo(WRONG, row, EVERYTHING))


def test_masked_nll_is_that_of_the_masked_tokens_alone():
    rows = EXACT.sequences[[3, 20]]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = h.masked_nll(WRONG, rows, mask, MASK)
    logp = WRONG(rows.masked_fill(mask, MASK)).log_softmax(-1).gather(-1, rows[..., None])[..., 0]
    assert torch.allclose(values, -logp * mask, atol=1e-6) and (values[~mask] == 0).all()
    with pytest.raises(ValueError, match="pass bool"):
        h.masked_nll(WRONG, rows, mask[:, :2], MASK)


def test_exact_masks_have_exactly_so_many_and_stay_inside():
    maskable = torch.tensor([[True, True, False, True, True], [False, True, True, False, False]])
    count = torch.tensor([[0, 1], [4, 2], [3, 0]])
    masks = h.exact_masks(count, maskable, seeded(0))
    assert (masks.sum(dim=-1) == count).all() and not (masks & ~maskable).any()


def test_choose_with_a_suffix_scores_what_stands_between():
    """Prompt and suffix both condition: against enumeration, with options of two lengths."""
    sequence = EXACT.sequences[15]
    prompt, option, suffix = sequence[:1], sequence[1:2], sequence[2:]
    expected = -enumerated_nelbo(WRONG, sequence, torch.tensor([False, True, False]))
    _, scores = h.choose(WRONG, prompt, [option], MASK, n_samples=2, suffix=suffix, generator=seeded(0))
    assert scores[0] == pytest.approx(min(0.0, expected), abs=1e-5)
    empty, before = sequence[:0], torch.tensor([True, True, False])
    values = [
        h.choose(WRONG, empty, [sequence[:2], sequence[:1]], MASK, n_samples=2, suffix=suffix, generator=seeded(s))[1][0]
        for s in range(500)
    ]
    assert within(values, -enumerated_nelbo(WRONG, sequence, before))


def test_choose_scores_options_together_as_one_by_one():
    options = [EXACT.sequences[k, 1:] for k in (0, 5, 8)]
    together = h.choose(WRONG, torch.tensor([4]), options, MASK, n_samples=4, generator=seeded(3))[1]
    single = [h.choose(WRONG, torch.tensor([4]), [o], MASK, n_samples=4, generator=seeded(3))[1][0] for o in options]
    assert together == pytest.approx(single, abs=1e-5)
