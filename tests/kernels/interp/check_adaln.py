import pytest
import torch
from kernel_checks import compare, guarded, relative_error

from minilib.kernels import adaln, explain, gated_residual_modulate, modulate

# A tile has 16 rows at width 48, a program of the backward pass 64: one row, odd sizes, more than one of each.
SHAPES = [(2, 70, 48), (1, 1, 1), (3, 17, 33)]


def inputs(shape, dtype, seed=0):
    """x, branch, gate, shift, scale between NaN; the last three are views as ``chunk(6)`` makes them."""
    b, n, d = shape
    generator = torch.Generator().manual_seed(seed)
    x, branch = (guarded(torch.randn(b, n, d, generator=generator).to(dtype)) for _ in range(2))
    gate, shift, scale = guarded(torch.randn(b, 6 * d, generator=generator).to(dtype)).chunk(6, dim=-1)[1:4]
    return x, branch, gate, shift, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_modulate_and_its_gradients(shape, dtype):
    x, _, _, shift, scale = inputs(shape, dtype)
    assert explain("modulate", x, shift, scale).path == "triton"
    compare(modulate, adaln.modulate_reference, (x, shift, scale), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual_modulate_and_its_gradients(shape, dtype):
    compare(
        gated_residual_modulate,
        adaln.gated_residual_modulate_reference,
        inputs(shape, dtype),
        dtype,
        # In half precision the residual is rounded before it is normalised, here as in the two operations apart.
        factor=1.0 if dtype == torch.float32 else 2.0,
    )


def test_a_width_that_fills_most_of_a_large_tile():
    x, _, _, shift, scale = inputs((1, 3, 1100), torch.float32)
    compare(modulate, adaln.modulate_reference, (x, shift, scale), torch.float32)


def test_a_residual_that_nobody_differentiates():
    x, branch, gate, shift, scale = (t.requires_grad_() for t in inputs((2, 5, 16), torch.float32))
    for used in (0, 1):
        out = gated_residual_modulate(x, branch, gate, shift, scale)[used]
        doubles = [t.detach().double().requires_grad_() for t in (x, branch, gate, shift, scale)]
        expected = adaln.gated_residual_modulate_reference(*doubles)[used]
        grads = torch.autograd.grad(out.square().sum(), (x, branch, gate))
        wanted = torch.autograd.grad(expected.square().sum(), doubles[:3])
        for a, b in zip(grads, wanted, strict=True):
            assert relative_error(a, b) <= 3e-6


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_nothing_in_nothing_out(shape):
    arguments = [t.requires_grad_() for t in (torch.zeros(shape), *torch.zeros(2, shape[0], 4))]
    y = modulate(*arguments)
    grads = torch.autograd.grad(y.sum(), arguments)
    assert y.shape == shape and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_any_layout_of_x():
    x, _, _, shift, scale = inputs((2, 6, 8), torch.float32)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(modulate(transposed, shift, scale), modulate(x, shift, scale))


def test_the_gradients_are_the_same_each_time():
    arguments = [t.requires_grad_() for t in inputs((2, 150, 24), torch.float32)]
    runs = [
        torch.autograd.grad(sum(t.square().sum() for t in gated_residual_modulate(*arguments)), arguments)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name, count", [("modulate", 3), ("gated_residual_modulate", 5)])
def test_the_operators_are_registered_as_torch_expects(name, count):
    modulate(torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.zeros(1, 4))  # registers them
    x, branch, gate, shift, scale = inputs((1, 2, 4), torch.float32)
    arguments = (x, shift, scale) if count == 3 else (x, branch, gate, shift, scale)
    torch.library.opcheck(
        getattr(torch.ops.minilib, name).default,
        (*(t.clone().requires_grad_() for t in arguments), 1e-6),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )
