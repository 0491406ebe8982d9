"""Editing attention: weights, keys and values, heads; for self-, cross- and joint attention."""

import math

import pytest
import torch
from torch import nn

from minilib.attention import (
    Attention,
    AttentionLayer,
    Case,
    CrossAttention,
    attention_processor,
    full_attention,
    naive_attention,
    patch_attention,
    patch_keys_values,
    record_attention,
    record_keys_values,
    register_attention,
    replace_attention_weights,
    replace_keys_values,
    reweight_attention,
    scale_heads,
)
from minilib.attention import registry as registry_module
from minilib.attention.functional import softmax_flops
from minilib.models import DiT
from minilib.models.mmdit import MMDiT
from minilib.models.unet import UNet


def randomise(model, std=0.2):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model.eval()


def dit():
    g = torch.Generator().manual_seed(1)
    model = randomise(DiT(input_size=4, hidden_size=16, depth=2, num_heads=2))
    return model, (torch.randn(2, 1, 4, 4, generator=g), torch.tensor([3.0, 800.0]), torch.tensor([1, 10]))


def mmdit():
    g = torch.Generator().manual_seed(1)
    model = randomise(MMDiT(hidden_size=16, depth=3, num_heads=2, context_dim=6))
    x, context = torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 5, 6, generator=g)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return model, (x, torch.tensor([3.0, 800.0]), context, mask)


def unet():
    g = torch.Generator().manual_seed(1)
    model = randomise(
        UNet(block_out_channels=(8, 16), layers_per_block=1, attention_levels=(1,), num_heads=2, cross_attention_dim=6,
             norm_num_groups=4), 0.1
    )  # fmt: skip
    x, context = torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 5, 6, generator=g)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return model, (x, torch.tensor([3.0, 800.0]), context, mask)


@pytest.fixture(params=[dit, mmdit, unet], ids=lambda make: make.__name__)
def case(request):
    return request.param()


def processors(model):
    return [m.processor for m in model.modules() if isinstance(m, AttentionLayer)]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class TestEveryModel:
    def test_recording_and_neutral_edits_change_no_bit(self, case):
        model, inputs = case
        before, original = model(*inputs), processors(model)
        layers = sum(isinstance(m, AttentionLayer) for m in model.modules())
        with (
            replace_attention_weights(model, lambda name, w: w),
            record_attention(model) as weights,
            reweight_attention(model, torch.ones(1)),
            scale_heads(model, {"**": torch.ones(2)}),
            record_keys_values(model) as keys_values,
        ):
            assert torch.equal(model(*inputs), before)
        assert processors(model) == original
        assert len(weights) == len(keys_values) == layers and all(
            len(calls) == 1 for calls in weights.values()
        )
        for name, (w,) in weights.items():
            close(w.sum(-1), torch.ones(w.shape[:-1]))
            k, v = keys_values[name][0]
            assert k.shape[2] == v.shape[2] == w.shape[3]

    def test_patching_with_its_own_recordings_is_the_identity(self, case):
        model, inputs = case
        before = model(*inputs)
        with record_attention(model) as weights, record_keys_values(model) as keys_values:
            model(*inputs)
        with patch_keys_values(model, keys_values):
            assert torch.equal(model(*inputs), before)
        with patch_attention(model, weights):
            close(model(*inputs), before)

    def test_edited_weights_are_those_that_mix(self, case):
        model, inputs = case

        def flatten(name, w):
            return torch.full_like(w, 1 / w.shape[-1])

        def mean(q, k, v, *, mask=None):
            return v.mean(2, keepdim=True).expand_as(q)

        with replace_attention_weights(model, flatten):
            out = model(*inputs)
        with attention_processor(model, lambda name, layer: mean):
            close(out, model(*inputs))
        assert (out - model(*inputs)).abs().max() > 1e-4

    def test_everything_put_back_after_an_error(self, case):
        model, inputs = case
        original, before = processors(model), model(*inputs)
        with record_keys_values(model) as keys_values, record_attention(model) as weights:
            model(*inputs)
        for enter in (
            lambda: record_attention(model),
            lambda: replace_attention_weights(model, lambda name, w: 0 * w),
            lambda: reweight_attention(model, torch.zeros(1)),
            lambda: patch_attention(model, weights),
            lambda: scale_heads(model, {"**": torch.zeros(2)}),
            lambda: record_keys_values(model),
            lambda: patch_keys_values(model, keys_values),
        ):
            with pytest.raises(KeyError, match="inside"), enter():
                assert processors(model) != original
                raise KeyError("inside")
            assert processors(model) == original
        assert torch.equal(model(*inputs), before)


