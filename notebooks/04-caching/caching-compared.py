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
# # Which cache, when?
#
# Four papers of this part keep something from one step to the next, each in its own network. This page puts them side by side: the same scenes, the same noise, the same currency. It also draws the rivals that keep nothing: fewer steps, and a better solver.
#
# There is no paper behind this page. It compares what {doc}`/notebooks/04-caching/deepcache`, {doc}`/notebooks/04-caching/faster-diffusion`, {doc}`/notebooks/04-caching/harmonica` and {doc}`/notebooks/04-caching/ras` explain, and does not explain it again. At the end stands a table: what to use when. Its numbers are computed from the run.

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
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from time import process_time
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch.utils.flop_counter import FlopCounterMode

from minilib import zoo
from minilib.arms import run_arms
from minilib.cache_plans import branch_macs, follow_plan, keep_largest, key_step_plan, random_plan
from minilib.cache_router import Router, soft_cache
from minilib.caching import equal_cost_steps, uniform_refreshes
from minilib.costs import mmdit_flops
from minilib.data import shapes
from minilib.guidance import classifier_free_guidance
from minilib.metrics import psnr_to_reference, read_in_batches, scene_scores
from minilib.plotting import PALETTE, mean_interval, show_images, use_style
from minilib.profiling import to_meta
from minilib.propagation import EncoderPropagation
from minilib.recipes.scenes import ddim_scheduler, flow_scheduler
from minilib.region_adaptive import RegionAdaptiveEuler
from minilib.region_mmdit import MMDiTTokens, partial_mmdit_flops
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample_final
from minilib.schedulers import DPMSolverMultistepScheduler


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each has captions and noise of its own, and trains a router of its own
    images: int  # a seed, for each network
    steps: int  # of the U-Net's sampler (DDIM)
    keys: tuple[int, ...]  # Faster Diffusion's key steps, for 50 steps
    flow_steps: int  # of the MM-DiT's sampler (Euler)
    start: int  # the first step in which RAS leaves tokens out
    resets: tuple[int, ...]  # dense steps of RAS after it
    exact_steps: int  # of the near-exact solution of the U-Net (DPM-Solver++)
    flow_exact_steps: int  # of the near-exact solution of the MM-DiT (Heun's method, two calls a step)
    trajectories: int  # that a router is trained on
    batch: int  # images of each
    lr: float  # of the router
    tables: int  # how often the weights of the steps are measured
    table_images: int  # that they are measured on
    repeats: int  # of each timing
    jobs: int  # processes


PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)
run = Reproduction(
    "caching-compared",
    profile,
    {
        "smoke": Settings((0,), 1, 8, (0, 1, 2, 4), 6, 3, (4,), 10, 5, 2, 1, 0.8, 1, 1, 1, 1),
        "cpu": Settings((0, 1, 2), 8, 50, PAPER, 28, 4, (12, 20), 100, 60, 30, 2, 0.3, 2, 2, 3, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 200, 50, PAPER, 28, 4, (12, 20), 200, 100, 600, 16, 0.03, 12, 32, 5, 1),
    },
)  # fmt: skip
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# No single network can carry all methods. DeepCache and Faster Diffusion need a U-Net with skip connections. HarmoniCa needs the branches of transformer blocks, and RAS needs tokens. So there are two networks, both trained on the same scenes of 16 by 16 pixels: a text U-Net with nine skips, which predicts the velocity $v$ of a diffusion (see {doc}`/conventions`), and an MM-DiT with six blocks and 64 image tokens, a rectified flow.
# The pages of the methods use other networks (32 by 32 pixels, and digits). So the numbers there and here differ.
#
# The U-Net is sampled by DDIM {cite:p}`song2021denoising` with 50 steps, as on its pages. The MM-DiT is sampled by Euler's method with 28 steps, as in RAS; ours are even, those of Stable Diffusion 3 are shifted. Guidance is 3 for both {cite:p}`ho2022classifier`; the page of RAS has none in most of its arms.

# %%
run.show_settings()

# %% [markdown]
# (sec-caching-compared-idea)=
# ## The idea
#
# What is a cache here? A list of parts that may *rest*, and a list of steps in which they *compute*. A part that rests hands out what it computed last. The methods differ in the two lists.
#
# :::{table} What may rest, when, and what always runs.
# :name: tab-caching-compared-methods
#
# | method | network | what may rest | when it computes | what is always fresh |
# |---|---|---|---|---|
# | DeepCache {cite:p}`deepcache` | U-Net | all that is deeper than skip $b$ | every $N$-th step | the outermost layers, on both sides |
# | Faster Diffusion {cite:p}`faster-diffusion` | U-Net | encoder and middle | key steps: every $N$-th, or a list | the decoder; it does not see the image |
# | uniform, as in FORA {cite:p}`selvaraju2024fora` | MM-DiT | attention and feed-forward branches of all blocks | every $N$-th step | gates, sums, the last layer |
# | HarmoniCa {cite:p}`harmonica` | MM-DiT | the same branches | a learned list for each branch | the same |
# | RAS {cite:p}`ras` | MM-DiT | image tokens, chosen anew in each step | all in dense steps, a share in the others | the text tokens |
# | fewer steps | any | the whole network | every $N$-th step | nothing |
# :::
#
# The last line is the trivial rival, seen as a cache: to keep the whole prediction for $N$ steps *is* to take steps $N$ times as long. (For the U-Net it is the predicted noise that has to be kept.) This is checked below. So the question of the whole part can be put in one sentence: **does it pay to keep a little of the network fresh, rather than nothing?** The fresh part costs operations in each step; the rival spends these operations on more steps.
#
# A second rival is not a cache. A solver of *second order* looks at its last two predictions and draws a line through them, where a cache draws a constant. For the U-Net that is DPM-Solver++ {cite:p}`lu2022dpm`. For the MM-DiT we use the two-step method of Adams and Bashforth, which replaces the velocity $u_i$ by $\tfrac32 u_i - \tfrac12 u_{i-1}$. Both cost one call a step. Heun's method, of second order too, asks twice a step.
#
# How near is near? We use two references, and they do not always agree.
#
# - **The full sampler**: DDIM or Euler with all steps, which is what a cache imitates. Fewer steps of the same solver err in the same direction as the full sampler does. So this reference is kind to them.
# - **The solution** of the differential equation that both approximate, by a second-order solver with many steps. For the MM-DiT that solver is Heun's method, of another family than the rival. For the U-Net it is the rival itself, DPM-Solver++, with more steps; read *solver-unet* with that in mind. How far the reference is from a finer one is printed below.
#
# The measure is the peak signal-to-noise ratio (PSNR), in decibels: twenty more are a tenth of the error, and one grey level in 255 is 48 dB.

