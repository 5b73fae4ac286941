"""The MDLM tutorial's recipe beside ours: its model out of PyTorch's own parts, its loss, its optimizer."""

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

import llada_helpers as H
from beyond.losses import masked_mean

SIZES = {"smoke": (1, 2), "cpu": (5, 130), "cpu_long": (5, 130), "gpu": (20, 5000)}  # steps: the notebook's form, the full one


class PostNormEncoder(nn.Module, PyTorchModelHubMixin):
    """The MDLM tutorial's model out of PyTorch's own parts, to compare with: post-norm, learned positions, dropout 0.1.

    >>> import torch
    >>> model = PostNormEncoder(H.ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> tuple(model(torch.tensor([[4, 5, 6]])).shape)
    (1, 3, 10)
    """

    def __init__(self, config: H.ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.seq_len, config.n_embd)
        layer = nn.TransformerEncoderLayer(config.n_embd, config.n_head, 4 * config.n_embd, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]  # [B, L, n_embd]
        return self.head(self.norm(self.encoder(x, src_key_padding_mask=ids == H.PAD_ID)))


def recipe_jobs(preset: H.Preset, steps: int, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """The MDLM tutorial's recipe (its 1,000 steps of warm-up, longer than this training, shortened to ours), and our LLaDA.

    >>> import torch
    >>> ids = torch.arange(4, 30)
    >>> {row: job.architecture.__name__ for row, (job,) in recipe_jobs(H.PRESETS["smoke"], 2, 30, ids, ids).items()}
    {"MDLM tutorial's recipe": 'PostNormEncoder', 'ours': 'Transformer'}
    """
    shape = H.ModelConfig(vocab_size, min(128, preset.seq_len), n_layer=6, n_head=8, n_embd=256)
    config = H.TrainConfig(steps, 64, muon_lr=0.0, adamw_lr=3e-4, weight_decay=0.01, evals=min(10, steps))
    tutorial = H.Job(shape, config, train_ids, val_ids, masked_mean, architecture=PostNormEncoder)
    return {"MDLM tutorial's recipe": [tutorial], "ours": [preset.jobs(vocab_size, train_ids, val_ids)["LLaDA"]]}
