"""Runs ours and diffusers' scheduler side by side on the same inputs."""

import importlib.metadata
import itertools
from typing import Any

import diffusers
import torch
from torch import Tensor

from .plain import S

DIFFUSERS = importlib.metadata.version("diffusers")
SHAPE = (2, 3, 4, 4)
SCHEDULES, SPACINGS, PREDICTIONS = tuple(S.BETA_SCHEDULES), S.TIMESTEP_SPACINGS, S.PREDICTION_TYPES


def pair(name: str, exact: bool = False, **options: Any) -> tuple[Any, Any]:
    """Ours, diffusers'.

    diffusers keeps abar in float32, so 1 - abar at t = 0 is off by 3e-4 of its value, and Karras' table, which starts from it, by
    5e-4. ``exact=True`` hands it our float64 abar: then everything else can be compared to rounding. Both are done.
    """
    ours, theirs = getattr(S, name)(**options), getattr(diffusers, name)(**options)
    if exact:
        theirs.alphas_cumprod = ours.alphas_cumprod_f64.clone()
        if hasattr(theirs, "final_alpha_cumprod") and not options.get("set_alpha_to_one", True):
            theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    return ours, theirs


def ddim_jump_is_wrong(timesteps: list[int], total: int) -> bool:
    """Issues 9261, 11347, 12633: does ``t - T // N`` miss the next timestep of the table?"""
    guess = [t - total // len(timesteps) for t in timesteps]
    return any(g != s for g, s in zip(guess, timesteps[1:], strict=False)) or guess[-1] >= 0


class Network:
    """Stands for a trained network: a Gaussian's exact prediction plus random structure of its own at every call.

    The outputs are consistent with the sample at every noise level (as a network's are), so trajectories stay of size 1 and a
    difference between two schedulers is not blown up by 1 / alpha or 1 / sigma. Evaluated in float64.
    """

    def __init__(self, prediction_type: str, seed: int = 0, channels: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.kind, self.channels = prediction_type, channels
        self.mu, self.s = (
            torch.randn(SHAPE, generator=g).double() * 0.5,
            0.3 + torch.rand(SHAPE, generator=g).double(),
        )
        self.own = torch.randn(64, *SHAPE, generator=g).double()

    def __call__(self, x: Tensor, bar: float, call: int) -> Tensor:
        a, b = bar**0.5, (1 - bar) ** 0.5
        x = x.double()
        x0 = (
            self.mu
            + a * self.s**2 / (a**2 * self.s**2 + b**2) * (x - a * self.mu)
            + 0.3 * b * self.own[call % 64]
        )
        eps = (x - a * x0) / b
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[self.kind]
        if self.channels == 2:
            out = torch.cat([out, self.own[-1 - call % 64].tanh()], dim=1)
        return out


def trajectory(
    scheduler: Any,
    network: Network,
    steps: int,
    bars: list[float],
    dtype: torch.dtype = torch.float32,
    **step_options: Any,
) -> list[tuple[Tensor, float]]:
    """Every sample and every x_0 of a whole run, each with its natural size; ``bars`` are the noise levels of the network.

    The size of a state is its largest element, at least 1. Where a step subtracts large numbers to get small ones (x at a large
    sigma, or x_0 = (x - sigma eps) / alpha), a twentieth of these numbers counts too, from then on: 1e-5 of it is 8 roundings.
    """
    scheduler.set_timesteps(steps)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=g).to(dtype) * float(scheduler.init_noise_sigma)
    in_sigma = float(scheduler.init_noise_sigma) != 1.0
    if "generator" in step_options:
        step_options["generator"] = g
    states, size = [], 1.0
    for call, (t, bar, after) in enumerate(zip(scheduler.timesteps, bars, [*bars[1:], 1.0], strict=True)):
        output = network(scheduler.scale_model_input(x, t), bar, call).to(dtype)
        out = scheduler.step(output, t, x, **step_options)
        large = 0.05 * x.abs().max().item()
        if not in_sigma:
            large = large / bar**0.5 if network.kind == "epsilon" else 0.0
        x, x0 = out.prev_sample, getattr(out, "pred_original_sample", None)
        if x0 is not None:
            states.append((x0, max(size, x0.abs().max().item(), large)))
        size = max(size, large * (1 if in_sigma else after**0.5))
        states.append((x, max(size, x.abs().max().item())))
    return states


def largest_difference(ours: list[tuple[Tensor, float]], theirs: list[tuple[Tensor, float]]) -> float:
    """Max-abs over all states, as a fraction of the size."""
    return max(((a - b).abs().max() / size).item() for (a, _), (b, size) in zip(ours, theirs, strict=True))


def grid(*axes: tuple) -> list[tuple]:
    return list(itertools.product(*axes))
