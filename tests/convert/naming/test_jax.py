"""JAX codes: models of transformers in each code's own layout come back bit for bit, with moments,
and compute the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mconv.convert.naming import from_hf, to_hf
from mconv.convert.reshard import reshard
from mconv.errors import ConfigError, MconvError
from mconv.shardio import open_checkpoint
from mconv.shardio.layout import Layout

from .jax_cases import (
    Arrays,
    easylm,
    gemma,
    hf_flax,
    levanter,
    maxtext,
    moments_of,
    state_of,
    write_orbax,
    write_zarr,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 40, "head_dim": 16, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
MOE = {"num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **MOE}),
    "qwen2": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, **MOE}),
    "gemma": ("Gemma", {"num_key_value_heads": 4}),
    "gemma_mqa": ("Gemma", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 16}),
}


def make_model(case: str) -> Any:
    """A model with random weights."""
    kind, more = MODELS[case]
    torch.manual_seed(1)
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    tied = {"tie_word_embeddings": True} if kind.startswith("Gemma") else {}
    config = getattr(transformers, name)(**{**SIZES, **tied, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def hf_files(model: Any, folder: Path) -> Arrays:
    """The weights as ``save_pretrained`` writes them."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def check(path: Path, model: Any, truth: Arrays, folder: Path, moments: dict[str, Arrays]) -> None:
    """``mconv reshard --to hf`` gives the truth, which computes the same logits."""
    from safetensors.numpy import load_file

    opened = open_checkpoint(path, config=folder / "config.json")
    made = to_hf(opened)
    assert set(made.weights) == set(truth)
    for name, want in truth.items():
        assert made.weights[name].read().tobytes() == want.tobytes(), name
    for state, tensors in moments.items():
        assert set(made.optimizer[state]) == set(tensors)
        for name, want in tensors.items():
            assert np.array_equal(made.optimizer[state][name].read(), want), (state, name)
    target = folder.parent / "made"
    reshard(opened, target, Layout(format="hf"))
    assert {n: a.tobytes() for n, a in load_file(target / "model.safetensors").items()} == {
        n: a.tobytes() for n, a in truth.items()
    }
    again = type(model).from_pretrained(target).eval()
    ids = torch.arange(24)[None] % 40
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("case", [c for c in MODELS if not c.startswith("gemma")])
def test_maxtext(tmp_path: Path, case: str, scan: bool) -> None:
    model = make_model(case)
    truth = hf_files(model, tmp_path / "hf")
    first = moments_of(truth, 5)
    second = {n: np.abs(a) for n, a in moments_of(truth, 6).items()}
    tree = maxtext(truth, model.config, scan=scan)
    for word, state, power in (("mu", first, -1), ("nu", second, -2)):
        tree |= maxtext(
            state, model.config, scan=scan, power=power, at=f"opt_state.0.{word}.params"
        )
    tree |= {"step": np.array(7, np.int32), "opt_state.0.count": np.array(7, np.int32)}
    path = write_orbax(tmp_path / "run" / "7" / "items", tree)
    opened = open_checkpoint(path)
    assert (opened.naming, opened.step) == ("maxtext", 7)
    check(path.parent, model, truth, tmp_path / "hf", {"exp_avg": first, "exp_avg_sq": second})


def test_maxtext_without_config(tmp_path: Path) -> None:
    model = make_model("llama")
    path = write_orbax(tmp_path / "1" / "items", maxtext(state_of(model), model.config, scan=True))
    with pytest.raises(ConfigError, match="--config"):
        to_hf(open_checkpoint(path))


def test_maxtext_of_nnx_and_another_scan_axis(tmp_path: Path) -> None:
    model = make_model("qwen3")
    truth = hf_files(model, tmp_path / "hf")
    tree = maxtext(truth, model.config, scan=True, at="base")
    tree = {f"{n}.value": np.ascontiguousarray(np.moveaxis(a, 1, 0)) if ".layers." in n else a
            for n, a in tree.items()}  # fmt: skip
    check(write_orbax(tmp_path / "items", tree), model, truth, tmp_path / "hf", {})


def test_config_of_another_model(tmp_path: Path) -> None:
    model = make_model("llama")
    path = write_orbax(tmp_path / "items", maxtext(state_of(model), model.config, scan=True))
    opened = open_checkpoint(path)
    config = model.config.to_dict()
    for wrong in ({"num_hidden_layers": 4}, {"head_dim": 8, "num_attention_heads": 8},
                  {"num_hidden_layers": 10**9}, {"num_hidden_layers": "x"}):  # fmt: skip
        with pytest.raises(ConfigError):
            to_hf(replace(opened, config={**config, **wrong}))


def test_a_lost_layer(tmp_path: Path) -> None:
    model = make_model("llama")
    tree = maxtext(state_of(model), model.config, scan=False)
    del tree["params.params.decoder.layers_1.mlp.wo.kernel"]
    opened = open_checkpoint(write_orbax(tmp_path / "items", tree))
    with pytest.raises(ConfigError, match="down of layer 1"):
        to_hf(replace(opened, config=model.config.to_dict()))


