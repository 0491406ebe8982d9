"""`shapes`: what is drawn is what was asked for, checked against independent code."""

import math

import numpy as np
import pytest
import torch

from minilib.data import shapes
from minilib.data.shapes import Scenes, render, render_layers, sample_scenes
from minilib.data.shapes.render import BACKGROUND, PALETTE, RADII
from minilib.data.shapes.scenes import SPLITS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one(shape="circle", colour="red", size="large", row="middle", column="centre"):
    return shapes.parse([f"{size} {colour} {shape} {row} {column}"])


def test_a_seed_is_a_set_of_scenes():
    a, b = (sample_scenes(50, generator(3), objects=(1, 3)) for _ in "ab")
    assert torch.equal(render(a), render(b)) and shapes.captions(a) == shapes.captions(b)
    assert not torch.equal(render(a), render(sample_scenes(50, generator(4), objects=(1, 3))))


@pytest.mark.parametrize("objects", [(1, 1), (2, 2), (3, 3), (1, 3), (2, 3)])
def test_counts_and_gaps(objects):
    scenes = sample_scenes(500, generator(), objects=objects)
    assert set(scenes.count.tolist()) == set(range(objects[0], objects[1] + 1))
    masks = render_layers(scenes, 48).masks
    overlap = (masks.sum(1) > 1 + 1e-5) | ((masks > 0.5).sum(1) > 1)
    assert not overlap.any(), "two objects touch"
    for cells in scenes.cell.tolist():
        used = [c for c in cells if c >= 0]
        assert len(set(used)) == len(used)
        for i, a in enumerate(used):
            for b in used[:i]:
                assert abs(a // 3 - b // 3) + abs(a % 3 - b % 3) > 1


def test_every_value_is_equally_likely():
    scenes = sample_scenes(6000, generator(), objects=(1, 3))
    for name, answers in (("shape", 4), ("colour", 6), ("size", 2)):
        values = getattr(scenes, name)[scenes.present]
        shares = torch.bincount(values, minlength=answers) / len(values)
        assert (shares - 1 / answers).abs().max() < 4 * math.sqrt(0.25 / len(values))
    first = scenes.cell[scenes.count == 1, 0]
    assert (torch.bincount(first, minlength=9) / len(first) - 1 / 9).abs().max() < 0.03
    # The caption's order says nothing about the place.
    pair = scenes.cell[scenes.count == 2]
    assert abs(float((pair[:, 0] < pair[:, 1]).float().mean()) - 0.5) < 0.05


def test_splits_are_by_caption_whatever_its_order():
    scenes = sample_scenes(4000, generator(), objects=(1, 3))
    parts = shapes.split_of(scenes)
    shares = torch.bincount(parts, minlength=3) / len(parts)
    assert torch.allclose(shares, torch.tensor([0.9, 0.05, 0.05]), atol=0.015)
    reordered = {f: getattr(scenes, f).clone() for f in Scenes.__dataclass_fields__}
    two = scenes.count >= 2
    for value in reordered.values():
        value[two] = value[two][:, [1, 0, 2]]
    moved = reordered | {"offset": torch.zeros_like(scenes.offset), "stripe": scenes.stripe.clamp(max=0)}
    assert torch.equal(shapes.split_of(Scenes(**moved)), parts)
    for index, split in enumerate(SPLITS):
        drawn = sample_scenes(200, generator(1), objects=(1, 3), split=split)
        assert len(drawn) == 200 and set(shapes.split_of(drawn).tolist()) == {index}
    # Single objects are held out, too, and the split never changes.
    held_out = [c for c in shapes.captions(sample_scenes(400, generator(), objects=(1, 1), split="test"))]
    assert 10 <= len(set(held_out)) <= 40
    assert shapes.split_of(shapes.parse(["small red circle top left"])).tolist() == [0]


def test_grammar_round_trip():
    scenes = sample_scenes(300, generator(), objects=(1, 3))
    sentences = shapes.captions(scenes)
    assert torch.equal(shapes.parse(sentences).grid(), scenes.grid())
    tokens = shapes.tokens(scenes)
    assert torch.equal(torch.stack([shapes.encode(s) for s in sentences]), tokens)
    assert [shapes.decode(row) for row in tokens] == sentences
    assert torch.equal((tokens != 0).sum(1), 6 * scenes.count)
    assert torch.equal(shapes.null_tokens(2), shapes.encode("").expand(2, -1))
    assert shapes.tokens(scenes[scenes.count == 1], length=6).shape[1] == 6
    assert shapes.tokens(scenes, length=20).shape[1] == 20


def test_grammar_refuses():
    with pytest.raises(ValueError, match="'purple'"):
        shapes.encode("small purple circle top left")
    with pytest.raises(ValueError, match="do not fit into 3"):
        shapes.encode("small red circle", length=3)
    with pytest.raises(ValueError, match="joined by 'and'"):
        shapes.parse(["red circle top left"])
    with pytest.raises(ValueError, match="at most 3"):
        shapes.parse([" and ".join(["small red circle top left"] * 4)])
    with pytest.raises(ValueError, match="up to 12 tokens"):
        shapes.tokens(sample_scenes(1, generator(), objects=(2, 2)), length=11)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", math.pi), ("square", 4 * 0.82**2), ("triangle", 1.8), ("cross", 8 * 0.36 - 4 * 0.36**2)],
)
def test_areas_and_colours_are_exact(shape, area, size):
    canvas = 160
    layers = render_layers(one(shape, "yellow", size), canvas)
    radius = RADII[0 if size == "small" else 1] * canvas / 16
    assert float(layers.masks.sum()) == pytest.approx(area * radius**2, rel=0.01)
    middle = layers.image[0, :, canvas // 2, canvas // 2]
    assert torch.allclose(middle, 2 * torch.tensor(PALETTE[3]) - 1)
    assert torch.allclose(layers.image[0, :, 0, 0], 2 * torch.tensor(BACKGROUND) - 1)


def test_pictures_agree_with_a_slow_renderer():
    """Supersampled point-in-shape tests, written without distances."""

    def inside(shape, x, y):
        if shape == 0:
            return x * x + y * y <= 1
        if shape == 1:
            return np.maximum(abs(x), abs(y)) <= 0.82
        if shape == 2:  # between the base and the lines from (0, -1) to (+-1, 0.8)
            return (y <= 0.8) & (y >= -1) & (abs(x) <= (y + 1) / 1.8)
        return (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= 0.36)

    scenes, canvas, fine = sample_scenes(12, generator(5), objects=(1, 3)), 32, 8
    at = (np.arange(canvas * fine) + 0.5) / fine
    y, x = np.meshgrid(at, at, indexing="ij")
    expected = np.ones((len(scenes), 3, canvas, canvas)) * np.array(BACKGROUND)[None, :, None, None]
    for i in range(len(scenes)):
        for k in range(int(scenes.count[i])):
            row, column = divmod(int(scenes.cell[i, k]), 3)
            dy, dx = scenes.offset[i, k].tolist()
            r = RADII[scenes.size[i, k]] * canvas / 16
            cy, cx = ((3, 8, 13)[row] + dy) * canvas / 16, ((3, 8, 13)[column] + dx) * canvas / 16
            hit = inside(int(scenes.shape[i, k]), (x - cx) / r, (y - cy) / r)
            share = hit.reshape(canvas, fine, canvas, fine).mean((1, 3))
            ink = np.array(PALETTE[int(scenes.colour[i, k])])[:, None, None]
            expected[i] = expected[i] * (1 - share) + ink * share
    error = (render(scenes, canvas).numpy() + 1) / 2 - expected
    assert (
        abs(error).mean() < 0.004 and abs(error).max() < 0.30
    )  # an edge pixel may differ, a wrong shape would not


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (48, 32), (16, 40), (12, 12)])
def test_layers_agree_with_each_other(height, width):
    scenes = sample_scenes(40, generator(), objects=(1, 3))
    layers = render_layers(scenes, height, width)
    assert layers.image.shape == (40, 3, height, width) and layers.image.abs().max() <= 1
    solid = layers.masks >= 0.5
    assert torch.equal(layers.depth[:, 0] < 1, solid.any(1))
    near = torch.where(scenes.size == 1, 0.3, 0.6)
    for i, k in scenes.present.nonzero().tolist():
        top, left, bottom, right = layers.boxes[i, k].int().tolist()
        rows, columns = solid[i, k].any(1).nonzero(), solid[i, k].any(0).nonzero()
        assert (top, bottom) == (int(rows.min()), int(rows.max()) + 1)
        assert (left, right) == (int(columns.min()), int(columns.max()) + 1)
        assert (layers.depth[i, 0][solid[i, k]] == near[i, k]).all()
        partly = (layers.masks[i, k] > 0) & (layers.masks[i, k] < 1)
        assert (layers.edges[i, 0][partly] == 1).all()
        centre_row = (top + bottom) / 2 / height
        assert int(centre_row * 3) == int(scenes.cell[i, k]) // 3
    assert layers.boxes[~scenes.present].isnan().all() and layers.masks[~scenes.present].sum() == 0


