"""Changing a checkpoint's layout: mconv and its peers on the same work, side by side in one run.

    python benchmarks/reshard_peers.py [--gigabytes 1] [--rounds 2] [--folder DIR]

* ZeRO-1 to universal: DeepSpeed's ``ds_to_universal`` (weights, masters and moments).
* DCP to one torch file and back: torch's ``dcp_to_torch_save`` and ``torch_save_to_dcp``.
* Megatron TP8 to TP4: Megatron's ``tools/checkpoint/convert.py`` is not in its wheel, and asks for
  the package transformer-engine, and so for a GPU, before it reads anything (head of August 2026);
  ``cp`` is the measure instead, and the bytes read are counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Measurement, best, run, table, warm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from synthetic import llama  # noqa: E402  # after the path

PY = sys.executable
MCONV = [PY, "-m", "mconv", "reshard", "-q"]

DS_TO_UNIVERSAL = """
import sys
from types import SimpleNamespace
from deepspeed.checkpoint.ds_to_universal import main
main(SimpleNamespace(input_folder=sys.argv[1], output_folder=sys.argv[2], num_extract_workers=2,
     num_merge_workers=2, keep_temp_folder=False, strict=True, inject_missing_state=True))
"""
DCP_TO_TORCH = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""
TORCH_TO_DCP = """
import sys
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
torch_save_to_dcp(sys.argv[1], sys.argv[2])
"""
#: Adds Adam's states to a model and writes it as a DCP that all others are made from.
ADD_STATES = """
import sys
from dataclasses import replace
from mconv import Layout, open_checkpoint, reshard
ckpt = open_checkpoint(sys.argv[1])
states = {"exp_avg": dict(ckpt.weights), "exp_avg_sq": dict(ckpt.weights)}
group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1,
         "params": list(ckpt.weights)}
whole = replace(ckpt, optimizer=states, step=10, scalars={"param_groups": [group]})
for text, out in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    reshard(whole, out, Layout.parse(text), with_optimizer=True, verify=False)
"""


def race(title: str, tools: dict[str, list[str]], source: Path, out: Path, rounds: int) -> None:
    """Run every tool ``rounds`` times in turn, keep each one's best, print the table."""
    warm(source if source.is_dir() else source.parent)
    runs: dict[str, list[Measurement]] = {}
    for _ in range(rounds):
        for name, command in tools.items():
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            os.sync()
            runs.setdefault(name, []).append(run(name, [*command, str(source), str(out)]))
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    table(title, [best(r) for r in runs.values()], "cp")


#: Sums what is read and what the kernel copies.
COUNT_READS = """
import os, sys
from pathlib import Path
from mconv import Layout, reshard
from mconv.shardio import source
folder, out = sys.argv[1:]
total = 0
inner = source.FileSource.readinto
def readinto(self, position, buffer):
    global total
    total += memoryview(buffer).nbytes
    return inner(self, position, buffer)
source.FileSource.readinto = readinto
kernel = os.copy_file_range
def copy(*arguments, **named):
    global total
    n = kernel(*arguments, **named)
    total += n
    return n
os.copy_file_range = copy
reshard(folder, out, Layout("megatron", tp=4), vocab_size=640, verify=False)
files = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
print(f"bytes read: {total / 1e9:.3f} GB of {files / 1e9:.3f} GB in the source files, "
      f"{total / files:.3f} x")
"""


def main() -> None:
    """Make the inputs, run the races."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of fp32 weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where the inputs are made")
    args = parser.parse_args()
    cp = ["cp", "-r"]
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        work = Path(tmp)
        model, out = work / "model", work / "out"
        layers = max(2, round(args.gigabytes * 1e9 / (4 * (4 * 1024**2 + 3 * 1024 * 4096))))
        size = llama(model, layers=layers, shards=4) / 1e9
        made = {"deepspeed:zero=1,dp=4,dtype=bf16": work / "zero1", "dcp:dp=4": work / "dcp",
                "megatron:tp=8": work / "tp8"}  # fmt: skip
        plan = [str(x) for pair in made.items() for x in pair]
        run("inputs", [PY, "-c", ADD_STATES, str(model), *plan])
        with_states = f"{size:.1f} GB of fp32 weights, and Adam's states"
        zero = next((work / "zero1").glob("global_step*"))
        race(
            f"ZeRO-1 dp4 to universal: {with_states}",
            {
                "cp": cp,
                "mconv": [*MCONV, "--to", "deepspeed-universal"],
                "deepspeed ds_to_universal": [PY, "-c", DS_TO_UNIVERSAL],
            },
            zero, out, args.rounds,
        )  # fmt: skip
        race(
            f"DCP of 4 ranks to one torch file: {with_states}",
            {
                "cp": cp,
                "mconv": [*MCONV, "--to", "torch"],
                "torch dcp_to_torch_save": [PY, "-c", DCP_TO_TORCH],
            },
            work / "dcp", out, args.rounds,
        )  # fmt: skip
        run("one file", [*MCONV, "--to", "torch", str(work / "dcp"), str(work / "one")])
        race(
            f"one torch file to DCP: {with_states}",
            {
                "cp": cp,
                "mconv": [*MCONV, "--to", "dcp", "--with-optimizer"],
                "torch torch_save_to_dcp": [PY, "-c", TORCH_TO_DCP],
            },
            work / "one" / "checkpoint.pt", out, args.rounds,
        )  # fmt: skip
        race(
            f"Megatron TP8 to TP4: {with_states}",
            {
                "cp": cp,
                "mconv": [*MCONV, "--to", "megatron", "--tp", "4", "--vocab-size", "640"],
                "mconv --max-memory 64MB": [
                    *MCONV, "--to", "megatron", "--tp", "4", "--vocab-size", "640",
                    "--max-memory", "64MB",
                ],
            },
            work / "tp8", out, args.rounds,
        )  # fmt: skip
        subprocess.run([PY, "-c", COUNT_READS, str(work / "tp8"), str(out)], check=True)


if __name__ == "__main__":
    main()
