"""Which files of a folder form a Hugging Face checkpoint.

Names, after transformers, diffusers and huggingface_hub: ``model.safetensors``; shards
``model-00001-of-00003.safetensors`` with ``model.safetensors.index.json``; the same with a variant
(``model.fp16.safetensors``, ``model.safetensors.index.fp16.json``); and as ``pytorch_model.bin``.
All that share a stem (``model``, ``model.fp16``) and a kind form one set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from ..errors import ConfigError, FormatError
from .assets import load_json

INDEX = re.compile(
    r"^(?P<stem>.+)\.(?P<kind>safetensors|bin)\.index(?:\.(?P<variant>[^.]+))?\.json$"
)
_SHARD = re.compile(r"^(?P<stem>.+?)-(?P<i>\d+)-of-(?P<n>\d+)\.(?P<kind>safetensors|bin)$")
_SINGLE = re.compile(r"^(?P<stem>.+)\.(?P<kind>safetensors|bin)$")
_FOREIGN = re.compile(
    r"^(?:shard-\d+-|adapter|optimizer|optim|scheduler|rng_state|training_args|zero_pp|mp_rank|"
    r"pytorch_model_fsdp|random_states|value_head|lora)",
)
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
MAX_SHARDS = 100_000


@dataclass(slots=True)
class FileSet:
    """Files with one stem and kind.

    Attributes:
        stem: ``model``, ``model.fp16``...
        kind: ``safetensors`` or ``bin``.
        single: the unsharded file.
        index: the JSON index.
        shards: {total: {number: file}}; more than one total means files of several saves.
    """

    stem: str
    kind: str
    single: Path | None = None
    index: Path | None = None
    shards: dict[int, dict[int, Path]] = field(default_factory=dict)

    @property
    def usual(self) -> bool:
        """Whether transformers or diffusers would look for this stem by default."""
        return self.stem in _STEMS

    @property
    def variant(self) -> bool:
        """Whether it is a variant (``model.fp16``) of a usual stem."""
        return self.stem.partition(".")[0] in _STEMS and "." in self.stem


def file_sets(folder: Path, stem: str | None = None) -> list[FileSet]:
    """Return the sets of a folder, the one that transformers would load first; [] if unreadable.

    With ``stem`` only that one is looked for, also where it is no model (``optimizer``).
    """
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        return []
    sets: dict[tuple[str, str], FileSet] = {}
    for name in names:
        key = _place(name)
        if key is None or (key[0] != stem if stem else not _is_model(*key)):
            continue
        found = sets.setdefault(key, FileSet(*key))
        if INDEX.match(name):
            found.index = folder / name
        elif m := _SHARD.match(name):
            found.shards.setdefault(int(m["n"]), {})[int(m["i"])] = folder / name
        else:
            found.single = folder / name
    return sorted(sets.values(), key=_preference)


def _place(name: str) -> tuple[str, str] | None:
    """Return (stem, kind) of a file name, or None for other files."""
    if m := INDEX.match(name):
        return (f"{m['stem']}.{m['variant']}" if m["variant"] else m["stem"]), m["kind"]
    m = _SHARD.match(name) or _SINGLE.match(name)
    return (m["stem"], m["kind"]) if m else None


def _is_model(stem: str, kind: str) -> bool:
    usual_bin = kind != "bin" or stem.startswith("pytorch_model")
    return usual_bin and not _FOREIGN.match(f"{stem}.{kind}")


def _preference(files: FileSet) -> tuple[bool, bool, int, str]:
    order = _STEMS.index(files.stem) if files.usual else len(_STEMS)
    return files.kind != "safetensors", not files.usual, order, files.stem


def choose(folder: Path, sets: list[FileSet]) -> FileSet:
    """Return the set to load.

    Raises:
        FormatError: no set at all, or nothing by the usual names and several others.
    """
    if not sets:
        raise FormatError(f"{folder}: holds no model files that can be opened")
    usual = [s for s in sets if s.usual]
    if usual:
        return usual[0]
    if len(sets) > 1:
        names = ", ".join(f"{s.stem}.{s.kind}" for s in sets[:6])
        raise FormatError(
            f"{folder}: several models or variants are here ({names}); name the file (or its "
            "index) that is meant"
        )
    return sets[0]


def set_of(path: Path) -> FileSet | None:
    """Return the set that one file belongs to."""
    key = _place(path.name)
    if key is None:
        return None
    return next((s for s in file_sets(path.parent) if (s.stem, s.kind) == key), None)


def read_index(path: Path) -> dict[str, str]:
    """Return {tensor: file name} of an index.

    Raises:
        FormatError: malformed, empty, or naming files outside the folder.
    """
    try:
        tree = load_json(path)
    except ConfigError as e:
        raise FormatError(str(e)) from None
    table = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(table, dict) or not table:
        raise FormatError(f"{path}: has no weight_map, or an empty one")
    for name, file in table.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise FormatError(
                f"{path}: puts {name!r} into {str(file)[:100]!r}, which is no file of this folder"
            )
    return table


def is_plain_name(file: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    path = PureWindowsPath(file)
    return bool(path.parts) and ".." not in path.parts and not path.anchor and "\0" not in file


def shard_files(files: FileSet, folder: Path) -> list[Path]:
    """Return the shards of a set without index, in order.

    Raises:
        FormatError: shards are missing, or of several saves.
    """
    if len(files.shards) > 1:
        totals = ", ".join(f"{len(v)} of {n}" for n, v in sorted(files.shards.items()))
        raise FormatError(
            f"{folder}: shards of several saves ({totals}) and no index to tell which are valid"
        )
    ((total, numbered),) = files.shards.items()
    missing = [i for i in range(1, min(total, MAX_SHARDS) + 1) if i not in numbered]
    if missing or total > MAX_SHARDS or len(numbered) != total:
        listed = ", ".join(f"{i:05d}" for i in missing[:8])
        raise FormatError(
            f"{folder}: {files.stem} has {len(numbered)} of {total} shards; missing: {listed}"
        )
    return [numbered[i] for i in sorted(numbered)]


def stale_files(files: FileSet, used: Mapping[str, object]) -> list[str]:
    """Return names of shards on disk that the loaded model does not consist of."""
    every = [p.name for group in files.shards.values() for p in group.values()]
    return sorted(n for n in every if n not in used)
