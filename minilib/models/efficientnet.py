"""EfficientNet-Lite0: a real ImageNet-1k classifier, small enough for one core, as a frozen feature net.

Tan and Le, 2019, arXiv 1905.11946, table 1 (B0), less squeeze-and-excitation and with ReLU6 in place of swish; facts read in
tensorflow/tpu, ``models/official/efficientnet/lite`` and in PyPI ``efficientnet-lite-pytorch`` 0.1.0. Batch normalisation
(epsilon 1e-3) is folded into the convolutions: the net is only ever used with its running statistics. It is supervised: its
features know the 1,000 classes of ImageNet, and are no stand-in for self-supervised ones where that matters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STAGES = (
    # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LEVELS = {2: 0, 4: 2, 8: 4, 16: 10, 32: 15}
"""Stride of a level: the last block that works at it. Widths 16, 24, 40, 112 and 320."""


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: ``ceil(n / stride)`` outputs, the odd zero at the bottom right."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d p q"]:
        """The convolution."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
        (top, bottom), (left, right) = [(t // 2, t - t // 2) for t in total]
        if (top, left) == (bottom, right):
            return F.conv2d(x, self.weight, self.bias, stride, (top, left), groups=self.groups)
        return F.conv2d(
            F.pad(x, (left, right, top, bottom)), self.weight, self.bias, stride, groups=self.groups
        )


class InvertedResidual(nn.Module):
    """Widen with a 1 x 1 convolution, mix space within channels, narrow again; the narrow end has no non-linearity."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.expand = SameConv2d(in_channels, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv2d(wide, out_channels, 1)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d p q"]:
        """One block."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(wide)))
        return x + out if self.residual else out


class EfficientNetLite0(nn.Module):
    """The classifier, 4.63 M parameters with the normalisations folded in. Images are RGB in [-1, 1].

    Args:
        num_classes: logits; 1,000 in the shipped weights (ImageNet's order, so 285 is "Egyptian cat").
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.config = {"num_classes": num_classes}
        self.stem = SameConv2d(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv2d(channels, 1280, 1)
        self.classifier = nn.Linear(1280, num_classes)

    def prepare(self, x: Float[Tensor, "b 3 h w"], size: int | None) -> Float[Tensor, "b 3 p q"]:
        """Resize (bicubic, antialiased, shorter side to ``size``; None: as it is) and shift to the net's own scale.

        The net was trained on ``(v - 127) / 128`` for v in 0..255: mean .498 and deviation .502 of values in [0, 1].

        Raises:
            ValueError: ``size`` below 1.
        """
        if size is not None and size < 1:
            raise ValueError(
                f"size must be a side in pixels, or None to leave images as they are; got {size}"
            )
        short = min(x.shape[2:])
        if size is not None and size != short:
            shape = [round(n * size / short) for n in x.shape[2:]]
            x = F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        x = (x * 127.5 + 0.5) / 128
        return x.contiguous(memory_format=torch.channels_last)

    def levels(self, x: Float[Tensor, "b 3 h w"], size: int | None = None) -> dict[int, Tensor]:
        """Maps of features at strides 2, 4, 8, 16 and 32: signed, with 16, 24, 40, 112 and 320 channels.

        ``levels(x, size=128)[16]`` is (b, 112, 8, 8): one feature a token for an alignment loss over 64 tokens.
        """
        x = F.relu6(self.stem(self.prepare(x, size)))
        maps = {}
        stride_after = {block: stride for stride, block in LEVELS.items()}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in stride_after:
                maps[stride_after[i]] = x
        return maps

    def features(self, x: Float[Tensor, "b 3 h w"], size: int | None = 64) -> Float[Tensor, "b 1280"]:
        """The 1,280 pooled features, in [0, 6]. 64 pixels is fast; 128 knows more of what is in the picture."""
        return F.relu6(self.head(self.levels(x, size)[32])).mean((2, 3))

    def forward(self, x: Float[Tensor, "b 3 h w"], size: int | None = 224) -> Float[Tensor, "b k"]:
        """Logits. The net was trained at 224 pixels."""
        return self.classifier(self.features(x, size))


def load_effnet_lite0() -> EfficientNetLite0:
    """The shipped ImageNet-1k weights (asset ``effnet_lite0``), in eval mode, in float32, without gradients.

    The asset holds weights as integers with a scale a row; its pooled features differ from the original net's by less than a
    thousandth of their length.

    Raises:
        MissingFile, TruncatedFile, ChecksumMismatch: the asset is not what ``assets.toml`` says.
    """
    from safetensors.torch import load

    from minilib.data import assets

    stored = load(assets.read("effnet_lite0"))
    state = {}
    for name, value in stored.items():
        if name.endswith(".scale"):
            continue
        rows = stored.get(f"{name}.scale")
        state[name] = value if rows is None else value * rows.view(-1, *[1] * (value.ndim - 1))
    with torch.device("meta"):
        net = EfficientNetLite0()
    net.load_state_dict(state, assign=True)
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
