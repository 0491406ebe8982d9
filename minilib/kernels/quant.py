"""Numbers on a grid: simulated quantisation with a straight-through gradient, and linear layers that compute in integers.

A grid of b bits has at most 2^b points, ``scale * (q - zero_point)`` for whole numbers q in low..high. *Symmetric*: zero_point 0
and q in -(2^(b-1) - 1)..2^(b-1) - 1, so that x and -x get the same error. *Affine*: q in 0..2^b - 1 and zero a point of the
grid, for values that are not centred (Jacob et al. 2018, arXiv 1712.05877, section 2). One grid serves the whole tensor, a
channel (for weights: one output), or a token (one vector of the last axis), see ``GRANULARITIES``.

``fake_quantize`` rounds to the grid and stays in floating point: it shows the error, and costs time. ``integer_linear`` computes
with 8-bit integers, weights by output channel and activations by token: its sums are exact, and it is faster than float32 only
where the processor multiplies bytes (``has_vnni``).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from minilib.machine import cpu_flags

from .dispatch import Choice, Kernel

GRANULARITIES = ("tensor", "channel", "token")
BITS = range(2, 9)
#: The longest sum of products of two int8 that int32 holds whatever the values: 128 * 128 * K < 2^31.
MAX_INNER = (2**31 - 1) // (128 * 128)


class Grid(NamedTuple):
    """Points ``scale * (q - zero_point)``, q whole in low..high; scale and zero_point broadcast to the tensor."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


def find_grid(
    x: Float[Tensor, "..."],
    bits: int = 8,
    *,
    granularity: str = "tensor",
    symmetric: bool = True,
    axis: int = 0,
) -> Grid:
    """The finest grid that covers all of ``x``; where ``x`` is zero throughout (or below 1e-36), a scale of 1.

    Args:
        x: any shape; "channel" and "token" need at least one axis.
        bits: 2 to 8.
        granularity: one of ``GRANULARITIES``.
        symmetric: see the module's text.
        axis: of the channels, for "channel".

    Raises:
        ValueError: unknown bits or granularity, an empty tensor, or a value that is not finite.
    """
    if bits not in BITS:
        raise ValueError(f"bits = {bits} given: choose {BITS[0]} to {BITS[-1]}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}: choose one of {list(GRANULARITIES)}")
    if x.numel() == 0 or (granularity != "tensor" and x.ndim == 0):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no {granularity} to quantise")
    x = x.detach()
    dims = _reduced(x.ndim, granularity, axis)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if x.dtype in (torch.float16, torch.bfloat16):  # a small step is not a normal number of float16
        low, high = low.float(), high.float()
    _check_finite(low, high)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _positive(torch.maximum(high, -low) / top)
        return Grid(scale, torch.zeros_like(scale), -top, top)
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _positive((high - low) / top)
    return Grid(scale, (-low / scale).round(), 0, top)


def to_grid(x: Float[Tensor, "..."], grid: Grid) -> Float[Tensor, "..."]:
    """The number q of the point nearest to each value, as a float; values beyond the grid go to its ends."""
    return (x / grid.scale).round().add(grid.zero_point).clamp(grid.low, grid.high)


def fake_quantize(
    x: Float[Tensor, "..."],
    bits: int = 8,
    *,
    granularity: str = "tensor",
    symmetric: bool = True,
    axis: int = 0,
    grid: Grid | None = None,
) -> Float[Tensor, "..."]:
    """``x`` rounded to a grid, with the gradient of the identity (straight-through, arXiv 1308.3432).

    Without ``grid`` the grid is found from ``x`` itself (dynamic), and the gradient is 1 everywhere. With a ``grid``
    from elsewhere (static), values beyond it are clipped and their gradient is 0.

    Args:
        x: any shape.
        bits, granularity, symmetric, axis: see ``find_grid``; not used with ``grid``.
        grid: a static grid.

    Raises:
        ValueError: as ``find_grid``.

    >>> fake_quantize(torch.tensor([-1.0, 0.2, 0.3, 1.0]), bits=2)
    tensor([-1.,  0.,  0.,  1.])
    """
    found = (
        find_grid(x, bits, granularity=granularity, symmetric=symmetric, axis=axis) if grid is None else grid
    )
    with torch.no_grad():
        rounded = ((to_grid(x, found) - found.zero_point) * found.scale).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return _StraightThrough.apply(x, rounded, None if grid is None else _inside(x, grid))


