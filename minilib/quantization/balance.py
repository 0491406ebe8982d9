"""Channel balance: move the size of large activation channels into the weights, where rounding is finer.

A linear layer computes x W^T. For any positive factors s, one an input channel,

    x W^T = (x / s) (W diag(s))^T,

so the layer's output stays what it was, and the two factors that have to be rounded are shaped differently. With
``s_c = max |x_c|^alpha / max_o |W_oc|^(1 - alpha)`` (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, equation 4; used so by
ViDiT-Q, arXiv 2406.02540, and in thu-nics/ViDiT-Q ``qdiff/models/quant_layer.py``) alpha = 1 makes all channels of the
activation equally large, alpha = 0 all columns of the weight.

The division by s is free where the layer's input comes from an adaptive layer norm: see ``folding``.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn


class TimeRanges:
    """Cuts the times 0..1000 at ``edges``: range i holds the times from edge i - 1 up to, and not including, edge i.

    >>> ranges = TimeRanges((500,))
    >>> len(ranges), ranges.index(499.9), ranges.index(500.0)
    (2, 0, 1)
    """

    def __init__(self, edges: Sequence[float] = ()) -> None:
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError(f"edges {tuple(edges)} given: they have to rise")
        self.edges = tuple(float(edge) for edge in edges)

    def __len__(self) -> int:
        """How many ranges there are: one more than edges."""
        return len(self.edges) + 1

    def index(self, t: float) -> int:
        """The range of a time."""
        return bisect_right(self.edges, t)

    def indices(self, t: Num[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The range of each time."""
        edges = torch.tensor(self.edges, dtype=torch.float64, device=t.device)
        return torch.bucketize(t.double(), edges, right=True)


class ChannelMaxima:
    """The largest |value| of each channel seen so far, one row a time range.

    Args:
        channels: width of the tokens.
        ranges: rows.
        momentum: None keeps the maximum. A number m keeps ``m old + (1 - m) new`` of the batches' maxima, as the released
        code of
            ViDiT-Q does with 0.95; that is an average, and less than the largest value.

    >>> seen = ChannelMaxima(2)
    >>> seen.update(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
    >>> seen.values
    tensor([[2., 3.]])
    """

    def __init__(self, channels: int, ranges: int = 1, *, momentum: float | None = None) -> None:
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} given: from 0 to below 1, or None for the maximum")
        self.values = torch.zeros(ranges, channels)
        self.seen = [False] * ranges
        self.momentum = momentum

    @torch.no_grad()
    def update(self, x: Float[Tensor, "... c"], index: int = 0) -> None:
        """Take the tokens ``x`` of range ``index`` into account; none of them changes nothing.

        Raises:
            ValueError: tokens of another width.
        """
        if x.shape[-1] != self.values.shape[1]:
            raise ValueError(f"tokens of width {x.shape[-1]} given, {self.values.shape[1]} are watched")
        if x.numel() == 0:
            return
        new = x.detach().abs().flatten(0, -2).amax(0).to(self.values)
        old = self.values[index]
        if self.momentum is None:
            self.values[index] = torch.maximum(old, new)
        else:
            self.values[index] = (
                old.lerp(new, 1 - self.momentum) if self.seen[index] else new
            )  # as the released code: the first batch sets it
        self.seen[index] = True


