import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minilib import metrics
from minilib.data import load
from minilib.metrics import perceptual
from minilib.metrics.frechet import module_checksum
from minilib.metrics.perceptual import (
    EffNetFeatures,
    as_colour,
    effnet_features,
    effnet_report,
    perceptual_distance,
    random_directions,
)
from minilib.models.efficientnet import load_effnet_lite0


@pytest.fixture(scope="module")
def net():
    return load_effnet_lite0()


@pytest.fixture(scope="module")
def pictures():
    x = load("emoji", "train", 32).x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:240]]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_directions_are_orthonormal_up_to_their_scale_and_fixed():
    basis = random_directions(1280, 64).double()
    assert (basis.T @ basis - torch.eye(64) * 20).abs().max() < 1e-4
    assert torch.equal(random_directions(1280, 64), random_directions(1280, 64))
    assert not torch.equal(random_directions(1280, 64), random_directions(1280, 64, seed=1))
    # the number must not change from machine to machine beyond rounding: two entries, written down once
    first = random_directions(40, 2)
    assert first[0].tolist() == pytest.approx(FIRST_DIRECTIONS, abs=1e-5)


FIRST_DIRECTIONS = [-1.530328, -0.240843]


def test_projection_is_unbiased():
    """Over seeds, the projected distance of two sets that differ in mean has the mean of the full one."""
    a, b = randn(2000, 40), randn(2000, 40, seed=1)
    b[:, :3] += torch.tensor([1.0, -2.0, 0.5])
    full = metrics.frechet_distance(a, b)
    values = [
        metrics.frechet_distance(a @ basis, b @ basis)
        for basis in (random_directions(40, 10, seed) for seed in range(120))
    ]
    error = np.std(values) / len(values) ** 0.5
    # the part of the bias that comes from 2,000 samples shrinks with the dimensions: 40 against 10
    assert abs(np.mean(values) - full) < 3 * error + 0.05 * full
    assert full == pytest.approx(5.25, abs=0.8)


def test_projection_tames_the_bias_of_few_samples():
    """Two halves of one set, wide features: the floor of 60 samples, as a share of what a real difference measures."""
    wide = randn(320, 320, seed=3) / 320**0.5
    a, b, shifted = (randn(60, 320, seed=s) @ wide for s in (0, 1, 2))
    shifted = shifted + 0.3
    basis = random_directions(320, 16)
    raw = metrics.frechet_distance(a, b) / metrics.frechet_distance(a, shifted)
    projected = metrics.frechet_distance(a @ basis, b @ basis) / metrics.frechet_distance(
        a @ basis, shifted @ basis
    )
    assert projected < 0.75 * raw


def test_features_in_batches_and_grey(net, pictures):
    x = pictures[:6]
    together = effnet_features(x, net=net, batch=4)
    assert together.shape == (6, 1280) and (together - net.features(x, 64)).abs().max() < 1e-4
    grey = x.mean(1, keepdim=True)
    tripled = effnet_features(grey.expand(-1, 3, -1, -1), net=net)
    assert torch.equal(effnet_features(grey, net=net), tripled)
    oracle = EffNetFeatures(net, dims=16)
    assert (oracle.features(x) - net.features(x, 64) @ oracle.basis).abs().max() < 1e-4
    assert torch.equal(EffNetFeatures(net, dims=None).features(x), net.features(x, 64))
    with pytest.raises(ValueError, match="1 or 3 channels"):
        as_colour(torch.zeros(1, 2, 8, 8))


def test_report_orders_real_damaged_and_noise(net, pictures):
    oracle = EffNetFeatures(net, dims=20)
    reference, held, fake = pictures[:80], pictures[80:160], pictures[160:]
    honest = effnet_report(fake, reference, held, oracle=oracle)
    blurred = F.interpolate(F.avg_pool2d(fake, 4), 32, mode="bilinear")
    damaged = effnet_report(blurred, reference, held, oracle=oracle)
    assert honest.over_floor < 1.4 < 2 < damaged.over_floor and damaged.value < damaged.ceiling
    assert (honest.n, honest.n_reference) == (80, 80)
    assert honest.net_checksum == module_checksum(oracle)
    assert module_checksum(EffNetFeatures(net, dims=20, seed=1)) != honest.net_checksum
    assert honest.floor == pytest.approx(
        metrics.frechet_distance(oracle.features(held), oracle.features(reference)), rel=1e-3
    )


