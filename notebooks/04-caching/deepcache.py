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
# # DeepCache: keep the deep half of a U-Net
#
# From one denoising step to the next the deep layers of a U-Net compute almost the same thing. {cite:t}`deepcache` compute them once in $N$ steps, keep the result, and in the steps between run only the outermost layers:
# the sampler gets faster, and nothing is trained.
#
# The cache does what the paper says. But the main comparison of this page goes against it: on this book's small scenes the plainest rival, the same sampler with fewer steps, comes nearer to the full sampler for the same number of operations. What that does and does not mean is said under the results.

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
import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from matplotlib.colors import ListedColormap
from torch.utils.flop_counter import FlopCounterMode

from minilib import zoo
from minilib.arms import run_arms
from minilib.caching import (
    cosine_between_samples,
    cosine_between_steps,
    equal_cost_steps,
    plan_cost,
    power_centred_refreshes,
    uniform_refreshes,
)
from minilib.data import shapes
from minilib.guidance import classifier_free_guidance
from minilib.intervene import at_steps, cached, trace_executions
from minilib.metrics import (
    features,
    frechet_distance,
    frechet_report,
    psnr_to_reference,
    read_in_batches,
    scene_scores,
)
from minilib.models import UNet
from minilib.plotting import PALETTE, image_grid, mean_interval, show_images, use_style
from minilib.profiling import count_parameters, cpu_time, to_meta
from minilib.recipes.scenes import ddim_scheduler
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample, sample_final
from minilib.schedulers import DPMSolverMultistepScheduler


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each has captions and noise of its own
    images: int  # a seed
    steps: int  # of the sampler to be made faster (DDIM)
    solver_steps: int  # of the second sampler (DPM-Solver++)
    exact_steps: int  # of the near-exact solution
    watched: int  # images whose kept features are compared
    real: int  # scenes that the Fréchet distance refers to
    batch: int  # of the timing
    jobs: int  # processes


