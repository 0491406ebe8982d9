"""Precision, recall, density and coverage: fidelity and diversity apart, from nearest-neighbour balls in feature space.

Kynkäänniemi et al., 2019, arXiv 1904.06991 (precision, recall); Naeem et al., 2020, arXiv 2002.09797 (density, coverage).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Manifold:
    """All four in one place. Density may exceed 1; for two samples of one distribution precision and recall do not reach 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    real: Float[Tensor, "n f"], fake: Float[Tensor, "m f"], k: int = 5
) -> Manifold:
    """Compare two feature sets through the balls that reach to each point's k-th neighbour of its own set.

    precision: share of fakes inside some real ball; recall: share of reals inside some fake ball; density: how many real balls
    hold a fake, over k; coverage: share of real balls that hold a fake.

    Raises:
        ValueError: a set with k or fewer points.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"k={k} needs more than {k} points a side; got {len(real)} real and {len(fake)} fake"
        )
    real, fake = real.double(), fake.double()
    cross = torch.cdist(real, fake)  # (n, m)
    radius_real = (
        torch.cdist(real, real).kthvalue(k + 1, dim=1).values[:, None]
    )  # the first neighbour is the point
    radius_fake = torch.cdist(fake, fake).kthvalue(k + 1, dim=1).values[None, :]
    inside_real = cross < radius_real
    return Manifold(
        precision=float(inside_real.any(0).double().mean()),
        recall=float((cross < radius_fake).any(1).double().mean()),
        density=float(inside_real.double().sum(0).mean() / k),
        coverage=float((cross.min(1).values < radius_real[:, 0]).double().mean()),
    )
