"""Oracle 1 of 3: what the samplers do to Gaussian data, to one point and to a finite data set is known exactly."""

import math

import pytest
import torch

import minilib.schedulers as S

from .oracles import CHECKS, F64, Gaussian, alpha_bar_reference, assert_close
from .plain import S as plain


@pytest.mark.parametrize("name", CHECKS)
def test_closed_form(name: str) -> None:
    CHECKS[name](S)


DETERMINISTIC = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]


def run_vp(scheduler, predict, noise, steps):
    """Sample with ``predict(x, t, alpha, sigma)`` from unit noise, in float64."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    sigmas = scheduler.sigmas.double() if hasattr(scheduler, "sigmas") else None
    for i, t in enumerate(scheduler.timesteps):
        if sigmas is None:
            bar = scheduler.alphas_cumprod_f64[t].item()
            a, b = math.sqrt(bar), math.sqrt(1 - bar)
        else:
            a = 1 / math.hypot(1, sigmas[i])
            b = float(sigmas[i]) * a
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), a, b), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_many_steps_reach_the_probability_flow_solution(name: str) -> None:
    """x_0 = mu + s (x_T - a mu) / sqrt(a^2 s^2 + sigma^2): the exact flow of Gaussian data."""
    data = Gaussian()
    extra = {"clip_sample": False} if name in ("DDIMScheduler", "HeunDiscreteScheduler") else {}
    s = getattr(plain, name)(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", **extra)
    bar = alpha_bar_reference("linear", 1000)[-1]
    a, b = math.sqrt(bar), math.sqrt(1 - bar)
    edm = name.startswith(("Euler", "Heun"))
    x_top = data.start * b if edm else data.start  # EDM's first sample is sigma z; scaled by a it is b z
    exact = data.mu + data.s * (x_top - a * data.mu) / data.variance(a, b).sqrt()
    errors = [
        (run_vp(s, lambda x, a, b: data.predict("epsilon", x, a, b), data.start, n) - exact).abs().max()
        for n in (50, 400)
    ]
    assert errors[1] < 0.02 and errors[1] < errors[0] / 5  # eight times the steps


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_finite_data_set_is_reached_in_order(name: str) -> None:
    """Points -1, 0, 2 in one dimension: the flow keeps the order of samples, so a quantile of noise finds its point."""
    points = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)

    def predict(x, a, b):
        logits = -((x - a * points.view(3, 1, 1, 1, 1)) ** 2) / (2 * b * b)
        x0 = (logits.softmax(0) * points.view(3, 1, 1, 1, 1)).sum(0)
        return (x - a * x0) / b

    extra = {"clip_sample": False} if name in ("DDIMScheduler", "HeunDiscreteScheduler") else {}
    s = getattr(plain, name)(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", **extra)
    quantile = torch.tensor([0.05, 0.2, 0.3, 0.36, 0.5, 0.63, 0.7, 0.95], dtype=F64)
    noise = torch.special.ndtri(quantile).view(-1, 1, 1, 1)
    expected = points[(quantile * 3).long()].view(-1, 1, 1, 1)
    assert_close(run_vp(s, predict, noise, 200), expected, 1e-3, "nearest point")


def test_oracles_hold_in_float32_too() -> None:
    """The public dtype: the same trajectory in float32 stays within rounding of the float64 one."""
    data, low = Gaussian(), Gaussian(dtype=torch.float32)
    s = S.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    exact = run_vp(s, lambda x, a, b: data.predict("epsilon", x, a, b), data.start, 50)
    single = run_vp(s, lambda x, a, b: low.predict("epsilon", x, a, b), low.start, 50)
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, 1e-5, "float32")
