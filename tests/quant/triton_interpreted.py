"""Run the Triton kernels in triton's interpreter and compare them with the CPU's bytes.

    python triton_interpreted.py encode TYPE... | calls | decode | exponents | flags

Run by test_triton.py in a process of its own: triton decides at its import whether it interprets.
Prints JSON: what was compared, and the differences.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from cases import golden_inputs
from mconv.errors import QuantError
from mconv.quant import TYPES, dequantize, device, quantize
from mconv.quant.fallback import encode as encode_array
from mconv.quant.floats import BFLOAT16
from mconv.quant.triton.decode import decode
from mconv.quant.triton.launch import encode, has_kernel, names


def _tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def _encode(name, x, weights, lanes=1, full=False) -> np.ndarray:
    importance = None if weights is None else torch.from_numpy(weights.copy())
    data, bad = encode(_tensor(x), TYPES[name], importance, full=full, lanes=lanes)
    assert not int(bad)
    return data.numpy()


def _places(got: np.ndarray, want: np.ndarray, labels: list[str]) -> list[str]:
    """Labels of the groups of rows that differ."""
    rows = (got != want).any(axis=1).reshape(len(labels), -1).any(axis=1)
    return [label for label, differs in zip(labels, rows, strict=True) if differs]


def check_encode(name: str) -> dict[str, list[str]]:
    """Golden inputs without importance and under every importance vector side by side."""
    inputs, weights = golden_inputs()
    x, labels = np.concatenate(list(inputs.values())), list(inputs)
    found = {"plain": _places(_encode(name, x, None, 64), quantize(x, name), labels)}
    every = [w for w in weights.values() if w is not None]
    wide, importance = np.tile(x, len(every)), np.concatenate(every)
    got = _encode(name, wide, importance, 256)
    found["importance"] = _places(got, quantize(wide, name, importance), labels)
    if has_kernel(name, full=True):
        got = _encode(name, x, every[1], 64, full=True)
        want = encode_array(x, TYPES[name], every[1], full=True)
        found["full"] = _places(got, want, labels)
    narrow = (np.float16, BFLOAT16) if name in ("Q8_0", "Q4_K") else (BFLOAT16,)
    for dtype in narrow:  # several programs, the last one not full
        part = (np.random.default_rng(1).standard_normal((5, 1280)) * 0.1).astype(dtype)
        same = (_encode(name, part, None, 1) == quantize(part, name)).all()
        found[str(np.dtype(dtype))] = [] if same else ["rows"]
    return found


def check_decode() -> dict[str, list[str]]:
    """Random bytes: NaN and infinite scales among them."""
    found = {}
    for name in names():
        kind = TYPES[name]
        data = np.random.default_rng(3).integers(0, 256, (9, kind.row_bytes(1280)), np.uint8)
        got = decode(torch.from_numpy(data.copy()), kind, lanes=8).numpy()
        want = dequantize(data, name, (9, 1280)).reshape(-1)
        same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
        found[name] = [] if same.all() else [str(int((~same).sum()))]
    return found


def check_exponents() -> dict[str, list[str]]:
    """MXFP4's logarithm: every power of two and the numbers just below it."""
    n = np.arange(-148, 128)[:, None]
    steps = np.arange(100)[None, :]
    values = (np.ldexp(1.0, n) * (1 - steps / 2**24)).astype(np.float32).reshape(-1)
    x = np.zeros((values.size, 32), np.float32)
    x[:, 3] = values
    return {"log2": [] if (_encode("MXFP4", x, None, 512) == quantize(x, "MXFP4")).all() else ["x"]}


def check_flags() -> dict[str, list[str]]:
    """A NaN or infinity in the last block is reported."""
    found: dict[str, list[str]] = {name: [] for name in names()}
    cases = [(name, 1279, np.nan) for name in names()]
    cases += [(name, 1251, -np.inf) for name in ("Q8_0", "Q4_0", "NVFP4", "Q6_K", "Q1_0")]
    for name, place, value in cases:
        x = np.zeros((1, 1280), np.float32)
        x[0, place] = value
        _, bad = encode(torch.from_numpy(x), TYPES[name], None)
        found[name] += [] if int(bad) else [f"{value} at {place}"]
    return found


def check_calls() -> dict[str, list[str]]:
    """The public calls on a device with kernels: slabs, dtypes, refusals."""
    device.encoder = lambda place, kind, full=False: (
        encode if has_kernel(kind.name, full=full) else None
    )
    device.decoder = lambda place, kind: decode
    device._SLAB = 2048
    found = {}
    weights = np.random.default_rng(2).gamma(0.5, 1, 512).astype(np.float32)
    for name in ("Q8_0", "Q5_0", "Q6_K"):
        for dtype in (np.float32, np.float16, BFLOAT16):
            x = np.random.default_rng(1).standard_normal((2, 5, 512)).astype(dtype)
            data = quantize(x, name, weights, device="cpu:0")
            same = (data == quantize(x, name, weights)).all()
            back = dequantize(data, name, x.shape, device="cpu:0", dtype=dtype)
            same &= (back == dequantize(data, name, x.shape, dtype=dtype)).all()
            found[f"{name} {np.dtype(dtype)}"] = [] if same else ["differs"]
    x = np.ones((5, 512), np.float32)
    x[4, 300] = np.nan
    for value, text in ((x, "row 4, column 300"), (np.full((1, 512), 1e30, np.float32), "float16")):
        try:
            quantize(value, "Q8_0", device="cpu:0")
            found[text] = ["accepted"]
        except QuantError as error:
            found[text] = [] if text in str(error) else [str(error)]
    best = [quantize(x[:2], "Q4_K", best=True, device=place) for place in ("cpu", "cpu:0")]
    found["best"] = [] if (best[0] == best[1]).all() else ["differs"]
    return found


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # inf and NaN are part of the game
    torch.set_num_threads(1)
    check = {
        "calls": check_calls,
        "decode": check_decode,
        "exponents": check_exponents,
        "flags": check_flags,
    }
    if sys.argv[1] == "encode":
        print(json.dumps({name: check_encode(name) for name in sys.argv[2:]}))
    else:
        print(json.dumps(check[sys.argv[1]]()))


if __name__ == "__main__":
    main()