class _StraightThrough(torch.autograd.Function):
    """``rounded``, with the gradient of ``x`` where ``inside``; x + (rounded - x) would not give ``rounded`` to the bit."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad if inside is None else grad * inside, None, None


@torch.no_grad()
def _inside(x: Tensor, grid: Grid) -> Tensor:
    q = (x / grid.scale).round() + grid.zero_point
    return (q >= grid.low) & (q <= grid.high)


def quantize_int8(
    x: Float[Tensor, "..."], *, granularity: str = "tensor", axis: int = 0
) -> tuple[Int8[Tensor, "..."], Float[Tensor, "..."]]:
    """(q, scale): whole numbers in -127..127 with x = scale * q within half a step; symmetric, scale broadcasts to x.

    Raises:
        ValueError: as ``find_grid``.
    """
    grid = find_grid(x, 8, granularity=granularity, axis=axis)
    # The largest value can land on 127.00001, never past 127.5, so that nothing has to be clipped.
    return (x.detach() / grid.scale).round_().to(torch.int8), grid.scale


def _int_reference(a: Int8[Tensor, "m k"], b: Int8[Tensor, "k n"]) -> Int32[Tensor, "m n"]:
    _check_inner(a, b)
    return (a.long() @ b.long()).to(torch.int32)


def _int_torch(a: Int8[Tensor, "m k"], b: Int8[Tensor, "k n"]) -> Int32[Tensor, "m n"]:
    _check_inner(a, b)
    return torch._int_mm(a, b) if a.device.type != "cuda" else padded_int_mm(a, b)


def padded_int_mm(a: Int8[Tensor, "m k"], b: Int8[Tensor, "k n"]) -> Int32[Tensor, "m n"]:
    """``torch._int_mm`` of any shape within cuBLAS's rules: more than 16 rows, inner and outer widths multiples of 8.

    Zeros are added where they are needed and what they make is cut off, which changes no sum.
    """
    (m, k), n = a.shape, b.shape[1]
    rows, inner, columns = max(17 - m, 0), -k % 8, -n % 8
    if m == 0 or n == 0 or k == 0:
        return torch.zeros(m, n, dtype=torch.int32, device=a.device)
    if rows or inner:
        a = F.pad(a, (0, inner, 0, rows))
    if inner or columns:
        b = F.pad(b, (0, columns, 0, inner))
    return torch._int_mm(a, b)[:m, :n]


def _choose_int(a: Tensor, b: Tensor) -> Choice:
    if a.device.type == "cuda":
        return Choice("int_matmul", "torch", "torch._int_mm on a GPU, padded to the shapes that cuBLAS takes")
    kind = "with" if has_vnni() else "without"
    return Choice("int_matmul", "cpu", f"torch._int_mm; a CPU {kind} 8-bit dot products (VNNI)")


#: ``int_matmul(a, b)``: int8 (m, k) times int8 (k, n), exactly, as int32.
int_matmul = Kernel(
    "int_matmul", {"reference": _int_reference, "cpu": _int_torch, "torch": _int_torch}, _choose_int
)


def _check_inner(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"int8 matrices of shapes {tuple(a.shape)} and {tuple(b.shape)} do not multiply")
    if a.shape[1] > MAX_INNER:
        raise ValueError(
            f"a sum over {a.shape[1]} products can overflow int32: split it into parts of at most {MAX_INNER}"
        )


@torch.no_grad()
def integer_linear(
    x: Float[Tensor, "... d_in"],
    weight: Int8[Tensor, "d_out d_in"],
    scale: Float[Tensor, " d_out"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "... d_out"]:
    """x W^T + bias with W8A8: each token of ``x`` to int8 with its own scale, an int32 product, and back to ``x``'s dtype.

    Args:
        x: activations.
        weight: whole numbers, one row an output channel (``quantize_int8(w, granularity="channel")``).
        scale: of each row.
        bias: added in floating point.

    Raises:
        ValueError: widths that do not fit, or a value that is not finite.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"tokens of width {x.shape[-1]} given, the weight takes {weight.shape[1]}")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 0:
        return x.new_zeros(*x.shape[:-1], len(weight))
    q, token_scale = quantize_int8(rows.to(exact), granularity="token")
    out = int_matmul(q, weight.t()).to(exact).mul_(token_scale)
    scale = scale.to(exact)
    out = out.mul_(scale) if bias is None else torch.addcmul(bias.to(exact), out, scale)
    return out.to(x.dtype).view(*x.shape[:-1], len(weight))


class IntegerLinear(nn.Module):
    """A linear layer with int8 weights (a scale for each output) and int8 activations (a scale for each token, dynamic).

    For inference: rounding has no gradient. To train under quantisation, use ``fake_quantize``.

    >>> layer = IntegerLinear.from_linear(nn.Linear(8, 4))
    >>> layer(torch.zeros(2, 3, 8)).shape, layer.weight.dtype
    (torch.Size([2, 3, 4]), torch.int8)
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "IntegerLinear":
        """The integer copy of ``linear``, on its device.

        Raises:
            ValueError: weights that are not finite, or too many inputs for int32 sums.
        """
        if linear.in_features > MAX_INNER:
            raise ValueError(
                f"{linear.in_features} inputs: their products can overflow int32, at most {MAX_INNER} fit"
            )
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight.device)
        layer.weight, scale = quantize_int8(linear.weight.float(), granularity="channel")
        layer.scale = scale.flatten()
        if linear.bias is not None:
            layer.bias = linear.bias.detach().float().clone()
        return layer

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Act on each token by itself.

        Raises:
            ValueError: a gradient is asked for, a width that does not fit, or a value that is not finite.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "IntegerLinear has no gradient: run it under torch.no_grad(), or train with fake_quantize"
            )
        return integer_linear(x, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


@lru_cache
def has_vnni() -> bool:
    """Whether this CPU has 8-bit dot products (AVX512-VNNI, AVX-VNNI or AMX), as its flags in /proc/cpuinfo say.

    Where there is no such file (macOS, Windows) the answer is False: not known is not claimed.
    """
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & cpu_flags())


def _reduced(ndim: int, granularity: str, axis: int) -> tuple[int, ...]:
    """The axes over which one grid is shared."""
    if granularity == "tensor":
        return tuple(range(ndim))
    if granularity == "token":
        return (ndim - 1,)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} of the channels: a tensor of {ndim} axes has {-ndim}..{ndim - 1}")
    return tuple(i for i in range(ndim) if i != axis % ndim)


def _positive(scale: Tensor) -> Tensor:
    # Below the normal numbers a step has few digits left, and dividing by it could pass the grid's end.
    return torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def _check_finite(low: Tensor, high: Tensor) -> None:
    # The extremes of the values tell: NaN and infinity survive amin and amax.
    if not (low.is_meta or bool(torch.isfinite(high - low).all())):
        raise ValueError(
            "values that are not finite, or too far apart, cannot be quantised: find where they come from"
        )
