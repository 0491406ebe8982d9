"""`bounce`: the closed form against an event-driven simulation; frames and clicks read back the motion they show."""

import math

import pytest
import torch

from minilib.data import bounce, load, shapes
from minilib.data.bounce import Balls, frame_times, render, render_masks, sample_balls, wall_hits
from minilib.data.shapes.render import BACKGROUND, PALETTE
from minilib.metrics import motion

ALL_SHAPES = ("circle", "square", "triangle", "cross")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one(start, velocity, gravity=0.0, shape=0, size=0, box=(16.0, 16.0), colour=0):
    """A single object."""
    whole = [torch.tensor([[value]]) for value in (shape, colour, size)]
    exact = [torch.tensor([[value]], dtype=torch.float64) for value in (start, velocity)]
    return Balls(*whole, *exact, torch.tensor([gravity], dtype=torch.float64), box)


def simulate(x, v, g, near, far, until, floor_is_far=True):
    """One axis, from event to event: the next wall by the roots of the parabola. Returns the places at `until` and the hits."""
    now, hits, out = 0.0, [], []
    for stop in until:
        while True:
            # Times at which x + v s + g s^2 / 2 meets a wall, later than now.
            times = []
            for wall, inward in ((near, 1), (far, -1)):
                a, b, c = g / 2, v, x - wall
                roots = []
                if abs(a) < 1e-15:
                    roots = [-c / b] if b else []
                elif b * b >= 4 * a * c:
                    root = math.sqrt(b * b - 4 * a * c)
                    roots = [(-b - root) / (2 * a), (-b + root) / (2 * a)]
                # It hits a wall only when it moves towards it.
                times += [(s, wall, inward) for s in roots if s > 1e-10 and (v + g * s) * inward < 0]
            s, wall, inward = min(times, default=(math.inf, 0, 0))
            if now + s > stop:
                step = stop - now
                x, v, now = x + v * step + g * step * step / 2, v + g * step, stop
                break
            now, x, v = now + s, wall, -(v + g * s)
            hits.append((now, inward))
        out.append((x, v))
    return out, hits


