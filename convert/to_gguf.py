"""``mconv.to_gguf``: any checkpoint to a GGUF file, in one streaming pass.

The file equals, tensor by tensor and key by key, what llama.cpp's converter writes from the merged
Hugging Face model, and for mixes such as Q4_K_M what llama-quantize then makes of that file.
Everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, MconvError
from ..shardio import Checkpoint, from_array
from ..shardio.assets import find_assets
from ..shardio.dequant import DECODED, dequantized
from ..shardio.payload import BytesPayload
from ..shardio.staging import fingerprint, write_loose
from ..shardio.stream import Limits, OutFile, Progress
from .architectures import (
    POOLING,
    Architecture,
    MappedTensor,
    complete_config,
    find_architecture,
    map_tensors,
    model_entries,
)
from .config_errors import config_named
from .general import general_entries, naming
from .gguf import KeyValue
from .gguf.edit import model_facts, parse_override, set_entry
from .gguf.files import cut_by_size, plan_files
from .gguf.known_keys import misspelt
from .gguf.settings import apply_settings
from .gguf.values import u32
from .gguf_plan import (
    FILE_TYPES,
    Output,
    PlannedTensor,
    native_type,
    parse_types,
    plan_outputs,
)
from .imatrix import ImportanceMatrix
from .kept import Keep, Kept, kept_file_type, main_type, own_formats
from .pooling import sentence_pooling
from .prepare import prepare
from .quant_plan import Care
from .quantize import QuantizeOptions, chosen_matrix, output_names, quantized_metadata
from .reshard import opened
from .tokenizers import Vocabulary, find_tokenizer, load_vocabulary, vocabulary_entries
from .vocab_fix import fix_sizes, trimmed, whole_vocabulary

_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class GgufReport:
    """What was written, or would be.

    Attributes:
        target: the file (its first shard is ``files[0]`` when it is split).
        architecture: ``general.architecture``.
        type: the type asked for.
        nbytes: size of the file, or of all shards.
        tensors: every tensor with its type and size.
        metadata: every metadata entry.
        warnings: what a user should know.
        files: the files' names.
        more: the reports of the other types, when several were asked for.
        kept: what became of weights that come quantized.
    """

    target: Path
    architecture: str
    type: str
    nbytes: int
    tensors: Sequence[PlannedTensor]
    metadata: Sequence[KeyValue]
    warnings: tuple[str, ...]
    files: tuple[str, ...] = ()
    more: tuple[GgufReport, ...] = ()
    kept: Kept | None = None


def to_gguf(
    src: Checkpoint | str | Path,
    out: str | Path,
    type: str = "f16",
    *,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    name: str | None = None,
    pre: str | None = None,
    weights: str = "model",
    vocab_size: int | None = None,
    quantization: QuantizeOptions | None = None,
    metadata: str | Path | None = None,
    vocab_only: bool = False,
    vocab_fix: str | None = None,
    verify: bool = True,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> GgufReport:
    """Write a checkpoint as a GGUF file and return what was (or would be) written.

    Args:
        src, config: an opened checkpoint or its path; config.json or folder if it has none.
        out: the file to write; for several types see ``mconv.convert.quantize.output_names``. In a
            folder the file is named by GGUF's naming convention.
        type: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``auto`` (the weights' own 16-bit type),
            ``keep`` (quantized weights keep their bits where a type holds them exactly, others as
            in ``auto``), a mix such as ``q4_k_m``, or several with commas, all made in one pass.
        tokenizer: folder with the tokenizer; by default the checkpoint's own.
        name: the model's name in the metadata; by default from its folder or model card.
        pre: llama.cpp's name of the pre-tokenizer, instead of the recognized one.
        weights: ``model`` or ``master`` (the optimizer's fp32 copies).
        vocab_size: true vocabulary size where the checkpoint's embedding is padded.
        quantization: changes to the mixes, importance matrix, metadata overrides, shard size.
        metadata: JSON file with ``general.*`` keys that win over the model card's.
        vocab_only: write no tensors; ``src`` may be a folder without weights.
        vocab_fix: ``pad`` or ``trim``, where tokenizer and embedding differ in size.
        verify: compare replicas and sample master copies before writing.
        force, resume: replace an existing file; continue an interrupted run.
        dry_run: plan and prove everything, write nothing.
        limits, progress: memory and threads; called with (bytes done, bytes in all).

    Raises:
        MconvError: any bad input, impossible request or full disk; nothing is left behind.
    """
    folder = Path(tokenizer) if tokenizer is not None else None
    options = _checked(quantization or QuantizeOptions())
    general = _General(name, Path(metadata) if metadata is not None else None)
    ckpt = _without_weights(src, config) if vocab_only else open_source(src, config)
    with config_named(ckpt):
        ready = ckpt if vocab_only else prepare(
            ckpt, weights=weights, vocab_size=vocab_size, tokenizer=folder, verify=verify
        )  # fmt: skip
        words = _Words(folder, pre, vocab_only, vocab_fix)
        reports, files = _plan(ready, Path(out), type, words, general, options)
    if not dry_run:
        write_loose(
            reports[0].target, files, plan=_fingerprint(files, ckpt, [weights], options),
            force=force, resume=resume, limits=limits, progress=progress,
        )  # fmt: skip
    return replace(reports[0], more=tuple(reports[1:]))


def open_source(src: Checkpoint | str | Path, config: str | Path | None) -> Checkpoint:
    """Open a checkpoint, its weights decoded unless GGUF takes their blocks as they are.

    They are decoded to float32, so that they are rounded once, to the output's type.

    Raises:
        MconvError: it cannot be opened.
    """
    ckpt = opened(src, config, decode=False)
    settings = (ckpt.config or {}).get("quantization_config")
    if not isinstance(settings, Mapping):
        return ckpt
    try:
        taken = find_architecture(ckpt.config).quantized
    except MconvError:  # told by what comes after
        taken = ()
    return ckpt if settings.get("quant_method") in taken else dequantized(ckpt, np.dtype("f4"))


def _plan(
    ckpt: Checkpoint,
    out: Path,
    type: str,
    words: _Words,
    general: _General,
    options: QuantizeOptions,
) -> tuple[list[GgufReport], list[OutFile]]:
    """Decide everything about the files; ``ckpt`` has Hugging Face names."""
    architecture = find_architecture(ckpt.config)
    ckpt, tokens = words.sized(ckpt, architecture)
    assert ckpt.config is not None
    config = complete_config(ckpt.config, architecture, ckpt.weights)
    config[POOLING] = sentence_pooling(model_folder(ckpt))
    mapped = [] if words.only else _tensors(architecture, config, ckpt)
    types = parse_types(type, mapped)
    vocabulary = words.read(ckpt, architecture, config["vocab_size"], tokens)
    entries = architecture.adjust_entries(
        vocabulary_entries(architecture.adjust_vocabulary(vocabulary, config))
    )
    model = _Model(ckpt, architecture, config, mapped, entries, general)
    matrix = chosen_matrix(options)
    facts = model_facts(model.entries(0))
    notes = misspelt(options.settings, model.entries(0))
    care = Care(options.best, options.measure)
    outputs = plan_outputs(mapped, types, facts, options.recipe, matrix, care)
    every = [model.metadata(one, options, matrix) for one in outputs]
    folder, names = _names(out, outputs, every, vocab_only=words.only)
    reports, files = [], []
    for one, file_name, metadata in zip(outputs, names, every, strict=True):
        shards = cut_by_size(one.out, options.max_shard_size, count=options.max_shard_tensors)
        made = plan_files(file_name, metadata, shards, big_endian=options.big_endian)
        files += made
        reports.append(model.report(one, folder / file_name, metadata, made, notes))
    return reports, files


def _names(
    out: Path, outputs: Sequence[Output], every: Sequence[list[KeyValue]], *, vocab_only: bool
) -> tuple[Path, list[str]]:
    """Return the folder and one file name per output."""
    if out.is_dir():
        if vocab_only:
            return out, [f"{naming(metadata, '', 'vocab')}.gguf" for metadata in every]
        pairs = zip(every, outputs, strict=True)
        return out, [f"{naming(metadata, _label(one))}.gguf" for metadata, one in pairs]
    if len(outputs) > 1 or "{type}" in out.name:
        return output_names("", out, [one.type for one in outputs])
    return out.parent, [out.name]


def _label(output: Output) -> str:
    """Return what a file name calls an output's type."""
    if output.type != Keep.KEEP.name:
        return output.type
    return main_type(output.mapped, native_type(output.mapped).name)


@dataclass(frozen=True, slots=True)
class _General:
    """What the user says of ``general.*``: the model's name, and a JSON file of keys."""

    name: str | None
    override: Path | None


@dataclass(frozen=True, slots=True)
class _Words:
    """Where the vocabulary comes from, and what becomes of it."""

    tokenizer: Path | None
    pre: str | None
    only: bool
    fix: str | None

    def sized(
        self, ckpt: Checkpoint, architecture: Architecture
    ) -> tuple[Checkpoint, Vocabulary | None]:
        """Return the checkpoint with an embedding of the vocabulary's size, and all tokens."""
        if self.fix is None or self.only:
            return ckpt, None
        files = find_tokenizer(self.tokenizer, ckpt.assets)
        tokens = whole_vocabulary(files, architecture, ckpt.config, self.pre)
        return fix_sizes(ckpt, architecture, tokens, self.fix), tokens

    def read(
        self, ckpt: Checkpoint, architecture: Architecture, size: int, tokens: Vocabulary | None
    ) -> Vocabulary:
        """Return the vocabulary of a size."""
        if tokens is not None and len(tokens.tokens) > size:
            return trimmed(tokens, size)
        files = find_tokenizer(self.tokenizer, ckpt.assets)
        return load_vocabulary(
            files, architecture.tokenizer, ckpt.config, vocab_size=size, pre=self.pre
        )


@dataclass(frozen=True, slots=True)
class _Model:
    """What the outputs of one call have in common."""

    ckpt: Checkpoint
    architecture: Architecture
    config: dict[str, Any]
    mapped: list[MappedTensor]
    vocabulary: list[KeyValue]
    general: _General

    @property
    def folder(self) -> Path:
        return model_folder(self.ckpt)

    def metadata(
        self, output: Output, options: QuantizeOptions, matrix: ImportanceMatrix | None
    ) -> list[KeyValue]:
        """The converter's entries, changed as llama-quantize does for a mix."""
        target = output.mix.target if output.mix is not None else None
        native = native_type(self.mapped).name
        keep = output.type == Keep.KEEP.name
        file_type = FILE_TYPES[output.type if target is None and not keep else native]
        if keep or file_type != FILE_TYPES["Q8_0"]:
            file_type = kept_file_type(output.mapped, file_type)
        entries = self.entries(file_type)
        if target is not None:
            entries = quantized_metadata(entries, target, options.override_kv, matrix)
        else:
            for text in options.override_kv:
                entries = set_entry(entries, parse_override(text))
        return apply_settings(entries, options.settings)

    def entries(self, file_type: int) -> list[KeyValue]:
        """The converter's entries."""
        shapes = [(m.name, m.tensor.shape) for m in self.mapped]
        asked = self.general
        general = general_entries(
            self.architecture.name, self.folder, shapes, asked.name, asked.override
        )
        entries = [
            general[0],
            *self.architecture.first_keys(self.config),
            *general[1:],
            *model_entries(self.architecture, self.config, file_type),
            u32("general.quantization_version", _QUANTIZATION_VERSION),
            *self.vocabulary,
        ]
        return list({entry.key: entry for entry in entries}.values())

    def report(
        self,
        output: Output,
        target: Path,
        metadata: list[KeyValue],
        files: list[OutFile],
        notes: tuple[str, ...],
    ) -> GgufReport:
        """Describe an output."""
        return GgufReport(
            target=target,
            architecture=self.architecture.name,
            type=output.type,
            nbytes=sum(f.size for f in files),
            tensors=output.tensors,
            metadata=metadata,
            warnings=(*_told(self.ckpt, output.kept), *output.warnings, *notes),
            files=tuple(f.name for f in files),
            kept=output.kept,
        )


def _told(ckpt: Checkpoint, kept: Kept | None) -> tuple[str, ...]:
    """The checkpoint's warnings, and what was kept in place of that all is decoded."""
    lines = kept.lines() if kept is not None else ()
    return (*(text for text in ckpt.warnings if not (lines and DECODED in text)), *lines)


def _without_weights(src: Checkpoint | str | Path, config: str | Path | None) -> Checkpoint:
    """Return the small files of a model folder as a checkpoint without tensors."""
    if isinstance(src, Checkpoint):
        return src
    folder = Path(src) if Path(src).is_dir() else Path(src).parent
    assets = find_assets([folder])
    empty = Checkpoint(path=Path(src), format="folder", weights={}, assets=assets)
    return opened(empty, config if config is not None else folder)


def _checked(options: QuantizeOptions) -> QuantizeOptions:
    if options.prune_layers or options.keep_split:
        raise ConfigError("layers are pruned, and splits kept, by `mconv quantize` on a GGUF file")
    return options


def _fingerprint(
    files: Sequence[OutFile], ckpt: Checkpoint, asked: Sequence[str], options: QuantizeOptions
) -> str:
    """Digest of the work, headers included, so that a resumed run has the same metadata."""
    sources = {path for t in ckpt.weights.values() for path, _, _ in t.spans()}
    if options.imatrix is not None:
        sources.add(Path(options.imatrix))
    headers = []
    for file in files:
        header = file.parts[0][1]
        assert isinstance(header, BytesPayload)
        headers.append(hashlib.sha256(header.data).hexdigest())
    return fingerprint(files, sources, json.dumps([*asked, options.best, *headers]))


def model_folder(ckpt: Checkpoint) -> Path:
    """Return the folder a model is named after: the one of its config.json, else its own."""
    configs = [path.parent for path in ckpt.assets if path.name == "config.json"]
    folder = configs[0] if configs else ckpt.path
    return (folder if folder.is_dir() else folder.parent).resolve()


def _tensors(
    architecture: Architecture, config: dict[str, Any], ckpt: Checkpoint
) -> list[MappedTensor]:
    """Return the computed tensors, then those of the checkpoint."""
    extra = []
    for one in architecture.extra_tensors:
        values = one.build(config)
        if values is not None:
            extra.append(MappedTensor(one.gguf, "(computed)", from_array(values), True))
    return own_formats(extra + map_tensors(architecture, config, ckpt.weights, ckpt.tied))
