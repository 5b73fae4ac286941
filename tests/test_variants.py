"""beyond/variants.py: a Transformer that is told the time, one with learned positions, one that averages its weights."""

from dataclasses import replace

import pytest
import torch
from oracle import PostNormEncoder
from test_training import interrupt_in

import llada_helpers as h
from beyond.variants import Averaged, LearnedPositions, TimeConditioned

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


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, Averaged, PostNormEncoder])
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


JOB = h.Job(CONFIG, h.TrainConfig(12, 4, evals=2, eval_windows=4), ids_of(500), ids_of(60))
AVERAGED = replace(JOB, architecture=Averaged)


def train_noting(job, monkeypatch, root):
    """The finished run, and the weights that every step began with."""
    seen, step = [], h.weighted_nll

    def noted(network, *batch):
        seen.append({name: p.detach().clone() for name, p in network.named_parameters()})
        return step(network, *batch)

    monkeypatch.setattr(h, "weighted_nll", noted)
    return h.train("a", job, root=root, quiet=True), seen


def test_the_average_is_that_of_the_weights_of_a_training_as_usual(tmp_path, monkeypatch):
    plain, seen = train_noting(JOB, monkeypatch, tmp_path / "plain")
    monkeypatch.undo()
    run, ours = train_noting(AVERAGED, monkeypatch, tmp_path / "averaged")
    assert len(seen) == len(ours) == 12 and run.summary["parameters"] == plain.summary["parameters"]
    for name in seen[0]:
        assert all(torch.equal(a[name], b[name]) for a, b in zip(seen, ours)), name
        shares = torch.tensor([(n**8 - (n - 1) ** 8) / 12**8 for n in range(1, 13)])  # the integral of n^7
        shares = shares.to(seen[0][name].device)
        expected = torch.einsum("n,n...->...", shares, torch.stack([weights[name] for weights in seen]))
        assert torch.allclose(run.model.average.get_buffer(name), expected, atol=1e-6), name
    ids = ids_of(1, 9).to(run.model.head.weight.device)
    assert not run.model.training and close(run.model(ids), run.model.average(ids))


def test_an_interrupted_average_goes_on_exactly(tmp_path, monkeypatch):
    whole = h.train("a", AVERAGED, root=tmp_path / "whole", quiet=True)
    interrupt_in(monkeypatch, 9)
    assert not h.train("a", AVERAGED, root=tmp_path / "parts", quiet=True).summary["complete"]
    monkeypatch.undo()
    again = h.train("a", AVERAGED, root=tmp_path / "parts", quiet=True)
    assert whole.summary["best"] == again.summary["best"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
