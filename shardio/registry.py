"""Finding the format of a path, and opening it.

Every module of ``shardio/formats/`` with a ``FORMAT`` is a format: dropping a file there adds one.
The root package lists such folders (``FORMAT_PACKAGES``), so that floors above can add theirs.
``detect`` looks at names and magic bytes only. The path a user types is often one level off
(``checkpoint-100/``, a rank file, the run's root), so its neighbours are tried too, nearest first.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ..errors import ConfigError, FormatError, did_you_mean
from .checkpoint import Checkpoint
from .dequant import dequantized
from .gc_pause import collection_paused
from .worlds import world_of

_MAX_DIMS = 32  # of numpy before 2.0
_TRACKERS = ("latest", "latest_checkpointed_iteration.txt", "latest_universal")
_PARTS = re.compile(r"^(?:optim|train)", re.IGNORECASE)  # of one checkpoint
_NUMBERED = re.compile(
    r"^(?:epoch=\d+-)?(?:checkpoint|ckpt|global_step|iter|iteration|step|epoch|ep)?[-_=]?(\d+)"
    r"(?:\.ckpt)?$"
)


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What a user may say when opening.

    Attributes:
        config: a config.json, or a folder with one (and the tokenizer).
    """

    config: Path | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One on-disk format.

    Attributes:
        name: what ``--format`` and ``Layout.format`` call it.
        title: for people.
        detect: given a file or folder, the root of a checkpoint of this format there, or None.
            Reads names and magic bytes only; never raises for foreign content.
        open: opens a root that ``detect`` returned. Reads metadata, no tensor bytes.
        rank: lower wins when several formats see something in one folder.
    """

    name: str
    title: str
    detect: Callable[[Path], Path | None]
    open: Callable[[Path, OpenOptions], Checkpoint]
    rank: int = 50


@lru_cache(maxsize=1)
def formats() -> tuple[Format, ...]:
    """All formats of the folders that the root package names, by rank and name."""
    root = importlib.import_module("..", __package__)
    found = []
    for folder in root.FORMAT_PACKAGES:
        package = importlib.import_module(folder, root.__name__)
        for module in pkgutil.iter_modules(package.__path__):
            name = f"{package.__name__}.{module.name}"
            fmt = getattr(importlib.import_module(name), "FORMAT", None)
            if isinstance(fmt, Format):
                found.append(fmt)
    return tuple(sorted(found, key=lambda f: (f.rank, f.name)))


def get_format(name: str) -> Format:
    """Return the format of that name. Raises ConfigError with the closest known name."""
    for fmt in formats():
        if fmt.name == name:
            return fmt
    names = [f.name for f in formats()]
    raise ConfigError(
        f"unknown format {name!r}{did_you_mean(name, names)}; known: {', '.join(names)}"
    )


def open_checkpoint(
    path: str | Path,
    *,
    format: str | None = None,
    config: str | Path | None = None,
    adapter: str | Path | None = None,
    decode: bool = True,
) -> Checkpoint:
    """Open any checkpoint. Reads metadata only; tensors are read when asked for.

    Args:
        path: the checkpoint folder, a folder one level above or below it, or one of its files.
        format: name of the format when it shall not be found out.
        config: a config.json or a model folder, for checkpoints that carry none.
        adapter: folder of a PEFT adapter to be merged in.
        decode: give quantized weights as plain ones.

    Raises:
        FormatError: nothing readable there, or a checkpoint that is broken or incomplete.
        ConfigError: unknown format name, unreadable config.
        UnsupportedError: a kind of data or adapter that mconv does not handle.
    """
    start = Path(path)
    options = OpenOptions(config=Path(config) if config is not None else None)
    try:
        if not start.exists():
            raise FormatError(f"{start}: no such file or folder")
        fmt, root = locate(start, format)
        with collection_paused():
            found = _in_its_world(_within_numpy(fmt.open(root, options)))
            found = dequantized(found) if decode else found
        _check_holds(start, root, found)
        if adapter is not None:
            from .peft import merge_adapter

            found = merge_adapter(found, Path(adapter))
    except OSError as e:  # links in a circle, no permission, names that are too long
        raise FormatError(f"{e.filename or start}: cannot be read ({e.strerror})") from e
    return found


def _within_numpy(found: Checkpoint) -> Checkpoint:
    """Refuse tensors of more dims than numpy arrays can have: only an attacker writes them."""
    for group in (found.weights, *found.optimizer.values()):
        for name, tensor in group.items():
            if tensor.ndim > _MAX_DIMS:
                raise FormatError(
                    f"{found.path}: {name[:100]!r} has {tensor.ndim} dims, at most {_MAX_DIMS} "
                    "can be read"
                )
    return found


def _in_its_world(found: Checkpoint) -> Checkpoint:
    """Name the world of tensor names that the container does not tell."""
    if found.naming != "hf":
        return found
    naming = world_of(found.weights, found.format)
    return found if naming == "hf" else replace(found, naming=naming)


def _check_holds(start: Path, root: Path, found: Checkpoint) -> None:
    """Refuse a checkpoint found one level above of which nothing lies where the user pointed: the
    folder of a lost save must not become another step of the same run.
    """
    asked = (start if start.is_dir() else start.parent).resolve()
    if root.resolve().is_relative_to(asked):
        return
    groups = (found.weights, *found.optimizer.values())
    lists = {id(f): f for g in groups for t in g.values() if (f := t.files())}
    held = {path.parent for files in lists.values() for path in files}
    if any(folder.resolve().is_relative_to(asked) for folder in held):
        return
    raise FormatError(
        f"{start}: no checkpoint found here. {_what_is_there(start)} The {found.format} "
        f"checkpoint {found.path} beside it does not include it; name that one if it is meant"
    )


def locate(start: Path, format: str | None = None) -> tuple[Format, Path]:
    """Return the format and the root that ``open_checkpoint`` would use.

    Raises:
        FormatError: no format recognises the path or its neighbours.
    """
    known = (get_format(format),) if format else formats()
    for place in _neighbours(start):
        for fmt in known:
            root = fmt.detect(place)
            if root is not None:
                _check_only(start, place, known)
                return fmt, root
    names = ", ".join(f.title for f in known)
    raise FormatError(
        f"{start}: no checkpoint found here, one level above or one level below "
        f"(looked for: {names}). " + _what_is_there(start)
    )


def _check_only(start: Path, place: Path, known: tuple[Format, ...]) -> None:
    """Refuse a folder of several checkpoints where nothing tells which is meant.

    Steps are told by their numbers, and an optimizer in a folder of its own is no model.
    """
    if place.parent != start or place in _told(start):
        return
    others = []
    for child in _unnumbered(start):
        beside = place.resolve() != child.resolve() and not _PARTS.match(child.name)
        if beside and any(fmt.detect(child) is not None for fmt in known):
            others.append(child.name)
    if others:
        names = ", ".join(sorted([place.name, *others])[:8])
        raise FormatError(
            f"{start}: {len(others) + 1} checkpoints lie in this folder and nothing tells which "
            f"is meant: {names}; name one of them"
        )


def _told(start: Path) -> Iterator[Path]:
    """The children that a tracker file or their number names, nearest first."""
    for tracker in _TRACKERS:
        file = start / tracker
        if file.is_file() and file.stat().st_size < 4096:
            name = file.read_text(encoding="utf-8", errors="replace").strip()
            if name and "/" not in name and os.path.isdir(start / name):  # noqa: PTH112
                yield start / name
    children = [c for c in start.iterdir() if c.is_dir() and not c.name.startswith(".")]
    numbered = [(int(m[1]), c) for c in children if (m := _NUMBERED.match(c.name))]
    yield from (c for _, c in sorted(numbered, reverse=True))


def _unnumbered(start: Path) -> list[Path]:
    children = [c for c in start.iterdir() if c.is_dir() and not c.name.startswith(".")]
    return sorted(c for c in children if not _NUMBERED.match(c.name))


def _neighbours(start: Path) -> Iterator[Path]:
    yield start
    if start.is_dir():
        yield from _told(start)
        yield from _unnumbered(start)
    else:
        yield start.parent
    parent = start.resolve().parent if start.is_dir() else start.resolve().parent.parent
    yield parent


def _what_is_there(start: Path) -> str:
    if not start.is_dir():
        plain = start.is_file()
        return f"The file has {start.stat().st_size} bytes." if plain else "It is not a plain file."
    names = sorted(c.name for c in start.iterdir())[:8]
    return f"The folder holds: {', '.join(names)}." if names else "The folder is empty."
