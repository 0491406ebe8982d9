"""Objects that fly about in a box and bounce off its walls without loss, in closed form: no step, no integration error.

On each axis the motion between two walls is periodic: rise from the far wall (the floor) to the turning point, which
is the near wall or, under gravity, the top of the throw, and the same back. So a place at any time is one remainder
and one parabola, and the times of all hits are multiples of one number. Lengths are in *reference pixels*, a
sixteenth of the box's smaller side; times in seconds. Objects do not feel each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minilib.data.shapes import COLOURS, SHAPES, SIZES
from minilib.data.shapes.render import RADII

MAX_BALLS = 3
SIDE = 16.0
FRAME_RATE = 10.0
WALLS = ("top", "bottom", "left", "right")
#: How far each shape reaches from its origin, up, down, left and right, in radii; the order of ``SHAPES``.
EXTENTS = ((1.0, 1.0, 1.0, 1.0), (0.82, 0.82, 0.82, 0.82), (1.0, 0.8, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0))
#: How far below its origin each shape's centre of mass is, in radii.
CENTROIDS = (0.0, 0.0, 0.2, 0.0)


@dataclass(frozen=True)
class Balls:
    """``n`` scenes of up to three moving objects as a structure of arrays; -1 marks an empty slot.

    ``shape``, ``colour``, ``size`` as in :mod:`minilib.data.shapes`. ``start`` and ``velocity`` are (down, right) of
    the origin, at time 0, in reference pixels and reference pixels a second. ``gravity`` in reference pixels a second
    squared, downwards. ``box`` is (height, width) in reference pixels; the smaller is 16.
    """

    shape: Int[Tensor, "n k"]
    colour: Int[Tensor, "n k"]
    size: Int[Tensor, "n k"]
    start: Float[Tensor, "n k 2"]
    velocity: Float[Tensor, "n k 2"]
    gravity: Float[Tensor, " n"]
    box: tuple[float, float] = (SIDE, SIDE)

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Balls:
        """The scenes at a slice, an index tensor or a boolean mask."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Balls(**{k: v[index] if isinstance(v, Tensor) else v for k, v in values.items()})

    @property
    def present(self) -> Bool[Tensor, "n k"]:
        """Which slots hold an object."""
        return self.shape >= 0

    @property
    def radius(self) -> Float[Tensor, "n k"]:
        """Radius of each object; 1 in empty slots."""
        return torch.tensor((*RADII, 1.0), dtype=torch.float64)[self.size]

    @property
    def limits(self) -> Float[Tensor, "n k 2 2"]:
        """Least and greatest place of each origin: (down, right) by (near wall, far wall)."""
        reach = torch.tensor(EXTENTS, dtype=torch.float64)[self.shape.clamp(min=0)] * self.radius[..., None]
        reach = reach.unflatten(-1, (2, 2))  # axis by (near, far)
        far = torch.tensor(self.box, dtype=torch.float64) - reach[..., 1]
        return torch.stack([reach[..., 0], far], dim=-1)

    def at(self, times: Float[Tensor, " t"]) -> tuple[Float[Tensor, "n t k 2"], Float[Tensor, "n t k 2"]]:
        """Places and velocities of all objects at the given times (seconds, in float64; 0 and later)."""
        path = _paths(self)
        return path.at(times.double()[None, :, None, None], self.limits[:, None, ..., 1])

    def energy(self, times: Float[Tensor, " t"]) -> Float[Tensor, "n t k"]:
        """Energy a unit of mass: half the speed squared plus gravity times the height of the origin above the box's floor."""
        place, velocity = self.at(times)
        height = self.box[0] - place[..., 0]
        return velocity.square().sum(-1) / 2 + self.gravity[:, None, None] * height


@dataclass(frozen=True)
class Hits:
    """All wall hits, in order of clip and time. ``wall`` indexes ``WALLS``, ``time`` in seconds, ``position`` is the origin's."""

    clip: Int[Tensor, " m"]
    ball: Int[Tensor, " m"]
    wall: Int[Tensor, " m"]
    time: Float[Tensor, " m"]
    position: Float[Tensor, "m 2"]

    def __len__(self) -> int:
        return len(self.clip)

    def of(self, clip: int) -> Float[Tensor, " h"]:
        """The times of one clip's hits, in order."""
        return self.time[self.clip == clip]


