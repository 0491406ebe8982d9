"""Cross-attention as in the U-Net of Stable Diffusion: queries from the image, keys and values from the text."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from .module import AttentionLayer
from .registry import Attend, get_attention


class CrossAttention(AttentionLayer):
    """Multi-head attention from tokens ``x`` to tokens ``context``, or to ``x`` itself if there is no context.

    Queries, keys and values have no bias, the output has one (Rombach et al. 2022, ``CompVis/latent-diffusion:
    ldm/modules/attention.py``). The three layers are apart, ``to_q``, ``to_k`` and ``to_v``, since adapters and
    edits address them one by one.

    Args:
        dim: width of ``x`` and of the result.
        context_dim: width of ``context``; None: ``dim``.
        num_heads: heads; must divide ``dim``.
        variant: name in ``minilib.attention.attention_variants()``; ``variant_options`` are its keyword arguments.

    Raises:
        ValueError: ``dim`` is no multiple of ``num_heads``, or the variant is unknown.

    >>> import torch
    >>> layer = CrossAttention(8, context_dim=6, num_heads=2)
    >>> layer(torch.zeros(1, 4, 8), torch.zeros(1, 3, 6)).shape
    torch.Size([1, 4, 8])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        *,
        variant: str = "full",
        variant_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {dim}: choose a divisor of {dim}")
        context_dim = dim if context_dim is None else context_dim
        self.num_heads, self.context_dim = num_heads, context_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.processor: Attend = get_attention(variant, **(variant_options or {}))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b l d_context"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Let each token of ``x`` read from ``context``.

        Args:
            x: the tokens that ask.
            context: the tokens that answer; None: ``x``.
            context_mask: True where a token of ``context`` may be read. A row without any True gives zeros or
                NaN, as the kernel likes: leave at least one.

        Raises:
            ValueError: the context has another width than the layer was built for.
        """
        context = x if context is None else context
        if context.shape[-1] != self.context_dim:
            raise ValueError(
                f"context of width {context.shape[-1]} given, this layer reads width {self.context_dim}"
            )
        # Plain views, not einops: at batch 1 the calls themselves are the cost.
        b, n, dim = x.shape
        heads = (self.num_heads, dim // self.num_heads)
        q = self.to_q(x).view(b, n, *heads).transpose(1, 2)
        k = self.to_k(context).view(b, -1, *heads).transpose(1, 2)
        v = self.to_v(context).view(b, -1, *heads).transpose(1, 2)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        out = self.processor(q, k, v, mask=mask)
        return self.to_out(out.transpose(1, 2).reshape(b, n, dim))
