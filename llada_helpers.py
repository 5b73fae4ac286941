"""LLaDA, a masked diffusion language model, next to an autoregressive (AR) baseline, on characters.

The sections follow the data:

    text -> CharTokenizer -> ids -> windows -> forward_process -> mask predictor -> llada_loss -> train
         -> reverse_process -> ids -> text;        the same windows -> nelbo / ar_nll -> tables

The sections, and what to look up in each first, as in help(llada_helpers.train):

    1. Data                      load_text, CharTokenizer, split, windows
    2. Forward process           forward_process, stratified_times
    3. Model                     ModelConfig, Transformer
    4. Losses                    llada_loss, next_token_loss
    5. Training                  TrainConfig, Job, train, runs_table
    6. Reverse process           reverse_process, infill, generate_ar, Generation
    7. Likelihood                nelbo, ar_nll, log_likelihood, choose
    8. Evaluation                per_character, text_metrics
    9. Tables, figures, widgets  save_table, fill_report, save_report
    10. Presets                  PRESETS, choose_preset
    11. Experiments              run_jobs, experiment; python llada_helpers.py --help

Three ideas keep the module small. A *mask predictor* is any callable from ids [B, L] to logits [B, L, V], so that every
loss, sampler and estimator below also takes somebody else's model or an exact oracle. LLaDA and AR are one Transformer
that differs in `causal` alone. Training step s is a pure function of (seed, s).

Losses and likelihoods are in nats; bits = nats / ln 2; perplexity = exp(nats per character). Equation numbers are those
of Nie et al. 2025, "Large Language Diffusion Models" (arXiv:2502.09992).
"""

import argparse
import ast
import base64
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
import tempfile
import textwrap
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
    """Where the downloaded corpus is kept (and where it can be put by hand).

    >>> cache_path().name
    'tinyshakespeare.txt'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llada" / "tinyshakespeare.txt"


@contextlib.contextmanager
def _atomically(path: Path):
    """A temporary neighbour of `path` to write into, renamed at the end: a reader, or a kill, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    os.replace(temporary, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a kill, never sees half a file.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "new" / "a.txt", b"whole")
    ...     (Path(folder) / "new" / "a.txt").read_text()
    'whole'
    """
    with _atomically(path) as temporary:
        temporary.write_bytes(data)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the text file {path}: {error}; pass the path of a readable text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); pass a UTF-8 file, such as iconv -t UTF-8 makes") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{path} is {'only white space' if text else 'empty'}; pass a file with some text in it")
    if "\0" in text:
        raise ValueError(f"{path} has NUL characters, as UTF-16 and binary files do; pass a UTF-8 text file")
    return text


def _offline_corpus() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def load_text(path: str | os.PathLike | None = None) -> str:
    r"""The corpus as one string with "\n" line ends.

    The first of these that is there: `path`, `$LLADA_DATA`, the cached download, the download (checked against
    SHA-256, written atomically), and, with a loud warning, an offline corpus (the topics of Python's own `pydoc_data`).

    Raises:
        ValueError: `path` or `$LLADA_DATA` cannot be read, is empty, white space or not UTF-8 text.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "own.txt").write_bytes(b"To be,\r\nor not")
    ...     load_text(Path(folder) / "own.txt")
    'To be,\nor not'
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
    """The name that tables and figure titles give to `text`.

    >>> corpus_name(_offline_corpus())
    'offline corpus (Python help topics)'
    """
    if hashlib.sha256(text.encode()).hexdigest() == CORPUS_SHA256:
        return "TinyShakespeare"
    if text == _offline_corpus():
        return "offline corpus (Python help topics)"
    return Path(os.environ.get("LLADA_DATA") or "own text").stem


class CharTokenizer:
    """Characters to ids: [PAD] 0, [MASK] 1, [START] 2, [END] 3, the sorted characters, then your own `special` tokens.

    Words may stand for characters: a list of words is a text as well. Special tokens are named in lists only: no text spells one.

    >>> tokenizer = CharTokenizer.from_text("banana")
    >>> tokenizer.encode("nab").tolist()
    [6, 4, 5]
    >>> tokenizer.decode([2, 6, 4, 1, 3, 5])
    'na█'
    >>> words = CharTokenizer.from_text(["I", "love", "pizza"], special=("[SEP]",))
    >>> words.encode(["[START]", "I", "[SEP]", "pizza"]).tolist(), words.decode([4, 5, 6])
    ([2, 4, 7, 6], 'I love pizza')
    """

    pad_id, mask_id, start_id, end_id = PAD_ID, MASK_ID, START_ID, END_ID

    def __init__(self, characters: str | list[str], special: tuple[str, ...] = ()):
        known = [*SPECIAL_TOKENS, *characters, *special]
        if len(set(known)) != len(known) or not characters or "" in known:
            raise ValueError("characters must be distinct, not empty, and at least one; use CharTokenizer.from_text(text)")
        if any(len(name) < 2 for name in special):
            raise ValueError(f"special={special}: pass names of two characters or more, such as [SEP], which no text spells")
        self.characters, self.special = characters, tuple(special)
        self.vocab_size = len(known)
        self._id_of = {c: i for i, c in enumerate(known)}
        self._shown = ["", MASK_GLYPH, "", "", *characters, *("" for _ in special)]
        self._gap = "" if isinstance(characters, str) else " "

    @classmethod
    def from_text(cls, text: str | list[str], special: tuple[str, ...] = ()) -> "CharTokenizer":
        if not text:
            raise ValueError("the text is empty; pass at least one character")
        found = sorted(set(text).difference(SPECIAL_TOKENS, special))
        return cls("".join(found) if isinstance(text, str) else found, special)

    def encode(self, text: str | list[str]) -> Tensor:
        """LongTensor[len(text)]. ValueError names the characters that the vocabulary lacks."""
        unknown = sorted(set(text) - self._id_of.keys())
        if unknown:
            raise ValueError(f"characters not in the vocabulary: {unknown}; use characters of the training text only")
        return torch.tensor([self._id_of[c] for c in text], dtype=torch.long)

    def decode(self, ids) -> str:
        """Text up to the first [END], with spaces between words; [MASK] is shown as a block, other special tokens are skipped."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if END_ID in ids:
            ids = ids[: ids.index(END_ID)]
        return self._gap.join(filter(None, (self._shown[i] for i in ids)))

    def to_json(self) -> str:
        return json.dumps({"special_tokens": [*SPECIAL_TOKENS, *self.special], "characters": self.characters})

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        try:
            made = json.loads(text)
            characters, names = made["characters"], made.get("special_tokens", [*SPECIAL_TOKENS])
            known = isinstance(characters, (str, list)) and all(isinstance(c, str) for c in characters)
            if not known or names[: len(SPECIAL_TOKENS)] != [*SPECIAL_TOKENS]:
                raise TypeError(f"special_tokens={names}, characters={characters}")
            return cls(characters, tuple(names[len(SPECIAL_TOKENS) :]))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tokenizer ({error!r}); pass what to_json returned") from error

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json, for instance beside the weights of `Transformer.save_pretrained`."""
        write_atomically(Path(directory) / "tokenizer.json", self.to_json().encode())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "CharTokenizer":
        """The tokenizer of `save_pretrained`. ValueError if it is not there or damaged."""
        return cls.from_json(_read_text(Path(directory) / "tokenizer.json"))


def split(ids: Tensor, fraction: float = 0.8) -> tuple[Tensor, Tensor]:
    """The first `fraction` of ids for training, the rest for validation: by position, so that no sentence is in both.

    Raises:
        ValueError: one of the parts would be empty.

    >>> [part.tolist() for part in split(torch.arange(5), 0.6)]
    [[0, 1, 2], [3, 4]]
    """
    cut = int(fraction * len(ids))
    if not 0 < cut < len(ids):
        raise ValueError(f"{fraction} of {len(ids)} ids leaves a part empty; pass a longer text, or 0 < fraction < 1")
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


SPEECH = re.compile(r"(?:\A|(?<=\n\n))([^\n:]+):\n(?!\n)(.+?)(?=\n\n|\n?\Z)", re.DOTALL)


def dialogue(text: str) -> list[tuple[str, str, str]]:
    r"""(speech before, speaker, speech) for every speech of a play, "NAME:\n" before it and an empty line after it.

    >>> dialogue("ROMEO:\nAy me!\n\nJULIET:\nWhat's he?\n\nROMEO:\nI.")
    [('', 'ROMEO', 'Ay me!'), ('Ay me!', 'JULIET', "What's he?"), ("What's he?", 'ROMEO', 'I.')]
    """
    speeches = SPEECH.findall(text)
    return [(before, *speech) for before, speech in zip(["", *(words for _, words in speeches)], speeches)]


def instruction_rows(pairs: list[tuple], tokenizer: CharTokenizer, seq_len: int, prompt_len: int) -> Tensor:
    """Rows for SFT (Eq. 5), LongTensor[N, seq_len]: prompt [START] response [END] ... [END]; see `response_tokens`.

    [END] is an ordinary token: the model learns where to stop, and what fills the rest. [START], which is in no text, separates.

    Args:
        pairs: (prompt, response), each a text. A prompt keeps its last `prompt_len` tokens; a pair whose response does not leave
            room for one [END] after a full prompt is left out.

    Raises:
        ValueError: no room for any response, or no pair that fits.

    >>> tokenizer = CharTokenizer.from_text("abcd")
    >>> instruction_rows([("abc", "d"), ("a", "bcd")], tokenizer, seq_len=5, prompt_len=2).tolist()  # "bcd" would not fit
    [[5, 6, 2, 7, 3]]
    """
    room = seq_len - prompt_len - 2
    if room < 1 or prompt_len < 1:
        raise ValueError(f"prompt_len={prompt_len} of seq_len={seq_len}: leave room for [START], a response and [END]")
    rows = [
        F.pad(torch.cat((tokenizer.encode(prompt)[-prompt_len:], torch.tensor([START_ID]), tokenizer.encode(response))),
              (0, seq_len), value=END_ID)[:seq_len]
        for prompt, response in pairs if len(response) <= room
    ]  # fmt: skip
    if not rows:
        raise ValueError(f"no response has {room} tokens or fewer; pass pairs with shorter ones, or a larger seq_len")
    return torch.stack(rows)