# %%
# NBVAL_CHECK_OUTPUT
MODELS = {"U-Net": zoo.load("unet_shapes16"), "MM-DiT": zoo.load("mmdit_shapes")}
MODELS = {name: model.to(run.device).requires_grad_(False) for name, model in MODELS.items()}
unet, mmdit = (model.denoiser for model in MODELS.values())
SIDE, GRID = 16, 16 // mmdit.patch_size
down, up = ([unit.names for unit in units] for units in (unet.down_units, unet.up_units))


def deeper(b):
    """DeepCache: all modules of the U-Net that are deeper than skip b."""
    units = (*down[b + 1 :], ("mid_block",), *up[: unet.num_skips - 1 - b])
    return tuple(itertools.chain(*units))


ENCODER = (*itertools.chain(*down), "mid_block")  # Faster Diffusion
BRANCHES = tuple(  # FORA and HarmoniCa
    f"blocks.{i}.{kind}"
    for i, block in enumerate(mmdit.blocks)
    for kind in ("attn", "mlp", "context_mlp")
    if getattr(block, kind) is not None  # the last block has no feed-forward network for the text
)
for what, names in {"deeper than skip 0": deeper(0), "deeper than skip 2": deeper(2), "encoder": ENCODER, "branches": BRANCHES}.items():  # fmt: skip
    print(f"{what}: {len(names)} modules, from {names[0]} to {names[-1]}")

# %% [markdown]
# (sec-caching-compared-method)=
# ## The method
#
# Since a cache is two lists, one mechanism serves four of the methods. The library's `follow_plan` takes names of modules and a boolean matrix, a row a step and a column a module. It was shown on the pages of {doc}`/notebooks/04-caching/deepcache` and {doc}`/notebooks/04-caching/faster-diffusion` that such a general cache gives the same images as the special one. Only RAS, which works on tokens, has a sampler of its own.


# %%
def texts(model, tokens):
    """States of the captions and of the empty caption."""
    with torch.no_grad():
        return [model.encode_text(y)._asdict() for y in (tokens, model.null_tokens(*tokens.shape))]


def predictor(model, tokens):
    """model(x, t) with guidance 3; both questions are one batch, so one plan serves both."""
    text, null = texts(model, tokens)
    return classifier_free_guidance(model, cond=text, null=null, guidance_scale=3.0)


def dpm_solver():
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", final_sigmas_type="sigma_min",
    )  # fmt: skip


def levels(steps):
    """Noise levels of the flow, even from 1 to 0."""
    scheduler = flow_scheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    return scheduler.sigmas


@torch.no_grad()
def solve(net, predict, x, steps, order="first"):
    """From noise to images: DDIM or DPM-Solver++; Euler, Adams-Bashforth or Heun."""
    if net == "U-Net":
        scheduler = ddim_scheduler() if order == "first" else dpm_solver()
        return sample_final(predict, scheduler, x, num_inference_steps=steps)
    before = None
    for sigma, after in itertools.pairwise(levels(steps).tolist()):
        u = slope = predict(x, x.new_full((len(x),), 1000 * sigma))
        if order == "second" and before is not None:
            slope = 1.5 * u - 0.5 * before
        if order == "Heun" and after > 0:
            slope = (u + predict(x + (after - sigma) * u, x.new_full((len(x),), 1000 * after))) / 2
        x, before = x + (after - sigma) * slope, u
    return x


# %% [markdown]
# What does a plan cost? We count multiply-accumulates (MACs) of one call on torch's `meta` device, module by module. A step pays for all that never rests, and for those modules that compute in it. The text is encoded once for all steps and not counted.


# %%
INPUTS = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1), torch.zeros(1, shapes.null_tokens(1).shape[1], 96)
NETS = {deeper(0): unet, deeper(2): unet, ENCODER: unet, BRANCHES: mmdit}
MACS = {names: branch_macs(net, names, *INPUTS) for names, net in NETS.items()}


class Arm(NamedTuple):
    net: str
    family: str  # a line of the figures
    steps: int
    order: str = "first"  # of the solver
    names: tuple[str, ...] = ()  # what may rest
    plans: tuple[torch.Tensor, ...] = ()  # when it computes: one for all seeds, or one a seed
    ratio: float | None = None  # RAS: the share of tokens that run in a sparse step
    resets: tuple[int, ...] = s.resets  # RAS: dense steps after the first sparse one

    @property
    def sampler(self):
        return RegionAdaptiveEuler(self.ratio, s.start, self.resets, "std", starvation=1.0)

    @property
    def cost(self):
        """In calls of the whole network; of several plans the dearest."""
        if self.ratio is not None:
            shape, n = (mmdit.config, SIDE, SIDE, INPUTS[2].shape[1]), GRID * GRID
            active = self.sampler.active(self.steps, n)
            return sum(partial_mmdit_flops(*shape, k) for k in active) / mmdit_flops(*shape)
        if self.plans:
            one = MACS[self.names].of(torch.ones_like(self.plans[0][:1]))
            return max(MACS[self.names].of(plan) for plan in self.plans) / one
        return 2 * self.steps - 1 if self.order == "Heun" else self.steps


@torch.no_grad()
def draw(arm, tokens, x, which=0):
    """Images of an arm; `which` of its plans."""
    model = MODELS[arm.net]
    if arm.ratio is not None:
        text, null = texts(model, tokens)
        some = MMDiTTokens(mmdit, text, GRID, GRID, null=null, guidance_scale=3.0)
        *_, last = arm.sampler.sample(some, some.tokens(x), levels(arm.steps), channels=3)
        return some.image(last.x)
    plan = arm.plans[which % len(arm.plans)] if arm.plans else None
    with follow_plan(model.denoiser, arm.names, plan) if arm.plans else nullcontext():
        return solve(arm.net, predictor(model, tokens), x, arm.steps, arm.order)


def start(n, generator, split):
    """Captions and noise."""
    scenes = shapes.sample_scenes(n, generator, objects=(1, 3), split=split)
    noise = initial_noise((n, 3, SIDE, SIDE), generator, device=run.device)
    return scenes, shapes.tokens(scenes).to(run.device), noise


# %% [markdown]
# ### Learning HarmoniCa's list
#
# The router has a number for each step and branch; see {doc}`/notebooks/04-caching/harmonica` for what is trained and why. Here each of its columns is a branch of the MM-DiT: joint attention of both streams, feed-forward of the image, feed-forward of the text. The loss compares guided predictions, since those are what the sampler uses. Each step's part of it is weighted by what resting in that step does to the final image, measured anew now and then: the *weights of the steps*. The training is kept short, so that it fits this page.


# %%
SOFT = {  # tensors that are mixed in training, and their columns: attention hands on one tensor for each stream
    f"{name}{part}": column
    for column, name in enumerate(BRANCHES)
    for part in ((".proj", ".context_proj") if name.endswith("attn") else ("",))
    if part != ".context_proj" or mmdit.get_submodule(name).context_proj is not None
}
COLUMNS = list(SOFT.values())
L, B = s.flow_steps, len(BRANCHES)


