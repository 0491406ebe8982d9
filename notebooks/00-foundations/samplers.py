# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Samplers
#
# Every sampler moves a noisy point part of the way towards a guess of the clean data, again and again. DDPM (denoising diffusion probabilistic models), DDIM (the implicit, noise-free kind), DPM-Solver++, the Euler and Heun methods of EDM ("elucidating the design space"), and flow matching differ in three things only: the guess, the noise they add back, and the noise levels they visit
# ({cite:t}`ho2020denoising`, {cite:t}`song2021denoising`, {cite:t}`lu2022dpm`, {cite:t}`karras2022elucidating`, {cite:t}`lipman2023flow`).

# %% tags=["remove-cell"]
# On Colab this installs the library and leaves the torch that is there alone; elsewhere it does nothing.
try:
    import minilib  # noqa: F401
except ImportError:
    # %pip install -q "minilib @ git+https://github.com/minilib-book/minilib"
    pass

# %% tags=["parameters", "remove-cell"]
profile = "auto"

# %% tags=["hide-input"]
import math
from dataclasses import dataclass
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

from minilib import schedulers
from minilib.arms import run_arms
from minilib.data import GaussianMixture, toy2d
from minilib.plotting import PALETTE, curve, use_style
from minilib.reproduction import Reproduction


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each seed draws its own starts
    starts: int  # points whose distance to the exact trajectory's end is measured
    cloud: int  # points whose distribution is compared with the data's
    fine: int  # steps of the reference solution
    calls: tuple[int, ...]  # budgets of model calls


run = Reproduction(
    "samplers",
    profile,
    {
        "smoke": Settings((0, 1), starts=64, cloud=512, fine=100, calls=(10, 20, 50)),
        "cpu": Settings((0, 1, 2, 3, 4), starts=512, cloud=8192, fine=200, calls=(5, 7, 10, 14, 20, 35, 50)),
        "gpu": Settings(tuple(range(10)), 1024, 16_384, 200, calls=(5, 7, 10, 14, 20, 35, 50, 100)),
    },
)
s = run.settings
use_style()
run.show_card()

# %%
run.show_settings()

# %% [markdown]
# (sec-samplers-idea)=
#
# ## The idea
#
# {doc}`/notebooks/00-foundations/noise-and-back` ended with a denoiser $D$: the best guess of the clean point, given the noisy one. Here we take it as given, exactly, and ask how to walk.
#
# **One variable.** Divide $x_t = \alpha_t x_0 + \sigma_t \epsilon$ by $\alpha_t$. What is left is $z = x_0 + s\,\epsilon$ with the noise level $s = \sigma_t / \alpha_t$, whatever the process was called {cite:p}`karras2022elucidating`. We write $D(z, s)$.
#
# **The exact walk.** There is a curve through each noisy point along which the *distribution* is right at every level, the probability-flow trajectory {cite:p}`song2021score`:
#
# $$
# \frac{dz}{ds} = \frac{z - D(z, s)}{s} .
# $$ (eq-samplers-flow)
#
# It says: as noise falls, move straight towards the present guess. But the guess changes on the way, so the curve bends.
#
# **A step.** To go from level $s$ to a lower one $n$, pick a guess $g$ and hold it fixed. Then {eq}`eq-samplers-flow` is solved by
#
# $$
# z' = g + r\,(z - g), \qquad r = \frac{n}{s} < 1 .
# $$ (eq-samplers-step)
#
# That is all: keep the fraction $r$ of the difference to the guess. The samplers are:
#
# :::{table} Six samplers in one notation. $x_0 = D(z, s)$, and $h = \ln(s / n)$ is the step in half the log-SNR; $\hat x_0$, $\hat\epsilon$, $\hat u$ are what the network's output says. $x_1$ is the denoiser's answer at the end of a trial step, "before" marks the step before, $\xi$ is fresh standard normal noise; $\sigma'$, $x'$ belong to the flow path $x = (1 - \sigma) x_0 + \sigma \epsilon$.
# :name: tab-samplers-updates
#
# | sampler | as published | guess $g$ | noise | calls |
# |---|---|---|---|---|
# | DDIM | $x_n = \alpha_n \hat x_0 + \sigma_n \hat\epsilon$ | $x_0$ | | 1 |
# | EDM Euler | $z' = z + (n - s)\,(z - \hat x_0) / s$ | $x_0$ | | 1 |
# | flow matching | $x' = x + (\sigma' - \sigma)\,\hat u$ | $x_0$ | | 1 |
# | EDM Heun | $z' = z + \frac{n - s}{2} (d + d_1)$, $d = (z - \hat x_0)/s$ | $x_0 + \frac{1}{2r} (x_1 - x_0)$ | | 2 |
# | DPM-Solver++ 2M | $x_n = \frac{\sigma_n}{\sigma_s} x + \alpha_n (1 - e^{-h}) g$ | $x_0 + \frac{h}{2 h_{\text{before}}} (x_0 - x_{0,\text{before}})$ | | 1 |
# | DDPM | mean of $q(x_n \mid x, \hat x_0)$, plus noise | $x_0$, with $r^2$ for $r$ | $n \sqrt{1 - r^2}\; \xi$ | 1 |
# :::
#
# DDIM, Euler and flow matching are the *same step*. Heun tries that step, asks the denoiser again at its end ($x_1$), and corrects the guess by the change that it saw. 2M predicts the change from the last step instead, so it pays for one call only. DDPM lets go of more of the
# old noise ($r^2$ in place of $r$) and fills up with fresh noise $\xi$. Its variance is the posterior's, the smaller of the two that {cite:t}`ho2020denoising` use.
#
# The code is this table. DDIM's $\eta$ goes from 0 (no noise) to 1 (DDPM).


