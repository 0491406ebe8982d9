"""Hadamard rotations: orthogonal, in blocks, leave the layer's output as it was, and level what stands out."""

import math

import pytest
import torch

from minilib.quantization import (
    Chain,
    ChannelBalance,
    HadamardRotation,
    QuantSpec,
    TimeRanges,
    block_size,
    hadamard,
    quantize_layer,
    rotation_cost,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_matrix_is_orthogonal_with_entries_of_one_size(n: int) -> None:
    h = hadamard(n, dtype=torch.float64)
    assert torch.allclose(h @ h.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(h, h.T)
    assert torch.allclose(h.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))
    # Sylvester's: entry (i, j) is the parity of the bits that i and j share.
    parity = [[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    assert torch.equal((h * math.sqrt(n)).round(), torch.tensor(parity).double())


@pytest.mark.parametrize("n", [0, 3, 12, -4])
def test_other_sizes_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"size {n} asked for"):
        hadamard(n)


def test_blocks_are_the_largest_power_of_two_that_divides() -> None:
    for width in range(1, 200):
        block = block_size(width)
        assert width % block == 0 and block & (block - 1) == 0 and (width // block) % 2 == 1
    with pytest.raises(ValueError, match="width 0"):
        block_size(0)


@pytest.mark.parametrize("width", [16, 96, 21])
def test_the_layer_computes_what_it_did(width: int) -> None:
    x, w = drawn(3, 5, width).double(), drawn(7, width, seed=1).double()
    rotation = HadamardRotation(width, torch.Generator().manual_seed(2)).double()
    turned = rotation.activation(x)
    out = turned @ rotation.weight(w).T
    assert float((out - x @ w.T).abs().max()) < 1e-6 * float((x @ w.T).abs().max())
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    blocks = rotation.block
    assert torch.allclose(
        turned.unflatten(-1, (-1, blocks)).norm(dim=-1), x.unflatten(-1, (-1, blocks)).norm(dim=-1), rtol=1e-6
    )


def test_blocks_do_not_mix() -> None:
    x = torch.zeros(1, 96)
    x[0, 33] = 1.0  # in the second block of 32
    out = HadamardRotation(96).activation(x)
    assert int((out != 0).sum()) == 32 and bool((out[0, 32:64] != 0).all())
    assert torch.allclose(out[0, 32:64].abs(), torch.full((32,), 32**-0.5))


def test_signs_are_random_and_from_the_generator() -> None:
    first, again, other = (HadamardRotation(64, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first.signs, again.signs) and not torch.equal(first.signs, other.signs)
    assert set(first.signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(HadamardRotation(64).signs, torch.ones(64))


def test_without_random_signs_a_constant_stays_an_outlier() -> None:
    x = torch.ones(1, 64)
    assert HadamardRotation(64).activation(x).abs().max() == pytest.approx(8.0)
    assert HadamardRotation(64, torch.Generator().manual_seed(0)).activation(x).abs().max() < 4.0


def test_an_outlier_is_spread() -> None:
    x = drawn(200, 64, seed=3)
    x[:, 7] *= 40
    turned = HadamardRotation(64, torch.Generator().manual_seed(1)).activation(x)
    spread = [float(v.abs().amax(0).max() / v.abs().amax(0).median()) for v in (x, turned)]
    assert spread[0] > 20 and spread[1] < 2


def test_options_and_refusals() -> None:
    assert HadamardRotation(96, block=16).block == 16
    with pytest.raises(ValueError, match="blocks of 64 do not tile 96"):
        HadamardRotation(96, block=64)
    with pytest.raises(ValueError, match="size 12 asked for"):
        HadamardRotation(96, block=12)
    with pytest.raises(ValueError, match="8 channels given, this rotation turns 4"):
        HadamardRotation(4).activation(torch.zeros(1, 8))


def test_gradients_pass_turned() -> None:
    rotation = HadamardRotation(8, torch.Generator().manual_seed(0)).double()
    x = drawn(3, 8).double().requires_grad_()
    torch.autograd.gradcheck(rotation.activation, x)


def test_a_chain_applies_in_order_and_keeps_the_product() -> None:
    balance = ChannelBalance(torch.tensor([[1.0, 2, 4, 8], [8.0, 4, 2, 1]]), TimeRanges((500.0,)))
    rotation = HadamardRotation(4, torch.Generator().manual_seed(0))
    chain, t = Chain(balance, rotation), torch.tensor([900.0])
    x, w = drawn(2, 4), drawn(3, 4, seed=1)
    assert torch.equal(chain.activation(x, t), rotation.activation(balance.activation(x, t)))
    assert torch.equal(chain.weight(w, t), rotation.weight(balance.weight(w, t)))
    assert torch.allclose(chain.activation(x, t) @ chain.weight(w, t).T, x @ w.T, atol=1e-5)
    assert chain.key(t) != chain.key(torch.tensor([100.0]))


def test_a_quantised_layer_takes_it() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 8), drawn(20, 64, seed=4)
    x[:, 3] *= 50
    with torch.no_grad():
        true, errors = linear(x), {}
        for name, transform in {"plain": None, "turned": HadamardRotation(64)}.items():
            layer = quantize_layer(
                linear,
                QuantSpec(6, "channel", dynamic=True),
                QuantSpec(6, "token", dynamic=True),
                transform=transform,
            )
            errors[name] = float((layer(x) - true).square().mean())
    assert errors["turned"] < 0.5 * errors["plain"]


def test_cost_is_that_of_the_fast_transform() -> None:
    assert rotation_cost(64) == 64 * 6 and rotation_cost(96) == 96 * 5 and rotation_cost(96, 16) == 96 * 4
    assert rotation_cost(7) == 0
    with pytest.raises(ValueError, match="size 3"):
        rotation_cost(96, 3)
