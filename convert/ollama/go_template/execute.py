"""Run a parsed Go template over data.

Source: the documentation of Go's ``text/template``, sections "Actions", "Pipelines" and
    "Variables".
A map key that does not exist is ``<no value>``; a struct field that does not exist is an error.
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .functions import NAMES, SHORT_CIRCUIT, builtins
from .nodes import (
    Action,
    Branch,
    Call,
    Chain,
    Command,
    Constant,
    Dot,
    Field,
    Function,
    Jump,
    Nil,
    Node,
    Operand,
    Pipeline,
    Text,
    Variable,
)
from .parser import MAIN, Parser
from .values import MISSING, GoTemplateError, Struct, Value, show, truth

_DEPTH = 200


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template and those it defines.

    Attributes:
        name: for messages.
        trees: nodes by template name.
    """

    name: str
    trees: Mapping[str, tuple[Node, ...]]

    def render(self, data: Value, today: datetime.date | None = None) -> str:
        """Return the text that the template makes of ``data``.

        Args:
            data: a dict for ``.``.
            today: what ``currentDate`` says, by default the current day.

        Raises:
            GoTemplateError: as Go fails: unknown fields, wrong types, bad indexes.
        """
        run = _Run(self, builtins(today or datetime.date.today()))
        run.template(MAIN, data, 0)
        return "".join(run.out)


def parse_template(text: str, name: str = "TEMPLATE") -> Template:
    """Parse a Go template.

    Raises:
        FormatError: with the line.
    """
    return Template(name, Parser(text, name, NAMES).parse())


class _Break(Exception):  # noqa: N818 - control flow, not an error
    pass


class _Continue(Exception):  # noqa: N818
    pass


