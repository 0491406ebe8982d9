"""The blocks of PT-DiT (Qihoo-T2X, Wang et al. 2024, arXiv 2409.04005), and PixArt's block, which it replaces.

In order: the proxies, one for each cell of the grid, attend to each other; every token reads from the proxies; attention
inside windows; attention inside shifted windows; cross-attention to the text; a feed-forward network. Windows, shifted
windows and the network are modulated by the time (adaLN-single: one projection for all blocks, and a table a block); the
proxies are not. The two added linear layers, after the reading and after the shifted windows, start at zero.

The order, the means as proxies and the zeros are those of the released block, as ``Ascend/MindSpeed-MM`` holds it; its mask
of shifted windows is -1 where ours is minus infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..attention import Attention, CrossAttention
from ..attention.grids import to_cells
from ..attention.proxy import cell_means
from ..costs import attention_flops, linear_flops
from .layers import GeluMLP, modulate

PROXIES = ("mean", "random", "none")


class Proxies(nn.Module):
    """One proxy a cell, proxies attend to each other, and tokens read from them.

    Args:
        dim: width of a token.
        num_heads: heads of both attentions.
        grid: (rows, columns), or more axes, of the tokens.
        cell: sizes of a cell; divide the grid.
        mode: "mean" of the cell's tokens (the released code), or a "random" one of them (the paper's first version),
            drawn anew at every call from torch's global generator, as dropout is.

    Raises:
        ValueError: another mode, or cells that do not tile the grid.

    >>> Proxies(8, 2, (4, 4), (2, 2))(torch.zeros(3, 16, 8)).shape
    torch.Size([3, 16, 8])
    """

    def __init__(
        self, dim: int, num_heads: int, grid: Sequence[int], cell: Sequence[int], mode: str = "mean"
    ) -> None:
        super().__init__()
        if mode not in PROXIES[:2]:
            raise ValueError(f"unknown proxies {mode!r}: choose one of {PROXIES[:2]}")
        if len(grid) != len(cell) or any(size % step for size, step in zip(grid, cell, strict=False)):
            raise ValueError(f"cells of {tuple(cell)} do not tile a grid of {tuple(grid)}")
        self.grid, self.cell, self.mode = tuple(grid), tuple(cell), mode
        self.attn = Attention(dim, num_heads)
        self.read = CrossAttention(dim, num_heads=num_heads)
        self.inject = nn.Linear(dim, dim)

    def pick(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """The proxies of the tokens ``x``."""
        if self.mode == "mean":
            return cell_means(x.unsqueeze(1), self.grid, self.cell).squeeze(1)
        cells = to_cells(x.unsqueeze(1), self.grid, self.cell)
        b, m, size, d = cells.shape
        index = torch.randint(size, (b, m, 1, 1), device=x.device).expand(b, m, 1, d)
        return cells.gather(2, index).squeeze(2)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What is added to the tokens ``x``; nothing, until ``inject`` has learned."""
        proxies, width = self.pick(x), x.shape[-1:]
        proxies = proxies + self.attn(F.layer_norm(proxies, width))
        return self.inject(self.read(F.layer_norm(x, width), F.layer_norm(proxies, width)))


