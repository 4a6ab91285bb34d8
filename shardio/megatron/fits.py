"""Whether a model can be cut as a layout asks: the divisibility rules of Megatron-Core.

Source: ``megatron/core/transformer/transformer_config.py`` (heads, query groups, experts) and the
divisions of ``megatron/core/tensor_parallel/layers.py``. Every refusal names the nearest sizes that
would do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ...errors import LayoutError
from ..box import Index
from ..layout import Layout, demand
from .names import expert_of, is_expert
from .settings import number

_FC2 = re.compile(r"^decoder\.layers\.\d+\.mlp\.(shared_experts\.)?linear_fc2\.weight$")
_DOWN = re.compile(r"^decoder\.layers\.\d+\.self_attention\.linear_(q|kv)_down_proj\.weight$")

Sizes = set[tuple[str, int]]  # what is divided, and its size


def experts_in(shapes: Mapping[str, Index]) -> int:
    """Number of routed experts of a layer, 0 without."""
    return 1 + max((e for n in shapes if (e := expert_of(n)) is not None), default=-1)


def check_fits(
    shapes: Mapping[str, Index], args: Mapping[str, object], layout: Layout, *, latent_rows: bool
) -> None:
    """Refuse sizes that do not divide the model.

    Args:
        shapes: of all weights, by canonical name.
        args: settings of the model.
        layout: the wanted sizes.
        latent_rows: MLA's down projections are cut by rows.

    Raises:
        LayoutError: with the nearest valid sizes.
    """
    _check("tp", layout.tp, _cut_by_tp(shapes, args, latent_rows), number(args, "num_query_groups"))
    experts = experts_in(shapes)
    if not experts:
        if layout.ep > 1 or layout.etp is not None:
            raise LayoutError("the model has no experts: --ep and --etp do not apply")
        return
    _check("ep", layout.ep, {("experts", experts)}, None)
    widths = {
        ("columns of an expert's second layer", shape[1])
        for name, shape in shapes.items()
        if is_expert(name) and name.endswith("linear_fc2.weight")
    }
    _check("etp", layout.etp or layout.tp, widths, None)


def _cut_by_tp(shapes: Mapping[str, Index], args: Mapping[str, object], latent_rows: bool) -> Sizes:
    """What tensor parallelism divides."""
    found: Sizes = set()
    heads = number(args, "num_attention_heads")
    if heads:
        found.add(("attention heads", heads))
    for name, shape in shapes.items():
        if name.endswith(".linear_qkv.weight"):
            found.add(("rows of the QKV matrix", shape[0]))
        elif m := _FC2.match(name):
            kind = "shared experts" if m[1] else "MLP"
            found.add((f"columns of the {kind}'s second layer", shape[1]))
        elif latent_rows and (m := _DOWN.match(name)):
            found.add((f"rows of the latent {m[1]} projection", shape[0]))
    return found


def _check(axis: str, size: int, cut: Sizes, groups: int | None) -> None:
    demand(axis, size, max((n for _, n in cut), default=size), _problem(cut, groups))


def _problem(cut: Sizes, groups: int | None) -> Callable[[int], str | None]:
    """A function that says what is wrong with a size, or None."""

    def problem(size: int) -> str | None:
        for what, n in sorted(cut):
            if n % size:
                return f"{n} {what} cannot be divided over {size} ranks"
        if groups and groups % size and size % groups:
            return f"{groups} query groups neither divide {size} ranks nor are divided by them"
        return None

    return problem
