"""Which data this process has loaded, so that a record can say so."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

_USED: dict[str, dict[str, Any]] = {}


def note(loaded: T, size: int | None = None) -> T:
    """Remember a loaded set and hand it back. Where there are several sizes, ``size`` is noted with the split.

    The set has ``name``, ``split``, ``source``, ``licence`` and ``checksum``.
    """
    item = _USED.setdefault(loaded.name, {"source": [], "licence": loaded.licence, "splits": {}})  # type: ignore[attr-defined]
    if loaded.source not in item["source"]:  # type: ignore[attr-defined]
        item["source"].append(loaded.source)  # type: ignore[attr-defined]
    split = loaded.split if size is None else f"{loaded.split} {size}"  # type: ignore[attr-defined]
    item["splits"][split] = loaded.checksum  # type: ignore[attr-defined]
    return loaded


def used() -> dict[str, dict[str, Any]]:
    """What was loaded so far: ``{name: {"source": [...], "licence": ..., "splits": {split: checksum}}}``, sorted, plain values.

    >>> from minilib.data import load
    >>> digits = load("digits", "test")
    >>> used()["digits"]["splits"]["test"] == digits.checksum
    True
    """
    return {
        name: {
            "source": list(item["source"]),
            "licence": item["licence"],
            "splits": dict(sorted(item["splits"].items())),
        }
        for name, item in sorted(_USED.items())
    }


def forget() -> None:
    """Start anew."""
    _USED.clear()
