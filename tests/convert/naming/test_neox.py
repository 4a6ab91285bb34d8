"""GPT-NeoX saves: models of transformers, cut and numbered as gpt-neox writes them, come back whole
and compute the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.convert.prepare import prepare
from mconv.errors import ConfigError, FormatError, UnsupportedError
from mconv.shardio.deepspeed.combine import merged
from mconv.shardio.deepspeed.fused import Sum
from mconv.shardio.deepspeed.parts import Part
from mconv.shardio.deepspeed.tensor_parallel import read_rules
from mconv.shardio.registry import open_checkpoint
from mconv.shardio.tensor import from_array

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIM, HEADS, LAYERS, WIDTH, VOCAB = 32, 4, 3, 64, 48
YML = """{{
  # model settings
  "num-layers": {layers}, "hidden-size": {dim}, "num-attention-heads": {heads},
  "max-position-embeddings": 64, "pos-emb": "rotary", "rotary-pct": 0.5,
  "no-weight-tying": true, "gpt-j-residual": {parallel}, "optimizer": {{"params": {{"lr": 1e-3}}}},
  {more}
}}"""
State = dict[str, Any]


def _model(parallel: bool) -> Any:
    torch.manual_seed(3)
    config = transformers.GPTNeoXConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_hidden_layers=LAYERS, vocab_size=VOCAB,
        intermediate_size=WIDTH, max_position_embeddings=64, rotary_pct=0.5,
        use_parallel_residual=parallel, hidden_act="gelu",
    )  # fmt: skip
    return _randomized(transformers.GPTNeoXForCausalLM(config))


def _llama(kv_heads: int) -> Any:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_hidden_layers=LAYERS, vocab_size=VOCAB,
        intermediate_size=WIDTH, max_position_embeddings=64, num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    return _randomized(transformers.LlamaForCausalLM(config))


def _randomized(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


def _cut_neox(model: Any, rank: int, tp: int, *, parallel: bool, new: bool) -> dict[int, State]:
    """The layers of one tensor-parallel rank."""
    state = model.state_dict()

    def rows(t: Any) -> Any:
        return t.chunk(tp, 0)[rank].clone()

    def term(bias: Any) -> Any:
        """A rank's term of a sum that only sums up right in one way, or a copy."""
        return bias * (0.75 if rank == 0 else 0.25 / (tp - 1)) if parallel and tp > 1 else bias

    first, second = ("linear1", "linear2") if new else ("dense_h_to_4h", "dense_4h_to_h")
    layers: dict[int, State] = {
        0: {"word_embeddings.weight": rows(state["gpt_neox.embed_in.weight"])}
    }
    for i in range(LAYERS):
        s = {n.split(f"layers.{i}.")[1]: t for n, t in state.items() if f"layers.{i}." in n}
        layer = {n: s[n].clone() for n in s if "layernorm" in n}
        for left, right in (("attention.query_key_value",) * 2,
                            (f"mlp.{first}", "mlp.dense_h_to_4h")):  # fmt: skip
            layer |= {f"{left}.{k}": rows(s[f"{right}.{k}"]) for k in ("weight", "bias")}
        for left, right in (("attention.dense",) * 2, (f"mlp.{second}", "mlp.dense_4h_to_h")):
            layer[f"{left}.weight"] = s[f"{right}.weight"].chunk(tp, 1)[rank].clone()
            layer[f"{left}.bias"] = term(s[f"{right}.bias"].clone())
        layer["attention.rotary_emb.inv_freq"] = torch.ones(4)
        layers[i + 2] = layer
    norm = "gpt_neox.final_layer_norm"
    layers[LAYERS + 3] = {f"norm.{k}": state[f"{norm}.{k}"].clone() for k in ("weight", "bias")}
    head = "embed_out.weight" if "embed_out.weight" in state else "lm_head.weight"
    layers[LAYERS + 4] = {"final_linear.weight": rows(state[head])}
    return layers


