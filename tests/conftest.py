"""Shared by all tests: the helper on the path, one hypothesis profile, a clean environment."""

import os
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
