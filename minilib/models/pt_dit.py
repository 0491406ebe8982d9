"""PT-DiT (Qihoo-T2X, Wang et al. 2024, arXiv 2409.04005): a diffusion transformer with proxy tokens and windows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Num, Shaped
from torch import Tensor, nn

from .dit import FinalLayer
from .layers import PatchEmbed, TimestepEmbedder
from .positions import sincos_2d
from .pt_dit_blocks import PixArtBlock, PTDiTBlock

BLOCKS = ("pt-dit", "pixart")


class PTDiT(nn.Module):
    """A transformer of PT-DiT's blocks, or of PixArt's, for images.

    ``config`` rebuilds the model. Positions are fixed sines and cosines of the whole grid, since windows alone do not tell
    where they are.

    Args:
        input_size: height and width of the image.
        patch_size: height and width of a patch; divides ``input_size``.
        in_channels: channels of the image.
        hidden_size: width of a token; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        block: "pt-dit", or "pixart": full attention, the control.
        window: side of a window, in tokens.
        cell: side of a proxy's cell, in tokens; divides the grid.
        proxy: "mean", "random" or "none"; see :class:`PTDiTBlock`.
        shift: see :class:`PTDiTBlock`.
        context_dim: width of the text; 0: no text, and what is given as ``context`` is not read.
        mlp_ratio: hidden width over ``hidden_size``.

    Raises:
        ValueError: sizes that do not fit, an unknown block or unknown proxies.

    >>> import torch
    >>> model = PTDiT(input_size=8, hidden_size=16, depth=2)
    >>> model(torch.zeros(2, 3, 8, 8), torch.tensor([0, 999]), None).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        input_size: int = 12,
        patch_size: int = 1,
        in_channels: int = 3,
        hidden_size: int = 48,
        depth: int = 3,
        num_heads: int = 4,
        block: str = "pt-dit",
        *,
        window: int = 2,
        cell: int = 2,
        proxy: str = "mean",
        shift: bool = True,
        context_dim: int = 0,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if patch_size < 1 or input_size % patch_size:
            raise ValueError(f"patches of {patch_size} do not tile an image of {input_size} x {input_size}")
        if block not in BLOCKS:
            raise ValueError(f"unknown block {block!r}: choose one of {BLOCKS}")
        side = input_size // patch_size
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.grid = (side, side)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, side, side), persistent=False)
        shared = {"context_dim": context_dim, "mlp_ratio": mlp_ratio}
        windows = {"window": (window, window), "cell": (cell, cell), "proxy": proxy, "shift": shift}
        kind = PTDiTBlock if block == "pt-dit" else PixArtBlock
        self.t_block = nn.Linear(hidden_size, kind.rows * hidden_size)
        self.blocks = nn.ModuleList(
            PTDiTBlock(hidden_size, num_heads, self.grid, **windows, **shared)
            if block == "pt-dit"
            else PixArtBlock(hidden_size, num_heads, **shared)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier's; the added linear layers, the reading of the text and the output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.t_embedder.fc1, self.t_embedder.fc2, self.t_block):
            nn.init.normal_(linear.weight, std=0.02)
        zero = [self.final_layer.adaLN_modulation, self.final_layer.linear]
        for block in self.blocks:
            zero += [block.text_attn.to_out] if block.text_attn is not None else []
            if isinstance(block, PTDiTBlock):
                zero += [block.shifted_proj] + ([block.proxies.inject] if block.proxies is not None else [])
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Num[Tensor, " b"],
        context: Shaped[Tensor, "b ..."] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Predict noise, velocity or image.

        Args:
            x: noisy images.
            t: times on the scale 0 to 1000.
            context: states of the text, ``(b, l, context_dim)``; not read by a model without text.

        Raises:
            ValueError: an image of another size, or no text for a model that reads one.
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"images of shape {tuple(x.shape[1:])} given, this model takes {expected}")
        reads = self.config["context_dim"] > 0
        if reads and context is None:
            raise ValueError(f"this model reads a text of width {self.config['context_dim']}: give context")
        c = F.silu(self.t_embedder(t))
        condition = self.t_block(c).unflatten(1, (-1, self.config["hidden_size"]))
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, condition, context if reads else None)
        p, side = self.patch_size, self.grid[0]
        out = self.final_layer(h, c)
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)
