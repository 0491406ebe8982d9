"""From moving objects to clips, in the manner of ``shapes``: the same shapes, colours, edges and background.

A frame with one object is the picture that :func:`minilib.data.shapes.render` draws of the scene at that time.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from minilib.data.bounce.balls import FRAME_RATE, Balls, frame_times
from minilib.data.shapes import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scenes
from minilib.data.shapes import render_layers as draw
from minilib.data.shapes.render import BACKGROUND, PALETTE

FRAMES = 6
#: Scenes drawn at once: bounds the memory.
CHUNK = 2_048
_ANCHORS = (3.0 / 16.0, 8.0 / 16.0, 13.0 / 16.0)
_WAYS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")


def render(
    balls: Balls, frames: int = FRAMES, height: int | None = None, frame_rate: float = FRAME_RATE
) -> Float[Tensor, "n f 3 h w"]:
    """Clips in [-1, 1]; a later object hides an earlier one.

    Args:
        balls: what moves.
        frames: of each clip; the first is at time 0.
        height: canvas height in pixels; the box's by default. The width follows from the box.
        frame_rate: frames a second.

    Raises:
        ValueError: a height at which the width is no whole number, or a side below 12 pixels; no frame or no rate.
    """
    masks = render_masks(balls, frames, height, frame_rate)
    ground = torch.tensor(BACKGROUND)[:, None, None]
    colours = torch.tensor((*PALETTE, BACKGROUND))[balls.colour]
    image = ground.expand(len(balls), frames, 3, *masks.shape[-2:])
    for slot in range(masks.shape[2]):
        mask = masks[:, :, slot, None]
        image = image + mask * (colours[:, None, slot, :, None, None] - image)
    return 2 * image - 1


def render_masks(
    balls: Balls, frames: int = FRAMES, height: int | None = None, frame_rate: float = FRAME_RATE
) -> Float[Tensor, "n f k h w"]:
    """Each object's coverage in [0, 1], hidden parts included; arguments and errors as in :func:`render`."""
    height, width = canvas(balls, height)
    times = frame_times(frames, frame_rate)
    if not len(balls):
        return torch.zeros(0, frames, balls.shape.shape[1], height, width)
    scenes = scenes_at(balls, times)
    parts = [draw(scenes[at], height, width).masks for at in torch.arange(len(scenes)).split(CHUNK)]
    return torch.cat(parts).unflatten(0, (len(balls), frames))


def canvas(balls: Balls, height: int | None = None) -> tuple[int, int]:
    """Height and width in pixels of a canvas with the box's form. Raises ValueError if the width is no whole number."""
    height = round(balls.box[0]) if height is None else height
    width = height * balls.box[1] / balls.box[0]
    if abs(width - round(width)) > 1e-9:
        raise ValueError(
            f"a box of {balls.box} has no canvas {height} pixels high: its width would be {width:g}"
        )
    return height, round(width)


def scenes_at(balls: Balls, times: Float[Tensor, " t"]) -> Scenes:
    """The still scenes at the given times, clip after clip: ``n t`` of them. An object belongs to the cell it is nearest to.

    So ``shapes.captions`` can say where the objects are, and an oracle of ``shapes`` can read frames.
    """
    place = balls.at(times)[0].flatten(0, 1)  # (n t, k, 2)
    box = torch.tensor(balls.box, dtype=torch.float64)
    share = place / box
    borders = torch.tensor([(a + b) / 2 for a, b in pairwise(_ANCHORS)], dtype=torch.float64)
    third = torch.bucketize(share.contiguous(), borders)
    offset = place - torch.tensor(_ANCHORS, dtype=torch.float64)[third] * box
    shape, colour, size = (
        value[:, None].expand(-1, len(times), -1).flatten(0, 1)
        for value in (balls.shape, balls.colour, balls.size)
    )
    cell = torch.where(shape >= 0, 3 * third[..., 0] + third[..., 1], -1)
    plain = torch.where(shape >= 0, 0, -1)
    offset = offset.float().masked_fill((shape < 0)[..., None], 0.0)
    return Scenes(shape, colour, size, cell, offset, plain, torch.zeros(shape.shape))


def captions(balls: Balls) -> list[str]:
    """What is where at time 0 and where it is going, to the nearest of eight directions.

    >>> from minilib.data.bounce.balls import sample_balls
    >>> captions(sample_balls(1, torch.Generator().manual_seed(0)))
    ['small magenta circle middle right moving down left']
    """
    scenes = scenes_at(balls, frame_times(1))
    eighth = torch.atan2(balls.velocity[..., 0], balls.velocity[..., 1]) / (torch.pi / 4)
    way = eighth.round().long() % 8
    stands = (balls.velocity == 0).all(-1)
    sentences = []
    for i in range(len(balls)):
        parts = []
        for k in balls.present[i].nonzero()[:, 0].tolist():
            row, column = divmod(int(scenes.cell[i, k]), 3)
            motion = "standing still" if stands[i, k] else f"moving {_WAYS[way[i, k]]}"
            looks = (SIZES[balls.size[i, k]], COLOURS[balls.colour[i, k]], SHAPES[balls.shape[i, k]])
            parts.append(" ".join((*looks, ROWS[row], COLUMNS[column], motion)))
        sentences.append(" and ".join(parts))
    return sentences
