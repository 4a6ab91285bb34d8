"""How DeepSpeed's tensor parallelism cuts the weights that are to be written.

AutoTP follows the ``tp_plan`` of Hugging Face models: column-parallel layers on dim 0 with their
bias, row-parallel ones on dim 1, the head by rows, embeddings and norms whole (a tied embedding is
cut with the head); sizes that do not divide give the first ranks one more. Pipelines and
Megatron-DeepSpeed are cut as the source says. After ``module_inject/{auto_tp,tp_shard}.py`` and
``runtime/engine.py`` of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...errors import LayoutError, UnsupportedError
from ..box import Index
from ..checkpoint import Checkpoint, Tensors
from ..chunked import zeros
from ..layout import Layout, demand
from ..placement import Fused, Placement, Replicate, Shard
from ..tensor import LazyTensor, concat
from .fused import Average, Blocks
from .tensor_parallel import read_rules
from .tp_names import usual_dim

_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.(?:weight|bias)$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|wpe|word_embeddings)\.weight$")
_FUSED = ("qkv_proj", "gate_up_proj", "c_attn", "experts", "Wqkv")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")


def autotp_placements(ckpt: Checkpoint, tp: int) -> dict[str, Placement]:
    """Return the cut of every weight of a Hugging Face model under AutoTP.

    Raises:
        LayoutError: key/value heads that tp does not divide, with the nearest sizes that do.
        UnsupportedError: models whose plan AutoTP refuses (fused matrices, experts).
    """
    fused = [n for n in ckpt.weights if any(f in n for f in _FUSED)]
    if fused:
        raise UnsupportedError(
            f"tp={tp}: DeepSpeed's AutoTP does not train models with fused projections or experts "
            f"({fused[0]}): write without --tp, or a Megatron format"
        )
    _demand_heads(ckpt, tp)
    return {n: _autotp(ckpt, n, t.shape, tp) for n, t in ckpt.weights.items()}


def _demand_heads(ckpt: Checkpoint, tp: int) -> None:
    config = ckpt.config or {}
    heads = next((config[k] for k in _KV_HEADS if isinstance(config.get(k), int)), None)
    if heads is None:
        raise UnsupportedError(
            f"tp={tp}: AutoTP cuts attention by heads, and the source does not tell how many there "
            "are: give the config.json of the model with --config"
        )
    demand(
        "tp", tp, heads,
        lambda n: None if heads % n == 0 else f"{heads} key/value heads do not divide by it",
    )  # fmt: skip


def _autotp(ckpt: Checkpoint, name: str, shape: Index, tp: int) -> Placement:
    dim = 0 if _HEAD.search(name) else usual_dim(name)
    if _EMBEDDING.search(name):
        dim = 0 if _cut_tie(ckpt, name) else None
    if dim is None or dim >= len(shape):
        if len(shape) > 1 and not _EMBEDDING.search(name):
            raise UnsupportedError(
                f"tp={tp}: nothing says how AutoTP cuts {name!r} of shape {shape}: its name is "
                "none of the usual layers; write without --tp"
            )
        return Replicate()
    size, more = divmod(shape[dim], tp)
    if not more:
        return Shard(dim)
    return Blocks(dim, (tuple(size + (r < more) for r in range(tp)),))


def ties(ckpt: Checkpoint) -> list[str]:
    """Embeddings that the head shares."""
    return [o for a, o in ckpt.tied.items() if _HEAD.search(a) and _EMBEDDING.search(o)]


def _cut_tie(ckpt: Checkpoint, name: str) -> bool:
    """Whether a tied embedding is cut: as the source's config says, else with the head."""
    saved = ckpt.args.get("ds_config")
    section = saved.get("tensor_parallel") if isinstance(saved, Mapping) else None
    wanted = section.get("vocab_parallel_lm_head") if isinstance(section, Mapping) else None
    return name in ties(ckpt) and wanted is not False


def autotp_info(ckpt: Checkpoint, placements: Mapping[str, Placement]) -> dict[str, Any]:
    """``universal_checkpoint_info`` as AutoTP writes it: how each parameter is cut."""

    def patterns(names: Iterable[str]) -> list[str]:
        return [f"^{re.escape(n)}$" for n in sorted(names)]

    cut = {n: p for n, p in placements.items() if not isinstance(p, Replicate)}
    vocabulary = [n for n in cut if _HEAD.search(n) or _EMBEDDING.search(n)]
    rows = {ckpt.weights[n].shape[0] for n in vocabulary}
    return {
        "universal_checkpoint_version": 0.4,
        "parameter_with_row_parallelism_patterns": patterns(
            n for n, p in cut.items() if isinstance(p, Shard | Blocks) and p.dim == 1
        ),
        "tp_replicated_parameter_patterns": patterns(n for n in placements if n not in cut),
        "vocabulary_parameter_patterns": patterns(vocabulary),
        "parameter_with_sub_params": [],
        "autotp_unsupported_parameter_patterns": {},
        **({"original_vocab_size": rows.pop()} if len(rows) == 1 else {}),
    }


