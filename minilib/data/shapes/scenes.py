"""What is in a picture: one to three objects with shape, colour, size and place. Deterministic in a seed, split by caption.

A scene is a set of objects on a 3 x 3 grid of cells. No two objects are in neighbouring cells (sharing a side), so there is a gap
between any two. Lengths are in *reference pixels*: a sixteenth of the smaller side of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
STRIPES = ("plain", "horizontal", "vertical", "rising", "falling")
CELLS = len(ROWS) * len(COLUMNS)
MAX_OBJECTS = 3
JITTER = 0.2
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Scenes:
    """``n`` scenes as a structure of arrays. Every field has shape (n, k), ``offset`` (n, k, 2); -1 marks an empty slot.

    ``cell`` counts in raster order from the top left. ``offset`` is (down, right) from the cell's centre in reference pixels.
    ``stripe`` is an index of ``STRIPES`` and ``phase`` (radians) shifts the stripes. The order of the slots is the order in
    which a caption names the objects.
    """

    shape: Int[Tensor, "n k"]
    colour: Int[Tensor, "n k"]
    size: Int[Tensor, "n k"]
    cell: Int[Tensor, "n k"]
    offset: Float[Tensor, "n k 2"]
    stripe: Int[Tensor, "n k"]
    phase: Float[Tensor, "n k"]

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        """The scenes at a slice, an index tensor or a boolean mask."""
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def present(self) -> Bool[Tensor, "n k"]:
        """Which slots hold an object."""
        return self.cell >= 0

    @property
    def count(self) -> Int[Tensor, " n"]:
        """Objects in each scene."""
        return self.present.sum(1)

    def grid(self) -> Int[Tensor, "n 9 4"]:
        """The same scenes by place: for each cell (shape, colour, size, stripe), or -1 where it is empty.

        It does not depend on the order of the slots, so equal grids are equal scenes.
        """
        grid = torch.full((len(self), CELLS + 1, 4), -1, dtype=torch.long)
        values = torch.stack([self.shape, self.colour, self.size, self.stripe], dim=-1)
        place = torch.where(
            self.present, self.cell, CELLS
        )  # empty slots write into a tenth cell, which is cut off
        grid.scatter_(1, place[..., None].expand_as(values), values)
        return grid[:, :CELLS]


def concatenate(parts: list[Scenes]) -> Scenes:
    """Several sets of scenes, one after the other."""
    return Scenes(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scenes)})


def sample_scenes(
    n: int,
    generator: torch.Generator,
    *,
    objects: tuple[int, int] = (1, 2),
    split: str | None = None,
    mode: str = "plain",
    texture: bool = False,
    jitter: float = JITTER,
) -> Scenes:
    """Draw ``n`` random scenes.

    Args:
        n: how many.
        generator: the only source of chance.
        objects: least and most objects in a scene; the numbers in between are equally likely.
        split: only scenes of ``"train"``, ``"validation"`` or ``"test"`` (see :func:`split_of`); None for all.
        mode: ``"plain"``, or ``"twins"``: two objects in opposite corners that are equal in shape, colour and size, so that
            only a model that mixes over the whole picture can draw them. ``objects`` is then ignored.
        texture: give every object fine stripes of a random direction and phase.
        jitter: greatest shift of an object from its cell's centre on each axis, in reference pixels.

    Raises:
        ValueError: a count outside 1 to 3, an unknown split or mode, a jitter outside [0, 0.5].

    >>> scenes = sample_scenes(4, torch.Generator().manual_seed(0))
    >>> scenes.count.tolist()
    [1, 2, 2, 1]
    """
    low, high = (2, 2) if mode == "twins" else objects
    if not 1 <= low <= high <= MAX_OBJECTS:
        raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects; got objects={objects}")
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}, or None")
    if mode not in ("plain", "twins"):
        raise ValueError(f"unknown mode {mode!r}; expected 'plain' or 'twins'")
    if not 0.0 <= jitter <= 0.5:
        raise ValueError(f"jitter is in [0, 0.5] reference pixels, or objects touch; got {jitter}")
    parts, found = [], 0
    while found < n or not parts:
        # A twentieth of all scenes belong to a held-out split: draw enough to find what is missing in a few rounds.
        want = n - found if split in (None, "train") else 24 * (n - found)
        scenes = _draw(max(want, 16), generator, low, high, mode, texture, jitter)
        if split is not None:
            scenes = scenes[split_of(scenes) == SPLITS.index(split)]
        parts.append(scenes[: n - found])
        found += len(parts[-1])
    return concatenate(parts)


def swap_pairs(
    n: int,
    generator: torch.Generator,
    *,
    attribute: str = "colour",
    split: str | None = None,
    texture: bool = False,
) -> tuple[Scenes, Scenes]:
    """Pairs of two-object scenes that differ only in who has which value of one attribute.

    Args:
        n: how many pairs.
        generator: the only source of chance.
        attribute: ``"colour"``, ``"shape"`` or ``"size"``; the two objects differ in it.
        split: the split that both scenes of each pair belong to; None for any.
        texture: as in :func:`sample_scenes`.

    Raises:
        ValueError: another attribute.
    """
    if attribute not in ("colour", "shape", "size"):
        raise ValueError(f"unknown attribute {attribute!r}; expected 'colour', 'shape' or 'size'")
    parts, found = [], 0
    while found < n or not parts:
        # Of two held-out scenes the partner is held out too in one case of twenty.
        want = (2 if split in (None, "train") else 24) * (n - found) + 16
        first = sample_scenes(want, generator, objects=(2, 2), split=split, texture=texture)
        values = getattr(first, attribute)
        keep = values[:, 0] != values[:, 1]
        if split is not None:
            keep &= split_of(_exchanged(first, attribute)) == SPLITS.index(split)
        parts.append(first[keep][: n - found])
        found += len(parts[-1])
    pairs = concatenate(parts)
    return pairs, _exchanged(pairs, attribute)


def _exchanged(scenes: Scenes, attribute: str) -> Scenes:
    """The same scenes, the first two objects' values of an attribute exchanged."""
    return replace(scenes, **{attribute: getattr(scenes, attribute)[:, [1, 0, 2]]})


