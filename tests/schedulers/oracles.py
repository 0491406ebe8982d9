"""Checks of a schedulers package against closed forms. Nothing here uses its formulas: only numpy, torch and the papers.

Each ``check_*`` takes the package as its argument, so that the mutation test can hand in a broken copy of it.
"""

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

F64 = torch.float64
SHAPE = (2, 1, 3, 3)
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def alpha_bar_reference(schedule: str, total: int, zero_snr: bool = False) -> np.ndarray:
    """abar_t, straight from the definitions."""
    if schedule == "squaredcos_cap_v2":
        f = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
        betas = np.array([min(1 - f[i + 1] / f[i], 0.999) for i in range(total)])
    else:
        power = {"linear": 1, "scaled_linear": 2}[schedule]
        i = np.arange(total) / (total - 1)
        betas = (1e-4 ** (1 / power) * (1 - i) + 0.02 ** (1 / power) * i) ** power
    bar = np.cumprod(1 - betas)
    if zero_snr:
        root = np.sqrt(bar)
        bar = (root[0] * (root - root[-1]) / (root[0] - root[-1])) ** 2
    return bar


def table_reference(spacing: str, steps: int, total: int, offset: int = 0) -> list[int]:
    """Visited timesteps by the definition of each spacing; ``round`` is half to even."""
    if spacing == "linspace":
        return [round((total - 1) * k / (steps - 1)) for k in reversed(range(steps))]
    if spacing == "leading":
        return [k * (total // steps) + offset for k in reversed(range(steps))]
    return [round(total - k * total / steps) - 1 for k in range(steps)]


class Gaussian:
    """Data N(mu, s^2), each element its own; everything about it is known."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = F64) -> None:
        g = torch.Generator().manual_seed(seed)
        self.mu = torch.randn(SHAPE, generator=g, dtype=F64).to(dtype)
        self.s = (0.2 + torch.rand(SHAPE, generator=g, dtype=F64)).to(dtype)
        self.start = torch.randn(SHAPE, generator=g, dtype=F64).to(dtype)

    def variance(self, a: float, b: float) -> Tensor:
        """Of ``a x_0 + b eps``."""
        return a**2 * self.s**2 + b**2

    def predict(self, kind: str, x: Tensor, a: float, b: float) -> Tensor:
        """What a perfect network says about ``x = a x_0 + b eps``."""
        deviation = (x - a * self.mu) / self.variance(a, b)
        x0, eps = self.mu + a * self.s**2 * deviation, b * deviation
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow": eps - x0}[kind]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"{what}: off by {error:.3g}, allowed {tolerance:.3g}"


def check_forward(S: ModuleType) -> None:
    """add_noise and get_velocity, for every schedule."""
    x0, noise, t = (
        torch.ones(4, 1, 2, 2, dtype=F64),
        torch.full((4, 1, 2, 2), 2.0, dtype=F64),
        torch.tensor([0, 10, 500, 999]),
    )
    for schedule in S.BETA_SCHEDULES:
        for zero in (False, True):
            s = S.DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero)
            bar = torch.from_numpy(alpha_bar_reference(schedule, 1000, zero))[t].view(4, 1, 1, 1)
            assert_close(
                s.add_noise(x0, noise, t),
                bar.sqrt() * 1 + (1 - bar).sqrt() * 2,
                1e-9,
                f"add_noise {schedule}",
            )
            v = bar.sqrt() * 2 - (1 - bar).sqrt() * 1
            assert_close(s.get_velocity(x0, noise, t), v.expand_as(x0), 1e-9, f"velocity {schedule}")


def check_ddim(S: ModuleType) -> None:
    """eta = 0 on Gaussian data: each step multiplies the deviation from the mean by a known factor."""
    data, total, steps = Gaussian(), 1000, 7
    for spacing in ("leading", "linspace", "trailing"):
        for kind in PREDICTIONS:
            s = S.DDIMScheduler(prediction_type=kind, timestep_spacing=spacing, clip_sample=False)
            s.set_timesteps(steps)
            bars = alpha_bar_reference("linear", total)
            table = table_reference(spacing, steps, total)
            assert s.timesteps.tolist() == table, f"timesteps {spacing}"
            x = data.start
            for t, bar, after in zip(s.timesteps, bars[table], [*bars[table[1:]], 1.0], strict=True):
                a, b, a2, b2 = bar**0.5, (1 - bar) ** 0.5, after**0.5, (1 - after) ** 0.5
                factor = (a2 * a * data.s**2 + b2 * b) / data.variance(a, b)
                expected = a2 * data.mu + factor * (x - a * data.mu)
                x = s.step(data.predict(kind, x, a, b), t, x).prev_sample
                assert_close(x, expected, 1e-9, f"DDIM {spacing} {kind} t={int(t)}")


def check_ddim_eta(S: ModuleType) -> None:
    """A step keeps the marginal: the part on eps and the new noise have variance 1 - abar_s together (DDIM, appendix B)."""
    zero, one = torch.zeros(SHAPE, dtype=F64), torch.ones(SHAPE, dtype=F64)
    bars = alpha_bar_reference("linear", 1000)
    for eta in (0.3, 1.0):
        s = S.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        s.set_timesteps(13)
        table = table_reference("trailing", 13, 1000)
        for t, before in zip(table[:-1], table[1:], strict=True):
            b = math.sqrt(1 - bars[t])
            on_eps = s.step(one, t, b * one, eta=eta, variance_noise=zero).prev_sample  # x_0 = 0, eps = 1
            new = s.step(zero, t, zero, eta=eta, variance_noise=one).prev_sample
            assert_close(on_eps**2 + new**2, (1 - bars[before]) * one, 1e-9, f"marginal eta={eta}")
            posterior = (1 - bars[before]) / (1 - bars[t]) * (1 - bars[t] / bars[before])
            assert_close(new, eta * math.sqrt(posterior) * one, 1e-9, f"noise eta={eta}")


def ddpm_moments(
    S: ModuleType,
    mu: float,
    s: float,
    variance_type: str = "fixed_small",
    v: float = 0.0,
    spacing: str = "leading",
) -> tuple[list, list]:
    """Mean, variance and noise of the ancestral chain on data N(mu, s^2), carried through its affine steps without sampling.

    ``v`` is the second half of the network's output, for learned_range. The second list holds the exact marginals.
    """
    sampler = S.DDPMScheduler(clip_sample=False, variance_type=variance_type, timestep_spacing=spacing)
    sampler.set_timesteps(20)
    bars, table = alpha_bar_reference("linear", 1000), table_reference(spacing, 20, 1000)
    top = bars[table[0]]
    mean, variance, got = math.sqrt(top) * mu, top * s**2 + 1 - top, []
    for t in table:
        a, b = math.sqrt(bars[t]), math.sqrt(1 - bars[t])

        def step(x: float, z: float, t: int = t, a: float = a, b: float = b) -> float:
            x_ = torch.full((1, 1, 1, 1), x, dtype=F64)
            eps = b * (x_ - a * mu) / (a * a * s * s + b * b)
            out = torch.cat([eps, torch.full_like(eps, v)], 1) if variance_type == "learned_range" else eps
            return sampler.step(out, t, x_, variance_noise=torch.full_like(x_, z)).prev_sample.item()

        at_0 = step(0.0, 0.0)
        slope, std = step(1.0, 0.0) - at_0, step(0.0, 1.0) - at_0
        mean, variance = at_0 + slope * mean, slope**2 * variance + std**2
        got.append((mean, variance, std))
    levels = [*bars[table[1:]], 1.0]
    return got, [(math.sqrt(bar) * mu, bar * s**2 + 1 - bar) for bar in levels]


def check_ddpm(S: ModuleType) -> None:
    """One point with the small variance, and N(mu, 1) with the large one, keep the exact marginal at every level."""
    small, large = ("fixed_small", 0.0), ("fixed_large", 0.0)
    for spacing in ("leading", "trailing"):
        for (kind, v), s in (
            (small, 0.0),
            (("learned_range", -1.0), 0.0),
            (large, 1.0),
            (("learned_range", 1.0), 1.0),
        ):
            got, expected = ddpm_moments(S, 0.7, s, kind, v, spacing)
            for (mean, variance, _), (m, var) in zip(got[:-1], expected[:-1], strict=True):
                assert abs(mean - m) < 1e-9 and abs(variance - var) < 1e-9, (
                    f"marginal {spacing} {kind}: {variance} {var}"
                )
            assert got[-1][2] == 0.0, "noise in the last step"
            assert abs(got[-1][0] - 0.7) < 1e-9


def check_ddpm_recursion(S: ModuleType) -> None:
    """Data N(mu, s^2), small variance: each step's slope and noise as Bayes' rule gives them."""
    mu, s, bars = 0.3, 0.5, alpha_bar_reference("linear", 1000)
    got, _ = ddpm_moments(S, mu, s, spacing="linspace")
    table = table_reference("linspace", 20, 1000)
    mean, variance = math.sqrt(bars[999]) * mu, bars[999] * s**2 + 1 - bars[999]
    for t, before, (m, var, std) in zip(table[:-1], table[1:], got, strict=False):
        ratio, noise = bars[t] / bars[before], 1 - bars[t] / bars[before]
        precision = (
            1 / (1 - bars[before]) + ratio / noise
        )  # x_before given x_0 and x_t: product of two Gaussians
        on_x0, on_x = (
            math.sqrt(bars[before]) / (1 - bars[before]) / precision,
            math.sqrt(ratio) / noise / precision,
        )
        gain = (
            math.sqrt(bars[t]) * s**2 / (bars[t] * s**2 + 1 - bars[t])
        )  # E[x_0 | x_t] = mu + gain (x_t - a mu)
        slope = on_x + on_x0 * gain
        mean = slope * mean + on_x0 * mu * (1 - gain * math.sqrt(bars[t]))
        variance = slope**2 * variance + 1 / precision
        assert abs(m - mean) < 1e-9 and abs(var - variance) < 1e-9 and abs(std**2 - 1 / precision) < 1e-9


def check_dpmsolver(S: ModuleType) -> None:
    """Order 1 is DDIM's factor; 2M is the paper's recurrence in lambda, on Gaussian data."""
    data, bars = Gaussian(1), alpha_bar_reference("linear", 1000)
    for order, kind in ((1, "epsilon"), (2, "epsilon"), (2, "v_prediction"), (2, "sample")):
        s = S.DPMSolverMultistepScheduler(solver_order=order, prediction_type=kind)
        s.set_timesteps(20)
        table = table_reference("linspace", 21, 1000)[:-1]
        assert s.timesteps.tolist() == table
        level = [(math.sqrt(b), math.sqrt(1 - b)) for b in [*bars[table], 1.0]]
        lam = [math.log(a / b) if b else math.inf for a, b in level]
        x, last = data.start, None
        for i, t in enumerate(s.timesteps):
            (a, b), (a2, b2) = level[i], level[i + 1]
            x0 = data.predict("sample", x, a, b)
            h = lam[i + 1] - lam[i]
            d = x0
            if order == 2 and 0 < i < 19:
                r = (lam[i] - lam[i - 1]) / h
                d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
            expected = b2 / b * x - a2 * (math.exp(-h) - 1) * d
            if order == 1:
                factor = (a2 * a * data.s**2 + b2 * b) / data.variance(a, b)
                assert_close(expected, a2 * data.mu + factor * (x - a * data.mu), 1e-9, "the oracle itself")
            out = s.step(data.predict(kind, x, a, b), t, x)
            assert_close(out.prev_sample, expected, 1e-9, f"DPM++ {order} {kind} step {i}")
            assert_close(out.pred_original_sample, x0, 1e-9, "x0")
            x, last = out.prev_sample, x0


def edm_sigmas(spacing: str, steps: int) -> tuple[list[float], list[float]]:
    bars = alpha_bar_reference("linear", 1000)
    sigmas = np.sqrt((1 - bars) / bars)
    t = (
        np.linspace(999, 0, steps)
        if spacing == "linspace"
        else np.array(table_reference(spacing, steps, 1000), float)
    )
    t = t.astype(np.float32).astype(float)
    return t.tolist(), [*np.interp(t, np.arange(1000), sigmas), 0.0]


def check_euler(S: ModuleType) -> None:
    """x' - mu = (1 + (s' - s) s / (sd^2 + s^2)) (x - mu) on Gaussian data."""
    data = Gaussian(2)
    for spacing in ("leading", "linspace", "trailing"):
        for kind in PREDICTIONS:
            s = S.EulerDiscreteScheduler(prediction_type=kind, timestep_spacing=spacing)
            s.set_timesteps(7)
            _, sigmas = edm_sigmas(spacing, 7)
            top = max(sigmas)
            start = math.sqrt(top**2 + 1) if spacing == "leading" else top
            assert abs(s.init_noise_sigma / start - 1) < 1e-6
            x = data.mu + sigmas[0] * data.start
            for i, t in enumerate(s.timesteps):
                before, after = sigmas[i], sigmas[i + 1]
                scaled = s.scale_model_input(x, t)
                a = 1 / math.sqrt(1 + before**2)
                assert_close(scaled, x * a, 1e-9, "scale_model_input")
                factor = 1 + (after - before) * before / (data.s**2 + before**2)
                expected = data.mu + factor * (x - data.mu)
                x = s.step(data.predict(kind, scaled, a, before * a), t, x).prev_sample
                assert_close(x, expected, 1e-8, f"Euler {spacing} {kind} step {i}")


def check_heun(S: ModuleType) -> None:
    """The trapezoidal rule's factor on Gaussian data, after each pair of calls."""
    data = Gaussian(3)
    for kind in PREDICTIONS:
        s = S.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=kind)
        s.set_timesteps(7)
        times, sigmas = edm_sigmas("linspace", 7)
        assert s.timesteps.tolist() == [times[0], *[t for t in times[1:] for _ in (0, 1)]]
        x = data.mu + sigmas[0] * data.start
        calls = iter(s.timesteps)
        for before, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            slope = before / (data.s**2 + before**2)
            euler = 1 + (after - before) * slope
            factor = (
                1 + (after - before) / 2 * (slope + euler * after / (data.s**2 + after**2))
                if after
                else euler
            )
            expected = data.mu + factor * (x - data.mu)
            for level in (before, after) if after else (before,):
                t, a = next(calls), 1 / math.sqrt(1 + level**2)
                output = data.predict(kind, s.scale_model_input(x, t), a, level * a)
                x = s.step(output, t, x).prev_sample
            assert_close(x, expected, 1e-8, f"Heun {kind} at {before}")


