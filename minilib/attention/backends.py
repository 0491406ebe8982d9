"""Which kernel computes softmax attention: the one that makes the matrix of weights, or a fused one that never does.

PyTorch chooses by itself, and falls back without a word. To compare the two, the choice has to be forced.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

#: By name: what ``F.scaled_dot_product_attention`` may use. "fused" on a CPU is its flash kernel (Dao et al. 2022, 2205.14135).
BACKENDS: dict[str, tuple[SDPBackend, ...]] = {
    "math": (SDPBackend.MATH,),
    "fused": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION),
}


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Compute every ``F.scaled_dot_product_attention`` of a ``with`` block by one kind of kernel; the setting before is restored.

    There is no fallback: a call that "fused" cannot serve (values of another width than the queries, say) is an error of
    torch, so that no timing is of the other kernel by accident. On the meta device nothing is computed, and the name
    changes nothing.

    Args:
        name: "math", which makes the (n, m) weights in memory, or "fused", which does not.

    Raises:
        ValueError: another name.

    >>> import torch
    >>> q = torch.randn(1, 2, 5, 8)
    >>> results = []
    >>> for name in BACKENDS:
    ...     with attention_backend(name):
    ...         results.append(torch.nn.functional.scaled_dot_product_attention(q, q, q))
    >>> torch.allclose(*results, atol=1e-6)
    True
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {sorted(BACKENDS)}")
    with sdpa_kernel(list(BACKENDS[name])):
        yield
