"""How much knowing one label says about another: mutual information, in bits, with its floor."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class MutualInformation(NamedTuple):
    """In bits. ``floor`` is what independence gives at this sample size, the mean over shuffles; ``corrected = raw - floor``."""

    raw: float
    floor: float
    corrected: float


def mutual_information(
    assignments: Int[Tensor, " n"],
    factor: Int[Tensor, " n"],
    num_shuffles: int = 20,
    generator: torch.Generator | None = None,
) -> MutualInformation:
    """Mutual information of two labels of the same n samples, corrected by shuffling.

    The plug-in estimate sum p(a, f) log2(p(a, f) / (p(a) p(f))) is biased upwards, more so for few samples
    and many values (Miller 1955). Shuffling one of the labels destroys the dependence and keeps the bias; its
    mean is subtracted. Samples that come in groups (the tokens of one image) share their labels, so shuffle
    such factors by group before, or the floor is too low.

    Args:
        assignments: one label a sample, from 0 (the expert, say).
        factor: the other label, from 0 (class, position, bin of time).
        num_shuffles: shuffles of ``factor``; 0 leaves the floor at zero.
        generator: source of the shuffles.

    Raises:
        ValueError: no samples, negative labels, or lengths that differ.

    >>> a = torch.tensor([0, 0, 1, 1])
    >>> mutual_information(a, a, num_shuffles=0).raw
    1.0
    """
    if len(assignments) != len(factor) or len(factor) == 0:
        raise ValueError(
            f"{len(assignments)} assignments and {len(factor)} factors: give one of each a sample, at least one"
        )
    if min(int(assignments.min()), int(factor.min())) < 0:
        raise ValueError("labels must be non-negative integers")
    if num_shuffles < 0:
        raise ValueError(f"num_shuffles must be 0 or more, got {num_shuffles}")
    raw = _plug_in(assignments, factor)
    shuffled = [
        _plug_in(assignments, factor[torch.randperm(len(factor), generator=generator)])
        for _ in range(num_shuffles)
    ]
    floor = sum(shuffled) / num_shuffles if num_shuffles else 0.0
    return MutualInformation(raw, floor, raw - floor)


def _plug_in(a: Tensor, f: Tensor) -> float:
    rows, columns = int(a.max()) + 1, int(f.max()) + 1
    joint = (a * columns + f).bincount(minlength=rows * columns).view(rows, columns).double() / len(a)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    seen = joint > 0
    return float((joint[seen] * (joint[seen] / independent[seen]).log2()).sum())
