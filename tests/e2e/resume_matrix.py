"""Train, reshard, resume: the matrix of ``test_resume.py``, run in a process of its own.

    python resume_matrix.py OUT.json [CASE...]

Each case trains under A, saves in the middle and goes on (the truth); its checkpoint is resharded
and B resumes from it. A control resumes with zeroed moments.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from mconv import Layout, reshard
from tiny_training import forked, preload, run_deepspeed, run_fsdp

MIDDLE, END = 4, 8


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


Run = Callable[..., list[float]]
# ranks of A, A, layouts to pass, ranks of B, B
Case = tuple[int, Run, list[str], int, Run]
CASES: dict[str, Case] = {
    "zero1-dp2-to-zero3-dp3": (
        2,
        partial(run_deepspeed, stage=1, dtype="bf16", warmup=True),
        ["deepspeed:zero=3,dp=3"],
        3,
        partial(run_deepspeed, stage=3, dtype="bf16", warmup=True),
    ),
    "zero3-dp4-to-fsdp2-dp2": (
        4,
        partial(run_deepspeed, stage=3, dtype="fp32"),
        ["dcp:dp=3"],
        2,
        partial(run_fsdp, dp=2),
    ),
    "fsdp2-tp-to-zero2": (
        4,
        partial(run_fsdp, dp=2, tp=2),
        ["deepspeed:zero=2,dp=2"],
        2,
        partial(run_deepspeed, stage=2, dtype="fp32"),
    ),
    "zero3-to-zero0-fp32": (
        3,
        partial(run_deepspeed, stage=3, dtype="fp32"),
        ["deepspeed:zero=0"],
        2,
        partial(run_deepspeed, stage=0, dtype="fp32"),
    ),
    "zero0-to-zero1-to-zero0-bf16": (
        2,
        partial(run_deepspeed, stage=0, dtype="bf16", count=1),
        ["deepspeed:zero=1,dp=3", "deepspeed:zero=0"],
        3,
        partial(run_deepspeed, stage=0, dtype="bf16", count=1),
    ),
    "zero2-to-universal-to-zero3": (
        2,
        partial(run_deepspeed, stage=2, dtype="fp32", tied=True, count=1),
        ["torch", "deepspeed-universal"],
        3,
        partial(run_deepspeed, stage=3, dtype="fp32", universal=True, tied=True, count=1),
    ),
    "zero3-to-universal-to-zero1": (
        2,
        partial(run_deepspeed, stage=3, dtype="fp32"),
        ["dcp:dp=2,tp=2", "deepspeed-universal"],
        2,
        partial(run_deepspeed, stage=1, dtype="fp32", universal=True),
    ),
    "zero1-to-fsdp2-tp": (
        2,
        partial(run_deepspeed, stage=1, dtype="fp32"),
        ["deepspeed:zero=3,dp=5", "dcp:dp=2"],
        4,
        partial(run_fsdp, dp=2, tp=2),
    ),
}


def run_case(case: Case, config: dict[str, Any] | None = None) -> dict[str, list[float]]:
    """The losses of a case: going on, resumed, resumed without moments.

    ``config`` is laid beside the first checkpoint, for layouts that ask for the model's.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _run_case(case, Path(folder), config)


def _run_case(case: Case, work: Path, config: dict[str, Any] | None) -> dict[str, list[float]]:
    world_a, train, layouts, world_b, resume = case
    source = work / "a"
    job = partial(train, first=0, last=END, save_at=MIDDLE, save=source)
    truth = forked(world_a, job, port())
    if config is not None:
        (source / "config.json").write_text(json.dumps(config))
    for k, text in enumerate(layouts):
        target = work / f"b{k}"
        reshard(source, target, Layout.parse(text), with_optimizer=True)
        source = target
    found = {"truth": truth[MIDDLE:]}
    for key, forget in (("resumed", False), ("control", True)):
        job = partial(resume, first=MIDDLE, last=END, load=source, forget=forget)
        found[key] = forked(world_b, job, port())
    return found


def main() -> None:
    out, *names = sys.argv[1:]
    preload()
    results = {name: run_case(CASES[name]) for name in names or CASES}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
