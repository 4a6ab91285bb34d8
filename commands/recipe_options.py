"""What ``quantize`` and ``to-gguf`` share: options about types and metadata; error reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from .options import F, Size

if TYPE_CHECKING:
    from ..convert.quantize import QuantizeOptions
    from ..quant import ErrorSums, GgmlType

_OPTIONS = (
    click.option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="REGEX=TYPE",
        help="Type of the tensors whose name matches; repeatable, the first match counts.",
    ),
    click.option(
        "--tensor-type-file",
        type=click.Path(exists=True, dir_okay=False),
        help="File with REGEX=TYPE entries, one per word.",
    ),
    click.option("--output-tensor-type", metavar="TYPE", help="Type of output.weight."),
    click.option("--token-embedding-type", metavar="TYPE", help="Type of the embeddings."),
    click.option("--pure", is_flag=True, help="The base type everywhere, no mix."),
    click.option("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is."),
    click.option(
        "--imatrix",
        type=click.Path(exists=True, dir_okay=False),
        help="Importance matrix (GGUF or .dat) that guides the rounding.",
    ),
    click.option(
        "--include-weights",
        multiple=True,
        metavar="TEXT",
        help="Use importance only for tensors whose name contains TEXT.",
    ),
    click.option(
        "--exclude-weights",
        multiple=True,
        metavar="TEXT",
        help="Use no importance for tensors whose name contains TEXT.",
    ),
    click.option(
        "--override-kv",
        multiple=True,
        metavar="KEY=TYPE:VALUE",
        help="Set metadata; TYPE is int, float, bool or str; repeatable.",
    ),
    click.option(
        "--best",
        is_flag=True,
        help="Search for less error than llama-quantize leaves, in the same types and sizes.",
    ),
    click.option(
        "--report",
        "measure",
        is_flag=True,
        help="Report the relative error of each quantized tensor; with --best, both ways.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set metadata in the key's own type; KEY=TYPE:VALUE and KEY=@FILE too; repeatable.",
    ),
    click.option("--max-shard-size", type=Size(), help="Split outputs into files of this size."),
    click.option(
        "--max-shard-tensors", type=click.IntRange(1), help="Split outputs by number of tensors."
    ),
    click.option("--big-endian", is_flag=True, help="Write for big-endian machines."),
)


def recipe_options(fn: F) -> F:
    """Options about types, importance, metadata and splitting of GGUF outputs."""
    for option in reversed(_OPTIONS):
        fn = option(fn)
    return fn


@dataclass(frozen=True, slots=True)
class Asked:
    """These options as given."""

    tensor_types: tuple[str, ...]
    tensor_type_file: str | None
    output_tensor_type: str | None
    token_embedding_type: str | None
    pure: bool
    leave_output_tensor: bool
    imatrix: str | None
    include_weights: tuple[str, ...]
    exclude_weights: tuple[str, ...]
    override_kv: tuple[str, ...]
    best: bool
    measure: bool
    settings: tuple[str, ...]
    max_shard_size: int | None
    max_shard_tensors: int | None
    big_endian: bool

    @classmethod
    def taken(cls, given: dict[str, Any], *, dry_run: bool) -> Asked:
        """Take them out of all options that a command was given.

        Raises UsageError where they contradict a dry run.
        """
        asked = cls(**{one.name: given.pop(one.name) for one in fields(cls)})
        if dry_run and asked.measure:
            raise click.UsageError(
                "--report measures errors while encoding, and --dry-run encodes nothing: "
                "leave one of them out"
            )
        return asked

    def options(self) -> QuantizeOptions:
        """Parse them. Raises QuantError for a bad pattern or type."""
        from ..convert.quantize import QuantizeOptions
        from ..quant.recipes import RecipeOptions, parse_override

        texts = list(self.tensor_types)
        if self.tensor_type_file:
            texts += Path(self.tensor_type_file).read_text(encoding="utf-8").split()
        recipe = RecipeOptions(
            tuple(parse_override(text) for text in texts),
            self.output_tensor_type,
            self.token_embedding_type,
            self.pure,
            self.leave_output_tensor,
        )
        return QuantizeOptions(
            recipe=recipe,
            imatrix=self.imatrix,
            include_weights=self.include_weights,
            exclude_weights=self.exclude_weights,
            override_kv=self.override_kv,
            settings=self.settings,
            max_shard_size=self.max_shard_size,
            max_shard_tensors=self.max_shard_tensors,
            big_endian=self.big_endian,
            best=self.best,
            measure=self.measure,
        )


class Measured(Protocol):
    """A planned tensor, as both commands report it."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> GgmlType: ...
    @property
    def errors(self) -> ErrorSums | None: ...


def error_json(tensor: Measured) -> dict[str, Any]:
    """The error of a tensor as JSON members; none where it was not measured."""
    if tensor.errors is None or not tensor.errors.squares:
        return {}
    return {
        "relative_rmse": round(tensor.errors.chosen_rmse, 6),
        "relative_rmse_default": round(tensor.errors.default_rmse, 6),
    }


def show_errors(tensors: Sequence[Measured]) -> None:
    """Print the errors of measured tensors and of all together."""
    measured = [(t, t.errors) for t in tensors if t.errors is not None and t.errors.squares]
    if not measured:
        return
    from ..quant import ErrorSums

    every, width = ErrorSums(), max(len(t.name) for t, _ in measured)
    click.echo(f"  {'relative error':<{width}}  {'type':<8}  default  written")
    for tensor, errors in measured:
        every.add((errors.squares, errors.default, errors.chosen))
        _error_line(tensor.name, width, tensor.type.name, errors)
    _error_line("all", width, "", every)


def _error_line(name: str, width: int, kind: str, errors: ErrorSums) -> None:
    click.echo(
        f"  {name:<{width}}  {kind:<8}  {errors.default_rmse:7.5f}  {errors.chosen_rmse:7.5f}"
    )