def test_the_same_scene_on_a_finer_canvas_is_the_same_picture():
    scenes = sample_scenes(20, generator(), objects=(1, 3))
    coarse = torch.nn.functional.avg_pool2d(render(scenes, 64), 4)
    assert (coarse - render(scenes, 16)).abs().mean() < 0.02


def test_twins_are_equal_and_far_apart():
    scenes = sample_scenes(100, generator(), mode="twins")
    for name in ("shape", "colour", "size"):
        values = getattr(scenes, name)
        assert torch.equal(values[:, 0], values[:, 1])
    assert {tuple(sorted(c)) for c in scenes.cell[:, :2].tolist()} == {(0, 8), (2, 6)}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("attribute", ["colour", "shape", "size"])
def test_swap_pairs_differ_in_one_exchange(attribute, split):
    a, b = shapes.swap_pairs(60, generator(), attribute=attribute, split=split)
    assert len(a) == len(b) == 60
    assert {*shapes.split_of(a).tolist(), *shapes.split_of(b).tolist()} == {
        ("train", "validation", "test").index(split)
    }
    for name in ("shape", "colour", "size", "cell"):
        x, y = getattr(a, name), getattr(b, name)
        if name == attribute:
            assert torch.equal(x[:, [1, 0]], y[:, :2]) and (x[:, 0] != x[:, 1]).all()
        else:
            assert torch.equal(x, y)


