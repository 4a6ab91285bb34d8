"""Every family's files, byte for byte: digests of what llama.cpp's own programs write.

``tests/fixtures/make_arch_digests.py`` made them. The models have the names and shapes that
transformers saves, with weights that are the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.check import check_model
from mconv.convert.to_gguf import to_gguf

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs

RECORDS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "arch_digests.json").read_text()
)


def test_every_family_is_recorded() -> None:
    assert set(RECORDS) == set(tiny_archs.OFFICIAL)


@pytest.mark.parametrize("name", RECORDS)
def test_golden_files(tmp_path: Path, data_dir: Path, name: str) -> None:
    record, folder = RECORDS[name], tmp_path / f"tiny-{name}"
    tiny_archs.write_recorded(record, folder, data_dir, name)
    assert not check_model(folder, out=tmp_path / "x.gguf").problems
    to_gguf(folder, tmp_path / "{type}.gguf", ",".join(record["digests"]))
    for kind, digest in record["digests"].items():
        made = (tmp_path / f"{kind.upper()}.gguf").read_bytes()
        assert hashlib.sha256(made).hexdigest() == digest, kind
