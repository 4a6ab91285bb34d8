"""The build script of the kernels: any failure is a warning and leaves nothing to install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent.parent.parent / "quant" / "native"
CMAKE = shutil.which("cmake")
FAKE = """#!/bin/sh
case "$*" in *{sources}*) echo "error: broken on purpose" >&2; exit 1;; esac
exec c++ "$@"
"""


@pytest.mark.skipif(CMAKE is None or shutil.which("c++") is None, reason="no CMake or compiler")
@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        ("nanobind/src*|*quant/native", "do not compile"),
        ("", "cannot be configured"),
    ],
)
def test_a_failing_compiler_is_a_warning(tmp_path: Path, sources: str, problem: str) -> None:
    pytest.importorskip("nanobind")
    compiler = tmp_path / "c++"
    compiler.write_text(FAKE.format(sources=sources))
    compiler.chmod(0o755)
    cache, out = tmp_path / "cache.cmake", tmp_path / "out"
    out.mkdir()
    (out / "_native.so").write_text("of an earlier build")
    cache.write_text(
        f'set(Python_EXECUTABLE "{sys.executable}" CACHE STRING "")\n'
        f'set(MCONV_NATIVE_OUT "{out}" CACHE STRING "")\n'
    )
    done = subprocess.run(
        [
            str(CMAKE), f"-DSOURCE={NATIVE}", f"-DBINARY={tmp_path / 'b'}", f"-DOUT={out}",
            f"-DCACHE={cache}", "-DGENERATOR=Unix Makefiles", "-P", str(NATIVE / "try_build.cmake"),
        ],
        env={**os.environ, "CXX": str(compiler)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert problem in " ".join(done.stderr.split())
    assert not out.exists()
    assert (tmp_path / "b" / "failure.log").is_file()
