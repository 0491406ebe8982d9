"""Learning features without labels by masked prediction: hide patches, and say what is there.

What is predicted decides what the features know. Pixels (SimMIM, Xie et al. 2022, arXiv 2111.09886) ask for colour and place;
histograms of oriented gradients (MaskFeat, Wei et al. 2022, arXiv 2112.09133; read in ``facebookresearch/SlowFast:
slowfast/models/masked.py, operators.py``) ask for form. Here both are asked for. They are taken from the clean picture, while
the network sees it in other light and with noise; and they are asked for at visible patches, too, since in pictures of 16
patches little can be hidden.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minilib.models.vit import ViT
from minilib.training import Batch, LossFn


def random_masks(
    n: int, patches: int, generator: torch.Generator, ratio: tuple[float, float] = (0.2, 0.5)
) -> Bool[Tensor, "{n} {patches}"]:
    """Masks that hide a random share of the patches, uniform in ``ratio``, at random places; at least one and never all.

    Raises:
        ValueError: ratios out of order or outside [0, 1].
    """
    low, high = ratio
    if not 0.0 <= low <= high <= 1.0 or patches < 2:
        raise ValueError(f"need 0 <= low <= high <= 1 and two patches; got ratio={ratio}, {patches} patches")
    share = low + (high - low) * torch.rand(n, 1, generator=generator)
    count = (share * patches).round().clamp(1, patches - 1)
    rank = torch.rand(n, patches, generator=generator).argsort(1).argsort(1)
    return rank < count


def random_light(x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """A view of each picture: brightness, contrast and saturation changed by up to 40 %, and noise of up to 0.1.

    The hue stays, and places stay: what is where is what the features should know.
    """
    n = len(x)

    def factor() -> Tensor:
        return 0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator)

    y = (x + 1) / 2 * factor()
    mean = y.mean((1, 2, 3), keepdim=True)
    y = mean + (y - mean) * factor()
    grey = y.mean(1, keepdim=True)
    y = grey + (y - grey) * factor()
    strength = 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    return 2 * y - 1 + strength * torch.randn(x.shape, generator=generator)


def oriented_gradients(
    x: Float[Tensor, "b c h w"], bins: int = 12, cell: int = 2, eps: float = 0.1
) -> Float[Tensor, "b ck h2 w2"]:
    """Histograms of oriented gradients (Dalal and Triggs 2005): how steep the picture is in which direction, cell by cell.

    A gradient is the difference of the two neighbours; beyond the edge the last pixel goes on. It counts in the two bins nearest
    to its direction, in proportion. Directions go all the way round: from dark to bright is not from bright to dark. A cell's
    histogram, the mean over its pixels, has about unit length over all channels. MaskFeat's released code has nine bins for half
    the way round, Sobel filters, one bin a gradient and unit length in each channel.

    Args:
        x: images.
        bins: directions.
        cell: side of a cell in pixels.
        eps: added to a cell's length before it is divided by it, so that noise is not blown up where nothing is.

    Returns:
        ``c * bins`` numbers a cell, channel by channel, in [0, 1].

    Raises:
        ValueError: sides that cells do not tile, or no bin.

    >>> right = torch.arange(4.0).expand(1, 1, 4, 4)  # brighter to the right: direction 0
    >>> oriented_gradients(right, bins=4, cell=4).flatten()
    tensor([0.9375, 0.0000, 0.0000, 0.0000])
    """
    height, width = x.shape[2:]
    if bins < 1 or cell < 1 or height % cell or width % cell:
        raise ValueError(
            f"need a bin, and cells of {cell} that tile {height} x {width} pixels; got {bins} bins"
        )
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    place = torch.atan2(dy, dx) / (2 * math.pi) % 1.0 * bins
    lower = place.floor()
    share, strength = place - lower, torch.hypot(dx, dy)
    histogram = x.new_zeros(*x.shape[:2], bins, height, width)
    for index, weight in ((lower, 1 - share), (lower + 1, share)):
        histogram.scatter_add_(2, (index.long() % bins)[:, :, None], (weight * strength)[:, :, None])
    cells = F.avg_pool2d(histogram.flatten(1, 2), cell)
    return cells / (cells.norm(dim=1, keepdim=True) + eps)


def feature_spread(features: Float[Tensor, "n d"]) -> float:
    """How far features are from collapse: ``sqrt(d)`` times the mean standard deviation of their unit vectors.

    1 for directions in all dimensions alike, 0 if all are one (Chen and He 2021, arXiv 2011.10566, section 4.1).
    """
    return float(F.normalize(features, dim=-1).std(0).mean() * features.shape[-1] ** 0.5)


class MaskedPrediction(nn.Module):
    """A vision transformer with two linear layers on its patch tokens, which predict pixels and oriented gradients.

    Only ``vit`` is kept after training.

    Args:
        vit: the network that learns.
        bins: directions of the gradients.
        cell: side of their cells in pixels; must divide the patch.
    """

    def __init__(self, vit: ViT, *, bins: int = 12, cell: int = 2) -> None:
        super().__init__()
        if vit.patch_size % cell:
            raise ValueError(f"cells of {cell} pixels do not tile patches of {vit.patch_size}")
        self.vit, self.bins, self.cell = vit, bins, cell
        dim, cells = vit.config["hidden_size"], (vit.patch_size // cell) ** 2
        self.to_pixels = nn.Linear(dim, vit.in_channels * vit.patch_size**2)
        self.to_gradients = nn.Linear(dim, vit.in_channels * bins * cells)

    def forward(
        self, view: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses of a view with hidden patches against the clean picture, over all patches.

        Returns:
            ``pixel``: mean squared error; ``gradient``: squared distance of a cell's histograms, mean over cells.
        """
        tokens = self.vit(view, mask)[:, self.vit.num_prefix :]
        pixels = _patches(clean, self.vit.patch_size)
        gradients = oriented_gradients(clean, self.bins, self.cell)
        per_patch = self.vit.patch_size // self.cell
        error = (self.to_gradients(tokens) - _patches(gradients, per_patch)).square().sum(-1)
        return {
            "pixel": F.mse_loss(self.to_pixels(tokens), pixels),
            "gradient": error.mean() / per_patch**2,
        }


def masked_prediction_loss(weights: dict[str, float]) -> LossFn:
    """A ``loss_fn`` for ``fit``: the weighted sum of the losses of ``MaskedPrediction`` on ``view``, ``clean`` and ``mask``."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        terms: dict[str, Tensor] = model(batch["view"], batch["clean"], batch["mask"])
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    return loss


def _patches(x: Tensor, side: int) -> Tensor:
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
