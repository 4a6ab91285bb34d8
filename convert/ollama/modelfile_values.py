"""What a Modelfile says, as values; and such values as a Modelfile.

Source: the client of Ollama: which instructions repeat, which the last one wins, and the parser's
quirk that PARAMETER shares its name with instructions (``PARAMETER model x`` acts as FROM).
``emit`` writes only what reads back to the same values, and proves it by reading it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import ConfigError, FormatError
from .modelfile import ROLES, Command, parse, quoted
from .parameters import (
    DEPRECATED,
    ParameterValue,
    check_parameters,
    format_parameter,
    parse_parameter,
)

_SINGLE = ("template", "system", "adapter", "draft", "renderer", "parser", "requires")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelfile:
    """A model as Ollama is told of it.

    Attributes:
        models: paths or model names of FROM; a second one is a projector.
        template: Go template of the prompt; None keeps the model's own chat template.
        system: default system message.
        licenses: licence texts.
        parameters: typed values by name.
        messages: (role, content) of a conversation to begin with.
        adapter, draft, renderer, parser, requires: as the instructions of the same names.
    """

    models: tuple[str, ...]
    template: str | None = None
    system: str | None = None
    licenses: tuple[str, ...] = ()
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    adapter: str | None = None
    draft: str | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None


def interpret(commands: Sequence[Command], path: str = "Modelfile") -> Modelfile:
    """Return what the commands say together.

    Raises:
        FormatError: an unknown parameter, or a value that is not of its type.
    """
    single: dict[str, str] = {}
    models: list[str] = []
    licenses: list[str] = []
    messages: list[tuple[str, str]] = []
    parameters: dict[str, ParameterValue] = {}
    for command in commands:
        name, value = command.name, command.value
        if name == "model":
            models.append(value)
        elif name == "license":
            licenses.append(value)
        elif name == "message":
            role, _, content = value.partition(": ")
            messages.append((role, content))
        elif name in _SINGLE:
            single[name] = value
        elif name not in DEPRECATED:
            _add(parameters, command, path)
    return Modelfile(
        models=tuple(models),
        licenses=tuple(licenses),
        messages=tuple(messages),
        parameters=parameters,
        **single,
    )


def _add(parameters: dict[str, ParameterValue], command: Command, path: str) -> None:
    try:
        value = parse_parameter(command.name, command.value)
    except ConfigError as error:
        raise FormatError(f"{path}:{command.line}: {error}") from None
    before = parameters.get(command.name)
    if isinstance(value, tuple) and isinstance(before, tuple):
        value = before + value
    parameters[command.name] = value


def emit(modelfile: Modelfile, comments: Sequence[str] = ()) -> str:
    """Return the text of a Modelfile.

    Args:
        modelfile: what it says.
        comments: lines to begin with, without ``#``.

    Raises:
        ConfigError: no FROM, an illegal parameter or role, or a text that the grammar cannot carry.
    """
    if not modelfile.models:
        raise ConfigError("a Modelfile needs a model: FROM ./model.gguf")
    check_parameters(modelfile.parameters)
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    lines += [f"FROM {quoted(model, 'FROM')}" for model in modelfile.models]
    for name in _SINGLE:
        value = getattr(modelfile, name)
        if value is not None:
            lines.append(f"{name.upper()} {_in_quotes(value, name.upper())}")
    lines += list(_parameter_lines(modelfile.parameters))
    for role, content in modelfile.messages:
        if role not in ROLES:
            raise ConfigError(f"MESSAGE: role {role!r} is not one of {', '.join(ROLES)}")
        lines.append(f"MESSAGE {role} {_in_quotes(content, 'MESSAGE')}")
    lines += [f"LICENSE {_in_quotes(text, 'LICENSE')}" for text in modelfile.licenses]
    text = "\n".join(lines) + "\n"
    assert interpret(parse(text)) == modelfile, "the emitted Modelfile reads back differently"
    return text


def _parameter_lines(parameters: Mapping[str, ParameterValue]) -> list[str]:
    lines = []
    for name, value in sorted(parameters.items()):
        if isinstance(value, tuple):
            lines += [f"PARAMETER {name} {_in_quotes(text, 'PARAMETER stop')}" for text in value]
        else:
            lines.append(f"PARAMETER {name} {format_parameter(value)}")
    return lines


def _in_quotes(text: str, instruction: str) -> str:
    """Return a text in quotes where that is possible: blanks at its ends stay visible."""
    form = quoted(text, instruction)
    return form if form.startswith('"') or '"' in text else f'"{text}"'
