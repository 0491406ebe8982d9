"""What a scheduler step costs beside diffusers': 50 steps with a model that costs nothing."""

from collections.abc import Iterator
from functools import partial

import diffusers
import torch

from minilib import schedulers
from minilib.bench import Case

SHAPE, STEPS = (16, 1, 8, 8), 50
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
NAMES = {
    "DDPMScheduler": {},
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": None,
}


def loop(scheduler, x: torch.Tensor, output: torch.Tensor, generator: torch.Generator | None) -> None:
    scheduler.set_timesteps(STEPS)
    kwargs = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, **kwargs).prev_sample


def cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    for name, options in NAMES.items():
        kwargs = {} if options is None else COSINE | options
        draw = torch.Generator().manual_seed(1) if name == "DDPMScheduler" else None
        mine, theirs = getattr(schedulers, name)(**kwargs), getattr(diffusers, name)(**kwargs)
        yield Case(
            name=f"{name}, {STEPS} steps of {SHAPE}",
            peer="diffusers",
            goal=0.5 if options is None else 0.25,
            ours=partial(loop, mine, x, output, draw),
            theirs=partial(loop, theirs, x, output, draw),
        )
