"""Optimizer states that ZeRO-3 kept on NVMe: raw files beside the rank files.

A run with ``offload_optimizer: {device: nvme}`` saves empty vectors for every sub-group that is
large enough to be swapped, and copies the swap files of each rank to
``offloaded_tensors/rank{NN}/``: ``{a}_{b}.tensor.swp`` has the masters, ``exp_avg-{a}_{b}...`` a
state; a and b are the ids of the sub-group's first and last parameter, counted in the order in
which the model made its parameters. A file is the rank's flat vector, padded to the blocks of
asynchronous I/O. The folder that was copied can hold files of earlier runs. After ``engine.py``
(save_checkpoint) and ``runtime/swap_tensor/optimizer_utils.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import FormatError, UnsupportedError
from .. import dtypes
from ..flat_buffer import Part
from ..source import FileSource
from .fields import Shape
from .states import ModelState, OptimState

FOLDER = "offloaded_tensors"
_MASTER = re.compile(r"^(\d{1,9})_(\d{1,9})\.tensor\.swp$")
_BLOCK = 1024  # bytes that one thread reads or writes at least
_MAX_THREADS = 1024

Ids = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Swapped:
    """The swap files of one model-parallel rank.

    Attributes:
        ids: of each swapped sub-group, the ids in its files' names.
        folders: of each dp rank.
        dtype: of the elements.
    """

    ids: Mapping[int, Ids]
    folders: tuple[Path, ...]
    dtype: np.dtype

    def part(self, index: int, name: str, rank: int, count: int) -> Part:
        """Return a rank's vector of a swapped sub-group.

        Args:
            index: sub-group.
            name: ``master`` or an optimizer state.
            rank: dp rank.
            count: elements it must have.

        Raises:
            FormatError: the file is missing or too short.
        """
        a, b = self.ids[index]
        state = "" if name == "master" else f"{name}-"
        path = self.folders[rank] / f"{state}{a}_{b}.tensor.swp"
        if not path.is_file():
            raise FormatError(
                f"{path}: is missing: it holds {name} of sub-group {index}; copy it from the "
                "node that wrote it"
            )
        source = FileSource.of(path)
        if source.size < count * self.dtype.itemsize:
            raise FormatError(
                f"{path}: has {source.size} bytes, expected {count * self.dtype.itemsize} or more: "
                "the file is cut off, or of another model or world size"
            )
        return Part(source, 0, count, self.dtype, False)


def find_swapped(
    model: ModelState,
    groups: Sequence[Mapping[str, Shape]],
    lengths: Sequence[int],
    ranks: Sequence[OptimState],
    mp_world: int,
) -> Swapped | None:
    """Find the swap files of a stage 3 rank.

    Args:
        model: its first model file.
        groups: parameters of each sub-group.
        lengths: elements of each sub-group on one rank.
        ranks: its optimizer files in dp order.
        mp_world: model-parallel ranks.

    Returns:
        None when nothing was swapped.

    Raises:
        UnsupportedError: they are not there.
        FormatError: it cannot be told which file belongs to which sub-group.
    """
    swapped = [
        k
        for k, (master, length) in enumerate(zip(ranks[0].masters, lengths, strict=True))
        if length and master.numel == 0
    ]
    if not swapped:
        return None
    root = model.path.parent / FOLDER
    folders = tuple(root / f"rank{r.dp * mp_world + r.mp:02d}" for r in ranks)
    for folder, rank in zip(folders, ranks, strict=True):
        if not folder.is_dir():
            raise UnsupportedError(_absent(folder, rank, model, len(swapped)))
    dtype = dtypes.BFLOAT16 if _narrow(model) else dtypes.FLOAT32
    need = {k: lengths[k] * dtype.itemsize for k in swapped}
    files = _masters(folders[0])
    found = _by_ids(folders[0], files, groups, need, _places(model), _threads(model))
    return Swapped(found, folders, dtype)


def _absent(folder: Path, rank: OptimState, model: ModelState, count: int) -> str:
    zero = model.config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    where = offload.get("nvme_path") if isinstance(offload, dict) else None
    was = f"{where or '<nvme_path>'}/zero_stage_3/optimizer/{_unpadded(folder.name)}"
    return (
        f"{rank.path}: {count} sub-groups were kept on NVMe, and their files are not in {folder}; "
        f"DeepSpeed copies them there when it saves. The run had them in {was}: if it has not "
        f"trained on since this save, copy that folder to {folder}"
    )


def _unpadded(name: str) -> str:
    return f"rank{int(name.removeprefix('rank'))}"


def _narrow(model: ModelState) -> bool:
    """Whether the masters themselves are bfloat16."""
    section = model.config.get("bf16", model.config.get("bfloat16"))
    return isinstance(section, dict) and section.get("bf16_master_weights_and_grads") is True


def _threads(model: ModelState) -> int:
    """Threads that share a file: each has whole blocks of it."""
    section = model.config.get("aio")
    count = section.get("intra_op_parallelism") if isinstance(section, dict) else None
    return count if type(count) is int and 0 < count <= _MAX_THREADS else 1


def _masters(folder: Path) -> dict[Ids, int]:
    """Ids and bytes of the master files."""
    found: dict[Ids, int] = {}
    with os.scandir(folder) as entries:
        for e in entries:
            if (match := _MASTER.match(e.name)) and e.is_file():
                found[int(match[1]), int(match[2])] = e.stat().st_size
    return found


def _places(model: ModelState) -> dict[str, int]:
    """The number of each parameter in the model's order: its id, unless ids began elsewhere."""
    own = (n for n in model.module or {} if n not in model.buffers and n not in model.shared)
    return {name: k for k, name in enumerate(own)}


def _by_ids(
    folder: Path,
    files: Mapping[Ids, int],
    groups: Sequence[Mapping[str, Shape]],
    need: Mapping[int, int],
    places: Mapping[str, int],
    threads: int,
) -> dict[int, Ids]:
    """Return the ids of each swapped sub-group.

    Ids count on over all models of a process, so they may begin anywhere: the beginning under
    which every sub-group has a file of its size is the right one, if there is just one.
    """
    unit = _BLOCK * threads
    ends = {}
    for k in need:
        names = list(groups[k])
        first, last = names[0], names[-1]
        if first not in places or last not in places:
            raise _unclear(folder, "the model file does not list all parameters")
        ends[k] = places[first], places[last]
    lead = next(iter(need))
    fits = []
    for a in {a for a, _ in files}:
        shift = a - ends[lead][0]
        table = {k: (first + shift, last + shift) for k, (first, last) in ends.items()}
        if all(files.get(ids) == -(-need[k] // unit) * unit for k, ids in table.items()):
            fits.append(table)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise _unclear(folder, f"the files of {len(fits)} models of the same kind lie there")
    wanted = ", ".join(f"{a}_{b}" for a, b in sorted(ends.values())[:3])
    raise _unclear(
        folder,
        f"expected {len(ends)} files such as {wanted} (or all further by the same number) of "
        f"{', '.join(str(-(-n // unit) * unit) for n in list(need.values())[:3])} bytes, found "
        f"{len(files)}",
    )


def _unclear(folder: Path, why: str) -> FormatError:
    return FormatError(
        f"{folder}: cannot tell which *.tensor.swp files are this model's: {why}; keep only those "
        "of this save"
    )
