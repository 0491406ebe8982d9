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
# # The DiT block, from nothing
#
# A diffusion transformer (DiT) cuts an image into patches, treats each patch as a token, and lets time and label turn the knobs of every block {cite:p}`peebles2023scalable`. We build one, check it
# against the library down to rounding, and watch it learn to write.

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
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minilib import plotting, zoo
from minilib.arms import run_arms
from minilib.data import load
from minilib.guidance import conditional
from minilib.losses import class_batches, flow_matching_loss
from minilib.metrics import class_accuracy
from minilib.models import DIT_CONFIGS, DiT
from minilib.profiling import count_flops, count_parameters
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample_final
from minilib.schedulers import FlowMatchEulerDiscreteScheduler
from minilib.schedulers.densities import LogitNormal
from minilib.training import FitConfig, fit


@dataclass(frozen=True)
class Settings:
    """``early``: steps of the ablation arms. ``snapshots``: steps at which the full arm is sampled."""

    seeds: tuple[int, ...]
    steps: int
    early: int
    snapshots: tuple[int, ...]
    every: int
    samples: int
    width: int = 64
    depth: int = 3
    lr: float = 2e-3
    sampling_steps: int = 25


run = Reproduction(
    "dit-block",
    profile,
    {
        "smoke": Settings((0,), 40, 20, (0, 20, 40), 20, 20),
        "cpu": Settings((0, 1, 2), 1800, 500, (0, 200, 400, 600, 800, 1200, 1800), 100, 200),
        "gpu": Settings(
            (0, 1, 2, 3, 4), 6000, 1500, (0, 200, 400, 800, 1500, 3000, 6000), 100, 300, 128, 12, 1e-3
        ),
    },
)
s, device = run.settings, run.device
plotting.use_style()
run.show_card()

# %%
run.show_settings()

# %% [markdown]
# (sec-dit-block-idea)=
# ## The idea
#
# A denoiser takes a noisy image $x_t$, a time $t$ and a label $y$, and returns an array of the image's shape. It must do two things. It must let distant pixels talk to each other. And it must behave differently
# at different times: at high noise it decides what is in the picture, at low noise it mends edges.
#
# A transformer does the first with attention. DiT does the second with **adaptive layer norm** (adaLN). Time and label are added up to one vector $c$. In each block, a linear layer turns
# $\operatorname{SiLU}(c)$ into six vectors of the
# tokens' width $d$ (SiLU, the sigmoid linear unit $z / (1 + e^{-z})$, is a smooth ramp): shift $\beta_1$, scale $\gamma_1$ and gate $\alpha_1$ for attention, and $\beta_2, \gamma_2, \alpha_2$ for the
# feed-forward network (MLP, multi-layer perceptron). With $h$ for the tokens, a block is
#
# $$
# \begin{aligned}
# h &\leftarrow h + \alpha_1 \odot \operatorname{Attention}\big((1 + \gamma_1) \odot \operatorname{LN}(h) + \beta_1\big), \\
# h &\leftarrow h + \alpha_2 \odot \operatorname{MLP}\big((1 + \gamma_2) \odot \operatorname{LN}(h) + \beta_2\big).
# \end{aligned}
# $$ (eq-dit-block-block)
#
# LN (layer norm) brings each token to mean 0 and variance 1, without parameters of its own. The product $\odot$ goes feature by feature, the same for all tokens.
#
# **Zero.** The linear layer that makes the six vectors starts at zero. Then both gates $\alpha$ are zero, and equation {eq}`eq-dit-block-block` says $h \leftarrow h$. Whatever their number, the blocks start as the
# identity, and they switch themselves on as the gates learn. That is *adaLN-Zero*. (The network as a whole starts by saying zero: its last layer starts at zero, too.)
#
# The paper cuts no pixels. An autoencoder first turns an image of $256 \times 256$ pixels into a *latent*, an array of $32 \times 32$ places and 4 channels {cite:p}`ldm`, and DiT works on
# that. Here the images are
# small enough to do without.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A column of boxes: layer norm, scale and shift, attention, gate, plus; then layer norm, scale and shift, MLP, gate, plus. On the left, time and label add up to a condition, from which a linear layer feeds the scale-and-shift boxes and the gates.", "width": "82%"}, "figure": {"caption": "One block. The tokens run upwards on the right. The condition $c$ acts only through the six vectors (orange), and these start at zero. In brackets the shapes: $b$ images, $n$ tokens, $d$ features.", "name": "fig-dit-block-diagram"}}
blue, orange, grey = plotting.PALETTE[0], plotting.PALETTE[1], "#444444"
stack = [
    "layer norm",
    "scale, shift",
    "attention",
    "gate",
    "+",
    "layer norm",
    "scale, shift",
    "MLP",
    "gate",
    "+",
]
vectors = {1: r"$\gamma_1, \beta_1$", 3: r"$\alpha_1$", 6: r"$\gamma_2, \beta_2$", 8: r"$\alpha_2$"}
fig, ax = plt.subplots(figsize=(6.4, 4.8))


