"""beyond.decoding: guidance, cache, adaptive and late commits, revision, against enumeration and plain-Python rewritings."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import FIRST, MASK, ChiSquare, ExactPredictor, WrongPredictor, fill, masks, seeded, templates, with_noise

import llada_helpers as h
from beyond import decoding as d
from beyond.decoding import bit_reversed, spaced

EXACT = ExactPredictor(length=3, symbols=3)
VOCABULARY = 10
ROWS = 4000
STRATEGIES = ("low_confidence", "random", "entropy", "margin", "ancestral")


def counts_of(ids):
    return torch.bincount(EXACT.index(ids), minlength=len(EXACT.sequences))


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = h.Transformer(h.ModelConfig(vocab_size=12, seq_len=24, n_layer=2, n_head=2, n_embd=16)).eval()
    with_noise(model, 0.3)
    return model


# --- guidance ---


def test_guidance_is_one_pass_of_twice_the_rows():
    predict, template = WrongPredictor(VOCABULARY), masks(2)
    assert fill(d.guided(predict, template != MASK, 1.0), template).nfe == predict.calls == 3
    assert predict.rows == 3 * 2 * 2


@pytest.mark.parametrize("remasking", STRATEGIES)
def test_zero_guidance_is_the_model_itself(remasking):
    template = torch.tensor([[4, 1, 1, 5, 1, 1], [1, 1, 6, 1, 1, 7]])
    drawn = []
    for w in (None, 0.0, 1.0):
        predict = WrongPredictor(VOCABULARY, seed=6)
        model = predict if w is None else d.guided(predict, template != MASK, w)
        options = {"steps": 4, "temperature": 1.0, "remasking": remasking, "generator": seeded(3)}
        drawn.append((fill(model, template, **options), predict.rows))
    (plain, rows), (zero, rows_of_zero), (strong, _) = drawn
    assert torch.equal(plain.ids, zero.ids) and torch.equal(plain.order, zero.order) and rows == rows_of_zero == 2 * plain.nfe
    assert not torch.equal(plain.ids, strong.ids)


def test_guidance_keeps_impossible_tokens_impossible():
    """-inf - -inf is NaN; what the conditional pass rules out must stay out."""
    template = torch.tensor([[FIRST, MASK, MASK]]).repeat(200, 1)
    model = d.guided(EXACT, template != MASK, 2.0)
    assert not model(template).isnan().any() and model(template).isneginf().any()
    generation = fill(model, template, temperature=1.0, steps=2, generator=seeded(0))
    assert bool((generation.ids >= FIRST).all())


def test_guided_distribution_is_that_of_the_formula():
    """One mask: its distribution is softmax(un + (w + 1) (cond - un)), un seeing none of what was given."""
    template = torch.tensor([[FIRST, FIRST + 1, MASK]]).repeat(ROWS, 1)
    model = d.guided(EXACT, template[:1] != MASK, 0.7)
    generation = fill(model, template, temperature=1.0, steps=1, generator=seeded(8))
    conditional, unconditional = EXACT(template[:1])[0, 2, FIRST:], EXACT(masks(1))[0, 2, FIRST:]
    probs = (unconditional + 1.7 * (conditional - unconditional)).double().softmax(-1)
    assert ChiSquare.of(torch.bincount(generation.ids[:, 2] - FIRST, minlength=3), probs).fits
    assert not ChiSquare.of(torch.bincount(generation.ids[:, 2] - FIRST, minlength=3), conditional.double().exp()).fits


def plainly_guided(predict, template, steps, block_length, w, forbidden):
    """Greedy low-confidence decoding (Algorithm 5) with guidance, one row at a time, one loop per idea."""
    most = max(row.count(MASK) for row in template.tolist())
    block_length = block_length or most
    per_block = steps // math.ceil(most / block_length)
    all_ids, all_orders = [], []
    for row in template:
        row, order = row.clone(), [-1] * len(row)
        hidden = row != MASK
        positions = (~hidden).nonzero()[:, 0].tolist()
        for b in range(math.ceil(most / block_length)):
            block = positions[b * block_length : (b + 1) * block_length]
            for k in range(per_block):
                kept = len(block) * (k + 1) // per_block - len(block) * k // per_block
                conditional, unconditional = predict(row[None])[0], predict(row.masked_fill(hidden, MASK)[None])[0]
                logits = unconditional + (w + 1) * (conditional - unconditional)
                found = []
                for i in (i for i in block if row[i] == MASK):
                    allowed = [v for v in range(logits.shape[-1]) if v != MASK and v not in forbidden]
                    token = max(allowed, key=lambda v, i=i: float(logits[i, v]))
                    found.append((float(logits[i].double().softmax(-1)[token]), i, token))
                for _, i, token in sorted(found, reverse=True)[:kept]:
                    row[i], order[i] = token, b * per_block + k
        all_ids.append(row.tolist())
        all_orders.append(order)
    return all_ids, all_orders


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "steps, block_length, w, forbidden", [(4, 3, 0.5, ()), (5, None, 2.0, (0, 2, 3, 9)), (12, 1, 1.0, ()), (6, 2, 0.3, (4, 7))]
)
def test_guided_greedy_decoding_is_algorithm_5(seed, steps, block_length, w, forbidden):
    predict = WrongPredictor(VOCABULARY, seed=seed)
    template = torch.randint(FIRST, VOCABULARY, (5, 8), generator=seeded(seed))
    for row in template:  # six masks a row, anywhere
        row[torch.randperm(8, generator=seeded(seed + int(row.sum())))[:6]] = MASK
    model = d.guided(predict, template != MASK, w)
    generation = fill(model, template, steps=steps, block_length=block_length, forbidden=forbidden)
    ids, order = plainly_guided(predict, template, steps, block_length, w, forbidden)
    assert generation.ids.tolist() == ids and generation.order.tolist() == order


def test_given_may_be_one_row_or_a_function():
    predict, ids = WrongPredictor(VOCABULARY), torch.tensor([[4, MASK, MASK], [5, MASK, 6]])
    prompt = torch.tensor([[True, False, False]])
    each = d.guided(predict, prompt.expand(2, -1), 1.0)(ids)
    assert torch.equal(each, d.guided(predict, prompt, 1.0)(ids))
    by_rule = d.guided(predict, lambda ids: torch.arange(ids.shape[1])[None] < 1, 1.0)
    assert torch.equal(each, by_rule(ids)) and by_rule(ids[:, :2]).shape == (2, 2, VOCABULARY)


@pytest.mark.parametrize("w", [-0.1, -1.0, math.nan, math.inf, -math.inf])
def test_strength_is_a_number_from_zero(w):
    with pytest.raises(ValueError, match="pass"):
        d.guided(EXACT, torch.ones(1, 3, dtype=torch.bool), w)


@pytest.mark.parametrize("shape, dtype", [((2, 3), bool), ((4, 2), bool), ((1, 4), bool), ((3,), bool), ((4, 3), int)])
def test_given_must_fit_the_rows(shape, dtype):
    """Two rows do not stand for four, though they would divide them: which rows were repeated, and how, is not to be guessed."""
    model = d.guided(EXACT, torch.ones(shape).to(dtype=torch.bool if dtype is bool else torch.long), 1.0)
    with pytest.raises(ValueError, match="pass"):
        model(masks(4))


@pytest.mark.parametrize("wrap", [
    lambda m, t: d.guided(m, t != MASK, 1.0),
    lambda m, t: d.cached(m, t, MASK, 2),
], ids=["guided", "cached"])  # fmt: skip
def test_wrapped_models_run_in_evaluation_mode(wrap):
    """The sampler cannot see through a function that there is dropout to switch off."""
    model = h.Transformer(h.ModelConfig(VOCABULARY, 8, 1, 2, 8, dropout=0.5)).train()
    modes = []
    hook = model.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    wrap(model, masks(1, 4))(masks(1, 4))
    hook.remove()
    assert modes == [(False, False)] and model.training


# --- how many at once ---


def test_threshold_reveals_everything_above_it_and_at_least_one():
    predict = WrongPredictor(VOCABULARY, seed=5)
    template = masks(1, 8)
    assert fill(predict, template, steps=1, remasking=d.threshold(0.0)).nfe == 1
    never = fill(predict, template, steps=1, remasking=d.threshold(1.0))
    assert never.nfe == 8 and sorted(never.order[0].tolist()) == list(range(8))
    generation = fill(predict, template, steps=1, remasking=d.threshold(0.5))
    state = template.clone()
    for k in range(generation.nfe):
        logits = predict(state)[0].clone()
        confidence = logits.double().softmax(-1)
        logits[:, MASK] = -math.inf
        tokens = logits.argmax(-1)
        chosen = confidence[range(8), tokens].masked_fill(state[0] != MASK, -1)
        expected = chosen > 0.5
        expected[chosen.argmax()] = True
        assert torch.equal(generation.order[0] == k, expected)
        assert torch.equal(generation.ids[0, expected], tokens[expected])
        state = generation.state_after(k)


def test_threshold_must_be_exceeded():
    probs, masked = torch.tensor([[[0.5, 0.5], [0.4, 0.6], [0.5, 0.5]]]), torch.ones(1, 3, dtype=torch.bool)
    tokens, count = probs.argmax(dim=-1), torch.tensor([3])
    assert d.threshold(0.5)(tokens, probs, masked, count).tolist() == [[False, True, False]]
    assert d.threshold(0.49)(tokens, probs, masked, count).all()


def greedy_entropy_bound(predict, template, bound):
    """The EB-Sampler's rule, row by row, in plain Python; returns ids, order."""
    ids, order = template.clone(), torch.full_like(template, -1)
    for row, commits in zip(ids, order):
        step = 0
        while MASK in row.tolist():
            logits = predict(row[None])[0].double()
            probs = logits.softmax(dim=-1)
            entropy = -(probs * probs.clamp(min=1e-300).log()).sum(dim=-1)
            waiting = sorted((i for i in range(len(row)) if row[i] == MASK), key=lambda i: float(entropy[i]))
            run = 1
            while run < len(waiting) and float(entropy[waiting[:run]].sum()) <= bound:
                run += 1
            logits[:, MASK] = -torch.inf
            for i in waiting[:run]:
                row[i], commits[i] = logits[i].argmax(), step
            step += 1
    return ids, order


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.5, 3.0, 100.0])
@pytest.mark.parametrize("seed", range(2))
def test_entropy_bound_follows_its_rule(bound, seed):
    predict = WrongPredictor(vocab_size=9, longest=8, seed=seed)
    template = torch.randint(4, 9, (4, 8), generator=seeded(seed))
    template[torch.rand(4, 8, generator=seeded(seed + 1)) < 0.7] = MASK
    template[:, 0] = MASK
    options = {"steps": 1, "remasking": d.entropy_bound(bound)}
    ids, order = greedy_entropy_bound(predict, template, bound)
    for row in range(4):  # alone, since a batch's rows share the count of passes
        made = fill(predict, template[row : row + 1], **options)
        assert torch.equal(made.ids[0], ids[row]) and torch.equal(made.order[0], order[row])
        assert made.nfe == int(order[row].max()) + 1
    together = fill(predict, template, **options)
    assert torch.equal(together.ids, ids) and torch.equal(together.order, order)


