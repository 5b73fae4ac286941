"""The deliverable itself: the committed notebooks as a reader meets them, and both executed afresh in `smoke`."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from notebooks import (
    BEYOND,
    CORPUS,
    MAIN,
    OFFLINE,
    ROOT,
    cells,
    clone,
    finish,
    git,
    outputs,
    printed,
    python_path,
    sources,
    start,
)

import llada_helpers as h
from beyond.experiments import suite, suite_mark

CLOCK_COLUMNS = re.compile(r"second|tokens/s|commit")
NOTEBOOKS = [MAIN, BEYOND]
ASKED = {"loss_check", "training", "convergence", "perplexity", "gap", "speed", "samples", "quality", "same_prompt", "failure"}
ASKED |= {"infilling", "infilling_kinds"}
SUITES = ["ablations", "blocks", "budget", "crossover", "vocabulary"]


def assert_clean(path):
    """Every code cell was run, in order, without an error and without a word on stderr."""
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs(path) if o["output_type"] == "error" or o.get("name") == "stderr"]


def anchors(path) -> set[str]:
    """What a link inside the notebook can point to: headings, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", "\n".join(sources(path, "markdown")), re.M)
    return {heading.strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_is_executed_and_light(name):
    assert_clean(ROOT / name)
    assert (ROOT / name).stat().st_size < 3_000_000
    first = "".join("".join(o.get("text", "")) for c in cells(ROOT / name, "code")[:3] for o in c["outputs"])
    assert all(word in first for word in ("preset", "device", "torch", "SHA-256", "TinyShakespeare"))
    ids = [c["id"] for kind in ("code", "markdown") for c in cells(ROOT / name, kind)]
    assert len(ids) == len(set(ids)) and "jupytext" not in json.loads((ROOT / name).read_text())["metadata"]


def test_committed_notebook_has_the_parts_of_the_exercise():
    text = "\n".join(sources(ROOT / MAIN, "markdown"))
    assert [int(n) for n in re.findall(r"^## Part (\d): ", text, re.M)] == list(range(1, 9))
    assert not re.search(r"\b\d\.\d{2,4}\b", sources(ROOT / MAIN, "markdown")[0]), "a measured number before it was measured"
    topics = ("Equal compute", "Perplexity", "Convergence", "Tracking", "Speed", "Samples", "Coherence", "same prompt", "Failure")
    for topic in (*topics, "Infilling", "What mattered", "Conclusion", "Checklist"):
        assert re.search(rf"^##+ .*{topic}", text, re.M), topic
    widgets = json.loads((ROOT / MAIN).read_text())["metadata"]["widgets"]
    assert "LinkModel" in json.dumps(widgets), "the slider's browser-side link is not saved"


def test_committed_notebook_goes_beyond_the_assignment():
    headings = "\n".join(re.findall(r"^##+ .*$", "\n".join(sources(ROOT / BEYOND, "markdown")), re.M))
    for topic in ("bound", "exact nats", "decoders", "blocks", "little text", "compute", "byte pairs", "speaker", "reversal"):
        assert re.search(topic, headings, re.I), topic


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_are_good(name):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", "\n".join(sources(ROOT / name, "markdown"))):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        assert not anchor or anchor in anchors(ROOT / (path or name)), target


@pytest.mark.skipif(not CORPUS, reason="needs TinyShakespeare, in shared/ or $LLADA_DATA")
@pytest.mark.parametrize("name", SUITES)
def test_committed_suites_are_of_the_code_as_it_is_or_the_page_says_what_made_them(name):
    """Read by the notebooks from figures/tables/; `python -m beyond.experiments NAME` remakes it."""
    table = pd.read_csv(ROOT / "figures" / "tables" / f"{name}.csv", dtype=str)
    full, _, _ = suite(name, h.PRESETS["cpu"], h.load_text(CORPUS))
    if dict(zip(table["row"], table["fingerprint"])).items() <= {row: suite_mark(trials) for row, trials in full.items()}.items():
        return  # of its rows; some may not be trained yet
    asks = lambda source: re.search(r"\b(committed|suite)\(", source) and f'"{name}"' in source  # noqa: E731
    reading = [notebook for notebook in NOTEBOOKS if any(map(asks, sources(ROOT / notebook, "code")))]
    assert reading, "a table that no page shows"
    for notebook in reading:
        said = re.search(rf"{name}\.csv\b.* made at commit (.+) by earlier code and scored on (.+)", printed(ROOT / notebook))
        assert said, f"{notebook} does not say what made it"
        assert set(said[1].split(", ")) == set(table["commit"].replace("none", "unknown"))
        assert said[2].startswith("text of the last 20%" if "scored on" not in table else table["scored on"][0])


@pytest.mark.parametrize("name", [*SUITES, "decoder"])
def test_every_training_behind_a_committed_table_is_recorded(name):
    """In runs.csv, by row, seed and fingerprint."""
    table, runs = (pd.read_csv(ROOT / "figures" / "tables" / f"{file}.csv", dtype=str) for file in (name, "runs"))
    wanted = {(line["row"], mark) for line in table.to_dict("records") for mark in line["fingerprint"].split("+")}
    recorded = runs[runs["suite"] == name]
    assert set(zip(recorded["row"], recorded["fingerprint"])) == wanted
    assert recorded[["steps", "best", "device", "commit", "seed"]].notna().all(axis=None)


def without_clocks(path) -> str:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table[[c for c in table if not CLOCK_COLUMNS.search(c)]].to_csv(index=False)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two clones in which the main notebook was executed, in the first the other one, too; on the corpus if it is at hand."""
    clones = [clone(tmp_path_factory.mktemp(name)) for name in ("first", "second")]
    environment = {"LLADA_DATA": CORPUS} if CORPUS else OFFLINE
    finish(*(start(directory, MAIN, **environment) for directory in clones))
    finish(start(clones[0], BEYOND, **environment))
    return clones


def test_smoke_runs_clean_and_leaves_what_is_tracked_as_it_was(twice):
    for name in NOTEBOOKS:
        if CORPUS:
            assert_clean(twice[0] / name)
    changed = {line[3:] for line in git(twice[0], "status", "--porcelain").splitlines()}
    assert changed == set(NOTEBOOKS)


def test_smoke_gives_the_same_numbers_twice(twice):
    first, second = ({p.name: p for p in d.glob("build/smoke/figures/tables/*.csv")} for d in twice)
    assert {f"{name}.csv" for name in ASKED} <= second.keys() <= first.keys()
    for name in second:
        assert without_clocks(first[name]) == without_clocks(second[name]), name
    toy = pd.read_csv(first["toy.csv"], dtype=str)
    assert toy["sampled"].tolist() == ["4", "hola", "Paris"]
    assert toy["chosen"].iloc[-1] == "Paris"


def test_smoke_runs_from_the_notebook_alone_and_on_any_text(tmp_path):
    """The main notebook in an empty folder without any network, beside both on a text of one's own.

    That is about as short as may be, in no alphabet that a font has at once, and takes itself and its name for markup.
    """
    repository, bare, own = (tmp_path / name for name in ("repository", "bare", "own"))
    for directory in (repository, bare, own):
        directory.mkdir()
    clone(repository)
    clone(own)
    (bare / MAIN).write_bytes((ROOT / MAIN).read_bytes())
    (bare / "pip").mkdir()
    for module in ("__init__", "__main__"):  # a pip that does nothing: all is installed, and there is no network
        (bare / "pip" / f"{module}.py").write_text("")
    line = "Die <b>W\u00fcrde</b> kostet $73 oder $6_2 & 0.1%\t\u5929\u4e0b `x` *\U0001f44d* [___]\r\n"
    name = "own_$5_to_$_^{9.txt"
    (own / name).write_text((line * 20)[:700], encoding="utf-8")
    alone = start(bare, MAIN, LLADA_REPO_URL=str(repository), PYTHONPATH=python_path(bare), **OFFLINE)
    finish(start(own, MAIN, LLADA_DATA=name), alone)
    assert "TINYSHAKESPEARE COULD NOT BE DOWNLOADED" in json.dumps(outputs(bare / MAIN))
    assert "offline corpus" in printed(bare / MAIN) and Path(name).stem in printed(own / MAIN)
    finish(start(own, BEYOND, LLADA_DATA=name))
    for notebook in (MAIN, BEYOND):
        assert_clean(own / notebook)
        tables = re.findall("<table[^>]*>", json.dumps(outputs(own / notebook)))
        assert tables and all("tex2jax_ignore" in table and "mathjax_ignore" in table for table in tables)
    assert {line[3:] for line in git(own, "status", "--porcelain", "-uno").splitlines()} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_text_of_a_figure_is_mathematics(name):
    """A title may hold the name of a user's file. So ticks must not be written as mathematics either, as on log axes."""
    for source in sources(ROOT / name, "code"):
        if "plt.rcParams" in source:
            assert '"text.parse_math": False' in source and '"display.html.use_mathjax", False' in source
        if re.search(r'[xy]scale(\(|=)"(sym)?log"', source):
            assert re.search(r"major_formatter|set_[xy]ticks\(\([^)]*\), \(|set_[xy]ticks\(ticks, \[", source), source
        assert not re.search(r"(label|title)\(?=?f?[\"'][^\"']*\$", source), source


@pytest.fixture(scope="module")
def searches():
    """The main notebook's own searches for what fills a blank, with two small models of random weights."""
    scope = {"torch": torch, "H": h, "device": torch.device("cpu"), "vocabulary_size": 9}
    for source in sources(ROOT / MAIN, "code"):
        if re.search(r"^def (beam|ar_beam)\(", source, re.M):
            exec(source, scope)
    for seed, (name, causal) in enumerate((("llada", False), ("ar", True))):
        torch.manual_seed(seed)
        scope[name] = h.Transformer(h.ModelConfig(9, 8, 2, 2, 16, causal=causal)).requires_grad_(False)
        for parameter in scope[name].parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return scope


def all_fillings(line, cut):
    """Every way to fill the blank with characters, [5^width, L]."""
    fills = torch.cartesian_prod(*[torch.arange(4, 9)] * (cut.stop - cut.start)).view(-1, cut.stop - cut.start)
    lines = line.repeat(len(fills), 1)
    lines[:, cut] = fills
    return lines


@pytest.mark.parametrize("cut", [slice(3, 4), slice(3, 6), slice(6, 8), slice(1, 3)])
def test_ar_scores_every_filling_by_the_whole_line(searches, cut):
    """With a beam that drops nothing, the scores are AR's exact log probabilities of what follows the left side."""
    line = torch.tensor([4, 5, 6, 7, 8, 4, 6, 5])
    lines, fills, left, whole = all_fillings(line, cut), *searches["ar_beam"](line, cut, 125)
    assert len({tuple(row) for row in fills.tolist()}) == len(fills) == len(lines)
    for scores, stop in ((left, cut.stop), (whole, len(line))):
        counted = torch.zeros_like(lines, dtype=torch.bool)
        counted[:, cut.start : stop] = True
        nats = h.ar_nll(searches["ar"], lines, h.START_ID, counted=counted)
        for fill, score in zip(fills, scores):
            assert score.item() == pytest.approx(-nats[(lines[:, cut] == fill).all(dim=1)].item(), abs=1e-4)


def test_lladas_candidates_are_scored_by_its_own_chain(searches):
    """Left to right in the blank, both sides in sight; a narrow beam gives the best of a wide one's scores or less."""
    line, cut = torch.tensor([4, 5, 6, 7, 8, 4, 6, 5]), slice(3, 6)
    fills, score = searches["llada_beam"](line, cut, 125)
    assert (score[:-1] >= score[1:]).all() and score.exp().sum() <= 1 + 1e-4
    state, expected = line.clone(), 0.0
    state[cut] = h.MASK_ID
    for place, token in zip(range(3, 6), fills[7]):
        expected += searches["llada"](state[None])[0, place].log_softmax(dim=-1)[token].item()
        state[place] = token
    assert score[7].item() == pytest.approx(expected, abs=1e-4)
    assert searches["llada_beam"](line, cut, 2)[1][0] <= score[0] + 1e-5
