"""Local attention: every token of a grid reads the tokens in a disk around it, and the extra tokens, such as a text's.

CLEAR (Liu et al. 2024, arXiv 2412.16112) puts it in the place of full attention in trained models, whose weights it keeps.
How it is computed is the business of ``minilib.kernels.local``, which leaves out the work and not only the result.
"""

from math import prod

from jaxtyping import Bool, Float
from torch import Tensor

from minilib.kernels import local as kernel
from minilib.kernels.halo import Grid, choose_tiling, reach_of

from .registry import Case, Mask, register_attention


def local_sees(n: int, m: int, *, grid: Grid, radius: float) -> Bool[Tensor, "n m"]:
    """Which of ``m`` keys each of ``n`` queries sees.

    >>> local_sees(3, 4, grid=(1, 3), radius=1.5).int().tolist()
    [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    """
    return kernel.disk_mask(tuple(grid), radius, n, m)


def local_flops(b: int, h: int, n: int, m: int, d: int, *, grid: Grid, radius: float) -> int:
    """FLOPs of the products that are taken off a GPU: of each tile with its window, of extra tokens with all.

    A tile and its window are squares, the disk is not: about twice as many as the pairs that see each other need.
    """
    size = prod(grid)
    y, x = choose_tiling(tuple(grid), reach_of(radius), m - size)
    image = y.count * x.count * y.tile * x.tile * (y.window * x.window + m - size)
    return 4 * b * h * d * (image + (n - size) * m)


CASES = (
    Case({"grid": (3, 3), "radius": 1.2}, n=9),
    Case({"grid": (5, 7), "radius": 2.3}, n=35),
    Case({"grid": (1, 1), "radius": 1}, n=1),
    Case({"grid": (9, 10), "radius": 2}, n=90),
    Case({"grid": (3, 4), "radius": 2}, n=14, m=15),
    Case({"grid": (2, 40), "radius": 3}, n=80, m=81),
    Case({"grid": (4, 4), "radius": 100}, n=16),
)


@register_attention(
    "local",
    reference=kernel.reference,
    sees=local_sees,
    flops=local_flops,
    cases=CASES,
    check=kernel.check_options,
)
def local_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    grid: Grid,
    radius: float,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention to the keys with dy^2 + dx^2 < radius^2 and to the extra ones (arXiv 2412.16112, section 3.2).

    Tokens beyond the grid's rows x columns, which come first, are extra: they see all and all see them. With a radius of
    at least the grid's diagonal it is full attention. A mask has to be one of keys, the same for all heads and queries, as
    ``joint_mask`` makes it.

    Raises:
        ValueError: fewer tokens than the grid has, a radius that is not positive, a mask that depends on the query.
    """
    return kernel.local_attention(q, k, v, grid=tuple(grid), radius=radius, mask=mask)
