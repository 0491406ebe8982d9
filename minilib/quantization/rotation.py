"""Rotation before rounding: a random-sign Hadamard matrix spreads a large channel over many (QuaRot, Ashkboos et al. 2024,
arXiv 2404.00456).

For an orthogonal R, ``x W^T = (x R) (W R)^T``: the layer's output stays what it was. With R = diag(signs) H, H the Hadamard
matrix with entries +-1 / sqrt(n), each new channel is a sum of all old ones with random signs: no channel stands out, and a
token's range falls towards that of a Gaussian vector of the same length. H exists for powers of two here; other widths are
cut into blocks of the largest power of two that divides them, and channels mix inside their block only.
"""

from collections.abc import Hashable
from math import log2

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from .layers import Transform


def hadamard(n: int, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n n"]:
    """Sylvester's Hadamard matrix over sqrt(n): symmetric, orthogonal, all entries of one size.

    Raises:
        ValueError: n is no power of two.

    >>> (hadamard(4) * 2).int().tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard matrix of size {n} asked for: 1, 2, 4, 8, ... exist here")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / n**0.5).to(dtype)


def block_size(width: int) -> int:
    """The largest power of two that divides ``width``.

    >>> block_size(96), block_size(1152), block_size(64), block_size(7)
    (32, 128, 64, 1)
    """
    if width < 1:
        raise ValueError(f"width {width} given: at least one channel is needed")
    return width & -width


class HadamardRotation(nn.Module):
    """The transform of a quantised layer: both factors times diag(signs) H, in blocks.

    Unlike a channel balance it cannot be written into the modulation before the layer, whose scale differs from sample to
    sample: it is computed with each activation, ``rotation_cost`` additions a token.

    Args:
        width: channels.
        generator: of the signs; without one all signs are +.
        block: size of a block, a power of two that divides ``width``; the largest one if left out.

    Raises:
        ValueError: a block that is no power of two or does not divide the width.

    >>> HadamardRotation(2).activation(torch.tensor([[8.0, 0.0]])).round(decimals=3)
    tensor([[5.6570, 5.6570]])
    """

    def __init__(
        self, width: int, generator: torch.Generator | None = None, *, block: int | None = None
    ) -> None:
        super().__init__()
        self.block = block_size(width) if block is None else block
        matrix = hadamard(self.block)
        if width % self.block:
            raise ValueError(f"blocks of {self.block} do not tile {width} channels")
        signs = torch.ones(width)
        if generator is not None:
            signs -= 2 * torch.randint(0, 2, (width,), generator=generator, device=generator.device).cpu()
        self.register_buffer("signs", signs)
        self.register_buffer("matrix", matrix)

    def _rotate(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.signs):
            raise ValueError(f"{x.shape[-1]} channels given, this rotation turns {len(self.signs)}")
        blocks = (x * self.signs.to(x.dtype)).unflatten(-1, (-1, self.block))
        return (blocks @ self.matrix.to(x.dtype)).flatten(-2)

    def activation(
        self, x: Float[Tensor, "... c"], t: Num[Tensor, " b"] | None = None
    ) -> Float[Tensor, "... c"]:
        """The input that is rounded; the time plays no part."""
        return self._rotate(x)

    def weight(self, w: Float[Tensor, "o c"], t: Num[Tensor, " b"] | None = None) -> Float[Tensor, "o c"]:
        """The weight that is rounded."""
        return self._rotate(w)

    def key(self, t: Num[Tensor, " b"] | None = None) -> int:
        """One weight for all times."""
        return 0

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{len(self.signs)} channels in blocks of {self.block}"


class Chain(nn.Module):
    """Several transforms one after the other, the first one first: a balance and then a rotation, say.

    >>> Chain(HadamardRotation(4), HadamardRotation(4)).weight(torch.eye(4)).round().abs()
    tensor([[1., 0., 0., 0.],
            [0., 1., 0., 0.],
            [0., 0., 1., 0.],
            [0., 0., 0., 1.]])
    """

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def activation(
        self, x: Float[Tensor, "... c"], t: Num[Tensor, " b"] | None = None
    ) -> Float[Tensor, "... c"]:
        """The input after all of them."""
        for transform in self.transforms:
            x = transform.activation(x, t)
        return x

    def weight(self, w: Float[Tensor, "o c"], t: Num[Tensor, " b"] | None = None) -> Float[Tensor, "o c"]:
        """The weight after all of them."""
        for transform in self.transforms:
            w = transform.weight(w, t)
        return w

    def key(self, t: Num[Tensor, " b"] | None = None) -> Hashable:
        """The keys of all of them."""
        return tuple(transform.key(t) for transform in self.transforms)


def rotation_cost(width: int, block: int | None = None) -> int:
    """Additions a token of the fast Walsh-Hadamard transform: width log2(block).

    >>> rotation_cost(96), rotation_cost(1152)
    (480, 8064)
    """
    size = block_size(width) if block is None else block
    hadamard(size)  # refuses what is no power of two
    return width * round(log2(size))
