"""``moving_mnist``: real digits of ``mnist10k`` that move over a canvas and bounce off its walls, with their exact paths.

Starts and velocities are whole pixels, so every place is one too: a digit is never resampled, and a frame holds its
pixels unchanged. Where digits overlap, the brighter pixel wins. The idea is of Srivastava, Mansimov and Salakhutdinov
(2015), "Unsupervised Learning of Video Representations using LSTMs"; there, speeds are real numbers and the places
are cut to whole pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minilib.data.images import ImageSet, tensor_checksum
from minilib.data.registry import SPLITS, load, register

SIDE = 28
MAX_DIGITS = 2
FRAMES = 10
COUNTS = {"train": 2_000, "validation": 250, "test": 500}
_VERTICAL = ("up", "", "down")
_HORIZONTAL = ("left", "", "right")


@dataclass(frozen=True)
class Motions:
    """``n`` clips of one or two moving digits as a structure of arrays. Places are (down, right) of a digit's top left corner.

    ``index`` is the digit's image in its split, ``label`` its class; -1 marks an empty slot. ``start`` in pixels,
    ``velocity`` in pixels a frame. ``canvas`` is (height, width) and ``side`` a digit's side, in pixels.
    """

    index: Int[Tensor, "n k"]
    label: Int[Tensor, "n k"]
    start: Int[Tensor, "n k 2"]
    velocity: Int[Tensor, "n k 2"]
    canvas: tuple[int, int]
    side: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice | Tensor) -> Motions:
        """The clips at a slice, an index tensor or a boolean mask."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Motions(**{k: v[index] if isinstance(v, Tensor) else v for k, v in values.items()})

    @property
    def present(self) -> Bool[Tensor, "n k"]:
        """Which slots hold a digit."""
        return self.index >= 0

    @property
    def room(self) -> Int[Tensor, "2"]:
        """Greatest place on each axis; the least is 0."""
        return torch.tensor(self.canvas) - self.side

    def positions(self, frames: int = FRAMES) -> Int[Tensor, "n {frames} k 2"]:
        """The place of each digit in each frame: the straight path, folded back at every wall."""
        path = self._unfolded(frames) % (2 * self.room)
        return self.room - (self.room - path).abs()

    def velocities(self, frames: int = FRAMES) -> Int[Tensor, "n {frames} k 2"]:
        """The velocity with which each digit leaves its place in each frame; at a wall, the reflected one."""
        path, v = self._unfolded(frames) % (2 * self.room), self.velocity[:, None]
        forth = torch.where(v > 0, path < self.room, (path > 0) & (path <= self.room))
        return torch.where(forth, v, -v)

    def bounces(self, frames: int = FRAMES) -> Int[Tensor, "n {frames}-1 k 2"]:
        """How often each digit touches a wall on each axis after a frame, up to and including the next frame."""
        path = self._unfolded(frames)
        up = torch.div(path, self.room, rounding_mode="floor").diff(dim=1)
        down = torch.div(-path, self.room, rounding_mode="floor").diff(dim=1)
        return torch.where(self.velocity[:, None] > 0, up, down)

    def _unfolded(self, frames: int) -> Int[Tensor, "n {frames} k 2"]:
        if frames < 1:
            raise ValueError(f"a clip has at least one frame; got {frames}")
        time = torch.arange(frames)[:, None, None]
        return self.start[:, None] + self.velocity[:, None] * time


