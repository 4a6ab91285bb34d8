"""Quantization on a GPU, side by side: fused kernels, the torch programs, the CPU, and memory.

    python benchmarks/quant_gpu.py [TYPE ...] [--elements N] [--dtype bfloat16] [--json FILE]

Weights lie on the device, so that the kernels are measured and not the bus. ``GB/s`` counts the
bytes read and written; ``of copy`` compares that with a device-to-device copy of the same run.
The torch programs and the CPU's kernels (all cores) encode the same weights; ``same`` says whether
the kernel's bytes equal the CPU's. Decoding writes float32. ``end to end`` is ``quantize`` from
host memory to host memory. Without a GPU it says so and ends well.

``TRITON_INTERPRET=1 ... --device cpu --elements 16384`` runs the script itself without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from mconv.quant import TYPES, dequantize, quantize
from mconv.quant.fallback import array_encoder

COLS = 4096
UNWEIGHTED = {"Q8_0", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Clock:
    """Seconds of a call, by device events where there is a device."""

    def __init__(self, device: str, rounds: int) -> None:
        import torch

        self.torch, self.device, self.rounds = torch, device, rounds
        self.cuda = device != "cpu"

    def one(self, work: Callable[[], Any]) -> float:
        """Time one call."""
        if not self.cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        work()
        events[1].record()
        self.torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def median(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Median over rounds, and the first call (it compiles)."""
        first = time.perf_counter()
        work()
        if self.cuda:
            self.torch.cuda.synchronize()
        first = time.perf_counter() - first
        return statistics.median(self.one(work) for _ in range(self.rounds)), first


def to_device(x: np.ndarray, device: str) -> Any:
    """Send rows in their own dtype."""
    import torch

    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(x).to(device)


def copy_speed(clock: Clock, device: str, elements: int) -> float:
    """GB/s of a copy within the device, bytes read and written."""
    import torch

    a = torch.empty(max(elements * 2, 1 << 20), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / clock.median(lambda: b.copy_(a))[0] / 1e9


def encode_line(
    name: str, x: np.ndarray, rows: Any, weights: np.ndarray | None, clock: Clock, copy: float
) -> dict[str, Any]:
    """Measure one type; the same weights for everyone."""
    import torch
    from mconv.quant.triton.launch import encode, has_kernel

    kind, device = TYPES[name], str(rows.device)
    importance = None if weights is None else torch.from_numpy(weights).to(device)
    start = time.perf_counter()
    want = quantize(x, kind, weights)
    cpu = time.perf_counter() - start
    line: dict[str, Any] = {"type": name, "importance": weights is not None}
    part = rows[: max(1, rows.shape[0] // 8)]  # the torch programs need much memory
    program = array_encoder(kind)
    torch_time = clock.median(lambda: program(part.float(), importance))[0]
    line["torch_gw_s"] = part.numel() / torch_time / 1e9
    line["cpu_gw_s"] = x.size / cpu / 1e9
    if not has_kernel(name):
        return line
    seconds, first = clock.median(lambda: encode(rows, kind, importance))
    data, bad = encode(rows, kind, importance)
    slow = program(part.float(), importance).cpu().numpy()
    moved = x.nbytes + want.nbytes
    return line | {
        "gw_s": x.size / seconds / 1e9,
        "gb_s": moved / seconds / 1e9,
        "of_copy": moved / seconds / 1e9 / copy,
        "over_torch": torch_time * rows.numel() / part.numel() / seconds,
        "over_cpu": cpu / seconds,
        "first_call_s": first,
        "same": not int(bad) and bool((data.cpu().numpy() == want).all()),
        "torch_same": bool((slow == want[: len(slow)]).all()),
    }


def decode_line(name: str, x: np.ndarray, rows: Any, clock: Clock, copy: float) -> dict[str, Any]:
    """Measure decoding to float32."""
    import torch
    from mconv.quant.triton.decode import decode

    kind = TYPES[name]
    data = quantize(x, kind)
    start = time.perf_counter()
    want = dequantize(data, kind, x.shape).reshape(-1)
    cpu = time.perf_counter() - start
    packed = torch.from_numpy(data).to(rows.device)
    seconds, _ = clock.median(lambda: decode(packed, kind))
    moved = data.nbytes + want.nbytes
    same = (decode(packed, kind).cpu().numpy().view(np.uint32) == want.view(np.uint32)).all()
    return {
        "type": name,
        "gw_s": x.size / seconds / 1e9,
        "gb_s": moved / seconds / 1e9,
        "of_copy": moved / seconds / 1e9 / copy,
        "over_cpu": cpu / seconds,
        "same": bool(same),
    }


def whole_line(name: str, x: np.ndarray, device: str) -> dict[str, Any]:
    """Measure ``quantize`` from host to host."""
    times = []
    for place in (device, device, "cpu"):
        start = time.perf_counter()
        quantize(x, name, device=place)
        times.append(time.perf_counter() - start)
    return {"type": name, "gw_s": x.size / times[1] / 1e9, "over_cpu": times[2] / times[1]}


def show(line: dict[str, Any]) -> str:
    """One line of a table."""
    cells = []
    for key, value in line.items():
        if isinstance(value, bool):
            cells.append(f"{key} {'yes' if value else 'no'}")
        elif isinstance(value, float):
            cells.append(f"{key} {value:.3g}")
        else:
            cells.append(f"{value:8}")
    return "  ".join(cells)


def measure(chosen: list[str], x: np.ndarray, weights: np.ndarray, clock: Clock) -> dict[str, Any]:
    """Measure everything, printing as it goes; returns the figures."""
    from mconv.quant.triton.launch import names

    rows, device = to_device(x, clock.device), clock.device
    copy = copy_speed(clock, device, x.size)
    print(f"{x.size / 1e6:.1f} M weights of {x.dtype}; copy {copy:.0f} GB/s")
    found: dict[str, Any] = {"elements": x.size, "copy_gb_s": copy}
    found |= {"encode": [], "decode": [], "end to end": []}

    def add(table: str, line: dict[str, Any]) -> None:
        found[table].append(line)
        print(f"{table:10}", show(line), flush=True)

    for name in chosen:
        if not TYPES[name].needs_importance:
            add("encode", encode_line(name, x, rows, None, clock, copy))
        if name not in UNWEIGHTED:
            add("encode", encode_line(name, x, rows, weights, clock, copy))
    for name in chosen:
        if name in names():
            add("decode", decode_line(name, x, rows, clock, copy))
    for name in chosen:
        if device != "cpu" and name in ("Q8_0", "Q4_K"):
            add("end to end", whole_line(name, x, device))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="ggml type names (default: all with a kernel)")
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    try:
        import torch
        from mconv.quant.triton.launch import names
    except ImportError as error:
        print(f"nothing to measure: {error}")
        return 0
    if options.device != "cpu" and not torch.cuda.is_available():
        print("nothing to measure: torch sees no GPU")
        return 0
    where = torch.cuda.get_device_name() if options.device != "cpu" else "the interpreter"
    rng = np.random.default_rng(0)
    shape = (max(1, options.elements // COLS), COLS)
    x = (rng.standard_t(5, shape) * 0.02).astype(np.float32).astype(DTYPES[options.dtype])
    weights = rng.gamma(0.5, 1, COLS).astype(np.float32)
    print(where)
    clock = Clock(options.device, options.rounds)
    found = {"device": where} | measure(options.types or names(), x, weights, clock)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    lines = found["encode"] + found["decode"]
    good = all(line.get("same", True) and line.get("torch_same", True) for line in lines)
    print("all bytes are the CPU's" if good else "bytes differ: see same and torch_same")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
