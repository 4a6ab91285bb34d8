"""Tiny Llama-like models of transformers as JAX codes keep them, by each code's own converter's
rules,
and the zarr folders of Orbax and levanter they are saved in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Arrays = dict[str, np.ndarray]


def write_zarr(folder: Path, array: np.ndarray) -> None:
    """One zarr v2 array, uncompressed, in two chunks along dim 0 where it has several rows."""
    folder.mkdir(parents=True)
    chunks = [-(-array.shape[0] // 2), *array.shape[1:]] if array.ndim else []
    kind = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str
    meta = {"zarr_format": 2, "shape": list(array.shape), "chunks": chunks, "dtype": kind,
            "compressor": None, "fill_value": None, "filters": None, "order": "C",
            "dimension_separator": "."}  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(meta))
    if not array.ndim:
        (folder / "0").write_bytes(array.tobytes())
        return
    rest = ".0" * (array.ndim - 1)
    for k, lo in enumerate(range(0, array.shape[0], chunks[0])):
        piece = array[lo : lo + chunks[0]]
        full = np.zeros((chunks[0], *array.shape[1:]), array.dtype)
        full[: len(piece)] = piece
        (folder / f"{k}{rest}").write_bytes(full.tobytes())


def write_orbax(folder: Path, tree: Arrays) -> Path:
    """A step's item; names are tree keys joined by dots, slashes stay within a key."""
    folder.mkdir(parents=True)
    entries = {}
    for name, array in tree.items():
        keys = [{"key": k, "key_type": 2} for k in name.split(".")]
        entries[str(tuple(k["key"] for k in keys))] = {
            "key_metadata": keys,
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        write_zarr(folder / name, array)
    (folder / "_METADATA").write_text(
        json.dumps({"tree_metadata": entries, "use_zarr3": False, "use_ocdbt": False})
    )
    (folder / "_sharding").write_text("{}")
    return folder


def state_of(model: Any) -> Arrays:
    """The weights of a torch model, without aliases."""
    tied = bool(model.config.tie_word_embeddings)
    return {
        n: t.detach().numpy().copy()
        for n, t in model.state_dict().items()
        if not (tied and n == "lm_head.weight")
    }


def moments_of(state: Arrays, seed: int) -> Arrays:
    """Random optimizer states for every weight."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in state.items()}


def _pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves to adjacent pairs: row j of a head's first half goes to 2 j, of its second to
    2 j + 1."""
    d = rows.shape[0] // heads
    out = rows.reshape(heads, d, -1).copy()
    half = d // 2
    source = rows.reshape(heads, d, -1)
    for j in range(half):
        out[:, 2 * j] = source[:, j]
        out[:, 2 * j + 1] = source[:, half + j]
    return out.reshape(rows.shape)


def maxtext(
    s: Arrays, config: Any, *, scan: bool, power: int = 1, at: str = "params.params"
) -> Arrays:
    """The tree of MaxText.

    ``power``: of the query's scale, 1 for weights, -1 and -2 for moments.
    """
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    d, n, kind = config.head_dim, config.num_hidden_layers, config.model_type
    pairs = kind == "llama" and (config.rope_parameters or {}).get("rope_type") == "llama3"
    out: Arrays = {"token_embedder.embedding": s["model.embed_tokens.weight"],
                   "decoder.decoder_norm.scale": s["model.norm.weight"]}  # fmt: skip
    if "lm_head.weight" in s:
        out["decoder.logits_dense.kernel"] = s["lm_head.weight"].T
    each: list[Arrays] = []
    for i in range(n):
        h = {k.split(f"layers.{i}.")[1]: v for k, v in s.items() if f"layers.{i}." in k}
        layer: Arrays = {}
        for word, x, count in (("query", "q", heads), ("key", "k", kv), ("value", "v", kv)):
            w = h[f"self_attn.{x}_proj.weight"]
            if pairs and x in "qk":
                w = _pairs(w, count)
            if x == "q" and not kind.startswith("qwen"):
                w = (w / np.float32(np.sqrt(d)) ** power).astype(w.dtype)
            layer[f"self_attention.{word}.kernel"] = w.T.reshape(w.shape[1], count, d)
            if f"self_attn.{x}_proj.bias" in h:
                layer[f"self_attention.{word}.bias"] = h[f"self_attn.{x}_proj.bias"].reshape(
                    count, d
                )
            if f"self_attn.{x}_norm.weight" in h:
                layer[f"self_attention.{word}_norm.scale"] = h[f"self_attn.{x}_norm.weight"]
        layer["self_attention.out.kernel"] = h["self_attn.o_proj.weight"].T.reshape(heads, d, -1)
        layer["pre_self_attention_layer_norm.scale"] = h["input_layernorm.weight"]
        layer["post_self_attention_layer_norm.scale"] = h["post_attention_layernorm.weight"]
        layer |= _maxtext_mlp(h, config)
        each.append(layer)
    for name in each[0]:
        if scan:
            out[f"decoder.layers.{name}"] = np.stack([layer[name] for layer in each], 1)
        else:
            out |= {f"decoder.layers_{i}.{name}": layer[name] for i, layer in enumerate(each)}
    return {f"{at}.{k}": np.ascontiguousarray(v) for k, v in out.items()}


def _maxtext_mlp(h: Arrays, config: Any) -> Arrays:
    names = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    kind = config.model_type
    if kind == "mixtral":
        names = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}
    if kind not in ("mixtral", "qwen3_moe"):
        return {f"mlp.{w}.kernel": h[f"mlp.{p}.weight"].T for w, p in names.items()}
    block, at = ("block_sparse_moe", "MoeBlock_0") if kind == "mixtral" else ("mlp", "moe_block")
    count = config.num_local_experts if kind == "mixtral" else config.num_experts
    out = {f"{at}.gate.kernel": h[f"{block}.gate.weight"].T}
    for w, p in names.items():
        out[f"{at}.{w}"] = np.stack([h[f"{block}.experts.{e}.{p}.weight"].T for e in range(count)])
    return out


