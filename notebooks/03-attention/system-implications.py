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
# # System implications: where the time of image models goes
#
# Much engineering has gone into making language models fast. Does it help models that make images and videos? {cite:t}`system-implications` measured instead of guessing. They took eight such models apart, operator by operator, and looked at how long the sequences are that attention sees.
#
# Nothing is trained on this page either. We count what can be counted, exactly, and time what has to be timed, on one core of a processor.

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
from itertools import groupby, pairwise, product

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator
from torch import nn

from minilib import bench, zoo
from minilib.attention import full_attention, get_attention
from minilib.attention.backends import attention_backend
from minilib.costs import fit_exponent, linear_flops
from minilib.models import DIT_CONFIGS, DiT, UNet
from minilib.models.autoregressive import AUTOREGRESSIVE_CONFIGS, AutoregressiveTransformer
from minilib.models.unet_configs import UNET_CONFIGS
from minilib.models.video import FactorisedBlock
from minilib.operator_costs import (
    OperatorFlops,
    autoregressive_flops,
    dit_operator_flops,
    factorised_block_flops,
    score_matrix_bytes,
    spatial_flops,
    temporal_flops,
    unet_attention_calls,
    unet_convolution_bytes,
    unet_operator_flops,
)
from minilib.operators import KINDS, OperatorTrace, count_operators, shares, time_operators
from minilib.plotting import PALETTE, curve, use_style
from minilib.recipes.scenes import ddim_scheduler
from minilib.reproduction import Reproduction
from minilib.roofline import measure_roofline


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # repetitions: every timing is made anew in each
    real: bool  # models of the published sizes; else narrow ones, wired alike
    lengths: tuple[int, ...]  # keys of the attention that is timed alone
    queries: tuple[int, ...]  # of the sweep over the number of queries
    frames: tuple[int, ...]  # of the sweep over the length of a video
    places: int  # of a frame, in the claims about video
    samples: int  # of a timing of attention alone; the fastest counts
    images: int  # a call of the zoo's models
    dtype: str


many = (1, 4, 16, 64, 256)
run = Reproduction(
    "system-implications",
    profile,
    {
        "smoke": Settings((0,), False, (256,), (1, 16), (4, 8), 64, 2, 2, "float32"),
        "cpu": Settings((0, 1, 2), True, (256, 1024, 2304, 4096), many, (2, 4, 8, 16, 32, 64, 128, 256), 256, 7, 16, "float32"),
        "gpu": Settings((0, 1, 2, 3, 4), True, (256, 1024, 2304, 4096, 9216), many, (2, 4, 8, 16, 32, 64, 128, 256), 256, 7, 64, "bfloat16"),
    },
)  # fmt: skip
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# "Seeds" are repetitions here. Each one repeats a measurement from the start. Times are CPU times of one thread. What is compared is measured in turns, and only ratios of such times are judged.

# %%
run.show_settings()

# %% [markdown]
# (sec-system-implications-idea)=
# ## The idea
#
# **Operators.** A forward pass is a list of calls. Sort them: *attention* (the two products with the softmax between them, without projections), *convolution*, *linear*, *norm*, and *other*: activations, sums, copies. Where does the time go? And where does it go once attention has been given a fused kernel, which never writes its matrix of scores to memory {cite:p}`dao2022flashattention`?
#
# **Sequence length.** For a language model the sequence length is the number of tokens so far. What is it for an image model? Here it is what an attention call sees: its number of queries, and of keys. In the U-Net of a latent diffusion model the tokens are the pixels of a feature map, and each level has half the side of the one above. With an image of $H \times W$ pixels, a latent eight times smaller, and level $s$,
#
# $$
# N_s = \frac{H}{8 \cdot 2^s} \cdot \frac{W}{8 \cdot 2^s} .
# $$ (eq-system-implications-length)
#
# So the length falls by four from level to level, and rises again, *within one* forward pass. From one denoising step to the next it is the same. In an autoregressive transformer it is the other way round: within a pass the length is constant, and it grows from token to token.
#
# **Memory.** Self-attention on $N$ tokens has $N^2$ scores a head, and $N$ goes with the square of the image's side $L$. So the scores take $O(L^4)$ bytes. Cross-attention to a text of $T$ tokens has $N T$ scores, so $O(L^2)$, as the feature maps of the convolutions have.
#
# **Video.** A video of $F$ frames with $P$ places each is often attended to in two ways: inside each frame, and along time at each place. *Spatial* attention is $F$ sequences of length $P$. *Temporal* attention is $P$ sequences of length $F$. In multiply-accumulates (MACs), for tokens of width $D$,
#
# $$
# \text{spatial: } 2 F P^2 D, \qquad \text{temporal: } 2 P F^2 D, \qquad \text{ratio: } P / F .
# $$ (eq-system-implications-video)
#
# With 16 frames of 256 places, the temporal one has 16 times less to do. The paper finds that it takes *longer*.
#
# **Prefill and decode.** A language model first reads its prompt, all tokens at once (*prefill*). Then it writes one token at a time (*decode*): a single query looks at all keys. A diffusion model always has all queries at once. So it resembles prefill, and an autoregressive image model resembles decode. What helps the one need not help the other.
#
# Why not? Take a linear layer from $d$ to $d$ values, applied to $n$ tokens, in numbers of $b$ bytes. Its *arithmetic intensity*, the floating-point operations (FLOPs) for each byte, is
#
# $$
# I = \frac{2 n d^2}{b\,(d^2 + 2 n d)} \;\approx\; \frac{2n}{b} \quad \text{for } n \ll d .
# $$ (eq-system-implications-intensity)
#
# A machine does at most $P_{\max}$ operations and moves at most $B$ bytes a second, so that no work runs faster than $\min(P_{\max}, I B)$: its *roofline* {cite:p}`williams2009roofline`. One token in single precision has $I < 1/2$. It waits for the weights. A thousand tokens share them.
#
# (sec-system-implications-method)=
# ## The method
#
# ### Counting
#
# We need models. Four have published sizes: the U-Net of Stable Diffusion 1.5 {cite:p}`ldm`, DiT-XL/2 {cite:p}`peebles2023scalable`, an autoregressive transformer of the size of LlamaGen-L {cite:p}`sun2024autoregressive`, and a block for video in the order of ViViT's factorised encoder blocks {cite:p}`arnab2021vivit`. Their weights are random: neither the time nor the count depends on them.