run = Reproduction(
    "deepcache",
    profile,
    {
        "smoke": Settings((0,), 6, 10, 6, 20, 4, 64, 2, 1),
        "cpu": Settings((0, 1, 2), 36, 50, 20, 100, 8, 1000, 32, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 500, 50, 20, 200, 64, 5000, 256, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is this book's text-to-image U-Net. It draws scenes of one to three coloured shapes from a caption. It is small, but built like Stable Diffusion's, with three resolutions instead of four and nine skip connections instead of twelve; it too reads text by
# cross-attention. It predicts the velocity $v = \alpha_t \epsilon - \sigma_t x_0$ (see {doc}`/conventions`), as Stable Diffusion 2 does; nothing in the method depends on that. Every seed below has its own held-out captions and its own noise. All arms of a seed share them.

# %%
run.show_settings()

# %% [markdown]
# (sec-deepcache-idea)=
# ## The idea
#
# A U-Net has two paths. The *main branch* goes down through ever coarser resolutions, through the middle, and up again. *Skip connections* shorten the way: what the encoder had at some depth is handed straight to the decoder
# at the same depth. So each unit of the decoder reads two things: the main branch, which has been through everything below, and a skip, which has not.
#
# Number the skips from 0, the outermost, to 8, the innermost. Let $F_b(x_t, t)$ be the main branch as it enters the decoder unit that reads skip $b$, for the noisy image $x_t$ at time $t$. It summarises all that is deeper than $b$. The observation of the paper: along a
# sampler's way $F_b$ changes slowly. The method follows at once. Choose a branch $b$ and an interval $N$.
#
# - **Full step**, once in $N$ steps: run the whole network. Keep $F_b$.
# - **Cached step**, all others: run the encoder only as far as skip $b$, on the *current* $x_t$ and $t$. Put the kept $F_b$ in the place of the main branch. Run the decoder units from there on.
#
# What is near the image is always fresh. What is deep is up to $N - 1$ steps old.
#
# Compare that with the plainest way to save work: take fewer steps. DDIM {cite:p}`song2021denoising`, a common deterministic sampler, moves along a straight line, in suitable coordinates, as long as the predicted noise stays the same.
# So to keep the *whole prediction*, the noise $\hat\epsilon$, for $N$ steps is the same as to take steps that are $N$ times as long. (It is checked below.) That is the rival to beat. It too is a cache. It keeps everything; DeepCache refreshes a thin outer layer.
#
# How thin? It depends on where the work is. {numref}`fig-deepcache-work` counts it in multiply-accumulates (MACs): one multiplication and one addition each.

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("unet_shapes32").to(run.device)
unet, n_skips = model.denoiser, model.denoiser.num_skips
captions = shapes.sample_scenes(
    64, torch.Generator().manual_seed(7), objects=(1, 3), split="validation"
)  # for the checks
tokens = shapes.tokens(captions).to(run.device)
print(f"{n_skips} skips; {count_parameters(unet):,} parameters; captions of up to {tokens.shape[1]} tokens")

# %% [markdown]
# (sec-deepcache-method)=
# ## The method
#
# The library's U-Net can stop and start at any skip. `encode(stop=k)` runs its first $k$ encoder units, `decode(start=j)` its decoder units from $j$ on, and decoder unit $j$ reads skip $8 - j$. So both kinds of step are a few
# lines.


# %%
def deep_cache(unet, x, t, text, b, kept=None):
    """One call of the network, full or cached: the prediction, and the main branch as it enters the unit that reads skip b."""
    enter = unet.num_skips - 1 - b  # the decoder unit that reads skip b
    emb = unet.embed(t)  # the time is always the current one
    if kept is None:
        h, skips = unet.encode(x, emb, *text)
        kept = unet.decode(unet.middle(h, emb, *text), skips, emb, *text, stop=enter)
    else:
        _, skips = unet.encode(x, emb, *text, stop=b + 1)
    return unet.decode(kept, skips, emb, *text, start=enter), kept


# %% [markdown]
# Off by one is easy here. What is kept is the *input* of the decoder unit that reads skip $b$, and skip $b$ itself is computed afresh. With $b = 0$ a cached step runs one convolution of the encoder, one residual block of the decoder, and the output layers.
#
# The sampler needs a network that counts its steps. Classifier-free guidance asks it twice a step, with and without the caption; we put both questions into one batch, so that both halves are kept, and refreshed, together.


# %%
def guided(model, tokens, refreshes, b=0, call=deep_cache, scale=3.0, watch=None):
    """What the sampler calls: model(x, t) -> guided prediction. Full calls in the steps `refreshes`, cached ones in the others."""
    null = model.null_tokens(len(tokens), tokens.shape[1])
    with torch.no_grad():
        text = model.encode_text(torch.cat([tokens, null]))[:2]  # once for all steps
    step, kept = itertools.count(), None

    @torch.no_grad()
    def predict(x, t):
        nonlocal kept
        if next(step) in refreshes:
            kept = None
        both, kept = call(model.denoiser, torch.cat([x, x]), torch.cat([t, t]), text, b, kept)
        if watch is not None:
            watch.append(kept)
        wanted, unwanted = both.chunk(2)
        return unwanted + scale * (wanted - unwanted)

    return predict


# %% [markdown]
# ### Is it what we say it is?
#
# Five things must hold here; a sixth, the cost, follows below. With $N = 1$ the sampler must be the plain one, bit for bit. The numbers of full and cached calls must be $\lceil T/N \rceil$ and $T - \lceil T/N \rceil$, $T$ being the number of steps. In a cached call no module deeper than $b$ may
# run. The library has a general cache, which knows nothing of U-Nets: it makes any named modules hand out their old outputs. Told to do so for all modules deeper than $b$, it must give the same images. And to keep the whole prediction must be
# DDIM with fewer steps, up to rounding.

# %%
few, noise = (
    tokens[:2],
    initial_noise((64, 3, *[unet.config["sample_size"]] * 2), torch.Generator().manual_seed(7)),
)
noise = noise.to(run.device)
MODULES = [name for unit in (*unet.down_units, *unet.up_units) for name in unit.names] + ["mid_block"]


def names_run(b):
    """The modules that a cached call of branch b may run."""
    return [
        name for unit in (*unet.down_units[: b + 1], *unet.up_units[n_skips - 1 - b :]) for name in unit.names
    ]


def ddim(predict, steps, x=noise[:2]):
    return sample_final(predict, ddim_scheduler(), x, num_inference_steps=steps)


both_at_once = classifier_free_guidance(model, few, model.null_tokens(2, few.shape[1]), guidance_scale=3.0)
plain = ddim(both_at_once, 5)  # the library's sampler, which knows of no cache
one = [ddim(guided(model, few, range(5), b), 5) for b in range(n_skips)]
run.record("every-step", max(float((x - plain).abs().max()) for x in one))

off = 0
for T, N in itertools.product((7, 12), (1, 2, 3, 5, 10)):
    with trace_executions(unet, ["conv_in", "mid_block"]) as trace:
        ddim(guided(model, few[:1], uniform_refreshes(T, N)), T, noise[:1])
    calls, full = trace.counts["conv_in"].calls, trace.counts["mid_block"].calls
    off += abs(full - ceil(T / N)) + abs(calls - full - (T - ceil(T / N)))
run.record("calls", off)

wrong, apart = 0, 0.0
for b in range(n_skips):
    with trace_executions(unet) as trace:
        ddim(guided(model, few, (0,), b), 2)  # a full call, then a cached one
    twice = {name for name in MODULES if trace.counts[name].calls == 2}
    wrong += len(twice ^ set(names_run(b)))
    ours = ddim(guided(model, few, uniform_refreshes(5, 3), b), 5)
    with cached(unet, [name for name in MODULES if name not in names_run(b)], at_steps((0, 3))):
        apart = max(apart, float((ddim(guided(model, few, range(5)), 5) - ours).abs().max()))
run.record("trace", wrong)
run.record("general-cache", apart)


def keep_all(predict, refreshes):
    """The trivial cache: the network is not called at all between refreshes; the predicted noise stays as it was."""
    step, noise = itertools.count(), None
    levels = ddim_scheduler().alphas_cumprod_f64

    def reuse(x, t):
        nonlocal noise
        level = levels[int(t[0])]
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
        if next(step) in refreshes:
            noise = sigma * x + alpha * predict(x, t)  # this network predicts v = alpha noise - sigma x_0
        return (noise - sigma * x) / alpha  # the same noise, as a v

    return reuse


precise, x = deepcopy(model).double(), noise[:2].double()
reused = ddim(keep_all(guided(precise, few, range(5)), uniform_refreshes(10, 2)), 10, x)
fewer = ddim(guided(precise, few, range(5)), 5, x)
run.record("whole-prediction", float((reused - fewer).abs().max()))

# %%
# NBVAL_CHECK_OUTPUT
print("wrongly run or left out, of", n_skips, "branches x", len(MODULES), "modules:", wrong)
print("a cached call of branch 0 runs", *names_run(0))
print("calls not as in the formula, of 10 pairs (T, N):", off)

# %% [markdown]
# ### What it costs
#
# Let a full call cost $F$ MACs and a cached one $C_b$. Then a sampler of $T$ steps costs
#
# $$
# \lceil T/N \rceil\, F + \left( T - \lceil T/N \rceil \right) C_b .
# $$ (eq-deepcache-cost)
#
# $C_b$ can be written down. A convolution with a $k \times k$ kernel from $c$ to $c'$ channels costs $k^2 c\, c'$ MACs a pixel. As long as $b \le 2$, all that runs is at the finest resolution, where there is no attention: convolutions, residual blocks, and the
# embedding of the time. We count on torch's `meta` device, where tensors have shapes and no values, and compare with arithmetic.


# %%
def count(call, *args):
    """MACs of one call on the meta device, and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = call(*args)
    return counter.get_total_flops() // 2, result


def counted_costs(unet, side, length, branches):
    """F, and C_b of some branches: MACs of one image."""
    ghost, costs = to_meta(unet), {}
    x, t = torch.zeros(1, unet.in_channels, side, side, device="meta"), torch.zeros(1, device="meta")
    text = (torch.zeros(1, length, unet.cross_attention_dim, device="meta"), None)
    full, _ = count(deep_cache, ghost, x, t, text, 0)
    with torch.no_grad():
        h, skips = ghost.encode(x, emb := ghost.embed(t), *text)
        main = [ghost.middle(h, emb, *text)]  # the main branch as it enters decoder unit 0, 1, ...
        for j in range(ghost.num_skips - 1 - min(branches)):
            main.append(ghost.decode(main[-1], skips, emb, *text, start=j, stop=j + 1))
    for b in branches:
        costs[b], _ = count(deep_cache, ghost, x, t, text, b, main[ghost.num_skips - 1 - b])
    return full, costs


def outer_cost(config, b):
    """C_b for b <= 2 by hand."""
    w, below = config["block_out_channels"][:2]
    colours, emb = config["in_channels"] * config["patch_size"] ** 2, 4 * w
    pixels = (config["sample_size"] // config["patch_size"]) ** 2

    def residual(c, out):
        shortcut = c * out if c != out else 0
        return pixels * (9 * c * out + 9 * out * out + shortcut) + emb * out

    main = [w, w, below]  # channels of the main branch as it enters the unit that reads skip 0, 1, 2
    blocks = b * residual(w, w) + sum(residual(main[i] + w, w) for i in range(b + 1))
    return (w * emb + emb * emb) + pixels * 9 * colours * w * 2 + blocks


side, length = unet.config["sample_size"], tokens.shape[1]
F_full, C = counted_costs(unet, side, length, range(n_skips))
differences = [abs(outer_cost(unet.config, b) - C[b]) for b in range(3)]
ghost = to_meta(model)
for T, N, b in [(3, 2, 2), (2, 2, 5)]:
    # Two halves a step; the text is encoded once and not counted here.
    predict = guided(ghost, tokens[:1].to("meta"), uniform_refreshes(T, N), b)
    x, t = torch.zeros(1, 3, side, side, device="meta"), torch.zeros(1, device="meta")
    total, _ = count(lambda p=predict, x=x, t=t, T=T: [p(x, t) for _ in range(T)])
    differences.append(abs(total - 2 * plan_cost(T, uniform_refreshes(T, N), F_full, C[b])))
run.record("macs", max(differences))
share = {b: C[b] / F_full for b in C}

# %%
# NBVAL_CHECK_OUTPUT
print(f"a full call: {F_full:,} MACs an image")
for b in range(n_skips):
    print(f"a cached call of branch {b}: {C[b]:11,} MACs, {share[b]:6.1%}")
print("counted = by hand:", "PASS" if max(differences) == 0 else differences)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: bars of the share of a full call that a cached call of each branch costs, rising from under one tenth at branch 0, light blue, to nearly one at branch 8; branch 2 is dark blue, branch 4 green, the others grey. Right: cost of a whole sampler against the interval for branch 0, light blue, branch 2, dark blue, and branch 4, green; the line of branch 0 falls close to the ideal one over N, the others level off further above it."}, "figure": {"caption": "Where the work is. Left: what a cached call costs. Right: what a sampler of 50 steps costs; the dashed line is $1/N$, a cache that costs nothing. Counted, not timed. Branch 0 is light blue, branch 2 dark blue and branch 4 green, here and in the figures of the results.", "name": "fig-deepcache-work"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
left.bar(
    list(share),
    list(share.values()),
    color=[{0: PALETTE[5], 2: PALETTE[0], 4: PALETTE[2]}.get(b, PALETTE[6]) for b in share],
)
left.set(
    xlabel="branch $b$ (0 is outermost)", ylabel="cached call / full call", xticks=range(n_skips), ylim=(0, 1)
)
intervals = range(1, 21)
for b, colour in ((0, PALETTE[5]), (2, PALETTE[0]), (4, PALETTE[2])):
    costs = [plan_cost(50, uniform_refreshes(50, N), 1, share[b]) / 50 for N in intervals]
    right.plot(intervals, costs, "o-", ms=3, color=colour, label=f"$b = {b}$")
right.plot(intervals, [1 / N for N in intervals], "k--", lw=1, label="$1/N$")
right.set(xlabel="interval $N$", ylabel="sampler / full sampler", ylim=(0, 1.02), xticks=(1, 5, 10, 15, 20))
right.legend()
plt.show()

# %% [markdown]
# In this network most of the work lies deeper than branch 2, and branch 0 leaves little of a call. Is that a peculiarity of a small network? The same function counts Stable Diffusion 1.5 at its real size. Only shapes are needed for that, no weights.

# %%
# NBVAL_CHECK_OUTPUT
with torch.device("meta"):
    sd = UNet(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        attention_levels=(0, 1, 2),
        num_heads=8,
        cross_attention_dim=768,
        norm_num_groups=32,
    )
sd_full, sd_cost = counted_costs(sd, 64, 77, (0, 1))


def sd_ratio(N, b):
    return 50 * sd_full / plan_cost(50, uniform_refreshes(50, N), sd_full, sd_cost[b])


print(f"Stable Diffusion 1.5: {count_parameters(sd):,} parameters, {sd_full / 1e9:.1f} GMAC a call")
for b, cost in sd_cost.items():
    ratios = ", ".join(f"N = {N}: {sd_ratio(N, b):.2f}x" for N in (2, 3, 5, 10))
    print(f"branch {b}: {cost / 1e9:5.1f} GMAC a cached call; 50 steps, fewer MACs by {ratios}")
run.record("real-size", sd_ratio(5, 1))

# %% [markdown]
# These factors are bounds in practice: time also goes into what is not counted, and into the parts around the U-Net. The paper's headline is $2.3\times$ for 50 steps. The
# [documentation of diffusers](https://huggingface.co/docs/diffusers/optimization/deepcache) reports measured times for Stable Diffusion 2.1, whose U-Net has almost the same shape: at 512 pixels and batch 8,
# $2.32\times$ for $N = 3$, $b = 0$; $3.18\times$ for $N = 5$, $b = 0$; $2.20\times$ for $N = 5$, $b = 1$. All lie below the bounds. The order is not quite the same: $N = 5$, $b = 1$ saves more operations than $N = 3$, $b = 0$, but less time.
#
# :::{admonition} In the released code
# :class: tip
# There are two implementations, and their branches are numbered differently. The package's helper,
# [`deepcache.py`](https://github.com/horseee/DeepCache/blob/master/DeepCache/extension/deepcache.py), takes `cache_branch_id`, which is our $b$. The code behind the paper's tables,
# [`unet_2d_condition.py`](https://github.com/horseee/DeepCache/blob/master/DeepCache/sd/unet_2d_condition.py), takes `cache_layer_id` and `cache_block_id`; as we read it, `0, 0` still runs the first residual block and its attention in the encoder,
# and two units of the decoder. That is our $b = 1$. A counter of modules, such as the one in that repository, leaves out the two products inside attention; at these sizes they are a good part of a call.
# :::
#
# (sec-deepcache-experiment)=
# ## The experiment
#
# The sampler is DDIM with 50 steps and guidance 3. Caching and its rivals start from the same noise and captions. We measure how near each comes to the image of the full sampler: the peak signal-to-noise ratio (PSNR) to that reference, in decibels. Twenty decibels more
# are a tenth of the error (root mean square). For scale: an error of one grey level in 255 is 48 dB; differences above that can hardly be seen.
#
# :::{table} The arms. Each rival may use at least as many MACs as the arm that it is compared with.
# :name: tab-deepcache-arms
#
# | arm | what is different | question |
# |---|---|---|
# | $b = 0$ | cached at the outermost branch, $N = 2, 3, 5, 10$ | the method, as thin as it can be |
# | $b = 2$ | cached before the first downsampling, $N = 2, 3, 5, 10$ | the method, with about the share of work that the paper's branch has in Stable Diffusion |
# | fewer steps | DDIM, as many steps as the MACs of one of the arms above allow, rounded up | the trivial rival: does the outer part pay? |
# | more depth, $b = 1, 4$ | $N = 5$, less or more of the network fresh | does depth buy accuracy? |
# | never refreshed | one full call, then cached ones, $b = 0$ | does the cache have to be refreshed? |
# | the other way round | main branch fresh, skip 0 kept, $N = 2$ | does it matter *which* of the two inputs is old? |
# | non-uniform | $b = 0$, as many full calls as $N = 5$, and as $N = 10$, unevenly spaced | is even spacing best? |
# | no caption | the empty caption: full, cached at $b = 2$ with $N = 2$, and with fewer steps | does it pay where the picture is left open? |
# | no guidance | captions, guidance 1: full, cached at $b = 2$ with $N = 2$, and with fewer steps | is it the caption or the guidance that matters? |
# | second sampler | DPM-Solver++ with 20 steps: cached at $b = 2$, and with fewer steps | does it carry over? |
# | near-exact | DPM-Solver++ with many steps | how near is the reference itself to the truth? |
# :::
#
# Four of these need a word.
#
# **The other way round** is the mirror image. The decoder unit that reads skip 0 gets a fresh main branch and an *old* skip. It saves nothing, so it has every advantage: all that could be fresh, except that skip, is fresh. If depth is what changes slowly, an old skip should do more harm than an old main branch.
#
# **No caption.** Here a caption settles nearly everything in a scene. The sampler then has little to decide, its way from noise to image is nearly straight, and long steps do little harm: the rival's best case. With the empty caption the model draws any scene it likes. (Both questions of the guidance are then the same, so guidance does nothing: two things change at once.)
# Therefore three more arms have **no guidance**: they keep the captions and set the scale to 1. Beside the guided arms they differ in guidance only, beside those without a caption in the caption only. Both sets are compared with a full sampler of their own.
#
# **Non-uniform.** For long intervals the paper also spaces full steps unevenly: points are spread evenly over $u$ and steps are $c + u^p$, so that they lie densest around a centre step $c$. The released script uses $p = 1.4$, $c = 15$ of 50, and so do we. For steps before $c$ this needs a power of a
# negative number. We try both readings. One is $\operatorname{sign}(u) |u|^p$. The other is what the script computes: Python's power of a negative number is complex, and numpy keeps the real part. With as many full calls as $N = 10$ has, we ran only the script's reading.
#
# **Near-exact.** Which way does the reference lean? DDIM is a first-order method: with $K$ steps its error is roughly proportional to $1/K$, and it points the same way for all large $K$. The reference has an error of its own, proportional to $1/50$. So the distance between the two goes as $1/K - 1/50$: measured against
# DDIM with 50 steps, fewer steps look better than they are, since part of their error is in the reference too. We therefore look at a second reference: the solution of the same differential equation with many steps of a second-order solver, DPM-Solver++ {cite:p}`lu2022dpm`, ending at the same noise level. It belongs to none of the arms in
# the comparison of caching with DDIM. It does share its solver with the arms of DPM-Solver++, and flatters those, though less: a second-order error falls faster with the number of steps.


# %%
def other_way_round(unet, x, t, text, b, kept=None):
    """The mirror image, for the ablation: everything is computed, but the skips 0 to b are old ones."""
    emb = unet.embed(t)
    h, skips = unet.encode(x, emb, *text)
    kept = skips[: b + 1] if kept is None else kept
    return unet.decode(unet.middle(h, emb, *text), kept + skips[b + 1 :], emb, *text), kept


def dpm_solver():
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min",
    )


class Arm(NamedTuple):
    steps: int
    plan: tuple[int, ...]  # the steps with a full call
    b: int = 0
    call: Callable = deep_cache
    solver: Callable = ddim_scheduler
    captioned: bool = True
    scale: float = 3.0  # of guidance

    @property
    def cost(self):
        """In full calls."""
        if self.call is other_way_round:
            return float(self.steps)
        return plan_cost(self.steps, self.plan, 1.0, share[self.b])


def plain_arm(steps, solver=ddim_scheduler):
    return Arm(steps, tuple(range(steps)), solver=solver)


T, M = s.steps, s.solver_steps
ARMS = {"full": plain_arm(T), "exact": plain_arm(s.exact_steps, dpm_solver), "DPM": plain_arm(M, dpm_solver)}
for b, N in itertools.product((0, 2), (2, 3, 5, 10)):
    ARMS[f"b={b}, N={N}"] = Arm(T, uniform_refreshes(T, N), b)
for N in (2, 3):
    ARMS[f"DPM, N={N}"] = Arm(M, uniform_refreshes(M, N), 2, solver=dpm_solver)
RIVAL = {}  # of each cached arm: the same solver with fewer steps, at no fewer MACs
for name in [name for name in ARMS if "N=" in name]:
    rival = plain_arm(equal_cost_steps(ARMS[name].cost, 1.0), ARMS[name].solver)
    RIVAL[name] = f"{name.split(',')[0] if 'DPM' in name else 'DDIM'}-{rival.steps}"
    ARMS[RIVAL[name]] = rival
for b in (1, 4):
    ARMS[f"b={b}, N=5"] = Arm(T, uniform_refreshes(T, 5), b)
for root in ("signed", "principal"):
    plan = power_centred_refreshes(T, ceil(T / 5), round(0.3 * T), 1.4, root=root)
    ARMS[f"uneven, {root}"] = Arm(T, plan)
ARMS["uneven, N=10"] = Arm(T, power_centred_refreshes(T, ceil(T / 10), round(0.3 * T), 1.4, root="principal"))
OPEN = Arm(T, uniform_refreshes(T, 2), 2, captioned=False)  # nobody says what to draw
ARMS |= {"open, full": plain_arm(T)._replace(captioned=False), "open, b=2, N=2": OPEN}
ARMS["open, fewer steps"] = plain_arm(equal_cost_steps(OPEN.cost, 1.0))._replace(captioned=False)
for name in ("full", "b=2, N=2", "fewer steps"):  # with captions again, and without guidance
    ARMS[f"unguided, {name}"] = ARMS[f"open, {name}"]._replace(captioned=True, scale=1.0)
ARMS["never"] = Arm(T, (0,))
ARMS["other way round"] = Arm(T, uniform_refreshes(T, 2), call=other_way_round)


def asked(seed, n=s.images):
    """The captions of a seed."""
    return shapes.sample_scenes(n, torch.Generator().manual_seed(1000 + seed), objects=(1, 3), split="test")


def draw(arm, seed):
    """The images of one arm and seed; for the full sampler also how alike the kept features are from step to step."""
    tokens = shapes.tokens(asked(seed)).to(run.device)
    tokens = tokens if arm.captioned else model.null_tokens(*tokens.shape)
    x = initial_noise((len(tokens), 3, side, side), torch.Generator().manual_seed(seed), device=run.device)
    out = {}
    if arm == ARMS["full"]:
        for b in (0, 2):
            seen = []
            watched = guided(model, tokens[: s.watched], arm.plan, b, watch=seen)
            sample_final(watched, arm.solver(), x[: s.watched], num_inference_steps=arm.steps)
            kept = torch.stack(seen)[:, : s.watched]  # the half with the caption
            out[b] = cosine_between_steps(kept).cpu(), cosine_between_samples(kept).cpu()
    x = sample_final(
        guided(model, tokens, arm.plan, arm.b, arm.call, arm.scale),
        arm.solver(),
        x,
        num_inference_steps=arm.steps,
    )
    return out | {"x": x.clamp(-1, 1).cpu()}


results = run_arms(draw, ARMS, s.seeds, s.jobs)
images = {name: [result["x"] for result in of] for name, of in results.items()}
print({name: f"{arm.cost:.1f} full calls" for name, arm in ARMS.items()})

# %% [markdown]
# ## Results
#
# ### The picture: one image, step by step
#
# Which modules ran at which step? {numref}`fig-deepcache-film` is not drawn from the plan but recorded: a hook on each module noted whether it computed.

# %%
UNITS = [*unet.down_units, None, *unet.up_units]  # None: the middle
first = [unit.names[0] if unit else "mid_block" for unit in UNITS]


def film(plan, b=2, seed=0):
    """One image: which units ran in each step, and the clean image that each step aims at."""
    noise = initial_noise((1, 3, side, side), torch.Generator().manual_seed(seed), device=run.device)
    predict = guided(model, shapes.tokens(asked(seed, 1)).to(run.device), plan, b)
    ran, seen, before = [], [], dict.fromkeys(first, 0)
    with trace_executions(unet, first) as trace:
        for step in sample(predict, ddim_scheduler(), noise, num_inference_steps=T):
            now = {name: trace.counts[name].calls for name in first}
            ran.append([now[name] > before[name] for name in first])
            before = now
            seen.append(step.pred_original_sample[0].clamp(-1, 1).cpu())
    return torch.tensor(ran).T, torch.stack(seen)


ran, aims = film(uniform_refreshes(T, 5))
_, full_aims = film(range(T))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above: a grid, 19 units of the network by the steps of the sampler. Every fifth column is filled from top to bottom, in grey; in the others only the first three rows and the last three are filled, in pink. Below: two rows of small images, from a blur to a scene of coloured shapes, and a row of their difference."}, "figure": {"caption": "The picture to remember. Above: what runs at each step with $N = 5$ and $b = 2$; rows are the units of the network from input to output. Grey: a full step. Pink: all that a cached step runs. White: nothing runs, what was kept is used. Below: the clean image that the network aims at, after every fifth step, when the cache is oldest; what caching changed is magnified four times, grey is zero. One caption, not chosen.", "name": "fig-deepcache-film"}}
shown = list(range(4, T, 5))
fig, (top, *rows) = plt.subplots(4, 1, figsize=(7, 5.0), height_ratios=(3.4, 1, 1, 1), layout="constrained")
grid = ran.int() * (1 + (~ran.all(0)).int())  # 0: did not run, 1: in a full step, 2: in a cached step
top.imshow(
    grid,
    cmap=ListedColormap(["white", PALETTE[6], PALETTE[3]]),
    vmin=0,
    vmax=2,
    aspect="auto",
    extent=(0, T, len(UNITS), 0),
)
top.set_yticks([4.5, 9.5, 14.5], ["encoder", "middle", "decoder"])
top.set(xticks=range(0, T + 1, 5), xlabel="step")
top.hlines([9, 10], 0, T, color="0.3", lw=0.8)
top.vlines(range(T + 1), 0, len(UNITS), color="0.85", lw=0.4)
top.grid(False)
strips = {
    "cached": aims[shown],
    "full": full_aims[shown],
    "difference\nx 4": (4 * (aims - full_aims)[shown]).clamp(-1, 1),
}
for ax, (label, strip) in zip(rows, strips.items(), strict=True):
    ax.imshow(image_grid(strip, len(shown)).numpy(), aspect="auto")
    ax.set(xticks=[], yticks=[])
    ax.set_ylabel(label, rotation=0, ha="right", va="center")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
plt.show()

# %% [markdown]
# ### Is there anything to save?
#
# The paper's premise can be tested alone. We run the *full* sampler, note $F_0$ and $F_2$ at each step, and compare steps by their cosine similarity: 1 if two features point the same way, 0 if they are at right angles. A similarity near 1 says little by itself, since features of quite
# different images share a large common part too. So the dashed line in {numref}`fig-deepcache-alike` shows how alike two *different* images are at the same step.

# %%
# (branches, seeds, steps, steps) and (branches, seeds, steps)
alike, floor = (
    torch.stack([torch.stack([r[b][i] for r in results["full"]]) for b in (0, 2)]) for i in (0, 1)
)
neighbours = alike.diagonal(1, dim1=2, dim2=3)
lags = [lag for lag in (1, 2, 5, 10, 20) if lag < T]
by_lag = torch.stack([alike.diagonal(lag, dim1=2, dim2=3).mean(2) for lag in lags], dim=2)
run.record("redundancy", (neighbours >= 0.99).double().mean(2).amin(0))  # the worse branch
run.record("lag", (by_lag[..., :-1] - by_lag[..., 1:]).amin((0, 2)))
for i, b in enumerate((0, 2)):
    means = {lag: f"{v:.4f}" for lag, v in zip(lags, by_lag[i].mean(0).tolist(), strict=True)}
    print(f"branch {b}: mean similarity by lag {means}; different images {floor[i].mean():.2f}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: a square map, step against step, bright along the diagonal, darker away from it. Right: one minus the similarity of neighbouring steps on a logarithmic axis: for branch 0, light blue, it rises along the whole way, for branch 2, dark blue, it has a hump in the first half and rises again at the end; far above, dashed lines for different images."}, "figure": {"caption": "How alike the kept features are. Left: cosine similarity of $F_2$ at any two steps of the full sampler. Right: what neighbouring steps lack to similarity 1, on a logarithmic axis; band, hardly wider than the line: 90 % interval over seeds. Dashed: the same for two different images at one step. Dotted: the similarity that the claim *redundancy* asks for.", "name": "fig-deepcache-alike"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", width_ratios=(1, 1.15))
picture = left.imshow(alike[1].mean(0), cmap="viridis", vmax=1, origin="lower")
left.set(xlabel="step", ylabel="step")
left.grid(False)
fig.colorbar(picture, ax=left, label="cosine similarity", shrink=0.85)
for i, (b, colour) in enumerate(((0, PALETTE[5]), (2, PALETTE[0]))):
    mean, low, high = mean_interval(1 - neighbours[i])
    right.plot(range(1, T), mean, color=colour, label=f"$F_{b}$, step before")
    right.fill_between(range(1, T), low.clamp(min=1e-6), high, color=colour, alpha=0.25, lw=0)
    right.plot(range(T), (1 - floor[i]).mean(0), "--", color=colour, label=f"$F_{b}$, other image")
right.axhline(0.01, color="0.3", lw=1, ls=":")
right.annotate("similarity 0.99", (0, 0.0115), fontsize=9, color="0.3")
right.set(xlabel="step", ylabel="1 - similarity", yscale="log", ylim=(None, 12))
right.legend(loc="upper left", fontsize=9, ncol=2, handlelength=1.2, columnspacing=0.8)
plt.show()

# %% [markdown]
# ### At equal cost
#
# Now the main question. {numref}`fig-deepcache-pareto` sets nearness against cost, once for each reference.


# %%
def near(name, reference):
    """Mean PSNR of an arm to the images of a reference arm, in dB: one number a seed."""
    pairs = zip(images[name], images[reference], strict=True)
    return torch.stack([psnr_to_reference(x, y).mean() for x, y in pairs])


asking = [name for name, arm in ARMS.items() if arm.captioned and arm.scale == 3.0]
psnr = {name: near(name, "full") for name in asking if name != "full"}
to_exact = {name: near(name, "exact") for name in asking if name != "exact"}
to_dpm = {name: near(name, "DPM") for name in ARMS if name.startswith("DPM") and name != "DPM"}
gain = {name: psnr[name] - psnr[RIVAL[name]] for name in RIVAL if "DPM" not in name}
for b, N in itertools.product((0, 2), (2, 3)):
    run.record(f"equal-cost-b{b}-n{N}", gain[f"b={b}, N={N}"])
run.record("equal-cost-b2-n5", gain["b=2, N=5"])
for kind in ("open", "unguided"):
    cached_db, plain_db = (near(f"{kind}, {arm}", f"{kind}, full") for arm in ("b=2, N=2", "fewer steps"))
    run.record(f"equal-cost-{kind}", cached_db - plain_db)
    print(
        f"{kind}, to its own full sampler: cached {cached_db.mean():.1f} dB, fewer steps {plain_db.mean():.1f} dB"
    )
run.record("limit", gain["b=2, N=10"] - gain["b=2, N=3"])
for N in (2, 3):
    run.record(f"solver-n{N}", to_dpm[f"DPM, N={N}"] - to_dpm[RIVAL[f"DPM, N={N}"]])
for name in ("b=0, N=3", "b=2, N=3", "b=2, N=5"):
    claim = name.replace("=", "").replace(", N", "-n")
    run.record(f"exact-{claim}", to_exact[name] - to_exact[RIVAL[name]])
print(f"gain over fewer steps, dB{'to DDIM-' + str(T):>50s}{'to the solution':>18s}")
for name, value in gain.items():
    rival = RIVAL[name]
    print(
        f"{name:10s} {ARMS[name].cost:5.1f} full calls {psnr[name].mean():6.1f} dB   "
        f"{rival:8s} {psnr[rival].mean():6.1f} dB {value.mean():+14.1f} "
        f"{(to_exact[name] - to_exact[rival]).mean():+17.1f}"
    )


# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, PSNR against cost. Left, to the full DDIM sampler: three lines that rise with cost, grey and dashed for DDIM with fewer steps, light blue for DeepCache at branch 0, dark blue at branch 2; the line of DDIM lies above both everywhere, closest to branch 2 at short intervals. Right, to the near-exact solution: the same three lines rise towards a dotted line, the error of the full DDIM sampler, and branch 2 passes slightly above DDIM at short intervals; two more for DPM-Solver++, without a cache, red-orange and dashed, which rises above all of these, and cached, orange, below that."}, "figure": {"caption": "Nearness against cost. Left: to DDIM with all its steps, which is what DeepCache imitates. Right: to the near-exact solution; dotted: DDIM with all its steps. Points on one line differ in $N$, or in the number of steps; the labels $N$ belong to $b = 2$. The dearest point of DPM-Solver++ has all its steps. The two vertical axes differ. Bars: 90 % intervals over seeds, each with its own captions.", "name": "fig-deepcache-pareto"}}
def by_cost(names):
    return sorted(set(names), key=lambda name: ARMS[name].cost)


LINES = {
    "DDIM, fewer steps": (by_cost(RIVAL[name] for name in gain), "0.35", "s--"),
    "DeepCache, $b = 0$": ([f"b=0, N={N}" for N in (2, 3, 5, 10)], PALETTE[5], "o-"),
    "DeepCache, $b = 2$": ([f"b=2, N={N}" for N in (2, 3, 5, 10)], PALETTE[0], "o-"),
    "DPM-Solver++, 20 steps and fewer": (
        by_cost(["DPM", *(RIVAL[f"DPM, N={N}"] for N in (2, 3))]),
        PALETTE[1],
        "s--",
    ),
    "DPM-Solver++ cached, $b = 2$": (["DPM, N=2", "DPM, N=3"], PALETTE[4], "o-"),
}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.9), layout="constrained")
for ax, values, lines in ((axes[0], psnr, list(LINES)[:3]), (axes[1], to_exact, list(LINES))):
    for label in lines:
        names, colour, style = LINES[label]
        mean, low, high = mean_interval(torch.stack([values[name] for name in names], dim=1))
        bars = torch.stack([mean - low, high - mean])
        ax.errorbar(
            [ARMS[name].cost for name in names],
            mean,
            bars,
            fmt=style,
            ms=5,
            lw=1.4,
            color=colour,
            label=label,
            capsize=2,
        )
    ax.set(xlabel=f"cost in full calls (DDIM: {T})")
for N in (2, 3, 5, 10):
    point = (ARMS[f"b=2, N={N}"].cost, float(psnr[f"b=2, N={N}"].mean()))
    axes[0].annotate(f"N={N}", point, (6, -11), textcoords="offset points", fontsize=9, color=PALETTE[0])
axes[0].set(ylabel="PSNR in dB", title=f"to DDIM, {T} steps")
axes[1].axhline(float(to_exact["full"].mean()), color="k", lw=1, ls=":")
axes[1].set(title="to the near-exact solution")
fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncol=2, fontsize=9)
plt.show()

# %% [markdown]
# Read the panels together. On the left, everyone is compared with the sampler that DeepCache imitates, and fewer steps are flattered, as said above. Still, the result is plain: in the `cpu` run their line lies above both lines of DeepCache. On the right nobody is imitated: the target is the solution that all of them approximate. There a cached sampler can hardly pass the dotted line, the error of DDIM itself.
# And there the better solver is a rival too, one that needs no cache.
#
# Nearness is not quality. So we also let this book's oracle, a network trained to read scenes, say which objects of the caption are there with the right shape, colour, size and place, and compare the distribution of its features with that of real scenes (the Fréchet distance). With this few images a seed the distance is far from
# its value for many; only the ratio of two arms is used. The last line of the list gives the distance of held-out real scenes, as few as these, for comparison (*floor*), and that of noise (*ceiling*).

# %%
oracle = zoo.load("oracle_shapes32")
generator = torch.Generator().manual_seed(99)
real = shapes.render(shapes.sample_scenes(s.real, generator, objects=(1, 3), split="train"), side)
held_out = shapes.render(shapes.sample_scenes(s.images, generator, objects=(1, 3), split="test"), side)
of_real = features(oracle, real)
judged = ["full", *(f"b={b}, N={N}" for b in (0, 2) for N in (2, 3, 10)), RIVAL["b=2, N=3"], "never"]
hits, distance = {}, {}
for name in judged:
    scored = [
        scene_scores(read_in_batches(oracle, x), asked(seed))
        for seed, x in zip(s.seeds, images[name], strict=True)
    ]
    hits[name], scene = (torch.stack([score[of].nanmean() for score in scored]) for of in ("object", "scene"))
    distance[name] = torch.tensor([frechet_distance(features(oracle, x), of_real) for x in images[name]])
    print(
        f"{name:10s} objects right {hits[name].mean():6.1%}   whole scenes right {scene.mean():6.1%}"
        f"   Fréchet distance {distance[name].mean():8.3f}"
    )
print("context, first seed, full sampler:", frechet_report(oracle, images["full"][0], real, held_out))
mild = [f"b={b}, N={N}" for b in (0, 2) for N in (2, 3)]
run.record("distance", torch.stack([distance[name] for name in mild]).mean(0) / distance["full"])
run.record("accuracy", torch.stack([hits[name] for name in mild]).mean(0) - hits["full"])

# %% [markdown]
# ### What breaks it
#
# {numref}`fig-deepcache-failure` shows the same eight captions under stronger and stronger caching, with DDIM at the cost of the strongest, and under two ablations: never refreshed, and the other way round.

# %%
run.record("never-refreshed", psnr["b=0, N=2"] - psnr["never"])
run.record("other-way-round", psnr["b=0, N=2"] - psnr["other way round"])
deeper = torch.stack([psnr[f"b={b}, N=5"] for b in (0, 1, 2, 4)], dim=1)
run.record("deeper", (deeper[:, 1:] - deeper[:, :-1]).amin(1))
run.record("uneven", psnr["uneven, principal"] - psnr["b=0, N=5"])
run.record("uneven-n10", psnr["uneven, N=10"] - psnr["b=0, N=10"])
for name in (
    "b=0, N=5",
    "uneven, principal",
    "uneven, signed",
    "b=0, N=10",
    "uneven, N=10",
    "b=1, N=5",
    "b=2, N=5",
    "b=4, N=5",
):
    print(f"{name:20s} {ARMS[name].cost:5.1f} full calls   PSNR {psnr[name].mean():5.1f} dB")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of eight small images of coloured shapes. The full sampler and b = 2, N = 3 look alike. With b = 0, N = 10 shapes stay in place, but shapes and background are grainy. The row below, DDIM with as many operations, is clean. Never refreshed: glaring colours and strong noise, the shapes can still be made out. Last row: the other way round, which looks like the full sampler."}, "figure": {"caption": "How it fails. Third and fourth row: equal operations, cached and with fewer steps. The first eight captions of the first seed, not chosen; at the left of each row its mean PSNR to the full sampler in dB, over all images of all seeds.", "name": "fig-deepcache-failure"}}
rows = ["full", "b=2, N=3", "b=0, N=10", RIVAL["b=0, N=10"], "never", "other way round"]
labels = [f"{name}\n{float(psnr[name].mean()):.1f} dB" if name in psnr else name for name in rows]
fig, ax = plt.subplots(figsize=(6.4, 4.1), layout="constrained")
columns = min(8, s.images)
show_images(torch.cat([images[name][0][:columns] for name in rows]), columns, ax=ax, row_labels=labels)
plt.show()

# %% [markdown]
# ### What is it worth in seconds?
#
# MACs are not time. The outer layers work on large maps with few channels, which keep a processor less busy for each operation than the deep layers do. We time a full and a cached call, take the least of five, and put the times into {eq}`eq-deepcache-cost`.

# %%
x = noise.repeat(ceil(s.batch / 64), 1, 1, 1)[: s.batch]
text = tuple(part.expand(len(x), *part.shape[1:]) for part in model.encode_text(tokens[:1])[:2])
t, ratios = torch.full((len(x),), 500, device=run.device), []


def timed(kept=None):
    with torch.no_grad():
        out = deep_cache(unet, x, t, text, 0, kept)
    out[0].sum().item()  # wait for the device
    return out[1]


kept = timed()
for _ in range(3):
    full_s, cached_s = cpu_time(timed), cpu_time(lambda: timed(kept))
    ratios.append(50 * full_s / plan_cost(50, uniform_refreshes(50, 5), full_s, cached_s))
run.record("speed", ratios)
display(
    Markdown(
        f"A cached call of branch 0 takes {cached_s / full_s:.1%} of the time of a full one, and {share[0]:.1%} of its MACs."
    )
)

# %%
run.report()

# %% [markdown]
# **What the table says, in words.** The exact claims hold: the cache computes what it should, no more, and costs what the formula says. *Speed* holds too, for the network alone on one core: nearly as large a share of the time is saved as of the operations. The premise holds too (*redundancy*, *lag*), see {numref}`fig-deepcache-alike`: to the deep layers neighbouring steps are nearly equal, and far more alike than
# different images are. But the pace is not even. The outermost branch changes faster and faster until the end. Branch 2 has a quick stretch in the first half, and another at the very end.
#
# That matters. With even spacing, what is used in the last steps is up to $N - 1$ steps old, where a step of age means more at branch 0, and nothing comes after to repair it. Look at which step is the last full one: with 50 steps it is number 48 for $N = 2$ and for $N = 3$, number 45 for $N = 5$, number 40 for $N = 10$, counted from 0. So an
# interval is not only a rate, it also sets how old the cache is at the end, and nearness need not fall smoothly with $N$.
#
# **The main comparison came out against the method.** Does the outer part pay at equal cost? The claims that begin with *equal-cost* ask for one decibel of advantage over fewer steps. In the `cpu` run all of them are contradicted, and the first gain in the list is negative in every row: at both branches, at every interval, with a caption and without, with guidance and without, fewer DDIM steps come nearer to the full
# sampler. Their number is rounded up, which gives them up to one call more; the slope of their line in {numref}`fig-deepcache-pareto` shows that this is a small part of the lead. (Without guidance the lead is smallest, and this part may be larger; no slope was measured there.) *Limit* is confirmed, but its wording presumes an advantage. There is none to use up: what grows from $N = 3$ to $N = 10$ is the deficit.
#
# How much does it mean? First, at $b = 2$ with $N = 2$ and $3$ and a caption, both sides are on average less than one grey level from the full sampler. Nobody could see who is ahead. Second, the paper does not claim nearness. It claims that *image quality* at equal throughput is comparable or slightly better, measured on photographs. Our claims are stricter, and of
# another kind. Our stand-ins for quality can hardly decide. The oracle reads every object right in all arms that it judged but the one that is never refreshed; it is at its ceiling, so *accuracy* says no more than that nothing is broken. *Distance* is confirmed, but it is a mild test: in the first seed the full sampler is as far from the real scenes as other real scenes are, so
# most of the distance is due to the small number of images, and that draws every ratio towards one. What can be seen in it points the same way: caching at $N = 2$ and $3$ costs a little, and the one plain rival in the list costs less than the arm of its price.
#
# Why is the plain rival so strong? Suppose that the network is perfect, that the caption leaves one image possible, and that there is no guidance. Then the predicted noise never changes along the way, and DDIM is exact with a single step. These scenes are near that case: a caption settles all but a fraction of a pixel. Guidance bends the way
# as long as the empty caption predicts something else. That is a likely reason why few steps do so well here. But it does not explain the *lead*, that is, why caching does less well. Two sets of arms test that.
#
# Without a caption (*equal-cost-open*) the rival loses many decibels, but caching loses about as many, and the lead is not clearly smaller. That test is not a clean one, since guidance drops out as well. So *equal-cost-unguided* keeps the captions and drops only the guidance. (This claim was added after the first run had been seen, and before this one.)
# It is contradicted too, but the lead is less than half as large as with guidance. Fewer steps come nearer, as the argument says, and caching gains more. A likely reason, not tested: the guided prediction is a weighted difference of two answers, with weights 3 and $-2$, so it magnifies whatever an old cache gets wrong differently in the two. So part of the
# lead belongs to the guidance. Next, compare the arms without guidance with those without a caption, where only the caption differs. Without it both sides are much further from their full sampler, and the lead is on average no smaller, though its interval is wide. An open picture is hard for both; we found no sign that it favours caching.
#
# Training seems to matter too. We had a pilot run of this page on an early checkpoint of the same network, a fifth of the way through its training. There caching at $b = 2$ with $N = 2$ and $3$ came out ahead. Later training left
# the error of caching nearly as it was, and made long steps much better. (A pilot on one seed, not a recorded run.) So the verdict here is about simple images and a network that has learned them well. For photographs, where 25 steps and 50 steps give visibly different images, it may be the other way round. This page cannot say.
#
# The ablations test the idea itself. *Never-refreshed* is confirmed: a cache that stays as it was in the first step covers the picture with noise, see its row in {numref}`fig-deepcache-failure`. So is *other-way-round*: an old main branch does less harm than an old skip, although only the former saves anything. This is the paper's point about depth, and it
# holds. *Deeper* is confirmed: a deeper branch keeps more fresh, comes nearer, and costs more. Is that a better use of operations than a smaller $N$? In the left panel the lines of the two branches cross. Where operations are plenty, the deeper branch is nearer; where they are scarce, the outermost one is.
#
# *Uneven* is contradicted. With the centre and power of the released script, the same number of full calls leaves the images further from the full sampler than even spacing does, in both readings of the power. Its centre lies early on the way, and at branch 0 the change is late: see {numref}`fig-deepcache-alike`. The paper offers this plan for
# long intervals, so the second run added one with as many full calls as $N = 10$ has. *Uneven-n10* (added like the claim above, between the runs) is contradicted as well, by a smaller margin, where the evenly spaced images are grainy already. The likely reason is the same: in the script's reading both plans make their last full call earlier than even spacing does, so the cache is older at the end. Only the
# released centre and power were tried, at branch 0. Exercise 1 moves the full steps to where the change is. That gains several decibels on the one seed that it was tuned and judged on, and is still well behind fewer steps.
#
# The right panel of {numref}`fig-deepcache-pareto`, and the claims that begin with *exact*, ask the same without the reference's own error. Compare both columns of the list: in every row the deficit is smaller against the solution. Part of this is arithmetic, since all that imitate DDIM with 50 steps share its error, which draws them together. But
# that cannot turn a sign. At $b = 2$ with $N = 2$ and $3$ the sign turns: there caching is a little nearer to the solution than fewer steps are, and the left panel flattered the rival. It is less than the decibel that we asked for, so *exact-b2-n3* is weaker, not confirmed. At $b = 0$, and with $N = 5$, fewer steps stay ahead: *exact-b0-n3* and
# *exact-b2-n5* are contradicted.
#
# A better solver is a third way to spend operations. DPM-Solver++ with 20 steps and no cache is nearer to the solution than any arm of DeepCache or of fewer DDIM steps, somewhat helped by a reference from the same solver. The two ideas can be combined, but nothing was gained by it here: *solver-n2* is contradicted, *solver-n3* inconclusive. It is a
# case of its own: the solver extrapolates from its last two predictions (exercise 3).
#
# **What was tried:** two branches and four intervals at equal cost, no caption, no guidance, a second reference, a second solver, uneven full steps at two rates, and full steps placed where the change is. In the recorded run none of them gives caching the advantage that we asked for.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Images with fine texture.** What the outer layers have to redraw in each step is much richer in photographs than in flat shapes.
# - **A network at scale.** Branch 0 is a thinner slice here than in Stable Diffusion, so the same $N$ saves more and keeps less fresh.
# - **Perceived quality.** PSNR to a reference punishes any change, also a harmless one. The oracle and the Fréchet distance look at content, but with few images a seed, and the oracle is at its ceiling. The paper's own comparison is one of quality.
# - **Plans that count from the end.** The verdicts above hold for the released plan, which counts from step 0. {doc}`/notebooks/04-caching/caching-compared` makes the last step of all a full one, at the price of at most one more, and there the comparison with fewer steps comes out differently.
# - **The best spacing.** Centre and power of the uneven plan are those of the released script, not tuned to this model. Exercise 1 tunes.
# - **Another training run.** There is one network. The intervals cover captions and noise, not training.
# - **Speed on a GPU.** The `cpu` profile times one core. At small batches a GPU is limited by the number of launches, and skipping modules saves those too.
# - **Left untried:** the CLIP score (how well image and caption agree) of Stable Diffusion, the Fréchet inception distance of LDM-4-G, a latent diffusion model, on ImageNet, the comparison with pruned and distilled models {cite:p}`fang2023structural,kim2023bksdm`, and the multi-step solver PLMS {cite:p}`liu2022pseudo` itself.
# :::
#
# ## Exercises
#
# **1.** At branch 0 later steps change more. Choose ten full steps of the sampler so that each stretch between two of them sees the same amount of change, from the similarities measured above. How much does it gain over even spacing at the same cost? Does it reach DDIM with fewer steps?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# Change is what neighbouring steps lack to similarity 1. Similarity is flat at its top: an angle a gives 1 - a^2 / 2. So the
# square root of the lack is a distance, and distances add up along the way. Cut the way into equal lengths.
length_so_far = torch.cat([torch.zeros(1), (1 - neighbours[0].mean(0)).clamp(min=0).sqrt().cumsum(0)])
full_calls = ceil(T / 5)
marks = torch.linspace(0, float(length_so_far[-1]), full_calls + 1)[:-1]
tuned = sorted({int((length_so_far >= mark - 1e-9).nonzero()[0]) for mark in marks})
print("even: ", uniform_refreshes(T, 5), "\ntuned:", tuple(tuned))
for name, plan in {"even": uniform_refreshes(T, 5), "tuned": tuned}.items():
    x = draw(Arm(T, tuple(plan)), s.seeds[0])["x"]
    print(
        f"{name:6s} PSNR to the full sampler {float(psnr_to_reference(x, images['full'][0]).mean()):.1f} dB"
    )
# The plan was tuned on the images that it is judged on. To publish it, measure the similarities on other captions.

# %% [markdown]
# **2.** Make $N$ as large as you like. What is the largest factor by which caching can cut the operations of Stable Diffusion 1.5, at branch 0 and at branch 1? And of this page's network?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# One full call and T - 1 cached ones: the factor tends to F / C_b as T grows, whatever N does.
for b, cost in sd_cost.items():
    print(f"Stable Diffusion 1.5, branch {b}: at most {sd_full / cost:.1f}x")
print(f"this page's network, branch 0: at most {F_full / C[0]:.1f}x")

# %% [markdown]
# **3.** DDIM uses each prediction once. DPM-Solver++ of second order puts a line through its last two. Why might a cached prediction do more harm there?
#
# :::{dropdown} Solution 3: in words
# With even steps in the log signal-to-noise ratio, the solver works with $\tfrac32 \hat x_0 - \tfrac12 \hat x_0^{\text{before}}$. The *difference* of two predictions steers it. Between a full and a cached call that difference holds two things: how the prediction really changed, and the jump between a fresh and an old cache.
# The second is an artefact, it is multiplied by one half, and each prediction enters two steps. Besides, a solver that needs only 20 steps takes longer ones: features that are one step old are older in time. The claims *solver-n2* and *solver-n3* ask whether caching pays there, and found no gain. Whether it does more harm than with DDIM they cannot say: the number of steps and the reference are others.
# :::
#
# ## References
#
# The method: {cite:t}`deepcache`, with its code [horseee/DeepCache](https://github.com/horseee/DeepCache) (`DeepCache/extension/deepcache.py`, `DeepCache/sd/` and `experiments/` were read). The samplers: {cite:t}`song2021denoising`, {cite:t}`lu2022dpm`, {cite:t}`liu2022pseudo`. Guidance:
# {cite:t}`ho2022classifier`. The retrained rivals: {cite:t}`fang2023structural`, {cite:t}`kim2023bksdm`. The library's parts: [minilib/models/unet.py](https://github.com/minilib-book/minilib/blob/main/minilib/models/unet.py),
# [minilib/caching.py](https://github.com/minilib-book/minilib/blob/main/minilib/caching.py), [minilib/intervene/cache.py](https://github.com/minilib-book/minilib/blob/main/minilib/intervene/cache.py).
