"""Architectures to compare with: a Transformer that is told the time, one with learned positions, one that averages itself."""

import torch
from torch import Tensor, nn

from llada_helpers import MASK_ID, PAD_ID, KVCache, ModelConfig, Transformer


class AdaptiveNorm(nn.Module):
    """RMSNorm whose scale and shift follow from the time embedding (adaptive layer norm, Peebles & Xie 2023); x [B, L, width].

    >>> norm, x = AdaptiveNorm(4), torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
    >>> norm.time = torch.ones(1, 4)
    >>> norm(x).round().tolist()  # a fresh one does nothing but normalise
    [[[1.0, -1.0, 1.0, -1.0]]]
    """

    def __init__(self, width: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.time = None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.modulation(self.time)[:, None].chunk(2, dim=-1)
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + scale) + shift


class TimeConditioned(Transformer):
    """Transformer whose norms are adaptive to t FloatTensor[B]; where t is not passed, the masked fraction stands in for it.

    >>> model = TimeConditioned(ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> tuple(model(torch.tensor([[4, MASK_ID, 5]]), torch.tensor([0.3])).shape)
    (1, 3, 10)
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        width = config.n_embd
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        for block in self.blocks:
            block.attention_norm, block.mlp_norm = AdaptiveNorm(width), AdaptiveNorm(width)

    def forward(self, ids: Tensor, t: Tensor | None = None) -> Tensor:
        t = (ids == MASK_ID).sum(dim=1) / (ids != PAD_ID).sum(dim=1).clamp(min=1) if t is None else t
        half = self.config.n_embd // 2
        angles = t[:, None] * 1000 * 10_000.0 ** -(torch.arange(half, device=t.device) / half)
        time = self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=-1))
        for block in self.blocks:
            block.attention_norm.time = block.mlp_norm.time = time
        return super().forward(ids)


class PositionEmbedding(nn.Embedding):
    """Token embedding plus a table of positions: ids [B, L] to [B, L, width]."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.vocab_size, config.n_embd)
        self.positions = nn.Parameter(torch.randn(config.seq_len, config.n_embd))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.positions[: ids.shape[1]]


class LearnedPositions(Transformer):
    """Transformer with a learned table of positions in place of rotary ones; whole sequences only, no cache.

    >>> model = LearnedPositions(ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> tuple(model(torch.tensor([[4, MASK_ID, 5]])).shape), bool((model.sin == 0).all())
    ((1, 3, 10), True)
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed = PositionEmbedding(config)
        self.cos.fill_(1.0)
        self.sin.zero_()  # an angle of zero: nothing is rotated

    def forward(self, ids: Tensor, cache: None = None, start: int = 0) -> Tensor:
        if cache is not None or start:
            raise ValueError("learned positions start at 0: pass whole sequences and no cache")
        return super().forward(ids)


class Averaged(Transformer):
    """Transformer that is trained as usual and evaluated with the average of its weights, those of step n counted n^7 times.

    So the average spans the last eighth of a training, however long that is (a power profile: Karras et al. 2024,
    arXiv:2312.02696). It is kept in the buffers of `average` and saved with the model; a pass in training mode is a step.

    >>> model, ids = Averaged(ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8)), torch.tensor([[4, MASK_ID]])
    >>> for value in (1.0, 4.0):  # two steps
    ...     _ = nn.init.constant_(model.head.weight, value), model.train()(ids)
    >>> round(model.average.head.weight[0, 0].item(), 3)  # (1 x 1 + 2^7 x 4) / (1 + 2^7), nearly
    3.988
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.average = Transformer(config)
        self.register_buffer("steps", torch.zeros(()))
        for module in self.average.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach())

    def forward(self, ids: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
        if not self.training:
            return self.average(ids, cache, start)
        self.steps += 1
        for name, weight in self.named_parameters():
            self.average.get_buffer(name).lerp_(weight.detach(), 1 - (1 - 1 / self.steps) ** 8)
        return super().forward(ids, cache, start)