def split_of(scenes: Scenes) -> Int[Tensor, " n"]:
    """The split each scene belongs to, as an index of ``SPLITS``: one caption in twenty is test, one in twenty validation.

    It is a hash of the set of objects: of what and where they are, not of the order of the caption, of jitter or stripes. So
    no caption is on two sides, and the split of a scene can never change.
    """
    code = torch.zeros(len(scenes), dtype=torch.long)
    for cell in range(CELLS):
        shape, colour, size, _ = scenes.grid()[:, cell].unbind(1)
        digit = torch.where(shape < 0, 0, 1 + (shape * len(COLOURS) + colour) * len(SIZES) + size)
        code = code * (1 + len(SHAPES) * len(COLOURS) * len(SIZES)) + digit
    bucket = _mix(code) % 20
    return torch.where(bucket == 0, 2, torch.where(bucket == 1, 1, 0))


@lru_cache
def placements(count: int) -> Int[Tensor, "m {count}"]:
    """All ways to put ``count`` objects into cells of which no two share a side (9, 24 and 22 for 1, 2 and 3)."""

    def apart(a: int, b: int) -> bool:
        return abs(a // 3 - b // 3) + abs(a % 3 - b % 3) > 1

    ways = [c for c in combinations(range(CELLS), count) if all(apart(a, b) for a, b in combinations(c, 2))]
    return torch.tensor(ways)


def _draw(
    n: int, generator: torch.Generator, low: int, high: int, mode: str, texture: bool, jitter: float
) -> Scenes:
    """``n`` scenes of any split."""

    def integers(top: int) -> Tensor:
        return torch.randint(top, (n, MAX_OBJECTS), generator=generator)

    count = torch.randint(low, high + 1, (n,), generator=generator)
    cell = torch.full((n, MAX_OBJECTS), -1)
    which = torch.rand(n, generator=generator)
    for k in range(low, high + 1):
        ways = placements(k) if mode == "plain" else torch.tensor([[0, 8], [2, 6]])
        cell[:, :k] = torch.where((count == k)[:, None], ways[(which * len(ways)).long()], cell[:, :k])
    # Shuffle the filled slots: empty ones sort last.
    key = torch.rand(n, MAX_OBJECTS, generator=generator) + 2.0 * (cell < 0)
    cell = cell.gather(1, key.argsort(1))
    shape, colour, size = integers(len(SHAPES)), integers(len(COLOURS)), integers(len(SIZES))
    if mode == "twins":
        shape, colour, size = (v[:, :1].expand(-1, MAX_OBJECTS) for v in (shape, colour, size))
    offset = jitter * (2 * torch.rand(n, MAX_OBJECTS, 2, generator=generator) - 1)
    stripe = 1 + integers(len(STRIPES) - 1) if texture else torch.zeros_like(shape)
    phase = 2 * torch.pi * torch.rand(n, MAX_OBJECTS, generator=generator)
    empty = cell < 0
    shape, colour, size, stripe = (v.masked_fill(empty, -1) for v in (shape, colour, size, stripe))
    return Scenes(shape, colour, size, cell, offset, stripe, phase)


def _mix(code: Tensor) -> Tensor:
    """A fixed hash of non-negative integers to [0, 2^31) (two rounds of multiply and shift, in the manner of MurmurHash3)."""
    mask = 0xFFFFFFFF
    h = (code ^ (code >> 32)) & mask
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        h = ((h ^ (h >> shift)) * (factor >> 1)) & mask
    return (h ^ (h >> 16)) >> 1
