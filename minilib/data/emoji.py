"""``emoji``: captioned pictures, the same concepts in the styles of three design teams; Flickr8k stands in on the hub.

Concepts are held out, not images: what is a test concept in one style is one in all, and so are its variants by gender,
direction or hour. See ``minilib/data/build/emoji.py`` for the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minilib.data import assets, hub
from minilib.data.images import tensor_checksum
from minilib.data.registry import SPLITS, register

STYLES = ("noto", "fluent-3d", "twemoji")
HUB_ID = "jxie/flickr8k"
LICENCE = "Apache-2.0 (Noto), MIT (Fluent), CC BY 4.0 (Twemoji)"


@dataclass(frozen=True)
class CaptionedImageSet:
    """A split of captioned pictures, whole in memory, concept by concept, and the styles within a concept.

    ``x`` holds images in [-1, 1] on white (``(n, 3, h, w)``), ``alpha`` how much of each pixel the drawing covers, in [0, 1]
    (``(n, 1, h, w)``). ``style``, ``concept``, ``group``, ``subgroup`` are ids (``(n,)``); concept ids count through all splits.
    ``captions`` has a name an image, ``tags`` further words. ``index`` is each image's place in the source.
    """

    name: str
    split: str
    x: Float[Tensor, "n 3 h w"]
    alpha: Float[Tensor, "n 1 h w"]
    captions: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]
    style: Int[Tensor, " n"]
    concept: Int[Tensor, " n"]
    group: Int[Tensor, " n"]
    subgroup: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    styles: tuple[str, ...]
    groups: tuple[str, ...]
    subgroups: tuple[str, ...]
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.x)

    def of_style(self, style: str) -> Int[Tensor, " m"]:
        """Places in this split of the pictures of one style, by concept: the same order for every style.

        Raises:
            ValueError: unknown style.
        """
        if style not in self.styles:
            raise ValueError(
                f"unknown style {style!r} of {self.name!r}; expected one of {', '.join(self.styles)}"
            )
        return (self.style == self.styles.index(style)).nonzero().squeeze(1)


@lru_cache(maxsize=1)
def arrays() -> dict[str, np.ndarray]:
    """The asset's arrays: a picture array ``(4, concepts, 32, 32)`` a style, names, tags, group ids and split codes."""
    return assets.open_npz("emoji")


@lru_cache(maxsize=3)
def _vendored(split: str, size: int | None) -> CaptionedImageSet:
    """1,586 concepts, drawn three times each: 1,280 concepts train, 157 validation, 149 test."""
    raw = arrays()
    concept = torch.from_numpy((raw["split"] == SPLITS.index(split)).nonzero()[0])
    rows = concept.numpy()
    rgba = torch.from_numpy(np.stack([raw[style][:, rows] for style in STYLES], axis=2)).float().div(255)
    rgba = rgba.permute(1, 2, 0, 3, 4).flatten(0, 1)
    alpha = rgba[:, 3:]
    x = (rgba[:, :3] * alpha + (1 - alpha)) * 2 - 1
    if size == 16:  # on white, averaging pixels is averaging colours weighted by alpha
        x, alpha = F.avg_pool2d(x, 2), F.avg_pool2d(alpha, 2)
    style = torch.arange(len(STYLES)).repeat(len(rows))
    concept = concept.repeat_interleave(len(STYLES))
    words = {key: raw[key][concept.numpy()].tolist() for key in ("label", "tags")}
    return CaptionedImageSet(
        name="emoji",
        split=split,
        x=x.contiguous(),
        alpha=alpha.contiguous(),
        captions=tuple(words["label"]),
        tags=tuple(tuple(filter(None, tags.split("|"))) for tags in words["tags"]),
        style=style,
        concept=concept,
        group=torch.from_numpy(raw["group"].astype(np.int64))[concept],
        subgroup=torch.from_numpy(raw["subgroup"].astype(np.int64))[concept],
        index=concept * len(STYLES) + style,
        styles=STYLES,
        groups=tuple(raw["groups"].tolist()),
        subgroups=tuple(raw["subgroups"].tolist()),
        source=assets.source(assets.entry("emoji")),
        licence=LICENCE,
        checksum=tensor_checksum(x, alpha),
    )


@lru_cache(maxsize=1)
def _from_hub(split: str, size: int | None) -> CaptionedImageSet:
    """Flickr8k: 8,000 photographs with five captions each; the first is the caption, the others are the tags."""
    rows = hub.table(HUB_ID, split)
    images = [hub.square(picture, size or 32) for picture in rows["image"]]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    index, zeros = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)
    return CaptionedImageSet(
        name="emoji",
        split=split,
        x=x.contiguous(),
        alpha=torch.ones_like(x[:, :1]),
        captions=tuple(rows["caption_0"]),
        tags=tuple(zip(*(rows[f"caption_{i}"] for i in range(1, 5)), strict=True)),
        style=zeros,
        concept=index,
        group=zeros,
        subgroup=zeros,
        index=index,
        styles=("photograph",),
        groups=("everyday scenes",),
        subgroups=("everyday scenes",),
        source=f"Hugging Face hub {HUB_ID} (stands in for emoji)",
        licence="Flickr photographs of many authors, for research; captions CC BY-NC-SA 3.0",
        checksum=tensor_checksum(x),
    )


register("emoji", _vendored, sizes=(32, 16), hub=_from_hub)
