"""``load("bounce", split, size)``: a fixed number of scenes, for code that wants a data set and not a generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minilib.data.bounce.balls import Balls, sample_balls
from minilib.data.bounce.render import FRAMES, captions, render
from minilib.data.images import tensor_checksum
from minilib.data.registry import SPLITS, register

COUNTS = {"train": 10_000, "validation": 500, "test": 1_000}
GRAVITY = (40.0, 80.0)


@dataclass(frozen=True)
class BounceSet:
    """A split of bouncing objects. The scenes are in memory, the clips are drawn when asked for."""

    name: str
    split: str
    balls: Balls
    captions: tuple[str, ...]
    height: int
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.balls)

    def clips(
        self, which: slice | Int[Tensor, " m"] = slice(None), frames: int = FRAMES
    ) -> Float[Tensor, "m f 3 h w"]:
        """The clips at a slice or index tensor, in [-1, 1]."""
        return render(self.balls[which], frames, self.height)


def _loader(name: str, gravity: tuple[float, float] | None) -> Callable[[str, int | None], BounceSet]:
    @lru_cache(maxsize=6)
    def generated(split: str, size: int | None) -> BounceSet:
        generator = torch.Generator().manual_seed(4_000 + SPLITS.index(split))
        balls = sample_balls(COUNTS[split], generator, gravity=gravity)
        values = (balls.shape, balls.colour, balls.size, balls.start, balls.velocity, balls.gravity)
        return BounceSet(
            name=name,
            split=split,
            balls=balls,
            captions=tuple(captions(balls)),
            height=size or 16,
            source="generated (minilib.data.bounce)",
            licence="Apache-2.0",
            checksum=tensor_checksum(*values),
        )

    return generated


register("bounce", _loader("bounce", None), sizes=(16, 32, 64))
register("bounce-gravity", _loader("bounce-gravity", GRAVITY), sizes=(16, 32, 64))
