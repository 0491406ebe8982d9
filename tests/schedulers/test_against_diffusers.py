"""Oracle 2 of 3: diffusers, over the grid of options, whole trajectories, max-abs.

Schedule, spacing, prediction type and zero terminal SNR are crossed in full; the options of each scheduler in a few combinations.
Cells in which diffusers is known to be wrong are left out by name here and covered in closed form in
``test_known_diffusers_bugs.py`` and ``test_closed_form.py``.
"""

import numpy as np
import pytest
import torch

from .peers import (
    PREDICTIONS,
    SCHEDULES,
    SPACINGS,
    Network,
    ddim_jump_is_wrong,
    grid,
    largest_difference,
    pair,
    trajectory,
)

# numpy 2 warns of how diffusers turns its tables into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-5
OWN_ROUNDING = 5e-4
VP = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


def bars_at(scheduler, steps: int) -> list[float]:
    """Noise levels of the table, in float64, from our abar (compared with diffusers' in ``test_schedules.py``)."""
    scheduler.set_timesteps(steps)
    if scheduler.init_noise_sigma != 1.0 or hasattr(scheduler, "sigmas"):
        sigmas = [row[0] if hasattr(row, "sigma") else None for row in scheduler._rows]
        if None not in sigmas:
            return [1 / (1 + s * s) for s in sigmas]
        return (1 / (1 + scheduler.sigmas[:-1].double() ** 2)).tolist()
    return scheduler.alphas_cumprod_f64[scheduler.timesteps].tolist()


def compare(
    name: str, steps: int, prediction: str, step_options: dict | None = None, channels: int = 1, **options
):
    """Whole trajectories: to 1e-5 with the same abar, and to diffusers' own rounding of abar with its own."""
    for exact, tolerance in ((True, TOLERANCE), (False, OWN_ROUNDING))[
        : 2 if prediction == "epsilon" and channels == 1 else 1
    ]:
        ours, theirs = pair(name, exact, prediction_type=prediction, **options)
        bars = bars_at(ours, steps)
        theirs.set_timesteps(steps)
        assert ours.timesteps.dtype == theirs.timesteps.dtype
        # zero terminal SNR: two places of the table have sigma = 4096, and float32 decides which one Karras' table names
        cut = options.get("rescale_betas_zero_snr") and options.get("use_karras_sigmas")
        assert (ours.timesteps - theirs.timesteps).abs().max() <= (1e-4 if exact else 4.0 if cut else 0.5)
        start = float(ours.init_noise_sigma) / float(theirs.init_noise_sigma)
        assert abs(start - 1) < (1e-6 if exact else OWN_ROUNDING)
        runs = []
        for s in (ours, theirs):
            states = trajectory(
                s, Network(prediction, channels=channels), steps, bars, **(step_options or {})
            )
            # diffusers' DPM-Solver++ returns no x_0
            runs.append(states[1::2] if name.startswith("DPM") and s is ours else states)
        difference = largest_difference(*runs)
        assert difference <= tolerance, f"{exact=}: {difference:.2e}"


@pytest.mark.parametrize(("schedule", "spacing", "prediction"), grid(SCHEDULES, SPACINGS, PREDICTIONS))
@pytest.mark.parametrize("zero", [False, True])
def test_ddim(schedule: str, spacing: str, prediction: str, zero: bool) -> None:
    compared = 0
    if zero and prediction == "epsilon" and spacing != "leading":
        with pytest.raises(ValueError, match="no signal left"):
            compare("DDIMScheduler", 5, prediction, timestep_spacing=spacing, rescale_betas_zero_snr=True)
        return
    offsets = (0, 1) if spacing == "leading" else (0,)
    few = [
        (True, False, 0.0),
        (False, True, 0.6),
        (True, True, 0.0),
        (False, False, 1.0),
    ]  # to_one, clip, eta
    for steps, offset, (to_one, clip, eta) in grid((7, 10), offsets, few):
        options = {"beta_schedule": schedule, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero}
        options |= {
            "steps_offset": offset,
            "set_alpha_to_one": to_one,
            "clip_sample": clip,
            "clip_sample_range": 0.8,
        }
        ours, _ = pair("DDIMScheduler", prediction_type=prediction, **options)
        ours.set_timesteps(steps)
        if ddim_jump_is_wrong(ours.timesteps.tolist(), 1000):
            continue  # issues 9261, 11347, 12633
        step_options = {"eta": eta, "use_clipped_model_output": clip and not to_one, "generator": None}
        compare("DDIMScheduler", steps, prediction, step_options, **options)
        compared += 1
    assert bool(compared) == (spacing != "linspace")


