"""``load("glyphs", split, size)``: a fixed number of rendered words, for code that wants a data set and not a generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minilib.data.glyphs.fonts import LICENCES
from minilib.data.glyphs.grammar import captions, tokens
from minilib.data.glyphs.render import render
from minilib.data.glyphs.words import Words, sample_words
from minilib.data.images import tensor_checksum
from minilib.data.registry import SPLITS, register

COUNTS = {"train": 3_000, "validation": 500, "test": 1_000}
LICENCE = "Apache-2.0; drawn with " + ", ".join(f"{font} ({licence})" for font, licence in LICENCES.items())


@dataclass(frozen=True)
class GlyphSet:
    """A split of written words, whole in memory: pictures in [-1, 1], what they show, captions as words and as tokens."""

    name: str
    split: str
    x: Float[Tensor, "n 3 h w"]
    words: Words
    captions: tuple[str, ...]
    tokens: Int[Tensor, "n l"]
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.x)


def _loader(name: str, aspect: int) -> Callable[[str, int | None], GlyphSet]:
    @lru_cache(maxsize=2)
    def generated(split: str, size: int | None) -> GlyphSet:
        height = size or 32
        generator = torch.Generator().manual_seed(2_000 + SPLITS.index(split))
        words = sample_words(COUNTS[split], generator, split=split)
        x = render(words, height, aspect * height)
        return GlyphSet(
            name=name,
            split=split,
            x=x,
            words=words,
            captions=tuple(captions(words)),
            tokens=tokens(words),
            source="generated (minilib.data.glyphs)",
            licence=LICENCE,
            checksum=tensor_checksum((x * 127.5).round().to(torch.int16)),
        )

    return generated


# ``size`` is the height; the wide canvas is three times as wide.
register("glyphs", _loader("glyphs", 1), sizes=(64, 32))
register("glyphs-wide", _loader("glyphs-wide", 3), sizes=(32, 16))
