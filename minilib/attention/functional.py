"""Attention as a function: every variant has the signature ``attend(q, k, v, *, mask=None) -> out``.

``q`` is (b, h, n, d), ``k`` and ``v`` are (b, h, m, d), the result is (b, h, n, d). A mask broadcasts to (b,
h, n, m): boolean with True where a query may look, or floating point, added to the logits. A new variant is
one decorated function::

    @register_attention("mine")
    def mine(q, k, v, *, mask=None): ...
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

Mask = Shaped[Tensor, "..."]


@runtime_checkable
class Attend(Protocol):
    """What an attention variant, or a processor that replaces one, has to be."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Map queries, keys and values of shape (b, h, n, d) to (b, h, n, d)."""


ATTENTION: dict[str, Attend] = {}


def register_attention(name: str, *, softmax: bool = False) -> Callable[[Attend], Attend]:
    """Decorator that adds a variant to ``ATTENTION`` under ``name``.

    ``softmax`` says that the variant computes softmax(q k^T / sqrt(d)) v exactly, so that
    ``attention_weights`` describes it.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: Attend) -> Attend:
        if name in ATTENTION:
            raise ValueError(f"attention {name!r} is registered already: choose another name")
        function.softmax = softmax
        ATTENTION[name] = function
        return function

    return add


def get_attention(name: str, **options: Any) -> Attend:
    """The variant called ``name``, with ``options`` bound as keyword arguments.

    Raises:
        ValueError: no such variant.

    >>> q = torch.ones(1, 2, 3, 4)
    >>> get_attention("full")(q, q, q).shape
    torch.Size([1, 2, 3, 4])
    """
    if name not in ATTENTION:
        raise ValueError(f"unknown attention {name!r}: choose one of {sorted(ATTENTION)}")
    function = ATTENTION[name]
    if not options:
        return function
    bound = partial(function, **options)
    bound.softmax = function.softmax
    return bound


@register_attention("full", softmax=True)
def full_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention by torch's fused kernel (Vaswani et al. 2017, equation 1).

    On a CPU a half-precision call is computed in float32: the backward pass of the bfloat16 kernel is 3 to 11
    times slower than the float32 one at 16 to 64 tokens. The result has the dtype of ``q`` either way.
    """
    if q.device.type != "cpu" or q.dtype in (torch.float32, torch.float64):
        if not (q.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    # Autocast would cast the inputs of this one operation back to bfloat16.
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask)
    return out.to(q.dtype)


def attention_weights(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], *, mask: Mask | None = None
) -> Float[Tensor, "b h n m"]:
    """softmax(q k^T / sqrt(d) + mask): row i says how much query i reads from each key; rows sum to 1."""
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)


@register_attention("naive", softmax=True)
def naive_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """The same function as ``full_attention``, written out: it makes the (n, m) weight matrix."""
    return attention_weights(q, k, mask=mask).to(v.dtype) @ v
