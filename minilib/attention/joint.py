"""Joint attention of two streams, image and text, each with its own projections (Esser et al. 2024, arXiv 2403.03206).

Order, everywhere: the tokens of the image first, then those of the context, as in diffusers'
``attention_processor.py: JointAttnProcessor2_0``. Masks, recorded attention weights and processors all see that
order.
"""

from typing import Any

import torch
from jaxtyping import Bool, Complex, Float, Num
from torch import Tensor, nn

from .module import Attention, AttentionLayer
from .registry import Attend, Mask, get_attention
from .rope import Ids, RotaryTable, apply_rotary

ContextIds = Num[Tensor, "l axes"] | Num[Tensor, "b l axes"]
JointIds = Num[Tensor, "joint axes"] | Num[Tensor, "b joint axes"]
#: A row for each token of the image, then for each of the context.
JointTable = Complex[Tensor, "joint half"] | Complex[Tensor, "b joint half"]


def joint_mask(num_tokens: int, context_mask: Bool[Tensor, "b l"]) -> Bool[Tensor, "b 1 1 n"]:
    """Which keys may be read: all ``num_tokens`` of the image and the real tokens of the context.

    >>> joint_mask(2, torch.tensor([[True, False]])).tolist()
    [[[[True, True, True, False]]]]
    """
    image = context_mask.new_ones(len(context_mask), num_tokens)
    return torch.cat([image, context_mask], dim=1)[:, None, None]


def joint_ids(ids: Ids, context_ids: ContextIds | None, context: Float[Tensor, "b l d"]) -> JointIds:
    """Ids of image and context tokens, in this order; a context without ids is at the origin, where nothing turns.

    >>> joint_ids(torch.ones(2, 2), None, torch.zeros(3, 1, 8)).tolist()
    [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    if context_ids is None:
        context_ids = ids.new_zeros(context.shape[1], ids.shape[-1])
    if ids.ndim != context_ids.ndim:
        ids, context_ids = (part.expand(len(context), -1, -1) for part in (ids, context_ids))
    return torch.cat([ids, context_ids], dim=-2)


def rows(mask: Mask | None, n: int) -> Mask | None:
    """The first ``n`` queries' part of a mask that broadcasts over all queries."""
    return mask[..., :n, :] if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1 else mask


class HeadNorm(nn.Module):
    """Each head's vector to unit root mean square, times a learned gain (RMSNorm), in float32 whatever autocast says."""

    def __init__(self, head_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "b n h d"], *, gain: Float[Tensor, "n 1 d"] | None = None
    ) -> Float[Tensor, "b n h d"]:
        """Normalise the last axis, in the dtype of ``x``; a ``gain`` for each token takes the place of the layer's own."""
        exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return (exact * scale * (self.weight if gain is None else gain)).to(x.dtype)


def _joint_gain(norm: HeadNorm, context_norm: HeadNorm, n: int, length: int) -> Tensor:
    """(n + length, 1, d): each token gets the gain of its stream, so that one call normalises both."""
    return torch.cat([norm.weight.expand(n, 1, -1), context_norm.weight.expand(length, 1, -1)])


def _parts(x: Tensor, num_heads: int, dim: int) -> tuple[Tensor, ...]:
    """(b, n, parts * dim) to one (b, n, h, d) for each part, views all of them."""
    return x.view(*x.shape[:2], -1, num_heads, dim // num_heads).unbind(2)


def _turn(x: Tensor, rotary: RotaryTable | None) -> Tensor:
    """``apply_rotary`` on (b, n, h, d)."""
    return x if rotary is None else apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2)


