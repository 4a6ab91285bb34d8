"""What ``mconv inspect`` tells: a checkpoint described as plain data, from its metadata alone."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from . import dtypes
from .checkpoint import Checkpoint
from .chunked import Chunked
from .coverage import covered, flaws
from .flat_buffer import Deferred
from .tensor import LazyTensor


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor in the report.

    Attributes:
        name: as the framework has it.
        shape: global shape.
        dtype: name of the element type.
        size, nbytes: elements and bytes.
        placement: how the mesh axes cut it (``tp Shard(0), pp Stage(1)``), or what its pieces
            show (``Shard(0) in 4``); empty when whole.
        pieces: number of file ranges it is made of.
        file: name of the file that has the first of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    nbytes: int
    placement: str
    pieces: int
    file: str


@dataclass(frozen=True, slots=True)
class FileLine:
    """One file with tensors: name below the checkpoint, its length, pieces of weights and of
    optimizer states in it.
    """

    name: str
    nbytes: int
    weights: int
    states: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint described.

    Attributes:
        path, format, version, naming, step: as in ``Checkpoint``.
        layout: sizes of the parallel axes in use.
        files: number of files the weights lie in.
        rank_files: every file with weights or optimizer states.
        nbytes: bytes of the weights.
        parameters: elements of the weights.
        dtypes: dtype name to elements.
        optimizer: state name to number of tensors.
        optimizer_kind: what they belong to, as the settings or the states tell; None without.
        padded: weight to (rows, true vocabulary size), where the vocabulary is padded; the size is
            None when nothing tells it.
        replicas: number of stored copies that must equal the tensor in use.
        tied: alias to owner.
        frozen: weights without optimizer state, when the others have one; without buffers.
        coverage: part of the weights' elements that is in exactly one place (1.0: proven whole).
        problems: holes, overlaps, short files (empty: coverage is proven).
        warnings: what a user should know.
        config: model type and sizes, when a config.json was found.
        assets: names of config, tokenizer and template files.
        commands: that convert it.
        tensors: one line each.
    """

    path: Path
    format: str
    version: str | None
    naming: str
    step: int | None
    layout: Mapping[str, int]
    files: int
    rank_files: tuple[FileLine, ...]
    nbytes: int
    parameters: int
    dtypes: Mapping[str, int]
    optimizer: Mapping[str, int]
    optimizer_kind: str | None
    padded: Mapping[str, tuple[int, int | None]]
    replicas: int
    tied: Mapping[str, str]
    frozen: tuple[str, ...]
    coverage: float
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    config: Mapping[str, Any]
    assets: tuple[str, ...]
    commands: tuple[str, ...]
    tensors: tuple[TensorLine, ...]

    @property
    def whole(self) -> bool:
        """Whether every element of every tensor is in exactly one place."""
        return not self.problems


