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
# # A kernel from first principles
#
# Fusing operations saves no arithmetic. It saves trips to memory. We take a small operation that every block of a diffusion transformer {cite:p}`peebles2023scalable` repeats, count its bytes, derive its gradient by hand,
# write it as one kernel for a GPU, and find out how much can be checked on a machine that has none.

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
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.ticker import NullFormatter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilib import bench, plotting
from minilib.kernels import dispatch, explain, gated_residual_modulate, modulate
from minilib.reproduction import Reproduction

try:
    import triton
    import triton.language as tl
except ImportError:  # the page says below what it then leaves out
    triton, tl = None, SimpleNamespace(constexpr=int)


@dataclass(frozen=True)
class Settings:
    """``batch``: images in what is timed. ``sizes``: megabytes of the copies. ``rows``: heights of the tiles compiled."""

    seeds: tuple[int, ...]
    batch: int
    repeats: int
    sizes: tuple[float, ...]
    rows: tuple[int, ...]
    tokens: int = 256
    width: int = 1152


sizes, rows = (0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), (1, 2, 4, 8, 16, 32)
run = Reproduction(
    "kernel-from-first-principles",
    profile,
    {
        "smoke": Settings((0,), 2, 3, (0.25, 4.0, 48.0), (1, 16)),
        "cpu": Settings((0, 1, 2), 16, 11, sizes, rows),
        "gpu": Settings((0, 1, 2, 3, 4), 16, 21, sizes, rows),
    },
)
s = run.settings
plotting.use_style()
run.show_card()

# %%
run.show_settings()

# %% [markdown]
# (sec-kernel-from-first-principles-idea)=
# ## The idea
#
# A *kernel* is a function that a processor runs in one go: it reads its inputs from memory, computes, and writes its results. A line of PyTorch is usually one kernel a call. What is written by one call is read back
# by the next.
#
# Our example is the adaptive layer norm of the {doc}`DiT block </notebooks/00-foundations/dit-block>`. A token $x$ of width $d$ is normalised {cite:p}`ba2016layer`, scaled by $1 + \gamma$ and shifted by $\beta$:
#
# $$
# y = (1 + \gamma) \odot \hat x + \beta,
# \qquad \hat x = (x - \mu)\, r,
# \qquad r = \frac{1}{\sqrt{v + \varepsilon}} .
# $$ (eq-kernel-from-first-principles-modulate)
#
# Here $\mu$ is the mean of the token's $d$ values, $v$ is their variance (divided by $d$), and $\varepsilon = 10^{-6}$ keeps $r$ finite. The vectors $\gamma$ and $\beta$ come from the condition: one pair an image, the same for all its
# tokens. In a block this operation follows a gated residual: the branch $u$ (what attention has made) is added through a gate $\alpha$,
#
# $$
# x' = x + \alpha \odot u, \qquad y = (1 + \gamma) \odot \operatorname{LN}(x') + \beta,
# $$ (eq-kernel-from-first-principles-gated)
#
# where $\operatorname{LN}(x')$ is $\hat x$ made from $x'$. Both $x'$ and $y$ are needed afterwards. DiT-XL/2 has 28 blocks with two modulated norms each, and one more before its last layer: 57 in a forward pass.
# All but the first come right after a gated residual.
#
# **Little arithmetic.** Per value it takes about seven operations: add it up for the mean, subtract the mean, square, add up for the variance, multiply by $r$, multiply by $1 + \gamma$, add $\beta$. Per value at least
# one number has to be read and one written, of $s$ bytes each. The *arithmetic intensity*, operations per byte, is then at most $7 / (2 s)$.
#
# **The roofline** {cite:p}`williams2009roofline`. A machine moves at most $B$ bytes and does at most $P$ operations a second. Work with intensity $I$ cannot run faster than $\min(P, I B)$. Below $I = P / B$, the ridge, memory is the
# limit, and only fewer bytes help.

# %%
# NBVAL_CHECK_OUTPUT
d, n = s.width, s.tokens
for name, itemsize in (("float32", 4), ("bfloat16", 2)):
    product = 2 * n * d * 4 * d / ((n * d + 4 * d * d + n * 4 * d) * itemsize)
    print(
        f"{name:8s}: modulate {7 / (2 * itemsize):.3f} operations a byte, a matrix product of the MLP {product:.0f}"
    )

# %% [markdown]
# The matrix product, here the first of the block's MLP (multi-layer perceptron) on one image of 256 tokens, has a hundred operations or more for each byte. The modulated norm has one or two at most.
#
# ## The bytes, counted
#
# Three ways to write it, with $\gamma$ and $\beta$ of shape `(b, 1, d)`. The first is the definition. The second is what the released DiT does. The third is what the library runs on a processor, and on a GPU as well until its kernel has been measured there (see
# {ref}`the rule <sec-kernel-from-first-principles-rule>`): `modulate` calls `F.layer_norm`, and then `torch.addcmul`, which multiplies and adds at once.


# %%
def definition(x, shift, scale, eps=1e-6):
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * (variance + eps).rsqrt() * (1 + scale) + shift


