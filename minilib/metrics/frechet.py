"""Fréchet distance of two sets of features, with what is needed to read it.

``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``: the squared 2-Wasserstein distance of the Gaussians with the sets'
means and covariances (Dowson and Landau, 1982; with Inception features it is the FID of Heusel et al., 2017, arXiv 1706.08500).

It is biased upwards at small n, so a number alone says nothing. :func:`frechet_report` therefore prints n, the feature
net's checksum, the floor (real against real, same sizes) and a ceiling.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilib.metrics.oracle import features


def frechet_distance(a: Float[Tensor, "n _"], b: Float[Tensor, "m _"]) -> float:
    """Fréchet distance of two feature sets, in float64.

    Raises:
        ValueError: fewer than two samples on a side, or different feature widths.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"a covariance needs at least two samples a side; got {len(a)} and {len(b)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of different widths: {a.shape[1]} and {b.shape[1]}")
    a, b = a.double(), b.double()
    mean_gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = _covariance(a), _covariance(b)
    root_a = _symmetric_sqrt(cov_a)
    # tr (S_a S_b)^(1/2) through the symmetric matrix S_a^(1/2) S_b S_a^(1/2), which has the same eigenvalues.
    eigenvalues = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0)
    distance = mean_gap + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return float(distance.clamp(min=0))


@dataclass(frozen=True)
class FrechetReport:
    """A distance and its context. ``floor``: held-out real against the reference. ``ceiling``: a stated bad set against it."""

    value: float
    floor: float
    ceiling: float
    n: int
    n_reference: int
    net_checksum: str

    @property
    def over_floor(self) -> float:
        """``value / floor``: 1 means as near to the reference as fresh real data are."""
        return self.value / self.floor

    def __str__(self) -> str:
        return (
            f"FD {self.value:.3g} (floor {self.floor:.3g}, ceiling {self.ceiling:.3g}; "
            f"n={self.n} against {self.n_reference}, net {self.net_checksum[:8]})"
        )


def frechet_report(
    oracle: nn.Module,
    generated: Float[Tensor, "n c h w"],
    reference: Float[Tensor, "m c h w"],
    held_out: Float[Tensor, "k c h w"],
    ceiling: Float[Tensor, "j c h w"] | None = None,
) -> FrechetReport:
    """Distance of generated images to a reference, beside its floor and ceiling at the same n.

    The floor is ``held_out`` against ``reference``; generated and held-out are cut to the same length, since the bias
    depends on it. The default ceiling is independent pixels with the reference's mean and spread at each place.
    """
    n = min(len(generated), len(held_out))
    if ceiling is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((n, *reference.shape[1:]), generator=generator)
        ceiling = (reference.mean(0) + reference.std(0) * noise).clamp(-1, 1)
    f_reference = features(oracle, reference)
    return FrechetReport(
        value=frechet_distance(features(oracle, generated[:n]), f_reference),
        floor=frechet_distance(features(oracle, held_out[:n]), f_reference),
        ceiling=frechet_distance(features(oracle, ceiling[:n]), f_reference),
        n=n,
        n_reference=len(reference),
        net_checksum=module_checksum(oracle),
    )


def module_checksum(module: nn.Module) -> str:
    """sha256 over names and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _symmetric_sqrt(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