@pytest.mark.parametrize("make", [d.threshold, d.entropy_bound])
@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan])
def test_bounds_out_of_range_are_refused(make, value):
    with pytest.raises(ValueError, match="pass"):
        make(value)


def test_threshold_is_a_probability():
    with pytest.raises(ValueError, match="pass"):
        d.threshold(1.01)


@pytest.mark.parametrize("strategy", [d.threshold(0.4), d.entropy_bound(1.0), d.late("entropy", (4, 5)), spaced(4)])
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_rows_of_a_batch_do_not_touch_each_other(strategy, w):
    predict = WrongPredictor(VOCABULARY, seed=3)
    template = torch.where(torch.rand(12, 7, generator=seeded(3)) < 0.6, MASK, torch.randint(4, 10, (12, 7), generator=seeded(4)))
    template[:, 0] = MASK
    together = fill(d.guided(predict, template != MASK, w), template, steps=1, remasking=strategy)
    for i, row in enumerate(template.split(1)):
        alone = fill(d.guided(predict, row != MASK, w), row, steps=1, remasking=strategy)
        assert torch.equal(alone.ids[0], together.ids[i]) and torch.equal(alone.order[0], together.order[i])


@pytest.mark.parametrize("strategy", [d.threshold(1.0), d.threshold(0.4), d.entropy_bound(0.0)])
@pytest.mark.parametrize("steps", [2, 4])
def test_a_block_that_takes_longer_delays_the_next(strategy, steps):
    """Each pass has its own number in `order`, so that `state_after` knows every state, and blocks follow each other."""
    made = fill(WrongPredictor(VOCABULARY, seed=5), masks(2, 8), steps=steps, block_length=4, remasking=strategy)
    assert made.nfe == len(made.steps()) >= steps
    assert (made.order[:, :4].amax(dim=1) < made.order[:, 4:].amin(dim=1)).all()


