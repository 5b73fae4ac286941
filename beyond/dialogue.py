"""Instruction tuning (SFT, Eq. 5) on the dialogue that the corpus is: a speech is answered by the next one.

text -> dialogue -> Layout.rows -> a Job with learned=response_tokens -> tuned models, of which is asked: is the answer likelier
(sft_table), does it end (answers_table), who says it (speakers_table), does guidance make it more the speaker's (guidance_table)?
"""

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import llada_helpers as H
from beyond.decoding import guided, late
from beyond.likelihood import low_noise_nelbo


class Sizes(NamedTuple):
    """The tuning, and how much is asked afterwards."""

    sft: H.TrainConfig
    replies: int  # speeches scored and answered before and after tuning
    speeches: int  # at most so many of each of four speakers, to tell apart
    samples: int  # masks per speech there
    guided: int  # answers per strength of guidance


GENTLY = {"muon_lr": 0.005, "adamw_lr": 1e-3}
SIZES = {
    "smoke": Sizes(H.TrainConfig(20, 16, **GENTLY, evals=2, eval_windows=16), 8, 2, 4, 8),
    "cpu": Sizes(H.TrainConfig(150, 32, **GENTLY, evals=3), 96, 20, 8, 48),
    "gpu": Sizes(H.TrainConfig(300, 64, **GENTLY, evals=4), 96, 30, 16, 64),
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


def response_tokens(sequences: Tensor, separator: int = H.START_ID) -> Tensor:
    """BoolTensor[B, L]: the response, what follows the row's first separator; the prompt before it is never masked (Eq. 5).

    >>> response_tokens(torch.tensor([[7, 8, H.START_ID, 9, H.END_ID, H.PAD_ID]])).tolist()
    [[False, False, False, True, True, False]]
    """
    separators = sequences == separator
    return (separators.cumsum(dim=1) > 0) & ~separators & (sequences != H.PAD_ID)


def speech_tokens(rows: Tensor) -> Tensor:
    """BoolTensor[B, L]: the responses without their [END]."""
    return response_tokens(rows) & (rows != H.END_ID)


@dataclass(frozen=True)
class Layout:
    r"""How a dialogue is laid out in rows of `seq_len`: three eighths for the prompt, then [START], the answer, [END].

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\n hi"), seq_len=16)
    >>> layout.prompt_len, layout.answer_len, layout.ask("hi", "A")
    (5, 10, 'hi\n\nA:\n')
    >>> layout.rows([("hi", "A", "hi")]).tolist()  # "\n" is 4, ":" 6, "A" 7
    [[4, 4, 7, 6, 4, 2, 9, 10, 3, 3, 3, 3, 3, 3, 3, 3]]
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
        """Rows for SFT (Eq. 5), LongTensor[N, seq_len]: prompt [START] response [END] ... [END]; see `response_tokens`.

        [END] is an ordinary token: the model learns where to stop, and what fills the rest. [START], which is in no text,
        separates. A prompt keeps its last `prompt_len` tokens; a speech that leaves no room for one [END] after a full prompt is
        left out. ValueError: none fits.
        """
        rows, encode = [], self.tokenizer.encode
        for before, speaker, speech in talk:
            if len(speech) < self.answer_len:
                prompt = encode(self.ask(before, speaker))[-self.prompt_len :]
                row = torch.cat((prompt, torch.tensor([H.START_ID]), encode(speech)))
                rows.append(F.pad(row, (0, self.seq_len - len(row)), value=H.END_ID))
        H._refuse(not rows, f"no speech has fewer than {self.answer_len} characters; pass shorter ones, or a larger seq_len")
        return torch.stack(rows)


def in_turns(text: str, layout: Layout) -> Talk:
    """Pieces of a text without speakers, as if the last four letters of the alphabet spoke them in turns.

    >>> in_turns("abcdefghijklmnopqr", Layout(H.CharTokenizer.from_text("abcdefghijklmnopqr"), 16))
    [('abcdefghi', 'o', 'jklmnopqr')]
    """
    size, letters = min(layout.answer_len - 1, len(text) // 2), layout.tokenizer.characters[-4:]  # two pieces at least
    pieces = [text[i : i + size] for i in range(0, len(text) - size + 1, size)]
    return [(a, letters[i % len(letters)], b) for i, (a, b) in enumerate(itertools.pairwise(pieces))]


def talks(texts: tuple[str, str, str], layout: Layout) -> list[Talk]:
    """The dialogue of training, validation and test text, cut out separately: no speech is in two. No play: `in_turns`.

    A play has four speakers that answer full prompts in training and in validation, and in each part a speech that fits after one
    that fills the prompt.
    """
    parts = [dialogue(text) for text in texts]
    four = all(len(quiz(part, parts[0], layout, 1)) == 4 for part in parts[:2])
    lengths = [[(len(before), len(speech)) for before, _, speech in part] for part in parts]
    usable = all(any(p >= layout.prompt_len and s < layout.answer_len for p, s in part) for part in lengths)
    return parts if usable and four else [in_turns(text, layout) for text in texts]


def full_prompts(rows: Tensor, layout: Layout, count: int) -> Tensor:
    """At most `count` of the rows whose prompt fills its place, spread evenly: LongTensor[N, seq_len]."""
    full = rows[rows[:, layout.prompt_len] == H.START_ID]
    return full[torch.linspace(0, len(full) - 1, min(count, len(full))).long()]


def as_plain_text(rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    r"""The same speeches as pre-training knows them: no [START], an empty line for [END], and after it masks.

    What is masked for good says nothing of where a speech ends. Returns LongTensor[N, seq_len], and BoolTensor[N, seq_len], the
    speech and its empty line.

    >>> layout = Layout(H.CharTokenizer.from_text("\nab"), 16)
    >>> plain, scored = as_plain_text(layout.rows([("aaa", "", "bb")]), layout)
    >>> layout.tokenizer.decode(plain[0]), layout.tokenizer.decode(plain[scored])
    ('aa\n\n\nbb\n\n███████', 'bb\n\n')
    """
    plain, scored = torch.full_like(rows, H.MASK_ID), torch.zeros_like(rows, dtype=torch.bool)
    for row, text, mark in zip(rows, plain, scored):
        ids = layout.tokenizer.encode(layout.tokenizer.decode(row) + layout.known("\n\n"))
        text[: len(ids)] = ids
        mark[layout.prompt_len : len(ids)] = True
    return plain, scored


def sft_table(untuned: dict, tuned: dict, rows: Tensor, layout: Layout, n_samples: int) -> pd.DataFrame:
    """Nats per character of *this speech, and then its end*, before and after tuning, and their paired difference.

    The models are "LLaDA" (a bound, from `n_samples` masks) and "AR" (exact); `rows` are of `full_prompts`, so that both stages
    see the same prompts.
    """
    spoken, nats, lines = speech_tokens(rows).sum(dim=1), {}, []
    before, after = (untuned, *as_plain_text(rows, layout)), (tuned, rows, response_tokens(rows))
    for stage, (models, sequences, scored) in (("before", before), ("after", after)):
        options = {"n_samples": n_samples, "maskable": scored, "generator": torch.Generator().manual_seed(0)}
        nats["LLaDA", stage] = low_noise_nelbo(models["LLaDA"], sequences, H.MASK_ID, **options).cpu()
        nats["AR", stage] = H.ar_nll(models["AR"], sequences, H.START_ID, counted=scored).cpu()
    for name in ("LLaDA", "AR"):
        nats[name, "after − before"] = nats[name, "after"] - nats[name, "before"]
        for stage in ("before", "after", "after − before"):
            mean, half = H.per_character(nats[name, stage], spoken)
            lines.append({"row": f"{name}, {stage}", "nats/char": mean, "95% ±": half, "speeches": len(rows)})
    return pd.DataFrame(lines)


def respond(model, rows: Tensor, given: int, *, w: float = 0.0, forbidden=(H.PAD_ID, H.START_ID), **options) -> Tensor:
    """What a model writes after the first `given` tokens of each row, at temperature 1: LongTensor[N, L - given].

    LLaDA commits two tokens a pass, in random order unless `options` say otherwise, under guidance of strength w (Eq. 16).
    """
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else rows.device
    template = rows.masked_fill(torch.arange(rows.shape[1]) >= given, H.MASK_ID).to(device)
    options |= {"temperature": 1.0, "generator": torch.Generator().manual_seed(0)}
    if getattr(getattr(model, "config", None), "causal", False):
        options |= {"start_id": H.START_ID, "forbidden": (H.MASK_ID, *forbidden)}
        return H.generate_ar(model, template[:, :given], rows.shape[1] - given, **options).ids[:, given:]
    options = {"remasking": "random", "steps": (rows.shape[1] - given) // 2, "forbidden": forbidden, **options}
    return H.reverse_process(guided(model, template[:1] != H.MASK_ID, w), template, mask_id=H.MASK_ID, **options).ids[:, given:]


def sample_answers(untuned: dict, tuned: dict, rows: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Answers to the prompts of `rows`: LongTensor[N, answer_len] by decoder, one longer before tuning.

    Low-confidence remasking is surest of [END] and cuts answers short; the paper's two ways out (section 3.2, appendix B.4) are
    to commit [END] last ("late"), or to decode in blocks from the left.
    """
    start, no_end = layout.prompt_len + 1, (H.PAD_ID, H.START_ID, H.END_ID)
    llada = functools.partial(respond, tuned["LLaDA"], rows, start)
    return {
        "LLaDA, random": llada(),
        "LLaDA, low-confidence": llada(remasking="low_confidence"),
        "LLaDA, low-confidence, late": llada(remasking=late("low_confidence", (H.END_ID,))),
        "LLaDA, low-confidence, blocks": llada(remasking="low_confidence", block_length=layout.answer_len // 5),
        "LLaDA, before tuning": respond(untuned["LLaDA"], rows, start - 1, forbidden=no_end),
        "AR": respond(tuned["AR"], rows, start),
        "AR, before tuning": respond(untuned["AR"], rows, start - 1, forbidden=no_end),
    }


def answer_lengths(answers: dict[str, Tensor], rows: Tensor, layout: Layout) -> dict[str, np.ndarray]:
    """Characters before the end, by decoder, float[N]; NaN for what did not end properly. First "real", the speeches of `rows`.

    Properly means: with an empty line before tuning, afterwards with an [END] and nothing but [END] behind it.
    """

    def length(said: Tensor, name: str) -> float:
        if "before" in name:
            found = layout.tokenizer.decode(said).find(layout.known("\n\n"))
            return found if found >= 0 else np.nan
        n = int((said == H.END_ID).cumsum(dim=0).eq(0).sum())
        return n if n < len(said) and bool((said[n:] == H.END_ID).all()) else np.nan

    real = {"real": speech_tokens(rows).sum(dim=1).cpu().numpy().astype(float)}
    return real | {name: np.array([length(said, name) for said in ids.cpu()], float) for name, ids in answers.items()}


def answers_table(answers: dict[str, Tensor], lengths: dict[str, np.ndarray]) -> pd.DataFrame:
    """Do answers end, and are they as long as real ones? Shares of all answers, mean length of those that end properly."""
    lines = []
    for name, values in lengths.items():
        ended, (rate, half) = values[~np.isnan(values)], H.share(~np.isnan(values))
        lines.append({"row": name, "ended properly": rate, "ended ±": half})
        if name in answers and "before" not in name:
            lines[-1]["has an end"] = (answers[name] == H.END_ID).any(dim=1).float().mean().item()
        if len(ended):
            lines[-1] |= {"mean length": ended.mean(), "length ±": H.half_width(ended)}
    return pd.DataFrame(lines)


def quiz(talk: Talk, trained: Talk, layout: Layout, count: int) -> Talk:
    """Speeches of the four speakers with the most in both talks, `count` each or equally fewer: full prompts, cut to the room.

    >>> layout, talk = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16), [("hi hi", who, "hi") for who in "ABBC"]
    >>> quiz(talk, talk[:3], layout, count=9)
    [('hi hi', 'B', 'hi'), ('hi hi', 'A', 'hi')]
    """
    room = layout.answer_len - 1
    full = [(before, who, speech[:room]) for before, who, speech in talk if len(before) >= layout.prompt_len]
    four = (Counter(who for _, who, _ in full) & Counter(who for _, who, _ in trained)).most_common(4)
    spoken = [[turn for turn in full if turn[1] == name] for name, _ in four]
    count = min([count, *map(len, spoken)])
    return [turns[i] for turns in spoken for i in np.linspace(0, len(turns) - 1, count).astype(int)]


def name_nats(model: H.MaskPredictor, names: list[str], asked: Talk, layout: Layout, n_samples: int = 0) -> np.ndarray:
    """-log p(speech | name), float[N, names]: Eq. 6 with the name in the prompt, one mask for all; AR, exact, needs none."""
    costs, generator = [], torch.Generator().manual_seed(0)
    for before, _, speech in asked:
        rows = layout.rows([(before, name, speech[: layout.answer_len - 1]) for name in names])
        spoken = speech_tokens(rows)
        if n_samples:
            options = {"n_samples": n_samples, "maskable": spoken, "common_masks": True, "generator": generator}
            costs.append(low_noise_nelbo(model, rows, H.MASK_ID, **options))
        else:
            costs.append(H.ar_nll(model, rows, H.START_ID, counted=spoken))
    return torch.stack(costs).cpu().numpy()


def by_characters(names: list[str], asked: Talk, trained: Talk) -> np.ndarray:
    """The baseline, naive Bayes: nats of each speech by each speaker's own frequencies of characters, float[N, names].

    >>> by_characters(["A", "B"], [("", "A", "xx")], [("", "A", "xxx"), ("", "B", "yyy")]).argmin(axis=1).tolist()
    [0]
    """
    alphabet = {c for *_, speech in [*asked, *trained] for c in speech}
    bags = [Counter("".join(speech for _, who, speech in trained if who == name)) for name in names]
    costs = [{c: -np.log((bag[c] + 1) / (sum(bag.values()) + len(alphabet))) for c in alphabet} for bag in bags]
    return np.array([[sum(cost[c] for c in speech) for cost in costs] for *_, speech in asked])


def ahead(costs: np.ndarray, names: list[str], asked: Talk) -> np.ndarray:
    """By how many nats the right name is ahead of the mean of the others, float[N], from costs [N, names].

    >>> ahead(np.array([[1.0, 2.0, 4.0]]), ["A", "B", "C"], [("", "A", "hi")]).tolist()
    [2.0]
    """
    own = costs[np.arange(len(asked)), [names.index(who) for _, who, _ in asked]]
    return (costs.sum(axis=1) - own) / (len(names) - 1) - own


def speakers_table(tuned: dict, quizzes: dict[str, Talk], trained: Talk, layout: Layout, n_samples: int) -> pd.DataFrame:
    """Which speaker makes a speech likeliest? How often it is the right one, and by how many nats that is ahead of the others.

    A quiz between fewer than four speakers is left out, and a sentence says so.
    """
    lines = [{"row": "chance", "share": 0.25}]
    for title, asked in quizzes.items():
        names = list(dict.fromkeys(who for _, who, _ in asked))
        if len(names) < 4:
            print(f"{title}: left out, the text is too short for four speakers in both of its parts")
            continue
        costs = {"characters counted": by_characters(names, asked, trained)}
        costs["LLaDA, the speech"] = name_nats(tuned["LLaDA"], names, asked, layout, n_samples)
        costs["AR, the speech"] = name_nats(tuned["AR"], names, asked, layout)
        for method, cost in costs.items():
            share, half = H.share([names[i] == who for i, (_, who, _) in zip(cost.argmin(axis=1), asked)])
            odds, line = ahead(cost, names, asked), {"row": f"{method}, {title}", "share": share, "share ±": half}
            line |= {"log odds, nats": odds.mean(), "log odds, nats ±": H.half_width(odds)}
            lines.append(line | {"speeches": len(asked), "speakers": ", ".join(names)})
    return pd.DataFrame(lines)


def guidance_table(tuned: dict, talk: Talk, real: Talk, layout: Layout, count: int, strengths=(0.0, 1.0, 4.0)) -> pd.DataFrame:
    """By how many nats AR holds the right name ahead, of LLaDA's answers under guidance (Eq. 16) by strength w, and of `real`.

    `count` answers to speeches of `talk` that fill the prompt, as the speakers of `real` in turns; "minus w = 0" is paired.
    """
    names, lines = list(dict.fromkeys(who for _, who, _ in real)), []
    befores = [before for before, *_ in talk if len(before) >= layout.prompt_len]
    asked = [(befores[i * len(befores) // count], names[i % len(names)], "") for i in range(count)]
    told, odds = {None: real}, {}
    for w in strengths:
        made = respond(tuned["LLaDA"], layout.rows(asked), layout.prompt_len + 1, w=w)
        told[w] = [(before, who, layout.tokenizer.decode(ids)) for (before, who, _), ids in zip(asked, made)]
    for w, said in told.items():
        odds[w] = ahead(name_nats(tuned["AR"], names, said, layout), names, said)
        columns = {"log odds, nats": odds[w], "characters": [len(speech) for *_, speech in said]}
        if w is not None:
            columns["minus w = 0"] = odds[w] - odds[strengths[0]]
        lines.append({"row": "real speeches" if w is None else f"w = {w}", "w": w, "answers": len(said)})
        lines[-1] |= {k: v for key, x in columns.items() for k, v in ((key, np.mean(x)), (f"{key} ±", H.half_width(x)))}
    return pd.DataFrame(lines)
