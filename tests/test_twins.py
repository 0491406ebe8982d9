"""Twins: the reader against the generator, chance, what is not valid, borders by hand, bad input."""

import math

import pytest
import torch

from minilib.data.shapes import render, sample_scenes
from minilib.metrics.twins import CORNERS, EMPTY, border_excess, corner_colours, twin_consistency

PLACES = {0: 0, 2: 1, 6: 2, 8: 3}  # cell of the 3 x 3 grid -> corner


def twins(n=600, side=12, seed=0):
    scenes = sample_scenes(n, torch.Generator().manual_seed(seed), mode="twins")
    return scenes, render(scenes, side)


@pytest.mark.parametrize("side", [12, 15, 33])
def test_the_reader_finds_what_was_drawn(side):
    scenes, x = twins(side=side)
    wanted = torch.full((len(x), len(CORNERS)), EMPTY)
    for i in range(len(x)):
        for slot in range(2):
            wanted[i, PLACES[int(scenes.cell[i, slot])]] = scenes.colour[i, slot]
    right = (corner_colours(x) == wanted).all(1).double().mean()
    assert right >= 0.99
    assert twin_consistency(x)[0] >= 0.99 and twin_consistency(x)[1] >= 0.99


def test_it_stands_some_noise():
    scenes, x = twins()
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert min(twin_consistency(noisy)) >= 0.97


def test_strangers_agree_by_chance():
    _, x = twins(4000)
    other = x.roll(1, 0)
    halves = x.clone()
    halves[..., :6] = other[..., :6]
    found = twin_consistency(halves)
    assert 0.4 < found.valid < 0.6, "the other picture has its object in the fitting corner half of the time"
    assert abs(found.same - 1 / 6) < 4 * math.sqrt(5 / 36 / (4000 * found.valid))


def test_what_is_not_a_pair_of_opposite_corners_is_not_valid():
    _, x = twins(50)
    empty = torch.full_like(x, -0.8)
    assert twin_consistency(empty).valid == 0 and math.isnan(twin_consistency(empty).same)
    one = x.clone()
    one[..., :6, :] = -0.8
    assert twin_consistency(one).valid == 0
    four = torch.where(x > x.flip(-1), x, x.flip(-1))
    assert twin_consistency(four).valid == 0
    beside = one + (one.flip(-1) + 0.8)  # two corners of one side
    assert twin_consistency(beside.clamp(-1, 1)).valid == 0


def test_borders_by_hand():
    x = torch.zeros(2, 1, 6, 6)
    x[..., 2:4] = 1.0  # two borders of windows of two columns
    x = x + 0.1 * torch.arange(6.0).view(6, 1)  # the same step everywhere along rows
    across = (2 * 1.0 + 2 * 0.01) / 4
    inside = (3 * 0.0 + 3 * 0.01) / 6
    assert border_excess(x, 2) == pytest.approx(across / inside, rel=1e-4)
    smooth = torch.arange(36.0).view(1, 1, 6, 6) * torch.ones(1, 3, 1, 1)
    assert border_excess(smooth, 3) == pytest.approx(1.0)
    assert border_excess(x.repeat_interleave(2, -1).repeat_interleave(2, -2), 2, pixels=2) > 10


def test_bad_input():
    for shape in ((1, 3, 12, 15), (1, 3, 10, 10)):
        with pytest.raises(ValueError, match="that 3 divides"):
            corner_colours(torch.zeros(shape))
    with pytest.raises(ValueError, match="no pictures"):
        twin_consistency(torch.zeros(0, 3, 12, 12))
    for window in (1, 12):
        with pytest.raises(ValueError, match="no border"):
            border_excess(torch.zeros(1, 1, 12, 12), window)
