"""`moving_mnist`: real digits, exact paths, read back."""

import pytest
import torch
import torch.nn.functional as F

from minilib import zoo
from minilib.data import load, moving_mnist
from minilib.data.moving_mnist import Motions, render, sample_motions
from minilib.data.registry import HubError
from minilib.metrics import motion, predict


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("mnist10k", "test")


def simulate(x, v, room, frames):
    """Pixel by pixel: turn round at a wall. Returns places, velocities with which they are left, wall contacts a frame."""
    places, speeds, contacts = [], [], []
    for frame in range(frames):
        if (x == 0 and v < 0) or (x == room and v > 0):
            v = -v
        places.append(x)
        speeds.append(v)
        touched = 0
        for _ in range(abs(v)):
            if (x == 0 and v < 0) or (x == room and v > 0):
                v = -v
            x += 1 if v > 0 else -1
            touched += x in (0, room)
        if frame < frames - 1:
            contacts.append(touched)
    return places, speeds, contacts


@pytest.mark.parametrize("canvas", [(64, 64), (32, 32), (50, 71), (21, 33)])
def test_paths_agree_with_a_simulation(canvas, digits):
    motions = sample_motions(60, generator(1), digits.y, canvas=canvas, speed=5)
    place, velocity, contact = motions.positions(25), motions.velocities(25), motions.bounces(25)
    for i, k in motions.present.nonzero().tolist():
        for axis in (0, 1):
            x, v = int(motions.start[i, k, axis]), int(motions.velocity[i, k, axis])
            places, speeds, contacts = simulate(x, v, canvas[axis] - motions.side, 25)
            assert place[i, :, k, axis].tolist() == places
            assert velocity[i, :, k, axis].tolist() == speeds
            assert contact[i, :, k, axis].tolist() == contacts
    assert contact.sum() > 100


def test_momentum_is_reflected(digits):
    motions = sample_motions(300, generator(2), digits.y, canvas=(40, 56))
    place, velocity, contact = motions.positions(20), motions.velocities(20), motions.bounces(20)
    assert torch.equal(velocity.abs(), motions.velocity.abs()[:, None].expand_as(velocity))
    assert torch.equal(velocity[:, 1:], velocity[:, :-1] * (1 - 2 * (contact % 2)))
    free = contact == 0
    assert torch.equal(place.diff(dim=1)[free], velocity[:, :-1][free])


def test_a_seed_is_a_set_of_motions(digits):
    a, b = (sample_motions(30, generator(3), digits.y) for _ in "ab")
    assert torch.equal(render(a, digits.x), render(b, digits.x))
    assert not torch.equal(render(a, digits.x), render(sample_motions(30, generator(4), digits.y), digits.x))
    assert torch.equal(render(a[10:12], digits.x), render(a, digits.x)[10:12])


def test_every_motion_is_equally_likely(digits):
    motions = sample_motions(8000, generator(), digits.y, speed=1)
    ways = (motions.velocity[:, 0] @ torch.tensor([3, 1]) + 4).bincount(minlength=9)
    assert ways[4] == 0 and (ways[[0, 1, 2, 3, 5, 6, 7, 8]] - 1000).abs().max() < 150
    assert motions.start[:, 0].amin(0).tolist() == [0, 0] and motions.start[:, 0].amax(0).tolist() == [36, 36]
    assert (motions.start[:, 0, 0].bincount() - 8000 / 37).abs().max() < 80
    assert torch.equal(motions.label[motions.present], digits.y[motions.index[motions.present]])
    assert 0.45 < motions.present[:, 1].float().mean() < 0.55


def test_frames_hold_the_digits_unchanged(digits):
    motions = sample_motions(20, generator(5), digits.y, digits=(2, 2), canvas=(50, 61))
    clips, place = render(motions, digits.x, 6), motions.positions(6)
    assert clips.shape == (20, 6, 1, 50, 61)
    for i in range(20):
        for f in range(6):
            expected = torch.full((50, 61), -1.0)
            for k in range(2):
                top, left = place[i, f, k].tolist()
                part = expected[top : top + 28, left : left + 28]
                part.copy_(torch.maximum(part, digits.x[motions.index[i, k], 0]))
            assert torch.equal(clips[i, f, 0], expected)


def test_small_digits_are_averaged(digits):
    motions = sample_motions(8, generator(6), digits.y, digits=(1, 1), canvas=(32, 32))
    clips, place = render(motions, digits.x, 3), motions.positions(3)
    for i in range(8):
        small = F.avg_pool2d(digits.x[motions.index[i, :1]], 2)
        assert torch.equal(motion.cut(clips[i, :, 0], place[i, :, 0], 14), small.expand(3, -1, -1, -1))
        assert float((clips[i] + 1).sum()) == pytest.approx(3 * float((small + 1).sum()), rel=1e-5)


