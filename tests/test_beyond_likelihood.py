"""beyond.likelihood against enumeration: the low-noise bound, chains, answers, the loss by masking rate and by place."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracle import MASK, PAD, START, ExactPredictor, WrongPredictor, enumerated_nelbo, noisy_pair, seeded, within

import llada_helpers as h
from beyond import decoding as d
from beyond import likelihood as lik

EXACT = ExactPredictor(length=3, symbols=3)
LONG = ExactPredictor(length=4, symbols=2, seed=2)
WRONG = WrongPredictor(EXACT.vocab_size)
WRONG_LONG = WrongPredictor(LONG.vocab_size, seed=4)
EVERYTHING = torch.ones(3, dtype=torch.bool)
MANY = lik.MANY_SAMPLES


def estimates(predict, sequence, runs, n_samples):
    """Many copies of a row in one call; these share the strata, so that their mean is if anything the surer."""
    rows = sequence.repeat(runs, 1)
    return lik.low_noise_nelbo(predict, rows, MASK, n_samples=n_samples, generator=seeded(0))


def independent(predict, sequence, runs, n_samples, estimate=lik.low_noise_nelbo):
    """A call for each estimate, so that nothing is shared between them."""
    found = [estimate(predict, sequence[None], MASK, n_samples=n_samples, generator=seeded(s))[0] for s in range(runs)]
    return torch.stack(found).double()


# --- the low-noise bound ---


@pytest.mark.parametrize("n_samples", [1, 2, 3, 5, MANY])
@pytest.mark.parametrize("k", [0, 4, 13, 22])
def test_mean_is_exact_for_the_exact_predictor_and_enumerated_for_a_wrong_one(k, n_samples):
    """From MANY_SAMPLES on, l is no longer uniform: the weights must make up for it exactly."""
    row = EXACT.sequences[k]
    assert within(estimates(EXACT, row, 2000, n_samples), -float(EXACT.logp[k]))
    assert within(estimates(WRONG, row, 2000, n_samples), enumerated_nelbo(WRONG, row, EVERYTHING))


def test_every_row_of_a_batch_is_unbiased():
    """Rows share one random shift; each must still be unbiased by itself, at any place in the batch."""
    rows = EXACT.sequences[[0, 4, 13, 22, 26]]
    runs = torch.stack([lik.low_noise_nelbo(WRONG, rows, MASK, n_samples=2, generator=seeded(s)) for s in range(400)])
    for i, row in enumerate(rows):
        assert within(runs[:, i], enumerated_nelbo(WRONG, row, EVERYTHING))


@pytest.mark.parametrize("n_samples, runs", [(2, 400), (MANY + 1, 200)])
def test_unequal_numbers_of_tokens(n_samples, runs):
    """Padding is not maskable: each row's bound is that of its own tokens, [PAD] stays visible, no token left gives 0."""
    rows = torch.tensor([[4, 5, 6], [5, 6, PAD], [6, PAD, PAD], [PAD, PAD, PAD]])
    seen = []

    def predict(ids):
        seen.append(ids)
        return WRONG(ids)

    options = {"n_samples": n_samples, "maskable": rows != PAD}
    values = torch.stack([lik.low_noise_nelbo(predict, rows, MASK, generator=seeded(s), **options) for s in range(runs)])
    for i in range(3):
        assert within(values[:, i], enumerated_nelbo(WRONG, rows[i], rows[i] != PAD))
    assert (values[:, 3] == 0).all()
    assert all(((ids.view(-1, 4, 3) == PAD) == (rows == PAD)).all() for ids in seen)
    assert float(values[:, 2].std()) < 1e-5, "one token: nothing is left to chance"


def test_stratified_samples_have_less_noise_than_independent_ones():
    """Equal forward passes: n_samples = n in one call against n calls of one sample."""
    stratified = independent(WRONG_LONG, LONG.sequences[6], 200, 4)
    singles = independent(WRONG_LONG, LONG.sequences[6], 800, 1).view(200, 4).mean(dim=1)
    assert float(stratified.var()) < 0.8 * float(singles.var())
    assert abs(float(stratified.mean() - singles.mean())) < 4 * math.sqrt(float(stratified.var() + singles.var()) / 200)


