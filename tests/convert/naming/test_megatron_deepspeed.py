"""Megatron-DeepSpeed saves: models of transformers, cut and numbered as its pipelines write them
(or named as without pipelines), come back whole and compute the same.

``tests/e2e/test_bloom.py`` reads a BLOOM that real DeepSpeed trained.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.convert.reshard import reshard
from mconv.errors import ConfigError
from mconv.shardio import Layout
from mconv.shardio.registry import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIM, HEADS, LAYERS, WIDTH, VOCAB, PADDED, TP = 32, 4, 2, 48, 61, 64, 2
State = dict[str, Any]


def _random(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    model.tie_weights()
    return model.eval()


def _bloom() -> Any:
    config = transformers.BloomConfig(
        vocab_size=PADDED, hidden_size=DIM, n_layer=LAYERS, n_head=HEADS
    )
    return _random(transformers.BloomForCausalLM(config))


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=PADDED, n_embd=DIM, n_layer=LAYERS, n_head=HEADS, n_positions=24
    )
    return _random(transformers.GPT2LMHeadModel(config))


def _llama(kv_heads: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=PADDED, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, intermediate_size=WIDTH, max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    return _random(transformers.LlamaForCausalLM(config))


def _rows(t: Any, rank: int) -> Any:
    return t.chunk(TP, 0)[rank].clone()


def _columns(t: Any, rank: int) -> Any:
    return t.chunk(TP, 1)[rank].clone()


def _per_head(parts: list[Any], kv_heads: int) -> Any:
    """q, k and v fused group by group: the group's queries, its key, its value."""
    size, found = DIM // HEADS, []
    each = HEADS // kv_heads
    for g in range(kv_heads):
        q, k, v = parts
        found.append(q[g * each * size : (g + 1) * each * size])
        found += [x[g * size : (g + 1) * size] for x in (k, v)]
    return torch.cat(found)


def _block(s: State, kind: str, kv_heads: int, rank: int) -> State:
    """One block's tensors of a rank, from transformers' names."""
    if kind == "llama":
        qkv = _per_head([s[f"self_attn.{x}_proj.weight"] for x in "qkv"], kv_heads)
        gate, up = (s[f"mlp.{x}_proj.weight"] for x in ("gate", "up"))
        return {
            **{f"{n}.weight": s[f"{n}.weight"].clone()
               for n in ("input_layernorm", "post_attention_layernorm")},
            "self_attention.query_key_value.weight": _rows(qkv, rank),
            "self_attention.dense.weight": _columns(s["self_attn.o_proj.weight"], rank),
            "mlp.dense_h_to_4h.weight": torch.cat([_rows(gate, rank), _rows(up, rank)]),
            "mlp.dense_4h_to_h.weight": _columns(s["mlp.down_proj.weight"], rank),
        }  # fmt: skip
    if kind == "gpt2":
        names = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
                 "attn.c_proj": "self_attention.dense", "mlp.c_fc": "mlp.dense_h_to_4h",
                 "mlp.c_proj": "mlp.dense_4h_to_h"}  # fmt: skip
        fused = {k: s[f"attn.c_attn.{k}"].T if k == "weight" else s[f"attn.c_attn.{k}"]
                 for k in ("weight", "bias")}  # fmt: skip
        s = {f"{left}.{k}": s[f"{n}.{k}"].T if "." in n and k == "weight" else s[f"{n}.{k}"]
             for n, left in names.items() for k in ("weight", "bias")}  # fmt: skip
        for k, t in fused.items():
            s[f"self_attention.query_key_value.{k}"] = _per_head(list(t.chunk(3)), HEADS)
    found = {}
    for name, t in s.items():
        if name in ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight"):
            found[name] = _columns(t, rank)
        else:
            found[name] = _rows(t, rank) if "query_key" in name or "h_to_4h" in name else t.clone()
    return found


def _layers(model: Any, kind: str, kv_heads: int, rank: int) -> dict[int, State]:
    state = model.state_dict()
    at, first = ("model.layers", 2) if kind == "llama" else ("transformer.h", 2)
    first += kind == "bloom"
    embed = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}
    outer = {"word_embeddings.weight": f"{embed.get(kind, 'transformer.word_embeddings')}.weight"}
    for k in ("weight", "bias") if kind == "bloom" else ():
        outer[f"word_embeddings.norm.{k}"] = f"transformer.word_embeddings_layernorm.{k}"
    if kind == "gpt2":
        outer["position_embeddings.weight"] = "transformer.wpe.weight"
    layers = {1: {n: state[h].clone() for n, h in outer.items()}}
    layers[1]["word_embeddings.weight"] = _rows(layers[1]["word_embeddings.weight"], rank)
    for i in range(LAYERS):
        own = {n.split(f"{at}.{i}.")[1]: t for n, t in state.items() if f"{at}.{i}." in n}
        layers[first + i] = _block(own, kind, kv_heads, rank)
    norm = "model.norm" if kind == "llama" else "transformer.ln_f"
    last = first + LAYERS + (kind == "bloom")
    layers[last] = {k: state[f"{norm}.{k}"].clone() for k in ("weight", "bias")
                    if f"{norm}.{k}" in state}  # fmt: skip
    if kind == "llama":
        layers[last + 1] = {"lm_head.weight": _rows(state["lm_head.weight"], rank)}
    return layers