class RotaryAttention(Attention):
    """Self-attention whose queries and keys can be turned by a rotary table."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False, **options: Any) -> None:
        super().__init__(dim, num_heads, qk_norm=qk_norm, **options)
        if qk_norm:
            self.q_norm, self.k_norm = HeadNorm(dim // num_heads), HeadNorm(dim // num_heads)

    def forward(
        self, x: Float[Tensor, "b n d"], *, rotary: RotaryTable | None = None, mask: Mask | None = None
    ) -> Float[Tensor, "b n d"]:
        """Mix the tokens of ``x``."""
        q, k, v = _parts(self.qkv(x), self.num_heads, x.shape[-1])
        q, k = _turn(self.q_norm(q), rotary), _turn(self.k_norm(k), rotary)
        out = self.processor(*(part.transpose(1, 2) for part in (q, k, v)), mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class JointAttention(AttentionLayer):
    """One softmax over image and context tokens; projections, norms of q and k, and output layers are each stream's own.

    The processor is called once, with q, k and v of image and context concatenated in this order. If the context
    is read only (``context_pre_only``), q holds the image's tokens alone.

    Args:
        dim: width of a token, in both streams.
        num_heads: heads; must divide ``dim``.
        variant: name in ``minilib.attention.attention_variants()``; ``variant_options`` are its keyword arguments.
        qk_norm: "rms_norm" (each head's queries and keys to unit root mean square, with learned gains) or "".
        context_pre_only: the context gives keys and values and is not itself changed: for the last block of a
            model, whose context nobody reads.
        unused_context_query: keep, with ``context_pre_only``, the weights of the context's query, which nothing
            reads: published checkpoints store them.

    Raises:
        ValueError: ``dim`` is no multiple of ``num_heads``, or an unknown variant or norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        variant: str = "full",
        variant_options: dict[str, Any] | None = None,
        qk_norm: str = "rms_norm",
        context_pre_only: bool = False,
        unused_context_query: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {dim}: choose a divisor of {dim}")
        if qk_norm not in ("", "rms_norm"):
            raise ValueError(f"unknown qk_norm {qk_norm!r}: choose 'rms_norm' or '' for none")
        self.num_heads, self.context_pre_only = num_heads, context_pre_only
        has_query = not context_pre_only or unused_context_query
        self.qkv = nn.Linear(dim, 3 * dim)
        self.context_qkv = nn.Linear(dim, (3 if has_query else 2) * dim)
        self.proj = nn.Linear(dim, dim)
        self.context_proj = None if context_pre_only else nn.Linear(dim, dim)
        self.qk_norm = bool(qk_norm)
        self.q_norm, self.k_norm, self.context_q_norm, self.context_k_norm = (
            HeadNorm(dim // num_heads) if qk_norm and wanted else None
            for wanted in (True, True, has_query, True)
        )
        self.processor: Attend = get_attention(variant, **(variant_options or {}))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b l d"],
        *,
        mask: Mask | None = None,
        rotary: JointTable | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"] | None]:
        """Mix the tokens of both streams.

        Args:
            x: image tokens.
            context: context tokens.
            mask: broadcasts to (b, heads, n + l, n + l); see ``joint_mask``.
            rotary: turns queries and keys, one row for each token of the image, then of the context; None: no turn.

        Returns:
            what to add to the image's tokens, and to the context's: None if it is read only.
        """
        (b, n, dim), length = x.shape, context.shape[1]
        own, other = self.qkv(x), self.context_qkv(context)
        if self.context_pre_only:
            (q,) = _parts(own[..., :dim], self.num_heads, dim)
            joint = torch.cat([own[..., dim:], other[..., -2 * dim :]], dim=1)
            k, v = _parts(joint, self.num_heads, dim)
            mask = rows(mask, n)
        else:
            q, k, v = _parts(torch.cat([own, other], dim=1), self.num_heads, dim)
        if self.qk_norm:
            k = self.k_norm(k, gain=_joint_gain(self.k_norm, self.context_k_norm, n, length))
            q_gain = (
                None if self.context_pre_only else _joint_gain(self.q_norm, self.context_q_norm, n, length)
            )
            q = self.q_norm(q, gain=q_gain)
        if rotary is not None:
            q, k = _turn(q, rotary[..., : q.shape[1], :]), _turn(k, rotary)
        out = self.processor(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)
        out = out.transpose(1, 2).reshape(b, -1, dim)
        if self.context_pre_only:
            return self.proj(out), None
        return self.proj(out[:, :n]), self.context_proj(out[:, n:])

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, context_pre_only={self.context_pre_only}"
