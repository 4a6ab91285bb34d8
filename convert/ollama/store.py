"""A models folder of Ollama, written and read without Ollama.

Layout: ``blobs/sha256-<hex>`` and ``manifests/<host>/<namespace>/<model>/<tag>``. Blobs come first
and the manifest last, each renamed into place, so a running server sees a whole model or none. Our
own unfinished files lie in a hidden folder beside ``blobs``, where no server looks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...errors import FormatError, OutputError, did_you_mean
from .layers import Layer
from .names import ModelName

Progress = Callable[[int, int], None]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK = 4 << 20
_MAX_MANIFEST = 4 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """A stored model: its config, its layers, and the short id that ``ollama list`` shows."""

    name: ModelName
    config: Layer
    layers: tuple[Layer, ...]
    id: str
    raw: bytes

    def blobs(self) -> list[Layer]:
        """Return every blob once, config last."""
        return list({layer.digest: layer for layer in (*self.layers, self.config)}.values())


class Store:
    """A models folder (``OLLAMA_MODELS``, usually ``~/.ollama/models``)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.manifests = root / "manifests"

    def blob_path(self, digest: str) -> Path:
        """Return where a blob lies.

        Raises:
            FormatError: this is no sha256 digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise FormatError(f"{self.root}: {digest!r} is not a digest such as sha256:<64 hex>")
        return self.blobs / digest.replace(":", "-")

    def has(self, digest: str, size: int) -> bool:
        """Return whether a blob is there in its size."""
        path = self.blob_path(digest)
        return path.is_file() and path.stat().st_size == size

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A hidden folder of this store for unfinished files; gone afterwards.

        After an error the folders of the store go too, where they are new and empty.

        Raises:
            OutputError: the store cannot be written.
        """
        folder = self.root / f".mconv-{secrets.token_hex(4)}"
        new = [p for p in (self.blobs, self.manifests, *self.blobs.parents) if not p.exists()]
        try:
            for place in (self.blobs, self.manifests, folder):
                place.mkdir(parents=True, exist_ok=True)
            yield folder
            new.clear()
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for place in new:  # after a failure: a store that was made for nothing
                with suppress(OSError):
                    place.rmdir()

    def add_bytes(self, work: Path, data: bytes, kind: str) -> Layer:
        """Store a small blob."""
        path = work / secrets.token_hex(8)
        path.write_bytes(data)
        return self.adopt(
            path, Layer(kind, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
        )

    def add_copy(
        self, work: Path, source: Path, kind: str, progress: Progress | None = None
    ) -> Layer:
        """Copy a file into the store, hashing while copying: one pass."""
        with source.open("rb") as file:
            return self.add_stream(work, file, source.stat().st_size, kind, progress)

    def add_stream(
        self,
        work: Path,
        file: IO[bytes],
        size: int,
        kind: str,
        progress: Progress | None = None,
    ) -> Layer:
        """Store ``size`` bytes of a stream, hashing while writing.

        Raises:
            FormatError: the stream ends early.
        """
        return self.adopt(*self.received(work, file, size, kind, progress))

    def received(
        self,
        work: Path,
        file: IO[bytes],
        size: int,
        kind: str,
        progress: Progress | None = None,
        expect: str | None = None,
    ) -> tuple[Path, Layer]:
        """Write ``size`` bytes of a stream into the work folder, for ``adopt``.

        Raises:
            FormatError: the stream ends early, or has not the digest ``expect``.
        """
        path, digest, done = work / secrets.token_hex(8), hashlib.sha256(), 0
        with path.open("wb") as out:
            while done < size:
                data = file.read(min(_CHUNK, size - done))
                if not data:
                    raise FormatError(f"{self.root}: a blob ends {size - done} bytes early")
                digest.update(data)
                out.write(data)
                done += len(data)
                if progress:
                    progress(done, size)
        found = f"sha256:{digest.hexdigest()}"
        if expect is not None and found != expect:
            raise FormatError(f"{self.root}: a blob is damaged: it is {found}, not {expect}")
        return path, Layer(kind, found, size)

    def add_made(self, path: Path, kind: str, progress: Progress | None = None) -> Layer:
        """Take a finished file of the work folder as a blob; it is read once to be hashed."""
        return self.adopt(path, Layer(kind, hash_file(path, progress), path.stat().st_size))

    def write_manifest(self, work: Path, name: ModelName, data: bytes) -> None:
        """Make a model visible; its blobs are there already."""
        path = work / secrets.token_hex(8)
        path.write_bytes(data)
        target = self.manifests / self._cased(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._publish(path, target)
        self._give(target.parent)

    def read(self, name: ModelName) -> Manifest:
        """Return a stored model.

        Raises:
            FormatError: it is not there, or its manifest is damaged.
        """
        path = self.manifests / self._cased(name)
        if not path.is_file():
            known = [str(n) for n in self.names()]
            there = f"; there is: {', '.join(known) or 'none'}"
            near = did_you_mean(str(name), known)
            raise FormatError(f"{self.root}: there is no model {name}{near}{there}")
        if path.stat().st_size > _MAX_MANIFEST:
            raise FormatError(f"{path}: too large for a manifest")
        return parse_manifest(path.read_bytes(), name, str(path))

    def names(self) -> list[ModelName]:
        """Return all stored models, sorted."""
        parts = (p.relative_to(self.manifests).parts for p in self.manifests.glob("*/*/*/*"))
        return [ModelName(*p) for p in sorted(parts)]

    def _cased(self, name: ModelName) -> Path:
        """Return the path of a name, in the case in which it is stored: lookup ignores case."""
        wanted = tuple(part.lower() for part in name.path.parts)
        for known in self.names():
            if tuple(part.lower() for part in known.path.parts) == wanted:
                return known.path
        return name.path

    def adopt(self, path: Path, layer: Layer) -> Layer:
        """Make a blob of a finished file in the work folder."""
        if self.has(layer.digest, layer.size):
            path.unlink()
            os.utime(self.blob_path(layer.digest))  # old blobs without a manifest are pruned
        else:
            self._publish(path, self.blob_path(layer.digest))
        return layer

    def _publish(self, path: Path, target: Path) -> None:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.chmod(0o644)
        self._give(path)
        path.replace(target)

    def _give(self, path: Path) -> None:
        """Give a file to the owner of the store, as far as we may: a service reads it as itself."""
        if os.geteuid() == 0:
            owner = self.root.stat()
            os.chown(path, owner.st_uid, owner.st_gid)

    def _unwritable(self, error: OSError) -> OutputError:
        if isinstance(error, PermissionError):
            return OutputError(
                f"{self.root}: may not be written; the Linux service keeps its models as user "
                "'ollama': run this as that user (sudo -u ollama), or install over HTTP with --host"
            )
        return OutputError(f"{error.filename or self.root}: {error.strerror}")


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """Return ``sha256:<hex>`` of a file."""
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            done += len(data)
            if progress:
                progress(done, size)
    return f"sha256:{digest.hexdigest()}"


def parse_manifest(data: bytes, name: ModelName, where: str) -> Manifest:
    """Return a manifest.

    Raises:
        FormatError: it is not what Ollama writes.
    """
    try:
        value = json.loads(data)
        config = _layer(value["config"])
        layers = tuple(_layer(item) for item in value["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not a manifest: {type(error).__name__} {error}") from None
    return Manifest(name, config, layers, hashlib.sha256(data).hexdigest()[:12], data)


def _layer(item: Any) -> Layer:
    kind, digest, size = item["mediaType"], item["digest"], item["size"]
    if not isinstance(kind, str) or not isinstance(size, int) or size < 0:
        raise TypeError("a layer has no type or size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise TypeError(f"digest {digest!r}")
    return Layer(kind, digest, size)
