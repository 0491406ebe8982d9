import copy
import math

import pytest
import torch
import torch.nn.functional as F
from snapshots import assert_untouched, bits, structure
from torch import nn

from minilib.adapters import (
    BottleneckAdapter,
    ZeroConv2d,
    ZeroLinear,
    adapter_names,
    add_affine,
    add_affiner,
    add_lora,
    get_adapter,
    use_adapters,
)
from minilib.intervene import mask_weights, record_outputs
from minilib.models import DiT
from minilib.profiling import count_parameters


def randomise(model, std=0.3):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model


class Small(nn.Module):
    """Two convolutions and two linear layers, so that every kind of target is there."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 8, 1, bias=False)
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 10)
        self.fc2 = nn.Linear(10, 4, bias=False)

    def forward(self, x):
        h = self.point(F.silu(self.conv(x))).flatten(2).transpose(1, 2)
        return self.fc2(F.silu(self.fc1(self.norm(h))))


TARGETS = ["conv", "point", "fc1", "fc2"]


@pytest.fixture
def model():
    return randomise(Small()).double()


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(adapter, seed=2):
    """Give the adapter values as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.3)
    return adapter


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def forms(model):
    return {
        "lora": lambda: add_lora(model, TARGETS, 3, 5.0),
        "affine": lambda: add_affine(model, ["conv", "fc1"]),
        "scale only": lambda: add_affine(model, TARGETS, shift=False),
        "affiner": lambda: add_affiner(model, ["conv", "fc1"], 2),
    }


class TestEveryForm:
    @pytest.mark.parametrize("form", ["lora", "affine", "scale only", "affiner"])
    def test_starts_as_nothing_and_is_removed_without_trace(self, model, x, form):
        model.fc1.register_forward_hook(lambda module, args, out: None)
        model.norm.requires_grad_(False)
        before, out = (structure(model), bits(model)), model(x)
        adapter = forms(model)[form]()
        assert torch.equal(model(x), out)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names and all(".adapters." in n for n in names)
        assert set(before[1]) < set(model.state_dict())
        trained(adapter)
        assert (model(x) - out).abs().max() > 1e-2
        adapter.remove()
        assert_untouched(model, before)
        assert torch.equal(model(x), out)
        with pytest.raises(ValueError, match=r"no adapter is called 'default'; this model has \[\]"):
            adapter.remove()

    @pytest.mark.parametrize("form", ["lora", "affine", "scale only", "affiner"])
    def test_merged_equals_unmerged_and_unmerges_to_the_bit(self, model, x, form):
        before = bits(model)
        adapter = trained(forms(model)[form]())
        adapter.strength = 0.7
        out = model(x)
        adapter.merge()
        assert adapter.merged and not torch.equal(model.fc1.weight, before["fc1.weight"])
        close(model(x), out)
        with pytest.raises(RuntimeError, match="merged already"):
            adapter.merge()
        adapter.unmerge()
        assert torch.equal(model(x), out) and not adapter.merged
        assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())
        with pytest.raises(RuntimeError, match="not merged"):
            adapter.unmerge()
        adapter.merge()
        adapter.remove()
        assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())

    @pytest.mark.parametrize("form", ["lora", "affine", "scale only", "affiner"])
    def test_gradients_by_finite_differences(self, model, form):
        adapter = trained(forms(model)[form]())
        params = adapter.parameters()
        x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
        names = [n for n, p in model.named_parameters() if p.requires_grad]

        def loss(*values):
            return (
                torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)).square().sum()
            )

        assert len(params) == len(names)
        assert torch.autograd.gradcheck(loss, tuple(model.get_parameter(n) for n in names))

    def test_closed_forms(self, model):
        h = torch.randn(2, 5, 8, dtype=torch.float64)
        plain = model.fc1(h)
        W, b = model.fc1.weight.detach().clone(), model.fc1.bias.detach().clone()
        lora = trained(add_lora(model, "fc1", 3, 5.0))
        A, B = lora.state_dict()["fc1.lora_A.weight"], lora.state_dict()["fc1.lora_B.weight"]
        close(model.fc1(h), plain + 5 / 3 * h @ (B @ A).T)
        lora.remove()
        affiner = trained(add_affiner(model, "fc1", 2))
        state = affiner.state_dict()
        s, d = 1 + state["fc1.affine_scale"], state["fc1.affine_shift"]
        UV = state["fc1.lora_B.weight"] @ state["fc1.lora_A.weight"]
        close(model.fc1(h), s * (h @ W.T + b) + d + h @ UV.T)
        affiner.merge()
        close(model.fc1.weight.detach(), torch.diag(s) @ W + UV)
        close(model.fc1.bias.detach(), s * b + d)


