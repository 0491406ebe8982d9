"""Noise schedules: how much noise each training step adds, and which of those steps a sampler visits.

The forward process adds noise with variance ``beta_t`` at step t, so that (Ho et al., 2020, arXiv 2006.11239, eq. 4)

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    abar_t = prod_{s <= t} (1 - beta_s)        (``alphas_cumprod``)

We write ``alpha = sqrt(abar)`` and ``sigma = sqrt(1 - abar)``. Everything here is float64. diffusers rounds the betas to
float32 first, so its ``alphas_cumprod`` differ from these by about 1e-6 of their value (1e-5 at the end of the cosine schedule).
"""

import math

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .base import choose


def linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64[Tensor, " t"]:
    """Ho et al., 2020, section 4."""
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)


def scaled_linear_betas(
    num_train_timesteps: int, beta_start: float, beta_end: float
) -> Float64[Tensor, " t"]:
    """Linear in sqrt(beta): latent diffusion's schedule (Rombach et al., 2022; CompVis/latent-diffusion)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2


def cosine_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64[Tensor, " t"]:
    """Nichol and Dhariwal, 2021, arXiv 2102.09672, eq. 17: ``abar(u) = cos^2((u + 0.008) / 1.008 pi / 2)``, beta <= 0.999.

    ``beta_start`` and ``beta_end`` are not used; they are there so that all schedules are called alike.
    """
    u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETA_SCHEDULES = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
}


def rescale_zero_terminal_snr(betas: Float64[Tensor, " t"]) -> Float64[Tensor, " t"]:
    """Shift and scale sqrt(abar) so that it ends at 0 and begins as before (Lin et al., 2023, arXiv 2305.08891, alg. 1).

    >>> float((1 - rescale_zero_terminal_snr(linear_betas(1000, 1e-4, 0.02))).cumprod(0)[-1])
    0.0
    """
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def make_betas(
    num_train_timesteps: int,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: object = None,
    rescale_betas_zero_snr: bool = False,
) -> Float64[Tensor, " t"]:
    """The betas of a schedule by name, or the given ones.

    Raises:
        ValueError: an unknown name; given betas of another number than ``num_train_timesteps``; a beta outside (0, 1].
    """
    choose("beta_schedule", beta_schedule, BETA_SCHEDULES)
    betas = BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
    if trained_betas is not None:
        betas = torch.as_tensor(trained_betas, dtype=torch.float64)
        if betas.shape != (num_train_timesteps,):
            raise ValueError(f"{num_train_timesteps=} but trained_betas has shape {tuple(betas.shape)}")
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(f"betas must lie in (0, 1]; got {betas.min().item():g} to {betas.max().item():g}")
    return rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas


TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def spaced_timesteps(
    spacing: str, steps: int, num_train_timesteps: int, steps_offset: int = 0, last: int | None = None
) -> np.ndarray:
    """The visited timesteps, from noise to data (Lin et al., 2023, arXiv 2305.08891, table 2). linspace is not rounded yet.

    leading: multiples of T // steps, from 0 (plus ``steps_offset``), never T - 1. linspace: both 0 and T - 1. trailing: from
    T - 1 down by T / steps. ``last`` (default T) leaves the noisiest timesteps out, as ``lambda_min_clipped`` asks.

    >>> spaced_timesteps("trailing", 4, 1000)
    array([999., 749., 499., 249.])
    """
    choose("timestep_spacing", spacing, TIMESTEP_SPACINGS)
    last = num_train_timesteps if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps)[::-1]
    if spacing == "leading":
        if steps > last:
            raise ValueError(
                f"leading spacing has no room for {steps} levels among {last} timesteps; take fewer steps"
            )
        return np.arange(steps - 1, -1, -1) * float(last // steps) + steps_offset
    # np.arange to a float stop has one element too many for 62 of the first 1000 step counts: count in integers.
    count = -(-last * steps // num_train_timesteps)
    return np.round(np.arange(last, 0, -num_train_timesteps / steps)[:count]) - 1


def integer_timesteps(spaced: np.ndarray, num_train_timesteps: int) -> Int64[Tensor, " n"]:
    """Rounded (half to even) and checked.

    Raises:
        ValueError: a timestep outside 0 ... T - 1, as ``steps_offset`` can cause.
    """
    table = torch.as_tensor(np.asarray(spaced, dtype=np.float64).round().astype(np.int64))
    if int(table.max()) >= num_train_timesteps or int(table.min()) < 0:
        raise ValueError(
            f"timesteps reach from {table.max()} to {table.min()}, outside 0 ... {num_train_timesteps - 1}"
        )
    return table


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Equal steps in ``sigma^(1/rho)``, from large to small (Karras et al., 2022, arXiv 2206.00364, eq. 5).

    >>> karras_sigmas(1.0, 128.0, 3, rho=7.0).round(3)
    array([128.   ,  17.086,   1.   ])
    """
    ramp = np.linspace(0, 1, steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def sigma_to_t(sigma: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The real-valued timestep whose noise level is ``sigma``, linear in log sigma between the training steps ``sigmas``.

    ``sigmas`` rise with t. But at zero terminal SNR the last one is cut to 4096, and may lie below its neighbours.
    """
    rising = np.minimum.accumulate(sigmas[::-1])[::-1]
    return np.interp(np.log(sigma), np.log(rising), np.arange(len(sigmas)))
