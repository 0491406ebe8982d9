"""The same chain seen through its noise-to-signal ratio (Karras et al., 2022, arXiv 2206.00364, "EDM").

Divide ``x_t = alpha_t x_0 + sigma_t eps`` by alpha_t: ``x = x_0 + s eps`` with ``s = sigma_t / alpha_t``, the values called
``sigmas`` here. In this variable the probability-flow equation is ``dx / ds = eps = (x - x_0(x, s)) / s`` (EDM, eq. 1 and 3):
nearly straight near the data. The network still expects the variance-preserving sample ``alpha x``: ``scale_model_input``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .base import Timestep
from .conversion import prediction_target, x0_coefficients
from .noising import BetaScheduler
from .schedules import karras_sigmas, sigma_to_t, spaced_timesteps
from .stepping import Sequential, scaled, steps_requested

FINAL_SIGMAS = ("zero", "sigma_min")


class SigmaTable(Sequential, BetaScheduler):
    """What a solver in s needs: s at every training step, and s at the visited ones."""

    smallest_alpha_bar = 2.0**-24

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        bar = self.alphas_cumprod_f64.numpy()
        self.training_sigmas = np.sqrt((1 - bar) / bar)
        self._sigma_of: dict[float, float] = {}
        self.sigmas = torch.tensor([*self.training_sigmas[::-1], 0.0], dtype=torch.float32)

    def _visit(self, timesteps: Tensor, sigmas: Sequence[float], steps: int) -> None:
        """Take ``timesteps`` and the levels of each, with one more level where the last step ends."""
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        self._start(timesteps, steps)
        self._sigma_of = dict(zip(self._table, sigmas, strict=False))

    def _final_sigma(self) -> float:
        return float(self.training_sigmas[0]) if self.config.get("final_sigmas_type") == "sigma_min" else 0.0

    def sigma_at(self, timesteps: Tensor, like: Float[Tensor, "b ..."]) -> Float[Tensor, "..."]:
        """s at these timesteps: what the table says, or between the training steps by interpolation; broadcasts against ``like``.

        Raises:
            ValueError: a timestep outside 0 ... T - 1.
        """
        times = timesteps.reshape(-1).tolist()
        if not all(0 <= t <= len(self) - 1 for t in times):
            raise ValueError(f"t must lie in 0 ... {len(self) - 1}; got {times[:8]}")
        between = np.interp(times, np.arange(len(self)), self.training_sigmas)
        values = [self._sigma_of.get(t, s) for t, s in zip(times, between.tolist(), strict=True)]
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


class EDMScheduler(SigmaTable):
    """Base of Euler and Heun: samples are ``x_0 + s eps``."""

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample: s, or sqrt(s^2 + 1) where the spacing starts below the noisiest timestep."""
        largest = self.sigmas.max().item()
        return (
            largest if self.config.timestep_spacing in ("linspace", "trailing") else math.hypot(largest, 1.0)
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Visit ``num_inference_steps`` levels, spaced as configured or by Karras, or exactly those of the falling ``timesteps``.

        Raises:
            ValueError: a number outside 1 ... T; timesteps outside 0 ... T - 1, or together with ``use_karras_sigmas``.
        """
        config, total = self.config, len(self)
        steps = steps_requested(num_inference_steps, timesteps, limit=total)
        if timesteps is not None and config.use_karras_sigmas:
            raise ValueError(
                "use_karras_sigmas chooses the levels itself: give num_inference_steps, not timesteps"
            )
        spaced = (
            spaced_timesteps(config.timestep_spacing, steps, total, config.steps_offset)
            if timesteps is None
            else timesteps
        )
        # The level is that of the float32 timestep which the model is shown.
        times = np.asarray(spaced, dtype=np.float32).astype(np.float64)
        if times[0] > total - 1 or times[-1] < 0:
            raise ValueError(f"timesteps reach from {times[0]} to {times[-1]}, outside 0 ... {total - 1}")
        levels = np.interp(times, np.arange(total), self.training_sigmas)
        if config.use_karras_sigmas:
            low, high = config.get("sigma_min"), config.get("sigma_max")
            levels = karras_sigmas(
                levels[-1] if low is None else low, levels[0] if high is None else high, steps
            )
            times = sigma_to_t(levels, self.training_sigmas)
        table = torch.as_tensor(times, dtype=torch.float32, device=device)
        self._make_rows(table, [*levels.tolist(), self._final_sigma()], steps)

    def _make_rows(self, timesteps: Tensor, sigmas: list[float], steps: int) -> None:
        raise NotImplementedError

    def _x0(self, sigma: float) -> tuple[float, float]:
        """(a, b) with ``x_0 = a x + b output``, for a network that was shown ``x / sqrt(1 + s^2)``."""
        alpha = 1 / math.hypot(sigma, 1.0)
        on_scaled, on_output = x0_coefficients(self.config.prediction_type, alpha, sigma * alpha)
        return on_scaled * alpha, on_output

    def scale_model_input(
        self, sample: Float[Tensor, "*shape"], timestep: Timestep
    ) -> Float[Tensor, "*shape"]:
        """``x / sqrt(1 + s^2)``: the sample the network was trained on."""
        return scaled(self._input_scale[self._locate(timestep)], sample)

    def add_noise(
        self, original_samples: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timesteps: Tensor
    ) -> Float[Tensor, "*shape"]:
        """``x_0 + s noise``."""
        return original_samples + self.sigma_at(timesteps, original_samples) * noise

    def levels(
        self, timesteps: Tensor, like: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """(alpha, sigma) of the scaled sample that the network is shown."""
        sigma = self.sigma_at(timesteps, like)
        return (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()

    def get_velocity(
        self, sample: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timesteps: Tensor
    ) -> Float[Tensor, "*shape"]:
        """``v = alpha noise - sigma x_0`` of the scaled sample, the target of v-prediction; ``sample`` is x_0."""
        return prediction_target("v_prediction", sample, noise, *self.levels(timesteps, sample))
