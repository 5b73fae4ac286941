"""LLaDA, a masked diffusion language model, next to an autoregressive (AR) baseline, on characters.

    text -> CharTokenizer -> ids -> windows -> forward_process -> mask predictor -> llada_loss -> train
         -> reverse_process -> ids -> text;        the same windows -> nelbo / ar_nll -> tables

Three ideas keep the sections small. A *mask predictor* is any callable from ids [B, L] to logits [B, L, V]: losses, samplers
and estimators take somebody else's model or an exact oracle as well. LLaDA and AR are one Transformer that differs in `causal`
alone. Training step s is a pure function of (seed, s). Losses and likelihoods are in nats (bits = nats / ln 2); equation numbers
are those of Nie et al. 2025, "Large Language Diffusion Models" (arXiv:2502.09992).
"""

import ast
import bisect
import contextlib
import functools
import hashlib
import html
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import requests
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from filelock import FileLock, Timeout
from huggingface_hub import PyTorchModelHubMixin
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MaskPredictor = Callable[[Tensor], Tensor]

# 1. Data -------------------------------------------------------------------------------------------------------------
PAD_ID, MASK_ID, START_ID, END_ID = range(4)
SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[START]", "[END]")
MASK_GLYPH = "█"
CORPUS_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def cache_path() -> Path:
    """Where the downloaded corpus is kept (and where it can be put by hand)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llada" / "tinyshakespeare.txt"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a neighbour of `path` that is then renamed: a reader, or a kill, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the text file {path}: {error}; pass the path of a readable text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); pass a UTF-8 file, such as iconv -t UTF-8 makes") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip() or "\0" in text:
        raise ValueError(f"{path} is empty, only white space, or has NUL characters (UTF-16?); pass a UTF-8 file with some text")
    return text


def _offline_corpus() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def load_text(path: str | os.PathLike | None = None) -> str:
    r"""The corpus with "\n" line ends: `path`, else `$LLADA_DATA`, the cached download, the download (its SHA-256 checked), else,
    loudly, Python's own help texts. ValueError: a file that cannot be read, is empty or not UTF-8 text."""
    if path := path or os.environ.get("LLADA_DATA"):
        return _read_text(Path(path))
    cached = cache_path()
    try:
        if not cached.exists() or hashlib.sha256(cached.read_bytes()).hexdigest() != CORPUS_SHA256:
            response = requests.get(CORPUS_URL, timeout=(5, 30))
            response.raise_for_status()
            if hashlib.sha256(response.content).hexdigest() != CORPUS_SHA256:
                raise OSError(f"the SHA-256 of the download is not {CORPUS_SHA256}")
            write_atomically(cached, response.content)
        return _read_text(cached)
    except OSError as error:  # requests' exceptions are OSErrors
        warnings.warn(
            f"TINYSHAKESPEARE COULD NOT BE DOWNLOADED ({str(error)[:150]}). Using Python's own help texts instead: the numbers "
            f"will not be comparable. To use it, save {CORPUS_URL} as {cached}, or set LLADA_DATA to any UTF-8 text.",
            stacklevel=2,
        )
        return _offline_corpus()


def corpus_name(text: str) -> str:
    """The name that tables and figure titles give to `text`."""
    if hashlib.sha256(text.encode()).hexdigest() == CORPUS_SHA256:
        return "TinyShakespeare"
    own = "offline corpus (Python help topics)" if text == _offline_corpus() else None
    return own or Path(os.environ.get("LLADA_DATA") or "own text").stem


class CharTokenizer:
    """Characters to ids: [PAD] 0, [MASK] 1, [START] 2, [END] 3, the sorted characters, then your own `special` tokens.

    Words may stand for characters: a list of words is a text as well. Special tokens are named in lists only: no text spells one.

    >>> tokenizer = CharTokenizer.from_text("banana")
    >>> tokenizer.encode("nab").tolist(), tokenizer.decode([2, 6, 4, 1, 3, 5])
    ([6, 4, 5], 'na█')
    """
    pad_id, mask_id, start_id, end_id = PAD_ID, MASK_ID, START_ID, END_ID

    def __init__(self, characters: str | list[str], special: tuple[str, ...] = ()):
        known = [*SPECIAL_TOKENS, *characters, *special]
        if len(set(known)) != len(known) or not characters or "" in known or any(len(name) < 2 for name in special):
            raise ValueError(f"characters={characters!r}, special={special}: pass distinct ones, special ones of two letters up")
        self.characters, self.special, self.vocab_size = characters, tuple(special), len(known)
        self._id_of = {c: i for i, c in enumerate(known)}
        self._shown = ["", MASK_GLYPH, "", "", *characters, *("" for _ in special)]

    @classmethod
    def from_text(cls, text: str | list[str], special: tuple[str, ...] = ()) -> "CharTokenizer":
        if not text:
            raise ValueError("the text is empty; pass at least one character")
        found = sorted(set(text).difference(SPECIAL_TOKENS, special))
        return cls("".join(found) if isinstance(text, str) else found, special)

    def encode(self, text: str | list[str]) -> Tensor:
        """LongTensor[len(text)]. ValueError names the characters that the vocabulary lacks."""
        if unknown := sorted(set(text) - self._id_of.keys()):
            raise ValueError(f"characters not in the vocabulary: {unknown}; use characters of the training text only")
        return torch.tensor([self._id_of[c] for c in text], dtype=torch.long)

    def decode(self, ids) -> str:
        """Text up to the first [END], with spaces between words; [MASK] is shown as a block, other special tokens are skipped."""
        shown = [self._shown[i] for i in itertools.takewhile(lambda i: i != END_ID, torch.as_tensor(ids).tolist())]
        return ("" if isinstance(self.characters, str) else " ").join(filter(None, shown))

    def to_json(self) -> str:
        return json.dumps({"special_tokens": [*SPECIAL_TOKENS, *self.special], "characters": self.characters})

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        try:
            made = json.loads(text)
            names, characters = made["special_tokens"], made["characters"]
            strings = isinstance(characters, (str, list)) and all(isinstance(c, str) for c in characters)
            if names[: len(SPECIAL_TOKENS)] != [*SPECIAL_TOKENS] or not strings:
                raise TypeError(f"special_tokens={names}, characters={characters}")
            return cls(characters, tuple(names[len(SPECIAL_TOKENS) :]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"not a tokenizer ({error!r}); pass what to_json returned") from error


def split(ids: Tensor, fraction: float = 0.8) -> tuple[Tensor, Tensor]:
    """The first `fraction` of ids for training, the rest for validation: by position, so that no sentence is in both."""
    cut = int(fraction * len(ids))
    if not 0 < cut < len(ids):
        raise ValueError(f"{fraction} of {len(ids)} ids leaves a part empty; pass a longer text, or 0 < fraction < 1")
    return ids[:cut], ids[cut:]


def windows(ids: Tensor, seq_len: int, stride: int | None = None, pad_id: int = PAD_ID) -> Tensor:
    """Cut ids [n] into windows [N, seq_len], `stride` apart (default: end to end). The last one is padded, nothing dropped."""
    stride = seq_len if stride is None else stride
    if seq_len < 1 or not 1 <= stride <= seq_len or ids.ndim != 1 or len(ids) == 0:
        sizes = f"ids {tuple(ids.shape)}, seq_len={seq_len}, stride={stride}"
        raise ValueError(f"{sizes}: pass a vector of ids and 1 <= stride <= seq_len, so that nothing is dropped")
    count = 1 + max(0, math.ceil((len(ids) - seq_len) / stride))
    padding = (count - 1) * stride + seq_len - len(ids)
    return F.pad(ids, (0, padding), value=pad_id).unfold(0, seq_len, stride).contiguous()


# 2. Forward process --------------------------------------------------------------------------------------------------
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


def forward_process(sequences: Tensor, t: float | Tensor, mask_id: int, maskable: Tensor | None = None,
                    generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mask each maskable token of sequences LongTensor[B, L] independently with probability t (Eqs. 7-8).

    `t`: time in [0, 1], one number or FloatTensor[B]; `maskable`: BoolTensor[B, L], default everything. Returns the masked
    sequences LongTensor[B, L], and BoolTensor[B, L], true where a token was masked.

    >>> ids, generator = torch.tensor([[5, 6, 7, 8, 9, 5]]), torch.Generator().manual_seed(0)
    >>> forward_process(ids, 0.5, MASK_ID, generator=generator)[0].tolist()
    [[1, 6, 1, 1, 1, 5]]
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


# 3. Model ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Transformer. `causal` is the only difference between AR (True) and LLaDA (False).

    `rotary_base`: at 200 the slowest rotation turns once in about a thousand characters, a few windows; the usual 10,000 leaves
    most frequencies idle at this length. `attention_scale`: the largest attention logit (queries and keys are normalised); the
    usual sqrt(head width) is too blunt for characters, whose neighbours matter most.
    """
    vocab_size: int
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    causal: bool = False
    rotary_base: float = 200.0
    attention_scale: float = 12.0

    def __post_init__(self):
        sizes = (self.vocab_size, self.seq_len, self.n_layer, self.n_head, self.n_embd, self.rotary_base)
        if min(sizes) <= 0 or self.n_embd % (2 * self.n_head) or not 0 <= self.dropout < 1:
            raise ValueError(f"{self}: pass positive sizes, n_embd divisible by 2 * n_head (rotary) and dropout in [0, 1)")


class KVCache:
    """Keys and values of all positions, [n_layer, B, H, seq_len, D]: exact if causal; LLaDA's change with later characters."""
    def __init__(self, config: ModelConfig, batch_size: int, like: Tensor):
        shape = (config.n_layer, batch_size, config.n_head, config.seq_len, config.n_embd // config.n_head)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.padded = torch.zeros(batch_size, config.seq_len, dtype=torch.bool, device=like.device)
        self.length = 0

    def mark(self, start: int, padded: Tensor) -> Tensor:
        """Note which positions of a slice are [PAD]; BoolTensor[B, length], true where nothing may attend to."""
        self.length = max(self.length, start + padded.shape[1])
        self.padded[:, start : start + padded.shape[1]] = padded
        return self.padded[:, : self.length]

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a slice's keys and values [B, H, l, D]; returns those of all positions so far."""
        self.keys[layer, :, :, start : start + k.shape[2]] = k
        self.values[layer, :, :, start : start + k.shape[2]] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]


class RMSNorm(torch.autograd.Function):
    """x over the root of its mean square along the last dimension; eight kernels with the gradient, PyTorch's takes fifteen."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) * x.shape[-1] ** -0.5
        y = x / rms.clamp_(min=1e-6)
        ctx.save_for_backward(y, rms)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        y, rms = ctx.saved_tensors
        return torch.addcmul(gradient, y, (gradient * y).mean(dim=-1, keepdim=True), value=-1) / rms


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): x [..., L, D], coordinates i and i + D/2 turned by an angle, cos and sin [L, D]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Block(nn.Module):
    """Pre-norm attention and a ReLU^2 MLP (So et al. 2021), both residual; output projections start at zero."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.n_embd
        self.n_head, self.causal = config.n_head, config.causal
        self.scale = config.attention_scale * config.n_head / width
        self.attention_norm = self.mlp_norm = RMSNorm.apply
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        for weight in (self.qkv.weight, self.mlp_in.weight):
            nn.init.normal_(weight, std=width**-0.5)
        for weight in (self.attention_out.weight, self.mlp_out.weight):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible=None, cache=None, layer=0, start=0) -> Tensor:
        B, L, C = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, L, 3 * self.n_head, C // self.n_head).transpose(1, 2)
        qk, v = qkv.split((2 * self.n_head, self.n_head), dim=1)  # q and k as one: half the kernels
        q, k = _rotate(RMSNorm.apply(qk), cos, sin).to(v.dtype).chunk(2, dim=1)  # each [B, H, L, D], as v
        if cache is not None:
            k, v = cache.write(layer, start, k, v)
        causal = self.causal and visible is None and L > 1
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=self.scale)
        x = x + self.dropout(self.attention_out(h.transpose(1, 2).reshape(B, L, C)))
        h = F.relu(self.mlp_in(self.mlp_norm(x))).square()
        return x + self.dropout(self.mlp_out(h))


