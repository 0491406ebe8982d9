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
# # EcoDiff: learn what a sampler can do without
#
# A trained model has attention heads and hidden neurons that it could do without. {cite:t}`ecodiff` learn which: each gets a factor between 0 and 1, the whole sampler runs with these factors, and the gradient of the error in the *last* image goes back through all steps to the
# factors alone. What ends low is cut out. No weight is trained, before or after.
#
# Back-propagation through all steps needs memory for all steps. The paper's second idea brings that down to the memory of one. It works for any loss on the result of a sampler, and it is the part of this page to remember.

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
from copy import deepcopy
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display

from minilib import zoo
from minilib.arms import run_arms
from minilib.attention import attention_processor
from minilib.caching import equal_cost_steps
from minilib.data import load
from minilib.metrics import class_accuracy, features, frechet_distance
from minilib.models import DIT_CONFIGS, DiT, MMDiT, UNet
from minilib.models.mmdit_configs import SD3_CONFIGS
from minilib.models.unet_configs import UNET_CONFIGS
from minilib.plotting import PALETTE, mean_interval, show_images, use_style
from minilib.profiling import count_calls, count_flops, count_parameters, cpu_time
from minilib.pruning import (
    HardConcreteMasks,
    activation_magnitude,
    alive_probability,
    contribution,
    find_sites,
    hard_concrete,
    keep_top,
    maskable_parameters,
    masked,
    ones,
    shrink_model,
    shrunk_parameters,
    weight_magnitude,
)
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise
from minilib.schedulers import DPMSolverMultistepScheduler
from minilib.step_checkpoint import checkpointed_steps, run_steps, watch_saved_bytes


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each has noise and labels of its own, for learning and for judging
    steps: int  # of the sampler, T
    updates: int  # of the masks
    noises: int  # samplers run at once, an update
    images: int  # judged, a seed
    watched: int  # of them, looked at step by step
    probes: int  # random directions of the one-shot scores
    exact_steps: int  # of the near-exact solution
    other_steps: tuple[int, ...]  # step counts that the masks were not learned at
    memory_steps: tuple[int, ...]  # at which memory is measured
    batch: int  # of the timing
    jobs: int  # processes


