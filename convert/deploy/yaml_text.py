"""YAML as people write it: keys in their order, no anchors, long texts as blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml


def to_yaml(documents: Sequence[Any], comments: Sequence[str] = ()) -> str:
    """Return documents as one YAML text, with comment lines in front."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    plain = json.loads(json.dumps(list(documents)))  # nothing shared, so no anchors
    return head + str(
        yaml.dump_all(
            plain, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=96,
            explicit_start=len(documents) > 1,
        )
    )  # fmt: skip


def _dumper() -> Any:
    """A safe dumper with indented lists, and blocks for texts of several lines."""

    def indent(self: Any, flow: bool = False, indentless: bool = False) -> None:
        yaml.SafeDumper.increase_indent(self, flow, False)

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    dumper = type("Dumper", (yaml.SafeDumper,), {"increase_indent": indent})
    dumper.add_representer(str, text)  # type: ignore[attr-defined]
    return dumper