@pytest.mark.parametrize(("schedule", "spacing", "prediction"), grid(SCHEDULES, SPACINGS, PREDICTIONS))
@pytest.mark.parametrize("zero", [False, True])
def test_ddpm(schedule: str, spacing: str, prediction: str, zero: bool) -> None:
    if zero and prediction == "epsilon" and spacing != "leading":
        with pytest.raises(ValueError, match="no signal left"):
            compare("DDPMScheduler", 5, prediction, timestep_spacing=spacing, rescale_betas_zero_snr=True)
        return
    for steps, variance, clip in grid((7,), ("fixed_small", "fixed_large", "learned_range"), (False, True)):
        if spacing == "trailing" and variance != "fixed_small":
            continue  # diffusers adds noise in the last step
        compare(
            "DDPMScheduler", steps, prediction, {"generator": None}, 2 if variance == "learned_range" else 1,
            beta_schedule=schedule, timestep_spacing=spacing, rescale_betas_zero_snr=zero, variance_type=variance,
            clip_sample=clip,
        )  # fmt: skip


@pytest.mark.parametrize(("schedule", "spacing", "prediction"), grid(SCHEDULES, SPACINGS, PREDICTIONS))
@pytest.mark.parametrize("zero", [False, True])
def test_dpmsolver(schedule: str, spacing: str, prediction: str, zero: bool) -> None:
    few = [
        (1, "midpoint", "zero"),
        (2, "midpoint", "zero"),
        (2, "midpoint", "sigma_min"),
        (2, "heun", "sigma_min"),
    ]
    for steps, (order, solver, final) in grid((4, 15), few):
        compare(
            "DPMSolverMultistepScheduler", steps, prediction, beta_schedule=schedule, timestep_spacing=spacing,
            rescale_betas_zero_snr=zero, solver_order=order, solver_type=solver, final_sigmas_type=final,
            euler_at_final=solver == "heun",
        )  # fmt: skip


@pytest.mark.parametrize(("schedule", "prediction"), grid(SCHEDULES[:2], PREDICTIONS))
@pytest.mark.parametrize("steps", [5, 20])
def test_dpmsolver_karras_and_clipped_lambda(schedule: str, prediction: str, steps: int) -> None:
    """On the cosine schedule Karras' sigmas hit issue 12771."""
    for final in ("zero", "sigma_min"):
        compare(
            "DPMSolverMultistepScheduler", steps, prediction, beta_schedule=schedule, use_karras_sigmas=True,
            final_sigmas_type=final,
        )  # fmt: skip
    for spacing in SPACINGS:
        compare(
            "DPMSolverMultistepScheduler", steps, prediction, beta_schedule="squaredcos_cap_v2",
            lambda_min_clipped=-5.1, timestep_spacing=spacing,
        )  # fmt: skip


@pytest.mark.parametrize(("schedule", "spacing", "prediction"), grid(SCHEDULES, SPACINGS, PREDICTIONS))
@pytest.mark.parametrize("zero", [False, True])
def test_euler(schedule: str, spacing: str, prediction: str, zero: bool) -> None:
    few = [(False, "zero", 0.0), (False, "sigma_min", 3.0), (True, "zero", 3.0), (True, "sigma_min", 0.0)]
    for steps, (karras, final, churn) in grid((3, 12), few):
        compare(
            "EulerDiscreteScheduler", steps, prediction,
            {"s_churn": churn, "s_tmin": 0.06, "s_tmax": 50.0, "s_noise": 1.01, "generator": None},
            beta_schedule=schedule, timestep_spacing=spacing, rescale_betas_zero_snr=zero, use_karras_sigmas=karras,
            final_sigmas_type=final, sigma_min=0.05 if karras and churn else None,
            sigma_max=40.0 if karras and churn else None,
        )  # fmt: skip


@pytest.mark.parametrize(("schedule", "spacing", "prediction"), grid(SCHEDULES, SPACINGS, PREDICTIONS))
def test_heun(schedule: str, spacing: str, prediction: str) -> None:
    for steps, (karras, clip) in grid((1, 8), [(False, False), (False, True), (True, False)]):
        if steps > 1 and not karras and schedule == "squaredcos_cap_v2" and spacing != "leading":
            continue  # the next test
        compare(
            "HeunDiscreteScheduler", steps, prediction, beta_schedule=schedule, timestep_spacing=spacing,
            use_karras_sigmas=karras, clip_sample=clip,
        )  # fmt: skip