def released(x, shift, scale, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def two_calls(x, shift, scale):
    return modulate(x, shift[:, 0], scale[:, 0])


def released_gated(x, branch, gate, shift, scale):
    x = x + gate * branch
    return x, released(x, shift, scale)


def three_calls(x, branch, gate, shift, scale):
    return gated_residual_modulate(x, branch, gate[:, 0], shift[:, 0], scale[:, 0])


# %% [markdown]
# PyTorch can tell us about every call it makes. A `TorchDispatchMode` stands between the Python code and the kernels. For each call we add up the bytes of the tensors that go in and of those that come out. A view, such as
# `shift[:, 0]`, comes out with the memory of what went in: it moves nothing.
# A tensor counts once for each call that it enters or leaves. What a call does inside, such as a second pass over a token that is still in a cache, is not counted.


# %%
class Traffic(TorchDispatchMode):
    """A row for each call that writes something: its name, bytes read, bytes written."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in read}
        written = [
            t
            for t in tree_leaves(out)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in memory
        ]
        if written:
            self.rows.append((call.__name__, *(sum(t.nbytes for t in side) for side in (read, written))))
        return out


def inputs(b, n, d, seed=0, dtype=torch.float32):
    """x, branch (b, n, d) and gate, shift, scale (b, 1, d); the last three are views into one tensor, as in DiT."""
    g = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(2, b, n, d, generator=g).to(dtype)
    gate, shift, scale = torch.randn(b, 1, 6 * d, generator=g).to(dtype).chunk(6, dim=-1)[1:4]
    return x, branch, gate, shift, scale


def traffic(function, tensors):
    with torch.no_grad(), Traffic() as count:
        function(*tensors)
    return count.rows


# %% [markdown]
# For each version, three whole numbers should give the bytes: $a$ passes over all tokens, $c$ numbers a token, $e$ vectors an image. We write them down and compare with the count.


# %%
# NBVAL_CHECK_OUTPUT
# Bytes = itemsize (a b n d + c b n + e b d): a passes over all tokens, c over one number a token, e over one vector an image.
FORMULA = {
    "definition": (definition, 12, 8, 4),
    "released": (released, 6, 2, 4),
    "two calls": (two_calls, 4, 2, 4),
    "released, gated": (released_gated, 11, 2, 5),
    "three calls, gated": (three_calls, 7, 2, 5),
}
ONE_KERNEL = {"one kernel": (2, 0, 2), "one kernel, gated": (4, 0, 3)}


def take(name, tensors):
    """The tensors that a version wants: all five with the gate, else x, shift and scale."""
    return tensors if "gated" in name else (tensors[0], *tensors[3:])


def moved(factors, b, n, d, itemsize=4):
    a, c, e = factors
    return itemsize * (a * b * n * d + c * b * n + e * b * d)


def counted(name, b, n, d):
    return sum(read + written for _, read, written in traffic(FORMULA[name][0], take(name, inputs(b, n, d))))


for call, read, written in traffic(released, take("released", inputs(2, n, d))):
    print(f"{call:26s} reads {read:9,d} bytes, writes {written:9,d}")
gaps = []
for b_, n_, d_ in ((2, n, d), (1, 7, 5), (3, 64, 96)):
    gaps += [abs(counted(name, b_, n_, d_) - moved(row[1:], b_, n_, d_)) for name, row in FORMULA.items()]
print("counted as the formula says:", "PASS" if max(gaps) == 0 else f"FAIL {gaps}")
run.record("bytes-by-formula", max(gaps))
least = {
    False: moved(ONE_KERNEL["one kernel"], 2, n, d),
    True: moved(ONE_KERNEL["one kernel, gated"], 2, n, d),
}
for name in FORMULA:
    print(f"{name:19s} {counted(name, 2, n, d) / least['gated' in name]:.2f} times the bytes of one kernel")

# %% [markdown]
# One kernel must read $x$ once and write $y$ once: two passes over the tokens. With the gate it reads $x$ and $u$ and writes $x'$ and $y$: four. The one formula for all of them is
#
# $$
# \text{bytes} = s\, (a\, b\, n\, d + c\, b\, n + e\, b\, d)
# $$ (eq-kernel-from-first-principles-bytes)
#
# for $b$ images of $n$ tokens of width $d$. The passes $a$ decide. The other two terms belong to the statistics, one number a token, and to the vectors, one an image. **So the ratios printed above are the most that fusing
# can save** while the operation stays a kernel of its own, if memory is the limit and caches do not help: a factor of three against the released form, and a little less with the gate.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Seven horizontal bars made of alternating blue and orange pieces. Without the gate: definition 12, released 6, two calls 4, one kernel 2. With the gate: released 11, three calls 7, one kernel 4."}, "figure": {"caption": "What each version reads (blue) and writes (orange), in units of the size of $x$, in the order of its calls. White lines separate the calls. The last bar of each group is the least that is possible.", "name": "fig-kernel-from-first-principles-bytes"}}
one = {
    "one kernel": [("", 1, 1)],
    "one kernel, gated": [("", 2, 2)],
}
whole = 4 * 2 * n * d
bars = {}
for name in ("definition", "released", "two calls", "one kernel", "released, gated", "three calls, gated", "one kernel, gated"):  # fmt: skip
    bars[name] = one.get(name) or [
        (call, read / whole, written / whole)
        for call, read, written in traffic(FORMULA[name][0], take(name, inputs(2, n, d)))
    ]
fig, ax = plt.subplots(figsize=(6.8, 3.3))
for y, (name, calls) in enumerate(bars.items()):
    y, left = y + (0.5 if "gated" in name else 0), 0
    for _, read, written in calls:
        ax.barh(y, read, left=left, color=plotting.PALETTE[0], height=0.7)
        ax.barh(y, written, left=left + read, color=plotting.PALETTE[1], height=0.7)
        left += read + written
        if read + written > 0.5:
            ax.plot([left, left], [y - 0.36, y + 0.36], color="white", lw=1.5)
    ax.text(left + 0.15, y, f"{left:.0f}", va="center")
ax.set_yticks([y + (0.5 if "gated" in name else 0) for y, name in enumerate(bars)], list(bars))
ax.invert_yaxis()
ax.grid(False, axis="y")
ax.set(xlabel="bytes moved, in sizes of $x$", xlim=(0, 13))
ax.barh(0, 0, color=plotting.PALETTE[0], label="read")
ax.barh(0, 0, color=plotting.PALETTE[1], label="written")
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## What this machine can do
#
# The roof has two parts, and we measure both, on one core: the rate of a plain copy (bytes read plus bytes written, a second), and that of a product of two matrices of $1024 \times 1024$. All times on this page are CPU times, the
# least of several, taken in turns.


# %%
def copy_rates(megabytes):
    """Bytes a second of a copy into memory that is there already, and of one into new memory."""
    x = torch.ones(int(megabytes * 1e6 / 4))
    y = torch.ones_like(x)
    times = bench.times([lambda: y.copy_(x), lambda: x.clone()], repeats=5, min_seconds=0.02)
    return [2 * x.nbytes / time for time in times]


rates = {megabytes: copy_rates(megabytes) for megabytes in s.sizes}
square = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
(seconds,) = bench.times([lambda: square @ square], repeats=5)
peak, memory = 2 * 1024**3 / seconds, rates[max(rates)][0]
print(
    f"copy, {max(rates):.0f} MB: {memory / 1e9:.1f} GB/s; into new memory: {rates[max(rates)][1] / 1e9:.1f} GB/s"
)
print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; the ridge is at {peak / memory:.1f} operations a byte")

# %% [markdown]
# The modulated norm lies left of the ridge. A GPU's ridge lies much further right: the data sheet of an [H100](https://www.nvidia.com/en-us/data-center/h100/) (SXM) promises 3.35 TB/s and 67 TFLOP/s in float32 without tensor
# cores, 20 operations a byte.
#
# Now the versions themselves, at the width and the number of tokens of DiT-XL/2. Each ratio is measured in turns by `minilib.bench.ratio`, once for every seed of the inputs.


# %%
def ratios(ours, peer):
    found = []
    for seed in s.seeds:
        tensors = inputs(s.batch, n, d, seed)
        calls = [partial(FORMULA[name][0], *take(name, tensors)) for name in (ours, peer)]
        found.append(bench.ratio(*calls, repeats=s.repeats).ratio)
    return found


with torch.no_grad():
    run.record("two-calls-time", ratios("two calls", "released"))
    run.record("gated-time", ratios("three calls, gated", "released, gated"))
    tensors = inputs(s.batch, n, d)
    calls = [partial(row[0], *take(name, tensors)) for name, row in FORMULA.items()]
    *each, clone = bench.times([*calls, tensors[0].clone], repeats=s.repeats)
    times = dict(zip(FORMULA, each, strict=True))
for name, time in times.items():
    rate = moved(FORMULA[name][1:], s.batch, n, d) / time
    useful = moved(ONE_KERNEL["one kernel, gated" if "gated" in name else "one kernel"], s.batch, n, d) / time
    copied = 2 * tensors[0].nbytes / clone
    print(
        f"{name:19s} {1e3 * time:7.2f} ms, moves {rate / 1e9:5.1f} GB/s, "
        f"needs {useful / 1e9:5.1f} GB/s: {useful / copied:4.0%} of the rate of a copy"
    )

# %% [markdown]
# *Moves* counts what the version reads and writes; *needs* counts what one kernel would. The last column is what a kernel is judged by: at 100 % it would
# move the bytes that it needs, and no others, at the rate at which $x$ itself can be copied.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: copy rate against size, high up to a few megabytes, then falling to a fraction; copies into new memory fall much further at the largest size. Right: a roofline, rising then flat, with five points at low intensity near the rising part; versions that move fewer bytes lie further right and higher."}, "figure": {"caption": "Left: the copy rate of one core falls when the data no longer fit a cache; at the smallest sizes the call itself takes part of the time. The dashed line marks the size of $x$ in what is timed here. Right: the roofs of this core (solid: a copy of the largest size, and a matrix product; dotted: a copy of $x$), and five versions of the operation. From left to right: definition, released, two calls; with the gate, released and three calls. Fusing moves a point to the right; the arithmetic stays the same.", "name": "fig-kernel-from-first-principles-roofline"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4))
for i, label in enumerate(("into memory in use", "into new memory")):
    left.plot(list(rates), [r[i] / 1e9 for r in rates.values()], marker="o", ms=4, label=label)
left.axvline(tensors[0].nbytes / 1e6, color="#444444", ls="--", lw=1)
left.set(xscale="log", yscale="log", xlabel="size (MB)", ylabel="copy rate (GB/s, read + written)")
left.legend(fontsize=9, loc="lower left")
intensity = torch.logspace(-1.1, 1.3, 200)
right.plot(intensity, (intensity * memory).clamp(max=peak) / 1e9, color="#444444")
right.plot(intensity, (intensity * copied).clamp(max=peak) / 1e9, color="#444444", ls=":")
for marker, gated, color in (("o", False, plotting.PALETTE[0]), ("s", True, plotting.PALETTE[1])):
    group = [name for name in FORMULA if ("gated" in name) == gated]
    # The gate adds a product and a sum to the seven operations.
    work = (9 if gated else 7) * tensors[0].numel()
    at = [work / moved(FORMULA[name][1:], s.batch, n, d) for name in group]
    right.plot(at, [work / times[name] / 1e9 for name in group], marker=marker, ls="-", lw=0.7, color=color, label="gated" if gated else "not gated")  # fmt: skip
right.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="operations (GFLOP/s)")
right.legend(fontsize=9, loc="lower right")
for axis in (left.xaxis, left.yaxis, right.xaxis, right.yaxis):
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
fig.tight_layout()
plt.show()

# %% [markdown]
# Two lessons before any kernel is written. Benchmarks of small tensors measure the caches: in the run shown here, a copy of a megabyte is several times as fast as one of 64. And *new* memory can be dear. A small block that was freed is soon used again. A large one goes back to the system, which hands out
# the next one page by page and fills it with zeros first: where the lower curve drops far away from the upper one, at the right end. A version with fewer intermediate results asks for less of it, so that on a processor fusing can pay even where the bytes themselves are cheap.
# In the run shown here the two curves nearly meet at the dashed line, so the ratios of time probably owe little to this.
#
# Nor do the points on the right lie on one roof. The solid one belongs to the largest copy. At the size timed here a part of the data is still in a cache when the next call reads it, so a point can lie above it, as the definition does.
# Versions with fewer calls lie further below the dotted line. They save
# bytes, but move the rest at a lower rate, so that their time falls by less than their bytes. A likely reason is the layer norm itself: its sums weigh more when little else is left. We have not taken it apart.
#
# ## The method
#
# ### Is it precise enough?
#
# The definition in double precision (float64) is our truth; everything else is measured against it, by the norm of the difference over the norm of the result. The inputs are the same single-precision numbers (float32) for all.


# %%
def error(out, exact):
    value = ((out.double() - exact).norm() / exact.norm()).item()
    return value if math.isfinite(value) else math.inf


tensors = inputs(4, n, d, seed=1)
exact = definition(*(t.double() for t in take("", tensors)))
errors = {name: error(FORMULA[name][0](*take(name, tensors)), exact) for name in ("definition", "released", "two calls")}  # fmt: skip
pairs = list(zip(three_calls(*tensors), released_gated(*tensors), strict=True))
pairs.append((two_calls(*take("", tensors)), released(*take("", tensors))))
print("error in float32:", ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
run.record("float32-error", max(errors.values()))
run.record("same-values", max(error(ours, theirs.double()) for ours, theirs in pairs))

# %% [markdown]
# A tolerance of $10^{-6}$ is some sixteen roundings of $6 \cdot 10^{-8}$. It leaves room for another order of the sums, and for little else.
#
# There is one way to lose the precision. The variance is the mean of $(x - \mu)^2$, and also the mean of $x^2$ minus $\mu^2$. The second form needs only one pass over the token, and so it is tempting for a kernel. But where the mean is large, it
# subtracts two large numbers that are nearly equal {cite:p}`chan1983algorithms`:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Error of the normalised token against the size of its mean, both logarithmic. The error of the mean-of-squares form grows quadratically and passes 1e-6 at a mean of a few standard deviations; the centred form and F.layer_norm grow linearly, pass it between ten and about thirty, and end several orders below. The first curve jumps to about a thousand at the right end."}, "figure": {"caption": "Error of $\\hat x$ in single precision, for tokens whose mean is so many standard deviations away from zero. Both forms of the variance are equal on paper. Dashed: the tolerance of our kernels. At the right end the upper curve jumps: there the difference of two large numbers can come out as zero or less, is cut off at zero, and $r$ becomes $1 / \\sqrt{\\varepsilon} = 1000$.", "name": "fig-kernel-from-first-principles-cancellation"}}
g = torch.Generator().manual_seed(2)
offsets, curves = torch.logspace(-1, 4, 11).tolist(), {}
for offset in offsets:
    x = offset + torch.randn(64, d, generator=g)
    truth = F.layer_norm(x.double(), (d,), eps=1e-6)
    mean = x.mean(-1, keepdim=True)
    for name, variance in (
        ("mean of squares minus square of mean", (x.square().mean(-1, keepdim=True) - mean**2).clamp_min(0)),
        ("mean of centred squares", (x - mean).square().mean(-1, keepdim=True)),
    ):
        curves.setdefault(name, []).append(error((x - mean) * (variance + 1e-6).rsqrt(), truth))
    curves.setdefault("F.layer_norm", []).append(error(F.layer_norm(x, (d,), eps=1e-6), truth))
fig, ax = plt.subplots(figsize=(6, 3.3))
for (name, values), marker in zip(curves.items(), "os^", strict=True):
    ax.plot(offsets, values, marker=marker, ms=4, label=name)
ax.axhline(1e-6, color="#444444", ls="--", lw=1)
ax.set(xscale="log", yscale="log", xlabel="mean of a token, in standard deviations", ylabel="relative error", ylim=(1e-8, 1e4))  # fmt: skip
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# The two good forms lose precision too, more slowly: the mean itself is rounded to single precision. Centring a second time would win most of that back; our kernels do not. A kernel that holds a whole token in registers has no need for the tempting form: it can pass over
# the token as often as it likes. Ours computes the mean first.
#
# (sec-kernel-from-first-principles-gradient)=
# ### The gradient, by hand
#
# A kernel has no automatic differentiation. Its backward pass has to be derived. Let $L$ be the loss, and $g = (1 + \gamma) \odot \partial L / \partial y$ its gradient with respect to $\hat x$. From $\mu = \frac1d \sum_i x_i$ and
# $v = \frac1d \sum_i (x_i - \mu)^2$,
#
# $$
# \frac{\partial \mu}{\partial x_j} = \frac1d, \qquad
# \frac{\partial v}{\partial x_j} = \frac2d (x_j - \mu), \qquad
# \frac{\partial r}{\partial x_j} = -\tfrac12 r^3\, \frac{\partial v}{\partial x_j} = -\frac{r^2}{d}\, \hat x_j .
# $$
#
# In the second, what $v$ owes to $\mu$ drops out, because the values $x_i - \mu$ add up to zero. With $\delta_{ij}$, which is 1 for $i = j$ and else 0,
#
# $$
# \frac{\partial \hat x_i}{\partial x_j}
# = r \Big( \delta_{ij} - \frac1d \Big) + (x_i - \mu) \frac{\partial r}{\partial x_j}
# = r \Big( \delta_{ij} - \frac1d - \frac{\hat x_i \hat x_j}{d} \Big) .
# $$
#
# Summed over $i$ with the weights $g_i$, where $\langle\cdot\rangle$ is the mean over the width:
#
# $$
# \frac{\partial L}{\partial x} = r \big( g - \langle g \rangle - \hat x\, \langle g \odot \hat x \rangle \big) .
# $$ (eq-kernel-from-first-principles-dx)
#
# Read it so: layer norm forgets the mean of a token and, but for $\varepsilon$, the length of what is left. A change along either has no effect, so both parts are taken out of the gradient. The vectors act on all tokens of an image, and so their gradients are sums over the tokens $t$:
#
# $$
# \frac{\partial L}{\partial \beta} = \sum_t \frac{\partial L}{\partial y_t}, \qquad
# \frac{\partial L}{\partial \gamma} = \sum_t \frac{\partial L}{\partial y_t} \odot \hat x_t .
# $$
#
# With the gate in front, let $e$ be the whole gradient that arrives at $x'$: what its later users send, plus {eq}`eq-kernel-from-first-principles-dx` taken at $x'$. Then $\partial L / \partial x = e$, $\partial L / \partial u = \alpha \odot e$
# and $\partial L / \partial \alpha = \sum_t e_t \odot u_t$. PyTorch's `gradcheck` compares all five with finite differences.


# %%
# NBVAL_CHECK_OUTPUT
class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale):
        residual = x + gate * branch
        centred = residual - residual.mean(-1, keepdim=True)
        r = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        normed = centred * r
        ctx.save_for_backward(normed, r, branch, gate, scale)
        return residual, normed * (1 + scale) + shift

    @staticmethod
    def backward(ctx, dresidual, dy):
        normed, r, branch, gate, scale = ctx.saved_tensors
        g = (1 + scale) * dy
        e = dresidual + r * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
        sums = [t.sum(dim=1, keepdim=True) for t in (e * branch, dy, dy * normed)]
        return e, gate * e, *sums


INPUTS = ("x", "branch", "gate", "shift", "scale")


def accepted(function):
    """For each input: does its gradient agree with differences of the outputs, in float64?"""
    tensors = [t.clone() for t in inputs(2, 3, 5, dtype=torch.float64)]
    found = {}
    for name, tensor in zip(INPUTS, tensors, strict=True):
        tensor.requires_grad_(True)
        found[name] = torch.autograd.gradcheck(function.apply, tensors, raise_exception=False)
        tensor.requires_grad_(False)
    return found


verdict = accepted(Gated)
print("gradcheck:", ", ".join(f"{name} {'PASS' if good else 'FAIL'}" for name, good in verdict.items()))
run.record("gradient", sum(not good for good in verdict.values()))

# %% [markdown]
# Count the bytes again. The backward pass without gate must read $x$ and $\partial L / \partial y$, and write $\partial L / \partial x$: three passes. It need not have kept $\hat x$, as the code above does: with the token in registers, computing it again costs no bytes.
#
# ### The kernel
#
# Triton {cite:p}`tillet2019triton` is a language for such kernels inside Python. One writes a *program*: what is done to one tile of the data. The GPU runs very many programs, in any order. A tile here is `ROWS` tokens of one image, over
# the whole width. This is the forward pass without gate, for tensors without gaps:


# %%
def adaln_kernel(x_ptr, shift_ptr, scale_ptr, y_ptr, n, d, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Which tile: the image, its tokens, their columns.
    image = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    real = columns < d
    inside = (rows < n)[:, None] & real[None, :]
    at = (image * n + rows)[:, None] * d + columns[None, :]
    # Read it once; all arithmetic is in float32.
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # Normalise.
    mean = tl.sum(x, axis=1) / d
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / d
    normed = centred * tl.rsqrt(variance + eps)[:, None]
    # Scale and shift by this image's vectors.
    shift = tl.load(shift_ptr + image * d + columns, mask=real, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + image * d + columns, mask=real, other=0.0).to(tl.float32)
    y = normed * (1.0 + scale)[None, :] + shift[None, :]
    # Write it once, in the dtype of the output.
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


# %% [markdown]
# Line by line:
#
# - **Program.** `program_id` says which tile this is. There is no loop over tiles: the launch starts `ceil(n / ROWS)` times `b` programs.
# - **Rows and columns.** `arange` makes the indices of the tile. Its length must be a power of two, known when the kernel is compiled (`constexpr`). So `COLUMNS` is 2048 for a width of 1152.
# - **Masks.** `real` and `inside` say which places of the tile exist. Masked places are not read (they become `other`) and not written. Pointers are plain addresses, and nobody else watches the bounds.
# - **Statistics in float32**, whatever the dtype of the tensors. A half-precision sum of a thousand numbers has lost its last digits, and some of the others.
# - **`where`** after the subtraction: a masked place was 0 and would now be $-\mu$, and would count in the variance.
# - **`/ d`**, not `/ COLUMNS`: the mean is over what is real.
#
# The library's kernels ([\_triton/adaln.py](https://github.com/minilib-book/minilib/blob/main/minilib/kernels/_triton/adaln.py)) add the gate, gaps between rows, several tiles a program (so that the vectors are read once for all of
# them), 64-bit addresses, and the backward pass. There each program adds up its own tokens' share of the sums and writes it; a second stage adds the shares in a fixed order, so that the result is the same each time.
#
# ## The experiment: checks without a GPU
#
# Triton is an optional part of the library: `pip install "minilib[kernels]"`, on Linux. No GPU and no driver are needed for what follows.

# %%
PARTS = ("interpreted", "mutants-caught", "builds", "no-spills", "shared-memory")
if dispatch.HAS_TRITON:
    print(f"triton {triton.__version__}: kernels are interpreted and compiled below")
else:
    print(
        "triton is not installed. Not run below: the interpreter, the broken kernels, the compiler, their figures."
    )
    print('To run them, on Linux: pip install "minilib[kernels]", then run this page again.')
    for claim in PARTS:
        run.not_tried(claim, 'triton is not installed; on Linux: pip install "minilib[kernels]"')


def elsewhere(call, *sources, interpret=False):
    """Write the sources (functions or text) to a file, run ``call`` in a Python process of its own, return the result."""
    head = "import json, math, os\nimport torch, triton\nimport triton.language as tl\n"
    parts = [source if isinstance(source, str) else inspect.getsource(source) for source in sources]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.py").write_text("\n\n".join([head, *parts, f"print(json.dumps({call}))"]))
        extra = {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": folder}
        extra["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "job.py"]
        done = subprocess.run(command, cwd=folder, env=os.environ | extra, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# %% [markdown]
# ### Values: the interpreter
#
# With `TRITON_INTERPRET=1` set before a kernel is decorated, Triton does not compile it. It runs the programs one after the other, with numpy. That is far slower, so the tensors are small. Because the switch acts on the
# whole process, we start another process for it.
#
# Around each input lies a **guard band** of NaN (not a number), and the output starts as NaN. A read outside the input then poisons the result, a write outside the output changes the band, and a value that is never written stays NaN.
# The library's kernels make their outputs themselves. These start as NaN too, but have no band: a write outside them is looked for in the kernel of this page only.
#
# The tolerance is $10^{-6}$ in float32 and $10^{-3}$ in float16, and for gradients three times that.


# %%
BAND = 16384


def guarded(tensor):
    """The same values with NaN before and after them."""
    buffer = torch.full((2 * BAND + tensor.numel(),), torch.nan, dtype=tensor.dtype)
    view = buffer[BAND : BAND + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def try_kernel(kernel, b, n, d, dtype, mean=0.0, spread=1.0):
    """Error of a kernel against float64; infinite where it left or made a NaN, or wrote outside."""
    x, _, _, shift, scale = inputs(b, n, d)
    x, shift, scale = (guarded(t.to(dtype)) for t in (mean + spread * x, shift, scale))
    y = guarded(torch.full_like(x, torch.nan))
    kernel[(triton.cdiv(n, 4), b)](x, shift, scale, y, n, d, 1e-6, ROWS=4, COLUMNS=triton.next_power_of_2(d))
    found = error(y, definition(x.double(), shift.double(), scale.double()))
    outside = [y._base[:BAND], y._base[BAND + y.numel() :]]
    return found if torch.cat(outside).isnan().all() else math.inf


def outcome(function, tensors, dtype):
    """Values, and gradients of a fixed random weighting of them."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    weights = [inputs(*o.shape, seed)[0].half().to(dtype) for seed, o in enumerate(out)]
    return {"values": out, "gradients": torch.autograd.grad(out, leaves, weights)}


def library_errors():
    """Largest error over tolerance of the library's kernels: values and gradients, two dtypes, two shapes."""
    from minilib.kernels import adaln

    os.environ["MINILIB_KERNELS"] = "triton"
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN until it is written
    found = {}
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        for shape in ((2, 70, 48), (3, 17, 33)):
            x, branch, *vectors = inputs(*shape, dtype=dtype)
            tensors = [guarded(t) for t in (x, branch, *(v[:, 0] for v in vectors))]
            for name in ("modulate", "gated_residual_modulate"):
                given = take(name, tensors)
                ours = outcome(getattr(adaln, name), given, dtype)
                exact = outcome(getattr(adaln, name + "_reference"), given, torch.float64)
                for what, factor in (("values", 1), ("gradients", 3)):
                    worst = max(error(a, e) for a, e in zip(ours[what], exact[what], strict=True))
                    key = f"{name}, {str(dtype)[6:]}, {what}"
                    found[key] = max(found.get(key, 0.0), worst / (factor * bound))
    return found


SHARED = (f"BAND = {BAND}", inputs, definition, error, guarded, try_kernel)
CHECKS = {
    "float16\n1 image\n4 x 1024": ("1, 4, 1024, torch.float16", 1e-3),
    "float32\n1 image\n4 x 1024": ("1, 4, 1024, torch.float32", 1e-6),
    "float16\n3 images\n7 x 48": ("3, 7, 48, torch.float16, 20.0", 1e-3),
    "float32\n3 images\n7 x 48": ("3, 7, 48, torch.float32", 1e-6),
    "float32, tiny\n2 images\n5 x 48": ("2, 5, 48, torch.float32, 0.0, 1e-3", 1e-6),
}
KERNEL = "@triton.jit\n" + inspect.getsource(adaln_kernel)
if dispatch.HAS_TRITON:
    job = [f"try_kernel(adaln_kernel, {arguments}) / {bound}" for arguments, bound in CHECKS.values()]
    ours = elsewhere(
        f"library_errors() | {{'kernel of this page': max({', '.join(job)})}}",
        *(*SHARED, take, outcome, library_errors, KERNEL),
        interpret=True,
    )
    for name, value in ours.items():
        print(f"{name:48s} {value:.2f} of the tolerance")
    run.record("interpreted", max(ours.values()))

# %% [markdown]
# What the interpreter **cannot** see:
#
# - *Races.* Programs run one after the other here. On a GPU they run at once, and two that write to one place are a bug that no check on this page finds.
# - *Limits of the hardware*: registers, shared memory, the smallest matrix product. That is the compiler's part, below.
# - *Reduced arithmetic.* Products in the tf32 format are exact here. Arithmetic in bfloat16 is worse than that: it is wrong, without a word. Our kernels compute in float32 and only load and store bfloat16, which it does right.
# - *Reads outside*, unless guard bands make them visible. On a GPU they may crash, or go unnoticed until the memory behind belongs to somebody else.
# - *Speed.*
#
# ### Checks of the checks: broken kernels
#
# A check that has never failed shows little. So we break the kernel on purpose, in eight ways, and see who notices. Each mutant is the kernel above with one line changed.

# %%
LOAD = "tl.load(x_ptr + at, mask=inside, other=0.0)"
MUTANTS = {
    "none: the kernel above": ("", ""),
    "load without mask": (LOAD, "tl.load(x_ptr + at)"),
    "store without mask": (".element_ty), mask=inside)", ".element_ty))"),
    "padding counts in the variance": ("tl.where(inside, x - mean[:, None], 0.0)", "x - mean[:, None]"),
    "divided by COLUMNS": ("centred, axis=1) / d", "centred, axis=1) / COLUMNS"),
    "divided by d - 1": ("centred, axis=1) / d", "centred, axis=1) / (d - 1)"),
    "statistics in half precision": (LOAD + ".to(tl.float32)", LOAD),
    "no epsilon": ("variance + eps", "variance"),
    "scale of the first image for all": ("scale_ptr + image * d", "scale_ptr"),
}
if dispatch.HAS_TRITON:
    kernels = []
    for i, (old, new) in enumerate(MUTANTS.values()):
        assert old in KERNEL
        kernels.append(KERNEL.replace(old, new, 1 if old else 0).replace("adaln_kernel", f"kernel_{i}"))
    job = [
        [f"try_kernel(kernel_{i}, {arguments})" for arguments, _ in CHECKS.values()]
        for i in range(len(MUTANTS))
    ]
    table = elsewhere(str(job).replace("'", ""), *SHARED, *kernels, interpret=True)
    bounds = [bound for _, bound in CHECKS.values()]
    caught = torch.tensor(
        [[value > bound for value, bound in zip(row, bounds, strict=True)] for row in table]
    )
    missed = (~caught[1:].any(dim=1)).sum().item() + caught[0].sum().item()
    print(f"mutants that pass every check, plus false alarms: {missed}")
    run.record("mutants-caught", missed)

# %% tags=["hide-input"] mystnb={"image": {"alt": "A table of nine kernels by five checks with errors in its cells, dark where the check fails. The right kernel passes all. The first check, half precision at a width of 1024, catches none of eight mutants; the two checks at width 48 with three images catch seven (half precision, mean 20) and six (single precision); statistics in half precision are caught by the first of these two alone; the mutant without epsilon is caught by the check with tiny values alone."}, "figure": {"caption": "Which check catches which bug. In the cells: the error against double precision ($\\infty$: a NaN, or a write outside the output). Dark: above the tolerance ($10^{-3}$ for float16, $10^{-6}$ for float32), so caught. In the column heads: images, tokens x width. The tokens of the third check have a mean of 20, those of the last a variance near $\\varepsilon$.", "name": "fig-kernel-from-first-principles-mutants"}}
if dispatch.HAS_TRITON:
    fig, ax = plt.subplots(figsize=(7, 4.1))
    ax.imshow(caught, cmap=ListedColormap(["#e8eef4", plotting.PALETTE[1]]), vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            text = f"{value:.0e}" if math.isfinite(value) else r"$\infty$"
            ax.text(
                j, i, text, ha="center", va="center", fontsize=9, color="white" if caught[i, j] else "#222222"
            )
    ax.set_xticks(range(len(CHECKS)), list(CHECKS), fontsize=9)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(MUTANTS)), list(MUTANTS))
    ax.tick_params(length=0)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    fig.tight_layout()
    plt.show()
