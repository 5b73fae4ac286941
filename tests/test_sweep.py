"""beyond.sweep: what is tried, what is read off at equal diversity and how surely, and the table that is found again."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import noisy_pair

import llada_helpers as H
from beyond import experiments, quality, spacing, sweep

TEXT = "to be, or not to be: that is the question\n" * 30
TINY = sweep.Sweep(8, passes=(2,), temperatures=(0.5, 1.5))
JUDGE, ENTROPY = "judge nats/char", "char entropy"


@pytest.fixture(scope="module")
def tokenizer():
    return H.CharTokenizer.from_text(TEXT)


@pytest.fixture(scope="module")
def models(tokenizer):
    return noisy_pair(tokenizer.vocab_size, 24, 0.3)


@pytest.fixture(scope="module")
def measure(models, tokenizer):
    return quality.Measure(models, tokenizer, TEXT)


@pytest.fixture(scope="module")
def windows(tokenizer):
    return H.windows(tokenizer.encode(TEXT), 24)


@pytest.fixture(scope="module")
def made(models, measure, windows):
    return sweep.sweep(models, measure, windows, TINY)


# --- what is tried ---


@pytest.mark.parametrize("preset", sweep.SIZES)
def test_every_preset_has_two_forms(preset):
    assert set(sweep.SIZES) == set(H.PRESETS)
    for sizes in sweep.SIZES[preset]:
        masks = H.PRESETS[preset].seq_len - quality.PREFIX
        tried = sweep.settings(sizes, masks)
        assert len(set(tried)) == len(tried) and sizes.texts % H.GROUPS == 0
        assert len(sizes.temperatures) > 1, "or there is nothing to read off between"
        assert {s.decoder for s in tried} == {*sweep.STRATEGIES, "AR"}
        assert {s.passes for s in tried} == {*sizes.passes, masks} and max(sizes.passes) < masks
        assert all({t.temperature for t in tried if t[:3] == s[:3]} == set(sizes.temperatures) for s in tried)


def test_the_full_sweep_has_128_texts():
    assert sweep.SIZES["cpu"][1].texts >= 128 and {8, 16, 32} <= set(sweep.SIZES["cpu"][1].passes)


@pytest.mark.parametrize("setting", sweep.settings(TINY, 8), ids=str)
def test_a_setting_says_how_texts_are_written(models, windows, setting):
    _, template = quality.prompts(windows, 8)
    made = sweep.write(models, setting, template, torch.Generator().manual_seed(3))
    options = {"temperature": setting.temperature, "top_p": setting.top_p, "generator": torch.Generator().manual_seed(3)}
    if setting.decoder == "AR":
        options |= {"start_id": H.START_ID, "forbidden": (0, 1, 2, 3)}
        plain = H.generate_ar(models["AR"], template[:, : quality.PREFIX], 8, **options)
    else:
        orders = {"random": "random", "entropy": "entropy", "bit-reversed": spacing.bit_reversed, sweep.SPACED: spacing.spaced(8)}
        options |= {"steps": setting.passes, "remasking": orders[setting.decoder], "forbidden": (0, 2, 3)}
        plain = H.reverse_process(models["LLaDA"], template, mask_id=H.MASK_ID, **options)
    assert torch.equal(made.ids, plain.ids) and torch.equal(made.order, plain.order) and made.nfe == setting.passes


def test_a_row_for_each_setting_and_group(made, measure, windows):
    tried = sweep.settings(TINY, 8)
    assert len(made) == (1 + len(tried)) * H.GROUPS
    written = made.iloc[H.GROUPS :]
    assert list(dict.fromkeys(map(tuple, written[sweep.SETTING].to_numpy().tolist()))) == list(map(tuple, tried))
    assert (written["nfe"] == written["passes"]).all(), "no decoder falls behind its schedule"
    real = made.iloc[: H.GROUPS]
    truth, _ = quality.prompts(windows, 8)
    assert (real["decoder"] == sweep.REAL).all()
    assert real[sweep.METRICS].to_dict("records") == [
        {name: score[name] for name in sweep.METRICS} for score in measure.by_group(truth)
    ]


def test_a_sweep_can_be_repeated(made, models, measure, windows):
    pd.testing.assert_frame_equal(made, sweep.sweep(models, measure, windows, TINY))


def test_averages_are_over_groups(made):
    means = sweep.averaged(made)
    assert means["row"].is_unique and means["row"].iloc[0] == sweep.REAL and len(means) * H.GROUPS == len(made)
    for line, (_, part) in zip(means.to_dict("records"), made.groupby([*sweep.SETTING], sort=False, dropna=False)):
        assert line[JUDGE] == pytest.approx(part[JUDGE].mean())
        assert line[f"{JUDGE} ±"] == pytest.approx(2.364624 * part[JUDGE].std() / 8**0.5)


# --- at equal diversity ---


def table(curves: dict[float, list[tuple[float, float]]], **setting) -> pd.DataFrame:
    """From temperatures to the (entropy, judge) of each group."""
    line = {"decoder": "AR", "passes": 4, "top-p": 1.0, "known words": 0.5, "distinct-3": 0.5, **setting}
    points = [(t, group, *point) for t, groups in curves.items() for group, point in enumerate(groups)]
    return pd.DataFrame([{**line, "temperature": t, "group": g, ENTROPY: e, JUDGE: j} for t, g, e, j in points])


def read_off(curves, entropy):
    (line,) = sweep.at_equal(table(curves), ENTROPY, entropy).to_dict("records")
    return line


slopes = st.floats(-5, 5)


@given(slopes, slopes, st.lists(st.floats(0.1, 2), min_size=2, max_size=5, unique=True), st.floats(0.01, 1))
def test_linear_curves_are_read_exactly(start, slope, temperatures, part):
    low, high = min(temperatures), max(temperatures)
    entropy = low + part * (high - low)
    line = read_off({t: [(t, start + slope * t)] * H.GROUPS for t in temperatures}, entropy)
    assert line[JUDGE] == pytest.approx(start + slope * entropy, abs=1e-6)
    assert line["temperature"] == pytest.approx(entropy, abs=1e-6) and line["known words"] == pytest.approx(0.5)
    assert line[f"{JUDGE} ±"] == pytest.approx(0, abs=1e-6)


def test_between_neighbours_only():
    """Whatever lies farther away does not enter."""
    curves = {0.5: [(2.0, 1.0)] * 8, 1.0: [(3.0, 2.0)] * 8, 1.5: [(4.0, 9.0)] * 8}
    assert read_off(curves, 2.25)[JUDGE] == pytest.approx(1.25)
    assert read_off(curves | {1.5: [(4.0, 5.0)] * 8}, 2.25)[JUDGE] == pytest.approx(1.25)
    assert read_off(curves, 3.5)[JUDGE] == pytest.approx(5.5)
    assert read_off(curves, 4.0)[JUDGE] == pytest.approx(9)


@pytest.mark.parametrize("entropy", [1.999, 4.001, -1.0, np.inf])
def test_nothing_is_extrapolated(entropy):
    line = read_off({0.5: [(2.0, 1.0)] * 8, 1.5: [(4.0, 9.0)] * 8}, entropy)
    assert all(np.isnan(line[name]) for name in ("temperature", JUDGE, f"{JUDGE} ±", "known words", "distinct-3 ±"))


def test_what_is_reached_twice_is_not_decided():
    """A curve that falls before it rises: no telling which temperature is meant, nor a way to average the two."""
    curves = {0.5: [(3.0, 1.0)] * 8, 1.0: [(2.0, 5.0)] * 8, 1.5: [(4.0, 9.0)] * 8}
    assert np.isnan(read_off(curves, 2.5)[JUDGE]) and read_off(curves, 3.5)[JUDGE] == pytest.approx(8)
    falling = {temperature: groups for temperature, groups in curves.items() if temperature < 1.5}
    assert read_off(falling, 2.5)[JUDGE] == pytest.approx(3), "falling is as good as rising"


@given(st.lists(st.tuples(st.floats(2, 4), st.floats(1, 9)), min_size=24, max_size=24), st.floats(2, 4))
def test_a_value_lies_between_its_neighbours(points, entropy):
    """Whatever the noise, and no correction leads beyond what was measured."""
    curves = {t: points[8 * i : 8 * i + 8] for i, t in enumerate((0.5, 1.0, 1.5))}
    means = np.array([np.mean(groups, axis=0) for groups in curves.values()])
    line = read_off(curves, entropy)
    pairs = [pair for pair in itertools.pairwise(means) if min(p[0] for p in pair) <= entropy <= max(p[0] for p in pair)]
    assert np.isnan(line[JUDGE]) or any(
        min(p[1] for p in pair) - 1e-9 <= line[JUDGE] <= max(p[1] for p in pair) + 1e-9 for pair in pairs
    )
    assert np.isnan(line[JUDGE]) or (0.5 <= line["temperature"] <= 1.5 and line[f"{JUDGE} ±"] >= 0)


def test_the_other_way_round():
    """Any metric may be the one that is equal; it is then no result."""
    (line,) = sweep.at_equal(table({0.5: [(2.0, 1.0)] * 8, 1.0: [(3.0, 2.0)] * 8}), JUDGE, 1.5).to_dict("records")
    assert line[ENTROPY] == pytest.approx(2.5) and JUDGE not in line
    with pytest.raises(ValueError, match="distinct-3"):
        sweep.at_equal(table({}), "entropy", 3.0)


def test_what_hangs_on_one_group_is_not_reached():
    """The mean entropy is 3.1 at most, without the first group it is 3.0."""
    curves = {0.5: [(2.0, 1.0)] * 8, 1.0: [(3.8, 2.0)] + [(3.0, 2.0)] * 7}
    assert np.isfinite(read_off(curves, 2.9)[JUDGE]) and np.isnan(read_off(curves, 3.05)[JUDGE])


noise = st.lists(st.floats(-0.2, 0.2), min_size=H.GROUPS, max_size=H.GROUPS)


@given(noise)
def test_the_noise_of_the_judge_alone_gives_its_own_interval(shifts):
    """All temperatures share the prompts of a group: a group that is easier for all of them is no less noise for that."""
    line = read_off({t: [(2 * t, 3 * t + shift) for shift in shifts] for t in (1.0, 2.0)}, 3.0)
    known = H.grouped([{JUDGE: 4.5 + shift} for shift in shifts])
    assert (line[JUDGE], line[f"{JUDGE} ±"]) == pytest.approx((known[JUDGE], known[f"{JUDGE} ±"]), abs=1e-6)


@given(noise, st.floats(-3, 3))
def test_the_noise_of_entropy_counts_by_the_slope(shifts, slope):
    line = read_off({t: [(t + shift, slope * t) for shift in shifts] for t in (0.0, 4.0)}, 2.0)
    known = H.grouped([{JUDGE: slope * (2 - shift)} for shift in shifts])
    assert (line[JUDGE], line[f"{JUDGE} ±"]) == pytest.approx((known[JUDGE], known[f"{JUDGE} ±"]), abs=1e-6)


@given(noise, st.floats(-3, 3))
def test_noise_along_the_curve_is_none(shifts, slope):
    """A group that is as much more varied as it is less plausible lies on the same curve."""
    line = read_off({t: [(t + shift, slope * (t + shift)) for shift in shifts] for t in (0.0, 4.0)}, 2.0)
    assert (line[JUDGE], line[f"{JUDGE} ±"]) == pytest.approx((2 * slope, 0), abs=1e-6)


def test_decoders_do_not_touch_each_other(made):
    one = table({0.5: [(2.0, 1.0)] * 8, 1.5: [(4.0, 9.0)] * 8})
    many = pd.concat([one, one.assign(passes=8, **{JUDGE: 7.0}), one.assign(**{"top-p": 0.9, ENTROPY: 9.0}), made[:8]])
    lines = sweep.at_equal(many, ENTROPY, 3.0)
    assert lines["row"].tolist() == ["AR, 4 passes", "AR, 8 passes", "AR, 4 passes, top-p 0.9"], "and real text is none of them"
    assert lines[JUDGE].tolist() == pytest.approx([5, 7, np.nan], nan_ok=True)


# --- found again ---


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "text.txt"))
    config = H.TrainConfig(2, 2, evals=1, eval_windows=2)
    changes = {"seq_len": 24, "n_layer": 1, "n_head": 1, "n_embd": 8, "llada": config, "ar": config}
    preset = dataclasses.replace(H.PRESETS["smoke"], **changes)
    monkeypatch.setitem(H.PRESETS, "smoke", preset)
    monkeypatch.setitem(sweep.SIZES, "smoke", (TINY, dataclasses.replace(TINY, texts=16)))
    tokenizer = H.CharTokenizer.from_text(TEXT)
    return H.Results(preset, TEXT), preset.jobs(tokenizer.vocab_size, *H.split(tokenizer.encode(TEXT)))


def refuse(sizes):
    raise AssertionError("the table was there")


def test_what_the_command_line_makes_is_what_the_notebook_reads(elsewhere, capsys):
    results, jobs = elsewhere
    experiments.main(["decoders", "--preset", "smoke"])
    assert "AR, 8 passes, top-p 0.9, temperature 1.5" in capsys.readouterr().out
    found = experiments.swept(results, jobs, sweep.SIZES["smoke"], refuse)
    assert "the full sweep" in capsys.readouterr().out and len(found) == (1 + len(sweep.settings(TINY, 8))) * H.GROUPS
    lines = sweep.averaged(found).assign(fingerprint=found["fingerprint"].iloc[0])
    stored = pd.read_csv(results.tables / "decoders_sweep.csv")
    pd.testing.assert_frame_equal(stored, lines, atol=2e-4, check_dtype=False)
    assert sweep.at_equal(found, "distinct-3", found["distinct-3"].median())[JUDGE].notna().any()


@pytest.mark.parametrize("change", ["model", "sizes", "nothing there"])
def test_the_short_form_is_made_where_the_full_one_is_not_current(elsewhere, made, change):
    results, jobs = elsewhere
    short, full = sweep.SIZES["smoke"]
    if change != "nothing there":
        experiments.save_sweep(results, jobs, full, made)
    if change == "model":
        jobs = jobs | {"AR": dataclasses.replace(jobs["AR"], train=H.TrainConfig(3, 2))}
    if change == "sizes":
        full = dataclasses.replace(full, passes=(3,))
    asked = []
    found = experiments.swept(results, jobs, (short, full), lambda sizes: asked.append(sizes) or made)
    assert asked == [short] and set(found["fingerprint"]) == {sweep.mark(jobs, short)}
    asked.clear()
    experiments.swept(results, jobs, (full, short), lambda sizes: asked.append(sizes) or made)
    assert not asked, "whichever form stands there under its mark is read"


def test_marks_tell_models_and_settings_apart(elsewhere):
    _, jobs = elsewhere
    other = jobs | {"LLaDA": dataclasses.replace(jobs["LLaDA"], train=H.TrainConfig(9, 2))}
    sizes = [TINY, *(dataclasses.replace(TINY, **change) for change in ({"texts": 16}, {"passes": (3,)}, {"temperatures": (1,)}))]
    marks = {sweep.mark(some, size) for some in (jobs, other) for size in sizes}
    assert len(marks) == 8 and sweep.mark(jobs, TINY).startswith("+".join(job.fingerprint() for job in jobs.values()))
