"""Training checkpoints straight to GGUF: the same file as from the merged model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from mconv.convert.to_gguf import to_gguf
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

#: Checkpoint folder, and prefix of the weights in its truth file.
CASES = {
    "megatron/llama_legacy_tp2pp2/torch": "",
    "megatron/llama_tied_tp2pp2/torch_dist": "",
    "megatron/llama_tp4_gqa2/torch_dist": "",
    "megatron/qwen2_bias_tp2/torch_dist": "",
    "torch/dcp_fsdp2_tp_2x2/ckpt": "",
    "torch/hf_bin_sharded/ckpt": "",
    "torch/meta_consolidated_tp2/ckpt": "",
    "deepspeed/z3_dp2_bf16/ckpt": "fp32/",
    "deepspeed/z2_dp4_bf16_tied/ckpt": "fp32/",
}


@pytest.mark.parametrize("case", CASES)
def test_same_file_as_from_the_merged_model(
    tmp_path: Path, fixtures_dir: Path, data_dir: Path, case: str
) -> None:
    source = fixtures_dir / case
    merged, tokenizer = tmp_path / "merged", tmp_path / "tok"
    tiny.save_bpe(data_dir / "vocab" / "ggml-vocab-llama-bpe.gguf", tokenizer, 100)
    merged.mkdir()
    found = [p / "config.json" for p in (source.parent, source)]
    config = json.loads(next(p for p in found if p.is_file()).read_text())
    (merged / "config.json").write_text(json.dumps(config))
    prefix = CASES[case]
    truth = {
        name.removeprefix(prefix): value
        for name, value in load_file(source.parent / "truth.safetensors").items()
        if name.startswith(prefix) and not (not prefix and "/" in name)
    }
    if config.get("tie_word_embeddings"):
        truth.pop("lm_head.weight", None)
    save_file(truth, merged / "model.safetensors")
    weights = "master" if prefix else "model"
    size = config["vocab_size"]
    options = {"tokenizer": tokenizer, "name": "model", "vocab_size": size}
    to_gguf(source, tmp_path / "a.gguf", "q8_0", weights=weights, **options)
    to_gguf(merged, tmp_path / "b.gguf", "q8_0", **options)
    strip = _without_folder_names
    assert strip(tmp_path / "a.gguf") == strip(tmp_path / "b.gguf")


def _without_folder_names(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return metadata and tensors, without what llama.cpp's rules take from the folder's name."""
    from mconv.convert.gguf import open_gguf

    found = open_gguf(path)
    named = ("general.basename", "general.version", "general.finetune", "general.size_label")
    entries = {
        k: f"{e.type} {list(e.value) if e.items else e.value}" for k, e in found.entries.items()
    }
    return (
        {k: v for k, v in entries.items() if k not in named},
        {n: found.raw(n).tobytes() for n in found.tensors},
    )
