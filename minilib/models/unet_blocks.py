"""The parts of the text-conditioned U-Net that compute: time embedding, residual block, spatial transformer.

Wiring and names are those of Stable Diffusion 1.5 (Rombach et al. 2022, arXiv 2112.10752; read in
``CompVis/latent-diffusion: ldm/modules`` and in diffusers 0.42, ``models/resnet.py`` and
``models/transformers/transformer_2d.py``). Feature maps are (b, c, h, w); inside the model they lie in memory as
channels last, so that turning a feature map into tokens and back copies nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..attention.cross import CrossAttention
from .positions import sincos_2d


class TimestepMLP(nn.Module):
    """Linear, SiLU, linear: makes an embedding of waves, or of a text vector."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b d_in"]) -> Float[Tensor, "b d"]:
        """Embed each row by itself."""
        return self.linear_2(F.silu(self.linear_1(x)))


class GroupNorm(nn.GroupNorm):
    """torch's group norm without its shape check in Python, which takes as long as the norm of a small map itself."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise each group of channels of each image."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ResnetBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1 x)) + time))), with a 1x1 convolution on x if the width changes.

    ``conv2`` starts at zero, so the block starts as its shortcut. With ``emb_dim`` 0 there is no time: the block of
    an autoencoder.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_dim: int, num_groups: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.emb_dim = emb_dim
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if emb_dim:
            self.time_emb_proj = nn.Linear(emb_dim, out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(
        self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b c_out h w"]:
        """Transform ``x`` at the time ``emb``, which has passed through SiLU already (once, in the model)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.emb_dim:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class GEGLU(nn.Module):
    """The feed-forward network W_out (a * GELU(b)) with (a, b) = W x (Shazeer 2020, arXiv 2002.05202), hidden width 4 d."""

    def __init__(self, dim: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * mlp_ratio * dim)
        self.out = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Act on each token by itself."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and GEGLU, each after a layer norm and each added to its input.

    ``attn1`` is the self-attention, ``attn2`` the cross-attention; with ``context_dim`` 0 there is none.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, num_heads=num_heads)
        if context_dim:
            self.norm2 = nn.LayerNorm(dim)
            self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLU(dim)
        self.context_dim = context_dim

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b l d_context"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Transform the tokens ``x``; text comes in through ``attn2``."""
        x = x + self.attn1(self.norm1(x))
        if self.context_dim:
            x = x + self.attn2(self.norm2(x), context, context_mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + proj_out(blocks(proj_in(norm x))), the pixels of the feature map being the tokens.

    ``proj_in`` and ``proj_out`` are linear layers on tokens, which is what a 1x1 convolution does. ``proj_out``
    starts at zero, so the transformer starts as the identity. With ``positions`` the fixed 2-D sine-cosine
    embedding of the pixel's row and column is added to each token after ``proj_in``, at unit scale; Stable
    Diffusion has none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int,
        context_dim: int,
        num_groups: int,
        *,
        positions: bool = False,
    ) -> None:
        super().__init__()
        if positions and dim % 4:
            raise ValueError(f"2-D positions need a width that is a multiple of 4, got {dim}")
        self.norm = GroupNorm(num_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, num_heads, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim)
        self.positions = positions
        self._grid: tuple[object, Tensor] | None = None
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        context: Float[Tensor, "b l d_context"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Let the pixels of ``x`` attend to each other and to the text."""
        b, c, height, width = x.shape
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c))
        if self.positions:
            tokens = tokens + self.grid_positions(height, width, tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, context_mask)
        return x + self.proj_out(tokens).view(b, height, width, c).permute(0, 3, 1, 2)

    def grid_positions(self, height: int, width: int, like: Tensor) -> Tensor:
        """The positions of a ``height`` x ``width`` grid, (n, d); the last grid asked for is remembered."""
        key = (height, width, like.device, like.dtype)
        if self._grid is None or self._grid[0] != key:
            positions = sincos_2d(like.shape[-1], height, width)
            self._grid = (key, positions.to(device=like.device, dtype=like.dtype))
        return self._grid[1]
