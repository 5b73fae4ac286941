"""Instruction tuning (SFT, Eq. 5) on the dialogue that the corpus is: a speech is answered by the next one.

text -> dialogue -> Layout.rows -> a Job with learned=response_tokens -> tuned models -> sft_table, sample_answers
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import llada_helpers as H
from beyond.decoding import late
from beyond.likelihood import low_noise_nelbo


class Sizes(NamedTuple):
    """The tuning, and how much is asked afterwards, here and in beyond/speakers.py.

    >>> SIZES["smoke"].sft.steps
    20
    """

    sft: H.TrainConfig
    replies: int  # speeches scored and answered before and after tuning
    speeches: int  # speeches of each of four speakers to tell apart
    name_samples: int  # masks per speech there; half as many per name
    guided: int  # answers per strength of guidance, a multiple of H.GROUPS


GENTLY = {"muon_lr": 0.005, "adamw_lr": 1e-3}
SIZES = {
    "smoke": Sizes(H.TrainConfig(20, 16, **GENTLY, evals=2, eval_windows=16), 8, 2, 4, 8),
    "cpu": Sizes(H.TrainConfig(150, 32, **GENTLY, evals=3), 96, 20, 16, 48),
    "gpu": Sizes(H.TrainConfig(300, 64, **GENTLY, evals=4), 96, 30, 32, 64),
}
SIZES["cpu_long"] = SIZES["cpu"]

Talk = list[tuple[str, str, str]]  # (speech before, speaker, speech)
SPEECH = re.compile(r"(?:\A|(?<=\n\n))([^\n:]+):\n(?!\n)(.+?)(?=\n\n|\n?\Z)", re.DOTALL)


def dialogue(text: str) -> Talk:
    r"""(speech before, speaker, speech) for every speech of a play, "NAME:\n" before it and an empty line after it.

    >>> dialogue("ROMEO:\nAy me!\n\nJULIET:\nWhat's he?\n\nROMEO:\nI.")
    [('', 'ROMEO', 'Ay me!'), ('Ay me!', 'JULIET', "What's he?"), ("What's he?", 'ROMEO', 'I.')]
    """
    speeches = SPEECH.findall(text)
    return [(before, *speech) for before, speech in zip(["", *(words for _, words in speeches)], speeches)]


def instruction_rows(pairs: list[tuple], tokenizer: H.CharTokenizer, seq_len: int, prompt_len: int) -> Tensor:
    """Rows for SFT (Eq. 5), LongTensor[N, seq_len]: prompt [START] response [END] ... [END]; see `response_tokens`.

    [END] is an ordinary token: the model learns where to stop, and what fills the rest. [START], which is in no text, separates.

    Args:
        pairs: (prompt, response), each a text. A prompt keeps its last `prompt_len` tokens; a pair whose response does not leave
            room for one [END] after a full prompt is left out.

    Raises:
        ValueError: no room for any response, or no pair that fits.

    >>> tokenizer = H.CharTokenizer.from_text("abcd")
    >>> instruction_rows([("abc", "d"), ("a", "bcd")], tokenizer, seq_len=5, prompt_len=2).tolist()  # "bcd" would not fit
    [[5, 6, 2, 7, 3]]
    """
    room = seq_len - prompt_len - 2
    if room < 1 or prompt_len < 1:
        raise ValueError(f"prompt_len={prompt_len} of seq_len={seq_len}: leave room for [START], a response and [END]")
    start, rows = torch.tensor([H.START_ID]), []
    for prompt, response in pairs:
        if len(response) <= room:
            row = torch.cat((tokenizer.encode(prompt)[-prompt_len:], start, tokenizer.encode(response)))
            rows.append(F.pad(row, (0, seq_len - len(row)), value=H.END_ID))
    if not rows:
        raise ValueError(f"no response has {room} tokens or fewer; pass pairs with shorter ones, or a larger seq_len")
    return torch.stack(rows)


def response_tokens(sequences: Tensor, separator: int = H.START_ID) -> Tensor:
    """BoolTensor[B, L]: the response, what follows the row's first separator; the prompt before it is never masked (Eq. 5).

    >>> response_tokens(torch.tensor([[7, 8, H.START_ID, 9, H.END_ID, H.PAD_ID]])).tolist()
    [[False, False, False, True, True, False]]
    """
    separators = sequences == separator
    return (separators.cumsum(dim=1) > 0) & ~separators & (sequences != H.PAD_ID)


def speech_tokens(rows: Tensor) -> Tensor:
    """BoolTensor[B, L]: the responses without their [END].

    >>> speech_tokens(torch.tensor([[7, 8, H.START_ID, 9, H.END_ID]])).tolist()
    [[False, False, False, True, False]]
    """
    return response_tokens(rows) & (rows != H.END_ID)


@dataclass(frozen=True)
class Layout:
    r"""How a dialogue is laid out in rows of `seq_len`: three eighths for the prompt, then [START], the answer, [END].

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\n hi"), seq_len=16)
    >>> layout.prompt_len, layout.answer_len, layout.ask("hi", "A")
    (5, 10, 'hi\n\nA:\n')
    >>> layout.tokenizer.decode(layout.rows([("hi", "A", "hi hi")])[0])
    '\n\nA:\nhi hi'
    """

    tokenizer: H.CharTokenizer
    seq_len: int

    @property
    def prompt_len(self) -> int:
        return self.seq_len * 3 // 8 - 1

    @property
    def answer_len(self) -> int:
        """Places for a response and at least one [END]."""
        return self.seq_len - self.prompt_len - 1

    def known(self, text: str) -> str:
        """What of `text` the vocabulary has."""
        return "".join(c for c in text if c in self.tokenizer.characters)

    def ask(self, before: str, speaker: str) -> str:
        """The prompt: a speech, and the name of who answers it."""
        return self.known(f"{before}\n\n{speaker}:\n")

    def rows(self, talk: Talk) -> Tensor:
        """LongTensor[N, seq_len]: a row for each speech that is short enough."""
        pairs = [(self.ask(before, speaker), speech) for before, speaker, speech in talk]
        return instruction_rows(pairs, self.tokenizer, self.seq_len, self.prompt_len)


def in_turns(text: str, layout: Layout) -> Talk:
    """Pieces of a text without speakers, as if the last four letters of the alphabet spoke them in turns.

    >>> in_turns("abcdefghijklmnopqr", Layout(H.CharTokenizer.from_text("abcdefghijklmnopqr"), 16))
    [('abcdefghi', 'o', 'jklmnopqr')]
    """
    size, letters = min(layout.answer_len - 1, len(text) // 2), layout.tokenizer.characters[-4:]  # two pieces at least
    pieces = [text[i : i + size] for i in range(0, len(text) - size + 1, size)]
    return [(a, letters[i % len(letters)], b) for i, (a, b) in enumerate(itertools.pairwise(pieces))]


def talks(train_text: str, val_text: str, test_text: str, layout: Layout) -> tuple[Talk, Talk, Talk]:
    r"""The dialogue of three parts of a play, cut out separately, so that no speech is in two; of any other text, `in_turns`.

    A play is what has at least four speakers that speak in training and validation, and in each part a speech that fits after a
    full prompt.

    >>> play = "\n\n".join(f"{name}:\nhi" for name in "ABCD")
    >>> layout = Layout(H.CharTokenizer.from_text(play + "no"), 16)
    >>> [talk[0] for talk in talks(play, play, play, layout)], talks(play, "no hi" * 5, play, layout)[1]
    ([('', 'A', 'hi'), ('', 'A', 'hi'), ('', 'A', 'hi')], [('no hino h', 'h', 'ino hino ')])
    """
    texts = (train_text, val_text, test_text)
    parts = tuple(map(dialogue, texts))
    known, heard, _ = ({who for _, who, _ in part} for part in parts)
    lengths = [[(len(layout.ask(before, who)), len(speech)) for before, who, speech in part] for part in parts]
    usable = all(any(p >= layout.prompt_len and s < layout.answer_len for p, s in part) for part in lengths)
    return parts if usable and len(known & heard) >= 4 else tuple(in_turns(text, layout) for text in texts)


def full_prompts(rows: Tensor, layout: Layout, count: int) -> Tensor:
    """At most `count` of the rows whose prompt fills its place, spread evenly: LongTensor[N, seq_len].

    >>> layout = Layout(H.CharTokenizer.from_text("a"), 16)
    >>> rows = instruction_rows([("a", "a"), ("a" * 9, "a"), ("a" * 5, "")], layout.tokenizer, 16, layout.prompt_len)
    >>> full_prompts(rows, layout, count=1).tolist() == rows[1:2].tolist(), len(full_prompts(rows, layout, count=9))
    (True, 2)
    """
    full = rows[rows[:, layout.prompt_len] == H.START_ID]
    return full[torch.linspace(0, len(full) - 1, min(count, len(full))).long()]


def as_plain_text(rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    r"""The same speeches as pre-training knows them: no [START], an empty line for [END], and after it masks.

    What is masked for good says nothing of where a speech ends.

    Returns:
        LongTensor[N, seq_len], and BoolTensor[N, seq_len]: the speech and its empty line.

    >>> layout = Layout(H.CharTokenizer.from_text("\nab"), 16)
    >>> plain, scored = as_plain_text(instruction_rows([("aaaaa", "bb")], layout.tokenizer, 16, 5), layout)
    >>> layout.tokenizer.decode(plain[0]), layout.tokenizer.decode(plain[scored])
    ('aaaaabb\n\n███████', 'bb\n\n')
    """
    plain, scored = torch.full_like(rows, H.MASK_ID), torch.zeros_like(rows, dtype=torch.bool)
    for row, text, mark in zip(rows, plain, scored):
        ids = layout.tokenizer.encode(layout.tokenizer.decode(row) + layout.known("\n\n"))
        text[: len(ids)] = ids
        mark[layout.prompt_len : len(ids)] = True
    return plain, scored


def sft_table(untuned: dict, tuned: dict, rows: Tensor, layout: Layout, n_samples: int) -> pd.DataFrame:
    """Nats per character of *this speech, and then its end*, before and after tuning, and their paired difference.

    Args:
        untuned, tuned: the models, "LLaDA" (a bound, from `n_samples` masks) and "AR" (exact).
        rows: of `full_prompts`, so that both stages see the same prompts.

    >>> layout = Layout(H.CharTokenizer.from_text("\\nab"), 16)
    >>> blank = {"LLaDA": lambda ids: torch.zeros(*ids.shape, 7), "AR": lambda ids: torch.zeros(*ids.shape, 7)}
    >>> rows = instruction_rows([("aaaaa", "bb"), ("aaaaa", "ba")], layout.tokenizer, 16, 5)
    >>> table = sft_table(blank, blank, rows, layout, n_samples=2)
    >>> table["row"].tolist()[:3], (table["nats/char"][:3] / np.log(7)).round(2).tolist()  # 4 tokens, then 10; for 2 characters
    (['LLaDA, before', 'LLaDA, after', 'LLaDA, after − before'], [2.0, 5.0, 3.0])
    """
    spoken = speech_tokens(rows).sum(dim=1)
    nats = {}
    for stage, models, (sequences, scored) in (
        ("before", untuned, as_plain_text(rows, layout)),
        ("after", tuned, (rows, response_tokens(rows))),
    ):
        options = {"n_samples": n_samples, "maskable": scored, "generator": torch.Generator().manual_seed(0)}
        nats["LLaDA", stage] = low_noise_nelbo(models["LLaDA"], sequences, H.MASK_ID, **options).cpu()
        nats["AR", stage] = H.ar_nll(models["AR"], sequences, H.START_ID, counted=scored).cpu()
    lines = []
    for name in ("LLaDA", "AR"):
        nats[name, "after − before"] = nats[name, "after"] - nats[name, "before"]
        for stage in ("before", "after", "after − before"):
            mean, half = H.per_character(nats[name, stage], spoken)
            lines.append({"row": f"{name}, {stage}", "nats/char": mean, "95% ±": half, "speeches": len(rows)})
    return pd.DataFrame(lines)


def sample_answers(untuned: dict, tuned: dict, rows: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Answers to the prompts of `rows` at temperature 1: LongTensor[N, answer_len] by decoder, one longer before tuning.

    Low-confidence remasking is surest of [END] and cuts answers short; the paper's two ways out (its appendix B.4) are to commit
    [END] last ("late"), or to decode in blocks from the left.

    >>> layout = Layout(H.CharTokenizer.from_text("ab"), 16)
    >>> blank = lambda ids: torch.zeros(*ids.shape, 6)
    >>> causal = H.Transformer(H.ModelConfig(6, 16, n_layer=1, n_head=1, n_embd=4, causal=True)).eval()
    >>> rows = instruction_rows([("aaaaa", "b")], layout.tokenizer, 16, 5)
    >>> made = sample_answers(models := {"LLaDA": blank, "AR": causal}, models, rows, layout)
    >>> {ids.shape[1] for ids in made.values()}, bool((made["AR, before tuning"] == H.END_ID).any())
    ({10, 11}, False)
    """
    never, start = (H.PAD_ID, H.START_ID), layout.prompt_len + 1
    device = next(tuned["AR"].parameters()).device
    asked = rows.masked_fill(torch.arange(layout.seq_len) >= start, H.MASK_ID).to(device)
    plain = torch.cat((asked[:, : start - 1], torch.full_like(asked[:, start - 1 :], H.MASK_ID)), dim=1)

    def by_llada(model, template: Tensor, remasking="random", forbidden=never, **options) -> Tensor:
        options |= {"mask_id": H.MASK_ID, "steps": layout.answer_len // 2, "temperature": 1.0}
        generator = torch.Generator().manual_seed(0)
        made = H.reverse_process(model, template, remasking=remasking, forbidden=forbidden, generator=generator, **options)
        return made.ids[:, template[0].ne(H.MASK_ID).sum() :]

    def by_ar(model, prompt: Tensor, forbidden=never) -> Tensor:
        options = {"forbidden": (*forbidden, H.MASK_ID), "generator": torch.Generator().manual_seed(0)}
        length = layout.seq_len - prompt.shape[1]
        return H.generate_ar(model, prompt, length, start_id=H.START_ID, **options).ids[:, prompt.shape[1] :]

    llada, no_end = tuned["LLaDA"], (*never, H.END_ID)
    last = late("low_confidence", (H.END_ID,))
    return {
        "LLaDA, random": by_llada(llada, asked),
        "LLaDA, low-confidence": by_llada(llada, asked, "low_confidence"),
        "LLaDA, low-confidence, late": by_llada(llada, asked, last),
        "LLaDA, low-confidence, blocks": by_llada(llada, asked, "low_confidence", block_length=layout.answer_len // 5),
        "LLaDA, before tuning": by_llada(untuned["LLaDA"], plain, forbidden=no_end),
        "AR": by_ar(tuned["AR"], asked[:, :start]),
        "AR, before tuning": by_ar(untuned["AR"], asked[:, : start - 1], no_end),
    }


def answer_lengths(answers: dict[str, Tensor], rows: Tensor, layout: Layout) -> dict[str, np.ndarray]:
    """Characters before the end, by decoder, float[N]; NaN for what did not end properly. First "real", the speeches of `rows`.

    Properly means: with an empty line before tuning, afterwards with an [END] and nothing but [END] behind it.

    >>> layout = Layout(H.CharTokenizer.from_text("ab"), 8)
    >>> made = {"AR": torch.tensor([[4, 5, 3, 3], [4, 3, 5, 3], [4, 4, 4, 4]])}
    >>> {name: lengths.tolist() for name, lengths in answer_lengths(made, torch.tensor([[4, 2, 4, 3]]), layout).items()}
    {'real': [1.0], 'AR': [2.0, nan, nan]}
    """
    decode = layout.tokenizer.decode

    def length(said: Tensor, name: str) -> float:
        if "before" in name:
            found = decode(said).find(layout.known("\n\n"))
            return found if found >= 0 else np.nan
        n = int((said == H.END_ID).cumsum(dim=0).eq(0).sum())
        return n if n < len(said) and bool((said[n:] == H.END_ID).all()) else np.nan

    real = {"real": speech_tokens(rows).sum(dim=1).numpy().astype(float)}
    return real | {name: np.array([length(said, name) for said in ids.cpu()], float) for name, ids in answers.items()}


def answers_table(answers: dict[str, Tensor], lengths: dict[str, np.ndarray], layout: Layout) -> pd.DataFrame:
    """Do answers end, and are they as long as real ones? Shares of all answers, mean length of those that end properly.

    The last column is the largest distance between the two distribution functions of length (Kolmogorov-Smirnov).

    >>> layout = Layout(H.CharTokenizer.from_text("ab"), 8)
    >>> made, real = {"AR": torch.tensor([[4, 5, 3, 3], [4, 4, 4, 4]])}, np.array([2.0])
    >>> table = answers_table(made, {"real": real, "AR": np.array([2.0, np.nan])}, layout)
    >>> table[["row", "ended properly", "has an end", "mean length"]].to_numpy().tolist()
    [['real', 1.0, nan, 2.0], ['AR', 0.5, 0.5, 2.0]]
    """
    at, lines = np.arange(layout.answer_len)[:, None], []
    for name, values in lengths.items():
        ended = values[~np.isnan(values)]
        rate, half = H.share(~np.isnan(values))
        line = {"row": name, "ended properly": rate, "ended ±": half}
        if name in answers and "before" not in name:
            line["has an end"] = (answers[name] == H.END_ID).any(dim=1).float().mean().item()
        if len(ended):
            line |= {"mean length": ended.mean(), "length ±": H.half_width(ended)}
            line["largest gap to real"] = np.abs((ended <= at).mean(axis=1) - (lengths["real"] <= at).mean(axis=1)).max()
        lines.append(line)
    return pd.DataFrame(lines)
