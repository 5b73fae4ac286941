"""Asked against the direction of reading: the reversal curse (Berglund et al. 2023, arXiv:2309.12288), and which text precedes.

Invented facts are told in one direction and asked in the other; of four pieces of text one follows, or precedes, what is given.
"""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond.likelihood import choose
from beyond.quality import SPECIAL
from beyond.toy import WordTokenizer

SIZES = {"smoke": (2, 40, 2), "cpu": (30, 1000, 2), "gpu": (80, 2000, 3)}  # facts per group, steps, seeds
ITEMS = {"smoke": (12, (1, 2)), "cpu": (240, (1, 4, 16)), "gpu": (400, (1, 4, 16))}  # questions, masks per option for LLaDA
SIZES["cpu_long"], ITEMS["cpu_long"] = SIZES["cpu"], ITEMS["cpu"]

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
    """Sentences about invented people, in words, each person's in both directions; one row per fact."""

    tokenizer: WordTokenizer
    forwards: Tensor  # LongTensor[F, 7], "X is the Y of Z ."
    backwards: Tensor  # LongTensor[F, 7], "the Y of Z is X ."
    told: np.ndarray  # [F] of str, what is trained on: "forwards", "backwards" or "both"

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
    H._refuse(not 0 < count <= len(names), f"per_group={per_group}: pass 1 to {len(names) // 3}, there are {len(names)} names")
    names = rng.permutation(names)[:count]
    described = [(ROLES[i % len(ROLES)], PLACES[i // len(ROLES)]) for i in rng.permutation(len(ROLES) * len(PLACES))[:count]]
    tokenizer = WordTokenizer.from_text([*names, *ROLES, *PLACES, "is", "the", "of", "."])
    ways = ([[x, "is", "the", y, "of", z, "."], ["the", y, "of", z, "is", x, "."]] for x, (y, z) in zip(names, described))
    forwards, backwards = (torch.stack([tokenizer.encode(words) for words in way]) for way in zip(*ways))
    return Facts(tokenizer, forwards, backwards, np.repeat(["forwards", "backwards", "both"], per_group))


def train_on_facts(facts: Facts, causal: bool, steps: int, seed: int, root: str = "."):
    """A small LLaDA or AR model that has learned what is told of `facts`; `root` is that of `train`."""
    rows = facts.training_rows()
    shape = H.ModelConfig(facts.tokenizer.vocab_size, rows.shape[1], n_layer=2, n_head=4, n_embd=96, causal=causal)
    job = H.Job(shape, H.TrainConfig(steps, 64, evals=2, seed=seed), rows, rows)
    return H.train(f"facts-{'ar' if causal else 'llada'}-{seed}", job, root=root, quiet=True).model


def answered(model, rows: Tensor, given: int) -> np.ndarray:
    """bool[N]: asked with the first `given` words of each row, does the model greedily write the rest as it should be?

    >>> rows = invented_facts(per_group=1, seed=0).forwards
    >>> knows = lambda ids: torch.nn.functional.one_hot(rows[:1], 80).float().expand(len(ids), -1, -1)  # one fact
    >>> answered(knows, rows, given=3).tolist()
    [True, False, False]
    """
    config = getattr(model, "config", None)
    rows = rows.to(next(model.parameters()).device if config else "cpu")
    rest = rows.shape[1] - given
    if config and config.causal:
        made = H.generate_ar(model, rows[:, :given], rest, start_id=H.START_ID, temperature=0.0)
    else:
        asked = rows.masked_fill(torch.arange(rows.shape[1], device=rows.device) >= given, H.MASK_ID)
        made = H.reverse_process(model, asked, mask_id=H.MASK_ID, steps=rest)
    return (made.ids == rows).all(dim=1).cpu().numpy()


QUESTIONS = {"X is the ...": ("forwards", 3), "the Y of Z is ...": ("backwards", 5)}  # the telling that answers it, words given
OTHER = {"forwards": "backwards", "backwards": "forwards"}


def reversal_table(per_group: int, steps: int, seeds: int, root: str = ".") -> pd.DataFrame:
    """Exact match as told, reversed and told both ways, for LLaDA and AR; each seed has its own facts and weights."""
    hits = []
    for seed in range(seeds):
        facts = invented_facts(per_group, seed)
        for name, causal in (("LLaDA", False), ("AR", True)):
            model = train_on_facts(facts, causal, steps, seed, root)
            for question, (telling, given) in QUESTIONS.items():
                right = answered(model, getattr(facts, telling), given)
                hits += [{"model": name, "question": question, "told": t, "right": r} for t, r in zip(facts.told, right)]
    hits, lines = pd.DataFrame(hits), []
    for way in ("as told", "reversed", "told both ways"):
        for name in ("LLaDA", "AR"):
            for question, (telling, _) in QUESTIONS.items():
                told = {"as told": telling, "reversed": OTHER[telling], "told both ways": "both"}[way]
                part = hits[(hits["model"] == name) & (hits["question"] == question) & (hits["told"] == told)]
                rate, half = H.share(part["right"])
                line = {"row": f"{name}, {way}, {question}", "model": name, "way": way, "question": question}
                lines.append(line | {"exact match": rate, "95% ±": half, "questions": len(part)})
    return pd.DataFrame(lines)


class Quiz(NamedTuple):
    """Questions with four answers each, of which the first is the true one."""

    known: Tensor  # LongTensor[N, C], what is given
    options: Tensor  # LongTensor[N, 4, A]
    forward: bool  # does the answer follow what is given, or precede it?

    def texts(self) -> Tensor:
        """LongTensor[N, 4, C + A]: what is given together with each answer."""
        known = self.known[:, None].expand(-1, self.options.shape[1], -1)
        return torch.cat((known, self.options) if self.forward else (self.options, known), dim=-1)


def shuffled(text: str, rng: np.random.Generator) -> str:
    """The same words in another order, the white space where it was.

    >>> shuffled("to be, or\\nnot to be", np.random.default_rng(1))
    'to to or\\nbe, be not'
    """
    parts = re.findall(r"\s+|\S+", text)
    words = [i for i, part in enumerate(parts) if not part.isspace()]
    mixed = dict(zip(words, rng.permutation(words)))
    return "".join(parts[mixed.get(i, i)] for i in range(len(parts)))


def make_quiz(rows: Tensor, answer: int, forward: bool, tokenizer: H.CharTokenizer, ar, seed: int = 0) -> Quiz:
    """A question of each row [N, C + answer]: its last (or, backwards, its first) `answer` characters are asked for.

    The other answers: that of the row before, the truth with its words shuffled, and what the AR model would have written; it
    cannot write backwards, where that of another row takes its place.
    """
    known, truth = (rows[:, :-answer], rows[:, -answer:]) if forward else (rows[:, answer:], rows[:, :answer])
    rng, other, third = np.random.default_rng(seed), truth.roll(1, dims=0), truth.roll(2, dims=0)
    if forward:
        device = next(ar.parameters()).device if isinstance(ar, torch.nn.Module) else rows.device
        options = {"start_id": H.START_ID, "forbidden": (H.MASK_ID, *SPECIAL), "generator": torch.Generator().manual_seed(seed)}
        third = H.generate_ar(ar, known.to(device), answer, **options).ids[:, -answer:].to(rows.device)
    mixed = torch.stack([tokenizer.encode(shuffled(tokenizer.decode(row), rng)) for row in truth])
    return Quiz(known, torch.stack((truth, other, mixed, third), dim=1), forward)


def score_ar(model, quiz: Quiz) -> Tensor:
    """log p of the whole text with each answer, FloatTensor[N, 4], nats.

    Where the answer follows, what is given adds the same to all four; where it precedes, only whole texts can be compared.
    """
    texts = quiz.texts()
    return -H.ar_nll(model, texts.flatten(0, 1), H.START_ID).view(texts.shape[:2]).cpu()


def score_llada(model, quiz: Quiz, n_samples: int) -> Tensor:
    """Lower bounds on log p(answer | what is given), FloatTensor[N, 4], nats; a question's four share their masks (Eq. 6)."""
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else quiz.known.device
    scores = []
    for i, (known, options) in enumerate(zip(quiz.known.to(device), quiz.options.to(device))):
        prompt, suffix = (known, known[:0]) if quiz.forward else (known[:0], known)
        how = {"n_samples": n_samples, "suffix": suffix, "generator": torch.Generator().manual_seed(i)}
        scores.append(choose(model, prompt, list(options), H.MASK_ID, **how)[1])
    return torch.tensor(scores)


def choice_table(models: dict, ids: Tensor, tokenizer: H.CharTokenizer, items: int, samples: tuple, given: int, asked: int):
    """How often the true text wins among four, which follow, or precede, `given` characters of a text [n]; whom it loses to.

    "minus AR" is paired by question.
    """
    rows = ids[: len(ids) // (given + asked) * (given + asked)].view(-1, given + asked)
    rows, lines = rows[torch.linspace(0, len(rows) - 1, min(items, len(rows))).long()], []
    for task, forward in (("next", True), ("preceding", False)):
        quiz = make_quiz(rows, asked, forward, tokenizer, models["AR"])
        scored = {("AR", "exact"): score_ar(models["AR"], quiz)}
        scored |= {("LLaDA", k): score_llada(models["LLaDA"], quiz, k) for k in samples}
        wrong = ("other text", "shuffled words", "AR's own" if forward else "more other text")
        for (model, k), scores in scored.items():
            label = {samples[0]: "one sample", samples[-1]: "most samples", "exact": "exact"}.get(k, f"{k} samples")
            picked = scores.argmax(dim=1)
            line = {"row": f"{task}, {model}, {label}", "task": task, "model": model, "samples": k}
            line["accuracy"], line["accuracy ±"] = H.share(picked == 0)
            apart = (picked == 0).double() - (scored["AR", "exact"].argmax(dim=1) == 0).double()
            line |= {"minus AR": float(apart.mean()), "minus AR ±": H.half_width(apart.numpy())}
            lost = {f"picked {name}": float((picked == i).float().mean()) for i, name in enumerate(wrong, start=1)}
            lines.append(line | {"items": len(scores)} | lost)
    return pd.DataFrame(lines)
