"""``mconv.convert.quantize``: a GGUF model into other types, several outputs from one read.

Types, metadata and tensor order are those of llama-quantize, so the files compare equal. The
source may be split, and so may the outputs; nothing is visible before everything is complete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..quant.recipes import RecipeOptions, Target, parse_target
from ..shardio.payload import BytesPayload
from ..shardio.staging import fingerprint, write_loose
from ..shardio.stream import Limits, OutFile, Progress
from .gguf import GgufFile, KeyValue, open_gguf
from .gguf.edit import Pruning, model_facts, parse_override, set_entry, without
from .gguf.files import SPLIT_KEYS, OutTensor, cut_by_size, plan_files
from .gguf.known_keys import misspelt
from .gguf.settings import apply_settings
from .gguf.tensors import GgufTensors
from .gguf.values import string, u32
from .imatrix import ImportanceMatrix, read_imatrix
from .quant_plan import (
    Care,
    PlannedTensor,
    SourceTensor,
    TargetPlan,
    plan_targets,
    plan_warnings,
    require_importance,
)

_FILE_TYPE = "general.file_type"
_QUANTIZATION_VERSION = 2
_MAX_TEXT = 127  # bytes of a text that llama-quantize keeps in quantize.imatrix.*


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What a user may ask for beside the targets.

    Attributes:
        recipe: changes to the type choice.
        imatrix: file with an importance matrix.
        include_weights, exclude_weights: which of its entries to use.
        allow_requantize: encode blocks that are decoded from other blocks.
        override_kv: metadata as ``KEY=TYPE:VALUE``.
        prune_layers: layers to leave out.
        max_shard_size: bytes of tensor data per output file.
        max_shard_tensors: tensors per output file.
        keep_split: cut the output like the (split) source.
        settings: metadata as ``KEY=VALUE`` (see ``gguf.settings``).
        big_endian: write for big-endian machines.
        best: search for less error in the same types; the bytes are not llama-quantize's.
        measure: report the errors of quantized tensors.
    """

    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    imatrix: str | Path | None = None
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    allow_requantize: bool = False
    override_kv: tuple[str, ...] = ()
    prune_layers: tuple[int, ...] = ()
    max_shard_size: int | None = None
    max_shard_tensors: int | None = None
    keep_split: bool = False
    settings: tuple[str, ...] = ()
    big_endian: bool = False
    best: bool = False
    measure: bool = False


@dataclass(frozen=True, slots=True)
class OutputReport:
    """One output.

    Attributes:
        target: name of the mix.
        files: path to bytes.
        tensors: what became of each tensor.
        data_bytes: bytes of tensor data.
        bpw: bits per weight.
        unmet: tensors that need importance (in a dry run; else refused).
    """

    target: str
    files: dict[Path, int]
    tensors: tuple[PlannedTensor, ...]
    data_bytes: int
    bpw: float
    unmet: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What a run wrote, or would write.

    Attributes:
        source: the input.
        source_bytes, source_bpw: its tensor data.
        outputs: one per target.
        warnings: what a user should know.
    """

    source: Path
    source_bytes: int
    source_bpw: float
    outputs: tuple[OutputReport, ...]
    warnings: tuple[str, ...]


def quantize_gguf(
    src: str | Path,
    out: str | Path,
    targets: Sequence[str | Target],
    options: QuantizeOptions | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a GGUF model.

    Args:
        src: the file, or any file of a split set.
        out: output file; see ``output_names`` for several targets.
        targets: names such as ``Q4_K_M``.
        options: recipe changes, importance, pruning, splitting.
        force: replace existing files.
        resume: continue an interrupted run.
        dry_run: plan only.
        limits: memory and threads.
        progress: called with (bytes done, bytes in all).

    Raises:
        MconvError: bad input, impossible request, missing importance; nothing is left behind.
    """
    run = _Run.of(Path(src), Path(out), targets, options or QuantizeOptions())
    files = [run.files(plan, name) for plan, name in zip(run.plans, run.names, strict=True)]
    report = run.report(files)
    if dry_run:
        return report
    for plan in run.plans:
        require_importance(plan)
    flat = [f for group in files for f in group]
    _refuse_same([run.folder / f.name for f in flat], run.file.paths)
    write_loose(
        run.folder / run.names[0],
        flat,
        plan=_fingerprint(flat, run.file, run.options),
        force=force,
        resume=resume,
        limits=limits,
        progress=progress,
    )
    return report


