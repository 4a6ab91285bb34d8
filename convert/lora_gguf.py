"""``mconv to-gguf ADAPTER OUT.gguf --lora``: a PEFT LoRA adapter as a GGUF adapter.

llama.cpp adds alpha / rank * B A to a weight, with one alpha for all. What PEFT scales otherwise
(rsLoRA, patterns of ranks and alphas) goes into B. Matrices that GGUF rearranges are rearranged in
their factors: rows in B, a stack of experts in both. The format is llama.cpp's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, UnsupportedError, counted
from ..quant import GgmlType, type_by_name
from ..shardio.assets import load_json
from ..shardio.payload import BytesPayload
from ..shardio.peft import Adapter, adapter_scale, read_adapter
from ..shardio.staging import fingerprint, write_loose
from ..shardio.stream import Limits, OutFile, Progress
from ..shardio.tensor import LazyTensor
from .architectures import (
    TRANSFORMS,
    Architecture,
    Line,
    complete_config,
    dimensions,
    find_architecture,
    stacking,
    table_lines,
)
from .general import general_entries, naming
from .gguf import KeyValue, TensorSpec
from .gguf.files import OutTensor, plan_files
from .gguf.known_keys import misspelt
from .gguf.settings import apply_settings
from .gguf.values import f32, u32
from .gguf_plan import FILE_TYPES, PlannedTensor, payload
from .to_gguf import GgufReport

_MERGE = "; merge it into the model instead: mconv to-gguf BASE OUT --adapter ADAPTER"
#: Transforms that act on the rows of a matrix, and so on B alone.
_ROW_WISE = ("", "permute_q", "permute_k", "split_gate_up", "ungroup_qkv", "split_qkv_pairs")
_FLOAT32 = np.dtype(np.float32)
_QUANTIZATION_VERSION = 2
_NORMS = ("_layernorm", ".norm")


def lora_to_gguf(
    adapter: str | Path,
    out: str | Path,
    type: str = "f32",
    *,
    base: str | Path,
    name: str | None = None,
    metadata: str | Path | None = None,
    settings: Sequence[str] = (),
    big_endian: bool = False,
    force: bool = False,
    dry_run: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> GgufReport:
    """Write a PEFT adapter as a GGUF file that llama.cpp loads beside its base model.

    Args:
        adapter: folder with ``adapter_config.json``.
        out: the file to write, or a folder (named by convention then).
        type: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        base: config.json of the base model, or its folder; its weights are not needed.
        name: the adapter's name in the metadata.
        metadata: JSON file with ``general.*`` keys.
        settings: metadata as ``KEY=VALUE``.
        big_endian: write for big-endian machines.
        force: replace an existing file.
        dry_run: plan and check everything, write nothing.
        limits, progress: memory and threads; called with (bytes done, bytes in all).

    Raises:
        UnsupportedError: DoRA, whole modules, or weights whose factors GGUF cannot hold.
        MconvError: an adapter that does not fit the base model.
    """
    kind = _kind(type)
    architecture, full = _family(Path(base))
    read = read_adapter(Path(adapter) if Path(adapter).is_dir() else Path(adapter).parent)
    _refuse(read)
    pairs = _pairs(read, architecture, full, _alpha(read))
    tensors = [_planned(t, kind) for pair in pairs for t in pair.tensors]
    override = Path(metadata) if metadata is not None else None
    own = _entries(read, architecture, pairs, name, override)
    entries = apply_settings(own, settings)
    target = Path(out)
    if target.is_dir():
        target = target / f"{naming(entries, kind.name, 'LoRA')}.gguf"
    files = plan_files(target.name, entries, [[_out(t) for t in tensors]], big_endian=big_endian)
    if not dry_run:
        plan = _fingerprint(files, tensors)
        write_loose(target, files, plan=plan, force=force, limits=limits, progress=progress)
    return GgufReport(
        target=target,
        architecture=architecture.name,
        type=kind.name,
        nbytes=files[0].size,
        tensors=tensors,
        metadata=entries,
        warnings=misspelt(settings, own),
        files=(target.name,),
    )


def _kind(name: str) -> GgmlType:
    if name.upper() not in FILE_TYPES:
        raise ConfigError(f"an adapter's type is f32, f16, bf16 or q8_0, not {name!r}")
    return type_by_name(name.upper())


def _family(path: Path) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of a base model and its completed configuration."""
    config = load_json(path / "config.json" if path.is_dir() else path)
    architecture = find_architecture(config)
    return architecture, complete_config(config, architecture)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The factors of one GGUF weight, or a norm that comes whole.

    Attributes:
        name: of the weight.
        shape: of the weight.
        tensors: (name, tensor), as written.
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[tuple[str, LazyTensor], ...]


