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
# # ViDiT-Q: four ways in which an activation varies
#
# To compute with few bits, the numbers that enter a linear layer have to be rounded too, not only its weights. In a diffusion transformer these numbers differ in size from token to token, from step to step, with and without the caption, and most of all from channel to channel. {cite:t}`vidit-q` give each
# token a range of its own, move large channels into the weights, and spend bits where they matter. Nothing is trained.

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
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from IPython.display import Markdown, display
from torch import nn

from minilib import zoo
from minilib.arms import run_arms
from minilib.data import shapes
from minilib.kernels.quant import IntegerLinear, has_vnni
from minilib.metrics import frechet_report, psnr_to_reference, read_in_batches, scene_scores
from minilib.models import DiT, MMDiT
from minilib.models.configs import DIT_CONFIGS
from minilib.models.mmdit_configs import SD3_CONFIGS
from minilib.plotting import PALETTE, curve, mean_interval, show_images, use_style
from minilib.profiling import count_parameters, cpu_time
from minilib.quantization import (
    Chain,
    HadamardRotation,
    QuantRule,
    QuantSpec,
    TimeRanges,
    allocate_bits,
    allocate_by_group,
    allocate_in_order,
    audit_variation,
    calibrate,
    channel_balance,
    fold_balance,
    gain_per_bit,
    inject_outliers,
    mean_bits,
    modulated_inputs,
    quantize_model,
    rotation_cost,
    round_to_grid,
    select_layers,
    sensitivity,
    spec_grid,
    watch_channels,
    weight_memory,
)
from minilib.quantization.audit import Call
from minilib.quantization.model import run_call
from minilib.quantization.sensitivity import relative_error
from minilib.recipes.scenes import draw_scenes, flow_scheduler
from minilib.reproduction import Reproduction


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each has captions, noise, calibration and signs of its own
    images: int  # a seed, without guidance, for the distance to the unrounded model
    guided: int  # a seed, with guidance, for what is in the picture
    steps: int  # of Euler's method
    calibration: int  # captions that set ranges and factors
    probe: int  # every so many-th call of the calibration measures sensitivities
    alphas: tuple[float, ...]  # how much of the imbalance goes into the weights
    timings: int  # repetitions
    jobs: int  # processes


run = Reproduction(
    "vidit-q",
    profile,
    {
        "smoke": Settings((0,), 2, 4, 3, 2, 2, (0.11, 0.5), 1, 1),
        "cpu": Settings((0, 1, 2), 12, 24, 10, 8, 4, (0.0, 0.11, 0.3, 0.5, 0.625, 0.8, 1.0), 3, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 128, 200, 28, 32, 4, (0.0, 0.11, 0.3, 0.5, 0.625, 0.8, 1.0), 3, 1),
    },
)
s = run.settings
use_style()
torch.set_grad_enabled(False)
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is this book's text-to-image transformer with two streams, an MM-DiT {cite:p}`esser2024scaling`: 64 image tokens and up to 18 text tokens, 96 channels, 6 blocks. There is a version for 32 x 32 pixels too. We take the one for 16 x 16: the method acts on one token at a time, and a fourth of the tokens buys
# four times as many combinations of method, bit-width and seed.

# %%
run.show_settings()

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("mmdit_shapes").to(run.device)
side = model.config["mmdit"]["sample_size"]
LAYERS = list(select_layers(model, ["denoiser.blocks.*.attn.*", "denoiser.blocks.*.*mlp.*"]))
stressed, _ = inject_outliers(model, 0.06, 30.0, torch.Generator().manual_seed(7))
MODELS = {"natural": model, "injected": stressed}
held = sum(model.get_submodule(name).weight.numel() for name in LAYERS)
print(f"{len(LAYERS)} linear layers are rounded: {held:,} of {count_parameters(model.denoiser):,} parameters")

# %% [markdown]
# (sec-vidit-q-idea)=
# ## The idea
#
# A number $x$ is rounded to $b$ bits on a grid of $2^b$ points. The grid has a *step* $\Delta$ and a *zero point* $z = \operatorname{round}(-\min x / \Delta)$, the whole number that stands for zero:
#
# $$
# Q(x) = \Delta \left( \operatorname{clip}\left( \operatorname{round}(x / \Delta) + z,\; 0,\; 2^b - 1 \right) - z \right),
# \qquad \Delta = \frac{\max x - \min x}{2^b - 1} .
# $$ (eq-vidit-q-grid)
#
# The step is set by the extremes of all numbers that share the grid, zero included. The error of each of them is at most half a step, and about $\Delta / \sqrt{12}$ in root mean square. So one large number spoils the grid for all small ones. *W8A8* means weights and activations (what enters the layer) in 8 bits each; *W4A8* has 4-bit weights.
#
# For weights this is easy: they are known in advance, and each output channel gets its own grid. Activations are not known. The plain way runs the model on a few captions first, the *calibration*, and fixes one grid for the whole tensor. The paper's observation is that in a diffusion transformer this grid has to serve what differs along four axes:
# tokens, time steps, the two halves of classifier-free guidance (with and without the caption), and channels. Its answers:
#
# - **A range for each token, found when it comes** (*dynamic*). It follows token, step and condition by itself. It costs one pass over the token for its extremes.
# - **Channel balancing** for the fourth axis, which a token's grid cannot follow: all channels of a token are summed in one product, so they need one common step. But for any positive factors $s_c$, one a channel,
#
#   $$
#   \sum_c x_c W_{oc} = \sum_c \frac{x_c}{s_c}\, \left( s_c W_{oc} \right),
#   \qquad s_c = \frac{\left( \max |x_c| \right)^{\alpha}}{\left( \max_o |W_{oc}| \right)^{1 - \alpha}} .
#   $$ (eq-vidit-q-balance)
#
#   The large channel gets smaller, its column of the weight $W$ larger. This is SmoothQuant {cite:p}`xiao2023smoothquant`. The exponent $\alpha$ says who carries the imbalance: with 1 the weights do, with 0 the activations. *Timestep-aware* balancing has factors for each of several ranges of time.
# - **Rotation.** Multiply both sides by an orthogonal matrix $R$: $x W^\top = (x R)(W R)^\top$. With a Hadamard matrix, whose entries are all $\pm 1 / \sqrt n$, and random signs, every new channel is a mixture of all old ones {cite:p}`ashkboos2024quarot`. Such a matrix is easy to make for a power of two; for other widths we rotate in blocks, the largest power of two that divides the width. We know at second hand that a later version of the paper adds it; the released code that we read has none.
# - **Mixed precision.** Layers that suffer more get more bits, under a given mean. It is *metric-decoupled*: kinds of layers are judged by metrics of their own, for instance cross-attention by how well the text is followed.
#
# {numref}`fig-vidit-q-landscape` shows what the second and third do to one activation.
#
# (sec-vidit-q-method)=
# ## The method
#
# A recipe says how activations share a grid, and what is done to them before.


# %%
class Recipe(NamedTuple):
    shared: str = "token"  # "tensor": one static range; "token": dynamic; a pattern: see `Shared` below
    alpha: float | None = None  # of channel balancing
    edges: tuple[float, ...] = ()  # of time, between ranges with factors of their own
    rotate: bool = False