# %%
def narrow(config, **smaller):
    """The published configuration; in the smoke profile one of smaller sizes."""
    return config if s.real else config | smaller


SD = narrow(UNET_CONFIGS["SD 1.5"], block_out_channels=(32, 64, 128, 128))
DIT = narrow(DIT_CONFIGS["DiT-XL/2"], hidden_size=144, num_heads=2, depth=3) | {
    "input_size": 64 if s.real else 32
}
AR = narrow(AUTOREGRESSIVE_CONFIGS["LlamaGen-L"], hidden_size=128, num_heads=2, depth=2, vocab_size=512)
LATENT, TEXT, TOKENS = (64 if s.real else 32), 77, AR["max_length"]
DTYPE = getattr(torch, s.dtype)


def on_meta(kind, config):
    """A model without weights: the meta device has shapes only."""
    with torch.device("meta"):
        return kind(**config)


def unet_inputs(side=LATENT, width=768):
    return torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, TEXT, width)


def dit_inputs(side):
    return torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)


class Pass(nn.Module):
    """A pass of an autoregressive model over ``new`` tokens behind others, whose keys and values are at hand already."""

    def __init__(self, model, before, room=1):
        super().__init__()
        self.model, weight = model, model.head.weight
        self.caches = model.make_caches(1, before + room)
        for cache in self.caches:
            if before:
                cache.append(
                    *torch.randn(2, *cache.keys[:, :, :before].shape, device=weight.device).to(weight.dtype)
                )

    def forward(self, tokens):
        return self.model.prefill(tokens, self.caches)


# %% [markdown]
# The library's `OperatorTrace` stands between a model and PyTorch's functions. It sees each call, its time, its operations, its bytes, and the lengths of each attention. On the *meta* device, where tensors have shapes and no values, this works at any size. Everything is also written down as a formula. The two must agree, to the last operation.