def easylm(s: Arrays, config: Any) -> Arrays:
    """The tree of EasyLM."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    out = {"transformer.wte.embedding": s["model.embed_tokens.weight"],
           "transformer.ln_f.kernel": s["model.norm.weight"],
           "lm_head.kernel": s["lm_head.weight"].T}  # fmt: skip
    names = {"attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
             "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
             "feed_forward.w3": "mlp.up_proj"}  # fmt: skip
    for i in range(config.num_hidden_layers):
        a, b = f"transformer.h.{i}", f"model.layers.{i}"
        out[f"{a}.attention.wq.kernel"] = _pairs(s[f"{b}.self_attn.q_proj.weight"], heads).T
        out[f"{a}.attention.wk.kernel"] = _pairs(s[f"{b}.self_attn.k_proj.weight"], kv).T
        out |= {f"{a}.{x}.kernel": s[f"{b}.{y}.weight"].T for x, y in names.items()}
        out[f"{a}.attention_norm.kernel"] = s[f"{b}.input_layernorm.weight"]
        out[f"{a}.ffn_norm.kernel"] = s[f"{b}.post_attention_layernorm.weight"]
    return {f"params.params.{k}": np.ascontiguousarray(v) for k, v in out.items()}


def hf_flax(s: Arrays, norms: tuple[str, ...] = ()) -> Arrays:
    """The tree of a Flax model of transformers; ``norms``: words of its layer norms."""
    out: Arrays = {}
    for name, array in s.items():
        stem, _, end = name.rpartition(".")
        word = stem.rpartition(".")[2]
        if end == "weight" and ("embed" in word or word in ("wte", "wpe", "shared")):
            end = "embedding"
        elif end == "weight" and word in norms:
            end = "scale"
        elif end == "weight" and array.ndim == 2:
            end, array = "kernel", array.T
        out[f"{stem}.{end}"] = np.ascontiguousarray(array)
    return out


def levanter(s: Arrays, config: Any, *, old: bool) -> Arrays:
    """The tree of levanter; ``old``: inputs before outputs."""
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    out = {"embeddings.token_embeddings.weight": s["model.embed_tokens.weight"],
           "transformer.norm.weight": s["model.norm.weight"]}  # fmt: skip
    if "lm_head.weight" in s:
        out["lm_head.weight"] = s["lm_head.weight"].T if old else s["lm_head.weight"]
    shapes = {"self_attn.q_proj": (kv, heads // kv, d), "self_attn.k_proj": (kv, d),
              "self_attn.v_proj": (kv, d), "mlp.gate_proj": (-1,),
              "mlp.up_proj": (-1,)}  # fmt: skip
    for part in (*shapes, "self_attn.o_proj", "mlp.down_proj", "input_layernorm",
                 "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):  # fmt: skip
        made = []
        for i in range(config.num_hidden_layers):
            w = s.get(f"model.layers.{i}.{part}.weight")
            if w is None:
                break
            if part in shapes:
                wide = w.shape[1]
                w = w.T.reshape(wide, *shapes[part]) if old else w.reshape(*shapes[part], wide)
            elif part == "self_attn.o_proj":
                w = w.T.reshape(heads, d, -1) if old else w.reshape(-1, heads, d)
            elif part == "mlp.down_proj" and old:
                w = w.T
            made.append(w)
        biases = [s[n] for i in range(config.num_hidden_layers)
                  if (n := f"model.layers.{i}.{part}.bias") in s]  # fmt: skip
        if biases:
            shaped = [b.reshape(shapes[part]) for b in biases]
            out[f"transformer.layers.stacked.{part}.bias"] = np.stack(shaped)
        if made:
            out[f"transformer.layers.stacked.{part}.weight"] = np.stack(made)
    return {f"model.{k}": np.ascontiguousarray(v) for k, v in out.items()}


def gemma(s: Arrays, config: Any, *, flat: bool, turned: bool = False) -> Arrays:
    """The tree of Google's Gemma;

    ``flat``: keys with slashes; ``turned``: gates [2, hidden, embed].
    """
    heads, kv, d, wide = (config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                          config.hidden_size)  # fmt: skip
    one = config.model_type == "gemma"
    embedding = np.pad(s["model.embed_tokens.weight"], ((0, 8), (0, 0)))
    out = {"embedder|input_embedding": embedding, "final_norm|scale": s["model.norm.weight"]}
    norms = {
        "pre_attention_norm": "input_layernorm",
        "pre_ffw_norm": "post_attention_layernorm" if one else "pre_feedforward_layernorm",
    }
    if not one:
        norms |= {"post_attention_norm": "post_attention_layernorm",
                  "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
    if config.model_type == "gemma3_text":
        norms |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
    for i in range(config.num_hidden_layers):
        h = {k.split(f"layers.{i}.")[1]: v for k, v in s.items() if f"layers.{i}." in k}
        out |= {f"layer_{i}/{a}|scale": h[f"{b}.weight"] for a, b in norms.items()}
        q, k, v = (
            h[f"self_attn.{x}_proj.weight"].reshape(-1, d, wide).transpose(0, 2, 1) for x in "qkv"
        )
        if heads == kv:
            out[f"layer_{i}/attn/qkv_einsum|w"] = np.stack([q, k, v])
        else:
            out[f"layer_{i}/attn/q_einsum|w"] = q
            out[f"layer_{i}/attn/kv_einsum|w"] = np.stack([k, v])
        o = h["self_attn.o_proj.weight"]
        out[f"layer_{i}/attn/attn_vec_einsum|w"] = o.T.reshape(heads, d, wide)
        gate = np.stack([h["mlp.gate_proj.weight"], h["mlp.up_proj.weight"]])
        gate = gate if turned else gate.transpose(0, 2, 1)
        end = "|w" if flat else ""
        out[f"layer_{i}/mlp/gating_einsum{end}"] = gate
        out[f"layer_{i}/mlp/linear{end}"] = h["mlp.down_proj.weight"].T
    if flat:
        return {
            f"transformer/{n}".replace("|", "."): np.ascontiguousarray(a) for n, a in out.items()
        }
    return {n.replace("|", ".").replace("/", "."): np.ascontiguousarray(a) for n, a in out.items()}
