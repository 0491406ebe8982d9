"""Heun's method in EDM's variable (Karras et al., 2022, arXiv 2206.00364, algorithm 1): second order, two evaluations a step.

For ``dx / ds = d(x, s) = (x - x_0(x, s)) / s``, from s to s':

    x1 = x + (s' - s) d(x, s)                            Euler's step
    x' = x + (s' - s) / 2 (d(x, s) + d(x1, s'))          the trapezoidal rule, using that step
       = (x + x2) / 2,   x2 = x1 + (s' - s) d(x1, s')    the middle between x and two Euler steps of the same length.

The protocol gives one network output a call, so a step is two calls, and ``timesteps`` holds t_0, t_1, t_1, t_2, t_2, ...: the
call at the first t_1 is the second half of the first step. The last step ends at s' = 0, where d is not defined, and is Euler's.
``pred_original_sample`` is x_0 as seen in that call.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .base import Generators, SchedulerOutput, Timestep
from .noising import BETA_OPTIONS
from .sigmas import EDMScheduler
from .stepping import affine, finish, prepare


class Stage(NamedTuple):
    """One call at noise ``sigma``. An Euler step of either kind ends at ``ratio x + (1 - ratio) x_0``, as in :mod:`.euler`."""

    sigma: float
    x0: tuple[float, float]
    ratio: float
    second: bool


class HeunDiscreteScheduler(EDMScheduler):
    """Second-order solver.

    >>> s = HeunDiscreteScheduler()
    >>> s.set_timesteps(3)
    >>> s.timesteps
    tensor([999.0000, 499.5000, 499.5000,   0.0000,   0.0000])
    """

    OPTIONS = {
        **{k: v for k, v in BETA_OPTIONS.items() if k != "rescale_betas_zero_snr"},
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
        "clip_sample": False,
        "clip_sample_range": 1.0,
    }
    order = 2

    def _make_rows(self, timesteps: Tensor, sigmas: list[float], steps: int) -> None:
        self._rows = []
        for s, after in zip(sigmas, sigmas[1:], strict=False):
            self._rows.append(Stage(s, self._x0(s), after / s, second=False))
            if after > 0.0:
                self._rows.append(Stage(after, self._x0(after), (2 * after - s) / after, second=True))
        self._input_scale = [1 / math.hypot(row.sigma, 1.0) for row in self._rows]
        twice = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        self._visit(twice, [*(row.sigma for row in self._rows), 0.0], steps)
        self._begun_at: Tensor | None = None

    def step(
        self,
        model_output: Float[Tensor, "..."],
        timestep: Timestep,
        sample: Float[Tensor, "*shape"],
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One half of a step.

        Args:
            model_output: of the network at ``scale_model_input(sample, timestep)``; of 2c channels the first c are used.
            timestep: the next of ``timesteps``.
            sample: ``x_0 + s eps``, as the last call returned it.
            generator: accepted for the protocol; the method adds no noise.

        Raises:
            ValueError: ``set_timesteps`` was not called; a timestep out of turn; a wrong shape; a start in mid-step.
        """
        index = self._locate(timestep)
        row = self._rows[index]
        output, x = prepare(model_output, sample)
        x0 = self.clip(affine(row.x0[0], x, row.x0[1], output))
        prev = torch.lerp(x0, x, row.ratio)
        if not row.second:
            self._begun_at = x
        elif self._begun_at is None:
            raise ValueError(f"timestep number {index} is the second half of a step; begin one later")
        else:
            prev = torch.lerp(self._begun_at, prev, 0.5)
        self.step_index = index + 1
        return finish(prev, x0, sample.dtype, return_dict)
