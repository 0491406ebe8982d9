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
# # DiT-MoE: many experts, few at work
#
# A diffusion transformer (DiT) spends every weight on every token. {cite:t}`dit-moe` replace the feed-forward network of each block by many such networks, the *experts*, and let a small gate pick two of
# them for each token: a mixture of experts (MoE). The model grows, the work per token does not.

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

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from torch.utils.flop_counter import FlopCounterMode

from minilib import plotting, zoo
from minilib.arms import run_arms
from minilib.data import load
from minilib.guidance import conditional
from minilib.losses import class_batches, flow_matching_loss
from minilib.metrics import class_accuracy, frechet_report
from minilib.metrics.mutual_information import mutual_information
from minilib.models import (
    DIT_MOE_CONFIGS,
    DiT,
    ExpertLoad,
    MoEFeedForward,
    collect_balance_loss,
    load_balance_loss,
    upcycle_moe,
)
from minilib.profiling import count_flops, count_parameters
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample_final
from minilib.schedulers import FlowMatchEulerDiscreteScheduler
from minilib.schedulers.densities import LogitNormal
from minilib.training import FitConfig, fit


@dataclass(frozen=True)
class Settings:
    """``probe``: images on which routing is recorded. ``renormalised``: train that arm too."""

    seeds: tuple[int, ...]
    steps: int
    batch_size: int = 32
    lr: float = 4e-3
    hidden_size: int = 64
    depth: int = 4
    samples: int = 200
    sampling_steps: int = 16
    probe: int = 368
    renormalised: bool = False


plotting.use_style()
run = Reproduction(
    "dit-moe",
    profile,
    {
        "smoke": Settings(
            (0,), 25, hidden_size=32, samples=50, sampling_steps=4, probe=60, renormalised=True
        ),
        "cpu": Settings((0, 1, 2), 420),
        "gpu": Settings(
            (0, 1, 2, 3, 4),
            steps=3000,
            batch_size=64,
            lr=1.5e-3,
            hidden_size=128,
            depth=6,
            samples=368,
            sampling_steps=50,
            renormalised=True,
        ),
    },
)
s = run.settings
run.show_settings()

# %%
run.show_card()

# %% [markdown]
# ## The idea
#
# In a transformer block the feed-forward network holds twice the weights of attention. It treats each token alone, so nothing forces all tokens through the same one. A sky patch and an eye patch, or
# a patch that is almost pure noise and one that is nearly clean, may well want different networks.
#
# Call the token $x \in \mathbb{R}^D$. There are $E$ experts; write $E_i(x)$ for the output of the $i$-th. A gate with one weight matrix $W$ turns the token into probabilities, one an expert. The $k$ largest are kept, the set
# $\mathcal{T}(x)$, and only those experts run:
#
# $$
# y = \sum_{i \in \mathcal{T}(x)} p_i\, E_i(x) + S(x), \qquad p = \operatorname{softmax}(W x)
# $$ (eq-dit-moe-layer)
#
# Three details matter.
#
# - **The kept weights are not renormalised.** They sum to less than 1. A gate that is unsure of itself turns the experts down.
# - **A shared expert** $S$ sees every token. It holds what all tokens need, so that the others need not learn it again and again. It is small.
# - **The gate learns through** $p_i$ **alone.** Which experts are picked is a hard choice without a gradient; how strongly a picked expert speaks is not.
#
# The last point has a danger in it. An expert that is picked gets trained, becomes better, and is picked more often. Left alone, a few experts may take all the tokens. So a second loss spreads the
# load:
#
# $$
# L_\text{balance} = \alpha \sum_{i=1}^{E} P_i f_i
# $$ (eq-dit-moe-balance)
#
# Here $f_i$ is $E$ times the share of token-slots that expert $i$ got, so 1 if the load is uniform, and $P_i$ is the mean of $p_i$ over all tokens. The counts $f_i$ have no gradient. They act as
# prices: an expert in demand is dear, and the gate is pushed to lower its probability. At uniform load the loss equals $\alpha$. The form is that of Switch Transformers {cite:p}`fedus2022switch`.
#
# {numref}`fig-dit-moe-gate` shows a gate before any training.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above: a grid of 8 experts by 16 tokens in shades of grey, with two cells of each column marked, the likeliest by a filled dot and the second by an open one. Below: the sum of the two kept probabilities of each token, between a third and two thirds, far below the dashed line at 1."}, "figure": {"caption": "An untrained gate, 16 random tokens, 8 experts. Above: the probabilities; a filled dot marks the likeliest expert of a token, an open one the second. Below: what the two kept weights sum to. They are not scaled up to 1.", "name": "fig-dit-moe-gate"}}
generator = torch.Generator().manual_seed(0)
tokens = torch.randn(16, 64, generator=generator)
weight = (
    2 * torch.rand(8, 64, generator=generator) - 1
) / 8  # uniform within 1 / sqrt(D), as in the released code
kept, chosen = (tokens @ weight.T).softmax(-1).topk(2)
fig, (ax, below) = plt.subplots(
    2, 1, figsize=(6, 4), sharex=True, height_ratios=(3, 1.2), layout="constrained"
)
picture = ax.imshow((tokens @ weight.T).softmax(-1).T, cmap="Greys", vmin=0, vmax=0.7, aspect="auto")
ax.plot(range(16), chosen[:, 0], "o", color=plotting.PALETTE[1], ms=8)
ax.plot(range(16), chosen[:, 1], "o", mfc="none", mec=plotting.PALETTE[1], mew=2, ms=8)
ax.set(ylabel="expert", yticks=range(8))
ax.grid(False)
fig.colorbar(picture, ax=ax, label="probability $p_i$", pad=0.01)
below.bar(range(16), kept.sum(-1), color=plotting.PALETTE[1], width=0.6)
below.axhline(1, color="k", ls="--", lw=1)
below.set(xlabel="token", ylabel="kept weight", xticks=range(0, 16, 5), ylim=(0, 1.1))
plt.show()

