"""beyond/pricing.py: what stands in for the model is asked what the model would be asked, and the sum for `gpu` is held."""

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from notebooks import BEYOND, CORPUS, MAIN, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import llada_helpers as H
from beyond import blocks, decoding, knob, pricing

SHAPE = H.ModelConfig(vocab_size=9, seq_len=24, n_layer=2, n_head=1, n_embd=8)
ASKED = []  # (rows, length, keys) of every forward pass of `Recorded`


class Recorded(H.Transformer):
    """The real one, which writes down what it is asked."""

    def forward(self, ids, cache=None, start=0):
        logits = super().forward(ids, cache, start)
        ASKED.append((*ids.shape, ids.shape[1] if cache is None else cache.length))
        return logits


@pytest.fixture
def meter():
    ASKED.clear()
    return pricing.Meter()


def assert_as_asked(spent: pricing.Spent) -> None:
    """Passes, characters and operations, from what the real model was asked and a formula written anew."""
    assert ASKED and spent.passes == len(ASKED)
    assert spent.characters == sum(rows * length for rows, length, _ in ASKED)
    matrices, attention = 2 * 12 * 8 * 8 + 9 * 8, 2 * 2 * 8  # multiplications a token; in attention, a token and key
    assert spent.evaluation == sum(2 * rows * length * (matrices + attention * keys) for rows, length, keys in ASKED)


def test_operations_are_those_of_the_matrices():
    """Two for each parameter but the embedding's, and QK^T and AV, whose products have keys x n_embd multiplications a token."""
    model = H.Transformer(SHAPE)
    parameters = model.n_parameters - model.embed.weight.numel()
    assert pricing.forward_flop(SHAPE, 5, 20) == 2 * 5 * (parameters + 2 * (20 * 8 + 20 * 8))


