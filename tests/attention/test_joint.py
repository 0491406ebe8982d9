import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.attention import (
    Attention,
    attention_processor,
    attention_variants,
    full_attention,
    record_attention,
)
from minilib.attention.joint import HeadNorm, JointAttention, RotaryAttention, joint_ids, joint_mask, rows
from minilib.attention.rope import RotaryEmbedding, grid_ids

N, L, D, HEADS = 6, 4, 16, 2


def randomised(layer, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4)
    return layer.double()


def streams(b=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, n, D, generator=g, dtype=torch.float64) for n in (N, L))


def table(ids=None, context_ids=None):
    ids = grid_ids(2, 3) if ids is None else ids
    return RotaryEmbedding(D // HEADS)(joint_ids(ids, context_ids, torch.zeros(2, L, D)))


def turn(x, angles):
    """Rotary embedding on (tokens, d), with real numbers."""
    even, odd = x[:, 0::2], x[:, 1::2]
    c, s = angles.cos(), angles.sin()
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(1)


def by_hand(layer, x, context, keep, angles):
    """One sample, one head, one query at a time; ``keep`` says which of the n + l keys may be read."""
    n, width = len(x), D // HEADS
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(D, -1)
    *cq, ck, cv = (context @ layer.context_qkv.weight.T + layer.context_qkv.bias).split(D, -1)
    queries = [(q, layer.q_norm)] + ([] if layer.context_pre_only else [(cq[0], layer.context_q_norm)])
    keys = [(k, layer.k_norm), (ck, layer.context_k_norm)]

    def prepare(streams, h):
        parts = []
        for tensor, norm in streams:
            part = tensor[:, h * width : (h + 1) * width]
            if layer.qk_norm:
                part = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            parts.append(part)
        joined = torch.cat(parts)
        return turn(joined, angles[: len(joined)])

    heads = []
    for h in range(HEADS):
        qs, ks = prepare(queries, h), prepare(keys, h)
        values = torch.cat([v, cv])[:, h * width : (h + 1) * width]
        weights = ((qs @ ks.T) / width**0.5)[:, keep].softmax(-1)
        heads.append(weights @ values[keep])
    out = torch.cat(heads, dim=-1)
    image = out[:n] @ layer.proj.weight.T + layer.proj.bias
    if layer.context_pre_only:
        return image, None
    return image, out[n:] @ layer.context_proj.weight.T + layer.context_proj.bias


@pytest.mark.parametrize("qk_norm", ["", "rms_norm"])
@pytest.mark.parametrize(
    "options", [{}, {"context_pre_only": True}, {"context_pre_only": True, "unused_context_query": True}]
)
@pytest.mark.parametrize("variant", ["full", "naive"])
def test_against_its_equations(qk_norm, options, variant):
    layer = randomised(JointAttention(D, HEADS, qk_norm=qk_norm, variant=variant, **options))
    x, context = streams()
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    rotary = table(context_ids=torch.tensor([[5.0, 0.5]]).expand(L, 2))
    image, text = layer(x, context, mask=joint_mask(N, mask), rotary=rotary)
    for i in range(2):
        keep = torch.cat([torch.ones(N, dtype=torch.bool), mask[i]])
        expected, expected_text = by_hand(layer, x[i], context[i], keep, rotary.angle().double())
        torch.testing.assert_close(image[i], expected, atol=1e-5, rtol=0)
        if expected_text is None:
            assert text is None
        else:
            torch.testing.assert_close(text[i], expected_text, atol=1e-5, rtol=0)


def test_tied_streams_are_self_attention_on_the_concatenation():
    """sd3-C1 (c): with equal weights there is one stream."""
    layer, single = (
        randomised(JointAttention(D, HEADS)),
        randomised(Attention(D, HEADS, qk_norm=True), seed=5),
    )
    for name in ("qkv", "proj", "q_norm", "k_norm"):
        state = getattr(single, name).state_dict()
        getattr(layer, name).load_state_dict(state)
        getattr(layer, f"context_{name}").load_state_dict(state)
    x, context = streams()
    together = single(torch.cat([x, context], dim=1))
    torch.testing.assert_close(torch.cat(layer(x, context), dim=1), together, atol=1e-12, rtol=0)


class TestMask:
    def test_padded_text_reaches_nothing_else(self):
        layer, (x, context) = randomised(JointAttention(D, HEADS)), streams(1)
        mask = joint_mask(N, torch.tensor([[True, False, True, False]]))

        def real(context):
            image, text = layer(x, context, mask=mask)
            return torch.cat([image, text[:, [0, 2]]], dim=1)

        jacobian = torch.autograd.functional.jacobian(real, context)[0, :, :, 0]
        reached = jacobian.abs().amax((0, 1, 3))
        assert (reached[[1, 3]] == 0).all() and (reached[[0, 2]] > 1e-3).all()

    @pytest.mark.parametrize("pre_only", [False, True])
    def test_no_text_at_all_is_attention_among_the_image(self, pre_only):
        layer, (x, context) = randomised(JointAttention(D, HEADS, context_pre_only=pre_only)), streams()
        image, _ = layer(x, context, mask=joint_mask(N, torch.zeros(2, L, dtype=torch.bool)))
        alone, _ = layer(x, context[:, :0])
        torch.testing.assert_close(image, alone, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("pre_only", [False, True])
    def test_a_mask_over_queries(self, pre_only):
        """Each query has its own row; the rows of the context fall away where it has no queries."""
        layer, (x, context) = randomised(JointAttention(D, HEADS, context_pre_only=pre_only)), streams()
        mask = torch.ones(N + L, N + L, dtype=torch.bool)
        mask[0, N:] = False
        image, _ = layer(x, context, mask=mask)
        plain, _ = layer(x, context)
        text_free, _ = layer(x, context, mask=joint_mask(N, torch.zeros(2, L, dtype=torch.bool)))
        torch.testing.assert_close(image[:, 0], text_free[:, 0], atol=1e-12, rtol=0)
        torch.testing.assert_close(image[:, 1:], plain[:, 1:], atol=1e-12, rtol=0)
        assert (image[:, 0] - plain[:, 0]).abs().max() > 1e-3

    def test_rows(self):
        square = torch.arange(16).view(4, 4)
        assert torch.equal(rows(square, 3), square[:3])
        assert rows(square[:1], 3).shape == (1, 4) and rows(square[0], 3).shape == (4,)
        assert rows(None, 3) is None


class TestProcessor:
    @pytest.mark.parametrize("pre_only, queries", [(False, N + L), (True, N)])
    def test_one_call_image_first(self, pre_only, queries):
        layer, (x, context) = (
            randomised(JointAttention(D, HEADS, qk_norm="", context_pre_only=pre_only)),
            streams(),
        )
        calls = []

        def process(q, k, v, *, mask=None):
            calls.append((q, k, v))
            return full_attention(q, k, v, mask=mask)

        with attention_processor(nn.ModuleList([layer]), lambda name, module: process):
            out = layer(x, context)
        ((q, k, v),) = calls
        assert q.shape == (2, HEADS, queries, D // HEADS) and k.shape == v.shape == (
            2,
            HEADS,
            N + L,
            D // HEADS,
        )
        own, other = layer.qkv(x)[..., -D:], layer.context_qkv(context)[..., -D:]
        torch.testing.assert_close(
            v.transpose(1, 2).flatten(2), torch.cat([own, other], 1), atol=1e-12, rtol=0
        )
        assert torch.equal(out[0], layer(x, context)[0])

    def test_recording(self):
        model = nn.ModuleDict(
            {"a": JointAttention(D, HEADS), "b": JointAttention(D, HEADS, context_pre_only=True)}
        )
        x, context = (part.float() for part in streams())
        mask = joint_mask(N, torch.tensor([[True, False, False, False], [True] * 4]))
        with record_attention(model) as weights:
            for layer in model.values():
                layer(x, context, mask=mask)
        assert weights["a"][0].shape == (2, HEADS, N + L, N + L) and weights["b"][0].shape == (
            2,
            HEADS,
            N,
            N + L,
        )
        for (w,) in weights.values():
            torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
            assert (w[0, ..., N + 1 :] == 0).all() and (w[1] > 0).all()


def test_self_attention_with_and_without_a_table():
    layer = randomised(RotaryAttention(D, HEADS, qk_norm=True))
    x, _ = streams()
    plain = randomised(Attention(D, HEADS, qk_norm=True))
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=0)
    ids = grid_ids(2, 3)
    turned = layer(x, rotary=RotaryEmbedding(D // HEADS)(ids))
    shifted = layer(x, rotary=RotaryEmbedding(D // HEADS)(ids + 9))
    torch.testing.assert_close(turned, shifted, atol=1e-5, rtol=0)
    assert (turned - plain(x)).abs().max() > 1e-3


def test_head_norm_is_rms_norm_in_float32():
    norm = randomised(HeadNorm(8)).float()
    x = torch.randn(2, 3, 4, 8) * 1e-2
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6), atol=1e-6, rtol=1e-6)
    assert torch.equal(norm(x.bfloat16()), norm(x.bfloat16().float()).bfloat16())


def test_gradients_reach_every_parameter():
    for options in ({}, {"context_pre_only": True}, {"qk_norm": ""}):
        layer, (x, context) = randomised(JointAttention(D, HEADS, **options)), streams()
        sum(out.square().sum() for out in layer(x, context, rotary=table()) if out is not None).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters()), options


def test_autocast_stays_close_to_float32():
    layer = randomised(JointAttention(D, HEADS)).float()
    x, context = (part.float() for part in streams())
    full = layer(x, context, rotary=table())
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x, context, rotary=table())
    for a, b in zip(half, full, strict=True):
        assert a.dtype == torch.bfloat16 and (a.float() - b).abs().max() < 0.05 * b.abs().max()


class TestErrors:
    @pytest.mark.parametrize(
        "args, options, message",
        [
            ((D, 3), {}, "3 heads do not divide the width 16"),
            ((D, 2), {"qk_norm": "layer_norm"}, "unknown qk_norm 'layer_norm': choose 'rms_norm' or ''"),
            ((D, 2), {"variant": "ful"}, "unknown attention 'ful'"),
        ],
    )
    def test_options(self, args, options, message):
        with pytest.raises(ValueError, match=message):
            JointAttention(*args, **options)

    def test_every_registered_variant_builds(self):
        for variant in attention_variants().values():
            if variant.layer is None:
                sizes = {"num_heads": HEADS, "head_dim": D // HEADS}
                options = {key: sizes[key] for key in variant.option_names if key in sizes}
                options |= variant.cases[0].options
                assert JointAttention(D, HEADS, variant=variant.name, variant_options=options)
