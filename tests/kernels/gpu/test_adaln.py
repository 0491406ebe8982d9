"""Only where there is a GPU: the Triton path against the float64 reference, in every dtype."""

import pytest
import torch
from kernel_checks import compare, guarded

from minilib.kernels import adaln, explain, gated_residual_modulate, modulate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def inputs(shape, dtype, seed=0):
    b, n, d = shape
    generator = torch.Generator().manual_seed(seed)
    x, branch = (guarded(torch.randn(b, n, d, generator=generator).to("cuda", dtype)) for _ in range(2))
    condition = guarded(torch.randn(b, 6 * d, generator=generator).to("cuda", dtype))
    return x, branch, *condition.chunk(6, dim=-1)[1:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 70, 48), (3, 257, 1152), (1, 5, 4096)])
def test_values_and_gradients(monkeypatch, poisoned, shape, dtype):
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
    arguments = inputs(shape, dtype)
    x, _, _, shift, scale = arguments
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        with pytest.raises(RuntimeError, match="bfloat16"):
            modulate(x, shift, scale)
        return
    factor = 1.0 if dtype == torch.float32 else 2.0
    compare(modulate, adaln.modulate_reference, (x, shift, scale), dtype)
    compare(gated_residual_modulate, adaln.gated_residual_modulate_reference, arguments, dtype, factor=factor)


def test_float64_goes_to_torch():
    x, _, _, shift, scale = inputs((2, 4, 8), torch.float64)
    choice = explain("modulate", x, shift, scale)
    assert choice.path == "torch" and "float64" in choice.reason
