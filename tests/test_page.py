"""The page with the models in it: what it computes, held against PyTorch, and everything that one can do, in Chromium."""

import contextlib
import importlib.util
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_browser import ARGUMENTS, CHROMIUM

import llada_helpers as h
from beyond import decoding, page

LETTERS = "\n !$&',-.3:;=?<>/_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKENIZER = h.CharTokenizer(LETTERS)
HOSTILE = "FIRST CITIZEN:\n</script><script>document.title = 'gone'</script><!-- & <b>not bold</b>, a speech that ends with $&, "
HOSTILE += "as it must."
SPEECHES = f"{HOSTILE}\n\nSECOND CITIZEN:\n" + "We are accounted poor citizens, the patricians good. " * 2
SPECIAL = (h.PAD_ID, h.START_ID, h.END_ID)
UNKNOWN = "~"  # stands for a hidden character in the page, since "_" is in the vocabulary


def noisy(causal: bool, **sizes) -> h.Transformer:
    """A model of the preset's sizes whose every weight matters: what zeros would hide, such as a wrong order of heads, shows."""
    torch.manual_seed(int(causal))
    model = h.Transformer(replace(h.PRESETS["cpu"].model(TOKENIZER.vocab_size, causal), **sizes))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.3 if name == "head.weight" else weight.shape[1] ** -0.5)
    return model.eval()


def quantized(model: h.Transformer) -> h.Transformer:
    """A copy with the very weights that the page computes with: integers * scale."""
    parts = {name: page.quantize(weight) for name, weight in model.state_dict().items()}
    made = h.Transformer(model.config).eval()
    made.load_state_dict({name: integers.float() * scale[:, None] for name, (integers, scale) in parts.items()})
    return made


MODELS = {"LLaDA": noisy(False), "AR": noisy(True)}
SAME = {name: quantized(model) for name, model in MODELS.items()}
HTML = page.page(MODELS, TOKENIZER, SPEECHES)
SMALL = {name: quantized(noisy(name == "AR", n_layer=2, n_head=2, n_embd=32)) for name in MODELS}  # quicker to watch


