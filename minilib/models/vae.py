"""The convolutional variational autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .vae_blocks import Decoder, Encoder

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian a latent value: ``mean`` and ``logvar``, both (b, c, h, w)."""

    mean: Float[Tensor, "b c h w"]
    logvar: Float[Tensor, "b c h w"]

    @classmethod
    def from_moments(cls, moments: Float[Tensor, "b c2 h w"]) -> "DiagonalGaussian":
        """The first half of the channels is the mean, the second the log variance, kept within ``LOGVAR_RANGE``."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def std(self) -> Float[Tensor, "b c h w"]:
        """The standard deviations."""
        return torch.exp(0.5 * self.logvar)

    @property
    def mode(self) -> Float[Tensor, "b c h w"]:
        """The most likely latent: the mean."""
        return self.mean

    def at(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """``mean + std * noise``: the sample that this unit Gaussian noise makes."""
        return self.mean + self.std * noise

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "b c h w"]:
        """A random latent; the noise is drawn where the generator lives."""
        from ..sampling import initial_noise

        shape, like = tuple(self.mean.shape), self.mean
        return self.at(initial_noise(shape, generator, device=like.device, dtype=like.dtype))

    def kl(self) -> Float[Tensor, " b"]:
        """KL(this || N(0, 1)) of each image in nats, *summed* over its latent values.

        >>> posterior = DiagonalGaussian(torch.full((1, 1, 1, 2), 3.0), torch.zeros(1, 1, 1, 2))
        >>> posterior.kl()
        tensor([9.])
        """
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class ConvVAE(nn.Module):
    """Images to a Gaussian over latents of ``latent_channels`` x h/f x w/f, and latents to images; f = 2^(levels - 1).

    ``config`` rebuilds the model: ``ConvVAE(**model.config)``. Any canvas whose sides are multiples of f will do.

    A diffusion model wants latents of unit spread: ``encode_scaled`` gives ``(z - shift_factor) * scaling_factor`` and
    ``decode_scaled`` undoes it. The factors are measured after training: see ``set_scaling``.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the reconstruction.
        block_out_channels: width of each level; each level but the last halves the resolution.
        layers_per_block: residual blocks a level in the encoder; the decoder has one more.
        latent_channels: channels of the latent.
        norm_num_groups: groups of the group norms; must divide every width.
        mid_attention: self-attention at the lowest resolution, as in Stable Diffusion. Without it the only thing that
            reaches across the whole image are the means and variances of the group norms.
        quant_conv: a 1x1 convolution after the encoder and one before the decoder, as in Stable Diffusion 1 and 2.
        scaling_factor: 1 / standard deviation of the latents; Stable Diffusion 1 has 0.18215.
        shift_factor: mean of the latents; 0 in Stable Diffusion 1.

    Raises:
        ValueError: no level, no layer, no latent channel, widths that the groups do not divide, a scaling factor of zero.

    >>> vae = ConvVAE(block_out_channels=(8, 16, 16), norm_num_groups=4, latent_channels=4)
    >>> posterior = vae.encode(torch.zeros(2, 3, 32, 48))
    >>> posterior.mean.shape, vae.decode(posterior.mode).shape
    (torch.Size([2, 4, 8, 12]), torch.Size([2, 3, 32, 48]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (16, 32, 48),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        norm_num_groups: int = 8,
        mid_attention: bool = False,
        quant_conv: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["block_out_channels"] = list(block_out_channels)
        widths = tuple(block_out_channels)
        if not widths or min(layers_per_block, latent_channels) < 1:
            raise ValueError(
                f"need at least one level, one layer and one latent channel; got widths {widths}, "
                f"{layers_per_block} layers and {latent_channels} channels"
            )
        if any(width < 1 or width % norm_num_groups for width in widths):
            raise ValueError(
                f"every width has to be a multiple of norm_num_groups = {norm_num_groups}, got {widths}"
            )
        self.set_scaling(scaling_factor, shift_factor)
        shared = (widths, layers_per_block, norm_num_groups, mid_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shared)
        self.decoder = Decoder(latent_channels, out_channels, *shared)
        both = 2 * latent_channels
        self.quant_conv = nn.Conv2d(both, both, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_conv else nn.Identity()

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> "ConvVAE":
        """An untrained model of the configuration of an ``AutoencoderKL`` (the ``vae/config.json`` of SD 1.5, say).

        Raises:
            minilib.models.ConversionError: an option that this autoencoder does not have.
        """
        from .convert_vae import vae_config_from_diffusers

        return cls(**vae_config_from_diffusers(config))

    @property
    def downsample_factor(self) -> int:
        """f: the image's side over the latent's."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """What shifted latents are multiplied by."""
        return self.config["scaling_factor"]

    @property
    def shift_factor(self) -> float:
        """What is subtracted from latents first."""
        return self.config["shift_factor"]

    def set_scaling(self, scaling_factor: float, shift_factor: float = 0.0) -> None:
        """Change the factors, in ``config`` too, so that they are saved with the model.

        Raises:
            ValueError: the scaling factor is not positive.
        """
        if not scaling_factor > 0:
            raise ValueError(f"the scaling factor is 1 / standard deviation, above 0; got {scaling_factor}")
        self.config["scaling_factor"] = float(scaling_factor)
        self.config["shift_factor"] = float(shift_factor)

    def encode(self, x: Float[Tensor, "b c h w"]) -> DiagonalGaussian:
        """The posterior of the latents, not scaled.

        Args:
            x: images in [-1, 1].

        Raises:
            ValueError: another number of channels, or sides that are no multiples of f.
        """
        f, channels = self.downsample_factor, self.config["in_channels"]
        if x.shape[1] != channels or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"images of shape {tuple(x.shape[1:])} given; this autoencoder takes {channels} channels and sides "
                f"that are multiples of {f}"
            )
        h = self.encoder(x.contiguous(memory_format=torch.channels_last))
        return DiagonalGaussian.from_moments(self.quant_conv(h))

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        """Images of latents that are not scaled. They may leave [-1, 1] a little: clamp before looking.

        Raises:
            ValueError: another number of channels.
        """
        channels = self.config["latent_channels"]
        if z.shape[1] != channels:
            raise ValueError(f"latents of {z.shape[1]} channels given, this autoencoder has {channels}")
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=torch.channels_last)))

    def encode_scaled(
        self, x: Float[Tensor, "b c h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c_latent h2 w2"]:
        """Latents for a diffusion model: a sample of the posterior if there is a generator, else its mode; shifted and scaled."""
        posterior = self.encode(x)
        z = posterior.mode if generator is None else posterior.sample(generator)
        return (z - self.shift_factor) * self.scaling_factor

    def decode_scaled(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        """Images of a diffusion model's latents."""
        return self.decode(latents / self.scaling_factor + self.shift_factor)

    def forward(
        self, x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c_latent h2 w2"] | None = None
    ) -> tuple[Float[Tensor, "b c_out h w"], DiagonalGaussian]:
        """Reconstruct, through the latent that ``noise`` makes, or without it through the mode.

        Returns:
            the reconstruction and the posterior.
        """
        posterior = self.encode(x)
        z = posterior.mode if noise is None else posterior.at(noise)
        return self.decode(z), posterior
