"""How a tensor is rounded: specifications, the grid of a range or of a tensor, and rounding with gradients.

The gradient of a scale is that of learned step size quantisation (Esser et al. 2020, arXiv 1902.08153, eq. 3).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minilib.kernels.quant import GRANULARITIES, Grid

BITS = range(2, 17)
SCALE_INITS = ("minmax", "mse")
#: Shares of the full range that a search for the least squared error tries.
SHARES = tuple(1 - 0.05 * i for i in range(17))


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is rounded.

    Args:
        bits: 2 to 16: at most 2^bits different values a range; 32: not rounded at all.
        granularity: what shares one range: the whole "tensor"; a "channel" (of a weight: all that makes one output; of an
            activation: one feature, over samples and tokens); or a "token" (one vector of features at one place of one sample).
        symmetric: the range is -m..m, of 2^bits - 1 points; else low..high, zero included, of 2^bits points.
        dynamic: find the range in the values themselves, at each call. A dynamic range of a "tensor" or "channel" depends on the
            other samples of the batch; that of a token does not.
        scale_init: "minmax": the range covers all values; "mse": of the shares 1, 0.95, ... 0.2 of it, the one with the
            least squared error, values beyond it being clipped.

    Raises:
        ValueError: unknown bits, granularity or scale_init; static tokens; a search at each call.

    >>> QuantSpec(4, "channel", symmetric=True)
    QuantSpec(bits=4, granularity='channel', symmetric=True, dynamic=False, scale_init='minmax')
    """

    bits: int = 8
    granularity: str = "tensor"
    symmetric: bool = False
    dynamic: bool = False
    scale_init: str = "minmax"

    def __post_init__(self) -> None:
        if self.bits not in BITS and self.bits != 32:
            raise ValueError(
                f"bits = {self.bits} given: choose {BITS[0]} to {BITS[-1]}, or 32 for 'not rounded'"
            )
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {self.granularity!r}: choose one of {list(GRANULARITIES)}")
        if self.scale_init not in SCALE_INITS:
            raise ValueError(f"unknown scale_init {self.scale_init!r}: choose one of {list(SCALE_INITS)}")
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("the range of a token is known when it comes: a 'token' spec needs dynamic=True")
        if self.dynamic and self.scale_init != "minmax":
            raise ValueError(
                f"scale_init={self.scale_init!r} searches for a range once: it needs dynamic=False"
            )

    @property
    def off(self) -> bool:
        """Whether nothing is rounded."""
        return self.bits == 32


OFF = QuantSpec(32)


def grid_of_range(low: Float[Tensor, "..."], high: Float[Tensor, "..."], spec: QuantSpec) -> Grid:
    """The grid of ranges; a range of no width, or below the normal numbers, gets a scale of 1.

    Up to 8 bits it is that of ``minilib.kernels.quant.find_grid`` to the bit.

    Raises:
        ValueError: a range that is not finite, or a spec of 32 bits.
    """
    if spec.off:
        raise ValueError("a spec of 32 bits has no grid: nothing is rounded")
    if low.dtype in (torch.float16, torch.bfloat16):  # a small step is not a normal number of float16
        low, high = low.float(), high.float()
    if not (low.is_meta or bool(torch.isfinite(high - low).all())):
        raise ValueError(
            "values that are not finite, or too far apart, cannot be quantised: find where they come from"
        )
    if spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        scale = _positive(torch.maximum(high, -low) / top)
        return Grid(scale, torch.zeros_like(scale), -top, top)
    top = 2**spec.bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _positive((high - low) / top)
    return Grid(scale, (-low / scale).round(), 0, top)


def spec_grid(x: Float[Tensor, "..."], spec: QuantSpec, *, channel_axis: int = -1) -> Grid:
    """The grid of ``x`` itself, as ``spec`` asks; its scale broadcasts to ``x``.

    Args:
        x: a weight or an activation.
        spec: not of 32 bits.
        channel_axis: of the channels; a token is all channels at one place.

    Raises:
        ValueError: as ``grid_of_range``; an empty tensor; a channel axis that ``x`` has not.
    """
    x = x.detach()
    dims = _shared_axes(x, spec.granularity, channel_axis)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if spec.scale_init == "minmax":
        return grid_of_range(low, high, spec)
    return _least_error(x, low, high, spec, dims)


def round_to_grid(x: Float[Tensor, "..."], grid: Grid, *, clipped: bool = True) -> Float[Tensor, "..."]:
    """``x`` at the nearest points of the grid, with a straight-through gradient.

    The gradient of ``x`` is 1 within the grid and 0 where ``x`` is clipped. The gradient of ``grid.scale`` is
    ``q - x / scale`` within (q being the nearest whole number) and the end of the grid where ``x`` is clipped.

    Args:
        x: any shape.
        grid: its scale and zero point broadcast to ``x``.
        clipped: False: the gradient of ``x`` is 1 everywhere, as it is for a grid found in ``x`` itself.

    >>> grid = grid_of_range(torch.tensor(0.0), torch.tensor(1.5), QuantSpec(2))
    >>> round_to_grid(torch.tensor([-1.0, 0.2, 0.3, 9.0]), grid)
    tensor([0.0000, 0.0000, 0.5000, 1.5000])
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or grid.scale.requires_grad)):
        q = (x / grid.scale).round_().add_(grid.zero_point).clamp_(grid.low, grid.high)
        return q.sub_(grid.zero_point).mul_(grid.scale).to(x.dtype)
    return _Round.apply(x, grid.scale, grid.zero_point, grid.low, grid.high, clipped)


class _Round(torch.autograd.Function):
    """Rounding with the gradients of ``round_to_grid``."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, clipped: bool) -> Tensor:
        exact = x / scale
        q = exact.round().add_(zero)
        inside = (q >= low) & (q <= high)
        steps = q.clamp_(low, high).sub_(zero)
        ctx.shape, ctx.clipped = scale.shape, clipped
        # d out / d scale
        slope = torch.where(inside, steps - exact, steps) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside if clipped else None, slope)
        return (steps * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, slope = ctx.saved_tensors
        of_x = of_scale = None
        if ctx.needs_input_grad[0]:
            of_x = grad if inside is None else grad * inside
        if slope is not None:
            of_scale = (grad * slope).sum_to_size(ctx.shape)
        return of_x, of_scale, None, None, None, None


def _least_error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, dims: tuple[int, ...]) -> Grid:
    """Of the shares of the range, for each range by itself, the one with the least squared error; ties: the larger."""
    best = grid_of_range(low, high, spec)
    least = (round_to_grid(x, best) - x).square().mean(dims, keepdim=True)
    scale, zero = best.scale, best.zero_point
    for share in SHARES[1:]:
        grid = grid_of_range(low * share, high * share, spec)
        error = (round_to_grid(x, grid) - x).square().mean(dims, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero_point, zero)
    return Grid(scale, zero, best.low, best.high)


def _shared_axes(x: Tensor, granularity: str, channel_axis: int) -> tuple[int, ...]:
    """The axes over which one range is shared."""
    if x.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no values to quantise")
    if granularity == "tensor":
        return tuple(range(x.ndim))
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(
            f"axis {channel_axis} of the channels: a tensor of {x.ndim} axes has {-x.ndim}..{x.ndim - 1}"
        )
    axis = channel_axis % x.ndim
    return (axis,) if granularity == "token" else tuple(i for i in range(x.ndim) if i != axis)


def _positive(scale: Tensor) -> Tensor:
    # Below the normal numbers a step has few digits left, and dividing by it could pass the grid's end.
    return torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
