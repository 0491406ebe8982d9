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
# # RAS: give some regions more steps than others
#
# A black background is finished long before the cross in front of it. {cite:t}`ras` therefore let only a part of the image go through the network in most steps: *region-adaptive sampling* (RAS). The rest moves on with the velocity that it last got. Nothing is trained.
#
# The idea has two halves, and this page keeps them apart. One is that regions need different numbers of steps. The other is that a few tokens can be computed alone, if they may look at old keys and values of all the others. The first saves nothing by itself; the second is what saves. We ask what each of them costs.

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
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch.utils.flop_counter import FlopCounterMode

from minilib import zoo
from minilib.arms import run_arms
from minilib.attention import record_keys_values, replace_keys_values
from minilib.attention.joint import joint_mask
from minilib.caching import equal_cost_steps, plan_cost
from minilib.costs import mmdit_flops
from minilib.data import shapes
from minilib.kernels.tokens import gather_tokens, partial_attention, scatter_tokens
from minilib.metrics import psnr_to_reference, read_in_batches, scene_scores
from minilib.models import MMDiT
from minilib.models.mmdit_configs import SD3_CONFIGS, mmdit_config_from_diffusers
from minilib.plotting import PALETTE, curve, mean_interval, show_images, use_style
from minilib.profiling import cpu_time, to_meta
from minilib.recipes.scenes import flow_scheduler
from minilib.region_adaptive import (
    RegionAdaptiveEuler,
    linear_ratios,
    pixel_norm,
    pixel_std,
    random_metric,
    rank_correlation,
    update_map,
)
from minilib.region_mmdit import MMDiTTokens, image_to_tokens, partial_mmdit_flops
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each has captions and noise of its own
    images: int  # a seed
    steps: int  # of the sampler to be made faster
    start: int  # the first step that is not dense
    resets: tuple[int, ...]  # dense steps after it
    exact_steps: int  # of the near-exact solution (Heun's method, two calls a step)
    few: int  # steps of the sampler that has few
    batch: int  # of the timing
    jobs: int  # processes


