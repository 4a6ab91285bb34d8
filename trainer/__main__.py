"""One rank of a run: ``python -m mconv.trainer RUN.toml STORE RANK WORLD_SIZE``.

Started by ``launch.py``, never by hand. ``STORE`` is the file through which the ranks meet.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from ..errors import MconvError

_LOOPBACKS = ("lo", "lo0")


def main(run: str, store: str, rank: str, world_size: str) -> int:
    """Train one rank; return the exit status."""
    from .config import load_config
    from .degrees import resolve
    from .loop import train
    from .mesh import build_meshes, choose_device, process_group, set_threads

    _prefer_loopback()
    try:
        config = load_config(Path(run))
        set_threads(config.train.threads, int(world_size))
        degrees = resolve(config, int(world_size))
        device = choose_device(config.train.device)
        with process_group(int(rank), int(world_size), Path(store), device):
            train(config, build_meshes(degrees, device))
    except MconvError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _prefer_loopback() -> None:
    """Let gloo connect over the loopback interface: all ranks are here.

    Its own choice is the interface of the host name's address, which a VPN or a missing entry in
    the hosts file leads astray.
    """
    for _, name in socket.if_nameindex():
        if name in _LOOPBACKS:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