def sample_motions(
    n: int,
    generator: torch.Generator,
    labels: Int[Tensor, " m"],
    *,
    digits: tuple[int, int] = (1, 2),
    canvas: tuple[int, int] = (64, 64),
    speed: int = 4,
) -> Motions:
    """Draw ``n`` random motions.

    Args:
        n: how many.
        generator: the only source of chance.
        labels: classes of the images that digits are taken from.
        digits: least and most digits in a clip; equally likely.
        canvas: height and width in pixels. Digits have 28 pixels a side if both are at least 48, else 14.
        speed: most pixels a frame on each axis; every velocity but standing still is equally likely.

    Raises:
        ValueError: not 1 to 2 digits, a canvas not larger than a digit, a speed below 1, no images.

    >>> sample_motions(2, torch.Generator().manual_seed(0), torch.tensor([3, 7]), digits=(1, 1)).label.tolist()
    [[7, -1], [7, -1]]
    """
    low, high = digits
    side = SIDE if min(canvas) >= 48 else SIDE // 2
    if not 1 <= low <= high <= MAX_DIGITS:
        raise ValueError(f"a clip has 1 to {MAX_DIGITS} digits; got digits={digits}")
    if min(canvas) <= side:
        raise ValueError(f"a digit of {side} pixels needs room to move; got a canvas of {canvas}")
    if speed < 1:
        raise ValueError(f"speed is at least 1 pixel a frame; got {speed}")
    if not len(labels):
        raise ValueError("no images to take digits from")
    count = torch.randint(low, high + 1, (n, 1), generator=generator)
    empty = torch.arange(MAX_DIGITS) >= count
    index = torch.randint(len(labels), (n, MAX_DIGITS), generator=generator)
    room = torch.tensor(canvas) - side
    start = (torch.rand(n, MAX_DIGITS, 2, generator=generator, dtype=torch.float64) * (room + 1)).long()
    # Number the velocities from the corner (-speed, -speed) and leave the middle one, standing still, out.
    ways = (2 * speed + 1) ** 2
    way = torch.randint(ways - 1, (n, MAX_DIGITS), generator=generator)
    way = way + (way >= ways // 2)
    velocity = torch.stack([way // (2 * speed + 1), way % (2 * speed + 1)], dim=-1) - speed
    return Motions(
        index=index.masked_fill(empty, -1),
        label=labels[index].masked_fill(empty, -1),
        start=start.masked_fill(empty[..., None], 0),
        velocity=velocity.masked_fill(empty[..., None], 0),
        canvas=canvas,
        side=side,
    )


def render(
    motions: Motions, digits: Float[Tensor, "m 1 28 28"], frames: int = FRAMES
) -> Float[Tensor, "n f 1 h w"]:
    """Clips in [-1, 1]; -1 is the background.

    Args:
        motions: what moves where.
        digits: the images that ``motions.index`` counts, in [-1, 1].
        frames: of each clip.

    Raises:
        ValueError: an index beyond the images, or fewer than one frame.
    """
    if len(motions) and int(motions.index.max()) >= len(digits):
        raise ValueError(f"motions name image {int(motions.index.max())}, only {len(digits)} are given")
    height, width = motions.canvas
    sprites = sprites_of(motions, digits)
    # One more row and column of background: every canvas pixel outside the digit looks there.
    sprites = F.pad(sprites, (0, 1, 0, 1), value=-1.0)
    place = motions.positions(frames)  # (n, f, k, 2)

    def source(size: int, first: Tensor) -> Tensor:
        at = torch.arange(size) - first[..., None]
        return torch.where((at >= 0) & (at < motions.side), at, motions.side)

    rows, columns = source(height, place[..., 0]), source(width, place[..., 1])
    which = torch.arange(len(motions))[:, None, None, None, None]
    slot = torch.arange(MAX_DIGITS)[:, None, None]
    return sprites[which, slot, rows[..., None], columns[..., None, :]].amax(2).unsqueeze(2)


def sprites_of(motions: Motions, digits: Float[Tensor, "m 1 28 28"]) -> Float[Tensor, "n k s s"]:
    """The picture of each moving digit, at the side it has on the canvas; background in empty slots."""
    pictures = digits[motions.index.clamp(min=0), 0]
    if motions.side != SIDE:
        pictures = F.avg_pool2d(pictures, SIDE // motions.side)
    return torch.where(motions.present[..., None, None], pictures, -1.0)


def captions(motions: Motions) -> list[str]:
    """What moves where at the beginning: ``3 moving down right and 7 moving left``."""
    sentences = []
    for labels, velocities in zip(motions.label.tolist(), motions.velocity.sign().tolist(), strict=True):
        parts = [
            f"{label} moving {_VERTICAL[down + 1]} {_HORIZONTAL[right + 1]}"
            for label, (down, right) in zip(labels, velocities, strict=True)
            if label >= 0
        ]
        sentences.append(" and ".join(" ".join(part.split()) for part in parts))
    return sentences


@dataclass(frozen=True)
class MovingSet:
    """A split of moving digits. The motions are in memory, the clips are drawn when asked for."""

    name: str
    split: str
    motions: Motions
    digits: ImageSet
    captions: tuple[str, ...]
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.motions)

    def clips(
        self, which: slice | Int[Tensor, " m"] = slice(None), frames: int = FRAMES
    ) -> Float[Tensor, "m f 1 h w"]:
        """The clips at a slice or index tensor, in [-1, 1]."""
        return render(self.motions[which], self.digits.x, frames)


def _loader(origin: str) -> Callable[[str, int | None], MovingSet]:
    @lru_cache(maxsize=6)
    def generated(split: str, size: int | None) -> MovingSet:
        digits = load("mnist10k", split, source=origin)
        generator = torch.Generator().manual_seed(3_000 + SPLITS.index(split))
        canvas = (size or 64, size or 64)
        motions = sample_motions(COUNTS[split], generator, digits.y, canvas=canvas)
        return MovingSet(
            name="moving_mnist",
            split=split,
            motions=motions,
            digits=digits,
            captions=tuple(captions(motions)),
            source=f"generated (minilib.data.moving_mnist) from mnist10k: {digits.source}",
            licence=digits.licence,
            checksum=tensor_checksum(digits.x, motions.index, motions.start, motions.velocity),
        )

    return generated


register("moving_mnist", _loader("vendored"), sizes=(64, 32), hub=_loader("hub"))