class TestNamesAndRecords:
    def test_only_the_named_layers(self):
        model, inputs = dit()
        with record_attention(model, "blocks.1.*") as weights:
            model(*inputs)
        assert list(weights) == ["blocks.1.attn"]
        with pytest.raises(ValueError, match="no attention layer is called 'blocks.2.attn'.*'blocks.0.attn'"):
            with record_attention(model, "blocks.2.attn"):
                pass
        with pytest.raises(ValueError, match="no attention layer is called 'nothing'"):
            with scale_heads(model, {"nothing": torch.ones(2)}):
                pass

    def test_self_and_cross_attention_have_their_own_sizes(self):
        model, inputs = unet()
        with record_attention(model) as weights:
            model(*inputs)
        for name, (w,) in weights.items():
            assert w.shape == (2, 2, 16, 5 if name.endswith("attn2") else 16)
            if name.endswith("attn2"):
                assert (w[1, :, :, 3:] == 0).all() and (w[0] > 0).all()

    def test_joint_attention_reads_image_then_text(self):
        model, inputs = mmdit()
        with record_attention(model) as weights:
            model(*inputs)
        assert [w[0].shape[2:] for w in weights.values()] == [(21, 21), (21, 21), (16, 21)]
        assert (weights["blocks.0.attn"][0][1, :, :, 19:] == 0).all()

    def test_reduced(self):
        model, inputs = dit()
        with record_attention(model) as full, record_attention(model, reduce=lambda w: w.mean(1)) as mean:
            model(*inputs)
        for name, (w,) in full.items():
            assert torch.equal(mean[name][0], w.mean(1))
        with record_attention(model, reduce=lambda w: w[:, 0]) as part:
            model(*inputs)
        kept = part["blocks.0.attn"][0]
        assert kept.untyped_storage().nbytes() == kept.numel() * 4, "a view would keep all heads alive"

    def test_kept_in_the_graph_for_a_loss_on_the_weights(self):
        layer = Attention(8, 2).double()
        x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)

        def loss(x):
            with record_attention(layer, detach=False) as weights:
                layer(x)
            return weights[""][0][..., 0].sum()

        assert torch.autograd.gradcheck(loss, x)
        with record_attention(layer) as weights:
            layer(x)
        assert not weights[""][0].requires_grad


