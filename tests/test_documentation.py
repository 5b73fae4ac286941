"""What readers copy: the manual pages, the examples in docstrings, every command and snippet of README and CONTRIBUTING."""

import argparse
import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import notebooks
import pytest
from accelerate.commands.launch import launch_command_parser
from nbconvert.nbconvertapp import NbConvertApp
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

import llada_helpers as h

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
OTHER_CODE = r"<!-- (?:gpu script|source: [^>]*) -->\n```.*?^```\n"  # has tests of its own
COPIED = re.sub(OTHER_CODE, "", README + CONTRIBUTING, flags=re.S | re.M)


ROOMS = sorted(path.stem for path in (ROOT / "beyond").glob("*.py") if path.stem != "__init__")
MODULES = {"llada_helpers": h} | {f"beyond.{room}": importlib.import_module(f"beyond.{room}") for room in ROOMS}


# --- docstrings ---


def public(module) -> dict:
    """Functions and classes that the module defines itself."""
    things = {name: thing for name, thing in vars(module).items() if inspect.isroutine(thing) or inspect.isclass(thing)}
    things.pop("Run", None)  # a named tuple, which a comment documents
    return {name: thing for name, thing in things.items() if not name.startswith("_") and thing.__module__ == module.__name__}


def test_the_lists_of_public_names_are_not_empty():
    assert len(public(h)) > 40 and {"train", *CONTRACT} <= set(public(h))
    assert all(public(module) for module in MODULES.values())


def examples(module, name: str) -> list[doctest.Example]:
    found = doctest.DocTestFinder(recurse=False).find(public(MODULES[module])[name], name, module=MODULES[module])
    return [example for test in found for example in test.examples]


NAMES = [(module, name) for module in MODULES for name in sorted(public(MODULES[module]))]
CALLED = r"\.{0}\b|^from .* import .*\b{0}\b"  # a variable of that name is no test
TESTED = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
CONTRACT = {"CharTokenizer", "forward_process", "llada_loss", "reverse_process", "generate_ar", "nelbo"}


@pytest.mark.parametrize("module, name", NAMES)
def test_public_name_has_a_summary_and_its_example_is_of_it(module, name):
    thing, shown = public(MODULES[module])[name], examples(module, name)
    text = inspect.cleandoc(vars(thing).get("__doc__") or "") if inspect.isclass(thing) else inspect.getdoc(thing) or ""
    summary = text.partition("\n\n")[0]
    assert summary and not summary.startswith((f"{name}(", ">>>")), "a summary in words comes first"
    if shown:
        code = "".join(e.source for e in shown)
        assert name in code or name.lower() in code.lower().replace("_", ""), "the example shows something else"
        assert any(e.want for e in shown), "an example without an output says nothing"
        assert not any(e.options.get(doctest.SKIP) for e in shown)


@pytest.mark.parametrize("module", MODULES)
def test_what_a_reader_copies_has_an_example(module):
    """In the helper what every sketch of LLaDA begins with, in a room every function: in its docstring or in a test."""
    functions = {name for name, thing in public(MODULES[module]).items() if inspect.isroutine(thing)}
    wanted = CONTRACT if module == "llada_helpers" else functions
    assert [n for n in wanted if not examples(module, n) and not re.search(CALLED.format(n), TESTED, re.M)] == []


@pytest.mark.parametrize("module", MODULES)
def test_examples_hold_in_any_directory_and_shell_and_leave_nothing_behind(module, tmp_path, monkeypatch):
    for name, value in {"LLADA_DATA": "missing.txt", "LLADA_PRESET": "none", "LLADA_RETRAIN": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for test in doctest.DocTestFinder().find(MODULES[module]):
            doctest.DocTestRunner(verbose=False).run(test, out=said.write)
    assert said.getvalue() == ""
    assert Path.cwd() == tmp_path and list(tmp_path.iterdir()) == []


def test_every_room_is_named_at_the_door():
    """help(beyond) lists them, each with what it holds."""
    listed = re.findall(r"^    (\w+) +\S", importlib.import_module("beyond").__doc__, flags=re.M)
    assert sorted(listed) == ROOMS


def test_help_begins_like_a_manual_page():
    start = pydoc.plain(pydoc.render_doc(h)).partition("\nCLASSES\n")[0]
    assert re.search(r"\nNAME\n    llada_helpers - LLaDA, .*\.\n\nDESCRIPTION\n", start)
    numbers = re.findall(r"^# (\d+)\. \w", inspect.getsource(h), flags=re.M)
    assert numbers == [str(i + 1) for i in range(10)]


# --- README and CONTRIBUTING ---


class Parsed(Exception):
    """The command line was understood."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", COPIED, flags=re.S | re.M)


def commands() -> list[list[str]]:
    """Every command of the bash blocks, and every `python ...` in running text, as words without assignments and comments."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python [^`]*)`", COPIED)
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words[next(i for i, w in enumerate(words) if "=" not in w) :] for words in found if words]


