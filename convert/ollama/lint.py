"""Look at a GGUF file with Ollama's eyes: what its readers refuse, misread or regret.

Ollama's own reader is strict about value types (a count that is not u32 reads as 0), does not know
ternary tensors, wants one file, and ends a chat only at the tokens the metadata names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..gguf import GgufFile, ValueType, open_gguf
from .build import Wishes, make_modelfile
from .ends import unseen_stops, unseen_text
from .facts import ModelFacts, make_facts
from .jinja_chat import TemplateRefusedError, compile_chat
from .layers import file_type_name

Level = Literal["error", "warning", "note"]

_COUNTS = (
    "block_count", "context_length", "embedding_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
)  # fmt: skip
_MAX_STRING = 16 << 20
_NEW_TYPES = frozenset({"MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found (``level``: how bad it is)."""

    level: Level
    text: str


def lint(path: Path, scan_values: bool = True) -> list[Finding]:
    """Return what Ollama will not like about a GGUF file, worst first.

    Args:
        path: the file.
        scan_values: look for NaN and infinity in unquantized tensors, which a server refuses.

    Raises:
        FormatError: it cannot be read at all.
    """
    gguf = open_gguf(path)
    facts = make_facts(path, {key: kv.value for key, kv in gguf.entries.items()})
    found = [*_types(gguf), *_tensors(gguf), *_tokens(gguf, facts), *_template(facts)]
    if scan_values:
        found += _values(gguf)
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _types(gguf: GgufFile) -> Iterator[Finding]:
    architecture = gguf.get("general.architecture")
    if not isinstance(architecture, str):
        yield Finding("error", "general.architecture is missing")
    for key in (*(f"{architecture}.{count}" for count in _COUNTS), "general.file_type"):
        entry = gguf.entries.get(key)
        if entry is None:
            continue
        kind = entry.items if entry.type == ValueType.ARRAY else entry.type
        if kind not in (ValueType.U32, ValueType.I32 if entry.items else ValueType.U32):
            name = kind.name if kind is not None else "?"
            yield Finding("error", f"{key} is {name}, Ollama reads only U32 and sees 0")
    if "general.file_type" not in gguf:
        yield Finding("warning", "general.file_type is missing: `ollama list` says unknown")
    elif file_type_name(gguf.get("general.file_type")) == "unknown":
        yield Finding("warning", f"general.file_type {gguf['general.file_type']} has no name")
    entry = gguf.entries.get("tokenizer.ggml.add_bos_token")
    if entry is not None and entry.type != ValueType.BOOL:
        yield Finding("error", "tokenizer.ggml.add_bos_token is no bool, Ollama does not see it")
    for key, kv in gguf.entries.items():
        if kv.type == ValueType.STRING and len(kv.value) > _MAX_STRING:
            yield Finding("error", f"{key} is longer than 16 MiB, Ollama refuses it")


def _tensors(gguf: GgufFile) -> Iterator[Finding]:
    if len(gguf.paths) > 1:
        yield Finding("error", f"is split into {len(gguf.paths)} files; Ollama wants one")
    if gguf.big_endian:
        yield Finding("error", "is big-endian")
    types = {info.type.name for info in gguf.tensors.values()}
    for name in sorted(types & {"TQ1_0", "TQ2_0"}):
        yield Finding("error", f"has {name} tensors, which make the file unreadable for Ollama")
    for name in sorted(types & _NEW_TYPES):
        yield Finding("note", f"has {name} tensors: releases before 0.30 may not know them")


def _tokens(gguf: GgufFile, facts: ModelFacts) -> Iterator[Finding]:
    if "tokenizer.ggml.tokens" not in gguf:
        yield Finding("error", "has no tokenizer")
        return
    if not facts.eog:
        yield Finding("error", "names no end token: answers will not end")
    if facts.chat_template is None:
        yield Finding(
            "warning", "has no chat template: releases from 0.30 pass prompts as they come"
        )
        return
    try:
        made = make_modelfile(facts, Wishes(source="x", allow_template_drift=True))
        chat = compile_chat(facts.chat_template, facts.tokens)
        begins = chat.render([("user", "x")])
    except TemplateRefusedError:
        return
    stops = made.modelfile.parameters.get("stop", ())
    for stop in unseen_stops(facts, stops if isinstance(stops, tuple) else ()):
        yield Finding("warning", unseen_text(facts, stop))
    bos = facts.tokens.get("bos_token", "")
    if bos and not facts.bos and not begins.startswith(bos) and "add_bos" not in str(gguf.entries):
        yield Finding("note", f"neither the template nor the tokenizer puts {bos!r} in front")
    if facts.bos and begins.startswith(facts.bos):
        yield Finding(
            "note", f"template and tokenizer both put {facts.bos!r} in front; TEMPLATE must not"
        )


def _template(facts: ModelFacts) -> Iterator[Finding]:
    if facts.chat_template is None:
        return
    try:
        compile_chat(facts.chat_template, facts.tokens).render([("user", "x")])
    except TemplateRefusedError as error:
        yield Finding("warning", f"the chat template fails on a plain question: {error}")


def _values(gguf: GgufFile) -> Iterator[Finding]:
    for name, info in gguf.tensors.items():
        if info.type.name not in ("F32", "F16", "BF16"):
            continue
        flat = gguf.array(name).reshape(-1)
        for start in range(0, flat.size, 1 << 20):
            if not np.isfinite(flat[start : start + (1 << 20)].astype(np.float32)).all():
                yield Finding("error", f"tensor {name} has NaN or infinity; Ollama refuses it")
                break
