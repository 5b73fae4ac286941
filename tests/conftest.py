"""Shared by all tests: the helper on the path, one hypothesis profile, a clean environment, workers that share the cores."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
settings.register_profile("thorough", deadline=None, max_examples=10_000, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

LONGEST = ("test_notebook", "test_training", "test_browser", "test_colab", "test_experiments", "test_page")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """A preset, a corpus or a forced retraining in the caller's shell must not change what is tested."""
    for name in ("LLADA_DATA", "LLADA_PRESET", "LLADA_RETRAIN"):
        monkeypatch.delenv(name, raising=False)
