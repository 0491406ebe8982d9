from copy import deepcopy

import pytest
import torch
from torch import nn

from minilib.models import DiT, UNet
from minilib.quantization import (
    OFF,
    QuantLinear,
    QuantRule,
    QuantSpec,
    calibrate,
    quant_layers,
    quantize_copy,
    quantize_model,
    select_layers,
    uniform_rules,
    weight_memory,
)

W4, A4 = QuantSpec(4, "channel"), QuantSpec(4)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.1))
    return model.eval()


@pytest.fixture(scope="module")
def unet():
    return randomised(
        UNet(
            block_out_channels=(8, 16),
            attention_levels=(1,),
            num_heads=2,
            cross_attention_dim=6,
            norm_num_groups=4,
        )
    )


def call(t, seed=0):
    return {
        "x": draw(2, 3, 8, 8, seed=seed),
        "t": torch.full((2,), float(t)),
        "context": draw(2, 3, 6, seed=1),
    }


CALLS = [call(t) for t in (900, 500, 100)]


class Nothing:
    """The transform that changes nothing."""

    def activation(self, x, t):
        return x

    def weight(self, w, t):
        return w

    def key(self, t):
        return ""


class TestSelect:
    def test_globs_and_expressions_find_linear_layers_and_convolutions_only(self, unet):
        assert list(select_layers(unet, "**.ff.*"))[:1] == [
            "down_blocks.1.attentions.0.transformer_blocks.0.ff.proj"
        ]
        kinds = {type(layer) for layer in select_layers(unet).values()}
        assert kinds == {nn.Linear, nn.Conv2d}
        assert list(select_layers(unet, ["conv_out", "conv_in"])) == ["conv_in", "conv_out"]

    def test_nothing_found_is_refused(self, unet):
        with pytest.raises(ValueError, match="no linear layer"):
            select_layers(unet, "conv_norm_out")
        with pytest.raises(ValueError, match="no module of UNet is called 'nowhere'"):
            select_layers(unet, "nowhere")


class TestRules:
    def test_the_first_rule_that_names_a_layer_decides(self, unet):
        rules = uniform_rules(W4, A4, keep=["conv_in", "conv_out"])
        with quantize_model(unet, rules) as layers:
            bits = {
                name: (layer.weight_quantizer.spec.bits, layer.activation_quantizer.spec.bits)
                for name, layer in layers.items()
            }
        assert bits.pop("conv_in") == bits.pop("conv_out") == (8, 8)
        assert set(bits.values()) == {(4, 4)} and len(bits) == len(select_layers(unet)) - 2

    def test_kept_layers_never_get_fewer_bits(self):
        rules = uniform_rules(QuantSpec(4, "channel"), OFF, keep="a")
        assert [(r.weight.bits, r.activation.bits) for r in rules] == [(8, 32), (4, 32)]
        assert rules[0].weight.granularity == "channel"

    def test_kept_layers_can_stay_in_full_precision(self, unet):
        with quantize_model(unet, uniform_rules(W4, OFF, keep="conv_in", kept_bits=32)) as layers:
            x = draw(1, 3, 8, 8)
            assert layers["conv_in"].weight_quantizer.spec.off
            assert torch.equal(
                layers["conv_in"](x),
                nn.functional.conv2d(x, layers["conv_in"].weight, layers["conv_in"].bias, padding=1),
            )

    def test_layers_that_no_rule_names_stay(self, unet):
        with quantize_model(unet, [QuantRule("**.ff.*", W4)]) as layers:
            assert type(unet.conv_in) is nn.Conv2d
            assert all(".ff." in name for name in layers)

    def test_no_rule_and_a_stray_transform_are_refused(self, unet):
        with pytest.raises(ValueError, match="no rule given"), quantize_model(unet, []):
            pass
        with pytest.raises(ValueError, match=r"no rule names: \['conv_in'\]"):
            with quantize_model(unet, [QuantRule("**.ff.*", W4)], transforms={"conv_in": Nothing()}):
                pass

    def test_what_a_layer_refuses_names_the_layer(self, unet):
        with pytest.raises(ValueError, match="layer 'conv_in': a weight has no tokens"):
            quantize_copy(unet, [QuantRule("conv_in", QuantSpec(4, "token", dynamic=True))])


