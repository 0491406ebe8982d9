"""How near a fast sampler stays to a slow one: each sample against the one from the same noise, pixel by pixel."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from minilib.metrics.reconstruction import psnr


def psnr_to_reference(
    samples: Float[Tensor, "n c h w"], reference: Float[Tensor, "n c h w"], *, cap: float = 100.0
) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each sample to its reference, in decibels; both clamped to [-1, 1] first.

    It says how faithful a shortcut is, not how good: a sample that is as good as the reference but different scores low.
    Twenty decibels are a tenth of the error.

    Args:
        samples: from the method under test.
        reference: from the same noise and prompts.
        cap: the value for samples that are equal, or nearer than this; a mean stays finite.

    Raises:
        ValueError: different shapes.

    >>> import torch
    >>> psnr_to_reference(torch.tensor([[[[0.2]]], [[[3.0]]]]), torch.tensor([[[[0.0]]], [[[1.0]]]]))
    tensor([ 20., 100.])
    """
    if samples.shape != reference.shape:
        raise ValueError(
            f"each sample needs its reference: got shapes {tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    return psnr(reference.clamp(-1, 1), samples.clamp(-1, 1)).clamp(max=cap)