@pytest.mark.parametrize(("spacing", "prediction"), grid(("linspace", "trailing"), PREDICTIONS))
def test_heun_from_a_sigma_of_20000(spacing: str, prediction: str) -> None:
    """The cosine schedule's first step, to a sigma of 2: ``x + dt d`` cancels four digits in diffusers; ours does not subtract.

    So in float32 the two differ. Judged by the float64 run, which the closed forms hold, ours is right.
    """
    options = {
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": spacing,
        "prediction_type": prediction,
    }
    ours, theirs = pair("HeunDiscreteScheduler", exact=True, **options)
    bars = bars_at(ours, 5)
    truth = trajectory(ours, Network(prediction), 5, bars, dtype=torch.float64)
    errors = [largest_difference(trajectory(s, Network(prediction), 5, bars), truth) for s in (ours, theirs)]
    # epsilon: the rounding of the network's output alone, times 20,000
    assert errors[0] <= (1e-3 if prediction == "epsilon" else TOLERANCE) < errors[1], errors


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow(steps: int) -> None:
    for shift, sigmas in (
        (1.0, None),
        (3.0, np.linspace(1, 1 / steps, steps)),
        (0.5, np.linspace(1, 0.2, steps)),
    ):
        ours, theirs = pair("FlowMatchEulerDiscreteScheduler", shift=shift)
        table = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas.tolist()}
        g = torch.Generator().manual_seed(0)
        x = y = torch.randn(2, 3, 4, 4, generator=g)
        for s in (ours, theirs):
            s.set_timesteps(**table)
        assert (ours.sigmas - theirs.sigmas).abs().max() < 2e-7
        assert (ours.timesteps - theirs.timesteps).abs().max() < 2e-4
        for t, u in zip(ours.timesteps, theirs.timesteps, strict=True):
            v = torch.randn(x.shape, generator=g)
            x, y = ours.step(v, t, x).prev_sample, theirs.step(v, u, y).prev_sample
            assert (x - y).abs().max() <= TOLERANCE
        x0, noise = torch.randn(2, 2, 3, 4, 4, generator=g)
        both = [s.scale_noise(x0, s.timesteps[-1:].expand(2), noise) for s in (ours, theirs)]
        assert (both[0] - both[1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("schedule", "name"), grid(SCHEDULES, VP[:2]))
@pytest.mark.parametrize("zero", [False, True])
def test_add_noise_and_velocity(schedule: str, name: str, zero: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x0, noise, t = *torch.randn(2, 50, 3, 4, 4, generator=g), torch.randint(0, 1000, (50,), generator=g)
    for exact, tolerance in ((True, 2e-6), (False, 2e-5)):
        ours, theirs = pair(name, exact, beta_schedule=schedule, rescale_betas_zero_snr=zero)
        for method in ("add_noise", "get_velocity"):
            a, b = (getattr(s, method)(x0, noise, t) for s in (ours, theirs))
            assert a.dtype == b.dtype and (a - b).abs().max() <= tolerance
        assert (ours.alphas_cumprod - theirs.alphas_cumprod).abs().max() <= 2e-6
        assert (ours.betas - theirs.betas).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_add_noise_on_the_table(name: str) -> None:
    ours, theirs = pair(name, use_karras_sigmas=name != "EulerDiscreteScheduler")
    for s in (ours, theirs):
        s.set_timesteps(10)
    x0, noise = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = theirs.timesteps[[0, 4, -1]]
    a, b = (s.add_noise(x0, noise, t) for s in (ours, theirs))
    assert ((a - b).abs() / (1 + b.abs())).max() <= TOLERANCE


@pytest.mark.parametrize("name", [*VP, "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_timesteps_for_every_number_of_steps(name: str) -> None:
    """All 1 ... 100 and some more, with the default, an offset and a T that nothing divides."""
    for spacing, total, offset in (
        *((s, 1000, 0) for s in SPACINGS),
        ("leading", 1000, 1),
        ("trailing", 997, 0),
    ):
        ours, theirs = pair(name, timestep_spacing=spacing, num_train_timesteps=total, steps_offset=offset)
        for steps in (*range(1, 100, 3), 250, 333, 499):
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            if len(theirs.timesteps) > len(ours.timesteps):
                assert spacing == "trailing" and theirs.timesteps[-1] == -1  # see KNOWN_DIFFUSERS_BUGS
                continue
            assert torch.equal(ours.timesteps, theirs.timesteps)
