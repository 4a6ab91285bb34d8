"""DeepSpeed ZeRO checkpoints: the tag folder (``global_step1000/``) with its rank files.

Covers stages 0 to 3, BF16_Optimizer, pipeline and tensor parallel, and experts; how they are laid
out is in ``shardio/deepspeed/``. Source: github.com/deepspeedai/DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path

from ..deepspeed.assembly import FORMAT as NAME
from ..deepspeed.assembly import open_folder
from ..deepspeed.folder import is_tag_folder, latest, member
from ..registry import Format


def detect(path: Path) -> Path | None:
    """The tag folder: from itself, one of its rank files, or the save folder whose ``latest`` names
    it.

    A save folder of the Hugging Face Trainer may hold exported weights besides; the tag folder is
    preferred, since it has the whole training state.
    """
    if not path.is_dir():
        return path.parent if member(path.name) is not None else None
    if is_tag_folder(path):
        return path
    tag = latest(path)
    return path / tag if tag and is_tag_folder(path / tag) else None


FORMAT = Format(name=NAME, title="DeepSpeed", detect=detect, open=open_folder, rank=30)
