"""Tiny models of every family: what the hub's checkpoints of them look like, with random weights.

``FAMILIES`` says how transformers makes one (``save_family``). ``tests/fixtures/archs.json`` holds
what that gave (configuration, tensor names and shapes), so that ``write_recorded`` can write the
same folder with reproducible weights and without transformers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import tiny
import tiny_tokenizers
from tiny_families import FAMILIES as USUAL
from tiny_families import SIZES, SPM, SPM_JSON, Family
from tiny_families_more import FAMILIES as MORE

__all__ = ["FAMILIES", "OFFICIAL", "SPM", "SPM_JSON"]
KEEP = 600
FAMILIES: Mapping[str, Family] = {**USUAL, **MORE}
OFFICIAL = [name for name, family in FAMILIES.items() if family.official]


def pre_tokenizer(family: Family) -> str:
    """Return the name of the pre-tokenizer that a hash over the vocabulary does not tell."""
    known = family.vocab.startswith(SPM) or family.vocab in tiny_tokenizers.KINDS
    return "" if known else family.vocab


def kept(family: Family) -> list[str]:
    """Return the entries of config.json that llama.cpp's converter shall take as they are."""
    return ["*"] if family.made else [*family.written]


def vocabulary(folder: Path, data: Path, family: Family) -> int:
    """Write the tokenizer; return the number of tokens."""
    if family.vocab in tiny_tokenizers.KINDS:
        folder.mkdir(parents=True, exist_ok=True)
        tiny_tokenizers.KINDS[family.vocab][0](folder, data)
        return int(json.loads((folder / "config.json").read_text())["vocab_size"])
    if family.vocab == SPM_JSON:
        return tiny.save_spm_json(data / "llama2-tokenizer.model", folder)
    if family.vocab == SPM:
        return tiny.save_spm(data / "llama2-tokenizer.model", folder)
    size = tiny.save_bpe(data / "vocab" / f"ggml-vocab-{family.vocab}.gguf", folder, KEEP)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for text in family.tokens:
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        document["added_tokens"].append({"id": size, "content": text, "special": True, **plain})
        size += 1
    path.write_text(json.dumps(document), encoding="utf-8")
    return size


def save_family(name: str, folder: Path, data: Path, **changes: Any) -> Any:
    """Make a random model with transformers, save it with its tokenizer, return it."""
    import torch
    import transformers

    family = FAMILIES[name]
    size = vocabulary(folder, data, family)
    settings = {**SIZES, "vocab_size": size, **family.config, **changes}
    settings = {k: v for k, v in settings.items() if v is not None or k == "q_lora_rank"}
    config = getattr(transformers, f"{family.base_config or family.base}Config")(**settings)
    torch.manual_seed(7)
    model = getattr(transformers, family.model or f"{family.base}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases are constant at birth
            spread = 0.2 if weight.ndim == 1 else 0.15
            weight.add_(torch.randn(weight.shape) * spread)
    model.save_pretrained(folder)
    path = folder / "config.json"
    written = {**json.loads(path.read_text()), **family.written}
    path.write_text(json.dumps({k: v for k, v in written.items() if v is not ...}))
    return model


def filled(shapes: Mapping[str, tuple[int, ...]], vocab: int) -> dict[str, list[int]]:
    """Return shapes with the number of tokens where they have a zero."""
    return {name: [n or vocab for n in shape] for name, shape in shapes.items()}


def made_record(family: Family, folder: Path, data: Path) -> dict[str, Any]:
    """Return the record of a family that transformers does not know."""
    size = vocabulary(folder, data, family)
    config = {**family.config, "vocab_size": size, "dtype": "bfloat16"}
    return {"config": config, "tensors": pack(filled(family.made, size))}


def to_mxfp4(record: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded gpt-oss whose experts are in MXFP4."""
    tensors = []
    for pattern, *ranges, shape in record["tensors"]:
        if pattern.endswith(("experts.down_proj", "experts.gate_up_proj")):
            count, columns, rows = shape
            blocks = [count, rows, columns // 32]
            tensors.append([f"{pattern}_blocks", *ranges, [*blocks, 16]])
            tensors.append([f"{pattern}_scales", *ranges, blocks])
        else:
            tensors.append([pattern, *ranges, shape])
    config = {**record["config"], "quantization_config": {"quant_method": "mxfp4"}}
    return {"config": config, "tensors": tensors}


def pack(shapes: Mapping[str, list[int]]) -> list[Any]:
    """Return names and shapes, runs of numbers folded: [pattern, [first, end, step] ..., shape]."""
    folded: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        folded.setdefault((re.sub(r"\.\d+(?=\.)", ".{}", name), tuple(shape)), []).append(name)
    packed: list[Any] = []
    for (pattern, shape), names in folded.items():
        numbers = [[int(n) for n in re.findall(r"\.(\d+)(?=\.)", name)] for name in names]
        runs = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        steps = [run[1] - run[0] if len(run) > 1 else 1 for run in runs]
        ranges = [[run[0], run[-1] + 1, step] for run, step in zip(runs, steps, strict=True)]
        one = [pattern, *ranges, list(shape)]
        regular = sorted(n for n, _ in unpack([one])) == sorted(names)
        packed += [one] if regular else [[name, list(shape)] for name in names]
    assert dict(unpack(packed)) == dict(shapes)
    return packed


def unpack(packed: list[Any]) -> Iterator[tuple[str, list[int]]]:
    """Yield the names and shapes of ``pack``."""
    for pattern, *ranges, shape in packed:
        for numbers in product(*(range(*run) for run in ranges)):
            yield pattern.format(*numbers), shape


def write_recorded(record: Mapping[str, Any], folder: Path, data: Path, name: str) -> None:
    """Write a recorded model folder with BF16 weights.

    They are made of exact arithmetic on raw random bits, so they are the same everywhere.
    """
    from safetensors.numpy import save_file

    vocabulary(folder, data, FAMILIES[name])
    (folder / "config.json").write_text(json.dumps(record["config"]))
    bits = np.random.PCG64(5)
    weights = {}
    for hf, shape in sorted(unpack(record["tensors"])):
        raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(44)
        values = raw.astype(np.float32).reshape(shape) * np.float32(2**-19) - np.float32(1)
        weights[hf] = values.astype(ml_dtypes.bfloat16)
        if FAMILIES[name].exact and hf.endswith(FAMILIES[name].exact):
            weights[hf] = (np.rint(values * 8) / 8).astype(ml_dtypes.bfloat16)
        if hf.endswith(("_blocks", "_scales")):
            scaled = raw % np.uint64(256 if hf.endswith("_blocks") else 20)
            base = 0 if hf.endswith("_blocks") else 110
            weights[hf] = (scaled.astype(np.uint8) + np.uint8(base)).reshape(shape)
    save_file(weights, folder / "model.safetensors")
