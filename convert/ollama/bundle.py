"""Move a model between stores without a network: one tar file, checked on both ends.

The tar holds the blobs and then the manifest under their paths in the store. Unpacking takes
nothing but such paths, hashes every blob while writing it, and lets the store have them, manifest
last, when all are whole.
"""

from __future__ import annotations

import io
import re
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from ...errors import FormatError, OutputError
from .layers import Layer
from .names import ModelName, parse_name
from .store import Manifest, Progress, Store, parse_manifest

_BLOB = re.compile(r"blobs/sha256-[0-9a-f]{64}")
_MAX_MANIFEST = 4 << 20


def bundle(store: Store, name: ModelName, target: Path, force: bool = False) -> Manifest:
    """Write a stored model into a tar file; the same model gives the same bytes.

    Raises:
        FormatError: the model is not there, or a blob is missing.
        OutputError: the target exists or cannot be written.
    """
    if target.exists() and not force:
        raise OutputError(f"{target}: exists; replace it with --force")
    manifest = store.read(name)
    part = target.with_name(f".{target.name}.mconv-part")
    try:
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
            for layer in manifest.blobs():
                if not store.has(layer.digest, layer.size):
                    raise FormatError(
                        f"{store.root}: {name} lacks blob {layer.digest} of {layer.size} bytes"
                    )
                path = store.blob_path(layer.digest)
                with path.open("rb") as file:
                    tar.addfile(_entry(f"blobs/{path.name}", layer.size), file)
            entry = _entry(f"manifests/{manifest.name.path.as_posix()}", len(manifest.raw))
            tar.addfile(entry, io.BytesIO(manifest.raw))
        part.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # on a read-only disk there is nothing to remove
            part.unlink(missing_ok=True)
    return manifest


def unbundle(
    store: Store, source: Path, rename: ModelName | None = None, progress: Progress | None = None
) -> Manifest:
    """Install a bundle into a store.

    Args:
        store: the models folder.
        source: the tar file.
        rename: another name for the model.
        progress: called per blob with (bytes done, bytes of it).

    Raises:
        FormatError: the file is no bundle, or a blob has not the digest of its name.
    """
    try:
        with tarfile.open(source, "r:") as tar, store.work_folder() as work:
            manifest = None
            blobs: dict[str, tuple[Path, Layer]] = {}
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                if file is None or manifest is not None:
                    raise FormatError(f"{source}: {member.name!r} is not part of a bundle")
                if member.name.startswith("manifests/"):
                    manifest = _read_manifest(source, member, file)
                    continue
                if not _BLOB.fullmatch(member.name):
                    raise FormatError(f"{source}: {member.name!r} is not part of a bundle")
                digest = member.name[len("blobs/") :].replace("-", ":")
                blobs[digest] = store.received(work, file, member.size, "", progress, digest)
            if manifest is None:
                raise FormatError(f"{source}: holds no manifest; it was cut off")
            for layer in manifest.blobs():
                here = layer.digest in blobs and blobs[layer.digest][1].size == layer.size
                if not here and not store.has(layer.digest, layer.size):
                    raise FormatError(f"{source}: lacks blob {layer.digest}")
            for path, blob in blobs.values():  # only now: a broken bundle leaves nothing
                store.adopt(path, blob)
            store.write_manifest(work, rename or manifest.name, manifest.raw)
            return manifest
    except tarfile.TarError as error:
        raise FormatError(f"{source}: not a bundle: {error}") from None
    except FileNotFoundError:
        raise FormatError(f"{source}: there is no such file") from None


def _read_manifest(source: Path, member: tarfile.TarInfo, file: IO[bytes]) -> Manifest:
    parts = member.name.split("/")[1:]
    if len(parts) != 4 or member.size > _MAX_MANIFEST:
        raise FormatError(f"{source}: {member.name!r} is not part of a bundle")
    name = parse_name(f"{'/'.join(parts[:3])}:{parts[3]}")
    return parse_manifest(file.read(), name, f"{source}: {member.name}")


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o644, 0
    return entry