def byte_pairs(text: str, merges: int, alphabet: str = ""):
    """A byte-pair tokenizer (Sennrich et al. 2016) of the `tokenizers` library: special tokens 0 to 3, characters, then merges.

    Words are merged with the space before them, never with each other, and punctuation with its line ends.

    Args:
        text: what the merges are learned from.
        merges: at most so many; a short text has fewer.
        alphabet: characters to know beyond those of `text`; any other is dropped in silence, as this library does.

    >>> pairs = byte_pairs("banana bandana", merges=4)
    >>> pairs.encode("banana").tokens, pairs.decode(pairs.encode("a banana").ids), pairs.token_to_id("[MASK]")
    (['ban', 'ana'], 'a banana', 1)
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    known = sorted(set(text + alphabet))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    options = {"special_tokens": list(SPECIAL_TOKENS), "initial_alphabet": known, "show_progress": False}
    size = len(SPECIAL_TOKENS) + len(known) + merges
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, **options))
    tokenizer.encode_special_tokens = True  # as characters: a text that spells [MASK] has no mask
    return tokenizer


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

    >>> ids, generator = torch.tensor([[5, 6, 7, 8, 9, 5]]), torch.Generator().manual_seed(0)
    >>> forward_process(ids, 0.5, MASK_ID, generator=generator)[0].tolist()
    [[1, 6, 1, 1, 1, 5]]
    >>> forward_process(ids, 1.0, MASK_ID, maskable=ids > 6)[0].tolist()
    [[5, 6, 1, 1, 1, 5]]
    """
    maskable = _check_maskable(sequences, maskable)
    t = _check_times(t, sequences, lowest_included=True)
    mask = (_uniform(sequences.shape, sequences, generator) < t[:, None]) & maskable
    return sequences.masked_fill(mask, mask_id), mask


def stratified_times(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """FloatTensor[B] in (0, 1]: one uniform number shifted across the batch, so that each B-th of (0, 1] is hit once.

    Every t_b is uniform, so the loss stays unbiased, with less noise than independent draws (Kingma et al. 2021).

    >>> (4 * stratified_times(4)).ceil().tolist()  # one time in each quarter of (0, 1], whatever was drawn
    [4.0, 3.0, 2.0, 1.0]
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

    >>> llada = ModelConfig(vocab_size=69, seq_len=128, n_layer=5, n_head=4, n_embd=128)
    >>> ar = replace(llada, causal=True)
    >>> replace(llada, n_embd=126)
    Traceback (most recent call last):
    ValueError: n_embd=126 with n_head=4: pass n_embd divisible by 2 * n_head (rotary)
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

    >>> config = ModelConfig(vocab_size=9, seq_len=6, n_layer=1, n_head=1, n_embd=8, causal=True)
    >>> model, ids = Transformer(config), torch.tensor([[4, 5, 6, 7]])
    >>> for weight in model.parameters():
    ...     _ = nn.init.normal_(weight, std=0.3)
    >>> cache = KVCache(config, batch_size=1, like=model.head.weight)
    >>> with torch.no_grad():
    ...     parts = [model(ids[:, :3], cache=cache), model(ids[:, 3:], cache=cache, start=3)]
    ...     torch.allclose(torch.cat(parts, dim=1), model(ids), atol=1e-4)
    True
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
    """Pre-norm attention and a ReLU^2 MLP (So et al. 2021), both residual; output projections start at zero.

    >>> block, x = Block(ModelConfig(vocab_size=9, seq_len=6, n_layer=1, n_head=2, n_embd=8)), torch.randn(1, 3, 8)
    >>> torch.equal(block(x, rotary=None), x)  # a fresh block changes nothing
    True
    """

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

    >>> model = Transformer(ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> logits = model(torch.tensor([[4, MASK_ID, 5]]))
    >>> tuple(logits.shape), bool((logits == 0).all()), model.n_parameters  # a fresh model knows nothing
    ((1, 3, 10), True, 928)
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
    """Inputs x_t, targets x_0 and the weights of Eq. 3: 1 / (t_b n_b) on masked tokens, n_b the maskable ones of row b.

    >>> inputs, targets, weight = diffusion_batch(torch.tensor([[5, 6, 7, PAD_ID, PAD_ID]]), t=1.0)
    >>> inputs.tolist(), targets.tolist(), (3 * weight).tolist()
    ([[1, 1, 1, 0, 0]], [[5, 6, 7, 0, 0]], [[1.0, 1.0, 1.0, 0.0, 0.0]])
    """
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
    """Inputs [START] x_1 ... x_{L-1}, targets x_1 ... x_L (Eq. 2), weights that make the batch a mean over its counted tokens.

    >>> inputs, targets, weight = next_token_batch(torch.tensor([[5, 6, PAD_ID], [7, 8, PAD_ID]]))
    >>> inputs.tolist(), targets.tolist(), weight.tolist()
    ([[2, 5, 6], [2, 7, 8]], [[5, 6, 0], [7, 8, 0]], [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    """
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    counted = (sequences != pad_id if counted is None else counted).float()
    return inputs, sequences, counted * (len(sequences) / counted.sum().clamp(min=1))


def real_tokens(sequences: Tensor) -> Tensor:
    """BoolTensor[B, L]: everything but padding, what pre-training learns.

    >>> real_tokens(torch.tensor([[5, MASK_ID, PAD_ID]])).tolist()
    [[True, True, False]]
    """
    return sequences != PAD_ID


def response_tokens(sequences: Tensor, separator: int = START_ID) -> Tensor:
    """BoolTensor[B, L]: the response, what follows the row's first separator; the prompt before it is never masked (Eq. 5).

    >>> response_tokens(torch.tensor([[7, 8, START_ID, 9, END_ID, PAD_ID]])).tolist()
    [[False, False, False, True, True, False]]
    """
    separators = sequences == separator
    return (separators.cumsum(dim=1) > 0) & ~separators & (sequences != PAD_ID)


def weighted_nll(model: MaskPredictor, inputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows of sum_i weight_i * -log p(target_i | inputs). Positions of weight 0 are never looked at.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> weight = torch.tensor([[0.5, 0.5, 0.0]])
    >>> round(float(weighted_nll(blank, torch.tensor([[1, 1, 6]]), torch.tensor([[4, 5, 6]]), weight)), 4)  # ln 8
    2.0794
    """
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

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> ids = torch.full((4000, 16), 5)
    >>> [round(float(llada_loss(blank, ids, MASK_ID, t, generator=torch.Generator().manual_seed(0))), 1) for t in (0.2, 0.5, 1.0)]
    [2.1, 2.1, 2.1]
    """
    maskable = torch.ones_like(sequences, dtype=torch.bool) if maskable is None else maskable
    return weighted_nll(model, *diffusion_batch(sequences, generator, maskable, mask_id, t))


def next_token_loss(model: MaskPredictor, sequences: Tensor, start_id: int, pad_id: int = PAD_ID) -> Tensor:
    """Mean AR cross-entropy, nats per token that is not padding; the first token is scored given [START] (Eq. 2).

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> round(float(next_token_loss(blank, torch.tensor([[4, 5, PAD_ID]]), START_ID)), 4)  # ln 8
    2.0794
    """
    return weighted_nll(model, *next_token_batch(sequences, None, None, start_id, pad_id))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Sizes and iterations, never seconds: a rerun gives the same numbers.

    >>> config = TrainConfig(steps=1000, batch_size=32)
    >>> config.steps * config.batch_size * 128  # characters seen, in windows of 128
    4096000
    >>> replace(config, muon_lr=0.0).seed  # the same with AdamW alone
    0
    """

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
    """Newton-Schulz iteration toward the nearest (semi-)orthogonal matrix, for each of [n, rows, columns].

    >>> values = torch.linalg.svdvals(orthogonalize(torch.tensor([[[3.0, 0.0], [0.0, 0.2]]])))
    >>> bool(((values > 0.6) & (values < 1.3)).all())  # they were 3 and 0.2
    True
    """
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

    >>> weight = nn.Parameter(torch.zeros(2, 2))
    >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.2]])
    >>> Muon([weight], lr=0.1).step()
    >>> (10 * weight).round().tolist()  # small gradients move a matrix as far as large ones
    [[-1.0, 0.0], [0.0, -1.0]]
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
    """Muon for the matrices of the blocks, AdamW for embeddings, head and time conditioning; AdamW alone if `muon_lr` is 0.

    >>> model = Transformer(ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> muon, adamw = make_optimizers(model, TrainConfig(steps=1, batch_size=1))
    >>> [tuple(weight.shape) for weight in adamw.param_groups[0]["params"]]  # embedding and head
    [(10, 8), (10, 8)]
    """
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

    >>> ids = torch.arange(4, 20)
    >>> a, b = (training_batch(ids, 3, 2, seed=0, step=step, make_batch=next_token_batch, learned=real_tokens) for step in (7, 8))
    >>> a[1].tolist(), b[1].tolist()
    ([[9, 10, 11], [10, 11, 12]], [[5, 6, 7], [16, 17, 18]])
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if ids.ndim == 1:
        ids = F.pad(ids, (0, max(0, seq_len - len(ids))), value=PAD_ID).unfold(0, seq_len, 1)
    sequences = ids[torch.randint(len(ids), (batch_size,), generator=generator)]
    return make_batch(sequences, generator, learned(sequences))


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to zero: 0 < factor <= 1.

    >>> config = TrainConfig(steps=100, batch_size=1, warmup=0.1, decay=0.5)
    >>> [learning_rate_factor(step, config) for step in (0, 9, 50, 75, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.02]
    """
    rise, fall = max(1, config.warmup * config.steps), max(1, config.decay * config.steps)
    return min(1.0, (step + 1) / rise, (config.steps - step) / fall)


def optimizer_step(accelerator: Accelerator, network: nn.Module, optimizers: list, batch, config: TrainConfig):
    """Gradient of this process's share of the global batch, clipped, and one step; returns the share's loss and the norm.

    The share is worked off in `accumulation` micro-batches; processes exchange gradients after the last one only. The
    optimizers share one loss scale (fp16), so it is updated once, after both have stepped.

    >>> accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision())
    >>> model = Transformer(ModelConfig(vocab_size=8, seq_len=3, n_layer=1, n_head=1, n_embd=4)).to(accelerator.device)
    >>> config, batch = TrainConfig(steps=1, batch_size=2), next_token_batch(torch.tensor([[4, 5, 6], [5, 6, 7]]))
    >>> loss, norm = optimizer_step(accelerator, model, make_optimizers(model, config), batch, config)
    >>> round(float(loss), 4), bool((model.head.weight != 0).any())  # from ln 8, the blank model's loss, downwards
    (2.0794, True)
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
    """Nats of the learned tokens of each row, FloatTensor[N]: exact for AR, the NELBO with fixed masks for LLaDA.

    >>> blank, rows = lambda ids: torch.zeros(*ids.shape, 8), torch.tensor([[4, 5, 6, PAD_ID]])
    >>> [(validation_nats(blank, rows, real_tokens(rows), ar) / math.log(8)).round(decimals=3).tolist() for ar in (True, False)]
    [[3.0], [3.0]]
    """
    if autoregressive:
        return ar_nll(model, sequences, START_ID, counted=learned)
    return nelbo(model, sequences, MASK_ID, n_samples=4, maskable=learned, generator=torch.Generator().manual_seed(0))


class PostNormEncoder(nn.Module, PyTorchModelHubMixin):
    """The MDLM tutorial's model out of PyTorch's own parts, to compare with: post-norm, learned positions, dropout 0.1.

    >>> model = PostNormEncoder(ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> tuple(model(torch.tensor([[4, 5, 6]])).shape)
    (1, 3, 10)
    """

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


