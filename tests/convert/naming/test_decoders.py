"""metaseq's OPT and OLMo's first code: models of transformers under the codes' own names and
fusions come back, and compute the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.convert.prepare import prepare
from mconv.errors import ConfigError
from mconv.shardio.registry import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIM, HEADS, LAYERS, WIDTH, VOCAB = 32, 4, 2, 48, 40
State = dict[str, Any]


def _randomized(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


def _check(model: Any, made: Any) -> None:
    """The same tensors, and the same logits with the config that was derived."""
    state = model.state_dict()
    if made.config["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    assert set(made.weights) == set(state)
    for name, want in state.items():
        assert np.array_equal(made.weights[name].read(), want.numpy()), name
    kind = type(model)
    again = kind(kind.config_class(**dict(made.config)))
    found = {n: torch.from_numpy(np.array(t.read())) for n, t in made.weights.items()}
    lost = again.load_state_dict(found, strict=False)
    assert not lost.unexpected_keys
    assert set(lost.missing_keys) <= {"lm_head.weight"}
    again.tie_weights()
    ids = torch.arange(20)[None] % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


# -- OPT -------------------------------------------------------------------------------------------


def _opt(proj: int, before: bool) -> Any:
    config = transformers.OPTConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_hidden_layers=LAYERS, ffn_dim=WIDTH,
        vocab_size=VOCAB, max_position_embeddings=30, word_embed_proj_dim=proj,
        do_layer_norm_before=before,
    )  # fmt: skip
    return _randomized(transformers.OPTForCausalLM(config))


def _metaseq(model: Any, *, fused: bool) -> State:
    names = {"project_in.": "project_in_dim.", "project_out.": "project_out_dim.",
             "decoder.final_layer_norm.": "decoder.layer_norm."}  # fmt: skip
    out: State = {"decoder.version": torch.tensor([3.0])}
    for name, tensor in model.state_dict().items():
        new = name.removeprefix("model.")
        for a, b in names.items():
            new = new.replace(a, b)
        if name != "lm_head.weight":
            out[new] = tensor.clone()
    out["decoder.output_projection.weight"] = out["decoder.embed_tokens.weight"]
    for i in range(LAYERS if fused else 0):
        at = f"decoder.layers.{i}.self_attn"
        for kind in ("weight", "bias"):
            k, v, q = (out.pop(f"{at}.{x}_proj.{kind}") for x in "kvq")
            out[f"{at}.qkv_proj.{kind}"] = torch.cat([k, v, q])
    return out


SETTINGS = {"decoder_layers": LAYERS, "decoder_attention_heads": HEADS, "activation_fn": "relu",
            "no_scale_embedding": True}  # fmt: skip


@pytest.mark.parametrize(
    ("fused", "proj", "before"), [(True, DIM, True), (False, DIM, True), (True, 16, False)]
)
def test_opt(tmp_path: Path, fused: bool, proj: int, before: bool) -> None:
    model = _opt(proj, before)
    saved = {"model": _metaseq(model, fused=fused), "cfg": {"model": SETTINGS}}
    torch.save(saved, tmp_path / "restored.pt")
    opened = open_checkpoint(tmp_path)
    assert opened.naming == "metaseq"
    _check(model, prepare(opened))


def _flat(state: State, part: int) -> State:
    """One model part as FairScale saves it, in one flat vector."""

    def piece(name: str, t: Any) -> Any:
        if name.endswith(("out_proj.weight", "fc2.weight")):
            return t.chunk(2, 1)[part]
        if "qkv_proj" in name:
            return torch.cat([x.chunk(2)[part] for x in t.chunk(3)])
        return (
            t.chunk(2)[part]
            if name.endswith(("embed_tokens.weight", "fc1.weight", "fc1.bias"))
            else t
        )

    pieces = {n: piece(n, t).contiguous() for n, t in state.items() if "version" not in n}
    del pieces["decoder.output_projection.weight"]
    info = {"names": [n.removeprefix("decoder.") for n in pieces], "padding": 0,
            "shapes": [tuple(t.shape) for t in pieces.values()],
            "numels": [t.numel() for t in pieces.values()]}  # fmt: skip
    shared = [("embed_tokens.weight", "output_projection.weight")]
    entry = {"fsdp_path": "decoder", "params": {"flat_param_0": info}, "shared_param_info": shared}
    flat = torch.cat([t.reshape(-1) for t in pieces.values()])
    return {"model": {"decoder.flat_param_0": flat}, "cfg": {"model": SETTINGS},
            "shard_metadata": {"param_metadata": [entry], "buffer_names": []}}  # fmt: skip


def test_opt_of_two_model_parts(tmp_path: Path) -> None:
    model = _opt(DIM, True)
    for part in range(2):
        file = tmp_path / f"checkpoint_last-model_part-{part}-shard0.pt"
        torch.save(_flat(_metaseq(model, fused=True), part), file)
    made = prepare(open_checkpoint(tmp_path))
    assert made.tied == {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _check(model, made)


def test_opt_settings(tmp_path: Path) -> None:
    state = _metaseq(_opt(DIM, True), fused=True)
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="--config"):
        to_hf(open_checkpoint(tmp_path / "a.pt"))
    (tmp_path / "config.json").write_text(json.dumps(_opt(DIM, True).config.to_dict()))
    assert len(to_hf(open_checkpoint(tmp_path / "a.pt")).weights) > 20
    (tmp_path / "config.json").unlink()
    bad = {"model": state, "cfg": {"model": {**SETTINGS, "no_scale_embedding": False}}}
    torch.save(bad, tmp_path / "b.pt")
    with pytest.raises(ConfigError, match="no_scale_embedding"):
        to_hf(open_checkpoint(tmp_path / "b.pt"))


def test_opt_there_and_back(tmp_path: Path) -> None:
    state = _metaseq(_opt(DIM, True), fused=True)
    torch.save({"model": state, "cfg": {"model": SETTINGS}}, tmp_path / "a.pt")
    opened = open_checkpoint(tmp_path / "a.pt")
    again = from_hf(to_hf(opened), "metaseq")
    assert set(again.weights) == set(opened.weights) - {"decoder.version"}
    assert all(np.array_equal(t.read(), opened.weights[n].read()) for n, t in again.weights.items())


# -- OLMo ------------------------------------------------------------------------------------------


def _olmo(generation: int, kv: int, tied: bool) -> Any:
    common = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": kv,
              "num_hidden_layers": LAYERS, "intermediate_size": WIDTH, "vocab_size": VOCAB,
              "max_position_embeddings": 30, "tie_word_embeddings": tied, "pad_token_id": 1,
              "eos_token_id": 2}  # fmt: skip
    if generation == 2:
        config = transformers.Olmo2Config(**common, rms_norm_eps=1e-6)
        return _randomized(transformers.Olmo2ForCausalLM(config))
    config = transformers.OlmoConfig(**common, clip_qkv=0.7)
    return _randomized(transformers.OlmoForCausalLM(config))


def _olmo_names(model: Any, tied: bool) -> State:
    s = model.state_dict()
    out = {"transformer.wte.weight": s["model.embed_tokens.weight"].clone()}
    if "model.norm.weight" in s:
        out["transformer.ln_f.weight"] = s["model.norm.weight"].clone()
    if not tied:
        out["transformer.ff_out.weight"] = s["lm_head.weight"].clone()
    norms = {"post_attention_layernorm": "attn_norm", "post_feedforward_layernorm": "ff_norm",
             "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm",
             "self_attn.o_proj": "attn_out", "mlp.down_proj": "ff_out"}  # fmt: skip
    for i in range(LAYERS):
        h, b = f"model.layers.{i}", f"transformer.blocks.{i}"
        qkv = [s[f"{h}.self_attn.{x}_proj.weight"] for x in "qkv"]
        out[f"{b}.att_proj.weight"] = torch.cat(qkv)
        out[f"{b}.ff_proj.weight"] = torch.cat(
            [s[f"{h}.mlp.{x}_proj.weight"] for x in ("up", "gate")]
        )
        for left, right in norms.items():
            if f"{h}.{left}.weight" in s:
                out[f"{b}.{right}.weight"] = s[f"{h}.{left}.weight"].clone()
    return out


def _olmo_settings(generation: int, kv: int, tied: bool) -> dict[str, Any]:
    new = generation == 2
    return {"d_model": DIM, "n_heads": HEADS, "n_kv_heads": kv, "n_layers": LAYERS,
            "clip_qkv": None if new else 0.7, "rope": True, "rope_theta": 10000,
            "activation_type": "swiglu", "block_type": "sequential", "norm_after": new,
            "attention_layer_norm": new, "layer_norm_type": "rms" if new else "default",
            "layer_norm_eps": 1e-6, "max_sequence_length": 30, "vocab_size": VOCAB - 3,
            "embedding_size": VOCAB, "weight_tying": tied, "pad_token_id": 1,
            "eos_token_id": 2}  # fmt: skip


@pytest.mark.parametrize(("generation", "kv", "tied"), [(1, 4, False), (1, 2, True), (2, 4, False)])
def test_olmo_unsharded(tmp_path: Path, generation: int, kv: int, tied: bool) -> None:
    model = _olmo(generation, kv, tied)
    folder = tmp_path / "step1000-unsharded"
    folder.mkdir()
    state = _olmo_names(model, tied)
    torch.save(state, folder / "model.pt")
    moments = {n: {"exp_avg": t * 2, "exp_avg_sq": t**2, "step": torch.tensor(9.0)}
               for n, t in state.items()}  # fmt: skip
    groups = [{"lr": 1e-3, "params": list(state), "param_names": list(state)}]
    torch.save({"state": moments, "param_groups": groups}, folder / "optim.pt")
    torch.save({"epoch": 0, "rng": {"cpu": torch.zeros(3)}}, folder / "train.pt")
    rows = "".join(f"  - /data/part-{k}.npy\n" for k in range(3000))
    own = _olmo_settings(generation, kv, tied)
    lines = "\n".join(f"  {k}: {json.dumps(v)}" for k, v in own.items())
    (folder / "config.yaml").write_text(f"run_name: x\nmodel:\n{lines}\ndata:\n  paths:\n{rows}")
    opened = open_checkpoint(folder)
    assert (opened.naming, opened.step) == ("olmo", 9)
    made = prepare(opened, with_optimizer=True)
    _check(model, made)
    name = "model.layers.1.mlp.gate_proj.weight"
    assert np.array_equal(made.optimizer["exp_avg"][name].read(), made.weights[name].read() * 2)


def test_hf_olmo(tmp_path: Path) -> None:
    """``hf_olmo``: the same names below ``model.``, the own settings flat in config.json."""
    from safetensors.torch import save_file

    model = _olmo(1, 4, False)
    state = {f"model.{n}": t for n, t in _olmo_names(model, False).items()}
    save_file(state, tmp_path / "model.safetensors")
    config = {**_olmo_settings(1, 4, False), "model_type": "hf_olmo",
              "architectures": ["OLMoForCausalLM"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_checkpoint(tmp_path)
    assert opened.naming == "olmo"
    _check(model, to_hf(opened))
    config["alibi"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="alibi"):
        to_hf(open_checkpoint(tmp_path))
