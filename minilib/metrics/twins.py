"""Do two objects in opposite corners agree? Read off the pixels, without a trained judge.

Scenes with ``mode="twins"`` (:mod:`minilib.data.shapes`) have two objects of one colour in opposite corners. A model in
which the corners cannot hear of each other has to guess: with six colours it agrees in one picture of six.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minilib.data.shapes.render import BACKGROUND, PALETTE

CORNERS = ("top left", "top right", "bottom left", "bottom right")
EMPTY = -1


def corner_colours(x: Float[Tensor, "n 3 h w"], *, least: float = 0.4) -> Int[Tensor, "n 4"]:
    """The colour in each corner, an index into ``COLOURS``, or ``EMPTY``; corners in the order of ``CORNERS``.

    A corner is a third of the picture on each side. Its colour is that of the palette whose direction from the background is
    nearest to the direction of the mean over the pixels that differ most (a quarter of those of a corner).

    Args:
        x: pictures in [-1, 1], square.
        least: a corner whose most different pixel is nearer to the background (in RGB from 0 to 1) is empty.

    Raises:
        ValueError: pictures that are not square, or a side that three does not divide.

    >>> corner_colours(torch.full((1, 3, 12, 12), -0.8)).tolist()
    [[-1, -1, -1, -1]]
    """
    side = x.shape[-1]
    if x.shape[-2] != side or side % 3:
        raise ValueError(
            f"pictures of {x.shape[-2]} x {side} given: square ones with a side that 3 divides are read"
        )
    away = (x + 1) / 2 - torch.tensor(BACKGROUND, device=x.device).view(3, 1, 1)
    palette = torch.tensor(PALETTE, device=x.device) - torch.tensor(BACKGROUND, device=x.device)
    third, found = side // 3, []
    for rows in (slice(0, third), slice(-third, None)):
        for columns in (slice(0, third), slice(-third, None)):
            pixels = away[:, :, rows, columns].flatten(2)
            size = pixels.norm(dim=1)
            top = size.topk(max(1, third * third // 4), dim=1).indices
            mean = pixels.gather(2, top.unsqueeze(1).expand(-1, 3, -1)).mean(2)
            colour = (
                torch.nn.functional.normalize(mean, dim=1) @ torch.nn.functional.normalize(palette, dim=1).T
            ).argmax(1)
            found.append(torch.where(size.amax(1) >= least, colour, EMPTY))
    return torch.stack(found, 1)


class Twins(NamedTuple):
    """``valid``: share of pictures with objects in two opposite corners and no other. ``same``: share of these of one colour.

    ``same`` is NaN where no picture is valid.
    """

    valid: float
    same: float


def twin_consistency(x: Float[Tensor, "n 3 h w"]) -> Twins:
    """How often two objects in opposite corners agree in colour; chance is 1 / 6 where colours are balanced.

    Raises:
        ValueError: no pictures, or as :func:`corner_colours`.
    """
    if len(x) == 0:
        raise ValueError("no pictures given: a share needs at least one")
    colours = corner_colours(x)
    there = colours != EMPTY
    main, other = there[:, [0, 3]].all(1), there[:, [1, 2]].all(1)
    valid = (there.sum(1) == 2) & (main | other)
    first = torch.where(main, colours[:, 0], colours[:, 1])
    second = torch.where(main, colours[:, 3], colours[:, 2])
    equal = (first == second)[valid]
    return Twins(float(valid.double().mean()), float(equal.double().mean()))


def border_excess(x: Float[Tensor, "n c h w"], window: int, pixels: int = 1) -> float:
    """Squared differences of neighbours across borders of windows over those inside windows, means; 1 where borders do not show.

    Args:
        x: pictures.
        window: side of a window in tokens.
        pixels: side of a token in pixels.

    Raises:
        ValueError: no border lies in the picture, or nothing lies inside a window.

    >>> x = torch.zeros(1, 1, 4, 4)
    >>> x[..., 2:] = 1.0
    >>> border_excess(x + torch.arange(4.0).view(4, 1), window=2) > 1
    True
    """
    step = window * pixels
    if step < 2 or step >= max(x.shape[-2:]):
        raise ValueError(
            f"windows of {step} pixels in a picture of {tuple(x.shape[-2:])}: no border, or nothing inside"
        )
    across, inside = [], []
    for axis in (-2, -1):
        change = x.diff(dim=axis).square().mean(dim=tuple(d for d in range(x.ndim) if d != x.ndim + axis))
        at_border = torch.arange(1, len(change) + 1, device=x.device) % step == 0
        across.append(change[at_border])
        inside.append(change[~at_border])
    return float(torch.cat(across).mean() / torch.cat(inside).mean())
