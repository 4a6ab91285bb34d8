"""Match a checkpoint's tensors with an architecture's table, and report all that does not fit.

Every missing, unknown and mis-shaped tensor is collected first and told at once, before any byte
of a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ...errors import ConfigError, counted, did_you_mean
from ...shardio.dequant import Coded
from ...shardio.tensor import LazyTensor
from ..gguf.tensors import BlockTensor
from ._config import layer_count
from ._lines import Line, table_lines
from ._record import Architecture, Config, dimensions
from ._transforms import TRANSFORMS

#: Buffers that some checkpoints carry and nobody needs.
_BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
#: The parts of composite models that are no text model.
_OTHER_PARTS = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|audio_tower|embed_vision|embed_audio"
    r"|multi_modal_projector)\."
)
_STACKS = {"{e}": "stack", "{a}": "stack_others"}
_HEADS = ("lm_head.", "embed_out.")
_SHOWN = 12
_HINTED = 40


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor of the output.

    Attributes:
        name: its GGUF name.
        hf: where it came from.
        tensor: its (lazy) values.
        keep_f32: stored as F32 whatever type is asked for.
        stored: the blocks it comes in, which are taken as they are; None for plain values.
        coded: the quantized weights it is made of, if it is made of their whole rows.
        move: what was done to these rows, for their blocks.
    """

    name: str
    hf: str
    tensor: LazyTensor
    keep_f32: bool
    stored: BlockTensor | None = None
    coded: tuple[Coded, ...] = ()
    move: Callable[[Sequence[LazyTensor]], LazyTensor] | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """What a table makes of a checkpoint.

    Attributes:
        lines: the lines that apply, in the order of the output.
        tensors: the checkpoint's tensors by their names in the table.
        problems: everything that does not fit, one line each.
        ignored: names that GGUF has no place for.
    """

    lines: tuple[Line, ...]
    tensors: Mapping[str, LazyTensor]
    problems: tuple[str, ...]
    ignored: tuple[str, ...]


def map_tensors(
    architecture: Architecture,
    config: Config,
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
) -> list[MappedTensor]:
    """Return the output's tensors, in the order of their Hugging Face names.

    Args:
        architecture: the model family.
        config: its completed configuration.
        weights: tensors by Hugging Face name.
        tied: names that are other names for a tensor in ``weights``.

    Raises:
        ConfigError: tensors are missing, unknown or of another shape than the configuration says;
            the message lists them.
    """
    match = match_tensors(architecture, config, weights, tied)
    if match.problems:
        shown = "\n".join(f"  {line}" for line in match.problems[:_SHOWN])
        rest = len(match.problems) - _SHOWN
        more = f"\n  ... and {rest} more (`mconv check` lists them)" if rest > 0 else ""
        raise ConfigError(
            f"{counted(len(match.problems), 'tensor does', 'tensors do')} "
            f"not fit {architecture.name} as config.json "
            f"describes it:\n{shown}{more}\nCheck that config.json belongs to this checkpoint and "
            "that no shard is missing"
        )
    return mapped_tensors(architecture, config, match)


def match_tensors(
    architecture: Architecture,
    config: Config,
    weights: Mapping[str, LazyTensor],
    tied: Mapping[str, str],
) -> Match:
    """Find what each line of the table applies to; see ``map_tensors``."""
    bare = _is_bare(architecture, config, weights)
    named = {_table_name(architecture, config, n, bare): t for n, t in weights.items()}
    aliases = {_table_name(architecture, config, n, bare) for n in tied}
    is_tied = bool(config.get("tie_word_embeddings")) or "lm_head.weight" in aliases
    headless = _class(config) in architecture.headless
    ignored = {n for n in named if _is_ignored(architecture, config, n, tied=is_tied)}
    found = {n: t for n, t in named.items() if n not in ignored}
    lines = table_lines(architecture, config, tied=headless or is_tied)
    chosen = _choose(lines, found.keys() | aliases)
    problems = _missing(chosen, found, aliases) + _unknown(lines, chosen, found)
    problems += _shapes(chosen, found)
    there = tuple(line for line in chosen if line.sources[0] in found)
    return Match(there, found, tuple(problems), tuple(sorted(ignored)))


def mapped_tensors(architecture: Architecture, config: Config, match: Match) -> list[MappedTensor]:
    """Apply the transforms of a match without problems."""
    sizes = dimensions(architecture, config)
    out = []
    for line in match.lines:
        parts = [match.tensors[name] for name in line.sources]
        how = line.rule.transform or stacking(line.rule.hf)
        try:
            made = TRANSFORMS[how].apply(parts, sizes)
        except ValueError as error:
            raise ConfigError(f"tensor {line.title}: {error}") from error
        coded = _coded(parts) if TRANSFORMS[how].moves_rows else ()
        for k, (name, tensor) in enumerate(zip(line.outputs, made, strict=True)):
            blocks = tensor if isinstance(tensor, BlockTensor) else None
            move = partial(_moved, how, sizes, k) if coded else None
            out.append(
                MappedTensor(name, line.title, tensor, line.rule.keep_f32, blocks, coded, move)
            )
    return out


def _coded(parts: Sequence[LazyTensor]) -> tuple[Coded, ...]:
    """The parts, if all of them are quantized."""
    coded = tuple(part for part in parts if isinstance(part, Coded))
    return coded if len(coded) == len(parts) else ()


def _moved(how: str, sizes: Mapping[str, int], k: int, parts: Sequence[LazyTensor]) -> LazyTensor:
    transform = TRANSFORMS[how]
    return parts[k] if transform.changes_values else transform.apply(parts, sizes)[k]


def stacking(hf: str) -> str:
    """Return the transform of a rule whose name stands for several tensors; empty: for one."""
    return next((how for mark, how in _STACKS.items() if mark in hf), "")


def _class(config: Config) -> str:
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""


def _is_bare(architecture: Architecture, config: Config, names: Iterable[str]) -> bool:
    """Whether the tensors come without the prefix of the model inside the model."""
    if _class(config) in architecture.headless:
        return True
    return not any(architecture.prefix in name for name in names)


def _table_name(architecture: Architecture, config: Config, name: str, bare: bool) -> str:
    if _class(config) in architecture.composite:
        name = name.replace("language_model.", "")
    return architecture.prefix + name if bare and not name.startswith(_HEADS) else name


def _is_ignored(architecture: Architecture, config: Config, name: str, *, tied: bool) -> bool:
    if name.endswith(_BUFFERS):
        return True
    if architecture.ignored and re.search(architecture.ignored, name):
        return True
    if _class(config) in architecture.composite and _OTHER_PARTS.search(name):
        return True
    if architecture.drop_tied_head and tied and name == "lm_head.weight":
        return True
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return bool(architecture.drop_extra_layers and layer and int(layer[1]) >= layer_count(config))


def _choose(lines: list[Line], names: Iterable[str]) -> list[Line]:
    """Leave out the alternatives that do not apply: of those for an output, the one that is there.

    When none is, the first stays, for what to call missing.
    """
    there = set(names)
    by_output: dict[str, list[Line]] = {}
    for line in lines:
        for output in line.outputs:
            by_output.setdefault(output, []).append(line)
    chosen: set[int] = set()
    for options in by_output.values():
        present = [o for o in options if any(name in there for name in o.sources)]
        chosen.add(id(min(present or options, key=lambda o: o.order[1])))
    return [line for line in lines if id(line) in chosen]


def _missing(chosen: list[Line], found: Mapping[str, LazyTensor], aliases: set[str]) -> list[str]:
    lines = []
    for line in chosen:
        absent = [n for n in line.sources if n not in found and n not in aliases]
        if len(absent) == len(line.sources) > 1 and line.required:
            lines.append(f"missing: {line.title} ({counted(len(absent), 'tensor')})")
        elif line.required or len(absent) < len(line.sources):
            lines += [f"missing: {name}" for name in absent]
    return lines


def _unknown(lines: list[Line], chosen: list[Line], found: Mapping[str, LazyTensor]) -> list[str]:
    used = {name for line in chosen for name in line.sources}
    known = {name for line in lines for name in line.sources}
    spare = {name for line in lines if line.rule.optional for name in line.sources}
    out: list[str] = []
    for name in found:
        if name in used or name in spare:
            continue
        deeper = re.sub(r"\.\d+\.", ".0.", name, count=1)
        if name in known:
            hint = " (the layer has it in another form too)"
        elif name != deeper and deeper in known:
            hint = " (beyond the last layer)"
        elif len(out) < _HINTED:
            numbers = re.findall(r"\d+", name)
            hint = did_you_mean(name, [k for k in known if re.findall(r"\d+", k) == numbers])
        else:
            hint = ""
        out.append(f"unknown: {name}{hint}")
    return out


def _shapes(chosen: list[Line], found: Mapping[str, LazyTensor]) -> list[str]:
    lines = []
    for line in chosen:
        for name in line.sources:
            tensor, want = found.get(name), line.shape
            if tensor is None or want is None or tensor.shape == want:
                continue
            text = f"shape: {name} is {list(tensor.shape)}, expected {list(want)}"
            if line.outputs[0] in ("token_embd.weight", "output.weight"):
                text += _rows_hint(tensor.shape[0], want[0])
            lines.append(text)
    return lines


def _rows_hint(rows: int, vocab: int) -> str:
    if rows > vocab:
        return (
            f": {rows - vocab} rows more than vocab_size; if they are padding, trim them with "
            f"--vocab-size {vocab}, if tokens were added, correct vocab_size in config.json, or "
            "let --vocab-fix pad (or trim) bring rows and tokens together"
        )
    return (
        ": fewer rows than vocab_size; config.json or the tokenizer belongs to another model, or "
        "the embedding was not resized: --vocab-fix pad adds rows of zeros, trim drops tokens"
    )