def output_names(stem: str, out: Path, targets: Sequence[str]) -> tuple[Path, list[str]]:
    """Return the output folder and one file name per target.

    ``{type}`` in the name stands for the target. Without it, several targets get ``-TARGET``
    before ``.gguf``; a folder gets ``STEM-TARGET.gguf``.

    Raises:
        ConfigError: the name has no ``.gguf`` ending.
    """
    if out.is_dir():
        return out, [f"{stem}-{target}.gguf" for target in targets]
    if not out.name.endswith(".gguf"):
        raise ConfigError(f"{out}: name a .gguf file, or an existing folder")
    if "{type}" in out.name:
        return out.parent, [out.name.replace("{type}", target) for target in targets]
    if len(targets) == 1:
        return out.parent, [out.name]
    stem = out.name.removesuffix(".gguf")
    return out.parent, [f"{stem}-{target}.gguf" for target in targets]


def quantized_metadata(
    entries: Sequence[KeyValue],
    target: Target,
    overrides: Sequence[str] = (),
    matrix: ImportanceMatrix | None = None,
) -> list[KeyValue]:
    """Return a model's metadata with what quantization changes, in llama-quantize's order.

    Args:
        entries: of the model before.
        target: what it is quantized to (``COPY`` keeps the file type).
        overrides: ``KEY=TYPE:VALUE`` texts.
        matrix: the importance matrix that was used.

    Raises:
        ConfigError: a bad override.
    """
    out = set_entry(entries, u32("general.quantization_version", _QUANTIZATION_VERSION))
    if not target.copies:
        out = set_entry(out, u32(_FILE_TYPE, target.file_type))
    else:
        for entry in [e for e in entries if e.key == _FILE_TYPE]:
            out = set_entry(out, entry)
    for text in overrides:
        out = set_entry(out, parse_override(text))
    if matrix is not None:
        for entry in _imatrix_entries(matrix):
            out = set_entry(out, entry)
    return out


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything about one call: the source, the plans and where the outputs go."""

    file: GgufFile
    entries: list[KeyValue]
    architecture: str
    pruning: Pruning
    matrix: ImportanceMatrix | None
    options: QuantizeOptions
    sources: list[SourceTensor]
    plans: list[TargetPlan]
    folder: Path
    names: list[str]

    @classmethod
    def of(
        cls, src: Path, out: Path, targets: Sequence[str | Target], options: QuantizeOptions
    ) -> _Run:
        """Open the source and plan all outputs."""
        wanted = _unique([parse_target(t) for t in targets])
        limits = (options.max_shard_size, options.max_shard_tensors)
        if options.keep_split and limits != (None, None):
            raise ConfigError("--keep-split and --max-shard-size or -tensors exclude each other")
        stem = src.name.removesuffix(".gguf")
        folder, names = output_names(stem, out, [target.name for target in wanted])
        file = open_gguf(src)
        entries = without(file.entries.values(), SPLIT_KEYS)
        overridden = [parse_override(text) for text in options.override_kv]
        facts = model_facts([*entries, *overridden])
        pruning = Pruning.of(options.prune_layers, facts.layers)
        matrix = chosen_matrix(options)
        sources = _sources(file, pruning)
        plans = plan_targets(
            sources,
            wanted,
            facts,
            options.recipe,
            matrix,
            allow_requantize=options.allow_requantize,
            care=Care(options.best, options.measure),
        )
        return cls(
            file, entries, facts.architecture, pruning, matrix, options, sources, plans,
            folder, names,
        )  # fmt: skip

    def files(self, plan: TargetPlan, name: str) -> list[OutFile]:
        """Plan the files of one output."""
        metadata = self.pruning.entries(
            quantized_metadata(self.entries, plan.target, self.options.override_kv, self.matrix),
            self.architecture,
        )
        metadata = apply_settings(metadata, self.options.settings)
        options, alignment = self.options, self.file.alignment
        if options.keep_split:
            shards = self._like_source(plan.out)
        else:
            limit, count = options.max_shard_size, options.max_shard_tensors
            shards = cut_by_size(plan.out, limit, alignment, count)
        return plan_files(
            name, metadata, shards, alignment=alignment, big_endian=options.big_endian
        )

    def _like_source(self, tensors: Sequence[OutTensor]) -> list[list[OutTensor]]:
        """Cut like the source files: the same tensors in each, in the source's order."""
        where = {}
        for info in self.file.tensors.values():
            name = self.pruning.renamed(info.name)
            where[name] = (self.file.paths.index(info.path), info.offset)
        shards: list[list[OutTensor]] = [[] for _ in self.file.paths]
        for one in sorted(tensors, key=lambda t: where[t.spec.name]):
            shards[where[one.spec.name][0]].append(one)
        return shards

    def report(self, files: Sequence[Sequence[OutFile]]) -> QuantizeReport:
        """Describe the outputs."""
        outputs = tuple(
            OutputReport(
                plan.target.name,
                {self.folder / f.name: f.size for f in group},
                plan.tensors,
                plan.data_bytes,
                plan.bpw,
                plan.unmet,
            )
            for plan, group in zip(self.plans, files, strict=True)
        )
        infos = self.file.tensors.values()
        size, weights = sum(t.nbytes for t in infos), sum(prod(t.shape) for t in infos)
        warnings = plan_warnings(self.plans, self.sources, self.matrix)
        warnings += misspelt(self.options.settings, self.entries)
        return QuantizeReport(
            self.file.paths[0], size, 8 * size / max(1, weights), outputs, warnings
        )


