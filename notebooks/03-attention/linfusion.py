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
# # LinFusion: linear attention that survives a larger canvas
#
# {cite:t}`linfusion` replace the self-attention of a text-to-image U-Net by linear attention with weights that sum to one. Only these layers are trained. The network then draws pictures much larger than those it was trained on, at a cost in proportion to their area.
#
# The page asks what carries that: the normalisation, the learned features, or the three terms of the loss.

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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilib import zoo
from minilib.arms import run_arms
from minilib.attention import CrossAttention, replace_attention
from minilib.attention.generalised import GeneralisedLinearAttention, generalised_linear_flops
from minilib.bench import times
from minilib.costs import attention_flops, fit_exponent, linear_flops
from minilib.data import shapes
from minilib.data.teacher_scenes import load_teacher_scenes, teacher_batches
from minilib.inheritance import train_only
from minilib.intervene import record_outputs, scale_outputs
from minilib.losses import uniform_timesteps
from minilib.metrics import mean_scores, psnr_to_reference, read_in_batches, scene_scores
from minilib.models import UNet
from minilib.models.positions import sincos_2d
from minilib.models.unet_blocks import SpatialTransformer
from minilib.models.unet_configs import UNET_CONFIGS
from minilib.plotting import PALETTE, mean_interval, use_style
from minilib.profiling import count_flops, count_parameters
from minilib.recipes.scenes import ddim_scheduler, draw_scenes, unet_scheduler
from minilib.reproduction import Reproduction
from minilib.students import StudentLoss, prediction_errors
from minilib.training import FitConfig, fit


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each: training order, held-out noise, captions and sampling noise of its own
    steps: int  # of distillation
    batch: int
    judged: int  # held-out pictures of the final errors
    captions: int  # drawn at 1x and 2x
    large: int  # of these, drawn at 4x
    sampling: int  # steps of DDIM
    timed: tuple[int, ...]  # sides of grids of tokens
    repeats: int  # of each timing
    jobs: int  # processes


