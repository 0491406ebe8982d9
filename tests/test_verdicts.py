"""Intervals against scipy.stats, verdicts against hand cases."""

import math

import numpy as np
import pytest
from scipy import stats

from minilib.cards import Claim
from minilib.tables import here
from minilib.verdicts import VERDICTS, summarise, t_interval, verdict

BASE = {"id": "c", "statement": "s", "paper": "p", "metric": "m", "asserted_in": ("cpu",)}


def claim(direction="at_least", threshold=1.5, null=1.0, kind="quality", **extra):
    return Claim(**BASE, kind=kind, direction=direction, threshold=threshold, null=null, **extra)


@pytest.mark.parametrize("n", [2, 3, 5, 30, 200])
@pytest.mark.parametrize("level", [0.5, 0.90, 0.95, 0.999])
def test_interval_is_scipys(n, level):
    values = np.random.default_rng(n).normal(3, 2, n)
    expected = stats.t.interval(level, n - 1, loc=values.mean(), scale=stats.sem(values))
    # scipy.stats computes the quantile by another routine, which differs in the last digits.
    assert np.abs(np.array(t_interval(list(values), level)) / expected - 1).max() < 1e-11


def test_interval_by_hand():
    # n = 3, mean 2, sd 1, t(0.95, 2) = 2.919986
    low, high = t_interval([1.0, 2.0, 3.0])
    assert abs(high - (2 + 2.919985580355516 / math.sqrt(3))) < 1e-10
    assert abs(low + high - 4) < 1e-12


def test_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0, 1, (4000, 4))
    hits = sum(low <= 0 <= high for low, high in map(t_interval, draws.tolist()))
    assert abs(hits / 4000 - 0.90) < 4 * math.sqrt(0.9 * 0.1 / 4000)


def test_one_value_says_nothing_about_spread():
    assert t_interval([3.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize("value", [0.1, 1.1, 1 / 3, 1e300])
def test_equal_values_have_an_interval_of_width_zero(value):
    for n in (2, 3, 7):
        assert t_interval([value] * n) == (value, value)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0, 2.0]])
def test_bad_values_are_refused(values):
    with pytest.raises(ValueError, match="at least one value|must be finite"):
        t_interval(values)


@pytest.mark.parametrize("level", [0.0, 1.0, 90.0])
def test_bad_level_is_refused(level):
    with pytest.raises(ValueError, match="level is"):
        t_interval([1.0, 2.0], level)


# t(0.95, 2) / sqrt(3) = 1.6859: with sd 0.1 the interval is mean +- 0.16859.
@pytest.mark.parametrize(
    ("direction", "threshold", "null", "values", "expected"),
    [
        ("at_least", 1.5, 1.0, [1.9, 2.0, 2.1], "confirmed"),
        ("at_least", 2.0, 1.0, [2.0, 2.0, 2.0], "confirmed"),  # at least: equality counts
        ("at_least", 1.5, 1.0, [1.2, 1.3, 1.4], "weaker"),  # interval [1.131, 1.469]
        ("at_least", 1.5, 1.0, [0.9, 1.1, 1.3], "inconclusive"),
        (
            "at_least",
            1.5,
            1.0,
            [1.0, 3.0, 5.0],
            "inconclusive",
        ),  # past the threshold, but not clear of the null
        ("at_least", 1.5, 1.0, [0.5, 0.6, 0.7], "contradicted"),
        ("at_least", 1.5, 1.0, [1.0, 1.0, 1.0], "inconclusive"),  # zero variance, on the null
        ("at_least", 1.5, 1.0, [math.nextafter(1.0, 2)] * 3, "weaker"),  # zero variance, clear by one ulp
        ("at_least", 1.5, 1.0, [math.nextafter(1.0, 0)] * 3, "contradicted"),
        ("at_least", 1.5, 1.0, [-1.9, -2.0, -2.1], "contradicted"),  # wrong sign
        ("at_least", 1.5, 1.0, [2.0], "inconclusive"),  # too few seeds
        ("at_most", 0.5, 1.0, [0.1, 0.2, 0.3], "confirmed"),
        ("at_most", 0.5, 1.0, [0.5, 0.5], "confirmed"),
        ("at_most", 0.5, 1.0, [0.6, 0.7, 0.8], "weaker"),  # interval [0.531, 0.869]
        ("at_most", 0.5, 1.0, [0.8, 1.0, 1.2], "inconclusive"),
        ("at_most", 0.5, 1.0, [1.9, 2.0, 2.1], "contradicted"),
        ("at_most", -0.5, 0.0, [0.9, 1.0, 1.1], "contradicted"),  # wrong sign
        ("at_least", 0.0, 0.0, [0.1, 0.2, 0.3], "confirmed"),  # threshold at the null
        ("within", (-0.5, 0.5), None, [-0.1, 0.0, 0.1], "confirmed"),
        ("within", (-0.5, 0.5), None, [0.3, 0.4, 0.5], "inconclusive"),  # [0.231, 0.569] crosses the edge
        ("within", (-0.5, 0.5), None, [0.9, 1.0, 1.1], "contradicted"),
        ("within", (-0.5, 0.5), None, [-1.1, -1.0, -0.9], "contradicted"),
        ("within", (-0.5, 0.5), None, [0.5, 0.5, 0.5], "confirmed"),  # the edge belongs to it
        ("within", (-0.5, 0.5), None, [0.0], "inconclusive"),  # one value: infinite interval
    ],
)
def test_quality_claims(direction, threshold, null, values, expected):
    for kind in ("quality", "cost"):
        assert verdict(claim(direction, threshold, null, kind), values) == expected


