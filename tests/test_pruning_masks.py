import math

import pytest
import torch
from torch import nn

from minilib.models import DiT, MMDiT, UNet
from minilib.profiling import count_parameters
from minilib.pruning.masks import (
    HardConcreteMasks,
    Site,
    alive_probability,
    find_sites,
    hard_concrete,
    keep_top,
    maskable_parameters,
    masked,
    ones,
    removed_parameters,
)


def filled(model, seed=0):
    """Weights as of a trained model: nothing is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5)
    return model.eval().requires_grad_(False)


def dit(**options):
    return filled(DiT(input_size=4, hidden_size=16, depth=2, num_heads=4, mlp_ratio=2.0, **options))


def inputs(n=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=g), torch.full((n,), 500), torch.arange(n)


SITES = {
    "a": Site("a", "head", 2, 4, 100, (), ()),
    "b": Site("b", "neuron", 4, 1, 7, (), ()),
    "c": Site("c", "neuron", 2, 1, 7, (), ()),
}


class TestSites:
    def test_of_a_dit(self):
        sites = find_sites(dit())
        assert list(sites) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
        head, neuron = sites["blocks.0.attn"], sites["blocks.0.mlp"]
        assert (head.kind, head.units, head.width) == ("head", 4, 4)
        assert head.parameters == 3 * 4 * (16 + 1) + 4 * 16
        assert (neuron.kind, neuron.units, neuron.width, neuron.parameters) == ("neuron", 32, 1, 16 + 1 + 16)

    def test_all_units_are_all_of_the_layers_but_the_last_biases(self):
        model = dit()
        layers = [m for b in model.blocks for m in (b.attn, b.mlp)]
        assert maskable_parameters(find_sites(model)) == sum(map(count_parameters, layers)) - 4 * 16

    def test_gated_networks_have_two_rows_a_neuron(self):
        site = find_sites(dit(mlp="swiglu"))["blocks.0.mlp"]
        assert site.units == 32 and site.parameters == 2 * 16 + 16
        net = UNet(
            block_out_channels=(8, 16), attention_levels=(1,), norm_num_groups=4, cross_attention_dim=12
        )
        sites = find_sites(net)
        feed_forward = next(s for s in sites.values() if s.name.endswith(".ff"))
        assert feed_forward.units == 64 and feed_forward.parameters == 2 * (16 + 1) + 16
        cross = next(s for s in sites.values() if s.name.endswith("attn2"))
        assert cross.parameters == 4 * (16 + 12 + 12 + 16)

    def test_of_an_mmdit(self):
        model = MMDiT(sample_size=8, hidden_size=16, depth=2, num_heads=4, context_dim=12, pooled_dim=None)
        sites = find_sites(model)
        whole, last = sites["blocks.0.attn"], sites["blocks.1.attn"]
        assert whole.parameters == 4 * (2 * 3 * 17 + 2 * 16)
        assert last.outs == ("proj",) and last.parameters == 4 * ((3 + last.ins[1][1]) * 17 + 16)
        assert "blocks.0.context_mlp" in sites and "blocks.1.context_mlp" not in sites

    def test_a_model_without_any(self):
        with pytest.raises(ValueError, match="Linear has no layer with units"):
            find_sites(nn.Linear(2, 2))


class TestMasked:
    def test_ones_change_no_bit_and_nothing_stays_behind(self):
        model, x = dit(), inputs()
        before = model(*x)
        for options in ({}, {"dtype": torch.bool}, {"dtype": torch.float64}):
            masks = {k: v.to(**options) for k, v in ones(find_sites(model)).items()}
            with masked(model, masks):
                assert torch.equal(model(*x), before)
        assert torch.equal(model(*x), before)

    def test_a_zero_is_a_column_of_zeros(self):
        model, x = dit(), inputs()
        masks = ones(find_sites(model))
        masks["blocks.0.attn"][1] = 0
        masks["blocks.1.mlp"][[3, 30]] = 0
        with masked(model, masks):
            ours = model(*x)
        with torch.no_grad():
            model.blocks[0].attn.proj.weight[:, 4:8] = 0
            model.blocks[1].mlp.fc2.weight[:, [3, 30]] = 0
        assert float((model(*x) - ours).abs().max()) < 1e-5 < float((ours).abs().max())

    def test_any_factor_is_a_scaled_column_and_gets_its_gradient(self):
        model, x = dit().double(), inputs()
        x = (x[0].double(), *x[1:])
        masks = {
            k: torch.rand(len(v), dtype=torch.float64).requires_grad_()
            for k, v in ones(find_sites(model)).items()
        }
        with masked(model, masks):
            out = model(*x).square().sum()
        grads = torch.autograd.grad(out, list(masks.values()))
        for (name, mask), grad in zip(masks.items(), grads, strict=True):
            for unit in (0, len(mask) - 1):
                shifted = {k: v.detach().clone() for k, v in masks.items()}
                values = []
                for h in (1e-6, -1e-6):
                    shifted[name] = mask.detach().clone()
                    shifted[name][unit] += h
                    with masked(model, shifted):
                        values.append(model(*x).square().sum())
                slope = float(values[0] - values[1]) / 2e-6
                assert float(grad[unit]) == pytest.approx(slope, rel=1e-4, abs=1e-7)

    def test_a_batch_as_long_as_the_hidden_layer(self):
        """A mask is for channels, never for samples."""
        model = dit()
        x = inputs(32)
        x = (x[0], x[1], x[2] % 10)
        mask = torch.zeros(32)
        mask[0] = 1
        with masked(model, {"blocks.0.mlp": mask}):
            all_at_once = model(*x)
            one = model(*(part[:1] for part in x))
        assert float((all_at_once[:1] - one).abs().max()) < 1e-5

    def test_a_u_net_and_an_mmdit(self):
        g = torch.Generator().manual_seed(0)
        net = filled(
            UNet(block_out_channels=(8, 16), attention_levels=(1,), norm_num_groups=4, cross_attention_dim=12)
        )
        call = (torch.randn(1, 3, 8, 8, generator=g), torch.tensor([9]), torch.randn(1, 3, 12, generator=g))
        before = net(*call)
        with masked(net, ones(find_sites(net))):
            assert torch.equal(net(*call), before)
        masks = {k: torch.zeros_like(v) for k, v in ones(find_sites(net)).items()}
        with masked(net, masks):
            assert not torch.allclose(net(*call), before)

    def test_refusals(self):
        model = dit()
        for masks, message in (
            ({}, "no mask given"),
            ({"blocks.7.attn": torch.ones(4)}, "no site is called 'blocks.7.attn'"),
            ({"blocks.0.attn": torch.ones(3)}, "has 4 heads"),
            ({"blocks.0.mlp": torch.ones(1)}, "has 32 neurons"),
        ):
            with pytest.raises(ValueError, match=message), masked(model, masks):
                pass


class TestHardConcrete:
    def test_ends(self):
        far = torch.tensor([-math.inf, math.inf, -4.0, 4.0])
        u = torch.tensor([0.999, 0.001, 0.5, 0.5])
        assert hard_concrete(far, u).tolist() == [0.0, 1.0, 0.0, 1.0]

    def test_formula(self):
        logit, u = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
        s = 1 / (1 + math.exp(-(math.log(0.2 / 0.8) + 0.3) / 0.83))
        assert hard_concrete(logit, u).item() == pytest.approx(1.2 * s - 0.1, rel=1e-12)
        s = 1 / (1 + math.exp(-(math.log(0.7 / 1.3) + 0.3) / 0.83))
        assert hard_concrete(logit, u, epsilon=0.5).item() == pytest.approx(1.2 * s - 0.1, rel=1e-12)

    def test_the_median_is_the_mask_without_noise(self):
        logits = torch.linspace(-2, 2, 9)
        assert torch.equal(hard_concrete(logits), hard_concrete(logits, torch.full((9,), 0.5)))

    @pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5, 3.0])
    def test_how_often_it_is_not_zero(self, logit):
        u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        share = float((hard_concrete(torch.full_like(u, logit), u) > 0).double().mean())
        assert share == pytest.approx(float(alive_probability(torch.tensor(logit))), abs=2e-5)

    def test_the_gradient_is_zero_where_it_is_clipped(self):
        logits = torch.tensor([-5.0, 0.2, 5.0], requires_grad=True)
        hard_concrete(logits).sum().backward()
        assert logits.grad[0] == 0 and logits.grad[1] > 0 and logits.grad[2] == 0

    @pytest.mark.parametrize(
        "options", [{"temperature": 0.0}, {"low": 0.0}, {"high": 1.0}, {"epsilon": -1.0}]
    )
    def test_refusals(self, options):
        with pytest.raises(ValueError, match="temperature > 0, low < 0, high > 1"):
            hard_concrete(torch.zeros(1), **options)


class TestLearnedMasks:
    def test_noise_is_frozen_until_the_next_draw(self):
        masks = HardConcreteMasks(SITES, init=0.0)
        g = torch.Generator().manual_seed(0)
        masks.draw(g)
        first, again = masks(), masks()
        masks.draw(g)
        other = masks()
        assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k]) for k in SITES)
        masks.draw(torch.Generator().manual_seed(0))
        assert all(torch.equal(first[k], masks()[k]) for k in SITES)

    def test_without_noise(self):
        masks = HardConcreteMasks(SITES, init=0.7)
        want = float(hard_concrete(torch.tensor(0.7)))
        assert {k: v.tolist() for k, v in masks().items()} == {
            k: pytest.approx([want] * s.units) for k, s in SITES.items()
        }
        masks.draw(torch.Generator().manual_seed(0))
        masks.draw(None)
        assert masks()["a"].tolist() == pytest.approx([want] * 2)

    def test_infinite_logits_are_the_model_itself(self):
        model, x = dit(), inputs()
        masks = HardConcreteMasks(find_sites(model), init=math.inf)
        masks.draw(torch.Generator().manual_seed(0))
        before = model(*x)
        with masked(model, masks()):
            assert torch.equal(model(*x), before)

    def test_gradients_reach_the_logits_and_kinds_are_apart(self):
        model, x = dit(), inputs()
        masks = HardConcreteMasks(find_sites(model), init=0.5)
        masks.draw(torch.Generator().manual_seed(0))
        with masked(model, masks()):
            model(*x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in masks.parameters())
        assert [len(p) for p in masks.of_kind("head")] == [4, 4]
        assert [len(p) for p in masks.of_kind("neuron")] == [32, 32]
        with pytest.raises(ValueError, match="unknown kind 'norm'"):
            masks.of_kind("norm")

    def test_penalty(self):
        """Each site counts the same within its kind, whatever its number of units, and the two kinds are added."""
        masks = HardConcreteMasks(SITES, init=0.0)
        with torch.no_grad():
            for p, value in zip(masks.logits, ([1.0, 3.0], [0.0, 0.0, 0.0, 4.0], [2.0, 2.0]), strict=True):
                p.copy_(torch.tensor(value))

        def s(v):
            return 1 / (1 + math.exp(-0.4 * v - 1))

        neurons = ((3 * s(0) + s(4)) / 4 + s(2)) / 2
        assert masks.penalty().item() == pytest.approx((s(1) + s(3)) / 2 + neurons, rel=1e-6)
        only = HardConcreteMasks({"b": SITES["b"]}, init=0.0)
        assert only.penalty().item() == pytest.approx(s(0), rel=1e-6)

    def test_scores_are_copies(self):
        masks = HardConcreteMasks(SITES, init=1.0)
        scores = masks.scores()
        with torch.no_grad():
            masks.logits[0].fill_(9.0)
        assert scores["a"].tolist() == [1.0, 1.0] and not scores["a"].requires_grad
        with pytest.raises(ValueError, match="no site given"):
            HardConcreteMasks({})


class TestKeepTop:
    SCORES = {
        "a": torch.tensor([0.0, 100.0]),
        "b": torch.tensor([1.0, 9.0, 8.0, 7.0]),
        "c": torch.tensor([2.0, 3.0]),
    }

    def kept(self, share, scope):
        masks = keep_top(self.SCORES, share, SITES, scope=scope)
        assert all(m.dtype == torch.bool for m in masks.values()) and list(masks) == list(self.SCORES)
        return {k: m.int().tolist() for k, m in masks.items()}

    def test_scopes(self):
        assert self.kept(0.5, "kind") == {"a": [0, 1], "b": [0, 1, 1, 1], "c": [0, 0]}
        assert self.kept(0.5, "layer") == {"a": [0, 1], "b": [0, 1, 1, 0], "c": [0, 1]}
        assert self.kept(0.5, "model") == {"a": [0, 1], "b": [0, 1, 1, 1], "c": [0, 0]}
        assert self.kept(0.25, "model") == {"a": [0, 1], "b": [0, 1, 0, 0], "c": [0, 0]}

    def test_ends_and_rounding(self):
        assert self.kept(1.0, "kind") == {"a": [1, 1], "b": [1] * 4, "c": [1, 1]}
        assert self.kept(0.0, "layer") == {"a": [0, 0], "b": [0] * 4, "c": [0, 0]}
        assert sum(self.kept(0.8, "kind")["a"]) == 2 and sum(self.kept(0.7, "kind")["a"]) == 1

    def test_of_equal_scores_the_earlier_stays(self):
        masks = keep_top({"b": torch.ones(4)}, 0.5, SITES)
        assert masks["b"].tolist() == [True, True, False, False]

    def test_removed_parameters(self):
        masks = keep_top(self.SCORES, 0.5, SITES, scope="kind")
        assert removed_parameters(SITES, masks) == 100 + 3 * 7
        assert maskable_parameters(SITES) == 200 + 6 * 7

    def test_refusals(self):
        nan = {"b": torch.tensor([1.0, math.nan, 0.0, 0.0])}
        for scores, share, scope, message in (
            (self.SCORES, 1.2, "kind", "lies between 0 and 1"),
            (self.SCORES, 0.5, "type", "unknown scope 'type'"),
            (nan, 0.5, "kind", "hold NaN"),
            ({"z": torch.ones(2)}, 0.5, "kind", "fit no site"),
            ({"b": torch.ones(3)}, 0.5, "kind", "fit no site"),
        ):
            with pytest.raises(ValueError, match=message):
                keep_top(scores, share, SITES, scope=scope)
