import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minilib import costs
from minilib.attention import full_attention
from minilib.models import DIT_CONFIGS, SD3_CONFIGS, DiT, DiTBlock, MMDiT, MMDiTBlock, UNet
from minilib.models.mmdit_configs import mmdit_config_from_diffusers
from minilib.models.unet_blocks import SpatialTransformer
from minilib.profiling import count_flops, count_parameters, saved_activation_bytes


def meta(build, **config):
    with torch.device("meta"):
        return build(**config)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class TestAttention:
    @pytest.mark.parametrize("b, h, n, m, d", [(1, 1, 1, 1, 1), (2, 3, 7, 11, 5), (1, 4, 64, 77, 32)])
    def test_forward_and_backward_to_the_integer(self, b, h, n, m, d):
        q, k, v = (torch.zeros(b, h, r, d, device="meta", requires_grad=True) for r in (n, m, m))
        assert counted(lambda: full_attention(q, k, v)) == costs.attention_flops(b, h, n, m, d)
        both = counted(lambda: full_attention(q, k, v).sum().backward())
        backward = costs.attention_backward_flops(b, h, n, m, d, recompute=False)
        assert (
            both
            == costs.attention_flops(b, h, n, m, d) + backward
            == 3 * costs.attention_flops(b, h, n, m, d)
        )

    @pytest.mark.parametrize("mask", [None, "bool", "float"])
    def test_the_cpu_counts_as_meta_once_it_is_registered(self, mask):
        costs.register_cpu_attention_flops()
        costs.register_cpu_attention_flops()  # idempotent
        sizes = b, h, n, m, d = 2, 3, 8, 12, 16
        given = {None: None, "bool": torch.ones(n, m, dtype=torch.bool), "float": torch.zeros(n, m)}[mask]

        def run(device, gradient):
            q, k, v = (torch.ones(b, h, r, d, device=device, requires_grad=gradient) for r in (n, m, m))
            there = None if given is None else given.to(device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=there)
            if gradient:
                out.sum().backward()

        assert (
            counted(lambda: run("cpu", False))
            == counted(lambda: run("meta", False))
            == costs.attention_flops(*sizes)
        )
        backward = costs.attention_backward_flops(*sizes)
        assert counted(lambda: run("cpu", True)) == costs.attention_flops(*sizes) + backward
        # The one difference to the plain products of the meta device: q k^T is made again.
        again = backward - costs.attention_backward_flops(*sizes, recompute=False)
        assert (
            counted(lambda: run("cpu", True)) - counted(lambda: run("meta", True))
            == again
            == 2 * b * h * n * m * d
        )

    def test_a_formula_that_torch_has_already_is_left(self, monkeypatch):
        from torch.utils import flop_counter

        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        monkeypatch.setitem(flop_counter.flop_registry, op, lambda *args, **kwargs: 7)
        costs.register_cpu_attention_flops()
        q = torch.ones(1, 1, 2, 4)
        assert counted(lambda: F.scaled_dot_product_attention(q, q, q)) == 7

    def test_a_model_on_the_cpu(self):
        costs.register_cpu_attention_flops()
        model = DiT(input_size=4, hidden_size=16, depth=2, num_heads=2)
        inputs = torch.zeros(3, 1, 4, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long)
        with torch.no_grad():
            assert counted(lambda: model(*inputs)) == count_flops(model, *inputs).flops
        assert count_flops(model, *inputs).flops == costs.dit_flops(model.config, batch=3)


#: Peebles and Xie 2023, table 4, and Ma et al. 2024 (SiT, table 1: SiT-XL/2 is DiT-XL/2): millions of parameters, GMAC.
PUBLISHED = {
    "DiT-S/2": (33, 6.06),
    "DiT-B/2": (130, 23.01),
    "DiT-L/2": (458, 80.71),
    "DiT-XL/2": (675, 118.64),
}