def check_sigma_forward(S: ModuleType) -> None:
    """add_noise and get_velocity of the solvers in s, at the table's timesteps and between them."""
    x0, noise, t = (
        torch.ones(3, 1, 1, 1, dtype=F64),
        torch.full((3, 1, 1, 1), 2.0, dtype=F64),
        torch.tensor([0.0, 499.5, 999.0]),
    )
    bars = alpha_bar_reference("linear", 1000)
    sigma = torch.from_numpy(np.interp(t.numpy(), np.arange(1000), np.sqrt((1 - bars) / bars))).view(
        3, 1, 1, 1
    )
    for kind in (S.EulerDiscreteScheduler, S.HeunDiscreteScheduler):
        s = kind(beta_start=1e-4, beta_end=0.02)
        for steps in (None, 3):
            if steps:
                s.set_timesteps(steps)
            assert_close(s.add_noise(x0, noise, t), x0 + 2 * sigma, 1e-9, "add_noise")
            v = (2 - sigma) / (1 + sigma**2).sqrt()
            assert_close(s.get_velocity(x0, noise, t), v, 1e-9, "velocity")


def check_flow(S: ModuleType) -> None:
    """Linear paths: the exact factor on Gaussian data, the shifted table, and one exact step for a single point."""
    data = Gaussian(4)
    for shift in (1.0, 3.0):
        s = S.FlowMatchEulerDiscreteScheduler(shift=shift)
        s.set_timesteps(7)
        u = [1 - k * (1 - 1e-3) / 6 for k in range(7)]
        sigmas = [*[shift * v / (1 + (shift - 1) * v) for v in u], 0.0]
        assert_close(s.timesteps.double(), 1000 * torch.tensor(sigmas[:-1], dtype=F64), 1e-4, "timesteps")
        assert_close(s.sigmas.double(), torch.tensor(sigmas, dtype=F64), 1e-7, "sigmas")
        x = data.start
        for i, t in enumerate(s.timesteps):
            b, after = sigmas[i], sigmas[i + 1]
            a = 1 - b
            velocity = (b - a * data.s**2) / data.variance(a, b)  # of the deviation; that of the mean is -mu
            expected = (1 - after) * data.mu + (1 + (after - b) * velocity) * (x - a * data.mu)
            out = s.step(data.predict("flow", x, a, b), t, x)
            assert_close(out.pred_original_sample, data.predict("sample", x, a, b), 1e-9, "x0")
            x = out.prev_sample
            assert_close(x, expected, 1e-9, f"flow step {i}")
        s.set_timesteps(sigmas=[1.0])
        point, noise = torch.full(SHAPE, 0.3, dtype=F64), data.start
        assert_close(
            s.step(noise - point, s.timesteps[0], noise).prev_sample, point, 1e-12, "one step to a point"
        )
        t = torch.tensor([250.0, 1000.0])
        expected = torch.stack([0.75 * point[0] + 0.25 * noise[0], noise[1]])
        assert_close(s.add_noise(point, noise, t), expected, 1e-12, "add_noise")