# --- the export ---


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(rows):
    weight = torch.tensor(rows)
    integers, scale = page.quantize(weight)
    assert integers.dtype == torch.int8 and (scale - weight.abs().amax(dim=1) / 127).abs().max() < 1e-3
    assert ((integers.float() * scale[:, None] - weight).abs() <= 0.501 * scale[:, None] + 1e-30).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two small models after a few seconds of training: where they were left, their jobs, their text."""
    root, text = tmp_path_factory.mktemp("trained"), "What is written once, and once more, is soon learned by heart.\n\n" * 160
    short = h.TrainConfig(120, 8, evals=1, eval_windows=4)
    preset, tokenizer = replace(h.PRESETS["smoke"], llada=short, ar=short), h.CharTokenizer.from_text(text)
    train_ids, rest = h.split(tokenizer.encode(text))
    jobs = preset.jobs(tokenizer.vocab_size, train_ids, h.split(rest, 0.5)[0])
    for name, job in jobs.items():
        h.train(name, job, root=root, quiet=True)
    return root, preset, jobs, text


def test_eight_bits_cost_less_than_five_thousandths_of_a_nat(trained):
    root, preset, jobs, text = trained
    windows = h.windows(h.CharTokenizer.from_text(text).encode(text[-2000:]), preset.seq_len)
    for name, model in page.finished(jobs, "smoke", root).items():
        nats = []
        for one in (model, quantized(model)):
            seeded = torch.Generator().manual_seed(0)
            told = h.ar_nll(one, windows, 2) if name == "AR" else h.nelbo(one, windows, 1, n_samples=4, generator=seeded)
            nats.append(float(told.sum() / 2000))
        assert nats[0] < 2.5, "it learned something"
        assert nats[1] == pytest.approx(nats[0], abs=0.005) and nats[0] != nats[1]


def test_a_missing_or_interrupted_run_is_refused_with_the_command_that_trains_it(trained, tmp_path, monkeypatch, capsys):
    root, _, jobs, text = trained
    with pytest.raises(ValueError, match=r"python -m beyond\.experiments train --preset smoke --model llada"):
        page.finished(jobs, "smoke", tmp_path)
    (record,) = root.glob("runs/AR-*/run.json")
    complete = record.read_text()
    record.write_text(complete.replace('"complete": true', '"complete": false'))
    try:
        with pytest.raises(ValueError, match="--model ar"):
            page.finished(jobs, "smoke", root)
    finally:
        record.write_text(complete)
    (tmp_path / "own.txt").write_text(text)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "own.txt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        page.main(["--preset", "smoke"])
    assert "--model llada" in capsys.readouterr().err and not (tmp_path / "play.html").exists()


def test_the_command_writes_the_page_of_the_finished_runs(trained, tmp_path, monkeypatch, capsys):
    root, preset, jobs, text = trained
    (tmp_path / "own.txt").write_text(text)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "own.txt"))
    monkeypatch.setitem(h.PRESETS, "smoke", preset)
    monkeypatch.chdir(root)
    page.main(["--preset", "smoke", "--out", str(tmp_path / "small.html")])
    told = data_of((tmp_path / "small.html").read_text())
    assert told["length"] == 64 and told["characters"] == sorted(set(text))
    models = {name: page.packed(model) for name, model in page.finished(jobs, "smoke", root).items()}
    assert told["models"] == json.loads(json.dumps(models))
    assert "MB" in capsys.readouterr().out


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])


def test_one_file_small_enough_that_names_no_other(tmp_path):
    assert len(HTML.encode()) < 3_500_000
    assert HTML.count("</script>") == 3, "data, engine, page: nothing in the data ends its script"
    assert re.findall(r"(?i)https?:|src=|@import|\burl\(|fetch\(|XMLHttp", HTML) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write", HTML) == []
    assert data_of(HTML)["texts"][0] == HOSTILE
    assert page.TEMPLATE.read_text().count("\n") <= 450 and Path(page.__file__).read_text().count("\n") <= 120


def test_speeches_are_chosen_from_all_over_the_text_and_its_beginning_if_there_are_none():
    text = "\n\n".join(f"WHO:\n{i} " + "x" * (i % 30) for i in range(200))
    chosen = page.samples(text, 30)
    assert len(chosen) == 6 and all(24 < len(one) <= 30 and one in text for one in chosen)
    assert text.index(chosen[0]) < len(text) / 8 and text.index(chosen[-1]) > len(text) * 7 / 8
    assert page.samples("x" * 100, 30) == ["x" * 30]


# --- in Chromium ---


@pytest.fixture(scope="module")
def browser():
    needed = {"chromium": CHROMIUM, "playwright": importlib.util.find_spec("playwright")}
    lacking = [what for what, there in needed.items() if not there]
    if lacking and os.environ.get("LLADA_BROWSER") == "1":
        pytest.fail(f"LLADA_BROWSER=1, but missing: {lacking}")
    if lacking:
        pytest.skip(f"missing: {lacking}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine(browser, tmp_path_factory):
    """A page for the tests that only ask its engine, which keeps nothing from one question to the next."""
    path = tmp_path_factory.mktemp("page") / "play.html"
    path.write_text(HTML)
    view = browser.new_page()
    view.goto(path.as_uri())
    yield view
    view.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("small") / "play.html"
    path.write_text(page.page(SMALL, TOKENIZER, SPEECHES))
    return path.as_uri()


@pytest.fixture
def view(browser, address):
    """Opens the page of small models with what its address is to say; a request, an error or a warning fails the test."""
    view, wrong = browser.new_page(viewport={"width": 800, "height": 900}), []
    view.on("pageerror", lambda error: wrong.append(str(error)))
    view.on("console", lambda message: wrong.append(message.text))
    view.on("request", lambda request: request.url.startswith(("file:", "blob:")) or wrong.append(request.url))
    view.set_default_timeout(20_000)

    def opened(**state):
        view.goto("about:blank")
        view.goto(f"{address}#{urlencode(state)}")
        view.locator("#odds li").first.wait_for()
        return view

    yield opened
    view.close()
    assert wrong == []


def shown(view, model: str = "LLaDA") -> str:
    """The text as a reader sees it, hidden characters as blocks."""
    script = "all => all.map(c => c.classList.contains('blank') ? '█' : c.textContent).join('')"
    return view.locator(f"#{model} span").evaluate_all(script)


def template(seed: int, length: int = 128) -> torch.Tensor:
    """Some text with some of it hidden, LongTensor[1, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, TOKENIZER.vocab_size, (1, length), generator=generator)
    return h.forward_process(ids, 0.2 + 0.08 * seed, h.MASK_ID, generator=generator)[0]


