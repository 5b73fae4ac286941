"""Generations as animated pictures."""

import warnings
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

import llada_helpers as h
from beyond import film

CHINESE = "\u5929\u4e0b\u7686\u77e5\u7f8e a\n\t"
TOKENIZER = h.CharTokenizer.from_text("To be & not\nto be")


def written(order: list[int]) -> h.Generation:
    """The same text, committed in this order."""
    order = torch.tensor([order])
    ids = TOKENIZER.encode("To be & not\nto be")[None]
    return h.Generation(ids, order, int(order.max()) + 1)


@pytest.fixture
def films() -> dict[str, h.Generation]:
    """Two characters given; AR writes the other fifteen one by one, LLaDA three per pass."""
    return {"AR": written([-1, -1, *range(15)]), "LLaDA": written([-1, -1, *(i % 5 for i in range(15))])}


def colors(image: Image.Image) -> set[str]:
    return {"#{:02X}{:02X}{:02X}".format(*color) for _, color in image.convert("RGB").getcolors(1_000_000)}


def near(image: Image.Image, color: str) -> bool:
    """Is there an area in a color like this one? A palette of a few colors moves each a little, and letters have grey edges."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    found = image.convert("RGB").getcolors(1_000_000)
    return sum(n for n, color in found if max(abs(c - w) for c, w in zip(color, wanted)) <= 8) > 500


def test_gifs_are_small_and_pause_at_the_end(tmp_path, films):
    images = film.save_gif(tmp_path / "new" / "race.gif", films, TOKENIZER)
    assert len(images) == 16 and len({image.size for image in images}) == 1
    with Image.open(tmp_path / "new" / "race.gif") as gif:
        assert gif.n_frames == 16 and gif.info["loop"] == 0 and gif.info["duration"] >= 500
        gif.seek(15)
        assert gif.info["duration"] >= 3000
    assert (tmp_path / "new" / "race.gif").stat().st_size < 300_000


def test_who_is_done_waits_for_the_others(tmp_path, films):
    images = film.save_gif(tmp_path / "race.gif", films, TOKENIZER)
    half = images[0].width // 2
    right = [image.crop((half, 0, image.width, image.height)).convert("RGB").tobytes() for image in images]
    left = [image.crop((0, 0, half, image.height)).convert("RGB").tobytes() for image in images]
    assert len(set(right[5:])) == 1 and len(set(right[:6])) == 6 and len(set(left)) == 16


def test_masked_new_and_settled_characters_are_told_apart(tmp_path, films):
    images = film.save_gif(tmp_path / "alone.gif", films["LLaDA"], TOKENIZER)
    assert len(images) == 6
    assert [near(image, h.NEW_FACE) for image in images] == [False, *[True] * 5]
    assert [near(image, h.MASK_FACE) for image in images] == [*[True] * 5, False]


def test_columns_have_their_own_colors(films):
    pages = {name: h.pages(made, TOKENIZER) for name, made in films.items()}
    assert {h.AR_COLOR, h.LLADA_COLOR, film.PAPER} <= colors(film.draw_frame(pages, 15, width=40))
    alone = colors(film.draw_frame({"": pages["LLaDA"]}, 5, width=40))
    assert h.LLADA_COLOR in alone and h.AR_COLOR not in alone


def spoken(text: str) -> tuple[h.Generation, h.CharTokenizer]:
    tokenizer = h.CharTokenizer.from_text(text)
    return h.Generation(tokenizer.encode(text)[None], torch.arange(len(text))[None], len(text)), tokenizer


@pytest.fixture
def installed(tmp_path, monkeypatch) -> str:
    """A font of squares, two cells wide, for the letters of CHINESE, beside those that are there."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(c): "square" for c in CHINESE if c > "\x7f"})
    pen = TTGlyphPen(None)
    for i, point in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "square"), (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    font_manager.fontManager.addfont(tmp_path / "squares.ttf")
    film.font.cache_clear()
    yield "Squares"
    film.font.cache_clear()


def test_an_installed_font_that_has_the_text_is_used(tmp_path, installed, monkeypatch):
    """A font for each character, the typewriter where it can; a wide letter keeps to its cell."""
    assert [film.font(30, glyph=c).getname()[0] for c in "a\u5929"] == ["DejaVu Sans Mono", installed]
    made, tokenizer = spoken(CHINESE)
    drawn, text = [], film.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        film.ImageDraw.ImageDraw, "text", lambda *given, **style: drawn.append((given, style)) or text(*given, **style)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = film.save_gif(tmp_path / "a.gif", made, tokenizer, width=20)
    assert len(images) == len(CHINESE) + 1
    widths = [style["font"].getlength(given[2]) for given, style in drawn if given[2] == "\u5929"]
    assert widths and 10 < min(widths) <= max(widths) <= 19


def test_without_a_font_there_is_a_sentence_and_no_boxes(tmp_path, monkeypatch):
    known = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu") or "Last" in font.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    film.font.cache_clear()
    said = []
    monkeypatch.setattr(film.ImageDraw.ImageDraw, "text", lambda self, place, text, **options: said.append(text))
    made, tokenizer = spoken(CHINESE)
    images = film.save_gif(tmp_path / "a.gif", made, tokenizer)
    film.font.cache_clear()
    assert len(images) == 1 and Path(tmp_path / "a.gif").exists()
    (sentence,) = said
    assert "No installed font has 5 of the characters" in sentence and "install one" in sentence
