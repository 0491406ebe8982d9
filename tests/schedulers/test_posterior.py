"""Gaussians of the reverse step, for losses: against torch.distributions, the sampler and limits."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import minilib.schedulers as S

from .oracles import F64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_kl_is_that_of_torch() -> None:
    mean1, log1, mean2, log2 = randn(4, 3, 5)
    truth = kl_divergence(Normal(mean1, (0.5 * log1).exp()), Normal(mean2, (0.5 * log2).exp()))
    assert (S.gaussian_kl(mean1, log1, mean2, log2) - truth).abs().max() < 1e-12
    assert S.gaussian_kl(mean1, log1, mean1, log1).abs().max() == 0.0


@pytest.mark.parametrize("prediction_type", S.PREDICTION_TYPES)
@pytest.mark.parametrize("learned", [False, True])
def test_predicted_posterior_is_the_step_of_the_sampler(prediction_type: str, learned: bool) -> None:
    """Mean and standard deviation of DDPM's step on the full table, read off with noise 0 and 1."""
    s = S.DDPMScheduler(
        prediction_type=prediction_type,
        clip_sample=False,
        variance_type="learned_range" if learned else "fixed_small",
    )
    s.set_timesteps(1000)
    x, out = randn(3, 2, 4, 4), randn(3, 4 if learned else 2, 4, 4, seed=1)
    for t in (1, 17, 500, 999):
        mean, log_variance = S.predicted_posterior(s, out, x, torch.full((3,), t))
        quiet, loud = (
            s.step(out, t, x, variance_noise=torch.full_like(x, z)).prev_sample for z in (0.0, 1.0)
        )
        assert (mean - quiet).abs().max() < 1e-9 * quiet.abs().max()
        assert ((0.5 * log_variance).exp() - (loud - quiet)).abs().max() < 1e-9 * quiet.abs().max()


def test_first_step() -> None:
    """At t = 0 the mean is x_0, and the logarithm of the variance that of t = 1."""
    s, x0, x_t = S.DDPMScheduler(), randn(1, 1, 2, 2), randn(1, 1, 2, 2, seed=1)
    mean, log_variance = S.ddpm_posterior(s, x0, x_t, torch.tensor([0]))
    assert (mean - x0).abs().max() < 1e-12
    assert torch.equal(log_variance, S.ddpm_posterior(s, x0, x_t, torch.tensor([1]))[1])
    beta = math.log(1e-4)
    assert (S.learned_range_log_variance(s, torch.ones_like(x0), torch.tensor([0])) - beta).abs().max() < 1e-9


def test_the_bound_of_a_perfect_network_is_zero() -> None:
    s, x0, noise = (
        S.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        randn(5, 1, 2, 2),
        randn(5, 1, 2, 2, seed=1),
    )
    t = torch.tensor([1, 10, 100, 500, 998])
    x_t = s.add_noise(x0, noise, t)
    kl = S.gaussian_kl(*S.ddpm_posterior(s, x0, x_t, t), *S.predicted_posterior(s, noise, x_t, t))
    assert kl.abs().max() < 1e-9


def test_dtype_and_channels() -> None:
    s, x, t = S.DDPMScheduler(), randn(2, 3, 2, 2).float(), torch.tensor([4, 700])
    for value in (*S.ddpm_posterior(s, x, x, t), S.learned_range_log_variance(s, x, t)):
        assert value.dtype == torch.float32 and value.shape == x.shape
    with pytest.raises(ValueError, match="5 channels; 3 or 6"):
        S.predicted_posterior(s, torch.zeros(2, 5, 2, 2), x, t)
