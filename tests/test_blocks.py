"""beyond/blocks.py against enumeration: the bound, batches, who sees whom, the sampler and its exact cache; the suite."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import MASK, PAD, START, ChiSquare, ExactAR, ExactPredictor, WrongPredictor, enumerated_nelbo, seeded, within

import llada_helpers as h
from beyond import blocks as b
from beyond import quality
from beyond.experiments import main, suite

EXACT = ExactPredictor(length=4, symbols=2, seed=2)
WRONG = WrongPredictor(EXACT.vocab_size, seed=4)
CONFIG = h.ModelConfig(vocab_size=9, seq_len=8, n_layer=2, n_head=2, n_embd=16)
LENGTHS = (1, 2, 3, 4, 8)
SPECIAL = (h.PAD_ID, h.START_ID, h.END_ID)


def model_of(block_length, config=CONFIG, seed=0):
    """Every weight random: the zeros of a fresh one hide what is tested."""
    generator, model = seeded(seed), b.block_diffusion(block_length)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def ids_of(*shape, seed=1):
    return torch.randint(4, 9, shape, generator=seeded(seed))


def close(one, other):
    return torch.allclose(one, other, atol=1e-4, rtol=1e-4)


def by_blocks(model, block_length):
    """Any mask predictor as a block predictor: a pass for each block, the clean ones before it, [MASK] for all after it."""

    @torch.no_grad()
    def predict(pairs):
        (noisy, clean), logits = pairs.unbind(dim=1), []
        for start in range(0, noisy.shape[1], block_length):
            here, later = noisy[:, start : start + block_length], noisy[:, start + block_length :]
            ids = torch.cat((clean[:, :start], here, torch.full_like(later, MASK)), dim=1)
            logits.append(model(ids)[:, start : start + block_length])
        return torch.cat(logits, dim=1)

    return predict


def enumerated_blocks(predict, sequence, block_length, maskable=None):
    """The sum over blocks of the enumerated bound of each, given the clean ones before it and [MASK] for all after it."""
    maskable, value = torch.ones_like(sequence, dtype=torch.bool) if maskable is None else maskable, 0.0
    for start in range(0, len(sequence), block_length):
        stop, inside = start + block_length, torch.zeros_like(maskable)
        inside[start:stop] = maskable[start:stop]

        def unseen(ids, stop=stop):
            return predict(torch.cat((ids[:, :stop], torch.full_like(ids[:, stop:], MASK)), dim=1))

        value += enumerated_nelbo(unseen, sequence, inside)
    return value


# --- who sees whom ---


@pytest.mark.parametrize("block_length", LENGTHS)
@pytest.mark.parametrize("length", [1, 5, 8])
def test_the_mask_says_what_the_definition_says(length, block_length):
    mask = b.block_mask(length, block_length)
    for (q, q_clean), (k, k_clean) in itertools.product(itertools.product(range(length), (0, 1)), repeat=2):
        mine, theirs = q // block_length, k // block_length
        allowed = (theirs <= mine if q_clean else theirs < mine) if k_clean else (not q_clean and theirs == mine)
        assert bool(mask[q + q_clean * length, k + k_clean * length]) == allowed


@pytest.mark.parametrize("block_length", LENGTHS)
@torch.no_grad()
def test_no_logit_moves_with_what_it_must_not_see_and_each_moves_with_what_it_sees(block_length):
    """Change each input of the pair in turn; watch each output."""
    model, pairs = model_of(block_length), torch.stack((ids_of(1, 8), ids_of(1, 8, seed=2)), dim=1)
    before, block = model(pairs), torch.arange(8) // block_length
    for half, place in itertools.product((0, 1), range(8)):
        changed = pairs.clone()
        changed[0, half, place] = 4 + (changed[0, half, place] - 3) % 5
        moved = (model(changed) - before).abs().amax(dim=-1)[0]
        seen = block == block[place] if half == 0 else block > block[place]
        assert bool((moved[~seen] == 0).all()) and bool((moved[seen] > 1e-4).all())


@pytest.mark.parametrize("block_length", LENGTHS)
@torch.no_grad()
def test_ids_alone_see_the_blocks_up_to_their_own(block_length):
    model, ids = model_of(block_length), ids_of(1, 8)
    before, block = model(ids), torch.arange(8) // block_length
    for place in range(8):
        changed = ids.clone()
        changed[0, place] = 4 + (changed[0, place] - 3) % 5
        moved = (model(changed) - before).abs().amax(dim=-1)[0]
        assert bool((moved[block < block[place]] == 0).all()) and bool((moved[block >= block[place]] > 1e-4).all())


@pytest.mark.parametrize("block_length", LENGTHS)
@pytest.mark.parametrize("length", [1, 5, 8])
@torch.no_grad()
def test_one_pass_over_both_halves_is_a_pass_for_each_block(length, block_length):
    """Also with masks, and where rows are padded."""
    model, clean = model_of(block_length), ids_of(3, length)
    clean[1, -(length // 3) or length :] = PAD
    noisy = clean.masked_fill((torch.rand(clean.shape, generator=seeded(3)) < 0.5) & (clean != PAD), MASK)
    pairs = torch.stack((noisy, clean), dim=1)
    real = clean != PAD
    assert model(pairs).isfinite().all()
    assert close(model(pairs)[real], by_blocks(model, block_length)(pairs)[real])


@torch.no_grad()
def test_one_block_is_llada():
    """The same weights give a bidirectional Transformer's logits, whatever the clean half is."""
    model, plain = model_of(8), h.Transformer(CONFIG).eval()
    plain.load_state_dict(model.state_dict())
    ids = ids_of(2, 8).masked_fill(torch.rand(2, 8, generator=seeded(0)) < 0.5, MASK)
    assert close(model(torch.stack((ids, ids_of(2, 8, seed=5)), dim=1)), plain(ids)) and close(model(ids), plain(ids))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}


