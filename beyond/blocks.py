"""Block diffusion: from autoregression to LLaDA in one number (BD3-LM, Arriola et al. 2025, arXiv:2503.09573).

The text is cut into blocks of L' tokens. Blocks come from left to right, and each is a masked diffusion given the clean blocks
before it, so that log p(x) is a sum over blocks of log p(x^b | x^<b), each with its own bound:

    -log p(x) <= sum over blocks b of E_l [ (n_b / l) * sum over the l masked i in b of -log p(x_i | x_l^b, x^<b) ]

with l, the number of masked tokens, uniform in 1 ... n_b, and x_l^b the block so masked. L' = 1 is AR, exactly: a single token is
always masked. (Where AR reads [START], it reads one [MASK] with nothing before it.) L' = L is LLaDA.

A *block predictor* is a callable from pairs LongTensor[B, 2, L], noisy x_t and clean x_0, to logits FloatTensor[B, L, V] of the
noisy tokens. `BlockDiffusion` is one in a single pass; `by_blocks` makes one of any mask predictor, in a pass for each block.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import llada_helpers as H
from llada_helpers import MaskPredictor

BlockPredictor = Callable[[Tensor], Tensor]
LENGTHS = (1, 2, 4, 8, 16, 32)
WHOLE = (1, 4, 16)  # those also trained for as many steps as LLaDA, at more than twice its compute
_SHORT = ("smoke", H.TrainConfig(10, 16, evals=1, eval_windows=32))
_CPU = ("cpu", H.TrainConfig(600, 16, evals=4))
SIZES = {  # the notebook's short form and the full one: whose model, and how it is trained
    "smoke": (_SHORT, ("smoke", H.TrainConfig(20, 16, evals=1, eval_windows=32))),
    "cpu": (_SHORT, _CPU),
    "cpu_long": (_SHORT, _CPU),
    "gpu": (_SHORT, ("gpu", H.TrainConfig(3000, 64, adamw_lr=2e-3, evals=10))),
}


def _check_length(block_length: int) -> None:
    if block_length < 1:
        raise ValueError(f"block_length={block_length}: pass a positive number of tokens")


def block_mask(length: int, block_length: int) -> Tensor:
    """Who sees whom in one pass over the noisy half and the clean half: BoolTensor[query, key], [2 length, 2 length].

    A noisy token sees its own noisy block and the clean blocks before it, a clean one the clean blocks up to its own (section 3.1
    of BD3-LM). No token sees a later block, and no noisy one its own clean twin.

    >>> block_mask(2, 1).int().tolist()  # noisy 1, noisy 2, clean 1, clean 2
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    _check_length(block_length)
    place = torch.arange(2 * length)
    block, clean = place % length // block_length, place >= length
    query, reader = block[:, None], clean[:, None]
    return (~reader & ~clean & (block == query)) | (clean & (block < query + reader.long()))


class BlockDiffusion(H.Transformer):
    """The Transformer, with no further parameter, as block predictor and as mask predictor; see `block_diffusion` for its kinds.

    Pairs [B, 2, L] take one pass over 2 L tokens, which gives the logits of the noisy half [B, L, V]; both halves carry the same
    positions. Ids [B, L] take an ordinary pass in which every token sees the blocks up to its own, so that keys and values of
    finished blocks stay as they are, whatever comes. [PAD] is never attended to.

    ValueError: a causal config, or longer sequences than its `seq_len`.

    >>> model = block_diffusion(2)(H.ModelConfig(vocab_size=9, seq_len=6, n_layer=1, n_head=1, n_embd=8))
    >>> clean = torch.tensor([[4, 5, 6, 7]])
    >>> isinstance(model, BlockDiffusion), tuple(model(torch.stack((clean, clean), dim=1)).shape)
    (True, (1, 4, 9))
    """

    block_length: int

    def __init__(self, config: H.ModelConfig):
        super().__init__(config)
        if config.causal:
            raise ValueError("attention is causal between blocks, not inside: pass a config with causal=False")

    def forward(self, ids: Tensor, cache: H.KVCache | None = None, start: int = 0) -> Tensor:
        if ids.ndim == 2:
            return super().forward(ids, cache, start)
        length = ids.shape[-1]
        if ids.ndim != 3 or ids.shape[1] != 2 or length > self.config.seq_len:
            raise ValueError(f"ids {tuple(ids.shape)}: pass [B, L] or pairs [B, 2, L] with L <= {self.config.seq_len}")
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
    named = {"block_length": block_length, "__module__": __name__, "__doc__": BlockDiffusion.__doc__}
    return type(f"BlockDiffusion_{block_length}", (BlockDiffusion,), named)