class Transformer(nn.Module, PyTorchModelHubMixin):
    """Ids LongTensor[B, L] to logits FloatTensor[B, L, vocab_size], L at most `config.seq_len`; a mask predictor, or AR.

    [PAD] is never attended to. `padding` says whether ids hold any; at None it looks, for which a GPU has to stop.
    `save_pretrained`, `from_pretrained`, `push_to_hub` come from huggingface_hub (safetensors, json).
    """
    padding: bool | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        half = config.n_embd // config.n_head // 2
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # Untied: input and output roles differ, [MASK] is only ever read. Zero: the first prediction is uniform.
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)
        angles = torch.outer(torch.arange(config.seq_len), config.rotary_base ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", torch.cat((angles.sin(), -angles.sin()), dim=1), persistent=False)

    def forward(self, ids: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
        if ids.ndim != 2 or start + ids.shape[1] > self.config.seq_len:
            raise ValueError(f"ids {tuple(ids.shape)} from position {start}: pass [B, L] with L <= {self.config.seq_len}")
        here = slice(start, start + ids.shape[1])
        x, visible = RMSNorm.apply(self.embed(ids)), self._visible(ids == PAD_ID, cache, start)
        for layer, block in enumerate(self.blocks):
            x = block(x, self.cos[here], self.sin[here], visible, cache, layer, start)
        return self.head(RMSNorm.apply(x)).float()

    def _visible(self, padded: Tensor, cache: KVCache | None, start: int) -> Tensor | None:
        """BoolTensor[B, 1, query, key], or None, the fast path: only padding and slices inside a causal sequence need a mask."""
        hidden, L = padded if cache is None else cache.mark(start, padded), padded.shape[1]
        inside = self.config.causal and start > 0 and not L == hidden.shape[1] - start == 1
        if not (inside or (bool(hidden.any()) if self.padding is None else self.padding)):
            return None
        query = torch.arange(start, start + L, device=padded.device)[:, None]
        key = torch.arange(hidden.shape[1], device=padded.device)
        allowed = ~hidden[:, None, None, :] & (key <= query if self.config.causal else key >= 0)
        return allowed | (key == query)  # a [PAD] sees itself, else its softmax would be NaN

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


# 4. Losses: both models minimise a weighted negative log-likelihood of (inputs, targets, weight) ----------------------
POWER = 1.5  # of the masking schedule in training, t = u^POWER; see diffusion_batch


def diffusion_batch(sequences: Tensor, generator: torch.Generator | None = None, maskable: Tensor | None = None,
                    mask_id: int = MASK_ID, t: float | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Inputs x_t, targets x_0 and the weights of Eq. 3: 1 / (t_b n_b) on masked tokens, n_b the maskable ones of row b.

    A window's gradient is the noisier, the smaller t is. So small t are drawn more often by default: t = u^p with stratified u,
    p = `POWER`, and dt = p u^(p-1) du enters the weight, so that the expectation stays that of Eq. 3 (a polynomial schedule of
    MD4, Shi et al. 2024: mask with probability u^p, weight p / u).
    """
    maskable = _check_maskable(sequences, sequences != PAD_ID if maskable is None else maskable)
    density = 1.0
    if t is None:
        u = stratified_times(len(sequences), generator).to(sequences.device)
        t, density = u**POWER, POWER * u ** (POWER - 1)
    t = _check_times(t, sequences, lowest_included=False)
    inputs, mask = forward_process(sequences, t, mask_id, maskable, generator)
    return inputs, sequences, mask * (density / (t * maskable.sum(dim=1).clamp(min=1)))[:, None]


def next_token_batch(sequences: Tensor, generator: torch.Generator | None = None, counted: Tensor | None = None,
                     start_id: int = START_ID, pad_id: int = PAD_ID) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Inputs [START] x_1 ... x_{L-1}, targets x_1 ... x_L (Eq. 2), weights that make the batch a mean over its counted tokens."""
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    counted = (sequences != pad_id if counted is None else counted).float()
    return inputs, sequences, counted * (len(sequences) / counted.sum().clamp(min=1))


def real_tokens(sequences: Tensor) -> Tensor:
    """BoolTensor[B, L]: everything but padding, what pre-training learns."""
    return sequences != PAD_ID


def weighted_nll(model: MaskPredictor, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows of sum_i weight_i * -log p(target_i | inputs). What is said where the weight is 0 does not matter."""
    counted = targets.masked_fill(weight == 0, -100)  # cross_entropy passes over -100
    nll = F.cross_entropy(model(inputs).flatten(0, 1), counted.flatten(), reduction="none")
    return (weight.flatten() * nll).sum() / len(inputs)


def llada_loss(model: MaskPredictor, sequences: Tensor, mask_id: int, t: float | Tensor | None = None,
               maskable: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """The LLaDA loss, nats per maskable token; its expectation is the NELBO (Eqs. 3, 4; Eq. 5 if the prompt is not maskable).

    Mean over sequences x_0 LongTensor[B, L] of (1/t_b) * (sum of cross-entropies over masked tokens) / (number of maskable ones).
    t: in (0, 1], one number or FloatTensor[B], default as `diffusion_batch` draws it. maskable: BoolTensor[B, L], default all.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely: ln 8 = 2.08 nats
    >>> ids = torch.full((4000, 16), 5)
    >>> round(float(llada_loss(blank, ids, MASK_ID)), 1)
    2.1
    """
    maskable = torch.ones_like(sequences, dtype=torch.bool) if maskable is None else maskable
    return weighted_nll(model, *diffusion_batch(sequences, generator, maskable, mask_id, t))


def next_token_loss(model: MaskPredictor, sequences: Tensor, start_id: int, pad_id: int = PAD_ID) -> Tensor:
    """Mean AR cross-entropy, nats per token that is not padding; the first token is scored given [START] (Eq. 2)."""
    return weighted_nll(model, *next_token_batch(sequences, None, None, start_id, pad_id))


# 5. Training ---------------------------------------------------------------------------------------------------------
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
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups that have `parts`, AdamW for what is left: one optimizer, one loss scale.

    torch.optim.Muon works matrix by matrix in bfloat16, which CPUs without native bfloat16 emulate slowly; this one stacks equal
    shapes into one product and treats q, k, v as three matrices (`parts`).
    """
    __setstate__ = torch.optim.Optimizer.__setstate__  # AdamW's own wants a "step" in every state, Muon's have none
    def __init__(self, params, weight_decay: float = 0.0):
        super().__init__(params, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # the loss scaler is to skip infinite gradients of Muon's, too

    @torch.no_grad()
    def step(self, closure=None):
        for group in (group for group in self.param_groups if "parts" in group):
            params, rate = group["params"], group["lr"]
            for p in params:
                self.state[p] = self.state[p] or {"momentum": torch.zeros_like(p)}
            grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - 0.95)
            updates = torch._foreach_lerp(grads, momenta, 0.95)
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            pairs = [pair for p, u, n in zip(params, updates, group["parts"]) for pair in zip(p.chunk(n), u.chunk(n))]
            for rows, columns in dict.fromkeys(update.shape for _, update in pairs):  # one product for all of equal shape
                equal = [pair for pair in pairs if pair[1].shape == (rows, columns)]
                matrices = orthogonalize(torch.stack([update for _, update in equal])).unbind()
                torch._foreach_add_([part for part, _ in equal], matrices, alpha=-rate * max(1, rows / columns) ** 0.5)
            for p in params:  # AdamW passes over what has no gradient
                p.grad = None
        super().step()


def make_optimizer(model: nn.Module, config: TrainConfig) -> Muon:
    """Muon for the matrices of the blocks, AdamW for embeddings and head, or for all if `muon_lr` is 0; "peak": their rates."""
    parts = {"qkv": 3, "attention_out": 1, "mlp_in": 1, "mlp_out": 1} if config.muon_lr else {}
    matrices = {getattr(block, name).weight: n for name, n in parts.items() for block in model.blocks}
    groups = [{"params": [p for p in model.parameters() if p not in matrices], "lr": config.adamw_lr}]
    if matrices:
        groups.insert(0, {"params": list(matrices), "lr": config.muon_lr, "parts": list(matrices.values())})
    return Muon([group | {"peak": group["lr"]} for group in groups], config.weight_decay)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to zero: 0 < factor <= 1."""
    rise, fall = max(1, config.warmup * config.steps), max(1, config.decay * config.steps)
    return min(1.0, (step + 1) / rise, (config.steps - step) / fall)


TRAINING_PATH = "2"  # raise it with any change to this file that makes a training end with other weights


@dataclass(frozen=True)
class Job:
    """Everything that decides what a training makes, and so its fingerprint.

    `train_ids`, `val_ids`: LongTensor[n], a text, or LongTensor[N, seq_len], sequences; `eval_windows` of these, evenly spread,
    are validated on with fixed masks. `make_batch`: (sequences [B, L], generator, learned [B, L]) -> (inputs, targets, weights),
    default `next_token_batch` if causal, else `diffusion_batch`. `learned`: sequences -> BoolTensor[B, L], what is masked or
    predicted, the response for SFT. These two and `architecture` go by their names. `start`: whose weights to begin with.
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

    def settings(self) -> dict:
        """All that decides the result except the data, the first weights and the code, which is named by `TRAINING_PATH`."""
        parts = {"batch": self.batch_function, "learned": self.learned, "architecture": self.architecture}
        power = POWER if self.batch_function is diffusion_batch else None
        return {key: part.__name__ for key, part in parts.items()} | {"power": power, **asdict(self.model), **asdict(self.train)}

    def fingerprint(self) -> str:
        """Twelve hex digits of the settings, the data and the first weights."""
        digest = hashlib.sha256(json.dumps([TRAINING_PATH, self.settings()]).encode())
        for tensor in (self.train_ids, self.val_ids, *(self.start.state_dict().values() if self.start else ())):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def validation_sequences(self) -> Tensor:
        """LongTensor[N, seq_len]."""
        sequences = windows(self.val_ids, self.model.seq_len) if self.val_ids.ndim == 1 else self.val_ids
        return sequences[torch.linspace(0, len(sequences) - 1, min(self.train.eval_windows, len(sequences))).long()]

    def validation_nats(self, model: MaskPredictor, sequences: Tensor) -> Tensor:
        """Nats of the learned tokens of each row, FloatTensor[N]: exact for AR, the NELBO with fixed masks for LLaDA."""
        learned, generator = self.learned(sequences), torch.Generator().manual_seed(0)
        if self.batch_function is next_token_batch:
            return ar_nll(model, sequences, START_ID, counted=learned)
        return nelbo(model, sequences, MASK_ID, n_samples=4, maskable=learned, generator=generator)

    @torch.no_grad()
    def validation_accuracy(self, model: MaskPredictor, sequences: Tensor) -> float:
        """Share of right predictions, with fixed masks for LLaDA, weighted as in the loss: each masking rate counts alike."""
        make_batch = next_token_batch if self.batch_function is next_token_batch else diffusion_batch
        inputs, targets, weight = make_batch(sequences, torch.Generator().manual_seed(0), self.learned(sequences))
        predicted = model(inputs.to(next(model.parameters()).device)).argmax(dim=-1).cpu()
        return float((weight * (predicted == targets)).sum() / weight.sum())


@dataclass
class Run:
    """A finished or interrupted training run: the best model, the metrics, the record with the final numbers, the directory."""
    model: nn.Module
    metrics: pd.DataFrame
    summary: dict
    path: Path


def training_batch(job: Job, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, weights [batch_size, seq_len] of random windows or rows, from a generator seeded by (seed, step)."""
    ids, length = job.train_ids, job.model.seq_len
    generator = torch.Generator().manual_seed(job.train.seed * 1_000_003 + step)
    if ids.ndim == 1:
        ids = F.pad(ids, (0, max(0, length - len(ids))), value=PAD_ID).unfold(0, length, 1)
    sequences = ids[torch.randint(len(ids), (job.train.batch_size,), generator=generator)]
    return job.batch_function(sequences, generator, job.learned(sequences))


def micro_batches(batch: tuple[Tensor, ...], accelerator: Accelerator) -> Iterator[tuple[Tensor, ...]]:
    """This process's share of a batch, on its device, in as many parts as gradients are accumulated over."""
    device, gpu = accelerator.device, accelerator.device.type == "cuda"
    mine = [x.chunk(accelerator.num_processes)[accelerator.process_index] for x in batch]
    mine = [(x.pin_memory() if gpu else x).to(device, non_blocking=gpu) for x in mine]  # travels while the GPU computes
    return zip(*(x.chunk(accelerator.gradient_accumulation_steps) for x in mine))


def training_loop(network: nn.Module, optimizer, job: Job, accelerator: Accelerator, log: "TrainingLog") -> None:
    """Batch, loss, backward, step, log, save. Over processes and micro-batches Accelerate sums the gradient.

    Nothing in a step reads a value back, so that the CPU prepares the next ones while a GPU computes.
    """
    config, model = job.train, accelerator.unwrap_model(network)
    for step in log.steps_left():
        batch = training_batch(job, step)  # inputs, targets, weights: each [batch_size, seq_len]
        model.padding = bool((batch[0] == PAD_ID).any())  # told here, on the CPU, the model need not look
        torch.manual_seed(config.seed * 1_000_003 + step + accelerator.process_index * 2**40)  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, config)
        for micro_batch in micro_batches(batch, accelerator):
            with accelerator.accumulate(network):
                loss = weighted_nll(network, *micro_batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(network.parameters(), config.clip)
                optimizer.step()
                optimizer.zero_grad()
            log.note(loss.detach(), *micro_batch[1:])
        log.step = step + 1
        if log.step in log.eval_steps:
            log.validate(norm)


@torch.random.fork_rng()
def train(name: str, job: Job, *, root: str | os.PathLike = ".", compiled: bool = False, quiet: bool = False) -> Run:
    """Train what `job` says, or load the run if it is already complete, or go on where it was interrupted.

    A run is known by its fingerprint; `name` is for the reader. Under `root`, `runs/NAME-FINGERPRINT/` gets run.json,
    metrics.csv and TensorBoard events; `checkpoints/NAME-FINGERPRINT/` gets best/ (config.json, model.safetensors) and, to go on
    from, last.state and the one before it, previous.state. `LLADA_RETRAIN=1` trains from the start whatever is there. Ctrl-C
    returns what there is. Several processes (`accelerate launch`, `torchrun`) share each batch; a second call beside waits.
    `compiled`: torch.compile the blocks, where that works. `quiet`: no bar, no message.

    ValueError: no ids, too few steps, a batch that processes and micro-batches cannot share evenly, no sound checkpoint.
    RuntimeError: a loss is not finite, or that of training above a blank model's; says where, and which is the last checkpoint.
    """
    config, device, parts = job.train, best_device(), max(1, job.train.accumulation)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision(), gradient_accumulation_steps=parts)
    if device == "cuda":  # products of float32 numbers, Muon's and those of evaluations, take the tensor cores (TF32)
        torch.set_float32_matmul_precision("high")
    sizes = [*map(torch.numel, (job.train_ids, job.val_ids)), config.steps, config.batch_size, config.evals, config.eval_windows]
    if min(*sizes, config.accumulation) < 1 or config.batch_size % (accelerator.num_processes * parts):
        shares = f"{accelerator.num_processes} processes x {parts} micro-batches"
        raise ValueError(f"{config}, {sizes[0]} + {sizes[1]} ids: pass at least one of each, and a batch for {shares} to share")
    log = TrainingLog(name, job, Path(root), accelerator, quiet)
    with log.alone():
        if log.complete():
            if not quiet:
                print(f"{name}: complete since before, loaded from {log.path}")
            return log.run()
        torch.manual_seed(job.train.seed)
        model = job.architecture(job.model).to(accelerator.device)
        if job.start:
            model.load_state_dict(job.start.state_dict())
        optimizer = make_optimizer(model, job.train)
        log.start(model, optimizer)
        network, prepared = accelerator.prepare(model, optimizer)
        for block in model.blocks if compiled and works(device, compiled=True) else ():
            block.compile()
        try:
            log.write()
            training_loop(network, prepared, job, accelerator, log)
            log.record["complete"] = True
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted at step {log.step}; {log.kept()}")
        finally:
            log.write()
        return log.run()


METRICS = ("step", "tokens", "seconds", "train_loss", "val_loss", "train_acc", "val_acc", "lr", "grad_norm")


class TrainingLog:
    """What a training leaves behind: its record, metrics, TensorBoard events, the best model and the state to go on from."""
    def __init__(self, name: str, job: Job, root: Path, accelerator: Accelerator, quiet: bool):
        self.job, self.accelerator, self.mark, self.main = job, accelerator, job.fingerprint(), accelerator.is_main_process
        known = sorted(path.name for path in root.glob(f"runs/*-{self.mark}"))  # the same training, under whatever name
        folder = (known or [f"{name}-{self.mark}"])[0]
        self.path, self.best = root / "runs" / folder, root / "checkpoints" / folder / "best"
        self.states = [self.best.with_name(f"{age}.state") for age in ("last", "previous")]
        self.step, self.rows, self.noted, self.silent = 0, [], [], quiet or not self.main
        self.eval_steps = {round(job.train.steps * (i + 1) / job.train.evals) for i in range(job.train.evals)}
        self.anew = os.environ.get("LLADA_RETRAIN") == "1"
        self.record = {"name": name, "complete": False, **job.settings()}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for whoever else is at this training. The system takes the lock from a process that is killed."""
        with contextlib.ExitStack() as held:
            if self.main:
                lock = FileLock(self.path / "lock")
                try:
                    held.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    print(f"{self.record['name']}: another process is at it in {self.path}; waiting for that to end")
                    held.enter_context(lock)
                except (OSError, NotImplementedError):
                    pass  # where nothing can be written, or locked, finished runs can be read
            self.accelerator.wait_for_everyone()
            yield

    def complete(self) -> bool:
        """Whether the run is complete; then `record` is what it left. What is missing or no record is made of the last state."""
        record = self.path / "run.json"
        needed = record, self.path / "metrics.csv", self.best / "model.safetensors"
        if not self.anew and all(path.exists() for path in needed):
            with contextlib.suppress(ValueError):
                self.record = json.loads(record.read_text())
        return self.record["complete"]

    def start(self, model: nn.Module, optimizer: Muon) -> None:
        """Take the newest sound state, if there is one, and begin the record."""
        self.model, self.optimizer, job, accelerator = model, optimizer, self.job, self.accelerator
        for left_by_a_kill in (*self.path.glob(".*.*"), *self.best.parent.rglob(".*.*")) if self.main else ():
            left_by_a_kill.unlink()
        self._resume()
        model.register_forward_hook(lambda _, ids, logits: setattr(self, "logits", logits.detach()))
        self.twin = job.architecture(job.model).to(accelerator.device).eval()  # eager, full precision, any shape
        self.record |= {"parameters": sum(p.numel() for p in model.parameters()), "processes": accelerator.num_processes}
        self.record |= {"precision": accelerator.mixed_precision, "characters": job.train_ids.numel(), **describe_machine()}
        self.record["data_sha256"] = hashlib.sha256(job.train_ids.numpy().tobytes()).hexdigest()
        self.writer = SummaryWriter(self.path, purge_step=self.step) if self.main else None
        self.started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0)

    def _resume(self) -> None:
        found = [path for path in self.states if path.exists() and not self.anew]
        for path in found:
            try:
                notes = load_state(path, self.mark, self.model, self.optimizer)
                break
            except ValueError as error:
                if path == found[-1]:
                    raise
                warnings.warn(f"{error}; going on from the one before it", stacklevel=5)
        else:
            return
        self.rows, self.step = notes["rows"], notes["rows"][-1]["step"]
        scaler, kept = self.accelerator.scaler, notes.get("scaler")
        if scaler and kept:
            scaler.load_state_dict(kept)
        elif scaler or kept:
            warnings.warn(f"going on in {self.accelerator.mixed_precision} precision, unlike before", stacklevel=5)
        self.accelerator.wait_for_everyone()
        if self.main and path == self.states[1]:  # or a damaged one would replace it
            os.replace(path, self.states[0])

    def kept(self) -> str:
        """What there is to go on from."""
        last = next((path for path in self.states if path.exists()), None)
        return f"running the same again goes on from {last}" if last else "there is no checkpoint yet"

    def steps_left(self) -> Iterator[int]:
        """The numbers of the steps to make, with a progress bar."""
        shown = {"desc": self.record["name"], "file": sys.stdout, "mininterval": 10, "delay": 5, "ncols": 100}
        steps = self.job.train.steps
        self.bar = tqdm(range(self.step, steps), initial=self.step, total=steps, disable=self.silent, **shown)
        return self.bar

    def note(self, loss: Tensor, targets: Tensor, weight: Tensor) -> None:
        """Keep a micro-batch's loss, and the weights of right predictions and of all, as tensors that nobody waits for."""
        right = weight * (self.logits.argmax(dim=-1) == targets)
        self.noted.append((loss, torch.stack((right, weight)).sum(dim=(1, 2)) / len(weight)))

    def validate(self, norm: Tensor) -> None:
        """Add a row to the metrics; RuntimeError if a loss is not finite, or the training loss above a blank model's, ln V.

        In the first hundred steps, when a model may have to unlearn what it started with, three times that is let pass. A
        validation loss that rises while the training loss falls is overfitting, which best/ has the answer to.
        """
        config, sequences = self.job.train, self.job.validation_sequences()
        losses, weights = (torch.stack(noted).mean(dim=0) for noted in zip(*self.noted))
        train_loss, right, weight = self.accelerator.reduce(torch.cat((losses[None], weights)), "mean").tolist()
        self.twin.load_state_dict(self.model.state_dict())
        val_loss = float(self.job.validation_nats(self.twin, sequences).sum() / self.job.learned(sequences).sum())
        accuracies = right / max(weight, 1e-9), self.job.validation_accuracy(self.twin, sequences)
        factor, tokens = learning_rate_factor(self.step - 1, config), self.step * config.batch_size * self.job.model.seq_len
        counts = self.step, tokens, round(time.perf_counter() - self.started, 2)
        row = dict(zip(METRICS, (*counts, train_loss, val_loss, *accuracies, config.muon_lr * factor, float(norm))))
        blank = math.log(self.job.model.vocab_size) * weight * (1 if self.step > 100 else 3)
        if not (train_loss <= blank and math.isfinite(train_loss + val_loss)):
            rates = f"now {factor:.3g} x {config.muon_lr} and {config.adamw_lr}"
            raise RuntimeError(f"{row}: worse than a blank model; lower muon_lr or adamw_lr, {rates}; {self.kept()}")
        self.rows.append(row)
        self.noted = []
        self.bar.set_postfix(train=f"{train_loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
        if self.main:
            self._save(row)
        self.write()

    def _save(self, row: dict) -> None:
        if all(row["val_loss"] < earlier["val_loss"] for earlier in self.rows[:-1]):
            save_model(self.best, self.twin)
        for key in METRICS[3:]:
            self.writer.add_scalar(key, row[key], self.step)
        scaler = self.accelerator.scaler
        notes = {"fingerprint": self.mark, "rows": self.rows, "scaler": scaler and scaler.state_dict()}
        save_state(*self.states, self.model, self.optimizer, notes)

    def write(self) -> None:
        """Write record and metrics as they stand."""
        rows = self.rows or [dict.fromkeys(METRICS, 0) | {"val_loss": math.nan}]
        self.record |= {"best": min(row["val_loss"] for row in rows), **{key: rows[-1][key] for key in ("tokens", "seconds")}}
        if self.main:
            write_atomically(self.path / "metrics.csv", pd.DataFrame(self.rows, columns=METRICS).to_csv(index=False).encode())
            write_atomically(self.path / "run.json", json.dumps(self.record, indent=1).encode())
        self.accelerator.wait_for_everyone()

    def run(self) -> Run:
        """What is on disk; the model as it is, if it was never validated."""
        if (self.best / "model.safetensors").exists():
            self.twin = load_model(self.best, self.job.architecture).to(self.accelerator.device)
        else:
            self.twin.load_state_dict(self.model.state_dict())
        metrics = pd.read_csv(self.path / "metrics.csv", converters=dict.fromkeys(METRICS[2:], float))  # to the last digit
        return Run(self.twin, metrics, self.record, self.path)


def save_model(directory: Path, model: nn.Module) -> None:
    """config.json and model.safetensors, as `from_pretrained` reads them, and sha256: of these two and of those before them.

    Each file is whole at every moment, and a kill between two of them leaves a model that one of the checksums is of.
    """
    config, weights = json.dumps(asdict(model.config)).encode(), safetensors.torch.save(model.state_dict())
    sums = directory / "sha256"
    known = sums.read_text().split()[:1] if sums.exists() else []
    write_atomically(sums, "\n".join([hashlib.sha256(config + weights).hexdigest(), *known]).encode())
    write_atomically(directory / "config.json", config)
    write_atomically(directory / "model.safetensors", weights)


def load_model(directory: str | os.PathLike, architecture: type = Transformer) -> nn.Module:
    """What `save_model` or `save_pretrained` wrote, in evaluation mode. ValueError if it is not there or damaged."""
    paths = [Path(directory) / name for name in ("config.json", "model.safetensors", "sha256")]
    try:
        config, weights = (path.read_bytes() for path in paths[:2])
        if paths[2].exists() and hashlib.sha256(config + weights).hexdigest() not in paths[2].read_text().split():
            raise ValueError("config.json and model.safetensors are not of that checksum")
        model = architecture(ModelConfig(**json.loads(config)))
        model.load_state_dict(safetensors.torch.load(weights))
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        remedy = "pass the best/ of a run; LLADA_RETRAIN=1 trains a damaged one again"
        raise ValueError(f"no sound model in {directory} ({error}); {remedy}") from error
    return model.eval()


def save_state(path: Path, older: Path, model: nn.Module, optimizer: Muon, notes: dict) -> None:
    """Write a SHA-256 and, as safetensors, weights, the optimizer's state and notes to `path`; what was there becomes `older`."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value).contiguous() for name, value in state.items()}
    data = safetensors.torch.save(tensors | {"notes": torch.tensor(list(json.dumps(notes).encode()), dtype=torch.uint8)})
    if path.exists():
        os.replace(path, older)
    write_atomically(path, hashlib.sha256(data).digest() + data)


def load_state(path: Path, mark: str, model: nn.Module, optimizer: Muon) -> dict:
    """Put back what `save_state` wrote; returns the notes. ValueError if it is damaged or of another run than `mark`."""
    digest, data = path.read_bytes()[:32], path.read_bytes()[32:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"the checkpoint {path} is damaged (its checksum differs); delete it to train from the start")
    tensors, state = safetensors.torch.load(data), optimizer.state_dict()
    notes = json.loads(bytes(tensors["notes"].tolist()))
    if notes["fingerprint"] != mark:
        raise ValueError(f"the checkpoint {path} is of another run, {notes['fingerprint']}, not of {mark}; delete it")
    for key in tensors:
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state["state"].setdefault(int(i), {})[name] = tensors[key]
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    optimizer.load_state_dict(state)
    return notes


@functools.cache
def works(device: str, compiled: bool = False) -> bool:
    """Whether a training step there, or a compiled one, ends as a plain one on the CPU; warns if not.

    By trial: a GPU, a Mac's "mps" or a C++ compiler may be there and not work.
    """
    def trained(place: str, compile_: Callable) -> Tensor:
        x = torch.eye(4, device=place, requires_grad=True)
        compile_(lambda x: (x @ x).tanh().sum())(x).backward()
        torch.optim.AdamW([x], fused=True).step()
        return x.detach().cpu()

    try:
        plain = functools.partial(torch.compile, disable=True)
        torch.testing.assert_close(trained(device, torch.compile if compiled else plain), trained("cpu", plain))
    except Exception as error:  # a compiler or a driver may fail in any way
        kind = "torch.compile" if compiled else device
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"{kind} does not work here ({reason}); training goes on without, more slowly", stacklevel=4)
        return False
    return True


def best_device() -> str:
    """"cuda", else "mps", where there is one that works, else "cpu"."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return next((name for name in there if there[name] and works(name)), "cpu")


def mixed_precision() -> str:
    """bf16 on GPUs that have it, fp16 with loss scaling on older ones (T4), full precision elsewhere ("no")."""
    cuda = best_device() == "cuda"
    return "no" if not cuda else "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def describe_machine() -> dict[str, str]:
    """Device and versions, for the first cell and for each run's record."""
    cpuinfo, (status, commit) = Path("/proc/cpuinfo"), subprocess.getstatusoutput("git rev-parse --short HEAD")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "") or ["", "CPU"]
    device = torch.cuda.get_device_name() if best_device() == "cuda" else f"{cpu[1]}, {torch.get_num_threads()} threads"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    return {"device": device, **versions, "commit": "none" if status else commit}


def runs_table(root: str | os.PathLike = ".") -> pd.DataFrame:
    """All runs under `root`/runs, a row each: where their settings differ, best validation, tokens, seconds, commit."""
    rows = [{"row": p.parent.name, **json.loads(p.read_text())} for p in sorted(Path(root).glob("runs/*/run.json"))]
    table = pd.DataFrame(rows).drop(columns=["name", "data_sha256"], errors="ignore")
    kept = ["row", "complete", "parameters", "best", "tokens", "seconds", "device", "commit"]
    return table[[c for c in table if c in kept or table[c].astype(str).nunique() > 1]]


# 6. Reverse process --------------------------------------------------------------------------------------------------
@dataclass
class Generation:
    """What a sampler made. Every intermediate state follows from `ids` and `order` (see `state_after`)."""
    ids: Tensor  # LongTensor[B, L], the finished sequences
    order: Tensor  # LongTensor[B, L], the step (from 0) that committed a position for good; -1 where it was given
    nfe: int  # forward passes used (a guided pass counts once)
    confidence: Tensor | None = None  # FloatTensor[B, L], the token's probability when it was committed; 1 where given

    def __post_init__(self):
        self.confidence = torch.ones_like(self.ids, dtype=torch.float) if self.confidence is None else self.confidence

    def state_after(self, step: int, mask_id: int = MASK_ID) -> Tensor:
        """LongTensor[B, L]: the sequences after `step`; step -1 is the template."""
        return self.ids.masked_fill(self.order > step, mask_id)

    def steps(self) -> list[int]:
        """The steps that committed something for good."""
        return self.order[self.order >= 0].unique().tolist()


def _inference(function):
    """No gradients, and evaluation mode for the time of the call if the mask predictor is a module."""
    @functools.wraps(function)
    def wrapped(model, *args, **kwargs):
        was_training = isinstance(model, nn.Module) and model.training
        try:
            return torch.no_grad()(function)(model.eval() if was_training else model, *args, **kwargs)
        finally:
            if was_training:
                model.train()
    return wrapped


def _check_sampling(model: MaskPredictor, length: int, temperature: float, top_p: float) -> None:
    longest = getattr(getattr(model, "config", None), "seq_len", length)
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_p={top_p}: pass a temperature >= 0 (argmax) and top_p in (0, 1] (all)")
    if length > longest:
        raise ValueError(f"the sequence has {length} tokens, the model's seq_len is {longest}; pass a shorter one")


def sample_tokens(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits [M, V], LongTensor[M]: argmax at temperature 0, else an exact draw from the nucleus.

    The draw inverts the cumulative distribution in float64: float32 Gumbel noise would lower the temperature (Zheng et
    al. 2024, arXiv:2409.02908). ValueError where every token has the logit -inf.
    """
    best, tokens = logits.max(dim=-1)
    if bool(best.isneginf().any()):
        raise ValueError("every token that the model allows is forbidden; pass fewer forbidden ids")
    if temperature == 0:
        return tokens
    probs = ((logits.double() - best[:, None]) / temperature).exp()  # times a constant of the row
    if top_p < 1:
        ranked, index = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(dim=-1) - ranked >= top_p * probs.sum(dim=-1, keepdim=True)] = 0  # the first token always stays
        probs = torch.zeros_like(probs).scatter(-1, index, ranked)
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:]
    point = _uniform((len(cdf), 1), cdf, generator, torch.float64) * total
    return torch.searchsorted(cdf, torch.minimum(point, total.nextafter(torch.zeros_like(total))), right=True)[:, 0]


# Which proposals stay: (tokens [B, L], distributions [B, L, V], masked [B, L], how many are due [B]) -> BoolTensor[B, L]
Strategy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def highest(score: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """BoolTensor[B, L]: in each row the `count` [B] masked positions of the highest score [B, L]."""
    ranked = score.double().masked_fill(~masked, -math.inf).topk(min(int(count.max()), score.shape[1]), dim=1).indices
    first = torch.arange(ranked.shape[1], device=ranked.device) < count[:, None]
    return torch.zeros_like(masked).scatter(1, ranked, first) & masked


def low_confidence(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Strategy: remask the least confident, keep the proposals of the largest probability (Alg. 5)."""
    return highest(probs.gather(-1, tokens[..., None])[..., 0], masked, count)


def entropy(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Strategy: commit where the predicted distribution has the lowest entropy, whatever was drawn from it."""
    return highest(-torch.special.entr(probs).sum(dim=-1), masked, count)


def margin(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Strategy: commit where the best token is furthest ahead of the second best."""
    best, second = probs.topk(2, dim=-1).values.unbind(dim=-1)
    return highest(best - second, masked, count)


def random_order(generator: torch.Generator | None) -> Strategy:
    """The strategy that commits uniformly chosen positions (Alg. 4)."""
    return lambda tokens, probs, masked, count: highest(_uniform(masked.shape, masked, generator, torch.float64), masked, count)


BUILT_IN = {"low_confidence": low_confidence, "random": None, "ancestral": None, "entropy": entropy, "margin": margin}
REMASKING = tuple(BUILT_IN)


def _blocks(masked: Tensor, steps: int, block_length: int | None) -> tuple[Tensor, int]:
    """The number of each masked position's block, LongTensor[B, L] (-1 where nothing is masked), and how many there are."""
    n_masks = masked.sum(dim=1)
    longest = int(n_masks.max())
    block_length = longest if block_length is None else block_length
    if not longest:
        raise ValueError("nothing to fill: pass a template with mask_id where tokens are wanted")
    if block_length < 1 or (block_length != longest and bool((n_masks % block_length).any())):
        raise ValueError(f"block_length={block_length}: pass a positive divisor of the number of masks {n_masks.tolist()}")
    n_blocks = -(-longest // block_length)
    if steps < 1 or steps % n_blocks:
        raise ValueError(f"steps={steps}: pass a positive multiple of the number of blocks, {n_blocks}")
    return torch.where(masked, (masked.cumsum(dim=1) - 1) // block_length, -1), n_blocks


@_inference
def reverse_process(model: MaskPredictor, template: Tensor, *, mask_id: int, steps: int, temperature: float = 0.0,
                    top_p: float = 1.0, remasking: str | Strategy = "low_confidence", block_length: int | None = None,
                    forbidden: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Generation:  # fmt: skip
    """Fill every [MASK] of the template LongTensor[B, L], some positions per step, from t = 1 to t = 0; other tokens are kept.

    After the step from t to s, floor(n (1 - s)) of a row's n masks are filled. `remasking` says which first: "low_confidence"
    (Alg. 5), "random" (Alg. 4 with fixed counts), "entropy" and "margin", which do not look at what was drawn, "ancestral" (each
    mask with probability (t - s) / t, the literal reverse process, Eq. 10), or a `Strategy`, which may commit more or fewer.

    steps: forward passes, shared out evenly over the blocks; a step in which the schedule wants nothing costs none, a strategy
    that falls behind gets further ones. temperature: 0 is argmax, otherwise exact categorical sampling from the nucleus of mass
    `top_p`. block_length: fill the masks in consecutive groups of this many, left to right (semi-autoregressive). forbidden: ids
    never to produce; [MASK] never is. ValueError: an argument out of range, blocks that do not divide masks or
    steps, nothing to fill, a template longer than the model's `seq_len`, an unknown strategy, or one that commits nothing.

    >>> def predict(ids):  # sure of 4, 5, 6, 7, and the surer the further right
    ...     return (torch.eye(8)[4:] * torch.arange(1, 5)[:, None]).expand(len(ids), -1, -1)
    >>> made = reverse_process(predict, torch.tensor([[MASK_ID, 5, MASK_ID, MASK_ID]]), mask_id=MASK_ID, steps=3)
    >>> made.ids.tolist(), made.order.tolist(), made.nfe
    ([[4, 5, 6, 7]], [[2, -1, 1, 0]], 3)
    """
    if template.ndim != 2:
        raise ValueError(f"template has shape {tuple(template.shape)}; pass ids of shape [B, L]")
    _check_sampling(model, template.shape[1], temperature, top_p)
    if not callable(remasking) and remasking not in REMASKING:
        raise ValueError(f"remasking={remasking!r}: pass a strategy or one of {', '.join(REMASKING)}")
    strategy = remasking if callable(remasking) else BUILT_IN[remasking] or random_order(generator)
    block_of, n_blocks = _blocks(template == mask_id, steps, block_length)
    banned = torch.tensor(sorted({mask_id, *forbidden}), device=template.device)
    per_block = steps // n_blocks
    ids, order, nfe = template.clone(), torch.full_like(template, -1), 0
    confidence = torch.ones(ids.shape, dtype=torch.float64, device=ids.device)
    for block in range(n_blocks):
        size, first = (block_of == block).sum(dim=1), max(block * per_block, int(order.max()) + 1)
        for step in itertools.count():
            masked = (block_of == block) & (ids == mask_id)  # [B, L]
            left = masked.sum(dim=1)
            if not bool(left.any()):
                break
            count = left - size + size * min(step + 1, per_block) // per_block  # so that size * (1 - s) are filled
            if remasking == "ancestral":  # each mask with probability (t - s) / t
                draws = _uniform(ids.shape, ids, generator, torch.float64)
                count = (masked & (draws * max(1, per_block - step) < 1)).sum(dim=1)
            if not bool((count > 0).any()):
                continue
            logits = model(ids)[masked]  # [M, V]
            drawn = sample_tokens(logits.index_fill(-1, banned, -math.inf), temperature, top_p, generator)
            tokens = ids.masked_scatter(masked, drawn)
            probs = torch.zeros((*ids.shape, logits.shape[-1]), dtype=torch.float64, device=ids.device)
            probs[masked] = logits.double().softmax(dim=-1)
            commit = strategy(tokens, probs, masked, count.clamp(min=0)) & masked
            if not bool(commit.any()):
                raise ValueError("the strategy commits nothing where the schedule wants something; return a masked position")
            ids = torch.where(commit, tokens, ids)
            confidence = torch.where(commit, probs.gather(-1, tokens[..., None])[..., 0], confidence)
            order[commit] = first + step
            nfe += 1
    return Generation(ids, order, nfe, confidence.float())


def infill(model: MaskPredictor, tokenizer: CharTokenizer, texts: list[str], **options) -> list[str]:
    """Fill the blanks of texts such as "To [__] or not": a blank has as many characters as underscores.

    Texts are padded into one batch; `options` are those of `reverse_process`, with `steps`. ValueError: a text without a blank.
    """
    rows = []
    for text in texts:
        pieces = re.split(r"\[(_+)\]", text)  # text, underscores, text, underscores, ..., text
        if len(pieces) < 3:
            raise ValueError(f"{text!r} has no blank: mark one with [___], an underscore for each character")
        rows.append(torch.cat([torch.full((len(p),), MASK_ID) if i % 2 else tokenizer.encode(p) for i, p in enumerate(pieces)]))
    (template,) = _on_device(model, nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID))
    made = reverse_process(model, template, mask_id=MASK_ID, forbidden=(PAD_ID, START_ID, END_ID), **options)
    return [tokenizer.decode(row) for row in made.ids]


@_inference
def generate_ar(model: MaskPredictor, prompt: Tensor, length: int, *, start_id: int, temperature: float = 1.0, top_p: float = 1.0,
                forbidden: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Generation:  # fmt: skip
    """Continue prompt LongTensor[B, P] by `length` tokens, left to right (Eq. 2); ids are [B, P + length].

    Our Transformer decodes with cached keys and values, any other causal callable is asked for the whole prefix each time.

    >>> successor = lambda ids: 9 * torch.eye(8)[(ids + 1).clamp(max=7)]  # after 4 comes 5, after 5 comes 6, ...
    >>> generate_ar(successor, torch.tensor([[4, 5]]), 2, start_id=START_ID).ids.tolist()
    [[4, 5, 6, 7]]
    """
    if prompt.ndim != 2 or length < 1:
        raise ValueError(f"prompt {tuple(prompt.shape)}, length={length}: pass ids of shape [B, P] and length >= 1")
    _check_sampling(model, prompt.shape[1] + length, temperature, top_p)
    banned = torch.tensor(sorted(set(forbidden)), dtype=torch.long, device=prompt.device)
    cache = KVCache(model.config, len(prompt), model.embed.weight) if isinstance(model, Transformer) else None
    ids, confidence = F.pad(prompt, (1, 0), value=start_id), [torch.ones(prompt.shape, device=prompt.device)]
    for _ in range(length):
        new = {"cache": cache, "start": cache.length} if cache else {}  # with a cache only what it has not seen: first the prompt
        logits = model(ids[:, new.get("start", 0) :], **new)[:, -1]
        tokens = sample_tokens(logits.index_fill(-1, banned, -math.inf), temperature, top_p, generator)[:, None]
        confidence.append(logits.softmax(dim=-1).gather(-1, tokens))
        ids = torch.cat((ids, tokens), dim=1)
    order = torch.arange(-prompt.shape[1], length, device=ids.device).clamp(min=-1).expand(len(ids), -1)
    return Generation(ids[:, 1:], order.contiguous(), length, torch.cat(confidence, dim=1))


# 7. Likelihood -------------------------------------------------------------------------------------------------------
def _nll(model: MaskPredictor, inputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """FloatTensor[R, L], -log p(target) at counted positions, 0 elsewhere; at most 2^14 tokens per forward pass."""
    result = torch.zeros(inputs.shape, device=inputs.device)
    size = max(1, 2**14 // inputs.shape[1])
    for part, ids, truth, wanted in zip(*(x.split(size) for x in (result, inputs, targets, counted))):
        part[wanted] = F.cross_entropy(model(ids)[wanted].float(), truth[wanted], reduction="none")
    return result


def _on_device(model, *tensors: Tensor):
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return tensors if parameter is None else [t.to(parameter.device) for t in tensors]


@_inference
def ar_nll(model: MaskPredictor, sequences: Tensor, start_id: int, pad_id: int = PAD_ID, counted: Tensor | None = None) -> Tensor:
    """Exact -log p of each sequence under the AR model, FloatTensor[B], nats (Eq. 2).

    `counted` BoolTensor[B, L], default all but padding: the tokens whose conditional probabilities enter, given all before them.
    """
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    counted = sequences != pad_id if counted is None else _check_maskable(sequences, counted)
    sequences, inputs, counted = _on_device(model, sequences, inputs, counted)
    return _nll(model, inputs, sequences, counted).sum(dim=1)


@_inference
def masked_nll(model: MaskPredictor, sequences: Tensor, mask: Tensor, mask_id: int) -> Tensor:
    """-log p(x_i | the tokens outside `mask`) where mask BoolTensor[B, L] is true, 0 elsewhere; FloatTensor[B, L], nats."""
    sequences, mask = _on_device(model, sequences, _check_maskable(sequences, mask))
    return _nll(model, sequences.masked_fill(mask, mask_id), sequences, mask)


def exact_masks(count: Tensor, maskable: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """BoolTensor[K, B, L]: exactly `count` LongTensor[K, B] of each row's `maskable` tokens BoolTensor[B, L], at random."""
    noise = _uniform((*count.shape, maskable.shape[-1]), maskable, generator).masked_fill(~maskable, 2.0)
    return noise.argsort(dim=-1).argsort(dim=-1) < count[..., None]


@_inference
def nelbo(model: MaskPredictor, sequences: Tensor, mask_id: int, *, n_samples: int, maskable: Tensor | None = None,
          generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """Unbiased estimate of an upper bound on -log p of each sequence, FloatTensor[B], nats (Eqs. 4 and 6).

    Each of a row's K = `n_samples` masks hides exactly l of its n `maskable` tokens (BoolTensor[B, L], default all) and weighs
    their cross-entropies by n / l. l is stratified: mask k draws l / n uniformly from [k / K, (k + 1) / K), and the rows share
    each such stratum in a random order. ValueError: n_samples < 1, or shapes that do not fit.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> (nelbo(blank, torch.tensor([[4, 5, 6, 7]]), MASK_ID, n_samples=4) / math.log(8)).round(decimals=3).tolist()
    [4.0]
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: pass at least 1")
    sequences, maskable = _on_device(model, sequences, _check_maskable(sequences, maskable))
    (B, L), n = sequences.shape, maskable.sum(dim=1)
    rank = _uniform((n_samples, B), sequences, generator).argsort(dim=1)
    shift = (_uniform((n_samples, 1), sequences, generator, torch.float64) + rank / B) % 1
    s = (torch.arange(n_samples, device=n.device)[:, None] + shift) / n_samples  # [K, B], stratified in [0, 1)
    count = torch.minimum((n * s).long() + 1, n)  # l
    mask = exact_masks(count, maskable, generator)  # [K, B, L]
    rows, hidden = sequences.expand_as(mask).reshape(-1, L), mask.reshape(-1, L)
    nll = _nll(model, rows.masked_fill(hidden, mask_id), rows, hidden).view_as(mask).double()
    return (n / count.clamp(min=1) * nll.sum(dim=-1)).mean(dim=0).float()


# 8. Evaluation -------------------------------------------------------------------------------------------------------
def per_character(nats: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean nats per character and the half-width of its 95% interval (ratio estimator); nats and characters [N] of windows."""
    nats, counts = nats.double(), counts.double()
    mean = nats.sum() / counts.sum()
    residual = nats - mean * counts
    return float(mean), float(1.96 * residual.std() / (len(nats) ** 0.5 * counts.mean()))


def share(hits) -> tuple[float, float]:
    """A rate and the half-width of its 95% interval, from a sequence of n zeros and ones. The last term keeps 0 of n honest."""
    rate, n = float(np.asarray(hits, dtype=float).mean()), len(hits)
    return rate, 1.96 * math.sqrt((rate * (1 - rate) + 1.92 / n) / n)


WORD = re.compile(r"[A-Za-z']+")
GROUPS = 8  # samples are scored in this many groups, whose spread gives the intervals
COPY_LIMIT = 64


def copy_index(corpus: str) -> list[str]:
    """The sorted beginnings, COPY_LIMIT characters each, of everything in `corpus`: what `longest_copy` looks up."""
    return sorted(corpus[i : i + COPY_LIMIT] for i in range(len(corpus)))


def longest_copy(text: str, index: list[str]) -> int:
    """Length of the longest run of `text` that stands verbatim in the corpus of `index`, at most COPY_LIMIT."""
    best = 0
    for piece in (text[i : i + COPY_LIMIT] for i in range(len(text))):
        place = bisect.bisect_left(index, piece)
        neighbours = index[max(0, place - 1) : place + 1]  # in sorted order the longest match is one of them
        best = max([best, *(len(os.path.commonprefix([piece, near])) for near in neighbours)])  # noqa: RUF071
    return best


def text_metrics(texts: list[str], index: list[str], words: set[str]) -> dict[str, float]:
    """Coherence and diversity of one group of texts; the training text gives `index` (`copy_index`) and lower-case `words`."""
    inner = [w.lower() for text in texts for w in WORD.findall(text)[1:-1]]  # the outer words may be cut by the window
    trigrams = [text[i : i + 3] for text in texts for i in range(len(text) - 2)]
    counts = np.array(list(Counter("".join(texts)).values()))
    shares = counts / counts.sum()
    known, distinct = sum(w in words for w in inner) / max(1, len(inner)), len(set(trigrams)) / max(1, len(trigrams))
    scores = {"known words": known, "distinct-3": distinct, "char entropy": float(-(shares * np.log(shares)).sum())}
    return scores | {"longest copy": float(np.mean([longest_copy(text, index) for text in texts]))}


def grouped(values: list[dict[str, float]]) -> dict[str, float]:
    """Mean over groups and, in columns named "... ±", the half-width of its 95% interval (Student's t)."""
    table = pd.DataFrame(values)
    half = 2.365 * table.std() / len(table) ** 0.5  # Student's t, 97.5%, GROUPS - 1 degrees of freedom
    return {key: number for name in table for key, number in ((name, table[name].mean()), (f"{name} ±", half[name]))}


def ngram_judge(text: str, order: int = 6) -> Callable[[str, int], float]:
    """judge(written, start): nats per character of written[start:] under an n-gram model of `text` (Witten-Bell smoothing)."""
    grams = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, order + 1)]
    contexts = [Counter(text[i : i + n] for i in range(len(text) - n)) for n in range(order)]  # how often something follows
    followers = [Counter(gram[:-1] for gram in level) for level in grams]  # how many characters do
    def judge(written: str, start: int) -> float:
        nats = 0.0
        for i in range(start, len(written)):
            p = 1 / len(grams[0])
            for n in range(1, min(order, i + 1) + 1):
                gram = written[i - n + 1 : i + 1]
                kinds, seen = followers[n - 1][gram[:-1]], contexts[n - 1][gram[:-1]]
                p = (grams[n - 1][gram] + kinds * p) / (seen + kinds) if seen else p
            nats -= math.log(p)
        return nats / (len(written) - start)
    return judge


# 9. Tables, figures, widgets -----------------------------------------------------------------------------------------
LLADA_COLOR, AR_COLOR, MASK_COLOR, REAL_COLOR = "#0072B2", "#D55E00", "#9A9A9A", "#009E73"  # Okabe & Ito, colour-blind safe
MASK_FACE, NEW_FACE = "#D2D2D2", "#F0E442"  # behind a masked and behind a just committed character


class Results:
    """Where tables and figures go: `figures/`, or, in `smoke` or on any text but TinyShakespeare, `build/PRESET/figures/`."""
    def __init__(self, preset: "Preset", text: str):
        named = preset.name != "smoke" and corpus_name(text) == "TinyShakespeare"
        self.folder = Path("figures") if named else Path("build", preset.name, "figures")
        self.tables = self.folder / "tables"

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write tables/NAME.csv (four decimals) and hand the same rounded table back for display."""
        table = table.round(4)
        write_atomically(self.tables / f"{name}.csv", table.to_csv(index=False, lineterminator="\n").encode())
        return table

    def figure(self, figure, name: str) -> None:
        """Write NAME.png."""
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"{name}.png", dpi=130, bbox_inches="tight")


def errorbars(ax, table: pd.DataFrame, x: str, y: str, **style) -> None:
    """Column `y` against column `x`, with the intervals of column "y ±"."""
    ax.errorbar(table[x], table[y], table[f"{y} ±"], **{"marker": "o", "ms": 4, "capsize": 3, **style})


def log_ticks(ax, ticks) -> None:
    """A logarithmic x axis that is labelled at just these ticks."""
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()


def show(*things: Callable) -> None:
    """Display the source of functions, methods or classes as highlighted Markdown; docstrings and checks of arguments aside."""
    page = "<div style='font-family: monospace'>\n\n```python\n{}\n```\n\n</div>"  # without it nbconvert's page sets prose
    display(Markdown(page.format("\n\n\n".join(map(shown_source, things)))))


def shown_source(thing: Callable) -> str:
    """What `show` displays: the source without docstrings, `if ...: raise ...` and calls of the `_check` functions."""
    source = textwrap.dedent(inspect.getsource(thing))
    lines, hidden = source.rstrip().split("\n"), set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        check = isinstance(value, ast.Call) and getattr(value.func, "id", "").startswith("_check")
        refusal = isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and not node.orelse
        if isinstance(value, ast.Constant) or check or refusal:
            hidden |= set(range(node.lineno, node.end_lineno + 1))
    return "\n".join(line for i, line in enumerate(lines, start=1) if i not in hidden)


def pages(generation: Generation, tokenizer: CharTokenizer, width: int = 64) -> list[list[list[tuple[str, int]]]]:
    """The first row before the first pass and after each: pages of lines, at most `width` long, of (glyph, state).

    States: 0 masked, 1 just committed, 2 settled or given, 3 to 5 settled with less confidence. Lines break where those of the
    finished text do, so that nothing moves while it is being written.
    """
    finished = "".join(tokenizer.decode([token]) or "·" for token in generation.ids[0].tolist())
    line = rf"[^\n]{{0,{width}}}\n|[^\n]{{1,{width}}}(?:\Z|(?<= ))|[^\n]{{1,{width}}}"
    settled, made = 2 + sum((generation.confidence[0] < level).long() for level in (0.75, 0.5, 0.25)), []
    for step in (-1, *generation.steps()):
        now, before = (generation.state_after(s)[0] for s in (step, max(step - 1, -1)))
        states = torch.where(now == MASK_ID, 0, torch.where(now != before, 1, settled)).tolist()
        cells = [(tokenizer.decode([token]) or "·", state) for token, state in zip(now.tolist(), states)]
        for i, (glyph, state) in enumerate(cells):
            if glyph == "\n":  # visible when new, or where the finished text has no line break
                cells[i] = ("" if state > 1 and finished[i] == "\n" else "↵", state)
        made.append([cells[slice(*match.span())] for match in re.finditer(line, finished)])
    return made


def filmstrip(generation: Generation, tokenizer: CharTokenizer, frames: int = 8, width: int = 64) -> Figure:
    """A figure of one generation: a strip for each of some passes, newly committed characters marked, masks as grey blocks."""
    shown = pages(generation, tokenizer, width)
    picked, strip = sorted({round(k) for k in np.linspace(0, len(shown) - 1, frames)}), len(shown[0]) + 0.7
    figure = Figure(figsize=(10, 0.24 * strip * len(picked)), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-7, width), ylim=(len(picked) * strip, -0.3))
    axes.axis("off")
    style = {"family": "monospace", "fontsize": 9, "ha": "center", "va": "center"}
    for top, k in zip(itertools.count(0, strip), picked):
        axes.text(-7, top + 0.5, f"pass {k}", fontsize=9, va="center", color="#555555")
        for x, y, glyph, state in ((x, top + y, *cell) for y, line in enumerate(shown[k]) for x, cell in enumerate(line)):
            if state < 2:
                axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=(MASK_FACE, NEW_FACE)[state]))
            weight = "bold" if state == 1 else "normal"
            axes.text(x + 0.5, y + 0.5, glyph.replace("$", r"\$").strip(MASK_GLYPH), weight=weight, **style)
    return figure


def frames(generation: Generation, tokenizer: CharTokenizer, width: int = 64) -> list[str]:
    """`pages` as escaped HTML: masked characters in <i>, just committed ones in <u>, doubtful ones in <s>."""
    marks = ("<i>{}</i>", "<u>{}</u>", "{}", *(f"<s style=--doubt:{doubt}>{{}}</s>" for doubt in (0.2, 0.4, 0.7)))
    made, wanted = [], int((generation.order[0] >= 0).sum())
    for k, page in enumerate(pages(generation, tokenizer, width)):
        runs = [itertools.groupby(line, key=lambda cell: cell[1]) for line in page]
        lines = ["".join(marks[state].format(html.escape("".join(g for g, _ in run))) for state, run in line) for line in runs]
        left = sum(state == 0 for line in page for _, state in line)
        numbers = f"pass {k} of {generation.nfe} · {wanted - left} of {wanted} characters · t = {left / max(wanted, 1):.2f}"
        made.append(f'<div class="llada">{numbers}<pre>' + "\n".join(lines) + "</pre></div>")
    return made


# <u> and a block say the state without any style too. An exported page lacks the icon font of Play: it gets plain signs.
FRAME_STYLE = f"""<style>
.llada-viewer {{ font-family: system-ui, sans-serif; }} .llada {{ font: 13px/1.5 system-ui, sans-serif; color: inherit; }}
.llada pre {{ margin: 4px 0; font: 14px/1.5 monospace; white-space: pre; color: inherit; background: none; }}
.llada i {{ color: {MASK_COLOR}; font-style: normal; }} .llada s {{ text-decoration: none; }}
.llada u {{ color: #000; background: {NEW_FACE}; font-weight: bold; }}
.llada-viewer:has(.llada-shade input:checked) s {{ background: rgb(0 114 178 / var(--doubt)); }}
.llada-viewer .fa-play::before {{ content: "▶"; }} .llada-viewer .fa-pause::before {{ content: "❚❚"; }}
.llada-viewer .fa-stop::before {{ content: "■"; }} .llada-viewer .fa-retweet::before {{ content: "↻"; }}
.llada-pages > .p-TabPanel-tabBar {{ display: none !important; }} .llada-pages > .widget-tab-contents {{ border: 0; padding: 0; }}
</style>"""


class DenoisingViewer(widgets.VBox):
    """Films, by name, of HTML frames (see `frames`) to step through: slider, play and pause with a speed, a choice, a shade.

    All of it is linked in the browser and moves without a kernel: in nbconvert's HTML, in nbviewer, in JupyterLab. The darker the
    shade, the less probable a character was when it was committed (below 0.75, 0.5, 0.25).
    """
    def __init__(self, films: dict[str, list[str]]):
        self.choice, self.links = widgets.Dropdown(options=list(films), layout={"width": "auto"}), []
        self.speed = widgets.IntSlider(150, min=50, max=1000, step=50, description="ms per pass")
        self.shade = widgets.Checkbox(False, description="shade doubtful characters", indent=False, layout={"width": "auto"})
        self.shade.add_class("llada-shade")
        self.panels = self._stack([self._panel(film) for film in films.values()])
        self.links.append(widgets.jslink((self.choice, "index"), (self.panels, "selected_index")))
        super().__init__([widgets.HTML(FRAME_STYLE), widgets.HBox([self.choice, self.speed, self.shade]), self.panels])
        self.add_class("llada-viewer")

    @staticmethod
    def _stack(children: list) -> widgets.Widget:
        """Shows one child at a time. ipywidgets 7, which Colab's page speaks, has no Stack: there, tabs with a hidden bar."""
        stack = getattr(widgets, "Stack", widgets.Tab)(children, selected_index=0)
        return stack.add_class("llada-pages")

    def _panel(self, film: list[str]) -> widgets.Widget:
        first = widgets.HTML(film[0])  # the others share its layout and style, which would be most of the saved notebook
        stack = self._stack([first, *(widgets.HTML(frame, layout=first.layout, style=first.style) for frame in film[1:])])
        slider = widgets.IntSlider(0, max=len(film) - 1, description="pass", layout={"width": "480px"})
        play = widgets.Play(max=len(film) - 1, interval=self.speed.value)
        pairs = ((play, slider, "value"), (slider, stack, "selected_index"), (self.speed, play, "interval"))
        self.links += [widgets.jslink((source, "value"), (target, trait)) for source, target, trait in pairs]
        return widgets.VBox([widgets.HBox([play, slider]), stack])


# 10. Presets ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preset:
    """Sizes and iterations of Parts 1 to 8; what lies beyond has its own, under the same names: smoke, cpu, cpu_long, gpu."""
    name: str
    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    llada: TrainConfig
    ar: TrainConfig
    nelbo_samples: int  # masks per validation window in the final evaluation
    texts: int  # generated texts per decoder, a multiple of GROUPS
    blanks: int  # windows with a blank to fill
    candidates: int  # AR's guesses per blank, for rescoring
    repeats: int  # generations from the same prompt
    step_counts: tuple[int, ...]
    compiled: bool = False

    def model(self, vocab_size: int, causal: bool, **changes) -> ModelConfig:
        sizes = {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "dropout": self.dropout, **changes}
        return ModelConfig(vocab_size, self.seq_len, causal=causal, **sizes)

    def jobs(self, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, Job]:
        """The two trainings of Part 6."""
        kinds = (("LLaDA", False, self.llada), ("AR", True, self.ar))
        return {name: Job(self.model(vocab_size, causal), config, train_ids, val_ids) for name, causal, config in kinds}


PRESETS = {
    "smoke": Preset(
        "smoke", 64, 2, 2, 32, 0.0, *[TrainConfig(200, 16, evals=5, eval_windows=32)] * 2, nelbo_samples=1, texts=16, blanks=16,
        candidates=2, repeats=4, step_counts=(4, 16, 64)),
    "cpu": Preset(
        "cpu", 128, 5, 4, 128, 0.0, llada=TrainConfig(3150, 32, 0.015, evals=21), ar=TrainConfig(1060, 32, weight_decay=0.2),
        compiled=True, nelbo_samples=8, texts=64, blanks=300, candidates=4, repeats=32, step_counts=(8, 16, 32, 64, 128)),
    "gpu": Preset(
        "gpu", 256, 6, 6, 384, 0.2, llada=TrainConfig(6000, 64, adamw_lr=2e-3, weight_decay=0.1, evals=30),
        ar=TrainConfig(2000, 64, adamw_lr=2e-3, weight_decay=0.1, evals=20), compiled=True,
        nelbo_samples=16, texts=128, blanks=1000, candidates=8, repeats=32, step_counts=(8, 16, 32, 64, 128, 256)),
}  # fmt: skip
LONG = replace(PRESETS["cpu"], name="cpu_long", seq_len=256, n_layer=6, n_head=5, n_embd=160)
PRESETS["cpu_long"] = replace(LONG, llada=TrainConfig(6000, 16, 0.015, evals=15), ar=TrainConfig(1500, 16, weight_decay=0.1))


def choose_preset() -> Preset:
    """$LLADA_PRESET if it is set, else "gpu" where there is one, else "cpu"."""
    name = os.environ.get("LLADA_PRESET") or ("gpu" if best_device() == "cuda" else "cpu")
    if name not in PRESETS:
        raise ValueError(f"LLADA_PRESET={name!r}: pass one of {', '.join(PRESETS)}")
    if name == "gpu" and best_device() == "cpu":
        print("No GPU here: the two trainings of the gpu preset take about 30 hours of two CPU cores; cpu_long suits these.")
    return PRESETS[name]