# --- the block cache ---


@pytest.mark.parametrize("remasking", STRATEGIES)
def test_cache_is_exact_where_every_block_takes_one_pass(transformer, remasking):
    template = torch.randint(4, 12, (3, 24), generator=seeded(0))
    template[:, 6:] = MASK
    options = {"steps": 3, "block_length": 6, "remasking": remasking, "temperature": 1.0}
    models = (transformer, d.cached(transformer, template, MASK, 6))
    a, b = (fill(m, template, generator=seeded(1), **options) for m in models)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order) and a.nfe == b.nfe


def test_cache_is_exact_where_one_block_is_everything(transformer):
    """Nothing lies outside the block, so nothing is stale; a second generation starts afresh."""
    template = masks(2, 24)
    model = d.cached(transformer, template, MASK, 24)
    for temperature in (0.0, 1.0):
        a, b = (fill(m, template, steps=12, temperature=temperature, generator=seeded(0)) for m in (transformer, model))
        assert torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order)


def dual_cache(model, template, steps, block_length):
    """Fast-dLLM's dual cache around greedy low-confidence decoding, step by step; template of one row without [PAD]."""
    ids, order, positions = template.clone(), torch.full_like(template, -1), (template[0] == MASK).nonzero()[:, 0]
    blocks = positions.split(block_length)
    per_block = steps // len(blocks)
    for b, block in enumerate(blocks):
        first, last = int(block[0]), int(block[-1]) + 1
        for k in range(per_block):
            if k == 0:
                cache = h.KVCache(model.config, 1, model.embed.weight)
                logits = model(ids, cache=cache)[0, first:last]
            else:
                logits = model(ids[:, first:last], cache=cache, start=first)[0]
            best = logits.double().softmax(dim=-1).index_fill(-1, torch.tensor([MASK]), 0).max(dim=-1)
            waiting = [int(i) for i in block if ids[0, i] == MASK]
            kept = len(block) * (k + 1) // per_block - len(block) * k // per_block
            for i in sorted(waiting, key=lambda i, best=best, first=first: -float(best.values[i - first]))[:kept]:
                ids[0, i], order[0, i] = best.indices[i - first], b * per_block + k
    return ids, order


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("steps, block_length", [(16, 4), (8, 8), (6, 8), (12, 16)])
def test_cache_is_the_dual_cache(transformer, seed, steps, block_length):
    template = torch.randint(4, 12, (1, 24), generator=seeded(seed))
    template[0, torch.randperm(24, generator=seeded(seed + 9))[:16]] = MASK
    model = d.cached(transformer, template, MASK, block_length)
    made = fill(model, template, steps=steps, block_length=block_length)
    with torch.no_grad():
        ids, order = dual_cache(transformer, template, steps, block_length)
    assert torch.equal(made.ids, ids) and torch.equal(made.order, order)
    again = fill(model, template, steps=steps, block_length=block_length)
    assert torch.equal(again.ids, ids), "the predictor may be used again"


