"""A PEFT adapter folder: opened as its base model with the adapter merged in.

The base is the folder that ``base_model_name_or_path`` names, if it is there; otherwise it has to
be given, with the adapter as ``--adapter``.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import UnsupportedError
from ..assets import load_json
from ..checkpoint import Checkpoint
from ..peft import CONFIG, FILES, merge_adapter
from ..registry import Format, OpenOptions, get_format, locate


def detect(path: Path) -> Path | None:
    """Return the folder with the adapter."""
    folder = path.parent if path.is_file() else path
    if path.is_file() and path.name not in (CONFIG, *FILES):
        return None
    if not (folder / CONFIG).is_file():
        return None
    return folder if any((folder / n).is_file() for n in FILES) else None


def open_peft(root: Path, options: OpenOptions) -> Checkpoint:
    """Open the base that the adapter names, and merge.

    Raises:
        UnsupportedError: the base is not a folder on this machine.
        FormatError: what the base or the adapter raise.
    """
    settings = load_json(root / CONFIG)
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    base = Path(name) if isinstance(name, str) and name else None
    if base is None or not base.is_dir():
        where = f"{name!r} is no folder here" if name else f"{CONFIG} does not name it"
        raise UnsupportedError(
            f"{root}: an adapter without its base model ({where}): open the base and give "
            f"--adapter {root}"
        )
    fmt, place = locate(base)
    if fmt is get_format("peft"):
        raise UnsupportedError(f"{root}: its base {base} is an adapter itself; merge that first")
    return merge_adapter(fmt.open(place, options), root)


FORMAT = Format("peft", "PEFT adapter", detect, open_peft, rank=55)