class TestCounts:
    def test_sum_of_r_times_d_in_plus_d_out(self):
        model = DiT(input_size=4, hidden_size=16, depth=3, num_heads=2)
        total = count_parameters(model)
        lora = add_lora(model, ["blocks.*.attn.*", "blocks.*.mlp.fc?"], 4)
        expected = 3 * 4 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
        assert lora.num_parameters == expected == count_parameters(model, trainable_only=True)
        assert count_parameters(model) == total + expected
        assert list(lora.layers) == [
            f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]

    def test_convolutions_and_affine(self, model):
        assert add_lora(model, "conv", 2).num_parameters == 2 * (3 * 9 + 6)
        assert add_affine(model, "conv", name="a").num_parameters == 2 * 6
        assert add_affiner(model, "fc1", 3, name="b").num_parameters == 2 * 10 + 3 * (8 + 10)


class TestPeft:
    """The same weights give the same outputs, gradients and merged weights as the reference implementation."""

    @pytest.mark.parametrize("stabilized", [False, True])
    def test_outputs_gradients_and_merged_weights(self, x, stabilized):
        import peft  # slow to import

        ours, base = randomise(Small()).double(), randomise(Small()).double()
        config = peft.LoraConfig(
            r=4, lora_alpha=10, target_modules=TARGETS, lora_dropout=0.0, use_rslora=stabilized
        )
        theirs = peft.get_peft_model(base, config)
        lora = add_lora(ours, TARGETS, 4, 10.0, rank_stabilized=stabilized)
        state = {
            key.removeprefix("base_model.model."): torch.randn(value.shape, dtype=torch.float64) * 0.2
            for key, value in peft.get_peft_model_state_dict(theirs).items()
        }
        lora.load_state_dict(state)
        peft.set_peft_model_state_dict(theirs, {"base_model.model." + k: v for k, v in state.items()})
        assert lora.num_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        a, b = ours(x), theirs(x)
        close(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
        reference = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
        for layer, branch in lora.branches.items():
            for which in ("A", "B"):
                name = f"base_model.model.{layer}.lora_{which}.default.weight"
                close(getattr(branch, f"lora_{which}").grad, reference.pop(name), 1e-10)
        assert not reference
        lora.merge()
        lora_merged = bits(ours)
        merged = theirs.merge_and_unload().state_dict()
        for name, value in merged.items():
            close(lora_merged[name], value)

    def test_same_start(self):
        import peft  # slow to import

        base, ours = Small(), Small()
        torch.manual_seed(7)
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["fc1"]))
        bound = 1 / math.sqrt(8)
        A = add_lora(ours, "fc1", 4).state_dict()["fc1.lora_A.weight"]
        reference = peft.get_peft_model_state_dict(theirs)["base_model.model.fc1.lora_A.weight"]
        for start in (A, reference):
            assert start.shape == (4, 8) and start.abs().max() <= bound and start.abs().max() > 0.8 * bound

    def test_sum_of_two_adapters(self, x):
        import peft  # slow to import

        ours, base = randomise(Small()).double(), randomise(Small()).double()
        theirs = peft.get_peft_model(
            base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "conv"]), "one"
        )
        theirs.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["fc1"]))
        one = trained(add_lora(ours, ["fc1", "conv"], 2, 3.0, name="one"), 1)
        two = trained(add_lora(ours, "fc1", 3, 2.0, name="two"), 2)
        for adapter in (one, two):
            state = {"base_model.model." + k: v for k, v in adapter.state_dict().items()}
            peft.set_peft_model_state_dict(theirs, state, adapter_name=adapter.name)
        theirs.base_model.set_adapter(["one", "two"])
        close(ours(x), theirs(x))
        with use_adapters(ours, ["two"]):
            theirs.base_model.set_adapter(["two"])
            close(ours(x), theirs(x))
        with use_adapters(ours, []), theirs.disable_adapter():
            close(ours(x), theirs(x), 0)


