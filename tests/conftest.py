"""Shared by all tests: the helper on the path, one hypothesis profile, a clean environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
settings.register_profile("thorough", deadline=None, max_examples=10_000, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """A preset, a corpus or a forced retraining in the caller's shell must not change what is tested."""
    for name in ("LLADA_DATA", "LLADA_PRESET", "LLADA_RETRAIN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def patch_like(monkeypatch):
    """Replace a function of a module by a wrapper that keeps its source, so that fingerprints of code stay the same."""
    import functools

    def patch(module, name, make_wrapper):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, functools.wraps(original)(make_wrapper(original)))

    return patch


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository with the files of this working tree."""
    root, directory = Path(__file__).resolve().parent.parent, tmp_path / "repository"
    directory.mkdir()
    for name in ("EG_TakeHome_LLaDA.ipynb", "llada_helpers.py", "requirements.txt"):
        (directory / name).write_bytes((root / name).read_bytes())
    git = ["git", "-C", str(directory), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    return directory