def frame_times(frames: int, frame_rate: float = FRAME_RATE) -> Float[Tensor, " {frames}"]:
    """When the frames of a clip are: 0, 1 / rate, ... in seconds. Raises ValueError for no frame or no rate."""
    if frames < 1 or frame_rate <= 0:
        raise ValueError(f"a clip has at least one frame and a rate above 0; got {frames} and {frame_rate}")
    return torch.arange(frames, dtype=torch.float64) / frame_rate


def wall_hits(balls: Balls, duration: float) -> Hits:
    """Every hit with a wall after time 0, up to and including ``duration`` (seconds), with its exact time and place.

    A hit in a corner is two hits at one time. Raises ValueError for a negative duration.
    """
    if duration < 0:
        raise ValueError(f"a duration is at least 0 seconds; got {duration}")
    path, limits = _paths(balls), balls.limits
    turns = ((path.phase + duration) / path.rise).floor().masked_fill(path.still, 0.0)
    turns = turns * balls.present[..., None]
    most = int(turns.max()) if turns.numel() else 0
    number = torch.arange(1, most + 1, dtype=torch.float64)
    time = number * path.rise[..., None] - path.phase[..., None]  # (n, k, axis, turn)
    far = number % 2 == 0
    valid = (number <= turns[..., None]) & (time > 0) & (far | path.reaches[..., None])
    clip, ball, axis, turn = valid.nonzero(as_tuple=True)
    when = time[clip, ball, axis, turn]
    order = when.argsort(stable=True)
    order = order[clip[order].argsort(stable=True)]
    clip, ball, axis, turn, when = (v[order] for v in (clip, ball, axis, turn, when))
    place, _ = path.of(clip, ball).at(when[:, None], limits[clip, ball, :, 1])
    rows = torch.arange(len(clip))
    side = far.long()[turn]
    place[rows, axis] = limits[clip, ball, axis, side]
    return Hits(clip, ball, 2 * axis + side, when, place)


def sample_balls(
    n: int,
    generator: torch.Generator,
    *,
    balls: tuple[int, int] = (1, 1),
    box: tuple[float, float] = (SIDE, SIDE),
    speed: tuple[float, float] = (12.0, 28.0),
    gravity: tuple[float, float] | None = None,
    shapes: Sequence[str] = ("circle",),
    sizes: Sequence[str] = SIZES,
) -> Balls:
    """Draw ``n`` random scenes. Places, directions and speeds are uniform; the objects of a scene differ in colour.

    Args:
        n: how many.
        generator: the only source of chance.
        balls: least and most objects in a scene; the numbers in between are equally likely.
        box: (height, width) in reference pixels; the smaller is 16.
        speed: least and greatest speed at the start, in reference pixels a second; at 10 frames a second, a tenth of it a frame.
        gravity: least and greatest; None for none. With gravity, objects start in the upper half, so no bounce is tiny.
        shapes: names of ``SHAPES`` to draw from.
        sizes: names of ``SIZES`` to draw from.

    Raises:
        ValueError: a count outside 1 to 3, a box whose smaller side is not 16, a bad range, an unknown shape or size.

    >>> scene = sample_balls(1, torch.Generator().manual_seed(0))
    >>> scene.at(torch.tensor([0.0]))[0].equal(scene.start[:, None])
    True
    """
    _check(balls, box, speed, gravity)
    shape = _pick(n, generator, shapes, SHAPES)
    size = _pick(n, generator, sizes, SIZES)
    colour = torch.rand(n, len(COLOURS), generator=generator).argsort(1)[:, :MAX_BALLS]
    count = torch.randint(balls[0], balls[1] + 1, (n, 1), generator=generator)
    empty = torch.arange(MAX_BALLS) >= count

    def uniform(*dims: int) -> Tensor:
        return torch.rand(*dims, generator=generator, dtype=torch.float64)

    angle, fast = 2 * torch.pi * uniform(n, MAX_BALLS), uniform(n, MAX_BALLS)
    direction = torch.stack([angle.sin(), angle.cos()], dim=-1)
    velocity = (speed[0] + (speed[1] - speed[0]) * fast)[..., None] * direction
    low, high = gravity or (0.0, 0.0)
    pull = low + (high - low) * uniform(n)
    share = uniform(n, MAX_BALLS, 2)
    if gravity is not None:
        share = share * torch.tensor([0.5, 1.0], dtype=torch.float64)
    start = torch.zeros_like(share)
    drawn = Balls(shape, colour, size, start, velocity, pull, box)
    near, far = drawn.limits.unbind(-1)
    start = near + (far - near) * share
    shape, colour, size = (v.masked_fill(empty, -1) for v in (shape, colour, size))
    start, velocity = (v.masked_fill(empty[..., None], 0.0) for v in (start, velocity))
    return Balls(shape, colour, size, start, velocity, pull, box)