def box(x, y, text, color):
    if text == "+":
        ax.plot(x, y, "o", ms=19, color=color)
    else:
        ax.add_patch(plt.Rectangle((x - 0.75, y - 0.36), 1.5, 0.72, fc=color, ec="none"))
    ax.text(x, y, text, ha="center", va="center", color="white")


def line(points, color):
    ax.plot(*zip(*points[:-1], strict=True), color=color, lw=1.2)
    ax.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0},
    )


for i, text in enumerate(stack):
    line([(4, i - 0.64), (4, i - 0.6), (4, i - 0.36)], grey)
    box(4, i, text, {"+": grey, "scale, shift": orange, "gate": orange}.get(text, blue))
    if i in vectors:
        line([(0.95, 4.5), (1.7, 4.5), (1.7, i), (3.25, i)], orange)
        ax.text(2.45, i + 0.12, vectors[i], ha="center", va="bottom", color=orange)
for start, end in ((-0.62, 4), (4.55, 9)):
    line([(4, start), (5.3, start), (5.3, end), (4.17, end)], grey)
ax.text(4, -1.05, "tokens $h$: (b, n, d)", ha="center", va="center")
box(0.2, 4.5, "SiLU, linear", orange)
line([(0.2, 3.2), (0.2, 3.3), (0.2, 4.17)], orange)
ax.text(-0.7, 2.9, "$c$ = time + label: (b, d)", ha="left", va="center")
ax.set(xlim=(-1.0, 5.5), ylim=(-1.4, 9.5))
ax.axis("off")
plt.show()

# %% [markdown]
# ## The method
#
# ### Patches
#
# Attention compares every token with every other one, so its cost grows with the square of their number. One token a pixel would be dear. DiT cuts the image into patches of $p \times p$ pixels and flattens each.
# For a digit of $8 \times 8$ pixels and $p = 2$ that makes 16 tokens of 4 numbers. At the far end, `unpatchify` puts patches back together.


# %%
# NBVAL_CHECK_OUTPUT
def patchify(x, p):
    return rearrange(x, "b c (i p) (j q) -> b (i j) (c p q)", p=p, q=p)


def unpatchify(tokens, p, grid):
    return rearrange(tokens, "b (i j) (p q c) -> b c (i p) (j q)", i=grid, j=grid, p=p, q=p)


train, test = load("digits", "train"), load("digits", "test")
images = test.x[:3]
tokens = patchify(images, 2)
print("images", tuple(images.shape), "-> tokens", tuple(tokens.shape))
print("and back:", "PASS" if torch.equal(unpatchify(tokens, 2, 4), images) else "FAIL")