# %% [markdown]
# ## The method
#
# One expert is a SwiGLU network: $E_i(x) = W_\text{down} \left( \operatorname{SiLU}(W_\text{gate} x) \odot W_\text{up} x \right)$, of hidden width $4D$ and without biases. It has three matrices of $4D^2$ weights,
# $12D^2$ in all. The shared expert has the same form and hidden width $2D$, so $6D^2$ weights.
#
# The layer is short. For each expert, find the tokens that were sent to it, run it on those, and add the result back with its weight.


# %%
def swiglu(x, expert):
    """W_in holds W_gate above W_up."""
    gate, up = (x @ expert.w_in.weight.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ expert.w_down.weight.T


def moe_layer(x, gate_weight, experts, shared, k):
    """Tokens (n, D) -> outputs (n, D), probabilities (n, E), chosen experts (n, k)."""
    p = (x @ gate_weight.T).softmax(dim=-1)
    kept, chosen = p.topk(k, dim=-1)
    y = swiglu(x, shared)
    for i, expert in enumerate(experts):
        token, slot = (chosen == i).nonzero(as_tuple=True)
        y = y.index_add(0, token, kept[token, slot, None] * swiglu(x[token], expert))
    return y, p, chosen


def balance_loss(p, chosen, alpha):
    num_experts = p.shape[-1]
    f = num_experts * chosen.flatten().bincount(minlength=num_experts) / chosen.numel()
    return alpha * (p.mean(dim=0) * f).sum()


# %% [markdown]
# The library has the same layer in two forms. `sparse` sorts the token-slots by expert, runs each expert once on its own segment and puts the results back. `dense` runs every expert on every token and
# multiplies by a weight that is mostly zero. Both must agree with the layer above. So must the limit of a single expert without a gate to speak of ($E = k = 1$, no $S$), which is a plain SwiGLU network. We compare
# in double precision, so that only real differences show.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
layer = MoEFeedForward(64, 256, num_experts=8, k=2).double()
x = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
y, p, chosen = moe_layer(x, layer.gate.weight, layer.experts, layer.shared, k=2)
for name, value in {"tokens": x, "probabilities": p, "chosen": chosen, "output": y}.items():
    print(f"{name:24s}", tuple(value.shape))

gaps = {}
for dispatch in ("sparse", "dense"):
    layer.dispatch = dispatch
    gaps[f"page = library, {dispatch}"] = (layer(x) - y).abs().max()
gaps["balance loss"] = (balance_loss(p, chosen, 0.01) - load_balance_loss(p, chosen, alpha=0.01)).abs()
one = MoEFeedForward(64, 256, num_experts=1, k=1, shared=0).double()
gaps["one expert = SwiGLU"] = (one(x) - swiglu(x, one.experts[0])).abs().max()
for name, gap in gaps.items():
    print(f"{name:24s}", "PASS" if gap <= 1e-5 else f"FAIL {gap:.1e}")

# %% [markdown]
# ### What it costs
#
# A token meets the gate ($E D$ weights), $k$ experts and the shared one. The layer as a whole holds all $E$ experts:
#
# $$
# \text{met by a token: } k \cdot 12 D^2 + 6 D^2 + E D, \qquad \text{held: } E \cdot 12 D^2 + 6 D^2 + E D .
# $$ (eq-dit-moe-cost)
#
# Each weight that a token meets costs one multiplication and one addition, a *multiply-accumulate* (MAC). So the first number is also the work per token. We let torch count the matrix products of a real, uneven
# routing, and compare.

# %%
# NBVAL_CHECK_OUTPUT
D, n, work, differences = 64, 1024, {}, []
for E in (4, 8, 16):
    torch.manual_seed(0)
    layer = MoEFeedForward(D, 4 * D, num_experts=E, k=2)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(n, D, generator=torch.Generator().manual_seed(E)))
    work[E], held = counter.get_total_flops() / 2 / n, count_parameters(layer)
    differences += [
        abs(work[E] - (2 * 12 * D**2 + 6 * D**2 + E * D)),
        abs(held - (E * 12 * D**2 + 6 * D**2 + E * D)),
    ]
    print(f"{E:2d} experts: {held:7,} weights, a token meets {work[E]:7,.0f} of them")
