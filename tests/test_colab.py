"""The notebooks' first cell, where nothing but the notebook exists: as in Colab, but with a repository on this disk."""

import json
import re

import pytest
from notebooks import BEYOND, MAIN, ROOT, clone, finish, printed, python_path, sources, start

FAKE_PIP = "import pathlib, sys\npathlib.Path('installed.txt').open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
NOTEBOOKS = [MAIN, BEYOND]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def empty(tmp_path):
    """An empty runtime. A pip that only writes down what it is asked for stands in for the real one."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    (tmp_path / "pip" / "__main__.py").write_text(FAKE_PIP)
    (tmp_path / "text.txt").write_text("To be, or not to be\n" * 200)
    return tmp_path


def run(directory, name, count, repository, code=""):
    """The first `count` code cells, then `code`, in a kernel."""
    notebook = json.loads((ROOT / name).read_text())
    notebook["cells"] = [c for c in notebook["cells"] if c["cell_type"] == "code"][: count + 1]
    notebook["cells"][count]["source"] = code
    notebook["metadata"].pop("widgets", None)
    (directory / name).write_text(json.dumps(notebook))
    environment = {"LLADA_REPO_URL": str(repository), "LLADA_DATA": str(directory / "text.txt")}
    return start(directory, name, PYTHONPATH=python_path(directory), **environment)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_alone_fetches_the_repository(empty, repository, name):
    for _ in ("fresh", "kernel restarted, in the folder where the clone already lies"):
        finish(run(empty, name, 2, repository, "print(H.load_text().count('To be, or not to be'))"))
        assert "200" in printed(empty / name)
    assert (empty / "llada" / "llada_helpers.py").read_bytes() == (ROOT / "llada_helpers.py").read_bytes()
    installed = (empty / "llada" / "installed.txt").read_text().splitlines()
    assert all(re.fullmatch(r"install -?-q\w* -r requirements.txt", line) for line in installed)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_repository_that_cannot_be_reached_says_what_to_do(empty, name):
    process = run(empty, name, 1, empty / "no-such-repository")
    errors = process.communicate()[1]
    assert process.returncode != 0
    assert re.search(r"RuntimeError.*: .*llada_helpers\.py.*LLADA_REPO_URL", errors)
    assert not (empty / "installed.txt").exists() and not (empty / "llada").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_there_is_kept(empty, name):
    (empty / "llada_helpers.py").write_text("print('my own helper')")
    (empty / "beyond").mkdir()
    finish(run(empty, name, 1, "no-such-repository", "import llada_helpers"))
    assert "my own helper" in printed(empty / name)
    assert not (empty / "installed.txt").exists() and not (empty / "llada").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_can_be_imported_is_kept(empty, name):
    """The package installed, or the notebook started elsewhere with the project on the path: nothing is fetched."""
    (empty / "site").mkdir()
    for module in ("llada_helpers.py", "beyond"):
        (empty / "site" / module).symlink_to(ROOT / module)
    (empty / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(empty / 'site')!r})")
    finish(run(empty, name, 1, "no-such-repository", "import llada_helpers; print(llada_helpers.__file__)"))
    assert printed(empty / name).strip() == str(empty / "site" / "llada_helpers.py")
    assert not (empty / "installed.txt").exists() and not (empty / "llada").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cell_is_short_and_mounts_nothing(name):
    source = sources(ROOT / name, "code")[0]
    assert source.count("\n") + 1 <= 9 and max(map(len, source.splitlines())) <= 100 and "PLACEHOLDER" in source
    assert "drive" not in source and "mount" not in source


def test_the_badge_opens_the_notebook_of_the_same_repository():
    (address,) = re.findall(r'LLADA_REPO_URL", "https://github.com/(.*?)"', sources(ROOT / MAIN, "code")[0])
    badge = f"https://colab.research.google.com/github/{address}/blob/main/{MAIN}"
    assert f"]({badge})" in (ROOT / "README.md").read_text()
