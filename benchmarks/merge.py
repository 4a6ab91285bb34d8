"""Merging sharded checkpoints: mconv, its peers and plain ``cp``, side by side in one run.

    python benchmarks/merge.py [--gigabytes 2] [--rounds 3] [--folder DIR]

Three sources of the same tensors (half cut by rows, half by columns, 4 ranks): a DCP checkpoint
written by torch on gloo, a ZeRO-3 checkpoint in DeepSpeed's layout, and per-rank files as home-made
trainers write them. Peers: torch's dcp_to_torch_save, accelerate merge-weights, DeepSpeed's
zero_to_fp32, and load + cat + save.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from make_merge_inputs import make_dcp, make_ranks, make_zero3
from measure import Measurement, best, run, table, warm

PY = sys.executable
MCONV = [PY, "-m", "mconv"]

DCP_TO_TORCH = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""
ACCELERATE = """
import sys
from accelerate.utils import merge_fsdp_weights
merge_fsdp_weights(sys.argv[1], sys.argv[2], safe_serialization=True)
"""
ZERO_TO_FP32 = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
convert(sys.argv[1], sys.argv[2], safe_serialization=True)
"""
LOAD_AND_CAT = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
ranks = [torch.load(p, weights_only=True) for p in sorted(Path(sys.argv[1]).glob("rank*.pt"))]
out = {}
for k, name in enumerate(ranks[0]):
    out[name] = torch.cat([r[name] for r in ranks], dim=k % 2).contiguous()
Path(sys.argv[2]).mkdir()
save_file(out, sys.argv[2] + "/model.safetensors")
"""


def compete(
    title: str, source: Path, tools: dict[str, list[str]], work: Path, rounds: int
) -> list[Measurement]:
    """Run every tool ``rounds`` times in turn and keep each one's best."""
    warm(source)
    runs: dict[str, list[Measurement]] = {name: [] for name in tools}
    for _ in range(rounds):
        for name, command in tools.items():
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            runs[name].append(run(name, [*command, str(source), str(out)]))
    shutil.rmtree(work / "out", ignore_errors=True)
    rows = [best(r) for r in runs.values()]
    table(title, rows, "cp")
    return rows


def main() -> None:
    """Make the inputs, run the races, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the inputs are made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        work = Path(tmp)
        cp = ["cp", "-r"]
        mine = [*MCONV, "reshard", "-q"]
        count = max(2, round(args.gigabytes * 1e9 / (4096 * 5120 * 2)))
        dcp = make_dcp(work / "dcp", count)
        compete(
            f"DCP, 4 ranks, {count} tensors 4096x5120 bf16",
            dcp,
            {
                "cp": cp,
                "mconv reshard": mine,
                "torch dcp_to_torch_save": [PY, "-c", DCP_TO_TORCH],
                "accelerate merge-weights": [PY, "-c", ACCELERATE],
            },
            work,
            args.rounds,
        )
        shutil.rmtree(dcp)
        ranks = make_ranks(work / "ranks", count)
        compete(
            "the same as per-rank files (peer of the DCP row)",
            ranks,
            {"cp": cp, "load + cat + save": [PY, "-c", LOAD_AND_CAT]},
            work,
            args.rounds,
        )
        shutil.rmtree(ranks)
        zero = make_zero3(work / "zero3", count // 2)
        compete(
            f"ZeRO-3, dp 4, {count // 2} tensors 4096x5120, fp32 masters (no moments)",
            zero,
            {"cp": cp, "mconv reshard": mine, "deepspeed zero_to_fp32": [PY, "-c", ZERO_TO_FP32]},
            work,
            args.rounds,
        )


if __name__ == "__main__":
    main()
