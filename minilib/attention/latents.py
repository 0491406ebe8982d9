"""Local attention with global latents (FIT, Chen and Li 2023, arXiv 2305.12689).

Tokens in groups see their own group only. Each group has a few latent tokens, which read from its tokens, attend to
the latents of all groups, and are read by its tokens in turn: N * (group size) weights for what is near and
(latents)**2 for what is far. In the paper these are layers of their own, several in a row
(``google-research/pix2seq: architectures/transformers.py``, ``FIT``); here one round of it is one processor, and its
result is added to that of the local attention.
"""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .functional import attention_weights, fused_attention
from .grids import Sizes, check_grid, check_tokens, from_cells, per_axis, refuse_mask, to_cells
from .registry import Case, Mask, register_attention


def check_latents(num_heads: int, head_dim: int, grid: Sequence[int], group: Sizes, latents: int) -> None:
    """Raise unless these options of "latents" can be.

    Raises:
        ValueError: heads, width or latents below 1, a grid without places, or groups that do not divide it.
    """
    for option, value in (("num_heads", num_heads), ("head_dim", head_dim), ("latents", latents)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"attention 'latents': {option}={value!r} has to be a whole number of at least 1"
            )
    sizes = check_grid("latents", grid)
    groups = per_axis("latents", "group", group, sizes)
    if any(size % step for size, step in zip(sizes, groups, strict=True)):
        raise ValueError(
            f"attention 'latents': groups of {groups} do not divide grid={sizes}; each group has latents of its own, "
            "so choose sizes that do"
        )


def latents_reference(
    module: "LatentAttention",
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    mask: Mask | None = None,
) -> Float[Tensor, "b h n d"]:
    """Group by group and latent by latent, with the weights written out."""
    b, heads, n, d = q.shape
    places = torch.arange(n).view(1, 1, n, 1).to(q.dtype)
    groups = to_cells(places, module.grid, module.group)[0, ..., 0].long().tolist()

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], heads, d).transpose(-2, -3)

    read = []
    for latent, members in zip(module.latents, groups, strict=True):
        weights = attention_weights(split(latent).expand(b, -1, -1, -1), k[:, :, members])
        read.append(latent + (weights @ v[:, :, members]).transpose(1, 2).flatten(2))
    z = torch.cat(read, dim=1)
    queries, keys, values = (split(x) for x in module.to_qkv(module.norm(z)).chunk(3, dim=-1))
    z = z + (attention_weights(queries, keys) @ values).transpose(1, 2).flatten(2)
    keys, values = (split(x) for x in module.to_kv(module.norm_out(z)).chunk(2, dim=-1))
    out = torch.zeros_like(q)
    for index, members in enumerate(groups):
        own = slice(index * module.latents.shape[1], (index + 1) * module.latents.shape[1])
        query = q[:, :, members]
        local = attention_weights(query, k[:, :, members]) @ v[:, :, members]
        out[:, :, members] = local + attention_weights(query, keys[:, :, own]) @ values[:, :, own]
    return out


def latents_flops(
    b: int, h: int, n: int, m: int, d: int, *, grid: Sequence[int], group: Sizes, latents: int
) -> int:
    """Local 4 b h n s d; reading and writing 8 b h n l d; L = all latents: 4 b h L L d and 10 b L (h d)**2."""
    size = prod(per_axis("latents", "group", group, grid))
    count = n // size * latents
    local, exchange = 4 * b * h * n * size * d, 2 * 4 * b * h * n * latents * d
    return local + exchange + 4 * b * h * count**2 * d + (6 + 4) * b * count * (h * d) ** 2


@register_attention(
    "latents",
    reference=latents_reference,
    flops=latents_flops,
    check=check_latents,
    cases=(
        Case({"grid": (4, 4), "group": 2, "latents": 2}, n=16),
        Case({"grid": (3, 6), "group": (3, 2), "latents": 1}, n=18),
        Case({"grid": (2, 2, 3), "group": (1, 2, 3), "latents": 3}, n=12),
        Case({"grid": (1, 1), "group": 1, "latents": 2}, n=1),
    ),
)
class LatentAttention(nn.Module):
    """Attention inside groups of a grid, plus what each group's latents bring from the others.

    For a group with tokens q, k, v and learned latents z::

        z = z + attend(z, k, v)                       # read from the own group
        z = z + attend(W_q z, W_k z, W_v z)           # over the latents of all groups, z normalised (LayerNorm)
        out = attend(q, k, v) + attend(q, W_K z, W_V z)   # over the own group, over its latents (normalised)

    A latent is as wide as all heads together; each head uses its share. Tokens learn from their own latents only
    where they are: the table of latents has a row for each group.

    Args:
        num_heads: of the layer it is the processor of.
        head_dim: width of a head there.
        grid: sizes of the axes of the grid of tokens.
        group: sizes of a group, or one for all axes; they divide the grid.
        latents: latents of each group.

    >>> attend = LatentAttention(2, 4, grid=(4, 4), group=2, latents=1)
    >>> q = torch.ones(1, 2, 16, 4)
    >>> attend(q, q, q).shape
    torch.Size([1, 2, 16, 4])
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, grid: Sequence[int], group: Sizes, latents: int
    ) -> None:
        super().__init__()
        check_latents(num_heads, head_dim, grid, group, latents)
        self.num_heads, self.grid = num_heads, tuple(grid)
        self.group = per_axis("latents", "group", group, self.grid)
        dim, groups = num_heads * head_dim, prod(self.grid) // prod(self.group)
        self.latents = nn.Parameter(0.02 * torch.randn(groups, latents, dim))
        self.norm, self.norm_out = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_kv = nn.Linear(dim, 2 * dim)

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        *,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """Mix the tokens; every token sees every other one.

        Raises:
            ValueError: a mask, not one token for each place of the grid, or other heads than it was made for.
        """
        refuse_mask("latents", mask)
        check_tokens("latents", self.grid, q, k, v)
        b, heads, _, d = q.shape
        groups, count, dim = self.latents.shape
        if (heads, heads * d) != (self.num_heads, dim):
            raise ValueError(
                f"attention 'latents' was made for {self.num_heads} heads of width {dim // self.num_heads}, got "
                f"{heads} of width {d}"
            )
        queries, keys, values = (to_cells(x, self.grid, self.group) for x in (q, k, v))
        latents = self.latents.to(q.dtype)
        asks = latents.view(1, groups, count, heads, d).permute(0, 3, 1, 2, 4).expand(b, -1, -1, -1, -1)
        read = fused_attention(asks.reshape(b * heads, groups, count, d), keys, values)
        z = latents.flatten(0, 1) + self._tokens(read.reshape(b, heads, groups * count, d))
        ask, key, value = (self._heads(x) for x in self.to_qkv(self.norm(z)).chunk(3, dim=-1))
        z = z + self._tokens(fused_attention(ask, key, value))
        own = (
            self._heads(x).reshape(b * heads, groups, count, d)
            for x in self.to_kv(self.norm_out(z)).chunk(2, dim=-1)
        )
        out = fused_attention(queries, keys, values) + fused_attention(queries, *own)
        return from_cells(out, self.grid, self.group, heads=heads)

    def _heads(self, z: Float[Tensor, "b l dim"]) -> Float[Tensor, "b h l d"]:
        return z.view(*z.shape[:2], self.num_heads, z.shape[-1] // self.num_heads).transpose(1, 2)

    @staticmethod
    def _tokens(z: Float[Tensor, "b h l d"]) -> Float[Tensor, "b l dim"]:
        return z.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"grid={self.grid}, group={self.group}, latents={self.latents.shape[1]}"
