"""Generations as animated pictures."""

import pytest
import torch
from PIL import Image

import llada_helpers as h
from beyond import film

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
