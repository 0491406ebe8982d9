"""Where diffusers is wrong: each case against closed form, so that leaving it out of the comparison leaves no hole.

In 0.42.1 each bug is also shown to be there. When a later version mends one, its cell can go back into the comparison.
"""

import math
from collections.abc import Callable

import diffusers
import pytest
import torch

import minilib.schedulers as S

from .oracles import F64, alpha_bar_reference, table_reference
from .peers import DIFFUSERS, ddim_jump_is_wrong, pair

# numpy 2 warns of how diffusers turns its tables into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ZERO, ONE = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
Case = tuple[float, float, float]  # ours, the truth, diffusers'


def ddim_wrong_level(spacing: str, steps: int) -> Case:
    """eps = 0: the first step is x alpha_s / alpha_t, with s the second timestep of the table."""
    ours, theirs = pair("DDIMScheduler", timestep_spacing=spacing, clip_sample=False)
    table, bars = table_reference(spacing, steps, 1000), alpha_bar_reference("linear", 1000)
    assert ddim_jump_is_wrong(table, 1000)
    for s in (ours, theirs):
        s.set_timesteps(steps)
    got = [s.step(ZERO, s.timesteps[0], ONE).prev_sample[0, 0, 0, 0].item() for s in (ours, theirs)]
    return got[0], math.sqrt(bars[table[1]] / bars[table[0]]), got[1]


def dpm_karras_cosine() -> Case:
    """One point as data: all steps of the table are taken, and the last one lands on the point."""
    ours, theirs = pair(
        "DPMSolverMultistepScheduler",
        beta_schedule="squaredcos_cap_v2",
        use_karras_sigmas=True,
        prediction_type="sample",
    )
    got = []
    for s in (ours, theirs):
        s.set_timesteps(20)
        assert len(set(s.timesteps.tolist())) < 20  # equal timesteps: the cause
        x = ONE
        try:
            for t in s.timesteps:
                x = s.step(0.4 * ONE, t, x).prev_sample
            got.append(x[0, 0, 0, 0].item())
        except IndexError:
            got.append(math.nan)
    return got[0], 0.4, got[1]


def flow_double_shift() -> Case:
    """The smallest sigma before 0: 1/1000 shifted once."""
    ours, theirs = pair("FlowMatchEulerDiscreteScheduler", shift=3.0)
    for s in (ours, theirs):
        s.set_timesteps(10)
    return ours.sigmas[-2].item(), 3 * 0.001 / (1 + 2 * 0.001), theirs.sigmas[-2].item()


def ddpm_last_noise(**options: object) -> Case:
    """The spread of the last sample over two seeds: none."""
    got = []
    for s in pair("DDPMScheduler", variance_type="fixed_large", clip_sample=False, **options):
        s.set_timesteps(10)
        a, b = (
            s.step(ZERO, s.timesteps[-1], ONE, generator=torch.Generator().manual_seed(k)).prev_sample
            for k in (0, 1)
        )
        got.append((a - b).abs().max().item())
    return got[0], 0.0, got[1]


def trailing_count(name: str, steps: int) -> Case:
    ours, theirs = pair(name, timestep_spacing="trailing")
    for s in (ours, theirs):
        s.set_timesteps(steps)
    assert ours.timesteps[0] == 999 and ours.timesteps[-1] >= 0
    return float(len(ours.timesteps)), float(steps), float(len(theirs.timesteps))


def dpm_add_noise_reversed() -> Case:
    """Almost no noise at t = 0: x_0 = 1 stays almost 1."""
    got = [
        s.add_noise(ONE, ZERO, torch.tensor([0]))[0, 0, 0, 0].item()
        for s in pair("DPMSolverMultistepScheduler")
    ]
    return got[0], math.sqrt(1 - 1e-4), got[1]


def euler_velocity_index() -> Case:
    """v = -sigma_0 x_0 at t = 0 without noise."""
    got = [
        s.get_velocity(ONE, ZERO, torch.tensor([0.0]))[0, 0, 0, 0].item()
        for s in pair("EulerDiscreteScheduler")
    ]
    return got[0], -math.sqrt(1e-4), got[1]


def dpm_learned_variance_channels() -> Case:
    """One channel and its variance: x_0 = x / alpha for eps = 0, whatever the second half says."""
    ours, theirs = pair("DPMSolverMultistepScheduler", variance_type="learned_range")
    output, got = torch.cat([ZERO, 5 * ONE], dim=1), []
    for s in (ours, theirs):
        s.set_timesteps(5)
        out = s.step(output, s.timesteps[0], ONE).prev_sample
        got.append(out[0, -1, 0, 0].item() if out.shape == ONE.shape else math.nan)
    bars, table = alpha_bar_reference("linear", 1000), table_reference("linspace", 6, 1000)
    return got[0], math.sqrt(bars[table[1]] / bars[table[0]]), got[1]


