"""What the variants on a grid of tokens share: checks of options and shapes, and cutting a grid into cells.

A grid is (rows, columns), or (frames, rows, columns), or any number of axes; its tokens are in raster order.
"""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Sizes = int | Sequence[int]


def check_grid(name: str, grid: Sequence[int], *, axes: tuple[int, ...] = ()) -> tuple[int, ...]:
    """``grid`` as a tuple.

    Raises:
        ValueError: not a sequence of positive whole numbers, or not of one of the numbers of ``axes``.

    >>> check_grid("window", [2, 3])
    (2, 3)
    """
    sizes = tuple(grid) if isinstance(grid, Sequence) and not isinstance(grid, str) else ()
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"attention {name!r}: grid={grid!r} has to be sizes of at least 1, such as (8, 8)")
    if axes and len(sizes) not in axes:
        wanted = " or ".join(map(str, axes))
        raise ValueError(f"attention {name!r}: grid={grid!r} has {len(sizes)} axes, expected {wanted}")
    return sizes


def per_axis(name: str, option: str, value: Sizes, grid: Sequence[int], *, least: int = 1) -> tuple[int, ...]:
    """One whole number for every axis of ``grid``; a single number stands for all of them.

    Raises:
        ValueError: another number of axes, or a number below ``least``.

    >>> per_axis("window", "window", 4, (8, 8))
    (4, 4)
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(grid)
    if len(values) != len(grid) or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(
            f"attention {name!r}: {option}={value!r} has to be a whole number of at least {least}, or one for each "
            f"of the {len(grid)} axes of grid={tuple(grid)}"
        )
    return values


def check_tokens(name: str, grid: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q, k and v have one token for each place of ``grid``, and the same batch, heads and width.

    Raises:
        ValueError: they have not.
    """
    if not (q.shape == k.shape == v.shape) or q.ndim != 4 or q.shape[2] != prod(grid):
        raise ValueError(
            f"attention {name!r} on grid={tuple(grid)} needs q, k and v of shape (b, h, {prod(grid)}, d), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def refuse_mask(name: str, mask: Tensor | None) -> None:
    """Raise if there is a mask.

    Raises:
        ValueError: there is.
    """
    if mask is not None:
        raise ValueError(
            f"attention {name!r} takes no mask, got one of shape {tuple(mask.shape)}: use attention 'full' with a mask"
        )


def padding(grid: Sequence[int], cell: Sequence[int]) -> tuple[int, ...]:
    """Places to add at the end of each axis, so that the cells divide the grid.

    >>> padding((8, 5), (4, 3))
    (0, 1)
    """
    return tuple(-size % step for size, step in zip(grid, cell, strict=True))


def same_rows(ids: Int[Tensor, "n axes"]) -> Bool[Tensor, "n n"]:
    """True for the pairs of tokens with the same ids on every axis."""
    return (ids[:, None] == ids[None]).all(-1)


def to_cells(
    x: Float[Tensor, "b h n d"],
    grid: Sequence[int],
    cell: Sequence[int],
    *,
    shift: Sequence[int] | None = None,
) -> Float[Tensor, "bh cells size d"]:
    """Cut the grid into cells, in raster order, and so the tokens of each; zeros are added where cells overhang.

    With ``shift`` the padded grid is first rolled backwards by so many places.
    """
    d, axes = x.shape[-1], len(grid)
    x = x.reshape(-1, *grid, d)
    pads = padding(grid, cell)
    if any(pads):
        x = F.pad(x, [0, 0, *(p for pad in reversed(pads) for p in (0, pad))])
    if shift is not None and any(shift):
        x = x.roll([-s for s in shift], dims=list(range(1, axes + 1)))
    counts = [(size + pad) // step for size, pad, step in zip(grid, pads, cell, strict=True)]
    x = x.reshape(-1, *(part for pair in zip(counts, cell, strict=True) for part in pair), d)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    batch = x.shape[0]
    return x.permute(order).reshape(batch, prod(counts), prod(cell), d)


def from_cells(
    x: Float[Tensor, "bh cells size d"],
    grid: Sequence[int],
    cell: Sequence[int],
    *,
    heads: int,
    shift: Sequence[int] | None = None,
) -> Float[Tensor, "b h n d"]:
    """Undo ``to_cells``."""
    (batch, *_, d), axes = x.shape, len(grid)
    pads = padding(grid, cell)
    counts = [(size + pad) // step for size, pad, step in zip(grid, pads, cell, strict=True)]
    x = x.reshape(batch, *counts, *cell, d)
    order = [0, *(axis + part for axis in range(1, axes + 1) for part in (0, axes)), 2 * axes + 1]
    x = x.permute(order).reshape(batch, *(c * s for c, s in zip(counts, cell, strict=True)), d)
    if shift is not None and any(shift):
        x = x.roll(list(shift), dims=list(range(1, axes + 1)))
    if any(pads):
        x = x[(slice(None), *(slice(size) for size in grid))]
    return x.reshape(batch // heads, heads, prod(grid), d)
