"""Linear layers and convolutions whose weights and inputs are rounded, in floating point."""

from collections.abc import Hashable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .quantizers import OFF, Quantizer, QuantSpec
from .timewise import Clock, TimewiseQuantizer


@runtime_checkable
class Transform(Protocol):
    """What is done to a layer's input and weight before they are rounded, such that their product stays the same.

    Balancing divides the channels of the input by s and multiplies the weight's columns by s; a rotation R turns both. For a
    linear layer (W R^T)(R x) = W x.
    """

    def activation(self, x: Float[Tensor, "..."], t: Tensor | None) -> Float[Tensor, "..."]:
        """The input, transformed; ``t`` is the time (b,) or (1,) on the clock, None if there is none."""
        ...

    def weight(self, w: Float[Tensor, "..."], t: Tensor | None) -> Float[Tensor, "..."]:
        """The weight, transformed to match."""
        ...

    def key(self, t: Tensor | None) -> Hashable:
        """A name for the weight made at ``t``: the same key, the same weight. A rounded weight is kept for each key."""
        ...


class _Quantized:
    """What both kinds of layer share: a quantiser of the weight, one of the input, an optional transform."""

    weight: nn.Parameter
    input_axis: int

    def _prepare(
        self,
        weight_spec: QuantSpec,
        activation_spec: QuantSpec,
        clock: Clock | None,
        transform: Transform | None,
    ) -> None:
        if weight_spec.granularity == "token":
            raise ValueError(
                "a weight has no tokens: its granularity is 'tensor' or 'channel' (an output each)"
            )
        if transform is not None and not (weight_spec.off or weight_spec.dynamic):
            raise ValueError(
                "a transform changes the weight's range: give the weight a spec with dynamic=True, whose range is found "
                "in the transformed weight"
            )
        self.transform, self.clock = transform, clock
        self.weight_quantizer = Quantizer(weight_spec, channel_axis=0)
        timewise = clock is not None and clock.timesteps is not None
        if timewise and not (activation_spec.dynamic or activation_spec.off):
            self.activation_quantizer = TimewiseQuantizer(
                activation_spec, clock, channel_axis=self.input_axis
            )
        else:
            self.activation_quantizer = Quantizer(activation_spec, channel_axis=self.input_axis)
        self._rounded: dict[Hashable, tuple[tuple[int, ...], Tensor]] = {}

    @property
    def time(self) -> Tensor | None:
        """The time on the layer's clock."""
        return None if self.clock is None else self.clock.t

    def rounded_weight(self) -> Tensor:
        """The weight as it is used: transformed and rounded. Without gradients it is computed once."""
        if self.weight_quantizer.spec.off and self.transform is None:
            return self.weight
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._weight_parameters()):
            return self._round_weight()
        key = None if self.transform is None else self.transform.key(self.time)
        state = tuple(n for p in self._weight_parameters() for n in (p._version, p.data_ptr()))
        if key not in self._rounded or self._rounded[key][0] != state:
            with torch.no_grad():
                self._rounded[key] = (state, self._round_weight())
        return self._rounded[key][1]

    def forget_weights(self) -> None:
        """Round the weight anew at the next call: after a change of the transform."""
        self._rounded.clear()

    def prepared_input(self, x: Tensor) -> Tensor:
        """The input as it is used: transformed and rounded."""
        if self.transform is not None:
            x = self.transform.activation(x, self.time)
        return self.activation_quantizer(x)

    def _round_weight(self) -> Tensor:
        w = self.weight if self.transform is None else self.transform.weight(self.weight, self.time)
        return self.weight_quantizer(w)

    def _weight_parameters(self) -> list[nn.Parameter]:
        scale = self.weight_quantizer.log_scale
        return [self.weight] if scale is None else [self.weight, scale]

    def _adopt(self, layer: nn.Module) -> None:
        """Copies of the weight and bias of ``layer``; a static weight quantiser gets its range from them."""
        for name, parameter in layer.named_parameters(recurse=False):
            copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(self, name, copied)
        if self.weight_quantizer.static:
            self.weight_quantizer.set_grid(self.weight)
            self.weight_quantizer.to(self.weight.device)
        self.train(layer.training)


