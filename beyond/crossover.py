"""Little text, many epochs: where does the masked diffusion model overtake the autoregressive one?

Both are trained on the first so many characters, each number of epochs being a training of its own with its own decay, since the
decay is what brings a long training's loss down. Which regularisation, which number of epochs and which checkpoint is best is
chosen on the validation text; all are scored on the test text, so that no number profits from being chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd
from torch import Tensor

import llada_helpers as H
from beyond.quality import parts

SCORED = 4  # times as many windows are scored as are chosen by: to rank takes fewer, and training pays for them at every look


class Kind(NamedTuple):
    """A model and its regularisation.

    >>> Kind("AR", dropout=0.5, weight_decay=0.1).name
    'AR, dropout 0.5, weight decay 0.1'
    """

    model: str  # "LLaDA" or "AR"
    dropout: float = 0.0
    weight_decay: float = 0.0

    @property
    def name(self) -> str:
        regularised = f", dropout {self.dropout}, weight decay {self.weight_decay}"
        return self.model + regularised * bool(self.dropout or self.weight_decay)


@dataclass(frozen=True)
class Crossover:
    """Sizes of the experiment: each length of training text x each kind of model x each number of epochs on its ladder.

    >>> sizes = Crossover(64, 2, 2, 32, batch_size=16, characters=(1_000, 4_000), ladders={Kind("AR"): (10, 40)})
    >>> sizes.steps(4_000, 40)  # of 1,024 characters
    156
    """

    seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    characters: tuple[int, ...]
    ladders: dict[Kind, tuple[int, ...]]
    seeds: int = 3
    windows: int = 256  # that checkpoints are chosen by

    def steps(self, characters: int, epochs: int) -> int:
        """How many steps read that many characters so often."""
        return max(1, round(epochs * characters / (self.batch_size * self.seq_len)))


PLAIN, REGULARISED = Kind("LLaDA"), Kind("LLaDA", 0.1, 0.1)
AR = [Kind("AR"), *(Kind("AR", dropout, decay) for dropout in (0.2, 0.5) for decay in (0.1, 0.3))]
_FEW = dict.fromkeys((PLAIN, REGULARISED, *AR[:2]), (10, 40))
SMALL = Crossover(64, 2, 2, 32, 16, (400, 1_600), _FEW, seeds=2, windows=32)
_MANY = {PLAIN: (125, 500), REGULARISED: (125, 500, 2_000), **{kind: (5, 10, 25, 60, 150) for kind in AR}}
_CPU = Crossover(64, 3, 2, 64, 16, (5_000, 10_000, 20_000), _MANY)
_GPU = Crossover(256, 6, 6, 384, 64, (80_000, 320_000), _MANY)
SIZES = {"smoke": (SMALL, SMALL), "cpu": (SMALL, _CPU), "cpu_long": (SMALL, _CPU), "gpu": (SMALL, _GPU)}  # short form, full one


def crossover_jobs(sizes: Crossover, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """A row for each length of text, kind and number of epochs, a training for each seed.

    >>> import torch
    >>> ids = torch.arange(4, 30)
    >>> jobs = crossover_jobs(SMALL, 30, ids, ids)
    >>> list(jobs)[3], [job.train.seed for job in jobs["AR, 400 characters, 10 epochs"]]
    ('LLaDA, dropout 0.1, weight decay 0.1, 400 characters, 40 epochs', [0, 1])
    """
    jobs = {}
    for count in sizes.characters:
        for kind, ladder in sizes.ladders.items():
            shape = (vocab_size, sizes.seq_len, sizes.n_layer, sizes.n_head, sizes.n_embd)
            model = H.ModelConfig(*shape, kind.dropout, causal=kind.model == "AR")
            for epochs in ladder:
                steps = sizes.steps(count, epochs)
                options = {"evals": min(20, max(1, steps // 10)), "eval_windows": sizes.windows}
                config = H.TrainConfig(steps, sizes.batch_size, weight_decay=kind.weight_decay, **options)
                trainings = [replace(config, seed=seed) for seed in range(sizes.seeds)]
                row = f"{kind.name}, {count:,} characters, {epochs:,} epochs"
                jobs[row] = [H.Job(model, training, train_ids[:count], val_ids) for training in trainings]
    return jobs


def last_model(job: H.Job, run: H.Run) -> H.Transformer:
    """The model at the end of a training, whose `run.model` is the best one; in evaluation mode, on the same device.

    ValueError: the state that the training left behind is not there, damaged, or of another job.
    """
    state = run.path.parents[1] / "checkpoints" / run.path.name / "last.state"
    if not state.exists():
        raise ValueError(f"there is no {state}; train the run again (LLADA_RETRAIN=1) and keep its checkpoints")
    model = job.architecture(job.model)
    H.load_state(state, job.fingerprint(), model, H.make_optimizer(model, job.train))
    return model.to(next(run.model.parameters()).device).eval()


def crossover_measure(text: str) -> Callable[[H.Job, H.Run], dict]:
    """What `run_jobs` adds to a row: model and kind, and both checkpoints, "best" and "end" of training, on two texts.

    "best, chosen by" and "end, chosen by" are the validation losses; "best, seed 0" and so on are each training's nats per
    character of the test text, as is "nats/char", of the best checkpoint. LLaDA's are bounds, AR's exact.
    """
    *_, test_ids = parts(H.CharTokenizer.from_text(text).encode(text))

    def measure(job: H.Job, run: H.Run) -> dict:
        kind = Kind("AR" if job.model.causal else "LLaDA", job.model.dropout, job.train.weight_decay)
        config = replace(job.train, eval_windows=SCORED * job.train.eval_windows)
        scoring = replace(job, train=config, val_ids=test_ids)
        windows = scoring.validation_sequences()
        checkpoints = {
            "best": (run.model, run.summary["best"]),
            "end": (last_model(job, run), run.metrics["val_loss"].iloc[-1]),
        }
        line = {"scored on": "test text", "model": kind.model, "kind": kind.name}
        for checkpoint, (model, chosen_by) in checkpoints.items():
            nats = scoring.validation_nats(model, windows).cpu()
            score, interval = H.per_character(nats, scoring.learned(windows).sum(dim=1))
            line |= {f"{checkpoint}, chosen by": chosen_by, f"{checkpoint}, seed {job.train.seed}": score}
            if checkpoint == "best":
                line |= {"nats/char": score, "95% ±": interval}
        return line

    return measure


def crossover_best(table: pd.DataFrame) -> pd.DataFrame:
    """For each number of characters and each checkpoint the LLaDA and the AR chosen, their scores, and their difference.

    Chosen is the row with the lowest mean over seeds on the validation text; scores are nats per character
    of the test text, intervals 95% over seeds (Student's t): they say how trainings differ, not how texts do. The difference
    is paired, since a seed means the same first weights and the same windows to train on for both models. Below 0 LLaDA is
    ahead: its bound is below AR's exact value.

    Args:
        table: what `run_jobs` made of `crossover_jobs` with `crossover_measure`. ValueError: it lacks one of the two models.
    """
    lines = []
    for characters, some in table.groupby("characters"):
        for checkpoint in ("best", "end"):
            line, scores = {"row": f"{characters:,} characters, {checkpoint}", "characters": characters}, {}
            for model in ("LLaDA", "AR"):
                part = some[some["model"] == model]
                if part.empty:
                    raise ValueError(f"no {model} on {characters:,} characters; pass the table of the whole suite")
                chosen = part.loc[[part[f"{checkpoint}, chosen by"].idxmin()]]
                scores[model] = chosen.filter(regex=f"^{checkpoint}, seed ").iloc[0]
                line |= {model: scores[model].mean(), f"{model} ±": H.half_width(scores[model])}
                line |= {f"{model}, kind": chosen["kind"].item(), f"{model}, epochs": chosen["epochs"].item()}
            difference = scores["LLaDA"] - scores["AR"]
            lines.append(line | {"LLaDA − AR": difference.mean(), "LLaDA − AR ±": H.half_width(difference)})
    return pd.DataFrame(lines)
