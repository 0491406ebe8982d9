"""Factors written into modulations: the same function, at no cost, and equal to the transform."""

import copy

import pytest
import torch
from torch import nn

from minilib.models import DiT, MMDiT
from minilib.quantization import (
    ChannelBalance,
    QuantRule,
    QuantSpec,
    fold_balance,
    modulated_inputs,
    quantize_model,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.double().eval()


def dit() -> tuple[nn.Module, tuple]:
    model = shaken(DiT(hidden_size=32, depth=2, num_heads=2))
    return model, (drawn(2, 1, 8, 8).double(), torch.tensor([10.0, 700.0]), torch.tensor([3, 10]))


def swiglu() -> tuple[nn.Module, tuple]:
    model, call = dit()
    return shaken(DiT(hidden_size=32, depth=2, num_heads=2, mlp="swiglu")), call


def mmdit(**options: object) -> tuple[nn.Module, tuple]:
    model = shaken(MMDiT(hidden_size=32, depth=3, num_heads=2, context_dim=8, **options))
    return model, (drawn(2, 3, 8, 8).double(), torch.tensor([10.0, 700.0]), drawn(2, 5, 8, seed=1).double())


MODELS = {"dit": dit, "mmdit": mmdit, "dual": lambda: mmdit(dual_attention_layers=(0,))}


def test_the_layers_found_are_those_after_a_modulated_norm() -> None:
    assert set(modulated_inputs(dit()[0])) == {
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "mlp.fc1")
    }
    of_mmdit = modulated_inputs(mmdit()[0])
    both = ("attn.qkv", "mlp.fc1", "attn.context_qkv", "context_mlp.fc1")
    expected = {f"blocks.{i}.{n}" for i in range(3) for n in both} - {"blocks.2.context_mlp.fc1"}
    assert set(of_mmdit) == expected
    assert of_mmdit["blocks.2.attn.context_qkv"] == ("blocks.2.context_adaLN_modulation", 0, 1)
    assert "blocks.0.attn2.qkv" in modulated_inputs(MODELS["dual"]()[0])
    assert modulated_inputs(nn.Linear(2, 2)) == {}
    assert set(modulated_inputs(swiglu()[0])) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_and_each_input_is_divided(name: str) -> None:
    model, call = MODELS[name]()
    scales = {layer: drawn(32, seed=i).abs() + 0.1 for i, layer in enumerate(modulated_inputs(model))}
    inputs: dict[str, list[torch.Tensor]] = {layer: [] for layer in scales}

    def keep(layer: str):
        return lambda module, args: inputs[layer].append(args[0])

    folded = copy.deepcopy(model)
    for m in (model, folded):
        for layer in scales:
            m.get_submodule(layer).register_forward_pre_hook(keep(layer))
    assert fold_balance(folded, scales) is folded
    with torch.no_grad():
        true, out = model(*call), folded(*call)
    assert float((out - true).abs().max()) < 1e-10 * float(true.abs().max())
    for layer, (before, after) in inputs.items():
        assert torch.allclose(after, before / scales[layer], atol=1e-10)
        assert not torch.allclose(after, before)


def test_folding_the_inverse_takes_it_back() -> None:
    model, _ = mmdit()
    scales = {layer: drawn(32, seed=i).abs() + 0.1 for i, layer in enumerate(modulated_inputs(model))}
    twice = fold_balance(fold_balance(copy.deepcopy(model), scales), {n: 1 / s for n, s in scales.items()})
    for a, b in zip(model.parameters(), twice.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_folded_and_applied_as_a_transform_give_the_same_rounded_layer() -> None:
    model, call = mmdit()
    layer = "blocks.1.mlp.fc1"
    scale = {layer: drawn(32, seed=3).abs() + 0.1}
    rule = [QuantRule(layer, QuantSpec(6, "channel", dynamic=True), QuantSpec(6, "token", dynamic=True))]
    with torch.no_grad():
        with quantize_model(model, rule, transforms={layer: ChannelBalance(scale[layer].double())}):
            applied = model(*call)
        with quantize_model(fold_balance(copy.deepcopy(model), scale), rule) as _:
            pass
        folded = fold_balance(copy.deepcopy(model), scale)
        with quantize_model(folded, rule):
            written = folded(*call)
        plain = model(*call)
    # Rounding may fall to the other side where both differ by a rounding error of the sums.
    assert float((applied - written).abs().max()) < 0.05 * float((applied - plain).abs().max())


def test_refusals() -> None:
    model, _ = mmdit()
    with pytest.raises(ValueError, match="'blocks.0.mlp.fc2'.*do not read a modulated norm"):
        fold_balance(model, {"blocks.0.mlp.fc2": torch.ones(128)})
    with pytest.raises(ValueError, match="not all positive"):
        fold_balance(model, {"blocks.0.mlp.fc1": torch.zeros(32)})