class TestEdits:
    @pytest.fixture
    def layer(self):
        return randomise(Attention(8, 2), 0.4)

    @pytest.fixture
    def x(self):
        return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("in_place", [True, False])
    def test_editing_in_place_counts(self, layer, x, in_place):
        def edit(name, w):
            if in_place:
                w[..., 2] = 0
                return w
            return torch.cat([w[..., :2], 0 * w[..., 2:3], w[..., 3:]], -1)

        mask = torch.ones(5, 5, dtype=torch.bool)
        with (
            record_attention(layer) as raw,
            replace_attention_weights(layer, edit),
            record_attention(layer) as seen,
        ):
            out = layer(x, mask=mask)
        q, k, v = (part.view(2, 5, 2, 4).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1)
        close(raw[""][0], weights)
        weights[..., 2] = 0
        close(seen[""][0], weights)
        close(out, layer.proj((weights @ v).transpose(1, 2).reshape(2, 5, 8)))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, layer, x, mode):
        with mode():
            before = layer(x)
            with record_attention(layer):
                assert torch.equal(layer(x), before)
            with replace_attention_weights(layer, lambda name, w: w.mul_(0)):
                assert torch.equal(layer(x), layer.proj.bias.expand(2, 5, 8))

    def test_two_edits_compose(self, layer, x):
        with (
            replace_attention_weights(layer, lambda n, w: w + 1),
            replace_attention_weights(layer, lambda n, w: 2 * w),
        ):
            both = layer(x)
        with replace_attention_weights(layer, lambda n, w: 2 * (w + 1)):
            close(both, layer(x))

    def test_reweighting(self, layer, x):
        scale = torch.tensor([0.0, 1.0, 3.0, 1.0, 0.5])
        with reweight_attention(layer, scale), record_attention(layer) as plain:
            layer(x)
        with reweight_attention(layer, scale, renormalize=True), record_attention(layer) as normal:
            layer(x)
        with record_attention(layer) as raw:
            layer(x)
        close(plain[""][0], raw[""][0] * scale)
        close(normal[""][0], raw[""][0] * scale / (raw[""][0] * scale).sum(-1, keepdim=True))
        close(normal[""][0].sum(-1), torch.ones(2, 2, 5))

    def test_reweighting_is_learnable(self, layer, x):
        layer, x = layer.double(), x.double()

        def out(scale):
            with reweight_attention(layer, scale):
                return layer(x).square().sum()

        assert torch.autograd.gradcheck(out, torch.ones(5, dtype=torch.float64, requires_grad=True))

    def test_scale_of_another_number_of_keys(self, layer, x):
        with (
            pytest.raises(ValueError, match="reads 5 keys, the scale is for 3"),
            reweight_attention(layer, torch.ones(3)),
        ):
            layer(x)

    def test_patching_some_keys_and_some_calls(self, layer, x):
        other = torch.randn(2, 2, 5, 5)
        keys = torch.tensor([1, 4])
        with patch_attention(layer, {"": other}, keys=keys, when=lambda call: call == 1):
            with record_attention(layer) as seen:
                layer(x)
                layer(x)
        raw, patched = seen[""]
        assert torch.equal(patched[..., keys], other[..., keys])
        assert torch.equal(patched[..., [0, 2, 3]], raw[..., [0, 2, 3]])

    def test_recordings_of_each_call(self, layer, x):
        with record_attention(layer) as source:
            layer(x)
            layer(-2 * x)
        with patch_attention(layer, source), record_attention(layer) as seen:
            layer(3 * x)
            layer(3 * x)
            with pytest.raises(IndexError, match="call 3 of '', but only 2"):
                layer(x)
        assert torch.equal(seen[""][0], source[""][0]) and torch.equal(seen[""][1], source[""][1])

    def test_wrong_shapes(self, layer, x):
        with pytest.raises(ValueError, match=r"has weights \(2, 2, 5, 5\), recorded were \(1, 2, 5, 5\)"):
            with patch_attention(layer, {"": torch.zeros(1, 2, 5, 5)}):
                layer(x)
        with (
            pytest.raises(ValueError, match="keep the shape"),
            replace_attention_weights(layer, lambda n, w: w[:1]),
        ):
            layer(x)
        with (
            pytest.raises(TypeError, match="returned None"),
            replace_attention_weights(layer, lambda n, w: None),
        ):
            layer(x)
        with pytest.raises(ValueError, match="to replace, recorded were"):
            with patch_keys_values(layer, {"": (torch.zeros(2, 2, 3, 4),) * 2}):
                layer(x)
        with (
            pytest.raises(ValueError, match="one scale for each of its 2 heads"),
            scale_heads(layer, {"": torch.ones(3)}),
        ):
            pass
        with pytest.raises(ValueError, match="needs one scale"):
            with scale_heads(nn.ModuleDict({"a": layer}), {"a": torch.ones(2), "*": torch.ones(2)}):
                pass

    def test_pruned_head_equals_a_masked_output_layer(self, layer, x):
        with scale_heads(layer, {"": torch.tensor([0.0, 1.0])}):
            out = layer(x)
        weight = layer.proj.weight.clone()
        layer.proj.weight.data[:, :4] = 0
        close(out, layer(x))
        layer.proj.weight.data.copy_(weight)

    def test_head_scales_learn_and_combine_with_edits(self, layer, x):
        layer, x = layer.double(), x.double()

        def out(scales, edit):
            with replace_attention_weights(layer, edit), scale_heads(layer, {"": scales}):
                return layer(x).square().sum()

        ones = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s: out(s, lambda n, w: 2 * w), ones)
        torch.testing.assert_close(out(2 * ones, lambda n, w: w), out(ones, lambda n, w: 2 * w))

    def test_any_variant_has_heads_keys_and_values_but_not_weights(self, monkeypatch, x):
        monkeypatch.setattr(registry_module, "ATTENTION", dict(registry_module.ATTENTION))

        parts = {"reference": full_attention, "flops": softmax_flops, "cases": (Case({}, n=2),)}

        @register_attention("mean", **parts)
        def mean(q, k, v, *, mask=None):
            return v.mean(2, keepdim=True).expand_as(q)

        layer = randomise(Attention(8, 2, variant="mean"))
        with scale_heads(layer, {"": torch.zeros(2)}), record_keys_values(layer) as recorded:
            close(layer(x), layer.proj.bias.expand(2, 5, 8))
            for enter in (record_attention, lambda m: reweight_attention(m, torch.ones(1))):
                with pytest.raises(ValueError, match="not registered as softmax attention"), enter(layer):
                    pass
        assert len(recorded[""]) == 1

    def test_edits_work_over_a_processor_put_in_by_hand(self, layer, x):
        with attention_processor(layer, lambda name, a: naive_attention):
            with replace_attention_weights(layer, lambda name, w: w), record_attention(layer) as weights:
                close(
                    layer(x),
                    layer.proj((weights[""][0] @ self.values(layer, x)).transpose(1, 2).reshape(2, 5, 8)),
                )
        assert layer.processor is full_attention

    @staticmethod
    def values(layer, x):
        return layer.qkv(x).chunk(3, -1)[2].view(2, 5, 2, 4).transpose(1, 2)


