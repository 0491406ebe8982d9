"""What an autoencoder of images is trained on (Rombach et al. 2022, arXiv 2112.10752, appendix G).

``nll + 1e-6 KL``, where ``nll = sum over the image of (|x - x'| + perceptual distance) / exp(logvar) + logvar`` with one learned
``logvar``; facts read in ``CompVis/latent-diffusion: ldm/modules/losses/contperceptual.py``. Both terms are sums over an image,
not means. The adversarial term is in :mod:`minilib.adversarial`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilib.models.vae import ConvVAE, DiagonalGaussian
from minilib.training import Batch

FeatureMaps = Callable[[Tensor], Sequence[Tensor]]
"""``maps(x) -> [(b, c, h, w), ...]``: feature maps of a frozen net, differentiable in ``x``."""


def scene_feature_maps(oracle: nn.Module) -> FeatureMaps:
    """The two convolution layers of a ``SceneOracle``: a stand-in for the VGG features of LPIPS on pictures of scenes.

    They are lower layers than those that the Fréchet distance of the same net is taken in, but it is the same net: judge
    reconstructions with another one too.
    """
    oracle.requires_grad_(False).eval()

    def maps(x: Tensor) -> list[Tensor]:
        found = []
        for layer in oracle.to(x.device).convolutions:
            x = layer(x)
            if isinstance(layer, nn.GELU):
                found.append(x)
        return found

    return maps


def perceptual_distance(
    a: Sequence[Float[Tensor, "b _ _ _"]], b: Sequence[Float[Tensor, "b _ _ _"]]
) -> Float[Tensor, " b"]:
    """Sum over the layers of the squared distance of unit feature vectors, averaged over the places: in [0, 4] a layer.

    It is LPIPS (Zhang et al. 2018, arXiv 1801.03924, eq. 1) with all weights 1.

    Raises:
        ValueError: different numbers of layers.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"need equally many layers on both sides, at least one; got {len(a)} and {len(b)}")
    layers = [(_unit(p) - _unit(q)).square().sum(1).mean((1, 2)) for p, q in zip(a, b, strict=True)]
    return torch.stack(layers).sum(0)


def reconstruction_nll(
    x: Float[Tensor, "b c h w"],
    reconstruction: Float[Tensor, "b c h w"],
    logvar: Float[Tensor, ""],
    distance: Float[Tensor, " b"] | None = None,
    *,
    perceptual_weight: float = 1.0,
    mse_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Negative log-likelihood, up to a constant: a sum over the values of an image, averaged over images.

    Each value's error is ``e = |x - x'| + mse_weight (x - x')^2 + perceptual_weight * distance`` (the distance of the image,
    at every value), and it costs ``e / exp(logvar) + logvar``, which is least at ``logvar = log(mean e)``.
    """
    gap = x - reconstruction
    error = gap.abs() + mse_weight * gap.square()
    if distance is not None:
        error = error + perceptual_weight * distance[:, None, None, None]
    return (error * torch.exp(-logvar) + logvar).flatten(1).sum(1).mean()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    other_loss: Float[Tensor, ""],
    last_layer: Tensor,
    *,
    scale: float = 0.5,
    epsilon: float = 1e-4,
    maximum: float = 1e4,
) -> Float[Tensor, ""]:
    """``scale * clamp(|grad reconstruction| / (|grad other| + epsilon), 0, maximum)``, detached; gradients at ``last_layer``.

    With it the second loss pulls as hard on the last layer as the first does, times ``scale`` (Esser et al. 2021,
    arXiv 2012.09841, eq. 7).
    """

    def norm(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()

    ratio = norm(reconstruction_loss) / (norm(other_loss) + epsilon)
    return scale * ratio.clamp(0.0, maximum).detach()


class WithLogVariance(nn.Module):
    """An autoencoder and the learned log variance of its reconstruction error: what is trained. ``vae`` is what is kept.

    >>> model = WithLogVariance(ConvVAE(block_out_channels=(8,)))
    >>> model.logvar
    Parameter containing:
    tensor(0., requires_grad=True)
    """

    def __init__(self, vae: ConvVAE, logvar: float = 0.0) -> None:
        super().__init__()
        self.vae = vae
        self.logvar = nn.Parameter(torch.tensor(float(logvar)))

    def forward(
        self, x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c_latent h2 w2"]
    ) -> tuple[Float[Tensor, "b c h w"], DiagonalGaussian, Float[Tensor, ""]]:
        """The reconstruction, the posterior and the log variance."""
        return (*self.vae(x, noise), self.logvar)


class VAETerms(NamedTuple):
    """The parts of the loss: ``nll`` and ``kl`` are sums over an image, averaged over images."""

    reconstruction: Tensor
    nll: Tensor
    kl: Tensor


@dataclass(frozen=True)
class VAELoss:
    """The loss of ``WithLogVariance`` on a batch of ``x`` and ``noise``; as a function, a ``loss_fn`` for ``fit``.

    ``features`` is the net of the perceptual distance, or None for none.
    """

    features: FeatureMaps | None = None
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    mse_weight: float = 0.0

    def terms(self, model: nn.Module, batch: Batch) -> VAETerms:
        """The reconstruction, and what it and its latent cost."""
        x = batch["x"]
        reconstruction, posterior, logvar = model(x, batch["noise"])
        distance = None
        if self.features is not None:
            with torch.no_grad():
                wanted = self.features(x)
            distance = perceptual_distance(self.features(reconstruction), wanted)
        nll = reconstruction_nll(
            x,
            reconstruction,
            logvar,
            distance,
            perceptual_weight=self.perceptual_weight,
            mse_weight=self.mse_weight,
        )
        return VAETerms(reconstruction, nll, posterior.kl().mean())

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """``nll + kl_weight * KL``, all of it divided by the number of values of an image, for a gradient of moderate size."""
        terms = self.terms(model, batch)
        return (terms.nll + self.kl_weight * terms.kl) / batch["x"][0].numel()


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()