@H._inference
def _by_blocks(model: MaskPredictor, pairs: Tensor, block_length: int, mask_id: int) -> Tensor:
    (noisy, clean), logits = pairs.unbind(dim=1), []
    for block in range(0, noisy.shape[1], block_length):
        here, later = noisy[:, block : block + block_length], noisy[:, block + block_length :]
        ids = torch.cat((clean[:, :block], here, torch.full_like(later, mask_id)), dim=1)
        logits.append(model(ids)[:, block : block + block_length])
    return torch.cat(logits, dim=1)


def by_blocks(model: MaskPredictor, block_length: int, mask_id: int = H.MASK_ID) -> BlockPredictor:
    """Any mask predictor as a block predictor: a pass for each block, the clean ones before it, [MASK] for all that comes after.

    So LLaDA itself can be scored in blocks that it was not trained for. Pass pairs on the model's device.

    Raises:
        ValueError: block_length < 1.

    >>> def model(ids):  # favours 4 by as many nats as it sees tokens
    ...     return torch.eye(8)[4] * (ids != H.MASK_ID).sum(dim=1)[:, None, None].expand(*ids.shape, 1)
    >>> noisy = torch.full((1, 3), H.MASK_ID)
    >>> by_blocks(model, 1)(torch.stack((noisy, torch.tensor([[5, 6, 7]])), dim=1))[0, :, 4].tolist()
    [0.0, 1.0, 2.0]
    """
    _check_length(block_length)
    return lambda pairs: _by_blocks(model, pairs, block_length, mask_id)