@pytest.mark.parametrize(("canvas", "count"), [((64, 64), 1), ((64, 64), 2), ((32, 32), 1), ((32, 32), 2)])
def test_known_digits_are_found(canvas, count, digits):
    motions = sample_motions(15, generator(7), digits.y, digits=(count, count), canvas=canvas)
    clips = render(motions, digits.x, 4)
    noise = 0.1 * torch.randn(clips.shape, generator=generator())
    sprites, right = moving_mnist.sprites_of(motions, digits.x), []
    for k in range(count):
        frames = (clips + noise)[:, :, 0].flatten(0, 1)
        found = motion.locate(frames, sprites[:, k].repeat_interleave(4, 0))
        right.append((found == motions.positions(4)[:, :, k].flatten(0, 1)).all(1))
    assert torch.cat(right).float().mean() >= 0.98


def test_unknown_single_digits_are_read(digits):
    motions = sample_motions(150, generator(8), digits.y, digits=(1, 1))
    frames = render(motions, digits.x, 2)[:, :, 0].flatten(0, 1)
    place = motion.locate_ink(frames)
    true = motions.positions(2)[:, :, 0].flatten(0, 1)
    assert (place == true).all(1).float().mean() >= 0.98
    oracle = zoo.load("oracle_mnist")
    labels = motions.label[:, :1].expand(-1, 2).flatten()
    assert (predict(oracle, motion.cut(frames, place)) == labels).float().mean() >= 0.98
    # Where single digits are is read exactly in any split.
    train = load("mnist10k", "train").x[:, 0]
    assert (motion.locate_ink(F.pad(train, (5, 8, 3, 9), value=-1.0)) == torch.tensor([3, 5])).all(
        1
    ).float().mean() > 0.99


def test_captions():
    motions = Motions(
        torch.tensor([[4, 9], [2, -1]]),
        torch.tensor([[3, 7], [0, -1]]),
        torch.zeros(2, 2, 2, dtype=torch.long),
        torch.tensor([[[2, 1], [0, -4]], [[-1, 0], [0, 0]]]),
        (64, 64),
        28,
    )
    assert moving_mnist.captions(motions) == ["3 moving down right and 7 moving left", "0 moving up"]


def test_as_a_data_set(monkeypatch):
    sets = {split: load("moving_mnist", split) for split in ("train", "validation", "test")}
    assert [len(s) for s in sets.values()] == [2000, 250, 500]
    used = {}
    for split, s in sets.items():
        digits = load("mnist10k", split)
        assert s.digits is digits and int(s.motions.index.max()) < len(digits)
        used[split] = set(digits.index[s.motions.index[s.motions.present]].tolist())
        assert torch.equal(s.motions.label[s.motions.present], digits.y[s.motions.index[s.motions.present]])
        assert "mnist10k" in s.source and s.licence == digits.licence
    assert not used["train"] & used["test"] and not used["train"] & used["validation"]
    assert not used["validation"] & used["test"] and len({s.checksum for s in sets.values()}) == 3
    test = sets["test"]
    assert test.clips(slice(0, 3)).shape == (3, 10, 1, 64, 64)
    assert torch.equal(test.clips(torch.tensor([2]), 4)[0], test.clips(slice(0, 3))[2, :4])
    small = load("moving_mnist", "test", size=32)
    assert small.clips(slice(0, 2)).shape == (2, 10, 1, 32, 32) and small.checksum != test.checksum

    def silent(*_):
        raise HubError("the hub is silent")

    monkeypatch.setattr("minilib.data.hub.table", silent)
    with pytest.raises(HubError, match="silent.*vendored"):
        load("moving_mnist", "validation", source="hub")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": (0, 1)}, "1 to 2"),
        ({"digits": (1, 3)}, "1 to 2"),
        ({"canvas": (14, 32)}, "room to move"),
        ({"speed": 0}, "at least 1 pixel"),
    ],
)
def test_bad_requests_are_named(options, message, digits):
    with pytest.raises(ValueError, match=message):
        sample_motions(2, generator(), digits.y, **options)


def test_bad_images_and_frames(digits):
    motions = sample_motions(5, generator(), digits.y)
    with pytest.raises(ValueError, match="only 1 are given"):
        render(motions, digits.x[:1])
    with pytest.raises(ValueError, match="at least one frame"):
        render(motions, digits.x, 0)
    with pytest.raises(ValueError, match="no images"):
        sample_motions(5, generator(), digits.y[:0])
    assert render(sample_motions(0, generator(), digits.y), digits.x, 2).shape == (0, 2, 1, 64, 64)