@pytest.mark.parametrize("name, tolerance", [("LLaDA", 0.002), ("AR", 0.002)])
def test_logits_are_those_of_pytorch_with_the_same_weights(engine, name, tolerance):
    most = 0.0
    for seed, length in enumerate((1, 2, 3, 5, 64, 127, 128)):
        ids = template(seed, length)
        script = "async job => (await engines[0]({ job: 'logits', ...job })).logits.map(l => [...l])"
        told = engine.evaluate(script, {"model": name, "ids": ids[0].tolist()})
        with torch.no_grad():
            wanted = SAME[name](ids)[0]
        assert torch.tensor(told).shape == wanted.shape and wanted.std() > 1
        most = max(most, float((torch.tensor(told) - wanted).abs().max()))
    assert most < tolerance
    assert (SAME[name](ids) - MODELS[name](ids)).abs().max() > 10 * tolerance, "or it could not tell the weights apart"


def film(page, ids: torch.Tensor, model: str = "LLaDA", **options) -> list[dict]:
    """What the engine tells, pass by pass."""
    script = "async job => { const told = []; await engines[0](job, news => told.push(news)); return told; }"
    return page.evaluate(script, {"job": model, "ids": ids[0].tolist(), "temperature": 0, "seed": 1, **options})


ORDERS = {"low-confidence": "low_confidence", "entropy": "entropy"}
ORDERS |= {"bit-reversed": decoding.bit_reversed, "spaced": decoding.spaced(8)}
CASES = [("low-confidence", seed) for seed in range(10)] + [(order, seed) for order in list(ORDERS)[1:] for seed in (1, 8)]


@pytest.mark.parametrize("order, seed", CASES)
def test_greedy_decoding_writes_what_reverse_process_writes(engine, order, seed):
    length = (128, 20, 37, 50, 81, 28, 66, 24, 40, 127)[seed]
    ids, steps = template(seed, length), (1, 4, 7, 12, 5, 11, 9, 99, 8, 2)[seed]
    made = h.reverse_process(SAME["LLaDA"], ids, mask_id=h.MASK_ID, steps=steps, remasking=ORDERS[order], forbidden=SPECIAL)
    told = film(engine, ids, order=order, passes=steps)
    assert told[-1]["ids"] == made.ids[0].tolist()
    assert [one["ids"] for one in told] == [made.state_after(step)[0].tolist() for step in made.steps()]


def test_ar_writes_what_generate_ar_writes_and_reads_what_is_given_in_between(engine):
    ids = torch.full((1, 128), h.MASK_ID)
    ids[0, :40] = template(1, 40).clamp(min=4)[0]
    made = h.generate_ar(SAME["AR"], ids[:, :40], 88, start_id=h.START_ID, temperature=0, forbidden=(h.MASK_ID, *SPECIAL))
    assert film(engine, ids, "AR")[-1]["ids"] == made.ids[0].tolist()
    holes, told = template(5), film(engine, template(5), "AR")
    assert len(told) == int((holes == h.MASK_ID).sum())
    written = torch.tensor([told[-1]["ids"]])
    with torch.no_grad():
        logits = SAME["AR"](torch.nn.functional.pad(written[:, :-1], (1, 0), value=h.START_ID))
    logits[..., :4] = -torch.inf
    assert torch.equal(written, torch.where(holes == h.MASK_ID, logits.argmax(dim=-1), holes))


def cpu_seconds() -> dict[Path, float]:
    """What the workers of all browsers have computed so far, thread by thread; empty where there is no /proc."""
    spent = {}
    for path in Path("/proc").glob("[0-9]*/task/*/stat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            name, _, numbers = path.read_text().rpartition(")")
            if "DedicatedWorker" in name:
                spent[path] = int(numbers.split()[11]) / os.sysconf("SC_CLK_TCK")
    return spent


def test_a_pass_over_128_characters_takes_less_than_a_quarter_of_a_second(engine):
    """By the clock, or, on a machine that is busy with other things, by the time that the engine got."""
    script = """async ids => {
        const times = [];
        for (let i = 0; i < 4; i++) {
            const told = await engines[0]({ job: "logits", model: "LLaDA", ids });
            times.push((told.ended - told.began) / 1000);
        }
        return Math.min(...times);
    }"""
    engine.evaluate(script, template(0)[0].tolist())
    before = cpu_seconds()
    by_the_clock = engine.evaluate(script, template(0)[0].tolist())
    spent = [(now - before.get(thread, 0)) / 4 for thread, now in cpu_seconds().items()]
    assert 0.005 < min(by_the_clock, max(spent, default=by_the_clock)) < 0.25


