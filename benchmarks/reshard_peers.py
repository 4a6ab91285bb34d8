"""Changing a checkpoint's layout: mconv and its peers on the same work, side by side in one run.

    python benchmarks/reshard_peers.py [--gigabytes 1] [--rounds 2] [--folder DIR]
                                       [--megatron MEGATRON_LM]

* ZeRO-1 to universal: DeepSpeed's ``ds_to_universal``; to fp32 weights: its ``zero_to_fp32``.
* DCP to one torch file and back: torch's ``dcp_to_torch_save`` and ``torch_save_to_dcp``.
* Megatron TP8 to TP4, weights only: Megatron's ``tools/checkpoint/convert.py``, which leaves the
  optimizer behind; its source tree is given with ``--megatron`` (see ``megatron_converter.py``).
* Megatron TP8 to TP4 with Adam's states: ``cp`` is the measure, and the bytes read are counted.

mconv returns when its output is on disk, so ``cp`` is run with a sync as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import Measurement, best, run, table, warm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "e2e"))
from synthetic import llama  # noqa: E402  # after the path

PY = sys.executable
MCONV = [PY, "-m", "mconv", "reshard", "-q"]
TP4 = [*MCONV, "--to", "megatron", "--tp", "4"]
CP = {"cp": ["cp", "-r"], "cp, and sync": ["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh"]}

DS_TO_UNIVERSAL = """
import sys
from types import SimpleNamespace
from deepspeed.checkpoint.ds_to_universal import main
main(SimpleNamespace(input_folder=sys.argv[1], output_folder=sys.argv[2], num_extract_workers=2,
     num_merge_workers=2, keep_temp_folder=False, strict=True, inject_missing_state=True))
"""
ZERO_TO_FP32 = """
import sys
from pathlib import Path
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
source = Path(sys.argv[1])
convert(str(source.parent), sys.argv[2], tag=source.name, safe_serialization=True)
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
#: Adds Adam's states to a model and writes it under a layout.
MAKE = """
import sys
from dataclasses import replace
from mconv import Layout, open_checkpoint, reshard
source, text, out, states = sys.argv[1:]
ckpt = open_checkpoint(source)
group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1,
         "params": list(ckpt.weights)}
if states == "True":
    moments = {"exp_avg": dict(ckpt.weights), "exp_avg_sq": dict(ckpt.weights)}
    ckpt = replace(ckpt, optimizer=moments, step=10, scalars={"param_groups": [group]})
reshard(ckpt, out, Layout.parse(text), with_optimizer=states == "True", verify=False)
"""
#: Counts what the process reads and writes as the kernel does, copies within it included.
COUNT = """
import sys
from pathlib import Path
from mconv import Layout, reshard
def counts():
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}
source, out = sys.argv[1:]
before = counts()
reshard(source, out, Layout("megatron", tp=4), verify=False)
after = counts()
for key, way, folder in (("rchar", "read", source), ("wchar", "written", out)):
    size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    n = after[key] - before[key]
    print(f"bytes {way}: {n / 1e9:.4f} GB, the files hold {size / 1e9:.4f} GB: {n / size:.4f} x")
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the inputs are made and how often every tool runs."""

    work: Path
    rounds: int

    def make(self, layout: str, *, states: bool) -> Path:
        """Write the model under a layout; a Megatron source has the names of local modules."""
        out = self.work / "source"
        clear(out)
        model = str(self.work / "model")
        run("inputs", [PY, "-c", MAKE, model, layout, str(out), str(states)])
        return out

    def race(self, title: str, tools: dict[str, list[str]], source: Path) -> None:
        """Run every tool ``rounds`` times in turn, keep each one's best, print the table."""
        out = self.work / "out"
        warm(source if source.is_dir() else source.parent)
        runs: dict[str, list[Measurement]] = {}
        for _ in range(self.rounds):
            for name, command in (CP | tools).items():
                clear(out)
                os.sync()
                line = [{"SOURCE": str(source), "OUT": str(out)}.get(c, c) for c in command]
                if line == command:
                    line += [str(source), str(out)]
                runs.setdefault(name, []).append(run(name, line))
        clear(out)
        table(title, [best(r) for r in runs.values()], "cp")
        sys.stdout.flush()


def clear(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def deepspeed(bench: Bench, gb: str) -> None:
    """DeepSpeed's two converters of ZeRO files."""
    source = bench.make("deepspeed:zero=1,dp=4,dtype=bf16", states=True)
    step = next(source.glob("global_step*"))
    bench.race(
        f"ZeRO-1 dp4 to universal: {gb}, fp32 masters and Adam's states",
        {
            "mconv": [*MCONV, "--to", "deepspeed-universal"],
            "deepspeed ds_to_universal": [PY, "-c", DS_TO_UNIVERSAL],
        },
        step,
    )
    bench.race(
        f"ZeRO-1 dp4 to fp32 safetensors: {gb} beside Adam's states, of which no tool needs any",
        {
            "mconv": [*MCONV, "--to", "hf", "--weights", "master"],
            "deepspeed zero_to_fp32": [PY, "-c", ZERO_TO_FP32],
        },
        step,
    )


def torch_tools(bench: Bench, gb: str) -> None:
    """torch's converters between DCP and one file."""
    source = bench.make("dcp:dp=4", states=True)
    bench.race(
        f"DCP of 4 ranks to one torch file: {gb}, and Adam's states",
        {
            "mconv": [*MCONV, "--to", "torch"],
            "torch dcp_to_torch_save": [PY, "-c", DCP_TO_TORCH],
        },
        source,
    )
    one = bench.work / "one"  # of the DCP, where no two tensors are the same bytes
    run("inputs", [*MCONV, "--to", "torch", source, one])
    clear(source)
    bench.race(
        f"one torch file to DCP: {gb}, and Adam's states",
        {
            "mconv": [*MCONV, "--to", "dcp", "--with-optimizer"],
            "torch torch_save_to_dcp": [PY, "-c", TORCH_TO_DCP],
        },
        one / "checkpoint.pt",
    )
    clear(one)


def megatron(bench: Bench, gb: str, tree: Path | None) -> None:
    """Megatron's converter, and the same work with the optimizer."""
    layout = "megatron:tp=8,transformer_impl=local"
    tools = {"mconv": [*TP4, "--weights-only"]}
    if tree:
        peer = [PY, str(HERE / "megatron_converter.py"), str(tree.resolve()), "SOURCE", "OUT", "4"]
        tools["Megatron-LM convert.py (see there)"] = peer
    source = bench.make(layout, states=False)
    bench.race(f"Megatron TP8 to TP4, weights only: {gb}", tools, source)
    source = bench.make(layout, states=True)
    bench.race(
        f"Megatron TP8 to TP4: {gb}, and Adam's states",
        {"mconv": TP4, "mconv --max-memory 64MB": [*TP4, "--max-memory", "64MB"]},
        source,
    )
    subprocess.run([PY, "-c", COUNT, str(source), str(bench.work / "out")], check=True)


def main() -> None:
    """Make the model, run the races."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of fp32 weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where the inputs are made")
    parser.add_argument("--megatron", type=Path, default=None, help="Megatron-LM's source tree")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        bench = Bench(Path(tmp), args.rounds)
        layers = max(2, round(args.gigabytes * 1e9 / (4 * (4 * 1024**2 + 3 * 1024 * 4096))))
        gb = f"{llama(bench.work / 'model', layers=layers, shards=4) / 1e9:.1f} GB of fp32 weights"
        deepspeed(bench, gb)
        torch_tools(bench, gb)
        megatron(bench, gb, args.megatron)


if __name__ == "__main__":
    main()
