"""The two models alive in one HTML file that asks nobody for anything: `python -m beyond.page` writes play.html.

The weights of the two finished runs of a preset go into the template `page.html` as 8-bit integers, with a float32 scale for each
row of a matrix; the forward pass, the sampler and everything that one can touch are plain JavaScript in that template.

    python -m beyond.page --picture figures/page.png    # writes the page, then takes README's picture of it (needs playwright)
"""

import argparse
import base64
import copy
import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

import llada_helpers as H

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


def quantized(model: H.Transformer) -> H.Transformer:
    """A copy with the very weights that the page computes with: integers * scale."""
    made = copy.deepcopy(model).cpu().float()
    for weight in made.parameters():
        integers, scale = quantize(weight.data)
        weight.data = integers.float() * scale[:, None]
    return made


def packed(model: H.Transformer) -> dict:
    """What the page needs of a model: its sizes, and each matrix as [rows, columns, base64 of int8, base64 of float32 scales]."""
    matrices = {}
    for name, weight in model.state_dict().items():
        arrays = [base64.b64encode(part.numpy().tobytes()).decode() for part in quantize(weight.cpu().float())]
        matrices[name.removesuffix(".weight")] = [*weight.shape, *arrays]
    return {**vars(model.config), "matrices": matrices}


def samples(text: str, longest: int, count: int = 6) -> list[str]:
    """Some speeches of a text, evenly spread over it, none longer than `longest` characters; its beginning, if it has none.

    >>> samples("A:\\nAy.\\n\\nB:\\nNo, no, no, no!\\n\\nC:\\nO!", 12, count=2)
    ['A:\\nAy.', 'C:\\nO!']
    """
    speeches = [part.strip() for part in text.split("\n\n") if part.strip() and len(part.strip()) <= longest]
    speeches = [speech for speech in speeches if len(speech) > longest * 0.8] or speeches or [text[:longest]]
    places = torch.linspace(0, len(speeches) - 1, min(count, len(speeches))).long()
    return [speeches[i] for i in places.tolist()]


def page(models: dict[str, H.Transformer], tokenizer: H.CharTokenizer, text: str) -> str:
    """The page with models "LLaDA" and "AR" and a few speeches of `text`, half of each masked by the forward process."""
    length = min(model.config.seq_len for model in models.values())
    texts, generator = samples(text, length), torch.Generator().manual_seed(0)
    masks = [H.forward_process(tokenizer.encode(t)[None], 0.5, H.MASK_ID, generator=generator)[1][0].int().tolist() for t in texts]
    data = {"characters": [*tokenizer.characters], "length": length, "colors": COLORS, "texts": texts, "masks": masks}
    data["models"] = {name: packed(model) for name, model in models.items()}
    told = json.dumps(data).replace("<", r"\u003c")  # no text of the data can end the script that holds it
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", told)


def finished(preset: H.Preset, ids: Tensor, vocab_size: int, root: Path = Path(".")) -> dict[str, H.Transformer]:
    """The two finished models of a preset. ValueError: one is missing; says how to train it."""
    train_ids, rest = H.split(ids)
    jobs, models = preset.jobs(vocab_size, train_ids, H.split(rest, 0.5)[0]), {}
    for name, job in jobs.items():
        records = [json.loads(path.read_text()) for path in root.glob(f"runs/*-{job.fingerprint()}/run.json")]
        if not any(record["complete"] for record in records):
            command = f"python -m beyond.experiments train --preset {preset.name} --model {name.lower()}"
            raise ValueError(f"{name} of the preset {preset.name} is not trained on this text: run {command}, or the notebook")
        models[name] = H.train(name, job, root=root, quiet=True).model
    return models


def take_picture(path: Path, image: Path) -> None:
    """A screenshot of the page at `path` in the midst of filling; needs Debian's Chromium and the package playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 800, "height": 640}, device_scale_factor=2, color_scheme="light")
        view.goto(f"{path.resolve().as_uri()}#pass=8")
        view.get_by_text(re.compile("^pass 8 of")).wait_for()
        view.wait_for_timeout(1000)
        image.parent.mkdir(parents=True, exist_ok=True)
        view.screenshot(path=image)
        browser.close()


def main(arguments: list[str] | None = None) -> None:
    """Write the page, and say how large it is and what 8 bits cost on the test text."""
    parser = argparse.ArgumentParser(prog="python -m beyond.page", description="Write the two models of a preset into one HTML file.")
    parser.add_argument("--preset", choices=H.PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("play.html"))
    parser.add_argument("--picture", type=Path, metavar="PNG", help="then take a picture of it (needs playwright and Chromium)")
    options, text = parser.parse_args(arguments), H.load_text()
    tokenizer = H.CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    test_text = text[-len(H.split(H.split(ids)[1], 0.5)[1]) :]
    try:
        models = finished(H.PRESETS[options.preset], ids, tokenizer.vocab_size)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    H.write_atomically(options.out, page(models, tokenizer, test_text).encode())
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")
    if options.picture:
        take_picture(options.out, options.picture)


if __name__ == "__main__":
    main()
