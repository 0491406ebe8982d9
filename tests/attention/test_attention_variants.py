import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilib.attention import (
    ATTENTION,
    Attention,
    Case,
    attention_variants,
    attention_weights,
    get_attention,
    make_attention_layer,
    register_attention,
)
from minilib.attention import registry as registry_module
from minilib.attention.functional import softmax_flops

SOFTMAX = sorted(name for name, variant in attention_variants().items() if variant.softmax)


def qkv(b=2, h=3, n=5, m=7, d=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, h, length, d, generator=g, dtype=dtype) for length in (n, m, m))


def by_the_equation(q, k, v, mask=None):
    """Query by query, in plain loops."""
    out = torch.empty_like(q)
    b, h, n, d = q.shape
    for index in [(i, j, s) for i in range(b) for j in range(h) for s in range(n)]:
        i, j, s = index
        logits = [(q[i, j, s] * k[i, j, r]).sum() / math.sqrt(d) for r in range(k.shape[2])]
        if mask is not None:
            logits = [x if mask[s, r] else x - math.inf for r, x in enumerate(logits)]
        weights = torch.exp(torch.stack(logits))
        out[index] = (weights[:, None] / weights.sum() * v[i, j]).sum(0)
    return out


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variant_keeps_shape_and_dtype_and_is_differentiable(name, dtype):
    q, k, v = (x.requires_grad_() for x in qkv(m=5, dtype=dtype))
    out = get_attention(name)(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in (q, k, v))


@pytest.mark.parametrize("name", SOFTMAX)
class TestSoftmaxVariants:
    def test_equals_the_equation(self, name):
        q, k, v = qkv()
        torch.testing.assert_close(get_attention(name)(q, k, v), by_the_equation(q, k, v), atol=1e-12, rtol=0)

    def test_boolean_mask_is_true_where_a_query_may_look(self, name):
        q, k, v = qkv()
        mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[:, 0] = True
        expected = by_the_equation(q, k, v, mask)
        torch.testing.assert_close(get_attention(name)(q, k, v, mask=mask), expected, atol=1e-12, rtol=0)
        added = torch.zeros(5, 7, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(get_attention(name)(q, k, v, mask=added), expected, atol=1e-12, rtol=0)

    def test_gradients(self, name):
        q, k, v = (x.requires_grad_() for x in qkv(b=1, h=1, n=2, m=3, d=2))
        assert torch.autograd.gradcheck(get_attention(name), (q, k, v))

    def test_limits(self, name):
        q, k, v = qkv()
        mean = v.mean(2, keepdim=True).expand_as(q)
        torch.testing.assert_close(get_attention(name)(q * 0, k, v), mean, atol=1e-12, rtol=0)
        sharp = get_attention(name)(q * 1e6, k, v)
        nearest = (q @ k.transpose(-1, -2)).argmax(-1)
        picked = v.gather(2, nearest[..., None].expand(-1, -1, -1, v.shape[-1]))
        torch.testing.assert_close(sharp, picked, atol=1e-12, rtol=0)


def test_weights_sum_to_one_and_give_the_output():
    q, k, v = qkv()
    weights = attention_weights(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(weights @ v, get_attention("full")(q, k, v), atol=1e-12, rtol=0)


class SdpaDtypes(TorchDispatchMode):
    """The dtypes in which a scaled-dot-product kernel is called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_half_precision_on_a_cpu_is_computed_in_float32():
    q, k, v = (x.bfloat16() for x in qkv())
    mask = torch.randn(5, 7).bfloat16()
    for enabled in (False, True):
        with SdpaDtypes() as dtypes, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = get_attention("full")(q, k, v, mask=mask)
        assert dtypes.seen == {torch.float32}
        assert out.dtype == torch.bfloat16
        expected = get_attention("full")(q.float(), k.float(), v.float(), mask=mask.float()).bfloat16()
        assert torch.equal(out, expected)


def test_autocast_keeps_float32_and_float64_attention():
    for dtype in (torch.float32, torch.float64):
        q, k, v = (x.to(dtype) for x in qkv())
        with torch.autocast("cpu", torch.bfloat16):
            out = get_attention("full")(q, k, v)
        assert torch.equal(out, get_attention("full")(q, k, v))


def test_adding_a_variant_takes_one_decorator(monkeypatch):
    monkeypatch.setattr(registry_module, "ATTENTION", dict(ATTENTION))

    def slow(q, k, v, *, mask=None, scale=1.0):
        return scale * v.mean(2, keepdim=True).expand_as(q)

    added = register_attention("mean", reference=slow, flops=softmax_flops, cases=(Case({}, n=2),))

    @added
    def mean(q, k, v, *, mask=None, scale=1.0):
        return scale * v.mean(2, keepdim=True).expand_as(q)

    q, k, v = qkv()
    assert torch.equal(get_attention("mean", scale=2.0)(q, k, v), 2 * v.mean(2, keepdim=True).expand_as(q))
    layer = Attention(8, 2, variant="mean", variant_options={"scale": 0.0})
    assert torch.equal(layer(torch.randn(1, 3, 8)), layer.proj.bias.expand(1, 3, 8))
    with pytest.raises(ValueError, match="registered already"):
        added(mean)


def test_unknown_variant_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown attention 'fulll'.*'full'.*'naive'"):
        get_attention("fulll")


class TestModule:
    def test_equals_torch_multihead_attention(self):
        torch.manual_seed(0)
        ours = Attention(12, 3).double()
        theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
        theirs.load_state_dict(
            {
                "in_proj_weight": ours.qkv.weight,
                "in_proj_bias": ours.qkv.bias,
                "out_proj.weight": ours.proj.weight,
                "out_proj.bias": ours.proj.bias,
            }
        )
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-12, rtol=0)
        mask = torch.rand(5, 5) > 0.3
        mask |= torch.eye(5, dtype=torch.bool)
        torch.testing.assert_close(
            ours(x, mask=mask), theirs(x, x, x, attn_mask=~mask)[0], atol=1e-12, rtol=0
        )

    def test_permutation_of_the_tokens_permutes_the_output(self):
        layer, x, order = (
            Attention(8, 2).double(),
            torch.randn(2, 6, 8, dtype=torch.float64),
            torch.randperm(6),
        )
        torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-12, rtol=0)

    def test_qk_norm_makes_the_logits_independent_of_the_scale_of_q_and_k(self):
        layer, x = Attention(8, 2, qk_norm=True).double(), torch.randn(2, 6, 8, dtype=torch.float64)
        before = layer(x)
        with torch.no_grad():
            layer.qkv.weight[:16] *= 100
            layer.qkv.bias[:16] *= 100
        torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=0)
        assert {"q_norm.weight", "k_norm.weight"} <= set(layer.state_dict())

    @pytest.mark.parametrize("heads", [3, 0])
    def test_heads_must_divide_the_width(self, heads):
        with pytest.raises(ValueError, match=f"{heads} heads do not divide the width 8"):
            Attention(8, heads)

    def test_repr_names_the_processor(self):
        assert "processor=full_attention" in repr(Attention(8, 2))
        with_parameters = make_attention_layer("latents", 8, 2, grid=(2, 2), group=1, latents=1)
        assert repr(with_parameters).count("LatentAttention") == 1
