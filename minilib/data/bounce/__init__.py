"""``bounce``: objects that fly about in a box, with exact paths, exact times of all wall hits, and a click at each hit.

>>> import torch
>>> balls = sample_balls(1, torch.Generator().manual_seed(0))
>>> captions(balls)
['small magenta circle middle right moving down left']
>>> render(balls, frames=6, height=32).shape
torch.Size([1, 6, 3, 32, 32])
"""

from minilib.data.bounce.balls import (
    CENTROIDS,
    FRAME_RATE,
    MAX_BALLS,
    WALLS,
    Balls,
    Hits,
    frame_times,
    sample_balls,
    wall_hits,
)
from minilib.data.bounce.render import FRAMES, canvas, captions, render, render_masks, scenes_at
from minilib.data.bounce.sets import BounceSet
from minilib.data.bounce.sound import PITCHES, SAMPLE_RATE, clicks, soundtrack

__all__ = [
    "CENTROIDS", "FRAMES", "FRAME_RATE", "MAX_BALLS", "PITCHES", "SAMPLE_RATE", "WALLS", "Balls", "BounceSet", "Hits", "canvas",
    "captions", "clicks", "frame_times", "render", "render_masks", "sample_balls", "scenes_at", "soundtrack", "wall_hits",
]  # fmt: skip