class TestKeysAndValues:
    def test_all_keys_and_values_of_the_text_swap_the_prompt(self):
        """Reading another text in every layer is generating from that text, if it enters nowhere else."""
        model, (x, t, context, mask) = unet()
        other = torch.randn(context.shape, generator=torch.Generator().manual_seed(9))
        with record_keys_values(model, "**.attn2") as recorded:
            expected = model(x, t, other, mask)
        with patch_keys_values(model, recorded):
            out = model(x, t, context, mask)
        close(out, expected, 1e-6)
        assert (model(x, t, context, mask) - expected).abs().max() > 1e-4
        first = next(iter(recorded))
        with patch_keys_values(model, {first: recorded[first]}):
            assert 1e-5 < (model(x, t, context, mask) - expected).abs().max()

    def test_some_tokens_only(self):
        layer = randomise(CrossAttention(8, 6, 2), 0.5)
        x, a, b = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 6)
        tokens = slice(1, 3)
        with record_keys_values(layer, tokens=tokens) as recorded:
            layer(x, b)
        assert recorded[""][0][0].shape == (2, 2, 2, 4)
        mixed = a.clone()
        mixed[:, tokens] = b[:, tokens]
        with patch_keys_values(layer, recorded, tokens=tokens, when=lambda call: call == 0):
            close(layer(x, a), layer(x, mixed))
            close(layer(x, a), layer(x, a))

    def test_more_tokens_to_read(self):
        layer = randomise(CrossAttention(8, 6, 2), 0.5)
        x, a, b = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 2, 6)
        with record_keys_values(layer) as kept:
            layer(x, b)
        k, v = kept[""][0]
        with replace_keys_values(layer, lambda name, ks, vs: (torch.cat([ks, k], 2), torch.cat([vs, v], 2))):
            out = layer(x, a)
        close(out, layer(x, torch.cat([a, b], 1)))

    def test_text_tokens_of_one_layer_of_a_joint_attention(self):
        model, (x, t, context, _) = mmdit()
        other = torch.randn(context.shape, generator=torch.Generator().manual_seed(9))
        text = slice(16, 21)
        with record_keys_values(model, tokens=text) as recorded:
            swapped = model(x, t, other)
        before = model(x, t, context)
        name = "blocks.0.attn"
        with (
            patch_keys_values(model, {name: recorded[name]}, tokens=text),
            record_keys_values(model, name) as seen,
        ):
            out = model(x, t, context)
        assert torch.equal(seen[name][0][0][:, :, text], recorded[name][0][0])
        assert (out - before).abs().max() > 1e-4 and (out - swapped).abs().max() > 1e-4
        with patch_keys_values(model, recorded, tokens=text):
            close(model(x, t, context), swapped)
