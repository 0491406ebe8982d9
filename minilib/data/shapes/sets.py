"""``load("shapes", split, size)``: a fixed number of rendered scenes, for code that wants a data set and not a generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minilib.data.images import tensor_checksum
from minilib.data.registry import SPLITS, register
from minilib.data.shapes.grammar import captions, tokens
from minilib.data.shapes.render import render
from minilib.data.shapes.scenes import Scenes, sample_scenes

COUNTS = {"train": 10_000, "validation": 1_000, "test": 2_000}


@dataclass(frozen=True)
class SceneSet:
    """A split of ``shapes``, whole in memory: pictures in [-1, 1], the scenes they show, their captions as words and tokens."""

    name: str
    split: str
    x: Float[Tensor, "n 3 h w"]
    scenes: Scenes
    captions: tuple[str, ...]
    tokens: Int[Tensor, "n l"]
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.x)


def _loader(texture: bool) -> Callable[[str, int | None], SceneSet]:
    name = "shapes-texture" if texture else "shapes"

    @lru_cache(maxsize=4)
    def generated(split: str, size: int | None) -> SceneSet:
        generator = torch.Generator().manual_seed(1_000 + SPLITS.index(split))
        scenes = sample_scenes(COUNTS[split], generator, objects=(1, 3), split=split, texture=texture)
        x = render(scenes, size or 16)
        return SceneSet(
            name=name,
            split=split,
            x=x,
            scenes=scenes,
            captions=tuple(captions(scenes)),
            tokens=tokens(scenes),
            source="generated (minilib.data.shapes)",
            licence="Apache-2.0",
            checksum=tensor_checksum((x * 127.5).round().to(torch.int16)),
        )

    return generated


register("shapes", _loader(False), sizes=(16, 32, 64))
register("shapes-texture", _loader(True), sizes=(32, 16, 64))
