"""Which metadata keys GGUF defines, to tell a user of one that is probably misspelt.

The lists are those of the ``gguf`` package. Keys of the user's own are allowed: a note is all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ...errors import did_you_mean
from .values import KeyValue

_SPACES = ("general.", "tokenizer.", "adapter.")
_NUMBER = re.compile(r"\.\d+\.")


def misspelt(texts: Sequence[str], entries: Iterable[KeyValue]) -> tuple[str, ...]:
    """Return a note for every key set that GGUF does not define and the file did not have.

    Args:
        texts: settings as ``KEY=VALUE``.
        entries: the metadata before them.
    """
    if not texts:
        return ()
    before = {entry.key: entry.value for entry in entries}
    family = f"{before.get('general.architecture', '')}."
    known = {*before, *_defined(family)}
    notes = []
    for key in dict.fromkeys(text.partition("=")[0] for text in texts):
        if key in known or _NUMBER.sub(".{id}.", key) in known:
            continue
        space, dot, own = key.partition(".")
        others = (name.removeprefix(space + dot) for name in known if name.startswith(space + dot))
        near = did_you_mean(own, others).replace("'", f"'{space}{dot}", 1)
        if key.startswith(_SPACES) or (key.startswith(family) and near):
            notes.append(f"{key} is set, but it is no key that GGUF defines{near}")
    return tuple(notes)


def _defined(family: str) -> Iterator[str]:
    """Yield every key, those of architectures for one ``family.``, numbers as ``{id}``."""
    import gguf

    groups: list[type] = [gguf.Keys]
    while groups:
        for name, value in vars(groups.pop()).items():
            if isinstance(value, type):
                groups.append(value)
            elif isinstance(value, str) and not name.startswith("_"):
                yield value.replace("{arch}.", family)
