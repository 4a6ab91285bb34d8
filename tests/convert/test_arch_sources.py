"""The forms in which checkpoints of a family come: fused experts, without prefix, in a composite.

All give the same file as the usual form. Stacks of experts are written with little memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.gguf import open_gguf
from mconv.convert.gguf.tensors import GgufTensors
from mconv.convert.to_gguf import to_gguf
from mconv.errors import ConfigError, UnsupportedError
from mconv.shardio import open_checkpoint
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_archs

RECORDS = json.loads((Path(__file__).parent.parent / "fixtures" / "arch_digests.json").read_text())
Weights = dict[str, np.ndarray]


def make(folder: Path, data: Path, name: str) -> tuple[Weights, dict[str, Any]]:
    tiny_archs.write_recorded(RECORDS[name], folder, data, name)
    return load_file(folder / "model.safetensors"), RECORDS[name]["config"]


def same_tensors(folder: Path, other: Path) -> None:
    """Compare what both become, but for the order."""
    to_gguf(folder, folder.with_suffix(".gguf"), "bf16")
    to_gguf(other, other.with_suffix(".gguf"), "bf16", name="x")
    a, b = open_gguf(folder.with_suffix(".gguf")), open_gguf(other.with_suffix(".gguf"))
    assert set(a.tensors) == set(b.tensors)
    for name in a.tensors:
        assert a.tensors[name].type == b.tensors[name].type
        np.testing.assert_array_equal(a.raw(name), b.raw(name), err_msg=name)


def rewrite(source: Path, target: Path, weights: Weights, config: dict[str, Any]) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))


def fused(weights: Weights, at: str, to: str, names: tuple[str, str, str], count: int) -> Weights:
    """Fuse the experts as transformers 5 holds them in memory."""
    gate, up, down = names
    out = {n: x for n, x in weights.items() if f"{at}.0." not in n and ".experts." not in n}
    for layer in range(2):
        where, there = f"model.layers.{layer}.{at}", f"model.layers.{layer}.{to}"
        both = [
            np.concatenate([weights[f"{where}.{e}.{part}.weight"] for part in (gate, up)])
            for e in range(count)
        ]
        out[f"{there}.gate_up_proj"] = np.stack(both)
        out[f"{there}.down_proj"] = np.stack(
            [weights[f"{where}.{e}.{down}.weight"] for e in range(count)]
        )
    return out


def test_fused_experts(tmp_path: Path, data_dir: Path) -> None:
    weights, config = make(tmp_path / "a", data_dir, "qwen3moe")
    names = ("gate_proj", "up_proj", "down_proj")
    new = fused(weights, "mlp.experts", "mlp.experts", names, 12)
    rewrite(tmp_path / "a", tmp_path / "b", new, config)
    same_tensors(tmp_path / "a", tmp_path / "b")
    rewrite(tmp_path / "a", tmp_path / "c", {**weights, **new}, config)
    with pytest.raises(ConfigError, match="the layer has it in another form too"):
        to_gguf(tmp_path / "c", tmp_path / "c.gguf")


def test_fused_experts_under_other_names(tmp_path: Path, data_dir: Path) -> None:
    weights, config = make(tmp_path / "a", data_dir, "mixtral")
    new = fused(weights, "block_sparse_moe.experts", "mlp.experts", ("w1", "w3", "w2"), 12)
    new = {n.replace("block_sparse_moe.gate", "mlp.gate"): x for n, x in new.items()}
    rewrite(tmp_path / "a", tmp_path / "b", new, config)
    same_tensors(tmp_path / "a", tmp_path / "b")


def bare_gpt2(weights: Weights, config: dict[str, Any]) -> None:
    for name in list(weights):
        weights[name.removeprefix("transformer.")] = weights.pop(name)
    weights["h.0.attn.bias"] = np.ones((1, 1, 128, 128), np.float32)
    weights["h.0.attn.masked_bias"] = np.ones((), np.float32)


def gemma_with_eyes(weights: Weights, config: dict[str, Any]) -> None:
    for name in list(weights):
        weights["language_" + name.replace("model.", "model.model.", 1)] = weights.pop(name)
    weights["vision_tower.vision_model.encoder.layers.0.x.weight"] = np.ones(3, np.float32)
    weights["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, np.float32)
    inner = dict(config)
    config.clear()
    config |= {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    config["text_config"] = {k: v for k, v in inner.items() if k != "architectures"}


def deepseek_with_more_layers(weights: Weights, config: dict[str, Any]) -> None:
    weights["model.layers.3.eh_proj.weight"] = np.ones((3, 3), np.float32)
    config["num_nextn_predict_layers"] = 1


def granite_in_memory(weights: Weights, config: dict[str, Any]) -> None:
    for name in list(weights):
        new = name.replace("router.layer", "router")
        new = new.replace("block_sparse_moe.input_linear.weight", "X.gate_up_proj")
        new = new.replace("block_sparse_moe.output_linear.weight", "X.down_proj")
        weights[new.replace("X", "block_sparse_moe.experts")] = weights.pop(name)


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("gpt2", bare_gpt2),
        ("gemma3", gemma_with_eyes),
        ("deepseek2-v3", deepseek_with_more_layers),
        ("granitemoe-shared", granite_in_memory),
    ],
)
def test_other_forms(
    tmp_path: Path,
    data_dir: Path,
    name: str,
    alter: Callable[[Weights, dict[str, Any]], None],
) -> None:
    weights, config = make(tmp_path / "a", data_dir, name)
    config = dict(config)
    alter(weights, config)
    rewrite(tmp_path / "a", tmp_path / "b", weights, config)
    same_tensors(tmp_path / "a", tmp_path / "b")


def test_sigmoid_scores_of_deepseek_v3(tmp_path: Path, data_dir: Path) -> None:
    weights, config = make(tmp_path / "a", data_dir, "deepseek2-v3")
    without = {k: v for k, v in config.items() if k != "scoring_func"}
    rewrite(tmp_path / "a", tmp_path / "b", weights, without)
    to_gguf(tmp_path / "b", tmp_path / "b.gguf")
    assert open_gguf(tmp_path / "b.gguf")["deepseek2.expert_gating_func"] == 2


STRANGE_ROPE = {"rope_type": "x", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3moe", {"mlp_only_layers": [1]}, "layer 1 has no experts"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "every fourth layer"),
        ("falcon", {"alibi": True}, "alibi"),
        ("phi3-long", {"rope_parameters": STRANGE_ROPE}, "'x'"),
        ("bitnet-1bitllm", {"hidden_act": "relu2"}, "squared|relu2"),
        ("nomic-bert", {"n_positions": 4096}, "n_positions"),
        ("starcoder", {"multi_query": False}, "multi_query"),
        ("gemma3n", {"altup_num_inputs": 2}, "altup_num_inputs"),
        ("mistral3", {"model_type": "mistral4"}, "Mistral 4"),
    ],
)
def test_refusals(
    tmp_path: Path, data_dir: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    weights, config = make(tmp_path / "a", data_dir, name)
    rewrite(tmp_path / "a", tmp_path / "b", weights, {**config, **changes})
    with pytest.raises(UnsupportedError, match=said):
        to_gguf(tmp_path / "b", tmp_path / "b.gguf")


def test_mxfp4_stays_in_mixes(tmp_path: Path, data_dir: Path) -> None:
    make(tmp_path / "a", data_dir, "gpt-oss-mxfp4")
    to_gguf(tmp_path / "a", tmp_path / "{type}.gguf", "bf16,q4_k_m")
    plain, mix = (open_gguf(tmp_path / f"{t}.gguf") for t in ("BF16", "Q4_K_M"))
    experts = [n for n, t in mix.tensors.items() if t.type.name == "MXFP4"]
    assert len(experts) == 2 * 3
    assert mix.tensors["blk.0.attn_q.weight"].type.name == "Q4_K"
    for name in experts:
        np.testing.assert_array_equal(plain.raw(name), mix.raw(name))
    # decoded, it is a model as any other
    to_gguf(open_checkpoint(tmp_path / "a"), tmp_path / "decoded.gguf", "f32")
    decoded = open_gguf(tmp_path / "decoded.gguf")
    for name in experts:
        np.testing.assert_array_equal(
            GgufTensors(decoded).values(name).read(), GgufTensors(plain).values(name).read()
        )


def sparse_model(folder: Path, data: Path, count: int) -> None:
    """Write a model of zeros whose experts are files with holes."""
    family = tiny_archs.FAMILIES["qwen3moe"]
    size = tiny_archs.vocabulary(folder, data, family)
    width = 512
    config = {
        **RECORDS["qwen3moe"]["config"], "num_hidden_layers": 1, "hidden_size": width,
        "moe_intermediate_size": width, "num_local_experts": count, "vocab_size": size,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    at, sizes = "model.layers.0", {"model.embed_tokens": (size, width), "model.norm": (width,)}
    sizes |= {"lm_head": (size, width), f"{at}.mlp.gate": (count, width)}
    sizes |= {f"{at}.{n}_layernorm": (width,) for n in ("input", "post_attention")}
    sizes |= {f"{at}.self_attn.{n}_norm": (32,) for n in "qk"}
    sizes |= {f"{at}.self_attn.{n}_proj": (r, width) for n, r in (("q", 64), ("k", 32), ("v", 32))}
    sizes[f"{at}.self_attn.o_proj"] = (width, 64)
    for e in range(count):
        for part in ("gate", "up", "down"):
            sizes[f"{at}.mlp.experts.{e}.{part}_proj"] = (width, width)
    header, offset = {}, 0
    for name, shape in sizes.items():
        end = offset + 2 * int(np.prod(shape))
        header[f"{name}.weight"] = {
            "dtype": "BF16", "shape": shape, "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


_PEAK = """
import resource, sys
from mconv.convert.to_gguf import to_gguf
from mconv.shardio.stream import Limits
to_gguf(sys.argv[1], sys.argv[2], "q8_0", limits=Limits(max_memory=32 << 20, threads=2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_stacks_take_no_memory(tmp_path: Path, data_dir: Path) -> None:
    peaks = []
    for count in (8, 128):  # 12 and 200 MB of experts
        sparse_model(tmp_path / str(count), data_dir, count)
        run = subprocess.run(
            [sys.executable, "-c", _PEAK, str(tmp_path / str(count)), str(tmp_path / "o.gguf")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(run.stdout.split()[-1]))
        (tmp_path / "o.gguf").unlink()
    assert peaks[1] < peaks[0] + 32