def test_rows_share_the_strata_in_a_random_order():
    """So the rows of a part of the batch have no common bias: l neither rises nor falls from row to row."""
    seen = []

    def predict(ids):
        seen.append((ids == MASK).sum(dim=1))
        return LONG(ids)

    for s in range(20):
        lik.low_noise_nelbo(predict, LONG.sequences, MASK, n_samples=1, generator=seeded(s))
        assert int((seen[-1].roll(-1) < seen[-1]).sum()) > 1
    assert len({tuple(count.tolist()) for count in seen}) == 20


@pytest.mark.parametrize("costs", [(3.0, 1e-3, 1e-3), (1e-3, 1e-3, 3.0)])
def test_baseline_is_added_back_where_costs_hang_on_the_number_masked(costs):
    """Then what the other masks say is far off: the bound is unbiased only if all of it is made up for."""

    def predict(ids):
        cost = torch.tensor(costs)[(ids == MASK).sum(dim=1) - 1][:, None].expand(ids.shape)
        logits = torch.full((*ids.shape, 7), -50.0)
        logits[..., 5], logits[..., 6] = -cost, torch.log1p(-torch.exp(-cost))
        return logits

    row = torch.full((3,), 5)
    assert within(estimates(predict, row, 2000, 3), enumerated_nelbo(predict, row, EVERYTHING))


