"""Which pre-tokenizer structure goes by which name in llama.cpp.

A structure is the list of regular expressions that a tokenizer splits text with, one after the
other, as found in its ``tokenizer.json``. Several of llama.cpp's names share a structure and
differ in switches or only in the vocabulary they were made for: the first rule that fits names it.
Sources: the tokenizers of the models named, and the regexes of llama.cpp's ``llama-vocab.cpp``.
A step that ends with ``…`` stands for any step that begins so.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What ByteLevel(use_regex=True) and Digits do.
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}+"
PUNCTUATION = "punctuation"

_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_SCRIPT = "[一-龥ࠀ-一가-퟿]+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_PUNCTUATED = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"

_LLAMA3 = rf"{_CUT}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CUT}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_GPT4O = f"{_CASED % (_CUT + '?', _CUT + '?')}|\\p{{N}}{{1,3}}|{_CASED_TAIL}"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ…",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _SCRIPT,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _SCRIPT)
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"


@dataclass(frozen=True, slots=True)
class NameRule:
    """A name, and what must be so for it to apply.

    Attributes:
        name: value of ``tokenizer.ggml.pre``.
        tokens: tokens that all must exist.
        ignore_merges: required value of the BPE model's switch; None: any.
        clean_up: required value of ``clean_up_tokenization_spaces``; None: any.
        normalizer: a normalizer type that must be there, or "none"; empty: any.
        post_processor: a post-processor type that must be there; empty: any.
    """

    name: str
    tokens: tuple[str, ...] = ()
    ignore_merges: bool | None = None
    clean_up: bool | None = None
    normalizer: str = ""
    post_processor: str = ""


@dataclass(frozen=True, slots=True)
class PreStructure:
    """A list of splitting steps and the names it goes by."""

    steps: tuple[str, ...]
    rules: tuple[NameRule, ...]


def _one(name: str, *steps: str) -> PreStructure:
    return PreStructure(steps, (NameRule(name),))


STRUCTURES: tuple[PreStructure, ...] = (
    PreStructure(
        (_LLAMA3,),
        (
            NameRule("glm4", ("[gMASK]",), ignore_merges=True),
            NameRule("chatglm-bpe", ("[gMASK]",)),
            NameRule("llama-bpe", ignore_merges=True),
            NameRule("smaug-bpe", ("<|begin_of_text|>",)),
            NameRule("dbrx"),
        ),
    ),
    PreStructure(
        (_QWEN2,),
        (
            NameRule("deepseek-r1-qwen", ("<｜begin▁of▁sentence｜>",)),
            NameRule("stablelm2", ("<|reg_extra|>",)),
            NameRule("megrez", ("<|role_start|>", "<|turn_end|>")),
            NameRule("hunyuan", ("<|startoftext|>", "<|extra_0|>")),
            NameRule("grok-2", ("<|separator|>",)),
            NameRule("qwen2"),
        ),
    ),
    PreStructure(
        (BYTE_LEVEL,),
        (
            NameRule("roberta-bpe", post_processor="RobertaProcessing"),
            NameRule("modern-bert", ("[CLS]", "[MASK]"), normalizer="NFC"),
            NameRule("olmo", ("|||IP_ADDRESS|||",), normalizer="NFC"),
            NameRule("mpt", ("<|padding|>",), normalizer="NFC"),
            NameRule("exaone4", ("[|assistant|]",)),
            NameRule("phi-2", ("<|endoftext|>", " " * 31), normalizer="none"),
            NameRule("gpt-2"),
        ),
    ),
    PreStructure(
        (DIGIT, BYTE_LEVEL),
        (
            NameRule("command-r", ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>")),
            NameRule("starcoder", ("<fim_prefix>", "<file_sep>")),
            NameRule("refact", ("<fim_prefix>",)),
            NameRule("smollm", ("<|im_start|>", "<repo_name>")),
            NameRule("exaone", ("[|assistant|]",)),
            NameRule("smollm", clean_up=False),
            NameRule("starcoder"),
        ),
    ),
    PreStructure(
        (
            r"\p{N}{1,3}",
            _CJK,
            rf"{_ASCII_MARKS}[A-Za-z]+|{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        ),
        (NameRule("hunyuan-dense", ("<｜hy_begin▁of▁sentence｜>",)), NameRule("deepseek-v3")),
    ),
    _one(
        "spark2_5",
        r"\p{N}{1,3}",
        _CJK,
        rf"{_ASCII_MARKS}[A-Za-z]+|{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
        DIGIT,
    ),
    *(_one("deepseek-llm", *_DEEPSEEK_LLM, number) for number in (DIGIT, DIGITS)),
    *(_one("deepseek-coder", *_DEEPSEEK_CODER, number) for number in (DIGIT, DIGITS)),
    _one("falcon", PUNCTUATION, BYTE_LEVEL, DIGITS, "[0-9][0-9][0-9]"),
    PreStructure(
        (_GPT4O,),
        (
            NameRule("llama4", ("<|begin_of_text|>", "<|header_start|>")),
            NameRule("minimax-m2", ("]~b]",)),
            NameRule("gpt-4o"),
        ),
    ),
    _one("tekken", f"{_CASED % ('', '')}|\\p{{N}}|{_CASED_TAIL}"),
    _one("tiny_aya", r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O),
    _one(
        "qwen35",
        rf"{_CUT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    _one("ufakzeka", rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"),
    _one(
        "jais-2",
        rf"{_CUT}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|\s{{512}}(?!\S)|\s{{256}}(?!\S)"
        r"|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
        r"|\s{1,2}(?!\S)|\s",
    ),
    _one(
        "seed-coder",
        rf"{_CUT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    _one("bailingmoe", rf"{_CUT}|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"),
    _one(
        "exaone-moe",
        rf"{_CUT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    _one("minicpm5", r"\p{N}{1,3}", rf"{_CUT}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACES}"),
    _one("laguna", r"[^\n]+|[\n]+", _QWEN2),
    _one("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    _one("kimi-k2", r"[\p{Han}]+|…"),
    PreStructure((_BLOOM,), (NameRule("poro-chat", ("<|im_start|>",)), NameRule("bloom"))),
    _one("viking", _BLOOM, DIGIT),
    _one(
        "chameleon",
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        DIGIT,
        PUNCTUATION,
        BYTE_LEVEL,
    ),
)

#: Every name llama.cpp knows for byte-level BPE, for ``--pre`` and for suggestions.
NAMES = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r
dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4
f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish
granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan hunyuan-dense
hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez
mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral
poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open
spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking whitespace
youtu
"""

#: The pre-tokenizer of tokenizers that come as ``vocab.json`` and ``merges.txt`` only, by class.
CLASS_NAMES = {
    "GPT2Tokenizer": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "CodeGenTokenizer": "phi-2",
    "RobertaTokenizer": "roberta-bpe",
}
