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
# # Latent diffusion: compress first, then diffuse
#
# Most numbers in a picture describe detail that hardly anyone would miss. {cite:t}`ldm` first train an autoencoder that drops such detail. Then the diffusion model works on the small *latent* that is left, and
# it reads the text through cross-attention. Stable Diffusion is this method at scale.

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
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn

from minilib import plotting, zoo
from minilib.arms import run_arms
from minilib.attention import AttentionLayer, CrossAttention, record_attention
from minilib.data import shapes
from minilib.guidance import conditional
from minilib.metrics import (
    features,
    frechet_distance,
    linear_probe,
    mean_scores,
    psnr,
    read_in_batches,
    scene_scores,
)
from minilib.models import ConvVAE, UNet
from minilib.plotting import PALETTE, curve, mean_interval
from minilib.profiling import count_flops, count_parameters
from minilib.recipes.scenes import ddim_scheduler, unet_scheduler
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample_final
from minilib.training import FitConfig, fit


@dataclass(frozen=True)
class Settings:
    """``most_steps`` ends a run early, before its budget is spent: smoke only."""

    seeds: tuple[int, ...]
    budget: float  # floating-point operations of each training run
    scenes: int  # training scenes
    width: int  # of the U-Net's first level
    batch: int  # at f = 4; half of it on the grids of f = 1 and 2, twice on that of f = 8
    samples: int  # scenes a Fréchet distance is measured on
    pairs: int  # captions with two objects
    sampling_steps: int = 16  # for Fréchet distances; 25 elsewhere
    most_steps: int = 10**9


plotting.use_style()
run = Reproduction(
    "ldm",
    profile,
    {
        "smoke": Settings((0,), 3e10, 300, 16, 16, 24, 16, 2, most_steps=12),
        "cpu": Settings((0, 1, 2), 0.7e12, 8_000, 16, 32, 160, 200, 12),
        "gpu": Settings((0, 1, 2), 2e14, 50_000, 64, 64, 2000, 1000, 50),
    },
)
s, device = run.settings, str(run.device)
run.show_settings()

# %%
run.show_card()

# %% [markdown]
# ## The idea
#
# A diffusion model spends the same work on every number of a picture and on every noise level. At low noise it learns fine grain; at high noise it learns what is where. Yet most of the bits of a picture are grain. So a model on
# pixels gives most of its capacity to what matters least, and pays for all pixels at each of its sampling steps.
#
# Latent diffusion splits the work in two.
#
# **Stage 1** is an autoencoder. The encoder $\mathcal{E}$ turns a picture $x$ of $H \times W$ pixels into a latent $z = \mathcal{E}(x)$ of $H/f \times W/f$ places with $c$ channels each; the decoder $\mathcal{D}$ turns it back. The *downsampling factor* $f$ is the dial of
# this page: $f = 1$ is no autoencoder at all. Its loss asks for three things: a picture that is close, one that *looks* close (a distance in the features of a trained network; in the paper also an adversarial loss), and latents that do not run away:
#
# $$
# \begin{aligned}
# L_1 = {} & \lVert x - \mathcal{D}(z) \rVert_1 + d_\text{features}(x, \mathcal{D}(z)) \\
# & + 10^{-6}\, \mathrm{KL}\bigl(q(z \mid x) \,\Vert\, \mathcal{N}(0, 1)\bigr).
# \end{aligned}
# $$ (eq-ldm-stage1)
#
# Here $q(z \mid x)$ is the Gaussian that the encoder puts around its latent, and KL the Kullback-Leibler divergence. Its weight is tiny: it only keeps the latents in bounds. Unlike in a variational autoencoder {cite:p}`kingma2014auto`, nobody samples from this prior. That is the diffusion model's task.
#
# **Stage 2** freezes the autoencoder and trains a diffusion model on latents, with the usual loss. Let $\tau(y)$ be the states that a text encoder makes of the caption $y$, $x_t$ the noisy latent at noise level $t$, $\epsilon$ the noise in it, and $\alpha_t$ and $\sigma_t$ the schedule's weights of signal and noise, with $\alpha_t^2 + \sigma_t^2 = 1$:
#
# $$
# L_2 = \mathbb{E}_{z, \epsilon, t} \bigl\lVert \epsilon - \hat\epsilon(x_t, t, \tau(y)) \bigr\rVert^2, \qquad x_t = \alpha_t z + \sigma_t \epsilon .
# $$ (eq-ldm-stage2)
#
# The paper's network predicts the noise, as written. On this page it predicts the velocity $v = \alpha_t \epsilon - \sigma_t z$, in every arm, as the 768-pixel model of Stable Diffusion 2 does: the same information, in another mixture (see {doc}`/conventions`). At high noise an error of $\hat\epsilon$ becomes
# an error of the picture that is $\sigma_t / \alpha_t$ times as large. Our narrow networks on pixels make such errors, and would lose for that reason alone.
#
# To sample, start from noise of the latent's shape, take the steps there, and decode once.
#
# What does each $f$ throw away, and how fast does noise bury the rest? For this page's scenes both can be looked at directly. Take a scene, and the same scene with one detail changed. Their latents lie at some distance $d$. Add noise: an ideal
# observer who knows both latents, and has to say which one was noised, errs with probability
#
# $$
# p = \Phi\!\left( - \frac{\alpha_t}{\sigma_t}\, \frac{d}{2} \right),
# $$ (eq-ldm-observer)
#
# where $\Phi$ is the distribution function of the normal distribution. No denoiser can do better. We call the detail *lost* at the first $t$ where the observer errs more than once in four times.

# %%
# NBVAL_CHECK_OUTPUT
FACTORS = (1, 2, 4, 8)
vaes = {f: zoo.load(f"vae_shapes_f{f}", device) for f in FACTORS[1:]}
oracle = zoo.load("oracle_shapes32", device)  # reads scenes; its features measure Fréchet distances
noising = unet_scheduler()  # Stable Diffusion's: 1,000 steps, "scaled linear" betas


@torch.no_grad()
def encode(f, x, generator=None):
    """Pictures -> latents of unit spread; with a generator samples of q(z | x), else its mean."""
    if f == 1:
        return x
    return torch.cat([vaes[f].encode_scaled(part.to(device), generator).cpu() for part in x.split(250)])


@torch.no_grad()
def decode(f, z):
    """Latents of unit spread -> pictures."""
    if f > 1:
        z = torch.cat([vaes[f].decode_scaled(part) for part in z.split(250)])
    return z.clamp(-1, 1).cpu()