def test_shape_and_reproducibility():
    rows = EXACT.sequences
    a, b, c = (lik.low_noise_nelbo(WRONG, rows, MASK, n_samples=2, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (len(rows),) and a.dtype == torch.float32


def test_what_the_model_holds_impossible_costs_infinity_not_nan():
    """Only for the rows that contain it."""

    def predict(ids):
        logits = WRONG(ids).clone()
        logits[..., 6] = -math.inf
        return logits

    values = lik.low_noise_nelbo(predict, torch.tensor([[4, 5, 6], [4, 5, 4]]), MASK, n_samples=6, generator=seeded(0))
    assert values[0] == math.inf and values[1].isfinite()


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
def test_bound_errors(options):
    options = {"sequences": torch.tensor([[4, 5, 6]]), **options}
    with pytest.raises(ValueError, match="pass"):
        lik.low_noise_nelbo(WRONG, options.pop("sequences"), MASK, **options)


def test_common_masks_are_the_same_in_every_row():
    seen = []

    def predict(ids):
        seen.append(ids == MASK)
        return WRONG(ids)

    rows, options = EXACT.sequences[[4, 13, 22]], {"common_masks": True}
    lik.low_noise_nelbo(predict, rows, MASK, n_samples=5, generator=seeded(0), **options)
    masks = torch.cat(seen).view(5, 3, 3)
    assert (masks == masks[:, :1]).all()
    runs = torch.stack([lik.low_noise_nelbo(WRONG, rows, MASK, n_samples=2, generator=seeded(s), **options) for s in range(300)])
    for i, row in enumerate(rows):
        assert within(runs[:, i], enumerated_nelbo(WRONG, row, EVERYTHING))


@pytest.mark.parametrize("call", [
    lambda m: lik.low_noise_nelbo(m, torch.full((2, 4), 5), MASK, n_samples=2),
    lambda m: lik.low_noise_nelbo(d.guided(m, torch.ones(1, 4, dtype=torch.bool), 1.0), torch.full((2, 4), 5), MASK, n_samples=2),
    lambda m: lik.any_order_nll(m, torch.full((2, 4), 5), MASK, n_orders=2),
    lambda m: lik.log_likelihood(m, torch.tensor([4]), torch.tensor([5, 6]), MASK, n_samples=2),
    lambda m: lik.cost_by_rate(m, torch.full((2, 4), 5), [1, 4]),
    lambda m: lik.cost_by_place(m, torch.full((2, 4), 5)),
], ids=["low_noise_nelbo", "guided", "any_order_nll", "log_likelihood", "cost_by_rate", "cost_by_place"])  # fmt: skip
def test_inference_makes_no_graph_and_leaves_the_mode_alone(call):
    model = h.Transformer(h.ModelConfig(10, 8, 1, 2, 8, dropout=0.3)).train()
    modes = []
    hook = model.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    call(model)
    hook.remove()
    assert modes and set(modes) == {(False, False)}
    assert model.training and torch.is_grad_enabled()


class Uneven:
    """A wrong predictor for which some tokens are easy and some hard, whatever is masked, as for real ones."""

    def __init__(self, length=32):
        self.base = WrongPredictor(12, longest=length, seed=9, scale=0.7)
        self.bias = 3 * torch.randn(length, 12, generator=seeded(1))

    def __call__(self, ids):
        return self.base(ids) + self.bias


def test_at_many_passes_at_most_half_of_the_plain_bounds_variance():
    model, row = Uneven(), torch.randint(4, 12, (32,), generator=seeded(0))
    ours, plain = (independent(model, row, 60, 128, estimate) for estimate in (lik.low_noise_nelbo, h.nelbo))
    assert abs(float(ours.mean() - plain.mean())) < 4 * math.sqrt(float(ours.var() + plain.var()) / 60)
    assert float(ours.var()) < 0.5 * float(plain.var())


# --- by masking rate and by place ---


def test_costs_of_all_counts_and_of_all_places_sum_to_the_enumerated_bound():
    sequence = LONG.sequences[9]
    bound = enumerated_nelbo(WRONG_LONG, sequence, torch.ones(4, dtype=torch.bool))
    costs = lik.cost_by_rate(WRONG_LONG, sequence.repeat(2000, 1), [1, 2, 3, 4])
    assert costs.shape == (4, 2000) and costs.mean() == pytest.approx(bound / 4, rel=0.02)
    place = lik.cost_by_place(WRONG_LONG, sequence.repeat(2000, 1))
    assert place.shape == (2000, 4) and float(place.sum(dim=1).mean()) == pytest.approx(bound, rel=0.02)


def test_models_are_asked_about_the_same_masks():
    rows = LONG.sequences[:5]
    assert (lik.cost_by_rate(WRONG_LONG, rows, [1, 3])[1] == lik.cost_by_rate(WRONG_LONG, rows, [3])[0]).all()


def test_costs_by_place_are_exact_for_ar():
    model, rows = noisy_pair(8, 6, 0.5)["AR"], torch.randint(4, 8, (5, 6), generator=seeded(0))
    costs, third = lik.cost_by_place(model, rows), torch.arange(6).expand(5, -1) == 2
    assert torch.allclose(costs.sum(dim=1), h.ar_nll(model, rows, START), atol=1e-4)
    assert torch.allclose(costs[:, 2], h.ar_nll(model, rows, START, counted=third), atol=1e-4)


def test_the_area_under_a_straight_line_is_exact():
    counts = lik.mask_counts(128)
    assert counts[0] == 1 and counts[-1] == 128
    assert lik.area_under(counts, np.full((len(counts), 5), 1.7)) == pytest.approx(np.full(5, 1.7))
    rate = np.array(counts) / 128
    assert lik.area_under(counts, (1.7 + 0.9 * rate)[:, None]) == pytest.approx([1.7 + 0.45 + 0.45 * rate[0] ** 2])


def test_spread_leaves_the_padded_window_out():
    windows = torch.cat((torch.full((5, 3), 7), torch.full((1, 3), PAD)))
    assert not bool((lik.spread(windows, 20) == PAD).any()) and len(lik.spread(windows[:1], 4)) == 4
    assert lik.PROBES.keys() == h.PRESETS.keys()


# --- one token at a time, in random orders ---


def test_every_order_of_the_exact_predictor_gives_log_p():
    values = lik.any_order_nll(EXACT, EXACT.sequences, MASK, n_orders=8, generator=seeded(0))
    assert values.shape == (8, len(EXACT.sequences))
    assert torch.allclose(values.double(), -EXACT.logp.expand(8, -1), atol=1e-4)


@pytest.mark.parametrize("maskable", [[True, True, True], [False, True, True], [True, False, False]])
def test_mean_over_orders_is_the_bound(maskable):
    """Eq. 15, for a wrong predictor: the chain and the masks have one expectation; each order's value is one of n! chains."""
    sequence, maskable = EXACT.sequences[22], torch.tensor(maskable)
    options = {"n_orders": 3000, "maskable": maskable[None], "generator": seeded(1)}
    values = lik.any_order_nll(WRONG, sequence[None], MASK, **options)[:, 0]
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
    values = lik.any_order_nll(WRONG, rows, MASK, n_orders=4, maskable=rows != PAD, generator=seeded(2))
    one = -float(WRONG(torch.tensor([[MASK, PAD, PAD]]))[0, 0].log_softmax(-1)[6])
    assert values[:, 1].tolist() == pytest.approx([one] * 4, abs=1e-5) and (values[:, 2] == 0).all()


def test_chains_with_something_impossible_are_infinite_not_nan():
    def predict(ids):
        return WRONG(ids).index_fill(-1, torch.tensor([6]), -math.inf)

    values = lik.any_order_nll(predict, torch.tensor([[4, 5, 6], [4, 5, 4]]), MASK, n_orders=3, generator=seeded(0))
    assert (values[:, 0] == math.inf).all() and values[:, 1].isfinite().all()


@pytest.mark.parametrize("options", [{"n_orders": 0}, {"n_orders": 1, "maskable": torch.ones(1, 3)}])
def test_any_order_errors(options):
    with pytest.raises(ValueError, match="pass"):
        lik.any_order_nll(WRONG, EXACT.sequences, MASK, **options)


# --- conditional ---


@pytest.mark.parametrize("split", [1, 2])
def test_log_likelihood_finds_the_true_conditional(split):
    sequence = LONG.sequences[9]
    prompt = torch.full((4,), MASK)
    prompt[:split] = sequence[:split]
    expected = float(LONG.logp[9] - LONG.log_prob(prompt[None]))
    values = [
        lik.log_likelihood(LONG, sequence[:split], sequence[split:], MASK, n_samples=3, generator=seeded(s)) for s in range(200)
    ]
    assert within(values, expected)
    assert max(values) <= 0 and isinstance(values[0], float)


def test_log_likelihood_of_one_token_is_exact_with_one_pass():
    sequence = EXACT.sequences[20]
    prompt = torch.tensor([[*sequence[:2].tolist(), MASK]])
    expected = float(EXACT.logp[20] - EXACT.log_prob(prompt))
    assert lik.log_likelihood(EXACT, sequence[:2], sequence[2:], MASK, n_samples=1) == pytest.approx(expected, abs=1e-5)


def test_log_likelihood_without_a_prompt():
    empty = torch.empty(0, dtype=torch.long)
    values = [lik.log_likelihood(EXACT, empty, EXACT.sequences[8], MASK, n_samples=3, generator=seeded(s)) for s in range(200)]
    assert within(values, float(EXACT.logp[8]))


# --- guided ---


def of_prompt(length, prompt):
    return (torch.arange(length) < prompt)[None]


@pytest.mark.parametrize("w", [0.5, 2.0])
def test_guided_log_likelihood_is_the_enumerated_one(w):
    """Eq. 16: the unconditional pass hides the prompt and leaves the visible part of the response."""
    prompt, response = torch.tensor([6]), torch.tensor([4, 5])

    def by_hand(ids):
        blind = ids.clone()
        blind[:, 0] = MASK
        conditional, unconditional = WRONG(ids), WRONG(blind)
        return unconditional + (w + 1) * (conditional - unconditional)

    both, free = torch.cat((prompt, response)), torch.tensor([False, True, True])
    expected = -enumerated_nelbo(by_hand, both, free)
    model = d.guided(WRONG, of_prompt(3, 1), w)
    # enough samples to tell it from hiding the response as well
    values = [lik.log_likelihood(model, prompt, response, MASK, n_samples=100, generator=seeded(s)) for s in range(100)]
    assert within(values, expected)
    assert not within(values, -enumerated_nelbo(WRONG, both, free))


def test_guidance_on_the_exact_predictor_stays_finite():
    model = d.guided(EXACT, of_prompt(3, 1), 1.0)
    value = lik.log_likelihood(model, torch.tensor([4]), torch.tensor([5, 6]), MASK, n_samples=8, generator=seeded(0))
    assert math.isfinite(value) and value <= 0


def test_zero_guidance_scores_as_no_guidance():
    """With a suffix and options of two lengths, what is given is a function of the ids."""
    prompt, options = torch.tensor([4, 5]), [torch.tensor([6, 7, 8]), torch.tensor([8, 6, 6]), torch.tensor([9])]

    def around(ids):
        position = torch.arange(ids.shape[1])[None]
        return (position < 2) | (position == ids.shape[1] - 1)

    scored = []
    for w in (None, 0.0, 1.0):
        predict = WrongPredictor(10, seed=2)
        alone, between = (
            predict if w is None else d.guided(predict, given, w) for given in (lambda i: of_prompt(i.shape[1], 2), around)
        )
        single = [lik.log_likelihood(alone, prompt, option, MASK, n_samples=6, generator=seeded(1)) for option in options]
        chosen = lik.choose(between, prompt, options, MASK, n_samples=6, suffix=torch.tensor([4]), generator=seeded(1))
        scored.append((single, chosen, predict.rows))
    assert scored[0] == scored[1]
    assert scored[0][0] != scored[2][0] and scored[0][1][1] != scored[2][1][1] and scored[2][2] == 2 * scored[0][2]


def leans(ids):
    """Token 4 one nat ahead of 5 where anything is given, and one and a half where everything is masked; the rest impossible."""
    ahead = torch.where((ids == MASK).all(dim=1), 1.5, 1.0)[:, None, None] * torch.eye(10)[4]
    return ahead.masked_fill(~torch.isin(torch.arange(10), torch.tensor([4, 5])), -math.inf).expand(-1, ids.shape[1], -1)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.9, 2.1, 5.0])
