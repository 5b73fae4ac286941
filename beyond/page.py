"""The two models alive in one HTML file that asks nobody for anything: `python -m beyond.page` writes play.html.

The weights of two finished runs go into the template `page.html` as 8-bit integers with a float32 scale for each row of a matrix.
The forward pass, the sampler and all that one can touch are plain JavaScript in that template.
"""

import argparse
import base64
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

import llada_helpers as H
from beyond import experiments, quality

TEMPLATE = Path(__file__).with_name("page.html")
COLORS = {"mask": H.MASK_FACE, "new": H.NEW_FACE, "LLaDA": H.LLADA_COLOR, "AR": H.AR_COLOR}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [R, C] as int8 [R, C] and a float32 scale per row [R], so that weight is nearly integers * scale[:, None].

    >>> integers, scale = quantize(torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]]))
    >>> integers.tolist(), [round(s, 5) for s in scale.tolist()]
    ([[64, -127, 32], [0, 0, 0]], [0.00787, 0.0])
    """
    scale = weight.abs().amax(dim=1) / 127
    return (weight / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def packed(model: H.Transformer) -> dict:
    """What the page needs of a model: its sizes, and each matrix as [rows, columns, base64 of int8, base64 of float32 scales]."""
    matrices = {}
    for name, weight in model.state_dict().items():
        arrays = [base64.b64encode(part.numpy().tobytes()).decode() for part in quantize(weight)]
        matrices[name.removesuffix(".weight")] = [*weight.shape, *arrays]
    return vars(model.config) | {"matrices": matrices}


def samples(text: str, longest: int, count: int = 6) -> list[str]:
    """Some speeches of a text, evenly spread over it, none longer than `longest` characters; its beginning, if it has none.

    >>> samples("A:\\nAy.\\n\\nB:\\nNo, no, no, no!\\n\\nC:\\nO!", 12, count=2)
    ['A:\\nAy.', 'C:\\nO!']
    """
    speeches = [s.strip() for s in text.split("\n\n") if 0 < len(s.strip()) <= longest] or [text[:longest]]
    speeches = [s for s in speeches if len(s) > longest * 0.8] or speeches
    return [speeches[i] for i in torch.linspace(0, len(speeches) - 1, min(count, len(speeches))).long()]


def page(models: dict[str, H.Transformer], tokenizer: H.CharTokenizer, text: str) -> str:
    """The page with models "LLaDA" and "AR" and a few speeches of `text`, half of each masked by the forward process."""
    length = min(model.config.seq_len for model in models.values())
    texts, generator, masks = samples(text, length), torch.Generator().manual_seed(0), []
    for sample in texts:
        ids, maskable = tokenizer.encode(sample)[None], torch.tensor([[c != "\n" for c in sample]])
        masks.append(H.forward_process(ids, 0.5, H.MASK_ID, maskable, generator)[1][0].int().tolist())
    data = {"characters": [*tokenizer.characters], "length": length, "texts": texts, "masks": masks, "colors": COLORS}
    data = json.dumps(data | {"models": {name: packed(model) for name, model in models.items()}})
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data.replace("<", r"\u003c"))  # no text ends the script


def finished(jobs: dict[str, H.Job], preset: str, root: Path = Path(".")) -> dict[str, H.Transformer]:
    """The models of finished runs under `root`, by name. ValueError: one is missing; says how to train it."""
    models = {}
    for name, job in jobs.items():
        run = experiments.complete_run(job, root)
        best = root / "checkpoints" / (run.name if run else "") / "best"
        if not (best / "model.safetensors").exists():
            command = f"python -m beyond.experiments train --preset {preset} --model {name.lower()}"
            raise ValueError(f"{name} is not trained on this text with the preset {preset}: run the notebook, or {command}")
        models[name] = H.load_model(best)
    return models


def take_picture(path: Path, image: Path) -> None:
    """A screenshot of the page at `path` in the midst of filling; needs Chromium and the package playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 800, "height": 700}, device_scale_factor=2)
        view.goto(f"{path.resolve().as_uri()}#pass=8")
        view.locator("#LLaDA-says", has_text="pass 8 of").wait_for(timeout=120_000)
        below = view.locator("#about").bounding_box()["y"] - 40
        view.screenshot(path=image, animations="disabled", full_page=True, clip={"x": 0, "y": 0, "width": 800, "height": below})


def main(arguments: list[str] | None = None) -> None:
    """Write the page of a preset's finished runs, and README's picture of it if asked for."""
    parser = argparse.ArgumentParser("python -m beyond.page", description="Write a preset's two models into one HTML file.")
    parser.add_argument("--preset", choices=H.PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("play.html"))
    parser.add_argument("--picture", type=Path, metavar="PNG", help="and take a picture of it (needs playwright and Chromium)")
    options, text = parser.parse_args(arguments), H.load_text()
    tokenizer = H.CharTokenizer.from_text(text)
    train_ids, val_ids, test_ids = quality.parts(tokenizer.encode(text))
    try:
        models = finished(H.PRESETS[options.preset].jobs(tokenizer.vocab_size, train_ids, val_ids), options.preset)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    H.write_atomically(options.out, page(models, tokenizer, text[-len(test_ids) :]).encode())
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")
    if options.picture:
        take_picture(options.out, options.picture)


if __name__ == "__main__":
    main()
