"""How good and how varied are a decoder's texts, and what do they cost? One measure for all decoders."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import llada_helpers as H

TEXTS = {"smoke": 16, "cpu": 40, "cpu_long": 40, "gpu": 40}  # per decoder, a multiple of H.GROUPS
PREFIX = 16  # characters of real text to go on from
SPECIAL = (H.PAD_ID, H.START_ID, H.END_ID)  # never to be written; [MASK] never is


def parts(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test: the first 80% of ids [n], the next 10%, the last 10%.

    What is chosen (checkpoints, recipes) is chosen by the validation text; final models are reported on the test text.

    >>> [part.tolist() for part in parts(torch.arange(10))]
    [[0, 1, 2, 3, 4, 5, 6, 7], [8], [9]]
    """
    train_ids, rest = H.split(ids)
    return train_ids, *H.split(rest, 0.5)


def scored(preset: H.Preset, ids: Tensor) -> Tensor:
    """What of a text ids [n] the study and the block suite score: all of it, in `smoke` the beginning."""
    return ids[:8_192] if preset.name == "smoke" else ids


def window_nats(model: H.Transformer, ids: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Nats and characters of each window of the model's length in a text ids [n], [N] each: as Part 8 measures them."""
    windows = H.windows(ids, model.config.seq_len)
    real = windows != H.PAD_ID
    if model.config.causal:
        return H.ar_nll(model, windows, H.START_ID).cpu(), real.sum(dim=1)
    options = {"n_samples": samples, "maskable": real, "generator": torch.Generator().manual_seed(0)}
    return H.nelbo(model, windows, H.MASK_ID, **options).cpu(), real.sum(dim=1)


def prompts(windows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` real windows [count, L] from all over a text, and templates that keep their first PREFIX characters.

    >>> truth, template = prompts(torch.arange(4, 104).view(5, 20), 2)
    >>> (template == H.MASK_ID).sum(dim=1).tolist(), truth[:, 0].tolist()
    ([4, 4], [4, 64])
    """
    truth = windows[torch.linspace(0, max(0, len(windows) - 2), count).long()]
    template = truth.clone()
    template[:, PREFIX:] = H.MASK_ID
    return truth, template


def write(
    model: H.Transformer, template: Tensor, *, steps: int | None = None, remasking: str | H.Strategy = "random", **options
) -> H.Generation:
    """Fill the run of masks of templates LongTensor[B, L]: by `reverse_process`, or from left to right if the model is causal.

    Args:
        steps: passes, by default one for each mask. AR takes these whatever is asked; it goes on from what precedes the masks,
            and its ids end with them.
        options: temperature, top_p, generator.

    Raises:
        ValueError: masks that AR cannot fill, as they are not one run in the same place.

    >>> shape = {"vocab_size": 9, "seq_len": 6, "n_layer": 1, "n_head": 1, "n_embd": 8}
    >>> template = torch.tensor([[4, 5, *[H.MASK_ID] * 4]])
    >>> [write(H.Transformer(H.ModelConfig(causal=ar, **shape)), template, steps=2, temperature=1.0).nfe for ar in (True, False)]
    [4, 2]
    """
    masked = template == H.MASK_ID
    start, count = int(masked[0].int().argmax()), int(masked[0].sum())
    if not model.config.causal:
        options |= {"steps": steps or count, "remasking": remasking, "forbidden": SPECIAL}
        return H.reverse_process(model, template, mask_id=H.MASK_ID, **options)
    if int(masked.sum()) != count * len(masked) or not bool(masked[:, start : start + count].all()):
        raise ValueError("AR goes on from where the masks begin: pass a template with one run of masks, the same in all rows")
    return H.generate_ar(model, template[:, :start], count, start_id=H.START_ID, forbidden=(H.MASK_ID, *SPECIAL), **options)


def ngram_judge(text: str, order: int = 6) -> Callable[[str, int], float]:
    """judge(written, start): nats per character of written[start:] under an n-gram model of `text` (Witten-Bell smoothing).

    >>> judge = ngram_judge("abababab", order=2)
    >>> judge("abab", 1) < judge("abba", 1)
    True
    """
    grams = Counter(run for n in range(1, order + 1) for run in H.runs_of(text, n))
    seen = Counter(run for n in range(order) for run in H.runs_of(text[:-1], n))  # contexts: how often something follows
    kinds = Counter(gram[:-1] for gram in grams)  # how many characters do

    def judge(written: str, start: int) -> float:
        nats = 0.0
        for i in range(start, len(written)):
            p = 1 / kinds[""]
            for context in (written[k:i] for k in range(i, max(-1, i - order), -1)):
                if context in seen:
                    p = (grams[context + written[i]] + kinds[context] * p) / (seen[context] + kinds[context])
            nats -= math.log(p)
        return nats / (len(written) - start)

    return judge


class TextMeasure:
    """Scores of continuations by the training text alone, with 95% intervals over H.GROUPS groups of texts.

    "judge nats/char" is under an n-gram model of that text; the others are those of `llada_helpers.text_metrics`.

    >>> text = "to be or not to be " * 20
    >>> tokenizer = H.CharTokenizer.from_text(text)
    >>> scores = TextMeasure(tokenizer, text)(H.windows(tokenizer.encode(text), 38)[:8])
    >>> [round(float(scores[x]), 3) for x in ("known words", "copied", "copied ±")]
    [1.0, 1.0, 0.0]
    """

    def __init__(self, tokenizer: H.CharTokenizer, train_text: str):
        self.tokenizer, self.judge = tokenizer, ngram_judge(train_text)
        self.copies = set(H.runs_of(train_text))
        self.words = {word.lower() for word in H.WORD.findall(train_text)}

    def __call__(self, sequences: Tensor) -> dict[str, float]:
        """All scores of sequences LongTensor[B, L], the first PREFIX characters of which were given."""
        scores = []
        for group in sequences.chunk(H.GROUPS):
            whole = [self.tokenizer.decode(ids) for ids in group]
            scores.append({"judge nats/char": np.mean([self.judge(text, PREFIX) for text in whole])})
            scores[-1] |= H.text_metrics([text[PREFIX:] for text in whole], self.copies, self.words)
        return H.grouped(scores)

    def trial(self, write: Callable[[], H.Generation]) -> dict[str, float]:
        """Let `write` make all texts: the mean passes per text, tokens per second, and the scores."""
        started = time.perf_counter()
        made = write()
        seconds = time.perf_counter() - started
        passes = (made.order.max(dim=1).values + 1).float().mean().item()
        return {"passes": passes, "tokens/s": round((made.order >= 0).sum().item() / seconds), **self(made.ids)}
