"""The table behind DDPM and DDIM: one row for each visited timestep, with the level it leads to.

Both samplers are rules for one transition t -> s of the same chain, where s is the next timestep of the table (and "no noise",
abar = 1, after the last one). s is read from the table. ``s = t - T // steps`` is right for ``leading`` spacing only: that is
diffusers issues 9261, 11347 and 12633. A row needs no memory, so transitions may be asked for in any order.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .base import Timestep
from .conversion import epsilon_coefficients, x0_coefficients
from .noising import BetaScheduler
from .schedules import integer_timesteps, spaced_timesteps
from .stepping import scalar, shown, steps_requested


class Transition(NamedTuple):
    """From timestep ``t`` to ``previous`` (-1: no noise), all in float64.

    ``alpha, sigma`` belong to t, ``alpha_prev, sigma_prev`` to ``previous``. ``beta = 1 - abar_t / abar_prev`` is the noise
    added by the transition, ``variance = sigma_prev^2 / sigma^2 beta`` that of q(x_prev | x_t, x_0) (Ho et al., 2020, eq. 7).
    """

    t: int
    previous: int
    alpha: float
    sigma: float
    alpha_prev: float
    sigma_prev: float
    beta: float
    variance: float
    x0: tuple[float, float]  # x_0 = x0[0] x + x0[1] output
    epsilon: tuple[float, float]  # eps = epsilon[0] x + epsilon[1] output


class TransitionScheduler(BetaScheduler):
    """Makes the table of transitions and looks rows up by timestep."""

    final_alpha_bar = 1.0
    """abar after the last transition."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Visit ``num_inference_steps`` timesteps, spaced as configured, or exactly the falling ``timesteps``.

        Raises:
            ValueError: a number outside 1 ... T; timesteps outside 0 ... T - 1; epsilon prediction where only noise is left.
        """
        total, spacing = len(self), self.config.timestep_spacing
        steps = steps_requested(num_inference_steps, timesteps, limit=total)
        spaced = (
            spaced_timesteps(spacing, steps, total, self.config.steps_offset)
            if timesteps is None
            else timesteps
        )
        table = integer_timesteps(np.asarray(spaced), total)
        times = table.tolist()
        self.transitions = [self._transition(t, s) for t, s in zip(times, [*times[1:], -1], strict=True)]
        self._rows = {row.t: row for row in self.transitions}
        self.num_inference_steps, self.timesteps = steps, table.to(device)

    def previous_timestep(self, timestep: Timestep) -> int:
        """The timestep that a step from ``timestep`` leads to; -1 is the clean sample."""
        return self._row(timestep).previous

    def _row(self, timestep: Timestep) -> Transition:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(num_inference_steps) before step")
        t = scalar(timestep)
        row = self._rows.get(t)
        if row is None:
            raise ValueError(f"t={t} is not in timesteps: {shown(list(self._rows))}")
        return row

    def _transition(self, t: int, previous: int) -> Transition:
        bar = self.alphas_cumprod_f64[t].item()
        bar_prev = self.alphas_cumprod_f64[previous].item() if previous >= 0 else self.final_alpha_bar
        kind = self.config.prediction_type
        if bar == 0.0 and kind == "epsilon":
            raise ValueError(
                f"at t={t} there is no signal left (zero terminal SNR), so x_0 cannot be read from epsilon; "
                "set prediction_type to 'v_prediction' or 'sample'"
            )
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        beta = 1 - bar / bar_prev
        return Transition(
            t=t,
            previous=previous,
            alpha=alpha,
            sigma=sigma,
            alpha_prev=math.sqrt(bar_prev),
            sigma_prev=math.sqrt(1 - bar_prev),
            beta=beta,
            variance=(1 - bar_prev) / (1 - bar) * beta,
            x0=x0_coefficients(kind, alpha, sigma),
            epsilon=epsilon_coefficients(kind, alpha, sigma),
        )
