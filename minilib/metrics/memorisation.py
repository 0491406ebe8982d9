"""Does the model copy? Distances to the nearest training image, held against what fresh real images show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class MemorisationReport:
    """``ratio``: median nearest-train distance of generated images over that of held-out real ones; well under 1 means copying.

    ``copied``: share of generated images nearer to a training image than 99 % of held-out images are (expected 0.01 of an honest
    sample of the data distribution).
    """

    ratio: float
    copied: float
    median_generated: float
    median_held_out: float
    n: int


def nearest(
    x: Float[Tensor, "n ..."], pool: Float[Tensor, "m ..."]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Each row's Euclidean distance to its nearest neighbour in ``pool``, and that neighbour's index; images or features."""
    if len(pool) == 0:
        raise ValueError("an empty pool has no nearest neighbour")
    distance, index = torch.cdist(x.flatten(1), pool.flatten(1)).min(1)
    return distance, index


def memorisation(
    generated: Float[Tensor, "n c h w"], train: Float[Tensor, "m c h w"], held_out: Float[Tensor, "k c h w"]
) -> MemorisationReport:
    """Compare generated and held-out images by their distance to the training set, in pixels."""
    mine, _ = nearest(generated, train)
    honest, _ = nearest(held_out, train)
    return MemorisationReport(
        ratio=float(mine.median() / honest.median()),
        copied=float((mine < honest.quantile(0.01)).double().mean()),
        median_generated=float(mine.median()),
        median_held_out=float(honest.median()),
        n=len(generated),
    )
