"""``mconv.convert.check``: all that would keep a checkpoint from becoming GGUF, told before a run.

Looks at metadata only, unless asked to read the weights: architecture, every missing, unknown or
mis-shaped tensor, the vocabulary, what each tensor becomes and how large, values that a type cannot
hold, disk and memory. A problem in one place does not hide those in others.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import MconvError
from ..shardio import Checkpoint, dtypes
from ..shardio.stream import Limits, Progress
from ..shardio.tensor import LazyTensor
from .architectures import Architecture, complete_config, find_architecture, match_tensors
from .config_errors import config_named
from .gguf_plan import PlannedTensor
from .prepare import prepare
from .to_gguf import GgufReport, open_source, to_gguf
from .tokenizers import TokenType, Vocabulary, find_tokenizer, load_vocabulary

_F16_MAX = 65504.0
_BLOCK = 4 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """What becomes of a tensor.

    Attributes:
        name, source: GGUF and Hugging Face name.
        shape: row-major.
        dtype: of the checkpoint.
        type: in the output.
        nbytes: in the output.
        hazard: values that the type may not or does not hold; empty: none.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    type: str
    nbytes: int
    hazard: str = ""


@dataclass(frozen=True, slots=True)
class VocabularyCheck:
    """The vocabulary in figures: ``kinds`` counts tokens by type, ``specials`` are ids by role."""

    model: str
    pre: str
    tokens: int
    kinds: dict[str, int]
    merges: int
    specials: dict[str, int]
    chat_template: bool


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """The result.

    Attributes:
        path, format: of the checkpoint.
        architecture: ``general.architecture``; None when it is not known.
        notes: limits of the architecture.
        type: the output's type.
        problems: what keeps it from being converted, as whole sentences; empty: nothing.
        warnings: what a user should know.
        ignored: tensors that GGUF has no place for.
        vocabulary: None when it cannot be read.
        tensors: empty when there are problems.
        nbytes: size of the file.
        free: bytes free where it would go.
        memory: bytes of working memory.
        scanned: whether hazards were looked for in the values.
    """

    path: Path
    format: str
    architecture: str | None
    notes: str
    type: str
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    ignored: tuple[str, ...]
    vocabulary: VocabularyCheck | None
    tensors: tuple[TensorCheck, ...]
    nbytes: int
    free: int
    memory: int
    scanned: bool

    @property
    def passed(self) -> bool:
        """Whether it can be converted."""
        return not self.problems


