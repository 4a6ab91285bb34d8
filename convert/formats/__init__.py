"""Formats that need more than files and tensors: discovered like those of ``shardio/formats``.

``FORMAT_PACKAGES`` of the root package names both folders.
"""