def _sources(file: GgufFile, pruning: Pruning) -> list[SourceTensor]:
    tensors = GgufTensors(file)
    out = []
    for name, info in file.tensors.items():
        new = pruning.renamed(name)
        if new is not None:
            out.append(
                SourceTensor(new, name, info.type, tensors.values(name), tensors.stored(name))
            )
    return out


def chosen_matrix(options: QuantizeOptions) -> ImportanceMatrix | None:
    """Read the importance matrix that the options ask for.

    Raises:
        FormatError: it cannot be read.
        ConfigError: a selection without a matrix, or one that selects nothing.
    """
    if options.imatrix is None:
        if options.include_weights or options.exclude_weights:
            raise ConfigError("--include-weights and --exclude-weights need --imatrix")
        return None
    matrix = read_imatrix(options.imatrix)
    chosen = matrix.selected(options.include_weights, options.exclude_weights)
    return chosen if chosen.entries else None


def _imatrix_entries(matrix: ImportanceMatrix) -> list[KeyValue]:
    out = [string("quantize.imatrix.file", _short(str(matrix.path)))]
    if matrix.datasets:
        out.append(string("quantize.imatrix.dataset", _short(matrix.datasets[0])))
    out.append(u32("quantize.imatrix.entries_count", len(matrix.entries)))
    if matrix.chunks > 0:
        out.append(u32("quantize.imatrix.chunks_count", matrix.chunks))
    return out


def _short(text: str) -> str:
    return text.encode("utf-8", "surrogateescape")[:_MAX_TEXT].decode("utf-8", "surrogateescape")


def _refuse_same(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    for path in outputs:
        if any(path.exists() and path.samefile(source) for source in inputs):
            raise OutputError(f"{path}: is the input; give the output another name")


def _fingerprint(files: Sequence[OutFile], file: GgufFile, options: QuantizeOptions) -> str:
    digest = sha256()
    for out in files:  # the header holds every type, name and metadata value
        header = out.parts[0][1]
        assert isinstance(header, BytesPayload)
        digest.update(header.data)
    paths = [*file.paths, *([Path(options.imatrix)] if options.imatrix else [])]
    return fingerprint(files, paths, json.dumps([digest.hexdigest(), options.best]))


def _unique(targets: Sequence[Target]) -> list[Target]:
    if not targets:
        raise ConfigError("name at least one quantization target, such as Q4_K_M")
    return list(dict.fromkeys(targets))
