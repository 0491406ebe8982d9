import pytest
import torch
from torch import nn

from minilib.attention import (
    Attention,
    CrossAttention,
    JointAttention,
    RotaryAttention,
    record_attention,
    scale_heads,
)
from minilib.models import DIT_CONFIGS, DiT, MMDiT, UNet
from minilib.profiling import count_flops, count_parameters
from minilib.pruning.masks import find_sites, keep_top, masked, ones
from minilib.pruning.shrink import ShrunkAttention, shrink_model, shrunk_parameters


def filled(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / max(1, p[0].numel()) ** 0.5)
    return model.eval().requires_grad_(False).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dit(**options):
    options = {"input_size": 4, "hidden_size": 16, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0} | options
    model = filled(DiT(**options))
    return model, (randn(2, 1, 4, 4), torch.tensor([3, 900]), torch.tensor([1, 7]))


def unet():
    model = filled(
        UNet(block_out_channels=(8, 16), attention_levels=(1,), norm_num_groups=4, cross_attention_dim=12)
    )
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return model, (randn(2, 3, 8, 8), torch.tensor([3, 900]), randn(2, 3, 12, seed=1), mask)


def mmdit(**options):
    options = {
        "sample_size": 8,
        "hidden_size": 16,
        "depth": 3,
        "num_heads": 4,
        "context_dim": 12,
        "pooled_dim": None,
    } | options
    model = filled(MMDiT(**options))
    c = model.config["in_channels"]
    return model, (randn(2, c, 8, 8), torch.tensor([3, 900]), randn(2, 5, 12, seed=1))


MODELS = {
    "dit": dit,
    "dit swiglu": lambda: dit(mlp="swiglu"),
    "dit qk-norm": lambda: dit(qk_norm=True),
    "dit naive": lambda: dit(attention="naive"),
    "u-net": unet,
    "mmdit": mmdit,
    "mmdit no norm": lambda: mmdit(qk_norm=""),
    "mmdit unused query": lambda: mmdit(unused_context_query=True),
    "mmdit rope": lambda: mmdit(positions="rope"),
}


