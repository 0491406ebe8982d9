"""Local attention with a coarse view of everything: pooled keys and values, one for each patch of the grid.

With small disks a trained model repeats patterns, since no token sees far. The released CLEAR models (Liu et al. 2024, arXiv
2412.16112; ``Huage001/CLEAR``: attention_processor.py, ``LocalDownsampleFlexAttnProcessor``) mend that with keys and
values that are learned averages over patches of d x d tokens, which every image query sees besides its disk.

There are n / d^2 of them for n queries, so the cost grows with n^2 again, divided by d^2.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilib.kernels import local as kernel
from minilib.kernels.halo import Grid

from .functional import fused_attention
from .registry import Mask


def pool_grid(
    x: Float[Tensor, "b h n d"], weight: Float[Tensor, "p q"], grid: Grid
) -> Float[Tensor, "b h patches d"]:
    """Weighted sums over patches: token (i, j) of every patch counts ``weight[i, j]`` times.

    Args:
        x: tokens of the grid in raster order.
        weight: one number for each place of a patch, the same for all patches, heads and channels.
        grid: (rows, columns), both multiples of p.

    Raises:
        ValueError: other tokens than the grid has, a weight that is not square, or patches that do not tile the grid.

    >>> x = torch.arange(8.0).view(1, 1, 8, 1)
    >>> pool_grid(x, torch.full((2, 2), 0.25), (2, 4)).flatten()
    tensor([2.5000, 4.5000])
    """
    rows, columns = grid
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"pooling needs a square weight, got {tuple(weight.shape)}")
    size = len(weight)
    check_pooling(grid, size)
    if x.shape[2] != rows * columns:
        raise ValueError(f"pooling on grid={grid} needs {rows * columns} tokens, got {x.shape[2]}")
    patches = x.unflatten(2, (rows // size, size, columns // size, size))
    return torch.einsum("b h r i c j d, i j -> b h r c d", patches, weight).flatten(2, 3)


def check_pooling(grid: Grid, size: int) -> None:
    """Raise a ValueError unless patches of ``size`` x ``size`` tile the grid."""
    if size < 1 or grid[0] % size or grid[1] % size:
        raise ValueError(f"pooling: patches of {size} x {size} do not tile grid={tuple(grid)}")


class PooledLocalAttention(nn.Module):
    """A processor: disks, extra tokens, and pooled keys and values for the queries of the grid.

    Extra queries, such as a text's, see all single keys and no pooled ones, as in the released code. Keys are pooled as the
    layer gives them, after its norm and rotation. Keys and values share ``weight``; it starts as a plain mean, 1 / pool^2.
    It adds pool^2 parameters a layer.

    Args:
        grid: (rows, columns) of the tokens, multiples of ``pool``.
        radius: of the disks, see ``local_attention``.
        pool: side of a patch; 4 in the released models.

    Raises:
        ValueError: patches that do not tile the grid, or a radius that is not positive.

    >>> attend = PooledLocalAttention(grid=(4, 4), radius=1.5, pool=2)
    >>> q = torch.zeros(1, 2, 18, 8)
    >>> attend(q, q, q).shape, sum(p.numel() for p in attend.parameters())
    (torch.Size([1, 2, 18, 8]), 4)
    """

    def __init__(self, *, grid: Grid, radius: float, pool: int = 4) -> None:
        super().__init__()
        kernel.check_options(grid=tuple(grid), radius=radius)
        check_pooling(grid, pool)
        self.grid, self.radius, self.pool = tuple(grid), radius, pool
        self.weight = nn.Parameter(torch.full((pool, pool), 1 / pool**2))

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """Mix the tokens; the grid's come first, then the extra ones.

        Raises:
            ValueError: fewer tokens than the grid has, or a mask that depends on the query.
        """
        size = self.grid[0] * self.grid[1]
        keys, values = (
            torch.cat([x, pool_grid(x[:, :, :size], self.weight.to(x.dtype), self.grid)], dim=2)
            for x in (k, v)
        )
        options = {"grid": self.grid, "radius": self.radius}
        seen = None if mask is None else _with_pooled(mask, k.shape[2], keys.shape[2])
        image = kernel.local_attention(q[:, :, :size], keys, values, **options, mask=seen)
        if q.shape[2] == size:
            return image
        return torch.cat([image, fused_attention(q[:, :, size:], k, v, mask=mask)], dim=2)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"grid={self.grid}, radius={self.radius}, pool={self.pool}"


def _with_pooled(mask: Tensor, m: int, total: int) -> Tensor:
    """A mask of ``m`` keys, and of pooled ones that all may read."""
    mask = mask.expand(*mask.shape[:-1], m)
    fill = True if mask.dtype == torch.bool else 0.0
    return torch.cat([mask, mask.new_full((*mask.shape[:-1], total - m), fill)], dim=-1)
