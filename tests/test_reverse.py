"""Section 6: samplers against enumerated distributions and against plain-Python rewritings."""

import inspect
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import FIRST, MASK, START, ChiSquare, ExactAR, ExactPredictor, WrongPredictor

import llada_helpers as h

EXACT = ExactPredictor(length=3, symbols=3)
TRUTH = EXACT.logp.exp()
VOCABULARY = 10
ROWS = 6000
FIXED = ("low_confidence", "random", "entropy")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def fill(model, template, **options):
    options = {"mask_id": MASK, "steps": 3, **options}
    return h.reverse_process(model, template, **options)


def masks(rows, length=3):
    return torch.full((rows, length), MASK)


def counts_of(ids):
    return torch.bincount(EXACT.index(ids), minlength=len(TRUTH))


# --- distributions ---


@pytest.mark.parametrize("remasking", ["random", "entropy"])
def test_one_token_a_step_samples_the_true_distribution(remasking):
    """The order may depend on what is visible, never on what is drawn: then the chain rule is exact."""
    generation = fill(EXACT, masks(ROWS), remasking=remasking, temperature=1.0, generator=seeded(1))
    chi = ChiSquare.of(counts_of(generation.ids), TRUTH)
    assert chi.fits, chi


def test_all_at_once_samples_the_product_of_marginals():
    """And that differs from the truth: the chi-square test has power at this size."""
    generation = fill(EXACT, masks(ROWS), remasking="random", steps=1, temperature=1.0, generator=seeded(2))
    marginals = EXACT(masks(1))[0].double().exp()
    product = torch.stack([marginals[range(3), s].prod() for s in EXACT.sequences])
    counts = counts_of(generation.ids)
    assert ChiSquare.of(counts, product).fits
    assert not ChiSquare.of(counts, TRUTH).fits


@pytest.mark.parametrize("remasking", ["random", "entropy", "ancestral"])
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


# --- Algorithm 5 and its variants, rewritten plainly ---


def plain_algorithm_5(predict, template, steps, block_length, cfg_scale, forbidden):
    """Greedy low-confidence decoding, one row at a time, one loop per idea."""
    most = max(row.count(MASK) for row in template.tolist())
    block_length = block_length or most
    n_blocks = math.ceil(most / block_length)
    per_block = steps // n_blocks
    all_ids, all_orders = [], []
    for row in template:
        row, order = row.clone(), [-1] * len(row)
        given = row != MASK
        positions = (~given).nonzero()[:, 0].tolist()
        for b in range(n_blocks):
            block = positions[b * block_length : (b + 1) * block_length]
            n = len(block)
            for k in range(per_block):
                kept = n * (k + 1) // per_block - n * k // per_block
                if kept == 0:
                    continue
                logits = predict(row[None])[0]
                if cfg_scale:
                    blind = row.clone()
                    blind[given] = MASK
                    unconditional = predict(blind[None])[0]
                    logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
                found = []
                for i in block:
                    if row[i] == MASK:
                        allowed = [v for v in range(logits.shape[-1]) if v != MASK and v not in forbidden]
                        token = max(allowed, key=lambda v, i=i: float(logits[i, v]))
                        found.append((float(logits[i].double().softmax(-1)[token]), i, token))
                for _, i, token in sorted(found, reverse=True)[:kept]:
                    row[i], order[i] = token, b * per_block + k
        all_ids.append(row.tolist())
        all_orders.append(order)
    return all_ids, all_orders


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "steps, block_length, cfg_scale, forbidden",
    [
        (6, None, 0.0, ()),
        (4, None, 0.0, ()),
        (1, None, 0.0, ()),
        (9, None, 0.0, (4, 7)),
        (6, 2, 0.0, ()),
        (3, 2, 0.0, (0, 2, 3)),
        (4, 3, 0.5, ()),
        (5, None, 2.0, (0, 2, 3, 9)),
        (12, 1, 1.0, ()),
    ],
)
def test_greedy_low_confidence_is_algorithm_5(seed, steps, block_length, cfg_scale, forbidden):
    predict = WrongPredictor(VOCABULARY, seed=seed)
    template = torch.randint(FIRST, VOCABULARY, (5, 8), generator=seeded(seed))
    for row in template:  # six masks a row, anywhere
        row[torch.randperm(8, generator=seeded(seed + int(row.sum())))[:6]] = MASK
    generation = fill(predict, template, steps=steps, block_length=block_length, cfg_scale=cfg_scale, forbidden=forbidden)
    ids, order = plain_algorithm_5(predict, template, steps, block_length, cfg_scale, forbidden)
    assert generation.ids.tolist() == ids and generation.order.tolist() == order


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_rows_with_different_numbers_of_masks(steps):
    """Each row keeps its own schedule, one of them has nothing to fill."""
    predict = WrongPredictor(VOCABULARY, seed=9)
    template = torch.tensor([[1, 1, 1, 1, 1, 6], [4, 1, 5, 1, 5, 6], [4, 5, 6, 7, 8, 9], [1, 4, 4, 4, 4, 4]])
    generation = fill(predict, template, steps=steps)
    ids, order = plain_algorithm_5(predict, template, steps, None, 0.0, ())
    assert generation.ids.tolist() == ids and generation.order.tolist() == order


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy"])
@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_rows_of_a_batch_do_not_touch_each_other(remasking, threshold, cfg_scale):
    predict = WrongPredictor(VOCABULARY, seed=3)
    template = torch.where(torch.rand(12, 7, generator=seeded(3)) < 0.6, MASK, torch.randint(4, 10, (12, 7), generator=seeded(4)))
    template[:, 0] = MASK
    options = {"remasking": remasking, "threshold": threshold, "cfg_scale": cfg_scale, "steps": 4}
    together = fill(predict, template, **options)
    for i in range(len(template)):
        alone = fill(predict, template[i : i + 1], **options)
        assert torch.equal(alone.ids[0], together.ids[i]) and torch.equal(alone.order[0], together.order[i])


