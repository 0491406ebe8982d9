"""Where the files that travel with minilib are: in a checkout of the repository, or inside an installed wheel."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def repo_root() -> Path | None:
    """The checkout this package is imported from, or None when it was installed from a wheel.

    The environment variable ``MINILIB_ROOT`` names another checkout: cards, constraints and records are then those.
    """
    given = os.environ.get("MINILIB_ROOT")
    if given:
        if not (Path(given) / "reproductions").is_dir():
            raise FileNotFoundError(
                f"MINILIB_ROOT is {given!r}, which has no folder reproductions/; name a checkout"
            )
        return Path(given).resolve()
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "reproductions").is_dir() else None


def reproductions_dir() -> Path:
    """The folder with one sub-folder a paper: its card and its records."""
    root = repo_root()
    return root / "reproductions" if root else _PACKAGE / "_reproductions"


def constraints_path() -> Path:
    """The one resolution of dependencies that published runs use."""
    root = repo_root()
    return root / "constraints.txt" if root else _PACKAGE / "_constraints.txt"


def zoo_dir() -> Path:
    """The folder of shipped checkpoints: ``zoo.toml``, ``<name>.safetensors``, ``<name>.md``."""
    return _PACKAGE / "assets" / "zoo"


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all: to a temporary file in the same folder, then moved over the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; published files follow the user's umask instead.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(tmp, 0o666 & ~umask)
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise
