"""What Ollama's side of a conversion needs to know of a model: from a GGUF file, or a checkpoint.

A checkpoint is planned as a GGUF (nothing is written), so both ways read the same metadata; the
files beside it add what GGUF cannot hold: several end-of-generation tokens, the licence's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...shardio import Checkpoint, open_checkpoint
from ...shardio.assets import load_json
from ..gguf import open_gguf
from ..to_gguf import to_gguf
from .parameters import ParameterValue

_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_EOG_ROLES = ("eos", "eot", "eom")
_CONTROL, _USER_DEFINED = 3, 4
_ADDS_BOS_PRE = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"})
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")

#: PARAMETER names to the keys of generation_config.json and of GGUF metadata.
_SAMPLING = {
    "temperature": ("temperature", "general.sampling.temp"),
    "top_p": ("top_p", "general.sampling.top_p"),
    "min_p": ("min_p", "general.sampling.min_p"),
    "typical_p": ("typical_p", ""),
    "top_k": ("top_k", "general.sampling.top_k"),
    "repeat_penalty": ("repetition_penalty", "general.sampling.penalty_repeat"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts of a model.

    Attributes:
        path: the GGUF file or the checkpoint.
        metadata: GGUF metadata, values by key.
        chat_template: the Jinja chat template, if there is one.
        tokens: special tokens by Jinja variable, such as ``bos_token``.
        bos: the text that the tokenizer puts in front of every prompt; empty if none.
        eog: texts of the tokens that end generation.
        specials: texts of all special tokens.
        control: ids of the control tokens, which print as nothing, by text.
        sampling: recommended PARAMETERs.
        license: text, or short name; None if unknown.
    """

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    chat_template: str | None = field(repr=False)
    tokens: Mapping[str, str]
    bos: str
    eog: tuple[str, ...]
    specials: frozenset[str] = field(repr=False)
    control: Mapping[str, int] = field(repr=False)
    sampling: Mapping[str, ParameterValue]
    license: str | None = field(repr=False)

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> Any:
        """Return a value of the architecture, such as ``block_count``; None if absent."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def context_length(self) -> int | None:
        """Tokens the model was trained for."""
        value = self.number("context_length")
        return int(value) if value else None

    def kv_bytes(self, tokens: int) -> int | None:
        """Return the bytes of keys and values of ``tokens`` positions in f16, as an upper bound.

        Sliding windows and recurrent layers need less. None where the metadata does not tell.
        """
        layers, heads = self.number("block_count"), self.number("attention.head_count")
        width = self.number("embedding_length")
        if not layers or not width or heads is None:
            return None
        each = _per_layer(heads, int(layers))
        kv = self.number("attention.head_count_kv")
        kv_heads = _per_layer(heads if kv is None else kv, int(layers))
        size = int(width) // max(max(each), 1)
        key = int(self.number("attention.key_length") or size)
        value = int(self.number("attention.value_length") or size)
        return sum(kv_heads) * (key + value) * 2 * tokens


def _per_layer(value: Any, layers: int) -> list[int]:
    return [int(v) for v in value] if hasattr(value, "__len__") else [int(value)] * layers


def facts_of(path: str | Path, **options: Any) -> ModelFacts:
    """Return the facts of a GGUF file or of any checkpoint.

    Args:
        path: a ``.gguf`` file, or what ``to_gguf`` takes.
        options: of ``to_gguf``, such as ``tokenizer``, and ``adapter``: a PEFT folder to merge.

    Raises:
        MconvError: it cannot be read.
    """
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        if options.get("adapter") is not None:
            raise ConfigError(
                f"{place}: a PEFT adapter can be merged into a checkpoint, not into a GGUF file; "
                "give the checkpoint, or the adapter as GGUF (`mconv to-gguf ADAPTER OUT --lora`)"
            )
        gguf = open_gguf(place)
        return make_facts(place, {key: kv.value for key, kv in gguf.entries.items()})
    source, rest = open_with(place, options)
    report = to_gguf(source, place.with_name("planned.gguf"), dry_run=True, **rest)
    return make_facts(place, {kv.key: kv.value for kv in report.metadata})


def open_with(place: Path, options: Mapping[str, Any]) -> tuple[Checkpoint | Path, dict[str, Any]]:
    """Return the source for ``to_gguf`` and the options that are left for it.

    Raises:
        MconvError: it cannot be opened.
    """
    rest = {key: value for key, value in options.items() if key not in ("adapter", "imatrix")}
    adapter = options.get("adapter")
    if adapter is None:
        return place, rest
    return open_checkpoint(place, config=rest.pop("config", None), adapter=adapter), rest


def make_facts(path: Path, metadata: Mapping[str, Any]) -> ModelFacts:
    """Return facts from GGUF metadata and the files beside a model."""
    folder = path if path.is_dir() else path.parent
    words: Sequence[Any] = metadata.get("tokenizer.ggml.tokens", ())
    types: Iterable[Any] = metadata.get("tokenizer.ggml.token_type", ())
    marked = {
        _text(words[k]): (k, int(kind))
        for k, kind in enumerate(types)
        if int(kind) in (_CONTROL, _USER_DEFINED) and k < len(words)
    }
    generation = _json(folder / "generation_config.json")

    def text(token: Any) -> str:
        known = isinstance(token, int) or hasattr(token, "__index__")
        return _text(words[token]) if known and 0 <= token < len(words) else ""

    ids = {role: metadata.get(f"tokenizer.ggml.{_KEYS.get(role, role)}_token_id")
           for role in (*_ROLES, *_EOG_ROLES)}  # fmt: skip
    listed = generation.get("eos_token_id")
    eog = [ids[role] for role in _EOG_ROLES]
    eog += listed if isinstance(listed, list) else [listed]
    template = metadata.get("tokenizer.chat_template")
    return ModelFacts(
        path=path,
        metadata=metadata,
        chat_template=None if template is None else _text(template),
        tokens={f"{role}_token": text(ids[role]) for role in _ROLES if text(ids[role])},
        bos=text(ids["bos"]) if _adds_bos(metadata) else "",
        eog=tuple(dict.fromkeys(t for t in map(text, eog) if t)),
        specials=frozenset(marked),
        control={text: k for text, (k, kind) in marked.items() if kind == _CONTROL},
        sampling=_sampling(metadata, generation, folder),
        license=_license(folder) or metadata.get("general.license"),
    )


_KEYS = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # as GGUF spells them


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether llama.cpp puts BOS in front: as the file says, else by the kind of tokenizer."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    if metadata.get("tokenizer.ggml.pre") in _ADDS_BOS_PRE:
        return True
    return metadata.get("tokenizer.ggml.model") == "llama"


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    value = load_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _sampling(
    metadata: Mapping[str, Any], generation: Mapping[str, Any], folder: Path
) -> dict[str, ParameterValue]:
    """Return the recommended sampling; generation_config.json wins over GGUF metadata."""
    out: dict[str, ParameterValue] = {}
    for name, (key, gguf_key) in _SAMPLING.items():
        value = generation.get(key)
        if value is None:
            value = metadata.get(gguf_key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{folder / 'generation_config.json'}: {key} is {value!r}, no number")
        out[name] = int(value) if name == "top_k" else _short(float(value))
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    return out


def _short(value: float) -> float:
    """Return the decimal that a 32-bit float of metadata was meant to be."""
    return float(f"{value:.6g}")


def _license(folder: Path) -> str | None:
    for name in _LICENSES:
        path = folder / name
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    return None