# --- properties over everything ---


@st.composite
def requests(draw):
    length = draw(st.integers(1, 8))
    token = st.integers(0, VOCABULARY - 1).filter(lambda v: v != MASK)
    block_length = draw(st.one_of(st.none(), st.integers(1, 3)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.lists(token, min_size=length, max_size=length))
        n = draw(st.integers(0, length))
        n -= n % (block_length or 1)
        for i in draw(st.permutations(range(length)))[:n]:
            row[i] = MASK
        rows.append(row)
    template = torch.tensor(rows)
    most = int((template == MASK).sum(dim=1).max())
    if most == 0:
        template[0, :] = MASK
        most, block_length = length, None
    n_blocks = 1 if block_length is None else most // block_length
    options = {
        "steps": n_blocks * draw(st.integers(1, 6)),
        "block_length": block_length,
        "remasking": draw(st.sampled_from(h.REMASKING)),
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        "top_p": draw(st.sampled_from([1.0, 0.9, 0.3, 1e-6])),
        "threshold": draw(st.sampled_from([None, None, 0.0, 0.3, 0.9, 1.0])),
        "cfg_scale": draw(st.sampled_from([0.0, 0.0, 1.0])),
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
    steps, block_length, threshold = options["steps"], options["block_length"], options["threshold"]
    assert generation.nfe == predict.calls
    if threshold is None:
        assert generation.nfe <= steps and last < steps
        assert generation.nfe == len(set(order[order >= 0].tolist())), "a pass that reveals nothing is not made"
    else:
        assert generation.nfe == last + 1 <= int(n.max()), "at least one token for each pass"
        for row_order, row_n in zip(order, n):
            revealed_at = sorted(set(row_order[row_order >= 0].tolist()))
            if block_length is None:
                assert revealed_at == list(range(len(revealed_at))), "at least one a pass in each row until it is full"
            assert len(revealed_at) <= int(row_n)
    if threshold is None and options["remasking"] != "ancestral":
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
    """Fixed counts: steps beyond the number of masks are free; guidance is one pass of twice the rows."""
    for steps, nfe in [(1, 1), (2, 2), (3, 3), (7, 3), (100, 3)]:
        predict = WrongPredictor(VOCABULARY)
        assert fill(predict, masks(2), steps=steps).nfe == predict.calls == nfe
    predict = WrongPredictor(VOCABULARY)
    assert fill(predict, masks(2), cfg_scale=1.0).nfe == 3
    assert predict.rows == 3 * 2 * 2


def test_threshold_reveals_everything_above_it_and_at_least_one():
    predict = WrongPredictor(VOCABULARY, seed=5)
    template = masks(1, 8)
    assert fill(predict, template, threshold=0.0).nfe == 1
    never = fill(predict, template, threshold=1.0)
    assert never.nfe == 8 and sorted(never.order[0].tolist()) == list(range(8))
    threshold = 0.5
    generation = fill(predict, template, threshold=threshold)
    state = template.clone()
    for k in range(generation.nfe):
        logits = predict(state)[0].clone()
        confidence = logits.double().softmax(-1)
        logits[:, MASK] = -math.inf
        tokens = logits.argmax(-1)
        chosen = confidence[range(8), tokens].masked_fill(state[0] != MASK, -1)
        expected = chosen > threshold
        expected[chosen.argmax()] = True
        assert torch.equal(generation.order[0] == k, expected)
        assert torch.equal(generation.ids[0, expected], tokens[expected])
        state = generation.state_after(k)


def test_no_guidance_is_zero_guidance():
    predict, template = WrongPredictor(VOCABULARY, seed=6), torch.tensor([[4, 1, 1, 5, 1, 1]])
    plain, zero, strong = (fill(predict, template, steps=4, **o) for o in ({}, {"cfg_scale": 0.0}, {"cfg_scale": 3.0}))
    assert torch.equal(plain.ids, zero.ids) and torch.equal(plain.order, zero.order)
    assert not torch.equal(plain.ids, strong.ids)


def test_guidance_keeps_impossible_tokens_impossible():
    """-inf - -inf is NaN; what the conditional pass rules out must stay out."""
    template = torch.tensor([[FIRST, MASK, MASK]]).repeat(200, 1)
    generation = fill(EXACT, template, cfg_scale=2.0, temperature=1.0, steps=2, generator=seeded(0))
    assert bool((generation.ids >= FIRST).all())


def test_guided_distribution_is_that_of_the_formula():
    """One mask: its distribution is softmax(un + (w + 1) (cond - un)), un seeing none of what was given."""
    template = torch.tensor([[FIRST, FIRST + 1, MASK]]).repeat(ROWS, 1)
    generation = fill(EXACT, template, cfg_scale=0.7, temperature=1.0, steps=1, generator=seeded(8))
    conditional, unconditional = EXACT(template[:1])[0, 2, FIRST:], EXACT(masks(1))[0, 2, FIRST:]
    probs = (unconditional + 1.7 * (conditional - unconditional)).double().softmax(-1)
    assert ChiSquare.of(torch.bincount(generation.ids[:, 2] - FIRST, minlength=3), probs).fits
    assert not ChiSquare.of(torch.bincount(generation.ids[:, 2] - FIRST, minlength=3), conditional.double().exp()).fits


def test_mask_is_never_predicted_even_if_it_is_likeliest():
    def predict(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[..., MASK] = 50.0
        return logits

    for temperature in (0.0, 1.0):
        assert not (fill(predict, masks(50), temperature=temperature).ids == MASK).any()


def test_same_seed_same_generation():
    predict = WrongPredictor(VOCABULARY)
    for remasking in h.REMASKING:
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
], ids=["reverse_process", "generate_ar", "nelbo", "ar_nll"])  # fmt: skip
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


# --- left to right ---


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
    contract |= {"threshold": None, "cfg_scale": 0.0, "forbidden": (), "generator": None}
    assert contract.items() <= defaults.items()
    assert list(parameters)[:4] == ["model", "template", "mask_id", "steps"]
