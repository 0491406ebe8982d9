"""DDIM inversion: its trajectory, and the way back."""

import math

import numpy as np
import pytest
import torch

from .oracles import F64, Gaussian
from .plain import S


def exact(data: Gaussian, scheduler: S.DDIMScheduler):
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar = scheduler.alphas_cumprod_f64[t[0]].item()
        return data.predict(scheduler.config.prediction_type, x, math.sqrt(bar), math.sqrt(1 - bar))

    return model


def round_trip(scheduler: S.DDIMScheduler, data: Gaussian, steps: int) -> tuple[float, float]:
    """(largest error after there and back, largest distance of x_T from the exact flow)."""
    model, x0 = exact(data, scheduler), data.mu + data.s * data.start
    states = S.ddim_inversion(model, scheduler, x0, steps)
    scheduler.set_timesteps(steps)
    x, top = states[-1], scheduler.transitions[0]
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
    variance = data.variance(top.alpha, top.sigma)
    flow = top.alpha * data.mu + variance.sqrt() / data.s * (x0 - data.mu)
    return (x - x0).abs().max().item(), (states[-1] - flow).abs().max().item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", S.TIMESTEP_SPACINGS)
def test_errors_vanish_at_order_one(prediction_type: str, spacing: str) -> None:
    """There and back returns to x_0, and x_T nears the exact flow of Gaussian data."""
    scheduler = S.DDIMScheduler(
        num_train_timesteps=4096, beta_start=0.1 / 4096, beta_end=20 / 4096, prediction_type=prediction_type,
        timestep_spacing=spacing, clip_sample=False,
    )  # fmt: skip
    errors = np.array([round_trip(scheduler, Gaussian(), steps) for steps in (64, 128, 256)])
    slopes = -np.polyfit(range(3), np.log2(errors), 1)[0]
    # the first step, from no noise at all, shrinks like sqrt(t): a little below order 1 on the way there
    assert (errors[-1] < 0.06).all() and (slopes > 0.75).all() and (slopes < 1.3).all(), (errors, slopes)


def test_every_state_is_returned_and_the_scheduler_is_left_alone() -> None:
    s, data = S.DDIMScheduler(), Gaussian()
    s.set_timesteps(3)
    states = S.ddim_inversion(exact(data, s), s, data.start, 8)
    assert (
        states.shape == (9, *data.start.shape) and states.dtype == F64 and torch.equal(states[0], data.start)
    )
    assert s.num_inference_steps == 3 and len(s.transitions) == 3


def test_with_the_noise_known_the_trip_closes_exactly() -> None:
    """A network whose answer does not depend on x: then eps(x_s, t) = eps(x_t, t), and inversion is exact with one step."""
    eps = torch.randn(2, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for steps in (1, 4, 50):
        for to_one in (True, False):
            s = S.DDIMScheduler(clip_sample=False, set_alpha_to_one=to_one, timestep_spacing="trailing")
            states = S.ddim_inversion(lambda x, t: eps, s, 2 * eps + 1, steps)
            s.set_timesteps(steps)
            x = states[-1]
            for i, t in enumerate(s.timesteps):
                x = s.step(eps, t, x).prev_sample
                assert (x - states[-2 - i]).abs().max() < 1e-10


def test_learned_variances_are_ignored() -> None:
    s, data = S.DDIMScheduler(), Gaussian()
    model = exact(data, s)
    a = S.ddim_inversion(model, s, data.start, 5)
    b = S.ddim_inversion(lambda x, t: torch.cat([model(x, t), 9 * x], 1), s, data.start, 5)
    assert torch.equal(a, b)