@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path):
    model, pairs = model_of(2), torch.stack((ids_of(2, 8), ids_of(2, 8, seed=2)), dim=1)
    model.save_pretrained(tmp_path / "m")
    again = h.load_model(tmp_path / "m", b.block_diffusion(2))
    assert type(again) is b.block_diffusion(2) and torch.equal(again(pairs), model(pairs))


def test_every_parameter_can_learn():
    model, ids = model_of(2), ids_of(2, 8)
    h.weighted_nll(model, *b.block_batch(2)(ids, seeded(0), h.real_tokens(ids))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# --- the bound ---


@pytest.mark.parametrize("k", [0, 6, 11])
def test_blocks_of_one_have_the_exact_value_of_ar(k):
    """Without noise, whatever the seed and the samples: -log p for the exact predictor, a wrong one's chain of conditionals."""
    row = EXACT.sequences[k][None]
    value = b.block_nelbo(by_blocks(EXACT, 1), row, MASK, block_length=1, n_samples=1, generator=seeded(k))
    assert float(value) == pytest.approx(-float(EXACT.logp[k]), abs=1e-5)
    assert float(value) == pytest.approx(float(h.ar_nll(ExactAR(EXACT), row, START)), abs=1e-5)
    chain = [b.block_nelbo(by_blocks(WRONG, 1), row, MASK, block_length=1, n_samples=n, generator=seeded(n)) for n in (1, 2, 5)]
    expected = enumerated_blocks(WRONG, row[0], 1)
    assert [float(c) for c in chain] == pytest.approx([expected] * 3, abs=1e-4)


@pytest.mark.parametrize("n_samples", [1, 2, 5])
@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 7])
def test_the_mean_is_exact_for_the_exact_predictor(block_length, n_samples):
    """For every L', also one that does not divide the length or exceeds it."""
    k, predict = 5, by_blocks(EXACT, block_length)
    row, options = EXACT.sequences[k][None].expand(50, -1), {"block_length": block_length, "n_samples": n_samples}
    means = [float(b.block_nelbo(predict, row, MASK, generator=seeded(s), **options).mean()) for s in range(30)]
    assert within(means, -float(EXACT.logp[k]))


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("block_length", [1, 2, 3, 4])
def test_the_mean_of_every_row_is_the_enumerated_value_for_a_wrong_predictor(block_length, n_samples):
    rows, predict = EXACT.sequences[[0, 6, 13]], by_blocks(WRONG, block_length)
    options = {"block_length": block_length, "n_samples": n_samples}
    runs = torch.stack([b.block_nelbo(predict, rows, MASK, generator=seeded(s), **options) for s in range(200)])
    for column, row in zip(runs.T, rows):
        assert within(column, enumerated_blocks(WRONG, row, block_length))