def dpm_unknown_timestep() -> Case:
    """1 for an error, 0 for an answer."""
    got = []
    for s in pair("DPMSolverMultistepScheduler"):
        s.set_timesteps(5)
        try:
            s.step(ZERO, 998, ONE)
            got.append(0.0)
        except ValueError:
            got.append(1.0)
    return got[0], 1.0, got[1]


def zero_snr_epsilon(name: str) -> Case:
    """1 for an error, 0 for numbers that are not finite."""
    got = []
    for s in pair(name, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False):
        try:
            s.set_timesteps(5)
            got.append(float(s.step(ONE, s.timesteps[0], 2 * ONE).prev_sample.isfinite().all()) - 1)
        except ValueError:
            got.append(1.0)
    return got[0], 1.0, got[1]


KNOWN_DIFFUSERS_BUGS: dict[str, Callable[[], Case]] = {
    "9261 DDIM trailing, N does not divide T": lambda: ddim_wrong_level("trailing", 13),
    "11347 DDIM linspace": lambda: ddim_wrong_level("linspace", 5),
    "12633 DDIM linspace": lambda: ddim_wrong_level("linspace", 10),
    "12771 DPM-Solver++ Karras cosine": dpm_karras_cosine,
    "13243 flow shifted twice": flow_double_shift,
    "DDPM noise in the last step, trailing": lambda: ddpm_last_noise(timestep_spacing="trailing"),
    "DDPM noise in the last step, offset": lambda: ddpm_last_noise(steps_offset=1),
    **{
        f"trailing has N + 1 timesteps, {name}": lambda name=name: trailing_count(name, 61)
        for name in (
            "DDPMScheduler",
            "DDIMScheduler",
            "DPMSolverMultistepScheduler",
            "EulerDiscreteScheduler",
        )
    },
    "DPM-Solver++ add_noise before set_timesteps": dpm_add_noise_reversed,
    "Euler get_velocity": euler_velocity_index,
    "DPM-Solver++ learned variance takes three channels": dpm_learned_variance_channels,
    "DPM-Solver++ takes an unknown t for the last": dpm_unknown_timestep,
    "zero terminal SNR with epsilon, DDIM": lambda: zero_snr_epsilon("DDIMScheduler"),
    "zero terminal SNR with epsilon, DDPM": lambda: zero_snr_epsilon("DDPMScheduler"),
}


@pytest.mark.parametrize("bug", KNOWN_DIFFUSERS_BUGS)
def test_ours_is_right(bug: str) -> None:
    ours, truth, theirs = KNOWN_DIFFUSERS_BUGS[bug]()
    assert abs(ours - truth) <= 1e-5 * max(1.0, abs(truth)), (ours, truth)
    if DIFFUSERS == "0.42.1":
        assert not abs(theirs - truth) <= 1e-3 * max(1.0, abs(truth)), f"mended? {theirs} {truth}"


def test_the_count_in_the_docs() -> None:
    """``trailing`` with T = 1000: 62 of the first 1000 step counts go wrong in numpy's arange."""
    import numpy as np

    wrong = [n for n in range(1, 1001) if len(np.arange(1000, 0, -1000 / n)) != n]
    assert len(wrong) == 62 and wrong[:2] == [61, 103]
    for n in wrong:
        assert len(S.schedules.spaced_timesteps("trailing", n, 1000)) == n


def test_dpm_steps_through_equal_timesteps_in_closed_form() -> None:
    """Issue 12771's cell on Gaussian data: order 1 is DDIM's factor between Karras' levels."""
    mu, sd = 0.3, 0.5
    s = S.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True, solver_order=1
    )
    s.set_timesteps(20)
    bar = alpha_bar_reference("squaredcos_cap_v2", 1000)
    low, high = (math.sqrt((1 - b) / b) for b in (bar[0], bar[-1]))
    ramp = [(high ** (1 / 7) + k / 19 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for k in range(20)]
    levels = [(1 / math.hypot(1, v), v / math.hypot(1, v)) for v in [*ramp, 0.0]]
    x = torch.randn(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for t, (a, b), (a2, b2) in zip(s.timesteps, levels[:-1], levels[1:], strict=True):
        variance = a * a * sd * sd + b * b
        expected = a2 * mu + (a2 * a * sd * sd + b2 * b) / variance * (x - a * mu)
        x = s.step(b / variance * (x - a * mu), t, x).prev_sample
        assert (x - expected).abs().max() < 1e-8


def test_diffusers_is_the_one_compared_with() -> None:
    assert diffusers.__version__ == DIFFUSERS
