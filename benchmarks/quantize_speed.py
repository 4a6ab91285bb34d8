"""``mconv quantize`` and ``llama-quantize`` on a BF16 model of a billion weights: who is faster?

    MCONV_LLAMA_QUANTIZE=/path/to/llama-quantize python benchmarks/quantize_speed.py [TARGET ...]

The model has the shapes of Llama 3.2 1B and heavy-tailed random weights. Both programs run in turn
with the same number of threads, on files in the page cache; wall time, CPU seconds and peak
resident memory are those of the whole process. Prints a table with ratios (above 1: mconv takes
less).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from mconv.convert.gguf import TensorSpec, build_header
from mconv.convert.gguf.values import f32, string, u32
from mconv.quant import type_by_name
from measure import Measurement, run

LAYERS, EMBD, FF, HEADS, KV, VOCAB = 16, 2048, 8192, 32, 8, 128256


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=["Q8_0", "Q4_0", "Q6_K", "Q4_K_M", "IQ4_XS"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", type=Path, help="keep the model there for the next run")
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    peer = os.environ.get("MCONV_LLAMA_QUANTIZE")
    if not peer and not options.ours_only:
        print("set MCONV_LLAMA_QUANTIZE to the llama-quantize program", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"model-{options.layers}.gguf"
        if not source.exists():
            write_model(source, options.layers)
        print(f"{source.stat().st_size / 1e9:.2f} GB BF16, {options.threads} threads")
        print(f"{'target':8} {'tool':15} {'wall':>8} {'CPU':>8} {'peak MB':>8}   ratios")
        for target in options.targets:
            measure(target, source, None if options.ours_only else peer, options.threads)
    return 0


def measure(target: str, source: Path, peer: str | None, threads: int) -> None:
    """Run both programs once and print a row for each."""
    out = source.with_name("out.gguf")
    ours = run(
        "mconv",
        [sys.executable, "-m", "mconv", "quantize", source, out, target, "-q", "--force",
         "--threads", str(threads)],
    )  # fmt: skip
    mine = digest(out)
    out.unlink(missing_ok=True)
    if peer is None:
        print(row(target, ours))
        return
    theirs = run("llama-quantize", [peer, source, out, target, str(threads)])
    same = digest(out) == mine
    out.unlink(missing_ok=True)
    print(row(target, theirs))
    print(
        f"{row(target, ours)}   wall {theirs.wall / ours.wall:.1f}x, CPU "
        f"{theirs.cpu / ours.cpu:.1f}x, {'same bytes' if same else 'DIFFERENT BYTES'}",
        flush=True,
    )


def row(target: str, one: Measurement) -> str:
    """One line of the table."""
    failed = "" if one.ok else "  FAILED"
    return f"{target:8} {one.name:15} {one.wall:7.2f}s {one.cpu:7.2f}s {one.rss:8.0f}{failed}"


def digest(path: Path) -> str:
    """Digest a file without holding it."""
    found = hashlib.blake2b()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            found.update(part)
    return found.hexdigest()


def write_model(path: Path, layers: int) -> None:
    """Write the synthetic model."""
    shapes = {"token_embd.weight": (VOCAB, EMBD)}
    for i in range(layers):
        kv = EMBD // HEADS * KV
        for name, shape in {
            "attn_norm": (EMBD,), "attn_q": (EMBD, EMBD), "attn_k": (kv, EMBD),
            "attn_v": (kv, EMBD), "attn_output": (EMBD, EMBD), "ffn_norm": (EMBD,),
            "ffn_gate": (FF, EMBD), "ffn_up": (FF, EMBD), "ffn_down": (EMBD, FF),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}.weight"] = shape
    shapes["output_norm.weight"] = (EMBD,)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    dtypes = {n: np.dtype(np.float32) if len(s) == 1 else bf16 for n, s in shapes.items()}
    specs = [
        TensorSpec(n, s, type_by_name("F32" if len(s) == 1 else "BF16").id,
                   int(np.prod(s)) * dtypes[n].itemsize)
        for n, s in shapes.items()
    ]  # fmt: skip
    entries = [
        string("general.architecture", "llama"), u32("llama.block_count", layers),
        u32("llama.context_length", 8192), u32("llama.embedding_length", EMBD),
        u32("llama.feed_forward_length", FF), u32("llama.attention.head_count", HEADS),
        u32("llama.attention.head_count_kv", KV),
        f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
    ]  # fmt: skip
    header = build_header(entries, specs)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(header.data)
        for offset, (name, shape) in zip(header.offsets, shapes.items(), strict=True):
            file.seek(offset)
            left = int(np.prod(shape))
            while left:
                n = min(left, 1 << 23)
                x = rng.standard_t(4, n).astype(np.float32) * np.float32(0.02)
                file.write(x.astype(dtypes[name]).tobytes())
                left -= n
        file.truncate(header.file_size)


if __name__ == "__main__":
    sys.exit(main())
