"""Training speed: the trainer against a bare hand-written loop, and its use of a GPU.

    python benchmarks/train_speed.py [--ranks 1 2] [--rounds 8] [--json FILE]
    python benchmarks/train_speed.py --gpu [--micro-batch 8] [--compile/--no-compile] [--json FILE]

On the CPU both loops train the same 6.5M-parameter Llama in the same processes, a step of one and a
step of the other in turn, so that a busy machine slows both; the ratio is that of the median steps.
The bare loop has no accumulation, no metrics, no schedule, no layouts: FSDP2 (two ranks) or nothing
(one), torch's own clipping and fused AdamW. ``transformers`` is the same bare loop around
``LlamaForCausalLM``, as a check of the model itself.

On a GPU a 1.1B Llama is trained in bfloat16 with compiled layers; MFU counts 6 operations per
weight and token and the attention (``trainer/planning/flops.py``) against the maker's dense
bfloat16 rate. Without a GPU that mode says so and ends well.
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

import numpy as np
import torch
from mconv.trainer.loop import new_run, one_step
from mconv.trainer.mesh import build_meshes, process_group
from mconv.trainer.model import Decoder
from mconv.trainer.planning.flops import flops_per_token, peak_flops
from mconv.trainer.settings import RunConfig
from mconv.trainer.settings.degrees import resolve
from mconv.trainer.settings.model import ModelConfig
from mconv.trainer.settings.sections import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    SaveConfig,
    ScheduleConfig,
    TrainConfig,
)
from mconv.trainer.text.source import open_data
from mconv.trainer.text.token_file import write_tokens

SMALL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
)
LARGE = ModelConfig(  # TinyLlama's sizes
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)


def run_config(model: ModelConfig, folder: Path, **train: Any) -> RunConfig:
    parallel = train.pop("parallel", ParallelConfig())
    return RunConfig(
        model=model,
        train=TrainConfig(**{"steps": 1 << 20, "threads": 1, **train}),
        optim=OptimConfig(lr=1e-4),
        schedule=ScheduleConfig(kind="constant"),
        parallel=parallel,
        data=DataConfig(tokens=folder / "tokens.npy", tokenizer=folder),
        save=SaveConfig(folder=folder),
    )


def write_data(folder: Path, vocab: int, count: int) -> None:
    draw = np.random.default_rng(0)
    write_tokens(folder / "tokens.npy", draw.integers(3, vocab, count))


class Bare:
    """What one writes by hand for a model that fits: FSDP2 or nothing, AdamW, clipping."""

    def __init__(self, model: Any, layers: Any, config: RunConfig, rank: int, world: int) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model, self.config, self.rank, self.world = model, config, rank, world
        if world > 1:
            for layer in layers:
                fully_shard(layer)
            fully_shard(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.tokens = np.load(config.data.tokens, mmap_mode="r")
        self.at = 0

    def step(self) -> float:
        train = self.config.train
        rows, width = train.batch // self.world, train.seq_len
        first = (self.at * train.batch + self.rank * rows) * width
        self.at += 1
        ids = self.tokens[first : first + rows * width + 1].astype(np.int64)
        x = torch.from_numpy(ids[:-1]).view(rows, width)
        y = torch.from_numpy(ids[1:]).view(rows, width)
        out = self.model(x)
        logits = getattr(out, "logits", out)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def transformers_model(config: ModelConfig) -> Any:
    try:
        import transformers
    except ImportError:
        return None
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))


def cpu_rank(rank: int, world: int, folder: Path, rounds: int, out: Any) -> None:
    """Time the loops in turn; rank 0 reports seconds per step of each."""
    torch.set_num_threads(1)
    config = run_config(SMALL, folder, seq_len=256, batch=4)
    with process_group(rank, world, folder / f"store-{world}"):
        data = open_data(config.data, 256, 0, SMALL.vocab_size, folder)
        run = new_run(config, build_meshes(resolve(config, world), "cpu"), data)
        model = Decoder(SMALL)
        bare = Bare(model, model.model.layers.values(), config, rank, world)
        loops = {"trainer": lambda: one_step(run).loss, "bare": bare.step}
        theirs = transformers_model(SMALL) if world == 1 else None
        if theirs is not None:
            loops["transformers"] = Bare(theirs, (), config, rank, world).step
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(rounds + 1):
            for name in sorted(loops, reverse=bool(number % 2)):
                if world > 1:
                    torch.distributed.barrier()
                start = time.perf_counter()
                loops[name]()
                if number:  # the first is warm-up
                    seconds[name].append(time.perf_counter() - start)
        if rank == 0:
            out.put(seconds)


def cpu(ranks: list[int], rounds: int) -> list[dict[str, Any]]:
    fork = multiprocessing.get_context("fork")
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, SMALL.vocab_size, 4 * 256 * (rounds + 4) + 1)
        for world in ranks:
            out = fork.Queue()
            jobs = [
                fork.Process(target=cpu_rank, args=(rank, world, folder, rounds, out))
                for rank in range(world)
            ]
            for job in jobs:
                job.start()
            seconds = out.get()
            for job in jobs:
                job.join()
            middle = {name: statistics.median(times) for name, times in seconds.items()}
            for name, time_ in middle.items():
                row = {
                    "ranks": world,
                    "loop": name,
                    "seconds": round(time_, 4),
                    "tokens_per_s": round(4 * 256 / time_, 1),
                    "of_bare": round(middle["bare"] / time_, 3),
                }
                results.append(row)
                print(
                    f"{world} rank(s)  {name:12}  {row['tokens_per_s']:8.1f} tokens/s  "
                    f"{row['of_bare']:.3f} of bare"
                )
    return results


def gpu(micro_batch: int, steps: int, compiled: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seq, batch = 2048, 4 * micro_batch
        write_data(folder, LARGE.vocab_size, seq * batch * (steps + 4) + 1)
        config = run_config(
            LARGE,
            folder,
            seq_len=seq,
            batch=batch,
            micro_batch=micro_batch,
            precision="bf16",
            compile=compiled,
            device="cuda",
            threads=8,
            parallel=ParallelConfig(zero=2),
        )
        config = replace(config, train=replace(config.train, threads=8))
        torch.set_float32_matmul_precision("high")
        with process_group(0, 1, folder / "store", "cuda"):
            data = open_data(config.data, seq, 0, LARGE.vocab_size, folder)
            run = new_run(config, build_meshes(resolve(config, 1), "cuda"), data)
            parameters = sum(p.numel() for p in run.state.parameters().values())
            times = []
            for number in range(steps + 3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                loss = one_step(run).loss
                torch.cuda.synchronize()
                if number >= 3:
                    times.append(time.perf_counter() - start)
    device = torch.cuda.get_device_name()
    rate = seq * batch / statistics.median(times)
    work, peak = flops_per_token(LARGE, seq), peak_flops(device)
    row = {
        "device": device,
        "parameters": parameters,
        "tokens_per_s": round(rate),
        "tflops": round(rate * work / 1e12, 1),
        "mfu": round(rate * work / peak, 4) if peak else None,
        "micro_batch": micro_batch,
        "seq_len": seq,
        "compiled": compiled,
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "loss": round(loss, 4),
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    return [row]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return 0
    found = (
        gpu(args.micro_batch, args.rounds, args.compile)
        if args.gpu
        else cpu(args.ranks, args.rounds)
    )
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "results": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
