"""The numbers that ``compile_kernel`` reads are those of kernels whose numbers are known."""

import pytest
import triton
import triton.language as tl

from minilib.kernels.compiling import TARGETS, compile_kernel


@triton.jit
def product_kernel(a_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, a))


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    total = tl.sum(x, axis=0)
    tl.store(out_ptr + at, x / total, mask=at < n)


def build_sum(capability=80, size=1024, num_warps=4, unaligned=()):
    arguments = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
    return compile_kernel(
        sum_kernel, capability, arguments, {"SIZE": size}, num_warps=num_warps, unaligned=unaligned
    )


def test_a_product_uses_the_tensor_cores_where_triton_has_them():
    arguments = {"a_ptr": "*fp16", "out_ptr": "*fp32"}
    built = {c: compile_kernel(product_kernel, c, arguments, {"SIZE": 64}) for c in TARGETS}
    assert built[75].mma == built[75].wgmma == 0
    assert built[80].mma > 0 and built[80].wgmma == 0 and built[89].mma > 0
    assert built[90].wgmma > 0
    assert all(f".target sm_{c}" in built[c].ptx for c in TARGETS)


def test_values_that_do_not_fit_are_spilt():
    fits, full = build_sum(size=1024), build_sum(size=32768)  # 8 and 256 values a thread, 255 registers
    assert fits.spill_bytes == 0 and fits.registers < 64
    assert full.spill_bytes > 0 and full.registers == 255


def test_a_sum_over_warps_needs_shared_memory():
    assert build_sum(num_warps=4).shared_bytes > 0
    assert build_sum(size=32, num_warps=1).shared_bytes == 0


def test_what_is_known_to_be_aligned_is_read_in_larger_pieces():
    assert ".v4" in build_sum().ptx
    assert ".v4" not in build_sum(unaligned=("x_ptr", "out_ptr")).ptx


def test_arguments_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"of sum_kernel do not match: \['m', 'n'\]"):
        compile_kernel(sum_kernel, 80, {"x_ptr": "*fp32", "out_ptr": "*fp32", "m": "i32"}, {"SIZE": 64})
