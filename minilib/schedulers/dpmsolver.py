"""DPM-Solver++ of order 1 and 2M (Lu et al., 2022, arXiv 2211.01095): exact in the linear part, multistep in the rest.

Let ``lambda = log(alpha / sigma)``, half the log-SNR, and x_0(lambda) the denoised sample on the trajectory. The probability-flow
equation has the exact solution (proposition 4.1), from time s to the less noisy t, with ``h = lambda_t - lambda_s > 0``:

    x_t = (sigma_t / sigma_s) x_s + sigma_t  integral_{lambda_s}^{lambda_t} e^lambda x_0(lambda) d lambda.

Order 1 holds x_0 constant: ``x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) x_0``, which is DDIM. 2M (algorithm 2) puts a
line through the last two x_0 in its place, at no cost:

    D = x_0 + (h / 2 h_before) (x_0 - x_0_before)            (solver_type "midpoint"; "heun" integrates the line exactly).

The first step has no x_0 before it and the last one, to sigma = 0, has h infinite: both are of order 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .base import Generators, SchedulerOutput, Timestep
from .conversion import x0_coefficients
from .noising import BETA_OPTIONS
from .schedules import integer_timesteps, karras_sigmas, sigma_to_t, spaced_timesteps
from .sigmas import FINAL_SIGMAS, SigmaTable
from .stepping import affine, finish, prepare, steps_requested


class Update(NamedTuple):
    """``prev = on_x x + on_x0 x_0 + on_change (x_0 - x_0_before)``."""

    x0: tuple[float, float]
    on_x: float
    on_x0: float
    on_change: float


class DPMSolverMultistepScheduler(SigmaTable):
    """Deterministic multistep solver, the usual choice for 10 to 25 steps."""

    OPTIONS = {
        **BETA_OPTIONS,
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_karras_sigmas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,  # accepted for the protocol: learned variances are recognised by the output's 2c channels
    }
    CHOICES = {
        **SigmaTable.CHOICES,
        "solver_order": (1, 2),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint", "heun"),
        "final_sigmas_type": FINAL_SIGMAS,
    }

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Visit ``num_inference_steps`` timesteps, spaced as configured or by Karras, or exactly the falling ``timesteps``.

        Raises:
            ValueError: a number outside 1 ... T; timesteps outside 0 ... T - 1, or together with ``use_karras_sigmas``.
        """
        config, total, trained = self.config, len(self), self.training_sigmas
        steps = steps_requested(num_inference_steps, timesteps, limit=total)
        if timesteps is not None and config.use_karras_sigmas:
            raise ValueError(
                "use_karras_sigmas chooses the levels itself: give num_inference_steps, not timesteps"
            )
        if config.use_karras_sigmas:
            levels = karras_sigmas(trained[0], trained[-1], steps)
            table = integer_timesteps(sigma_to_t(levels, trained), total)
        else:
            table = integer_timesteps(
                self._spaced(steps) if timesteps is None else np.asarray(timesteps), total
            )
            levels = trained[table.numpy()]
        sigmas = [*levels.tolist(), self._final_sigma()]
        self._rows = [self._update(sigmas, i) for i in range(len(table))]
        self._previous_x0: Tensor | None = None
        self._visit(table.to(device), sigmas, len(table))

    def _spaced(self, steps: int) -> np.ndarray:
        """One level more than the steps, and the last left out: the final step ends beyond the table."""
        config, total = self.config, len(self)
        last = total - int((-np.log(self.training_sigmas) < config.lambda_min_clipped).sum())
        if config.timestep_spacing == "trailing":
            return spaced_timesteps("trailing", steps, total, last=last)
        return spaced_timesteps(config.timestep_spacing, steps + 1, total, config.steps_offset, last=last)[
            :-1
        ]

    def _update(self, sigmas: list[float], i: int) -> Update:
        config, last = self.config, len(sigmas) - 2
        s, t = sigmas[i], sigmas[i + 1]
        alpha_s, alpha_t = 1 / math.hypot(s, 1.0), 1 / math.hypot(t, 1.0)
        on_x0 = alpha_t * (1 - t / s)  # e^-h is t / s
        small = config.lower_order_final and len(sigmas) - 1 < 15
        first_order = (
            config.solver_order == 1 or i == 0 or (i == last and (t == 0.0 or small or config.euler_at_final))
        )
        on_change = 0.0
        if not first_order:
            h, h_before = math.log(s / t), math.log(sigmas[i - 1] / s)
            line = 0.5 * on_x0 if config.solver_type == "midpoint" else alpha_t * ((t / s - 1) / h + 1)
            on_change = line * h / h_before
        x0 = x0_coefficients(config.prediction_type, alpha_s, s * alpha_s)
        return Update(x0, (t * alpha_t) / (s * alpha_s), on_x0, on_change)

    def levels(
        self, timesteps: Tensor, like: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """(alpha, sigma); with Karras' sigmas, those of the table, which lie between the training steps."""
        if not self.config.use_karras_sigmas:
            return super().levels(timesteps, like)
        s = self.sigma_at(timesteps, like)
        return (1 + s**2).rsqrt(), s * (1 + s**2).rsqrt()

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
            model_output: c channels; of 2c (learned variances) the first c are used.
            timestep: the next of ``timesteps``.
            sample: x_s.
            generator: accepted for the protocol; the method adds no noise.

        Raises:
            ValueError: ``set_timesteps`` was not called; a timestep out of turn; a wrong shape.
        """
        index = self._locate(timestep)
        row = self._rows[index]
        output, x = prepare(model_output, sample)
        x0 = affine(row.x0[0], x, row.x0[1], output)
        prev = affine(row.on_x, x, row.on_x0, x0)
        if row.on_change != 0.0 and self._previous_x0 is not None:
            prev = affine(1.0, prev, row.on_change, x0 - self._previous_x0)
        self._previous_x0 = x0
        self.step_index = index + 1
        return finish(prev, x0, sample.dtype, return_dict)
