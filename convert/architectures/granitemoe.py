"""Granite with experts, with or without a shared one (``general.architecture`` = ``granitemoe``).

Experts are stored stacked, gate and up in one; they are parted here.
"""

from __future__ import annotations

from ..gguf.values import KeyValue, u32
from ..tokenizers import TokenizerRule
from ._blocks import FRAME, LAYER, NORMS, attention, fused_experts, router
from ._llama_like import adjust_vocabulary, rope_freqs
from ._record import Architecture, Config, ExtraTensor, TensorRule
from ._restore import Stored
from .granite import DEFAULTS, granite_keys, restored_scales

_MOE = f"{LAYER}.block_sparse_moe"
_common_keys = granite_keys("granitemoe")


def _extra_keys(config: Config) -> list[KeyValue]:
    keys, shared = _common_keys(config), config.get("shared_intermediate_size")
    if shared:
        keys.append(u32("granitemoe.expert_shared_feed_forward_length", shared))
    return keys


def _sizes(config: Config) -> dict[str, int]:
    ff, shared = config["intermediate_size"], config.get("shared_intermediate_size") or 0
    return {"moe_ff": ff, "2moe_ff": 2 * ff, "shared_ff": shared, "2shared_ff": 2 * shared}


def _restore(stored: Stored) -> dict[str, object]:
    own, key = restored_scales(stored), "expert_shared_feed_forward_length"
    if key not in stored.keys:
        return own
    return {
        **own,
        "model_type": "granitemoeshared",
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "shared_intermediate_size": stored.whole(key),
    }


ARCHITECTURE = Architecture(
    name="granitemoe",
    classes=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    rope="norm",
    defaults={
        kind: {**DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
        for kind in ("granitemoe", "granitemoeshared")
    },
    sizes=_sizes,
    moe_layer=lambda config, layer: True,
    extra_keys=_extra_keys,
    extra_tensors=(ExtraTensor("rope_freqs.weight", rope_freqs),),
    adjust_vocabulary=adjust_vocabulary,
    restore=_restore,
    tokenizer=TokenizerRule(kinds=("spm", "spm_json", "bpe"), space_prefix=True),
    tensors=(
        *FRAME,
        *NORMS,
        *attention(permuted=True),
        router(f"{_MOE}.router.layer"),
        TensorRule(
            ("blk.{n}.ffn_gate_exps", "blk.{n}.ffn_up_exps"),
            f"{_MOE}.input_linear",
            ("experts", "2moe_ff", "hidden"),
            "split_gate_up",
        ),
        TensorRule(
            "blk.{n}.ffn_down_exps", f"{_MOE}.output_linear", ("experts", "hidden", "moe_ff")
        ),
        TensorRule(
            ("blk.{n}.ffn_gate_shexp", "blk.{n}.ffn_up_shexp"),
            f"{LAYER}.shared_mlp.input_linear",
            ("2shared_ff", "hidden"),
            "split_gate_up",
            needs="shared_intermediate_size",
        ),
        TensorRule(
            "blk.{n}.ffn_down_shexp",
            f"{LAYER}.shared_mlp.output_linear",
            ("hidden", "shared_ff"),
            needs="shared_intermediate_size",
        ),
        router(f"{_MOE}.router"),
        *fused_experts(f"{_MOE}.experts"),
    ),
)
