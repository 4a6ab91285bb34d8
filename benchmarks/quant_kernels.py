"""Quantization speed per processor core, side by side with ggml (and gguf-py for decoding).

    MCONV_GGML_LIB=.../libggml-base.so python benchmarks/quant_kernels.py [TYPE ...] [--rows N]

Both run on one thread in alternation on the same weights (heavy-tailed, standard deviation 0.02);
a figure is the median over rounds of million weights per CPU second, a ratio the median of the
paired ratios. ``same`` says whether the bytes were equal. Bars come from the project's issue on
quantization: ratios that a run must reach with AVX-512 and with AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable

import gguf
import numpy as np
from mconv.quant import TYPES, GgmlType, codec, quantize

COLS = 4096
SEARCHED = ("Q4_K", "Q5_K", "Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS")
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


def bar(name: str, importance: bool, isa: str) -> float:
    """Return the ratio to ggml that this kernel must reach."""
    if name in SEARCHED:
        return {"avx512": 5.0, "avx2": 3.0}.get(isa, 1.0)
    if name in LEGACY and importance:
        return {"avx512": 5.0, "avx2": 5.0}.get(isa, 1.0)
    if name.startswith(("IQ1", "IQ2", "IQ3")):
        return {"avx512": 3.0, "avx2": 3.0}.get(isa, 1.0)
    return 1.0 if isa in ("avx512", "avx2") else 0.0


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one call on this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def ggml_encoder(lib: ctypes.CDLL, kind: GgmlType) -> Callable[..., np.ndarray]:
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip

    def encode(x: np.ndarray, weights: np.ndarray | None, out: np.ndarray) -> np.ndarray:
        data = None if weights is None else weights.ctypes.data
        lib.ggml_quantize_chunk(kind.id, x.ctypes.data, out.ctypes.data, 0, *x.shape, data)
        return out

    return encode


def encode_line(
    lib: ctypes.CDLL, kind: GgmlType, x: np.ndarray, weights: np.ndarray | None, rounds: int
) -> tuple[str, bool]:
    """Time one type; returns the table line and whether it met every bar."""
    native = codec._native()
    theirs, ours = (np.zeros((x.shape[0], kind.row_bytes(COLS)), np.uint8) for _ in range(2))
    encode, raw = ggml_encoder(lib, kind), x.view(np.uint8)
    encode(x[:1], weights, theirs[:1])
    quantize(x[:1], kind, weights)
    isas = native.instruction_sets()
    base: list[float] = []
    ratio: dict[str, list[float]] = {isa: [] for isa in isas}
    same = True
    for _ in range(rounds):
        for isa in isas:
            reference = cpu_seconds(lambda: encode(x, weights, theirs))
            own = cpu_seconds(
                lambda isa=isa: native.quantize(kind.id, raw, 0, COLS, weights, ours, 1, isa)
            )
            same &= bool((theirs == ours).all())
            base.append(x.size / reference / 1e6)
            ratio[isa].append(reference / own)
    speed = statistics.median(base)
    cells, met = [], same
    for isa in isas:
        r = statistics.median(ratio[isa])
        need = bar(kind.name, weights is not None, isa)
        met &= r >= need
        cells.append(f"{speed * r:8.0f} {r:6.1f}x{' ' if r >= need else '!'}")
    flag = "yes" if weights is not None else "no"
    line = f"{kind.name:8} {flag:>10} {speed:8.1f} {' '.join(cells)}   {'yes' if same else 'NO'}"
    return line, met


def decode_line(kind: GgmlType, x: np.ndarray, rounds: int) -> str:
    """Time decoding against gguf-py."""
    native = codec._native()
    data = quantize(x, kind, np.ones(COLS, np.float32))
    out = np.empty(x.size, np.float32)
    own = min(
        cpu_seconds(lambda: native.dequantize(kind.id, data.reshape(-1), out, 1))
        for _ in range(rounds)
    )
    speed = x.size / own / 1e6
    try:
        gguf_type = gguf.GGMLQuantizationType(kind.id)
        peer = min(
            cpu_seconds(lambda: gguf.quants.dequantize(data, gguf_type)) for _ in range(rounds)
        )
    except (ValueError, NotImplementedError):
        return f"{kind.name:8} {speed:9.0f}      none"
    return f"{kind.name:8} {speed:9.0f} {x.size / peer / 1e6:9.0f} {peer / own:6.1f}x"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="ggml type names (default: all)")
    parser.add_argument("--rows", type=int, default=32, help=f"rows of {COLS} weights")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if codec._native() is None:
        sys.exit("no native kernels are installed")
    lib = ctypes.CDLL(os.environ["MCONV_GGML_LIB"])
    rng = np.random.default_rng(0)
    x = (rng.standard_t(5, (options.rows, COLS)) * 0.02).astype(np.float32)
    weights = rng.gamma(0.5, 1, COLS).astype(np.float32)
    kinds = [t for t in TYPES.values() if t.is_quantized and t.storable]
    kinds = [t for t in kinds if not options.types or t.name in options.types]
    isas = " ".join(f"{isa + ' Mw/s':>14} ratio" for isa in codec._native().instruction_sets())
    print(f"encode, million weights per CPU second\ntype     importance     ggml {isas}   same")
    met = True
    for kind in kinds:
        for w in (None, weights):
            if w is None and kind.needs_importance:
                continue
            line, good = encode_line(lib, kind, x, w, options.rounds)
            met &= good
            print(line, flush=True)
    print("\ndecode, one core\ntype      mconv Mw/s  gguf-py  ratio")
    for kind in kinds:
        print(decode_line(kind, x, options.rounds), flush=True)
    print("\nall bars met" if met else "\nbars missed: see the lines marked with !")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
