"""Which layers each pipeline stage and virtual chunk holds, from settings or from a layout.

Chunks follow one another in the order of execution, chunk by chunk and stage by stage (``megatron/
core/transformer/transformer_block.py``, ``pipeline_parallel_layer_layout.py``): layers are counted
off in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import LayoutError, UnsupportedError
from ..layout import Layout
from .settings import Sizes, number


@dataclass(frozen=True, slots=True)
class Stages:
    """A pipeline.

    Attributes:
        pp, vpp: stages, chunks per stage.
        counts: layers of each chunk, in the order of execution.
    """

    pp: int
    vpp: int
    counts: tuple[int, ...]

    def layers(self) -> dict[tuple[int, int], range]:
        """(stage, chunk) to its layers."""
        out, at = {}, 0
        for k, n in enumerate(self.counts):
            out[k % self.pp, k // self.pp] = range(at, at + n)
            at += n
        return out

    def settings(self) -> dict[str, object]:
        """The entries of ``args`` that make Megatron build this pipeline."""
        found: dict[str, object] = {
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "num_layers_per_virtual_pipeline_stage": None,
            "num_virtual_stages_per_pipeline_rank": self.vpp if self.vpp > 1 else None,
            "decoder_first_pipeline_num_layers": None,
            "decoder_last_pipeline_num_layers": None,
            "account_for_embedding_in_pipeline_split": False,
            "account_for_loss_in_pipeline_split": False,
            "pipeline_model_parallel_layout": None,
        }
        if len(set(self.counts)) == 1:
            return found
        first, *middle, last = self.counts
        if self.vpp > 1 or 0 in self.counts or len(set(middle)) > 1:
            chunks = [f"t*{n}" if n else "" for n in self.counts]
            found["pipeline_model_parallel_layout"] = f"E{'|'.join(chunks)}L"
            return found
        found["decoder_first_pipeline_num_layers"] = first
        if middle and last != middle[0]:
            found["decoder_last_pipeline_num_layers"] = last
        return found


def stages_of_layout(layers: int, layout: Layout) -> Stages:
    """Spread layers over the pipeline that a layout asks for.

    Raises:
        LayoutError: layers that do not divide, or a list of counts that does not fit.
    """
    pp, vpp = layout.pp, layout.vpp
    if vpp > 1 and pp == 1:
        raise LayoutError(f"vpp={vpp} needs pipeline stages: give --pp 2 or more, or --vpp 1")
    given = layout.pp_layers
    if given is None:
        if layers % (pp * vpp):
            raise LayoutError(_nearest(layers, pp, vpp))
        return Stages(pp, vpp, (layers // (pp * vpp),) * (pp * vpp))
    if len(given) == pp and vpp > 1:
        if any(n % vpp for n in given):
            raise LayoutError(
                f"pp_layers {_shown(given)}: each stage has vpp={vpp} chunks, which must divide "
                f"its layers; or give all {pp * vpp} chunks in the order of execution"
            )
        given = tuple(n // vpp for n in given) * vpp
    if len(given) != pp * vpp:
        raise LayoutError(
            f"pp_layers {_shown(given)}: has {len(given)} numbers for pp={pp}; such as "
            f"--pp-layers {_shown(_even(layers, pp * vpp))}"
        )
    if sum(given) != layers:
        raise LayoutError(
            f"pp_layers {_shown(given)}: {sum(given)} layers, the model has {layers}; such as "
            f"--pp-layers {_shown(_even(layers, len(given)))}"
        )
    return Stages(pp, vpp, given)


def _nearest(layers: int, pp: int, vpp: int) -> str:
    valid = [p for p in range(1, layers + 1) if layers % (p * vpp) == 0 and (p > 1 or vpp == 1)]
    near = sorted(sorted(valid, key=lambda p: abs(p - pp))[:2])
    chunks = f"pp={pp} stages" + (f" of vpp={vpp} chunks" if vpp > 1 else "")
    even = _even(layers, pp)
    uneven = vpp == 1 and 0 not in even
    hint = f"; or give uneven stages: --pp-layers {_shown(even)}" if uneven else ""
    found = [f"pp={p}" for p in near]
    if vpp > 1:  # or as many stages with another number of chunks
        chunked = [v for v in range(1, layers + 1) if layers % (pp * v) == 0]
        found += [f"vpp={v}" for v in sorted(sorted(chunked, key=lambda v: abs(v - vpp))[:2])]
    if not found:
        return f"{layers} layers cannot be divided over {chunks}: use --vpp 1"
    shown = " or ".join(found)
    return f"{layers} layers cannot be divided over {chunks}; nearest valid: {shown}{hint}"


def _even(layers: int, stages: int) -> list[int]:
    """About as many layers on every stage."""
    return [layers // stages + (k < layers % stages) for k in range(stages)]


def _shown(counts: tuple[int, ...] | list[int]) -> str:
    return ",".join(map(str, counts))


def stages_of_args(args: Mapping[str, object], sizes: Sizes) -> Stages:
    """Return the pipeline of a saved run: even stages, or shorter first and last ones.

    Raises:
        UnsupportedError: settings that do not tell, or custom layouts.
    """
    total, chunks = sizes.layers or 0, sizes.pp * sizes.vpp
    if not 0 < chunks <= total:
        raise UnsupportedError(f"{total} layers on {chunks} pipeline chunks")
    first = number(args, "decoder_first_pipeline_num_layers")
    last = number(args, "decoder_last_pipeline_num_layers")
    if args.get("pipeline_model_parallel_layout"):
        raise UnsupportedError("flat buffers with a custom pipeline layout")
    if first is None and last is None:
        # embedding and loss may each count as a layer of the first and last chunk
        ends = [bool(args.get(f"account_for_{x}_in_pipeline_split")) for x in ("embedding", "loss")]
        counts = [(total + sum(ends)) // chunks] * chunks
        counts[0] -= ends[0]
        counts[-1] -= ends[1]
    elif sizes.vpp > 1:
        raise UnsupportedError("flat buffers with uneven virtual pipeline stages")
    else:
        given = (first is not None) + (last is not None)
        middle = (total - (first or 0) - (last or 0)) // max(1, chunks - given)
        counts = [middle] * chunks
        counts[0] = middle if first is None else first
        counts[-1] = middle if last is None else last
    if sum(counts) != total:
        raise UnsupportedError(f"{total} layers do not divide over the pipeline stages")
    return Stages(sizes.pp, sizes.vpp, tuple(counts))