else:
    print("not run: triton is not installed")

# %% [markdown]
# The first column is the check one writes first: half precision, a handsome power of two, one image. It is blind. A width of 1024 fills its tile, so masks and padding make no difference; one image cannot be confused with another; and dividing
# by $d - 1$ changes the result by $1 / (2 d)$, which is below the tolerance of half precision. In single precision the same sizes see that, and no more. Checks need odd sizes, several images, the finest dtype and the coarsest, and inputs at the edge of
# what is allowed: half-precision statistics show where the mean is large, and
# $\varepsilon$ matters only where the variance is as small as $\varepsilon$.
#
# ### Build: the compiler
#
# Triton brings its own compiler and NVIDIA's assembler (`ptxas`). Neither needs a GPU: we name the target and compile. `minilib.kernels.compiling` does that and reads what the assembler says:
#
# - **registers** a thread: where a program keeps its tile. 255 is the most. The more, the fewer programs run side by side.
# - **spills** a thread: bytes that found no register and go to memory and back. A kernel that exists to save trips to memory must have none.
# - **shared memory** a program: fast memory that threads exchange sums through. 48 KB are granted everywhere without asking.
#
# The targets bear their compute capability in their names: `sm_80` is an A100. Tensors are bfloat16, but float16 for the T4, which has no bfloat16.