def check_model(
    src: Checkpoint | str | Path,
    type: str = "f16",
    *,
    out: str | Path = "model.gguf",
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    pre: str | None = None,
    weights: str = "model",
    vocab_size: int | None = None,
    scan: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ModelCheck:
    """Check whether and how a checkpoint becomes GGUF. Writes nothing.

    Args:
        src: an opened checkpoint or its path.
        type: one output type, as ``to_gguf`` takes it.
        out: the file that would be written, for the space there.
        tokenizer, config, pre, weights, vocab_size, limits: as in ``to_gguf``.
        scan: read all weights and look for values that do not fit.
        progress: called with (bytes read, bytes in all) while scanning.

    Raises:
        MconvError: the checkpoint cannot be opened at all.
    """
    folder = Path(tokenizer) if tokenizer is not None else None
    ckpt = open_source(src, config)
    seen = _Findings(ckpt)
    ready = seen.attempt(
        lambda: prepare(
            ckpt, weights=weights, vocab_size=vocab_size, tokenizer=folder, verify=False
        )
    )
    kind = seen.look_at_model(ready) if ready is not None else None
    words = seen.look_at_vocabulary(ready, folder, kind, pre) if ready is not None else None
    report = seen.look_at_output(ready, out, type, folder, pre) if ready is not None else None
    nbytes = report.nbytes if report is not None else 0
    free = seen.look_at_space(nbytes, Path(out))
    allowed = limits or Limits()
    return ModelCheck(
        path=ckpt.path,
        format=ckpt.format,
        architecture=kind.name if kind is not None else None,
        notes=kind.notes if kind is not None else "",
        type=report.type if report is not None else type.upper(),
        problems=tuple(seen.problems),
        warnings=report.warnings if report is not None else ckpt.warnings,
        ignored=tuple(seen.ignored),
        vocabulary=words,
        tensors=_tensors(report, scan=scan, progress=progress) if report is not None else (),
        nbytes=nbytes,
        free=free,
        memory=allowed.workers() * 2 * allowed.slab(),
        scanned=scan and report is not None,
    )


class _Findings:
    """Collects problems, so that one does not hide another."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self.ckpt = ckpt
        self.problems: list[str] = []
        self.ignored: list[str] = []

    def attempt(self, step: Callable[[], T]) -> T | None:
        """Return what a step gives; None when it finds a problem."""
        try:
            with config_named(self.ckpt):
                return step()
        except MconvError as error:
            self.problems.append(str(error))
            return None

    def look_at_model(self, ready: Checkpoint) -> Architecture | None:
        """Match the tensors with the architecture's table."""
        kind = self.attempt(lambda: find_architecture(ready.config))
        if kind is None:
            return None
        config = self.attempt(lambda: complete_config(ready.config or {}, kind, ready.weights))
        if config is not None:
            match = self.attempt(lambda: match_tensors(kind, config, ready.weights, ready.tied))
            if match is not None:
                self.problems += match.problems
                self.ignored += match.ignored
        return kind

    def look_at_vocabulary(
        self, ready: Checkpoint, folder: Path | None, kind: Architecture | None, pre: str | None
    ) -> VocabularyCheck | None:
        """Read the tokenizer as the architecture would."""
        if kind is None:
            return None
        size = (ready.config or {}).get("vocab_size")
        found = self.attempt(
            lambda: load_vocabulary(
                find_tokenizer(folder, ready.assets),
                kind.tokenizer,
                ready.config,
                vocab_size=size if isinstance(size, int) else None,
                pre=pre,
            )
        )
        return _figures(found) if found is not None else None

    def look_at_output(
        self, ready: Checkpoint, out: str | Path, type: str, folder: Path | None, pre: str | None
    ) -> GgufReport | None:
        """Plan the file, where nothing is known to be in its way."""
        if self.problems:
            return None
        return self.attempt(
            lambda: to_gguf(
                ready, out, type, tokenizer=folder, pre=pre, verify=False, force=True, dry_run=True
            )
        )

    def look_at_space(self, nbytes: int, out: Path) -> int:
        """Return the bytes free where a file would go."""
        free = _free(out)
        if nbytes > free:
            folder = out.absolute().parent
            self.problems.append(f"the file takes {nbytes:,} bytes, {folder} has {free:,} left")
        return free


def _figures(vocabulary: Vocabulary) -> VocabularyCheck:
    counted = Counter(TokenType(kind).name.lower() for kind in vocabulary.types)
    return VocabularyCheck(
        model=vocabulary.model,
        pre=vocabulary.pre,
        tokens=len(vocabulary.tokens),
        kinds=dict(counted.most_common()),
        merges=len(vocabulary.merges),
        specials=dict(vocabulary.specials.ids),
        chat_template=bool(vocabulary.chat_template),
    )


def _free(out: Path) -> int:
    folder = out.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _tensors(
    report: GgufReport, *, scan: bool, progress: Progress | None
) -> tuple[TensorCheck, ...]:
    checked, done = [], 0
    total = sum(t.tensor.nbytes for t in report.tensors)
    for planned in report.tensors:
        one = TensorCheck(
            planned.name,
            planned.source,
            planned.shape,
            dtypes.name(planned.tensor.dtype),
            planned.type.name,
            planned.nbytes,
        )
        checked.append(replace(one, hazard=_found(planned) if scan else _possible(one)))
        done += planned.tensor.nbytes
        if scan and progress is not None:
            progress(done, total)
    return tuple(checked)


def _possible(tensor: TensorCheck) -> str:
    if tensor.type == "F16" and tensor.dtype != "float16":
        return f"{tensor.dtype} reaches further than F16"
    return ""


def _found(planned: PlannedTensor) -> str:
    """Return what the values of a tensor would lose."""
    bad, large, largest = 0, 0, 0.0
    for values in _blocks(planned.tensor):
        sizes = np.abs(values.astype(np.float32))
        finite = np.isfinite(sizes)
        bad += int(finite.size - finite.sum())
        largest = max(largest, float(sizes[finite].max(initial=0.0)))
        large += int((sizes[finite] > _F16_MAX).sum())
    found = [f"{bad} values are NaN or infinite"] if bad else []
    if large and planned.type.name == "F16":
        found.append(f"{large} values exceed F16 (up to {largest:.4g}); use bf16 or f32")
    return "; ".join(found)


def _blocks(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """Yield all values in pieces of a few megabytes."""
    if tensor.ndim == 0:
        yield tensor.read()
        return
    *outer, n = tensor.shape[:-1] or (1,)
    if tensor.ndim == 1:
        outer, n = [], tensor.shape[0]
    width = tensor.nbytes // max(1, int(np.prod([*outer, n])))
    step = max(1, _BLOCK // max(1, width))
    for place in product(*(range(size) for size in outer)):
        for start in range(0, n, step):
            yield tensor.read([*place, slice(start, min(n, start + step))])
