"""Pages, frames, the denoising viewer and the film strip, as far as Python can see them; test_browser.py has the rest."""

import html
import json
import re

import ipywidgets
import pytest
import torch
from ipywidgets.embed import embed_data

import llada_helpers as h
from beyond import decoding as d

TEXT = "To <b>be</b> & not\nto be"
TOKENIZER = h.CharTokenizer.from_text(TEXT)
MASKED, NEW = 0, 1


def predict(ids):
    """A mask predictor without an opinion, different at each position, so that the order is not left to right."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*ids.shape, TOKENIZER.vocab_size, generator=generator)


def generation(rows: int = 1, revisions: int = 0, **options) -> h.Generation:
    template = torch.full((rows, 24), h.MASK_ID)
    template[:, :3] = TOKENIZER.encode("To ")
    sampled = {"temperature": 1.0, "forbidden": (0, 2, 3), "generator": torch.Generator().manual_seed(1)}
    made = h.reverse_process(predict, template, mask_id=h.MASK_ID, **{"steps": 7, **sampled, **options})
    return d.revise(predict, made, mask_id=h.MASK_ID, passes=revisions, **sampled) if revisions else made


def written_by_hand(text: str = TEXT) -> h.Generation:
    """Two characters given, then one per pass, from the end."""
    order = torch.arange(len(text)).flip(0)
    order[:2] = -1
    return h.Generation(TOKENIZER.encode(text)[None], order[None], len(text) - 2)


def states(page: list) -> list[int]:
    return [state for line in page for _, state in line]


def plain(frame: str) -> str:
    return html.unescape(re.sub(r"</?[iu]>", "", re.search("<pre>(.*)</pre>", frame, flags=re.S).group(1)))


def numbers(frame: str) -> list[str]:
    """Passes, passes in all, characters, characters in all, t."""
    return re.search(r"pass (\d+) of (\d+) · (\d+) of (\d+) characters · t = (\d\.\d\d)<", frame).groups()


# --- pages ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 100},
        {"remasking": "ancestral", "steps": 30},
        {"remasking": d.threshold(0.3), "steps": 1},
        {"remasking": d.entropy_bound(0.5), "steps": 1},
        {"remasking": d.threshold(0.3), "steps": 3, "block_length": 7},
        {"revisions": 3},
        {"remasking": "ancestral", "steps": 30, "revisions": 2},
        {"rows": 3, "remasking": "ancestral"},
    ],
    ids=lambda options: ", ".join(f"{k}={getattr(v, '__qualname__', v)}" for k, v in options.items()) or "plain",
)
def test_a_page_for_each_forward_pass_and_one_before(options):
    made = generation(**options)
    pages, frames = h.pages(made, TOKENIZER), h.frames(made, TOKENIZER)
    assert len(pages) == len(frames) == made.nfe + 1
    said = [numbers(frame) for frame in frames]
    assert [(k, n) for k, n, *_ in said] == [(str(k), str(made.nfe)) for k in range(made.nfe + 1)]
    assert said[0][2:] == ("0", "21", "1.00") and said[-1][2:] == ("21", "21", "0.00")
    assert [int(written) for _, _, written, _, _ in said] == sorted(int(written) for _, _, written, _, _ in said)
    for page, (_, _, written, _, t) in zip(pages, said):
        assert states(page).count(MASKED) == 21 - int(written) and f"{1 - int(written) / 21:.2f}" == t


def test_revisions_are_pages_of_their_own():
    """What a revision changed is new on its page, and settled on the next."""
    made = generation(revisions=3, remasking="random")
    pages = h.pages(made, TOKENIZER)
    for step, page in zip(made.steps()[-3:], pages[-3:]):
        changed = made.state_after(step)[0] != made.state_after(step - 1)[0]
        assert [state == NEW for state in states(page)] == changed.tolist()


def test_autoregressive_writing_has_a_page_for_each_character():
    options = {"start_id": h.START_ID, "forbidden": (0, 1, 2, 3), "generator": torch.Generator().manual_seed(0)}
    made = h.generate_ar(predict, TOKENIZER.encode("To")[None], 9, **options)
    assert [numbers(frame)[2:4] for frame in h.frames(made, TOKENIZER)] == [(str(k), "9") for k in range(10)]


def test_a_page_tells_masked_new_and_settled_characters():
    for k, page in enumerate(h.pages(written_by_hand(), TOKENIZER)):
        n = len(TEXT)
        assert states(page) == [2, 2] + [0] * (n - 2 - k) + [1] * min(k, 1) + [2] * max(k - 1, 0)


def test_lines_stay_where_they_are_while_the_text_is_written():
    made = generation(steps=21)
    shapes = {tuple(len(line) for line in page) for page in h.pages(made, TOKENIZER, width=10)}
    assert len(shapes) == 1 and max(next(iter(shapes))) <= 11, "a line of 10 and its line break"


@pytest.mark.parametrize("text", ["", "a", "ab cd", "ab cd ef\n\ngh", "abcdefghijkl", "abcdefgh\nab", "\n", "a " * 9])
def test_no_character_is_lost_between_lines(text):
    tokenizer = h.CharTokenizer.from_text(text + "x")
    ids = tokenizer.encode(text + "x")[None]
    page = h.pages(h.Generation(ids, torch.zeros_like(ids), 1), tokenizer, width=8)[0]
    assert sum(len(line) for line in page) == len(text) + 1


def test_a_line_break_is_visible_when_new():
    """Later it is just the end of its line; where the finished text goes on, it stays visible."""
    made = written_by_hand("to be\nbe")
    shown = ["".join(glyph for line in page for glyph, _ in line) for page in h.pages(made, TOKENIZER)]
    assert shown[-4:] == ["to███↵be", "to██ebe", "to█bebe", "to bebe"]


# --- frames ---


def test_frames_escape_the_text_and_say_the_numbers():
    frames = h.frames(written_by_hand(), TOKENIZER)
    assert plain(frames[-1]) == TEXT
    assert "<b>" not in frames[-1] and "&amp;" in frames[-1]
    assert "pass 0 of 22 · 0 of 22 characters · t = 1.00" in frames[0]
    assert "pass 11 of 22 · 11 of 22 characters · t = 0.50" in frames[11]
    assert "pass 22 of 22 · 22 of 22 characters · t = 0.00" in frames[-1]
    assert frames[0].count(h.MASK_GLYPH) == 22 and "<u>" not in frames[0]
    assert all(len(re.findall("<u>(.*?)</u>", frame)) == 1 for frame in frames[1:])


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a&b", "$x$ \\frac", "</pre><img src=x onerror=alert(1)>"])
def test_no_text_becomes_markup(text):
    tokenizer = h.CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)[None]
    made = h.Generation(ids, torch.arange(len(text))[None], len(text))
    for frame in h.frames(made, tokenizer):
        assert set(re.findall("<(/?[a-z]+)", frame)) <= {"div", "/div", "pre", "/pre", "u", "/u", "i", "/i"}
    assert plain(frame) == text


def test_special_tokens_are_shown_as_dots():
    """They have no character, yet something was committed there."""
    made = h.Generation(torch.tensor([[h.START_ID, 5, h.END_ID, h.PAD_ID]]), torch.tensor([[-1, 0, 1, 2]]), 3)
    *_, frame = h.frames(made, h.CharTokenizer.from_text("ab"))
    assert plain(frame) == "·b··"


# --- the viewer ---


def linked(viewer) -> set[tuple]:
    """(source, its property, target, its property) of everything that is linked in the browser."""
    state = embed_data([viewer])["manager_state"]["state"]
    made = [model["state"] for model in state.values() if model["model_name"] == "LinkModel"]
    return {tuple(part.removeprefix("IPY_MODEL_") for part in (*link["source"], *link["target"])) for link in made}


def every_child(widget) -> list:
    return [widget, *(found for child in getattr(widget, "children", ()) for found in every_child(child))]


def test_viewer_is_linked_in_the_browser():
    """The slider, play, the speed and the choice move without a kernel, for each generation."""
    films = {"first": h.frames(generation(), TOKENIZER), "second": h.frames(generation(steps=3), TOKENIZER)}
    viewer = h.DenoisingViewer(films)
    found = linked(viewer)
    assert (viewer.choice.model_id, "index", viewer.panels.model_id, "selected_index") in found
    assert viewer.choice.options == ("first", "second") and viewer.choice.index == viewer.panels.selected_index == 0
    for panel, film in zip(viewer.panels.children, films.values()):
        (play, slider), stack = panel.children[0].children, panel.children[1]
        assert [child.value for child in stack.children] == film
        assert slider.max == play.max == len(film) - 1 and stack.selected_index == slider.value == 0
        assert (play.model_id, "value", slider.model_id, "value") in found
        assert (slider.model_id, "value", stack.model_id, "selected_index") in found
        assert (viewer.speed.model_id, "value", play.model_id, "interval") in found
        assert play.interval == viewer.speed.value


def test_films_may_be_any_frames():
    """A race is the frames of two, side by side; who is done first waits for the other."""
    left, right = h.frames(written_by_hand(), TOKENIZER), h.frames(generation(steps=3), TOKENIZER)
    race = [a + b for a, b in zip(left, right + right[-1:] * (len(left) - len(right)))]
    viewer = h.DenoisingViewer({"race": race})
    shown = [child.value for child in viewer.panels.children[0].children[1].children]
    assert len(shown) == 23 and all(frame.count("<pre>") == 2 for frame in shown)
    assert "pass 10 of 22 · 10 of 22 characters" in shown[10] and "pass 3 of 3 · 21 of 21 characters" in shown[10]


def test_the_older_ipywidgets_of_colab_will_do(monkeypatch):
    """Version 7 has no Stack."""
    monkeypatch.delattr(ipywidgets, "Stack")
    viewer = h.DenoisingViewer({"a": ["one", "two"], "b": ["one"]})
    assert isinstance(viewer.panels, ipywidgets.Tab) and viewer.panels.selected_index == 0
    assert all(isinstance(panel.children[1], ipywidgets.Tab) for panel in viewer.panels.children)


def test_four_generations_are_stored_sparingly():
    """Four of 128 characters and 65 frames, and a race of 129, well below the notebook's 3 MB."""
    ids = torch.full((1, 128), TOKENIZER.encode("o").item())
    spread = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    film = h.frames(h.Generation(ids, spread[None] // 2, 64), TOKENIZER)
    alone = h.frames(h.Generation(ids, torch.arange(128)[None], 128), TOKENIZER)
    race = [a + b for a, b in zip(alone, film + film[-1:] * 64)]
    viewer = h.DenoisingViewer({**{str(i): film for i in range(4)}, "race": race})
    wanted = {widget.model_id for widget in every_child(viewer)}
    state = {key: value for key, value in embed_data([viewer])["manager_state"]["state"].items() if key in wanted}
    assert len(state) > 4 * 65 + 129 and len(json.dumps(state)) < 1_000_000


# --- the film strip ---


@pytest.mark.parametrize("count", [1, 2, 3, 8, 23, 99])
def test_the_strip_begins_with_the_template_and_ends_with_the_text(count):
    """As many frames as are asked for, or all there are, whole and in their order; the style comes with them."""
    film = h.frames(written_by_hand(), TOKENIZER)
    page = h.filmstrip(film, count).data
    shown = re.findall(r'<div class="llada">.*?</div>', page, flags=re.S)
    assert len(shown) == min(count, 23) and set(shown) <= set(film) and shown == sorted(shown, key=film.index)
    assert shown[0] == film[0] and (count == 1 or shown[-1] == film[-1])
    assert page.startswith(h.FRAME_STYLE)


@pytest.mark.parametrize("text", ["$x$ <b>", "\u5929\u4e0b\u7686\u77e5", "\U0001f600\t\u2028"])
def test_the_strip_is_text_whatever_the_text_is(text):
    """The reader's browser has the fonts; what is no markup stays none."""
    tokenizer = h.CharTokenizer.from_text(text)
    made = h.Generation(tokenizer.encode(text)[None], torch.arange(len(text))[None], len(text))
    *_, last = re.findall("<pre>(.*?)</pre>", h.filmstrip(h.frames(made, tokenizer)).data, flags=re.S)
    assert html.unescape(re.sub("</?u>", "", last)) == text