class TestInPlace:
    def test_thirty_two_bits_are_the_model_to_the_bit(self, unet):
        with torch.no_grad():
            before = unet(**CALLS[0])
            with quantize_model(unet, uniform_rules(OFF, OFF), timesteps=[900, 100]):
                assert torch.equal(unet(**CALLS[0]), before)
            assert torch.equal(quantize_copy(unet, uniform_rules(OFF, OFF))(**CALLS[0]), before)

    def test_the_model_comes_back(self, unet):
        modules, state = dict(unet.named_modules()), deepcopy(unet.state_dict())
        with pytest.raises(RuntimeError, match="stop"), quantize_model(unet, uniform_rules(W4, A4)):
            assert isinstance(unet.time_embedding.linear_1, QuantLinear)
            raise RuntimeError("stop")
        assert dict(unet.named_modules()) == modules and not unet._forward_pre_hooks
        assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), state.values(), strict=True))

    def test_a_copy_is_quantised_for_good_and_the_original_is_not(self, unet):
        copied = quantize_copy(unet, uniform_rules(W4, A4), timesteps=[900, 500, 100])
        calibrate(copied, CALLS)
        with torch.no_grad(), quantize_model(unet, uniform_rules(W4, A4), timesteps=[900, 500, 100]):
            calibrate(unet, CALLS)
            for one in CALLS:
                assert torch.equal(unet(**one), copied(**one))
        assert not any(isinstance(m, QuantLinear) for m in unet.modules())

    def test_more_bits_come_nearer(self, unet):
        with torch.no_grad():
            exact, errors = unet(**CALLS[0]), []
            for bits in (4, 6, 8, 12, 16):
                copied = quantize_copy(unet, uniform_rules(QuantSpec(bits, "channel"), QuantSpec(bits)))
                calibrate(copied, CALLS)
                errors.append(float((copied(**CALLS[0]) - exact).norm() / exact.norm()))
        assert all(a > 2 * b for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 1e-3

    def test_token_ranges_make_samples_independent(self):
        model = randomised(DiT(input_size=4, hidden_size=16, depth=2, num_heads=2))
        rules = uniform_rules(W4, QuantSpec(4, "token", dynamic=True))
        x, t, y = draw(3, 1, 4, 4), torch.tensor([900.0, 10.0, 400.0]), torch.tensor([1, 2, 3])
        x[2] *= 100
        with torch.no_grad(), quantize_model(model, rules):
            apart = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
            assert (model(x, t, y) - apart).abs().max() < 1e-4 * apart.abs().max()


class TestCalibrate:
    def test_a_table_follows_the_models_own_time(self, unet):
        model = quantize_copy(unet, uniform_rules(OFF, A4), timesteps=[900, 500, 100])
        calibrate(model, CALLS)
        layer = quant_layers(model, "conv_in")["conv_in"]
        expected = [(one["x"].amax() - one["x"].amin()) / 15 for one in CALLS]
        assert torch.allclose(layer.activation_quantizer.log_scale.exp().flatten(), torch.stack(expected))

    def test_positional_and_named_arguments_are_the_same(self, unet):
        named, positional = (
            quantize_copy(unet, uniform_rules(W4, A4), timesteps=[900, 500, 100]) for _ in "ab"
        )
        calibrate(named, CALLS)
        calibrate(positional, [tuple(one.values()) for one in CALLS])
        assert torch.equal(named(**CALLS[1]), positional(*CALLS[1].values()))

    def test_weights_are_rounded_and_inputs_are_not_meanwhile(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        copied = quantize_copy(model, uniform_rules(QuantSpec(2, "channel"), A4))
        x = draw(9, 3)
        calibrate(copied, [(x,)])
        middle = x @ copied[0].rounded_weight().detach().T + model[0].bias
        width = (middle.amax() - middle.amin()) / 15
        assert torch.allclose(copied[1].activation_quantizer.log_scale.exp().flatten(), width.detach()[None])

    def test_what_is_missing_is_named(self, unet):
        model = quantize_copy(unet, uniform_rules(W4, A4), timesteps=[900, 500, 100])
        with pytest.raises(ValueError, match=r"layer '.*': no values seen for 1 of 3 times \(100\)"):
            calibrate(model, CALLS[:2])
        with pytest.raises(ValueError, match="no call given"):
            calibrate(model, [])
        with pytest.raises(ValueError, match="is quantised: see quantize_model"):
            calibrate(unet, CALLS)

    def test_a_call_that_fails_ends_the_watch(self, unet):
        model = quantize_copy(unet, uniform_rules(W4, A4))
        with pytest.raises(ValueError, match="channels"):
            calibrate(model, [call(1) | {"x": draw(2, 5, 8, 8)}])
        with pytest.raises(ValueError, match="before it can round"):
            model(**CALLS[0])

    def test_dynamic_ranges_need_none(self, unet):
        model = quantize_copy(unet, uniform_rules(W4, QuantSpec(4, "token", dynamic=True)))
        calibrate(model, CALLS)
        assert torch.isfinite(model(**CALLS[0])).all()

    def test_timesteps_need_a_model_with_time(self):
        with pytest.raises(ValueError, match="no argument 't'"):
            quantize_copy(nn.Sequential(nn.Linear(2, 2)), uniform_rules(W4, A4), timesteps=[1.0])


class TestMemory:
    def test_by_hand(self):
        model = nn.Sequential(nn.Linear(10, 6), nn.GELU(), nn.Linear(6, 3, bias=False))
        rules = [
            QuantRule("0", QuantSpec(4, "channel"), QuantSpec(8)),
            QuantRule("2", QuantSpec(3, symmetric=True)),
        ]
        memory = weight_memory(model, rules, times=5)
        assert memory.full == 4 * (60 + 6 + 18)
        assert memory.weights == 30 + 4 * 6 + 7  # 18 weights of 3 bits: 54 bits
        # six scales and six zero points of 4 bits; five scales of 4 bytes and zero points of 1; one scale
        assert memory.scales == (6 * 4 + 3) + 5 * (4 + 1) + 4
        assert memory.ratio == memory.full / (memory.weights + memory.scales)

    def test_it_counts_on_meta_and_nothing_by_default(self, unet):
        with torch.device("meta"):
            ghost = UNet(**unet.config)
        rules = uniform_rules(W4, A4)
        assert weight_memory(ghost, rules) == weight_memory(unet, rules)
        plain = weight_memory(ghost, float_bytes=2)
        assert plain.ratio == 1 and plain.full == 2 * sum(p.numel() for p in unet.parameters())

    def test_a_tied_weight_counts_once(self):
        one, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        other.weight = one.weight
        memory = weight_memory(nn.Sequential(one, other), uniform_rules(QuantSpec(4), OFF))
        assert (memory.full, memory.weights) == (256, 32)

    def test_a_shared_weight_counts_once(self):
        layer = nn.Linear(8, 8, bias=False)
        memory = weight_memory(nn.Sequential(layer, nn.Sequential(layer)), uniform_rules(QuantSpec(4), OFF))
        assert (memory.full, memory.weights) == (256, 32)