def random_masks(model, share=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    sites = find_sites(model)
    return keep_top({k: torch.rand(s.units, generator=g) for k, s in sites.items()}, share, sites)


class TestSameFunction:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("share", [0.75, 0.4])
    def test_as_masked(self, name, share):
        model, call = MODELS[name]()
        masks = random_masks(model, share)
        before, total = model(*call), count_parameters(model)
        with masked(model, masks):
            want = model(*call)
        small = shrink_model(model, masks)
        assert float((small(*call) - want).abs().max()) < 1e-11
        assert float((want - before).abs().max()) > 1e-3, "the units matter"
        assert count_parameters(small) == shrunk_parameters(model, masks) < total
        assert count_parameters(model) == total and torch.equal(model(*call), before), (
            "the model is left alone"
        )

    @pytest.mark.parametrize("name", MODELS)
    def test_layers_that_lose_everything(self, name):
        """The output layer's bias is all that is left, masked or removed."""
        model, call = MODELS[name]()
        masks = random_masks(model)
        for site in list(masks)[:3]:
            masks[site] = torch.zeros_like(masks[site])
        with masked(model, masks):
            want = model(*call)
        assert float((shrink_model(model, masks)(*call) - want).abs().max()) < 1e-11

    @pytest.mark.parametrize("name", MODELS)
    def test_ones_are_the_model_to_the_bit(self, name):
        model, call = MODELS[name]()
        small = shrink_model(model, ones(find_sites(model)))
        assert torch.equal(small(*call), model(*call)) and small is not model

    def test_which_head_and_which_neuron(self):
        """Against weights cut by hand."""
        layer = filled(Attention(8, 2))
        small = shrink_model(layer, {"": torch.tensor([0, 1])})
        rows = [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
        assert torch.equal(small.qkv.weight, layer.qkv.weight[rows])
        assert torch.equal(small.qkv.bias, layer.qkv.bias[rows])
        assert torch.equal(small.proj.weight, layer.proj.weight[:, 4:]) and torch.equal(
            small.proj.bias, layer.proj.bias
        )
        net, _ = unet()
        (name,) = [n for n, s in find_sites(net).items() if s.kind == "neuron"][:1]
        mask = torch.zeros(64)
        mask[[2, 63]] = 1
        old, new = net.get_submodule(name), shrink_model(net, {name: mask}).get_submodule(name)
        assert torch.equal(new.proj.weight, old.proj.weight[[2, 63, 66, 127]]), "value and gate"
        assert torch.equal(new.proj.bias, old.proj.bias[[2, 63, 66, 127]])
        assert torch.equal(new.out.weight, old.out.weight[:, [2, 63]])

    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_mask_with_a_row_for_each_query(self, read_only):
        """If the context is read only, there are queries for the image alone."""
        layer = filled(JointAttention(8, 2, context_pre_only=read_only))
        x, context = randn(1, 3, 8), randn(1, 2, 8, seed=1)
        mask = torch.tril(torch.ones(5, 5, dtype=torch.bool))[None, None]
        keep = torch.tensor([0, 1])
        with scale_heads(layer, {"": keep.double()}):
            want = layer(x, context, mask=mask)
        got = shrink_model(layer, {"": keep})(x, context, mask=mask)
        for a, b in zip(want, got, strict=True):
            assert (a is None and b is None) or float((a - b).abs().max()) < 1e-12

    def test_again(self):
        model, call = dit()
        first = random_masks(model, 0.75)
        small = shrink_model(model, first)
        second = random_masks(small, 0.5, seed=1)
        with masked(small, second):
            want = small(*call)
        smaller = shrink_model(small, second)
        assert float((smaller(*call) - want).abs().max()) < 1e-11
        assert count_parameters(smaller) == shrunk_parameters(small, second)

    def test_gradients_flow_if_they_did(self):
        model, call = dit()
        frozen = shrink_model(model, random_masks(model))
        assert not any(p.requires_grad for p in frozen.parameters())
        trained = shrink_model(model.requires_grad_(), random_masks(model))
        trained(*call).sum().backward()
        assert trained.blocks[0].attn.qkv.weight.grad.abs().sum() > 0

    def test_interventions_still_work(self):
        model, call = dit()
        masks = random_masks(model)
        small = shrink_model(model, masks)
        with record_attention(small) as weights:
            small(*call)
        kept = {k: int(m.sum()) for k, m in masks.items() if k.endswith("attn") and m.any()}
        assert {k: v[0].shape[1] for k, v in weights.items() if v} == kept


class TestOnMeta:
    def test_published_size(self):
        with torch.device("meta"):
            model = DiT(**DIT_CONFIGS["DiT-XL/2"])
        sites = find_sites(model)
        masks = keep_top(
            {k: torch.arange(s.units).float() for k, s in sites.items()}, 0.75, sites, scope="layer"
        )
        small = shrink_model(model, masks)
        removed = 28 * (4 * (4 * 72 * 1152 + 3 * 72) + 1152 * (2 * 1152 + 1))
        assert count_parameters(model) - count_parameters(small) == removed
        call = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        heads = 28 * 4 * (256 * 4 * 72 * 1152 + 2 * 256 * 256 * 72)
        neurons = 28 * 1152 * 256 * 2 * 1152
        assert count_flops(model, *call).macs - count_flops(small, *call).macs == heads + neurons


class TestRefusals:
    def test_masks(self):
        model, _ = dit()
        for masks, message in (
            ({}, "no mask given"),
            ({"blocks.0.attn": torch.tensor([1, 0.5, 1, 1])}, "between 0 and 1"),
            ({"blocks.0.attn": torch.tensor([1, 2, 1, 1])}, "between 0 and 1"),
            ({"blocks.9.attn": torch.ones(4)}, "no site is called"),
            ({"blocks.0.mlp": torch.ones(4)}, "has 32 neurons"),
        ):
            with pytest.raises(ValueError, match=message):
                shrink_model(model, masks)

    def test_attention_that_is_masked_at_the_moment(self):
        model, _ = dit()
        masks = random_masks(model)
        with masked(model, masks), pytest.raises(ValueError, match="leave the with block"):
            shrink_model(model, masks)

    def test_other_attention(self):
        model = nn.Sequential(RotaryAttention(8, 2))
        with pytest.raises(ValueError, match="RotaryAttention, whose heads can be masked but not removed"):
            shrink_model(model, {"0": torch.tensor([1, 0])})

    def test_types(self):
        small = shrink_model(CrossAttention(8, 6, 2), {"": torch.tensor([1, 0])})
        assert small.num_heads == 1 and small.head_dim == 4 and small.context_dim == 6
        assert isinstance(shrink_model(Attention(8, 2), {"": torch.tensor([0, 1])}), ShrunkAttention)