# %% [markdown]
# :::{admonition} In the released code
# :class: tip
# The two ends of the official model flatten a patch in different orders: (channel, row, column) on the way in, since it is a strided convolution, and (row, column, channel) on the way out
# ([models.py](https://github.com/facebookresearch/DiT/blob/main/models.py)). Inside, the linear layers do not mind. Who converts weights has to know. With one channel the two orders are equal.
# :::
#
# ### Where: positions
#
# To attention, tokens are a set. It would not notice if the patches were shuffled. So each token is told where it is: a fixed vector is added to it, made of sines and cosines of its column and its row. Wave number $i$ of $m$
# has the frequency $10\,000^{-i/m}$: the first ones change from one patch to the next, the last ones hardly at all.


# %%
# NBVAL_CHECK_OUTPUT
def waves(place, dim):
    """(n,) -> the angles (n, dim / 2), from fast to slow."""
    i = torch.arange(dim // 2, dtype=place.dtype, device=place.device) / (dim // 2)
    return place[:, None] * torch.exp(-math.log(10_000) * i)


def positions(dim, grid):
    """(grid^2, dim): sines and cosines of the column, then of the row, in raster order."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [waves(place.flatten().double(), dim // 2) for place in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


print("positions", tuple(positions(s.width, 4).shape)[:1], "x width")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: a digit with a grid of 4 by 4 patches. Middle: a map of 4 by 4 cells, brightest at the sixth patch and darker with distance from it. Right: a 16 by 16 matrix, bright along the diagonal with weaker bands 4 cells apart.", "width": "95%"}, "figure": {"caption": "Left: a digit and its 16 patches. Middle: how similar the position of the patch marked on the left is to all others (cosine). Right: the same for every pair of patches. Near patches have similar positions, along rows and along columns. See where the colour bar starts: no pair is very unlike, since most waves hardly change over four patches.", "name": "fig-dit-block-positions"}}
place = F.normalize(positions(s.width, 4), dim=1)
similarity = place @ place.T
fig, axes = plt.subplots(1, 3, figsize=(6.8, 2.5), width_ratios=[1, 1, 1.25])
axes[0].imshow(test.x[4, 0], extent=(-0.5, 3.5, 3.5, -0.5))
axes[0].hlines([0.5, 1.5, 2.5], -0.5, 3.5, colors=plotting.PALETTE[1])
axes[0].vlines([0.5, 1.5, 2.5], -0.5, 3.5, colors=plotting.PALETTE[1])
axes[0].plot(1, 1, marker="s", ms=24, mfc="none", mec=plotting.PALETTE[4], mew=2.5)
axes[1].imshow(similarity[5].reshape(4, 4), vmin=similarity.min(), vmax=1, cmap="viridis")
picture = axes[2].imshow(similarity, vmin=similarity.min(), vmax=1, cmap="viridis")
fig.colorbar(picture, ax=axes[2], label="cosine similarity")
for ax, xlabel, ylabel in zip(
    axes, ("patch column", "patch column", "patch number"), ("patch row", "", "patch number"), strict=True
):
    ax.grid(False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
fig.tight_layout()
plt.show()


# %% [markdown]
# ### When and what: the condition
#
# Time becomes waves too, 128 cosines and 128 sines, so that a network of two layers can read it finely. The label picks a row of a table. The table has one row more than there are classes: the last one means *no label*
# ($\varnothing$). In training a tenth of the labels are replaced by it. Sampling with guidance will need it; {doc}`/notebooks/00-foundations/guidance-and-measurement` is about that. The two vectors are added.


# %%
class Time(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, d), nn.Linear(d, d)

    def forward(self, t):  # (b,) -> (b, d)
        angles = waves(t.float(), 256)
        return self.fc2(
            F.silu(self.fc1(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.fc1.weight.dtype)))
        )


# %% [markdown]
# ### The block
#
# This is equation {eq}`eq-dit-block-block`, line by line. `adaLN_modulation` is the layer whose six outputs steer it.


# %%
def modulate(h, shift, scale):
    return (1 + scale) * F.layer_norm(h, h.shape[-1:], eps=1e-6) + shift


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})
        self.adaLN_modulation = nn.Linear(d, 6 * d)

    def attention(self, h):
        q, k, v = rearrange(self.attn["qkv"](h), "b n (three m e) -> three b m n e", three=3, m=self.heads)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (b, heads, n, n)
        return self.attn["proj"](rearrange(weights @ v, "b m n e -> b n (m e)"))

    def feed_forward(self, h):
        return self.mlp["fc2"](F.gelu(self.mlp["fc1"](h), approximate="tanh"))

    def forward(self, h, c):  # h (b, n, d), c (b, d)
        six = self.adaLN_modulation(F.silu(c))[:, None]  # (b, 1, 6 d): the same for all tokens
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = six.chunk(6, dim=-1)
        h = h + gate_1 * self.attention(modulate(h, shift_1, scale_1))
        return h + gate_2 * self.feed_forward(modulate(h, shift_2, scale_2))


# %% [markdown]
# ### The final layer, and the whole
#
# One more modulated norm, then a linear layer from the width $d$ to the $p^2$ pixels of a patch. It starts at zero as well. The names of the parts are those of the library's DiT, so that its weights fit.
#
# The paper's network predicts the noise and, for every pixel, a variance, so its last layer has twice as many outputs. Flow matching, which trains ours, needs no variance: `learn_sigma=False` leaves that half out.


# %%
class FinalLayer(nn.Module):
    def __init__(self, d, out):
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(d, out), nn.Linear(d, 2 * d)

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.linear(modulate(h, shift, scale))


class HandmadeDiT(nn.Module):
    def __init__(self, size=8, p=2, d=64, depth=3, heads=4, classes=10):
        super().__init__()
        self.p, self.grid = p, size // p
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(p * p, d)})
        self.t_embedder, self.y_embedder = Time(d), nn.Embedding(classes + 1, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.final_layer = FinalLayer(d, p * p)
        self.register_buffer("where", positions(d, self.grid), persistent=False)

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y)
        h = self.x_embedder["proj"](patchify(x, self.p)) + self.where
        for block in self.blocks:
            h = block(h, c)
        return unpatchify(self.final_layer(h, c), self.p, self.grid)


# %% [markdown]
# Is it the same function as the library's? Give both the same random weights, all of them, also those that start at zero. Compare in double precision, so that rounding cannot hide a mistake.


# %%
# NBVAL_CHECK_OUTPUT
def library_dit(seed, width=s.width, depth=s.depth):
    torch.manual_seed(seed)
    return DiT(patch_size=2, hidden_size=width, depth=depth, num_heads=4, learn_sigma=False)


theirs, mine = library_dit(0, 64, 3).double(), HandmadeDiT().double()
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
mine.load_state_dict(theirs.state_dict())
x = torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64)
t, y = torch.tensor([0.0, 1.0, 250.5, 500.0, 999.0, 1000.0]), torch.tensor([0, 3, 9, 10, 5, 7])
with torch.no_grad():
    gap = (mine(x, t, y) - theirs(x, t, y)).abs().max().item()
    spread = theirs(x, t, y).std().item()
print(f"parameters: {count_parameters(mine)} by hand, {count_parameters(theirs)} in the library")
print("same function:", "PASS" if gap < 1e-5 < spread else f"FAIL, {gap}")
run.record("same-function", gap)

# %% [markdown]
# ### It starts as the identity
#
# A fresh model from the library, no training. We watch what goes into each block and what comes out.

# %%
# NBVAL_CHECK_OUTPUT
fresh, changes = library_dit(1), []
hooks = [
    block.register_forward_hook(lambda block, given, out: changes.append((out - given[0]).abs().max().item()))
    for block in fresh.blocks
]
with torch.no_grad():
    output = fresh(x.float(), t, y)
for hook in hooks:
    hook.remove()
print("largest change made by a block:", max(changes))
print("largest output:", output.abs().max().item())
run.record("identity-at-start", max(*changes, output.abs().max().item()))

# %% [markdown]
# A network that says "zero" is a fair start: the guess is dull, but no block has scrambled the tokens yet, and no signal has been blown up or lost on its way through the depth.
#
# ### The published sizes
#
# The library builds the models of the paper from the same block. On PyTorch's *meta* device tensors have shapes but no values, so XL/2 costs no memory. The name says size and patch: XL/2 has patches of
# $2 \times 2$ in a latent
# of $32 \times 32 \times 4$, so 256 tokens. The learned variance is counted here, as in the paper. The paper's *Gflops* are multiply-accumulates (MAC), each a product and a sum.

# %%
# NBVAL_CHECK_OUTPUT
published, wrong, macs = {"DiT-S/2": 33, "DiT-B/2": 130, "DiT-L/2": 458, "DiT-XL/2": 675}, [], {}
for name, millions in published.items():
    with torch.device("meta"):
        model = DiT(**DIT_CONFIGS[name])
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    parameters, macs[name] = count_parameters(model), count_flops(model, *inputs).macs / 1e9
    wrong.append(abs(round(parameters / 1e6) - millions))
    print(f"{name:9s} {parameters:11,d} parameters (paper: {millions} M)  {macs[name]:6.2f} GMAC an image")
run.record("published-sizes", max(wrong))
run.record("published-cost", macs["DiT-XL/2"])

# %% [markdown]
# In a block, attention has $4 d^2$ weights, the MLP $8 d^2$, and the modulation $6 d^2$: a third of all. Yet it adds almost no operations, since it acts once an image and not once a token.
#
# ## The experiment
#
# We train on 1,248 real digits, by flow matching: with $\sigma = t / 1000$ and $x_t = (1 - \sigma)\, x_0 + \sigma\, \epsilon$, the network learns the velocity $\epsilon - x_0$ (see
# {doc}`/conventions`). Times are drawn from a logit-normal density,
# which prefers the middle. We sample without guidance, from an exponential moving average (EMA) of the weights, with Euler's method. The paper trains with the diffusion loss; the block is the same.
#
# Five arms. All have the same blocks, the same number of operations, the same data order and noise. They differ in what the weights are at step 0, or in the positions:
#
# :::{table} The arms.
# :name: tab-dit-block-arms
#
# | arm | what differs |
# |---|---|
# | adaLN-Zero | nothing: the model above |
# | gates at one | the gates start at 1: an ordinary residual network, fully on |
# | random start | the weights of every block's modulation layer start at random, by Xavier's rule, like those of attention and MLP; its biases stay at zero |
# | learned positions | positions are parameters, started at random with standard deviation 0.02 |
# | no positions | positions are zero |
# :::
#
# The paper compares adaLN-Zero with *adaLN*, a block that has no gates at all. Our stand-in has gates that start at 1 and can be learned. So both arms cost the same, and they differ in one number only: where the gates start.
# The two kinds of positions differ in two things, in form and in size: sines and cosines are far larger than 0.02.
#
# No arm needs a change of the library. We build its model, then change that:


# %%
FULL, ONE, RANDOM = "adaLN-Zero", "gates at one", "random start"
LEARNED, NONE = "learned positions", "no positions"
ARMS = {name: name for name in (FULL, ONE, RANDOM, LEARNED, NONE)}


def build(arm, seed):
    model = library_dit(seed)
    torch.manual_seed(seed)
    for block in model.blocks:
        layer = block.adaLN_modulation
        if arm == ONE:
            with torch.no_grad():
                layer.bias.view(6, -1)[[2, 5]] = 1.0  # the third and the sixth of the six vectors
        if arm == RANDOM:
            nn.init.xavier_uniform_(layer.weight)
    if arm == LEARNED:
        start = 0.02 * torch.randn(model.pos_embed.shape)
        del model.pos_embed  # a buffer, which no optimiser touches
        model.pos_embed = nn.Parameter(start)
    if arm == NONE:
        model.pos_embed.zero_()
    return model


for arm in (FULL, ONE, RANDOM):
    with torch.no_grad():
        model = build(arm, 0)
        gates = (
            model.blocks[0].adaLN_modulation(F.silu(model.embed_condition(t, y))).view(6, 6, -1)[:, [2, 5]]
        )
    print(f"{arm:12s} mean size of the gates at step 0: {gates.abs().mean():.4f}")

# %% [markdown]
# Note the last line: with a random start, the gates are still close to zero, because the condition itself starts small. So this arm, too, starts *almost* as the identity. It differs from adaLN-Zero in this: a little of
# time and label reaches the blocks from the first step on, and no layer has to wait until a gate has opened.
#
# The full arm runs to the end. The others stop early, where the question is who learns faster. In the first 60 % of its steps the full arm has a constant learning rate, and so have the short arms: up to that point the
# recipes are equal. The held-out loss is that of the EMA, on the test digits, with the same noise and the same times, drawn
# uniformly, for every arm. (No choice was made on them: the settings were chosen on the validation digits.)

# %%
batches = class_batches(
    train.x, train.y, lambda n, g: 1000 * LogitNormal().sample(n, g), null_class=10, label_dropout=0.1
)
g, repeats = torch.Generator().manual_seed(1234), 4
held_out = {
    "x0": test.x.repeat(repeats, 1, 1, 1),
    "y": test.y.repeat(repeats),
    "noise": torch.randn(repeats * len(test), 1, 8, 8, generator=g),
    "t": 1000 * torch.rand(repeats * len(test), generator=g),
}
held_out = {key: value.to(device) for key, value in held_out.items()}
asked = torch.arange(10).repeat(s.samples // 10)


def write_digits(model, labels, seed):
    noise = initial_noise((len(labels), 1, 8, 8), torch.Generator().manual_seed(seed), device=device)
    x = sample_final(
        conditional(model, labels.to(device)),
        FlowMatchEulerDiscreteScheduler(),
        noise,
        num_inference_steps=s.sampling_steps,
    )
    return x.clamp(-1, 1).cpu()


def experiment(arm, seed):
    model, oracle = build(arm, seed).to(device), zoo.load("oracle_digits")
    log = {"loss": {}, "samples": {}, "label": {}, "null": {}}

    def look(step, ema, loss):
        with torch.no_grad():
            log["loss"][step] = float(flow_matching_loss(ema, held_out))
        if arm == FULL and step in s.snapshots:
            for name, labels in (("label", asked), ("null", torch.full_like(asked, 10))):
                x = write_digits(ema, labels, seed)
                log[name][step] = class_accuracy(oracle, x, asked)
                log["samples"].setdefault(step, x[:10])

    look(0, model, 0.0)
    config = FitConfig(
        steps=s.steps if arm == FULL else s.early,
        decay_fraction=0.4 if arm == FULL else 0.0,
        lr=s.lr,
        seed=seed,
    )
    fit(model, flow_matching_loss, batches, config, callback=look, callback_every=s.every, device=device)
    return log


results = run_arms(experiment, ARMS, s.seeds)

# %% [markdown]
# ## Results
#
# ### Noise becomes digits
#
# Every row of {numref}`fig-dit-block-through-training` starts from the *same* ten noise images, and asks for the same ten labels. Only the weights differ. In the first row the network says "zero"
# everywhere, so the sampler leaves the noise
# where it is. First the light gathers in the middle, where digits are, and the noise still shows through. Then strokes appear, and the labels begin to matter. In the end most images can be read as the digit asked for.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of ten small images. The top row is noise, rows below show the same noise sampled at later training steps: blobs, then strokes, then digits 0 to 9. The last row holds real digits.", "width": "85%"}, "figure": {"caption": "The same noise, sampled after more and more training steps (left). The last row shows held-out real digits. Above the columns: the digit asked for.", "name": "fig-dit-block-through-training"}}
shots = results[FULL][0]["samples"]
real = torch.stack([test.of_class(k)[0] for k in range(10)])
plotting.show_images(
    torch.cat([*shots.values(), real]),
    columns=10,
    row_labels=[f"{step:,} steps" for step in shots] + ["real"],
    column_labels=[str(k) for k in range(10)],
)
plt.show()

# %% [markdown]
# ### Does it obey the label, and what helps?
#
# The oracle, a classifier that the library ships, reads each sample. The control asks for no label: same weights, same noise, null class; it should stay at chance.
# In {numref}`fig-dit-block-arms` on the left, the last point of each curve is what the table below compares: the loss of an arm over that of adaLN-Zero, seed by seed, so that a ratio above 1 speaks for adaLN-Zero.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: held-out loss against training steps for five arms; the arm without positions stays far above the others; among these, which lie close together, random start is lowest. Right: share of samples read as the class asked for rises from a tenth to nearly one with the label, and stays at a tenth without."}, "figure": {"caption": "Left: held-out loss in the early part of training, from the first look after the start; the axis does not begin at zero. Right: the share of samples that the oracle reads as the class asked for; dashed: chance. Bands: 90 % intervals over seeds.", "name": "fig-dit-block-arms"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.3))
steps = [step for step in results[NONE][0]["loss"] if step > 0]
for name, color in zip(ARMS, plotting.PALETTE, strict=False):
    losses = torch.tensor([[one["loss"][step] for step in steps] for one in results[name]])
    plotting.curve(left, steps, losses, name, color)
left.set(xlabel="training steps", ylabel="held-out loss (mean squared error)")
left.legend(fontsize=9)
for name, label, color in (
    ("label", "label given", plotting.PALETTE[0]),
    ("null", "label dropped", plotting.PALETTE[1]),
):
    shares = torch.tensor([list(one[name].values()) for one in results[FULL]])
    plotting.curve(right, list(results[FULL][0][name]), shares, label, color)
right.axhline(0.1, color="#444444", ls="--", lw=1)
right.set(xlabel="training steps", ylabel="read as asked (share)", ylim=(0, 1.03))
right.legend(fontsize=9)
fig.tight_layout()
plt.show()


# %%
def early_ratio(arm):
    """Held-out loss of an arm over that of the full arm, at the end of the early part, seed by seed."""
    return [a["loss"][s.early] / b["loss"][s.early] for a, b in zip(results[arm], results[FULL], strict=True)]


last = s.snapshots[-1]
run.record("obeys-the-label", [one["label"][last] - one["null"][last] for one in results[FULL]])
run.record("zero-gates", early_ratio(ONE))
run.record("zero-start", early_ratio(RANDOM))
run.record("positions-needed", early_ratio(NONE))
run.record("fixed-positions", early_ratio(LEARNED))
for name in ARMS:
    print(
        f"{name:18s} loss after {s.early} steps:", *(f"{one['loss'][s.early]:.3f}" for one in results[name])
    )
run.report()

# %% [markdown]
# What the table says, in the run shown here:
#
# - *The label is obeyed* (`obeys-the-label`, confirmed). With the label dropped, the same weights and the same noise stay at chance.
# - *Gates at zero* (`zero-gates`) are confirmed against gates at one, but narrowly. The interval excludes no effect, yet it reaches below the threshold, and at the first looks the two curves lie on each other.
# - *The whole modulation layer at zero* (`zero-start`) is **contradicted**: the random start learns faster. Its mean is lower at every look, and at the last one the interval excludes no effect. The
#   most likely reason: until a layer of zeros has grown, time and label reach no
#   block, and in three blocks there is little to protect in return. We did not test this reason, and no other depth, learning rate or scale of the random start is tried in this run. Mind what is contradicted: the random
#   start has small gates as well, so the result is against *exactly* zero. It is not against starting near the identity, which is what the paper speaks of.
# - *Positions are needed* (`positions-needed`, confirmed). Without them the network sees a bag of patches. Its curve flattens out high above the others: more a limit than a delay.
# - *Fixed or learned positions* (`fixed-positions`) is **inconclusive**: the mean is below the threshold and the interval includes no effect. Learned positions are ahead at first and behind later. With sixteen places there
#   is little to learn, which is the most likely reason that it matters so little; more seeds or a larger grid are not tried in this run.
#
# ## What this does not show
#
# - The paper's evidence is FID (Fréchet inception distance) on ImageNet, at 28 blocks and 400,000 steps and more. Here are three blocks and some hundred steps. A gain or loss of a few per cent in the
#   early loss says nothing about the last point of FID.
#   The paper compares adaLN-Zero with adaLN at 28 blocks, where there is more to protect.
# - The arm with gates at one is our stand-in for the paper's adaLN: its gates can still learn to close, which a block without gates cannot. The released code contains adaLN-Zero alone.
# - Sizes and costs were counted, not trained. That FID falls with Gflops, the paper's main result, was not tried; nor were in-context and cross-attention conditioning.
# - That samples are read as asked says nothing about their variety, nor whether they copy training digits.
# - Each interval covers the seeds of one recipe, and they are few. Another learning rate might reorder arms that lie close together.
#
# ## Exercises
#
# **1.** How does the cost of XL depend on the patch size? Guess the ratio of costs for patches of 2, 4 and 8 before you run it. Which part of the cost does not shrink in proportion to the tokens?
#
# **2.** Set the positions to zero and shuffle the patches of an image. What happens to the output, and why does it explain the curve of the arm without positions?
#
# **3.** Everything starts at zero, yet it learns. Which parameters have a non-zero gradient in the very first step? And after one step, and after two?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# Four times fewer tokens make the cost about four times lower. Attention's own products shrink sixteenfold, but they
# are a small part at 256 tokens. What stays is the cost of the condition: the modulation layers act once an image.
for name in ("DiT-XL/2", "DiT-XL/4", "DiT-XL/8"):
    with torch.device("meta"):
        model = DiT(**DIT_CONFIGS[name])
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    modulation = (
        sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("adaLN_modulation")) / 1e9
    )
    total = count_flops(model, *inputs).macs / 1e9
    print(f"{name}: {total:6.2f} GMAC, of which modulation {modulation:.2f} ({modulation / total:.1%})")

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# The output is shuffled in the same way: the network is equivariant to permutations of the tokens. So it can learn which
# patches a digit has, but never where they go; its best answer for a patch is an average over places.
shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(0))
x_shuffled = unpatchify(patchify(x, 2)[:, shuffle], 2, 4)
for label, where in (("with positions", mine.where.clone()), ("without", torch.zeros_like(mine.where))):
    mine.where.copy_(where)
    with torch.no_grad():
        gap = patchify(mine(x_shuffled, t, y), 2) - patchify(mine(x, t, y), 2)[:, shuffle]
    print(f"{label:15s} largest difference {gap.abs().max().item():.1e}")

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 3", "code_prompt_hide": "Solution 3"}
# Step 1: only the last linear layer, since it multiplies everything before it by zero. Then its weights are no longer
# zero, and the gates get a gradient (and the patch embedding, through the open road of the residual). Then the gates are
# no longer zero, and everything behind them follows.
model = library_dit(0)
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, 4):
    batch = batches(torch.Generator().manual_seed(step), 64)
    optimiser.zero_grad()
    flow_matching_loss(model, batch).backward()
    alive = {n.split(".")[0] + ("." + ".".join(n.split(".")[2:-1]) if n.startswith("blocks") else "") for n, p in
             model.named_parameters() if p.grad.abs().max() > 0}  # fmt: skip
    print(f"step {step}:", ", ".join(sorted(alive)))
    optimiser.step()

# %% [markdown]
# ## References
#
# The block and its zero start: {cite:t}`peebles2023scalable`. Training on straight paths: {cite:t}`lipman2023flow`, {cite:t}`liu2023flow`. Code read:
# [facebookresearch/DiT](https://github.com/facebookresearch/DiT) (`models.py`). The library's version: [dit.py](https://github.com/minilib-book/minilib/blob/main/minilib/models/dit.py).
