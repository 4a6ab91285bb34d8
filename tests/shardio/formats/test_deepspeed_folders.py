"""DeepSpeed saves inside the folders of Lightning, the Hugging Face Trainer and accelerate: found
from the outer folder, the tag folder and a rank file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from mconv.shardio.registry import open_checkpoint
from safetensors.numpy import load_file, save_file

#: Outer folder, tag, and what lies beside the tag.
ANATOMIES: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "plain": ("run", "global_step3", {"latest": "global_step3", "zero_to_fp32.py": "# script"}),
    "Lightning": (
        "epoch=0-step=3.ckpt",
        "checkpoint",
        {"latest": "checkpoint", "zero_to_fp32.py": "# script"},
    ),
    "Trainer": (
        "checkpoint-3",
        "global_step3",
        {
            "latest": "global_step3",
            "config.json": '{"model_type": "llama"}',
            "trainer_state.json": "{}",
            "rng_state_0.pth": "",
            "rng_state_1.pth": "",
            "tokenizer_config.json": "{}",
            "zero_to_fp32.py": "# script",
        },
    ),
    "accelerate": (
        "checkpoint_0",
        "pytorch_model",
        {
            "latest": "pytorch_model\n",
            "scheduler.bin": "",
            "random_states_0.pkl": "",
            "zero_to_fp32.py": "# script",
        },
    ),
    "copied without latest": ("run", "global_step3", {}),
}


def build(fixtures_dir: Path, tmp_path: Path, anatomy: str, case: str) -> tuple[Path, Path]:
    """Return the outer folder and the tag folder."""
    outer, tag, files = ANATOMIES[anatomy]
    folder = tmp_path / outer
    source = fixtures_dir / "deepspeed" / case / "ckpt" / "global_step3"
    shutil.copytree(source, folder / tag)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder, folder / tag


@pytest.mark.parametrize("case", ["z2_dp2_fp16", "z3_dp2_bf16"])
@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_found_from_outside_and_inside(
    fixtures_dir: Path, tmp_path: Path, anatomy: str, case: str
) -> None:
    folder, tag = build(fixtures_dir, tmp_path, anatomy, case)
    truth = load_file(fixtures_dir / "deepspeed" / case / "truth.safetensors")
    rank = next(p for p in sorted(tag.iterdir()) if p.name.endswith("optim_states.pt"))
    for path in (folder, tag, rank):
        ckpt = open_checkpoint(path)
        assert ckpt.path == tag
        assert ckpt.format == "deepspeed"
        for key, want in truth.items():
            kind, name = key.split("/")
            if kind == "fp32":
                assert np.array_equal(ckpt.optimizer["master"][name].read(), want), name
        if anatomy == "Trainer":
            assert ckpt.config == {"model_type": "llama"}


def test_exported_weights_beside_a_tag_without_latest(fixtures_dir: Path, tmp_path: Path) -> None:
    """Nothing says that the tag belongs to the export: the folder is what it looks like."""
    folder, _ = build(fixtures_dir, tmp_path, "copied without latest", "z2_dp2_fp16")
    save_file({"a": np.zeros(3, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert open_checkpoint(folder).format != "deepspeed"


def test_of_two_tags_without_latest_the_newer_is_taken(fixtures_dir: Path, tmp_path: Path) -> None:
    folder, tag = build(fixtures_dir, tmp_path, "copied without latest", "z2_dp2_fp16")
    shutil.copytree(tag, folder / "global_step12")
    assert open_checkpoint(folder).path == folder / "global_step12"
