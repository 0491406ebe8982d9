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
# # CLEAR: keep the neighbours and the text
#
# Take a trained diffusion transformer. Let each image token read only the tokens in a small disk around it, and the text. {cite:t}`clear` call this *convolution-like* attention. It is still a softmax, with the weights that the model has. So little changes for the network, and a short distillation repairs what does. The work grows with the number of tokens, no longer with its square.
#
# This page asks three things. Is it the *neighbours* that matter, or would as many keys anywhere do? Is it the *softmax*, or would linear attention do? And from how many tokens on does it pay?
#
# In short: both matter, by wide margins, before and after distillation. At the 256 tokens of our model it does not pay at all: simply taking fewer steps is far better. At the paper's 262,144 tokens that way out is closed.

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
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import NullLocator, PercentFormatter

from minilib import zoo
from minilib.arms import run_arms
from minilib.attention import (
    PooledLocalAttention,
    attention_processor,
    get_attention,
    record_attention,
    replace_attention,
)
from minilib.bench import times
from minilib.caching import equal_cost_steps
from minilib.costs import fit_exponent, mmdit_flops
from minilib.data import shapes
from minilib.data.teacher_scenes import load_teacher_scenes, teacher_batches
from minilib.inheritance import train_only
from minilib.kernels.halo import choose_tiling, reach_of
from minilib.losses import uniform_timesteps
from minilib.metrics import read_in_batches, scene_scores
from minilib.models.mmdit_configs import SD3_CONFIGS, mmdit_config_from_diffusers
from minilib.plotting import PALETTE, curve, mean_interval, show_images, use_style
from minilib.profiling import count_parameters
from minilib.recipes.scenes import draw_scenes, flow_scheduler
from minilib.reproduction import Reproduction
from minilib.students import StudentLoss, prediction_errors
from minilib.training import FitConfig, fit


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each: training batches, random keys, noise and captions of its own
    steps: int  # of distillation
    batch: int
    test: int  # held-out pictures to measure velocities on
    radii: tuple[int, ...]  # without training
    images: int  # drawn for each arm and seed
    solver_steps: int  # of Euler's method, with guidance 3
    sides: tuple[int, ...]  # of the grids that are timed
    jobs: int  # processes