def _cut_llama(model: Any, rank: int, tp: int, kv: int, *, new: bool) -> dict[int, State]:
    state, d = model.state_dict(), DIM // HEADS

    def rows(t: Any) -> Any:
        return t.chunk(tp, 0)[rank].clone()

    layers: dict[int, State] = {
        0: {"word_embeddings.weight": rows(state["model.embed_tokens.weight"])}
    }
    for i in range(LAYERS):
        s = {n.split(f"layers.{i}.")[1]: t for n, t in state.items() if f"layers.{i}." in n}
        q, k, v = (s[f"self_attn.{x}_proj.weight"] for x in "qkv")
        if kv == HEADS:  # a head's q, k and v one after the other
            fused = torch.stack([x.view(HEADS, d, DIM) for x in (q, k, v)], 1)
            qkv = rows(fused.reshape(3 * DIM, DIM))
        else:
            qkv = torch.cat([rows(x) for x in (q, k, v)])
        gate, up, down = (s[f"mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        down = down.chunk(tp, 1)[rank].clone()
        layer = {"attention.query_key_value.weight": qkv,
                 "attention.dense.weight": s["self_attn.o_proj.weight"].chunk(tp, 1)[rank].clone(),
                 **{f"{n}.scale": s[f"{n}.weight"].clone()
                    for n in ("input_layernorm", "post_attention_layernorm")}}  # fmt: skip
        if new:  # the half that goes through the activation comes second
            layer |= {"mlp.linear1.weight": torch.cat([rows(up), rows(gate)]),
                      "mlp.linear2.weight": down}  # fmt: skip
        else:
            layer |= {"mlp.w1.weight": rows(gate), "mlp.w3.weight": rows(up), "mlp.w2.weight": down}
        layers[i + 2] = layer
    layers[LAYERS + 3] = {"norm.scale": state["model.norm.weight"].clone()}
    layers[LAYERS + 4] = {"final_linear.weight": rows(state["lm_head.weight"])}
    return layers


def _write(root: Path, ranks: list[dict[int, State]], yml: str, *, pipeline: bool) -> Path:
    folder = root / "global_step10"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "model.yml").write_text(yml)
    (root / "latest").write_text("global_step10")
    for t, layers in enumerate(ranks):
        module = {f"sequential.{n}.{k}": v for n, s in layers.items() for k, v in s.items()}
        if pipeline:
            for n, s in layers.items():
                torch.save(s, folder / f"layer_{n:02d}-model_{t:02d}-model_states.pt")
        torch.save(
            {"module": None if pipeline else module, "dp_world_size": 1,
             "mp_world_size": len(ranks), "global_steps": 10, "ds_config": {}, "iteration": 10,
             "args": {"num_layers": LAYERS, "hidden_size": DIM, "num_attention_heads": HEADS,
                      "padded_vocab_size": VOCAB}},
            folder / f"mp_rank_{t:02d}_model_states.pt",
        )  # fmt: skip
    return root


def _yml(parallel: bool, more: str = '"activation": "gelu",') -> str:
    return YML.format(
        layers=LAYERS, dim=DIM, heads=HEADS, parallel=str(parallel).lower(), more=more
    )


def _same_logits(model: Any, made: Any, kind: Any, config_kind: Any) -> None:
    again = kind(config_kind(**dict(made.config)))
    state = {n: torch.from_numpy(np.array(t.read())) for n, t in made.weights.items()}
    if "embed_out.weight" in state and "embed_out.weight" not in again.state_dict():
        state["lm_head.weight"] = state.pop("embed_out.weight")
    again.load_state_dict(state)
    ids = torch.arange(20)[None] % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("tp", "pipeline", "parallel", "new"),
    [(1, True, True, False), (2, True, True, False), (2, True, False, True),
     (4, False, True, True), (1, False, False, False)],
)  # fmt: skip
def test_gpt_neox(tmp_path: Path, tp: int, pipeline: bool, parallel: bool, new: bool) -> None:
    model = _model(parallel)
    ranks = [_cut_neox(model, r, tp, parallel=parallel, new=new) for r in range(tp)]
    opened = open_checkpoint(_write(tmp_path, ranks, _yml(parallel), pipeline=pipeline))
    assert (opened.naming, opened.layout.tp, opened.step) == ("neox", tp, 10)
    made = prepare(opened)
    assert made.config is not None
    assert (made.config["model_type"], made.config["vocab_size"]) == ("gpt_neox", VOCAB)
    exact = {
        n: t
        for n, t in model.state_dict().items()
        if not n.endswith(("dense.bias", "4h_to_h.bias"))
    }
    for name, want in exact.items():
        ours = name if name in made.weights else "embed_out.weight"
        assert np.array_equal(made.weights[ours].read(), want.numpy()), name
    _same_logits(model, made, transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig)


