"""Every other framework's format opens and reads without any framework in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = (
    "torch/meta_consolidated_tp2/ckpt", "torch/fairscale_flat_2r/ckpt",
    "torch/fsdp1_local_flat_2r/ckpt", "nanotron/nanotron_tp2_pp2/ckpt",
    "colossalai/colossalai_pp2/ckpt", "tf/tf2_object/ckpt", "tf/tf1_partitioned/ckpt",
)  # fmt: skip
PROBE = """
import sys
from mconv.shardio import open_checkpoint
for path in sys.argv[1:]:
    for tensor in open_checkpoint(path).weights.values():
        tensor.read()
bad = {"torch", "transformers", "tensorflow", "jax", "safetensors.torch", "google.protobuf"}
print(sorted(bad & set(sys.modules)))
"""


def test_no_framework_is_loaded(fixtures_dir: Path) -> None:
    paths = [str(fixtures_dir / case) for case in CASES]
    out = subprocess.run(
        [sys.executable, "-c", PROBE, *paths], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
