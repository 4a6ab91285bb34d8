"""The fused GPU kernels, without a GPU: same bytes interpreted, strict arithmetic compiled.

Triton's interpreter runs the kernels on numpy; the compiler turns them into PTX for any GPU on any
machine. What neither shows is a GPU's NaN bits and the order inside tensor reductions: the kernels
use neither (see ``quant/triton/arith.py`` and ``lanes.py``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from mconv.quant import TYPES
from mconv.quant.triton import decoder, encoder

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
]

ONE_SHOT = ["Q8_0", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"]
LEGACY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1"]
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
GROUPS = [ONE_SHOT, LEGACY[:2], LEGACY[2:], *([name] for name in SEARCHED)]


def interpret(*arguments: str) -> dict[str, object]:
    script = Path(__file__).with_name("triton_interpreted.py")
    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_interpreted_encoders_write_the_native_bytes(names):
    found = interpret("encode", *names)
    assert list(found) == names
    for name in names:
        assert set(found[name]) >= {"plain", "importance", "bfloat16"}
        assert not any(found[name].values()), found


@pytest.mark.parametrize("what", ["calls", "decode", "exponents", "flags"])
def test_interpreted_kernels_agree(what):
    found = interpret(what)
    assert found and not any(found.values()), found


def test_every_type_but_those_with_grids_has_a_kernel():
    from mconv.quant.triton.launch import names

    blocked = {t.name for t in TYPES.values() if t.is_quantized and t.storable}
    assert {*names()} == {*ONE_SHOT, *LEGACY, *SEARCHED}
    assert {n[:3] for n in blocked - {*names()}} == {"IQ1", "IQ2", "IQ3"}


def test_a_processor_is_no_place_for_them():
    assert encoder("cpu", TYPES["Q8_0"]) is None
    assert decoder("cpu", TYPES["Q8_0"]) is None


# ---- compiled ahead of time ------------------------------------------------------------------


def compiled(launch, capability: int, folder: Path, single: bool = False) -> tuple[str, str]:
    """Return the PTX and what ptxas reports; ``single`` is for one block in all."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = launch.constants | ({"blocks": 1} if single else {})  # triton makes ones constant
    signature = launch.arguments | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"
    }
    source = ASTSource(launch.kernel, signature, constants, aligned)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / "cache")
        kernel = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=launch.options
        )
    ptx = kernel.asm["ptx"]
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    arch = re.search(r"\.target (\w+)", ptx)[1]
    ptxas = triton.knobs.nvidia.ptxas.path
    command = [ptxas, "-v", "-fmad=false", f"-arch={arch}", str(path), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return ptx, report


def loose(ptx: str) -> set[str]:
    """Float instructions that are fused, approximate, flush denormals or leave rounding open."""
    found = set()
    for name in re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z]\w*(?:\.\w+)+)", ptx, re.MULTILINE):
        parts = name.split(".")
        floats = {"f16", "f32", "f64"} & {*parts}
        rounded = parts[0] in ("add", "sub", "mul", "div", "sqrt", "rcp")
        narrowed = parts[0] == "cvt" and parts[-2] == "f16" and parts[-1] == "f32"
        if {"approx", "full", "ftz"} & {*parts} or (
            floats and (parts[0] in ("fma", "mad") or ((rounded or narrowed) and "rn" not in parts))
        ):
            found.add(name)
    return found


def check(launch, capability: int, folder: Path, single: bool = False) -> None:
    ptx, report = compiled(launch, capability, folder, single)
    assert "rn.f32" in ptx
    assert not loose(ptx)
    assert "0 bytes spill stores, 0 bytes spill loads" in report


def test_loose_instructions_are_found():
    ptx = """
        fma.rn.f32      %r1, %r2, %r3, %r4;
        @%p1 div.full.f32    %r1, %r2, %r3;
        add.f32         %r1, %r2, %r3;
        add.rn.f32      %r1, %r2, %r3;
        mad.lo.s32      %r1, %r2, %r3, %r4;
        mul.rn.ftz.f32  %r1, %r2, %r3;
        cvt.rn.f16.f32  %rs1, %r2;
        abs.f32         %r1, %r2;
    """
    assert loose(ptx) == {"fma.rn.f32", "div.full.f32", "add.f32", "mul.rn.ftz.f32"}


@pytest.mark.parametrize("name", ONE_SHOT + LEGACY + SEARCHED)
def test_compiled_encoders_are_strict_and_do_not_spill(name, tmp_path):
    from mconv.quant.triton.launch import encoding

    check(encoding(name, 2, name not in ONE_SHOT), 90, tmp_path)
    if name not in SEARCHED or name == "Q6_K":
        check(encoding(name, 0, False), 80, tmp_path, single=True)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_row_means_and_decoders_are_strict(capability, tmp_path):
    from mconv.quant.triton.decode import decoding
    from mconv.quant.triton.launch import means

    check(means(1), capability, tmp_path)
    for name in ONE_SHOT + LEGACY + SEARCHED:
        if name != "Q1_0":  # takes no arithmetic at all
            check(decoding(TYPES[name]), capability, tmp_path)