@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_easylm(tmp_path: Path, case: str) -> None:
    model = make_model(case)
    truth = hf_files(model, tmp_path / "hf")
    path = write_orbax(tmp_path / "items", easylm(truth, model.config))
    assert open_checkpoint(path).naming == "easylm"
    check(path, model, truth, tmp_path / "hf", {})


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("case", ["gemma", "gemma_mqa", "gemma2", "gemma3"])
def test_gemma(tmp_path: Path, case: str, flat: bool, turned: bool) -> None:
    model = make_model(case)
    truth = hf_files(model, tmp_path / "hf")
    tree = gemma(truth, model.config, flat=flat, turned=turned)
    path = write_orbax(tmp_path / "gemma", tree)
    assert open_checkpoint(path).naming == "gemma_jax"
    check(path, model, truth, tmp_path / "hf", {})


def test_hf_flax(tmp_path: Path) -> None:
    model = make_model("llama")
    truth = hf_files(model, tmp_path / "hf")
    path = write_orbax(tmp_path / "items", {f"params.{n}": a for n, a in hf_flax(truth).items()})
    assert open_checkpoint(path).naming == "hf_flax"
    check(path, model, truth, tmp_path / "hf", {})
    tree = {f"params.{n}": a for n, a in hf_flax(truth).items()}
    del tree["params.model.layers.1.mlp.up_proj.kernel"]
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj"):
        to_hf(open_checkpoint(write_orbax(tmp_path / "less", tree)))


def test_hf_flax_gpt2_and_bert(tmp_path: Path) -> None:
    torch.manual_seed(2)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=64)).eval()  # fmt: skip
    truth = hf_files(gpt2, tmp_path / "gpt2" / "hf")
    tree = hf_flax(truth, ("ln_1", "ln_2", "ln_f"))
    check(write_orbax(tmp_path / "g", tree), gpt2, truth, tmp_path / "gpt2" / "hf", {})
    bert = transformers.BertModel(transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=40, max_position_embeddings=64))  # fmt: skip
    truth = hf_files(bert, tmp_path / "bert" / "hf")
    path = write_orbax(tmp_path / "b", hf_flax(truth, ("LayerNorm",)))
    made = to_hf(open_checkpoint(path))
    assert set(made.weights) == set(truth)
    assert all(np.array_equal(made.weights[n].read(), a) for n, a in truth.items())


@pytest.mark.parametrize("case", ["llama", "tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("old", [False, True])
def test_levanter_names(tmp_path: Path, case: str, old: bool) -> None:
    model = make_model(case)
    truth = hf_files(model, tmp_path / "hf")
    path = write_orbax(tmp_path / "items", levanter(truth, model.config, old=old))
    assert open_checkpoint(path).naming == "levanter"
    check(path, model, truth, tmp_path / "hf", {})


def test_levanter_folder(tmp_path: Path) -> None:
    model = make_model("llama")
    truth = hf_files(model, tmp_path / "hf")
    moments = {"exp_avg": moments_of(truth, 5), "exp_avg_sq": moments_of(truth, 6)}
    step = tmp_path / "run" / "step-12"
    tree = levanter(truth, model.config, old=False)
    for word, state in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        made = levanter(moments[state], model.config, old=False)
        at = f"opt_state.inner_state.0.{word}"
        tree |= {n.replace("model.", f"{at}.", 1): a for n, a in made.items()}
    for name, array in {**tree, "step": np.array(12, np.int32)}.items():
        write_zarr(step.joinpath(*name.split(".")), array)
    (step / "metadata.json").write_text('{"step": 12, "is_temporary": false}')
    opened = open_checkpoint(tmp_path / "run")
    assert (opened.format, opened.naming, opened.step) == ("levanter", "levanter", 12)
    check(step, model, truth, tmp_path / "hf", moments)
    (step / "model" / "transformer" / "norm" / "weight" / "1").unlink()
    with pytest.raises(MconvError, match="norm"):
        open_checkpoint(step)


@pytest.mark.parametrize(
    ("naming", "case"),
    [("maxtext", "llama3"), ("maxtext", "qwen3_moe"), ("easylm", "llama"), ("levanter", "qwen2"),
     ("gemma_jax", "gemma3"), ("gemma_jax", "gemma")],
)  # fmt: skip
def test_there_and_back(tmp_path: Path, naming: str, case: str) -> None:
    model = make_model(case)
    truth = hf_files(model, tmp_path / "hf")
    hf = replace(open_checkpoint(tmp_path / "hf"), tied={})
    there = from_hf(hf, naming)
    again = to_hf(there)
    assert set(again.weights) == set(truth)
    assert all(again.weights[n].read().tobytes() == a.tobytes() for n, a in truth.items())


def test_bfloat16_and_unknown_names(tmp_path: Path) -> None:
    array = np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16)
    made = to_hf(open_checkpoint(write_orbax(tmp_path / "i", {"params.net.kernel": array})))
    assert made.weights["params.net.kernel"].read().tobytes() == array.tobytes()
    assert "no code that mconv knows" in made.warnings[-1]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a//b", "a/.hidden"])
def test_hostile_keys(tmp_path: Path, key: str) -> None:
    import json

    folder = write_orbax(tmp_path / "i", {"net.kernel": np.zeros((2, 2), np.float32)})
    tree = json.loads((folder / "_METADATA").read_text())
    next(iter(tree["tree_metadata"].values()))["key_metadata"] = [{"key": key}]
    (folder / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(MconvError, match="no name of an array"):
        open_checkpoint(folder)
