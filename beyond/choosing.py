"""Choosing the true text among four: which piece comes next, and which stood before."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import llada_helpers as H
from beyond.likelihood import choose
from beyond.quality import SPECIAL


class Sizes(NamedTuple):
    """How many questions, and how many masks per option LLaDA may spend.

    >>> SIZES["smoke"].samples
    (1, 2)
    """

    items: int
    samples: tuple[int, ...]


SIZES = {"smoke": Sizes(12, (1, 2)), "cpu": Sizes(240, (1, 4, 16)), "gpu": Sizes(400, (1, 4, 16))}
SIZES["cpu_long"] = SIZES["cpu"]


class Quiz(NamedTuple):
    """Questions with four answers each, of which the first is the true one.

    >>> quiz = Quiz(torch.tensor([[4, 5]]), torch.tensor([[[6], [7], [6], [5]]]), forward=False)
    >>> quiz.texts()[0].tolist()  # the answer stands before what is known
    [[6, 4, 5], [7, 4, 5], [6, 4, 5], [5, 4, 5]]
    """

    known: Tensor  # LongTensor[N, C], what is given
    options: Tensor  # LongTensor[N, 4, A]
    forward: bool  # does the answer follow what is given, or precede it?

    def texts(self) -> Tensor:
        """LongTensor[N, 4, C + A]: what is given together with each answer."""
        known = self.known[:, None].expand(-1, self.options.shape[1], -1)
        return torch.cat((known, self.options) if self.forward else (self.options, known), dim=-1)


def pieces(ids: Tensor, length: int, count: int) -> Tensor:
    """At most `count` pieces of a text [n], end to end, spread evenly over it: LongTensor[N, length].

    >>> pieces(torch.arange(11), 2, 3).tolist()
    [[0, 1], [4, 5], [8, 9]]
    """
    rows = ids[: len(ids) // length * length].view(-1, length)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def shuffled(text: str, rng: np.random.Generator) -> str:
    """The same words in another order, the white space where it was.

    >>> shuffled("to be, or\\nnot to be", np.random.default_rng(1))
    'to to or\\nbe, be not'
    """
    parts = re.findall(r"\s+|\S+", text)
    words = [i for i, part in enumerate(parts) if not part.isspace()]
    mixed = list(parts)
    for i, j in zip(words, rng.permutation(words)):
        mixed[i] = parts[j]
    return "".join(mixed)


def make_quiz(rows: Tensor, answer: int, forward: bool, tokenizer: H.CharTokenizer, ar, seed: int = 0) -> Quiz:
    """A question of each row [N, C + answer]: its last (or, backwards, its first) `answer` characters are asked for.

    The other answers: that of the row before, the truth with its words shuffled, and what the AR model would have written; it
    cannot write backwards, where that of another row takes its place.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)
    >>> tokenizer = H.CharTokenizer.from_text("abc ")
    >>> quiz = make_quiz(tokenizer.encode("a bcb acc ba").view(3, 4), 2, False, tokenizer, blank)
    >>> [tokenizer.decode(option) for option in quiz.options[0]]
    ['a ', 'c ', 'a ', 'b ']
    """
    known, truth = (rows[:, :-answer], rows[:, -answer:]) if forward else (rows[:, answer:], rows[:, :answer])
    rng, other, third = np.random.default_rng(seed), truth.roll(1, dims=0), truth.roll(2, dims=0)
    if forward:
        options = {"start_id": H.START_ID, "forbidden": (H.MASK_ID, *SPECIAL)}
        generator = torch.Generator().manual_seed(seed)
        device = next(ar.parameters()).device if isinstance(ar, torch.nn.Module) else rows.device
        third = H.generate_ar(ar, known.to(device), answer, generator=generator, **options).ids[:, -answer:].to(rows.device)
    mixed = torch.stack([tokenizer.encode(shuffled(tokenizer.decode(row), rng)) for row in truth])
    return Quiz(known, torch.stack((truth, other, mixed, third), dim=1), forward)


def score_ar(model, quiz: Quiz) -> Tensor:
    """log p of the whole text with each answer, FloatTensor[N, 4], nats.

    Where the answer follows, what is given adds the same to all four; where it precedes, only whole texts can be compared.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 8)  # all 8 tokens are equally likely
    >>> quiz = Quiz(torch.tensor([[4, 5]]), torch.tensor([[[6], [7], [6], [5]]]), forward=True)
    >>> (score_ar(blank, quiz) / np.log(8)).round(decimals=2).tolist()
    [[-3.0, -3.0, -3.0, -3.0]]
    """
    texts = quiz.texts()
    return -H.ar_nll(model, texts.flatten(0, 1), H.START_ID).view(texts.shape[:2]).cpu()


def score_llada(model, quiz: Quiz, n_samples: int) -> Tensor:
    """Lower bounds on log p(answer | what is given), FloatTensor[N, 4], nats; a question's four share their masks (Eq. 6).

    >>> alphabet = lambda ids: 5 * torch.eye(8)[4:].expand(len(ids), -1, -1)  # sure of 4, 5, 6, 7
    >>> quiz = Quiz(torch.tensor([[4, 5, 6]]), torch.tensor([[[7], [4], [5], [6]]]), forward=True)
    >>> score_llada(alphabet, quiz, 1).argmax(dim=1).tolist()
    [0]
    """
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else quiz.known.device
    scores = []
    for i, (known, options) in enumerate(zip(quiz.known.to(device), quiz.options.to(device))):
        prompt, suffix = (known, known[:0]) if quiz.forward else (known[:0], known)
        generator = torch.Generator().manual_seed(i)
        how = {"n_samples": n_samples, "suffix": suffix, "generator": generator}
        scores.append(choose(model, prompt, list(options), H.MASK_ID, **how)[1])
    return torch.tensor(scores)


def result(scores: Tensor, names: tuple[str, str, str]) -> dict[str, float]:
    """How often the true answer won, with its interval, and how often each of the others, by their `names`.

    >>> line = result(torch.tensor([[0.0, -1.0, -2.0, -3.0], [-9.0, -1.0, -2.0, -3.0]]), ("b", "c", "d"))
    >>> line["accuracy"], line["picked b"]
    (0.5, 0.5)
    """
    picked = scores.argmax(dim=1)
    share, half = H.share(picked == 0)
    wrong = {f"picked {name}": float((picked == i).float().mean()) for i, name in enumerate(names, start=1)}
    return {"accuracy": share, "accuracy ±": half, "items": len(scores), **wrong}
