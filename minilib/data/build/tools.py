"""What every build script needs: archives with known checksums, an npz writer without dates, and the lock."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from minilib.data import assets
from minilib.resources import atomic_write

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date a zip file can hold


class BuildError(RuntimeError):
    """An asset cannot be built; the message says what is missing."""


@dataclass(frozen=True)
class Source:
    """One published archive: which package and version, its file name, its sha256 and how to get it."""

    package: str
    version: str
    file: str
    sha256: str
    get: str


@dataclass(frozen=True)
class Built:
    """A finished asset: the file's bytes and what ``assets.toml`` and the credit file say about it."""

    suffix: str
    data: bytes
    what: str
    licence: str
    credit: str
    sources: tuple[Source, ...]
    extra: dict[str, Any] = field(default_factory=dict)


def archive(folder: Path, source: Source) -> Path:
    """The path of a source archive in ``folder``, its sha256 checked.

    Raises:
        BuildError: it is not there, or it is another file.
    """
    path = folder / source.file
    if not path.is_file():
        raise BuildError(f"{path} does not exist; get it with: {source.get}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise BuildError(
            f"sha256 of {path} is {found}, expected {source.sha256}: not {source.package} {source.version}"
        )
    return path


def tar_members(path: Path, prefix: str) -> dict[str, bytes]:
    """Files of an npm tarball whose name starts with ``prefix``, by name, sorted."""
    with tarfile.open(path) as tar:
        found = {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and member.name.startswith(prefix)
        }
    return dict(sorted(found.items()))


def deb_members(path: Path, prefix: str) -> dict[str, bytes]:
    """Files of a Debian package whose path (``./usr/...``) starts with ``prefix``, by path, sorted.

    A .deb is an ``ar`` archive: 60-byte headers, name in the first 16 characters, size in 48..58, even offsets.
    """
    raw, offset = path.read_bytes(), 8
    while offset < len(raw):
        header = raw[offset : offset + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[offset + 60 : offset + 60 + size])) as tar:
                found = {
                    member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
                    for member in tar
                    if member.isfile() and member.name.startswith(prefix)
                }
            return dict(sorted(found.items()))
        offset += 60 + size + size % 2
    raise BuildError(f"{path} is no Debian package: it holds no data.tar")


def npz_bytes(arrays: Mapping[str, np.ndarray], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An npz file whose bytes depend on the arrays alone: fixed date, fixed order, fixed compression level.

    ``method`` is one of :mod:`zipfile`'s: deflated reads fast, LZMA is a quarter smaller on small flat drawings.

    >>> npz_bytes({"a": np.arange(3)}) == npz_bytes({"a": np.arange(3)})
    True
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=9) as out:
        for key in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(arrays[key]), allow_pickle=False)
            info = zipfile.ZipInfo(f"{key}.npy", _EPOCH)
            info.compress_type, info.create_system, info.external_attr = method, 3, 0o644 << 16
            out.writestr(info, member.getvalue(), compresslevel=9)
    return buffer.getvalue()


def publish(name: str, built: Built, root: Path | None = None) -> None:
    """Write the file, its credit file and its entry. The entry comes last: until then reading refuses."""
    root = root or assets.data_dir()
    known = assets.entries(root)
    file, credit = f"{name}{built.suffix}", f"licences/{name}.md"
    known[name] = {
        "file": file,
        "bytes": len(built.data),
        "sha256": hashlib.sha256(built.data).hexdigest(),
        "what": built.what,
        "licence": built.licence,
        "credit": credit,
        "build": f"minilib/data/build/{name}.py",
        "package": [source.package for source in built.sources],
        "version": [source.version for source in built.sources],
        "source_file": [source.file for source in built.sources],
        "source_sha256": [source.sha256 for source in built.sources],
        **built.extra,
    }
    atomic_write(root / file, built.data)
    atomic_write(root / credit, built.credit)
    atomic_write(root / assets.TABLE, tomli_w.dumps(dict(sorted(known.items()))))