def test_as_many_samples_as_tokens_take_each_count_once():
    """n_samples = L' = 2: l = 1 and l = 2 in every block, so that only which token l = 1 hides is left to chance."""
    seen = []

    def predict(pairs):
        seen.append((pairs[:, 0] == MASK).view(-1, 2, 2).sum(dim=-1))
        return by_blocks(EXACT, 2)(pairs)

    b.block_nelbo(predict, EXACT.sequences[:3], MASK, block_length=2, n_samples=2, generator=seeded(0))
    assert torch.equal(torch.cat(seen).view(2, 3, 2).sort(dim=0).values, torch.tensor([1, 2])[:, None, None].expand(2, 3, 2))


def test_what_is_not_maskable_stays_visible_and_is_not_scored():
    row, maskable = EXACT.sequences[9], torch.tensor([False, True, True, False])
    options = {"block_length": 2, "n_samples": 2, "maskable": maskable[None]}
    expected = enumerated_blocks(WRONG, row, 2, maskable)
    value = b.block_nelbo(by_blocks(WRONG, 2), row[None], MASK, generator=seeded(0), **options)
    assert float(value) == pytest.approx(expected, abs=1e-4), "one token in each block: nothing is left to chance"
    nothing = {**options, "maskable": torch.zeros(1, 4, dtype=torch.bool)}
    assert float(b.block_nelbo(by_blocks(WRONG, 2), row[None], MASK, **nothing)) == 0


def test_a_longer_batch_is_scored_in_parts():
    """Rows times samples beyond what one pass takes: the same values, smaller passes."""
    sizes = []

    def predict(pairs):
        sizes.append(len(pairs))
        return by_blocks(EXACT, 1)(pairs)

    rows = EXACT.sequences.repeat(200, 1)
    value = b.block_nelbo(predict, rows, MASK, block_length=1, n_samples=1)
    assert len(sizes) > 1 and torch.allclose(value, -EXACT.logp.repeat(200).float(), atol=1e-4)


# --- training batches ---


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("block_length", [1, 2, 3, 4])
def test_the_loss_has_the_bound_as_its_expectation(block_length, size):
    """Per learned token, for a predictor that is wrong, so that wrong weights or times would be seen."""
    row, predict = EXACT.sequences[6], by_blocks(WRONG, block_length)
    rows = row.expand(size, -1)
    losses = [h.weighted_nll(predict, *b.block_batch(block_length)(rows, seeded(s), rows > 0)) for s in range(400)]
    assert within(torch.stack(losses), enumerated_blocks(WRONG, row, block_length) / 4)


