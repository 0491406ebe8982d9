"""Every variant in the registry, on every one of its cases: a new variant is tested the day it is added."""

import json
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilib.attention import (
    ATTENTION,
    Attention,
    Case,
    attention_variants,
    get_attention,
    make_attention_layer,
    register_attention,
)
from minilib.attention import registry as registry_module
from minilib.attention.functional import softmax_flops, softmax_reference
from minilib.attention.registry import BUILT_IN

VARIANTS = attention_variants()
B, HEADS, WIDTH = 2, 2, 4


def label(variant, case):
    return "-".join(
        [variant.name, *(f"{k}={v}" for k, v in case.options.items()), f"n={case.n}", f"m={case.m}"]
    )


ALL = [pytest.param(v, c, id=label(v, c).replace(" ", "")) for v in VARIANTS.values() for c in v.cases]
PROCESSORS = [p for p in ALL if p.values[0].layer is None]
ONE_EACH = [
    pytest.param(v, min(v.cases, key=lambda c: (c.n == 1, c.n)), id=v.name) for v in VARIANTS.values()
]


def normal(shape, g, dtype, low):
    # ``low``: positive entries only, so that no rectifier hides a dependence.
    x = torch.rand(shape, generator=g, dtype=torch.float64) + low if low else torch.randn(
        shape, generator=g, dtype=torch.float64
    )  # fmt: skip
    return x.to(dtype)


@dataclass
class Subject:
    """A variant, built, with its inputs: q, k and v, or the tokens if it is a layer."""

    variant: object
    case: Case
    heads: int = HEADS
    width: int = WIDTH
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self):
        with torch.device(self.device):
            torch.manual_seed(0)
            self.run = self.variant.build(self.heads, self.width, **self.case.options)
        self.parameters = {}
        if isinstance(self.run, nn.Module):
            self.run.to(self.dtype)
            g = torch.Generator().manual_seed(7)
            for p in self.run.parameters():
                with torch.no_grad():
                    # Fresh values around the old: nothing stays hidden behind an initialisation at zero.
                    p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p))
            self.parameters = dict(self.run.named_parameters())

    @property
    def reference(self):
        if isinstance(self.run, nn.Module):
            return partial(self.variant.reference, self.run)
        return partial(self.variant.reference, **self.case.options)

    def inputs(self, b=B, *, seed=0, dtype=None, low=0.0):
        g, dtype = torch.Generator().manual_seed(seed), dtype or self.dtype
        n, m = self.case.n, self.case.m or self.case.n
        if self.variant.layer is not None:
            shapes = [(b, n, self.heads * self.width)]
        else:
            shapes = [(b, self.heads, length, self.width) for length in (n, m, m)]
        return tuple(normal(shape, g, dtype, low).to(self.device).requires_grad_() for shape in shapes)

    def token_axis(self):
        return 1 if self.variant.layer is not None else 2


def largest(difference):
    return difference.detach().abs().max().item() if difference.numel() else 0.0


