"""What the two notebooks cost on a GPU, counted before anybody pays for it: characters, operations and minutes by section.

A notebook is executed at the preset's own sizes, but nothing is computed: a mask predictor that adds up what it is asked takes
the model's place (see `Meter`), trainings are charged and not made, and one row of a batch is decoded for all. So the count
follows the cells when they change. Where a decoder adapts it is an upper bound: this predictor is never sure, so that a pass
commits one character. Not counted: what runs on the CPU (n-gram judge, copies, figures), the sampler's arithmetic, compilation.

    python bench.py --budget gpu   # both notebooks; figures/tables/budget_gpu.csv
"""

import contextlib
import functools
import importlib
import json
import os
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock, patch

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn

import beyond
import llada_helpers as H
from beyond import blocks, crossover, decoding, film
from beyond.budget import BACKWARD, forward_flop
from llada_helpers import generate_ar, reverse_process


class Machine(NamedTuple):
    """What a GPU is assumed to reach.

    >>> slow = Machine("slow", evaluation=1e9, training=4e9, launch=0.5)
    >>> slow.seconds(8e9, kernels=4, training=False), slow.seconds(8e9, kernels=4, training=True)
    (8.0, 2.0)
    """

    name: str
    evaluation: float  # FLOP/s in float32, as everything but training runs
    training: float  # FLOP/s under autocast to 16 bits
    launch: float  # seconds of the CPU to launch a kernel

    def seconds(self, flop: float, kernels: int, training: bool) -> float:
        """The longer of computing and of launching, since the one goes on during the other."""
        return max(flop / (self.training if training else self.evaluation), kernels * self.launch)


# Shares of the peaks in NVIDIA's data sheets: T4 8.1 TFLOP/s in float32 and 65 in float16, H100 (SXM) 67 and, dense, 989. The
# larger the GPU, the less of it a model of ten million parameters keeps busy.
MACHINES = (
    Machine("T4", evaluation=0.62 * 8.1e12, training=0.25 * 65e12, launch=10e-6),
    Machine("H100", evaluation=0.5 * 67e12, training=0.12 * 989e12, launch=5e-6),
)
# PyTorch's operators in an eager forward pass, views aside: in each layer, and in embedding, head and the sampler around them.
LAYER_KERNELS, OTHER_KERNELS = 46, 70


@dataclass
class Spent:
    """What a section asks of the models.

    >>> Spent(characters=3).characters, Spent().seconds
    (3, [0.0, 0.0])
    """

    characters: int = 0  # through a model, a pass with gradients counted once
    evaluation: float = 0.0  # FLOP
    training: float = 0.0  # FLOP
    passes: int = 0  # of any batch; a training step is one
    seconds: list[float] = field(default_factory=lambda: [0.0 for _ in MACHINES])


