"""Training-time densities of t: draws against pdf, pdf against independent calculus."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import minilib.schedulers as S

CASES = [
    ("uniform", {}),
    ("logit_normal", {}),
    ("logit_normal", {"mean": 0.5, "std": 0.6}),
    ("mode", {"scale": 0.0}),
    ("mode", {"scale": 1.29}),
    ("mode", {"scale": 1.6}),
    ("mode", {"scale": -0.75}),
    ("cosmap", {}),
]


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_draws_follow_the_pdf(name: str, parameters: dict) -> None:
    """Kolmogorov-Smirnov distance at 2e5 draws, below its 99.9 % quantile; the area under the pdf is 1."""
    density = S.timestep_density(name, **parameters)
    t = density.sample(200_000, torch.Generator().manual_seed(0))
    assert t.shape == (200_000,) and t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    cdf = np.concatenate([[0.0], (density.pdf((grid[1:] + grid[:-1]) / 2) / 100_000).cumsum(0).numpy()])
    assert abs(cdf[-1] - 1) < 1e-5
    assert stats.kstest(t.numpy(), lambda v: np.interp(v, grid.numpy(), cdf)).statistic < 0.0044
    assert torch.equal(density.pdf(torch.tensor([-0.5, 0.0, 1.0, 1.5])), torch.zeros(4))


def test_closed_forms() -> None:
    t = torch.tensor([0.1, 0.25, 0.5, 0.9], dtype=torch.float64)
    logit = np.log(t.numpy() / (1 - t.numpy()))
    normal = stats.norm(0.3, 0.8).pdf(logit) / (t.numpy() * (1 - t.numpy()))
    assert np.abs(S.timestep_density("logit_normal", mean=0.3, std=0.8).pdf(t).numpy() - normal).max() < 1e-12
    cosmap = 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)
    assert (S.timestep_density("cosmap").pdf(t) - cosmap).abs().max() < 1e-12
    # mode: dt/du by a central difference at u, read at t = f(u)
    scale, u, h = 1.29, torch.tensor([0.2, 0.5, 0.77], dtype=torch.float64), 1e-6

    def f(u: torch.Tensor) -> torch.Tensor:
        return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    numeric = 1 / ((f(u + h) - f(u - h)) / (2 * h)).abs()
    assert (S.timestep_density("mode", scale=scale).pdf(f(u)) - numeric).abs().max() < 1e-6


def test_cosmap_is_the_cosine_schedule() -> None:
    """(1 - t) / t at quantile u is alpha / sigma of the cosine schedule, cot(pi u / 2)."""
    t = S.timestep_density("cosmap").sample(100_000, torch.Generator().manual_seed(0)).double().sort().values
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    inner = slice(5000, 95_000)
    ratio = ((1 - t) / t * torch.tan(math.pi / 2 * u))[inner]
    assert (ratio - 1).abs().max() < 0.06


def test_registry_and_errors() -> None:
    for name, kind in S.TIMESTEP_DENSITIES.items():
        assert isinstance(S.timestep_density(name), kind) and isinstance(kind(), S.TimestepDensity)
        a, b = (kind().sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="'beta'; known: 'uniform', 'logit_normal', 'mode', 'cosmap'"):
        S.timestep_density("beta")
    with pytest.raises(ValueError, match="std must be positive"):
        S.timestep_density("logit_normal", std=0.0)
    with pytest.raises(ValueError, match="scale must lie in"):
        S.timestep_density("mode", scale=1.8)