# %%
def build_all(targets, width):
    """What the assembler says of the library's four kernels on each target; a text where the build failed."""
    from minilib.kernels._triton import adaln
    from minilib.kernels.compiling import compile_kernel

    rows = []
    for capability in targets:
        for which, gated in (("forward", False), ("forward", True), ("backward", False), ("backward", True)):
            kernel, tile = getattr(adaln, which + "_kernel"), adaln.config(width)
            warps = tile.pop("num_warps")
            turns = adaln.TILES if which == "forward" else triton.cdiv(adaln.BACKWARD_ROWS, tile["ROWS"])
            constants = tile | {"GATED": gated, "TILES": turns}
            half = "*fp16" if capability < 80 else "*bf16"  # the T4 has no bfloat16
            names = [name for name in kernel.arg_names if name not in constants]
            types = {name: half if name.endswith("_ptr") else "i32" for name in names} | {"eps": "fp32"}
            types |= {"partial_ptr": "*fp32"} if "partial_ptr" in names else {}
            unaligned = tuple({"n", "splits"} & set(names))
            try:
                built = compile_kernel(
                    kernel, capability, types, constants, num_warps=warps, unaligned=unaligned
                )
                row = [built.registers, built.spill_bytes, built.shared_bytes]
            except Exception as problem:
                row = [f"{type(problem).__name__}: {problem}"]
            rows.append([capability, which, gated, *row])
    return rows