@contextmanager
def watch_channels(
    model: nn.Module,
    names: Sequence[str],
    *,
    ranges: TimeRanges | None = None,
    momentum: float | None = None,
) -> Iterator[dict[str, ChannelMaxima]]:
    """Collect ``ChannelMaxima`` of the inputs of linear layers while the model is used inside a ``with`` block.

    Args:
        model: a denoiser; with more than one range it is called as ``model(x, t, ...)``, t of shape (b,) on the scale 0..1000.
        names: of the linear layers, as in ``model.named_modules()``.
        ranges: of time; one range if left out.
        momentum: see ``ChannelMaxima``.

    Raises:
        ValueError: a name that is no linear layer of the model.
    """
    ranges = TimeRanges() if ranges is None else ranges
    layers = {name: linear_layer(model, name) for name in names}
    maxima = {
        name: ChannelMaxima(layer.in_features, len(ranges), momentum=momentum)
        for name, layer in layers.items()
    }
    now: list[Tensor] = []

    def note_time(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now[:] = [ranges.indices(kwargs["t"] if "t" in kwargs else args[1])]

    def hook(name: str) -> Any:
        def note_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            (x,) = args
            if len(ranges) == 1:
                maxima[name].update(x)
                return
            for index in now[0].unique().tolist():
                maxima[name].update(x[now[0] == index], index)

        return note_input

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    if len(ranges) > 1:
        handles.append(model.register_forward_pre_hook(note_time, with_kwargs=True))
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def balance_scale(
    activation_max: Float[Tensor, " c"], weight: Float[Tensor, "o c_in"], alpha: float = 0.5
) -> Float[Tensor, " c_in"]:
    """s_c = max |x_c|^alpha / max_o |W_oc|^(1 - alpha); 1 for a channel that is zero on either side.

    Raises:
        ValueError: alpha outside 0..1, or widths that differ.

    >>> balance_scale(torch.tensor([4.0, 1.0]), torch.tensor([[1.0, 1.0]]))
    tensor([2., 1.])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} given: from 0 (level the weights) to 1 (level the activations)")
    if activation_max.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"maxima of {activation_max.shape[-1]} channels given, the weight reads {weight.shape[1]}"
        )
    columns = weight.detach().abs().amax(0)
    scale = activation_max.to(weight) ** alpha / columns ** (1 - alpha)
    alive = (activation_max.to(weight) > 0) & (columns > 0)
    return torch.where(alive, scale, torch.ones_like(scale))


class ChannelBalance(nn.Module):
    """The transform of a quantised layer: input over s, weight times s; the product is what it was.

    Args:
        scale: s, or one row of it for each range of time.
        ranges: of time, as many as rows. Each has a rounded weight of its own, and all of them have to be kept.

    Raises:
        ValueError: factors that are not positive and finite, or another number of rows than of ranges.

    >>> balance = ChannelBalance(torch.tensor([2.0, 4.0]))
    >>> balance.activation(torch.tensor([[2.0, 4.0]])), balance.weight(torch.tensor([[1.0, 1.0]]))
    (tensor([[1., 1.]]), tensor([[2., 4.]]))
    """

    def __init__(
        self, scale: Float[Tensor, " c"] | Float[Tensor, "r c"], ranges: TimeRanges | None = None
    ) -> None:
        super().__init__()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError("the factors of a balance have to be positive and finite")
        self.ranges = TimeRanges() if ranges is None else ranges
        rows = scale.detach().clone().reshape(-1, scale.shape[-1])
        if len(rows) != len(self.ranges):
            raise ValueError(f"{len(rows)} rows of factors given for {len(self.ranges)} ranges of time")
        self.register_buffer("scale", rows)

    def key(self, t: Num[Tensor, " b"] | None = None) -> int:
        """The range of time that all of ``t`` lies in.

        Raises:
            ValueError: several ranges and no time, or times of several ranges in one call.
        """
        if len(self.ranges) == 1:
            return 0
        if t is None:
            raise ValueError(
                "a balance with several ranges of time needs to know the time: quantise the model that is given t"
            )
        low, high = (self.ranges.index(float(end)) for end in (t.min(), t.max()))
        if low != high:
            raise ValueError(
                f"times from {float(t.min()):g} to {float(t.max()):g} lie in several ranges: call once for each"
            )
        return low

    def activation(
        self, x: Float[Tensor, "... c"], t: Num[Tensor, " b"] | None = None
    ) -> Float[Tensor, "... c"]:
        """The input that is rounded."""
        return x / self.scale[self.key(t)]

    def weight(self, w: Float[Tensor, "o c"], t: Num[Tensor, " b"] | None = None) -> Float[Tensor, "o c"]:
        """The weight that is rounded."""
        return w * self.scale[self.key(t)]

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        rows, channels = self.scale.shape
        return f"{channels} channels, {rows} range(s) of time, factors {self.scale.min():.3g} to {self.scale.max():.3g}"


def channel_balance(
    model: nn.Module,
    maxima: Mapping[str, ChannelMaxima],
    *,
    alpha: float = 0.5,
    ranges: TimeRanges | None = None,
) -> dict[str, ChannelBalance]:
    """A balance for each watched layer.

    Args:
        model: which owns the layers.
        maxima: from ``watch_channels`` with the same ``ranges``.
        alpha: see ``balance_scale``.
        ranges: of time; one if left out.

    Raises:
        ValueError: a layer without any activation in one of the ranges.
    """
    balances = {}
    for name, seen in maxima.items():
        unseen = [i for i, done in enumerate(seen.seen) if not done]
        if unseen:
            raise ValueError(
                f"layer {name!r} saw no activation in time range {unseen}: calibrate on such times too"
            )
        weight = linear_layer(model, name).weight
        rows = [balance_scale(row, weight, alpha) for row in seen.values]
        balances[name] = ChannelBalance(torch.stack(rows), ranges)
    return balances


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name.

    Raises:
        ValueError: there is none.
    """
    modules = dict(model.named_modules())
    if not isinstance(modules.get(name), nn.Linear):
        raise ValueError(
            f"{name!r} is no linear layer of this model; it has {[n for n, m in modules.items() if isinstance(m, nn.Linear)]}"
        )
    return modules[name]