def test_cached_rows_do_not_touch_each_other(transformer):
    """Rows with masks in the same columns, one of them with [PAD]; where the columns differ, all rows compute the union."""
    template = torch.randint(4, 12, (3, 24), generator=seeded(5))
    template[:, 6:18], template[2, 20:] = MASK, h.PAD_ID
    options = {"steps": 6, "block_length": 4, "forbidden": (0, 2, 3)}
    made = fill(d.cached(transformer, template, MASK, 4), template, **options)
    for i, row in enumerate(template.split(1)):
        alone = fill(d.cached(transformer, row, MASK, 4), row, **options)
        assert torch.equal(alone.ids[0], made.ids[i]) and torch.equal(alone.order[0], made.order[i])


def test_cache_computes_the_block_alone(transformer, monkeypatch):
    widths = []
    forward = h.Transformer.forward

    def counted(self, ids, *args, **kwargs):
        widths.append(ids.shape[1])
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(h.Transformer, "forward", counted)
    template = masks(2, 24)
    fill(d.cached(transformer, template, MASK, 6), template, steps=12, block_length=6)
    assert widths == [24, 6, 6] * 4


def test_cache_notices_what_changed_elsewhere(transformer):
    """Another text around the same block is another full pass, not yesterday's keys."""
    template = torch.randint(4, 12, (1, 24), generator=seeded(3))
    template[0, 8:16] = MASK
    model, ids = d.cached(transformer, template, MASK, 8), template.clone()
    model(ids)
    ids[0, 8:12] = 7
    stale = model(ids)
    ids[0, 0] = 4 if ids[0, 0] != 4 else 5
    with torch.no_grad():
        assert torch.allclose(model(ids), transformer(ids), atol=1e-5)
        assert not torch.allclose(stale[:, :8], transformer(ids)[:, :8], atol=1e-3)