def build_tiles(tiles):
    """Registers and spills of the kernel of this page, with so many tokens a tile, on an A100."""
    from minilib.kernels.compiling import compile_kernel

    types = dict.fromkeys(("x_ptr", "shift_ptr", "scale_ptr", "y_ptr"), "*bf16") | {
        "n": "i32",
        "d": "i32",
        "eps": "fp32",
    }
    built = [compile_kernel(adaln_kernel, 80, types, {"ROWS": rows, "COLUMNS": 2048}) for rows in tiles]
    return [[b.registers, b.spill_bytes] for b in built]


if dispatch.HAS_TRITON:
    targets = {75: "T4", 80: "A100", 89: "L4", 90: "H100"}
    builds, tiles = elsewhere(
        f"[build_all({list(targets)}, {d}), build_tiles({list(s.rows)})]", build_all, build_tiles, KERNEL
    )
    for capability, which, gated, *row in builds:
        what = f"{targets[capability]:5s} sm_{capability}  {which:8s} {'gated' if gated else '':6s}"
        print(what, "{:4d} registers {:3d} B spilt {:6d} B shared".format(*row) if len(row) == 3 else row[0])
    good = [row for row in builds if len(row) == 6]
    run.record("builds", len(builds) - len(good))
    run.record("no-spills", max(row[4] for row in good))
    run.record("shared-memory", max(row[5] for row in good))

