"""``mconv quantize`` and ``llama-quantize`` on the same models: are the files equal?

    MCONV_LLAMA_QUANTIZE=/path/to/llama-quantize python benchmarks/compare_llama_quantize.py

Tiny models (dense, grouped heads, experts, tied, odd rows, Falcon, 80 layers; see
``tests/convert/tiny_gguf.py``) are quantized to every target by both, with and without an
importance matrix, then with each option. Files are compared as a whole, and tensor by tensor where
they differ. Prints a table; exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from mconv.cli import cli
from mconv.convert.gguf import GgufFile, open_gguf
from mconv.errors import MconvError
from mconv.quant.recipes import TARGETS

ROOT = Path(__file__).resolve().parent.parent

OPTIONS: dict[str, tuple[str, list[str]]] = {
    "pure": ("Q4_K_M", ["--pure"]),
    "pure-f16": ("F16", ["--pure"]),
    "leave-output": ("Q5_K_S", ["--leave-output-tensor"]),
    "output-type": ("Q4_K_M", ["--output-tensor-type", "q8_0"]),
    "embedding-type": ("IQ4_XS", ["--token-embedding-type", "bf16"]),
    "tensor-type": (
        "Q4_K_S",
        ["--tensor-type", r"blk\.[0-2]\.attn_v=q8_0", "--tensor-type", "ffn_down=q3_k"],
    ),
    "prune": ("Q4_K_M", ["--prune-layers", "2,5"]),
    "prune-first": ("Q3_K_M", ["--prune-layers", "0,3"]),
    "override-kv": (
        "Q8_0",
        ["--override-kv", "general.name=str:Other", "--override-kv", "x.y=int:7",
         "--override-kv", "x.z=float:0.1", "--override-kv", "test.bool=bool:false"],
    ),
    "copy": ("COPY", []),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison."""

    model: str
    label: str
    target: str
    source: Path
    options: list[str]


def main() -> int:
    """Run the comparison; return the exit code."""
    tiny = load_tiny()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[*tiny.MODELS])
    parser.add_argument("--targets", nargs="*", default=[*TARGETS])
    parser.add_argument("--no-options", action="store_true")
    parsed = parser.parse_args()
    peer = os.environ.get("MCONV_LLAMA_QUANTIZE")
    if not peer:
        print("set MCONV_LLAMA_QUANTIZE to the llama-quantize program", file=sys.stderr)
        return 2
    print(f"{'model':8} {'case':15} {'target':10} {'result':40} {'theirs':>7} {'ours':>7}")
    failed = compared = 0
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(tiny, Path(scratch), parsed.models, parsed.targets, parsed.no_options):
            result, theirs, ours = compare(Path(peer), case, Path(scratch))
            bad = not result.startswith(("equal", "both refuse", "only llama-quantize refuses"))
            failed += bad
            compared += 1
            print(
                f"{case.model:8} {case.label:15} {case.target:10} {result:40} {theirs:6.2f}s "
                f"{ours:6.2f}s",
                flush=True,
            )
    print(f"{failed} of {compared} differ")
    return 1 if failed else 0


def cases(
    tiny: ModuleType, folder: Path, models: Sequence[str], targets: Sequence[str], plain: bool
) -> Iterator[Case]:
    """All comparisons of the chosen models."""
    for name in models:
        spec = tiny.MODELS[name]
        source = tiny.write_model(folder / f"{name}.gguf", spec)
        matrix = str(tiny.write_imatrix(folder / f"{name}.imatrix.gguf", spec))
        for target in targets:
            if target == "COPY":
                continue
            yield Case(name, "plain", target, source, [])
            yield Case(name, "imatrix", target, source, ["--imatrix", matrix])
        if plain:
            continue
        for label, (target, options) in OPTIONS.items():
            if "prune" in label and spec.layers < 6:
                continue
            yield Case(name, label, target, source, options)
            if "prune" in label:
                yield Case(name, label, target, source, [*options, "--imatrix", matrix])
        dat = str(tiny.write_dat(folder / f"{name}.dat", spec))
        yield Case(name, "imatrix .dat", "IQ3_XXS", source, ["--imatrix", dat])
        part = ["--imatrix", matrix, "--include-weights", "ffn_up"]
        yield Case(name, "include", "Q4_K_M", source, part)
        part = ["--imatrix", matrix, "--exclude-weights", "ffn_down"]
        yield Case(name, "exclude", "Q4_K_M", source, part)
        q8 = folder / f"{name}.q8.gguf"
        run_ours(source, q8, "Q8_0", [])
        yield Case(name, "requantize", "Q4_K_M", q8, ["--allow-requantize"])
        yield Case(name, "requantize", "IQ4_XS", q8, ["--allow-requantize", "--imatrix", matrix])
        (folder / name).mkdir()
        split = tiny.write_split(folder / name, spec)
        yield Case(name, "split input", "Q4_K_M", split, [])
        yield Case(name, "keep-split", "Q4_K_M", split, ["--keep-split"])


