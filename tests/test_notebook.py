"""The deliverable itself: the committed notebook as a reader meets it, and the notebook executed afresh in `smoke`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = "EG_TakeHome_LLaDA.ipynb"
CLOCK_COLUMNS = re.compile(r"second|tokens/s")


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def assert_clean(path: Path) -> None:
    """Every code cell was run, in order, without an error and without a word on stderr."""
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_committed_notebook_is_executed_and_complete():
    assert_clean(ROOT / NOTEBOOK)
    headings = re.findall(
        r"^## Part (\d): (.*)$", "\n".join("".join(c["source"]) for c in cells(ROOT / NOTEBOOK, "markdown")), re.M
    )
    assert [int(number) for number, _ in headings] == list(range(1, 9))
    beyond = "\n".join("".join(c["source"]) for c in cells(ROOT / NOTEBOOK, "markdown")).partition("## Beyond the assignment")[2]
    for topic in ("Instruction tuning", "Who says it", "Guidance", "reversal", "toy", "the time", "byte pairs"):
        assert re.search(rf"^### .*{topic}", beyond, re.M), topic
    first = "".join("".join(o["text"]) for c in cells(ROOT / NOTEBOOK, "code")[:2] for o in c["outputs"])
    assert all(word in first for word in ("preset", "device", "torch", "SHA-256", "TinyShakespeare"))
    widgets = json.loads((ROOT / NOTEBOOK).read_text())["metadata"]["widgets"]
    assert "LinkModel" in json.dumps(widgets), "the slider's browser-side link is not saved"


def test_committed_notebook_is_light_and_readable():
    assert (ROOT / NOTEBOOK).stat().st_size < 3_000_000
    assert max("".join(c["source"]).count("\n") + 1 for c in cells(ROOT / NOTEBOOK, "code")) <= 30


def execute(directory: Path, data: str | None, repository: Path | None = None) -> Path:
    """A copy of what is committed, executed in `directory` in the smoke preset; returns its tables.

    With a `repository` only the notebook is copied, as in Colab, and fetches the rest from there.
    """
    for name in (NOTEBOOK, "llada_helpers.py", "analysis.md", "README.md")[: 1 if repository else None]:
        shutil.copy(ROOT / name, directory)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLADA_")}
    environment |= {"LLADA_PRESET": "smoke", "XDG_CACHE_HOME": str(directory / "cache")}
    environment |= {"LLADA_REPO_URL": str(repository)} if repository else {}
    # An unreachable proxy makes the download fail at once, with or without a network.
    environment |= {"LLADA_DATA": data} if data else {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", NOTEBOOK]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "figures" / "tables"


def without_clocks(path: Path) -> str:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table[[c for c in table if not CLOCK_COLUMNS.search(c)]].to_csv(index=False)


@pytest.fixture(scope="module")
def corpus() -> str | None:
    beside = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    return os.environ.get("LLADA_DATA") or (str(beside) if beside.exists() else None)


def test_smoke_runs_clean_and_twice_the_same(tmp_path, corpus):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    a = execute(first, str(Path(corpus).resolve()) if corpus else None)
    b = execute(second, str(Path(corpus).resolve()) if corpus else None)
    if corpus:
        assert_clean(first / NOTEBOOK)
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    parts = {"models.csv", "perplexity.csv", "quality.csv", "speed.csv", "samples.csv", "ablations.csv"}
    beyond = {"sft.csv", "answers.csv", "speakers.csv", "guidance.csv", "reversal.csv", "toy.csv", "vocabulary_bits.csv"}
    assert parts | beyond <= set(names)
    toy = pd.read_csv(a / "toy.csv", dtype=str)
    assert toy["sampled"].tolist() == ["4", "hola", "Paris"]
    assert toy["chosen"].iloc[-1] == "Paris"
    for name in names:
        assert without_clocks(a / name) == without_clocks(b / name), name


def test_smoke_runs_from_the_notebook_alone_without_any_network(tmp_path, repository):
    bare = tmp_path / "bare"
    bare.mkdir()
    execute(bare, data=None, repository=repository)
    outputs = json.dumps([c["outputs"] for c in cells(bare / NOTEBOOK, "code")])
    assert "TINYSHAKESPEARE COULD NOT BE DOWNLOADED" in outputs
    assert "offline corpus" in outputs


def test_smoke_runs_on_any_text(tmp_path):
    own = tmp_path / "own_words.txt"
    own.write_text("Die Würde des Menschen ist unantastbar.\r\n" * 60, encoding="utf-8")
    execute(tmp_path, data=str(own))
    assert "own_words" in json.dumps([c["outputs"] for c in cells(tmp_path / NOTEBOOK, "code")])
