"""Deployments of the tiny chat model, for the tests beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mconv.convert.deploy.deploy import Deployed, DeployWishes, deploy
from mconv.convert.to_gguf import to_gguf

CHAT = Path(__file__).resolve().parents[2] / "fixtures" / "ollama" / "chat"


def gguf(folder: Path) -> Path:
    """Write the chat model as GGUF."""
    path = folder / "chat.gguf"
    if not path.exists():
        to_gguf(CHAT, path, "f16")
    return path


def made(folder: Path, source: Path = CHAT, **wishes: Any) -> Deployed:
    """Deploy the chat model into ``folder/serve``."""
    return deploy(source, folder / "serve", DeployWishes(**wishes))
