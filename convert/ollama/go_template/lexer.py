"""Cut a Go template into texts and tokens.

Source: the documentation of Go's ``text/template``: ``{{`` ... ``}}`` hold actions, ``{{- `` and
`` -}}`` trim white space of the text around them, comments are ``{{/* */}}``. Blanks matter inside
actions (``$x.A`` is a field of $x, ``$x .A`` are two words), so they are tokens too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ....errors import FormatError

_SPACE = " \t\r\n"
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    |(?P<declare>:=)
    |(?P<assign>=)
    |(?P<bar>\|)
    |(?P<comma>,)
    |(?P<open>\()
    |(?P<close>\))
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<raw>`[^`]*`)
    |(?P<char>'(?:[^'\\\n]|\\.[^'\n]*)')
    |(?P<number>[+-]?(?:0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+
        |(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)(?![\w.]))
    |(?P<field>\.[^\W\d]\w*)
    |(?P<variable>\$\w*)
    |(?P<word>[^\W\d]\w*)
    |(?P<dot>\.(?=[\s|,():=}-]|$))""",
    re.VERBOSE,
)
_MUST_END = frozenset({"number", "field", "variable", "word", "char"})
_TERMINATORS = " \t\r\n.,|:()=}"


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the template: ``text``, ``left``, ``right``, or a token of an action."""

    kind: str
    text: str
    line: int


def tokens(source: str, name: str) -> Iterator[Token]:
    """Yield the tokens of a template: texts (trimmed), ``left``, words..., ``right``.

    Args:
        source: the template.
        name: for messages.

    Raises:
        FormatError: an action or comment that is not closed, or a character that is no token.
    """
    at, trim = 0, False
    while at <= len(source):
        left = source.find("{{", at)
        text = source[at:] if left < 0 else source[at:left]
        line = _line(source, at)
        if trim:
            text = text.lstrip(_SPACE)
        if left < 0:
            if text:
                yield Token("text", text, line)
            return
        at = left + 2
        if source[at : at + 1] == "-" and source[at + 1 : at + 2] in tuple(_SPACE):
            text = text.rstrip(_SPACE)
            at += 2
        if text:
            yield Token("text", text, line)
        comment = re.compile(r"[ \t\r\n]*/\*" if source[at - 1] in _SPACE else r"/\*")
        if comment.match(source, at):
            at, trim = _comment(source, at, name)
            continue
        yield Token("left", "{{", _line(source, left))
        inside = _Inside(source, at, name)
        yield from inside.tokens()
        yield Token("right", "}}", _line(source, inside.at))
        at, trim = inside.at, inside.trim


def _line(source: str, at: int) -> int:
    return source.count("\n", 0, at) + 1


def _comment(source: str, at: int, name: str) -> tuple[int, bool]:
    end = source.find("*/", source.index("/*", at) + 2)
    if end < 0:
        raise FormatError(f"{name}:{_line(source, at)}: unclosed comment")
    end += 2
    if source.startswith("}}", end):
        return end + 2, False
    close = re.compile(r"[ \t\r\n]-}}").match(source, end)
    if close is None:
        raise FormatError(f"{name}:{_line(source, at)}: comment ends before closing delimiter")
    return close.end(), True


class _Inside:
    """The tokens of one action; afterwards ``at`` is behind it."""

    def __init__(self, source: str, at: int, name: str) -> None:
        self.source, self.at, self.name = source, at, name
        self.trim = False

    def tokens(self) -> Iterator[Token]:
        source, depth = self.source, 0
        while True:
            if self._closed():
                if depth:
                    raise self._fail("unclosed left paren")
                return
            match = _TOKEN.match(source, self.at)
            if match is None or match.lastgroup is None:
                if self.at >= len(source):
                    raise self._fail("unclosed action")
                raise self._fail(f"unexpected {source[self.at]!r} in an action")
            kind, text, line = match.lastgroup, match.group(), _line(source, self.at)
            if kind == "space" and source.startswith("-}}", match.end()):
                text = text[:-1]  # the last blank belongs to the trim marker
                self.at = match.end() - 1
            else:
                self.at = match.end()
            self._check_end(kind, text)
            depth += (kind == "open") - (kind == "close")
            if depth < 0:
                raise self._fail("unexpected right paren")
            if text:
                yield Token(kind, text, line)

    def _closed(self) -> bool:
        if self.source.startswith("}}", self.at):
            self.at += 2
            return True
        if self.source[self.at : self.at + 1] in tuple(_SPACE) and self.source.startswith(
            "-}}", self.at + 1
        ):
            self.at += 4
            self.trim = True
            return True
        return False

    def _check_end(self, kind: str, text: str) -> None:
        after = self.source[self.at : self.at + 1]
        if kind in _MUST_END and after and after not in _TERMINATORS:
            raise self._fail(f"unexpected {after!r} after {text!r}")

    def _fail(self, why: str) -> FormatError:
        return FormatError(f"{self.name}:{_line(self.source, self.at)}: {why}")
