"""beyond/ablations.py: losses to compare with, architectures to compare with, the rows of the study."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import MASK, PAD, ExactPredictor, PostNormEncoder, WrongPredictor, enumerated_nelbo, seeded, within

import llada_helpers as h
from beyond import ablations
from beyond.ablations import LearnedPositions, TimeConditioned

UNIFORM = (ablations.uniform_times, ablations.independent_times, ablations.one_time_per_batch)
BOUNDS = (h.diffusion_batch, *UNIFORM, ablations.square_times, ablations.bell_times_weighted)
OTHERS = (ablations.masked_mean, ablations.masked_mean_over_t, ablations.exercise_loss, ablations.bell_times)
VARIANTS = {f.__name__: f for f in (*BOUNDS, *OTHERS)}
EQUATION_3 = [f.__name__ for f in BOUNDS]
EXACT = ExactPredictor(length=3, symbols=3)
WRONG = WrongPredictor(EXACT.vocab_size)
SEQUENCE = EXACT.sequences[11]  # WRONG's loss on it falls from 3.9 at small t to 1.9 at t = 1: wrong times would be seen


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", EQUATION_3)
def test_every_form_of_equation_3_has_its_expectation(name, size):
    rows = SEQUENCE.expand(size, -1)
    everything = torch.ones_like(rows, dtype=torch.bool)
    batches = [VARIANTS[name](rows, seeded(seed), everything) for seed in range(4800 // (size + 2))]
    losses = [float(h.weighted_nll(WRONG, *batch)) for batch in batches]
    assert within(losses, enumerated_nelbo(WRONG, SEQUENCE, torch.ones(3, dtype=torch.bool)) / 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", [f.__name__ for f in UNIFORM])
def test_the_times_of_a_batch_are_uniform_on_average(name, size):
    """Read off the weights, which are 1 / (t n)."""
    rows = torch.full((size, 400), 4)
    means = []
    for seed in range(400):
        _, _, weight = VARIANTS[name](rows, seeded(seed), rows > 0)
        largest = weight.amax(dim=1)
        means.append(float(torch.where(largest > 0, 1 / (400 * largest), 0.0).mean()))
    assert within(means, 0.5)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name, power", [("diffusion_batch", h.POWER), ("uniform_times", 1), ("square_times", 2)])
def test_powers_of_uniform_numbers_are_stratified(name, power, size):
    """Read off the weights, which are p u^(p-1) / (u^p n) = p / (u n): one u in each of `size` parts of (0, 1]."""
    rows = torch.full((size, 4000), 4)
    for seed in range(20):
        _, _, weight = VARIANTS[name](rows, seeded(seed), rows > 0)
        largest = weight.double().amax(dim=1)
        u = (power / (4000 * largest))[largest > 0]
        part = size * u
        assert ((part.frac() - part[0].frac() + 0.5) % 1 - 0.5).abs().max() < 1e-4, "one number, shifted"
        assert part.ceil().unique().numel() == len(part) >= size - 1


@pytest.mark.parametrize("name", VARIANTS)
def test_the_smallest_number_of_a_batch_gives_no_time_zero(monkeypatch, name):
    monkeypatch.setattr(h, "stratified_times", lambda n, _: torch.full((n,), 2.0**-24 / 64))
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))
    monkeypatch.setattr(h, "_uniform", lambda shape, *_: torch.full(shape, 0.5))
    rows = torch.full((2, 5000), 4)
    _, _, weight = VARIANTS[name](rows, seeded(0), rows > 0)
    assert weight.isfinite().all()


def test_the_bell_is_the_density_of_the_times_that_are_drawn():
    """Its integral up to t is the share of times below t."""
    t = ablations._bell_times(20_000, seeded(0))
    grid = torch.linspace(1e-4, 1 - 1e-4, 20_001)
    below = torch.cumulative_trapezoid(ablations.bell(grid), grid)
    for at in (0.1, 0.3, 0.5, 0.8):
        assert float((t < at).float().mean()) == pytest.approx(float(below[int(at * 20_000)]), abs=1e-3)


@st.composite
def padded_rows(draw):
    """Ids, and which of the real ones are learned."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=7))
    rows = torch.randint(4, 7, (len(lengths), 7), generator=seeded(draw(st.integers(0, 10**6))))
    rows[torch.arange(7) >= torch.tensor(lengths)[:, None]] = PAD
    prompt = draw(st.integers(0, 3))
    return rows, (rows != PAD) & (torch.arange(7) >= prompt)


