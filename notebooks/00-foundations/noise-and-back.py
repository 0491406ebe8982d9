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
# # Noise and back
#
# Add Gaussian noise to data, step by step, until only noise is left. Whoever can look at a noisy point and guess, on average as well as possible, which clean point it came from, can
# walk back. This page shows why, on data for which the best guess is known exactly. Then it trains a small network and asks how far from the best it stays
# ({cite:t}`sohldickstein2015deep`, {cite:t}`ho2020denoising`).

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

import matplotlib.pyplot as plt
import torch
from einops import reduce, repeat
from torch import nn

from minilib.arms import run_arms
from minilib.data import Empirical, GaussianMixture, load, toy2d
from minilib.plotting import PALETTE, curve, show_images, use_style
from minilib.reproduction import Reproduction
from minilib.schedulers import DDIMScheduler, make_betas, rescale_zero_terminal_snr


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # one training run of each arm a seed
    steps: int  # training steps
    batch: int  # points a step
    width: int  # hidden units a layer
    points: int  # fresh points on which the loss is measured
    digits: int  # digits sampled from the finite data set


run = Reproduction(
    "noise-and-back",
    profile,
    {
        "smoke": Settings((0, 1), steps=150, batch=128, width=64, points=4000, digits=10),
        "cpu": Settings((0, 1, 2, 3, 4), steps=4000, batch=256, width=128, points=40_000, digits=100),
        "gpu": Settings(tuple(range(10)), steps=8000, batch=256, width=128, points=40_000, digits=500),
    },
)
s = run.settings
use_style()
run.show_card()

# %%
run.show_settings()

# %% [markdown]
# (sec-noise-and-back-idea)=
#
# ## The idea
#
# Take a clean point $x_0$. Mix it with standard normal noise $\epsilon$:
#
# $$
# x_t = \alpha_t\, x_0 + \sigma_t\, \epsilon , \qquad \alpha_t^2 + \sigma_t^2 = 1 .
# $$ (eq-noise-and-back-forward)
#
# The time $t$ runs from 0 to $T - 1$, with $T = 1000$ here. (The papers count from 1. So $x_0$ always means the clean point, and time $t = 0$ already carries the first, tiny portion of noise.) The factor $\alpha_t$ falls from almost 1 to almost 0, and $\sigma_t$ rises. So $x_t$ goes from data to noise, and the spread of data of unit variance
# stays 1 all the way. Nothing is learned in this direction.
#
# Our data are eight Gaussian spots on a ring. Colour says which spot a point came from. Watch when the colours mix: from then on, nobody can say for certain where a point belongs.

# %%
ring = toy2d("ring")
exact = GaussianMixture(ring.means.double(), ring.stds.double(), ring.weights.double())  # for exact claims
T = 1000
schedules = {
    "linear": make_betas(T, beta_schedule="linear"),
    "scaled linear": make_betas(T, 0.00085, 0.012, beta_schedule="scaled_linear"),
    "cosine": make_betas(T, beta_schedule="squaredcos_cap_v2"),
    "linear, zero terminal SNR": rescale_zero_terminal_snr(make_betas(T)),
}
alphas_cumprod = {name: (1 - betas).cumprod(0) for name, betas in schedules.items()}
alpha, sigma = alphas_cumprod["linear"].sqrt(), (1 - alphas_cumprod["linear"]).sqrt()  # (T,) each
print({name: tuple(bar.shape) for name, bar in alphas_cumprod.items()})

