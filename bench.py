"""Speed and memory, measured side by side in one run: `python bench.py`, or `--quick` for a minute's look.

Prints one table and writes it as JSON. Ratios compare rows of one run on one machine; absolute numbers do not travel. Each
figure is the median of several rounds. The models are untrained, so that the fixed decoders can be timed anywhere; how many
passes the adaptive ones need depends on a trained model: if the preset's LLaDA has been trained, it is used for them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import llada_helpers as h

PROMPT = 16


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


def seconds(function, rounds: int) -> float:
    """Median wall time of function() after one warm-up call."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def matmul_peak(device, size: int = 1024) -> float:
    """Floating-point operations per second of a dense float32 product: what this machine can do at best."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 * 20 / seconds(lambda: [a @ b for _ in range(20)], 5)


def training_rows(preset: h.Preset, vocab_size: int, device, rounds: int) -> list[dict]:
    """A training step, eager and with compiled blocks, as tokens/s and as a share of the matrix-product peak."""
    rows = []
    for compiled in (False, True):
        model = h.Transformer(preset.model(vocab_size, causal=False)).to(device)
        config, length = preset.llada, preset.seq_len
        optimizers, accelerator = h.make_optimizers(model, config), h.Accelerator(cpu=device.type == "cpu")
        if compiled:
            for block in model.blocks:
                block.compile()
        batch = h.diffusion_batch(torch.randint(4, vocab_size, (config.batch_size, length)), torch.Generator().manual_seed(0))
        tokens = config.batch_size * length
        took = seconds(lambda: h.optimizer_step(accelerator, model, optimizers, batch, config), rounds)  # noqa: B023
        matrices = sum(p.numel() for p in model.blocks.parameters()) + model.head.weight.numel()
        operations = tokens * (6 * matrices + 12 * preset.n_layer * length * preset.n_embd)
        name = f"training step, {'compiled' if compiled else 'eager'}"
        rows.append({"row": name, "batch": config.batch_size, "tokens/s": tokens / took, "of peak": operations / took})
    return rows


def trained(preset: h.Preset) -> h.Transformer | None:
    found = sorted(Path("checkpoints").glob(f"{preset.name}-llada-*/best/model.safetensors"), key=lambda p: p.stat().st_mtime)
    return h.load_model(found[-1].parent) if found else None


def decoding_rows(preset: h.Preset, vocab_size: int, device, rounds: int, length: int, batches: list[int]) -> list[dict]:
    """AR with and without cache, and LLaDA with each decoder, at one length."""
    shapes = {"n_layer": preset.n_layer, "n_head": preset.n_head, "n_embd": preset.n_embd}
    llada = h.Transformer(h.ModelConfig(vocab_size, length, **shapes)).to(device).eval()
    ar = h.Transformer(h.ModelConfig(vocab_size, length, causal=True, **shapes)).to(device).eval()
    free = length - PROMPT
    blocks = next(b for b in (32, 16, 8, 4, 2, 1) if free % b == 0)
    fixed = {
        "LLaDA low_confidence, one token a pass": {"steps": free},
        "LLaDA random, one token a pass": {"steps": free, "remasking": "random"},
        "LLaDA entropy, one token a pass": {"steps": free, "remasking": "entropy"},
        "LLaDA low_confidence, four tokens a pass": {"steps": free // 4},
        f"LLaDA blocks of {blocks}": {"steps": free, "block_length": blocks},
        f"LLaDA blocks of {blocks}, cached": {"steps": free, "block_length": blocks, "cache": True},
    }
    adaptive = {
        "LLaDA threshold 0.9, trained": {"steps": free, "threshold": 0.9},
        "LLaDA entropy bound 0.5, trained": {"steps": free, "remasking": "entropy", "entropy_bound": 0.5},
    }
    decoders = {"AR, cached": lambda p: h.generate_ar(ar, p, free, start_id=h.START_ID)}
    decoders["AR, no cache"] = lambda p: h.generate_ar(lambda ids: ar(ids), p, free, start_id=h.START_ID)

    def llada_decoder(model, options):
        def decode(prompt):
            template = torch.nn.functional.pad(prompt, (0, free), value=h.MASK_ID)
            return h.reverse_process(model, template, mask_id=h.MASK_ID, temperature=1.0, **options)

        return decode

    decoders |= {name: llada_decoder(llada, options) for name, options in fixed.items()}
    best = trained(preset)
    if best is not None and best.config.seq_len == length and best.config.vocab_size == vocab_size:
        decoders |= {name: llada_decoder(best.to(device), options) for name, options in adaptive.items()}
    rows = []
    for batch in batches:
        prompt = torch.randint(4, vocab_size, (batch, PROMPT), device=device)
        for name, decode in tqdm(decoders.items(), desc=f"length {length}, batch {batch}"):
            reset_peak()
            passes = []
            took = seconds(lambda: passes.append(decode(prompt).nfe), rounds)  # noqa: B023
            rows.append({"row": f"{name}, length {length}", "batch": batch, "passes": statistics.median(passes)})
            rows[-1] |= {"tokens/s": batch * free / took, "peak MiB": peak_mib()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, batch 1 and 8: a minute's look")
    parser.add_argument("--preset", choices=h.PRESETS, default=None, help="sizes of the models; default: as the notebook chooses")
    parser.add_argument("--json", default="bench.json", help="where to write the table (default: %(default)s)")
    arguments = parser.parse_args()
    preset = h.PRESETS[arguments.preset] if arguments.preset else h.choose_preset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab_size = h.CharTokenizer.from_text(h.load_text()).vocab_size
    rounds, batches = (1, [1, 8]) if arguments.quick else (3, [1, 32])
    peak = matmul_peak(device)
    rows = training_rows(preset, vocab_size, device, 3 if arguments.quick else 10)
    for row in rows:
        row["of peak"] = row["of peak"] / peak
    for length in (preset.seq_len,) if arguments.quick else (preset.seq_len, 2 * preset.seq_len):
        rows += decoding_rows(preset, vocab_size, device, rounds, length, batches)
    table = pd.DataFrame(rows)
    training = table["row"].str.startswith("training")
    reference = table["row"].str.replace(r"^.*, length", "LLaDA low_confidence, one token a pass, length", regex=True)
    reference = reference.where(~training, "training step, eager")
    speeds = table.set_index(["row", "batch"])["tokens/s"]
    table["ratio"] = [s / speeds[r, b] for s, r, b in zip(table["tokens/s"], reference, table["batch"])]
    print(f"{h.describe_machine()['device']}: float32 matrix product {peak / 1e9:.0f} GFLOP/s; preset {preset.name}")
    print("ratio: to the eager step, or to one token a pass at the same length and batch")
    print(table.round(3).to_string(index=False))
    record = {"machine": h.describe_machine(), "preset": preset.name, "matmul_flops": peak, "rows": table.to_dict("records")}
    h.write_atomically(Path(arguments.json), json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
