"""Trains a tiny Mixtral under DeepSpeed's AutoEP and saves it.

    python autoep_training.py OUT RANKS EP STAGE

OUT gets ``ckpt/``, ``config.json``, ``loss.json`` (of one batch after training) and per rank
``truth_{rank}.npz`` with what its engine holds: ``fp32/<name>``, ``exp_avg/<name>``,
``exp_avg_sq/<name>``; experts are the rank's own.
"""

from __future__ import annotations

import json
import socket
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny_training import forked, no_compiling

VOCAB, BATCH, LENGTH = 61, 2, 12


def batch(seed: int) -> torch.Tensor:
    """Token numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)


def train(out: Path, ep: int, stage: int) -> list[float]:
    """Three steps on one rank, the save, the truth."""
    import deepspeed
    from deepspeed.module_inject.auto_ep_presets import base
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from transformers import MixtralConfig, MixtralForCausalLM

    no_compiling()
    # newer transformers keep their output hooks elsewhere; the router's logits are not asked for
    base._retarget_transformers_output_recorders_for_modules = lambda *_, **__: None
    deepspeed.init_distributed("gloo")
    torch.manual_seed(3)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": ep,
            "preset_model": "mixtral",
            "use_grouped_mm": False,
        },
    }
    engine, *_ = deepspeed.initialize(model=MixtralForCausalLM(config), config=settings)
    for step in range(3):
        ids = batch(10 * step + dist.get_rank())
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out / "ckpt"))
    # states are linked when the first group takes its step, before the others have any
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    truth = {}
    for name, p in engine.module.named_parameters():
        truth[f"fp32/{name}"] = safe_get_full_fp32_param(p).numpy().copy()
        for state in ("exp_avg", "exp_avg_sq"):
            truth[f"{state}/{name}"] = safe_get_full_optimizer_state(p, state).numpy().copy()
    np.savez(out / f"truth_{dist.get_rank()}.npz", **truth)
    engine.eval()
    with torch.no_grad():
        loss = float(engine(input_ids=batch(77), labels=batch(77)).loss)
    if dist.get_rank() == 0:
        config.save_pretrained(out)
        (out / "loss.json").write_text(json.dumps(loss))
    return [loss]


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # once, before the ranks are forked

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    ranks, ep_size, zero = (int(n) for n in sys.argv[2:5])
    forked(ranks, partial(train, Path(sys.argv[1]), ep_size, zero), port)
