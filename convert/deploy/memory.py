"""What a replica needs: weights, keys and values of all slots, and room to compute.

Weights and keys and values are exact (16-bit cache, an upper bound for sliding windows). The room
to compute follows llama.cpp's buffers for 512 tokens at once, logits included, plus a fixed part
for the runtime; it is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError
from ..ollama.facts import ModelFacts

_TOKENS_AT_ONCE = 512
_RUNTIME = 256 << 20
_F32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of one replica.

    Attributes:
        weights: the model.
        kv: keys and values of all slots.
        work: buffers and runtime (estimate).
        context: tokens per slot.
        slots: requests at once.
        replicas: how many of them.
        limit: what one replica may use; None if not told.
    """

    weights: int
    kv: int
    work: int
    context: int
    slots: int
    replicas: int
    limit: int | None

    @property
    def replica(self) -> int:
        """Bytes of one replica."""
        return self.weights + self.kv + self.work

    @property
    def total(self) -> int:
        """Bytes of all replicas."""
        return self.replica * self.replicas


def plan_memory(
    facts: ModelFacts, weights: int, *, context: int, slots: int, replicas: int, limit: int | None
) -> MemoryPlan:
    """Return the memory plan of a deployment, however large.

    Args:
        facts: of the model.
        weights: bytes of its tensors.
        context: tokens per slot.
        slots: requests that a replica serves at once.
        replicas: how many.
        limit: bytes that one replica may use, or None.

    Raises:
        ConfigError: the metadata does not tell the size of keys and values.
    """
    kv = facts.kv_bytes(context * slots)
    if kv is None:
        raise ConfigError(
            f"{facts.path}: the metadata does not tell layers, heads and width, so the memory of "
            "keys and values is unknown"
        )
    return MemoryPlan(
        weights=weights, kv=kv, work=_work(facts), context=context, slots=slots, replicas=replicas,
        limit=limit,
    )  # fmt: skip


def refuse_what_cannot_fit(plan: MemoryPlan) -> None:
    """Refuse a replica that needs more than its limit.

    Raises:
        ConfigError: it does not fit; the message says what would.
    """
    if plan.limit is None or plan.replica <= plan.limit:
        return
    per_token = plan.kv // (plan.context * plan.slots)
    room = plan.limit - plan.weights - plan.work
    tokens = room // per_token if per_token else 0
    if tokens >= 256 * plan.slots:
        help_ = f"{plan.slots} slots of {tokens // plan.slots // 256 * 256} tokens would fit"
    elif tokens >= 256:
        help_ = f"one slot of {tokens // 256 * 256} tokens would fit"
    else:
        help_ = "quantize it further, or spread its layers over machines with --rpc"
    raise ConfigError(
        f"one replica needs {_gib(plan.replica)} ({_gib(plan.weights)} of weights, "
        f"{_gib(plan.kv)} of keys and values for {plan.slots} slots of {plan.context} tokens, "
        f"{_gib(plan.work)} to compute), but --memory allows {_gib(plan.limit)}: {help_}"
    )


def _work(facts: ModelFacts) -> int:
    """Return bytes of buffers: logits, activations of the widest layer, and the runtime."""
    words = len(facts.metadata.get("tokenizer.ggml.tokens", ())) or facts.number("vocab_size") or 0
    width = _largest(facts.number("embedding_length"))
    inner = _largest(facts.number("feed_forward_length"))
    experts = _largest(facts.number("expert_used_count"))
    inner = max(inner, experts * _largest(facts.number("expert_feed_forward_length")))
    return _TOKENS_AT_ONCE * _F32 * (int(words) + 3 * inner + 6 * width) + _RUNTIME


def _largest(value: object) -> int:
    """Return a number, or the largest of a list with one per layer; 0 for nothing."""
    if value is None:
        return 0
    if hasattr(value, "__iter__"):
        return max((int(v) for v in value), default=0)
    return int(value)  # type: ignore[call-overload]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