@pytest.fixture
def parse_only(monkeypatch):
    """Stop whatever parses its arguments right after it has done so."""
    original = argparse.ArgumentParser.parse_args

    def parse(self, arguments=None, namespace=None):
        original(self, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def check_script(words: list[str], monkeypatch) -> None:
    """`script.py ...` or `-m module ...`: it is there, and understands its arguments."""
    name, *arguments = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        module = importlib.import_module(name)
    else:
        assert (ROOT / name).exists(), name
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_is_understood(words, parse_only, monkeypatch):
    program, *arguments = words
    if program == "python":
        check_script(arguments, monkeypatch)
    elif program in ("torchrun", "accelerate"):
        launcher = get_args_parser() if program == "torchrun" else launch_command_parser()
        rest = arguments[1:] if program == "accelerate" else arguments
        assert program == "torchrun" or arguments[0] == "launch"
        with pytest.raises(Parsed):
            launcher.parse_args(rest)
        check_script(rest[rest.index("-m") :], monkeypatch)
    elif program == "pip":
        assert arguments[0] == "install"
        files = [word for previous, word in itertools.pairwise(arguments) if previous == "-r"]
        assert all((ROOT / file).exists() for file in files)
        assert all(Requirement(word) for word in arguments[1:] if word != "-r" and word not in files)
    elif program == "jupyter":
        assert arguments[0] == "nbconvert" and (ROOT / arguments[-1]).exists()
        known = {*NbConvertApp.flags, *NbConvertApp.aliases}
        assert {word.removeprefix("--") for word in arguments if word.startswith("-")} <= known
    else:
        elsewhere = ("cd", "export", "npm")  # the shell's own, and what only the browser tests need
        assert program in elsewhere or shutil.which(program) or importlib.util.find_spec(program), program


def test_there_are_commands_and_snippets():
    assert {words[0] for words in commands()} >= {"pip", "jupyter", "pytest", "python", "accelerate", "torchrun"}
    assert len(blocks("python")) == 2
    assert COPIED.count("```") == 2 * len(blocks("python") + blocks("bash")), "a block of another kind"


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_python_snippet_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    assert out.getvalue() and not errors.getvalue()
    assert list(tmp_path.iterdir()) == []


def lines_of(name: str) -> str:
    """The body of a function of the helper as it stands there, but for docstring, lines that are comments, and indentation."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(h, name))))
    body = ast.parse(source).body[0].body
    first = body[1 if isinstance(body[0], ast.Expr) else 0].lineno
    return textwrap.dedent(without_comments("\n".join(source.split("\n")[first - 1 :])))


def without_comments(code: str) -> str:
    return "".join(line + "\n" for line in code.split("\n") if line.strip() and not line.lstrip().startswith("#"))


@pytest.mark.parametrize("names, code", re.findall(r"<!-- source: (.*?) -->\n```python\n(.*?)^```", README, flags=re.S | re.M))
def test_the_idea_in_readme_is_the_code_that_runs(names, code):
    """The training step and the sampler; lines that are comments may be README's own."""
    wanted = "".join(map(lines_of, names.split()))
    assert without_comments(code) == wanted, f"README's code of {names} should be\n\n{wanted}"


def test_readme_shows_the_training_step_and_the_sampler():
    shown = set(" ".join(re.findall(r"<!-- source: (.*?) -->", README)).split())
    assert {"diffusion_batch", "weighted_nll", "reverse_process"} <= shown
    assert README.count("\n") <= 110


def test_run_everything_is_one_line_and_what_the_tests_run():
    assert [line.split()[0] for line in blocks("bash")[0].splitlines()] == ["pip", "jupyter"]
    executed = [words for words in commands() if words[:2] == ["jupyter", "nbconvert"] and "--execute" in words]
    assert [words[-1] for words in executed] == [notebooks.MAIN, notebooks.BEYOND]
    for words in executed:
        assert ", ".join(map(json.dumps, words[:-1])) in inspect.getsource(notebooks.start)


def test_the_version_of_torch_is_the_one_tried():
    (tried,) = re.findall(r"^torch>=.*tried with (\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M)
    assert set(re.findall(r"torch==(\S+)", README)) == {tried}


WHEELS = {"PIL": "pillow", "IPython": "ipython", "pypandoc": "pypandoc_binary"}  # that are not called as they are imported


def imported(*sources: str) -> set[str]:
    """The packages that code imports, by the names of their wheels: neither ours nor Python's own."""
    found = set(re.findall(r"^ *(?:import|from) (\w+)", "\n".join(sources), flags=re.M))
    ours = {"llada_helpers", "beyond", "bench", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    return {WHEELS.get(name, name) for name in found - ours - set(sys.stdlib_module_names)}


def test_requirements_are_what_is_imported_each_with_its_reason():
    """What the report alone needs is not among them: its import says what to install."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    named = {Requirement(line.split("#")[0]).name for line in lines}
    assert all(re.search(r"# \S", line) for line in lines) and len(named) == len(lines)
    code = [inspect.getsource(module) for module in MODULES.values()] + [(ROOT / "bench.py").read_text()]
    code += [cell for name in (notebooks.MAIN, notebooks.BEYOND) for cell in notebooks.sources(ROOT / name, "code")]
    by_name = {"tensorboard", "jupyter"}  # behind torch.utils, and for who reads a notebook
    said = {"pypandoc_binary", "typst", "playwright"}  # by the report and the page, to whoever makes them
    assert named - by_name == imported(*code) - said


def test_what_the_tests_import_is_in_their_commands():
    """Those in README, which continuous integration runs; what comes with a requirement aside."""
    brought = {"fontTools", "nbconvert", "nbformat", "packaging"}  # by matplotlib, jupyter, accelerate
    known = re.split(r"[\s=]+", " ".join(re.findall(r"^pip install .*$", README, flags=re.M)))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    known += [Requirement(line.split("#")[0]).name for line in lines if line[0] != "#"]
    assert imported(*(path.read_text() for path in (ROOT / "tests").glob("*.py"))) - brought <= set(known)


def test_installed_are_the_helper_and_the_rooms():
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'py-modules = ["llada_helpers"]' in settings and 'packages = ["beyond"]' in settings
    assert not [path for path in (ROOT / "beyond").rglob("*.py") if path.parent.name != "beyond"]


def test_run_the_tests_is_what_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    names = re.findall(r'^run_block "(.*)"$', script, flags=re.M)
    assert "test command" in names
    take = re.search(r"^run_block\(\) \{.*?^\}", script, flags=re.S | re.M)[0]
    for name in names:
        only_say = f'{take}\nbash() {{ :; }}\nrun_block "{name}"'
        done = subprocess.run(["bash", "-euc", only_say], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "+ " + re.search(rf"<!-- {name} -->\n```bash\n(.*?\n)```", README, flags=re.S)[1]
    assert re.search(r"&& pytest( -\S+.*)?\n$", done.stdout), "the tests come last"


def test_the_gpu_script_of_contributing_can_be_read(parse_only, monkeypatch):
    """By bash, and what it hands to Python by Python; each command of ours understands its arguments."""
    (script,) = re.findall(r"<!-- gpu script -->\n```bash\n(.*?)\n```", CONTRIBUTING, flags=re.S)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    parts = re.findall(r"<< 'END'\n(.*?)\nEND$", script, flags=re.S | re.M)
    assert len(parts) == 3 and all(compile(part, "part", "exec") for part in parts)
    assert script.count("part ") == 4 and sum(map(int, re.findall(r"^part \w+ (\d+)", script, flags=re.M))) == 100
    for command in re.findall(r"python3 ((?:-m beyond\.|bench)\S*.*)", script):
        check_script(shlex.split(command), monkeypatch)


def test_presets_table_is_true():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) layers x (\d+), (\d+) characters \|", CONTRIBUTING, flags=re.M)
    told = {name: tuple(map(int, sizes)) for name, *sizes in rows}
    assert told == {name: (preset.n_layer, preset.n_embd, preset.seq_len) for name, preset in h.PRESETS.items()}


def test_map_of_the_house_is_true():
    table = CONTRIBUTING[CONTRIBUTING.index("## Map of the house") :].partition("\n## ")[0]
    paths = [path for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for path in re.findall(r"`(.*?)`", cell)]
    ignored = {line.rstrip("*") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists() and path not in ignored] == []
    here = {name for name in os.listdir(ROOT) if name.endswith((".py", ".md", ".ipynb", ".pdf"))}
    assert {*here, "beyond/"} <= set(paths), "a file that the map does not show"