class TestSeveral:
    def test_they_add_up_and_are_selected(self, model, x):
        before = model(x)
        one, two = (trained(add_lora(model, "fc2", 2, name=n), seed) for seed, n in enumerate(("one", "two")))
        both = model(x)
        with use_adapters(model, {"one": 1.0}):
            only_one = model(x)
            assert (one.strength, two.strength) == (1.0, 0.0)
        with use_adapters(model, ["two"]):
            only_two = model(x)
        with use_adapters(model, []):
            assert torch.equal(model(x), before)
        with pytest.raises(KeyError), use_adapters(model, {"two": 0.5}):
            close(model(x), before + 0.5 * (only_two - before))
            raise KeyError
        assert (one.strength, two.strength) == (1.0, 1.0)
        close(both - before, (only_one - before) + (only_two - before))
        assert adapter_names(model) == ["one", "two"]

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_merged_together_and_unmerged_in_any_order(self, model, x, order):
        before = structure(model), bits(model)
        pair = [
            trained(add_lora(model, "fc1", 2, name="one"), 1),
            trained(add_affiner(model, ["fc1", "conv"], 2, name="two"), 2),
        ]
        out = model(x)
        for adapter in pair:
            adapter.merge()
        close(model(x), out)
        pair[order[0]].unmerge()
        close(model(x), out)
        pair[order[1]].unmerge()
        assert torch.equal(model(x), out)
        assert all(torch.equal(model.state_dict()[n], v) for n, v in before[1].items())
        pair[order[0]].remove()
        assert not next(p for n, p in model.named_parameters() if ".adapters." not in n).requires_grad
        pair[order[1]].remove()
        assert_untouched(model, before)

    def test_training_one_leaves_the_others(self, model, x):
        one, two = add_lora(model, "fc1", 2, name="one"), add_lora(model, "fc1", 2, name="two")
        assert [p.requires_grad for p in one.parameters()] == [False, False]
        one.train_only()
        model(x).sum().backward()
        assert [p.grad is not None for p in one.parameters() + two.parameters()] == [True, True, False, False]
        assert model.fc1.weight.grad is None
        for adapter in (one, two):
            adapter.remove()
        assert all(p.requires_grad for p in model.parameters())

    def test_unfrozen(self, model):
        add_lora(model, "fc1", 2, freeze=False)
        assert all(p.requires_grad for p in model.parameters())


class TestTokens:
    @pytest.fixture
    def layer(self):
        return randomise(nn.Sequential(nn.Linear(4, 4)))

    @pytest.mark.parametrize(
        "tokens",
        [
            slice(2, 5),
            slice(-4, -1),
            torch.tensor([0, 0, 1, 1, 1, 0]).bool(),
            torch.tensor([[0, 0, 1, 1, 1, 0]] * 2).bool(),
        ],
    )
    def test_other_tokens_are_the_frozen_layers_to_the_bit(self, layer, tokens):
        h = torch.randn(2, 6, 4)
        plain = layer(h)
        lora = trained(add_lora(layer, "0", 2))
        everywhere = layer(h)
        with lora.on_tokens(tokens):
            some = layer(h)
        assert torch.equal(some[:, [0, 1, 5]], plain[:, [0, 1, 5]])
        assert torch.equal(some[:, 2:5], everywhere[:, 2:5]) and (some - plain)[:, 2:5].abs().min() > 0
        assert torch.equal(layer(h), everywhere)

    def test_the_mask_of_a_sample_is_its_own(self, layer):
        h = torch.randn(2, 3, 4)
        plain, lora = layer(h), trained(add_lora(layer, "0", 2))
        with lora.on_tokens(torch.tensor([[True, False, False], [False, False, True]])):
            changed = (layer(h) - plain).abs().amax(-1) > 0
        assert changed.tolist() == [[True, False, False], [False, False, True]]

    def test_two_conditions_do_not_meet(self, layer):
        h = torch.randn(1, 6, 4)
        plain = layer(h)
        a = trained(add_lora(layer, "0", 2, name="a", tokens=slice(2, 4)), 1)
        alone = layer(h)
        b = trained(add_lora(layer, "0", 2, name="b", tokens=slice(4, 6)), 2)
        out = layer(h)
        assert torch.equal(out[:, :4], alone[:, :4]) and torch.equal(out[:, :2], plain[:, :2])
        with a.on_tokens(slice(0, 0)), b.on_tokens(slice(0, 0)):
            assert torch.equal(layer(h), plain)
        layer(h)[:, :4].sum().backward()
        assert all((p.grad == 0).all() for p in b.parameters()), "no gradient from others' tokens"

    def test_restored_after_an_error_and_nested(self, layer):
        lora = trained(add_lora(layer, "0", 2, tokens=slice(0, 1)))
        with pytest.raises(KeyError), lora.on_tokens(slice(1, 2)):
            with lora.on_tokens(slice(2, 3)):
                pass
            assert layer[0].tokens == {"default": slice(1, 2)}
            raise KeyError
        assert layer[0].tokens == {"default": slice(0, 1)}

    def test_bad_masks_and_merging(self, layer):
        lora = add_lora(layer, "0", 2)
        with lora.on_tokens(torch.ones(5)):
            with pytest.raises(ValueError, match=r"token mask of shape \(5,\) given.*\(2, 6\)"):
                layer(torch.zeros(2, 6, 4))
            with pytest.raises(ValueError, match=r"acts on \(b, n, d\), this layer gives \(6, 4\)"):
                layer(torch.zeros(6, 4))
            with pytest.raises(RuntimeError, match="cannot be merged"):
                lora.merge()
        lora.merge()
        with pytest.raises(RuntimeError, match="acts on all tokens"), lora.on_tokens(slice(1)):
            pass