# %% tags=["hide-input"] mystnb={"image": {"alt": "Five clouds of points. At t = 0 there are eight tight spots in eight colours on a ring. At t = 100 they have grown and begin to touch, at t = 300 they overlap, at t = 600 and 999 one round cloud of mixed colours is left."}, "figure": {"caption": "The same 1,000 points at five times of the linear schedule. Colour: the spot that a point came from.", "name": "fig-noise-and-back-forward"}}
g = torch.Generator().manual_seed(0)
spot = torch.arange(1000) % 8
clean = ring.means[spot] + ring.stds[spot, None] * torch.randn(1000, 2, generator=g)
noise = torch.randn(1000, 2, generator=g)
colours = (*PALETTE, "#000000")
fig, axes = plt.subplots(1, 5, figsize=(7, 1.9), sharex=True, sharey=True)
for ax, t in zip(axes, [0, 100, 300, 600, 999], strict=True):
    x = alpha[t] * clean + sigma[t] * noise
    ax.scatter(*x.T, c=[colours[k] for k in spot], s=1.5)
    ax.set(title=f"$t$ = {t}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[-2, 0, 2])
axes[0].set_ylabel("2nd coordinate")
axes[2].set_xlabel("first coordinate of $x_t$")
fig.tight_layout()
plt.show()

# %% [markdown]
# ### Many small steps are one jump
#
# {cite:t}`ho2020denoising` define the process by small steps: $x_t = \sqrt{1 - \beta_t}\, x_{t-1} + \sqrt{\beta_t}\, \epsilon_t$, with small numbers $\beta_t$ called the **schedule**. Sums of Gaussians are Gaussian, so all the
# steps together are one jump, {eq}`eq-noise-and-back-forward` with $\alpha_t^2 = \bar\alpha_t = \prod_{r \le t} (1 - \beta_r)$; the step $t = 0$ starts from the clean point. That is why training is cheap: any $x_t$ is made at once, without the steps before it.
#
# The cell walks the steps, keeping the factor of $x_0$ and the variance of the noise, and compares with the jump.

# %%
# NBVAL_CHECK_OUTPUT
gaps = {}
for name, betas in schedules.items():
    factor, variance, gap = 1.0, 0.0, 0.0
    for beta, bar in zip(betas.tolist(), alphas_cumprod[name].tolist(), strict=True):
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        gap = max(gap, abs(factor - math.sqrt(bar)), abs(variance - (1 - bar)))
    gaps[name] = gap
    print(f"{name}: {'PASS' if gap < 1e-10 else 'FAIL'}")
run.record("one-jump", list(gaps.values()))

# %% [markdown]
# ### Which schedule?
#
# What a denoiser can know depends on the **signal-to-noise ratio** alone, $\mathrm{SNR}_t = \alpha_t^2 / \sigma_t^2$: scaling its input by a known factor changes nothing. A schedule is a curve of log-SNR over time,
# and a decision on which noise levels to spend training and sampling steps.
#
# - *Linear* $\beta_t$ {cite:p}`ho2020denoising`; *scaled linear*, linear in $\sqrt{\beta_t}$, of latent diffusion {cite:p}`ldm`; *cosine* {cite:p}`nichol2021improved`.
# - All three stop short of pure noise (cosine by very little). Sampling starts from pure noise nevertheless. {cite:t}`lin2024common` rescale a schedule so that it ends at $\mathrm{SNR} = 0$ exactly; {doc}`the next page </notebooks/00-foundations/samplers>` measures what the gap does.
#
# The right schedule depends on the image size. Enlarge an image $k$ times by repeating its pixels, and add noise: the mean over each block of $k \times k$ pixels is the small image again, with noise of $\sigma / k$. So a large image at the same
# $t$ is *easier*: its log-SNR is up by $2 \ln k$ {cite:p}`chen2023importance,hoogeboom2023simple`. On the right we count, for real digits, how many training images are still possible given $x_t$: the exponential of the entropy of
# the posterior over the 1,248 images. Where it falls from all to one, the image is decided. For this finite set, time spent above or below is time with nothing to decide. (Real large images also carry finer detail, which is decided later, at lower noise.)

# %%
digits = load("digits", "train").x.double()  # (1248, 1, 8, 8) in [-1, 1]
finite = Empirical(digits.flatten(1))  # the data set as a density: one point an image
print(tuple(digits.shape), "->", tuple(finite.means.shape))


def images_possible(bar: float, k: int, n: int = 48) -> float:
    """exp(entropy) of which training image x_t came from, averaged in the logarithm; images enlarged k times."""
    g = torch.Generator().manual_seed(0)
    level = math.sqrt((1 - bar) / bar) / k  # noise per unit of signal, after averaging blocks
    picked = finite.means[torch.randint(len(finite.means), (n,), generator=g)]
    noisy = picked + level * torch.randn(picked.shape, generator=g, dtype=torch.float64)
    posterior = torch.softmax(-(torch.cdist(noisy, finite.means) ** 2) / (2 * level**2), dim=1)
    return torch.special.entr(posterior).sum(1).mean().exp().item()


# %%
# NBVAL_CHECK_OUTPUT
big = repeat(digits[:5], "n c h w -> n c (h a) (w b)", a=4, b=4)
big_noise = torch.randn(big.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
blocks = reduce(0.6 * big + 0.8 * big_noise, "n c (h a) (w b) -> n c h w", "mean", a=4, b=4)
block_noise = 4 * reduce(big_noise, "n c (h a) (w b) -> n c h w", "mean", a=4, b=4)  # of unit variance again
gap = (blocks - (0.6 * digits[:5] + 0.8 / 4 * block_noise)).abs().max()
print("a 32 x 32 image at sigma is an 8 x 8 image at sigma / 4:", "PASS" if gap < 1e-12 else "FAIL")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: log-SNR over time for four schedules. All fall from between 7 and 10; the linear one ends at -10, scaled linear at -5, cosine lower, the rescaled one drops out of the picture. Right: the number of training digits still possible. For the linear schedule at 8 by 8 pixels it rises from one after t = 100 to all 1,248 at about t = 700; for 32 by 32 pixels, and for cosine at 8 by 8, it rises later."}, "figure": {"caption": "Left: four schedules. Right: how many of the 1,248 training digits are still possible at time $t$ (1: decided; dotted: all). Large images need more noise before the image is open again.", "name": "fig-noise-and-back-schedules"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.9), layout="constrained")
for (name, bar), style in zip(alphas_cumprod.items(), ["-", "-", "-", "--"], strict=True):
    left.plot(torch.log(bar / (1 - bar)).clamp(min=-40), style, label=name)
left.set(xlabel="time $t$", ylabel=r"log-SNR, $\ln(\alpha_t^2/\sigma_t^2)$", ylim=(-14, 11))
above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "fontsize": 9}
left.legend(**above)
times = list(range(9, T, 30))
for (name, k), color in zip(
    [("linear", 1), ("linear", 4), ("cosine", 1)], [PALETTE[0], PALETTE[5], PALETTE[2]], strict=True
):
    counts = [images_possible(alphas_cumprod[name][t].item(), k) for t in times]
    right.semilogy(times, counts, color=color, label=f"{name}, {8 * k} x {8 * k} pixels")
right.axhline(len(finite.means), color=PALETTE[6], ls=":")
right.set(xlabel="time $t$", ylabel="training digits still possible")
right.legend(**above)
plt.show()

# %%
rescaled = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").alphas_cumprod
kept = (rescaled[0] - DDIMScheduler().alphas_cumprod[0]).abs().item()
run.record("zero-snr", [alphas_cumprod["linear, zero terminal SNR"][-1].item(), rescaled[-1].item(), kept])
print(f"last alphas_cumprod: linear {alphas_cumprod['linear'][-1]:.1e}, rescaled {rescaled[-1].item()}")

# %% [markdown]
# ## The method
#
# ### One denoiser, five views
#
# Given $x_t$ and $t$, a model may predict any one of five things. With the best guess $\hat x_0$ of the clean point and $\hat\epsilon = (x_t - \alpha_t \hat x_0) / \sigma_t$ they are
#
# $$
# \underbrace{\hat x_0}_{\text{clean point}}, \quad
# \underbrace{\hat\epsilon}_{\text{noise}}, \quad
# \underbrace{\hat v = \alpha_t \hat\epsilon - \sigma_t \hat x_0}_{v}, \quad
# \underbrace{\hat u = \hat\epsilon - \hat x_0}_{\text{flow velocity}}, \quad
# \underbrace{\nabla_{x_t} \ln p_t(x_t) = -\hat\epsilon / \sigma_t}_{\text{score}} .
# $$ (eq-noise-and-back-views)
#
# All are linear in $x_t$ and $\hat x_0$, with factors known in advance. So each gives all the others. They are not equally easy to *learn*. At high noise $\hat x_0 = (x_t - \sigma_t \hat\epsilon)/\alpha_t$ divides by a small number, so a small
# error in $\hat\epsilon$ becomes a large one; at $\mathrm{SNR} = 0$ it is lost. At low noise, $\hat x_0$ is nearly the input, and $\hat\epsilon$ is the hard part. $v$ is benign at both ends {cite:p}`salimans2022progressive`.
#
# The flow velocity belongs to the path $x = (1 - \sigma)\, x_0 + \sigma\, \epsilon$ ({cite:t}`lipman2023flow`, who let time run from noise to data, so that their sign is the opposite). With $\sigma = \sigma_t / (\alpha_t + \sigma_t)$, our $x_t$ is that point times
# $\alpha_t + \sigma_t$: same denoiser, other units. The last view is the exact score if $\hat x_0$ is the best guess, which the next section defines; for a trained model it is an estimate.

# %%
# NBVAL_CHECK_OUTPUT
g = torch.Generator().manual_seed(2)
x0 = exact.sample(T, g)
eps = torch.randn(T, 2, generator=g, dtype=torch.float64)
a, b = alpha[:, None], sigma[:, None]  # one noise level a point, all of them
x_t, v, u, score = a * x0 + b * eps, a * eps - b * x0, eps - x0, -eps / b
back = {
    "noise": (x_t - b * eps) / a,
    "v": a * x_t - b * v,
    "flow velocity": (x_t - b * u) / (a + b),
    "score": (x_t + b**2 * score) / a,
}
gaps = {name: (clean_again - x0).abs().max().item() for name, clean_again in back.items()}
for name, gap in gaps.items():
    print(f"x_0 from {name}: {'PASS' if gap < 1e-9 else 'FAIL'}")
run.record("five-views", list(gaps.values()))

# %% [markdown]
# ### The best denoiser
#
# Train on $\mathbb{E}\,\lVert \hat x_0(x_t, t) - x_0 \rVert^2$ with unlimited data and capacity. The minimum is the conditional mean, $D(x_t) = \mathbb{E}[x_0 \mid x_t]$: the average of all clean points that could have led here, each with its probability.
#
# For a mixture of Gaussians, spots with means $\mu_k$, standard deviations $c_k$ and weights $w_k$, it can be written down. A noisy spot is a Gaussian too, so Bayes' rule says which spot $x_t$ came from, and within the spot we shrink towards its mean:
#
# $$
# D(x) = \sum_k p(k \mid x) \left[ \mu_k + \frac{\alpha_t c_k^2}{\alpha_t^2 c_k^2 + \sigma_t^2} \left( x - \alpha_t \mu_k \right) \right] , \qquad
# p(k \mid x) \propto w_k\, \mathcal{N}\!\left( x;\ \alpha_t \mu_k,\ \alpha_t^2 c_k^2 + \sigma_t^2 \right) .
# $$ (eq-noise-and-back-denoiser)
#
# It is `GaussianMixture.denoise` in [toy2d.py](https://github.com/minilib-book/minilib/blob/main/minilib/data/toy2d.py). And it knows the slope of the noisy density, without anyone having asked for it. This is Tweedie's formula {cite:p}`efron2011tweedie,vincent2011connection`:
#
# $$
# \alpha_t\, D(x) = x + \sigma_t^2\, \nabla_x \ln p_t(x) .
# $$ (eq-noise-and-back-tweedie)
#
# So the arrow from a noisy point $x$ to $\alpha_t D(x)$, its denoised version in the scale of time $t$, points uphill in density. The cell takes the gradient of $\ln p_t$ by automatic differentiation and compares.

# %%
# NBVAL_CHECK_OUTPUT
gaps = []
for t in (0, 50, 250, 500, 750, 999):
    x = (alpha[t] * x0 + sigma[t] * eps).requires_grad_()
    (slope,) = torch.autograd.grad(exact.log_prob(x, alpha[t], sigma[t]).sum(), x)
    right_hand_side = x + sigma[t] ** 2 * slope
    gaps.append((alpha[t] * exact.denoise(x, alpha[t], sigma[t]) - right_hand_side).abs().max().item())
print("Tweedie's formula at six noise levels:", "PASS" if max(gaps) < 1e-10 else "FAIL")
run.record("tweedie", gaps)

# %% [markdown]
# The next figure is the one to remember. Arrows: where the best denoiser sends a point. Colour: how undecided it is between the eight spots, in bits ($\log_2 8 = 3$ is "no idea"). At high noise every arrow points at the mean of the data: the average of all
# guesses, a point where there is no data at all. As noise falls, the plane splits into eight regions. A choice is open only in the seams between them, which get thinner and thinner. Once a point has left the seams, only details are left to find.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four panels from high to low noise. At t = 700 the whole plane is undecided and all arrows point to the centre. At t = 300 only a disc in the middle is fully undecided. At t = 120 eight pale, decided sectors appear, and at t = 40 only thin seams between them, meeting in the centre, are left; the arrows point to the spot of their sector."}, "figure": {"caption": "The best denoiser at four noise levels. Arrows lead from $x_t$ to $\\alpha_t D(x_t)$ (length to scale, shortened to a third). Colour: entropy of the posterior over the eight spots. White dots: the noisy spots' centres $\\alpha_t \\mu_k$.", "name": "fig-noise-and-back-field"}}
fig, axes = plt.subplots(2, 2, figsize=(6.6, 6.2), sharex=True, sharey=True, layout="constrained")
fine, coarse = torch.linspace(-2.4, 2.4, 121).double(), torch.linspace(-2.2, 2.2, 13).double()
for ax, t in zip(axes.flat, [700, 300, 120, 40], strict=True):
    plane = torch.cartesian_prod(fine, fine)
    variance = alpha[t] ** 2 * exact.stds**2 + sigma[t] ** 2
    spots = torch.softmax(-(torch.cdist(plane, alpha[t] * exact.means) ** 2) / (2 * variance), dim=1)
    bits = torch.special.entr(spots).sum(1).reshape(121, 121) / math.log(2)
    picture = ax.pcolormesh(fine, fine, bits.T, cmap="Blues", vmin=0, vmax=3, rasterized=True)
    at = torch.cartesian_prod(coarse, coarse)
    arrow = alpha[t] * exact.denoise(at, alpha[t], sigma[t]) - at
    ax.quiver(*at.T, *(arrow / 3).T, angles="xy", scale_units="xy", scale=1, width=0.005, color=PALETTE[1])
    ax.scatter(*(alpha[t] * exact.means).T, s=18, color="white", edgecolor="black", lw=0.6, zorder=3)
    ax.set(title=f"$t$ = {t}, $\\sigma_t/\\alpha_t$ = {sigma[t] / alpha[t]:.2g}", aspect="equal")
    ax.grid(False)
fig.supxlabel("first coordinate of $x_t$", fontsize=10)
fig.supylabel("second coordinate of $x_t$", fontsize=10)
fig.colorbar(picture, ax=axes, shrink=0.6, label="undecided between spots (bits)")
plt.show()

# %% [markdown]
# ### What a perfect model would do: memorise
#
# A training set is a finite set: a mixture of spots of width zero. Then {eq}`eq-noise-and-back-denoiser` becomes a softmax over the training points. It *is* the minimum of the training loss. Its guesses are averages of training points; as noise falls, one point takes all the weight, and a sampler that follows it down can only return what it has seen. We try it on real digits: sample with
# the exact denoiser of the 1,248 training images. No network is involved.
#
# ### The core, in one sitting
#
# Here is everything that a diffusion model needs besides an optimiser, with no library: a schedule, a network, a loss, a sampler. The sampler is DDIM (denoising diffusion implicit models, {cite:t}`song2021denoising`): split $x_t$ into the predicted clean point and the predicted noise, then mix them again with the factors of the next, lower
# noise level. The next page is about this line.

# %%
# Schedule.
betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
alpha, sigma = (1 - betas).cumprod(0).sqrt(), (1 - (1 - betas).cumprod(0)).sqrt()


class Denoiser(nn.Module):
    """(n, 2) points and (n,) times -> (n, 2) predicted noise. `told_time=False` zeroes the time input: the control."""

    def __init__(self, width: int, told_time: bool = True) -> None:
        super().__init__()
        self.told_time = told_time
        self.net = nn.Sequential(
            nn.Linear(2 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, t):
        angle = 1.5 * t[:, None] / T * torch.logspace(0, 2, 16)  # (n, 16): slow and fast clocks
        clock = torch.cat([angle.sin(), angle.cos()], dim=1) * self.told_time
        return self.net(torch.cat([x, clock], dim=1))


def add_noise(x0, noise, t):
    return alpha[t, None].to(x0) * x0 + sigma[t, None].to(x0) * noise


def loss(model, x0, noise, t):
    return (model(add_noise(x0, noise, t), t) - noise).square().mean()


@torch.no_grad()
def sample(model, x, steps):
    """From pure noise x (n, d) to data."""
    times = torch.linspace(T - 1, 0, steps).round().long().tolist()
    for t, lower in zip(times, [*times[1:], None], strict=True):
        noise = model(x, torch.full((len(x),), t))
        x0 = (x - sigma[t] * noise) / alpha[t]
        x = x0 if lower is None else alpha[lower] * x0 + sigma[lower] * noise
    return x


# %% [markdown]
# The best denoiser can be dressed as such a model. With it we check these lines against the library, and sample digits.


# %%
# NBVAL_CHECK_OUTPUT
def best(density):
    """The exact denoiser of a density, as a model that predicts noise."""

    def model(x, t):
        a, b = alpha[t, None].to(x), sigma[t, None].to(x)
        return (x - a * density.denoise(x, a, b)) / b

    return model


library = DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
start = torch.randn(200, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
library.set_timesteps(28)
x, every = start, torch.arange(T)
for t in library.timesteps:
    x = library.step(best(exact)(x, t.expand(200)), t, x).prev_sample
gaps = [
    (x - sample(best(exact), start, 28)).abs().max().item(),
    (library.add_noise(x0, eps, every) - add_noise(x0, eps, every)).abs().max().item(),
]
print("this page's lines are the library:", "PASS" if max(gaps) < 1e-9 else "FAIL")
run.record("core-is-library", gaps)

# %%
start = torch.randn(s.digits, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
guesses = []


def watched(x, t):
    guesses.append(finite.denoise(x, alpha[t[0]], sigma[t[0]]))
    return best(finite)(x, t)


made = sample(watched, start, 50)
nearest = finite.means[torch.cdist(made, finite.means).argmin(1)]
run.record("memorises", (made - nearest).abs().max().item())
print(
    f"{s.digits} samples, {len(nearest.unique(dim=0))} different training digits, "
    f"largest difference of a pixel from the nearest one {(made - nearest).abs().max():.1e}"
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Seven rows of eight small images. In the first row all eight guesses are the same grey blur, the mean of all digits. Further down they become different blurs, then sharp digits. The last two rows, the samples and the nearest training digits, are the same."}, "figure": {"caption": "What the best denoiser of 1,248 digits guesses on its way down, for eight starts. The last row is not a sample: it shows the training digit nearest to the one above.", "name": "fig-noise-and-back-memorise"}}
rows = [0, 14, 22, 28, 34]
shown = torch.cat([*(guesses[i][:8] for i in rows), made[:8], nearest[:8]]).reshape(-1, 1, 8, 8)
labels = [f"$D(x_t)$, $t$ = {round(999 - 999 * i / 49)}" for i in rows]
fig, ax = plt.subplots(figsize=(5.6, 4.2))
show_images(shown, columns=8, ax=ax, row_labels=[*labels, "sample", "nearest training digit"])
fig.tight_layout()
plt.show()

# %% [markdown]
# ## The experiment
#
# We train the network above on the ring with the plain loss. What should its loss be? Not zero: even the best denoiser cannot know the noise. Its loss $L^\ast = \mathbb{E}\,\lVert \epsilon - \epsilon^\ast \rVert^2$ is the **irreducible** part. Here $\epsilon^\ast = \mathbb{E}[\epsilon \mid x_t]$ is the best denoiser's noise, and the mean runs over all times alike. Because $\epsilon^\ast$ is a conditional mean, the rest
# adds up like the sides of a right-angled triangle:
#
# $$
# \underbrace{\mathbb{E}\,\lVert \hat\epsilon - \epsilon \rVert^2}_{\text{loss}} = L^\ast + \underbrace{\mathbb{E}\,\lVert \hat\epsilon - \epsilon^\ast \rVert^2}_{\text{excess}} .
# $$ (eq-noise-and-back-excess)
#
# For images nobody knows $L^\ast$, so a loss curve does not say how much is left to learn. Here we do, and can measure the excess by itself, with little noise. All losses below are a coordinate: divided by 2, the number of dimensions.
#
# Two arms, same seeds, data, noise, steps and operations: **told $t$**, and the control **not told $t$**, whose time input is multiplied by zero. For scale, a third line is not trained, but told $t$: the best denoiser of *one* Gaussian with the mean and variance of the ring, which is
# the best *linear* one.

# %%
bins = 10


def trial(told_time: bool, seed: int) -> dict:
    """Train on the ring; then the excess loss in `bins` spans of time, the irreducible loss, and some samples."""
    torch.manual_seed(seed)
    model, g = Denoiser(s.width, told_time), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: min(1, (k + 1) / 50, 2 * (1 - k / s.steps)))
    for _ in range(s.steps):
        x0, noise = ring.sample(s.batch, g), torch.randn(s.batch, 2, generator=g)
        value = loss(model, x0, noise, torch.randint(T, (s.batch,), generator=g))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        rate.step()
    fresh = torch.Generator().manual_seed(10_000 + seed)
    t = torch.arange(s.points) * T // s.points  # every time equally often, in order
    x0, noise = ring.sample(s.points, fresh), torch.randn(s.points, 2, generator=fresh)
    x_t = add_noise(x0, noise, t)
    target = best(ring)(x_t, t)
    with torch.no_grad():
        excess = (model(x_t, t) - target).square().mean(1)
    spread = (ring.means.square().sum(1).mean() / 2 + ring.stds[0] ** 2).sqrt()
    linear = GaussianMixture(torch.zeros(1, 2), spread[None], torch.ones(1))
    return {
        "excess": excess.reshape(bins, -1).mean(1),
        "irreducible": (noise - target).square().mean(1).reshape(bins, -1).mean(1),
        "linear": (best(linear)(x_t, t) - target).square().mean(1).reshape(bins, -1).mean(1),
        "samples": sample(model, torch.randn(1500, 2, generator=fresh), 50).float(),
    }


arms = {"told $t$": True, "not told $t$": False}
results = run_arms(trial, arms, s.seeds)

# %% [markdown]
# ## Results

# %%
per_seed = {
    (name, key): torch.stack([r[key] for r in results[name]]) for name in arms for key in results[name][0]
}
told, control = (per_seed[name, "excess"].mean(1) for name in arms)
irreducible = per_seed["told $t$", "irreducible"].mean(1)
run.record("near-minimum", 1 + told / irreducible)
run.record("needs-time", control / told)
print(f"irreducible loss                        {irreducible.mean():.4f}")
print(f"excess, told t                          {told.mean():.4f}  ({(told / irreducible).mean():.1%} of it)")
print(f"excess, not told t                      {control.mean():.4f}")
print(f"excess of the best linear denoiser      {per_seed['told $t$', 'linear'].mean():.4f}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Squared error over time, logarithmic. The irreducible loss is flat at first and falls by orders of magnitude after t = 300. The excess of the network that is told the time is largest at small t and lies far below the irreducible loss there. The excess of the network that is not told the time is much larger everywhere. There is one exception: in the last span of time it exceeds the irreducible loss. The best linear denoiser is about as bad as the control at small t, and almost exact at large t. The control is worse than the linear one over all times but one span, and levels off high at large t."}, "figure": {"caption": "Where the loss comes from: irreducible part and excess of three denoisers, by time. Bands: 90 % intervals over training seeds.", "name": "fig-noise-and-back-excess"}}
fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
centres = [(i + 0.5) * T / bins for i in range(bins)]
curve(ax, centres, per_seed["told $t$", "irreducible"], "irreducible loss $L^\\ast$", PALETTE[6], marker="s")
curve(ax, centres, per_seed["not told $t$", "excess"], "excess: not told $t$", PALETTE[1])
curve(ax, centres, per_seed["told $t$", "linear"], "excess: best linear denoiser", PALETTE[4], marker="^")
curve(ax, centres, per_seed["told $t$", "excess"], "excess: told $t$", PALETTE[0])
ax.set(yscale="log", xlabel="time $t$", ylabel="squared error a coordinate", ylim=(1e-5, 2))
fig.legend(fontsize=9, ncol=2, loc="outside upper center")
plt.show()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three clouds of samples on the ring. The exact denoiser gives eight round spots. The network that is told the time gives the same spots, joined by bridges of points along the ring. The network that is not told the time gives an even ring without spots, and some points inside it."}, "figure": {"caption": "Samples of the first seed, 50 steps of the sampler above: with the exact denoiser, with the network, and with the control.", "name": "fig-noise-and-back-samples"}}
start = torch.randn(1500, 2, generator=torch.Generator().manual_seed(5))
clouds = {"exact denoiser": sample(best(ring), start, 50)}
clouds |= {name: results[name][0]["samples"] for name in arms}
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), sharex=True, sharey=True)
for ax, (name, cloud) in zip(axes, clouds.items(), strict=True):
    ax.scatter(*cloud.T, s=2, color=PALETTE[0])
    ax.set(title=name, aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xlabel="first coordinate")
axes[0].set_ylabel("second coordinate")
fig.tight_layout()
plt.show()

# %%
run.report()

# %% [markdown]
# The identities hold to rounding. They need no experiment, but a sign or an index is easily wrong in code, and the check costs nothing.
#
# {numref}`fig-noise-and-back-excess` is about learning. Most of the loss that one watches during training is the irreducible part. It is large at small $t$, where the noise is hard to tell from the detail of the data, and it falls to almost nothing at large $t$, where the input
# *is* the noise. What the network can still improve lies mostly at small $t$ too: there the best denoiser has sharp seams ({numref}`fig-noise-and-back-field`), and a smooth network probably blurs them. (Where in the plane the excess lies was not measured.) The bridges between the spots in
# {numref}`fig-noise-and-back-samples` fit this; with the exact denoiser the same sampler leaves only a few stray points. At large $t$ the best denoiser is linear, and two numbers, mean and variance, are all there is to know.
#
# Yet the network does not get there. Its excess stops falling in the second half of the schedule, far above the linear denoiser's, and at the last times it is larger than the irreducible loss itself. So "within 5 %" holds for the loss over all times together, as the claim says, not at each time. The plain loss on $\epsilon$
# hardly sees these errors. The clean point does: $\hat x_0$ divides them by $\alpha_t$, which is small there.
#
# Without the time, the network must guess the noise level from the point itself. In two dimensions one point says little about a variance, and the control pays for it: it is worse than the *linear* denoiser that is told the time, and its samples find the ring but not the spots. In an image with thousands of pixels the level should be
# much easier to guess, so the size of this effect does not carry over; that is not tried here.
#
# {numref}`fig-noise-and-back-memorise` is about not learning. The exact minimum of the training loss copies. Each picture that a diffusion model makes and that is not in its training set exists because the model does *not* reach that minimum.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# Two dimensions are easy. Nothing here says how a network fills the space between training images, and that is where all the interest of image models lies. The network saw fresh points at every step, so it could not memorise. The schedules are compared by where they
# decide, not by training with each: the cosine schedule's gain {cite:p}`nichol2021improved` and the gain of shifted schedules at high resolution {cite:p}`hoogeboom2023simple` are left untried. The variational bound that {cite:t}`ho2020denoising` start from is not needed here.
# :::
#
# ## Exercises
#
# **1.** For data from one Gaussian of standard deviation $c$, the irreducible loss at each $t$ has a closed form. Derive it, then check it by simulation.
#
# **2.** The loss on $\epsilon$ and the loss on $x_0$ have the same minimum. What weighting over $t$ turns one into the other? Which times does the plain loss on $\epsilon$ count most, compared with the loss on $x_0$?
#
# **3.** The exact minimum of the training loss only copies. Name two reasons why a trained network does not reach it.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# Given x_t, the noise has variance 1 - Cov^2 / Var(x_t) = 1 - sigma^2 / (alpha^2 c^2 + sigma^2).
# So L* = alpha^2 c^2 / (alpha^2 c^2 + sigma^2): near 1 where the data hide the noise, near 0 where all is noise.
c, g = 0.5, torch.Generator().manual_seed(6)
gaussian = GaussianMixture(torch.zeros(1, 2), torch.tensor([c]), torch.ones(1))
for t in (10, 100, 300, 900):
    point, noise = gaussian.sample(100_000, g), torch.randn(100_000, 2, generator=g)
    when = torch.full((100_000,), t)
    measured = (best(gaussian)(add_noise(point, noise, when), when) - noise).square().mean()
    print(
        f"t = {t}: formula {alpha[t] ** 2 * c**2 / (alpha[t] ** 2 * c**2 + sigma[t] ** 2):.4f}, measured {measured:.4f}"
    )

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# eps - eps_hat = -(alpha / sigma) (x_0 - x0_hat), so the loss on eps is the loss on x_0 times alpha^2 / sigma^2: the SNR.
# It counts low noise (small t) far more: by many orders of magnitude over the schedule.
for t in (0, 250, 500, 750, 999):
    print(f"t = {t}: weight {(alpha[t] / sigma[t]) ** 2:.3g}")

# %% [markdown]
# :::{dropdown} Solution 3: in words
# The softmax over all training points is sharp at low noise, and a network of limited size and smoothness cannot draw its seams in thousands of dimensions. Training stops long before: each image is visited only a
# few times at each noise level. (A large network, trained long on few or repeated images, does return some of them {cite:p}`carlini2023extracting`.) And the shape of the network (locality, shared weights, attention) prefers denoisers that work alike everywhere, which is what makes new images possible.
# :::
#
# ## References
#
# The process and the plain loss: {cite:t}`sohldickstein2015deep`, {cite:t}`ho2020denoising`. The score: {cite:t}`vincent2011connection`, {cite:t}`song2021score`. Views and schedules: {cite:t}`salimans2022progressive`, {cite:t}`nichol2021improved`,
# {cite:t}`lin2024common`, {cite:t}`lipman2023flow`. The ratio $\sigma_t / \alpha_t$ as the only variable: {cite:t}`karras2022elucidating`.
