"""Section 6: samplers against enumerated distributions and against plain-Python rewritings, and strategies of a user's own."""

import functools
import inspect
import itertools
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    FIRST,
    MASK,
    START,
    ChiSquare,
    ExactAR,
    ExactPredictor,
    WithoutFloat64,
    WrongPredictor,
    fill,
    masks,
    on_apple,
    seeded,
    templates,
)

import bench
import llada_helpers as h
from beyond.likelihood import any_order_nll, choose, low_noise_nelbo, masked_nll

EXACT = ExactPredictor(length=3, symbols=3)
TRUTH = EXACT.logp.exp()
VOCABULARY = 10
REMASKING = ("low_confidence", "random", "ancestral", "entropy", "margin")
ROWS = 6000


def counts_of(ids):
    return torch.bincount(EXACT.index(ids), minlength=len(TRUTH))


# --- distributions ---


@pytest.mark.parametrize("remasking", ["random", "entropy", "margin"])
def test_one_token_a_step_samples_the_true_distribution(remasking):
    """The order may depend on what is visible, never on what is drawn: then the chain rule is exact."""
    generation = fill(EXACT, masks(ROWS), remasking=remasking, temperature=1.0, generator=seeded(1))
    chi = ChiSquare.of(counts_of(generation.ids), TRUTH)
    assert chi.fits, chi


def test_low_confidence_is_not_exact_even_one_by_one():
    """It keeps the likeliest of the sampled values, which favours likely values: the reader should know, so it is a test."""
    generation = fill(EXACT, masks(ROWS), temperature=1.0, generator=seeded(1))
    assert not ChiSquare.of(counts_of(generation.ids), TRUTH).fits


def test_all_at_once_samples_the_product_of_marginals():
    """And that differs from the truth: the chi-square test has power at this size."""
    generation = fill(EXACT, masks(ROWS), remasking="random", steps=1, temperature=1.0, generator=seeded(2))
    marginals = EXACT(masks(1))[0].double().exp()
    product = torch.stack([marginals[range(3), s].prod() for s in EXACT.sequences])
    counts = counts_of(generation.ids)
    assert ChiSquare.of(counts, product).fits
    assert not ChiSquare.of(counts, TRUTH).fits


@pytest.mark.parametrize("remasking", ["random", "entropy", "margin", "ancestral"])
def test_given_tokens_condition_the_rest(remasking):
    template = masks(ROWS)
    template[:, 1] = FIRST + 2
    steps = {"ancestral": 200}.get(remasking, 2)  # ancestral reveals two at once with probability 1 / steps
    generation = fill(EXACT, template, remasking=remasking, steps=steps, temperature=1.0, generator=seeded(3))
    fits = EXACT.sequences[:, 1] == FIRST + 2
    chi = ChiSquare.of(counts_of(generation.ids), TRUTH * fits / TRUTH[fits].sum())
    assert chi.fits, chi


def test_ancestral_with_many_steps_samples_the_true_distribution():
    generation = fill(EXACT, masks(ROWS), remasking="ancestral", steps=300, temperature=1.0, generator=seeded(4))
    chi = ChiSquare.of(counts_of(generation.ids), TRUTH)
    assert chi.fits, chi


def test_ancestral_reveals_at_uniform_and_independent_steps():
    """(t - s) / t at every step makes the step of each position uniform: 1/4^3 for each triple of steps."""
    generation = fill(EXACT, masks(ROWS), remasking="ancestral", steps=4, temperature=1.0, generator=seeded(5))
    triple = (generation.order * torch.tensor([16, 4, 1])).sum(dim=1)
    assert ChiSquare.of(torch.bincount(triple, minlength=64), torch.full((64,), 1 / 64)).fits


def test_ancestral_with_two_steps_samples_the_enumerated_mixture():
    """Not the truth, but exactly: over the 2^3 ways to split the positions between two steps."""
    generation = fill(EXACT, masks(4 * ROWS), remasking="ancestral", steps=2, temperature=1.0, generator=seeded(6))
    mixture = torch.zeros(len(TRUTH), dtype=torch.float64)
    for second in itertools.product([False, True], repeat=3):
        second = torch.tensor(second)
        start = EXACT(masks(1))[0].double().exp()
        middle = EXACT(EXACT.sequences.masked_fill(second, MASK)).double().exp()
        for k, sequence in enumerate(EXACT.sequences):
            factors = torch.where(second, middle[k, range(3), sequence], start[range(3), sequence])
            mixture[k] += factors.prod() / 8
    chi = ChiSquare.of(counts_of(generation.ids), mixture)
    assert chi.fits, chi


def test_random_order_is_a_uniform_permutation():
    generation = fill(EXACT, masks(ROWS), remasking="random", generator=seeded(7))
    ways = Counter(map(tuple, generation.order.tolist()))
    assert set(ways) == set(itertools.permutations(range(3)))
    assert ChiSquare.of(torch.tensor(list(ways.values())), torch.full((6,), 1 / 6)).fits


def test_entropy_order_takes_the_surest_position_first():
    """Not the most probable token: position 0 holds it, but position 1 has the lower entropy."""
    logits = torch.tensor([[0.55] + [0.45 / 8] * 8 + [0], [0.5, 0.5] + [0.0] * 8]).log()

    def predict(ids):
        return logits.roll(4, dims=-1).expand(len(ids), -1, -1)

    assert fill(predict, masks(1, 2), remasking="entropy", steps=2).order.tolist() == [[1, 0]]
    assert fill(predict, masks(1, 2), remasking="low_confidence", steps=2).order.tolist() == [[0, 1]]


def test_margin_order_takes_the_clearest_decision_first():
    """Position 1 has the larger margin, 0.3 against 0.1, though position 0 has the likelier token and the lower entropy."""
    logits = torch.tensor([[0.55, 0.45, *[0.0] * 8], [0.4, 0.1, *[0.5 / 8] * 8]]).log()

    def predict(ids):
        return torch.nn.functional.pad(logits, (4, 0), value=-math.inf).expand(len(ids), -1, -1)

    orders = {name: fill(predict, masks(1, 2), remasking=name, steps=2).order.tolist() for name in REMASKING}
    assert orders["margin"] == [[1, 0]] and orders["entropy"] == orders["low_confidence"] == [[0, 1]]