def test_guided_choice_follows_equation_16(w):
    """By hand: 1.5 + (w + 1) (1 - 1.5) nats ahead, so that w = 2 turns the scales."""
    ahead = 1.5 + (w + 1) * (1.0 - 1.5)
    model = d.guided(leans, torch.tensor([[True, False, True]]), w)
    options, suffix = [torch.tensor([5]), torch.tensor([4])], torch.tensor([8])
    index, scores = lik.choose(model, torch.tensor([7]), options, MASK, n_samples=2, suffix=suffix)
    expected = torch.tensor([0.0, ahead]).log_softmax(0).tolist()
    assert index == int(ahead > 0) and scores == pytest.approx(expected, abs=1e-5)
    alone = lik.log_likelihood(d.guided(leans, of_prompt(2, 1), w), torch.tensor([7]), options[1], MASK, n_samples=1)
    assert alone == pytest.approx(expected[1], abs=1e-5)


# --- choosing ---


@pytest.mark.parametrize("first", [4, 5, 6])
def test_choose_takes_the_likeliest(first):
    """All nine continuations of a first token; the scores are near their true conditionals."""
    fits = EXACT.sequences[:, 0] == first
    options = list(EXACT.sequences[fits][:, 1:])
    truth = EXACT.logp[fits] - EXACT.logp[fits].logsumexp(0)
    index, scores = lik.choose(EXACT, torch.tensor([first]), options, MASK, n_samples=600, generator=seeded(1))
    assert index == int(truth.argmax()) == max(range(9), key=lambda i: scores[i])
    assert isinstance(index, int) and len(scores) == 9 and max(scores) <= 0
    assert torch.allclose(torch.tensor(scores).double(), truth, atol=0.15)


