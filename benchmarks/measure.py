"""Running a command and measuring it: wall time, CPU seconds, peak resident memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one process (and its children) took.

    Attributes:
        name: of the tool.
        wall: seconds.
        cpu: user + system seconds.
        rss: peak resident memory of the largest process, in MB.
        ok: whether it exited with 0.
    """

    name: str
    wall: float
    cpu: float
    rss: float
    ok: bool


_CHILD = """
import os, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
wall = time.perf_counter() - start
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print("@@", wall, use.ru_utime + use.ru_stime, use.ru_maxrss / 1024, code)
"""


def run(
    name: str, command: Sequence[str | Path], *, env: dict[str, str] | None = None
) -> Measurement:
    """Run a command to its end and measure it."""
    out = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
    )
    line = next((s for s in out.stdout.splitlines() if s.startswith("@@")), "@@ nan nan nan 1")
    wall, cpu, rss, code = line.split()[1:]
    if code != "0":
        print(f"{name} failed:\n{out.stderr[-800:]}", file=sys.stderr)
    return Measurement(name, float(wall), float(cpu), float(rss), code == "0")


def best(runs: Sequence[Measurement]) -> Measurement:
    """The run with the least CPU: the one least disturbed by a noisy machine."""
    return min(runs, key=lambda m: m.cpu)


def table(title: str, rows: Sequence[Measurement], base: str) -> None:
    """Print a table with ratios to the row named ``base``."""
    ref = next(r for r in rows if r.name == base)
    print(f"\n{title}")
    print(f"{'tool':34} {'wall s':>8} {'CPU s':>8} {'RSS MB':>8}   x wall   x CPU   (of {base})")
    for r in rows:
        mark = "" if r.ok else "  FAILED"
        print(
            f"{r.name:34} {r.wall:8.2f} {r.cpu:8.2f} {r.rss:8.0f} "
            f"{r.wall / ref.wall:8.2f} {r.cpu / ref.cpu:7.2f}{mark}"
        )


def warm(*folders: Path) -> None:
    """Read the inputs once, so that every tool starts from the same warm page cache."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as f:
                    while f.read(1 << 24):
                        pass