METHODS = {
    "static": Recipe("tensor"),  # the plain rival
    "static, balanced": Recipe("tensor", 0.5),  # SmoothQuant
    "token": Recipe(),
    "token, balanced": Recipe(alpha=0.5),
    "token, two ranges": Recipe(alpha=0.5, edges=(500.0,)),
    "token, rotated": Recipe(rotate=True),
    "token, balanced, rotated": Recipe(alpha=0.5, rotate=True),
}


def asked(seed, n, split="test"):
    return shapes.sample_scenes(n, torch.Generator().manual_seed(1000 + seed), objects=(1, 3), split=split)


def draw(model, seed, n, split="test", scale=1.0):
    """Pictures of the captions of a seed; the same seed and split mean the same noise."""
    tokens = shapes.tokens(asked(seed, n, split)).to(run.device)
    noise = seed if split == "test" else 10_000 + seed  # ranges are not found on the noise they are used on
    options = {"size": side, "guidance_scale": scale, "steps": s.steps, "seed": noise}
    return draw_scenes(model, tokens, flow_scheduler(), **options).cpu()


def trajectory(model, seed, scale=1.0):
    """The arguments of all calls, with and without the caption, while the model draws a few captions of the validation split."""
    calls = []
    note = lambda _, args, kwargs: calls.append({"x": args[0], "t": args[1], **kwargs})  # noqa: E731
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    scale += 1e-6  # not 1, or nobody asks without the caption
    draw(model, seed, s.calibration, "validation", scale)
    handle.remove()
    return calls


def largest(model, calls, edges=()):
    """The largest |value| of each channel of each layer's input, in each range of time."""
    with watch_channels(model, LAYERS, ranges=TimeRanges(edges)) as maxima:
        for call in calls:
            run_call(model, call)
    return maxima


def transforms(model, recipe, maxima, seed):
    """What a recipe does to each layer's input and weight; the signs of the rotation come from the seed."""
    made, signs = {}, torch.Generator().manual_seed(seed)
    if recipe.alpha is not None:
        ranges = TimeRanges(recipe.edges)
        made = channel_balance(model, maxima[recipe.edges], alpha=recipe.alpha, ranges=ranges)
    for name in LAYERS if recipe.rotate else ():
        turn = HadamardRotation(model.get_submodule(name).in_features, signs)
        made[name] = Chain(made[name], turn) if name in made else turn
    return {name: transform.to(run.device) for name, transform in made.items()}


class Shared(nn.Module):
    """For two ablations: one dynamic range for each row that a pattern such as "b n c -> b (n c)" makes."""

    def __init__(self, pattern, bits):
        super().__init__()
        self.pattern, self.spec = pattern, QuantSpec(bits, "token", dynamic=True)

    def forward(self, x):
        there, back = self.pattern, " -> ".join(reversed(self.pattern.split(" -> ")))
        rows = rearrange(x, there)
        return rearrange(
            round_to_grid(rows, spec_grid(rows, self.spec)), back, **dict(zip("bnc", x.shape, strict=True))
        )


@contextmanager
def rounded(model, recipe, w, a, calls, maxima, seed=0):
    """The model with its weights in `w` bits, one number or one a layer, and its activations in `a` bits."""
    static = recipe.shared == "tensor"
    activation = QuantSpec(a, "tensor" if static else "token", dynamic=not static)
    bits = w if isinstance(w, dict) else dict.fromkeys(LAYERS, w)
    rules = [QuantRule(name, QuantSpec(b, "channel", dynamic=True), activation) for name, b in bits.items()]
    with quantize_model(model, rules, transforms=transforms(model, recipe, maxima, seed)) as layers:
        calibrate(model, calls)  # sets the static ranges, if there are any
        for layer in layers.values() if "->" in recipe.shared else ():
            layer.activation_quantizer = Shared(recipe.shared, a)
        yield layers


# %% [markdown]
# In the library "dynamic" weights are weights whose grid is found after they are balanced or rotated. They are rounded once, and kept.
#
# ### Is it what we say it is?
#
# Six exact claims; three about memory and one about the allocation of bits follow. First, the neutral setting: 32 bits change nothing. Then the transforms, layer by layer, without rounding. A balance can even be had for nothing where the layer reads an adaptive layer norm, $\operatorname{norm}(x)\,(1 + \text{scale}) + \text{shift}$: dividing by $s$ only changes the rows of the small layer
# that makes scale and shift from time and text. `fold_balance` writes it there. The same move, made the other way, gives a copy of the model with *large* channels: 6 % of the channels of each such input are multiplied by 30, and the columns that read them are divided by it. That copy is our stress test. It is **synthetic**: it computes
# the same function, as the check shows, and no training made it. Large models have such channels by themselves; this small one has not.


# %%
def inputs_of(model, call):
    """What enters each layer in one call."""
    seen, handles = {}, []
    for name in LAYERS:
        note = lambda _, args, name=name: seen.update({name: args[0]})  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(note))
    run_call(model, call)
    for handle in handles:
        handle.remove()
    return seen


