"""Labelled image sets, and the smallest of them: ``digits``. Every set says where it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minilib.data.registry import SPLITS, load, names, register

__all__ = ["SPLITS", "ImageSet", "load", "names", "split_by_rank", "tensor_checksum"]


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


def tensor_checksum(*tensors: Tensor) -> str:
    """sha256 of the raw values, so that a record can say exactly which data it used."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def split_by_rank(y: Int[Tensor, " n"], split: str) -> Int[Tensor, " m"]:
    """Indices of a split by rank within the class, modulo 10: two tenths test, one tenth validation, the rest train.

    It needs no random number, so it can never change.

    >>> split_by_rank(torch.zeros(10, dtype=torch.long), "test")
    tensor([0, 1])
    """
    place = torch.zeros_like(y)
    for label in y.unique():
        members = (y == label).nonzero().squeeze(1)
        place[members] = torch.arange(len(members)) % 10
    mask = {"test": place < 2, "validation": place == 2, "train": place > 2}[split]
    return mask.nonzero().squeeze(1)


@lru_cache(maxsize=len(SPLITS))
def _digits(split: str, size: int | None = None) -> ImageSet:
    """1,797 handwritten digits of 13 people, 8 x 8 pixels, 17 grey levels (UCI optdigits, the copy inside scikit-learn).

    The split is by rank within the class. The writers are not known, so a writer may be on both sides.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    y = torch.tensor(raw.target, dtype=torch.long)
    index = split_by_rank(y, split)
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


register("digits", _digits, sizes=(8,))