def block_masks(
    u: Tensor, maskable: Tensor, block_length: int, power: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Masks of exactly l tokens in each block, and the weights that make a sum of cross-entropies under them a bound.

    In a block with n maskable tokens l is floor(n u^power) + 1, which has the probability P(l) = (l / n)^(1 / power) -
    ((l - 1) / n)^(1 / power) for uniform u. A token weighs 1 / (l P(l)): with power 1 the bound's n / l, with another one its
    expectation. A block of one token weighs 1 whatever u is.

    Args:
        u: FloatTensor[K, B * ceil(L / block_length)] in [0, 1], for K masks of each block of each row.
        maskable: BoolTensor[B, L].

    Returns:
        BoolTensor[K, B, L], true where masked; DoubleTensor[K, B, L], 0 elsewhere.

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
    mask, weight = (x.view(len(u), len(maskable), -1)[..., : maskable.shape[1]] for x in (mask, weight))
    return mask, weight


def block_batch(block_length: int) -> Callable[[Tensor, torch.Generator | None, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The batch function, as `Job.make_batch` takes it, whose loss is the bound in nats per learned token, for every power.

    (sequences LongTensor[B, L], generator, learned BoolTensor[B, L]) -> (pairs LongTensor[B, 2, L], targets [B, L], weights
    [B, L]). Each block has a t = u^`POWER` of its own (see `llada_helpers.diffusion_batch`), stratified over all blocks of the
    batch and shuffled, since blocks are not alike: the first has nothing before it. Exactly l of its tokens are masked, so that
    L' = 1 has AR's loss without noise. The function is named after length and power: fingerprints hold the name.

    Raises:
        ValueError: block_length < 1.

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

    Each of K = `n_samples` passes masks exactly l tokens of every block. l is stratified: in pass k, l / n is uniform in
    [k / K, (k + 1) / K), and all blocks of all rows share each such stratum in a random order.

    Args:
        maskable: BoolTensor[B, L], what is scored; default everything.

    Raises:
        ValueError: block_length or n_samples < 1, or shapes that do not fit.

    >>> blank = lambda pairs: torch.zeros(*pairs[:, 0].shape, 8)  # all 8 tokens are equally likely
    >>> bound = block_nelbo(blank, torch.tensor([[4, 5, 6, 7]]), H.MASK_ID, block_length=2, n_samples=1)
    >>> (bound / torch.tensor(8).log()).round(decimals=3).tolist()
    [4.0]
    """
    _check_length(block_length)
    L, blocks = sequences.shape[1], len(sequences) * -(-sequences.shape[1] // block_length)
    rank = H._uniform((n_samples, blocks), sequences, generator).argsort(dim=1)
    shift = (H._uniform((n_samples, 1), sequences, generator, torch.float64) + rank / blocks) % 1
    u = (torch.arange(n_samples, device=sequences.device)[:, None] + shift) / n_samples
    mask, weight = block_masks(u, maskable, block_length, generator=generator)  # each [K, B, L]
    rows, hidden = sequences.expand_as(mask).reshape(-1, L), mask.reshape(-1, L)
    pairs, nll = torch.stack((rows.masked_fill(hidden, mask_id), rows), dim=1), torch.zeros(rows.shape, device=rows.device)
    for part, ids, truth, wanted in zip(*(x.split(max(1, 2**13 // L)) for x in (nll, pairs, rows, hidden))):
        part[wanted] = F.cross_entropy(model(ids)[wanted].float(), truth[wanted], reduction="none")
    return (weight * nll.view_as(mask)).sum(dim=-1).mean(dim=0).float()


def cached_blocks(model: BlockDiffusion, mask_id: int = H.MASK_ID) -> MaskPredictor:
    """The model as a mask predictor that remembers keys and values of finished blocks. Unlike `decoding.cached` it is exact.

    A pass covers the blocks from the first one that has a mask or other tokens than in the pass before. So a block's last tokens
    are read in the first pass of the next one, and finishing it costs no pass of its own. Logits before that are 0: no sampler
    looks at them.

    Raises:
        ValueError: a model in which later blocks change earlier ones.

    >>> model = block_diffusion(2)(H.ModelConfig(vocab_size=9, seq_len=6, n_layer=1, n_head=1, n_embd=8))
    >>> template = torch.tensor([[4, 5, *[H.MASK_ID] * 4]])
    >>> options = {"mask_id": H.MASK_ID, "block_length": 2, "steps_per_block": 1}
    >>> generate_blocks(cached_blocks(model), template, **options).nfe
    2
    """
    if not isinstance(model, BlockDiffusion):
        raise ValueError(f"finished blocks must stay as they are: pass a BlockDiffusion, not {type(model).__name__}")
    seen = cache = None  # ids of the last pass, keys and values of all that it covered or took over

    @H._inference
    def predict(ask: MaskPredictor, ids: Tensor) -> Tensor:
        nonlocal seen, cache
        if seen is None or len(seen) != len(ids):
            seen, cache = ids[:, :0], H.KVCache(model.config, len(ids), model.embed.weight)
        known = min(seen.shape[1], ids.shape[1])
        stale = ((ids[:, :known] != seen[:, :known]) | (ids[:, :known] == mask_id)).any(dim=0).nonzero()[:, 0].tolist()
        first = min([*stale, known, ids.shape[1] - 1])
        start = cache.length = first // model.block_length * model.block_length
        logits = ask(ids[:, start:], cache=cache, start=start)
        seen = ids.clone()
        return F.pad(logits, (0, 0, start, 0))

    return lambda ids: predict(model, ids)


def generate_blocks(
    model: MaskPredictor, template: Tensor, *, mask_id: int, block_length: int, steps_per_block: int, **options
) -> H.Generation:
    """Fill every [MASK] of the template LongTensor[B, L], block after block: each by `llada_helpers.reverse_process`.

    Blocks are counted from the beginning of the sequence, as in training, so prompts of every length will do; a block that is
    partly given has its other tokens filled. A blank in the middle is filled with what stands before it and in its own block:
    later blocks are out of sight, even where they are given.

    Args:
        model: our `BlockDiffusion`, `cached_blocks` of it, or any mask predictor; it is asked for the sequence up to the block's
            end.
        steps_per_block: passes for each block, fewer where it has fewer masks and the schedule wants nothing in some.
        options: those of `reverse_process`: temperature, top_p, remasking, forbidden, generator.

    Raises:
        ValueError: block_length < 1, no [MASK], and what `reverse_process` refuses.

    >>> def predict(ids):  # sure of 4, 5, 6, ..., and the surer the further right
    ...     return (torch.eye(9)[4:] * torch.arange(1, 6)[:, None])[: ids.shape[1]].expand(len(ids), -1, -1)
    >>> template = torch.tensor([[4, *[H.MASK_ID] * 3]])
    >>> made = generate_blocks(predict, template, mask_id=H.MASK_ID, block_length=2, steps_per_block=2)
    >>> made.ids.tolist(), made.order[:, 2:].tolist(), made.nfe
    ([[4, 5, 6, 7]], [[3, 2]], 3)
    """
    _check_length(block_length)
    if template.ndim != 2 or not bool((template == mask_id).any()):
        raise ValueError(f"template {tuple(template.shape)}: pass ids [B, L] with mask_id={mask_id} where tokens are wanted")
    longest = getattr(getattr(model, "config", None), "seq_len", template.shape[1])
    if template.shape[1] > longest:
        raise ValueError(f"the template has {template.shape[1]} tokens, the model's seq_len is {longest}; pass a shorter one")
    ids, order, nfe = template.clone(), torch.full_like(template, -1), 0
    confidence = torch.ones(ids.shape, device=ids.device)
    for block in range(0, ids.shape[1], block_length):
        here = slice(block, block + block_length)
        if not bool((ids[:, here] == mask_id).any()):
            continue
        made = H.reverse_process(model, ids[:, : here.stop], mask_id=mask_id, steps=steps_per_block, **options)
        taken = made.order[:, here]
        order[:, here] = torch.where(taken >= 0, taken + int(order.max()) + 1, -1)
        ids[:, here], confidence[:, here], nfe = made.ids[:, here], made.confidence[:, here], nfe + made.nfe
    return H.Generation(ids, order, nfe, confidence)


class BlockJob(H.Job):
    """A training of block diffusion: `architecture` says the block length, and batches and validation follow from it.

    >>> ids, shape = torch.arange(4, 10).repeat(10), H.ModelConfig(10, 8, n_layer=1, n_head=1, n_embd=8)
    >>> job = BlockJob(shape, H.TrainConfig(steps=2, batch_size=2), ids, ids, architecture=block_diffusion(4))
    >>> {key: job.settings()[key] for key in ("batch", "architecture")}
    {'batch': 'block_batch_4_power_1.5', 'architecture': 'BlockDiffusion_4'}
    """

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
    """LLaDA in the first row, AR, and block diffusion for every L' below the window, of equal parameters; two seeds each.

    A pass over both halves costs a little more than two (2.25 at 5 x 128 and a window of 128). So each L' is trained for half
    the steps, at about the same compute; and those of `WHOLE` also for as many steps, on as many characters. L' = L has no clean
    half, and is LLaDA with exactly l masks.

    >>> ids = torch.arange(4, 30)
    >>> jobs = block_jobs(H.PRESETS["smoke"], SIZES["smoke"][1][1], 30, ids, ids)
    >>> list(jobs)[:5], list(jobs)[-1], [jobs[row][0].train.steps for row in list(jobs)[2:4]]
    (['LLaDA', 'AR', "L' = 1, half the steps", "L' = 1", "L' = 2, half the steps"], "L' = 64", [10, 20])
    """
    shape, data = preset.model(vocab_size, causal=False), (train_ids, val_ids)
    whole = [replace(config, seed=seed) for seed in (0, 1)]
    half = [replace(c, steps=max(1, c.steps // 2)) for c in whole]
    jobs = {name: [H.Job(replace(shape, causal=name == "AR"), c, *data) for c in whole] for name in ("LLaDA", "AR")}
    lengths = [n for n in LENGTHS if n < shape.seq_len]
    for length in [*lengths, shape.seq_len]:
        kinds = {", half the steps": half} if length in lengths else {}
        kinds |= {"": whole} if length in (*WHOLE, shape.seq_len) else {}
        for steps, configs in kinds.items():
            row = f"L' = {length}{steps}"
            jobs[row] = [BlockJob(shape, c, *data, architecture=block_diffusion(length)) for c in configs]
    return jobs
