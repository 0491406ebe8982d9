"""From scenes to pictures, on any canvas, with the exact masks, depth, edges and boxes.

Each object is a signed distance function (negative inside). A pixel's coverage is ``clamp(1/2 - distance, 0, 1)`` with the
distance in pixels: smooth edges of one pixel, at every resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minilib.data.shapes.scenes import SHAPES, Scenes

#: Radius of small and large objects in reference pixels: the small ones are just large enough to be told apart at 16 pixels.
RADII = (2.1, 2.8)
#: Red, green and blue in [0, 1]; the order of ``COLOURS``.
PALETTE = (
    (0.92, 0.20, 0.18),
    (0.16, 0.72, 0.28),
    (0.22, 0.40, 0.96),
    (0.98, 0.86, 0.18),
    (0.86, 0.28, 0.84),
    (0.20, 0.86, 0.90),
)
BACKGROUND = (0.10, 0.10, 0.12)
#: Depth of the background, of small and of large objects: large means near.
DEPTHS = (1.0, 0.6, 0.3)
#: Wavelength of the stripes in pixels: fine on any canvas.
STRIPE_PERIOD = 3.0


@dataclass(frozen=True)
class Layers:
    """Everything that is exactly known about rendered scenes.

    ``image`` in [-1, 1]; ``masks`` each object's coverage in [0, 1]; ``depth`` in (0, 1], 1 is the background; ``edges`` 1 on
    the outlines; ``boxes`` (top, left, bottom, right) in pixels, NaN for empty slots.
    """

    image: Float[Tensor, "n 3 h w"]
    masks: Float[Tensor, "n k h w"]
    depth: Float[Tensor, "n 1 h w"]
    edges: Float[Tensor, "n 1 h w"]
    boxes: Float[Tensor, "n k 4"]


def render(scenes: Scenes, height: int = 16, width: int | None = None) -> Float[Tensor, "n 3 h w"]:
    """Pictures of the scenes in [-1, 1].

    Args:
        scenes: what to draw.
        height: canvas height in pixels, at least 12.
        width: canvas width; as the height by default. The grid stretches, the objects keep their form.

    Raises:
        ValueError: a side below 12 pixels.
    """
    return render_layers(scenes, height, width).image


def render_layers(scenes: Scenes, height: int = 16, width: int | None = None) -> Layers:
    """Pictures with their masks, depth, edges and boxes; arguments as in :func:`render`."""
    width = height if width is None else width
    if min(height, width) < 12:
        raise ValueError(f"a canvas has at least 12 pixels a side; got {height} x {width}")
    unit = min(height, width) / 16.0
    down, right = _offsets(scenes, height, width, unit)  # pixels from each object's centre, (n, k, h, w)
    radius = torch.tensor((*RADII, 1.0))[scenes.size][..., None, None] * unit
    distance = torch.full_like(down, torch.inf)
    for index in range(len(SHAPES)):
        here = scenes.shape == index
        distance[here] = _DISTANCES[index](right[here], down[here], radius[here])
    masks = (0.5 - distance).clamp(0.0, 1.0)
    colours = torch.tensor((*PALETTE, (0.0, 0.0, 0.0)))[scenes.colour][..., None, None]  # (n, k, 3, 1, 1)
    shade = _stripes(scenes, down, right)[:, :, None]
    inked = (masks[:, :, None] * colours * shade).sum(1)
    empty = (1 - masks.sum(1, keepdim=True)).clamp(min=0.0)
    image = inked + empty * torch.tensor(BACKGROUND)[:, None, None]
    level = torch.tensor((*DEPTHS[1:], DEPTHS[0]))[scenes.size][..., None, None]
    # Depth has no mixed pixels: an object is there where it covers at least half of the pixel.
    solid = distance <= 0.0
    depth = torch.where(solid, level, DEPTHS[0]).amin(1, keepdim=True)
    edges = (distance.abs() <= 0.5).any(1, keepdim=True).float()
    return Layers(2 * image - 1, masks, depth, edges, _boxes(solid))


def _offsets(scenes: Scenes, height: int, width: int, unit: float) -> tuple[Tensor, Tensor]:
    """Pixel centres relative to each object's centre: down and right, in pixels."""
    anchors = torch.tensor([3.0, 8.0, 13.0]) / 16.0
    cell = scenes.cell.clamp(min=0)
    y = anchors[cell // 3] * height + scenes.offset[..., 0] * unit
    x = anchors[cell % 3] * width + scenes.offset[..., 1] * unit
    rows = torch.arange(height) + 0.5
    columns = torch.arange(width) + 0.5
    down = rows[:, None] - y[..., None, None]
    right = columns[None, :] - x[..., None, None]
    return torch.broadcast_tensors(down, right)


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x**2 + y**2).sqrt() - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.82 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Apex up at (0, -r), base corners at (+-r, 0.8 r): the largest distance to the three sides."""
    return torch.maximum(y - 0.8 * r, (1.8 * x.abs() - (y + r)) / 4.24**0.5)


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - r, y - 0.36 * r), torch.maximum(x - 0.36 * r, y - r))


_DISTANCES = (_circle, _square, _triangle, _cross)


def _stripes(scenes: Scenes, down: Tensor, right: Tensor) -> Tensor:
    """Brightness factor in [0.35, 1]; 1 for plain objects."""
    diagonal = 0.5**0.5
    # (down, right) of the wave vector: stripes that run horizontally vary downwards.
    waves = torch.tensor(((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (diagonal, diagonal), (diagonal, -diagonal)))
    direction = waves[scenes.stripe.clamp(min=0)][..., None, None, :]
    angle = 2 * torch.pi / STRIPE_PERIOD * (down * direction[..., 0] + right * direction[..., 1])
    wave = 0.5 + 0.5 * torch.cos(angle + scenes.phase[..., None, None])
    striped = (scenes.stripe > 0)[..., None, None]
    return torch.where(striped, 0.35 + 0.65 * wave, torch.ones(()))


def _boxes(solid: Tensor) -> Tensor:
    """(top, left, bottom, right) of each mask, the last two exclusive."""
    n, k, height, width = solid.shape
    rows, columns = solid.any(3), solid.any(2)

    def ends(line: Tensor, size: int) -> tuple[Tensor, Tensor]:
        place = torch.arange(size)
        first = torch.where(line, place, size).amin(2)
        last = torch.where(line, place + 1, 0).amax(2)
        return first.float(), last.float()

    (top, bottom), (left, right) = ends(rows, height), ends(columns, width)
    boxes = torch.stack([top, left, bottom, right], dim=-1)
    return torch.where(solid.flatten(2).any(2)[..., None], boxes, torch.nan)