class TestModelKeepsWorking:
    def test_copies_are_independent_and_have_handles(self, model, x):
        lora = trained(add_lora(model, TARGETS, 2))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        trained(get_adapter(twin), 5)
        assert not torch.equal(twin(x), model(x))
        lora.merge()
        third = copy.deepcopy(model)
        get_adapter(third).remove()
        lora.remove()
        assert torch.equal(third(x), model(x))

    def test_full_state_dict_goes_into_another_adapted_model(self, model, x):
        trained(add_lora(model, TARGETS, 2))
        other = Small().double()
        add_lora(other, TARGETS, 2)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))

    def test_state_of_the_adapter_alone(self, model, x):
        lora = trained(add_lora(model, TARGETS, 2))
        state = lora.state_dict()
        assert list(state)[:2] == ["conv.lora_A.weight", "conv.lora_B.weight"]
        assert state["conv.lora_A.weight"].shape == (2, 3, 3, 3) and state["conv.lora_B.weight"].shape == (
            6,
            2,
            1,
            1,
        )
        out = model(x)
        trained(lora, 9)
        lora.load_state_dict(state)
        assert torch.equal(model(x), out)
        with pytest.raises(ValueError, match="missing .'conv.lora_A.weight'"):
            lora.load_state_dict({k: v for k, v in state.items() if not k.startswith("conv.lora_A")})
        with pytest.raises(
            ValueError, match=r"conv.lora_A.weight: shape \(1,\) given, expected \(2, 3, 3, 3\)"
        ):
            lora.load_state_dict(state | {"conv.lora_A.weight": torch.zeros(1)})

    def test_training_fits_and_the_base_stays(self, model, x):
        before, target = bits(model), torch.randn(2, 9, 4, dtype=torch.float64)
        lora = add_lora(model, TARGETS, 4, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses = []
        for _ in range(30):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        lora.remove()
        assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())

    def test_hooks_and_masks_still_act(self, model, x):
        lora = trained(add_lora(model, "fc1", 2))
        with record_outputs(model, "fc1") as outputs, mask_weights(model, {"fc1.weight": torch.zeros(1)}):
            model(x)
        with record_outputs(model, "fc1") as again:
            lora.strength = 0.0
            model(x)
        assert outputs["fc1"][0].shape == again["fc1"][0].shape == (2, 9, 10)
        assert not torch.equal(outputs["fc1"][0], again["fc1"][0])

    def test_dropout_acts_in_training_only(self, model, x):
        lora = trained(add_lora(model.eval(), "fc1", 2, dropout=0.5))
        assert torch.equal(model(x), model(x)) and lora.branches["fc1"].training is False
        model.train()
        assert not torch.equal(model(x), model(x))

    def test_generator_decides(self):
        states = []
        for seed in (0, 0, 1):
            lora = add_lora(Small(), "fc1", 2, generator=torch.Generator().manual_seed(seed))
            states.append(lora.state_dict()["fc1.lora_A.weight"])
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])

    def test_dit_with_every_linear_layer(self):
        model = randomise(DiT(input_size=4, hidden_size=16, depth=2, num_heads=2), 0.2).eval()
        inputs = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 800.0]), torch.tensor([1, 10])
        before = model(*inputs)
        lora = add_lora(model, "**", 2)
        assert torch.equal(model(*inputs), before)
        out = trained(lora) and model(*inputs)
        lora.merge()
        close(model(*inputs), out, 1e-4)
        assert (out - before).abs().max() > 1e-2


