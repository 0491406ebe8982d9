"""Bits under a budget: against every choice there is, and by order and group."""

import itertools
import random

import pytest

from minilib.quantization import (
    allocate_bits,
    allocate_by_group,
    allocate_in_order,
    gain_per_bit,
    mean_bits,
)


def case(seed: int, layers: int = 5, choices: tuple[int, ...] = (4, 6, 8)) -> tuple[dict, dict]:
    rng = random.Random(seed)
    errors = {f"l{i}": {b: rng.random() * 4 ** (8 - b) for b in choices} for i in range(layers)}
    return errors, {f"l{i}": rng.choice([1, 2, 3, 7, 64, 100]) for i in range(layers)}


def brute(errors: dict, sizes: dict, budget: float) -> float:
    best = float("inf")
    for chosen in itertools.product(*(options for options in errors.values())):
        bits = dict(zip(errors, chosen, strict=True))
        if mean_bits(bits, sizes) <= budget + 1e-9:
            best = min(best, sum(errors[n][b] for n, b in bits.items()))
    return best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [4.0, 4.5, 5.3, 8.0, 16.0])
def test_optimal_on_small_cases(seed: int, budget: float) -> None:
    errors, sizes = case(seed)
    bits = allocate_bits(errors, sizes, budget)
    assert list(bits) == list(errors)
    assert mean_bits(bits, sizes) <= budget + 1e-9
    assert sum(errors[n][b] for n, b in bits.items()) == pytest.approx(brute(errors, sizes, budget))


def test_more_bits_are_not_always_better_when_measured() -> None:
    errors = {"a": {4: 1.0, 8: 2.0}, "b": {4: 3.0, 8: 0.5}}  # noise: 4 bits beat 8 in layer a
    assert allocate_bits(errors, {"a": 1, "b": 1}, 8) == {"a": 4, "b": 8}


def test_a_budget_that_is_met_exactly_counts_as_met() -> None:
    errors = {f"l{i}": {4: 1.0 + i, 8: 0.0} for i in range(10)}
    sizes = dict.fromkeys(errors, 9216)
    bits = allocate_bits(errors, sizes, 4.4)
    assert mean_bits(bits, sizes) == pytest.approx(4.4) and bits["l9"] == 8


def test_many_layers_stay_quick() -> None:
    errors, sizes = case(3, layers=60)
    bits = allocate_bits(errors, {n: 9216 * s for n, s in sizes.items()}, 5)
    assert len(bits) == 60 and mean_bits(bits, sizes) <= 5 + 1e-9


def test_groups_each_meet_the_budget_and_units_do_not_matter() -> None:
    errors, sizes = case(7, layers=8)
    groups = {name: "even" if i % 2 == 0 else "odd" for i, name in enumerate(errors)}
    scaled = {n: {b: e * (1e6 if groups[n] == "odd" else 1) for b, e in o.items()} for n, o in errors.items()}
    bits = allocate_by_group(errors, sizes, 5.0, groups)
    assert bits == allocate_by_group(scaled, sizes, 5.0, groups) and list(bits) == list(errors)
    for group in ("even", "odd"):
        own = [n for n in errors if groups[n] == group]
        part = {n: bits[n] for n in own}
        assert mean_bits(part, {n: sizes[n] for n in own}) <= 5.0 + 1e-9
        assert part == allocate_bits({n: errors[n] for n in own}, {n: sizes[n] for n in own}, 5.0)
    assert allocate_by_group(errors, sizes, 5.0, dict.fromkeys(errors, "all")) == allocate_bits(
        errors, sizes, 5.0
    )
    with pytest.raises(ValueError, match="without a group: \\['l0'\\]"):
        allocate_by_group(errors, sizes, 5.0, {n: "x" for n in errors if n != "l0"})


def test_order_spends_the_budget_front_to_back() -> None:
    sizes = {"a": 10, "b": 10, "c": 20, "d": 10}
    # mean 5 over 50 weights: 50 extra bits; d takes 40, the rest of 10 is too little for 4 more or 2 more bits of the others
    assert allocate_in_order(["d", "c", "b", "a"], sizes, (4, 6, 8), 5) == {"a": 4, "b": 4, "c": 4, "d": 8}
    # the large one first: 2 more bits for 20 weights, and 10 left over
    assert allocate_in_order(["c", "a", "b", "d"], sizes, (8, 6, 4), 5) == {"a": 4, "b": 4, "c": 6, "d": 4}
    for order in itertools.permutations(sizes):
        assert mean_bits(allocate_in_order(order, sizes, (4, 6, 8), 5.2), sizes) <= 5.2
    assert set(allocate_in_order(["a", "b", "c", "d"], sizes, (4, 8), 8).values()) == {8}


def test_the_gain_is_per_weight_and_bit() -> None:
    errors = {"a": {4: 9.0, 6: 3.0, 8: 1.0}, "b": {4: 2.0}}
    assert gain_per_bit(errors, {"a": 4, "b": 1}) == {"a": 0.5, "b": 0.0}


def test_refusals() -> None:
    errors, sizes = case(0)
    with pytest.raises(ValueError, match="different layers"):
        allocate_bits(errors, {"l0": 1}, 5)
    with pytest.raises(ValueError, match="or of none"):
        allocate_bits({}, {}, 5)
    with pytest.raises(ValueError, match="least choices have 4"):
        allocate_bits(errors, sizes, 3.9)
    with pytest.raises(ValueError, match="\\['a'\\] are not finite"):
        allocate_bits({"a": {4: float("nan")}}, {"a": 1}, 4)
    with pytest.raises(ValueError, match="without any number of bits"):
        allocate_bits({"a": {}}, {"a": 1}, 4)
    with pytest.raises(ValueError, match="at least one weight"):
        allocate_bits({"a": {4: 1.0}}, {"a": 0}, 4)
    with pytest.raises(ValueError, match="different layers"):
        mean_bits({"a": 4}, {"b": 1})
    with pytest.raises(ValueError, match="name each once"):
        allocate_in_order(["a", "a"], {"a": 1}, (4, 8), 5)
