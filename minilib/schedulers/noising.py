"""The variance-preserving forward process, shared by every scheduler that is defined by betas.

``x_t = alpha_t x_0 + sigma_t eps`` with ``alpha_t = sqrt(abar_t)`` and ``sigma_t = sqrt(1 - abar_t)`` (see :mod:`.schedules`).
Because alpha^2 + sigma^2 = 1, data of unit variance keep unit variance at every t.
"""

from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from .base import Scheduler
from .conversion import PREDICTION_TYPES, prediction_target
from .schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, make_betas

BETA_OPTIONS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}


class BetaScheduler(Scheduler):
    """Holds ``betas``, ``alphas`` and ``alphas_cumprod`` (float32, as diffusers) and ``alphas_cumprod_f64``, used inside."""

    CHOICES = {
        "beta_schedule": BETA_SCHEDULES,
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": TIMESTEP_SPACINGS,
    }
    # At zero terminal SNR the last sigma / alpha is infinite. Solvers in that variable take 2^-24 for the last abar instead of 0.
    smallest_alpha_bar = 0.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        names = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        betas = make_betas(**{name: self.config[name] for name in names if name in self.config})
        alpha_bar = (1 - betas).cumprod(0)
        if self.config.get("rescale_betas_zero_snr"):
            alpha_bar[-1] = self.smallest_alpha_bar
        self.alphas_cumprod_f64: Float64[Tensor, " t"] = alpha_bar
        self.betas, self.alphas, self.alphas_cumprod = betas.float(), (1 - betas).float(), alpha_bar.float()
        self.timesteps = torch.arange(len(betas) - 1, -1, -1)
        self._clip_range: float | None = (
            self.config.clip_sample_range if self.config.get("clip_sample") else None
        )

    def clip(self, x0: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``x0`` held inside ``clip_sample_range``, if ``clip_sample`` is on."""
        return x0 if self._clip_range is None else x0.clamp(-self._clip_range, self._clip_range)

    def alpha_bar(self, timesteps: Int[Tensor, "..."]) -> Float64[Tensor, " b"]:
        """``alphas_cumprod`` at these training timesteps, in float64 and on their device.

        Raises:
            ValueError: timesteps that are not integers in 0 ... T - 1.
        """
        if timesteps.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} counts time in whole training steps; got t of {timesteps.dtype}"
            )
        if self.alphas_cumprod_f64.device != timesteps.device:
            self.alphas_cumprod_f64 = self.alphas_cumprod_f64.to(timesteps.device)
        try:
            return self.alphas_cumprod_f64.index_select(0, timesteps.reshape(-1))
        except IndexError:
            raise ValueError(
                f"t must lie in 0 ... {len(self) - 1}; got {timesteps.flatten()[:8].tolist()}"
            ) from None

    def levels(
        self, timesteps: Tensor, like: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """(alpha, sigma) at these timesteps, in the dtype of ``like`` and shaped to broadcast against it."""
        alpha_bar = self.alpha_bar(timesteps.to(like.device))
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like.dtype).view(shape), (1 - alpha_bar).sqrt().to(like.dtype).view(shape)

    def add_noise(
        self, original_samples: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timesteps: Tensor
    ) -> Float[Tensor, "*shape"]:
        """``alpha_t x_0 + sigma_t noise``; ``timesteps (b,)``."""
        alpha, sigma = self.levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(
        self, sample: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timesteps: Tensor
    ) -> Float[Tensor, "*shape"]:
        """``v = alpha_t noise - sigma_t x_0``, the target of v-prediction; ``sample`` is x_0."""
        alpha, sigma = self.levels(timesteps, sample)
        return prediction_target("v_prediction", sample, noise, alpha, sigma)
