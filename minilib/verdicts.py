"""From values, one a seed, to a verdict. Verdicts are computed, never typed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from minilib.cards import Claim

VERDICTS = ("confirmed", "weaker", "inconclusive", "contradicted", "not tried")


def t_interval(values: Sequence[float], level: float = 0.90) -> tuple[float, float]:
    """Two-sided Student t-interval for the mean of ``values``.

    One value says nothing about spread, so its interval is infinite. An empty list or a value that is not finite
    raises ValueError. Means are exactly rounded, so that equal values give an interval of width zero.

    >>> low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (0.314, 3.686)
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1, such as 0.90")
    values = _finite(values)
    if not values:
        raise ValueError("t_interval needs at least one value; got an empty list")
    if len(values) == 1:
        return -math.inf, math.inf
    mean = statistics.mean(values)
    half = t_quantile(len(values), level) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(n: int, level: float = 0.90) -> float:
    """Half the width of a two-sided t-interval for the mean of ``n`` >= 2 values, in standard errors.

    >>> round(t_quantile(3), 3)
    2.92
    """
    from scipy.special import stdtrit  # here, since it takes longer to load than this package

    return float(stdtrit(n - 1, (1 + level) / 2))


def verdict(claim: Claim, values: Sequence[float]) -> str:
    """The verdict on a claim, from the values of one run (one a seed) and its card alone.

    exact: every value must satisfy the threshold; no tolerance. quality and cost: the 90 % t-interval is compared with
    the null, and the mean with the threshold. ``within`` is an equivalence test: the whole interval must lie inside.
    No values: "not tried".
    """
    if claim.not_tried is not None or len(values) == 0:
        return "not tried"
    values = _finite(values)
    if claim.kind == "exact":
        return "confirmed" if all(_past(claim, value) for value in values) else "contradicted"
    low, high = t_interval(values)
    if claim.direction == "within":
        return _equivalence(claim, low, high)
    sign = 1 if claim.direction == "at_least" else -1
    # From here on, larger is better.
    low, high = sorted((sign * low, sign * high))
    null = sign * _number(claim.null)
    if low > null:
        return "confirmed" if _past(claim, statistics.mean(values)) else "weaker"
    return "contradicted" if high < null else "inconclusive"


def summarise(claim: Claim, values: Sequence[float]) -> dict[str, Any]:
    """What the record holds of one claim: values, mean, interval and verdict.

    The interval is null in the record where it is infinite (one value), and where nothing was recorded.
    """
    values = _finite(values)
    interval = list(t_interval(values)) if len(values) > 1 else None
    mean = statistics.mean(values) if values else None
    return {"values": values, "mean": mean, "interval": interval, "verdict": verdict(claim, values)}


def _finite(values: Sequence[float]) -> list[float]:
    values = [float(value) for value in values]
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values are {values}; every one must be finite")
    return values


def _number(value: float | tuple[float, float] | None) -> float:
    if not isinstance(value, int | float):
        raise ValueError(f"expected one number, got {value!r}")
    return float(value)


def _past(claim: Claim, value: float) -> bool:
    if claim.direction == "within":
        low, high = claim.threshold
        return low <= value <= high
    threshold = _number(claim.threshold)
    return value >= threshold if claim.direction == "at_least" else value <= threshold


def _equivalence(claim: Claim, low: float, high: float) -> str:
    lower, upper = claim.threshold
    if lower <= low and high <= upper:
        return "confirmed"
    return "contradicted" if high < lower or low > upper else "inconclusive"
