"""Reading motion back from frames and sound, and how far it is from the truth. Places are (down, right) in pixels;
pixel i covers
[i, i + 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

from minilib.data.bounce.balls import CENTROIDS, FRAME_RATE, Balls, Hits
from minilib.data.shapes.render import BACKGROUND, PALETTE


def centroids(weights: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch 2"]:
    """Centre of mass of non-negative weights, in float64; NaN where there are none.

    >>> centroids(torch.ones(2, 4))
    tensor([1., 2.], dtype=torch.float64)
    """
    weights = weights.double()
    rows = torch.arange(weights.shape[-2], dtype=torch.float64) + 0.5
    columns = torch.arange(weights.shape[-1], dtype=torch.float64) + 0.5
    moments = torch.stack([weights.sum(-1) @ rows, weights.sum(-2) @ columns], dim=-1)
    return moments / weights.sum((-1, -2))[..., None]


def ball_weights(clips: Float[Tensor, "n f 3 h w"], balls: Balls) -> Float[Tensor, "n f k h w"]:
    """How much of each object's colour is in each pixel: the least-squares mixture of their colours and the background.

    Exact where objects do not overlap. Weights are cut to [0, 1]; empty slots have 0.
    """
    ground = torch.tensor(BACKGROUND)
    colours = torch.tensor((*PALETTE, BACKGROUND))[balls.colour] - ground  # (n, k, 3), 0 in empty slots
    mixture = torch.linalg.pinv(colours.mT.double(), rtol=1e-6).float()  # (n, k, 3)
    seen = (clips + 1) / 2 - ground[:, None, None]
    return torch.einsum("nkc,nfchw->nfkhw", mixture, seen).clamp(0.0, 1.0)


def read_positions(clips: Float[Tensor, "n f 3 h w"], balls: Balls) -> Float[Tensor, "n f k 2"]:
    """Places of the objects' origins in reference pixels, by centre of mass; NaN for what is not there.

    Only shapes, sizes, colours and the box of ``balls`` are used. Where objects hide each other, the hidden part is missing.
    Greatest error at 16 pixels: circle 0.03, cross 0.06, square 0.07, triangle 0.18; at 32 pixels a third of it or less.
    """
    if len(clips) != len(balls):
        raise ValueError(f"need the looks of every clip; got {len(clips)} clips and {len(balls)} looks")
    place = centroids(ball_weights(clips, balls)) * (balls.box[0] / clips.shape[-2])
    below = torch.tensor(CENTROIDS, dtype=torch.float64)[balls.shape.clamp(min=0)] * balls.radius
    place[..., 0] -= below[:, None]
    return place.masked_fill(~balls.present[:, None, :, None], torch.nan)


def read_hits(
    places: Float[Tensor, "n f k 2"],
    *,
    gravity: Float[Tensor, " n"] | None = None,
    frame_rate: float = FRAME_RATE,
    least: float = 0.25,
) -> Hits:
    """Wall hits from places alone: where the velocity jumps.

    A jump by J between two frames, a share s of the way, shows in the second difference of the places as J (1 - s) at
    the frame before and J s at the frame after: their centre is its time. In the first and last interval of a clip
    one of the two is missing, and the time is the frame that is left.

    Args:
        places: of the objects in each frame.
        gravity: downward acceleration of each clip, in places a second squared; its share is taken out first.
        frame_rate: frames a second.
        least: smaller second differences are not jumps, in the unit of the places.
    """
    second = places.diff(dim=1).diff(dim=1)  # entry j is about frame j + 1
    if gravity is not None:
        second = second - torch.stack([gravity, torch.zeros_like(gravity)], -1)[:, None, None] / frame_rate**2
    second = second.nan_to_num(nan=0.0)
    strong = torch.where(second.abs() > least, second, 0.0)
    after = F.pad(strong, (0, 0, 0, 0, 0, 1))[:, 1:]
    before = F.pad(strong, (0, 0, 0, 0, 1, 0))[:, :-1]
    pair = after * (strong * after > 0)
    begins = (strong != 0) & (strong * before <= 0)
    clip, frame, ball, axis = begins.nonzero(as_tuple=True)
    here, next_ = strong[clip, frame, ball, axis], pair[clip, frame, ball, axis]
    time = (frame + 1 + next_ / (here + next_)) / frame_rate
    wall = 2 * axis + (here < 0).long()  # the near wall pushes down or right
    order = time.argsort(stable=True)
    order = order[clip[order].argsort(stable=True)]
    clip, frame, ball, wall, time = (v[order] for v in (clip, frame, ball, wall, time))
    return Hits(clip, ball, wall, time, places[clip, frame + 1, ball])


def locate(
    frames: Float[Tensor, "m h w"], template: Float[Tensor, "m s s"], batch: int = 32
) -> Int[Tensor, "m 2"]:
    """Where a known picture is, to the pixel: the place at which the frame is least darker than the picture anywhere.

    Overlap by maximum can only brighten, so at the true place nothing is missing. Among equals the most correlated
    place is taken.

    Args:
        frames: in [-1, 1].
        template: what to look for, one a frame, in [-1, 1].
        batch: frames at a time.
    """
    side, out = template.shape[-1], []
    for frame, picture in zip(frames.split(batch), template.split(batch), strict=True):
        windows = F.unfold((frame[:, None] + 1) / 2, side)  # (m, s s, places)
        wanted = ((picture + 1) / 2).flatten(1)[..., None]
        missing = (wanted - windows).clamp(min=0.0).square().sum(1)
        out.append((missing - 1e-4 * (wanted * windows).sum(1)).argmin(1))
    best = torch.cat(out)
    columns = frames.shape[-1] - side + 1
    return torch.stack([best // columns, best % columns], dim=1)


def locate_ink(frames: Float[Tensor, "m h w"], side: int = 28) -> Int[Tensor, "m 2"]:
    """Where a single unknown digit of MNIST is, to the pixel, by its centre of mass.

    MNIST's pictures are cut so that the centre of mass is less than a pixel below and to the right of their middle.
    """
    place = centroids((frames + 1) / 2) - side / 2
    limit = torch.tensor(frames.shape[1:]) - side
    return torch.minimum(place.nan_to_num(nan=0.0).floor().long().clamp(min=0), limit)


def cut(
    frames: Float[Tensor, "m h w"], place: Int[Tensor, "m 2"], side: int = 28
) -> Float[Tensor, "m 1 s s"]:
    """The squares whose top left corners are at the given places."""
    rows = place[:, 0, None] + torch.arange(side)
    columns = place[:, 1, None] + torch.arange(side)
    return frames[torch.arange(len(frames))[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def trajectory_rmse(read: Num[Tensor, "n f k 2"], true: Num[Tensor, "n f k 2"]) -> Float[Tensor, " n"]:
    """Root mean squared distance between two sets of paths, a clip; slots where either is NaN do not count."""
    squared = (read - true).double().square().sum(-1)
    return squared.flatten(1).nanmean(1).sqrt()


def read_onsets(
    sound: Float[Tensor, " samples"], sample_rate: int, least: float = 0.05, rise: float = 2.0
) -> Float[Tensor, " m"]:
    """When sounds begin, in seconds, to 4 ms; of sounds that begin within the decay of a louder one, only the first is heard.

    Args:
        sound: mono.
        sample_rate: samples a second.
        least: an onset's piece of 4 ms has a peak above this,
        rise: and above this many times the peak of the piece before.
    """
    size = max(1, round(0.004 * sample_rate))
    peaks = F.pad(sound.abs(), (0, -len(sound) % size)).unflatten(0, (-1, size)).amax(1)
    before = F.pad(peaks, (1, 0))[:-1]
    loud = (peaks > least) & (peaks > rise * before)
    loud &= ~F.pad(loud, (1, 0))[:-1]  # an onset late in its piece rises through two pieces
    return loud.nonzero()[:, 0] * size / sample_rate


def onset_f1(
    found: Sequence[float] | Float[Tensor, " a"],
    true: Sequence[float] | Float[Tensor, " b"],
    tolerance: float = 1 / FRAME_RATE,
) -> float:
    """F1 score of onsets: matches are one to one and at most ``tolerance`` seconds apart. 1 if there are none on either side.

    >>> onset_f1([0.1, 0.52], [0.12, 0.3, 0.5], tolerance=0.05)
    0.8
    """
    a, b = (sorted(float(v) for v in times) for times in (found, true))
    i = j = hits = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= tolerance + 1e-9:
            i, j, hits = i + 1, j + 1, hits + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return 2 * hits / (len(a) + len(b)) if a or b else 1.0