class TestRefusals:
    def test_names(self, model):
        with pytest.raises(ValueError, match="no module of Small is called 'fc3'.*'fc1'"):
            add_lora(model, "fc3", 2)
        with pytest.raises(ValueError, match="'norm' matches no linear layer or convolution.*LayerNorm"):
            add_lora(model, ["fc1", "norm"], 2)
        add_lora(model, "fc1", 2)
        with pytest.raises(ValueError, match="has an adapter 'default' already"):
            add_lora(model, "fc2", 2)
        with pytest.raises(ValueError, match="letters, digits and _, got 'a.b'"):
            add_lora(model, "fc2", 2, name="a.b")
        with pytest.raises(ValueError, match=r"no adapter is called 'two'; this model has \['default'\]"):
            get_adapter(model, "two")
        with pytest.raises(ValueError, match="no adapter is called 'two'"), use_adapters(model, ["two"]):
            pass

    def test_a_refused_adapter_leaves_nothing(self, model):
        before = structure(model), bits(model)
        for act in (
            lambda: add_lora(model, TARGETS, 0),
            lambda: add_lora(model, ["fc1", "norm"], 2),
            lambda: add_affine(model, TARGETS, scale=False, shift=False),
        ):
            with pytest.raises(ValueError):
                act()
            assert_untouched(model, before)

    def test_layers_that_do_not_work_like_the_others(self):
        for layer in (nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")):
            with pytest.raises(ValueError, match="matches no linear layer or convolution"):
                add_lora(layer, "", 2)
        with pytest.raises(ValueError, match="matches no linear layer"):
            add_lora(nn.MultiheadAttention(4, 2), "out_proj", 2)

    def test_merging(self, model):
        shift = trained(add_affine(model, "fc2"))
        with pytest.raises(ValueError, match="'fc2' has no bias to hold the shift"):
            shift.merge()
        lora = trained(add_lora(model, "fc1", 2, name="lora"))
        lora.merge()
        with pytest.raises(RuntimeError, match="merged with a fixed strength"):
            lora.strength = 2.0
        with pytest.raises(RuntimeError, match=r"adapters \['lora'\] are merged"), use_adapters(model, []):
            pass
        assert (lora.strength, shift.strength) == (1.0, 1.0)
        with torch.no_grad():
            model.fc1.weight[0, 0] += 1
        with pytest.raises(RuntimeError, match="were changed after adapter 'lora' was merged"):
            lora.unmerge()


class TestLayers:
    def test_zero_layers_give_zero_but_learn(self):
        for layer, x in (
            (ZeroLinear(3, 4), torch.randn(2, 3)),
            (ZeroConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)),
        ):
            out = layer(x)
            assert (out == 0).all() and all((p == 0).all() for p in layer.parameters())
            (out - 1).square().sum().backward()
            assert layer.weight.grad.abs().min() > 0 and layer.bias.grad.abs().min() > 0
            nn.init.normal_(layer.weight)
            layer.reset_parameters()
            assert (layer(x) == 0).all()

    def test_zero_layers_take_adapters(self):
        layer = ZeroLinear(3, 4)
        lora = trained(add_lora(layer, "", 2))
        assert layer(torch.ones(1, 3)).abs().max() > 0
        lora.remove()
        assert type(layer) is ZeroLinear

    def test_bottleneck(self):
        adapter, x = BottleneckAdapter(6, 2).double(), torch.randn(2, 5, 6, dtype=torch.float64)
        assert torch.equal(adapter(x), x)
        assert count_parameters(adapter) == 6 * 2 + 2 + 2 * 6 + 6
        randomise(adapter)
        close(
            adapter(x),
            x + F.gelu(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias,
        )
        square = BottleneckAdapter(3, 2, activation=torch.square)
        nn.init.ones_(square.up.weight)
        h = square.down(torch.ones(1, 3))
        close(square(torch.ones(1, 3)), 1 + h.square().sum(-1, keepdim=True).expand(1, 3), 1e-6)
        with pytest.raises(ValueError, match="at least 1, got 0"):
            BottleneckAdapter(4, 0)
