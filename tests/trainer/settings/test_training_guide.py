"""``docs/training.md`` lists every key of a run's TOML file with its default, and no other."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

from mconv.trainer.settings import RunConfig, load_config
from mconv.trainer.settings.model import RopeScaling

GUIDE = Path(__file__).parents[3] / "docs" / "training.md"


def _text(value: object) -> str:
    if value is MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(_text(v).strip('`') for v in value)}]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value!r}`"


def test_every_key_and_its_default() -> None:
    rows = re.findall(r"^\| `([a-z]+\.[a-z0-9_]+)` \| (.*?) \| \S", GUIDE.read_text(), re.MULTILINE)
    wanted = {
        f"{section}.{field.name}": _text(field.default)
        for section, kind in get_type_hints(RunConfig).items()
        for field in fields(kind)
    }
    assert dict(rows) == {"model.path": "none", **wanted}
    assert len(rows) == len(wanted) + 1
    row = next(line for line in GUIDE.read_text().splitlines() if "`model.rope_scaling`" in line)
    assert all(f.name in row for f in fields(RopeScaling))


def test_the_first_run_is_a_run(tmp_path: Path) -> None:
    found = re.search(r"```toml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found
    (tmp_path / "run.toml").write_text(found[1])
    assert load_config(tmp_path / "run.toml").save.every == 100
