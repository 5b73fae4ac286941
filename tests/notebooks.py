"""The two notebooks, for several test files: their cells, and a clone of the working tree to run them in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN, BEYOND = "EG_TakeHome_LLaDA.ipynb", "Beyond_the_Assignment.ipynb"
BESIDE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
CORPUS = os.environ.get("LLADA_DATA") or (str(BESIDE) if BESIDE.exists() else None)
OFFLINE = {name: "http://127.0.0.1:9" for name in ("https_proxy", "HTTPS_PROXY")}  # a download fails at once


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def sources(path: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in cells(path, kind)]


def outputs(path: Path) -> list[dict]:
    return [output for c in cells(path, "code") for output in c["outputs"]]


def printed(path: Path) -> str:
    return "".join("".join(o["text"]) for o in outputs(path) if o["output_type"] == "stream")


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def clone(directory: Path) -> Path:
    """A repository in `directory` whose one commit is the working tree as it is, without what git ignores."""
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        git(directory, *arguments)
    return directory


def python_path(*first) -> str:
    """PYTHONPATH that begins with these folders and keeps the caller's, where packages may be, without those of our own code."""
    callers = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join([*map(str, first), *(entry for entry in callers if not (Path(entry) / "llada_helpers.py").exists())])


def start(directory: Path, name: str, **environment: str) -> subprocess.Popen:
    """Execute a notebook in place, in smoke and on one core, so that two can run side by side."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LLADA_")} | {"PYTHONPATH": python_path()}
    kept |= {"LLADA_PRESET": "smoke", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(directory.parent / "cache")}
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", name]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=directory, env=kept | environment, **pipes)


def finish(*running: subprocess.Popen) -> None:
    said = [process.communicate()[1] for process in running]
    for process, errors in zip(running, said):
        assert process.returncode == 0, errors[-3000:]
