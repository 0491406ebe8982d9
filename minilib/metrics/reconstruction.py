"""How near a reconstruction is to its original, pixel by pixel."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def psnr(x: Float[Tensor, "n c h w"], reconstruction: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each image in decibels; images in [-1, 1], so the peak is 2. Infinite if they are equal.

    >>> import torch
    >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2))
    tensor([20.])
    """
    mse = (x - reconstruction).square().flatten(1).mean(1)
    return 10.0 * (4.0 / mse).log10()