def test_stripes_have_their_direction():
    scenes = sample_scenes(400, generator(), objects=(1, 1), texture=True, jitter=0.0)
    scenes = scenes[(scenes.shape[:, 0] == 1) & (scenes.size[:, 0] == 1)]
    assert set(scenes.stripe[:, 0].tolist()) == {1, 2, 3, 4}
    x, plain = render(scenes, 96), render(one("square", "red", "large"), 96)
    assert not torch.equal(x[:1], plain)
    for i in range(len(scenes)):
        top, left, bottom, right = render_layers(scenes[i : i + 1], 96).boxes[0, 0].int().tolist()
        patch = x[i, :, top + 2 : bottom - 2, left + 2 : right - 2].amax(0)
        down, across = patch.diff(dim=0).abs().mean(), patch.diff(dim=1).abs().mean()
        rising = (patch[1:, :-1] - patch[:-1, 1:]).abs().mean()  # constant along a rising diagonal
        falling = (patch[1:, 1:] - patch[:-1, :-1]).abs().mean()
        flattest = int(torch.stack([across, down, rising, falling]).argmin())
        assert flattest == int(scenes.stripe[i, 0]) - 1
    assert torch.equal(
        render(sample_scenes(3, generator())), render(sample_scenes(3, generator(), texture=False))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": (0, 2)}, "1 to 3"),
        ({"objects": (2, 4)}, "1 to 3"),
        ({"objects": (3, 2)}, "1 to 3"),
        ({"split": "dev"}, "'dev'"),
        ({"mode": "triplets"}, "'triplets'"),
        ({"jitter": 0.6}, "jitter"),
    ],
)
def test_bad_requests_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample_scenes(3, generator(), **options)
    with pytest.raises(ValueError, match="at least 12"):
        render(one(), 11)
    with pytest.raises(ValueError, match="'place'"):
        shapes.swap_pairs(2, generator(), attribute="place")


def test_no_scenes_is_a_fine_number():
    scenes = sample_scenes(0, generator())
    assert len(scenes) == 0 and shapes.captions(scenes) == [] and render(scenes).shape == (0, 3, 16, 16)


def test_indexing_and_joining():
    scenes = sample_scenes(10, generator(), objects=(1, 3))
    again = shapes.concatenate([scenes[:4], scenes[torch.arange(4, 10)]])
    assert torch.equal(again.grid(), scenes.grid()) and len(scenes[scenes.count == 2]) == int(
        (scenes.count == 2).sum()
    )


@pytest.mark.parametrize("name", ["shapes", "shapes-texture"])
def test_as_a_data_set(name):
    from minilib.data import load

    test = load(name, "test", size=16)
    assert len(test) == 2000 and test.x.shape == (2000, 3, 16, 16) and test.tokens.shape == (2000, 18)
    assert test.captions == tuple(shapes.captions(test.scenes)) and "generated" in test.source
    assert set(shapes.split_of(test.scenes).tolist()) == {2}
    assert torch.equal(test.x, render(test.scenes, 16)) and (test.scenes.stripe.max() > 0) == (
        name != "shapes"
    )
    assert load(name, "test", size=32).checksum != test.checksum
    with pytest.raises(ValueError, match="size=24"):
        load(name, "test", size=24)