def test_cache_serves_revisions(transformer):
    """Takes back tokens of any block: as many full passes, and the tokens that the model itself would give."""
    template = torch.randint(4, 12, (2, 24), generator=seeded(6))
    template[:, 8:] = MASK
    made = fill(transformer, template, steps=8, block_length=4)
    again = [
        d.revise(m, made, mask_id=MASK, passes=3, per_pass=3) for m in (transformer, d.cached(transformer, template, MASK, 4))
    ]
    assert torch.equal(again[0].ids, again[1].ids)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((EXACT, 3), "Transformer"),
        ((lambda ids: ids, 3), "Transformer"),
        ((None, 0), "block_length"),
        ((None, -1), "block_length"),
    ],
)
def test_cache_errors(transformer, arguments, word):
    model, block_length = arguments
    with pytest.raises(ValueError, match=word):
        d.cached(model or transformer, masks(1), MASK, block_length)


def test_cache_is_for_its_template(transformer):
    with pytest.raises(ValueError, match="pass"):
        d.cached(transformer, masks(2, 6), MASK, 3)(masks(1, 6))


# --- late tokens ---


class EndsEarly:
    """Everywhere the likeliest token is [END], by far, and the next is token 5."""

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, 9)
        logits[..., h.END_ID], logits[..., 5] = 8.0, 4.0
        logits[:, 0, 5] = 8.5  # but for the first position, where 5 is a little likelier
        return logits


def test_late_tokens_are_committed_last():
    """Without `late`, [END] is locked in before the less certain first token; with it, only after."""
    template = masks(1, 4)
    plain = fill(EndsEarly(), template, steps=4)
    assert plain.ids.tolist() == [[5, 3, 3, 3]] and int(plain.order[0, 0]) == 3
    for strategy in ("low_confidence", "entropy", "margin", h.low_confidence, h.random_order(seeded(0))):
        late = fill(EndsEarly(), template, steps=4, remasking=d.late(strategy, (h.END_ID,)))
        assert late.ids.tolist() == plain.ids.tolist() and int(late.order[0, 0]) == 0
    hasty = fill(EndsEarly(), template, steps=4, remasking=d.late(d.threshold(0.5), (h.END_ID,)))
    assert hasty.nfe == 4 and int(hasty.order[0, 0]) == 0, "a late token never passes the threshold, it comes one at a time"


