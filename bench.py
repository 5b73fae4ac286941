"""Speed and memory, measured side by side in one run: `python bench.py`, or `--quick` for a minute's look.

Prints one table and writes it as JSON. Ratios compare rows of one run on one machine; absolute numbers do not travel. Each
figure is the median of several rounds. If the preset's models have been trained, they are used, and AR judges what each decoder
writes (nats per character, read in windows of its own length); else untrained ones are, and adaptive decoders mean little. At
twice the trained length the same weights are used (rotary positions have no table), which is worse text but a fair comparison.
The sampler is timed beside the loop that LLaDA's authors publish, with a Transformer and with a predictor that costs nothing.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import llada_helpers as h
from beyond.decoding import cached, entropy_bound, threshold
from beyond.quality import SPECIAL

PROMPT = 32
LONG = 3.0  # seconds: warm-up is then lost in the measurement


def reset_peak() -> None:
    """Forget the peak of resident memory so far (Linux) or of GPU memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float | None:
    """Peak of GPU memory, or of this process's resident memory, since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def once(function: Callable) -> float:
    """Wall time of function()."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def seconds(function: Callable, rounds: int) -> float:
    """Median wall time of function(), not counting the first call; that one counts alone if it took longer than LONG."""
    first = once(function)
    return first if first > LONG else statistics.median(once(function) for _ in range(rounds))


def matmul_peak(device, size: int = 1024) -> float:
    """Floating-point operations per second of a dense float32 product: what this machine can do at best."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 * 20 / seconds(lambda: [a @ b for _ in range(20)], 5)


def training_step(accelerator: h.Accelerator, network: torch.nn.Module, optimizer, batch: tuple[torch.Tensor, ...]) -> None:
    """What training does with a batch."""
    accelerator.backward(h.weighted_nll(network, *batch))
    accelerator.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def training_rows(preset: h.Preset, vocab_size: int, device, rounds: int) -> list[dict]:
    """A training step, eager and with compiled blocks, as tokens/s and as a share of the matrix-product peak."""
    rows = []
    for compiled in (False, True):
        config, length, accelerator = preset.llada, preset.seq_len, h.Accelerator(cpu=device.type == "cpu")
        model = h.Transformer(preset.model(vocab_size, causal=False)).to(device)
        network, optimizer = accelerator.prepare(model, h.make_optimizer(model, config))
        model.padding = False  # as training knows it
        for block in model.blocks if compiled else ():
            block.compile()
        sequences = torch.randint(4, vocab_size, (config.batch_size, length))
        batch = [x.to(device) for x in h.diffusion_batch(sequences, torch.Generator().manual_seed(0))]
        tokens = config.batch_size * length
        training_step(accelerator, network, optimizer, batch)  # compiles
        took = seconds(lambda: training_step(accelerator, network, optimizer, batch), rounds)  # noqa: B023
        matrices = sum(p.numel() for p in model.blocks.parameters()) + model.head.weight.numel()
        operations = tokens * (6 * matrices + 12 * preset.n_layer * length * preset.n_embd)
        name = f"training step, {'compiled' if compiled else 'eager'}"
        row = {"row": name, "batch": config.batch_size, "tokens/s": tokens / took, "ratio to": "training step, eager"}
        rows.append(row | {"of peak": operations / took})
    return rows


def load(preset: h.Preset, vocab_size: int, causal: bool, length: int, device) -> tuple[h.Transformer, bool]:
    """A model for sequences of `length`, and whether it is the preset's latest trained one."""
    config = replace(preset.model(vocab_size, causal), seq_len=length, dropout=0.0)
    model = h.Transformer(config).to(device).eval()
    files = Path("checkpoints").glob(f"{preset.name}-{'ar' if causal else 'llada'}-*/best/model.safetensors")
    for file in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True):
        best = h.load_model(file.parent)
        if best.config.vocab_size == vocab_size:
            model.load_state_dict(best.state_dict())
            return model, True
    return model, False


