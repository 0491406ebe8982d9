"""Files that ship with the library are read whole and checked against the size and sha256 their entry gives."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class VerificationError(RuntimeError):
    """Something is wrong with a file that ships with the library; the message says what to do."""


class MissingFile(VerificationError):
    """The entry is there, the file is not."""


class TruncatedFile(VerificationError):
    """The file is shorter or longer than the entry says."""


class ChecksumMismatch(VerificationError):
    """The file has the right size and other contents."""


def read_verified(folder: Path, name: str, item: Mapping[str, Any], table: str, remedy: str) -> bytes:
    """The bytes of ``folder / item["file"]``, checked against ``item["bytes"]`` and ``item["sha256"]``.

    Args:
        folder: where the file is.
        name: of the entry, for messages.
        item: the entry.
        table: file name of the table the entry is from, for messages.
        remedy: what to do about a bad file, for messages.

    Raises:
        MissingFile, TruncatedFile, ChecksumMismatch: each says what was found and what to do.
    """
    path = folder / item["file"]
    if not path.is_file():
        raise MissingFile(f"{name}: {path} does not exist; {remedy}")
    data = path.read_bytes()
    if len(data) != item["bytes"]:
        raise TruncatedFile(f"{name}: {path} has {len(data)} bytes, {table} says {item['bytes']}; {remedy}")
    found = hashlib.sha256(data).hexdigest()
    if found != item["sha256"]:
        raise ChecksumMismatch(
            f"{name}: sha256 of {path} is {found[:16]}..., {table} says {item['sha256'][:16]}...; {remedy}"
        )
    return data


@dataclass(frozen=True)
class VerifiedTable:
    """A TOML table of files that ship with the library, and the files, in one folder.

    Args:
        file: name of the table.
        folder: where table and files are, unless a method is given another ``root``.
        kind: what an entry is, for messages.
        unknown: what to raise for a name that is not in the table.
        remedy: what to do about a bad file, for messages; ``{name}`` is the entry's name.
    """

    file: str
    folder: Callable[[], Path]
    kind: str
    unknown: type[VerificationError]
    remedy: str

    def entries(self, root: Path | None = None) -> dict[str, dict[str, Any]]:
        """All entries, by name."""
        path = (root or self.folder()) / self.file
        return tomllib.loads(path.read_text()) if path.is_file() else {}

    def names(self, root: Path | None = None) -> list[str]:
        """Names of all entries, sorted."""
        return sorted(self.entries(root))

    def entry(self, name: str, root: Path | None = None) -> dict[str, Any]:
        """One entry; an unknown name raises ``unknown``."""
        known = self.entries(root)
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise self.unknown(f"unknown {self.kind} {name!r}; known: {listed}")
        return known[name]

    def checksum(self, name: str, root: Path | None = None) -> str:
        """The recorded sha256 of a file."""
        return str(self.entry(name, root)["sha256"])

    def read(self, name: str, root: Path | None = None) -> bytes:
        """The file's bytes, verified against size and sha256.

        Raises:
            MissingFile, TruncatedFile, ChecksumMismatch: each says what was found and what to do.
        """
        remedy = self.remedy.format(name=name)
        return read_verified(root or self.folder(), name, self.entry(name, root), self.file, remedy)
