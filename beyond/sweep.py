"""Decoders at equal diversity: each is swept over temperatures, and compared where its texts are as varied as asked.

At equal temperature a decoder that quietly lowers the diversity of its texts looks better to any judge of plausibility. So
judge and diversity are measured at several temperatures, and the judge is read off at one diversity, that of real text for
instance:

    made = sweep(models, measure, windows, SIZES["cpu"][1])
    at_equal(made, "distinct-3", made.loc[made["decoder"] == REAL, "distinct-3"].mean())

The entropy of characters changes little with the temperature, for AR hardly more than its own noise, which makes the interval of
whatever is read off there wide; the share of distinct trigrams is the sharper measure. It depends on the length of what is
counted, which is the same for all.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import llada_helpers as H
from beyond import quality, spacing

REAL, DISTANCE, NUCLEUS = "real text", 8, 0.9
SPACED = f"spaced by {DISTANCE}"
STRATEGIES = {"random": "random", "bit-reversed": spacing.bit_reversed, SPACED: spacing.spaced(DISTANCE), "entropy": "entropy"}
SETTING = ["decoder", "passes", "top-p", "temperature"]
METRICS = ["judge nats/char", "known words", "distinct-3", "char entropy"]


@dataclass(frozen=True)
class Sweep:
    """Sizes of a sweep: texts for each setting, a multiple of H.GROUPS; numbers of passes besides one by one; temperatures.

    >>> Sweep(16, passes=(4,), temperatures=(0.8, 1.2)).texts // H.GROUPS  # texts in a group
    2
    """

    texts: int
    passes: tuple[int, ...]
    temperatures: tuple[float, ...]


_CPU = (Sweep(16, (8, 16), (0.7, 1.1)), Sweep(128, (8, 16, 32), (0.7, 0.9, 1.1)))
SIZES = {  # the notebook's short form and the full one
    "smoke": (Sweep(8, (4,), (0.7, 1.1)), Sweep(16, (4,), (0.7, 1.1))),
    "cpu": _CPU,
    "cpu_long": _CPU,
    "gpu": (Sweep(16, (8, 16), (0.7, 1.1)), Sweep(256, (8, 16, 32, 64), (0.6, 0.75, 0.9, 1.05, 1.2))),
}


class Setting(NamedTuple):
    """How texts are written: by "AR" or in LLaDA by the name of a strategy; passes, top-p, temperature.

    >>> Setting("AR", 112, 1.0, 0.8)._asdict()["passes"]
    112
    """

    decoder: str
    passes: int
    top_p: float
    temperature: float


def settings(sizes: Sweep, masks: int) -> list[Setting]:
    """All settings of a sweep over templates of so many masks.

    One by one there are AR and two orders: spaced is the entropy order then, and bit-reversed is an order like a random one.
    The nucleus is tried with AR and with the spaced decoder.

    >>> tried = settings(Sweep(8, passes=(4,), temperatures=(1.0,)), masks=112)
    >>> [(setting.decoder, setting.passes) for setting in tried if setting.top_p < 1]
    [('spaced by 8', 4), ('AR', 112)]
    """
    decoders = [(name, passes, 1.0) for name in STRATEGIES for passes in sizes.passes]
    decoders += [(SPACED, passes, NUCLEUS) for passes in sizes.passes]
    decoders += [(name, masks, 1.0) for name in ("random", "entropy", "AR")] + [("AR", masks, NUCLEUS)]
    return [Setting(*decoder, temperature) for decoder in decoders for temperature in sizes.temperatures]


def write(models: dict, setting: Setting, template: Tensor, generator: torch.Generator | None = None) -> H.Generation:
    """The masks at the end of each row of template LongTensor[B, L], filled as the setting says.

    >>> shape = {"vocab_size": 9, "seq_len": 6, "n_layer": 1, "n_head": 1, "n_embd": 8}
    >>> models = {name: H.Transformer(H.ModelConfig(causal=name == "AR", **shape)) for name in ("LLaDA", "AR")}
    >>> template = torch.tensor([[4, 5, *[H.MASK_ID] * 4]])
    >>> [write(models, Setting(name, 4, 1.0, 0.8), template).nfe for name in ("AR", "entropy")]
    [4, 4]
    """
    model, strategy = models["AR" if setting.decoder == "AR" else "LLaDA"], STRATEGIES.get(setting.decoder)
    options = {"temperature": setting.temperature, "top_p": setting.top_p, "generator": generator}
    return quality.write(model, template, steps=setting.passes, remasking=strategy, **options)


def sweep(models: dict, measure: quality.Measure, windows: Tensor, sizes: Sweep) -> pd.DataFrame:
    """Continuations of the same real beginnings by every setting, scored group by group of texts; real text comes first.

    Args:
        models: "LLaDA" and "AR".
        windows: real text, LongTensor[N, L], of which `quality.prompts` takes beginnings.

    Returns:
        a row for each setting and group: SETTING, "nfe", "group", METRICS. All settings share the prompts of a group.
    """
    device = next(models["LLaDA"].parameters()).device
    truth, template = (x.to(device) for x in quality.prompts(windows, sizes.texts))
    rows = [{"decoder": REAL, "passes": 0, "nfe": 0, "group": i, **score} for i, score in enumerate(measure.by_group(truth))]
    for number, setting in enumerate(settings(sizes, template.shape[1] - quality.PREFIX)):
        made = write(models, setting, template, torch.Generator().manual_seed(number))
        scores = enumerate(measure.by_group(made.ids))
        rows += [{**dict(zip(SETTING, setting)), "nfe": made.nfe, "group": group, **score} for group, score in scores]
    return pd.DataFrame(rows)[[*SETTING, "nfe", "group", *METRICS]]


def _named(setting: dict) -> dict:
    """The setting under a name for its row."""
    parts = [setting["decoder"]]
    parts += [f"{setting['passes']} passes"] if setting["passes"] else []
    parts += [f"{key} {setting[key]:g}" for key in ("top-p", "temperature") if setting.get(key, 1) != 1 and setting["passes"]]
    return {"row": ", ".join(parts), **setting}


def averaged(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting of `sweep`'s table: the mean of each metric and, as "... ±", its 95% interval over groups.

    >>> line = {"decoder": "AR", "passes": 4, "top-p": 1.0, "temperature": 0.8, "nfe": 4, **dict.fromkeys(METRICS, 1.0)}
    >>> averaged(pd.DataFrame([{**line, "known words": share} for share in (0.4, 0.6)]))[["row", "known words"]].values.tolist()
    [['AR, 4 passes, temperature 0.8', 0.5]]
    """
    rows = []
    for setting, part in table.groupby([*SETTING, "nfe"], sort=False, dropna=False):
        scores = H.grouped(part[METRICS].to_dict("records"))
        rows.append(_named(dict(zip([*SETTING, "nfe"], setting))) | scores)
    return pd.DataFrame(rows)