scene = shapes.parse(["large yellow circle top left and small blue cross bottom right"])
scene = replace(scene, stripe=torch.tensor([[1, 3, -1]]))  # stripes: horizontal, rising
latent_shape = {f: tuple(encode(f, shapes.render(scene, 32)).shape[1:]) for f in FACTORS}
for f, shape in latent_shape.items():
    print(f"f = {f}: latent {shape}, {torch.Size(shape).numel():5,} numbers for 3,072 of the picture")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four columns, f = 1, 2, 4, 8. Below: the same scene, a striped yellow circle and a small striped blue cross, as each latent decodes it. It looks the same up to f = 4; at f = 8 the stripes are gone. Above: bars that show up to which noise level five details can be told apart. In every column the place of an object lasts longest. From f = 2 to f = 8 the bars get shorter, and at f = 8 the bar of the stripes is by far the shortest."}, "figure": {"caption": "The picture to remember. Below: one scene, decoded from each latent without any noise. Above: the noise level at which a detail of the large circle is lost to an ideal observer. At $f = 8$ the decoded picture has lost the stripes; the latent keeps only a weak trace of them, which little noise buries.", "name": "fig-ldm-lost"}}


def first(name, value):
    """The scene with one value of its first object changed."""
    rest = getattr(scene, name)[:, 1:]
    return replace(scene, **{name: torch.cat([torch.tensor([[value]]), rest], 1)})


changes = {
    "place": first("cell", 2),  # top right
    "colour": first("colour", 0),  # red
    "size": first("size", 0),  # small
    "shape": first("shape", 1),  # square
    "stripes": first("stripe", 2),  # vertical
}
t = torch.arange(1000)
ratio = noising.alphas_cumprod.double()
ratio = (ratio / (1 - ratio)).sqrt()  # alpha / sigma, falling in t
fig, axes = plt.subplots(2, 4, figsize=(7, 4.4), height_ratios=(1.25, 1), layout="constrained")
lost = {}
for f, bars, below in zip(FACTORS, *axes, strict=True):
    z = encode(f, shapes.render(scene, 32))
    for name, other in changes.items():
        d = (z - encode(f, shapes.render(other, 32))).double().norm()
        lost[f, name] = int((ratio * d / 2 > 0.6745).sum())  # Phi(-0.6745) = 1/4
    ends = [lost[f, name] for name in changes]
    bars.barh(range(len(changes)), ends, color=PALETTE[: len(changes)])
    for row, end in enumerate(ends):
        inside = end > 500
        where = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": "black"}
        label = end if end < 1000 else "never"
        bars.text(end - 25 if inside else end + 25, row, label, va="center", fontsize=8, **where)
    bars.set(title=f"$f$ = {f}", xlim=(0, 1000), xticks=(0, 400, 800), yticks=[])
    bars.invert_yaxis()
    below.imshow((decode(f, z.to(device))[0].permute(1, 2, 0) + 1) / 2)
    below.set(xticks=[], yticks=[], xlabel=" x ".join(map(str, latent_shape[f])))
    below.grid(False)
axes[0, 0].set_yticks(range(len(changes)), changes)
fig.supxlabel(
    "above: noise level $t$ at which the detail is lost; below: the shape of the latent", fontsize=9
)
plt.show()

# %% [markdown]
# Read it column by column first. The place of an object outlasts everything else, so *where* things are has to be decided early on the way from noise to picture. The other details are settled later. Their order is set by how far each moves the latent, and it differs a little between the columns.
#
# Then read it from $f = 2$ to the right. A latent of fewer numbers holds each detail less redundantly, so the same schedule buries it sooner. And at $f = 8$ one bar falls out of line: the stripes. In this scene the last doubling of $f$ costs fine texture, and little else that the eye would notice. That is the compression that the paper is after, though one
# may already find it too much.
#
# Pixels are the most redundant of all: the colour of an object is written into dozens of them. Their bars are not the longest only because pixels in $[-1, 1]$ have
# a smaller spread than latents, which are divided by theirs (below). So what a schedule means depends on redundancy and on spread. That is why a schedule has to be chosen for a resolution {cite:p}`hoogeboom2023simple,chen2023importance`.
#
# ## The method
#
# ### Stage 1, and a factor that is easily forgotten
#
# The three autoencoders come from this book's zoo: convolutional, one design at three depths, trained on scenes of 32 x 32 pixels with fine stripes. Their perceptual distance uses the features of the network that reads scenes, in the place of LPIPS
# {cite:p}`zhang2018unreasonable`; there is no adversarial loss, so blur is not punished as hard as in the paper. The KL term is a *sum* over the latent, weighed against a *sum* over the pixels, as in the released code. A mean in one of the two places would change its weight a hundredfold
# or more.
#
# Nothing in {eq}`eq-ldm-stage1` asks for latents of spread 1. A noise schedule assumes it. So the latents are divided by their standard deviation, one number for all channels. Here is what happens without. The cell is broken on purpose.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three rows of six decoded pictures of one noisy latent, from t = 0 to t = 999. With unit spread, and with the raw spread just the same, the scene is damaged at t = 400 and nearly gone at 600. With the spread of Stable Diffusion's raw latents it is clean at 400 and can still be made out at 600."}, "figure": {"caption": "Broken on purpose in the lower rows. A noised latent, decoded as it is. Top: divided by its standard deviation. Middle: this autoencoder's raw latent. Bottom: spread as widely as the raw latents of Stable Diffusion, 5.5. The same $t$ no longer means the same damage.", "name": "fig-ldm-rescale"}}
vae, x = vaes[4], shapes.render(scene, 32)
z = encode(4, x)
spreads = {"divided by std": 1.0, "raw": 1 / vae.scaling_factor, "as wide as SD's": 1 / 0.18215}
times = torch.tensor([0, 200, 400, 600, 800, 999])
noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
rows = []
for spread in spreads.values():
    noisy = noising.add_noise((spread * z).expand(6, -1, -1, -1), noise.expand(6, -1, -1, -1), times)
    rows.append(decode(4, (noisy / spread).to(device)))
labels = [f"{name} ({spread:.1f})" for name, spread in spreads.items()]
plotting.show_images(
    torch.cat(rows), 6, row_labels=labels, column_labels=[f"t = {t}" for t in times.tolist()], scale=0.85
)
plt.show()
end = noising.alphas_cumprod[-1]
for name, spread in spreads.items():
    left = float(spread * (end / (1 - end)).sqrt())
    print(f"{name:16s} signal over noise at the last step, t = 999: {left:.2f}")

# %% [markdown]
# The raw spread of this autoencoder happens to lie near 1, so the step could almost be forgotten here. Stable Diffusion's does not. Sampling starts from pure noise, but a model trained on latents like the last row has never seen pure noise. And many of its training steps show it nearly clean latents, where there is little to learn. One arm below trains on such latents, to see what it costs.
#
# :::{admonition} In the released code
# :class: tip
# [`ddpm.py`](https://github.com/CompVis/latent-diffusion/blob/a506df5/ldm/models/diffusion/ddpm.py#L477-L491) measures the standard deviation on the *first training batch*, if `scale_by_std` is set, and keeps `1 / std`. The text-to-image configuration
# ships the number 0.18215 instead, which Stable Diffusion inherited: its raw latents have a standard deviation of about 5.5.
# :::
#
# ### Stage 2: a U-Net that reads
#
# The denoiser is a U-Net {cite:p}`ronneberger2015unet`. At some resolutions a *spatial transformer* follows each residual block. It treats the places of the feature map as tokens, and lets them look at each other, then at the text, then go through a small network each for
# itself. One addition here is not the paper's: the places are marked with fixed sine and cosine positions before they look, in every arm. It is meant to help so few layers to learn soon what is where. The look at the text is cross-attention {cite:p}`vaswani2017attention`. Let $h$ be the tokens of the picture ($n$ of them, width $d$) and $\tau$ the states of the text:
#
# $$
# \operatorname{softmax}\!\left( \frac{Q K^\top}{\sqrt{d_\text{head}}} \right) V, \qquad Q = h\, W_Q, \quad K = \tau\, W_K, \quad V = \tau\, W_V .
# $$ (eq-ldm-cross)
#
# Each place asks, each word answers. So a place can take the words that concern it and leave the rest. In code, with heads and a mask for padding:


