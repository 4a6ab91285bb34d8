"""Small tokenizer folders of the kinds beside byte-level BPE and Llama's SentencePiece.

Each also has the ``config.json`` of a model of its kind, so that llama.cpp's own converter can
write its vocabulary (``tests/fixtures/make_tokenizer_digests.py``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mconv.convert.gguf import open_gguf
from mconv.convert.tokenizers import TokenizerRule
from mconv.convert.tokenizers.bpe import byte_letters
from mconv.convert.tokenizers.spm_proto import BPE, UNIGRAM, SpmSettings, write_model

ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 130,
    "layer_norm_eps": 1e-12,
}
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def added(index: int, text: str, *, special: bool = True) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, "special": special, **plain}


def bert_words(data: Path) -> list[str]:
    """Return BERT's vocabulary from llama.cpp's, which marks what begins a word instead."""
    source = open_gguf(data / "vocab" / "ggml-vocab-bert-bge.gguf")
    types = source["tokenizer.ggml.token_type"].tolist()
    out = []
    for text, kind in zip(source["tokenizer.ggml.tokens"], types, strict=True):
        if kind == 3 or text.startswith("[unused"):
            out.append(text)
        else:
            out.append(text[1:] if text.startswith("\u2581") else f"##{text}")
    return out


def _bert_config(size: int) -> dict[str, Any]:
    kind = {"architectures": ["BertModel"], "model_type": "bert"}
    return {**kind, **ENCODER, "vocab_size": size, "type_vocab_size": 2, "pad_token_id": 0}


def save_bert_txt(folder: Path, data: Path) -> None:
    words = bert_words(data)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    write(folder / "config.json", _bert_config(len(words)))


def save_bert(folder: Path, data: Path) -> None:
    words = bert_words(data)
    ids = {text: words.index(text) for text in SPECIALS}
    single = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    second = [
        {"Sequence": {"id": "B", "type_id": 1}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
    ]
    document = {
        "version": "1.0",
        "added_tokens": sorted((added(n, t) for t, n in ids.items()), key=lambda t: t["id"]),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": [*single, *second],
            "special_tokens": {
                t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {t: n for n, t in enumerate(words)},
        },
    }  # fmt: skip
    write(folder / "tokenizer.json", document)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = {"tokenizer_class": "BertTokenizer", **dict(zip(names, SPECIALS, strict=True))}
    write(folder / "tokenizer_config.json", settings)
    write(folder / "config.json", _bert_config(len(words)))


def unigram_pieces(head: tuple[tuple[str, int], ...], count: int) -> list[tuple[str, float, int]]:
    """Return pieces with falling scores; ``head``: texts and types of the first ones."""
    letters = [
        "\u2581" * (k % 2) + chr(97 + k % 26) + "abc"[k % 3] * (k // 26) for k in range(count)
    ]
    scores = [-1.5 - 0.25 * k for k in range(len(head) + count)]
    plain = [(text, 1) for text in dict.fromkeys(letters)]
    return [
        (t, s if k == 1 else 0.0, k) for (t, k), s in zip([*head, *plain], scores, strict=False)
    ]


def save_t5(folder: Path, data: Path) -> None:
    head = (("<pad>", 3), ("</s>", 3), ("<unk>", 2))
    raw = write_model(
        unigram_pieces(head, 200), SpmSettings(UNIGRAM), {"pad": 0, "eos": 1, "unk": 2}
    )
    (folder / "spiece.model").write_bytes(raw)
    write(folder / "added_tokens.json", {"<extra_id_0>": 219, "<x>": 215})
    write(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    config = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 220,
        "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1,
        "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        "n_positions": 128, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32,
        "is_encoder_decoder": True,
    }  # fmt: skip
    write(folder / "config.json", config)


def _xlmr_config(size: int) -> dict[str, Any]:
    kind = {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {**kind, **ENCODER, **ids, "vocab_size": size, "type_vocab_size": 1}


def save_xlmr(folder: Path, data: Path) -> None:
    head = (("<unk>", 2), ("<s>", 3), ("</s>", 3))
    pieces = unigram_pieces(head, 200)
    raw = write_model(
        pieces, SpmSettings(UNIGRAM, remove_spaces=False), {"unk": 0, "bos": 1, "eos": 2}
    )
    (folder / "sentencepiece.bpe.model").write_bytes(raw)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    write(folder / "config.json", _xlmr_config(len(pieces)))


def save_tekken(folder: Path, data: Path) -> None:
    source = open_gguf(data / "vocab" / "ggml-vocab-llama-bpe.gguf")
    letters, ranked = byte_letters(), [bytes([n]) for n in range(256)]
    seen = set(ranked)
    for merge in source["tokenizer.ggml.merges"][:3000]:
        piece = bytes(letters[c] for c in merge.replace(" ", ""))
        if piece not in seen:
            seen.add(piece)
            ranked.append(piece)
    size = 1000 + 30
    config = {
        "pattern": TEKKEN_PATTERN, "num_vocab_tokens": len(ranked), "default_vocab_size": size,
        "default_num_special_tokens": 30, "version": "v3",
    }  # fmt: skip
    vocab = [
        {"rank": n, "token_bytes": base64.b64encode(b).decode(), "token_str": None}
        for n, b in enumerate(ranked)
    ]
    write(folder / "tekken.json", {"config": config, "vocab": vocab})
    model = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": size,
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    }  # fmt: skip
    write(folder / "config.json", model)


def save_t5_bpe(folder: Path, data: Path) -> None:
    save_t5(folder, data)
    head = (("<pad>", 3), ("</s>", 3), ("<unk>", 2))
    raw = write_model(unigram_pieces(head, 200), SpmSettings(BPE), {"pad": 0, "eos": 1, "unk": 2})
    (folder / "spiece.model").unlink()
    (folder / "tokenizer.model").write_bytes(raw)


#: Name to how its folder is written and how it is read.
KINDS: Mapping[str, tuple[Callable[[Path, Path], None], TokenizerRule]] = {
    "bert": (save_bert, TokenizerRule(("wordpiece",), token_types=True)),
    "bert-txt": (save_bert_txt, TokenizerRule(("wordpiece",), token_types=True)),
    "t5": (save_t5, TokenizerRule(("unigram", "spm"))),
    "t5-bpe": (save_t5_bpe, TokenizerRule(("unigram", "spm"))),
    "xlmr": (save_xlmr, TokenizerRule(("unigram",), token_types=True)),
    "tekken": (save_tekken, TokenizerRule(("tekken", "spm", "bpe"))),
}
