"""beyond.spacing: how many, which and how far apart, against plain rewritings and enumeration; and what is drawn one by one."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import FIRST, MASK, ChiSquare, ExactPredictor, WrongPredictor, fill, masks, seeded, templates

import llada_helpers as h
from beyond.spacing import bit_reversed, spaced

EXACT = ExactPredictor(length=3, symbols=3)
TRUTH = EXACT.logp.exp()
VOCABULARY = 10
ROWS = 6000
BY = {"entropy": h.entropy, "margin": h.margin, "low_confidence": h.low_confidence, "bit_reversed": bit_reversed}


def places(taken):
    return [row.nonzero()[:, 0].tolist() for row in taken]


@st.composite
def passes(draw, longest=24):
    """What a strategy is told: proposals, distributions, masks, and at most as many wanted as there are masks."""
    rows, length, seed = draw(st.integers(1, 4)), draw(st.integers(1, longest)), draw(st.integers(0, 10**6))
    probs = (2 * torch.randn(rows, length, 6, generator=seeded(seed), dtype=torch.float64)).softmax(-1)
    masked = torch.rand(rows, length, generator=seeded(seed + 1)) < draw(st.floats(0.1, 1))
    count = (torch.rand(rows, generator=seeded(seed + 2)) * (masked.sum(dim=1) + 1)).long()
    return probs.argmax(-1), probs, masked, count


@pytest.mark.parametrize("name", ["bit_reversed", *BY, "random"])
@given(asked=passes(), distance=st.integers(1, 30))
def test_exactly_as_many_are_committed_as_are_wanted(name, asked, distance):
    """However near they must then be; and only where there is a mask."""
    *_, masked, count = asked
    strategy = spaced(distance, BY.get(name, h.random_order(seeded(0))))
    for taken in (strategy(*asked), bit_reversed(*asked)):
        assert taken.dtype == torch.bool and not (taken & ~masked).any() and torch.equal(taken.sum(dim=1), count)


@pytest.mark.parametrize("strategy", [bit_reversed, spaced(1), spaced(3), spaced(99)])
@given(case=templates(VOCABULARY), data=st.data())
def test_no_pass_is_added(strategy, case, data):
    template, block_length, n_blocks = case
    steps = n_blocks * data.draw(st.integers(1, 4))
    options = {"steps": steps, "block_length": block_length}
    made, known = (fill(WrongPredictor(VOCABULARY), template, remasking=r, **options) for r in (strategy, "entropy"))
    assert made.nfe == known.nfe and not (made.ids == MASK).any()
    for step in range(steps):
        assert torch.equal((made.order == step).sum(dim=1), (known.order == step).sum(dim=1))


# --- a minimum distance ---


def plainly_spaced(entropy, masked, count, distance):
    """Row by row: the lowest entropy among those far enough from all taken before, or among the farthest."""
    taken = []
    while len(taken) < count:
        gap = {i: min([distance, *(abs(i - j) for j in taken)]) for i in range(len(masked)) if masked[i] and i not in taken}
        taken.append(min((i for i in gap if gap[i] == max(gap.values())), key=lambda i: float(entropy[i])))
    return sorted(taken)


@given(asked=passes(), distance=st.integers(1, 30))
def test_lowest_entropies_that_are_far_enough_or_farthest(asked, distance):
    _, probs, masked, count = asked
    expected = [
        plainly_spaced(torch.special.entr(p).sum(dim=-1), m.tolist(), int(n), distance) for p, m, n in zip(probs, masked, count)
    ]
    assert places(spaced(distance)(*asked)) == expected


def nearest(taken):
    return [min((b - a for a, b in itertools.pairwise(row)), default=99) for row in places(taken)]


@pytest.mark.parametrize("name", BY)
@given(asked=passes(longest=40), distance=st.integers(1, 6))
def test_the_distance_is_kept_wherever_it_can_be(name, asked, distance):
    """A position takes away fewer than two distances of masks, whichever `by` prefers: so many always find room."""
    tokens, probs, masked, count = asked
    count = count.minimum(-(-masked.sum(dim=1) // (2 * distance - 1)))
    assert min(nearest(spaced(distance, BY[name])(tokens, probs, masked, count))) >= distance


@given(asked=passes(longest=9))
def test_farthest_first_is_within_a_factor_of_two_of_the_best(asked):
    _, _, masked, count = asked
    for found, row, n in zip(nearest(spaced(99)(*asked)), masked, count.tolist()):
        sets = itertools.combinations(row.nonzero()[:, 0].tolist(), n)
        best = max(min((b - a for a, b in itertools.pairwise(some)), default=99) for some in sets)
        assert best <= 2 * found


@pytest.mark.parametrize("name", BY)
@given(asked=passes())
def test_without_a_distance_it_is_the_strategy_itself(name, asked):
    assert torch.equal(spaced(1, BY[name])(*asked), BY[name](*asked))


@pytest.mark.parametrize("name", BY)
def test_one_by_one_it_is_the_strategy_itself(name):
    template, options = masks(5, 8), {"steps": 8, "temperature": 1.0}
    made = [
        fill(WrongPredictor(VOCABULARY, seed=4), template, remasking=r, generator=seeded(1), **options)
        for r in (BY[name], spaced(5, BY[name]))
    ]
    assert torch.equal(made[0].ids, made[1].ids) and torch.equal(made[0].order, made[1].order)


def test_neighbours_wait_for_another_pass():
    """The entropy order decides the three sure ones together; spaced, each pass takes one of them and one from afar."""
    sureness = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])

    def predict(ids):
        return (sureness[:, None] * torch.eye(VOCABULARY)[FIRST]).expand(len(ids), -1, -1)

    assert fill(predict, masks(1, 6), steps=2, remasking="entropy").order.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert fill(predict, masks(1, 6), steps=2, remasking=spaced(2)).order.tolist() == [[0, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("distance", [0, -1])
def test_distance_begins_at_one(distance):
    with pytest.raises(ValueError, match="pass at least 1"):
        spaced(distance)


# --- bit-reversed positions ---


def order_of(length, steps=None):
    return fill(
        WrongPredictor(VOCABULARY, longest=length), masks(1, length), steps=steps or length, remasking=bit_reversed
    ).order[0]


def test_the_order_is_van_der_corputs():
    """n-th position / length = the digits of n behind the point, reversed."""
    for bits in range(1, 7):
        corput = [sum(int(digit) / 2 ** (k + 1) for k, digit in enumerate(reversed(f"{n:b}"))) for n in range(2**bits)]
        assert order_of(2**bits).argsort().tolist() == [round(x * 2**bits) for x in corput]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 16))
def test_gaps_differ_by_at_most_a_factor_of_two(length, filled, prompt):
    """At every moment, for every length, behind a prompt: gaps between neighbours that are filled."""
    masked = torch.arange(length + prompt)[None] >= prompt
    probs, count = torch.full((*masked.shape, 2), 0.5), torch.tensor([min(filled, length)])
    (taken,) = places(bit_reversed(masked.long(), probs, masked, count))
    gaps = [b - a for a, b in itertools.pairwise(taken)]
    assert max(gaps, default=0) <= 2 * min(gaps, default=0)


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_order_does_not_depend_on_the_passes(length, steps):
    """A pass goes on where the last one stopped, though it sees other masks than that one."""
    one_by_one, together = order_of(length), order_of(length, steps)
    assert (together[one_by_one.argsort()].diff() >= 0).all()


@given(asked=passes())
def test_the_model_is_not_asked(asked):
    tokens, probs, masked, count = asked
    taken = bit_reversed(tokens, probs, masked, count)
    assert torch.equal(taken, bit_reversed(tokens.flip(1), probs.flip(0, 1, 2), masked, count))


# --- what is drawn ---


@pytest.mark.parametrize("strategy", [bit_reversed, spaced(2), spaced(3, h.margin), spaced(2, bit_reversed)])
def test_one_by_one_the_true_distribution_is_drawn(strategy):
    """The order may depend on what is visible, never on what is drawn: then the chain rule is exact."""
    made = fill(EXACT, masks(ROWS), remasking=strategy, temperature=1.0, generator=seeded(1))
    chi = ChiSquare.of(torch.bincount(EXACT.index(made.ids), minlength=len(TRUTH)), TRUTH)
    assert chi.fits, chi


def test_spacing_what_looks_at_the_drawn_value_stays_biased():
    made = fill(EXACT, masks(ROWS), remasking=spaced(2, h.low_confidence), temperature=1.0, generator=seeded(1))
    assert not ChiSquare.of(torch.bincount(EXACT.index(made.ids), minlength=len(TRUTH)), TRUTH).fits


def test_two_at_once_draw_the_product_of_their_conditionals():
    """Bit-reversed, the three places are filled as 0, then 2 and 1 together."""
    made = fill(EXACT, masks(ROWS), remasking=bit_reversed, steps=2, temperature=1.0, generator=seeded(2))
    assert made.order.tolist() == [[0, 1, 1]] * ROWS
    ids, product = EXACT.sequences, EXACT(masks(1))[0, 0, EXACT.sequences[:, 0]].double().exp()
    conditional = EXACT(ids.masked_fill(torch.tensor([False, True, True]), MASK)).double().exp()
    for place in (1, 2):
        product = product * conditional[range(len(ids)), place, ids[:, place]]
    counts = torch.bincount(EXACT.index(made.ids), minlength=len(TRUTH))
    assert ChiSquare.of(counts, product).fits and not ChiSquare.of(counts, TRUTH).fits


@pytest.mark.parametrize("strategy", [bit_reversed, spaced(2), spaced(4, h.low_confidence)])
def test_rows_of_a_batch_do_not_touch_each_other(strategy):
    predict = WrongPredictor(VOCABULARY, seed=3)
    data = torch.randint(FIRST, VOCABULARY, (12, 8), generator=seeded(4))
    template = torch.where(torch.rand(12, 8, generator=seeded(3)) < 0.6, MASK, data)
    template[:, 0] = MASK
    together = fill(predict, template, remasking=strategy)
    for i in range(len(template)):
        alone = fill(predict, template[i : i + 1], remasking=strategy)
        assert torch.equal(alone.ids[0], together.ids[i]) and torch.equal(alone.order[0], together.order[i])
