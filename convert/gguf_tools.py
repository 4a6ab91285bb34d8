"""GGUF files as such: set metadata, merge and split, hash.

Tensor data are copied, never decoded. Split sets are those of llama.cpp's ``gguf-split``, hashes
those of its ``gguf-hash``: digests of the raw data of each tensor, and of all in the file's order.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, OutputError, UnsupportedError, did_you_mean
from ..shardio.staging import fingerprint, write_loose
from ..shardio.stream import Limits, OutFile, Progress
from .gguf import GgufFile, KeyValue, TensorSpec, open_gguf
from .gguf.edit import without
from .gguf.encode import copied
from .gguf.files import SPLIT_KEYS, OutTensor, cut_by_size, plan_files
from .gguf.inplace import fits, new_header, repair, undo_path, write_header
from .gguf.known_keys import misspelt
from .gguf.settings import apply_settings
from .gguf.tensors import GgufTensors

#: Name space of the version 5 UUIDs that llama.cpp gives models.
_UUID_SPACE = uuid.UUID("ef001206-dadc-5f6d-a15f-3359e577d4e5")
ALGORITHMS = ("sha256", "sha1", "uuid")
_CHUNK = 8 << 20
_STRUCTURAL = ("general.alignment", *SPLIT_KEYS)


@dataclass(frozen=True, slots=True)
class ToolReport:
    """What a tool did, or would do.

    Attributes:
        files: path to bytes of what was written.
        changes: metadata keys that changed, with old and new value as shown to people.
        in_place: only the header was written.
        warnings: what a user should know.
    """

    files: dict[Path, int]
    changes: tuple[tuple[str, KeyValue | None, KeyValue | None], ...] = ()
    in_place: bool = False
    warnings: tuple[str, ...] = ()


def set_metadata(
    path: str | Path,
    settings: Sequence[str] = (),
    *,
    delete: Sequence[str] = (),
    out: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ToolReport:
    """Change the metadata of one file, in place where the header keeps its length.

    Args:
        path: the file (of a split set the first, which holds the metadata).
        settings: ``KEY=VALUE`` (see ``gguf.settings``).
        delete: keys to take out.
        out: write another file instead.
        force, resume: replace ``out``; continue an interrupted run.
        dry_run: only tell.
        limits, progress: memory and threads; called with (bytes done, bytes in all).

    Raises:
        ConfigError: a bad setting, an unknown key, or one that the layout depends on.
        OutputError: the disk refuses, or an interrupted edit waits to be repaired.
    """
    source = Path(path)
    _refuse_interrupted(source)
    file = open_gguf(source, follow_splits=False)
    before = dict(file.entries)
    for key in delete:
        if key not in before:
            raise ConfigError(f"{source}: has no key {key!r}{did_you_mean(key, before)}")
    kept = [e for e in before.values() if e.key not in delete]
    after = {e.key: e for e in apply_settings(kept, settings)}
    changes = _changes(before, after)
    for key, _, _ in changes:
        if key in _STRUCTURAL:
            raise ConfigError(
                f"{source}: the file's layout depends on {key}; use `mconv gguf split` or `merge`"
            )
    header = new_header(file, list(after.values()))
    target = source if out is None else Path(out)
    in_place = out is None and fits(file, header)
    notes = misspelt(settings, kept)
    report = ToolReport({target: source.stat().st_size}, changes, in_place, notes)
    if dry_run or (not changes and out is None):
        return report
    if in_place:
        write_header(source, header)
        return report
    files = plan_files(
        target.name, list(after.values()), [_tensors(file)], alignment=file.alignment
    )
    _write(target, files, file, force or out is None, resume, limits, progress)
    return ToolReport({target: files[0].size}, changes, in_place, notes)


def merge(
    path: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ToolReport:
    """Merge a split set (given any of its files) into one file.

    Raises:
        ConfigError: the file is not split.
        FormatError: files of the set are missing or do not belong together.
    """
    file = open_gguf(path)
    if len(file.paths) < 2:
        raise ConfigError(f"{path}: is not split")
    entries = without(file.entries.values(), SPLIT_KEYS)
    target = Path(out)
    files = plan_files(target.name, entries, [_tensors(file)], alignment=file.alignment)
    report = ToolReport({target: files[0].size})
    if not dry_run:
        _write(target, files, file, force, resume, limits, progress)
    return report


def split(
    path: str | Path,
    out: str | Path,
    *,
    max_size: int | None = None,
    max_tensors: int | None = None,
    empty_first: bool = False,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ToolReport:
    """Split a file (or a split set anew).

    Args:
        path: the model.
        out: name of the outputs, which get ``-00001-of-0000N`` before ``.gguf``.
        max_size: bytes of tensor data per file.
        max_tensors: tensors per file.
        empty_first: the first file holds metadata only.
        force, resume, dry_run, limits, progress: as for ``set_metadata``.

    Raises:
        ConfigError: no limit, or one that gives a single file.
    """
    if max_size is None and max_tensors is None:
        raise ConfigError("give --max-shard-size or --max-shard-tensors")
    file = open_gguf(path)
    shards = cut_by_size(_tensors(file), max_size, file.alignment, max_tensors)
    shards = [[], *shards] if empty_first else shards
    if len(shards) < 2:
        raise ConfigError(f"{path}: fits into one file, there is nothing to split")
    entries = without(file.entries.values(), SPLIT_KEYS)
    target = Path(out)
    files = plan_files(target.name, entries, shards, alignment=file.alignment)
    report = ToolReport({target.parent / f.name: f.size for f in files})
    if not dry_run:
        _write(target, files, file, force, resume, limits, progress)
    return report


def hashes(
    path: str | Path,
    algorithms: Sequence[str] = ("sha256",),
    *,
    per_tensor: bool = True,
    progress: Progress | None = None,
) -> Iterator[tuple[str, str, str]]:
    """Yield (algorithm, digest, tensor name); the model's own come last, with an empty name.

    Args:
        path: the file, or any of a split set.
        algorithms: of ``ALGORITHMS``; ``uuid`` is of the model only.
        per_tensor: the tensors' too.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: another algorithm.
    """
    unknown = [name for name in algorithms if name not in ALGORITHMS]
    if unknown:
        raise ConfigError(f"unknown hash {unknown[0]!r}; known: {', '.join(ALGORITHMS)}")
    file = open_gguf(path)
    whole = {name: _new(name) for name in algorithms}
    done, total = 0, sum(info.nbytes for info in file.tensors.values())
    for name in file.tensors:
        own = {a: _new(a) for a in algorithms if per_tensor and a != "uuid"}
        raw = file.raw(name)
        for start in range(0, len(raw), _CHUNK):
            part = raw[start : start + _CHUNK]
            for digest in (*own.values(), *whole.values()):
                digest.update(part.data)
            done += len(part)
            if progress is not None:
                progress(done, total)
        yield from ((a, digest.hexdigest(), name) for a, digest in own.items())
    for name, digest in whole.items():
        yield name, _model_digest(name, digest), ""


def check_manifest(path: str | Path, manifest: str | Path) -> tuple[list[str], list[str]]:
    """Compare a file with a list of hashes; return what differs, and what the list does not have.

    Args:
        path: the model.
        manifest: lines of ``ALGORITHM DIGEST FILE:TENSOR`` (or ``FILE``), as ``hash`` prints them.

    Raises:
        ConfigError: the manifest has no line of this kind.
    """
    known: dict[tuple[str, str], str] = {}
    try:
        lines = Path(manifest).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = []
    for line in lines:
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[0] in ALGORITHMS:
            _, colon, tensor = words[2].rpartition(".gguf:")
            known[words[0], tensor if colon else ""] = words[1]
    if not known:
        raise ConfigError(f"{manifest}: has no line such as `sha256 DIGEST FILE:TENSOR`")
    used = list(dict.fromkeys(algorithm for algorithm, _ in known))
    wrong, extra, seen = [], [], set()
    for algorithm, digest, name in hashes(path, used):
        want = known.get((algorithm, name))
        seen.add((algorithm, name))
        if want is None:
            extra.append(f"{algorithm} {name or 'model'}")
        elif want != digest:
            wrong.append(f"{algorithm} {name or 'model'}: is {digest}, the list says {want}")
    wrong += [f"{algorithm} {name}: is not in the file" for algorithm, name in known.keys() - seen]
    return wrong, extra


def repair_file(path: str | Path) -> str:
    """Finish or undo an interrupted edit; return what was done, empty for nothing."""
    return repair(Path(path))


def _refuse_interrupted(path: Path) -> None:
    if undo_path(path).exists():
        raise OutputError(
            f"{path}: an earlier edit was interrupted; run `mconv gguf repair {path}` first"
        )


def _changes(
    before: dict[str, KeyValue], after: dict[str, KeyValue]
) -> tuple[tuple[str, KeyValue | None, KeyValue | None], ...]:
    return tuple(
        (key, before.get(key), after.get(key))
        for key in dict.fromkeys((*before, *after))
        if not _same(before.get(key), after.get(key))
    )


def _same(a: KeyValue | None, b: KeyValue | None) -> bool:
    if a is None or b is None or (a.type, a.items) != (b.type, b.items):
        return a is b
    if a is b:
        return True
    if a.items is None:
        return bool(a.value == b.value)
    return len(a.value) == len(b.value) and all(
        x == y for x, y in zip(a.value, b.value, strict=True)
    )


def _tensors(file: GgufFile) -> list[OutTensor]:
    if file.big_endian:
        raise UnsupportedError(f"{file.paths[0]}: big-endian files are only shown and hashed")
    source = GgufTensors(file)
    return [
        OutTensor(
            TensorSpec(info.name, info.shape, info.type.id, info.nbytes),
            copied(source.stored(info.name)),
        )
        for info in file.tensors.values()
    ]


def _write(
    target: Path,
    files: Sequence[OutFile],
    file: GgufFile,
    force: bool,
    resume: bool,
    limits: Limits | None,
    progress: Progress | None,
) -> None:
    same = [f.name for f in files if (target.parent / f.name).resolve() in _resolved(file)]
    if same and len(files) > 1:
        raise OutputError(f"{target.parent / same[0]}: is the input; give the output another name")
    plan = fingerprint(files, file.paths, json.dumps([f.name for f in files]))
    write_loose(
        target, files, plan=plan, force=force, resume=resume, limits=limits, progress=progress
    )


def _resolved(file: GgufFile) -> set[Path]:
    return {path.resolve() for path in file.paths}


def _new(name: str) -> hashlib._Hash:
    if name != "uuid":
        return hashlib.new(name, usedforsecurity=False)
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(_UUID_SPACE.bytes)
    return digest


def _model_digest(name: str, digest: hashlib._Hash) -> str:
    if name != "uuid":
        return digest.hexdigest()
    return str(uuid.UUID(bytes=digest.digest()[:16], version=5))