@pytest.mark.parametrize("strategy", ["low_confidence", "entropy", "margin"])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_late_keeps_the_schedule(strategy, steps):
    """As many a step as without it, whatever the proposals are."""
    predict, template = WrongPredictor(9, seed=4), masks(6, 8)
    made = fill(predict, template, steps=steps, remasking=d.late(strategy, (4, 5, 6)))
    for step in range(steps):
        assert ((made.order <= step).sum(dim=1) == 8 * (step + 1) // steps).all()


def test_late_waits_for_a_strategy_that_takes_its_time():
    """All early tokens come first even where the strategy commits fewer than the schedule wants."""
    probs = torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]], dtype=torch.float64)
    tokens, masked = probs.argmax(dim=-1), torch.ones(1, 4, dtype=torch.bool)
    strategy = d.late(d.threshold(0.85), (0,))
    assert strategy(tokens, probs, masked, torch.tensor([4])).tolist() == [[True, False, False, False]]
    masked = torch.tensor([[False, True, True, True]])
    assert strategy(tokens, probs, masked, torch.tensor([2])).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("name", ["random", "ancestral", "low-confidence"])
def test_late_needs_a_strategy_that_draws_nothing(name):
    with pytest.raises(ValueError, match="low_confidence, entropy, margin"):
        d.late(name, (h.END_ID,))


# --- revision ---


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("remasking", ["low_confidence", "random", "entropy"])
def test_revisions_redo_and_record(passes, remasking):
    predict = WrongPredictor(vocab_size=9, longest=8, seed=3)
    template = torch.randint(4, 9, (3, 8), generator=seeded(0))
    template[:, 2:] = MASK
    options = {"temperature": 1.0, "forbidden": (0, 2, 3), "generator": seeded(1)}
    plain = fill(predict, template, steps=3, remasking=remasking, **options)
    kept = plain.ids.clone(), plain.order.clone(), plain.confidence.clone()
    made = d.revise(predict, plain, mask_id=MASK, passes=passes, **options)
    assert all(torch.equal(a, b) for a, b in zip(kept, (plain.ids, plain.order, plain.confidence))), "what was made stays"
    assert isinstance(made, h.Generation) and made.nfe == plain.nfe + passes
    assert torch.equal(made.ids[:, :2], template[:, :2]) and (made.ids >= 4).all()
    assert torch.equal(made.order == -1, template != MASK)
    assert torch.equal(made.state_after(-1), template) and torch.equal(made.state_after(3 + passes - 1), made.ids)
    assert made.steps() == list(range(3 + passes)), "a page for each pass, in the viewer"
    for step in range(-1, 3):
        assert torch.equal(made.state_after(step), plain.state_after(step)), "revision comes after the schedule"
    for step in range(3, 3 + passes):
        changed = made.state_after(step) != made.state_after(step - 1)
        assert int(changed.sum(dim=1).max()) <= 2, "as many as a step reveals"
        assert (made.order[changed] >= step).all()
    assert ((made.order == 3 + passes - 1).sum(dim=1) == 2).all(), "the last pass redid two of each row"


def plainly_revised(predict, made, passes, per_pass):
    """Greedy revision, row by row in plain Python; ids, order, confidence."""
    ids, order, certainty = made.ids.clone(), made.order.clone(), made.confidence.double().clone()
    last = int(order.max()) + 1
    for step in range(last, last + passes):
        for row, commits, sure in zip(ids, order, certainty):
            waiting = sorted((i for i in range(len(row)) if commits[i] >= 0), key=lambda i, sure=sure: float(sure[i]))[:per_pass]
            row[waiting] = MASK
            logits = predict(row[None])[0].double()
            probs = logits.softmax(dim=-1)
            logits[:, MASK] = -math.inf
            for i in waiting:
                row[i], commits[i] = logits[i].argmax(), step
                sure[i] = probs[i, row[i]]
    return ids, order, certainty


