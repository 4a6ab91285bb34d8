"""The pooling of sentence-transformers folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mconv.convert.pooling import sentence_pooling
from mconv.errors import ConfigError, UnsupportedError


def folder(path: Path, settings: Any) -> Path:
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, 1),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, 2),
        ({"pooling_mode_lasttoken": True}, 3),
        ({"pooling_mode": "cls"}, 2),
    ],
)
def test_kinds(tmp_path: Path, settings: dict[str, Any], number: int) -> None:
    assert sentence_pooling(folder(tmp_path, settings)) == number


def test_none_and_damaged(tmp_path: Path) -> None:
    assert sentence_pooling(tmp_path) is None
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ConfigError, match=r"modules\.json"):
        sentence_pooling(tmp_path)
    with pytest.raises(UnsupportedError, match="pools neither"):
        sentence_pooling(folder(tmp_path, {"pooling_mode_max_tokens": True}))