@pytest.mark.parametrize("name", VARIANTS)
@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_only_what_is_learned_is_masked_and_only_masked_tokens_count(name, data, seed):
    rows, learned = data
    inputs, targets, weight = VARIANTS[name](rows, seeded(seed), learned)
    assert inputs.shape == targets.shape == weight.shape == rows.shape, "odd batches keep their size"
    assert weight.isfinite().all() and (weight >= 0).all()
    assert torch.equal(weight > 0, inputs == MASK)
    known = {(tuple(r), tuple(m)) for r, m in zip(rows.tolist(), learned.tolist())}
    for given_ids, truth, mask in zip(inputs, targets, inputs == MASK):
        assert torch.equal(given_ids[~mask], truth[~mask])
        assert any(tuple(truth.tolist()) == row and not (mask & ~torch.tensor(free)).any() for row, free in known)


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_masked_mean_is_the_mean_over_the_masked_tokens_of_the_batch(data, seed):
    inputs, targets, weight = ablations.masked_mean(data[0], seeded(seed), data[1])
    mask = inputs == MASK
    assert weight[mask].unique().numel() <= 1
    assert float(weight.sum()) == pytest.approx(len(weight) if mask.any() else 0, rel=1e-5)
    if mask.any():
        nll = -WRONG(inputs).log_softmax(-1).gather(2, targets[..., None])[..., 0]
        assert float(h.weighted_nll(WRONG, inputs, targets, weight)) == pytest.approx(float(nll[mask].mean()), rel=1e-4)


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_masked_mean_over_t_is_each_rows_mean_over_t(data, seed):
    rows, learned = data
    inputs, _, weight = ablations.masked_mean_over_t(rows, seeded(seed), learned)
    t, masked = h.stratified_times(len(rows), seeded(seed)), (inputs == MASK).sum(dim=1)
    assert torch.allclose(weight.sum(dim=1), (masked > 0) / t, rtol=1e-4)
    assert all(row[row > 0].unique().numel() <= 1 for row in weight)


def test_masked_mean_over_t_weighs_a_row_by_its_harmonic_number():
    """The integral over t of (1 - (1-t)^n) / t is 1 + 1/2 + ... + 1/n: more than 1, yet finite (its square is not)."""
    for n in (1, 4, 20):
        rows = torch.full((200_000, n), 4)
        _, _, weight = ablations.masked_mean_over_t(rows, seeded(0), rows > 0)
        assert float(weight.sum(dim=1).mean()) == pytest.approx(sum(1 / k for k in range(1, n + 1)), abs=0.1)


@given(data=padded_rows(), seed=st.integers(0, 10**6))
def test_the_exercises_loss_is_the_batchs_mean_over_its_one_t(data, seed):
    """Its pseudocode: forward process, cross-entropy over logits[mask], divided by t."""
    rows, learned = data
    inputs, targets, weight = ablations.exercise_loss(rows, seeded(seed), learned)
    generator = seeded(seed)
    t = float(1 - torch.rand(1, generator=generator))
    masked, mask = h.forward_process(rows, t, MASK, maskable=learned, generator=generator)
    assert torch.equal(inputs, masked)
    if mask.any():
        sketch = torch.nn.functional.cross_entropy(WRONG(masked)[mask], rows[mask]) / t
        assert float(h.weighted_nll(WRONG, inputs, targets, weight)) == pytest.approx(float(sketch), rel=1e-4)
    assert mask.any() or not weight.any()


def test_the_exercises_loss_weighs_a_batch_by_its_harmonic_number():
    """As a row's above, for the batch as a whole."""
    for n in (1, 20):
        rows = torch.full((1, n), 4)
        weights = [float(ablations.exercise_loss(rows, seeded(seed), rows > 0)[2].sum()) for seed in range(2_000)]
        assert sum(weights) / len(weights) == pytest.approx(sum(1 / k for k in range(1, n + 1)), abs=0.5)


# --- architectures ---

CONFIG = h.ModelConfig(vocab_size=11, seq_len=12, n_layer=2, n_head=2, n_embd=16)
ARCHITECTURES = [h.Transformer, TimeConditioned, LearnedPositions]


