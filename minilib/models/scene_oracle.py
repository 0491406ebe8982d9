"""Reads a picture of ``minilib.data.shapes`` back: for each of the nine cells, what is in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

#: The heads and how many answers each has. "shape" has two more: 0 for an empty cell, 5 for something that is no shape.
HEADS = {"shape": 6, "colour": 6, "size": 2, "stripe": 5}
#: What ``read`` says of the shape of an object that is no shape of the vocabulary, or a mixture of two.
GARBLED = 4


class SceneOracle(nn.Module):
    """A small convolutional network that looks at one cell at a time, with the same weights everywhere.

    A cell's window is 6 x 6 reference pixels around its centre (a reference pixel is a sixteenth of the side), so what it
    reads there cannot come from another object. The hidden activations are the features of Fréchet distances.

    Args:
        image_size: side of the pictures in pixels: 16 or a multiple.
        width: channels of the convolutions.
        hidden: activations a cell.

    Raises:
        ValueError: ``image_size`` is no multiple of 16.

    >>> SceneOracle(32)(torch.zeros(2, 3, 32, 32))["colour"].shape
    torch.Size([2, 9, 6])
    """

    def __init__(self, image_size: int = 16, width: int = 32, hidden: int = 96) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(
                f"image_size is a multiple of 16, since cells are laid out in sixteenths; got {image_size}"
            )
        self.config = {"image_size": image_size, "width": width, "hidden": hidden}
        self.image_size = image_size
        unit = image_size // 16
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()
        )  # fmt: skip
        # One window a cell: the convolution with the window's size and the cells' distance is a linear layer on each.
        self.window = nn.Conv2d(width, hidden, kernel_size=6 * unit, stride=5 * unit)
        self.mix = nn.Linear(hidden, hidden)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, answers) for name, answers in HEADS.items()})

    def cells(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 9 d"]:
        """Hidden activations of each cell.

        Raises:
            ValueError: pictures of another size.
        """
        expected = (3, self.image_size, self.image_size)
        if x.shape[1:] != expected:
            raise ValueError(f"pictures of shape {tuple(x.shape[1:])} given, this oracle reads {expected}")
        h = F.gelu(self.window(self.convolutions(x)))
        return F.gelu(self.mix(rearrange(h, "b d r c -> b (r c) d")))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b 9 _"]]:
        """Logits by head; answer 0 of ``shape`` is 'empty', answer k is shape k - 1, and the last one 'garbled'."""
        hidden = self.cells(x)
        return {name: head(hidden) for name, head in self.heads.items()}

    def features(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        """Mean and maximum over the cells of the hidden activations: what is in the picture, not where."""
        hidden = self.cells(x)
        return torch.cat([hidden.mean(1), hidden.amax(1)], dim=1)

    @torch.no_grad()
    def read(self, x: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b 9 4"]:
        """The most likely content: (shape, colour, size, stripe) of each cell, -1 where it is empty.

        The same form as ``Scenes.grid()``; a shape of ``GARBLED`` is right for no scene.
        """
        return most_likely_grid(self(x))


def most_likely_grid(logits: dict[str, Float[Tensor, "b 9 _"]]) -> Int[Tensor, "b 9 4"]:
    """The most likely answer of each head, in the form of ``Scenes.grid()``: -1 where a cell is empty."""
    answers = {name: value.argmax(-1) for name, value in logits.items()}
    grid = torch.stack([answers["shape"] - 1, answers["colour"], answers["size"], answers["stripe"]], dim=-1)
    return torch.where(grid[..., :1] < 0, -1, grid)


def scene_cross_entropy(
    logits: dict[str, Float[Tensor, "b 9 _"]], grid: Int[Tensor, "b 9 4"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Sum over the heads of the mean cross-entropy; colour, size and stripe count only where there is an object."""
    shape, colour, size, stripe = (grid[..., i].flatten() for i in range(4))
    targets = {"shape": shape + 1, "colour": colour, "size": size, "stripe": stripe}
    losses = [
        F.cross_entropy(
            logits[name].flatten(0, 1), targets[name], ignore_index=-1, label_smoothing=label_smoothing
        )
        for name in HEADS
    ]
    return torch.stack(losses).sum()
