"""Rotary embeddings on larger grids than those of training: what to do to the frequencies, each axis by itself.

Every function here makes a ``Scaling`` for ``RotaryEmbedding.scaling``. A factor of s on an axis says that it is s times
as long as in training; FiT (Lu et al. 2024, arXiv 2402.12376, section 3.3; ``whlzy/FiT: fit/model/rope.py``) gives
each axis its own factor ("VisionNTK", "VisionYaRN"), so that a wide canvas does not squeeze the rows.

>>> rotary = RotaryEmbedding(16)
>>> rotary.scaling = ntk_aware(axis_factors((8, 16), trained=8))
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .rope import RotaryEmbedding, Scaling

__all__ = [
    "RotaryEmbedding",
    "axis_factors",
    "ntk_aware",
    "position_interpolation",
    "yarn",
    "yarn_attention_scale",
]

Factors = float | Sequence[float]
Frequencies = Float[Tensor, " half"]


def axis_factors(
    sizes: Sequence[int], trained: int | Sequence[int], *, decoupled: bool = True
) -> tuple[float, ...]:
    """How many times as long as in training each axis is, and no less than 1.

    Args:
        sizes: of the grid at hand.
        trained: of the grid of training, or one for all axes.
        decoupled: False: the largest factor on every axis.

    Raises:
        ValueError: another number of axes, or a size below 1.

    >>> axis_factors((8, 24), trained=16)
    (1.0, 1.5)
    >>> axis_factors((8, 24), trained=16, decoupled=False)
    (1.5, 1.5)
    """
    lengths = [trained] * len(sizes) if isinstance(trained, int) else list(trained)
    if len(lengths) != len(sizes) or min([*sizes, *lengths], default=0) < 1:
        raise ValueError(f"sizes {tuple(sizes)} and trained={trained!r} need one size of at least 1 an axis")
    factors = [max(1.0, size / length) for size, length in zip(sizes, lengths, strict=True)]
    return tuple(factors if decoupled else [max(factors)] * len(factors))


def _checked(factors: Factors) -> Factors:
    given = [factors] if isinstance(factors, int | float) else list(factors)
    if not given or any(not math.isfinite(s) or s <= 0 for s in given):
        raise ValueError(f"factors have to be positive and finite, one or one an axis, got {factors!r}")
    return factors if isinstance(factors, int | float) else tuple(given)


def _factor(factors: Factors, axis: int) -> float:
    if isinstance(factors, int | float):
        return float(factors)
    if axis >= len(factors):
        raise ValueError(f"there is no factor for axis {axis}: {len(factors)} given, {tuple(factors)}")
    return float(factors[axis])


def _several(frequencies: Frequencies, name: str) -> int:
    if len(frequencies) < 2:
        raise ValueError(
            f"{name} treats slow and fast frequencies differently, but an axis of width {2 * len(frequencies)} has "
            "only one: use position_interpolation, or wider heads"
        )
    return len(frequencies)


def position_interpolation(factors: Factors) -> Scaling:
    """Every frequency divided by its axis's factor: positions are squeezed into the range of training.

    Chen et al. 2023, arXiv 2306.15595; with one factor for all axes it is ``interpolated``.

    Raises:
        ValueError: a factor that is not positive; later, an axis without a factor.

    >>> position_interpolation((1.0, 2.0))(torch.tensor([1.0, 0.1]), 1)
    tensor([0.5000, 0.0500])
    """
    factors = _checked(factors)
    return lambda frequencies, axis: frequencies / _factor(factors, axis)


def ntk_aware(factors: Factors) -> Scaling:
    """The base becomes theta * s**(d / (d - 2)): the fastest frequency stays, the slowest is divided by s.

    In between, frequency i of d/2 is divided by s**(2i / (d - 2)). So near neighbours are told apart as in training,
    and the longest wave still fits the axis (bloc97 2023; YaRN, arXiv 2309.00071, section 3.1; FiT's "VisionNTK").

    Raises:
        ValueError: a factor that is not positive; later, an axis without a factor or with a single frequency.

    >>> ntk_aware(4.0)(torch.tensor([1.0, 0.1, 0.01]), 0)
    tensor([1.0000, 0.0500, 0.0025])
    """
    factors = _checked(factors)

    def scale(frequencies: Frequencies, axis: int) -> Frequencies:
        half = _several(frequencies, "ntk_aware")
        powers = torch.arange(half, dtype=frequencies.dtype, device=frequencies.device) / (half - 1)
        return frequencies * _factor(factors, axis) ** -powers

    return scale


def yarn_ramp(
    frequencies: Frequencies, trained: float, *, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> Frequencies:
    """How much of each frequency is kept: 1 for the fast ones, 0 for the slow ones, linear in the index between.

    Fast ones turn more than ``beta_fast`` times over the ``trained`` length, slow ones less than ``beta_slow`` times. The
    ends of the ramp are rounded outwards to whole indices, as in ``jquesnelle/yarn`` and ``whlzy/FiT``.

    >>> yarn_ramp(torch.tensor([1.0, 0.1, 0.01, 0.001]), 1000)
    tensor([1.0000, 0.6667, 0.3333, 0.0000])
    """
    half = _several(frequencies, "yarn")
    # On the tensors' device, which may be meta.
    exact = frequencies.double()
    step = -(exact[1] / exact[0]).log()

    def index(turns: float) -> Tensor:
        return (exact[0] * trained / (2 * math.pi * turns)).log() / step

    low = index(beta_fast).floor().clamp(min=0)
    high = index(beta_slow).ceil().clamp(max=2 * half - 1)
    width = torch.where(low == high, 0.001, high - low)
    places = torch.arange(half, dtype=torch.float64, device=frequencies.device)
    return (1 - ((places - low) / width).clamp(0, 1)).to(frequencies.dtype)


def yarn(
    factors: Factors,
    trained: int | Sequence[int],
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Scaling:
    """Fast frequencies as in training, slow ones divided by s, a ramp between (Peng et al. 2023, arXiv 2309.00071).

    The sharpening of attention that goes with it is ``yarn_attention_scale``.

    Args:
        factors: of each axis, or one for all.
        trained: length of the axes in training, or one for all.
        beta_fast: turns over that length from which a frequency is left as it was.
        beta_slow: turns up to which a frequency is divided by its factor.

    Raises:
        ValueError: a factor or length that is not positive, ``beta_fast`` not above ``beta_slow``; later, an axis
            without a factor or with a single frequency.
    """
    factors = _checked(factors)
    lengths = _checked(trained)
    if not 0 < beta_slow < beta_fast:
        raise ValueError(f"beta_slow={beta_slow} has to be positive and less than beta_fast={beta_fast}")

    def scale(frequencies: Frequencies, axis: int) -> Frequencies:
        kept = yarn_ramp(frequencies, _factor(lengths, axis), beta_fast=beta_fast, beta_slow=beta_slow)
        return frequencies * kept + frequencies / _factor(factors, axis) * (1 - kept)

    return scale


def yarn_attention_scale(factors: Factors) -> float:
    """0.1 ln s + 1 for the largest factor s, and 1 up to s = 1: YaRN's temperature, as a factor of the rotary table.

    ``rotary(ids) * yarn_attention_scale(factors)`` scales turned queries and keys alike, so the logits by its
    square, 1/t in YaRN's equation 22. FiT does the same with cosines and sines.

    Raises:
        ValueError: a factor that is not positive.

    >>> round(yarn_attention_scale((1.0, 4.0)), 4)
    1.1386
    """
    given = _checked(factors)
    largest = float(given) if isinstance(given, int | float) else max(given)
    return 0.1 * math.log(largest) + 1.0 if largest > 1 else 1.0
