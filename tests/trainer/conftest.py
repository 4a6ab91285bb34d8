"""One server of forked ranks per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from .ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Call it with a function of the test's module, a number of ranks, and arguments."""
    pytest.importorskip("torch")
    server = Ranks()
    yield server
    server.close()


@pytest.fixture
def check(ranks: Ranks) -> Callable[..., None]:
    """Call it with a layout and a model: it must train as the plain loop does."""
    from .toys import check

    return partial(check, ranks)
