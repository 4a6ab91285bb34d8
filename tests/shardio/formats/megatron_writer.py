"""Writes legacy Megatron checkpoints from whole tensors, by the book and independently of mconv.

Cuts with torch as the modules of megatron-core do, numbers layers and experts locally, and lays
files out as ``megatron/training/checkpointing.py`` does. For layouts that no fixture has.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Model = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How to write: parallel sizes, layers per pipeline chunk (v-major), args on top."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    counts: Sequence[int] = (2,)
    experts: int = 0
    tied: bool = False
    old_rule: bool = False  # core <= 0.16: only the first expert data parallel rank writes
    args: Mapping[str, object] = field(default_factory=dict)

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp


def make_model(
    plan: Plan, hidden: int = 8, ffn: int = 16, vocab: int = 16, groups: int = 4, seed: int = 0
) -> Model:
    """A llama-like model under canonical names; MoE in every layer when the plan has experts."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    model = {"embedding.word_embeddings.weight": rand(vocab, hidden)}
    for i in range(sum(plan.counts)):
        at = f"decoder.layers.{i}."
        model[at + "input_layernorm.weight"] = rand(hidden)
        model[at + "self_attention.linear_proj.weight"] = rand(hidden, 2 * groups)
        model[at + "self_attention.linear_qkv.weight"] = rand(6 * groups, hidden)
        model[at + "pre_mlp_layernorm.weight"] = rand(hidden)
        if plan.experts:
            model[at + "mlp.router.weight"] = rand(plan.experts, hidden)
        for e in range(plan.experts):
            own = f"{at}mlp.experts.local_experts.{e}."
            model[own + "linear_fc1.weight"] = rand(2 * ffn, hidden)
            model[own + "linear_fc2.weight"] = rand(hidden, ffn)
        if not plan.experts:
            model[at + "mlp.linear_fc1.weight"] = rand(2 * ffn, hidden)
            model[at + "mlp.linear_fc2.weight"] = rand(hidden, ffn)
    model["decoder.final_layernorm.weight"] = rand(hidden)
    if not plan.tied:
        model["output_layer.weight"] = rand(vocab, hidden)
    return model


def cut(name: str, t: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """What one of ``world`` ranks holds of a tensor of ``make_model``."""
    if re.search(r"word_embeddings|output_layer|linear_qkv", name):
        return t.chunk(world, 0)[rank].clone()
    if "linear_fc1" in name:
        gate, up = t.chunk(2, 0)
        return torch.cat([gate.chunk(world, 0)[rank], up.chunk(world, 0)[rank]])
    if re.search(r"(linear_proj|linear_fc2)\.weight", name):
        return t.chunk(world, 1)[rank].clone()
    return t.clone()


def rank_model(model: Model, plan: Plan, t: int, p: int, v: int, e: int) -> Model:
    """The state dict of one model chunk on one rank."""
    k = v * plan.pp + p
    start, end = sum(plan.counts[:k]), sum(plan.counts[: k + 1])
    last = k == plan.pp * plan.vpp - 1
    per_rank = plan.experts // plan.ep
    out: Model = {}
    for name, tensor in model.items():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer:
            if not start <= int(layer[1]) < end:
                continue
            name_here = f"decoder.layers.{int(layer[1]) - start}.{name.split('.', 3)[3]}"
        elif not (k == 0 if name.startswith("embedding") else last):
            continue
        else:
            name_here = name
        expert = re.search(r"local_experts\.(\d+)\.", name)
        if expert:
            if int(expert[1]) // per_rank != e:
                continue
            local = int(expert[1]) % per_rank
            name_here = name_here.replace(expert[0], f"local_experts.{local}.")
            out[name_here] = cut(name, tensor, t % plan.expert_tp, plan.expert_tp)
        else:
            out[name_here] = cut(name, tensor, t, plan.tp)
    if plan.tied and last and plan.pp > 1:
        head = model["embedding.word_embeddings.weight"]
        out["output_layer.weight"] = cut("output_layer.weight", head, t, plan.tp)
    return out


Extra = Callable[[list[Model]], dict[str, object]]


def write_legacy(
    folder: Path,
    model: Model,
    plan: Plan,
    respell: Callable[[Model], Mapping[str, object]] = dict,
    extra: Extra | None = None,
) -> Path:
    """Write ``folder/iter_0000005`` and the tracker; returns the iteration folder.

    ``respell`` turns a rank's state dict into another spelling, ``extra`` adds root entries.
    """
    stage = math.lcm(plan.tp, plan.ep * plan.expert_tp)
    root = folder / "iter_0000005"
    for rank in range(stage * plan.pp):
        p, r = divmod(rank, stage)
        t, e = r % plan.tp, r // plan.expert_tp % plan.ep
        first_expert = r // (plan.expert_tp * plan.ep) == 0
        if not (first_expert or (not plan.old_rule and r < plan.tp)):
            continue
        args = argparse.Namespace(**_args(model, plan), rank=rank, world_size=stage * plan.pp)
        vars(args).update(plan.args)
        chunks = [rank_model(model, plan, t, p, v, e) for v in range(plan.vpp)]
        keys = ["model"] if plan.vpp == 1 else [f"model{v}" for v in range(plan.vpp)]
        name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if plan.pp > 1 else "")
        name += f"_{e:03d}" if plan.ep > 1 else ""
        state = {"args": args, "checkpoint_version": 3.0, "iteration": 5}
        state |= {k: respell(c) for k, c in zip(keys, chunks, strict=True)}
        state |= extra(chunks) if extra else {}
        (root / name).mkdir(parents=True)
        torch.save(state, root / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5", encoding="utf-8")
    return root


def _args(model: Model, plan: Plan) -> dict[str, object]:
    hidden = model["decoder.final_layernorm.weight"].shape[0]
    qkv = model["decoder.layers.0.self_attention.linear_qkv.weight"].shape[0]
    return {
        "tensor_model_parallel_size": plan.tp,
        "pipeline_model_parallel_size": plan.pp,
        "virtual_pipeline_model_parallel_size": plan.vpp if plan.vpp > 1 else None,
        "expert_model_parallel_size": plan.ep,
        "expert_tensor_parallel_size": plan.expert_tp,
        "num_layers": sum(plan.counts),
        "hidden_size": hidden,
        "num_attention_heads": qkv // 6,
        "group_query_attention": False,
        "num_query_groups": 1,
        "kv_channels": 2,
        "num_experts": plan.experts or None,
        "untie_embeddings_and_output_weights": not plan.tied,
    }
