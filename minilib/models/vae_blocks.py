"""The encoder and the decoder of a convolutional autoencoder, and what they are made of.

Wiring and names are those of Stable Diffusion's autoencoder (Rombach et al. 2022, arXiv 2112.10752; read in
``CompVis/latent-diffusion: ldm/modules/diffusionmodules/model.py`` and in diffusers 0.42, ``models/autoencoders/vae.py``).
The residual block is the U-Net's, without a time.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..attention import Attention
from .unet_blocks import ResnetBlock
from .unet_stages import Upsample

NORM_EPS = 1e-6


class PaddedDownsample(nn.Module):
    """A 3x3 convolution with stride 2 over the image with one row of zeros below and one column at its right.

    The U-Net's downsampler pads on all four sides: the two are shifted by one pixel against each other.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Halve height and width; an odd side is rounded down."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownStage(nn.Module):
    """The encoder's part at one resolution: residual blocks, then a downsampler in all but the last."""

    def __init__(self, resnets: list[ResnetBlock], downsampler: PaddedDownsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Transform, then halve."""
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        return x


class UpStage(nn.Module):
    """The decoder's part at one resolution: one residual block more than the encoder's, then an upsampler in all but the last."""

    def __init__(self, resnets: list[ResnetBlock], upsampler: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Transform, then double."""
        for resnet in self.resnets:
            x = resnet(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class SpatialAttention(nn.Module):
    """x + attn(norm x) with one head, the pixels being the tokens. It starts as the identity."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.attn = Attention(channels, 1)
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.attn.proj.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Let the pixels look at each other."""
        b, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        return x + self.attn(tokens).view(b, height, width, c).permute(0, 3, 1, 2)


class VAEMidBlock(nn.Module):
    """Residual block, attention if wanted, residual block, at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(channels, channels, num_groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, num_groups)] if attention else [])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Transform the deepest features."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Image to moments: a stage a level, the middle, and a convolution.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result.
        widths: width of each level; each level but the last halves the resolution.
        layers: residual blocks a level.
        num_groups: groups of the group norms.
        attention: self-attention in the middle.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        layers: int,
        num_groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            entering = [widths[max(level - 1, 0)]] + [width] * (layers - 1)
            resnets = [_resnet(entry, width, num_groups) for entry in entering]
            last = level == len(widths) - 1
            self.down_blocks.append(DownStage(resnets, None if last else PaddedDownsample(width)))
        self.mid_block = VAEMidBlock(widths[-1], num_groups, attention)
        self.conv_norm_out = nn.GroupNorm(num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m h2 w2"]:
        """Encode."""
        h = self.conv_in(x)
        for stage in self.down_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Latent to image: a convolution, the middle, a stage a level from the lowest up. Arguments as of ``Encoder``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        layers: int,
        num_groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid_block = VAEMidBlock(widths[-1], num_groups, attention)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width = widths[level]
            entering = [widths[min(level + 1, len(widths) - 1)]] + [width] * layers
            resnets = [_resnet(entry, width, num_groups) for entry in entering]
            self.up_blocks.append(UpStage(resnets, Upsample(width) if level else None))
        self.conv_norm_out = nn.GroupNorm(num_groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m h2 w2"]:
        """Decode."""
        h = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _resnet(in_channels: int, out_channels: int, num_groups: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, 0, num_groups, NORM_EPS)
