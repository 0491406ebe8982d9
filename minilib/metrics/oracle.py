"""What a frozen classifier says of images: its features, its answers, how often they are the wanted ones."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@torch.no_grad()
def features(oracle: nn.Module, x: Float[Tensor, "n c h w"], batch: int = 512) -> Float[Tensor, "n f"]:
    """The oracle's penultimate features."""
    return torch.cat([oracle.features(part) for part in x.split(batch)])


@torch.no_grad()
def predict(oracle: nn.Module, x: Float[Tensor, "n c h w"], batch: int = 512) -> Int[Tensor, " n"]:
    """The oracle's answers."""
    return torch.cat([oracle(part).argmax(1) for part in x.split(batch)])


def class_accuracy(oracle: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " _"]) -> float:
    """The share of images read as the class that was asked for. Its ceiling is the oracle's accuracy on real images."""
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"need as many labels as images, at least one; got {len(x)} images and {len(y)} labels"
        )
    return float((predict(oracle, x) == y).double().mean())