# --- Algorithm 5 and its variants, rewritten plainly ---

SCORES = {
    "low_confidence": lambda probs, token: float(probs[token]),
    "entropy": lambda probs, token: -float(torch.special.entr(probs).sum()),
    "margin": lambda probs, token: float(probs.topk(2).values @ torch.tensor([1.0, -1.0], dtype=torch.float64)),
}


def plainly(predict, template, steps, block_length=None, forbidden=(), remasking="low_confidence"):
    """Greedy decoding (LLaDA's generate.py, for low confidence), one row at a time, one loop per idea."""
    most = max(row.count(MASK) for row in template.tolist())
    block_length = block_length or most
    per_block = steps // math.ceil(most / block_length)
    all_ids, all_orders = [], []
    for row in template:
        row, order = row.clone(), [-1] * len(row)
        positions = (row == MASK).nonzero()[:, 0].tolist()
        for b in range(math.ceil(most / block_length)):
            block = positions[b * block_length : (b + 1) * block_length]
            n = len(block)
            for k in range(per_block):
                kept = n * (k + 1) // per_block - n * k // per_block
                if kept == 0:
                    continue
                logits, found = predict(row[None])[0], []
                for i in block:
                    if row[i] == MASK:
                        allowed = [v for v in range(logits.shape[-1]) if v != MASK and v not in forbidden]
                        token = max(allowed, key=lambda v, i=i: float(logits[i, v]))
                        found.append((SCORES[remasking](logits[i].double().softmax(-1), token), i, token))
                for _, i, token in sorted(found, reverse=True)[:kept]:
                    row[i], order[i] = token, b * per_block + k
        all_ids.append(row.tolist())
        all_orders.append(order)
    return all_ids, all_orders


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("remasking", SCORES)
@pytest.mark.parametrize(
    "steps, block_length, forbidden",
    [
        (6, None, ()),
        (4, None, ()),
        (1, None, ()),
        (9, None, (4, 7)),
        (5, None, (0, 2, 3, 9)),
        (6, 2, ()),
        (3, 2, (0, 2, 3)),
        (4, 3, ()),
        (12, 1, ()),
    ],
)
def test_greedy_decoding_is_the_plain_algorithm(seed, remasking, steps, block_length, forbidden):
    """Algorithm 5 for low confidence, in blocks or not."""
    predict = WrongPredictor(VOCABULARY, seed=seed)
    template = torch.randint(FIRST, VOCABULARY, (5, 8), generator=seeded(seed))
    for row in template:  # six masks a row, anywhere
        row[torch.randperm(8, generator=seeded(seed + int(row.sum())))[:6]] = MASK
    options = {"steps": steps, "block_length": block_length, "forbidden": forbidden, "remasking": remasking}
    generation = fill(predict, template, **options)
    ids, order = plainly(predict, template, **options)
    assert generation.ids.tolist() == ids and generation.order.tolist() == order


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("remasking", SCORES)
def test_rows_with_different_numbers_of_masks(steps, remasking):
    """Each row keeps its own schedule, one of them has nothing to fill."""
    predict = WrongPredictor(VOCABULARY, seed=9)
    template = torch.tensor([[1, 1, 1, 1, 1, 6], [4, 1, 5, 1, 5, 6], [4, 5, 6, 7, 8, 9], [1, 4, 4, 4, 4, 4]])
    generation = fill(predict, template, steps=steps, remasking=remasking)
    ids, order = plainly(predict, template, steps, remasking=remasking)
    assert generation.ids.tolist() == ids and generation.order.tolist() == order


# --- a strategy of one's own ---


def left_to_right(tokens, probs, masked, count):
    """The first `count` masked positions of each row."""
    return masked & (masked.cumsum(dim=1) <= count[:, None])


def hasty(tokens, probs, masked, count):
    """Everything at once."""
    return masked


def slow(tokens, probs, masked, count):
    """A single position of a single row, whatever is wanted."""
    first = torch.zeros_like(masked).flatten()
    first[masked.flatten().nonzero()[0]] = True
    return first.view_as(masked)


def careless(tokens, probs, masked, count):
    """As many as are wanted, the rightmost, and all that is not to be had besides."""
    return ~masked | (masked & (masked.flip(1).cumsum(dim=1).flip(1) <= count[:, None]))


def test_left_to_right_writes_from_left_to_right():
    template = torch.tensor([[MASK] * 6, [MASK, 5, MASK, 6, 7, MASK]])
    for steps, order in ((6, [0, 1, 2, 3, 4, 5]), (3, [0, 0, 1, 1, 2, 2]), (1, [0] * 6)):
        made = fill(WrongPredictor(VOCABULARY), template, steps=steps, remasking=left_to_right)
        assert made.order[0].tolist() == order and made.nfe == steps
        assert made.order[1][[0, 2, 5]].tolist() == sorted(made.order[1][[0, 2, 5]].tolist())


def test_left_to_right_samples_the_true_distribution():
    """The chain rule in yet another order."""
    generation = fill(EXACT, masks(ROWS), remasking=left_to_right, temperature=1.0, generator=seeded(1))
    assert ChiSquare.of(counts_of(generation.ids), TRUTH).fits
    assert generation.order.tolist() == [[0, 1, 2]] * ROWS


