"""Euler's method in EDM's variable (Karras et al., 2022, arXiv 2206.00364, algorithm 2 without its second half).

One step of ``dx / ds = (x - x_0) / s`` from s to s' is

    x' = x + (s' - s) (x - x_0) / s  =  (s' / s) x + (1 - s' / s) x_0,

a point between the sample and the denoised sample. At s' = 0 it is x_0. In the scaled sample this is DDIM with eta = 0.

With ``s_churn > 0`` noise is first added, up to ``s^ = s (1 + gamma)`` with ``gamma = min(s_churn / N, sqrt(2) - 1)`` where
s_tmin <= s <= s_tmax, and the step starts from there. EDM evaluates the network after this noise. In diffusers' protocol the
network was evaluated before, at (x, s), and its output is used as if it belonged to the noised sample. Here too.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .base import Generators, SchedulerOutput, Timestep
from .noising import BETA_OPTIONS
from .sigmas import FINAL_SIGMAS, EDMScheduler
from .stepping import affine, finish, gaussian_noise, prepare


class Level(NamedTuple):
    """From ``sigma`` to ``next_sigma``; ``x0`` as in :mod:`.conversion`."""

    sigma: float
    next_sigma: float
    x0: tuple[float, float]


class EulerDiscreteScheduler(EDMScheduler):
    """First-order solver.

    >>> s = EulerDiscreteScheduler(use_karras_sigmas=True)
    >>> s.set_timesteps(3)
    >>> s.sigmas.shape, s.timesteps.shape
    (torch.Size([4]), torch.Size([3]))
    """

    OPTIONS = {
        **BETA_OPTIONS,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
        "sigma_min": None,
        "sigma_max": None,
        "final_sigmas_type": "zero",
    }
    CHOICES = {**EDMScheduler.CHOICES, "final_sigmas_type": FINAL_SIGMAS}

    def _make_rows(self, timesteps: Tensor, sigmas: list[float], steps: int) -> None:
        self._visit(timesteps, sigmas, steps)
        self._rows = [Level(s, after, self._x0(s)) for s, after in zip(sigmas, sigmas[1:], strict=False)]
        self._input_scale = [1 / math.hypot(s, 1.0) for s in sigmas[:-1]]

    def step(
        self,
        model_output: Float[Tensor, "..."],
        timestep: Timestep,
        sample: Float[Tensor, "*shape"],
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step down the table.

        Args:
            model_output: of the network at ``scale_model_input(sample, timestep)``; of 2c channels the first c are used.
            timestep: the next of ``timesteps``.
            sample: ``x_0 + s eps``.
            s_churn, s_tmin, s_tmax, s_noise: how much noise to add first, in which range of s, and its standard deviation.
            generator: source of that noise; a list gives each sample its own.

        Raises:
            ValueError: ``set_timesteps`` was not called; a timestep out of turn; a wrong shape.
        """
        index = self._locate(timestep)
        sigma, next_sigma, (on_x, on_output) = self._rows[index]
        output, x = prepare(model_output, sample)
        if s_churn > 0.0 and s_tmin <= sigma <= s_tmax:
            noised = sigma * (1 + min(s_churn / len(self._rows), math.sqrt(2) - 1))
            x = affine(1.0, x, s_noise * math.sqrt(noised**2 - sigma**2), gaussian_noise(x, generator))
            if self.config.prediction_type == "epsilon":
                on_output = -noised
            sigma = noised
        x0 = affine(on_x, x, on_output, output)
        prev = torch.lerp(x0, x, next_sigma / sigma)
        self.step_index = index + 1
        return finish(prev, x0, sample.dtype, return_dict)