@pytest.mark.parametrize("variant, case", ALL)
def test_forward_and_gradients_equal_the_reference(variant, case):
    exact = Subject(variant, case)
    inputs = exact.inputs()
    expected = exact.reference(*inputs)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(
        (expected * towards).sum(), [*inputs, *exact.parameters.values()], allow_unused=True
    )
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        subject = Subject(variant, case, dtype=dtype)
        if subject.parameters:
            subject.run.load_state_dict(exact.run.state_dict())
        own = tuple(x.detach().to(dtype).requires_grad_() for x in inputs)
        out = subject.run(*own)
        assert out.shape == expected.shape and out.dtype == dtype
        scale = max(1.0, largest(expected))
        assert largest(out.double() - expected) <= tolerance * scale
        got = torch.autograd.grad(
            (out * towards.to(dtype)).sum(), [*own, *subject.parameters.values()], allow_unused=True
        )
        for a, b in zip(got, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert largest(a.double() - b) <= tolerance * max(1.0, largest(b))


@pytest.mark.parametrize("variant, case", ONE_EACH)
def test_gradcheck(variant, case):
    subject = Subject(variant, case, heads=1, width=2)
    assert torch.autograd.gradcheck(subject.run, subject.inputs(b=1), fast_mode=case.n > 12)


@pytest.mark.parametrize("variant, case", ALL)
def test_reach_is_what_the_variant_says(variant, case):
    subject = Subject(variant, case)
    inputs = subject.inputs(b=1, low=0.1)
    n, m = case.n, case.m or case.n
    sees = torch.ones(n, m, dtype=torch.bool) if variant.sees is None else variant.sees(n, m, **case.options)
    assert sees.shape == (n, m) and sees.dtype == torch.bool and sees.any(1).all()
    out = subject.run(*inputs)
    axis = subject.token_axis()
    towards = torch.rand(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    for i in range(n):
        picked = (out * towards).select(axis, i).sum()
        grads = torch.autograd.grad(picked, inputs, retain_graph=True, allow_unused=True)
        sizes = [
            torch.zeros(x.shape[axis], dtype=torch.float64) if g is None else g.abs().movedim(axis, 0).flatten(1).sum(1)
            for g, x in zip(grads, inputs, strict=True)
        ]  # fmt: skip
        influence = sizes[0] if variant.layer is not None else sizes[1] + sizes[2]
        assert torch.equal(influence != 0, sees[i]), f"query {i}"
        if n == m:
            assert (sizes[0][~sees[i]] == 0).all(), f"query {i} reads the query of what it does not see"


@pytest.mark.parametrize("variant, case", ALL)
@pytest.mark.parametrize("heads, width", [(2, 4), (3, 8)])
def test_flops_equal_the_counter_to_the_integer(variant, case, heads, width):
    subject = Subject(variant, case, heads=heads, width=width, dtype=torch.float32, device="meta")
    inputs = tuple(x.detach() for x in subject.inputs())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.run(*inputs)
    n, m = case.n, case.m or case.n
    formula = variant.flops(B, heads, n, m, width, **case.options)
    assert isinstance(formula, int) and counter.get_total_flops() == formula


@pytest.mark.parametrize("variant, case", PROCESSORS)
def test_a_mask_is_obeyed_or_refused(variant, case):
    subject = Subject(variant, case)
    inputs = subject.inputs()
    n, m = case.n, case.m or case.n
    g = torch.Generator().manual_seed(4)
    pairs, keys = torch.rand(n, m, generator=g) > 0.4, torch.rand(B, 1, 1, m, generator=g) > 0.4
    pairs[:, 0] = keys[..., 0] = True
    added = torch.zeros(n, m, dtype=torch.float64).masked_fill(~pairs, -torch.inf)
    for given in (pairs, added, keys):
        try:
            out = subject.run(*inputs, mask=given)
        except ValueError as error:
            assert "mask" in str(error) and variant.name in str(error)
            continue
        torch.testing.assert_close(out, subject.reference(*inputs, mask=given), atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant, case", ALL)
def test_an_empty_batch_stays_empty(variant, case):
    subject = Subject(variant, case)
    inputs = subject.inputs(b=0)
    out = subject.run(*inputs)
    assert out.shape == inputs[0].shape
    out.sum().backward()


def test_every_variant_has_a_case_with_one_token_and_one_with_several():
    for variant in VARIANTS.values():
        assert {case.n == 1 for case in variant.cases} == {True, False}, variant.name


@pytest.mark.parametrize("variant, case", ALL)
def test_bfloat16(variant, case):
    subject = Subject(variant, case, dtype=torch.bfloat16)
    inputs = subject.inputs()
    out = subject.run(*inputs)
    assert out.dtype == torch.bfloat16
    exact = Subject(variant, case)
    if subject.parameters:
        exact.run.load_state_dict(subject.run.state_dict())
    expected = exact.reference(*(x.detach().double() for x in inputs))
    assert largest(out.double() - expected) <= 0.05 * max(1.0, largest(expected))
    out.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("variant, case", ALL)
def test_inputs_may_lie_in_memory_as_they_like(variant, case):
    subject = Subject(variant, case)
    inputs = subject.inputs()
    # Every token's heads side by side, as a linear layer leaves them, or every feature's tokens.
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    padded = [torch.stack([x.detach(), x.detach()], dim=-1)[..., 0] for x in inputs]
    expected = subject.run(*inputs)
    for other in (strided, padded):
        torch.testing.assert_close(subject.run(*other), expected, atol=1e-12, rtol=0)
    for x in inputs:
        assert torch.equal(x, x.detach().clone())


@pytest.mark.parametrize("variant, case", ONE_EACH)
def test_inputs_are_left_as_they_were(variant, case):
    subject = Subject(variant, case)
    inputs = subject.inputs()
    before = [x.detach().clone() for x in inputs]
    with torch.inference_mode():
        subject.run(*(x.detach() for x in inputs))
    # What the inference run may have cached must serve a run with gradients.
    subject.run(*inputs).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("variant, case", ONE_EACH)
def test_layers_of_every_variant_train(variant, case):
    if case.m is not None:
        case = replace(case, m=None)
    layer = make_attention_layer(variant.name, HEADS * WIDTH, HEADS, **case.options)
    x = torch.randn(B, case.n, HEADS * WIDTH, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("variant, case", ONE_EACH)
def test_state_goes_round(variant, case):
    layer = make_attention_layer(variant.name, HEADS * WIDTH, HEADS, **case.options)
    other = make_attention_layer(variant.name, HEADS * WIDTH, HEADS, **case.options)
    x = torch.randn(B, case.n, HEADS * WIDTH)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("variant, case", ONE_EACH)
def test_options_survive_json_as_a_model_s_config_does(variant, case):
    read = replace(case, options=json.loads(json.dumps(case.options)))
    subject = Subject(variant, case)
    inputs = subject.inputs()
    torch.testing.assert_close(Subject(variant, read).run(*inputs), subject.run(*inputs), atol=0, rtol=0)


class TestErrors:
    @pytest.mark.parametrize("variant, case", [p for p in ONE_EACH if "grid" in p.values[1].options])
    def test_tokens_that_do_not_fit_the_grid(self, variant, case):
        subject = Subject(variant, case)
        inputs = [x.narrow(subject.token_axis(), 0, case.n - 1) for x in subject.inputs()]
        with pytest.raises(ValueError, match=variant.name) as caught:
            subject.run(*inputs)
        grid = tuple(case.options["grid"])
        assert str(grid) in str(caught.value) and str(case.n - 1) in str(caught.value)

    @pytest.mark.parametrize("variant, case", ONE_EACH)
    def test_options(self, variant, case):
        def build(options):
            return variant.build(HEADS, WIDTH, **options)

        with pytest.raises(ValueError, match=f"{variant.name!r} has no option 'sparkle'"):
            build(case.options | {"sparkle": 1})
        for option, value in case.options.items():
            if isinstance(value, int | float | tuple) and not isinstance(value, bool):
                wrong = (-1,) * len(value) if isinstance(value, tuple) else type(value)(-1)
                with pytest.raises(ValueError, match=option):
                    build(case.options | {option: wrong})
            lacking = {key: other for key, other in case.options.items() if key != option}
            try:
                build(lacking)
            except ValueError as error:
                assert f"{variant.name!r} needs the option {option!r}" in str(error)


class TestRegistration:
    """What it takes to add a variant."""

    COMPLETE = {
        "reference": softmax_reference,
        "flops": softmax_flops,
        "cases": (Case({}, n=2), Case({}, n=1)),
    }

    @pytest.fixture(autouse=True)
    def own_registry(self, monkeypatch):
        monkeypatch.setattr(registry_module, "ATTENTION", dict(ATTENTION))

    @pytest.mark.parametrize("left_out", sorted(COMPLETE))
    def test_refused_without(self, left_out):
        options = {key: value for key, value in self.COMPLETE.items() if key != left_out}
        with pytest.raises(ValueError, match=rf"'mine' is registered without {left_out}: .*slow reference"):
            register_attention("mine", **options)(lambda q, k, v, *, mask=None: q)
        assert "mine" not in registry_module.ATTENTION

    def test_refused_under_a_name_that_is_taken_even_by_a_module_not_yet_imported(self, monkeypatch):
        monkeypatch.setattr(registry_module, "ATTENTION", {})
        for name in BUILT_IN:
            with pytest.raises(ValueError, match=f"attention {name!r} is registered already"):
                register_attention(name, **self.COMPLETE)(lambda q, k, v, *, mask=None: q)

    def test_a_layer_has_to_be_a_module(self):
        with pytest.raises(ValueError, match="'mine' is registered as a layer"):
            register_attention("mine", layer=True, **self.COMPLETE)(lambda q, k, v, *, mask=None: q)

    def test_a_function(self):
        @register_attention("mine", softmax=True, **self.COMPLETE)
        def mine(q, k, v, *, mask=None, gain=1.0):
            return gain * softmax_reference(q, k, v, mask=mask)

        assert "mine" in attention_variants() and get_attention("mine") is mine
        bound = get_attention("mine", gain=2.0)
        assert bound.softmax and bound.keywords == {"gain": 2.0}
        q = torch.randn(1, 2, 3, 4)
        assert torch.equal(bound(q, q, q), 2 * mine(q, q, q))

    def test_a_module_is_told_the_heads(self):
        @register_attention("mine", **self.COMPLETE)
        class Mine(nn.Module):
            def __init__(self, num_heads, head_dim, *, gain=1.0):
                super().__init__()
                self.gains = nn.Parameter(torch.full((num_heads, 1, head_dim), gain))

            def forward(self, q, k, v, *, mask=None):
                return self.gains * v

        layer = make_attention_layer("mine", 8, 2, gain=3.0)
        assert layer.processor.gains.shape == (2, 1, 4) and "processor.gains" in layer.state_dict()
        assert not layer.processor.softmax
        with pytest.raises(ValueError, match="'mine' needs the option 'num_heads'"):
            get_attention("mine")
        options = {"num_heads": 2, "head_dim": 4}
        assert "processor.gains" in Attention(8, 2, variant="mine", variant_options=options).state_dict()

    def test_a_layer(self):
        @register_attention("mine", layer=True, **self.COMPLETE)
        class Mine(nn.Linear):
            def __init__(self, dim, num_heads, *, bias=True):
                super().__init__(dim, dim, bias=bias)

        layer = make_attention_layer("mine", 8, 2, bias=False)
        assert isinstance(layer, Mine) and layer.bias is None
        with pytest.raises(ValueError, match="'mine' has no option 'gain': its options are bias"):
            make_attention_layer("mine", 8, 2, gain=1.0)
        with pytest.raises(ValueError, match=r"use make_attention_layer\('mine'"):
            get_attention("mine")

    def test_options_are_checked_with_the_defaults_filled_in(self):
        seen = []

        @register_attention("mine", check=lambda **options: seen.append(options), **self.COMPLETE)
        def mine(q, k, v, *, a, b=2, mask=None):
            return q

        get_attention("mine", a=1)
        assert seen == [{"a": 1, "b": 2}]

    def test_unknown_names_are_refused_with_the_known_ones(self):
        with pytest.raises(ValueError, match="unknown attention 'ful': choose one of .*'causal'.*'window'"):
            get_attention("ful")
