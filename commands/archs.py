"""``mconv archs``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import show_json

if TYPE_CHECKING:
    from ..convert.architectures import Architecture


@click.command("archs")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(as_json: bool) -> None:
    """List the architectures that can become GGUF."""
    from ..convert.architectures import architectures

    found = architectures()
    if as_json:
        show_json([_as_json(name, record) for name, record in found.items()])
        return
    width = max(len(record.name) for record in found.values())
    for record in found.values():
        note = f"  ({record.notes})" if record.notes else ""
        name = click.style(record.name.ljust(width), bold=True)
        click.echo(f"{name}  {', '.join(record.classes)}{note}")
    click.echo(
        f"{len({record.name for record in found.values()})} architectures; whether a checkpoint "
        "fits: mconv check SRC"
    )


def _as_json(name: str, record: Architecture) -> dict[str, Any]:
    return {
        "family": name,
        "architecture": record.name,
        "classes": record.classes,
        "model_types": list(record.defaults),
        "rope": record.rope,
        "tokenizers": record.tokenizer.kinds,
        "notes": record.notes,
    }
