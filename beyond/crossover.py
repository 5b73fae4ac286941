"""Little text, many epochs: where does the masked diffusion model overtake the autoregressive one?

Both are trained on the first so many characters, each number of epochs being a training of its own with its own decay, since the
decay is what brings a long training's loss down. Which regularisation, which number of epochs and which checkpoint is best is
chosen on the validation text; all are scored on the test text, exactly, so that no number profits from being chosen and no bound
stands beside an exact value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond import decoding, exact
from beyond.quality import parts

NOISE = 0.15  # of the inputs


class MaskedInputs(H.Transformer):
    """Transformer that finds 15% of its inputs masked in training (Chen et al., arXiv:2606.16246; Gao et al. mask more)."""

    def noise(self, ids: Tensor) -> Tensor:
        return torch.full_like(ids, H.MASK_ID)

    def forward(self, ids: Tensor, cache: H.KVCache | None = None, start: int = 0) -> Tensor:
        if self.training:
            ids = ids.where(torch.rand(ids.shape, device=ids.device) >= NOISE, self.noise(ids))
        return super().forward(ids, cache, start)


class RandomInputs(MaskedInputs):
    """Transformer that finds 15% of its inputs replaced by any character while it is trained (Chen et al., arXiv:2606.16246)."""

    def noise(self, ids: Tensor) -> Tensor:
        return torch.randint_like(ids, len(H.SPECIAL_TOKENS), self.config.vocab_size)


ARCHITECTURES = {"": H.Transformer, "masked": MaskedInputs, "random": RandomInputs}


class Kind(NamedTuple):
    """A model and its regularisation."""

    model: str  # "LLaDA" or "AR"
    dropout: float = 0.0
    weight_decay: float = 0.0
    inputs: str = ""  # "masked" or "random": 15% of what is read in training

    @property
    def name(self) -> str:
        noise = f", {self.inputs} inputs" * bool(self.inputs)
        parts = {"dropout": self.dropout, "weight decay": self.weight_decay}
        return self.model + noise + "".join(f", {name} {value}" for name, value in parts.items() if value)


@dataclass(frozen=True)
class Crossover:
    """Sizes of the experiment: for each length of training text and each kind of model a ladder of numbers of epochs."""

    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    ladders: dict[int, dict[Kind, tuple[int, ...]]]
    seeds: int = 3
    windows: int = 256  # that checkpoints are chosen by; twice as many are scored

    def steps(self, characters: int, epochs: int) -> int:
        """How many steps read that many characters so often."""
        return max(1, round(epochs * characters / (self.batch_size * self.seq_len)))


PLAIN, REGULARISED = Kind("LLaDA"), Kind("LLaDA", 0.1, 0.1)
AR = {Kind("AR"): (10, 25, 60), Kind("AR", 0.2, 0.1): (10, 25, 60), Kind("AR", 0.2, 0.3): (10, 25, 60)}
AR |= {Kind("AR", 0.0, 0.1, inputs): (10, 25, 60, 150) for inputs in ("masked", "random")}
_FEW = dict.fromkeys((PLAIN, REGULARISED, Kind("AR"), Kind("AR", 0.0, 0.1, "masked")), (10, 40))
SMALL = Crossover(64, 2, 2, 32, 16, {400: _FEW, 1_600: _FEW}, seeds=2, windows=16)
_CPU = Crossover(64, 3, 2, 64, 16, {
    5_000: {PLAIN: (60, 125), REGULARISED: (60, 125, 500), **AR},
    10_000: {REGULARISED: (125, 500, 1_000), **AR},
    20_000: {REGULARISED: (500, 1_000, 4_000), **AR},
})  # fmt: skip
_LARGE = {REGULARISED: (125, 500, 2_000), **AR}
_GPU = Crossover(256, 6, 6, 384, 64, {80_000: _LARGE, 320_000: _LARGE})
SIZES = {"smoke": (SMALL, SMALL), "cpu": (SMALL, _CPU), "cpu_long": (SMALL, _CPU), "gpu": (SMALL, _GPU)}  # short form, full one


def crossover_jobs(sizes: Crossover, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """A row for each length of text, kind and number of epochs, a training for each seed."""
    jobs = {}
    for count, ladders in sizes.ladders.items():
        for kind, ladder in ladders.items():
            shape = (vocab_size, sizes.seq_len, sizes.n_layer, sizes.n_head, sizes.n_embd)
            model = H.ModelConfig(*shape, kind.dropout, causal=kind.model == "AR")
            data = {"train_ids": train_ids[:count], "val_ids": val_ids, "architecture": ARCHITECTURES[kind.inputs]}
            for epochs in ladder:
                steps = sizes.steps(count, epochs)
                options = {"evals": min(20, max(1, steps // 10)), "eval_windows": sizes.windows}
                config = H.TrainConfig(steps, sizes.batch_size, weight_decay=kind.weight_decay, **options)
                trainings = [replace(config, seed=seed) for seed in range(sizes.seeds)]
                row = f"{kind.name}, {count:,} characters, {epochs:,} epochs"
                jobs[row] = [H.Job(model, training, **data) for training in trainings]
    return jobs


def crossover_measure(text: str) -> Callable[[H.Job, H.Run], dict]:
    """What `run_jobs` adds to a row: model and kind, the validation loss it is chosen by, exact nats per character of test text.

    LLaDA is scored as the decoder that writes one character a pass in bit-reversed order; "NELBO" is its bound on the same text.
    """
    *_, test_ids = parts(H.CharTokenizer.from_text(text).encode(text))

    def measure(job: H.Job, run: H.Run) -> dict:
        inputs = next(name for name, architecture in ARCHITECTURES.items() if architecture is job.architecture)
        kind = Kind("AR" if job.model.causal else "LLaDA", job.model.dropout, job.train.weight_decay, inputs)
        config = replace(job.train, eval_windows=2 * job.train.eval_windows)
        scoring = replace(job, train=config, val_ids=test_ids)
        windows = scoring.validation_sequences()
        counts = scoring.learned(windows).sum(dim=1)
        nats, line = scoring.validation_nats(run.model, windows).cpu(), {}
        if kind.model == "LLaDA":
            line["NELBO"], _ = H.per_character(nats, counts)
            nats = exact.measured(run.model, windows, decoding.bit_reversed, job.model.seq_len)[0].sum(dim=1)
        score, interval = H.per_character(nats, counts)
        known = {"scored on": "test text", "model": kind.model, "kind": kind.name, "chosen by": run.summary["best"]}
        return known | line | {"nats/char": score, "95% ±": interval}

    return measure


def crossover_best(table: pd.DataFrame) -> pd.DataFrame:
    """For each number of characters the LLaDA and the AR chosen, their scores, and their difference.

    Chosen is the row with the lowest mean over seeds on the validation text; scores are nats per character
    of the test text, intervals 95% over seeds (Student's t): they say how trainings differ, not how texts do. The difference
    is paired, since a seed means the same first weights and the same windows to train on for both models. Below 0 LLaDA is ahead.

    Args:
        table: what `run_jobs` made of `crossover_jobs` with `crossover_measure`. ValueError: it lacks one of the two models.
    """
    lines = []
    for characters, some in table.groupby("characters"):
        line, scores = {"row": f"{characters:,} characters", "characters": characters}, {}
        for model in ("LLaDA", "AR"):
            part = some[some["model"] == model]
            if part.empty:
                raise ValueError(f"no {model} on {characters:,} characters; pass the table of the whole suite")
            chosen = part.loc[[part["chosen by"].idxmin()]]
            scores[model] = chosen.filter(regex="^seed ").iloc[0]
            line |= {model: scores[model].mean(), f"{model} ±": H.half_width(scores[model])}
            line |= {f"{model}, kind": chosen["kind"].item(), f"{model}, epochs": chosen["epochs"].item()}
        difference = scores["LLaDA"] - scores["AR"]
        lines.append(line | {"LLaDA − AR": difference.mean(), "LLaDA − AR ±": H.half_width(difference)})
    return pd.DataFrame(lines)
