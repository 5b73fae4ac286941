"""Who says it? The tuned models of beyond/dialogue.py tell speakers apart, and guidance (Eq. 16) tries to make them more so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond.decoding import guided
from beyond.dialogue import Layout, Sizes, Talk, instruction_rows, speech_tokens
from beyond.likelihood import choose, low_noise_nelbo


def quizzes(train_talk: Talk, val_talk: Talk) -> dict[str, tuple[list[str], Talk]]:
    """(four names, the dialogue to ask about) by quiz: "held out", the four with the most speeches in both parts, asked about
    validation speeches; "seen", the four with the most in training, asked about these, which takes memory alone.

    >>> train, val = ([("", who, "hi") for who in order] for order in ("AAABBBCCDDE", "EEEEDDCCBBA"))
    >>> {quiz: names for quiz, (names, _) in quizzes(train, val).items()}
    {'held out': ['B', 'C', 'D', 'E'], 'seen': ['A', 'B', 'C', 'D']}
    """
    train, val = (Counter(who for _, who, _ in talk) for talk in (train_talk, val_talk))
    both = sorted(train.keys() & val, key=lambda who: (-min(train[who], val[who]), -train[who] - val[who], who))
    return {"held out": (both[:4], val_talk), "seen": ([who for who, _ in train.most_common(4)], train_talk)}


def questions(names: list[str], talk: Talk, count: int) -> list[tuple[int, str, str]]:
    """(number of the speaker, speech before, speech): at most `count` of each speaker's speeches, spread evenly.

    >>> questions(["A", "B"], [("", "A", "x"), ("x", "B", "y"), ("y", "A", "z")], count=1)
    [(0, '', 'x'), (1, 'x', 'y')]
    """
    parts = [[(i, a, b) for a, who, b in talk if who == name] for i, name in enumerate(names)]
    picks = [np.linspace(0, len(part) - 1, min(count, len(part))).astype(int) for part in parts]
    return [part[k] for part, chosen in zip(parts, picks) for k in chosen]


def by_characters(names: list[str], talk: Talk, alphabet: str) -> Callable[[str], np.ndarray]:
    """The baseline, naive Bayes: speech -> nats by each speaker's own frequencies of characters, float[names].

    >>> cost = by_characters(["A", "B"], [("", "A", "xxx"), ("", "B", "yyy")], "xy")
    >>> cost("xx").argsort().tolist(), cost("y").round(2).tolist()
    ([0, 1], [1.61, 0.22])
    """
    bags = [Counter("".join(b for _, who, b in talk if who == name)) for name in names]
    costs = [{c: -math.log((bag[c] + 1) / (bag.total() + len(alphabet))) for c in alphabet} for bag in bags]
    return lambda speech: np.array([sum(cost[c] for c in speech) for cost in costs])


def named_rows(layout: Layout, names: list[str], before: str, speech: str) -> tuple[Tensor, Tensor]:
    """The speech, cut to the room there is, after each of the names: LongTensor[names, L], and which tokens are the speech's.

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16)
    >>> rows, spoken = named_rows(layout, ["A", "B"], "", "hi")
    >>> [layout.tokenizer.decode(row) for row in rows], spoken.sum(dim=1).tolist()
    (['\\n\\nA:\\nhi', '\\n\\nB:\\nhi'], [2, 2])
    """
    pairs = [(layout.ask(before, name), speech[: layout.answer_len - 1]) for name in names]
    rows = instruction_rows(pairs, layout.tokenizer, layout.seq_len, layout.prompt_len)
    return rows, speech_tokens(rows)


def name_costs(model: H.MaskPredictor, layout: Layout, names: list[str], before: str, row: Tensor, n_samples: int, seed: int):
    """log p(name) - log p(name | speech), float[names]: the name is left blank and what follows it is seen, or is masked as well.

    By Bayes' rule the least belongs to the name that makes the speech likeliest. `row` is any of `named_rows`.

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16)
    >>> rows, _ = named_rows(layout, ["A", "B"], "", "hi")
    >>> blank = lambda ids: torch.zeros(*ids.shape, layout.tokenizer.vocab_size)  # knows nothing of names
    >>> abs(name_costs(blank, layout, ["A", "B"], "", rows[0], n_samples=2, seed=0)).round(4).tolist()
    [0.0, 0.0]
    """
    encode, device = layout.tokenizer.encode, next(model.parameters()).device if hasattr(model, "parameters") else "cpu"
    prompt = encode(layout.known(f"{before}\n\n"))[-layout.prompt_len // 2 :]
    start = int((row == H.START_ID).nonzero())
    suffix = torch.cat((encode(layout.known(":\n")), row[start:]))
    suffix = suffix[: layout.seq_len - len(prompt) - max(map(len, names))].to(device)
    blanks, scores = [encode(name).to(device) for name in names], []
    for after in (suffix, suffix.masked_fill(suffix > H.END_ID, H.MASK_ID)):
        options = {"n_samples": n_samples, "suffix": after, "generator": torch.Generator().manual_seed(seed)}
        scores.append(choose(model, prompt.to(device), blanks, H.MASK_ID, **options)[1])
    return np.subtract(*reversed(scores))


def who_says(
    tuned: dict, layout: Layout, names: list[str], before: str, speech: str, n_samples: int, seed: int
) -> dict[str, np.ndarray]:
    """Nats by method, float[names], the least is the guess: Eq. 6 of the speech after each name with the same masks for all,
    the name left blank, which is closed to AR, and AR's exact number.

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16)
    >>> blank = lambda ids: torch.zeros(*ids.shape, layout.tokenizer.vocab_size)
    >>> costs = who_says({"LLaDA": blank, "AR": blank}, layout, ["A", "B"], "", "hi", n_samples=2, seed=0)
    >>> list(costs), (costs["AR, the speech"] / math.log(layout.tokenizer.vocab_size)).round(2).tolist()
    (['LLaDA, the speech', 'LLaDA, the name', 'AR, the speech'], [2.0, 2.0])
    """
    rows, scored = named_rows(layout, names, before, speech)
    exact = H.ar_nll(tuned["AR"], rows, H.START_ID, counted=scored)
    named = name_costs(tuned["LLaDA"], layout, names, before, rows[0], n_samples // 2, seed)
    starts = (rows == H.START_ID).int().argmax(dim=1)  # a short prompt is moved to the right, so that masks can be shared
    pads = [row.new_full((layout.prompt_len - int(k),), H.PAD_ID) for row, k in zip(rows, starts)]
    rows = torch.stack([torch.cat((pad, row))[: layout.seq_len] for pad, row in zip(pads, rows)])
    options = {"maskable": speech_tokens(rows), "common_masks": True, "generator": torch.Generator().manual_seed(seed)}
    bound = low_noise_nelbo(tuned["LLaDA"], rows, H.MASK_ID, n_samples=n_samples, **options)
    return {"LLaDA, the speech": bound.cpu().numpy(), "LLaDA, the name": named, "AR, the speech": exact.cpu().numpy()}


def speakers_table(tuned: dict, layout: Layout, train_talk: Talk, val_talk: Talk, sizes: Sizes) -> pd.DataFrame:
    """Who is right how often, in both quizzes; "share" is the mean over speakers, so that chance is one in four.

    "log odds, nats" is by how much the right name is ahead of the mean of the others, a finer measure. A quiz between fewer than
    two speakers is left out, and a sentence says so.

    >>> layout = Layout(H.CharTokenizer.from_text("ABCD:\\n hi"), 16)
    >>> blank = lambda ids: torch.zeros(*ids.shape, layout.tokenizer.vocab_size)
    >>> talk, sizes = [("", who, "hi") for who in "ABCD"], Sizes(None, 1, speeches=1, name_samples=2, guided=1)
    >>> table = speakers_table({"LLaDA": blank, "AR": blank}, layout, talk, talk, sizes)
    >>> table["row"].tolist()[::4], table["share"].tolist()[:2]
    (['chance', 'AR, the speech, held out', 'AR, the speech, seen'], [0.25, 0.25])
    """
    asked_of = quizzes(train_talk, val_talk)
    lines = [{"row": "chance", "share": 1 / len(asked_of["seen"][0])}]
    for quiz, (names, talk) in asked_of.items():
        if len(names) < 2:
            print(f"{quiz}: left out, the text is too short for two speakers in both of its parts")
            continue
        asked, count = questions(names, talk, sizes.speeches), by_characters(names, train_talk, layout.tokenizer.characters)
        costs = []
        for seed, (_, before, speech) in enumerate(asked):
            scored = who_says(tuned, layout, names, before, speech, sizes.name_samples, seed)
            costs.append({"characters counted": count(speech)} | scored)
        truth = np.array([i for i, *_ in asked])
        for method in costs[0]:
            table = np.stack([cost[method] for cost in costs])
            own = table[np.arange(len(table)), truth]
            odds = (table.sum(axis=1) - own) / (len(names) - 1) - own
            shares = [H.share(table[truth == i].argmin(axis=1) == i) for i in range(len(names))]
            rates, halves = zip(*shares)
            line = {"row": f"{method}, {quiz}", "share": np.mean(rates), "share ±": float(np.linalg.norm(halves)) / len(names)}
            line |= {"log odds, nats": odds.mean(), "log odds, nats ±": H.half_width(odds)}
            each = ", ".join(f"{name} {rate:.2f}" for name, rate in zip(names, rates))
            lines.append(line | {"speeches": len(asked), "each": each})
    return pd.DataFrame(lines)


def addressed(names: list[str], talk: Talk, text: str, layout: Layout, count: int) -> list[tuple[int, str]]:
    """(number of the speaker who is to answer, speech before), `count` times: the names in turns, after speeches that fill the
    prompt's place.

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16)
    >>> addressed(["A", "B"], [("hi hi", "A", ""), ("hi", "B", "")], "", layout, count=3)
    [(0, 'hi hi'), (1, 'hi hi'), (0, 'hi hi')]
    """
    pool = [before for before, _, _ in talk if len(before) >= layout.prompt_len] or [text[: layout.prompt_len]]
    return [(i % len(names), pool[i * len(pool) // count]) for i in range(count)]


def guided_answers(model: H.MaskPredictor, asked: list[tuple[int, str]], names: list[str], layout: Layout, w: float) -> list[str]:
    """An answer to each of `asked`, in random order at temperature 1, under guidance of strength w (Eq. 16).

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16)
    >>> blank = lambda ids: torch.eye(12)[4 + layout.tokenizer.characters.index("h")].mul(99.0).expand(*ids.shape, 12)
    >>> guided_answers(blank, [(0, "hi hi")], ["A", "B"], layout, w=1.0)
    ['hhhhhhhhhh']
    """
    prompts = [(layout.ask(before, names[i]), "") for i, before in asked]
    template = instruction_rows(prompts, layout.tokenizer, layout.seq_len, layout.prompt_len)
    template = template.masked_fill(torch.arange(layout.seq_len) > layout.prompt_len, H.MASK_ID)
    template = template.to(next(model.parameters()).device if hasattr(model, "parameters") else "cpu")
    options = {"temperature": 1.0, "remasking": "random", "generator": torch.Generator().manual_seed(0)}
    options |= {"steps": layout.answer_len // 2, "forbidden": (H.PAD_ID, H.START_ID)}
    made = H.reverse_process(guided(model, template[:1] != H.MASK_ID, w), template, mask_id=H.MASK_ID, **options)
    return [layout.tokenizer.decode(ids[layout.prompt_len + 1 :]) for ids in made.ids]


def referee(ar, layout: Layout, names: list[str], answers: list[tuple[int, str, str]], judge: Callable) -> dict[str, float]:
    """Scores of one group of answers (number of the speaker, speech before, answer): by how many nats each is likelier, to AR,
    under the right name than on average under the others; how plausible it is to `judge`; diversity; length.

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16)
    >>> blank = lambda ids: torch.zeros(*ids.shape, layout.tokenizer.vocab_size)
    >>> referee(blank, layout, ["A", "B"], [(0, "hi", "hihi"), (1, "hi", "")], judge=lambda text, start: 2.0)["characters"]
    2.0
    """
    odds, costs = [], []
    for own, before, speech in answers:
        rows, scored = named_rows(layout, names, before, speech)
        cost = H.ar_nll(ar, rows, H.START_ID, counted=scored).cpu()
        odds.append(float((cost.sum() - cost[own]) / (len(names) - 1) - cost[own]))
        costs += [judge(speech, 0)] if speech else []
    trigrams = [speech[i : i + 3] for *_, speech in answers for i in range(len(speech) - 2)]
    scores = {"log odds, nats": np.mean(odds), "judge nats/char": np.mean(costs) if costs else np.nan}
    scores["distinct-3"] = len(set(trigrams)) / max(1, len(trigrams))
    return scores | {"characters": sum(len(speech) for *_, speech in answers) / len(answers)}


def guidance_table(
    tuned: dict, layout: Layout, asked: list, names: list[str], judge: Callable, real: list, strengths=(0.0, 0.5, 1.0, 2.0, 4.0)
) -> pd.DataFrame:
    """What the referee says of answers under guidance, a row for each strength w, and of real speeches; intervals over groups.

    Args:
        asked: of `addressed`; real: of `questions`, the speeches to compare with.

    >>> layout = Layout(H.CharTokenizer.from_text("AB:\\n hi"), 16)
    >>> blank = lambda ids: torch.zeros(*ids.shape, layout.tokenizer.vocab_size)
    >>> asked, real = [(i % 2, "hi hi") for i in range(H.GROUPS)], [(0, "hi", "hi")]
    >>> models = {"LLaDA": blank, "AR": blank}
    >>> guidance_table(models, layout, asked, ["A", "B"], lambda text, start: 2.0, real, strengths=(0.0,))["row"].tolist()
    ['w = 0.0', 'real speeches']
    """

    def line(answers: list[tuple[int, str, str]]) -> dict[str, float]:
        return H.grouped([referee(tuned["AR"], layout, names, answers[g :: H.GROUPS], judge) for g in range(H.GROUPS)])

    lines = []
    for w in strengths:
        answers = guided_answers(tuned["LLaDA"], asked, names, layout, w)
        lines.append({"row": f"w = {w}", "w": w, **line([(*who, speech) for who, speech in zip(asked, answers)])})
    return pd.DataFrame([*lines, {"row": "real speeches", **line(real * (1 + H.GROUPS // len(real)))}])
