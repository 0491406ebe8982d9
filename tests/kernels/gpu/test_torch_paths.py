"""Only where there is a GPU: what torch computes for us there, against references on the CPU."""

import pytest
import torch
from torch import nn

from minilib.kernels import (
    expert_dispatch,
    explain,
    gather_tokens,
    int_matmul,
    moe,
    partial_attention,
    scatter_tokens,
)
from minilib.kernels.quant import IntegerLinear
from minilib.models import DiTBlock
from minilib.models.layers import GeluMLP, SwiGLU

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.mark.parametrize("kind", [GeluMLP, SwiGLU])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("one_expert", [False, True])
def test_experts(kind, dtype, bound, one_expert):
    torch.manual_seed(0)
    experts = nn.ModuleList(kind(32, 64) for _ in range(4))
    x, weights = torch.randn(100, 32), torch.rand(100, 2)
    indices = torch.zeros(100, 2, dtype=torch.long) if one_expert else torch.randint(4, (100, 2))
    cotangent = torch.randn(100, 32)

    def run(device, dtype, dispatch):
        there = kind_copy(experts, device, dtype)
        a, w = (t.to(device, dtype).detach().requires_grad_() for t in (x, weights))
        out = dispatch(a, indices.to(device), w, there)
        grads = torch.autograd.grad(out, [a, w, *there.parameters()], cotangent.to(device, dtype))
        return [t.double().cpu() for t in (out, *grads)]

    on_gpu = run("cuda", dtype, expert_dispatch)
    for got, expected in zip(on_gpu, run("cpu", torch.float64, moe.reference), strict=True):
        assert (got - expected).norm() <= bound * max(1.0, float(expected.norm()))
    given = x.to("cuda", dtype), indices.cuda(), weights.to("cuda", dtype), kind_copy(experts, "cuda", dtype)
    grouped = dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0)
    assert explain("expert_dispatch", *given).path == ("torch" if grouped else "cpu")


def kind_copy(experts, device, dtype):
    import copy

    return copy.deepcopy(experts).to(device, dtype)


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 7, 3), (17, 8, 8), (64, 33, 65), (300, 1152, 48)])
def test_integer_products_are_exact(m, k, n):
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (k, n)))
    assert torch.equal(int_matmul(a.cuda(), b.cuda()).cpu().long(), a.long() @ b.long())
    assert torch.equal(int_matmul(a.cuda(), b.t().contiguous().cuda().t()).cpu().long(), a.long() @ b.long())


def test_integer_linear_is_that_of_the_cpu():
    torch.manual_seed(0)
    layer, x = IntegerLinear.from_linear(nn.Linear(96, 40)), torch.randn(3, 50, 96)
    expected = layer(x)
    assert torch.allclose(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("each", [False, True])
def test_some_tokens_with_fresh_keys_and_values(each):
    torch.manual_seed(0)
    block = DiTBlock(64, 4).cuda().eval().requires_grad_(False)
    for p in block.parameters():
        p.normal_(std=0.3)
    x, c, caches = torch.randn(2, 64, 64, device="cuda"), torch.randn(2, 64, device="cuda"), {}
    drawn = [torch.randperm(64, device="cuda")[:16] for _ in range(2)]
    indices = torch.stack(drawn) if each else drawn[0]
    with partial_attention(block, caches):
        full = block(x, c)
    with partial_attention(block, caches, indices):
        part = block(gather_tokens(x, indices), c)
    assert torch.allclose(scatter_tokens(full, part, indices), full, rtol=1e-3, atol=1e-3)