def test_blocks_of_one_have_the_loss_of_ar():
    """Whatever the seed."""
    rows, predict = EXACT.sequences[[1, 6, 13]], by_blocks(EXACT, 1)
    losses = [float(h.weighted_nll(predict, *b.block_batch(1)(rows, seeded(s), rows > 0))) for s in range(5)]
    assert losses == pytest.approx([float(h.next_token_loss(ExactAR(EXACT), rows, START))] * 5, abs=1e-5)


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 1)])
def test_every_block_has_every_count_as_often_as_the_power_wants(place):
    """The times are shared out at random: neither the first row nor the first block has the large ones."""
    rows, counts = torch.full((2, 12), 5), []
    for seed in range(1000):
        pairs, _, _ = b.block_batch(4)(rows, seeded(seed), rows > 0)
        counts.append(int((pairs[place[0], 0] == MASK).view(3, 4).sum(dim=1)[place[1]]))
    edges = (torch.arange(5) / 4).double() ** (1 / h.POWER)
    assert ChiSquare.of(torch.bincount(torch.tensor(counts), minlength=5), torch.cat((torch.zeros(1), edges.diff()))).fits


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    block_length=st.integers(1, 9),
    prompt=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_batches(lengths, block_length, prompt, seed):
    """Only what is learned is masked, only that counts, at least one token of each block; the clean half is the truth."""
    rows = torch.randint(4, 7, (len(lengths), 7), generator=seeded(seed))
    rows[torch.arange(7) >= torch.tensor(lengths)[:, None]] = PAD
    learned = (rows != PAD) & (torch.arange(7) >= prompt)
    pairs, targets, weight = b.block_batch(block_length)(rows, seeded(seed), learned)
    (noisy, clean), mask = pairs.unbind(dim=1), pairs[:, 0] == MASK
    assert torch.equal(clean, rows) and torch.equal(targets, rows) and torch.equal(noisy[~mask], rows[~mask])
    assert torch.equal(weight > 0, mask) and weight.isfinite().all() and not bool((mask & ~learned).any())
    for some, free in zip(mask.split(block_length, dim=1), learned.split(block_length, dim=1)):
        assert torch.equal(some.any(dim=1), free.any(dim=1))


@given(n=st.integers(1, 6), power=st.sampled_from([1.0, 1.5, 2.0]))
def test_weights_times_probabilities_are_one_over_the_count(n, power):
    """Over a fine grid of u: sum of P(l) l weight(l) is 1 for each l, so that the expectation is the bound's for every power."""
    grid = (torch.arange(6000) + 0.5)[:, None] / 6000
    mask, weight = b.block_masks(grid, torch.ones(1, n, dtype=torch.bool), n, power, seeded(0))
    for count in range(1, n + 1):
        chosen = mask.sum(dim=-1)[:, 0] == count
        mass = float((weight.sum(dim=-1)[:, 0] * chosen).mean())  # P(l) * l / (l P(l))
        assert mass == pytest.approx(1, abs=0.01)


def test_names_tell_lengths_and_power_apart(monkeypatch):
    """Fingerprints hold names: two trainings that differ must not share one."""
    names = [f.__name__ for n in LENGTHS for f in (b.block_batch(n), b.block_diffusion(n))]
    monkeypatch.setattr(h, "POWER", 2.0)
    names += [b.block_batch(n).__name__ for n in LENGTHS]
    assert len(set(names)) == len(names) and b.block_diffusion(3) is b.block_diffusion(3)


# --- the sampler ---


def filled(model, template, block_length, per_pass, strategy=h.low_confidence, **options):
    options = {"mask_id": MASK, "steps": 1, **options}
    return h.reverse_process(model, template, remasking=b.by_place(strategy, block_length, per_pass), **options)


@pytest.mark.parametrize("strategy", ["low_confidence", "random"])
@pytest.mark.parametrize("prompt", [0, 1, 5])
@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
def test_cached_and_uncached_sampling_give_the_same_tokens(block_length, prompt, strategy):
    """Whatever the length of the prompt, for one row and for several; the cached one looks at each finished block once."""
    model = model_of(block_length)
    looked_at = []
    model.embed.register_forward_hook(lambda module, given, out: looked_at.append(out.shape[1]))
    for rows in (1, 3):
        template, made = torch.cat((ids_of(rows, prompt), torch.full((rows, 8 - prompt), MASK)), dim=1), []
        for predict in (model, b.cached_blocks(model)):
            looked_at.clear()
            generator = seeded(7)
            options = {"temperature": 1.0, "forbidden": SPECIAL, "generator": generator}
            order = h.random_order(generator) if strategy == "random" else h.low_confidence
            made.append(filled(predict, template, block_length, 2, order, **options))
        plain, kept = made
        assert torch.equal(plain.ids, kept.ids) and torch.equal(plain.order, kept.order) and plain.nfe == kept.nfe
        assert close(plain.confidence, kept.confidence) and len(looked_at) == kept.nfe
        assert max(looked_at[1:], default=0) <= 2 * block_length, "the finished block and the next one"


