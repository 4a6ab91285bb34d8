"""Make a checkpoint of the size of DeepSeek-V3 (671e9 parameters) that takes little disk space.

61 layers (3 dense), 256 experts, spread over 1024 ranks; headers, pickles and directories are real,
tensor bytes are holes of sparse files. Kinds: ``hf`` (157 shards), ``dcp`` (FSDP2 with expert
parallelism as torchtitan saves it), ``megatron`` (torch_dist, pp 16 x ep 64), ``deepspeed``
(ZeRO-3, dp 1024, with Adam states; its model files take 4.7 GB). Usage:
``python benchmarks/make_sparse_moe.py DIR --kind dcp``, then ``--time DIR``.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from mconv.convert.naming import from_hf
from mconv.shardio import Checkpoint, Layout
from mconv.shardio.chunked import zeros
from mconv.shardio.dcp_plan import DcpPlan
from mconv.shardio.dtypes import BFLOAT16, FLOAT32
from mconv.shardio.payload import BytesPayload
from mconv.shardio.pickle_write import torch_size
from mconv.shardio.safetensors_plan import plan_bytes, plan_json
from mconv.shardio.stream import OutFile
from mconv.shardio.torchzip_plan import Vector, plan_torch_file
from mconv.shardio.writers import get_writer

Shapes = dict[str, tuple[int, ...]]

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 129280, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "max_position_embeddings": 163840,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip


def shapes(c: dict[str, Any] = CONFIG) -> Shapes:
    """Return the names and shapes of the model."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    q, kv = c["q_lora_rank"], c["kv_lora_rank"]

    def mlp(base: str, inner: int) -> Shapes:
        down = {f"{base}.down_proj.weight": (hidden, inner)}
        return {f"{base}.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")} | down

    found: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        base = f"model.layers.{i}"
        found |= {f"{base}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        attention = {
            "q_a_proj": (q, hidden), "q_a_layernorm": (q,),
            "q_b_proj": (heads * (nope + rope), q), "kv_a_proj_with_mqa": (kv + rope, hidden),
            "kv_a_layernorm": (kv,), "kv_b_proj": (heads * (nope + value), kv),
            "o_proj": (hidden, heads * value),
        }  # fmt: skip
        found |= {f"{base}.self_attn.{n}.weight": s for n, s in attention.items()}
        if i < c["first_k_dense_replace"]:
            found |= mlp(f"{base}.mlp", c["intermediate_size"])
            continue
        found[f"{base}.mlp.gate.weight"] = (c["n_routed_experts"], hidden)
        found[f"{base}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
        found |= mlp(f"{base}.mlp.shared_experts", c["moe_intermediate_size"])
        for e in range(c["n_routed_experts"]):
            found |= mlp(f"{base}.mlp.experts.{e}", c["moe_intermediate_size"])
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (c["vocab_size"], hidden)}


def hugging_face(model: Shapes, ranks: int) -> Iterable[OutFile]:
    """One folder of safetensors files."""
    return get_writer("hf").plan(_checkpoint(model), Layout("hf", max_shard_size=8 << 30)).files


def megatron(model: Shapes, ranks: int) -> Iterable[OutFile]:
    """torch_dist: 16 stages, experts over the rest."""
    layout = Layout(
        "megatron-dist", pp=16, ep=ranks // 16, pp_layers=tuple(4 - (k < 3) for k in range(16))
    )
    return get_writer("megatron-dist").plan(from_hf(_checkpoint(model), "megatron"), layout).files


