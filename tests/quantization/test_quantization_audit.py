"""Variation along four axes against arrays where it is known, and injected outliers that change nothing."""

import copy

import pytest
import torch
from torch import nn

from minilib.models import DiT, MMDiT
from minilib.quantization import (
    QuantRule,
    QuantSpec,
    audit_variation,
    fold_balance,
    inject_outliers,
    modulated_inputs,
    peak_over_median,
    quantize_model,
)
from minilib.quantization.audit import Call


class Probe(nn.Module):
    """One layer whose input is what the caller says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.other = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def calls(model: nn.Module, inputs: dict[tuple[float, str], torch.Tensor]) -> list[Call]:
    return [Call(time, condition, lambda x=x: model(x)) for (time, condition), x in inputs.items()]


def test_peak_over_median() -> None:
    assert peak_over_median(torch.tensor([[1.0, 5.0, 2.0], [3.0, 3.0, 3.0]])).tolist() == [2.5, 1.0]
    assert peak_over_median(torch.tensor([2.0, 4.0])).item() == pytest.approx(4 / 3)


def test_nothing_varies_in_a_constant() -> None:
    model, x = Probe(3), torch.full((2, 5, 3), -2.0)
    inputs = {(t, c): x for t in (1.0, 2.0) for c in ("with", "without")}
    assert audit_variation(model, calls(model, inputs), ["layer"])["layer"] == (1.0, 1.0, 1.0, 1.0)


def test_each_axis_is_told_apart() -> None:
    model, x = Probe(3), torch.ones(2, 5, 3)
    tokens = x.clone()
    tokens[:, 0] = 4.0  # one token of five, in all channels: channels are alike
    channels = x.clone()
    channels[..., 1] = -6.0  # one channel of three: tokens are alike
    one = audit_variation(model, calls(model, {(1.0, "a"): tokens}), ["layer"])["layer"]
    assert one == (4.0, 1.0, 1.0, 1.0)
    two = audit_variation(model, calls(model, {(1.0, "a"): channels}), ["layer"])["layer"]
    assert two == (1.0, 1.0, 1.0, 6.0)
    scales = {(1.0, "a"): 1.0, (2.0, "a"): 2.0, (3.0, "a"): 8.0}
    three = audit_variation(model, calls(model, {k: v * x for k, v in scales.items()}), ["layer"])["layer"]
    assert three == (1.0, 1.0, 4.0, 1.0)
    scales = {(1.0, "a"): 1.0, (1.0, "b"): 3.0, (2.0, "a"): 5.0, (2.0, "b"): 1.0}
    four = audit_variation(model, calls(model, {k: v * x for k, v in scales.items()}), ["layer"])["layer"]
    assert four.condition == pytest.approx((3 + 5) / 2)
    assert four.token == 1.0 and four.channel == 1.0
    assert four.time == pytest.approx((5 / 3 + 3 / 2) / 2)  # a: 1, 5 over 3; b: 3, 1 over 2


def test_images_are_averaged_not_mixed() -> None:
    model, x = Probe(2), torch.ones(2, 4, 2)
    x[1] *= 10  # the second image is larger: no token of its own stands out
    x[0, 0] = 3.0
    found = audit_variation(model, calls(model, {(0.0, "a"): x}), ["layer"])["layer"]
    assert found.token == pytest.approx((3 + 1) / 2)


def test_the_audit_refuses_and_cleans_up() -> None:
    model, x = Probe(2), torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="0 calls"):
        audit_variation(model, [], ["layer"])
    with pytest.raises(ValueError, match="\\['other'\\]"):
        audit_variation(model, calls(model, {(0.0, "a"): x}), ["layer", "other"])
    with pytest.raises(ValueError, match="'none' is no linear layer"):
        audit_variation(model, calls(model, {(0.0, "a"): x}), ["none"])
    assert not model.layer._forward_pre_hooks and not model.other._forward_pre_hooks


def denoisers() -> dict[str, tuple[nn.Module, tuple]]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([100.0, 800.0])
    models = {
        "mmdit": (
            MMDiT(hidden_size=32, depth=2, context_dim=8),
            (x, t, torch.randn(2, 4, 8, generator=generator)),
        ),
        "dit": (DiT(hidden_size=32, depth=2, in_channels=3), (x, t, torch.tensor([1, 10]))),
    }
    for model, _ in models.values():
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return models


@pytest.mark.parametrize("name", ["mmdit", "dit"])
def test_injection_keeps_the_function_and_enlarges_the_channels(name: str) -> None:
    model, call = denoisers()[name]
    before = copy.deepcopy(model.state_dict())
    changed, channels = inject_outliers(model, 0.1, 30.0, torch.Generator().manual_seed(3))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert set(channels) == set(modulated_inputs(model))
    inputs: dict[str, list[torch.Tensor]] = {layer: [] for layer in channels}
    for m in (model, changed):
        for layer in channels:
            hook = lambda module, args, layer=layer: inputs[layer].append(args[0])  # noqa: E731
            m.get_submodule(layer).register_forward_pre_hook(hook)
    with torch.no_grad():
        true, out = model(*call), changed(*call)
    assert float((out - true).abs().max()) < 1e-4 * float(true.abs().max())
    for layer, (plain, large) in inputs.items():
        assert len(channels[layer]) == 3  # a tenth of 32
        gains = torch.ones(32)
        gains[channels[layer]] = 30.0
        assert torch.allclose(large, plain * gains, rtol=1e-3, atol=1e-3)


def test_injection_is_the_inverse_of_a_balance() -> None:
    model, _ = denoisers()["mmdit"]
    changed, channels = inject_outliers(model, 0.25, 16.0, torch.Generator().manual_seed(3))
    back = {}
    for layer, own in channels.items():
        back[layer] = torch.ones(32)
        back[layer][own] = 16.0
    fold_balance(changed, back)
    for a, b in zip(model.parameters(), changed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_injection_makes_rounding_harder() -> None:
    model, call = denoisers()["dit"]
    changed, _ = inject_outliers(model, 0.06, 30.0)
    rule = [
        QuantRule(list(modulated_inputs(model)), QuantSpec(8, "channel"), QuantSpec(6, "token", dynamic=True))
    ]
    errors = []
    with torch.no_grad():
        true = model(*call)
        for m in (model, changed):
            with quantize_model(m, rule):
                errors.append(float((m(*call) - true).square().mean()))
    assert errors[1] > 4 * errors[0]


def test_injection_by_share_seed_and_refusals() -> None:
    model, _ = denoisers()["dit"]
    assert all(len(c) == 0 for c in inject_outliers(model, 0.0, 30.0)[1].values())
    assert all(c.tolist() == [0, 1] for c in inject_outliers(model, 0.06, 30.0)[1].values())
    first, second = (inject_outliers(model, 0.2, 2.0, torch.Generator().manual_seed(4))[1] for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert len({tuple(c.tolist()) for c in first.values()}) > 1
    for fraction, gain in ((-0.1, 2.0), (1.1, 2.0), (0.1, 0.0)):
        with pytest.raises(ValueError, match="fraction"):
            inject_outliers(model, fraction, gain)
    with pytest.raises(ValueError, match="no layer of this model"):
        inject_outliers(nn.Linear(2, 2), 0.1, 2.0)


def test_a_channel_is_as_large_as_its_largest_token_and_an_image_counts_once() -> None:
    model, x = Probe(3), torch.ones(2, 5, 3)
    x[1, 2, 1] = 6.0
    found = audit_variation(model, calls(model, {(0.0, "a"): x}), ["layer"])["layer"]
    assert found.channel == 6.0 and found.token == pytest.approx((1 + 6) / 2)
    sizes = {(1.0, "a"): (1.0, 3.0), (2.0, "a"): (1.0, 9.0), (3.0, "a"): (4.0, 4.0)}  # means 2, 5, 4
    inputs = {k: torch.ones(2, 5, 3) * torch.tensor(v).view(2, 1, 1) for k, v in sizes.items()}
    assert audit_variation(model, calls(model, inputs), ["layer"])["layer"].time == pytest.approx(5 / 4)
