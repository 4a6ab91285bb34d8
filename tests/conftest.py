"""Shared fixtures: where the checkpoints of the real frameworks and the real data live."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No deadlines: the machines that run this are noisy. CI draws the same examples every time, so that
# a red run speaks of the change; everywhere else each run draws new ones.
settings.register_profile("mconv", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("mconv")

ROOT = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set {variable}")
    return path


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Checkpoints written by the real frameworks (``MCONV_TEST_FIXTURES``)."""
    return _folder("MCONV_TEST_FIXTURES", "fixtures")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real tokenizers, text and vocabularies (``MCONV_TEST_DATA``)."""
    return _folder("MCONV_TEST_DATA", "data")
