"""What the tests of resumed training share: running a matrix, and how far apart losses are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

Losses = dict[str, list[float]]


def run_matrix(script: Path, cases: Iterable[str], out: Path) -> dict[str, Losses]:
    """Run cases of ``resume_matrix`` or ``parallel_matrix`` in a process of their own."""
    done = subprocess.run(
        [sys.executable, script, out, *cases],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Losses] = json.loads(out.read_text())
    return found


def gap(losses: Losses) -> float:
    """How far the control without moments is from the truth, at the most."""
    return max(abs(a - b) for a, b in zip(losses["truth"], losses["control"], strict=True))
