"""Which noise levels training sees: densities of t in (0, 1), where t = 1 is noise.

All are from Esser et al., 2024, arXiv 2403.03206, "Tailored SNR samplers for RF models". Each draws t by a map of a simple random
number and states its pdf in closed form:

    uniform       t = u
    logit_normal  t = sigmoid(m + s n), n ~ N(0, 1)            most draws in the middle, none at the ends
    mode          t = 1 - u - scale (cos^2(pi u / 2) - 1 + u)  more or less at the middle, none never
    cosmap        t = 1 - 1 / (tan(pi u / 2) + 1)              the cosine schedule's noise-to-signal ratios

The pdf of t = f(u) with f monotone is ``1 / |f'(f^-1(t))|``; for ``mode`` the inverse is found by bisection. A density weighs the
loss: to draw t from pi is to weigh uniform draws by pi(t).
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .base import choose


@runtime_checkable
class TimestepDensity(Protocol):
    """A density on (0, 1)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        """n independent draws."""

    def pdf(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The density at t; 0 outside (0, 1)."""


def _inside(t: Tensor, value: Tensor) -> Tensor:
    return torch.where((t > 0) & (t < 1), value, torch.zeros_like(value))


@dataclass(frozen=True)
class Uniform:
    """All t alike."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        """``u``."""
        return torch.rand(n, generator=generator)

    def pdf(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1."""
        return _inside(t, torch.ones_like(t))


@dataclass(frozen=True)
class LogitNormal:
    """SD3's choice is ``mean=0, std=1``; a positive mean moves the draws towards noise."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive; got {self.std}")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        """``sigmoid(mean + std n)``."""
        return torch.sigmoid(self.mean + self.std * torch.randn(n, generator=generator))

    def pdf(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The normal density of logit(t), over t (1 - t)."""
        safe = t.clamp(1e-30, 1 - torch.finfo(t.dtype).eps)
        z = (torch.logit(safe) - self.mean) / self.std
        return _inside(t, torch.exp(-0.5 * z**2) / (self.std * math.sqrt(2 * math.pi) * safe * (1 - safe)))


@dataclass(frozen=True)
class Mode:
    """``scale`` in [-1, 2 / (pi - 2)]: above 0 the middle is favoured, below 0 the ends; 0 is uniform."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1.0 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"scale must lie in [-1, {2 / (math.pi - 2):.4f}], else t is not monotone in u; got {self.scale}"
            )

    def _t(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        """``f(u)``."""
        return self._t(torch.rand(n, generator=generator, dtype=torch.float64)).float()

    def pdf(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``1 / |f'(u)|`` at the u with f(u) = t."""
        low, high = torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
        for _ in range(60):  # f falls from 1 to 0, so each pass halves the bracket
            middle = (low + high) / 2
            above = self._t(middle) > t
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        slope = 1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * low)
        return _inside(t, (1 / slope).to(t.dtype))


@dataclass(frozen=True)
class CosMap:
    """The density under which flow matching sees the noise-to-signal ratios of the cosine schedule."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        """``1 - 1 / (tan(pi u / 2) + 1)``."""
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return (1 - 1 / (torch.tan(math.pi / 2 * u) + 1)).float()

    def pdf(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``2 / (pi (1 - 2 t + 2 t^2))``."""
        return _inside(t, 2 / (math.pi * (1 - 2 * t + 2 * t**2)))


TIMESTEP_DENSITIES = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "cosmap": CosMap}


def timestep_density(name: str, **parameters: float) -> TimestepDensity:
    """A density by name.

    >>> timestep_density("logit_normal", mean=0.5)
    LogitNormal(mean=0.5, std=1.0)
    """
    choose("timestep density", name, TIMESTEP_DENSITIES)
    return TIMESTEP_DENSITIES[name](**parameters)