MODEL_FOLDER = "MODEL_FOLDER"
"""What commands say for a folder that the user has to name."""
_MOST_FILES = 100_000
_SHARED = 32  # pieces from which a list of files may be one that many tensors share
_VOCABULARY = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_in|embed_out|embeddings?|word_embeddings|tok_embeddings|wte|"
    r"token_embedding|token_embd|lm_head|output_layer|output|final_linear)\.weight$"
)
#: The states that tell an optimizer, the most telling first.
_OPTIMIZERS: tuple[tuple[set[str], str], ...] = (
    ({"exp_avg", "exp_avg_sq"}, "Adam"),
    ({"exp_avg_sq_row"}, "Adafactor"),
    ({"exp_inf"}, "Adamax"),
    ({"exp_avg", "momentum_buffer"}, "Muon with Adam"),
    ({"momentum_buffer"}, "SGD or Muon with momentum"),
    ({"momentum"}, "SGD with momentum"),
    ({"square_avg"}, "RMSprop"),
    ({"sum"}, "Adagrad"),
    ({"exp_avg"}, "Lion"),
)
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def inspect_checkpoint(ckpt: Checkpoint) -> Inspection:
    """Describe an opened checkpoint; reads no tensor bytes."""
    counts: Counter[str] = Counter()
    held = _Pieces()
    lines = []
    for name, tensor in ckpt.weights.items():
        counts[dtypes.name(tensor.dtype)] += tensor.size
        lines.append(_line(ckpt, name, tensor, held.add(tensor)))
    beside = _Pieces()
    for tensors in ckpt.optimizer.values():
        for tensor in tensors.values():
            beside.add(tensor)
    weights, states = held.counts(), beside.counts()
    problems = flaws(ckpt.weights)
    for state, tensors in ckpt.optimizer.items():
        problems += flaws({f"{state}.{n}": t for n, t in tensors.items()})
    trained = {n for tensors in ckpt.optimizer.values() for n in tensors}
    config = ckpt.config or {}
    padded = padded_vocabulary(ckpt)
    return Inspection(
        path=ckpt.path,
        format=ckpt.format,
        version=ckpt.version,
        naming=ckpt.naming,
        step=ckpt.step,
        layout=ckpt.layout.sizes(),
        files=len(weights),
        rank_files=_files(ckpt.path, weights, states),
        nbytes=sum(t.nbytes for t in ckpt.weights.values()),
        parameters=ckpt.num_parameters,
        dtypes=dict(counts.most_common()),
        optimizer={state: len(tensors) for state, tensors in ckpt.optimizer.items()},
        optimizer_kind=optimizer_kind(ckpt),
        padded=padded,
        replicas=sum(map(len, ckpt.replicas.values())),
        tied=dict(ckpt.tied),
        frozen=_frozen(ckpt, trained) if trained else (),
        coverage=covered(ckpt.weights) / max(ckpt.num_parameters, 1) if problems else 1.0,
        problems=tuple(f"{f.name}: {f.problem}" for f in problems),
        warnings=ckpt.warnings,
        config={k: config[k] for k in _CONFIG_KEYS if k in config},
        assets=tuple(p.name for p in ckpt.assets),
        commands=_commands(ckpt),
        tensors=tuple(lines),
    )


class _Pieces:
    """Counts the pieces in each file; tensors that share a list of files are counted at once."""

    def __init__(self) -> None:
        self._few: Counter[Path] = Counter()
        self._shared: dict[int, tuple[tuple[Path, ...], int]] = {}

    def add(self, tensor: LazyTensor) -> tuple[Path, ...]:
        """Count a tensor; return the files of its pieces."""
        files = tensor.files()
        if len(files) < _SHARED:
            self._few.update(files)
        else:
            _, count = self._shared.get(id(files), ((), 0))
            self._shared[id(files)] = files, count + 1  # kept, so that its id stays its own
        return files

    def counts(self) -> Counter[Path]:
        """Return {file: pieces}."""
        found = Counter(self._few)
        for files, count in self._shared.values():
            for path, pieces in Counter(files).items():
                found[path] += pieces * count
        return found


def present_files(path: str | Path) -> dict[str, tuple[int, int]]:
    """Return {name pattern: (files, bytes)} of what lies at a path and two levels below: for people
    who must find out why nothing could be opened. Never raises.
    """
    start = Path(path)
    found: dict[str, tuple[int, int]] = {}
    try:
        for file in islice(_below(start, 2), _MOST_FILES):
            name = re.sub(r"\d+", "*", str(file.relative_to(start)))
            count, nbytes = found.get(name, (0, 0))
            found[name] = (count + 1, nbytes + file.stat().st_size)
    except (OSError, ValueError):
        return found
    return found


def _below(folder: Path, levels: int) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_file():
            yield entry
        elif levels and entry.is_dir() and not entry.is_symlink():
            yield from _below(entry, levels - 1)


def _files(root: Path, weights: Counter[Path], states: Counter[Path]) -> tuple[FileLine, ...]:
    found = []
    for path in sorted({*weights, *states}):
        try:
            nbytes = path.stat().st_size
        except (OSError, ValueError):  # a tensor that was computed has no file
            continue
        found.append(FileLine(_short(root, path), nbytes, weights[path], states[path]))
    return tuple(found)


def _short(root: Path, path: Path) -> str:
    """Name of a file below the folder that was opened, or beside the file."""
    for folder in (root, root.parent):
        if str(path).startswith(f"{folder}{os.sep}"):
            return str(path)[len(str(folder)) + 1 :]
    return str(path)