@torch.no_grad()
def image_error(weights, cache, tokens, x):
    """What the cache of each step does to the final image; at each step a copy leaves, and goes on without a cache."""
    copies, n = x[:0], len(x)
    cache.clear()
    for i, (sigma, after) in enumerate(itertools.pairwise(levels(L).tolist())):
        cache.weights = weights[i, COLUMNS]
        u = [predictor(MODELS["MM-DiT"], tokens)(x, x.new_full((n,), 1000 * sigma))]
        cache.weights = None
        if i:
            plain = predictor(MODELS["MM-DiT"], tokens.repeat(i, 1))
            u.insert(0, plain(copies, x.new_full((i * n,), 1000 * sigma)))
        copies = torch.cat([copies, x]) + (after - sigma) * torch.cat(u)
        x = copies[-n:]
    images = copies.unflatten(0, (L, n))
    return (images[1:] - images[:-1]).square().flatten(1).mean(1)


def train(_, seed, goal=0.5):
    """The weights of a router, (steps, branches)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    router, worth = Router(L, B).to(run.device), None
    optimiser = torch.optim.AdamW(router.parameters(), lr=s.lr, weight_decay=0, betas=(0.9, 0.99))
    with soft_cache(mmdit, list(SOFT), threshold=router.threshold) as cache:
        for trajectory in range(s.trajectories):
            if trajectory % -(-s.trajectories // s.tables) == 0:
                table = image_error(
                    router.weights().detach(), cache, *start(s.table_images, generator, "train")[1:]
                )
                importance = table / table.mean()
            _, tokens, x = start(s.batch, generator, "train")
            predict, weights = predictor(MODELS["MM-DiT"], tokens), router.weights()
            r = weights.detach().requires_grad_()
            cache.clear()
            for i, (sigma, after) in enumerate(itertools.pairwise(levels(L).tolist())):
                t, cache.weights = x.new_full((len(x),), 1000 * sigma), r[i, COLUMNS]
                routed = predict(x, t)
                if i:  # the first step computes everything
                    cache.weights = None
                    with torch.no_grad():
                        full = predict(x, t)
                    (importance[i - 1] * (routed - full).square().mean()).backward()
                x = x + (after - sigma) * routed.detach()
            gain = (-r.grad[1:] / (1 - r[1:]).detach()).clamp(min=0)
            worth = gain if worth is None else 0.8 * worth + 0.2 * gain
            weights[1:].backward(r.grad[1:] + 0.9 * worth.quantile(goal * L / (L - 1)))
            optimiser.step()
            optimiser.zero_grad()
            router.clamp_()
    return router.weights().detach().cpu()


# %% [markdown]
# ### Is it what we say it is?
#
# Four things must hold. Our loop for Euler's method must be the library's, up to rounding. With nothing at rest every method must be the full sampler, bit for bit. (The forms of DeepCache and Faster Diffusion that are timed below, and the soft cache of the training, are checked too.) Counted operations must be those of the plan, and a module at rest must execute none. And to keep the whole prediction must be the same as fewer steps, in both networks.

# %%
_, few, noise = start(2, torch.Generator().manual_seed(7), "validation")
plain = {
    net: solve(net, predictor(model, few), noise, 5 if net == "U-Net" else L) for net, model in MODELS.items()
}
euler, x = flow_scheduler(), noise  # the library's Euler, in place of the loop above
euler.set_timesteps(sigmas=levels(L)[:-1].tolist())
with torch.no_grad():
    for t in euler.timesteps:
        x = euler.step(predictor(MODELS["MM-DiT"], few)(x, t.expand(2)), t, x).prev_sample
run.record("euler", float((x - plain["MM-DiT"]).abs().max()))


def at_once(tokens, keys, steps):
    """Faster Diffusion with all decoders of a group in one batch."""
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(steps, device=run.device)
    text = both_texts(tokens)
    return EncoderPropagation(unet, keys, scheduler.timesteps, *text, guidance_scale=3.0)


@torch.no_grad()
def both_texts(tokens):
    model = MODELS["U-Net"]
    return model.encode_text(torch.cat([tokens, model.null_tokens(*tokens.shape)]))[:2]


def outer_only(tokens, keys, b):
    """DeepCache as on its page: what is deeper than skip b is not even visited between full steps."""
    step, kept, text, enter = itertools.count(), None, both_texts(tokens), unet.num_skips - 1 - b

    def predict(x, t):
        nonlocal kept
        x, emb, full = torch.cat([x, x]), unet.embed(torch.cat([t, t])), next(step) in keys
        h, skips = unet.encode(x, emb, *text, stop=unet.num_skips if full else b + 1)
        if full:
            kept = unet.decode(unet.middle(h, emb, *text), skips, emb, *text, stop=enter)
        wanted, unwanted = unet.decode(kept, skips, emb, *text, start=enter).chunk(2)
        return unwanted + 3.0 * (wanted - unwanted)

    return predict


every = range(5)
special = [at_once(few, every, 5), outer_only(few, every, 0), outer_only(few, every, 2)]
neutral = [("U-Net", solve("U-Net", predict, noise, 5)) for predict in special]
for names, net in NETS.items():
    name, T0 = ("U-Net", 5) if net is unet else ("MM-DiT", L)
    everything = torch.ones(T0, len(names), dtype=torch.bool)
    neutral.append((name, draw(Arm(name, "", T0, names=names, plans=(everything,)), few, noise)))
neutral.append(("MM-DiT", draw(Arm("MM-DiT", "", L, ratio=1.0), few, noise)))
with soft_cache(mmdit, list(SOFT)) as cache, torch.no_grad():
    cache.weights = torch.ones(len(SOFT), device=run.device)
    neutral.append(("MM-DiT", solve("MM-DiT", predictor(MODELS["MM-DiT"], few), noise, L)))
run.record("neutral", max(float((x - plain[name]).abs().max()) for name, x in neutral))

shape, ghosts = (mmdit.config, SIDE, SIDE, INPUTS[2].shape[1]), [v.to("meta") for v in INPUTS]
off, check = [], torch.Generator().manual_seed(3)
off.append(abs(MACS[BRANCHES].of(torch.ones(1, B, dtype=torch.bool)) - mmdit_flops(*shape) // 2))
for names, net in NETS.items():
    ghost, plan = to_meta(net), random_plan(4, len(names), 2 * len(names), check)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, follow_plan(ghost, names, plan):
        for _ in plan:
            ghost(*ghosts)
    off.append(abs(counter.get_total_flops() // 2 - MACS[names].of(plan)))
some = MMDiTTokens(to_meta(mmdit), {"context": ghosts[2]}, GRID, GRID)
x = some.tokens(ghosts[0])
with torch.no_grad():
    some(x, 0.5)  # a dense call first
    for k in (16, 32, 48):
        with FlopCounterMode(display=False) as counter:
            some(x, 0.5, torch.zeros(1, k, dtype=torch.long, device="meta"))
        off.append(abs(counter.get_total_flops() - partial_mmdit_flops(*shape, k)))
run.record("macs", max(off))


def keep_all(net, predict, refreshes):
    """No call between refreshes. The U-Net predicts v = alpha noise - sigma x_0; it is the noise that stays. A flow keeps u."""
    step, kept, bars = itertools.count(), None, ddim_scheduler().alphas_cumprod_f64

    def reuse(x, t):
        nonlocal kept
        bar = float(bars[int(t[0])]) if net == "U-Net" else 1.0
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        if next(step) in refreshes:
            kept = sigma * x + alpha * predict(x, t)
        return (kept - sigma * x) / alpha

    return reuse


apart = []
for net, model in MODELS.items():  # in double precision, where rounding cannot hide a mistake
    predict, x = predictor(deepcopy(model).double(), few), noise.double()
    kept = solve(net, keep_all(net, predict, uniform_refreshes(10, 2)), x, 10)
    apart.append(float((kept - solve(net, predict, x, 5)).abs().max()))
run.record("whole-prediction", max(apart))

# %%
# NBVAL_CHECK_OUTPUT
print("nothing at rest = the full sampler, 9 ways:", "PASS" if all(torch.equal(x, plain[n]) for n, x in neutral) else "FAIL")  # fmt: skip
print("counted = planned operations, 8 times:", "PASS" if max(off) == 0 else off)
for what, names in {"DeepCache, skip 0": deeper(0), "DeepCache, skip 2": deeper(2), "Faster Diffusion": ENCODER, "uniform, HarmoniCa": BRANCHES}.items():  # fmt: skip
    print(
        f"{what}: {MACS[names].rest / (MACS[names].rest + sum(MACS[names].branches)):.1%} of a call never rests"
    )

# %% [markdown]
# The last lines matter for what follows. What never rests sets a floor under the cost. Faster Diffusion's floor is high, since the decoder is most of the network. The branches of a transformer are nearly everything, so a step in which all of them rest is nearly free, and nearly a step not taken.
#
# (sec-caching-compared-experiment)=
# ## The experiment
#
# Every arm starts from the same noise and captions, in both networks. Each cached arm gets a rival of its own: the same solver with as many steps as the cached operations allow, *rounded up*. The arms are those of the papers' pages. An *arm* is one way to draw the images; a step is *full* (a key step, a dense step) when nothing rests in it; skips are counted from the outside, from 0. Two things are new.
#
# **Counted from the end.** "Every $N$-th step, from step 0" is the plain form of DeepCache and FORA. It leaves it to chance how old the cache is in the last step, after which nothing can be repaired. With 50 steps and $N = 2$ or $3$ the last full step is number 48, counted from 0, so the last step of all rests; with $N = 5$ the last four do. So we also count backwards: the last step is full, every $N$-th before it, and step 0. That is at most one more full step. RAS gets a dense last step. These arms are called *end*.
# They are nobody's method. But the pages of the methods found that what is kept changes fastest at the end of the way, and that late key steps are worth more than early ones; this is the cheapest use of that.
#
# **HarmoniCa** is trained once a seed and cut at three thresholds, so that 31, 50 and 65 % of the entries rest, as on its page. Its routers are judged on the captions and noise of the same seed.

# %%
T = s.steps
routers = run_arms(train, {"router": None}, s.seeds, s.jobs)["router"]


def from_end(steps, interval):
    return tuple(sorted({0, *range(steps - 1, 0, -interval)}))


def cache_arm(net, family, names, steps, refreshes):
    return Arm(net, family, steps, names=names, plans=(key_step_plan(steps, len(names), refreshes),))


FULL, EXACT = {"U-Net": "DDIM", "MM-DiT": "Euler"}, {"U-Net": "exact, U-Net", "MM-DiT": "exact, MM-DiT"}
SECOND, BUDGETS = {"U-Net": "DPM-Solver++", "MM-DiT": "Adams"}, (0.65, 0.45, 0.3)
ARMS, FAMILIES = {}, ["DeepCache $b=0$", "DeepCache $b=2$", "Faster Diffusion", "uniform", "HarmoniCa", "RAS"]
for b, N in itertools.product((0, 2), (2, 3, 5)):
    for tag, keys in {"": uniform_refreshes(T, N), ", end": from_end(T, N)}.items():
        ARMS[f"DeepCache {b}, N={N}{tag}"] = cache_arm("U-Net", FAMILIES[b // 2], deeper(b), T, keys)
for name, keys in ({"paper": s.keys} | {f"N={N}": uniform_refreshes(T, N) for N in (2, 3, 5)}).items():
    ARMS[f"Faster Diffusion, {name}"] = cache_arm("U-Net", FAMILIES[2], ENCODER, T, keys)
ARMS["Faster Diffusion, N=2, end"] = cache_arm("U-Net", FAMILIES[2], ENCODER, T, from_end(T, 2))
for N in (2, 3, 5):
    keys, backwards = uniform_refreshes(L, N), from_end(L, N)
    ARMS[f"uniform, N={N}"] = cache_arm("MM-DiT", FAMILIES[3], BRANCHES, L, keys)
    if keys != backwards:  # counted from 0 some intervals end with a full step as it is
        ARMS[f"uniform, N={N}, end"] = cache_arm("MM-DiT", FAMILIES[3], BRANCHES, L, backwards)
for share in (0.31, 0.5, 0.65):
    plans = tuple(keep_largest(weights, round(share * L * B)) for weights in routers)
    ARMS[f"HarmoniCa, {share:.0%}"] = Arm("MM-DiT", FAMILIES[4], L, names=BRANCHES, plans=plans)
ARMS |= {f"RAS, {ratio}": Arm("MM-DiT", FAMILIES[5], L, ratio=ratio) for ratio in (0.25, 0.5, 0.75)}
ARMS["RAS, 0.5, end"] = ARMS["RAS, 0.5"]._replace(resets=(*s.resets, L - 1))
CACHED, RIVAL, BETTER = list(ARMS), {}, {}
for name in CACHED:
    net, calls = ARMS[name].net, equal_cost_steps(ARMS[name].cost, 1.0)
    RIVAL[name] = f"{FULL[net]}-{calls}"
    ARMS[RIVAL[name]] = Arm(net, "fewer steps", calls)
    if ARMS[name].family in FAMILIES[1:4:2] and "end" in name or name == "uniform, N=3":
        BETTER[name] = f"{SECOND[net]}-{calls}"
        ARMS[BETTER[name]] = Arm(net, "second order", calls, "second")
for share, (net, solvers) in itertools.product(BUDGETS, {n: (FULL[n], SECOND[n]) for n in MODELS}.items()):
    calls = int(share * (T if net == "U-Net" else L))  # what the budgets of the last table allow, to the full
    for solver, family, order in zip(
        solvers, ("fewer steps", "second order"), ("first", "second"), strict=True
    ):
        ARMS[f"{solver}-{calls}"] = Arm(net, family, calls, order)
for net, calls in itertools.product(MODELS, range(5, 13)):  # the cheap end of the line, without a gap
    if calls < (T if net == "U-Net" else L):
        ARMS[f"{FULL[net]}-{calls}"] = Arm(net, "fewer steps", calls)
ARMS |= {f"Heun-{2 * k - 1}": Arm("MM-DiT", "Heun", k, "Heun") for k in (4, 5, 7)}
ARMS |= {"DDIM": Arm("U-Net", "full", T), "Euler": Arm("MM-DiT", "full", L)}
ARMS[EXACT["U-Net"]] = Arm("U-Net", "exact", s.exact_steps, "second")
ARMS[EXACT["MM-DiT"]] = Arm("MM-DiT", "exact", s.flow_exact_steps, "Heun")


def judged(arm, seed):
    """The images of an arm on the captions and noise of a seed."""
    _, tokens, x = start(s.images, torch.Generator().manual_seed(seed), "test")
    return draw(arm, tokens, x, s.seeds.index(seed)).clamp(-1, 1).cpu()


images = run_arms(judged, ARMS, s.seeds, s.jobs)

# %% [markdown]
# ### What is it worth in seconds?
#
# Operations are not time. We time the whole sampler for one image, two rows in a batch with guidance, on one core: the full samplers and all cached ones, in turns, the least of a few. A sampler without a cache takes time in proportion to its calls; its time in the list is its share of the operations, not a measurement. The general cache copies what it keeps and visits every module. That is convenient, not fast, so DeepCache and Faster Diffusion are timed in their own form, the latter with all decoders of a group in one batch, which is its point. The caches of the MM-DiT are timed as they are in this library; code that is written for one of them alone would lose less.

# %%
_, one, x_one = start(1, torch.Generator().manual_seed(900), "validation")
timed = [*FULL.values(), *CACHED]


def sampler(name):
    """Run the sampler of an arm for one image."""
    arm = ARMS[name]
    if arm.net == "MM-DiT" or not arm.plans:
        return draw(arm, one, x_one)
    keys = arm.plans[0].all(1).nonzero().flatten().tolist()
    if arm.family == "Faster Diffusion":
        return solve("U-Net", at_once(one, keys, T), x_one, T)
    return solve("U-Net", outer_only(one, keys, int("b=2" in arm.family) * 2), x_one, T)


seconds = dict.fromkeys(timed, float("inf"))
for name in timed * s.repeats:  # in turns, so that a disturbance hits all of them
    before = process_time()
    sampler(name).sum().item()
    seconds[name] = min(seconds[name], process_time() - before)
full_cost = {name: ARMS[FULL[arm.net]].cost for name, arm in ARMS.items()}
work = {name: arm.cost / full_cost[name] for name, arm in ARMS.items()}  # of the full sampler's operations
spent = {n: seconds[n] / seconds[FULL[arm.net]] if n in CACHED else work[n] for n, arm in ARMS.items()}

# %% [markdown]
# ## Results


# %%
def near(name, reference):
    """Mean PSNR of an arm to a reference, in dB: one number a seed."""
    pairs = zip(images[name], images[reference[ARMS[name].net]], strict=True)
    return torch.stack([psnr_to_reference(x, y).mean() for x, y in pairs])


to_full = {name: near(name, FULL) for name in ARMS if name not in FULL.values()}
to_exact = {name: near(name, EXACT) for name in ARMS if name not in EXACT.values()}
gain = {name: to_full[name] - to_full[RIVAL[name]] for name in CACHED}
gain_exact = {name: to_exact[name] - to_exact[RIVAL[name]] for name in CACHED}
oracle = zoo.load("oracle_shapes16")
right = {}
for name in ARMS:
    drawn = zip(images[name], s.seeds, strict=True)
    scored = [scene_scores(read_in_batches(oracle, x), start(s.images, torch.Generator().manual_seed(k), "test")[0]) for x, k in drawn]  # fmt: skip
    right[name] = torch.stack([score["object"].nanmean() for score in scored])
print(f"{'':26s}{'operations':>10s}{'time':>6s}{'to full':>9s}{'to solution':>12s}{'objects right':>15s}")
for name in sorted(ARMS, key=lambda name: (ARMS[name].net != "U-Net", work[name])):
    dB = [f"{float(v[name].mean()):.1f} dB" if name in v else "" for v in (to_full, to_exact)]
    print(
        f"{name:26s}{work[name]:10.0%}{spent[name]:6.0%}{dB[0]:>9s}{dB[1]:>12s}{float(right[name].mean()):15.1%}"
    )

# %% [markdown]
# How exact is the solution? Both networks again, for the first seed, with twice as many steps.

# %%
_, tokens, x = start(s.images, torch.Generator().manual_seed(s.seeds[0]), "test")
for net, name in EXACT.items():
    finer = draw(ARMS[name]._replace(steps=2 * ARMS[name].steps), tokens, x).clamp(-1, 1).cpu()
    dB = float(psnr_to_reference(images[name][0], finer).mean())
    print(f"{net}: the solution lies {dB:.1f} dB from the one with twice the steps")

# %% [markdown]
# That is the scale on which distances to the solution have to be read. In the U-Net the solution is far more exact than anything that is compared with it. In the MM-DiT it is not: the last part of the way is steep for Heun's method, and the error of the reference is only a little smaller than that of the full sampler. Differences of many decibels mean something there; those of a few tenths, near the horizontal line, do not.
#
# ### The picture to remember: everything on one plot
#
# Up is near, left is cheap. A method is worth its trouble where it lies above the dashed grey line, fewer steps. Compare with the dotted black one, the second-order solver, in the lower row only: in the upper row a better solver is marked down for not repeating the full sampler's error.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four panels of PSNR against the share of operations, U-Net on the left, MM-DiT on the right; upper row to the full sampler, lower row to the solution. A grey dashed line, fewer steps, rises from lower left to upper right in each; a black dotted line for the second-order solver. Coloured lines for the caches: DeepCache in two blues and Faster Diffusion in pink on the left, uniform branches in green, HarmoniCa in red-orange and RAS in orange on the right; open circles, joined by dotted lines, for plans that are counted from the end."}, "figure": {"caption": "Nearness against operations. Upper row: PSNR to the full sampler, DDIM with all steps (left) and Euler with all steps (right). Lower row: PSNR to the solution; the horizontal line is the full sampler. Open circles: the same caches, counted from the end. Faster Diffusion's star: the paper's key steps. Crosses: Heun. Bars: 90 % intervals over seeds.", "name": "fig-caching-compared-plane"}}
COLOURS = dict(
    zip(FAMILIES, (PALETTE[5], PALETTE[0], PALETTE[3], PALETTE[2], PALETTE[1], PALETTE[4]), strict=True)
)
STYLES = {"fewer steps": ("0.5", "s--"), "second order": ("k", "d:"), "Heun": ("k", "x")}
STYLES |= {family: (colour, "o-") for family, colour in COLOURS.items()}


def points(ax, names, values, label, **look):
    """A line over arms, with intervals."""
    names = sorted(names, key=work.get)
    mean, low, high = mean_interval(torch.stack([values[name] for name in names], dim=1))
    bars = torch.stack([mean - low, high - mean])
    look = {"ms": 4.5, "lw": 1.3, "capsize": 2} | look
    ax.errorbar([work[name] for name in names], mean, bars, label=label, **look)


fig, axes = plt.subplots(2, 2, figsize=(7, 6.4), sharex=True, layout="constrained")
for (row, values), (column, net) in itertools.product(enumerate((to_full, to_exact)), enumerate(MODELS)):
    ax = axes[row, column]
    for family, (colour, style) in STYLES.items():
        names = [n for n, arm in ARMS.items() if arm.net == net and arm.family == family and n in values]
        ends, stars = ([n for n in names if tag in n] for tag in (", end", ", paper"))
        if line := [n for n in names if n not in ends + stars and work[n] < 1]:
            points(ax, line, values, family, fmt=style, color=colour)
        if ends:
            points(ax, ends, values, None, fmt="o:", color=colour, mfc="white", zorder=5)
        if stars:
            points(ax, stars, values, None, fmt="*", color=colour, ms=11)
    if values is to_exact:
        ax.axhline(float(to_exact[FULL[net]].mean()), color="0.3", lw=1)
        ax.set_xlabel("operations / full sampler")
    else:
        ax.set_title(f"{net}, {FULL[net]} with {ARMS[FULL[net]].steps} steps", fontsize=10)
    ax.set(xlim=(0, 1))
    ax.xaxis.set_major_formatter("{x:.0%}")
axes[0, 0].set_ylabel("PSNR to the full sampler in dB")
axes[1, 0].set_ylabel("PSNR to the solution in dB")
handles = {}
for ax in axes[0]:
    handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
fig.legend(handles.values(), handles, loc="outside lower center", ncol=5, fontsize=9, columnspacing=1.0)
plt.show()

# %% [markdown]
# ### Against the rival, arm by arm
#
# {numref}`fig-caching-compared-gain` takes out the slope. Each cached arm is set against fewer steps that cost at least as much. Right of zero the cache is nearer, left of it the rival is.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A list of all cached arms, one a row, with their gain over fewer steps in decibels on the horizontal axis and a vertical line at zero. Filled dots: measured to the full sampler. Open squares: to the solution; they mostly lie to the right of the dots or near them. The colours are those of the methods."}, "figure": {"caption": "Gain over fewer steps of the same solver at no fewer operations. Dots: to the full sampler. Open squares: to the solution. Colours as above. Upper part: U-Net; lower part: MM-DiT. Bars: 90 % intervals over seeds.", "name": "fig-caching-compared-gain"}}
fig, ax = plt.subplots(figsize=(6.6, 6.6), layout="constrained")
for at, name in enumerate(CACHED):
    for values, offset, look in (
        (gain, -0.15, {"fmt": "o"}),
        (gain_exact, 0.15, {"fmt": "s", "mfc": "white"}),
    ):
        mean, low, high = mean_interval(values[name])
        options = {"ms": 5, "capsize": 2, "color": COLOURS[ARMS[name].family]} | look
        ax.errorbar(float(mean), at + offset, xerr=[[float(mean - low)], [float(high - mean)]], **options)
ax.axvline(0, color="k", lw=1)
ax.axhline(sum(ARMS[name].net == "U-Net" for name in CACHED) - 0.5, color="0.5", lw=1, ls=":")
ax.set_yticks(range(len(CACHED)), [f"{name}  ({work[name]:.0%})" for name in CACHED])
ax.set(ylim=(len(CACHED) - 0.5, -0.5), xlabel="gain over fewer steps in dB (operations in brackets)")
plt.show()

# %%
at_two, from_end_two = "DeepCache 2, N=2", "DeepCache 2, N=2, end"
run.record("deepcache", gain[at_two])
run.record("deepcache-end", gain[from_end_two])
run.record("deepcache-end-exact", gain_exact[from_end_two])
run.record("faster-diffusion", gain["Faster Diffusion, paper"])
run.record("faster-diffusion-end", gain["Faster Diffusion, N=2, end"])
run.record("uniform", gain["uniform, N=2"])
run.record("uniform-end", gain["uniform, N=2, end"])
run.record("uniform-end-exact", gain_exact["uniform, N=2, end"])
run.record("uniform-n3", gain["uniform, N=3"])
run.record("harmonica", gain["HarmoniCa, 50%"])
run.record("ras", gain["RAS, 0.5"])
run.record("end-unet", gain[from_end_two] - gain[at_two])
run.record("end-blind", gain["Faster Diffusion, N=2, end"] - gain["Faster Diffusion, N=2"])
run.record("end-mmdit", gain["uniform, N=2, end"] - gain["uniform, N=2"])
run.record("sees-the-image", to_full[from_end_two] - to_full["Faster Diffusion, N=2, end"])
run.record("learned", gain["HarmoniCa, 50%"] - gain["uniform, N=2, end"])
run.record("branches-or-tokens", to_full["uniform, N=2, end"] - to_full["RAS, 0.5, end"])
run.record("solver-unet", to_exact[from_end_two] - to_exact[BETTER[from_end_two]])
run.record("solver-mmdit", to_exact["uniform, N=2, end"] - to_exact[BETTER["uniform, N=2, end"]])
mild = [from_end_two, "uniform, N=2, end", "HarmoniCa, 50%", "RAS, 0.5"]
run.record("accuracy", torch.stack([right[name] - right[FULL[ARMS[name].net]] for name in mild]).mean(0))

# %% [markdown]
# ### What one sees
#
# Nearness is not quality, but at this distance it is hard to see anything at all, with one exception: Faster Diffusion with the key steps of its paper is darker and grainy. {numref}`fig-caching-compared-samples` shows the same four captions in both networks, and what the short cut changed, magnified.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two blocks of small images, U-Net on the left and MM-DiT on the right; each row a sampler, four scenes of coloured shapes and then four maps of the difference to the full sampler. The scenes look alike in most rows; the differences are grey with coloured edges around the shapes, strongest for Faster Diffusion with the paper's key steps, where they are grainy all over."}, "figure": {"caption": "The first four captions of the first seed, not chosen, and the difference to the full sampler, four times magnified; grey is zero. At the left of each row its share of the operations and its mean PSNR to the full sampler.", "name": "fig-caching-compared-samples"}}
ROWS = {
    "U-Net": ["DDIM", "DeepCache 2, N=2", "DeepCache 2, N=2, end", RIVAL["DeepCache 2, N=2, end"], "Faster Diffusion, paper", "Faster Diffusion, N=2, end"],
    "MM-DiT": ["Euler", "uniform, N=2", "uniform, N=2, end", RIVAL["uniform, N=2, end"], "HarmoniCa, 50%", "RAS, 0.5"],
}  # fmt: skip
fig, axes = plt.subplots(2, 1, figsize=(6.6, 7.4), layout="constrained")
for ax, (net, rows) in zip(axes, ROWS.items(), strict=True):
    n, reference = min(4, s.images), images[FULL[net]][0]
    strip = [
        torch.cat([images[r][0][:n], (4 * (images[r][0][:n] - reference[:n])).clamp(-1, 1)]) for r in rows
    ]
    labels = [
        f"{r}\n{work[r]:.0%}" + (f", {float(to_full[r].mean()):.1f} dB" if r in to_full else "") for r in rows
    ]
    show_images(torch.cat(strip), 2 * n, ax=ax, row_labels=labels, title=net)
plt.show()

# %% [markdown]
# (sec-caching-compared-table)=
# ### What to use when
#
# The table is computed from the run: in each row the arm with the largest mean PSNR (or the least cost) among those that are allowed, and in brackets the runner-up of another kind. "Any means" lets you change the solver and the number of steps. "Solver fixed" leaves fewer steps and caches. "Steps fixed" leaves caches alone: somebody else owns the sampler. Arms are chosen and judged on the same captions, so differences within the bars are ties. The two branches of DeepCache count as two kinds.


# %%
def best(net, allowed, score, unit):
    """The best arm and the best one of another family, by a score that is to be large."""
    names = [
        name
        for name, arm in ARMS.items()
        if arm.net == net and arm.family not in ("full", "exact") and allowed(name)
    ]
    ranked = sorted(names, key=score, reverse=True)
    if not ranked:
        return "none"
    other = [name for name in ranked if ARMS[name].family != ARMS[ranked[0]].family][:1]
    brackets = f" ({other[0]}: {unit(other[0])})" if other else ""
    return f"**{ranked[0]}**: {unit(ranked[0])}{brackets}"


FIRST = ("fewer steps", *FAMILIES)
WISHES = {}
for share in BUDGETS:
    for who, kinds, values in (("any means, near the solution", None, to_exact), ("solver fixed, near the full sampler", FIRST, to_full), ("steps fixed, near the full sampler", FAMILIES, to_full)):  # fmt: skip
        WISHES[f"{who}, at most {share:.0%} of the operations"] = (
            lambda n, k=kinds, c=share: work[n] <= c + 1e-9 and (k is None or ARMS[n].family in k),
            lambda n, v=values: float(v[n].mean()),
            lambda n, v=values: f"{work[n]:.0%}, {float(v[n].mean()):.1f} dB",
        )
for what, costs in (("operations", work), ("time for one image", spent)):
    WISHES[f"least {what}, with at least 40 dB to the full sampler"] = (
        lambda n: n in to_full and float(to_full[n].mean()) >= 40,
        lambda n, c=costs: -c[n],
        lambda n, c=costs: f"{c[n]:.0%}, {float(to_full[n].mean()):.1f} dB",
    )
lines = [f"| {wish} | {best('U-Net', *rule)} | {best('MM-DiT', *rule)} |" for wish, rule in WISHES.items()]
display(Markdown("\n".join(["| you want | U-Net | MM-DiT |", "|---|---|---|", *lines])))

# %%
winners = {family: [n for n in CACHED if ARMS[n].family == family and mean_interval(gain_exact[n])[1] > 0] for family in FAMILIES}  # fmt: skip
for family, names in winners.items():
    print(
        f"{family:18s} nearer to the solution than fewer steps, interval clear of zero:",
        ", ".join(names) or "nowhere",
    )
slow = {name: spent[name] / work[name] for name in CACHED}
print("time over operations, both as shares of the full sampler:", {f: f"{sum(v := [slow[n] for n in CACHED if ARMS[n].family == f]) / len(v):.2f}" for f in FAMILIES})  # fmt: skip
print("full samplers, one image:", {name: f"{seconds[name] * 1e3:.0f} ms" for name in FULL.values()})

# %%
run.report()

# %% [markdown]
# **How to read the table.** The claims are about this comparison. Those that bear the name of a method ask whether it comes nearer to the full sampler than a rival at no fewer operations. They are put in the direction in which a paper would put them.
#
# Contradicted are *deepcache*, *faster-diffusion*, *faster-diffusion-end*, *uniform*, *harmonica*, *ras*, *learned* and *solver-unet*. The card says that we expected this, from pilots on other captions. The other claims are confirmed. So no plan as the papers run it beats fewer steps here, but for *uniform-n3*, whose last step happens to be full. Counted from the end, DeepCache and uniform branches win at $N = 2$; Faster Diffusion still loses, and so does RAS (no claim, {numref}`fig-caching-compared-gain`). A contradicted claim is about nearness at equal operations. It is not about what its paper measured, which is FID, a score of captions, or time.
#
# **Start with the end.** *End-unet*, *end-blind* and *end-mmdit* compare one cache with its full steps counted from step 0 and from the last step, each against a rival of its own price. Nothing is learned and nothing is tuned; the plan moves by one step, and step 0 stays full, which can add one. Then compare *deepcache* with *deepcache-end*, and *uniform* with *uniform-end*: the same method, the same interval. The verdicts differ. So the question "does this cache beat fewer steps?" has no answer before one says where the plan ends.
# It is also why nearness does not rise smoothly with the number of full steps. With 28 steps and $N = 3$ the last one happens to be full, with $N = 2$ it happens to rest. A comparison of intervals that does not look at this compares accidents. The pages of {doc}`/notebooks/04-caching/deepcache` and {doc}`/notebooks/04-caching/faster-diffusion` count from step 0, as the papers' uniform plans do; the verdicts there on equal cost are verdicts on those plans. Exercise 1 shows which steps are dear.
#
# **Then the networks.** Compare the two columns of {numref}`fig-caching-compared-plane`. In the U-Net a cached step still pays for its outer layers, or for its whole decoder. In the MM-DiT a step in which all branches rest costs next to nothing, so a plan with $K$ full steps costs hardly more than $K$ steps of Euler's method. What can it gain? Gates, modulation and the last layer still read the present time, and the first layer the present image. So a step without a single branch is not nothing. We think that it corrects the prediction for the change of the time, which fewer steps cannot do. We have not tested that alone.
#
# **Does learning pay?** *Harmonica* sets the learned list against fewer steps, *learned* sets it against the plain one that counts from the end, both by their lead over rivals of their own price. The router is free to find out that the last steps matter. But its training here is a small fraction of the paper's, and the weights of the steps, which are measured on a few images, say little in the early steps. It failed both times; read that as a failure of this training first. The routers of the three seeds differ widely, as the long bars show, and the rival is priced by the dearest of the three lists.
#
# **Is it good to see the image?** *Sees-the-image* sets DeepCache at $b = 2$, which renews the outermost layers, against Faster Diffusion, which runs the whole decoder on old features, at the same full steps. The former is the cheaper one. For Faster Diffusion there are two reasons. The last key step of the paper's list is number 35 of 50, so the last fourteen steps run on old features. And this network predicts $v$: what a blind decoder puts out stands for another noise at each new image. The paper's remedy, some of the first noise at the end, is left out here and tried on its page. Its currency is time, and one core has no idle units to fill. **Branches or tokens?** *Branches-or-tokens* sets uniform branches against RAS, both with a full last step, uniform at fewer operations. In RAS some tokens are renewed and read old keys and values of the others; its page shows what that mixture costs.
#
# **A better solver** is the rival that needs no cache. *Solver-unet* and *solver-mmdit* ask whether a cache on the first-order solver comes nearer to the solution than a second-order solver with at least as many operations. In the U-Net the solver wins, and is the simpler choice; in the MM-DiT the cache does. With very few steps a second-order solver can be worse than a first-order one: a line through two predictions that lie far apart points anywhere. Whether the two ideas add up is exercise 2.
#
# **Which reference?** Compare dots and squares in {numref}`fig-caching-compared-gain`. Fewer steps share their error with the full sampler, which flatters them in the upper row of {numref}`fig-caching-compared-plane`. Where a cache comes near the full sampler, the full sampler's own error dominates both distances to the solution, and the gain there is the smaller one. If you want what the full sampler draws, read the dots; if you want what it approximates, read the squares. The lower row also shows how little a cache can gain there: it cannot pass the full sampler's line but by accident.
#
# **Does one see any of this?** The oracle is a network that reads scenes; its scores are in the last column of the list above the figures. Where it finds every object it is at its ceiling, as it is in nearly all arms, and *accuracy* says no more than that nothing is broken. Then the choice between these arms is one of decibels that nobody sees, and what is left to decide by is cost. For that, look at the last lines below the table. A method whose number there is above 1 saves less time than operations, at one image: a step that does little still makes many small calls. Faster Diffusion saves more time than operations, since the decoders of a group run as one batch.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Which network caches better.** The U-Net is a diffusion with 50 DDIM steps, the MM-DiT a flow with 28 Euler steps. The columns differ in network, in noise schedule and in solver. Compare within a column.
# - **Photographs and latents.** Flat shapes on plain grounds, and captions that settle nearly everything. That is the best case for fewer steps.
# - **Quality.** Nearness to a reference is not quality, and our reader of scenes is easily satisfied.
# - **Tuning.** RAS has the settings of its script, DeepCache two of nine branches, Faster Diffusion the key steps of its paper. Counting from the end is the first thing one would try; better places for the full steps were not looked for.
# - **A long training.** HarmoniCa's router sees few trajectories, on guided predictions, in a network for which the paper has no settings.
# - **The best multistep solver.** The two-step method of the MM-DiT is the plainest of its kind.
# - **Many seeds.** Three, of a few images each, and one training of each network.
# - **A GPU.** Times are those of one core with one image. Faster Diffusion is made for idle units, RAS has fused kernels.
# - **Forecasts.** Later methods extrapolate features instead of keeping them, as a second-order solver does with predictions. They are not on this page.
# :::
#
# ## Exercises
#
# **1.** Let exactly one step of the MM-DiT's sampler rest: all its branches hand out what they computed one step before. Which step is the dearest to leave out?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1", "image": {"alt": "Mean squared error of the final image on a logarithmic axis against the step that rests, for the MM-DiT."}}
# The prediction of the step is wrong by what one step of age does, and later steps may repair it. Nothing repairs the last.
_, tokens, x = start(2, torch.Generator().manual_seed(901), "validation")
reference, damage = draw(ARMS["Euler"], tokens, x), []
for i in range(1, L):
    resting = cache_arm("MM-DiT", "uniform", BRANCHES, L, [k for k in range(L) if k != i])
    damage.append(float((draw(resting, tokens, x) - reference).square().mean()))
fig, ax = plt.subplots(figsize=(5.4, 2.6), layout="constrained")
ax.semilogy(range(1, L), damage, "o-", color=PALETTE[2], ms=4)
ax.set(
    xlabel="the step that rests (0 is the noisiest)",
    ylabel="mean squared error",
    xticks=range(0, L + 1, -(-L // 7)),
)
plt.show()
print("dearest:", sorted(range(1, L), key=lambda i: -damage[i - 1])[:3], " cheapest:", sorted(range(1, L), key=lambda i: damage[i - 1])[:3])  # fmt: skip

# %% [markdown]
# **2.** Put the two ideas together: a cache that counts from the end, on top of the second-order solver. Is the pair nearer to the solution than either alone, at about the same operations?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# The solver's line goes through a fresh and an old prediction, so it also extrapolates the jump between them.
_, tokens, x = start(s.images, torch.Generator().manual_seed(s.seeds[0]), "test")
for N in (2, 3):
    pair = cache_arm("MM-DiT", "uniform", BRANCHES, L, from_end(L, N))
    calls = equal_cost_steps(pair.cost, 1.0)
    arms = {"cache, Euler": pair, "cache, Adams": pair._replace(order="second")}
    arms |= {f"Adams-{calls}": Arm("MM-DiT", "second order", calls, "second")}
    for name, arm in arms.items():
        dB = float(psnr_to_reference(draw(arm, tokens, x).cpu(), images[EXACT["MM-DiT"]][0]).mean())
        print(f"N={N}, end: {name:14s} {arm.cost:5.1f} calls   {dB:5.1f} dB to the solution")

# %% [markdown]
# On this one seed the pair is the nearest of the three at $N = 2$, and no better than the cache alone at $N = 3$.
#
# **3.** You run DDIM with 50 steps and $N = 4$, counted from step 0. Which is the last full step? Which step would you add, and what does it cost? And why should step 0 be kept as well?
#
# :::{dropdown} Solution 3: in words
# Steps 0, 4, ..., 48 are full: 13 of them, and the last one is number 48. Step 49 rests on features that are one step old. To add step 49 costs one full call less one cached call, so at most a thirteenth of the plan. Or shift the plan: 49, 45, ..., 1, and 0, which are 14. Step 0 has to be full since nothing is kept before it. If it were dropped, the first full step would have to be the first step: the sampler would then begin at step 1, which is another sampler.
# :::
#
# ## References
#
# The methods: {cite:t}`deepcache`, {cite:t}`faster-diffusion`, {cite:t}`selvaraju2024fora`, {cite:t}`harmonica`, {cite:t}`ras`. The solvers: {cite:t}`song2021denoising`, {cite:t}`lu2022dpm`. Guidance: {cite:t}`ho2022classifier`. The library's parts: [minilib/cache_plans.py](https://github.com/minilib-book/minilib/blob/main/minilib/cache_plans.py),
# [minilib/cache_router.py](https://github.com/minilib-book/minilib/blob/main/minilib/cache_router.py), [minilib/propagation.py](https://github.com/minilib-book/minilib/blob/main/minilib/propagation.py), [minilib/region_adaptive.py](https://github.com/minilib-book/minilib/blob/main/minilib/region_adaptive.py), [minilib/caching.py](https://github.com/minilib-book/minilib/blob/main/minilib/caching.py).
