"""Every fixture opens and reads, to the same bytes, where only numpy is installed.

All packages but the standard library, numpy and ml_dtypes (numpy's bfloat16) are hidden. What needs
one more (zstd-compressed items, OCDBT) says which.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from mconv.errors import MconvError
from mconv.shardio import open_checkpoint

PROBE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

allowed = {*sys.stdlib_module_names, "numpy", "ml_dtypes", "mconv", "test_no_frameworks"}
loaded = {n.partition(".")[0] for n in sys.modules} - allowed
sys.meta_path.insert(0, Hidden())
sys.path.insert(0, sys.argv[1])
from test_no_frameworks import digest
print(json.dumps([digest(*case) for case in json.loads(sys.argv[2])]))
extra = {n.partition(".")[0] for n in sys.modules} - allowed - loaded
assert not extra, extra
"""
#: Fixtures that need another package, and its name, which the error must tell.
NEEDS = {"dcp_zstd_2r": "mconv[zstd]", "orbax_zarr": "mconv[zstd]", "orbax_ocdbt": "tensorstore"}


def digest(folder: str, config: str | None, adapter: str | None) -> str:
    """A digest of all weights and optimizer states, or the error."""
    try:
        if adapter:
            ckpt = open_checkpoint(Path(folder) / "base", adapter=Path(folder) / adapter)
        else:
            ckpt = open_checkpoint(folder, config=config)
        found = hashlib.sha256()
        for state, tensors in (("", ckpt.weights), *ckpt.optimizer.items()):
            for name in sorted(tensors):
                found.update(f"{state} {name} {tensors[name]!r}".encode())
                found.update(tensors[name].read().tobytes())
        return f"{len(ckpt.weights)} weights {found.hexdigest()}"
    except MconvError as e:
        return f"error: {e}"


def test_all_fixtures_with_numpy_alone(fixtures_dir: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent.parent.parent / "benchmarks"))
    from fuzz_cases import find_cases

    cases = find_cases(fixtures_dir)
    assert len(cases) > 85
    asked = [(str(c.folder), c.config and str(c.config), c.adapter) for c in cases]
    out = subprocess.run(
        [sys.executable, "-c", PROBE, str(Path(__file__).parent), json.dumps(asked)],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    read = 0
    for case, got in zip(asked, json.loads(out.stdout), strict=True):
        need = next((p for name, p in NEEDS.items() if f"/{name}/" in case[0]), None)
        if need is not None:
            assert got.startswith("error:"), case
            assert need in got, got
            continue
        assert got == digest(*case), case
        assert "weights" in got, (case, got)
        read += 1
    assert read > 80