def _commands(ckpt: Checkpoint) -> tuple[str, ...]:
    """The commands that make plain weights and a GGUF of it, with the options that they need."""
    source = shlex.quote(str(ckpt.path))
    if ckpt.format == "gguf":
        return f"mconv from-gguf {source} OUT", f"mconv quantize {source} OUT.gguf Q4_K_M"
    names = {p.name for p in ckpt.assets}
    config = "" if ckpt.config else f" --config {MODEL_FOLDER}"
    bare = not names & {"tokenizer.model", "tokenizer.json", "vocab.json"}
    tokenizer = f" --tokenizer {MODEL_FOLDER}" if bare else ""
    plain = f"mconv reshard {source} OUT --to hf{config if ckpt.naming != 'hf' else ''}"
    if any(".lora_A." in name for name in ckpt.weights):  # GGUF has no place for unmerged factors
        return (plain,)
    return plain, f"mconv to-gguf {source} OUT.gguf{config}{tokenizer}"


def optimizer_kind(ckpt: Checkpoint) -> str | None:
    """Name the optimizer: as the framework's settings call it, else by its states."""
    if not ckpt.optimizer:
        return None
    states = {n.rpartition(".")[2] for n in ckpt.optimizer}
    masters = " with fp32 masters" if "master" in states else ""
    settings = ckpt.args.get("ds_config")
    given = settings.get("optimizer") if isinstance(settings, Mapping) else None
    named = given.get("type") if isinstance(given, Mapping) else ckpt.args.get("optimizer")
    groups = ckpt.scalars.get("param_groups")
    first = groups[0] if isinstance(groups, list | tuple) and groups else None
    decoupled = isinstance(first, Mapping) and bool(first.get("decoupled_weight_decay"))
    by_states = next((title for need, title in _OPTIMIZERS if need <= states), None)
    if by_states == "Adam" and decoupled:
        by_states = "AdamW"
    if isinstance(named, str) and named:
        return f"{named[:40]}{masters}"
    return f"{by_states or 'unknown'}{masters}"


def padded_vocabulary(ckpt: Checkpoint) -> dict[str, tuple[int, int | None]]:
    """Return {weight: (rows, true size)} of the embeddings and heads that have more rows than the
    vocabulary; the size is None where only the framework's settings say that it is padded.
    """
    size = (ckpt.config or {}).get("vocab_size")
    known = size if type(size) is int else None
    padded = ckpt.args.get("padded_vocab_size") if known is None else None
    found: dict[str, tuple[int, int | None]] = {}
    for name, tensor in ckpt.weights.items():
        if tensor.ndim == 2 and _VOCABULARY.search(name):
            rows = tensor.shape[0]
            if rows > known if known is not None else rows == padded:
                found[name] = (rows, known)
    return found


def placement_text(ckpt: Checkpoint, name: str, tensor: LazyTensor) -> str:
    """Say how a tensor is cut: by the axes of the mesh where the format names them, else by what
    its pieces show.
    """
    cut = ckpt.placements.get(name, {})
    if cut:
        return ", ".join(f"{axis} {p}" for axis, p in cut.items())
    if not isinstance(tensor, Chunked):
        return ""
    files = len(set(tensor.files()))
    if files < 2:
        return ""
    if isinstance(tensor, Deferred):  # of flat vectors
        return f"Flat in {files}"
    sizes = [len({c.lo[d] for c in tensor.chunks}) for d in range(tensor.ndim)]
    if prod(sizes) != len(tensor.chunks):
        return f"{len(tensor.chunks)} pieces in {files} files"
    return ", ".join(f"Shard({d}) in {n}" for d, n in enumerate(sizes) if n > 1)


def _frozen(ckpt: Checkpoint, trained: set[str]) -> tuple[str, ...]:
    named = ckpt.args.get("buffer_names")
    buffers = {n for n in named if isinstance(n, str)} if isinstance(named, list | tuple) else set()
    return tuple(
        n
        for n, t in ckpt.weights.items()
        if n not in trained and n not in buffers and dtypes.is_float(t.dtype)
    )


def _line(ckpt: Checkpoint, name: str, tensor: LazyTensor, files: tuple[Path, ...]) -> TensorLine:
    placement = placement_text(ckpt, name, tensor)
    return TensorLine(
        name=name,
        shape=tensor.shape,
        dtype=dtypes.name(tensor.dtype),
        size=tensor.size,
        nbytes=tensor.nbytes,
        placement=placement,
        pieces=len(files),
        file=_short(ckpt.path, files[0]) if files else "",
    )
