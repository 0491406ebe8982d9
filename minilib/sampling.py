"""Sampling, as a generator over any scheduler that speaks diffusers' protocol.

The loop is the whole idea: ask the model, let the scheduler take one step, hand the state out. What to draw, log, cache or stop
is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]
"""``model(x, t) -> prediction``; ``x (b, ...)``, ``t (b,)`` on the 0..1000 scale."""


@dataclass(frozen=True)
class SampleStep:
    """The state after one step: ``x`` is the new sample, ``pred_original_sample`` the clean image the step aimed at."""

    index: int
    t: float
    x: Tensor
    pred_original_sample: Tensor | None


def initial_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit Gaussian noise, drawn on the generator's device so that a seed means the same everywhere, then moved."""
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


@torch.no_grad()
def sample(
    model: Model,
    scheduler: Any,
    noise: Float[Tensor, "b ..."],
    *,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
) -> Iterator[SampleStep]:
    """Go from noise to a sample, one scheduler step at a time.

    Args:
        model: ``model(x, t)``; wrap labels and guidance around it (:mod:`minilib.guidance`).
        scheduler: ours or diffusers'. Its ``set_timesteps`` is called here.
        noise: unit Gaussian ``(b, ...)``; it is scaled by ``init_noise_sigma`` here.
        num_inference_steps: at least 1.
        generator: for schedulers that add noise.

    Yields:
        One :class:`SampleStep` a *model call*: a two-stage scheduler such as Heun yields about twice as many.

    Raises:
        ValueError: ``num_inference_steps < 1``.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}")
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    stochastic = {"generator": generator} if generator is not None else {}
    for index, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        prediction = model(scaled, t.expand(len(x)))
        output = scheduler.step(prediction, t, x, **stochastic)
        x = output.prev_sample
        yield SampleStep(index, float(t), x, getattr(output, "pred_original_sample", None))


def sample_final(
    model: Model,
    scheduler: Any,
    noise: Float[Tensor, "b ..."],
    *,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b ..."]:
    """The last state of :func:`sample`."""
    x = noise
    for step in sample(model, scheduler, noise, num_inference_steps=num_inference_steps, generator=generator):
        x = step.x
    return x