class QuantLinear(_Quantized, nn.Linear):
    """A linear layer with a rounded weight and a rounded input; with 32 bits for both it is the plain layer, to the bit.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        weight_spec: of the weight; "channel" is an output.
        activation_spec: of the input; "channel" is a feature, "token" a vector of features.
        clock: with a table of times: a static input range for each of them.
        transform: applied to input and weight before both are rounded.

    Raises:
        ValueError: a weight with tokens; a transform with a static weight range.

    >>> layer = QuantLinear.from_linear(nn.Linear(8, 4), QuantSpec(4, "channel"), QuantSpec(8, "token", dynamic=True))
    >>> layer(torch.randn(2, 3, 8)).shape, layer.rounded_weight().unique(dim=1).shape[0]
    (torch.Size([2, 3, 4]), 4)
    """

    input_axis = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_spec: QuantSpec = OFF,
        activation_spec: QuantSpec = OFF,
        clock: Clock | None = None,
        transform: Transform | None = None,
        **options: object,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, **options)
        self._prepare(weight_spec, activation_spec, clock, transform)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight_spec: QuantSpec = OFF,
        activation_spec: QuantSpec = OFF,
        *,
        clock: Clock | None = None,
        transform: Transform | None = None,
    ) -> "QuantLinear":
        """A quantised layer with a copy of the weights of ``linear``."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            weight_spec=weight_spec,
            activation_spec=activation_spec,
            clock=clock,
            transform=transform,
            device="meta",
        )
        layer._adopt(linear)
        return layer

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Act on each token by itself.

        Raises:
            ValueError: a static input quantiser that has not been calibrated.
        """
        x = self.prepared_input(x)
        return F.linear(x, self.rounded_weight(), self.bias)


class QuantConv2d(_Quantized, nn.Conv2d):
    """A convolution with a rounded weight and a rounded input; with 32 bits for both it is the plain layer, to the bit.

    Args:
        args, options: as ``nn.Conv2d``.
        weight_spec: of the weight; "channel" is an output channel.
        activation_spec: of the input; "channel" is a channel, "token" a pixel.
        clock, transform: as ``QuantLinear``.

    Raises:
        ValueError: as ``QuantLinear``.
    """

    input_axis = 1

    def __init__(
        self,
        *args: object,
        weight_spec: QuantSpec = OFF,
        activation_spec: QuantSpec = OFF,
        clock: Clock | None = None,
        transform: Transform | None = None,
        **options: object,
    ) -> None:
        nn.Conv2d.__init__(self, *args, **options)
        self._prepare(weight_spec, activation_spec, clock, transform)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        weight_spec: QuantSpec = OFF,
        activation_spec: QuantSpec = OFF,
        *,
        clock: Clock | None = None,
        transform: Transform | None = None,
    ) -> "QuantConv2d":
        """A quantised layer with a copy of the weights of ``conv``."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            weight_spec=weight_spec,
            activation_spec=activation_spec,
            clock=clock,
            transform=transform,
            device="meta",
        )
        layer._adopt(conv)
        return layer

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h_out w_out"]:
        """Convolve; the padding's zeros are points of every grid.

        Raises:
            ValueError: a static input quantiser that has not been calibrated.
        """
        return self._conv_forward(self.prepared_input(x), self.rounded_weight(), self.bias)


def quantize_layer(
    layer: nn.Module,
    weight_spec: QuantSpec = OFF,
    activation_spec: QuantSpec = OFF,
    *,
    clock: Clock | None = None,
    transform: Transform | None = None,
) -> QuantLinear | QuantConv2d:
    """The quantised copy of a linear layer or convolution.

    Raises:
        ValueError: another kind of layer, or one that is quantised already.
    """
    if isinstance(layer, _Quantized):
        raise ValueError(f"{type(layer).__name__} is quantised already: quantise the layer it was made from")
    if isinstance(layer, nn.Linear):
        return QuantLinear.from_linear(layer, weight_spec, activation_spec, clock=clock, transform=transform)
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d.from_conv(layer, weight_spec, activation_spec, clock=clock, transform=transform)
    raise ValueError(f"a {type(layer).__name__} given: linear layers and 2-D convolutions can be quantised")