def test_what_a_strategy_is_told():
    """Proposals, the distributions that they came from, the candidates of the block, and the schedule's wish."""
    predict, told = WrongPredictor(VOCABULARY, seed=2), []
    template = torch.tensor([[4, MASK, MASK, MASK, 5, MASK], [MASK, MASK, 6, 7, 8, 9]])

    def watched(*arguments):
        told.append([argument.clone() for argument in arguments])
        return left_to_right(*arguments)

    made = fill(predict, template, steps=4, block_length=2, forbidden=(4, 5), remasking=watched)
    states = [made.state_after(step) for step in (-1, *made.steps())]
    wishes = [[1, 1], [1, 1], [1, 0], [1, 0]]
    assert len(told) == 4 and made.order.tolist() == [[-1, 0, 1, 2, -1, 3], [0, 1, -1, -1, -1, -1]]
    for (tokens, probs, masked, count), state, wish, block in zip(told, states, wishes, ((1, 2), (1, 2), (3, 5), (3, 5))):
        candidates = state == MASK
        candidates[0] &= torch.isin(torch.arange(6), torch.tensor(block))
        assert torch.equal(masked, candidates) and masked.dtype == torch.bool
        assert count.tolist() == wish and tokens.dtype == torch.long and probs.dtype == torch.float64
        logits = predict(state)
        assert torch.allclose(probs[masked], logits.double().softmax(-1)[masked]) and (probs[~masked] == 0).all()
        best = logits.index_fill(-1, torch.tensor([MASK, 4, 5]), -math.inf).argmax(-1)
        assert torch.equal(tokens[masked], best[masked]), "what is forbidden is not proposed"


def test_a_strategy_may_commit_more_than_is_wanted():
    predict = WrongPredictor(VOCABULARY)
    made = fill(predict, masks(4, 6), steps=6, remasking=hasty)
    assert made.nfe == predict.calls == 1 and (made.order == 0).all()
    half = fill(predict, masks(4, 6), steps=6, block_length=3, remasking=hasty)
    assert half.nfe == 2 and half.order.tolist() == [[0, 0, 0, 3, 3, 3]] * 4, "a block's steps keep their numbers"

    def two_at_once(tokens, probs, masked, count):
        return h.low_confidence(tokens, probs, masked, masked.sum(dim=1).clamp(max=2))

    ahead = fill(predict, masks(4, 6), steps=6, remasking=two_at_once)
    assert ahead.nfe == 3 and ahead.steps() == [0, 2, 4], "a step that wants nothing more costs no pass"


@pytest.mark.parametrize("steps, block_length", [(1, None), (3, None), (100, None), (2, 3), (3, 2), (4, 3), (6, 1), (60, 1)])
def test_a_strategy_may_commit_fewer_than_is_wanted(steps, block_length):
    """It gets further passes, each with a step of its own, and blocks still follow each other."""
    predict = WrongPredictor(VOCABULARY)
    made = fill(predict, masks(1, 6), steps=steps, block_length=block_length, remasking=slow)
    assert made.nfe == predict.calls == len(made.steps()) == 6
    assert made.order[0].tolist() == made.steps(), "one by one, from left to right"
    assert [int((made.state_after(step) == MASK).sum()) for step in (-1, *made.steps())] == [6, 5, 4, 3, 2, 1, 0]


def test_rows_that_fall_behind_are_waited_for():
    """One row's commit a pass is enough; the others keep what they have."""
    made = fill(WrongPredictor(VOCABULARY), masks(3, 4), steps=2, remasking=slow)
    assert made.nfe == 12 and made.order.flatten().tolist() == list(range(12))


@pytest.mark.parametrize(
    "nothing", [lambda tokens, probs, masked, count: torch.zeros_like(masked), lambda tokens, probs, masked, count: ~masked]
)
def test_a_strategy_that_commits_nothing_is_refused(nothing):
    """At once, instead of asking for ever; what is not masked cannot be committed."""
    predict = WrongPredictor(VOCABULARY)
    with pytest.raises(ValueError, match="commits nothing"):
        fill(predict, torch.tensor([[4, MASK, MASK, 5]]), remasking=nothing)
    assert predict.calls == 1


@pytest.mark.parametrize("steps, block_length", [(6, None), (4, None), (6, 2), (3, 2)])
def test_what_is_not_masked_cannot_be_committed(steps, block_length):
    predict = WrongPredictor(VOCABULARY, seed=3)
    template = torch.randint(FIRST, VOCABULARY, (5, 8), generator=seeded(3))
    template[:, 1:7] = MASK

    def careful(tokens, probs, masked, count):
        return careless(tokens, probs, masked, count) & masked

    a, b = (fill(predict, template, steps=steps, block_length=block_length, remasking=r) for r in (careless, careful))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order) and torch.equal(a.confidence, b.confidence)
    assert torch.equal(a.ids[:, [0, 7]], template[:, [0, 7]]) and (a.order[:, [0, 7]] == -1).all()


@pytest.mark.parametrize("name", ["low_confidence", "entropy", "margin", "random"])
def test_built_in_strategies_are_functions_like_any_other(name):
    """The same under their name and as a function."""
    drawn = []
    for named in (True, False):
        generator = seeded(8)
        function = h.random_order(generator) if name == "random" else getattr(h, name)
        options = {"remasking": name if named else function, "generator": generator}
        made = fill(WrongPredictor(VOCABULARY, seed=4), masks(5, 8), temperature=1.0, **options)
        drawn.append((made.ids.tolist(), made.order.tolist(), made.confidence.tolist()))
    assert drawn[0] == drawn[1]


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 10**6))
def test_highest_takes_the_best_of_each_row(rows, length, seed):
    score = torch.randn(rows, length, generator=seeded(seed))
    masked = torch.rand(rows, length, generator=seeded(seed + 1)) < 0.6
    count = (torch.rand(rows, generator=seeded(seed + 2)) * (masked.sum(dim=1) + 1)).long()
    taken = h.highest(score, masked, count)
    for i in range(rows):
        ranked = sorted(masked[i].nonzero()[:, 0].tolist(), key=lambda j, i=i: -float(score[i, j]))
        assert taken[i].nonzero()[:, 0].tolist() == sorted(ranked[: int(count[i])])