@pytest.mark.parametrize("gravity", [None, (40.0, 80.0), (3.0, 10.0)])
@pytest.mark.parametrize("box", [(16.0, 16.0), (16.0, 25.0), (21.0, 16.0)])
def test_paths_and_hits_agree_with_a_simulation(gravity, box):
    balls = sample_balls(12, generator(1), balls=(1, 3), box=box, gravity=gravity, shapes=ALL_SHAPES)
    times = torch.linspace(0, 3.0, 23, dtype=torch.float64)
    place, velocity = balls.at(times)
    hits = wall_hits(balls, 3.0)
    assert len(hits) > 50
    for i, k in balls.present.nonzero().tolist():
        for axis in (0, 1):
            near, far = balls.limits[i, k, axis].tolist()
            g = float(balls.gravity[i]) if axis == 0 else 0.0
            x, v = float(balls.start[i, k, axis]), float(balls.velocity[i, k, axis])
            expected, struck = simulate(x, v, g, near, far, times.tolist())
            expected = torch.tensor(expected, dtype=torch.float64)
            assert (place[i, :, k, axis] - expected[:, 0]).abs().max() < 1e-8
            assert (velocity[i, :, k, axis] - expected[:, 1]).abs().max() < 1e-7
            mine = (hits.clip == i) & (hits.ball == k) & (hits.wall // 2 == axis)
            assert len(hits.time[mine]) == len(struck)
            for time, wall, (when, inward) in zip(hits.time[mine], hits.wall[mine], struck, strict=True):
                assert abs(float(time) - when) < 1e-8 and int(wall) % 2 == (inward < 0)


@pytest.mark.parametrize("gravity", [None, (40.0, 80.0)])
def test_energy_is_conserved_and_walls_reflect(gravity):
    balls = sample_balls(200, generator(2), gravity=gravity, shapes=ALL_SHAPES)
    energy = balls.energy(torch.linspace(0, 60.0, 400, dtype=torch.float64))[..., 0]
    assert (energy / energy[:, :1] - 1).abs().max() < 1e-12  # after a hundred bounces and more
    hits = wall_hits(balls, 2.0)
    for m in range(0, len(hits), 7):
        ball = balls[hits.clip[m : m + 1]]
        t, axis = hits.time[m], int(hits.wall[m]) // 2
        if len(wall_hits(ball, float(t) + 1e-4)) != len(wall_hits(ball, float(t) - 1e-4)) + 1:
            continue  # two walls at almost the same time
        place, velocity = ball.at(torch.stack([t - 1e-7, t, t + 1e-7]))
        before, after = velocity[0, 0, 0], velocity[0, 2, 0]
        assert abs(float(before[axis] + after[axis])) < 1e-4  # the normal component turns round
        assert abs(float(before[1 - axis] - after[1 - axis])) < 1e-4  # the other goes on
        assert float(before[axis]) * (1 if int(hits.wall[m]) % 2 else -1) > 0
        wall = ball.limits[0, 0, axis, int(hits.wall[m]) % 2]
        assert float(hits.position[m, axis]) == float(wall)
        assert (hits.position[m] - place[0, 1, 0]).abs().max() < 1e-6


def test_simple_motions_by_hand():
    r = 2.1
    ball = one((8.0, 5.0), (0.0, 10.0))  # to the right wall: 16 - 2.1 - 5 = 8.9 away
    place, velocity = ball.at(torch.tensor([0.89, 1.0, 0.89 + 1.18 + 0.1], dtype=torch.float64))
    assert torch.allclose(place[0, :, 0, 1], torch.tensor([16 - r, 16 - r - 1.1, r + 1.0]).double())
    assert velocity[0, 1:, 0].tolist() == [[0.0, -10.0], [0.0, 10.0]]
    hits = wall_hits(ball, 2.5)
    assert torch.allclose(hits.time, torch.tensor([0.89, 2.07]).double()) and hits.wall.tolist() == [3, 2]
    # Dropped from rest: free fall, then up to the same height after twice the time.
    drop = one((4.0, 8.0), (0.0, 0.0), gravity=50.0)
    fall = math.sqrt(2 * (16 - r - 4.0) / 50)
    assert torch.allclose(wall_hits(drop, 3.1 * fall).time, torch.tensor([fall, 3 * fall]).double())
    place, velocity = drop.at(torch.tensor([fall / 2, 2 * fall], dtype=torch.float64))
    assert float(place[0, 0, 0, 0]) == pytest.approx(4 + 50 * (fall / 2) ** 2 / 2)
    assert float(place[0, 1, 0, 0]) == pytest.approx(4.0) and abs(float(velocity[0, 1, 0, 0])) < 1e-6


def test_what_never_moves_and_what_starts_at_a_wall():
    times = torch.tensor([0.0, 0.3, 7.0]).double()
    for ball in (one((8.0, 8.0), (0.0, 0.0)), one((16 - 2.1, 8.0), (0.0, 0.0), gravity=50.0)):
        place, velocity = ball.at(times)
        assert torch.allclose(place, ball.start[:, None].expand_as(place)) and velocity.abs().max() < 1e-6
        assert len(wall_hits(ball, 10.0)) == 0 and "standing still" in bounce.captions(ball)[0]
    leaving = one((2.1, 8.0), (10.0, 0.0))
    assert torch.allclose(wall_hits(leaving, 1.2).time, torch.tensor([1.18]).double())
    entering = one((2.1, 8.0), (-10.0, 0.0))  # turned round at once; time 0 is no hit
    assert float(entering.at(times[1:2])[0][0, 0, 0, 0]) == pytest.approx(5.1)
    assert torch.allclose(wall_hits(entering, 1.2).time, torch.tensor([1.18]).double())


def test_a_seed_is_a_set_of_scenes():
    options = dict(balls=(1, 3), gravity=(40.0, 80.0), shapes=ALL_SHAPES)
    a, b = (sample_balls(20, generator(3), **options) for _ in "ab")
    assert torch.equal(render(a), render(b)) and bounce.captions(a) == bounce.captions(b)
    assert not torch.equal(render(a), render(sample_balls(20, generator(4), **options)))
    assert set(a.present.sum(1).tolist()) == {1, 2, 3}
    for row, there in zip(a.colour.tolist(), a.present.tolist(), strict=True):
        used = [c for c, p in zip(row, there, strict=True) if p]
        assert len(set(used)) == len(used)


def test_drawn_numbers_are_in_their_ranges():
    balls = sample_balls(4000, generator(), speed=(10.0, 20.0), gravity=(5.0, 9.0), shapes=ALL_SHAPES)
    ball = balls.velocity[:, 0].norm(dim=-1)
    assert 10 <= ball.min() < 10.1 and 19.9 < ball.max() <= 20
    assert 5 <= balls.gravity.min() < 5.1 and 8.9 < balls.gravity.max() <= 9
    angle = torch.atan2(*balls.velocity[:, 0].unbind(-1))
    assert torch.histc(angle, 8, -math.pi, math.pi).sub(500).abs().max() < 100
    near, far = balls.limits[:, 0].unbind(-1)
    share = (balls.start[:, 0] - near) / (far - near)
    assert share.min() >= 0 and 0.49 < share[:, 0].max() <= 0.5 and 0.99 < share[:, 1].max() <= 1
    for values, answers in ((balls.shape, 4), (balls.size, 2), (balls.colour, 6)):
        assert (torch.bincount(values[:, 0], minlength=answers) / 4000 - 1 / answers).abs().max() < 0.04


@pytest.mark.parametrize(("box", "height"), [((16.0, 16.0), 16), ((16.0, 16.0), 33), ((16.0, 20.0), 20)])
def test_a_frame_is_the_picture_of_its_scene(box, height):
    balls = sample_balls(30, generator(5), box=box, shapes=ALL_SHAPES)
    clips = render(balls, 5, height)
    assert clips.shape == (30, 5, 3, *bounce.canvas(balls, height)) and clips.abs().max() <= 1
    scenes = bounce.scenes_at(balls, frame_times(5))
    still = shapes.render(scenes, *clips.shape[-2:])
    assert (clips.flatten(0, 1) - still).abs().max() < 1e-5
    first = shapes.captions(scenes)[::5]
    moving = bounce.captions(balls)
    assert all(b.startswith(a + " moving ") for a, b in zip(first, moving, strict=True))


def test_objects_touch_the_walls_and_never_leave():
    """The whole object is on the canvas at all times, and at a hit its ink reaches the rim."""
    balls = sample_balls(30, generator(6), shapes=ALL_SHAPES)
    mass = render_masks(balls, 25, 64)[:, :, 0].sum((-1, -2))
    assert (mass / mass.median(1, keepdim=True).values - 1).abs().max() < 0.02
    hits = wall_hits(balls, 2.0)
    for m in range(0, len(hits), 5):
        ball = balls[hits.clip[m : m + 1]]
        there = ball.at(hits.time[m : m + 1])
        frozen = Balls(
            ball.shape, ball.colour, ball.size, there[0][:, 0], 0 * there[1][:, 0], 0 * ball.gravity, ball.box
        )
        mask = render_masks(frozen, 1, 64)[0, 0, 0]
        rim = (mask[0], mask[-1], mask[:, 0], mask[:, -1])[int(hits.wall[m])]
        assert rim.max() > 0.4


def test_a_later_object_hides_an_earlier_one():
    single = one((8.0, 8.0), (0.0, 0.0), size=1)
    both = Balls(
        torch.tensor([[0, 1]]),
        torch.tensor([[0, 2]]),
        torch.tensor([[1, 0]]),
        torch.tensor([[[8.0, 8.0], [8.0, 9.0]]]).double(),
        torch.zeros(1, 2, 2).double(),
        torch.zeros(1).double(),
    )
    picture = render(both, 1, 64)[0, 0]
    assert torch.allclose(picture[:, 32, 36], 2 * torch.tensor(PALETTE[2]) - 1, atol=1e-6)
    assert torch.allclose(picture[:, 32, 24], 2 * torch.tensor(PALETTE[0]) - 1, atol=1e-6)
    assert torch.allclose(picture[:, 2, 2], 2 * torch.tensor(BACKGROUND) - 1, atol=1e-6)
    assert torch.equal(render_masks(both, 1, 64)[:, :, :1], render_masks(single, 1, 64))


@pytest.mark.parametrize("height", [16, 32, 40])
def test_centre_of_mass_reads_the_place(height):
    balls = sample_balls(200, generator(7), box=(16.0, 20.0), shapes=ALL_SHAPES)
    clips = render(balls, 8, height)
    read, true = motion.read_positions(clips, balls), balls.at(frame_times(8))[0]
    worst = (read - true)[:, :, 0].abs().amax((1, 2)) * (1 if height == 16 else 3)
    # In reference pixels: a triangle's tip is thinner than a pixel.
    assert (worst < torch.tensor([0.04, 0.09, 0.2, 0.08])[balls.shape[:, 0]]).all()
    assert motion.trajectory_rmse(read, true).max() < 0.1
    assert read[:, :, 1:].isnan().all()
    late = balls.at(frame_times(8) + 0.1)[0]
    assert (motion.trajectory_rmse(read, late) > 0.5).all()


def test_several_objects_are_read_where_they_do_not_overlap():
    balls = sample_balls(150, generator(8), balls=(2, 2))
    read, true = motion.read_positions(render(balls, 6, 32), balls), balls.at(frame_times(6))[0]
    apart = (true[:, :, 0] - true[:, :, 1]).norm(dim=-1) > balls.radius[:, None, :2].sum(-1) + 1.0
    assert apart.sum() > 400 and (read - true)[:, :, :2][apart].abs().max() < 0.08


@pytest.mark.parametrize("gravity", [None, (40.0, 80.0)])
@pytest.mark.parametrize("height", [16, 32])
def test_hits_are_read_from_the_pixels(gravity, height):
    balls = sample_balls(200, generator(9), gravity=gravity)
    read = motion.read_positions(render(balls, 12, height), balls)
    found = motion.read_hits(read, gravity=balls.gravity if gravity else None)
    true = wall_hits(balls, 1.1)
    scores = [motion.onset_f1(found.of(i), true.of(i)) for i in range(200)]
    assert sum(scores) / 200 >= 0.98
    # Well inside the clip and with a hard blow, the time is right to a hundredth of a second, and the wall is right.
    right = hard = 0
    for m in range(len(true)):
        i, t, axis = int(true.clip[m]), float(true.time[m]), int(true.wall[m]) // 2
        blow = balls.at(true.time[m : m + 1] + 1e-6)[1][i, 0, 0, axis].abs()
        if 0.1 <= t <= 1.0 and blow > 8:
            mine = (found.clip == i) & (found.wall == true.wall[m])
            hard += 1
            right += bool(((found.time[mine] - t).abs() < 0.012).any())
    assert hard > 100 and right / hard >= 0.98
    shuffled = [motion.onset_f1(found.of(i), true.of((i + 1) % 200)) for i in range(200)]
    assert sum(shuffled) / 200 < 0.8  # what chance gives


def test_a_click_is_its_formula():
    onset, rate = 0.10003, 8000
    sound = bounce.clicks(torch.tensor([onset], dtype=torch.float64), rate, 0.5, 880.0)
    since = torch.arange(4000).double() / rate - onset
    expected = 0.45 * torch.exp(-since / 0.015) * torch.sin(2 * math.pi * 880 * since)
    expected[(since < 0) | (since > 8 * 0.015)] = 0
    assert sound.shape == (4000,) and (sound - expected).abs().max() < 1e-6
    two = bounce.clicks(
        torch.tensor([onset, 0.2], dtype=torch.float64), rate, 0.5, torch.tensor([880.0, 990.0])
    )
    other = bounce.clicks(torch.tensor([0.2], dtype=torch.float64), rate, 0.5, 990.0)
    assert torch.allclose(two, sound + other, atol=1e-6)
    assert torch.equal(bounce.clicks(torch.zeros(0), rate, 0.1), torch.zeros(800))
    assert bounce.clicks(torch.tensor([0.3]), rate).shape == (round((0.3 + 0.12) * rate),)
    assert bounce.clicks(torch.tensor([0.3]), rate, 0.2).abs().max() == 0


def test_every_hit_is_heard():
    balls = sample_balls(150, generator(10), balls=(1, 2))
    sound, hits = bounce.soundtrack(balls, 1.2), wall_hits(balls, 1.2)
    for i in (0, 5, 77):
        mine = hits.clip == i
        pitch = torch.tensor(bounce.PITCHES)[hits.ball[mine]]
        assert torch.allclose(sound[i], bounce.clicks(hits.time[mine], 8000, 1.2, pitch), atol=1e-6)
    scores = []
    for i in range(150):
        apart = [
            t for j, t in enumerate(hits.of(i).tolist()) if j == 0 or t - float(hits.of(i)[j - 1]) > 0.04
        ]
        if len(apart) == len(hits.of(i)) and not any(t > 1.19 for t in apart):
            scores.append(motion.onset_f1(motion.read_onsets(sound[i], 8000), apart, 0.01))
    assert len(scores) > 80 and sum(scores) / len(scores) >= 0.98


def test_onset_f1_by_hand():
    assert motion.onset_f1([], []) == 1.0 and motion.onset_f1([0.1], []) == 0.0
    assert motion.onset_f1([0.1, 0.12], [0.11], 0.05) == pytest.approx(2 / 3)  # one to one
    assert motion.onset_f1([0.5, 0.1], [0.11, 0.52], 0.05) == 1.0
    assert motion.onset_f1([0.1], [0.2], 0.1) == 1.0 and motion.onset_f1([0.1], [0.21], 0.1) == 0.0


def test_directions_in_captions():
    ways = {
        (0.0, 5.0): "right",
        (5.0, 5.0): "down right",
        (5.0, 0.0): "down",
        (5.0, -5.0): "down left",
        (0.0, -5.0): "left",
        (-5.0, -5.0): "up left",
        (-5.0, 0.0): "up",
        (-5.0, 5.0): "up right",
    }
    for velocity, way in ways.items():
        assert bounce.captions(one((3.0, 8.0), velocity)) == [f"small red circle top centre moving {way}"]
    pair = sample_balls(1, generator(), balls=(2, 2))
    assert bounce.captions(pair)[0].count(" and ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balls": (0, 1)}, "1 to 3"),
        ({"balls": (2, 4)}, "1 to 3"),
        ({"box": (15.0, 20.0)}, "smaller side"),
        ({"speed": (5.0, 2.0)}, "speed"),
        ({"gravity": (-3.0, 2.0)}, "gravity"),
        ({"shapes": ("star",)}, "'star'"),
        ({"sizes": ()}, "got none"),
    ],
)
def test_bad_requests_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample_balls(2, generator(), **options)


