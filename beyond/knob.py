"""What the block length L' buys and what it costs: likelihood, texts by passes per block, blanks filled, speed.

One number goes from AR (L' = 1) to LLaDA (L' = L), so all models are asked the same questions, AR as one with blocks of one,
LLaDA as one with a single block. The suite "blocks" measures all but speed, which depends on the machine and not on the weights:
`speeds` times it, where nothing else runs. `race` puts both together.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond import blocks, budget, quality

BLANK = 4  # characters to fill in
SETTINGS = {"L'": 1, "L'/2": 2, "L'/4": 4, "1": None}  # passes per block: L' over this, or one
SCORES = ("judge nats/char", "known words", "char entropy", "distinct-3")


def block_length_of(model: H.Transformer) -> int:
    """L': 1 for AR, the window for LLaDA.

    >>> shape = H.ModelConfig(vocab_size=9, seq_len=8, n_layer=1, n_head=1, n_embd=8)
    >>> kinds = (H.Transformer(replace(shape, causal=True)), blocks.block_diffusion(4)(shape), H.Transformer(shape))
    >>> [block_length_of(model) for model in kinds]
    [1, 4, 8]
    """
    return 1 if model.config.causal else getattr(model, "block_length", model.config.seq_len)


def passes(block_length: int) -> dict[str, int]:
    """Passes per block to try, by the name that the table gives them: L', L'/2, L'/4 and 1, equal ones once.

    >>> passes(16), passes(2)
    ({"L'": 16, "L'/2": 8, "L'/4": 4, '1': 1}, {"L'": 2, "L'/2": 1})
    """
    made: dict[str, int] = {}
    for name, share in SETTINGS.items():
        count = -(-block_length // share) if share else 1
        if count not in made.values():
            made[name] = count
    return made


def fill(
    model: H.Transformer, template: Tensor, passes_per_block: int, temperature: float, generator: torch.Generator | None = None
) -> H.Generation:
    """Fill every [MASK] of templates LongTensor[B, L] in blocks of the model's own length, each with what its cache allows.

    Inside a block in random order when sampling (masks as in training), the most confident first when greedy. AR and block
    diffusion keep keys and values; AR goes on from what precedes the masks, in a pass for each, and its ids end with them.

    ValueError: what `blocks.generate_blocks` refuses, or `quality.write` for AR.

    >>> template = torch.tensor([[4, 5, H.MASK_ID, H.MASK_ID, 6]])
    >>> shape = H.ModelConfig(vocab_size=9, seq_len=8, n_layer=1, n_head=1, n_embd=8)
    >>> kinds = (H.Transformer(replace(shape, causal=True)), blocks.block_diffusion(4)(shape), H.Transformer(shape))
    >>> [tuple(fill(model, template, 4, temperature=0).ids.shape) for model in kinds]
    [(1, 4), (1, 5), (1, 5)]
    """
    options = {"temperature": temperature, "generator": generator}
    if model.config.causal:
        return quality.write(model, template, **options)
    options |= {"remasking": "random" if temperature else "low_confidence", "forbidden": quality.SPECIAL, "mask_id": H.MASK_ID}
    predict = blocks.cached_blocks(model) if isinstance(model, blocks.BlockDiffusion) else model
    length = block_length_of(model)
    return blocks.generate_blocks(predict, template, block_length=length, steps_per_block=passes_per_block, **options)


def window_nats(model: H.Transformer, ids: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Nats and characters of each window of the model's length in ids [n], [N] each: exact for AR and L' = 1, else a bound.

    Where LLaDA's bound masks each window `samples` times, that of shorter blocks masks at least as many blocks of it.

    >>> model = blocks.block_diffusion(2)(H.ModelConfig(vocab_size=9, seq_len=4, n_layer=1, n_head=1, n_embd=8))
    >>> nats, characters = window_nats(model, torch.arange(4, 9), 1)
    >>> (nats / torch.tensor(9).log()).round(decimals=3).tolist(), characters.tolist()  # blank: ln 9 for each character
    ([4.0, 1.0], [4, 1])
    """
    if not isinstance(model, blocks.BlockDiffusion):
        return budget.window_nats(model, ids, samples)
    windows, length = H.windows(ids, model.config.seq_len), model.block_length
    real = windows != H.PAD_ID
    options = {"n_samples": -(-samples * length // windows.shape[1]), "generator": torch.Generator().manual_seed(0)}
    return blocks.block_nelbo(model, windows, H.MASK_ID, block_length=length, maskable=real, **options).cpu(), real.sum(dim=1)


def blanks(windows: Tensor, count: int) -> tuple[Tensor, slice]:
    """`count` real windows [count, L] from all over a text, and where to blank them: BLANK characters near the middle.

    The blank begins where a block begins, for every L' of `blocks.LENGTHS`. So every model sees all that precedes it, and block
    diffusion as much of what follows as it would at any place: L' - BLANK characters, none up to L' = BLANK.

    >>> truth, hole = blanks(torch.arange(4, 1284).view(10, 128), 2)
    >>> tuple(truth.shape), hole
    ((2, 128), slice(64, 68, None))
    """
    longest = max(blocks.LENGTHS)
    start = windows.shape[1] // 2 // longest * longest
    return quality.prompts(windows, count)[0], slice(start, start + BLANK)


def infilled(model: H.Transformer, truth: Tensor, hole: slice) -> list[bool]:
    """For each window LongTensor[B, L], whether the greedily filled `hole`, one character per pass, is the text to the letter.

    >>> model = H.Transformer(H.ModelConfig(vocab_size=9, seq_len=8, n_layer=1, n_head=1, n_embd=8))
    >>> infilled(model, torch.tensor([[5, 6, 4, 4, 7], [5, 6, 4, 8, 7]]), slice(2, 4))  # blank: the first that is allowed
    [True, False]
    """
    truth = truth.to(model.head.weight.device)
    template = truth.clone()
    template[:, hole] = H.MASK_ID
    made = fill(model, template, block_length_of(model), temperature=0).ids
    return (made[:, hole] == truth[:, hole]).all(dim=1).tolist()


def knob_measure(preset: H.Preset, text: str) -> Callable[[H.Job, H.Run], dict]:
    """What `run_jobs` adds to a row: L', nats per character of the whole validation text, blanks filled, and scores of texts.

    The preset says how many windows, the model how long they are. Texts are continued at temperature 1, from the prompts of
    `quality.prompts`; columns such as "judge nats/char (L'/2)" say with how many passes per block (see `passes`; `written` makes
    lines of them). "passes" are those of a whole text.

    >>> text = "to be, or not to be " * 40
    >>> tokenizer = H.CharTokenizer.from_text(text)
    >>> shape = H.ModelConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_embd=8)
    >>> kind = blocks.block_diffusion(4)
    >>> job = blocks.BlockJob(shape, H.TrainConfig(1, 2), *quality.parts(tokenizer.encode(text))[:2], architecture=kind)
    >>> row = knob_measure(H.PRESETS["smoke"], text)(job, H.Run(kind(shape), pd.DataFrame(), {}, None))
    >>> row["block length"], round(row["nats/char"], 2), [row[f"passes ({name})"] for name in passes(4)]  # blank: ln 12
    (4, 2.48, [48, 24, 12])
    """
    tokenizer = H.CharTokenizer.from_text(text)
    train_ids, val_ids, _ = quality.parts(tokenizer.encode(text))
    scores = quality.TextMeasure(tokenizer, text[: len(train_ids)])

    def measure(job: H.Job, run: H.Run) -> dict:
        windows = H.windows(val_ids, run.model.config.seq_len)
        _, template = quality.prompts(windows, preset.texts)
        truth, hole = blanks(windows, preset.blanks)
        nats, interval = H.per_character(*window_nats(run.model, val_ids, preset.nelbo_samples))
        rate, margin = H.share(infilled(run.model, truth, hole))
        length = block_length_of(run.model)
        line = {"block length": length, "nats/char": nats, "95% ±": interval, "infilled": rate, "infilled ±": margin}
        for name, count in passes(length).items():
            made = fill(run.model, template, count, 1.0, torch.Generator().manual_seed(0))
            found = {"passes": made.nfe} | {key: x for key, x in scores(made.ids).items() if key.removesuffix(" ±") in SCORES}
            line |= {f"{key} ({name})": x for key, x in found.items()}
        return line

    return measure


def written(table: pd.DataFrame) -> pd.DataFrame:
    """The texts of the suite's table, a line for each row and number of passes per block.

    >>> columns = {"passes (L')": [9, 9], "passes (L'/2)": [None, 5.0], "known words (L')": [0.9, 0.8], "known words (L'/2)": 0.7}
    >>> table = pd.DataFrame({"row": ["AR", "L' = 2"], "block length": [1, 2], **columns})
    >>> written(table)[["row", "passes per block", "passes", "known words"]].values.tolist()
    [['AR', 1, 9.0, 0.9], ["L' = 2", 2, 9.0, 0.8], ["L' = 2", 1, 5.0, 0.7]]
    """
    parts = []
    for name in SETTINGS:
        columns = {column: column.removesuffix(f" ({name})") for column in table if column.endswith(f" ({name})")}
        some = table[[name in passes(length) for length in table["block length"].astype(int)]]
        part = some[["row", "block length", *columns]].rename(columns=columns)
        part.insert(2, "passes per block", [passes(int(length))[name] for length in some["block length"]])
        parts.append(part)
    return pd.concat([part for part in parts if len(part)]).sort_index(kind="stable").reset_index(drop=True)


def speeds(
    shape: H.ModelConfig,
    settings: Iterable[tuple[int, int]],
    batches: tuple[int, ...] = (1, 32),
    rounds: int = 3,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Characters per second of untrained models that continue a prompt to the end of the window: AR, and block diffusion.

    All keep keys and values; `settings` are pairs (L', passes per block). The fastest of `rounds` counts, the first of which
    warms up as well; rounds go over all settings, so that a slow moment hits none alone, and pass over those that have taken
    half a second in all.

    ValueError: a window that the prompt, `quality.PREFIX` characters, fills.

    >>> shape = H.ModelConfig(vocab_size=9, seq_len=20, n_layer=1, n_head=1, n_embd=8)
    >>> table = speeds(shape, [(2, 1)], batches=(1,), rounds=1)
    >>> list(table.columns), table[["model", "passes"]].values.tolist(), bool((table["tokens/s"] > 0).all())
    (['model', 'block length', 'passes per block', 'batch', 'passes', 'tokens/s'], [['AR', 4], ['block diffusion', 2]], True)
    """
    if shape.seq_len <= quality.PREFIX:
        raise ValueError(f"seq_len={shape.seq_len}: pass a window longer than the prompt, {quality.PREFIX} characters")
    kinds = {("AR", 1, 1): H.Transformer(replace(shape, causal=True))}
    kinds |= {("block diffusion", *setting): blocks.block_diffusion(setting[0])(shape) for setting in settings}
    free, lines = shape.seq_len - quality.PREFIX, []
    for batch in batches:
        template = torch.full((batch, shape.seq_len), H.MASK_ID, device=device)
        template[:, : quality.PREFIX] = len(H.SPECIAL_TOKENS)
        taken, nfe = {kind: [] for kind in kinds}, {}
        for _ in range(rounds):
            for kind, model in kinds.items():
                if sum(taken[kind]) > 0.5:
                    continue
                model.to(device).eval()
                started = time.perf_counter()
                made = fill(model, template, kind[2], 1.0)
                made.ids.cpu()  # waits for a GPU
                taken[kind].append(time.perf_counter() - started)
                nfe[kind] = made.nfe
        for kind, seconds in taken.items():
            line = dict(zip(("model", "block length", "passes per block"), kind))
            lines.append(line | {"batch": batch, "passes": nfe[kind], "tokens/s": round(batch * free / min(seconds))})
    return pd.DataFrame(lines)


def race(table: pd.DataFrame, speed: pd.DataFrame, batch: int = 1) -> pd.DataFrame:
    """Block diffusion's settings beside AR's: texts from the suite's table, characters per second from that of `speeds`.

    "ratio" is that of speeds, AR's being 1. "distance" is how far the texts are from AR's, in half-widths of AR's 95% intervals:
    by how much the judge is worse, or by how much the entropy of characters differs, whichever is more. A setting within AR's
    intervals has at most 1. Settings that were not timed are left out.

    ValueError: no row "AR", or its speed in this batch is unknown.

    >>> columns = {"judge nats/char": [2.0, 2.3], "char entropy": [3.0, 3.1], "judge nats/char ±": 0.1, "char entropy ±": 0.1}
    >>> texts = {f"{key} (L')": x for key, x in columns.items()}
    >>> table = pd.DataFrame({"row": ["AR", "L' = 2"], "block length": [1, 2], **texts})
    >>> speed = pd.DataFrame({"model": ["AR", "block diffusion"], "block length": [1, 2], "passes per block": [1, 2]})
    >>> speed = speed.assign(batch=1, **{"tokens/s": [400, 300]})
    >>> race(table, speed)[["row", "passes per block", "ratio", "distance"]].round(6).values.tolist()
    [["L' = 2", 2, 0.75, 3.0]]
    """
    texts, timed = written(table), speed[speed["batch"] == batch]
    ar, pace = texts[texts["row"] == "AR"], timed.loc[timed["model"] == "AR", "tokens/s"]
    if len(ar) != 1 or len(pace) != 1:
        raise ValueError(f"{len(ar)} rows of AR, {len(pace)} speeds of it at batch {batch}: pass tables with one of each")
    ar = ar.iloc[0]
    times = timed.loc[timed["model"] == "block diffusion", ["block length", "passes per block", "tokens/s"]]
    made = texts[texts["row"].str.startswith("L' =")].merge(times, on=["block length", "passes per block"])
    judge, entropy = ((made[key] - ar[key]) / ar[f"{key} ±"] for key in ("judge nats/char", "char entropy"))
    return made.assign(ratio=made["tokens/s"] / pace.iloc[0], distance=np.maximum(judge, entropy.abs()))


def answer(raced: pd.DataFrame) -> pd.DataFrame:
    """Is there a setting that writes faster than AR at equal judge and diversity? Three lines of `race`, NaN where there is none.

    The fastest of the settings within AR's intervals, which says yes if its ratio is above 1; the nearest of all; and the nearest
    of those that are faster.

    >>> raced = pd.DataFrame({"row": ["a", "b", "c"], "tokens/s": [300, 350, 800], "ratio": [0.75, 0.9, 2.0]})
    >>> answer(raced.assign(distance=[0.9, 1.2, 5.0]))[["setting", "row", "ratio"]].values.tolist()
    [['fastest at equal quality', 'a', 0.75], ['nearest in quality', 'a', 0.75], ['nearest of those faster than AR', 'c', 2.0]]
    """
    picked = {
        "fastest at equal quality": raced[raced["distance"] <= 1].nlargest(1, "tokens/s"),
        "nearest in quality": raced.nsmallest(1, "distance"),
        "nearest of those faster than AR": raced[raced["ratio"] > 1].nsmallest(1, "distance"),
    }
    lines = [{"setting": name, **(part.iloc[0].to_dict() if len(part) else {})} for name, part in picked.items()]
    return pd.DataFrame(lines, columns=["setting", *raced.columns])