@pytest.mark.parametrize("per_pass", [1, 2, 5, 20])
@pytest.mark.parametrize("seed", range(3))
def test_revision_follows_its_rule(per_pass, seed):
    """Rows with few or no masks among them: at most what was committed is taken back."""
    predict = WrongPredictor(vocab_size=9, longest=8, seed=seed)
    template = torch.randint(4, 9, (4, 8), generator=seeded(seed))
    template[0, 1:], template[1, ::2], template[2, 5] = MASK, MASK, MASK
    plain = fill(predict, template, steps=4)
    made = d.revise(predict, plain, mask_id=MASK, passes=4, per_pass=per_pass)
    ids, order, certainty = plainly_revised(predict, plain, 4, per_pass)
    assert torch.equal(made.ids, ids) and torch.equal(made.order, order)
    assert torch.allclose(made.confidence.double(), certainty, atol=1e-6)
    assert (made.confidence[template != MASK] == 1).all()


def test_a_revised_generation_may_be_revised():
    predict = WrongPredictor(vocab_size=9, longest=8, seed=2)
    plain = fill(predict, masks(2, 8), steps=4)
    once = d.revise(predict, plain, mask_id=MASK, passes=4, per_pass=2)
    twice = d.revise(predict, d.revise(predict, plain, mask_id=MASK, passes=2), mask_id=MASK, passes=2, per_pass=2)
    assert torch.equal(once.ids, twice.ids) and torch.equal(once.order, twice.order) and once.nfe == twice.nfe
    for step in range(-1, 9):
        assert torch.equal(once.state_after(step), twice.state_after(step))


def test_revision_with_guidance_hides_what_was_given():
    """What is in sight of the unconditional half is what the model wrote, revised or not."""
    predict, template = WrongPredictor(9, seed=1), torch.tensor([[4, 5, MASK, MASK, MASK, MASK]])
    seen = []

    def watched(ids):
        seen.append(ids)
        return predict(ids)

    made = fill(predict, template, steps=4)
    d.revise(d.guided(watched, template != MASK, 1.0), made, mask_id=MASK, passes=2, per_pass=1)
    conditional, unconditional = torch.cat(seen)[::2], torch.cat(seen)[1::2]
    assert len(seen) == 2 and torch.equal(conditional[:, 2:], unconditional[:, 2:])
    assert (unconditional[:, :2] == MASK).all() and torch.equal(conditional[:, :2], template[:, :2].expand(2, -1))


@pytest.mark.parametrize(
    "options", [{"passes": 0}, {"passes": -1}, {"passes": 1, "per_pass": 0}, {"passes": 1, "temperature": -1.0}]
)
def test_revision_errors(options):
    made = fill(EXACT, masks(1))
    with pytest.raises(ValueError, match="pass"):
        d.revise(EXACT, made, mask_id=MASK, **options)


# --- properties over everything ---


@st.composite
def requests(draw):
    template, block_length, n_blocks = draw(templates(VOCABULARY))
    adaptive = draw(
        st.sampled_from([0.0, 0.3, 0.9, 1.0]).map(d.threshold) | st.sampled_from([0.0, 0.7, 9.0]).map(d.entropy_bound)
    )
    inner = draw(st.sampled_from(["low_confidence", "entropy", "margin", adaptive]))
    options = {
        "steps": n_blocks * draw(st.integers(1, 6)),
        "block_length": block_length,
        "remasking": draw(st.sampled_from([adaptive, d.late(inner, (4, 5, 6))])),
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        "forbidden": tuple(draw(st.sets(st.sampled_from([0, 2, 3, 4, 9]), max_size=5))),
    }
    return template, options, draw(st.sampled_from([0.0, 0.0, 1.0])), draw(st.integers(0, 99))


