"""Only where there is a GPU: every path of local attention against the float64 reference."""

import math

import pytest
import torch
from kernel_checks import compare, guarded

from minilib.kernels import explain, local

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def inputs(grid, extra, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(grid) + extra
    return [guarded(torch.randn(2, 3, n, d, generator=generator).to("cuda", dtype)) for _ in range(3)]


def check(function, grid, radius, extra, d, dtype):
    compare(
        lambda *x: function(*x, grid=grid, radius=radius),
        lambda *x: local.reference(*x, grid=grid, radius=radius),
        inputs(grid, extra, d, dtype),
        dtype,
        factor=2.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "grid, radius, extra, d", [((32, 32), 4, 0, 64), ((19, 45), 6.5, 77, 128), ((9, 9), 3, 3, 24)]
)
def test_triton(monkeypatch, poisoned, grid, radius, extra, d, dtype):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernel is for compute capability 8.0 and later")
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
    check(local.local_attention, grid, radius, extra, d, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles(dtype):
    check(local.tiled, (19, 45), 6.5, 77, 64, dtype)


def test_flex_is_what_runs_and_is_right():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlexAttention is used from compute capability 8.0 on")
    grid, radius, dtype = (24, 30), 4, torch.float16
    parts = inputs(grid, 5, 64, dtype)
    assert explain("local_attention", *parts, grid=grid, radius=radius).path == "flex"
    check(local.local_attention, grid, radius, 5, 64, dtype)
