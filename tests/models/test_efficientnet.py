"""The feature net against the original package's outputs (``effnet_reference.npz``), on crops of real photographs.

For each crop the reference holds logits and pooled features of PyPI ``efficientnet-lite-pytorch`` 0.1.0, once with the original
weights, and once with the shipped ones (rounded to integers, normalisation folded) put into the original code.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from minilib.data import assets, load
from minilib.data.build import effnet_lite0 as recipe
from minilib.models.efficientnet import LEVELS, EfficientNetLite0, SameConv2d, load_effnet_lite0

REFERENCE = np.load(Path(__file__).parent / "effnet_reference.npz")
CROPS = {
    "china_224": ("china.jpg", 100, 150, 224, 224),
    "flower_128": ("flower.jpg", 150, 250, 128, 128),
    "china_64": ("china.jpg", 150, 300, 64, 64),
    "flower_odd": ("flower.jpg", 120, 230, 97, 133),
}


def crop(name):
    photo, top, left, height, width = CROPS[name]
    levels = load_sample_image(photo)[top : top + height, left : left + width].copy()
    return torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 127.5 - 1


def reference(name):
    return torch.from_numpy(REFERENCE[name])[None]


@pytest.fixture(scope="module")
def net():
    return load_effnet_lite0()


@pytest.mark.parametrize("name", CROPS)
@torch.no_grad()
def test_port_equals_the_original_code(net, name):
    """The odd size needs TensorFlow's padding to be right: other zeros on the two sides, by the parity of the map."""
    x = crop(name)
    assert (net.features(x, None) - reference(f"{name}_shipped_features")).abs().max() < 1e-4
    assert (net(x, None) - reference(f"{name}_shipped_logits")).abs().max() < 1e-4


@pytest.mark.parametrize("name", CROPS)
@torch.no_grad()
def test_integer_weights_cost_less_than_a_thousandth(net, name):
    x, features = crop(name), reference(f"{name}_features")
    assert (net.features(x, None) - features).norm() < 1e-3 * features.norm()
    assert net(x, None).argmax() == reference(f"{name}_logits").argmax()


@torch.no_grad()
def test_photographs_are_recognised(net):
    known = {"chelsea": 285, "coffee": 967, "rocket": 657}  # Egyptian cat, espresso, missile
    found = {}
    for split in ("train", "validation", "test"):
        photos = load("photos", split)
        for i, name in enumerate(photos.names):
            if name in known:
                image = photos.image(i)[None]
                side = min(image.shape[2:])
                top, left = ((n - side) // 2 for n in image.shape[2:])
                found[name] = net(image[:, :, top : top + side, left : left + side]).topk(1).indices.tolist()
    assert found and all(found[name] == [[known[name]]] for name in found), found


def test_same_padding_is_tensorflows():
    """ceil(n / stride) outputs; with 3 x 3 and stride 2 an even side gets its one zero at the end, an odd side one on each."""
    conv = SameConv2d(1, 1, 3, 2).requires_grad_(False)
    conv.weight.fill_(0)
    conv.bias.fill_(0)
    conv.weight[0, 0, 0, 0] = 1
    even, odd = torch.arange(36.0).view(1, 1, 6, 6), torch.arange(25.0).view(1, 1, 5, 5)
    assert conv(even)[0, 0].tolist() == even[0, 0, ::2, ::2].tolist()
    assert conv(odd)[0, 0].tolist() == F.pad(odd, (1, 1, 1, 1))[0, 0, :5:2, :5:2].tolist()
    wide = SameConv2d(1, 1, 5, 2)
    assert wide(even).shape[2:] == (3, 3) and wide(torch.zeros(1, 1, 7, 7)).shape[2:] == (4, 4)


def test_parameters_are_those_of_the_paper_less_the_normalisations():
    with torch.device("meta"):
        net = EfficientNetLite0()
    published = 4_652_008  # with two numbers a channel of every normalisation; folding leaves one
    channels = sum(m.out_channels for m in net.modules() if isinstance(m, SameConv2d))
    assert sum(p.numel() for p in net.parameters()) == published - channels == 4_631_000
    assert assets.entry("effnet_lite0")["parameters"] == 4_631_000
    assert EfficientNetLite0(**net.config).config == {"num_classes": 1000}


@torch.no_grad()
def test_levels_have_their_strides_and_feed_the_features(net):
    x = crop("flower_128")
    levels = net.levels(x)
    assert {s: tuple(m.shape[1:]) for s, m in levels.items()} == {
        2: (16, 64, 64), 4: (24, 32, 32), 8: (40, 16, 16), 16: (112, 8, 8), 32: (320, 4, 4)
    }  # fmt: skip
    assert list(LEVELS) == list(levels)
    pooled = F.relu6(net.head(levels[32])).mean((2, 3))
    assert torch.equal(pooled, net.features(x, None))
    assert net.levels(x, 64)[16].shape == (1, 112, 4, 4)
    seen = []
    with_hook = net.blocks[10].register_forward_hook(lambda module, given, out: seen.append(out))
    net.levels(x)
    with_hook.remove()
    assert torch.equal(seen[0], levels[16])


def test_prepare_resizes_and_shifts(net):
    levels = torch.tensor([0.0, 127.0, 255.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    expected = torch.tensor([-127 / 128, 0.0, 1.0])
    assert (net.prepare(levels / 127.5 - 1, None)[0, 0, 0] - expected).abs().max() < 1e-6
    assert net.prepare(torch.zeros(2, 3, 40, 60), 20).shape == (2, 3, 20, 30)
    x = torch.rand(1, 3, 48, 48) * 2 - 1
    direct = F.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    assert (net.prepare(x, 64) - (direct * 127.5 + 0.5) / 128).abs().max() < 1e-6
    with pytest.raises(ValueError, match="size must be"):
        net.features(x, 0)


def test_gradients_reach_the_image_and_not_the_weights(net):
    x = crop("china_64").requires_grad_()
    net.features(x).square().mean().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    assert not net.training


def test_rounding_is_to_the_nearest_of_65535_steps_a_row():
    state = {"a.weight": torch.randn(4, 3, 1, 1).double(), "a.bias": torch.randn(4).double()}
    stored = recipe.quantised(state)
    back = stored["a.weight"] * stored["a.weight.scale"].view(-1, 1, 1, 1)
    limit = state["a.weight"].flatten(1).abs().amax(1) / 65534 * 1.001
    assert ((back - state["a.weight"]).abs().flatten(1).amax(1) <= limit).all()
    assert stored["a.bias"].dtype == torch.float32 and stored["a.weight"].dtype == torch.int16


def test_asset_is_what_the_wheel_gives():
    folder = Path(os.environ.get("MINILIB_ASSET_SOURCES", ""))
    if not (folder / recipe.SOURCE.file).is_file():
        pytest.skip(f"MINILIB_ASSET_SOURCES names no folder with {recipe.SOURCE.file}")
    assert recipe.build(folder).data == assets.read("effnet_lite0")