def check_inversion(S: ModuleType) -> None:
    """On Gaussian data one step of the inversion is affine, with known slope and offset."""
    data, bars = Gaussian(5), alpha_bar_reference("linear", 1000)
    level = {t: (math.sqrt(b), math.sqrt(1 - b)) for t, b in enumerate(bars)}
    for spacing in ("leading", "linspace", "trailing"):
        for kind in PREDICTIONS:
            s = S.DDIMScheduler(prediction_type=kind, timestep_spacing=spacing)

            def model(x: Tensor, t: Tensor, kind: str = kind) -> Tensor:
                a, b = level[int(t[0])]
                eps = data.predict(
                    "epsilon", x, a, b
                )  # the network answers for level t, whatever x it is given
                x0 = (x - b * eps) / a
                return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[kind]

            states = S.ddim_inversion(model, s, data.start, 7)
            assert states.shape == (8, *SHAPE)
            assert_close(states[0], data.start, 0.0, "first state")
            a, b = 1.0, 0.0
            for i, t in enumerate(reversed(table_reference(spacing, 7, 1000))):
                a2, b2 = level[t]
                eps = b2 * (states[i] - a2 * data.mu) / data.variance(a2, b2)
                expected = a2 * (states[i] - b * eps) / a + b2 * eps
                assert_close(states[i + 1], expected, 1e-9, f"inversion {spacing} {kind} state {i + 1}")
                a, b = a2, b2


