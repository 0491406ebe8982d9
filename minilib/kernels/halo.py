"""Tiles of a grid of tokens, each with a halo: what a local operation needs to become one batch of small dense ones.

A grid is cut into tiles. A query looks at most ``reach`` steps along an axis, so all queries of a tile read within
the tile's *window*: the tile and a rim of ``reach`` tokens around it. Windows overlap; their gather copies, and its adjoint
adds up.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LARGEST_TILE = 32
GATHER_COST = 80.0
"""Cost of gathering a key of the window (and adding its gradient up), in units of a query's dot product with it.

Fitted on one CPU core to forward and backward passes of 18 tile sizes at radius 2 to 16: at those sizes the tile
chosen took at most a tenth more time than the best one. Other sizes were not timed.
"""

Grid = tuple[int, int]


@dataclass(frozen=True)
class Axis:
    """One axis of a grid of ``size`` tokens, in tiles of ``tile``; a window is ``reach`` wider on both sides."""

    size: int
    tile: int
    reach: int

    @property
    def count(self) -> int:
        """Tiles along the axis; the last may be partly outside."""
        return -(-self.size // self.tile)

    @property
    def window(self) -> int:
        """Tokens of a tile with its halo."""
        return self.tile + 2 * self.reach

    def squared_steps(self) -> np.ndarray:
        """(count, tile, window): squared distance from a tile's tokens to its window's, huge to those outside the grid."""
        first = np.arange(self.count)[:, None, None] * self.tile
        tokens = first + np.arange(self.tile)[:, None]
        keys = first - self.reach + np.arange(self.window)
        outside = (keys < 0) | (keys >= self.size)
        return np.where(outside, 2**40, (keys - tokens) ** 2)


Tiling = tuple[Axis, Axis]


def reach_of(radius: float) -> int:
    """Largest integer step r with r^2 < radius^2."""
    return math.isqrt(disk_limit(radius) - 1)


def disk_limit(radius: float) -> int:
    """The integer L with dy^2 + dx^2 < radius^2 exactly if dy^2 + dx^2 < L, for integers dy and dx."""
    return math.ceil(radius * radius)


@lru_cache(maxsize=256)
def choose_tiling(grid: Grid, reach: int, extra: int = 0) -> Tiling:
    """The tiling of least predicted cost, for windows of ``reach`` and ``extra`` keys that every tile reads besides.

    A tile that covers an axis needs no halo there.

    >>> choose_tiling((64, 64), 3)
    (Axis(size=64, tile=8, reach=3), Axis(size=64, tile=8, reach=3))
    >>> choose_tiling((4, 4), 3)
    (Axis(size=4, tile=4, reach=0), Axis(size=4, tile=4, reach=0))
    """
    options = [[_axis(size, tile, reach) for tile in _tile_sizes(size, reach)] for size in grid]
    return min(
        ((y, x) for y in options[0] for x in options[1]),
        key=lambda pair: _cost(pair, extra),
    )


def _tile_sizes(size: int, reach: int) -> list[int]:
    sizes = list(range(1, min(size, LARGEST_TILE) + 1))
    # The whole axis as one tile, if its windows would cover it anyway.
    return sizes if size <= LARGEST_TILE or size > 4 * reach else [*sizes, size]


def _axis(size: int, tile: int, reach: int) -> Axis:
    return Axis(size, tile, 0 if tile >= size else min(reach, size - 1))


def _cost(tiling: Tiling, extra: int) -> float:
    y, x = tiling
    return y.count * x.count * (y.window * x.window + extra) * (y.tile * x.tile + GATHER_COST)


def gather_windows(
    x: Float[Tensor, "b h rows columns d"], tiling: Tiling
) -> Float[Tensor, "tiles b h window d"]:
    """The windows of every tile, zero outside the grid; with ``reach`` 0 the tiles themselves.

    >>> axis = Axis(size=4, tile=2, reach=1)
    >>> one = Axis(size=1, tile=1, reach=0)
    >>> gather_windows(torch.arange(1.0, 5.0).view(1, 1, 1, 4, 1), (one, axis)).flatten(1).tolist()
    [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 0.0]]
    """
    return Gather.apply(x, tiling).flatten(4, 5).flatten(0, 1)


def scatter_tiles(
    tiles: Float[Tensor, "tiles b h tile d"], tiling: Tiling
) -> Float[Tensor, "b h rows columns d"]:
    """Put tiles (without halo) back into the grid: the inverse of ``gather_windows`` at ``reach`` 0."""
    y, x = tiling
    grid = tiles.unflatten(3, (y.tile, x.tile)).unflatten(0, (y.count, x.count))
    whole = grid.permute(2, 3, 0, 4, 1, 5, 6).flatten(4, 5).flatten(2, 3)
    return whole[:, :, : y.size, : x.size]


class Gather(torch.autograd.Function):
    """``gather_windows`` with the two tile axes and the two window axes apart. Its gradient is ``AddUp``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tiling: Tiling) -> Tensor:
        """(b, h, rows, columns, d) -> (tiles down, tiles across, b, h, window rows, window columns, d)."""
        y, x_axis = tiling
        pads = [(axis.reach, axis.count * axis.tile - axis.size + axis.reach) for axis in (x_axis, y)]
        if any(map(any, pads)):
            x = F.pad(x, (0, 0, *pads[0], *pads[1]))
        windows = x.unfold(2, y.window, y.tile).unfold(3, x_axis.window, x_axis.tile)
        return windows.permute(2, 3, 0, 1, 5, 6, 4).contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the tiling."""
        ctx.tiling = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        """Add up where the windows overlap."""
        return AddUp.apply(gradient, ctx.tiling), None


class AddUp(torch.autograd.Function):
    """The adjoint of ``Gather``: every window's values, added where they came from. autograd's own is a third slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(windows: Tensor, tiling: Tiling) -> Tensor:
        """From the shape that ``Gather`` returns to the shape that it takes."""
        y, x = tiling
        out = _overlap_add(windows.permute(2, 3, 0, 4, 1, 5, 6), x, dim=4)
        return _overlap_add(out, y, dim=2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the tiling."""
        ctx.tiling = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        """The adjoint of the adjoint."""
        return Gather.apply(gradient, ctx.tiling), None


def _overlap_add(windows: Tensor, axis: Axis, dim: int) -> Tensor:
    """(..., count, window, ...) -> (..., size, ...). Pieces as wide as a tile do not overlap each other: one addition each."""
    if axis.reach == 0:
        return windows.flatten(dim, dim + 1).narrow(dim, 0, axis.size)
    length = -(-axis.window // axis.tile) * axis.tile + (axis.count - 1) * axis.tile
    out = windows.new_zeros(*windows.shape[:dim], length, *windows.shape[dim + 2 :])
    for start in range(0, axis.window, axis.tile):
        width = min(axis.tile, axis.window - start)
        to = out.narrow(dim, start, axis.count * axis.tile).unflatten(dim, (axis.count, axis.tile))
        to.narrow(dim + 1, 0, width).add_(windows.narrow(dim + 1, start, width))
    return out.narrow(dim, axis.reach, axis.size)
