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
# # Attention in one picture
#
# A layer of attention mixes tokens by a matrix. *Where* the matrix is zero says who sees whom; *how* it is made bounds its rank; *which* of its entries are really computed sets the cost. We put every
# mixing layer of the library on one grid and measure all three.

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
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import chain

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilib import bench, plotting, zoo
from minilib.attention import (
    attention_processor,
    attention_variants,
    full_attention,
    get_attention,
    make_attention_layer,
)
from minilib.costs import fit_exponent
from minilib.data import load
from minilib.kernels.scan import selective_scan
from minilib.recipes import ddpm_scheduler
from minilib.reproduction import Reproduction


@dataclass(frozen=True)
class Settings:
    """``counted``: sides of grids on which operations are counted. ``timed``: sides of grids that are timed."""

    seeds: tuple[int, ...]
    counted: tuple[int, ...]
    timed: tuple[int, ...]
    fitted: tuple[int, ...]
    repeats: int
    recorded: int
    images: int
    sample_seconds: float = 0.03


run = Reproduction(
    "attention-in-one-picture",
    profile,
    {
        "smoke": Settings((0,), (32,), (8, 16, 24), (8, 16, 24), 2, 1, 16, 0.001),
        "cpu": Settings(
            (0, 1, 2, 3, 4), (32, 64, 128), (8, 16, 24, 32, 40, 48, 56, 64), (32, 40, 48, 56, 64), 11, 3, 96
        ),
        "gpu": Settings(
            (0, 1, 2, 3, 4), (32, 64, 128), (8, 16, 24, 32, 40, 48, 56, 64), (32, 40, 48, 56, 64), 15, 8, 192
        ),
    },
)
s = run.settings
BLUE, ORANGE, GREEN, PINK, *_ = plotting.PALETTE
plotting.use_style()
run.show_card()

# %%
run.show_settings()

# %% [markdown]
# (sec-attention-in-one-picture-idea)=
# ## The idea
#
# An image has become $n$ tokens. Each token $i$ asks a question, its query $q_i$; each token $j$ offers a key $k_j$ and a value $v_j$, all vectors of width $d$. A layer of attention returns to each token a mixture of values:
#
# $$
# o_i = \sum_j A_{ij}\, v_j , \qquad \text{or, for all tokens at once,} \qquad O = A V .
# $$ (eq-attention-in-one-picture-mix)
#
# This happens several times side by side, once in each **head**, with queries, keys and values of its own. In full attention {cite:p}`vaswani2017attention` the matrix is
#
# $$
# A = \operatorname{softmax}\!\left( Q K^\top / \sqrt d \right) ,
# $$ (eq-attention-in-one-picture-softmax)
#
# where the rows of $Q$ and $K$ are the queries and keys, and softmax makes each row positive with sum 1. Every entry is made: $Q K^\top$ takes $2 n^2 d$ operations (a multiplication and an addition count as two), and $A V$ as many. Twice the side of an image, four times the tokens, sixteen times the work of mixing. All
# other layers on this page are ways around $n^2$. There are three ideas.
#
# :::{table} Four ways to fill the matrix. Costs are operations of a head, maps from tokens to queries, keys, values and outputs not counted; M is a number of proxies.
# :name: tab-attention-in-one-picture-families
#
# | idea | layers here | which entries of $A$ | cost |
# |---|---|---|---|
# | all pairs | full, naive | all | $4 n^2 d$ |
# | **chosen pairs** | window, local, spatial, temporal, causal | zero outside the choice | $4 d \times$ pairs, if the others are really left out |
# | **through a few** | proxy, latents | all, but what is far passes through $M$ tokens | about $4 d (n M + M^2)$ for proxies; latents also pay for the pairs inside each group |
# | **through a small state** | linear and its kin, ss2d | all, but everything passes through numbers whose count does not depend on $n$ | in proportion to $n$ |
# :::
#
# One word on each. **Full** and **naive** are the same function; *naive* writes the matrix out, *full* uses a fused kernel. **Window**: the grid is cut into windows, and a token sees those in its own {cite:p}`liu2021swin`. **Local**: it sees those in a disk around it; text tokens see all and are seen by all {cite:p}`clear`. **Spatial** and **temporal**: a video token sees its frame, or its place in all frames
# {cite:p}`arnab2021vivit`. **Causal**: it sees itself and what came before. **Proxy**: cells of the grid speak through their mean {cite:p}`pt-dit`. **Latents**: each group of tokens has a few learned tokens, and these talk to each other {cite:p}`fit`.
#
# **Linear** attention {cite:p}`katharopoulos2020transformers` replaces the softmax by a product of features. With a function $\phi \ge 0$ on queries and keys (here from $d$ numbers to $d$ numbers, such as ReLU or ELU + 1),
#
# $$
# A_{ij} = \frac{\phi(q_i) \cdot \phi(k_j)}{\sum_l \phi(q_i) \cdot \phi(k_l)} ,
# \qquad
# o_i \propto \phi(q_i)^\top \Big( \sum_j \phi(k_j)\, v_j^\top \Big) .
# $$ (eq-attention-in-one-picture-linear)
#
# The sum in brackets is a $d \times d$ matrix. It is the same for all queries, so it is made once and $A$ never is. LiT adds a convolution of the values {cite:p}`lit`, LinFusion a small network before $\phi$ {cite:p}`linfusion`. A **scan** walks over the grid along a path and carries a state from token to token; four paths
# let every token hear of every other (SS2D, {cite:t}`liu2024vmamba`; with paths that turn at the edge, {cite:t}`lamamba`).
#
# ## The method
#
# ### Who sees whom
#
# The library keeps all variants in one registry. Each entry says, by `sees`, which key can influence which query; no `sees` means that all can. A claim like this can be tested from outside. Feed tokens, look at the output of token $i$, and differentiate by token $j$. If $j$ cannot be seen, the derivative is not small. It is
# zero, to the last bit. If it can, the derivative is not zero.
#
# One trap: ReLU, the feature of LiT, is zero for half of all numbers, and so it can hide a dependence that is allowed. We give all layers positive inputs and positive weights (each output a weighted mean), so that nothing hides.

# %%
VARIANTS = attention_variants()
WIDTH, HEADS, GRID = 16, 2, (8, 8)


def sees(name, n, options):
    """(n, n), boolean: may token j influence token i?"""
    variant = VARIANTS[name]
    return torch.ones(n, n, dtype=torch.bool) if variant.sees is None else variant.sees(n, n, **options)


def positive_layer(name, seed, options):
    """The variant as a layer of tokens, in double precision, with weighted means for projections."""
    torch.manual_seed(seed)
    layer = make_attention_layer(name, WIDTH, HEADS, **options).double()
    for projection in (getattr(layer, "qkv", None), getattr(layer, "proj", None)):
        if projection is not None:
            weight = projection.weight.detach().abs()
            weight = weight / weight.sum(1, keepdim=True)
            if len(weight) == 3 * WIDTH:
                weight[: 2 * WIDTH] *= 4  # queries and keys, so that a softmax has preferences
            projection.weight = nn.Parameter(weight)
    return layer


