"""Which training code the names of a JAX checkpoint belong to, told by one marker each.

Names are the keys of the parameter tree joined by dots, with numbers as #; trees lie under
``params``, ``params.params``, ``model`` or at the root. Translating them is the business of
``convert/naming``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")
#: (naming, end of a name)
_MARKERS = (
    ("maxtext", "decoder.layers.self_attention.query.kernel"),
    ("maxtext", "decoder.layers.self_attention.query.kernel.value"),
    ("maxtext", "decoder.layers_#.self_attention.query.kernel"),
    ("maxtext", "decoder.layers_#.self_attention.query.kernel.value"),
    ("easylm", "transformer.h.#.attention.wq.kernel"),
    ("gemma_jax", "layer_#.attn.attn_vec_einsum.w"),
    ("levanter", "transformer.layers.stacked.self_attn.q_proj.weight"),
    ("hf_flax", "layers.#.self_attn.q_proj.kernel"),
    ("hf_flax", "transformer.h.#.attn.c_attn.kernel"),
    ("hf_flax", "transformer.h.#.attn.attention.q_proj.kernel"),
    ("hf_flax", "transformer.h.#.attn.q_proj.kernel"),
    ("hf_flax", "transformer.h.#.self_attention.query_key_value.kernel"),
    ("hf_flax", "encoder.layer.#.attention.self.query.kernel"),
    ("hf_flax", "encoder.block.#.layer.#.SelfAttention.q.kernel"),
)


def jax_world_of(names: Iterable[str]) -> str:
    """Return the naming of a parameter tree; ``jax`` if unknown."""
    seen = {_NUMBER.sub("#", name) for name in names}
    for naming, marker in _MARKERS:
        if any(n == marker or n.endswith(f".{marker}") for n in seen):
            return naming
    return "jax"
