"""The oracle classifier: a small convolutional network that judges generated images, and whose features measure distances."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class OracleClassifier(nn.Module):
    """Three convolutions, the last two with stride 2, one hidden layer of 64 features, logits.

    Args:
        in_channels: channels of the image.
        num_classes: labels.
        image_size: height and width; a multiple of 4.
        width: channels of the first convolution; the next two have twice as many.
        dropout: rate before the two linear layers, in training mode.

    Raises:
        ValueError: ``image_size`` is no multiple of 4.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 8,
        width: int = 32,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {image_size}: it is halved twice")
        self.config = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "image_size": image_size,
            "width": width,
            "dropout": dropout,
        }
        self.image_size = image_size
        self.convolutions = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
        )
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(2 * width * (image_size // 4) ** 2, 64)
        self.head = nn.Linear(64, num_classes)

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 64"]:
        """The 64 activations before the logits.

        Raises:
            ValueError: images of another size.
        """
        expected = (self.config["in_channels"], self.image_size, self.image_size)
        if x.shape[1:] != expected:
            raise ValueError(f"images of shape {tuple(x.shape[1:])} given, this classifier takes {expected}")
        return F.gelu(self.hidden(self.dropout(self.convolutions(x).flatten(1))))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits, one a class."""
        return self.head(self.dropout(self.features(x)))
