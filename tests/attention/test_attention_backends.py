import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from minilib.attention import full_attention, naive_attention
from minilib.attention.backends import BACKENDS, attention_backend


class Names(TorchDispatchMode):
    """The kernels that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.names.append(call.__name__)
        return call(*args, **(kwargs or {}))


def qkv(n=5, m=7, d=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, rows, d, generator=g) for rows in (n, m, m)]


def kernels(name):
    with attention_backend(name), Names() as seen:
        F.scaled_dot_product_attention(*qkv())
    return seen.names


def test_the_name_decides_which_kernel_runs():
    assert any("flash" in kernel for kernel in kernels("fused"))
    assert not any("flash" in kernel for kernel in kernels("math"))
    assert any("softmax" in kernel for kernel in kernels("math"))
    assert not any("softmax" in kernel for kernel in kernels("fused"))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("n, m", [(5, 7), (1, 7), (7, 7), (1, 1)])
def test_both_compute_softmax_attention(name, n, m):
    q, k, v = qkv(n, m)
    with attention_backend(name):
        assert torch.allclose(full_attention(q, k, v), naive_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_setting_before_is_restored(name):
    def enabled():
        return torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    before = enabled()
    with attention_backend(name):
        assert enabled() == (name == "math", name == "fused")
    assert enabled() == before
    with pytest.raises(KeyError), attention_backend(name):
        raise KeyError
    assert enabled() == before
    with sdpa_kernel(SDPBackend.MATH):
        with attention_backend("fused"):
            pass
        assert enabled() == (True, False)


def test_gradients_agree():
    gradients = []
    for name in BACKENDS:
        tensors = [t.requires_grad_() for t in qkv()]
        with attention_backend(name):
            full_attention(*tensors).square().sum().backward()
        gradients.append([t.grad for t in tensors])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_no_silent_fallback():
    q, k, v = qkv()
    with attention_backend("fused"), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k, v[..., :4])  # the fused kernel wants values as wide as keys


def test_an_unknown_name_is_refused():
    with (
        pytest.raises(
            ValueError, match=r"unknown attention backend 'flash': choose one of \['fused', 'math'\]"
        ),
        attention_backend("flash"),
    ):
        pass
