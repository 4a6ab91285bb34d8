"""The floors hold: who may import whom, and what must never be loaded for a light command."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {
    "shardio": {"shardio"},
    "quant": {"quant"},
    "convert": {"convert", "shardio", "quant"},
    "trainer": {"trainer", "shardio", "quant", "convert"},
}
FRAMEWORKS = ("torch", "transformers", "deepspeed", "megatron", "accelerate")


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_down(folder: str) -> None:
    for path in modules(folder):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
                above = {n for n in names if (ROOT / n).is_dir()} - BELOW[folder]
                assert not above, f"{path.relative_to(ROOT)} imports {above}"


@pytest.mark.parametrize("folder", ["shardio", "quant", "convert", "commands"])
def test_no_framework_is_imported_at_import_time(folder: str) -> None:
    for path in modules(folder):
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            bad = [n for n in names if n.split(".")[0] in FRAMEWORKS]
            assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


@pytest.mark.parametrize("code", ["import mconv", "import mconv.cli", "import mconv.shardio"])
def test_light_imports_stay_light(code: str) -> None:
    probe = f"{code}\nimport sys\nprint(sorted(set(sys.modules) & {set(FRAMEWORKS)!r}))"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [p for f in (*BELOW, "commands") for p in modules(f)], ids=str)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path} has more than 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= 95, f"{path}:{node.lineno}: {node.name} has {size} lines"
