"""A block for video whose attention is factorised: inside each frame, then at each place over the frames.

Order and residual branches as in ViViT's model 3 (Arnab et al. 2021, arXiv 2103.15691), which factorised video diffusion
models share (Singer et al. 2022, arXiv 2209.14792: spatial layers of an image model, temporal layers added behind them).
"""

from collections.abc import Sequence
from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from ..attention import Attention
from .layers import GeluMLP


class FactorisedBlock(nn.Module):
    """x + spatial(norm x), x + temporal(norm x), x + mlp(norm x).

    Tokens are in the order frame, row, column. For a video of F frames with N places each, the spatial attention has
    length N and runs F times, the temporal one has length F and runs N times.

    Args:
        dim: width of a token.
        num_heads: heads of both attentions.
        grid: (frames, rows, columns), or (frames, places of a frame).
        mlp_ratio: hidden width of the feed-forward network over ``dim``.

    Raises:
        ValueError: heads that do not divide the width, or a grid of another form.

    >>> import torch
    >>> FactorisedBlock(8, 2, (3, 2, 2))(torch.zeros(1, 12, 8)).shape
    torch.Size([1, 12, 8])
    """

    def __init__(self, dim: int, num_heads: int, grid: Sequence[int], *, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        options = {"grid": self.grid}
        self.spatial = Attention(dim, num_heads, variant="spatial", variant_options=options)
        self.temporal = Attention(dim, num_heads, variant="temporal", variant_options=options)
        self.mlp = GeluMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Transform the tokens of a video.

        Raises:
            ValueError: not one token for each place of the grid.
        """
        if x.shape[1] != prod(self.grid):
            raise ValueError(f"{x.shape[1]} tokens given, the grid {self.grid} has {prod(self.grid)}")
        x = x + self.spatial(self.norm1(x))
        x = x + self.temporal(self.norm2(x))
        return x + self.mlp(self.norm3(x))
