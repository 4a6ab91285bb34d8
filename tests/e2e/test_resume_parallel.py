"""DeepSpeed's pipelines and AutoTP resume from resharded checkpoints where training stopped.

As ``test_resume``: the next losses equal those of the uninterrupted run, a control with zeroed
moments differs. Real PipelineEngine and AutoTP on CPU, gloo. ``MCONV_TEST_ALL=1`` adds the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .resume_proof import Losses, gap, run_matrix

pytest.importorskip("torch")
pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

MATRIX = Path(__file__).parent / "parallel_matrix.py"
TOLERANCE = {
    "pipe-tied-pp2-tp2-to-pp3": 5e-6,
    "names-of-hf-to-pipe": 5e-6,
    "zero1-to-autotp-zero1": 5e-6,
}
if os.environ.get("MCONV_TEST_ALL"):
    TOLERANCE |= {
        "pipe-pp2-to-pp1-dp2": 5e-6,
        "pipe-tied-pp1-dp2-to-pp2-tp2": 5e-6,
        "pipe-uniform-to-pp3": 5e-6,
        "pipe-bf16-to-bf16-optimizer": 3e-3,  # which adds up gradients in fp32
        "pipe-zero0-tp2-to-zero1": 5e-6,
        "pipe-zero1-to-zero0": 5e-6,
        "zero3-tied-to-autotp-zero2": 5e-6,
        "autotp-zero1-to-autotp-zero3-tp4": 5e-6,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Losses]:
    return run_matrix(MATRIX, TOLERANCE, tmp_path_factory.mktemp("resume") / "losses.json")


@pytest.mark.parametrize("case", TOLERANCE)
def test_the_loss_goes_on(results: dict[str, Losses], case: str) -> None:
    losses = results[case]
    assert losses["resumed"] == pytest.approx(losses["truth"], abs=TOLERANCE[case])


@pytest.mark.parametrize("case", TOLERANCE)
def test_zeroed_moments_show(results: dict[str, Losses], case: str) -> None:
    assert gap(results[case]) > 0.1