@pytest.mark.parametrize(("tp", "kv", "new"), [(1, 4, False), (2, 4, True), (2, 2, True)])
def test_llama(tmp_path: Path, tp: int, kv: int, new: bool) -> None:
    model = _llama(kv)
    ranks = [_cut_llama(model, r, tp, kv, new=new) for r in range(tp)]
    more = (f'"num_kv_heads": {kv}, "activation": "swiglu", "norm": "rmsnorm", "rotary-pct": 1,'
            '"rms_norm_epsilon": 1.0e-5, "use_bias_in_attn_linear": false')  # fmt: skip
    made = prepare(open_checkpoint(_write(tmp_path, ranks, _yml(False, more), pipeline=True)))
    for name, want in model.state_dict().items():
        assert np.array_equal(made.weights[name].read(), want.numpy()), name
    _same_logits(model, made, transformers.LlamaForCausalLM, transformers.LlamaConfig)


def _engine(layers: dict[int, State], gated: bool, kv: int) -> dict[int, State]:
    """Transformer Engine's names: ``te_mha`` and ``te_layernorm_mlp``."""
    out: dict[int, State] = {}
    for number, layer in layers.items():
        if "attention.dense.weight" not in layer:
            out[number] = layer
            continue
        new = {"attention._extra_state": torch.zeros(3, dtype=torch.uint8)}
        for name, tensor in layer.items():
            bare = name.replace("attention.query_key_value", "attention.qkv")
            bare = bare.replace("attention.dense", "attention.proj")
            bare = bare.replace("mlp.dense_h_to_4h.", "mlp.fc1_").replace(
                "mlp.linear2.", "mlp.fc2_"
            )
            bare = bare.replace("mlp.dense_4h_to_h.", "mlp.fc2_").replace(
                "mlp.linear1.", "mlp.fc1_"
            )
            bare = bare.replace("post_attention_layernorm.", "mlp.layer_norm_")
            if bare.startswith("mlp.fc1_") and gated:  # the half that is activated comes first
                tensor = torch.cat(tensor.chunk(2, 0)[::-1])
            if bare.startswith("attention.qkv") and kv != HEADS:  # by groups
                d = DIM // HEADS
                q, k, v = (x.view(kv, -1, DIM) for x in tensor.split([DIM, kv * d, kv * d]))
                tensor = torch.cat([q, k, v], 1).reshape(-1, DIM)
            new[bare.replace("layer_norm_scale", "layer_norm_weight")] = tensor
        out[number] = new
    return out


@pytest.mark.parametrize(("tp", "parallel"), [(1, True), (2, False)])
def test_transformer_engine(tmp_path: Path, tp: int, parallel: bool) -> None:
    model = _model(parallel)
    ranks = [_cut_neox(model, r, tp, parallel=parallel, new=False) for r in range(tp)]
    ranks = [_engine(r, False, HEADS) for r in ranks]
    made = prepare(open_checkpoint(_write(tmp_path, ranks, _yml(parallel), pipeline=True)))
    for name, want in model.state_dict().items():
        ours = name if name in made.weights else "embed_out.weight"
        assert np.array_equal(made.weights[ours].read(), want.numpy()), name
    _same_logits(model, made, transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig)


@pytest.mark.parametrize(("tp", "kv"), [(1, 4), (1, 2), (2, 4)])
def test_transformer_engine_llama(tmp_path: Path, tp: int, kv: int) -> None:
    model = _llama(kv)
    ranks = [_engine(_cut_llama(model, r, tp, kv, new=True), True, kv) for r in range(tp)]
    more = (f'"num_kv_heads": {kv}, "activation": "swiglu", "norm": "te_rmsnorm", "rotary-pct": 1,'
            '"rms_norm_epsilon": 1.0e-5, "use_bias_in_attn_linear": false')  # fmt: skip
    made = prepare(open_checkpoint(_write(tmp_path, ranks, _yml(False, more), pipeline=True)))
    for name, want in model.state_dict().items():
        assert np.array_equal(made.weights[name].read(), want.numpy()), name
    _same_logits(model, made, transformers.LlamaForCausalLM, transformers.LlamaConfig)