def test_highest_never_takes_more_than_there_is():
    masked = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(h.highest(torch.zeros(2, 3), masked, torch.tensor([3, 2])), masked)


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "margin", left_to_right, careless])
def test_rows_of_a_batch_do_not_touch_each_other(remasking):
    predict = WrongPredictor(VOCABULARY, seed=3)
    template = torch.where(torch.rand(12, 7, generator=seeded(3)) < 0.6, MASK, torch.randint(4, 10, (12, 7), generator=seeded(4)))
    template[:, 0] = MASK
    together = fill(predict, template, remasking=remasking, steps=4)
    for i in range(len(template)):
        alone = fill(predict, template[i : i + 1], remasking=remasking, steps=4)
        assert torch.equal(alone.ids[0], together.ids[i]) and torch.equal(alone.order[0], together.order[i])


# --- what a generation remembers ---


@pytest.mark.parametrize("remasking", [*REMASKING, left_to_right, hasty, slow])
@pytest.mark.parametrize("options", [{}, {"block_length": 3, "forbidden": (0, 4)}, {"temperature": 2.0, "top_p": 0.8}], ids=str)
def test_confidence_is_the_models_probability_at_the_pass_that_committed(remasking, options):
    """Before temperature, nucleus and what is forbidden; and 1 for what was given."""
    predict = WrongPredictor(VOCABULARY, seed=7)
    template = torch.randint(FIRST, VOCABULARY, (4, 8), generator=seeded(7))
    template[:, 2:] = MASK
    options = {"steps": 4, "temperature": 1.0, "generator": seeded(1), "remasking": remasking, **options}
    made = fill(predict, template, **options)
    assert made.confidence.dtype == torch.float32 and (made.confidence[:, :2] == 1).all()
    before = template
    for step in made.steps():
        probs = predict(before).double().softmax(-1).gather(-1, made.ids[..., None])[..., 0]
        new = made.order == step
        assert new.any() and torch.allclose(made.confidence[new].double(), probs[new], atol=1e-6)
        before = made.state_after(step)
    assert torch.equal(before, made.ids)


def test_confidences_of_one_by_one_multiply_to_the_probability():
    """The chain rule again: an exact model knows how likely what it wrote is, in whatever order it wrote it."""
    made = fill(EXACT, masks(200), remasking="random", temperature=1.0, generator=seeded(1))
    assert torch.allclose(made.confidence.double().log().sum(dim=1), EXACT.logp[EXACT.index(made.ids)], atol=1e-5)
    empty = torch.empty(200, 0, dtype=torch.long)
    made = h.generate_ar(ExactAR(EXACT), empty, 3, start_id=START, temperature=1.5, generator=seeded(1))
    assert torch.allclose(made.confidence.double().log().sum(dim=1), EXACT.logp[EXACT.index(made.ids)], atol=1e-5)


def test_steps_are_those_that_committed():
    made = fill(WrongPredictor(VOCABULARY), masks(2, 3), remasking="ancestral", steps=50, generator=seeded(0))
    assert made.steps() == sorted(set(made.order.flatten().tolist())) and len(made.steps()) == made.nfe <= 6
    for step in range(-1, 50):
        assert torch.equal(made.state_after(step) != made.state_after(step - 1), made.order == step) or step == -1
    assert fill(WrongPredictor(VOCABULARY), masks(2, 3), steps=7).steps() == [2, 4, 6]


def test_states_are_masked_with_the_callers_mask():
    made = h.Generation(torch.tensor([[4, 5, 6]]), torch.tensor([[-1, 1, 0]]), nfe=2)
    assert [made.state_after(step, mask_id=9).tolist() for step in (-1, 0, 1)] == [[[4, 9, 9]], [[4, 9, 6]], [[4, 5, 6]]]
    assert made.confidence.tolist() == [[1, 1, 1]] and made.steps() == [0, 1]


# --- properties over everything ---


@st.composite
def requests(draw):
    template, block_length, n_blocks = draw(templates(VOCABULARY))
    options = {
        "steps": n_blocks * draw(st.integers(1, 6)),
        "block_length": block_length,
        "remasking": draw(st.sampled_from([*REMASKING, left_to_right, hasty, slow, careless])),
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        "top_p": draw(st.sampled_from([1.0, 0.9, 0.3, 1e-6])),
        "forbidden": tuple(draw(st.sets(st.sampled_from([0, 2, 3, 4, 9]), max_size=5))),
    }
    return template, options, draw(st.integers(0, 99))