# %%
def cross_attention(h, text, mask, layer):
    """Tokens (b, n, d) read text states (b, l, d_text); ``layer`` lends its weights."""
    heads = lambda x: x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)  # noqa: E731  (b, heads, n, d_head)
    q, k, v = (heads(x @ w.weight.T) for x, w in ((h, layer.to_q), (text, layer.to_k), (text, layer.to_v)))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
    return layer.to_out((weights @ v).transpose(1, 2).flatten(2)), weights


# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
layer = CrossAttention(32, context_dim=96, num_heads=4).double()
h, words = torch.randn(2, 64, 32, dtype=torch.float64), torch.randn(2, 18, 96, dtype=torch.float64)
mask = torch.arange(18) < torch.tensor([[6], [12]])  # captions of one and of two objects
with torch.no_grad():
    (ours, weights), theirs = cross_attention(h, words, mask, layer), layer(h, words, mask)
gap = float((ours - theirs).abs().max())
run.record("cross-attention", gap)
print("tokens", tuple(h.shape), "  text", tuple(words.shape), "  weights", tuple(weights.shape))
print("page = library", "PASS" if gap <= 1e-5 else f"FAIL {gap:.1e}")

# %% [markdown]
# ### What $f$ does to the cost
#
# A convolution costs the same at every place, so its cost falls as $1/f^2$. Self-attention compares every place with every other: $1/f^4$. Cross-attention compares places with a fixed number of words: $1/f^2$. Its keys and values are made from the
# text alone and cost the same at any $f$. We count by kind of layer, with hooks, on torch's *meta* device, where tensors have shapes but no values.


# %%
def kind_of(name, module):
    if name in ("conv_in", "conv_out"):
        return "first and last convolution"
    if name.endswith(("attn2.to_k", "attn2.to_v")):
        return "text: keys and values"
    if name.startswith(("time_embedding", "pooled_embedding")) or name.endswith("time_emb_proj"):
        return "time"
    if ".attn2" in name:
        return "cross-attention"
    return {nn.Conv2d: "convolutions", nn.Linear: "layers on tokens"}.get(type(module), "group norms")


def work_by_kind(model, *inputs):
    """Floating-point operations of one forward pass by kind of layer; of norms the values that pass through."""
    work, handles = Counter(), []

    def count(name, module):
        def hook(module, args, out):
            if isinstance(module, nn.Conv2d):
                work[kind_of(name, module)] += 2 * out.numel() * module.weight[0].numel()
            elif isinstance(module, nn.Linear):
                work[kind_of(name, module)] += 2 * out.numel() * module.in_features
            elif isinstance(module, nn.GroupNorm):
                work["group norms"] += out.numel()
            else:  # queries x keys, and weights x values
                keys = args[1] if len(args) > 1 and args[1] is not None else args[0]
                kind = "cross-attention" if len(args) > 1 else "self-attention scores"
                work[kind] += 4 * args[0].numel() * keys.shape[1]

        return module.register_forward_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm | AttentionLayer):
            handles.append(count(name, module))
    model(*inputs)
    for handle in handles:
        handle.remove()
    return work


def body(f, widths=(s.width, 2 * s.width), **options):
    """The U-Net of this page for latents of factor f; ``options`` override."""
    channels, side = latent_shape[f][0], latent_shape[f][1]
    small = {"layers_per_block": 1, "attention_levels": [1], "num_heads": 4, "norm_num_groups": 4}
    shape = {"sample_size": side, "in_channels": channels, "out_channels": channels}
    text = {"cross_attention_dim": 96, "attention_positions": True}
    return shape | {"block_out_channels": list(widths)} | small | text | options


PAPER_BODY = {  # the text-to-image model of the released code; pictures of 256 x 256
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_levels": [0, 1, 2],
    "num_heads": 8,
    "cross_attention_dim": 1280,
    "norm_num_groups": 32,
}
POWER = {"self-attention scores": 4, "text: keys and values": 0, "time": 0}  # all others: 2


def ladder(size, factors, build, length):
    """work[f] and the shapes of all weights[f], first and last convolution left out."""
    work, weights, config = {}, {}, None
    for f in factors:
        with torch.device("meta"):
            if build(f) != config:  # the paper's body is large, and the same from f = 2 on
                config = build(f)
                model = UNet(**config)
            x = torch.zeros(1, model.in_channels, size // f, size // f)
            inputs = (x, torch.zeros(1), torch.zeros(1, length, model.cross_attention_dim))
            work[f] = work_by_kind(model, *inputs)
        total = sum(v for kind, v in work[f].items() if kind != "group norms")
        assert total == count_flops(model, *inputs).flops  # two counters, one answer
        named = model.named_parameters()
        weights[f] = {k: p.shape for k, p in named if not k.startswith(("conv_in", "conv_out"))}
    return work, weights


# %%
# NBVAL_CHECK_OUTPUT
off, differing, tables = [], 0, {}
small = lambda f: body(f, widths=(16, 32))  # noqa: E731  the cpu profile's, whatever profile runs
large = lambda f: PAPER_BODY | {"in_channels": 3 if f == 1 else 4, "out_channels": 3 if f == 1 else 4}  # noqa: E731
for name, size, factors, build, length in (
    ("this page, 32 pixels, 18 tokens", 32, FACTORS, small, 18),
    ("text-to-image LDM, 256 pixels, 77 tokens", 256, (1, 2, 4, 8, 16, 32), large, 77),
):
    work, weights = ladder(size, factors, build, length)
    for kind in set(work[1]) - {"first and last convolution"}:
        off += [abs(work[1][kind] / work[f][kind] / f ** POWER.get(kind, 2) - 1) for f in factors]
    differing += sum(weights[f] != weights[1] for f in factors)
    print(name, "(million operations a picture)")
    for kind in sorted(work[1]):
        print(f"  {kind:27s}", "".join(f"{work[f][kind] / 1e6:14,.2f}" for f in factors))
    totals = [sum(v for k, v in work[f].items() if k != "group norms") for f in factors]
    print(f"  {'all operations':27s}", "".join(f"{v / 1e6:14,.2f}" for v in totals), "\n")
run.record("flops-scaling", max(off))
run.record("same-parameters", differing)
print("scaling as predicted:", "PASS" if max(off) < 1e-6 else max(off))

# %% [markdown]
# The lines of cross-attention hold queries, products and output; the norms are counted in values. At the paper's size and $f = 1$, self-attention between all pixels would outweigh everything else together: models on pixels therefore keep attention to low resolutions. The latent brings the full model back into
# reach. (The column is a thought experiment. For its own comparison of factors the paper keeps the number of parameters nearly constant, but fits depth and widths of the U-Net to each $f$. Here the body is literally the same.)
#
# The same modules at the published sizes have the published numbers of parameters. That speaks for the same parts in the same sizes; a count alone cannot show how they are wired.

# %%
# NBVAL_CHECK_OUTPUT
PUBLISHED = {  # model, millions of parameters, worth of the last digit
    "U-Net of the text-to-image LDM": (
        UNet,
        PAPER_BODY | {"in_channels": 4, "out_channels": 4},
        872.30,
        0.01,
    ),
    "U-Net of Stable Diffusion 1": (
        UNet,
        PAPER_BODY | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768},
        859.52,
        0.01,
    ),
    "U-Net of the class-conditional LDM-4": (
        UNet,
        {
            "block_out_channels": [192, 384, 576, 960],
            "attention_levels": [1, 2, 3],
            "num_heads": 1,
            "cross_attention_dim": 512,
            "norm_num_groups": 32,
        },
        400.92,
        0.01,
    ),
    "autoencoder, f = 8 (KL)": (
        ConvVAE,
        {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "mid_attention": True,
            "quant_conv": True,
        },
        83.7,
        0.1,
    ),
}
off = []
for name, (build, config, millions, digit) in PUBLISHED.items():
    with torch.device("meta"):
        held = count_parameters(build(**config))
    off.append(abs(held / 1e6 - millions) / digit)
    print(f"{name:38s} {held:12,} parameters, published {millions:g} million")
