import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.attention import Attention, get_attention, make_attention_layer
from minilib.attention.linear import ConvLinearAttention, FeatureLinearAttention, convolve_on_grid
from minilib.attention.registry import ATTENTION
from minilib.kernels.linear import linear_attention_flops
from minilib.profiling import count_flops, count_parameters


def heads_of(shape, count=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def weights_of(attend, q, k):
    """The n x m weights: what comes out for values that are the unit vectors, width by width."""
    m, d = k.shape[2], q.shape[3]
    eye = torch.eye(m, dtype=q.dtype).expand(*k.shape[:2], m, m)
    pieces = [attend(q, k, F.pad(p, (0, d - p.shape[-1]))) for p in eye.split(d, dim=-1)]
    return torch.cat(pieces, dim=-1)[..., :m]


@pytest.mark.parametrize("feature", ["relu", "elu"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 3, 12])
def test_the_kernel_trick_equals_the_explicit_product_at_few_and_many_heads(feature, normalise, heads):
    """(phi(Q) phi(K)^T) V = phi(Q) (phi(K)^T V): the n x n matrix is written out here, from Q and K themselves."""
    n, dim = 20, 24
    q, k, v = heads_of((2, heads, n, dim // heads))
    phi = {"relu": torch.relu, "elu": lambda x: F.elu(x) + 1}[feature]
    weights = phi(q) @ phi(k).mT
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + n * 1e-4)
    attend = get_attention("linear", feature=feature, normalise=normalise)
    torch.testing.assert_close(attend(q, k, v), weights @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_the_rank_of_a_heads_weights_is_at_most_its_width_and_that_of_softmax_is_full(heads):
    n, dim = 32, 12
    q, k, _ = heads_of((1, heads, n, dim // heads))
    linear = weights_of(get_attention("linear", feature="elu"), q, k)
    softmax = weights_of(get_attention("full"), q, k)
    assert (torch.linalg.matrix_rank(linear) == dim // heads).all()
    assert (torch.linalg.matrix_rank(softmax, rtol=1e-14) > dim // heads).all()


@pytest.mark.parametrize("name", ["linear", "linear_mlp"])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeating_all_tokens_changes_nothing_if_normalised_and_else_scales(name, repeats):
    q, k, v = heads_of((2, 2, 6, 4))
    many = [t.repeat(1, 1, repeats, 1) for t in (q, k, v)]
    for normalise, factor in ((True, 1.0), (False, float(repeats))):
        torch.manual_seed(0)
        options = {"num_heads": 2, "head_dim": 4} if name == "linear_mlp" else {}
        attend = get_attention(name, normalise=normalise, **options)
        if isinstance(attend, nn.Module):
            attend.double()
            nn.init.normal_(attend.query_features[-1].weight)
        out = attend(*many)
        expected = factor * attend(q, k, v).repeat(1, 1, repeats, 1)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_tokens_may_be_permuted():
    attend = get_attention("linear", feature="elu")
    q, k, v = heads_of((1, 2, 9, 4))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = attend(*(t[:, :, order] for t in (q, k, v)))
    torch.testing.assert_close(moved, attend(q, k, v)[:, :, order], rtol=1e-12, atol=1e-12)


def test_linear_conv_against_torchs_convolution_head_by_head():
    """As FLatten's code does it: heads in the batch, one filter a feature, padded by half a kernel."""
    rows, columns, d = 4, 5, 3
    torch.manual_seed(0)
    attend = ConvLinearAttention(2, d, grid=(rows, columns)).double()
    q, k, v = heads_of((2, 2, rows * columns, d))
    conv = nn.Conv2d(d, d, 5, padding=2, groups=d).double()
    conv.weight.data, conv.bias.data = attend.weight.data[0].unsqueeze(1), attend.bias.data[0]
    images = v.reshape(4, rows, columns, d).permute(0, 3, 1, 2)
    branch = conv(images).permute(0, 2, 3, 1).reshape(2, 2, rows * columns, d)
    expected = get_attention("linear")(q, k, v) + branch
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_the_convolution_gives_back_locality_and_rank():
    n, d = 25, 2
    q, k, _ = heads_of((1, 1, n, d))
    torch.manual_seed(0)
    attend = ConvLinearAttention(1, d, grid=(5, 5)).double()
    with torch.no_grad():
        attend.bias.zero_()
    plain = weights_of(get_attention("linear"), q, k)
    # Of one feature at a time, since the filters differ: values in feature 0 only.
    unit = torch.eye(n, dtype=torch.float64)
    columns = [attend(q, k, torch.stack([unit[j], 0 * unit[j]], -1)[None, None])[..., 0] for j in range(n)]
    full = torch.stack(columns, dim=-1).detach()
    assert torch.linalg.matrix_rank(plain[0, 0]) <= d < torch.linalg.matrix_rank(full[0, 0])


def test_the_filter_of_an_offset_reads_the_token_at_that_offset():
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 2] = 1.0  # one row up, one column right
    v = torch.arange(6.0).view(1, 1, 6, 1)
    out = convolve_on_grid(v, weight, torch.zeros(1, 1), (2, 3))
    assert out.flatten().tolist() == [0, 0, 0, 1, 2, 0]


def test_shared_and_own_filters():
    shared = ConvLinearAttention(4, 6, grid=(3, 3))
    own = ConvLinearAttention(4, 6, grid=(3, 3), share_heads=False)
    assert count_parameters(shared) == 6 * 26 and count_parameters(own) == 4 * 6 * 26
    with torch.no_grad():
        own.weight.copy_(shared.weight.expand_as(own.weight))
        own.bias.copy_(shared.bias.expand_as(own.bias))
    q, k, v = heads_of((1, 4, 9, 6), dtype=torch.float32)
    assert torch.equal(shared(q, k, v), own(q, k, v))


class OfficialLinFusion(nn.Module):
    """Huage001/LinFusion, src/linfusion/attention.py, written again from its formulas; f acts on what it is given."""

    def __init__(self, dim, heads):
        super().__init__()

        def network():
            layers = (nn.Linear(dim, dim), nn.LayerNorm(dim), nn.LeakyReLU(), nn.Linear(dim, dim))
            return nn.Sequential(*layers)

        self.heads, self.f_q, self.f_k = heads, network(), network()

    def forward(self, x, context, values):
        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k = split(x + self.f_q(x)), split(context + self.f_k(context))
        q, k, v = F.elu(q) + 1.0, F.elu(k) + 1.0, split(values)
        z = q @ k.mean(dim=-2, keepdim=True).mT + 1e-4
        n = k.shape[2]
        return q @ ((k.mT * n**-0.5) @ (v * n**-0.5)) / z


def test_linear_mlp_is_the_official_formula():
    torch.manual_seed(0)
    official = OfficialLinFusion(8, 2).double()
    attend = FeatureLinearAttention(2, 4).double()
    attend.query_features.load_state_dict(official.f_q.state_dict())
    attend.key_features.load_state_dict(official.f_k.state_dict())
    x, context, values = heads_of((3, 7, 8))
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (x, context, values))
    torch.testing.assert_close(attend(q, k, v), official(x, context, values), rtol=1e-12, atol=1e-12)


def test_linear_mlp_starts_as_linear_and_has_the_papers_number_of_parameters():
    attend = FeatureLinearAttention(2, 4)
    q, k, v = heads_of((2, 2, 5, 4), dtype=torch.float32)
    plain = get_attention("linear", feature="elu")(q, k, v)
    torch.testing.assert_close(attend(q, k, v).detach(), plain, rtol=1e-5, atol=1e-6)
    assert count_parameters(FeatureLinearAttention(8, 40)) == 2 * (2 * 320**2 + 4 * 320)


@pytest.mark.parametrize(
    "name, options", [("linear", {}), ("linear_conv", {"grid": (8, 8)}), ("linear_mlp", {})]
)
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_flops_of_a_whole_layer_grow_as_heads_shrink(name, options, heads):
    dim, n, b = 32, 64, 2
    layer = make_attention_layer(name, dim, heads, **options)
    projections = 2 * b * n * dim * 4 * dim
    core = ATTENTION[name].flops(b, heads, n, n, dim // heads, **options)
    assert count_flops(layer, torch.zeros(b, n, dim)).flops == projections + core
    linear = linear_attention_flops(b, heads, n, n, dim // heads, dim // heads)
    assert linear == 2 * b * n * (2 * dim**2 // heads + dim)


def test_the_break_even_with_softmax_is_at_n_equal_to_the_head_width():
    """LiT: 2 n^2 D multiply-adds of softmax against 2 n D^2 / h (and n D of the normaliser): equal at n = d + 1/2."""
    d = 72
    for n, cheaper in ((d, False), (d + 1, True)):
        softmax = ATTENTION["full"].flops(1, 16, n, n, d)
        assert (linear_attention_flops(1, 16, n, n, d, d) < softmax) == cheaper
    doubled = linear_attention_flops(1, 16, 8192, 8192, d, d) / linear_attention_flops(
        1, 16, 4096, 4096, d, d
    )
    assert math.log2(doubled) == 1.0


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: get_attention("linear", feature="gelu"), "feature='gelu'"),
        (lambda: get_attention("linear", eps=-1.0), "eps=-1.0"),
        (lambda: ConvLinearAttention(2, 4, grid=(3, 3), kernel_size=4), "kernel_size=4"),
        (lambda: get_attention("linear_conv", num_heads=2, head_dim=4, grid=(2, 2, 2)), "3 axes"),
        (lambda: FeatureLinearAttention(0, 4), "heads"),
        (lambda: ConvLinearAttention(2, 4, grid=(3, 3))(*heads_of((1, 2, 8, 4))), r"\(b, 2, 9, 4\)"),
        (lambda: FeatureLinearAttention(2, 4)(*heads_of((1, 4, 8, 2))), "2 heads of width 4"),
        (lambda: get_attention("linear")(*heads_of((1, 1, 0, 4))), "no keys"),
        (
            lambda: get_attention("linear")(*heads_of((1, 1, 3, 4)), mask=torch.ones(3, 3, dtype=torch.bool)),
            "takes no mask",
        ),
    ],
)
def test_errors_name_what_is_wrong(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    "name, options", [("linear", {}), ("linear_conv", {"grid": (3, 3)}), ("linear_mlp", {})]
)
def test_a_layer_learns_with_it(name, options):
    torch.manual_seed(0)
    layer = make_attention_layer(name, 16, 2, **options)
    assert isinstance(layer, Attention)
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