def authors_loop(model: h.MaskPredictor, template: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy low-confidence decoding with the operations of the loop that LLaDA's authors publish (ML-GSAI/LLaDA, generate.py).

    Written anew for one block: every position, masked or not, gets Gumbel noise (to the power of the temperature, 0) and
    probabilities in float64, and every row is ranked by itself. LongTensor[B, L].
    """
    ids = template.clone()
    share, rest = (ids == h.MASK_ID).sum(dim=1) // steps, (ids == h.MASK_ID).sum(dim=1) % steps
    counts = share[:, None] + (torch.arange(steps, device=ids.device) < rest[:, None])  # [B, steps]
    for i in range(steps):
        masked, logits = ids == h.MASK_ID, model(ids)
        noise = -torch.rand_like(logits, dtype=torch.float64).log()
        proposed = (logits.double().exp() / noise**0.0).argmax(dim=-1)
        sure = logits.double().softmax(dim=-1).gather(-1, proposed[..., None])[..., 0]
        sure = torch.where(masked, sure, -math.inf)
        commit = torch.zeros_like(masked)
        for row in range(len(ids)):
            commit[row, sure[row].topk(int(counts[row, i])).indices] = True
        ids[commit] = torch.where(masked, proposed, ids)[commit]
    return ids


def sampler_rows(preset: h.Preset, vocab_size: int, device, rounds: int, batches: list[int]) -> list[dict]:
    """Ours and the authors' loop, one token a pass, in turn; the best time of each."""
    rows, length = [], preset.seq_len
    model = h.Transformer(preset.model(vocab_size, causal=False)).to(device).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    table = torch.randn(length, vocab_size, device=device)
    table[:, h.MASK_ID] = -math.inf  # [MASK] would never leave the authors' loop
    predictors = {
        "a Transformer": (model, batches),
        "a trivial predictor": (lambda ids: table.expand(len(ids), -1, -1), batches[-1:]),
    }
    for name, (predict, sizes) in predictors.items():
        for batch in sizes:
            template = torch.full((batch, length), h.MASK_ID, device=device)
            template[:, :PROMPT] = torch.randint(4, vocab_size, (batch, PROMPT), device=device)
            options = {"mask_id": h.MASK_ID, "steps": length - PROMPT}
            loops = {
                "the authors' loop": torch.no_grad()(lambda: authors_loop(predict, template, length - PROMPT)),  # noqa: B023
                "reverse_process": lambda: h.reverse_process(predict, template, **options),  # noqa: B023
            }
            times = [[once(loop) for loop in loops.values()] for _ in range(rounds)]
            best = dict(zip(loops, map(min, zip(*times))))
            for loop, took in best.items():
                row = {"row": f"{loop}, {name}, length {length}", "batch": batch, "passes": length - PROMPT}
                row["ratio to"] = f"the authors' loop, {name}, length {length}"
                rows.append(row | {"tokens/s": batch * (length - PROMPT) / took})
    return rows


def decoders(llada: h.Transformer, ar: h.Transformer, free: int) -> dict:
    """Name -> function of a prompt [B, P]."""
    block = next(b for b in (32, 16, 8, 4, 2, 1) if free % b == 0)
    blocks = {"steps": free, "remasking": "entropy", "block_length": block}
    settings = {
        "LLaDA low_confidence, one token a pass": {"steps": free},
        **{f"LLaDA {name}, one token a pass": {"steps": free, "remasking": name} for name in ("random", "entropy", "margin")},
        "LLaDA entropy, four tokens a pass": {"steps": free // 4, "remasking": "entropy"},
        **{f"LLaDA threshold {p}": {"steps": 1, "remasking": threshold(p)} for p in (0.2, 0.3, 0.5, 0.9)},
        **{f"LLaDA entropy bound {nats}": {"steps": 1, "remasking": entropy_bound(nats)} for nats in (0.5, 2.0)},
        f"LLaDA entropy, blocks of {block}": blocks,
        f"LLaDA entropy, blocks of {block}, cached": blocks,
    }

    def write(prompt: torch.Tensor, name: str) -> h.Generation:
        template = torch.nn.functional.pad(prompt, (0, free), value=h.MASK_ID)
        predict = cached(llada, template, h.MASK_ID, block) if name.endswith("cached") else llada
        options = {"temperature": 1.0, "mask_id": h.MASK_ID, "forbidden": SPECIAL, "generator": torch.Generator().manual_seed(0)}
        return h.reverse_process(predict, template, **options, **settings[name])

    def continue_(model: h.MaskPredictor, prompt: torch.Tensor) -> h.Generation:
        generator = torch.Generator().manual_seed(0)
        return h.generate_ar(model, prompt, free, start_id=h.START_ID, forbidden=(h.MASK_ID, *SPECIAL), generator=generator)

    named = {
        "AR, cached": lambda prompt: continue_(ar, prompt),
        "AR, no cache": lambda prompt: continue_(lambda ids: ar(ids), prompt),
    }
    return named | {name: lambda prompt, name=name: write(prompt, name) for name in settings}


def quality(ar: h.Transformer, written: torch.Tensor, tokenizer, window: int) -> dict[str, float]:
    """The AR model's judgement and two measures of diversity, with 95% intervals over groups of texts."""
    scores = []
    for group in written.chunk(h.GROUPS):
        pieces = group.unfold(1, min(written.shape[1], window), window // 2).flatten(0, 1)
        metrics = h.text_metrics([tokenizer.decode(text) for text in group], [], set())
        nats = h.ar_nll(ar, pieces, h.START_ID).mean().item() / pieces.shape[1]
        scores.append({"judge": nats, "char entropy": metrics["char entropy"], "distinct-3": metrics["distinct-3"]})
    return h.grouped(scores)


def decoding_rows(preset: h.Preset, tokenizer, text, device, rounds: int, length: int, batches: list[int]) -> list[dict]:
    """AR with and without cache, and LLaDA with each decoder, continuing prompts from the test text."""
    free, rows = length - PROMPT, []
    llada, llada_trained = load(preset, tokenizer.vocab_size, False, length, device)
    ar, ar_trained = load(preset, tokenizer.vocab_size, True, length, device)
    _, rest = h.split(tokenizer.encode(text))
    _, test_ids = h.split(rest, 0.5)
    prompts = h.windows(test_ids, PROMPT, pad_id=h.MASK_ID)[:-1]
    chosen = decoders(llada, ar, free)
    if length > preset.seq_len:  # what the cache is about; the rest is told by the model's own length
        chosen = {name: decode for name, decode in chosen.items() if "cache" in name or "entropy, " in name}
    for batch in batches:
        prompt = prompts[torch.linspace(0, len(prompts) - 1, batch).long()].to(device)
        for name, decode in tqdm(chosen.items(), desc=f"length {length}, batch {batch}"):
            reset_peak()
            made = []
            took = seconds(lambda: made.append(decode(prompt)), rounds)  # noqa: B023
            passes = (made[0].order.max(dim=1).values + 1).float().mean().item()
            row = {"row": f"{name}, length {length}", "batch": batch, "passes": passes, "tokens/s": batch * free / took}
            row |= {"peak MiB": peak_mib(), "ratio to": f"LLaDA entropy, one token a pass, length {length}"}
            if llada_trained and ar_trained and batch >= 2 * h.GROUPS:
                row |= quality(ar, made[0].ids[:, PROMPT:], tokenizer, preset.seq_len)
            rows.append(row)
    return rows


def worker_step(preset: h.Preset) -> None:
    """One of several processes under torch.distributed.run: the first prints the seconds of a training step on a shared batch."""
    accelerator = h.Accelerator(cpu=True)
    model = h.Transformer(preset.model(69, causal=False))
    network, optimizer = accelerator.prepare(model, h.make_optimizer(model, preset.llada))
    rows = torch.randint(4, 69, (preset.llada.batch_size, preset.seq_len), generator=torch.Generator().manual_seed(0))
    (batch,) = h.micro_batches(h.diffusion_batch(rows, torch.Generator().manual_seed(0)), accelerator)
    took = seconds(lambda: training_step(accelerator, network, optimizer, batch), 15)
    if accelerator.is_main_process:
        print(json.dumps({"seconds": took, "parameters": model.n_parameters}))


# What the projection assumes, beside what is measured: the dense bfloat16 peak of an NVIDIA H100, a share of it that trainings
# reach, the links inside a node and between nodes, and LLaDA 8B as published (Nie et al. 2025, appendix B).
GPU_PEAK, REACHED = 989e12, 0.4
NODE, IN_NODE, BETWEEN = 8, 450e9, 50e9  # GPUs, bytes/s for each GPU
LLADA_8B = {"parameters": 8.02e9, "layers": 32, "width": 4096, "length": 4096, "tokens": 2.3e12, "step tokens": 1280 * 4096}
PLANS = {1: "does not fit", 8: "FSDP, full shard", 64: "FSDP, hybrid: shard in a node, replicate over nodes"}
PLANS[512] = "tensor parallel in a node, FSDP hybrid over nodes"


def scaling_rows(preset: h.Preset) -> list[dict]:
    """One and two processes measured here, one thread each; then LLaDA 8B projected, in operations, seconds and bytes."""
    rows, base = [], None
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*launch, __file__, "--worker", "--preset", preset.name]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.strip().splitlines()[-1])
        base = base or result["seconds"]
        tokens = preset.llada.batch_size * preset.seq_len
        row = {"row": f"measured: {preset.name} preset, {processes} CPU process{'es' * (processes > 1)}", "devices": processes}
        row |= {"tokens/s": round(tokens / result["seconds"]), "step, s": result["seconds"]}
        row |= {"sent per device and step, MB": round(2 * (processes - 1) / processes * 4 * result["parameters"] / 1e6, 1)}
        rows.append(row | {"how": f"data parallel (gloo), {base / result['seconds'] / processes:.0%} efficient"})
    big = LLADA_8B
    operations = 6 * big["parameters"] + 12 * big["layers"] * big["width"] * big["length"]  # per token
    for devices, how in PLANS.items():
        step = big["step tokens"] * operations / (devices * GPU_PEAK * REACHED)
        sent = 3 * 2 * big["parameters"] * (devices - 1) / devices  # two gathers of bfloat16 weights, one scatter of gradients
        sent /= NODE if "tensor" in how else 1
        link = IN_NODE if devices <= NODE else BETWEEN
        row = {"row": f"projected: LLaDA 8B, {devices} H100", "devices": devices, "tokens/s": round(big["step tokens"] / step)}
        row |= {"step, s": round(step, 2), "sent per device and step, MB": round(sent / 1e6), "sending, s": round(sent / link, 2)}
        row["days for 2.3T tokens"] = round(big["tokens"] / big["step tokens"] * step / 86_400)
        rows.append(row | {"GPU hours": round(big["tokens"] * operations / GPU_PEAK / REACHED / 3600), "how": how})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, batch 1 and 8: a minute's look")
    parser.add_argument("--preset", choices=h.PRESETS, default=None, help="sizes of the models; default: as the notebook chooses")
    parser.add_argument("--json", default="figures/bench.json", help="where to write the table (default: %(default)s)")
    parser.add_argument("--scaling", action="store_true", help="two processes instead, and figures/tables/scaling.csv")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    preset = h.PRESETS[arguments.preset] if arguments.preset else h.choose_preset()
    if arguments.worker:
        return worker_step(preset)
    text = h.load_text()
    if arguments.scaling:
        print(h.Results(preset, text).table(pd.DataFrame(scaling_rows(preset)), "scaling").to_string(index=False))
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = h.CharTokenizer.from_text(text)
    rounds, batches = (1, [1, 8]) if arguments.quick else (3, [1, 32])
    peak = matmul_peak(device)
    rows = training_rows(preset, tokenizer.vocab_size, device, 3 if arguments.quick else 10)
    for row in rows:
        row["of peak"] = row["of peak"] / peak
    rows += sampler_rows(preset, tokenizer.vocab_size, device, rounds + 2, batches)
    for length in (preset.seq_len,) if arguments.quick else (preset.seq_len, 2 * preset.seq_len):
        rows += decoding_rows(preset, tokenizer, text, device, rounds, length, batches)
    table = pd.DataFrame(rows)
    speeds = table.set_index(["row", "batch"])["tokens/s"]
    table["ratio"] = [s / speeds[r, b] for s, r, b in zip(table["tokens/s"], table["ratio to"], table["batch"])]
    print(f"{h.describe_machine()['device']}: float32 matrix product {peak / 1e9:.0f} GFLOP/s; preset {preset.name}")
    print("ratio of tokens/s: to the eager step, to the authors' loop, or to one token a pass at the same length and batch")
    print(table.drop(columns="ratio to").round(3).to_string(index=False))
    record = {"machine": h.describe_machine(), "preset": preset.name, "matmul_flops": peak}
    record["rows"] = json.loads(table.to_json(orient="records"))
    h.write_atomically(Path(arguments.json), json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