run.record("published-sizes", max(off))

# %% [markdown]
# ## The experiment
#
# The data are generated scenes of 32 x 32 pixels with one to three objects, each with fine stripes, and their captions. The captions do not mention the stripes. Held-out captions, which no training set contains, are used for all measurements.
#
# **Text.** The text encoder $\tau$ is the zoo's `text_shapes`: three transformer blocks, trained to read captions of such scenes. It stays frozen, and is the same in all arms. The paper trains $\tau$ together with the U-Net; Stable Diffusion freezes a trained one
# {cite:p}`radford2021learning`. We follow the latter, for a practical reason: an encoder that starts from nothing needs thousands of steps before words are bound to places, and arms with few steps would be judged by that alone.
#
# **Arms.** Every run gets the same number of floating-point operations for the training of its U-Net, counted as three forward passes a picture. What an arm saves on a step it spends on more steps.
#
# :::{table} The arms. Same U-Net body but for what is named, same captions, same schedule.
# :name: tab-ldm-arms
#
# | arm | the U-Net sees | question |
# |---|---|---|
# | f = 4 | latents of 8 x 8 | the method |
# | f = 2, f = 8 | latents of 16 x 16, of 4 x 4 | how far to compress? |
# | f = 1 | pixels | what is the latent worth? (control) |
# | pixels, narrow | pixels, half the width | or is it only that a step is cheaper? (control) |
# | pixels, patches | pixels cut into 2 x 2 patches, each patch's 12 numbers at one place of the grid of f = 2 | or only the small grid? (control) |
# | f = 4, pooled text | latents of 8 x 8; the mean of the text's states is added to the time embedding, no cross-attention, widened to as many parameters | what is cross-attention worth? (control) |
# | f = 4, not rescaled | latents spread as widely as Stable Diffusion's raw ones | the broken arm |
# :::
#
# A step of the narrow arm still costs more than one of $f = 4$. To bring it all the way down, four channels would have to do, which is hardly a network. The patched one is the sharper control: same grid, same body and nearly the same number of steps as $f = 2$, and no autoencoder. Why not patches of 4, beside $f = 4$? Each
# place would hold 48 numbers of noise, and 16 channels cannot pass them on to be predicted. That a latent has few numbers a place is part of its advantage. All arms but the broken one, which has the learning rate of $f = 4$, were tuned alike: the learning rate of each was chosen between 0.004 and 0.008 by the loss on scenes
# kept apart, on another seed than those below and in runs of a third of the length (0.002 was too slow for pixels and latents alike). The arms on the grids of $f = 1$ and $f = 2$ take half the batch: where steps are dear,
# more of them are worth more than larger batches. $f = 8$ takes twice the batch: its steps are so small that a processor spends most of them on overheads.

# %% tags=["hide-input"]


@dataclass(frozen=True)
class Arm:
    f: int
    body: dict[str, Any]
    lr: float
    batch: int
    reads: tuple[str, ...] = ("context", "context_mask")
    spread: float = 1.0  # standard deviation of what it is trained on, over 1


