import copy
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.models import DIT_CONFIGS, DiT, DiTBlock, GeluMLP, LabelEmbedder, PatchEmbed, SwiGLU, modulate
from minilib.models.dit import MLPS

SMALL = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}


def randomised(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model.eval()


def batch(model, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = model.config
    x = torch.randn(n, c["in_channels"], c["input_size"], c["input_size"], generator=g)
    return x, torch.rand(n, generator=g) * 1000, torch.arange(n) % (c["num_classes"] + 1)


class TestInitialisation:
    def test_output_is_zero(self):
        model = DiT(**SMALL)
        assert torch.equal(model(*batch(model)), torch.zeros(3, 2, 4, 4))

    @pytest.mark.parametrize("mlp", sorted(MLPS))
    def test_block_is_the_identity(self, mlp):
        model = DiT(**SMALL, mlp=mlp)
        x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
        assert torch.equal(model.blocks[0](x, c), x)

    def test_spread_of_the_weights(self):
        torch.manual_seed(0)
        model = DiT(hidden_size=128, depth=1, num_classes=1000)
        block = model.blocks[0]
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, model.x_embedder.proj):
            bound = (6 / sum(linear.weight.shape)) ** 0.5
            assert 0.97 * bound < linear.weight.abs().max() <= bound
            assert (linear.bias == 0).all()
        for table in (model.y_embedder, model.t_embedder.fc1, model.t_embedder.fc2):
            assert float(table.weight.detach().std()) == pytest.approx(0.02, rel=0.05)

    def test_gradient_reaches_first_the_output_layer_only_then_everything(self):
        torch.manual_seed(0)
        model = DiT(**SMALL)
        model(*batch(model)).sum().backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert touched == {"final_layer.linear.weight", "final_layer.linear.bias"}
        randomised(model).zero_grad()
        model(*batch(model, n=11)).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())

    def test_positions_are_fixed_and_not_in_the_state_dict(self):
        model = DiT(**SMALL)
        assert "pos_embed" not in model.state_dict() and not model.pos_embed.requires_grad


class TestForward:
    @pytest.mark.parametrize("learn_sigma, channels", [(True, 6), (False, 3)])
    @pytest.mark.parametrize("patch_size", [1, 2, 4])
    def test_shapes(self, learn_sigma, channels, patch_size):
        model = DiT(**SMALL, in_channels=3, patch_size=patch_size, learn_sigma=learn_sigma)
        assert model(*batch(model)).shape == (3, channels, 4, 4)

    def test_each_image_by_itself(self):
        model = randomised(DiT(**SMALL))
        x, t, y = batch(model)
        together = model(x, t, y)
        for i in range(3):
            alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)

    def test_every_input_matters(self):
        model = randomised(DiT(**SMALL))
        x, t, y = batch(model)
        base = model(x, t, y)
        for other in ((x + 0.1, t, y), (x, t + 5, y), (x, t, (y + 1) % 11)):
            assert (model(*other) - base).abs().amax((1, 2, 3)).min() > 1e-4

    def test_positions_break_the_symmetry_of_the_tokens(self):
        model = randomised(DiT(**SMALL))
        x, t, y = batch(model)
        shifted = model(x.roll(1, -1), t, y).roll(-1, -1)
        assert (shifted - model(x, t, y)).abs().max() > 1e-3
        model.pos_embed.zero_()
        torch.testing.assert_close(model(x.roll(1, -1), t, y).roll(-1, -1), model(x, t, y), atol=1e-5, rtol=0)

    def test_cond_takes_the_label_embeddings_place(self):
        model = randomised(DiT(**SMALL))
        x, t, y = batch(model)
        cond = model.embed_label(y)
        assert torch.equal(model(x, t, None, cond=cond), model(x, t, y))
        assert torch.equal(model.embed_condition(t, y), model.t_embedder(t) + cond)
        cond = cond.detach().requires_grad_()
        model(x, t, None, cond=cond).sum().backward()
        assert cond.grad.abs().max() > 0

    def test_integer_times(self):
        model = randomised(DiT(**SMALL))
        x, _, y = batch(model)
        t = torch.tensor([0, 500, 999])
        assert torch.equal(model(x, t, y), model(x, t.float(), y))

    def test_training_mode_changes_nothing(self):
        model = randomised(DiT(**SMALL))
        inputs = batch(model)
        expected = model(*inputs)
        assert torch.equal(model.train()(*inputs), expected), "no hidden label dropout"

    def test_gradients(self):
        torch.manual_seed(0)
        model = randomised(DiT(input_size=2, hidden_size=8, depth=1, num_heads=2, qk_norm=True)).double()
        t, y = torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
        names = [
            "blocks.0.adaLN_modulation.weight",
            "blocks.0.attn.qkv.bias",
            "final_layer.adaLN_modulation.bias",
        ]
        values = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]

        def run(x, *parameters):
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x, t, y))

        x = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)

    def test_autocast_stays_close_to_float32(self):
        model = randomised(DiT(**SMALL))
        inputs = batch(model)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(*inputs)
        full = model(*inputs)
        assert (half.float() - full).abs().max() < 0.05 * full.abs().max()
        half.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestOptions:
    @pytest.mark.parametrize("attention", ["full", "naive"])
    @pytest.mark.parametrize("mlp", sorted(MLPS))
    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_every_combination_trains_and_rebuilds_from_its_config(self, attention, mlp, qk_norm):
        options = {"num_experts": 4, "k": 2} if mlp == "moe" else None
        model = randomised(DiT(**SMALL, attention=attention, mlp=mlp, mlp_options=options, qk_norm=qk_norm))
        out = model(*batch(model, n=11))
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        config = json.loads(json.dumps(model.config))
        again = DiT(**config)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(*batch(model, n=11)), out)

    def test_config_holds_every_argument(self):
        assert set(DiT(**SMALL).config) == set(inspect.signature(DiT).parameters)

    def test_attention_variants_agree(self):
        full, naive = randomised(DiT(**SMALL)), randomised(DiT(**SMALL, attention="naive"))
        torch.testing.assert_close(full(*batch(full)), naive(*batch(full)), atol=1e-5, rtol=0)

    def test_mlp_options_reach_the_network(self):
        assert DiT(**SMALL, mlp="swiglu", mlp_options={"hidden_dim": 5}).blocks[0].mlp.w_down.in_features == 5
        assert DiT(**SMALL, mlp_ratio=2.5).blocks[0].mlp.fc1.out_features == 40

    def test_copies_and_pickles(self):
        model = randomised(DiT(**SMALL))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(*batch(model)), model(*batch(model)))

    def test_a_hook_can_replace_what_a_block_returns(self):
        model = randomised(DiT(**SMALL))
        x, t, y = batch(model)
        skipped = nn.ModuleList([model.blocks[0]])
        handle = model.blocks[1].register_forward_hook(lambda block, inputs, output: inputs[0])
        hooked = model(x, t, y)
        handle.remove()
        model.blocks = skipped
        assert torch.equal(hooked, model(x, t, y))


