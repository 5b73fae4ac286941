"""beyond/exact.py: the probability of a text under a decoder, against enumeration, the sampler's frequencies and the NELBO."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    END,
    FIRST,
    MASK,
    PAD,
    START,
    ChiSquare,
    ExactAR,
    ExactPredictor,
    WithoutFloat64,
    WrongPredictor,
    enumerated_nelbo,
    fill,
    masks,
    noisy_pair,
    on_apple,
    seeded,
    within,
)

import llada_helpers as h
from beyond import ablations, decoding, exact
from beyond.exact import decoder_nll
from beyond.quality import parts

EXACT = ExactPredictor(length=3, symbols=3)
EVERY = EXACT.sequences  # all 27 texts
WRONG = WrongPredictor(EXACT.vocab_size)
SPECIAL = (PAD, START, END)


def left_to_right(tokens, probs, masked, count):
    """May know the shape of what was drawn, as it says nothing."""
    return h.highest(-torch.arange(tokens.shape[1]).float().expand_as(tokens), masked, count)


ORDERS = {
    "entropy": "entropy",
    "margin": "margin",
    "left to right": left_to_right,
    "bit-reversed": decoding.bit_reversed,
    "spaced": decoding.spaced(2),
    "spaced, bit-reversed": decoding.spaced(2, by=decoding.bit_reversed),
    "entropy bound": decoding.entropy_bound(0.8),
    "blocks": h.blockwise(h.entropy, 1),
}


def nats(model, sequences, steps, remasking, **options):
    options = {"generator": seeded(0), "forbidden": SPECIAL, **options}
    return decoder_nll(model, sequences, MASK, steps=steps, remasking=remasking, **options).double()


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("order", ORDERS)
def test_probabilities_of_all_texts_sum_to_one(order, steps):
    """Whatever the passes commit together: a decoder is a distribution over texts."""
    steps = 3 if order == "blocks" else steps
    for temperature in (1.0, 0.5):
        total = nats(WRONG, EVERY, steps, ORDERS[order], temperature=temperature).sum(dim=1).neg().exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_they_are_the_samplers_frequencies(order):
    """In two passes, from a predictor whose conditionals fit no joint distribution, at a temperature: the same dice."""
    steps, options = 3 if order == "blocks" else 2, {"remasking": ORDERS[order], "temperature": 0.7, "forbidden": SPECIAL}
    made = fill(WRONG, masks(6000), steps=steps, generator=seeded(1), **options)
    probs = nats(WRONG, EVERY, steps, ORDERS[order], temperature=0.7).sum(dim=1).neg().exp()
    chi = ChiSquare.of(torch.bincount(EXACT.index(made.ids), minlength=27), probs / probs.sum())
    assert chi.fits, chi


@pytest.mark.parametrize("order", [*ORDERS, "random"])
def test_one_by_one_an_exact_predictor_gives_log_p_in_every_order(order):
    remasking = ORDERS.get(order, order)
    if order != "entropy bound":  # which commits as many as its bound allows
        assert torch.allclose(nats(EXACT, EVERY, 3, remasking).sum(dim=1), -EXACT.logp, atol=1e-5)


def test_one_by_one_in_random_order_averages_to_the_bound():
    for k in (4, 22):
        rows = EVERY[k].repeat(3000, 1)
        chains = nats(WRONG, rows, 3, "random", forbidden=()).sum(dim=1)
        free = [v for v in range(EXACT.vocab_size) if v != MASK]  # the decoder never writes [MASK], so it is never wrong about it

        def unmasked(ids, free=free):
            logits = torch.full((*ids.shape, EXACT.vocab_size), -math.inf)
            logits[..., free] = WRONG(ids)[..., free]
            return logits

        assert within(chains, enumerated_nelbo(unmasked, EVERY[k], torch.ones(3, dtype=torch.bool)))


def test_blocks_of_one_from_the_left_are_the_chain_rule():
    """Also where they hold an AR model that sees nothing but the left."""
    ar = ExactAR(EXACT)

    def from_the_left(ids):
        return ar(torch.nn.functional.pad(ids[:, :-1], (1, 0), value=START))

    for strategy in (h.blockwise(h.entropy, 1), left_to_right):
        assert torch.allclose(nats(from_the_left, EVERY, 3, strategy).sum(dim=1).float(), h.ar_nll(ar, EVERY, START), atol=1e-5)


@given(st.data())
def test_each_token_costs_what_the_pass_that_committed_it_said(data):
    """Against the sampler itself: a text that it wrote, told again, is committed in the same passes at the same prices."""
    row = st.lists(st.booleans(), min_size=(length := data.draw(st.integers(1, 7))), max_size=length)
    maskable = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    maskable[0, 0] = True
    steps, order = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([k for k in ORDERS if k != "blocks"]))
    predict, seed = WrongPredictor(9, seed=data.draw(st.integers(0, 99))), data.draw(st.integers(0, 99))
    rows = torch.randint(FIRST, 9, maskable.shape, generator=seeded(seed))
    options = {"remasking": ORDERS[order], "steps": steps}
    made = fill(predict, rows.masked_fill(maskable, MASK), temperature=1.0, generator=seeded(seed), forbidden=SPECIAL, **options)
    calls = predict.calls
    told = nats(predict, made.ids, maskable=maskable, **options)
    assert predict.calls - calls == made.nfe, "as many passes as the decoder"
    assert (told[~maskable] == 0).all() and (told >= 0).all()
    before, expected = made.state_after(-1), torch.zeros(maskable.shape, dtype=torch.float64)
    for step in made.steps():
        logits = predict(before).double().index_fill(-1, torch.tensor([MASK, *SPECIAL]), -math.inf)
        cost = -logits.log_softmax(dim=-1).gather(-1, made.ids[..., None])[..., 0]
        expected, before = torch.where(made.order == step, cost, expected), made.state_after(step)
    assert torch.allclose(told, expected, atol=1e-5)


def test_a_schedule_of_its_own_is_kept():
    """The literal reverse process, in two steps: in expectation over its order a bound, and never below the exact -log p."""
    rows = EVERY[7].repeat(4000, 1)
    drawn = nats(EXACT, rows, 2, "ancestral").sum(dim=1)
    made = fill(EXACT, masks(40_000), steps=2, remasking="ancestral", temperature=1.0, generator=seeded(3))
    frequency = float((EXACT.index(made.ids) == 7).double().mean())
    assert float(drawn.neg().exp().mean()) == pytest.approx(frequency, abs=5 * math.sqrt(frequency / 40_000))
    assert float(drawn.mean()) >= -math.log(float(drawn.neg().exp().mean()))


class Backwards:
    """A strategy that is an object: one character in the first pass, the others in the second."""

    def __call__(self, tokens, probs, masked, count):
        return exact.right_to_left(tokens, probs, masked, count)

    def schedule(self, masked, n, step, steps):
        return masked, masked.sum(dim=1) - (n - 1) * (step == 0)


def test_a_schedule_that_is_a_method_is_kept():
    _, order = exact.measured(WRONG, EVERY[:3], Backwards(), 3)
    assert order.tolist() == [[1, 1, 0]] * 3
    for around in (decoding.late(Backwards(), (END,)), decoding.spaced(1, by=Backwards())):
        made = fill(WRONG, masks(2), steps=3, remasking=around, forbidden=(*SPECIAL, MASK), generator=seeded(0))
        assert made.order.tolist() == [[1, 1, 0]] * 2


LOOKING = {
    "low confidence": "low_confidence",
    "in blocks": h.blockwise(h.low_confidence, 1),
    "spaced": decoding.spaced(2, by=h.low_confidence),
    "threshold": decoding.threshold(0.5),
    "late": decoding.late("entropy", (5,)),
    "compares": lambda tokens, probs, masked, count: masked & (tokens > 4),
    "indexes": lambda tokens, probs, masked, count: masked & (probs[0, 0][tokens] > 0),
    "lists": lambda tokens, probs, masked, count: masked & bool(tokens.tolist()),
    "numpy": lambda tokens, probs, masked, count: masked & bool(np.asarray(tokens).any()),
    "iterates": lambda tokens, probs, masked, count: masked & any(row is None for row in tokens),
    "data": lambda tokens, probs, masked, count: masked & (tokens.data is not None),
    "as": lambda tokens, probs, masked, count: masked & (tokens.expand_as(masked) > 4),
}


@pytest.mark.parametrize("strategy", LOOKING.values(), ids=LOOKING)
def test_a_strategy_that_looks_at_the_drawn_tokens_is_refused(strategy):
    with pytest.raises(ValueError, match="looks at the drawn tokens"):
        nats(EXACT, EVERY, 3, strategy)


def test_what_is_forbidden_or_impossible_costs_infinity():
    assert math.isinf(float(nats(EXACT, EVERY[:1], 3, "entropy", forbidden=(int(EVERY[0, 1]),))[0, 1]))
    assert float(nats(lambda ids: 9e4 * torch.eye(7)[5].expand(*ids.shape, 7), torch.tensor([[5, 5]]), 2, "entropy").sum()) == 0


def test_nothing_maskable_costs_nothing_and_no_pass():
    predict = WrongPredictor(7)
    assert (nats(predict, EVERY, 3, "entropy", maskable=torch.zeros(27, 3, dtype=torch.bool)) == 0).all() and predict.calls == 0


def test_a_device_without_float64_gives_the_same_nats():
    here = nats(WRONG, EVERY, 2, "entropy")
    with WithoutFloat64():
        there = decoder_nll(on_apple(WRONG), EVERY.to("mps"), MASK, steps=2, remasking="entropy", forbidden=SPECIAL)
        assert torch.equal(here.float(), there.cpu())


@pytest.mark.parametrize(
    "options, word",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"sequences": torch.tensor([[4, MASK, 5]])}, "mask_id"),
        ({"sequences": torch.tensor([4, 5])}, "LongTensor"),
        ({"steps": 0}, "steps"),
        ({"remasking": "low-confidence"}, "low_confidence"),
        ({"maskable": torch.ones(1, 2, dtype=torch.bool)}, "maskable"),
        ({"model": lambda ids: torch.full((*ids.shape, 7), math.nan)}, "not finite"),
    ],
)
def test_errors_say_what_to_pass_instead(options, word):
    options = {"model": WRONG, "sequences": torch.tensor([[4, 5, 6]]), "steps": 2, "remasking": "entropy", **options}
    with pytest.raises(ValueError, match="pass") as error:
        decoder_nll(options.pop("model"), options.pop("sequences"), MASK, **options)
    assert word in str(error.value)


# --- the tables ---

SHAPE = h.ModelConfig(9, 8, n_layer=1, n_head=1, n_embd=8)
MODELS = {"LLaDA": h.Transformer(SHAPE), "AR": h.Transformer(dataclasses.replace(SHAPE, causal=True))}  # blank
ROWS = torch.randint(FIRST, 9, (6, 8), generator=seeded(0))


def test_what_each_pass_and_each_place_costs_a_blank_model():
    """ln 5 a character for a decoder, which writes no special token; ln 9 for AR and for the bound."""
    prices = exact.price_of_passes(MODELS["LLaDA"], ROWS, 2)
    assert prices["nats/char"].tolist() == pytest.approx([math.log(5)] * 8, rel=1e-5)
    assert prices.groupby("decoder")["of the whole"].sum().tolist() == pytest.approx([math.log(5)] * 4, rel=1e-5)
    places = exact.by_place(MODELS, ROWS, parts=2).groupby("model")["nats/char"].mean()
    assert places.tolist() == pytest.approx([math.log(9), math.log(5), math.log(9)], rel=1e-5)


def test_no_window_that_is_padded_is_scored():
    """Where all windows are taken, the last one may be; [PAD] is no text."""
    padded = torch.cat((ROWS, torch.tensor([[5] * 3 + [h.PAD_ID] * 5])))
    sizes = exact.Sizes(9, 9, 9, (2,), 16)
    assert torch.equal(exact.chosen(padded, 9), ROWS)
    made = [exact.tables(MODELS, windows, windows, sizes) for windows in (ROWS, padded)]
    for name in ("exact", "exact_places", "exact_passes"):
        assert made[0][name]().equals(made[1][name]())


def test_what_is_chosen_is_chosen_on_the_validation_text():
    models, sizes = noisy_pair(9, 16, 0.3), exact.SIZES["smoke"][0]
    val, test, other = (torch.randint(FIRST, 9, (6, 16), generator=seeded(seed)) for seed in range(3))
    here, with_test, with_val = (exact.tables(models, v, t, sizes) for v, t in ((val, test), (val, other), (other, test)))
    for name in here:
        chosen, table = name in ("exact_choice", "gradient_noise"), here[name]()
        assert table.equals(with_test[name]()) == chosen and table.equals(with_val[name]()) != chosen, name


def test_rows_of_the_table():
    models, windows = noisy_pair(9, 16, 0.3), torch.randint(FIRST, 9, (6, 16), generator=seeded(0))
    table = exact.exact_table(models, windows, exact.Sizes(9, 9, 9, (4,), 16), only="^entropy, (4|16) passes").set_index("row")
    assert [table.loc[f"entropy, {k} passes", "passes"] for k in (4, 16)] == [4, 16]
    told = nats(models["LLaDA"], windows, 4, "entropy")
    assert table.loc["entropy, 4 passes", "nats/char"] == pytest.approx(float(told.mean()), rel=1e-5)
    assert table.loc["AR", "nats/char"] == pytest.approx(float(h.ar_nll(models["AR"], windows, START).mean()) / 16, rel=1e-5)
    minus = table["nats/char"] - table.loc["NELBO", "nats/char"]
    assert table["minus NELBO"].tolist() == pytest.approx(minus.tolist(), abs=1e-5)


def plainly_apart(entropy, masked, scale):
    """Position by position: the surest of those that are far enough from all that are taken."""
    taken = []

    def free(i):
        return masked[i] and i not in taken and all(abs(i - j) >= scale * entropy[i] for j in taken)

    while left := [*filter(free, range(len(masked)))]:
        taken.append(min(left, key=lambda i: entropy[i]))
    return sorted(taken)


@pytest.mark.parametrize("scale", [1, 4, 30])
@pytest.mark.parametrize("seed", range(5))
def test_the_uncertain_keep_apart(scale, seed):
    probs = (2 * torch.randn(3, 24, 6, generator=seeded(seed), dtype=torch.float64)).softmax(dim=-1)
    masked = torch.rand(3, 24, generator=seeded(seed + 99)) < 0.7
    stay = exact.apart(scale)(None, probs, masked, masked.sum(dim=1))
    entropy = torch.special.entr(probs).sum(dim=-1).tolist()
    assert [row.nonzero()[:, 0].tolist() for row in stay] == [
        plainly_apart(e, m, scale) for e, m in zip(entropy, masked.tolist())
    ]


def test_counts_that_double_and_the_order_from_right_to_left():
    strategy = exact.doubling(exact.right_to_left)
    made = fill(lambda ids: torch.zeros(*ids.shape, 9), masks(1, 8), steps=4, remasking=strategy)
    assert made.order.tolist() == [[3, 3, 3, 3, 2, 2, 1, 0]]


def test_further_training_for_the_decoder(tmp_path, monkeypatch):
    """From the preset's model on, its own states against Eq. 3, three seeds; measured on the test text."""
    monkeypatch.chdir(tmp_path)
    text = "to be, or not to be " * 64
    tokenizer = h.CharTokenizer.from_text(text)
    small = dataclasses.replace(h.PRESETS["smoke"], llada=h.TrainConfig(1, 2, evals=1))
    jobs = exact.decoder_jobs(small, exact.TRAINING["smoke"][0], tokenizer.vocab_size, *parts(tokenizer.encode(text))[:2])
    assert [[job.train.seed for job in trials] for trials in jobs.values()] == [[1, 2, 3]] * 2
    control, ours = (trials[0] for trials in jobs.values())
    assert control.batch_function is h.diffusion_batch and ours.batch_function is exact.decoder_batch
    first = h.train("again", small.jobs(tokenizer.vocab_size, *parts(tokenizer.encode(text))[:2])["LLaDA"], quiet=True).model
    for job in (control, ours):
        assert all(torch.equal(a, b) for a, b in zip(job.start.state_dict().values(), first.state_dict().values()))
    blank = h.Transformer(h.ModelConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_embd=8))
    line = exact.decoder_measure(h.PRESETS["smoke"], text)(None, h.Run(blank, None, {}, None))
    assert [line[key] for key in ("8 passes", "NELBO")] == pytest.approx([math.log(8), math.log(12)], rel=1e-4)


def test_the_recipe_is_judged_by_validation_text_and_the_decoder_by_test_text():
    text, smoke = "to be, or not to be " * 64, h.PRESETS["smoke"]
    val, test = (int(0.8 * len(text)), int(0.9 * len(text))), (int(0.9 * len(text)), len(text))
    turned = [text[:i] + text[i:j][::-1] + text[j:] for i, j in (val, test)]
    assert [len(part) for part in parts(torch.arange(len(text)))] == [val[0], val[1] - val[0], test[1] - test[0]]
    run = h.Run(noisy_pair(h.CharTokenizer.from_text(text).vocab_size, 64, 0.3)["LLaDA"], None, {}, None)
    for measure, of_test in ((ablations.ablation_measure, False), (exact.decoder_measure, True)):
        here, with_val, with_test = (measure(smoke, t)(None, run)["nats/char"] for t in (text, *turned))
        assert (here == with_val) == of_test and (here == with_test) != of_test