@given(requests())
def test_what_always_holds(request):
    template, options, w, seed = request
    predict, before, masked = WrongPredictor(VOCABULARY, seed=seed), template.clone(), template == MASK
    model = d.guided(predict, ~masked, w)
    generation = fill(model, template, generator=seeded(seed), **options)
    calls, revised = predict.calls, d.revise(model, generation, mask_id=MASK, passes=2, forbidden=options["forbidden"])
    assert torch.equal(template, before), "the template is left alone"
    for made in (generation, revised):
        assert made.ids.dtype == made.order.dtype == torch.long and made.ids.shape == made.order.shape == template.shape
        assert torch.equal(made.ids[~masked], template[~masked])
        filled = made.ids[masked]
        assert not (filled == MASK).any() and not set(filled.tolist()) & set(options["forbidden"])
        assert torch.equal(made.order == -1, ~masked)
        assert torch.equal(made.state_after(-1), template) and torch.equal(made.state_after(int(made.order.max())), made.ids)
        assert made.confidence.shape == template.shape and (made.confidence[~masked] == 1).all()
        assert ((made.confidence >= 0) & (made.confidence <= 1)).all()
    assert generation.nfe == calls == len(set(generation.order[masked].tolist())), "every pass commits something"
    assert generation.nfe <= int(masked.sum()) and revised.nfe == calls + 2 == predict.calls
    if options["block_length"] is not None:  # blocks follow each other
        for row in generation.order:
            for early, late in itertools.pairwise(row[row >= 0].split(options["block_length"])):
                assert int(early.max()) < int(late.min())


@pytest.mark.parametrize("strategy", [d.threshold(1.0), d.entropy_bound(0.0)])
def test_adaptive_decoding_one_by_one_may_be_exact(strategy):
    """The entropy order looks at what is visible alone; the threshold's favours what is likely, so it is not."""
    generation = fill(EXACT, masks(ROWS), steps=1, remasking=strategy, temperature=1.0, generator=seeded(1))
    fits = ChiSquare.of(counts_of(generation.ids), EXACT.logp.exp()).fits
    assert generation.nfe == 3 and fits == (strategy.__qualname__.startswith("entropy"))


# --- what one pass commits, spread over the text ---

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


@pytest.mark.parametrize("name", BY)
@given(asked=passes())
def test_without_a_distance_it_is_the_strategy_itself(name, asked):
    assert torch.equal(spaced(1, BY[name])(*asked), BY[name](*asked))


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


# --- what is drawn ---


@pytest.mark.parametrize("strategy", [bit_reversed, spaced(2), spaced(3, h.margin), spaced(2, bit_reversed)])
def test_one_by_one_the_true_distribution_is_drawn(strategy):
    """The order may depend on what is visible, never on what is drawn: then the chain rule is exact."""
    made = fill(EXACT, masks(ROWS), remasking=strategy, temperature=1.0, generator=seeded(1))
    chi = ChiSquare.of(torch.bincount(EXACT.index(made.ids), minlength=len(EXACT.sequences)), EXACT.logp.exp())
    assert chi.fits, chi


def test_two_at_once_draw_the_product_of_their_conditionals():
    """Bit-reversed, the three places are filled as 0, then 2 and 1 together."""
    made = fill(EXACT, masks(ROWS), remasking=bit_reversed, steps=2, temperature=1.0, generator=seeded(2))
    assert made.order.tolist() == [[0, 1, 1]] * ROWS
    ids, product = EXACT.sequences, EXACT(masks(1))[0, 0, EXACT.sequences[:, 0]].double().exp()
    conditional = EXACT(ids.masked_fill(torch.tensor([False, True, True]), MASK)).double().exp()
    for place in (1, 2):
        product = product * conditional[range(len(ids)), place, ids[:, place]]
    counts = torch.bincount(EXACT.index(made.ids), minlength=len(EXACT.sequences))
    assert ChiSquare.of(counts, product).fits and not ChiSquare.of(counts, EXACT.logp.exp()).fits