# %% [markdown]
# How large may a tile be? A *warp* is 32 threads that run in step, so a program of 4 warps has 128 threads. With 2048 columns, each token of a tile puts 16 values on every thread, in more than one copy while it is worked on. {numref}`fig-kernel-from-first-principles-spills`
# compiles the kernel of this page for taller and taller tiles. The library takes one token a tile at this width.
# Beyond the limit the fall is deep: at the tallest tile the assembler seems to give up. It keeps nearly everything in memory, and needs few registers for it.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Registers a thread rise with the tokens in a tile up to 255, the most there is, at 16 tokens, where spilling begins; at 32 tokens the spilt bytes shoot up and the registers fall."}, "figure": {"caption": "The kernel of this page, compiled for an A100: registers a thread (left axis, blue) and what a thread's spills store and load (right axis, orange) against the number of tokens in a tile. Dashed: the most registers a thread can have.", "name": "fig-kernel-from-first-principles-spills"}}
if dispatch.HAS_TRITON:
    fig, ax = plt.subplots(figsize=(6, 3.2))
    ax.plot(s.rows, [t[0] for t in tiles], marker="o", color=plotting.PALETTE[0])
    ax.axhline(255, color="#444444", ls="--", lw=1)
    ax.set(
        xscale="log", xlabel="tokens in a tile (of 2048 columns)", ylabel="registers a thread", ylim=(0, 275)
    )
    ax.set_xticks(s.rows, [str(r) for r in s.rows])
    ax.minorticks_off()
    ax.yaxis.label.set_color(plotting.PALETTE[0])
    other = ax.twinx()
    other.plot(s.rows, [t[1] / 1024 for t in tiles], marker="s", color=plotting.PALETTE[1])
    other.set_ylabel("KB spilt (stores and loads)", color=plotting.PALETTE[1])
    other.spines["right"].set_visible(True)
    other.grid(False)
    other.set_ylim(bottom=0)
    plt.show()
