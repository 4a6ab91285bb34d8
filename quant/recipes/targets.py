"""What a model can be quantized to: the target names of llama-quantize.

A target is a mix: its base type goes to most weights, the rules move some of them up or down.
``file_type`` is the number that ``general.file_type`` holds (llama.cpp's ``llama_ftype``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import QuantError, did_you_mean
from ..types import GgmlType, type_by_name


@dataclass(frozen=True, slots=True)
class Target:
    """One quantization target.

    Attributes:
        name: as users write it.
        file_type: the number in ``general.file_type``.
        base_name: ggml type of most weights (empty for ``COPY``, which changes nothing).
    """

    name: str
    file_type: int
    base_name: str

    @property
    def copies(self) -> bool:
        """Whether every tensor keeps its type."""
        return not self.base_name

    @property
    def base(self) -> GgmlType:
        """The type of most weights. Raises QuantError for ``COPY``, which has none."""
        return type_by_name(self.base_name)


_TABLE = (
    Target("F32", 0, "F32"),
    Target("F16", 1, "F16"),
    Target("BF16", 32, "BF16"),
    Target("Q8_0", 7, "Q8_0"),
    Target("Q6_K", 18, "Q6_K"),
    Target("Q5_K_M", 17, "Q5_K"),
    Target("Q5_K_S", 16, "Q5_K"),
    Target("Q5_1", 9, "Q5_1"),
    Target("Q5_0", 8, "Q5_0"),
    Target("Q4_K_M", 15, "Q4_K"),
    Target("Q4_K_S", 14, "Q4_K"),
    Target("IQ4_NL", 25, "IQ4_NL"),
    Target("IQ4_XS", 30, "IQ4_XS"),
    Target("Q4_1", 3, "Q4_1"),
    Target("Q4_0", 2, "Q4_0"),
    Target("MXFP4_MOE", 38, "MXFP4"),
    Target("Q3_K_L", 13, "Q3_K"),
    Target("Q3_K_M", 12, "Q3_K"),
    Target("Q3_K_S", 11, "Q3_K"),
    Target("IQ3_M", 27, "IQ3_S"),
    Target("IQ3_S", 26, "IQ3_S"),
    Target("IQ3_XS", 22, "IQ3_S"),
    Target("IQ3_XXS", 23, "IQ3_XXS"),
    Target("Q2_K", 10, "Q2_K"),
    Target("Q2_K_S", 21, "Q2_K"),
    Target("IQ2_M", 29, "IQ2_S"),
    Target("IQ2_S", 28, "IQ2_XS"),
    Target("IQ2_XS", 20, "IQ2_XS"),
    Target("IQ2_XXS", 19, "IQ2_XXS"),
    Target("Q2_0", 41, "Q2_0"),
    Target("TQ2_0", 37, "TQ2_0"),
    Target("TQ1_0", 36, "TQ1_0"),
    Target("IQ1_M", 31, "IQ1_M"),
    Target("IQ1_S", 24, "IQ1_S"),
    Target("Q1_0", 40, "Q1_0"),
    Target("COPY", -1, ""),
)

TARGETS: dict[str, Target] = {t.name: t for t in _TABLE}
"""All targets by name, from many bits to few."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Short names that llama-quantize accepts too."""

_BY_ID = {str(t.file_type): t for t in _TABLE if not t.copies}


def parse_target(name: str | Target) -> Target:
    """Return the target called ``name``: any case, a short name, or its file type number.

    Raises:
        QuantError: there is no such target.
    """
    if isinstance(name, Target):
        return name
    key = name.strip().upper()
    found = TARGETS.get(ALIASES.get(key, key)) or _BY_ID.get(key)
    if found is None:
        hint = did_you_mean(key, [*TARGETS, *ALIASES]) or f"; known: {', '.join(TARGETS)}"
        raise QuantError(f"unknown quantization target {name!r}{hint}")
    return found
