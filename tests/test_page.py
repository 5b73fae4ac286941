"""The page with the models in it: what it computes, held against PyTorch, and everything that one can do, in Chromium."""

import importlib.util
import json
import os
import re
from dataclasses import replace
from urllib.parse import urlencode

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_browser import ARGUMENTS, CHROMIUM

import llada_helpers as h
from beyond import page, spacing

LETTERS = "\n !$&',-.3:;=?<>/_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKENIZER = h.CharTokenizer(LETTERS)
HOSTILE = "FIRST CITIZEN:\n</script><script>document.title = 'gone'</script><!-- & <b>not bold</b>, a speech that ends with $&, as it must."
SPEECHES = f"{HOSTILE}\n\nSECOND CITIZEN:\n" + "We are accounted poor citizens, the patricians good. " * 2
SPECIAL = (h.PAD_ID, h.START_ID, h.END_ID)
UNKNOWN = "~"  # stands for a hidden character in the page, since "_" is in the vocabulary


def noisy(causal: bool) -> h.Transformer:
    """A model of the preset's sizes whose every weight matters: what zeros would hide, such as a wrong order of heads, shows."""
    torch.manual_seed(int(causal))
    model = h.Transformer(h.PRESETS["cpu"].model(TOKENIZER.vocab_size, causal))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.3 if name == "head.weight" else weight.shape[1] ** -0.5)
    return model.eval()


MODELS = {"LLaDA": noisy(False), "AR": noisy(True)}
SAME = {name: page.quantized(model) for name, model in MODELS.items()}


