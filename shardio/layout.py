"""A layout is data: the format's name and the sizes of the parallel axes.

Readers say with it how a checkpoint was cut, writers take it to say how it shall be cut, and the
trainer how it cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from ..errors import ConfigError, LayoutError, did_you_mean

_ALIASES = {"zero": "zero_stage"}
_SIZES = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint is spread over ranks.

    Attributes:
        format: name of the on-disk format (``hf``, ``dcp``, ``deepspeed``, ``megatron``, ...).
        tp: tensor parallel size.
        pp: pipeline parallel size (stages).
        vpp: virtual pipeline chunks per stage.
        ep: expert parallel size.
        etp: expert tensor parallel size (None: same as tp).
        cp: context parallel size.
        dp: data parallel size (ZeRO/FSDP partitions).
        zero_stage: ZeRO stage (0: parameters and optimizer are replicated over dp).
        pp_layers: layers on each stage, first stage first (None: even).
        make_vocab_divisible_by: pad the vocabulary to a multiple of this times tp, where the format
            pads it (None: as the source does, else the format's default).
        transformer_impl: names and order of Megatron's ``local`` modules or of its
            ``transformer_engine`` ones (None: as the source, else the latter).
        dtype: element type of the weights (None: as they are).
        max_shard_size: bytes of an output file (None: the format's default).
    """

    format: str = "hf"
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int = 1
    zero_stage: int = 0
    pp_layers: tuple[int, ...] | None = None
    make_vocab_divisible_by: int | None = None
    transformer_impl: str | None = None
    dtype: str | None = None
    max_shard_size: int | None = None

    def __post_init__(self) -> None:
        for axis in (*_SIZES, "make_vocab_divisible_by"):
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise LayoutError(f"{axis}={size}: a size is at least 1")
        if self.transformer_impl not in (None, "local", "transformer_engine"):
            raise LayoutError(
                f"transformer_impl={self.transformer_impl}: local or transformer_engine"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise LayoutError(f"zero_stage={self.zero_stage}: ZeRO has stages 0 to 3")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Return the layout of a short text: ``megatron:tp=2,pp=2``, ``deepspeed:zero=3,dp=4``.

        ``pp_layers`` separates its numbers by ``+``.

        Raises:
            ConfigError: unknown keys or values that are no numbers.
            LayoutError: sizes below 1.
        """
        name, _, options = text.partition(":")
        values: dict[str, object] = {}
        known = {f.name for f in fields(cls)} - {"format"}
        for option in filter(None, options.split(",")):
            key, _, value = option.partition("=")
            key = _ALIASES.get(key.strip(), key.strip())
            if key not in known:
                raise ConfigError(f"layout {text!r}: no option {key!r}{did_you_mean(key, known)}")
            try:
                if key in ("dtype", "transformer_impl"):
                    values[key] = value
                elif key == "pp_layers":
                    values[key] = tuple(int(n) for n in value.split("+"))
                else:
                    values[key] = int(value)
            except ValueError:
                raise ConfigError(f"layout {text!r}: {key} is a number, not {value!r}") from None
        return cls(name.strip(), **values)  # type: ignore[arg-type]  # keys and values are checked

    def sizes(self) -> dict[str, int]:
        """The axes that are in use (size above 1, and the ZeRO stage when there is one)."""
        axes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "cp": self.cp}
        axes |= {"etp": self.etp or 1, "dp": self.dp}
        used = {k: v for k, v in axes.items() if v > 1}
        return used | ({"zero_stage": self.zero_stage} if self.zero_stage else {})

    def describe(self) -> str:
        """One line for people: ``deepspeed dp=4 zero_stage=3``."""
        return " ".join([self.format, *(f"{k}={v}" for k, v in self.sizes().items())])


def demand(axis: str, size: int, limit: int, problem: Callable[[int], str | None]) -> None:
    """Refuse a size that does not fit, with the nearest ones that do.

    Args:
        axis: its name.
        size: the wanted one.
        limit: no larger size is looked for.
        problem: what is wrong with a size, or None; 1 always fits.

    Raises:
        LayoutError: with the problem.
    """
    bad = problem(size)
    if bad is None:
        return
    below = next(n for n in range(size - 1, 0, -1) if problem(n) is None)
    above = next((n for n in range(size + 1, limit + 1) if problem(n) is None), None)
    near = " or ".join(f"{axis}={n}" for n in (below, above) if n is not None)
    raise LayoutError(f"{axis}={size}: {bad}; nearest valid: {near}")
