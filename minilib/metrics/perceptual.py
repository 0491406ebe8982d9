"""Distances of colour images in the features of a real ImageNet classifier: EffNet-FD and a perceptual distance.

Neither is comparable with a published FID or LPIPS: the net is EfficientNet-Lite0, not Inception or an ablated VGG, and small.

EffNet-FD is the Fréchet distance of 1,280 pooled features, projected to ``DIMS`` of them. With n images a covariance has rank
n - 1 at most, so in 1,280 dimensions the distance of a few hundred images is mostly bias. The projection is onto fixed random
orthonormal directions (a seed, no data), so the number means the same whatever the reference set is. Tried on emoji, 400 against
1,500: noise of deviation 0.05 measures 1.6 times the floor in 1,280 dimensions, 2.8 in 128 and 3.5 in 64; the leading
directions of the reference (PCA) are as good on noise and blur and better on a change of hue (5.3 against 3.6), but with them the
number would depend on the reference set, and they are blind to what only generated images have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minilib.metrics.frechet import FrechetReport, frechet_report
from minilib.models.efficientnet import EfficientNetLite0, load_effnet_lite0

DIMS = 64
SAMPLES_PER_DIM = 2
"""Fewer samples a dimension than this and the report refuses: the bias would be larger than what is measured."""


class EffNetFeatures(nn.Module):
    """A feature net for :func:`minilib.metrics.frechet_report` and its kin: ``features(x)`` at a fixed size and width.

    Args:
        net: default the shipped weights.
        size: side that images are resized to; 64 is four times as fast as 128, which sees more of what is in the picture.
        dims: directions kept, at most 1,280; None keeps the features as they are.
        seed: of the directions. They are orthonormal, and scaled so that squared distances keep their mean.

    Raises:
        ValueError: ``dims`` is not in 1..1280.
    """

    basis: Tensor

    def __init__(
        self,
        net: EfficientNetLite0 | None = None,
        *,
        size: int | None = 64,
        dims: int | None = DIMS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.net = load_effnet_lite0() if net is None else net
        self.size = size
        width = self.net.classifier.in_features
        if dims is not None and not 1 <= dims <= width:
            raise ValueError(f"dims must lie in 1..{width}, or be None for all; got {dims}")
        basis = torch.empty(width, 0) if dims is None else random_directions(width, dims, seed)
        self.register_buffer("basis", basis)
        self.eval()

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Features of images in [-1, 1]; one channel counts as grey."""
        pooled = self.net.features(as_colour(x), self.size)
        return pooled @ self.basis if self.basis.shape[1] else pooled


def random_directions(width: int, dims: int, seed: int = 0) -> Float[Tensor, "width dims"]:
    """Orthonormal columns drawn evenly from all directions, times ``sqrt(width / dims)``.

    Squared lengths keep their mean over directions (Johnson and Lindenstrauss, 1984), so distances do not shrink with ``dims``.
    """
    normal = torch.randn(width, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign() * (width / dims) ** 0.5).float()


def as_colour(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Grey images with their channel three times; colour images as they are.

    Raises:
        ValueError: neither one nor three channels.
    """
    if x.shape[1] not in (1, 3):
        raise ValueError(f"images need 1 or 3 channels, got shape {tuple(x.shape)}")
    return x.expand(-1, 3, -1, -1)


@torch.no_grad()
def effnet_features(
    x: Float[Tensor, "n c h w"],
    *,
    net: EfficientNetLite0 | None = None,
    size: int | None = 64,
    batch: int = 128,
) -> Float[Tensor, "n 1280"]:
    """The 1,280 pooled features of images in [-1, 1].

    About 400 images a second on one core at size 64, 100 at 128.
    """
    net = load_effnet_lite0() if net is None else net
    return torch.cat([net.features(as_colour(part), size) for part in x.split(batch)])


def effnet_report(
    generated: Float[Tensor, "n c h w"],
    reference: Float[Tensor, "m c h w"],
    held_out: Float[Tensor, "k c h w"],
    ceiling: Float[Tensor, "j c h w"] | None = None,
    *,
    oracle: EffNetFeatures | None = None,
) -> FrechetReport:
    """EffNet-FD of generated images to a reference, with n, the net's checksum, its floor and its ceiling.

    The checksum is over weights and directions. Floor and ceiling are those of :func:`minilib.metrics.frechet_report`; like the
    value they carry the bias of n samples, so read ``over_floor`` first.

    Raises:
        ValueError: fewer than two images a dimension on a side: take more images or fewer ``dims``.
    """
    oracle = EffNetFeatures() if oracle is None else oracle
    dims = oracle.basis.shape[1] or oracle.net.classifier.in_features
    n = min(len(generated), len(held_out), len(reference))
    if n < SAMPLES_PER_DIM * dims:
        raise ValueError(
            f"{n} images are too few for {dims} dimensions (two a dimension are needed); "
            f"give more images, or EffNetFeatures(dims={max(n // SAMPLES_PER_DIM, 1)})"
        )
    return frechet_report(oracle, generated, reference, held_out, ceiling)


def perceptual_distance(
    a: Float[Tensor, "b c h w"],
    b: Float[Tensor, "..."],
    *,
    net: EfficientNetLite0 | None = None,
    size: int | None = None,
) -> Float[Tensor, " b"]:
    """How different two images look to the net, pair by pair; 0 for equal ones, 4 at most. Differentiable.

    Feature maps at strides 2 to 32 are scaled to unit length at every place; the distance is the squared difference, summed over
    channels and averaged over places, then over the five levels. The form is that of Zhang et al. 2018 (arXiv 1801.03924,
    equation 1) without their learned channel weights and with another net: it is **not LPIPS**, and not comparable with it.

    Args:
        a, b: images in [-1, 1], of the same shape.
        net: default the shipped weights, loaded anew: hand one over in a loop.
        size: shorter side to compare at; None: as they are. Below 64 pixels the deepest maps are 1 x 1.

    Raises:
        ValueError: shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"images to compare must have the same shape; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    net = load_effnet_lite0() if net is None else net
    pairs = zip(net.levels(as_colour(a), size).values(), net.levels(as_colour(b), size).values(), strict=True)
    per_level = [
        (F.normalize(p, dim=1) - F.normalize(q, dim=1)).square().sum(1).mean((1, 2)) for p, q in pairs
    ]
    return torch.stack(per_level).mean(0)
