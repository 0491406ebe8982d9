"""How many bits each layer gets, when the mean over all weights is given.

A layer l rounded to b bits, alone, causes an error e[l][b] (measured: the layer's sensitivity). If errors add up, the best
choice under a budget is a knapsack problem with one item a layer, and small enough to be solved exactly (``allocate_bits``).
ViDiT-Q (arXiv 2406.02540) splits the layers into groups first, by what they affect, measures each group with a metric of its
own, and gives each group the same mean: errors in different units are never compared (``allocate_by_group``).
``allocate_in_order`` spends the same budget in any order of the layers: the control.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

#: errors[layer][bits]: what rounding this layer alone to so many bits costs, in any unit.
Errors = Mapping[str, Mapping[int, float]]


def allocate_bits(errors: Errors, sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """The bits with the least sum of errors whose mean over all weights is at most ``budget``; exact.

    Dynamic programming over layers: of the partial choices that cost equally much only the best can be part of the optimum,
    and of two the dearer one only if it is better. Where layers have common divisors, as in a transformer, few are left.

    Args:
        errors: of each layer at each number of bits it may have.
        sizes: weights of each layer.
        budget: mean bits of a weight.

    Raises:
        ValueError: other layers in ``errors`` than in ``sizes``, no choice, an error that is not finite, or a budget below
        the least bits.

    >>> errors = {"a": {4: 9.0, 8: 0.0}, "b": {4: 1.0, 8: 0.0}, "c": {4: 1.0, 8: 0.0}}
    >>> allocate_bits(errors, {"a": 10, "b": 10, "c": 10}, 16 / 3)
    {'a': 8, 'b': 4, 'c': 4}
    """
    _check(errors, sizes, budget)
    capacity = budget * sum(sizes.values()) * (1 + 1e-12)  # a budget such as 4.5 is meant exactly
    least_left = sum(min(options) * sizes[layer] for layer, options in errors.items())
    front: list[tuple[float, float, tuple[int, ...]]] = [
        (0, 0.0, ())
    ]  # cost in bits, error, choices; no one dominated
    for layer, options in errors.items():
        least_left -= min(options) * sizes[layer]
        grown = [
            (cost + bits * sizes[layer], error + options[bits], (*chosen, bits))
            for cost, error, chosen in front
            for bits in options
            if cost + bits * sizes[layer] + least_left <= capacity
        ]
        front = _undominated(grown)
    best = min(front, key=lambda state: (state[1], state[0]))
    return dict(zip(errors, best[2], strict=True))


def allocate_by_group(
    errors: Errors, sizes: Mapping[str, int], budget: float, groups: Mapping[str, str]
) -> dict[str, int]:
    """``allocate_bits`` in each group by itself, all with the same mean: errors are compared within a group only.

    Args:
        groups: the group of each layer; each may have measured its errors in a unit of its own.

    Raises:
        ValueError: a layer without a group, or as ``allocate_bits``.
    """
    _check(errors, sizes, budget)
    missing = sorted(set(errors) - set(groups))
    if missing:
        raise ValueError(f"layers without a group: {missing}")
    bits: dict[str, int] = {}
    for group in dict.fromkeys(groups[layer] for layer in errors):
        own = {layer: options for layer, options in errors.items() if groups[layer] == group}
        bits |= allocate_bits(own, {layer: sizes[layer] for layer in own}, budget)
    return {layer: bits[layer] for layer in errors}


def allocate_in_order(
    order: Sequence[str], sizes: Mapping[str, int], choices: Iterable[int], budget: float
) -> dict[str, int]:
    """All layers start with the least bits; each in turn takes the most that still fits.

    Raises:
        ValueError: an order that is no permutation of the layers, or a budget below the least bits.

    >>> allocate_in_order(["b", "a"], {"a": 10, "b": 10}, (4, 8), 6)
    {'a': 4, 'b': 8}
    """
    options = sorted(set(choices))
    _check({layer: dict.fromkeys(options, 0.0) for layer in order}, sizes, budget)
    if len(order) != len(sizes):
        raise ValueError(f"an order of {len(order)} layers given, there are {len(sizes)}: name each once")
    left = budget * sum(sizes.values()) * (1 + 1e-12) - options[0] * sum(sizes.values())
    bits = dict.fromkeys(sizes, options[0])
    for layer in order:
        bits[layer] = max(b for b in options if (b - options[0]) * sizes[layer] <= left)
        left -= (bits[layer] - options[0]) * sizes[layer]
    return bits


def gain_per_bit(errors: Errors, sizes: Mapping[str, int]) -> dict[str, float]:
    """What each layer gains from the least to the most bits, for each bit that this costs: an order for ``allocate_in_order``.

    >>> gain_per_bit({"a": {4: 9.0, 8: 1.0}}, {"a": 2})
    {'a': 1.0}
    """
    _check(errors, sizes, float("inf"))
    return {
        layer: (options[min(options)] - options[max(options)])
        / ((max(options) - min(options)) * sizes[layer])
        if len(options) > 1
        else 0.0
        for layer, options in errors.items()
    }


def mean_bits(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Mean over all weights.

    >>> mean_bits({"a": 4, "b": 8}, {"a": 30, "b": 10})
    5.0
    """
    if set(bits) != set(sizes):
        raise ValueError(f"bits and sizes of different layers: {sorted(set(bits) ^ set(sizes))}")
    return sum(bits[layer] * sizes[layer] for layer in sizes) / sum(sizes.values())


def _undominated(
    states: list[tuple[float, float, tuple[int, ...]]],
) -> list[tuple[float, float, tuple[int, ...]]]:
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for state in sorted(states, key=lambda s: s[:2]):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _check(errors: Errors, sizes: Mapping[str, int], budget: float) -> None:
    if not errors or set(errors) != set(sizes):
        raise ValueError(
            f"errors and sizes of different layers, or of none: {sorted(set(errors) ^ set(sizes))}"
        )
    empty = sorted(layer for layer, options in errors.items() if not options)
    if empty:
        raise ValueError(f"layers without any number of bits to choose: {empty}")
    wrong = sorted(layer for layer, options in errors.items() if not all(map(isfinite, options.values())))
    if wrong:
        raise ValueError(f"errors of {wrong} are not finite")
    if min(sizes.values()) < 1:
        raise ValueError(f"every layer needs at least one weight, got {dict(sizes)}")
    least = sum(min(options) * sizes[layer] for layer, options in errors.items()) / sum(sizes.values())
    if budget < least * (1 - 1e-12):
        raise ValueError(f"a mean of {budget} bits asked for, the least choices have {least:g} already")
