"""The deliverable itself: the committed notebooks as a reader meets them, and both executed afresh in `smoke`."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
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
ASKED = {"models", "loss_check", "training", "perplexity", "gap", "speed", "samples", "quality", "failure", "infilling"}
ASKED |= {"same_prompt", "runs"}
SUITES = ["ablations", "blocks", "budget", "crossover", "schedule", "tuning", "tuning_ar", "tuning_weights", "vocabulary"]


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
    for topic in ("Perplexity", "Convergence", "Speed", "Samples", "Coherence", "same prompt", "Failure", "Infilling"):
        assert re.search(rf"^##+ .*{topic}", text, re.M), topic
    widgets = json.loads((ROOT / MAIN).read_text())["metadata"]["widgets"]
    assert "LinkModel" in json.dumps(widgets), "the slider's browser-side link is not saved"


def test_committed_notebook_goes_beyond_the_assignment():
    headings = "\n".join(re.findall(r"^##+ .*$", "\n".join(sources(ROOT / BEYOND, "markdown")), re.M))
    for topic in ("Instruction tuning", "Who says it", "Guidance", "reversal", "toy", "the time", "byte pairs"):
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
    if dict(zip(table["row"], table["fingerprint"])) == {row: suite_mark(trials) for row, trials in full.items()}:
        return
    asks = lambda source: re.search(r"\b(committed|suite)\(", source) and f'"{name}"' in source  # noqa: E731
    reading = [notebook for notebook in NOTEBOOKS if any(map(asks, sources(ROOT / notebook, "code")))]
    assert reading, "a table that no page shows"
    for notebook in reading:
        said = re.search(rf"{name}\.csv\b.* made at commit (.+) by earlier code and scored on (.+)", printed(ROOT / notebook))
        assert said, f"{notebook} does not say what made it"
        assert set(said[1].split(", ")) == set(table["commit"].replace("none", "unknown"))
        assert said[2].startswith("text of the last 20%" if "scored on" not in table else table["scored on"][0])


def without_clocks(path) -> str:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table[[c for c in table if not CLOCK_COLUMNS.search(c)]].to_csv(index=False)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two clones in which both notebooks were executed, on the corpus if it is at hand."""
    clones = [clone(tmp_path_factory.mktemp(name)) for name in ("first", "second")]
    environment = {"LLADA_DATA": CORPUS} if CORPUS else OFFLINE
    for name in NOTEBOOKS:
        finish(*(start(directory, name, **environment) for directory in clones))
    return clones


def test_smoke_runs_clean_and_leaves_what_is_tracked_as_it_was(twice):
    for name in NOTEBOOKS:
        if CORPUS:
            assert_clean(twice[0] / name)
    changed = {line[3:] for line in git(twice[0], "status", "--porcelain").splitlines()}
    assert changed == set(NOTEBOOKS)


def test_smoke_gives_the_same_numbers_twice(twice):
    first, second = ({p.name: p for p in d.glob("build/smoke/figures/tables/*.csv")} for d in twice)
    assert first.keys() == second.keys() and {f"{name}.csv" for name in ASKED} <= first.keys()
    for name in first:
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
        if re.search(r'[xy]scale(\(|=)"log"', source):
            assert re.search(r"major_formatter|set_[xy]ticks\(\([^)]*\), \(", source), source
        assert not re.search(r"(label|title)\(?=?f?[\"'][^\"']*\$", source), source
