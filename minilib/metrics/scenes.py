"""How much of a caption is in the picture: exact, and attribute by attribute."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minilib.data.shapes import Scenes


@runtime_checkable
class ReadsScenes(Protocol):
    """What a judge of scenes can do."""

    def read(self, x: Tensor) -> Tensor:
        """(shape, colour, size, stripe) of each cell."""


def read_in_batches(
    oracle: ReadsScenes, x: Float[Tensor, "n 3 h w"], batch: int = 256
) -> Int[Tensor, "n 9 4"]:
    """What the oracle reads, in the form of ``Scenes.grid()``."""
    return torch.cat([oracle.read(part) for part in x.split(batch)])


def scene_scores(
    read: Int[Tensor, "n 9 4"], scenes: Scenes, *, stripes: bool = False
) -> dict[str, Float[Tensor, " n"]]:
    """Scores of each picture, all in [0, 1]; NaN where a score does not apply. Take ``nanmean``.

    Args:
        read: what is in the pictures, by :func:`read_in_batches`.
        scenes: what should be in them.
        stripes: judge the direction of the stripes too.

    Returns:
        ``scene``: 1 if every cell is right, empty ones too. ``object``: share of objects that are right in every attribute.
        ``present``: share of objects with anything in their cell. ``shape``, ``colour``, ``size``: share of objects that are
        there with that attribute right. ``extra``: objects nobody asked for, a cell. ``colour_leak``, ``shape_leak``: among
        objects that differ in it from every other object of the scene, the share drawn with *another* object's value.
    """
    truth = scenes.grid()
    judged = 4 if stripes else 3
    asked, drawn = truth[..., 0] >= 0, read[..., 0] >= 0
    right = read[..., :judged] == truth[..., :judged]
    scores = {
        "scene": (right.all(-1) | (~asked & ~drawn)).all(1).float(),
        "object": _share(right.all(-1), asked),
        "present": _share(drawn, asked),
    }
    for index, name in enumerate(("shape", "colour", "size", "stripe")[:judged]):
        scores[name] = _share(drawn & right[..., index], asked)
    scores["extra"] = _share(drawn, ~asked)
    for index, name in enumerate(("shape_leak", "colour_leak")):
        scores[name] = _leak(read[..., index], truth[..., index])
    return scores


def mean_scores(scores: dict[str, Float[Tensor, " n"]]) -> dict[str, float]:
    """The mean of each score over the pictures it applies to (NaN if there is none)."""
    return {name: float(value.nanmean()) for name, value in scores.items()}


def _share(hit: Bool[Tensor, "n 9"], among: Bool[Tensor, "n 9"]) -> Float[Tensor, " n"]:
    """Share of ``among`` that is hit; NaN where ``among`` is empty."""
    return (hit & among).sum(1) / among.sum(1)


def _leak(read: Int[Tensor, "n 9"], truth: Int[Tensor, "n 9"]) -> Float[Tensor, " n"]:
    """Share of unique-valued objects that were read with the value of another object of the same scene."""
    there = truth >= 0
    same = (truth[:, :, None] == truth[:, None, :]) & there[:, :, None] & there[:, None, :]
    unique = there & (same.sum(2) == 1) & (there.sum(1, keepdim=True) > 1)
    others = (read[:, :, None] == truth[:, None, :]) & there[:, None, :]
    stolen = others.any(2) & (read != truth)
    return _share(stolen, unique)
