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
# # Faster Diffusion: a decoder that runs blind
#
# {cite:t}`faster-diffusion` run the encoder of a U-Net in a few key steps only. In the steps between, the decoder works alone, on what the encoder saw last. It does not look at the image at all, so all these steps can be computed side by side, in one batch.
#
# Not to look at the image has a price. This page measures it, and asks what the extra runs of the decoder buy over not running anything. For this book's network the answer is: less than nothing. A sampler that keeps the predicted noise between the same key steps, and runs no decoder, comes nearer to the full sampler. Part of the reason can be measured, and so can what the paper's last ingredient, some of the initial noise,
# puts right. What it does and does not mean for the paper's own models is said under the results.

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
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter
from torch.utils.flop_counter import FlopCounterMode

from minilib import zoo
from minilib.arms import run_arms
from minilib.caching import equal_cost_steps, plan_cost, uniform_refreshes
from minilib.data import shapes
from minilib.guidance import classifier_free_guidance
from minilib.intervene import at_steps, cached, trace_executions
from minilib.metrics import energy_above, psnr_to_reference, radial_spectrum, read_in_batches, scene_scores
from minilib.models import UNet
from minilib.plotting import PALETTE, mean_interval, show_images, use_style
from minilib.profiling import count_parameters, cpu_time, to_meta
from minilib.propagation import EncoderPropagation, decode_steps, encode_key, key_groups, mirrored_keys
from minilib.recipes.scenes import ddim_scheduler
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample_final
from minilib.schedulers import DPMSolverMultistepScheduler


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each has captions and noise of its own
    images: int  # a seed
    steps: int  # of the sampler (DDIM)
    keys: tuple[int, ...]  # the paper's key steps, for 50 steps
    evenly: int  # as many key steps, evenly: one in so many steps
    exact_steps: int  # of the near-exact solution
    watched: int  # images whose features are compared
    repeats: int  # of each timing
    jobs: int  # processes


PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)
run = Reproduction(
    "faster-diffusion",
    profile,
    {
        "smoke": Settings((0,), 4, 10, (0, 1, 2, 4, 7), 2, 16, 2, 1, 1),
        "cpu": Settings((0, 1, 2), 36, 50, PAPER, 6, 100, 8, 3, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 500, 50, PAPER, 6, 200, 64, 5, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# Model, scenes, noise and sampler are those of {doc}`/notebooks/04-caching/deepcache`, so the numbers of both pages can be compared. The model is a small text-to-image U-Net with three resolutions and nine skip connections; DDIM {cite:p}`song2021denoising` takes 50 steps with guidance 3 {cite:p}`ho2022classifier`.
# It predicts the velocity $v = \alpha_t \epsilon - \sigma_t x_0$ (see {doc}`/conventions`), not the noise as the paper's models do. That needs a word further down.

# %%
run.show_settings()

# %% [markdown]
# (sec-faster-diffusion-idea)=
# ## The idea
#
# A U-Net reads the noisy image in its encoder. The encoder hands its features to the decoder in two ways: through the middle, and through the skip connections. The decoder turns them into the prediction. It has no other access to the image.
#
# The paper looks at both halves while a sampler runs, and finds that the encoder's features change little from one step to the next, the decoder's a lot. So it saves the part that changes little. Some steps are **key steps**. In a key step everything runs, and what the encoder and the middle made is kept.
# In the steps up to the next key step only the decoder runs, on what was kept. A key step and the steps up to the next one are a *group*; a choice of key steps is a *plan*. It is told the current time $t$, and the text. This is *encoder propagation*. Nothing is trained.
#
# Two things follow, and both are the subject of this page.
#
# **It can run in parallel.** A decoder between two key steps needs the kept features and a time. Both are known when the key step is done. So all of them can run at once, as one batch, in which the features are repeated and the times differ. Then the sampler takes its steps one after another, with predictions that lie ready.
# The paper's plan has nine key steps for 50 steps; so the decoder is called nine times in a row instead of 50. To run in parallel saves no work. But a graphics processor that one image does not keep busy does it in less time.
#
# **It is blind.** Between two key steps the prediction does not depend on the image $x_t$ of the step. Its derivative with respect to $x_t$ is not small, it is zero. Whatever happens to the image in between, the network does not notice.
#
# The second makes the method a sampler of another kind. DDIM takes a step by mixing the image with the prediction. Write $\alpha_t = \cos\varphi_t$ and $\sigma_t = \sin\varphi_t$, as is possible because $\alpha_t^2 + \sigma_t^2 = 1$, and let $\delta_i = \varphi_{t_i} - \varphi_{t_{i+1}}$ be the angle of step $i$. Then, in terms of the velocity, a step is
#
# $$
# x_{i+1} = \cos\delta_i\; x_i - \sin\delta_i\; \hat v_i .
# $$ (eq-faster-diffusion-step)
#
# Between key steps $k$ and $k'$ no $\hat v_i$ depends on $x_i$; all depend on $x_k$ alone. So the whole group is one step, linear in the image and in the predictions:
#
# $$
# x_{k'} = A\, x_k - \sum_{i=k}^{k'-1} B_i\, \hat v_i , \qquad A = \prod_{j=k}^{k'-1} \cos\delta_j , \qquad B_i = \sin\delta_i \prod_{j=i+1}^{k'-1} \cos\delta_j .
# $$ (eq-faster-diffusion-group)
#
# Nine key steps make a sampler of nine long steps. What is special about it is that each long step uses a weighted mean of several predictions, made by the decoder from one look at the image.
#
# Hence the rival. DDIM with nine steps, at the same places, looks at the image just as often. It uses one prediction a step, keeps the predicted noise $\hat\epsilon$ as it is, and does not run the decoder in between. (That keeping $\hat\epsilon$ *is* DDIM with longer steps is checked on the page of DeepCache.) The two have the same number of calls in a row. One of them does several times more work. **What does that work buy?** The paper asks this too, in its appendix. For Stable Diffusion it finds, by FID (the Fréchet inception distance, a distance between sets of images), that nine key steps give far better images than
# nine steps of DDIM, and that to keep the decoder's output as well does harm.
#
# :::{admonition} Noise and velocity
# :class: note
# For a network that predicts noise, "the whole prediction is kept" and "the noise is kept" are the same. Ours predicts $v$. Kept as it is, an old $\hat v$ stands for another noise at each new image: $\hat\epsilon = \sigma_t x_t + \alpha_t \hat v$. It is interpreted anew at $x_t$, and so is the clean image, $\hat x_0 = \alpha_t x_t - \sigma_t \hat v$. So we run both controls: the noise kept, and
# the velocity kept. And the decoder has a task of its own here. Even if noise and clean image stay what they are, $v = \alpha_t \epsilon - \sigma_t x_0$ turns with $t$. A decoder that is told the new time can turn it.
# :::

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("unet_shapes32").to(run.device)
unet, side = model.denoiser, model.denoiser.config["sample_size"]
captions = shapes.sample_scenes(4, torch.Generator().manual_seed(7), objects=(1, 3), split="validation")
tokens = shapes.tokens(captions).to(run.device)  # for the checks
noise = initial_noise((4, 3, side, side), torch.Generator().manual_seed(7), device=run.device)
print(f"{unet.num_skips} skips; {count_parameters(unet):,} parameters; captions of {tokens.shape[1]} tokens")
print("lengths of the paper's groups of 50 steps:", *(len(group) for group in key_groups(50, PAPER)))

# %% [markdown]
# (sec-faster-diffusion-method)=
# ## The method
#
# The library's U-Net has its three parts apart. So the method is five lines. What is kept is all that the decoder reads of the image.


# %%
def propagate(unet, x, t, text, kept=None):
    """One call, in a key step (nothing kept) or between key steps: the prediction, and what the decoder reads of the image."""
    emb = unet.embed(t)  # the time is always the current one
    if kept is None:
        h, skips = unet.encode(x, emb, *text)
        kept = unet.middle(h, emb, *text), skips
    return unet.decode(*kept, emb, *text), kept  # between key steps x is not used


# %% [markdown]
# The two controls keep more. They call nothing at all between key steps.


# %%
def level(t):
    """alpha and sigma at the time of a batch."""
    bar = ddim_scheduler().alphas_cumprod_f64[int(t[0])]
    return float(bar.sqrt()), float((1 - bar).sqrt())


def keep_noise(unet, x, t, text, kept=None):
    """The predicted noise stays as it was in the key step: DDIM with longer steps."""
    alpha, sigma = level(t)
    kept = sigma * x + alpha * unet(x, t, *text) if kept is None else kept
    return (kept - sigma * x) / alpha, kept


def keep_velocity(unet, x, t, text, kept=None):
    """The output of the network stays as it was in the key step."""
    kept = unet(x, t, *text) if kept is None else kept
    return kept, kept


# %% [markdown]
# The sampler needs a network that counts its steps. Guidance asks it twice a step, with and without the caption, in one batch, so both halves are kept together.


# %%
def guided(model, tokens, keys, call=propagate, scale=3.0, watch=None):
    """What the sampler calls: model(x, t) -> guided prediction; `call` decides what happens between the key steps."""
    null = model.null_tokens(len(tokens), tokens.shape[1])
    with torch.no_grad():
        text = model.encode_text(torch.cat([tokens, null]))[:2]  # once for all steps
    step, kept = itertools.count(), None

    def predict(x, t):
        nonlocal kept
        if next(step) in keys:
            kept = None
        both, kept = call(model.denoiser, torch.cat([x, x]), torch.cat([t, t]), text, kept)
        if watch is not None:
            watch(kept)
        wanted, unwanted = both.chunk(2)
        return unwanted + scale * (wanted - unwanted)

    return predict


# %% [markdown]
# This runs one decoder after another. The library has the parallel form, [`EncoderPropagation`](https://github.com/minilib-book/minilib/blob/main/minilib/propagation.py): at a key step it repeats what was kept, once for each step of the group, runs the decoder once, and hands the predictions out. With guidance the rows lie as in the released code, first one half of the texts for all steps, then the other.
#
# ### Is it what we say it is?
#
# If every step is a key step, the sampler must be the plain one, bit for bit. The library's general cache, which makes any named modules hand out their old outputs, must give the same images when it is told to do so for the encoder and the middle. Sequential and parallel decoding must agree; in double precision, where rounding cannot hide a mistake.
# And the decoder must be called once a group.


# %%
def ddim(predict, steps, x=noise[:2]):
    return sample_final(predict, ddim_scheduler(), x, num_inference_steps=steps)


few, T, keys = tokens[:2], s.steps, s.keys
plain_model = classifier_free_guidance(model, few, model.null_tokens(2, few.shape[1]), guidance_scale=3.0)
run.record("every-step", float((ddim(guided(model, few, range(5)), 5) - ddim(plain_model, 5)).abs().max()))

encoder = [name for unit in unet.down_units for name in unit.names] + ["mid_block"]
with cached(unet, encoder, at_steps(keys)):
    general = ddim(plain_model, T)
run.record("general-cache", float((ddim(guided(model, few, keys), T) - general).abs().max()))


def parallel(model, tokens, keys, steps, at_once=None):
    """The library's form; at_once=1 decodes one step after another."""
    solver = ddim_scheduler()
    solver.set_timesteps(steps, device=tokens.device)
    with torch.no_grad():
        both = torch.cat([tokens, model.null_tokens(len(tokens), tokens.shape[1])])
        text = model.encode_text(both)[:2]
    return EncoderPropagation(
        model.denoiser, keys, solver.timesteps, *text, guidance_scale=3.0, at_once=at_once
    )


precise, x64 = deepcopy(model).double(), noise[:2].double()
fast = parallel(precise, few, keys, T)
with trace_executions(precise.denoiser, ["conv_in", "conv_out"]) as trace:
    at_once = ddim(fast, T, x64)
counted = [trace.counts[name].calls for name in ("conv_in", "conv_out")]
run.record("parallel", float((ddim(guided(precise, few, keys), T, x64) - at_once).abs().max()))
run.record("depth", sum(abs(calls - len(keys)) for calls in counted))

# %%
# NBVAL_CHECK_OUTPUT
print("calls of encoder and decoder in a row: one each a key step:", counted == [len(keys)] * 2)
print(
    "rows of the largest batch, in units of one step's:", max(len(group) for group in key_groups(50, PAPER))
)

# %% [markdown]
# ### What it costs
#
# Let a full call cost $F$ multiply-accumulates (MACs), and the decoder alone $D$, with the embedding of the time. With $K$ key steps of $T$ the sampler costs
#
# $$
# K F + (T - K) D , \qquad\text{a saving of}\qquad \left(1 - \frac{K}{T}\right) \frac{F - D}{F} .
# $$ (eq-faster-diffusion-cost)
#
# The saving is the share of the encoder and the middle, times the share of steps that are not key steps. We count on torch's `meta` device, where tensors have shapes and no values: for this page's network, and for Stable Diffusion 1.5 at its real size. The paper gives 37,050 and 27,350 GFLOPs for 50 steps, and 224.2, 6.0 and 504.4 for encoder, middle and decoder in one step.


# %%
def count(call, *args):
    """MACs of one call on the meta device, and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = call(*args)
    return counter.get_total_flops() // 2, result


def ghost_call(unet, side, length):
    """Arguments of a call on the meta device."""
    x, t = torch.zeros(1, unet.in_channels, side, side, device="meta"), torch.zeros(1, device="meta")
    return to_meta(unet), x, t, (torch.zeros(1, length, unet.cross_attention_dim, device="meta"), None)


def counted_costs(unet, side, length):
    """F and D."""
    args = ghost_call(unet, side, length)
    full, (_, kept) = count(propagate, *args)
    return full, count(propagate, *args, kept)[0]


F_full, D = counted_costs(unet, side, tokens.shape[1])
sampler = guided(to_meta(model), tokens[:1].to("meta"), (0, 2, 3))
_, x, t, _ = ghost_call(unet, side, tokens.shape[1])
total, _ = count(lambda: [sampler(x, t) for _ in range(7)])  # both halves of guidance
run.record("macs", abs(total - 2 * plan_cost(7, (0, 2, 3), F_full, D)))

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
sd_full, sd_decoder = counted_costs(sd, 64, 77)
sd_saving = 1 - plan_cost(50, PAPER, sd_full, sd_decoder) / (50 * sd_full)
run.record("real-size", abs(sd_saving - (37050 - 27350) / 37050))

# %%
# NBVAL_CHECK_OUTPUT
for name, F, part in (("this page's network", F_full, D), ("Stable Diffusion 1.5", sd_full, sd_decoder)):
    saved = 1 - plan_cost(50, PAPER, F, part) / (50 * F)
    print(
        f"{name}: {F / 1e9:.3f} GMAC a call; encoder and middle {1 - part / F:.1%}; the paper's plan saves {saved:.1%}"
    )
print(
    f"the paper: encoder and middle {(224.2 + 6.04) / (224.2 + 6.04 + 504.4):.1%}; saved {(37050 - 27350) / 37050:.1%}"
)
print(f"no plan saves more than {1 - sd_decoder / sd_full:.1%}, with any number of key steps")

# %% [markdown]
# The share of the encoder is nearly the same in both networks, and the saving that we count is close to the one in the paper's table. (Its total is lower than ours, which for 50 guided steps is 100 calls. What the paper calls a FLOP is a MAC here: its counter, fvcore, counts a multiplication and an addition as one. It may also leave out the products inside a fused attention.) Note how large the decoder is. It takes part in every step, so **no choice of key steps can save more than about a third** of the operations. The paper's time shows both
# sources: on one GPU 24 % less with sequential decoding, which is the operations, and 41 % less with parallel decoding. The price is memory, half as much again, for the repeated features.
#
# :::{admonition} In the released code
# :class: tip
# As we read [`utils_sd.py`](https://github.com/hutaiHang/Faster-Diffusion/blob/main/utils_sd.py): the plan for 50 steps has the nine key steps used here. The code for DeepFloyd-IF, [`utils_if.py`](https://github.com/hutaiHang/Faster-Diffusion/blob/main/utils_if.py), has ten under the same name; the tenth is step 40. In the parallel pipeline the network is called before the prior noise (see below) is added,
# in the sequential one after it; so in a key step the two read slightly different images. The parallel pipeline does not call the scheduler's `scale_model_input`, which DDIM does not need and Euler's method does.
# :::
#
# (sec-faster-diffusion-experiment)=
# ## The experiment
#
# Every arm starts from the same noise and captions. We measure how near it comes to the image of the full sampler, DDIM with 50 steps: the peak signal-to-noise ratio (PSNR) in decibels. Twenty decibels more are a tenth of the error. An error of one grey level in 255 is 48 dB; what lies above that can hardly be seen.
#
# :::{table} The arms. "Uniform" means every second, third or fifth step.
# :name: tab-faster-diffusion-arms
#
# | arm | between key steps | question |
# |---|---|---|
# | propagation | decoder only | the method: the paper's nine key steps, and uniform ones |
# | noise kept | nothing; $\hat\epsilon$ stays | same key steps, same calls in a row: what do the decoders buy? Every sixth step it is DDIM with nine steps, every second DDIM with 25 |
# | velocity kept | nothing; $\hat v$ stays | the network's own output stays: is it good to tell the decoder the new time? |
# | fewer steps | (every step is full) | DDIM with as many steps as the MACs of propagation allow, rounded up, which favours it by less than one step |
# | key steps elsewhere | decoder only | nine dense early (the paper's), nine dense late (its mirror image), every sixth step |
# | a window | decoder with a fresh outermost skip | how much of the loss is due to blindness? |
# | DeepCache | outermost units only, encoder and decoder | at branch 2 of its page: sees the image, and recomputes less |
# | prior noise | decoder only; a little of the initial noise is added to the image | the paper's remedy for lost texture, with the paper's key steps and with even ones |
# | near-exact | DPM-Solver++ with many steps | do the results hold against a reference that is not DDIM? |
# :::
#
# **A window.** Between key steps we run one convolution of the encoder, the first one. It makes the outermost skip. So the decoder sees the current image, but only through its last unit; all else is old. This costs next to nothing and differs from the method in one thing: it is not blind. (It cannot run in parallel any more.)
#
# **Prior noise.** With old features the images lose texture, the paper says. Its remedy is to add some of the *initial* noise $z_T$ to the image before each step of the second half, $t < 500$: $x_t \leftarrow x_t + 0.003\, z_T$. We add it before the network is called, as the released sequential pipeline does; so in a key step the encoder reads it. The control does the same to the plain sampler.
#
# **Near-exact.** DDIM with 50 steps has an error of its own, which other DDIM samplers share in part. So we look at a second reference, the solution by a second-order solver with many steps {cite:p}`lu2022dpm`, as on the page of DeepCache.


# %%
def with_window(unet, x, t, text, kept=None):
    """Propagation, but the outermost skip is always fresh."""
    if kept is not None:
        fresh = unet.encode(x, unet.embed(t), *text, stop=1)[1]
        return propagate(unet, x, t, text, (kept[0], fresh + kept[1][1:]))[0], kept
    return propagate(unet, x, t, text)


def deep_cache(unet, x, t, text, kept=None, b=2):
    """DeepCache at branch 2; its page explains it."""
    emb, enter = unet.embed(t), unet.num_skips - 1 - b
    h, skips = unet.encode(x, emb, *text, stop=unet.num_skips if kept is None else b + 1)
    kept = unet.decode(unet.middle(h, emb, *text), skips, emb, *text, stop=enter) if kept is None else kept
    return unet.decode(kept, skips, emb, *text, start=enter), kept


args = ghost_call(unet, side, tokens.shape[1])
BETWEEN = {keep_noise: 0.0, keep_velocity: 0.0}  # cost of a call between key steps, in full calls
for call in (propagate, with_window, deep_cache):
    BETWEEN[call] = count(call, *args, count(call, *args)[1][1])[0] / F_full


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
    keys: tuple[int, ...]
    call: Callable = propagate
    prior: float = 0.0  # how much of the initial noise is added before each step with t < 500
    solver: Callable = ddim_scheduler

    @property
    def cost(self):
        """In full calls."""
        return plan_cost(self.steps, self.keys, 1.0, BETWEEN[self.call])

    @property
    def depth(self):
        """Calls of the network, or of parts of it, that have to wait for each other."""
        return self.steps if self.call in (with_window, deep_cache) else len(self.keys)


def plain(steps, solver=ddim_scheduler):
    return Arm(steps, tuple(range(steps)), solver=solver)


late, even = mirrored_keys(T, keys), uniform_refreshes(T, s.evenly)
ARMS = {"full": plain(T), "exact": plain(s.exact_steps, dpm_solver)}
ARMS |= {"paper": Arm(T, keys), "late": Arm(T, late), "evenly": Arm(T, even)}
for N in (2, 3, 5):
    ARMS[f"every {N}"] = Arm(T, uniform_refreshes(T, N))
for name in ("paper", "late", "evenly", "every 2", "every 3", "every 5"):
    ARMS[f"noise kept, {name}"] = ARMS[name]._replace(call=keep_noise)
for name in ("paper", "every 5"):
    ARMS[f"velocity kept, {name}"] = ARMS[name]._replace(call=keep_velocity)
for name in ("every 2", "every 5"):
    ARMS[f"DeepCache, {name}"] = ARMS[name]._replace(call=deep_cache)
ARMS["window, paper"] = ARMS["paper"]._replace(call=with_window)
for name in ("paper", "evenly", "full"):
    ARMS[f"{name}, prior noise"] = ARMS[name]._replace(prior=0.003)
RIVAL = {}  # DDIM with fewer steps, at no fewer MACs
for name in ("paper", "every 2"):
    rival = plain(equal_cost_steps(ARMS[name].cost, 1.0))
    RIVAL[name] = f"DDIM-{rival.steps}"
    ARMS[RIVAL[name]] = rival


def asked(seed, n=s.images):
    """The captions of a seed."""
    return shapes.sample_scenes(n, torch.Generator().manual_seed(1000 + seed), objects=(1, 3), split="test")


@torch.no_grad()
def with_prior(predict, solver, steps, x, prior=0.0, after=-1):
    """The sampler's loop. Before each step with t < 500 that comes after step `after` it adds some of the initial noise."""
    first = x
    solver.set_timesteps(steps, device=x.device)
    for i, t in enumerate(solver.timesteps):
        if t < 500 and i > after:
            x = x + prior * first
        x = solver.step(predict(x, t.expand(len(x))), t, x).prev_sample
    return x


def draw(arm, seed):
    """The images of one arm and seed. The same noise and captions as on the page of DeepCache."""
    tokens = shapes.tokens(asked(seed)).to(run.device)
    x = initial_noise((len(tokens), 3, side, side), torch.Generator().manual_seed(seed), device=run.device)
    predict = guided(model, tokens, arm.keys, arm.call)
    return with_prior(predict, arm.solver(), arm.steps, x, arm.prior).clamp(-1, 1).cpu()


images = run_arms(draw, ARMS, s.seeds, s.jobs)
print({name: f"{arm.cost:.1f} full calls, {arm.depth} in a row" for name, arm in ARMS.items()})

# %% [markdown]
# ## Results
#
# ### The picture: what does the network look at?
#
# One image, sampled step by step. At each step we ask autograd for the derivative of the guided prediction with respect to the image of that step. {numref}`fig-faster-diffusion-blind` shows the size of the whole derivative (its Frobenius norm, estimated with one random vector of signs, the same everywhere), and for some steps where it lies: how much each pixel of the image moves the
# prediction at the central pixel.


# %%
def look(keys, seed=0):
    """At each step: the norm of the derivative, and maps of the derivative at the centre, with respect to this step's image and to the key step's."""
    tokens = shapes.tokens(asked(seed, 1)).to(run.device)
    x = initial_noise((1, 3, side, side), torch.Generator().manual_seed(seed), device=run.device)
    signs = initial_noise(x.shape, torch.Generator().manual_seed(1), device=run.device).sign()
    predict, solver, norms, maps, seen = guided(model, tokens, keys), ddim_scheduler(), [], [], x
    solver.set_timesteps(T, device=run.device)
    for i, t in enumerate(solver.timesteps):
        x = x.detach().requires_grad_()
        seen = x if i in keys else seen
        v = predict(x, t.expand(1))
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        norms.append(float(torch.autograd.grad((signs * v).sum(), x, **options)[0].norm()))
        centre = v[..., side // 2, side // 2].sum()
        maps.append([g.abs().sum((0, 1)).cpu() for g in torch.autograd.grad(centre, [x, seen], **options)])
        x = solver.step(v, t, x).prev_sample
    return torch.tensor(norms), maps


sharp, sharp_maps = look(range(T))
blind, blind_maps = look(keys)
between = [i for i in range(T) if i not in keys]
run.record("blind", blind[between].max())
run.record("sees", float(blind[list(keys)].min()))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above: size of the derivative against the step. A grey line, the full sampler, is positive everywhere. Blue bars stand at the key steps only, close together at first and far apart later; between them is nothing. Below: three rows of five square maps for one group of steps. In the upper row, the full sampler, a bright spot in the middle of each map. In the middle row, propagation, the first and last maps have the spot, the three between are empty. In the lower row, the derivative with respect to the key step's image, all maps have a spot."}, "figure": {"caption": "The picture to remember: between key steps the decoder is blind. Above: size of the derivative of the prediction with respect to the image of the same step; grey: the full sampler; blue: propagation with the paper's key steps; where there is no bar it is exactly zero. Below: which pixels move the prediction at the centre, in one group of steps and the key step after it. Upper row: the full sampler. Middle: propagation. Lower: propagation, derivative with respect to the image of the last key step, which is what the decoder still looks at. All maps share one scale.", "name": "fig-faster-diffusion-blind"}}
group = key_groups(T, keys)[-2]
shown = [group[0], *(group[round(q * (len(group) - 1))] for q in (0.34, 0.67, 1.0)), group[-1] + 1]
fig = plt.figure(figsize=(7, 6.2), layout="constrained")
top, *grid = fig.subplot_mosaic(
    [["top"] * 5, *[[f"{r}{c}" for c in range(5)] for r in range(3)]], height_ratios=(1.5, 1, 1, 1)
).values()
top.plot(range(T), sharp, color="0.5", lw=1.5, label="full sampler")
top.bar(list(keys), blind[list(keys)], color=PALETTE[0], width=0.7, label="propagation")
top.axvspan(group[0] - 0.5, group[-1] + 1.5, color="0.93", lw=0, zorder=0, label="maps below")
top.set(
    xlabel="step (0 is the noisiest)",
    ylabel=r"size of $\partial\hat v/\partial x_t$",
    xlim=(-1, T),
    yscale="log",
    yticks=(20, 50, 100, 200, 400),
)
top.yaxis.set_major_formatter("{x:g}")
top.yaxis.set_minor_formatter(NullFormatter())
top.legend(ncol=3, fontsize=9)
rows = {
    "full": [sharp_maps[i][0] for i in shown],
    "propagation": [blind_maps[i][0] for i in shown],
    "... and the\nkey image": [blind_maps[i][1] for i in shown],
}
scale = float(torch.stack(rows["full"]).quantile(0.995))
for ax, (label, column) in zip(grid, itertools.product(rows, range(5)), strict=True):
    ax.imshow(rows[label][column], cmap="inferno", vmin=0, vmax=scale)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    if column == 0:
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    if label == "full":
        kind = "key" if shown[column] in keys else "blind"
        ax.set_title(f"step {shown[column]}: {kind}", fontsize=9)
plt.show()

# %% [markdown]
# The empty maps are not dark by rounding. The derivative is exactly zero, and the claim *blind* asks for that; *sees* asks that it is not zero at the key steps.
#
# ### Does the decoder change more than the encoder?
#
# The paper's premise. We run the full sampler and follow 18 features: what each of the nine units of the encoder makes (the skips), and what each of the nine units of the decoder makes. How much does a feature $f$ change from one step to the next? The paper takes the mean squared difference. We take that too. But features differ in scale, and a large feature may change by a lot and yet by a small part of itself. So we also take the change relative to the size,
# $\lVert f_i - f_{i-1} \rVert / \lVert f_{i-1} \rVert$. All of it for a second network as well, the sibling for 16 pixels: another training run.


# %%
def all_units(unet, x, t, text, kept=None):
    """A full call that hands out the feature after each unit, encoder first."""
    emb = unet.embed(t)
    h, skips = unet.encode(x, emb, *text)
    main = [unet.middle(h, emb, *text)]
    for j in range(unet.num_skips):
        main.append(unet.decode(main[-1], skips, emb, *text, start=j, stop=j + 1))
    return unet.decode(main[-2], skips, emb, *text, start=unet.num_skips - 1), skips + main[1:]


def changes(model, seed):
    """(2, steps - 1, 18): relative and mean squared change of each feature from step to step, mean over images."""
    size, seen, out = model.denoiser.config["sample_size"], [], []

    def watch(features):
        features = [f[: s.watched].flatten(1) for f in features]  # the half with the caption
        if seen:
            gone = [(new - old).norm(dim=1) for new, old in zip(features, seen[-1], strict=True)]
            relative = [(d / old.norm(dim=1)).mean() for d, old in zip(gone, seen[-1], strict=True)]
            square = [(d.square() / old.shape[1]).mean() for d, old in zip(gone, seen[-1], strict=True)]
            out.append(torch.stack([*relative, *square]))
        seen[:] = [features]

    tokens = shapes.tokens(asked(seed, s.watched)).to(run.device)
    x = initial_noise((s.watched, 3, size, size), torch.Generator().manual_seed(seed), device=run.device)
    ddim(guided(model, tokens, range(T), all_units, watch=watch), T, x)
    return torch.stack(out).cpu().unflatten(1, (2, -1)).transpose(0, 1)


NETWORKS = {"32 pixels": model, "16 pixels": zoo.load("unet_shapes16").to(run.device)}
change = {name: torch.stack([changes(net, seed) for seed in s.seeds]) for name, net in NETWORKS.items()}
halves = {
    name: c.unflatten(3, (2, unet.num_skips)).mean((2, 4)) for name, c in change.items()
}  # seed, kind, half
ratios = {name: h[..., 1] / h[..., 0] for name, h in halves.items()}  # decoder over encoder
for name, ratio in ratios.items():
    encoder_mean, decoder_mean = halves[name][:, 0].mean(0)
    print(
        f"{name}: relative change a step, encoder {encoder_mean:.3f}, decoder {decoder_mean:.3f}, ratio "
        f"{ratio[:, 0].mean():.2f}; ratio of the mean squared changes {ratio[:, 1].mean():.2f}"
    )
for i, claim in enumerate(("change", "change-square")):
    run.record(claim, torch.stack([ratio[:, i] for ratio in ratios.values()]).amin(0))  # the worse network
of_encoder = [c[:, 0, :, : unet.num_skips].mean(2) for c in change.values()]  # (seeds, steps - 1)
early = [c[:, : T // 2].mean(1) / c[:, T // 2 :].mean(1) for c in of_encoder]
run.record("change-early", torch.stack(early).amin(0))
print("encoder, first half of the steps over the second:", [f"{ratio.mean():.2f}" for ratio in early])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels of relative change against the step, encoder in blue and decoder in orange, thin lines for single units and thick ones for the means. Both rise and fall together along the way, and the two thick lines lie close to each other."}, "figure": {"caption": "How much features change from one step to the next, relative to their size. Thin: each of the nine units; thick: the mean over units, with the 90 % interval over seeds. Left: the network of this page. Right: its sibling for 16 pixels.", "name": "fig-faster-diffusion-change"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharey=True)
for ax, (name, c) in zip(axes, change.items(), strict=True):
    for i, (half, colour) in enumerate((("encoder", PALETTE[0]), ("decoder", PALETTE[1]))):
        part = c[:, 0, :, i * unet.num_skips : (i + 1) * unet.num_skips]
        ax.plot(range(1, T), part.mean(0), color=colour, lw=0.5, alpha=0.5)
        mean, low, high = mean_interval(part.mean(2))
        ax.plot(range(1, T), mean, color=colour, lw=2.2, label=half)
        ax.fill_between(range(1, T), low, high, color=colour, alpha=0.25, lw=0)
    ax.set(xlabel="step", title=name, yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
axes[0].set_ylabel("relative change from the step before")
axes[0].legend()
plt.show()

# %% [markdown]
# ### What do the decoders buy?
#
# {numref}`fig-faster-diffusion-pareto` shows the same arms twice. On the left they are set against the work, in MACs. On the right against the number of calls in a row, which is what counts if a batch costs no more time than one image.


# %%
def near(name, reference="full"):
    """Mean PSNR of an arm to the images of a reference arm, in dB: one number a seed."""
    pairs = zip(images[name], images[reference], strict=True)
    return torch.stack([psnr_to_reference(x, y).mean() for x, y in pairs])


psnr = {name: near(name) for name in ARMS if name != "full"}
to_exact = {name: near(name, "exact") for name in ARMS if name != "exact"}
for N in (2, 3, 5):
    run.record(f"depth-n{N}", psnr[f"every {N}"] - psnr[f"noise kept, every {N}"])
run.record("depth-paper", psnr["paper"] - psnr["noise kept, paper"])
run.record("told-time", psnr["paper"] - psnr["velocity kept, paper"])
run.record("fewer-9", psnr["paper"] - psnr["noise kept, evenly"])
run.record("fewer-25", psnr["paper"] - psnr["noise kept, every 2"])
run.record("equal-cost-paper", psnr["paper"] - psnr[RIVAL["paper"]])
run.record("equal-cost-n2", psnr["every 2"] - psnr[RIVAL["every 2"]])
run.record("exact-paper", to_exact["paper"] - to_exact[RIVAL["paper"]])
run.record("placement-late", psnr["paper"] - psnr["late"])
run.record("placement-even", psnr["paper"] - psnr["evenly"])
run.record("window", psnr["window, paper"] - psnr["paper"])
run.record("deepcache", psnr["DeepCache, every 5"] - psnr["every 5"])
print(f"{'PSNR in dB':24s}{'cost':>8s}{'in a row':>10s}{'to DDIM-' + str(T):>14s}{'to the solution':>17s}")
for name in psnr:
    if name != "exact":
        print(
            f"{name:24s}{ARMS[name].cost:8.1f}{ARMS[name].depth:10d}"
            f"{psnr[name].mean():14.1f}{to_exact[name].mean():17.1f}"
        )
print(f"{f'DDIM-{T} itself':24s}{T:8.1f}{T:10d}{'':14s}{to_exact['full'].mean():17.1f}")


# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels with the same points, PSNR to the full sampler. Left, against work: a grey dashed line, DDIM with fewer steps, rises from few calls to many; the points of propagation, blue circles, with a star for the paper's key steps and a triangle for late ones, all lie at a high cost and far below the line; DeepCache, green, lies between. Right, against calls in a row: propagation moves to the left, to where few steps are, and still lies well below the grey line; DeepCache stands at the far right."}, "figure": {"caption": "Two stories from the same points. Left: PSNR to the full sampler against the work. Right: against the calls that have to wait for each other. The grey line is DDIM with fewer steps: the noise kept between uniform key steps, and two plain samplers. Its first point is the noise kept at every sixth step. Of the uniform plans of propagation the one with the fewest key steps is not the lowest. Bars: 90 % intervals over seeds.", "name": "fig-faster-diffusion-pareto"}}
def by_cost(names):
    return sorted(set(names), key=lambda name: ARMS[name].cost)


LINES = {
    "fewer steps (noise kept)": (
        by_cost(
            [*(f"noise kept, {n}" for n in ("evenly", "every 5", "every 3", "every 2")), *RIVAL.values()]
        ),
        "0.4",
        "s--",
    ),
    f"propagation, every {s.evenly}, 5, 3, 2": (["evenly", "every 5", "every 3", "every 2"], PALETTE[0], "o"),
    "propagation, paper's keys": (["paper"], PALETTE[1], "*"),
    "propagation, late keys": (["late"], PALETTE[3], "v"),
    "noise kept, paper's keys": (["noise kept, paper"], PALETTE[4], "P"),
    "velocity kept, paper's keys": (["velocity kept, paper"], PALETTE[5], "X"),
    "with a window, paper's keys": (["window, paper"], "k", "D"),
    "DeepCache, $b = 2$": ([f"DeepCache, every {N}" for N in (5, 2)], PALETTE[2], "^-"),
}
fig, axes = plt.subplots(1, 2, figsize=(7, 4.3), layout="constrained", sharey=True)
for ax, measure in zip(axes, ("cost", "depth"), strict=True):
    for label, (names, colour, style) in LINES.items():
        mean, low, high = mean_interval(torch.stack([psnr[name] for name in names], dim=1))
        ax.errorbar(
            [getattr(ARMS[name], measure) for name in names],
            mean,
            torch.stack([mean - low, high - mean]),
            fmt=style,
            ms=9 if style == "*" else 5,
            lw=1.4,
            color=colour,
            label=label,
            capsize=2,
        )
axes[0].set(xlabel="work, in full calls", ylabel=f"PSNR to DDIM, {T} steps, in dB")
axes[1].set(xlabel="calls in a row")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=2, fontsize=9)
plt.show()

# %% [markdown]
# ### What does a blind decoder say?
#
# Compare three arms with the same key steps. With the *velocity kept*, nothing is run: the prediction stays what it was. That is also what the decoder would say if it were told the time of the key step again, since all its other inputs are old. So propagation differs from it in one thing, the time that the decoder is told. With the *noise kept*, the prediction is turned by arithmetic. Take the key step's noise and clean image, $\hat\epsilon_k$ and $\hat x_k$, and suppose that they
# stay:
#
# $$
# \hat v_i = \alpha_{t_i}\, \hat\epsilon_k - \sigma_{t_i}\, \hat x_k .
# $$ (eq-faster-diffusion-turn)
#
# So: leave $\hat v$ alone, let the decoder turn it, or turn it by this formula. Does the decoder turn it as the formula does? We follow the *full* sampler and ask the blind decoder aside at each step. Its answer is fitted by $a\, \hat\epsilon_k - b\, \hat x_k$ (least squares), and $a$ and $b$ are compared with $\alpha$ and $\sigma$.
#
# There is a way to go wrong that we can write down. A network that sees $x_t = \alpha_t x_0 + \sigma_t \epsilon$ and knows $x_0$ has to answer $v = (\alpha_t x_t - x_0) / \sigma_t$. At low noise it magnifies the faint noise in its input by $1 / \sigma_t$. If it takes the old image $x_k$, in which the noise is louder, for an image of time $t$, it answers too loudly:
#
# $$
# a = \frac{\alpha_t\, \sigma_k}{\sigma_t} , \qquad b = \frac{1 - \alpha_t\, \alpha_k}{\sigma_t} .
# $$ (eq-faster-diffusion-mistaken)


# %%
@torch.no_grad()
def mixture(seed):
    """(steps, 2): a and b of the blind prediction, at each step of the full sampler's way."""
    tokens, solver, out = shapes.tokens(asked(seed, s.watched)).to(run.device), ddim_scheduler(), []
    x = initial_noise((s.watched, 3, side, side), torch.Generator().manual_seed(seed), device=run.device)
    sharp, blind = guided(model, tokens, range(T)), guided(model, tokens, keys)
    solver.set_timesteps(T, device=run.device)
    for i, t in enumerate(solver.timesteps):
        alpha, sigma = level(t.reshape(1))
        v, answer = sharp(x, t.expand(len(x))), blind(x, t.expand(len(x)))
        if i in keys:
            basis = torch.stack([(sigma * x + alpha * v).flatten(), (sigma * v - alpha * x).flatten()], dim=1)
        out.append(torch.linalg.lstsq(basis, answer.reshape(-1, 1)).solution[:, 0].cpu())
        x = solver.step(v, t, x).prev_sample
    return torch.stack(out)


mixed = torch.stack([mixture(seed) for seed in s.seeds])  # seed, step, (a, b)
solver = ddim_scheduler()
solver.set_timesteps(T)
ideal = torch.tensor([level(t.reshape(1)) for t in solver.timesteps])  # step, (alpha, sigma)
run.record("overshoot", mixed[:, -1, 0] / ideal[-1, 0])
print(f"last step: a = {mixed[:, -1, 0].mean():.2f}, alpha = {ideal[-1, 0]:.2f}", end="; ")
print(f"b = {mixed[:, -1, 1].mean():.2f}, sigma = {ideal[-1, 1]:.2f}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels against the step: the part of the noise and the part of the image in the prediction. A black line is the formula, blue points are the blind decoder, dotted lines the mistake. In both panels the points sit on the line at the key steps and leave it between them: in the early groups the part of the noise stays a little below it; in the group before the last that part is on the line and the part of the image above it; in the last group both run away above it, towards the dotted line."}, "figure": {"caption": "How the blind decoder turns its answer. Left: how much of the key step's noise is in it, $a$. Right: how much of the key step's clean image, $b$. Line: what the formula asks for, $\\alpha$ for the noise and $\\sigma$ for the image. Dotted: what comes out if the old image is taken for one of the present time; it leaves the frame. Grey verticals: key steps. Bars: 90 % intervals over seeds, hardly larger than the points.", "name": "fig-faster-diffusion-turn"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained")
mean, low, high = mean_interval(mixed)
for j, (ax, name) in enumerate(zip(axes, ("noise, $a$", "clean image, $b$"), strict=True)):
    for group in key_groups(T, keys):
        alpha_k, sigma_k = ideal[group[0]]
        alpha, sigma = ideal[list(group)].T
        mistaken = (alpha * sigma_k / sigma, (1 - alpha * alpha_k) / sigma)[j]
        ax.plot(group, mistaken, ":", color=PALETTE[1], lw=1.5, label="old image taken for new")
        ax.axvline(group[0], color="0.85", lw=1, zorder=0)
    bars = torch.stack([mean - low, high - mean])[..., j]
    ax.plot(range(T), ideal[:, j], color="k", lw=1.2, label="formula")
    ax.errorbar(range(T), mean[:, j], bars, fmt="o", ms=3.5, color=PALETTE[0], label="blind decoder")
    ax.set(xlabel="step", ylabel=f"part of the {name}", ylim=(0, (2.0, 1.3)[j]))
    ax.grid(False)
handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
axes[1].legend(handles.values(), handles.keys(), fontsize=9, loc="lower left")
plt.show()

# %% [markdown]
# ### How the images look

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of eight small images of coloured shapes on plain backgrounds, the same eight scenes in each row. All rows show the same scenes; they differ in how clean colours and edges are. With the paper's key steps propagation and the kept velocity show grain, a darker background and stronger colours than the full sampler; late key steps and the kept noise look like it."}, "figure": {"caption": "The first eight captions of the first seed, not chosen. First row: the full sampler. Rows 2 to 5 and the last call the network nine times in a row, the row with the window 50 times. \"Paper\" and \"late\" alone are propagation with these key steps. At the left of each row its mean PSNR to the full sampler, over all images of all seeds.", "name": "fig-faster-diffusion-samples"}}
rows = [
    "full",
    "paper",
    "late",
    "noise kept, paper",
    "velocity kept, paper",
    "window, paper",
    "paper, prior noise",
]
labels = [
    f"{name.replace(', ', chr(10))}\n{float(psnr[name].mean()):.1f} dB" if name in psnr else name
    for name in rows
]
fig, ax = plt.subplots(figsize=(6.2, 4.7), layout="constrained")
columns = min(8, s.images)
show_images(torch.cat([images[name][0][:columns] for name in rows]), columns, ax=ax, row_labels=labels)
plt.show()

# %% [markdown]
# Nearness is not quality. So we also let this book's oracle, a network trained to read scenes, say which objects of the caption are there with the right shape, colour, size and place.

# %%
oracle, hits = zoo.load("oracle_shapes32"), {}
for name in rows:
    scored = [
        scene_scores(read_in_batches(oracle, x), asked(seed))["object"].nanmean()
        for seed, x in zip(s.seeds, images[name], strict=True)
    ]
    hits[name] = torch.stack(scored)
    print(f"{name:24s} objects right {hits[name].mean():6.1%}")
run.record("accuracy", hits["paper"] - hits["full"])

# %% [markdown]
# ### Prior noise: what does it add, and what was missing?
#
# Part of the answer is arithmetic. Between key steps the network does not read the image. So what is added to it passes through {eq}`eq-faster-diffusion-step` as it is, times $\cos\delta$ in each step. After the *last* key step nothing ever reads it. All that is added there arrives in the finished image:
#
# $$
# c\, z_T , \qquad c = \sum_{i > k_{\text{last}}} 0.003 \prod_{j \ge i} \cos\delta_j .
# $$ (eq-faster-diffusion-prior)
#
# That is plain noise, of a strength that is known beforehand. (For a network that predicts noise the factor of a step is $\alpha_{t_{i+1}} / \alpha_{t_i}$, a little above 1.) Why should it help? Then it must matter that it is the *initial* noise. DDIM without randomness spends its steps taking $z_T$ out of the image again. So we look for $z_T$ in the error of the finished images: the coefficient of $z_T$ in the difference to the full sampler's images, by least squares.


# %%
def unread(plan, predicts="v"):
    """The factor c of the initial noise in the finished image, from what is added after the last key step."""
    bar = ddim_scheduler().alphas_cumprod_f64
    bar = torch.cat([bar[solver.timesteps], bar[:1]])
    angle, c = bar.sqrt().arccos(), 0.0
    factor = (angle[:-1] - angle[1:]).cos() if predicts == "v" else (bar[1:] / bar[:-1]).sqrt()
    for i in range(max(plan) + 1, T):
        c = (c + 0.003 * float(solver.timesteps[i] < 500)) * float(factor[i])
    return c


quiet = ddim(parallel(precise, few, keys, T), T, x64)
noisy = with_prior(parallel(precise, few, keys, T), ddim_scheduler(), T, x64, 0.003, after=max(keys))
c = unread(keys)
run.record("unread", float((noisy - quiet - c * x64).abs().max()))
print(f"c = {c:.4f}; for a network that predicts noise c = {unread(keys, predicts='noise'):.4f}")


def noise_of(seed):
    """The initial noise of a seed's images."""
    return initial_noise((s.images, 3, side, side), torch.Generator().manual_seed(seed))


for name, shift in (("initial", 0), ("fresh", 5000)):  # the same strength, added to the finished images
    images[f"paper, {name} noise at the end"] = [
        (x + c * noise_of(seed + shift)).clamp(-1, 1)
        for x, seed in zip(images["paper"], s.seeds, strict=True)
    ]
NOISED = ["full", "full, prior noise", "evenly", "evenly, prior noise", "paper", "paper, prior noise"]
NOISED += [f"paper, {name} noise at the end" for name in ("initial", "fresh")]
fine = {name: torch.stack([energy_above(x).mean() for x in images[name]]) for name in NOISED}
excess = {name: 10 * (fine[name] / fine["full"]).log10() for name in NOISED}  # dB over the full sampler's
left_over = {}  # coefficient of z_T in the error
for name in NOISED:
    pairs = zip(images[name], images["full"], s.seeds, strict=True)
    left_over[name] = torch.stack(
        [((x - y) * noise_of(k)).mean() / noise_of(k).square().mean() for x, y, k in pairs]
    )
    psnr[name] = near(name)
    print(
        f"{name:34s} PSNR {psnr[name].mean():5.1f} dB   z_T in the error {left_over[name].mean():+.4f}"
        f"   fine energy {excess[name].mean():+5.1f} dB"
    )
run.record("taken-away", left_over["paper"])
run.record("prior-helps", psnr["paper, prior noise"] - psnr["paper"])
run.record("prior-even", psnr["evenly, prior noise"] - psnr["evenly"])
run.record("prior-fresh", psnr["paper, initial noise at the end"] - psnr["paper, fresh noise at the end"])
for claim, name in (("texture", "paper"), ("texture-even", "evenly")):
    run.record(claim, excess[name].abs() - excess[f"{name}, prior noise"].abs())

# %% [markdown]
# In the first column, 100 dB is the cap that identical images get. The last column is the fine detail. The Fourier modes of each image are put together by the length of their frequency: the *radial power spectrum*. Frequencies are in cycles per pixel; 1/2 is the finest that pixels can show along an axis. The column adds up the energy above 1/3, the top third of the axis and the corners, and compares it with the full sampler's. {numref}`fig-faster-diffusion-spectrum` shows the whole spectrum.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels of spectra divided by the full sampler's, against frequency; a horizontal line at one. Left, the paper's key steps: the curve of propagation rises above one towards fine frequencies, with prior noise it rises less, the dashed curve with initial noise added at the end follows it, and the one with fresh noise lies on that of propagation. Right, even key steps: the curve of propagation falls below one towards fine frequencies, with prior noise it stays near one, and the full sampler with prior noise rises above one."}, "figure": {"caption": "Spectra of the finished images, divided by the full sampler's. Left: the paper's key steps. Right: as many, evenly, and the full sampler with prior noise. The shaded part is what is added up. The kink at 1/2 was not looked into. Bands: 90 % intervals over seeds.", "name": "fig-faster-diffusion-spectrum"}}
spectra = {name: [radial_spectrum(x) for x in images[name]] for name in NOISED}
centres = spectra["full"][0].centres
density = {name: torch.stack([of.density.mean(0) for of in seeds]) for name, seeds in spectra.items()}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained", sharey=True)
PANELS = (
    (("paper", PALETTE[0], "-"), ("paper, prior noise", PALETTE[1], "-"))
    + (
        ("paper, initial noise at the end", PALETTE[4], "--"),
        ("paper, fresh noise at the end", PALETTE[3], "--"),
    ),
    (
        ("evenly", PALETTE[2], "-"),
        ("evenly, prior noise", PALETTE[5], "-"),
        ("full, prior noise", "0.5", "-"),
    ),
)
for ax, panel in zip(axes, PANELS, strict=True):
    for name, colour, style in panel:
        mean, low, high = mean_interval(density[name] / density["full"])
        label = name.replace("paper", "paper's key steps").replace("evenly", "even key steps")
        ax.plot(centres, mean, style, color=colour, label=label)
        ax.fill_between(centres, low, high, color=colour, alpha=0.2, lw=0)
    ax.axhline(1, color="k", lw=0.8)
    ax.axvspan(1 / 3, float(centres[-1]), color="0.93", lw=0, zorder=0)
    ax.set(xlabel="frequency in cycles per pixel", yscale="log", yticks=(0.5, 1, 2, 5, 10))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
axes[0].set_ylabel("energy / full sampler's")
fig.legend(loc="outside lower center", ncol=2, fontsize=9)
plt.show()

# %% [markdown]
# ### What is it worth in seconds?
#
# One image, guidance 3: two rows in a batch. We time the whole sampler three ways, in turn: plain, with sequential decoding and with parallel decoding. The last two do exactly the same operations. This is one core of a processor; it has no idle units that a larger batch could fill. What it can save is the fixed cost of each call.

# %%
one, x = tokens[:1], noise[:1]
ways = {
    "plain": lambda: guided(model, one, range(T)),
    "sequential": lambda: parallel(model, one, keys, T, at_once=1),
}
ways["parallel"] = lambda: parallel(model, one, keys, T)
seconds = {name: [] for name in ways}


def clock(name):
    x_0 = ddim(ways[name](), T, x)
    return x_0.sum().item()  # wait for the device


for _ in range(3):
    for name in ways:
        seconds[name].append(cpu_time(lambda name=name: clock(name), repeats=s.repeats, warmup=0))
seconds = {name: torch.tensor(values) for name, values in seconds.items()}
run.record("speed", seconds["sequential"] / seconds["parallel"])
for name in ways:
    print(
        f"{name:12s}{seconds[name].mean():7.3f} s, {(seconds[name] / seconds['plain']).mean():.2f} of the plain sampler"
    )
print("operations:", f"{ARMS['paper'].cost / T:.2f} of the plain sampler's")

group, text = max(key_groups(T, keys), key=len), tuple(part[:1] for part in model.encode_text(one)[:2])
for rows in (1, 4, 16):
    states = [part.detach().expand(rows, *part.shape[1:]) for part in text]
    xs, times = noise[:1].expand(rows, -1, -1, -1), solver.timesteps[list(group)].to(run.device)
    with torch.no_grad():
        kept = encode_key(unet, xs, times[:1].expand(rows), *states)
        decoders = [partial(decode_steps, unet, kept, times, *states, at_once=n) for n in (1, None)]
        apart, together = (cpu_time(run_them, repeats=s.repeats) for run_them in decoders)
    print(f"{len(group)} decoders, {rows:2d} rows each: {apart / together:.2f} times as fast in one batch")

# %%
run.report()

# %% [markdown]
# **What the table says, in words.** The exact claims hold; most of the claims of quality do not. Contradicted are *change*, *told-time*, both claims on placement, the four that begin with *depth-*, the two with *fewer-*, the two with *equal-cost-*, and *exact-paper*. *Change-early* is inconclusive. Confirmed are *change-square*, *accuracy*, the claims on prior noise, and the mechanisms and the other controls of this page. All this is for one small network and for nearness to the full sampler. It does not contradict the paper's FID, which was not measured.
#
# **What is exact.** The method computes what it should, in parallel as in sequence. It is blind between key steps, by construction and to the last bit. And it saves what the paper says it saves, at Stable Diffusion's real size to within a percentage point.
#
# **The premise** depends on the measure. *Change-square* uses the paper's, the mean squared change, and is confirmed: the decoder changes far more than the encoder. *Change* is contradicted. It takes the same features and the same steps, and divides by the size of the feature. Then the contrast is gone: in one network the decoder changes a little more, in the other the encoder does, see {numref}`fig-faster-diffusion-change`. So here the decoder's features, taken together, are larger, not less steady. (Single units differ a lot, see the thin lines.) A large feature is scaled down by
# the next group norm, so what the network loses by an old feature should be mostly a matter of its relative error. Whether this holds for Stable Diffusion we cannot say; the paper does not give relative changes.
#
# **The decoders do not pay.** The claims that begin with *depth-* compare propagation with the same key steps and nothing between them, the predicted noise kept. All are contradicted. On this network the rival is ahead by many decibels, at every interval and with the paper's key steps, at a fraction of the work. The comparisons with DDIM come out the same way (*fewer-9*, *fewer-25*, and those that begin with *equal-cost-*), since DDIM with few steps *is* the noise kept. It
# is not a matter of the reference (*exact-paper*): against the near-exact solution the rival leads at the same key steps too, see the last column of the list. {numref}`fig-faster-diffusion-samples` shows what propagation looks like with the paper's key steps: the right scene, in too strong colours, under grain.
#
# **Why?** {numref}`fig-faster-diffusion-turn` shows the most likely reason. Between key steps the only news for the decoder is the time. In the first half the noise in its answer grows a little more slowly than the formula asks. Whether that does harm was not measured apart: the clean image does change early, so the formula is not the truth there. In the last group it goes wrong in the other direction (*overshoot*). The old features hold the noise of the key step, at the key step's strength.
# At a later time the network expects fainter noise and magnifies it. So it finds more noise than there is, on the way to the dotted line, and the sampler takes too much of it out. The clean image in the answer is too strong as well (right panel), and so are the colours. It does not go all the way to the dotted line, probably because the encoder was told the old time and has scaled part of its features by it. *Told-time* sums this up, and is contradicted: in the paper's plan, on balance, the decoder would do better if it were *not* told the time.
#
# This network predicts velocities, and the paper's predict noise. How much is due to that? In a pilot we took an early checkpoint of the 16-pixel sibling that predicts noise (it is not in this book's zoo; six images, one seed, not a recorded run). There propagation was behind the noise kept as well, in all five plans that we tried. With the paper's key steps and with even ones it was behind by at most half as many decibels as the sibling for velocities, of the same shape and size. (With late key steps both were equally far behind.)
# So the sign was the same and the size was not. It suggests that to turn $\hat v$ is an extra task, which makes blindness dearer. A pilot this small, with two networks that were not trained equally long, does not prove it.
#
# **Where to put the key steps.** The paper's are dense early, because its encoder changes most there. *Change-early* asks for that, and is inconclusive: the claim is judged by the worse of two networks. In this page's network the encoder changes more in the first half; in the sibling the two halves cannot be told apart, since the change rises again in the last steps (right panel of {numref}`fig-faster-diffusion-change`; the change is relative here). *Placement-late* and *placement-even* are contradicted, by a wide margin: the mirrored plan is far better, and so are even key steps. That is the opposite of the paper's finding. The most likely reason is the same as above. What hurts most is not how much the encoder changes. It is how far the strength of the noise falls until the next key step,
# by which an old feature is too loud. That is a factor $\sigma_k / \sigma_t$, and for groups of one length it is largest at the end. The list shows it once more: with every sixth step a key step the last one is number 48 of 50, counted from 0, with every fifth it is 45, and the former plan is better, with fewer key steps. The places matter to the rival that keeps the noise too, though less. (The encoder's relative change rises at the end as well, so the two reasons are not cleanly parted here. Exercise 2 spaces the key steps by that change: better than the paper's plan, not as good as even steps.)
#
# **Blindness is part of what costs.** *Window* runs one convolution of the encoder in each step, so that the decoder's last unit sees the current image. That alone wins several decibels. It does not win all: with the same key steps the kept noise is still well ahead, so old features do harm further inside too. *Deepcache* goes further: with as many full steps it refreshes the outermost units of both halves and runs nothing of the decoder's inside. It is ahead of propagation by far, at about half the work. (By this measure it is not ahead of DDIM with fewer steps, see the left panel.) But it needs 50 calls in a row, and the right panel of
# {numref}`fig-faster-diffusion-pareto` is where propagation could win: nothing else there has a decoder in each step and so few calls in a row. On this network the plain rival takes that place too.
#
# **What prior noise does.** *Taken-away* finds what the grain suggests: the error of the finished images is, to a good part, initial noise with a minus sign. Propagation has taken out more than there was. *Unread* says what prior noise does: in the last group, it puts back a known amount of the same noise, and nobody sees it. So it cancels a part of the error, and *prior-helps* and *prior-even* measure how much. Both are confirmed, but the help is small beside the loss: with the same key steps the kept noise stays far ahead, and with the paper's even the kept velocity does, by a little. *Prior-fresh* is the test of this explanation: fresh
# noise of the same strength, added at the end, changes next to nothing. (By itself it should add a little error. That it does not is probably the clipping: where a pixel of the too strong image lies at the limit, noise can only move it inwards.) In the plain sampler, where no noise is missing, prior noise is an error of its own. As to texture: with the paper's key steps the images of this network do not lack fine detail, they have too much of it. That is grain, since noise that is missing is as rough as noise that is left; and prior noise removes some (*texture*). With even key steps it is as the paper says: fine detail is missing, and prior noise brings it back (*texture-even*). In the pilot with the network that predicts noise, prior noise helped in the same way with the paper's key steps, and almost exactly cancelled the missing noise. With even key steps nothing was
# missing there, and it did harm. So it is a remedy with a fixed dose, which does not fit every plan and network.
#
# **Seconds.** *Speed* compares the same operations, decoded one after another and at once. On one core, with one image, most of the gain is the fixed cost of the calls that are saved. (The rival that keeps the noise makes those nine calls and no others.) It shrinks with the number of images, see the lines below the timing: once a call keeps the core busy, a larger batch is no faster. So this is not the paper's gain measured again. That comes from a GPU that one image does not keep busy, which we have not timed.
#
# *Accuracy* is confirmed, but it says only that the oracle still reads the scenes through the grain. It is at its ceiling for every row, so it cannot tell the methods apart.
#
# **What was tried:** six plans of key steps, two ways to keep the prediction, a second reference, DDIM at equal work and at equal calls in a row, a fresh skip, DeepCache, prior noise in two plans and in the plain sampler, and initial and fresh noise added at the end. With no plan of the recorded run does the blind decoder, with prior noise or without, come nearer to the full sampler than keeping the noise does at the same key steps.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Photographs.** These scenes are flat shapes, and a caption settles nearly everything in them. That makes long steps strong, and it leaves little texture to lose. The paper measures FID and CLIP score (how well an image fits its caption, by another network), and there nine steps of DDIM fall far behind. We measure nearness to the full sampler.
# - **A network that predicts noise.** Ours predicts velocities. Both controls, noise kept and velocity kept, would be one for the paper's networks. The paper's plan and the dose of prior noise were chosen for those networks, and were not tuned again for ours.
# - **A GPU with idle units.** There the parallel decoder is worth most. One core has none.
# - **Several GPUs.** The decoders of a group can be spread over them, which DeepCache cannot. The paper reports 77 % less time.
# - **Other samplers.** Only DDIM was tried. The paper also has plans for DPM-Solver with 20 steps, and says itself that few steps are hard.
# - **A last step that is a key step.** {doc}`/notebooks/04-caching/caching-compared` tries plans that count from the end, here and for the other caches of this part.
# - **Another training run** of this network. The intervals cover captions and noise. Only the change of features was looked at in a second network.
# - **Left untried:** FID and CLIP score of Stable Diffusion and DeepFloyd-IF, diffusion transformers, video, ControlNet and personalised models.
# :::
#
# ## Exercises
#
# **1.** The released code for another model has a tenth key step, 40. How much of the prior noise reaches the image unread then? And with a key step at 49?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# Only what is added after the last key step counts. T - 10 is step 40 of 50; with the last step a key step nothing is left.
for extra in ((), (T - 10 if T > 10 else T - 2,), (T - 1,)):
    print(f"last key step {max((*keys, *extra)):2d}: c = {unread((*keys, *extra)):.4f}")

# %% [markdown]
# **2.** The paper puts key steps where the encoder changes. Do that for this network: choose as many key steps as the paper, so that each group sees the same amount of relative change of the encoder. Does it help propagation? Does it help the rival, which keeps the noise?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
so_far = torch.cat([torch.zeros(1), of_encoder[0].mean(0).cumsum(0)])
marks = torch.linspace(0, float(so_far[-1]), len(keys) + 1)[:-1]
tuned = tuple(sorted({int((so_far >= mark - 1e-9).nonzero()[0]) for mark in marks}))
print("paper:", keys, "\ntuned:", tuned)
for call in (propagate, keep_noise):
    x = draw(Arm(T, tuned, call), s.seeds[0])
    rest = "paper" if call is propagate else "noise kept, paper"
    print(
        f"{call.__name__:12s} tuned {psnr_to_reference(x, images['full'][0]).mean():.1f} dB, the paper's key steps "
        f"{psnr[rest][0]:.1f} dB (first seed)"
    )
# The plan was tuned on the captions that it is judged on. To publish it, measure the change on others.

# %% [markdown]
# **3.** Take a network that predicts noise. Show that DDIM, with propagation, makes *one* DDIM step from key step to key step, with a weighted mean of the decoder's predictions. What are the weights?
#
# :::{dropdown} Solution 3: in words
# Divide a step by $\alpha$ at its end. With $\rho = \sigma / \alpha$, DDIM reads $x_{i+1} / \alpha_{i+1} = x_i / \alpha_i + (\rho_{i+1} - \rho_i)\, \hat\epsilon_i$. After the key step no $\hat\epsilon_i$ of the group depends on $x_i$, so the sum can be taken at once:
#
# $$
# \frac{x_{k'}}{\alpha_{k'}} = \frac{x_k}{\alpha_k} + (\rho_{k'} - \rho_k)\, \bar\epsilon , \qquad \bar\epsilon = \sum_i \frac{\rho_{i+1} - \rho_i}{\rho_{k'} - \rho_k}\, \hat\epsilon_i .
# $$
#
# That is a DDIM step from $k$ to $k'$ with the noise $\bar\epsilon$. The weights are the lengths of the steps in $\rho$; they are positive and sum to one. A better mean than $\hat\epsilon_k$ alone makes a better long step. Whether the decoder's is better is what the claims that begin with *depth-* ask.
# :::
#
# ## References
#
# The method: {cite:t}`faster-diffusion`, with its code [hutaiHang/Faster-Diffusion](https://github.com/hutaiHang/Faster-Diffusion) (`utils_sd.py`, `utils_if.py` and `sd_demo.py` were read). The sibling: {cite:t}`deepcache`. Samplers: {cite:t}`song2021denoising`, {cite:t}`lu2022dpm`. Guidance: {cite:t}`ho2022classifier`. Velocities: {cite:t}`salimans2022progressive`.
# The library's parts: [minilib/propagation.py](https://github.com/minilib-book/minilib/blob/main/minilib/propagation.py), [minilib/metrics/spectrum.py](https://github.com/minilib-book/minilib/blob/main/minilib/metrics/spectrum.py), [minilib/models/unet.py](https://github.com/minilib-book/minilib/blob/main/minilib/models/unet.py).
