"""DDIM run backwards: from an image to the noise that DDIM turns into it (Song et al., 2021, arXiv 2010.02502, section 4.3).

DDIM with eta = 0 takes x_t to ``x_s = alpha_s x_0 + sigma_s eps`` with x_0 and eps read at x_t. Solved for x_t it reads

    x_t = alpha_t (x_s - sigma_s eps) / alpha_s + sigma_t eps,        eps = eps(x_t, t),

which holds x_t on both sides. Inversion puts eps(x_s, t) for eps(x_t, t), as both change little in a small step (Mokady et al.,
2023, arXiv 2211.09794, section 3.1). So the error is of order 1 in the step. Pairs (s, t) come from the sampler's own table: with
other pairs the round trip would not close, however many steps.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .ddim import DDIMScheduler
from .stepping import affine, prepare


@torch.no_grad()
def ddim_inversion(
    model: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDIMScheduler,
    x0: Float[Tensor, "b ..."],
    num_inference_steps: int,
) -> Float[Tensor, "n b ..."]:
    """Every state from x_0 to x_T.

    Args:
        model: ``model(x, t) -> prediction`` with t ``(b,)``; the scheduler's ``prediction_type``, c or 2c channels.
        scheduler: gives schedule, spacing and prediction type; it is not changed. x_0 is not clipped: clipping has no inverse.
        x0: clean samples.
        num_inference_steps: as many as the sampler will take.

    Returns:
        ``(num_inference_steps + 1, b, ...)``: element 0 is x_0, the last one is where sampling starts, and element i is what the
        sampler should pass i steps before its end.
    """
    table = DDIMScheduler.from_config(scheduler.config)
    table.set_timesteps(num_inference_steps)
    states = [x0]
    for row in reversed(table.transitions):
        x = states[-1]
        t = torch.full((len(x),), row.t, dtype=torch.int64, device=x.device)
        output, _ = prepare(model(x, t), x)
        # eps is read as the network means it, at level t; only x is that of level s.
        epsilon = affine(row.epsilon[0], x, row.epsilon[1], output)
        clean = affine(1 / row.alpha_prev, x, -row.sigma_prev / row.alpha_prev, epsilon)
        states.append(affine(row.alpha, clean, row.sigma, epsilon))
    return torch.stack(states)
