"""Oracle 3 of 3: the order of each solver, measured against an exact solution, and the limits that tie solvers together.

In one dimension the probability-flow equation carries each sample along a fixed quantile of the marginals. So for a mixture of
Gaussians, whose marginals have closed-form distribution functions, the exact trajectory is F_t^{-1}(F_T(x_T)): no solver needed.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from .oracles import F64, Gaussian, assert_close
from .plain import S

WEIGHT, MEAN, STD = (
    torch.tensor(v, dtype=F64).view(3, 1) for v in ([0.3, 0.5, 0.2], [-1.5, 0.2, 1.4], [0.4, 0.3, 0.5])
)
QUANTILES = torch.linspace(0.08, 0.92, 15, dtype=F64)


def cdf(x: Tensor, a: float, b: float) -> Tensor:
    return (WEIGHT * torch.special.ndtr((x - a * MEAN) / (a * a * STD**2 + b * b).sqrt())).sum(0)


def quantiles(a: float, b: float) -> Tensor:
    """Where the exact trajectories are at the level ``a x_0 + b eps``."""
    low, high = torch.full_like(QUANTILES, -30.0), torch.full_like(QUANTILES, 30.0)
    for _ in range(90):
        middle = (low + high) / 2
        below = cdf(middle, a, b) < QUANTILES
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def denoise(x: Tensor, a: float, b: float) -> Tensor:
    """The posterior mean of x_0."""
    variance = a * a * STD**2 + b * b
    logits = WEIGHT.log() - 0.5 * variance.log() - (x - a * MEAN) ** 2 / (2 * variance)
    return (logits.softmax(0) * (MEAN + a * STD**2 / variance * (x - a * MEAN))).sum(0)


T = 4096
BETAS = torch.linspace(0.1 / T, 20 / T, T, dtype=F64)
BAR = (1 - BETAS).cumprod(0)
START, END = 3584, 512


def error(name: str, steps: int, **options: object) -> float:
    """Largest error at the level END after ``steps`` equal steps in t from START, on the exact initial state."""
    s = getattr(S, name)(num_train_timesteps=T, trained_betas=BETAS.tolist(), **options)
    stride = (START - END) // steps
    s.set_timesteps(timesteps=list(range(START, END - 1, -stride)))
    edm = isinstance(s, S.EulerDiscreteScheduler | S.HeunDiscreteScheduler)
    level = {t: (math.sqrt(BAR[t]), math.sqrt(1 - BAR[t])) for t in range(END, START + 1)}
    x = quantiles(*level[START])
    x = x / level[START][0] if edm else x
    calls = 2 * steps if s.order == 2 else steps
    for t in s.timesteps[:calls]:
        a, b = level[int(t)]
        scaled = s.scale_model_input(x, t)
        x = s.step((scaled - a * denoise(scaled, a, b)) / b, t, x).prev_sample
    a, b = level[END]
    return (x * (a if edm else 1.0) - quantiles(a, b)).abs().max().item()


def slope(errors: list[float]) -> float:
    """Order of the method: the fall of log2(error) for each doubling of the steps."""
    return -float(np.polyfit(range(len(errors)), np.log2(errors), 1)[0])


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        ("DDIMScheduler", 1, {"clip_sample": False}),
        ("DPMSolverMultistepScheduler", 1, {"solver_order": 1}),
        ("DPMSolverMultistepScheduler", 2, {}),
        ("DPMSolverMultistepScheduler", 2, {"solver_type": "heun"}),
        ("EulerDiscreteScheduler", 1, {}),
        ("HeunDiscreteScheduler", 2, {}),
    ],
)
def test_order(name: str, order: int, options: dict) -> None:
    errors = [error(name, n, **options) for n in (32, 64, 128, 256)]
    assert abs(slope(errors) - order) < 0.2, errors
    assert errors[-1] < (0.02 if order == 1 else 2e-4), errors


def test_flow_order() -> None:
    errors = []
    for steps in (32, 64, 128, 256):
        s = S.FlowMatchEulerDiscreteScheduler()
        levels = np.linspace(0.95, 0.05, steps + 1)
        s.set_timesteps(sigmas=levels.tolist())
        x = quantiles(0.05, 0.95)
        for t, b in zip(s.timesteps[:steps], levels, strict=False):
            x0 = denoise(x, 1 - b, b)
            x = s.step((x - (1 - b) * x0) / b - x0, t, x).prev_sample
        errors.append((x - quantiles(0.95, 0.05)).abs().max().item())
    assert abs(slope(errors) - 1) < 0.2 and errors[-1] < 0.02, errors


def test_eta_0_is_deterministic_and_eta_1_is_not() -> None:
    s, x, model_output = S.DDIMScheduler(), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    s.set_timesteps(10)
    a, b = (
        s.step(model_output, 500, x, generator=torch.Generator().manual_seed(k)).prev_sample for k in (0, 1)
    )
    assert torch.equal(a, b)
    a, b = (
        s.step(model_output, 500, x, eta=1.0, generator=torch.Generator().manual_seed(k)).prev_sample
        for k in (0, 1)
    )
    assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("prediction_type", S.PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [200, 7])
def test_eta_1_is_ddpm(prediction_type: str, steps: int) -> None:
    """The same Gaussian, so with the same noise the same samples, all the way down."""
    options = {
        "prediction_type": prediction_type,
        "clip_sample": False,
        "timestep_spacing": "trailing",
        "num_train_timesteps": 200,
    }
    ddim, ddpm, data = S.DDIMScheduler(**options), S.DDPMScheduler(**options), Gaussian()
    g, h = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    x = y = data.start
    for s in (ddim, ddpm):
        s.set_timesteps(steps)
    for row in ddim.transitions:
        out, out_y = (data.predict(prediction_type, z, row.alpha, row.sigma) for z in (x, y))
        x = ddim.step(out, row.t, x, eta=1.0, generator=g).prev_sample
        y = ddpm.step(out_y, row.t, y, generator=h).prev_sample
        assert_close(x, y, 1e-9, f"t={row.t}")


@pytest.mark.parametrize("prediction_type", S.PREDICTION_TYPES)
def test_dpm_of_order_1_is_ddim(prediction_type: str) -> None:
    """And Euler in EDM's variable is the same step again, seen from x / alpha."""
    options = {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    ddim = S.DDIMScheduler(clip_sample=False, **options)
    dpm, euler = S.DPMSolverMultistepScheduler(solver_order=1, **options), S.EulerDiscreteScheduler(**options)
    data = Gaussian()
    for s in (ddim, dpm, euler):
        s.set_timesteps(20)
    x = y = data.start
    z = x / ddim.transitions[0].alpha
    for row, t in zip(ddim.transitions, euler.timesteps, strict=True):
        at = (row.alpha, row.sigma)
        scaled = euler.scale_model_input(z, t)
        z = euler.step(data.predict(prediction_type, scaled, *at), t, z).prev_sample
        x = ddim.step(data.predict(prediction_type, x, *at), row.t, x).prev_sample
        y = dpm.step(data.predict(prediction_type, y, *at), row.t, y).prev_sample
        assert_close(x, y, 1e-9, "DPM++ 1")
        assert_close(x, z * row.alpha_prev, 1e-9, "Euler")


def test_finite_data_needs_no_more_than_one_step_at_a_point() -> None:
    """One data point: every deterministic sampler lands on it, with any number of steps."""
    point = torch.full((1, 1, 2, 2), 0.4, dtype=F64)
    for name in (
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
    ):
        s = getattr(S, name)(prediction_type="sample")
        for steps in (1, 2, 5):
            s.set_timesteps(steps)
            x = (
                torch.randn(1, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
                * s.init_noise_sigma
            )
            for t in s.timesteps:
                x = s.step(point, t, x).prev_sample
            assert_close(x, point, 1e-12, f"{name} {steps}")