# --- the export ---


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(rows):
    weight = torch.tensor(rows)
    integers, scale = page.quantize(weight)
    assert integers.dtype == torch.int8 and (scale - weight.abs().amax(dim=1) / 127).abs().max() < 1e-3
    assert ((integers.float() * scale[:, None] - weight).abs() <= 0.501 * scale[:, None] + 1e-30).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two small models after a few seconds of training, where they were left, and the ids of their text."""
    root, text = tmp_path_factory.mktemp("trained"), "What is written once, and once more, is soon learned by heart.\n\n" * 160
    tokenizer = h.CharTokenizer.from_text(text)
    ids, preset = tokenizer.encode(text), h.PRESETS["smoke"]
    train_ids, rest = h.split(ids)
    short = replace(preset.llada, steps=80, batch_size=8, evals=1, eval_windows=4)
    preset = replace(preset, llada=short, ar=short)
    for name, job in preset.jobs(tokenizer.vocab_size, train_ids, h.split(rest, 0.5)[0]).items():
        h.train(name, job, root=root, quiet=True)
    return root, preset, tokenizer, ids


def test_eight_bits_cost_less_than_five_thousandths_of_a_nat(trained):
    root, preset, tokenizer, ids = trained
    windows = h.windows(ids[-2000:], preset.seq_len)
    for name, model in page.finished(preset, ids, tokenizer.vocab_size, root).items():
        nats = []
        for one in (model, page.quantized(model)):
            seeded = torch.Generator().manual_seed(0)
            told = h.ar_nll(one, windows, 2) if name == "AR" else h.nelbo(one, windows, 1, n_samples=4, generator=seeded)
            nats.append(float(told.sum() / 2000))
        assert nats[0] < 2.5, "it learned something"
        assert nats[1] == pytest.approx(nats[0], abs=0.005) and nats[0] != nats[1]


def test_a_missing_or_interrupted_run_is_refused_with_the_command_that_trains_it(trained, tmp_path, monkeypatch, capsys):
    root, preset, tokenizer, ids = trained
    with pytest.raises(ValueError, match="python -m beyond.experiments train --preset smoke --model llada"):
        page.finished(preset, ids, tokenizer.vocab_size, tmp_path)
    (record,) = root.glob("runs/AR-*/run.json")
    complete = record.read_text()
    record.write_text(complete.replace('"complete": true', '"complete": false'))
    try:
        with pytest.raises(ValueError, match="--model ar"):
            page.finished(preset, ids, tokenizer.vocab_size, root)
    finally:
        record.write_text(complete)
    (tmp_path / "own.txt").write_text("a text that nothing was trained on, for once " * 9)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "own.txt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        page.main(["--preset", "smoke"])
    assert "--model llada" in capsys.readouterr().err and not (tmp_path / "play.html").exists()


def test_the_command_writes_the_page_of_the_finished_runs(trained, tmp_path, monkeypatch, capsys):
    root, preset, tokenizer, ids = trained
    (tmp_path / "own.txt").write_text(tokenizer.decode(ids))
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "own.txt"))
    monkeypatch.setitem(h.PRESETS, "smoke", preset)
    monkeypatch.chdir(root)
    page.main(["--preset", "smoke", "--out", str(tmp_path / "small.html")])
    told = data_of((tmp_path / "small.html").read_text())
    assert told["length"] == 64 and told["characters"] == list(tokenizer.characters)
    assert all(text in tokenizer.decode(ids[-len(ids) // 10 - 1 :]) for text in told["texts"]), "what they were not trained on"
    assert "MB" in capsys.readouterr().out


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])


HTML = page.page(MODELS, TOKENIZER, SPEECHES)


def test_one_file_small_enough_that_names_no_other(tmp_path):
    assert len(HTML.encode()) < 3_500_000
    assert HTML.count("</script>") == 3, "data, engine, page: nothing in the data ends its script"
    assert re.findall(r"(?i)https?:|src=|@import|\burl\(|fetch\(|XMLHttp|innerHTML|outerHTML|insertAdjacent|document\.write", HTML) == []
    assert data_of(HTML)["texts"][0] == HOSTILE
    assert page.TEMPLATE.read_text().count("\n") <= 450 and open(page.__file__).read().count("\n") <= 120


def test_speeches_are_chosen_from_all_over_the_text_and_its_beginning_if_there_are_none():
    text = "\n\n".join(f"WHO:\n{i} " + "x" * (i % 30) for i in range(200))
    chosen = page.samples(text, 30)
    assert len(chosen) == 6 and all(24 < len(one) <= 30 and one in text for one in chosen)
    assert text.index(chosen[0]) < len(text) / 8 and text.index(chosen[-1]) > len(text) * 7 / 8
    assert page.samples("x" * 100, 30) == ["x" * 30]


# --- in Chromium ---


@pytest.fixture(scope="module")
def browser():
    lacking = [what for what, there in {"chromium": CHROMIUM, "playwright": importlib.util.find_spec("playwright")}.items() if not there]
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
def address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "play.html"
    path.write_text(HTML)
    return path.as_uri()


@pytest.fixture
def view(browser, address):
    """Opens the page with what its address is to say; any request, error or warning on the console fails the test."""
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


@pytest.fixture(scope="module")
def engine(browser, address):
    """A page for the tests that only ask its engine, which keeps nothing from one question to the next."""
    view = browser.new_page()
    view.goto(address)
    yield view
    view.close()


def shown(view, model: str = "LLaDA") -> str:
    """The text as a reader sees it, hidden characters as blocks."""
    cells = view.locator(f"#{model} .cell").evaluate_all("all => all.map(c => [c.textContent, c.classList.contains('blank')])")
    return "".join("█" if blank else text.replace("↵", "\n") for text, blank in cells)


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
        told = engine.evaluate("async ([model, ids]) => (await engines[0]({ job: 'logits', model, ids })).logits.map(l => [...l])", [name, ids[0].tolist()])
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


ORDERS = {"low-confidence": "low_confidence", "entropy": "entropy", "bit-reversed": spacing.bit_reversed, "spaced": spacing.spaced(8)}
CASES = [("low-confidence", seed) for seed in range(10)] + [(order, seed) for order in list(ORDERS)[1:] for seed in (3, 8)]


@pytest.mark.parametrize("order, seed", CASES)
def test_greedy_decoding_writes_what_reverse_process_writes(engine, order, seed):
    ids, steps = template(seed, 128 - 7 * seed), (1, 4, 7, 16, 5, 11, 32, 13, 8, 200)[seed]
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


def test_a_pass_over_128_characters_takes_less_than_a_quarter_of_a_second(engine):
    script = """async ids => {
        const times = [];
        for (let i = 0; i < 8; i++) { const told = await engines[0]({ job: "logits", model: "LLaDA", ids }); times.push(told.ended - told.began); }
        return Math.min(...times);
    }"""
    assert engine.evaluate(script, template(0)[0].tolist()) < 250


def test_draws_follow_the_model_at_a_temperature_and_depend_on_the_seed_alone(engine):
    ids = torch.full((1, 1), h.MASK_ID)
    with torch.no_grad():
        odds = (SAME["LLaDA"](ids)[0, 0, 4:].double() / 1.5).softmax(dim=-1)
    drawn = [film(engine, ids, order="random", passes=1, temperature=1.5, seed=seed)[0]["ids"][0] for seed in range(1000)]
    assert drawn[:20] == [film(engine, ids, order="random", passes=1, temperature=1.5, seed=s)[0]["ids"][0] for s in range(20)]
    assert min(drawn) >= 4
    counts = torch.bincount(torch.tensor(drawn) - 4, minlength=len(odds))
    likely = odds * 1000 > 5
    seen = torch.cat((counts[likely], counts[~likely].sum()[None]))
    wanted = torch.cat((odds[likely], odds[~likely].sum()[None])) * 1000
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


def odds_shown(page) -> list[tuple[str, str]]:
    return [tuple(item.split("\n")) for item in page.locator("#odds li").evaluate_all("all => all.map(o => o.innerText.trim())")]
