"""Block diffusion: from autoregression to LLaDA in one number (BD3-LM, Arriola et al. 2025, arXiv:2503.09573).

The text is cut into blocks of L' tokens. Blocks come from left to right, and each is a masked diffusion given the clean blocks
before it, so that log p(x) is a sum over blocks of log p(x^b | x^<b), each with its own bound:

    -log p(x) <= sum over blocks b of E_l [ (n_b / l) * sum over the l masked i in b of -log p(x_i | x_l^b, x^<b) ]

with l, the number of masked tokens, uniform in 1 ... n_b, and x_l^b the block so masked. L' = 1 is AR, exactly: a single token is
always masked. (Where AR reads [START], it reads one [MASK] with nothing before it.) L' = L is LLaDA.

A *block predictor* is a callable from pairs LongTensor[B, 2, L], noisy x_t and clean x_0, to logits FloatTensor[B, L, V] of the
noisy tokens, all blocks in one pass. The suite "blocks" trains and measures one for every length.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import llada_helpers as H
from beyond import quality
from llada_helpers import MaskPredictor, Strategy

BlockPredictor = Callable[[Tensor], Tensor]
LENGTHS = (2, 8, 32)
_SHORT = ("smoke", H.TrainConfig(10, 16, evals=1, eval_windows=32))
_CPU = ("cpu", H.TrainConfig(600, 16, evals=4))
SCORES = ("passes", "judge nats/char", "known words", "char entropy", "distinct-3")
_FULL = {"smoke": ("smoke", H.TrainConfig(20, 16, evals=1, eval_windows=32)), "cpu": _CPU, "cpu_long": _CPU}
_FULL["gpu"] = ("gpu", H.TrainConfig(3000, 64, adamw_lr=2e-3, evals=10))
SIZES = {name: (_SHORT, full) for name, full in _FULL.items()}  # short form and full one: whose model, and how it is trained


def _check_length(block_length: int) -> None:
    H._refuse(block_length < 1, f"block_length={block_length}: pass a positive number of tokens")


def block_mask(length: int, block_length: int) -> Tensor:
    """Who sees whom in one pass over the noisy half and the clean half: BoolTensor[query, key], [2 length, 2 length].

    A noisy token sees its own noisy block and the clean ones before it, a clean token the clean blocks up to its own.

    >>> block_mask(2, 1).int().tolist()  # noisy 1, noisy 2, clean 1, clean 2
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    _check_length(block_length)
    place = torch.arange(2 * length)
    block, clean = place % length // block_length, place >= length
    query, reader = block[:, None], clean[:, None]
    return (~reader & ~clean & (block == query)) | (clean & (block < query + reader.long()))


class BlockDiffusion(H.Transformer):
    """The Transformer, with no further parameter, as block predictor and as mask predictor; `block_diffusion` makes its kinds.

    Pairs [B, 2, L] take one pass over 2 L tokens, both halves with the same positions, to logits [B, L, V] of the noisy half. Ids
    [B, L] take an ordinary pass in which every token sees the blocks up to its own: keys and values of finished blocks stay as
    they are. [PAD] is never attended to. ValueError: a causal config, or longer sequences than its `seq_len`.

    >>> model = block_diffusion(2)(H.ModelConfig(vocab_size=9, seq_len=6, n_layer=1, n_head=1, n_embd=8))
    >>> model(torch.tensor([[[4, 5, 1, 1], [4, 5, 6, 7]]])).shape
    torch.Size([1, 4, 9])
    """

    def __init__(self, config: H.ModelConfig):
        super().__init__(config)
        H._refuse(config.causal, "attention is causal between blocks, not inside: pass a config with causal=False")

    def forward(self, ids: Tensor, cache: H.KVCache | None = None, start: int = 0) -> Tensor:
        if ids.ndim == 2:
            return super().forward(ids, cache, start)
        length = ids.shape[-1]
        wrong = ids.ndim != 3 or ids.shape[1] != 2 or length > self.config.seq_len
        H._refuse(wrong, f"ids {tuple(ids.shape)}: pass [B, L] or pairs [B, 2, L] with L <= {self.config.seq_len}")
        if length <= self.block_length:  # a lone block has nothing before it
            return super().forward(ids[:, 0])
        both = ids.flatten(1)  # [B, 2 L], x_t then x_0
        visible, padded = block_mask(length, self.block_length).to(ids.device), both == H.PAD_ID
        if bool(padded.any()):
            visible = (visible & ~padded[:, None, None]) | torch.eye(2 * length, dtype=torch.bool, device=ids.device)
        x, cos, sin = H.RMSNorm.apply(self.embed(both)), self.cos[:length].repeat(2, 1), self.sin[:length].repeat(2, 1)
        for block in self.blocks:
            x = block(x, cos, sin, visible)
        return self.head(H.RMSNorm.apply(x[:, :length])).float()

    def _visible(self, padded: Tensor, cache: H.KVCache | None, start: int) -> Tensor | None:
        hidden, stop = padded if cache is None else cache.mark(start, padded), start + padded.shape[1]
        query = torch.arange(start, stop, device=padded.device)[:, None] // self.block_length
        key = torch.arange(hidden.shape[1], device=padded.device) // self.block_length
        if not bool(hidden.any()) and bool(key[-1] <= query[0]):
            return None
        itself = torch.eye(hidden.shape[1], dtype=torch.bool, device=padded.device)[start:stop]
        return (~hidden[:, None, None] & (key <= query)) | itself  # a [PAD] sees itself, else its softmax would be NaN