def influence(mix, n, seed):
    """(n, n): how much the output of token i changes with token j, summed over features."""
    g = torch.Generator().manual_seed(seed)
    x, towards = (
        torch.rand(*shape, generator=g, dtype=torch.float64) + 0.5 for shape in ((n, WIDTH), (WIDTH, 1))
    )
    copies = (
        x.expand(n, n, WIDTH).clone().requires_grad_()
    )  # copy i is asked about token i: one backward pass for all
    (mix(copies).diagonal() * towards).sum().backward()
    return copies.grad.abs().sum(-1)


# name on the picture: (variant, tokens, options)
PICTURE = {
    "full": ("full", 64, {}),
    "naive": ("naive", 64, {}),
    "window": ("window", 64, {"grid": GRID, "window": 4}),
    "window, shifted": ("window", 64, {"grid": GRID, "window": 4, "shift": 2}),
    "local": ("local", 64, {"grid": GRID, "radius": 2.5}),
    "local, 4 text tokens": ("local", 68, {"grid": GRID, "radius": 2.5}),
    "spatial": ("spatial", 64, {"grid": GRID}),
    "temporal": ("temporal", 64, {"grid": GRID}),
    "causal": ("causal", 64, {}),
    "proxy": ("proxy", 64, {"grid": GRID, "cell": 2}),
    "latents": ("latents", 64, {"grid": GRID, "group": 4, "latents": 2}),
    "linear": ("linear", 64, {}),
    "linear_conv": ("linear_conv", 64, {"grid": GRID}),
    "linear_mlp": ("linear_mlp", 64, {}),
    "ss2d, scans alone": ("ss2d", 64, {"grid": GRID, "conv": 1}),
}
assert {name for name, *_ in PICTURE.values()} == set(VARIANTS), (
    "a variant of the registry is not in the picture"
)
visible = {label: sees(name, n, options) for label, (name, n, options) in PICTURE.items()}
measured = {
    label: torch.stack([influence(positive_layer(name, seed, options), n, seed) for seed in range(4)])
    for label, (name, n, options) in PICTURE.items()
}

# %%
# NBVAL_CHECK_OUTPUT
print(f"{'':20s} pairs seen   largest derivative of the others   seen, but derivative zero")
hidden = {label: measured[label][:, ~may].max().item() for label, may in visible.items() if not may.all()}
silent = {label: (measured[label][:, may] == 0).sum().item() for label, may in visible.items()}
for label, may in visible.items():
    print(f"{label:20s} {may.double().mean():10.1%} {hidden.get(label, '-'):>24} {silent[label]:27d}")
run.record("hidden-is-zero", max(hidden.values()))
run.record("visible-is-not", sum(silent.values()))

# %% [markdown]
# Here is the picture to remember. Each pair of panels is one layer. On the left is the matrix, as `sees` gives it: row $i$, column $j$. On the right is one row of it, folded back to the grid, and measured: how strongly the framed token hears each of the others.
#
# Look first at what the left panels cannot show. *Proxy*, *latents*, *linear* and *ss2d* see everything, just like *full*. The right panels tell them apart: full attention picks single tokens here and there; proxies hear a cell of four as one; latents hear their own group token by token and the others as a murmur; linear features hardly choose at all; the convolution favours a small square around the
# token; and scans hear all, places near on one of their four paths a little better. The weights are random and positive: the panels show wiring, not what a trained layer prefers.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Fifteen pairs of small panels. Full and naive: a filled matrix, and a grid speckled token by token. Window: blocks in the matrix, and a 4 by 4 square of the grid that has the framed token in its corner. Shifted: the square is centred on it. Local: a banded matrix, a small disk. With text: the same with a filled border of the matrix. Spatial: one row of the grid. Temporal: one column. Causal: a lower triangle, the grid filled up to the token. Proxy: filled, with cells of 2 by 2 in one shade each. Latents: filled, with the own 4 by 4 group darker. Linear and linear with a network: filled and even. Linear with convolution: a darker 5 by 5 square. Scans: filled, darkest along the token's row and near it, and paler far away."}, "figure": {"caption": "Who sees whom, for every variant of the registry on one grid of $8 \\times 8$ tokens. Left of each pair: the visibility matrix; the notch marks the row of the framed token. Right: that row on the grid, measured by derivatives on a logarithmic scale over two orders of magnitude; white is exactly zero. *ss2d* is shown without its $3 \\times 3$ convolution, which would drown the scans. For *spatial* and *temporal* the rows of the grid are frames. Text tokens are in the matrix only. Green and pink are the two kinds of *through a small state*; full, naive and causal attention are coloured as chosen pairs. Weights are random.", "name": "fig-attention-in-one-picture-who"}}
FAMILY = {
    "chosen pairs": (BLUE, ("full", "naive", "window", "local", "spatial", "temporal", "causal")),
    "through a few": (ORANGE, ("proxy", "latents")),
    "through features": (GREEN, ("linear", "linear_conv", "linear_mlp")),
    "along paths": (PINK, ("ss2d",)),
}
COLOUR = {name: colour for colour, names in FAMILY.values() for name in names}
asker = 3 * 8 + 4
fig = plt.figure(figsize=(7, 5.3))
cells = fig.add_gridspec(4, 11, width_ratios=[1, 1, 0.16] * 3 + [1, 1], hspace=0.5, wspace=0.12)
cells.update(left=0.02, right=0.98, top=0.95, bottom=0.02)
for place, (label, (name, _, _)) in enumerate(PICTURE.items()):
    row, column = divmod(place, 4)
    left, right = (fig.add_subplot(cells[row, 3 * column + side]) for side in (0, 1))
    fade = LinearSegmentedColormap.from_list(name, ["white", COLOUR[name]])
    left.imshow(visible[label], cmap=ListedColormap(["white", COLOUR[name]]), vmin=0, vmax=1)
    left.plot(-0.5, asker, ">", color="black", ms=4, clip_on=False)
    heard = measured[label][0, asker, :64].reshape(GRID)
    loud = (
        heard.flatten().sort().values[-2]
    )  # the loudest is mostly the token itself; it shall not set the scale
    shade = 0.2 + 0.8 * (1 + (heard / loud).log10() / 2).clamp(0, 1)
    right.imshow(torch.where(heard == 0, 0.0, shade), cmap=fade, vmin=0, vmax=1)
    right.add_patch(plt.Rectangle((3.5, 2.5), 1, 1, fill=False, ec="black", lw=1.4))
    left.set_title(label, fontsize=9, loc="left", pad=3)
    for ax in (left, right):
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set(visible=True, color="0.6", lw=0.6)
legend = fig.add_subplot(cells[3, 9:])
legend.axis("off")
legend.legend(
    handles=[plt.Rectangle((0, 0), 1, 1, color=colour, label=key) for key, (colour, _) in FAMILY.items()],
    loc="center left", fontsize=9, handlelength=1, borderpad=0,
)  # fmt: skip
plt.show()

