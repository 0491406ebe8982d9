"""Local attention as a variant; that it is right, pair by pair, is tests/kernels/ref/test_local.py's business."""

import math

import pytest
import torch
from torch import nn

from minilib.attention import Attention, JointAttention, attention_processor, get_attention, joint_mask
from minilib.attention.local import local_flops, local_sees


def test_work_is_linear_in_tokens_and_quadratic_for_full_attention():
    def flops(side):
        return local_flops(1, 1, side * side, side * side, 64, grid=(side, side), radius=8.0)

    # The last tile of an axis may be partly outside.
    assert flops(128) == pytest.approx(4 * flops(64), rel=0.03)
    assert flops(512) == pytest.approx(64 * flops(64), rel=0.03)
    full = 4 * 512**4 * 64
    # CLEAR's 99.5 % at 8192 pixels, though windows are squares and overlap.
    assert flops(512) / full < 0.005


def test_every_query_sees_as_many_keys_as_the_disk_has_inside_the_grid():
    sees = local_sees(101, 102, grid=(10, 10), radius=3.0)
    assert torch.equal(sees[:100, :100], sees[:100, :100].t())
    assert sees[:, 100:].all() and sees[100:].all()
    assert sees[55, :100].sum() == 25  # d^2 < 9
    assert sees[0, :100].sum() == 9  # a corner


def test_the_reach_grows_by_the_radius_with_each_layer():
    torch.manual_seed(0)
    grid, radius = (1, 25), 3.0
    options = {"grid": grid, "radius": radius}
    layers = nn.Sequential(
        *(Attention(4, 1, variant="local", variant_options=options) for _ in range(3))
    ).double()
    x = torch.randn(1, 25, 4, dtype=torch.float64, requires_grad=True)
    for depth in (1, 2, 3):
        (g,) = torch.autograd.grad(layers[:depth](x)[0, 12].sum(), x)
        reached = g[0].abs().sum(1).nonzero().flatten()
        assert reached.min() == 12 - 2 * depth and reached.max() == 12 + 2 * depth


def test_in_the_place_of_full_attention_in_a_joint_layer_with_padded_text():
    torch.manual_seed(0)
    layer = JointAttention(8, 2).double()
    x, text = torch.randn(2, 12, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = joint_mask(12, torch.arange(5) < torch.tensor([[3], [5]]))
    wide = get_attention("local", grid=(3, 4), radius=10.0)
    narrow = get_attention("local", grid=(3, 4), radius=1.5)
    expected = layer(x, text, mask=mask)
    with attention_processor(layer, lambda name, attention: wide):
        for a, b in zip(layer(x, text, mask=mask), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    with attention_processor(layer, lambda name, attention: narrow):
        image, context = layer(x, text, mask=mask)
        # The text still sees everything; the image does not.
        torch.testing.assert_close(context, expected[1], atol=1e-12, rtol=0)
        assert (image - expected[0]).abs().max() > 1e-3
        other = text.clone()
        other[0, 3:] = 100.0  # padding
        torch.testing.assert_close(layer(x, other, mask=mask)[0], image, atol=1e-12, rtol=0)


def test_a_mask_of_pairs_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="takes a mask of keys"):
        get_attention("local", grid=(2, 2), radius=2.0)(q, q, q, mask=torch.eye(4) > 0)


@pytest.mark.parametrize("options", [{"grid": (2, -1), "radius": 1.0}, {"grid": (2, 2), "radius": math.nan}])
def test_options_are_refused_when_it_is_built(options):
    with pytest.raises(ValueError, match="local attention: (grid|radius) must be"):
        get_attention("local", **options)
