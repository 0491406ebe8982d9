"""Ancestral sampling: each step draws from the Gaussian posterior of the chain (Ho et al., 2020, arXiv 2006.11239).

If x_0 were known, one step back from t to s < t would be a draw from (eq. 6 and 7; abar_s and abar_t in place of neighbours)

    q(x_s | x_t, x_0) = N( alpha_s beta / sigma_t^2  x_0  +  sqrt(1 - beta) sigma_s^2 / sigma_t^2  x_t ,   beta~ ),
    beta = 1 - abar_t / abar_s,    beta~ = sigma_s^2 / sigma_t^2  beta.

The network's guess takes the place of x_0. Then the variance is a choice, ``variance_type``:

    fixed_small    beta~: exact if the data are one point
    fixed_large    beta: exact if the data are N(0, 1) (Ho et al., section 3.2)
    learned_range  exp(f log beta + (1 - f) log beta~), f = (v + 1) / 2, v the second half of the output's channels
                   (Nichol and Dhariwal, 2021, arXiv 2102.09672, eq. 15; DiT's choice)

The last step returns the mean: no noise is added to the final sample (Ho et al., algorithm 2), whichever its timestep.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .base import Generators, SchedulerOutput, Timestep
from .noising import BETA_OPTIONS
from .stepping import affine, finish, gaussian_noise, prepare
from .transitions import Transition, TransitionScheduler

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


class DDPMScheduler(TransitionScheduler):
    """Ancestral sampler.

    >>> s = DDPMScheduler(clip_sample=False)
    >>> s.set_timesteps(10)
    >>> s.step(torch.zeros(1, 1, 2, 2), 900, torch.ones(1, 1, 2, 2)).prev_sample.shape
    torch.Size([1, 1, 2, 2])
    """

    OPTIONS = {**BETA_OPTIONS, "variance_type": "fixed_small", "clip_sample": True, "clip_sample_range": 1.0}
    CHOICES = {**TransitionScheduler.CHOICES, "variance_type": VARIANCE_TYPES}

    def step(
        self,
        model_output: Float[Tensor, "..."],
        timestep: Timestep,
        sample: Float[Tensor, "*shape"],
        generator: Generators = None,
        variance_noise: Float[Tensor, "*shape"] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One draw of x_s given x_t.

        Args:
            model_output: c channels, or 2c with learned variances.
            timestep: one of ``timesteps``, in any order.
            sample: x_t.
            generator: source of the noise; a list gives each sample its own.
            variance_noise: unit noise to use instead of drawing it.

        Raises:
            ValueError: ``set_timesteps`` was not called; a timestep that is not in the table; a wrong shape.
        """
        row = self._row(timestep)
        output, x = prepare(model_output, sample)
        x0 = self.clip(affine(row.x0[0], x, row.x0[1], output))
        prev = affine(*mean_coefficients(row, x0, x))
        if row.previous >= 0:
            noise = gaussian_noise(x, generator) if variance_noise is None else variance_noise
            prev = prev + self._deviation(row, model_output, x) * noise
        return finish(prev, x0, sample.dtype, return_dict)

    def _deviation(self, row: Transition, model_output: Tensor, x: Tensor) -> float | Tensor:
        kind = self.config.variance_type
        if kind == "fixed_small":
            return math.sqrt(row.variance)
        if kind == "fixed_large":
            return math.sqrt(row.beta)
        if model_output.shape == x.shape:
            raise ValueError(
                f"variance_type='learned_range' needs a model with {2 * x.shape[1]} output channels"
            )
        small, large = math.log(max(row.variance, 1e-20)), math.log(row.beta)
        v = model_output[:, x.shape[1] :].to(x.dtype)
        return torch.exp(0.25 * (large - small) * v + 0.25 * (large + small))


def mean_coefficients(row: Transition, x0: Tensor, x: Tensor) -> tuple[float, Tensor, float, Tensor]:
    """(a, x_0, b, x_t) with ``a x_0 + b x_t`` the posterior mean, eq. 7."""
    on_x0 = row.alpha_prev * row.beta / row.sigma**2
    on_x = math.sqrt(1 - row.beta) * row.sigma_prev**2 / row.sigma**2
    return on_x0, x0, on_x, x