run = Reproduction(
    "ras",
    profile,
    {
        "smoke": Settings((0,), 2, 8, 3, (5,), 8, 6, 2, 1),
        "cpu": Settings((0, 1, 2, 3, 4), 10, 28, 4, (12, 20), 28, 10, 16, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 200, 28, 4, (12, 20), 100, 10, 128, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is this book's MM-DiT, built like that of Stable Diffusion 3 {cite:p}`esser2024scaling`: two streams, image and text, joint attention, a rectified flow. An image of 32 by 32 pixels is 256 tokens of 2 by 2 pixels. Steps, first sparse step and resets are those of the released script for Stable Diffusion 3. Every seed has held-out captions and noise of its own; all arms share them.

# %%
run.show_settings()

# %% [markdown]
# (sec-ras-idea)=
# ## The idea
#
# A rectified flow predicts a velocity $u$ for every token, from data to noise. Euler's method walks against it. Let $x_i$ be the noisy image at noise level $\sigma_i$, falling from 1 to 0; then for each token $j$
#
# $$
# x_{i+1}^{(j)} = x_i^{(j)} + (\sigma_{i+1} - \sigma_i)\, u_i^{(j)} .
# $$ (eq-ras-euler)
#
# In the plain sampler all $u_i^{(j)}$ come from the network. Here only those of a set $A_i$ of *active* tokens do. The others keep what they have:
#
# $$
# u_i^{(j)} = \begin{cases} u_\theta(x_i, \sigma_i)^{(j)} & j \in A_i , \\ u_{i-1}^{(j)} & \text{otherwise.} \end{cases}
# $$ (eq-ras-velocity)
#
# No token ever stands still. A token that is left out for a while takes one long, straight step instead of a few short ones.
#
# **Which tokens?** A number for each token is read off what the network said before: the metric
#
# $$
# R_i^{(j)} = \operatorname{mean}_{\text{pixels of } j}\, \operatorname{std}_{\text{channels}}\, u_{i-1} \;\cdot\; e^{k D_j} ,
# $$ (eq-ras-metric)
#
# where $D_j$ counts the steps in which token $j$ was left out. The exponential is the *starvation guard*: who was left out often moves up. Here the tokens of highest $R$ run, a fixed share of all, the *ratio*.
#
# **How can a few tokens run alone?** Everything in a transformer acts on each token for itself, but attention. There a token asks all others for keys and values. So these are kept from the call in which they were last computed, layer by layer. Active tokens overwrite their own rows, and read all rows: some fresh, some old. The text tokens, few in number, always run.
#
# **Errors gather**, since old values make new ones. So the first steps are dense, and so are a few later ones, the *resets*.
#
# Who is the rival? To keep the velocity of *all* tokens for a step is to take one step of twice the length. So the plain rival, fewer steps of Euler's method, is the same idea without a choice: every region gets as few steps as any other. RAS has to show that an uneven choice is worth more than its price.

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("mmdit_shapes32").to(run.device)
net, side = model.denoiser, model.denoiser.config["sample_size"]
grid = side // net.patch_size
TOKENS, CHANNELS = grid * grid, net.in_channels
T = s.steps


def asked(seed, n=s.images):
    """The captions of a seed."""
    return shapes.sample_scenes(n, torch.Generator().manual_seed(2000 + seed), objects=(1, 3), split="test")


def text_and_noise(seed, n=s.images):
    """States of the captions, of the empty caption, and the noise to start from."""
    tokens = shapes.tokens(asked(seed, n)).to(run.device)
    with torch.no_grad():
        text, null = (model.encode_text(y)._asdict() for y in (tokens, model.null_tokens(*tokens.shape)))
    noise = initial_noise((n, CHANNELS, side, side), torch.Generator().manual_seed(seed), device=run.device)
    return text, null, noise


def levels(steps):
    """Noise levels that fall evenly from 1 to 0."""
    scheduler = flow_scheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    return scheduler.sigmas


text, null, noise = text_and_noise(900, 2)  # for the checks
LENGTH = text["context"].shape[1]
print(
    f"{TOKENS} image tokens of {net.patch_size}x{net.patch_size} pixels, {LENGTH} text tokens, {len(net.blocks)} blocks"
)

# %% [markdown]
# (sec-ras-method)=
# ## The method
#
# First the network. The model can be called in parts: embed the image, run the blocks on any tokens, read out. Positions belong to a token's place in the image, so they are looked up before tokens are taken out. The library's `partial_attention` does the book-keeping of keys and values: a run of all tokens fills `kept`, a run of some overwrites their rows.


# %%
def network(text, kept):
    """run(x, sigma, indices): velocities of the image tokens at `indices` (b, k), or of all."""
    mask = joint_mask(TOKENS, text["context_mask"])  # padding of the text is never read

    @torch.no_grad()
    def run(x, sigma, indices):
        c = F.silu(net.embed_condition(torch.full((len(x),), 1000 * sigma, device=x.device)))
        h = net.embed(net.unpatchify(x, grid, grid))
        places, rows = net.position_ids(grid, grid, device=x.device), None
        if indices is not None:
            h, places = gather_tokens(h, indices), places[indices]
            words = TOKENS + torch.arange(LENGTH, device=x.device).expand(len(x), -1)
            rows = torch.cat([indices, words], dim=1)
        with partial_attention(net, kept, rows):
            h, _ = net.run_blocks(h, c, net.embed_context(text["context"]), places, mask=mask)
        return net.read_out(h, c)

    return run


# %% [markdown]
# Now the sampler, {eq}`eq-ras-velocity` and {eq}`eq-ras-metric` line by line. Each image of a batch chooses its own tokens.


# %%
def region_adaptive(run, x, sigmas, ratio=0.5, start=s.start, resets=s.resets, k=1.0):
    """x: noise as tokens (b, n, f); sigmas: from 1 to 0."""
    idle_number = int((1 - ratio) * x.shape[1])
    drops = torch.zeros(x.shape[:2], device=x.device)
    for i, (sigma, after) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        if i < start or i in resets:
            u = run(x, sigma, None)
        else:
            ranking = (pixel_std(u, CHANNELS) * torch.exp(k * drops)).argsort(dim=1)
            idle, active = ranking[:, :idle_number], ranking[:, idle_number:].sort(dim=1).values
            drops.scatter_add_(1, idle, torch.ones_like(drops))
            u = scatter_tokens(u, run(x, sigma, active), active)
        x = x + (after - sigma) * u
    return x


x = image_to_tokens(noise, net.patch_size)
here = net.unpatchify(region_adaptive(network(text, {}), x, levels(T)), grid, grid)
print("images:", tuple(here.shape))

# %% [markdown]
# The library has the same sampler with more options (`RegionAdaptiveEuler`) and the same network (`MMDiTTokens`), both with tests. The arms below use these.
#
# ### Is it what we say it is?
#
# Six things must hold. Ratio 1 is Euler's method. The loop above and the library's give the same images. The blocks see as many tokens as planned. The velocity of a token that does not run is the old one, bit for bit. If all rows of keys and values are fresh, the tokens that run get exactly what the whole model would give them: so old rows and old velocities are the *only* errors. And the cost is as we say; that is counted further down.


# %%
def regions(network, sampler, x, steps=T):
    """All steps of the library's sampler."""
    return list(sampler.sample(network, network.tokens(x), levels(steps), channels=CHANNELS))


ours = MMDiTTokens(net, text, grid, grid)
scheduler = flow_scheduler()
scheduler.set_timesteps(sigmas=levels(T)[:-1].tolist())
plain = noise
with torch.no_grad():
    for t in scheduler.timesteps:
        velocity = model(plain, t.expand(len(plain)), **text)
        plain = scheduler.step(velocity, t, plain).prev_sample
every = torch.arange(TOKENS, device=run.device).expand(len(noise), -1)
kept_all = MMDiTTokens(net, text, grid, grid)
all_named = RegionAdaptiveEuler(1.0, resets=()).sample(
    lambda x, sigma, indices: kept_all(x, sigma, every if kept_all.caches else None),
    kept_all.tokens(noise), levels(T), channels=CHANNELS,
)  # fmt: skip
dense = [regions(ours, RegionAdaptiveEuler(1.0, resets=()), noise)[-1].x, list(all_named)[-1].x]
run.record("ratio-one", max(float((ours.image(x) - plain).abs().max()) for x in dense))

base = {"start": s.start, "resets": s.resets, "metric": "std", "starvation": 1.0}
library = regions(ours, RegionAdaptiveEuler(0.5, **base), noise)
run.record("same-sampler", float((ours.image(library[-1].x) - here).abs().max()))
idle = [
    (b.velocity - a.velocity)[~b.ran].abs().max()
    for a, b in zip(library, library[1:], strict=False)
    if not b.ran.all()
]
run.record("old-velocity", float(torch.stack(idle).max()))

off, seen = 0, []
hook = net.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
for ratio in (0.25, 0.5, 0.75, linear_ratios(T, 0.75, 0.25)):
    seen.clear()
    sampler = RegionAdaptiveEuler(ratio, **base)
    steps = regions(ours, sampler, noise)
    of = ratio if isinstance(ratio, tuple) else (ratio,) * T
    planned = [
        TOKENS if i < s.start or i in s.resets else TOKENS - int((1 - of[i]) * TOKENS + 1e-9)
        for i in range(T)
    ]
    off += sum(abs(a - b) for a, b in zip(seen, planned, strict=True))
    off += int((steps[-1].updates.sum(1) - sum(planned)).abs().sum())
hook.remove()
run.record("tokens-run", off)

apart, generator = 0.0, torch.Generator().manual_seed(3)
x = ours.tokens(noise)
for number in (64, 128):
    drawn = [torch.randperm(TOKENS, generator=generator)[:number] for _ in range(len(noise))]
    some = torch.stack(drawn).to(run.device)
    for sigma in (0.9, 0.5, 0.1):
        with torch.no_grad():
            whole = ours(x, sigma)  # fills keys and values from this very input
            apart = max(apart, float((ours(x, sigma, some) - gather_tokens(whole, some)).abs().max()))
run.record("fresh-keys-values", apart)

# %%
# NBVAL_CHECK_OUTPUT
print("image tokens not as planned, 4 plans:", off)
print("idle velocities changed by", float(torch.stack(idle).max()))
print("some tokens with fresh keys and values = the whole model:", "PASS" if apart <= 1e-5 else apart)

# %% [markdown]
# ### What it costs
#
# Let $n$ be the image tokens, $l$ the text tokens, $a$ the active ones, $d$ the width of a token. In each block the image stream spends, in multiply-accumulates (MACs), $12 d^2$ a token on its four projections and its feed-forward network, and $2 (n + l)\, d$ a token on attention. Keys number $n + l$ as before: only queries are saved. So with $a$ active tokens a call costs
#
# $$
# C(a) = C(n) - (n - a) \left[ L \left( 12 d^2 + 2 (n + l)\, d \right) + d f \right] ,
# $$ (eq-ras-cost)
#
# with $L$ blocks and $f$ numbers a token at the output. It is a straight line in $a$. What stays at $a = 0$ is the text stream, the modulations and the embeddings.


# %%
def counted(model, config, height, length, numbers):
    """MACs of calls with so many active tokens for one image, on the meta device, where tensors have shapes and no values."""
    ghost, p, macs = to_meta(model), config["patch_size"], []
    n = (height // p) ** 2
    words = {"context": torch.zeros(1, length, config["context_dim"], device="meta")}
    if config.get("pooled_dim"):
        words["pooled"] = torch.zeros(1, config["pooled_dim"], device="meta")
    some = MMDiTTokens(ghost, words, height // p, height // p)
    x = torch.zeros(1, n, p * p * config["in_channels"], device="meta")
    with torch.no_grad():
        some(x, 0.5)
        for active in numbers:
            with FlopCounterMode(display=False) as counter:
                some(x, 0.5, torch.zeros(1, active, dtype=torch.long, device="meta"))
            macs.append(counter.get_total_flops() // 2)
    return macs


def by_formula(config, height, length, active):
    d, n, p = config["hidden_size"], (height // config["patch_size"]) ** 2, config["patch_size"]
    token = config["depth"] * (12 * d * d + 2 * (n + length) * d) + d * p * p * config["in_channels"]
    return mmdit_flops(config, height, height, length) // 2 - (n - active) * token


def saving(config, height, length, ratio, dense=6, steps=28):
    """MACs of the dense sampler over those of the region-adaptive one."""
    n = (height // config["patch_size"]) ** 2
    full, some = (by_formula(config, height, length, a) for a in (n, n - int((1 - ratio) * n)))
    return steps * full / plan_cost(steps, tuple(range(dense)), full, some)


sd3 = mmdit_config_from_diffusers(SD3_CONFIGS["SD3-medium"])
with torch.device("meta"):
    sd3_net = MMDiT(**sd3)
wrong = []
for m, config, height, length, numbers in (
    (net, net.config, side, LENGTH, (1, 32, 64, 128, 255)),
    (sd3_net, sd3, 128, 333, (1, 2048)),
):
    for a, macs in zip(numbers, counted(m, config, height, length, numbers), strict=True):
        wrong.append(abs(macs - by_formula(config, height, length, a)))
run.record("operations", max(wrong))
SD3 = {"config": sd3, "height": 128, "length": 333}
run.record("real-size", saving(**SD3, ratio=0.5))

# %%
# NBVAL_CHECK_OUTPUT
print("counted = formula, 7 times:", "PASS" if max(wrong) == 0 else wrong)
print(f"Stable Diffusion 3: {by_formula(sd3, 128, 333, 4096) / 1e9:.0f} GMAC a dense call")
for ratio in (0.75, 0.5, 0.25, 0.125):
    print(
        f"28 steps, 6 of them dense, ratio {ratio}: {saving(**SD3, ratio=ratio):.2f} times fewer operations"
    )
kept_bytes = 2 * sd3["depth"] * (4096 + 333) * sd3["hidden_size"] * 2
print(f"keys and values kept, half precision: {kept_bytes / 1e9:.2f} GB an image, twice that with guidance")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two nearly coinciding curves, this page's model in light blue and Stable Diffusion 3 in dark blue: the saving in operations against the ratio. It falls from above 3.5 near ratio 0 over about 1.6 at ratio 0.5 to 1 at ratio 1. Two dotted horizontal lines at 1.625 and 2.36 cross them a little below 0.5 and at about 0.2."}, "figure": {"caption": "What there is to save: operations of 28 dense steps over those of 6 dense and 22 sparse ones. Dotted: the paper's speed-ups for Stable Diffusion 3, at comparable human preference and at most. Counted, not timed.", "name": "fig-ras-cost"}}
fig, ax = plt.subplots(figsize=(5.4, 3), layout="constrained")
ratios = torch.linspace(0.02, 1, 50).tolist()
own = {"config": net.config, "height": side, "length": LENGTH}
ax.plot(ratios, [saving(**own, ratio=r) for r in ratios], color=PALETTE[5], label="this page's model")
ax.plot(ratios, [saving(**SD3, ratio=r) for r in ratios], color=PALETTE[0], label="Stable Diffusion 3")
for value in (1.625, 2.36):
    ax.axhline(value, color="0.3", lw=1, ls=":")
    ax.annotate(f"{value}x", (0.99, value + 0.04), fontsize=9, color="0.3", ha="right")
ax.set(xlabel="ratio", ylabel="saving in operations", xlim=(0, 1), ylim=(1, 4.2))
ax.legend()
plt.show()

# %% [markdown]
# Guidance doubles the batch of both samplers, so it changes no factor. The factor of $1.625$ that the authors measured where people had no preference is a little above the count for ratio $0.5$ with six dense steps; we do not know the settings of that run. To reach $2.36$ by operations alone with six dense steps, the ratio has to fall to about a fifth. At ratio $0.5$ the count stays below two even without any dense step.
#
# :::{admonition} In the released code
# :class: tip
# Read in [microsoft/RAS](https://github.com/microsoft/RAS), not run. (1) The option `high_ratio` says from which end of the ranking tokens are left out. By default it is 1, and the tokens of *highest* metric are left out; the script for Stable Diffusion 3 sets 0.3. In
# [the scheduler](https://github.com/microsoft/RAS/blob/main/src/ras/schedulers/ras_scheduling_flow_match_euler_discrete.py) being left out *raises* a token's rank: as we read it, this protects tokens at the low end, and at the high end it does the opposite. (2) With `high_ratio` 0 the slice `[-0:]` takes all tokens. With 0.3 both ends are rounded down, so that one token
# more may run than planned. (3) In [the manager](https://github.com/microsoft/RAS/blob/main/src/ras/utils/ras_manager.py) `starvation_scale` is not among the options that are copied, so the script's 1 seems to have no effect, and the default of 0.1 holds. The check of a changing number of skipped tokens reads `self.weight`, which is not set. (4) The counts of the guard
# are set to zero at the first step only, not at resets. (5) The selection works with a batch of one image; with guidance its two halves share the tokens.
# :::
#
# (sec-ras-experiment)=
# ## The experiment
#
# The reference is the dense sampler: Euler's method, 28 even steps, no guidance. Every arm starts from the same noise and captions. We measure the peak signal-to-noise ratio (PSNR) to the image of the reference, in decibels: twenty more are a tenth of the error, and an error of one grey level in 255 is 48 dB.
#
# :::{table} The arms. Sparse steps have ratio 0.5 where nothing else is said.
# :name: tab-ras-arms
#
# | arm | what is different | question |
# |---|---|---|
# | RAS | metric std, $k = 1$, kept keys and values, ratio 0.25, 0.5, 0.75 | the method |
# | fewer steps | Euler, as many steps as the operations (or updates) of an arm allow, rounded up | the trivial rival |
# | fresh | keys and values of all tokens computed in every step; velocities old as in RAS | the first half of the idea alone; it saves nothing |
# | mirror | velocities of all tokens fresh; keys and values old, of the same tokens in the same steps as in RAS | the second half alone; it saves nothing |
# | dropped | active tokens see one another and the text only | are the kept rows needed? |
# | random, turns | a new random half in each step; chance, but who was left out comes first | does the metric matter? |
# | change | the metric is the last change of the token's velocity | a better metric? |
# | hindsight | the network is asked first, and those tokens run whose old velocity is most wrong | what perfect foresight of one step is worth |
# | $k = 0$, $0.1$ | weaker guard | does the guard matter? |
# | low end | tokens of lowest metric run, as by the released default | which end? |
# | script | 0.3 of the idle tokens from the high end, $k = 0.1$ and $k = 1$ | the released script, as it runs and as it reads |
# | no resets | all 24 later steps sparse, with a ratio that gives as many updates | are resets worth their cost? |
# | few steps, guided | a sampler of ten steps; guidance 3 | the paper's other cases |
# :::
#
# Two references need a word. *Fewer steps* share part of their error with the dense sampler, since both are Euler's method. So we also compare with a *near-exact* solution of the same differential equation, by Heun's method, which is of second order.
#
# The arms with *fresh* rows are controls. They run the whole network in each step and throw a part of the answer away. What they show is what RAS could do if keys and values did not age. We compare them at equal *updates*: a token that gets a new velocity counts as one.


# %%
class Arm(NamedTuple):
    steps: int = T
    ratio: float = 1.0
    metric: str = "std"
    k: float = 1.0
    keys_values: str = "kept"
    high: float = 0.0  # share of the idle tokens that come from the high end of the ranking
    resets: tuple[int, ...] = s.resets
    scale: float = 1.0  # of guidance
    how: str = "regions"  # or "heun", "mirror"

    def sampler(self, metric=None):
        return RegionAdaptiveEuler(self.ratio, s.start, self.resets, metric or self.metric, self.k, self.high)

    @property
    def updates(self):
        """In dense calls, if a token always cost the same."""
        return self.steps * self.sampler(metric="std").share(self.steps, TOKENS)

    @property
    def cost(self):
        """In dense calls, by operations."""
        active = self.sampler(metric="std").active(self.steps, TOKENS)
        calls = [partial_mmdit_flops(net.config, side, side, LENGTH, a) for a in active]
        return sum(calls) / mmdit_flops(net.config, side, side, LENGTH)


def euler(steps, scale=1.0):
    return Arm(steps, resets=(), scale=scale)


RATIOS = (0.25, 0.5, 0.75)
ARMS = {"full": euler(T), "exact": euler(s.exact_steps)._replace(how="heun")}
for r in RATIOS:
    ARMS[f"RAS {r}"] = Arm(ratio=r)
    ARMS[f"fresh, change {r}"] = Arm(ratio=r, metric="change", k=0.1, keys_values="fresh")
    ARMS[f"fresh, hindsight {r}"] = Arm(ratio=r, metric="hindsight", k=0.0, keys_values="fresh")
ARMS["fresh, std"] = Arm(ratio=0.5, keys_values="fresh")
ARMS["fresh, random"] = Arm(ratio=0.5, metric="random", k=0.0, keys_values="fresh")
ARMS["mirror"] = Arm(ratio=0.5, how="mirror")
ARMS["dropped"] = Arm(ratio=0.5, keys_values="dropped")
ARMS["random"] = Arm(ratio=0.5, metric="random", k=0.0)
ARMS["turns"] = Arm(ratio=0.5, metric="turns")
ARMS["change"] = Arm(ratio=0.5, metric="change")
ARMS["hindsight"] = Arm(ratio=0.5, metric="hindsight", k=0.0)
for k in (0.0, 0.1):
    ARMS[f"k = {k:g}"] = Arm(ratio=0.5, k=k)
ARMS["low end"] = Arm(ratio=0.5, k=0.1, high=1.0)
ARMS["script, as it runs"] = Arm(ratio=0.5, k=0.1, high=0.3)
ARMS["script, as it reads"] = Arm(ratio=0.5, k=1.0, high=0.3)
late = T - s.start  # steps that are not dense without resets
ARMS["no resets"] = Arm(ratio=(0.5 * (late - len(s.resets)) + len(s.resets)) / late, resets=())
ARMS["few, RAS"] = Arm(s.few, ratio=0.5, resets=())
ARMS["guided, full"] = euler(T, 3.0)
ARMS["guided, RAS"] = Arm(ratio=0.5, scale=3.0)
RIVAL, EVEN = {}, {}  # Euler at no fewer operations; at no fewer updates
for name in [name for name in ARMS if "RAS" in name]:
    rival = euler(equal_cost_steps(ARMS[name].cost, 1.0), ARMS[name].scale)
    RIVAL[name] = f"{'guided, ' if 'guided' in name else ''}Euler-{rival.steps}"
    ARMS[RIVAL[name]] = rival
for name in [name for name in ARMS if "fresh" in name]:
    EVEN[name] = f"Euler-{equal_cost_steps(ARMS[name].updates, 1.0)}"
    ARMS[EVEN[name]] = euler(int(EVEN[name].split("-")[1]))
FEWEST = f"Euler-{max(2, T // 4)}"  # one more point for the figure
ARMS[FEWEST] = euler(max(2, T // 4))

# %% [markdown]
# Two controls are not in the library. *Hindsight* asks the whole network before it chooses. *Mirror* replays the choice of an RAS run: all tokens get fresh velocities, but in every layer the rows of keys and values of idle tokens stay what they were.


# %%
def choose(arm, network, text, seed):
    """The network to run, and the metric."""
    generator = torch.Generator().manual_seed(seed)
    if arm.metric in ("random", "turns"):
        return network, random_metric(generator, 1.0 if arm.metric == "random" else 1e-3)
    if arm.metric != "hindsight":
        return network, arm.metric
    whole = MMDiTTokens(net, text, grid, grid, keys_values="fresh")
    answer = {}

    def hindsight(state):
        answer["u"] = whole(state.x, state.sigma)
        return pixel_norm(answer["u"] - state.velocity, CHANNELS)

    def asked_already(x, sigma, indices):
        return network(x, sigma) if indices is None else gather_tokens(answer["u"], indices)

    return (asked_already if arm.keys_values == "fresh" else network), hindsight


def mirror(network, x, steps):
    """Euler's method; keys and values of a token are renewed only where it ran in `steps`."""
    after, rows = {}, None

    def edit(name, k, v):
        if name in after:
            k, v = (torch.where(rows, new, old) for new, old in zip((k, v), after[name], strict=True))
        after[name] = k, v
        return k, v

    for step, sigma_after in zip(steps, levels(len(steps))[1:].tolist(), strict=True):
        words = torch.ones(len(x), LENGTH, dtype=torch.bool, device=x.device)
        rows = torch.cat([step.ran, words], dim=1)[:, None, :, None]
        with torch.no_grad(), replace_keys_values(net, edit):
            x = x + (sigma_after - step.sigma) * network(x, step.sigma)
    return x


@torch.no_grad()
def heun(network, x, steps):
    sigmas = levels(steps).tolist()
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        u = network(x, sigma)
        ahead = x + (after - sigma) * u
        x = ahead if after == 0 else x + (after - sigma) * (u + network(ahead, after)) / 2
    return x


def draw(arm, seed):
    """The images of one arm and seed, and which tokens ran; for the dense sampler also all velocities."""
    text, null, noise = text_and_noise(seed)
    network = MMDiTTokens(
        net, text, grid, grid, keys_values=arm.keys_values, null=null, guidance_scale=arm.scale
    )
    if arm.how == "heun":
        return {"x": network.image(heun(network, network.tokens(noise), arm.steps)).clamp(-1, 1).cpu()}
    run_some, metric = choose(arm, network, text, seed)
    steps = list(
        arm.sampler(metric).sample(run_some, network.tokens(noise), levels(arm.steps), channels=CHANNELS)
    )
    x = steps[-1].x
    if arm.how == "mirror":
        fresh = MMDiTTokens(net, text, grid, grid, keys_values="fresh")
        x = mirror(fresh, fresh.tokens(noise), steps)
    out = {"x": network.image(x).clamp(-1, 1).cpu(), "ran": torch.stack([step.ran for step in steps]).cpu()}
    if arm == ARMS["full"]:
        out["velocities"] = torch.stack([step.velocity for step in steps]).cpu()
    return out


results = run_arms(draw, ARMS, s.seeds, s.jobs)
images = {name: [result["x"] for result in of] for name, of in results.items()}
print({name: f"{arm.cost:.1f}" for name, arm in ARMS.items() if name in RIVAL})

# %% [markdown]
# ## Results
#
# ### The picture: where the network worked
#
# {numref}`fig-ras-heat` counts, for each token of a finished image, in how many steps it went through the network.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Five rows of six panels. First row: scenes of coloured shapes on a dark ground. Below, maps of 16 by 16 tokens coloured by the number of updates, with the outlines of the shapes in light blue. Second row, metric std with k = 1: almost one colour everywhere. Third row, std with k = 0: a salt-and-pepper pattern that ignores the outlines. Fourth row, last change: bright in and around the shapes, darker elsewhere. Last row, hindsight: almost the same, bright spots that cover the shapes on a mottled darker ground."}, "figure": {"caption": "The picture to remember: how often each token ran, over the finished image. Light blue: outlines of what the sampler drew. All rows have ratio 0.5, so the same mean. The lower two are idealised: their keys and values are fresh. The first captions of the first seed, not chosen.", "name": "fig-ras-heat"}}
MAPS = {
    "std, $k = 1$": "RAS 0.5",
    "std, $k = 0$": "k = 0",
    "last change": "fresh, change 0.5",
    "hindsight": "fresh, hindsight 0.5",
}


def bare(axes):
    """Pictures have no axes."""
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(False)


columns, middle = min(6, s.images), torch.arange(side) + 0.5
fig, axes = plt.subplots(len(MAPS) + 1, columns, figsize=(7, 5.6), layout="constrained", squeeze=False)
finished = images["full"][0][:columns]
solid = (finished.amax(1) > -0.4).float()  # the ground is darker than any colour
for ax, picture in zip(axes[0], finished, strict=True):
    ax.imshow(((picture + 1) / 2).permute(1, 2, 0))
axes[0, 0].set_ylabel("image")
for row, (label, name) in zip(axes[1:], MAPS.items(), strict=True):
    counts = update_map(results[name][0]["ran"].sum(0), grid, grid)
    for ax, count, outline in zip(row, counts, solid, strict=False):
        shown = ax.imshow(
            count, cmap="inferno", vmin=s.start + len(s.resets), vmax=T, extent=(0, side, side, 0)
        )
        ax.contour(middle, middle, outline, levels=[0.5], colors=PALETTE[5], linewidths=1.2)
    row[0].set_ylabel(label)
bare(axes)
fig.colorbar(shown, ax=axes, label="updates", shrink=0.7)
plt.show()

# %% [markdown]
# Compare the rows. With the metric *std* and no guard, who runs has little to do with the shapes. With the guard at $k = 1$ nearly everybody runs equally often. The last change of the velocity, and hindsight, find the shapes. {numref}`fig-ras-film` shows single steps of the first image.

# %% tags=["hide-input"] mystnb={"image": {"alt": "One image at several steps. First row: the clean image that the network aims at, two blue shapes on a dark ground, clear from the first of these steps on. Below, the tokens that run in that step, in yellow: for std a scatter without form, for the last change and for hindsight clusters around the shapes with a scatter of other tokens."}, "figure": {"caption": "Focus over time. Above: the clean image that the dense sampler aims at. Below: the tokens that run in that step (yellow). The first caption of the first seed, not chosen.", "name": "fig-ras-film"}}
sparse = [i for i in range(T) if i >= s.start and i not in s.resets]
picked = [sparse[round(q * (len(sparse) - 1) / 5)] for q in range(6)]
velocities = results["full"][0]["velocities"]
x = image_to_tokens(text_and_noise(s.seeds[0])[2], net.patch_size)[:1].cpu()
aims, sigmas = [], levels(T).tolist()
for i in range(T):
    aims.append(net.unpatchify(x - sigmas[i] * velocities[i, :1], grid, grid)[0])
    x = x + (sigmas[i + 1] - sigmas[i]) * velocities[i, :1]
fig, axes = plt.subplots(len(MAPS) + 1, 6, figsize=(7, 5.9), layout="constrained")
for column, i in enumerate(picked):
    axes[0, column].imshow(((aims[i].clamp(-1, 1) + 1) / 2).permute(1, 2, 0))
    axes[0, column].set_title(f"step {i}", fontsize=10)
    for ax, name in zip(axes[1:, column], MAPS.values(), strict=True):
        ax.imshow(update_map(results[name][0]["ran"][i, :1], grid, grid)[0], cmap="cividis", vmin=0, vmax=1)
for ax, label in zip(axes[:, 0], ["aim", *MAPS], strict=True):
    ax.set_ylabel(label)
bare(axes)
plt.show()

# %% [markdown]
# ### What does the metric read?
#
# The paper's premise is continuity: the tokens in focus now are those in focus a step later. It can be tested on the dense sampler alone. We rank the tokens by the metric at each step, and compare rankings by Spearman's correlation: 1 if two orders are the same, 0 if they have nothing to do with each other.
#
# A high correlation says less than it seems to. The velocity of a rectified flow is noise minus data, and the noise is *one* picture, drawn once. It never changes. So the ranking may be stable because it is that of the noise. We therefore also compare it with the same statistic of the initial noise alone. And we ask what a metric is for: a token should run where its old velocity would be wrong. So how well does a metric foretell the change of velocity in the coming step?


# %%
def of_seed(result, noise):
    """(steps, images, tokens): the released metric, the change of the velocity, and the metric of the noise alone."""
    u = result["velocities"]
    std = torch.stack([pixel_std(v, CHANNELS) for v in u])
    change = torch.stack([pixel_norm(b - a, CHANNELS) for a, b in zip(u, u[1:], strict=False)])
    return std, change, pixel_std(image_to_tokens(noise, net.patch_size).cpu(), CHANNELS)


watched = [of_seed(r, text_and_noise(seed)[2]) for r, seed in zip(results["full"], s.seeds, strict=True)]
lags = [lag for lag in (1, 2, 4, 8, 16) if lag < T - 1]


def by_lag(index):
    """(seeds, lags): mean rank correlation of steps so far apart."""
    kept = [of[index] for of in watched]
    return torch.stack(
        [torch.stack([rank_correlation(m[:-lag], m[lag:]).mean() for lag in lags]) for m in kept]
    )


lag_std, lag_change = by_lag(0), by_lag(1)
to_noise = torch.stack([rank_correlation(std, noise.expand_as(std)).mean() for std, _, noise in watched])
others = torch.stack([rank_correlation(std, std.roll(1, 1)).mean() for std, _, _ in watched])
# In steps 1 to T - 2 both are known, and the change to come.
tells = {
    "std": [rank_correlation(std[1:-1], change[1:]).mean() for std, change, _ in watched],
    "last change": [rank_correlation(change[:-1], change[1:]).mean() for _, change, _ in watched],
}
tells = {name: torch.stack(values) for name, values in tells.items()}
run.record("continuity", lag_std[:, 0])
run.record("lag", (lag_std[:, :-1] - lag_std[:, 1:]).amin(1))
run.record("the-noise", to_noise)
run.record("foresight", tells["last change"] - tells["std"])
print(
    "std, by lag:        ", {lag: f"{v:.3f}" for lag, v in zip(lags, lag_std.mean(0).tolist(), strict=True)}
)
print(
    "last change, by lag:",
    {lag: f"{v:.3f}" for lag, v in zip(lags, lag_change.mean(0).tolist(), strict=True)},
)
print(
    f"std with the std of the initial noise: {to_noise.mean():.3f}; with another image: {others.mean():.3f}"
)
for name, value in tells.items():
    print(f"correlation with the change to come, {name}: {value.mean():.2f}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: rank correlation against lag. The line of the metric std stays at the top, near 1; the line of the last change lies lower, rises a little and then falls; a dotted line near 0.9 marks the correlation of std with the noise, a dashed line at 0 that of different images. Right: two rows of small maps. Std of the initial noise, and the metric at two steps: the same speckle three times. Below, the change of the velocity at three steps: speckled at first, later bright at the shapes."}, "figure": {"caption": "What the metrics see. Left: how alike rankings are, by the number of steps between them; band: 90 % interval over seeds. Right: maps of one image, each in its own scale.", "name": "fig-ras-metric"}}
fig = plt.figure(figsize=(7, 3.3), layout="constrained")
left_part, right_part = fig.subfigures(1, 2, width_ratios=(1, 1.15))
ax = left_part.subplots()
curve(ax, lags, lag_std, "std", PALETTE[0])
curve(ax, lags, lag_change, "last change", PALETTE[1])
ax.axhline(float(to_noise.mean()), color="0.3", ls=":", lw=1.2, label="std, to the noise")
ax.axhline(float(others.mean()), color="0.3", ls="--", lw=1.2, label="std, other image")
ax.set(xlabel="steps between", ylabel="rank correlation", ylim=(-0.1, 1.05), xscale="log")
ax.set_xticks(lags, [str(lag) for lag in lags])
ax.minorticks_off()
ax.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 0.12))
std, change, start_std = watched[0]
early, late_step = T // 4, T - 3
maps = [
    ("noise alone", start_std[0]), (f"std, step {early}", std[early, 0]), (f"std, step {late_step}", std[late_step, 0]),
    (f"change, {early}", change[early - 1, 0]), (f"change, {T // 2}", change[T // 2 - 1, 0]), (f"change, {late_step}", change[late_step - 1, 0]),
]  # fmt: skip
panels = right_part.subplots(2, 3)
for ax, (title, values) in zip(panels.flat, maps, strict=True):
    ax.imshow(values.view(grid, grid), cmap="viridis")
    ax.set_title(title, fontsize=9)
bare(panels)
plt.show()

# %% [markdown]
# ### At equal cost
#
# Now the main question, in {numref}`fig-ras-pareto`. For the real method the horizontal axis is operations. For the idealised one, which saves none, it is updates: what it would cost if old keys and values were as good as fresh ones.


# %%
def near(name, reference="full"):
    """Mean PSNR of an arm to the images of a reference arm, in dB: one number a seed."""
    pairs = zip(images[name], images[reference], strict=True)
    return torch.stack([psnr_to_reference(x, y).mean() for x, y in pairs])


asking = [name for name in ARMS if "guided" not in name]
psnr = {name: near(name) for name in asking if name != "full"}
to_exact = {name: near(name, "exact") for name in asking if name != "exact"}
for r in RATIOS:
    run.record(f"pareto-r{r * 100:.0f}", psnr[f"RAS {r}"] - psnr[RIVAL[f"RAS {r}"]])
run.record("pareto-exact", to_exact["RAS 0.5"] - to_exact[RIVAL["RAS 0.5"]])
run.record("pareto-few", to_exact["few, RAS"] - to_exact[RIVAL["few, RAS"]])
guided = {name: near(name, "guided, full") for name in ("guided, RAS", RIVAL["guided, RAS"])}
run.record("pareto-guided", guided["guided, RAS"] - guided[RIVAL["guided, RAS"]])
ideal = {name: psnr[name] - psnr[EVEN[name]] for name in EVEN}
run.record("ideal-hindsight", ideal["fresh, hindsight 0.5"])
run.record("ideal-random", psnr["fresh, hindsight 0.5"] - psnr["fresh, random"])
run.record("ideal-change", ideal["fresh, change 0.5"])
run.record("ideal-change-exact", to_exact["fresh, change 0.5"] - to_exact[EVEN["fresh, change 0.5"]])
run.record("ideal-std", ideal["fresh, std"])


def line(name, rival, at, value, other):
    print(
        f"{name:22s} {at:5.1f} {value.mean():6.1f} dB   {rival:10s} {other.mean():6.1f} dB {(value - other).mean():+6.1f}"
    )


print(f"to the dense sampler ({T} steps), by operations in dense calls")
for r in reversed(RATIOS):
    name = f"RAS {r}"
    line(name, RIVAL[name], ARMS[name].cost, psnr[name], psnr[RIVAL[name]])
line("guided, RAS 0.5", RIVAL["guided, RAS"].split()[-1], ARMS["guided, RAS"].cost, *guided.values())
print("to the near-exact solution")
for name in ("RAS 0.5", "few, RAS"):
    line(name, RIVAL[name], ARMS[name].cost, to_exact[name], to_exact[RIVAL[name]])
line("fresh, change 0.5", EVEN["fresh, change 0.5"], ARMS["fresh, change 0.5"].updates, to_exact["fresh, change 0.5"], to_exact[EVEN["fresh, change 0.5"]])  # fmt: skip
print("to the dense sampler, idealised: fresh keys and values, by updates in dense calls")
for name in EVEN:
    line(name, EVEN[name], ARMS[name].updates, psnr[name], psnr[EVEN[name]])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, PSNR against cost in dense calls. Left, to the dense sampler: the dashed grey line of Euler with fewer steps rises; the dark blue line of RAS with kept keys and values lies far below it; the hollow orange line of the last change with fresh keys and values lies above it at every point, the hollow green line of hindsight far above. Right, to the near-exact solution: the same order; the two hollow lines bend towards a dotted line, the error of the dense sampler."}, "figure": {"caption": "Nearness against cost. Filled: real samplers, by operations. Hollow: idealised ones with fresh keys and values, by updates; they save nothing. Points of a line differ in the ratio, or in the number of steps. Left: to the dense sampler. Right: to the near-exact solution; dotted: the dense sampler itself. Bars: 90 % intervals over seeds.", "name": "fig-ras-pareto"}}
LINES = {
    "Euler, fewer steps": (sorted((n for n in psnr if n.startswith("Euler")), key=lambda n: ARMS[n].steps), "0.35", "s--", True),
    "RAS: std, kept": ([f"RAS {r}" for r in RATIOS], PALETTE[0], "o-", True),
    "last change, fresh": ([f"fresh, change {r}" for r in RATIOS], PALETTE[1], "^-", False),
    "hindsight, fresh": ([f"fresh, hindsight {r}" for r in RATIOS], PALETTE[2], "v-", False),
}  # fmt: skip
fig, axes = plt.subplots(1, 2, figsize=(7, 3.7), layout="constrained")
for ax, values, title in (
    (axes[0], psnr, "to the dense sampler"),
    (axes[1], to_exact, "to the near-exact solution"),
):
    for label, (names, colour, style, real) in LINES.items():
        mean, low, high = mean_interval(torch.stack([values[name] for name in names], dim=1))
        at = [ARMS[name].cost if real else ARMS[name].updates for name in names]
        bars = torch.stack([mean - low, high - mean])
        fill = colour if real else "white"
        ax.errorbar(at, mean, bars, fmt=style, ms=6, mfc=fill, lw=1.4, color=colour, label=label, capsize=2)
    ax.set(xlabel=f"cost in dense calls (dense sampler: {T})", ylabel="PSNR in dB", title=title)
axes[0].margins(y=0.12)
axes[1].axhline(float(to_exact["full"].mean()), color="k", lw=1, ls=":")
for r in RATIOS:
    point = (ARMS[f"RAS {r}"].cost, float(psnr[f"RAS {r}"].mean()))
    axes[0].annotate(
        f"{r}", point, (0, -13), textcoords="offset points", fontsize=9, color=PALETTE[0], ha="center"
    )
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4, fontsize=9)
plt.show()

# %% [markdown]
# ### Where does the error come from?
#
# RAS uses two kinds of old values. Which of them ages faster? Think of a network that knows the image already: its velocity, noise minus data, is the same at every step, while the noisy image $x_i$ moves from one to the other all the time. Keys and values are made from $x_i$ and from the time. So they *have* to change, even where the velocity stands still. {numref}`fig-ras-drift` measures both along the dense sampler.


# %%
def per_step(sequence):
    """Relative change from each step to the next."""
    return torch.stack(
        [(b - a).norm() / a.norm() for a, b in zip(sequence, sequence[1:], strict=False)]
    ).cpu()


def drift(seed):
    """(3, steps - 1): velocities, keys and values, the latter means over the layers; two images."""
    text, _, noise = text_and_noise(seed, 2)
    dense = MMDiTTokens(net, text, grid, grid, keys_values="fresh")
    with record_keys_values(net, tokens=slice(0, TOKENS)) as calls:
        steps = regions(dense, RegionAdaptiveEuler(1.0, resets=()), noise)
    layers = [[per_step([call[part] for call in of]) for of in calls.values()] for part in (0, 1)]
    return torch.stack(
        [per_step([step.velocity for step in steps]), *(torch.stack(of).mean(0) for of in layers)]
    )


drifts = torch.stack([drift(seed) for seed in s.seeds])
typical = drifts.median(dim=2).values
run.record("drift", typical[:, 1:].mean(1) / typical[:, 0])
print(
    {
        name: f"{v:.1%}"
        for name, v in zip(("velocities", "keys", "values"), typical.mean(0).tolist(), strict=True)
    }
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Relative change from step to step on a logarithmic axis. Three lines in the shape of a bath tub. The velocities lie at about half a percent in the middle and rise steeply at both ends; keys and values lie at two to five percent in the middle, far above, and rise at both ends too. In the first step keys and velocities change alike."}, "figure": {"caption": "What ages. Relative change from one step to the next along the dense sampler, keys and values as means over the layers; band: 90 % interval over seeds.", "name": "fig-ras-drift"}}
fig, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
for i, (label, colour) in enumerate(
    (("velocities", PALETTE[1]), ("keys", PALETTE[5]), ("values", PALETTE[0]))
):
    curve(ax, range(1, T), drifts[:, i], label, colour)
ax.set(xlabel="step", ylabel="relative change", yscale="log")
ax.legend(ncol=3, loc="upper center")
plt.show()

# %% [markdown]
# Each kind can also be made fresh alone, with the same tokens active in the same steps. {numref}`fig-ras-parts` has this test, and the ablations.

# %%
run.record("keys-values", psnr["RAS 0.5"] - psnr["dropped"])
run.record("guard", psnr["RAS 0.5"] - psnr["k = 0"])
run.record("focus", psnr["RAS 0.5"] - psnr["random"])
run.record("turns", psnr["RAS 0.5"] - psnr["turns"])
run.record("ends", psnr["k = 0.1"] - psnr["low end"])
run.record("resets", psnr["RAS 0.5"] - psnr["no resets"])
run.record("stale", psnr["fresh, std"] - psnr["RAS 0.5"])
run.record("mirror", psnr["fresh, std"] - psnr["mirror"])

oracle = zoo.load("oracle_shapes32").to(run.device)
for name in ("full", "RAS 0.5", "RAS 0.25", "dropped"):
    scored = [
        scene_scores(read_in_batches(oracle, x.to(run.device)).cpu(), asked(seed))["object"].nanmean()
        for seed, x in zip(s.seeds, images[name], strict=True)
    ]
    if name == "full":
        right_full = torch.stack(scored)
    if name == "RAS 0.5":
        run.record("accuracy", torch.stack(scored) - right_full)
    print(f"{name:9s} objects right: {torch.stack(scored).mean():.1%}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Dots with intervals, PSNR to the dense sampler at ratio 0.5, in groups. What is old: only velocities, far right; only keys and values, far left of it; both, at the same place as keys and values alone; no rows kept, far to the left. Who runs: std and turns near each other, random, last change and hindsight further left. The guard: k = 1, 0.1 and 0 falling; the two readings of the script lie between, the low end close to k = 0. Resets: without them a little further right than with them. A dashed line, Euler at equal operations, lies to the right of every dot."}, "figure": {"caption": "What matters at ratio 0.5. Blue: RAS as in the other figures. The first two rows are controls and save nothing. Dashed: Euler at no fewer operations. Bars: 90 % intervals over seeds.", "name": "fig-ras-parts"}}
GROUPS = {
    "what is old": {"velocities only": "fresh, std", "keys, values only": "mirror", "both (RAS)": "RAS 0.5", "both, rows dropped": "dropped"},
    "who runs": {"std (RAS)": "RAS 0.5", "turns": "turns", "random": "random", "last change": "change", "hindsight": "hindsight"},
    "guard and end": {"$k = 1$ (RAS)": "RAS 0.5", "$k = 0.1$": "k = 0.1", "$k = 0$": "k = 0", "$k = 0.1$, low end": "low end", "script, as it runs": "script, as it runs", "script, as it reads": "script, as it reads"},
    "resets": {"two (RAS)": "RAS 0.5", "none": "no resets"},
}  # fmt: skip
fig, axes = plt.subplots(
    len(GROUPS),
    1,
    figsize=(6.6, 5.6),
    layout="constrained",
    sharex=True,
    height_ratios=[len(g) for g in GROUPS.values()],
)
for ax, (title, group) in zip(axes, GROUPS.items(), strict=True):
    for at, name in enumerate(group.values()):
        mean, low, high = mean_interval(psnr[name])
        colour = PALETTE[0] if name == "RAS 0.5" else "0.35"
        ax.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, ms=6, capsize=3)
    ax.axvline(float(psnr[RIVAL["RAS 0.5"]].mean()), color="k", ls="--", lw=1)
    ax.set_yticks(range(len(group)), list(group))
    ax.set(ylim=(len(group) - 0.5, -0.5))
    ax.set_title(title, fontsize=10, loc="left")
axes[-1].set_xlabel("PSNR to the dense sampler in dB")
plt.show()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of eight small images of coloured shapes on a dark ground. Dense, RAS at 0.5, RAS at 0.25 and Euler at equal cost look alike; in the last row, with dropped keys and values, shapes are in place and several have frayed outlines."}, "figure": {"caption": "What it looks like. The first captions of the first seed, not chosen; at the left the mean PSNR to the dense sampler, over all images of all seeds.", "name": "fig-ras-samples"}}
rows = ["full", "RAS 0.5", "RAS 0.25", RIVAL["RAS 0.25"], "dropped"]
labels = ["dense"] + [f"{name}\n{float(psnr[name].mean()):.1f} dB" for name in rows[1:]]
columns = min(8, s.images)
fig, ax = plt.subplots(figsize=(6.6, 4.1), layout="constrained")
show_images(torch.cat([images[name][0][:columns] for name in rows]), columns, ax=ax, row_labels=labels)
plt.show()

# %% [markdown]
# ### What is it worth in seconds?
#
# A sparse call also ranks tokens, takes them out and puts them back. We time a dense and a sparse call in turns, choice included, take the least of five, and add up.

# %%
_, _, z = text_and_noise(901, s.batch)
network_timed = MMDiTTokens(net, text_and_noise(901, s.batch)[0], grid, grid)
z = network_timed.tokens(z)
two = torch.tensor([1.0, 0.9, 0.8])
ratios = []


def timed(ratio, start):
    """Two steps of the sampler: the second is dense or sparse."""
    sampler = RegionAdaptiveEuler(ratio, start, (), starvation=1.0)
    return list(sampler.sample(network_timed, z, two, channels=CHANNELS))[-1].x.sum().item()


for _ in s.seeds:
    both, mixed = cpu_time(lambda: timed(1.0, 2)), cpu_time(lambda: timed(0.5, 1))
    dense_s, sparse_s = both / 2, mixed - both / 2
    ratios.append(T * dense_s / plan_cost(T, tuple(range(T - len(sparse))), dense_s, sparse_s))
run.record("speed", ratios)
display(
    Markdown(
        f"A sparse call takes {sparse_s / dense_s:.0%} of the time of a dense one, and "
        f"{by_formula(net.config, side, LENGTH, TOKENS // 2) / by_formula(net.config, side, LENGTH, TOKENS):.0%} of its operations."
    )
)

# %%
run.report()

# %% [markdown]
# **What the table says, in words.** The exact claims hold: the sampler does what it should, runs as many tokens as planned, and costs what the formula says. By that formula the released settings save more than a third of the operations at Stable Diffusion 3's size (*real-size*). With fresh rows a few tokens get exactly what the whole model gives them. So whatever is lost is lost by age, of velocities or of keys and values.
#
# **The first half of the idea is right.** Regions do need different numbers of steps. With fresh keys and values and a choice in hindsight, uneven steps come far nearer to the dense sampler than even steps with as many updates (*ideal-hindsight*), and it is the choice that does it (*ideal-random*). Hindsight cannot be had. But the last change of a token's velocity can, and it costs nothing. With it, and a weak guard, uneven steps still beat even ones
# (*ideal-change*), also against the near-exact solution (*ideal-change-exact*); but less than half of the gain of hindsight, in decibels, is left. The maps in {numref}`fig-ras-heat` show why: both find the shapes.
#
# **The released metric is another matter.** It is as continuous as the paper says (*continuity*), and so much so that the fall with distance is real but tiny (*lag*). But here its ranking is mostly that of the noise image, which is drawn once and never changes (*the-noise*), and it foretells the coming change of the velocity less well than the last change does (*foresight*). So its focus has little to do with the shapes. A strong guard then hides that: at $k = 1$ the tokens nearly take turns. Look at
# *guard* and *focus* together with *turns*: the guard is worth a lot, and so is the metric against a random half, but of that last advantage only about a third is left when the control takes turns too, just enough for the threshold. *Ideal-std* is contradicted: with fresh rows, this metric at $k = 1$ does slightly worse than even steps with as many updates. The likely reason is the one above: it spends its updates without regard to the shapes. In latents of photographs the data may be a larger part of what varies from place to place; there the metric may well see objects. This page cannot say.
#
# **The second half is what costs.** The claims that begin with *pareto* put the real method against fewer steps at equal operations. All six are contradicted, by a wide margin: fewer steps come nearer at every ratio, with ten steps, with guidance, and against the near-exact solution. That the rival's steps are rounded up does not decide it: in {numref}`fig-ras-pareto` the line of RAS lies far below that of fewer steps, by much more than one step is worth.
# Other metrics, guards, ends of the ranking and no resets were tried at ratio 0.5; none of them reaches the dashed line in {numref}`fig-ras-parts`.
#
# *Stale*, *mirror* and *drift* say why. Make keys and values fresh, and most of the error goes. Make velocities fresh instead, and all of it stays: see the first group in {numref}`fig-ras-parts`. Along most of the way of this rectified flow velocities are nearly constant, keys and values are not; only at the two ends do velocities change fast as well.
# What fewer steps keep is the first kind; what RAS has to keep besides is the second. Age is not the whole reason, though. With fresh rows the released metric would still not win, as *ideal-std* shows: it takes fresh rows *and* a better choice.
#
# That also explains the ablations. With kept rows it no longer pays to look where the velocity changes: hindsight, the best choice of ours with fresh rows, does badly. The likely reason: it leaves the ground alone for many steps, and rows of the ground grow old for everyone who reads them. What counts then is that no row gets old, and taking turns is good at that. Exercise 1 checks this: age orders the arms well, but not fully. It also explains *ends*: if the low end runs and the
# guard raises those who were left out, they stay out. The two readings of the released script, which leave tokens out at both ends, lie between, and behind RAS as it is run here. *Keys-values* is confirmed by a wide margin: old rows are far better than none. *Resets* is contradicted: two dense steps do slightly but clearly worse than
# the same number of updates spread evenly. Spread evenly, they keep rows a little younger in every sparse step, which is the likely reason; it was not tested. The comparison is at equal updates, so at equal operations, which is stricter than to add resets on top. Only one ratio and the two resets of the script were tried.
#
# **In seconds** the saving is there (*speed*): on one CPU core the mean is just above the threshold, and the interval reaches a little below it. A sparse call takes a larger share of the time than of the operations. So equal operations, as in the *pareto* claims, are if anything kind to RAS.
#
# How much does all this mean? PSNR to a reference above some 40 dB can hardly be seen; RAS is above that at ratios 0.5 and 0.75, and a little below at 0.25. The oracle, a network that reads scenes, finds every object in the images of RAS (*accuracy*). It finds every object of the dense sampler too, so this test is at its ceiling and sees gross damage only. A small loss is a fair description of {numref}`fig-ras-samples`. The point is that in this setting fewer steps lose even less. Why might it be otherwise in Stable Diffusion 3? There the paths are probably bent more strongly, so that old velocities (the rival's error) cost more;
# attention is spread over 4,096 tokens, and a token may depend less on any single row. Both would shift the balance towards the method. Neither was measured here.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Photographs and latents.** The ground of these scenes is plain, the best case for leaving regions out; but the paths are nearly straight, the best case for fewer steps. And the released metric was made for latents with 16 channels, not for three colours.
# - **Size.** 256 tokens and six blocks. How keys and values age in a large model was not measured.
# - **Quality.** PSNR to a reference punishes any change. The paper measures FID, sFID, CLIP score and human preference.
# - **Other solvers and time shifts.** Stable Diffusion 3 takes its steps on shifted times. Ours are even.
# - **Tuning.** Ratio, first sparse step and resets are those of the released script. A changing ratio is in the library and was only tested for its counts.
# - **Another training run.** There is one network. The intervals cover captions and noise, not training.
# - **Speed on a GPU.** The `cpu` profile times one core. The released code has fused kernels for gathering tokens, which were not tried.
# - **Left untried:** the user study, FID and CLIP score on photographs, and Lumina-Next.
# :::
#
# ## Exercises
#
# **1.** If old rows are what costs, then the arms should be ordered by how old their rows get. Work out the age of each idle row from the record of who ran, and set it against the PSNR. Which summary of the age fits best, the mean or the mean square?


# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# The age of a row is the number of steps since its token last ran.
def ages(ran):
    """(steps, images, tokens) of bool -> ages of the same shape."""
    age, out = torch.zeros(ran.shape[1:]), []
    for now in ran:
        age = torch.where(now, torch.zeros_like(age), age + 1)
        out.append(age)
    return torch.stack(out)


kept_arms = [
    "RAS 0.75",
    "RAS 0.5",
    "turns",
    "RAS 0.25",
    "random",
    "change",
    "k = 0.1",
    "k = 0",
    "low end",
    "hindsight",
]
by_age = {}
for name in kept_arms:
    age = torch.stack([ages(result["ran"]).flatten() for result in results[name]])
    by_age[name] = float(age.mean()), float(age.square().mean().sqrt()), float(psnr[name].mean())
for name, (mean_age, rms_age, value) in sorted(by_age.items(), key=lambda item: -item[1][2]):
    print(f"{name:12s} {value:5.1f} dB   mean age {mean_age:5.2f}   root mean square {rms_age:5.2f} steps")
columns_of = torch.tensor(list(by_age.values())).T
for label, column in (("mean age", columns_of[0]), ("root mean square age", columns_of[1])):
    print(f"rank correlation of PSNR with {label}: {rank_correlation(column, columns_of[2]):.2f}")

# %% [markdown]
# The two summaries fit about equally well, and the arms are too few to tell them apart. Part of the order is also the ratio, which differs between arms.
#
# **2.** Which ratio would Stable Diffusion 3 need for a factor of 2.36 in operations, with six dense steps of 28? And what is the most that any ratio can save?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# The cost is a straight line in the ratio, so bisection is quick.
low, high = 0.0, 1.0
for _ in range(40):
    half = (low + high) / 2
    low, high = (half, high) if saving(**SD3, ratio=half) > 2.36 else (low, half)
print(f"ratio {low:.3f}; with no active token at all: {saving(**SD3, ratio=0.0):.2f} times fewer operations")
print(f"four dense steps instead of six, ratio 0.5: {saving(**SD3, ratio=0.5, dense=4):.2f}")

# %% [markdown]
# **3.** The rival, fewer steps, also works with old velocities. Why does it not suffer from old keys and values?
#
# :::{dropdown} Solution 3: in words
# Because nobody reads them. In fewer steps either all tokens run, with fresh rows, or none does. Old rows are needed only where some tokens run and others do not, so that the ones that run look at rows from different times: a mixture that the network never saw in training. It is the unevenness itself, not the re-use, that calls for them. A method in between would run
# only some tokens *and* renew rows cheaply, say by moving the noisy image of an idle token along its old velocity, which RAS does anyway, and recomputing its keys and values in the first layers alone. In those they depend on little else than that image and the time.
# :::
#
# ## References
#
# The method: {cite:t}`ras`, with its code [microsoft/RAS](https://github.com/microsoft/RAS) (the scheduler, the manager, the forward pass for Stable Diffusion 3, the attention processors and the scripts were read) and its
# [project page](https://microsoft.github.io/RAS/), from which the figures of the user study are. The model and its flow: {cite:t}`esser2024scaling`, {cite:t}`lipman2023flow`, {cite:t}`liu2023flow`. The library's parts: [minilib/region_adaptive.py](https://github.com/minilib-book/minilib/blob/main/minilib/region_adaptive.py),
# [minilib/region_mmdit.py](https://github.com/minilib-book/minilib/blob/main/minilib/region_mmdit.py), [minilib/kernels/tokens.py](https://github.com/minilib-book/minilib/blob/main/minilib/kernels/tokens.py).