# %%
def solve(denoise, z, levels, guess="first order", eta=0.0, generator=None):
    """All samplers of this page: from z (n, d) at levels[0] to levels[-1]. Returns the state at each level."""
    states, x0_before, h_before = [z], None, None
    for s, n in pairwise(levels):
        x0, r = denoise(z, s), n / s
        h = -math.log(r) if n > 0 else math.inf
        g = x0
        if guess == "Heun" and n > 0:
            x1 = denoise(x0 + r * (z - x0), n)  # the denoiser at the end of a trial step
            g = x0 + (x1 - x0) / (2 * r)
        if guess == "2M" and n > 0 and h_before is not None:
            g = x0 + h / (2 * h_before) * (x0 - x0_before)
        z = g + r * math.sqrt(1 - eta**2 * (1 - r**2)) * (z - g)
        if eta > 0 and n > 0:
            fresh = torch.randn(z.shape, generator=generator, dtype=z.dtype)
            z = z + eta * n * math.sqrt(1 - r**2) * fresh
        states.append(z)
        x0_before, h_before = x0, h
    return states


def reference(denoise, z, high, low, steps):
    """The exact walk: the classical Runge-Kutta method of order 4 in log s, in many steps."""
    h = math.log(low / high) / steps
    for i in range(steps):
        s = [high * math.exp(h * (i + part)) for part in (0, 0.5, 1)]
        k1 = z - denoise(z, s[0])
        k2 = z + h / 2 * k1 - denoise(z + h / 2 * k1, s[1])
        k3 = z + h / 2 * k2 - denoise(z + h / 2 * k2, s[1])
        k4 = z + h * k3 - denoise(z + h * k3, s[2])
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


# %% [markdown]
# The data are a spiral, a mixture of 60 narrow Gaussians, in double precision. Its denoiser is exact. So whatever goes wrong is the sampler's doing.
#
# One step, seen closely. All walkers start at the same noisy point and go from $s = 0.8$ to $n = 0.25$. The plain step goes straight towards $x_0$, the average over all arms that are still possible. But on the way the nearest arm becomes the likely one, so the exact curve turns. Heun and 2M
# change the guess, so that their straight line ends nearer to where the curve ends. (2M also uses the guess at an earlier point of the exact curve, at $s = 2$.) DDPM is a cloud: one draw of it ends anywhere in there.

# %%
spiral = toy2d("spiral")
spiral = GaussianMixture(spiral.means.double(), spiral.stds.double(), spiral.weights.double())


def denoise(z, s):
    return spiral.denoise(z, 1.0, s)


# %% tags=["hide-input"] mystnb={"image": {"alt": "Part of a grey spiral, and a noisy point z outside it. A dotted line leads from z to its guess, which lies inside, between two arms. The plain step ends on this line. The exact curve starts along the line, then turns away towards the nearest arm. Heun and 2M end closer to its end than the plain step does. DDPM ends in a wide cloud."}, "figure": {"caption": "One step from $s = 0.8$ to $n = 0.25$ by four rules, and the exact trajectory. Dotted: from the point to its denoised version $x_0$.", "name": "fig-samplers-step"}}
g = torch.Generator().manual_seed(0)
before = torch.tensor([[1.25, -4.16]], dtype=torch.float64)  # at s = 2: 2M needs one step more
point = reference(denoise, before, 2.0, 0.8, 50)
path = torch.cat([reference(denoise, point, 0.8, 0.8 - 0.55 * i / 20, 20) for i in range(21)])
x0, x0_before = denoise(point, 0.8), denoise(before, 2.0)
guess_2m = x0 + math.log(0.8 / 0.25) / (2 * math.log(2.0 / 0.8)) * (x0 - x0_before)
ends = {
    "plain step (DDIM)": solve(denoise, point, [0.8, 0.25])[-1],
    "Heun": solve(denoise, point, [0.8, 0.25], "Heun")[-1],
    "2M": guess_2m + 0.25 / 0.8 * (point - guess_2m),
}
cloud = solve(denoise, point.expand(300, 2), [0.8, 0.25], eta=1.0, generator=g)[-1]
fig, ax = plt.subplots(figsize=(5.4, 4.6))
ax.scatter(*spiral.sample(6000, g).T, s=1, color="0.8")
ax.scatter(*cloud.T, s=3, color=PALETTE[3], alpha=0.5, label="DDPM, 300 draws")
ax.plot(*torch.cat([point, x0]).T, ":", color=PALETTE[6])
ax.annotate("$x_0$", x0[0], xytext=(4, 4), textcoords="offset points")
ax.annotate("$z$", point[0], xytext=(6, -2), textcoords="offset points")
ax.plot(*path.T, color="black", lw=2, label="exact")
ax.plot(*point[0], "o", color="black")
for (name, end), color, marker in zip(ends.items(), PALETTE, "sD^", strict=False):
    ax.plot(*end[0], marker, color=color, ms=7, label=name, ls="")
