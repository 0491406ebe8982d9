"""Softmax attention as a function, fused and written out: the variants "full" and "naive", and what others build on them.

The signature is that of every variant, see ``minilib.attention.registry``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .registry import Case, Mask, register_attention


def softmax_flops(b: int, h: int, n: int, m: int, d: int, **options: Any) -> int:
    """FLOPs of q k^T and of the weights times v, masked or not: 4 b h n m d."""
    return 4 * b * h * n * m * d


def fused_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "b h n d"]:
    """``F.scaled_dot_product_attention``, in float32 where a CPU is given half precision: see ``full_attention``."""
    args = {"is_causal": is_causal}
    if q.device.type != "cpu" or q.dtype in (torch.float32, torch.float64):
        if not (q.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **args)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    # Autocast would cast the inputs of this one operation back to bfloat16.
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, **args)
    return out.to(q.dtype)


def attention_weights(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], *, mask: Mask | None = None
) -> Float[Tensor, "b h n m"]:
    """softmax(q k^T / sqrt(d) + mask): row i says how much query i reads from each key; rows sum to 1."""
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)


def softmax_reference(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention written out, one query at a time; the reference of the variants that are exactly that."""
    rows = []
    for i in range(q.shape[2]):
        logits = (q[:, :, i : i + 1] * k).sum(-1) / q.shape[-1] ** 0.5
        if mask is not None:
            row = mask.expand(*mask.shape[:-2], q.shape[2], k.shape[2])[..., i, :]
            logits = torch.where(row, logits, -torch.inf) if mask.dtype == torch.bool else logits + row
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        rows.append((weights / weights.sum(-1, keepdim=True)).unsqueeze(-2) @ v)
    return torch.cat(rows, dim=2) if rows else torch.zeros_like(q)


SOFTMAX_CASES = (Case({}, n=5), Case({}, n=3, m=7), Case({}, n=1))


@register_attention(
    "full", softmax=True, reference=softmax_reference, flops=softmax_flops, cases=SOFTMAX_CASES
)
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
    return fused_attention(q, k, v, mask=mask)


@register_attention(
    "naive", softmax=True, reference=softmax_reference, flops=softmax_flops, cases=SOFTMAX_CASES
)
def naive_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """The same function as ``full_attention``, written out: it makes the (n, m) weight matrix."""
    return attention_weights(q, k, mask=mask).to(v.dtype) @ v
