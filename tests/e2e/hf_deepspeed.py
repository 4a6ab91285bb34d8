"""A Hugging Face Llama that resumes under DeepSpeed ZeRO-3 what Megatron began.

    python hf_deepspeed.py MODEL CHECKPOINT FIRST LAST OUT.json

Also the data of that training, which ``megatron_training.py`` takes from here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

VOCAB, BATCH, LENGTH, RANKS = 96, 4, 12, 2
ADAM: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY = 0.1


def batch(step: int) -> torch.Tensor:
    """The global batch of a step: two in turn, so that the model learns them."""
    generator = torch.Generator().manual_seed(500 + step % 2)
    return torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)


def resume(model: Path, checkpoint: Path, first: int, last: int, *, forget: bool) -> list[float]:
    """Losses of the steps, on one of ``RANKS`` ranks."""
    import deepspeed
    import torch.distributed as dist
    import transformers
    from tiny_training import _forget, mean_loss, no_compiling

    no_compiling()
    config = transformers.AutoConfig.from_pretrained(model)
    net = transformers.AutoModelForCausalLM.from_config(config)
    groups = [
        {"params": [p for p in net.parameters() if (p.ndim > 1) == wide], **ADAM, "weight_decay": d}
        for wide, d in ((True, DECAY), (False, 0.0))
    ]
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // RANKS,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(groups, foreach=False), config=settings
    )
    path, _ = engine.load_checkpoint(str(checkpoint))
    assert path is not None, f"nothing was loaded from {checkpoint}"
    if forget:
        _forget(engine.optimizer.optimizer)
    losses = []
    for step in range(first, last):
        rows = batch(step).chunk(RANKS)[dist.get_rank()]
        loss = torch.nn.functional.cross_entropy(
            engine(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()
        )
        losses.append(mean_loss(loss))
        engine.backward(loss)
        engine.step()
    return losses


def main() -> None:
    """Resume twice: as it should be, and with zeroed moments."""
    model, checkpoint, first, last, out = sys.argv[1:]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import transformers.models.llama.modeling_llama  # noqa: F401
    from tiny_training import forked, preload

    preload()
    found = {}
    for key in ("resumed", "control"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        job = partial(
            resume, Path(model), Path(checkpoint), int(first), int(last), forget=key == "control"
        )
        found[key] = forked(RANKS, job, port)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