def compare(peer: Path, case: Case, folder: Path) -> tuple[str, float, float]:
    """Quantize with both; return a verdict and the seconds of each."""
    theirs, ours = folder / "theirs", folder / "ours"
    for place in (theirs, ours):
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            old.unlink()
    start = time.perf_counter()
    done = subprocess.run(
        [peer, *case.options, case.source, theirs / "m.gguf", case.target, "2"],
        capture_output=True,
        text=True,
        errors="replace",
    )
    middle = time.perf_counter()
    refused = run_ours(case.source, ours / "m.gguf", case.target, case.options)
    end = time.perf_counter()
    seconds = middle - start, end - middle
    if done.returncode or refused:
        if not refused:
            return ("only llama-quantize refuses", *seconds)
        return ("both refuse" if done.returncode else f"refused: {refused}", *seconds)
    names = sorted(p.name for p in theirs.iterdir())
    if names != sorted(p.name for p in ours.iterdir()):
        return (f"files differ: {names}", *seconds)
    for name in names:
        if (theirs / name).read_bytes() != (ours / name).read_bytes():
            return (difference(open_gguf(theirs / name), open_gguf(ours / name)), *seconds)
    kinds = {t.type.name for t in open_gguf(ours / names[0]).tensors.values()}
    return (f"equal ({', '.join(sorted(kinds - {'F32'}))})", *seconds)


def run_ours(source: Path, out: Path, target: str, options: Sequence[str]) -> str:
    """Run the command in this process; return its error, or an empty string."""
    try:
        cli.main(
            ["quantize", str(source), str(out), target, *options, "-q", "--force"],
            standalone_mode=False,
        )
    except MconvError as error:
        return str(error)
    return ""


def difference(theirs: GgufFile, ours: GgufFile) -> str:
    """Say in what two GGUF files differ."""
    if list(theirs.entries) != list(ours.entries):
        return f"keys: {set(theirs.entries) ^ set(ours.entries) or 'order'}"
    for key, entry in theirs.entries.items():
        other = ours.entries[key]
        if (entry.type, entry.items) != (other.type, other.items) or not np.array_equal(
            np.asarray(list(entry.value) if entry.items else entry.value),
            np.asarray(list(other.value) if other.items else other.value),
        ):
            return f"{key}: {entry.value!r} against {other.value!r}"
    if list(theirs.tensors) != list(ours.tensors):
        return "tensor names or order"
    for name, info in theirs.tensors.items():
        mine = ours.tensors[name]
        if info.type != mine.type or info.shape != mine.shape:
            return f"{name}: {info.type.name}{info.shape} against {mine.type.name}{mine.shape}"
        a, b = theirs.raw(name), ours.raw(name)
        if not np.array_equal(a, b):
            blocks = (a != b).reshape(-1, info.type.bytes).any(1)
            return f"{name} {info.type.name}: {blocks.sum()} of {blocks.size} blocks differ"
    return "equal tensors, other padding"


def load_tiny() -> ModuleType:
    """Import the model builder of the tests."""
    path = ROOT / "tests" / "convert" / "tiny_gguf.py"
    spec = importlib.util.spec_from_file_location("tiny_gguf", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_gguf"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