def model_of(architecture, seed=0):
    """Every weight random: a fresh one has zeros that hide what is tested."""
    generator = torch.Generator().manual_seed(seed)
    model = architecture(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def ids_of(*shape):
    return torch.randint(4, 11, shape, generator=torch.Generator().manual_seed(1))


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES[1:], PostNormEncoder])
@torch.no_grad()
def test_padding_is_not_attended_to(architecture):
    """A padded row has the logits of the shorter sequence, also next to a full row, also with masks in it."""
    model, ids = model_of(architecture), ids_of(2, 9)
    ids[:, [1, 4]] = h.MASK_ID
    padded = ids.clone()
    padded[1, 6:] = h.PAD_ID
    logits = model(padded)
    assert logits.isfinite().all() and close(logits[0], model(ids)[0])
    assert close(logits[1, :6], model(ids[1:, :6])[0])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, PostNormEncoder])
@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path, architecture):
    model, ids = model_of(architecture), ids_of(2, 12)
    model.save_pretrained(tmp_path / "m")
    again = h.load_model(tmp_path / "m", architecture)
    assert type(again) is architecture and again.config == CONFIG and torch.equal(again(ids), model(ids))


def test_what_is_added_is_parameters():
    plain, *others = (architecture(CONFIG) for architecture in ARCHITECTURES)
    for other in others:
        assert other.n_parameters > plain.n_parameters
        assert {name for name, _ in plain.named_parameters()} - {"embed.weight"} <= {name for name, _ in other.named_parameters()}
    assert others[1].n_parameters - plain.n_parameters == CONFIG.seq_len * CONFIG.n_embd


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_prediction_is_uniform_and_every_parameter_can_learn(architecture):
    assert (architecture(CONFIG)(ids_of(2, 5)).softmax(dim=-1) - 1 / 11).abs().max() < 1e-6
    model = model_of(architecture)
    model(ids_of(2, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_masked_fraction_stands_in_for_time():
    """Padding does not count."""
    model, ids = model_of(TimeConditioned), ids_of(3, 8)
    ids[0, :2] = h.MASK_ID
    ids[1, :] = h.MASK_ID
    default = model(ids)
    assert close(default, model(ids, torch.tensor([0.25, 1.0, 0.0])))
    assert not close(default[:1], model(ids, torch.tensor([0.5, 1.0, 0.0]))[:1])
    assert close(default[1:], model(ids, torch.tensor([0.5, 1.0, 0.0]))[1:]), "each row has its own time"
    ids[0, 4:] = h.PAD_ID
    assert close(model(ids), model(ids, torch.tensor([0.5, 1.0, 0.0])))


@torch.no_grad()
def test_a_fresh_one_is_not_yet_told_the_time():
    """The modulation starts at zero: the same function as a Transformer of these weights."""
    told, plain = TimeConditioned(CONFIG), h.Transformer(CONFIG)
    torch.nn.init.normal_(told.head.weight)
    plain.load_state_dict(told.state_dict(), strict=False)
    assert close(told(ids_of(2, 8), torch.tensor([0.1, 0.9])), plain(ids_of(2, 8)))


@torch.no_grad()
def test_learned_positions_are_absolute_and_all_there_is():
    """Not rotary: with an empty table the order of the others does not matter, with a full one it does."""
    model, there, exchanged = model_of(LearnedPositions), torch.tensor([[4, 5, 6, 7]]), torch.tensor([[5, 4, 6, 7]])
    assert not close(model(there)[0, 3], model(exchanged)[0, 3])
    model.embed.positions.zero_()
    assert close(model(there)[0, 3], model(exchanged)[0, 3])


# --- the rows ---

IDS = torch.randint(4, 10, (200,), generator=seeded(1))


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
@pytest.mark.parametrize("form", [0, 1])
def test_each_row_changes_one_thing_and_all_are_different_trainings(preset, form):
    jobs = ablations.ablation_jobs(preset, ablations.SIZES[preset.name][form], 69, IDS, IDS)
    ours = {"LLaDA": jobs["LLaDA, ours"][0].settings(), "AR": jobs["AR, ours"][0].settings()}
    prints = [trial.fingerprint() for trials in jobs.values() for trial in trials]
    if preset.ar.weight_decay:
        assert len(set(prints)) == len(prints)
    pairs = ({"n_layer", "n_embd"}, {"batch_size", "steps"}, {"steps", "evals"}, {"batch", "power"})
    for row, trials in jobs.items():
        usual = ours[row.partition(",")[0]]
        changed = {key for key, value in trials[0].settings().items() if value != usual[key]}
        assert len(changed) <= 1 or changed in pairs, row
        assert [trial.train.seed for trial in trials] == [0, 1, 2]
        assert trials[0].model.causal is row.startswith("AR")


def test_the_study_is_of_the_presets_recipe_and_long_enough():
    """A third of LLaDA's steps and all of AR's: the first row of AR is the preset's own training."""
    for preset in (h.PRESETS["cpu"], h.PRESETS["gpu"]):
        jobs = ablations.ablation_jobs(preset, ablations.SIZES[preset.name][1], 69, IDS, IDS)
        whole = preset.jobs(69, IDS, IDS)
        assert jobs["AR, ours"][0].fingerprint() == whole["AR"].fingerprint()
        assert jobs["LLaDA, ours"][0].train.steps == round(preset.llada.steps / 3)
        longer = jobs["AR, LLaDA's number of steps"][0].train
        assert (longer.steps, longer.batch_size) == (preset.llada.steps, preset.ar.batch_size)


def test_another_shape_has_about_as_many_weights():
    shape = h.PRESETS["cpu"].model(100, causal=False)
    for n_layer in range(1, 13):
        other = ablations.reshaped(shape, n_layer)
        counts = [sum(p.numel() for p in h.Transformer(config).blocks.parameters()) for config in (other, shape)]
        assert other.n_layer == n_layer and counts[0] == pytest.approx(counts[1], rel=0.1)  # widths come in steps of 8


def test_time_conditioning_adds_hardly_any_weights():
    """So that what it brings is not what more weights bring."""
    shape = h.PRESETS["cpu"].model(69, causal=False)
    timed, plain = (architecture(shape).n_parameters for architecture in (TimeConditioned, h.Transformer))
    assert plain < timed < 1.03 * plain


def test_a_batch_function_may_change_at_a_step():
    plain = h.PRESETS["smoke"].jobs(11, IDS, IDS)["LLaDA"]
    job = dataclasses.replace(plain, make_batch=ablations.switched(ablations.masked_mean, ablations.uniform_times, 7))
    for seed, step in itertools.product((0, 3), (0, 6, 7, 8)):
        trial = dataclasses.replace(job, train=dataclasses.replace(job.train, seed=seed))
        expected = dataclasses.replace(trial, make_batch=ablations.masked_mean if step < 7 else ablations.uniform_times)
        for ours, theirs in zip(h.training_batch(trial, step), h.training_batch(expected, step)):
            assert torch.equal(ours, theirs), (seed, step)
    later = ablations.switched(ablations.masked_mean, ablations.uniform_times, 8)
    assert job.fingerprint() != dataclasses.replace(job, make_batch=later).fingerprint()


def test_the_noise_of_the_gradient_is_a_mean_over_its_parts_whatever_their_sizes():
    model = h.Transformer(h.ModelConfig(10, 6, n_layer=1, n_head=1, n_embd=8))
    rows = torch.randint(4, 10, (5, 6), generator=seeded(0))
    assert (ablations.gradient_noise(model, rows, 17, size=4).filter(regex="±") > 0).any(axis=None)
    few, many = (ablations.gradient_noise(model, rows, n, size=4)["head"] for n in (240, 249))
    assert few.tolist() == pytest.approx(many.tolist(), rel=0.15)
    with pytest.raises(ValueError, match="pass at least 16"):
        ablations.gradient_noise(model, rows, 15)


def test_the_noise_of_the_gradient_is_its_variance_over_batches():
    """By hand, over all batches at once: the parts' estimates agree with it, for each group of parameters."""
    model = h.Transformer(h.ModelConfig(10, 6, n_layer=1, n_head=1, n_embd=8))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    rows = torch.randint(4, 10, (5, 6), generator=seeded(0))
    table = ablations.gradient_noise(model, rows, 240, size=4).set_index("row")
    for name, make_batch in (("ours", h.diffusion_batch), ("one time per batch", ablations.one_time_per_batch)):
        gradients = {"embedding": [], "attention": [], "MLP": [], "head": []}
        for seed in range(240):
            generator = seeded(seed)
            some = rows[torch.randint(5, (4,), generator=generator)]
            loss = h.weighted_nll(model, *make_batch(some, generator, some > 0))
            found = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
            for group, kept in gradients.items():
                kept.append(torch.cat([g.flatten() for n, g in found.items() if ablations.GROUPS[n.split(".")[-2]] == group]))
        for group, kept in gradients.items():
            variance = float(torch.stack(kept).var(dim=0).sum())
            assert abs(table.loc[name, group] - variance) <= 1.5 * table.loc[name, f"{group} ±"] + 1e-9, (name, group)