def test_mirrored_claims_have_mirrored_verdicts():
    draws = np.random.default_rng(1).normal(1.2, 0.4, (300, 3))
    seen = set()
    for values in draws.tolist():
        up = verdict(claim("at_least", 1.3, 1.0), values)
        down = verdict(claim("at_most", -1.3, -1.0), [-value for value in values])
        assert up == down
        seen.add(up)
    assert seen == {"confirmed", "weaker", "inconclusive", "contradicted"}


BELOW, ABOVE = math.nextafter(0.3, 0), math.nextafter(0.3, 1)


@pytest.mark.parametrize(
    ("direction", "threshold", "values", "expected"),
    [
        ("at_least", 0.3, [0.3], "confirmed"),
        ("at_least", 0.3, [BELOW], "contradicted"),  # one ulp
        ("at_most", 0.3, [0.3], "confirmed"),
        ("at_most", 0.3, [ABOVE], "contradicted"),
        ("at_most", 0.3, [0.1, 0.2, ABOVE], "contradicted"),  # every value must satisfy it
        ("at_most", 0.3, [0.1 + 0.2], "contradicted"),  # 0.30000000000000004
        ("within", (0.3, 0.3), [0.3], "confirmed"),
        ("within", (0.3, 0.3), [ABOVE], "contradicted"),
        ("within", (0.3, 0.3), [BELOW], "contradicted"),
        ("within", (0.0, 0.3), [0.0, 0.3], "confirmed"),
    ],
)
def test_exact_claims_have_no_tolerance(direction, threshold, values, expected):
    assert verdict(claim(direction, threshold, None, "exact"), values) == expected


def test_nothing_recorded_or_not_to_be_tried():
    assert verdict(claim(), []) == "not tried"
    untried = Claim(id="c", statement="s", paper="p", kind="quality", not_tried="needs a large model")
    assert verdict(untried, [5.0, 5.0]) == "not tried"


def test_values_that_are_not_finite_have_no_verdict():
    for kind in ("exact", "quality"):
        with pytest.raises(ValueError, match="finite"):
            verdict(claim(kind=kind), [1.0, math.nan])


def test_summary_is_what_json_can_hold():
    full = summarise(claim(), [1.9, 2.0, 2.1])
    assert full["values"] == [1.9, 2.0, 2.1] and full["verdict"] == "confirmed"
    assert abs(full["mean"] - 2.0) < 1e-15 and full["interval"] == list(t_interval([1.9, 2.0, 2.1]))
    assert summarise(claim(), [2.0]) == {
        "values": [2.0],
        "mean": 2.0,
        "interval": None,
        "verdict": "inconclusive",
    }
    assert summarise(claim(), []) == {"values": [], "mean": None, "interval": None, "verdict": "not tried"}
    assert full["verdict"] in VERDICTS


@pytest.mark.parametrize(
    ("direction", "threshold", "values", "shown"),
    [
        ("at_most", 0.5, [0.1, 0.4, 0.2], "0.4, the worst of 3"),
        ("at_least", 0.5, [0.9, 0.6, 0.7], "0.6, the worst of 3"),
        ("within", (0.0, 1.0), [0.5, 0.9, 0.2], "0.9, the worst of 3"),
        ("at_most", 0.5, [0.3], "0.3"),
    ],
)
def test_of_an_exact_claim_the_worst_value_is_shown(direction, threshold, values, shown):
    exact = claim(direction, threshold, None, "exact")
    assert here(exact, summarise(exact, values)) == shown


def test_of_a_quality_claim_mean_and_interval_are_shown():
    assert here(claim(), summarise(claim(), [1.0, 2.0, 3.0])) == "2 [0.3141, 3.686], n = 3"
