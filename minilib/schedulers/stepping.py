"""The small operations that every ``step`` is made of, and the place a solver with memory keeps in its table."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .base import HALF, Generators, Scheduler, SchedulerOutput, Timestep

# `x * 0.5` wraps the number into a float64 tensor first; a number given as `alpha` goes to the kernel as it is. At the sizes of
# these pages that is 1.8 us in place of 3.0.
ZERO = torch.zeros((), dtype=torch.float32, device="cpu")


def scaled(a: float, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``a x``; ``x`` itself if a is 1.

    >>> scaled(0.5, torch.ones(2))
    tensor([0.5000, 0.5000])
    """
    return x if a == 1.0 else torch.add(ZERO, x, alpha=a)


def affine(
    a: float, x: Float[Tensor, "*shape"], b: float, y: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """``a x + b y``; it may be ``x`` or ``y`` itself where a coefficient is 0 or 1.

    >>> affine(0.5, torch.ones(2), 2.0, torch.ones(2))
    tensor([2.5000, 2.5000])
    """
    if b == 0.0:
        return scaled(a, x)
    if a == 0.0:
        return scaled(b, y)
    return torch.add(scaled(a, x), y, alpha=b)


def scalar(timestep: Timestep) -> int | float:
    """A timestep as a Python number."""
    if not isinstance(timestep, Tensor):
        return timestep
    try:
        return timestep.item()
    except RuntimeError:
        shape = tuple(timestep.shape)
        raise ValueError(
            f"step takes one timestep for the whole batch; got a tensor of shape {shape}"
        ) from None


def prepare(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The first c channels of the output (a model with learned variances gives 2c) and the sample, in the sample's dtype.

    Half precision is stepped in float32.

    Raises:
        ValueError: the output has neither the sample's shape nor twice its channels.
    """
    if model_output.shape != sample.shape:
        channels = sample.shape[1] if sample.ndim > 1 else -1
        expected = (sample.shape[0], 2 * channels, *sample.shape[2:])
        if tuple(model_output.shape) != expected:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}; the sample's {tuple(sample.shape)} "
                f"or, with learned variances, {expected} was expected"
            )
        model_output = model_output[:, :channels]
    if sample.dtype in HALF:
        sample = sample.float()
    if model_output.dtype != sample.dtype:
        model_output = model_output.to(sample.dtype)
    return model_output, sample


def finish(
    prev: Tensor, x0: Tensor, dtype: torch.dtype, return_dict: bool
) -> SchedulerOutput | tuple[Tensor, Tensor]:
    """Back to the sample's dtype, as an output object or as a plain tuple."""
    if dtype in HALF:
        prev, x0 = prev.to(dtype), x0.to(dtype)
    return SchedulerOutput(prev, x0) if return_dict else (prev, x0)


def gaussian_noise(like: Tensor, generator: Generators) -> Tensor:
    """Unit noise of ``like``'s shape, drawn on the generator's device; a list holds one generator for each sample."""
    if isinstance(generator, list):
        if len(generator) != len(like):
            raise ValueError(
                f"got {len(generator)} generators for a batch of {len(like)}; one for each sample is needed"
            )
        return torch.cat([gaussian_noise(like[i : i + 1], g) for i, g in enumerate(generator)])
    source = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=source, dtype=like.dtype).to(like.device)


def steps_requested(steps: int | None, custom: Sequence[float] | None, limit: int) -> int:
    """How many steps ``set_timesteps`` was asked for; exactly one of the two arguments is given."""
    if (steps is None) == (custom is None):
        raise ValueError("set_timesteps needs either num_inference_steps or a table of its own, and not both")
    count = len(custom) if steps is None else steps
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= limit:
        raise ValueError(f"num_inference_steps must be an integer from 1 to {limit}; got {count!r}")
    if custom is not None and any(a <= b for a, b in zip(custom, custom[1:], strict=False)):
        raise ValueError(f"a table of one's own must go down, from noise to data; got {shown(list(custom))}")
    return count


class Sequential(Scheduler):
    """A solver that walks its table in order: it counts steps, so equal timesteps in the table do no harm.

    The first step may be anywhere in the table (as when an image is only half noised); the next ones follow it.
    """

    step_index: int | None = None
    """Place in the table of the next step; None: to be found from its timestep."""

    def _start(self, timesteps: Tensor, num_inference_steps: int) -> None:
        self.timesteps, self.num_inference_steps = timesteps, num_inference_steps
        self._table: list[float] = timesteps.tolist()
        self.step_index = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this place in the table, instead of looking the first timestep up."""
        self.step_index = begin_index

    def _locate(self, timestep: Timestep) -> int:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(num_inference_steps) before step")
        t, index, table = scalar(timestep), self.step_index, self._table
        if index is None:
            if t not in table:
                raise ValueError(f"t={t} is not in timesteps: {shown(table)}")
            # Of equal timesteps the last one: in Heun's table it is where a step begins. But the first is the first.
            return 0 if t == table[0] else len(table) - 1 - table[::-1].index(t)
        if index >= len(table):
            raise ValueError(f"all {len(table)} timesteps are done; call set_timesteps to start again")
        if table[index] != t:
            raise ValueError(
                f"t={t}, but the next timestep is {table[index]}; call set_timesteps to start again"
            )
        return index


def shown(table: Sequence[Any]) -> str:
    """The head of a table, for an error message."""
    return ", ".join(map(str, table[:4])) + (f", ... ({len(table)} in all)" if len(table) > 4 else "")
