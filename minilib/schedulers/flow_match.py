"""Euler's method on the straight path of flow matching.

    x = (1 - sigma) x_0 + sigma noise,     dx / d sigma = noise - x_0     (what the network predicts, averaged given x)

(Lipman et al., 2023, arXiv 2210.02747; Liu et al., 2023, arXiv 2209.03003), in the direction of Esser et al., 2024 (SD3, arXiv
2403.03206): sigma = 1 is noise, and ``timesteps = 1000 sigma``. One step is

    x' = x + (sigma' - sigma) output,      and      x_0 = x - sigma output.

Time shift (SD3, eq. 23): a larger image needs more noise to be hidden as well, so sigma becomes
``shift sigma / (1 + (shift - 1) sigma)``. It is applied once, to sigmas that fall evenly from 1 to 1/1000; diffusers (issue
13243) and Stability-AI/sd3-ref shift the lower end twice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .base import Generators, Scheduler, SchedulerOutput, Timestep
from .stepping import Sequential, affine, finish, prepare, steps_requested


def shift_sigmas(sigmas: Any, shift: float) -> Any:
    """``shift s / (1 + (shift - 1) s)``, of a number, an array or a tensor in [0, 1]; two shifts multiply.

    >>> shift_sigmas(0.5, 3.0)
    0.75
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class FlowLevel(NamedTuple):
    """From ``sigma`` over ``difference`` (negative) to the next level."""

    sigma: float
    difference: float


class FlowMatchEulerDiscreteScheduler(Sequential, Scheduler):
    """First-order solver of the flow.

    >>> s = FlowMatchEulerDiscreteScheduler(shift=3.0)
    >>> s.set_timesteps(sigmas=[1.0, 0.5])
    >>> s.timesteps, s.sigmas
    (tensor([1000.,  750.]), tensor([1.0000, 0.7500, 0.0000]))
    """

    OPTIONS = {"num_train_timesteps": 1000, "shift": 1.0}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.config.shift > 0:
            raise ValueError(f"shift must be positive; got {self.config.shift}")
        total = len(self)
        self._lay_out(np.arange(total, 0, -1) / total, None)

    def _lay_out(self, sigmas: np.ndarray, device: torch.device | str | None) -> None:
        levels = [*shift_sigmas(sigmas, self.config.shift).tolist(), 0.0]
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.timesteps = (
            torch.tensor(levels[:-1], dtype=torch.float64).mul(len(self)).to(device, torch.float32)
        )
        self._rows = [FlowLevel(s, after - s) for s, after in zip(levels, levels[1:], strict=False)]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Visit sigmas that fall evenly from 1 to 1 / T, or the given falling ones; then shift them. The last step ends at 0.

        Raises:
            ValueError: no or too many arguments; sigmas outside (0, 1].
        """
        steps = steps_requested(num_inference_steps, sigmas, limit=10**6)
        table = (
            np.linspace(1.0, 1 / len(self), steps) if sigmas is None else np.asarray(sigmas, dtype=np.float64)
        )
        if table[0] > 1.0 or table[-1] <= 0.0:
            raise ValueError(f"sigmas must lie in (0, 1]; got {table[0]} to {table[-1]}")
        self._lay_out(table, device)
        self._start(self.timesteps, steps)

    def step(
        self,
        model_output: Float[Tensor, "..."],
        timestep: Timestep,
        sample: Float[Tensor, "*shape"],
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step down the table.

        Args:
            model_output: the predicted ``noise - x_0``; of 2c channels the first c are used.
            timestep: the next of ``timesteps``.
            sample: x at this sigma.
            generator: accepted for the protocol; the method adds no noise.

        Raises:
            ValueError: ``set_timesteps`` was not called; a timestep out of turn; a wrong shape.
        """
        index = self._locate(timestep)
        sigma, difference = self._rows[index]
        output, x = prepare(model_output, sample)
        x0, prev = affine(1.0, x, -sigma, output), affine(1.0, x, difference, output)
        self.step_index = index + 1
        return finish(prev, x0, sample.dtype, return_dict)

    def add_noise(
        self, original_samples: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timesteps: Tensor
    ) -> Float[Tensor, "*shape"]:
        """``(1 - sigma) x_0 + sigma noise`` at ``sigma = t / T``, any real t in [0, T]; ``timesteps (b,)``."""
        sigma = (timesteps.to(original_samples.device, torch.float64) / len(self)).to(original_samples.dtype)
        return torch.lerp(original_samples, noise, sigma.view(-1, *[1] * (noise.ndim - 1)).expand_as(noise))

    def scale_noise(
        self, sample: Float[Tensor, "*shape"], timestep: Tensor, noise: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """:meth:`add_noise` in the order of arguments that diffusers' flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(
        self, sample: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timesteps: Tensor
    ) -> Float[Tensor, "*shape"]:
        """``noise - x_0``, the target of the network at every t; ``sample`` is x_0."""
        return noise - sample
