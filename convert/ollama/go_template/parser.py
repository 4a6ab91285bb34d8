"""Tokens of a Go template to its tree.

Source: the grammar of Go's ``text/template``. Functions and variables must be known when they are
parsed; ``{{ define }}`` and ``{{ block }}`` add templates beside the main one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ....errors import FormatError
from .lexer import Token, tokens
from .literals import number, string
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

MAIN = ""
_KEYWORDS = {"if", "with", "range", "else", "end", "define", "block", "template"}
_END = Token("end of file", "", 0)


@dataclass(slots=True)
class Parser:
    """Parses one text; the result is in ``trees`` (name to nodes)."""

    source: str
    name: str
    functions: Collection[str]
    trees: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    _tokens: list[Token] = field(default_factory=list)
    _at: int = 0
    _variables: list[str] = field(default_factory=lambda: ["$"])
    _loops: int = 0
    _full: set[str] = field(default_factory=set)

    def parse(self) -> dict[str, tuple[Node, ...]]:
        """Return the trees of the text; the main one is ``MAIN``.

        Raises:
            FormatError: with the line.
        """
        self._tokens = list(tokens(self.source, self.name))
        main: list[Node] = []
        while self._at < len(self._tokens):
            if self._word_ahead() == "define":
                self._define()
                continue
            node, word = self._node()
            if node is None:
                raise self._fail(f"unexpected {{{{{word}}}}}")
            main.append(node)
        self.trees[MAIN] = tuple(main)
        return self.trees

    # -- tokens

    def _peek(self) -> Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else _END

    def _next(self) -> Token:
        token = self._peek()
        self._at += 1
        return token

    def _solid(self) -> Token:
        """Skip blanks and return the next token, which stays."""
        while self._peek().kind == "space":
            self._at += 1
        return self._peek()

    def _take(self, kind: str, context: str) -> Token:
        token = self._solid()
        if token.kind != kind:
            raise self._fail(f"unexpected {token.text or token.kind!r} in {context}")
        return self._next()

    def _word_ahead(self) -> str | None:
        """Return the keyword of the action that begins here, without consuming anything."""
        at = self._at
        word = None
        if self._next().kind == "left":
            token = self._solid()
            word = token.text if token.kind == "word" else None
        self._at = at
        return word

    def _fail(self, why: str) -> FormatError:
        token = self._tokens[min(self._at, len(self._tokens) - 1)] if self._tokens else _END
        return FormatError(f"{self.name}:{token.line}: {why}")

    # -- nodes

    def _node(self) -> tuple[Node | None, str]:
        """Parse a text or an action; ``{{else}}`` and ``{{end}}`` give (None, word)."""
        token = self._next()
        if token.kind == "text":
            return Text(token.text), ""
        first = self._solid()
        word = first.text if first.kind == "word" else ""
        if word in ("break", "continue") and word not in self.functions:
            return self._jump(word), ""
        if word not in _KEYWORDS:
            pipeline = self._pipeline("right", "command")
            self._take("right", "command")
            return Action(pipeline, token.line), ""
        self._next()
        if word in ("if", "with", "range"):
            return self._branch(word, token.line), ""
        if word == "template":
            return self._call(token.line), ""
        if word == "block":
            return self._block(token.line), ""
        if word == "define":
            raise self._fail("unexpected {{define}}")
        if word == "end":
            self._take("right", "end")
        return None, word

    def _jump(self, word: str) -> Jump:
        self._next()
        if not self._loops:
            raise self._fail(f"{{{{{word}}}}} outside {{{{range}}}}")
        self._take("right", word)
        return Jump(word)

    def _branch(self, kind: str, line: int) -> Branch:
        known = len(self._variables)
        pipeline = self._pipeline("right", kind)
        self._take("right", kind)
        self._loops += kind == "range"
        body, word = self._list()
        self._loops -= kind == "range"
        otherwise: tuple[Node, ...] = ()
        if word == "else":
            token = self._solid()
            if kind != "range" and token.kind == "word" and token.text == kind:
                self._next()  # {{else if}}: a branch in the branch, both closed by one {{end}}
                otherwise = (self._branch(kind, line),)
            else:
                self._take("right", "else")
                otherwise, word = self._list()
                if word != "end":
                    raise self._fail(f"expected end; found {{{{{word}}}}}")
        del self._variables[known:]
        return Branch(kind, pipeline, body, otherwise, line)

    def _list(self) -> tuple[tuple[Node, ...], str]:
        """Parse nodes up to ``{{else`` or ``{{end}}``; return them and that word."""
        nodes: list[Node] = []
        while self._at < len(self._tokens):
            node, word = self._node()
            if node is None:
                return tuple(nodes), word
            nodes.append(node)
        raise self._fail("unexpected end of the template: an {{end}} is missing")

    def _call(self, line: int) -> Call:
        name = self._name("template clause")
        pipeline = None
        if self._solid().kind != "right":
            pipeline = self._pipeline("right", "template clause")
        self._take("right", "template clause")
        return Call(name, pipeline, line)

    def _block(self, line: int) -> Call:
        name = self._name("block clause")
        pipeline = self._pipeline("right", "block clause")
        self._take("right", "block clause")
        self._inner(name)
        return Call(name, pipeline, line)

    def _define(self) -> None:
        self._next()
        self._solid()
        self._next()
        name = self._name("define clause")
        self._take("right", "define clause")
        self._inner(name)

    def _inner(self, name: str) -> None:
        """Parse the body of a template of its own."""
        outer, loops = self._variables, self._loops
        self._variables, self._loops = ["$"], 0
        nodes, word = self._list()
        if word != "end":
            raise self._fail(f"unexpected {{{{{word}}}}} in define clause")
        self._variables, self._loops = outer, loops
        empty = all(isinstance(node, Text) and not node.text.strip() for node in nodes)
        if not empty and name in self._full:
            raise self._fail(f"multiple definition of template {name!r}")
        if not empty:
            self._full.add(name)
        if not empty or name not in self.trees:
            self.trees[name] = nodes

    def _name(self, context: str) -> str:
        token = self._solid()
        if token.kind not in ("string", "raw"):
            raise self._fail(f"unexpected {token.text or token.kind!r} in {context}")
        try:
            return str(string(self._next().text))
        except ValueError as error:
            raise self._fail(str(error)) from None

    # -- pipelines

    def _pipeline(self, end: str, context: str) -> Pipeline:
        variables, assign = self._declared(context)
        commands: list[Command] = []
        while True:
            token = self._solid()
            if token.kind == end:
                break
            commands.append(self._command(context))
            if self._solid().kind == "bar":
                self._next()
            elif self._peek().kind != end:
                raise self._fail(f"unexpected {self._peek().text!r} in {context}")
        if not commands:
            raise self._fail(f"missing value for {context}")
        for later in commands[1:]:
            if isinstance(later.words[0], (Constant, Dot, Nil)):
                raise self._fail("non executable command in pipeline")
        return Pipeline(tuple(commands), variables, assign)

    def _declared(self, context: str) -> tuple[tuple[str, ...], bool]:
        """Parse ``$x :=``, ``$x =`` and, for range, ``$i, $x :=``."""
        start = self._at
        names: list[str] = []
        while self._solid().kind == "variable":
            names.append(self._next().text)
            token = self._solid()
            if token.kind in ("declare", "assign"):
                self._next()
                if token.kind == "declare":
                    self._variables += names
                return tuple(names), token.kind == "assign"
            if token.kind != "comma" or context != "range" or len(names) == 2:
                if token.kind == "comma":
                    raise self._fail(f"too many declarations in {context}")
                break
            self._next()
        self._at = start
        return (), False

    def _command(self, context: str) -> Command:
        line = self._solid().line
        words: list[Operand] = []
        while self._solid().kind not in ("right", "close", "bar"):
            word = self._operand()
            after = self._peek()
            if word is None or after.kind not in ("space", "right", "close", "bar"):
                raise self._fail(f"unexpected {(after.text or after.kind)!r} in {context}")
            words.append(word)
        if not words:
            raise self._fail("empty command")
        return Command(tuple(words), line)

    def _operand(self) -> Operand | None:
        term = self._term()
        if term is None or self._peek().kind != "field":
            return term
        names = []
        while self._peek().kind == "field":
            names.append(self._next().text[1:])
        if isinstance(term, Variable):
            return Variable(term.name, (*term.fields, *names))
        if isinstance(term, Field):
            return Field((*term.names, *names))
        if isinstance(term, (Constant, Nil, Dot)):
            raise self._fail(f"unexpected . after term {term}")
        return Chain(term, tuple(names))

    def _term(self) -> Operand | None:
        token = self._peek()
        kind, text = token.kind, token.text
        if kind == "word":
            self._next()
            return self._named(text)
        if kind == "variable":
            self._next()
            if text not in self._variables:
                raise self._fail(f"undefined variable {text!r}")
            return Variable(text)
        if kind == "open":
            self._next()
            inner = self._pipeline("close", "parenthesized pipeline")
            self._take("close", "parenthesized pipeline")
            return inner
        if kind not in ("dot", "field", "number", "char", "string", "raw"):
            return None
        self._next()
        if kind == "dot":
            return Dot()
        if kind == "field":
            return Field((text[1:],))
        try:
            return Constant(number(text) if kind == "number" else string(text))
        except ValueError as error:
            raise self._fail(str(error)) from None

    def _named(self, word: str) -> Operand:
        if word in ("true", "false"):
            return Constant(word == "true")
        if word == "nil":
            return Nil()
        if word not in self.functions:
            raise self._fail(f"function {word!r} not defined")
        return Function(word)
