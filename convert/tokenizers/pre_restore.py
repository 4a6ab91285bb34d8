"""From llama.cpp's name of a pre-tokenizer back to the ``pre_tokenizer`` of ``tokenizer.json``.

The structures are those of ``pre_table``; a step that is shortened there is written out here.
"""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError
from .pre_table import BYTE_LEVEL, DIGIT, DIGITS, PUNCTUATION, STRUCTURES, PreStructure

#: The letters of DeepSeek-LLM's pre-tokenizer: those that have an upper and a lower case.
_CASED_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷ"
    "ᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-"
    "ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_WRITTEN_OUT = {r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ…": _CASED_LETTERS}
#: Names that split text like another one.
_LIKE = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
}
#: Tokenizers that bring text into composed form first.
_COMPOSING = frozenset(
    {
        "command-r",
        "deepseek-r1-qwen",
        "megrez",
        "modern-bert",
        "mpt",
        "olmo",
        "qwen2",
        "qwen35",
        "stablelm2",
    }
)


def pre_tokenizer_of(name: str) -> dict[str, Any]:
    """Return the ``pre_tokenizer`` object that goes by a name.

    Raises:
        UnsupportedError: the name's regexes are not known.
    """
    structure = _structure(_LIKE.get(name, name))
    if structure is None:
        raise UnsupportedError(
            f"the regexes of the pre-tokenizer {name!r} are not known; give the original "
            "tokenizer's folder with --tokenizer DIR"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [_step(step, byte_level) for step in structure.steps]
    if not any(step["type"] == "ByteLevel" for step in steps):
        steps.append({**byte_level, "use_regex": False})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def normalizer_of(name: str) -> str | None:
    """Return the type of the normalizer that tokenizers of this name have."""
    return "NFC" if name in _COMPOSING else None


def _structure(name: str) -> PreStructure | None:
    for structure in STRUCTURES:
        known = all(not s.endswith("…") or s in _WRITTEN_OUT for s in structure.steps)
        odd = any(step.startswith("<") for step in structure.steps)
        if known and not odd and any(rule.name == name for rule in structure.rules):
            return structure
    return None


def _step(step: str, byte_level: dict[str, Any]) -> dict[str, Any]:
    if step == BYTE_LEVEL:
        return {**byte_level, "use_regex": True}
    if step in (DIGIT, DIGITS):
        return {"type": "Digits", "individual_digits": step == DIGIT}
    if step == PUNCTUATION:
        return {"type": "Punctuation", "behavior": "Contiguous"}
    regex = {"Regex": _WRITTEN_OUT.get(step, step)}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