def test_choose_takes_options_of_different_lengths():
    def predict(ids):  # as the oracle over four positions, whatever is missing on the right being unknown
        rows = torch.nn.functional.pad(ids, (0, 4 - ids.shape[1]), value=MASK)
        return LONG(rows)[:, : ids.shape[1]]

    sequence = LONG.sequences[5]
    options = [sequence[1:2], sequence[1:4]]
    _, scores = lik.choose(predict, sequence[:1], options, MASK, n_samples=900, generator=seeded(0))
    prefix = [torch.cat((sequence[:k], torch.full((4 - k,), MASK)))[None] for k in (1, 2, 4)]
    base, short, long = (float(LONG.log_prob(p)) for p in prefix)
    assert scores[0] == pytest.approx(short - base, abs=1e-4)
    assert scores[1] == pytest.approx(long - base, abs=0.15)


def test_options_of_one_length_share_their_masks():
    """Common random numbers: what differs between the scores is the options, not the draw; ties go to the first."""
    option = torch.tensor([5, 6])
    index, scores = lik.choose(WRONG, torch.tensor([4]), [option, option.clone()], MASK, n_samples=3, generator=seeded(0))
    assert scores[0] == scores[1] and index == 0


def test_choose_spreads_its_samples_over_l():
    """n_samples = 6 for three tokens: each l twice."""
    seen = []

    def predict(ids):
        seen.append((ids == MASK).sum(dim=1))
        return LONG(ids)

    lik.choose(predict, LONG.sequences[0, :1], [LONG.sequences[0, 1:]], MASK, n_samples=6, generator=seeded(3))
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
        lik.choose(EXACT, prompt, options, MASK, n_samples=n_samples)