def _check(
    balls: tuple[int, int],
    box: tuple[float, float],
    speed: tuple[float, float],
    gravity: tuple[float, float] | None,
) -> None:
    if not 1 <= balls[0] <= balls[1] <= MAX_BALLS:
        raise ValueError(f"a scene has 1 to {MAX_BALLS} objects; got balls={balls}")
    if min(box) != SIDE:
        raise ValueError(f"the smaller side of a box is {SIDE:g} reference pixels; got box={box}")
    for name, given in (("speed", speed), ("gravity", gravity or (0.0, 0.0))):
        if not 0.0 <= given[0] <= given[1] < float("inf"):
            raise ValueError(f"{name} is (least, greatest), both finite and at least 0; got {given}")


def _pick(n: int, generator: torch.Generator, chosen: Sequence[str], known: Sequence[str]) -> Tensor:
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        given = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"expected some of {', '.join(known)}; got {given}")
    index = torch.tensor([known.index(name) for name in chosen])
    return index[torch.randint(len(index), (n, MAX_BALLS), generator=generator)]


@dataclass(frozen=True)
class _Paths:
    """The motion on each axis, as the height above the far wall; every field has the shape (..., 2).

    ``launch`` speed at the far wall, ``rise`` time from there to the turning point, ``phase`` the time since the far
    wall at time 0, ``pull`` acceleration towards the far wall, ``reaches`` whether the near wall is the turning
    point; ``still`` and ``rest`` for what never moves.
    """

    launch: Tensor
    rise: Tensor
    phase: Tensor
    pull: Tensor
    reaches: Tensor
    still: Tensor
    rest: Tensor

    def of(self, *index: Tensor) -> _Paths:
        """The paths of some objects."""
        return _Paths(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def at(self, time: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """Places and velocities (down, right) at times of 0 and later; ``far`` is the far wall's place of the origin."""
        launch, rise, phase, pull, still, rest = (
            value[:, None] if time.ndim == 4 else value
            for value in (self.launch, self.rise, self.phase, self.pull, self.still, self.rest)
        )
        since = (phase + time) % (2 * rise)
        rising = since < rise
        since = torch.where(rising, since, 2 * rise - since)
        height = torch.where(still, rest, launch * since - pull * since.square() / 2)
        speed = torch.where(still, 0.0, launch - pull * since)
        return far - height, torch.where(rising, -speed, speed)


def _paths(balls: Balls) -> _Paths:
    near, far = balls.limits.unbind(-1)
    width, height, up = far - near, far - balls.start, -balls.velocity
    pull = torch.zeros_like(height)
    pull[..., 0] = balls.gravity[:, None]
    launch = (up.square() + 2 * pull * height).sqrt()
    left = launch.square() - 2 * pull * width  # speed squared that would be left at the near wall
    reaches = left >= 0
    still = launch == 0
    # Times as distance over mean speed: no difference of large numbers, and no division by a gravity of 0.
    rise = torch.where(reaches, 2 * width / (launch + left.clamp(min=0).sqrt()), launch / pull)
    rise = torch.where(still, 1.0, rise)
    climb = torch.where(still, 0.0, 2 * height / (launch + up.abs()))
    phase = torch.where(up >= 0, climb, 2 * rise - climb)
    return _Paths(launch, rise, phase, pull, reaches, still, height)
