"""The notebook's first cell, where nothing but the notebook exists: as in Colab, but with a repository on this disk."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = "EG_TakeHome_LLaDA.ipynb"
CORPUS = "To be, or not to be\n" * 200
FAKE_PIP = "import pathlib, sys\npathlib.Path('installed.txt').open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"


def first_cell() -> str:
    return "".join(next(c for c in json.loads((ROOT / NOTEBOOK).read_text())["cells"] if c["cell_type"] == "code")["source"])


@pytest.fixture
def empty(tmp_path) -> Path:
    """An empty runtime. A pip that only writes down what it is asked for stands in for the real one."""
    directory = tmp_path / "runtime"
    (directory / "pip").mkdir(parents=True)
    (directory / "pip" / "__main__.py").write_text(FAKE_PIP)
    (directory / "pip" / "__init__.py").write_text("")
    (directory / "text.txt").write_text(CORPUS)
    return directory


def run(directory: Path, repository: str, *command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLADA_", "PYTHONPATH"))}
    environment |= {"LLADA_REPO_URL": repository, "LLADA_PRESET": "smoke", "LLADA_DATA": str(directory / "text.txt")}
    return subprocess.run([sys.executable, *command], cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_notebook_alone_fetches_its_helper(empty, repository):
    """The first two code cells, in a kernel."""
    notebook = json.loads((ROOT / NOTEBOOK).read_text())
    notebook["cells"] = [c for c in notebook["cells"] if c["cell_type"] == "code"][:2]
    notebook["metadata"].pop("widgets", None)
    (empty / NOTEBOOK).write_text(json.dumps(notebook))
    command = ["-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", NOTEBOOK]
    done = run(empty, str(repository), *command)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [c["outputs"] for c in json.loads((empty / NOTEBOOK).read_text())["cells"]]
    first, second = ("".join("".join(o["text"]) for o in output) for output in outputs)
    assert "device: " in first and "preset: smoke" in first
    assert "text, 4,000 characters" in second
    assert not (empty / "installed.txt").exists(), "nothing was missing"
    for name in ("llada_helpers.py", "requirements.txt"):
        assert (empty / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_repository_that_cannot_be_reached_is_named(empty):
    address = str(empty / "no-such-repository")
    done = run(empty, address, "-c", first_cell())
    assert done.returncode != 0
    last = done.stderr.strip()
    assert "RuntimeError: no llada_helpers.py here" in last and f"REPO_URL = {address!r}" in last
    assert not (empty / "llada_helpers.py").exists()


def test_a_helper_that_is_there_is_kept(empty):
    own = b"import torch\ndef describe_machine():\n    return {'device': 'mine'}\nclass choose_preset:\n    name = 'own'\n"
    (empty / "llada_helpers.py").write_bytes(own)
    done = run(empty, "no-such-repository", "-c", first_cell())
    assert done.returncode == 0 and "mine; preset: own" in done.stdout, done.stderr
    assert (empty / "llada_helpers.py").read_bytes() == own and not (empty / "installed.txt").exists()


def test_only_what_is_missing_is_installed_and_torch_never(empty, repository):
    requirements = "# a comment\ntorch>=99  # too old here, and yet kept\nnumpy\nno_such_package>=1.0  # why\npandas>=99\n\n"
    (repository / "requirements.txt").write_text(requirements)
    git = ["git", "-C", str(repository), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "commit", "--quiet", "-am", "others"], check=True)
    done = run(empty, str(repository), "-c", first_cell())
    assert done.returncode == 0, done.stderr
    installed = (empty / "installed.txt").read_text().splitlines()
    assert installed == ["install --quiet no_such_package>=1.0", "install --quiet pandas>=99"]


def test_the_cell_is_short_and_mounts_nothing():
    source = first_cell()
    assert source.count("\n") + 1 < 30 and max(map(len, source.splitlines())) <= 120
    assert "drive" not in source and "mount" not in source


def test_the_badge_opens_the_notebook_of_the_same_repository():
    (address,) = re.findall(r'LLADA_REPO_URL", "https://github.com/(.*?)"', first_cell())
    badge = f"https://colab.research.google.com/github/{address}/blob/main/{NOTEBOOK}"
    assert f"]({badge})" in (ROOT / "README.md").read_text()
