"""LLaDA, a masked diffusion language model, next to an autoregressive (AR) baseline, on characters.

    text -> CharTokenizer -> ids -> windows -> forward_process -> mask predictor -> llada_loss -> train
         -> reverse_process -> ids -> text;        the same windows -> nelbo / ar_nll -> tables

A *mask predictor* is any callable from ids [B, L] to logits [B, L, V]: losses, samplers and estimators take somebody else's
model or an exact oracle, too. Losses and likelihoods are in nats (bits = nats / ln 2); equation numbers are those of Nie et al.
2025, "Large Language Diffusion Models" (arXiv:2502.09992).
"""

import collections
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
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from pydoc_data import topics

import ipywidgets as widgets
import numpy as np
import pandas as pd
import requests
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from filelock import FileLock
from huggingface_hub import PyTorchModelHubMixin
from IPython.display import HTML, Markdown, display
from scipy import stats
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MaskPredictor = Callable[[Tensor], Tensor]
# Which proposals stay: (tokens [B, L], distributions [B, L, V], masked [B, L], how many are due [B]) -> BoolTensor[B, L].
# It may bring a `schedule` of its own, see `evenly`: which masks are open at a step, and how many of them are due.
Strategy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# 1. Data -------------------------------------------------------------------------------------------------------------
PAD_ID, MASK_ID, START_ID, END_ID = range(4)
SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[START]", "[END]")
WORD = re.compile(r"[A-Za-z']+")
GROUPS = 8  # samples are scored in this many groups, whose spread gives the intervals
MASK_GLYPH = "█"
CORPUS_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
OFFLINE_CORPUS = "\n\n".join(text for _, text in sorted(topics.topics.items()))  # Python's own help
CACHED = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llada", "tinyshakespeare.txt")
CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def _refuse(wrong: bool, said: str) -> None:
    if wrong:
        raise ValueError(said)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a neighbour of `path` that is then renamed: a reader, or a kill, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def load_text(path: str | os.PathLike | None = None) -> str:
    r"""The corpus with "\n" line ends: `path`, else `$LLADA_DATA`, the cached download, the download (its SHA-256 checked), else,
    loudly, Python's own help texts. ValueError: a file that cannot be read, is empty or not UTF-8 text."""
    if path := path or os.environ.get("LLADA_DATA"):
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # all line ends become "\n"
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as UTF-8 ({error}); pass a text file that can (iconv -t UTF-8)") from error
        _refuse(not text.strip() or "\0" in text, f"{path} is empty, only white space or has NUL; pass a UTF-8 text")
        return text
    for read in (CACHED.read_bytes, lambda: requests.get(CORPUS_URL, timeout=(5, 30)).content):
        with contextlib.suppress(OSError):  # requests' exceptions are OSErrors, too
            if is_corpus(data := read()):
                with contextlib.suppress(OSError):  # a text that cannot be kept is there all the same
                    write_atomically(CACHED, data)
                return data.decode()
    said = "TINYSHAKESPEARE COULD NOT BE DOWNLOADED: Python's own help texts stand in, no number is comparable."
    warnings.warn(f"{said} Save {CORPUS_URL} as {CACHED}, or set LLADA_DATA to any UTF-8 text.", stacklevel=2)
    return OFFLINE_CORPUS


def is_corpus(text: bytes) -> bool:
    """Is it TinyShakespeare? Its checksum says so, never the name of a file."""
    return hashlib.sha256(text).hexdigest() == CORPUS_SHA256


def corpus_name(text: str) -> str:
    """What tables and figure titles call `text`: the checksum decides; figures may lack the letters of a file's name."""
    own = Path(os.environ.get("LLADA_DATA", "unnamed")).stem
    own = f"own text ({own})" if own.isascii() else "own text"
    name = "offline corpus (Python help topics)" if text == OFFLINE_CORPUS else own
    return "TinyShakespeare" if is_corpus(text.encode()) else name


def require(text: str, preset: "Preset") -> None:
    """ValueError, before anything is trained, unless each tenth of `text` fills a window: validation and test take one each."""
    needs = f"pass a longer one, or set LLADA_PRESET: {preset.name} needs {10 * preset.seq_len:,}"
    _refuse(len(text) < 10 * preset.seq_len, f"the text has {len(text):,} characters; {needs}")


class CharTokenizer:
    """Characters to ids: [PAD] 0, [MASK] 1, [START] 2, [END] 3, then the sorted characters. No text spells a special token."""
    pad_id, mask_id, start_id, end_id = PAD_ID, MASK_ID, START_ID, END_ID

    def __init__(self, characters: str):
        _refuse(not 0 < len(characters) == len(set(characters)), f"characters={characters!r}: pass some, each of them once")
        self.characters, self.vocab_size = characters, len(SPECIAL_TOKENS) + len(characters)
        self._id_of = {c: i for i, c in enumerate([*SPECIAL_TOKENS, *characters])}
        self._shown = ["", MASK_GLYPH, "", "", *characters]

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """LongTensor[len(text)]. ValueError names the characters that the vocabulary lacks."""
        if unknown := sorted(set(text) - self._id_of.keys()):
            raise ValueError(f"characters not in the vocabulary: {unknown}; use characters of the training text only")
        return torch.tensor([self._id_of[c] for c in text], dtype=torch.long)

    def decode(self, ids) -> str:
        """Text up to the first [END]; [MASK] is shown as a block, other special tokens are skipped."""
        return "".join(self._shown[i] for i in itertools.takewhile(lambda i: i != END_ID, torch.as_tensor(ids).tolist()))

    def to_json(self) -> str:
        return json.dumps({"special_tokens": SPECIAL_TOKENS, "characters": self.characters})

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        """ValueError if `text` is not what to_json returned."""
        match json.loads(text):
            case {"special_tokens": [*special], "characters": str() | list() as known} if special == [*SPECIAL_TOKENS]:
                return cls(known)
        raise ValueError("pass what to_json returned")


def split(ids: Tensor, fraction: float = 0.8) -> tuple[Tensor, Tensor]:
    """The first `fraction` of ids for training, the rest for validation: by position, so that they do not overlap."""
    cut = int(fraction * len(ids))
    _refuse(not 0 < cut < len(ids), f"{fraction} of {len(ids)} ids leaves a part empty; pass a longer text, or 0 < fraction < 1")
    return ids[:cut], ids[cut:]


def windows(ids: Tensor, seq_len: int, stride: int | None = None, pad_id: int = PAD_ID) -> Tensor:
    """Cut ids [n] into windows [N, seq_len], `stride` apart (default: end to end). The last one is padded, nothing dropped."""
    stride = seq_len if stride is None else stride
    fits = ids.ndim == 1 and len(ids) and 1 <= stride <= seq_len
    _refuse(not fits, f"ids {tuple(ids.shape)}, {seq_len=}, {stride=}: pass ids [n] and 1 <= stride <= seq_len")
    padding = max(0, math.ceil((len(ids) - seq_len) / stride)) * stride + seq_len - len(ids)
    return F.pad(ids, (0, padding), value=pad_id).unfold(0, seq_len, stride).contiguous()