_OWN_SOURCE = Path(__file__).read_text()  # as imported: the file may be edited while experiments run for hours


@functools.cache
def _own_code() -> dict[str, ast.stmt]:
    return {node.name: node for node in ast.parse(_OWN_SOURCE).body if hasattr(node, "name")}


@functools.cache
def _code(thing: Callable) -> str:
    """The source of a function or class without comments and docstrings, so that better words do not mean another training."""
    own = _own_code().get(thing.__name__) if thing.__module__ == __name__ else None
    tree = own or ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


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
        token_lengths: LongTensor[vocab_size], the characters of each token, if they are not one each; for tables per character.

    >>> ids = torch.arange(4, 10).repeat(10)
    >>> job = Job(ModelConfig(10, 8, n_layer=1, n_head=1, n_embd=8), TrainConfig(steps=2, batch_size=2), ids, ids)
    >>> replace(job, train=replace(job.train, seed=1)).fingerprint() == job.fingerprint()
    False
    """

    model: ModelConfig
    train: TrainConfig
    train_ids: Tensor
    val_ids: Tensor
    make_batch: Callable | None = None
    learned: Callable = real_tokens
    start: nn.Module | None = None
    architecture: type = Transformer
    token_lengths: Tensor | None = None

    @property
    def batch_function(self) -> Callable:
        return self.make_batch or (next_token_batch if self.model.causal else diffusion_batch)

    @property
    def autoregressive(self) -> bool:
        return self.batch_function is next_token_batch

    def fingerprint(self) -> str:
        """Twelve hex digits that change with the configuration, the data, the first weights or the code of the training path."""
        code = [_uniform, forward_process, stratified_times, diffusion_batch, _rms_norm, _rotate, Block, self.architecture]
        code += [self.batch_function, self.learned]
        code += [weighted_nll, orthogonalize, Muon, make_optimizers, training_batch, learning_rate_factor, optimizer_step]
        code += [validation_nats]
        digest = hashlib.sha256(json.dumps([asdict(self.model), asdict(self.train)]).encode())
        first = list(self.start.state_dict().values()) if self.start else []
        for tensor in (self.train_ids, self.val_ids, *first):
            digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        for thing in code:
            digest.update(_code(thing).encode())
        return digest.hexdigest()[:12]

    def characters(self, sequences: Tensor) -> Tensor:
        """LongTensor[N]: the learned characters of each row."""
        learned = self.learned(sequences)
        return (learned if self.token_lengths is None else self.token_lengths[sequences] * learned).sum(dim=1)

    def training_characters(self) -> int:
        return int(self.characters(self.train_ids.view(1, -1) if self.train_ids.ndim == 1 else self.train_ids).sum())

    def validation_sequences(self) -> Tensor:
        sequences = windows(self.val_ids, self.model.seq_len) if self.val_ids.ndim == 1 else self.val_ids
        return sequences[torch.linspace(0, len(sequences) - 1, min(self.train.eval_windows, len(sequences))).long()]


@dataclass
class Run:
    """A finished or interrupted training run: the best model, the metrics table, the final numbers, the directory.

    >>> metrics = pd.DataFrame({"step": [10, 20], "val_loss": [2.5, 2.0]})
    >>> run = Run(model=None, metrics=metrics, summary={"best": 2.0, "steps": 20}, path=Path("runs/example"))
    >>> bool(run.summary["best"] == run.metrics["val_loss"].min())
    True
    """

    model: Transformer
    metrics: pd.DataFrame
    summary: dict
    path: Path


def load_model(directory: str | os.PathLike, architecture: type = Transformer) -> nn.Module:
    """`from_pretrained` of a local directory, in evaluation mode, without its chatter on standard output.

    >>> model = Transformer(ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     again = load_model(folder)
    >>> again.config == model.config, again.training
    (True, False)
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return architecture.from_pretrained(directory).eval()


def _save_best(model: nn.Module, directory: Path) -> None:
    """`save_pretrained` into a neighbour, then renamed file by file, so that no reader sees half a checkpoint."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    for file in sorted(temporary.iterdir()):
        os.replace(file, directory / file.name)
    temporary.rmdir()


def _checksum(tensors: dict[str, Tensor], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
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
        notes = json.dumps(meta)
        save_file(tensors, temporary, metadata={"meta": notes, "sha256": _checksum(tensors, notes)})
        if path.exists():
            os.replace(path, older)


def _load_state(path: Path, mark: str, model: nn.Module, optimizers: list) -> dict:
    try:
        with safe_open(path, "pt") as file:
            tensors, notes = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        whole = notes["sha256"] == _checksum(tensors, notes["meta"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}); delete it to train from the start") from error
    if not whole:
        raise ValueError(f"the checkpoint {path} is damaged (its checksum differs); delete it to train from the start")
    meta = json.loads(notes["meta"])
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


def _resume(paths: list[Path], mark: str, model: nn.Module, optimizers: list) -> tuple[dict, Path | None]:
    """What the newest sound checkpoint says of the progress, and its path; ValueError if there are some, but none is sound."""
    refused = []
    for path in filter(Path.exists, paths):
        try:
            progress = _load_state(path, mark, model, optimizers)
        except ValueError as error:
            refused.append(error)
            continue
        for error in refused:
            warnings.warn(f"{error}; going on from the one before it, step {progress['step']}", stacklevel=4)
        return progress, path
    if refused:
        raise refused[0]
    return {"step": 0, "rows": [], "seconds": 0.0, "best": math.inf, "fingerprint": mark}, None


def describe_machine() -> dict[str, str]:
    """Device and versions, for the first cell and for each run's record.

    >>> sorted(describe_machine())
    ['commit', 'device', 'numpy', 'python', 'torch']
    """
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
    """bf16 on GPUs that have it, fp16 with loss scaling on older ones (T4), full precision on CPU.

    >>> mixed_precision() in ("no", "fp16", "bf16")
    True
    """
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


@torch.random.fork_rng()
def train(name: str, job: Job, *, root: str | os.PathLike = ".", compiled: bool = False, quiet: bool = False) -> Run:
    """Train what `job` says, or load the run if it is already complete, or go on where it was interrupted.

    A run is known by its fingerprint; `name` is for the reader. Under `root`, `runs/NAME-FINGERPRINT/` gets run.json,
    metrics.csv, TensorBoard events and, at the end, final.json; `checkpoints/NAME-FINGERPRINT/` gets best/ (config.json,
    model.safetensors) and, with the optimizers' state, last.safetensors and the one before it, previous.safetensors.
    `LLADA_RETRAIN=1` trains from the start whatever is there. Ctrl-C returns what there is. Several processes (`accelerate
    launch`, `torchrun`) share each batch.

    Args:
        compiled: torch.compile the blocks for the training steps.
        quiet: no progress bar, and not a word if the run is only loaded.

    Raises:
        ValueError: no ids, too few steps, a batch that processes and micro-batches cannot share evenly, or no sound checkpoint.
        RuntimeError: the loss is not finite or far above that of a blank model; names the step, the learning rates and the last
            good checkpoint.

    >>> ids = torch.arange(4, 10).repeat(20)  # a text that says abcdefabcdef...
    >>> shape = ModelConfig(vocab_size=10, seq_len=8, n_layer=1, n_head=2, n_embd=8)
    >>> job = Job(shape, TrainConfig(steps=8, batch_size=4, evals=2), ids, ids)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train("abc", job, root=folder, quiet=True)
    ...     again = train("abc", job, root=folder, quiet=True)  # complete: only loaded
    >>> run.metrics["step"].tolist(), run.summary == again.summary, run.summary["best"] < math.log(10)
    ([4, 8], True, True)
    """
    config = job.train
    if not (job.train_ids.numel() and job.val_ids.numel()):
        raise ValueError(f"{job.train_ids.numel()} ids to train on and {job.val_ids.numel()} to validate on: pass some of each")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision())
    if min(config.steps, config.batch_size, config.evals, config.eval_windows, config.accumulation) < 1:
        raise ValueError(f"{config}: pass at least one step, one window a batch, one evaluation of one window")
    if config.batch_size % (accelerator.num_processes * config.accumulation):
        shares = f"{accelerator.num_processes} processes x {config.accumulation} micro-batches"
        raise ValueError(f"batch_size={config.batch_size}: pass a multiple of {shares}")
    mark = job.fingerprint()
    known = sorted(path.name for path in Path(root).glob(f"runs/*-{mark}"))  # the same training, under whatever name
    run_dir, checkpoint_dir = (Path(root) / folder / (known or [f"{name}-{mark}"])[0] for folder in ("runs", "checkpoints"))
    best_dir, final_path = checkpoint_dir / "best", run_dir / "final.json"
    states = [checkpoint_dir / "last.safetensors", checkpoint_dir / "previous.safetensors"]
    fresh = os.environ.get("LLADA_RETRAIN") == "1"
    if not fresh and final_path.exists() and (best_dir / "model.safetensors").exists():
        summary = json.loads(final_path.read_text())
        if not quiet:
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
    progress, source = _resume(states, mark, model, optimizers)
    accelerator.wait_for_everyone()
    if main and source == states[1]:  # else the next save would put the damaged one in its place
        os.replace(states[1], states[0])
    step, rows = progress["step"], progress["rows"]
    network = accelerator.prepare(model)
    if accelerator.scaler and "scaler" in progress:
        accelerator.scaler.load_state_dict(progress["scaler"])
    if compiled and (torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++"))):
        for block in model.blocks:
            block.compile()
    parameters = sum(p.numel() for p in model.parameters())
    twin = job.architecture(job.model).to(accelerator.device).eval()  # for validation: eager, full precision, any shape
    if main:
        record = {"name": name, "fingerprint": mark, "model": asdict(job.model), "train": asdict(config)}
        record |= {"parameters": parameters, "precision": accelerator.mixed_precision}
        record |= {"batch": job.batch_function.__name__, "learned": job.learned.__name__, "characters": job.training_characters()}
        record |= {"data_sha256": hashlib.sha256(job.train_ids.numpy().tobytes()).hexdigest(), **describe_machine()}
        record |= {"architecture": job.architecture.__name__, "processes": accelerator.num_processes}
        write_atomically(run_dir / "run.json", json.dumps(record, indent=1).encode())
    val_sequences = job.validation_sequences()
    val_learned = job.learned(val_sequences)
    blank = math.log(job.model.vocab_size)  # the loss of a model that knows nothing
    eval_steps = {round(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    writer = SummaryWriter(run_dir, purge_step=step) if main else None
    shown = {"desc": name, "file": sys.stdout, "mininterval": 10, "delay": 5, "ncols": 100, "disable": quiet or not main}
    bar = tqdm(total=config.steps, initial=step, **shown)
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
                kept = f"The last good checkpoint is {states[0]}" if states[0].exists() else "There is no checkpoint yet"
                raise RuntimeError(
                    f"{name}: training loss {train_loss:.3g}, validation {val_loss:.3g} at step {step}, {rates}; a blank model "
                    f"has {blank:.2f}. {kept}; lower muon_lr or adamw_lr"
                )
            progress["seconds"] += time.perf_counter() - started
            row = {"step": step, "tokens": step * config.batch_size * job.model.seq_len}
            row |= {"seconds": round(progress["seconds"], 2), "train_loss": train_loss, "val_loss": val_loss}
            rows.append(row | {"lr": config.muon_lr * factor, "grad_norm": float(norm)})
            bar.set_postfix(train=f"{train_loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
            improved = val_loss < progress["best"]
            progress["best"] = min(val_loss, progress["best"])
            if main:
                for key in ("train_loss", "val_loss", "lr", "grad_norm"):
                    writer.add_scalar(key, rows[-1][key], step)
                if improved:
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
    summary |= {"parameters": parameters, "tokens": step * config.batch_size * job.model.seq_len}
    if main and complete:
        write_atomically(final_path, json.dumps(summary, indent=1).encode())
    accelerator.wait_for_everyone()
    saved = (best_dir / "model.safetensors").exists()
    if not saved:
        twin.load_state_dict(model.state_dict())
    best = load_model(best_dir, job.architecture).to(accelerator.device) if saved else twin
    return Run(best, pd.DataFrame(rows), summary, run_dir)


def runs_table(root: str | os.PathLike = ".") -> pd.DataFrame:
    """All runs under `root`/runs, a row each: where their configurations differ, best validation, tokens, seconds, commit.

    >>> record = {"model": {"n_layer": 2}, "parameters": 928, "device": "a CPU", "commit": "none"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for seed in (0, 1):
    ...         note = json.dumps(record | {"train": {"seed": seed}})
    ...         write_atomically(Path(folder, "runs", f"tiny-{seed}", "run.json"), note.encode())
    ...     runs_table(folder)[["row", "seed"]].to_numpy().tolist()
    [['tiny-0', 0], ['tiny-1', 1]]
    """
    rows = []
    for path in sorted(Path(root).glob("runs/*/run.json")):
        record = json.loads(path.read_text())
        metrics = pd.read_csv(path.parent / "metrics.csv") if (path.parent / "metrics.csv").exists() else None
        row = {"row": path.parent.name, "complete": (path.parent / "final.json").exists()}
        row |= {**record["model"], **record["train"]}
        row |= {key: record.get(key) for key in ("architecture", "batch", "learned", "characters", "precision", "processes")}
        row["parameters"] = record["parameters"]
        if metrics is not None:
            row |= {"best validation": metrics["val_loss"].min(), **metrics[["tokens", "seconds"]].iloc[-1].to_dict()}
        rows.append(row | {key: record[key] for key in ("device", "commit")})
    table = pd.DataFrame(rows)
    kept = ["row", "complete", "parameters", "best validation", "tokens", "seconds", "device", "commit"]
    return table[[c for c in table if c in kept or table[c].astype(str).nunique() > 1]]


def plot_curves(runs: dict[str, Run], ax, metric: str = "val_loss", clock: str = "step", colors: dict | None = None) -> None:
    """One metric of several runs against "step", "tokens" or "seconds"; `colors` by the runs' names.

    >>> from matplotlib.figure import Figure
    >>> axes, metrics = Figure().subplots(), pd.DataFrame({"step": [10, 20], "val_loss": [2.5, 2.0]})
    >>> plot_curves({"LLaDA": Run(None, metrics, {}, Path("runs/example"))}, axes)
    >>> axes.lines[0].get_label(), axes.get_xlabel(), axes.get_ylabel()
    ('LLaDA', 'step', 'val_loss')
    """
    for name, run in runs.items():
        ax.plot(run.metrics[clock], run.metrics[metric], label=name, color=(colors or {}).get(name))
    ax.set(xlabel=clock, ylabel=metric)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Reverse process
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Generation:
    """What a sampler made. Every intermediate state follows from `ids` and `order` (see `state_after`), or is in `states`.

    >>> made = Generation(ids=torch.tensor([[7, 8, 9]]), order=torch.tensor([[-1, 1, 0]]), nfe=2)
    >>> [made.state_after(step)[0].tolist() for step in (-1, 0, 1)]
    [[7, 1, 1], [7, 1, 9], [7, 8, 9]]
    """

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

    >>> logits = torch.tensor([[0.0, 2.0, 1.0, -math.inf]]).expand(1000, -1)  # probabilities 0.09, 0.67, 0.24, 0
    >>> sample_tokens(logits, 1.0, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=4).tolist()
    [80, 685, 235, 0]
    >>> sample_tokens(logits, 1.0, 0.7, torch.Generator().manual_seed(0)).bincount(minlength=4).tolist()
    [0, 738, 262, 0]
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

    >>> def predict(ids):  # sure of 4, 5, 6, 7, and the surer the further right
    ...     return (torch.eye(8)[4:] * torch.arange(1, 5)[:, None]).expand(len(ids), -1, -1)
    >>> made = reverse_process(predict, torch.tensor([[MASK_ID, 5, MASK_ID, MASK_ID]]), mask_id=MASK_ID, steps=3)
    >>> made.ids.tolist(), made.order.tolist(), made.nfe
    ([[4, 5, 6, 7]], [[2, -1, 1, 0]], 3)
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

    >>> tokenizer = CharTokenizer.from_text("abcd")
    >>> alphabet = lambda ids: torch.eye(8)[4:][: ids.shape[1]].expand(len(ids), -1, -1)  # sure of abcd
    >>> infill(alphabet, tokenizer, ["a[_]c[_]", "[__]c"], steps=2)
    ['abcd', 'abc']
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

    >>> successor = lambda ids: 9 * torch.eye(8)[(ids + 1).clamp(max=7)]  # after 4 comes 5, after 5 comes 6, ...
    >>> generate_ar(successor, torch.tensor([[4, 5]]), 2, start_id=START_ID).ids.tolist()
    [[4, 5, 6, 7]]
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
def ar_nll(model: MaskPredictor, sequences: Tensor, start_id: int, pad_id: int = PAD_ID, counted: Tensor | None = None) -> Tensor:
    """Exact -log p of each sequence under the AR model, FloatTensor[B], nats (Eq. 2).

    `counted` BoolTensor[B, L], default all but padding: the tokens whose conditional probabilities enter, given all before them.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> rows = torch.tensor([[4, 5, 6], [4, PAD_ID, PAD_ID]])
    >>> (ar_nll(blank, rows, START_ID) / math.log(8)).round(decimals=3).tolist()
    [3.0, 1.0]
    """
    inputs = F.pad(sequences[:, :-1], (1, 0), value=start_id)
    counted = sequences != pad_id if counted is None else _check_maskable(sequences, counted)
    sequences, inputs, counted = _on_device(model, sequences, inputs, counted)
    return _nll(model, inputs, sequences, counted).sum(dim=1)


def _on_device(model, *tensors: Tensor):
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return tensors if parameter is None else [t.to(parameter.device) for t in tensors]


@_inference
def masked_nll(model: MaskPredictor, sequences: Tensor, mask: Tensor, mask_id: int) -> Tensor:
    """-log p(x_i | the tokens outside `mask`) where mask BoolTensor[B, L] is true, 0 elsewhere; FloatTensor[B, L], nats.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> mask = torch.tensor([[False, True, True]])
    >>> (masked_nll(blank, torch.tensor([[4, 5, 6]]), mask, MASK_ID) / math.log(8)).round(decimals=3).tolist()
    [[0.0, 1.0, 1.0]]
    """
    sequences, mask = _on_device(model, sequences, _check_maskable(sequences, mask))
    return _nll(model, sequences.masked_fill(mask, mask_id), sequences, mask)


def exact_masks(count: Tensor, maskable: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """BoolTensor[K, B, L]: exactly `count` LongTensor[K, B] of each row's `maskable` tokens BoolTensor[B, L], at random.

    >>> masks = exact_masks(torch.tensor([[1], [2]]), torch.tensor([[True, True, False, True]]))
    >>> tuple(masks.shape), masks.sum(dim=-1).tolist(), bool(masks[..., 2].any())
    ((2, 1, 4), [[1], [2]], False)
    """
    noise = _uniform((*count.shape, maskable.shape[-1]), maskable, generator).masked_fill(~maskable, 2.0)
    return noise.argsort(dim=-1).argsort(dim=-1) < count[..., None]


MANY_SAMPLES = 16  # from here on, nelbo spends more of its masks on small l


@_inference
def nelbo(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    n_samples: int,
    maskable: Tensor | None = None,
    cfg_scale: float = 0.0,
    common_masks: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate of an upper bound on -log p of each sequence, FloatTensor[B], nats (Eqs. 4 and 6).

    Each of a row's K = `n_samples` masks hides exactly l of its n maskable tokens and weighs their cross-entropies by n / l.
    Three things lower the noise and leave the expectation alone:

    - l is stratified: mask k draws s uniformly from [k / K, (k + 1) / K), shifted against each other over the rows; l / n is s.
      The rows share the strata among them in their order: to average over a part of the rows, call it with just these.
    - A mean over l tokens is the noisier, the fewer they are. With many samples l / n is therefore s^2, which makes small l more
      frequent, and dx = 2 s ds adds the weight 2 s.
    - What the *other* K - 1 masks say is a control variate r_i for mask k, with its exact expectation added back: a level (with
      many samples, a line in l / n), plus how much harder than that token i was. Mask k is independent of it, so
      E[w (n / l) sum_masked r_i] = E[w] sum_maskable r_i.

    Args:
        maskable: BoolTensor[B, L], what is scored; default everything.
        common_masks: all rows get the same masks (common random numbers; rows must be maskable in the same places).

    Raises:
        ValueError: n_samples < 1, or shapes that do not fit.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> (nelbo(blank, torch.tensor([[4, 5, 6, 7]]), MASK_ID, n_samples=4) / math.log(8)).round(decimals=3).tolist()
    [4.0]
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: pass at least 1")
    maskable = _check_maskable(sequences, maskable)
    sequences, maskable = _on_device(model, sequences, maskable)
    (B, L), n = sequences.shape, maskable.sum(dim=1)
    many = n_samples >= MANY_SAMPLES
    power = 2 if many else 1
    drawn = slice(0, 1) if common_masks else slice(None)
    shift = _uniform((n_samples, 1), sequences, generator, torch.float64)
    shift = (shift + torch.arange(B, device=n.device)[drawn] / B) % 1
    edge = torch.arange(n_samples + 1, device=n.device, dtype=torch.float64)[:, None] / n_samples
    s = edge[:-1] + shift / n_samples  # [K, B], or [K, 1] if the masks are common
    x, weight = s**power, power * s ** (power - 1)
    count = torch.minimum((n[drawn] * x).long() + 1, n[drawn])
    mask = exact_masks(count, maskable[drawn], generator).expand(n_samples, B, L)
    rows = [z.expand_as(mask).reshape(-1, L) for z in (sequences, ~maskable, mask)]
    nll = _nll(model, rows[0].masked_fill(rows[2], mask_id), rows[0], rows[2], rows[1], mask_id, cfg_scale)
    nll = nll.view_as(mask).double()

    def others(values: Tensor) -> Tensor:
        return values.sum(dim=0) - values

    known = nll.clamp(max=100.0)  # an impossible token costs infinity, but must not enter its own baseline as infinity - infinity
    total, hidden = known.sum(dim=-1), mask.double()
    size, size_x, level = others(count.double()).clamp(min=1), others(count * x), others(total)
    slope = torch.zeros_like(level)
    if many:  # least squares, each mask's mean weighing l
        spread = size * others(count * x * x) - size_x**2
        slope = torch.where(spread > 0, (size * others(total * x) - size_x * level) / spread.clamp(min=1e-12), 0.0)
    level = (level - slope * size_x) / size
    seen = others(hidden)
    harder = others(known) - level[..., None] * seen - slope[..., None] * others(hidden * x[..., None])
    harder = harder / (seen + 1) * maskable  # shrunk toward zero, since few masks say little
    baseline = (level + slope * x)[..., None] + harder
    w, wx = n_samples * (edge**power).diff(dim=0), n_samples * (edge ** (2 * power)).diff(dim=0) / 2  # means over s
    estimate = weight * n / count.clamp(min=1) * ((nll - baseline) * hidden).sum(dim=-1)
    estimate = estimate + n * (level * w + slope * wx) + w * harder.sum(dim=-1)
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

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> (any_order_nll(blank, torch.tensor([[4, 5, 6]]), MASK_ID, n_orders=2) / math.log(8)).round(decimals=3).tolist()
    [[3.0], [3.0]]
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
    """Lower bound on log p(response | prompt), nats, at most 0; prompt LongTensor[P] stays visible (Eq. 6).

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> round(log_likelihood(blank, torch.tensor([4, 5]), torch.tensor([6]), MASK_ID, n_samples=2), 4)  # -ln 8
    -2.0794
    """
    return choose(model, prompt, [response], mask_id, n_samples=n_samples, cfg_scale=cfg_scale, generator=generator)[1][0]


def choose(
    model: MaskPredictor,
    prompt: Tensor,
    options: list[Tensor],
    mask_id: int,
    *,
    n_samples: int,
    cfg_scale: float = 0.0,
    suffix: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[int, list[float]]:
    """Index of the likeliest option after prompt LongTensor[P], and each option's log-likelihood bound in nats (Eq. 6).

    `suffix` LongTensor[S]: what stands after the option and is seen too. Options of one length are scored in one batch, hidden by
    the same masks (common random numbers), which takes shared noise out of the comparison.

    Raises:
        ValueError: no option, an empty one, or shapes that are not vectors.

    >>> alphabet = lambda ids: 5 * torch.eye(8)[4:].expand(len(ids), -1, -1)  # sure of 4, 5, 6, 7
    >>> index, scores = choose(alphabet, torch.tensor([4, 5]), [torch.tensor([7, 6]), torch.tensor([6, 7])], MASK_ID, n_samples=4)
    >>> index, [round(score, 2) for score in scores]
    (1, [-10.09, -0.09])
    """
    if not options or any(o.ndim != 1 or len(o) == 0 for o in options) or prompt.ndim != 1:
        raise ValueError("pass a prompt of shape [P] and at least one option of shape [R], R >= 1")
    suffix = prompt[:0] if suffix is None else suffix
    seed = int(_uniform((1,), prompt, generator, torch.float64) * 2**53)
    scores = torch.zeros(len(options))
    for length in {len(option) for option in options}:
        chosen = [i for i, option in enumerate(options) if len(option) == length]
        rows = torch.stack([torch.cat((prompt, options[i], suffix)) for i in chosen])
        position = torch.arange(rows.shape[1], device=rows.device)
        maskable = ((position >= len(prompt)) & (position < len(prompt) + length)).expand_as(rows)
        same = {"common_masks": True, "generator": torch.Generator().manual_seed(seed)}
        bounds = nelbo(model, rows, mask_id, n_samples=n_samples, maskable=maskable, cfg_scale=cfg_scale, **same)
        scores[chosen] = -bounds.cpu().clamp(min=0.0)  # the control variate may overshoot by a little, log p cannot
    return int(scores.argmax()), scores.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# 8. Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def per_character(nats: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean nats per character over windows and the half-width of its 95% interval (normal, ratio estimator).

    Args:
        nats, counts: [N], the nats and the number of characters of each window.

    >>> mean, half = per_character(torch.tensor([20.0, 22.0]), torch.tensor([10, 10]))
    >>> round(mean, 3), round(half, 3)
    (2.1, 0.196)
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
    """The sorted beginnings, COPY_LIMIT characters each, of everything in `corpus`: what `longest_copy` looks up.

    >>> copy_index("banana")
    ['a', 'ana', 'anana', 'banana', 'na', 'nana']
    """
    return sorted(corpus[i : i + COPY_LIMIT] for i in range(len(corpus)))


def longest_copy(text: str, index: list[str]) -> int:
    """Length of the longest run of `text` that stands verbatim in the corpus of `index`, at most COPY_LIMIT.

    >>> longest_copy("a bandana", copy_index("banana"))
    3
    """
    best = 0
    for i in range(len(text)):
        piece = text[i : i + COPY_LIMIT]
        place = bisect.bisect_left(index, piece)
        for near in index[max(0, place - 1) : place + 1]:  # the longest match is a neighbour in sorted order
            while best < len(piece) and near.startswith(piece[: best + 1]):
                best += 1
    return best


def text_metrics(texts: list[str], index: list[str], words: set[str]) -> dict[str, float]:
    """Coherence and diversity of one group of texts; the training text gives `index` (`copy_index`) and lower-case `words`.

    >>> metrics = text_metrics(["the cat sat on"], copy_index("the cat sat"), {"the", "cat", "sat"})
    >>> metrics["known words"], round(metrics["distinct-3"], 3), metrics["longest copy"]
    (1.0, 0.917, 11.0)
    """
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
    """Mean over groups and, in columns named "... ±", the half-width of its 95% interval (Student's t).

    >>> {name: round(float(value), 3) for name, value in grouped([{"x": 1.0}, {"x": 3.0}]).items()}
    {'x': 2.0, 'x ±': 2.365}
    """
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
    """Write figures/tables/NAME.csv (four decimals) and hand the same rounded table back for display.

    >>> from unittest import mock
    >>> with tempfile.TemporaryDirectory() as folder, mock.patch.dict(save_table.__globals__, FIGURES=Path(folder)):
    ...     _ = save_table(pd.DataFrame({"row": ["a"], "x": [1 / 3]}), "thirds")
    ...     Path(folder, "tables", "thirds.csv").read_text().split()
    ['row,x', 'a,0.3333']
    """
    table = table.round(4)
    write_atomically(FIGURES / "tables" / f"{name}.csv", table.to_csv(index=False, lineterminator="\n").encode())
    return table


def save_figure(figure, name: str) -> None:
    """Write figures/NAME.png.

    >>> from unittest import mock
    >>> from matplotlib.figure import Figure
    >>> with tempfile.TemporaryDirectory() as folder, mock.patch.dict(save_figure.__globals__, FIGURES=Path(folder)):
    ...     save_figure(Figure(figsize=(1, 1)), "empty")
    ...     [path.name for path in Path(folder).iterdir()]
    ['empty.png']
    """
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=130, bbox_inches="tight")


def markdown_table(path: Path) -> str:
    r"""A CSV file as a Markdown table.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "t.csv").write_text("row,x\na,1.50\n")
    ...     print(markdown_table(Path(folder, "t.csv")))
    | row | x |
    | --- | --- |
    | a | 1.50 |
    """
    rows = [[str(cell) for cell in row] for row in pd.read_csv(path, dtype=str, keep_default_na=False).itertuples(index=False)]
    header = pd.read_csv(path, nrows=0).columns
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill_report(text: str, tables: Path = FIGURES / "tables") -> str:
    r"""Put the tables' numbers between the markers of a Markdown text.

    `<!-- table NAME -->...<!-- end -->` becomes the table, `<!-- NAME ; ROW ; COLUMN -->...<!-- end -->` one cell, where ROW
    is the value of the first column. Markers of tables that were not made here are left as they are. ValueError if a table lacks
    the row or column.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "t.csv").write_text("row,x\na,1.50\n")
    ...     fill_report("x = <!-- t ; a ; x -->?<!-- end -->", Path(folder))
    'x = <!-- t ; a ; x -->1.50<!-- end -->'
    """

    def number(match: re.Match) -> str:
        name, row, column = match.group(2, 3, 4)
        if not (tables / f"{name}.csv").exists():
            return match.group()
        table = pd.read_csv(tables / f"{name}.csv", dtype=str, keep_default_na=False)
        found = table.loc[table.iloc[:, 0] == row]
        if len(found) != 1 or column not in table:
            raise ValueError(f"{match.group(1)}: {name}.csv has {len(found)} rows {row!r}; its columns are {list(table)}")
        return f"{match.group(1)}{found.iloc[0][column]}<!-- end -->"

    def whole(match: re.Match) -> str:
        path = tables / f"{match.group(2)}.csv"
        return f"{match.group(1)}\n{markdown_table(path)}\n<!-- end -->" if path.exists() else match.group()

    text = re.sub(r"(<!-- table (\S+) -->).*?<!-- end -->", whole, text, flags=re.DOTALL)
    return re.sub(r"(<!-- ([\w-]+) ; (.*?) ; (.*?) -->).*?<!-- end -->", number, text, flags=re.DOTALL)


REPORT_FONTS = {  # those that come with matplotlib, so that lines and pages break alike on every machine
    "STIXGeneral": "font-family: words",
    "STIXGeneralBol": "font-family: words; font-weight: bold",
    "STIXGeneralItalic": "font-family: words; font-style: italic",
    "DejaVuSansMono": "font-family: code",
}
REPORT_STYLE = """
@page { size: A4; margin: 13mm 17mm }
body { margin: 0; font: 9.5pt/1.27 words, serif; text-align: justify }
h1 { font-size: 16pt } h2 { font-size: 11.5pt; break-after: avoid } h1, h2 { margin: 0.6em 0 0.2em; text-align: left }
p, ul { margin: 0.35em 0 } ul { padding-left: 1.3em } li { margin: 0.1em 0 } sub, sup { line-height: 0 }
code { font: 0.8em code, monospace; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 0.6em auto; font-size: 0.92em; text-align: left; break-inside: avoid }
th, td { padding: 0.05em 0.9em 0.05em 0; border-bottom: 0.5px solid #ccc } th { border-bottom: 1px solid #000 }
p:has(img) { text-align: center; break-inside: avoid } img { vertical-align: top } p:has(img + img) img { width: 49% !important }
"""


def _formula(formula: str) -> str:
    """A short LaTeX formula as HTML: letters in italics, functions upright, other commands by the HTML names of characters."""
    upright = {"ln": "ln ", "log": "log ", "sqrt": "√"}

    def sign(m: re.Match) -> str:
        return upright.get(m[1], f"&{m[1]};") if m[1] else f"<i>{m[0]}</i>" if m[0].isalpha() else html.escape(m[0])

    made = re.sub(r"\\([A-Za-z]+) ?|[A-Za-z<>&]", sign, formula.replace("-", "−"))
    made = re.sub(r"\^(\{.*?\}|<i>.</i>|&\w+;|.)", r"<sup>\1</sup>", made)
    return re.sub("[{}]", "", re.sub(r"_(\{.*?\}|<i>.</i>|&\w+;|.)", r"<sub>\1</sub>", made))


def report_html(text: str, folder: Path = Path("."), width: int = 75) -> str:
    """Markdown as one page of HTML for print: tables, short formulas, and the figures of `folder`, `width` percent wide.

    >>> report_html("# Title\\n\\nweighed *by* $1/t$").partition("</style>")[2].split("\\n")
    ['<h1>Title</h1>', '<p>weighed <em>by</em> 1/<i>t</i></p>', '</html>']
    """
    import matplotlib
    import mistune

    def data(path: Path) -> str:
        return f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"

    def figure(text: str, url: str, title: str | None = None) -> str:
        return f'<img alt="{text}" style="width: {width}%" src="{data(folder / url)}">'

    markdown = mistune.create_markdown(escape=False, plugins=["table", "math"])
    markdown.renderer.image, markdown.renderer.inline_math = figure, _formula
    text = re.sub(r"\s*±\s*(?=\d)", "\u00a0±\u00a0", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    title = html.escape(text.strip().partition("\n")[0].strip("# "))
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    faces = "".join(f"@font-face {{ {how}; src: url({data(fonts / f'{name}.ttf')}) }}" for name, how in REPORT_FONTS.items())
    head = f'<meta charset="utf-8"><title>{title}</title><style>{faces}{REPORT_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{markdown(text)}</html>'


def save_report(source: Path, target: Path, most_pages: int = 3) -> str:
    """Print a Markdown report with Chromium, its figures as wide as `most_pages` allow; says what was written.

    Raises:
        ValueError: there is no Chromium, it fails, or the text is too long.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, PATH=""):
    ...     save_report(Path("analysis.md"), Path("analysis.pdf"))
    Traceback (most recent call last):
    ValueError: no Chromium to print with: install it (apt-get install chromium) or Google Chrome
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise ValueError("no Chromium to print with: install it (apt-get install chromium) or Google Chrome")
    text, pages = source.read_text(encoding="utf-8"), 0
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as scratch:  # a snap cannot read /tmp
        page, pdf = Path(scratch).resolve() / "page.html", Path(scratch).resolve() / "page.pdf"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
        command += ["--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri()]
        for width in range(80, 45, -5):
            page.write_text(report_html(text, source.parent, width), encoding="utf-8")
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            made = pdf.read_bytes() if pdf.exists() else b""
            if done.returncode or b"/BaseFont" not in made:  # without any font in the system Chromium draws no letters
                advice = "pass a working one first in PATH, and install a font (apt-get install fonts-dejavu-core)"
                raise ValueError(f"{browser} printed no text: {advice}. It said: {done.stderr[-500:]}")
            pages = len(re.findall(rb"/Type\s*/Page\b", made))
            if pages <= most_pages:
                mark = f"% of {source.name}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}\n"  # is it up to date?
                write_atomically(target, made + mark.encode())
                return f"{target}: {pages} pages, figures {width}% wide"
    raise ValueError(f"{source} needs {pages} pages even with figures half as wide as the text; pass a shorter text")


def _states(generation: Generation, row: int, step: int) -> Tensor:
    """LongTensor[L] after `step`: 0 masked, 1 just committed (or changed by a revision), 2 settled or given."""
    order = generation.order[row]
    masked, changed = order > step, (order == step) & (order >= 0)
    if generation.states is not None and step >= 0:  # `order` knows the last commit only
        before, now = (generation.state_after(s)[row] for s in (step - 1, step))
        masked, changed = now == MASK_ID, now != before
    return torch.where(masked, 0, torch.where(changed, 1, 2))


def filmstrip(generation: Generation, tokenizer: CharTokenizer, row: int = 0, frames: int = 8, width: int = 64):
    """A figure of one generation: a strip per step, newly committed characters marked, masks as grey blocks.

    >>> made = Generation(ids=torch.tensor([[4, 5, 6]]), order=torch.tensor([[-1, 1, 0]]), nfe=2)
    >>> figure = filmstrip(made, CharTokenizer.from_text("abc"))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['step 0', 'a', '', '', 'step 1', 'a', '', 'c', 'step 2', 'a', 'b', 'c']
    """
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
    """One generation at one moment: numbers, and lines of (glyph, state) with the states of `_states`.

    >>> page = Page(step=1, passes=(1, 2), written=(1, 2), lines=[[("a", 2), ("b", 1), ("█", 0)]])
    >>> "".join(glyph for glyph, state in page.lines[0])
    'ab█'
    """

    step: int  # steps so far; more than forward passes where a step revealed nothing and cost nothing
    passes: tuple[int, int]  # forward passes used so far, and in all
    written: tuple[int, int]  # characters revealed so far, and in all
    lines: list[list[tuple[str, int]]]


def pages(generation: Generation, tokenizer: CharTokenizer, width: int = 64) -> list[Page]:
    """The first row before the first forward pass and after each: nfe + 1 pages, of at most `width` characters per line.

    Lines break where those of the finished text do, so that nothing moves while it is being written.

    >>> made = Generation(ids=torch.tensor([[4, 5, 6]]), order=torch.tensor([[-1, 1, 0]]), nfe=2)
    >>> ["".join(glyph for glyph, _ in page.lines[0]) for page in pages(made, CharTokenizer.from_text("abc"))]
    ['a██', 'a█c', 'abc']
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
    """Pages side by side as escaped HTML: masked characters are in <i>, those just committed in <u>.

    >>> page = Page(step=1, passes=(1, 2), written=(1, 2), lines=[[("<", 2), ("b", 1), ("█", 0)]])
    >>> frame_html({"": page}).partition("<pre>")[2]
    '&lt;<u>b</u><i>█</i></pre></div></div>'
    """

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

    >>> made = Generation(ids=torch.tensor([[4, 5, 6]]), order=torch.tensor([[-1, 1, 0]]), nfe=2)
    >>> viewer = DenoisingViewer({"alone": made, "race": {"AR": made, "LLaDA": made}}, CharTokenizer.from_text("abc"))
    >>> viewer.choice.options
    ('alone', 'race')
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
    """Write figures/NAME.gif, a frame per forward pass and a pause at the end; returns the frames as Pillow images.

    >>> from unittest import mock
    >>> made = Generation(ids=torch.tensor([[4, 5, 6]]), order=torch.tensor([[-1, 1, 0]]), nfe=2)
    >>> with tempfile.TemporaryDirectory() as folder, mock.patch.dict(save_gif.__globals__, FIGURES=Path(folder)):
    ...     frames = save_gif("tiny", made, CharTokenizer.from_text("abc"), width=20)
    ...     len(frames), [path.name for path in Path(folder).iterdir()]
    (3, ['tiny.gif'])
    """
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
    """Sizes of the data-constrained experiment: each length of training text x each number of steps.

    >>> sizes = Crossover(64, 2, 2, 32, 16, characters=(1_000, 4_000), steps=(10, 40))
    >>> sizes.batch_size * sizes.seq_len * sizes.steps[1] / sizes.characters[0]  # most epochs
    40.96
    """

    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    characters: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """Sizes and iterations of everything in the notebook.

    >>> shape = PRESETS["smoke"].model(vocab_size=69, causal=True, dropout=0.1)
    >>> shape.seq_len, shape.n_layer, shape.dropout
    (64, 2, 0.1)
    """

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
    vocabulary: tuple[TrainConfig, TrainConfig]  # likewise: characters against byte pairs
    nelbo_samples: int  # masks per validation window in the final evaluation
    texts: int  # generated texts per decoder, a multiple of GROUPS
    blanks: int  # windows with a blank to fill
    candidates: int  # AR's guesses per blank, for rescoring
    probes: int  # windows for the loss by masking rate and by position
    noise: tuple[int, int, tuple[int, ...]]  # windows, repeats and passes in the comparison of estimators
    chains: tuple[int, int]  # windows and orders of the any-order chains
    gradient_batches: int  # batches for the noise of the gradient
    items: int  # questions of the multiple choice
    choice_samples: tuple[int, ...]  # masks per option
    sft: TrainConfig
    replies: int  # speeches scored and answered before and after SFT
    speeches: int  # speeches of each of four speakers to tell apart
    name_samples: int  # masks per speech there; half as many per name
    guided: int  # answers per strength of guidance, a multiple of GROUPS
    facts: tuple[int, int, int]  # invented facts per group, steps and seeds of the reversal experiment
    toy_steps: int  # of the tutorials' toy, for each of its two trainings
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


SMALL_CROSSOVER = Crossover(64, 2, 2, 32, 16, (400, 800, 1_600), (10, 40))
PRESETS = {
    "smoke": Preset(
        "smoke", 64, 2, 2, 32, 0.0,
        TrainConfig(200, 16, evals=5, eval_windows=32), TrainConfig(200, 16, evals=5, eval_windows=32),
        ablation=(TrainConfig(10, 16, evals=1, eval_windows=32), TrainConfig(20, 16, evals=1, eval_windows=32)),
        crossover=(SMALL_CROSSOVER, SMALL_CROSSOVER), recipe=(1, 2),
        vocabulary=(TrainConfig(10, 16, evals=1), TrainConfig(20, 16, evals=1)),
        nelbo_samples=1, texts=16, blanks=16, candidates=2,
        probes=16, noise=(4, 3, (4, 16, 32)), chains=(4, 4), gradient_batches=3, items=12, choice_samples=(1, 2),
        sft=TrainConfig(20, 16, muon_lr=0.005, adamw_lr=1e-3, evals=2, eval_windows=16),
        replies=8, speeches=2, name_samples=4, guided=8, facts=(2, 40, 2), toy_steps=150,
        step_counts=(4, 16, 64),
    ),
    "cpu": Preset(
        "cpu", 128, 5, 4, 128, 0.0, TrainConfig(2300, 32, evals=25), TrainConfig(800, 32, evals=20),
        ablation=(TrainConfig(60, 16, evals=1), TrainConfig(250, 16, evals=5)),
        crossover=(SMALL_CROSSOVER, Crossover(64, 3, 2, 64, 16, (10_000, 20_000, 40_000), (400, 800, 1_600))),
        recipe=(5, 130), vocabulary=(TrainConfig(40, 16, evals=1), TrainConfig(600, 16, evals=5)),
        nelbo_samples=8, texts=64, blanks=500, candidates=4,
        probes=256, noise=(16, 20, (4, 16, 32)), chains=(12, 16), gradient_batches=32, items=500, choice_samples=(1, 4, 16),
        sft=TrainConfig(150, 32, muon_lr=0.005, adamw_lr=1e-3, evals=3),
        replies=96, speeches=30, name_samples=16, guided=48, facts=(30, 1000, 3), toy_steps=200,
        step_counts=(4, 8, 16, 32, 64, 128), compiled=True,
    ),
    "gpu": Preset(
        "gpu", 256, 6, 6, 384, 0.1,
        TrainConfig(6000, 64, evals=30, adamw_lr=2e-3), TrainConfig(2500, 64, evals=25, adamw_lr=2e-3),
        ablation=(TrainConfig(100, 64, evals=1), TrainConfig(1000, 64, evals=10)),
        crossover=(
            SMALL_CROSSOVER,
            Crossover(256, 6, 6, 384, 64, (80_000, 320_000, 892_315), (2_700, 10_900, 54_000)),
        ),
        recipe=(100, 5000), vocabulary=(TrainConfig(100, 64, evals=1), TrainConfig(2000, 64, evals=10)),
        nelbo_samples=16, texts=128, blanks=1000, candidates=8,
        probes=512, noise=(32, 32, (4, 16, 128)), chains=(32, 64), gradient_batches=64, items=1000,
        choice_samples=(1, 4, 16, 64, 128),
        sft=TrainConfig(400, 64, muon_lr=0.005, adamw_lr=1e-3, evals=4),
        replies=256, speeches=60, name_samples=64, guided=256, facts=(80, 4000, 5), toy_steps=200,
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
    """$LLADA_PRESET if it is set, else "gpu" where there is one, else "cpu".

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, LLADA_PRESET="smoke"):
    ...     choose_preset().name
    'smoke'
    """
    name = os.environ.get("LLADA_PRESET") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in PRESETS:
        raise ValueError(f"LLADA_PRESET={name!r}: pass one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------------------
# 11. Experiments: many trainings, one table
# ---------------------------------------------------------------------------------------------------------------------


def masked_mean(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """The MDLM tutorial's loss: the mean cross-entropy over all masked tokens of the batch, whatever t. Not a bound.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> _, _, weight = masked_mean(ids, torch.Generator().manual_seed(0), learned)
    >>> len(weight[weight > 0].unique()), round(float(weight.sum()), 3)  # the same for all; a mean over rows divides by 4
    (1, 4.0)
    """
    t = 1 - torch.rand(len(sequences), generator=generator)
    inputs, targets, weight = diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask * (len(mask) / mask.sum().clamp(min=1))


def masked_mean_over_t(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """The exercise's sketch: each row's mean over its masked tokens, divided by t.

    A window then weighs 1 / t whenever anything is masked: 1 + 1/2 + ... + 1/n on average, with infinite variance.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> _, _, weight = masked_mean_over_t(ids, torch.Generator().manual_seed(0), learned)
    >>> [round(float(w), 1) for w in weight.sum(dim=1)]  # 1 / t, whatever the number of masks
    [1.1, 1.6, 2.7, 7.9]
    """
    t = stratified_times(len(sequences), generator)
    inputs, targets, weight = diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask / (t[:, None] * mask.sum(dim=1, keepdim=True).clamp(min=1))


def independent_times(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with one independent t per row.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> inputs, _, _ = independent_times(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == MASK_ID).sum(dim=1).tolist()  # masks in each row
    [27, 14, 47, 46]
    """
    return diffusion_batch(sequences, generator, learned, t=1 - torch.rand(len(sequences), generator=generator))


def one_time_per_batch(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with one t for the whole batch (tutorial A).

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> inputs, _, _ = one_time_per_batch(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == MASK_ID).sum(dim=1).tolist()  # about as many masks in each row
    [29, 20, 30, 29]
    """
    return diffusion_batch(sequences, generator, learned, t=float(1 - torch.rand(1, generator=generator)))


def importance_times(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with t from the density 1/2 + t, more often where more is masked, and the weight divided by that density.

    >>> ids, learned = torch.full((4, 50), 5), torch.ones(4, 50, dtype=torch.bool)
    >>> inputs, _, _ = importance_times(ids, torch.Generator().manual_seed(0), learned)
    >>> (inputs == MASK_ID).sum(dim=1).tolist()  # stratified, and more than half are masked on average
    [46, 35, 30, 12]
    """
    u = stratified_times(len(sequences), generator)
    t = 2 * u / ((0.25 + 2 * u).sqrt() + 0.5)  # not sqrt - 0.5, which rounds to 0 for small u
    inputs, targets, weight = diffusion_batch(sequences, generator, learned, t=t)
    return inputs, targets, weight / (0.5 + t[:, None])


def complementary_masks(sequences: Tensor, generator: torch.Generator, learned: Tensor):
    """Eq. 3 with half as many windows, each under a mask and under its complement, at t and 1 - t.

    >>> ids, learned = torch.full((2, 6), 5), torch.ones(2, 6, dtype=torch.bool)
    >>> inputs, _, _ = complementary_masks(ids, torch.Generator().manual_seed(0), learned)
    >>> inputs.tolist()
    [[5, 1, 1, 1, 5, 1], [1, 5, 5, 5, 1, 5]]
    """
    half = sequences[: -(-len(sequences) // 2)]
    t = stratified_times(len(half), generator).clamp(1e-3, 1 - 1e-3)
    t = t[torch.randperm(len(half), generator=generator)]  # the row without a partner has any of them
    learned = learned[: len(half)]
    masked, mask = forward_process(half, t, MASK_ID, learned, generator)
    inputs = torch.cat((masked, half.masked_fill(learned & ~mask, MASK_ID)))
    weight = torch.cat((mask / t[:, None], (learned & ~mask) / (1 - t[:, None])))
    count = learned.sum(dim=1, keepdim=True).clamp(min=1).repeat(2, 1)
    keep = len(sequences)
    return inputs[:keep], half.repeat(2, 1)[:keep], (weight / count)[:keep]


Jobs = dict[str, list[Job]]  # the rows of a table, each with one training per seed


def ablation_jobs(preset: Preset, config: TrainConfig, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> Jobs:
    """LLaDA as it is, and with one thing changed; two seeds each.

    >>> preset, ids = PRESETS["smoke"], torch.arange(4, 30)
    >>> jobs = ablation_jobs(preset, preset.ablation[0], 30, ids, ids)
    >>> [(job.model.dropout, job.train.seed) for job in jobs["dropout 0.1"]]
    [(0.1, 0), (0.1, 1)]
    """

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
        "without dropout" if preset.dropout else "dropout 0.1": {"model": {"dropout": 0.0 if preset.dropout else 0.1}},
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
    """LLaDA, AR and regularised AR on the first so many characters, for so many steps, each with its own decay.

    >>> ids = torch.arange(4, 30)
    >>> list(crossover_jobs(SMALL_CROSSOVER, 30, ids, ids))[2]  # 3 lengths x 2 numbers of steps x 3 kinds
    'AR, regularised, 400 characters, 10 steps'
    """
    jobs, kinds = {}, {"LLaDA": (False, 0.0, 0.0), "AR": (True, 0.0, 0.0), "AR, regularised": (True, 0.2, 0.1)}
    for count in sizes.characters:
        for steps in sizes.steps:
            for kind, (causal, dropout, decay) in kinds.items():
                config = TrainConfig(steps, sizes.batch_size, weight_decay=decay, evals=min(10, steps // 10), eval_windows=256)
                shape = ModelConfig(vocab_size, sizes.seq_len, sizes.n_layer, sizes.n_head, sizes.n_embd, dropout, causal)
                jobs[f"{kind}, {count:,} characters, {steps:,} steps"] = [Job(shape, config, train_ids[:count], val_ids)]
    return jobs


MERGES = (512, 1024)


def vocabulary_jobs(preset: Preset, config: TrainConfig, text: str) -> Jobs:
    """LLaDA and AR on characters and on byte-pair vocabularies of MERGES merges: equal compute, and equal characters in sight.

    A window has as many characters on average, a step as many tokens, and there are as many steps as the same number of
    multiplications allows, a larger vocabulary's larger head included. Two seeds each; all are judged by the same text, the first
    20,000 characters held out, in nats per *character*.

    >>> preset = PRESETS["smoke"]
    >>> jobs = vocabulary_jobs(preset, TrainConfig(100, 16), "the cat sat on the mat. " * 200)
    >>> for row in ("LLaDA, characters", "LLaDA, 512 merges"):
    ...     model, config = jobs[row][0].model, jobs[row][0].train
    ...     row, model.vocab_size, model.seq_len, config.batch_size, config.steps
    ('LLaDA, characters', 15, 64, 16, 100)
    ('LLaDA, 512 merges', 28, 19, 54, 119)
    """
    characters = CharTokenizer.from_text(text)
    cut = len(split(characters.encode(text))[0])
    shown, held = text[:cut], text[cut : cut + 20_000]
    one = torch.ones(characters.vocab_size, dtype=torch.long)
    variants = {"characters": (characters.encode(shown), characters.encode(held), one)}
    for merges in MERGES:
        pairs = byte_pairs(shown, merges, text)
        lengths = torch.tensor([len(pairs.id_to_token(i)) for i in range(pairs.get_vocab_size())])
        variants[f"{merges:,} merges"] = (*(torch.tensor(pairs.encode(part).ids) for part in (shown, held)), lengths)

    def cost(shape: ModelConfig) -> int:
        """Multiplications per token of a forward pass: matrices, attention, head."""
        return shape.n_layer * (12 * shape.n_embd**2 + 2 * shape.seq_len * shape.n_embd) + shape.vocab_size * shape.n_embd

    jobs = {}
    for model, causal in (("LLaDA", False), ("AR", True)):
        base = preset.model(characters.vocab_size, causal)
        for name, (train_ids, val_ids, lengths) in variants.items():
            seq_len = max(1, round(preset.seq_len * len(train_ids) / len(shown)))
            shape = replace(base, vocab_size=len(lengths), seq_len=seq_len)
            batch_size = round(config.batch_size * preset.seq_len / seq_len)
            passes = config.batch_size * base.seq_len * cost(base) / (batch_size * seq_len * cost(shape))
            change = {"steps": round(config.steps * passes), "batch_size": batch_size, "eval_windows": len(held)}
            configs = [replace(config, seed=seed, **change) for seed in (0, 1)]
            jobs[f"{model}, {name}"] = [Job(shape, c, train_ids, val_ids, token_lengths=lengths) for c in configs]
    return jobs


def recipe_jobs(preset: Preset, steps: int, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> Jobs:
    """The MDLM tutorial's recipe (its 1,000 steps of warm-up, longer than this training, shortened to ours), and our LLaDA.

    >>> ids = torch.arange(4, 30)
    >>> {row: job.architecture.__name__ for row, (job,) in recipe_jobs(PRESETS["smoke"], 2, 30, ids, ids).items()}
    {"MDLM tutorial's recipe": 'PostNormEncoder', 'ours': 'Transformer'}
    """
    shape = ModelConfig(vocab_size, min(128, preset.seq_len), n_layer=6, n_head=8, n_embd=256)
    config = TrainConfig(steps, 64, muon_lr=0.0, adamw_lr=3e-4, weight_decay=0.01, evals=min(10, steps))
    tutorial = Job(shape, config, train_ids, val_ids, masked_mean, architecture=PostNormEncoder)
    return {"MDLM tutorial's recipe": [tutorial], "ours": [preset.jobs(vocab_size, train_ids, val_ids)["LLaDA"]]}


# fmt: off
FIRST = (
    "Al", "Bren", "Cor", "Dag", "El", "Fen", "Gar", "Hol", "Is", "Jor", "Kel", "Lor", "Mor", "Nan", "Or", "Per", "Quil", "Ros",
)
LAST = ("ana", "bert", "dric", "fin", "gund", "ias", "lin", "mund", "nor", "oc", "ric", "sia", "thia", "ven")
PLACES = [a + b for a in ("Ash", "Brook", "Cold", "Dun", "Elm", "Frost") for b in ("by", "dale", "ford", "ham", "mere")]
ROLES = (
    "baker", "brewer", "cook", "cooper", "crier", "drover", "fuller", "glover", "healer", "mason", "miller", "piper", "smith",
)
# fmt: on


class Facts(NamedTuple):
    """Sentences about invented people, in words, each person's in both directions; one row per fact.

    `told` says what is trained on: "forwards", "backwards" or "both".

    >>> facts = invented_facts(per_group=2, seed=0)
    >>> facts.told.tolist(), len(facts.training_rows())
    (['forwards', 'forwards', 'backwards', 'backwards', 'both', 'both'], 8)
    """

    tokenizer: CharTokenizer
    forwards: Tensor  # LongTensor[F, 7], "X is the Y of Z ."
    backwards: Tensor  # LongTensor[F, 7], "the Y of Z is X ."
    told: np.ndarray  # [F] of str

    def training_rows(self) -> Tensor:
        """LongTensor[N, 7]: each fact in the direction, or the directions, in which it is told."""
        return torch.cat((self.forwards[self.told != "backwards"], self.backwards[self.told != "forwards"]))


def invented_facts(per_group: int, seed: int) -> Facts:
    """A third of 3 * `per_group` facts told forwards only, a third backwards only, a third, the control, both ways.

    X is somebody else in each fact, and so is the pair (Y, Z); a role Y and a place Z alone belong to many.

    Raises:
        ValueError: more facts than names.

    >>> facts = invented_facts(per_group=1, seed=0)
    >>> [facts.tokenizer.decode(row) for row in facts.training_rows()[:2]]
    ['Garias is the crier of Elmford .', 'Rosfin is the brewer of Frostby .']
    """
    rng = np.random.default_rng(seed)
    names = [a + b for a in FIRST for b in LAST]
    count = 3 * per_group
    if not 0 < count <= len(names):
        raise ValueError(f"per_group={per_group}: pass 1 to {len(names) // 3}, there are {len(names)} names")
    names = rng.permutation(names)[:count]
    described = [(ROLES[i % len(ROLES)], PLACES[i // len(ROLES)]) for i in rng.permutation(len(ROLES) * len(PLACES))[:count]]
    tokenizer = CharTokenizer.from_text([*names, *ROLES, *PLACES, "is", "the", "of", "."])
    ways = ([[x, "is", "the", y, "of", z, "."], ["the", y, "of", z, "is", x, "."]] for x, (y, z) in zip(names, described))
    forwards, backwards = (torch.stack([tokenizer.encode(words) for words in way]) for way in zip(*ways))
    return Facts(tokenizer, forwards, backwards, np.repeat(["forwards", "backwards", "both"], per_group))


def run_jobs(name: str, jobs: Jobs, *, compiled: bool = False, only: str = "", quiet: bool = False) -> pd.DataFrame:
    """Train every job (or load it); write figures/tables/NAME.csv, a row for each entry of `jobs`, and NAME_curves.csv.

    Each row's seeds are averaged window by window; the interval is over windows. The difference to the first row is paired: the
    same windows and masks. `only`: rows that match this regular expression; nothing is written then.

    >>> ids, here = torch.arange(4, 10).repeat(20), os.getcwd()
    >>> job = Job(ModelConfig(10, 8, n_layer=1, n_head=2, n_embd=8), TrainConfig(steps=1, batch_size=2, evals=1), ids, ids)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.chdir(folder)  # runs/, checkpoints/ and figures/ are made where Python runs
    ...     table = run_jobs("demo", {"base": [job]}, quiet=True)
    ...     os.chdir(here)
    >>> table["row"].tolist(), table["steps"].tolist(), table["tokens"].tolist()
    (['base'], [1], [16])
    """
    rows, curves, first, windows_of_first = [], [], None, None
    for index, (row, trials) in enumerate(jobs.items()):
        if not re.search(only, row):
            continue
        job = trials[0]
        fast = compiled and job.architecture is Transformer
        runs = [train(f"{name}-{index}-{trial.train.seed}", trial, compiled=fast, quiet=quiet) for trial in trials]
        sequences = job.validation_sequences()
        learned = job.learned(sequences)
        nats = torch.stack([validation_nats(run.model, sequences, learned, job.autoregressive).cpu() for run in runs]).mean(dim=0)
        counts, each = job.characters(sequences), [run.summary["best"] for run in runs]
        each = [best * float(learned.sum() / counts.sum()) for best in each]  # validation is per token
        mean, half = per_character(nats, counts)
        line = {"row": row, "nats/char": mean, "95% ±": half, "lowest seed": min(each), "highest seed": max(each)}
        if first is None:
            first, windows_of_first = nats, (sequences, learned)
        if all(map(torch.equal, (sequences, learned), windows_of_first)):
            line["difference"], line["difference ±"] = per_character(nats - first, counts)
        summary = runs[0].summary
        line |= {"parameters": summary["parameters"], "steps": summary["steps"], "tokens": summary["tokens"]}
        line |= {"characters": job.training_characters(), "epochs": summary["tokens"] / job.train_ids.numel()}
        line |= {"seconds": np.mean([run.summary["seconds"] for run in runs]), "fingerprint": suite_mark(trials)}
        curves += [run.metrics.assign(row=row, seed=trial.train.seed) for run, trial in zip(runs, trials)]
        record = json.loads((runs[0].path / "run.json").read_text())
        rows.append(line | {"device": record["device"], "commit": record["commit"]})
    if only:
        return pd.DataFrame(rows).round(4)
    save_table(pd.concat(curves)[["row", "seed", "step", "tokens", "seconds", "train_loss", "val_loss"]], f"{name}_curves")
    return save_table(pd.DataFrame(rows), name)


def suite_mark(trials: list[Job]) -> str:
    """The fingerprints of a row's trainings, joined: what its numbers in a table were made by.

    >>> ids = torch.arange(4, 10).repeat(10)
    >>> job = Job(ModelConfig(10, 8, n_layer=1, n_head=1, n_embd=8), TrainConfig(steps=2, batch_size=2), ids, ids)
    >>> len(suite_mark([job, job]))  # twelve digits each
    25
    """
    return "+".join(job.fingerprint() for job in trials)


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype={"row": str, "fingerprint": str})
    except (OSError, ValueError):  # none, or none that can be read
        return pd.DataFrame()


def experiment(name: str, full: Jobs, short: Jobs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """NAME.csv and NAME_curves.csv if they hold the results of `full` as the code is now, else those of `short`, trained here.

    >>> ids, here = torch.arange(4, 10).repeat(20), os.getcwd()
    >>> job = Job(ModelConfig(10, 8, n_layer=1, n_head=2, n_embd=8), TrainConfig(steps=1, batch_size=2, evals=1), ids, ids)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.chdir(folder)
    ...     _ = run_jobs("demo", {"full": [job]}, quiet=True)  # what the command line leaves behind
    ...     table, curves = experiment("demo", full={"full": [job]}, short={})
    ...     os.chdir(here)
    demo: the full suite, read from figures/tables/demo.csv
    """
    path, curves = (FIGURES / "tables" / f"{file}.csv" for file in (name, f"{name}_curves"))
    known, curve = (_read_table(p) for p in (path, curves))
    marks = dict(zip(known["row"], known["fingerprint"])) if {"row", "fingerprint"} <= set(known) else {}
    if len(curve) and marks == {row: suite_mark(trials) for row, trials in full.items()}:
        print(f"{name}: the full suite, read from {path}")
        return known, curve
    return run_jobs(name, short, quiet=True), pd.read_csv(curves)


def main(arguments: list[str] | None = None) -> None:
    """The command line: `python llada_helpers.py train --preset cpu --model llada`; see --help.

    >>> with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
    ...     main(["train", "--help"])
    >>> "--preset" in said.getvalue()
    True
    """
    parser = argparse.ArgumentParser(
        description="Train outside the notebook, which then loads the finished runs and tables, or print the report. Training "
        "goes on where it was interrupted. LLADA_DATA: a text file of your own; LLADA_RETRAIN=1: train from the start.",
        epilog="Several processes or GPUs: accelerate launch llada_helpers.py train ..., or torchrun --nproc-per-node 2 "
        "llada_helpers.py train ...; they share each batch.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("train", "train one model of a preset; runs/ and checkpoints/ get the result"),
        ("ablations", "LLaDA with one thing changed at a time; figures/tables/ablations.csv"),
        ("crossover", "LLaDA against AR on little text, for many epochs; figures/tables/crossover.csv"),
        ("recipe", "the MDLM tutorial's recipe beside ours; figures/tables/recipe.csv"),
        ("vocabulary", "characters against byte pairs, LLaDA and AR; figures/tables/vocabulary.csv"),
    ):
        aliases = ["ablate"] if command == "ablations" else []
        options = commands.add_parser(command, help=text, description=text, aliases=aliases)
        options.add_argument("--preset", choices=PRESETS, help="default: $LLADA_PRESET, else gpu if there is one, else cpu")
        if command == "train":
            options.add_argument("--model", choices=("llada", "ar"), required=True, help="the mask predictor or the baseline")
        else:
            options.add_argument("--only", default="", metavar="REGEX", help="train matching rows only, and write no table")
    text = "print analysis.md as analysis.pdf, three A4 pages at most; needs Chromium"
    commands.add_parser("report", help=text, description=text)
    arguments = parser.parse_args(arguments)
    if arguments.command == "report":
        print(save_report(Path("analysis.md"), Path("analysis.pdf")))
        return
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
    elif arguments.command == "vocabulary":
        name, jobs = "vocabulary", vocabulary_jobs(preset, preset.vocabulary[1], text)
    else:
        name, jobs = "ablations", ablation_jobs(preset, preset.ablation[1], *data)
    print(run_jobs(name, jobs, compiled=preset.compiled, only=arguments.only).iloc[:, :7].to_string(index=False))


if __name__ == "__main__":
    main()