@given(requests())
def test_what_always_holds(request):
    template, options, seed = request
    predict = WrongPredictor(VOCABULARY, seed=seed)
    before = template.clone()
    generation = fill(predict, template, generator=seeded(seed), **options)
    given_tokens = template != MASK
    ids, order = generation.ids, generation.order
    assert ids.dtype == order.dtype == torch.long and ids.shape == order.shape == template.shape
    assert torch.equal(template, before), "the template is left alone"
    assert torch.equal(ids[given_tokens], template[given_tokens])
    filled = ids[~given_tokens]
    assert not (filled == MASK).any()
    assert not set(filled.tolist()) & set(options["forbidden"])
    assert torch.equal(order == -1, given_tokens)
    assert torch.equal(generation.state_after(-1), template)
    last = int(order.max())
    assert torch.equal(generation.state_after(last), ids)
    n = (~given_tokens).sum(dim=1)
    steps, block_length, remasking = options["steps"], options["block_length"], options["remasking"]
    assert generation.nfe == predict.calls == len(generation.steps()), "a pass that reveals nothing is not made"
    assert ((generation.confidence >= 0) & (generation.confidence <= 1)).all()
    assert (generation.confidence[given_tokens] == 1).all()
    if remasking is not slow:
        assert generation.nfe <= steps and last < steps
    if remasking in (*REMASKING, left_to_right, careless) and remasking != "ancestral":
        if block_length is None:
            for k in range(steps):
                state = generation.state_after(k)
                assert torch.equal((state == MASK).sum(dim=1), n - n * (k + 1) // steps)
        else:
            per_block = steps // (int(n.max()) // block_length)
            for k in range(steps):
                block, i = divmod(k, per_block)
                done = block * block_length + block_length * (i + 1) // per_block
                state = generation.state_after(k)
                assert torch.equal((state == MASK).sum(dim=1), (n - done).clamp(min=0))
    if block_length is not None:
        for row_order in order:  # blocks follow each other
            of_masks = row_order[row_order >= 0]
            for early, late in itertools.pairwise(of_masks.split(block_length)):
                assert int(early.max()) < int(late.min())


def test_passes_are_counted_once_each():
    """Fixed counts: steps beyond the number of masks are free."""
    for steps, nfe in [(1, 1), (2, 2), (3, 3), (7, 3), (100, 3)]:
        predict = WrongPredictor(VOCABULARY)
        assert fill(predict, masks(2), steps=steps).nfe == predict.calls == nfe
        assert predict.rows == 2 * nfe


def test_mask_is_never_predicted_even_if_it_is_likeliest():
    def predict(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[..., MASK] = 50.0
        return logits

    for temperature in (0.0, 1.0):
        assert not (fill(predict, masks(50), temperature=temperature).ids == MASK).any()


def test_same_seed_same_generation():
    predict = WrongPredictor(VOCABULARY)
    for remasking in REMASKING:
        a, b, c = (fill(predict, masks(20, 8), remasking=remasking, temperature=1.0, generator=seeded(s)) for s in (1, 1, 2))
        assert torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order)
        assert not torch.equal(a.ids, c.ids)


def small_model(causal=False, seq_len=8):
    torch.manual_seed(0)
    model = h.Transformer(h.ModelConfig(VOCABULARY, seq_len, 2, 2, 16, dropout=0.3, causal=causal))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return model


@pytest.mark.parametrize(
    "options, word",
    [
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"block_length": 4}, "block_length"),
        ({"block_length": 0}, "block_length"),
        ({"block_length": -2}, "block_length"),
        ({"block_length": 2, "steps": 4}, "steps"),
        ({"block_length": 3, "steps": 1}, "steps"),
        ({"remasking": "low-confidence"}, "low_confidence"),
        ({"remasking": None}, "low_confidence"),
        ({"template": torch.full((2, 6), 5)}, "nothing to fill"),
        ({"template": torch.full((1, 9), MASK)}, "seq_len"),
        ({"template": torch.full((6,), MASK)}, "template"),
        ({"forbidden": tuple(range(VOCABULARY))}, "forbidden"),
    ],
)
def test_errors_say_what_to_pass_instead(options, word):
    options = {"template": masks(2, 6), "steps": 6, **options}
    with pytest.raises(ValueError, match="pass") as error:
        fill(small_model(), options.pop("template"), **options)
    assert word in str(error.value)


def test_errors_come_before_any_forward_pass():
    predict = WrongPredictor(VOCABULARY)
    for options in ({"steps": 0}, {"remasking": "x"}, {"block_length": 2}):
        with pytest.raises(ValueError):
            fill(predict, masks(1), **options)
    assert predict.calls == 0


@pytest.mark.parametrize("call", [
    lambda m: fill(m, masks(1, 6)),
    lambda m: h.generate_ar(m, torch.tensor([[5]]), 3, start_id=START, temperature=0.0),
    lambda m: h.nelbo(m, torch.full((2, 4), 5), MASK, n_samples=2),
    lambda m: h.ar_nll(m, torch.full((2, 4), 5), START),
    lambda m: masked_nll(m, torch.full((2, 4), 5), torch.ones(2, 4, dtype=torch.bool), MASK),
], ids=["reverse_process", "generate_ar", "nelbo", "ar_nll", "masked_nll"])  # fmt: skip
def test_inference_makes_no_graph_and_leaves_the_mode_alone(call):
    model = small_model()
    model.train()
    modes = []
    hook = model.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    call(model)
    hook.remove()
    assert modes and set(modes) == {(False, False)}
    assert model.training and torch.is_grad_enabled()


# --- one token ---


def extremes(monkeypatch, value):
    """Let the uniform number be `value`, in whatever precision it is asked for."""

    def fake(shape, like, generator, dtype=torch.float32):
        return torch.full(shape, value, dtype=torch.float64).to(dtype)

    monkeypatch.setattr(h, "_uniform", fake)


@pytest.mark.parametrize("where", [0.0, 0.25, 0.5, 0.999])
def test_rare_tokens_are_reached(monkeypatch, where):
    """Mass 1e-9 spread over 1000 tokens after one of mass 1 - 1e-9: the inverse of the cumulative distribution, in float64,
    finds each; in float32, or with float32 uniform numbers (Gumbel or not), all of them would be unreachable."""
    logits = torch.cat((torch.tensor([0.0]), torch.full((1000,), math.log(1e-12))))[None]
    extremes(monkeypatch, 1 - 1e-9 + 1e-9 * (where + 0.0005))
    token = int(h.sample_tokens(logits, 1.0, 1.0, None))
    assert abs(token - (1 + 1000 * (where + 0.0005))) <= 1.5


def test_ends_of_the_uniform_numbers_give_possible_tokens(monkeypatch):
    """0 must not pick a leading token of probability 0, the last number below 1 not a trailing one, nor run off the end."""
    inf = math.inf
    logits = torch.tensor([[-inf, -inf, 0.3, 1.0, -0.5, -inf], [0.1, -inf, 0.2, -inf, -inf, -inf], [-inf] * 5 + [3.0]])
    extremes(monkeypatch, 0.0)
    assert h.sample_tokens(logits, 1.0, 1.0, None).tolist() == [2, 0, 5]
    extremes(monkeypatch, 1 - 2**-53)
    assert h.sample_tokens(logits, 1.0, 1.0, None).tolist() == [4, 2, 5]
    many = torch.randn(50, 3001, generator=seeded(0))  # cumulative sums that round to just below or above 1
    assert int(h.sample_tokens(many, 1.0, 1.0, None).max()) <= 3000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf, -3.0])
    tokens = h.sample_tokens(logits.expand(30_000, -1), temperature, 1.0, seeded(1))
    assert ChiSquare.of(torch.bincount(tokens, minlength=6), (logits.double() / temperature).softmax(-1)).fits


