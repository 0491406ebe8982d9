"""Denoising diffusion implicit models (Song, Meng and Ermon, 2021, arXiv 2010.02502).

DDPM's training only sees the marginals q(x_t | x_0). Many processes share them; eq. 12 names one for every noise ``std``:

    x_s = alpha_s x_0  +  sqrt(sigma_s^2 - std^2) eps  +  std z,      z ~ N(0, 1),
    std = eta sqrt(beta~),    beta~ = sigma_s^2 / sigma_t^2 (1 - abar_t / abar_s)           (eq. 16)

with x_0 and eps read from the network's output at x_t. eta = 1 is DDPM with ``fixed_small``. eta = 0 adds no noise: dividing by
alpha, ``d(x / alpha) = eps d(sigma / alpha)``, so DDIM is Euler's method for the probability-flow equation in the variable
sigma / alpha (eq. 14). The end of the last step is abar = 1, or the smallest trained noise with ``set_alpha_to_one=False``.
"""

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .base import Generators, SchedulerOutput, Timestep
from .noising import BETA_OPTIONS
from .stepping import affine, finish, gaussian_noise, prepare
from .transitions import TransitionScheduler


class DDIMScheduler(TransitionScheduler):
    """Deterministic (eta = 0) or partly stochastic sampler. Its inverse is :func:`minilib.schedulers.ddim_inversion`.

    >>> import torch
    >>> s = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    >>> s.set_timesteps(4)
    >>> [s.previous_timestep(t) for t in s.timesteps]
    [749, 499, 249, -1]
    """

    OPTIONS = {**BETA_OPTIONS, "clip_sample": True, "clip_sample_range": 1.0, "set_alpha_to_one": True}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.config.set_alpha_to_one:
            self.final_alpha_bar = self.alphas_cumprod_f64[0].item()

    def step(
        self,
        model_output: Float[Tensor, "..."],
        timestep: Timestep,
        sample: Float[Tensor, "*shape"],
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: Float[Tensor, "*shape"] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step from x_t to x_s.

        Args:
            model_output: c channels; of 2c (learned variances) the first c are used.
            timestep: one of ``timesteps``, in any order.
            sample: x_t.
            eta: 0 is deterministic, 1 is DDPM.
            use_clipped_model_output: read eps again from the clipped x_0, so that both agree (GLIDE's choice).
            generator: source of the noise if eta > 0; a list gives each sample its own.
            variance_noise: unit noise to use instead of drawing it.

        Raises:
            ValueError: ``set_timesteps`` was not called; a timestep that is not in the table; a wrong shape; eta < 0.
        """
        row = self._row(timestep)
        output, x = prepare(model_output, sample)
        x0 = self.clip(affine(row.x0[0], x, row.x0[1], output))
        if use_clipped_model_output:
            epsilon = affine(1 / row.sigma, x, -row.alpha / row.sigma, x0)
        else:
            epsilon = affine(row.epsilon[0], x, row.epsilon[1], output)
        if eta == 0.0:
            return finish(affine(row.alpha_prev, x0, row.sigma_prev, epsilon), x0, sample.dtype, return_dict)
        std = eta * math.sqrt(row.variance)
        left = row.sigma_prev**2 - std**2
        if eta < 0.0 or left < -1e-12:
            raise ValueError(f"eta must lie between 0 and 1 (DDPM); got {eta} at t={row.t}")
        prev = affine(row.alpha_prev, x0, math.sqrt(max(left, 0.0)), epsilon)
        if std > 0.0:
            noise = gaussian_noise(x, generator) if variance_noise is None else variance_noise
            prev = affine(1.0, prev, std, noise)
        return finish(prev, x0, sample.dtype, return_dict)
