import pytest
import torch
import torch.nn.functional as F
from kernel_checks import compare

from minilib.kernels import explain, scan
from minilib.kernels._triton import scan as kernels


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 8)


def walled(tensor, band=64):
    """The same values, contiguous, between NaN: this kernel copies what is not contiguous."""
    buffer = torch.full((tensor.numel() + 2 * band,), torch.nan, dtype=tensor.dtype)
    view = buffer[band : band + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def inputs(b, d, n, length, groups, dtype, seed=0):
    """In the layout that the kernel works in, channels last."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    u, dt = normal(b, length, d), F.softplus(normal(b, length, d) - 1)
    select = [walled(normal(b, groups, length, n).to(dtype)).transpose(2, 3) for _ in range(2)]
    sequences = [walled(x.to(dtype)).transpose(1, 2) for x in (u, dt)]
    return [*sequences, walled(-normal(d, n).exp().to(dtype)), *select, walled(normal(d).to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "b, d, n, length, groups",
    [(2, 6, 3, 19, 1), (1, 40, 4, 16, 1), (2, 6, 1, 9, 3), (1, 1, 1, 1, 1)],
)
def test_values_and_gradients(b, d, n, length, groups, dtype):
    parts = inputs(b, d, n, length, groups, dtype)
    assert explain("selective_scan", *parts).path == "triton"
    compare(scan.selective_scan, scan.reference, parts, dtype)


def test_one_b_and_c_for_all_channels_and_no_direct_path():
    u, dt, A, B, C, _ = inputs(2, 5, 2, 11, 1, torch.float32)
    compare(scan.selective_scan, scan.reference, (u, dt, A, B[:, 0], C[:, 0]), torch.float32)


def test_the_gradients_are_the_same_each_time_and_an_empty_batch_has_some():
    parts = [t.detach().requires_grad_() for t in inputs(2, 34, 2, 9, 1, torch.float32)]
    runs = [torch.autograd.grad(scan.selective_scan(*parts).square().sum(), parts) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    empty = [t.detach()[:0] if t.ndim > 2 else t.detach() for t in parts]
    empty = [t.requires_grad_() for t in empty]
    scan.selective_scan(*empty).sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in empty)


def test_the_operator_is_registered_as_torch_expects():
    u, dt, a, b = torch.randn(1, 3, 2), torch.rand(1, 3, 2), -torch.rand(2, 1), torch.randn(1, 1, 3, 1)
    torch.library.opcheck(
        torch.ops.minilib.selective_scan.default,
        tuple(t.requires_grad_() for t in (u, dt, a, b, b.detach().clone())),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )
