"""``mnist10k``: 10,000 real handwritten digits of MNIST, vendored; the full 70,000 from the hub."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minilib.data import assets, hub
from minilib.data.images import ImageSet, split_by_rank, tensor_checksum
from minilib.data.registry import register

HUB_ID = "ylecun/mnist"
LICENCE = "CC BY-SA 3.0"


@lru_cache(maxsize=6)
def _vendored(split: str, size: int | None) -> ImageSet:
    """The split is by rank within the class, as of ``digits``; which of MNIST's own splits an image is from is not known."""
    arrays = assets.open_npz("mnist10k")
    images, y = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
    index = split_by_rank(y, split)
    return _image_set(images[index], y[index], index, split, size, assets.source(assets.entry("mnist10k")))


@lru_cache(maxsize=2)
def _from_hub(split: str, size: int | None) -> ImageSet:
    """MNIST's own test part; of its training part every tenth image of a class (rank 2 modulo 10) is the validation split."""
    rows = hub.table(HUB_ID, "test" if split == "test" else "train")
    images = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in rows["image"]]))
    y = torch.tensor(rows["label"], dtype=torch.long)
    index = torch.arange(len(y))
    if split != "test":
        held_out = torch.isin(index, split_by_rank(y, "validation"))
        index = index[held_out if split == "validation" else ~held_out]
    return _image_set(images[index], y[index], index, split, size, f"Hugging Face hub {HUB_ID}")


def _image_set(
    images: Tensor, y: Tensor, index: Tensor, split: str, size: int | None, source: str
) -> ImageSet:
    """Grey levels 0..255 to [-1, 1]; 32 pixels are 28 with two of background on each side."""
    x = images.float().div(127.5).sub(1).unsqueeze(1)
    if size == 32:
        x = F.pad(x, (2, 2, 2, 2), value=-1.0)
    return ImageSet(
        name="mnist10k",
        split=split,
        x=x,
        y=y,
        index=index,
        num_classes=10,
        source=source,
        licence=LICENCE,
        checksum=tensor_checksum(x, y),
    )


register("mnist10k", _vendored, sizes=(28, 32), hub=_from_hub)
