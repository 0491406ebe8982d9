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
# # QuEST: four bits, and a little training in the right places
#
# Store each weight and each activation of a diffusion model in four bits instead of thirty-two, and the images fall apart. {cite:t}`quest` repair them by training some layers of the rounded model: those that carry the time, and those
# that suffer most from rounding. The full-precision model is the only teacher; no images are needed.
#
# On this page the parts of the method fare differently. Its table of activation scales is worth more than its other parts together. Its training is worth little: the layers on the released list are not those that suffer in this small network, and random layers of the same size do better.
#
# Everything on this page is *simulated*: numbers are rounded to a grid of 16 points and computed with in floating point. That shows the error of a four-bit model exactly. It says nothing about its speed.

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
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch import nn

from minilib import bench, zoo
from minilib.arms import run_arms
from minilib.data import shapes
from minilib.guidance import classifier_free_guidance
from minilib.intervene import scale_outputs
from minilib.kernels.quant import IntegerLinear, has_vnni
from minilib.metrics import mean_scores, psnr_to_reference, read_in_batches, scene_scores
from minilib.models import UNet
from minilib.plotting import PALETTE, mean_interval, show_images, use_style
from minilib.profiling import count_parameters
from minilib.quantization import (
    OFF,
    QuantSpec,
    calibrate,
    quant_layers,
    quantize_copy,
    round_to_grid,
    select_layers,
    sensitivity,
    spec_grid,
    uniform_rules,
    weight_memory,
)
from minilib.quantization.sensitivity import relative_error
from minilib.recipes.scenes import ddim_scheduler
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample_final


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each has calibration captions, test captions and noise of its own
    images: int  # a seed, to judge by
    steps: int  # of the sampler, and rows of each table of scales
    trajectories: int  # of the full-precision sampler, to calibrate and to learn from
    time_steps: int  # of training in the first stage
    tune_steps: int  # of training in the second stage
    batch: int  # of both
    probed: int  # times at which the sensitivity is measured
    jobs: int  # processes


