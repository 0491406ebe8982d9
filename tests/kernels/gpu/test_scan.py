"""Only where there is a GPU: the selective scan in Triton and in torch against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import compare

from minilib.kernels import explain, scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def inputs(b, d, n, length, groups, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, dt = (torch.randn(b, d, length, generator=g) for _ in range(2))
    B, C = (torch.randn(b, groups, n, length, generator=g) for _ in range(2))
    A, D = -torch.randn(d, n, generator=g).exp(), torch.randn(d, generator=g)
    return [x.to("cuda", dtype) for x in (u, F.softplus(dt - 1), A, B, C, D)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(2, 40, 16, 150, 1), (2, 384, 1, 256, 4), (1, 33, 5, 65, 3), (1, 32, 64, 70, 1)]
)
def test_values_and_gradients(monkeypatch, poisoned, sizes, dtype):
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
    parts = inputs(*sizes, dtype)
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        with pytest.raises(RuntimeError, match="bfloat16"):
            scan.selective_scan(*parts)
        return
    compare(scan.selective_scan, scan.reference, parts, dtype, factor=2.0)


def test_float64_goes_to_torch():
    parts = inputs(1, 4, 2, 9, 1, torch.float64)
    assert explain("selective_scan", *parts).path == "torch"
    torch.testing.assert_close(scan.selective_scan(*parts), scan.reference(*parts), atol=1e-10, rtol=0)
