"""``--to deepspeed`` for a PipelineModule: weights by layer, optimizers by stage, ZeRO-0 or 1.

``layer_XX-model_states.pt`` (with ``-model_TT`` under tensor parallelism), and per model-parallel
rank a model file without weights and the optimizer files of its ``dp`` ranks, as
``runtime/pipe/{module,engine}.py`` of DeepSpeed 0.19 load them. Tied weights lie in the optimizer
of every stage that uses them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from math import prod

from ...errors import LayoutError, UnsupportedError
from ..checkpoint import Checkpoint
from ..deepspeed.mp_part import Cut, part_of
from ..deepspeed.pipe_stages import choose_bounds, read_layers
from ..deepspeed.pipeline import NAMING
from ..deepspeed.state_files import Source, source_of
from ..deepspeed.tp_cut import pipeline_placements, with_padded_vocabulary
from ..dtypes import BFLOAT16
from ..layout import Layout
from ..safetensors_plan import plan_bytes
from ..stream import OutFile
from ..torchzip_plan import plan_torch_file
from . import Planned, Writer
from ._common import assets, only_axes
from .deepspeed import Module, module_weights, rank_files


def plan(ckpt: Checkpoint, layout: Layout) -> Planned:
    """Plan the save folder.

    Raises:
        LayoutError: ZeRO-2 and 3, stages without weights, sizes that tp does not divide.
        UnsupportedError: experts, bf16 without ZeRO, weights of which no rule says the cut.
    """
    only_axes(layout, "pp", "tp", "dp", "zero_stage")
    if layout.zero_stage > 1:
        raise LayoutError(
            f"zero_stage={layout.zero_stage}: DeepSpeed trains a PipelineModule with ZeRO 0 or 1; "
            "nearest valid: zero_stage=1"
        )
    experts = next((n for n in ckpt.weights if "deepspeed_moe" in n), None)
    if experts is not None:
        raise UnsupportedError(f"{ckpt.path}: pipelines with experts ({experts}) are not written")
    whole = source_of(with_padded_vocabulary(ckpt, layout), layout, layout.zero_stage)
    if layout.zero_stage == 0 and whole.dtype == BFLOAT16 and whole.training.states:
        raise UnsupportedError(
            "zero_stage=0: DeepSpeed cannot load the optimizer of a bf16 pipeline without ZeRO "
            "(BF16_Optimizer takes a list of ranks and gets one state): write --zero-stage 1"
        )
    rules = ckpt.args.get("universal_checkpoint_info")
    whole = replace(whole, rules=rules if isinstance(rules, Mapping) else None)
    placements = pipeline_placements(whole.ckpt, layout.tp) if layout.tp > 1 else {}
    cut = Cut(placements, layout.tp)
    files: list[OutFile] = []
    for stage, names in enumerate(_stages(whole, layout, cut)):
        for rank in range(cut.tp):
            part = part_of(whole, cut, stage=stage, pp=layout.pp, rank=rank, names=names)
            files += rank_files(part, layout, None)
    files += _layer_files(whole, cut)
    files.append(plan_bytes("latest", whole.tag.encode()))
    return Planned((*files, *assets(ckpt)), tuple(whole.notes))


def _stages(source: Source, layout: Layout, cut: Cut) -> list[list[str]]:
    """The tensors of every stage; says how the layers were shared out."""
    ckpt = source.ckpt
    trained = set(source.training.trained)
    sizes = {n: prod(cut.of(n, t, 0).shape) if n in trained else 0 for n, t in ckpt.weights.items()}
    known, held = _source_stages(ckpt)
    uses = _uses(ckpt, known, held)
    layers = read_layers(sizes, ckpt.tied, uses)
    bounds, how = choose_bounds(layers, layout.pp, layout.pp_layers, known)
    if layout.pp > 1:
        shown = [f"{a}-{b - 1}" for a, b in pairwise(bounds)]
        source.note(
            f"pipeline stages hold the layers {', '.join(shown)}, {how}: where the training script "
            "cuts otherwise, give the layers of each stage with --pp-layers"
        )
        if uses and len(known) < 2:
            source.note(
                f"tied weights ({', '.join(uses)}) are taken to be used again at the end of the "
                "list of layers, which one stage alone does not tell"
            )
    return layers.stages(bounds)


def _source_stages(ckpt: Checkpoint) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Layers of every stage of the source, and the stages of every tied module."""
    known = ckpt.args.get("pipeline")
    if not isinstance(known, Mapping):
        return [], {}
    return list(known["stages"]), dict(known["tied"])


def _uses(
    ckpt: Checkpoint, known: list[list[int]], held: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Layers that use a tied module again: the last ones of the stages that hold it."""
    numbers = [int(n.partition(".")[0]) for n in (*ckpt.weights, *ckpt.tied) if n[:1].isdigit()]
    end = max(numbers) + 1
    ends = [*(min(layers, default=end) - 1 for layers in known[1:]), end]
    found: dict[str, list[int]] = {}
    for key in dict.fromkeys(o.split(".")[1] for o in ckpt.tied.values()):
        stages = held.get(key, [])
        found[key] = [ends[s] for s in stages[1:]] if len(known) > 1 and stages else [end]
    return found


def _layer_files(source: Source, cut: Cut) -> Iterator[OutFile]:
    """One file per layer and tensor rank."""
    layer_of = {o: a for a, o in source.ckpt.tied.items()}
    for rank in range(cut.tp):
        axis = f"-model_{rank:02d}" if cut.tp > 1 else ""
        layers: dict[int, Module] = {}
        for name, tensor in module_weights(part_of(source, cut, rank=rank)).items():
            layer, _, inner = layer_of.get(name, name).partition(".")
            layers.setdefault(int(layer), {})[inner] = tensor
        for number in sorted(layers):
            file = f"{source.tag}/layer_{number:02d}{axis}-model_states.pt"
            yield plan_torch_file(file, OrderedDict(layers[number]))


WRITER = Writer(
    "deepspeed-pipeline", "DeepSpeed PipelineModule", NAMING, plan, ordered=True, keeps=True
)
