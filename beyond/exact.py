"""What a decoder is worth, exactly: the probability of a text under the very loop that writes.

A decoder that chooses *where* to write without looking at what it has drawn is a distribution over texts. Its probabilities can
be computed (Turok et al. 2026, *DUEL*, arXiv:2603.01367): let `reverse_process` run, and in each pass tell it the true tokens
instead of drawing them. The product of the probabilities that it gave them is p(text), however many tokens a pass commits.

    nats = decoder_nll(model, windows, H.MASK_ID, steps=8, remasking=bit_reversed).sum(dim=1)
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond import decoding, quality
from beyond.ablations import gradient_noise
from beyond.budget import trained
from beyond.likelihood import cost_by_place, low_noise_nelbo, spread
from llada_helpers import MaskPredictor, Strategy

SHAPE_ONLY = {"size", "dim", "numel", "expand_as", "view_as", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like"}
SHAPE_ONLY |= {"new_zeros", "new_ones", "new_empty", "new_full"}


class Unseen(torch.Tensor):
    """Drawn tokens of which a strategy may know shape, type and device; whatever would tell their values is refused.

    >>> tokens = torch.zeros(2, 3, dtype=torch.long).as_subclass(Unseen)
    >>> tokens.shape, torch.ones(3).expand_as(tokens).sum().item()
    (torch.Size([2, 3]), 6.0)
    >>> tokens + 1
    Traceback (most recent call last):
    ValueError: the strategy looks at the drawn tokens (add); pass one that decides by what is visible
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {})) if name in (*SHAPE_ONLY, "__get__") else args
        made = "new" in name or "like" in name or not isinstance(args[0], Unseen)
        if found is args or (isinstance(found, torch.Tensor) and not made):
            raise ValueError(f"the strategy looks at the drawn tokens ({name}); pass one that decides by what is visible")
        return found


