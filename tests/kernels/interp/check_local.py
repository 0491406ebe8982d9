import math

import pytest
import torch
from kernel_checks import compare, guarded, relative_error

from minilib.kernels import explain, local
from minilib.kernels._triton import local as kernels

# Grid, radius, extra keys, extra queries, width of a head: several tiles and turns, odd sizes, widths that fill no block.
SETTINGS = [
    ((9, 10), 2.3, 0, 0, 8),
    ((3, 17), 4, 5, 2, 20),
    ((8, 9), 3, 70, 0, 16),
    ((1, 1), 1, 0, 1, 3),
]


def inputs(grid, extra, extra_queries, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [math.prod(grid) + e for e in (extra_queries, extra, extra)]
    return [guarded(torch.randn(1, 2, n, d, generator=generator).to(dtype)) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("grid, radius, extra, extra_queries, d", SETTINGS)
def test_values_and_gradients(grid, radius, extra, extra_queries, d, dtype):
    q, k, v = inputs(grid, extra, extra_queries, d, dtype)
    assert explain("local_attention", q, k, v, grid=grid, radius=radius).path == "triton"
    compare(
        lambda *x: local.local_attention(*x, grid=grid, radius=radius),
        lambda *x: local.reference(*x, grid=grid, radius=radius),
        (q, k, v),
        dtype,
    )


def test_large_logits_overflow_nothing():
    q, k, v = inputs((8, 9), 3, 0, 16, torch.float32)
    q, k = guarded(30 * q), guarded(30 * k)
    compare(
        lambda *x: local.local_attention(*x, grid=(8, 9), radius=3),
        lambda *x: local.reference(*x, grid=(8, 9), radius=3),
        (q, k, v),
        torch.float32,
        factor=100.0,  # logits of a thousand have an error of 1e-4 before the softmax
    )


def test_the_window_is_all_that_is_read():
    """What lies outside every window of a tile may be NaN."""
    q, k, v = (x.clone() for x in inputs((4, 30), 0, 0, 8, torch.float32))
    far = torch.zeros(4, 30, dtype=torch.bool)
    far[:, 8 + 2 :] = True
    k[:, :, far.flatten()] = torch.nan
    out = kernels.local_attention(q, k, v, 4, 30, 9, 2)[0].unflatten(2, (4, 30))
    assert out[:, :, :, :8].isfinite().all() and not out[:, :, :, 12:].isfinite().any()


def test_any_layout():
    q, k, v = inputs((9, 8), 3, 0, 16, torch.float32)
    expected = local.local_attention(q, k, v, grid=(9, 8), radius=2)
    heads_inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    columns_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for other in (heads_inside, columns_first):
        assert torch.equal(local.local_attention(*other, grid=(9, 8), radius=2), expected)


def test_a_radius_beyond_32_bits():
    q, k, v = inputs((3, 4), 0, 0, 16, torch.float32)
    out = local.local_attention(q, k, v, grid=(3, 4), radius=1e6)
    full = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(out, full) <= 1e-6


def test_the_gradients_are_the_same_each_time_and_an_empty_batch_has_some():
    parts = [t.requires_grad_() for t in inputs((9, 8), 2, 0, 16, torch.float32)]
    runs = [
        torch.autograd.grad(local.local_attention(*parts, grid=(9, 8), radius=2).square().sum(), parts)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    empty = [t.detach()[:0].requires_grad_() for t in parts]
    local.local_attention(*empty, grid=(9, 8), radius=2).sum().backward()
    assert all(t.grad.shape == t.shape for t in empty)


def test_the_operator_is_registered_as_torch_expects():
    q, k, v = (torch.randn(1, 1, 4, 4).requires_grad_() for _ in range(3))
    torch.library.opcheck(
        torch.ops.minilib.local_attention.default,
        (q, k, v, 2, 2, 4, 1),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )


def test_its_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    parts = [t.detach().requires_grad_() for t in inputs((9, 8), 5, 0, 16, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        out = local.local_attention(*parts, grid=(9, 8), radius=3)
        forward = counter.get_total_flops()
        out.sum().backward()
    # Two tiles of 64 queries, windows of 12 x 12 and 5 extra keys, two heads; 2 products, then 7.
    assert forward == 2 * 2 * 2 * 64 * (144 + 5) * 16 * 2
    assert counter.get_total_flops() == forward * 9 // 2
