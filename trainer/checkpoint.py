"""Checkpoints of a run: sharded safetensors without a pickle, written whole or not at all.

``step-00000100`` has one file of weights and one of optimizer states per rank (``shard_file.py``),
``training_state.json`` and ``trainer.json`` (steps, groups, place in the data), the model's
``config.json`` and tokenizer, and ``manifest.json`` with the size and CRC-32 of every file. It is
written under a hidden name and renamed when all ranks are done, so a folder with the final name is
whole. Ranks tell each other through small files, not collectives: training can go on meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import FormatError, OutputError
from .pieces import Piece, mine
from .sections import SaveConfig
from .shard_file import file_name, write_pieces

MANIFEST = "manifest.json"
WEIGHTS, STATES = 1, 2
_STEP = re.compile(r"^step-(\d{8,})$")
_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Content:
    """What a rank has to save.

    Attributes:
        weights, states: its pieces; those of states are named ``optim.state.<weight>.<state>``.
        texts: file name to text, on rank 0.
        copies: files to be copied, on rank 0.
    """

    weights: list[Piece]
    states: list[Piece]
    texts: Mapping[str, str]
    copies: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Also:
    """Further formats of a checkpoint.

    Attributes:
        all: called on all ranks with the unfinished folder.
        first: called on rank 0 when the shards are there.
    """

    all: Callable[[Path], None] = lambda folder: None
    first: Callable[[Path], None] = lambda folder: None


def step_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lies in a run's folder."""
    return run / f"step-{step:08d}"


def steps_of(run: Path) -> list[tuple[int, Path]]:
    """Return the finished checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    found = [(int(m[1]), p) for p in run.iterdir() if (m := _STEP.match(p.name)) and p.is_dir()]
    return sorted(found)


def check_files(folder: Path) -> None:
    """Compare a checkpoint with its manifest: names and sizes.

    Raises:
        FormatError: a file is missing or has another size, or the manifest is unreadable.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        sizes = {str(name): int(entry["bytes"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise FormatError(f"{folder}: {name} is missing")
        if file.stat().st_size != size:
            raise FormatError(f"{file}: has {file.stat().st_size} bytes, saved were {size}")


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread where wished.

    All methods that are collective say so.
    """

    def __init__(self, config: SaveConfig, rank: int, world_size: int) -> None:
        self._config = config
        self._rank, self._world = rank, world_size
        self._thread: threading.Thread | None = None
        self._error = ""

    def save(self, step: int, content: Content, also: Also | None = None) -> Path:
        """Write a checkpoint, after the one before it is finished; collective.

        With ``asynchronous`` the data is copied and this returns before it is written.

        Args:
            step: steps done.
            content: of this rank.
            also: writes other formats into the folder; ``also.all`` on all ranks at once, then
                ``also.first`` on rank 0 when all files are there.

        Raises:
            OutputError: this or the last one could not be written, on any rank.
        """
        self.wait()
        also = also or Also()
        final = step_folder(self._config.folder, step)
        part = final.with_name(f".{final.name}.tmp")
        if self._rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self._barrier()
        wait = not self._config.asynchronous
        chosen = Content(
            _on_cpu(mine(content.weights, self._rank, self._world), copy=not wait),
            _on_cpu(mine(content.states, self._rank, self._world), copy=not wait),
            content.texts,
            content.copies,
        )
        also.all(part)
        self._thread = threading.Thread(
            target=self._write, args=(part, final, chosen, also), daemon=True, name=f"save-{step}"
        )
        self._thread.start()
        if wait:
            self.wait()
        return final

    def wait(self) -> None:
        """Wait until nothing is being written; collective.

        Raises:
            OutputError: the last checkpoint could not be written, on any rank.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        errors: list[str | None] = [None] * self._world
        if self._world > 1:
            dist.all_gather_object(errors, self._error)
        else:
            errors = [self._error]
        self._error = ""
        first = next((e for e in errors if e), None)
        if first:
            raise OutputError(f"{self._config.folder}: the checkpoint was not saved: {first}")

    def _barrier(self) -> None:
        if self._world > 1:
            dist.barrier()

    def _write(self, part: Path, final: Path, content: Content, also: Also) -> None:
        """Write this rank's files; on rank 0 also wait for the others and finish."""
        try:
            done = {}
            for number, pieces in ((WEIGHTS, content.weights), (STATES, content.states)):
                name = file_name(self._rank, number, STATES)
                done[name] = _entry(*write_pieces(part / name, pieces))
            if self._rank == 0:
                done |= _write_rest(part, content)
            _write_text(part / f".rank-{self._rank}.tmp", json.dumps(done))
            (part / f".rank-{self._rank}.tmp").replace(part / f".rank-{self._rank}")
            if self._rank == 0:
                self._finish(part, final, also)
        except BaseException as error:
            self._error = f"rank {self._rank}: {error or type(error).__name__}"
            with suppress(OSError):  # the folder is gone or full; this rank tells it in wait()
                (part / f".failed-{self._rank}").write_text(self._error, encoding="utf-8")

    def _finish(self, part: Path, final: Path, also: Also) -> None:
        files: dict[str, Any] = {}
        for rank in range(self._world):
            said = part / f".rank-{rank}"
            while not said.exists():
                failed = next(iter(part.glob(".failed-*")), None)
                if failed is not None:
                    raise OutputError(failed.read_text(encoding="utf-8"))
                time.sleep(_POLL)
            files |= json.loads(said.read_text(encoding="utf-8"))
            said.unlink()
        also.first(part)
        for path in sorted(p for p in part.rglob("*") if p.is_file()):
            name = path.relative_to(part).as_posix()
            files.setdefault(name, {"bytes": path.stat().st_size})
        _write_text(part / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1) + "\n")
        _sync(part)
        _move(part, final)
        self._prune()

    def _prune(self) -> None:
        """Delete what ``keep_last`` and ``keep_every`` do not keep."""
        keep, every = self._config.keep_last, self._config.keep_every
        if not keep:
            return
        for step, folder in steps_of(self._config.folder)[:-keep]:
            if not (every and step % every == 0):
                _delete(folder)


def _on_cpu(pieces: list[Piece], *, copy: bool) -> list[Piece]:
    return [Piece(p.name, p.offsets, p.data.to("cpu", copy=copy)) for p in pieces]


def _write_rest(part: Path, content: Content) -> dict[str, Any]:
    done = {}
    for name, text in content.texts.items():
        _write_text(part / name, text)
        data = text.encode()
        done[name] = _entry(len(data), zlib.crc32(data))
    for path in content.copies:
        data = path.read_bytes()
        (part / path.name).write_bytes(data)
        done[path.name] = _entry(len(data), zlib.crc32(data))
    return done


def _entry(size: int, crc: int) -> dict[str, Any]:
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _move(part: Path, final: Path) -> None:
    """Put a finished folder in its place, and away what a run before left there."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    part.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Delete a checkpoint; never is a part of it there under its name."""
    away = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)
