"""Replacing attention for good, and processors with parameters in the place of functions and back."""

import copy

import pytest
import torch
from torch import nn

from minilib.attention import (
    Attention,
    CausalAttention,
    RotaryAttention,
    attention_processor,
    full_attention,
    get_attention,
    make_attention_layer,
    naive_attention,
    record_attention,
    register_attention,
    replace_attention,
    scale_heads,
)
from minilib.attention import registry as registry_module
from minilib.attention.functional import softmax_flops
from minilib.attention.latents import LatentAttention
from minilib.attention.registry import Case
from minilib.models import DiT

DIM, HEADS, GRID = 16, 2, (4, 4)


def model(count=3, **options):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(DIM), Attention(DIM, HEADS, **options)) for _ in range(count)]
    return nn.ModuleDict({f"block{i}": block for i, block in enumerate(blocks)})


def run(blocks, x):
    for block in blocks.values():
        x = x + block(x)
    return x


def tokens(n=16):
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(1))


def latents():
    return LatentAttention(HEADS, DIM // HEADS, grid=GRID, group=2, latents=1)


def everywhere(name, layer):
    return True


class TestProcessors:
    def test_the_layers_keep_their_weights(self):
        old = model()
        new = copy.deepcopy(old)
        done = replace_attention(
            new,
            lambda n, layer: n != "block1.1",
            lambda n, layer: get_attention("window", grid=GRID, window=4),
        )
        assert done.replaced == ("block0.1", "block2.1")
        assert done.inherited == done.new == done.left == ()
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
        assert new["block1"][1].processor is full_attention
        # A window that covers the grid changes nothing else.
        torch.testing.assert_close(run(new, tokens()), run(old, tokens()), atol=1e-6, rtol=0)

    def test_a_processor_with_parameters_brings_them_into_the_model(self):
        blocks = model()
        before = set(dict(blocks.named_parameters()))
        done = replace_attention(blocks, lambda n, layer: n == "block1.1", lambda n, layer: latents())
        added = set(dict(blocks.named_parameters())) - before
        assert added == set(done.new) and "block1.1.processor.latents" in added and done.left == ()
        run(blocks, tokens()).square().sum().backward()
        assert all(p.grad is not None for p in blocks.parameters())

    def test_back_to_a_function_leaves_them_behind(self):
        blocks = model()
        keys = list(blocks.state_dict())
        new = replace_attention(blocks, everywhere, lambda n, layer: latents()).new
        done = replace_attention(blocks, everywhere, lambda n, layer: full_attention)
        assert set(done.left) == set(new) and done.new == done.inherited == ()
        assert list(blocks.state_dict()) == keys
        assert torch.equal(run(blocks, tokens()), run(model(), tokens()))

    def test_from_one_module_to_the_next_what_fits_goes_over(self):
        blocks = model(1)
        replace_attention(blocks, everywhere, lambda n, layer: latents())
        old = {k: v.clone() for k, v in blocks["block0"][1].processor.state_dict().items()}
        done = replace_attention(
            blocks,
            everywhere,
            lambda n, layer: LatentAttention(HEADS, DIM // HEADS, grid=GRID, group=2, latents=3),
        )
        assert done.new == done.left == ("block0.1.processor.latents",)
        assert len(done.inherited) == len(old) - 1
        now = blocks["block0"][1].processor.state_dict()
        assert all(torch.equal(now[key], old[key]) for key in old if key != "latents")

    def test_none_leaves_a_layer_alone(self):
        blocks = model()
        done = replace_attention(
            blocks, everywhere, lambda n, layer: naive_attention if n == "block2.1" else None
        )
        assert done.replaced == ("block2.1",) and blocks["block0"][1].processor is full_attention

    def test_dtype_and_mode_are_those_of_the_layer(self):
        blocks = model().double().eval()
        replace_attention(blocks, everywhere, lambda n, layer: latents())
        processor = blocks["block0"][1].processor
        assert processor.latents.dtype == torch.float64 and not processor.training

    def test_the_model_itself_may_be_the_layer(self):
        layer = Attention(DIM, HEADS)
        done = replace_attention(layer, everywhere, lambda n, layer: latents())
        assert done.replaced == ("",) and "processor.latents" in done.new


class TestLayers:
    def test_inherits_what_has_the_same_name_and_shape(self):
        blocks = model()
        weights = {key: value.clone() for key, value in blocks.state_dict().items()}
        done = replace_attention(
            blocks, everywhere, lambda n, layer: RotaryAttention(DIM, HEADS, qk_norm=True)
        )
        for i in range(3):
            assert isinstance(blocks[f"block{i}"][1], RotaryAttention)
        assert set(done.inherited) == {k for k in weights if ".1." in k} and done.left == ()
        assert {key.split(".", 2)[2] for key in done.new} == {"q_norm.weight", "k_norm.weight"}
        now = blocks.state_dict()
        assert all(torch.equal(now[key], value) for key, value in weights.items())

    def test_an_equal_layer_gives_equal_outputs(self):
        blocks = model(variant="causal")
        before = run(blocks, tokens())
        replace_attention(blocks, everywhere, lambda n, layer: CausalAttention(DIM, HEADS))
        torch.testing.assert_close(run(blocks, tokens()), before, atol=1e-6, rtol=0)

    def test_other_shapes_are_reported_and_left(self):
        blocks = model(1)

        class Wide(Attention):
            def __init__(self):
                super().__init__(DIM, HEADS)
                self.proj = nn.Linear(DIM, DIM, bias=False)
                self.qkv = nn.Linear(DIM, 3 * DIM + 3)

        done = replace_attention(blocks, everywhere, lambda n, layer: Wide())
        assert done.inherited == ("block0.1.proj.weight",)
        assert set(done.new) == {"block0.1.qkv.weight", "block0.1.qkv.bias"}
        assert set(done.left) == {"block0.1.qkv.weight", "block0.1.qkv.bias", "block0.1.proj.bias"}
        assert (
            str(done) == "1 attention layers replaced (block0.1): 1 tensors inherited, 2 new, 3 left behind"
        )

    def test_frozen_weights_stay_frozen_and_new_ones_train(self):
        blocks = model(1).double()
        blocks.requires_grad_(False)
        replace_attention(blocks, everywhere, lambda n, layer: RotaryAttention(DIM, HEADS, qk_norm=True))
        trains = {name for name, p in blocks.named_parameters() if p.requires_grad}
        assert trains == {"block0.1.q_norm.weight", "block0.1.k_norm.weight"}
        assert all(p.dtype == torch.float64 for p in blocks.parameters())

    def test_a_shared_layer_is_replaced_in_every_place(self):
        shared = Attention(DIM, HEADS)
        blocks = nn.ModuleList([shared, nn.ModuleDict({"again": shared})])
        done = replace_attention(blocks, everywhere, lambda n, layer: CausalAttention(DIM, HEADS))
        assert done.replaced == ("0",) and blocks[0] is blocks[1]["again"]
        assert isinstance(blocks[0], CausalAttention)

    def test_any_layer_of_the_registry(self):
        blocks = model(1)
        done = replace_attention(
            blocks,
            everywhere,
            lambda n, layer: make_attention_layer(
                "latents", DIM, layer.num_heads, grid=GRID, group=2, latents=2
            ),
        )
        assert "block0.1.qkv.weight" in done.inherited and "block0.1.processor.latents" in done.new
        run(blocks, tokens()).sum().backward()


class TestErrors:
    def test_nothing_chosen(self):
        with pytest.raises(
            ValueError, match="chooses none of the attention layers: there are block0.1, block1.1"
        ):
            replace_attention(model(), lambda n, layer: False, lambda n, layer: naive_attention)

    def test_nothing_returned(self):
        with pytest.raises(ValueError, match="returned None for each of block0.1, block1.1, block2.1"):
            replace_attention(model(), everywhere, lambda n, layer: None)

    def test_no_attention(self):
        with pytest.raises(ValueError, match="Linear contains no"):
            replace_attention(nn.Linear(2, 2), everywhere, lambda n, layer: naive_attention)

    def test_the_model_itself_cannot_become_another_layer(self):
        with pytest.raises(ValueError, match="can get a new processor only"):
            replace_attention(Attention(DIM, HEADS), everywhere, lambda n, layer: Attention(DIM, HEADS))

    @pytest.mark.parametrize("returned", [3, "window"])
    def test_what_is_no_processor_leaves_the_model_whole(self, returned):
        blocks = model()
        with pytest.raises(TypeError, match=f"returned {returned!r} for 'block2.1'"):
            replace_attention(
                blocks, everywhere, lambda n, layer: returned if n == "block2.1" else naive_attention
            )
        assert all(block[1].processor is full_attention for block in blocks.values())

    def test_a_factory_that_fails_leaves_the_model_whole(self):
        blocks = model()

        def factory(name, layer):
            if name == "block2.1":
                raise RuntimeError("no")
            return CausalAttention(DIM, HEADS)

        before = list(blocks.modules())
        with pytest.raises(RuntimeError):
            replace_attention(blocks, everywhere, factory)
        assert list(blocks.modules()) == before


class TestExchange:
    """``layer.processor`` takes a function after a module, and the other way round."""

    def test_by_assignment(self):
        layer, module = Attention(DIM, HEADS), latents()
        plain = layer(tokens())
        keys = list(layer.state_dict())
        for _ in range(2):
            layer.processor = module
            assert layer.processor is module and "processor.latents" in layer.state_dict()
            assert not torch.equal(layer(tokens()), plain)
            layer.processor = full_attention
            assert layer.processor is full_attention and list(layer.state_dict()) == keys
            assert torch.equal(layer(tokens()), plain)

    @pytest.mark.parametrize(
        "outer, inner", [("module", "function"), ("function", "module"), ("module", "module")]
    )
    def test_in_a_context(self, outer, inner):
        layer = Attention(DIM, HEADS)
        kinds = {"module": latents(), "function": naive_attention}
        layer.processor = first = kinds[outer]
        second = latents() if inner == "module" else full_attention
        keys, expected = list(layer.state_dict()), layer(tokens())
        with attention_processor(layer, lambda n, a: second):
            assert layer.processor is second
        assert layer.processor is first and list(layer.state_dict()) == keys
        assert torch.equal(layer(tokens()), expected)
        with pytest.raises(RuntimeError), attention_processor(layer, lambda n, a: second):
            raise RuntimeError
        assert layer.processor is first and list(layer.state_dict()) == keys

    def test_watched_parameters_stay_the_model_s(self):
        layer = make_attention_layer("latents", DIM, HEADS, grid=GRID, group=2, latents=1)
        names, expected, module = list(layer.state_dict()), layer(tokens()), layer.processor
        with scale_heads(layer, {"": torch.ones(HEADS)}):
            assert list(layer.state_dict()) == names and "processor.latents" in dict(layer.named_parameters())
            assert torch.equal(layer(tokens()), expected)
            with attention_processor(layer, lambda n, a: full_attention):
                assert "processor.latents" not in layer.state_dict()
            assert list(layer.state_dict()) == names
            layer.double()
            assert layer(tokens().double()).dtype == torch.float64
            copied = copy.deepcopy(layer)
            assert copied.processor.inner is copied._modules["processor"] is not module
        assert layer.processor is module and list(layer.state_dict()) == names

    def test_recording_needs_softmax_whatever_the_processor_is_made_of(self, monkeypatch):
        monkeypatch.setattr(registry_module, "ATTENTION", dict(registry_module.ATTENTION))
        parts = {"reference": full_attention, "flops": softmax_flops, "cases": (Case({}, n=2),)}

        @register_attention("learned", softmax=True, **parts)
        class Learned(nn.Module):
            def __init__(self, *, width=1):
                super().__init__()
                self.unused = nn.Parameter(torch.zeros(width))

            def forward(self, q, k, v, *, mask=None):
                return full_attention(q, k, v, mask=mask)

        @register_attention("bound", softmax=True, **parts)
        def bound(q, k, v, *, mask=None, option=1):
            return full_attention(q, k, v, mask=mask)

        plain = Attention(DIM, HEADS)
        for name, options in (("learned", {"width": 2}), ("bound", {"option": 2})):
            layer = Attention(DIM, HEADS, variant=name, variant_options=options)
            layer.load_state_dict(plain.state_dict(), strict=False)
            expected = plain(tokens())
            with record_attention(layer) as weights, record_attention(plain) as reference:
                assert torch.equal(layer(tokens()), expected)
                plain(tokens())
            assert torch.equal(weights[""][0], reference[""][0])
        for name, options in (("window", {"grid": GRID, "window": 2}), ("causal", {})):
            layer = Attention(DIM, HEADS, variant=name, variant_options=options)
            with pytest.raises(ValueError, match="not registered as softmax"), record_attention(layer):
                pass
        with pytest.raises(ValueError, match="not registered as softmax"):
            with record_attention(make_attention_layer("latents", DIM, HEADS, grid=GRID, group=2, latents=1)):
                pass


def test_in_a_model_of_the_library():
    torch.manual_seed(0)
    dit = DiT(input_size=8, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 5.0]), torch.tensor([0, 1])
    before = dit(x, t, y)
    done = replace_attention(
        dit, everywhere, lambda n, layer: get_attention("window", grid=(4, 4), window=4, shift=1)
    )
    assert done.replaced == ("blocks.0.attn", "blocks.1.attn")
    torch.testing.assert_close(dit(x, t, y), before, atol=1e-6, rtol=0)
