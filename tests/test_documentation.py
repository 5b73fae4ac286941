"""What readers copy: the manual page, the examples in docstrings, and every command and snippet of README."""

import argparse
import contextlib
import doctest
import importlib.util
import inspect
import io
import itertools
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import test_notebook
from accelerate.commands.launch import launch_command_parser
from nbconvert.nbconvertapp import NbConvertApp
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

import llada_helpers as h

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


# --- docstrings ---


def public() -> dict:
    """Functions and classes that the helper defines itself."""
    things = {name: thing for name, thing in vars(h).items() if inspect.isroutine(thing) or inspect.isclass(thing)}
    return {name: thing for name, thing in things.items() if not name.startswith("_") and thing.__module__ == h.__name__}


def test_the_list_of_public_names_is_not_empty():
    assert len(public()) > 50 and {"train", "nelbo", "CharTokenizer", "reverse_process"} <= set(public())


@pytest.mark.parametrize("name", sorted(public()))
def test_public_name_has_a_summary_and_a_runnable_example(name):
    thing = public()[name]
    text = inspect.cleandoc(vars(thing).get("__doc__") or "") if inspect.isclass(thing) else inspect.getdoc(thing) or ""
    summary = text.partition("\n\n")[0]
    assert summary and not summary.startswith((f"{name}(", ">>>")), "a summary in words comes first"
    found = [t for t in doctest.DocTestFinder(recurse=False).find(thing, name, module=h) if t.examples]
    assert found, "no example"
    assert name.lower() in "".join(e.source for e in found[0].examples).lower(), "the example shows something else"
    assert any(e.want for e in found[0].examples), "an example without an output says nothing"
    assert not any(e.options.get(doctest.SKIP) for e in found[0].examples)


def test_examples_hold_in_any_directory_and_shell_and_leave_nothing_behind(tmp_path, monkeypatch):
    for name, value in {"LLADA_DATA": "missing.txt", "LLADA_PRESET": "none", "LLADA_RETRAIN": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for test in doctest.DocTestFinder().find(h):
            doctest.DocTestRunner(verbose=False).run(test, out=said.write)
    assert said.getvalue() == ""
    assert Path.cwd() == tmp_path and list(tmp_path.iterdir()) == []


def test_help_begins_like_a_manual_page():
    page = pydoc.plain(pydoc.render_doc(h))
    start = page[: page.index("\nCLASSES\n")]
    assert re.search(r"\nNAME\n    llada_helpers - LLaDA, .*\.\n\nDESCRIPTION\n", start)
    source = inspect.getsource(h)
    headings = re.findall(r"^# (\d+)\. ([^:\n]*)", source, flags=re.M)
    listed = re.findall(r"^ +(\d+)\. (.*?)  +(.*)$", start, flags=re.M)
    assert [(number, title.split(":")[0]) for number, title, _ in listed] == headings
    bounds = [source.index(f"\n# {number}. ") for number, _ in headings] + [len(source)]
    for (number, _, names), begin, end in zip(listed, bounds, bounds[1:]):
        for name in re.findall(r"\w+", names.partition(";")[0]):
            assert re.search(rf"^(def |class )?{name}\b", source[begin:end], flags=re.M), f"section {number} has no {name}"


# --- README ---


class Parsed(Exception):
    """The command line was understood."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.S | re.M)


def commands() -> list[list[str]]:
    """Every command of the bash blocks, and every `python ...` in running text, as words without assignments and comments."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python [^`]*)`", README)
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


def check_script(script: str, arguments: list[str], monkeypatch) -> None:
    assert (ROOT / script).exists(), script
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = h if script == "llada_helpers.py" else importlib.util.module_from_spec(spec)
    if module is not h:
        spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_is_understood(words, parse_only, monkeypatch):
    program, *arguments = words
    if program == "python":
        check_script(arguments[0], arguments[1:], monkeypatch)
    elif program in ("torchrun", "accelerate"):
        launcher = get_args_parser() if program == "torchrun" else launch_command_parser()
        rest = arguments[1:] if program == "accelerate" else arguments
        assert program == "torchrun" or arguments[0] == "launch"
        with pytest.raises(Parsed):
            launcher.parse_args(rest)
        at = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        check_script(rest[at], rest[at + 1 :], monkeypatch)
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


def test_readme_has_commands_and_snippets():
    assert {words[0] for words in commands()} >= {"pip", "jupyter", "pytest", "python", "accelerate", "torchrun"}
    assert blocks("python")
    assert README.count("```") == 2 * len(blocks("python") + blocks("bash")), "a block of another kind"


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_python_snippet_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert out.getvalue() and not errors.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_run_everything_is_what_the_tests_run(tmp_path, monkeypatch):
    ran = []

    def record(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(test_notebook.subprocess, "run", record)
    test_notebook.execute(tmp_path, data=None)
    (notebook,) = [words for words in commands() if words[:2] == ["jupyter", "nbconvert"] and "--execute" in words]
    assert ran == [[sys.executable, "-m", *notebook]]


def test_run_the_tests_is_what_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    names = re.findall(r'^run_block "(.*)"$', script, flags=re.M)
    assert "test command" in names
    take = re.search(r"^run_block\(\) \{.*?^\}", script, flags=re.S | re.M)[0]
    for name in names:
        only_say = f'{take}\nbash() {{ :; }}\nrun_block "{name}"'
        done = subprocess.run(["bash", "-euc", only_say], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "+ " + re.search(rf"<!-- {name} -->\n```bash\n(.*?\n)```", README, flags=re.S)[1]
    assert done.stdout.endswith("&& pytest\n"), "the tests come last"


def test_presets_table_is_true():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) layers x (\d+), (\d+) characters \|", README, flags=re.M)
    told = {name: tuple(map(int, sizes)) for name, *sizes in rows}
    assert told == {name: (preset.n_layer, preset.n_embd, preset.seq_len) for name, preset in h.PRESETS.items()}


def test_map_of_the_house_is_true():
    table = README[README.index("## Map of the house") :].partition("\n## ")[0]
    paths = [path for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for path in re.findall(r"`(.*?)`", cell)]
    ignored = {line.rstrip("*") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists() and path not in ignored] == []
    here = {name for name in os.listdir(ROOT) if name.endswith((".py", ".md", ".ipynb", ".pdf"))} - {"README.md"}
    assert here <= set(paths), "a file that the map does not show"
