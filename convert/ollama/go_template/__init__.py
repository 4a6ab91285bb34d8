"""Go's ``text/template`` in Python: what Ollama runs to make a prompt.

Source: the documentation of Go's packages ``text/template`` and ``text/template/parse``; recorded
answers of the real engine are in the tests. ``lexer`` cuts the text, ``parser`` builds the tree of
``nodes``, ``execute`` walks it over ``values``, ``functions`` are the built-in ones.
"""

from __future__ import annotations

from .execute import Template, parse_template
from .values import Struct

__all__ = ["Struct", "Template", "parse_template"]
