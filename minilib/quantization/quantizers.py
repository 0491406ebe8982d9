"""What is rounded how, and the module that does it: uniform quantisers with a straight-through gradient and a learnable scale.

A grid has the points ``scale * (q - zero_point)``, q a whole number in low..high (``minilib.kernels.quant.Grid``); zero is always
one of them. A *dynamic* quantiser finds the grid in the values it is given, at every call. A *static* one finds it once, in the
values of some calibration calls, and may then learn it: the gradient of its scale is that of learned step size quantisation
(Esser et al. 2020, arXiv 1902.08153, eq. 3), and the scale is stored as its logarithm, so that it stays positive.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilib.kernels.quant import Grid

from .grids import OFF, QuantSpec, grid_of_range, round_to_grid, spec_grid

__all__ = ["OFF", "QuantSpec", "Quantizer", "grid_of_range", "round_to_grid", "spec_grid"]

#: Vectors of a call that such a search keeps of an activation.
KEPT = 64


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
