"""How much faster several processes write than one, on this machine, from a warm page cache.

    python benchmarks/reshard_workers.py [--gigabytes 2] [--rounds 3] [--folder DIR]

Four kinds of work: plain copies (safetensors to safetensors), Megatron TP8 to TP4, fp32 weights cut
and cast for ZeRO-3 (bf16 model, fp32 masters), and a GGUF in Q4_K_M. Every worker process has one
thread; ``threads`` is one process with as many threads as it takes by itself. ``cp`` twice at once
tells what the disk and memory of the machine give to two processes at all; ``--folder /dev/shm``
leaves the disk out of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from measure import Measurement, run, table, warm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from synthetic import llama  # noqa: E402  # after the path

MCONV = [sys.executable, "-m", "mconv"]
TRAINED = ROOT / "tests" / "fixtures" / "trained" / "hf"


def race(title: str, command: list[str], out: Path, rounds: int) -> None:
    """One worker against several; each round runs all of them in turn."""
    cores = len(os.sched_getaffinity(0))
    runs: dict[str, list[Measurement]] = {}
    for _ in range(rounds):
        for name, options in (
            ("1 worker", ["--workers", "1", "--threads", "1"]),
            (f"{cores} workers", ["--workers", str(cores), "--threads", str(cores)]),
            (f"{cores} threads", ["--workers", "1", "--threads", str(cores)]),
        ):
            clear(out)
            runs.setdefault(name, []).append(run(name, [*command, str(out), "-q", *options]))
    clear(out)
    rows = [min(r, key=lambda m: m.wall) for r in runs.values()]
    table(title, rows, "1 worker")
    print(f"{cores} workers are {rows[0].wall / rows[1].wall:.2f} x one")


def ceiling(source: Path, out: Path, rounds: int) -> None:
    """``cp`` of all files by one process, and by two of half of them each."""
    files = sorted(p for p in source.iterdir() if p.is_file())
    halves = [" ".join(map(str, files[k::2])) for k in range(2)]
    make = f"mkdir -p {out}/a {out}/b; "
    one = make + f"cp {halves[0]} {out}/a; cp {halves[1]} {out}/b"
    two = make + f"cp {halves[0]} {out}/a & cp {halves[1]} {out}/b; wait"
    rows = []
    for name, script in (("cp, one", one), ("cp, two at once", two)):
        found = []
        for _ in range(rounds):
            clear(out)
            found.append(run(name, ["sh", "-c", script]))
        rows.append(min(found, key=lambda m: m.wall))
    clear(out)
    table("what the machine gives", rows, "cp, one")
    print(f"two are {rows[0].wall / rows[1].wall:.2f} x one")


def clear(out: Path) -> None:
    """Remove an earlier output, and wait until the disk is at rest."""
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    os.sync()


def main() -> None:
    """Make the model, run the races."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the model is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        source, out = Path(tmp) / "model", Path(tmp) / "out"
        layers = max(2, round(args.gigabytes * 1e9 / (4 * (4 * 1024**2 + 3 * 1024 * 4096))))
        size = llama(source, layers=layers, shards=4)
        shutil.copy(TRAINED / "tokenizer.model", source)
        warm(source)
        gb = f"{size / 1e9:.1f} GB of fp32"
        ceiling(source, out, args.rounds)
        reshard = [*MCONV, "reshard", str(source)]
        race(f"copies: {gb} to hf", reshard, out, args.rounds)
        cut = Path(tmp) / "tp8"
        run("tp8", [*reshard, "-q", "--to", "megatron", "--tp", "8", str(cut)])
        tp4 = [*MCONV, "reshard", str(cut), "--to", "megatron", "--tp", "4"]
        race(f"Megatron TP8 to TP4: {gb}", tp4, out, args.rounds)
        shutil.rmtree(cut)
        zero = [*reshard, "--to", "deepspeed", "--zero-stage", "3", "--dp", "8", "--dtype", "bf16"]
        race(f"cast and cut: {gb} to ZeRO-3", zero, out, args.rounds)
        gguf = [*MCONV, "to-gguf", str(source), "--type", "q4_k_m"]
        race(f"encode: {gb} to Q4_K_M", gguf, out, args.rounds)


if __name__ == "__main__":
    main()
