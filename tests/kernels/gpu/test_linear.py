"""Only where there is a GPU: the Triton path against the float64 reference, in every dtype."""

import pytest
import torch
from kernel_checks import compare, guarded

from minilib.kernels import explain, linear, linear_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def inputs(sizes, dtype, seed=0):
    b, h, n, m, d, e = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, n, d), (b, h, m, d), (b, h, m, e))
    return [guarded(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(2, 3, 1000, 1500, 64, 64), (1, 2, 300, 257, 72, 72), (1, 1, 70, 33, 200, 40)]
)
@pytest.mark.parametrize("feature", ["relu", "elu"])
@pytest.mark.parametrize("normalise", [True, False])
def test_values_and_gradients(monkeypatch, poisoned, sizes, dtype, feature, normalise):
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
    options = {"feature": feature, "normalise": normalise}
    if torch.cuda.get_device_capability() < (8, 0):
        with pytest.raises(RuntimeError, match="tensor cores"):
            linear_attention(*inputs(sizes, dtype), **options)
        return
    compare(
        lambda *t: linear_attention(*t, **options),
        lambda *t: linear.linear_attention_reference(*t, **options),
        inputs(sizes, dtype),
        dtype,
    )


def test_float32_goes_to_torch():
    q, k, v = inputs((1, 1, 4, 4, 16, 16), torch.float32)
    choice = explain("linear_attention", q, k, v)
    assert choice.path == "torch" and "tensor cores" in choice.reason