def _read_off(part: pd.DataFrame, metric: str, value: float) -> pd.Series:
    """Temperature and the other metrics where one decoder's mean of `metric` is `value`; NaN but for a single such place."""
    curve = part.groupby("temperature")[METRICS].mean().reset_index()
    below = (curve[metric] < value).to_numpy()
    crossed = np.flatnonzero(below[1:] != below[:-1])
    low, high = (curve.iloc[crossed[0] + i] if len(crossed) == 1 else curve.iloc[0] * np.nan for i in (0, 1))
    return (low + (value - low[metric]) / (high[metric] - low[metric]) * (high - low)).drop(metric)


def at_equal(table: pd.DataFrame, metric: str, value: float) -> pd.DataFrame:
    """Every decoder at the temperature at which its texts have this "char entropy", in nats, or this share of "distinct-3".

    Between the two neighbouring temperatures whose means have `value` between them everything is interpolated linearly,
    "temperature" too. The interval is the jackknife's (Tukey 1958): each group of texts is left out in turn and all is read off
    anew, so that the noise of both axes, their correlation, and the prompts that all temperatures share are in it. Value and
    interval are NaN where the sweep does not reach `value`, or does so more than once, or not with every group left out.

    Args:
        table: of `sweep`; real text, which has no temperature, is passed over.
        metric: one of METRICS, which rises or falls with the temperature.

    Returns:
        a row for each decoder, number of passes and top-p: "row", these three, and what is read off, each with "... ±".

    Raises:
        ValueError: another metric.

    >>> line = {"decoder": "AR", "passes": 4, "top-p": 1.0, "known words": 0.5, "distinct-3": 0.5}
    >>> curve = [{"temperature": t, "char entropy": 2 + t, "judge nats/char": 4 * t} for t in (0.5, 1.0)]
    >>> table = pd.DataFrame([{**line, **point, "group": group} for point in curve for group in range(H.GROUPS)])
    >>> at_equal(table, "char entropy", 2.75)[["row", "temperature", "judge nats/char", "judge nats/char ±"]].values.tolist()
    [['AR, 4 passes', 0.75, 3.0, 0.0]]
    >>> at_equal(table, "char entropy", 3.1)["judge nats/char"].tolist()
    [nan]
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: pass one of {', '.join(METRICS)}")
    rows = []
    for setting, part in table.dropna(subset="temperature").groupby(SETTING[:3], sort=False):
        whole, groups = _read_off(part, metric, value), part["group"].unique()
        less = pd.DataFrame([_read_off(part[part["group"] != group], metric, value) for group in groups])
        pseudo = whole - (len(groups) - 1) * (less - whole)  # their spread is that of the value
        scores = H.grouped(pseudo.to_dict("records")) | whole.to_dict()
        rows.append(
            _named(dict(zip(SETTING, setting))) | (dict.fromkeys(scores, np.nan) if less.isna().any(axis=None) else scores)
        )
    return pd.DataFrame(rows)


def mark(jobs: dict[str, H.Job], sizes: Sweep) -> str:
    """What a sweep's numbers were made by: the fingerprints of the trainings and one of the settings, joined.

    >>> ids = torch.arange(4, 10).repeat(10)
    >>> job = H.Job(H.ModelConfig(10, 24, n_layer=1, n_head=1, n_embd=8), H.TrainConfig(steps=2, batch_size=2), ids, ids)
    >>> [len(part) for part in mark({"LLaDA": job, "AR": job}, Sweep(8, (4,), (1.0,))).split("+")]
    [12, 12, 12]
    """
    tried = [(sizes.texts, setting) for job in jobs.values() for setting in settings(sizes, job.model.seq_len - quality.PREFIX)]
    digest = hashlib.sha256(repr(tried).encode()).hexdigest()[:12]
    return "+".join([*(job.fingerprint() for job in jobs.values()), digest])
