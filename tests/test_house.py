"""Thin, as promised: lines, parameters and cells are counted; nobody imports upwards; the code on the page is what runs."""

import ast
import re

import pytest
from notebooks import BEYOND, MAIN, ROOT, cells, sources

import llada_helpers as h

HELPER = ROOT / "llada_helpers.py"
ROOMS = sorted(p for p in (ROOT / "beyond").glob("*.py"))
# file -> lines, lines of code, lines of code in a function, parameters
LIMITS = {HELPER: (1_300, 900, 40, 10), **{room: (400, 400, 60, 12) for room in ROOMS}}
CELLS = {MAIN: (45, 500, 20), BEYOND: (45, 600, 20)}  # code cells, their lines, lines in one cell
SHOWN = {"CharTokenizer.encode", "forward_process", "diffusion_batch", "next_token_batch", "weighted_nll", "llada_loss"}
SHOWN |= {"Block.forward", "Transformer.forward", "training_loop", "reverse_process", "highest", "low_confidence", "entropy"}
SHOWN |= {"generate_ar", "nelbo"}


def code_lines(node: ast.AST, source: list[str]) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    documented = set()
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(inner) is not None:
            documented |= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", len(source))
    lines = (source[n - 1].strip() for n in range(first, last + 1) if n not in documented)
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.mark.parametrize("path", [HELPER, *ROOMS], ids=lambda p: p.name)
def test_modules_are_thin(path):
    text = path.read_text()
    lines, code, longest, most = LIMITS[path]
    tree, source = ast.parse(text), text.splitlines()
    assert len(source) <= lines and code_lines(tree, source) <= code
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        assert code_lines(function, source) <= longest, function.name
        arguments = function.args
        assert len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) <= most, function.name


@pytest.mark.parametrize("name", CELLS)
def test_notebooks_are_thin(name):
    most, lines, longest = CELLS[name]
    code = sources(ROOT / name, "code")
    sizes = [source.count("\n") + 1 for source in code]
    assert len(code) <= most and sum(sizes) <= lines and max(sizes) <= longest
    assert max(len(line) for source in code for line in source.splitlines()) <= 100
    assert sum("plt.rcParams" in source for source in code) == 1


def test_nobody_imports_upwards():
    upwards = re.compile(r"^\s*(?:import|from) +beyond", re.M)
    assert not upwards.search(HELPER.read_text())
    assert not upwards.search("\n".join(sources(ROOT / MAIN, "code")))


@pytest.fixture
def page(monkeypatch):
    """What H.show would put on the page."""
    shown = []
    monkeypatch.setattr(h, "display", lambda thing: shown.append(thing.data))
    return shown


def displayed(cell: dict) -> str:
    return "\n".join("".join(output.get("data", {}).get("text/markdown", "")) for output in cell["outputs"])


def imported(name: str) -> dict:
    """The names that a notebook imports."""
    scope = {}
    trees = [ast.parse(source) for source in sources(ROOT / name, "code") if not re.search(r"^\s*[%!]", source, re.M)]
    statements = [n for tree in trees for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(statements, []), name, "exec"), scope)
    return scope


@pytest.mark.parametrize("name", CELLS)
def test_code_on_the_page_is_the_code_that_runs(name, page):
    scope = imported(name)
    for cell in cells(ROOT / name, "code"):
        if (source := "".join(cell["source"])).startswith("H.show("):
            page.clear()
            exec(source, scope)
            assert displayed(cell) == "\n".join(page), source


def test_every_idea_of_the_exercise_is_shown():
    names = re.findall(r"\bH\.([\w.]+)", " ".join(s for s in sources(ROOT / MAIN, "code") if s.startswith("H.show(")))
    assert set(names) >= SHOWN
    page = "\n".join(displayed(cell) for cell in cells(ROOT / MAIN, "code"))
    for name in SHOWN:
        assert re.search(rf"def {name.split('.')[-1]}\(", page), name
