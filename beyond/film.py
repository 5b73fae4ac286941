"""A generation as an animated picture: what the denoising viewer shows, for pages that run no script."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from pathlib import Path

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import Image, ImageDraw, ImageFont

import llada_helpers as H

PAPER, EDGE, GREY, BAR = "#FFFDF8", "#B8B8B8", "#444444", "#E4E4E4"
ROW, MARGIN, TOP = 42, 36, 112  # pixels: a line of text, the margin, where the text begins
Pages = list[list[list[tuple[str, int]]]]  # what `pages` of the helper makes of a generation


@functools.cache
def font(size: int, weight: str = "normal", glyph: str = "m") -> ImageFont.FreeTypeFont | None:
    """Matplotlib's typewriter, so that films look alike everywhere, or an installed font for a glyph that it lacks, or None.

    >>> font(30).getlength("m") == font(30).getlength("i"), font(30, glyph="\uffff")
    (True, None)
    """
    others = sorted(entry.fname for entry in fontManager.ttflist if "Last Resort" not in entry.name)  # that has boxes for all
    for path in (findfont(FontProperties(family="DejaVu Sans Mono", weight=weight)), *others):
        with contextlib.suppress(OSError, RuntimeError):  # a font that was there once
            if ord(glyph) in get_font(path).get_charmap():
                return ImageFont.truetype(path, size)
    return None


def draw_page(draw: ImageDraw.ImageDraw, left: int, name: str, pages: Pages, k: int, width: int) -> None:
    """Page k of a generation, or its last, `width` characters wide, at `left`: name, numbers, progress, text.

    >>> image = Image.new("RGB", (900, 200), PAPER)
    >>> draw_page(ImageDraw.Draw(image), 36, "LLaDA", [[[("█", 0), ("█", 0)]], [[("b", 1), ("█", 0)]]], k=1, width=40)
    >>> {"#%02X%02X%02X" % color for _, color in image.getcolors(180_000)} >= {PAPER, BAR, H.MASK_FACE, H.NEW_FACE, H.LLADA_COLOR}
    True
    """
    plain, bold, small = font(30), font(30, "bold"), font(24)
    cell, color = round(plain.getlength("m")), H.AR_COLOR if name == "AR" else H.LLADA_COLOR
    k, right = min(k, len(pages) - 1), left + width * cell
    wanted, missing = (sum(state == 0 for line in page for _, state in line) for page in (pages[0], pages[k]))
    written = wanted - missing
    draw.text((left, 22), name or "LLaDA", fill=color, font=bold)
    numbers = f"pass {k} of {len(pages) - 1} · {written} of {wanted} characters"
    draw.text((right, 27), numbers, fill=GREY, font=small, anchor="ra")
    draw.rectangle((left, 70, right, 78), fill=BAR)
    draw.rectangle((left, 70, left + written / max(wanted, 1) * width * cell, 78), fill=color)
    for y, line in enumerate(pages[k]):
        for x, (glyph, state) in enumerate(line):
            x0, y0 = left + x * cell, TOP + y * ROW
            if state < 2:
                draw.rectangle((x0, y0, x0 + cell - 2, y0 + ROW - 6), fill=(H.MASK_FACE, H.NEW_FACE)[state])
            if state == 1:
                draw.line((x0, y0 + ROW - 7, x0 + cell - 2, y0 + ROW - 7), fill="black", width=3)
            if state > 0 and glyph and glyph.isprintable():
                face = font(30, "bold" if state == 1 else "normal", glyph)
                if (length := face.getlength(glyph)) > cell + 1:
                    face = font(int(30 * cell / length), "normal", glyph)
                draw.text((x0, y0), glyph, fill="black", font=face)


def draw_frame(columns: dict[str, Pages], k: int, width: int) -> Image.Image:
    """Frame k, generations side by side: a card of paper that stands out a little on light and on dark pages.

    >>> pages = [[[("█", 0), ("█", 0)]], [[("b", 1), ("█", 0)]]]
    >>> one, two = (draw_frame(columns, k=0, width=20).size for columns in ({"AR": pages}, {"AR": pages, "LLaDA": pages}))
    >>> two[0] == 2 * one[0], two[1] == one[1]
    (True, True)
    """
    column = width * round(font(30).getlength("m")) + 2 * MARGIN
    height = TOP + MARGIN + ROW * max(len(pages[0]) for pages in columns.values())
    image = Image.new("RGB", (len(columns) * column, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, image.width - 1, height - 1), outline=EDGE, width=2)
    for index, (name, pages) in enumerate(columns.items()):
        draw_page(draw, MARGIN + index * column, name, pages, k, width)
    return image


def save_gif(
    path: str | os.PathLike,
    film: H.Generation | dict[str, H.Generation],
    tokenizer: H.CharTokenizer,
    *,
    width: int = 40,
    milliseconds: int = 120,
) -> list[Image.Image]:
    """Write a GIF, a frame per forward pass and a pause at the end, of lines of `width` characters; returns the frames.

    `film`: a generation, or several by name, side by side; who has finished waits for the others. First rows only. Where no
    installed font has some character, it is one frame with a sentence that says so.

    >>> import tempfile, torch
    >>> made = H.Generation(torch.tensor([[4, 5, 6]]), torch.tensor([[-1, 1, 0]]), nfe=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     frames = save_gif(Path(folder, "tiny.gif"), made, H.CharTokenizer.from_text("abc"), width=20)
    ...     len(frames), [path.name for path in Path(folder).iterdir()]
    (3, ['tiny.gif'])
    """
    films = film if isinstance(film, dict) else {"": film}
    columns = {name: H.pages(made, tokenizer, width) for name, made in films.items()}
    letters = {c for pages in columns.values() for page in pages for line in page for glyph, _ in line for c in glyph}
    if lacking := sum(c.isprintable() and font(30, glyph=c) is None for c in letters):
        images = [Image.new("RGB", (1300, 80), PAPER)]
        said = f"No installed font has {lacking} of the characters of this text; install one that does, such as Noto Sans CJK."
        ImageDraw.Draw(images[0]).text((MARGIN, 26), said, fill=GREY, font=font(20))
    else:
        images = [draw_frame(columns, k, width) for k in range(max(map(len, columns.values())))]
    palette = images[len(images) // 2].quantize(48)  # one for all, so that only what changes is stored
    images = [image.quantize(palette=palette, dither=0) for image in images]
    pauses, file = [800, *[milliseconds] * (len(images) - 2), 4000], io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=pauses[-len(images) :], loop=0)
    H.write_atomically(Path(path), file.getvalue())
    return images
