import math

import numpy as np
import pytest
import torch
from scipy import integrate

from minilib.data import Empirical, GaussianMixture, load, names, toy2d
from minilib.data.images import tensor_checksum
from minilib.data.toy2d import TOY2D


def test_digits_splits_are_disjoint_complete_and_stratified():
    sets = [load("digits", split) for split in ("train", "validation", "test")]
    everything = torch.cat([s.index for s in sets])
    assert sorted(everything.tolist()) == list(range(1797))
    for s in sets:
        shares = s.y.bincount(minlength=10) / len(s)
        assert (shares - 0.1).abs().max() < 0.006
        assert s.x.min() == -1 and s.x.max() == 1 and s.x.shape[1:] == (1, 8, 8)


def test_digits_are_the_source_and_never_change():
    from sklearn.datasets import load_digits

    raw = load_digits()
    for split, start in (("train", "6afbb289"), ("validation", "cf3c9aa4"), ("test", "66010f84")):
        s = load("digits", split)
        np.testing.assert_array_equal(((s.x[:, 0] + 1) * 8).numpy(), raw.images[s.index])
        np.testing.assert_array_equal(s.y.numpy(), raw.target[s.index])
        assert s.checksum == tensor_checksum(s.x, s.y) and s.checksum.startswith(start)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"name": "digit"}, KeyError, "digits"),
        ({"name": "digits", "split": "dev"}, ValueError, "validation"),
        ({"name": "digits", "size": 16}, ValueError, "8 x 8"),
        ({"name": "digits", "source": "web"}, ValueError, "vendored"),
    ],
)
def test_bad_requests_are_refused_by_name(kwargs, error, says):
    with pytest.raises(error, match=says):
        load(**kwargs)
    assert "digits" in names()


@pytest.fixture(params=sorted(TOY2D))
def density(request):
    d = toy2d(request.param)
    return GaussianMixture(d.means.double(), d.stds.double(), d.weights.double() / d.weights.double().sum())


LEVELS = [(1.0, 0.3), (0.8, 0.6), (0.1, 0.995)]


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_toy_score_is_the_gradient_of_the_log_density(density, alpha, sigma):
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(x, alpha, sigma).sum(), x)
    assert (gradient - density.score(x, alpha, sigma)).abs().max() < 1e-10


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_toy_denoiser_obeys_tweedie(density, alpha, sigma):
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tweedie = (x + sigma**2 * density.score(x, alpha, sigma)) / alpha
    assert (tweedie - density.denoise(x, alpha, sigma)).abs().max() < 1e-9


def test_toy_density_integrates_to_one_and_the_denoiser_is_the_posterior_mean():
    d = GaussianMixture(
        torch.tensor([[-1.0], [1.5]]).double(),
        torch.tensor([0.3, 0.5]).double(),
        torch.tensor([0.4, 0.6]).double(),
    )
    alpha, sigma, seen = 0.8, 0.6, 0.35

    def p(x0: float) -> float:
        return math.exp(float(d.log_prob(torch.tensor([[x0]]).double())))

    def joint(x0: float) -> float:
        return p(x0) * math.exp(-0.5 * ((seen - alpha * x0) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))

    mass, moment = (integrate.quad(f, -6, 7)[0] for f in (joint, lambda x0: x0 * joint(x0)))
    x = torch.tensor([[seen]]).double()
    assert integrate.quad(p, -6, 7)[0] == pytest.approx(1, abs=1e-7)
    assert float(d.log_prob(x, alpha, sigma).exp()) == pytest.approx(mass, rel=1e-7)
    assert float(d.denoise(x, alpha, sigma)) == pytest.approx(moment / mass, rel=1e-7)


def test_empirical_denoiser_is_a_softmax_over_the_points():
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    weights = (-(torch.cdist(x, 0.7 * points) ** 2) / (2 * 0.4**2)).softmax(1)
    assert (Empirical(points).denoise(x, 0.7, 0.4) - weights @ points).abs().max() < 1e-5
    # without noise only the points themselves have mass
    with pytest.raises(ValueError, match="sigma"):
        Empirical(points).log_prob(x)
    nearly = Empirical(points).denoise(points, 1.0, 1e-3)
    assert (nearly - points).abs().max() < 1e-6


def test_toy_samples_have_the_stated_moments(density):
    x = density.sample(200_000, torch.Generator().manual_seed(0))
    mean = (density.weights[:, None] * density.means).sum(0)
    second = (density.weights[:, None] * (density.means**2 + density.stds[:, None] ** 2)).sum(0)
    assert (x.mean(0) - mean).abs().max() < 0.015
    assert ((x**2).mean(0) - second).abs().max() < 0.03


def test_levels_may_differ_from_sample_to_sample(density):
    x = torch.randn(4, 2, dtype=torch.float64)
    alpha, sigma = torch.tensor([1, 0.9, 0.5, 0.2]).double(), torch.tensor([0.2, 0.4, 0.8, 0.9]).double()
    together = density.denoise(x, alpha[:, None], sigma[:, None])
    apart = torch.cat([density.denoise(x[i : i + 1], float(alpha[i]), float(sigma[i])) for i in range(4)])
    assert (together - apart).abs().max() < 1e-12


def test_wrong_mixtures_are_refused():
    means = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="sum to 1"):
        GaussianMixture(means, torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="as many"):
        GaussianMixture(means, torch.ones(1), torch.ones(2) / 2)
    with pytest.raises(ValueError, match="stds"):
        GaussianMixture(means, -torch.ones(2), torch.ones(2) / 2)
    with pytest.raises(KeyError, match="ring"):
        toy2d("rings")


def test_every_set_is_registered_by_the_module_the_table_names():
    import importlib

    from minilib.data import registry

    for name, module in registry.MODULES.items():
        importlib.import_module(f"minilib.data.{module}")
        assert name in registry._REGISTRY, (name, module)
    assert set(registry._REGISTRY) <= set(registry.MODULES)


def test_a_set_brings_only_its_own_module():
    import subprocess
    import sys

    code = (
        "import sys; from minilib.data import load; load('digits', 'test');"
        "print([m for m in sys.modules if m.startswith('minilib.data.')])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "images" in loaded and not any(
        other in loaded for other in ("emoji", "shapes", "bounce", "photos")
    )