def test_bad_canvases_times_and_sounds():
    balls = sample_balls(2, generator(), box=(16.0, 20.0))
    with pytest.raises(ValueError, match="width would be 22.5"):
        render(balls, 2, 18)
    with pytest.raises(ValueError, match="at least 12"):
        render(balls, 2, 8)
    with pytest.raises(ValueError, match="at least one frame"):
        render(balls, 0, 16)
    with pytest.raises(ValueError, match="at least 0 seconds"):
        wall_hits(balls, -1.0)
    with pytest.raises(ValueError, match="negative"):
        bounce.clicks(torch.tensor([-0.1]), 8000, 1.0)
    with pytest.raises(ValueError, match="5000 Hz"):
        bounce.clicks(torch.tensor([0.1]), 8000, 1.0, 5000.0)
    with pytest.raises(ValueError, match="2 clips and 1"):
        motion.read_positions(render(balls, 2, 16), balls[:1])


def test_none_and_some():
    none = sample_balls(0, generator())
    assert render(none).shape == (0, 6, 3, 16, 16) and bounce.captions(none) == []
    assert len(wall_hits(none, 1.0)) == 0 and bounce.soundtrack(none, 1.0).shape == (0, 8000)
    balls = sample_balls(10, generator(), balls=(1, 3))
    picked = torch.tensor([7, 2])
    assert torch.equal(render(balls[picked]), render(balls)[picked])


@pytest.mark.parametrize("name", ["bounce", "bounce-gravity"])
def test_as_a_data_set(name):
    test, validation = load(name, "test"), load(name, "validation", size=32)
    assert len(test) == 1000 and test.clips(slice(0, 3), 4).shape == (3, 4, 3, 16, 16)
    assert validation.clips(torch.tensor([1])).shape == (1, 6, 3, 32, 32)
    assert torch.equal(test.clips(slice(4, 6)), render(test.balls[4:6]))
    assert test.captions == tuple(bounce.captions(test.balls)) and "generated" in test.source
    assert test.checksum != validation.checksum and test.licence == "Apache-2.0"
    assert bool(test.balls.gravity.any()) == (name == "bounce-gravity")
    assert not set(test.balls.start[:, 0, 0].tolist()) & set(validation.balls.start[:, 0, 0].tolist())
    with pytest.raises(ValueError, match="size=24"):
        load(name, "test", size=24)
