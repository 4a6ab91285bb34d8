"""Match a checkpoint's tensors with an architecture's table, and report all that does not fit.

Every missing, unknown and mis-shaped tensor is collected first and told at once, before any byte
of a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ConfigError, did_you_mean
from ...shardio.tensor import LazyTensor
from ._config import layer_count
from ._record import Architecture, Config, TensorRule, dimensions
from ._transforms import TRANSFORMS

#: Buffers that some checkpoints carry and nobody needs.
_BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor of the output: its GGUF name, where it came from and its (lazy) values."""

    name: str
    hf: str
    tensor: LazyTensor
    keep_f32: bool


@dataclass(frozen=True, slots=True)
class _Expected:
    gguf: str
    rule: TensorRule
    shape: tuple[int, ...] | None
    required: bool


def map_tensors(
    architecture: Architecture,
    config: Config,
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
) -> list[MappedTensor]:
    """Return the output's tensors, in the order of their Hugging Face names.

    Args:
        architecture: the model family.
        config: its completed configuration.
        weights: tensors by Hugging Face name.
        tied: names that are other names for a tensor in ``weights``.

    Raises:
        ConfigError: tensors are missing, unknown or of another shape than the configuration says;
            the message lists them.
    """
    named = config.get("architectures") or [""]
    prefix = "model." if named[0] in architecture.headless else ""
    found = {prefix + n: t for n, t in weights.items() if not n.endswith(_BUFFERS)}
    aliases = {prefix + alias for alias in tied}
    expected = _expected(architecture, config, bool(prefix) or _is_tied(config, aliases))
    problems = _missing(expected, found, aliases) + _unknown(expected, found)
    problems += _shapes(expected, found)
    if problems:
        shown = "\n".join(f"  {line}" for line in problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConfigError(
            f"{len(problems)} tensors do not fit {architecture.name} as config.json describes it:\n"
            f"{shown}{more}\nCheck that config.json belongs to this checkpoint and that no shard "
            "is missing"
        )
    sizes = dimensions(config)
    return [_mapped(hf, expected[hf], found[hf], sizes) for hf in sorted(found)]


def _is_tied(config: Config, aliases: set[str]) -> bool:
    return bool(config.get("tie_word_embeddings")) or "lm_head.weight" in aliases


def _expected(architecture: Architecture, config: Config, tied: bool) -> dict[str, _Expected]:
    """Return everything that may be there, by Hugging Face name."""
    sizes = dimensions(config)
    out: dict[str, _Expected] = {}
    for rule in architecture.tensors:
        layers = range(layer_count(config)) if "{n}" in rule.hf else range(1)
        shape = tuple(sizes[name] for name in rule.shape) or None
        # the one optional tensor of most models is the head of those with a tied embedding
        required = not rule.optional or (rule.gguf == "output" and not tied)
        for n in layers:
            hf, gguf = rule.hf.replace("{n}", str(n)), rule.gguf.replace("{n}", str(n))
            out[f"{hf}.weight"] = _Expected(f"{gguf}.weight", rule, shape, required)
            if rule.bias != "no":
                always = required and rule.bias == "yes"
                out[f"{hf}.bias"] = _Expected(
                    f"{gguf}.bias", rule, shape[:1] if shape else None, always
                )
    return out


def _missing(
    expected: Mapping[str, _Expected], found: Mapping[str, LazyTensor], aliases: set[str]
) -> list[str]:
    return [
        f"missing: {name}"
        for name, want in expected.items()
        if want.required and name not in found and name not in aliases
    ]


def _unknown(expected: Mapping[str, _Expected], found: Mapping[str, LazyTensor]) -> list[str]:
    lines = []
    for name in found:
        if name not in expected:
            layer = re.search(r"\.(\d+)\.", name)
            deeper = layer and re.sub(r"\.\d+\.", ".0.", name, count=1) in expected
            hint = " (beyond the last layer)" if deeper else did_you_mean(name, expected)
            lines.append(f"unknown: {name}{hint}")
    return lines


def _shapes(expected: Mapping[str, _Expected], found: Mapping[str, LazyTensor]) -> list[str]:
    lines = []
    for name, tensor in found.items():
        want = expected[name].shape if name in expected else None
        if want is not None and tensor.shape != want:
            lines.append(f"shape: {name} is {list(tensor.shape)}, expected {list(want)}")
            if expected[name].gguf in ("token_embd.weight", "output.weight"):
                lines[-1] += _rows_hint(tensor.shape[0], want[0])
    return lines


def _rows_hint(rows: int, vocab: int) -> str:
    if rows > vocab:
        return (
            f": {rows - vocab} rows more than vocab_size; if they are padding, trim them with "
            f"--vocab-size {vocab}, if tokens were added, correct vocab_size in config.json"
        )
    return ": fewer rows than vocab_size; config.json or the tokenizer belongs to another model"


def _mapped(hf: str, want: _Expected, tensor: LazyTensor, sizes: Mapping[str, int]) -> MappedTensor:
    if want.rule.transform:
        tensor = TRANSFORMS[want.rule.transform].apply(tensor, sizes)
    return MappedTensor(want.gguf, hf, tensor, want.rule.keep_f32)