class Meter:
    """Adds up, by section, what stands in for the model, the samplers, the likelihood and the training is asked for.

    >>> meter = Meter()
    >>> model = meter.predictor(H.ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> _ = meter.reverse_process(model, torch.full((5, 6), H.MASK_ID), mask_id=H.MASK_ID, steps=3)
    >>> meter.spent[""].passes, meter.spent[""].characters
    (3, 90)
    """

    def __init__(self):
        self.section, self.rows, self.trained = "", 1, set()
        self.spent: dict[str, Spent] = {}
        meter = self

        class Predictor(H.Transformer):
            """Knows nothing but its sizes: every prediction is the same, and costs next to nothing."""

            def __init__(self, config: H.ModelConfig):
                nn.Module.__init__(self)
                self.config = config
                self.embed = nn.Embedding(config.vocab_size, 1, _weight=torch.linspace(0, 1, config.vocab_size)[:, None])

            def forward(self, ids: Tensor, cache: H.KVCache | None = None, start: int = 0) -> Tensor:
                if cache is not None:
                    cache.mark(start, ids == H.PAD_ID)
                keys = ids.shape[1] if cache is None else cache.length
                meter.charge(self.config, len(ids), ids.shape[1], keys, gradients=torch.is_grad_enabled())
                return self.embed.weight[:, 0].clone().expand(*ids.shape, -1)

        class Blocks(Predictor):
            """The same for block diffusion: a pass over pairs is one over both halves."""

            def forward(self, ids: Tensor, cache: H.KVCache | None = None, start: int = 0) -> Tensor:
                if ids.ndim == 2:
                    return super().forward(ids, cache, start)
                length = ids.shape[-1]
                return super().forward(ids[:, 0] if length <= self.block_length else ids.flatten(1))[:, :length]

        self.predictor, self.blocks = Predictor, Blocks

    def charge(self, config: H.ModelConfig, rows: int, length: int, keys: int, *, gradients: bool, steps: int = 0) -> None:
        """A pass over `rows` sequences (each of them for as many as it stands for), or `steps` steps of training on so many."""
        spent, passes, times = self.spent.setdefault(self.section, Spent()), steps or 1, BACKWARD if gradients else 1
        characters = passes * self.rows * rows * length
        flop = times * characters * forward_flop(config, 1, keys)
        kernels = times * passes * (LAYER_KERNELS * config.n_layer + OTHER_KERNELS)
        spent.characters += characters
        spent.passes += passes
        spent.evaluation += 0 if steps else flop
        spent.training += flop if steps else 0
        spent.seconds = [s + m.seconds(flop, kernels, training=steps > 0) for s, m in zip(spent.seconds, MACHINES)]

    def clock(self) -> float:
        """What the first machine's clock would show: loops that wait for it end as they would there."""
        return sum(spent.seconds[0] for spent in self.spent.values())

    @contextlib.contextmanager
    def each_for(self, rows: int) -> Iterator[None]:
        """Here each row stands for so many."""
        before, self.rows = self.rows, self.rows * rows
        try:
            yield
        finally:
            self.rows = before

    def reverse_process(self, model: H.MaskPredictor, template: Tensor, *, mask_id: int, **options) -> H.Generation:
        """The row with the most masks, decoded for all."""
        masked = template == mask_id
        longest = int(masked.sum(dim=1).argmax())
        with self.each_for(len(template)):
            one = reverse_process(model, template[longest : longest + 1], mask_id=mask_id, **options)
        order = one.order.expand_as(template).masked_fill(~masked, -1)
        return H.Generation(torch.where(masked, one.ids, template), order, one.nfe, one.confidence.expand(template.shape))

    def generate_ar(self, model: H.MaskPredictor, prompt: Tensor, length: int, **options) -> H.Generation:
        """The first prompt, continued for all."""
        with self.each_for(len(prompt)):
            one = generate_ar(model, prompt[:1], length, **options)
        ids = torch.cat((prompt, one.ids[:, prompt.shape[1] :].expand(len(prompt), -1)), dim=1)
        return H.Generation(ids, one.order.expand_as(ids), one.nfe, one.confidence.expand(ids.shape))

    def nll(self, model: H.MaskPredictor, inputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """Noise where a likelihood is wanted, after as many passes as `llada_helpers` makes."""
        for part in inputs.split(max(1, 2**14 // inputs.shape[1])):
            with self.each_for(len(part)):
                model(part[:1])
        return torch.rand(inputs.shape) * counted

    def train(self, name: str, job: H.Job, **options) -> H.Run:
        """The steps and the validations, charged once for each fingerprint, and a model that has learned nothing."""
        config, length = job.train, job.model.seq_len
        model = (job.architecture if issubclass(job.architecture, self.blocks) else self.predictor)(job.model)
        halves = 2 if getattr(model, "block_length", length) < length else 1
        if job.fingerprint() not in self.trained:
            self.trained.add(job.fingerprint())
            self.charge(job.model, config.batch_size, halves * length, halves * length, gradients=True, steps=config.steps)
            for _ in range(config.evals):
                job.validation_nats(model, job.validation_sequences())
        steps = [round(config.steps * (i + 1) / config.evals) for i in range(config.evals)]
        metrics = pd.DataFrame({"step": steps, "seconds": 1.0, "train_loss": 2.0, "val_loss": 2.0, "lr": 0.0, "grad_norm": 1.0})
        metrics["tokens"] = metrics["step"] * config.batch_size * length
        summary = {"name": name, "complete": True, **job.settings(), "parameters": 0, "best": 2.0, "seconds": 1.0}
        summary |= {"tokens": int(metrics["tokens"].iloc[-1]), "device": "none", "commit": "none"}
        return H.Run(model, metrics, summary, Path("runs", name))

    def table(self, name: str) -> pd.DataFrame:
        """A row for each section that asks a model for anything, then their sum as "all of NAME"."""
        lines = {section: [spent] for section, spent in self.spent.items()} | {f"all of {name}": [*self.spent.values()]}
        return pd.DataFrame([{"row": row, **_line(spent)} for row, spent in lines.items()])


def _line(parts: list[Spent]) -> dict[str, float]:
    line = {"million characters": sum(s.characters for s in parts) / 1e6, "passes": sum(s.passes for s in parts)}
    line["evaluation, PFLOP"] = sum(s.evaluation for s in parts) / 1e15
    line["training, PFLOP"] = sum(s.training for s in parts) / 1e15
    return line | {f"{m.name}, minutes": sum(s.seconds[i] for s in parts) / 60 for i, m in enumerate(MACHINES)}


def sections(notebook: Path) -> list[tuple[str, str]]:
    """(the heading above it, its source) for every code cell but those that prepare the machine with shell commands.

    >>> cells = [{"cell_type": "markdown", "source": ["# A\\n", "## B"]}, {"cell_type": "code", "source": ["1 + 1"]}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (path := Path(folder, "a.ipynb")).write_text(json.dumps({"cells": [*cells, {**cells[1], "source": ["!ls"]}]}))
    ...     sections(path)
    [('B', '1 + 1')]
    """
    heading, found = "", []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.*)$", source, re.M) or [heading])[-1]
        elif cell["cell_type"] == "code" and not re.search(r"^\s*[%!]", source, re.M):
            found.append((heading, source))
    return found


@contextlib.contextmanager
def _metered(meter: Meter, preset: H.Preset, text: str) -> Iterator[None]:
    """Nothing computed, nothing shown, nothing left behind: stand-ins for the helper's slow parts, in an empty directory."""
    for room in pkgutil.iter_modules(beyond.__path__):  # now, or a room first imported meanwhile would keep the stand-ins
        importlib.import_module(f"beyond.{room.name}")
    cached, here = decoding.cached, os.getcwd()
    helper = {"Transformer": meter.predictor, "_nll": meter.nll, "train": meter.train, "generate_ar": meter.generate_ar}
    helper |= {"reverse_process": meter.reverse_process, "choose_preset": lambda: preset, "load_text": lambda: text}
    helper |= {"runs_of": lambda *args: [], "ngram_judge": lambda corpus: lambda written, start: 1.0}
    helper |= {"show": lambda *things: None, "frames": lambda *args: ["page"], "filmstrip": lambda *args, **options: None}
    helper |= {"DenoisingViewer": lambda films: None}
    patches = [patch.multiple(H, **helper), patch.object(H.Results, "figure", lambda *args: None)]
    patches.append(patch.object(decoding, "cached", lambda model, template, *rest: cached(model, template[:1], *rest)))
    kinds = functools.cache(blocks.block_diffusion.__wrapped__)  # no class of the real one is met again
    patches.append(patch.multiple(blocks, BlockDiffusion=meter.blocks, block_diffusion=kinds))
    patches.append(patch.object(crossover, "last_model", lambda job, run: run.model))
    patches.append(patch.object(film, "save_gif", lambda *args, **options: [None]))
    patches.append(patch("ipywidgets.interact_manual", lambda **choices: lambda function: function))
    patches.append(patch("IPython.display.display", lambda *things: None))
    patches.append(patch("torch.cuda.is_available", lambda: False))
    patches.append(patch("time.perf_counter", meter.clock))
    with contextlib.ExitStack() as stack:
        for context in (*patches, contextlib.redirect_stdout(None), torch.random.fork_rng(devices=[]), plt.rc_context()):
            stack.enter_context(context)
        os.chdir(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            yield
        finally:
            os.chdir(here)


def count(notebook: Path, preset: H.Preset, text: str) -> Meter:
    """Execute a notebook at the preset's sizes, from nothing: no training to load, no table of a suite.

    ValueError: a predictor made for a whole batch is given the one row that stands for it; `_metered` must cut that, too.

    >>> cell = "import llada_helpers as H\\npreset = H.choose_preset()\\nmodel = H.Transformer(preset.model(9, causal=False))\\n"
    >>> cell += "_ = H.nelbo(model, H.torch.full((10, 64), 5), H.MASK_ID, n_samples=2)"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.ipynb")
    ...     _ = path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell}]}))
    ...     count(path, H.PRESETS["smoke"], "a text").spent[""].characters  # ten windows of 64, twice
    1280
    """
    meter, cells, scope = Meter(), sections(notebook), {"__name__": "__main__", "get_ipython": MagicMock()}
    with _metered(meter, preset, text):
        for meter.section, source in cells:
            exec(compile(source, notebook.name, "exec"), scope)
            plt.close("all")
    return meter


def price_table(notebooks: list[Path], preset: H.Preset, text: str) -> pd.DataFrame:
    """The sections of each notebook and their sum: characters, passes, PFLOP, and minutes on each of `MACHINES`.

    >>> price_table([], H.PRESETS["smoke"], "a text").empty
    True
    """
    return pd.concat([pd.DataFrame(), *(count(path, preset, text).table(path.name) for path in notebooks)])
