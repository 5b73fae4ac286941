"""The reversal curse (Berglund et al. 2023, arXiv:2309.12288) on invented facts: told in one direction, asked in the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond.toy import WordTokenizer

SIZES = {"smoke": (2, 40, 2), "cpu": (30, 1000, 2), "gpu": (80, 2000, 3)}  # facts per group, steps, seeds
SIZES["cpu_long"] = SIZES["cpu"]

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
    >>> Facts._fields, facts.told.tolist(), len(facts.training_rows())
    (('tokenizer', 'forwards', 'backwards', 'told'), ['forwards', 'forwards', 'backwards', 'backwards', 'both', 'both'], 8)
    """

    tokenizer: WordTokenizer
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
    tokenizer = WordTokenizer.from_text([*names, *ROLES, *PLACES, "is", "the", "of", "."])
    ways = ([[x, "is", "the", y, "of", z, "."], ["the", y, "of", z, "is", x, "."]] for x, (y, z) in zip(names, described))
    forwards, backwards = (torch.stack([tokenizer.encode(words) for words in way]) for way in zip(*ways))
    return Facts(tokenizer, forwards, backwards, np.repeat(["forwards", "backwards", "both"], per_group))


def train_on_facts(facts: Facts, causal: bool, steps: int, seed: int, root: str = "."):
    """A small LLaDA or AR model that has learned what is told of `facts`; `root` is that of `train`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = train_on_facts(invented_facts(per_group=1, seed=0), causal=True, steps=2, seed=0, root=folder)
    >>> model.config.causal, model.config.seq_len
    (True, 7)
    """
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
    """Exact match as told, reversed and told both ways, for LLaDA and AR; each seed has its own facts and weights.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = reversal_table(per_group=1, steps=1, seeds=1, root=folder)
    >>> table["row"].tolist()[:3:2], len(table), table["questions"].unique().tolist()
    (['LLaDA, as told, X is the ...', 'AR, as told, X is the ...'], 12, [1])
    """
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