class TestDiT:
    @pytest.mark.parametrize("name", DIT_CONFIGS)
    def test_at_the_papers_sizes_to_the_integer(self, name):
        config = DIT_CONFIGS[name]
        model, size = meta(DiT, **config), config["input_size"]
        inputs = torch.zeros(2, 4, size, size), torch.zeros(2), torch.zeros(2, dtype=torch.long)
        assert count_flops(model, *inputs).flops == costs.dit_flops(config, batch=2)
        assert count_parameters(model) == costs.dit_parameters(config)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_as_published(self, name):
        millions, gmac = PUBLISHED[name]
        assert round(costs.dit_parameters(DIT_CONFIGS[name]) / 1e6) == millions
        assert costs.dit_flops(DIT_CONFIGS[name]) / 2e9 == pytest.approx(gmac, abs=0.02)

    @pytest.mark.parametrize("learn_sigma, patch, ratio", [(True, 2, 4.0), (False, 1, 2.5)])
    def test_options(self, learn_sigma, patch, ratio):
        model = DiT(4, patch, 3, 16, 2, 2, ratio, learn_sigma=learn_sigma)
        inputs = torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        assert count_flops(model, *inputs).flops == costs.dit_flops(model.config)
        assert count_parameters(model) == costs.dit_parameters(model.config)

    def test_other_networks_are_refused(self):
        with pytest.raises(ValueError, match="mlp = 'moe' given"):
            costs.dit_flops({"mlp": "moe"})
        with pytest.raises(ValueError, match="unknown options \\['wdth'\\]"):
            costs.dit_parameters({"wdth": 3})

    def test_where_attention_costs_as_much_as_the_rest(self):
        d, n = 32, 6 * 32
        assert costs.transformer_flops(1, n, d) == 2 * costs.attention_flops(1, 1, n, n, d)


class TestMMDiT:
    @pytest.mark.parametrize(
        "name, billions", [("SD3-medium", 2.03), ("SD3.5-medium", 2.24), ("SD3.5-large", 8.06)]
    )
    def test_at_the_released_sizes_to_the_integer(self, name, billions):
        config = mmdit_config_from_diffusers(SD3_CONFIGS[name])
        model = meta(MMDiT, **config)
        inputs = (
            torch.zeros(1, 16, 128, 128),
            torch.zeros(1),
            torch.zeros(1, 333, 4096),
            None,
            torch.zeros(1, 2048),
        )
        assert count_flops(model, *inputs).flops == costs.mmdit_flops(config, 128, 128, 333)
        assert count_parameters(model) == costs.mmdit_parameters(config)
        assert costs.mmdit_parameters(config) / 1e9 == pytest.approx(billions, abs=0.02)

    @pytest.mark.parametrize("pre_only", [False, True])
    @pytest.mark.parametrize("query", [False, True])
    @pytest.mark.parametrize("dual", [False, True])
    def test_a_block(self, pre_only, query, dual):
        block = MMDiTBlock(
            24, 2, mlp_ratio=2.5, context_pre_only=pre_only, unused_context_query=query, dual_attention=dual
        )
        flops = costs.mmdit_block_flops(
            3,
            10,
            5,
            24,
            mlp_ratio=2.5,
            context_pre_only=pre_only,
            unused_context_query=query,
            dual_attention=dual,
        )
        assert (
            count_flops(block, torch.zeros(3, 10, 24), torch.zeros(3, 5, 24), torch.zeros(3, 24)).flops
            == flops
        )

    @pytest.mark.parametrize(
        "options", [{"pooled_dim": 6}, {"qk_norm": "", "dual_attention_layers": (0,)}, {}]
    )
    def test_a_small_model(self, options):
        model = MMDiT(8, 2, 3, 16, 2, 2, context_dim=10, **options)
        pooled = torch.zeros(2, 6) if "pooled_dim" in options else None
        inputs = torch.zeros(2, 3, 4, 8), torch.zeros(2), torch.zeros(2, 7, 10), None, pooled
        assert count_flops(model, *inputs).flops == costs.mmdit_flops(model.config, 4, 8, 7, batch=2)
        assert count_parameters(model) == costs.mmdit_parameters(model.config)

    def test_latents_that_patches_do_not_tile(self):
        with pytest.raises(ValueError, match="do not tile"):
            costs.mmdit_flops({"patch_size": 2}, 4, 5, 7)


class TestUNet:
    @pytest.mark.parametrize("context_dim, depth", [(768, 1), (0, 2)])
    def test_transformer_at_the_sizes_of_stable_diffusion(self, context_dim, depth):
        for width, side in ((320, 64), (640, 32), (1280, 16), (1280, 8)):
            block = meta(
                SpatialTransformer,
                dim=width,
                num_heads=8,
                depth=depth,
                context_dim=context_dim,
                num_groups=32,
            )
            x, text = torch.zeros(2, width, side, side), torch.zeros(2, 77, 768) if context_dim else None
            flops = costs.spatial_transformer_flops(2, side * side, width, 77, context_dim, depth=depth)
            assert count_flops(block, x, text).flops == flops

    def test_the_sum_over_a_model(self):
        model = UNet(block_out_channels=(8, 16, 16), cross_attention_dim=12, norm_num_groups=4)
        sides: list[int] = []
        layers = [m for m in model.modules() if isinstance(m, SpatialTransformer)]
        for layer in layers:
            layer.register_forward_hook(
                lambda m, args, out: sides.append(
                    costs.spatial_transformer_flops(1, out.shape[2] * out.shape[3], out.shape[1], 5, 12)
                )
            )
        costs.register_cpu_attention_flops()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 5, 12))
        names = {n for n, m in model.named_modules() if isinstance(m, SpatialTransformer)}
        found = [
            sum(c.values())
            for name, c in counter.get_flop_counts().items()
            if name.split(".", 1)[-1] in names
        ]
        assert len(sides) == len(layers) == len(found) and sum(sides) == sum(found) > 0


