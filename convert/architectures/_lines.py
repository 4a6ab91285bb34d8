"""A tensor table spelled out for one model: every line with full names, layer by layer.

``{n}`` becomes the layer (``{m}``: counted from the last), ``{a}``/``{e}``/``{h}``/``{k}`` all
experts, query heads or key-value heads, ``{q}`` the two parts of quantized blocks. The order of
lines is that of llama.cpp's converter, which goes through the Hugging Face names in alphabetical
order and writes a stack when its last part has come.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ._config import layer_count, prediction_layers
from ._record import Architecture, Config, TensorRule, dimensions

_COUNTS = {"{a}": "others", "{e}": "experts", "{h}": "heads", "{k}": "kv_heads"}
#: The two tensors that MXFP4 comes as.
_QUANTIZED = ("blocks", "scales")
_FIRST = "\0"
_LAST = "\uffff"


@dataclass(frozen=True, slots=True)
class Line:
    """One rule at one layer.

    Attributes:
        rule: the rule.
        sources: full Hugging Face names; several for a stack.
        outputs: full GGUF names; several for a fused tensor.
        shape: expected shape of each source; None: any.
        required: the model is broken without it.
        order: sorts lines as the output has them.
    """

    rule: TensorRule
    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    required: bool
    order: tuple[str, int]

    @property
    def title(self) -> str:
        """The Hugging Face name, a stack's with a star."""
        if len(self.sources) == 1:
            return self.sources[0]
        before, _, after = re.sub(r"\{[aehkq]\}", "*", self.rule.hf).partition("*")
        layer = re.search(r"\.(\d+)\.", self.sources[0])
        number = layer[1] if layer else ""
        suffix = "" if self.rule.exact else self.sources[0][self.sources[0].rindex(".") :]
        return f"{before}*{after}{suffix}".replace("{n}", number)


def table_lines(architecture: Architecture, config: Config, *, tied: bool) -> list[Line]:
    """Return all lines of a model, in the order of its output.

    Args:
        architecture: the model family.
        config: its completed configuration.
        tied: the model needs no head of its own.

    Raises:
        ConfigError: the configuration lacks an entry that shapes need.
    """
    sizes = dimensions(architecture, config)
    lines: list[Line] = []
    for index, rule in enumerate(architecture.tensors):
        if not rule.applies(config):
            continue
        for n in _layers(architecture, config, rule):
            lines += _spelled(rule, n, n - layer_count(config), sizes, index, tied=tied)
    return sorted(lines, key=lambda line: line.order)


def _layers(architecture: Architecture, config: Config, rule: TensorRule) -> Iterator[int]:
    if "{n}" not in rule.outputs[0]:
        yield 0
        return
    wanted, count = set(rule.layers.split()), layer_count(config)
    for n in range(count + prediction_layers(config)):
        kind = "moe" if architecture.moe_layer(config, n) else "dense"
        place = "main" if n < count else "mtp"
        if wanted <= {kind, place, *architecture.layer_tags(config, n)}:
            yield n


def _spelled(
    rule: TensorRule, layer: int, beyond: int, sizes: Mapping[str, int], index: int, *, tied: bool
) -> Iterator[Line]:
    shape = tuple(_size(sizes, name, rule) for name in rule.shape) or None
    # the one optional tensor of most models is the head of those with a tied embedding
    required = not rule.optional or (rule.gguf == "output" and not tied)
    suffixes = [""] if rule.exact else [".weight"] + [".bias"] * (rule.bias != "no")
    rows = slice(-1, None) if rule.transform == "transpose" else slice(1)
    hf = rule.hf.replace("{n}", str(layer)).replace("{m}", str(beyond))
    names, place = _expand(hf, sizes, rule)
    for suffix in suffixes:
        is_bias = suffix == ".bias"
        yield Line(
            rule,
            tuple(name + suffix for name in names),
            tuple(name.replace("{n}", str(layer)) + suffix for name in rule.outputs),
            (shape[rows] if is_bias else shape) if shape else None,
            required and (not is_bias or rule.bias == "yes"),
            (place if len(names) > 1 or place.endswith(_LAST) else place + suffix, index),
        )


def _expand(hf: str, sizes: Mapping[str, int], rule: TensorRule) -> tuple[list[str], str]:
    """Return the names of all parts, and where the whole comes in alphabetical order."""
    if "{q}" in hf:  # blocks are written before all others
        return [hf.replace("{q}", part) for part in _QUANTIZED], _FIRST + hf
    for mark, size in _COUNTS.items():
        if mark in hf:
            count = _size(sizes, size, rule)
            return [hf.replace(mark, str(i)) for i in range(count)], hf.split(mark)[0] + _LAST
    return [hf], hf


def _size(sizes: Mapping[str, int], name: str, rule: TensorRule) -> int:
    if name not in sizes:
        raise ConfigError(f"config.json: the size of {rule.hf} ({name}) is not given")
    return sizes[name]
