"""Fixed embeddings of where a patch is and of when it is: sines and cosines, nothing learned."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor


def sincos_1d(
    positions: Num[Tensor, " n"], dim: int, *, max_period: float = 10_000.0
) -> Float[Tensor, "n {dim}"]:
    """Sines, then cosines, of ``positions * max_period**(-i / (dim/2))`` for i < dim/2, in float64.

    Raises:
        ValueError: ``dim`` is odd.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}: half of it are sines, half cosines")
    half = dim // 2
    omega = max_period ** -(torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.to(torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, height: int, width: int) -> Float[Tensor, "{height}*{width} {dim}"]:
    """Positions of a ``height`` x ``width`` grid in raster order, in float32.

    The first half of the vector encodes the column, the second half the row, each as ``sincos_1d``. This is
    the convention of MAE (``facebookresearch/mae: util/pos_embed.py``), used by ``facebookresearch/DiT:
    models.py``, so that weights convert.

    Raises:
        ValueError: ``dim`` is no multiple of 4.

    >>> sincos_2d(4, 1, 2)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0000, 1.0000]])
    """
    if dim < 4 or dim % 4:
        raise ValueError(
            f"dim must be a positive multiple of 4, got {dim}: sine and cosine of row and column"
        )
    columns = sincos_1d(torch.arange(width).repeat(height), dim // 2)
    rows = sincos_1d(torch.arange(height).repeat_interleave(width), dim // 2)
    return torch.cat([columns, rows], dim=1).float()


def timestep_embedding(
    t: Num[Tensor, " b"], dim: int = 256, *, max_period: float = 10_000.0, frequency_shift: float = 0.0
) -> Float[Tensor, "b {dim}"]:
    """Cosines, then sines, of ``t * max_period**(-i / (dim/2 - frequency_shift))`` for i < dim/2, in float32.

    Args:
        t: times, on the scale 0 to 1000; fractions are fine.
        dim: width of the embedding, even.
        max_period: the longest wave has 2 pi times this period.
        frequency_shift: 0 in ``facebookresearch/DiT: models.py``; 1 in diffusers' ``DiTTransformer2DModel``,
            whose waves are therefore slightly longer.

    Raises:
        ValueError: ``dim`` is odd.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}: half of it are cosines, half sines")
    half = dim // 2
    # Product first, then quotient, as both code bases do: at t = 999 another rounding shows in the fifth digit.
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponent / (half - frequency_shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1)