ax.set(xlabel="first coordinate of $z$", ylabel="second coordinate of $z$", aspect="equal")
ax.set(xlim=(-1.4, 0.7), ylim=(-2.4, -0.55), xticks=[-1.2, -0.8, -0.4, 0, 0.4])
ax.legend(fontsize=9, loc="lower left")
plt.show()

# %% [markdown]
# ## The method
#
# ### Which levels?
#
# A sampler also needs a list of noise levels. Names stand for habits: DDIM goes down evenly in training time, DPM-Solver++ evenly in log-SNR, EDM evenly in $s^{1/7}$ (Karras' rule), flow matching evenly in $\sigma = s / (1 + s)$, its own noise level. (They are habits, not laws: DPM-Solver++'s authors advise even in log-SNR for small images and even in time for large ones.) Any step can go with any levels. We keep the two choices apart.


# %%
time_levels = (1 / (1 - (1 - schedulers.make_betas(1000)).cumprod(0)) - 1).rsqrt()  # s at each training step
s_min, s_max = time_levels[0].item(), time_levels[-1].item()
kinds = ("training time", "log-SNR", "Karras", "flow")


def levels(kind, count):
    """`count` noise levels from s_max to s_min, evenly spaced in what `kind` says."""
    u = torch.linspace(0, 1, count, dtype=torch.float64)
    if kind == "training time":
        return time_levels[(999 * (1 - u)).round().long()].tolist()
    if kind == "log-SNR":
        return (s_max * (s_min / s_max) ** u).tolist()
    if kind == "Karras":
        return schedulers.karras_sigmas(s_min, s_max, count).tolist()
    low, high = s_min / (1 + s_min), s_max / (1 + s_max)
    return [f / (1 - f) for f in (high + u * (low - high)).tolist()]


for kind in kinds:
    print(f"{kind:14s}", *(f"{level:8.3f}" for level in levels(kind, 8)))

# %% [markdown]
# ### The same as the library
#
# The library's schedulers speak the protocol of diffusers: an integer time, a network output, samples in their own scaling. We dress the exact denoiser as the network that each one expects, and compare samples. Noise is drawn from equal generators.


# %%
# NBVAL_CHECK_OUTPUT
def library(scheduler, x, density=spiral, **step_options):
    """All states of a scheduler of minilib, driven by the exact denoiser; its timesteps are set already."""
    states = [x]
    for t in scheduler.timesteps:
        is_flow = not hasattr(scheduler, "levels")
        alpha, sigma = (1 - t / 1000, t / 1000) if is_flow else scheduler.levels(t[None], x)
        seen = scheduler.scale_model_input(x, t)
        x0 = density.denoise(seen, alpha, sigma)
        eps = (seen - alpha * x0) / sigma
        v = alpha * eps - sigma * x0
        output = eps - x0 if is_flow else v if scheduler.config.prediction_type == "v_prediction" else eps
        x = scheduler.step(output, t, x, **step_options).prev_sample
        states.append(x)
    return states


def gen():
    return torch.Generator().manual_seed(1)


steps = 12
walk = [*levels("training time", steps), 0.0]
z = s_max * torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
x = z / math.hypot(1, s_max)  # the same points in the variance-preserving scaling
options = {"timestep_spacing": "linspace"}
times = torch.linspace(999, 0, steps, dtype=torch.float64).round().long().tolist()
made = {
    "DDPM": (schedulers.DDPMScheduler(clip_sample=False), x, {"eta": 1.0, "generator": gen()}),
    "DDIM": (schedulers.DDIMScheduler(clip_sample=False), x, {}),
    "DDIM, eta 0.5": (schedulers.DDIMScheduler(clip_sample=False), x, {"eta": 0.5, "generator": gen()}),
    "DPM-Solver++ 2M": (schedulers.DPMSolverMultistepScheduler(), x, {"guess": "2M"}),
    "EDM Euler": (schedulers.EulerDiscreteScheduler(), z, {}),
    "EDM Heun": (schedulers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02), z, {"guess": "Heun"}),
    "flow matching": (schedulers.FlowMatchEulerDiscreteScheduler(), z / (1 + s_max), {}),
}
gaps, firsts = {}, {}
for name, (scheduler, begin, how) in made.items():
    if name == "flow matching":
        scheduler.set_timesteps(sigmas=[level / (1 + level) for level in walk[:-1]])
    else:
        scheduler.set_timesteps(timesteps=times)
    extra = {key: value for key, value in how.items() if key == "eta" and name != "DDPM"}
    extra |= {"generator": gen()} if "eta" in how else {}
    states = library(scheduler, begin, **extra)
    gaps[name] = (states[-1] - solve(denoise, z, walk, **how)[-1]).abs().max().item()
    firsts[name] = states
    print(f"{name}: {'PASS' if gaps[name] < 1e-5 else 'FAIL'}")