run = Reproduction(
    "linfusion",
    profile,
    {
        "smoke": Settings((0,), 2, 2, 4, 2, 1, 2, (8, 16, 32), 2, 1),
        "cpu": Settings((0, 1, 2), 150, 16, 128, 24, 6, 20, (16, 24, 32, 48, 64), 3, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 5000, 32, 128, 128, 32, 25, (16, 24, 32, 48, 64, 96), 5, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The teacher is the zoo's `unet_shapes32`: a text U-Net with the blocks of Stable Diffusion {cite:p}`ldm`, for scenes of $32 \times 32$ pixels. It has eleven layers of self-attention, over 64 and 16 tokens. The training pictures are drawn by another model of the zoo, so that no data set is needed; the paper takes real pictures.

# %%
run.show_settings()

# %% [markdown]
# (sec-linfusion-idea)=
# ## The idea
#
# In softmax attention the weights of a query sum to one, whatever the number of keys. So its output is a mean of values, and stays of the size of a value. Many linear mixers lack this. Their output is a *sum*, and grows with the number of tokens. Trained at one size, they fail at another.
#
# LinFusion asks for two properties. The weights shall be **normalised**. And the mixing shall be **non-causal**: pixels have no order, and scanning them one after the other invents one. Its layer has both. With $x$ the tokens,
#
# $$
# q = W_q\,(x + f_q(x)), \qquad k = W_k\,(x + f_k(x)), \qquad v = W_v\, x ,
# $$ (eq-linfusion-features)
#
# $$
# o_i = W_o\; \frac{\phi(q_i)^\top \big( \tfrac1N \sum_j \phi(k_j)\, v_j^\top \big)}{\phi(q_i)^\top \big( \tfrac1N \sum_j \phi(k_j) \big) + 10^{-4}} , \qquad \phi(z) = \mathrm{ELU}(z) + 1 .
# $$ (eq-linfusion-layer)
#
# $f_q$ and $f_k$ are small networks: linear, layer norm, leaky ReLU, linear. $W_q, W_k, W_v, W_o$ start as the teacher's. Both sums are means over the $N$ tokens, so nothing overflows in half precision, and the constant $10^{-4}$ means the same for each $N$.
#
# All else in the U-Net stays frozen. The new layers learn from three terms:
#
# $$
# \mathcal L = \mathcal L_{\text{data}} + 0.5\, \lVert \hat v_S - \hat v_T \rVert^2 + 0.5\, \operatorname*{mean}_{\text{layers}} \lVert a_S - a_T \rVert^2 ,
# $$ (eq-linfusion-loss)
#
# with the predictions $\hat v$ of student and teacher, and the outputs $a$ of their attention layers.
#
# :::{admonition} In the released code
# :class: tip
# [`attention.py`](https://github.com/Huage001/LinFusion/blob/main/src/linfusion/attention.py) is {eq}`eq-linfusion-layer`. As we read [`distill.py`](https://github.com/Huage001/LinFusion/blob/main/src/train/distill.py), it mounts fresh layers, so that $W_q$ to $W_o$ start at random although a helper exists that takes over the old ones. We follow the paper. The last layer of $f$ has torch's usual start there; ours starts at zero, so that the layer is plain linear attention at first.
# :::
#
# (sec-linfusion-method)=
# ## The method
#
# The core in four lines, and two rivals that break one property each: without the division, and causal, where a token sums over those before it only.


# %%
def phi(x):
    return F.elu(x) + 1


def normalised(q, k, v):
    """(b h n d), non-causal; eq. of the layer, between the projections."""
    state, mean_key = phi(k).transpose(-1, -2) @ v / k.shape[2], phi(k).mean(2, keepdim=True)
    return (phi(q) @ state) / (phi(q) @ mean_key.transpose(-1, -2) + 1e-4)


def unnormalised(q, k, v):
    return phi(q) @ (phi(k).transpose(-1, -2) @ v)


def causal(q, k, v):
    """Normalised over the tokens up to the query's own."""
    states = (phi(k)[..., :, None] * v[..., None, :]).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", phi(q), states) / (phi(q) * phi(k).cumsum(2)).sum(-1, keepdim=True)  # fmt: skip


# %% [markdown]
# What happens when each token is there $r$ times, as when a picture is enlarged? And when the order of the tokens changes? All in double precision.

# %%
generator, r = torch.Generator().manual_seed(7), 4
qkv = [torch.randn(2, 4, 64, 12, generator=generator, dtype=torch.float64) for _ in range(3)]
order = torch.randperm(64, generator=generator)


def apart(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


replicated, permuted = {}, {}
for mix in (normalised, unnormalised, causal):
    once, name = mix(*qkv), mix.__name__
    again = mix(*(part.repeat_interleave(r, 2) for part in qkv))
    replicated[name] = (apart(again, once.repeat_interleave(r, 2)), float((again / once.repeat_interleave(r, 2)).median()))  # fmt: skip
    permuted[name] = apart(mix(*(part[:, :, order] for part in qkv)), once[:, :, order])
    print(f"{name:13s} each token {r} times: change {replicated[name][0]:.1e}, output x {replicated[name][1]:.3f};   order changed: {permuted[name]:.1e}")  # fmt: skip
run.record("replication", replicated["normalised"][0])
run.record("replication-sum", abs(replicated["unnormalised"][1] - r))
run.record("order", permuted["normalised"])
run.record("order-causal", permuted["causal"])

# %% [markdown]
# The library's layer adds the projections and the networks $f$. It takes over what the old layer had. Here it replaces every self-attention of Stable Diffusion 1.5, on torch's *meta* device, where tensors have shapes but no values.


# %%
# NBVAL_CHECK_OUTPUT
def self_attention(name, _=None):
    return name.endswith("attn1")


def to_linear(model, **options):
    """In place: every self-attention becomes LinFusion's layer, with the projections it had."""
    return replace_attention(
        model, self_attention, lambda _, layer: GeneralisedLinearAttention.from_attention(layer, **options)
    )


with torch.device("meta"):
    sd, lin = UNet(**UNET_CONFIGS["SD 1.5"]), UNet(**UNET_CONFIGS["SD 1.5"])
    done = to_linear(lin)
widths = [sd.get_submodule(name).to_out.out_features for name in done.replaced]
expected = sum(2 * (2 * d**2 + 4 * d) for d in widths)
added = count_parameters(lin) - count_parameters(sd)
run.record("parameters", abs(added - expected))
print(f"SD 1.5: {len(widths)} layers of widths {sorted(set(widths))}: {added:,} new parameters, {added / count_parameters(sd):.1%} of {count_parameters(sd):,}")  # fmt: skip

# %% [markdown]
# And the cost? A softmax layer takes $4 N D^2 + 2 N^2 D$ multiply-accumulates (MACs). LinFusion's takes $8 N D^2$ for projections and networks, and $2 N D^2 / h + N D$ for the core. We compare the formulas with torch's counter at the first level of Stable Diffusion 1.5 ($D = 320$, eight heads), from 512 to 16,384 pixels.


# %%
def layer_macs(kind, tokens, width=320, heads=8):
    """(by formula, by torch's counter on the meta device)"""
    with torch.device("meta"):
        layer = (GeneralisedLinearAttention if kind == "linear" else CrossAttention)(width, num_heads=heads)
        x = torch.empty(1, tokens, width)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    if kind == "linear":
        formula = generalised_linear_flops(1, tokens, width, heads)
    else:
        formula = linear_flops(tokens, width, 4 * width) + attention_flops(1, heads, tokens, tokens, width // heads)  # fmt: skip
    return formula // 2, counter.get_total_flops() // 2


PIXELS = (512, 1024, 2048, 4096, 8192, 16384)
tokens = [(side // 8) ** 2 for side in PIXELS]
macs = {kind: [layer_macs(kind, n) for n in tokens] for kind in ("softmax", "linear")}
run.record("macs", max(abs(a - b) for pairs in macs.values() for a, b in pairs))
core = [2 * n * n * 320 for n in tokens]
run.record("slope-linear", fit_exponent(tokens, [b for _, b in macs["linear"]]).value)
run.record("slope-softmax", fit_exponent(tokens, [b - 4 * n * 320**2 for n, (_, b) in zip(tokens, macs["softmax"], strict=True)]).value)  # fmt: skip
whole = {}
for side in PIXELS:
    with torch.device("meta"):
        inputs = torch.empty(1, 4, side // 8, side // 8), torch.empty(1), torch.empty(1, 77, 768)
    whole[side] = [count_flops(net, *inputs).macs for net in (sd, lin)]
print("pixels   one layer: softmax / linear     whole U-Net: softmax / linear    weights of a layer, fp16")
for side, n, a, b in zip(PIXELS, tokens, macs["softmax"], macs["linear"], strict=True):
    print(
        f"{side:6d} {a[1] / b[1]:18.2f} {whole[side][0] / whole[side][1]:29.2f} {2 * 8 * n * n / 1e9:30,.1f} GB"
    )
run.record("unet-16k", whole[16384][0] / whole[16384][1])

# %% [markdown]
# The last column is what a layer would need that stores its weights; a fused softmax does not. The linear layer's state has $40 \times 40$ numbers a head at every size.
#
# ### Our U-Net, and a larger canvas
#
# How much does our teacher need its self-attention? We take it out and look how far the prediction moves. This is the yardstick for all errors below: **1 is the error of having no self-attention.**

# %%
teacher = zoo.load("unet_shapes32").to(run.device).requires_grad_(False)
LAYERS = [name for name, _ in teacher.named_modules() if self_attention(name)]
scenes, scheduler = load_teacher_scenes(), unet_scheduler()


def held_out(seed, n=None):
    """Pictures of held-out captions with fixed noise and times."""
    x, y = scenes.images[scenes.held_out][:n], scenes.tokens[scenes.held_out][:n]
    g = torch.Generator().manual_seed(10_000 + seed)
    batch = {"x0": x, "y": y, "t": torch.randint(1000, (len(x),), generator=g)}
    return {k: v.to(run.device) for k, v in (batch | {"noise": torch.randn(x.shape, generator=g)}).items()}


def error_without(seed):
    with scale_outputs(teacher, dict.fromkeys(LAYERS, 0.0)):
        x_t = scheduler.add_noise(*(held_out(seed, s.judged)[k] for k in ("x0", "noise", "t")))
        without = teacher(x_t, held_out(seed, s.judged)["t"], held_out(seed, s.judged)["y"])
    full = teacher(x_t, held_out(seed, s.judged)["t"], held_out(seed, s.judged)["y"])
    return float((without - full).square().sum() / full.square().sum())


with torch.no_grad():
    yardstick = {seed: error_without(seed) for seed in s.seeds}
print("without self-attention, relative squared error of the prediction:", *(f"{e:.4f}" for e in yardstick.values()))  # fmt: skip

# %% [markdown]
# It is about one per cent. This U-Net could nearly do without: its convolutions and the text do most of the work. So no choice of attention can ruin its pictures at the size of training. What is left to see is which layer stays near, and which one breaks on a larger canvas.
#
# A detail is unlike Stable Diffusion, whose transformers have no positions. Ours add a fixed sine-cosine code to each token. On a larger grid there would be codes that were never seen. So at twice the size we stretch the code: each position is interpolated between those of training.


# %%
@contextmanager
def stretched(factor):
    """Positions of the grid of training, stretched over a grid ``factor`` times as large, as long as the block lasts."""
    usual = SpatialTransformer.grid_positions

    def grid_positions(self, height, width, like):
        rows, columns = height // factor, width // factor
        small = sincos_2d(like.shape[-1], rows, columns).to(like)
        image = small.T.reshape(1, -1, rows, columns)
        return F.interpolate(image, size=(height, width), mode="bilinear")[0].flatten(1).T

    SpatialTransformer.grid_positions = grid_positions
    try:
        yield
    finally:
        SpatialTransformer.grid_positions = usual


def draw(model, tokens, factor, seed, steps):
    with stretched(factor):
        return draw_scenes(
            model, tokens, ddim_scheduler(), size=32 * factor, steps=steps, seed=seed, batch=16
        )


# %% [markdown]
# ## The experiment
#
# All students start with the teacher's weights and train their self-attention only, with the same pictures, noise and steps. Each arm differs from *LinFusion* in one thing.
#
# The un-normalised arm needs a word. A sum over $N$ tokens would be far too large from the start, so we multiply it with a constant, $1 / (N d)$ with $N$ of training and $d$ the width of a head. This is about what the division does there. So both begin alike at the size of training.


# %%
class Arm(NamedTuple):
    normalise: bool = True
    features: bool = True  # the networks f
    noise: float = 0.5  # weights of the two extra terms
    attention: float = 0.5


ARMS = {
    "LinFusion": Arm(),
    "un-normalised": Arm(normalise=False),
    "no networks f": Arm(features=False),
    "no attention term": Arm(attention=0.0),
    "data term only": Arm(noise=0.0, attention=0.0),
}
with torch.no_grad(), record_outputs(teacher, LAYERS) as seen:
    teacher(torch.zeros(1, 3, 32, 32), torch.zeros(1), teacher.null_tokens(1))
TOKENS = {name: outputs[0].shape[1] for name, outputs in seen.items()}


def new_student(arm):
    model = zoo.load("unet_shapes32")

    def factory(name, layer):
        scale = 1.0 if arm.normalise else layer.num_heads / (TOKENS[name] * layer.to_out.out_features)
        return GeneralisedLinearAttention.from_attention(
            layer, normalise=arm.normalise, scale=scale, features=arm.features
        )

    replace_attention(model, self_attention, factory)
    train_only(model, r"attn1\.")
    return model.to(run.device)


class Result(NamedTuple):
    error: float  # to the teacher's prediction, in units of the yardstick
    drift: float  # RMS of the attention's outputs at 2x over that at 1x, mean over the layers
    scores: dict[int, dict[str, float]]  # by enlargement
    images: dict[int, torch.Tensor]
    model: nn.Module


@torch.no_grad()
def spread_of_layers(model, batch, factor):
    """Root mean square of each attention layer's output around its mean."""
    x0 = F.interpolate(batch["x0"], scale_factor=factor, mode="bilinear") if factor > 1 else batch["x0"]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(x0)
    with stretched(factor), record_outputs(model, LAYERS) as seen:
        model(scheduler.add_noise(x0, noise, batch["t"]), batch["t"], batch["y"])
    return torch.stack([outputs[0].std() for outputs in seen.values()])


def captions(seed):
    g = torch.Generator().manual_seed(20_000 + seed)
    return shapes.sample_scenes(s.captions, g, objects=(1, 3), split="test")


def judge(model, seed, enlargements):
    """Errors, drift, and pictures at 1x and larger with what the judge reads in them, shrunk to 32 pixels."""
    model, wanted, few = model.eval(), captions(seed), slice(0, s.large)
    error = (
        prediction_errors(scheduler, model, teacher, held_out(seed, s.judged))["teacher"] / yardstick[seed]
    )
    small, large = (spread_of_layers(model, held_out(seed, min(32, s.judged)), factor) for factor in (1, 2))
    images, scores = {}, {}
    for factor in enlargements:
        part = few if factor == 4 else slice(None)
        images[factor] = draw(
            model, shapes.tokens(wanted)[part].to(run.device), factor, seed, s.sampling
        ).cpu()
        read = read_in_batches(
            zoo.load("oracle_shapes32"), F.interpolate(images[factor], size=32, mode="area")
        )
        scores[factor] = mean_scores(scene_scores(read, wanted[part]))
    return Result(error, float((large / small).mean()), scores, images, model)


def train(name, seed):
    sizes = (1, 2, 4) if name in ON_A_LARGER_CANVAS else (1,)
    if name in REFERENCES:
        model = zoo.load("unet_shapes32").to(run.device) if name == "teacher" else new_student(Arm())
        return judge(model, seed, sizes)
    arm = ARMS[name]
    model = new_student(arm)
    weights = {"noise": arm.noise, "features": arm.attention, "layers": LAYERS if arm.attention else ()}
    config = FitConfig(s.steps, s.batch, lr=1e-3, warmup=10, ema_decay=0.9, seed=seed)
    batches = teacher_batches(scenes, uniform_timesteps())
    return judge(fit(model, StudentLoss(scheduler, teacher, **weights), batches, config).ema, seed, sizes)


REFERENCES = ("teacher", "swapped, not trained")
ON_A_LARGER_CANVAS = ("teacher", "LinFusion", "un-normalised")  # the pictures take most of the time
results = run_arms(train, {name: name for name in (*REFERENCES, *ARMS)}, s.seeds, s.jobs)


def values(arm, what):
    """One number a seed: 'error', 'drift', or (enlargement, score)."""
    rows = results[arm]
    numbers = [getattr(row, what) if isinstance(what, str) else row.scores[what[0]][what[1]] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64)


KEYS = {"scene right 1x": (1, "scene"), "colour 1x": (1, "colour"), "2x": (2, "colour"), "4x": (4, "colour")}
print(f"{'':21s} error / none   drift" + "".join(f"{name:>16s}" for name in KEYS))
for arm in results:
    shown = [key for key in KEYS.values() if arm in ON_A_LARGER_CANVAS or key[0] == 1]
    shares = "".join(f"{float(values(arm, key).mean()):16.2f}" for key in shown)
    print(f"{arm:21s} {values(arm, 'error').mean():12.5f} {values(arm, 'drift').mean():7.2f}{shares}")

# %% [markdown]
# ## Results
#
# ### A larger canvas
#
# At twice and four times the size no network here draws one large scene. It repeats small objects, as U-Nets do far from their training size. So we do not count objects. We shrink each picture to 32 pixels and ask: is there something in the right place that has the right **colour**?

# %%
run.record("drift", values("LinFusion", "drift"))
run.record("drift-sum", values("un-normalised", "drift"))
run.record("canvas-2x", values("LinFusion", (2, "colour")) - values("un-normalised", (2, "colour")))
run.record("canvas-4x", values("LinFusion", (4, "colour")) - values("un-normalised", (4, "colour")))
run.record("as-teacher-2x", values("LinFusion", (2, "colour")) - values("teacher", (2, "colour")))
run.record("as-teacher-1x", values("LinFusion", (1, "scene")) - values("teacher", (1, "scene")))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Nine panels, each with four scenes of coloured shapes. Teacher and LinFusion look alike at all sizes: single shapes at 32 pixels, clusters of smaller ones in the same places and colours at 64, of still smaller ones at 128. Un-normalised: the same at 32, nearly the same at 64, and at 128 coloured noise over the whole canvas."}, "figure": {"caption": "The same four captions (two by two in each panel) and seed at one, two and four times the size of training. Samples, not chosen.", "name": "fig-linfusion-canvas"}}
rows = [(arm, factor) for arm in ("teacher", "LinFusion", "un-normalised") for factor in (1, 2, 4)]
columns = min(4, s.large)
fig, axes = plt.subplots(3, 3, figsize=(7, 2.1 * 3 * columns / 8 * 1.9), layout="constrained", squeeze=False)
for ax, (arm, factor) in zip(axes.flat, rows, strict=True):
    images = results[arm][0].images[factor][:columns]
    size = (128, 128)
    strip = torch.cat(list(F.interpolate(images, size=size, mode="nearest")), dim=2)
    if columns == 4:  # two rows of two
        strip = torch.cat([strip[:, :, :256], strip[:, :, 256:]], dim=1)
    ax.imshow(((strip + 1) / 2).permute(1, 2, 0).clamp(0, 1))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
for ax, factor in zip(axes[0], (1, 2, 4), strict=True):
    ax.set_title(f"{32 * factor} x {32 * factor} pixels", fontsize=9)
for ax, arm in zip(axes[:, 0], ("teacher", "LinFusion", "un-normalised"), strict=True):
    ax.set_ylabel(arm, fontsize=9)
plt.show()

# %% [markdown]
# This is the picture to remember. At the size of training nobody could tell the three apart. At four times the size the un-normalised student draws noise. The layer that divides by the sum of its weights goes wherever the teacher goes, its repeated objects included.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: spread of the attention's outputs against the side of the picture. Un-normalised rises from 1 to 4 to 19; teacher and LinFusion lie on each other, at most 1.2. Right: share of objects with the right colour in place. All start at 1; at twice the size 0.88, 0.89 and 0.79; at four times 0.78, 0.69 and 0.12."}, "figure": {"caption": "Left: how much larger the attention's outputs become with the canvas (one seed, mean over eleven layers). Right: what the judge finds. Bands: 90 % intervals over three seeds; at four times the size each seed has six pictures.", "name": "fig-linfusion-drift"}}
fig, axes = plt.subplots(1, 2, figsize=(6.8, 2.9), layout="constrained")
STYLE = {"teacher": ("0.35", "s"), "LinFusion": (PALETTE[0], "o"), "un-normalised": (PALETTE[1], "^")}
for arm, (colour, marker) in STYLE.items():
    batch = held_out(s.seeds[0], min(8, s.judged))
    spread = [spread_of_layers(results[arm][0].model, batch, factor) for factor in (1, 2, 4)]
    axes[0].plot(
        (1, 2, 4), [float((x / spread[0]).mean()) for x in spread], marker + "-", color=colour, label=arm
    )
    mean, low, high = mean_interval(torch.stack([values(arm, (f, "colour")) for f in (1, 2, 4)], 1))
    axes[1].plot((1, 2, 4), mean, marker + "-", color=colour, label=arm)
    axes[1].fill_between((1, 2, 4), low, high, color=colour, alpha=0.15, lw=0)
axes[0].set(ylabel="spread of attention's outputs, relative to 1x", yscale="log")
axes[0].set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
axes[1].set(ylabel="right colour in place", ylim=(0, 1.05))
for ax in axes:
    ax.set(xlabel="side of the picture, in units of training", xscale="log")
    ax.set_xticks((1, 2, 4), ("1", "2", "4"))
    ax.minorticks_off()
axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
# Four times as many tokens, four times the output: the sum does what the exact claim says, through a whole trained network. At twice the size the U-Net still bears it; the difference in pictures is ten points, just short of the threshold of the card (*weaker*). At four times the size the outputs are nineteen times too large, and nothing is left.
#
# The teacher's softmax drifts by nine per cent itself, since a larger canvas shows it other pictures. LinFusion drifts by as much, to the third digit. At four times the size it is nine points behind the teacher, on six pictures a seed; that was not a claim, and the intervals overlap.
#
# ### What the training adds

# %%
run.record("distil", values("swapped, not trained", "error") / values("LinFusion", "error"))
run.record("terms", values("data term only", "error") / values("LinFusion", "error"))
run.record("attention-term", values("no attention term", "error") / values("LinFusion", "error"))
run.record("networks", values("no networks f", "error") / values("LinFusion", "error"))
run.record("norm-error", values("un-normalised", "error") / values("LinFusion", "error"))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six points with intervals on a logarithmic scale. LinFusion at 0.0013, no networks f at 0.0017, un-normalised at 0.0019. Far to the right: swapped and not trained, and no attention term, both at 0.010; data term only at 0.017."}, "figure": {"caption": "Error of the prediction to the teacher's, held-out pictures, in units of the error of having no self-attention at all. Bars: 90 % intervals over three seeds.", "name": "fig-linfusion-terms"}}
fig, ax = plt.subplots(figsize=(6.2, 2.6), layout="constrained")
names = [arm for arm in results if arm != "teacher"]
mean, low, high = mean_interval(torch.stack([values(arm, "error") for arm in names], 1))
for i, arm in enumerate(names):
    colour = PALETTE[0] if arm == "LinFusion" else "0.45"
    ax.plot([max(float(low[i]), 1e-5), high[i]], [i, i], color=colour, lw=2)
    ax.plot(mean[i], i, "o", color=colour, ms=6)
ax.set_yticks(range(len(names)), names)
ax.invert_yaxis()
ax.set(xscale="log", xlabel="error to the teacher, in units of having no self-attention")
plt.show()

# %% [markdown]
# The swap itself costs little here: one per cent of what self-attention does. Plain ELU + 1 with the teacher's projections is already close. Training brings that down eightfold.
#
# Nearly all of it is the work of the **attention term**. Without it the student is no nearer than it was untrained. It may lower the error of the final prediction in other ways than by answering as the teacher's attention does, and at once it drifts. With the data term alone it ends *further* away than it began: the pictures were drawn by another model, and it learns these. That is no fault against the data; but the teacher is what a plug-in was made for.
#
# Without the networks $f$ the error is a third larger. Without the normalisation it is half as large again, even at the size of training.
#
# ### The rival: fewer steps
#
# A cheaper layer saves operations. So does a shorter sampler, with the teacher as it is. At four times the size ($128 \times 128$ pixels, up to 1,024 tokens a layer) we count both networks, give the teacher as many steps as the student's operations pay for, rounded up, and compare pictures: which is nearer to the teacher with all steps?

# %%
inputs = torch.zeros(1, 3, 128, 128), torch.zeros(1), teacher.null_tokens(1)
work = {}
for factor in (1, 2, 4):
    x = torch.zeros(1, 3, 32 * factor, 32 * factor)
    work[factor] = [
        count_flops(net.cpu(), x, torch.zeros(1), teacher.null_tokens(1)).macs
        for net in (zoo.load("unet_shapes32"), new_student(Arm()))
    ]
    print(f"{32 * factor:4d} pixels: teacher {work[factor][0] / 1e6:8.0f} MMAC a call, student {work[factor][1] / 1e6:8.0f}, ratio {work[factor][0] / work[factor][1]:.2f}")  # fmt: skip
fewer = min(s.sampling, -(-s.sampling * work[4][1] // work[4][0]))
gain = []
for i, seed in enumerate(s.seeds):
    asked = shapes.tokens(captions(seed))[: s.large].to(run.device)
    goal, ours = results["teacher"][i].images[4], results["LinFusion"][i].images[4]
    rival = draw(teacher, asked, 4, seed, fewer).cpu()
    psnr = [float(psnr_to_reference(x, goal).mean()) for x in (ours, rival)]
    gain.append(psnr[0] - psnr[1])
    print(
        f"seed {seed}: LinFusion {s.sampling} steps {psnr[0]:.1f} dB, teacher {fewer} steps {psnr[1]:.1f} dB"
    )
run.record("fewer-steps", gain)

# %% [markdown]
# ### Time

# %%
layers = {"softmax": CrossAttention(320, num_heads=8), "linear": GeneralisedLinearAttention(320, 8)}
calls, keys = [], []
for side in s.timed:
    x = torch.randn(1, side * side, 320)
    for kind, layer in layers.items():
        keys.append((kind, side))
        calls.append(lambda layer=layer, x=x: layer(x))
with torch.inference_mode():
    seconds = [times(calls, repeats=s.repeats, min_seconds=0.01) for _ in s.seeds]
ratios = {side: torch.tensor([row[keys.index(("softmax", side))] / row[keys.index(("linear", side))] for row in seconds]) for side in s.timed}  # fmt: skip
for side, ratio in ratios.items():
    print(f"{side * side:5d} tokens of width 320, one thread: softmax / linear, time {ratio.mean():.2f}, operations {layer_macs('softmax', side * side)[0] / layer_macs('linear', side * side)[0]:.2f}")  # fmt: skip
run.record("speed", ratios[s.timed[-1]])

# %% [markdown]
# The layer saves time from about 600 tokens on, where the counted operations say 680; at 4,096 tokens, the first level of Stable Diffusion at 512 pixels, it is four times as fast, on this machine and against a fused softmax. In the whole U-Net at 512 pixels that is little: nine per cent of the operations. The saving starts at 1,024 pixels and above.
#
# The rival wins clearly. At 128 pixels the student saves a quarter of the operations. The teacher with 15 steps in the place of 20 costs as much, and its pictures are 11 dB nearer. At this size a step is the cheapest thing to leave out. At 16K pixels the count is 172 to one, and no sampler has 172 steps to spare. That is where the method belongs.
#
# ### The claims

# %%
run.report()

# %% [markdown]
# **What held.** All exact claims, at the real sizes. Outputs that keep their scale on a larger canvas, and grow without the normalisation. Pictures at four times the size. As good as the teacher at one and two times the size. Each part of the method, taken away alone, leaves a larger error.
#
# **What held less.** At twice the size the normalisation is worth ten points of right colours, a hair below the threshold.
#
# **What did not.** The student against fewer steps: contradicted, as expected after the pilot.
#
# ## What this does not show
#
# - A network that needs its self-attention. Ours changes by one per cent without it. In Stable Diffusion, self-attention carries the layout; there a poor replacement shows in the pictures.
# - Large pictures that are good. The authors reach 16K pixels by starting from an upscaled small picture. Ours repeat objects, with softmax too.
# - ControlNet, IP-Adapter and other plug-ins, which are reported to work unchanged.
# - Real pictures, long training, people's judgement.
#
# ## Exercises
#
# 1. The released code multiplies both $\phi(k)$ and $v$ with $N^{-1/2}$ before their product, instead of dividing the product by $N$. In exact arithmetic that is the same. Why do it? Try half precision with 1,000,000 tokens of value 1.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# A sum of a million ones leaves the range of fp16, which ends at 65,504. The products of the scaled factors are 1e-6 each: their
# sum stays at 1. (They lie among fp16's subnormal numbers, so some digits are lost: the sum is taken in fp32 inside a matrix product.)
n = 1_000_000
k, v = torch.ones(1, n, dtype=torch.half), torch.ones(n, 1, dtype=torch.half)
print("product, then division:", float((k.float() @ v.float()).half() / n), "  scaled first:", f"{float((k * n**-0.5).float() @ (v * n**-0.5).float()):.3f}")  # fmt: skip

# %% [markdown]
# 2. At which number of tokens is LinFusion's layer cheaper than softmax, for $D = 320$ and eight heads? And without the networks $f$?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# NBVAL_CHECK_OUTPUT
# 4 N D^2 + 2 N^2 D > 8 N D^2 + 2 N D^2 / h + N D  means  N > 2 D + D / h + 1/2; without f, N > D / h + 1/2.
print("with f: more than", 2 * 320 + 320 // 8, "tokens; without:", 320 // 8)

# %% [markdown]
# ## References
#
# The method: {cite:t}`linfusion`, with its code [Huage001/LinFusion](https://github.com/Huage001/LinFusion) (`src/linfusion/attention.py`, `src/train/distill.py`). Linear attention: {cite:t}`katharopoulos2020transformers`. Stable Diffusion: {cite:t}`ldm`. The library's parts: [minilib/attention/generalised.py](https://github.com/minilib-book/minilib/blob/main/minilib/attention/generalised.py), [minilib/students.py](https://github.com/minilib-book/minilib/blob/main/minilib/students.py), [minilib/data/teacher_scenes.py](https://github.com/minilib-book/minilib/blob/main/minilib/data/teacher_scenes.py).
