"""LLaDA, a masked diffusion language model, next to an autoregressive (AR) baseline, on characters.

The sections follow the data:

    text -> CharTokenizer -> ids -> windows -> forward_process -> mask predictor -> llada_loss -> train
         -> reverse_process -> ids -> text;        the same windows -> nelbo / ar_nll -> tables

Three ideas keep the module small. A *mask predictor* is any callable from ids [B, L] to logits [B, L, V], so that every
loss, sampler and estimator below also takes somebody else's model or an exact oracle. LLaDA and AR are one Transformer
that differs in `causal` alone. Training step s is a pure function of (seed, s).

Losses and likelihoods are in nats; bits = nats / ln 2; perplexity = exp(nats per character). Equation numbers are those
of Nie et al. 2025, "Large Language Diffusion Models" (arXiv:2502.09992).
"""

import argparse
import bisect
import contextlib
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import pandas as pd
import requests
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MaskPredictor = Callable[[Tensor], Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# 1. Data
# ---------------------------------------------------------------------------------------------------------------------

PAD_ID, MASK_ID, START_ID, END_ID = range(4)
SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[START]", "[END]")
MASK_GLYPH = "█"

CORPUS_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def cache_path() -> Path:
    """Where the downloaded corpus is kept (and where it can be put by hand)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llada" / "tinyshakespeare.txt"


@contextlib.contextmanager
def _atomically(path: Path):
    """A temporary neighbour of `path` to write into, renamed at the end: a reader, or a kill, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    os.replace(temporary, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a kill, never sees half a file."""
    with _atomically(path) as temporary:
        temporary.write_bytes(data)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the text file {path}: {error}; pass a path that exists") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it to UTF-8 first") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise ValueError(f"{path} is empty; pass a file with some text in it")
    return text


def _offline_corpus() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def load_text(path: str | os.PathLike | None = None) -> str:
    """The corpus as one string with "\\n" line ends.

    The first of these that is there: `path`, `$LLADA_DATA`, the cached download, the download (checked against
    SHA-256, written atomically), and, with a loud warning, an offline corpus (the topics of Python's own `pydoc_data`).

    Raises:
        ValueError: `path` or `$LLADA_DATA` cannot be read, is empty or is not UTF-8.
    """
    path = path or os.environ.get("LLADA_DATA")
    if path:
        return _read_text(Path(path))
    cached = cache_path()
    if cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == CORPUS_SHA256:
        return _read_text(cached)
    try:
        response = requests.get(CORPUS_URL, timeout=(5, 30))
        response.raise_for_status()
        digest = hashlib.sha256(response.content).hexdigest()
        if digest != CORPUS_SHA256:
            raise OSError(f"the download has SHA-256 {digest}, expected {CORPUS_SHA256}")
        write_atomically(cached, response.content)
        return _read_text(cached)
    except OSError as error:  # requests' exceptions are OSErrors
        warnings.warn(
            f"TINYSHAKESPEARE COULD NOT BE DOWNLOADED ({str(error)[:150]}). Using Python's own help texts instead, so "
            f"the numbers will not be comparable. To use TinyShakespeare, save {CORPUS_URL} as {cached}, or set "
            "LLADA_DATA to any UTF-8 text file.",
            stacklevel=2,
        )
        return _offline_corpus()


def corpus_name(text: str) -> str:
    """The name that tables and figure titles give to `text`."""
    if hashlib.sha256(text.encode()).hexdigest() == CORPUS_SHA256:
        return "TinyShakespeare"
    if text == _offline_corpus():
        return "offline corpus (Python help topics)"
    return Path(os.environ.get("LLADA_DATA") or "own text").stem


class CharTokenizer:
    """Characters to ids: [PAD] 0, [MASK] 1, [START] 2, [END] 3, then the sorted characters of the text.

    >>> tokenizer = CharTokenizer.from_text("banana")
    >>> tokenizer.encode("nab").tolist()
    [6, 4, 5]
    >>> tokenizer.decode([2, 6, 4, 1, 3, 5])
    'na█'
    """

    pad_id, mask_id, start_id, end_id = PAD_ID, MASK_ID, START_ID, END_ID

    def __init__(self, characters: str):
        if len(set(characters)) != len(characters) or not characters:
            raise ValueError("characters must be distinct and at least one; use CharTokenizer.from_text(text)")
        self.characters = characters
        self.vocab_size = len(SPECIAL_TOKENS) + len(characters)
        self._id_of = {c: i for i, c in enumerate(characters, start=len(SPECIAL_TOKENS))}
        self._shown = ["", MASK_GLYPH, "", "", *characters]

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        if not text:
            raise ValueError("the text is empty; pass at least one character")
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """LongTensor[len(text)]. ValueError names the characters that the vocabulary lacks."""
        unknown = sorted(set(text) - self._id_of.keys())
        if unknown:
            raise ValueError(f"characters not in the vocabulary: {unknown}; use characters of the training text only")
        return torch.tensor([self._id_of[c] for c in text], dtype=torch.long)

    def decode(self, ids) -> str:
        """Text up to the first [END]; [PAD] and [START] are skipped, [MASK] is shown as a block."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if END_ID in ids:
            ids = ids[: ids.index(END_ID)]
        return "".join(self._shown[i] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"special_tokens": SPECIAL_TOKENS, "characters": self.characters})

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        try:
            return cls(json.loads(text)["characters"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"not a tokenizer ({error!r}); pass what to_json returned") from error


def split(ids: Tensor, fraction: float = 0.8) -> tuple[Tensor, Tensor]:
    """The first `fraction` of ids for training, the rest for validation: by position, so that no sentence is in both."""
    cut = int(fraction * len(ids))
    return ids[:cut], ids[cut:]


def windows(ids: Tensor, seq_len: int, stride: int | None = None, pad_id: int = PAD_ID) -> Tensor:
    """Cut ids [n] into windows [N, seq_len], `stride` apart (default: end to end). The last one is padded, nothing dropped.

    >>> windows(torch.tensor([5, 6, 7, 8, 9]), 3).tolist()
    [[5, 6, 7], [8, 9, 0]]
    """
    stride = seq_len if stride is None else stride
    if seq_len < 1 or not 1 <= stride <= seq_len:
        raise ValueError(f"seq_len={seq_len}, stride={stride}: pass 1 <= stride <= seq_len, so that nothing is dropped")
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; pass a vector of at least one id")
    count = 1 + max(0, math.ceil((len(ids) - seq_len) / stride))
    padding = (count - 1) * stride + seq_len - len(ids)
    return F.pad(ids, (0, padding), value=pad_id).unfold(0, seq_len, stride).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# 2. Forward process
# ---------------------------------------------------------------------------------------------------------------------


def _uniform(shape, like: Tensor, generator: torch.Generator | None, dtype=torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives, so that a CPU seed means the same on every device."""
    device = generator.device if generator is not None else like.device
    return torch.rand(shape, generator=generator, device=device, dtype=dtype).to(like.device)


def _check_maskable(sequences: Tensor, maskable: Tensor | None) -> Tensor:
    if sequences.ndim != 2:
        raise ValueError(f"sequences has shape {tuple(sequences.shape)}; pass ids of shape [B, L]")
    if maskable is None:
        return torch.ones_like(sequences, dtype=torch.bool)
    if maskable.shape != sequences.shape or maskable.dtype != torch.bool:
        raise ValueError(f"maskable is {maskable.dtype} {tuple(maskable.shape)}; pass bool {tuple(sequences.shape)}")
    return maskable


def _check_times(t: float | Tensor, sequences: Tensor, lowest_included: bool) -> Tensor:
    t = torch.as_tensor(t, dtype=torch.float32, device=sequences.device)
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != sequences.shape[0]):
        raise ValueError(f"t has shape {tuple(t.shape)}; pass one number or one per sequence ({sequences.shape[0]})")
    inside = (t >= 0 if lowest_included else t > 0) & (t <= 1)
    if not bool(inside.all()):
        raise ValueError(f"t must lie in {'[' if lowest_included else '('}0, 1], got {t.tolist()}")
    return t.expand(sequences.shape[0])


def forward_process(
    sequences: Tensor,
    t: float | Tensor,
    mask_id: int,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask each maskable token independently with probability t (Eqs. 7-8).

    Args:
        sequences: ids, LongTensor[B, L].
        t: time in [0, 1], one number or FloatTensor[B].
        maskable: BoolTensor[B, L], default everything.

    Returns:
        masked sequences LongTensor[B, L], and BoolTensor[B, L], true where a token was masked.
    """
    maskable = _check_maskable(sequences, maskable)
    t = _check_times(t, sequences, lowest_included=True)
    mask = (_uniform(sequences.shape, sequences, generator) < t[:, None]) & maskable
    return sequences.masked_fill(mask, mask_id), mask


def stratified_times(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """FloatTensor[B] in (0, 1]: one uniform number shifted across the batch, so that each B-th of (0, 1] is hit once.

    Every t_b is uniform, so the loss stays unbiased, with less noise than independent draws (Kingma et al. 2021).
    """
    shift = torch.rand(1, generator=generator, device=generator.device if generator is not None else None)
    return (torch.arange(batch_size, 0, -1, device=shift.device) - shift) / batch_size  # float32 rounding never makes it 0


# ---------------------------------------------------------------------------------------------------------------------
# 3. Model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Transformer. `causal` is the only difference between AR (True) and LLaDA (False).

    `rotary_base`: at 200 the slowest rotation turns once in about a thousand characters, a few windows; the usual 10,000, made
    for long contexts, leaves most frequencies idle at this length. None: learned positions.
    `attention_scale`: the largest attention logit (queries and keys are normalised). The usual sqrt(head width) is too blunt
    for characters, whose neighbours matter most.
    """

    vocab_size: int
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    causal: bool = False
    time_conditioning: bool = False
    rotary_base: float | None = 200.0
    attention_scale: float = 12.0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd")}
        bad = {name: value for name, value in sizes.items() if value < 1}
        if bad:
            raise ValueError(f"{bad}: pass positive sizes")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} with n_head={self.n_head}: pass n_embd divisible by 2 * n_head (rotary)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: pass a number in [0, 1)")


class KVCache:
    """Keys and values of every position, [n_layer, B, H, seq_len, D]; a pass over a slice writes at its positions.

    Such a pass attends over all that was written. Exact for a causal model; for LLaDA, whose keys depend on later characters
    too, an approximation.
    """

    def __init__(self, config: ModelConfig, batch_size: int, like: Tensor):
        shape = (config.n_layer, batch_size, config.n_head, config.seq_len, config.n_embd // config.n_head)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.padded = torch.zeros(batch_size, config.seq_len, dtype=torch.bool, device=like.device)
        self.length = 0

    def mark(self, start: int, padded: Tensor) -> Tensor:
        """Note which positions of a slice are [PAD]; BoolTensor[B, length], true where nothing may attend to."""
        stop = start + padded.shape[1]
        self.length = max(self.length, stop)
        self.padded[:, start:stop] = padded
        return self.padded[:, : self.length]

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a slice's keys and values [B, H, l, D]; returns those of all positions so far."""
        self.keys[layer, :, :, start : start + k.shape[2]] = k
        self.values[layer, :, :, start : start + k.shape[2]] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): x [B, H, L, D] turned pairwise by angles [L, D/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and a ReLU^2 MLP (So et al. 2021), both residual; output projections start at zero."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.n_embd
        self.n_head, self.causal, self.dropout = config.n_head, config.causal, config.dropout
        self.scale = config.attention_scale * config.n_head / width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.modulation = nn.Linear(width, 4 * width) if config.time_conditioning else None
        for weight in (self.qkv.weight, self.mlp_in.weight):
            nn.init.normal_(weight, std=width**-0.5)
        for module in (self.attention_out, self.mlp_out, self.modulation):
            if module is not None:
                nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, rotary, visible=None, time=None, cache: KVCache | None = None, layer=0, start=0) -> Tensor:
        B, L, C = x.shape
        modulation = (None,) * 4 if time is None else self.modulation(time)[:, None].chunk(4, dim=-1)
        h = self._norm(x, *modulation[:2])
        q, k, v = self.qkv(h).view(B, L, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each [B, H, L, D]
        q, k = _rms_norm(q), _rms_norm(k)
        if rotary is not None:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        if cache is not None:
            k, v = cache.write(layer, start, k, v)
        causal = self.causal and visible is None and L > 1
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=self.scale)
        x = x + self._drop(self.attention_out(h.transpose(1, 2).reshape(B, L, C)))
        h = F.relu(self.mlp_in(self._norm(x, *modulation[2:]))).square()
        return x + self._drop(self.mlp_out(h))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    @staticmethod
    def _norm(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return _rms_norm(x) if scale is None else _rms_norm(x) * (1 + scale) + shift


class Transformer(nn.Module, PyTorchModelHubMixin):
    """Ids LongTensor[B, L] to logits FloatTensor[B, L, vocab_size]; a mask predictor, or AR with `causal=True`.

    [PAD] is never attended to. With `time_conditioning`, adaptive layer norm (Peebles & Xie 2023) on t FloatTensor[B]; if t
    is not passed, the masked fraction of each sequence stands in for it. `save_pretrained`, `from_pretrained` and
    `push_to_hub` come from huggingface_hub (safetensors and config.json).

    Raises:
        ValueError: ids not [B, L], or L longer than `config.seq_len`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, half = config.n_embd, config.n_embd // config.n_head // 2
        self.embed = nn.Embedding(config.vocab_size, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # Untied: input and output roles differ, [MASK] is only ever read. Zero: the first prediction is uniform.
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        if config.time_conditioning:
            self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        if config.rotary_base is None:
            self.positions = nn.Embedding(config.seq_len, width)
        else:
            angles = torch.outer(torch.arange(config.seq_len), config.rotary_base ** -(torch.arange(half) / half))
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, t: Tensor | None = None, cache: KVCache | None = None, start: int = 0) -> Tensor:
        if ids.ndim != 2 or start + ids.shape[1] > self.config.seq_len:
            raise ValueError(f"ids {tuple(ids.shape)} from position {start}: pass [B, L] with L <= {self.config.seq_len}")
        L, causal = ids.shape[1], self.config.causal
        padded = ids == PAD_ID
        hidden = padded if cache is None else cache.mark(start, padded)  # [B, keys]
        visible = None  # no mask is the fast path; only padding and slices in the middle of a causal sequence need one
        if bool(hidden.any()) or (causal and start > 0 and not L == hidden.shape[1] - start == 1):
            query = torch.arange(start, start + L, device=ids.device)[:, None]
            key = torch.arange(hidden.shape[1], device=ids.device)
            allowed = ~hidden[:, None, None, :] & (key <= query if causal else key >= 0)
            visible = allowed | (key == query)  # [B, 1, query, key]; a [PAD] sees itself, else its softmax would be NaN
        time = None
        if self.config.time_conditioning:
            t = (ids == MASK_ID).sum(dim=1) / (~padded).sum(dim=1).clamp(min=1) if t is None else t
            time = self.time_mlp(self._sinusoids(t))
        here = slice(start, start + L)
        if self.config.rotary_base is None:
            x, rotary = _rms_norm(self.embed(ids) + self.positions.weight[here]), None
        else:
            x, rotary = _rms_norm(self.embed(ids)), (self.cos[here], self.sin[here])
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, visible, time, cache, layer, start)
        return self.head(_rms_norm(x)).float()

    def _sinusoids(self, t: Tensor) -> Tensor:
        half = self.config.n_embd // 2
        frequencies = 1000 * 10_000.0 ** -(torch.arange(half, device=t.device) / half)
        return torch.cat(((t[:, None] * frequencies).sin(), (t[:, None] * frequencies).cos()), dim=-1)

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# 4. Losses: both models minimise a weighted negative log-likelihood of (inputs, targets, weight)
# ---------------------------------------------------------------------------------------------------------------------


def diffusion_batch(
    sequences: Tensor,
    generator: torch.Generator | None = None,
    maskable: Tensor | None = None,
    mask_id: int = MASK_ID,
    t: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x_t, targets x_0 and the weights of Eq. 3: 1 / (t_b n_b) on masked tokens, n_b the maskable ones of row b."""
    maskable = _check_maskable(sequences, sequences != PAD_ID if maskable is None else maskable)
    t = stratified_times(len(sequences), generator) if t is None else t
    t = _check_times(t, sequences, lowest_included=False)
    inputs, mask = forward_process(sequences, t, mask_id, maskable, generator)
    return inputs, sequences, mask / (t[:, None] * maskable.sum(dim=1, keepdim=True).clamp(min=1))


def next_token_batch(
    sequences: Tensor,
    generator: torch.Generator | None = None,
    counted: Tensor | None = None,
    start_id: int = START_ID,
    pad_id: int = PAD_ID,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [START] x_1 ... x_{L-1}, targets x_1 ... x_L (Eq. 2), weights that make the batch a mean over its counted tokens."""
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    counted = (sequences != pad_id if counted is None else counted).float()
    return inputs, sequences, counted * (len(sequences) / counted.sum().clamp(min=1))


def real_tokens(sequences: Tensor) -> Tensor:
    """BoolTensor[B, L]: everything but padding, what pre-training learns."""
    return sequences != PAD_ID


def response_tokens(sequences: Tensor) -> Tensor:
    """BoolTensor[B, L]: the response, what follows the row's [START]; before it stands the prompt, which SFT never masks (Eq. 5).

    >>> response_tokens(torch.tensor([[7, 8, START_ID, 9, END_ID, PAD_ID]])).tolist()
    [[False, False, False, True, True, False]]
    """
    separator = sequences == START_ID
    return (separator.cumsum(dim=1) > 0) & ~separator & (sequences != PAD_ID)


def weighted_nll(model: MaskPredictor, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows of sum_i weight_i * -log p(target_i | inputs). Positions of weight 0 are never looked at."""
    counted = weight > 0
    nll = F.cross_entropy(model(inputs)[counted], targets[counted], reduction="none")
    return (nll * weight[counted]).sum() / len(inputs)


def llada_loss(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    t: float | Tensor | None = None,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The LLaDA loss, nats per maskable token; its expectation is the NELBO (Eqs. 3 and 4; Eq. 5 if the prompt is not maskable).

    Mean over the batch of (1/t_b) * (sum of cross-entropies over masked tokens) / (number of maskable tokens of b).

    Args:
        sequences: ids x_0, LongTensor[B, L].
        t: times in (0, 1], one number or FloatTensor[B]; default: stratified, one per sequence.
        maskable: BoolTensor[B, L], default everything.
    """
    maskable = torch.ones_like(sequences, dtype=torch.bool) if maskable is None else maskable
    return weighted_nll(model, *diffusion_batch(sequences, generator, maskable, mask_id, t))


def next_token_loss(model: MaskPredictor, sequences: Tensor, start_id: int, pad_id: int = PAD_ID) -> Tensor:
    """Mean AR cross-entropy, nats per token that is not padding; the first token is scored given [START] (Eq. 2)."""
    return weighted_nll(model, *next_token_batch(sequences, None, None, start_id, pad_id))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Sizes and iterations, never seconds: a rerun gives the same numbers."""

    steps: int
    batch_size: int  # windows a step, over all processes and micro-batches
    muon_lr: float = 0.02  # 0: AdamW for everything
    adamw_lr: float = 3e-3
    weight_decay: float = 0.0
    warmup: float = 0.02  # fraction of the steps with rising learning rate
    decay: float = 0.5  # fraction of the steps, the last ones, with linearly falling learning rate
    clip: float = 1.0  # largest gradient norm
    accumulation: int = 1  # micro-batches whose gradients are summed before a step
    evals: int = 20  # validations, the last one at the end
    eval_windows: int = 128
    seed: int = 0


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration toward the nearest (semi-)orthogonal matrix, for each of [n, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum, orthogonalised, for the weight matrices of the blocks.

    torch.optim.Muon works matrix by matrix in bfloat16, which CPUs without native bfloat16 emulate slowly; this one stacks equal
    shapes into one batched product in the parameters' own precision, and treats q, k and v as three matrices (`parts`).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=1))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # [n, rows, columns]
            n, rows, columns = updates.shape
            rows //= group["parts"]
            updates = orthogonalize(updates.view(n * group["parts"], rows, columns)).reshape(n, -1, columns)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and time conditioning; AdamW alone if `muon_lr` is 0."""
    optimizers, in_muon = [], set()
    if config.muon_lr:
        matrices = [
            {"params": [b.qkv.weight for b in model.blocks], "parts": 3},
            {"params": [b.attention_out.weight for b in model.blocks]},
            {"params": [b.mlp_in.weight for b in model.blocks]},
            {"params": [b.mlp_out.weight for b in model.blocks]},
        ]
        in_muon = {id(p) for group in matrices for p in group["params"]}
        optimizers.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    rest = [p for p in model.parameters() if id(p) not in in_muon]
    adamw = torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True)
    return [*optimizers, adamw]


def training_batch(ids: Tensor, seq_len: int, batch_size: int, seed: int, step: int, make_batch, learned) -> tuple[Tensor, ...]:
    """Inputs, targets, weights of one step, drawn from a generator seeded by (seed, step).

    ids [n] is a text, of which windows at random offsets are taken; ids [N, seq_len] are sequences, of which rows are taken.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if ids.ndim == 1:
        ids = F.pad(ids, (0, max(0, seq_len - len(ids))), value=PAD_ID).unfold(0, seq_len, 1)
    sequences = ids[torch.randint(len(ids), (batch_size,), generator=generator)]
    return make_batch(sequences, generator, learned(sequences))


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to zero: 0 < factor <= 1."""
    rise, fall = max(1, config.warmup * config.steps), max(1, config.decay * config.steps)
    return min(1.0, (step + 1) / rise, (config.steps - step) / fall)


def optimizer_step(accelerator: Accelerator, network: nn.Module, optimizers: list, batch, config: TrainConfig):
    """Gradient of this process's share of the global batch, clipped, and one step; returns the share's loss and the norm.

    The share is worked off in `accumulation` micro-batches; processes exchange gradients after the last one only. The
    optimizers share one loss scale (fp16), so it is updated once, after both have stepped.
    """
    share = config.batch_size // accelerator.num_processes
    mine = [x[accelerator.process_index * share :][:share].to(accelerator.device).chunk(config.accumulation) for x in batch]
    total = torch.zeros((), device=accelerator.device)
    for i, micro_batch in enumerate(zip(*mine), start=1):
        with contextlib.nullcontext() if i == config.accumulation else accelerator.no_sync(network):
            loss = weighted_nll(network, *micro_batch) / config.accumulation
            accelerator.backward(loss)
        total += loss.detach()
    scaler = accelerator.scaler
    if scaler:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip)
    for optimizer in optimizers:
        if scaler:
            scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()
    if scaler:
        scaler.update()
    return total, norm


def validation_nats(model: MaskPredictor, sequences: Tensor, learned: Tensor, autoregressive: bool) -> Tensor:
    """Nats of the learned tokens of each row, FloatTensor[N]: exact for AR, the NELBO with fixed masks for LLaDA."""
    if autoregressive:
        return ar_nll(model, sequences, START_ID, counted=learned)
    return nelbo(model, sequences, MASK_ID, n_samples=4, maskable=learned, generator=torch.Generator().manual_seed(0))


class PostNormEncoder(nn.Module, PyTorchModelHubMixin):
    """The MDLM tutorial's model out of PyTorch's own parts, to compare with: post-norm, learned positions, dropout 0.1."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.seq_len, config.n_embd)
        layer = nn.TransformerEncoderLayer(config.n_embd, config.n_head, 4 * config.n_embd, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.encoder(x, src_key_padding_mask=ids == PAD_ID)))


@dataclass(frozen=True)
class Job:
    """Everything that decides what a training makes, and so its fingerprint.

    Args:
        model, train: the configurations.
        train_ids, val_ids: LongTensor[n], a text, or LongTensor[N, seq_len], sequences. Validation takes `eval_windows`
            windows or sequences, spread evenly, with fixed masks.
        make_batch: (sequences [B, L], generator, learned [B, L]) -> (inputs, targets, weights); default `next_token_batch` for a
            causal model, else `diffusion_batch`.
        learned: sequences [B, L] -> BoolTensor[B, L], what is masked or predicted; `response_tokens` for SFT.
        start: the model whose weights to begin with; default fresh ones.
        architecture: called with the model configuration.
    """

    model: ModelConfig
    train: TrainConfig
    train_ids: Tensor
    val_ids: Tensor
    make_batch: Callable | None = None
    learned: Callable = real_tokens
    start: nn.Module | None = None
    architecture: type = Transformer

    @property
    def batch_function(self) -> Callable:
        return self.make_batch or (next_token_batch if self.model.causal else diffusion_batch)

    @property
    def autoregressive(self) -> bool:
        return self.batch_function is next_token_batch

    def fingerprint(self) -> str:
        """Twelve hex digits that change with the configuration, the data, the first weights or the code of the training path."""
        code = [forward_process, stratified_times, diffusion_batch, _rms_norm, _rotate, Block, self.architecture]
        code += [self.batch_function, self.learned]
        code += [weighted_nll, orthogonalize, Muon, make_optimizers, training_batch, learning_rate_factor, optimizer_step]
        code += [validation_nats]
        digest = hashlib.sha256(json.dumps([asdict(self.model), asdict(self.train)]).encode())
        first = list(self.start.state_dict().values()) if self.start else []
        for tensor in (self.train_ids, self.val_ids, *first):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        for thing in code:
            digest.update(inspect.getsource(thing).encode())
        return digest.hexdigest()[:12]

    def validation_sequences(self) -> Tensor:
        sequences = windows(self.val_ids, self.model.seq_len) if self.val_ids.ndim == 1 else self.val_ids
        return sequences[torch.linspace(0, len(sequences) - 1, min(self.train.eval_windows, len(sequences))).long()]


@dataclass
class Run:
    """A finished or interrupted training run: the best model, the metrics table, the final numbers, the directory."""

    model: Transformer
    metrics: pd.DataFrame
    summary: dict
    path: Path


def load_model(directory: str | os.PathLike, architecture: type = Transformer) -> nn.Module:
    """`from_pretrained` of a local directory, in evaluation mode, without its chatter on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return architecture.from_pretrained(directory).eval()


def _save_best(model: nn.Module, directory: Path) -> None:
    """`save_pretrained` into a neighbour, then renamed file by file, so that no reader sees half a checkpoint."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    for file in sorted(temporary.iterdir()):
        os.replace(file, directory / file.name)
    temporary.rmdir()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().numpy().tobytes())
    return digest.hexdigest()


def _save_state(path: Path, older: Path, model: nn.Module, optimizers: list, meta: dict) -> None:
    """Write the training state to `path`; what was there becomes `older`."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{i}.{j}.{name}": torch.as_tensor(value).contiguous() for name, value in state.items()}
    with _atomically(path) as temporary:
        save_file(tensors, temporary, metadata={"meta": json.dumps(meta), "sha256": _checksum(tensors)})
        if path.exists():
            os.replace(path, older)


def _load_state(path: Path, mark: str, model: nn.Module, optimizers: list) -> dict:
    try:
        with safe_open(path, "pt") as file:
            tensors, notes = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        meta, whole = json.loads(notes["meta"]), notes["sha256"] == _checksum(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}); delete it to train from the start") from error
    if not whole:
        raise ValueError(f"the checkpoint {path} is damaged (its checksum differs); delete it to train from the start")
    if meta["fingerprint"] != mark:
        raise ValueError(f"the checkpoint {path} is of another run, {meta['fingerprint']}, not of {mark}; delete it")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer{i}."):
                _, j, name = key.split(".")
                state.setdefault(int(j), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta


def _resume(paths: list[Path], mark: str, model: nn.Module, optimizers: list) -> dict:
    """What the newest sound checkpoint says of the progress; ValueError if there are checkpoints, but none is sound."""
    refused = []
    for path in filter(Path.exists, paths):
        try:
            progress = _load_state(path, mark, model, optimizers)
        except ValueError as error:
            refused.append(error)
            continue
        for error in refused:
            warnings.warn(f"{error}; going on from the one before it, step {progress['step']}", stacklevel=3)
        return progress
    if refused:
        raise refused[0]
    return {"step": 0, "rows": [], "seconds": 0.0, "best": math.inf, "fingerprint": mark}


def describe_machine() -> dict[str, str]:
    """Device and versions, for the first cell and for each run's record."""
    cpuinfo = Path("/proc/cpuinfo")
    cpus = [x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x] if cpuinfo.exists() else []
    cpu = f"{cpus[0] if cpus else platform.processor()}, {torch.get_num_threads()} threads"
    ask = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(ask, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit.strip() or "none",
    }


def mixed_precision() -> str:
    """bf16 on GPUs that have it, fp16 with loss scaling on older ones (T4), full precision on CPU."""
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


@torch.random.fork_rng()
def train(name: str, job: Job, *, root: str | os.PathLike = ".", compiled: bool = False) -> Run:
    """Train what `job` says, or load the run if it is already complete, or go on where it was interrupted.

    Under `root`, `runs/NAME-FINGERPRINT/` gets run.json, metrics.csv, TensorBoard events and, at the end, final.json;
    `checkpoints/NAME-FINGERPRINT/` gets best/ (config.json, model.safetensors) and, with the optimizers' state, last.safetensors
    and the one before it, previous.safetensors. `LLADA_RETRAIN=1` trains from the start whatever is there. Ctrl-C returns what
    there is. Several processes (`accelerate launch`, `torchrun`) share each batch.

    Args:
        compiled: torch.compile the blocks for the training steps.

    Raises:
        ValueError: too few steps, a batch that processes and micro-batches cannot share evenly, or no sound checkpoint.
        RuntimeError: the loss is not finite or far above that of a blank model; names the step, the learning rates and the last
            good checkpoint.
    """
    config = job.train
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision())
    if min(config.steps, config.batch_size, config.evals, config.eval_windows, config.accumulation) < 1:
        raise ValueError(f"{config}: pass at least one step, one window a batch, one evaluation of one window")
    if config.batch_size % (accelerator.num_processes * config.accumulation):
        shares = f"{accelerator.num_processes} processes x {config.accumulation} micro-batches"
        raise ValueError(f"batch_size={config.batch_size}: pass a multiple of {shares}")
    mark = job.fingerprint()
    run_dir, checkpoint_dir = (Path(root) / folder / f"{name}-{mark}" for folder in ("runs", "checkpoints"))
    best_dir, final_path = checkpoint_dir / "best", run_dir / "final.json"
    states = [checkpoint_dir / "last.safetensors", checkpoint_dir / "previous.safetensors"]
    fresh = os.environ.get("LLADA_RETRAIN") == "1"
    if not fresh and final_path.exists() and (best_dir / "model.safetensors").exists():
        summary = json.loads(final_path.read_text())
        print(f"{name}: complete since before, loaded from {run_dir}")
        model = load_model(best_dir, job.architecture).to(accelerator.device)
        return Run(model, pd.read_csv(run_dir / "metrics.csv"), summary, run_dir)

    main = accelerator.is_main_process
    for directory in (run_dir, best_dir):
        directory.mkdir(parents=True, exist_ok=True)
    if fresh and main:  # an interrupted retraining must not be taken for the complete run that it replaces
        for path in (final_path, *states):
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    torch.manual_seed(config.seed)
    model = job.architecture(job.model).to(accelerator.device)
    if job.start:
        model.load_state_dict(job.start.state_dict())
    optimizers = make_optimizers(model, config)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    progress = _resume(states, mark, model, optimizers)
    step, rows = progress["step"], progress["rows"]
    network = accelerator.prepare(model)
    if accelerator.scaler and "scaler" in progress:
        accelerator.scaler.load_state_dict(progress["scaler"])
    if compiled and (torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++"))):
        for block in model.blocks:
            block.compile()
    twin = job.architecture(job.model).to(accelerator.device).eval()  # for validation: eager, full precision, any shape
    if main:
        record = {"name": name, "fingerprint": mark, "model": asdict(job.model), "train": asdict(config)}
        record |= {"parameters": sum(p.numel() for p in model.parameters()), "precision": accelerator.mixed_precision}
        record |= {"batch": job.batch_function.__name__, "learned": job.learned.__name__, "characters": job.train_ids.numel()}
        record |= {"data_sha256": hashlib.sha256(job.train_ids.numpy().tobytes()).hexdigest(), **describe_machine()}
        record |= {"architecture": job.architecture.__name__, "processes": accelerator.num_processes}
        write_atomically(run_dir / "run.json", json.dumps(record, indent=1).encode())
    val_sequences = job.validation_sequences()
    val_learned = job.learned(val_sequences)
    blank = math.log(job.model.vocab_size)  # the loss of a model that knows nothing
    eval_steps = {round(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    writer = SummaryWriter(run_dir, purge_step=step) if main else None
    bar = tqdm(
        total=config.steps, initial=step, desc=name, file=sys.stdout, mininterval=10, delay=5, ncols=100, disable=not main
    )
    losses, started = [], time.perf_counter()
    try:
        while step < config.steps:
            factor = learning_rate_factor(step, config)
            for optimizer, rates in zip(optimizers, base_rates):
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * factor
            batch = training_batch(
                job.train_ids, job.model.seq_len, config.batch_size, config.seed, step, job.batch_function, job.learned
            )
            # Dropout, too, is a function of (seed, step), and of the process.
            torch.manual_seed(config.seed * 1_000_003 + step + accelerator.process_index * 2**40)
            loss, norm = optimizer_step(accelerator, network, optimizers, batch, config)
            losses.append(loss)
            step += 1
            bar.update()
            if step not in eval_steps:
                continue
            train_loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
            twin.load_state_dict(model.state_dict())
            val_nats = validation_nats(twin, val_sequences, val_learned, job.autoregressive)
            val_loss = float(val_nats.sum() / val_learned.sum())
            if not (math.isfinite(train_loss) and val_loss < 3 * blank):
                rates = f"learning rates {config.muon_lr * factor:.3g} (Muon) and {config.adamw_lr * factor:.3g} (AdamW)"
                raise RuntimeError(
                    f"{name}: training loss {train_loss:.3g}, validation {val_loss:.3g} at step {step}, {rates}; a blank model "
                    f"has {blank:.2f}. The last good checkpoint is {states[0]}; lower muon_lr or adamw_lr"
                )
            progress["seconds"] += time.perf_counter() - started
            row = {"step": step, "tokens": step * config.batch_size * job.model.seq_len}
            row |= {"seconds": round(progress["seconds"], 2), "train_loss": train_loss, "val_loss": val_loss}
            rows.append(row | {"lr": config.muon_lr * factor, "grad_norm": float(norm)})
            bar.set_postfix(train=f"{train_loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
            if main:
                for key in ("train_loss", "val_loss", "lr", "grad_norm"):
                    writer.add_scalar(key, rows[-1][key], step)
                if val_loss < progress["best"]:
                    progress["best"] = val_loss
                    _save_best(twin, best_dir)
                scale = {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler else {}
                write_atomically(run_dir / "metrics.csv", pd.DataFrame(rows).to_csv(index=False).encode())
                _save_state(*states, model, optimizers, progress | {"step": step} | scale)
            losses, started = [], time.perf_counter()
        complete = True
    except KeyboardInterrupt:
        complete = False
        print(f"\n{name}: interrupted at step {step}; running the same again goes on from {states[0]}")
    finally:
        bar.close()
        if writer:
            writer.close()
    summary = {"best": progress["best"], "steps": step, "seconds": round(progress["seconds"], 1), "fingerprint": mark}
    summary |= {"parameters": sum(p.numel() for p in model.parameters())}
    summary |= {"tokens": step * config.batch_size * job.model.seq_len}
    if main and complete:
        write_atomically(final_path, json.dumps(summary, indent=1).encode())
    accelerator.wait_for_everyone()
    saved = (best_dir / "model.safetensors").exists()
    best = load_model(best_dir, job.architecture).to(accelerator.device) if saved else twin
    return Run(best, pd.DataFrame(rows), summary, run_dir)


def runs_table(root: str | os.PathLike = ".") -> pd.DataFrame:
    """All runs under `root`/runs, a row each: where their configurations differ, best validation, tokens, seconds, commit."""
    rows = []
    for path in sorted(Path(root).glob("runs/*/run.json")):
        record = json.loads(path.read_text())
        metrics = pd.read_csv(path.parent / "metrics.csv") if (path.parent / "metrics.csv").exists() else None
        row = {"row": path.parent.name, "complete": (path.parent / "final.json").exists()}
        row |= {**record["model"], **record["train"]}
        row |= {key: record[key] for key in ("architecture", "batch", "learned", "characters", "precision", "processes")}
        row["parameters"] = record["parameters"]
        if metrics is not None:
            row |= {"best validation": metrics["val_loss"].min(), **metrics[["tokens", "seconds"]].iloc[-1].to_dict()}
        rows.append(row | {key: record[key] for key in ("device", "commit")})
    table = pd.DataFrame(rows)
    kept = ["row", "complete", "parameters", "best validation", "tokens", "seconds", "device", "commit"]
    return table[[c for c in table if c in kept or table[c].astype(str).nunique() > 1]]


def plot_curves(runs: dict[str, Run], ax, metric: str = "val_loss", clock: str = "step", **style) -> None:
    """One metric of several runs against "step", "tokens" or "seconds"."""
    for name, run in runs.items():
        ax.plot(run.metrics[clock], run.metrics[metric], label=name, **style)
    ax.set(xlabel=clock, ylabel=metric)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Reverse process
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Generation:
    """What a sampler made. Every intermediate state follows from `ids` and `order` (see `state_after`), or is in `states`."""

    ids: Tensor  # LongTensor[B, L], the finished sequences
    order: Tensor  # LongTensor[B, L], the step (from 0) that committed a position for good; -1 where it was given
    nfe: int  # forward passes used (a guided pass counts once)
    states: list[Tensor] | None = None  # with revisions: the template and the sequences after each step

    def state_after(self, step: int, mask_id: int = MASK_ID) -> Tensor:
        """LongTensor[B, L]: the sequences after `step`; step -1 is the template."""
        return self.ids.masked_fill(self.order > step, mask_id) if self.states is None else self.states[step + 1]


def _inference(function):
    """No gradients, and evaluation mode for the time of the call if the mask predictor is a module."""

    @functools.wraps(function)
    def wrapped(model, *args, **kwargs):
        was_training = isinstance(model, nn.Module) and model.training
        if was_training:
            model.eval()
        try:
            with torch.no_grad():
                return function(model, *args, **kwargs)
        finally:
            if was_training:
                model.train()

    return wrapped


def _check_sampling(temperature: float, top_p: float) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: pass 0 for argmax, or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: pass a number in (0, 1]; 1 keeps everything")


def _check_length(model: MaskPredictor, length: int) -> None:
    longest = getattr(getattr(model, "config", None), "seq_len", None)
    if longest is not None and length > longest:
        raise ValueError(f"the sequence has {length} tokens, the model's seq_len is {longest}; pass a shorter one")


def sample_tokens(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits [M, V], LongTensor[M]: argmax at temperature 0, else an exact draw from the nucleus.

    The draw inverts the cumulative distribution in float64: float32 Gumbel noise would lower the temperature (Zheng et
    al. 2024, arXiv:2409.02908). ValueError where every token has the logit -inf.
    """
    if bool(logits.amax(dim=-1).isneginf().any()):
        raise ValueError("every token that the model allows is forbidden; pass fewer forbidden ids")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p < 1:
        ranked, index = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(dim=-1) - ranked >= top_p] = 0  # the first token always stays
        probs = torch.zeros_like(probs).scatter(-1, index, ranked)
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:]
    point = _uniform((len(cdf), 1), cdf, generator, torch.float64) * total
    return torch.searchsorted(cdf, torch.minimum(point, total.nextafter(torch.zeros_like(total))), right=True)[:, 0]


def _guided(
    model: MaskPredictor, ids: Tensor, wanted: Tensor, hidden: Tensor, mask_id: int, cfg_scale: float, **cached
) -> Tensor:
    """Logits [M, V] at the M `wanted` positions [B, L], with classifier-free guidance (Eq. 16).

    The unconditional half of the pass sees the same sequences with the positions in `hidden` [B, L] masked.
    """
    if cfg_scale == 0:
        return model(ids, **cached)[wanted]
    both = model(torch.cat((ids, ids.masked_fill(hidden, mask_id))), **cached).chunk(2)
    conditional, unconditional = (logits[wanted] for logits in both)
    guided = unconditional + (cfg_scale + 1) * (conditional - unconditional)
    return guided.masked_fill(conditional.isneginf(), -math.inf)


REMASKING = ("low_confidence", "random", "ancestral", "entropy", "margin")


@_inference
def reverse_process(
    model: MaskPredictor,
    template: Tensor,
    *,
    mask_id: int,
    steps: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    remasking: str = "low_confidence",
    block_length: int | None = None,
    threshold: float | None = None,
    entropy_bound: float | None = None,
    cache: bool = False,
    cfg_scale: float = 0.0,
    forbidden: tuple[int, ...] = (),
    late: tuple[int, ...] = (),
    revisions: int = 0,
    generator: torch.Generator | None = None,
) -> Generation:
    """Fill every [MASK] of the template, some positions per step, from t = 1 to t = 0.

    After the step from t to s, floor(n (1 - s)) of a row's n masks are filled. Which ones come first:

    - "low_confidence": those whose chosen token has the largest probability (Alg. 5);
    - "random": uniformly chosen ones (Alg. 4 with fixed counts);
    - "entropy": those whose predicted distribution has the lowest entropy;
    - "margin": those with the largest gap between the two best probabilities;
    - "ancestral": each remaining mask with probability (t - s) / t, the literal reverse process (Eq. 10).

    Args:
        template: LongTensor[B, L]. Masks may be anywhere and differ in number between rows; every other token is kept.
        steps: forward passes at most (a step that would reveal nothing is skipped); shared out evenly over the blocks.
        temperature: 0 is argmax, otherwise exact categorical sampling from the nucleus of mass `top_p`.
        block_length: fill the masks in consecutive groups of this many, left to right (semi-autoregressive).
        threshold: instead of a fixed count reveal every token whose probability exceeds it, at least one per row and pass
            (Fast-dLLM, Wu et al. 2025); `steps` then does not bind and `order` counts passes.
        entropy_bound: likewise, with remasking="entropy": reveal the longest lowest-entropy-first run whose summed entropy, less
            its largest term, is at most this many nats (EB-Sampler, Ben-Hamu et al. 2025).
        cache: only for our Transformer. Each block starts with a full pass; its further passes compute the block alone, with
            the keys and values of all else from that first pass (dual cache of Fast-dLLM): faster, and an approximation.
        cfg_scale: strength w of Eq. 16; the unconditional pass masks everything that was given.
        forbidden: token ids never to produce; [MASK] never is.
        late: token ids whose confidence counts as nothing, so that they are committed last: [END] would otherwise be locked in
            early and cut the text short (LLaDA, appendix B.4).
        revisions: so many further passes, each of which takes back the tokens that were committed with the lowest
            probability, as many as a step reveals, and decides them anew with all others in sight (in the spirit of ReMDM,
            Wang et al. 2025). `order` then tells the last commit.

    Raises:
        ValueError: an argument out of range, blocks that do not divide the masks or the steps, nothing to fill, or a
            template longer than the model's `seq_len`.
    """
    _check_sampling(temperature, top_p)
    if template.ndim != 2:
        raise ValueError(f"template has shape {tuple(template.shape)}; pass ids of shape [B, L]")
    if steps < 1 or revisions < 0:
        raise ValueError(f"steps={steps}, revisions={revisions}: pass at least 1 step and 0 revisions")
    if remasking not in REMASKING:
        raise ValueError(f"remasking={remasking!r}: pass one of {', '.join(REMASKING)}")
    _check_length(model, template.shape[1])
    adaptive = threshold is not None or entropy_bound is not None
    if threshold is not None and entropy_bound is not None:
        raise ValueError("threshold and entropy_bound both decide how many to reveal: pass one of them")
    if entropy_bound is not None and (remasking != "entropy" or entropy_bound < 0):
        raise ValueError(f"entropy_bound={entropy_bound}, remasking={remasking!r}: pass a bound >= 0 with remasking='entropy'")
    if cache and not isinstance(model, Transformer):
        raise ValueError("cache=True needs the keys and values of our own Transformer: pass one, or cache=False")
    masked = template == mask_id
    n_masks = masked.sum(dim=1)
    if not bool(n_masks.any()):
        raise ValueError("nothing to fill: pass a template with mask_id where tokens are wanted")
    block_length = int(n_masks.max()) if block_length is None else block_length
    if block_length < 1 or (bool((n_masks % block_length).any()) and block_length != int(n_masks.max())):
        raise ValueError(f"block_length={block_length}: pass a positive divisor of the number of masks {n_masks.tolist()}")
    n_blocks = -(-int(n_masks.max()) // block_length)
    if steps % n_blocks and not adaptive:
        raise ValueError(f"steps={steps}: pass a multiple of the number of blocks, {n_blocks}")
    steps_per_block = max(1, steps // n_blocks)

    ids, given, nfe = template.clone(), ~masked, 0
    order = torch.full_like(ids, -1)
    certainty = torch.full(ids.shape, math.inf, dtype=torch.float64, device=ids.device)  # of what was committed
    block_of = torch.where(masked, (masked.cumsum(dim=1) - 1) // block_length, -1)
    banned = torch.tensor(sorted({mask_id, *forbidden}), device=ids.device)
    postponed = torch.tensor(sorted(late), dtype=ids.dtype, device=ids.device)

    def predict(reveal: Tensor, span: slice = slice(None), **cached) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass: a token [M] for each position in `reveal`, its probability [M], all probabilities [M, V]."""
        logits = _guided(model, ids[:, span], reveal[:, span], given[:, span], mask_id, cfg_scale, **cached)
        tokens = sample_tokens(logits.index_fill(-1, banned, -math.inf), temperature, top_p, generator)
        probs = logits.double().softmax(dim=-1)
        return tokens, probs.gather(-1, tokens[:, None])[:, 0].masked_fill(torch.isin(tokens, postponed), 0.0), probs

    for block in range(n_blocks):
        in_block = block_of == block
        n = in_block.sum(dim=1)
        columns = in_block.any(dim=0).nonzero()[:, 0]
        span, cached = slice(0, ids.shape[1]), {}
        kept = KVCache(model.config, len(ids) * (2 if cfg_scale else 1), model.embed.weight) if cache else None
        i = 0
        while bool((candidates := in_block & (order < 0)).any()):
            left = candidates.sum(dim=1)
            reveal, count = candidates, left
            if not adaptive and remasking == "ancestral":
                reveal = candidates & (_uniform(ids.shape, ids, generator, torch.float64) * (steps_per_block - i) < 1)
                count = reveal.sum(dim=1)
            elif not adaptive:
                count = (n * (i + 1)).div(steps_per_block, rounding_mode="floor") - (n - left)
            i += 1
            if not bool(count.any()):
                continue
            if cache:
                cached = {"cache": kept, "start": span.start}
            tokens, chosen, probs = predict(reveal, span, **cached)
            nfe += 1
            if cache:
                span = slice(int(columns[0]), int(columns[-1]) + 1)
            if remasking == "random":
                score = _uniform(chosen.shape, chosen, generator, chosen.dtype)
            elif remasking == "entropy":
                score = torch.special.entr(probs).sum(dim=-1).neg()
            elif remasking == "margin":
                score = probs.topk(2, dim=-1).values.diff(dim=-1).neg()[:, 0]
            else:
                score = chosen
            if late:
                score = score.masked_fill(torch.isin(tokens, postponed), torch.finfo(score.dtype).min)
            scores = torch.full(ids.shape, -math.inf, dtype=torch.float64, device=ids.device).masked_scatter(reveal, score)
            ranked = scores.topk(int(count.max()), dim=1)
            if threshold is not None:
                count = count.clamp(max=1)
            elif entropy_bound is not None:  # entropies ascend, so a run's largest term is its last
                run = (ranked.values.neg().cumsum(dim=1) + ranked.values <= entropy_bound).sum(dim=1)
                count = run.clamp(min=1).minimum(left)
            first = torch.arange(ranked.indices.shape[1], device=ids.device) < count[:, None]
            first = torch.zeros_like(reveal).scatter(1, ranked.indices, first)
            if threshold is not None:
                first = first.masked_scatter(reveal, first[reveal] | (chosen > threshold))
            ids = torch.where(first, ids.masked_scatter(reveal, tokens), ids)
            certainty = torch.where(first, certainty.masked_scatter(reveal, chosen), certainty)
            order[first] = nfe - 1 if adaptive else block * steps_per_block + i - 1
    if not revisions:
        return Generation(ids, order, nfe)
    last = nfe if adaptive else n_blocks * steps_per_block
    before = Generation(ids, order.clone(), nfe)
    states = [before.state_after(step, mask_id) for step in range(-1, last)]
    for revision in range(revisions):
        worst = certainty.topk(-(-int(n_masks.max()) // steps), dim=1, largest=False).indices
        reveal = torch.zeros_like(masked).scatter(1, worst, True) & masked
        ids = ids.masked_fill(reveal, mask_id)
        tokens, chosen, _ = predict(reveal)
        ids, certainty = ids.masked_scatter(reveal, tokens), certainty.masked_scatter(reveal, chosen)
        order[reveal] = last + revision
        states.append(ids)
    return Generation(ids, order, nfe + revisions, states)


BLANK = re.compile(r"\[(_+)\]")


def infill(model: MaskPredictor, tokenizer: "CharTokenizer", texts: list[str], **options) -> list[str]:
    """Fill the blanks of texts such as "To [__] or not": a blank has as many characters as underscores.

    Texts of different lengths are padded into one batch; `options` are those of `reverse_process`, `steps` among them.

    Raises:
        ValueError: a text without a blank, or what `reverse_process` raises.
    """
    rows = []
    for text in texts:
        pieces = BLANK.split(text)  # text, underscores, text, underscores, ..., text
        if len(pieces) < 3:
            raise ValueError(f"{text!r} has no blank: mark one with [___], an underscore for each character")
        marks = [torch.full((len(p),), MASK_ID) if i % 2 else tokenizer.encode(p) for i, p in enumerate(pieces)]
        rows.append(torch.cat(marks))
    template = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    forbidden = (PAD_ID, START_ID, END_ID)
    (template,) = _on_device(model, template)
    made = reverse_process(model, template, mask_id=MASK_ID, forbidden=forbidden, **options)
    return [tokenizer.decode(row) for row in made.ids]


@_inference
def generate_ar(
    model: MaskPredictor,
    prompt: Tensor,
    length: int,
    *,
    start_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    forbidden: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue prompt LongTensor[B, P] by `length` tokens, left to right (Eq. 2); ids are [B, P + length].

    Our Transformer decodes with cached keys and values, any other causal callable is asked for the whole prefix each time.

    Raises:
        ValueError: length < 1, sampling arguments out of range, or P + length above the model's `seq_len`.
    """
    _check_sampling(temperature, top_p)
    if prompt.ndim != 2 or length < 1:
        raise ValueError(f"prompt {tuple(prompt.shape)}, length={length}: pass ids of shape [B, P] and length >= 1")
    _check_length(model, prompt.shape[1] + length)
    banned = torch.tensor(sorted(set(forbidden)), dtype=torch.long, device=prompt.device)
    cache = KVCache(model.config, len(prompt), model.embed.weight) if isinstance(model, Transformer) else None
    ids = F.pad(prompt, (1, 0), value=start_id)
    for _ in range(length):
        new = {"cache": cache, "start": cache.length} if cache else {}  # with a cache only what it has not seen: first the prompt
        logits = model(ids[:, new.get("start", 0) :], **new)[:, -1]
        tokens = sample_tokens(logits.index_fill(-1, banned, -math.inf), temperature, top_p, generator)
        ids = torch.cat((ids, tokens[:, None]), dim=1)
    order = torch.arange(-prompt.shape[1], length, device=ids.device).clamp(min=-1).expand(len(ids), -1)
    return Generation(ids[:, 1:], order.contiguous(), length)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Likelihood
# ---------------------------------------------------------------------------------------------------------------------

_TOKENS_PER_PASS = 2**14


def _nll(model: MaskPredictor, inputs: Tensor, targets: Tensor, counted: Tensor, hidden=None, mask_id=0, cfg_scale=0.0) -> Tensor:
    """FloatTensor[R, L], -log p(target) at counted positions, 0 elsewhere; a bounded number of rows per forward pass."""
    result = torch.zeros(inputs.shape, device=inputs.device)
    hidden = counted if hidden is None else hidden
    size = max(1, _TOKENS_PER_PASS // inputs.shape[1])
    for part, ids, truth, wanted, unseen in zip(*(x.split(size) for x in (result, inputs, targets, counted, hidden))):
        logits = _guided(model, ids, wanted, unseen, mask_id, cfg_scale)
        part[wanted] = F.cross_entropy(logits.float(), truth[wanted], reduction="none")
    return result


@_inference
def ar_nll(
    model: MaskPredictor, sequences: Tensor, start_id: int, pad_id: int = PAD_ID, counted: Tensor | None = None
) -> Tensor:
    """Exact -log p of each sequence under the AR model, FloatTensor[B], nats (Eq. 2).

    `counted` BoolTensor[B, L], default all but padding: the tokens whose conditional probabilities enter, given all before them.
    """
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    counted = sequences != pad_id if counted is None else _check_maskable(sequences, counted)
    sequences, inputs, counted = _on_device(model, sequences, inputs, counted)
    return _nll(model, inputs, sequences, counted).sum(dim=1)


def _on_device(model, *tensors: Tensor):
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return tensors if parameter is None else [t.to(parameter.device) for t in tensors]


@_inference
def nelbo(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    n_samples: int,
    maskable: Tensor | None = None,
    cfg_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate of an upper bound on -log p of each sequence, FloatTensor[B], nats (Eqs. 4 and 6).

    Each of a row's K = `n_samples` masks hides exactly l of its n maskable tokens and weighs their cross-entropies by n / l.
    Two things lower the noise and leave the expectation alone. The fractions l / n are stratified over (0, 1], rows shifted
    against each other; each single l stays uniform over 1..n. And what the *other* K - 1 masks say about token i is a control
    variate b_i for this one: (n / l) sum_masked (CE_i - b_i) + sum_maskable b_i, where (n / l) sum_masked b_i has the expectation
    sum_maskable b_i because this mask is independent of b.

    Raises:
        ValueError: n_samples < 1, or shapes that do not fit.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: pass at least 1")
    maskable = _check_maskable(sequences, maskable)
    sequences, maskable = _on_device(model, sequences, maskable)
    B, L = sequences.shape
    n = maskable.sum(dim=1)
    shift = (_uniform((1,), sequences, generator, torch.float64) + torch.arange(B, device=n.device) / B) % 1
    fraction = (torch.arange(n_samples, device=n.device)[:, None] + shift) / n_samples  # [K, B], stratified over [0, 1)
    count = torch.minimum((n * fraction).long() + 1, n)[..., None]  # l, uniform on 1..n
    noise = _uniform((n_samples, B, L), sequences, generator).masked_fill(~maskable, 2.0)
    mask = noise.argsort(dim=-1).argsort(dim=-1) < count  # [K, B, L]
    rows = [x.expand_as(mask).reshape(-1, L) for x in (sequences, ~maskable)]
    nll = _nll(model, rows[0].masked_fill(mask.view(-1, L), mask_id), rows[0], mask.view(-1, L), rows[1], mask_id, cfg_scale)
    nll = nll.view_as(mask).double()
    known = nll.clamp(max=100.0)  # an impossible token costs infinity, but must not enter its own baseline as infinity - infinity
    others, seen = known.sum(dim=0) - known, mask.sum(dim=0) - mask.long()  # what the other masks say of each token
    typical = others.sum(dim=-1, keepdim=True) / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    baseline = torch.where(seen > 0, others / seen.clamp(min=1), typical) * maskable
    estimate = ((nll - baseline) * mask).sum(dim=-1) * n / count[..., 0].clamp(min=1) + baseline.sum(dim=-1)
    return estimate.mean(dim=0).float()


@_inference
def any_order_nll(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    n_orders: int,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p of each sequence when its tokens are revealed one by one in a random order (Eq. 15); FloatTensor[n_orders, B], nats.

    The mean over orders is the NELBO. The sampler that reveals uniformly one token at a time has p(x) = E_order exp(-nll), so
    that -log mean exp(-nll) over K orders is a tighter bound, exact as K grows. One forward pass per token and order.
    """
    if n_orders < 1:
        raise ValueError(f"n_orders={n_orders}: pass at least 1")
    maskable = _check_maskable(sequences, maskable)
    sequences, maskable = _on_device(model, sequences, maskable)
    rows, free = (x.repeat(n_orders, 1) for x in (sequences, maskable))
    rank = _uniform(rows.shape, rows, generator).masked_fill(~free, 2.0).argsort(dim=1).argsort(dim=1)
    total = torch.zeros(len(rows), device=rows.device, dtype=torch.float64)
    for step in range(int(free.sum(dim=1).max())):
        total += _nll(model, rows.masked_fill(free & (rank >= step), mask_id), rows, free & (rank == step)).sum(dim=1)
    return total.view(n_orders, len(sequences)).float()


def log_likelihood(
    model: MaskPredictor,
    prompt: Tensor,
    response: Tensor,
    mask_id: int,
    *,
    n_samples: int,
    cfg_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> float:
    """Lower bound on log p(response | prompt), nats, at most 0; prompt LongTensor[P] stays visible (Eq. 6)."""
    return choose(model, prompt, [response], mask_id, n_samples=n_samples, cfg_scale=cfg_scale, generator=generator)[1][0]


def choose(
    model: MaskPredictor,
    prompt: Tensor,
    options: list[Tensor],
    mask_id: int,
    *,
    n_samples: int,
    cfg_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[int, list[float]]:
    """Index of the likeliest option after prompt LongTensor[P], and each option's log-likelihood bound in nats (Eq. 6).

    Options of one length are hidden by the same masks (common random numbers), which takes shared noise out of the comparison.
    """
    if not options or any(o.ndim != 1 or len(o) == 0 for o in options) or prompt.ndim != 1:
        raise ValueError("pass a prompt of shape [P] and at least one option of shape [R], R >= 1")
    seed = int(_uniform((1,), prompt, generator, torch.float64) * 2**53)
    scores = []
    for option in options:
        row = torch.cat((prompt, option)).unsqueeze(0)
        maskable = (torch.arange(row.shape[1], device=row.device) >= len(prompt)).unsqueeze(0)
        same = torch.Generator().manual_seed(seed)
        bound = nelbo(model, row, mask_id, n_samples=n_samples, maskable=maskable, cfg_scale=cfg_scale, generator=same)
        scores.append(min(0.0, -float(bound)))  # the control variate may overshoot by a little, log p cannot
    return int(np.argmax(scores)), scores


# ---------------------------------------------------------------------------------------------------------------------
# 8. Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def per_character(nats: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean nats per character over windows and the half-width of its 95% interval (normal, ratio estimator).

    Args:
        nats, counts: [N], the nats and the number of characters of each window.
    """
    nats, counts = nats.double(), counts.double()
    mean = nats.sum() / counts.sum()
    residual = nats - mean * counts
    return float(mean), float(1.96 * residual.std() / (len(nats) ** 0.5 * counts.mean()))


WORD = re.compile(r"[A-Za-z']+")
GROUPS = 8  # samples are scored in this many groups, whose spread gives the intervals
T_QUANTILE = 2.365  # Student's t, 97.5%, GROUPS - 1 degrees of freedom


COPY_LIMIT = 64


def copy_index(corpus: str) -> list[str]:
    """The sorted beginnings, COPY_LIMIT characters each, of everything in `corpus`: what `longest_copy` looks up."""
    return sorted(corpus[i : i + COPY_LIMIT] for i in range(len(corpus)))


def longest_copy(text: str, index: list[str]) -> int:
    """Length of the longest run of `text` that stands verbatim in the corpus of `index`, at most COPY_LIMIT."""
    best = 0
    for i in range(len(text)):
        piece = text[i : i + COPY_LIMIT]
        place = bisect.bisect_left(index, piece)
        for near in index[max(0, place - 1) : place + 1]:  # the longest match is a neighbour in sorted order
            while best < len(piece) and near.startswith(piece[: best + 1]):
                best += 1
    return best


def text_metrics(texts: list[str], index: list[str], words: set[str]) -> dict[str, float]:
    """Coherence and diversity of one group of texts; the training text gives `index` (`copy_index`) and lower-case `words`."""
    inner = [w.lower() for text in texts for w in WORD.findall(text)[1:-1]]  # the outer words may be cut by the window
    trigrams = [text[i : i + 3] for text in texts for i in range(len(text) - 2)]
    counts = np.array(list(Counter("".join(texts)).values()))
    shares = counts / counts.sum()
    return {
        "known words": sum(w in words for w in inner) / max(1, len(inner)),
        "distinct-3": len(set(trigrams)) / max(1, len(trigrams)),
        "char entropy": float(-(shares * np.log(shares)).sum()),
        "longest copy": float(np.mean([longest_copy(text, index) for text in texts])),
    }


def grouped(values: list[dict[str, float]]) -> dict[str, float]:
    """Mean over groups and, in columns named "... ±", the half-width of its 95% interval (Student's t)."""
    table = pd.DataFrame(values)
    half = T_QUANTILE * table.std() / len(table) ** 0.5
    return {key: number for name in table for key, number in ((name, table[name].mean()), (f"{name} ±", half[name]))}


# ---------------------------------------------------------------------------------------------------------------------
# 9. Tables, figures, widgets
# ---------------------------------------------------------------------------------------------------------------------

LLADA_COLOR, AR_COLOR, MASK_COLOR, REAL_COLOR = "#0072B2", "#D55E00", "#9A9A9A", "#009E73"  # Okabe & Ito, colour-blind safe
MASK_FACE, NEW_FACE = "#D2D2D2", "#F0E442"  # behind a masked and behind a just committed character
FIGURES = Path("figures")


def save_table(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Write figures/tables/NAME.csv (four decimals) and hand the same rounded table back for display."""
    table = table.round(4)
    write_atomically(FIGURES / "tables" / f"{name}.csv", table.to_csv(index=False, lineterminator="\n").encode())
    return table


def save_figure(figure, name: str) -> None:
    """Write figures/NAME.png."""
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=130, bbox_inches="tight")


def markdown_table(path: Path) -> str:
    """A CSV file as a Markdown table."""
    rows = [[str(cell) for cell in row] for row in pd.read_csv(path, dtype=str, keep_default_na=False).itertuples(index=False)]
    header = pd.read_csv(path, nrows=0).columns
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill_report(text: str, tables: Path = FIGURES / "tables") -> str:
    """Put the tables' numbers between the markers of a Markdown text.

    `<!-- table NAME -->...<!-- end -->` becomes the table, `<!-- NAME ; ROW ; COLUMN -->...<!-- end -->` one cell, where ROW
    is the value of the first column. ValueError if a marker names what is not there.
    """

    def number(match: re.Match) -> str:
        name, row, column = match.group(2, 3, 4)
        table = pd.read_csv(tables / f"{name}.csv", dtype=str, keep_default_na=False)
        found = table.loc[table.iloc[:, 0] == row]
        if len(found) != 1 or column not in table:
            raise ValueError(f"{match.group(1)}: {name}.csv has {len(found)} rows {row!r}; its columns are {list(table)}")
        return f"{match.group(1)}{found.iloc[0][column]}<!-- end -->"

    text = re.sub(
        r"(<!-- table (\S+) -->).*?<!-- end -->",
        lambda match: f"{match.group(1)}\n{markdown_table(tables / (match.group(2) + '.csv'))}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )
    return re.sub(r"(<!-- ([\w-]+) ; (.*?) ; (.*?) -->).*?<!-- end -->", number, text, flags=re.DOTALL)


def _states(generation: Generation, row: int, step: int) -> Tensor:
    """LongTensor[L] after `step`: 0 masked, 1 just committed (or changed by a revision), 2 settled or given."""
    order = generation.order[row]
    masked, changed = order > step, (order == step) & (order >= 0)
    if generation.states is not None and step >= 0:  # `order` knows the last commit only
        before, now = (generation.state_after(s)[row] for s in (step - 1, step))
        masked, changed = now == MASK_ID, now != before
    return torch.where(masked, 0, torch.where(changed, 1, 2))


def filmstrip(generation: Generation, tokenizer: CharTokenizer, row: int = 0, frames: int = 8, width: int = 64):
    """A figure of one generation: a strip per step, newly committed characters marked, masks as grey blocks."""
    from matplotlib.figure import Figure

    last = int(generation.order[row].max())
    steps = sorted({round(s) for s in np.linspace(-1, last, frames)})
    length = generation.ids.shape[1]
    lines = math.ceil(length / width)
    figure = Figure(figsize=(10, 0.24 * (lines + 0.7) * len(steps)), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-6, width), ylim=(len(steps) * (lines + 0.7), -0.3))
    axes.axis("off")
    for strip, step in enumerate(steps):
        ids, states = generation.state_after(step)[row].tolist(), _states(generation, row, step).tolist()
        top = strip * (lines + 0.7)
        axes.text(-6, top + 0.5, f"step {step + 1}", fontsize=9, va="center", color="#555555")
        for position, (token, state) in enumerate(zip(ids, states)):
            x, y = position % width, top + position // width
            if state < 2:
                axes.add_patch(_rectangle(x, y, (MASK_FACE, NEW_FACE)[state]))
            glyph = "" if state == 0 else tokenizer.decode([token]).replace("\n", "↵").replace("$", r"\$")
            axes.text(x + 0.5, y + 0.5, glyph, family="monospace", fontsize=9, ha="center", va="center",
                      color="black", weight="bold" if state == 1 else "normal")  # fmt: skip
            if state == 1:
                axes.plot((x + 0.1, x + 0.9), (y + 0.9, y + 0.9), color="black", lw=0.8)
    return figure


def _rectangle(x: float, y: float, face: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=face, edgecolor="none")


class Page(NamedTuple):
    """One generation at one moment: numbers, and lines of (glyph, state) with the states of `_states`."""

    step: int  # steps so far; more than forward passes where a step revealed nothing and cost nothing
    passes: tuple[int, int]  # forward passes used so far, and in all
    written: tuple[int, int]  # characters revealed so far, and in all
    lines: list[list[tuple[str, int]]]


def pages(generation: Generation, tokenizer: CharTokenizer, width: int = 64) -> list[Page]:
    """The first row before the first forward pass and after each: nfe + 1 pages, of at most `width` characters per line.

    Lines break where those of the finished text do, so that nothing moves while it is being written.
    """
    if generation.states is None:
        steps = generation.order[generation.order >= 0].unique().tolist()
    else:  # before the revisions, steps that revealed nothing cost nothing; each revision cost a pass
        n, pairs = len(generation.states) - 1, zip(generation.states, generation.states[1:])
        steps = [s for s, (a, b) in enumerate(pairs) if bool((a == MASK_ID).any()) and not torch.equal(a, b)]
        steps += range(n - (generation.nfe - len(steps)), n)
    finished = "".join(tokenizer.decode([token]) or "·" for token in generation.ids[0].tolist())
    line = rf"[^\n]{{0,{width}}}\n|[^\n]{{1,{width}}}(?:\Z|(?<= ))|[^\n]{{1,{width}}}"
    spans = [match.span() for match in re.finditer(line, finished)]
    masked = int((generation.order[0] >= 0).sum())
    made = []
    for k, step in enumerate([-1, *steps]):
        states, cells = _states(generation, 0, step).tolist(), []
        for i, token in enumerate(generation.state_after(step)[0].tolist()):
            glyph = tokenizer.decode([token]) or "·"
            if glyph == "\n":  # visible when new, or where the finished text has no line break
                glyph = "" if states[i] == 2 and finished[i] == "\n" else "↵"
            cells.append((glyph, states[i]))
        made.append(Page(step + 1, (k, len(steps)), (masked - states.count(0), masked), [cells[a:b] for a, b in spans]))
    return made


Film = Generation | dict[str, Generation]  # one generation, or several side by side under their names


def _frames(film: Film, tokenizer: CharTokenizer, width: int) -> list[dict[str, Page]]:
    """One frame per forward pass; who has finished waits for the others."""
    columns = {name: pages(g, tokenizer, width) for name, g in (film if isinstance(film, dict) else {"": film}).items()}
    length = max(len(column) for column in columns.values())
    return [{name: column[min(k, len(column) - 1)] for name, column in columns.items()} for k in range(length)]


def _status(page: Page, alone: bool) -> str:
    """The line of numbers; t, the share still masked, only where there is room for it."""
    (k, passes), (written, wanted) = page.passes, page.written
    if not alone:
        return f"pass {k} of {passes} · {written} of {wanted} characters"
    t = 1 - written / max(wanted, 1)
    return f"step {page.step} · t = {t:.2f} · {written} of {wanted} characters revealed · {k} of {passes} forward passes"


# <u> and a block say the state without any style too. An exported page lacks the icon font of Play: it gets plain signs.
FRAME_STYLE = f"""<style>
.llada-viewer {{ font-family: system-ui, sans-serif; }}
.llada {{ display: flex; flex-wrap: wrap; gap: 0 3em; font: 13px/1.5 system-ui, sans-serif; color: inherit; }}
.llada pre {{ margin: 4px 0; font: 14px/1.5 monospace; white-space: pre; color: inherit; background: none; }}
.llada i {{ color: {MASK_COLOR}; font-style: normal; }}
.llada u {{ color: #000; background: {NEW_FACE}; font-weight: bold; }}
.llada-viewer .fa-play::before {{ content: "▶"; }} .llada-viewer .fa-pause::before {{ content: "❚❚"; }}
.llada-viewer .fa-stop::before {{ content: "■"; }} .llada-viewer .fa-retweet::before {{ content: "↻"; }}
.llada-pages > .p-TabPanel-tabBar {{ display: none !important; }}
.llada-pages > .widget-tab-contents {{ border: 0 !important; padding: 0 !important; }}
</style>"""


def frame_html(columns: dict[str, Page]) -> str:
    """Pages side by side as escaped HTML: masked characters are in <i>, those just committed in <u>."""

    def marked(line: list[tuple[str, int]]) -> str:
        runs = ((state, "".join(glyph for glyph, _ in run)) for state, run in itertools.groupby(line, key=lambda cell: cell[1]))
        return "".join(("<i>{}</i>", "<u>{}</u>", "{}")[state].format(html.escape(text)) for state, text in runs)

    parts = []
    for name, page in columns.items():
        title = f"<b>{html.escape(name)}</b><br>" if name else ""
        text = "\n".join(marked(line) for line in page.lines)
        parts.append(f"<div>{title}{_status(page, len(columns) == 1)}<pre>{text}</pre></div>")
    return f'<div class="llada">{"".join(parts)}</div>'


class DenoisingViewer(widgets.VBox):
    """Generations to step through: a slider, play and pause with a speed, and a choice if there are several.

    Everything but "generate again" is linked in the browser and moves without a kernel: in nbconvert's HTML, in nbviewer, in
    JupyterLab. Only the first row of a generation is shown.

    Args:
        films: what to choose from, by name: a Generation, or a dict of several to race side by side, a frame per forward pass.
        generate: called as generate(prompt, seed) -> films by "generate again", which needs a running kernel. Whatever it
            raises is shown as text.
    """

    def __init__(self, films: dict[str, Film], tokenizer: CharTokenizer, generate: Callable[[str, int], dict] | None = None):
        self.tokenizer, self.generate, self.seed, self.links = tokenizer, generate, 0, []
        self.choice = widgets.Dropdown(layout={"width": "auto"})
        self.speed = widgets.IntSlider(150, min=50, max=1000, step=50, description="ms per pass")
        self.panels = self._stack([])
        widgets.jslink((self.choice, "index"), (self.panels, "selected_index"))
        self.prompt = widgets.Text(placeholder="a prompt of your own")
        self.again = widgets.Button(description="generate again", layout={"flex": "none"})
        self.again.on_click(self._generate_again)
        self.message = widgets.HTML("needs a running kernel")
        live = [widgets.HBox([self.prompt, self.again, self.message])] if generate else []
        self.show(films)
        super().__init__([widgets.HTML(FRAME_STYLE), widgets.HBox([self.choice, self.speed]), self.panels, *live])
        self.add_class("llada-viewer")

    @staticmethod
    def _stack(children: list) -> widgets.Widget:
        """Shows one child at a time. ipywidgets 7, which Colab's page speaks, has no Stack: there, tabs with a hidden bar."""
        stack = getattr(widgets, "Stack", widgets.Tab)(children, selected_index=0 if children else None)
        stack.add_class("llada-pages")
        return stack

    def _panel(self, film: Film) -> widgets.Widget:
        frames = [frame_html(columns) for columns in _frames(film, self.tokenizer, 40 if isinstance(film, dict) else 64)]
        first = widgets.HTML(frames[0])  # the others share its layout and style, which would be most of the saved notebook
        stack = self._stack([first, *(widgets.HTML(frame, layout=first.layout, style=first.style) for frame in frames[1:])])
        slider = widgets.IntSlider(0, max=len(frames) - 1, description="pass", layout={"width": "480px"})
        play = widgets.Play(max=len(frames) - 1, interval=self.speed.value)
        self.links += [
            widgets.jslink((play, "value"), (slider, "value")),
            widgets.jslink((slider, "value"), (stack, "selected_index")),
            widgets.jslink((self.speed, "value"), (play, "interval")),
        ]
        return widgets.VBox([widgets.HBox([play, slider]), stack])

    def show(self, films: dict[str, Film]) -> None:
        """Replace what is shown."""
        old = [*self.links, *self.panels.children]
        self.links = []
        panels = [self._panel(film) for film in films.values()]
        if self.panels.children:
            self.panels.selected_index = 0  # there may be fewer now
        self.panels.children, self.panels.selected_index = panels, 0
        self.choice.options, self.choice.index = list(films), 0
        for widget in old:  # what is not closed would stay in the browser and in the saved notebook
            old += getattr(widget, "children", ())
            widget.close()

    def _generate_again(self, _button) -> None:
        self.seed += 1
        self.again.disabled, self.message.value = True, "writing ..."
        try:
            self.show(self.generate(self.prompt.value, self.seed))
            self.message.value = ""
        except Exception as error:  # shown where the reader looks: a log would hide it
            self.message.value = html.escape(f"{type(error).__name__}: {error}")
        finally:
            self.again.disabled = False


def _draw(columns: dict[str, Page], width: int):
    """Pages side by side as a Pillow image: a card of paper that stands out a little on light and on dark pages."""
    from matplotlib.font_manager import FontProperties, findfont
    from PIL import Image, ImageDraw, ImageFont

    def font(size: int, weight: str):
        return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans Mono", weight=weight)), size)

    plain, bold, small = font(30, "normal"), font(30, "bold"), font(24, "normal")
    cell, row, edge, top = round(plain.getlength("m")), 42, 36, 112
    height = top + edge + row * max(len(page.lines) for page in columns.values())
    image = Image.new("RGB", (len(columns) * (width * cell + 2 * edge), height), "#FFFDF8")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, image.width - 1, height - 1), outline="#B8B8B8", width=2)
    for index, (name, page) in enumerate(columns.items()):
        left, color = edge + index * (width * cell + 2 * edge), AR_COLOR if name == "AR" else LLADA_COLOR
        right, done = left + width * cell, page.written[0] / max(page.written[1], 1)
        draw.text((left, 22), name or "LLaDA", fill=color, font=bold)
        draw.text((right, 27), _status(page, False), fill="#444444", font=small, anchor="ra")
        draw.rectangle((left, 70, right, 78), fill="#E4E4E4")
        draw.rectangle((left, 70, left + done * width * cell, 78), fill=color)
        for y, line in enumerate(page.lines):
            for x, (glyph, state) in enumerate(line):
                x0, y0 = left + x * cell, top + y * row
                if state < 2:
                    draw.rectangle((x0, y0, x0 + cell - 2, y0 + row - 6), fill=(MASK_FACE, NEW_FACE)[state])
                if state == 1:
                    draw.line((x0, y0 + row - 7, x0 + cell - 2, y0 + row - 7), fill="black", width=3)
                if state > 0:
                    draw.text((x0, y0), glyph, fill="black", font=bold if state == 1 else plain)
    return image


def save_gif(name: str, film: Film, tokenizer: CharTokenizer, *, width: int = 40, milliseconds: int = 120) -> list:
    """Write figures/NAME.gif, a frame per forward pass and a pause at the end; returns the frames as Pillow images."""
    images = [_draw(columns, width) for columns in _frames(film, tokenizer, width)]
    palette = images[len(images) // 2].quantize(48)  # one for all, so that only what changes is stored
    images = [image.quantize(palette=palette, dither=0) for image in images]
    pauses, file = [800, *[milliseconds] * (len(images) - 2), 4000], io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0)
    write_atomically(FIGURES / f"{name}.gif", file.getvalue())
    return images


# ---------------------------------------------------------------------------------------------------------------------
# 10. Presets
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossover:
    """Sizes of the data-constrained experiment: each length of training text x each number of steps."""

    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    characters: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """Sizes and iterations of everything in the notebook."""

    name: str
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    llada: TrainConfig
    ar: TrainConfig
    ablation: tuple[TrainConfig, TrainConfig]  # the notebook's short form, and `python llada_helpers.py ablations`
    crossover: tuple[Crossover, Crossover]  # likewise
    recipe: tuple[int, int]  # likewise: steps of the MDLM tutorial's recipe
    nelbo_samples: int  # masks per validation window in the final evaluation
    texts: int  # generated texts per decoder, a multiple of GROUPS
    blanks: int  # windows with a blank to fill
    candidates: int  # AR's guesses per blank, for rescoring
    step_counts: tuple[int, ...] = field(default=())
    compiled: bool = False

    def model(self, vocab_size: int, causal: bool, **changes) -> ModelConfig:
        sizes = {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "dropout": self.dropout, **changes}
        return ModelConfig(vocab_size, self.seq_len, causal=causal, **sizes)

    def jobs(self, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, Job]:
        """The two trainings of Part 6."""
        return {
            "LLaDA": Job(self.model(vocab_size, causal=False), self.llada, train_ids, val_ids),
            "AR": Job(self.model(vocab_size, causal=True), self.ar, train_ids, val_ids),
        }


SMALL_CROSSOVER = Crossover(64, 2, 2, 32, 16, (1_000, 4_000), (10, 40))
PRESETS = {
    "smoke": Preset(
        "smoke", 64, 2, 2, 32, 0.0,
        TrainConfig(200, 16, evals=5, eval_windows=32), TrainConfig(200, 16, evals=5, eval_windows=32),
        ablation=(TrainConfig(10, 16, evals=1, eval_windows=32), TrainConfig(20, 16, evals=1, eval_windows=32)),
        crossover=(SMALL_CROSSOVER, SMALL_CROSSOVER), recipe=(1, 2),
        nelbo_samples=1, texts=16, blanks=16, candidates=2,
        step_counts=(4, 16, 64),
    ),
    "cpu": Preset(
        "cpu", 128, 5, 4, 128, 0.0, TrainConfig(2300, 32, evals=25), TrainConfig(800, 32, evals=20),
        ablation=(TrainConfig(60, 16, evals=1), TrainConfig(300, 16, evals=10)),
        crossover=(
            SMALL_CROSSOVER,
            Crossover(64, 4, 4, 96, 32, (20_000, 80_000, 320_000), (400, 1_600, 6_400)),
        ),
        recipe=(5, 300),
        nelbo_samples=8, texts=64, blanks=500, candidates=4,
        step_counts=(4, 8, 16, 32, 64, 128), compiled=True,
    ),
    "gpu": Preset(
        "gpu", 256, 6, 6, 384, 0.1,
        TrainConfig(6000, 64, evals=30, adamw_lr=2e-3), TrainConfig(2500, 64, evals=25, adamw_lr=2e-3),
        ablation=(TrainConfig(100, 64, evals=1), TrainConfig(1000, 64, evals=10)),
        crossover=(
            SMALL_CROSSOVER,
            Crossover(256, 6, 6, 384, 64, (80_000, 892_315), (2_700, 10_900, 54_000)),
        ),
        recipe=(100, 5000),
        nelbo_samples=16, texts=128, blanks=1000, candidates=8,
        step_counts=(4, 8, 16, 32, 64, 128, 256), compiled=False,
    ),
}  # fmt: skip
# Two cores and an evening: larger, longer, from the command line; the notebook then loads the runs.
PRESETS["cpu_long"] = replace(
    PRESETS["cpu"], name="cpu_long", seq_len=256, n_layer=6, n_head=6, n_embd=192,
    llada=TrainConfig(7000, 16, evals=35), ar=TrainConfig(2500, 16, evals=25),
    step_counts=(4, 8, 16, 32, 64, 128, 256),
)  # fmt: skip


def choose_preset() -> Preset:
    """$LLADA_PRESET if it is set, else "gpu" where there is one, else "cpu"."""
    name = os.environ.get("LLADA_PRESET") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in PRESETS:
        raise ValueError(f"LLADA_PRESET={name!r}: pass one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------------------
# 11. Experiments: many trainings, one table
# ---------------------------------------------------------------------------------------------------------------------


def masked_mean(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """The MDLM tutorial's loss: the mean cross-entropy over all masked tokens of the batch, whatever t. Not a bound."""
    inputs, targets, weight = independent_times(sequences, generator, learned)
    mask = (weight > 0).float()
    return inputs, targets, mask * (len(mask) / mask.sum().clamp(min=1))


def masked_mean_over_t(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """The exercise's sketch: each row's mean over its masked tokens, divided by t. Its expectation is infinite."""
    t = stratified_times(len(sequences), generator)
    inputs, targets, weight = diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask / (t[:, None] * mask.sum(dim=1, keepdim=True).clamp(min=1))


def independent_times(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with one independent t per row."""
    return diffusion_batch(sequences, generator, learned, t=1 - torch.rand(len(sequences), generator=generator))


def one_time_per_batch(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with one t for the whole batch (tutorial A)."""
    return diffusion_batch(sequences, generator, learned, t=float(1 - torch.rand(1, generator=generator)))


def importance_times(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with t from the density 1/2 + t, more often where more is masked, and the weight divided by that density."""
    t = (0.25 + 2 * stratified_times(len(sequences), generator)).sqrt() - 0.5
    inputs, targets, weight = diffusion_batch(sequences, generator, learned, t=t)
    return inputs, targets, weight / (0.5 + t[:, None])


def complementary_masks(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with half as many windows, each under a mask and under its complement, at t and 1 - t."""
    half = sequences[: -(-len(sequences) // 2)]
    t = stratified_times(len(half), generator).clamp(1e-3, 1 - 1e-3)
    learned = learned[: len(half)]
    masked, mask = forward_process(half, t, MASK_ID, learned, generator)
    inputs = torch.cat((masked, half.masked_fill(learned & ~mask, MASK_ID)))
    weight = torch.cat((mask / t[:, None], (learned & ~mask) / (1 - t[:, None])))
    count = learned.sum(dim=1, keepdim=True).clamp(min=1).repeat(2, 1)
    keep = len(sequences)
    return inputs[:keep], half.repeat(2, 1)[:keep], (weight / count)[:keep]


Jobs = dict[str, list[Job]]  # the rows of a table, each with one training per seed


def ablation_jobs(preset: Preset, config: TrainConfig, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> Jobs:
    """LLaDA as it is, and with one thing changed; two seeds each."""

    def reshaped(n_layer: int) -> dict:
        """Another depth at about the same number of parameters."""
        unit = 2 * preset.n_head
        return {"n_layer": n_layer, "n_embd": unit * round(preset.n_embd * (preset.n_layer / n_layer) ** 0.5 / unit)}

    deep, wide = reshaped(2 * preset.n_layer), reshaped(max(1, preset.n_layer // 2))
    variants = {
        "ours: Eq. 3, stratified t": {},
        "one independent t per window": {"make_batch": independent_times},
        "one t per batch (tutorial A)": {"make_batch": one_time_per_batch},
        "t importance-sampled": {"make_batch": importance_times},
        "complementary masks": {"make_batch": complementary_masks},
        "mean over masked (MDLM tutorial)": {"make_batch": masked_mean},
        "mean over masked, / t (exercise)": {"make_batch": masked_mean_over_t},
        "time conditioning": {"model": {"time_conditioning": True}},
        "causal attention": {"model": {"causal": True}, "make_batch": diffusion_batch},
        "learned positions": {"model": {"rotary_base": None}},
        "rotary base 10,000": {"model": {"rotary_base": 10_000.0}},
        "attention scale as usual": {"model": {"attention_scale": (preset.n_embd / preset.n_head) ** 0.5}},
        "twice as deep, narrower": {"model": deep},
        "half as deep, wider": {"model": wide},
        "dropout 0.1": {"model": {"dropout": 0.1}},
        "AdamW only": {"train": {"muon_lr": 0.0}},
        "half the batch, twice the steps": {"train": {"batch_size": config.batch_size // 2, "steps": 2 * config.steps}},
    }
    jobs = {}
    for row, change in variants.items():
        shape = replace(preset.model(vocab_size, causal=False), **change.get("model", {}))
        configs = [replace(config, seed=seed, **change.get("train", {})) for seed in (0, 1)]
        jobs[row] = [Job(shape, c, train_ids, val_ids, change.get("make_batch")) for c in configs]
    return jobs


def crossover_jobs(sizes: Crossover, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> Jobs:
    """LLaDA, AR and regularised AR on the first so many characters, for so many steps, each with its own decay."""
    jobs, kinds = {}, {"LLaDA": (False, 0.0, 0.0), "AR": (True, 0.0, 0.0), "AR, regularised": (True, 0.2, 0.1)}
    for count in sizes.characters:
        for steps in sizes.steps:
            for kind, (causal, dropout, decay) in kinds.items():
                config = TrainConfig(steps, sizes.batch_size, weight_decay=decay, evals=min(10, steps // 10), eval_windows=256)
                shape = ModelConfig(vocab_size, sizes.seq_len, sizes.n_layer, sizes.n_head, sizes.n_embd, dropout, causal)
                jobs[f"{kind}, {count:,} characters, {steps:,} steps"] = [Job(shape, config, train_ids[:count], val_ids)]
    return jobs


def recipe_jobs(preset: Preset, steps: int, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> Jobs:
    """The MDLM tutorial's recipe (its 1,000 steps of warm-up, longer than this training, shortened to ours), and our LLaDA."""
    shape = ModelConfig(vocab_size, min(128, preset.seq_len), n_layer=6, n_head=8, n_embd=256)
    config = TrainConfig(steps, 64, muon_lr=0.0, adamw_lr=3e-4, weight_decay=0.01, evals=min(10, steps))
    tutorial = Job(shape, config, train_ids, val_ids, masked_mean, architecture=PostNormEncoder)
    return {"MDLM tutorial's recipe": [tutorial], "ours": [preset.jobs(vocab_size, train_ids, val_ids)["LLaDA"]]}


def run_jobs(name: str, jobs: Jobs, *, compiled: bool = False, only: str = "") -> pd.DataFrame:
    """Train every job (or load it) and write figures/tables/NAME.csv, a row for each entry of `jobs`, with its provenance.

    Each row's seeds are averaged window by window; the interval is over windows. The difference to the first row is paired: the
    same windows and masks. `only`: rows that match this regular expression; nothing is written then.
    """
    rows, first = [], None
    for index, (row, trials) in enumerate(jobs.items()):
        if not re.search(only, row):
            continue
        job = trials[0]
        fast = compiled and job.architecture is Transformer
        runs = [train(f"{name}-{index}-{trial.train.seed}", trial, compiled=fast) for trial in trials]
        sequences = job.validation_sequences()
        learned = job.learned(sequences)
        nats = torch.stack([validation_nats(run.model, sequences, learned, job.autoregressive).cpu() for run in runs]).mean(dim=0)
        counts, each = learned.sum(dim=1), [run.summary["best"] for run in runs]
        mean, half = per_character(nats, counts)
        line = {"row": row, "nats/char": mean, "95% ±": half, "lowest seed": min(each), "highest seed": max(each)}
        first = nats if first is None else first
        if len(first) == len(counts):
            line["difference"], line["difference ±"] = per_character(nats - first, counts)
        summary = runs[0].summary
        line |= {"parameters": summary["parameters"], "steps": summary["steps"], "tokens": summary["tokens"]}
        line |= {"characters": job.train_ids.numel(), "epochs": summary["tokens"] / job.train_ids.numel()}
        line |= {"seconds": np.mean([run.summary["seconds"] for run in runs]), "fingerprint": suite_mark(trials)}
        record = json.loads((runs[0].path / "run.json").read_text())
        rows.append(line | {"device": record["device"], "commit": record["commit"]})
    table = pd.DataFrame(rows)
    return table.round(4) if only else save_table(table, name)


def suite_mark(trials: list[Job]) -> str:
    return "+".join(job.fingerprint() for job in trials)


def experiment(name: str, full: Jobs, short: Jobs, **options) -> pd.DataFrame:
    """figures/tables/NAME.csv if it holds the results of `full` as the code is now, else those of `short`, trained here."""
    path = FIGURES / "tables" / f"{name}.csv"
    if path.exists():
        table = pd.read_csv(path)
        known = dict(zip(table["row"], table["fingerprint"])) if {"row", "fingerprint"} <= set(table) else {}
        if known == {row: suite_mark(trials) for row, trials in full.items()}:
            return table
    return run_jobs(name, short, **options)


def main(arguments: list[str] | None = None) -> None:
    """The command line: `python llada_helpers.py train --preset cpu --model llada`; see --help."""
    parser = argparse.ArgumentParser(
        description="Train outside the notebook, which then loads the finished runs and tables. Every command goes on where it "
        "was interrupted. LLADA_DATA: a text file of your own; LLADA_RETRAIN=1: train from the start.",
        epilog="Several processes or GPUs: accelerate launch llada_helpers.py train ..., or torchrun --nproc-per-node 2 "
        "llada_helpers.py train ...; they share each batch.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("train", "train one model of a preset; runs/ and checkpoints/ get the result"),
        ("ablations", "LLaDA with one thing changed at a time; figures/tables/ablations.csv"),
        ("crossover", "LLaDA against AR on little text, for many epochs; figures/tables/crossover.csv"),
        ("recipe", "the MDLM tutorial's recipe beside ours; figures/tables/recipe.csv"),
    ):
        aliases = ["ablate"] if command == "ablations" else []
        options = commands.add_parser(command, help=text, description=text, aliases=aliases)
        options.add_argument("--preset", choices=PRESETS, help="default: $LLADA_PRESET, else gpu if there is one, else cpu")
        if command == "train":
            options.add_argument("--model", choices=("llada", "ar"), required=True, help="the mask predictor or the baseline")
        else:
            options.add_argument("--only", default="", metavar="REGEX", help="train matching rows only, and write no table")
    arguments = parser.parse_args(arguments)
    preset = PRESETS[arguments.preset] if arguments.preset else choose_preset()
    text = load_text()
    tokenizer = CharTokenizer.from_text(text)
    data = (tokenizer.vocab_size, *split(tokenizer.encode(text)))
    if arguments.command == "train":
        name = {"llada": "LLaDA", "ar": "AR"}[arguments.model]
        run = train(f"{preset.name}-{arguments.model}", preset.jobs(*data)[name], compiled=preset.compiled)
        print(json.dumps(run.summary))
        return
    if arguments.command == "crossover":
        name, jobs = "crossover", crossover_jobs(preset.crossover[1], *data)
    elif arguments.command == "recipe":
        name, jobs = "recipe", recipe_jobs(preset, preset.recipe[1], *data)
    else:
        name, jobs = "ablations", ablation_jobs(preset, preset.ablation[1], *data)
    print(run_jobs(name, jobs, compiled=preset.compiled, only=arguments.only).iloc[:, :7].to_string(index=False))


if __name__ == "__main__":
    main()
