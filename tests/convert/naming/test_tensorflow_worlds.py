"""OpenAI's GPT-2, Google's BERT and T5, and Hugging Face's TensorFlow models: written by the rules
of
each code, they come back bit for bit, with moments, and compute the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mconv.convert.naming import to_hf
from mconv.convert.reshard import reshard
from mconv.errors import ConfigError
from mconv.shardio import open_checkpoint
from mconv.shardio.layout import Layout

from .jax_cases import Arrays, moments_of
from .tf_cases import object_graph, write_bundle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file  # noqa: E402

SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 64}


def _random(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def _gpt2() -> Any:
    return _random(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)))


def _t5(**more: Any) -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4, vocab_size=40,
        decoder_start_token_id=0, **more,
    )  # fmt: skip
    return _random(transformers.T5ForConditionalGeneration(config))


def _bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=40, max_position_embeddings=64,
    )  # fmt: skip
    return _random(transformers.BertForPreTraining(config))


def _truth(model: Any, folder: Path) -> Arrays:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _openai(truth: Arrays) -> Arrays:
    out = {}
    for name, array in truth.items():
        new = re.sub(r"^transformer\.h\.(\d+)\.", r"model/h\1/", name).replace(".", "/")
        new = new.replace("transformer/", "model/")
        if "wte" in new or "wpe" in new:
            out[new.removesuffix("/weight")] = array
            continue
        norm = "/ln_" in new
        end = {"weight": "g" if norm else "w", "bias": "b"}[new.rpartition("/")[2]]
        out[f"{new.rpartition('/')[0]}/{end}"] = array[None] if end == "w" else array
    return out


def _google(truth: Arrays) -> Arrays:
    out = {}
    for name, array in truth.items():
        new = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name)
        if name.startswith("cls.seq_relationship"):
            end = {"weight": "output_weights", "bias": "output_bias"}[name.rpartition(".")[2]]
            new = f"cls.seq_relationship.{end}"
        elif name == "cls.predictions.bias":
            new = "cls.predictions.output_bias"
        elif "LayerNorm" in name:
            new = new.replace(".weight", ".gamma").replace(".bias", ".beta")
        elif "_embeddings." in name:
            new = new.removesuffix(".weight")
        elif name.endswith(".weight"):
            new, array = new.replace(".weight", ".kernel"), array.T
        out[new.replace(".", "/")] = array
    return out


def _mesh(truth: Arrays) -> Arrays:
    out = {}
    for name, array in truth.items():
        new = re.sub(r"\.(block|layer)\.(\d)(?=\.)", r".\1_00\2", name).removesuffix(".weight")
        word = new.rpartition(".")[2]
        if word == "shared":
            new = "shared.embedding"
        elif word == "lm_head":
            new, array = "decoder.logits.kernel", array.T
        elif "norm" in word:
            new += ".scale"
        else:
            new += ".kernel" if word.startswith("w") else ""
            array = array.T
        out[new.replace(".", "/")] = array
    return out


def _keras(truth: Arrays, scope: str) -> Arrays:
    out = {}
    for name, array in truth.items():
        new = re.sub(r"/(\d+)/", r"_._\1/", name.replace(".", "/"))
        stem, _, end = new.rpartition("/")
        if "LayerNorm" in new or "/ln_" in new:
            end = {"weight": "gamma", "bias": "beta"}[end]
        elif array.ndim == 2 and end == "weight" and "_embeddings" not in stem:
            if "c_" not in stem and "wte" not in stem and "wpe" not in stem:
                end, array = "kernel", array.T
        elif end == "bias" and "c_" in stem:
            array = array[None]
        out[f"{scope}/{stem}/{end}"] = array
    return out


def _equal(made: Any, truth: Arrays) -> None:
    assert set(made) == set(truth)
    for name, want in truth.items():
        assert made[name].read().tobytes() == np.ascontiguousarray(want).tobytes(), name


def _with_slots(write: Any, truth: Arrays, slots: dict[str, Arrays]) -> Arrays:
    out = write(truth)
    for slot, state in slots.items():
        out |= {f"{n}/{slot}": a for n, a in write(state).items()}
    return {**out, "global_step": np.array(9, np.int64)}


def test_gpt2(tmp_path: Path) -> None:
    model = _gpt2()
    truth = _truth(model, tmp_path / "hf")
    first, second = moments_of(truth, 3), moments_of(truth, 4)
    arrays = _with_slots(_openai, truth, {"Adam": first, "Adam_1": second})
    write_bundle(tmp_path / "124M" / "model.ckpt", {**arrays, "beta1_power": np.float32(0.5)[None]})
    opened = open_checkpoint(tmp_path / "124M")
    assert (opened.naming, opened.step) == ("gpt2_tf", 9)
    with pytest.raises(ConfigError, match=r"hparams\.json"):
        to_hf(opened)
    own = {"n_vocab": 40, "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
    (tmp_path / "124M" / "hparams.json").write_text(json.dumps(own))
    made = to_hf(open_checkpoint(tmp_path / "124M"))
    _equal(made.weights, truth)
    _equal(made.optimizer["exp_avg"], first)
    _equal(made.optimizer["exp_avg_sq"], second)
    reshard(open_checkpoint(tmp_path / "124M"), tmp_path / "made", Layout(format="hf"))
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "made").eval()
    ids = torch.arange(24)[None] % 40
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    (tmp_path / "124M" / "hparams.json").write_text(json.dumps({**own, "n_layer": 3}))
    with pytest.raises(ConfigError, match="has 2 layers"):
        to_hf(open_checkpoint(tmp_path / "124M"))


@pytest.mark.parametrize(
    "more", [{}, {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}]
)
def test_t5(tmp_path: Path, more: dict[str, Any]) -> None:
    model = _t5(**more)
    truth = _truth(model, tmp_path / "hf")
    arrays = _mesh(truth)
    arrays |= {f"{n}_slot_vr": np.ones(3, np.float32) for n in list(arrays)}
    write_bundle(tmp_path / "t5" / "model.ckpt-1", {**arrays, "global_step": np.array(5, np.int64)})
    opened = open_checkpoint(tmp_path / "t5", config=tmp_path / "hf" / "config.json")
    assert opened.naming == "t5_tf"
    assert "Adafactor" in opened.warnings[0]
    _equal(to_hf(opened).weights, truth)
    reshard(opened, tmp_path / "made", Layout(format="hf"))
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "made").eval()
    ids = torch.arange(24)[None] % 40
    with torch.no_grad():
        ours = again(ids, decoder_input_ids=ids).logits
        assert torch.equal(ours, model(ids, decoder_input_ids=ids).logits)


def test_t5_needs_a_config(tmp_path: Path) -> None:
    write_bundle(tmp_path / "m.ckpt", _mesh(_truth(_t5(), tmp_path / "far" / "hf")))
    with pytest.raises(ConfigError, match="--config"):
        to_hf(open_checkpoint(tmp_path / "m.ckpt.index"))


def test_bert(tmp_path: Path) -> None:
    model = _bert()
    truth = _truth(model, tmp_path / "hf")
    first, second = moments_of(truth, 3), moments_of(truth, 4)
    arrays = _with_slots(_google, truth, {"adam_m": first, "adam_v": second})
    write_bundle(tmp_path / "bert" / "bert_model.ckpt", arrays)
    own = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("model_type", "architectures", "layer_norm_eps"):
        del own[key]
    with pytest.raises(ConfigError, match=r"bert_config\.json"):
        to_hf(open_checkpoint(tmp_path / "bert"))
    (tmp_path / "bert" / "bert_config.json").write_text(json.dumps(own))
    opened = open_checkpoint(tmp_path / "bert")
    assert (opened.naming, opened.step) == ("bert_tf", 9)
    made = to_hf(opened)
    _equal(made.weights, truth)
    _equal(made.optimizer["exp_avg"], first)
    _equal(made.optimizer["exp_avg_sq"], second)
    reshard(opened, tmp_path / "made", Layout(format="hf"))
    again = transformers.BertForPreTraining.from_pretrained(tmp_path / "made").eval()
    ids = torch.arange(24)[None] % 40
    with torch.no_grad():
        ours, theirs = again(ids), model(ids)
    assert torch.equal(ours.prediction_logits, theirs.prediction_logits)
    assert torch.equal(ours.seq_relationship_logits, theirs.seq_relationship_logits)


def test_a_lost_layer(tmp_path: Path) -> None:
    arrays = _google(_truth(_bert(), tmp_path / "hf"))
    del arrays["bert/encoder/layer_1/output/dense/kernel"]
    write_bundle(tmp_path / "bert" / "m", arrays)
    opened = open_checkpoint(tmp_path / "bert", config=tmp_path / "hf" / "config.json")
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.dense"):
        to_hf(opened)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_hugging_face_in_tensorflow(tmp_path: Path, kind: str) -> None:
    model, scope = (_gpt2(), "tfgpt2lm_head_model") if kind == "gpt2" else (_bert(), "tf_bert")
    truth = _truth(model, tmp_path / "hf")
    named = _keras(truth, scope)
    keys = {f"model/v{i}/.ATTRIBUTES/VARIABLE_VALUE": n for i, n in enumerate(named)}
    arrays = {key: named[n] for key, n in keys.items()}
    write_bundle(tmp_path / "tf" / "ckpt-1", arrays, object_graph(keys))
    opened = open_checkpoint(tmp_path / "tf", config=tmp_path / "hf" / "config.json")
    assert opened.naming == "hf_tf"
    _equal(to_hf(opened).weights, truth)


def test_unknown_names_are_kept(tmp_path: Path) -> None:
    write_bundle(tmp_path / "m", {"net/dense/kernel": np.ones((2, 3), np.float32)})
    made = to_hf(open_checkpoint(tmp_path))
    assert made.weights["net.dense.kernel"].shape == (2, 3)
    assert "no code that mconv knows" in made.warnings[-1]