class TestBadInput:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"patch_size": 3}, "patches of 3 do not tile an image of 4 x 4"),
            ({"patch_size": 0}, "patches of 0 do not tile"),
            ({"num_heads": 3}, "3 heads do not divide the width 16"),
            ({"hidden_size": 18, "num_heads": 1}, "multiple of 4, got 18"),
            ({"attention": "ful"}, "unknown attention 'ful'"),
            ({"mlp": "relu"}, r"unknown mlp 'relu': choose one of \['gelu', 'moe', 'swiglu'\]"),
            ({"mlp": "moe", "mlp_options": {"num_experts": 2, "k": 3}}, "k = 3 experts a token out of 2"),
        ],
    )
    def test_sizes_and_names(self, options, message):
        with pytest.raises(ValueError, match=message):
            DiT(**{**SMALL, **options})

    def test_image_of_another_size(self):
        with pytest.raises(ValueError, match=r"\(1, 8, 8\) given, this model takes \(1, 4, 4\)"):
            DiT(**SMALL)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))

    @pytest.mark.parametrize("label", [-1, 11])
    def test_unknown_label(self, label):
        with pytest.raises(
            ValueError, match=f"run from {label} to {label}; this model knows 0..9 and 10 for 'no label'"
        ):
            DiT(**SMALL)(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.tensor([label]))

    def test_both_or_neither_of_label_and_embedding(self):
        model = DiT(**SMALL)
        x, t, y = batch(model)
        with pytest.raises(ValueError, match="'no label' is y = 10"):
            model(x, t, None)
        with pytest.raises(ValueError, match="one of the two"):
            model(x, t, y, cond=model.embed_label(y))


class TestLayers:
    def test_patches_equal_a_strided_convolution(self):
        layer, x = PatchEmbed(2, 3, 8).double(), torch.randn(2, 3, 6, 4, dtype=torch.float64)
        kernel = layer.proj.weight.view(8, 3, 2, 2)
        expected = F.conv2d(x, kernel, layer.proj.bias, stride=2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)

    def test_modulate(self):
        x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
        torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale) + shift, atol=1e-6, rtol=0)
        assert torch.equal(modulate(x, 0 * shift, 0 * scale), x)

    def test_feed_forward_networks_against_their_formulas(self):
        x = torch.randn(5, 4, dtype=torch.float64)
        gelu, gated = GeluMLP(4, 7).double(), SwiGLU(4, 7).double()
        inner = x @ gelu.fc1.weight.T + gelu.fc1.bias
        inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        torch.testing.assert_close(gelu(x), inner @ gelu.fc2.weight.T + gelu.fc2.bias, atol=1e-12, rtol=0)
        gate, up = x @ gated.w_in.weight[:7].T, x @ gated.w_in.weight[7:].T
        expected = (gate * torch.sigmoid(gate) * up) @ gated.w_down.weight.T
        torch.testing.assert_close(gated(x), expected, atol=1e-12, rtol=0)
        assert not any("bias" in name for name in gated.state_dict())

    def test_null_row(self):
        assert LabelEmbedder(10, 4).weight.shape == (11, 4)


class TestBlock:
    def test_against_its_equations(self):
        block = randomised(DiTBlock(8, 2)).double()
        x, c = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c)[:, None].split(8, -1)

        def norm(a):
            return (a - a.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

        h = x + gate_a * block.attn(norm(x) * (1 + scale_a) + shift_a)
        h = h + gate_m * block.mlp(norm(h) * (1 + scale_m) + shift_m)
        torch.testing.assert_close(block(x, c), h, atol=1e-12, rtol=0)

    def test_epsilons(self):
        tiny = torch.randn(1, 2, 8) * 1e-4
        c = torch.randn(1, 8)
        outputs = [
            randomised(DiTBlock(8, 2, norm_eps=a, mlp_norm_eps=b))(tiny, c)
            for a, b in ((1e-6, 1e-6), (1e-2, 1e-6), (1e-6, 1e-2))
        ]
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4
        assert (outputs[0] - outputs[2]).abs().max() > 1e-4


def test_presets_have_the_paper_s_shapes():
    assert set(DIT_CONFIGS) == {f"DiT-{s}/{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    assert DIT_CONFIGS["DiT-XL/2"]["hidden_size"] == 1152 and DIT_CONFIGS["DiT-XL/2"]["depth"] == 28
