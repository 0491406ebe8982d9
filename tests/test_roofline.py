import pytest
import torch

from minilib import roofline
from minilib.roofline import Roofline, measure_roofline


def test_two_roofs_meet_at_the_ridge():
    roof = Roofline(peak=90.0, bandwidth=15.0)
    assert roof.ridge == 6
    assert roof.attainable(roof.ridge) == roof.peak
    assert [roof.attainable(i) for i in (0, 1, 3, 6, 600)] == [0, 15, 45, 90, 90]


@pytest.mark.parametrize("flops, nbytes", [(10, 1000), (1000, 10), (60, 10)])
def test_the_least_time_is_the_work_over_the_attainable_rate(flops, nbytes):
    roof = Roofline(peak=90.0, bandwidth=15.0)
    assert roof.fastest(flops, nbytes) == pytest.approx(flops / roof.attainable(flops / nbytes))


def test_the_measured_rates_are_work_over_time(monkeypatch):
    ran = []

    def times(functions, *, repeats):
        for function in functions:
            function()
        ran.append(repeats)
        return [2.0, 4.0]

    monkeypatch.setattr(roofline.bench, "times", times)
    roof = measure_roofline(size=10, megabytes=0.04, repeats=3)
    assert roof == Roofline(peak=2 * 10**3 / 2.0, bandwidth=2 * 40_000 / 4.0) and ran == [3]


def test_a_real_measurement_is_positive():
    roof = measure_roofline(size=32, megabytes=0.1, repeats=2, dtype=torch.float64)
    assert roof.peak > 0 and roof.bandwidth > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Roofline(0.0, 1.0), "positive rates"),
        (lambda: Roofline(1.0, -1.0), "positive rates"),
        (lambda: Roofline(1.0, 1.0).attainable(-1.0), "at least 0"),
        (lambda: measure_roofline(size=0), "positive size"),
        (lambda: measure_roofline(megabytes=0.0), "positive size and a positive copy"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
