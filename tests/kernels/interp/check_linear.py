import pytest
import torch
from kernel_checks import FORWARD, compare, guarded, relative_error, values_and_gradients
from torch.utils.flop_counter import FlopCounterMode

from minilib.kernels import explain, linear, linear_attention
from minilib.kernels._triton.linear import config

# A block has 32 tokens and up to 128 columns (32 in float32): more than one of each, none full; one query.
SIZES = [(1, 2, 40, 150, 24, 24), (1, 1, 1, 5, 3, 2), (1, 1, 33, 17, 140, 20)]
OPTIONS = [
    {"feature": feature, "normalise": normalise} for feature in ("relu", "elu") for normalise in (True, False)
]


def inputs(sizes, dtype, seed=0):
    b, h, n, m, d, e = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, n, d), (b, h, m, d), (b, h, m, e))
    return [guarded(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(sizes, options, dtype):
    q, k, v = inputs(sizes, dtype)
    assert explain("linear_attention", q, k, v, **options).path == "triton"
    compare(
        lambda *t: linear_attention(*t, **options),
        lambda *t: linear.linear_attention_reference(*t, **options),
        (q, k, v),
        dtype,
    )


def test_layout_of_an_attention_layer():
    """q, k and v are views of one projection, heads inside tokens; joining the heads again copies nothing."""
    packed = guarded(torch.randn(2, 9, 3 * 2 * 16, generator=torch.Generator().manual_seed(0)))
    q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    out = linear_attention(q, k, v)
    doubles = [t.double() for t in (q, k, v)]
    assert relative_error(out, linear.linear_attention_reference(*doubles)) <= FORWARD[torch.float32]
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 3, 4, 4), (2, 1, 0, 3, 4, 4)])
@pytest.mark.parametrize("normalise", [True, False])
def test_nothing_in_nothing_out(sizes, normalise):
    b, h, n, m, d, e = sizes
    tensors = (torch.ones(b, h, n, d), torch.ones(b, h, m, d), torch.ones(b, h, m, e))
    out, grads, _ = values_and_gradients(lambda *t: linear_attention(*t, normalise=normalise), tensors)
    assert out[0].shape == (b, h, n, e)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_a_query_without_features_gives_zero_and_finite_gradients():
    q, k, v = (t.clone() for t in inputs((1, 1, 4, 4, 16, 16), torch.float16))
    q[:, :, 1] = -1
    out, grads, _ = values_and_gradients(linear_attention, (q, k, v))
    assert torch.equal(out[0][:, :, 1], torch.zeros_like(out[0][:, :, 1]))
    assert all(g.isfinite().all() for g in grads)


def test_float16_does_not_overflow_at_many_tokens():
    q, k, v = (20 * t.abs() for t in inputs((1, 1, 2, 2100, 16, 16), torch.float16))
    assert (k.double().transpose(-1, -2) @ v.double()).max() > 65504
    expected = linear.linear_attention_reference(q.double(), k.double(), v.double())
    assert relative_error(linear_attention(q, k, v), expected) <= FORWARD[torch.float16]


def test_blocks_stay_within_powers_of_two():
    for width in (1, 16, 17, 72, 128, 1152):
        for dtype in (torch.float32, torch.float16):
            block = config(width, width, dtype)
            assert 16 <= block["COLUMNS"] <= 128 and block["COLUMNS"] & (block["COLUMNS"] - 1) == 0


def test_the_operator_is_registered_as_torch_expects():
    q, k, v = (t.clone().requires_grad_() for t in inputs((1, 1, 2, 3, 4, 4), torch.float32))
    linear_attention(q, k, v)  # registers it
    torch.library.opcheck(
        torch.ops.minilib.linear_attention.default,
        (q, k, v, "elu", True, 1e-4),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_its_flops_are_counted(normalise):
    q, k, v = inputs((1, 2, 5, 7, 16, 8), torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, k, v, normalise=normalise)
    assert counter.get_total_flops() == linear.linear_attention_flops(1, 2, 5, 7, 16, 8, normalise)