def test_draws_follow_the_model_at_a_temperature_and_depend_on_the_seed_alone(engine):
    ids = torch.full((1, 1), h.MASK_ID)
    with torch.no_grad():
        odds = (SAME["LLaDA"](ids)[0, 0, 4:].double() / 1.5).softmax(dim=-1)
    script = """async seeds => {
        const drawn = [], job = { job: "LLaDA", ids: [1], order: "random", passes: 1, temperature: 1.5 };
        for (const seed of seeds) await engines[0]({ ...job, seed }, news => drawn.push(news.ids[0]));
        return drawn;
    }"""
    drawn = engine.evaluate(script, [*range(500), *range(20)])
    assert drawn[:20] == drawn[500:] and min(drawn) >= 4
    del drawn[500:]
    counts = torch.bincount(torch.tensor(drawn) - 4, minlength=len(odds))
    likely = odds * 500 > 5
    seen = torch.cat((counts[likely], counts[~likely].sum()[None]))
    wanted = torch.cat((odds[likely], odds[~likely].sum()[None])) * 500
    assert float(((seen - wanted) ** 2 / wanted).sum()) < len(wanted) + 4 * (2 * len(wanted)) ** 0.5


def test_the_random_order_commits_as_many_as_the_schedule_wants_anywhere(engine):
    ids = torch.full((1, 60), h.MASK_ID)
    one, two = (film(engine, ids, order="random", passes=7, temperature=1, seed=seed) for seed in (1, 2))
    assert [len(told["fresh"]) for told in one] == [60 * (i + 1) // 7 - 60 * i // 7 for i in range(7)]
    assert sorted(at for told in one for at in told["fresh"]) == list(range(60))
    assert one[0]["fresh"] != two[0]["fresh"] and sorted(one[0]["fresh"]) != list(range(8))


# --- what one can do ---


def test_it_opens_half_hidden_with_the_text_as_text_and_says_what_it_expects(view):
    page = view()
    text = shown(page)
    assert len(text) == len(HOSTILE) and all(a in (b, "█") for a, b in zip(text, HOSTILE))
    assert 0.3 < text.count("█") / len(text) < 0.7 and page.title() != "gone"
    assert page.locator("#LLaDA b, #LLaDA script").count() == 0
    assert page.locator("#odds li").count() == 5
    page.locator("#undo").click()
    assert shown(page) == HOSTILE == page.locator("#own").input_value()
    page.locator("#sample").select_option(index=1)
    assert "█" in shown(page)
    page.locator("#undo").click()
    assert shown(page) == HOSTILE
    page.locator("#undo").click()
    assert shown(page) == HOSTILE and page.locator("#undo").is_disabled()


LINE = "What ~~ your will~~ my lor~~"  # six hidden characters


def wait_for(page, button: str) -> None:
    page.locator("#fill", has_text=re.compile(f"^{button}$")).wait_for()


def test_fill_plays_to_the_end_and_every_pass_can_be_gone_back_to(view):
    page = view(text=LINE, passes=3, order="entropy", temperature=0.5, seed=7)
    job = {"order": "entropy", "passes": 3, "temperature": 0.5, "seed": 7}
    ids = torch.tensor([[h.MASK_ID if c == UNKNOWN else int(TOKENIZER.encode(c)) for c in LINE]])
    wanted = [TOKENIZER.decode(told["ids"]) for told in film(page, ids, **job)]
    assert shown(page) == TOKENIZER.decode(ids[0]) and page.locator("#back").is_disabled()
    page.locator("#fill").click()
    wait_for(page, "Fill again")
    assert shown(page) == wanted[2] and page.locator("#LLaDA-says").inner_text().startswith("pass 3 of 3 · 6 of 6 characters")
    assert page.locator("#told").inner_text() == "Filled in 3 passes." and page.locator("#step").is_disabled()
    assert page.locator("#LLaDA .written").count() == 6 and page.locator("#LLaDA .new").count() == 2
    for k in (1, 0):
        page.locator("#back").click()
        assert shown(page) == wanted[k]
    address = page.url
    page.locator("#pass").press("Home")
    assert shown(page) == TOKENIZER.decode(ids[0])
    page.locator("#step").click()
    assert shown(page) == wanted[0]
    page.locator("#pass").press("End")
    page.locator("#fill").click()
    wait_for(page, "Fill again")
    assert "seed=8" in page.url, "again is another draw"
    page.goto("about:blank")
    page.goto(address)
    page.get_by_text("pass 1 of 3").wait_for()
    assert shown(page) == wanted[0], "a link shows what it was copied from"
    assert page.url == address


def test_a_pass_far_off_is_waited_for_and_play_pauses(view):
    page = view(text=UNKNOWN * 40, passes=40, **{"pass": 12})
    page.get_by_text("pass 12 of 40").wait_for()
    assert shown(page).count("█") == 28
    wait_for(page, "Play")
    page.locator("#fill").click()
    page.get_by_text(re.compile("pass 1[4-9] of 40")).wait_for()
    page.locator("#fill").click()
    wait_for(page, "Play")
    before = shown(page)
    page.wait_for_timeout(500)
    assert shown(page) == before and "█" in before


def test_the_keyboard_alone_hides_writes_fills_and_takes_back(view):
    page = view(text="To be, or not", passes=2, order="random")
    field = page.locator("#own")
    field.press("Control+Home")
    page.locator("#about", has_text="If this “T” were hidden").wait_for()
    field.press("ArrowRight")
    page.locator("#about", has_text="If this “o” were hidden").wait_for()
    field.press("ArrowLeft")
    for _ in range(2):
        field.press("Shift+ArrowRight")
    field.press(UNKNOWN)
    assert shown(page) == "██ be, or not"
    field.press("End")
    page.keyboard.type(f" t{UNKNOWN}\nbe")
    assert shown(page) == "██ be, or not t█\nbe"
    page.locator("#undo").press("Enter")
    assert shown(page) == "██ be, or not t█\nb"
    field.press("Control+a")
    field.press(UNKNOWN)
    assert shown(page) == "█" * 18
    field.press("Control+Enter")
    wait_for(page, "Fill again")
    assert "█" not in shown(page)


def test_the_mouse_selects_what_is_hidden(view):
    page = view(text="To be, or not to be")
    boxes = [page.locator("#LLaDA span").nth(i).bounding_box() for i in (3, 8)]
    page.mouse.move(boxes[0]["x"] + 1, boxes[0]["y"] + 10)
    page.mouse.down()
    page.mouse.move(boxes[1]["x"] + boxes[1]["width"] - 1, boxes[1]["y"] + 10, steps=4)
    page.mouse.up()
    page.locator("#hide").click()
    assert shown(page) == "To ██████ not to be"
    page.locator("#all").click()
    assert shown(page) == "█" * 19
    page.locator("#undo").click()
    page.locator("#half").click()
    assert 6 <= shown(page).count("█") < 19


def test_what_it_expects_is_what_the_model_says_with_that_character_hidden(view):
    text = "Good morrow, n~ighbour"
    page, ids = view(text=text), torch.tensor([[h.MASK_ID if c == UNKNOWN else int(TOKENIZER.encode(c)) for c in text]])
    for at in (5, 14):
        box = page.locator("#LLaDA span").nth(at).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        hidden = ids.clone()
        hidden[0, at] = h.MASK_ID
        with torch.no_grad():
            odds = SMALL["LLaDA"](hidden)[0, at].softmax(dim=-1)
        cost = f"“{text[at]}” were hidden: it costs {-odds[ids[0, at]].log():.2f} nats"
        page.locator("#about", has_text="What the model expects here" if text[at] == UNKNOWN else cost).wait_for()
        best = odds[4:].topk(5)
        signs = [{" ": "␣", "\n": "↵"}.get(LETTERS[i], LETTERS[i]) for i in best.indices]
        assert page.locator("#odds b").all_inner_texts() == signs
        assert page.locator("#odds span").all_inner_texts() == [f"{100 * p:.0f}%" for p in best.values.tolist()]


def test_surprise_is_the_cost_of_each_character_hidden_in_turn(view):
    text = "Good morr~w, neighbuor"
    page, ids = view(text=text), torch.tensor([[h.MASK_ID if c == UNKNOWN else int(TOKENIZER.encode(c)) for c in text]])
    places = [i for i, c in enumerate(text) if c != UNKNOWN]
    hidden = ids.repeat(len(places), 1)
    hidden[range(len(places)), places] = h.MASK_ID
    with torch.no_grad():
        logs = SMALL["LLaDA"](hidden).log_softmax(dim=-1)[range(len(places)), places, ids[0, places]]
    page.locator("#heat").click()
    page.get_by_text(f"{-float(logs.sum()):.1f} nats in 21 of 21 characters, {-float(logs.mean()):.2f} each.").wait_for()
    script = "all => all.map(c => Number(/([0-9.]+)%/.exec(c.style.background)?.[1] ?? -1))"
    glow = page.locator("#LLaDA span").evaluate_all(script)
    assert glow[9] == -1 and [glow[i] for i in places] == pytest.approx([min(100, -20 * x) for x in logs.tolist()], abs=0.6)
    page.locator("#own").press("x")
    assert page.locator("#LLaDA span").evaluate_all("all => all.every(c => !c.style.background)"), "it was that of another text"


def test_the_race_is_run_on_the_same_blanks(view):
    page = view(text=LINE, passes=2, temperature=0)
    assert not page.locator("#AR").is_visible()
    page.get_by_label("Race").check()
    assert shown(page, "AR") == shown(page, "LLaDA") == LINE.replace(UNKNOWN, "█")
    page.locator("#fill").click()
    wait_for(page, "Fill again")
    ids = torch.tensor([[h.MASK_ID if c == UNKNOWN else int(TOKENIZER.encode(c)) for c in LINE]])
    assert shown(page, "AR") == TOKENIZER.decode(film(page, ids, "AR")[-1]["ids"])
    assert page.locator("#AR-says").inner_text().startswith("pass 6 of 6")
    assert page.locator("#LLaDA-says").inner_text().startswith("pass 2 of 2")
    assert page.locator("#AR .new").first.evaluate("c => getComputedStyle(c).color") == "rgb(0, 0, 0)"
    style = "(c, name) => getComputedStyle(c)[name]"
    colors = [page.locator(f"#{model} .written:not(.new)").first.evaluate(style, "color") for model in ("LLaDA", "AR")]
    assert colors[0] != colors[1]
    new = page.locator("#LLaDA .new").first.evaluate(style, "backgroundColor")
    assert new == "rgb({}, {}, {})".format(*(int(h.NEW_FACE[i : i + 2], 16) for i in (1, 3, 5)))


def test_characters_that_it_does_not_know_are_left_out_and_named(view):
    page = view(text="a café\u2028 {}")
    assert shown(page) == "a caf " and all(c in page.locator("#told").inner_text() for c in "é{}")
    page.locator("#own").fill("y" * 300)
    assert len(shown(page)) == 128
    page.locator("#own").fill("")
    page.locator("#fill").click()
    assert "Nothing is hidden" in page.locator("#told").inner_text()


def test_nonsense_in_the_address_is_survived(view):
    page = view(text="ab~", order="sideways", passes="-3", temperature="hot", seed="x", **{"pass": "1e9"})
    page.get_by_text("pass 1 of 1").wait_for()
    assert "█" not in shown(page)


def test_it_fits_any_width_in_light_and_dark(view):
    page = view(text="Now is\nthe winter\nof our discontent\nMade\nglorious\nsummer by ~~~~~~~~~~~~~~~~~~~~~ all the", race="on")
    for width, scheme in itertools.product((360, 800, 1400), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) > 3 * 128) == (scheme == "light")
        heights = page.evaluate("[field.scrollHeight, $('LLaDA').offsetHeight]")
        assert heights[0] == heights[1] > 150, "the cursor is in the line that is seen"


def test_the_picture_for_readme_is_taken_in_the_midst_of_filling(browser, address, tmp_path):
    from PIL import Image

    with ThreadPoolExecutor() as elsewhere:  # playwright allows one of itself a thread
        elsewhere.submit(page.take_picture, Path(address.removeprefix("file://")), tmp_path / "page.png").result()
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 1600 and 1000 < picture.height < 2000
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    assert {tuple(int(face[i : i + 2], 16) for i in (1, 3, 5)) for face in (h.MASK_FACE, h.NEW_FACE)} <= colors
