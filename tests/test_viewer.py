"""The denoising viewer, the race and the animated pictures, as far as Python can see them; test_browser.py has the rest."""

import html
import json
import re

import ipywidgets
import pytest
import torch
from ipywidgets.embed import embed_data

import llada_helpers as h

TEXT = "To <b>be</b> & not\nto be"
TOKENIZER = h.CharTokenizer.from_text(TEXT)


def predict(ids):
    """A mask predictor without an opinion, different at each position, so that the order is not left to right."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*ids.shape, TOKENIZER.vocab_size, generator=generator)


def generation(rows: int = 1, **options) -> h.Generation:
    template = torch.full((rows, 24), h.MASK_ID)
    template[:, :3] = TOKENIZER.encode("To ")
    options = {"steps": 7, "temperature": 1.0, "forbidden": (0, 2, 3), "generator": torch.Generator().manual_seed(1), **options}
    return h.reverse_process(predict, template, mask_id=h.MASK_ID, **options)


def written_by_hand(text: str = TEXT) -> h.Generation:
    """Two characters given, then one per pass, from the end."""
    order = torch.arange(len(text)).flip(0)
    order[:2] = -1
    return h.Generation(TOKENIZER.encode(text)[None], order[None], len(text) - 2)


def plain(frame: str) -> str:
    return html.unescape(re.sub(r"</?[iu]>", "", re.search("<pre>(.*)</pre>", frame, flags=re.S).group(1)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 100},
        {"remasking": "ancestral", "steps": 30},
        {"threshold": 0.3},
        {"remasking": "entropy", "entropy_bound": 0.5},
        {"revisions": 3},
        {"remasking": "ancestral", "steps": 30, "revisions": 2},
        {"rows": 3, "remasking": "ancestral"},
    ],
    ids=str,
)
def test_a_page_for_each_forward_pass_and_one_before(options):
    made = generation(**options)
    pages = h.pages(made, TOKENIZER)
    assert len(pages) == made.nfe + 1
    assert [page.passes for page in pages] == [(k, made.nfe) for k in range(made.nfe + 1)]
    assert pages[0].step == 0 and pages[0].written == (0, 21) and pages[-1].written == (21, 21)
    assert [page.step for page in pages] == sorted({page.step for page in pages})


def test_autoregressive_writing_has_a_page_for_each_character():
    made = h.generate_ar(predict, TOKENIZER.encode("To")[None], 9, start_id=h.START_ID)
    made.ids[0, 3] = h.MASK_ID  # nothing forbids it here; it is written all the same
    assert [page.written for page in h.pages(made, TOKENIZER)] == [(k, 9) for k in range(10)]


def test_a_page_tells_masked_new_and_settled_characters():
    made = written_by_hand()
    for k, page in enumerate(h.pages(made, TOKENIZER)):
        states = [state for line in page.lines for _, state in line]
        n = len(TEXT)
        expected = [2, 2] + [0] * (n - 2 - k) + [1] * min(k, 1) + [2] * max(k - 1, 0)
        assert states == expected


def test_lines_stay_where_they_are_while_the_text_is_written():
    made = generation(steps=21)
    shapes = {tuple(len(line) for line in page.lines) for page in h.pages(made, TOKENIZER, width=10)}
    assert len(shapes) == 1 and max(next(iter(shapes))) <= 11, "a line of 10 and its line break"


@pytest.mark.parametrize("text", ["", "a", "ab cd", "ab cd ef\n\ngh", "abcdefghijkl", "abcdefgh\nab", "\n", "a " * 9])
def test_no_character_is_lost_between_lines(text):
    tokenizer = h.CharTokenizer.from_text(text + "x")
    ids = tokenizer.encode(text + "x")[None]
    page = h.pages(h.Generation(ids, torch.zeros_like(ids), 1), tokenizer, width=8)[0]
    assert sum(len(line) for line in page.lines) == len(text) + 1


def test_frames_escape_the_text_and_say_the_numbers():
    made = written_by_hand()
    frames = [h.frame_html({"": page}) for page in h.pages(made, TOKENIZER)]
    assert plain(frames[-1]) == TEXT
    assert "<b>" not in frames[-1] and "&amp;" in frames[-1]
    assert "t = 1.00" in frames[0] and "0 of 22 characters revealed" in frames[0] and "0 of 22 forward passes" in frames[0]
    assert "step 11 · t = 0.50 · 11 of 22 characters revealed · 11 of 22 forward passes" in frames[11]
    assert "t = 0.00" in frames[-1]
    assert frames[0].count(h.MASK_GLYPH) == 22 and "<u>" not in frames[0]
    assert all(len(re.findall("<u>(.*?)</u>", frame)) == 1 for frame in frames[1:])


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a&b", "$x$ \\frac", "</pre><img src=x onerror=alert(1)>"])
def test_no_text_becomes_markup(text):
    tokenizer = h.CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)[None]
    made = h.Generation(ids, torch.zeros_like(ids), 1)
    frame = h.frame_html({text: h.pages(made, tokenizer)[-1]})
    assert set(re.findall("<(/?[a-z]+)", frame)) <= {"div", "/div", "b", "/b", "br", "pre", "/pre", "u", "/u"}
    assert plain(frame) == text
    assert h.filmstrip(made, tokenizer, frames=2) is not None


def links(viewer) -> set[tuple]:
    """(source, its property, target, its property) of everything that is linked in the browser."""
    state = embed_data([viewer])["manager_state"]["state"]
    made = [model["state"] for model in state.values() if model["model_name"] == "LinkModel"]
    return {tuple(part.removeprefix("IPY_MODEL_") for part in (*link["source"], *link["target"])) for link in made}


def test_viewer_is_linked_in_the_browser():
    """The slider, play, the speed and the choice move without a kernel, for each generation."""
    films = {"first": generation(), "second": generation(steps=3)}
    viewer = h.DenoisingViewer(films, TOKENIZER)
    found = links(viewer)
    assert (viewer.choice.model_id, "index", viewer.panels.model_id, "selected_index") in found
    assert viewer.choice.options == ("first", "second") and viewer.choice.index == viewer.panels.selected_index == 0
    for panel, made in zip(viewer.panels.children, films.values()):
        (play, slider), stack = panel.children[0].children, panel.children[1]
        assert len(stack.children) == made.nfe + 1 and slider.max == play.max == made.nfe and stack.selected_index == 0
        assert (play.model_id, "value", slider.model_id, "value") in found
        assert (slider.model_id, "value", stack.model_id, "selected_index") in found
        assert (viewer.speed.model_id, "value", play.model_id, "interval") in found


def test_a_race_shows_both_side_by_side_and_waits_for_the_slower():
    films = {"AR": written_by_hand(), "LLaDA": generation(steps=3)}
    viewer = h.DenoisingViewer({"race": films}, TOKENIZER)
    frames = [child.value for child in viewer.panels.children[0].children[1].children]
    assert len(frames) == 23
    assert all(frame.count("<pre>") == 2 and "<b>AR</b>" in frame and "<b>LLaDA</b>" in frame for frame in frames)
    assert "pass 10 of 22 · 10 of 22 characters" in frames[10] and "pass 3 of 3 · 21 of 21 characters" in frames[10]


def test_without_a_way_to_generate_there_is_no_button():
    viewer = h.DenoisingViewer({"a": generation()}, TOKENIZER)
    assert "generate again" not in json.dumps([str(w) for w in every_child(viewer)])


def every_child(widget) -> list:
    return [widget, *(found for child in getattr(widget, "children", ()) for found in every_child(child))]


def test_generate_again_replaces_what_is_shown_and_closes_the_rest():
    calls = []

    def generate(prompt, seed):
        calls.append((prompt, seed))
        return {f"{prompt} {seed}": generation(generator=torch.Generator().manual_seed(seed))}

    viewer = h.DenoisingViewer({"a": generation(), "b": generation(steps=3)}, TOKENIZER, generate)
    viewer.choice.index = viewer.panels.selected_index = 1
    old, old_links = every_child(viewer.panels)[1:], viewer.links
    viewer.prompt.value = "be"
    viewer.again.click()
    viewer.again.click()
    assert calls == [("be", 1), ("be", 2)] and viewer.choice.options == ("be 2",) and viewer.panels.selected_index == 0
    assert all(widget.comm is None for widget in [*old, *old_links]), "what is replaced must not stay in the saved notebook"
    assert viewer.message.value == "" and not viewer.again.disabled


@pytest.mark.parametrize("prompt", ["Zz", "<script>", "\\"])
def test_what_goes_wrong_is_shown_as_text(prompt):
    tokenizer = h.CharTokenizer.from_text("To be")
    viewer = h.DenoisingViewer({"a": generation()}, TOKENIZER, lambda prompt, seed: {"a": tokenizer.encode(prompt)})
    before = viewer.panels.children
    viewer.prompt.value = prompt
    viewer.again.click()
    unknown = str(sorted(set(prompt)))
    assert html.unescape(viewer.message.value).startswith(f"ValueError: characters not in the vocabulary: {unknown};")
    assert "<" not in viewer.message.value
    assert viewer.panels.children == before and not viewer.again.disabled


def test_the_older_ipywidgets_of_colab_will_do(monkeypatch):
    """Version 7 has no Stack."""
    monkeypatch.delattr(ipywidgets, "Stack")
    viewer = h.DenoisingViewer({"a": generation(), "b": generation()}, TOKENIZER)
    assert isinstance(viewer.panels, ipywidgets.Tab) and viewer.panels.selected_index == 0


def test_four_generations_are_stored_sparingly():
    """Four of 128 characters and 65 frames, and a race of 129, well below the notebook's 3 MB."""
    ids = torch.full((1, 128), TOKENIZER.encode("o").item())
    spread = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    film = h.Generation(ids, spread[None] // 2, 64)
    race = {"AR": h.Generation(ids, torch.arange(128)[None], 128), "LLaDA": film}
    viewer = h.DenoisingViewer({**{str(i): film for i in range(4)}, "race": race}, TOKENIZER)
    wanted = {widget.model_id for widget in every_child(viewer)}
    state = {key: value for key, value in embed_data([viewer])["manager_state"]["state"].items() if key in wanted}
    assert len(state) > 4 * 65 + 129 and len(json.dumps(state)) < 700_000


def test_gifs_are_small_and_pause_at_the_end(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(h, "FIGURES", tmp_path)
    films = {"AR": written_by_hand(), "LLaDA": generation(steps=21)}
    images = h.save_gif("race", films, TOKENIZER)
    assert len(images) == 23 and len({image.size for image in images}) == 1
    with Image.open(tmp_path / "race.gif") as gif:
        assert gif.n_frames == 23 and gif.info["loop"] == 0
        gif.seek(22)
        assert gif.info["duration"] >= 3000
    assert (tmp_path / "race.gif").stat().st_size < 300_000