@pytest.mark.parametrize(
    "top_p, kept", [(0.3, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4), (1e-9, 1), (1, 4)]
)
def test_nucleus_is_the_smallest_set_that_holds_top_p(top_p, kept):
    """Probabilities .5 .3 .15 .05, shuffled; what stays keeps its ratios."""
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64)
    tokens = h.sample_tokens(probs.log().float().expand(20_000, -1), 1.0, top_p, seeded(2))
    nucleus = probs * torch.isin(torch.arange(4), probs.argsort(descending=True)[:kept])
    assert ChiSquare.of(torch.bincount(tokens, minlength=4), nucleus / nucleus.sum()).fits


def test_nucleus_is_taken_after_the_temperature():
    """At temperature 0.5 the same logits put 0.68 on the first token, so top_p = 0.6 keeps it alone."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    assert set(h.sample_tokens(logits, 0.5, 0.6, seeded(3)).tolist()) == {0}
    assert set(h.sample_tokens(logits, 1.0, 0.6, seeded(3)).tolist()) == {0, 1}


def test_logits_may_be_large_and_rows_differ():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 300.0, 0.0], [-math.inf, -math.inf, -9e4]])
    for temperature in (0.0, 0.1, 1.0):
        assert h.sample_tokens(logits, temperature, 1.0, seeded(0)).tolist() == [0, 1, 2]


# --- blanks in a text ---

TOKENIZER = h.CharTokenizer.from_text("abcdefgh ")


def test_infill_keeps_the_text_and_fills_each_blank_to_its_width():
    model = h.Transformer(h.ModelConfig(TOKENIZER.vocab_size, 24, 1, 2, 8)).eval()
    torch.nn.init.normal_(model.head.weight)
    texts = ["ab[__]cd[_]e", "[____]", "bad [_] cab [___]"]
    filled = h.infill(model, TOKENIZER, texts, steps=4, temperature=1.0, generator=seeded(0))
    for text, result in zip(texts, filled):
        pattern = re.sub(r"\[(_+)\]", lambda blank: f"[a-h ]{{{len(blank[1])}}}", text)
        assert re.fullmatch(pattern, result), (text, result)


def test_infill_takes_the_options_of_the_sampler():
    """Any strategy, one block a letter; what stands for no character is never written, however likely."""

    def predict(ids):  # special tokens are likeliest, then the letter that is as far in the alphabet as the blank in the text
        return torch.cat((torch.full((4, 9), 9.0), torch.eye(9))).T[: ids.shape[1]].expand(len(ids), -1, -1)

    calls = []

    def watched(*arguments):
        calls.append(arguments[3].tolist())
        return left_to_right(*arguments)

    tokenizer = h.CharTokenizer.from_text("abcdefghi")
    assert h.infill(predict, tokenizer, ["a[_]c[_]", "[__]cd"], steps=2, block_length=1, remasking=watched) == ["abcd", "abcd"]
    assert calls == [[1, 1], [1, 1]]


@pytest.mark.parametrize("text", ["ab", "", "a__b", "[]", "[_ _]"])
def test_infill_needs_a_blank(text):
    with pytest.raises(ValueError, match="no blank"):
        h.infill(EXACT, TOKENIZER, ["[_]", text], steps=1)
    with pytest.raises(ValueError, match="no texts"):
        h.infill(EXACT, TOKENIZER, [], steps=1)


def test_infill_may_be_told_what_not_to_write():
    tokenizer = h.CharTokenizer.from_text("ab")

    def surest(ids):  # of [END], then of a, then of b
        return torch.tensor([0.0, 0, 0, 9, 2, 1]).expand(*ids.shape, 6)

    special = (h.PAD_ID, h.START_ID, h.END_ID)
    assert h.infill(surest, tokenizer, ["b[_]b"], steps=1) == ["bab"]
    assert h.infill(surest, tokenizer, ["b[_]b"], steps=1, forbidden=(*special, 4)) == ["bbb"]


@pytest.mark.parametrize("steps", [8, 4, 1])
def test_the_loop_that_ours_is_timed_against_writes_the_same(steps):
    """Else `bench.py` compares nothing."""
    wrong, template = WrongPredictor(12, longest=12), masks(4, 12)
    template[:, :4] = torch.randint(4, 12, (4, 4), generator=seeded(0))

    def predict(ids):
        return wrong(ids).index_fill(-1, torch.tensor([MASK]), -math.inf)

    made = h.reverse_process(predict, template, mask_id=MASK, steps=steps)
    assert torch.equal(bench.authors_loop(predict, template, steps), made.ids)


# --- left to right ---


def first_drawn(write, **options):
    """The first token that a sampler draws 4,000 times from one distribution of eight tokens."""
    p = torch.tensor([0, 0, 0, 0, 0.15, 0.5, 0.05, 0.3], dtype=torch.float64)
    predict, options = (lambda ids: p.log().float().expand(*ids.shape, -1)), {"generator": seeded(1), **options}
    if write == "reverse_process":
        return fill(predict, masks(4000, 1), steps=1, **options).ids[:, 0]
    return h.generate_ar(predict, torch.full((4000, 1), 5), 1, start_id=START, **options).ids[:, 1]


@pytest.mark.parametrize("write", ["reverse_process", "generate_ar"])
def test_samplers_hand_on_temperature_and_nucleus(write):
    kept = torch.tensor([0, 0, 0, 0, 0, 0.5, 0, 0.3], dtype=torch.float64) ** 2
    drawn = first_drawn(write, temperature=0.5, top_p=0.8)
    assert ChiSquare.of(torch.bincount(drawn, minlength=8), kept / kept.sum()).fits


def test_ar_samples_the_true_distribution():
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    generation = h.generate_ar(ExactAR(EXACT), empty, 3, start_id=START, generator=seeded(1))
    assert ChiSquare.of(counts_of(generation.ids), TRUTH).fits
    assert generation.nfe == 3 and generation.order.tolist() == [[0, 1, 2]] * ROWS


def test_ar_continues_a_prompt():
    prompt = torch.full((ROWS, 1), FIRST + 1)
    generation = h.generate_ar(ExactAR(EXACT), prompt, 2, start_id=START, generator=seeded(2))
    fits = EXACT.sequences[:, 0] == FIRST + 1
    assert ChiSquare.of(counts_of(generation.ids), TRUTH * fits / TRUTH[fits].sum()).fits
    assert generation.order[0].tolist() == [-1, 0, 1]
    assert torch.equal(generation.state_after(-1), torch.cat((prompt, masks(ROWS, 2)), dim=1))
    assert torch.equal(generation.state_after(0)[:, :2], generation.ids[:, :2])


@pytest.mark.parametrize("prompt_length, length", [(0, 8), (1, 7), (5, 3), (7, 1)])
def test_cached_equals_uncached(prompt_length, length):
    """A function around the same model hides it, so that no cache is used; up to the full length of the model."""
    model = small_model(causal=True).eval()
    prompt = torch.randint(FIRST, VOCABULARY, (4, prompt_length), generator=seeded(0))
    passes = []

    def uncached(ids):
        passes.append(ids.shape[1])
        return model(ids)

    options = {"start_id": START, "forbidden": (0, 1, 2, 3)}
    cached, plain = (h.generate_ar(m, prompt, length, temperature=0.0, **options) for m in (model, uncached))
    assert torch.equal(cached.ids, plain.ids) and torch.equal(cached.ids[:, :prompt_length], prompt)
    assert cached.nfe == plain.nfe == len(passes) == length
    assert passes == list(range(prompt_length + 1, prompt_length + length + 1))
    sampled = [h.generate_ar(m, prompt, length, generator=seeded(5), **options).ids for m in (model, uncached)]
    assert torch.equal(*sampled)


def test_cache_asks_only_for_what_is_new():
    model = small_model(causal=True).eval()
    widths = []
    model.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    h.generate_ar(model, torch.full((1, 3), 5), 4, start_id=START)
    assert widths == [4, 1, 1, 1]


def test_ar_forbidden_tokens_are_not_produced():
    prompt = torch.full((200, 1), 4)
    forbidden = (0, 1, 2, 3, 4, 9)
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "forbidden": forbidden, "generator": seeded(0)}
        generation = h.generate_ar(WrongPredictor(VOCABULARY), prompt, 5, start_id=START, **options)
        assert not set(generation.ids[:, 1:].flatten().tolist()) & set(forbidden)
        assert (generation.ids[:, 0] == 4).all(), "a given token may be a forbidden one"


@pytest.mark.parametrize(
    "options, word",
    [
        ({"length": 0}, "length"),
        ({"length": 6}, "seq_len"),
        ({"prompt": torch.tensor([5, 6])}, "prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 2.0}, "top_p"),
        ({"forbidden": tuple(range(VOCABULARY))}, "forbidden"),
    ],
)
def test_ar_errors(options, word):
    options = {"prompt": torch.tensor([[5, 6, 7]]), "length": 2, "start_id": START, **options}
    with pytest.raises(ValueError) as error:
        h.generate_ar(small_model(causal=True), options.pop("prompt"), options.pop("length"), **options)
    assert word in str(error.value)


def test_signature_keeps_the_contract():
    """Users and held-out checks call these by name, with these defaults."""
    parameters = inspect.signature(h.reverse_process).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    contract = {"temperature": 0.0, "top_p": 1.0, "remasking": "low_confidence", "block_length": None}
    contract |= {"forbidden": (), "generator": None}
    assert contract.items() <= defaults.items()
    assert list(parameters)[:4] == ["model", "template", "mask_id", "steps"]


# --- what no model, prompt or device should do silently ---

NOT_FINITE = {"NaN": math.nan, "infinity": math.inf}


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("token", [MASK, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value, token, temperature):
    """Also where the token is one that is never produced: its value spoils the probabilities of all others."""

    def predict(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[-1, -1, token] = value
        return logits

    for remasking in REMASKING:
        with pytest.raises(ValueError, match="not finite"):
            fill(predict, masks(3), remasking=remasking, steps=1, temperature=temperature)
    with pytest.raises(ValueError, match="not finite"):
        h.generate_ar(predict, torch.full((3, 2), 5), 4, start_id=START, temperature=temperature)
    with pytest.raises(ValueError, match="not finite"):
        h.infill(predict, h.CharTokenizer.from_text("abcdef"), ["a[_]"], steps=1, temperature=temperature)


@pytest.mark.parametrize("options", [{"temperature": math.inf}, {"temperature": math.nan}, {"top_p": math.inf}], ids=str)
def test_arguments_that_are_not_finite_are_refused(options):
    with pytest.raises(ValueError, match="pass one"):
        fill(WrongPredictor(VOCABULARY), masks(2), **options)
    with pytest.raises(ValueError, match="pass one"):
        h.generate_ar(WrongPredictor(VOCABULARY), torch.full((1, 2), 5), 2, start_id=START, **options)


def test_prompts_padded_to_one_length_are_refused():
    """After the padding another text would be continued, as no column knows where its own prompt ended."""
    prompts = torch.tensor([[5, 6, 7], [5, h.PAD_ID, h.PAD_ID]])
    for model in (small_model(causal=True), WrongPredictor(VOCABULARY)):
        with pytest.raises(ValueError, match=r"without \[PAD"):
            h.generate_ar(model, prompts, 2, start_id=START)


OUTSIDE = {
    "reverse_process": lambda m, ids, x: h.reverse_process(m, ids, mask_id=x, steps=1),
    "forbidden": lambda m, ids, x: fill(m, ids, forbidden=(x,)),
    "nelbo": lambda m, ids, x: h.nelbo(m, ids, x, n_samples=1),
    "masked_nll": lambda m, ids, x: masked_nll(m, ids, ids > 5, x),
    "ar_nll": lambda m, ids, x: h.ar_nll(m, ids, x),
    "generate_ar": lambda m, ids, x: h.generate_ar(m, ids + 4, 2, start_id=x),
    "low_noise_nelbo": lambda m, ids, x: low_noise_nelbo(m, ids, x, n_samples=1),
    "any_order_nll": lambda m, ids, x: any_order_nll(m, ids, x, n_orders=1),
}


@pytest.mark.parametrize("call", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("special", [VOCABULARY, VOCABULARY + 5, -1])
def test_ids_outside_the_vocabulary_are_refused(call, special):
    ids = torch.tensor([[1, 5, 1]])
    with pytest.raises(ValueError, match="vocab_size"):
        call(small_model(causal=True), ids, special)
    with pytest.raises(ValueError, match="vocab_size"):
        call(small_model(), ids.clone().fill_(VOCABULARY), MASK)


def test_a_mask_that_a_callable_has_no_logit_for_is_refused():
    template = torch.full((1, 3), VOCABULARY)
    with pytest.raises(ValueError, match="vocab_size"):
        h.reverse_process(lambda ids: torch.zeros(*ids.shape, VOCABULARY), template, mask_id=VOCABULARY, steps=1)


INTEGERS = {**OUTSIDE, "forward_process": lambda m, ids, x: h.forward_process(ids, 0.5, x)}
INTEGERS |= {"llada_loss": lambda m, ids, x: h.llada_loss(m, ids, x), "loss": lambda m, ids, x: h.next_token_loss(m, ids, x)}
INTEGERS["diffusion_batch"] = lambda m, ids, x: h.diffusion_batch(ids, mask_id=x)


@pytest.mark.parametrize("call", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.uint8])
def test_other_integers_are_refused_by_name(call, kind):
    with pytest.raises(ValueError, match="LongTensor"):
        call(small_model(), torch.tensor([[1, 5, 1]]).to(kind), MASK)


# --- blocks are a strategy around a strategy ---


@pytest.mark.parametrize("remasking", [*REMASKING, left_to_right, hasty, slow])
@pytest.mark.parametrize("rows", ["even", "ragged"])
def test_block_length_is_short_for_blockwise(remasking, rows):
    template = masks(3, 8)
    if rows == "ragged":
        template[1, 2:6], template[2, :2] = 5, 6
    made = []
    for explicit in (True, False):
        generator = seeded(3)
        strategy = h.named_strategy(remasking, generator)
        blocks = {"remasking": h.blockwise(strategy, 2)} if explicit else {"remasking": remasking, "block_length": 2}
        made.append(fill(WrongPredictor(VOCABULARY), template, steps=8, temperature=1.0, generator=generator, **blocks))
    assert torch.equal(made[0].ids, made[1].ids) and torch.equal(made[0].order, made[1].order)


def test_blockwise_by_itself_shows_its_strategy_the_first_block_that_is_left():
    masked = torch.tensor([[True, False, True, True, True], [False, True, True, False, False], [False] * 5])
    seen = []

    def watched(tokens, probs, masked, count):
        seen.append((masked.tolist(), count.tolist()))
        return masked

    stay = h.blockwise(watched, 3)(masked.long(), torch.zeros(3, 5, 4), masked, torch.tensor([4, 1, 0]))
    opened = [[True, False, False, False, False], [False, True, True, False, False], [False] * 5]
    assert seen == [(opened, [1, 1, 0])] and stay.tolist() == opened


@pytest.mark.parametrize("length, steps, word", [(4, 6, "block_length"), (0, 6, "block_length"), (2, 4, "steps")])
def test_blockwise_refuses_what_does_not_divide(length, steps, word):
    predict = WrongPredictor(VOCABULARY)
    with pytest.raises(ValueError, match=f"{word}.*pass"):
        fill(predict, masks(2, 6), steps=steps, remasking=h.blockwise(h.entropy, length))
    assert predict.calls == 0


def test_a_model_that_is_asked_on_another_device_keeps_its_cache():
    """What stands between sampler and model forwards what a cache needs, and the model is found behind it."""
    model, widths = small_model(causal=True).eval(), []
    elsewhere = functools.wraps(model)(lambda ids, **options: widths.append(ids.shape[1]) or model(ids, **options))
    options = {"start_id": START, "temperature": 0.0}
    made, plain = (h.generate_ar(m, torch.full((1, 3), 5), 4, **options).ids for m in (elsewhere, model))
    assert torch.equal(made, plain) and widths == [4, 1, 1, 1]


@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_device_without_float64_gives_the_same_tokens(remasking, temperature):
    """Apple's GPUs: the model is asked there, the arithmetic in float64 is done on the CPU."""
    predict, template = WrongPredictor(VOCABULARY, seed=1), masks(4, 6)
    options = {"remasking": remasking, "temperature": temperature, "steps": 3, "top_p": 0.9}
    made = fill(predict, template, generator=seeded(1), **options)
    with WithoutFloat64():
        there = fill(on_apple(predict), template.to("mps"), generator=seeded(1), **options)
        assert torch.equal(made.ids, there.ids.cpu()) and torch.equal(made.order, there.order.cpu())