run = Reproduction(
    "clear",
    profile,
    {
        "smoke": Settings((0,), 1, 4, 8, (2, 4), 2, 8, (16, 32), 1),
        "cpu": Settings((0, 1, 2), 60, 8, 128, (2, 3, 4, 6, 8), 24, 20, (16, 32, 64), 2),
        "gpu": Settings((0, 1, 2, 3, 4), 2000, 32, 128, (2, 3, 4, 6, 8), 200, 20, (16, 32, 64, 128), 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The teacher is this book's text-to-image MM-DiT, built like that of Stable Diffusion 3 {cite:p}`esser2024scaling`: an image stream of $16 \times 16$ tokens, a text stream of up to 18, and joint attention of both. It draws scenes of one to three coloured shapes. As in the paper, the students learn from pictures that the teacher drew itself. Velocities are measured on 128 of its pictures that are kept apart, with captions that no student was trained on.

# %%
run.show_settings()

# %% [markdown]
# (sec-clear-idea)=
# ## The idea
#
# Let $q_i$ be the query of image token $i$ at row $y_i$ and column $x_i$. In full attention it reads every key. Here it reads the keys of
#
# $$
# \mathcal N(i) = \text{text} \;\cup\; \left\{ j : (y_i - y_j)^2 + (x_i - x_j)^2 < r^2 \right\} .
# $$ (eq-clear-disk)
#
# The output is the plain softmax over these keys. Text queries still read everything. So the text is a *hub*: it gathers from all the image, and all the image reads it in the next layer.
#
# The paper names four things that a replacement of attention has to keep:
#
# - **Locality.** Trained attention looks mostly at neighbours.
# - **Formulation consistency.** The weights were trained for a softmax. Linear attention {cite:p}`katharopoulos2020transformers` has another formula, to which they do not fit.
# - **High rank.** The matrix of linear attention has at most the rank of a head's width. A softmax over a disk is not bound by it.
# - **Feature integrity.** Keys and values are not averaged or thrown together; a query reads real ones.
#
# The count shows what is saved. With $n$ image tokens and $l$ text tokens, full attention has $(n + l)^2$ pairs of query and key. The disks have about $n \pi r^2 + 2 n l + l^2$: the square of $n$ is gone.
#
# {numref}`fig-clear-disk` shows one query.

# %%
# NBVAL_CHECK_OUTPUT
teacher = zoo.load("mmdit_shapes32").to(run.device).eval()
net = teacher.denoiser
SIDE = net.config["sample_size"] // net.patch_size
N, GRID, HEAD = SIDE * SIDE, (SIDE, SIDE), net.hidden_size // net.config["num_heads"]
scenes = load_teacher_scenes()
LENGTH = scenes.tokens.shape[1]


def disk(side, radius):
    """(n, n): which image token sees which, on a square grid."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return (at[:, None] - at).square().sum(2) < radius**2


def sees(image, extra=LENGTH):
    """(n + l, n + l): the extra tokens see all, and all see them."""
    return F.pad(image, (0, extra, 0, extra), value=True)


print(f"{N} image tokens, at most {LENGTH} text tokens, {len(net.blocks)} blocks, heads {HEAD} wide")
for radius in (2, 3, 4, 6, 22):
    image = disk(SIDE, radius)
    print(
        f"radius {radius:2d}: {int(image.sum(1).max()):3d} image keys in the middle, {image.float().mean():6.1%} of the image's pairs"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: a generated scene of coloured shapes on a dark ground, in a grid of 16 by 16 tokens. A disk of tokens around one white token is bright, the rest is dimmed. Beside it the words of the caption in a column; thin lines join each to the white token. Right: a square matrix of pairs of query and key. Narrow bands along the diagonal and a few parallels to it are dark, and so are a band at the right and one at the bottom; the rest is white."}, "figure": {"caption": "The picture to remember. Left: what one image token (white) reads with radius 4: the tokens in its disk, and every word. Right: all pairs of query and key; dark pairs are kept. Image tokens in raster order come first, then the text.", "name": "fig-clear-disk"}}
example = scenes.held_out.start
words = shapes.decode(scenes.tokens[example]).split()
fig, (ax, right) = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained", width_ratios=(1.25, 1))
row, column = SIDE // 2 - 2, SIDE // 2 - 3
p = net.patch_size
lit = disk(SIDE, 4)[row * SIDE + column].view(SIDE, SIDE).repeat_interleave(p, 0).repeat_interleave(p, 1)
picture = ((scenes.images[example] + 1) / 2).permute(1, 2, 0)
picture = torch.where(lit[..., None], 0.25 + 0.75 * picture, 0.35 * picture)
ax.imshow(picture, extent=(0, SIDE, SIDE, 0))
ax.add_patch(plt.Rectangle((column, row), 1, 1, color="white"))
for place, word in enumerate(words):
    y = (place + 0.5) * SIDE / len(words)
    ax.plot((SIDE + 0.6, column + 1), (y, row + 0.5), color=PALETTE[4], lw=0.7, alpha=0.8)
    ax.text(SIDE + 0.9, y, word, va="center", fontsize=9)
ax.set(
    xlim=(0, SIDE + 6),
    ylim=(SIDE, 0),
    xticks=range(0, SIDE + 1, 4),
    yticks=range(0, SIDE + 1, 4),
    xlabel="column",
    ylabel="row",
)
ax.spines[:].set_visible(False)
ax.grid(False)
right.imshow(~sees(disk(SIDE, 4)), cmap="gray", vmin=0, vmax=1)
right.set(xlabel="key", ylabel="query", title=f"{sees(disk(SIDE, 4)).float().mean():.0%} of all pairs")
right.set_xticks([SIDE * SIDE / 2, N + LENGTH / 2], ["image", "text"])
right.set_yticks([SIDE * SIDE / 2, N + LENGTH / 2], ["image", "text"], rotation=90, va="center")
right.grid(False)
plt.show()

# %% [markdown]
# (sec-clear-method)=
# ## The method
#
# ### Attention with a mask, and without the work
#
# The definition takes three lines: all logits, and minus infinity where a query does not see a key. `mask` is the model's own, for the padding of short captions.


# %%
def masked(image, hub=True):
    """A processor: softmax attention whose image queries see the text and the image keys in `image` (n, n)."""

    def attend(q, k, v, *, mask=None):
        seen = sees(image, k.shape[2] - N)[: q.shape[2]].to(q.device)
        if not hub:  # text queries read the text only
            seen[N:, :N] = False
        seen = seen if mask is None else seen & mask
        logits = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
        return logits.masked_fill(~seen, -torch.inf).softmax(3) @ v

    return attend


# %% [markdown]
# This saves nothing: all $(n + l)^2$ logits are computed, and most are thrown away. To save work, the grid is cut into tiles. All queries of a tile find their keys within the tile and a rim of $r$ tokens, its *halo*; so a tile and its window are one small dense attention. That is `get_attention("local", ...)` of the library. On a GPU the released code uses FlexAttention, which skips blocks of the mask; so does the library there.
#
# The first exact claims: both ways give the same velocities, and a radius beyond the grid's diagonal gives the teacher back, since no pair is left out.


# %%
def everywhere(make):
    """The teacher's weights with another attention in the denoiser's blocks; `make(i)` returns that of block i."""
    model = zoo.load("mmdit_shapes32").to(run.device)
    replace_attention(
        model, lambda name, _: name.startswith("denoiser"), lambda name, _: make(int(name.split(".")[2]))
    )
    return model.eval()


def local(radius):
    return get_attention("local", grid=GRID, radius=float(radius))


def test_batch(seed, n=s.test):
    """Held-out pictures of the teacher with noise and times of a seed."""
    generator = torch.Generator().manual_seed(3000 + seed)
    x0, y = (part[scenes.held_out][:n].to(run.device) for part in (scenes.images, scenes.tokens))
    noise = torch.randn(x0.shape, generator=generator).to(run.device)
    return {"x0": x0, "y": y, "noise": noise, "t": uniform_timesteps()(n, generator).to(run.device)}


@torch.no_grad()
def velocities(model, batch):
    level = (batch["t"] / 1000)[:, None, None, None]
    return model((1 - level) * batch["x0"] + level * batch["noise"], batch["t"], batch["y"])


exact = {key: x.double() if x.is_floating_point() else x for key, x in test_batch(900, 4).items()}


def exactly(make):
    """Velocities in double precision, so that rounding is out of the way."""
    return velocities(everywhere(make).double(), exact)


gap = [exactly(lambda i, r=r: local(r)) - exactly(lambda i, r=r: masked(disk(SIDE, r))) for r in (2, 4)]
run.record("same", max(float(x.abs().max()) for x in gap))
diagonal = math.hypot(SIDE - 1, SIDE - 1)
wide = math.floor(diagonal) + 1
run.record("all-pairs", int((~sees(disk(SIDE, wide))).sum()))
whole = exactly(lambda i: get_attention("full"))
run.record("full", float((exactly(lambda i: local(wide)) - whole).abs().max()))

pooled = everywhere(lambda i: PooledLocalAttention(grid=GRID, radius=2.0, pool=4))
plain = everywhere(lambda i: local(4))
added = [count_parameters(model) - count_parameters(teacher) for model in (plain, pooled)]
run.record("parameters", abs(added[0]) + abs(added[1] - 16 * len(net.blocks)))

# %%
# NBVAL_CHECK_OUTPUT
print(f"the grid's diagonal is {diagonal:.1f} tokens; radius {wide} leaves no pair out")
print("parameters added by disks and by disks with pooled keys:", *added)

# %% [markdown]
# *Pooled keys* are the released remedy for small disks, which repeat patterns: keys and values averaged over patches of $4 \times 4$ tokens, with 16 learned weights a layer that start at $1/16$. Every image query reads all of them, a coarse view of the whole image. What that does to the cost comes next.
#
# ### What it costs
#
# We count pairs, at the paper's sizes: 8,192 pixels are $512 \times 512$ latent tokens, with 512 text tokens. A step $(dy, dx)$ inside the disk exists for $(H - |dy|)(W - |dx|)$ queries, so no mask is needed.


# %%
def steps_of(radius):
    """All (dy, dx) inside the disk."""
    reach = range(-reach_of(radius), reach_of(radius) + 1)
    return [(y, x) for y in reach for x in reach if y * y + x * x < radius**2]


def image_pairs(side, radius):
    return sum(max(0, side - abs(y)) * max(0, side - abs(x)) for y, x in steps_of(radius))


def pairs(side, text, radius=None, pool=None):
    """Pairs of query and key that are kept; radius None: all of them."""
    n = side * side
    image = n * n if radius is None else image_pairs(side, radius)
    return image + 2 * n * text + text**2 + (n * (side // pool) ** 2 if pool else 0)


off = [abs(pairs(SIDE, LENGTH, r) - int(sees(disk(SIDE, r)).sum())) for r in (1, 2, 3, 4, 6, 22)]
run.record("pair-count", sum(off))
run.record("disks", sum(abs(len(steps_of(r)) - size) for r, size in ((8, 193), (16, 793), (32, 3205))))
n8k = 512 * 512
kept8 = pairs(512, 512, 8) / pairs(512, 512)
kept16 = (image_pairs(512, 16) + n8k * 512) / (n8k * (n8k + 512))
run.record("pairs-8", kept8)
run.record("pairs-16", kept16)

sides = (256, 512, 1024)
COSTS = {
    "full": {},
    "disks, r = 8": {"radius": 8},
    "disks, r = 16": {"radius": 16},
    "r = 8, pooled": {"radius": 8, "pool": 4},
}
slopes = {
    name: fit_exponent([k * k for k in sides], [pairs(k, 512, **of) for k in sides]).value
    for name, of in COSTS.items()
}
run.record("slope-full", slopes["full"])
run.record("slope-disks", [slopes["disks, r = 8"], slopes["disks, r = 16"]])
run.record("slope-pooled", slopes["r = 8, pooled"])

# %%
# NBVAL_CHECK_OUTPUT
print("tokens in a disk:", {r: len(steps_of(r)) for r in (8, 16, 32)})
print(f"8,192 pixels, r = 8: {kept8:.3%} of all pairs; r = 16: {kept16:.3%} of the pairs of image queries")
print(f"the same with pooled keys, r = 8: {pairs(512, 512, 8, 4) / pairs(512, 512):.2%} of all pairs")
print("growth with the number of tokens:", {name: f"{value:.2f}" for name, value in slopes.items()})

# %% [markdown]
# Here is the abstract's $99.5\,\%$. It holds at 8,192 pixels, for attention alone, without pooled keys. These keep only a sixteenth of the pairs, but a sixteenth of a square is a square: the growth is near 2 again. The paper's linear cost and its remedy for small disks do not come together at this size.
#
# Attention is not the whole network. A step of Stable Diffusion 3 with disks instead of full attention saves nothing where projections dominate. The trivial rival of any cheaper step is to take *fewer* of the dear ones. {numref}`fig-clear-cost` turns the count into that: how many steps of the full model cost as much as 28 steps with disks?


# %%
def macs(config, side, text, radius=None):
    """Multiply-accumulates of a call: the formula for full attention, less the image pairs that are left out."""
    whole = mmdit_flops(config, side * config["patch_size"], side * config["patch_size"], text) // 2
    saved = 0 if radius is None else side**4 - image_pairs(side, radius)
    return whole - 2 * config["depth"] * config["hidden_size"] * saved


def rival_steps(config, side, text, radius, steps):
    """Steps of the full model that cost at least as much as `steps` of the local one."""
    return equal_cost_steps(steps * macs(config, side, text, radius), macs(config, side, text))


sd3 = mmdit_config_from_diffusers(SD3_CONFIGS["SD3-medium"])
rival_here = rival_steps(net.config, SIDE, LENGTH, 4, s.solver_steps)
run.record("rival-8k", rival_steps(sd3, 512, 333, 8, 28))
pays = [side for side in range(16, 513, 8) if rival_steps(sd3, side, 333, 8, 28) <= 14]
print(f"here, {N} tokens: {rival_here} steps of the teacher for {s.solver_steps} with disks")
print(
    f"Stable Diffusion 3, r = 8: half of the work is saved from {pays[0] ** 2:,} tokens on ({16 * pays[0]:,} pixels)"
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, logarithmic axes: kept pairs against image tokens. The line of full attention has slope 2. Two lines of disks run with slope 1 far below it. The line with pooled keys leaves the disks' and turns parallel to full attention. A circle marks the disks at 262,144 tokens. Right: steps that the rival gets, falling from 28 at a few hundred tokens over about 20 at 4,096 to 2 at 262,144."}, "figure": {"caption": "Counted, not timed. Left: pairs of query and key with 512 text tokens; the circle is the abstract's 99.5 %. Right: how many steps of full Stable Diffusion 3 cost as much as 28 steps with disks of radius 8. Where this is near 28, fewer steps are the better bargain; where it is near 1, there is no such rival.", "name": "fig-clear-cost"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained")
grids = [16, 32, 64, 128, 256, 512]
colours = {
    name: colour for name, colour in zip(COSTS, ("0.3", PALETTE[0], PALETTE[5], PALETTE[1]), strict=True)
}
for name, of in COSTS.items():
    axes[0].loglog([k * k for k in grids], [pairs(k, 512, **of) for k in grids], "o-", ms=3, label=name, color=colours[name])  # fmt: skip
axes[0].plot(n8k, pairs(512, 512, 8), "o", ms=11, mfc="none", mec="k")
axes[0].set(xlabel="image tokens", ylabel="pairs of query and key", ylim=(1e5, 3e12))
axes[0].legend(fontsize=8, loc="upper left")
axes[1].semilogx(
    [k * k for k in grids], [rival_steps(sd3, k, 333, 8, 28) for k in grids], "o-", color=PALETTE[0]
)
for k in (64, 128, 512):
    axes[1].annotate(f"{16 * k:,} px", (k * k, rival_steps(sd3, k, 333, 8, 28)), (4, 6), textcoords="offset points", fontsize=8)  # fmt: skip
axes[1].set(xlabel="image tokens", ylabel="steps of equal cost", ylim=(0, 30), xlim=(150, 9e5))
plt.show()

# %% [markdown]
# :::{admonition} In the released code
# :class: tip
# Read in [Huage001/CLEAR](https://github.com/Huage001/CLEAR), not run. (1) In [the attention](https://github.com/Huage001/CLEAR/blob/main/attention_processor.py) the image's pooled keys start at token 512: the length of the text is fixed there, while the mask takes it as an argument. Text queries see no pooled keys. (2) With the option `proportional_attention` the softmax is sharpened as the picture grows: the
# logits' scale contains the logarithm of the number of keys. The full processor takes it of $n$, the local ones of $10\,n$. We do not know why. (3) In [the training](https://github.com/Huage001/CLEAR/blob/main/distill.py) the features of ten of FLUX's 38 single-stream blocks are compared, before their output projection; ours are taken after it. (4) [The script](https://github.com/Huage001/CLEAR/blob/main/distill.sh) allows 50,000 steps, with the optimiser Prodigy at rate 1; the paper speaks of
# 10,000. We use AdamW.
# :::
#
# ### Why disks, in the teacher itself
#
# Two of the four reasons can be read off the teacher. *Locality*: which share of the attention that image queries pay to image keys stays inside a disk? Keys at random would get the disk's share of keys. *Rank*: for each head, the matrix of weights among the image tokens, once as a softmax over the disk, once as ELU linear attention with the same queries and keys.


# %%
def elu_weights(q, k):
    """(b, h, n, m): what linear attention would read, written out."""
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3)
    return scores / scores.sum(3, keepdim=True)


def share_inside(seed, radius):
    """Mean share of the teacher's image-to-image attention inside the disk, over layers, heads, queries and times."""
    inside = disk(SIDE, radius).to(run.device)

    def reduce(w):
        image = w[:, :, :N, :N]
        return ((image * inside).sum(3) / image.sum(3)).mean()[None]

    with record_attention(teacher, "denoiser.blocks.*.attn", reduce=reduce) as shares:
        velocities(teacher, test_batch(seed, min(16, s.test)))
    return torch.stack([torch.cat(of).mean() for of in shares.values()]).mean().cpu()


inside = {r: torch.stack([share_inside(seed, r) for seed in s.seeds]) for r in s.radii}
keys = {r: float(disk(SIDE, r).float().mean()) for r in s.radii}
run.record("locality", inside[4] / keys[4])

caught = []


def catch(q, k, v, *, mask=None):
    caught.append((q[:, :, :N].double(), k[:, :, :N].double()))
    return get_attention("full")(q, k, v, mask=mask)


with attention_processor(teacher, lambda name, _: catch, "denoiser.blocks.*.attn"):
    velocities(teacher, test_batch(900, 2))
near = disk(SIDE, 4).to(run.device)
ranks = {"full": [], "disk, r = 4": [], "linear": []}
for q, k in caught:
    logits = q @ k.transpose(2, 3) * HEAD**-0.5
    maps = (logits.softmax(3), logits.masked_fill(~near, -torch.inf).softmax(3), elu_weights(q, k))
    for name, weights in zip(ranks, maps, strict=True):
        ranks[name].append(torch.linalg.matrix_rank(weights, rtol=1e-6).flatten())
ranks = {name: torch.cat(of) for name, of in ranks.items()}
run.record("rank-disk", int(ranks["disk, r = 4"].min()))
run.record("rank-linear", int(ranks["linear"].max()))
print(
    {
        f"r = {r}": f"{float(inside[r].mean()):.0%} of the attention on {keys[r]:.0%} of the keys"
        for r in s.radii
    }
)
print(
    {name: f"rank {int(of.min())} to {int(of.max())} of {N}" for name, of in ranks.items()},
    "| head width",
    HEAD,
)

# %% [markdown]
# (sec-clear-experiment)=
# ## The experiment
#
# :::{table} The arms. In all of them text queries read everything by a softmax, unless said otherwise.
# :name: tab-clear-arms
#
# | arm | an image query reads | question |
# |---|---|---|
# | disk | the text, and the image keys within radius 4 | the method |
# | random | the text, itself, and as many image keys as its disk has, drawn once for each layer | neighbours? |
# | random, text too | itself, and as many keys as with the disk and the text together, drawn from both | text as a hub? |
# | linear | everything, by ELU + 1 | softmax? |
# | hub cut | as *disk*; but text queries read the text only | the hub's other half? |
# | radius 2, radius 3 | smaller disks, of 9 and of 25 keys | how small? |
# | radius 2, pooled | 9 keys, and 16 pooled ones | do pooled keys mend a small disk? |
# :::
#
# The random arms never change their draw during training, and each query keeps itself. The linear arm is made as strong as we can: only image queries are linear, and padding is not read. `rank` below puts the keys of a query in random order.


# %%
def elu(q, k, v, *, mask=None):
    """Linear attention of the image queries, softmax of the text queries."""
    fq, fk = F.elu(q[:, :, :N]) + 1, F.elu(k) + 1
    if mask is not None:
        fk = fk * mask.transpose(2, 3)
    image = (fq @ (fk.transpose(2, 3) @ v)) / (fq @ fk.sum(2)[..., None])
    return torch.cat([image, get_attention("full")(q[:, :, N:], k, v, mask=mask)], dim=2)


def rank(scores):
    """The place of each key in its row, by score; a query's own key comes first."""
    scores = scores.clone()
    scores.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    return scores.argsort(-1, descending=True).argsort(-1)


def random_keys(radius, generator):
    return masked(rank(torch.rand(N, N, generator=generator)) < disk(SIDE, radius).sum(1, keepdim=True))


def random_all(radius, generator):
    """As many keys as disk and text, from both: the number depends on the length of the text."""
    scores = torch.rand(N, N + LENGTH, generator=generator)

    def attend(q, k, v, *, mask):
        readable = mask[:, 0].expand(len(q), N, -1)
        place = rank(scores.to(q.device).expand(len(q), -1, -1).masked_fill(~readable, -1.0))
        budget = disk(SIDE, radius).sum(1, keepdim=True).to(q.device) + mask[:, 0, :, N:].sum(2, keepdim=True)
        seen = torch.cat([place < budget, mask[:, 0].expand(-1, q.shape[2] - N, -1)], dim=1)[:, None]
        return get_attention("full")(q, k, v, mask=seen)

    return attend


class Arm(NamedTuple):
    kind: str = "disk"
    radius: int = 4
    lr: float = 1e-3


ARMS = {
    "disk": Arm(),
    "random": Arm("random", lr=3e-3),
    "random, text too": Arm("random, text too", lr=3e-3),
    "linear": Arm("linear", lr=6e-3),
    "hub cut": Arm("hub cut"),
    "radius 2": Arm(radius=2),
    "radius 2, pooled": Arm("pooled", 2),
    "radius 3": Arm(radius=3),
}


def student(arm, seed):
    generator = torch.Generator().manual_seed(4000 + seed)
    made = {
        "disk": lambda i: local(arm.radius),
        "random": lambda i: random_keys(arm.radius, generator),
        "random, text too": lambda i: random_all(arm.radius, generator),
        "linear": lambda i: elu,
        "hub cut": lambda i: masked(disk(SIDE, arm.radius), hub=False),
        "pooled": lambda i: PooledLocalAttention(grid=GRID, radius=float(arm.radius), pool=4),
    }
    return everywhere(made[arm.kind])


# %% [markdown]
# First without any training, with all radii.


# %%
def untrained(arm, seed):
    return prediction_errors(None, student(arm, seed), teacher, test_batch(seed))["teacher"]


SWEEP = {f"{kind} {r}": Arm(kind, r) for r in s.radii for kind in ("disk", "random")}
swept = {name: torch.tensor(of) for name, of in run_arms(untrained, SWEEP, s.seeds, s.jobs).items()}

# %% [markdown]
# Then with a short distillation, as in the paper and its code. Only the image stream's projections learn: queries, keys, values and output. All else is frozen. With $u$ the student's velocity, $\hat u$ the teacher's, and $a_b, \hat a_b$ the image's output of attention in block $b$,
#
# $$
# \mathcal L = \lVert u - (\epsilon - x_0) \rVert^2 + \tfrac12 \lVert u - \hat u \rVert^2 + \tfrac12 \operatorname{mean}_{b \in B} \lVert a_b - \hat a_b \rVert^2 .
# $$ (eq-clear-loss)
#
# The released code compares every fourth of FLUX's single-stream blocks. Our model has double-stream blocks only; we take every second one. Each kind of arm has the learning rate that did best in short trials with other seeds (disks 0.0005, 0.001, 0.003; random keys 0.001, 0.003; linear 0.001, 0.003, 0.006), so none is held back by the method's rate. For the linear arm it is the largest one tried. The same trials came before the thresholds of *hub* and of the two speeds were set; most others are those of a plan made before any run.

# %%
LAYERS = [f"denoiser.blocks.{i}.attn" for i in range(1, len(net.blocks), 2)]
TRAINED = r"denoiser\.blocks\.\d+\.attn\.(qkv|proj)\.|attn\.processor\.weight"
DRAWN = ("disk", "random", "linear")


def asked(seed):
    """Captions of a seed, from the split that nobody trained on."""
    return shapes.sample_scenes(
        s.images, torch.Generator().manual_seed(5000 + seed), objects=(1, 3), split="test"
    )


def draw(model, seed, steps=s.solver_steps):
    tokens = shapes.tokens(asked(seed)).to(run.device)
    return draw_scenes(model, tokens, flow_scheduler(), size=SIDE * p, steps=steps, seed=seed).cpu()


def distil(named, seed):
    """Errors before and after, the frozen tensors that changed, and pictures."""
    name, arm = named
    model, out = student(arm, seed), {}
    out["before"] = prediction_errors(None, model, teacher, test_batch(seed))["teacher"]
    if name in DRAWN and seed == s.seeds[0]:
        out["drawn before"] = draw(model, seed)
    learning = set(train_only(model, TRAINED))
    loss = StudentLoss(None, teacher, data=1.0, noise=0.5, features=0.5, layers=LAYERS)
    config = FitConfig(steps=s.steps, batch_size=s.batch, lr=arm.lr, warmup=10, ema_decay=0.97, seed=seed)
    model = fit(model, loss, teacher_batches(scenes, uniform_timesteps()), config).ema
    out["after"] = prediction_errors(None, model, teacher, test_batch(seed))["teacher"]
    given = teacher.state_dict()
    out["moved"] = sum(
        key not in learning and not torch.equal(x, given[key]) for key, x in model.state_dict().items()
    )
    if name in DRAWN:
        out["drawn"] = draw(model, seed)
    return out


results = run_arms(distil, {name: (name, arm) for name, arm in ARMS.items()}, s.seeds, s.jobs)
references = {"teacher": s.solver_steps, "fewer steps": rival_here}
drawn = run_arms(lambda steps, seed: draw(teacher, seed, steps), references, s.seeds, s.jobs)
drawn |= {name: [of["drawn"] for of in results[name]] for name in DRAWN}

before, after = (
    {name: torch.tensor([x[when] for x in of]) for name, of in results.items()}
    for when in ("before", "after")
)
run.record("frozen", sum(x["moved"] for of in results.values() for x in of))
print(f"{'relative error of velocity':28s} {'before':>8s} {'after':>8s}")
for name in ARMS:
    print(f"{name:28s} {float(before[name].mean()):8.4f} {float(after[name].mean()):8.4f}")

# %% [markdown]
# ## Results
#
# The measure is the squared error of the student's velocity against the teacher's, over the squared norm of the teacher's.

# %%
run.record("zero-random", before["disk"] / before["random"])
run.record("zero-random-all", before["disk"] / before["random, text too"])
run.record("zero-linear", before["disk"] / before["linear"])
run.record("kd-random", after["disk"] / after["random"])
run.record("kd-random-all", after["disk"] / after["random, text too"])
run.record("kd-linear", after["disk"] / after["linear"])
run.record("kd-helps", after["disk"] / before["disk"])
run.record("hub", after["hub cut"] / after["disk"])
run.record("pooled", after["radius 2, pooled"] / after["radius 2"])
run.record("pooled-keys", after["radius 2, pooled"] / after["radius 3"])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, logarithmic error: relative error of velocity without training, against the share of image keys. Both lines fall; that of disks lies far below that of random keys at every share. Right: dots for eight arms, hollow before and filled after distillation. Disk lies far to the left of random, of random with text and of linear, before and after. Hub cut and the smaller disks lie between."}, "figure": {"caption": "Error of the velocity against the teacher's. Left: without training, radius 2 to 8. Right: the arms before (hollow) and after distillation (filled). Bars and bands: 90 % intervals over seeds.", "name": "fig-clear-errors"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained", width_ratios=(1, 1.25))
for kind, colour in (("disk", PALETTE[0]), ("random", PALETTE[1])):
    values = torch.stack([swept[f"{kind} {r}"] for r in s.radii], dim=1)
    curve(
        axes[0], [keys[r] for r in s.radii], values, f"{kind}{' keys' if kind == 'random' else 's'}", colour
    )
axes[0].set(
    yscale="log", xlabel="share of image keys read", ylabel="relative error of velocity", xlim=(0, None)
)
axes[0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
axes[0].set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
axes[0].yaxis.set_minor_locator(NullLocator())
axes[0].legend(fontsize=9)
for at, name in enumerate(ARMS):
    colour = PALETTE[0] if name == "disk" else "0.35"
    for values, fill in ((before[name], "white"), (after[name], colour)):
        mean, low, high = (float(x) for x in mean_interval(values))
        axes[1].errorbar(mean, at, xerr=[[mean - max(low, 1e-5)], [high - mean]], fmt="o", ms=6, mfc=fill, color=colour, capsize=2)  # fmt: skip
axes[1].set_yticks(range(len(ARMS)), list(ARMS))
axes[1].set(xscale="log", ylim=(len(ARMS) - 0.5, -0.5), xlabel="relative error of velocity")
plt.show()

# %% [markdown]
# ### Pictures
#
# A velocity is a means. {numref}`fig-clear-samples` shows what is drawn, from the same noise, with guidance 3. The oracle, a network that reads scenes, says how many objects have the right shape, colour, size and place. And here is the trivial rival at this size: the teacher itself, with as many steps as cost the same.

# %%
oracle = zoo.load("oracle_shapes32").to(run.device)


def objects_right(seed, x):
    return scene_scores(read_in_batches(oracle, x.to(run.device)).cpu(), asked(seed))["object"].nanmean()


def distance(name):
    """Mean squared distance to the teacher's pictures with all steps: one number a seed."""
    return torch.stack([(x - y).square().mean() for x, y in zip(drawn[name], drawn["teacher"], strict=True)])


right = {
    name: torch.stack([objects_right(seed, x) for seed, x in zip(s.seeds, of, strict=True)])
    for name, of in drawn.items()
}
run.record("accuracy", right["disk"] - right["teacher"])
run.record("fewer-steps", distance("disk") / distance("fewer steps"))
for name in drawn:
    print(
        f"{name:12s} objects right {float(right[name].mean()):6.1%}   squared distance to the teacher's {float(distance(name).mean()):.6f}"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of eight small pictures of coloured shapes on a dark ground. Teacher and teacher with fewer steps look the same. Disks before distillation show the same scenes with frayed edges and slight grain; after it they look like the teacher's, but for a few ragged pixels. Random keys: coarse blobs in place before, shapes with ragged edges after. Linear attention: an empty ground before, scattered specks of colour after."}, "figure": {"caption": "The first captions of the first seed, not chosen, from the same noise. Before: attention exchanged, nothing trained. After: distilled.", "name": "fig-clear-samples"}}
first = results["disk"][0], results["random"][0], results["linear"][0]
rows = {"teacher": drawn["teacher"][0], f"{rival_here} steps": drawn["fewer steps"][0]}
for name in DRAWN:
    rows |= {f"{name}, before": results[name][0]["drawn before"], f"{name}, after": results[name][0]["drawn"]}
columns = min(8, s.images)
fig, ax = plt.subplots(figsize=(6.4, 5.7), layout="constrained")
show_images(torch.cat([x[:columns] for x in rows.values()]), columns, ax=ax, row_labels=list(rows))
plt.show()

# %% [markdown]
# ### Seconds
#
# We time attention alone, forward, with the heads of this model, one picture and 18 text tokens: full attention by PyTorch's fused kernel, and disks by tiles with halos. Both in turns, on one core (in the profile `gpu`: on the GPU).


# %%
def timed(side):
    """Seconds a call: full attention, disks of radius 4 and of radius 8."""
    shape = (1, net.config["num_heads"], side * side + LENGTH, HEAD)
    q, k, v = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(run.device) for i in range(3)
    )
    variants = [get_attention("full")] + [
        get_attention("local", grid=(side, side), radius=float(r)) for r in (4, 8)
    ]

    def call(attend):
        out = attend(q, k, v)
        return out.sum().item() if out.is_cuda else out

    with torch.no_grad():
        return times([lambda attend=attend: call(attend) for attend in variants], repeats=5, min_seconds=0.03)


seconds = torch.tensor([[timed(side) for side in s.sides] for _ in s.seeds])  # (repetitions, sides, variants)
gain = seconds[:, :, :1] / seconds[:, :, 1:]
at = {side: i for i, side in enumerate(s.sides)}
run.record("speed-1024", gain[:, at[32], 0])
if 64 in at:
    run.record("speed-4096", gain[:, at[64], 1])
for side in s.sides:
    y, x = choose_tiling((side, side), reach_of(4.0), LENGTH)
    window = y.count * x.count * y.tile * x.tile * (y.window * x.window + LENGTH)
    print(
        f"{side * side:6,d} tokens: full {1e3 * seconds[:, at[side], 0].mean():7.2f} ms, r = 4 {gain[:, at[side], 0].mean():.2f}x faster, "
        f"r = 8 {gain[:, at[side], 1].mean():.2f}x; tiles of {y.tile} x {x.tile}, {window / pairs(side, LENGTH, 4):.1f} times the pairs of the disks"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Speed of disks over full attention against image tokens, both axes logarithmic. Two lines, radius 4 and radius 8, start together below 1 at 256 tokens. At 4,096 tokens radius 4 is above 8 and radius 8 above 4. A dashed line marks 1."}, "figure": {"caption": "Attention alone, time of full attention over that of disks. Bands: 90 % intervals over repetitions. Dashed: no gain.", "name": "fig-clear-speed"}}
fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
tokens = [side * side for side in s.sides]
for i, (radius, colour) in enumerate(((4, PALETTE[0]), (8, PALETTE[5]))):
    curve(ax, tokens, gain[:, :, i], f"radius {radius}", colour)
ax.axhline(1, color="k", ls="--", lw=1)
ax.set(xscale="log", yscale="log", xlabel="image tokens", ylabel="times faster than full attention")
ax.set_xticks(tokens, [f"{n:,}" for n in tokens])
ax.xaxis.set_minor_locator(NullLocator())
ax.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
ax.yaxis.set_minor_locator(NullLocator())
ax.set_ylim(min(0.5, 0.9 * float(gain.min())), max(4, 1.2 * float(gain.max())))
ax.legend(loc="upper left")
plt.show()

# %%
run.report()

# %% [markdown]
# **What the table says, in words.** The exact claims hold. Tiles with halos compute what the mask says, a wide radius gives the teacher back, and nothing but the image stream's projections was trained. The paper's count is right too: at 8,192 pixels half a percent of the pairs is left. For $r = 16$ this is true of the image's queries; text queries read everything, and with them it is $0.68\,\%$ of all pairs.
#
# **Neighbours matter.** The teacher's attention is local (*locality*): a disk with $14\,\%$ of the keys gets about $39\,\%$ of the attention. So most of it still goes elsewhere, and yet the disk is enough for an error of some two percent without any training. As many random keys make an error about nine times as large (*zero-random*). Distillation takes away nine tenths of what the disks lost (*kd-helps*). It helps the random keys even more, but they stay five times as far
# from the teacher (*kd-random*).
#
# **The text matters.** Before training it seems not to. Keys drawn from image and text together do better than random image keys with all the text, since they have more of the image. After training it is the other way round, clearly: compare *kd-random-all* with *kd-random*. A likely reason: a query that never sees the word *red* cannot learn it, while patches of the image can be made up for by their neighbours. The other half of the hub matters as well (*hub*): if text queries may not read the image, the error is about three times as large, the same as that of a disk of
# radius 2. This does not prove that what they gather is *global*. Text queries that lose all image keys also get another mixture than they were trained for, and the text stream's weights are frozen.
#
# **The softmax matters most.** Linear attention with the teacher's weights has an error of one half (*zero-linear*), and after equal training it is still more than forty times that of the disks (*kd-linear*). Its pictures are empty before and specks of colour after ({numref}`fig-clear-samples`). This says that it cannot be had in sixty steps. It does not say that linear attention cannot draw: {doc}`/notebooks/03-attention/lit` and {doc}`/notebooks/03-attention/linfusion` do more for it. The ranks are as the paper says. But a softmax over random keys is not bound to a head's width
# either, and it does badly. High rank is at most a condition, not the reason.
#
# **Pooled keys** mend a disk of radius 2 (*pooled*: about a quarter less error). But sixteen more *neighbours* do better. *Pooled-keys* is contradicted: radius 3, which has at most as many keys, is clearly nearer to the teacher. One reason is at hand: our picture is small, and radius 3 is a larger part of it than radius 8 is of theirs. The repeated patterns, for which the authors pool, need larger pictures; we did not see them.
#
# **The pictures** of the student have all objects right, as the teacher's (*accuracy*). The test is at its ceiling, and sees gross damage only: random keys get nearly all objects right as well, with ragged edges. The student has small flaws at edges too.
#
# **And the rival?** *Fewer-steps* is contradicted by a factor of more than two hundred. Disks save about a quarter of the operations here, so the teacher may take 16 steps instead of 20. Its path is nearly straight, and the pictures hardly change. The student has an error of its own at every step, and no number of steps takes it away. Two things should be said for the method. Both of the teacher's runs use Euler's method and share part of its error. And this is the wrong place to look for a saving: with 256 tokens most of the work is in the projections. {numref}`fig-clear-cost` has the
# right place. With 10,000 tokens half of the steps cost as much; at 262,144 only two are left (*rival-8k*), and two steps draw nothing. The method is one for large pictures.
#
# **In seconds** it is the same story ({numref}`fig-clear-speed`). At 256 tokens the disks are *slower*: one tile covers the grid, so all pairs are computed and masked. At 1,024 tokens radius 4 is clearly faster and radius 8 hardly; at 4,096 both are several times faster (*speed-1024*, *speed-4096*). The windows of the tiles are squares and overlap, and hold nearly three times the pairs of the disks of radius 4. Full attention should cost those pairs at full speed, so seconds lag behind the count: at 4,096 tokens the count alone would give a factor of about fifty.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Photographs.** Scenes of a few flat shapes have little that is far apart and depends on each other.
# - **Size.** With 256 tokens and radius 4 a disk holds 45 of 256 image tokens, and six layers carry information over the whole grid. At the paper's sizes a disk is a far smaller part of the picture. Whether distant objects still agree there was not tested.
# - **Other networks.** There is one teacher. The intervals cover training batches, random keys, captions and noise.
# - **Long training.** Sixty steps with eight pictures stand for 10,000 iterations. What the rivals would reach in a long training was not tried.
# - **Guidance-distilled teachers.** FLUX-dev has its guidance built in; our teacher is guided while sampling, and the student learns its plain velocities.
# - **Speed of a whole model.** Only attention was timed, without padding in the text, on one core. The paper's 6.3 times at 8,192 pixels is a whole model on a GPU.
# - **Left untried:** FID and CLIP score on photographs, the transfer to sibling models and plugins, and inference on several GPUs; exercise 2 shows why disks make that easy.
# :::
#
# ## Exercises
#
# **1.** A disk of radius 4 reaches three tokens far. How many layers does it take until a corner of the picture can know of the opposite one, through image tokens alone, and how many through the text? Check with the masks.


# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# NBVAL_CHECK_OUTPUT
def layers_needed(reads):
    """Layers until token 0 has read, through others, the last image token. reads (m, m): query, key."""
    known, layers = reads.clone(), 1
    while not known[0, N - 1]:
        known, layers = (known.float() @ reads.float()) > 0, layers + 1
    return layers


cut = sees(disk(SIDE, 4))
cut[N:, :N] = False
print("through image tokens:", layers_needed(cut), "| through the text:", layers_needed(sees(disk(SIDE, 4))))
# Two layers are enough with the hub: text reads all, then all read text. Without it, all six layers of this model are needed.

# %% [markdown]
# **2.** Two machines share one picture: each has half of the rows. How many rows of keys and values does a machine need from the other in each layer, and is the result the same? Compute the upper half alone.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# NBVAL_CHECK_OUTPUT
generator = torch.Generator().manual_seed(1)
q, k, v = (torch.randn(1, 2, N + LENGTH, 8, generator=generator) for _ in range(3))
whole = local(4)(q, k, v)
halo, half = reach_of(4.0), SIDE // 2
own = (half + halo) * SIDE  # image tokens of the upper half and of the halo
upper = [torch.cat([x[:, :, :own], x[:, :, N:]], dim=2) for x in (q, k, v)]
part = get_attention("local", grid=(half + halo, SIDE), radius=4.0)(*upper)
error = float((part[:, :, : half * SIDE] - whole[:, :, : half * SIDE]).abs().max())
print(f"rows exchanged: {halo} of {half}; upper half the same:", "PASS" if error < 1e-5 else error)
# Full attention needs all of the other half. At 8,192 pixels and radius 8 the halo is 7 rows of 256. The text queries read all of
# the image: their sums have to be exchanged too, which is little.

# %% [markdown]
# **3.** Pooled keys bring the square back. Which pooling factor, as a function of $n$, would keep the cost linear, and what would a pooled key then stand for?
#
# :::{dropdown} Solution 3: in words
# There are $n / d^2$ pooled keys for $n$ queries. The cost stays linear if $n / d^2$ is constant: $d \propto \sqrt n$, so each pooled key stands for a fixed *share* of the picture, and their number does not depend on the resolution. That is a thumbnail. With the released $d = 4$ the thumbnail grows with the picture. One could also let the number of learned weights stay at 16 by pooling in two stages.
# :::
#
# ## References
#
# The method: {cite:t}`clear`, with its code [Huage001/CLEAR](https://github.com/Huage001/CLEAR) (`attention_processor.py`, `distill.py`, `distill.sh` and the read-me were read). Linear attention: {cite:t}`katharopoulos2020transformers`. The backbone: {cite:t}`esser2024scaling`. The library's parts: [minilib/attention/local.py](https://github.com/minilib-book/minilib/blob/main/minilib/attention/local.py),
# [minilib/attention/pooled.py](https://github.com/minilib-book/minilib/blob/main/minilib/attention/pooled.py), [minilib/students.py](https://github.com/minilib-book/minilib/blob/main/minilib/students.py). The same exchange with linear attention is the subject of {doc}`/notebooks/03-attention/lit`.