def test_transformer_engine_with_unknown_biases(tmp_path: Path) -> None:
    ranks = [_cut_neox(_model(True), r, 2, parallel=True, new=False) for r in range(2)]
    ranks = [_engine(r, False, HEADS) for r in ranks]
    with pytest.raises(UnsupportedError, match="is not known"):
        open_checkpoint(_write(tmp_path, ranks, _yml(True), pipeline=True))


def test_there_and_back(tmp_path: Path) -> None:
    ranks = [_cut_neox(_model(True), 0, 1, parallel=True, new=False)]
    opened = open_checkpoint(_write(tmp_path, ranks, _yml(True), pipeline=True))
    hf = to_hf(opened)
    again = from_hf(hf, "neox")
    assert set(again.weights) == {n for n in opened.weights if "inv_freq" not in n}
    assert all(np.array_equal(t.read(), opened.weights[n].read()) for n, t in again.weights.items())


def test_moments_of_added_biases_are_averaged() -> None:
    name = "2.attention.dense.bias"
    parts = [
        Part(
            weights={name: from_array(np.full(4, value, np.float32))},
            optimizer={
                "master": {name: from_array(np.full(4, value, np.float32))},
                "exp_avg": {name: from_array(np.full(4, 5, np.float32))},
            },
        )
        for value in (1, 2)
    ]
    rules = read_rules(None, "x", {"neox": {"gpt_j_residual": True}})
    whole = merged(parts, rules, 2, 1)
    assert whole.part.weights[name].read().tolist() == [3] * 4
    assert whole.part.optimizer["master"][name].read().tolist() == [3] * 4
    assert whole.part.optimizer["exp_avg"][name].read().tolist() == [5] * 4
    cut = [Sum().cut(whole.part.weights[name], r, 2) for r in range(2)]
    assert Sum().assemble(cut).read().tolist() == [3] * 4


def test_tied_head(tmp_path: Path) -> None:
    layers = _cut_neox(_model(True), 0, 1, parallel=True, new=False)
    del layers[LAYERS + 4]
    made = to_hf(open_checkpoint(_write(tmp_path, [layers], _yml(True), pipeline=True)))
    assert made.config is not None
    assert made.config["tie_word_embeddings"] is True


def test_refusals(tmp_path: Path) -> None:
    ranks = [_cut_neox(_model(True), r, 2, parallel=True, new=False) for r in range(2)]
    root = _write(tmp_path / "a", ranks, _yml(True), pipeline=True)
    settings = root / "global_step10" / "configs" / "model.yml"
    settings.write_text(_yml(True).replace('"rotary"', '"alibi"'))
    with pytest.raises(ConfigError, match="'alibi', not rotary"):
        to_hf(open_checkpoint(root))
    settings.write_text("{[")
    with pytest.raises(ConfigError, match=r"model\.yml"):
        open_checkpoint(root)
    settings.unlink()
    with pytest.raises(UnsupportedError, match=r"configs/\*\.yml"):
        open_checkpoint(root)
    settings.write_text(_yml(True))
    (settings.parent.parent / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(FormatError, match="layer_03-model_01"):
        open_checkpoint(root)


def test_pipeline_of_hugging_face_layers(fixtures_dir: Path) -> None:
    from safetensors.numpy import load_file

    case = fixtures_dir / "deepspeed" / "pp2_dp2_z1_bf16"
    opened = open_checkpoint(case / "ckpt")
    made = to_hf(opened)
    truth = load_file(case / "truth.safetensors")
    names = opened.args["hf_names"]
    assert set(made.weights) == set(names.values())
    for name, hf in names.items():
        assert np.array_equal(made.optimizer["master"][hf].read(), truth[f"fp32/{name}"])