@H._checked()
@H._inference
def decoder_nll(
    model: MaskPredictor,
    sequences: Tensor,
    mask_id: int,
    *,
    steps: int,
    remasking: str | Strategy,
    maskable: Tensor | None = None,
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p(x_i | what is visible when x_i is committed), FloatTensor[B, L], nats: a row's sum is -log p(x) under this decoder.

    The decoder is `reverse_process` with the same `steps`, `remasking`, `temperature` and `forbidden`, applied to the template
    whose `maskable` tokens (BoolTensor[B, L], default all) are masked; elsewhere the result is 0. It costs as many passes. A
    strategy that draws its order (random, ancestral) gives an unbiased estimate of an upper bound on -log p, Jensen's; averaged
    inside the logarithm over K orders, log K - logsumexp(-nats), it is a tighter one.

    Raises:
        ValueError: a strategy that looks at the drawn tokens (low confidence), since its order then depends on the dice;
            temperature 0 or less; logits that are not finite; what `reverse_process` refuses.

    >>> blank = lambda ids: torch.zeros(*ids.shape, 9)  # 8 tokens are equally likely, as [MASK] is never drawn
    >>> nats = decoder_nll(blank, torch.tensor([[4, 5, 6]]), H.MASK_ID, steps=2, remasking="entropy")
    >>> (nats / math.log(8)).round(decimals=3).tolist()
    [[1.0, 1.0, 1.0]]
    """
    wrong = not 0 < temperature < math.inf or bool((sequences == mask_id).any())
    H._refuse(wrong, f"temperature={temperature}: pass a positive one, and sequences without mask_id={mask_id}")
    strategy, unseen = H.named_strategy(remasking, generator), torch.zeros_like(sequences).as_subclass(Unseen)
    banned, truth = torch.tensor(sorted({mask_id, *forbidden}), device=sequences.device), sequences[..., None]
    logits, nll = torch.empty(0), torch.zeros(sequences.shape, dtype=torch.float64, device=sequences.device)

    def told(ids: Tensor) -> Tensor:
        """A predictor that knows the text, so that this is what the sampler draws; what the model says is kept."""
        nonlocal logits
        logits = model(ids).double()
        H._refuse(not bool((logits < math.inf).all()), "the logits are not finite; pass a model without NaN and infinity")
        return torch.full_like(logits, -math.inf).scatter(-1, truth, 0.0)

    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        nonlocal nll
        probs = logits.softmax(dim=-1) * masked[..., None]
        stay = strategy(unseen, probs, masked, count) & masked
        cost = -(logits.index_fill(-1, banned, -math.inf) / temperature).log_softmax(dim=-1).gather(-1, truth)[..., 0]
        nll = nll.where(~stay, cost)
        return stay

    commit.schedule = getattr(strategy, "schedule", H.evenly)
    if bool(maskable.any()):
        H.reverse_process(told, sequences.masked_fill(maskable, mask_id), mask_id=mask_id, steps=steps, remasking=commit)
    return nll.float()


class Sizes(NamedTuple):
    """How much is measured.

    >>> SIZES["cpu"][1].one_by_one
    100
    """

    windows: int  # at most so many, evenly spread
    one_by_one: int  # of them where passes are many: one for each character or two, adaptive
    few: int  # of them for the choice on validation text, for single passes and places
    passes: tuple[int, ...]  # fewer ones
    batches: int  # for the noise of the gradient


FULL = Sizes(300, 100, 200, (4, 8, 16, 32), 400)
SIZES = {name: (Sizes(64, 16, 64, (4, 8, 16), 16), FULL) for name in H.PRESETS}
SIZES["smoke"] = (Sizes(4, 2, 3, (4,), 16), Sizes(6, 3, 3, (2, 4), 16))
EVEN = ("random", "bit-reversed", "entropy", "left to right")  # as many characters in every pass


def left_to_right(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Strategy: AR's order.

    >>> left_to_right(None, None, torch.tensor([[False, True, True, True]]), torch.tensor([2])).tolist()
    [[False, True, True, False]]
    """
    return masked & (masked.cumsum(dim=1) <= count[:, None])


def right_to_left(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Strategy: AR's order, backwards."""
    return left_to_right(tokens, probs, masked.flip(1), count).flip(1)


def doubling(strategy: Strategy) -> Strategy:
    """The strategy with a schedule whose last pass fills half of the masks, the one before a quarter, and so on."""

    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        return strategy(tokens, probs, masked, count)

    def schedule(masked: Tensor, n: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        return masked, masked.sum(dim=1) - n + -(-n // 2 ** max(0, steps - 1 - step))

    commit.schedule = schedule
    return commit


def apart(scale: float) -> Strategy:
    """Commit, the surest first, all whose distance to every other of the pass is at least scale x their entropy in nats.

    An adaptive rule that stays exact: a character that is certain may stand next to another, an uncertain one wants room. The
    schedule's count is disregarded; steps=1 lets it take as many passes as it needs.
    """

    def commit(tokens: Tensor, probs: Tensor, masked: Tensor, count: Tensor) -> Tensor:
        entropy = torch.special.entr(probs).sum(dim=-1)
        place, chosen = torch.arange(masked.shape[1], device=masked.device), torch.zeros_like(masked)
        gap = torch.full(masked.shape, math.inf, device=masked.device)
        for _ in range(masked.shape[1]):
            new = H.highest(-entropy, masked & ~chosen & (gap >= scale * entropy), torch.ones_like(count))
            if not bool(new.any()):
                break
            away = (place - new.long().argmax(dim=1, keepdim=True)).abs().to(gap.dtype)
            gap, chosen = torch.where(new.any(dim=1, keepdim=True), gap.minimum(away), gap), chosen | new
        return chosen

    return commit


def decoders(passes: tuple[int, ...], length: int) -> list[tuple[str, Strategy | str, int]]:
    """(name, strategy, steps) of what is compared: orders by passes, spaced ones, doubling counts, the adaptive rule.

    >>> [name for name, _, steps in decoders((8,), 128)][:5]
    ['random', 'bit-reversed', 'entropy', 'left to right', 'entropy, 2 apart']
    """
    even = dict(zip(EVEN, ("random", decoding.bit_reversed, H.entropy, left_to_right)))
    trials = [(name, even[name], k) for k in passes for name in EVEN]
    spaced = [(k, d) for k in passes if k <= length // 8 for d in (2, 4, 8, 16) if d <= k]
    trials += [(f"entropy, {d} apart", decoding.spaced(d), k) for k, d in spaced]
    trials += [("bit-reversed, doubling", doubling(decoding.bit_reversed), int(math.log2(length)) + 1)]
    trials += [(f"adaptive, {scale} a nat apart", apart(scale), 1) for scale in (2, 4, 8)]
    one = even | {"margin": H.margin, "right to left": right_to_left}
    return trials + [(name, strategy, length) for name, strategy in one.items()]


def measured(model: H.Transformer, windows: Tensor, strategy: Strategy | str, steps: int) -> tuple[Tensor, Tensor]:
    """Nats of each character of windows [N, L], FloatTensor[N, L], and the pass that committed it, from 0, LongTensor[N, L].

    >>> model = H.Transformer(H.ModelConfig(9, 4, n_layer=1, n_head=1, n_embd=8))
    >>> nats, order = measured(model, torch.tensor([[4, 5, 6, H.PAD_ID]]), left_to_right, 3)
    >>> (nats / math.log(5)).round(decimals=2).tolist(), order.tolist()
    ([[1.0, 1.0, 1.0, 0.0]], [[0, 1, 2, -1]])
    """
    generator, parts = torch.Generator().manual_seed(0), []
    for rows in windows.split(max(1, 2**12 // windows.shape[1])):  # what a CPU's cache holds
        order, real = torch.full_like(rows, -1), H.real_tokens(rows)
        inner = H.named_strategy(strategy, generator)

        def watched(tokens, probs, masked, count, inner=inner, order=order):
            stay = inner(tokens, probs, masked, count) & masked
            order[stay.to(order.device)] = order.amax() + 1
            return stay

        watched.schedule = getattr(inner, "schedule", H.evenly)
        options = {"steps": steps, "remasking": watched, "maskable": real, "forbidden": quality.SPECIAL}
        parts.append((decoder_nll(model, rows, H.MASK_ID, **options).cpu(), order))
    return tuple(torch.cat(part) for part in zip(*parts))


def chosen(windows: Tensor, count: int) -> Tensor:
    """At most `count` windows of [N, L], evenly spread over all; none that is padded.

    >>> chosen(torch.arange(12).view(6, 2), 3)[:, 0].tolist(), len(chosen(torch.arange(12).view(6, 2), 9))  # 0 is [PAD]
    ([0, 4, 8], 5)
    """
    return windows[H.real_tokens(windows).all(dim=1)] if count >= len(windows) else spread(windows, count)


def exact_table(models: dict[str, H.Transformer], windows: Tensor, sizes: Sizes, only: str = "") -> pd.DataFrame:
    """A row for each decoder, for the NELBO and for AR: exact nats per character of windows [N, L]; random order: a bound.

    "minus NELBO" is paired: the same windows. "passes" is the mean over texts. `only`: rows that match this expression.

    >>> shape = H.ModelConfig(9, 16, n_layer=1, n_head=1, n_embd=8)
    >>> models = {"LLaDA": H.Transformer(shape), "AR": H.Transformer(replace(shape, causal=True))}
    >>> table = exact_table(models, torch.randint(4, 9, (6, 16), generator=torch.Generator().manual_seed(0)), SIZES["smoke"][0])
    >>> table["nats/char"].round(2).unique().tolist()  # blank: ln 5 for a decoder, which writes characters only, else ln 9
    [2.2, 1.61]
    """
    few, one, length = chosen(windows, sizes.windows), chosen(windows, sizes.one_by_one), windows.shape[1]
    bound, lines = {}, []
    for rows, where in ((few, ""), (one, ", the windows of one by one")):
        options = {"n_samples": 16, "maskable": H.real_tokens(rows), "generator": torch.Generator().manual_seed(0)}
        bound[len(rows)] = low_noise_nelbo(models["LLaDA"], rows, H.MASK_ID, **options).cpu()
        lines.append({"row": f"NELBO{where}", "decoder": "NELBO", "nats": bound[len(rows)]})
        nats = H.ar_nll(models["AR"], rows, H.START_ID).cpu()
        lines.append({"row": f"AR{where}", "decoder": "AR", "passes": length, "nats": nats})
    for name, strategy, steps in decoders(sizes.passes, length):
        row = f"{name}, {steps} passes" if steps > 1 else name
        if re.search(only, row):
            rows = one if 2 * steps >= length or steps == 1 else few
            nats, order = measured(models["LLaDA"], rows, strategy, steps)
            passes = (order.sort(dim=1).values.diff(dim=1) > 0).sum(dim=1).float().mean().item() + 1
            lines.append({"row": row, "decoder": name, "steps": steps, "passes": passes, "nats": nats.sum(dim=1)})
    table = []
    for line in lines:
        rows = few if len(line["nats"]) == len(few) else one
        counts, nats = H.real_tokens(rows).sum(dim=1), line.pop("nats")
        line["nats/char"], line["nats/char ±"] = H.per_character(nats, counts)
        line["minus NELBO"], line["minus NELBO ±"] = H.per_character(nats - bound[len(rows)], counts)
        table.append(line | {"windows": len(rows)})
    return pd.DataFrame(table)


def price_of_passes(model: H.Transformer, windows: Tensor, steps: int) -> pd.DataFrame:
    """Where a decoder of `steps` passes pays: nats per character of those that each pass commits, and their share of a text's."""
    lines = []
    for name, strategy, k in decoders((steps,), windows.shape[1]):
        if k == steps and name in EVEN:
            nats, order = measured(model, windows, strategy, steps)
            for step in range(steps):
                mine = order == step
                mean, half = H.per_character((nats * mine).sum(dim=1), mine.sum(dim=1))
                share = float((nats * mine).sum() / H.real_tokens(windows).sum())
                lines.append({"decoder": name, "pass": step + 1, "nats/char": mean, "nats/char ±": half, "of the whole": share})
    return pd.DataFrame(lines)


def by_place(models: dict[str, H.Transformer], windows: Tensor, parts: int = 8) -> pd.DataFrame:
    """Nats per character by the place in the window: AR, LLaDA from left to right, LLaDA's NELBO.

    Asked AR's own question, what is masked of the window is what lies to the right: the place is the masking rate.
    """
    nats = {"AR": cost_by_place(models["AR"], windows)}
    nats["LLaDA, left to right"] = measured(models["LLaDA"], windows, left_to_right, windows.shape[1])[0]
    nats["LLaDA, random order (NELBO)"] = cost_by_place(models["LLaDA"], windows)
    edges, lines = np.linspace(0, windows.shape[1], parts + 1).round().astype(int), []
    for name, cost in nats.items():
        for start, end in pairwise(edges.tolist()):
            mean, half = H.per_character(cost[:, start:end].sum(dim=1), torch.full((len(cost),), end - start))
            masked = 1 - (start + end) / 2 / windows.shape[1]
            lines.append({"model": name, "place": f"{start + 1}-{end}", "masked": masked, "nats/char": mean, "nats/char ±": half})
    return pd.DataFrame(lines)


def tables(models: dict[str, H.Transformer], val: Tensor, test: Tensor, sizes: Sizes) -> dict[str, Callable[[], pd.DataFrame]]:
    """How the tables are made, by name, on windows [N, L] of the test text; what is chosen, on those of the validation text."""
    few, choice = chosen(test, sizes.few), sizes._replace(windows=sizes.few, one_by_one=sizes.few)
    return {
        "exact": lambda: exact_table(models, test, sizes),
        "exact_choice": lambda: exact_table(models, val, choice, "apart|doubling|^bit-reversed, (4|8|16) "),
        "exact_passes": lambda: price_of_passes(models["LLaDA"], few, PASSES),
        "exact_places": lambda: by_place(models, few),
        "gradient_noise": lambda: gradient_noise(models["LLaDA"], val, sizes.batches),
    }


PASSES = 8  # of the decoder that is trained for
FURTHER = H.TrainConfig(300, 32, muon_lr=0.005, adamw_lr=1e-3, decay=1.0, evals=4)
TRAINING = {name: (replace(FURTHER, steps=50, evals=1), FURTHER) for name in H.PRESETS}
TRAINING["smoke"] = (replace(FURTHER, steps=2, evals=1), replace(FURTHER, steps=4, evals=1))


def decoder_batch(sequences: Tensor, generator: torch.Generator, learned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states that `PASSES` bit-reversed passes visit, and what the next pass commits: inputs, targets, weights [B, L].

    One pass per row, stratified; the expectation of the loss is what `decoder_nll` measures, per character.

    >>> inputs, _, weights = decoder_batch(torch.full((8, 16), 5), torch.Generator(), torch.ones(8, 16, dtype=torch.bool))
    >>> sorted((inputs == H.MASK_ID).sum(dim=1).tolist()), weights.sum().item()
    ([2, 4, 6, 8, 10, 12, 14, 16], 8.0)
    """
    n, k = learned.sum(dim=1), (H.stratified_times(len(sequences), generator) * PASSES).ceil().long() - 1
    before, after = (decoding.bit_reversed(None, None, learned, n * passes // PASSES) for passes in (k, k + 1))
    weights = (after & ~before) * (PASSES / n.clamp(min=1))[:, None]
    return sequences.masked_fill(learned & ~before, H.MASK_ID), sequences, weights


def decoder_jobs(preset: H.Preset, config: H.TrainConfig, vocab_size: int, *data: Tensor) -> dict[str, list[H.Job]]:
    """Further training of the preset's LLaDA, three seeds each: on Eq. 3, the control, and on the decoder's own states."""
    job = preset.jobs(vocab_size, *data)["LLaDA"]
    start = trained(f"{preset.name}-llada", job, compiled=preset.compiled, quiet=True).model.cpu()
    more = [replace(job, train=replace(config, seed=seed), start=start) for seed in (1, 2, 3)]
    return {"Eq. 3 for longer": more, "the decoder's states": [replace(further, make_batch=decoder_batch) for further in more]}


def decoder_measure(preset: H.Preset, text: str):
    """What `run_jobs` adds: the price of `PASSES` and of twice as many bit-reversed passes, and the NELBO, on the test text."""
    tokenizer = H.CharTokenizer.from_text(text)
    windows = chosen(H.windows(quality.parts(tokenizer.encode(text))[2], preset.seq_len), SIZES[preset.name][1].few)

    def measure(job: H.Job, run: H.Run) -> dict:
        line = {"scored on": "test text"}
        for steps in (PASSES, 2 * PASSES):
            line[f"{steps} passes"] = measured(run.model, windows, decoding.bit_reversed, steps)[0].mean().item()
        generator = torch.Generator().manual_seed(0)
        nats = low_noise_nelbo(run.model, windows, H.MASK_ID, n_samples=preset.nelbo_samples, generator=generator)
        return line | {"NELBO": nats.mean().item() / preset.seq_len, "nats/char": line[f"{PASSES} passes"]}

    return measure
