"""Small Hugging Face models and tokenizers for the conversion tests and benchmarks.

Tokenizers are rebuilt as ``tokenizer.json`` from the vocabulary GGUFs of the test data; their
splitting regexes are those of the original models, written here independently of mconv's table.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mconv.convert.gguf import open_gguf

CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
DEEPSEEK_LETTERS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷ"
    "ᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-"
    "ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
REGEXES = {
    "llama-bpe": [
        CUT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        CUT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "deepseek-llm": [
        "[\r\n]",
        DEEPSEEK_LETTERS,
        "\\s?[!-/:-~！-／：-～‘-‟　-。]+",
        "\\s+$",
        "[一-龥ࠀ-一가-퟿]+",
    ],
}
#: bos and eos of the vocabularies.
ENDS = {
    "llama-bpe": ("<|begin_of_text|>", "<|end_of_text|>"),
    "qwen2": (None, "<|endoftext|>"),
    "gpt-2": ("<|endoftext|>", "<|endoftext|>"),
    "starcoder": ("<|endoftext|>", "<|endoftext|>"),
    "deepseek-llm": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
DIGITS = {"type": "Digits", "individual_digits": True}


def pre_tokenizer(name: str) -> dict[str, Any]:
    """Return the ``pre_tokenizer`` object of the original tokenizer.json."""
    bytes_only = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": name not in REGEXES,
    }
    if name == "gpt-2":
        return bytes_only
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
        for r in REGEXES.get(name, [])
    ]
    if name in ("starcoder", "deepseek-llm"):
        steps.append(DIGITS)
    return {"type": "Sequence", "pretokenizers": [*steps, bytes_only]}


def bpe_document(path: Path, keep: int | None = None) -> dict[str, Any]:
    """Return a ``tokenizer.json`` rebuilt from a vocabulary GGUF.

    Args:
        path: the GGUF.
        keep: number of ordinary tokens to keep (ids are renumbered); None: all.
    """
    source = open_gguf(path)
    tokens = list(source["tokenizer.ggml.tokens"])
    types = source["tokenizer.ggml.token_type"].tolist()
    plain = [t for t, kind in zip(tokens, types, strict=True) if kind == 1][:keep]
    extra = [(t, kind) for t, kind in zip(tokens, types, strict=True) if kind in (3, 4)]
    if keep is None:
        ids = {t: i for i, t in enumerate(tokens)}
    else:
        extra = extra[:8]
        ids = {t: i for i, t in enumerate([*plain, *(t for t, _ in extra)])}
    known, last = set(plain), max(ids[t] for t in plain)
    merges = [m for m in source["tokenizer.ggml.merges"] if m.replace(" ", "") in known]
    name = source["tokenizer.ggml.pre"]
    specials = [
        {
            "id": ids[t],
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": kind == 4,
            "special": kind == 3,
        }
        for t, kind in extra
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": name == "llama-bpe",
        # as in the originals: only tokens after the last ordinary one are outside the model
        "vocab": {t: i for t, i in ids.items() if i <= last},
        "merges": merges,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(specials, key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": pre_tokenizer(name),
        "post_processor": post_processor(name, ids, byte_level),
        "decoder": {**byte_level, "use_regex": True},
        "model": model,
    }


def post_processor(name: str, ids: dict[str, int], byte_level: dict[str, Any]) -> dict[str, Any]:
    """Return a template that puts bos in front where the original model has one."""
    if name not in ("llama-bpe", "deepseek-llm"):
        return byte_level
    bos = ENDS[name][0]
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def save_bpe(vocab: Path, folder: Path, keep: int | None = None) -> int:
    """Write a BPE tokenizer folder; return the number of tokens."""
    document = bpe_document(vocab, keep)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    bos, eos = ENDS[open_gguf(vocab)["tokenizer.ggml.pre"]]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ids = [*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])]
    return max(ids) + 1


def save_spm(model: Path, folder: Path) -> int:
    """Write Llama 2's SentencePiece tokenizer folder; return the number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {
            str(i): {**token, "content": text, "special": True}
            for i, text in enumerate(("<unk>", "<s>", "</s>"))
        },
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return 32000


def save_spm_json(model: Path, folder: Path) -> int:
    """Write Llama 2's tokenizer as ``tokenizer.json`` alone; return the number of tokens."""
    size = save_spm(model, folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(spm_document(model)), encoding="utf-8")
    return size


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
#: Name to (configuration class, changes, dtype).
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "float32"),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}, "bfloat16"),
    "llama-tied-biased": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "float16",
    ),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "float32",
    ),
    "mistral": ("Mistral", {"sliding_window": None, "rope_theta": 1e6}, "bfloat16"),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, "bfloat16"),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN_ROPE}, "float32"),
    "qwen3": ("Qwen3", {"head_dim": 32}, "bfloat16"),
    "odd": ("Llama", {"intermediate_size": 100, "hidden_size": 72}, "float32"),
}


def save_model(name: str, folder: Path, vocab_size: int, **changes: Any) -> Any:
    """Make a random model with transformers, save it, return it (on the CPU, in eval mode)."""
    import torch
    import transformers

    family, extra, dtype = MODELS[name]
    settings = {**SIZES, "vocab_size": vocab_size, **extra, **changes}
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for weight in model.parameters():  # norms and biases are constant at birth
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def spm_document(model: Path) -> dict[str, Any]:
    """Return a SentencePiece BPE model as the ``tokenizer.json`` that transformers 4 made."""
    from sentencepiece import SentencePieceProcessor

    spm = SentencePieceProcessor(model_file=str(model))
    pieces = [spm.IdToPiece(i) for i in range(spm.vocab_size())]
    known = set(pieces)
    merges = [
        (-spm.GetScore(i), [piece[:cut], piece[cut:]])
        for i, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True, **token} for i in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [pair for _, pair in sorted(merges, key=lambda item: item[0])],
        },
    }


def vectors(vocab: Path) -> list[tuple[str, list[int]]]:
    """Return the test strings beside a vocabulary GGUF and the ids of the original tokenizer."""
    texts = Path(f"{vocab}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = Path(f"{vocab}.out").read_text().splitlines()
    return [(text, [int(n) for n in line.split()]) for text, line in zip(texts, ids, strict=False)]
