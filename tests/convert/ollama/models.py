"""A trained tiny Llama with a chat template, as folder and as GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from mconv.convert.to_gguf import to_gguf

TRAINED = Path(__file__).resolve().parents[2] / "fixtures" / "trained" / "hf"


def chat_model(folder: Path, template: str | None, **generation: Any) -> Path:
    """Copy the trained model with a chat template and generation settings."""
    shutil.copytree(TRAINED, folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    if template is not None:
        settings["chat_template"] = template
    config.write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "bos_token_id": 1, **generation})
    )
    return folder


def chat_gguf(path: Path, template: str | None, kind: str = "q8_0", **generation: Any) -> Path:
    """Write such a model as GGUF."""
    folder = chat_model(path.with_suffix(""), template, **generation)
    to_gguf(folder, path, kind)
    return path


def adapter_gguf(path: Path, width: int = 64, kind: str = "adapter", family: str = "llama") -> Path:
    """Write a LoRA of rank 2 on the first layer's queries that changes nothing."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, width), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.zeros((width, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