run.record("one-line", list(gaps.values()))

# %% [markdown]
# And among themselves: DDIM, DPM-Solver++ of order 1, Euler and flow matching on the same levels, all four from the library, state by state. {cite:t}`gao2025diffusion` make this point at length: what is called a flow-matching *sampler* is DDIM on other levels.

# %%
# NBVAL_CHECK_OUTPUT
order_1 = schedulers.DPMSolverMultistepScheduler(solver_order=1)
order_1.set_timesteps(timesteps=times)
firsts["DPM-Solver++ 1"] = library(order_1, x)
gaps = {}
for name in ("DPM-Solver++ 1", "EDM Euler", "flow matching"):
    gap = 0.0
    for ours, ddim, level in zip(firsts[name], firsts["DDIM"], walk, strict=True):
        scale = {"EDM Euler": math.hypot(1, level), "flow matching": math.hypot(1, level) / (1 + level)}
        gap = max(gap, (ours / scale.get(name, 1.0) - ddim).abs().max().item())
    gaps[name] = gap
    print(f"{name} = DDIM: {'PASS' if gap < 1e-5 else 'FAIL'}")
run.record("same-step", list(gaps.values()))

# %% [markdown]
# ### Orders
#
# The **order** of a method is the power with which its error falls with the step. We compare with the exact walk from $s_{\max}$ to $s_{\min}$ (`reference` above: order 4 and many steps), on 128 starts, and take the median error. (Some starts lie on a seam between two arms of the spiral, where the smallest error decides the arm;
# the median is not moved by them.)