@given(rows=st.integers(1, 30), samples=st.integers(1, 60), length=st.sampled_from([8, 24]))
def test_likelihoods_are_asked_for_as_in_the_helper(rows, samples, length):
    """At most 2^14 tokens a pass."""
    meter, real = pricing.Meter(), Recorded(SHAPE)
    sequences = torch.full((rows, length), 5)
    ASKED.clear()
    H.nelbo(real, sequences, H.MASK_ID, n_samples=samples)
    H.ar_nll(real, sequences, H.START_ID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(H, "_nll", meter.nll)
        H.nelbo(meter.predictor(SHAPE), sequences, H.MASK_ID, n_samples=samples)
        nats = H.ar_nll(meter.predictor(SHAPE), sequences, H.START_ID)
    assert nats.shape == (rows,)
    assert meter.spent[""].characters == rows * samples * length + rows * length
    assert meter.spent[""].passes == math.ceil(rows * samples / (2**14 // length)) + 1
    assert_as_asked(meter.spent[""])


def test_ar_with_its_cache_is_asked_for_a_token_a_pass(meter):
    config, prompt = replace(SHAPE, causal=True), torch.tensor([[4, 5, 6]] * 7)
    made = meter.generate_ar(meter.predictor(config), prompt, 10, start_id=H.START_ID)
    H.generate_ar(Recorded(config), prompt, 10, start_id=H.START_ID)
    assert ASKED[0] == (7, 4, 4)  # [START] and the prompt
    assert ASKED[1:] == [(7, 1, keys) for keys in range(5, 14)]
    assert_as_asked(meter.spent[""])
    assert made.ids.shape == made.order.shape == made.confidence.shape == (7, 13) and torch.equal(made.ids[:, :3], prompt)


@given(st.data())
def test_decoding_is_asked_for_as_with_the_real_sampler(data):
    meter, real, rows = pricing.Meter(), Recorded(SHAPE), data.draw(st.integers(1, 5))
    blocks = data.draw(st.sampled_from([1, 2, 4]))
    options = {"mask_id": H.MASK_ID, "steps": blocks * data.draw(st.integers(1, 20)), "block_length": 16 // blocks}
    options["remasking"] = data.draw(st.sampled_from(["low_confidence", "random", "entropy", "margin", decoding.threshold(0.9)]))
    template = torch.full((rows, 20), H.MASK_ID)
    template[:, :4] = torch.randint(4, 9, (rows, 4))
    ASKED.clear()
    made = meter.reverse_process(meter.predictor(SHAPE), template, **options)
    expected = H.reverse_process(real, template, **options)
    assert made.nfe == expected.nfe and torch.equal(made.order < 0, expected.order < 0)
    assert torch.equal(made.ids[:, :4], template[:, :4]) and not bool((made.ids == H.MASK_ID).any())
    assert_as_asked(meter.spent[""])


def test_rows_of_different_lengths_take_the_passes_of_the_longest(meter):
    template = torch.full((3, 12), 5)
    for row, masks in enumerate((2, 9, 4)):
        template[row, :masks] = H.MASK_ID
    made = meter.reverse_process(meter.predictor(SHAPE), template, mask_id=H.MASK_ID, steps=9)
    H.reverse_process(Recorded(SHAPE), template, mask_id=H.MASK_ID, steps=9)
    assert made.nfe == 9 and torch.equal(made.order >= 0, template == H.MASK_ID)
    assert_as_asked(meter.spent[""])


def test_composed_predictors_are_charged_for_what_they_ask(meter, monkeypatch):
    """Guidance asks for twice the rows, the block cache for a block's columns, a revision for its further passes."""
    template = torch.full((6, 24), H.MASK_ID)
    template[:, :8] = 5
    blocks = {"mask_id": H.MASK_ID, "steps": 16, "block_length": 4}
    options = {"mask_id": H.MASK_ID, "steps": 8}

    def everything(model) -> None:
        H.reverse_process(decoding.guided(model, template[:1] != H.MASK_ID, 1.0), template, **options)
        H.reverse_process(decoding.cached(model, template, H.MASK_ID, 4), template, **blocks)
        decoding.revise(model, H.reverse_process(model, template, **options), mask_id=H.MASK_ID, passes=3)

    everything(Recorded(SHAPE))
    assert {rows for rows, *_ in ASKED} == {6, 12} and {length for _, length, _ in ASKED} == {4, 24}
    with pricing._metered(meter, H.PRESETS["smoke"], "a text"):
        everything(meter.predictor(SHAPE))
    assert_as_asked(meter.spent[""])


def test_a_predictor_made_for_the_whole_batch_is_not_charged_wrongly_in_silence(meter):
    given_tokens = torch.zeros(4, 24, dtype=torch.bool)
    predict = decoding.guided(meter.predictor(SHAPE), given_tokens, 1.0)
    with pytest.raises(ValueError, match="given is"):
        meter.reverse_process(predict, torch.full((4, 24), H.MASK_ID), mask_id=H.MASK_ID, steps=2)


@pytest.mark.parametrize("causal", [False, True])
def test_training_is_three_forward_passes_a_step_and_its_validations(causal, tmp_path, monkeypatch, meter):
    """What the real training asks of the real model; five steps, a validation after the second, third and fifth."""
    ids = torch.arange(4, 9).repeat(40)
    job = H.Job(replace(SHAPE, causal=causal), H.TrainConfig(5, 4, evals=3, eval_windows=6), ids, ids, architecture=Recorded)
    H.train("real", job, root=tmp_path, quiet=True)
    steps = [asked for asked in ASKED if asked == (4, 24, 24)]
    assert len(steps) == 5
    validations = [asked for asked in ASKED if asked != (4, 24, 24)]
    monkeypatch.setattr(H, "_nll", meter.nll)
    run = meter.train("counted", job)
    spent = meter.spent[""]
    assert spent.passes == len(ASKED) and spent.characters == sum(rows * length for rows, length, _ in ASKED)
    assert spent.training == 3 * 5 * 4 * pricing.forward_flop(SHAPE, 24, 24)
    assert spent.evaluation == sum(rows for rows, *_ in validations) * pricing.forward_flop(SHAPE, 24, 24)
    assert len(run.metrics) == 3 and run.metrics["step"].tolist() == [2, 3, 5] and run.summary["complete"]
    before = spent.characters
    meter.train("the same under another name", job)
    assert spent.characters == before, "it would be loaded"
    meter.train("another", replace(job, train=replace(job.train, seed=1)))
    assert spent.characters == 2 * before


@pytest.mark.parametrize("block_length", [1, 4, 24])
def test_block_diffusion_is_charged_for_both_halves(block_length, tmp_path, meter):
    """Training, validation, the bound and writing with the exact cache, beside what the real one is asked."""
    asked, forward, ids = [], blocks.BlockDiffusion.forward, torch.arange(4, 9).repeat(20)
    template = torch.full((3, 24), H.MASK_ID)
    template[:, :7] = 5

    def recorded(self, ids, cache=None, start=0):
        logits = forward(self, ids, cache, start)
        halves = ids.ndim - 1 if ids.shape[-1] > self.block_length else 1
        asked.append((len(ids), halves * ids.shape[-1], halves * ids.shape[-1] if cache is None else cache.length))
        return logits

    def everything() -> None:
        kind = blocks.block_diffusion(block_length)
        job = blocks.BlockJob(SHAPE, H.TrainConfig(5, 4, evals=2, eval_windows=3), ids, ids, architecture=kind)
        model = H.train("blocks", job, root=tmp_path, quiet=True).model
        assert type(model).__name__ == f"BlockDiffusion_{block_length}"
        blocks.block_nelbo(model, template[:2, :9], H.MASK_ID, block_length=block_length, n_samples=3)
        for passes in (1, 2):
            knob.fill(model, template, passes, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.BlockDiffusion, "forward", recorded)
        everything()
    with pricing._metered(meter, H.PRESETS["smoke"], "a text"):
        everything()
    spent = meter.spent[""]
    trained = 4 * 24 * (1 if block_length == 24 else 2)
    assert spent.passes == len(asked) and spent.characters == sum(rows * length for rows, length, _ in asked)
    assert spent.training == 3 * 5 * pricing.forward_flop(SHAPE, trained, trained // 4)
    flop = sum(rows * pricing.forward_flop(SHAPE, length, keys) for rows, length, keys in asked)
    assert spent.evaluation + spent.training / 3 == flop


def test_a_pass_with_gradients_costs_three(meter):
    model, ids = meter.predictor(SHAPE), torch.full((3, 24), 5)
    with torch.no_grad():
        model(ids)
    once = meter.spent[""].evaluation
    model(ids).sum().backward()
    assert meter.spent[""].evaluation == 4 * once and meter.spent[""].passes == 2 and meter.spent[""].training == 0


def test_small_passes_are_bound_by_launching_and_large_ones_by_computing(meter):
    wide = H.ModelConfig(vocab_size=69, seq_len=256, n_layer=6, n_head=6, n_embd=384)
    launches = pricing.LAYER_KERNELS * 6 + pricing.OTHER_KERNELS
    for rows, times in ((1, [launches * m.launch for m in pricing.MACHINES]), (256, None)):
        meter.section = str(rows)
        meter.charge(wide, rows, 256, 256, gradients=False)
        flop = rows * pricing.forward_flop(wide, 256, 256)
        assert meter.spent[str(rows)].seconds == pytest.approx(times or [flop / m.evaluation for m in pricing.MACHINES])
    assert meter.clock() == pytest.approx(sum(meter.spent[section].seconds[0] for section in ("1", "256")))


class Operators(TorchDispatchMode):
    """Counts what PyTorch does, views aside."""

    VIEWS = ("view", "transpose", "permute", "unbind", "split", "slice", "expand", "t", "select", "unsqueeze", "alias", "detach")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__.strip("_").removeprefix("unsafe_") not in self.VIEWS
        return function(*args, **(kwargs or {}))


def test_kernels_of_a_pass_are_about_those_that_pytorch_launches():
    def of_a_pass(n_layer: int) -> float:
        model = H.Transformer(replace(SHAPE, n_layer=n_layer))
        with Operators() as operators:
            made = H.reverse_process(model, torch.full((2, 24), H.MASK_ID), mask_id=H.MASK_ID, steps=24, temperature=1.0)
        return operators.count / made.nfe

    two, six = of_a_pass(2), of_a_pass(6)
    assert (six - two) / 4 == pytest.approx(pricing.LAYER_KERNELS, rel=0.1)
    assert six == pytest.approx(6 * pricing.LAYER_KERNELS + pricing.OTHER_KERNELS, rel=0.1)


# --- whole notebooks ---

TEXT = "".join(f"{name}:\nthe {thing} of my {other} is here\n\n" for name in ("ANN", "BEN", "CAT", "DAN", "EVE")
               for thing in ("king", "crown", "night") for other in ("heart", "sword", "house", "queen")) * 3  # fmt: skip


def characters(meter: pricing.Meter) -> dict[str, int]:
    return {section: spent.characters for section, spent in meter.spent.items()}


def test_a_section_costs_what_its_sizes_say_and_no_other_one_moves():
    smoke = replace(H.PRESETS["smoke"], nelbo_samples=2)
    base, more = (characters(pricing.count(ROOT / MAIN, p, TEXT)) for p in (smoke, replace(smoke, texts=2 * smoke.texts)))
    changed = {section for section in base if base[section] != more[section]}
    assert changed == {"Coherence and diversity, in numbers"}
    assert more[changed.pop()] == 2 * base["Coherence and diversity, in numbers"]
    windows = len(H.windows(H.split(H.CharTokenizer.from_text(TEXT).encode(TEXT))[1], smoke.seq_len))
    assert base["Perplexity, on the same characters"] == windows * smoke.seq_len * (smoke.nelbo_samples + 1)
    steps = sum(config.steps * config.batch_size for config in (smoke.llada, smoke.ar))
    assert base["Part 6: Training"] == smoke.seq_len * (steps + min(32, windows) * (5 * 4 + 5))


def test_counting_leaves_everything_as_it_was(tmp_path, monkeypatch, meter):
    monkeypatch.chdir(tmp_path)
    kept = (H.Transformer, H._nll, H.train, H.load_text, decoding.cached, time.perf_counter, torch.cuda.is_available)
    drawn = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError), pricing._metered(meter, H.PRESETS["smoke"], "a text"):
        assert H.load_text() == "a text" and os.getcwd() != str(tmp_path)
        Path("left").write_text("behind")
        torch.rand(3), 1 / 0
    assert kept == (H.Transformer, H._nll, H.train, H.load_text, decoding.cached, time.perf_counter, torch.cuda.is_available)
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())
    assert torch.equal(drawn, torch.random.get_rng_state())


@pytest.mark.skipif(not CORPUS, reason="needs TinyShakespeare, in shared/ or $LLADA_DATA")
def test_gpu_keeps_its_promise_and_the_committed_table_says_what_is_counted():
    """Each notebook from nothing, its trainings included: 25 minutes on a T4, 8 on an H100. `python bench.py --budget gpu`."""
    table = pricing.price_table([ROOT / MAIN, ROOT / BEYOND], H.PRESETS["gpu"], H.load_text(CORPUS))
    assert table["row"].is_unique
    for name in (MAIN, BEYOND):
        (total,) = table[table["row"] == f"all of {name}"].to_dict("records")
        assert 0 < total["T4, minutes"] < 25 and 0 < total["H100, minutes"] < 8, total
    sums = table[~table["row"].str.startswith("all of")].iloc[:, 1:].sum()
    assert sums.to_dict() == pytest.approx(table[table["row"].str.startswith("all of")].iloc[:, 1:].sum().to_dict())
    committed = pd.read_csv(ROOT / "figures" / "tables" / "budget_gpu.csv")
    pd.testing.assert_frame_equal(committed, table.reset_index(drop=True).round(4), check_dtype=False, atol=2e-4)