# %%
# NBVAL_CHECK_OUTPUT
zoo_unet, zoo_dit = zoo.load("unet_shapes32").denoiser, zoo.load("dit_digits")
sd, xl = UNET_CONFIGS["SD 1.5"], DIT_CONFIGS["DiT-XL/2"]
ar = on_meta(AutoregressiveTransformer, AUTOREGRESSIVE_CONFIGS["LlamaGen-L"])
ids = torch.zeros(1, 576, dtype=torch.long)
zoo_inputs = torch.zeros(2, 3, 32, 32), torch.zeros(2), torch.zeros(2, 18, 96)
digits = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
CASES = {
    "U-Net of the zoo": (zoo_unet, zoo_inputs, unet_operator_flops(zoo_unet.config, 32, 32, 18, batch=2)),
    "SD 1.5, 512 px": (on_meta(UNet, sd), unet_inputs(64), unet_operator_flops(sd, 64, 64, TEXT)),
    "DiT of the zoo": (zoo_dit, digits, dit_operator_flops(zoo_dit.config, batch=2)),
    "DiT-XL/2, 256 px": (on_meta(DiT, xl), dit_inputs(32), dit_operator_flops(xl)),
    "DiT-XL/2, 512 px": (on_meta(DiT, xl | {"input_size": 64}), dit_inputs(64), dit_operator_flops(xl | {"input_size": 64})),
    "LlamaGen-L, prefill": (Pass(ar, 0, 576), ids, autoregressive_flops(ar.config, 576)),
    "LlamaGen-L, decode": (Pass(ar, 575), ids[:, :1], autoregressive_flops(ar.config, 1, 576)),
    "video block": (FactorisedBlock(512, 8, (16, 256)), torch.zeros(1, 4096, 512), factorised_block_flops(1, 16, 256, 512)),
}  # fmt: skip
apart, exact = 0, {}
for name, (model, inputs, formula) in CASES.items():
    trace = count_operators(model, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    apart += sum(abs(trace.flops[kind] - getattr(formula, kind, 0)) for kind in KINDS)
    exact[name] = trace
    parts = ", ".join(f"{kind} {formula.share(kind):5.1%}" for kind in formula._fields)
    print(f"{name:20s} {formula.total / 2e9:8.3f} GMAC: {parts}")
print("counted and by formula:", "PASS" if apart == 0 else apart)
run.record("counts", apart)
part = unet_operator_flops(sd, 64, 64, TEXT)
run.record("conv-macs", part.share("convolution"))
run.record("dominate-macs", part.share("convolution") + part.share("linear"))
run.record("linear-macs", dit_operator_flops(xl).share("linear"))
larger = unet_operator_flops(UNET_CONFIGS["SDXL"], 128, 128, TEXT)
run.record("sdxl-macs", larger.share("linear") - larger.share("convolution"))

# %% [markdown]
# So by arithmetic alone the U-Net of Stable Diffusion is mostly convolution, and the transformers are mostly linear layers. Attention is a small part of each. Is that a law of U-Nets? The last line but one of this cell's code asks SDXL's {cite:p}`podell2024sdxl`, which has up to ten transformer blocks in a row where the older one has one:

# %%
# NBVAL_CHECK_OUTPUT
print("SDXL, 1024 px:", ", ".join(f"{kind} {larger.share(kind):.1%}" for kind in larger._fields))

# %% [markdown]
# There the linear layers are in front. "Convolution" is a finding about the diffusion models of 2022.
#
# ### The lengths of the sequences
#
# {eq}`eq-system-implications-length`, written out for Stable Diffusion: two layers a level on the way down, one in the middle, three a level on the way up, and no attention at the lowest level but in the middle.


# %%
# NBVAL_CHECK_OUTPUT
def lengths(height, width, levels=3, layers=2):
    """Sequence lengths of the self-attention calls of one forward pass."""
    n = [(height // (8 * 2**level)) * (width // (8 * 2**level)) for level in range(levels + 1)]
    down = [n[level] for level in range(levels) for _ in range(layers)]
    up = [n[level] for level in reversed(range(levels)) for _ in range(layers + 1)]
    return [*down, n[levels], *up]


traced = exact["SD 1.5, 512 px"].lengths
own, cross = traced[::2], traced[1::2]  # in turn: each layer looks at the image, then at the text
wrong = sum(pair != (n, n) for pair, n in zip(own, lengths(512, 512), strict=True))
wrong += sum(pair != (n, TEXT) for pair, n in zip(cross, lengths(512, 512), strict=True))
levels = [n for n, _ in groupby(n for n, _ in own)]
wrong += sum(abs(a - b) for a, b in zip(levels, reversed(levels), strict=True))
run.record("u-shape", wrong)
steps = {max(a, b) / min(a, b) for a, b in pairwise(levels)}
run.record("factor-four", max(abs(step - 4) for step in steps))
print("levels:", levels, "neighbours differ by", steps)

# Every step of a real sampler, with the U-Net of the zoo.
scheduler = ddim_scheduler()
scheduler.set_timesteps(4)
x, text = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 18, 96)
by_step = []
with torch.no_grad():
    for t in scheduler.timesteps:
        with OperatorTrace() as trace:
            noise = zoo_unet(x, t.expand(1), text)
        x = scheduler.step(noise, t, x).prev_sample
        by_step.append(trace.lengths)
run.record("same-each-step", sum(step != by_step[0] for step in by_step))

# And an autoregressive model that writes 64 tokens, the first being given.
small = AutoregressiveTransformer(vocab_size=32, hidden_size=32, depth=1, num_heads=2, max_length=64).eval()
with OperatorTrace() as trace:
    small.generate(torch.zeros(1, 1, dtype=torch.long), 64, generator=torch.Generator().manual_seed(0))
run.record("ramp", sum(pair != (1, n) for pair, n in zip(trace.lengths, range(1, 64), strict=True)))
print(
    "autoregressive: queries",
    {q for q, _ in trace.lengths},
    "keys",
    trace.lengths[0][1],
    "to",
    trace.lengths[-1][1],
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: queries and keys of the self-attention of three denoising steps, call by call, on a logarithmic axis. Each step goes down in stairs from 4096 over 1024 and 256 to 64 and up again: a row of identical valleys. The keys of the cross-attention lie on a flat line at 77. Right: the keys of an autoregressive model rise in a straight ramp from 1 to 576 with the number of the token, and its queries stay at 1."}, "figure": {"caption": "The picture to remember. Sequence lengths of every attention call. Left: the U-Net of Stable Diffusion 1.5 at 512 pixels, three denoising steps: one valley after another. Right: LlamaGen-L with 576 tokens; each pass has 24 attentions of the same length, one of them is drawn.", "name": "fig-system-implications-lengths"}}
fig, (left, right) = plt.subplots(
    1, 2, figsize=(7, 3.1), layout="constrained", sharey=True, width_ratios=(1.5, 1)
)
calls = [n for n, _ in own] * 3
left.step(range(len(calls)), calls, where="mid", color=PALETTE[0], label="self-attention: queries = keys")
left.axhline(TEXT, color=PALETTE[1], lw=1.4, ls="--", label="cross-attention: keys")
for step in (1, 2):
    left.axvline(step * len(own) - 0.5, color="0.75", lw=0.8)
left.set(
    xlabel="attention call, three denoising steps",
    ylabel="sequence length (tokens)",
    yscale="log",
    ylim=(0.7, 60000),
)
left.legend(fontsize=8, loc="upper left")
right.plot(range(1, 577), range(1, 577), color=PALETTE[0], label="keys")
right.plot(range(1, 577), [1] * 576, color=PALETTE[2], lw=1.6, ls="-.", label="queries")
right.set(xlabel="token that is made")
right.legend(fontsize=8, loc="upper left")
left.set_yticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
left.yaxis.set_minor_locator(NullLocator())
plt.show()

# %% [markdown]
# The abstract says that the length varies by up to a factor of four within an inference. Between neighbouring levels, that is. From the top to the bottom of this U-Net it is a factor of 64.
#
# ### What the scores would weigh
#
# Each pair of query and key is one number a head. Summed over all calls, for images of 256 to 2048 pixels:

# %%
# NBVAL_CHECK_OUTPUT
SIDES = (256, 512, 768, 1024, 1536, 2048)
weight = {"self-attention scores": [], "cross-attention scores": [], "convolution outputs": []}
for side in SIDES:
    calls = unet_attention_calls(sd, side // 8, side // 8, TEXT)
    weight["self-attention scores"].append(score_matrix_bytes(calls[::2], itemsize=2))
    weight["cross-attention scores"].append(score_matrix_bytes(calls[1::2], itemsize=2))
    weight["convolution outputs"].append(unet_convolution_bytes(sd, side // 8, side // 8, itemsize=2))
slopes = {name: fit_exponent(SIDES, values).value for name, values in weight.items()}
for (name, slope), claim in zip(slopes.items(), ("score-self", "score-cross", "conv-maps"), strict=True):
    run.record(claim, slope)
    print(
        f"{name:22s} {weight[name][1] / 1e9:8.3f} GB at 512 px, {weight[name][-1] / 1e9:8.1f} GB at 2048 px: side^{slope:.2f}"
    )

frames, difference = (4, 8, 16, 32, 64), 0
by_frames = {
    "frames-spatial": [spatial_flops(1, f, 256, 512) for f in frames],
    "frames-temporal": [temporal_flops(1, f, 256, 512) for f in frames],
}
for name, values in by_frames.items():
    run.record(name, fit_exponent(frames, values).value)
for f, a, b in zip(frames, *by_frames.values(), strict=True):
    trace = count_operators(FactorisedBlock(512, 8, (f, 256)), torch.zeros(1, f * 256, 512))
    seen = [call.flops for call in trace.calls if call.kind == "attention"]
    difference += (
        abs(seen[0] - a) + abs(seen[1] - b) + abs(a * f - b * 256) + (trace.lengths != [(256, 256), (f, f)])
    )
run.record("video-ratio", difference)
print("spatial and temporal attention, counted and by formula:", "PASS" if difference == 0 else difference)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bytes against image side, both logarithmic: three straight lines. The one of the self-attention's scores is twice as steep as the other two and crosses that of the convolutions' outputs below 512 pixels."}, "figure": {"caption": "Bytes of all score matrices, and of all convolutions' outputs, of one forward pass of Stable Diffusion 1.5's U-Net, one image in half precision. The slopes are 4, 2 and 2. A model need not hold all of this at a time. A fused kernel makes no scores at all.", "name": "fig-system-implications-memory"}}
fig, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
for (name, values), colour, marker in zip(weight.items(), PALETTE, "os^", strict=False):
    ax.plot(
        SIDES,
        [v / 1e9 for v in values],
        marker=marker,
        ms=4,
        color=colour,
        label=f"{name}, slope {slopes[name]:.2f}",
    )
ax.set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel="gigabytes")
ax.set_xticks(SIDES, [f"{side:,}" for side in SIDES])
ax.xaxis.set_minor_locator(NullLocator())
ax.legend(fontsize=8, loc="upper left")
ax.set_ylim(top=3e4)
plt.show()

# %% [markdown]
# (sec-system-implications-time)=
# ## The experiment
#
# ### Two kernels, one function
#
# PyTorch can compute the same attention in two ways. *Math* makes the matrix of scores in memory, by one product, a softmax, and another product. *Fused* goes through it in tiles that stay in the cache. We force one or the other. First: do they agree? And does decoding with a cache give what a whole pass gives?


# %%
def wait():
    if run.device.type == "cuda":
        torch.cuda.synchronize()


def under(backend, function):
    """``function`` with one kernel for its attention, to the end of its work."""

    def call():
        with attention_backend(backend), torch.no_grad():
            function()
        wait()

    return call


def random(*shape, seed=0):
    """Standard normal numbers, of the type and at the place of the timings."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(run.device, DTYPE)


off = 0.0
for n, m in ((256, 256), (1, 256), (256, TEXT)):
    q, k, v = (torch.randn(1, 8, rows, 64, generator=torch.Generator().manual_seed(1)) for rows in (n, m, m))
    both = []
    for backend in ("math", "fused"):
        with attention_backend(backend):
            both.append(full_attention(q, k, v))
    off = max(off, float((both[0] - both[1]).abs().max()))
run.record("same-values", off)
words = torch.randint(32, (2, 24), generator=torch.Generator().manual_seed(2))
caches, off = small.make_caches(2), 0.0
with torch.no_grad():
    whole = small(words)
    for i in range(24):
        off = max(off, float((small.decode(words[:, i], caches) - whole[:, i]).abs().max()))
run.record("cache", off)

# %% [markdown]
# ### Where the time goes
#
# Now the clock. Each model runs in turn with the one kernel and the other. The transformer of LlamaGen's size runs twice: with its 576 tokens all at once, and one token at a time, as it has to when it makes an image. The second is timed at three places, a sixth, a half and five sixths into the image, whose mean stands for the whole. **The two have the same weights and the same tokens; only the number of queries a pass differs.**


# %%
def filled(kind, config):
    """A model of a configuration with small random weights, ready to run."""
    model = on_meta(kind, config).to(DTYPE).to_empty(device=run.device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.uniform_(tensor, -0.02, 0.02)
    return model.to(memory_format=torch.channels_last)


def timed(model, *inputs):
    """For each repetition the traces of both kernels."""
    inputs = [x.to(run.device, DTYPE) if x.is_floating_point() else x.to(run.device) for x in inputs]
    calls = [under(backend, lambda: model(*inputs)) for backend in ("math", "fused")]
    return dict(zip(("math", "fused"), time_operators(calls, repeats=len(s.seeds)), strict=True))


class Decode(nn.Module):
    """One token at three places of the image."""

    def __init__(self, model):
        super().__init__()
        places = [TOKENS * part // 6 for part in (1, 3, 5)]
        self.passes = nn.ModuleList(Pass(model, place, 4 * len(s.seeds) + 8) for place in places)

    def forward(self, token):
        for one in self.passes:
            one(token)


class Prefill(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        self.model.prefill(tokens, self.model.make_caches(1, TOKENS))


measured = {"SD 1.5": timed(filled(UNet, SD), *unet_inputs())}
measured["DiT-XL/2"] = timed(filled(DiT, DIT), *dit_inputs(DIT["input_size"]))
model = filled(AutoregressiveTransformer, AR)
measured["LlamaGen-L, prefill"] = timed(Prefill(model), ids)
measured["LlamaGen-L, decode"] = timed(Decode(model), ids[:, :1])
del model
large = list(measured)
text_unet, text_mmdit = zoo.load("unet_shapes32"), zoo.load("mmdit_shapes32")
pixels = torch.zeros(s.images, 3, 32, 32), torch.zeros(s.images)
for name, net in (("U-Net, zoo", text_unet), ("MM-DiT, zoo", text_mmdit)):
    with torch.no_grad():  # the text encoder is counted apart: it runs once an image, not in each step
        context = net.encode_text(net.null_tokens(s.images))[0]
    measured[name] = timed(net.denoiser.to(run.device, DTYPE), *pixels, context)
images = torch.zeros(s.images, 1, 8, 8), torch.zeros(s.images), torch.zeros(s.images, dtype=torch.long)
measured["DiT, zoo"] = timed(zoo_dit.to(run.device, DTYPE), *images)


def typical(name, backend):
    """Share of each kind, mean over the repetitions."""
    each = [shares(trace.seconds) for trace in measured[name][backend]]
    return {kind: sum(share[kind] for share in each) / len(each) for kind in KINDS}


def each_time(name, backend="fused"):
    return [trace.total_seconds for trace in measured[name][backend]]


speed = {
    name: [a / b for a, b in zip(each_time(name, "math"), each_time(name), strict=True)] for name in measured
}
for name in measured:
    parts = ", ".join(f"{kind} {share:4.0%}" for kind, share in typical(name, "fused").items())
    print(
        f"{name:20s} {1e3 * min(each_time(name, 'math')):8.1f} ms, fused {1e3 * min(each_time(name)):8.1f} ms, of this {parts}"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Seven pairs of stacked bars. Stable Diffusion 1.5: with the math kernel attention takes 63 per cent; with the fused kernel the whole is less than half as long, and convolution leads with 40 per cent, linear 36, attention 22. DiT-XL/2: the fused bar is a fifth shorter, 83 per cent linear. LlamaGen-L prefill: a little shorter. LlamaGen-L decode: both bars are equal, 87 per cent linear. Zoo models: shorter by a tenth to a quarter, with much more norm and other."}, "figure": {"caption": "Where the time goes, by operator, with the math kernel and with the fused one. Above: models of published sizes, one image. Below: the small models of the zoo. DiT-XL/2 makes an image of 512 pixels. Means over three repetitions; labels are shares of the own bar.", "name": "fig-system-implications-time"}}
colours = dict(zip(KINDS, (PALETTE[1], PALETTE[0], PALETTE[2], PALETTE[4], "0.7"), strict=True))
fig, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
rows, labels = [], []
for i, name in enumerate(measured):
    whole = sum(each_time(name, "math")) / len(s.seeds)
    for j, backend in enumerate(("math", "fused")):
        y, edge = -(2.6 * i + j + (0.8 if i >= len(large) else 0)), 0.0
        scale = sum(each_time(name, backend)) / len(s.seeds) / whole
        for kind, share in typical(name, backend).items():
            ax.barh(
                y,
                share * scale,
                left=edge,
                height=0.86,
                color=colours[kind],
                label=kind if not rows else None,
            )
            if share * scale > 0.06:
                text_colour = "white" if kind in ("attention", "convolution", "linear") else "black"
                ax.text(
                    edge + share * scale / 2,
                    y,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=text_colour,
                )
            edge += share * scale
        rows.append(y)
        labels.append(f"{name}: {backend}" if j == 0 else backend)
ax.set_yticks(rows, labels, fontsize=8)
ax.set(xlabel="time, in units of the time with the math kernel", xlim=(0, 1.1))
ax.grid(False, axis="y")
ax.legend(
    *[handle[: len(KINDS)] for handle in ax.get_legend_handles_labels()],
    ncols=5,
    fontsize=8,
    loc="lower center",
    bbox_to_anchor=(0.45, 1.0),
)
plt.show()

# %%
ahead = {}
for name, kind in (("SD 1.5", "convolution"), ("DiT-XL/2", "linear"), ("LlamaGen-L, decode", "linear")):
    each = [shares(trace.seconds) for trace in measured[name]["fused"]]
    ahead[name] = [share[kind] - max(v for k, v in share.items() if k != kind) for share in each]
run.record("conv-first", ahead["SD 1.5"])
run.record(
    "linear-first", [min(pair) for pair in zip(ahead["DiT-XL/2"], ahead["LlamaGen-L, decode"], strict=True)]
)


def share_of(name, kind, backend="fused"):
    return torch.tensor([shares(trace.seconds)[kind] for trace in measured[name][backend]])


run.record("conv-order", share_of("SD 1.5", "convolution") - share_of("DiT-XL/2", "convolution"))
transformers = torch.minimum(share_of("DiT-XL/2", "linear"), share_of("LlamaGen-L, decode", "linear"))
run.record("linear-order", transformers - share_of("SD 1.5", "linear"))
run.record("attention-falls", share_of("SD 1.5", "attention", "math") - share_of("SD 1.5", "attention"))
gain = {name: torch.tensor(values) for name, values in speed.items()}
for claim, name in (
    ("whole-unet", "SD 1.5"),
    ("whole-dit", "DiT-XL/2"),
    ("whole-prefill", "LlamaGen-L, prefill"),
):
    run.record(claim, gain[name] / gain["LlamaGen-L, decode"])

# %% [markdown]
# ### The roofline
#
# Why is decoding so different? {eq}`eq-system-implications-intensity` says where to look. We measure this core's two roofs, a product of two matrices and a plain copy, and put every operator under them. Bytes are those of the tensors that a call takes and gives. For the math kernel this leaves out the scores that it writes and reads in between, so that both kernels sit above the same point of the axis: they do the same work. A norm counts seven operations for each value, as on the page about {doc}`kernels </notebooks/00-foundations/kernel-from-first-principles>`.

# %%
roof = measure_roofline(device=run.device, dtype=DTYPE, repeats=s.samples)
print(
    f"peak {roof.peak / 1e9:.0f} GFLOP/s, copy {roof.bandwidth / 1e9:.1f} GB/s, ridge at {roof.ridge:.1f} FLOP a byte"
)
behind = [TOKENS * part // 6 + 1 for part in (1, 3, 5)]
WORK = {
    "SD 1.5": unet_operator_flops(SD, LATENT, LATENT, TEXT),
    "DiT-XL/2": dit_operator_flops(DIT),
    "LlamaGen-L, prefill": autoregressive_flops(AR, TOKENS),
    "LlamaGen-L, decode": OperatorFlops(
        *map(sum, zip(*(autoregressive_flops(AR, 1, keys) for keys in behind), strict=True))
    ),
}
points = {}
for name, backend, kind in product(WORK, ("fused", "math"), KINDS[:4]):
    calls = [call for call in measured[name][backend][-1].calls if call.kind == kind]
    if calls and (backend == "fused" or kind == "attention"):
        nbytes = sum(call.bytes for call in calls)
        flops = 7 * nbytes / (2 * DTYPE.itemsize) if kind == "norm" else getattr(WORK[name], kind)
        seconds = [sum(c.seconds for c in trace.calls if c.kind == kind) for trace in measured[name][backend]]
        points[name, backend, kind] = flops / nbytes, torch.tensor([flops / t for t in seconds])
low, high = (points[f"LlamaGen-L, {phase}", "fused", "linear"] for phase in ("decode", "prefill"))
print(f"linear layers, FLOP a byte: decode {low[0]:.2f}, prefill {high[0]:.1f}")
run.record("decode-intensity", low[0] * DTYPE.itemsize / 4)
run.record("prefill-intensity", high[0] * DTYPE.itemsize / 4)
run.record("decode-rate", high[1] / low[1])

# %% tags=["hide-input"] mystnb={"image": {"alt": "A roof over intensity on logarithmic axes: a slope up to 2.4 operations a byte, then flat at 117 GFLOP/s. On the far right, near the flat roof: linear layers and fused attention of all models but decoding, and the convolutions of Stable Diffusion, above the roof. Hollow markers of the math kernel hang lower, down to an eighth. On the left, at half an operation a byte, linear layers and attention of decoding at 7 to 10 GFLOP/s. Norms lie at 0.9 operations a byte."}, "figure": {"caption": "The roofline of this machine, one core in single precision, and the operators of the large models under it. Markers: model. Colours: kind of operator; hollow: attention by the math kernel.", "name": "fig-system-implications-roofline"}}
fig, ax = plt.subplots(figsize=(6.6, 3.9), layout="constrained")
axis = torch.logspace(-1.3, 3, 200)
ax.plot(axis, [roof.attainable(float(i)) / 1e9 for i in axis], color="0.3", lw=1.4)
shapes = dict(zip(WORK, "os^v", strict=True))
for (name, backend, kind), (intensity, rates) in points.items():
    face = "none" if backend == "math" else colours[kind]
    ax.plot(
        intensity, rates.mean() / 1e9, shapes[name], ms=7, mfc=face, mec=colours[kind], mew=1.5, ls="none"
    )
for name, marker in shapes.items():
    ax.plot([], [], marker, color="0.4", label=name)
for kind in KINDS[:4]:
    ax.plot([], [], "D", color=colours[kind], label=kind)
ax.plot([], [], "D", mfc="none", mec=colours["attention"], mew=1.5, label="attention, math kernel")
ax.set(xscale="log", yscale="log", xlabel="FLOP for each byte taken or given", ylabel="GFLOP/s")
ax.xaxis.set_major_formatter("{x:g}")
ax.yaxis.set_major_formatter("{x:g}")
ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% [markdown]
# ### Attention alone: many queries, or one
#
# In whole models attention is only a part. So we time it alone, 8 heads of width 64: with as many queries as keys, and with one query. If the paper is right, the fused kernel helps the first far more than the second.
#
# One query is also *less work*. Is it the work that counts, or the number of queries that share their keys? The control has both: $n$ queries on one set of keys, and $n$ sequences with one query and with keys of their own each. MACs and scores are the same in number.
#
# And what is the fused kernel compared with? The specification says PyTorch's math kernel. That one turned out, in a pilot, to copy keys and values before it multiplies, which matters most where there are many keys for each query. So there is a second yardstick, attention written out in three lines, which copies nothing:


# %%
def written_out(q, k, v):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def kernel_gain(queries, keys, batch=1, seed=0):
    """Time of the math kernel, and of attention written out, over that of the fused one; all measured in turns."""
    q = random(batch, 8, queries, 64, seed=seed)
    k, v = random(2, batch, 8, keys, 64, seed=seed + 1)
    calls = [under(backend, lambda: full_attention(q, k, v)) for backend in ("math", "fused")]
    calls.append(under("math", lambda: written_out(q, k, v)))
    math, fused, plain = bench.times(calls, repeats=s.samples, min_seconds=0.02)
    return math / fused, plain / fused


def sweep(sizes, shape):
    """Both gains, (2, seeds, sizes)."""
    return torch.tensor([[kernel_gain(*shape(n), seed=seed) for n in sizes] for seed in s.seeds]).permute(
        2, 0, 1
    )


KEYS = 1024 if s.real else 256
prefill, decode = sweep(s.lengths, lambda n: (n, n)), sweep(s.lengths, lambda n: (1, n))
shared, apart = sweep(s.queries, lambda n: (n, KEYS)), sweep(s.queries, lambda n: (1, KEYS, n))
long = [i for i, n in enumerate(s.lengths) if n >= 1024 or not s.real]
at = s.queries.index(256 if s.real else 16)
for i, suffix in enumerate(("", "-plain")):
    run.record("prefill-decode" + suffix, (prefill / decode)[i][:, long].min(dim=1).values)
    run.record("shared-keys" + suffix, (shared / apart)[i][:, at])
for row, name in enumerate(("the math kernel", "attention written out")):
    for i, n in enumerate(s.lengths):
        print(
            f"fused against {name}, {n:5d} keys: {prefill[row, :, i].mean():.2f} times as fast for all queries, {decode[row, :, i].mean():.2f} for one"
        )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Speed-up by the fused kernel. Left, against the number of keys: for all queries it rises over attention written out from 1.0 at 256 keys to 2.3 at 4,096; for one query it falls from 1.1 to 0.9. Dotted, over the math kernel: both start near 1.5, all queries rise to 3.2, one query to 1.9. Right, against the number of queries: over attention written out, shared keys stay near 1.0 to 1.1, own keys fall to 0.8. Over the math kernel own keys jump to 4, shared keys stay near 1.4."}, "figure": {"caption": "Attention alone: how many times as fast the fused kernel is as attention written out (solid), and as the math kernel (dotted). Right: equal work in both curves. Bands: 90 % intervals over three repetitions.", "name": "fig-system-implications-kernels"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained", sharey=True)
for ax, sizes, two, names in (
    (axes[0], s.lengths, (prefill, decode), ("all queries (prefill)", "one query (decode)")),
    (axes[1], s.queries, (shared, apart), ("queries share keys", "keys of their own")),
):
    for values, name, colour, marker in zip(two, names, PALETTE, "os", strict=False):
        curve(ax, sizes, values[1], name, colour, marker)
        ax.plot(sizes, values[0].mean(0), ls=":", marker=marker, ms=4, mfc="none", lw=1.2, color=colour)
    ax.plot([], [], ls=":", color="0.4", label="the same, over the math kernel")
    ax.axhline(1, color="0.3", lw=0.8)
    ax.set(xscale="log", ylim=(0.5, 6.9))
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(fontsize=8, loc="upper left")
axes[0].set(xlabel="keys", ylabel="speed-up by the fused kernel")
axes[1].set(xlabel=f"queries, each on {KEYS:,} keys")
plt.show()

# %% [markdown]
# (sec-system-implications-video)=
# ### Space and time
#
# Spatial and temporal attention of one video, 8 heads of width 64, with the fused kernel. In a model the tokens lie in memory in the order frame, place. For the spatial attention, frames are simply taken apart. For the temporal one, queries, keys and values of a place lie far apart, and the result has to be put back in order. How much is that order to blame? The ablation lets both inputs and output have the order place, frame, one place's tokens side by side: nothing has to be moved.


# %%
def video(frames, places, seed):
    """Least seconds of spatial attention, temporal attention, and temporal attention in its own order."""
    q, k, v = random(3, 1, 8, frames * places, 64, seed=seed)
    own_order = [x.view(8, frames, places, 64).transpose(1, 2).contiguous() for x in (q, k, v)]
    spatial, temporal = (get_attention(name, grid=(frames, places)) for name in ("spatial", "temporal"))
    calls = (lambda: spatial(q, k, v), lambda: temporal(q, k, v), lambda: full_attention(*own_order))
    return bench.times([under("fused", call) for call in calls], repeats=s.samples, min_seconds=0.02)


FEW = 64 if s.real else 16
width, middle = 512, (16 if s.real else 4)
claims = torch.tensor([video(middle, s.places, seed) for seed in s.seeds])
todo = torch.tensor([f(1, middle, s.places, width) for f in (spatial_flops, temporal_flops, temporal_flops)])
rates = todo / claims
run.record("temporal-rate", rates[:, 0] / rates[:, 1])
run.record("temporal-own-order", rates[:, 0] / rates[:, 2])
run.record("temporal-share", claims[:, 1] / (claims[:, 0] + claims[:, 1]))
for i, name in enumerate(("spatial", "temporal", "temporal, own order")):
    print(f"{name:20s} {1e3 * claims[:, i].mean():7.2f} ms, {rates[:, i].mean() / 1e9:5.1f} GFLOP/s")
by_length = torch.tensor([[video(f, FEW, seed) for f in s.frames] for seed in s.seeds])
square = by_length[:, s.frames.index(FEW if s.real else 4)]  # the same work for both, at the full sizes
run.record("equal-lengths", square[:, 1] / square[:, 0])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels against frames, 2 to 256. Left, milliseconds: spatial attention rises with slope one, both kinds of temporal attention more slowly at first and then with slope two; all meet at 64 frames. Right, GFLOP/s: spatial stays between 60 and 80; temporal rises from 4 at two frames to 90 at 256, crossing at 64. The temporal curve in its own order lies on the other temporal one."}, "figure": {"caption": "Spatial and temporal attention for videos of 64 places a frame. Left: time. Right: rate. Dotted: as many frames as places, where both have the same work. Bands: 90 % intervals over three repetitions.", "name": "fig-system-implications-video"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
names = ("spatial", "temporal", "temporal, own order")
counts = torch.tensor(
    [[f(1, n, FEW, width) for f in (spatial_flops, temporal_flops, temporal_flops)] for n in s.frames]
)
for i, (name, colour, marker) in enumerate(zip(names, PALETTE, "os^", strict=False)):
    curve(left, s.frames, 1e3 * by_length[..., i], name, colour, marker)
    curve(right, s.frames, counts[:, i] / by_length[..., i] / 1e9, name, colour, marker)
for ax in (left, right):
    ax.axvline(FEW, color="0.3", ls=":", lw=1)
    ax.set(xscale="log", yscale="log", xlabel=f"frames, of {FEW} places each")
    ax.set_xticks(s.frames, [str(n) for n in s.frames], fontsize=8)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
left.set_ylabel("milliseconds")
right.set_ylabel("GFLOP/s")
left.legend(fontsize=8, loc="upper left")
plt.show()

# %%
run.report()

# %% [markdown]
# ## What came out
#
# **Counting.** Every count agrees with its formula, call by call. The U-shape, the ramp, the fourth power and the ratio $P/F$ hold as stated. They are arithmetic, and it is good to know that the arithmetic is right. One caveat is ours: that convolution leads is true of Stable Diffusion 1.5, and no longer of SDXL, whose linear layers do 64 % of the work.
#
# **Operators.** With the math kernel, 63 % of this U-Net's time is attention, which does 16 % of its arithmetic. With the fused kernel 22 % is left, and convolution leads with 40 %. The paper has 44 % at most, on an A100. That the two numbers are close is partly luck: the machines have little in common. Linear layers are close behind, with 36 %, so the lead is small, but it is there in each repetition. In the transformers linear layers take more than 80 %. That is more than in the paper, whose transformers have other operators between.
#
# **Prefill and decode.** The fused kernel makes the U-Net 2.15 times as fast, in units of what it does for decoding, where nothing changes at all. The DiT gains 1.22 times as much. For the autoregressive model itself, with all tokens at once, the factor is 1.07: the direction is right and the threshold of 1.1 is missed. With 576 tokens attention is too small a part of it.
#
# The roofline says why. Decoding does half an operation for each byte. Its linear layers run 11 times slower than in prefill, with the same weights. Faster attention cannot help a model that waits for its weights. (The convolutions stand *above* the roof. Nothing is wrong: convolution can be done with fewer multiplications than the formula counts {cite:p}`lavin2016fast`, and the library that does it here knows how.)
#
# **Attention alone: what failed.** The specification expects the fused kernel to gain at least 1.3 times as much with all queries as with one, from 1,024 keys on. At 2,304 and 4,096 keys it does, with either yardstick. At 1,024 it does not: over the math kernel both gain the same. In the pilot, the factor at 1,024 keys had been nearly two. What changed? The matrix of scores has 32 MiB there. A young process gets fresh memory for it from the operating system at each call, and touching fresh memory is slow. By the time this cell runs, the process has freed large models and the memory is at hand. We tried this in a fresh process: if the allocator is told to keep freed memory, the gain falls to what this page shows; if not, it is as in the pilot. (That trial is not in the record.) So a part of what the fused kernel saves, on a processor, is not arithmetic or caches, but asking for memory.
#
# **Shared keys.** The control over the math kernel turns the claim round: with keys of their own the queries gain *more*, up to four times. That is the copy of keys and values in the math kernel. Over attention written out, which copies nothing, the sign is the expected one, 1.39: sharing keys is what makes a tile worth loading.
#
# **Video.** Temporal attention does its work at a third of the rate of spatial attention, 30 against 92 GFLOP/s, with 16 frames of 256 places. The paper suspects memory accesses that lie far apart. Here the layout is nearly innocent: with all tokens of a place side by side the factor is still 2.8 of 3.0. What counts is the *length*: 16 tokens do not fill a tile. With 64 frames of 64 places both run at the same rate. But a factor of three does not make up for 16 times fewer operations. Temporal attention takes 16 % of the time of both, and not the paper's 60 %. On an A100, with a kernel launch for each of many small pieces, it may.
#
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - A processor core has no launch costs, few units to fill, and large caches. The paper's shares, its 44 % and 49 %, belong to an A100. We check orders and directions, not those numbers.
# - Four of the shapes have published sizes. The paper's eight models are others, some of them unpublished, and they have text encoders and decoders of latents besides.
# - One block of factorised attention is not a video model. What share temporal attention takes in a whole one is open here.
# - Cache hit rates need the counters of a GPU.
# :::
#
# ## Exercises
#
# **1.** An image model with a U-Net has levels. Which level makes most of the score matrices, and does the text matter? Take Stable Diffusion 1.5 at 512 pixels.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
calls = unet_attention_calls(sd, 64, 64, TEXT)
for n in sorted({call.queries for call in calls}, reverse=True):
    own_bytes = score_matrix_bytes([c for c in calls if c.queries == c.keys == n], itemsize=2)
    text_bytes = score_matrix_bytes([c for c in calls if c.queries == n != c.keys], itemsize=2)
    print(f"{n:5d} tokens: self {own_bytes / 1e6:8.2f} MB, cross {text_bytes / 1e6:6.2f} MB")
# The top level has 16 times the scores of the next one a call: nearly everything is there. The text matters at the bottom only.

# %% [markdown]
# **2.** Decoding waits for the weights. So let several images be made side by side: each weight is read once for all of them. From how many images on do the linear layers of LlamaGen-L reach the ridge of this machine, and of one with 20 FLOP a byte?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
for ridge in (roof.ridge, 20.0):
    images = next(
        n
        for n in range(1, 10_000)
        if linear_flops(n, 1024, 4096) / (4 * (n * 1024 + 1024 * 4096 + n * 4096)) >= ridge
    )
    print(f"ridge {ridge:5.1f} FLOP a byte: {images} images")
# About twice the ridge, in single precision. Attention does not profit: each image has keys and values of its own. That is the
# control of the section on attention alone, "keys of their own".

# %% [markdown]
# **3.** Temporal attention of a long video overtakes spatial attention at $F = P$ in MACs. Where do the times cross in {numref}`fig-system-implications-video`, and why not there?
#
# :::{dropdown} Solution 3: in words
# They do cross there: at 64 frames of 64 places the two calls do the same thing, on sequences of the same length. Before it, the temporal call has less work and runs at a lower rate, so its time falls behind its count: at two frames it has 32 times fewer operations and is not even twice as fast. Beyond it, its sequences are longer than 64 tokens and its rate is even the higher one, but the work grows with the square.
# :::
#
# ## References
#
# The measurements: {cite:t}`system-implications`. The kernels: {cite:t}`dao2022flashattention`. The roofline: {cite:t}`williams2009roofline`. The shapes: {cite:t}`ldm`, {cite:t}`peebles2023scalable`, {cite:t}`podell2024sdxl`, {cite:t}`sun2024autoregressive`, {cite:t}`arnab2021vivit`. The library's parts: [minilib/operators.py](https://github.com/minilib-book/minilib/blob/main/minilib/operators.py), [minilib/operator_costs.py](https://github.com/minilib-book/minilib/blob/main/minilib/operator_costs.py), [minilib/roofline.py](https://github.com/minilib-book/minilib/blob/main/minilib/roofline.py), [minilib/attention/backends.py](https://github.com/minilib-book/minilib/blob/main/minilib/attention/backends.py).
