"""End tokens that only a stop string knows: llama.cpp, and so Ollama from 0.30, misses them.

A control token prints as nothing there, so a stop string never sees it; it ends an answer only if
the GGUF names it as eos, eot or eom, or llama.cpp knows its text. Ollama before 0.30 printed
control tokens, and its stop strings saw them. Source: observed of llama.cpp's server.
"""

from __future__ import annotations

from collections.abc import Sequence

from .facts import ModelFacts

EOT = "tokenizer.ggml.eot_token_id"
_NAMED = ("tokenizer.ggml.eos_token_id", EOT, "tokenizer.ggml.eom_token_id")
#: Control tokens that llama.cpp takes for end tokens whatever the metadata says.
_KNOWN_TEXTS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<｜end▁of▁sentence｜>",
        "[e~[",
    }
)  # fmt: skip


def unseen_stops(facts: ModelFacts, stops: Sequence[str]) -> list[str]:
    """Return the stop strings that are control tokens and no end tokens of the GGUF."""
    named = {facts.metadata.get(key) for key in _NAMED}
    return [
        stop
        for stop in stops
        if stop not in _KNOWN_TEXTS and stop in facts.control and facts.control[stop] not in named
    ]


def end_token_overrides(facts: ModelFacts, stops: Sequence[str]) -> tuple[str, ...]:
    """Return the metadata changes (``KEY=TYPE:VALUE``) that make the first such stop an end token.

    There is room for one, and none if the metadata names an eot token already.
    """
    unseen = unseen_stops(facts, stops)
    if not unseen or facts.metadata.get(EOT) is not None:
        return ()
    return (f"{EOT}=int:{facts.control[unseen[0]]}",)


def unseen_text(facts: ModelFacts, stop: str) -> str:
    """Return a warning about such a stop string."""
    return (
        f"answers end with {stop!r}, which the GGUF does not call an end token: Ollama from 0.30 "
        f"will not stop there; `mconv quantize IN OUT COPY --override-kv "
        f"{EOT}=int:{facts.control[stop]}` names it, and so does `mconv ollama install`"
    )
