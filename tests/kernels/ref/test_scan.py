import inspect

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import compare, guarded
from torch._subclasses.fake_tensor import FakeTensorMode

from minilib.kernels import explain, scan

NAMES = ("u", "dt", "A", "B", "C", "D")


def inputs(b=2, d=6, n=3, length=13, groups=None, *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    select = (b, n, length) if groups is None else (b, groups, n, length)
    parts = (
        normal(b, d, length),
        F.softplus(normal(b, d, length) - 1),
        -normal(d, n).exp(),
        normal(*select),
        normal(*select),
        normal(d),
    )
    return [x.to(dtype).requires_grad_() for x in parts]


def by_hand(u, dt, A, B, C, D):
    """One number at a time."""
    u, dt, A, B, C, D = (x.tolist() for x in (u, dt, A, B, C, D))
    y = torch.zeros(len(u), len(u[0]), len(u[0][0]), dtype=torch.float64)
    for i in range(y.shape[0]):
        for c in range(y.shape[1]):
            h = [0.0] * len(A[0])
            for t in range(y.shape[2]):
                decay = [torch.tensor(dt[i][c][t] * a, dtype=torch.float64).exp().item() for a in A[c]]
                h = [
                    w * s + dt[i][c][t] * B[i][j][t] * u[i][c][t]
                    for j, (w, s) in enumerate(zip(decay, h, strict=True))
                ]
                y[i, c, t] = sum(C[i][j][t] * s for j, s in enumerate(h)) + D[c] * u[i][c][t]
    return y


@pytest.mark.parametrize("function", [scan.reference, scan.chunked, scan.selective_scan])
def test_is_the_recurrence(function):
    parts = [x.detach() for x in inputs(length=7)]
    torch.testing.assert_close(function(*parts), by_hand(*parts), atol=1e-12, rtol=0)


@pytest.mark.parametrize("function", [scan.reference, scan.chunked])
def test_closed_forms(function):
    one = torch.ones(1, 1, 9, dtype=torch.float64)
    decay = -torch.tensor([[0.3]], dtype=torch.float64)
    # A constant input: a geometric series.
    t = torch.arange(1, 10, dtype=torch.float64)
    expected = (1 - torch.exp(-0.3 * t)) / (1 - torch.exp(torch.tensor(-0.3, dtype=torch.float64)))
    torch.testing.assert_close(function(one, one, decay, one, one).flatten(), expected, atol=1e-12, rtol=0)
    # No decay: a cumulative sum. Infinite decay: no memory.
    u = torch.randn(1, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(function(u, one, 0 * decay, one, one), u.cumsum(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(function(u, one, 1e9 * decay, one, one), u, atol=1e-12, rtol=0)


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("values", [1, 150, 2**17])
def test_chunks_of_any_size_equal_the_reference(monkeypatch, groups, values):
    monkeypatch.setattr(scan, "CHUNK_VALUES", values)
    parts = inputs(length=23, groups=groups)
    expected, out = scan.reference(*parts), scan.chunked(*parts)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weights = torch.randn(out.shape, dtype=torch.float64)
    wanted, got = (torch.autograd.grad((y * weights).sum(), parts) for y in (expected, out))
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("groups", [None, 2])
def test_gradcheck(monkeypatch, groups):
    monkeypatch.setattr(scan, "CHUNK_VALUES", 2 * 2 * 4 * 2)
    parts = inputs(2, 4, 2, 5, groups)
    assert torch.autograd.gradcheck(scan.chunked, parts, fast_mode=True)
    assert torch.autograd.gradcheck(scan.reference, parts, fast_mode=True)


def test_groups_are_scans_of_their_own():
    u, dt, A, B, C, D = inputs(groups=2)
    whole = scan.chunked(u, dt, A, B, C, D)
    for i in range(2):
        own = slice(3 * i, 3 * i + 3)
        part = scan.chunked(u[:, own], dt[:, own], A[own], B[:, i], C[:, i], D[own])
        torch.testing.assert_close(whole[:, own], part, atol=1e-12, rtol=0)


def test_the_future_does_not_reach_the_past():
    parts = inputs()
    y = scan.chunked(*parts)
    grads = torch.autograd.grad(y[..., 5].sum(), [parts[i] for i in (0, 1, 3, 4)])
    for name, g in zip("u dt B C".split(), grads, strict=True):
        assert (g[..., 6:] == 0).all()
        assert (g[..., :6] != 0).any(1).all() if name != "C" else (g[..., :5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype(dtype):
    parts = [guarded(x.detach().to(dtype)) for x in inputs(length=40, groups=2)]
    compare(scan.selective_scan, scan.reference, parts, dtype)


def test_autocast_changes_nothing_inside():
    parts = inputs(dtype=torch.float32)
    expected = scan.chunked(*parts)
    wanted = torch.autograd.grad(expected.sum(), parts)
    with torch.autocast("cpu", torch.bfloat16):
        out = scan.chunked(*parts)
        got = torch.autograd.grad(out.sum(), parts)
    assert torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_some_inputs_only_and_no_direct_path():
    parts = inputs()
    for i in (2, 4):
        others = [x.detach() for x in parts]
        others[i].requires_grad_()
        for function in (scan.chunked, scan.reference):
            (g,) = torch.autograd.grad(function(*others[:5]).square().sum(), others[i])
            assert g.abs().max() > 0
    u = parts[0].detach()
    without = scan.chunked(*parts[:5])
    torch.testing.assert_close(scan.chunked(*parts), without + parts[5][:, None] * u, atol=1e-12, rtol=0)


def test_layouts_and_repeated_backward_passes():
    parts = inputs()
    weights = torch.randn(2, 6, 13, dtype=torch.float64)
    strided = [x.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_() for x in parts]
    y, other = scan.chunked(*parts), scan.chunked(*strided)
    torch.testing.assert_close(y, other, atol=1e-12, rtol=0)
    first = torch.autograd.grad((y * weights).sum(), parts, retain_graph=True)
    second = torch.autograd.grad((y * weights).sum(), parts)
    third = torch.autograd.grad((other * weights).sum(), strided)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-12, rtol=0)


@pytest.mark.parametrize("b, length", [(0, 5), (2, 0), (1, 1)])
@pytest.mark.parametrize("function", [scan.chunked, scan.reference])
def test_little_or_nothing(function, b, length):
    parts = inputs(b=b, length=length)
    y = function(*parts)
    assert y.shape == (b, 6, length)
    y.sum().backward()


def saved_bytes(function, parts):
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*parts)
    return sum(storages.values())


def test_the_backward_pass_keeps_one_state_a_chunk(monkeypatch):
    b, d, n, length, chunk = 2, 16, 4, 64, 16
    monkeypatch.setattr(scan, "CHUNK_VALUES", chunk * b * d * n)
    parts = inputs(b, d, n, length, dtype=torch.float32)
    values = 2 * b * d * length + 2 * b * n * length + b * d * n * (1 + length // chunk)
    # Besides D: what autograd keeps of its product with u.
    assert saved_bytes(scan.chunked, parts[:5]) == 4 * values
    assert saved_bytes(scan.reference, parts[:5]) > 4 * 2 * b * d * n * length


def test_it_is_not_differentiated_twice():
    parts = inputs()
    (g,) = torch.autograd.grad(scan.chunked(*parts).square().sum(), parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


class TestChoice:
    def test_on_a_cpu(self, monkeypatch):
        parts = inputs(dtype=torch.float32)
        assert explain("selective_scan", *parts).path == "cpu"
        monkeypatch.setenv("MINILIB_KERNELS", "triton")
        with pytest.raises(RuntimeError, match="selective_scan cannot run in Triton: .*(CUDA|installed)"):
            scan.selective_scan(*parts)

    def test_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr("minilib.kernels.dispatch.capability", lambda device: (7, 5))
        monkeypatch.setattr("minilib.kernels.dispatch.HAS_TRITON", True)
        with FakeTensorMode():
            for n, dtype, reason in (
                (8, torch.float16, "measured on a GPU of capability 7.5"),
                (100, torch.float16, "100 states"),
                (8, torch.float64, "float64"),
            ):
                u, a, b = (torch.empty(s, device="cuda", dtype=dtype) for s in ((1, 4, 5), (4, n), (1, n, 5)))
                choice = explain(scan.SCAN, u, u, a, b, b, None)
                assert choice.path == "torch" and reason in choice.reason
        monkeypatch.setattr("minilib.kernels.dispatch.MEASURED", {"selective_scan": (7, 5)})
        with FakeTensorMode():
            u, a, b = (torch.empty(s, device="cuda") for s in ((1, 4, 5), (4, 8), (1, 8, 5)))
            assert explain(scan.SCAN, u, u, a, b, b, None).path == "triton"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dt": torch.ones(2, 6, 12)}, "u and dt must both be"),
        ({"A": torch.ones(5, 3)}, r"A must be \(channels = 6, states\), got \(5, 3\)"),
        ({"B": torch.ones(2, 4, 13)}, r"B must be \(2, 3, 13\).* got \(2, 4, 13\)"),
        ({"C": torch.ones(2, 4, 3, 13)}, "groups that divide the 6 channels"),
        ({"B": torch.ones(2, 1, 3, 13)}, "B and C must have the same shape"),
        ({"D": torch.ones(7)}, r"D must be \(6,\), got \(7,\)"),
    ],
)
def test_errors(change, message):
    parts = dict(zip(NAMES, inputs(dtype=torch.float32), strict=True))
    # Without the tests' type checker, which would be first to find a wrong shape.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(scan.selective_scan)(**(parts | change))


@pytest.mark.parametrize("chunk_values", [1, 2**17])
def test_a_second_backward_pass_finds_the_same_states(monkeypatch, chunk_values):
    """Whether the states were kept or are made again, the first pass must leave them alone."""
    monkeypatch.setattr(scan, "CHUNK_VALUES", chunk_values)
    parts = [x.requires_grad_() for x in inputs()]
    loss = scan.selective_scan(*parts).square().sum()
    first = torch.autograd.grad(loss, parts, retain_graph=True)
    second = torch.autograd.grad(loss, parts)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
