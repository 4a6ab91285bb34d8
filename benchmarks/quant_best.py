"""Relative error of each type: ggml's own encoding, and ``best=True`` in the same format and size.

    python benchmarks/quant_best.py [TYPE ...] [--gguf MODEL.gguf]

Three kinds of weights: heavy-tailed (Student's t with 4 degrees of freedom), Gaussian, and the
matrices of a model that was really trained (the one in ``tests/fixtures/trained``, or the F16, BF16
and F32 tensors of a GGUF file). Errors are root mean squares relative to the weights'. The last
column is the share of the error that is left on trained weights with an importance vector,
measured as weighted by it. Fails if ``best`` is worse anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mconv.convert.gguf import open_gguf
from mconv.convert.gguf.tensors import GgufTensors
from mconv.quant import TYPES, ErrorSums, GgmlType, quantize
from mconv.shardio import open_checkpoint
from mconv.shardio.tensor import LazyTensor

COLS = 1024
TRAINED = Path(__file__).parent.parent / "tests" / "fixtures" / "trained" / "hf"
MAX_WEIGHTS = 1 << 22


def matrices(path: Path) -> Iterator[LazyTensor]:
    """Yield the matrices of a GGUF file or a checkpoint."""
    if path.suffix != ".gguf":
        yield from (t for t in open_checkpoint(path).weights.values() if t.ndim == 2)
        return
    file = open_gguf(path)
    for name, info in file.tensors.items():
        if len(info.shape) == 2 and not info.type.is_quantized:
            yield GgufTensors(file).values(name)


def trained(path: Path) -> np.ndarray:
    """Return the weights of a model as float32 rows [rows, COLS]."""
    parts = [np.asarray(t.read()).astype(np.float32).reshape(-1) for t in matrices(path)]
    flat = np.concatenate(parts)[:MAX_WEIGHTS]
    return flat[: flat.size // COLS * COLS].reshape(-1, COLS)


def compare(
    kind: GgmlType, x: np.ndarray, importance: np.ndarray | None
) -> tuple[ErrorSums, float, float]:
    """Return the errors and the million weights per CPU second of both ways."""
    speed = []
    for best in (False, True):
        sums, start = ErrorSums(), time.thread_time()
        quantize(x, kind, importance, best=best, threads=1, errors=sums if best else None)
        speed.append(x.size / max(1e-9, time.thread_time() - start) / 1e6)
    return sums, speed[0], speed[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="ggml type names (default: all)")
    parser.add_argument("--gguf", type=Path, default=TRAINED, help="a trained model, 16 or 32 bits")
    parser.add_argument("--rows", type=int, default=512, help=f"synthetic rows of {COLS} weights")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (options.rows, COLS)
    weights = {
        "heavy": (rng.standard_t(4, shape) * 0.02).astype(np.float32),
        "gauss": (rng.standard_normal(shape) * 0.02).astype(np.float32),
        "trained": trained(options.gguf),
    }
    importance = rng.gamma(0.5, 1, COLS).astype(np.float32)
    kinds = [t for t in TYPES.values() if t.is_quantized and t.storable]
    kinds = [t for t in kinds if not options.types or t.name in options.types]
    head = "".join(f"{name + ' ggml':>14} {'best':>7} {'left':>5}" for name in weights)
    print(f"{'type':8}{head}   Mw/s ggml's  best   left with importance")
    worse = False
    for kind in kinds:
        # types that need importance get equal weights, which is as near as one comes to none
        plain = np.ones(COLS, np.float32) if kind.needs_importance else None
        cells = []
        for x in weights.values():
            sums, default_speed, best_speed = compare(kind, x, plain)
            worse |= sums.chosen > sums.default
            left = sums.chosen_rmse / sums.default_rmse
            cells.append(f"{sums.default_rmse:14.5f} {sums.chosen_rmse:7.5f} {left:5.0%}")
        guided, _, _ = compare(kind, weights["trained"], importance)
        worse |= guided.chosen > guided.default
        print(
            f"{kind.name:8}{''.join(cells)}   {default_speed:11.0f} {best_speed:5.0f} "
            f"{guided.chosen_rmse / guided.default_rmse:22.0%}",
            flush=True,
        )
    print("best is worse somewhere" if worse else "best is never worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
