"""How Megatron cuts each tensor over its tensor-parallel ranks: one line per kind of tensor.

Source: the Column/RowParallelLinear, VocabParallelEmbedding, MLP, attention, MLA and Mamba modules
of ``megatron/core``. Names are canonical (see ``names``). Routed experts are cut by the same rules
over the expert-tensor ranks. Readers assemble and writers cut by this one table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import LayoutError, UnsupportedError
from ..box import Index
from ..placement import Fused, Placement, Replicate, Shard
from .settings import number

ROWS = Shard(0, even=True)
COLUMNS = Shard(1, even=True)
COPY = Replicate()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rule may look at.

    Attributes:
        name: canonical name.
        world: ranks the tensor is spread over.
        shapes: canonical name to the shape that one rank holds.
        args: the saved settings.
    """

    name: str
    world: int
    shapes: Mapping[str, Index]
    args: Mapping[str, object]

    def shape(self, name: str) -> Index:
        """Shape of another tensor on a rank. Raises LayoutError when it is not there."""
        if name not in self.shapes:
            raise LayoutError(f"{self.name}: cannot tell how it is cut, {name} is missing")
        return self.shapes[name]


Rule = Placement | Callable[[Facts], Placement]


def _fc1(facts: Facts) -> Placement:
    """Gated when it has two rows per input column of fc2: then [gate ; up], each cut on its own."""
    rows = facts.shape(facts.name)[0]
    inner = facts.shape(re.sub(r"linear_fc1\.\w+$", "linear_fc2.weight", facts.name))[1]
    if rows == inner:
        return ROWS
    if rows != 2 * inner:
        raise LayoutError(f"{facts.name}: {rows} rows on a rank do not fit {inner} columns of fc2")
    if facts.args.get("moe_mlp_glu_interleave_size"):
        raise UnsupportedError(
            f"{facts.name}: gate and up rows are interleaved (moe_mlp_glu_interleave_size = "
            f"{facts.args['moe_mlp_glu_interleave_size']}), which mconv does not read"
        )
    return Fused(0, (inner * facts.world, inner * facts.world))


def _latent(facts: Facts) -> Placement:
    """MLA down projections: copied by Transformer Engine, cut by rows with local modules."""
    rows = facts.shape(facts.name)[0]
    whole = facts.shape(facts.name.replace("_down_proj", "_up_proj"))[1]
    if "linear_kv_down" in facts.name:
        whole += number(facts.args, "qk_pos_emb_head_dim") or 0
    if rows == whole:
        return COPY
    if rows * facts.world == whole:
        return ROWS
    raise LayoutError(f"{facts.name}: {rows} rows on each of {facts.world} ranks, expected {whole}")


def _mamba(facts: Facts, *, conv: bool) -> Placement:
    """Mamba-2: rows are [z, x, B, C, dt] (in_proj) or [x, B, C] (conv1d), each cut on its own."""
    heads = facts.shape(re.sub(r"mixer\..*$", "mixer.A_log", facts.name))[0]
    dim = number(facts.args, "mamba_head_dim") or 0
    state = number(facts.args, "mamba_state_dim") or 0
    groups = number(facts.args, "mamba_num_groups") or 0
    inner = heads * facts.world * dim
    parts = (inner, groups * state, groups * state)
    widths = parts if conv else (inner, *parts, heads * facts.world)
    rows = facts.shape(facts.name)[0] * facts.world
    if sum(widths) != rows:
        raise LayoutError(f"{facts.name}: {rows} rows over all ranks, args make it {sum(widths)}")
    return Fused(0, widths)


def _mamba_in(facts: Facts) -> Placement:
    return _mamba(facts, conv=False)


def _mamba_conv(facts: Facts) -> Placement:
    return _mamba(facts, conv=True)


_RULES: tuple[tuple[str, Rule], ...] = (
    (r"embedding\.word_embeddings\.weight", ROWS),
    (r"embedding\.(position|tokentype)_embeddings\.weight", COPY),
    (r"output_layer\.(weight|bias)", ROWS),
    (r".*\.mixer\.in_proj\.weight", _mamba_in),
    (r".*\.mixer\.conv1d\.(weight|bias)", _mamba_conv),
    (r".*\.mixer\.(A_log|D|dt_bias|norm\.weight)", ROWS),
    (r".*\.mixer\.out_proj\.weight", COLUMNS),
    (r".*\.linear_(qkv|q_proj|q_up_proj|kv_up_proj|q|kv)\.(weight|bias)", ROWS),
    (r".*\.linear_(q|kv)_down_proj\.(weight|bias)", _latent),
    (r".*\.linear_proj\.weight", COLUMNS),
    (r".*\.linear_fc1\.(weight|bias)", _fc1),
    (r".*\.linear_fc2\.weight", COLUMNS),
    (r".*\.(linear_proj|linear_fc2)\.bias", COPY),
    (r".*\.router\.(weight|bias|expert_bias)", COPY),
    (r".*\.shared_experts\.gate_weight", COPY),
    (r".*\.eh_proj\.(weight|bias)", ROWS),
    (r".*(norm)\.(weight|bias)", COPY),
)
_COMPILED = tuple((re.compile(pattern + "$"), rule) for pattern, rule in _RULES)


def placement_of(facts: Facts) -> Placement:
    """Return how the tensor is cut.

    Raises:
        UnsupportedError: a tensor that is not in the table, on more than one rank.
        LayoutError: shapes that contradict each other.
    """
    if facts.world == 1:
        return COPY
    for pattern, rule in _COMPILED:
        if pattern.match(facts.name):
            return rule if isinstance(rule, Placement) else rule(facts)
    raise UnsupportedError(
        f"{facts.name}: mconv does not know how Megatron cuts this tensor over "
        f"{facts.world} tensor parallel ranks"
    )


def cuts_of(
    shapes: Mapping[str, Index],
    world: int,
    args: Mapping[str, object],
    *,
    latent_rows: bool,
) -> dict[str, Placement]:
    """Return how whole tensors of the given shapes are to be cut.

    Args:
        shapes: of all tensors that are spread over the same ranks, by canonical name.
        world: number of ranks.
        args: settings of the model.
        latent_rows: MLA's down projections are cut by rows (local modules), not copied.

    Raises:
        UnsupportedError, LayoutError: as ``placement_of``.
    """
    local: dict[str, Index] = {}
    for name, shape in shapes.items():  # what the rules look at, as a rank would hold it
        if ".linear_fc1." in name or (latent_rows and "_down_proj." in name) or ".mixer." in name:
            local[name] = (shape[0] // world, *shape[1:])
        elif name.endswith(".linear_fc2.weight"):
            local[name] = (shape[0], shape[1] // world)
        else:
            local[name] = shape
    found = {}
    for name in shapes:
        facts = Facts(name, world, local, args)
        # gate and up are two pieces of a distributed checkpoint even on a single rank
        found[name] = _fc1(facts) if ".linear_fc1." in name else placement_of(facts)
    return found
