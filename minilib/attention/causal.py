"""Causal attention: a token sees itself and those before it; and the cache of keys and values for decoding.

With more keys than queries the two are aligned at their ends: the queries are the last tokens of the sequence, as in
decoding with a cache.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .functional import fused_attention, naive_attention, softmax_flops
from .joint import RotaryAttention
from .registry import Case, Mask, register_attention
from .rope import RotaryTable, apply_rotary


def causal_sees(n: int, m: int, *, device: torch.device | None = None) -> Bool[Tensor, "n m"]:
    """Query i of n sees the keys up to number i + m - n.

    >>> causal_sees(2, 3).tolist()
    [[True, True, False], [True, True, True]]
    """
    return torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)


def _combined(mask: Mask | None, n: int, m: int, device: torch.device) -> Tensor:
    seen = causal_sees(n, m, device=device)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def causal_reference(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Query by query, over a slice of the keys."""
    n, m = q.shape[2], k.shape[2]
    rows = []
    for i in range(n):
        end = m - n + i + 1
        row = None if mask is None else mask.expand(*mask.shape[:-2], n, m)[..., i : i + 1, :end]
        rows.append(naive_attention(q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end], mask=row))
    return torch.cat(rows, dim=2)


@register_attention(
    "causal",
    reference=causal_reference,
    sees=causal_sees,
    flops=softmax_flops,
    cases=(Case({}, n=5), Case({}, n=3, m=7), Case({}, n=1, m=4), Case({}, n=1)),
)
def causal_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Softmax attention to the own and earlier tokens; a ``mask`` forbids more.

    FLOPs are counted as without the mask, which is what torch counts: the fused kernel of a GPU skips about half.

    Raises:
        ValueError: more queries than keys, so that the first queries would see nothing.
    """
    n, m = q.shape[2], k.shape[2]
    if n > m:
        raise ValueError(
            f"attention 'causal' aligns queries and keys at their ends: {n} queries, but only {m} keys, would leave "
            f"the first {n - m} without any"
        )
    if mask is None and n == 1:
        return fused_attention(q, k, v)
    if mask is None and n == m:
        return fused_attention(q, k, v, is_causal=True)
    return fused_attention(q, k, v, mask=_combined(mask, n, m, q.device))


class KVCache:
    """Keys and values of the tokens so far, in memory that is taken once.

    One cache serves one layer. ``attend`` is a processor, so a cache also works in layers that know nothing of
    it, through ``attention_processor``.

    Args:
        batch: sequences decoded side by side.
        num_heads: of the layer.
        capacity: tokens it can hold.
        head_dim: width of a head.
        dtype: of keys and values; theirs must be the same.
        device: likewise.

    >>> cache = KVCache(1, 2, 4, 8)
    >>> k, v = cache.append(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
    >>> k.shape, len(cache)
    (torch.Size([1, 2, 3, 8]), 3)
    """

    def __init__(
        self,
        batch: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, num_heads, capacity, head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._length = 0

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self.keys.shape[2]

    def __len__(self) -> int:
        return self._length

    def reset(self) -> None:
        """Forget every token; the memory is kept."""
        self._length = 0

    def append(
        self, k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"]
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Store the keys and values of n new tokens.

        Returns:
            those of all tokens so far, as views of the cache.

        Raises:
            ValueError: another batch, number of heads, width or dtype, no room left, or keys and values that are
                part of a graph: a cache is for sampling.
        """
        own = self.keys
        wanted = (own.shape[0], own.shape[1], k.shape[2], own.shape[3])
        if k.shape != wanted or v.shape != wanted or k.dtype != own.dtype or v.dtype != own.dtype:
            raise ValueError(
                f"the cache holds {own.dtype} of shape {tuple(own.shape)}, but k is {k.dtype} {tuple(k.shape)} and "
                f"v {v.dtype} {tuple(v.shape)}"
            )
        end = self._length + k.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens: {self._length} are in it, {k.shape[2]} more do not "
                "fit; make a larger one, or reset it"
            )
        if k.requires_grad or v.requires_grad:
            raise ValueError(
                "keys and values that need gradients cannot be cached: decode under torch.no_grad()"
            )
        places = torch.arange(self._length, end, device=own.device)
        self.keys.index_copy_(2, places, k)
        self.values.index_copy_(2, places, v)
        self._length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        *,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """A processor: store k and v, then causal attention to everything stored."""
        return causal_attention(q, *self.append(k, v), mask=mask)


class CausalAttention(RotaryAttention):
    """Causal self-attention that can decode: with a cache, ``x`` is the next tokens of the sequence.

    Args:
        dim: width of a token.
        num_heads: heads; must divide ``dim``.
        qk_norm: see ``RotaryAttention``.

    >>> layer, cache = CausalAttention(8, 2), KVCache(1, 2, 5, 4)
    >>> x = torch.randn(1, 5, 8)
    >>> with torch.no_grad():
    ...     steps = torch.cat([layer(x[:, i : i + 1], cache=cache) for i in range(5)], dim=1)
    ...     torch.allclose(steps, layer(x), atol=1e-6)
    True
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__(dim, num_heads, qk_norm=qk_norm, variant="causal")

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        *,
        rotary: RotaryTable | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Mix the tokens of ``x``, and with a cache also those before them.

        Args:
            x: the whole sequence, or with a ``cache`` the tokens that follow those in it.
            rotary: turns the queries and keys of ``x``; one row a token of ``x``.
            mask: broadcasts to (b, h, n, m), over the m tokens so far.
            cache: keys and values of the tokens so far; those of ``x`` are added to it.
        """
        shape = (*x.shape[:2], self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (part.reshape(shape) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        out = self.processor(q, k, v, mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))