calls = trajectory(model, 99)
maxima = {edges: largest(model, calls, edges) for edges in ((), (500.0,))}
call = calls[len(calls) // 2]
inputs, t = inputs_of(model, call), call["t"][:1]
plain = draw(model, 99, 2)
with rounded(model, Recipe(), 32, 32, calls, maxima):
    run.record("neutral", float((draw(model, 99, 2) - plain).abs().max()))
run.record("injection", float((draw(stressed, 99, 2) - plain).abs().max()))

off = 0.0
for method in ("token, balanced", "token, two ranges", "token, rotated", "token, balanced, rotated"):
    made = transforms(model, METHODS[method], maxima, 0)
    for name, x in inputs.items():
        weight = model.get_submodule(name).weight
        out = made[name].activation(x, t) @ made[name].weight(weight, t).T
        true = x @ weight.T
        off = max(off, float((out - true).abs().max() / true.abs().max()))
run.record("transforms", off)

foldable = modulated_inputs(model)
made = transforms(model, METHODS["token, balanced"], maxima, 0)
folded = fold_balance(deepcopy(model), {name: made[name].scale[0] for name in foldable})
run.record("folded", float((run_call(folded, call) - run_call(model, call)).abs().max()))

worst = 0.0
for bits, x in itertools.product((8, 6, 4), inputs.values()):
    grid = spec_grid(x, QuantSpec(bits, "token", dynamic=True))
    worst = max(worst, float(((x - round_to_grid(x, grid)).abs() / grid.scale).max()))
run.record("no-clipping", worst)

# %% [markdown]
# The sixth is about the company that an image keeps. The released quantiser finds the range of a token *position* over the whole batch, so what an image looks like depends, a little, on the images drawn with it. Ours has a range for each token of each image. We round the inputs of each layer once in a batch and once alone.

# %%
alone = {}
for name, shared in {"a range a token": "token", "as released": "b n c -> n (b c)"}.items():
    with rounded(model, Recipe(shared), 8, 8, calls, maxima) as layers:
        alone[name] = max(
            float((layers[n].prepared_input(x)[:1] - layers[n].prepared_input(x[:1])).abs().max())
            for n, x in inputs.items()
        )
run.record("batch", alone["a range a token"])

# %%
# NBVAL_CHECK_OUTPUT
print(f"{len(foldable)} of {len(LAYERS)} layers read a modulated norm: their balance costs nothing")
print("rounded input, alone and in a batch, a range a token:", alone["a range a token"])
print("the same as released differs:", alone["as released"] > 0)

# %% [markdown]
# ### What it costs
#
# The weights of a layer with $m$ outputs and $n$ inputs take $b\,m n / 8$ bytes, and 4 bytes for the step and $b/8$ for the zero point of each output. We check the library's count against this formula, and against a real packing of 4-bit numbers, two in a byte. Then the same count at real sizes, on torch's `meta` device, which needs no weights. PixArt
# {cite:p}`chen2024pixart`, one of the paper's models, is not in this library. DiT-XL/2 {cite:p}`peebles2023scalable` and Stable Diffusion 3 (medium) are.


# %%
def by_hand(net, layers, bits):
    shapes_ = [net.get_submodule(name).weight.shape for name in layers]
    rest = count_parameters(net) - sum(m * n for m, n in shapes_)
    return 2 * rest + sum(m * n * bits // 8 + 4 * m + m * bits // 8 for m, n in shapes_)


with torch.device("meta"):
    REAL = {
        "DiT-XL/2": DiT(**DIT_CONFIGS["DiT-XL/2"]),
        "SD3-medium": MMDiT.from_diffusers_config(SD3_CONFIGS["SD3-medium"]),
    }
difference, factor = 0, {}
for size, net in {"here": model.denoiser, **REAL}.items():
    inner = list(select_layers(net, ["blocks.*.attn.*", "blocks.*.*mlp.*"]))
    groups = {"kept": inner, "rounded": inner + list(select_layers(net, "blocks.*.*adaLN_modulation"))}
    for (modulation, names), bits in itertools.product(groups.items(), (8, 4)):
        memory = weight_memory(net, [QuantRule(names, QuantSpec(bits, "channel"))], float_bytes=2)
        difference += abs(memory.weights + memory.scales - by_hand(net, names, bits))
        factor[size, bits, modulation] = memory.ratio
for name in LAYERS:
    weight = model.get_submodule(name).weight
    grid = spec_grid(weight, QuantSpec(4, "channel"), channel_axis=0)
    q = ((weight / grid.scale).round() + grid.zero_point).clamp(0, 15).to(torch.uint8)
    packed = q[:, ::2] | (q[:, 1::2] << 4)
    unpacked = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    difference += abs(packed.numel() - weight.numel() // 2) + int((unpacked != q).sum())
run.record("memory", difference)
run.record("real-size", factor["SD3-medium", 4, "rounded"])
run.record("real-size-kept", factor["SD3-medium", 4, "kept"])

# %%
# NBVAL_CHECK_OUTPUT
for size, net in REAL.items():
    share = sum(p.numel() for n, p in net.named_parameters() if "adaLN" in n) / count_parameters(net)
    inside = sum(p.numel() for n, p in net.named_parameters() if n.startswith("blocks.")) / count_parameters(
        net
    )
    print(
        f"{size}: {count_parameters(net):,} parameters; {1 - inside:.1%} outside the blocks, {share:.1%} in the modulations"
    )
    for bits in (8, 4):
        kept, all_of_it = factor[size, bits, "kept"], factor[size, bits, "rounded"]
        print(
            f"  {bits}-bit weights: {kept:.2f}x less memory; {all_of_it:.2f}x with the modulations rounded too"
        )
added = sum(rotation_cost(model.get_submodule(name).in_features) for name in LAYERS) / held
print(f"rotation adds {added:.1%} of the layers' multiply-accumulates here, in additions;")
print(f"at 1152 channels and four times as many outputs {rotation_cost(1152) / (1152 * 4608):.2%}")

# %% [markdown]
# Mind the modulations. PixArt has one for all blocks, and the released code leaves it in half precision: it is small. In DiT and in Stable Diffusion 3 each block has its own, and together they hold about a third of the weights, though they run once an image and not once a token. So a small share of the operations is a large share of the memory. In our
# experiments we keep them unrounded, as the released code does.
#
# Two ranges of time have a price as well. Equation {eq}`eq-vidit-q-balance` puts the factors into the weight *before* it is rounded. So each range has a rounded weight of its own, and both have to be kept: 4-bit weights with two ranges take the memory of 8-bit weights with one. That is the rival to compare with.
#
# These factors count the weights of the transformer and nothing else. A memory factor that is measured on a GPU also has activations and buffers in it, so the paper's headline and ours are not the same quantity.
#
# :::{admonition} In the released code
# :class: tip
# Read in [thu-nics/ViDiT-Q](https://github.com/thu-nics/ViDiT-Q/tree/44126bdf8dd9d625078b7e0eacba60cd1b7015ae), not run.
#
# - [`base_quantizer.py`](https://github.com/thu-nics/ViDiT-Q/blob/44126bdf8dd9d625078b7e0eacba60cd1b7015ae/qdiff/quantizer/base_quantizer.py) lays a batch out as (token position, samples and channels) before it looks for extremes: one range a position for the whole batch. Some configurations set `cfg_split`, which calls the model for the two halves of the guidance one after the
#   other. In the same function, if one step is smaller than $10^{-6}$, *all* steps are set to that value.
# - The maxima in [`quant_layer.py`](https://github.com/thu-nics/ViDiT-Q/blob/44126bdf8dd9d625078b7e0eacba60cd1b7015ae/qdiff/models/quant_layer.py) are running averages of the batches' maxima (0.95 old, 0.05 new), not maxima. The factor $1/s$ is applied in each call, and the weights of each range get grids of their own.
# - The README names `w6a6_naive_cb.yaml` as the W6A6 plan, with balancing; in that file `smooth_quant` has `enable: False`. `t2i/configs/quant/alpha/w4a8.yaml` sets 6 bits for the weights.
# - The mixed-precision plan of W4A8 for OpenSora, [`t20_weight_4_mp.yaml`](https://github.com/thu-nics/ViDiT-Q/blob/44126bdf8dd9d625078b7e0eacba60cd1b7015ae/t2v/configs/quant/opensora/mixed_precision/t20_weight_4_mp.yaml), gives 8 bits to all layers in steps 19 to 15 of 20, and to the feed-forward layers in the others. By our arithmetic, with the widths of
#   its transformer, that is a mean of 5.6 bits a weight in three quarters of the steps, and 8 in the other.
# - The sensitivities that are stored with it are scores of generated videos. For a layer in 4 and in 8 bits they differ by little: in the table of CLIP scores (cross-attention, weights) 4 bits score *above* 8 bits in 48 of 112 entries, in that of VQA scores (feed-forward, weights) in 56 of 112. That is about what chance would give.
# :::
#
# (sec-vidit-q-experiment)=
# ## The experiment
#
# Each seed has its own captions, noise, calibration captions and signs. We measure how near the images of a rounded model are to those of the unrounded one from the same noise, as a peak signal-to-noise ratio (PSNR) in decibels. Twenty decibels more are a tenth of the error. One bit more halves the step: 6 decibels, if all goes well. One grey level in 255 is 48 dB.
#
# :::{table} The arms. All of them round weights with a grid for each output channel.
# :name: tab-vidit-q-arms
#
# | arm | activations | question |
# |---|---|---|
# | static | one range a layer, from calibration | the plain rival at equal bits |
# | static, balanced | the same, after balancing | SmoothQuant: is balancing enough? |
# | token | a range a token | the first idea alone |
# | token, balanced | after balancing, $\alpha = 0.5$ | the method |
# | token, two ranges | factors for $t < 500$ and $t \ge 500$ | the timestep-aware method; rival: one range with twice the bits in the weights |
# | token, rotated | after rotation | the other way to treat channels |
# | token, balanced, rotated | after both | do they add up? |
# | a range an image; as released | dynamic, but shared more widely | which part is due to the token? |
# | mixed precision | 4, 6 or 8 bits a layer, mean 5, by sensitivity | rivals: random order, opposite order, 5 bits everywhere |
# :::
#
# All but the last at W8A8, W6A6, W4A8 and W4A4, on the natural and on the injected model. Without guidance, as guidance with scale 3 multiplies errors; a few arms are repeated with it, to ask what is in the picture.

# %%
BITS = ((8, 8), (6, 6), (4, 8), (4, 4))
SWEPT = ((6, 6), (4, 8), (4, 4))


def db(x, reference):
    return float(psnr_to_reference(x, reference).mean())


@torch.no_grad()
def compare(part, seed):
    """PSNR to the unrounded model of all arms of one part of the grid, by (arm, bits)."""
    net = MODELS.get(part, model)
    calls, reference = trajectory(net, seed), draw(model, seed, s.images)
    maxima = {edges: largest(net, calls, edges) for edges in ((), (500.0,))}
    arms = {(name, *bits): recipe for name, recipe in METHODS.items() for bits in BITS}
    if part == "natural":
        arms["a range an image", 6, 6] = Recipe("b n c -> b (n c)")
        arms["as released", 6, 6] = Recipe("b n c -> n (b c)")
    if part == "alpha":
        arms = {(alpha, *bits): Recipe(alpha=alpha) for alpha in s.alphas for bits in SWEPT}
        arms["two ranges", 4, 8] = Recipe(alpha=0.11, edges=(500.0,))
    out = {}
    for (name, w, a), recipe in arms.items():
        with rounded(net, recipe, w, a, calls, maxima, seed):
            out[name, w, a] = db(draw(net, seed, s.images), reference)
    return out


found = run_arms(compare, {part: part for part in (*MODELS, "alpha")}, s.seeds, s.jobs)
psnr = {(part, *arm): torch.tensor([one[arm] for one in of]) for part, of in found.items() for arm in of[0]}

# %% [markdown]
# ## Results
#
# ### What varies
#
# First the premise. For the input of each layer we ask four times how much its size varies: the largest size over the median one, over the tokens of an image, over time steps, and over channels; and, at one step, the size with the caption over that without it, or the other way round, whichever is larger. A size is the largest absolute value. One means that nothing varies. The four are not quite on a par: the largest of many channels is further from the median than the largest of a few time steps, even if all are of one kind.


# %%
@torch.no_grad()
def audit(part, seed):
    """The four ratios of each layer; how many tokens of other captions the static range covers, and how much too wide it is."""
    net, calls, uses = MODELS[part], trajectory(MODELS[part], seed), []
    for call, (half, condition) in itertools.product(calls, enumerate(("caption", "empty"))):
        of_half = {name: value.chunk(2)[half] for name, value in call.items()}
        uses.append(Call(float(call["t"][0]), condition, lambda c=of_half: run_call(net, c)))
    varies, own = audit_variation(net, uses, LAYERS), {name: [] for name in LAYERS}
    with rounded(net, METHODS["static"], 8, 8, calls, {}) as layers:
        x = {name: torch.zeros(1, 1, layer.in_features, device=run.device) for name, layer in layers.items()}
        step = {name: float(layers[name].activation_quantizer.grid(x[name]).scale) for name in LAYERS}
    for call in trajectory(net, seed + 500):
        for name, x in inputs_of(net, call).items():
            own[name].append(spec_grid(x, QuantSpec(8, "token", dynamic=True)).scale.flatten())
    own = {name: torch.cat(steps) for name, steps in own.items()}
    covered = torch.tensor([float((own[name] <= step[name]).double().mean()) for name in LAYERS])
    wider = torch.tensor([step[name] / float(own[name].median()) for name in LAYERS])
    return torch.tensor([varies[name] for name in LAYERS]), float(covered.mean()), float(wider.median())


audits = run_arms(audit, {part: part for part in MODELS}, s.seeds, s.jobs)
AXES = ("token", "condition", "time", "channel")
ratios = {part: torch.stack([one[0] for one in of]) for part, of in audits.items()}  # (seeds, layers, axes)
run.record("covers", [one[1] for one in audits["natural"]])
run.record("wider", [one[2] for one in audits["natural"]])
run.record("channels", (ratios["natural"].argmax(2) == AXES.index("channel")).double().mean(1))
for part, ratio in ratios.items():
    print(
        part,
        {axis: f"{v:.2f}" for axis, v in zip(AXES, ratio.mean(0).median(0).values.tolist(), strict=True)},
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four columns of dots on a logarithmic axis, one dot a layer: token, condition, time, channel. Blue dots of the natural model lie near one for the first three and several times higher for channel, with one single dot, of both colours, far above all others. Orange dots of the injected model lie a little above the blue ones for token, beside them for condition and time, and far above them for channel."}, "figure": {"caption": "How much the inputs of the layers vary, along four axes: one dot a layer, mean over seeds; the bar is the median layer. Channels are the axis that no range a token can follow. The injected model is synthetic: it differs from the natural one in its channels, and where that shows. The highest blue dots are layers of the text stream after its activation function, with the empty caption: more than half of the channels are close to zero there, so the median is tiny and the largest is not massive.", "name": "fig-vidit-q-audit"}}
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for k, (part, colour) in enumerate(zip(MODELS, (PALETTE[0], PALETTE[1]), strict=True)):
    for i in range(len(AXES)):
        y = ratios[part].mean(0)[:, i]
        x = i + 0.4 * k - 0.2 + 0.24 * (torch.arange(len(y)) / len(y) - 0.5)
        ax.plot(x, y, "o", ms=3, color=colour, alpha=0.6, label=part if i == 0 else None)
        ax.hlines(y.median(), i + 0.4 * k - 0.36, i + 0.4 * k - 0.04, color="k", lw=1.5)
ax.set(xticks=range(4), yscale="log", ylabel="largest / median")
ax.set_xticklabels(["tokens", "caption or not", "time steps", "channels"])
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# ### The picture: one activation, three times
#
# {numref}`fig-vidit-q-landscape` takes the layer of the image stream whose channels vary most, and looks at its input as a 4-bit grid does. Each token has a grid of its own: its largest value is 7 steps, whatever its size. (This grid is symmetric, which is easier to draw. The one of {eq}`eq-vidit-q-grid` is not; its step is smaller, by up to about a half, so fewer values become zero there.) All that is below half a step becomes zero.

# %%
wide = [name for name in foldable if "context" not in name]
shown = max(
    wide, key=lambda name: float(ratios["natural"].mean(0)[LAYERS.index(name), AXES.index("channel")])
)
landscapes = {}
for part, net in MODELS.items():
    calls = trajectory(net, s.seeds[0])
    maxima = {(): largest(net, calls)}
    x, now = inputs_of(net, calls[len(calls) // 2])[shown][:1], calls[len(calls) // 2]["t"][:1]
    for method in ("token", "token, balanced", "token, rotated"):
        made = transforms(net, METHODS[method], maxima, 0)
        z = made[shown].activation(x, now) if shown in made else x
        landscapes[part, method] = (7 * z.abs() / z.abs().amax(-1, keepdim=True))[0].cpu()  # in steps
print(shown)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six surfaces over tokens and channels, heights from 0 to 7 steps, in two rows. Above, natural model: raw, a wall along all tokens at one channel and a low plain; balanced, the plain is higher and more rugged; rotated, the wall has become broad raised bands of channels on a rugged plain. Below, injected model: raw, thin walls and blades on a plain of zero; balanced, the same as above; rotated, broad high bands."}, "figure": {"caption": "The picture to remember: tokens by channels, one layer's input for one image at half-time, in steps of each token's own 4-bit grid. A wall is a channel that is large for all tokens; it takes the grid, and the plain is lost: over each panel the share of values that become zero. Each panel is scaled by the largest values, so a wall that gets lower shows as a plain that gets higher: that is what balancing does. Rotation spreads each over the 32 channels of its block. Below: the same function with injected channels (synthetic).", "name": "fig-vidit-q-landscape"}}
fig = plt.figure(figsize=(7, 4.9))
titles = {"token": "raw", "token, balanced": "balanced", "token, rotated": "rotated"}
for k, ((part, method), z) in enumerate(landscapes.items()):
    ax = fig.add_subplot(2, 3, k + 1, projection="3d")
    rows, columns = (v.numpy() for v in torch.meshgrid(*map(torch.arange, z.shape), indexing="ij"))
    ax.plot_surface(columns, rows, z.numpy(), cmap="viridis", vmin=0, vmax=5, rcount=64, ccount=96, lw=0)
    ax.set(zlim=(0, 7), xticks=(0, 32, 64, 96), yticks=(0, 32, 64), zticks=(0, 7))
    ax.set_xlabel("channel", labelpad=-6, fontsize=9)
    ax.set_ylabel("token", labelpad=-6, fontsize=9)
    ax.tick_params(labelsize=8, pad=-3)
    ax.view_init(38, -62)
    lost = float((z < 0.5).double().mean())
    ax.set_title(f"{part}, {titles[method]}\n{lost:.0%} become 0", fontsize=10, y=0.98)
fig.subplots_adjust(0.0, 0.04, 0.96, 0.93, wspace=0.08, hspace=0.18)
plt.show()

# %% [markdown]
# ### Method by bit-width
#
# The main comparison. Read {numref}`fig-vidit-q-grid` down a column: what does the method gain at equal bits? And along a row: what would more bits have given? All balanced rows have $\alpha = 0.5$; the claims *w4a8* and *time-aware* use the 0.11 that the released plan has at W4A8, see {numref}`fig-vidit-q-alpha`.


# %%
def gain(part, better, worse, *bits):
    return psnr[part, better, *bits] - psnr[part, worse, *bits]


run.record("token", gain("natural", "token", "static", 6, 6))
run.record("token-not-image", gain("natural", "token", "a range an image", 6, 6))
run.record("balance", gain("natural", "token, balanced", "token", 6, 6))
run.record("smoothquant", gain("natural", "token, balanced", "static, balanced", 6, 6))
run.record("rotation", gain("natural", "token, balanced, rotated", "token, balanced", 4, 4))
run.record("injected", gain("injected", "token, balanced", "static", 8, 8))
run.record("injected-balance", gain("injected", "token, balanced", "token", 6, 6))
run.record("w4a8", psnr["alpha", 0.11, 4, 8] - psnr["natural", "static", 4, 8])
run.record("time-aware", psnr["alpha", "two ranges", 4, 8] - psnr["alpha", 0.11, 4, 8])
run.record("time-aware-memory", psnr["alpha", "two ranges", 4, 8] - psnr["natural", "token, balanced", 8, 8])
for name in ("static", "a range an image", "as released", "token"):
    print(f"natural, W6A6, {name:17s} {psnr['natural', name, 6, 6].mean():.1f} dB")
foretold = 20 * torch.tensor([one[2] for one in audits["natural"]]).log10().mean()
measured = gain("natural", "token", "static", 6, 6).mean()
print(f"token over static: foretold by the width of the steps {foretold:.1f} dB, measured {measured:.1f} dB")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two tables of coloured cells, seven methods by four bit-widths, PSNR in decibels. Natural model: in the columns W8A8, W6A6 and W4A4 the values rise from static at the top to balanced and rotated at the bottom; in the column W4A8 all are nearly equal. Injected model: static is far lower everywhere; ranges for tokens help at 8 bits and hardly at 4; balancing restores the values of the natural model; rotation alone lies between static and balanced, except at W4A8, where it is the lowest of all."}, "figure": {"caption": "PSNR to the unrounded model in decibels, mean over seeds. Left the natural model, right the one with injected channels (synthetic). Balanced rows: $\\alpha = 0.5$. No guidance.", "name": "fig-vidit-q-grid"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained", sharey=True)
for ax, part in zip(axes, MODELS, strict=True):
    table = torch.tensor([[float(psnr[part, name, *bits].mean()) for bits in BITS] for name in METHODS])
    ax.imshow(table, cmap="viridis", vmin=12, vmax=66, aspect="auto")
    for i, j in itertools.product(range(len(METHODS)), range(len(BITS))):
        ax.text(
            j,
            i,
            f"{table[i, j]:.1f}",
            ha="center",
            va="center",
            fontsize=9,
            color="w" if table[i, j] < 48 else "k",
        )
    ax.set(xticks=range(len(BITS)), yticks=range(len(METHODS)), title=part)
    ax.set_xticklabels([f"W{w}A{a}" for w, a in BITS])
    ax.set_yticklabels(list(METHODS))
    ax.grid(False)
plt.show()

# %% [markdown]
# ### Who carries the imbalance
#
# Balancing takes from the activations what it gives to the weights. So $\alpha$ has a best value between the ends. The released plans use 0.625 at W6A6, 0.3 for PixArt, and 0.11 at W4A8.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three curves of PSNR against alpha from 0 to 1, with bands. W6A6 lies highest, W4A8 in the middle, W4A4 lowest. Each rises to a flat top and falls again towards 1. Dotted lines of the same colours, without balancing, lie well below the tops of W6A6 and W4A4, and about as high as the top of W4A8."}, "figure": {"caption": "PSNR to the unrounded model against the exponent $\\alpha$ of the balance, natural model, a range for each token; bands: 90 % intervals over seeds. Dotted: without balancing.", "name": "fig-vidit-q-alpha"}}
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for (w, a), colour in zip(SWEPT, PALETTE, strict=False):
    values = torch.stack([psnr["alpha", alpha, w, a] for alpha in s.alphas], dim=1)
    curve(ax, s.alphas, values, f"W{w}A{a}", colour)
    ax.axhline(psnr["natural", "token", w, a].mean(), color=colour, ls=":", lw=1.2)
ax.set(xlabel="$\\alpha$: 0 levels the weights, 1 the activations", ylabel="PSNR (dB)")
ax.legend(ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
# ### Bits where they matter
#
# Now the weights of each layer may have 4, 6 or 8 bits, and a mean of 5 over all weights. Activations stay at 8 bits with a range a token. The sensitivity of a layer at $b$ bits is the relative error of the model's prediction when that layer alone is rounded, on a few calls of the calibration.
#
# Three arms differ in one thing only, the order in which layers are served: each in turn takes as many bits as are left. The order is by sensitivity (gain a bit), at random, or by sensitivity backwards. A fourth solves the problem exactly: if errors add up, it is a knapsack. The rival is 5 bits everywhere, which takes exactly as much memory.
#
# For the *decoupled* arm layers are split into two groups with equal means. The layers of the image stream keep the metric. Those of the text stream are measured by what the caption changes: the difference of the predictions with and without it. An MM-DiT has no cross-attention; its text stream is the nearest to it.


# %%
CHOICES, MEAN = (4, 6, 8), 5
sizes = {name: model.get_submodule(name).weight.numel() for name in LAYERS}
groups = {name: "text" if "context" in name else "image" for name in LAYERS}
TEXT = [name for name in LAYERS if groups[name] == "text"]


def caption_error(out, true):
    """The relative error of what the caption changes: the difference of the two halves of a call."""
    return relative_error(*(x.chunk(2)[0] - x.chunk(2)[1] for x in (out, true)))


@torch.no_grad()
def mixed(_, seed):
    """The bits of each arm, their PSNR to the unrounded model, and the errors they rest on."""
    calls, reference = trajectory(model, seed), draw(model, seed, s.images)
    errors, decoupled = ({name: {} for name in LAYERS} for _ in range(2))
    for b in CHOICES:
        spec = (QuantSpec(b, "channel"), QuantSpec(32))
        one = sensitivity(model, spec, calls[:: s.probe], names=LAYERS)
        two = one | sensitivity(model, spec, calls[:: s.probe], names=TEXT, error=caption_error)
        for name in LAYERS:
            errors[name][b], decoupled[name][b] = one[name], two[name]
    rank = gain_per_bit(errors, sizes)
    order = sorted(LAYERS, key=lambda name: -rank[name])
    shuffle = torch.Generator().manual_seed(seed)
    orders = {"most sensitive first": order, "least sensitive first": order[::-1]}
    for i in range(3):
        orders[f"random order {i}"] = [LAYERS[k] for k in torch.randperm(len(LAYERS), generator=shuffle)]
    bits = {name: allocate_in_order(order, sizes, CHOICES, MEAN) for name, order in orders.items()}
    bits["optimal"] = allocate_bits(errors, sizes, MEAN)
    bits["optimal, decoupled"] = allocate_by_group(decoupled, sizes, MEAN, groups)
    bits |= {f"{b} bits everywhere": dict.fromkeys(LAYERS, b) for b in (4, 5, 6)}
    out = {}
    for name, of in bits.items():
        with rounded(model, METHODS["token"], of, 8, calls, {}):
            out[name] = db(draw(model, seed, s.images), reference)
    out["random order"] = sum(out.pop(f"random order {i}") for i in range(3)) / 3
    return bits, out, errors


mixtures = run_arms(mixed, {"": None}, s.seeds, s.jobs)[""]
mix = {name: torch.tensor([one[1][name] for one in mixtures]) for name in mixtures[0][1]}
run.record("mixed-random", mix["most sensitive first"] - mix["random order"])
run.record("mixed-anti", mix["most sensitive first"] - mix["least sensitive first"])
run.record("mixed-uniform", mix["optimal"] - mix["5 bits everywhere"])

block = [name for name in LAYERS if ".blocks.0." in name]
errors, small = {name: mixtures[0][2][name] for name in block}, {name: sizes[name] for name in block}
total = lambda bits: sum(errors[name][b] for name, b in bits.items())  # noqa: E731
every = (dict(zip(block, bits, strict=True)) for bits in itertools.product(CHOICES, repeat=len(block)))
best = min(total(bits) for bits in every if mean_bits(bits, small) <= MEAN)
run.record("optimal", total(allocate_bits(errors, small, MEAN)) - best)
for name, bits in mixtures[0][0].items():
    print(f"{name:22s} {mean_bits(bits, sizes):.2f} bits a weight")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: three maps of coloured cells, eight kinds of layers by six blocks, with 4, 6 or 8 bits: the optimal mixture, the decoupled one, and the least sensitive first. Right: PSNR of the arms with intervals: least sensitive first is lowest of the mixtures, then random order, then most sensitive first and the decoupled one, both about as high as 5 bits everywhere, then the optimal one; 4, 5 and 6 bits everywhere as dashed lines."}, "figure": {"caption": "Mixed precision at a mean of 5 bits a weight. Left: bits of each layer in the first seed; rows are kinds of layers, image stream above, text stream below; columns are blocks (the last has no text output). Right: PSNR to the unrounded model, with 90 % intervals over seeds; dashed: the same bits everywhere.", "name": "fig-vidit-q-bits"}}
KINDS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
KINDS += ["attn.context_qkv", "attn.context_proj", "context_mlp.fc1", "context_mlp.fc2"]
drawn = ["optimal", "optimal, decoupled", "least sensitive first"]
fig, axes = plt.subplots(1, 4, figsize=(7, 3.1), layout="constrained", width_ratios=(1, 1, 1, 1.9))
for ax, name in zip(axes, drawn, strict=False):
    bits = mixtures[0][0][name]
    grid = [[bits.get(f"denoiser.blocks.{i}.{kind}", float("nan")) for i in range(6)] for kind in KINDS]
    ax.imshow(grid, cmap="viridis", vmin=3, vmax=9, aspect="auto")
    for i, j in itertools.product(range(8), range(6)):
        if grid[i][j] == grid[i][j]:
            ax.text(
                j, i, grid[i][j], ha="center", va="center", fontsize=8, color="w" if grid[i][j] < 8 else "k"
            )
    ax.set(xticks=range(6), yticks=[])
    ax.set_title(name.replace(", ", ",\n").replace("sensitive ", "sensitive\n"), fontsize=9)
    ax.grid(False)
axes[0].set_yticks(
    range(8), ["qkv", "proj", "fc1", "fc2", "text qkv", "text proj", "text fc1", "text fc2"], fontsize=8
)
axes[1].set_xlabel("block")
arms = ["least sensitive first", "random order", "most sensitive first", "optimal", "optimal, decoupled"]
for i, name in enumerate(arms):
    mean, low, high = mean_interval(mix[name])
    axes[3].errorbar(
        float(mean), i, xerr=[[float(mean - low)], [float(high - mean)]], fmt="o", color=PALETTE[i], capsize=3
    )
for b in (4, 5, 6):
    axes[3].axvline(mix[f"{b} bits everywhere"].mean(), color="0.4", ls="--", lw=1)
    axes[3].text(mix[f"{b} bits everywhere"].mean(), len(arms) - 0.4, f"{b} bits", fontsize=8, ha="center")
axes[3].set(xlabel="PSNR (dB)", ylim=(-0.5, len(arms) - 0.1), yticks=range(len(arms)))
axes[3].margins(x=0.12)
axes[3].set_yticklabels([name.replace(" first", "\nfirst").replace(", ", ",\n") for name in arms], fontsize=8)
plt.show()

# %% [markdown]
# ### What is in the picture
#
# Distance is not quality. With guidance 3, as the model is used, does the picture still show what was asked? The reader of scenes tells shape, colour, size and place of each object. The guided prediction is a weighted difference of two answers, with weights 3 and $-2$, so errors of rounding weigh more here.
#
# In the list below, W8A8, *injected, W6A6* and *W4A4, rotated* are balanced with $\alpha = 0.5$, the last one rotated too, and W4A8 is balanced with the released 0.11; all have a range a token. *Static* and *injected, token* are not balanced. The two mixtures round activations to 8 bits, unbalanced. A PSNR of 100 dB stands for equal images. FD is a Fréchet distance, on features of the reader; its floor is that of
# as many real images, its ceiling that of noise with the right mean and spread.


# %%
GUIDED = {
    "unrounded": ("natural", Recipe(), 32, 32),
    "W8A8": ("natural", METHODS["token, balanced"], 8, 8),
    "W4A8": ("natural", Recipe(alpha=0.11), 4, 8),
    "static W4A8": ("natural", METHODS["static"], 4, 8),
    "static W4A4": ("natural", METHODS["static"], 4, 4),
    "W4A4, rotated": ("natural", METHODS["token, balanced, rotated"], 4, 4),
    "injected, static W6A6": ("injected", METHODS["static"], 6, 6),
    "injected, token W6A6": ("injected", METHODS["token"], 6, 6),
    "injected, W6A6": ("injected", METHODS["token, balanced"], 6, 6),
    "optimal": ("natural", METHODS["token"], "optimal", 8),
    "optimal, decoupled": ("natural", METHODS["token"], "optimal, decoupled", 8),
}
BITS_OF = dict(zip(s.seeds, (one[0] for one in mixtures), strict=True))


@torch.no_grad()
def guided(cell, seed):
    part, recipe, w, a = cell
    calls, w = trajectory(MODELS[part], seed, 3.0), BITS_OF[seed].get(w, w)  # the name of an arm, or a number
    maxima = {(): largest(MODELS[part], calls)} if recipe.alpha is not None else {}
    with rounded(MODELS[part], recipe, w, a, calls, maxima, seed):
        return draw(MODELS[part], seed, s.guided, scale=3.0)


oracle = zoo.load("oracle_shapes16")
pictures = run_arms(guided, GUIDED, s.seeds, s.jobs)
near, right = {}, {}
for name, of in pictures.items():
    read = [
        scene_scores(read_in_batches(oracle, x), asked(seed, s.guided))
        for x, seed in zip(of, s.seeds, strict=True)
    ]
    right[name] = torch.tensor([float(score["object"].nanmean()) for score in read])
    near[name] = torch.tensor([db(x, y) for x, y in zip(of, pictures["unrounded"], strict=True)])
    print(f"{name:22s} objects right {right[name].mean():6.1%}   PSNR {near[name].mean():5.1f} dB")
run.record("prompt", (right["W8A8"] + right["W4A8"]) / 2 - right["unrounded"])
run.record("decoupled", right["optimal, decoupled"] - right["optimal"])
real, other = (
    shapes.render(asked(900, n, split), side)
    for n, split in ((1000, "train"), (s.guided * len(s.seeds), "test"))
)
for name in ("unrounded", "W4A8", "optimal", "optimal, decoupled"):
    print(name, frechet_report(oracle, torch.cat(pictures[name]), real, other))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six rows of eight small scenes of coloured shapes. Unrounded: clean. Static W4A4: shapes in place, with stains and grain. W4A4 balanced and rotated: nearly clean. Injected, static W6A6: broken, hardly any shape is left. Injected, token: better, with some grain. Injected, balanced: clean, like the first row."}, "figure": {"caption": "The first captions of the first seed, not chosen; guidance 3. At the left, PSNR to the unrounded images, over all captions and seeds. *W4A4, rotated* and *injected, W6A6* are balanced too. The lower three rows are the injected model (synthetic), which draws the same as the natural one when nothing is rounded.", "name": "fig-vidit-q-samples"}}
rows = [
    "unrounded",
    "static W4A4",
    "W4A4, rotated",
    "injected, static W6A6",
    "injected, token W6A6",
    "injected, W6A6",
]
columns = min(8, s.guided)
fig, ax = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
labels = [f"{name}\n{float(near[name].mean()):.1f} dB" if name != "unrounded" else name for name in rows]
show_images(torch.cat([pictures[name][0][:columns] for name in rows]), columns, ax=ax, row_labels=labels)
plt.show()

# %% [markdown]
# ### Does it save time?
#
# Rounding is simulated on this page, and makes the model slower. But a linear layer can compute with bytes, where the processor has instructions for that (VNNI on x86). We time one with 1152 inputs and outputs, the width of DiT-XL/2 and PixArt, on 1024 tokens: single precision against 8-bit integers whose ranges are found in each token as it comes. Finding them is part of the time.

# %%
torch.manual_seed(0)
layer, x = nn.Linear(1152, 1152).to(run.device), torch.randn(1024, 1152, device=run.device)
integer, ratio = IntegerLinear.from_linear(layer), []
for _ in range(s.timings):
    ratio.append(cpu_time(lambda: layer(x).sum().item()) / cpu_time(lambda: integer(x).sum().item()))
run.record("speed", ratio)
display(
    Markdown(
        f"Float / integer: {', '.join(f'{r:.2f}' for r in ratio)}. 8-bit dot products on this machine: {'yes' if has_vnni() else 'no'}."
    )
)

# %%
run.report()

# %% [markdown]
# **How to read the table, in words.** Where weights and activations have equally many bits, ranges for tokens and balancing do on this small model what the paper says. At W4A8, a setting of the paper's abstract, we could not show that the method is nearer to the unrounded model than plain rounding: *w4a8* and *time-aware* are inconclusive, and *time-aware-memory*, a control of ours, is contradicted. *Decoupled* and *prompt* are confirmed,
# but by a measure that has reached its ceiling; they say little.
#
# The exact claims say that the machinery is what it should be: switched off it is invisible, each transform leaves the product alone, a token's range clips nothing, memory is what the formula says. *Injection* says that the stressed model is the same function.
#
# *Covers*, *wider* and *channels* test the premise. The first two are nearly a matter of definition: one range for a tensor has to be at least as wide as that of most tokens it was calibrated on. *Wider* says by how much, and *channels* whether the axis that token ranges cannot follow is the largest one.
#
# *Token*, *token-not-image*, *balance* and *smoothquant* are the evidence for the two main ideas: they are on the natural model, at W6A6, and in PSNR. At W4A8 nearly nothing is left of these gains. How much a range a token gains can be foretold: a step that is $k$ times as wide makes the error $k$ times as large, $20 \log_{10} k$ decibels. The line above {numref}`fig-vidit-q-grid` compares this with what was measured; it has to come out too high, since the share of the error that the weights make stays. *Token-not-image* splits the gain: a range
# an image is dynamic too, and follows step and condition, but not the token. The range of a position over the whole batch, as released, lies between the two here; that depends on the size of the batch. *Injected* and *injected-balance* are a consistency check, no more. The injection multiplies channels by known factors, and balancing is made to find such factors: if a channel is $k$ times as large and its column $k$ times as small, $s_c$ in {eq}`eq-vidit-q-balance` is $k$ times as large, for any $\alpha$, and the two models are the same once balanced. It would be a bug if it did not help. What they do show is the size of the
# harm: see how far the static grid falls in the right half of {numref}`fig-vidit-q-grid`, and that a range a token hardly helps once activations have four bits.
#
# *Rotation* asks whether the two ways to treat channels add up. Alone, rotation needs no calibration, but where a layer has 96 inputs its blocks hold 32 channels: a large channel is spread over its block and raises all of that. Balancing finds the channel itself. With massive channels rotation has a second weakness, in the weights: what was one large channel now enters through 32 columns, and meets the rounding error of each
# of them. Compare the rows *token* and *token, rotated* in the right table where weights have 4 bits: at W4A4 rotation still gains, at W4A8 it loses, and ends below static rounding. Neither is free of cost: balancing can be written into the modulation for some layers only, rotation for none.
#
# *W4a8* is the comparison with the plain rival, and it is **inconclusive**: the mean difference is well below the threshold, the interval contains zero, and the seeds differ in sign. Look at the column W4A8 of the left table for the likely reason. In that column activations have 8 bits, weights 4, and the weights set the error: a better way to treat activations has little left to gain, and balancing or rotation, which reshape the weights, may lose. Each alone is a little below *token*; only both together are a little above. The dotted lines and the curves in {numref}`fig-vidit-q-alpha` say the same:
# where the weights set the error, what balancing moves into them costs at once, and none of the values of $\alpha$ is clearly better than no balancing. A difference between arms is small against the differences between seeds, and there are few seeds. A model whose activations have massive outliers is another matter; there the rival falls far behind at W4A8 too, as the right table shows. So what the paper reports may depend on how large the outliers are, and this small model has no massive ones. Nor is the arm all that the paper does at W4A8: the released plan for OpenSora mixes bits, ours has 4 in every layer.
#
# *Time-aware* and *time-aware-memory* belong together. Factors for two ranges of time should fit each half better. Whether they do is **inconclusive**: one seed gains, two hardly change, the interval contains zero. The likely reason is that there is little to gain: time is the axis that varies least in {numref}`fig-vidit-q-audit`, and at W4A8 the weights set the error. With $\alpha = 0.5$ two ranges make next to no difference at any bit-width of {numref}`fig-vidit-q-grid`. More ranges, or other borders than half-time, we did not try.
# *Time-aware-memory* is **contradicted**, and by far. It is our control, not a claim of the paper. Both rounded weights have to be kept, so at equal memory the rival may use twice the bits in its weights, and a bit is worth about six decibels: two ranges could not make up for four bits. A GPU kernel may have other reasons for 4-bit weights than memory; this page does not measure them.
#
# *Mixed-random* and *mixed-anti* ask whether sensitivities tell which layers to serve: the arms differ in order only. *Mixed-uniform* asks whether it pays at all at equal memory. That is not a matter of course. The choices 4, 6 and 8 do not contain 5, and a layer that goes from 5 bits to 4 doubles its error. So a mixture wins only if layers are very unequal. The optimal one wins on average, by much more in some seeds than in others, and the lower end of its interval is not far above zero. Serving layers by their rank, which is nearer to the paper's heuristics, does not win: it is about level with 5 bits everywhere, and so is the decoupled arm. The maps in
# {numref}`fig-vidit-q-bits` show which layers get the bits. The text stream has nearly half of the weights, but its layers act on few tokens and reach the picture only through attention: one metric for all leaves it at few bits, and what it saves pays for the image stream. The decoupled arm may not do that, as each stream has to keep the mean; it can only shift bits inside a stream.
#
# *Decoupled* can hardly fail. Its difference is exactly zero in every seed because the reader of scenes finds every object in both arms: the measure is at its ceiling, and the interval without width is no sign of precision. In PSNR, which still has room, the decoupled mixture is *below* the one with a single metric, with guidance and without. So the claim as worded holds, and nothing speaks for two budgets here; whether they
# do good needs a model that is nearer its limit.
#
# *Prompt* is the page's nearest relative of the paper's claim, and has the same weakness. The unrounded model, W8A8 and W4A8 draw all objects of all captions right, so the difference is exactly zero. But plain static rounding at W4A8 does so too, and even static W4A4 misses hardly any. So the claim does not tell the method from its rival, nor a small loss from none, and the captions are few. The Fréchet distances, all at the floor, do not either. Only the injected model
# at W6A6 (synthetic) tells the arms apart by what is in the picture.
#
# *Speed* is measured on one layer and one core, against single precision. The paper's factors are for a whole sampler on a GPU against half precision, with kernels that fuse what comes before into the rounding. The two should not be compared: that ours is larger does not mean that the method is faster here.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Natural outliers.** Large transformers grow channels that are tens of times larger than the rest. Ours were put in by hand, at random places and all by the same factor. Natural ones need not be so easy to undo.
# - **Unreadable baselines.** The paper reports that plain rounding fails at W4A8. On the natural small model it does not. On the injected one it falls far behind in PSNR; what is in its pictures we read at W6A6 only, and there hardly an object is left.
# - **Rounded modulations, embedders and attention.** They stay in full precision here. So do the products inside attention.
# - **Better rounding of weights.** All arms round to the nearest point of a grid between the extremes. Methods that choose the rounding would move the level of the whole column W4A8.
# - **Bits that depend on time.** The released plan changes a layer's bits along the sampler's way. That needs more than one copy of the weight, like two ranges; we did not try it.
# - **A measure of content with room.** On the natural model the reader finds nearly all objects at every setting that we tried. It cannot see a small loss.
# - **Another model.** There is one trained network. The intervals cover captions, noise, calibration and signs, not training.
# - **Left untried:** OpenSora's videos and the group of temporal layers with its flow metric, PixArt's FID, CLIP score and ImageReward, latency on a GPU.
# :::
#
# ## Exercises
#
# **1.** From W6A6 to W8A8, in {numref}`fig-vidit-q-grid`, each bit more in weights and activations seems to be worth six decibels. Why six? Check it on one layer's input.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# One bit more halves the step, so the error of each number is halved: 20 log10(2) = 6.02 dB.
x = inputs[LAYERS[0]]
for bits in (4, 6, 8):
    rounded_x = round_to_grid(x, spec_grid(x, QuantSpec(bits, "token", dynamic=True)))
    ratio_db = 10 * torch.log10(x.square().mean() / (x - rounded_x).square().mean())
    print(f"{bits} bits: signal to error {ratio_db:.1f} dB")

# %% [markdown]
# **2.** Balancing with $\alpha = 0.5$ makes two maxima of each channel equal. Which? What does that say about $\alpha = 0$ and $\alpha = 1$?
#
# :::{dropdown} Solution 2: in words
# Write $a = \max |x_c|$ and $w = \max_o |W_{oc}|$. After balancing the activation has the maximum $a / s = a^{1 - \alpha} w^{1 - \alpha}$, the column of the weight $s w = a^{\alpha} w^{\alpha}$. With $\alpha = 0.5$ both are $\sqrt{a w}$. With $\alpha = 1$ the activation's is 1 for all channels, and the weight's is $a w$; with $\alpha = 0$ it is the other way round.
# The product $a w$ cannot be removed: it is what the channel contributes. Balancing only decides who has to represent it.
# :::
#
# **3.** Where do the two weights of the timestep-aware method come from? Ask a rounded layer how many it has kept.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 3", "code_prompt_hide": "Solution 3"}
for method in ("token, balanced", "token, two ranges"):
    calls_ = trajectory(model, 99)
    maxima = {edges: largest(model, calls_, edges) for edges in ((), (500.0,))}
    with rounded(model, METHODS[method], 4, 8, calls_, maxima) as layers:
        draw(model, 99, 2)
        kept = {len(layer._rounded) for layer in layers.values()}
    print(f"{method}: rounded weights kept by each layer: {kept}")
# The factors go into the weight before it is rounded, so each range of time has a rounded weight of its own.

# %% [markdown]
# ## References
#
# The method: {cite:t}`vidit-q`. Balancing: {cite:t}`xiao2023smoothquant`. Rotation: {cite:t}`ashkboos2024quarot`. The backbone: {cite:t}`esser2024scaling`. Code read:
# [thu-nics/ViDiT-Q](https://github.com/thu-nics/ViDiT-Q). Library: [minilib/quantization](https://github.com/minilib-book/minilib/blob/main/minilib/quantization).