# %% [markdown]
# ### Reach: how far news travels
#
# A block adds what its layer returns to what was there: $x \leftarrow x + \text{layer}(x)$. So a token also keeps what it knew. Let $S$ be the visibility matrix of a layer, and $I$ the identity. After one block a token has heard of those in its row of $I \lor S$ ("or"). After two, of everyone of whom those
# had heard. The rule is a product of matrices, with "and" for times and "or" for plus:
#
# $$
# R_k = (I \lor S_k)\, R_{k-1}, \qquad R_0 = I .
# $$ (eq-attention-in-one-picture-reach)
#
# $R_k$ is the $k$-th boolean power of $I \lor S$ when all layers are alike. It knows nothing of weights, so we test it against a real stack of $k$ blocks. Its derivatives should be zero exactly where $R_k$ is.


# %%
def arms(side):
    """name: (tokens, the layers that take turns)"""
    grid, n = (side, side), side * side
    window = {"grid": grid, "window": 4}
    return {
        "full": (n, [("full", {})]),
        "local, radius 1.5": (n, [("local", {"grid": grid, "radius": 1.5})]),
        "local, radius 2.5": (n, [("local", {"grid": grid, "radius": 2.5})]),
        "local, radius 2.5, one text token": (n + 1, [("local", {"grid": grid, "radius": 2.5})]),
        "window of 4": (n, [("window", window)]),
        "window of 4, shifted in turn": (n, [("window", window), ("window", window | {"shift": 2})]),
        "spatial, then temporal": (n, [("spatial", {"grid": grid}), ("temporal", {"grid": grid})]),
        "causal": (n, [("causal", {})]),
        "proxy, cells of 2": (n, [("proxy", {"grid": grid, "cell": 2})]),
        "latents": (n, [("latents", {"grid": grid, "group": 4, "latents": 1})]),
        "linear": (n, [("linear", {})]),
        "ss2d": (n, [("ss2d", {"grid": grid})]),
    }


def reach(n, layers):
    """Yield R_1, R_2, ... for layers that take turns."""
    matrices = [(torch.eye(n, dtype=torch.bool) | sees(name, n, options)).float() for name, options in layers]
    known, k = torch.eye(n), 0
    while True:
        known = (matrices[k % len(matrices)] @ known > 0).float()
        k += 1
        yield known > 0


def stack(layers, k, seed):
    """k blocks; each normalises (which keeps positive numbers positive), mixes and adds."""
    built = [positive_layer(name, seed + i, options) for i, (name, options) in enumerate((layers * k)[:k])]

    def blocks(x):
        for layer in built:
            x = x + layer(F.rms_norm(x, (WIDTH,)))
        return x

    return blocks


def blocks_until_all(n, layers):
    """How many blocks until every token has heard of every other; None if that never happens."""
    before = None
    for k, known in enumerate(reach(n, layers), start=1):
        if known.all():
            return k
        if k % len(layers) == 0:
            if before is not None and torch.equal(before, known):
                return None
            before = known


# %%
wrong, checked = 0, 0
for n, layers in arms(8).values():
    for k, known in enumerate(reach(n, layers), start=1):
        wrong += (known != (influence(stack(layers, k, 0), n, k) != 0)).sum().item()
        checked += known.numel()
        if known.all() or k == 8:
            break
print(f"{checked:,} entries of R_k compared with the derivatives of a stack, {wrong} differ")
run.record("reach", wrong)

# %% [markdown]
# With the rule tested, we can ask it about larger grids: how many blocks until every token has heard of every other?

# %%
# NBVAL_CHECK_OUTPUT
SIDES = (8, 16, 32)
print(f"{'blocks until all have heard of all':36s}" + "".join(f"{side:4d} x {side:<3d}" for side in SIDES))
for name in arms(8):
    needed = [blocks_until_all(*arms(side)[name]) for side in SIDES]
    print(f"{name:36s}" + "".join(f"{k or 'never':>8} " for k in needed))

# %% [markdown]
# - **Local** layers need blocks in proportion to the side, since news moves by about one radius a block. The depth of a network does not grow with its image: what suffices on a small grid does not on a large one.
# - **Windows** alone never connect. With a shift every other block they do, and again in proportion to the side.
# - **One text token** changes everything: it reads all and is read by all, so two blocks suffice on any grid. It is a hub. In CLEAR's models, every prompt brings hundreds of them.
# - **Spatial, then temporal** needs two blocks: first along the frame, then along time. Proxies, latents, features and scans need one.
# - **Causal** never connects: the first token hears of nobody else.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six maps of 16 by 16 tokens around one token, coloured by the block at which it first hears of the others. Local with radius 1.5: squares that grow by one token a block, up to ten. Local with radius 2.5: rounder rings twice as wide. With a text token: a small disk, then all at block two. Window: one square, the rest grey, never. Shifted windows: blocks of squares, growing. Spatial then temporal: one row, then all."}, "figure": {"caption": "When does the framed token first hear of each other one? Colour: number of blocks, on $16 \\times 16$ tokens. Grey: never.", "name": "fig-attention-in-one-picture-reach"}}
shown = {
    "local, radius 1.5": "local, radius 1.5",
    "local, radius 2.5": "local, radius 2.5",
    "local, radius 2.5, one text token": "the same + a text token",
    "window of 4": "window",
    "window of 4, shifted in turn": "window, shifted in turn",
    "spatial, then temporal": "spatial, then temporal",
}
y, x, steps = 5, 9, 11
fig, axes = plt.subplots(2, 3, figsize=(6.6, 4.3), layout="constrained")
colours = ListedColormap(plt.get_cmap("viridis_r")(torch.linspace(0, 1, steps - 1).numpy()))
colours.set_bad("0.85")
for ax, (name, title) in zip(axes.flat, shown.items(), strict=True):
    n, layers = arms(16)[name]
    first = torch.full((256,), math.nan)
    for k, known in zip(range(1, steps), reach(n, layers), strict=False):
        first[known[16 * y + x, :256] & first.isnan()] = k
    picture = ax.imshow(first.reshape(16, 16), cmap=colours, norm=BoundaryNorm(torch.arange(0.5, steps).tolist(), steps - 1))  # fmt: skip
    ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec=ORANGE, lw=2))
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
bar = fig.colorbar(picture, ax=axes, label="heard of after block", ticks=range(1, steps), shrink=0.8)
bar.minorticks_off()
plt.show()

# %% [markdown]
# Reach is a permission, not a volume. That a path exists says nothing about how much comes through; exercise 3 measures it.
#
# ### Cost on paper
#
# Each variant brings a formula for its operations. We check it against torch's own counter, at sizes of real models (16 heads of width 64), on the *meta* device, where tensors have shapes but no values. So nothing is computed, and no size is too large.