def test_a_device_without_float64_gives_the_same_likelihoods():
    rows, predict = torch.tensor([[4, 5, 6], [6, 4, 4]]), WrongPredictor(VOCABULARY)
    ids, options = [torch.tensor(x) for x in ([4, 5], [6], [7])], {"n_samples": 4}
    with WithoutFloat64():
        for bound in (h.nelbo, low_noise_nelbo):
            here = bound(predict, rows, MASK, generator=seeded(1), **options)
            there = bound(on_apple(predict), rows.to("mps"), MASK, generator=seeded(1), **options)
            assert torch.equal(here, there.cpu())
        here = choose(predict, ids[0], ids[1:], MASK, generator=seeded(1), **options)
        prompt, *answers = (x.to("mps") for x in ids)
        assert here == choose(on_apple(predict), prompt, answers, MASK, generator=seeded(1), **options)


def test_ar_on_a_device_without_float64():
    prompt, options = torch.tensor([[5, 6]]), {"start_id": START}
    here = h.generate_ar(WrongPredictor(VOCABULARY), prompt, 4, generator=seeded(1), **options)
    with WithoutFloat64():
        there = h.generate_ar(on_apple(WrongPredictor(VOCABULARY)), prompt.to("mps"), 4, generator=seeded(1), **options)
        assert torch.equal(here.ids, there.ids.cpu())
