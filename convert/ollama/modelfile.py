"""The Modelfile grammar: text to commands, and values to text that reads back the same.

Source: Ollama's parser, whose behaviour is kept, oddities included: there are no escapes, a quoted
value ends at the first line end where it looks complete, and every character that Go does not call
printable is dropped, even inside quotes. ``quoted`` finds a form that carries a text exactly, or
says why there is none.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import ConfigError, FormatError, did_you_mean

#: All instructions, lower case.
INSTRUCTIONS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser",
    "parameter", "message", "requires",
)  # fmt: skip

ROLES = ("system", "user", "assistant")

_BLANK = " \t"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True, slots=True)
class Command:
    """One instruction.

    Attributes:
        name: lower case; ``model`` for FROM; the parameter's own name for PARAMETER.
        value: unquoted; a message starts with its role and ``": "``.
        line: where it starts, from 1.
        dropped: characters that the parser drops from it, in order.
        parameter: whether it was written as PARAMETER.
        raw: the value as written, quotes included.
    """

    name: str
    value: str
    line: int
    dropped: str = ""
    parameter: bool = False
    raw: str = ""


def decode(data: bytes) -> str:
    """Return a Modelfile's text: UTF-8, or what a byte order mark says; bad bytes become U+FFFD."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return data[len(bom) :].decode(encoding, "replace")
    return data.decode("utf-8", "replace")


def parse(text: str | bytes, path: str = "Modelfile") -> tuple[Command, ...]:
    """Return the commands of a Modelfile.

    Args:
        text: the file.
        path: its name, for messages.

    Raises:
        FormatError: an unknown instruction or role, a missing value, an unterminated quote, or no
            FROM at all.
    """
    source = decode(text) if isinstance(text, bytes) else text
    commands = tuple(_Scanner(source, path).commands())
    if not any(command.name == "model" for command in commands):
        raise FormatError(f"{path}: there is no FROM line: name the model file, FROM ./model.gguf")
    return commands


def printable(char: str) -> bool:
    """Return whether the parser keeps a character: letters, marks, numbers, symbols, space."""
    return char.isprintable()


def unquote(text: str) -> str | None:
    """Return a trimmed value without its quotes; None while a quote is open."""
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text


class _Scanner:
    """Reads one command after the other."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self.at = 0

    def commands(self) -> Iterator[Command]:
        while self._skip():
            yield self._command()

    def _skip(self) -> bool:
        """Go to the next instruction, past blanks and comments; False at the end."""
        text = self.text
        while self.at < len(text):
            if text[self.at] == "#":
                while self.at < len(text) and text[self.at] not in "\r\n":
                    self.at += 1
            elif text[self.at] not in " \t\r\n":
                return True
            else:
                self.at += 1
        return False

    def _command(self) -> Command:
        line, stray = self._line(), ""
        if not printable(self.text[self.at]):  # one such character before an instruction is lost
            stray = self.text[self.at]
            self.at += 1
        word = self._word("the instruction", "")
        name = word.lower()
        if name not in INSTRUCTIONS:
            raise self._fail(
                line, f"unknown instruction {word!r}{did_you_mean(name.upper(), _SHOWN)}; "
                f"the instructions are {', '.join(_SHOWN)}"
            )  # fmt: skip
        prefix, parameter = "", name == "parameter"
        if parameter:
            name = self._word("PARAMETER NAME", "_0123456789")
        elif name == "message":
            role = self._word("MESSAGE ROLE", "")
            if role not in ROLES:
                hint = did_you_mean(role.lower(), ROLES)
                raise self._fail(line, f"message role {role!r} is not one of {ROLES}{hint}")
            prefix = f"{role}: "
        raw, dropped = self._value(line)
        value = unquote(raw)
        assert value is not None
        if name == "from" and not parameter:
            name = "model"
        return Command(name, prefix + value, line, stray + dropped, parameter, raw)

    def _word(self, what: str, extra: str) -> str:
        """Read ASCII letters and ``extra`` up to a blank, which is consumed."""
        start = self.at
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in _BLANK:
                self.at += 1
                return self.text[start : self.at - 1]
            if not (char.isascii() and char.isalpha()) and char not in extra:
                break
            self.at += 1
        word = self.text[start : self.at]
        if self.at < len(self.text) and self.text[self.at] not in "\r\n":
            shown = self.text[start : self.at + 1]
            raise self._fail(
                self._line(), f"{shown!r}: {what} ends with a blank, and a value follows; "
                f"the instructions are {', '.join(_SHOWN)}"
            )  # fmt: skip
        hint = '; an empty value is written ""' if word.upper() in _SHOWN else ""
        close = "" if word.upper() in _SHOWN else did_you_mean(word.upper(), _SHOWN)
        raise self._fail(self._line(), f"{word}: a value is missing on this line{hint}{close}")

    def _value(self, line: int) -> tuple[str, str]:
        """Read a value to the line end where its quotes are closed; (trimmed text, dropped)."""
        kept: list[str] = []
        dropped: list[str] = []
        text = self.text
        while self.at < len(text):
            char = text[self.at]
            self.at += 1
            if char in "\r\n":
                value = "".join(kept).strip()
                if unquote(value) is not None:
                    return value, "".join(dropped)
                kept.append(char)
            elif char in _BLANK or printable(char):
                kept.append(char)
            else:
                dropped.append(char)
        value = "".join(kept).strip()
        if unquote(value) is None:
            quote = '"""' if value.startswith('"""') else '"'
            raise self._fail(
                line, f"unexpected end of file: the value that starts here with {quote} is not "
                f"closed by {quote} at a line end"
            )  # fmt: skip
        return value, "".join(dropped)

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _fail(self, line: int, why: str) -> FormatError:
        return FormatError(f"{self.path}:{line}: {why}")


_SHOWN = tuple(name.upper() for name in INSTRUCTIONS)


def quoted(text: str, instruction: str = "SYSTEM") -> str:
    """Return ``text`` bare or in quotes, so that the parser gives back exactly ``text``.

    Args:
        text: the value.
        instruction: what it follows, for messages.

    Raises:
        ConfigError: no form carries the text; it says which characters or lines are why.
    """
    single, triple = f'"{text}"', f'"""{text}"""'
    forms = (triple, single) if "\n" in text else (text, single, triple) if text else (single,)
    for form in forms:
        if _carries(form, text):
            return form
    raise ConfigError(f"{instruction}: {_why_not(text)}")


def _carries(form: str, text: str) -> bool:
    source = f"SYSTEM {form}\nFROM x\n"
    try:
        commands = parse(source)
    except FormatError:
        return False
    return len(commands) == 2 and commands[0].value == text and commands[1].value == "x"


def _why_not(text: str) -> str:
    lost = sorted({c for c in text if c not in "\t\r\n" and not printable(c)})
    if lost:
        names = ", ".join(f"U+{ord(c):04X} {unicodedata.name(c, '')}".strip() for c in lost[:5])
        why = f"the Modelfile parser drops {names}"
    else:
        ends = [n for n, line in enumerate(text.split("\n"), 1) if line.rstrip().endswith('"""')]
        where = f"line {ends[0]} of it" if ends else "a line of it"
        why = f"{where} ends like a closing quote, and the grammar has no escapes"
    return (
        f"a Modelfile cannot carry this text: {why}; `mconv ollama install` carries it exactly, or "
        "change the text"
    )
