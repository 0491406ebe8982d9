"""Files that ship with the library are read whole and checked against the size and sha256 their entry gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
