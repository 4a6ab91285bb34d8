"""The same files as llama.cpp's own converter, when its source is at hand (``MCONV_LLAMACPP``).

The whole table is made by ``benchmarks/compare_official.py``; this runs a part of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(("model", "kind"), [("llama3", "bf16"), ("mistral", "q8_0")])
def test_files_are_equal(data_dir: Path, model: str, kind: str) -> None:
    if "MCONV_LLAMACPP" not in os.environ:
        pytest.skip("set MCONV_LLAMACPP to llama.cpp's source folder")
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    script = ROOT / "benchmarks" / "compare_official.py"
    environment = {**os.environ, "MCONV_TEST_DATA": str(data_dir)}
    run = subprocess.run(
        [sys.executable, str(script), model, "--types", kind],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " same " in run.stdout
