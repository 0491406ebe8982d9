"""Two-dimensional densities whose noisy marginals, scores and best denoisers are known exactly.

With ``x_t = alpha x_0 + sigma eps`` the best denoiser is ``E[x_0 | x_t]``. For a mixture of Gaussians and for a finite set of
points it has a closed form, so a sampler run with it makes no model error at all: what is left is the sampler's own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

Scalar = float | Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """``sum_k weights_k N(means_k, stds_k^2 I)`` in d dimensions (here mostly 2).

    Shapes: ``means (k, d)``, ``stds (k,)``, ``weights (k,)`` (positive, sum 1).
    Every method takes the state ``x`` of shape ``(n, d)`` and the level ``(alpha, sigma)``, numbers or tensors ``(n, 1)``.

    >>> mixture = GaussianMixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1))
    >>> mixture.denoise(torch.tensor([[2.0, 0.0]]), 1.0, 1.0)  # the mean halfway between data mean and observation
    tensor([[1., 0.]])
    """

    means: Float[Tensor, "k d"]
    stds: Float[Tensor, " _"]
    weights: Float[Tensor, " _"]

    def __post_init__(self) -> None:
        if len(self.stds) != len(self.means) or len(self.weights) != len(self.means):
            raise ValueError(
                f"{len(self.means)} means need as many stds and weights; got {len(self.stds)} and {len(self.weights)}"
            )
        if bool((self.stds < 0).any()) or bool((self.weights <= 0).any()):
            raise ValueError("stds must be >= 0 and weights > 0")
        if not math.isclose(float(self.weights.sum()), 1.0, abs_tol=1e-5):
            raise ValueError(f"weights must sum to 1; got {float(self.weights.sum()):.6g}")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """Draw ``n`` points."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise

    def log_prob(
        self, x: Float[Tensor, "n d"], alpha: Scalar = 1.0, sigma: Scalar = 0.0
    ) -> Float[Tensor, " n"]:
        """Log density of ``x_t`` at the level ``(alpha, sigma)``; of the data itself by default."""
        return torch.logsumexp(self._joint(x, alpha, sigma)[0], dim=1)

    def denoise(self, x: Float[Tensor, "n d"], alpha: Scalar, sigma: Scalar) -> Float[Tensor, "n d"]:
        """The best denoiser ``E[x_0 | x_t = x]``: each component's posterior mean, weighted by its posterior probability."""
        joint, centred, variance = self._joint(x, alpha, sigma)
        gain = _column(alpha, x) * self.stds**2 / variance  # (n, k)
        posterior_means = self.means + gain[..., None] * centred  # (n, k, d)
        return einsum(joint.softmax(dim=1), posterior_means, "n k, n k d -> n d")

    def score(self, x: Float[Tensor, "n d"], alpha: Scalar, sigma: Scalar) -> Float[Tensor, "n d"]:
        """``grad_x log p_t(x)``, from its own formula (not through :meth:`denoise`, so that each can check the other)."""
        joint, centred, variance = self._joint(x, alpha, sigma)
        return -einsum(joint.softmax(dim=1) / variance, centred, "n k, n k d -> n d")

    def _joint(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> tuple[Tensor, Tensor, Tensor]:
        """Log of weight times density a component (n, k); ``x - alpha mean`` (n, k, d); variances (n, k)."""
        a, s = _column(alpha, x), _column(sigma, x)
        variance = a**2 * self.stds**2 + s**2
        if bool((variance <= 0).any()):
            raise ValueError(
                "a component without width has no density at sigma = 0; use sigma > 0 or stds > 0"
            )
        centred = x[:, None, :] - a[..., None] * self.means
        d = self.means.shape[1]
        log_density = -0.5 * (centred**2).sum(-1) / variance - 0.5 * d * torch.log(2 * math.pi * variance)
        return self.weights.log() + log_density, centred, variance


def Empirical(points: Float[Tensor, "k d"]) -> GaussianMixture:
    """A finite data set as a density: the best denoiser then *is* a softmax over the training points.

    It is what a diffusion model of unlimited capacity learns: it can only return what it has seen.
    """
    k = len(points)
    return GaussianMixture(points, points.new_zeros(k), points.new_full((k,), 1.0 / k))


def _column(level: Scalar, x: Tensor) -> Tensor:
    """A level as a tensor that broadcasts against ``(n, k)``."""
    level = torch.as_tensor(level, dtype=x.dtype, device=x.device)
    return level.reshape(-1, 1) if level.ndim else level.reshape(1, 1)


def _ring() -> GaussianMixture:
    angles = torch.arange(8) * (math.pi / 4)
    means = 1.5 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(means, torch.full((8,), 0.12), torch.full((8,), 1 / 8))


def _two() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    return GaussianMixture(means, torch.full((2,), 0.35), torch.full((2,), 0.5))


def _spiral() -> GaussianMixture:
    turn = torch.linspace(0.6, 3.4 * math.pi, 60)
    means = (0.17 * turn)[:, None] * torch.stack([turn.cos(), turn.sin()], dim=1)
    return GaussianMixture(means, torch.full((60,), 0.06), turn / turn.sum())


def _grid() -> GaussianMixture:
    axis = torch.linspace(-1.6, 1.6, 5)
    means = torch.cartesian_prod(axis, axis)
    return GaussianMixture(means, torch.full((25,), 0.08), torch.full((25,), 1 / 25))


TOY2D: dict[str, Callable[[], GaussianMixture]] = {
    "ring": _ring,
    "two": _two,
    "spiral": _spiral,
    "grid": _grid,
}


def toy2d(name: str) -> GaussianMixture:
    """A named density: ``ring`` (8 modes), ``two``, ``spiral``, ``grid`` (25 modes); all of unit scale or a little more."""
    if name not in TOY2D:
        raise KeyError(f"unknown toy density {name!r}; known: {', '.join(sorted(TOY2D))}")
    return TOY2D[name]()
