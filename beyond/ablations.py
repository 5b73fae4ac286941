"""LLaDA with one thing changed at a time: where t comes from, the loss, the model, the optimizer."""

from dataclasses import replace

from torch import Tensor

import llada_helpers as H
from beyond import losses
from beyond.variants import LearnedPositions, TimeConditioned

_LITTLE = (H.TrainConfig(60, 16, evals=1), H.TrainConfig(250, 16, evals=5))
SIZES = {  # the notebook's short form and the full one
    "smoke": (H.TrainConfig(10, 16, evals=1, eval_windows=32), H.TrainConfig(20, 16, evals=1, eval_windows=32)),
    "cpu": _LITTLE,
    "cpu_long": _LITTLE,
    "gpu": (H.TrainConfig(60, 16, evals=1, eval_windows=32), H.TrainConfig(500, 64, evals=10)),
}
OURS = f"ours: Eq. 3, t = u^{H.POWER}"


def ablation_jobs(
    preset: H.Preset, config: H.TrainConfig, vocab_size: int, train_ids: Tensor, val_ids: Tensor
) -> dict[str, list[H.Job]]:
    """LLaDA as it is, in the first row, and with one thing changed in each other one; two seeds each.

    The other times are not powers: what they are to be compared with is "t uniform, stratified".

    >>> import torch
    >>> ids = torch.arange(4, 30)
    >>> jobs = ablation_jobs(H.PRESETS["smoke"], SIZES["smoke"][0], 30, ids, ids)
    >>> [(job.model.dropout, job.train.seed) for job in jobs["dropout 0.1"]]
    [(0.1, 0), (0.1, 1)]
    """

    def reshaped(n_layer: int) -> dict:
        """Another depth at about the same number of parameters."""
        unit = 2 * preset.n_head
        return {"n_layer": n_layer, "n_embd": unit * round(preset.n_embd * (preset.n_layer / n_layer) ** 0.5 / unit)}

    deep, wide = reshaped(2 * preset.n_layer), reshaped(max(1, preset.n_layer // 2))
    variants = {
        OURS: {},
        "t uniform, stratified": {"make_batch": losses.uniform_times},
        "one independent t per window": {"make_batch": losses.independent_times},
        "one t per batch (tutorial A)": {"make_batch": losses.one_time_per_batch},
        "t importance-sampled": {"make_batch": losses.importance_times},
        "complementary masks": {"make_batch": losses.complementary_masks},
        "mean over masked (MDLM tutorial)": {"make_batch": losses.masked_mean},
        "mean over masked, / t (exercise)": {"make_batch": losses.masked_mean_over_t},
        "time conditioning": {"architecture": TimeConditioned},
        "causal attention": {"model": {"causal": True}, "make_batch": H.diffusion_batch},
        "learned positions": {"architecture": LearnedPositions},
        "rotary base 10,000": {"model": {"rotary_base": 10_000.0}},
        "attention scale as usual": {"model": {"attention_scale": (preset.n_embd / preset.n_head) ** 0.5}},
        "twice as deep, narrower": {"model": deep},
        "half as deep, wider": {"model": wide},
        "without dropout" if preset.dropout else "dropout 0.1": {"model": {"dropout": 0.0 if preset.dropout else 0.1}},
        "AdamW only": {"train": {"muon_lr": 0.0}},
        "half the batch, twice the steps": {"train": {"batch_size": config.batch_size // 2, "steps": 2 * config.steps}},
    }
    jobs = {}
    for row, change in variants.items():
        shape = replace(preset.model(vocab_size, causal=False), **change.get("model", {}))
        configs = [replace(config, seed=seed, **change.get("train", {})) for seed in (0, 1)]
        others = {key: change[key] for key in ("make_batch", "architecture") if key in change}
        jobs[row] = [H.Job(shape, c, train_ids, val_ids, **others) for c in configs]
    return jobs