def _args(kind: str, kv_heads: int) -> Namespace:
    return Namespace(
        hidden_size=DIM, num_layers=LAYERS, num_attention_heads=HEADS, layernorm_epsilon=1e-5,
        num_key_value_heads=kv_heads, padded_vocab_size=PADDED, seq_length=24,
        max_position_embeddings=64 if kind == "llama" else 24, swiglu=kind == "llama",
        ffn_hidden_size=WIDTH if kind == "llama" else 4 * DIM,
    )  # fmt: skip


def _write(root: Path, ranks: list[dict[int, State]], args: object, *, pipeline: bool) -> Path:
    folder = root / "global_step10"
    folder.mkdir(parents=True)
    for r, layers in enumerate(ranks):
        head = {
            "param_shapes": None, "dp_world_size": 1, "mp_world_size": TP, "global_steps": 10,
            "buffer_names": [], "ds_config": {}, "ds_version": "0.16.9", "args": args,
            "checkpoint_version": 3.0, "module": None,
        }  # fmt: skip
        if pipeline:
            for n, layer in layers.items():
                torch.save(layer, folder / f"layer_{n:02d}-model_{r:02d}-model_states.pt")
        else:
            head["module"] = _unnumbered(layers)
        torch.save(head, folder / f"mp_rank_{r:02d}_model_states.pt")
    (root / "latest").write_text("global_step10")
    return root


def _unnumbered(layers: dict[int, State]) -> State:
    """The names of a save without pipeline parallelism."""
    found: State = {}
    numbers = sorted(layers)
    for n in numbers:
        for name, t in layers[n].items():
            if n == 1:
                found[f"language_model.embedding.{name}"] = t
            elif name == "lm_head.weight":
                found["language_model.output_layer.weight"] = t
            elif "." in name:
                found[f"language_model.encoder.layers.{numbers.index(n) - 1}.{name}"] = t
            else:
                found[f"language_model.encoder.final_layernorm.{name}"] = t
    return found


MODELS = {"bloom": (_bloom, HEADS), "gpt2": (_gpt2, HEADS), "llama": (lambda: _llama(HEADS), HEADS),
          "llama, grouped queries": (lambda: _llama(2), 2)}  # fmt: skip


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "one stage"])
@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same(tmp_path: Path, name: str, pipeline: bool) -> None:
    torch.manual_seed(5)
    make, kv_heads = MODELS[name]
    model, kind = make(), name.split(",")[0]
    ranks = [_layers(model, kind, kv_heads, r) for r in range(TP)]
    root = _write(tmp_path / "ds", ranks, _args(kind, kv_heads), pipeline=pipeline)
    reshard(root, tmp_path / "hf", Layout("hf"))
    again, info = type(model).from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(20)[None] % VOCAB
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)

    named = to_hf(open_checkpoint(root))
    back = to_hf(from_hf(named, "megatron-deepspeed"))
    assert back.weights.keys() == named.weights.keys()
    for key, tensor in named.weights.items():
        assert np.array_equal(back.weights[key].read(), tensor.read()), key


def test_vocabulary_is_trimmed_on_request(tmp_path: Path) -> None:
    ranks = [_layers(_bloom(), "bloom", HEADS, r) for r in range(TP)]
    root = _write(tmp_path, ranks, _args("bloom", HEADS), pipeline=True)
    opened = open_checkpoint(root)
    kept, trimmed = to_hf(opened), to_hf(opened, vocab_size=VOCAB)
    assert "as training padded it" in " ".join(kept.warnings)
    assert kept.weights["transformer.word_embeddings.weight"].shape == (PADDED, DIM)
    assert trimmed.weights["transformer.word_embeddings.weight"].shape == (VOCAB, DIM)
    assert trimmed.config is not None
    assert trimmed.config["vocab_size"] == VOCAB


def test_drifted_copies_are_averaged(tmp_path: Path) -> None:
    ranks = [_layers(_bloom(), "bloom", HEADS, r) for r in range(TP)]
    for r, layers in enumerate(ranks):
        layers[3]["input_layernorm.weight"] = torch.full((DIM,), 1.0 + r)
        layers[6]["bias"] = torch.full((DIM,), 2.0 * r)
    named = to_hf(open_checkpoint(_write(tmp_path, ranks, _args("bloom", HEADS), pipeline=True)))
    assert set(named.weights["transformer.h.0.input_layernorm.weight"].read()) == {1.5}
    assert set(named.weights["transformer.ln_f.bias"].read()) == {1.0}


def test_refusals(tmp_path: Path, fixtures_dir: Path) -> None:
    ranks = [_layers(_llama(2), "llama", 2, r) for r in range(TP)]
    unknown = _write(tmp_path / "a", ranks, None, pipeline=True)
    with pytest.raises(ConfigError, match="config"):
        to_hf(open_checkpoint(unknown))
    args = _args("llama", 2)
    args.swiglu = False
    other = _write(tmp_path / "b", ranks, args, pipeline=True)
    with pytest.raises(ConfigError, match="no Hugging Face model computes this"):
        to_hf(open_checkpoint(other))
    made_up = open_checkpoint(fixtures_dir / "deepspeed" / "pp2_tp2_dp2_z1_meg" / "ckpt")
    with pytest.raises(ConfigError, match="give the Hugging Face config"):
        to_hf(made_up)
