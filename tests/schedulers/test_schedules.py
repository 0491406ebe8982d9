"""Noise schedules, spacings, Karras' levels and the conversions between prediction types."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import minilib.schedulers as S
from minilib.schedulers.conversion import epsilon_coefficients, x0_coefficients
from minilib.schedulers.schedules import integer_timesteps, sigma_to_t, spaced_timesteps

from .oracles import F64, alpha_bar_reference


@pytest.mark.parametrize("schedule", S.BETA_SCHEDULES)
@pytest.mark.parametrize("total", [2, 50, 1000])
@pytest.mark.parametrize("zero", [False, True])
def test_alpha_bar(schedule: str, total: int, zero: bool) -> None:
    betas = S.make_betas(total, beta_schedule=schedule, rescale_betas_zero_snr=zero)
    bar = (1 - betas).cumprod(0).numpy()
    assert np.abs(bar - alpha_bar_reference(schedule, total, zero)).max() < 1e-12
    assert (np.diff(bar) < 0).all()
    if zero:
        plain = (1 - S.make_betas(total, beta_schedule=schedule)).cumprod(0)
        assert bar[-1] == 0.0 and abs(bar[0] - plain[0]) < 1e-15


def test_trained_betas_are_taken_as_they_are() -> None:
    betas = torch.linspace(0.001, 0.5, 20, dtype=F64)
    for given in (betas, betas.numpy(), betas.tolist()):
        assert torch.equal(S.make_betas(20, trained_betas=given), betas)


@pytest.mark.parametrize("spacing", S.TIMESTEP_SPACINGS)
def test_spacings(spacing: str) -> None:
    """Each visited timestep is the integer nearest to its definition, in exact fractions; a half may go either way."""
    for total in (1000, 997):
        for steps in (2, 3, 7, 48, 61, 100, 499, total):
            table = integer_timesteps(spaced_timesteps(spacing, steps, total), total).tolist()
            exact = {
                "linspace": [Fraction((total - 1) * k, steps - 1) for k in reversed(range(steps))],
                "leading": [Fraction(k * (total // steps)) for k in reversed(range(steps))],
                "trailing": [Fraction(total * (steps - k), steps) - 1 for k in range(steps)],
            }[spacing]
            assert all(abs(a - b) <= Fraction(1, 2) for a, b in zip(table, exact, strict=True)), (
                total,
                steps,
            )
            assert len(set(table)) == steps


def test_leading_without_room() -> None:
    with pytest.raises(ValueError, match="no room"):
        spaced_timesteps("leading", 11, 10)


def test_karras_levels_and_back() -> None:
    levels = S.karras_sigmas(0.002, 80.0, 18)
    assert levels[0] == pytest.approx(80.0) and levels[-1] == pytest.approx(0.002)
    assert np.ptp(np.diff(levels ** (1 / 7))) < 1e-12
    bar = alpha_bar_reference("linear", 1000)
    sigmas = np.sqrt((1 - bar) / bar)
    assert np.abs(sigma_to_t(sigmas, sigmas) - np.arange(1000)).max() < 1e-9
    assert sigma_to_t(np.array([1e9, 1e-9]), sigmas).tolist() == [999.0, 0.0]


@pytest.mark.parametrize("kind", S.PREDICTION_TYPES)
def test_conversions_are_inverse(kind: str) -> None:
    x0, eps = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for angle in (0.1, 0.7, 1.5):
        alpha, sigma = math.cos(angle), math.sin(angle)
        x = alpha * x0 + sigma * eps
        output = S.prediction_target(kind, x0, eps, alpha, sigma)
        assert (S.predict_x0(kind, output, x, alpha, sigma) - x0).abs().max() < 1e-12
        for (a, b), truth in (
            (x0_coefficients(kind, alpha, sigma), x0),
            (epsilon_coefficients(kind, alpha, sigma), eps),
        ):
            assert (a * x + b * output - truth).abs().max() < 1e-12


def test_unknown_prediction() -> None:
    for f in (x0_coefficients, epsilon_coefficients):
        with pytest.raises(
            ValueError, match="prediction_type is 'noise'; known: 'epsilon', 'sample', 'v_prediction'"
        ):
            f("noise", 0.6, 0.8)
