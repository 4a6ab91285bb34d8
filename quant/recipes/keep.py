"""Which tensors are never quantized: vectors, norms, routers, small or fragile special weights.

Facts of llama.cpp's quantizer, as name fragments: a tensor whose name contains one of them keeps
its type, whatever the target.
"""

from __future__ import annotations

from .records import RecipeOptions, TensorRecord

_EXACT = {"position_embd.weight", "token_types.weight"}

_FRAGMENTS = (
    "_norm.weight",
    # expert routing
    "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight",
    # tiny per-layer projections
    "altup", "laurel", "per_layer_model_proj",
    # short convolutions
    "ssm_conv1d", "shortconv.conv.weight",
    # sparse-attention indexers
    "indexer.k_proj.weight", "indexer.q_proj.weight",
    # RWKV's low-rank mixers
    "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight",
    "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    # relative positions
    "attn_rel_b.weight",
    # vision and audio towers
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip

_BY_ARCHITECTURE = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight",
        "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight",
        "attn_v_b.weight",
    ),
}  # fmt: skip


def is_kept(tensor: TensorRecord, architecture: str, options: RecipeOptions) -> bool:
    """Return whether a tensor keeps its type, whatever the target."""
    name = tensor.name
    if len(tensor.dims) < 2 or not name.endswith("weight") or tensor.type.kind == "int":
        return True
    if name in _EXACT or (options.leave_output and name == "output.weight"):
        return True
    return any(part in name for part in (*_FRAGMENTS, *_BY_ARCHITECTURE.get(architecture, ())))
