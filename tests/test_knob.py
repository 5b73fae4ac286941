"""What the block length buys and costs: texts, blanks and speeds of AR, block diffusion and LLaDA, and the race between them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import seeded

import llada_helpers as h
from beyond import blocks, budget, knob, quality
from beyond.experiments import main, suite

TEXT = "to be, or not to be: that is the question. " * 40
TOKENIZER = h.CharTokenizer.from_text(TEXT)
TRAIN, VAL, _ = quality.parts(TOKENIZER.encode(TEXT))
SMOKE = h.PRESETS["smoke"]
SHAPE = h.ModelConfig(TOKENIZER.vocab_size, 64, n_layer=2, n_head=2, n_embd=16)
KINDS = ("AR", 1, 2, 4, 8, 32, 64, "LLaDA")


def model_of(kind, shape=SHAPE, seed=0):
    """Every weight random: the zeros of a fresh one hide what is tested."""
    made = h.Transformer if isinstance(kind, str) else blocks.block_diffusion(kind)
    model, generator = made(replace(shape, causal=kind == "AR")).eval(), seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def template_of(rows, prompt=16, length=64):
    ids = torch.randint(4, SHAPE.vocab_size, (rows, length), generator=seeded(1))
    ids[:, prompt:] = h.MASK_ID
    return ids


# --- passes per block ---


@given(st.integers(1, 300))
def test_passes_go_from_one_for_each_token_to_one_for_all(length):
    made = knob.passes(length)
    counts = list(made.values())
    assert counts[0] == length and counts[-1] == 1 and counts == sorted(set(counts), reverse=True)
    assert set(counts) == {length, math.ceil(length / 2), math.ceil(length / 4), 1} and set(made) <= set(knob.SETTINGS)
    for name, share in (("L'/2", 2), ("L'/4", 4)):
        assert made.get(name, counts[-1]) in (math.ceil(length / share), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_written_texts_take_the_passes_they_are_given_and_keep_their_prompts(kind):
    model, template = model_of(kind), template_of(3)
    length = knob.block_length_of(model)
    for count in knob.passes(length).values():
        made = knob.fill(model, template, count, 1.0, seeded(0))
        free = [min(start + length, 64) - max(16, start) for start in range(0, 64, length) if start + length > 16]
        assert made.nfe == sum(min(count, some) for some in free)
        assert torch.equal(made.ids[:, :16], template[:, :16]) and bool((made.ids >= 4).all()) and made.ids.shape == (3, 64)


@pytest.mark.parametrize("kind", ["AR", "LLaDA"])
def test_one_by_one_ar_and_llada_write_as_in_the_other_studies(kind):
    model, template = model_of(kind), template_of(4)
    ours = knob.fill(model, template, knob.block_length_of(model), 1.0, seeded(5))
    theirs = quality.write(model, template, temperature=1.0, generator=seeded(5))
    assert torch.equal(ours.ids, theirs.ids) and ours.nfe == theirs.nfe == 48


@pytest.mark.parametrize("temperature, remasking", [(0.0, "low_confidence"), (1.0, "random")])
def test_blocks_are_filled_as_without_a_cache(temperature, remasking):
    """By passes over no more than a finished block and the next one."""
    model, template, looked_at = model_of(8), template_of(3, prompt=13), []
    hook = model.embed.register_forward_hook(lambda module, given, out: looked_at.append(out.shape[1]))
    ours = knob.fill(model, template, 4, temperature, seeded(2))
    hook.remove()
    assert len(looked_at) == ours.nfe and max(looked_at) <= 16
    options = {"temperature": temperature, "remasking": remasking, "forbidden": quality.SPECIAL, "generator": seeded(2)}
    plain = blocks.generate_blocks(model, template, mask_id=h.MASK_ID, block_length=8, steps_per_block=4, **options)
    assert torch.equal(ours.ids, plain.ids) and torch.equal(ours.order, plain.order) and ours.nfe == plain.nfe


@pytest.mark.parametrize("places", [[(0, 3), (0, 5)], [(0, 3), (1, 3), (1, 4)], [(0, 3), (1, 4)], []])
def test_ar_refuses_masks_that_are_not_one_run(places):
    template = torch.full((2, 8), 5)
    for place in places:
        template[place] = h.MASK_ID
    with pytest.raises(ValueError, match="pass"):
        knob.fill(model_of("AR"), template, 1, 1.0)


# --- likelihood ---


@pytest.mark.parametrize("kind", ["AR", "LLaDA"])
def test_ar_and_llada_are_scored_as_in_the_other_studies(kind):
    ours, theirs = (f(model_of(kind), VAL, 3) for f in (knob.window_nats, budget.window_nats))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("samples", [1, 5, 8])
@pytest.mark.parametrize("kind", [2, 8, 64])
def test_each_window_has_at_least_as_many_blocks_masked_as_llada_has_windows(kind, samples):
    model, seen = model_of(kind), []
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    nats, counts = knob.window_nats(model, VAL, samples)
    windows = h.windows(VAL, 64)
    n_samples, rest = divmod(sum(seen), len(windows))
    assert rest == 0 and n_samples * (64 // kind) >= samples > (n_samples - 1) * (64 // kind)
    real = windows != h.PAD_ID
    options = {"block_length": kind, "n_samples": n_samples, "maskable": real, "generator": seeded(0)}
    assert torch.equal(nats, blocks.block_nelbo(model, windows, h.MASK_ID, **options)) and torch.equal(counts, real.sum(dim=1))


def test_blocks_of_one_are_exact_whatever_the_samples():
    """The chain of conditionals, one at a time; padding costs nothing."""
    model, windows = model_of(1), h.windows(VAL, 64)
    nats, counts = knob.window_nats(model, VAL, 1)
    assert torch.equal(nats, knob.window_nats(model, VAL, 64)[0]) and counts[-1] < 64
    with torch.no_grad():
        for row in (0, len(windows) - 1):
            chain = 0.0
            for i in range(int(counts[row])):
                ids = torch.cat((windows[row, :i], torch.tensor([h.MASK_ID])))
                chain -= float(model(ids[None])[0, i].log_softmax(dim=-1)[windows[row, i]])
            assert float(nats[row]) == pytest.approx(chain, rel=1e-4)


# --- blanks ---


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_a_blank_begins_a_block_of_every_length_and_lies_within(preset):
    windows = h.windows(torch.randint(4, 20, (2000,), generator=seeded(0)), preset.seq_len)
    truth, hole = knob.blanks(windows, 5)
    assert all(hole.start % length == 0 for length in blocks.LENGTHS) and hole.stop - hole.start == knob.BLANK
    assert hole.start > 0 and hole.stop < preset.seq_len and abs(hole.start - preset.seq_len / 2) <= max(blocks.LENGTHS) / 2
    assert truth.shape == (5, preset.seq_len) and bool((truth != h.PAD_ID).all())
    assert all(any(torch.equal(row, window) for window in windows) for row in truth)


@pytest.mark.parametrize("kind", KINDS)
def test_blanks_are_filled_from_what_the_model_may_see(kind):
    """Change what precedes the blank, what follows it in its block, what follows its block: the filling moves or not."""
    model, (truth, hole) = model_of(kind), (template_of(40, prompt=64), slice(32, 36))
    stop = 32 + max(knob.BLANK, knob.block_length_of(model))
    template = truth.clone()
    template[:, hole] = h.MASK_ID

    def filled(changed):
        some = template.clone()
        some[:, changed] = 4 + (some[:, changed] - 3) % (SHAPE.vocab_size - 4)
        return knob.fill(model, some, knob.block_length_of(model), 0.0).ids[:, hole]

    before = knob.fill(model, template, knob.block_length_of(model), 0.0).ids[:, hole]
    assert not torch.equal(filled(slice(0, 32)), before)
    assert torch.equal(filled(slice(stop, 64)), before)
    assert torch.equal(filled(slice(36, stop)), before) == (stop == 36)


class Knows(h.Transformer):
    """Sure of these ids at every place."""

    def forward(self, ids, cache=None, start=0):
        return 9 * torch.eye(self.config.vocab_size)[self.known[start : start + ids.shape[1]]].expand(len(ids), -1, -1)


def test_a_blank_counts_if_all_of_it_is_right():
    truth = torch.randint(4, SHAPE.vocab_size, (6, 64), generator=seeded(3))
    truth[:] = truth[0]
    model, hole = Knows(SHAPE), slice(32, 36)
    model.known = truth[0]
    for row, place in ((1, 32), (3, 34), (4, 35), (5, 36)):  # the last one is no part of it
        truth[row, place] = 4 + (truth[row, place] - 3) % (SHAPE.vocab_size - 4)
    assert knob.infilled(model, truth, hole) == [True, False, True, False, False, True]


# --- the suite's columns ---


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_of(kind):
    model = model_of(kind, replace(SMOKE.model(TOKENIZER.vocab_size, causal=False)))
    return h.Run(model, pd.DataFrame(), {}, None)


@pytest.mark.parametrize("kind", ["AR", 1, 4, 16, "LLaDA"])
def test_measure_is_of_these_texts_and_blanks(kind):
    run = run_of(kind)
    row = knob.knob_measure(SMOKE, TEXT)(None, run)
    windows, length = h.windows(VAL, run.model.config.seq_len), knob.block_length_of(run.model)
    assert row["block length"] == length
    assert (row["nats/char"], row["95% ±"]) == h.per_character(*knob.window_nats(run.model, VAL, SMOKE.nelbo_samples))
    assert (row["infilled"], row["infilled ±"]) == h.share(knob.infilled(run.model, *knob.blanks(windows, SMOKE.blanks)))
    judge, words = quality.ngram_judge(TEXT[: len(TRAIN)]), {w.lower() for w in h.WORD.findall(TEXT[: len(TRAIN)])}
    for name, count in knob.passes(length).items():
        made = knob.fill(run.model, quality.prompts(windows, SMOKE.texts)[1], count, 1.0, seeded(0))
        texts = [TOKENIZER.decode(ids) for ids in made.ids]
        assert row[f"judge nats/char ({name})"] == pytest.approx(np.mean([judge(one, quality.PREFIX) for one in texts]))
        groups = [[one[quality.PREFIX :] for one in texts[i : i + 2]] for i in range(0, len(texts), 2)]
        scores = h.grouped([h.text_metrics(group, [], words) for group in groups])
        for key in ("known words", "char entropy", "char entropy ±", "distinct-3"):
            assert row[f"{key} ({name})"] == pytest.approx(scores[key]), key
        assert row[f"passes ({name})"] == made.nfe
    assert len(row) == 5 + len(knob.passes(length)) * (2 * len(knob.SCORES) + 1)


def test_suite_from_the_command_line_and_its_lines(in_folder, monkeypatch, capsys):
    """Few lengths, two steps: every row with its columns, a line for each number of passes, and the race."""
    short = ("smoke", h.TrainConfig(2, 2, evals=1, eval_windows=2))
    monkeypatch.setattr(blocks, "LENGTHS", (1, 4))
    monkeypatch.setitem(blocks.SIZES, "smoke", (short, short))
    monkeypatch.setitem(h.PRESETS, "smoke", replace(SMOKE, texts=8, blanks=4, n_layer=1, n_embd=8))
    Path("text.txt").write_text(TEXT)
    monkeypatch.setenv("LLADA_DATA", "text.txt")
    main(["blocks", "--preset", "smoke"])
    assert "L' = 4, half the steps" in capsys.readouterr().out
    table = pd.read_csv("build/smoke/figures/tables/blocks.csv")
    kinds = {
        "LLaDA": 64,
        "AR": 1,
        "L' = 1, half the steps": 1,
        "L' = 1": 1,
        "L' = 4, half the steps": 4,
        "L' = 4": 4,
        "L' = 64": 64,
    }
    assert dict(zip(table["row"], table["block length"])) == kinds
    lines = knob.written(table)
    assert list(zip(lines["row"], lines["passes per block"])) == [
        (r, p) for r, n in kinds.items() for p in knob.passes(n).values()
    ]
    assert lines.notna().all(axis=None) and table[["infilled", "infilled ±"]].notna().all(axis=None)
    shape = h.PRESETS["smoke"].model(TOKENIZER.vocab_size, causal=False)
    raced = knob.race(table, knob.speeds(shape, [(4, 4), (64, 1)], batches=(1,), rounds=1))
    assert raced[["row", "passes per block"]].values.tolist() == [["L' = 4, half the steps", 4], ["L' = 4", 4], ["L' = 64", 1]]


def test_the_suite_measures():
    _, _, options = suite("blocks", SMOKE, TEXT)
    assert options["measure"](None, run_of("AR")) == knob.knob_measure(SMOKE, TEXT)(None, run_of("AR"))


# --- speed ---


def test_speeds_have_every_setting_in_every_batch():
    settings = [(2, 2), (2, 1), (8, 4)]
    table = knob.speeds(replace(SHAPE, seq_len=32), settings, batches=(1, 3), rounds=1)
    expected = [(b, *kind) for b in (1, 3) for kind in (("AR", 1, 1), *(("block diffusion", *s) for s in settings))]
    assert list(table[["batch", "model", "block length", "passes per block"]].itertuples(index=False, name=None)) == expected
    assert table["passes"].tolist() == 2 * [16, 16, 8, 8] and bool((table["tokens/s"] > 0).all())


def test_the_fastest_round_counts_and_slow_settings_have_fewer(monkeypatch):
    """A clock of our own: AR takes 0.3, 0.1 and 0.2 s; blocks of 4 take 0.6 s and have no second round."""
    now, left, asked = [0.0], {1: [0.3, 0.1, 0.2], 4: [0.6, 0.1, 0.1]}, []

    def fill(model, template, passes_per_block, temperature):
        length = knob.block_length_of(model)
        now[0] += left[length].pop(0)
        asked.append((length, passes_per_block, tuple(template.shape), int((template == h.MASK_ID).sum()), temperature))
        return h.Generation(template, template, 7)

    monkeypatch.setattr(knob, "fill", fill)
    monkeypatch.setattr(knob.time, "perf_counter", lambda: now[0])
    table = knob.speeds(SHAPE, [(4, 2)], batches=(3,), rounds=3)
    assert table["tokens/s"].tolist() == [round(3 * 48 / 0.1), round(3 * 48 / 0.6)] and table["passes"].tolist() == [7, 7]
    assert asked == [(1, 1, (3, 64), 144, 1.0), (4, 2, (3, 64), 144, 1.0), *[(1, 1, (3, 64), 144, 1.0)] * 2]


def test_a_window_without_place_to_write_is_refused():
    with pytest.raises(ValueError, match="pass"):
        knob.speeds(replace(SHAPE, seq_len=16), [(2, 1)])


# --- the race ---


def tables(settings, ar=(2.0, 0.1, 3.0, 0.05), speed=400):
    """The suite's table and that of speeds, from {(row, L'): {passes: (judge, entropy, tokens/s or None)}}."""
    suite_lines, speed_lines = [], []
    for (row, length), made in {("AR", 1): {1: (ar[0], ar[2], None)}, ("LLaDA", 64): {64: (2.0, 3.0, None)}, **settings}.items():
        line = {"row": row, "block length": length}
        for name, count in knob.passes(length).items():
            if count in made:
                judge, entropy, pace = made[count]
                found = {"judge nats/char": judge, "judge nats/char ±": ar[1], "char entropy": entropy, "char entropy ±": ar[3]}
                line |= {f"{key} ({name})": x for key, x in found.items()}
                timed = {"model": "block diffusion", "block length": length, "passes per block": count, "tokens/s": pace}
                speed_lines += [timed | {"batch": 1}, timed | {"batch": 32, "tokens/s": 10 * pace}] if pace else []
        suite_lines.append(line)
    for batch, pace in ((1, speed), (32, 20 * speed)):
        speed_lines.append({"model": "AR", "block length": 1, "passes per block": 1, "batch": batch, "tokens/s": pace})
    return pd.DataFrame(suite_lines), pd.DataFrame(speed_lines)


FEW = {
    ("L' = 4", 4): {4: (2.05, 3.02, 390), 2: (2.3, 3.0, 700), 1: (2.8, 3.1, 1200)},
    ("L' = 8", 8): {8: (1.5, 3.04, 350), 4: (2.0, 3.2, 650), 2: (3.0, 3.3, None)},
}


def test_race_says_how_far_texts_are_and_how_fast():
    raced = knob.race(*tables(FEW))
    found = {
        (r, p): (ratio, distance) for r, p, ratio, distance in raced[["row", "passes per block", "ratio", "distance"]].values
    }
    expected = {
        ("L' = 4", 4): (390 / 400, 0.5),
        ("L' = 4", 2): (700 / 400, 3),
        ("L' = 4", 1): (3, 8),
        ("L' = 8", 8): (350 / 400, 0.8),  # a better judge is no distance, more entropy is
        ("L' = 8", 4): (650 / 400, 4),
    }
    assert found.keys() == expected.keys(), "LLaDA, AR and what was not timed stay out"
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair), key
    in_batch = knob.race(*tables(FEW), batch=32)
    assert in_batch["ratio"].tolist() == pytest.approx((raced["ratio"] / 2).tolist())


def test_llada_does_not_race_though_a_single_block_does():
    raced = knob.race(*tables({("L' = 64", 64): {64: (2.2, 3.0, 100)}}))
    assert raced[["row", "ratio"]].values.tolist() == [["L' = 64", 0.25]]


def test_less_entropy_is_as_far_as_more():
    distances = [knob.race(*tables({("L' = 2", 2): {2: (1.0, 3 + sign * 0.2, 1)}}))["distance"][0] for sign in (1, -1)]
    assert distances == pytest.approx([4.0, 4.0])


def test_answer_is_the_fastest_within_the_intervals():
    found = knob.answer(knob.race(*tables(FEW))).set_index("setting")
    assert found["row"].tolist() == ["L' = 4", "L' = 4", "L' = 4"] and found["passes per block"].tolist() == [4, 4, 2]
    assert found.loc["fastest at equal quality", "ratio"] < 1, "no"
    better = {**FEW, ("L' = 16", 16): {4: (2.1 - 1e-9, 3.05 - 1e-9, 900)}}
    found = knob.answer(knob.race(*tables(better))).set_index("setting")
    assert found.loc["fastest at equal quality", ["row", "ratio"]].tolist() == ["L' = 16", 2.25], "yes"
    assert found.loc["nearest in quality", "row"] == "L' = 4"
    assert found.loc["nearest of those faster than AR", "row"] == "L' = 16"


def test_answer_is_nan_where_there_is_none():
    far = {("L' = 4", 4): {4: (3.0, 3.0, 100)}, ("L' = 8", 8): {8: (2.4, 3.0, 50)}}
    found = knob.answer(knob.race(*tables(far))).set_index("setting")
    assert found["row"].isna().tolist() == [True, False, True] and found["ratio"].isna().tolist() == [True, False, True]
    assert found.loc["nearest in quality", "row"] == "L' = 8"
    assert knob.answer(knob.race(*tables({}))).drop(columns="setting").isna().all(axis=None), "nothing was raced"


@given(st.lists(st.tuples(st.floats(1, 4), st.floats(2, 4), st.integers(1, 2000)), min_size=1, max_size=6))
def test_nobody_within_the_intervals_is_faster_than_the_answer(made):
    settings = {(f"L' = 2, {i}", 2): {2: one} for i, one in enumerate(made)}
    table, speed = tables(settings)
    speed = speed[~speed.duplicated(["model", "block length", "passes per block", "batch"])]  # a setting has one speed
    found = knob.answer(knob.race(table, speed)).set_index("setting")
    equal = [judge - 2.0 <= 0.1 and abs(entropy - 3.0) <= 0.05 for judge, entropy, _ in made]
    edge = any(abs(judge - 2.1) < 1e-6 or abs(abs(entropy - 3) - 0.05) < 1e-6 for judge, entropy, _ in made)
    assert edge or (not any(equal)) == math.isnan(found.loc["fastest at equal quality", "ratio"])
    distances = [max((judge - 2) / 0.1, abs(entropy - 3) / 0.05) for judge, entropy, _ in made]
    assert found.loc["nearest in quality", "distance"] == pytest.approx(min(distances))


@pytest.mark.parametrize("lost", ["texts", "speeds", "batch"])
def test_a_race_without_ar_is_refused(lost):
    table, speed = tables(FEW)
    table = table[table["row"] != "AR"] if lost == "texts" else table
    speed = speed[speed["model"] != "AR"] if lost == "speeds" else speed
    with pytest.raises(ValueError, match="pass"):
        knob.race(table, speed, batch=2 if lost == "batch" else 1)
