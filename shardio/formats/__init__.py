"""One module per on-disk format; each has a ``FORMAT`` and is found by discovery."""