else:
    print("not run: triton is not installed")

# %% [markdown]
# ## Results

# %%
run.report()

# %% [markdown]
# The exact lines are what a machine without a GPU can promise: the bytes, the values, the gradient, and that the kernels build and keep their tiles in registers. The two lines of time are those of the processor's own path, two or three
# fused calls of PyTorch. They save some of the passes, not all, and they are compared with the released form run call by call, not with what `torch.compile`
# makes of it on a processor. The last two lines, the speed of the Triton kernel, are **not tried**: they need a GPU.
#
# (sec-kernel-from-first-principles-rule)=
# ### The rule
#
# **No kernel of this library ships as a default where it is slower than what PyTorch has.** What PyTorch has includes `torch.compile`, which fuses such an operation by itself. So a Triton kernel has to earn its place. Until it has been measured on a GPU to be no slower,
# the library runs PyTorch's path there: for this operation the two or three fused calls from above. The table `minilib.kernels.dispatch.MEASURED` lists the operations that have passed, each with the least compute capability on which it did. **It is
# empty so far: by default, no Triton kernel runs on any GPU.** `MINILIB_KERNELS=triton` runs them all the same. `explain` says which path a call would take, and why:

# %%
x, _, _, shift, scale = inputs(1, n, d)
before = os.environ.pop("MINILIB_KERNELS", None)
for mode in ("auto", "ref", "triton"):
    os.environ["MINILIB_KERNELS"] = mode
    try:
        choice = explain("modulate", x, shift[:, 0], scale[:, 0])
        print(f"{mode:7s} {choice.path}: {choice.reason}")
    except RuntimeError as refusal:
        print(f"{mode:7s} refused: {refusal}")
