"""Megatron's saved ``args`` as plain data, and the parallel sizes in them.

``args`` is an argparse.Namespace of about 650 entries (``megatron/training/arguments.py``) with
enums and dtypes inside. Only settings that describe the checkpoint are interpreted here; the whole
namespace is kept as plain data for the naming layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import FormatError
from ..records import Record
from ..stored import plain

_MOST = 1 << 16  # ranks of one axis
_SIZES = (
    "tensor_model_parallel_size", "model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "num_layers", "encoder_num_layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parallel sizes of the run that saved.

    Attributes:
        tp, pp, vpp, ep: tensor, pipeline, virtual pipeline, expert parallel size.
        etp: tensor parallel size of the experts.
        layers: decoder layers in all, None where the args do not say.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    layers: int | None = None


def plain_args(args: object) -> dict[str, object]:
    """Return the namespace as a dict of plain data; enums become their values, dtypes names."""
    if type(args) is Record:
        args = args.fields
    if type(args) is not dict:
        return {}
    return {str(k): plain(v) for k, v in args.items()}


def number(args: Mapping[str, object], *names: str) -> int | None:
    """Return the first setting among ``names`` that is an int, or None."""
    for name in names:
        value = args.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def parallel_sizes(args: Mapping[str, object]) -> Sizes:
    """Return the parallel sizes; old files miss some, and then they are 1.

    Raises:
        FormatError: a size that no run can have had.
    """
    for key in _SIZES:
        value = number(args, key)
        if value is not None and not 0 <= value <= _MOST:
            raise FormatError(f"args.{key} is {value}: the saved settings are damaged")
    tp = number(args, "tensor_model_parallel_size", "model_parallel_size") or 1
    return Sizes(
        tp=tp,
        pp=number(args, "pipeline_model_parallel_size") or 1,
        vpp=number(args, "virtual_pipeline_model_parallel_size") or 1,
        ep=number(args, "expert_model_parallel_size") or 1,
        etp=number(args, "expert_tensor_parallel_size") or tp,
        layers=number(args, "num_layers", "encoder_num_layers"),
    )


def coordinates(args: Mapping[str, object], sizes: Sizes) -> tuple[int, int, int] | None:
    """Return the (tp, pp, ep) rank of the process that saved, from its global rank.

    Follows ``megatron/core/parallel_state.py``: order tp-cp-ep-dp-pp, or tp-cp-ep-pp-dp with
    ``use_tp_pp_dp_mapping``. None where the args do not tell.
    """
    rank, world = number(args, "rank"), number(args, "world_size")
    if rank is None or world is None or not 0 <= rank < world or world % (sizes.tp * sizes.pp):
        return None
    if args.get("use_tp_pp_dp_mapping"):
        inner = sizes.tp * (number(args, "context_parallel_size") or 1)
        if sizes.ep > 1 or world % (inner * sizes.pp):
            return None
        return rank % sizes.tp, rank // inner % sizes.pp, 0
    stage = world // sizes.pp
    local = rank % stage
    return local % sizes.tp, rank // stage, local // sizes.etp % sizes.ep
