"""A vision transformer whose patch tokens are the product: a frozen encoder for alignment and probing.

Dosovitskiy et al. 2021, arXiv 2010.11929, with fixed sine-cosine positions (so that any canvas will do), an optional class
token, optional registers (Darcet et al. 2024, arXiv 2309.16588) and a mask token for training by masked prediction.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..attention import Attention
from .layers import GeluMLP, PatchEmbed
from .positions import sincos_2d

NORM_EPS = 1e-6


class ViTBlock(nn.Module):
    """Pre-norm: x + attn(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = GeluMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Transform the tokens."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches to tokens, ``depth`` blocks, a last norm. ``config`` rebuilds the model: ``ViT(**model.config)``.

    Args:
        image_size: side of the images it is meant for; any multiple of ``patch_size`` will do.
        patch_size: side of a patch in pixels.
        in_channels: channels of the image.
        hidden_size: width of a token, a multiple of 4.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward networks over ``hidden_size``.
        class_token: a learned token in front that has no place: the summary. Without it, the mean of the patches is.
        num_registers: further such tokens, for the network's own use.

    Raises:
        ValueError: a width that heads or positions do not divide, an image that patches do not tile.

    >>> vit = ViT(image_size=16, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    >>> vit.features(torch.zeros(2, 3, 16, 16)).shape, vit.pooled(torch.zeros(2, 3, 16, 16)).shape
    (torch.Size([2, 16, 16]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        image_size: int = 16,
        patch_size: int = 4,
        in_channels: int = 3,
        hidden_size: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        class_token: bool = False,
        num_registers: int = 0,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if hidden_size % 4:
            raise ValueError(f"2-D positions need a width that is a multiple of 4, got {hidden_size}")
        self.patch_size, self.in_channels = patch_size, in_channels
        self._grid(image_size, image_size)
        self.num_prefix = int(class_token) + num_registers
        self.patch_embed = PatchEmbed(patch_size, in_channels, hidden_size)
        self.prefix = nn.Parameter(0.02 * torch.randn(1, self.num_prefix, hidden_size))
        self.mask_token = nn.Parameter(0.02 * torch.randn(hidden_size))
        self.blocks = nn.ModuleList(ViTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def embed(
        self, x: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """The tokens that enter the first block: class token and registers if there are any, then the patches in raster order.

        Args:
            x: images in [-1, 1].
            mask: True for a patch that is hidden: the mask token takes its place, at its position.

        Raises:
            ValueError: another number of channels, sides that patches do not tile, a mask of another length.
        """
        if x.shape[1] != self.in_channels:
            raise ValueError(f"images of {x.shape[1]} channels given, this model takes {self.in_channels}")
        rows, columns = self._grid(x.shape[2], x.shape[3])
        tokens = self.patch_embed(x)
        if mask is not None:
            if mask.shape[1] != rows * columns:
                raise ValueError(f"a mask of {mask.shape[1]} patches given, the image has {rows} x {columns}")
            tokens = torch.where(mask[..., None], self.mask_token, tokens)
        positions = sincos_2d(tokens.shape[-1], rows, columns)
        tokens = tokens + positions.to(device=tokens.device, dtype=tokens.dtype)
        return torch.cat([self.prefix.expand(len(x), -1, -1), tokens], dim=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """All tokens after the last norm, class token and registers first; arguments as of ``embed``."""
        tokens = self.embed(x, mask)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The patch tokens after the last norm, in raster order."""
        return self(x)[:, self.num_prefix :]

    def layer_features(
        self, x: Float[Tensor, "b c h w"], layers: Sequence[int]
    ) -> list[Float[Tensor, "b n d"]]:
        """The patch tokens after the blocks ``layers`` (0: before the first), as they are, in the order asked for.

        Raises:
            ValueError: a layer outside 0..depth.
        """
        depth = len(self.blocks)
        if not all(0 <= layer <= depth for layer in layers):
            raise ValueError(f"layers run from 0, the embedding, to {depth}; got {list(layers)}")
        states = [self.embed(x)]
        for block in self.blocks[: max(layers, default=0)]:
            states.append(block(states[-1]))
        return [states[layer][:, self.num_prefix :] for layer in layers]

    def pooled(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """One vector an image: the class token if there is one, else the mean of the patch tokens."""
        return self.pool(self(x))

    def pool(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b d"]:
        """The summary of the tokens that ``forward`` gave."""
        return tokens[:, 0] if self.config["class_token"] else tokens[:, self.num_prefix :].mean(1)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if min(height, width) < p or height % p or width % p:
            raise ValueError(f"patches of {p} do not tile an image of {height} x {width}")
        return height // p, width // p
