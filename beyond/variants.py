"""Architectures to compare with: a Transformer that is told the time, and one with learned positions."""

import torch
from torch import Tensor, nn

from llada_helpers import MASK_ID, PAD_ID, ModelConfig, Transformer


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
