"""What the end-to-end tests share: the command line in this process or in one of its own, copies of
checkpoints that may be damaged, and the contract of a refusal.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mconv.cli import main
from mconv.shardio.source import close_files

TRAINED = Path(__file__).parent.parent / "fixtures" / "trained"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


def mconv(*args: object) -> Outcome:
    """Run a command in this process (fast: nothing is imported again)."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in args])
        except SystemExit as e:
            code = e.code
    close_files()
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), _COLOUR.sub("", err.getvalue()))


def command(*args: object) -> list[str]:
    """Return the command line of a process of its own."""
    return [sys.executable, "-m", "mconv", *map(str, args)]


def process(*args: object, **options: object) -> Outcome:
    """Run a command in a process of its own."""
    done = subprocess.run(command(*args), capture_output=True, text=True, check=False, **options)
    return Outcome(done.returncode, done.stdout, _COLOUR.sub("", done.stderr))


def copy(source: Path, target: Path) -> Path:
    """Copy a checkpoint so that it can be damaged (the originals may be read-only)."""
    shutil.copytree(source, target)
    for folder, _, names in os.walk(target):
        for path in (Path(folder), *(Path(folder, n) for n in names)):
            path.chmod(path.stat().st_mode | 0o700)
    return target


def tree(folder: Path) -> list[str]:
    """Return every name below a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def assert_refused(done: Outcome, written: Path) -> str:
    """Check the contract of bad input: one clear error, exit code 2, nothing written.

    Args:
        done: what the command did.
        written: the folder it was told to write into; it must be empty or missing.

    Returns:
        The message.
    """
    assert "Traceback" not in done.err, done.err
    assert done.code == 2, done
    first, *more = done.err.splitlines()
    assert first.startswith("error: "), done.err
    assert len(first) > len("error: ") + 10, done.err
    if more:  # a list of unknown tensors, and what to do about it
        assert first.endswith(":"), done.err
        assert all(line.startswith("  ") for line in more[:-1]), done.err
    assert not done.out, done.out
    assert not written.exists() or tree(written) == [], tree(written)
    return done.err
