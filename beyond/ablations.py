"""The recipe's choices, one study: LLaDA and AR as they are trained, and with one choice changed at a time.

Three seeds a row, and a third of what the preset trains LLaDA for; AR for as long as its preset trains it, since what it needs
against learning the text by heart does not show before. The rows of a model that differ in the loss alone see the same windows
and begin with the same weights. A loss is a batch function as `Job.make_batch` takes it: (sequences LongTensor[B, L], generator,
learned BoolTensor[B, L]) -> (inputs LongTensor[B, L], targets LongTensor[B, L], weights FloatTensor[B, L]).
"""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor, nn

import llada_helpers as H
from beyond import quality

Batch = tuple[Tensor, Tensor, Tensor]
SEEDS = 3
SIZES = {"smoke": (40, 20), "cpu": (100, 3), "cpu_long": (100, 3), "gpu": (100, 3)}  # parts: the short form, the study


def uniform_times(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """Eq. 3 as it is written: t uniform, here stratified over the batch."""
    return H.diffusion_batch(sequences, generator, learned, t=H.stratified_times(len(sequences), generator))


def independent_times(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """Eq. 3 with one independent t per row."""
    return H.diffusion_batch(sequences, generator, learned, t=1 - torch.rand(len(sequences), generator=generator))


def one_time_per_batch(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """Eq. 3 with one t for the whole batch, as the exercise has it."""
    return H.diffusion_batch(sequences, generator, learned, t=float(1 - torch.rand(1, generator=generator)))


def square_times(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """Eq. 3 with t = u^2, more often small than ours, and the weight times dt/du = 2 u: the same expectation."""
    u = H.stratified_times(len(sequences), generator)
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=u**2)
    return inputs, targets, weight * (2 * u)[:, None]


def bell(t: Tensor) -> Tensor:
    """Density of times t in (0, 1) whose logit is normal: a bell around the middle."""
    return torch.exp(-(t.logit() ** 2) / 2) / (2 * torch.pi) ** 0.5 / (t * (1 - t))


def _bell_times(count: int, generator: torch.Generator) -> Tensor:
    return torch.special.ndtri(H.stratified_times(count, generator).clamp(1e-4, 1 - 1e-4)).sigmoid()


def bell_times(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """Times from a bell around the middle, weighted 1/t alone: not a bound (after Hong et al. 2026, arXiv:2605.13026)."""
    return H.diffusion_batch(sequences, generator, learned, t=_bell_times(len(sequences), generator))


def bell_times_weighted(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """Eq. 3 with half of the batch's times from a bell, half uniform, and the weight divided by the density of that mixture.

    Without the uniform half the weights would have no finite variance: the bell hardly draws the times near 0 and 1.
    """
    half = len(sequences) // 2
    t = torch.cat([_bell_times(half, generator), H.stratified_times(len(sequences) - half, generator)])
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=t)
    return inputs, targets, weight / (0.5 + 0.5 * bell(t.clamp(max=1 - 1e-6)))[:, None]


def masked_mean(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """The MDLM tutorial's loss: the mean cross-entropy over all masked tokens of the batch, whatever t. Not a bound."""
    t = 1 - torch.rand(len(sequences), generator=generator)
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask * (len(mask) / mask.sum().clamp(min=1))


def exercise_loss(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """The exercise's pseudocode: one t for the batch, and the mean over all its masked tokens divided by t.

    A batch of n tokens then weighs 1 / t whenever one is masked: 1 + 1/2 + ... + 1/n on average, with infinite variance.
    """
    t = float(1 - torch.rand(1, generator=generator))
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask * (len(mask) / (t * mask.sum().clamp(min=1)))


def masked_mean_over_t(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
    """The pseudocode's loss window by window, each with a t of its own: its mean over its masked tokens divided by t."""
    t = H.stratified_times(len(sequences), generator)
    inputs, targets, weight = H.diffusion_batch(sequences, generator, learned, t=t)
    mask = (weight > 0).float()
    return inputs, targets, mask / (t[:, None] * mask.sum(dim=1, keepdim=True).clamp(min=1))


def switched(first: Callable, then: Callable, step: int) -> Callable[[Tensor, torch.Generator, Tensor], Batch]:
    """The batches of `first` before this step of a training, those of `then` from it on.

    The step is read off the generator, which `llada_helpers.training_batch` seeds with (seed, step).
    """

    def batch(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> Batch:
        chosen = first if generator.initial_seed() % 1_000_003 < step else then
        return chosen(sequences, generator, learned)

    batch.__name__ = batch.__qualname__ = f"{first.__name__}_until_{step}_then_{then.__name__}"
    return batch


class AdaptiveNorm(nn.Module):
    """RMSNorm whose scale and shift follow from the time (adaptive layer norm, Peebles & Xie 2023); x [B, L, width].

    >>> norm, x = AdaptiveNorm(4, 2), torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
    >>> norm.time = torch.ones(1, 2)
    >>> norm(x).round().tolist()  # a fresh one does nothing but normalise
    [[[1.0, -1.0, 1.0, -1.0]]]
    """

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.modulation = nn.Linear(time_width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.time = None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.modulation(self.time)[:, None].chunk(2, dim=-1)
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + scale) + shift


class TimeConditioned(H.Transformer):
    """Transformer whose norms are adaptive to t FloatTensor[B]; where t is not passed, the masked fraction stands in for it.

    The time is one number, so eight features of it are enough: at the `cpu` preset's width that is 2% more weights.

    >>> model = TimeConditioned(H.ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> tuple(model(torch.tensor([[4, H.MASK_ID, 5]]), torch.tensor([0.3])).shape)
    (1, 3, 10)
    """

    def __init__(self, config: H.ModelConfig):
        super().__init__(config)
        self.time_mlp = nn.Sequential(nn.Linear(64, 8), nn.SiLU())
        for block in self.blocks:
            block.attention_norm, block.mlp_norm = (AdaptiveNorm(config.n_embd, 8) for _ in range(2))

    def forward(self, ids: Tensor, t: Tensor | None = None) -> Tensor:
        t = (ids == H.MASK_ID).sum(dim=1) / (ids != H.PAD_ID).sum(dim=1).clamp(min=1) if t is None else t
        angles = t[:, None] * 1000 * 10_000.0 ** -(torch.arange(32, device=t.device) / 32)
        time = self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=-1))
        for block in self.blocks:
            block.attention_norm.time = block.mlp_norm.time = time
        return super().forward(ids)


class PositionEmbedding(nn.Embedding):
    """Token embedding plus a table of positions: ids [B, L] to [B, L, width]."""

    def __init__(self, config: H.ModelConfig):
        super().__init__(config.vocab_size, config.n_embd)
        self.positions = nn.Parameter(torch.randn(config.seq_len, config.n_embd))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.positions[: ids.shape[1]]


class LearnedPositions(H.Transformer):
    """Transformer with learned absolute positions in place of rotary ones; whole sequences only, no cache.

    >>> model = LearnedPositions(H.ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))
    >>> tuple(model(torch.tensor([[4, H.MASK_ID, 5]])).shape), bool((model.sin == 0).all())
    ((1, 3, 10), True)
    """

    def __init__(self, config: H.ModelConfig):
        super().__init__(config)
        self.embed = PositionEmbedding(config)
        self.cos.fill_(1.0)
        self.sin.zero_()  # an angle of zero: nothing is rotated

    def forward(self, ids: Tensor, cache: None = None, start: int = 0) -> Tensor:
        H._refuse(cache is not None or start > 0, "learned positions start at 0: pass whole sequences and no cache")
        return super().forward(ids)


def reshaped(shape: H.ModelConfig, n_layer: int) -> H.ModelConfig:
    """So many layers, of the width at which they have about as many weights.

    >>> reshaped(H.ModelConfig(vocab_size=10, seq_len=6, n_layer=5, n_head=4, n_embd=128), 3).n_embd
    168
    """
    unit = 2 * shape.n_head  # rotary positions turn pairs
    return replace(shape, n_layer=n_layer, n_embd=unit * round(shape.n_embd * (shape.n_layer / n_layer) ** 0.5 / unit))


def _changes(preset: H.Preset, steps: int) -> dict[str, dict]:
    """What each row changes: of the model, of the training, or a part of `Job`. The first row of each model is ours."""
    shape, head = preset.model(1, causal=False), preset.n_embd / preset.n_head
    deeper, wider = (reshaped(shape, n) for n in (shape.n_layer + 4, max(1, shape.n_layer - 2)))
    late, switch = H.diffusion_batch, steps - round(preset.llada.decay * steps)
    return {
        "LLaDA, ours": {},
        "LLaDA, t uniform": {"make_batch": uniform_times},
        "LLaDA, one t per batch (exercise)": {"make_batch": one_time_per_batch},
        "LLaDA, mean over masked (MDLM tutorial)": {"make_batch": masked_mean},
        "LLaDA, mean over masked / t, one t (pseudocode)": {"make_batch": exercise_loss},
        "LLaDA, mean over masked / t, window by window": {"make_batch": masked_mean_over_t},
        "LLaDA, mean over masked, Eq. 3 in the decay": {"make_batch": switched(masked_mean, late, switch)},
        "LLaDA, t from a bell, weighted": {"make_batch": bell_times_weighted},
        "LLaDA, t from a bell": {"make_batch": bell_times},
        "LLaDA, t from a bell, Eq. 3 in the decay": {"make_batch": switched(bell_times, late, switch)},
        "LLaDA, AdamW alone": {"muon_lr": 0.0},
        "LLaDA, time conditioning": {"architecture": TimeConditioned},
        "LLaDA, usual attention scale": {"attention_scale": head**0.5},
        "LLaDA, rotary base 10,000": {"rotary_base": 10_000.0},
        "LLaDA, learned positions": {"architecture": LearnedPositions},
        "LLaDA, half the windows, twice the steps": {"batch_size": preset.llada.batch_size // 2, "steps": 2 * steps},
        "LLaDA, independent t": {"make_batch": independent_times},
        "LLaDA, dropout 0.1" if not preset.dropout else "LLaDA, no dropout": {"dropout": 0.0 if preset.dropout else 0.1},
        "LLaDA, deeper, narrower": {"n_layer": deeper.n_layer, "n_embd": deeper.n_embd},
        "LLaDA, shallower, wider": {"n_layer": wider.n_layer, "n_embd": wider.n_embd},
        "AR, ours": {},
        "AR, no weight decay": {"weight_decay": 0.0},
        "AR, half the weight decay": {"weight_decay": preset.ar.weight_decay / 2},
        "AR, dropout 0.1 more": {"dropout": preset.dropout + 0.1},
        "AR, LLaDA's number of steps": {"steps": preset.llada.steps, "evals": preset.llada.evals},
    }


def shortened(config: H.TrainConfig, parts: int) -> H.TrainConfig:
    """The same training with one of so many parts of its steps, and of its validations.

    >>> shortened(H.TrainConfig(steps=3150, batch_size=32, evals=21), 3).steps
    1050
    """
    return replace(config, steps=max(1, round(config.steps / parts)), evals=max(1, round(config.evals / parts)))


def ablation_jobs(preset: H.Preset, parts: int, vocab_size: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list[H.Job]]:
    """LLaDA for one of so many `parts` of the preset's steps, AR for three: as they are, then with one choice changed a row.

    >>> ids = torch.arange(4, 30)
    >>> jobs = ablation_jobs(H.PRESETS["cpu"], 3, 30, ids, ids)
    >>> [(job.train.steps, job.train.seed) for job in jobs["LLaDA, AdamW alone"]], jobs["AR, ours"][0].train.steps
    ([(1050, 0), (1050, 1), (1050, 2)], 1060)
    """
    jobs, ours = {}, preset.jobs(vocab_size, train_ids, val_ids)
    short = {name: shortened(job.train, max(1, parts if name == "LLaDA" else parts // 3)) for name, job in ours.items()}
    for row, change in _changes(preset, short["LLaDA"].steps).items():
        name = row.partition(",")[0]
        if parts > 3 and "steps" in change:
            change = change | {"steps": 2 * short[name].steps}
        shape, config, job = (
            {key: change[key] for key in change if hasattr(part, key)} for part in (ours[name].model, short[name], ours[name])
        )
        trainings = [replace(short[name], seed=seed, **config) for seed in range(SEEDS)]
        jobs[row] = [replace(ours[name], model=replace(ours[name].model, **shape), train=one, **job) for one in trainings]
    return jobs


GROUPS = {"embed": "embedding", "qkv": "attention", "attention_out": "attention"}
GROUPS |= {"mlp_in": "MLP", "mlp_out": "MLP", "head": "head"}


def gradient_noise(model: H.Transformer, windows: Tensor, batches: int, size: int = 32, parts: int = 8) -> pd.DataFrame:
    """How noisy the gradient of Eq. 3 is at fixed weights, by where t is drawn: E |g - mean|^2, for each group of parameters.

    Args:
        windows: LongTensor[N, L]; batches hold `size` of them, and the same ones and the same uniform numbers in each row.
        batches: at least 2 x `parts`; the interval is Student's over `parts` parts of them.

    >>> model = H.Transformer(H.ModelConfig(9, 4, n_layer=1, n_head=1, n_embd=8))
    >>> list(gradient_noise(model, torch.full((2, 4), 5), 16))[:5]
    ['row', 'embedding', 'embedding ±', 'attention', 'attention ±']
    """
    H._refuse(batches < 2 * parts, f"{batches=}: pass at least {2 * parts}")
    weights, lines = dict(model.named_parameters()), []
    groups = {name: GROUPS[name.split(".")[-2]] for name in weights}
    for make_batch in (H.diffusion_batch, uniform_times, independent_times, one_time_per_batch, square_times):
        variance = {group: [] for group in groups.values()}
        for part in torch.arange(batches).tensor_split(parts):
            total, squares = dict.fromkeys(weights, 0.0), dict.fromkeys(variance, 0.0)
            for seed in part.tolist():
                generator = torch.Generator().manual_seed(seed)
                rows = windows[torch.randint(len(windows), (size,), generator=generator)]
                batch = (x.to(model.head.weight.device) for x in make_batch(rows, generator, H.real_tokens(rows)))
                for name, g in zip(weights, torch.autograd.grad(H.weighted_nll(model, *batch), list(weights.values()))):
                    total[name] = total[name] + g
                    squares[groups[name]] += float(g.square().sum())
            for group, found in variance.items():
                mean = sum(float(total[name].square().sum()) for name in weights if groups[name] == group) / len(part)
                found.append((squares[group] - mean) / (len(part) - 1))
        line = {"row": "ours" if make_batch is H.diffusion_batch else make_batch.__name__.replace("_", " ")}
        for group, found in variance.items():
            line |= {group: sum(found) / parts, f"{group} ±": H.half_width(found)}
        lines.append(line)
    return pd.DataFrame(lines)


def ablation_measure(preset: H.Preset, text: str) -> Callable[[H.Job, H.Run], dict]:
    """What `run_jobs` adds: nats per character of the validation text, four masks each.

    >>> text = "to be, or not to be " * 64
    >>> tokenizer = H.CharTokenizer.from_text(text)
    >>> model = H.Transformer(H.ModelConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_embd=8))
    >>> line = ablation_measure(H.PRESETS["smoke"], text)(None, H.Run(model, None, {}, None))
    >>> round(line["nats/char"], 2)  # blank: ln 12
    2.48
    """
    val_ids = quality.scored(preset, quality.parts(H.CharTokenizer.from_text(text).encode(text))[1])

    def measure(job: H.Job, run: H.Run) -> dict:
        nats, interval = H.per_character(*quality.window_nats(run.model, val_ids, samples=4))
        return {"scored on": "validation text", "nats/char": nats, "95% ±": interval}

    return measure
