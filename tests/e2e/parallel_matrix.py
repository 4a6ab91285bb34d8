"""Train, reshard, resume under DeepSpeed's PipelineEngine and AutoTP: see ``test_resume_parallel``.

    python parallel_matrix.py OUT.json [CASE...]

The cases of ``resume_matrix``, with model parallelism on either side.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from pipe_training import BLOCKS, HEADS, HIDDEN, VOCAB, WIDTH, run_pipe
from resume_matrix import Case, run_case
from tiny_training import ADAM, BATCH, batch, go_on, mean_loss

CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
}  # fmt: skip

LLAMA = CONFIG | {"hidden_size": 32}  # rotary embeddings want even heads


def run_autotp(
    *,
    tp: int,
    stage: int,
    tied: bool = False,
    first: int,
    last: int,
    load: Path | None = None,
    save_at: int | None = None,
    save: Path | None = None,
    forget: bool = False,
) -> list[float]:
    """Train a Hugging Face Llama under ZeRO; AutoTP cuts it when ``tp`` is above 1."""
    import deepspeed
    import transformers

    torch.manual_seed(0 if load is None else 7)
    shape = {k: v for k, v in LLAMA.items() if k != "model_type"}
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=tied)
    net = transformers.AutoModelForCausalLM.from_config(config)
    dp = dist.get_world_size() // tp
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // dp,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if tp > 1:
        settings["tensor_parallel"] = {"autotp_size": tp}
        if tied:
            settings["tensor_parallel"]["vocab_parallel_lm_head"] = True
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False, **ADAM)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    if load is not None:
        go_on(engine, load, forget=forget)
    losses = []
    for step in range(first, last):
        if step == save_at:
            engine.save_checkpoint(str(save))
        rows = batch(step, dist.get_rank() // tp, dp)
        loss = engine(rows, labels=rows).loss
        losses.append(mean_loss(loss))
        engine.backward(loss)
        engine.step()
    return losses


fp, bf = partial(run_pipe), partial(run_pipe, dtype="bf16")
auto = partial(run_autotp)
# name: (ranks of A, A, layouts to pass, ranks of B, B)
CASES: dict[str, Case] = {
    "pipe-pp2-to-pp1-dp2": (
        2, partial(fp, pp=2), ["deepspeed:pp=1,dp=2,zero=1"], 2, partial(fp, pp=1)
    ),
    "pipe-tied-pp2-tp2-to-pp3": (
        4, partial(fp, pp=2, tp=2, tied=True), ["deepspeed:pp=3,zero=1"],
        3, partial(fp, pp=3, tied=True),
    ),
    "pipe-tied-pp1-dp2-to-pp2-tp2": (
        2, partial(fp, pp=1, tied=True), ["deepspeed:pp=2,tp=2,zero=1"],
        4, partial(fp, pp=2, tp=2, tied=True),
    ),
    "pipe-uniform-to-pp3": (
        2, partial(fp, pp=2, method="uniform"), ["deepspeed:pp=3,zero=1,pp_layers=2+2+2"],
        3, partial(fp, pp=3, method="uniform"),
    ),
    "pipe-bf16-to-bf16-optimizer": (
        4, partial(bf, pp=2), ["deepspeed:pp=1,zero=1", "deepspeed:pp=2,zero=1"],
        2, partial(bf, pp=2, gather="fp32"),
    ),
    "pipe-zero0-tp2-to-zero1": (
        4, partial(fp, pp=2, tp=2, stage=0), ["deepspeed:pp=1,tp=1,dp=2,zero=1"],
        2, partial(fp, pp=1),
    ),
    "pipe-zero1-to-zero0": (
        2, partial(fp, pp=2), ["deepspeed:pp=2,dp=2,zero=0"], 4, partial(fp, pp=2, stage=0)
    ),
    "names-of-hf-to-pipe": (
        2, partial(fp, pp=2, tied=True), ["dcp:dp=2", "deepspeed:pp=2,dp=2,zero=1"],
        4, partial(fp, pp=2, tied=True),
    ),
    "zero1-to-autotp-zero1": (
        2, partial(auto, tp=1, stage=1), ["deepspeed:tp=2,dp=2,zero=1"],
        4, partial(auto, tp=2, stage=1),
    ),
    "zero3-tied-to-autotp-zero2": (
        2, partial(auto, tp=1, stage=3, tied=True), ["deepspeed:tp=2,dp=1,zero=2"],
        2, partial(auto, tp=2, stage=2, tied=True),
    ),
    "autotp-zero1-to-autotp-zero3-tp4": (
        4, partial(auto, tp=2, stage=1), ["deepspeed:tp=4,dp=1,zero=3"],
        4, partial(auto, tp=4, stage=3),
    ),
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """The config.json of the model of a case."""
    config = CONFIG if name.startswith(("pipe", "names")) else LLAMA
    return config | {"tie_word_embeddings": "tied" in name or name.startswith("names")}


def main() -> None:
    """Run the cases one after the other."""
    out, *names = sys.argv[1:]
    import deepspeed  # noqa: F401  # once, before the ranks are forked
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    results = {name: run_case(CASES[name], config_of(name)) for name in names or CASES}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