POOLED = {"cross_attention_dim": 0, "pooled_dim": 96}
ARMS = {
    "f = 8": Arm(8, body(8), 8e-3, 2 * s.batch),
    "f = 1": Arm(1, body(1), 4e-3, s.batch // 2),
    "f = 2": Arm(2, body(2), 4e-3, s.batch // 2),
    "f = 4": Arm(4, body(4), 8e-3, s.batch),
    "f = 4, pooled text": Arm(
        4, body(4, (s.width * 5 // 4, 2 * s.width), **POOLED), 4e-3, s.batch, reads=("pooled",)
    ),
    "pixels, patches": Arm(1, body(1, patch_size=2), 8e-3, s.batch // 2),
    "pixels, narrow": Arm(1, body(1, (s.width // 2, s.width), num_heads=2), 8e-3, s.batch // 2),
}
BROKEN = {"f = 4, not rescaled": replace(ARMS["f = 4"], spread=1 / 0.18215)}

text_encoder = zoo.load("text_shapes").text_encoder


@torch.no_grad()
def read(tokens):
    """What an arm may read of captions: states and mask, or their mean."""
    parts = [text_encoder(part) for part in tokens.split(500)]
    context, mask = (torch.cat([getattr(p, name) for p in parts]) for name in ("context", "context_mask"))
    words = mask[..., None]
    return {
        "context": context.half(),
        "context_mask": mask,
        "pooled": ((context * words).sum(1) / words.sum(1)).half(),
    }


def take(text, rows, names):
    """Some rows of what ``read`` gave, in float32."""
    chosen = {name: text[name][rows] for name in names}
    return {name: v.float() if v.is_floating_point() else v for name, v in chosen.items()}


one_caption = read(shapes.tokens(scene))
costs = {}
for name, arm in (ARMS | BROKEN).items():
    inputs = torch.zeros(1, *latent_shape[arm.f]), torch.zeros(1)
    costs[name] = count_flops(UNet(**arm.body), *inputs, **take(one_caption, slice(1), arm.reads)).flops


def steps_of(name, arm):
    return min(s.most_steps, max(1, round(s.budget / (3 * costs[name] * arm.batch))))


lines = [
    "| arm | parameters | million operations a picture | steps | batch | learning rate |",
    "|---|---|---|---|---|---|",
]
for name, arm in (ARMS | BROKEN).items():
    held = count_parameters(UNet(**arm.body))
    lines.append(
        f"| {name} | {held:,} | {costs[name] / 1e6:,.1f} | {steps_of(name, arm):,} | {arm.batch} | {arm.lr:g} |"
    )
display(Markdown("\n".join(lines)))

# %% [markdown]
# All pictures are encoded once, all captions read once. The autoencoder's cost is shared by all later runs on its latents, so it is not charged to the arms, as in the paper. But it is not small, as exercise 1 shows.

# %%
generator = torch.Generator().manual_seed(1000)
train = shapes.sample_scenes(s.scenes, generator, objects=(1, 3), split="train", texture=True)
pictures = shapes.render(train, 32)
text = read(torch.cat([shapes.tokens(train), shapes.null_tokens(1)]))  # the last row is the empty caption
latents = {f: encode(f, pictures, torch.Generator().manual_seed(f)).half() for f in FACTORS}
reference = features(oracle, pictures[:5000].to(device)).cpu()
print("training scenes", tuple(pictures.shape), {f: tuple(z.shape[1:]) for f, z in latents.items()})


def held_out(n, seed, objects):
    """Scenes with captions of the test split."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    return shapes.sample_scenes(n, generator, objects=objects, split="test", texture=True)


def draw(model, arm, captions, *, steps, seed, guidance=1.0, side=None):
    """Pictures of captions, by DDIM; ``guidance`` above 1 takes a second look without the caption."""
    told, empty = (
        {k: v.to(device) for k, v in take(given, slice(None), arm.reads).items()}
        for given in (read(captions), read(shapes.null_tokens(1)))
    )
    both = {k: torch.cat([v, empty[k].expand_as(v)]) for k, v in told.items()}

    def predict(x, t):
        if guidance == 1.0:
            return model(x, t, **told)
        with_text, without = model(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return without + guidance * (with_text - without)

    shape = (arm.body["in_channels"], *(side or 2 * (arm.body["sample_size"],)))
    noise = initial_noise((len(captions), *shape), torch.Generator().manual_seed(seed), device=device)
    z = sample_final(predict, ddim_scheduler(), noise, num_inference_steps=steps)
    return decode(arm.f, z / arm.spread)


def study(task, seed):
    """Train one arm; Fréchet distances on the way and at the end, pictures, accuracy on two objects."""
    arm, steps, data = task
    start, points = time.process_time(), []

    def make_batch(generator, n):
        rows = torch.randint(len(data), (n,), generator=generator)
        dropped = torch.rand(n, generator=generator) < 0.1  # a tenth learns without its caption
        return {
            "z": arm.spread * data[rows].float(),
            "noise": torch.randn(n, *data.shape[1:], generator=generator),
            "t": torch.randint(1000, (n,), generator=generator),
        } | take(text, torch.where(dropped, len(data), rows), arm.reads)

    def loss(model, batch):
        noisy = noising.add_noise(batch["z"], batch["noise"], batch["t"])
        velocity = noising.get_velocity(batch["z"], batch["noise"], batch["t"])
        return F.mse_loss(model(noisy, batch["t"], **{k: batch[k] for k in arm.reads}), velocity)

    def look(step, ema, value):
        spent.append(time.process_time() - start)
        captions = shapes.tokens(held_out(s.samples, seed, (1, 3)))
        x = draw(ema, arm, captions, steps=s.sampling_steps, seed=seed)
        distance = frechet_distance(features(oracle, x.to(device)).cpu(), reference)
        points.append((step, distance, x[:8]))

    spent = []
    torch.manual_seed(seed)
    config = FitConfig(
        steps=steps, batch_size=arm.batch, lr=arm.lr, warmup=min(50, steps // 4), ema_decay=0.99, seed=seed
    )
    third = -(-steps // 3)
    model = fit(
        UNet(**arm.body), loss, make_batch, config, callback=look, callback_every=third, device=device
    ).ema
    result = {"points": points, "seconds": 3 * spent[0], "model": model.cpu()}
    if arm.f == 4:
        pairs = held_out(s.pairs, seed, (2, 2))
        x = draw(model.to(device), arm, shapes.tokens(pairs), steps=25, seed=seed, guidance=3.0)
        result |= {"read": read_in_batches(oracle, x.to(device)).cpu(), "model": model.cpu()}
    return result


tasks = {name: (arm, steps_of(name, arm), latents[arm.f]) for name, arm in (ARMS | BROKEN).items()}
jobs = {(name, seed): (tasks[name], seed) for seed in s.seeds for name in tasks}
done = run_arms(lambda job, _: study(*job), jobs, [0])  # one pool for all, so that no process waits
results = {name: [done[job][0] for job in jobs if job[0] == name] for name in tasks}

# %% [markdown]
# ## Results
#
# ### Quality for the same work
#
# The Fréchet distance (FD) compares the features of generated and of real scenes; lower is better. Samples are decoded first and compared with real pictures, never with reconstructions: what the decoder loses has to count. Its *floor* is the
# distance of held-out real scenes, in the same number. With so few samples the distance is biased upwards, for real scenes too: read it against the floor, not against zero. The features tell what is in a picture, not where, and they do see the stripes.

# %%
final = {name: torch.tensor([r["points"][-1][1] for r in rs]) for name, rs in results.items()}
held = {seed: shapes.render(held_out(s.samples, seed, (1, 3)), 32) for seed in s.seeds}
rates = {f: {"paired": [], "reference": [], "psnr": []} for f in FACTORS}
for x in held.values():
    real = features(oracle, x.to(device)).cpu()
    for f in FACTORS:
        copy = decode(f, encode(f, x).to(device))
        seen = features(oracle, copy.to(device)).cpu()
        rates[f]["paired"].append(frechet_distance(seen, real) if f > 1 else 0.0)
        rates[f]["reference"].append(frechet_distance(seen, reference))
        rates[f]["psnr"].append(float(psnr(x, copy).mean()) if f > 1 else float("inf"))
floor = torch.tensor(rates[1]["reference"])
run.record("latent-over-pixels", final["f = 4"] / final["f = 1"])
run.record("latent-over-narrow", final["f = 4"] / final["pixels, narrow"])
run.record("latent-over-patches", final["f = 2"] / final["pixels, patches"])


def with_interval(values, form=".2f"):
    mean, low, high = (float(v) for v in mean_interval(torch.as_tensor(values)))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]" if len(values) > 1 else f"{mean:{form}}"


lines = ["| arm | FD after training (90 % interval) | CPU seconds of training |", "|---|---|---|"]
for name, rs in results.items():
    seconds = sum(r["seconds"] for r in rs) / len(rs)
    lines.append(f"| {name} | {with_interval(final[name], '.1f')} | {seconds:.0f} |")
lines.append(f"| held-out real scenes (floor) | {with_interval(floor, '.1f')} | |")
display(Markdown("\n".join(lines)))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Fréchet distance on a logarithmic axis against training operations, three points an arm. The curves of the latent arms lie far below those of the three pixel arms at every point, that of f = 4 lowest. They fall with more training, as do the narrow and the patched pixel arms, a little; that of f = 1 hardly moves. A dashed line at the bottom is the floor of real scenes."}, "figure": {"caption": "Fréchet distance against the work of training, one curve an arm; the pooled and the broken arm are in the table only. Bands: 90 % intervals over seeds. Dashed: real held-out scenes. The learning rate falls to zero towards the last point only, which favours it.", "name": "fig-ldm-flops"}}
shown = ["f = 1", "f = 2", "f = 4", "f = 8", "pixels, narrow", "pixels, patches"]
fig, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
for name, colour, marker in zip(shown, PALETTE, "osD^vP", strict=False):
    arm, runs = ARMS[name], results[name]
    spent = [3 * costs[name] * arm.batch * p[0] / 1e12 for p in runs[0]["points"]]
    values = torch.tensor([[p[1] for p in r["points"]] for r in runs])
    mean, low, high = mean_interval(values)
    ax.plot(spent, mean, marker=marker, color=colour, label=name, ls="-" if name.startswith("f") else ":")
    ax.fill_between(spent, low.clamp(min=0.5 * float(floor.min())), high, color=colour, alpha=0.15, lw=0)
ax.axhline(floor.mean(), color="k", ls="--", lw=1)
ax.text(0.01, float(floor.mean()) * 1.06, "real scenes", fontsize=9, transform=ax.get_yaxis_transform())
ax.set(
    yscale="log",
    xlim=(0, None),
    xlabel="training work ($10^{12}$ operations)",
    ylabel="Fréchet distance to real scenes",
)
fig.legend(loc="outside right center")
plt.show()

# %% [markdown]
# The axis counts operations, not seconds. On small grids a step is so short that the processor spends part of it on overheads, and narrow layers seem to use it badly too: compare the seconds in the table, which are far from equal.
#
# Take the three arms on pixels with care. After the number of steps that the budget buys them, they are hardly trained. At distances this large their order means little, and none of them says what a pixel model can do.
#
# And the broken arm? Over three seeds, at the learning rate of the intact $f = 4$, its mean distance is a little higher. But its seeds differ far more than those of the intact arm, and its interval holds all of the other's. That is inconclusive: the page shows neither that forgetting the factor costs something, nor that it is free.
# The likely reasons: three seeds that scatter so widely cannot settle so small a difference, a run this short is far from the quality at which the mismatch would tell, and a schedule that leaves some signal at its last step
# misleads a model less when nearly every scene begins with the same dark ground.
#
# What do these distances look like?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of eight generated scenes, one row an arm, the top row shows what was asked for. The row of f = 1 is noise, the narrow arm draws pale blotches, the patched arm noise with blotches. The rows of the latent arms show coloured objects on a dark ground: speckled blobs at f = 2, textured and some of the right shape at f = 4, clean but without stripes at f = 8."}, "figure": {"caption": "The first eight held-out captions of the first seed, not picked, drawn by each arm without guidance. Top: what was asked for.", "name": "fig-ldm-samples"}}
rows = {"asked for": held[s.seeds[0]][:8]} | {name: results[name][0]["points"][-1][2] for name in shown}
plotting.show_images(torch.cat(list(rows.values())), 8, row_labels=list(rows), scale=0.62)
plt.show()

# %% [markdown]
# The pictures of the pixel arms are not bad scenes: they are not scenes yet. Look at $f = 2$ and $f = 8$ as well. Their distances are close, but one draws speckled blobs with hardly a shape, the other clean shapes without stripes. The judge seems to mind missing stripes about as much as missing shapes; a person might not.
#
# ### How far to compress
#
# More compression makes a step cheaper, and the picture worse before the diffusion model has done anything. We measure the second effect by sending held-out scenes through the autoencoder alone. The *reconstruction FD* (rFD) compares them with the same scenes untouched, so that $f = 1$ has 0. In the figure,
# where they stand beside samples, they are compared with training scenes like the samples are.

# %%
step = torch.tensor(
    [[rates[2 * f]["paired"][i] / rates[f]["paired"][i] for f in (2, 4)] for i in range(len(s.seeds))]
)
run.record("rate-distortion", step.amin(1))
run.record("decoder-limit", final["f = 8"] / torch.tensor(rates[8]["reference"]))
outer = torch.minimum(final["f = 1"], final["f = 8"])
run.record("interior", outer / torch.minimum(final["f = 2"], final["f = 4"]))
lines = ["| f | numbers a latent | rFD | PSNR (dB) |", "|---|---|---|---|"]
for f in FACTORS:
    size = torch.Size(latent_shape[f]).numel()
    quality = with_interval(rates[f]["psnr"], ".1f") if f > 1 else "exact"
    lines.append(f"| {f} | {size:,} | {with_interval(rates[f]['paired'])} | {quality} |")
display(Markdown("\n".join(lines)))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Fréchet distance against f = 1, 2, 4, 8 on a logarithmic axis. The lower curve, reconstructions, stays on the floor up to f = 4 and leaps at f = 8. The upper curve, samples, falls from f = 1 to f = 4 and turns up at f = 8, where the two nearly meet."}, "figure": {"caption": "Fréchet distance of samples and of reconstructions to training scenes, against the downsampling factor; equal training work for all samples. Bands: 90 % intervals over seeds. Left, the diffusion model is what limits; right, the autoencoder.", "name": "fig-ldm-factor"}}
fig, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
curve(ax, FACTORS, torch.stack([final[f"f = {f}"] for f in FACTORS], 1), "samples", PALETTE[0])
copies = torch.tensor([rates[f]["reference"] for f in FACTORS]).T
curve(ax, FACTORS, copies, "reconstructions", PALETTE[1], "s")
ax.axhline(floor.mean(), color="k", ls="--", lw=1, label="real scenes")
ax.set(xscale="log", yscale="log", xlabel="downsampling factor $f$", ylabel="Fréchet distance to real scenes")
ax.set_xticks(FACTORS, FACTORS)
ax.set_yticks([20, 50, 100, 200, 500], [20, 50, 100, 200, 500])
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# PSNR is the peak signal-to-noise ratio of reconstructions. The gap between the two curves is what the diffusion model adds; the lower curve is what no diffusion model on these latents should be expected to remove. Up to $f = 4$ the autoencoder costs so little that the noise of the floor hides it: only rFD, which compares each set with its own originals, sees it. At $f = 8$ nearly all of the distance is the autoencoder's.
#
# ### What cross-attention is worth
#
# Now captions with two objects, drawn with guidance 3: each step goes three times as far from the prediction without the caption as the prediction with it ({doc}`/conventions`). An object counts as right if the network that reads scenes finds its shape, colour and size in the cell where they were asked for. Three landmarks belong to the number: real scenes sent through the autoencoder (the ceiling), the same samples judged by *other* captions,
# and real scenes judged by other captions (chance).


# %%
def right(read, scenes):
    return mean_scores(scene_scores(read, scenes))["object"]


def other(scenes):
    return scenes[torch.arange(len(scenes)).roll(1)]


pairs = [held_out(s.pairs, seed, (2, 2)) for seed in s.seeds]
seen = {name: [r["read"] for r in results[name]] for name in ("f = 4", "f = 4, pooled text")}
seen["real scenes"] = [read_in_batches(oracle, shapes.render(p, 32).to(device)).cpu() for p in pairs]
copies = [decode(4, encode(4, shapes.render(p, 32)).to(device)) for p in pairs]
seen["real scenes through the autoencoder"] = [read_in_batches(oracle, x.to(device)).cpu() for x in copies]
told = {k: torch.tensor([right(r, p) for r, p in zip(v, pairs, strict=True)]) for k, v in seen.items()}
shuffled = {
    k: torch.tensor([right(r, other(p)) for r, p in zip(v, pairs, strict=True)]) for k, v in seen.items()
}
run.record("cross-over-pooled", 100 * (told["f = 4"] - told["f = 4, pooled text"]))
run.record("shuffled", 100 * (shuffled["f = 4"] - shuffled["real scenes"]))
lines = ["| objects right, captions of two objects | own caption | another caption |", "|---|---|---|"]
for name in seen:
    lines.append(f"| {name} | {with_interval(told[name], '.1%')} | {with_interval(shuffled[name], '.1%')} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# Cross-attention is far ahead, though far from the ceiling as well, and its seeds differ widely: in runs this short the binding of words to places is still being learned. The pooled arm is hardly above chance.
#
# The pooled arm has one vector for the whole caption, the same at every place. It has to say with that vector which of nine cells gets what, and self-attention has to work out the rest from positions. It cannot look anything up. Does the vector hold enough to say it? A linear
# read-out tells. It is fitted on some captions of two objects and tested on others.

# %%
scenes = shapes.sample_scenes(1500, torch.Generator().manual_seed(500), objects=(2, 2))
vector, cells = read(shapes.tokens(scenes))["pooled"].float(), scenes.grid()
occupied = [
    linear_probe(vector[:1000], there[:1000], vector[1000:], there[1000:])
    for there in (cells[..., 1] >= 0).long().T
]
colours = []
for colour in cells[..., 1].T:
    x, y = vector[colour >= 0], colour[colour >= 0]
    n = 2 * len(x) // 3
    colours.append(linear_probe(x[:n], y[:n], x[n:], y[n:]))
print(
    f"read from the pooled vector: is a cell occupied, {sum(occupied) / 9:.1%}; by which colour, {sum(colours) / 9:.1%}"
)

# %% [markdown]
# So what the pooled arm lacks is not information, at least not about places and colours. At this budget it has not learned to use it. Whether it would in a longer run, the page does not show.
#
# Who looks at which word? The trained model of the zoo, `unet_shapes32`, has larger maps to show. We record the weights of {eq}`eq-ldm-cross` in its cross-attention layers with `record_attention`, and show those with maps of at least 8 x 8, while it draws one scene in 25 steps. (It works on pixels in patches of 2 x 2 and was trained without stripes; its
# blocks are those of this page.)

# %% tags=["hide-input"] mystnb={"image": {"alt": "A drawn scene with two objects, and one small heat map for each word of the caption. The maps of size, colour and shape are bright at the object that they describe. Those of the words of place are not: top and bottom are bright beside or below and above their objects, left and right mostly along a band in the middle. The map of 'and' is spread over much of the picture."}, "figure": {"caption": "Where each word is read: cross-attention weights, averaged over steps, layers and heads, each map scaled to its own range. Bright places read the word more than other places do. Words of size, colour and shape are read at their object; words of place beside it.", "name": "fig-ldm-words"}}
painter = zoo.load("unet_shapes32", device)
caption = "large red circle top left and small blue square bottom right"
tokens = shapes.encode(caption)[None].to(device)
noise = initial_noise((1, 3, 32, 32), torch.Generator().manual_seed(3), device=device)
with record_attention(painter, "**.attn2", reduce=lambda w: w[:1].mean(1).cpu()) as recorded, torch.no_grad():
    drawn = sample_final(conditional(painter, tokens), ddim_scheduler(), noise, num_inference_steps=25)
maps = []
for calls in recorded.values():
    grid = torch.stack(calls).mean(0)[0].T  # (words, places)
    side = round(grid.shape[1] ** 0.5)
    if side >= 8:
        maps.append(grid.view(1, -1, side, side))
maps = torch.cat(maps).mean(0)[: len(caption.split())]
fig, axes = plt.subplots(2, 6, figsize=(7, 2.7), layout="constrained")
axes[0, 0].imshow(((drawn.cpu()[0].clamp(-1, 1) + 1) / 2).permute(1, 2, 0))
axes[0, 0].set_title("drawn", fontsize=9)
for ax, word, grid in zip(axes.flat[1:], caption.split(), maps, strict=True):
    ax.imshow(grid, cmap="inferno", interpolation="bilinear")
    ax.set_title(word, fontsize=9)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %% [markdown]
# Places that hold an object read its size, colour and shape. The words of place are read elsewhere, next to the object or along the middle, perhaps where it has to be decided that nothing goes. A map like this shows where a word is read, not what is done with it.
#
# ### A wider canvas
#
# The U-Net's convolutions and attention take maps of any size, and so does the decoder. Nothing stops us from starting with a latent of another shape. The arm with $f = 4$ was trained on latents of 8 x 8; here it gets noise of 8 x 12, which decodes to pictures of 32 x 48.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four captions of two objects. Below them square scenes, then wide ones of the same captions: coloured objects on a dark ground, not all of the colour and shape that were asked for. In two of the wide pictures an object appears twice."}, "figure": {"caption": "The same four captions on the canvas of training (top) and on one half as wide again (bottom), first seed, guidance 3. Not picked.", "name": "fig-ldm-wide"}}
ask = shapes.tokens(pairs[0][:4])
model = results["f = 4"][0]["model"].to(device)
fig, axes = plt.subplots(2, 4, figsize=(7, 3.1), layout="constrained")
for line, side in zip(axes, ((8, 8), (8, 12)), strict=True):
    wide = draw(model, ARMS["f = 4"], ask, steps=25, seed=1, guidance=3.0, side=side)
    for ax, x in zip(line, wide, strict=True):
        ax.imshow(((x + 1) / 2).permute(1, 2, 0))
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
for ax, row in zip(axes[0], ask, strict=True):
    ax.set_title(shapes.decode(row).replace(" and ", "\n"), fontsize=6.5)
plt.show()

# %% [markdown]
# It works in so far as the pictures are of a piece. But some objects come out twice: the model has never seen a place beyond the eighth column of the latent, and on this canvas "right" and "centre" lie elsewhere than it learned. (That colours and shapes are often wrong on both canvases is the short training.) The released code says the same of its own wide samples: they can be interesting, and the control is weaker.
#
# ### All claims

# %%
run.report()

# %% [markdown]
# How to read it. The first four lines are arithmetic.
#
# *Latent over pixels* is the paper's headline in small, and the easiest to win: for the price of one picture in training on pixels, a latent of $f = 4$ gets more than a dozen. A U-Net on pixels has hardly begun to learn when its budget is spent. So the line says
# that the latent is far cheaper to *begin* with. It does not say where a pixel model would end, and the size of the ratio is that of this budget. The paper compares at equal numbers of steps, with smaller batches for pixels, on one GPU for each model, and trains for millions of steps.
#
# The two other controls ask what exactly is worth so much. A narrow U-Net on pixels takes a cheaper step, though one still dearer than that of $f = 4$, so it can only begin to answer whether cheapness is all. The patched one works on the grid of $f = 2$, at the same price and with the same body. A place of it holds 12 raw numbers, where the latent has 4.
# So *latent over patches*, which compares it with $f = 2$, comes closest to the autoencoder alone: are learned numbers easier to model than raw ones? Compare it in {numref}`fig-ldm-flops` with $f = 4$ as well: that is the choice one would really have.
#
# Both controls are formally won, and both answers are weak. {numref}`fig-ldm-samples` shows why: these pixel arms, too, were stopped before they drew anything. What is measured is how soon each arm gets rid of noise. There the latent has help of two kinds. A decoder that has only ever made clean pictures hides what noise is left, where a pixel arm
# shows it to the judge. And the narrow first level of our U-Net, with hardly more channels than a patch has numbers, is a tight place for noise to pass. Wider bodies and longer runs, as in the `gpu` profile, would be the fair trial; the run shown here, in the `cpu` profile, is not.
#
# *Rate-distortion* and *decoder limit* belong together: rFD in the table must rise with $f$, and in {numref}`fig-ldm-factor` samples cannot be expected below the lower curve. At $f = 8$ they almost touch it, so that more training could win little there. *Interior* was stated for the longer runs of the `gpu` profile, and holds here already. It is $f = 4$ that wins; $f = 2$ and $f = 8$ cannot be told apart by their distances. The claim's left half, against $f = 1$, is the easy win over pixels again; its right half, against $f = 8$, is the price of the stripes.
# We expect the best factor to move with the budget: the less there is to spend, the more compression pays.
#
# *Cross over pooled* compares two ways to read the same frozen states. Both arms start from the same encoder, and the pooled one is wider, to make up for the parameters that it lacks. The paper has no such comparison. *Shuffled* is a check of the wiring: the same samples, judged by another caption, must fall to chance.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Converged models.** Each arm trains for less than a minute in the `cpu` profile. The order of the arms after weeks may differ, above all for pixels: none of the three pixel arms gets as far as drawing scenes.
# - **The price of not rescaling.** Three seeds that differ widely, and no clear difference at this length.
# - **Photographs.** Stripes are the only fine detail here. In photographs most bits are detail, and what may be dropped is a matter of taste.
# - **The paper's first stage.** There is no adversarial loss, no vector-quantised variant {cite:p}`esser2021taming`, and one autoencoder for each $f$: the intervals do not hold the luck of *its* training.
# - **A neutral judge.** The Fréchet distance uses features of the network whose lower layers also served as the autoencoders' perceptual distance. Both sides of *latent over patches* are measured with it, but only one was trained with its help.
# - **The whole bill.** The arms do not pay for the autoencoder, whose training here costs more than theirs (exercise 1).
# - **Equal scaling.** Latents are divided by their standard deviation, pixels stay in $[-1, 1]$, as is usual. The schedule is the same for all, so it fits some grids better than others ({numref}`fig-ldm-lost`).
# - **Joint training of the text encoder**, as in the paper. Here it is frozen, in every arm.
# - **Left untried:** factors 16 and 32, ImageNet and MS-COCO, and concatenated conditions: super-resolution, inpainting, layouts.
# :::
#
# ## Exercises
#
# **1.** The arms do not pay for the autoencoder. What does its training cost, in units of one training run of this page? When is it worth it? (Three forward passes a picture, as before; leave the perceptual network out.)

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# It costs more than all arms of one seed together. It is paid once, for every later model on its latents, and it does not depend on how long they
# train. So it pays if many models share it, or if one model trains long, as in the paper. At this page's scale the comparison flatters the latent.
for f in FACTORS[1:]:
    recipe = zoo.entry(f"vae_shapes_f{f}")["recipe"]
    one = count_flops(vaes[f], torch.zeros(1, 3, 32, 32)).flops
    spent = 3 * one * recipe["batch_size"] * recipe["steps"]
    print(f"f = {f}: {spent / 1e12:.1f}e12 operations, {spent / 7e11:.0f} training runs of the cpu profile")

# %% [markdown]
# **2.** Keys and values of the text do not depend on the noisy latent, nor on $t$. In sampling they could be computed once a caption. What share of a forward pass would that save, for this page's U-Net at each $f$ and for the paper's at $f = 8$?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# The line "text: keys and values" over all operations. It does not fall with f, so its share rises as the grid shrinks. At f = 8 it is a large
# part of this page's U-Net, whose grid has fewer places than the caption has tokens.
for name, size, factors, build, length in (
    ("this page", 32, FACTORS, small, 18),
    ("text-to-image LDM", 256, (8,), large, 77),
):
    work, _ = ladder(size, factors, build, length)
    for f in factors:
        total = sum(v for kind, v in work[f].items() if kind != "group norms")
        print(f"{name}, f = {f}: {work[f]['text: keys and values'] / total:.1%}")

# %% [markdown]
# **3.** The weight of the KL term is $10^{-6}$. Is it at work at all? Compare its size with that of the reconstruction error, both summed over an image. What would happen to the latents with a weight of 1, as in a variational autoencoder?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 3", "code_prompt_hide": "Solution 3"}
# Weighted, it is a vanishing part of the loss; all it does is to make latents without bounds a little unattractive, and to stop the encoder
# from making q(z | x) infinitely sharp. With weight 1 every nat of information in the latent would cost as much as a nat of error: the encoder
# would drop stripes, then shapes. The diffusion model does not need latents that look Gaussian, since it learns their distribution.
with torch.no_grad():
    probe = held[s.seeds[0]][:32].to(device)
    for f, vae in vaes.items():
        copy, posterior = vae(probe)
        error = float((probe - copy).abs().flatten(1).sum(1).mean())
        kl = float(posterior.kl().mean())
        print(
            f"f = {f}: |x - D(z)| {error:7.1f}   KL {kl:7.1f} nats   1e-6 KL {1e-6 * kl:.1e}   spread of q {float(posterior.std.mean()):.3f}"
        )

# %% [markdown]
# ## References
#
# The method: {cite:t}`ldm`, with its code [CompVis/latent-diffusion](https://github.com/CompVis/latent-diffusion) (`ldm/models/diffusion/ddpm.py`, `ldm/modules/attention.py`, `ldm/modules/losses/contperceptual.py` and the configurations were read). Before it, in two stages with a transformer: {cite:t}`esser2021taming`. Autoencoder: {cite:t}`kingma2014auto`; perceptual distance:
# {cite:t}`zhang2018unreasonable`. U-Net: {cite:t}`ronneberger2015unet`; attention: {cite:t}`vaswani2017attention`. Schedules and resolution: {cite:t}`hoogeboom2023simple`, {cite:t}`chen2023importance`. A frozen, trained text encoder: {cite:t}`radford2021learning`. Sampler: {cite:t}`song2021denoising`.
