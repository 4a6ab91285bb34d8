"""How large a model is, from a ``config.json`` alone or from any checkpoint; no weight is read.

From a ``config.json`` the tensors are those of the architecture's table, with the shapes it says;
from a checkpoint those that are there. What each GGUF type would take follows from the recipes,
tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, counted
from ..quant import type_by_name
from ..quant.recipes import ModelFacts, RecipeOptions, TensorRecord, choose, parse_target
from ..shardio import open_checkpoint
from ..shardio.assets import load_json
from ..shardio.box import Box
from ..shardio.tensor import LazyTensor
from .architectures import (
    Architecture,
    complete_config,
    dimensions,
    find_architecture,
    layer_count,
    mapped_tensors,
    match_tensors,
)
from .architectures._lines import table_lines
from .naming import to_hf

#: Types a plan shows, best first.
TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XS")
_HALF = np.dtype(np.float16)
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What planning asks about a model.

    Attributes:
        name: of the architecture in GGUF.
        config: the completed ``config.json``.
        layers: weights of each layer.
        rest: weights outside layers: embedding, head, norm.
        hidden, inner, vocab: widths; ``inner`` of the feed-forward a token meets.
        heads, kv_heads, head: attention.
        kv_width: cached values per token and layer.
        experts: of a layer; 0 for a dense model.
        context: tokens it was made for.
        gguf: bytes of its tensors by GGUF type.
    """

    name: str
    config: Mapping[str, Any]
    layers: tuple[int, ...]
    rest: int
    hidden: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int
    head: int
    kv_width: int
    experts: int
    context: int
    gguf: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """All weights."""
        return sum(self.layers) + self.rest

    def kv_bytes(self, tokens: int) -> int:
        """Return bytes of the cached keys and values of ``tokens``, in 16 bits."""
        return 2 * self.kv_width * len(self.layers) * tokens


class _Shape(LazyTensor):
    """A tensor of which only the shape is known."""

    __slots__ = ()

    def fill(self, out: np.ndarray, box: Box) -> None:
        """Never called: planning reads nothing."""
        raise AssertionError("a plan reads no weights")

    def spans(self) -> Iterator[tuple[Path, int, int]]:
        """No file."""
        return iter(())


def model_sizes(path: str | Path, config: str | Path | None = None) -> ModelSizes:
    """Return the sizes of a model.

    Args:
        path: a ``config.json``, a folder that holds one, or a checkpoint of any format.
        config: config.json or model folder, where the checkpoint has none.

    Raises:
        MconvError: nothing there to be understood, or an architecture that is not known.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if file.name.endswith(".json") and file.is_file() and not _has_weights(path):
        found = load_json(file)
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: expected a JSON object")
        architecture = find_architecture(found)
        full = complete_config(found, architecture)
        return _sizes(architecture, full, _expected(architecture, full), {})
    if path.suffix == ".toml":
        raise ConfigError(
            f"{path}: the size of a model is in its config.json or checkpoint: give that; "
            "`mconv train --dry-run` plans a run as its TOML file says"
        )
    ckpt = to_hf(open_checkpoint(path, config=config))
    architecture = find_architecture(ckpt.config)
    assert ckpt.config is not None, "else there is no architecture"
    full = complete_config(ckpt.config, architecture, ckpt.weights)
    return _sizes(architecture, full, ckpt.weights, ckpt.tied)


def _expected(architecture: Architecture, config: dict[str, Any]) -> dict[str, LazyTensor]:
    """Return the tensors a configuration calls for; of several forms of one, the first."""
    tied = bool(config.get("tie_word_embeddings"))
    lines = sorted(table_lines(architecture, config, tied=tied), key=lambda line: line.order[1])
    weights: dict[str, LazyTensor] = {}
    made: set[str] = set()
    for line in lines:
        if line.required and line.shape is not None and not made & set(line.outputs):
            made |= set(line.outputs)
            weights |= {source: _Shape(line.shape, _HALF) for source in line.sources}
    return weights


def _has_weights(path: Path) -> bool:
    """Whether there is more in a folder than configuration and tokenizer."""
    if not path.is_dir():
        return False
    small = {".json", ".jinja", ".txt", ".md", ".model", ".py", ".toml"}
    return any(p.is_dir() or p.suffix not in small for p in path.iterdir() if p.name[0] != ".")


def _sizes(
    architecture: Architecture,
    config: dict[str, Any],
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
) -> ModelSizes:
    sizes = dimensions(architecture, config)
    count = layer_count(config)
    layers = [0] * count
    for name, tensor in weights.items():
        found = _LAYER.search(name)
        if found and int(found[1]) < count:
            layers[int(found[1])] += tensor.size
    heads = int(sizes.get("heads", 0))
    kv_heads = int(sizes.get("kv_heads", heads))
    width = int(sizes.get("kv", sizes["hidden"]))
    latent = config.get("kv_lora_rank")
    kv_width = int(latent) + int(config.get("qk_rope_head_dim") or 0) if latent else 2 * width
    experts = int(sizes.get("experts", 0))
    inner = int(config.get("intermediate_size") or 4 * sizes["hidden"])
    if experts:
        each = int(config.get("moe_intermediate_size") or inner)
        inner = each * int(config.get("num_experts_per_tok") or 1)
    facts = ModelFacts(architecture.name, count, heads, kv_heads, experts)
    return ModelSizes(
        name=architecture.name,
        config=config,
        layers=tuple(layers),
        rest=sum(t.size for t in weights.values()) - sum(layers),
        hidden=int(sizes["hidden"]),
        inner=inner,
        vocab=int(sizes["vocab"]),
        heads=heads,
        kv_heads=kv_heads,
        head=int(sizes.get("head", 0)),
        kv_width=kv_width,
        experts=experts,
        context=int(config.get("max_position_embeddings") or 4096),
        gguf=_gguf_bytes(_records(architecture, config, weights, tied), facts),
    )


def _records(
    architecture: Architecture,
    config: dict[str, Any],
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
) -> list[TensorRecord]:
    """Return the tensors of the GGUF file, norms and vectors in F32 as it stores them."""
    match = match_tensors(architecture, config, weights, tied)
    if match.problems:
        raise ConfigError(
            f"{counted(len(match.problems), 'tensor does', 'tensors do')} "
            f"not fit config.json, such as {match.problems[0]}"
        )
    return [
        TensorRecord(
            m.name,
            m.tensor.shape,
            type_by_name("F32" if m.keep_f32 or m.tensor.ndim < 2 else "F16"),
        )
        for m in mapped_tensors(architecture, config, match)
    ]


def _gguf_bytes(records: Sequence[TensorRecord], facts: ModelFacts) -> dict[str, int]:
    shapes = {record.name: record.dims for record in records}
    out = {}
    for name in TYPES:
        chosen = choose(records, parse_target(name), facts, RecipeOptions(has_importance=True))
        out[name] = sum(
            prod(shapes[c.name][:-1]) * c.type.row_bytes(shapes[c.name][-1]) for c in chosen
        )
    return out
