"""Mutation fuzzer: damaged checkpoints must be refused with an MconvError, or read; nothing else.

    python benchmarks/fuzz.py --mutants 20000 --fixtures ../shared/fixtures
    python benchmarks/fuzz.py --seed 4711 --mutants 1 --debug     # one finding again

Every mutant is a copy of a real checkpoint, damaged by ``mutations.py``, then opened, proven,
planned and read. Reported are tracebacks, more than ``--seconds`` of CPU time, memory far above the
size of the files, and files written. Exits with 1 when there was a finding.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mconv.convert.reshard import reshard
from mconv.convert.to_gguf import to_gguf
from mconv.errors import MconvError
from mconv.shardio import open_checkpoint
from mconv.shardio.full_check import verify_checkpoint
from mconv.shardio.module_tree import module_tree
from mconv.shardio.report import inspect_checkpoint
from mconv.shardio.source import close_files
from mconv.shardio.tensor_detail import tensor_detail

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fuzz_cases import ROOT, Case, find_cases, made_cases
from mutations import files_of, mutate

_MEMORY = 300 << 20  # bytes above what the process held before that a mutant may take
_READ = 4 << 20  # bytes of tensors read per mutant


@dataclass(frozen=True)
class Finding:
    """A mutant that was not handled."""

    seed: int
    case: Path
    damage: str
    problem: str


class Hang(BaseException):
    """A mutant used more CPU time than it may."""


def examine(folder: Path, case: Case, target: Path) -> str:
    """Open, prove, plan and read a checkpoint.

    Returns:
        ``read`` or ``refused``.

    Raises:
        AssertionError: an error that says nothing.
    """
    try:
        if case.adapter is None:
            ckpt = open_checkpoint(folder, config=case.config)
        else:
            ckpt = open_checkpoint(folder / "base", adapter=folder / case.adapter)
        report = inspect_checkpoint(ckpt)
        module_tree(report.tensors)
        if sum(t.nbytes for t in report.tensors) < _READ:
            verify_checkpoint(ckpt)
        reshard(ckpt, target, vocab_size=case.vocab_size, with_optimizer=True, dry_run=True)
        left = _READ
        for tensor in ckpt.weights.values():
            if (left := left - tensor.nbytes) > 0:
                tensor.read()
        tensor_detail(ckpt, min(ckpt.weights, key=lambda n: ckpt.weights[n].size))
        if case.gguf:
            out = target.with_suffix(".gguf")
            to_gguf(ckpt, out, "q8_0", tokenizer=case.tokenizer, dry_run=True)
    except MconvError as e:
        assert str(e).strip(), "an empty message"
        assert "Traceback" not in str(e), e
        return "refused"
    finally:
        close_files()
    return "read"


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise Hang after that much CPU time of the process."""

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGPROF, on_alarm)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def try_one(
    seed: int, cases: list[Case], work: Path, seconds: float, debug: bool = False
) -> tuple[str, Finding | None]:
    """Make one mutant and examine it; return the outcome and what was wrong, if anything."""
    rng = random.Random(seed)
    case = rng.choice(cases)
    other = rng.choice(cases).folder
    folder = work / "run" / "ckpt"
    shutil.copytree(case.folder, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    damage = mutate(folder, rng, files_of(other))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem, outcome = "", "finding"
    try:
        with cpu_limit(seconds):
            outcome = examine(folder, case, work / "out" / "model")
    except Hang as hang:
        if debug:
            traceback.print_exception(hang)
        problem = f"more than {seconds} s of CPU time"
    except Exception as e:
        if debug:
            traceback.print_exc()
        at = traceback.extract_tb(e.__traceback__)[-1]
        problem = f"{type(e).__name__}: {e} ({Path(at.filename).name}:{at.lineno})"
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if not problem and taken > _MEMORY:
        problem = f"took {taken >> 20} MiB"
    if not problem and (work / "out").exists():
        problem = "wrote something"
    shutil.rmtree(work)
    work.mkdir()
    return outcome, Finding(seed, case.folder, damage, problem) if problem else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fixtures", type=Path, default=ROOT.parent / "shared" / "fixtures")
    parser.add_argument("--extra", type=Path, action="append", default=[],
                        help="a Hugging Face model to damage too")  # fmt: skip
    parser.add_argument("--only", default="", help="part of the path of the checkpoints to damage")
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU time of one mutant")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    started, worst = time.monotonic(), 0.0
    problems: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        cases = [*find_cases(options.fixtures), *made_cases(made)]
        cases += [Case(folder, gguf=True) for folder in options.extra]
        cases = [c for c in cases if options.only in str(c.folder)]
        for seed in range(options.seed, options.seed + options.mutants):
            begun = time.process_time()
            work = Path(temporary) / "work"
            work.mkdir(exist_ok=True)
            outcome, finding = try_one(seed, cases, work, options.seconds, options.debug)
            worst = max(worst, time.process_time() - begun)
            outcomes[outcome if finding is None else "finding"] += 1
            if finding is not None:
                problems[finding.problem] += 1
                if problems[finding.problem] == 1:
                    print(f"{finding.seed} {finding.case}: {finding.damage}\n    {finding.problem}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{options.mutants} mutants of {len(cases)} checkpoints: {outcomes['refused']} refused, "
        f"{outcomes['read']} read, {outcomes['finding']} findings; {worst:.2f} s of CPU at worst, "
        f"peak memory {peak} MiB, {time.monotonic() - started:.0f} s"
    )
    return 1 if outcomes["finding"] else 0


if __name__ == "__main__":
    sys.exit(main())
