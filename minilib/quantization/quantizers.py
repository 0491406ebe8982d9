"""What is rounded how, and the module that does it: uniform quantisers with a straight-through gradient and a learnable scale.

A grid has the points ``scale * (q - zero_point)``, q a whole number in low..high (``minilib.kernels.quant.Grid``); zero is always
one of them. A *dynamic* quantiser finds the grid in the values it is given, at every call. A *static* one finds it once, in the
values of some calibration calls, and may then learn it: the gradient of its scale is that of learned step size quantisation
(Esser et al. 2020, arXiv 1902.08153, eq. 3), and the scale is stored as its logarithm, so that it stays positive.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilib.kernels.quant import GRANULARITIES, Grid

BITS = range(2, 17)
SCALE_INITS = ("minmax", "mse")
#: Shares of the full range that a search for the least squared error tries.
SHARES = tuple(1 - 0.05 * i for i in range(17))
#: Vectors of a call that such a search keeps of an activation.
KEPT = 64


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


class Quantizer(nn.Module):
    """Rounds what passes through, as a spec says; with 32 bits it hands out the very tensor it was given.

    A static quantiser has to see values first: ``start()``, calls, ``finish()`` (``calibrate`` does it for a whole model), or
    ``set_range``. From then on ``log_scale`` is a parameter, one number a range; the zero point stays.

    Args:
        spec: how to round.
        channel_axis: of the channels in what passes: -1 for tokens of features, 1 for feature maps, 0 for weights.

    >>> rounded = Quantizer(QuantSpec(2, symmetric=True, dynamic=True))
    >>> rounded(torch.tensor([-1.0, 0.2, 0.3, 1.0]))
    tensor([-1.,  0.,  0.,  1.])
    """

    def __init__(self, spec: QuantSpec, *, channel_axis: int = -1) -> None:
        super().__init__()
        self.spec, self.channel_axis = spec, channel_axis
        self.register_parameter("log_scale", None)
        self.register_buffer("zero_point", None)
        self.low, self.high = (
            (1 - 2 ** (spec.bits - 1), 2 ** (spec.bits - 1) - 1) if spec.symmetric else (0, 2**spec.bits - 1)
        )
        self._seen: dict[int, list[Tensor]] | None = None  # while it watches: by row, values

    @property
    def static(self) -> bool:
        """Whether there is a scale to find and to learn."""
        return not (self.spec.off or self.spec.dynamic)

    @property
    def ready(self) -> bool:
        """Whether it can round: always, unless it is static and has not seen values yet."""
        return not self.static or self.log_scale is not None

    @property
    def rows(self) -> int:
        """Rows of the table of scales: 1, unless the scale depends on time."""
        return 1

    def row(self, x: Tensor) -> int | Int[Tensor, " b"]:
        """The row for this call, or one for each sample."""
        return 0

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Round ``x``; while watching, hand it on as it is.

        Raises:
            ValueError: static and without a range; values that are not finite.
        """
        if self.spec.off:
            return x
        if self._seen is not None:
            self._watch(x.detach())
            return x
        if self.spec.dynamic:
            return round_to_grid(x, spec_grid(x, self.spec, channel_axis=self.channel_axis), clipped=False)
        return round_to_grid(x, self.grid(x))

    def grid(self, x: Float[Tensor, "..."]) -> Grid:
        """The grid on which ``x`` will be rounded; its scale broadcasts to ``x``.

        Raises:
            ValueError: nothing is rounded (32 bits); static and without a range.
        """
        if self.spec.dynamic or self.spec.off:
            return spec_grid(x, self.spec, channel_axis=self.channel_axis)
        if self.log_scale is None:
            raise ValueError(
                "a static quantiser needs a range before it can round: run calibrate(model, calls), or give it a "
                "spec with dynamic=True"
            )
        row = self.row(x)
        scale = self._fit(self.log_scale[row].exp(), x)
        return Grid(scale, self._fit(self.zero_point[row], x), self.low, self.high)

    def set_range(self, low: Float[Tensor, "..."], high: Float[Tensor, "..."]) -> None:
        """Fix the ranges: tensors (rows, k), k = 1 or the number of channels.

        Raises:
            ValueError: not static; another number of rows; not finite.
        """
        if low.ndim != 2 or low.shape[0] != self.rows:
            raise ValueError(
                f"ranges of shape {tuple(low.shape)} given, expected ({self.rows}, 1 or channels)"
            )
        self._set(grid_of_range(low, high, self.spec))

    def set_grid(self, x: Float[Tensor, "..."]) -> None:
        """Fix the range by one tensor, in all of it: for weights.

        Raises:
            ValueError: not static; values that are not finite.
        """
        grid = spec_grid(x, self.spec, channel_axis=self.channel_axis)
        row = grid._replace(scale=grid.scale.reshape(1, -1), zero_point=grid.zero_point.reshape(1, -1))
        self._set(
            Grid(row.scale.expand(self.rows, -1), row.zero_point.expand(self.rows, -1), row.low, row.high)
        )

    def start(self) -> None:
        """Watch what passes, and hand it on unchanged. Does nothing if the quantiser is not static."""
        if self.static:
            self._seen = {}

    def finish(self) -> None:
        """Stop watching, and set the ranges by what was seen.

        Raises:
            ValueError: nothing was seen, or not for every row.
        """
        if not self.static or self._seen is None:
            return
        seen, self._seen = self._seen, None
        missing = [i for i in range(self.rows) if i not in seen]
        if missing:
            raise ValueError(
                f"no values seen for {self.describe_rows(missing)}: calibrate with calls that reach them"
            )
        grids = [self._found(torch.cat(seen[i])) for i in range(self.rows)]
        scale = torch.stack([grid.scale.flatten() for grid in grids])
        zero = torch.stack([grid.zero_point.flatten() for grid in grids])
        self._set(Grid(scale, zero, self.low, self.high))

    def describe_rows(self, rows: list[int]) -> str:
        """For messages."""
        return "this quantiser"

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        s = self.spec
        kind = "symmetric" if s.symmetric else "affine"
        return (
            "32 bits"
            if s.off
            else f"{s.bits} bits, {s.granularity}, {kind}, {'dynamic' if s.dynamic else 'static'}"
        )

    def _found(self, values: Tensor) -> Grid:
        """The grid of (n, channels) values."""
        return spec_grid(values, self.spec, channel_axis=-1)

    def _watch(self, x: Tensor) -> None:
        row = self.row(x)
        if isinstance(row, int):
            self._seen.setdefault(row, []).append(self._kept(x))
            return
        for one in row.unique().tolist():
            self._seen.setdefault(one, []).append(self._kept(x[row == one]))

    def _kept(self, x: Tensor) -> Tensor:
        """Of one call: its extremes, and for a search some of its vectors, as (n, channels)."""
        vectors = x.movedim(self.channel_axis, -1).reshape(-1, x.shape[self.channel_axis])
        ends = torch.stack([vectors.amin(0), vectors.amax(0)])
        if self.spec.scale_init == "minmax":
            return ends
        return torch.cat([ends, vectors[:: max(1, len(vectors) // KEPT)]])

    def _fit(self, values: Tensor, x: Tensor) -> Tensor:
        """(k,) or (b, k), shaped so that k lies along the channels of ``x`` and b along its samples."""
        shape = [1] * x.ndim
        shape[self.channel_axis] = values.shape[-1]
        if values.ndim == 2:
            shape[0] = len(values)
        return values.reshape(shape)

    def _set(self, grid: Grid) -> None:
        if not self.static:
            raise ValueError("a dynamic quantiser, or one of 32 bits, keeps no range")
        self.log_scale = nn.Parameter(grid.scale.detach().log())
        self.zero_point = grid.zero_point.detach().clone()


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
