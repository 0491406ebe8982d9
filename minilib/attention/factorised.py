"""Attention of a video, factorised: over the places of each frame ("spatial"), or over the frames of each place ("temporal").

One after the other, as in ViViT's model 3 (Arnab et al. 2021, arXiv 2103.15691) and in video diffusion transformers,
they cost frames * places * (frames + places) in the place of (frames * places)**2.
"""

from collections.abc import Sequence
from functools import partial
from math import prod

from jaxtyping import Bool, Float
from torch import Tensor

from .functional import fused_attention, naive_attention
from .grids import check_grid, check_tokens, refuse_mask, same_rows
from .registry import Case, Mask, register_attention
from .rope import grid_ids

CASES = (
    Case({"grid": (2, 3, 2)}, n=12),
    Case({"grid": (3, 5)}, n=15),
    Case({"grid": (1, 2, 3)}, n=6),
    Case({"grid": (4, 1)}, n=4),
    Case({"grid": (1, 1)}, n=1),
)


def spatial_sees(n: int, m: int, *, grid: Sequence[int]) -> Bool[Tensor, "n n"]:
    """Tokens of one frame see each other."""
    return same_rows(grid_ids(*grid)[:, :1])


def temporal_sees(n: int, m: int, *, grid: Sequence[int]) -> Bool[Tensor, "n n"]:
    """Tokens of one place see each other."""
    return same_rows(grid_ids(*grid)[:, 1:])


def _reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None = None, grid: Sequence[int], spatial: bool
) -> Tensor:
    sees = spatial_sees if spatial else temporal_sees
    return naive_attention(q, k, v, mask=sees(q.shape[2], k.shape[2], grid=grid).to(q.device))


def _flops(b: int, h: int, n: int, m: int, d: int, *, grid: Sequence[int], spatial: bool) -> int:
    return 4 * b * h * n * d * (prod(grid[1:]) if spatial else grid[0])


def _check(*, grid: Sequence[int], name: str) -> None:
    check_grid(name, grid, axes=(2, 3))


@register_attention(
    "spatial",
    reference=partial(_reference, spatial=True),
    sees=spatial_sees,
    flops=partial(_flops, spatial=True),
    check=partial(_check, name="spatial"),
    cases=CASES,
)
def spatial_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    grid: Sequence[int],
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention inside each frame.

    ``grid`` is (frames, rows, columns) or (frames, tokens of a frame).

    Raises:
        ValueError: a mask, or not one token for each place of the grid.
    """
    refuse_mask("spatial", mask)
    check_tokens("spatial", grid, q, k, v)
    frames = (x.reshape(-1, grid[0], prod(grid[1:]), x.shape[-1]) for x in (q, k, v))
    return fused_attention(*frames).reshape(q.shape)


@register_attention(
    "temporal",
    reference=partial(_reference, spatial=False),
    sees=temporal_sees,
    flops=partial(_flops, spatial=False),
    check=partial(_check, name="temporal"),
    cases=CASES,
)
def temporal_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    *,
    grid: Sequence[int],
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention of each place over the frames; ``grid`` as in ``spatial_attention``.

    Raises:
        ValueError: a mask, or not one token for each place of the grid.
    """
    refuse_mask("temporal", mask)
    check_tokens("temporal", grid, q, k, v)
    places = (x.reshape(-1, grid[0], prod(grid[1:]), x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    return fused_attention(*places).transpose(1, 2).reshape(q.shape)
