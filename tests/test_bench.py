import json
import time
from pathlib import Path

import pytest
import torch

from minilib import bench

HERE = Path(__file__).parent / "benchmarks"


def burn(n):
    return lambda: sum(range(n))


def test_ratio_sees_a_factor_of_four_and_itself():
    r = bench.ratio(burn(80_000), burn(20_000), repeats=5, min_seconds=0.005)
    assert 2.5 < r.ratio < 6.5 and r.ratio == pytest.approx(r.ours_ms / r.peer_ms)
    assert 0.5 < r.noise < 2.0


def test_ratio_counts_cpu_time_not_waiting():
    def wait():
        time.sleep(0.002)
        sum(range(20_000))

    assert bench.ratio(wait, burn(20_000), repeats=3, min_seconds=0.002).ratio < 2.5


def test_ratio_refuses():
    with pytest.raises(ValueError, match="repeats"):
        bench.ratio(burn(1), burn(1), repeats=1)


@pytest.mark.parametrize("path", sorted(HERE.glob("bench_*.py")), ids=lambda p: p.stem)
def test_every_case_runs_and_both_sides_do_the_same_work(path):
    seen = 0
    for case in bench._load(path).cases():
        assert 0 < case.goal <= 1
        if "batch 64" not in case.name:  # once each; the large ones are run by make bench
            case.ours()
            case.theirs()
            seen += 1
    assert seen


def test_the_record_has_every_case_and_names_its_machine():
    rows = json.loads((HERE / "record.json").read_text())
    names = [c.name for path in sorted(HERE.glob("bench_*.py")) for c in bench._load(path).cases()]
    assert [r["name"] for r in rows] == names
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours_ms"] / row["peer_ms"], abs=2e-3)
        assert row["machine"] and row["threads"] == 1 and row["date"] and row["torch"] and row["diffusers"]


@pytest.mark.parametrize("path", sorted(HERE.glob("bench_*.py")), ids=lambda p: p.stem)
def test_models_that_are_compared_compute_the_same(path):
    cases = [case for case in bench._load(path).cases() if case.name.endswith("forward, batch 1")]
    for case in cases:
        (mine, call, batch), (theirs, peer_call, peer_batch) = case.ours.args, case.theirs.args
        with torch.no_grad():
            mine.eval(), theirs.eval()
            a, b = call(*batch), peer_call(*peer_batch)
        assert a.abs().max() > 0.01 and torch.allclose(a, b, atol=1e-5)
