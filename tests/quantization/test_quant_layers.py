import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.kernels.quant import IntegerLinear
from minilib.quantization import OFF, QuantConv2d, QuantLinear, QuantSpec, quantize_layer

TOKEN8 = QuantSpec(8, "token", symmetric=True, dynamic=True)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias=bias)


def conv(**options):
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3, **({"padding": 1} | options))


class Halve:
    """A balance by hand: the input halved, the weight doubled; at late times the other way round."""

    def factor(self, t):
        return 0.5 if t is None or float(t[0]) > 500 else 2.0

    def activation(self, x, t):
        return x * self.factor(t)

    def weight(self, w, t):
        return w / self.factor(t)

    def key(self, t):
        return self.factor(t)


LAYERS = {
    "linear": (linear(), draw(3, 7, 6)),
    "no bias": (linear(bias=False), draw(3, 6)),
    "conv": (conv(), draw(2, 4, 5, 5)),
    "strided": (conv(stride=2, padding="valid"), draw(2, 4, 5, 5)),
    "grouped": (conv(groups=2, dilation=2, bias=False), draw(2, 4, 7, 7)),
    "circular": (conv(padding_mode="circular"), draw(2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
class TestBoth:
    def test_thirty_two_bits_change_no_bit(self, name):
        layer, x = LAYERS[name]
        quantized = quantize_layer(layer)
        assert torch.equal(quantized(x), layer(x))
        with torch.no_grad():
            assert torch.equal(quantized(x), layer(x))

    def test_it_is_the_plain_layer_on_rounded_numbers(self, name):
        layer, x = LAYERS[name]
        weights, inputs = QuantSpec(3, "channel"), QuantSpec(4, "token", dynamic=True)
        quantized = quantize_layer(layer, weights, inputs)
        rounded = torch.stack(
            [torch.stack([w]).flatten() for w in map(_by_hand_3, layer.weight.detach())]
        ).view_as(layer.weight)
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        tokens = x.movedim(axis, -1)
        tokens = torch.stack([_by_hand_4(row) for row in tokens.reshape(-1, tokens.shape[-1])]).view_as(
            tokens
        )
        plain = quantize_layer(layer)
        with torch.no_grad():
            plain.weight.copy_(rounded)
        assert (quantized(x) - plain(tokens.movedim(-1, axis))).abs().max() < 1e-5

    def test_it_owns_its_weights(self, name):
        layer, x = LAYERS[name]
        before = layer.weight.clone()
        quantized = quantize_layer(layer, QuantSpec(4, "channel"), OFF)
        out = quantized(x)
        out.square().sum().backward()
        assert quantized.weight.grad.abs().sum() > 0 and layer.weight.grad is None
        with torch.no_grad():
            quantized.weight.zero_()
        assert torch.equal(layer.weight, before)

    def test_a_transform_that_cancels_changes_nothing_in_full_precision(self, name):
        layer, x = LAYERS[name]
        assert (quantize_layer(layer, transform=Halve())(x) - layer(x)).abs().max() < 1e-6

    def test_a_wrong_grid_is_seen(self, name):
        layer, x = LAYERS[name]
        coarse, fine = (quantize_layer(layer, QuantSpec(b, "channel"), OFF)(x) - layer(x) for b in (3, 8))
        assert coarse.abs().mean() > 10 * fine.abs().mean()


def _by_hand(x, bits):
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / (2**bits - 1)
    points = (torch.arange(2**bits) - round(-low / step)) * step
    return points[(x.flatten()[:, None] - points).abs().argmin(1)].view_as(x)


def _by_hand_3(x):
    return _by_hand(x, 3)


def _by_hand_4(x):
    return _by_hand(x, 4)


class TestWeights:
    def test_the_rounded_weight_is_kept_until_the_weight_changes(self):
        layer = quantize_layer(linear(), QuantSpec(4, "channel"), OFF)
        with torch.no_grad():
            first = layer.rounded_weight()
            assert layer.rounded_weight() is first
            layer.weight.mul_(2)
            second = layer.rounded_weight()
            assert not torch.equal(first, second)
            layer.weight_quantizer.log_scale.add_(0.1)
            assert not torch.equal(second, layer.rounded_weight())

    def test_the_kept_weight_is_the_one_with_gradients(self):
        layer = quantize_layer(linear(), QuantSpec(4, "channel"), OFF)
        with_gradient = layer.rounded_weight()
        assert with_gradient.requires_grad
        with torch.no_grad():
            assert torch.equal(layer.rounded_weight(), with_gradient)

    def test_one_weight_is_kept_for_each_key_of_a_transform(self):
        from minilib.quantization import Clock

        clock = Clock()
        layer = quantize_layer(
            linear(), QuantSpec(4, "channel", dynamic=True), OFF, clock=clock, transform=Halve()
        )
        with torch.no_grad():
            kept = {}
            for t in (900.0, 100.0, 900.0, 100.0):
                clock.set(t)
                weight = layer.rounded_weight()
                assert kept.setdefault(t, weight) is weight
            assert (kept[900.0] / 4 - kept[100.0]).abs().max() < 1e-6
            layer.forget_weights()
            assert layer.rounded_weight() is not kept[100.0]

    def test_a_static_range_under_a_transform_is_refused(self):
        with pytest.raises(ValueError, match="dynamic=True"):
            quantize_layer(linear(), QuantSpec(4, "channel"), OFF, transform=Halve())

    def test_a_weight_has_no_tokens(self):
        with pytest.raises(ValueError, match="no tokens"):
            quantize_layer(linear(), TOKEN8, OFF)

    def test_other_layers_and_quantised_ones_are_refused(self):
        with pytest.raises(ValueError, match="LayerNorm given"):
            quantize_layer(nn.LayerNorm(3))
        with pytest.raises(ValueError, match="quantised already"):
            quantize_layer(quantize_layer(linear()))


def test_eight_bits_by_channel_and_token_are_what_integers_compute():
    layer, x = linear(), draw(4, 3, 6)
    ours = quantize_layer(layer, QuantSpec(8, "channel", symmetric=True), TOKEN8)
    with torch.no_grad():
        assert (ours(x) - IntegerLinear.from_linear(layer)(x)).abs().max() < 1e-5


def test_the_padding_is_a_point_of_the_grid():
    layer = quantize_layer(conv(), OFF, QuantSpec(4))
    layer.activation_quantizer.set_range(torch.tensor([[-0.7]]), torch.tensor([[1.9]]))
    x = draw(1, 4, 5, 5)
    padded = F.pad(layer.prepared_input(x), (1, 1, 1, 1))
    assert torch.equal(layer.activation_quantizer(padded), padded)


def test_kinds_and_modes_are_kept():
    layer = linear().eval()
    layer.weight.requires_grad_(False)
    quantized = quantize_layer(layer, QuantSpec(4, "channel"), TOKEN8)
    assert isinstance(quantized, QuantLinear) and isinstance(quantized, nn.Linear)
    assert not quantized.training and not quantized.weight.requires_grad and quantized.bias.requires_grad
    assert isinstance(quantize_layer(conv()), QuantConv2d)
