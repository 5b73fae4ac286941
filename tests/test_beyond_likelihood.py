"""beyond.likelihood and beyond.estimators against enumeration: the low-noise bound, chains, answers, ways to draw masks."""

import itertools
import math

import pytest
import torch
from oracle import MASK, PAD, START, ExactAR, ExactPredictor, WrongPredictor, enumerated_nelbo, seeded, within

import llada_helpers as h
from beyond import decoding as d
from beyond import estimators as e
from beyond import likelihood as lik

EXACT = ExactPredictor(length=3, symbols=3)
LONG = ExactPredictor(length=4, symbols=2, seed=2)
WRONG = WrongPredictor(EXACT.vocab_size)
WRONG_LONG = WrongPredictor(LONG.vocab_size, seed=4)
EVERYTHING = torch.ones(3, dtype=torch.bool)
MANY = lik.MANY_SAMPLES


def estimates(predict, sequence, runs, n_samples=1, **options):
    """One row at a time, so that nothing is shared between the estimates."""
    options = {"n_samples": n_samples, **options}
    return torch.stack(
        [lik.low_noise_nelbo(predict, sequence[None], MASK, generator=seeded(s), **options)[0] for s in range(runs)]
    )


# --- the low-noise bound ---


@pytest.mark.parametrize("n_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [0, 13])
def test_mean_is_exact_for_the_exact_predictor(k, n_samples):
    assert within(estimates(EXACT, EXACT.sequences[k], 500, n_samples), -float(EXACT.logp[k]))


@pytest.mark.parametrize("n_samples", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [4, 22])
def test_mean_is_the_enumerated_value_for_a_wrong_predictor(k, n_samples):
    expected = enumerated_nelbo(WRONG, EXACT.sequences[k], EVERYTHING)
    assert within(estimates(WRONG, EXACT.sequences[k], 500, n_samples), expected)


@pytest.mark.parametrize("n_samples", [3, MANY])
def test_agrees_with_the_plain_bound(n_samples):
    """Both have the expectation that enumeration gives, and so each other's; for the exact predictor it is -log p."""
    for predict, k in ((EXACT, 7), (WRONG, 7), (WRONG, 22)):
        row, options = EXACT.sequences[k], {"n_samples": n_samples}
        ours = estimates(predict, row, 300, **options).double()
        plain = torch.stack([h.nelbo(predict, row[None], MASK, generator=seeded(s), **options)[0] for s in range(300)]).double()
        assert abs(float(ours.mean() - plain.mean())) < 4 * math.sqrt(float(ours.var() + plain.var()) / 300) + 1e-6
        expected = enumerated_nelbo(predict, row, EVERYTHING)
        assert within(ours, expected) and within(plain, expected)
        assert predict is WRONG or expected == pytest.approx(-float(EXACT.logp[k]), abs=1e-4)


def test_every_row_of_a_batch_is_unbiased():
    """Rows share one random shift; each must still be unbiased by itself, at any place in the batch."""
    rows = EXACT.sequences[[0, 4, 13, 22, 26]]
    runs = torch.stack([lik.low_noise_nelbo(WRONG, rows, MASK, n_samples=2, generator=seeded(s)) for s in range(800)])
    for i, row in enumerate(rows):
        assert within(runs[:, i], enumerated_nelbo(WRONG, row, EVERYTHING))


@pytest.mark.parametrize("n_samples, runs", [(2, 800), (MANY + 1, 400)])
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


@pytest.mark.parametrize("k, maskable", [(4, [True, True, True]), (22, [True, True, True]), (13, [False, True, True])])
def test_many_samples_are_unbiased_for_a_wrong_predictor(k, maskable):
    """From MANY_SAMPLES on, l is no longer uniform: the weights must make up for it exactly."""
    maskable = torch.tensor(maskable)
    values = estimates(WRONG, EXACT.sequences[k], 500, n_samples=MANY, maskable=maskable[None])
    assert within(values, enumerated_nelbo(WRONG, EXACT.sequences[k], maskable))


def test_stratified_samples_have_less_noise_than_independent_ones():
    """Equal forward passes: n_samples = n in one call against n calls of one sample."""
    sequence = LONG.sequences[6]
    stratified = estimates(WRONG_LONG, sequence, 300, n_samples=4).double()
    independent = estimates(WRONG_LONG, sequence, 1200).double().view(300, 4).mean(dim=1)
    assert float(stratified.var()) < 0.8 * float(independent.var())
    assert abs(float(stratified.mean() - independent.mean())) < 4 * math.sqrt(float(stratified.var() + independent.var()) / 300)


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
    assert within(estimates(predict, row, 800, n_samples=3), enumerated_nelbo(predict, row, EVERYTHING))


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
    runs = torch.stack([lik.low_noise_nelbo(WRONG, rows, MASK, n_samples=2, generator=seeded(s), **options) for s in range(600)])
    for i, row in enumerate(rows):
        assert within(runs[:, i], enumerated_nelbo(WRONG, row, EVERYTHING))


@pytest.mark.parametrize("call", [
    lambda m: lik.low_noise_nelbo(m, torch.full((2, 4), 5), MASK, n_samples=2),
    lambda m: lik.low_noise_nelbo(d.guided(m, torch.ones(1, 4, dtype=torch.bool), 1.0), torch.full((2, 4), 5), MASK, n_samples=2),
    lambda m: lik.any_order_nll(m, torch.full((2, 4), 5), MASK, n_orders=2),
    lambda m: lik.log_likelihood(m, torch.tensor([4]), torch.tensor([5, 6]), MASK, n_samples=2),
    lambda m: e.fixed(m, torch.full((2, 4), 5), MASK, 2, seeded(0)),
], ids=["low_noise_nelbo", "guided", "any_order_nll", "log_likelihood", "fixed"])  # fmt: skip
def test_inference_makes_no_graph_and_leaves_the_mode_alone(call):
    model = h.Transformer(h.ModelConfig(10, 8, 1, 2, 8, dropout=0.3)).train()
    modes = []
    hook = model.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    call(model)
    hook.remove()
    assert modes and set(modes) == {(False, False)}
    assert model.training and torch.is_grad_enabled()


# --- four ways to draw masks, and their noise ---

SCHEMES = {"bernoulli": e.bernoulli, "fixed": e.fixed, "authors": e.authors, "antithetic": e.antithetic}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("K", [2, 6])
def test_every_scheme_has_the_enumerated_mean(name, K):
    """Many copies of three rows in one call; of Eq. 3 too, whose times are integrated over."""
    rows, copies = EXACT.sequences[[4, 13, 22]], 4000
    values = SCHEMES[name](WRONG, rows.repeat(copies, 1), MASK, K, seeded(0))
    assert values.shape == (3 * copies,)
    for row, drawn in zip(rows, values.view(copies, 3).T):
        assert within(drawn, enumerated_nelbo(WRONG, row, EVERYTHING))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_finds_log_p(name):
    rows = EXACT.sequences[5:6].repeat(4000, 1)
    assert within(SCHEMES[name](EXACT, rows, MASK, 4, seeded(1)), -float(EXACT.logp[5]))


def masks_of(scheme, K, n=4):
    seen = []

    def predict(ids):
        seen.append(ids == MASK)
        return WRONG_LONG(ids)

    scheme(predict, LONG.sequences[:1, :n], MASK, K, seeded(0))
    return torch.cat(seen)


def test_schemes_draw_what_they_say():
    assert sorted(masks_of(e.authors, 4).sum(dim=1).tolist()) == [1, 2, 3, 4], "l is spread over all of 1 ... n"
    assert len(masks_of(e.bernoulli, 7)) == len(masks_of(e.fixed, 7)) == 7
    assert (masks_of(e.fixed, 50).sum(dim=1) > 0).all() and not (masks_of(e.bernoulli, 50).sum(dim=1) > 0).all()
    mask = masks_of(e.antithetic, 6)
    assert torch.equal(mask[:3], ~mask[3:6]) and mask[6:].tolist() == [[True] * 4]


@pytest.mark.parametrize("K, n", [(0, 4), (1, 4), (3, 4), (2, 1)])
def test_antithetic_needs_pairs(K, n):
    with pytest.raises(ValueError, match="pass"):
        masks_of(e.antithetic, K, n)


def test_sizes_of_every_preset():
    assert set(e.SIZES) == set(h.PRESETS)
    for sizes in e.SIZES.values():
        assert sizes.passes == tuple(sorted(sizes.passes)) and not any(K % 2 for K in sizes.passes[:-1])


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
    ours, plain, theirs = (
        torch.tensor([float(scheme(s)) for s in range(80)], dtype=torch.float64)
        for scheme in (
            lambda s: lik.low_noise_nelbo(model, row, MASK, n_samples=K, generator=seeded(s)),
            lambda s: h.nelbo(model, row, MASK, n_samples=K, generator=seeded(s)),
            lambda s: e.authors(model, row, MASK, K, seeded(s)),
        )
    )
    for other in (plain, theirs):
        assert abs(float(ours.mean() - other.mean())) < 4 * math.sqrt(float(ours.var() + other.var()) / 80)
        assert float(ours.var()) < 0.5 * float(other.var())


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
        lik.log_likelihood(LONG, sequence[:split], sequence[split:], MASK, n_samples=3, generator=seeded(s)) for s in range(400)
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
    values = [lik.log_likelihood(EXACT, empty, EXACT.sequences[8], MASK, n_samples=3, generator=seeded(s)) for s in range(400)]
    assert within(values, float(EXACT.logp[8]))


def test_log_likelihoods_of_the_two_models_agree_for_the_exact_predictor():
    """What the chain rule gives left to right, any order gives: AR and the bound on one scale."""
    exact = h.ar_nll(ExactAR(EXACT), EXACT.sequences[17:18], START)
    assert within(estimates(EXACT, EXACT.sequences[17], 300, 4), float(exact))


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
    values = [lik.log_likelihood(model, prompt, response, MASK, n_samples=100, generator=seeded(s)) for s in range(400)]
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
        for s in range(500)
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
    assert float(estimates(predict, row, 60, n_samples=3).min()) < 0 and max(scores) == 0