run = Reproduction(
    "ecodiff",
    profile,
    {
        "smoke": Settings((0,), 3, 2, 4, 20, 10, 1, 12, (2, 5), (2, 3, 5), 8, 1),
        "cpu": Settings((0, 1, 2, 3), 8, 60, 16, 200, 64, 12, 100, (4, 20), (2, 4, 8, 16, 32, 64), 64, 2),
        "gpu": Settings(tuple(range(5)), 8, 120, 64, 368, 64, 40, 200, (4, 20), (2, 4, 16, 64), 256, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is this book's class-conditional transformer of handwritten digits. Each image has $8 \times 8$ pixels; patches of $2 \times 2$ make 16 tokens of it. Every seed has its own labels and noise, for learning and for judging, and all arms of a seed share them.

# %%
run.show_settings()

# %% [markdown]
# (sec-ecodiff-idea)=
# ## The idea
#
# A **unit** is something that can be taken out whole. A *head* of an attention layer takes its rows of the query, key and value matrices with it, and its columns of the output matrix. A *hidden neuron* of a feed-forward network takes one row of the first matrix and one column of the
# second. In a gated network it takes two rows, of the value and of the gate. What a unit hands on, $h_j$, is multiplied by a **mask** $m_j \in [0, 1]$. With $m_j = 1$ nothing changes; with $m_j = 0$ the unit might as well not be there.
#
# Let $F_\theta(x_T, y)$ be the image that a deterministic sampler of $T$ steps makes from the noise $x_T$ and the label $y$, and $F_\theta(x_T, y; m)$ what it makes with masks. Here $\theta$ are the weights, which stay as they are. EcoDiff looks for masks that are small and leave the *final* image alone:
#
# $$
# \min_\lambda\; \mathbb{E}_{x_T, y}\, \bigl\| F_\theta(x_T, y; m(\lambda)) - F_\theta(x_T, y) \bigr\|^2 + \beta\, R(\lambda) .
# $$ (eq-ecodiff-objective)
#
# The plain alternative compares one step at a time: take a noisy image from the way of the untouched model, and ask that the prediction there stays the same. That is cheaper and easier. But it does not see that an error made early is carried through all later steps, where it
# may grow or die out. This is the paper's argument for {eq}`eq-ecodiff-objective`, and below it is put to the test.
#
# A mask that is really 0 or 1 has no gradient. So each unit gets a real number $\lambda_j$ and a mask from the **hard-concrete** distribution {cite:p}`louizos2018learning`. With $u$ uniform in $(0, 1)$,
#
# $$
# s = \operatorname{sigmoid}\!\left( \frac{\log u - \log (1 - u) + \lambda}{0.83} \right), \qquad m = \min\bigl(1, \max(0,\; 1.2\, s - 0.1)\bigr) .
# $$ (eq-ecodiff-mask)
#
# The stretching to $(-0.1, 1.1)$ and the clipping make $m$ exactly 0 or exactly 1 with positive probability; in between it has a gradient. {numref}`fig-ecodiff-mask` shows it. The penalty $R$ pulls every $\lambda_j$ down alike, more gently where it is low already. So a unit
# that matters stays up, because the first term holds it there, and the rest sinks. What counts in the end is the **order** of the $\lambda_j$. The lowest are cut, as many as one wants to save.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: the mask against lambda. The median climbs from exactly 0 below lambda of about minus 2 to exactly 1 above 2, a band of likely values around it is wide. Right: the probabilities that the mask is exactly 0, between, and exactly 1 as stacked areas; at lambda 3 nearly three quarters are exactly 1."}, "figure": {"caption": "The hard-concrete mask. Left: its median and the range of 80 % of the draws. Right: how often it is exactly 0, exactly 1, or between, where alone it has a gradient. Learning starts at $\\lambda = 3$.", "name": "fig-ecodiff-mask"}}
grid = torch.linspace(-6, 6, 241)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
low, middle, high = (hard_concrete(grid, torch.full_like(grid, u)) for u in (0.1, 0.5, 0.9))
left.fill_between(grid, low, high, color=PALETTE[0], alpha=0.2, lw=0)
left.plot(grid, middle, color=PALETTE[0])
left.set(xlabel=r"$\lambda$", ylabel="mask $m$")
zero, one = 1 - alive_probability(grid), alive_probability(grid, low=-1.1, high=0.1)
right.stackplot(grid, zero, 1 - zero - one, one, colors=[PALETTE[6], PALETTE[5], PALETTE[0]], alpha=0.85)
for at, text in ((-4.2, "$m = 0$"), (0, "between"), (4.2, "$m = 1$")):
    right.text(at, 0.45, text, ha="center")
for ax in (left, right):
    ax.axvline(3, color="k", lw=1, ls=":")
right.set(xlabel=r"$\lambda$", ylabel="probability", ylim=(0, 1))
plt.show()

# %% [markdown]
# ### Through all steps in the memory of one
#
# The gradient of {eq}`eq-ecodiff-objective` goes back through $T$ steps. Every step keeps its activations until the gradient comes by: memory grows with $T$. **Time-step gradient checkpointing** keeps only the noisy images between the steps.
#
# 1. Run all steps without a graph. Keep $x_T, x_{T-1}, \dots, x_1$.
# 2. Compare the last image with the target. That gives the gradient with respect to the last image.
# 3. Walk back. Run one step again, from its kept image and with a graph. Hand the gradient through it: to the masks, where it is added up, and to the image before. Forget the graph. Go on with the step before.
#
# The gradient is the same number. Each step runs twice, so a sampler of $T$ steps takes $2T$ calls of the model. The idea is old {cite:p}`chen2016training`; what is neat here is where the cut is made. Between two steps a sampler's whole state is one image, a few thousand numbers,
# where a single step's activations are many millions.
#
# (sec-ecodiff-method)=
# ## The method
#
# The library lists the units. It reads the matrices, so it knows how many values go with each.

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("dit_digits_p2").requires_grad_(False).eval().to(run.device)
sites = find_sites(model)
for kind in ("head", "neuron"):
    of_kind = [site for site in sites.values() if site.kind == kind]
    units, each = sum(site.units for site in of_kind), of_kind[0].parameters
    print(f"{units:5,} {kind}s in {len(of_kind)} layers, {each:5,} parameters each")
print(f"{maskable_parameters(sites):,} of {count_parameters(model):,} parameters belong to units")

# %% [markdown]
# The sampler is DDIM {cite:p}`song2021denoising`, written as a function that takes one step. It starts at a log signal-to-noise ratio $\log(\alpha_t / \sigma_t)$ of $-3$, near where Stable Diffusion's schedule ends; nearer to pure noise a small error of the prediction
# becomes a large error of the image.


# %%
def ddim(net, y, steps, watch=None):
    """``step(i, x)`` takes the i-th of ``steps`` steps. ``watch`` collects state, time, predicted noise, and how far that pushes."""
    grid = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-3.0, solver_order=1
    )
    grid.set_timesteps(steps)
    times = grid.timesteps.tolist()
    signal = grid.alphas_cumprod_f64[times]
    alpha, sigma = [*signal.sqrt().tolist(), 1.0], [*(1 - signal).sqrt().tolist(), 0.0]

    def step(i, x):
        t = torch.full((len(x),), times[i], device=x.device)
        noise = net(x, t, y)[:, :1]  # the second channel is a variance, which DDIM does not use
        if watch is not None:
            push = alpha[i + 1] / alpha[i] * sigma[i] - sigma[i + 1]  # the next state is a x - push * noise
            watch.append((x, t, noise, torch.full_like(noise[:, :, :1, :1], push)))
        x0 = (x - sigma[i] * noise) / alpha[i]
        return alpha[i + 1] * x0 + sigma[i + 1] * noise

    return step


def draw(n, generator):
    """Labels and noise."""
    y = torch.randint(10, (n,), generator=generator)
    return y.to(run.device), initial_noise((n, 1, 8, 8), generator, device=run.device)


@torch.no_grad()
def images(net, y, noise, steps, watch=None):
    return run_steps(ddim(net, y, steps, watch), noise, steps)


# %% [markdown]
# Now the walk. It is short enough to write out. `torch.autograd.grad(out, inputs, g)` is the product of `g` with the derivatives of `out`.


# %%
def walk_back(step, x, steps, masks, loss):
    """The gradient of ``loss(last image)`` with respect to ``masks``, with one step's graph at a time."""
    kept = [x]
    with torch.no_grad():
        for i in range(steps):
            kept.append(step(i, kept[-1]))
    last = kept.pop().requires_grad_()
    (g,) = torch.autograd.grad(loss(last), last)
    total = [torch.zeros_like(mask) for mask in masks]
    for i in reversed(range(steps)):
        start = kept[i].detach().requires_grad_()
        *parts, g = torch.autograd.grad(step(i, start), [*masks, start], g)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return total


# %% [markdown]
# `minilib.step_checkpoint.checkpointed_steps` is the same walk as a differentiable function, so that any loss can follow it and `backward()` does the rest. It also compares the second run of each step with the first. That matters: the masks hold random numbers $u$, and they must be the
# *same* numbers in both runs. We draw them once for each update.
#
# Four things must hold. The gradients must agree, in double precision, with back-propagation through the whole loop. Memory must grow by one image a step, to the byte. The model must be called $2T$ times. And masks of one must change no bit.


# %%
def frozen_masks(net, seed=0, init=1.0):
    """Masks between 0 and 1, their noise drawn once."""
    masks = HardConcreteMasks(find_sites(net), init=init).to(next(net.parameters()))
    masks.draw(torch.Generator().manual_seed(seed))
    return {name: m.detach().requires_grad_() for name, m in masks().items()}


def three_ways(net, y, noise, steps):
    """Gradients by the whole loop, by the walk above and by the library; with the calls of the model that each took."""
    target = images(net, y, noise, steps)
    masks = frozen_masks(net)
    leaves, step = list(masks.values()), ddim(net, y, steps)

    def loss(x):
        return F.mse_loss(x, target)

    ways = {
        "loop": lambda: torch.autograd.grad(loss(run_steps(step, noise, steps)), leaves),
        "walk": lambda: walk_back(step, noise, steps, leaves, loss),
        "library": lambda: torch.autograd.grad(loss(checkpointed_steps(step, noise, steps, leaves)), leaves),
    }
    found, calls = {}, {}
    with masked(net, masks):
        for name, way in ways.items():
            with count_calls(net) as count:
                found[name] = [g.flatten() for g in way()]
            calls[name] = count.calls
    return found, calls


precise = deepcopy(model).double()
y, noise = draw(4, torch.Generator().manual_seed(7))
gradients, calls = three_ways(precise, y, noise.double(), s.steps)
apart = {
    name: max(
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(gradients["loop"], found, strict=True)
    )
    for name, found in gradients.items()
}
run.record("gradient", max(apart.values()))
run.record(
    "calls",
    abs(calls["loop"] - s.steps) + abs(calls["walk"] - 2 * s.steps) + abs(calls["library"] - 2 * s.steps),
)

y, noise = draw(20, torch.Generator().manual_seed(8))
plain = images(model, y, noise, s.steps)
learned = HardConcreteMasks(sites, init=float("inf")).to(run.device)
learned.draw(torch.Generator().manual_seed(0))
with masked(model, learned()):
    run.record("ones", float((images(model, y, noise, s.steps) - plain).abs().max()))
for name, value in apart.items():
    print(f"{name:8} {calls[name]:3} calls, largest relative difference of a gradient {value:.1e}")


# %% [markdown]
# ### Memory, measured
#
# PyTorch can be asked, for each tensor that a graph keeps, to hand it over for keeping. So we can count bytes, as they come and go, exactly and on any machine.


# %%
def peak_bytes(way, steps, n=4):
    """The most that is kept for the backward pass at any time, weights not counted; and the bytes of one state."""
    y, noise = draw(n, torch.Generator().manual_seed(9))
    masks = frozen_masks(model)
    step, leaves = ddim(model, y, steps), list(masks.values())
    weights = [*model.parameters(), *model.buffers()]
    with masked(model, masks), watch_saved_bytes(exclude=weights) as saved:
        last = way(step, noise, steps, leaves)
        torch.autograd.grad(last.square().mean(), leaves)
    return saved.peak, noise.numel() * noise.element_size()


WAYS = {"whole loop": lambda step, x, n, leaves: run_steps(step, x, n), "checkpointed": checkpointed_steps}
peaks = {name: [peak_bytes(way, n)[0] for n in s.memory_steps] for name, way in WAYS.items()}
state = peak_bytes(checkpointed_steps, 1)[1]
span = s.memory_steps[-1] - s.memory_steps[0]
slope = {name: (found[-1] - found[0]) / span for name, found in peaks.items()}
run.record("memory", slope["checkpointed"] / slope["whole loop"])
run.record("memory-states", abs(slope["checkpointed"] - state))
for name, found in peaks.items():
    print(
        f"{name:12} {found[0] / 2**20:7.2f} MiB for {s.memory_steps[0]} steps, {slope[name] / 2**10:9.2f} KiB more for each further one"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: memory against the number of sampling steps. The whole loop is a straight line that climbs steadily; the checkpointed walk is flat, below all of its points. Right: the gradients of the two against each other, one point a unit, all exactly on the diagonal."}, "figure": {"caption": "Memory against steps: a straight line up, or flat. Left: the most that is kept for the backward pass, four images, counted. Right: and yet it is the same gradient; one dot is one head or neuron, with respect to its mask, in double precision. The axes are linear near zero and logarithmic beyond.", "name": "fig-ecodiff-memory"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained")
for (name, found), colour, marker in zip(peaks.items(), (PALETTE[1], PALETTE[0]), "so", strict=True):
    left.plot(s.memory_steps, [v / 2**20 for v in found], color=colour, marker=marker, ms=4.5, lw=2)
    left.annotate(
        name,
        (s.memory_steps[-1], found[-1] / 2**20),
        xytext=(-6, -4 if name == "whole loop" else 7),
        textcoords="offset points",
        ha="right",
        color=colour,
        fontweight="bold",
    )
left.set(
    xlabel="sampling steps $T$", ylabel="kept for the backward pass (MiB)", xlim=(0, None), ylim=(0, None)
)
for kind, colour in (("neuron", PALETTE[5]), ("head", PALETTE[3])):
    pick = [i for i, site in enumerate(sites.values()) if site.kind == kind]
    pair = [torch.cat([gradients[way][i] for i in pick]).cpu() for way in ("loop", "library")]
    right.plot(
        *pair, "o", ms=2.5 if kind == "neuron" else 5, color=colour, alpha=0.7, label=f"{kind}s", mew=0
    )
smallest = float(torch.cat(gradients["loop"]).abs().quantile(0.6))
right.set_xscale("symlog", linthresh=smallest)
right.set_yscale("symlog", linthresh=smallest)
right.set(xlabel="gradient, whole loop", ylabel="gradient, checkpointed", xticks=[0], yticks=[0])
right.axline((0, 0), (1, 1), color="k", lw=0.8, zorder=0)
right.legend(loc="upper left")
plt.show()

# %% [markdown]
# ### From masks to a smaller model
#
# A mask of zeros saves nothing by itself: the products are still computed. So the chosen units are really taken out. The query, key and value of a head lie in one fused matrix in this model, and in three in Stable Diffusion, whose feed-forward networks moreover are gated. Three checks: the smaller
# model must compute what the masked one does, also where a layer loses all it has; and its number of parameters must be what arithmetic says. The second model here is a text-to-image U-Net, for its gates.

# %%
scenes = zoo.load("unet_shapes16").denoiser.requires_grad_(False).eval()
g = torch.Generator().manual_seed(5)
text = torch.randn(2, 6, scenes.cross_attention_dim, generator=g)
checks = {
    "transformer": (
        model,
        (torch.randn(2, 1, 8, 8, generator=g), torch.tensor([80, 700]), torch.tensor([3, 8])),
    ),
    "u-net": (scenes, (torch.randn(2, 3, 16, 16, generator=g), torch.tensor([80, 700]), text)),
}


def in_double(net, args):
    return deepcopy(net).cpu().double(), [a.double() if a.is_floating_point() else a for a in args]


worst, miscounted = 0.0, 0
for net, args in checks.values():
    net, args = in_double(net, args)
    places = find_sites(net)
    for kept in (0.8, 0.4):
        masks = keep_top({k: torch.rand(v.units, generator=g) for k, v in places.items()}, kept, places)
        masks[list(places)[1]] = torch.zeros_like(masks[list(places)[1]])  # a layer that loses everything
        small = shrink_model(net, masks)
        with torch.no_grad(), masked(net, masks):
            worst = max(worst, float((net(*args) - small(*args)).abs().max()))
        miscounted += abs(count_parameters(small) - shrunk_parameters(net, masks))
run.record("shrunk", worst)

# %% [markdown]
# ### What it costs, and what it saves, at real size
#
# How much is there to prune? Only shapes are needed to answer that. We build four published denoisers on torch's `meta` device, which holds no values. One of them is the U-Net of Stable Diffusion XL, the paper's main subject; its parameters come to the published number.

# %%
# NBVAL_CHECK_OUTPUT
with torch.device("meta"):
    sdxl, sd15 = (UNet(**UNET_CONFIGS[name]) for name in ("SDXL", "SD 1.5"))
    t = torch.zeros(1)
    real = {
        "SDXL": (
            sdxl,
            (torch.zeros(1, 4, 128, 128), t, torch.zeros(1, 77, 2048), None, torch.zeros(1, 2816)),
        ),
        "SD 1.5": (sd15, (torch.zeros(1, 4, 64, 64), t, torch.zeros(1, 77, 768))),
        "DiT-XL/2": (DiT(**DIT_CONFIGS["DiT-XL/2"]), (torch.zeros(1, 4, 32, 32), t, t.long())),
        "SD3-medium": (
            MMDiT.from_diffusers_config(SD3_CONFIGS["SD3-medium"]),
            (torch.zeros(1, 16, 128, 128), t, torch.zeros(1, 154, 4096), None, torch.zeros(1, 2048)),
        ),
    }


def fused(name, layer):
    """The fused attention, of which the meta device else keeps the whole matrix of weights."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return lambda q, k, v, *, mask=None: op(q, k, v)[0]


def step_bytes(net, args):
    """What one step keeps for the gradient with respect to masks and image."""
    masks = {name: m.requires_grad_() for name, m in ones(find_sites(net), device="meta").items()}
    image = args[0].clone().requires_grad_()
    with attention_processor(net, fused), masked(net, masks):
        with watch_saved_bytes(exclude=[*net.parameters(), *net.buffers()]) as saved:
            result = net(image, *args[1:])
    return saved.peak if result is not None else 0


needed, memory = {}, {}
print(
    "                  parameters   in units   units to cut for 20 %   FLOPs then   50 steps: whole loop   checkpointed"
)
for name, (net, args) in real.items():
    net.requires_grad_(False)
    places, total = find_sites(net), count_parameters(net)
    share = maskable_parameters(places) / total
    needed[name] = 0.2 / share
    masks = keep_top(
        {k: torch.arange(v.units).flip(0).float() for k, v in places.items()},
        1 - needed[name],
        places,
        scope="layer",
    )
    small = shrink_model(net, masks)
    miscounted += abs(count_parameters(small) - shrunk_parameters(net, masks))
    flops = count_flops(small, *args).flops / count_flops(net, *args).flops
    one, image = step_bytes(net, args), args[0].numel() * 4
    memory[name] = 50 * one / (one + 51 * image)
    print(
        f"{name:12} {total:15,} {share:10.1%} {needed[name]:23.1%} {flops:12.1%} {50 * one / 1e9:19.0f} GB"
        f" {(one + 51 * image) / 1e9:11.1f} GB"
    )
run.record("parameters", miscounted)
run.record("sdxl-count", abs(count_parameters(sdxl) - 2_567_463_684))
run.record("sdxl-units", needed["SDXL"])
run.record("sd15-units", needed["SD 1.5"])
run.record("sdxl-memory", memory["SDXL"])

# %% [markdown]
# Three things are worth a look.
#
# *Where the parameters are.* SDXL has most of its parameters in transformer blocks, and twenty per cent of them can be had by cutting not many more than twenty per cent of its units. In Stable Diffusion 1.5 most parameters sit in convolutions, which have no units in this sense; the
# same saving would take most of its heads and neurons. In the transformers the modulation layers take a third. So "20 % of the parameters" is a different demand for each architecture.
#
# *What it buys.* The column of operations says what is left of a call. A shorter sampler saves as many with less trouble. What fewer steps never save is the memory of the weights.
#
# *What the gradient costs.* The numbers are for one image at single precision, without guidance; with guidance each step runs on two, and memory doubles. That puts the whole loop for SDXL at over a terabyte. The paper's own figures, as a
# secondary source reports them, are some 1400 GB without checkpointing and less than 30 GB with it; the weights, here not counted, are among those.
#
# :::{admonition} In the released code
# :class: tip
# As we read it, not run. In [`scripts/train.py`](https://github.com/YaNgZhAnG-V5/EcoDiff/blob/main/scripts/train.py) the walk back calls the masked model again, and [`hard_concrete_distribution`](https://github.com/YaNgZhAnG-V5/EcoDiff/blob/main/src/sdib/utils/utils.py) draws $u$ inside each call. So every layer,
# every step and every second run has its own masks, and the gradient belongs to other masks than the image did. Exercise 1 measures what that does. The optimiser's step is taken where `idx * batch_size` is a multiple of 4, so also after the very first image. The noise that enters the logarithms is bounded by
# an added constant, 0.5 in the configuration of SDXL and 0.1 in that of FLUX: the draws are much tamer than {eq}`eq-ecodiff-mask` suggests. The penalty is $|\lambda|$ itself for SDXL, and $\operatorname{sigmoid}(0.4 \lambda + 1)$ for FLUX, which is the one we use. That of the norm layers is computed and logged, but added after the
# total is formed. A layer that loses all its heads becomes a module that returns its input; inside a residual branch that adds the normalised input once more, while the mask of zeros adds the output layer's bias.
# :::
#
# (sec-ecodiff-experiment)=
# ## The experiment
#
# :::{table} Who chooses the units. All remove as many heads and as many neurons as each other.
# :name: tab-ecodiff-arms
#
# | arm | score of a unit | needs |
# |---|---|---|
# | end to end | $\lambda$, learned through the whole sampler: the method | gradients through $T$ steps |
# | per step | $\lambda$, learned by matching the predicted noise on the untouched way: the ablation | gradients through 1 step |
# | next state | the same, but matching the next noisy image: each step's error weighs what it does to the image | gradients through 1 step |
# | one shot | squared derivative of the final image by the mask, at $m = 1$; nothing is learned | a few gradients through $T$ steps |
# | contribution | activation times the norm of the weights that read it {cite:p}`sun2024simple` | a few forward passes |
# | activations | mean of $\lvert h_j \rvert$ | a few forward passes |
# | weights | norm of all the unit's weights | nothing |
# | random | drawn | nothing |
#
# :::
#
# The last four are the trivial rivals. Each but the last may rank over the whole model, or within each layer; whichever is better counts, seed by seed and after the fact, which favours them. One shot is the strongest form of the question whether *learning* is needed, or only the gradient.
#
# The learned arms share everything else: the same masks, noise and labels, update by update, and the same number of updates. The penalty's weight $\beta$ was chosen for each by pilot runs on other seeds, among values a factor of three apart. The arms that look at one step see all $T$ states that the untouched model passes through, so all see the same
# images. They cost less: three passes a step instead of four, and no second run.
#
# Next state is there because two things change from end to end to per step: errors no longer travel from one step to the next, *and* each step's error counts alike. Near pure noise the same error of the predicted noise moves the image much further than near the end. Next state still looks at one step at a time, but weighs each as the sampler does.
#
# Fewer steps is the other trivial rival. It keeps the whole model and takes as many steps as the operations of the pruned sampler allow, rounded up.
#
# We judge the final image: its mean squared error (MSE) to that of the untouched model from the same noise, and the Fréchet distance (FD) of an independent network's features to real digits.


# %%
BETA = {"end to end": 1.0, "per step": 0.3, "next state": 1.0}
REMOVED = (0.1, 0.2, 0.3, 0.4)  # of the heads, and of the neurons


def learn(objective, seed):
    """The learned scores."""
    g = torch.Generator().manual_seed(seed)
    masks = HardConcreteMasks(sites, init=3.0).to(run.device)
    optimiser = torch.optim.Adam(masks.parameters(), lr=0.15)
    for _ in range(s.updates):
        (y, noise), seen = draw(s.noises, g), []
        target = images(model, y, noise, s.steps, seen)
        masks.draw(g)  # once an update: both runs of every step see these
        m = masks()
        with masked(model, m):  # backward() runs the steps again, so it belongs inside
            if objective == "end to end":
                last = checkpointed_steps(ddim(model, y, s.steps), noise, s.steps, list(m.values()))
                loss = F.mse_loss(last, target)
            else:
                x, t, wanted, push = (torch.cat(parts) for parts in zip(*seen, strict=True))
                predicted = model(x, t, y.repeat(s.steps))[:, :1]
                if objective == "next state":  # summed over the steps
                    loss = s.steps * F.mse_loss(push * predicted, push * wanted)
                else:
                    loss = F.mse_loss(predicted, wanted)
            optimiser.zero_grad()
            (loss + BETA[objective] * masks.penalty()).backward()
        optimiser.step()
    return {name: score.cpu() for name, score in masks.scores().items()}


def one_shot(seed):
    """Squared derivatives of the final image by each mask: along random directions, whose mean is the sum over all pixels."""
    g = torch.Generator().manual_seed(seed)
    scores = {name: torch.zeros(site.units) for name, site in sites.items()}
    for _ in range(s.probes):
        y, noise = draw(s.noises, g)
        m = {name: mask.requires_grad_() for name, mask in ones(sites, device=run.device).items()}
        with masked(model, m):
            last = checkpointed_steps(ddim(model, y, s.steps), noise, s.steps, list(m.values()))
            direction = initial_noise(last.shape, g, device=run.device)
            found = torch.autograd.grad((last * direction).sum(), list(m.values()))
        for name, grad in zip(scores, found, strict=True):
            scores[name] += grad.square().cpu() / s.probes
    return scores


def rivals(seed):
    """Scores without learning: (rule, scope) -> scores."""
    g = torch.Generator().manual_seed(seed)
    y, noise = draw(s.noises, g)
    rules = {
        "one shot": one_shot(seed),
        "contribution": contribution(model, lambda: images(model, y, noise, s.steps)),
        "activations": activation_magnitude(model, lambda: images(model, y, noise, s.steps)),
        "weights": weight_magnitude(model),
    }
    found = {(rule, scope): scores for rule, scores in rules.items() for scope in ("kind", "layer")}
    return found | {("random", "kind"): {k: torch.rand(v.units, generator=g) for k, v in sites.items()}}


# %% [markdown]
# Judging uses other labels and noise than learning did, and the really smaller models.


# %%
def flops_of(net):
    return count_flops(net, torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)).flops


def judge(learned, seed):
    """Everything that is measured of one seed: (rule, scope, share removed) -> numbers; also the images."""
    y = (torch.arange(s.images) % 10).to(run.device)
    noise = initial_noise(
        (s.images, 1, 8, 8), torch.Generator().manual_seed(10_000 + seed), device=run.device
    )
    seen = []
    target, exact = images(model, y, noise, s.steps, seen), images(model, y, noise, s.exact_steps)
    others = {n: images(model, y, noise, n) for n in s.other_steps}
    real_digits = features(oracle, load("digits", "train").x.to(run.device))
    few = slice(s.watched)

    def quality(x):
        seen_by = features(oracle, x.clamp(-1, 1))
        return {
            "error": float(F.mse_loss(x, target)),
            "to exact": float(F.mse_loss(x, exact)),
            "accuracy": class_accuracy(oracle, x.clamp(-1, 1), y),
            "FD": frechet_distance(seen_by, real_digits),
        }

    results, pictures = {"none": quality(target)}, {("none", 0.0): target[:10].cpu()}
    arms = {(rule, "kind"): scores[seed] for rule, scores in learned.items()} | rivals(seed)
    for (rule, scope), scores in arms.items():
        for removed in REMOVED:
            masks = keep_top(scores, 1 - removed, sites, scope=scope)
            small, way = shrink_model(model, masks), []
            x = images(small, y, noise, s.steps, way)
            with torch.no_grad():
                single = [F.mse_loss(small(x[few], t[few], y[few])[:, :1], e[few]) for x, t, e, _ in seen]
            growth = [float(F.mse_loss(a[0], b[0])) for a, b in zip(way, seen, strict=True)][1:]
            results[rule, scope, removed] = quality(x) | {
                "single step": float(torch.stack(single).mean()),
                "growth": [*growth, float(F.mse_loss(x, target))],
                "kept": {name: float(mask.float().mean()) for name, mask in masks.items()},
            }
            pictures[rule, scope, removed] = x[:10].cpu()
            if removed == 0.2 and rule != "random":
                for n, whole in others.items():
                    results[rule, scope, n, "steps"] = float(F.mse_loss(images(small, y, noise, n), whole))
    for removed in REMOVED:
        budget = s.steps * flops_of(shrink_model(model, keep_top(arms["random", "kind"], 1 - removed, sites)))
        fewer = equal_cost_steps(budget, flops_of(model))
        results["fewer steps", removed] = quality(images(model, y, noise, fewer)) | {
            "steps": fewer,
            "budget": budget,
        }
    return results, pictures


oracle = zoo.load("oracle_digits").to(run.device)
runs = run_arms(learn, {name: name for name in BETA}, s.seeds, n_jobs=s.jobs)
scores = {name: dict(zip(s.seeds, found, strict=True)) for name, found in runs.items()}
judged = run_arms(judge, {"all": scores}, s.seeds, n_jobs=s.jobs)["all"]
results, pictures = [r for r, _ in judged], judged[0][1]

# %% [markdown]
# How long does a smaller model take? We time it against the whole one, in turns.


# %%
def timed(seed):
    masks = keep_top(
        {k: torch.rand(v.units, generator=torch.Generator().manual_seed(seed)) for k, v in sites.items()},
        0.7,
        sites,
    )
    small = shrink_model(model, masks)
    y, noise = draw(s.batch, torch.Generator().manual_seed(seed))
    times = [
        [cpu_time(lambda net=net: images(net, y, noise, 1), repeats=3) for net in (model, small)]
        for _ in range(2)
    ]
    return min(a for a, _ in times) / min(b for _, b in times)


speed = [timed(seed) for seed in range(3)]

# %% [markdown]
# (sec-ecodiff-results)=
# ## Results
#
# First the pictures. Each column starts from the same noise.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Grid of generated digits, one column a class from 0 to 9. The first row is the untouched model. Three groups of four rows follow, with 10, 20, 30 and 40 percent of the units removed: end to end stays near the first row throughout, weights and random turn pale and blurred from 20 percent on, and lose details of shape."}, "figure": {"caption": "Samples, not chosen: the first ten of the first seed. From top to bottom the untouched model, then each rule with more and more of the heads and of the neurons removed. \"Weights\" is shown with its better scope.", "name": "fig-ecodiff-samples"}}


def mean_of(key, field="error"):
    return sum(r[key][field] for r in results) / len(results)


best_scope = {
    rule: min(("kind", "layer"), key=lambda scope: mean_of((rule, scope, 0.2)))
    for rule in ("one shot", "contribution", "activations", "weights")
} | dict.fromkeys((*BETA, "random"), "kind")
rows, labels = [pictures["none", 0.0]], ["untouched"]
for rule in ("end to end", "weights", "random"):
    for removed in REMOVED:
        rows.append(pictures[rule, best_scope[rule], removed])
        labels.append(f"{rule}  {removed:.0%}")
fig, ax = plt.subplots(figsize=(5.6, 6.9))
show_images(torch.cat(rows), 10, ax=ax, row_labels=labels, column_labels=[str(i) for i in range(10)])
plt.tight_layout()
plt.show()

# %% [markdown]
# {numref}`fig-ecodiff-error` puts numbers to it, and adds the other rivals.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: error of the final image against the share of units removed, on a logarithmic scale. End to end and per step are lowest and coincide up to 20 percent; beyond, end to end is lower. Next state lies clearly above both, and above one shot at 10 percent. Contribution and activations follow, weights and random are highest. Diamonds of a sampler with fewer steps, at 20 percent and more, lie far below all curves. Right: error of a step's prediction against error of the final image; points of each rule are joined."}, "figure": {"caption": "What the choice of units is worth. Left: error of the final image to that of the untouched model, each rule with the scope that is better at 20 % removed; bands are 90 % intervals over seeds. Diamonds: the whole model with fewer steps and no fewer operations; at 10 % rounding up gives all the steps back, so there is none. Right: the same points, against the error of single predictions on the untouched way. From left to right along a line, 10 to 40 % are removed.", "name": "fig-ecodiff-error"}}
COLOURS = {
    "end to end": PALETTE[0],
    "per step": PALETTE[5],
    "next state": "#000000",
    "one shot": PALETTE[2],
    "contribution": PALETTE[4],
    "activations": PALETTE[3],
    "weights": PALETTE[1],
    "random": PALETTE[6],
}


def over_seeds(rule, field):
    """Mean and interval at each share removed."""
    scope = best_scope[rule]
    return mean_interval(torch.tensor([[r[rule, scope, q][field] for q in REMOVED] for r in results]))


fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.9), layout="constrained", sharey=True)
for rule, colour in COLOURS.items():
    style = "-" if rule in BETA else "--"
    mean, low, high = over_seeds(rule, "error")
    left.plot(REMOVED, mean, style, marker="o", ms=4, color=colour, label=rule)
    left.fill_between(REMOVED, low.clamp(min=1e-5), high, color=colour, alpha=0.15, lw=0)
    right.plot(over_seeds(rule, "single step")[0], mean, style, marker="o", ms=4, color=colour)
fewer = torch.tensor([[r["fewer steps", q]["error"] for q in REMOVED] for r in results]).mean(0)
shown = [i for i, v in enumerate(fewer.tolist()) if v > 0]
left.plot(
    [REMOVED[i] for i in shown], [float(fewer[i]) for i in shown], "kD", ms=6, mfc="w", label="fewer steps"
)
left.set(
    xlabel="share of heads and neurons removed",
    ylabel="error of the final image (MSE)",
    yscale="log",
    xticks=REMOVED,
    xticklabels=[f"{q:.0%}" for q in REMOVED],
)
right.set(xlabel="error of one prediction (MSE)", xscale="log")
fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# Where does a model have room? {numref}`fig-ecodiff-kept` shows which share of each layer is left. The learned rules and the activations agree on where heads can go: late in the network. The norm of the weights points to the other end.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two heat maps, for heads and for neurons: rows are the rules end to end, per step, activations and weights, columns the eight blocks. The two learned rules and activations keep nearly all heads of the early blocks and few of the last three; they take most neurons around block five. Weights does the reverse: it takes from the early blocks."}, "figure": {"caption": "Share of each layer that is left when 30 % of all heads, and of all neurons, are removed. Ranked over the whole model; mean over seeds.", "name": "fig-ecodiff-kept"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 2.3), layout="constrained", sharey=True)
shown = ("end to end", "per step", "activations", "weights")
for ax, kind in zip(axes, ("head", "neuron"), strict=True):
    names = [name for name, site in sites.items() if site.kind == kind]
    table = torch.tensor(
        [
            [sum(r[rule, "kind", 0.3]["kept"][n] for r in results) / len(results) for n in names]
            for rule in shown
        ]
    )
    ax.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (i, j), value in [((i, j), float(table[i, j])) for i in range(len(shown)) for j in range(len(names))]:
        ax.text(
            j,
            i,
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            fontsize=9,
            color="w" if value < 0.6 else "k",
        )
    ax.set(title=f"{kind}s kept, %", xlabel="block", xticks=range(len(names)), yticks=range(len(shown)))
    ax.set_yticklabels(shown)
    ax.grid(False)
plt.show()

# %% [markdown]
# And how do errors travel? The argument for learning end to end is that they add up on the way. {numref}`fig-ecodiff-growth` follows them, step by step. Only one curve climbs all the way, that of next state; the others are nearly level, or fall.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Error of the noisy image after each step of the sampler, for the three learned arms, one shot and activations at 30 percent removed. End to end starts low and stays nearly level until the last steps. Next state starts as low but climbs all the way and ends above per step, which starts higher and changes little. One shot and activations start far above and fall, but stay highest."}, "figure": {"caption": "Distance from the untouched model's way after each step, with 30 % removed. Bands are 90 % intervals over seeds.", "name": "fig-ecodiff-growth"}}
fig, ax = plt.subplots(figsize=(5.4, 3))
for rule in (*BETA, "one shot", "activations"):
    growth = torch.tensor([r[rule, best_scope[rule], 0.3]["growth"] for r in results])
    mean, low, high = mean_interval(growth)
    x = range(1, s.steps + 1)
    ax.plot(x, mean, "-" if rule in BETA else "--", marker="o", ms=4, color=COLOURS[rule], label=rule)
    ax.fill_between(x, low.clamp(min=1e-6), high, color=COLOURS[rule], alpha=0.15, lw=0)
ax.set(xlabel="steps taken", ylabel="error of the state (MSE)", yscale="log", xticks=range(1, s.steps + 1))
ax.legend()
plt.show()

# %% tags=["hide-input"]
TRIVIAL = [
    (rule, scope) for rule in ("contribution", "activations", "weights") for scope in ("kind", "layer")
]
TRIVIAL.append(("random", "kind"))
METHOD = ("end to end", "kind")


def per_seed(measure):
    return [measure(r) for r in results]


def best_trivial(r, removed, field="error"):
    return min(r[*arm, removed][field] for arm in TRIVIAL)


def against(rule, scope, removed, field="error"):
    return per_seed(lambda r: r[*METHOD, removed][field] / r[rule, scope, removed][field])


for removed in (0.2, 0.3):
    percent = round(100 * removed)
    run.record(
        f"learned-{percent}", per_seed(lambda r, q=removed: r[*METHOD, q]["error"] / best_trivial(r, q))
    )
    run.record(f"end-to-end-{percent}", against("per step", "kind", removed))
run.record("end-to-end-40", against("per step", "kind", 0.4))
run.record("next-state", against("next state", "kind", 0.3))
run.record(
    "one-shot",
    per_seed(
        lambda r: r[*METHOD, 0.2]["error"] / min(r["one shot", k, 0.2]["error"] for k in ("kind", "layer"))
    ),
)
run.record(
    "single-step",
    per_seed(lambda r: r["per step", "kind", 0.3]["single step"] / r[*METHOD, 0.3]["single step"]),
)
run.record(
    "distance",
    per_seed(lambda r: sum(r[*METHOD, q]["FD"] - best_trivial(r, q, "FD") for q in (0.2, 0.3)) / 2),
)
run.record("legible", per_seed(lambda r: r[*METHOD, 0.2]["accuracy"] - r["none"]["accuracy"]))
for n, name in zip(s.other_steps, ("few", "many"), strict=True):
    run.record(
        f"{name}-steps",
        per_seed(lambda r, n=n: r[*METHOD, n, "steps"] / min(r[*arm, n, "steps"] for arm in TRIVIAL[:-1])),
    )
run.record("fewer-steps", per_seed(lambda r: r[*METHOD, 0.3]["to exact"] / r["fewer steps", 0.3]["to exact"]))
run.record("speed", speed)

# %% [markdown]
# The table below gives the means, each rule with the same scope as in {numref}`fig-ecodiff-error`: error to the untouched sampler, error to the near-exact solution, share of digits read right, and Fréchet distance. Last comes how often a step was taken, and what all steps cost.

# %% tags=["hide-input"]
budget = {q: results[0]["fewer steps", q]["budget"] / (s.steps * flops_of(model)) for q in REMOVED}
lines = [
    "| rule | removed | error | to exact | read right | FD | steps | operations |",
    "|---|---|---|---|---|---|---|---|",
    f"| untouched | 0 % | 0 | {mean_of('none', 'to exact'):.5f} | {mean_of('none', 'accuracy'):.1%} | {mean_of('none', 'FD'):.3f} | {s.steps} | 100 % |",
]
for removed in (0.2, 0.3):
    for rule in COLOURS:
        key = (rule, best_scope[rule], removed)
        lines.append(
            f"| {rule} | {removed:.0%} | {mean_of(key):.5f} | {mean_of(key, 'to exact'):.5f} | {mean_of(key, 'accuracy'):.1%} "
            f"| {mean_of(key, 'FD'):.3f} | {s.steps} | {budget[removed]:.0%} |"
        )
    key, n = ("fewer steps", removed), results[0]["fewer steps", removed]["steps"]
    lines.append(
        f"| fewer steps | 0 % | {mean_of(key):.5f} | {mean_of(key, 'to exact'):.5f} | {mean_of(key, 'accuracy'):.1%} "
        f"| {mean_of(key, 'FD'):.3f} | {n} | {n / s.steps:.0%} |"
    )
held_out = load("digits", "test").x[: s.images].to(run.device)
floor = frechet_distance(
    features(oracle, held_out), features(oracle, load("digits", "train").x.to(run.device))
)
lines.append(
    f"| held-out real digits | | | | {class_accuracy(oracle, held_out, load('digits', 'test').y[: s.images].to(run.device)):.1%} | {floor:.3f} | | |"
)
display(Markdown("\n".join(lines)))

# %%
run.report()

# %% [markdown]
# ### How to read this
#
# **The checkpointing holds.** It is arithmetic, and all its claims are confirmed: the same gradient, twice the calls, and memory that grows by one image a step. Whoever needs the gradient of a sampler's last image, to prune, to align or to attack, can use it, as long as each step repeats itself exactly.
#
# **Learned masks against rules.** `learned-20`, `learned-30` and `distance` are confirmed: the learned masks stay nearer to the untouched model than the best rule, and their Fréchet distance is lower. The rules see a unit by itself: how large its weights are, how much it says. They cannot see whether another unit says the same, nor what the rest of the network makes of it. A learned mask is tried with the others already reduced. One shot stands between the two: it knows what the final image makes of a unit, but only as long as all others are there. It beats the rules, and learning beats it (`one-shot`, confirmed). The norm of the weights does no better than drawing lots.
#
# `legible` is confirmed too, but it asks little. In the table, rules that blur the digits and ruin the Fréchet distance still have nearly all of them read right. Here a pale, typical digit is easy to read.
#
# **End to end, or step by step?** This is the claim that we held to be doubtful, and the card has it at three shares. `end-to-end-20` is **inconclusive**: with 20 % removed the two are level on average, and the interval reaches to both sides. With 30 and 40 % removed the claim is confirmed. The likely reason: with little removed, there are enough units that neither objective needs, and both find them. The noise of learning may add to it. The end-to-end gradient follows as many ways as there are images, where the others average over as many separate predictions as there are images times steps; that it is the noisier one we expect, but did not measure. More seeds or updates were not tried.
#
# The gain is also narrower than it sounds. It is nearness to the *untouched sampler at the same steps*, which is what end to end learns. Measured to the near-exact solution, the table shows per step ahead with 20 % removed and no clear winner with 30 %. The Fréchet distance is lower for end to end at both.
#
# `single-step`, confirmed, says that each objective gets what it asks for: learned step by step, the error of a single prediction is lower. {numref}`fig-ecodiff-growth` shows what the other one is good for, with 30 % removed. Look at its left end. Matching the predicted noise treats all steps alike, and pays for it at once: in the first steps, near pure noise, a small error of the prediction is a large error of the image. Then look at how the curves go on. An error is partly forgotten on the way, since the network sees the wrong image and corrects it, and partly joined by new ones. So the paper's picture of errors that pile up is not what sets per step back here: its curve starts high and hardly climbs.
#
# Is the gain then a matter of weighing the steps? `next-state` is confirmed: end to end stays well ahead of that arm too. Next state even ends behind per step, at all shares. So this weighting is not enough. A likely reason: weighed by its own step alone, an error in the first step outweighs all others, the mask spends what it has there, and later errors pile up. That fits its curve, which starts as low as that of end to end and climbs. Another weighting between the two might do better; we did not try one.
#
# **Fewer steps.** `fewer-steps` is **contradicted**. With 30 % removed, the whole model with fewer steps is clearly nearer to the near-exact solution, and the diamonds in {numref}`fig-ecodiff-error` are far nearer to its own slower self. Rounding up gives it a few more operations, but does not explain the gap: the next diamond to the right, with one step less, still lies far below the learned curves at 30 %. The mechanism is plain: DDIM's error falls smoothly with the steps, and on these images six or seven are nearly as good as eight; a model that lost a fifth of its units is another function at every step. No arm of the table escapes this, with 20 % removed or with 30 %. So pruning is no good way to save *operations* here, although a call does get faster (`speed`, confirmed). It saves what fewer steps cannot: parameters, and the memory to hold them.
#
# And the two can be combined: by `few-steps` and `many-steps`, both confirmed, the masks keep their lead over the rules when the sampler takes fewer or more steps than in learning.
#
# :::{admonition} What this does not show
# :class: warning
# Three claims are **not tried**: SDXL and FLUX themselves (`real-models`), text-to-image models at small size (`text-models`), and retraining (`retraining`). The rivals are simple rules, not the pruning methods that the paper compares with. A small model that was trained long on few images has little to spare; the largest models may have more. The digits are easy, there is no guidance, and the sampler takes eight steps, not fifty. The error is measured against the untouched model's own image: a pruned model may draw a different digit that is as good, which
# is why the Fréchet distance stands beside it. It rests on a few hundred images and can tell ruin from health, not more. The interval covers the choice of noise and labels; the weights of the model are the same in all seeds. The penalty and learning rate were chosen by few pilot runs. With retraining, the order
# of these rules may change.
# :::
#
# ## Exercises
#
# **1.** The released loop draws the masks' noise anew in every call. What does the library say to that, and how far is the gradient from the right one? Compare with a forward pass that also draws anew in each step, but remembers what it drew.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
y, noise = draw(8, torch.Generator().manual_seed(11))
target, plain_step = images(model, y, noise, s.steps), ddim(model, y, s.steps)
logits = HardConcreteMasks(sites, init=1.0).to(run.device)


def gradient(remember, seed, tolerance=1e-4):
    """Each call of a step draws masks; or only the first call of each step does, and the second finds them again."""
    g, drawn = torch.Generator().manual_seed(seed), {}

    def step(i, x):
        if not (remember and i in drawn):
            logits.draw(g)
            drawn[i] = logits.uniform
        logits.uniform = drawn[i]
        with masked(model, logits()):
            return plain_step(i, x)

    parameters = list(logits.logits)
    last = checkpointed_steps(step, noise, s.steps, parameters, tolerance=tolerance)
    return torch.cat(torch.autograd.grad(F.mse_loss(last, target), parameters))


try:
    gradient(remember=False, seed=0)
except RuntimeError as error:
    print("RuntimeError:", error)
right = [gradient(True, seed) for seed in range(12)]
wrong = [gradient(False, seed, tolerance=None) for seed in range(12)]


def mean_cosine(a, b):
    return sum(F.cosine_similarity(x, y, dim=0).item() for x, y in zip(a, b, strict=True)) / len(a)


print(f"mean cosine of the gradient with redrawn noise and the right one: {mean_cosine(wrong, right):.2f}")
print(
    f"of right gradients for different noise:                           {mean_cosine(right, right[1:] + right[:1]):.2f}"
)
# If the first number is about the second, a redrawn gradient is no more the gradient of this image's error than that of any other
# draw would be: a sample of it, not the thing itself. Averaged over many updates it may still point the right way. But it
# cannot be checked.

# %% [markdown]
# **2.** Is the library's function needed at all? `torch.utils.checkpoint` also trades memory for a second run. Wrap each step in it, and compare the gradients.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
from torch.utils.checkpoint import checkpoint


def torchs_own(step, x, steps, leaves):
    for i in range(steps):
        x = checkpoint(step, i, x, use_reentrant=False)
    return x


y, noise = draw(4, torch.Generator().manual_seed(12))
masks, found = frozen_masks(model), []
for way in (torchs_own, checkpointed_steps):
    with masked(model, masks):
        last = way(ddim(model, y, s.steps), noise, s.steps, list(masks.values()))
        found.append(torch.cat(torch.autograd.grad(last.square().mean(), list(masks.values()))))
print(f"largest relative difference: {float((found[0] - found[1]).abs().max() / found[1].abs().max()):.0e}")
# It does the same. What checkpointed_steps adds are the checks: of repetition, and of tensors that would get no gradient.
# (Its memory and calls cannot be counted as above: it works through the very hooks that count bytes, and stops each second run
# as soon as it has what it needs.)

# %% [markdown]
# **3.** Every kind of unit gets its own budget here: as many heads as neurons go, in per cent. What if heads and neurons are ranked together?
#
# :::{dropdown} Solution 3: in words
# A head holds some forty times as many parameters as a neuron, and it starts from the same $\lambda$ under a penalty that weighs both kinds alike. In one ranking (`scope="model"`), a head then competes with single neurons: whether it falls says little about what it costs. At the same *number* of units removed, the number of parameters
# removed depends on how many heads happen to be among them. A fair joint ranking needs the penalty to count parameters, not units. The released code keeps the two apart as well.
# :::
#
# ## References
#
# The method: {cite:t}`ecodiff`. Hard-concrete masks: {cite:t}`louizos2018learning`. Checkpointing: {cite:t}`chen2016training`. The sampler: {cite:t}`song2021denoising`. The rule from activations and weights: {cite:t}`sun2024simple`. The transformer:
# {cite:t}`peebles2023scalable`. Code read: [YaNgZhAnG-V5/EcoDiff](https://github.com/YaNgZhAnG-V5/EcoDiff) (`scripts/train.py`, `src/sdib/utils/utils.py`, `src/sdib/hooks/`, `configs/`).
