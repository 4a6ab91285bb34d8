"""``mconv.roundtrip``: prove on a user's own checkpoint that a chain of conversions loses nothing.

The checkpoint goes through the given layouts one after the other in a temporary folder (at most two
of them lie on the disk at a time) and is compared with itself at the end, in Hugging Face names:
weights, fp32 masters and every optimizer state, bit for bit.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..shardio import Checkpoint, Layout, open_checkpoint
from ..shardio.compare import Difference, compare, in_parallel, same
from ..shardio.dtypes import FLOAT32
from ..shardio.stream import Limits, Progress
from ..shardio.team import ALONE, Team, together
from ..shardio.tensor import LazyTensor
from ..shardio.training_state import MASTER, optimizer_step
from ..shardio.writers import get_writer
from .prepare import prepare, vocab_size_of
from .reshard import GGUF, ReshardReport, opened, reshard

Step = Callable[[Layout], None]


@dataclass(frozen=True, slots=True)
class RoundtripReport:
    """What came back.

    Attributes:
        path: layouts passed, in order.
        missing: tensors (``<state>.<weight>`` for optimizer states) that did not come back.
        extra: tensors that were not there.
        changed: tensors whose values differ.
        tensors: tensors compared.
        nbytes: bytes written on the way.
        notes: what a user should know, with the layout that said it.
    """

    path: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    changed: tuple[Difference, ...]
    tensors: int
    nbytes: int
    notes: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        """Whether every tensor came back bit for bit."""
        return not (self.missing or self.extra or self.changed)


def roundtrip(
    src: Checkpoint | str | Path,
    via: Sequence[Layout | str],
    *,
    work: str | Path | None = None,
    vocab_size: int | None = None,
    config: str | Path | None = None,
    weights_only: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
    on_step: Step | None = None,
) -> RoundtripReport:
    """Send a checkpoint through layouts and compare what comes back.

    Args:
        src: an opened checkpoint or its path; it is only read.
        via: layouts, or their texts (``deepspeed:zero=3,dp=4``), in order.
        work: where the temporary folder goes (None: the system's place for such).
        vocab_size: true vocabulary size where the source is padded.
        config: config.json or model folder, where the source has none.
        weights_only: leave the optimizer out.
        limits: memory, threads and processes.
        progress: called with (bytes done, bytes in all) of each conversion.
        on_step: called before each conversion.

    Raises:
        ConfigError: no layouts, or one that casts.
        MconvError: a source or layout that cannot be read or written.
    """
    layouts = _lossless(via)
    first = opened(src, config)
    size = vocab_size if vocab_size is not None else vocab_size_of(first)
    states = bool(first.optimizer) and not weights_only
    team = limits.team if limits else ALONE
    folder = _shared_folder(team, work)
    try:
        last, reports = _chain(
            first, layouts, folder, states, size, limits=limits, progress=progress, on_step=on_step
        )

        def judge() -> RoundtripReport | None:
            if team.rank:
                return None  # one process compares, the others wait
            return _compare(first, last, layouts, reports, states, size)

        report = team.gather(together(team, judge))[0]
        assert isinstance(report, RoundtripReport)
        return report
    finally:
        if team.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _lossless(via: Sequence[Layout | str]) -> list[Layout]:
    """Return the layouts; refuse what is misspelt or loses something before anything is written."""
    layouts = [Layout.parse(v) if isinstance(v, str) else v for v in via]
    if not layouts:
        raise ConfigError("roundtrip: give at least one layout with --via")
    for layout in layouts:
        if layout.format == GGUF:
            raise ConfigError("roundtrip: gguf holds a model for inference, which is not read back")
        get_writer(layout.format)
        if layout.dtype is not None:
            raise ConfigError(
                f"roundtrip: {layout.describe()} casts to {layout.dtype}: not lossless"
            )
    return layouts


def _shared_folder(team: Team, work: str | Path | None) -> Path:
    """A temporary folder that the first process made.

    Raises:
        ConfigError: a process does not see it, being on another machine.
    """
    made = tempfile.mkdtemp(prefix="mconv-roundtrip-", dir=work) if team.rank == 0 else None
    folder = Path(team.gather(made)[0])

    def seen() -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not seen here: give --work a folder that all share")

    together(team, seen)
    return folder


def _chain(
    ckpt: Checkpoint,
    layouts: Sequence[Layout],
    folder: Path,
    states: bool,
    size: int | None,
    *,
    limits: Limits | None,
    progress: Progress | None,
    on_step: Step | None,
) -> tuple[Checkpoint, list[ReshardReport]]:
    """Convert step by step; the folder before the last one is deleted as soon as it was read."""
    team = limits.team if limits else ALONE
    reports: list[ReshardReport] = []
    for k, layout in enumerate(layouts):
        if on_step:
            on_step(layout)
        target = folder / str(k)
        report = reshard(
            ckpt, target, layout, with_optimizer=states, vocab_size=size, limits=limits,
            progress=progress,
        )  # fmt: skip
        reports.append(report)
        if k and team.rank == 0:
            shutil.rmtree(folder / str(k - 1))
        found = open_checkpoint(target)
        ckpt = found if found.config is not None else replace(found, config=ckpt.config)
    return ckpt, reports


def _compare(
    first: Checkpoint,
    last: Checkpoint,
    layouts: Sequence[Layout],
    reports: Sequence[ReshardReport],
    states: bool,
    size: int | None,
) -> RoundtripReport:
    a, b = (prepare(c, with_optimizer=states, vocab_size=size) for c in (first, last))
    before, after = dict(_tensors(a, b)), dict(_tensors(b, a))
    common = [n for n in before if n in after and before[n].shape == after[n].shape]
    found = in_parallel(lambda n: _difference(n, before[n], after[n]), common)
    notes = [f"{l.format}: {w}" for l, r in zip(layouts, reports, strict=True) for w in r.warnings]
    if states and optimizer_step(a) != optimizer_step(b):
        notes.append(f"the optimizer's step was {optimizer_step(a)}, it is {optimizer_step(b)} now")
    return RoundtripReport(
        path=(first.layout.describe(), *(layout.describe() for layout in layouts)),
        missing=tuple(n for n in before if n not in common),
        extra=tuple(n for n in after if n not in before),
        changed=tuple(d for d in found if d is not None),
        tensors=len(common),
        nbytes=sum(r.nbytes for r in reports),
        notes=tuple(dict.fromkeys(notes)),
    )


def _difference(name: str, a: LazyTensor, b: LazyTensor) -> Difference | None:
    """None for the same bits."""
    return None if same(a, b) else compare(name, a, b)


def _tensors(ckpt: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor under one name, in the narrower of both sides' precision.

    Some formats hold 16-bit weights and masters, some the masters as weights; so fp32 copies are
    compared where either side has masters, and weights as the narrower side has them.
    """
    tied = {a: ckpt.weights[o] for a, o in ckpt.tied.items() if o in ckpt.weights}
    weights: Mapping[str, LazyTensor] = {**tied, **ckpt.weights}
    for name, tensor in weights.items():
        theirs = other.weights.get(other.tied.get(name, name))
        narrow = theirs is not None and theirs.dtype.itemsize < tensor.dtype.itemsize
        yield name, tensor.cast(theirs.dtype) if theirs is not None and narrow else tensor
    masters = {**ckpt.optimizer.get(MASTER, {}), **other.optimizer.get(MASTER, {})}
    for name in masters:
        if name in ckpt.weights:
            own = ckpt.optimizer.get(MASTER, {}).get(name, ckpt.weights[name])
            yield f"{MASTER}.{name}", own if own.dtype == FLOAT32 else own.cast(FLOAT32)
    for state, tensors in ckpt.optimizer.items():
        if state != MASTER:
            yield from ((f"{state}.{name}", t) for name, t in tensors.items())