run = Reproduction(
    "quest",
    profile,
    {
        "smoke": Settings((0,), 2, 2, 2, 5, 1, 2, 1, 1),
        "cpu": Settings((0, 1, 2), 10, 20, 16, 300, 80, 8, 4, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 200, 20, 64, 1000, 3000, 32, 10, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is this book's text-to-image U-Net, built like Stable Diffusion's: residual blocks that are told the time by a linear layer, self-attention (`attn1`), cross-attention to the caption (`attn2`) and feed-forward layers (`ff`). It predicts the velocity $v = \alpha_t \epsilon - \sigma_t x_0$, where $x_0$ is the image, $\epsilon$ the noise, and $\alpha_t$, $\sigma_t$ their shares at time $t$. The sampler is DDIM with guidance 3.
# The sampler's time steps are known in advance, and the method makes use of that.

# %%
run.show_settings()

# %% [markdown]
# (sec-quest-idea)=
# ## The idea
#
# **A grid.** Rounding to $b$ bits means: of all real numbers keep at most $2^b$, evenly spaced. A *scale* $\Delta$ and a *zero point* $z$, a whole number, say where they lie:
#
# $$
# Q(x) = \Delta \left( \operatorname{clip}\!\left( \operatorname{round}(x / \Delta) + z,\; 0,\; 2^b - 1 \right) - z \right) .
# $$ (eq-quest-grid)
#
# Within the range the error is at most $\Delta / 2$. Outside it the value is clipped. So the range is a compromise. A wide one clips nothing and rounds coarsely; a narrow one does the opposite. One bit less doubles $\Delta$.
#
# **Who shares a range?** Weights are fixed, and a range for each output channel costs next to nothing. Activations are the harder half. They are new at each call, and a range for each channel does not fit into an integer matrix product. So a layer has one range for its whole input. Its width has to be chosen beforehand, from *calibration* runs.
#
# **What goes wrong.** The paper names three troubles with four bits.
#
# 1. *Activations are unbalanced.* A few large values set the range, and all others share a handful of points. How large they are changes along the sampler's way, so one range for all times fits none of them. Remedy: a **table of scales**, one row for each step of the sampler.
# 2. *Time becomes imprecise.* The time enters as one vector, the time embedding, which every residual block reads through a small linear layer. Neighbouring steps have nearly the same embedding. Rounded, they may be hard to tell apart. Remedy: first **train the layers that read the time**.
# 3. *A few layers do most of the damage.* Remedy: **train these**, and leave the rest alone. Which ones? The released code has a list: the feed-forward layers, the projections to keys and values of self-attention, and those to queries of both attentions. Here we can also measure it.
#
# Training goes through the rounding as if it were not there: in the backward pass $Q$ has slope 1 inside the range and 0 outside. This is the *straight-through* gradient {cite:p}`bengio2013estimating`. The weights that it moves are rounded again at each step. The teacher is the model itself before rounding.
#
# The trivial rivals train nothing. One is **plain rounding**: the best grids that calibration finds. The other gives the worst few layers **more bits**.

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("unet_shapes32").to(run.device).requires_grad_(False)
unet = model.denoiser
TIME = "**.time_emb_proj"  # the paper's emb_layers
SENSITIVE = ("**.ff.*", "**.to_q", "**.attn1.to_k", "**.attn1.to_v")
EDGES = ("conv_in", "conv_out")  # kept at 8 bits, as the paper does


def size(layers):
    return sum(p.numel() for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None)


everything, total = select_layers(unet), count_parameters(unet)
print(
    f"{total:,} parameters; {len(everything)} linear layers and convolutions hold {size(everything) / total:.1%}"
)
for label, names in {"time": TIME, "attention and feed-forward": SENSITIVE, "first and last": EDGES}.items():
    layers = select_layers(unet, names)
    print(f"{label:27s} {len(layers):3d} layers {size(layers):9,} parameters {size(layers) / total:6.1%}")

# %% [markdown]
# (sec-quest-method)=
# ## The method
#
# ### A quantiser
#
# {eq}`eq-quest-grid` is five lines. The library's version does the same for ranges of any shape, and has the gradient. For affine grids both must agree, which makes a sixth check. For each number of bits and both kinds of grid (*symmetric*: $z = 0$, and the clipped whole number $q$ in $-(2^{b-1} - 1) \ldots 2^{b-1} - 1$; *affine*: any $z$) we check five things: at most $2^b$ values, an error of at most half a step inside
# the range, clipping outside, that rounding twice is rounding once, and the gradient.


# %%
def rounded(x, bits, low, high):
    """x on a grid of 2^bits points that reaches from low to high and contains zero."""
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    q = ((x / step).round() + zero).clamp(0, 2**bits - 1)
    return (q - zero) * step


def violations(bits, symmetric):
    """How many of the five properties fail."""
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(4000, generator=g, dtype=torch.float64) + 0.4
    spec = QuantSpec(bits, symmetric=symmetric)
    grid = spec_grid(x[:2000].clamp(-2, 2), spec)  # the rest may lie outside
    x.requires_grad_()
    out = round_to_grid(x, grid)
    out.sum().backward()
    q = (x / grid.scale).detach().round() + grid.zero_point
    inside = (q >= grid.low) & (q <= grid.high)
    ends = (torch.tensor([grid.low, grid.high]) - grid.zero_point) * grid.scale
    wrong = [
        len(out.detach().unique()) > 2**bits,
        bool(((out - x).detach().abs() > grid.scale / 2 * (1 + 1e-9))[inside].any()),
        not torch.allclose(out[~inside], x.clamp(ends[0], ends[1])[~inside]),
        bool((round_to_grid(out, grid) - out).detach().abs().max() > 1e-12),
        not torch.equal(x.grad, inside.double()),
    ]
    if not symmetric:
        by_hand = rounded(x, bits, x[:2000].clamp(-2, 2).min(), x[:2000].clamp(-2, 2).max())
        wrong.append(bool((by_hand - out).abs().max() > 1e-12))
    return sum(wrong)


broken = sum(violations(bits, kind) for bits in (2, 3, 4, 5, 6, 8, 12, 16) for kind in (True, False))
run.record("grid", broken)

# %%
# NBVAL_CHECK_OUTPUT
x = torch.linspace(-1, 3, 9)
print("x        ", x.tolist())
print("2 bits   ", rounded(x, 2, torch.tensor(-0.5), torch.tensor(1.0)).tolist())
print("properties that fail, of 88:", broken)

# %% [markdown]
# ### A quantised model
#
# `quantize_copy` puts a rounded layer in the place of each linear layer and convolution. `calibrate` runs it on inputs that the full-precision sampler has seen, and sets the ranges. We write W4A8 for weights of 4 bits and activations of 8. At W32A32 nothing is rounded, and the sampler must give the same images, bit for bit.
#
# The ranges are found with some care: the share of the full range that has the least squared error, for each output channel of a weight and for each row of an activation's table. A rival that clips badly would be too easy to beat.


# %%
def noise_of(n, seed):
    shape = (n, 3, unet.config["sample_size"], unet.config["sample_size"])
    return initial_noise(shape, torch.Generator().manual_seed(seed), device=run.device)


def texts(tokens):
    """What the U-Net reads of captions."""
    read = model.encode_text(tokens)
    return {"context": read.context, "context_mask": read.context_mask}


@torch.no_grad()
def draw(net, tokens, seed, seen=None):
    """Images of captions. `seen` collects the inputs and outputs of the network, step by step."""

    def watched(x, t, **text):
        out = net(x, t, **text)
        if seen is not None:
            seen.append(({"x": x, "t": t.float(), **text}, out))
        return out

    null = model.null_tokens(*tokens.shape)
    guided = classifier_free_guidance(watched, cond=texts(tokens), null=texts(null), guidance_scale=3.0)
    return sample_final(
        guided, ddim_scheduler(), noise_of(len(tokens), seed), num_inference_steps=s.steps
    ).clamp(-1, 1)


def captions(n, seed, split):
    return shapes.sample_scenes(n, torch.Generator().manual_seed(seed), objects=(1, 3), split=split)


def teacher(_, seed):
    """Inputs and outputs of the full-precision network at each step, for captions of its own and for the empty one."""
    seen = []
    draw(
        unet, shapes.tokens(captions(s.trajectories, 5000 + seed, "train")).to(run.device), 5000 + seed, seen
    )
    return seen


scheduler = ddim_scheduler()
scheduler.set_timesteps(s.steps)
TIMES = [float(t) for t in scheduler.timesteps]
lessons = run_arms(teacher, {"teacher": None}, s.seeds, s.jobs)["teacher"]


def plain_rounding(weight_bits, activation_bits, seed, *, keep=EDGES, ranges="tensor", timewise=True):
    """The model after rounding, calibrated, not trained. The layers `keep` get at least 8 bits."""
    specs = (
        QuantSpec(weight_bits, "channel", scale_init="mse"),
        QuantSpec(activation_bits, ranges, scale_init="mse"),
    )
    net = quantize_copy(unet, uniform_rules(*specs, keep=keep), timesteps=TIMES if timewise else None)
    calibrate(net, [call for call, _ in lessons[s.seeds.index(seed)]])
    return net


tokens = shapes.tokens(captions(2, 7, "validation")).to(run.device)
untouched = quantize_copy(unet, uniform_rules(OFF, OFF), timesteps=TIMES)
run.record("identity", float((draw(untouched, tokens, 7) - draw(unet, tokens, 7)).abs().max()))
fine, far = plain_rounding(16, 16, s.seeds[0]), []
for call, out in lessons[0][:: max(1, s.steps // 4)]:
    with torch.no_grad():
        far.append(float((fine(**call) - out).norm() / out.norm()))
run.record("sixteen", max(far))
print(f"16 bits: relative error of the output at most {max(far):.1e}")

# %% [markdown]
# ### What it saves
#
# Rounded weights save memory, whatever else they do. We count bytes: $b$ bits a weight, 4 bytes for each scale, $b$ bits for each zero point, and all that is not a weight of these layers (biases, norms) in floating point. The tables of activation scales are included, with a row for each step of the sampler. The same function counts Stable Diffusion 1.5's U-Net
# at its real size, on torch's `meta` device, where tensors have shapes and no values.

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
memory = {}
for label, net in {"here": unet, "Stable Diffusion 1.5": sd}.items():
    print(
        f"{label}: {count_parameters(net):,} parameters, {weight_memory(net).full / 1e6:,.1f} MB in 32 bits"
    )
    for bits in (8, 4):
        rules = uniform_rules(QuantSpec(bits, "channel"), QuantSpec(bits), keep=EDGES)
        memory[label, bits] = m = weight_memory(net, rules, times=20)
        print(
            f"   W{bits}A{bits}: {(m.weights + m.scales) / 1e6:6.1f} MB, of which scales {m.scales / 1e6:.2f}: {m.ratio:.2f} times less"
        )
run.record("memory-here", memory["here", 4].ratio)
run.record("memory-sd", memory["Stable Diffusion 1.5", 4].ratio)

# %% [markdown]
# The ideal factors are 4 and 8. A small network keeps a larger part of its bytes for scales, since its channels are short. At Stable Diffusion's size that part is negligible.
#
# The bits of the *activations* change none of this: they live for one layer only. W4A8 and W4A4 take the same memory. What four-bit activations are for is arithmetic: a processor with four-bit products needs both sides in four bits. Keep this in mind for the comparison below.
#
# ### The clock
#
# The time embedding of this network is a vector $e(t)$ of 96 numbers. All residual blocks read the same vector. A sampler of 50 steps visits 50 of them. How far does rounding move one, compared with the distance to the next? Let
#
# $$
# \mathrm{err}(b) = \frac{\operatorname{median}_t \lVert Q_b(e(t)) - e(t) \rVert}{\operatorname{median}_t \lVert e(t) - e(t^+) \rVert},
# $$ (eq-quest-clock)
#
# with $t^+$ the next step. At $\mathrm{err} = 1$ the clock is off by the length of a sampling step. The range is that of all 50 embeddings together. So this is the clock *before* the remedy: in the arms below with a table of scales each step has a range of its own.
#
# A length in 96 dimensions can mislead, though. Rounding moves the vector in a random direction, mostly *off* the curve of times, and the network may not care. So we also measure the effect: how far does the network's output move when its clock alone is rounded, compared with how far it moves when the time is set one step of 50 off?

# %%
clock50 = ddim_scheduler()
clock50.set_timesteps(50)
t50 = clock50.timesteps.float().to(run.device)
BITS = (8, 7, 6, 5, 4, 3)


@torch.no_grad()
def with_clock(emb, call):
    """The network's output with this time embedding."""
    words = (call["context"], call["context_mask"])
    h, skips = unet.encode(call["x"], emb, *words)
    return unet.decode(unet.middle(h, emb, *words), skips, emb, *words)


with torch.no_grad():
    emb = unet.embed(t50)
grids = {b: spec_grid(emb, QuantSpec(b)) for b in BITS}
step = (emb[1:] - emb[:-1]).norm(dim=1).median()
err = {b: float((round_to_grid(emb, grids[b]) - emb).norm(dim=1).median() / step) for b in BITS}


def output_clock(_, seed):
    """For each b the move of the output by a rounded clock, in moves by a clock one step off; mean over times."""
    found = []
    for call, out in lessons[s.seeds.index(seed)][:: max(1, s.steps // 5)]:
        with torch.no_grad():
            right, late, early = (unet.embed((call["t"] + d).clamp(0, 999)) for d in (0.0, 20.0, -20.0))
        one_off = sum((with_clock(e, call) - out).norm() for e in (late, early)) / 2
        found.append(
            [float((with_clock(round_to_grid(right, grids[b]), call) - out).norm() / one_off) for b in BITS]
        )
    return torch.tensor(found).mean(0)


in_output = torch.stack(run_arms(output_clock, {"clock": None}, s.seeds, s.jobs)["clock"])
run.record("clock-8", err[8])
run.record("clock-4", err[4])
run.record("clock-doubles", max(abs(err[b - 1] / err[b] - 2) for b in BITS[:-1]))
run.record("clock-output", in_output[:, BITS.index(4)] / err[4])
for b, off in zip(BITS, in_output.mean(0).tolist(), strict=True):
    print(f"{b} bits: the embedding is off by {err[b]:.2f} steps, the output by {off:.2f} steps")
with torch.no_grad():
    distinct = {b: len(round_to_grid(emb, grids[b]).unique(dim=0)) for b in BITS}
print("different embeddings left, of 50:", distinct)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: fifty dots on a curve, coloured from light at high noise to dark at low noise. Around every seventh dot lie two circles: a tiny one for 8 bits and one for 4 bits that reaches about as far as the neighbouring dots. Right: error of the clock in sampling steps against bits, on a logarithmic axis; the line of the embedding about doubles with each bit removed and reaches 1 at 4 bits; the line of the output lies below it throughout and passes 1 only at 3 bits."}, "figure": {"caption": "**The quantised clock: the picture to remember.** Left: the time embeddings of a sampler of 50 steps, in the plane that holds most of their spread. Circles: how far rounding moves a vector, with 4 bits (orange) and with 8 bits (blue, hardly larger than the dot). The radius is the length in all 96 dimensions; where the orange circle covers the neighbours, the clock is off by a step or more. Right: the same in numbers, and what it does to the network's output; band: 90 % interval over seeds.", "name": "fig-quest-clock"}}
centred = (emb - emb.mean(0)).cpu()
plane = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
places = centred @ plane.T
kept_spread = places.square().sum() / centred.square().sum()
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained", width_ratios=(1.75, 1))
left.plot(*places.T, color="0.7", lw=1, zorder=1)
dots = left.scatter(*places.T, c=t50.cpu(), cmap="viridis", s=14, zorder=3)
for i in range(3, 50, 7):
    for b, colour in ((4, PALETTE[1]), (8, PALETTE[0])):
        radius = float((round_to_grid(emb[i], grids[b]) - emb[i]).norm())
        left.add_patch(
            plt.Circle(tuple(places[i].tolist()), radius, fill=False, color=colour, lw=1.6, zorder=4)
        )
left.set(xlabel="first direction", ylabel="second direction", aspect="equal")
fig.colorbar(dots, ax=left, label="time $t$", location="bottom", shrink=0.7, aspect=30)
left.legend(
    handles=[plt.Line2D([], [], color=c, label=f"{b} bits") for b, c in ((4, PALETTE[1]), (8, PALETTE[0]))]
)
right.plot(BITS, list(err.values()), "o-", color=PALETTE[1], label="embedding")
mean, low, high = mean_interval(in_output)
right.plot(BITS, mean, "s--", color=PALETTE[2], label="output")
right.fill_between(BITS, low.clamp(min=1e-3), high, color=PALETTE[2], alpha=0.25, lw=0)
right.axhline(1, color="0.3", lw=1, ls=":")
right.set(xlabel="bits", ylabel="off by, in sampling steps", yscale="log", xticks=BITS)
right.invert_xaxis()
right.legend()
plt.show()
print(f"the plane holds {kept_spread:.0%} of the spread")

# %% [markdown]
# At four bits the embedding is moved by about as much as one step moves it. (The embeddings do not collapse: all fifty stay different, even at fewer bits. The clock is imprecise, not stopped.) What the network makes of it is the other line. It lies below the first at each number of bits, and at four bits well below (*clock-output*). So part of the displacement points where the network does not look:
# rounding errors of 96 numbers have 96 directions to go, and the curve of times uses few of them.
#
# ### Which layers suffer?
#
# Quantise one layer alone, weight and input at four bits, leave all others as they are, and see how far the output moves: its squared error over its squared norm. Then the next layer. Each bar of {numref}`fig-quest-sensitivity` is one such experiment.

# %%
W4A4 = QuantSpec(4, "channel", scale_init="mse"), QuantSpec(4, scale_init="mse")


def probe(_, seed):
    """The output's error with one layer quantised, for each layer but the first and the last."""
    every = max(1, s.steps // s.probed)
    halves = [
        0,
        1,
        s.trajectories,
        s.trajectories + 1,
    ]  # two captions, and the empty one with the same images
    calls = [
        {k: v[halves] for k, v in call.items()}
        for call, _ in lessons[s.seeds.index(seed)][every // 2 :: every]
    ]
    names = [name for name in everything if name not in EDGES]
    found = sensitivity(unet, W4A4, calls, names=names, timesteps=[float(call["t"][0]) for call in calls])
    return torch.tensor(list(found.values()))


harm = torch.stack(run_arms(probe, {"W4A4": None}, s.seeds, s.jobs)["W4A4"])  # (seeds, layers)
layers = [name for name in everything if name not in EDGES]
quarter = len(layers) // 4
run.record("skewed", harm.sort(1, descending=True).values[:, :quarter].sum(1) / harm.sum(1))
kind_of = {name: "sensitive" for name in select_layers(unet, SENSITIVE)}
kind_of |= {name: "time" for name in select_layers(unet, TIME)}
kinds = [
    kind_of.get(name, "convolution" if isinstance(everything[name], nn.Conv2d) else "other")
    for name in layers
]
of_kind = {
    kind: torch.tensor([k == kind for k in kinds]) for kind in ("sensitive", "time", "convolution", "other")
}
run.record("right-layers", harm[:, of_kind["sensitive"]].mean(1) / harm[:, ~of_kind["sensitive"]].mean(1))
for kind, mask in of_kind.items():
    print(
        f"{kind:12s} {int(mask.sum()):3d} layers, {mask.double().mean():5.1%} of all, carry "
        f"{(harm[:, mask].sum(1) / harm.sum(1)).mean():5.1%} of the summed error"
    )
mean_harm = harm.mean(0)
inner = torch.tensor([name.startswith(("down_blocks.2", "mid_block", "up_blocks.0")) for name in layers])
outer_harm = harm[:, ~inner].sort(1, descending=True).values
run.record("skewed-outer", outer_harm[:, : outer_harm.shape[1] // 4].sum(1) / outer_harm.sum(1))
call, out = lessons[0][s.steps // 2]
for name in ("mid_block.attentions.0.proj_out", "up_blocks.1.attentions.2.proj_out"):
    with torch.no_grad(), scale_outputs(unet, {name: 0.0}):
        print(f"taken out altogether, {name}: {relative_error(unet(**call), out):.0e}")
print(
    "the five worst:",
    *(f"{layers[i]} {mean_harm[i]:.4f}" for i in mean_harm.argsort(descending=True)[:5]),
    sep="\n   ",
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "About two hundred bars in descending order on a logarithmic axis. From left to right they fall by more than ten orders of magnitude. Bars are coloured by the kind of layer: the left ones are nearly all green, for convolutions; blue, for the attention and feed-forward layers that the method trains, orange, for the time layers, and grey, for the others, begin further right and make up most of the tail."}, "figure": {"caption": "Error of the output with one layer at W4A4 and all others in full precision, in descending order; mean over seeds. Blue: the attention and feed-forward layers of the released list, which the second stage trains (named *sensitive* after the method; here they are not). Orange: the layers that read the time, trained in the first. Grey: all other linear layers. The dotted line separates the worst quarter.", "name": "fig-quest-sensitivity"}}
COLOURS = {"sensitive": PALETTE[0], "time": PALETTE[1], "convolution": PALETTE[2], "other": PALETTE[6]}
order = mean_harm.argsort(descending=True)
fig, ax = plt.subplots(figsize=(7, 3))
for kind, mask in of_kind.items():
    where = mask[order].nonzero()[:, 0]
    ax.bar(where, mean_harm[order][where], width=1.0, color=COLOURS[kind], label=kind)
ax.axvline(quarter - 0.5, color="0.3", ls=":", lw=1)
ax.set(
    xlabel="layers, the worst first", ylabel="relative squared error", yscale="log", xlim=(-1, len(layers))
)
ax.legend(ncol=2)
plt.show()

# %% [markdown]
# Two things stand out. The bars at the left are convolutions, and not just any: they sit in the last blocks of the decoder, a few layers from the output, and some of them (`conv_shortcut`) carry the image itself past everything else. What is rounded there goes straight into the prediction. Most bars at the right belong to the innermost
# resolution. Its attention hardly acts in this network: the lines *taken out altogether*, printed above {numref}`fig-quest-sensitivity`, show what happens if the middle's attention is not rounded but removed (its last layer, `proj_out`, is set to zero, and with it the whole block). Further out attention does act; but even to remove the block tried there
# changes the output less than to round the worst convolution. Rounding cannot hurt what does nothing. So a claim about skew would be cheap with these layers in it; *skewed-outer* asks again without them, and finds nearly the same skew.
#
# So the claim that the released list names the sensitive layers (*right-layers*) is **contradicted** for this network: a layer on the list does far *less* damage on average than one that is not. The list was made for latent diffusion on ImageNet and, in a shorter form, for Stable Diffusion, where attention and feed-forward layers presumably do more of the work.
#
# ### A table of scales
#
# The last ingredient. At each step of the sampler, how wide is the range that a layer's input needs? If it were the same at all times, one scale would do.

# %%
four_bit = plain_rounding(4, 4, s.seeds[0])
table = quant_layers(four_bit)
widths = torch.stack([table[name].activation_quantizer.log_scale.exp()[:, 0] for name in layers]).cpu()
spread = widths.amax(1) / widths.amin(1)
worst = spread.argsort(descending=True)
print(
    f"widest range / narrowest: median over layers {spread.median():.1f}, largest {spread.max():.1f} ({layers[worst[0]]})"
)

# %% [markdown]
# ### Two stages of training
#
# **Stage one** trains the layers that read the time. Their input depends on $t$ alone. So all steps of the sampler fit into one small batch, and nothing else of the network has to run. The loss is local: each layer's output against that of the unrounded layer. What is trained: their weights and biases, and the rows of scales of their inputs.
#
# **Stage two** trains the sensitive layers on the output of the whole network. Inputs come from the teacher's own trajectories, with captions and without, at random steps. What is trained: weights and biases of the sensitive layers, and *all* tables of activation scales but those of the clock. Scales are stored as logarithms: they stay positive, and one learning rate fits all.


# %%
def trainable(net, names, of):
    """The weights and biases ("weights") or the input scales ("scales") of some layers, now with gradients."""
    chosen = []
    for layer in quant_layers(net, names).values():
        found = (layer.weight, layer.bias) if of == "weights" else (layer.activation_quantizer.log_scale,)
        chosen += [p.requires_grad_() for p in found if p is not None]
    return chosen


def descend(loss_of, weights, scales, steps, lr):
    """Adam with a learning rate that falls to zero; scales learn faster, since they are logarithms."""
    groups = [{"params": weights, "lr": lr}] if weights else []
    optimizer = torch.optim.Adam([*groups, {"params": scales, "lr": 3e-2}])
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(float(loss.detach()))
    return losses


def train_the_clock(net):
    """Stage one: each layer that reads the time, against the same layer in full precision."""
    t = torch.tensor(TIMES, device=run.device)
    pairs = [(layer, everything[name]) for name, layer in quant_layers(net, TIME).items()]
    with torch.no_grad():
        targets = [plain(unet.embed(t)) for _, plain in pairs]
        pairs[0][0].clock.set(t)  # the layers share one clock
        inputs = net.embed(t)

    def loss():
        return sum((layer(inputs) - y).square().mean() for (layer, _), y in zip(pairs, targets, strict=True))

    return descend(loss, trainable(net, TIME, "weights"), trainable(net, TIME, "scales"), s.time_steps, 1e-3)


def train_the_layers(net, names, seed):
    """Stage two: some layers and all scales, on the output of the network."""
    calls = {k: torch.cat([call[k] for call, _ in lessons[s.seeds.index(seed)]]) for k in lessons[0][0][0]}
    outputs = torch.cat([out for _, out in lessons[s.seeds.index(seed)]])
    generator = torch.Generator().manual_seed(seed)

    def loss():
        pick = torch.randint(len(outputs), (s.batch,), generator=generator).to(run.device)
        return (net(**{k: v[pick] for k, v in calls.items()}) - outputs[pick]).square().mean()

    scales = trainable(net, [name for name in everything if "time_emb" not in name], "scales")
    return descend(loss, trainable(net, names, "weights") if names else [], scales, s.tune_steps, LR)


LR = 1e-3

# %% [markdown]
# :::{admonition} In the released code
# :class: tip
# Read in [hatchetProject/QuEST](https://github.com/hatchetProject/QuEST). **What is trained.** For ImageNet,
# [`qdiff/post_layer_recon_imagenet.py`](https://github.com/hatchetProject/QuEST/blob/main/qdiff/post_layer_recon_imagenet.py) takes the layers whose names contain `ff.net`, `to_q`, `attn1.to_k` or `attn1.to_v`, as we do. For Stable Diffusion, `post_layer_recon_sd.py` takes `ff.net` only.
# In the former, the local loss of the second stage is commented out, and the loss on the output is added once for each watched layer, which only scales it. In the first stage local loss and output loss are added. We leave the output to the second stage; so our first stage costs seconds.
#
# **Optimiser.** Adam with a learning rate of $10^{-5}$ for weights and $10^{-4}$ for scales, and the optimiser of the scales starts anew at each time. Our network is four hundred times smaller and trained for a few hundred steps; our rates are larger.
#
# **Four-bit activations.** With `act_bit` 4 the scripts switch to one range for each channel of the input; the README calls this token-wise. A range for each channel does not fit into an integer matrix product, so on this page a layer's input has one range.
#
# **First and last layer.** The lines that set them to 8 bits do so for their activations. Their weights keep the common number of bits.
#
# **A symmetric grid with one bit more.** In `qdiff/quant_layer.py`, `ActUniformQuantizer` sets $\Delta$ to the largest absolute value over $2^b$ and clips to $-2^b - 1 \ldots 2^b$ if the flag for symmetric activations is set, as it is in the README's commands for LSUN-Bedroom and ImageNet. That is $2^{b+1} + 1$ values in the range: 33 for $b = 4$, where four bits have 16.
# (Running statistics, another flag of those commands, set $\Delta$ by another formula where ranges are per channel.) Exercise 1 measures what one bit more is worth.
#
# **Two ranges for a concatenation.** As in Q-Diffusion, a flag splits the input of a decoder block into main branch and skip, with a range for each. Our layers do not split. The arm *by channel* below is finer than a split.
# :::
#
# (sec-quest-experiment)=
# ## The experiment
#
# :::{table} The arms. All trained ones take equally many steps on the same examples.
# :name: tab-quest-arms
#
# | arm | bits | trained | question |
# |---|---|---|---|
# | rounding W8A8 | 8, 8 | nothing | the goal |
# | rounding W4A4 | 4, 4 | nothing | the trivial rival |
# | one scale | 4, 4 | nothing | the rival with one range for all times |
# | rounding W4A8 | 4, 8 | nothing | the rival with the same memory |
# | by channel | 4, 4 | nothing | a range for each input channel, as the released code has at four bits |
# | ten at 8 bits | 4, 4 | nothing | the ten worst layers of {numref}`fig-quest-sensitivity` get 8 bits: spend bits instead of training |
# | **QuEST** | 4, 4 | clock, then sensitive layers and all scales | the method |
# | scales only | 4, 4 | clock, then scales | do the weights have to move? |
# | random layers | 4, 4 | clock, then random layers with as many parameters | does it matter *which* layers? |
# | measured layers | 4, 4 | clock, then the worst layers of {numref}`fig-quest-sensitivity`, with as many parameters | is it the right list? |
# | all layers | 4, 4 | clock, then all layers | what does the selection lose? |
# | no clock stage | 4, 4 | sensitive layers and all scales | does the first stage matter? |
# | QuEST, one scale | 4, 4 | as QuEST, from *one scale* | does the table matter? |
# | QuEST and ten at 8 bits | 4, 4 | as QuEST, from *ten at 8 bits* | do bits and training add up? |
# :::
#
# *Equally many steps* means equally little: one learning rate and one short length for all arms, none of them tuned. So *all layers* is what this training makes of all layers, not the best that they could reach.
#
# We judge by nearness to the full-precision sampler: the peak signal-to-noise ratio (PSNR, in decibels) of each image to the one that the unrounded network draws from the same noise and caption. (An image that is the same counts as 100 dB.) Captions are held out, and differ from those of training.


# %%
class Arm(NamedTuple):
    weight_bits: int = 4
    activation_bits: int = 4
    ranges: str = "tensor"  # of activations
    timewise: bool = True
    spared: int = 0  # so many of the worst layers get 8 bits
    clock: bool = True  # stage one
    train: str = "nothing"  # in stage two


ARMS = {
    "full precision": Arm(32, 32),
    "rounding W8A8": Arm(8, 8),
    "rounding W4A8": Arm(4, 8),
    "rounding W4A4": Arm(),
    "by channel": Arm(ranges="channel"),
    "ten at 8 bits": Arm(spared=10),
    "one scale": Arm(timewise=False),
    "QuEST": Arm(train="listed"),
    "scales only": Arm(train="scales"),
    "random layers": Arm(train="random"),
    "measured layers": Arm(train="measured"),
    "all layers": Arm(train="all"),
    "no clock stage": Arm(train="listed", clock=False),
    "QuEST, one scale": Arm(train="listed", timewise=False),
    "QuEST and ten at 8 bits": Arm(train="listed", spared=10),
}


def worst_first(seed):
    """Layers by the harm that they do alone; those that read the time are left out."""
    ranked = harm[s.seeds.index(seed)].argsort(descending=True).tolist()
    return [layers[i] for i in ranked if kinds[i] != "time"]


def layers_to_train(which, seed):
    """Names for stage two."""
    listed, free = select_layers(unet, SENSITIVE), worst_first(seed)
    if which in ("all", "scales", "listed"):
        return {"all": free, "scales": [], "listed": list(listed)}[which]
    if which == "random":
        mix = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
        free = [free[i] for i in mix]
    budget, chosen = size(listed), []
    for name in free:  # in this order, as long as they hold no more parameters than the list
        if (weight := size({name: everything[name]})) <= budget:
            chosen.append(name)
            budget -= weight
    return chosen


def start(arm, seed):
    """The rounded model that an arm begins with."""
    keep = [*EDGES, *worst_first(seed)[: arm.spared]]
    net = plain_rounding(*arm[:2], seed, keep=keep, ranges=arm.ranges, timewise=arm.timewise)
    for layer in quant_layers(net).values():
        layer.forget_weights()  # rounded copies need not travel between processes
    return net.requires_grad_(False)


def score(arm_and_starts, seed):
    """The images of one arm and seed, how many parameters were trained, and whether all others stayed."""
    arm, starts = arm_and_starts
    net, losses = deepcopy(starts[s.seeds.index(seed)]), {}
    before = deepcopy(net.state_dict())
    if arm.train != "nothing":
        if arm.clock:
            losses["clock"] = train_the_clock(net)
        losses["output"] = train_the_layers(net, layers_to_train(arm.train, seed), seed)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    moved = [float((v - before[k]).abs().max()) for k, v in net.state_dict().items() if k not in trained]
    test = shapes.tokens(captions(s.images, 1000 + seed, "test")).to(run.device)
    weights = sum(p.numel() for name, p in trained.items() if "log_scale" not in name)
    scales = sum(p.numel() for name, p in trained.items() if "log_scale" in name)
    return {
        "x": draw(net, test, seed).cpu(),
        "weights": weights,
        "scales": scales,
        "moved": max(moved),
        "losses": losses,
    }


untrained = {name: arm for name, arm in ARMS.items() if arm.train == "nothing"}
starts = run_arms(start, untrained, s.seeds, s.jobs)
begins_as = {arm: name for name, arm in untrained.items()}
settings = {
    name: (arm, starts[begins_as[arm._replace(train="nothing", clock=True)]]) for name, arm in ARMS.items()
}
results = run_arms(score, settings, s.seeds, s.jobs)
images = {name: [r["x"] for r in of] for name, of in results.items()}
psnr = {
    name: torch.stack(
        [psnr_to_reference(x, y).mean() for x, y in zip(xs, images["full precision"], strict=True)]
    )
    for name, xs in images.items()
}
tuned = {name: of[0]["weights"] for name, of in results.items()}
run.record(
    "tuned-share",
    max(results["QuEST"][i]["weights"] + results["QuEST"][i]["scales"] for i in range(len(s.seeds))) / total,
)
run.record("frozen", max(r["moved"] for of in results.values() for r in of))

# %% [markdown]
# ## Results
#
# ### Samples
#
# {numref}`fig-quest-samples` shows the same captions and the same noise in all rows. One scale for all times leaves mostly noise. With a table of scales the shapes are there, paler and grainy. QuEST's row is hard to tell from plain rounding's. The measured layers bring the colours back, and eight bits in ten layers remove most of the grain.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of eight small images of coloured shapes. Full precision and W8A8 look alike. Plain rounding at W4A4 keeps the shapes in place, paler and on grainy backgrounds; with one scale for all times there is mostly coloured noise. The row of QuEST looks much like plain rounding; that of the measured layers has brighter, cleaner colours; with ten layers at 8 bits the grain is nearly gone."}, "figure": {"caption": "The first captions of the first seed, not chosen. At the left the mean PSNR to full precision in dB, over all images of all seeds.", "name": "fig-quest-samples"}}
rows = [
    "full precision",
    "rounding W8A8",
    "one scale",
    "rounding W4A4",
    "QuEST",
    "measured layers",
    "ten at 8 bits",
]
columns = min(8, s.images)
labels = [f"{name}\n{float(psnr[name].mean()):.1f} dB" if name != "full precision" else name for name in rows]
fig, ax = plt.subplots(figsize=(7, 5.6), layout="constrained")
show_images(torch.cat([images[name][0][:columns] for name in rows]), columns, ax=ax, row_labels=labels)
plt.show()

# %% [markdown]
# ### What training recovers
#
# Let the *recovery* of an arm be the share of the gap that it closes, from plain rounding at W4A4 to plain rounding at W8A8, in decibels. An arm that ends below plain rounding has a negative one. *QuEST and ten at 8 bits* owes most of its recovery to the bits, not to training. *Objects right* is the share of the caption's objects that an exact reader of scenes finds with the right shape, colour, size and place; a few dozen objects are read in all, so a difference of a few per cent is a handful of them. {numref}`fig-quest-recovery` sets PSNR
# against the number of weights that were trained.

# %%
plain, goal = psnr["rounding W4A4"], psnr["rounding W8A8"]
recovery = {name: (psnr[name] - plain) / (goal - plain) for name in ARMS if ARMS[name].train != "nothing"}
run.record("recovery", recovery["QuEST"])
run.record("which-layers", psnr["QuEST"] - psnr["random layers"])
run.record("selection-loses", (psnr["QuEST"] - plain) / (psnr["all layers"] - plain))
run.record("right-list", psnr["QuEST"] - psnr["measured layers"])
run.record("weights-matter", psnr["QuEST"] - psnr["scales only"])
run.record("bits-instead", psnr["QuEST"] - psnr["ten at 8 bits"])
run.record("bits-and-training", psnr["QuEST and ten at 8 bits"] - psnr["ten at 8 bits"])
run.record("clock-stage", psnr["QuEST"] - psnr["no clock stage"])
run.record("table-plain", psnr["rounding W4A4"] - psnr["one scale"])
run.record("table-trained", psnr["QuEST"] - psnr["QuEST, one scale"])
run.record("equal-memory", psnr["QuEST"] - psnr["rounding W4A8"])
oracle = zoo.load("oracle_shapes32").to(run.device)
for name in ARMS:
    scored = [
        mean_scores(scene_scores(read_in_batches(oracle, x), captions(s.images, 1000 + seed, "test")))
        for seed, x in zip(s.seeds, images[name], strict=True)
    ]
    right = sum(score["object"] for score in scored) / len(scored)
    closed = f"closes {recovery[name].mean():6.1%} of the gap" if name in recovery else ""
    print(
        f"{name:17s} PSNR {psnr[name].mean():6.2f} dB   objects right {right:6.1%}   {tuned[name]:9,} weights trained   {closed}"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "PSNR against the share of weights trained. Horizontal lines for plain rounding at W8A8 at the top, ten layers at 8 bits and W4A8 close together below it, and W4A4 far below. Points with error bars: scales only at the left, QuEST and the arms with as many parameters at about a third, all layers at the right. QuEST, scales only and no clock stage lie hardly above the line of W4A4, random layers higher, measured layers and all layers higher still and level. QuEST with ten layers at 8 bits lies just above that line; QuEST with one scale lies far below all others."}, "figure": {"caption": "Nearness to full precision against the share of weights trained. Lines: rounding, nothing trained. Points: trained at W4A4 (the star: with ten layers at 8 bits), equally long on the same examples. *Scales only* counts the weights of the clock. Random layers, no clock stage and measured layers hold about as many weights as QuEST and are drawn a little aside. Bars: 90 % intervals over seeds; the differences in the table below are taken seed by seed and can be surer than the bars suggest.", "name": "fig-quest-recovery"}}
fig, ax = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
LINES = {
    "rounding W8A8": ("0.2", 1.0),
    "rounding W4A8": ("0.45", 1.0),
    "ten at 8 bits": ("#A06B00", 0.75),
    "rounding W4A4": (PALETTE[1], 0.75),
}
for name, (colour, at) in LINES.items():
    level = float(psnr[name].mean())
    ax.axhline(level, color=colour, lw=1.2, ls="--")
    ax.annotate(name, (at, level), (0, 3), textcoords="offset points", ha="right", fontsize=9, color=colour)
MARKS = [
    "scales only",
    "QuEST",
    "random layers",
    "measured layers",
    "no clock stage",
    "QuEST, one scale",
    "all layers",
]
MARKS.append("QuEST and ten at 8 bits")
for i, (name, mark) in enumerate(zip(MARKS, "voshDX^*", strict=True)):
    mean, low, high = mean_interval(psnr[name])
    nudge = {"no clock stage": 0.03, "random layers": -0.03, "measured layers": 0.06}.get(name, 0.0)
    bars = torch.stack([mean - low, high - mean]).reshape(2, 1)
    ax.errorbar(
        [tuned[name] / total + nudge],
        [float(mean)],
        bars,
        fmt=mark,
        ms=7,
        capsize=3,
        color=[*PALETTE, "k"][i],
        label=name,
    )
ax.set(
    xlabel="share of all parameters trained, scales not counted",
    ylabel="PSNR to full precision in dB",
    xlim=(-0.04, 1.04),
)
fig.legend(loc="outside lower center", fontsize=9, ncol=3)
plt.show()

# %% [markdown]
# ### Time
#
# Simulated quantisation makes a network slower: each layer rounds its input and, in training, its weight. How much slower is measured here, on one batch. For comparison, a linear layer that really computes with eight-bit integers (`IntegerLinear`), at a width where this pays on processors with eight-bit dot products. Four-bit products are not to be had on this machine.

# %%
call = {k: v[:8] for k, v in lessons[0][0][0].items()}
wide = nn.Linear(1024, 1024)
narrow, tokens_in = (
    IntegerLinear.from_linear(wide),
    torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)),
)
with torch.no_grad():
    slower = [bench.ratio(lambda: four_bit(**call), lambda: unet(**call), repeats=3).ratio for _ in s.seeds]
    integers = bench.ratio(lambda: narrow(tokens_in), lambda: wide(tokens_in), repeats=3).ratio
run.record("slower", slower)
display(
    Markdown(
        f"The simulated four-bit network takes {sum(slower) / len(slower):.2f} times as long as the plain one. A linear layer of width 1,024 "
        f"in eight-bit integers takes {integers:.2f} times as long as in floating point, on a processor "
        f"{'with' if has_vnni() else 'without'} eight-bit dot products."
    )
)

# %%
run.report()

# %% [markdown]
# **What the table says, in words.** The exact claims are about the machinery, and a run in which one of them failed would not be published: rounding does what {eq}`eq-quest-grid` says, with 32 bits it does nothing and with 16 bits nothing that matters, frozen tensors stay, and memory is what arithmetic says.
#
# **The clock.** The paper's observation is real: at four bits the time embedding is off by about a sampling step, and each bit removed about doubles that. *Clock-output* adds a caution. A length says how far a vector moves, not whether anybody looks in that direction. The honest unit is the output, and there a rounded clock costs a good deal less than its length suggests.
#
# That training the clock first pays (*clock-stage*) is **inconclusive** by the rule of the table. In plain words, no effect was seen, and the interval leaves no room for the effect that the claim asks for. The likely reasons: the layers that read the time carry next to nothing of the summed error, and with a table of scales each step already has a range of its own.
#
# **The table of scales.** No other part of the method is worth as much here (*table-plain*, confirmed). Several inputs in the decoder are many times as wide at the start of the sampler as at its end. One range for all times then leaves a handful of the 16 points for the late steps, where the image gets its detail. Training does not make up for it (*table-trained*, confirmed): *QuEST, one scale* gains by training and still ends
# below plain rounding with a table. Most layers would not need one: the median over layers of widest to narrowest range, printed above, is close to one.
#
# **Which layers.** The sensitivity is skewed, as the paper says (*skewed*, *skewed-outer*), but towards other layers, and three claims about the list are **contradicted**.
#
# - *Right-layers*: the damage is done by convolutions close to the output, and the list holds none.
# - *Which-layers*: random layers with as many parameters do not do worse than the list. They do better, most likely because a random draw contains convolutions.
# - *Right-list*: the layers that measure as sensitive, at as many parameters, beat the list by far more than the half decibel allowed.
#
# The list also spends most of its parameters on the innermost resolution, whose attention hardly acts. That is the likely reason why training the list does no more than training the scales. *Weights-matter* is **inconclusive** by the rule; no difference was seen, and one as large as the claim asks for lies outside the interval. It does not say that weights need not move: where the right ones move, it helps.
#
# *Selection-loses* is **weaker** than claimed: the list reaches a small part of what training all layers gains. This speaks against the list, not against selecting. The *measured layers*, a third of the parameters, end level with *all layers* in the printed list. So these numbers agree with the paper's principle; it is the list that does not carry over to this network: measure first. (No claim was set for that comparison before the run.)
#
# **Half of the gap** is what *recovery* asks for. QuEST closes a few per cent of it, so the claim is **weaker**: more than nothing, and far from half. Training all layers closes less than a fifth. There are two likely reasons. One is that the training is short; this page tried one length and one learning rate, and cannot say what more would bring. The other is where the gap comes from. *Rounding W4A8* has the same four-bit
# weights as *rounding W4A4* and lies far above it, so more than half of that gap, in decibels, is due to the activations. A range filled evenly and cut into 16 steps leaves an error 24 decibels below the signal ($20 \log_{10} 16$), a bell-shaped one somewhat more error. In a layer that carries the image it goes straight to the output. Weights before and after can shape it, and make it harmless elsewhere; they cannot undo it.
#
# The reader of scenes is kinder than PSNR: it finds more objects right after QuEST than after plain rounding. No claim was made on that, and the images are few.
#
# **Bits instead of training.** Ten layers of two hundred do nearly all the damage, so one need not train at all. Give them eight bits. They hold few weights, so the memory hardly changes, and {numref}`fig-quest-recovery` shows where that arm lands: well above all that was trained at four bits throughout. So *bits-instead*, the claim that training beats spending bits, is **contradicted**, by many decibels. Training adds to it
# (*bits-and-training*, confirmed). But that arm trains the scales too, and no arm trains the scales alone after spending the bits; after what *weights-matter* shows, the gain should not be credited to the list.
#
# **At equal memory** the claim is **contradicted** as well: W4A8 takes the same memory, needs no training, and is far more than three decibels nearer to full precision. Whoever wants a small file takes W4A8. Four-bit activations are for four-bit arithmetic. Even then, a range for each channel (*by channel*), untrained, comes nearer than QuEST does with one range a layer; but it does not fit into an integer product.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Speed.** All rounding is simulated. A layer in four bits needs a processor with four-bit products, and kernels for it.
# - **Attention products.** The released code also rounds queries, keys, values and the attention map (the latter to 16 bits for Stable Diffusion). Here the products inside attention stay in floating point.
# - **The paper's starting point.** It starts from weights whose rounding directions were learned (AdaRound, as in Q-Diffusion {cite:p}`li2023qdiffusion`). Our weights go to the nearest point of a searched grid. And at four bits the released code gives each channel of an activation its own range; ours share one. So our W4A4 starts from a worse place than the paper's.
# - **Long training.** The paper trains for thousands of steps with rates that suit a large network; the `cpu` profile has a few minutes for all arms. What is compared is what equal, short training buys. The `gpu` profile trains for longer; the numbers here are not from it.
# - **Large networks.** A network of two million parameters has fewer outlying activations than Stable Diffusion, and less to spare.
# - **Perceived quality.** PSNR to the full-precision image punishes any change, also a harmless one. The reader of scenes says whether the content is right, and is easily satisfied.
# - **Left untried:** FID on LSUN and ImageNet, Stable Diffusion at W4A4, and the comparison with Q-Diffusion and other trained methods.
# :::
#
# ## Exercises
#
# **1.** The released code's symmetric grid for activations reaches from $-2^b$ to $2^b$ steps. How many bits is that really? What does it buy here?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# q runs over the whole numbers from -2^b to 2^b: 2^(b+1) + 1 values.
values = 2 ** (4 + 1) + 1
print(f"{values} values, log2 = {torch.tensor(float(values)).log2():.2f} bits")
# A symmetric grid wastes points on a one-sided input (after SiLU, say), so it is not quite worth a bit. The affine grid with
# five bits bounds what it buys:
test = shapes.tokens(captions(s.images, 1000 + s.seeds[0], "test")).to(run.device)
reference, coarse = images["full precision"][0], images["rounding W4A4"][0]
finer = draw(plain_rounding(4, 5, s.seeds[0]), test, s.seeds[0]).cpu()
bought = (psnr_to_reference(finer, reference) - psnr_to_reference(coarse, reference)).mean()
print(f"W4A5 instead of W4A4, plain rounding, one seed: {bought:+.1f} dB")
print(f"QuEST instead of plain rounding, W4A4: {(psnr['QuEST'] - psnr['rounding W4A4']).mean():+.1f} dB")

# %% [markdown]
# **2.** A range can also be found while the model runs: for each *token* by itself, from its own values. No calibration, no table. A token's scale is a factor of its row in the matrix product, so integers still do. How does plain rounding at W4A4 fare with it?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
by_token = uniform_rules(
    QuantSpec(4, "channel", scale_init="mse"), QuantSpec(4, "token", dynamic=True), keep=EDGES
)
x = draw(quantize_copy(unet, by_token), test, s.seeds[0]).cpu()
print(f"a range for each token {psnr_to_reference(x, reference).mean():.1f} dB")
print(f"a table of scales      {psnr_to_reference(images['rounding W4A4'][0], reference).mean():.1f} dB")
# For convolutions a token is a pixel with all its channels, and the same pixel enters several outputs: there the factor
# cannot be pulled out of the sum over the kernel's pixels. So this is fair for linear layers, and optimistic for convolutions.

# %% [markdown]
# **3.** In {eq}`eq-quest-grid` the zero point is a whole number, so that zero is a point of the grid. Why is that worth a point?
#
# :::{dropdown} Solution 3: in words
# Zeros are everywhere, and they are exact: the padding of a convolution is zero, and much of an activation after SiLU or GELU is close to it. If zero were off the grid, every padded pixel would carry the same error, with the same sign. Errors of one sign add up over the pixels and channels of a sum; errors of random sign largely cancel.
# :::
#
# ## References
#
# The method: {cite:t}`quest`, with its code [hatchetProject/QuEST](https://github.com/hatchetProject/QuEST) (`qdiff/quant_layer.py`, `qdiff/quant_model.py`, the three files `qdiff/post_layer_recon_*.py`, `sample_diffusion_ldm_imagenet.py` and `txt2img.py` were read). The straight-through gradient: {cite:t}`bengio2013estimating`. Learned scales:
# {cite:t}`esser2020learned`. The checkpoints that it starts from: {cite:t}`li2023qdiffusion`. The sampler: {cite:t}`song2021denoising`. The library's parts: [minilib/quantization](https://github.com/minilib-book/minilib/blob/main/minilib/quantization), [minilib/kernels/quant.py](https://github.com/minilib-book/minilib/blob/main/minilib/kernels/quant.py).