class _Run:
    """One rendering: the output so far and the variables in scope."""

    def __init__(self, template: Template, functions: Mapping[str, Callable[..., Value]]) -> None:
        self.trees, self.name = template.trees, template.name
        self.functions = functions
        self.out: list[str] = []
        self.scope: list[tuple[str, Value]] = []
        self.depth = 0
        self.line = 0

    def template(self, name: str, data: Value, line: int) -> None:
        if name not in self.trees:
            raise self._fail(line, f"template {name!r} not defined")
        if self.depth >= _DEPTH:
            raise self._fail(line, f"exceeded maximum template depth ({_DEPTH})")
        outer, self.scope = self.scope, [("$", data)]
        self.depth += 1
        self.walk(self.trees[name], data)
        self.depth -= 1
        self.scope = outer

    def walk(self, nodes: Sequence[Node], dot: Value) -> None:
        for node in nodes:
            if isinstance(node, Text):
                self.out.append(node.text)
            elif isinstance(node, Action):
                value = self.pipeline(node.pipeline, dot)
                if not node.pipeline.variables:
                    self.out.append(show(value))
            elif isinstance(node, Branch):
                self.branch(node, dot)
            elif isinstance(node, Call):
                data = self.pipeline(node.pipeline, dot) if node.pipeline else None
                self.template(node.name, data, node.line)
            else:
                assert isinstance(node, Jump)
                raise _Break if node.kind == "break" else _Continue

    def branch(self, node: Branch, dot: Value) -> None:
        mark = len(self.scope)
        if node.kind == "range":
            self.loop(node, dot)
        else:
            value = self.pipeline(node.pipeline, dot)
            if truth(value):
                self.walk(node.body, value if node.kind == "with" else dot)
            else:
                self.walk(node.otherwise, dot)
        del self.scope[mark:]

    def loop(self, node: Branch, dot: Value) -> None:
        pipeline = node.pipeline
        plain = Pipeline(pipeline.commands)
        over = self.pipeline(plain, dot)
        if len(pipeline.variables) > 1 and isinstance(over, int):
            raise self._fail(node.line, "can't iterate over a number with two variables")
        items = list(self._items(over, node.line))
        if not items:
            self.walk(node.otherwise, dot)
        if not pipeline.assign:
            self.scope += [(name, None) for name in pipeline.variables]
        mark = len(self.scope)
        for pair in items:
            # one variable gets the element, two get index and element
            for name, value in zip(pipeline.variables, pair[-len(pipeline.variables) :]):  # noqa: B905
                self._set(name, value)
            try:
                self.walk(node.body, pair[1])
            except _Break:
                break
            except _Continue:
                continue
            finally:
                del self.scope[mark:]

    def _items(self, value: Value, line: int) -> Iterator[tuple[Value, Value]]:
        if isinstance(value, list):
            yield from enumerate(value)
        elif isinstance(value, Mapping) and not isinstance(value, Struct):
            yield from ((key, value[key]) for key in sorted(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield from ((k, k) for k in range(value))
        elif value is not None and value is not MISSING:
            raise self._fail(line, f"range can't iterate over {show(value)}")

    def pipeline(self, pipeline: Pipeline, dot: Value) -> Value:
        value: Value = None
        for k, command in enumerate(pipeline.commands):
            value = self.command(command, dot, (value,) if k else ())
        for name in pipeline.variables:
            if pipeline.assign:
                self._set(name, value)
            else:
                self.scope.append((name, value))
        return value

    def command(self, command: Command, dot: Value, final: tuple[Value, ...]) -> Value:
        self.line = command.line
        first, *rest = command.words
        if isinstance(first, Function):
            return self.call(first.name, rest, dot, final, command.line)
        if rest or final:
            raise self._fail(command.line, f"can't give argument to non-function {first}")
        if isinstance(first, Nil):
            raise self._fail(command.line, "nil is not a command")
        return self.operand(first, dot)

    def call(
        self,
        name: str,
        words: Sequence[Operand],
        dot: Value,
        final: tuple[Value, ...],
        line: int,
    ) -> Value:
        if name in SHORT_CIRCUIT:
            return self._short(name, words, dot, final, line)
        function = self.functions[name]
        values = [*(self.operand(word, dot) for word in words), *final]
        try:
            inspect.signature(function).bind(*values)
        except TypeError:
            raise self._fail(line, f"wrong number of args for {name}: got {len(values)}") from None
        try:
            return function(*values)
        except GoTemplateError as error:
            raise self._fail(line, f"error calling {name}: {error}") from None

    def _short(
        self,
        name: str,
        words: Sequence[Operand],
        dot: Value,
        final: tuple[Value, ...],
        line: int,
    ) -> Value:
        """``and`` returns the first empty argument, ``or`` the first that is not, or the last."""
        if not words and not final:
            raise self._fail(line, f"wrong number of args for {name}: want at least 1 got 0")
        value: Value = None
        for word in words:
            value = self.operand(word, dot)
            if truth(value) == (name == "or"):
                return value
        return final[0] if final else value

    def operand(self, word: Operand, dot: Value) -> Value:
        if isinstance(word, Dot):
            return dot
        if isinstance(word, Constant):
            return word.value
        if isinstance(word, Nil):
            return None
        if isinstance(word, Field):
            return self._fields(dot, word.names)
        if isinstance(word, Variable):
            return self._fields(self._get(word.name), word.fields)
        if isinstance(word, Chain):
            return self._fields(self.operand(word.inner, dot), word.fields)
        if isinstance(word, Function):
            return self.call(word.name, (), dot, (), self.line)
        return self.pipeline(word, dot)

    def _fields(self, value: Value, names: Sequence[str]) -> Value:
        for name in names:
            if value is MISSING:
                continue
            if isinstance(value, Struct):
                if name not in value:
                    raise self._fail(self.line, f"can't evaluate field {name} in this struct")
                value = value[name]
            elif isinstance(value, Mapping):
                value = value.get(name, MISSING)
            elif value is None:
                raise self._fail(self.line, f"nil data; no entry for key {name!r}")
            else:
                raise self._fail(self.line, f"can't evaluate field {name} in {show(value)!r}")
        return value

    def _get(self, name: str) -> Value:
        for known, value in reversed(self.scope):
            if known == name:
                return value
        raise self._fail(self.line, f"undefined variable: {name}")

    def _set(self, name: str, value: Value) -> None:
        for k in range(len(self.scope) - 1, -1, -1):
            if self.scope[k][0] == name:
                self.scope[k] = (name, value)
                return
        raise self._fail(self.line, f"undefined variable: {name}")

    def _fail(self, line: int, why: str) -> GoTemplateError:
        return GoTemplateError(f"{self.name}:{line}: {why}")
