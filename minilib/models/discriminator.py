"""The patch discriminator that sharpens an autoencoder's reconstructions (Isola et al. 2017, arXiv 1611.07004)."""

from jaxtyping import Float
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Says of each patch of an image how real it looks: one logit a patch, above 0 for real.

    4x4 convolutions, ``layers`` of them with stride 2 and two with stride 1; leaky ReLU (0.2) between them and batch
    norms after all but the first and the last (``NLayerDiscriminator`` of ``CompVis/taming-transformers:
    taming/modules/discriminator/model.py``, with its initialisation: N(0, 0.02)).

    Args:
        in_channels: channels of the image.
        width: channels after the first convolution; each next one has twice as many, up to 8 times.
        layers: convolutions with stride 2. Three: a logit sees 70 x 70 pixels.

    >>> import torch
    >>> PatchDiscriminator(width=8, layers=2)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1, 6, 6])
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "width": width, "layers": layers}
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, layers + 1):
            wider = width * min(2**index, 8)
            stride = 2 if index < layers else 1
            # A batch norm takes the mean away: a bias before it would do nothing.
            convolution = nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False)
            parts += [convolution, nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            channels = wider
        self.layers = nn.Sequential(*parts, nn.Conv2d(channels, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 p q"]:
        """The logits of overlapping patches."""
        return self.layers(x)
