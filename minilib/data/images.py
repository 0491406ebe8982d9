"""Labelled image sets. Every set answers to one call, ``load(name, split)``, and says where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ImageSet:
    """A split of a data set, whole in memory.

    ``x`` holds images in [-1, 1] (``(n, c, h, w)``), ``y`` class ids (``(n,)``), ``index`` each image's place in the source.
    """

    name: str
    split: str
    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    num_classes: int
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.x)

    def of_class(self, label: int) -> Float[Tensor, "m c h w"]:
        """The images of one class."""
        return self.x[self.y == label]


def load(name: str, split: str = "train", size: int | None = None, source: str = "auto") -> ImageSet:
    """Load a split of a data set.

    Args:
        name: one of :func:`names`.
        split: ``"train"``, ``"validation"`` (choose models and settings on it) or ``"test"`` (publish on it).
        size: image side in pixels; only the set's own size is known so far.
        source: ``"auto"`` or ``"vendored"``: the copy that ships with the dependencies, no network.

    Raises:
        KeyError: unknown name. ValueError: unknown split, size or source.
    """
    if name not in _LOADERS:
        raise KeyError(f"unknown data set {name!r}; known: {', '.join(names())}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {name!r}; expected one of {', '.join(SPLITS)}")
    if source not in ("auto", "vendored"):
        raise ValueError(f"unknown source {source!r} for {name!r}; expected 'auto' or 'vendored'")
    loader, native = _LOADERS[name]
    if size not in (None, native):
        raise ValueError(f"{name!r} has images of {native} x {native} pixels; got size={size}")
    return loader(split)


def names() -> list[str]:
    """Names of all data sets."""
    return sorted(_LOADERS)


def tensor_checksum(*tensors: Tensor) -> str:
    """sha256 of the raw values, so that a record can say exactly which data it used."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=len(SPLITS))
def _digits(split: str) -> ImageSet:
    """1,797 handwritten digits of 13 people, 8 x 8 pixels, 17 grey levels (UCI optdigits, the copy inside scikit-learn).

    The split is by rank within the class, modulo 10: two tenths test, one tenth validation, the rest train. It needs no
    random number, so it can never change. The writers are not known, so a writer may be on both sides.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    y = torch.tensor(raw.target, dtype=torch.long)
    rank = torch.zeros_like(y)
    for label in range(10):
        members = (y == label).nonzero().squeeze(1)
        rank[members] = torch.arange(len(members))
    place = rank % 10
    mask = {"test": place < 2, "validation": place == 2, "train": place > 2}[split]
    index = mask.nonzero().squeeze(1)
    return ImageSet(
        name="digits",
        split=split,
        x=x[index],
        y=y[index],
        index=index,
        num_classes=10,
        source="scikit-learn load_digits (UCI optdigits, test part)",
        licence="CC BY 4.0",
        checksum=tensor_checksum(x[index], y[index]),
    )


_LOADERS: dict[str, tuple[Callable[[str], ImageSet], int]] = {"digits": (_digits, 8)}
