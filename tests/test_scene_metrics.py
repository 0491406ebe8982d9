"""The judge of scenes, and what is made of its readings."""

import pytest
import torch

from minilib import zoo
from minilib.data import shapes
from minilib.data.shapes import render, sample_scenes
from minilib.metrics import mean_scores, read_in_batches, scene_scores
from minilib.models import GARBLED, SceneOracle, scene_cross_entropy


def scenes_of(*sentences):
    return shapes.parse(list(sentences))


def scores(asked, drawn, **options):
    return {
        k: v.tolist() for k, v in scene_scores(scenes_of(*drawn).grid(), scenes_of(*asked), **options).items()
    }


TWO = "small red circle top left and large blue square bottom right"


def test_a_right_picture_is_right_in_everything():
    result = scores([TWO], [TWO])
    assert {k: v[0] for k, v in result.items()} == {
        "scene": 1, "object": 1, "present": 1, "shape": 1, "colour": 1, "size": 1, "extra": 0, "shape_leak": 0,
        "colour_leak": 0,
    }  # fmt: skip
    # The order of the caption does not matter.
    turned = "large blue square bottom right and small red circle top left"
    assert scores([TWO], [turned])["scene"] == [1.0]


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ("small red circle top left", {"scene": 0, "object": 0.5, "present": 0.5, "colour": 0.5}),
        ("small blue circle top left and large blue square bottom right", {"object": 0.5, "colour": 0.5, "colour_leak": 0.5}),
        ("small blue circle top left and large red square bottom right", {"object": 0, "colour_leak": 1, "shape_leak": 0}),
        ("small green circle top left and large blue square bottom right", {"colour": 0.5, "colour_leak": 0}),
        ("large red circle top left and large blue square bottom right", {"size": 0.5, "scene": 0, "colour_leak": 0}),
        (TWO + " and large red cross top right", {"scene": 0, "object": 1, "extra": 1 / 7}),
        ("small red circle top right and large blue square bottom right", {"present": 0.5, "extra": 1 / 7}),
        ("small red square top left and large blue square bottom right", {"shape_leak": 0.5, "shape": 0.5}),
    ],
)  # fmt: skip
def test_each_mistake_has_its_score(drawn, expected):
    result = scores([TWO], [drawn])
    for name, value in expected.items():
        assert result[name][0] == pytest.approx(value), (name, result)


def test_a_leak_needs_somebody_to_leak_from():
    same = "small red circle top left and large red circle bottom right"
    result = scores([same, "small red circle top left"], [same, "small red circle top left"])
    assert all(torch.tensor(result[k]).isnan().all() for k in ("colour_leak", "shape_leak"))
    assert mean_scores(scene_scores(scenes_of(TWO, same).grid(), scenes_of(TWO, same)))["colour_leak"] == 0.0


def test_stripes_are_judged_only_when_asked():
    striped = sample_scenes(5, torch.Generator().manual_seed(0), texture=True)
    plain = shapes.parse(shapes.captions(striped))
    assert scene_scores(striped.grid(), plain)["scene"].tolist() == [1] * 5
    judged = scene_scores(striped.grid(), plain, stripes=True)
    assert judged["scene"].tolist() == [0] * 5 and judged["stripe"].tolist() == [0] * 5


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_cell_cannot_be_read_from_elsewhere(size):
    """The gradient of a cell's logits is zero outside its window and the two convolutions' reach."""
    torch.manual_seed(0)
    oracle = SceneOracle(size, width=8, hidden=8)
    x = torch.randn(1, 3, size, size, requires_grad=True)
    unit = size // 16
    for cell in range(9):
        (grad,) = torch.autograd.grad(oracle(x)["shape"][0, cell].sum(), x)
        rows, columns = grad[0].abs().sum(0).nonzero().unbind(1)
        top, left = 5 * unit * (cell // 3), 5 * unit * (cell % 3)
        assert rows.min() >= max(top - 2, 0) and rows.max() <= top + 6 * unit + 1
        assert columns.min() >= max(left - 2, 0) and columns.max() <= left + 6 * unit + 1


def test_oracle_interface():
    oracle = SceneOracle(16, width=8, hidden=8)
    x = torch.randn(4, 3, 16, 16)
    assert oracle.features(x).shape == (4, 16) and oracle.read(x).shape == (4, 9, 4)
    again = SceneOracle(**oracle.config)
    again.load_state_dict(oracle.state_dict())
    assert torch.equal(again.read(x), oracle.read(x))
    read = oracle.read(x)
    assert ((read[..., 0] >= 0) == (read[..., 1] >= 0)).all() and read[..., 0].max() <= GARBLED
    with pytest.raises(ValueError, match="16"):
        SceneOracle(24)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        oracle(torch.zeros(1, 3, 32, 32))


def test_the_loss_ignores_what_is_not_there():
    torch.manual_seed(0)
    oracle = SceneOracle(16, width=8, hidden=8)
    scenes = sample_scenes(6, torch.Generator().manual_seed(0))
    logits = {k: v.detach().requires_grad_() for k, v in oracle(render(scenes)).items()}
    scene_cross_entropy(logits, scenes.grid()).backward()
    empty = scenes.grid()[..., 0] < 0
    assert logits["shape"].grad[empty].abs().sum() > 0
    for name in ("colour", "size", "stripe"):
        assert logits[name].grad[empty].abs().sum() == 0 and logits[name].grad[~empty].abs().sum() > 0
    perfect = {
        name: torch.nn.functional.one_hot((scenes.grid()[..., i] + (name == "shape")).clamp(min=0), n).float()
        * 50
        for i, (name, n) in enumerate({"shape": 6, "colour": 6, "size": 2, "stripe": 5}.items())
    }
    assert float(scene_cross_entropy(perfect, scenes.grid())) < 1e-6


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("texture", [False, True])
def test_the_shipped_oracle_reads_every_generator_parameter(size, texture):
    oracle = zoo.load(f"oracle_shapes{size}")
    scenes = sample_scenes(
        500, torch.Generator().manual_seed(77), objects=(1, 3), split="test", texture=texture
    )
    result = mean_scores(scene_scores(read_in_batches(oracle, render(scenes, size)), scenes, stripes=texture))
    for name in ("scene", "object", "shape", "colour", "size", *(["stripe"] if texture else [])):
        assert result[name] >= 0.98, (name, result[name])
    noisy = render(scenes, size) + 0.1 * torch.randn(
        500, 3, size, size, generator=torch.Generator().manual_seed(1)
    )
    assert mean_scores(scene_scores(read_in_batches(oracle, noisy), scenes))["scene"] >= 0.98


@pytest.mark.parametrize("size", [16, 32])
def test_the_shipped_oracle_sees_mixtures(size):
    from minilib.recipes.shapes import garble

    oracle, generator = zoo.load(f"oracle_shapes{size}"), torch.Generator().manual_seed(5)
    scenes = sample_scenes(300, generator, objects=(1, 3), split="test")
    read = read_in_batches(oracle, garble(scenes, size, generator))
    there = scenes.grid()[..., 0] >= 0
    assert float((read[..., 0][there] == GARBLED).float().mean()) >= 0.90