# 2. Forward process --------------------------------------------------------------------------------------------------
def _uniform(shape, like: Tensor, generator: torch.Generator | None, dtype=torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives, so that a CPU seed means the same on every device."""
    return torch.rand(shape, generator=generator, device=(generator or like).device, dtype=dtype).to(like.device)


def _check(a: dict, maskable: Callable, lowest: float) -> None:
    """ValueError for what is out of range among arguments, known by their names; fills in defaults."""
    name, ids = next((name, a[name]) for name in a if name in ("sequences", "template", "prompt"))
    _refuse(ids.ndim != 2 or ids.dtype != torch.long, f"{name} is {ids.dtype} {tuple(ids.shape)}; pass ids LongTensor [B, L]")
    for name in {"steps", "n_samples", "length"} & a.keys():
        _refuse(a[name] < 1, f"{name}={a[name]}: pass at least 1")
    if config := getattr(a.get("model"), "config", None):
        seen = map(int, ids.aminmax()) if ids.numel() and ids.device.type == "cpu" else ()  # no GPU waits
        used = {a.get("mask_id", 0), a.get("start_id", 0), *a.get("forbidden", ()), *seen}
        wrong = not 0 <= min(used) <= max(used) < config.vocab_size
        _refuse(wrong, f"ids {min(used)} to {max(used)}: pass some, and mask_id, below vocab_size = {config.vocab_size}")
        length, longest = ids.shape[1] + a.get("length", 0), getattr(config, "seq_len", math.inf)
        _refuse(length > longest, f"the sequence has {length} tokens, the model's seq_len is {longest}; pass a shorter one")
    for name in {"maskable", "mask", "counted"} & a.keys():
        if a[name] is None:
            a[name] = ids != a["pad_id"] if "pad_id" in a else maskable(ids)
        _refuse(a[name].shape != ids.shape or a[name].dtype != torch.bool, f"{name}: pass BoolTensor {list(ids.shape)}")
    if a.get("t") is not None:
        t = torch.as_tensor(a["t"], dtype=torch.float32, device=ids.device)
        fits = t.shape in ((), (len(ids),)) and bool(((t >= lowest) & (t <= 1)).all())
        _refuse(not fits, f"t={t.tolist()}: pass one time or {len(ids)}, one a row, in {'(' if lowest else '['}0, 1]")
        a["t"] = t.expand(len(ids))
    if "top_p" in a:
        _refuse(not 0 <= a["temperature"] < math.inf, f"temperature={a['temperature']}: pass one >= 0, where 0 is argmax")
        _refuse(not 0 < a["top_p"] <= 1, f"top_p={a['top_p']}: pass one in (0, 1], where 1 is all")
    if "prompt" in a:
        _refuse(bool((ids == PAD_ID).any()), "what follows [PAD] would go on from it; pass prompts of one length, without [PAD]")
    if "template" in a:
        a["remasking"] = named_strategy(a["remasking"], a["generator"], a["block_length"])
        _refuse(not bool((ids == a["mask_id"]).any()), "nothing to fill: pass a template with mask_id where tokens are wanted")


def _checked(maskable: Callable = lambda ids: torch.ones_like(ids, dtype=torch.bool), lowest: float = 0.0) -> Callable:
    """Decorator: checks arguments by their names; defaults: `maskable`(ids) BoolTensor[B, L]; `lowest`: of the times."""
    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            _check(bound.arguments, maskable, lowest)
            return function(*bound.args, **bound.kwargs)
        return wrapped
    return decorate


@_checked()
def forward_process(sequences: Tensor, t: float | Tensor, mask_id: int, maskable: Tensor | None = None,
                    generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Mask each token of sequences [B, L] with probability t, [B] or one number: x_t and what is masked, both [B, L] (Eqs. 7-8).

    `maskable`: BoolTensor[B, L], default all. ValueError: t outside [0, 1], or shapes that do not fit.
    >>> ids, generator = torch.tensor([[5, 6, 7, 8, 9, 5]]), torch.Generator().manual_seed(0)
    >>> forward_process(ids, 0.5, MASK_ID, generator=generator)[0].tolist()
    [[1, 6, 1, 1, 1, 5]]
    """
    mask = (_uniform(sequences.shape, sequences, generator) < t[:, None]) & maskable
    return sequences.masked_fill(mask, mask_id), mask


def stratified_times(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """FloatTensor[B] in (0, 1]: one uniform number shifted across the batch, for less noise (Kingma et al. 2021)."""
    shift = torch.rand(1, generator=generator, device=generator.device if generator is not None else None)
    return (torch.arange(batch_size, 0, -1, device=shift.device) - shift) / batch_size  # float32 rounding never makes it 0


# 3. Model ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Transformer. `causal` is all that tells AR (True) from LLaDA (False). `rotary_base`: at 200 the slowest
    rotation turns once in a thousand characters. `attention_scale`: the largest logit of attention, as q and k are normalised."""
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
        fits = min(*astuple(self)[:5], self.rotary_base) > 0 and self.n_embd % (2 * self.n_head) == 0 and 0 <= self.dropout < 1
        _refuse(not fits, f"{self}: pass positive sizes, n_embd divisible by 2 * n_head (rotary) and dropout in [0, 1)")


class KVCache:
    """Keys and values of all positions, [2, n_layer, B, H, seq_len, D]: exact if causal; LLaDA's change with later characters."""
    def __init__(self, config: ModelConfig, batch_size: int, like: Tensor):
        self.kept = like.new_zeros(2, config.n_layer, batch_size, config.n_head, config.seq_len, config.n_embd // config.n_head)
        self.padded = torch.zeros(batch_size, config.seq_len, dtype=torch.bool, device=like.device)
        self.length = 0

    def mark(self, start: int, padded: Tensor) -> Tensor:
        """Note which positions of a slice are [PAD]; BoolTensor[B, length], true where nothing may attend to."""
        self.length = max(self.length, start + padded.shape[1])
        self.padded[:, start : start + padded.shape[1]] = padded
        return self.padded[:, : self.length]

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a slice's keys and values [B, H, l, D]; returns those of all positions so far."""
        self.kept[:, layer, :, :, start : start + k.shape[2]] = torch.stack((k, v))
        return self.kept[:, layer, :, :, : self.length].unbind()


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

    [PAD] is never attended to; `padding` says whether ids hold any, at None it looks, for which a GPU has to stop."""
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
        wrong = ids.ndim != 2 or start + ids.shape[1] > self.config.seq_len
        _refuse(wrong, f"ids {tuple(ids.shape)} from position {start}: pass [B, L] with L <= {self.config.seq_len}")
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
METRICS = ("step", "tokens", "seconds", "train_loss", "val_loss", "train_acc", "val_acc", "lr", "grad_norm")
TRAINING_PATH = "2"  # raise it with any change to this file that makes a training end with other weights
POWER = 1.5  # of the masking schedule in training, t = u^POWER; see diffusion_batch


def real_tokens(sequences: Tensor) -> Tensor:
    """BoolTensor[B, L]: everything but padding, what pre-training learns."""
    return sequences != PAD_ID


@_checked(real_tokens, lowest=1e-38)
def diffusion_batch(sequences: Tensor, generator: torch.Generator | None = None, maskable: Tensor | None = None,
                    mask_id: int = MASK_ID, t: float | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x_t, targets x_0 and weights, all [B, L]: 1/t on masked tokens, over the n maskable ones of the row (Eq. 3).

    By default t = u^p, p = `POWER`, draws small t more often, and dt = p u^(p-1) du enters the weight: same expectation (MD4, Shi
    et al. 2024). `maskable`: BoolTensor[B, L], default all but padding. ValueError: t outside (0, 1], wrong shapes."""
    dt_du, n = 1.0, maskable.sum(dim=1).clamp(min=1)
    if t is None:
        u = stratified_times(len(sequences), generator).to(sequences.device)
        t, dt_du = u**POWER, POWER * u ** (POWER - 1)
    inputs, mask = forward_process(sequences, t, mask_id, maskable, generator)
    weight = mask / t[:, None] * (dt_du / n)[:, None]
    return inputs, sequences, weight


def next_token_batch(sequences: Tensor, generator: torch.Generator | None = None, counted: Tensor | None = None,
                     start_id: int = START_ID, pad_id: int = PAD_ID) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [START] x_1 ... x_{L-1}, targets x_1 ... x_L (Eq. 2), weights that make the batch a mean over its counted tokens."""
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    counted = (sequences != pad_id if counted is None else counted).float()
    return inputs, sequences, counted * (len(sequences) / counted.sum().clamp(min=1))


def weighted_nll(model: MaskPredictor, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows of sum_i weight_i * -log p(target_i | inputs). What is said where the weight is 0 does not matter."""
    counted = targets.masked_fill(weight == 0, -100)  # cross_entropy passes over -100
    nll = F.cross_entropy(model(inputs).flatten(0, 1), counted.flatten(), reduction="none")
    return (weight.flatten() * nll).sum() / len(inputs)


@_checked(lowest=1e-38)
def llada_loss(model: MaskPredictor, sequences: Tensor, mask_id: int, t: float | Tensor | None = None,
               maskable: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Eq. 3: mean over sequences [B, L] of (1/t) * (sum of the masked tokens' cross-entropies) / n, nats per token.

    Its expectation is the NELBO (Eq. 4); Eq. 5 where the prompt is not maskable. n: the maskable tokens of the row.
    t: in (0, 1], one number or FloatTensor[B], default: see `diffusion_batch`. maskable: BoolTensor[B, L], default all."""
    inputs, targets, weight = diffusion_batch(sequences, generator, maskable, mask_id, t)
    return weighted_nll(model, inputs, targets, weight)


@_checked()
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
    """Muon (Jordan et al. 2024) for groups that have `parts`, AdamW for the rest. Equal shapes are one product."""
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
    muon = {"params": list(matrices), "lr": config.muon_lr, "parts": list(matrices.values())}
    adamw = {"params": [p for p in model.parameters() if p not in matrices], "lr": config.adamw_lr}
    return Muon([group | {"peak": group["lr"]} for group in (muon, adamw) if group["params"]], config.weight_decay)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to zero: 0 < factor <= 1."""
    rise, fall = max(1, config.warmup * config.steps), max(1, config.decay * config.steps)
    return min(1.0, (step + 1) / rise, (config.steps - step) / fall)


@dataclass(frozen=True)
class Job:
    """Everything that decides what a training makes, and so its fingerprint. `train_ids`, `val_ids`: LongTensor[n], a text, or
    [N, seq_len], sequences, of which `eval_windows`, evenly spread, validate. `make_batch`: (sequences [B, L], generator, learned
    [B, L]) -> (inputs, targets, weights). `learned`: sequences -> BoolTensor[B, L], what is masked or predicted, the response for
    SFT. These and `architecture` go by their names. `start`: whose weights to begin with."""
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


# A finished or interrupted training: the best model, the metrics as a DataFrame, the record as a dictionary, the directory.
Run = collections.namedtuple("Run", ("model", "metrics", "summary", "path"))


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
    """Batch, loss, backward, step, log, save. Over processes and micro-batches Accelerate sums the gradient."""
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
    A run is known by its fingerprint, `name` is for the reader. Under `root`, runs/NAME-FINGERPRINT/ gets run.json, metrics.csv,
    TensorBoard events, checkpoints/NAME-FINGERPRINT/ best/ and, to go on from, last.state and previous.state. LLADA_RETRAIN=1
    trains from the start, Ctrl-C returns what there is. Processes of `accelerate launch` share each batch, a second call waits.
    `compiled`: if it works. ValueError: a count < 1, a batch of no equal parts, no sound state. RuntimeError: divergence."""
    config, parts, device = job.train, max(1, job.train.accumulation), best_device()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision(), gradient_accumulation_steps=parts)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # Muon's products on tensor cores (TF32)
    shares = accelerator.num_processes * config.accumulation
    n = job.train_ids.numel(), job.val_ids.numel()
    wrong = min(*n, config.steps, config.batch_size, config.evals, config.eval_windows, shares) < 1 or config.batch_size % shares
    _refuse(wrong, f"{config}, {n} ids: pass some, a batch for {accelerator.num_processes} processes x {parts} micro-batches")
    log = TrainingLog(name, job, Path(root), accelerator, quiet)
    with log.alone(), torch._dynamo.config.patch(suppress_errors=True):  # where nothing can be compiled, eager will do
        accelerator.wait_for_everyone()
        if log.complete():
            if not quiet:
                print(f"{name}: complete since before, loaded from {log.path}")
            return log.run()
        torch.manual_seed(job.train.seed)
        model = job.architecture(job.model).to(accelerator.device)
        model.load_state_dict((job.start or model).state_dict())
        optimizer = make_optimizer(model, job.train)
        log.start(model, optimizer)
        network, prepared = accelerator.prepare(model, optimizer)
        for block in model.blocks if compiled else ():
            block.compile()
        try:
            log.write()
            training_loop(network, prepared, job, accelerator, log)
            log.record["complete"] = True
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted at step {log.step}; goes on from the checkpoint, if there is one, in {log.best.parent}")
        finally:
            log.write()
        return log.run()


class TrainingLog:
    """What a training leaves behind: its record, metrics, TensorBoard events, the best model and the state to go on from."""
    def __init__(self, name: str, job: Job, root: Path, accelerator: Accelerator, quiet: bool):
        self.job, self.accelerator, self.mark, self.main = job, accelerator, job.fingerprint(), accelerator.is_main_process
        folder = min((path.name for path in root.glob(f"runs/*-{self.mark}")), default=f"{name}-{self.mark}")  # whatever its name
        self.path, self.best = root / "runs" / folder, root / "checkpoints" / folder / "best"
        self.states = [self.best.with_name(f"{age}.state") for age in ("last", "previous")]
        self.step, self.rows, self.noted, self.anew = 0, [], [], os.environ.get("LLADA_RETRAIN") == "1"
        self.eval_steps = {round(job.train.steps * (i + 1) / job.train.evals) for i in range(job.train.evals)}
        self.record, self.silent = {"name": name, "complete": False, **job.settings()}, quiet or not self.main

    def alone(self) -> contextlib.AbstractContextManager:
        """Wait for whoever else is at this training. The system takes the lock from a process that is killed."""
        try:
            return FileLock(self.path / f"lock{self.accelerator.process_index or ''}").acquire()
        except (OSError, NotImplementedError):  # where nothing can be written, or locked, finished runs can be read
            return contextlib.nullcontext()

    def complete(self) -> bool:
        """Whether the run is complete; then `record` is what it left. What is missing is remade, without best/ from the start."""
        with contextlib.suppress(OSError, ValueError):
            if not self.anew and (self.best / "model.safetensors").exists() and (self.path / "metrics.csv").exists():
                self.record = json.loads((self.path / "run.json").read_text())
        return self.record["complete"]

    def start(self, model: nn.Module, optimizer: Muon) -> None:
        """Take the newest sound state, if there is one, and begin the record."""
        self.model, self.optimizer, job, accelerator = model, optimizer, self.job, self.accelerator
        for left_by_a_kill in (*self.path.glob(".*.*"), *self.best.parent.rglob(".*.*")) if self.main else ():
            left_by_a_kill.unlink()
        found = [path for path in self.states if path.exists() and not self.anew and (self.best / "model.safetensors").exists()]
        for path in found:
            try:
                notes = load_state(path, self.mark, model, optimizer)
                break
            except ValueError as error:
                if path == found[-1]:
                    raise
                warnings.warn(f"{error}; going on from the one before it", stacklevel=4)
        if found:
            self.rows, self.step, scaler = notes["rows"], notes["rows"][-1]["step"], notes.get("scaler")
            if scaler and accelerator.scaler:
                accelerator.scaler.load_state_dict(scaler)
            elif scaler or accelerator.scaler:
                warnings.warn(f"going on in {accelerator.mixed_precision} precision, unlike before", stacklevel=4)
            accelerator.wait_for_everyone()
            if self.main and path == self.states[1]:  # or a damaged one would replace it
                os.replace(path, self.states[0])
        model.register_forward_hook(lambda _, ids, logits: setattr(self, "logits", logits.detach()))
        self.twin = job.architecture(job.model).to(accelerator.device).eval()  # eager, no autocast, any shape
        self.record |= {"parameters": sum(p.numel() for p in model.parameters()), "processes": accelerator.num_processes}
        self.record |= {"precision": accelerator.mixed_precision, "characters": job.train_ids.numel(), **describe_machine()}
        self.writer = SummaryWriter(self.path, purge_step=self.step) if self.main else None
        self.started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0)

    def steps_left(self) -> Iterator[int]:
        """The numbers of the steps to make, with a progress bar."""
        first, total, shown = self.step, self.job.train.steps, {"mininterval": 10, "delay": 5, "ncols": 100, "file": sys.stdout}
        self.bar = tqdm(range(first, total), self.record["name"], initial=first, total=total, disable=self.silent, **shown)
        return self.bar

    def note(self, loss: Tensor, targets: Tensor, weight: Tensor) -> None:
        """Keep a micro-batch's loss, and the weights of right predictions and of all, as tensors that nobody waits for."""
        right = weight * (self.logits.argmax(dim=-1) == targets)
        self.noted.append(torch.stack((loss, *torch.stack((right, weight)).sum(dim=(1, 2)) / len(weight))))

    def validate(self, norm: Tensor) -> None:
        """Add a row to the metrics. RuntimeError: a loss not finite, or training's above a blank model's, ln V (in the first
        hundred steps, in which a model may have to unlearn its start, three times that). Overfitting is no error."""
        config, sequences = self.job.train, self.job.validation_sequences()
        train_loss, right, weight = self.accelerator.reduce(torch.stack(self.noted, dim=1).mean(dim=1), "mean").tolist()
        self.twin.load_state_dict(self.model.state_dict())
        val_loss = float(self.job.validation_nats(self.twin, sequences).sum() / self.job.learned(sequences).sum())
        accuracies = right / max(weight, 1e-9), self.job.validation_accuracy(self.twin, sequences)
        factor, tokens = learning_rate_factor(self.step - 1, config), self.step * config.batch_size * self.job.model.seq_len
        counts = self.step, tokens, round(time.perf_counter() - self.started, 2)
        row = dict(zip(METRICS, (*counts, train_loss, val_loss, *accuracies, config.muon_lr * factor, float(norm))))
        blank = math.log(self.job.model.vocab_size) * weight * (1 if self.step > 100 else 3)
        if not (train_loss <= blank and math.isfinite(train_loss + val_loss)):
            raise RuntimeError(f"{row}: worse than a blank model; lower muon_lr or adamw_lr; last checkpoint: {self.best.parent}")
        self.rows, self.noted = [*self.rows, row], []
        self.bar.set_postfix(train=f"{train_loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
        if self.main:
            if all(val_loss < earlier["val_loss"] for earlier in self.rows[:-1]):
                config, weights = json.dumps(asdict(self.twin.config)).encode(), self.twin.state_dict()
                write_atomically(self.best / "config.json", config)
                mark = {"sha256": checksum(config, weights)}
                write_atomically(self.best / "model.safetensors", safetensors.torch.save(weights, mark))
            for key in METRICS[3:]:
                self.writer.add_scalar(key, row[key], self.step)
            scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()
            save_state(*self.states, self.model, self.optimizer, {"fingerprint": self.mark, "rows": self.rows, "scaler": scaler})
        self.write()

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
        model = load_model(self.best, self.job.architecture) if (self.best / "model.safetensors").exists() else self.model.eval()
        model = model.to("cpu" if self.accelerator.device.type == "mps" else self.accelerator.device)  # "mps" lacks float64
        model.padding = None  # training was told of each batch
        exactly = dict.fromkeys(METRICS[2:], lambda number: float(number or math.nan))  # to the last digit
        return Run(model, pd.read_csv(self.path / "metrics.csv", converters=exactly), self.record, self.path)


def checksum(config: bytes, weights: dict[str, Tensor]) -> str:
    """SHA-256 of a model's config.json and weights, kept in the header of its model.safetensors."""
    return hashlib.sha256(config + safetensors.torch.save(weights)).hexdigest()


def load_model(directory: str | os.PathLike, architecture: type = Transformer) -> nn.Module:
    """The model of a run's best/, or what `save_pretrained` wrote, to evaluate. ValueError if it is not there or damaged."""
    try:
        config, data = (Path(directory, name).read_bytes() for name in ("config.json", "model.safetensors"))
        weights, header = safetensors.torch.load(data), data[: 8 + int.from_bytes(data[:8], "little")]
        _refuse(b"sha256" in header and checksum(config, weights).encode() not in header, "the checksum differs")
        model = architecture(ModelConfig(**json.loads(config)))
        model.load_state_dict(weights)
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"no sound model in {directory} ({error}); pass a run's best/, LLADA_RETRAIN=1 remakes it") from error
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
    _refuse(hashlib.sha256(data).digest() != digest, f"the checkpoint {path} is damaged; delete it to train from the start")
    tensors, state = safetensors.torch.load(data), optimizer.state_dict()
    notes = json.loads(bytes(tensors["notes"].tolist()))
    _refuse(notes["fingerprint"] != mark, f"{path} is of another run, {notes['fingerprint']}, not of {mark}; delete it")
    for i, name in (key.split(".")[1:] for key in tensors if key.startswith("optimizer.")):
        state["state"].setdefault(int(i), {})[name] = tensors[f"optimizer.{i}.{name}"]
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    optimizer.load_state_dict(state)
    return notes


def best_device() -> str:
    """"cuda", else a Mac's "mps", if a step of training comes out right there, else "cpu"."""
    with contextlib.suppress(Exception):  # it may lack a kernel, or not be there
        x = torch.eye(4, device="mps", requires_grad=True)
        (x @ x).tanh().sum().backward()
        torch.optim.AdamW([x], fused=True).step()
        torch.testing.assert_close(x.detach().cpu(), torch.eye(4) * (1 - 1e-5) - 1e-3)
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def mixed_precision() -> str:
    """bf16 on GPUs that have it, fp16 with loss scaling on older ones (T4), full precision elsewhere ("no")."""
    return "no" if not torch.cuda.is_available() else "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def describe_machine() -> dict[str, str]:
    """Device and versions, for the first cell and for each run's record."""
    none, commit = subprocess.getstatusoutput("git rev-parse --short HEAD")
    cpu = re.search(r"model name\s*: (.*)", subprocess.getoutput("cat /proc/cpuinfo")) or ["", "CPU"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu[1]}, {torch.get_num_threads()} threads"
    return {"device": device, "python": sys.version.split()[0], "torch": torch.__version__, "commit": "none" if none else commit}


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

    def commit(self, step: int, stay: Tensor, tokens: Tensor, probs: Tensor) -> None:
        """One pass more: `tokens` [B, L], of distributions [B, L, V], become final where BoolTensor[B, L] `stay` is true."""
        _refuse(not bool(stay.any()), "the strategy commits nothing where some is due; return a masked position")
        self.ids, self.order, self.nfe = self.ids.where(~stay, tokens), self.order.masked_fill(stay, step), self.nfe + 1
        self.confidence = self.confidence.where(~stay, probs.gather(-1, tokens[..., None])[..., 0].float())

    def state_after(self, step: int, mask_id: int = MASK_ID) -> Tensor:
        """LongTensor[B, L]: the sequences after `step`; step -1 is the template."""
        return self.ids.masked_fill(self.order > step, mask_id)

    def steps(self) -> list[int]:
        """The steps that committed something for good."""
        return self.order[self.order >= 0].unique().tolist()


def _inference(function):
    """Decorator: no gradients, evaluation mode, and tensors on the model's device, or on the CPU if that has no float64."""
    @functools.wraps(function)
    def wrapped(model, *args, **kwargs):
        module = model if isinstance(model, nn.Module) else nn.Identity()
        device, was_training = next(module.parameters(), args[0]).device, module.training
        home = torch.device("cpu") if device.type == "mps" else device
        there = functools.wraps(model)(lambda ids, **options: model(ids.to(device), **options).to(home))
        args, kwargs = torch.utils._pytree.tree_map(lambda x: x.to(home) if isinstance(x, Tensor) else x, (args, kwargs))
        try:
            module.eval()
            return torch.no_grad()(function)(model if home == device else there, *args, **kwargs)
        finally:
            module.train(was_training)
    return wrapped


def sample_tokens(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None, banned=()) -> Tensor:
    """One token per row of logits [M, V], LongTensor[M]: argmax at temperature 0, else drawn exactly from the nucleus in float64:
    float32 Gumbel noise would lower the temperature (Zheng et al. 2024, arXiv:2409.02908). `banned`: ids never drawn. ValueError:
    logits NaN or +inf, a banned id that is none, no token left."""
    _refuse(not bool((logits < math.inf).all()), "the logits are not finite; pass a model without NaN and infinity")
    _refuse(not {*banned} <= {*range(logits.shape[-1])}, f"{banned=}: pass mask_id and forbidden ids below vocab_size")
    logits = logits.index_fill(-1, torch.tensor(sorted(banned), dtype=torch.long, device=logits.device), -math.inf)
    best, tokens = logits.max(dim=-1)
    _refuse(bool(best.isneginf().any()), "every token that the model allows is forbidden; pass fewer forbidden ids")
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


def evenly(masked: Tensor, n: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
    """The schedule: all masks [B, L] are open; after the step from t to s floor(n (1 - s)) of a row's n masks [B] are filled."""
    return masked, masked.sum(dim=1) - n + n * min(step + 1, steps) // steps


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
    return highest(-probs.topk(2, dim=-1).values.diff(dim=-1)[..., 0], masked, count)


def random_order(generator: torch.Generator | None) -> Strategy:
    """The strategy that commits uniformly chosen positions (Alg. 4 with fixed counts)."""
    return lambda tokens, probs, masked, count: highest(_uniform(masked.shape, masked, generator, torch.float64), masked, count)


def ancestral(generator: torch.Generator | None) -> Strategy:
    """The literal reverse process: from t to s each mask stays one with probability s / t, whatever the others do (Eq. 10)."""
    def schedule(masked: Tensor, n: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        draws = _uniform(masked.shape, masked, generator, torch.float64)
        return masked, (masked & (draws * max(1, steps - step) < 1)).sum(dim=1)  # (t - s) / t = 1 / (steps - step)
    strategy = random_order(generator)
    strategy.schedule = schedule
    return strategy


def blockwise(strategy: Strategy, length: int) -> Strategy:
    """The strategy in blocks of `length` masks, from left to right. ValueError: they do not divide masks or steps."""
    def opened(masked: Tensor) -> Tensor:  # a block is filled before the next: what is left of it is the remainder
        return masked & (masked.cumsum(dim=1) <= (masked.sum(dim=1, keepdim=True) - 1) % length + 1)
    def schedule(masked: Tensor, n: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        blocks = -(-int(n.max()) // max(1, length))
        fits = length > 0 and (length == int(n.max()) or not bool((n % length).any())) and steps % blocks == 0
        _refuse(not fits, f"{steps=}, block_length={length}: pass a divisor of {n.tolist()} masks, {blocks} x n steps")
        block, step = divmod(step, steps // blocks)
        ahead = (n - masked.sum(dim=1)) // length > block  # such a row waits
        inside, due = getattr(strategy, "schedule", evenly)(opened(masked), n.clamp(max=length), step, steps // blocks)
        return inside & ~ahead[:, None], due.masked_fill(ahead, 0)
    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        inside = opened(masked)
        return strategy(tokens, probs, inside, count.minimum(inside.sum(dim=1)))
    commit.schedule = schedule
    return commit


def named_strategy(remasking: str | Strategy, generator: torch.Generator | None, block_length: int | None = None) -> Strategy:
    """The built-in strategy of that name, or the function itself; in blocks, if they have a length."""
    known = {"low_confidence": low_confidence, "random": random_order(generator), "ancestral": ancestral(generator)}
    strategy = {**known, "entropy": entropy, "margin": margin}.get(remasking, remasking)
    _refuse(not callable(strategy), f"remasking={remasking!r}: pass a strategy or one of {', '.join(known)}, entropy, margin")
    return strategy if block_length is None else blockwise(strategy, block_length)


@_checked()
@_inference
def reverse_process(model: MaskPredictor, template: Tensor, *, mask_id: int, steps: int, temperature=0.0, top_p=1.0,
                    remasking: str | Strategy = "low_confidence", block_length: int | None = None,
                    forbidden: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Generation:
    """Fill every [MASK] of the template [B, L], from t = 1 to t = 0: after a step to s, n (1 - s) of n are filled (Algs. 4, 5).

    `remasking`, which tokens stay: "low_confidence" (Alg. 5), "random" (Alg. 4 with fixed counts), "entropy" and "margin", which
    do not look at what was drawn, "ancestral" (each mask with probability (t - s) / t, Eq. 10), or a `Strategy`, which may commit
    more or fewer. steps: forward passes at most, unless a strategy falls behind. temperature: 0 is argmax, else sampling is exact
    in the nucleus of mass `top_p`. block_length: short for `blockwise`. forbidden: ids never to produce, as [MASK]. ValueError:
    an argument out of range, blocks that do not divide, nothing to fill, more than `seq_len` tokens, logits not finite.
    >>> def predict(ids):  # sure of 4, 5, 6, 7, and the surer the further right
    ...     return (torch.eye(8)[4:] * torch.arange(1, 5)[:, None]).expand(len(ids), -1, -1)
    >>> made = reverse_process(predict, torch.tensor([[MASK_ID, 5, MASK_ID, MASK_ID]]), mask_id=MASK_ID, steps=3)
    >>> made.ids.tolist(), made.order.tolist(), made.nfe
    ([[4, 5, 6, 7]], [[2, -1, 1, 0]], 3)
    """
    made, n = Generation(template, torch.full_like(template, -1), nfe=0), (template == mask_id).sum(dim=1)
    schedule = getattr(remasking, "schedule", evenly)
    for step in itertools.count():
        masked, due = schedule(made.ids == mask_id, n, step, steps)  # x_t, and how many are filled on the way to s
        if bool((due > 0).any()):
            logits = model(made.ids)[masked]  # predict
            drawn = sample_tokens(logits, temperature, top_p, generator, {mask_id, *forbidden})  # draw
            tokens = template.masked_scatter(masked, drawn)
            probs = logits.new_zeros(*masked.shape, logits.shape[-1], dtype=torch.float64)
            probs[masked] = logits.double().softmax(dim=-1)
            stay = remasking(tokens, probs, masked, due.clamp(min=0)) & masked  # decide which stay
            made.commit(step, stay, tokens, probs)  # the rest is masked again
        if not bool((made.ids == mask_id).any()):
            return made


def infill(model: MaskPredictor, tokenizer: CharTokenizer, texts: list[str], **options) -> list[str]:
    """Fill texts such as "To [__] or not", an underscore a character; `options`: of `reverse_process`. ValueError: no blank."""
    pieces = [re.split(r"\[(_+)\]", text) for text in texts]  # of each: text, underscores, text, underscores, ..., text
    texts = [["[MASK]" if i % 2 else c for i, piece in enumerate(split) for c in piece] for split in pieces]
    _refuse(not texts or not all("[MASK]" in text for text in texts), "no texts, or no blank in one: mark it with [___]")
    template = nn.utils.rnn.pad_sequence([*map(tokenizer.encode, texts)], batch_first=True, padding_value=PAD_ID)
    made = reverse_process(model, template, mask_id=MASK_ID, **{"forbidden": (PAD_ID, START_ID, END_ID), **options})
    return [tokenizer.decode(row) for row in made.ids]


@_checked()
@_inference
def generate_ar(model: MaskPredictor, prompt: Tensor, length: int, *, start_id: int, temperature=1.0, top_p=1.0,
                forbidden: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Generation:
    """Continue prompt [B, P] by `length` tokens, left to right, each drawn from p(x_i | x_1 ... x_{i-1}) (Eq. 2).

    Our Transformer decodes with cached keys and values, any other causal callable reads the whole prefix each time. Returns ids
    LongTensor[B, P + length]. ValueError: an argument out of range, a padded prompt, more tokens than `seq_len`."""
    own = inspect.unwrap(model)  # where the model is asked on another device
    cache = KVCache(own.config, len(prompt), own.embed.weight) if isinstance(own, Transformer) else None
    ids, confidence = F.pad(prompt, (1, 0), value=start_id), [torch.ones(prompt.shape, device=prompt.device)]
    for _ in range(length):
        new = {"cache": cache, "start": cache.length} if cache else {}  # with a cache only what it has not seen: first the prompt
        logits = model(ids[:, new.get("start", 0) :], **new)[:, -1]
        tokens = sample_tokens(logits, temperature, top_p, generator, forbidden)[:, None]
        confidence.append(logits.softmax(dim=-1).gather(-1, tokens))
        ids = torch.cat((ids, tokens), dim=1)
    order = torch.arange(-prompt.shape[1], length, device=ids.device).clamp(min=-1).expand(len(ids), -1)
    return Generation(ids[:, 1:], order.contiguous(), length, torch.cat(confidence, dim=1))


# 7. Likelihood -------------------------------------------------------------------------------------------------------
def token_nll(model: MaskPredictor, inputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """FloatTensor[..., L], -log p(target | inputs) at counted positions, 0 elsewhere; at most 2^14 tokens per forward pass."""
    result, L = torch.zeros(inputs.shape, device=inputs.device), inputs.shape[-1]
    rows = (x.reshape(-1, L).split(max(1, 2**14 // L)) for x in (result, inputs, targets, counted))
    for part, ids, truth, wanted in zip(*rows):
        part[wanted] = F.cross_entropy(model(ids)[wanted].float(), truth[wanted], reduction="none")
    return result


@_checked()
@_inference
def ar_nll(model: MaskPredictor, sequences: Tensor, start_id: int, pad_id: int = PAD_ID, counted: Tensor | None = None) -> Tensor:
    """Exact -log p of each sequence [B, L] under the AR model, sum_i -log p(x_i | x_1 ... x_{i-1}), FloatTensor[B], nats (Eq. 2).
    `counted` BoolTensor[B, L], default all but padding: the tokens whose conditional probabilities enter."""
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    return token_nll(model, inputs, sequences, counted).sum(dim=1)


def exact_masks(count: Tensor, maskable: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """BoolTensor[K, B, L]: exactly `count` LongTensor[K, B] of each row's `maskable` tokens BoolTensor[B, L], at random."""
    noise = _uniform((*count.shape, maskable.shape[-1]), maskable, generator).masked_fill(~maskable, 2.0)
    return noise.argsort(dim=-1).argsort(dim=-1) < count[..., None]


def stratified_shares(n_samples: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """DoubleTensor[K, B]: row k uniform in [k / K, (k + 1) / K); the B rows of `like` share each stratum in a random order."""
    rank = _uniform((n_samples, len(like)), like, generator).argsort(dim=1)
    shift = (_uniform((n_samples, 1), like, generator, torch.float64) + rank / len(like)) % 1
    return (torch.arange(n_samples, device=like.device)[:, None] + shift) / n_samples


@_checked()
@_inference
def nelbo(model: MaskPredictor, sequences: Tensor, mask_id: int, *, n_samples: int, maskable: Tensor | None = None,
          generator: torch.Generator | None = None) -> Tensor:
    """Bound on -log p of sequences [B, L], [B] nats: for each stratum l, mask exactly l of n, n/l times their cost (Eqs. 4, 14).

    An unbiased estimate of an upper bound. Mask k of K = `n_samples` hides exactly l of a row's n `maskable` tokens, BoolTensor
    [B, L], default all, with l / n uniform in [k / K, (k + 1) / K). ValueError: n_samples < 1, or shapes that do not fit."""
    n = maskable.sum(dim=1)  # [B]
    count = torch.minimum((n * stratified_shares(n_samples, sequences, generator)).long() + 1, n)  # l, [K, B]
    mask = exact_masks(count, maskable, generator)  # [K, B, L]
    x_0 = sequences.expand_as(mask)
    nll = token_nll(model, x_0.masked_fill(mask, mask_id), x_0, mask).sum(dim=-1, dtype=torch.float64)
    return (n / count.clamp(min=1) * nll).mean(dim=0).float()


# 8. Evaluation -------------------------------------------------------------------------------------------------------
def half_width(values) -> float | np.ndarray:
    """Half-width of the 95% interval of the mean of independent values [n] or [n, ...] (Student's t); NaN for a single one."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0) if len(values) > 1 else math.nan


def per_character(nats: Tensor, counts: Tensor, stretches: int = 30) -> tuple[float, float]:
    """Mean nats per character and the half-width of its 95% interval, from nats and characters [N] of a text's windows, in order:
    block bootstrap of the ratio over `stretches` long runs of windows, Student's t; of differences, it is paired. NaN for one."""
    nats, counts = (torch.as_tensor(x).double().cpu().numpy() for x in (nats, counts))
    mean, starts = nats.sum() / counts.sum(), np.unique(np.linspace(0, len(nats), stretches, endpoint=False).astype(int))
    apart, n = np.add.reduceat(nats - mean * counts, starts) / counts.sum(), len(starts)
    if n < 2:
        return float(mean), math.nan
    drawn = stats.bootstrap((apart,), np.sum, method="percentile", n_resamples=2000, rng=0)
    return float(mean), float(stats.t.ppf(0.975, n - 1) * drawn.standard_error * (n / (n - 1)) ** 0.5)


def share(hits) -> tuple[float, float]:
    """The rate of hits, a sequence of zeros and ones, and the longer side of its 95% interval (Wilson's)."""
    rate = float(np.asarray(hits, dtype=float).mean())
    low, high = stats.binomtest(round(rate * len(hits)), len(hits)).proportion_ci(method="wilson")
    return rate, float(max(rate - low, high - rate))


def runs_of(text: str, length: int = 16) -> list[str]:
    """Every run of `length` characters of `text`."""
    return [text[i : i + length] for i in range(len(text) - length + 1)]


def text_metrics(texts: list[str], copies: set[str], words: set[str]) -> dict[str, float]:
    """Scores of texts, given all runs of 16 characters (`copies`) and lower-case `words` of the training text: "known words" of
    the inner ones, "distinct-3" of triples of characters, "char entropy" in nats, "copied", the share of runs that are copies."""
    inner = [word.lower() in words for text in texts for word in WORD.findall(text)[1:-1]]
    triples, runs = ([run for text in texts for run in runs_of(text, length)] for length in (3, 16))
    scores = {"known words": sum(inner) / max(1, len(inner)), "distinct-3": len(set(triples)) / max(1, len(triples))}
    scores["char entropy"] = float(stats.entropy(pd.Series(list("".join(texts)) or [""]).value_counts()))
    return scores | {"copied": sum(run in copies for run in runs) / max(1, len(runs))}


def grouped(values: list[dict[str, float]]) -> dict[str, float]:
    """Mean over groups and, in columns named "... ±", the half-width of its 95% interval (Student's t)."""
    return {k: v for name, x in pd.DataFrame(values).items() for k, v in ((name, x.mean()), (f"{name} ±", half_width(x)))}


# 9. Tables, figures, widgets -----------------------------------------------------------------------------------------
LLADA_COLOR, AR_COLOR, MASK_COLOR, REAL_COLOR = "#0072B2", "#D55E00", "#9A9A9A", "#009E73"  # Okabe & Ito, colour-blind safe
MASK_FACE, NEW_FACE = "#D2D2D2", "#F0E442"  # behind a masked and behind a just committed character
# <u> and a block say the state without any style too. An exported page lacks the icon font of Play: it gets plain signs.
FRAME_STYLE = f"""<style>
.llada-viewer {{ font-family: system-ui, sans-serif; }} .llada {{ font: 13px/1.5 system-ui, sans-serif; color: inherit; }}
.llada pre {{ margin: 4px 0; font: 14px/1.5 monospace; white-space: pre; color: inherit; background: none; }}
.llada i {{ color: {MASK_COLOR}; font-style: normal; }} .llada u {{ color: #000; background: {NEW_FACE}; font-weight: bold; }}
.llada-viewer .fa-play::before {{ content: "▶"; }} .llada-viewer .fa-pause::before {{ content: "❚❚"; }}
.llada-viewer .fa-stop::before {{ content: "■"; }} .llada-viewer .fa-retweet::before {{ content: "↻"; }}
.llada-pages > .p-TabPanel-tabBar {{ display: none !important; }} .llada-pages > .widget-tab-contents {{ border: 0; padding: 0; }}
</style>"""


class Results:
    """Where tables and figures go: `figures/`, or, in `smoke` or on any text but TinyShakespeare, `build/PRESET/figures/`."""
    def __init__(self, preset: "Preset", text: str):
        named = preset.name != "smoke" and is_corpus(text.encode())
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


def number(value: float, half: float = math.nan) -> str:
    """A measured number as text: three significant digits, two below a tenth; whole ones stay whole. With its half-width it is
    "value ± half", to the half-width's second digit (first, if three or more), not beyond the value's third, unless needed."""
    def places(x: float, digits: int) -> int:  # decimal ones, for so many significant digits
        return digits - 1 - int(f"{x:.{digits - 1}e}".partition("e")[2])
    place = 0 if value == int(value) else places(value, 3 if abs(value) >= 0.1 else 2)
    if half > 0:
        place = min(places(value, 3), places(half, 2) - (f"{half:.1e}" >= "3"))
        place = next(p for p in itertools.count(place) if abs(round(half, p) - half) <= half / 2)
    shown = [f"{round(x, place) + 0.0:,.{max(0, place)}f}".replace("-", "−") for x in (value, half)]  # no minus before a zero
    return " ± ".join(shown if half > 0 else shown[:1])


def pretty(table: pd.DataFrame, rows: int | None = 8) -> pd.DataFrame:
    """A table as a page shows it: `rows` of it, by `number`, each value with its "... ±"; speeds have three digits."""
    names, table, shown = list(table), table[:rows], {}
    while names:
        values = table[name := names.pop(0)]
        if pd.api.types.is_numeric_dtype(values) and values.dtype != bool:
            bounded = names and str(names[0]).endswith("±") and not str(name).endswith("±")
            halves = table[names.pop(0)] if bounded else itertools.repeat(math.nan)
            values = [float(f"{x:.2e}") if name == "tokens/s" else x for x in values.astype(float)]
            values = [number(x, half) if math.isfinite(x) else x for x, half in zip(values, halves)]
        shown[name] = ["" if pd.isna(x) else x for x in values]
    return pd.DataFrame(shown, table.index)


def as_html(table: pd.DataFrame) -> str:
    """`pretty` for a notebook, with a line that says how many rows are left out; the first cells make all tables be shown so."""
    left = f"<p>and {len(table) - 8} more rows, which its CSV has</p>" if len(table) > 8 else ""
    return pretty(table).to_html(index=not isinstance(table.index, pd.RangeIndex), na_rep="") + left


def errorbars(ax, table: pd.DataFrame, x: str, y: str, **style) -> None:
    """Column `y` against column `x`, with the intervals of column "y ±"."""
    ax.errorbar(table[x], table[y], table[f"{y} ±"], **{"marker": "o", "ms": 4, "capsize": 3, **style})


def log_ticks(ax, ticks) -> None:
    """A logarithmic x axis that is labelled at just these ticks."""
    ax.set(xscale="log", xticks=ticks, xticklabels=[f"{tick:,}" for tick in ticks])
    ax.minorticks_off()


def show(*things: Callable) -> None:
    """Display the source of functions or classes as Markdown, without private decorators, of docstrings the first paragraph."""
    sources = (re.sub(r"^ *@_.*\n", "", inspect.cleandoc("\n" + inspect.getsource(thing)), flags=re.M) for thing in things)
    paragraphs = r'^( *r?"""(?:(?!"""|\n\s*\n).)*?)\s*(?:\n\s*\n(?:(?!""").)*)?"""'  # the first one, and all others
    code = re.sub(paragraphs, r'\1"""', "\n\n\n".join(sources), flags=re.M | re.S)
    display(Markdown(f"<div style='font-family: monospace'>\n\n```python\n{code}\n```\n\n</div>"))  # or a page sets prose


def pages(generation: Generation, tokenizer: CharTokenizer, width: int = 64) -> list[list[list[tuple[str, int]]]]:
    """The first row before the first pass and after each: pages of lines, at most `width` long, of (glyph, state): 0 masked,
    1 just committed, 2 settled or given. Lines break where those of the finished text do, so that nothing moves."""
    finished, made = "".join(tokenizer.decode([token]) or "·" for token in generation.ids[0].tolist()), []
    line = rf"[^\n]{{0,{width}}}\n|[^\n]{{1,{width}}}(?:\Z|(?<= ))|[^\n]{{1,{width}}}"
    for step in (-1, *generation.steps()):
        now, before = (generation.state_after(s)[0] for s in (step, max(step - 1, -1)))
        states = torch.where(now == MASK_ID, 0, torch.where(now != before, 1, 2)).tolist()
        glyphs = (tokenizer.decode([token]) or "·" for token in now.tolist())
        # A line break is visible when new, or where the finished text has none.
        cells = [("" if g == f == "\n" and s > 1 else g.replace("\n", "↵"), s) for g, f, s in zip(glyphs, finished, states)]
        made.append([cells[slice(*match.span())] for match in re.finditer(line, finished)])
    return made


def frames(generation: Generation, tokenizer: CharTokenizer, width: int = 64) -> list[str]:
    """`pages` as escaped HTML: masked characters in <i>, just committed ones in <u>."""
    made, wanted, marks = [], int((generation.order[0] >= 0).sum()), ("<i>{}</i>", "<u>{}</u>", "{}")
    for k, page in enumerate(pages(generation, tokenizer, width)):
        runs = [itertools.groupby(line, key=lambda cell: cell[1]) for line in page]
        lines = ["".join(marks[state].format(html.escape("".join(g for g, _ in run))) for state, run in line) for line in runs]
        left = sum(state == 0 for line in page for _, state in line)
        numbers = f"pass {k} of {generation.nfe} · {wanted - left} of {wanted} characters · t = {left / max(wanted, 1):.2f}"
        made.append(f'<div class="llada">{numbers}<pre>' + "\n".join(lines) + "</pre></div>")
    return made


def filmstrip(film: list[str], count: int = 8) -> HTML:
    """Some of a film's `frames`, the first and the last among them, below each other: for where no script runs."""
    return HTML(FRAME_STYLE + "\n".join(film[k] for k in sorted({round(k) for k in np.linspace(0, len(film) - 1, count)})))


class DenoisingViewer(widgets.VBox):
    """Films, by name, of `frames`: slider, play, speed, choice, linked in the browser, so that exported pages need no kernel."""
    def __init__(self, films: dict[str, list[str]]):
        self.stack = getattr(widgets, "Stack", widgets.Tab)  # Colab's ipywidgets 7 has no Stack: there, tabs with a hidden bar
        self.choice, self.links = widgets.Dropdown(options=list(films), layout={"width": "auto"}), []
        self.speed = widgets.IntSlider(150, min=50, max=1000, step=50, description="ms per pass")
        self.panels = self.stack([self._panel(film) for film in films.values()], selected_index=0).add_class("llada-pages")
        self.links.append(widgets.jslink((self.choice, "index"), (self.panels, "selected_index")))
        super().__init__([widgets.HTML(FRAME_STYLE), widgets.HBox([self.choice, self.speed]), self.panels])
        self.add_class("llada-viewer")

    def _panel(self, film: list[str]) -> widgets.Widget:
        first = widgets.HTML(film[0])  # the others share its layout and style, which would be most of the saved notebook
        others = (widgets.HTML(frame, layout=first.layout, style=first.style) for frame in film[1:])
        stack = self.stack([first, *others], selected_index=0).add_class("llada-pages")
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
    step_counts: tuple[int, ...] = (8, 16, 32, 64, 128)  # of the decoders that are compared
    nelbo_samples: int = 8  # masks per validation window in the final evaluation
    texts: int = 64  # generated texts per decoder, a multiple of GROUPS
    blanks: int = 300  # windows with a blank to fill
    compiled: bool = True

    def model(self, vocab_size: int, causal: bool) -> ModelConfig:
        return ModelConfig(vocab_size, self.seq_len, self.n_layer, self.n_head, self.n_embd, self.dropout, causal)

    def jobs(self, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, Job]:
        """The two trainings of Part 6."""
        names = {"LLaDA": self.llada, "AR": self.ar}
        return {name: Job(self.model(vocab_size, name == "AR"), config, train_ids, val_ids) for name, config in names.items()}


LITTLE = TrainConfig(200, 16, evals=5, eval_windows=32)
PRESETS = {preset.name: preset for preset in (
    Preset("smoke", 64, 2, 2, 32, 0.0, LITTLE, LITTLE, (4, 16, 64), 1, 16, blanks=16, compiled=False),
    Preset("cpu", 128, 5, 4, 128, 0.0, TrainConfig(3150, 32, 0.015, evals=21), TrainConfig(1060, 32, weight_decay=0.2)),
    Preset("gpu", 256, 6, 6, 384, 0.2, TrainConfig(6000, 64, adamw_lr=2e-3, weight_decay=0.1, evals=30),
           TrainConfig(2000, 64, adamw_lr=2e-3, weight_decay=0.1, evals=20), (8, 16, 32, 64, 128, 256), 16, 128, 1000),
    Preset("cpu_long", 256, 6, 5, 160, 0.0, TrainConfig(6000, 16, 0.015, evals=15), TrainConfig(1500, 16, weight_decay=0.1)),
)}  # fmt: skip


def choose_preset() -> Preset:
    """$LLADA_PRESET if it is set, else "gpu" where there is one, else "cpu"."""
    name = os.environ.get("LLADA_PRESET") or ("gpu" if torch.cuda.is_available() else "cpu")
    _refuse(name not in PRESETS, f"LLADA_PRESET={name!r}: pass one of {', '.join(PRESETS)}")
    if name == "gpu" and not torch.cuda.is_available():
        print("No GPU here: the two trainings of the gpu preset take about 30 hours of two CPU cores; cpu_long suits these.")
    return PRESETS[name]
