"""One call for every data set: modules register a loader under a name, and :func:`load` finds it.

A set comes from the vendored copy (or the generator) on every machine. The Hugging Face hub's full set is taken instead only in
``gpu`` runs, or when it is asked for by name; which one it was is noted in :mod:`minilib.data.provenance`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minilib.data import provenance

SPLITS = ("train", "validation", "test")
SOURCES = ("auto", "vendored", "hub")


class HubError(RuntimeError):
    """The hub's copy of a data set cannot be had; the message says why and what to use instead."""


@dataclass(frozen=True)
class Registered:
    """A data set: ``vendored(split, size)`` and, where the hub has a full set, ``hub(split, size)``."""

    vendored: Callable[[str, int | None], Any]
    sizes: tuple[int, ...] | None
    hub: Callable[[str, int | None], Any] | None


#: Which module of ``minilib.data`` registers a set: it is imported when the set is asked for, so that a page depends only on
#: the data it uses.
MODULES: dict[str, str] = {
    "bounce": "bounce.sets",
    "bounce-gravity": "bounce.sets",
    "digits": "images",
    "emoji": "emoji",
    "furniture": "furniture",
    "furniture_clouds": "furniture",
    "glyphs": "glyphs.sets",
    "glyphs-wide": "glyphs.sets",
    "mnist10k": "mnist",
    "moving_mnist": "moving_mnist",
    "photos": "photos",
    "shapes": "shapes.sets",
    "shapes-texture": "shapes.sets",
}

_REGISTRY: dict[str, Registered] = {}


def register(
    name: str,
    vendored: Callable[[str, int | None], Any],
    *,
    sizes: tuple[int, ...] | None,
    hub: Callable[[str, int | None], Any] | None = None,
) -> None:
    """Add a data set.

    Args:
        name: what :func:`load` calls it.
        vendored: ``(split, size) -> set``; deterministic and without network. The set has ``name``, ``split``, ``source``,
            ``licence`` and ``checksum``.
        sizes: image sides it can be had in, the native one first; None if the loader checks the size itself.
        hub: the same from the Hugging Face hub; raises :class:`HubError`.

    Raises:
        ValueError: the name is taken by another loader.
    """
    entry = Registered(vendored, sizes, hub)
    if _REGISTRY.get(name, entry) != entry:
        raise ValueError(f"a data set named {name!r} is registered already")
    _REGISTRY[name] = entry


def names() -> list[str]:
    """Names of all data sets."""
    return sorted({*MODULES, *_REGISTRY})


def load(
    name: str,
    split: str = "train",
    size: int | None = None,
    source: str = "auto",
    profile: str | None = None,
) -> Any:
    """Load a split of a data set.

    Args:
        name: one of :func:`names`.
        split: ``"train"``, ``"validation"`` (choose models and settings on it) or ``"test"`` (publish on it).
        size: image side in pixels; None is the set's own size.
        source: ``"vendored"``: the copy that ships with minilib or a dependency, no network. ``"hub"``: the full set from the
            Hugging Face hub. ``"auto"``: the hub in ``gpu`` runs if it answers (a warning if not), else vendored.
        profile: of the run; default the environment variable ``MINILIB_PROFILE``.

    Raises:
        KeyError: unknown name. ValueError: unknown split, size or source, or a set the hub does not have.
        HubError: ``source="hub"`` and the hub does not answer or a package is missing.
    """
    entry = _checked(name, split, size, source)
    if size is None and entry.sizes:
        size = entry.sizes[0]
    noted = size if entry.sizes is None or len(entry.sizes) > 1 else None
    profile = profile or os.environ.get("MINILIB_PROFILE")
    if source == "hub" or (source == "auto" and profile == "gpu" and entry.hub):
        try:
            return provenance.note(entry.hub(split, size), noted)  # type: ignore[misc]
        except HubError as error:
            if source == "hub":
                raise HubError(
                    f"{error}; source='vendored' gives the copy of {name!r} without a network"
                ) from error
            warnings.warn(f"{error}; using the vendored {name!r}", stacklevel=2)
    return provenance.note(entry.vendored(split, size), noted)


def _checked(name: str, split: str, size: int | None, source: str) -> Registered:
    if name not in _REGISTRY and name in MODULES:
        importlib.import_module(f"minilib.data.{MODULES[name]}")
    if name not in _REGISTRY:
        raise KeyError(f"unknown data set {name!r}; known: {', '.join(names())}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {name!r}; expected one of {', '.join(SPLITS)}")
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r} for {name!r}; expected one of {', '.join(SOURCES)}")
    entry = _REGISTRY[name]
    if size is not None and entry.sizes is not None and size not in entry.sizes:
        sides = (
            " or ".join(f"{side} x {side} pixels" for side in entry.sizes) or "many sizes (leave size out)"
        )
        raise ValueError(f"{name!r} has images of {sides}; got size={size}")
    if source == "hub" and entry.hub is None:
        raise ValueError(f"the hub has no copy of {name!r}; use source='vendored'")
    return entry