def check_posterior(S: ModuleType) -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule: precisions add up."""
    bars, s = alpha_bar_reference("linear", 1000), S.DDPMScheduler()
    t = torch.tensor([1, 2, 500, 999])
    x0, x_t = torch.randn(2, 4, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    mean, log_variance = S.ddpm_posterior(s, x0, x_t, t)
    for k, step in enumerate(t.tolist()):
        before, alpha = bars[step - 1], bars[step] / bars[step - 1]
        precision = 1 / (1 - before) + alpha / (1 - alpha)
        expected = (
            math.sqrt(before) * x0[k] / (1 - before) + math.sqrt(alpha) * x_t[k] / (1 - alpha)
        ) / precision
        assert_close(mean[k], expected, 1e-9, f"posterior mean t={step}")
        assert_close(
            log_variance[k],
            torch.full_like(x0[k], -math.log(precision)),
            1e-9,
            f"posterior variance t={step}",
        )
    v = torch.ones_like(x0)
    beta = torch.log(torch.from_numpy(1 - bars[t] / bars[t - 1])).view(4, 1, 1, 1).expand_as(x0)
    assert_close(S.learned_range_log_variance(s, v, t), beta, 1e-9, "v = 1 is beta")
    assert_close(S.learned_range_log_variance(s, -v, t), log_variance, 1e-9, "v = -1 is beta~")


CHECKS = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
