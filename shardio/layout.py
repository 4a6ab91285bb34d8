"""A layout is data: the format's name and the sizes of the parallel axes.

Readers say with it how a checkpoint was cut, writers take it to say how it shall be cut, and the
trainer how it cuts.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    dtype: str | None = None
    max_shard_size: int | None = None

    def sizes(self) -> dict[str, int]:
        """The axes that are in use (size above 1, and the ZeRO stage when there is one)."""
        axes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "cp": self.cp}
        axes |= {"etp": self.etp or 1, "dp": self.dp}
        used = {k: v for k, v in axes.items() if v > 1}
        return used | ({"zero_stage": self.zero_stage} if self.zero_stage else {})

    def describe(self) -> str:
        """One line for people: ``deepspeed dp=4 zero_stage=3``."""
        return " ".join([self.format, *(f"{k}={v}" for k, v in self.sizes().items())])
