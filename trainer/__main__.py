"""One rank of a run: ``python -m mconv.trainer RUN.toml STORE RANK WORLD_SIZE [SETTING...]``.

Started by ``launch.py``, never by hand. ``STORE`` is the file through which the ranks meet.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import MconvError
from ..shardio.team import leave


def main(run: str, store: str, rank: str, world_size: str, *settings: str) -> int:
    """Train one rank; return the exit status."""
    from .launch import end_with_the_launcher, run_rank
    from .settings import load_config

    end_with_the_launcher()
    try:
        config = load_config(Path(run), settings)
        run_rank(config, int(rank), int(world_size), Path(store))
    except MconvError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