def test_report_refuses_too_few_images(net, pictures):
    with pytest.raises(ValueError, match=r"39 images are too few for 20 .*dims=19"):
        effnet_report(pictures[:60], pictures[:60], pictures[:39], oracle=EffNetFeatures(net, dims=20))
    with pytest.raises(ValueError, match=r"1\.\.1280"):
        EffNetFeatures(net, dims=1281)


@pytest.fixture(scope="module")
def photo():
    return load("photos", "test").grid(128, 2)[0][:3]


@torch.no_grad()
def test_perceptual_distance_is_a_symmetric_distance_that_grows_with_damage(net, photo):
    noise = randn(*photo.shape)
    zero = perceptual_distance(photo, photo, net=net)
    assert zero.abs().max() == 0
    damaged = {
        "noise": [(photo + s * noise).clamp(-1, 1) for s in (0.02, 0.1, 0.4)],
        "blur": [F.interpolate(F.avg_pool2d(photo, s), 128, mode="bilinear") for s in (2, 4, 8)],
        "contrast": [photo * s for s in (0.8, 0.5, 0.2)],
    }
    for kind, images in damaged.items():
        d = torch.stack([perceptual_distance(photo, image, net=net) for image in images])
        assert (d[1:] > d[:-1]).all() and (d > 0).all(), (kind, d)
    one, other = damaged["noise"][1], damaged["blur"][1]
    assert (
        perceptual_distance(one, other, net=net) - perceptual_distance(other, one, net=net)
    ).abs().max() < 1e-6
    assert perceptual_distance(photo, photo.flip(0), net=net)[0] > 0.2


@torch.no_grad()
def test_perceptual_distance_is_its_formula(net, photo):
    a, b = photo[:1], photo[1:2]
    expected = 0.0
    for p, q in zip(net.levels(a).values(), net.levels(b).values(), strict=True):
        p, q = (m[0].double().numpy() for m in (p, q))
        p, q = (m / np.sqrt((m**2).sum(0)) for m in (p, q))
        expected += ((p - q) ** 2).sum(0).mean() / 5
    assert float(perceptual_distance(a, b, net=net)) == pytest.approx(expected, rel=1e-5)
    assert float(perceptual_distance(a, b, net=net, size=64)) != pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_perceptual_distance_forgives_a_shift_that_pixels_do_not(net, photo):
    """A shift by two pixels and a blur of equal squared error: the shift looks closer."""
    shifted, a = photo[..., 2:126], photo[..., :124]
    target = (shifted - a).square().mean((1, 2, 3))
    noise = randn(*a.shape)
    noisy = a + noise * target.sqrt().view(-1, 1, 1, 1)
    assert ((noisy - a).square().mean((1, 2, 3)) / target - 1).abs().max() < 0.05
    near, far = (perceptual_distance(a, other, net=net) for other in (shifted, noisy))
    assert (near < far).all(), (near, far)


def test_perceptual_distance_has_gradients_and_checks_shapes(net, photo):
    a = photo[:1, :, :64, :64].clone().requires_grad_()
    perceptual_distance(a, photo[1:2, :, :64, :64], net=net).sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0
    same = photo[:1, :, :64, :64].clone().requires_grad_()
    perceptual_distance(same, same.detach(), net=net).sum().backward()
    assert same.grad.isfinite().all()
    with pytest.raises(ValueError, match="same shape"):
        perceptual_distance(photo, photo[..., :64], net=net)


def test_the_names_do_not_mislead():
    text = " ".join(perceptual.__doc__.split())
    assert "Neither is comparable with a published FID or LPIPS" in text
