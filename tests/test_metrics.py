import numpy as np
import pytest
import torch
from scipy import linalg

from minilib import metrics
from minilib.metrics.frechet import module_checksum
from minilib.models import OracleClassifier


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_frechet_equals_scipys_matrix_square_root():
    a, b = randn(200, 12) @ randn(12, 12, seed=1), randn(150, 12, seed=2) @ randn(12, 12, seed=3) + 0.7
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_limits():
    a = randn(300, 5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(5 * 4, rel=1e-6)
    # scaling one axis by s: (1 - s)^2 times its variance
    b = a.clone()
    b[:, 0] = 3 * (a[:, 0] - a[:, 0].mean()) + a[:, 0].mean()
    whole = metrics.frechet_distance(a[:, :1], b[:, :1])
    assert whole == pytest.approx(4 * float(a[:, 0].double().var()), rel=1e-6)
    # it is symmetric, and biased upwards at small n
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), rel=1e-9)
    c = randn(2000, 5, seed=9)
    assert metrics.frechet_distance(c[:20], c[20:]) > metrics.frechet_distance(c[:1000], c[1000:])


def test_frechet_with_fewer_samples_than_features():
    a, b = randn(6, 20), randn(7, 20, seed=1)
    assert np.isfinite(metrics.frechet_distance(a, b))


def test_frechet_refuses():
    with pytest.raises(ValueError, match="at least two"):
        metrics.frechet_distance(randn(1, 3), randn(5, 3))
    with pytest.raises(ValueError, match="widths"):
        metrics.frechet_distance(randn(5, 3), randn(5, 4))


def test_report_states_n_net_floor_and_ceiling():
    oracle = OracleClassifier().eval()
    real, held, fake = randn(90, 1, 8, 8), randn(40, 1, 8, 8, seed=1), randn(50, 1, 8, 8, seed=2) + 1
    report = metrics.frechet_report(oracle, fake, real, held)
    assert (report.n, report.n_reference) == (40, 90)
    assert report.net_checksum == module_checksum(oracle) and report.net_checksum[:8] in str(report)
    f = lambda x: metrics.features(oracle, x)  # noqa: E731
    assert report.value == metrics.frechet_distance(f(fake[:40]), f(real))
    assert report.floor == metrics.frechet_distance(f(held), f(real))
    assert report.over_floor == report.value / report.floor
    again = metrics.frechet_report(oracle, fake, real, held, ceiling=fake)
    assert again.ceiling == pytest.approx(report.value)
    with torch.no_grad():
        next(oracle.parameters()).add_(1e-3)
    assert module_checksum(oracle) != report.net_checksum


def brute_force(real, fake, k):
    """The definitions, point by point."""
    rr, rf = (
        np.linalg.norm(real[:, None] - real[None], axis=-1),
        np.linalg.norm(real[:, None] - fake[None], axis=-1),
    )
    ff = np.linalg.norm(fake[:, None] - fake[None], axis=-1)
    rad_r, rad_f = np.sort(rr, 1)[:, k], np.sort(ff, 1)[:, k]
    precision = np.mean([any(rf[i, j] < rad_r[i] for i in range(len(real))) for j in range(len(fake))])
    recall = np.mean([any(rf[i, j] < rad_f[j] for j in range(len(fake))) for i in range(len(real))])
    density = np.mean([sum(rf[i, j] < rad_r[i] for i in range(len(real))) / k for j in range(len(fake))])
    coverage = np.mean([any(rf[i, j] < rad_r[i] for j in range(len(fake))) for i in range(len(real))])
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifold_metrics_equal_their_definitions(k):
    real, fake = randn(40, 3), 0.8 * randn(30, 3, seed=1) + 0.3
    m = metrics.precision_recall_density_coverage(real, fake, k)
    assert (m.precision, m.recall, m.density, m.coverage) == pytest.approx(
        brute_force(real.double().numpy(), fake.double().numpy(), k), abs=1e-12
    )


def test_manifold_limits():
    real = randn(200, 2)
    same = metrics.precision_recall_density_coverage(real, real)
    assert same.precision == same.recall == same.coverage == 1.0
    far = metrics.precision_recall_density_coverage(real, real + 100)
    assert far.precision == far.recall == far.density == far.coverage == 0.0
    # a collapsed generator is precise and covers nothing
    collapsed = metrics.precision_recall_density_coverage(real, real[:1] + 0.01 * randn(200, 2, seed=4))
    assert collapsed.precision > 0.9 and collapsed.recall < 0.1 and collapsed.coverage < 0.2
    with pytest.raises(ValueError, match="k=5"):
        metrics.precision_recall_density_coverage(real[:5], real)


def test_memorisation_tells_copies_from_fresh_samples():
    train, held, fresh = randn(300, 1, 4, 4), randn(200, 1, 4, 4, seed=1), randn(200, 1, 4, 4, seed=2)
    honest = metrics.memorisation(fresh, train, held)
    assert 0.95 < honest.ratio < 1.05 and honest.copied < 0.04
    copies = metrics.memorisation(train[:200] + 0.01 * fresh, train, held)
    assert copies.ratio < 0.05 and copies.copied == 1.0
    half = metrics.memorisation(torch.cat([train[:100], fresh[:100]]), train, held)
    assert 0.5 <= half.copied < 0.55


def test_nearest_names_the_neighbour():
    pool = randn(20, 1, 3, 3)
    distance, index = metrics.nearest(pool[[4, 7]] + 1e-3, pool)
    assert index.tolist() == [4, 7] and distance.max() < 0.01
    with pytest.raises(ValueError, match="empty"):
        metrics.nearest(pool, pool[:0])


def test_accuracy_of_a_known_judge():
    class Judge(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((x[:, 0, 0, 0]).long(), 10).float()

    x = torch.tensor([1.0, 2, 3, 4]).reshape(4, 1, 1, 1)
    assert metrics.class_accuracy(Judge(), x, torch.tensor([1, 2, 3, 9])) == 0.75
    assert metrics.predict(Judge(), x, batch=3).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="labels"):
        metrics.class_accuracy(Judge(), x, torch.tensor([1]))
