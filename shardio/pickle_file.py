"""Plain pickles of numpy arrays, opened without reading the arrays.

``pickle.dump`` and ``paddle.save`` write arrays as byte strings inside the pickle. The pickle is
mapped, not read, and large byte strings are passed over, so that the arrays stay in the file as
``StoredTensor``. Pickles of protocols 0 to 2 carry arrays as text, which can only be read whole.
Source: CPython's ``pickletools``, numpy's ``array_reduce``.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from ..errors import FormatError
from .records import Storage
from .source import open_descriptor
from .unpickle import loads

_BYTES = np.dtype(np.uint8)


def open_pickle(path: Path) -> object:
    """Return the object of a pickle file: plain data, Records, small arrays as numpy arrays, and
    large ones as ``StoredTensor``.

    Raises:
        FormatError: missing, truncated, damaged or hostile data.
    """

    def blob(offset: int, size: int) -> Storage:
        return Storage(f"byte {offset}", _BYTES, size, offset, path)

    try:
        fd = open_descriptor(path)
    except OSError as e:
        raise FormatError(f"{path}: cannot be opened: {e.strerror}") from None
    try:
        size = os.fstat(fd).st_size
        if not size:
            raise FormatError(f"{path}: the file is empty; the save or the copy did not finish")
        with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as data:
            return loads(data, where=str(path), blob=blob)
    except (OSError, ValueError) as e:
        raise FormatError(f"{path}: cannot be read: {e}") from None
    finally:
        os.close(fd)
