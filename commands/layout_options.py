"""Options that say how a checkpoint shall be cut, and the layout made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..shardio.layout import Layout

F = TypeVar("F", bound=Callable[..., Any])

_AXES = (
    ("tp", "Tensor parallel size."),
    ("pp", "Pipeline stages."),
    ("vpp", "Virtual pipeline chunks per stage."),
    ("ep", "Expert parallel size."),
    ("etp", "Tensor parallel size of experts (default: that of --tp)."),
    ("cp", "Context parallel size."),
    ("dp", "Data parallel size: ranks that weights or optimizer are cut over."),
)


class Numbers(click.ParamType):
    """Numbers separated by commas: ``6,7,7,6``."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(n) for n in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 6,7,7,6", param, ctx)
        if min(found) < 0:
            self.fail("a stage has at least 0 layers", param, ctx)
        return found


def layout_options(fn: F) -> F:
    """The axes of the target layout."""
    options = [click.option(f"--{axis}", type=click.IntRange(1), help=text) for axis, text in _AXES]
    options += [
        click.option("--zero-stage", type=click.IntRange(0, 3), help="DeepSpeed ZeRO stage."),
        click.option("--pp-layers", type=Numbers(), help="Layers per stage, such as 6,7,7,6."),
        click.option(
            "--make-vocab-divisible-by",
            type=click.IntRange(1),
            help="Pad the vocabulary to a multiple of this times tp, where the format pads it.",
        ),
        click.option(
            "--transformer-impl",
            type=click.Choice(["local", "transformer_engine"]),
            help="Which of Megatron's modules to write for (default: those of the source).",
        ),
    ]
    for option in reversed(options):
        fn = option(fn)
    return fn


def make_layout(
    target: str, dtype: str | None, max_shard_size: int | None, axes: dict[str, Any]
) -> Layout:
    """The layout a user asked for; options that were not given keep their defaults."""
    given = {k: v for k, v in axes.items() if v is not None}
    return Layout(target, dtype=dtype, max_shard_size=max_shard_size, **given)
