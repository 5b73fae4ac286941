"""beyond/anatomy.py: costs by rate and by place add up to the bound; the noise of gradients is what an enumeration gives."""

import numpy as np
import pytest
import torch
from oracle import ExactPredictor, enumerated_nelbo, with_noise

import llada_helpers as H
from beyond import anatomy


@pytest.fixture(scope="module")
def exact():
    return ExactPredictor(length=4, symbols=3)


def tiny(causal: bool = False) -> H.Transformer:
    torch.manual_seed(0)
    model = H.Transformer(H.ModelConfig(vocab_size=8, seq_len=6, n_layer=1, n_head=2, n_embd=8, causal=causal))
    with_noise(model, 0.3)
    return model.eval()


def test_costs_of_all_counts_average_to_the_enumerated_bound(exact):
    sequence = exact.sequences[17]
    costs = anatomy.cost_by_rate(exact, sequence.repeat(4000, 1), [1, 2, 3, 4])
    bound = enumerated_nelbo(exact, sequence, torch.ones(4, dtype=torch.bool))
    assert costs.shape == (4, 4000)
    assert costs.mean() == pytest.approx(bound / 4, rel=0.02)


def test_the_area_under_a_straight_line_is_exact():
    counts = anatomy.mask_counts(64)
    assert anatomy.area_under(counts, np.full((len(counts), 5), 1.7)) == pytest.approx(1.7)


def test_costs_by_place_sum_to_the_bound_and_are_exact_for_ar(exact):
    sequence = exact.sequences[50]
    place = anatomy.cost_by_place(exact, sequence.repeat(4000, 1))
    bound = enumerated_nelbo(exact, sequence, torch.ones(4, dtype=torch.bool))
    assert float(place.sum(dim=1).mean()) == pytest.approx(bound, rel=0.02)
    model, rows = tiny(causal=True), torch.randint(4, 8, (5, 6), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(anatomy.cost_by_place(model, rows).sum(dim=1), H.ar_nll(model, rows, H.START_ID), atol=1e-4)


def test_stretches_cover_the_window_once():
    for seq_len in (1, 2, 5, 16, 33, 64, 128, 256):
        stretches = anatomy.places(seq_len)
        assert [i for start, end in stretches for i in range(start, end)] == list(range(seq_len))
    table = anatomy.table_by_place({"a": torch.arange(20.0).repeat(3, 1), "b": torch.zeros(3, 20)})
    assert table["model"].tolist() == ["a"] * len(anatomy.places(20)) + ["b"] * len(anatomy.places(20))
    assert table["characters"].iloc[0] == "1" and table["nats/char"].iloc[0] == 0.0


def test_gradient_noise_agrees_with_the_matrix_of_gradients():
    model, rows = tiny(), torch.randint(4, 8, (12, 3, 6), generator=torch.Generator().manual_seed(1))
    batches = [H.diffusion_batch(x, torch.Generator().manual_seed(i)) for i, x in enumerate(rows)]
    g = torch.stack([anatomy.gradient(model, batch)[1] for batch in batches]).double()
    noise = anatomy.gradient_noise(model, batches)
    scatter = float(g.var(dim=0).sum())
    signal = float(g.mean(dim=0).square().sum()) - scatter / len(g)
    assert noise["gradient norm"] == pytest.approx(float(g.norm(dim=1).mean()))
    assert noise["noise / signal"] == pytest.approx(scatter / signal if signal > 0 else np.inf, rel=1e-6)
    assert noise["expected loss"] == pytest.approx(np.mean([H.weighted_nll(model, *b).item() for b in batches]), rel=1e-5)


def test_gradient_is_that_of_backward():
    model, batch = tiny(), H.diffusion_batch(torch.full((2, 6), 5), torch.Generator().manual_seed(0))
    loss, g = anatomy.gradient(model, batch)
    H.weighted_nll(model, *batch).backward()
    assert torch.allclose(g, torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert loss > 0


@pytest.mark.parametrize("slope", [0.5, 1.0])
def test_schedule_noise_is_the_integral(slope):
    times = np.geomspace(0.001, 1, 2000)
    second = times**-slope
    for power in (1.25, 1.5, 2.0):  # power * integral of t^(1 - 1/power - slope)
        below = times[0] ** -slope * power**2 / (power - 1) * times[0] ** (2 - 1 / power)
        rise = 2 - 1 / power - slope
        inner = power / rise * (1 - times[0] ** rise)
        assert anatomy.schedule_noise(times, second, power) == pytest.approx(below + inner, rel=1e-3)
    assert anatomy.schedule_noise(times, second, 1.0) == np.inf
    best = min(anatomy.schedule_noise(times, second, p) for p in np.linspace(1.05, 4, 100))
    assert anatomy.least_noise(times, second) <= best * (1 + 1e-6)


def test_schedule_noise_predicts_what_a_schedule_scatters():
    """A window of one token has a gradient of weight 1 / t with probability t; averaged over u, t = u^p has the predicted one."""
    times = np.geomspace(0.001, 1, 500)
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for power in (1.25, 1.5, 2.0):
        t, weight = u**power, power * u ** (power - 1)
        second = (t * (weight / t) ** 2).mean()
        assert second == pytest.approx(anatomy.schedule_noise(times, 1 / times, power), rel=0.05)


def test_spread_leaves_the_padded_window_out():
    windows = torch.cat((torch.full((5, 3), 7), torch.full((1, 3), H.PAD_ID)))
    assert not bool((anatomy.spread(windows, 20) == H.PAD_ID).any())
    assert len(anatomy.spread(windows[:1], 4)) == 4
    assert anatomy.mask_counts(128)[-1] == 128
