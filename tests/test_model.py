"""Section 3: one Transformer, bidirectional or causal, with padding and cache."""

import dataclasses

import pytest
import torch

import llada_helpers as h


def config_of(**changes):
    return h.ModelConfig(**{"vocab_size": 11, "seq_len": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes})


def model_of(seed=0, **changes):
    """Every weight random: at initialisation the zero output projections would hide what the attention does."""
    generator = torch.Generator().manual_seed(seed)
    model = h.Transformer(config_of(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def ids_of(*shape, seed=1):
    return torch.randint(4, 11, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_shape_and_dtype(causal):
    logits = model_of(causal=causal)(ids_of(3, 7))
    assert logits.shape == (3, 7, 11) and logits.dtype == torch.float32


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_who_sees_whom(causal):
    """Change position j: without `causal` every position moves, with it exactly those from j on."""
    model, ids = model_of(causal=causal), ids_of(1, 8)
    before = model(ids)
    for j in range(8):
        changed = ids.clone()
        changed[0, j] = 4 + (ids[0, j] - 3) % 7
        moved = (model(changed) - before).abs().amax(dim=-1)[0] > 1e-5
        assert moved.tolist() == [not causal or i >= j for i in range(8)]


@torch.no_grad()
def test_order_matters():
    """Without positions, exchanging two neighbours would leave a third position's logits where they were."""
    model, ids = model_of(), torch.tensor([[4, 5, 6, 7]])
    assert not close(model(ids)[0, 3], model(torch.tensor([[5, 4, 6, 7]]))[0, 3])


@torch.no_grad()
def test_only_relative_positions_matter():
    """Rotary attention: the same logits when the positions count from 3."""
    model, shifted, ids = model_of(), model_of(), ids_of(2, 5)
    shifted.cos, shifted.sin = model.cos[3:], model.sin[3:]
    assert close(shifted(ids), model(ids))
    shifted.cos, shifted.sin = model.cos[::2], model.sin[::2]
    assert not close(shifted(ids), model(ids)), "at twice the distances the logits do move"


def test_causal_changes_no_parameter():
    a, b = (h.Transformer(config_of(causal=c)) for c in (False, True))
    assert a.n_parameters == b.n_parameters == sum(p.numel() for p in a.parameters())
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_padding_is_not_attended_to(causal):
    """A padded row has the logits of the shorter sequence, also next to a full row, also with masks in it."""
    model, ids = model_of(causal=causal), ids_of(2, 9)
    ids[:, [1, 4]] = h.MASK_ID
    padded = ids.clone()
    padded[1, 6:] = h.PAD_ID
    logits = model(padded)
    assert logits.isfinite().all()
    assert close(logits[0], model(ids)[0])
    assert close(logits[1, :6], model(ids[1:, :6])[0])


@torch.no_grad()
def test_padding_first_or_alone_gives_no_nan():
    for causal in (False, True):
        model = model_of(causal=causal)
        rows = torch.tensor([[0, 0, 5, 6], [0, 0, 0, 0]])
        logits = model(rows)
        assert logits.isfinite().all()


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [9, 1], [4, 1, 1, 1, 1, 1, 1], [4, 3, 3], [2, 8]], ids=str)
@torch.no_grad()
def test_cache_gives_the_same_logits(pieces):
    """A slice sees the whole cached prefix and, within itself, only what came before, however the ids are cut."""
    model, ids = model_of(causal=True), ids_of(3, 10)
    cache, logits, start = h.KVCache(model.config, 3, model.embed.weight), [], 0
    for size in pieces:
        logits.append(model(ids[:, start : start + size], cache=cache, start=start))
        start += size
    assert close(torch.cat(logits, dim=1), model(ids))


@torch.no_grad()
def test_cached_padding_is_not_attended_to():
    """[PAD] stays unseen when it was cached earlier, in the prompt of a batch or as a produced token."""
    model, ids = model_of(causal=True), ids_of(2, 8)
    ids[1, 2:4] = h.PAD_ID
    cache = h.KVCache(model.config, 2, model.embed.weight)
    logits = torch.cat([model(ids[:, :5], cache=cache), *(model(ids[:, i : i + 1], cache=cache, start=i) for i in (5, 6, 7))], 1)
    real = ids != h.PAD_ID
    assert close(logits[real], model(ids)[real])


@torch.no_grad()
def test_cache_serves_blocks_of_the_bidirectional_model():
    """Fill the cache with a whole pass, then ask for a slice again: same ids, same logits."""
    model, ids = model_of(), ids_of(2, 10)
    cache = h.KVCache(model.config, 2, model.embed.weight)
    whole = model(ids, cache=cache)
    assert close(whole, model(ids))
    assert close(model(ids[:, 3:7], cache=cache, start=3), whole[:, 3:7])


@pytest.mark.parametrize("shape, start", [((1, 13), 0), ((12,), 0), ((1, 4, 3), 0), ((1, 3), 10)])
def test_bad_ids(shape, start):
    model = model_of()
    cache = h.KVCache(model.config, 1, model.embed.weight) if start else None
    with pytest.raises(ValueError, match="pass"):
        model(torch.full(shape, 5), cache=cache, start=start)
    assert model(torch.full((1, 12), 5)).shape == (1, 12, 11), "the longest that fits is not an error"


@pytest.mark.parametrize(
    "changes",
    [
        *({name: 0} for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd")),
        {"n_embd": -16},
        {"n_embd": 18},  # 9 per head: no pairs to rotate
        {"n_head": 3},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"rotary_base": 0.0},
    ],
)
def test_bad_sizes(changes):
    with pytest.raises(ValueError, match="pass"):
        config_of(**changes)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path, causal):
    model = model_of(causal=causal)
    model.save_pretrained(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} >= {"config.json", "model.safetensors"}
    for again in (h.Transformer.from_pretrained(tmp_path / "m").eval(), h.load_model(tmp_path / "m")):
        assert again.config == model.config and dataclasses.is_dataclass(again.config) and not again.training
        assert torch.equal(again(ids_of(2, 12)), model(ids_of(2, 12)))


def test_first_prediction_is_uniform_and_every_parameter_can_learn():
    model = h.Transformer(config_of())
    assert (model(ids_of(2, 5)).softmax(dim=-1) - 1 / 11).abs().max() < 1e-6
    model = model_of()
    model(ids_of(2, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_dropout_only_in_training():
    model = model_of(dropout=0.5)
    ids = ids_of(2, 6)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
