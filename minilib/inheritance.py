"""A student of another architecture starts from its teacher: take over what fits, and train only a part.

LiT (Wang et al. 2025, arXiv 2501.12976) loads all of the teacher but the attention; LinFusion (Liu et al. 2024, arXiv
2409.02097) and CLEAR (Liu et al. 2024, arXiv 2412.16112) load all of it and train the attention alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inheritance:
    """What :func:`inherit` did; parameters and buffers by name.

    Args:
        inherited: have the teacher's values.
        fresh: of the student, as they were.
        left: of the teacher, without a place in the student: no equal name, another shape, or excluded.
    """

    inherited: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.inherited)} tensors inherited, {len(self.fresh)} fresh, {len(self.left)} left behind"
        )


def inherit(student: nn.Module, teacher: nn.Module, *, exclude: str | None = None) -> Inheritance:
    """Copy every parameter and buffer of equal name and shape from teacher to student, in place.

    Args:
        student: takes the values; keeps its dtype, device and ``requires_grad``.
        teacher: stays as it is; afterwards no memory is shared.
        exclude: a regular expression, searched for in names; these stay fresh though they would fit.

    Raises:
        ValueError: nothing fits, the expression cannot be read, or it excludes nothing that would fit.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> done = inherit(nn.Linear(2, 3), nn.Linear(2, 3), exclude="bias")
    >>> print(done), done.fresh
    1 tensors inherited, 1 fresh, 1 left behind
    (None, ('bias',))
    """
    pattern = _compiled(exclude)
    own, given = _tensors(student), _tensors(teacher)
    fits = [name for name, value in own.items() if name in given and given[name].shape == value.shape]
    chosen = [name for name in fits if pattern is None or not pattern.search(name)]
    if pattern is not None and len(chosen) == len(fits):
        raise ValueError(
            f"exclude={exclude!r} excludes none of the {len(fits)} tensors that fit: see their names"
        )
    if not chosen:
        raise ValueError(
            f"nothing of the teacher ({type(teacher).__name__}, {len(given)} tensors) has both name and shape of a tensor of "
            f"the student ({type(student).__name__}, {len(own)} tensors), or all of it is excluded"
        )
    with torch.no_grad():
        for name in chosen:
            own[name].copy_(given[name])
    taken = set(chosen)
    return Inheritance(
        tuple(chosen), tuple(n for n in own if n not in taken), tuple(n for n in given if n not in taken)
    )


def train_only(model: nn.Module, pattern: str) -> tuple[str, ...]:
    """Let only the parameters train whose name has ``pattern`` in it; all others are frozen.

    Returns:
        the names that train.

    Raises:
        ValueError: no name matches, or the expression cannot be read.

    >>> train_only(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), r"^1\\.weight")
    ('1.weight',)
    """
    expression = _compiled(pattern)
    names = [name for name, _ in model.named_parameters() if expression.search(name)]
    if not names:
        known = [name for name, _ in model.named_parameters()]
        raise ValueError(
            f"no parameter of {type(model).__name__} matches {pattern!r}; the first names are {known[:5]}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return tuple(names)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