def distributed(model: Shapes, ranks: int) -> Iterable[OutFile]:
    """DCP: the experts of a layer as one tensor, cut over ep and then FSDP; the rest over 64."""
    plan = DcpPlan(tp=1, dp=ranks)
    stacked: dict[str, tuple[int, ...]] = {}
    for name, shape in model.items():
        layer, _, rest = name.partition(".experts.")
        if not rest or "shared" in name:
            stacked[name] = shape
        else:
            key = f"{layer}.experts.{rest.partition('.')[2].replace('_proj.weight', '_proj')}"
            found = stacked.get(key, (0, *shape))
            stacked[key] = (found[0] + 1, *shape)
    for k, (name, shape) in enumerate(stacked.items()):
        expert = len(shape) == 3
        parts = (max(1, ranks // 16), 16) if expert else (min(64, ranks),)
        plan.pieces(("model", name), shape, BFLOAT16, _cells(shape, parts, ranks, k))
    return plan.files()


def _cells(
    shape: tuple[int, ...], parts: tuple[int, ...], ranks: int, turn: int
) -> Iterator[tuple[int, tuple[int, ...], Any]]:
    """(rank, first index, zeros) of an even cut of the leading dims."""
    steps = [-(-n // p) for n, p in zip(shape, parts, strict=False)]
    steps += shape[len(steps) :]
    for k, at in enumerate(np.ndindex(*(-(-n // s) for n, s in zip(shape, steps, strict=True)))):
        lo = tuple(a * s for a, s in zip(at, steps, strict=True))
        size = tuple(min(s, n - a) for a, s, n in zip(lo, steps, shape, strict=True))
        yield (k + turn * 64) % ranks, lo, zeros(size, BFLOAT16)


def deepspeed(model: Shapes, ranks: int) -> Iterator[OutFile]:
    """ZeRO-3 with Adam: two files per rank, every parameter cut over all ranks."""
    tag, zero = "global_step1000", Vector(BFLOAT16, 0)
    length = sum(-(-prod(s) // ranks) for s in model.values())
    state = {
        "module": dict.fromkeys(model, zero), "buffer_names": [], "optimizer": None,
        "param_shapes": [OrderedDict((n, torch_size(s)) for n, s in model.items())],
        "frozen_param_shapes": OrderedDict(), "frozen_param_fragments": OrderedDict(),
        "shared_params": {}, "dp_world_size": ranks, "mp_world_size": 1, "global_steps": 1000,
        "ds_config": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
        "ds_version": "0.16.9",
    }  # fmt: skip
    first: dict[int, tuple[str, bytes]] = {}
    for rank in range(ranks):
        stem = f"zero_pp_rank_{rank}_mp_rank_00_model_states"
        if len(stem) not in first:  # only the name inside differs
            made = plan_torch_file(f"{tag}/{stem}.pt", state)
            first[len(stem)] = stem, b"".join(p.data for _, p in made.parts if _is_plain(p))
        known, data = first[len(stem)]
        yield plan_bytes(f"{tag}/{stem}.pt", data.replace(known.encode(), stem.encode()))
        flats = {n: Vector(FLOAT32, length) for n in ("master", "exp_avg", "exp_avg_sq")}
        group = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
        optimizer = {
            "zero_stage": 3, "partition_count": ranks, "loss_scaler": None, "overflow": False,
            "optimizer_state_dict": {
                "state": {0: {"step": 1000, **{n: flats[n] for n in ("exp_avg", "exp_avg_sq")}}},
                "param_groups": [group],
            },
            "fp32_flat_groups": [flats["master"]],
        }  # fmt: skip
        stem = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states"
        yield plan_torch_file(f"{tag}/{stem}.pt", {"optimizer_state_dict": optimizer})
    yield plan_bytes("latest", tag.encode())


def _is_plain(payload: object) -> bool:
    return isinstance(payload, BytesPayload)


def _checkpoint(model: Shapes) -> Checkpoint:
    weights = {n: zeros(s, BFLOAT16) for n, s in model.items()}
    return Checkpoint(path=Path("made"), format="hf", weights=weights, config=CONFIG)


def write(folder: Path, files: Iterable[OutFile]) -> tuple[int, int]:
    """Write the plain bytes, leave holes for tensors; return (files, bytes)."""
    count = total = 0
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as f:
            f.truncate(file.size)
            for at, payload in file.parts:
                if isinstance(payload, BytesPayload):
                    f.seek(at)
                    f.write(payload.data)
        count, total = count + 1, total + file.size
    return count, total


def timed(folder: Path) -> str:
    """Run ``mconv inspect`` in a process of its own and return what it cost."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mconv", "inspect", "--no-tensors", str(folder)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    took, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = usage.ru_utime + usage.ru_stime
    return f"{said.stdout}{took:.1f} s, {cpu:.1f} s of CPU, {usage.ru_maxrss / 1e3:.0f} MB\n"


KINDS = {"hf": hugging_face, "dcp": distributed, "megatron": megatron, "deepspeed": deepspeed}


def main() -> None:
    """Make a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="dcp")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--time", action="store_true", help="time inspecting DIR instead")
    args = parser.parse_args()
    if args.time:
        sys.stdout.write(timed(args.folder))
        return
    start, model = time.perf_counter(), shapes()
    files, total = write(args.folder, KINDS[args.kind](model, args.ranks))
    write(args.folder, [plan_json("config.json", CONFIG)])
    sys.stdout.write(
        f"{sum(map(prod, model.values())) / 1e9:.0f}e9 parameters in {len(model)} tensors: {files} "
        f"files, {total / 1e12:.2f} TB, made in {time.perf_counter() - start:.0f} s\n"
    )


if __name__ == "__main__":
    main()