def pipeline_placements(ckpt: Checkpoint, tp: int) -> dict[str, Placement]:
    """Return the cut of every weight of a pipeline, by the rules that its source has.

    Raises:
        LayoutError: sizes that tp does not divide, with the nearest that do.
        UnsupportedError: nothing says how a weight is cut.
    """
    info = ckpt.args.get("universal_checkpoint_info")
    rules = read_rules(info, str(ckpt.path), script_args(ckpt))
    found: dict[str, Placement] = {}
    for name, tensor in ckpt.weights.items():
        known = ckpt.placements.get(name, {}).get("tp")
        # rules want the shapes of the parts: that of a single one here
        found[name] = _whole_copies(known or rules.placement(name, [tensor.shape]))
        if isinstance(found[name], Blocks):
            raise UnsupportedError(
                f"{ckpt.path}: {name!r} is cut unevenly over tensor-parallel ranks: only the tp of "
                "the source or tp=1 can be written"
            )
    _demand_sizes(ckpt, found, tp)
    return found


def script_args(ckpt: Checkpoint) -> Mapping[str, Any]:
    """The arguments of the training script, where it saved them (Megatron-DeepSpeed)."""
    client = ckpt.args.get("client_state")
    found = client.get("args") if isinstance(client, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def with_padded_vocabulary(ckpt: Checkpoint, layout: Layout) -> Checkpoint:
    """Return a pipeline with the vocabulary rows that the script pads it to; zeros are added.

    Megatron-DeepSpeed pads to a multiple of ``make_vocab_size_divisible_by`` times tp.
    """
    info = ckpt.args.get("universal_checkpoint_info")
    rules = read_rules(info, str(ckpt.path), {})
    args = script_args(ckpt)
    old, unit = args.get("padded_vocab_size"), args.get("make_vocab_size_divisible_by")
    unit = (layout.make_vocab_divisible_by or (unit if isinstance(unit, int) else 128)) * layout.tp
    same = layout.make_vocab_divisible_by is None and layout.tp == ckpt.layout.tp

    def padded(name: str, tensor: LazyTensor) -> LazyTensor:
        size = rules.rows(name) if tensor.ndim else None
        if size is None or (old is None and size == tensor.shape[0] and not size % layout.tp):
            return tensor
        rows = old if same and isinstance(old, int) and old >= size else -(-size // unit) * unit
        if tensor.shape[0] >= rows:
            return tensor.slice([slice(0, rows)])
        return concat([tensor, zeros((rows - tensor.shape[0], *tensor.shape[1:]), tensor.dtype)])

    def every(tensors: Tensors) -> dict[str, LazyTensor]:
        return {n: padded(n, t) for n, t in tensors.items()}

    states = {s: every(t) for s, t in ckpt.optimizer.items()}
    return replace(ckpt, weights=every(ckpt.weights), optimizer=states)


def _whole_copies(placement: Placement) -> Placement:
    """Averaged parameters get the mean on every rank; cuts must be even."""
    if isinstance(placement, Average):
        return Replicate()
    return Shard(placement.dim, even=True) if isinstance(placement, Shard) else placement


def _demand_sizes(ckpt: Checkpoint, placements: Mapping[str, Placement], tp: int) -> None:
    widths: dict[int, str] = {}
    for name, p in placements.items():
        if isinstance(p, Shard):
            widths.setdefault(ckpt.weights[name].shape[p.dim], name)
        elif isinstance(p, Fused):
            widths |= {w: widths.get(w, name) for w in p.widths}

    def problem(size: int) -> str | None:
        bad = next(((w, n) for w, n in widths.items() if w % size), None)
        return None if bad is None else f"{bad[0]} of {bad[1]!r} does not divide by it"

    if not widths and tp > 1:
        raise LayoutError(f"tp={tp}: no weight of this pipeline is cut by tensor parallelism")
    demand("tp", tp, min(widths, default=1), problem)
