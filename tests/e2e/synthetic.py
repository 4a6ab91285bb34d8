"""Large synthetic checkpoints, written fast and sparsely in memory: Hugging Face shards with pieces
that are copied, and torch files of column shards (DTensor rank files would do the same).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

HIDDEN, FFN, LAYERS = 1024, 4096, 4
VOCAB = 640  # of the trained model's tokenizer


def llama(folder: Path, layers: int = LAYERS, ffn: int = FFN, shards: int = 3) -> int:
    """Write a Llama with random F32 weights as safetensors shards.

    Args:
        folder: where to.
        layers, ffn: its size.
        shards: number of files.

    Returns:
        Bytes of all weights.
    """
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for k in range(layers):
        at = f"model.layers.{k}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (ffn, HIDDEN) for x in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (HIDDEN, ffn)
        shapes[f"{at}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    folder.mkdir(parents=True)
    names, where = list(shapes), {}
    for s in range(shards):
        name = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: shapes[n] for n in names[s::shards]}
        write_safetensors(folder / name, part, seed=s)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return sum(4 * int(np.prod(shape)) for shape in shapes.values())


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Write random F32 tensors, a block of noise repeated with a changing start."""
    noise = np.random.default_rng(seed).standard_normal(1 << 20, dtype=np.float32) * 0.05
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        left, k = at, 0
        while left:
            block = np.roll(noise, k * 7919).tobytes()[:left]
            file.write(block)
            left -= len(block)
            k += 1
