"""Window attention: the grid is cut into windows that do not overlap, and tokens see those of their own window.

With a shift the cuts move (Swin, Liu et al. 2021, arXiv 2103.14030, section 3.2, and ``microsoft/Swin-Transformer:
models/swin_transformer.py``): blocks without and with a shift in turn pass information from window to window. The
grid is rolled so that the number of windows stays the same; tokens that only the roll brought together do not see
each other.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .functional import fused_attention, naive_attention
from .grids import (
    Sizes,
    check_grid,
    check_tokens,
    from_cells,
    padding,
    per_axis,
    refuse_mask,
    same_rows,
    to_cells,
)
from .registry import Case, Mask, register_attention
from .rope import grid_ids


def check_window(grid: Sequence[int], window: Sizes, shift: Sizes = 0) -> None:
    """Raise unless these options of "window" can be.

    Raises:
        ValueError: a grid or window without places, a shift that is not smaller than the window.
    """
    sizes = check_grid("window", grid)
    windows = per_axis("window", "window", window, sizes)
    shifts = per_axis("window", "shift", shift, sizes, least=0)
    if any(s >= w for s, w in zip(shifts, windows, strict=True)):
        raise ValueError(f"attention 'window': shift={shift!r} has to be smaller than window={window!r}")


def _fitted(grid: Sequence[int], window: Sizes, shift: Sizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and shift on each axis; an axis that one window covers is not shifted, as in Swin."""
    windows = per_axis("window", "window", window, grid)
    shifts = per_axis("window", "shift", shift, grid, least=0)
    covered = [w >= size for w, size in zip(windows, grid, strict=True)]
    return (
        tuple(size if all_ else w for size, w, all_ in zip(grid, windows, covered, strict=True)),
        tuple(0 if all_ else s for s, all_ in zip(shifts, covered, strict=True)),
    )


def window_sees(
    n: int, m: int, *, grid: Sequence[int], window: Sizes, shift: Sizes = 0
) -> Bool[Tensor, "n n"]:
    """Which pairs of tokens share a window: those with the same (place - shift) // window on every axis."""
    windows, shifts = _fitted(grid, window, shift)
    return same_rows(
        (grid_ids(*grid) - torch.tensor(shifts)).div(torch.tensor(windows), rounding_mode="floor")
    )


@lru_cache(maxsize=64)
def _cell_mask(grid: tuple[int, ...], windows: tuple[int, ...], shifts: tuple[int, ...]) -> np.ndarray | None:
    """(1, windows, size, size): who sees whom inside the rolled windows; None if everybody does.

    A numpy array, since a cached tensor would remember the mode (inference, fake) it was made in. Padding sees
    padding, so that no row is empty.
    """
    pads = padding(grid, windows)
    if not any(pads) and not any(shifts):
        return None
    group = np.zeros((), dtype=np.int64)
    padded = np.zeros((), dtype=bool)
    for size, pad, window, shift in zip(grid, pads, windows, shifts, strict=True):
        place = np.roll(np.arange(size + pad), -shift)
        group = group[..., None] * (size + 2) + (place - shift) // window + 1
        padded = padded[..., None] | (place >= size)
    group = np.where(padded, -1, group)
    # Cut into windows as ``to_cells`` does.
    counts = [total // window for total, window in zip(group.shape, windows, strict=True)]
    axes = len(grid)
    cells = group.reshape([part for pair in zip(counts, windows, strict=True) for part in pair])
    cells = cells.transpose([*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]).reshape(1, prod(counts), -1)
    return cells[..., :, None] == cells[..., None, :]


def window_reference(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    mask: Mask | None = None,
    **options: Sizes,
) -> Float[Tensor, "b h n d"]:
    """Full attention with a mask: N x N work for what windows do in N x (window size)."""
    return naive_attention(q, k, v, mask=window_sees(q.shape[2], k.shape[2], **options).to(q.device))


def window_flops(
    b: int, h: int, n: int, m: int, d: int, *, grid: Sequence[int], window: Sizes, shift: Sizes = 0
) -> int:
    """4 b h d (padded tokens) (tokens of a window)."""
    windows, _ = _fitted(grid, window, shift)
    padded = prod(size + pad for size, pad in zip(grid, padding(grid, windows), strict=True))
    return 4 * b * h * padded * prod(windows) * d


@register_attention(
    "window",
    reference=window_reference,
    sees=window_sees,
    flops=window_flops,
    check=check_window,
    cases=(
        Case({"grid": (4, 4), "window": 2}, n=16),
        Case({"grid": (4, 6), "window": (2, 3), "shift": (1, 1)}, n=24),
        # Here padding shares windows with tokens, on both axes.
        Case({"grid": (5, 7), "window": 3, "shift": (1, 2)}, n=35),
        Case({"grid": (2, 4, 3), "window": (1, 2, 2), "shift": (0, 1, 1)}, n=24),
        Case({"grid": (1, 1), "window": 4, "shift": 2}, n=1),
    ),
)
def window_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    grid: Sequence[int],
    window: Sizes,
    shift: Sizes = 0,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention inside each window of a grid, as one batched call.

    Windows that overhang the end of the grid hold fewer tokens. An axis that one window covers is not shifted.

    Args:
        q: queries, one for each place of the grid.
        k: keys, likewise.
        v: values, likewise.
        grid: sizes of the axes.
        window: sizes of a window, or one for all axes; (1, 8, 8) is 8 x 8 inside each frame of a video.
        shift: by how much the cuts move along each axis, less than the window; usually half of it.
        mask: not taken.

    Raises:
        ValueError: a mask, or not one token for each place of the grid.
    """
    refuse_mask("window", mask)
    check_tokens("window", grid, q, k, v)
    grid = tuple(grid)
    windows, shifts = _fitted(grid, window, shift)
    allowed = _cell_mask(grid, windows, shifts)
    cells = (to_cells(x, grid, windows, shift=shifts) for x in (q, k, v))
    out = fused_attention(*cells, mask=None if allowed is None else torch.as_tensor(allowed, device=q.device))
    return from_cells(out, grid, windows, heads=q.shape[1], shift=shifts)
