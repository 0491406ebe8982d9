import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from minilib.metrics.mutual_information import mutual_information


def labels(n, k, seed):
    return torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (50, 3, 7), (1000, 8, 4), (2000, 1, 10)])
def test_equals_scikit_learn(n, rows, columns):
    a, f = labels(n, rows, 0), labels(n, columns, 1)
    dependent = (a + (labels(n, 10, 2) > 6).long() * f) % columns
    for factor in (f, dependent):
        expected = mutual_info_score(a.numpy(), factor.numpy()) / math.log(2)
        assert mutual_information(a, factor, 0).raw == pytest.approx(expected, abs=1e-12)


def test_a_label_tells_everything_about_itself():
    a = torch.arange(800) % 8
    result = mutual_information(a, (a * 3 + 1) % 8, 20, torch.Generator().manual_seed(0))
    assert result.raw == pytest.approx(3.0)
    assert result.corrected == pytest.approx(3.0, abs=0.1)


def test_independence_has_a_floor_and_no_corrected_information():
    """The floor is about (R - 1)(C - 1) / (2 n ln 2) bits (Miller 1955)."""
    n, rows, columns = 4000, 8, 10
    results = [
        mutual_information(
            labels(n, rows, 2 * s), labels(n, columns, 2 * s + 1), 20, torch.Generator().manual_seed(s)
        )
        for s in range(10)
    ]
    expected = (rows - 1) * (columns - 1) / (2 * n * math.log(2))
    assert sum(r.floor for r in results) / 10 == pytest.approx(expected, rel=0.05)
    assert abs(sum(r.corrected for r in results) / 10) < 0.1 * expected
    assert all(r.raw > 0.5 * expected for r in results), "the raw value alone would mislead"


def test_symmetric_and_blind_to_names():
    a, f = labels(300, 4, 0), labels(300, 6, 1)
    raw = mutual_information(a, f, 0).raw
    assert mutual_information(f, a, 0).raw == pytest.approx(raw)
    assert mutual_information(a * 5 + 2, f, 0).raw == pytest.approx(raw)


def test_generator_decides_the_shuffles():
    a, f = labels(100, 4, 0), labels(100, 4, 1)
    one, same, other = (mutual_information(a, f, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert one == same and one.floor != other.floor
    assert mutual_information(a, f, 0).floor == 0


def test_errors():
    a = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="non-negative"):
        mutual_information(a, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="0 assignments"):
        mutual_information(a[:0], a[:0])
    with pytest.raises(ValueError, match="0 or more, got -1"):
        mutual_information(a, a, -1)