def test_choose_with_a_suffix_scores_what_stands_between():
    """Prompt and suffix both condition: against enumeration, with options of two lengths."""
    sequence = EXACT.sequences[15]
    prompt, option, suffix = sequence[:1], sequence[1:2], sequence[2:]
    expected = -enumerated_nelbo(WRONG, sequence, torch.tensor([False, True, False]))
    _, scores = lik.choose(WRONG, prompt, [option], MASK, n_samples=2, suffix=suffix, generator=seeded(0))
    assert scores[0] == pytest.approx(min(0.0, expected), abs=1e-5)
    empty, before = sequence[:0], torch.tensor([True, True, False])
    values = [
        lik.choose(WRONG, empty, [sequence[:2], sequence[:1]], MASK, n_samples=2, suffix=suffix, generator=seeded(s))[1][0]
        for s in range(200)
    ]
    assert within(values, -enumerated_nelbo(WRONG, sequence, before))


def test_choose_scores_options_together_as_one_by_one():
    options = [EXACT.sequences[k, 1:] for k in (0, 5, 8)]
    together = lik.choose(WRONG, torch.tensor([4]), options, MASK, n_samples=4, generator=seeded(3))[1]
    single = [lik.choose(WRONG, torch.tensor([4]), [o], MASK, n_samples=4, generator=seeded(3))[1][0] for o in options]
    assert together == pytest.approx(single, abs=1e-5)


def test_scores_stay_log_probabilities_where_the_baseline_overshoots():
    """A few masks cost much and all others nothing: the control variate may then put a bound below 0, a score may not follow."""
    costs = torch.where(torch.rand(16, 4, generator=seeded(4)) < 0.1, 6.0, 1e-4)  # by the set of masked positions

    def predict(ids):
        cost = costs[((ids == MASK) * 2 ** torch.arange(4)).sum(dim=1)]
        logits = torch.full((*ids.shape, 7), -50.0)
        logits[..., 5], logits[..., 6] = -cost, torch.log1p(-torch.exp(-cost))
        return logits

    row = torch.full((4,), 5)
    scores = [lik.log_likelihood(predict, row[:0], row, MASK, n_samples=3, generator=seeded(s)) for s in range(60)]
    assert float(independent(predict, row, 60, 3).min()) < 0 and max(scores) == 0
