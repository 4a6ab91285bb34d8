"""Checkpoints of a run: sharded safetensors without a pickle, written whole or not at all.

``step-00000100`` has one file of weights and one of optimizer states per rank (``shards.py``),
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import FormatError, OutputError
from .settings.sections import SaveConfig
from .shards import Piece, file_name, mine, write_pieces

MANIFEST = "manifest.json"
_STEP = re.compile(r"^step-(\d{8,})$")
_POLL = 0.02


def _nothing(folder: Path) -> None:
    """No further format."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a rank has to save.

    Attributes:
        weights, states: its pieces; those of states are named ``optim.state.<weight>.<state>``.
        files: name to contents, on rank 0.
        on_all: writes more into the unfinished folder; called on all ranks, by ``save`` itself.
        on_first: the same, called on rank 0 when all shards are there.
    """

    weights: list[Piece]
    states: list[Piece]
    files: Mapping[str, bytes] = field(default_factory=dict)
    on_all: Callable[[Path], None] = _nothing
    on_first: Callable[[Path], None] = _nothing


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


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run's folder, and why newer ones are passed over."""
    notes: list[str] = []
    for _, folder in reversed(steps_of(run)):
        if not (folder / MANIFEST).exists() and any(folder.glob("*.metadata")):
            return folder, notes  # torch's own format has its own marker
        try:
            check_files(folder)
        except FormatError as error:
            notes.append(str(error))
        else:
            return folder, notes
    return None, notes


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread where wished."""

    def __init__(self, config: SaveConfig) -> None:
        self._config = config
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._thread: threading.Thread | None = None
        self._error = ""

    def save(self, step: int, content: Content) -> Path:
        """Write a checkpoint after the one before it is finished; every rank calls this.

        With ``asynchronous`` the data is copied and this returns before it is written.

        Raises:
            OutputError: this or the last one could not be written, on any rank.
        """
        self.wait()
        final = step_folder(self._config.folder, step)
        part = final.with_name(f".{final.name}.tmp")
        if self._rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        dist.barrier()
        later = self._config.asynchronous
        chosen = [_on_cpu(mine(held), copy=later) for held in (content.weights, content.states)]
        content.on_all(part)
        self._thread = threading.Thread(
            target=self._write, args=(part, final, chosen, content), daemon=True
        )
        self._thread.start()
        if not later:
            self.wait()
        return final

    def wait(self) -> None:
        """Wait until nothing is being written; every rank calls this.

        Raises:
            OutputError: the last checkpoint could not be written, on any rank.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        errors = [""] * self._world
        dist.all_gather_object(errors, self._error)
        self._error = ""
        first = next((e for e in errors if e), None)
        if first:
            raise OutputError(f"{self._config.folder}: the checkpoint was not saved: {first}")

    def _write(self, part: Path, final: Path, chosen: list[list[Piece]], content: Content) -> None:
        """Write this rank's files; on rank 0 also wait for the others and finish."""
        try:
            done = {}
            for number, pieces in enumerate(chosen, 1):
                name = file_name(self._rank, number, len(chosen))
                done[name] = _entry(*write_pieces(part / name, pieces))
            for name, data in content.files.items():
                _write_bytes(part / name, data)
                done[name] = _entry(len(data), zlib.crc32(data))
            _write_bytes(part / f".rank-{self._rank}.tmp", json.dumps(done).encode())
            (part / f".rank-{self._rank}.tmp").replace(part / f".rank-{self._rank}")
            if self._rank == 0:
                self._finish(part, final, content)
        except BaseException as error:
            self._error = f"rank {self._rank}: {error or type(error).__name__}"
            with suppress(OSError):  # the folder is gone or full; this rank tells it in wait()
                (part / f".failed-{self._rank}").write_text(self._error, encoding="utf-8")

    def _finish(self, part: Path, final: Path, content: Content) -> None:
        """Write the manifest, put the folder in its place and delete what is not kept."""
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
        content.on_first(part)
        for path in sorted(p for p in part.rglob("*") if p.is_file()):
            name = path.relative_to(part).as_posix()
            files.setdefault(name, {"bytes": path.stat().st_size})
        manifest = json.dumps({"version": 1, "files": files}, indent=1) + "\n"
        _write_bytes(part / MANIFEST, manifest.encode())
        _sync(part)
        old = _hidden(final) if final.exists() else None  # what a run before left there
        part.rename(final)
        _sync(final.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        keep, every = self._config.keep_last, self._config.keep_every
        for step, folder in steps_of(self._config.folder)[:-keep] if keep else ():
            if not (every and step % every == 0):
                shutil.rmtree(_hidden(folder), ignore_errors=True)


def _on_cpu(pieces: list[Piece], *, copy: bool) -> list[Piece]:
    return [Piece(p.name, p.offsets, p.data.to("cpu", copy=copy)) for p in pieces]


def _entry(size: int, crc: int) -> dict[str, Any]:
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _hidden(folder: Path) -> Path:
    """Rename a checkpoint that goes: no part of one is ever there under its name."""
    away = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(away, ignore_errors=True)
    return folder.rename(away)