run.record("structure", max(differences))
run.record("gate-cost", work[16] / work[4] - 1)

# %% [markdown]
# Four times the experts, about four times the weights, and the work grows by the gate's few rows only. In the paper's own table this shows as 15.43 against 15.44 Gflops for 8 and 16 experts.
#
# The same modules, at the published sizes and on torch's `meta` device, where tensors have shapes and no values, give the paper's Table 1. A model is named by its size, its patch, its experts and its active experts:
# `S/2-8E2A` has 8 experts, 2 of them active. "Gflops" in the paper are MACs. They match ours to the last digit if the two products inside attention (queries with keys, weights with values) are left out, as we do here.

# %%
# NBVAL_CHECK_OUTPUT
TABLE_1 = {  # parameters, active ones, Gflops, worth of the last digit of the first two
    "S/2-8E2A": (199e6, 71e6, 15.43, 1e6),
    "S/2-16E2A": (369e6, 71e6, 15.44, 1e6),
    "B/2-8E2A": (795e6, 286e6, 61.68, 1e6),
    "L/2-8E2A": (2.8e9, 1.0e9, 219.26, 1e8),
    "XL/2-8E2A": (4.1e9, 1.5e9, 323.74, 1e8),
    "G/2-16E2A": (16.5e9, 3.1e9, 690.94, 1e8),
}
latent = (torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
off = []
for name, (total, active, gflops, digit) in TABLE_1.items():
    config = DIT_MOE_CONFIGS[f"DiT-MoE-{name}"]
    D, depth, E = config["hidden_size"], config["depth"], config["mlp_options"]["num_experts"]
    with torch.device("meta"):
        model = DiT(**config)
    held = count_parameters(model)
    met = held - depth * (E - 2) * 12 * D**2
    macs = count_flops(model, *latent).macs - depth * 2 * 256**2 * D
    off += [abs(held - total) / digit, abs(met - active) / digit, abs(macs / 1e9 - gflops) / 0.01]
    print(f"{name:10s} {held:14,} parameters, {met:13,} active, {macs / 1e9:6.2f} GMAC")
run.record("published-sizes", max(off))

# %% [markdown]
# :::{admonition} In the released code
# :class: tip
# Read in [models.py](https://github.com/feizc/DiT-MoE/blob/main/models.py): the gate sees the token *after* the block's scale and shift, so time and label reach it directly. The paper's two shared experts are one network of hidden width $2D$: our $S$.
# The balance factor is $\alpha = 0.01$ there and 0.005 in the paper's text; we take 0.01. In [rectified_flow.py](https://github.com/feizc/DiT-MoE/blob/main/diffusion/rectified_flow.py) the network is given $t$ between 0 and 1; here
# it is given 0 to 1000, as everywhere in this book.
# :::
#
# ### Upcycling: a mixture from a dense model
#
# The released code can also start from a trained dense model. Every expert begins as a copy of its feed-forward network, and the gate begins at random. If the kept weights are renormalised and there is no shared
# expert, the mixture computes what its parent does, whatever the gate says: a weighted mean of equal things. We try it with this book's digit model, a plain DiT of 8 blocks.

# %%
# NBVAL_CHECK_OUTPUT
parent = zoo.load("dit_digits").double()
mixture = upcycle_moe(
    parent, num_experts=8, k=2, renormalize=True, generator=torch.Generator().manual_seed(0)
)
generator = torch.Generator().manual_seed(0)
noisy = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
inputs = (noisy, torch.tensor([50, 350, 650, 950]), torch.tensor([1, 3, 7, 10]))
with torch.no_grad():
    gaps["upcycled = parent"] = (mixture(*inputs) - parent(*inputs)).abs().max()
print("upcycled = parent", "PASS" if gaps["upcycled = parent"] <= 1e-5 else gaps["upcycled = parent"])
print(f"{count_parameters(parent):,} parameters became {count_parameters(mixture):,}")
run.record("limits", float(max(gaps.values())))

# %% [markdown]
# ## The experiment
#
# We train on real handwritten digits, 8 by 8 pixels, cut into patches of 2 by 2: 16 tokens on a 4 by 4 grid. The loss is flow matching, with the noise level drawn from the logit-normal density (see
# {doc}`/conventions`); the authors report that flow matching works better than their diffusion loss. All arms see the same images, the same noise and the same times at each step. They share one learning rate, chosen for the *dense*
# control on validation images, near its best among three.
#
# :::{table} The arms. Each has the same attention, width and depth.
# :name: tab-dit-moe-arms
#
# | arm | feed-forward network | question |
# |---|---|---|
# | MoE | 8 experts, 2 active, shared expert, $\alpha = 0.01$ | the method |
# | MoE, no balance loss | the same, $\alpha = 0$ | what does the balance loss do? (control) |
# | dense, equal work | one SwiGLU of hidden width $10D$ | does the mixture pay at equal work? (control) |
# | dense, equal parameters | one SwiGLU of hidden width $34D$ | what would the parameters buy if all were used? |
# :::
#
# The widths follow from {eq}`eq-dit-moe-cost`: $3 \cdot 10D \cdot D = 30D^2$ is what a token meets, $3 \cdot 34D \cdot D = 102D^2$ what the mixture holds, both but for the gate. In the profiles `smoke` and `gpu` a fifth arm renormalises
# the kept weights; the `cpu` profile leaves it out. Its runs are short: a classifier reads most of the digits as the ones asked for, and the losses are still falling when
# training stops.

# %%
EXPERTS = {"num_experts": 8, "k": 2}
ARMS = {  # options of the model, and alpha where there is a gate
    "MoE": ({"mlp": "moe", "mlp_options": EXPERTS}, 0.01),
    "MoE, no balance loss": ({"mlp": "moe", "mlp_options": EXPERTS}, 0.0),
    "dense, equal work": ({"mlp": "swiglu", "mlp_ratio": 10}, None),
    "dense, equal parameters": ({"mlp": "swiglu", "mlp_ratio": 34}, None),
}
if s.renormalised:
    ARMS["MoE, renormalised"] = ({"mlp": "moe", "mlp_options": EXPERTS | {"renormalize": True}}, 0.01)


def build(options):
    return DiT(
        patch_size=2, hidden_size=s.hidden_size, depth=s.depth, num_heads=4, learn_sigma=False, **options
    )


def training_loss(alpha):
    def loss(model, batch):
        if alpha is None:
            return flow_matching_loss(model, batch)
        with collect_balance_loss(model, alpha=alpha) as balance:
            value = flow_matching_loss(model, batch)
        return value + balance.total()

    return loss


one_image = (torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
macs = {name: count_flops(build(options), *one_image).macs for name, (options, _) in ARMS.items()}
for name, (options, _) in ARMS.items():
    print(
        f"{name:24s} {count_parameters(build(options)):10,} parameters {macs[name] / 1e6:7.1f} million MACs an image"
    )
run.record("active-cost", macs["MoE"] / macs["dense, equal parameters"])

# %% [markdown]
# The flow-matching loss, without the balance term and with averaged weights (EMA), is compared on the test images, each at four times spread evenly over the training density, with noise that is fixed once and for all. All models answer the very same questions, so that a difference of
# one per cent can be seen. Samples are drawn from shared noise, without guidance.

# %%
train, test = load("digits", "train"), load("digits", "test")
generator = torch.Generator().manual_seed(0)
x0, y0 = test.x.repeat(4, 1, 1, 1), test.y.repeat(4)
quantiles = (torch.randperm(len(x0), generator=generator) + 0.5) / len(x0)
questions = {
    "x0": x0,
    "y": y0,
    "t": 1000 * torch.sigmoid(torch.special.ndtri(quantiles)),
    "noise": torch.randn(x0.shape, generator=generator),
}
device = str(run.device)


def study(arm, seed):
    """Train one arm; returns the averaged model, its loss, load and samples."""
    options, alpha = arm
    torch.manual_seed(seed)

    def times(n, generator):
        return 1000 * LogitNormal().sample(n, generator)

    batches = class_batches(train.x, train.y, times, null_class=10)
    config = FitConfig(steps=s.steps, batch_size=s.batch_size, lr=s.lr, warmup=50, ema_decay=0.98, seed=seed)
    model = fit(build(options), training_loss(alpha), batches, config, device=device).ema
    labels = test.y[: s.samples].to(device)
    noise = initial_noise((len(labels), 1, 8, 8), torch.Generator().manual_seed(seed), device=device)
    scheduler = FlowMatchEulerDiscreteScheduler()
    x = sample_final(conditional(model, labels), scheduler, noise, num_inference_steps=s.sampling_steps)
    model = model.cpu()
    with torch.no_grad():
        if alpha is None:
            loss, load_ = flow_matching_loss(model, questions), None
        else:
            with ExpertLoad(model) as record:
                loss = flow_matching_loss(model, questions)
            load_ = 8 * record.fractions()
    return {"model": model, "loss": float(loss), "load": load_, "samples": x.clamp(-1, 1).cpu()}


results = run_arms(study, ARMS, s.seeds)

# %% [markdown]
# ## Results
#
# ### The picture: who does what
#
# We put noise on held-out images at ten levels from $t = 0.05$ (nearly clean) to $t = 0.95$ (nearly noise), run the trained mixture, and note each token's experts. {numref}`fig-dit-moe-picture` shows one image.

# %%
TIMES = (torch.arange(10) + 0.5) / 10
images, labels = test.x[: s.probe], test.y[: s.probe]
noise = torch.randn(10, *images.shape, generator=torch.Generator().manual_seed(1))
views = (1 - TIMES.view(-1, 1, 1, 1, 1)) * images + TIMES.view(-1, 1, 1, 1, 1) * noise


@torch.no_grad()
def routes(model, y=labels):
    """The chosen experts: (layers, times, images, tokens, k)."""
    with ExpertLoad(model) as record:
        for t, view in zip(TIMES, views, strict=True):
            model(view, torch.full((len(view),), 1000 * float(t)), y)
    return torch.stack([r.view(10, len(images), 16, 2) for r in record.topk.values()])


trained = [routes(r["model"]) for r in results["MoE"]]
untrained = []
for seed in s.seeds:
    torch.manual_seed(seed)  # the very weights that training began with
    untrained.append(routes(build(ARMS["MoE"][0])))

# %% tags=["hide-input"] mystnb={"image": {"alt": "A table of small 4 by 4 grids. The first column shows one digit from nearly pure noise (top) to clean (bottom). Each other column is a layer, each grid is coloured and numbered by the expert its tokens go to. Neighbouring tokens often share an expert, and the colours change partly from row to row."}, "figure": {"caption": "One held-out digit at six noise levels, first seed. Left: what the model sees, 8 by 8 pixels. Right: its 16 tokens, coloured and numbered by their likeliest expert, one column a layer. The numbers mean nothing across columns: each layer has its own 8 experts.", "name": "fig-dit-moe-picture"}}
colours = ListedColormap([*plotting.PALETTE, "#F0E442"])
rows, which = (9, 7, 5, 3, 1, 0), 3
fig, axes = plt.subplots(
    len(rows), 1 + s.depth, figsize=(min(7, 1.15 * (1 + s.depth)), 6.6), layout="constrained"
)
for ax_row, row in zip(axes, rows, strict=True):
    ax_row[0].imshow(views[row, which, 0], cmap="gray", vmin=-1.5, vmax=1.5)
    ax_row[0].set_ylabel(f"$t$ = {TIMES[row]:.2f}")
    for layer, ax in enumerate(ax_row[1:]):
        grid = trained[0][layer, row, which, :, 0].view(4, 4)
        ax.imshow(grid, cmap=colours, vmin=-0.5, vmax=7.5)
        for (i, j), expert in zip(
            torch.cartesian_prod(torch.arange(4), torch.arange(4)).tolist(),
            grid.flatten().tolist(),
            strict=True,
        ):
            ax.text(
                j,
                i,
                expert,
                ha="center",
                va="center",
                fontsize=7,
                color="k" if expert in (3, 4, 5, 7) else "w",
            )
    for ax in ax_row:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(False)
for ax, title in zip(axes[0], ["input", *(f"layer {i + 1}" for i in range(s.depth))], strict=True):
    ax.set_title(title, fontsize=10)
plt.show()

# %% [markdown]
# Read it in two directions. Were the gate to follow position alone, every row of a column would look the same. Were it to follow time alone, every tile would be of one colour. What we see lies between: much of a tile stays
# from row to row, and some of it changes, the more so in layer 1.
#
# ### Balance
#
# Both mixtures start from the same weights, and a random gate is far from even: the tokens of an image have much in common, and so do their favourite experts. {numref}`fig-dit-moe-load` sorts the
# experts of each layer by how many tokens they get on held-out images.

# %% tags=["hide-input"] mystnb={"image": {"alt": "One panel a layer: load of the 8 experts, sorted. With the balance loss the curve is nearly flat at 1. Without it, and before training, it falls from about two to nearly four times the uniform load to far below 1."}, "figure": {"caption": "Load of the experts, sorted, over the uniform load. Bands: 90 % intervals over seeds.", "name": "fig-dit-moe-load"}}
loads = {name: torch.stack([r["load"] for r in results[name]]) for name in ("MoE", "MoE, no balance loss")}
loads["before training"] = torch.stack([8 * F.one_hot(r.flatten(1), 8).float().mean(1) for r in untrained])
fig, axes = plt.subplots(1, s.depth, figsize=(7, 2.7), sharey=True, layout="constrained")
for layer, ax in enumerate(axes):
    for (name, load_), colour, marker in zip(loads.items(), plotting.PALETTE, "osD", strict=False):
        ranked = load_[:, layer].sort(dim=-1, descending=True).values
        plotting.curve(ax, range(1, 9), ranked, name, colour, marker)
    ax.axhline(1, color="k", ls="--", lw=1)
    ax.set(title=f"layer {layer + 1}", xlabel="expert, by rank", xticks=(1, 4, 8), ylim=(0, None))
axes[0].set_ylabel("load / uniform load")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %%
cv = {name: (load_.std(-1, correction=0) / load_.mean(-1)).mean(-1) for name, load_ in loads.items()}
busiest = {name: load_.amax(-1).mean(-1) for name, load_ in loads.items()}
run.record("balance", cv["MoE, no balance loss"] / cv["MoE"])
run.record("max-load", busiest["MoE"])
for name in loads:
    print(
        f"{name:22s} coefficient of variation {cv[name].mean():.2f}, busiest expert {busiest[name].mean():.2f} x uniform"
    )

# %% [markdown]
# ### What the choice depends on
#
# How much does the chosen expert tell us about the noise level, the class, or the position of a token? *Mutual information* answers in bits. It is 0 if the choice is independent of the factor, and at most
# 3 bits with 8 experts. Each factor is taken alone, so a choice that turns with the noise level one way here and another way there can cancel out. Finite samples make the
# information look larger than it is. So we shuffle the factor, measure again, and subtract. The shuffle must respect groups: the 16 tokens of an image share
# its class, so whole images trade their classes.


# %%
FACTORS = {
    "position": torch.arange(16),
    "time": torch.arange(10).view(10, 1, 1),
    "class": labels.view(1, -1, 1),
}
SHUFFLES = {
    "position": lambda g: torch.rand(10, len(images), 16, generator=g).argsort(2),
    "time": lambda g: torch.rand(10, len(images), 1, generator=g).argsort(0),
    "class": lambda g: labels[torch.randperm(len(images), generator=g)].view(1, -1, 1),
}


def bits(top1, factor):
    """Mutual information of top1 (times, images, tokens) with a factor, less its floor."""
    generator = torch.Generator().manual_seed(0)

    def information(values):
        return mutual_information(top1.flatten(), values.expand(top1.shape).flatten(), num_shuffles=0).raw

    floor = [information(SHUFFLES[factor](generator)) for _ in range(5)]
    return information(FACTORS[factor]) - sum(floor) / len(floor)


def information_table(all_routes):
    """factor -> (seeds, layers)."""
    return {
        factor: torch.tensor([[bits(top1, factor) for top1 in r[..., 0]] for r in all_routes])
        for factor in FACTORS
    }


mi, mi_before = information_table(trained), information_table(untrained)
run.record("position-first", (mi["position"] - mi["class"])[:, 0])
run.record("time-over-class", (mi["class"] / mi["time"]).amax(dim=1))
run.record("depth", mi["time"][:, -1] / mi["time"][:, 0])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars on a logarithmic axis, one group a layer: information about position is the tallest everywhere, above 1 bit; information about time and class is between a hundredth and a few tenths of a bit. Open diamonds show the same before training."}, "figure": {"caption": "What the likeliest expert of a token tells about three factors, corrected by shuffling. Bars: trained, with 90 % intervals over seeds. Diamonds: the same models before training. The axis is logarithmic; values below 0.001 bit are drawn there.", "name": "fig-dit-moe-information"}}
fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for offset, (factor, colour) in enumerate(zip(FACTORS, plotting.PALETTE, strict=False)):
    mean, low, high = (v.clamp(min=1e-3) for v in plotting.mean_interval(mi[factor]))
    at = torch.arange(s.depth) + 1 + 0.27 * (offset - 1)
    ax.bar(at, mean, width=0.25, color=colour, label=factor)
    ax.errorbar(at, mean, yerr=torch.stack([mean - low, high - mean]), fmt="none", ecolor="k", capsize=2)
    ax.plot(
        at,
        mi_before[factor].mean(0).clamp(min=1e-3),
        "D",
        mfc="w",
        mec="k",
        ms=5,
        label="before training" if offset == 2 else None,
    )
ax.set(
    yscale="log",
    ylim=(1e-3, 4),
    xlabel="layer",
    ylabel="mutual information (bits)",
    xticks=range(1, s.depth + 1),
)
fig.legend(loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# Position comes first, by a wide margin. Part of that is there before training: the position code is added to the token, and even a random gate can read it. Training adds to it. On centred digits, position
# also stands for content: the corners are always black.
#
# Time and class are the close race. The paper sees a preference for the denoising step and none for the class. In this run that is so, on average, in the first two layers only; in the last two, class is
# level with time. Here both reach the gate, through the block's scale and shift and through what is seen in
# the image. Exercise 2 tells the two ways apart.
#
# The paper also reports that experts are used unevenly in the early steps of denoising, where noise is strong, and evenly after half of them. {numref}`fig-dit-moe-entropy` shows the entropy of expert use at each noise level: 3 bits if
# all 8 are used alike.

# %% tags=["hide-input"] mystnb={"image": {"alt": "One curve a layer: entropy of expert use against t, close to 3 bits in the middle. All curves bend down towards both ends, layers 1 and 2 the most, and there the bands are wide."}, "figure": {"caption": "How evenly the experts are used at each noise level; $t = 1$ is noise, where denoising starts. Bands: 90 % intervals over seeds; they are symmetric and can pass the maximum. The dashed line, the maximum, is uniform use.", "name": "fig-dit-moe-entropy"}}
use = torch.stack(
    [F.one_hot(r.flatten(2), 8).double().mean(2) for r in trained]
)  # (seeds, layers, times, experts)
entropy = -(use * use.clamp(min=1e-12).log2()).sum(-1)
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for layer in range(s.depth):
    plotting.curve(
        ax, TIMES, entropy[:, layer], f"layer {layer + 1}", plotting.PALETTE[layer % 7], "osD^v<"[layer % 6]
    )
ax.axhline(3, color="k", ls="--", lw=1)
ax.set(xlabel="noise level $t$", ylabel="entropy (bits)")
ax.legend(ncols=2)
plt.show()
run.record("early", (entropy[..., TIMES < 0.5].mean(-1) - entropy[..., TIMES > 0.8].mean(-1)).mean(-1))

# %% [markdown]
# ### Quality
#
# What did the extra parameters buy? {numref}`fig-dit-moe-cost` sets the held-out loss against the work per image. The table first adds two measures of the samples. *Class right* is the share that
# a classifier of this book assigns to the class asked for. The Fréchet distance compares that classifier's features on samples and on real images; lower is better.

# %%
losses = {name: torch.tensor([r["loss"] for r in rs]) for name, rs in results.items()}
ratio = losses["MoE"] / losses["dense, equal work"]
run.record("non-inferior", ratio)
run.record("gain", ratio)
run.record("near-total", losses["MoE"] / losses["dense, equal parameters"])

oracle = zoo.load("oracle_digits")
wanted = test.y[: s.samples]
print(f"{'':24s}{'held-out loss':22s}{'class right':22s}Fréchet distance")
for name, rs in results.items():
    right = torch.tensor([class_accuracy(oracle, r["samples"], wanted) for r in rs])
    reports = [frechet_report(oracle, r["samples"], train.x, test.x) for r in rs]
    cells = []
    for values in (losses[name], right, torch.tensor([r.value for r in reports])):
        mean, low, high = plotting.mean_interval(values)
        cells.append(f"{f'{mean:.3f} [{low:.3f}, {high:.3f}]':22s}")
    print(f"{name:24s}{''.join(cells)}")
print(f"Mean and 90 % interval, seeds {s.seeds}. Fréchet distance: {reports[0].n} samples,")
print(
    f"floor (real images) {reports[0].floor:.2f}, ceiling (noise with the right mean) {reports[0].ceiling:.1f}."
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Held-out loss against million multiply-accumulates an image. The two mixtures and the small dense model sit at the same work; the dense model with equal parameters stands three times further right."}, "figure": {"caption": "Held-out loss against the work of one forward pass. Bars: 90 % intervals over seeds; small dots: single seeds. Mixtures are drawn side by side; their work is equal. The vertical axis does not start at 0: it spans a few per cent. Seeds are paired, so differences between arms are surer than the bars suggest.", "name": "fig-dit-moe-cost"}}
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for index, name in enumerate(ARMS):
    mean, low, high = plotting.mean_interval(losses[name])
    at = macs[name] / 1e6 * (1 + 0.02 * index * name.startswith("MoE"))  # side by side
    ax.errorbar(
        at,
        mean,
        yerr=[[mean - low], [high - mean]],
        fmt="osD^v"[index],
        ms=7,
        capsize=4,
        color=plotting.PALETTE[index],
        label=name,
    )
    ax.plot([at] * len(s.seeds), losses[name], ".", color=plotting.PALETTE[index], alpha=0.6)
ax.set(xlabel="million multiply-accumulates an image", ylabel="held-out loss", xlim=(0, None))
ax.legend()
plt.show()

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three rows of ten generated digits, by the mixture and the two dense models, from the same noise and labels. The rows are nearly alike. Some digits are clear, others hard to read, and all are grainy."}, "figure": {"caption": "Samples from the same noise and for the same labels, first seed, without guidance. Not picked: the first ten of the test labels.", "name": "fig-dit-moe-samples"}}
shown = ("MoE", "dense, equal work", "dense, equal parameters")
plotting.show_images(
    torch.cat([results[name][0]["samples"][:10] for name in shown]),
    10,
    row_labels=shown,
    column_labels=wanted[:10].tolist(),
)
plt.show()

# %%
run.report()

# %% [markdown]
# **What held.** The arithmetic holds to the last weight: more experts, nearly the same work. The balance loss does what it is for. Without it, most of the unevenness of the random start stays; with it,
# little of it is left after a few hundred steps. The feared collapse, a few experts taking all, is not seen in runs this short: without the balance loss the load even evens out somewhat. In loss the
# balance matters much less: compare the two mixtures in {numref}`fig-dit-moe-cost`. Of the three factors, position tells most about the routing, in every layer.
#
# At equal work per token the mixture keeps up with the dense control, and its loss is lower by more than *gain* asks for; *near-total* holds too. Take the last two with care. They were stated for
# the longer `gpu` profile, and rest here on three short runs with one learning rate. And the dense model with equal parameters is itself no better than the small one: coming near it is then little
# to ask, and the mixture's lead cannot be put down to its parameters alone. In the samples the arms cannot be told apart: the intervals of both measures overlap.
#
# **What did not hold.** *Time over class* is contradicted: the paper's "prefers time, indifferent to class" does not carry over. In the deeper layers of {numref}`fig-dit-moe-information` class tells about as much as
# time. The likeliest reason is the label: it reaches every gate through scale and shift, and there are 10 classes here, each seen often, against 1000. Exercise 2 tried this: take the label away, and
# nearly all of the information about class goes. The test is also strict, since it asks for the factor of five in every layer.
#
# *Early* is inconclusive. In {numref}`fig-dit-moe-entropy` both ends of the way are more concentrated than the middle. From noise to the middle use does become more even, but the seeds differ widely, and
# towards the clean end it becomes uneven again. The measure averages over that end too, so the two dips cancel. A likely reason for the second is that many patches of the digits are plain black: without noise,
# their tokens differ by position only. We did not test this.
#
# **What to doubt.** *Depth* holds for the noise level: it tells less in the last layer than in the first. In the last layer, though, the seeds differ widely, and training has on average added nothing to what a
# random gate tells about time. And the paper's words, from specific preferences to dispersion, say more than this: what the choice tells about position and class does not fall with depth here.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Quality at scale.** The paper's claim is about ImageNet and models a hundred to ten thousand times larger. The runs here are short, and the data set is so small that parameters are not what it lacks.
# - **Quality on richer data.** Generated scenes with several objects, where experts could divide more than strokes, are not part of this page.
# - **Speed.** We count operations. A sparse layer also sorts and gathers, and small batches pay for that. At equal operations, a step of the mixture can take longer than one of the dense model. This page
#   does not time them.
# - **Memory.** All experts have to be kept, and on many machines tokens have to travel to them. Nothing here tests that.
# - **Position, apart from content.** In centred digits the two go together; the paper's images are less uniform.
# - **Left untried:** the paper's FID values (Fréchet inception distance on ImageNet), the benefit of the shared expert, 1, 2 or 4 of them, other values of $\alpha$, experts in the deep half only, and fine-tuning of an upcycled model.
# :::
#
# ## Exercises
#
# **1.** Upcycle without renormalising. By how much do the outputs of one feed-forward layer shrink, and why?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# All experts are equal, so the layer's output is (sum of the kept weights) times the parent's. A fresh gate with weights of
# standard deviation 0.02 is nearly uniform: the sum is a little above k / E = 1/4. Each block loses most of its
# feed-forward network at once, and the model's outputs move away from the parent's. Training has to win that back.
plain = upcycle_moe(parent, num_experts=8, k=2, renormalize=False, generator=torch.Generator().manual_seed(0))
h = torch.randn(100, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    shrink = plain.blocks[0].mlp(h) / parent.blocks[0].mlp(h)
    change = (plain(*inputs) - parent(*inputs)).norm() / parent(*inputs).norm()
print(f"output of one layer over its parent's: {shrink.min():.3f} to {shrink.max():.3f}; k / E = {2 / 8}")
print(f"relative change of the whole model's output: {change:.2f}")

# %% [markdown]
# **2.** A gate can learn the class from the label, which reaches it through scale and shift, or from what is seen in the image. Which is it? Hint: run the same images with the null label, 10.
# The solution does so for the first seed.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# With the null label only the image is left to tell the class. What remains of the information came from the image; what
# is gone came from the label.
without_label = information_table([routes(results["MoE"][0]["model"], torch.full_like(labels, 10))])["class"][
    0
]
for layer in range(s.depth):
    print(
        f"layer {layer + 1}: {mi['class'][0, layer]:.4f} bit with the label, {without_label[layer]:.4f} bit without"
    )

# %% [markdown]
# **3.** What is the balance loss if all tokens go to the same two of 8 experts, and the gate is sure of it? How does that compare with uniform load?
#
# :::{dropdown} Solution 3: in words
# The two experts share all token-slots, so $f_i = 8 \cdot \tfrac12 = 4$ for them and 0 for the rest. If the gate is sure, their $P_i$ add up to 1. Then $L = \alpha \sum_i P_i f_i = 4 \alpha$, four times the value at uniform load. With
# $\alpha = 0.01$ that is 0.04 a layer, small beside the flow-matching loss. {numref}`fig-dit-moe-load` shows that it is enough.
# :::
#
# ## References
#
# The method: {cite:t}`dit-moe`, with its code [feizc/DiT-MoE](https://github.com/feizc/DiT-MoE) (`models.py`, `upcycle.py`, `diffusion/rectified_flow.py` and `analysis/` were read). Sparse gates: {cite:t}`shazeer2017outrageously`; the balance loss: {cite:t}`fedus2022switch`. The
# backbone: {cite:t}`peebles2023scalable`. Flow matching: {cite:t}`lipman2023flow`, {cite:t}`liu2023flow`. The library's layer:
# [minilib/models/moe.py](https://github.com/minilib-book/minilib/blob/main/minilib/models/moe.py).