class TestBytes:
    @pytest.mark.parametrize(
        "b, n, d, h, ratio", [(1, 16, 32, 2, 4.0), (3, 49, 64, 4, 4.0), (2, 5, 24, 3, 2.5)]
    )
    def test_a_block_to_the_byte(self, b, n, d, h, ratio):
        block = DiTBlock(d, h, mlp_ratio=ratio)
        x, c = torch.randn(b, n, d, requires_grad=True), torch.randn(b, d, requires_grad=True)
        expected = costs.dit_block_activation_bytes(b, n, d, h, mlp_ratio=ratio)
        assert saved_activation_bytes(block, x, c) == expected

    def test_blocks_share_nothing_but_the_condition(self):
        b, n, d, h = 2, 16, 32, 2
        blocks = torch.nn.ModuleList(DiTBlock(d, h) for _ in range(3))
        x, c = torch.randn(b, n, d, requires_grad=True), torch.randn(b, d, requires_grad=True)

        class Stack(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = blocks

            def forward(self, x, c):
                for block in self.blocks:
                    x = block(x, c)
                return x

        one = costs.dit_block_activation_bytes(b, n, d, h)
        assert saved_activation_bytes(Stack(), x, c) == 3 * one - 2 * 4 * b * d

    def test_the_weights_that_a_fused_attention_saves(self):
        q = torch.randn(2, 3, 32, 8, requires_grad=True)

        class Attend(torch.nn.Module):
            def __init__(self, name):
                super().__init__()
                from minilib.attention import get_attention

                self.attend = get_attention(name)

            def forward(self, q):
                return self.attend(q, q, q)

        fused, plain = (saved_activation_bytes(Attend(name), q) for name in ("full", "naive"))
        assert plain - fused >= costs.attention_weight_bytes(2, 3, 32, 32) - q.nbytes - 4 * 2 * 3 * 32


class TestExponent:
    @pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
    def test_exact_power_law(self, power):
        sizes = [256, 1024, 2304, 4096]
        value, low, high = costs.fit_exponent(sizes, [3e-6 * n**power for n in sizes])
        assert value == pytest.approx(power, abs=1e-12) and high - low < 1e-6

    def test_against_scipy_and_coverage(self):
        from scipy.stats import linregress
        from scipy.stats import t as student

        generator = torch.Generator().manual_seed(0)
        sizes = [256.0, 512.0, 1024.0, 2048.0, 4096.0]
        covered = 0
        for _ in range(400):
            noise = 0.1 * torch.randn(5, generator=generator, dtype=torch.float64)
            times = [n**1.5 * math.exp(float(e)) for n, e in zip(sizes, noise, strict=True)]
            fit = costs.fit_exponent(sizes, times)
            line = linregress([math.log(n) for n in sizes], [math.log(t) for t in times])
            half = line.stderr * student.ppf(0.95, len(sizes) - 2)
            assert fit == pytest.approx((line.slope, line.slope - half, line.slope + half), abs=1e-9)
            covered += fit.low <= 1.5 <= fit.high
        assert 0.85 < covered / 400 < 0.95

    def test_a_wider_level_is_a_wider_interval(self):
        sizes, times = [1, 2, 4, 8], [1, 2.3, 3.8, 8.1]
        narrow, wide = (costs.fit_exponent(sizes, times, level=p) for p in (0.5, 0.99))
        assert wide.low < narrow.low < narrow.high < wide.high and wide.value == narrow.value

    def test_refusals(self):
        with pytest.raises(ValueError, match="at least 3"):
            costs.fit_exponent([1, 2], [1, 2])
        with pytest.raises(ValueError, match="positive"):
            costs.fit_exponent([1, 2, 3], [1, 0, 2])
        with pytest.raises(ValueError, match="all sizes are 2"):
            costs.fit_exponent([2, 2, 2], [1, 2, 3])