class PTDiTBlock(nn.Module):
    """Proxies, windows, shifted windows, text, feed-forward network.

    Args:
        dim: width of a token.
        num_heads: heads of every attention.
        grid: sizes of the axes of the tokens.
        window: sizes of a window.
        cell: sizes of a proxy's cell.
        proxy: "mean", "random", or "none": no proxies at all, the paper's ablation.
        shift: the second attention is in windows shifted by half; False: in the same windows again, an ablation.
        context_dim: width of the text; 0: no text.
        mlp_ratio: hidden width over ``dim``.

    Raises:
        ValueError: unknown proxies, or sizes that do not fit.

    >>> block = PTDiTBlock(8, 2, (4, 4), window=(2, 2), cell=(2, 2))
    >>> block(torch.zeros(1, 16, 8), torch.zeros(1, 9, 8)).shape
    torch.Size([1, 16, 8])
    """

    rows = 9  # shift, scale and gate of windows, shifted windows, feed-forward network

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Sequence[int],
        *,
        window: Sequence[int],
        cell: Sequence[int],
        proxy: str = "mean",
        shift: bool = True,
        context_dim: int = 0,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if proxy not in PROXIES:
            raise ValueError(f"unknown proxies {proxy!r}: choose one of {PROXIES}")
        self.proxies = None if proxy == "none" else Proxies(dim, num_heads, grid, cell, proxy)
        options = {"grid": tuple(grid), "window": tuple(window)}
        moved = tuple(w // 2 for w in window) if shift else 0
        self.window_attn = Attention(dim, num_heads, variant="window", variant_options=options)
        self.shifted_attn = Attention(
            dim, num_heads, variant="window", variant_options=options | {"shift": moved}
        )
        self.shifted_proj = nn.Linear(dim, dim)
        self.text_attn = CrossAttention(dim, context_dim, num_heads) if context_dim else None
        self.mlp = GeluMLP(dim, int(dim * mlp_ratio))
        self.table = nn.Parameter(torch.randn(self.rows, dim) / dim**0.5)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        condition: Float[Tensor, "b 9 d"],
        context: Float[Tensor, "b l c"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Transform the tokens ``x``.

        Args:
            x: tokens of the grid, in raster order.
            condition: the time, projected once for all blocks; the block's table is added.
            context: the text.
            context_mask: True where it may be read.
        """
        if self.proxies is not None:
            x = x + self.proxies(x)
        parts = (condition + self.table).unsqueeze(2).unbind(1)
        x = _modulated(x, parts[0:3], self.window_attn)
        x = _modulated(x, parts[3:6], lambda h: self.shifted_proj(self.shifted_attn(h)))
        if self.text_attn is not None:
            x = x + self.text_attn(x, context, context_mask)
        return _modulated(x, parts[6:9], self.mlp)


class PixArtBlock(nn.Module):
    """Self-attention over all tokens, text, feed-forward network, with adaLN-single (PixArt-alpha, Chen et al. 2023).

    arXiv 2310.00426, section 2.3; ``PixArt-alpha/PixArt-alpha: diffusion/model/nets/PixArt.py``. The control of PT-DiT.

    Args:
        dim, num_heads, context_dim, mlp_ratio: as in :class:`PTDiTBlock`.

    >>> PixArtBlock(8, 2)(torch.zeros(1, 5, 8), torch.zeros(1, 6, 8)).shape
    torch.Size([1, 5, 8])
    """

    rows = 6

    def __init__(self, dim: int, num_heads: int, *, context_dim: int = 0, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.text_attn = CrossAttention(dim, context_dim, num_heads) if context_dim else None
        self.mlp = GeluMLP(dim, int(dim * mlp_ratio))
        self.table = nn.Parameter(torch.randn(self.rows, dim) / dim**0.5)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        condition: Float[Tensor, "b 6 d"],
        context: Float[Tensor, "b l c"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Transform the tokens ``x``; see :class:`PTDiTBlock`."""
        parts = (condition + self.table).unsqueeze(2).unbind(1)
        x = _modulated(x, parts[0:3], self.attn)
        if self.text_attn is not None:
            x = x + self.text_attn(x, context, context_mask)
        return _modulated(x, parts[3:6], self.mlp)


def pt_dit_block_flops(
    b: int,
    n: int,
    d: int,
    *,
    proxies: int,
    window: int,
    text: int = 0,
    context_dim: int | None = None,
    mlp_ratio: float = 4.0,
) -> int:
    """FLOPs of a :class:`PTDiTBlock` whose windows tile the grid.

    Args:
        b: images.
        n: tokens.
        d: width.
        proxies: cells of the grid; 0 for none.
        window: tokens of a window.
        text: tokens of the text; 0 for none.
        context_dim: width of the text; None: d.
        mlp_ratio: hidden width over d.

    >>> pt_dit_block_flops(1, 16, 8, proxies=4, window=4)
    50688
    """
    flops = 2 * (linear_flops(b * n, d, 4 * d) + attention_flops(b, 1, n, window, d)) + linear_flops(
        b * n, d, d
    )
    if proxies:
        flops += linear_flops(b * proxies, d, 4 * d) + attention_flops(b, 1, proxies, proxies, d)
        flops += linear_flops(b * n, d, 3 * d) + linear_flops(b * proxies, d, 2 * d)
        flops += attention_flops(b, 1, n, proxies, d)
    return flops + _text_flops(b, n, d, text, context_dim) + linear_flops(b * n, d, 2 * int(d * mlp_ratio))


def pixart_block_flops(
    b: int, n: int, d: int, *, text: int = 0, context_dim: int | None = None, mlp_ratio: float = 4.0
) -> int:
    """FLOPs of a :class:`PixArtBlock`; arguments as in :func:`pt_dit_block_flops`."""
    flops = linear_flops(b * n, d, 4 * d) + attention_flops(b, 1, n, n, d)
    return flops + _text_flops(b, n, d, text, context_dim) + linear_flops(b * n, d, 2 * int(d * mlp_ratio))


def _text_flops(b: int, n: int, d: int, text: int, context_dim: int | None) -> int:
    if not text:
        return 0
    width = d if context_dim is None else context_dim
    return (
        linear_flops(b * n, d, 2 * d)
        + linear_flops(b * text, width, 2 * d)
        + attention_flops(b, 1, n, text, d)
    )


def _modulated(x: Tensor, parts: Sequence[Tensor], branch: Callable[[Tensor], Tensor]) -> Tensor:
    shift, scale, gate = parts
    return torch.addcmul(x, gate, branch(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)))