def _entries(
    adapter: Adapter,
    architecture: Architecture,
    pairs: Sequence[_Pair],
    name: str | None,
    override: Path | None,
) -> list[KeyValue]:
    """Return the metadata before a user's settings."""
    shapes = [(pair.name, pair.shape) for pair in pairs]
    folder = adapter.folder.resolve()
    return [
        *general_entries(architecture.name, folder, shapes, name, override, adapter=True),
        f32("adapter.lora.alpha", _alpha(adapter)),
        u32("general.quantization_version", _QUANTIZATION_VERSION),
    ]


def _out(tensor: PlannedTensor) -> OutTensor:
    spec = TensorSpec(tensor.name, tensor.shape, tensor.type.id, tensor.nbytes)
    return OutTensor(spec, payload(tensor))


def _fingerprint(files: Sequence[OutFile], tensors: Sequence[PlannedTensor]) -> str:
    """Digest of the work, the header included."""
    header = files[0].parts[0][1]
    assert isinstance(header, BytesPayload)
    sources = {path for t in tensors for path, _, _ in t.tensor.spans()}
    return fingerprint(files, sources, hashlib.sha256(header.data).hexdigest())


def _refuse(adapter: Adapter) -> None:
    if adapter.settings.get("use_dora"):
        raise UnsupportedError(f"{adapter.folder}: GGUF adapters cannot hold DoRA{_MERGE}")
    whole = [n for n in adapter.whole if not any(mark in n for mark in _NORMS)]
    if whole:
        raise UnsupportedError(
            f"{adapter.folder}: {counted(len(whole), 'tensor is', 'tensors are')} "
            f"whole, not low-rank ({whole[0]}; "
            f"modules_to_save or trained biases), GGUF adapters cannot hold them{_MERGE}"
        )
    biased = [m for m, parts in adapter.modules.items() if "lora_B.bias" in parts]
    if biased:
        raise UnsupportedError(f"{adapter.folder}: {biased[0]} has a bias in lora_B{_MERGE}")


def _alpha(adapter: Adapter) -> float:
    """Return the alpha that makes alpha / rank the scale of most modules."""
    alpha, rank = adapter.settings.get("lora_alpha"), adapter.settings.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1 or not alpha:
        raise ConfigError(
            f"{adapter.folder}: adapter_config.json says lora_alpha {alpha!r} and r {rank!r}"
        )
    return alpha * math.sqrt(rank) if adapter.settings.get("use_rslora") else float(alpha)


def _pairs(
    adapter: Adapter, architecture: Architecture, config: Mapping[str, Any], alpha: float
) -> list[_Pair]:
    """Find the line of each module and rearrange its factors, in the order of the file."""
    tied = bool(config.get("tie_word_embeddings"))
    lines = {n: line for line in table_lines(architecture, config, tied=tied) for n in line.sources}
    sizes = dimensions(architecture, config)
    place: dict[int, int] = {}
    found: dict[int, tuple[Line, dict[str, Mapping[str, LazyTensor]]]] = {}
    pairs: list[tuple[int, _Pair]] = []
    modules = [*((f"{m}.weight", m) for m in adapter.modules), *((n, "") for n in adapter.whole)]
    for position, (weight, module) in enumerate(modules):
        name = weight if weight in lines else architecture.prefix + weight
        line = lines.get(name)
        if line is None or (tied and line.outputs[0] == "output.weight"):
            raise FormatError(
                f"{adapter.folder}: changes {weight}, which a {architecture.name} model as the "
                f"base's config.json describes it does not have{_MERGE}"
            )
        if not module:
            pairs.append((position, _norm(adapter, line, weight)))
            continue
        found.setdefault(id(line), (line, {}))[1][name] = _scaled(adapter, module, alpha)
        place[id(line)] = position
    for key, (line, parts) in found.items():
        pairs += [(place[key], pair) for pair in _rearranged(adapter, line, parts, sizes)]
    return [pair for _, pair in sorted(pairs, key=lambda item: item[0])]