# %%
def at_size(side):
    """name: (variant, options) on a square grid; spatial and temporal see the tokens as 16 frames."""
    grid, n = (side, side), side * side
    return {
        "full": ("full", {}),
        "naive": ("naive", {}),
        "causal (as a mask)": ("causal", {}),
        "window of 8": ("window", {"grid": grid, "window": 8}),
        "local, radius 8": ("local", {"grid": grid, "radius": 8.0}),
        "spatial, 16 frames": ("spatial", {"grid": (16, n // 16)}),
        "temporal, 16 frames": ("temporal", {"grid": (16, n // 16)}),
        "proxy, cells of 4": ("proxy", {"grid": grid, "cell": 4}),
        "latents, 4 for 8 x 8": ("latents", {"grid": grid, "group": 8, "latents": 4}),
        "linear": ("linear", {}),
        "linear_conv": ("linear_conv", {"grid": grid}),
        "linear_mlp": ("linear_mlp", {}),
        "ss2d (whole layer)": ("ss2d", {"grid": grid}),
    }


def formula(name, n, options, heads=16, width=64):
    return VARIANTS[name].flops(1, heads, n, n, width, **options)


def counted(name, n, options, heads=16, width=64):
    with torch.device("meta"):
        mix = VARIANTS[name].build(heads, width, **options)
        inputs = [torch.zeros(1, heads, n, width)] * 3
        if VARIANTS[name].layer is not None:
            inputs = [torch.zeros(1, n, heads * width)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mix(*inputs)
    return counter.get_total_flops()


gaps = [
    abs(formula(name, side**2, options) - counted(name, side**2, options))
    for side in s.counted
    for name, options in at_size(side).values()
]
run.record("flops", max(gaps))
print(f"{len(gaps)} counts, largest difference to the formula: {max(gaps)} operations")

# %% tags=["hide-input"]
lines = [
    "| layer | 1,024 tokens | 4,096 | 16,384 | 16,384, whole layer |",
    "|---|---|---|---|---|",
]
for label in at_size(32):
    cells = []
    for side in (32, 64, 128):
        n, (name, options) = side * side, at_size(side)[label]
        mine, full = formula(name, n, options), formula("full", n, {})
        cells.append(f"{mine / full:.1%}")
    around = 8 * n * 1024**2  # q, k, v and output: four projections of width 1024
    layer = mine if VARIANTS[name].layer is not None else mine + around
    cells.append(f"{layer / (full + around):.1%}")
    lines.append("| " + " | ".join([label, *cells]) + " |")
display(
    Markdown(
        "Operations, as a share of those of full attention; 16 heads of width 64.\n\n" + "\n".join(lines)
    )
)

# %% [markdown]
# Read the table with three things in mind.
#
# - *A mask counts in full.* `causal` forbids half of the pairs, and computes them first. (Fused kernels on a GPU skip about half.)
# - *Pairs are not operations.* A disk of radius 8 has 193 tokens. But hardware works on rectangles. The library cuts the grid into tiles and gives each tile the rectangle of keys that its disks touch, so it computes more pairs than the disks hold.
# - *The mixing is not the layer.* Queries, keys, values and output are linear maps, and cost $8 n D^2$ with $D$ the width of all heads together, whatever the mixing. The last column counts them in: there full attention with its projections is the whole. (`ss2d`, `linear_mlp` and `latents` bring maps of their own; these are in all columns. That is why the first two stand above 100 % at the smallest size.) A layer that
#   saves 99 % of the mixing cannot save more than the mixing's share.
#
# Now CLEAR's figure: 99.5 % fewer attention computations for images of 8192 pixels. There are $512 \times 512$ image tokens and 512 text tokens. Each image token keeps its disk and the text. At the edges the disks are cut off, so we add up exactly: an offset $(\Delta y, \Delta x)$ fits $(512 - |\Delta y|)(512 - |\Delta x|)$ times.


# %%
# NBVAL_CHECK_OUTPUT
def disk_pairs(side, radius):
    """Pairs of tokens of a side x side grid at a distance below the radius."""
    steps = range(-math.ceil(radius) + 1, math.ceil(radius))
    inside = ((dy, dx) for dy in steps for dx in steps if dy * dy + dx * dx < radius * radius)
    return sum(max(side - abs(dy), 0) * max(side - abs(dx), 0) for dy, dx in inside)


for radius in (1.5, 2.5, 4.0):
    assert disk_pairs(8, radius) == sees("local", 64, {"grid": GRID, "radius": radius}).sum()
image, text = 512 * 512, 512
for radius in (8, 16, 32):
    kept = disk_pairs(512, radius) + image * text
    done = formula("local", image + text, {"grid": (512, 512), "radius": radius})
    share = kept / (image * (image + text))
    print(
        f"radius {radius:2d}: an image token keeps {share:.3%} of the pairs; "
        f"the library's tiles do {done / formula('full', image + text, {}):.2%} of the operations"
    )
    if radius == 16:
        run.record("clear-pairs", 100 * share)

# %% [markdown]
# So CLEAR's figure holds for pairs, at radius 16, and is a statement about 262,144 tokens; at the largest radius fewer pairs are saved. The second number on each line is what this library's tiles would compute, the text's own queries included (counted, not run). On small grids the same layer saves far less, as the table above shows.
#
# ## The experiment
#
# ### Cost on the clock
#
# Operations are a promise; a clock says whether it is kept. We time single layers on one core, four heads of width 32, in turns, and take the minimum of several measurements of CPU time. Three questions: With which power of $n$ does time grow? At which size does a layer become faster than full attention? And what does it save to forbid pairs by a
# *mask*, without leaving their work out?


# %%
def options_at(label, side):
    grid = (side, side)
    known = {
        "local": {"grid": grid, "radius": 4.0},
        "window": {"grid": grid, "window": 8},
        "proxy": {"grid": grid, "cell": 4},
        "ss2d": {"grid": grid},
    }
    return known.get(label, {})


def timed(label, side, seed, heads=4, width=32):
    """A call without arguments that runs the layer once."""
    n, options, g = side * side, options_at(label, side), torch.Generator().manual_seed(seed)
    if (
        label == "scan"
    ):  # what ss2d scans at this width: four paths of twice the channels, as it lays them out
        sizes = [(n, 1, 8 * heads * width)] * 2 + [(n, 1, 1)] * 2
        u, dt, b, c = (torch.rand(size, generator=g).movedim(0, -1) for size in sizes)
        return torch.no_grad()(partial(selective_scan, u, 0.1 * dt, -torch.ones(u.shape[1], 1), b, c))
    if label in ("ss2d", "projections"):  # from tokens to tokens
        torch.manual_seed(seed)
        x = torch.randn(1, n, heads * width, generator=g)
        layer = make_attention_layer(
            "full" if label == "projections" else label, heads * width, heads, **options
        )
        ends = lambda x: layer.proj(layer.qkv(x)[..., : heads * width])  # noqa: E731
        return torch.no_grad()(partial(ends if label == "projections" else layer, x))
    qkv = [torch.randn(1, heads, n, width, generator=g) for _ in range(3)]
    if label == "masked":
        return partial(full_attention, *qkv, mask=sees("local", n, options_at("local", side)))
    return partial(get_attention(label, **options), *qkv)


TIMED = ("full", "local", "window", "proxy", "linear", "scan", "ss2d", "projections")
# All seeds in turn, not one after the other: a busy spell of the machine must not fall on one seed alone.
calls = {(seed, label): [timed(label, side, seed) for side in s.timed] for seed in s.seeds for label in TIMED}
seconds = iter(bench.times(list(chain(*calls.values())), repeats=s.repeats, min_seconds=s.sample_seconds))
rows = {key: [next(seconds) for _ in s.timed] for key in calls}
clock = {label: [rows[seed, label] for seed in s.seeds] for label in TIMED}  # for each seed, seconds by size
masked_over_full, local_over_full = [], []
for seed in s.seeds:
    largest = s.timed[-1]
    for label, ratios in (("masked", masked_over_full), ("local", local_over_full)):
        pair = timed(label, largest, seed), timed("full", largest, seed)
        ratios.append(bench.ratio(*pair, repeats=s.repeats, min_seconds=s.sample_seconds).ratio)


def exponents(label):
    """The slope of log time over log tokens, seed by seed."""
    chosen = [s.timed.index(side) for side in s.fitted]
    return [
        fit_exponent([side**2 for side in s.fitted], [row[i] for i in chosen]).value for row in clock[label]
    ]


for label in ("full", "local", "linear", "scan", "ss2d"):
    run.record(f"exponent-{label}", exponents(label))
run.record("mask-saves-nothing", masked_over_full)
run.record("work-left-out", local_over_full)

# %% [markdown]
# ### Rank
#
# The **rank** of a matrix is the number of independent rows it has. For {eq}`eq-attention-in-one-picture-linear` it cannot be larger than $d$: up to its scale, row $i$ is a combination of $d$ fixed rows (one for each feature of the keys), with the $d$ numbers $\phi(q_i)$ as weights. With $M$ proxies it cannot be larger
# than $M$. Softmax knows no such bound: the exponential of a matrix of rank $d$, taken entry by entry, has full rank in general.
#
# What does a low rank forbid? Each token for itself ($A = I$) has rank $n$. So has a shift of the whole image by one token, around the edge. To look at *near* tokens, each at its own, takes a high rank. To look at *the same few* tokens from everywhere takes a low one. That is why LiT adds a convolution: its matrix is a band
# around the diagonal, of high rank.
#
# To read the matrix of any variant, feed the identity as values: if $v_j$ is one for token $j$ and zero for all others, the outputs are column $j$ of $A$. For queries and keys we use real ones: those of the zoo's `dit_digits` (a transformer with 64 tokens, 8 blocks, 4 heads of width 24) at work on noisy digits of the test
# split, recorded by the library's hooks.


# %%
def noisy_digits(seed, count):
    """Noisy test digits at times from clean to noise, with times and labels."""
    digits, g = load("digits", "test"), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(digits.x), generator=g)[:count]
    x, t = digits.x[chosen], torch.linspace(50, 950, count).long()
    noise = torch.randn(x.shape, generator=g)
    return ddpm_scheduler().add_noise(x, noise, t), t, digits.y[chosen]


def recorded(model, x, t, y):
    """For each layer by name its queries and keys, (b, h, n, d), as attention gets them."""
    seen = {}

    def watch(name, layer):
        inner = layer.processor

        def keep(q, k, v, *, mask=None):
            seen[name] = (q, k)
            return inner(q, k, v, mask=mask)

        return keep

    with attention_processor(model, watch), torch.no_grad():
        model(x, t, y)
    return seen


def mixing_matrix(attend, q, k):
    """The matrices A of the heads, (h, n, n), for q and k of shape (h, n, d)."""
    heads, n, _ = q.shape
    v = q.new_zeros(n + 1, heads, n, q.shape[-1])
    v[torch.arange(n), :, torch.arange(n), 0] = (
        1  # image j of the batch: the unit vector of token j; the last: zero
    )
    with torch.no_grad():
        out = attend(q.expand(n + 1, -1, -1, -1), k.expand(n + 1, -1, -1, -1), v)[..., 0]
    return (out[:n] - out[n]).permute(1, 2, 0)


def random_keys(seed):
    """A mask with as many keys in each row as the local one, itself among them, the others at random."""
    g, allowed = torch.Generator().manual_seed(seed), torch.eye(64, dtype=torch.bool)
    for i, count in enumerate(sees("local", 64, {"grid": GRID, "radius": 2.5}).sum(1).tolist()):
        others = [j for j in torch.randperm(64, generator=g).tolist() if j != i]
        allowed[i, others[: count - 1]] = True
    return allowed


def mean_attention(q, k, v, *, mask=None):
    """Every token gets the mean of all values: rank 1."""
    return v.mean(2, keepdim=True).expand(*q.shape[:3], -1)


SWAPS = {
    "full": full_attention,
    "local, radius 2.5": get_attention("local", grid=GRID, radius=2.5),
    "window of 4": get_attention("window", grid=GRID, window=4),
    "random keys": partial(full_attention, mask=random_keys(0)),
    "proxy, cells of 2": get_attention("proxy", grid=GRID, cell=2),
    "proxy, cells of 4": get_attention("proxy", grid=GRID, cell=4),
    "linear, ReLU": get_attention("linear", feature="relu"),
    "linear, ELU + 1": get_attention("linear", feature="elu"),
    "mean of all": mean_attention,
}
torch.manual_seed(0)
convolved = get_attention("linear_conv", num_heads=4, head_dim=24, grid=GRID).double()
model = zoo.load("dit_digits")
x, t, y = noisy_digits(0, s.recorded)
layers = recorded(zoo.load("dit_digits").double(), x.double(), t, y)
spectra = {}  # name: (cases, 64) singular values, largest first, over the largest
for name, attend in (SWAPS | {"linear + convolution": convolved}).items():
    matrices = [
        mixing_matrix(attend, qi, ki) for q, k in layers.values() for qi, ki in zip(q, k, strict=True)
    ]
    values = torch.linalg.svdvals(torch.cat(matrices))
    spectra[name] = values / values[:, :1]
ranks = {name: (values > 1e-10).sum(1) for name, values in spectra.items()}
d = next(iter(layers.values()))[0].shape[-1]
run.record("rank-linear", max(ranks[name].max().item() for name in ("linear, ReLU", "linear, ELU + 1")) - d)
run.record("rank-proxy", max(ranks[f"proxy, cells of {c}"].max().item() - 64 // c**2 for c in (2, 4)))
run.record("rank-full", ranks["full"].min().item() - d)

# %% [markdown]
# And what does a rank say about quality? The same model can tell. We exchange the attention of all its blocks, change nothing else, train nothing, and ask how far the predicted noise moves:
#
# $$
# \text{error} = \frac{\lVert \hat\epsilon_{\text{exchanged}} - \hat\epsilon \rVert^2}{\lVert \hat\epsilon \rVert^2} .
# $$ (eq-attention-in-one-picture-error)
#
# There are two controls. *Random keys* gives each token as many keys as the disk holds, but drawn at random: equal number, equal rank, another place. *Mean of all* gives every token the same: rank 1.


# %%
def exchanged_error(attend, x, t, y):
    """How far the predicted noise moves, relative to its size."""
    with torch.no_grad():
        before = model(x, t, y)[:, :1]
        # The layer passes on mask=None, which would overrule the mask that some of these bring.
        with attention_processor(model, lambda name, layer: lambda q, k, v, mask=None: attend(q, k, v)):
            after = model(x, t, y)[:, :1]
    return ((after - before).square().sum() / before.square().sum()).item()


errors = {name: [] for name in SWAPS if name != "full"}
for seed in s.seeds:
    batch = noisy_digits(seed, s.images)
    for name in errors:
        attend = partial(full_attention, mask=random_keys(seed)) if name == "random keys" else SWAPS[name]
        errors[name].append(exchanged_error(attend, *batch))


def paired(a, b):
    return [i / j for i, j in zip(errors[a], errors[b], strict=True)]


run.record("which-keys", paired("random keys", "local, radius 2.5"))
run.record("lower-rank-less-error", paired("proxy, cells of 2", "linear, ELU + 1"))

# %% [markdown]
# ## Results
#
# ### Time
#
# On the left of the next figure is the promise, on the right the clock, for the same layers at the same sizes. Parallel lines mean equal growth. Note two things. First, at the left end the order is another one: full attention is the fastest, although proxies and linear attention have fewer operations. A small call is dominated by what every call costs (launching operations, moving data
# into tiles), and there a saving of operations buys nothing. Second, the dashed line: the four projections. Wherever a layer's line is below it, making the mixing faster still hardly helps.
#
# The scans show a third: what grows in proportion to $n$ can still be slow. They take one step for every token, each too small to fill a processor. But the dotted line says that most of the layer's time goes elsewhere: into its projections and convolution, and into laying out four paths and putting them together again. For each number of the input that makes eight, which soon no longer fit in a
# cache. We did not time these parts one by one. Between 1,600 and 2,304 tokens the line of *ss2d* has a step upwards that its scans do not have; {ref}`below <sec-attention-in-one-picture-step>` we say where it comes from, and what follows for the claim.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels against the number of tokens, both axes logarithmic. Left, operations: full attention rises with slope two; window, linear and ss2d rise with slope one, and so does local after a steeper start; proxy rises with slope two from far below. Right, milliseconds on one core: at the right end full attention is the slowest, with ss2d beside it, whose line has a step upwards in the middle; at the left end full attention is the fastest and ss2d is far above all others. The dotted line of the scans lies well below ss2d everywhere."}, "figure": {"caption": "Promise and clock. Left: operations by formula. Right: CPU time, mean over seeds with 90 % intervals. Four heads of width 32; local radius 4, windows of 8, proxies of cells of 4. The line of ss2d is a whole layer with its own projections, and the dotted one the scans inside it; the dashed line is what the projections of any other layer cost.", "name": "fig-attention-in-one-picture-cost"}}
LOOK = {
    "full": ("black", "o"), "local": (BLUE, "o"), "window": (plotting.PALETTE[5], "s"),
    "proxy": (ORANGE, "^"), "linear": (GREEN, "D"), "ss2d": (PINK, "v"),
}  # fmt: skip
tokens = [side**2 for side in s.timed]
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.9), sharex=True)
for label, (colour, marker) in LOOK.items():
    flops = [formula(label, side**2, options_at(label, side), heads=4, width=32) / 1e6 for side in s.timed]
    left.plot(tokens, flops, marker=marker, ms=4, color=colour)
    plotting.curve(right, tokens, 1e3 * torch.tensor(clock[label]), label, colour, marker)
scans = 1e3 * torch.tensor(clock["scan"]).mean(0)
right.plot(tokens, scans, ":", color=PINK, label="its scans")
left.plot(tokens, [8 * n * 128**2 / 1e6 for n in tokens], "--", color="0.5")
right.plot(tokens, 1e3 * torch.tensor(clock["projections"]).mean(0), "--", color="0.5", label="projections")
for ax, ylabel in ((left, "operations (millions)"), (right, "CPU time (ms)")):
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel)
    ax.minorticks_off()
    ticks = [n for n in (64, 256, 1024, 4096) if n in tokens]
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
fig.legend(loc="lower center", ncols=8, fontsize=9, columnspacing=0.8, handlelength=1.4, handletextpad=0.5)
fig.tight_layout(rect=(0, 0.07, 1, 1))
plt.show()


# %% tags=["hide-input"]
def crossing(label):
    """From how many tokens on the layer is faster than full attention, on a line between the sizes that were timed."""
    gap = [statistics.mean(math.log(a[i] / b[i]) for a, b in zip(clock[label], clock["full"], strict=True)) for i in range(len(tokens))]  # fmt: skip
    if gap[-1] >= 0:
        return f"above {tokens[-1]:,}"
    last = max((i for i, value in enumerate(gap) if value >= 0), default=None)
    if last is None:
        return f"below {tokens[0]}"
    between = gap[last] / (gap[last] - gap[last + 1])
    return (
        f"about {math.exp(math.log(tokens[last]) + between * math.log(tokens[last + 1] / tokens[last])):,.0f}"
    )


lines = [
    "| layer | exponent of $n$ | " + " | ".join(f"{n:,} tokens" for n in (tokens[0], tokens[1], tokens[-1])) + " | faster from |",
    "|---|---|---|---|---|---|",
]  # fmt: skip
for label in TIMED:
    ratio = [statistics.mean(a[i] / b[i] for a, b in zip(clock[label], clock["full"], strict=True)) for i in (0, 1, -1)]  # fmt: skip
    lines.append(
        f"| {label} | {statistics.mean(exponents(label)):.2f} | "
        + " | ".join(f"{value:.2f}" for value in ratio)
        + f" | {'' if label in ('full', 'projections') else crossing(label)} |"
    )
caption = f"CPU time over that of full attention, and the fitted exponent between {s.fitted[0] ** 2:,} and {s.fitted[-1] ** 2:,} tokens."
display(Markdown(caption + "\n\n" + "\n".join(lines)))
print(f"full attention with a mask / without, {tokens[-1]:,} tokens: {statistics.mean(masked_over_full):.2f}")
print(f"the same disk, tile by tile / full, {tokens[-1]:,} tokens: {statistics.mean(local_over_full):.3f}")

# %% [markdown]
# Read the exponents against the last row. The projections are plain products of matrices, and in proportion to $n$ on paper; an exponent above 1 there is the machine's, most likely a cache that the data outgrow. *Window* is above that row as well, and makes no claim. *Proxy* is on its way to 2, as the paper count says: at these sizes its overhead
# most likely still flattens the line.
#
# The rows of *ss2d* are those of a whole layer; the other rows are mixing alone. So its ratios look worse than they would beside a whole layer of full attention, and its crossing comes too late. It is also the number in the table that depends most on the machine: see {ref}`below <sec-attention-in-one-picture-step>`.
#
# The two lines under the table belong together. Both compute the same disk. The mask forbids most pairs after their logits have been made, so it can save nothing. It even costs time, clearly more than nothing in this run: the mask must be read, and applied to every logit. Only leaving the work out makes it fast. When a paper counts pairs, ask which kernel computes them.
#
# ### Rank and error

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: singular values against their number on a logarithmic axis. Full attention, local attention and linear attention with a convolution stay above one part in a billion to the last of 64. The two kinds of linear attention drop to rounding error after number 24, where a dotted line marks the width of a head; sixteen proxies drop after 16. Right: error against rank for eight replacements. Local attention has the smallest error at rank 64; random keys, also at rank 64, have more than twice its error; sixteen proxies lie below both kinds of linear attention at rank about 24."}, "figure": {"caption": "Left: singular values of the token-mixing matrices of a trained model's heads (median over layers, heads and images; each over its largest). Dotted: width of a head, $d$. What lies below the grey line counts as zero. The convolution has random weights, so it is shown on the left only. Right: error of the predicted noise after the attention of all blocks is exchanged without training, against rank (median). Bars: 90 % intervals over seeds, which draw the images and the noise; the model is one.", "name": "fig-attention-in-one-picture-rank"}}
styles = {
    "full": ("black", "-"), "local, radius 2.5": (BLUE, "-"), "proxy, cells of 2": (ORANGE, "-"), "linear, ReLU": (GREEN, "-"),
    "linear, ELU + 1": (GREEN, "--"), "linear + convolution": (PINK, "-"),
}  # fmt: skip
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.9), width_ratios=[1, 1.1], layout="constrained")
for name, (colour, dash) in styles.items():
    values = spectra[name].median(0).values.clamp(min=1e-18)
    left.semilogy(range(1, 65), values, dash, color=colour, label=name, lw=1.6)
left.axhline(1e-10, color="0.6", lw=0.8)
left.axvline(d, color="0.3", ls=":", lw=1)
left.set(
    xlabel="number", ylabel="singular value (over the largest)", ylim=(1e-18, 3), xticks=[1, 16, 24, 40, 64]
)
left.legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1.03, 0.12), handlelength=1.1, handletextpad=0.5)
offsets = {
    "local, radius 2.5": (-6, -4, "right"), "window of 4": (-6, -4, "right"), "random keys": (-6, 3, "right"),
    "proxy, cells of 2": (-7, -4, "right"), "proxy, cells of 4": (7, -4, "left"), "linear, ReLU": (7, -4, "left"),
    "linear, ELU + 1": (7, 0, "left"), "mean of all": (7, 2, "left"),
}  # fmt: skip
marks = {"local": BLUE, "window": BLUE, "random": "black", "proxy": ORANGE, "linear": GREEN, "mean": "0.45"}
for name, values in errors.items():
    mean, low, high = plotting.mean_interval(torch.tensor(values)[:, None])
    colour = marks[name.split()[0].rstrip(",")]
    where = ranks[name].double().median().item()
    right.errorbar(
        where, mean.item(), [[(mean - low).item()], [(high - mean).item()]], marker="o", ms=5, color=colour
    )
    dx, dy, side = offsets[name]
    tag = {"proxy, cells of 2": "16 proxies", "proxy, cells of 4": "4 proxies"}.get(name, name)
    right.annotate(
        tag, (where, mean.item()), (dx, dy), textcoords="offset points", ha=side, fontsize=9, color=colour
    )
right.set(
    xlabel="rank of the token-mixing matrix", ylabel="error after the exchange", xlim=(-3, 67), ylim=(0, None)
)
plt.show()

# %%
print(f"width of a head {d}, tokens 64")
for name in ("full", "proxy, cells of 2", "proxy, cells of 4", "linear, ELU + 1"):
    print(f"{name:20s} rank {ranks[name].min().item()} to {ranks[name].max().item()}")

# %% [markdown]
# **What a rank says.** It is a wall: no training gets a head of linear attention past $d$ independent rows (as long as $\phi$ makes $d$ features), and the fall of the two green lines at the dotted one is that wall. More width a head moves it (LiT's *few heads*), and a convolution steps around it.
#
# **What it does not say.** How close a layer comes to what a model needs. First, the count is generous: full attention has rank 64 here, but most of its singular values are small, so few mixtures do most of the work. Second, the two kinds of linear attention stand before the same wall, and proxies before a lower one; the right panel does not order them by
# rank. (The bars of the sixteen proxies and of ReLU overlap; the claim is about ELU + 1.) Third, random keys have full rank. What they lack is the right place. In a trained model near tokens matter most, and what keeps them keeps the output. That is CLEAR's *locality*, and a second of its conditions, *formulation consistency*, is at work as well: local and window attention are still a softmax of the same logits, as the model learned it, while ELU + 1 turns them into something else.
#
# These errors are those of an exchange without training. Training moves all of them, and can reorder them.

# %%
run.report()

# %% [markdown]
# The exact claims are settled by the run: a page with a broken one is not published. For the others, read the verdicts in the table.
#
# (sec-attention-in-one-picture-step)=
# ### One claim is contradicted
#
# It is `exponent-ss2d`: on this machine the time of a whole *ss2d* layer grows faster than in proportion to $n$, and all five seeds agree. Its operations do grow in proportion to $n$ (left panel), and so does the time of its scans (`exponent-scan`, confirmed). So the excess is in what lies around the scans, and the right panel shows where: a step between 1,600 and 2,304 tokens, with a straight line on
# either side.
#
# The likely reason is memory, not arithmetic. This layer makes the largest tensors on the page, anew in each call. While they are small, the process keeps their memory and uses it again. Above some size it gives the memory back and asks the operating system for fresh pages the next time, and each page costs time when it is first touched. We counted these page faults outside the recorded run: at 1,024 tokens there were none,
# at the large sizes as many as there are pages to fill, and the system's share of the time rose from nothing to about a third. A kernel that does not lay out four copies of its input would not pay this.
#
# What was tried: an earlier recorded run, with three seeds measured one after the other, had this claim inconclusive, since only its first seed was steep. What the allocator had kept from earlier calls differed from seed to seed. `exponent-linear` and `exponent-local` wavered as well, for a plainer reason: a busy spell of the machine fell on one seed. So the seeds are five now and are measured in turn; the card lists this as an
# amendment. And `exponent-scan` was added to the card after a pilot in which *ss2d* was inconclusive. It does not replace `exponent-ss2d`, which stays on the card with the verdict it got.
#
# ## Choosing
#
# A summary of this page, not of the literature; each line assumes that the layer's training works.
#
# :::{table} When to use which.
# :name: tab-attention-in-one-picture-choosing
#
# | situation | layer | mind |
# |---|---|---|
# | up to a few hundred tokens (all small models of this book) | full | at 64 tokens the calls cost more than the sums: look at that column of the table of times before you believe any saving |
# | a trained model, large images | local, with text tokens as hubs | needs a kernel that leaves work out; without text, reach grows only by a radius a block |
# | images trained from scratch, several stages | windows with shifts | same reach; an image smaller than a window has full attention anyway |
# | thousands of tokens, global layout matters, local detail comes from elsewhere | proxies, or latents | proxies are still quadratic with a small constant; both pass what is far through few tokens |
# | very many tokens, even a small share of $n^2$ is too much | linear, with a convolution | rank at most $d$ a head: few, wide heads; needs training or distillation |
# | linear cost (in operations), and order matters | scans, with windows for detail | many small steps and large tensors: slow without fused kernels, and far tokens fade |
# | video | spatial, then temporal | a moving thing is at another place in the next frame, and needs two blocks to be followed |
# | text or frames made one by one | causal | of the layers here only this one can keep keys and values of the past unchanged |
# :::
#
# On paper, mixing takes $4 n^2 D$ operations, the projections $8 n D^2$, and a feed-forward network of fourfold width $16 n D^2$. So below $n = 6 D$, some thousand tokens for a width $D$ of about 1,000, these cost more than full attention's mixing. Then larger patches, fewer steps or a cache save more than any line of this table.
#
# ## What this does not show
#
# - *Quality.* No model was trained here. CLEAR, LinFusion, LiT, PT-DiT, FIT and LaMamba-Diff each report a quality comparable to that with full attention; that was not tried.
# - *Speed on a GPU.* CLEAR's factor of 6.3 is measured on one, at 8192 pixels, with a fused kernel. A GPU moves the crossings: more parallel work hides more waste.
# - *Whole blocks.* PT-DiT's block has proxies, windows, shifted windows, cross-attention and a feed-forward network; its savings are those of a whole model. Our *proxy* and *latents* are one layer each, without the residuals in between.
# - *Backward passes and memory.* Times are of forward passes, on one core of a shared machine. The $n \times n$ matrix is never stored by a fused kernel, so memory is no reason to avoid full attention in inference.
# - Reach and visibility are about one layer's wiring, not about a trained model's habits. The ranks are of one small model.
# - The errors come from one model of 64 tokens. A disk of radius 2.5 there covers up to a third of the image; at 4,096 tokens it covers half a per cent.
#
# ## Exercises
#
# **1.** For which number of tokens do softmax and linear attention take equally many operations? Derive it for one head of width $d$ from the two formulas, then for a total width of 1024 in 16, 4 and 1 heads. What does "few heads" cost?
#
# **2.** In linear attention with ReLU features and Gaussian queries and keys of width $d$, what share of the pairs has weight exactly zero? Why did we need positive inputs?
#
# **3.** Reach grows by a radius a block. Does influence? Take a line of 201 tokens and a layer in which each token averages the 5 nearest, add the residual, and measure how wide the influence of the middle one is after $k$ blocks.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# Softmax takes 4 n^2 d, linear 4 n d^2 + 2 n d (the denominators). Equal at n = d + 1/2: linear attention is the cheaper one as soon
# as there are more tokens than a head is wide. At a fixed total width, fewer heads are wider: the crossing moves up, and the
# operations of the linear layer grow in proportion to d. So does the bound of the rank.
for heads in (16, 4, 1):
    width = 1024 // heads
    equal = next(
        n
        for n in range(1, 5000)
        if formula("linear", n, {}, heads, width) < formula("full", n, {}, heads, width)
    )
    cost = formula("linear", 4096, {}, heads, width) / formula("full", 4096, {}, heads, width)
    print(
        f"{heads:2d} heads of {width:4d}: cheaper from {equal:4d} tokens; at 4,096 tokens {cost:.1%} of full attention"
    )

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# A feature contributes if query and key are both positive: with probability 1/4. All d fail with probability (3/4)^d. Such a pair
# may see each other, and does not; its derivative is zero as well. Positive inputs take this accident out of the test.
g = torch.Generator().manual_seed(0)
for width in (4, 8, 16, 32):
    q, k = (torch.randn(2000, width, generator=g).relu() for _ in range(2))
    print(f"d = {width:2d}: {(q @ k.T == 0).double().mean():.4f} of the pairs, expected {0.75**width:.4f}")

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 3", "code_prompt_hide": "Solution 3", "image": {"alt": "Two curves against the number of blocks: reach is a straight line up to 40 tokens at 20 blocks; the width of the influence is a curve that bends, near 4.5 tokens at 20 blocks."}, "figure": {"caption": "Reach and width (standard deviation) of the influence of one token, against depth.", "name": "fig-attention-in-one-picture-walk"}}
# With the residual, a token keeps half and takes half from a step of -2 to 2: a random walk. A step has variance 2, half of the
# steps stay, so k blocks have variance k: the width is sqrt(k), while reach is 2 k. To be heard far away takes depth squared.
place = torch.arange(201)
average = ((place[:, None] - place).abs() <= 2).double() / 5
middle, widths = torch.eye(201, dtype=torch.float64)[:, 100], []
for _ in range(20):
    middle = (middle + average @ middle) / 2
    widths.append(((place - 100) ** 2 * middle / middle.sum()).sum().sqrt().item())
blocks = range(1, 21)
fig, ax = plt.subplots(figsize=(5, 2.8))
ax.plot(blocks, [2 * k for k in blocks], color="0.5", label="reach")
ax.plot(blocks, widths, "o", ms=4, color=BLUE, label="width of the influence")
ax.plot(blocks, [math.sqrt(k) for k in blocks], color=BLUE, lw=1, label=r"$\sqrt{k}$")
ax.set(xlabel="blocks", ylabel="tokens", xticks=range(0, 21, 5))
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## References
#
# Full attention: {cite:t}`vaswani2017attention`. Windows: {cite:t}`liu2021swin`. Local disks: {cite:t}`clear`. Frames and places: {cite:t}`arnab2021vivit`. Proxies: {cite:t}`pt-dit`. Latents: {cite:t}`fit`. Linear attention: {cite:t}`katharopoulos2020transformers`, {cite:t}`linfusion`, {cite:t}`lit`. Scans:
# {cite:t}`liu2024vmamba`, {cite:t}`lamamba`. Code read: [CLEAR](https://github.com/Huage001/CLEAR), [LinFusion](https://github.com/Huage001/LinFusion), [pix2seq](https://github.com/google-research/pix2seq) (FIT),
# [LaMamba-Diff](https://github.com/yunxiangfu2001/LaMamba-Diff), [Swin](https://github.com/microsoft/Swin-Transformer). The library's registry:
# [functional.py](https://github.com/minilib-book/minilib/blob/main/minilib/attention/functional.py).
