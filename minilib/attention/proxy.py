"""Proxy-token attention (PT-DiT, Wang et al. 2024, arXiv 2409.04005): a cell of the grid speaks through its mean.

The mean of each cell is its proxy. The proxies attend to each other, then every token reads from the proxies: with
M proxies for N tokens, M M + N M weights in the place of N N. In the paper the two steps are layers with projections
of their own, and the proxies keep what they had (a residual); here, between one projection to q, k and v and one to
the output, they are softmax(q K^T) softmax(Q K^T) V, where Q, K and V are the means of q, k and v over cells.
The mean is what the released code uses; the paper's first version draws a token of the cell at random.
"""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from .functional import fused_attention, naive_attention
from .grids import Sizes, check_grid, check_tokens, padding, per_axis, refuse_mask, to_cells
from .registry import Case, Mask, register_attention
from .rope import grid_ids


def check_proxy(grid: Sequence[int], cell: Sizes) -> None:
    """Raise unless these options of "proxy" can be.

    Raises:
        ValueError: a grid or a cell without places.
    """
    per_axis("proxy", "cell", cell, check_grid("proxy", grid))


def cell_means(
    x: Float[Tensor, "b h n d"], grid: Sequence[int], cell: Sequence[int]
) -> Float[Tensor, "b h cells d"]:
    """The mean over each cell of the grid; a cell that overhangs the end is the mean of the tokens it has.

    >>> cell_means(torch.arange(6.0).view(1, 1, 6, 1), (2, 3), (2, 2)).flatten().tolist()
    [2.0, 3.5]
    """
    cells = to_cells(x, grid, cell)
    if any(padding(grid, cell)):
        count = to_cells(x.new_ones(1, 1, prod(grid), 1), grid, cell).sum(2)
        means = cells.sum(2) / count
    else:
        means = cells.mean(2)
    return means.view(*x.shape[:2], cells.shape[1], x.shape[-1])


def proxy_reference(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    mask: Mask | None = None,
    grid: Sequence[int],
    cell: Sizes,
) -> Float[Tensor, "b h n d"]:
    """The means by a matrix (cells, n) of averages, the rest by the equation."""
    cells = (grid_ids(*grid) // torch.tensor(per_axis("proxy", "cell", cell, grid))).tolist()
    names = sorted(map(list, {tuple(place) for place in cells}))
    member = torch.tensor([[place == name for place in cells] for name in names], device=q.device).to(q.dtype)
    average = member / member.sum(1, keepdim=True)
    queries, keys, values = (average @ x for x in (q, k, v))
    return naive_attention(q, keys, naive_attention(queries, keys, values))


def proxy_flops(b: int, h: int, n: int, m: int, d: int, *, grid: Sequence[int], cell: Sizes) -> int:
    """4 b h d (M M + n M) with M cells."""
    steps = per_axis("proxy", "cell", cell, grid)
    cells = prod(-(-size // step) for size, step in zip(grid, steps, strict=True))
    return 4 * b * h * d * (cells * cells + n * cells)


@register_attention(
    "proxy",
    reference=proxy_reference,
    flops=proxy_flops,
    check=check_proxy,
    cases=(
        Case({"grid": (4, 4), "cell": 2}, n=16),
        Case({"grid": (5, 3), "cell": (2, 2)}, n=15),
        Case({"grid": (2, 4, 3), "cell": (1, 2, 3)}, n=24),
        Case({"grid": (1, 1), "cell": 1}, n=1),
    ),
)
def proxy_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    grid: Sequence[int],
    cell: Sizes,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Attention among the means of cells, from which every token then reads.

    Args:
        q: queries, one for each place of the grid.
        k: keys, likewise.
        v: values, likewise.
        grid: sizes of the axes.
        cell: sizes of a cell, or one for all axes; the paper's is (1, 4, 4) in a video.
        mask: not taken.

    Raises:
        ValueError: a mask, or not one token for each place of the grid.
    """
    refuse_mask("proxy", mask)
    check_tokens("proxy", grid, q, k, v)
    cells = per_axis("proxy", "cell", cell, grid)
    queries, keys, values = (cell_means(x, grid, cells) for x in (q, k, v))
    return fused_attention(q, keys, fused_attention(queries, keys, values))
