"""mconv.to_gguf and llama.cpp's own converter on the same models: are the files equal?

    MCONV_LLAMACPP=/path/to/llama.cpp python benchmarks/compare_official.py [MODEL ...]

Makes small models with transformers (all architectures of ``tests/convert/tiny.py``, real
vocabularies), converts each with both converters to F32, F16, BF16 and Q8_0, and compares metadata
key by key (value and type) and tensors byte by byte. Prints a table and exits with 1 on a
difference. Needs the test data (``MCONV_TEST_DATA``), torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
from mconv.convert.gguf import GgufFile, ValueType, open_gguf
from mconv.convert.to_gguf import to_gguf

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MCONV_TEST_DATA", ROOT.parent / "shared" / "data"))
TYPES = ("f32", "f16", "bf16", "q8_0")
VOCABULARIES = {
    "llama": "spm",
    "mistral": "spm",
    "odd": "starcoder",
    "llama-linear": "deepseek-llm",
    "llama3": "llama-bpe",
    "llama-tied-biased": "gpt-2",
    "qwen2": "qwen2",
    "qwen2-yarn": "qwen2",
    "qwen3": "qwen2",
}


def main() -> int:
    """Run the comparison; return the exit code."""
    tiny = load_tiny()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[*tiny.MODELS])
    parser.add_argument("--types", nargs="*", default=TYPES)
    options = parser.parse_args()
    source = os.environ.get("MCONV_LLAMACPP")
    if not source:
        print("set MCONV_LLAMACPP to llama.cpp's source folder", file=sys.stderr)
        return 2
    print(f"{'model':18} {'vocab':13} {'type':5} {'tensors':>9} {'keys':>7} file  theirs  ours")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            folder = Path(scratch) / name
            save(tiny, name, folder)
            for kind in options.types:
                failed += compare(Path(source), name, folder, kind)
    return 1 if failed else 0


def load_tiny() -> ModuleType:
    """Import the model builders of the tests."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests" / "convert" / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(tiny: ModuleType, name: str, folder: Path) -> None:
    """Write the model and its tokenizer."""
    vocabulary = VOCABULARIES[name]
    if vocabulary == "spm":
        size = tiny.save_spm(DATA / "llama2-tokenizer.model", folder)
    else:
        size = tiny.save_bpe(DATA / "vocab" / f"ggml-vocab-{vocabulary}.gguf", folder)
    tiny.save_model(name, folder, size)


def compare(source: Path, name: str, folder: Path, kind: str) -> int:
    """Convert with both, print a row, return 1 on a difference."""
    theirs, ours = folder.parent / f"{name}-theirs.gguf", folder.parent / f"{name}-ours.gguf"
    script = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(folder)]
    start = time.perf_counter()
    run = subprocess.run(
        [*script, "--outfile", str(theirs), "--outtype", kind], capture_output=True, check=False
    )
    middle = time.perf_counter()
    if run.returncode:
        print(f"{name:18} {kind:5} llama.cpp's converter failed:\n{run.stderr.decode()[-2000:]}")
        return 1
    to_gguf(folder, ours, kind, force=True)
    end = time.perf_counter()
    a, b = open_gguf(theirs), open_gguf(ours)
    keys, tensors = different_keys(a, b), different_tensors(a, b)
    same = theirs.read_bytes() == ours.read_bytes()
    print(
        f"{name:18} {VOCABULARIES[name]:13} {kind:5} "
        f"{len(b.tensors) - len(tensors):4}/{len(a.tensors):<4} "
        f"{len(a.entries) - len(keys):3}/{len(a.entries):<3} {'same' if same else 'DIFF'}  "
        f"{middle - start:5.1f}s {end - middle:5.2f}s",
        flush=True,
    )
    for line in (*keys, *tensors):
        print(f"    {line}")
    theirs.unlink()
    ours.unlink()
    return int(not same)


def different_keys(a: GgufFile, b: GgufFile) -> list[str]:
    """Return one line per metadata key that differs, and one when only their order does."""
    lines = []
    for key in dict.fromkeys((*a.entries, *b.entries)):
        if key not in a or key not in b:
            lines.append(f"{key}: only in {'theirs' if key in a else 'ours'}")
            continue
        x, y = a.entries[key], b.entries[key]
        if (x.type, x.items) != (y.type, y.items):
            lines.append(f"{key}: type {x.type.name} and {y.type.name}")
        elif x.type == ValueType.ARRAY and list(x.value) != list(y.value):
            pairs = enumerate(zip(x.value, y.value, strict=False))
            where = next((i for i, (p, q) in pairs if p != q), min(len(x.value), len(y.value)))
            lines.append(f"{key}: differs from item {where} of {len(x.value)} and {len(y.value)}")
        elif x.type != ValueType.ARRAY and x.value != y.value:
            lines.append(f"{key}: {x.value!r} and {y.value!r}")
    if not lines and list(a.entries) != list(b.entries):
        lines.append("the keys come in another order")
    return lines


def different_tensors(a: GgufFile, b: GgufFile) -> list[str]:
    """Return one line per tensor that differs."""
    lines = []
    for name in dict.fromkeys((*a.tensors, *b.tensors)):
        if name not in a.tensors or name not in b.tensors:
            lines.append(f"{name}: only in {'theirs' if name in a.tensors else 'ours'}")
            continue
        x, y = a.tensors[name], b.tensors[name]
        if (x.type, x.shape) != (y.type, y.shape):
            lines.append(f"{name}: {x.type.name} {x.shape} and {y.type.name} {y.shape}")
        elif not np.array_equal(a.raw(name), b.raw(name)):
            lines.append(f"{name}: {(a.raw(name) != b.raw(name)).sum()} bytes of {x.nbytes} differ")
    return lines


if __name__ == "__main__":
    sys.exit(main())