def _norm(adapter: Adapter, line: Line, weight: str) -> _Pair:
    if line.rule.transform:
        raise UnsupportedError(f"{adapter.folder}: {weight} cannot be kept whole{_MERGE}")
    tensor = adapter.whole[weight]
    return _Pair(line.outputs[0], tensor.shape, ((line.outputs[0], tensor),))


def _scaled(adapter: Adapter, module: str, alpha: float) -> dict[str, LazyTensor]:
    """Return A [rank, in] and B [out, rank] of a module, B with what alpha / rank does not say."""
    parts = adapter.modules[module]
    scale = adapter_scale(adapter, module, parts)
    embedding = "lora_embedding_A" in parts
    a, b = (parts.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise FormatError(f"{adapter.folder}: {module} needs two matrices, lora_A and lora_B")
    factor = scale * a.shape[0] / alpha
    if not math.isclose(factor, 1.0, rel_tol=1e-12):
        b = b.cast(_FLOAT32).map(partial(np.multiply, np.float32(factor)), _FLOAT32)
    if a.dtype != b.dtype:
        a, b = a.cast(_FLOAT32), b.cast(_FLOAT32)
    return {"a": a, "b": b}


def _rearranged(
    adapter: Adapter,
    line: Line,
    parts: Mapping[str, Mapping[str, LazyTensor]],
    sizes: Mapping[str, int],
) -> list[_Pair]:
    how = line.rule.transform or stacking(line.rule.hf)
    absent = [name for name in line.sources if name not in parts]
    if absent:
        raise UnsupportedError(
            f"{adapter.folder}: changes some experts of {line.title}, but not {absent[0]}{_MERGE}"
        )
    many_a, many_b = ([parts[name][x] for name in line.sources] for x in "ab")
    _check_shapes(adapter, line, many_a[0], many_b[0], turned=how == "transpose")
    try:
        if len(line.sources) > 1:
            made_a, made_b = (TRANSFORMS[how].apply(many, sizes) for many in (many_a, many_b))
        elif how == "transpose":  # PEFT's factors are those of the transposed weight already
            made_a, made_b = many_a, many_b
        elif how in _ROW_WISE:
            made_b = TRANSFORMS[how].apply(many_b, sizes)
            made_a = many_a * len(made_b)
        else:
            raise UnsupportedError(
                f"{adapter.folder}: {line.title} is rearranged in GGUF ({how}) as two factors "
                f"cannot be{_MERGE}"
            )
    except ValueError as error:
        raise FormatError(f"{adapter.folder}: {line.title}: {error}") from error
    out = []
    for name, a, b in zip(line.outputs, made_a, made_b, strict=True):
        shape = (*b.shape[:-1], a.shape[-1])
        if name == "token_embd.weight":  # looked up by token, so that factor comes transposed
            a = a.permute((1, 0))
        out.append(_Pair(name, shape, ((f"{name}.lora_a", a), (f"{name}.lora_b", b))))
    return out


def _check_shapes(
    adapter: Adapter, line: Line, a: LazyTensor, b: LazyTensor, *, turned: bool
) -> None:
    want = line.shape
    if want is None:
        return
    embedding = line.outputs[0] == "token_embd.weight" and (b.shape[0], a.shape[1]) != want
    want = want[::-1] if turned or embedding else want
    if (b.shape[0], a.shape[1]) != want:
        raise FormatError(
            f"{adapter.folder}: {line.title}: lora_B {list(b.shape)} and lora_A {list(a.shape)} do "
            f"not make a weight of {list(want)}"
        )


def _planned(item: tuple[str, LazyTensor], kind: GgmlType) -> PlannedTensor:
    name, tensor = item
    if tensor.ndim == 1:
        kind = type_by_name("F32")
    elif tensor.shape[-1] % kind.block:
        kind = type_by_name("F16")
    nbytes = prod(tensor.shape[:-1]) * kind.row_bytes(tensor.shape[-1])
    return PlannedTensor(name, name, tensor.shape, kind, nbytes, tensor)