del os.environ["MINILIB_KERNELS"]
if before is not None:
    os.environ["MINILIB_KERNELS"] = before

# %% [markdown]
# Nothing falls back in silence: asked for Triton where it cannot run, it refuses and says why. On a GPU, `auto` would answer `torch` today, with the reason: the kernel is not measured there yet.
#
# ### On a GPU: not measured yet
#
# Nothing on this page is a speed of a GPU. This is the plan for one, written down before it is run.
#
# :::{table} What is to be measured on an H100 in bfloat16, and what we aim at.
# :name: tab-kernel-from-first-principles-plan
#
# | what | against | goal |
# |---|---|---|
# | modulate, 32 images, 1024 tokens, width 1152 | rate of a plain copy | at least 0.8 |
# | the same | `torch.compile` of the definition | at most 1.0 of its time |
# | the same | eager, the released form | at most 0.4 of its time |
# | with the gated residual, right behind an attention | `torch.compile` of both | at most 0.9 of its time |
# | forward and backward | `torch.compile` of the definition | at most 1.0 of its time |
# | 1 image of 256 tokens | the same five | no goal: the start of a kernel takes longer than its work |
# :::
#
# The fourth line is the boldest: `torch.compile` can fuse the gated residual with the norm too. Until these lines are measured, the default on a GPU stays PyTorch's path, which `torch.compile` can fuse where a whole model is compiled. If the
# second line fails, it stays so, and the kernel is a lesson. The floors, the least time that the bytes need, follow from equation {eq}`eq-kernel-from-first-principles-bytes` and the data sheet alone:

# %%
# NBVAL_CHECK_OUTPUT
for name, factors in ONE_KERNEL.items():
    bytes_ = moved(factors, 32, 1024, d, itemsize=2)
    print(f"{name:18s} {bytes_ / 1e6:4.0f} MB, at 3.35 TB/s no less than {bytes_ / 3.35e6:3.0f} microseconds")

# %% [markdown]
# ## What this does not show
#
# - The speed of the Triton kernels, on any GPU. That they build and do not spill is needed for speed; it is not speed.
# - The values in bfloat16, in which the kernels are to be timed: they are interpreted in float32 and float16, and in bfloat16 only built.
# - Anything about races, or about how many programs run side by side.
# - That bytes alone decide. On a GPU the start of a kernel costs microseconds, and at small sizes fewer *calls* matter more than fewer bytes.
# - What the operation is worth in a whole model. It is a small part of a block's time; the most that can be gained is that part.
# - The processor's ratios hold for one core, one size and float32. With smaller tensors, caches change them.
#
# ## Exercises
#
# **1.** How many bytes does automatic differentiation move in the backward pass of the released form, and how many would one kernel move? Guess the ratio, then count.
#
# **2.** Leave the last term of {eq}`eq-kernel-from-first-principles-dx` out of the backward pass. For which inputs does gradcheck refuse the gradient?
#
# **3.** `COLUMNS` is a power of two. What share of the lanes of a tile is idle for the four DiT widths, 384, 768, 1024 and 1152? Does it cost bytes?
#
# **4.** Find a bug that *every* check of {numref}`fig-kernel-from-first-principles-mutants` misses. How does the library guard against it?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# One kernel reads x and dy and writes dx: three passes. The released form keeps what each call needs, and its backward
# pass runs through the calls in reverse: the products with 1 + scale, the sums over tokens, the layer norm.
x, shift, scale = (t.clone().requires_grad_() for t in take("", inputs(2, n, d)))
y = released(x, shift, scale)
dy = torch.ones_like(y)
with Traffic() as count:
    torch.autograd.grad(y, (x, shift, scale), dy)
for call, read, written in count.rows:
    print(f"{call:36s} reads {read / x.nbytes:.2f} sizes of x, writes {written / x.nbytes:.2f}")
total = sum(read + written for _, read, written in count.rows) / x.nbytes
print(f"in sum {total:.2f}, against 3: {total / 3:.1f} times as much")

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# For x, and for the two that get their gradient through e: branch and gate. Shift and scale do not see the term.


class Careless(Gated):
    @staticmethod
    def backward(ctx, dresidual, dy):
        *_, dshift, dscale = Gated.backward(ctx, dresidual, dy)
        _, r, branch, gate, scale = ctx.saved_tensors
        g = (1 + scale) * dy
        e = dresidual + r * (g - g.mean(-1, keepdim=True))
        return e, gate * e, (e * branch).sum(dim=1, keepdim=True), dshift, dscale


print(", ".join(f"{name} {'accepted' if good else 'refused'}" for name, good in accepted(Careless).items()))

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 3", "code_prompt_hide": "Solution 3"}
# No bytes: masked places are neither read nor written. It costs lanes, and registers: idle places take room as well.
for width in (384, 768, 1024, 1152):
    columns = 2 ** math.ceil(math.log2(width))
    print(f"width {width}: tile of {columns}, {1 - width / columns:.0%} idle")

# %% [markdown]
# :::{dropdown} Solution 4
# Addresses. `(image * n + rows) * d` is computed in 32 bits. With 1024 tokens of width 1152 it overflows from image 1821 on, and a tensor of that size is far too large for an interpreter. Every check with small tensors passes. A video model
# with a hundred thousand tokens gets there with 19 clips. The library's kernels turn the image's and the rows' numbers into 64 bits first (`.to(tl.int64)`), which is read off the source, not measured by a check.
#
# Another: a second program that writes the same rows. The values are right, interpreted or not, as long as both write the same. It only costs time.
# :::
#
# ## References
#
# The operation: {cite:t}`peebles2023scalable`; its norm: {cite:t}`ba2016layer`. The roofline: {cite:t}`williams2009roofline`. The language: {cite:t}`tillet2019triton`. Ways to compute a variance: {cite:t}`chan1983algorithms`. Code read:
# [facebookresearch/DiT](https://github.com/facebookresearch/DiT) (`models.py`). The library's version: [kernels/adaln.py](https://github.com/minilib-book/minilib/blob/main/minilib/kernels/adaln.py),
# [kernels/compiling.py](https://github.com/minilib-book/minilib/blob/main/minilib/kernels/compiling.py).