@torch.no_grad()
def test_the_cache_is_exact_where_a_row_is_being_filled():
    """Ids that change inside finished blocks, gain and lose rows or masks, [PAD] among them."""
    model, generator = model_of(3), seeded(0)
    predict, block = b.cached_blocks(model), torch.arange(8) // 3
    for step in range(200):
        if step == 0 or not int(torch.randint(3, (1,), generator=generator)):
            ids = torch.randint(4, 9, (int(torch.randint(1, 3, (1,), generator=generator)), 8), generator=generator)
        flip = torch.rand(ids.shape, generator=generator)
        ids = ids.masked_fill(flip < 0.1, MASK).masked_fill((flip > 0.1) & (flip < 0.13), PAD)
        ids = torch.where(flip > 0.93, 4 + (ids + 1) % 5, ids)
        opened = (ids == MASK) & (block == (ids == MASK).long().argmax(dim=1, keepdim=True) // 3)
        assert close(predict(ids)[opened], model(ids)[opened])


@pytest.mark.parametrize("block_length", [1, 2, 3, 4])
def test_one_by_one_the_exact_predictor_draws_from_the_true_distribution(block_length):
    template, generator = torch.full((8_000, 4), MASK), seeded(1)
    made = filled(EXACT, template, block_length, 1, h.random_order(generator), temperature=1.0, generator=generator)
    assert ChiSquare.of(torch.bincount(EXACT.index(made.ids), minlength=len(EXACT.logp)), EXACT.logp.exp()).fits
    assert bool((made.order // block_length == torch.arange(4) // block_length).all()), "from left to right"


@given(block_length=st.integers(1, 9), per_pass=st.integers(1, 9), share=st.floats(0.1, 1), seed=st.integers(0, 10**6))
def test_blocks_are_filled_one_after_the_other_and_what_is_given_stays(block_length, per_pass, share, seed):
    """Masks anywhere, other ones in each row: each pass commits at most so many, all of one block, the next one after it."""
    template = ids_of(3, 8, seed=seed).masked_fill(torch.rand(3, 8, generator=seeded(seed)) < share, MASK)
    template[0, 3] = MASK
    blanks, block = template == MASK, torch.arange(8) // block_length
    made = filled(WrongPredictor(9, longest=8), template, block_length, per_pass)
    assert torch.equal(made.ids[~blanks], template[~blanks]) and bool((made.ids != MASK).all())
    assert torch.equal(made.order >= 0, blanks)
    for row, some in zip(made.order, blanks):
        passes = [block[(row == step) & some] for step in range(int(row.max()) + 1)]
        assert all(1 <= len(one) <= per_pass and len(one.unique()) == 1 for one in passes)
        assert [int(one[0]) for one in passes] == sorted(int(one[0]) for one in passes)
        assert len(passes) == sum(math.ceil(int(n) / per_pass) for n in torch.bincount(block[some]))
    assert made.nfe == int(made.order.max()) + 1


@pytest.mark.parametrize("block_length", [2, 4])
def test_from_nothing_a_block_is_as_many_masks(block_length):
    """Then it is the helper's semi-autoregressive decoding: greedy, the same tokens."""
    model, template = model_of(block_length), torch.full((3, 8), MASK)
    made = filled(b.cached_blocks(model), template, block_length, block_length // 2, forbidden=SPECIAL)
    options = {"mask_id": MASK, "block_length": block_length, "forbidden": SPECIAL}
    again = h.reverse_process(model, template, steps=2 * 8 // block_length, **options)
    assert torch.equal(made.ids, again.ids) and made.nfe == again.nfe
    for order in (made.order, again.order):  # a first block of masks alone looks the same everywhere: rounding breaks the ties
        order[:, :block_length] = order[:, :block_length].sort(dim=1).values
    assert torch.equal(made.order, again.order)


@pytest.mark.parametrize("kind", ["AR", 1, 2, 8, "LLaDA"])
def test_texts_keep_their_prompts_and_take_their_passes(kind):
    made = h.Transformer if isinstance(kind, str) else b.block_diffusion(kind)
    torch.manual_seed(0)
    model = made(replace(CONFIG, causal=kind == "AR")).eval()
    length, template = {"AR": 1, "LLaDA": 8}.get(kind, kind), torch.cat((ids_of(2, 3), torch.full((2, 5), MASK)), dim=1)
    for per_pass in b.settings(length):
        out = b.write(model, template, per_pass, seeded(5))
        free = [min(start + length, 8) - max(3, start) for start in range(0, 8, length) if start + length > 3]
        assert out.nfe == sum(math.ceil(n / per_pass) for n in free)
        assert torch.equal(out.ids[:, :3], template[:, :3]) and bool((out.ids >= 4).all()) and out.ids.shape == (2, 8)


@given(st.integers(1, 300))
def test_settings_go_from_one_character_a_pass_to_all(length):
    made = b.settings(length)
    assert list(made) == sorted({1, min(2, length), min(4, length), length})
    assert made[1] == "L'" and all(name in ("L'", "L'/2", "L'/4", "1") for name in made.values())


# --- trainings ---


@pytest.mark.parametrize("block_length", [1, 4, 8])
def test_training_lowers_the_bound_and_is_scored_by_it(tmp_path, block_length):
    ids = torch.arange(4, 9).repeat(40)
    config = h.TrainConfig(steps=100, batch_size=8, evals=2, eval_windows=8)
    job = b.BlockJob(CONFIG, config, ids, ids, architecture=b.block_diffusion(block_length))
    run, sequences = h.train("blocks", job, root=tmp_path, quiet=True), job.validation_sequences()
    options = {"block_length": block_length, "n_samples": 4, "generator": seeded(0)}
    nats = b.block_nelbo(run.model, sequences, MASK, maskable=h.real_tokens(sequences), **options)
    assert run.summary["best"] == pytest.approx(float(nats.sum() / h.real_tokens(sequences).sum()), abs=1e-5)
    assert run.summary["best"] < 0.85 * math.log(5), "better than without context"
    assert run.summary["architecture"] == f"BlockDiffusion_{block_length}"
    assert type(run.model) is b.block_diffusion(block_length)


@pytest.mark.parametrize("preset", h.PRESETS)
def test_rows_of_the_suite(preset):
    """Equal parameters, another training in each row; half the steps where a pass is over both halves."""
    ids = torch.full((2000,), 5)
    for whose, config in b.SIZES[preset]:
        rows = b.block_jobs(h.PRESETS[whose], config, 30, ids, ids)
        marks = [job.fingerprint() for trials in rows.values() for job in trials]
        assert len(set(marks)) == len(marks) == 3 * (2 + len(b.LENGTHS)) and max(b.LENGTHS) < h.PRESETS[whose].seq_len
        assert list(rows) == ["LLaDA", "AR", *(f"L' = {n}" for n in b.LENGTHS)]
        for row, trials in rows.items():
            steps = config.steps if row in ("LLaDA", "AR") else config.steps // 2
            assert [(job.train.steps, job.train.seed) for job in trials] == [(steps, 0), (steps, 1), (steps, 2)]
            assert replace(trials[0].model, causal=False) == rows["LLaDA"][0].model and trials[0].model.causal == (row == "AR")


# --- the suite's columns ---

TEXT = "to be, or not to be: that is the question. " * 40
TOKENIZER = h.CharTokenizer.from_text(TEXT)
SMOKE = h.PRESETS["smoke"]


@pytest.mark.parametrize("row", ["AR", "L' = 8", "LLaDA"])
def test_measure_is_of_these_texts(row):
    train_ids, val_ids, _ = quality.parts(TOKENIZER.encode(TEXT))
    job = b.block_jobs(SMOKE, h.TrainConfig(1, 2), TOKENIZER.vocab_size, train_ids, val_ids)[row][0]
    torch.manual_seed(0)
    run, windows = h.Run(job.architecture(job.model).eval(), None, {}, None), h.windows(val_ids, job.model.seq_len)
    found, length = suite("blocks", SMOKE, TEXT)[2]["measure"](job, run), {"AR": 1, "L' = 8": 8, "LLaDA": 64}[row]
    assert found["block length"] == length
    nats = job.validation_nats(run.model, windows)
    assert found["nats/char"] == pytest.approx(float(nats.sum() / (windows != PAD).sum()), rel=1e-5)
    scores = quality.TextMeasure(TOKENIZER, TEXT[: len(train_ids)])
    for per_pass, name in b.settings(length).items():
        made = b.write(run.model, quality.prompts(windows, SMOKE.texts)[1], per_pass, seeded(0))
        expected = {"passes": made.nfe} | {k: x for k, x in scores(made.ids).items() if not k.startswith("copied")}
        told = {key.removesuffix(f" ({name})"): x for key, x in found.items() if key.endswith(f"({name})")}
        assert told.keys() == expected.keys() and list(told.values()) == pytest.approx([expected[key] for key in told])


def test_suite_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Few lengths, two steps: every row with its columns."""
    short = ("smoke", h.TrainConfig(2, 2, evals=1, eval_windows=2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(b, "LENGTHS", (1, 4))
    monkeypatch.setitem(b.SIZES, "smoke", (short, short))
    monkeypatch.setitem(h.PRESETS, "smoke", replace(SMOKE, texts=8, n_layer=1, n_embd=8))
    Path("text.txt").write_text(TEXT)
    monkeypatch.setenv("LLADA_DATA", "text.txt")
    main(["blocks", "--preset", "smoke"])
    assert "L' = 4" in capsys.readouterr().out
    table = pd.read_csv("build/smoke/figures/tables/blocks.csv")
    kinds = {"LLaDA": 64, "AR": 1, "L' = 1": 1, "L' = 4": 4}
    assert dict(zip(table["row"], table["block length"])) == kinds
    for _, line in table.iterrows():
        told = {name for name in ("L'", "L'/2", "L'/4", "1") if np.isfinite(line[f"judge nats/char ({name})"])}
        assert told == set(b.settings(line["block length"]).values())


# --- what is refused ---


@pytest.mark.parametrize(
    "call",
    [
        lambda: b.block_mask(4, 0),
        lambda: b.block_diffusion(0),
        lambda: b.block_batch(-1),
        lambda: b.block_diffusion(2)(h.ModelConfig(9, 8, 1, 2, 8, causal=True)),
        lambda: model_of(2)(ids_of(2, 9)),
        lambda: model_of(2)(ids_of(2, 2, 9)),
        lambda: model_of(2)(ids_of(2, 3, 8)),
        lambda: model_of(2)(ids_of(8)),
        lambda: b.cached_blocks(h.Transformer(CONFIG)),
        lambda: b.block_nelbo(by_blocks(EXACT, 1), EXACT.sequences, MASK, block_length=1, n_samples=0),
        lambda: b.block_nelbo(by_blocks(EXACT, 1), EXACT.sequences, MASK, block_length=0, n_samples=1),
        lambda: b.block_nelbo(by_blocks(EXACT, 1), EXACT.sequences[0], MASK, block_length=1, n_samples=1),
        lambda: b.by_place(h.entropy, 0, 1),
        lambda: b.by_place(h.entropy, 1, 0),
        lambda: filled(model_of(2), torch.full((1, 9), MASK), 2, 1),
    ],
)
def test_errors_say_what_to_pass(call):
    with pytest.raises(ValueError, match="pass"):
        call()