@functools.cache
def block_diffusion(block_length: int) -> type:
    """The architecture with blocks of this many tokens, named after them, since fingerprints of trainings hold the name.

    >>> block_diffusion(4).__name__, block_diffusion(4).block_length
    ('BlockDiffusion_4', 4)
    """
    _check_length(block_length)
    return type(f"BlockDiffusion_{block_length}", (BlockDiffusion,), {"block_length": block_length, "__module__": __name__})


def block_masks(
    u: Tensor, maskable: Tensor, block_length: int, power: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Masks of exactly l tokens in each block, and the weights that make a sum of cross-entropies under them a bound.

    u FloatTensor[K, B * ceil(L / block_length)] in [0, 1], for K masks of each block of each row, and maskable BoolTensor[B, L]
    give BoolTensor[K, B, L] and DoubleTensor[K, B, L], 0 where nothing is masked. In a block with n maskable tokens l is
    floor(n u^power) + 1, of probability P(l) = (l / n)^(1 / power) - ((l - 1) / n)^(1 / power) for uniform u. A token weighs
    1 / (l P(l)): with power 1 the bound's n / l, with another one its expectation.

    >>> everything = torch.ones(1, 4, dtype=torch.bool)
    >>> mask, weight = block_masks(torch.tensor([[0.1, 0.6]]), everything, 2, generator=torch.Generator().manual_seed(0))
    >>> mask.int().tolist(), weight.tolist()  # one of two tokens, then both
    ([[[1, 0, 1, 1]]], [[[2.0, 0.0, 1.0, 1.0]]])
    """
    free = F.pad(maskable, (0, -maskable.shape[1] % block_length)).view(-1, block_length)
    n = free.sum(dim=1)
    count = torch.minimum((n * u.double() ** power).long() + 1, n)  # l, [K, blocks]
    mask = H.exact_masks(count, free, generator)
    n, count = n.clamp(min=1), count.clamp(min=1)
    chance = (count / n).double() ** (1 / power) - ((count - 1) / n).double() ** (1 / power)
    weight = mask / (chance * count)[..., None]
    return tuple(x.view(len(u), len(maskable), -1)[..., : maskable.shape[1]] for x in (mask, weight))


def block_batch(block_length: int) -> Callable[[Tensor, torch.Generator | None, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The batch function, as `Job.make_batch` takes it, whose loss is the bound in nats per learned token, for every power.

    (sequences LongTensor[B, L], generator, learned BoolTensor[B, L]) -> (pairs LongTensor[B, 2, L], targets [B, L], weights
    [B, L]). Each block has a t = u^`POWER` of its own, stratified over all blocks of the batch and shuffled, since the first has
    nothing before it. The function is named after length and power: fingerprints hold the name. ValueError: block_length < 1.

    >>> ids = torch.tensor([[4, 5, 6, 7]])
    >>> pairs, _, weights = block_batch(1)(ids, torch.Generator().manual_seed(0), H.real_tokens(ids))
    >>> pairs.tolist(), weights.tolist()
    ([[[1, 1, 1, 1], [4, 5, 6, 7]]], [[0.25, 0.25, 0.25, 0.25]])
    """
    _check_length(block_length)

    def batch(sequences: Tensor, generator: torch.Generator | None, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = len(sequences) * -(-sequences.shape[1] // block_length)
        u = H.stratified_times(blocks, generator)
        u = u[torch.randperm(blocks, generator=generator, device=u.device)].to(sequences.device)
        mask, weight = block_masks(u[None], learned, block_length, H.POWER, generator)
        pairs = torch.stack((sequences.masked_fill(mask[0], H.MASK_ID), sequences), dim=1)
        return pairs, sequences, (weight[0] / learned.sum(dim=1, keepdim=True).clamp(min=1)).float()

    batch.__name__ = batch.__qualname__ = f"block_batch_{block_length}_power_{H.POWER}"
    return batch


@H._checked()
@H._inference
def block_nelbo(
    model: BlockPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    block_length: int,
    n_samples: int,
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate of the bound above on -log p of each sequence LongTensor[B, L], FloatTensor[B], nats; exact for L' = 1.

    Each of K = `n_samples` passes masks exactly l tokens of every block, l / n in [k / K, (k + 1) / K) in pass k: all blocks of
    all rows share each such stratum in a random order. `maskable` BoolTensor[B, L], what is scored, default everything.
    ValueError: block_length or n_samples < 1, or shapes that do not fit.

    >>> blank = lambda pairs: torch.zeros(*pairs[:, 0].shape, 8)  # all 8 tokens are equally likely
    >>> bound = block_nelbo(blank, torch.tensor([[4, 5, 6, 7]]), H.MASK_ID, block_length=2, n_samples=1)
    >>> (bound / torch.tensor(8).log()).round(decimals=3).tolist()
    [4.0]
    """
    _check_length(block_length)
    L, blocks = sequences.shape[1], len(sequences) * -(-sequences.shape[1] // block_length)
    u = H.stratified_shares(n_samples, sequences.new_empty(blocks), generator)
    mask, weight = block_masks(u, maskable, block_length, generator=generator)  # each [K, B, L]
    rows, hidden = sequences.expand_as(mask).reshape(-1, L), mask.reshape(-1, L)
    pairs, nll = torch.stack((rows.masked_fill(hidden, mask_id), rows), dim=1), torch.zeros(rows.shape, device=rows.device)
    for part, ids, truth, wanted in zip(*(x.split(max(1, 2**13 // L)) for x in (nll, pairs, rows, hidden))):
        part[wanted] = F.cross_entropy(model(ids)[wanted].float(), truth[wanted], reduction="none")
    return (weight * nll.view_as(mask)).sum(dim=-1).mean(dim=0).float()


def by_place(strategy: Strategy, block_length: int, per_pass: int) -> Strategy:
    """The strategy in blocks that begin where they do in training, from left to right, with at most `per_pass` masks a pass.

    A block of `llada_helpers.blockwise` is so many masks, wherever they are; here prompts of every length will do. The schedule
    is the strategy's own: with steps=1 `order` counts the passes. ValueError for a number < 1.

    >>> def predict(ids):  # sure of 4, 5, 6, ..., and the surer the further right
    ...     return (torch.eye(9)[4:] * torch.arange(1, 6)[:, None])[: ids.shape[1]].expand(len(ids), -1, -1)
    >>> template, strategy = torch.tensor([[4, *[H.MASK_ID] * 3]]), by_place(H.low_confidence, 2, 1)
    >>> made = H.reverse_process(predict, template, mask_id=H.MASK_ID, steps=1, remasking=strategy)
    >>> made.ids.tolist(), made.order[:, 2:].tolist(), made.nfe
    ([[4, 5, 6, 7]], [[2, 1]], 3)
    """
    _check_length(min(block_length, per_pass))

    def schedule(masked: Tensor, n: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        block = torch.arange(masked.shape[1], device=masked.device) // block_length
        opened = masked & (block == masked.long().argmax(dim=1, keepdim=True) // block_length)  # the first block with masks
        return opened, opened.sum(dim=1).clamp(max=per_pass)

    commit = functools.partial(strategy)
    commit.schedule = schedule
    return commit


def cached_blocks(model: BlockDiffusion, mask_id: int = H.MASK_ID) -> MaskPredictor:
    """The model as a mask predictor that remembers keys and values of finished blocks. Unlike `decoding.cached` it is exact.

    A pass covers the blocks from the first one that has a mask or other tokens than in the pass before to the last that is being
    filled, so a block's last tokens are read in the first pass of the next one. Logits are 0 elsewhere, where `by_place` fills
    nothing. ValueError: a model in which later blocks change earlier ones.

    >>> model = block_diffusion(2)(H.ModelConfig(vocab_size=9, seq_len=6, n_layer=1, n_head=1, n_embd=8))
    >>> cached_blocks(model)(torch.tensor([[4, 5, H.MASK_ID, 6, H.MASK_ID, 7]])).shape
    torch.Size([1, 6, 9])
    """
    wrong = not isinstance(model, BlockDiffusion)
    H._refuse(wrong, f"finished blocks must stay as they are: pass a BlockDiffusion, not {type(model).__name__}")
    seen = cache = None  # the ids whose keys and values are kept, -1 where none are

    @H._inference
    def predict(ask: MaskPredictor, ids: Tensor) -> Tensor:
        nonlocal seen, cache
        if seen is None or seen.shape != ids.shape:
            seen, cache = torch.full_like(ids, -1), H.KVCache(model.config, len(ids), model.embed.weight)
        masked, length = ids == mask_id, model.block_length
        start = int((masked | (ids != seen)).any(dim=0).long().argmax()) // length * length
        last = masked.long().argmax(dim=1).masked_fill(~masked.any(dim=1), ids.shape[1] - 1).max()  # of the rows' first masks
        stop, cache.length = min((int(last) // length + 1) * length, ids.shape[1]), start
        logits = ask(ids[:, start:stop], cache=cache, start=start)
        seen = F.pad(ids[:, :stop], (0, ids.shape[1] - stop), value=-1)
        return F.pad(logits, (0, 0, start, ids.shape[1] - stop))

    return lambda ids: predict(model, ids)


def write(model: H.Transformer, template: Tensor, per_pass: int, generator: torch.Generator | None = None) -> H.Generation:
    """Fill templates LongTensor[B, L] at temperature 1, in random order inside a block, so many characters a pass; AR takes one.

    LLaDA is a model with a single block. AR and block diffusion keep keys and values.

    >>> model = block_diffusion(4)(H.ModelConfig(vocab_size=9, seq_len=8, n_layer=1, n_head=1, n_embd=8))
    >>> write(model, torch.tensor([[4, 5, *[H.MASK_ID] * 6]]), per_pass=4).nfe
    2
    """
    options, template = {"temperature": 1.0, "generator": generator}, template.to(model.head.weight.device)
    if model.config.causal:
        return quality.write(model, template, **options)
    predict = cached_blocks(model) if isinstance(model, BlockDiffusion) else model
    strategy = by_place(H.random_order(generator), getattr(model, "block_length", model.config.seq_len), per_pass)
    options |= {"mask_id": H.MASK_ID, "forbidden": quality.SPECIAL, "steps": 1, "remasking": strategy}
    return H.reverse_process(predict, template, **options)


class BlockJob(H.Job):
    """A training of block diffusion: `architecture` says the block length, and batches and validation follow from it."""

    @property
    def batch_function(self) -> Callable:
        return self.make_batch or block_batch(self.architecture.block_length)

    def validation_nats(self, model: BlockPredictor, sequences: Tensor) -> Tensor:
        """Nats of the learned tokens of each row, FloatTensor[N]: the bound with fixed masks, exact for L' = 1."""
        options = {"maskable": self.learned(sequences), "generator": torch.Generator().manual_seed(0)}
        return block_nelbo(model, sequences, H.MASK_ID, block_length=self.architecture.block_length, n_samples=4, **options)


def block_jobs(
    preset: H.Preset, config: H.TrainConfig, vocab_size: int, train_ids: Tensor, val_ids: Tensor
) -> dict[str, list[H.Job]]:
    """LLaDA (first), AR, and block diffusion for L' between them, of equal size and about equal compute; three seeds each.

    A pass over both halves costs a little more than two (2.25 in the preset `cpu`), so each L' is trained for half the steps.

    >>> ids = torch.arange(4, 30)
    >>> jobs = block_jobs(H.PRESETS["smoke"], SIZES["smoke"][1][1], 30, ids, ids)
    >>> list(jobs)[:3], [jobs[row][0].train.steps for row in list(jobs)[:3]]
    (['LLaDA', 'AR', "L' = 2"], [20, 20, 10])
    """
    shape, data = preset.model(vocab_size, causal=False), (train_ids, val_ids)
    whole = [replace(config, seed=seed) for seed in range(3)]
    half = [replace(c, steps=max(1, c.steps // 2)) for c in whole]
    jobs = {name: [H.Job(replace(shape, causal=name == "AR"), c, *data) for c in whole] for name in ("LLaDA", "AR")}
    for length in LENGTHS:
        kind = block_diffusion(length)
        jobs[f"L' = {length}"] = [BlockJob(shape, c, *data, architecture=kind) for c in half]
    return jobs


def settings(block_length: int) -> dict[int, str]:
    """Characters a pass to try, and what a table calls them, by the passes that a whole block takes.

    >>> settings(16)
    {1: "L'", 2: "L'/2", 4: "L'/4", 16: '1'}
    """
    counts = {"1": block_length, "L'/4": min(4, block_length), "L'/2": min(2, block_length), "L'": 1}
    return dict(sorted({count: name for name, count in counts.items()}.items()))


def block_measure(preset: H.Preset, text: str) -> Callable[[H.Job, H.Run], dict]:
    """What `run_jobs` adds to a row: L' (1 for AR, the window for LLaDA), nats per character of the validation text, scores.

    A column such as "judge nats/char (L'/2)" is of texts that continue the prompts of `quality.prompts` with so many passes for
    each block (see `settings`); "passes" are those of a whole text.

    >>> text = "to be, or not to be " * 40
    >>> tokenizer, kind = H.CharTokenizer.from_text(text), block_diffusion(4)
    >>> shape = H.ModelConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_embd=8)
    >>> job = BlockJob(shape, H.TrainConfig(1, 2), *quality.parts(tokenizer.encode(text))[:2], architecture=kind)
    >>> row = block_measure(H.PRESETS["smoke"], text)(job, H.Run(kind(shape), None, {}, None))
    >>> row["block length"], round(row["nats/char"], 2), [row[f"passes ({name})"] for name in settings(4).values()]  # ln 12
    (4, 2.48, [48, 24, 12])
    """
    tokenizer = H.CharTokenizer.from_text(text)
    train_ids, val_ids, _ = quality.parts(tokenizer.encode(text))
    scores = quality.TextMeasure(tokenizer, text[: len(train_ids)])

    def measure(job: H.Job, run: H.Run) -> dict:
        windows = H.windows(quality.scored(preset, val_ids), job.model.seq_len)
        mean, interval = H.per_character(job.validation_nats(run.model, windows), H.real_tokens(windows).sum(dim=1))
        length = 1 if job.model.causal else getattr(job.architecture, "block_length", job.model.seq_len)
        line = {"scored on": "validation text", "block length": length, "nats/char": mean, "95% ±": interval}
        for per_pass, name in settings(length).items():
            made = write(run.model, quality.prompts(windows, preset.texts)[1], per_pass, torch.Generator().manual_seed(0))
            found = {"passes": made.nfe} | scores(made.ids)
            line |= {f"{key} ({name})": x for key, x in found.items() if key.removesuffix(" ±") in SCORES}
        return line

    return measure