# %%
counts = (64, 128, 256)
z = s_max * torch.randn(128, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
truth = reference(denoise, z, s_max, s_min, 400)
errors, orders = {}, {}
for guess, kind in [
    ("first order", "log-SNR"), ("first order", "Karras"), ("first order", "flow"),
    ("Heun", "log-SNR"), ("Heun", "Karras"), ("2M", "log-SNR"), ("2M", "Karras"),
]:  # fmt: skip
    ends = [solve(denoise, z, levels(kind, count + 1), guess)[-1] for count in counts]
    errors[guess, kind] = [(end - truth).norm(dim=1).median().item() for end in ends]
    first, *_, last = errors[guess, kind]
    orders[guess, kind] = math.log(first / last) / math.log(counts[-1] / counts[0])
    print(f"{guess:12s} {kind:8s} order {orders[guess, kind]:.2f}")
run.record("first-order", [order for (guess, _), order in orders.items() if guess == "first order"])
run.record("second-order", [order for (guess, _), order in orders.items() if guess != "first order"])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Error against steps on two logarithmic axes. Three nearly parallel lines of slope minus one for the first-order step, four lines of slope minus two below them for Heun and 2M."}, "figure": {"caption": "Median distance to the exact end, by number of steps. Thin grey lines: slopes of exactly 1 and 2. Heun needs twice the calls for the same number of steps.", "name": "fig-samplers-order"}}
fig, ax = plt.subplots(figsize=(6, 3.4))
look = {"first order": PALETTE[0], "Heun": PALETTE[2], "2M": PALETTE[1]}
dash = {"log-SNR": "-", "Karras": "--", "flow": ":"}
for (guess, kind), values in errors.items():
    ax.loglog(counts, values, dash[kind], marker="o", ms=4, color=look[guess], label=f"{guess}, {kind}")
for guess, power in [("first order", 1), ("2M", 2)]:
    begin = errors[guess, "log-SNR"][0] * (1.6 if power == 1 else 0.6)
    ax.loglog(counts, [begin * (counts[0] / count) ** power for count in counts], color="0.6", lw=0.8)
ax.set(xlabel="steps", ylabel="median error", xticks=counts, xticklabels=counts)
ax.minorticks_off()
ax.legend(fontsize=9, bbox_to_anchor=(1, 0.5), loc="center left", title="step, levels")
fig.tight_layout()
plt.show()

# %% [markdown]
# ### There and back: inversion
#
# The plain step can be run backwards: from an image to the noise that leads to it. Backwards, the guess must be read at the state where one *is*, not at the one where one *goes*; so the way up and the way down differ a little. The error is of order 1 as well. Many editing methods rest on this
# round trip. The library's `ddim_inversion` does it.

# %%
data = spiral.sample(128, torch.Generator().manual_seed(3))
ddim = schedulers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


def network(x, t):
    alpha, sigma = ddim.levels(t, x)
    return (x - alpha * spiral.denoise(x, alpha, sigma)) / sigma


missed = []
for count in (125, 250, 500):
    up = schedulers.ddim_inversion(network, ddim, data, count)[-1]
    ddim.set_timesteps(count)
    missed.append((library(ddim, up)[-1] - data).norm(dim=1).median().item())
    print(f"{count} steps up, {count} down: median distance to the start {missed[-1]:.4f}")
run.record("inversion", [a / b for a, b in pairwise(missed)])

# %% [markdown]
# ### A wrong start, in closed form
#
# Sampling starts from pure noise, but the noisiest training level is not pure noise: its $s$ is finite, $s_T$. So the start is wrong by the mean of the data (and, less, in its spread). What becomes of this? Take data from one Gaussian, mean $m$ and standard deviation $c$. Then everything is linear, and an offset obeys its own equation.
#
# - Along {eq}`eq-samplers-flow` the distance to the mean shrinks like $\sqrt{c^2 + s^2}$. At the end, the share $c / \sqrt{c^2 + s_T^2}$ of the offset is left: it is *remembered*.
# - The mean of DDPM's step is the exact mean of $z'$ given $z$. (Its variance is not: it leaves out the doubt about $x_0$.) Here all means are linear in $z$, so they chain, and the samples' mean is $\mathbb{E}[x_0 \mid z_T]$. The share left is $c^2 / (c^2 + s_T^2)$: the square. The offset is *forgotten* much more, with any number of steps.
# - If $s_T = \infty$ (zero terminal SNR, a signal-to-noise ratio of zero) the share is zero for both. There $\hat\epsilon$ says nothing about $x_0$, so the network has to predict $v$; and the library works in $x_t$, which stays finite.
#
# We measure it with latent diffusion's schedule ("scaled linear", {cite:t}`ldm`), which stops early. **Spacing** decides where a sampler begins: `trailing` and `linspace` at the last training step, `leading` about one step before it: with few steps, at a level where data still shine through
# {cite:p}`lin2024common`. A start at $x = 0$ is the mean of all starts, and it gives the mean of all samples.

# %%
c, mean = 0.5, torch.tensor([[2.0, 0.0]], dtype=torch.float64)
gaussian = GaussianMixture(mean, torch.tensor([c], dtype=torch.float64), torch.ones(1).double())
sd = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def share_left(kind, spacing, count, **changes):
    """(share of the mean missing after sampling, noise level s at the start)."""
    scheduler = getattr(schedulers, f"{kind}Scheduler")(timestep_spacing=spacing, **sd, **changes)
    scheduler.set_timesteps(count)
    quiet = {"variance_noise": torch.zeros_like(mean)} if kind == "DDPM" else {}
    end = library(scheduler, torch.zeros_like(mean), gaussian, **quiet)[-1]
    bar = scheduler.alphas_cumprod_f64[scheduler.timesteps[0]].item()
    return 1 - (end[0, 0] / 2).item(), math.sqrt((1 - bar) / bar) if bar > 0 else math.inf


budgets = (3, 5, 10, 20, 50, 100, 200, 1000)
start_error = {
    (kind, spacing): [share_left(kind, spacing, count) for count in budgets]
    for kind in ("DDIM", "DDPM")
    for spacing in ("leading", "trailing", "linspace")
}
ddpm = [pair for (kind, _), row in start_error.items() if kind == "DDPM" for pair in row]
ddim_long = [row[-1] for (kind, _), row in start_error.items() if kind == "DDIM"]
run.record("noise-forgets", max(abs(share - c**2 / (c**2 + level**2)) for share, level in ddpm))
run.record("determinism-remembers", [share / (c / math.hypot(c, level)) for share, level in ddim_long])
left = [
    abs(share_left(kind, spacing, count, **zero_snr)[0])
    for kind in ("DDIM", "DDPM")
    for spacing in ("trailing", "linspace")
    for count in budgets[:-1]
]
run.record("zero-snr-start", max(left))
print(f"largest share of the mean missing with zero terminal SNR: {max(left):.0e}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Share of the mean that is missing, against steps, logarithmic. DDIM settles near three percent: from below with trailing spacing, from above with leading spacing. DDPM with trailing spacing is a flat line at a tenth of a percent; with leading spacing it starts higher and falls to that line. DDPM's lines go through their crosses at every number of steps."}, "figure": {"caption": "A wrong start: share of the data's mean that is missing in the samples' mean. Lines: measured. Crosses: closed form (for DDIM, its limit for many steps). With zero terminal SNR and trailing spacing the share is zero and cannot be drawn here.", "name": "fig-samplers-start"}}
fig, ax = plt.subplots(figsize=(6, 3.4))
for (kind, spacing), row in start_error.items():
    if spacing == "linspace":
        continue  # it begins where trailing does
    color = PALETTE[0] if kind == "DDIM" else PALETTE[1]
    share, level = zip(*row, strict=True)
    dashes = "-" if spacing == "trailing" else "--"
    ax.loglog(budgets, share, dashes, marker="o", ms=4, color=color, label=f"{kind}, {spacing}")
    law = [(c / math.hypot(c, y)) ** (1 if kind == "DDIM" else 2) for y in level]
    ax.loglog(budgets, law, "x", color=color, ms=7)
ax.set(xlabel="steps", ylabel="share of the mean missing")
ax.legend(fontsize=9, ncol=2, loc="upper right")
plt.show()

# %% [markdown]
# ## The experiment
#
# Two questions, one change at a time.
#
# 1. *Same levels, another step.* At equal **model calls**, how far does each sampler end from the end of the exact trajectory through its start (median over starts, as above)? A call is what costs time: Heun's steps count double, except its last one, to $s = 0$, which is plain. So Heun uses an odd number of calls, and an even budget leaves it one call short. Control: the first-order step on the same levels.
# 2. *Same step, other levels.* The four habits above.
#
# Starts are drawn from the exact noisy distribution at $s_{\max}$, so the start is right. Each seed draws its own. For DDPM, which has no trajectory to follow, we compare distributions: the **sliced Wasserstein distance**, the mean distance between sorted projections of samples and of fresh
# data, over 32 directions. Its floor is the distance between two sets of real data.


