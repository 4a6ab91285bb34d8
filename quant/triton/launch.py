"""Which kernel encodes which type, and how it is launched on torch tensors.

``encoding`` describes a launch without any device, so that tests can compile every kernel ahead of
time. For all of them contraction is off, and denormals are not flushed in library code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..types import TYPES, GgmlType
from . import iq4, kquants, legacy, plain, q36, tiny

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "enable_reflect_ftz": False}
_LANES = 128  # sub-blocks per program: one for each thread


_POINTERS = {1: "*i8", 2: "*i16", 4: "*i32"}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with everything that is fixed when it is compiled.

    Attributes:
        kernel: the jitted function.
        arguments: what it takes at run time: names and triton's types.
        constants: what it takes at compile time.
        block: elements that count as one in the number of blocks given to it.
        options: for triton's compiler.
    """

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    block: int
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))


def _arguments(float_kind: int, unit: int, names: str) -> dict[str, str]:
    table = {
        "x": "*i64" if float_kind == 0 else "*i32",
        "importance": "*i64",
        "means": "*fp32",
        "out": _POINTERS[unit],
        "bad": "*i32",
        "blocks": "i32",
        "rows": "i32",
        "cols": "i32",
    }
    return {name: table[name] for name in names.split()}


_TINY = {
    # kernel, elements per block, blocks per program, bytes of an output unit
    "Q8_0": (plain.encode_q8_0, 32, 64, 2),
    "MXFP4": (tiny.encode_mxfp4, 32, 64, 1),
    "NVFP4": (tiny.encode_nvfp4, 64, 32, 2),
    "TQ1_0": (tiny.encode_tq1_0, 256, 16, 2),
    "TQ2_0": (tiny.encode_tq2_0, 256, 16, 2),
    "Q1_0": (tiny.encode_q1_0, 128, _LANES, 2),
    "Q2_0": (tiny.encode_q2_0, 64, 64, 2),
}
_LEGACY = {"Q4_0": (4, False), "Q5_0": (5, False), "Q4_1": (4, True), "Q5_1": (5, True)}
_SEARCHED: dict[str, tuple[Any, int, int, dict[str, Any]]] = {
    # kernel, sub-blocks per block, bytes of an output unit, further constants
    "Q2_K": (kquants.encode_q2_k, 16, 4, {}),
    "Q3_K": (q36.encode_q3_k, 16, 2, {}),
    "Q4_K": (kquants.encode_q45_k, 8, 4, {"BITS": 4}),
    "Q5_K": (kquants.encode_q45_k, 8, 4, {"BITS": 5}),
    "Q6_K": (q36.encode_q6_k, 16, 2, {}),
    "IQ4_NL": (iq4.encode_iq4_nl, 1, 2, {}),
    "IQ4_XS": (iq4.encode_iq4_xs, 8, 4, {}),
}


def has_kernel(name: str, *, full: bool = False) -> bool:
    """Return whether a type has a fused kernel; ``full`` asks for the least-error search."""
    return name in _SEARCHED or (not full and (name in _TINY or name in _LEGACY))


def names() -> list[str]:
    """Return every type that has a kernel."""
    return [*_TINY, *_LEGACY, *_SEARCHED]


def encoding(name: str, float_kind: int, weighted: bool, *, full: bool = False) -> Launch:
    """Return the launch that encodes ``name``.

    ``float_kind`` is 0, 1 or 2 for float32, float16 and bfloat16 input; ``weighted`` says whether
    there is an importance vector.
    """
    plain_names, weighted_names = "x out bad blocks", "x importance out bad blocks cols"
    constants: dict[str, Any] = {"FLOAT": float_kind}
    if name in _TINY:
        kernel, block, per_program, unit = _TINY[name]
        arguments = _arguments(float_kind, unit, plain_names)
        return Launch(kernel, arguments, constants | {"BLOCKS": per_program}, block)
    if name in _LEGACY:
        bits, minimum = _LEGACY[name]
        constants |= {"BITS": bits, "MINIMUM": minimum, "BLOCKS": _LANES if weighted else 64}
        if not weighted:
            return Launch(
                plain.encode_legacy, _arguments(float_kind, 2, plain_names), constants, 32
            )
        names = "x importance means out bad blocks cols"
        arguments = _arguments(float_kind, 4 if minimum else 2, names)
        return Launch(legacy.encode_weighted, arguments, constants, 32)
    kernel, parts, unit, more = _SEARCHED[name]
    constants |= {"WEIGHTED": weighted, "PURE": full, **more, "BLOCKS": _LANES // parts}
    arguments = _arguments(float_kind, unit, weighted_names)
    return Launch(kernel, arguments, constants, TYPES[name].block)


def means(float_kind: int) -> Launch:
    """Return the launch that finds the mean square of every row."""
    arguments = _arguments(float_kind, 4, "x means rows cols")
    options = OPTIONS | {"num_warps": 1}
    return Launch(legacy.row_means, arguments, {"FLOAT": float_kind, "ROWS": 32}, 1, options)


def encode(
    rows: Any, kind: GgmlType, importance: Any | None, *, full: bool = False, lanes: int = 1
) -> tuple[Any, Any]:
    """Encode a contiguous [rows, cols] tensor (float32, float16 or bfloat16) on its device.

    Args:
        rows: fewer than 2**31 elements; rows are multiples of the block.
        kind: a type with a kernel.
        importance: float32 [cols] on the same device, or None.
        full: the least-error search of the K and IQ4 types (``importance`` is then needed).
        lanes: how many times more blocks a program takes; only the interpreter gains from it.

    Returns:
        uint8 [rows, row bytes], and an int32 [1] that is not zero if a value is NaN or infinite
        (the bytes mean nothing then).
    """
    import torch

    count, cols = rows.shape
    assert rows.is_contiguous() and rows.numel() < 1 << 31
    float_kind = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[rows.dtype]
    launch = encoding(kind.name, float_kind, importance is not None, full=full)
    view = {"*i8": torch.int8, "*i16": torch.int16, "*i32": torch.int32}[launch.arguments["out"]]
    out = torch.empty(count, kind.row_bytes(cols), dtype=torch.uint8, device=rows.device)
    bad = torch.zeros(1, dtype=torch.int32, device=rows.device)
    values: dict[str, Any] = {
        "x": rows.view(torch.int64 if float_kind == 0 else torch.int32),
        "out": out.view(view),
        "bad": bad,
        "blocks": rows.numel() // launch.block,
        "rows": count,
        "cols": cols,
    }
    values["importance"] = bad if importance is None else importance.view(torch.int64)
    if "means" in launch.arguments:
        values["means"] = torch.empty(count, dtype=torch.float32, device=rows.device)
        _run(means(float_kind), values, count, lanes)
    _run(launch, values, values["blocks"], lanes)
    return out, bad


def _run(launch: Launch, values: dict[str, Any], count: int, lanes: int) -> None:
    import torch

    constants = dict(launch.constants)
    size = "ROWS" if "ROWS" in constants else "BLOCKS"
    constants[size] *= lanes
    programs = -(-count // constants[size])
    arguments = [values[name] for name in launch.arguments]
    with torch.cuda.device(values["x"].get_device()):  # triton launches on the current device
        launch.kernel[(programs,)](*arguments, **constants, **launch.options)
