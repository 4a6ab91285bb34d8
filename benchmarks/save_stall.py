"""How much saving slows training: the same steps without saves, with asynchronous and synchronous.

    python benchmarks/save_stall.py [--every 20] [--rounds 3] [--ranks 1] [--json FILE]

One run of a 50M-parameter Llama in float32 trains blocks of ``--every`` steps; a block has no save,
an asynchronous or a synchronous one at its start, in turn, so that a busy machine slows all of
them. A block ends when its checkpoint lies on the disk, so nothing of an asynchronous save is left
out. Saved are weights and both moments of Adam, 0.6 GB, with fsync and checksums. Ratios are those
of the median blocks and, for machines that do other work too, of the fastest ones. ``--every`` is
far below what is usual, where the share of saves is smaller.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mconv.trainer.loop import new_run, one_step
from mconv.trainer.mesh import build_meshes, process_group
from mconv.trainer.resume import CheckpointHook
from mconv.trainer.settings.degrees import resolve
from mconv.trainer.settings.model import ModelConfig
from mconv.trainer.text.source import open_data
from train_speed import run_config, write_data

MODEL = ModelConfig(
    vocab_size=16384,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=4,
)
SEQ, BATCH = 128, 2
KINDS = ("none", "async", "sync")


def rank_main(rank: int, world: int, folder: Path, every: int, rounds: int, out: Any) -> None:
    """Train blocks of every kind in turn; rank 0 reports seconds of blocks and of the calls."""
    torch.set_num_threads(1)
    base = run_config(MODEL, folder, seq_len=SEQ, batch=BATCH)
    base = replace(base, data=replace(base.data, tokenizer=folder / "none"))
    with process_group(rank, world, folder / "store"):
        data = open_data(base.data, SEQ, 0, MODEL.vocab_size, folder)
        run = new_run(base, build_meshes(resolve(base, world), "cpu"), data)
        hooks = {}
        for kind in KINDS[1:]:
            save = replace(base.save, folder=folder / kind, asynchronous=kind == "async")
            run.config = replace(base, save=replace(save, keep_last=1, resume="none"))
            hooks[kind] = CheckpointHook()
            hooks[kind].start(run)
        one_step(run)  # warm-up; makes the optimizer's states
        blocks: dict[str, list[float]] = {kind: [] for kind in KINDS}
        calls: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
                torch.distributed.barrier()
                start = time.perf_counter()
                if kind in hooks:
                    hooks[kind].save(run)
                calls[kind].append(time.perf_counter() - start)
                for _ in range(every):
                    one_step(run)
                if kind in hooks:
                    hooks[kind]._saver.wait()
                blocks[kind].append(time.perf_counter() - start)
        size = sum(p.stat().st_size for p in (folder / "sync").rglob("*") if p.is_file())
        if rank == 0:
            out.put((blocks, calls, size))


def measure(world: int, every: int, rounds: int, at: Path | None) -> list[dict[str, Any]]:
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=at) as name:
        folder = Path(name)
        write_data(folder, MODEL.vocab_size, SEQ * BATCH * (3 * every * rounds + 4) + 1)
        out = fork.Queue()
        jobs = [
            fork.Process(target=rank_main, args=(rank, world, folder, every, rounds, out))
            for rank in range(world)
        ]
        for job in jobs:
            job.start()
        blocks, calls, size = out.get()
        for job in jobs:
            job.join()
    plain, fastest = statistics.median(blocks["none"]), min(blocks["none"])
    print(f"{world} rank(s), a checkpoint of {size / 1e6:.0f} MB every {every} steps")
    rows = []
    for kind in KINDS:
        seconds = statistics.median(blocks[kind])
        row = {
            "ranks": world,
            "saves": kind,
            "every": every,
            "checkpoint_mb": round(size / 1e6),
            "steps_per_s": round(every / seconds, 3),
            "of_none": round(plain / seconds, 3),
            "of_none_fastest": round(fastest / min(blocks[kind]), 3),
            "call_seconds": round(statistics.median(calls[kind]), 3),
            "blocks": [round(s, 2) for s in blocks[kind]],
        }
        rows.append(row)
        print(
            f"  {kind:6} {row['steps_per_s']:7.3f} steps/s  {row['of_none']:.3f} of none "
            f"(fastest {row['of_none_fastest']:.3f})  call {row['call_seconds']:.2f} s  "
            f"blocks {min(blocks[kind]):.1f}-{max(blocks[kind]):.1f} s"
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.ranks, args.every, args.rounds, args.folder)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "results": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