# %%
def sliced_wasserstein(a, b):
    angle = torch.arange(32, dtype=a.dtype) * math.pi / 32
    directions = torch.stack([angle.cos(), angle.sin()])
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


def trial(kind, seed):
    """Errors of all steps on one kind of levels, for each budget of calls."""
    g = torch.Generator().manual_seed(seed)
    z = spiral.sample(s.cloud, g) + s_max * torch.randn(s.cloud, 2, generator=g, dtype=torch.float64)
    some = z[: s.starts]
    end = denoise(reference(denoise, some, s_max, 1e-3, s.fine), 1e-3)
    real = spiral.sample(s.cloud, g)
    out = {name: [] for name in ("first order", "Heun", "2M", "eta 0", "eta 0.5", "eta 1")}
    out["floor"] = sliced_wasserstein(real, spiral.sample(s.cloud, g))
    for calls in s.calls:
        walk = [*levels(kind, calls), 0.0]
        half = [*levels(kind, (calls + 1) // 2), 0.0]  # Heun: two calls a step, one for the last
        for name in ("first order", "Heun", "2M"):
            last = solve(denoise, some, half if name == "Heun" else walk, name)[-1]
            out[name].append((last - end).norm(dim=1).median().item())
        for eta in (0, 0.5, 1) if kind == "log-SNR" else ():
            out[f"eta {eta}"].append(
                sliced_wasserstein(solve(denoise, z, walk, eta=eta, generator=g)[-1], real)
            )
    return out


results = run_arms(trial, {kind: kind for kind in kinds}, s.seeds)


def gathered(kind, name):
    return torch.tensor([r[name] for r in results[kind]])  # (seeds, budgets)


# %% [markdown]
# ## Results
#
# The figure to remember. To see a trajectory whole, we take data on a *line*, four spots on it, and let noise fall from left to right. Six samplers as they are commonly run, from the same six starts, with 12 calls each (Heun: 11). Nothing happens for a long time; then the density splits, and whoever takes
# few steps there can end between the spots. DDPM follows its own random path, so the black curves are no target for it.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six panels: noise level falls from left to right, and a grey density splits into four branches near s = 1. Black exact curves run into the branches. DDIM's and Euler's polygons lag behind the splitting curves and some end between branches. Flow matching and 2M follow them closely. Heun with so few calls jumps away. DDPM zigzags and ends in branches, often in other ones than the exact curve from the same start."}, "figure": {"caption": "Six samplers, 12 model calls each (Heun: 11), from the same starts; data on a line. Grey: density at each noise level. Black: exact trajectories. In brackets: how the levels are spaced. States are divided by $\\sqrt{1 + s^2}$, the standard deviation for data of unit variance. The last point of each polygon stands for $s = 0$.", "name": "fig-samplers-trajectories"}}
habits = {
    "DDPM": ("training time", {"eta": 1.0, "generator": torch.Generator().manual_seed(7)}),
    "DDIM": ("training time", {}),
    "EDM Euler": ("Karras", {}),
    "EDM Heun": ("Karras", {"guess": "Heun"}),
    "DPM-Solver++ 2M": ("log-SNR", {"guess": "2M"}),
    "flow matching": ("flow", {}),
}
means = torch.tensor([[-1.6], [-0.5], [0.3], [1.5]], dtype=torch.float64)
stds = torch.tensor([0.1, 0.06, 0.06, 0.12], dtype=torch.float64)
line = GaussianMixture(means, stds, torch.tensor([0.3, 0.2, 0.15, 0.35], dtype=torch.float64))
start = s_max * torch.tensor([-1.5, -0.75, -0.2, 0.2, 0.6, 1.3], dtype=torch.float64)[:, None]
noise, height = levels("log-SNR", 160), torch.linspace(-2.6, 2.6, 201).double()
density = torch.stack([line.log_prob(height[:, None] * math.hypot(1, n), 1.0, n) for n in noise], dim=1)
density = (density - density.max(dim=0).values).exp()  # each level on its own scale
fig, axes = plt.subplots(2, 3, figsize=(7, 4.8), sharex=True, sharey=True, layout="constrained")
for ax, (name, (kind, how)) in zip(axes.flat, habits.items(), strict=True):
    ax.pcolormesh(noise, height, density, cmap="Greys", vmin=0, vmax=1.3, rasterized=True)
    steps = [*levels(kind, 6 if name == "EDM Heun" else 12), 0.0]
    exact = (noise, {"guess": "2M"}, {"color": "black", "lw": 0.8})
    sampler = (steps, how, {"marker": "o", "ms": 2.5})
    for walk, rule, drawn in (exact, sampler):
        states = torch.cat(solve(lambda z, n: line.denoise(z, 1.0, n), start, walk, **rule), dim=1)
        at = torch.tensor([max(n, 0.006) for n in walk])  # s = 0 has no place on a logarithmic axis
        ax.set_prop_cycle(color=PALETTE)
        ax.plot(at, (states / (1 + at**2).sqrt()).T, **drawn)
    ax.set_title(f"{name}\n({kind})", fontsize=10)
    ax.set(xscale="log", xlim=(s_max, 0.006), ylim=(-2.6, 2.6))
    ax.grid(False)
fig.supxlabel("noise level $s$, falling", fontsize=10)
fig.supylabel("state, $z / \sqrt{1 + s^2}$", fontsize=10)
plt.show()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four panels, one for each kind of levels: distance to the exact end against model calls, both logarithmic. The first-order step falls slowly and steadily. 2M is below it at all budgets for levels even in log-SNR. For Karras' levels the two are alike up to 10 calls, for flow levels 2M is above up to 10 calls, then 2M is below. For levels even in training time 2M is above from 7 to 20 calls and hardly better later. Heun starts far above the first-order line and falls steeply; it crosses it between 20 and 35 calls, except for levels even in training time, where it has not crossed at 50."}, "figure": {"caption": "Median distance to the exact trajectory's end against model calls, for four kinds of levels. Bands: 90 % intervals over seeds, each with its own starts.", "name": "fig-samplers-calls"}}
fig, axes = plt.subplots(1, 4, figsize=(7, 3), sharey=True, layout="constrained")
for ax, kind in zip(axes, kinds, strict=True):
    for name, color in look.items():
        curve(ax, s.calls, gathered(kind, name), name, color)
    ax.set(xscale="log", yscale="log", title=kind, xticks=(5, 10, 20, 50), xticklabels=(5, 10, 20, 50))
    ax.minorticks_off()
axes[0].set_ylabel("median distance to the exact end")
fig.supxlabel("model calls", fontsize=10)
fig.legend(*axes[0].get_legend_handles_labels(), ncol=3, loc="outside upper center", fontsize=9)
plt.show()

# %%
ten, fifty = s.calls.index(10), s.calls.index(50)
even = {name: gathered("log-SNR", name) for name in ("first order", "Heun", "2M", "eta 0", "eta 1")}
run.record("second-order-pays", (even["first order"] / even["2M"])[:, ten])
run.record("levels-matter", even["first order"][:, ten] / gathered("flow", "first order")[:, ten])
run.record("heun-too-early", (even["Heun"] / even["first order"])[:, ten])
run.record("heun-later", (even["first order"] / even["Heun"])[:, fifty])
run.record("noise-hurts-few", (even["eta 1"] / even["eta 0"])[:, ten])
print("median distance to the exact end at 10 calls")
for kind in kinds:
    values = (f"{name} {gathered(kind, name)[:, ten].mean():.3f}" for name in look)
    print(f"  {kind:14s}", *values, sep="   ")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Sliced Wasserstein distance to the data against model calls for eta 0, 0.5 and 1. All fall towards the dotted floor. The line for eta 1 is clearly highest at few calls and still highest at 50, where its band overlaps the others. The line for eta 0.5 runs just above that for eta 0. None reaches the floor."}, "figure": {"caption": "Noise or none: distance of the samples' distribution to the data. Dotted: two sets of real data of the same size. Levels even in log-SNR. Bands: 90 % intervals over seeds.", "name": "fig-samplers-eta"}}
fig, ax = plt.subplots(figsize=(6, 3.2))
for eta, color in zip((0, 0.5, 1), (PALETTE[0], PALETTE[4], PALETTE[3]), strict=True):
    note = {0: " (DDIM)", 1: " (DDPM)"}.get(eta, "")
    curve(ax, s.calls, gathered("log-SNR", f"eta {eta}"), f"$\\eta$ = {eta}{note}", color)
ax.axhline(gathered("log-SNR", "floor").mean(), color=PALETTE[6], ls=":", label="floor")
ax.set(xscale="log", yscale="log", xlabel="model calls", ylabel="sliced Wasserstein distance")
ax.set(xticks=(5, 10, 20, 50), xticklabels=(5, 10, 20, 50))
ax.minorticks_off()
ax.legend(fontsize=9, loc="upper right")
plt.show()

# %%
run.report()

# %% [markdown]
# **At few calls the levels matter as much as the step.** {numref}`fig-samplers-calls` shows the same three steps on four kinds of levels. At 10 calls or fewer, the plain step on flow matching's levels does about as well as the best of the others, 2M on levels even in log-SNR. With more calls 2M pulls ahead. Flow matching's levels spend few calls at high noise, where the guess hardly changes, and more
# where arms are chosen. So part of what is credited to straight paths at sampling time is a choice of levels, and DDIM can have it too.
#
# **Order pays once steps are small enough.** Heun's guess divides the change of the denoiser by $2r$. If noise falls tenfold in a step, $r$ is 0.1, and the correction overshoots. So a method of order 2 can be much worse than one of order 1 when calls are few. Even at 50 calls Heun has not overtaken
# the plain step on levels even in training time. This is not EDM's own setting: its range of levels is narrower, and its budgets on images are larger than ours at the low end. The rounding of budgets (an even one leaves Heun a call short) also counts against Heun, most where calls are few.
#
# 2M extrapolates less wildly and needs no second call. But its gain at 10 calls is a gain on levels even in log-SNR. On Karras' levels it then gains nothing, and on the other two it is worse than the plain step. The reason is most likely one step, the last but one, down to $s_{\min}$. On three of the four kinds of levels it is very long: on levels
# even in training time, for instance, much of the log-SNR lies in the last few training steps. Our 2M extrapolates over it. The published code can lower the order at the end when steps are few, which guards against just this. In a quick check with one set of starts, not part of the recorded run, we took only that step with order 1, and 2M was
# then ahead of the plain step on all four kinds at 10 calls. So read the curves of 2M at few calls as those of 2M without this guard.
#
# **Noise costs calls, and repairs.** With a perfect denoiser and a right start, noise has nothing to repair, and it only adds error ({numref}`fig-samplers-eta`). Half the noise ($\eta = 0.5$) costs little; all of it costs most at few calls. The gap narrows as calls grow, until the intervals overlap, but no curve has reached the floor at 50 calls, and DDPM is still the furthest from it. But {numref}`fig-samplers-start` shows what noise is
# good for: DDPM forgets most of an error of the start that DDIM carries, shrunk less, to the end.
# A network makes errors at every step, and there {cite:t}`karras2022elucidating` find some noise useful.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# The denoiser is exact. A network's errors change the picture: beyond some number of calls they dominate, and better solvers stop helping. Guidance, which sharpens the denoiser and makes large steps unstable, is not tried; it is what DPM-Solver++ was made for. Nor are the stochastic sampler of EDM, solvers of order 3, time steps that are
# learned, and paths made straighter by training (reflow, {cite:t}`liu2023flow`). Which levels are best depends on the data: two dimensions and a narrow spiral have their own noise levels at which arms are chosen. Numbers such as "12 calls" do not carry over to images.
# :::
#
# ## Exercises
#
# **1.** Karras' rule has a parameter, $\rho = 7$. What do other values do to the plain step at 10 calls? Predict: what is $\rho = 1$, and what is $\rho \to \infty$?
#
# **2.** The share of a wrong mean that DDIM keeps is $c / \sqrt{c^2 + s_T^2}$. In an image of $k \times k$ pixels, all pixels share the brightness. What is $c$ for the brightness of an image, in the units in which noise has variance 1, and what follows for large images?
#
# **3.** Show that one Euler step of flow matching is {eq}`eq-samplers-step` with $g = D(z, s)$.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# rho = 1 is even in s itself: nearly all calls are spent at very high noise. rho -> infinity is even in log s, the log-SNR rule.
z = s_max * torch.randn(128, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
end = denoise(reference(denoise, z, s_max, 1e-3, s.fine), 1e-3)
for rho in (1, 2, 3, 5, 7, 15, 100):
    walk = [*schedulers.karras_sigmas(s_min, s_max, 10, rho=rho).tolist(), 0.0]
    off = (solve(denoise, z, walk)[-1] - end).norm(dim=1).median()
    print(f"rho = {rho:3d}: median distance {off:.3f}")

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# Brightness times k is the image's component along the unit vector (1, ..., 1) / k; noise has variance 1 along any unit vector.
# If brightness has standard deviation 0.3 over the data set, c = 0.3 k. The share kept grows with the image, towards 1:
# with s_T = 14.6 (latent diffusion), large images keep most of the start's grey. One reason why the grey shows in large images.
for side in (8, 32, 64, 128):
    print(
        f"{side:3d} x {side}: share of a wrong brightness kept {0.3 * side / math.hypot(0.3 * side, 14.6):.2f}"
    )

# %% [markdown]
# :::{dropdown} Solution 3: in words
# On the path $x = (1 - \sigma)\, x_0 + \sigma\, \epsilon$ we have $x = (1 - \sigma)\, z$ and $s = \sigma / (1 - \sigma)$. The network predicts $u = \epsilon - x_0$ with $\epsilon = (z - x_0)/s$. Euler's step is $x' = x + (\sigma' - \sigma)\, u$. Because $x = (1 - \sigma)\, x_0 + \sigma\, \epsilon$ with the *predicted* pair too,
# $x' = (1 - \sigma')\, x_0 + \sigma'\, \epsilon$. Divide by $1 - \sigma'$: $z' = x_0 + n\, \epsilon = x_0 + \frac{n}{s} (z - x_0)$. The path is straight in $\sigma$ for fixed $x_0$ and $\epsilon$, and so is DDIM's in $s$: both hold the same pair fixed.
# :::
#
# ## References
#
# The samplers: {cite:t}`ho2020denoising`, {cite:t}`song2021denoising`, {cite:t}`lu2022dpm`, {cite:t}`karras2022elucidating`, {cite:t}`lipman2023flow`, {cite:t}`liu2023flow`. The trajectory: {cite:t}`song2021score`. That they are one: {cite:t}`karras2022elucidating`, {cite:t}`gao2025diffusion`. Where to begin: {cite:t}`lin2024common`.
# Code read: [NVlabs/edm](https://github.com/NVlabs/edm), [LuChengTHU/dpm-solver](https://github.com/LuChengTHU/dpm-solver), [ermongroup/ddim](https://github.com/ermongroup/ddim).
