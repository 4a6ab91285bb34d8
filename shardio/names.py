"""Parameter names without the prefixes that training wrappers add.

DDP and Horovod add ``module.``, ``torch.compile`` adds ``_orig_mod.``, FSDP1 and activation
checkpointing add theirs anywhere in the path. None of them belongs to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_INNER = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_fpw_module"
_FRAGMENT = re.compile(rf"(?:^|(?<=\.))(?:{_INNER})\.")
_MODULE = "module."


def strip_wrappers(name: str) -> str:
    """Return the name without wrapper fragments: ``module.`` in front, the others anywhere.

    ``module.`` inside a name is left: it can be a real submodule.
    """
    bare = _FRAGMENT.sub("", name)
    while bare.startswith(_MODULE):
        bare = bare[len(_MODULE) :]
    return bare


def stripped(names: Iterable[str]) -> Mapping[str, str]:
    """Return name to bare name for all names; where two would become one, all keep their name."""
    table = {name: strip_wrappers(name) for name in names}
    if len(set(table.values())) < len(table):
        return {name: name for name in table}
    return table
