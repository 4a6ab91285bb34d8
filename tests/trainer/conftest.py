"""One server of forked ranks per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Call it with a function of the test's module, a number of ranks, and arguments."""
    pytest.importorskip("torch")
    server = Ranks()
    yield server
    server.close()
