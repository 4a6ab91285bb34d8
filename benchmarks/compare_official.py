"""mconv.to_gguf and llama.cpp's own converter on the same models: are the files equal?

    MCONV_LLAMACPP=/path/to/llama.cpp MCONV_LLAMA_QUANTIZE=/path/to/llama-quantize \\
        python benchmarks/compare_official.py [MODEL ...]

Makes small models with transformers (of ``tests/convert/tiny.py`` with real vocabularies, and of
every architecture, ``tests/convert/tiny_archs.py``), converts each with both converters to F32,
F16, BF16 and Q8_0, and with llama-quantize to Q4_K_M, and compares metadata key by key (value and
type) and tensors byte by byte. Prints a table and exits with 1 on a difference. Needs the test data
(``MCONV_TEST_DATA``), torch and transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from mconv.convert.gguf import GgufFile, ValueType, open_gguf
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "convert"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fixtures"))
import make_arch_digests
import tiny
import tiny_archs
from official_converter import OfficialError, official_convert, official_quantize

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MCONV_TEST_DATA", ROOT.parent / "shared" / "data"))
PLAIN = ("f32", "f16", "bf16", "q8_0")
MIXES = ("q4_k_m",)
QUANTIZE = "MCONV_LLAMA_QUANTIZE"
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[*tiny.MODELS, *tiny_archs.OFFICIAL])
    mixes = MIXES if os.environ.get(QUANTIZE) else ()
    parser.add_argument("--types", nargs="*", default=[*PLAIN, *mixes])
    options = parser.parse_args()
    source = os.environ.get("MCONV_LLAMACPP")
    if not source:
        print("set MCONV_LLAMACPP to llama.cpp's source folder", file=sys.stderr)
        return 2
    print(
        f"{'model':18} {'architecture':15} {'type':7} {'tensors':>9} {'keys':>7} file  theirs  ours"
    )
    failed = 0
    for name in options.models:
        family = tiny_archs.FAMILIES.get(name)
        mixed = family is None or (family.mixes and not family.mxfp4)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / f"tiny-{name}"
            how = prepare(name, folder)
            for kind in options.types:
                if kind in PLAIN or mixed:
                    failed += compare(Path(source), name, folder, kind, how)
    return 1 if failed else 0


def prepare(name: str, folder: Path) -> tuple[str, list[str]]:
    """Write a model with its tokenizer.

    Returns:
        Pre-tokenizer that llama.cpp cannot know, and entries of config.json that it loses.
    """
    if name in tiny.MODELS:
        vocabulary = VOCABULARIES[name]
        if vocabulary == "spm":
            size = tiny.save_spm(DATA / "llama2-tokenizer.model", folder)
        else:
            size = tiny.save_bpe(DATA / "vocab" / f"ggml-vocab-{vocabulary}.gguf", folder)
        tiny.save_model(name, folder, size)
        return "", []
    family = tiny_archs.FAMILIES[name]
    record = make_arch_digests.saved_record(name, folder.with_name(f"{name}-saved"))
    tiny_archs.write_recorded(record, folder, DATA, name)
    return tiny_archs.pre_tokenizer(family), tiny_archs.kept(family)


def unquantized(name: str) -> str:
    """Return the type that holds a model's weights as they are."""
    return "f32" if name in tiny.MODELS and tiny.MODELS[name][2] == "float32" else "auto"


def compare(source: Path, name: str, folder: Path, kind: str, how: tuple[str, list[str]]) -> int:
    """Convert with both, print a row, return 1 on a difference."""
    theirs, ours = folder.parent / f"{name}-theirs.gguf", folder.parent / f"{name}-ours.gguf"
    start = time.perf_counter()
    try:
        if kind in PLAIN:
            official_convert(source, folder, theirs, kind, *how)
        else:
            whole = folder.parent / f"{name}-auto.gguf"
            official_convert(source, folder, whole, unquantized(name), *how)
            official_quantize(Path(os.environ[QUANTIZE]), whole, theirs, kind.upper())
            whole.unlink()
    except OfficialError as error:
        print(f"{name:18} {kind:7} llama.cpp's converter failed:\n{error}")
        return 1
    middle = time.perf_counter()
    to_gguf(folder, ours, kind, force=True)
    end = time.perf_counter()
    a, b = open_gguf(theirs), open_gguf(ours)
    keys, tensors = different_keys(a, b), different_tensors(a, b)
    same = theirs.read_bytes() == ours.read_bytes()
    print(
        f"{name:18} {a['general.architecture']:15} {kind:7} "
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
