import json
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from minilib import bench
from minilib.costs import fit_exponent

HERE = Path(__file__).parent / "benchmarks"


def burn(n):
    return lambda: sum(range(n))


def test_ratio_sees_a_factor_of_four_and_itself():
    r = bench.ratio(burn(80_000), burn(20_000), repeats=5, min_seconds=0.005)
    assert 2.5 < r.ratio < 6.5 and r.ratio == pytest.approx(r.ours_ms / r.peer_ms)
    assert 0.5 < r.noise < 2.0


def test_ratio_counts_cpu_time_not_waiting():
    # waiting, if it counted, would make this at least 5 in each of three tries; a busy machine may
    # slow one of them down, not all three by more than half
    def wait():
        time.sleep(0.02)
        sum(range(200_000))

    tries = (bench.ratio(wait, burn(200_000), repeats=3, min_seconds=0.002).ratio for _ in range(3))
    assert any(ratio < 2.5 for ratio in tries)


def test_times_are_in_order_and_the_fewest():
    slow, fast = bench.times([burn(60_000), burn(6_000)], repeats=3, min_seconds=0.002)
    assert 4 < slow / fast < 25


def burner(n):
    return burn(1000 * n)


CASES = [
    bench.Case("one", "torch loop", 0.5, burn(1000), burn(9000)),
    bench.Missing("two", "mambapy", 0.8, "it is not here"),
    bench.Scaling("three", (0.8, 1.2), (10, 20, 40), burner),
]


def test_rows_of_every_kind():
    one, two, three = rows = bench.run_cases(iter(CASES))
    assert one["ratio"] < 0.5 and one["peer_version"] == metadata.version("torch")
    assert two["not_measured"] == "it is not here" and "ratio" not in two and two["peer_version"] is None
    assert 0.6 < three["exponent"] < 1.4 and three["interval"][0] < three["exponent"] < three["interval"][1]
    assert three["sizes"] == [10, 20, 40] and len(three["ms"]) == 3 and three["goal"] == (0.8, 1.2)
    assert all(row["machine"] and isinstance(row["cpu_flags"], list) for row in rows)
    json.dumps(rows)
    assert [r["name"] for r in bench.run_cases(iter(CASES), ["tw"])] == ["two"]


def test_update_replaces_the_rows_measured_and_keeps_the_others(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tests" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "bench_x.py").write_text(
        "from minilib.bench import Missing\n"
        "def cases():\n    for name in 'abc':\n        yield Missing(name, 'torch', 1.0, 'a reason')\n"
    )
    old = [{"name": "c", "old": 1}, {"name": "gone", "old": 2}, {"name": "a", "old": 3}]
    (folder / "record.json").write_text(json.dumps(old))
    monkeypatch.setattr(bench, "repo_root", lambda: tmp_path)

    def names():
        return [(r["name"], r.get("old")) for r in json.loads((folder / "record.json").read_text())]

    assert bench.main(["a"]) == 0 and names() == [("c", 1), ("gone", 2), ("a", 3)]
    assert bench.main(["a", "--update"]) == 0 and names() == [("a", None), ("c", 1)]
    assert bench.main([]) == 0 and names() == [("a", None), ("b", None), ("c", None)]
    monkeypatch.setattr(bench, "repo_root", lambda: None)
    assert bench.main([]) == 1 and "checkout" in capsys.readouterr().err


def test_why_a_peer_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "peer_needs.py").write_text("import not_here_either")
    (tmp_path / "peer_broken.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist\\nmore')"
    )
    assert bench.package_problem("json") is None
    assert bench.package_problem("no_such_peer") == "no_such_peer is not installed"
    assert bench.package_problem("peer_needs") == "peer_needs needs not_here_either"
    assert bench.package_problem("peer_broken").endswith("operator torchvision::nms does not exist")


def test_ratio_refuses():
    with pytest.raises(ValueError, match="repeats"):
        bench.ratio(burn(1), burn(1), repeats=1)


def compare(ours, theirs, bound):
    pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else list(zip(ours, theirs, strict=True))
    assert any(b.abs().max() > 0 for _, b in pairs)
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("path", sorted(HERE.glob("bench_*.py")), ids=lambda p: p.stem)
def test_every_case_runs_and_both_sides_do_the_same_work(path):
    seen, names = 0, set()
    for case in bench._load(path).cases():
        assert case.name not in names
        names.add(case.name)
        if isinstance(case, bench.Scaling):
            assert case.goal[0] < case.goal[1] and len(case.sizes) >= 3
            case.make(min(case.sizes))()
        elif isinstance(case, bench.Missing):
            assert case.reason and 0 < case.goal <= 1.4
        elif not case.slow and "batch 64" not in case.name:  # once each; the large ones are run by make bench
            assert 0 < case.goal <= 1.4
            ours, theirs = case.ours(), case.theirs()
            if case.same is not None:
                compare(ours, theirs, case.same)
        seen += 1
    assert seen


def test_the_record_has_every_case_and_names_its_machine():
    rows = json.loads((HERE / "record.json").read_text())
    names = [c.name for path in sorted(HERE.glob("bench_*.py")) for c in bench._load(path).cases()]
    assert [r["name"] for r in rows] == names
    for row in rows:
        assert row["machine"] and row["threads"] == 1 and row["date"] and row["torch"] and row["diffusers"]
        if "exponent" in row:
            fit = fit_exponent(row["sizes"], row["ms"])
            assert row["exponent"] == pytest.approx(fit.value, abs=2e-3)
            assert row["interval"] == pytest.approx([fit.low, fit.high], abs=2e-2)
        elif "not_measured" in row:
            assert row["not_measured"] and "ratio" not in row
        else:
            assert row["ratio"] == pytest.approx(row["ours_ms"] / row["peer_ms"], rel=5e-3, abs=2e-3)


@pytest.mark.parametrize("path", sorted(HERE.glob("bench_*.py")), ids=lambda p: p.stem)
def test_models_that_are_compared_compute_the_same(path):
    cases = [case for case in bench._load(path).cases() if case.name.endswith("forward, batch 1")]
    for case in cases:
        (mine, call, batch), (theirs, peer_call, peer_batch) = case.ours.args, case.theirs.args
        with torch.no_grad():
            mine.eval(), theirs.eval()
            a, b = call(*batch), peer_call(*peer_batch)
        assert a.abs().max() > 0.01 and torch.allclose(a, b, atol=1e-5)
