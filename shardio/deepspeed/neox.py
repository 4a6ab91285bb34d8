"""GPT-NeoX (EleutherAI): what its checkpoints say about the model, and its tensor-parallel cuts.

Tensors are numbered by their place in the list of layers, ``2.attention.dense.weight`` in layer
files, ``sequential.2.attention.dense.weight`` without pipeline parallelism. The save has the run's
settings in ``configs/*.yml``. With GPT-J's parallel residual each rank adds its own bias of a
row-parallel layer before the sum over ranks, so the bias of the model is their sum; otherwise the
ranks hold copies. Source: gpt-neox ``megatron/model/transformer.py``, ``mpu/layers.py``,
``checkpointing.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ..assets import load_yaml
from ..placement import Fused, Placement, Replicate, Shard
from .fused import Average, Sum

NAMING = "neox"
GATED = ("geglu", "reglu", "bilinear", "swiglu", "glu")
_MARK = re.compile(r"^(?:sequential\.)?\d+\.attention\.(?:query_key_value|qkv)\.weight$")
_NUMBER = re.compile(r"^(?:sequential\.|tied_modules\.embed\.)?(?:\d+\.)?")
_COLUMN = re.compile(r"^mlp\.(?:dense_h_to_4h|linear1|w1|w3)\.(?:weight|bias)$")
_ROW = re.compile(r"^(?:attention\.dense|mlp\.(?:dense_4h_to_h|linear2|w2))\.(weight|bias)$")
_ENGINE_COLUMN = re.compile(r"^(?:attention\.qkv\.|mlp\.fc1_)(?:weight|bias)$")
_ENGINE_ROW = re.compile(r"^(?:attention\.proj\.|mlp\.fc2_)(weight|bias)$")
_WHOLE = re.compile(r"(?:norm|layernorm)\.(?:weight|bias|scale)$")


def is_neox(names: Iterable[str]) -> bool:
    """Whether tensors have GPT-NeoX's names."""
    return any(_MARK.match(n) for n in names)


def read_settings(
    folder: Path, saved: object, config: Mapping[str, Any] | None
) -> dict[str, str | int | float | bool]:
    """Return the settings of the run, keys with underscores.

    Args:
        folder: the tag folder; its ``configs/`` come first.
        saved: ``args`` of the rank files.
        config: the model's config.json, for what both leave open.

    Raises:
        ConfigError: a damaged settings file.
    """
    found: dict[str, str | int | float | bool] = {}
    files = sorted(p for p in (folder / "configs").glob("*") if p.suffix in (".yml", ".json"))
    for path in files:
        found |= _plain(load_yaml(path))
    if files:
        found.setdefault("gpt_j_residual", False)
    return _from_config(config or {}) | _plain(saved) | found


def _from_config(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """What config.json says that decides how tensors are cut."""
    if config.get("model_type") in ("llama", "mistral"):
        config = {**config, "use_parallel_residual": False, "activation": "swiglu"}
    names = {
        "use_parallel_residual": "gpt_j_residual", "activation": "activation",
        "num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_kv_heads",
    }  # fmt: skip
    return _plain({ours: config.get(theirs) for theirs, ours in names.items()})


def _plain(settings: object) -> dict[str, str | int | float | bool]:
    if not isinstance(settings, Mapping):
        return {}
    return {
        str(k).replace("-", "_"): v
        for k, v in settings.items()
        if isinstance(v, str | int | float | bool)
    }


def placement(
    name: str, shapes: Sequence[tuple[int, ...]], settings: Mapping[str, Any], source: str
) -> Placement:
    """Return how a parameter is cut over tensor-parallel ranks.

    Raises:
        UnsupportedError: no rule, or it depends on a setting that is not known.
    """
    bare = _NUMBER.sub("", name)
    rows = sum(s[0] for s in shapes) if shapes[0] else 0
    if bare.startswith("attention.query_key_value."):
        return _query_key_value(rows, settings)
    if bare.startswith("mlp.linear1.") and settings.get("activation") in GATED:
        return Fused(0, (rows // 2, rows // 2))
    found = _engine(bare, rows, settings)
    if found is not None:
        return found
    if _COLUMN.match(bare) or bare == "word_embeddings.weight":
        return Shard(0)
    if bare == "final_linear.weight":
        return Shard(1 if settings.get("output_layer_parallelism") == "row" else 0)
    if match := _ROW.match(bare):
        return Shard(1) if match[1] == "weight" else _row_bias(name, settings, source)
    if _WHOLE.search(bare):
        return Average()
    if not shapes[0] or bare.startswith(("position_embeddings.", "attention.rotary")):
        return Replicate()
    raise UnsupportedError(
        f"{source}: how GPT-NeoX cuts {name!r} (parts {list(shapes)}) over tensor-parallel ranks "
        "is not known"
    )


def _engine(bare: str, rows: int, settings: Mapping[str, Any]) -> Placement | None:
    """Transformer Engine's modules; how GPT-J's residual adds their biases is not known."""
    if bare.startswith("mlp.fc1_") and settings.get("activation") in GATED:
        return Fused(0, (rows // 2, rows // 2))
    if _ENGINE_COLUMN.match(bare):
        return Shard(0)
    if match := _ENGINE_ROW.match(bare):
        if match[1] == "weight":
            return Shard(1)
        return None if settings.get("gpt_j_residual") is not False else Average()
    if bare.endswith("._extra_state"):
        return Replicate()
    return Average() if bare.startswith("mlp.layer_norm_") else None


def _query_key_value(rows: int, settings: Mapping[str, Any]) -> Placement:
    """Heads one after the other; with grouped queries each rank has its own [q | k | v]."""
    heads, groups = settings.get("num_attention_heads"), settings.get("num_kv_heads")
    if type(heads) is not int or type(groups) is not int or groups in (0, heads):
        return Shard(0)
    per_head = rows // (heads + 2 * groups)
    return Fused(0, (heads * per_head, groups * per_head, groups * per_head))


def _row_bias(name: str, settings: Mapping[str, Any], source: str) -> Placement:
    parallel = settings.get("gpt_j_residual")
    if parallel is None:
        raise UnsupportedError(
            f"{source}: the ranks' biases {name!r} are added up with GPT-J's parallel residual and "
            "are copies without, and nothing says which: put the run's configs/*.yml back into "
            "the folder, or give a config.json with use_parallel_residual (--config)"
        )
    return Sum() if parallel else Average()
