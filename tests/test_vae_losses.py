import math

import pytest
import torch
from torch import nn

from minilib.adversarial import (
    autoencoder_loss,
    fit_adversarial,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from minilib.models import ConvVAE, DiagonalGaussian, PatchDiscriminator, SceneOracle
from minilib.training import FitConfig, fit
from minilib.vae_losses import (
    VAELoss,
    WithLogVariance,
    adaptive_weight,
    perceptual_distance,
    reconstruction_nll,
    scene_feature_maps,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny():
    torch.manual_seed(0)
    return WithLogVariance(ConvVAE(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2))


def batches(generator, n):
    x = torch.randn(n, 3, 1, 1, generator=generator).clamp(-1, 1).expand(-1, -1, 8, 8).contiguous()
    return {"x": x, "noise": torch.randn(n, 2, 4, 4, generator=generator)}


class TestPerceptual:
    def test_closed_form(self):
        """At right angles two unit vectors are sqrt(2) apart, opposite ones 2; lengths do not matter."""
        a = torch.zeros(2, 2, 1, 2)
        a[:, 0] = 3.0
        b = torch.zeros(2, 2, 1, 2)
        b[0, 1] = 5.0
        b[1, 0, 0, 0], b[1, 0, 0, 1] = -1.0, 7.0
        torch.testing.assert_close(perceptual_distance([a], [b]), torch.tensor([2.0, 2.0]))
        torch.testing.assert_close(perceptual_distance([a, a], [b, a]), torch.tensor([2.0, 2.0]))
        torch.testing.assert_close(perceptual_distance([a, a], [b, b]), torch.tensor([4.0, 4.0]))

    def test_zero_features_do_no_harm(self):
        a = torch.zeros(1, 2, 2, 2, requires_grad=True)
        perceptual_distance([a], [torch.zeros(1, 2, 2, 2)]).sum().backward()
        assert torch.equal(a.grad, torch.zeros_like(a))

    def test_layers_must_match(self):
        with pytest.raises(ValueError, match="got 1 and 2"):
            perceptual_distance([torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 1, 1, 1)] * 2)

    def test_the_oracle_s_convolutions(self):
        oracle = SceneOracle(16, width=4, hidden=4)
        maps = scene_feature_maps(oracle)
        x = randn(2, 3, 16, 16).requires_grad_()
        found = maps(x)
        assert [m.shape for m in found] == [(2, 4, 16, 16)] * 2
        torch.testing.assert_close(found[-1], oracle.convolutions(x))
        perceptual_distance(found, maps(randn(2, 3, 16, 16, seed=1))).sum().backward()
        assert x.grad.abs().max() > 0 and all(p.grad is None for p in oracle.parameters())
        assert float(perceptual_distance(maps(x), maps(x)).max().detach()) == 0.0


class TestLikelihood:
    def test_closed_form_and_sums_over_an_image(self):
        x = torch.zeros(2, 3, 4, 4)
        y = torch.full_like(x, 0.5)
        nll = reconstruction_nll(x, y, torch.tensor(math.log(2.0)))
        assert nll.item() == pytest.approx(48 * (0.5 / 2 + math.log(2)))
        distance = torch.tensor([1.0, 3.0])
        nll = reconstruction_nll(x, y, torch.tensor(0.0), distance, perceptual_weight=0.1, mse_weight=2.0)
        assert nll.item() == pytest.approx(48 * (0.5 + 2 * 0.25 + 0.1 * 2.0))

    def test_the_best_log_variance_is_the_log_of_the_mean_error(self):
        x, y = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1)
        logvar = (x - y).abs().mean().log().requires_grad_()
        reconstruction_nll(x, y, logvar).backward()
        assert abs(logvar.grad) < 1e-4

    def test_the_loss_is_the_sum_of_its_terms_a_value(self):
        model, batch = tiny(), batches(torch.Generator().manual_seed(0), 3)
        loss = VAELoss(kl_weight=0.5)
        terms = loss.terms(model, batch)
        posterior = model.vae.encode(batch["x"])
        assert isinstance(posterior, DiagonalGaussian)
        torch.testing.assert_close(terms.kl, posterior.kl().mean())
        y = model.vae.decode(posterior.at(batch["noise"]))
        torch.testing.assert_close(terms.nll, (batch["x"] - y).abs().sum() / 3)
        torch.testing.assert_close(loss(model, batch), (terms.nll + 0.5 * terms.kl) / (3 * 8 * 8))

    def test_the_perceptual_term_is_weighted(self):
        model, batch = tiny(), batches(torch.Generator().manual_seed(0), 3)
        maps = lambda x: [x]  # noqa: E731
        plain, with_it = VAELoss(), VAELoss(maps, perceptual_weight=2.0)
        gap = perceptual_distance([plain.terms(model, batch).reconstruction], [batch["x"]]).mean()
        torch.testing.assert_close(with_it(model, batch) - plain(model, batch), 2.0 * gap)


class TestAdaptiveWeight:
    def test_against_gradients_by_hand(self):
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        first, second = (3 * w[0] + 4 * w[1]).square() / 2, w.sum() * 2
        # d first = (3 w0 + 4 w1) (3, 4) = 11 * (3, 4), norm 55; d second = (2, 2), norm sqrt(8).
        weight = adaptive_weight(first, second, w)
        assert weight.item() == pytest.approx(0.5 * 55 / (8**0.5 + 1e-4), rel=1e-6)
        assert not weight.requires_grad
        (first + weight * second).backward()
        assert w.grad is not None

    def test_the_weighted_gradient_is_half_as_long(self):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        h = layer(randn(8, 4))
        first, second = h.square().sum(), h.sin().sum() * 1e3
        weight = adaptive_weight(first, second, layer.weight)
        norms = [
            torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
            for loss in (first, weight * second)
        ]
        assert float(norms[1] / norms[0]) == pytest.approx(0.5, rel=1e-4)

    def test_it_is_bounded(self):
        w = torch.ones(1, requires_grad=True)
        assert adaptive_weight((1e9 * w).sum(), (0 * w).sum(), w).item() == pytest.approx(0.5 * 1e4)
        assert adaptive_weight(
            (1e9 * w).sum(), (0 * w).sum(), w, scale=0.1, maximum=1e8
        ).item() == pytest.approx(1e7)


class TestHinge:
    def test_closed_form(self):
        real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
        assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
        assert hinge_discriminator_loss(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0.0
        assert hinge_generator_loss(fake).item() == pytest.approx(1.0)


class TestLoops:
    def test_plain_fit_serves_and_learns_the_log_variance(self):
        result = fit(
            tiny(), VAELoss(), batches, FitConfig(steps=60, batch_size=8, lr=1e-2, warmup=5), device="cpu"
        )
        assert sum(result.history[-10:]) < 0.7 * sum(result.history[:10])
        assert result.model.logvar < -0.05 and isinstance(result.ema.vae, ConvVAE)

    def test_the_adversarial_term_has_the_adaptive_weight(self):
        model, batch = tiny(), batches(torch.Generator().manual_seed(0), 2)
        discriminator = PatchDiscriminator(width=4, layers=1)
        plain, y = autoencoder_loss(model, VAELoss(), batch, None, 0.5)
        both, _ = autoencoder_loss(model, VAELoss(), batch, discriminator, 0.5)
        last = model.vae.decoder.conv_out.weight
        fooling = -discriminator(y).mean()
        norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (plain * 192, fooling)]
        wanted = 0.5 * norms[0] / (norms[1] + 1e-4) * fooling / 192
        torch.testing.assert_close(both - plain, wanted, rtol=1e-3, atol=1e-6)

    def test_before_the_start_the_discriminator_rests_and_the_autoencoder_trains_as_without(self):
        config = FitConfig(steps=4, batch_size=4, warmup=0, decay_fraction=0.0)
        runs = []
        for start in (4, 3, 0):
            model, discriminator = tiny(), PatchDiscriminator(width=4, layers=1)
            before = [p.detach().clone() for p in discriminator.parameters()]
            result = fit_adversarial(model, discriminator, VAELoss(), batches, config, start=start)
            moved = any(
                not torch.equal(a, b) for a, b in zip(before, discriminator.parameters(), strict=True)
            )
            assert moved == (start < 4) and len(result.history) == 4
            assert all(p.grad is None for p in discriminator.parameters())
            runs.append(result)
        assert runs[0].history[:3] == runs[1].history[:3] and runs[0].history[3] != runs[1].history[3]
        plain = fit(tiny(), VAELoss(), batches, config, device="cpu")
        assert runs[0].history == pytest.approx(plain.history, rel=1e-5)
        for a, b in zip(runs[0].ema.parameters(), plain.ema.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_the_discriminator_learns_to_tell(self):
        model = tiny().requires_grad_(True)
        torch.manual_seed(1)
        discriminator = PatchDiscriminator(width=8, layers=1)
        config = FitConfig(steps=20, batch_size=4, lr=3e-3, warmup=0, decay_fraction=0.0, betas=(0.5, 0.9))
        fit_adversarial(model, discriminator, VAELoss(), batches, config, start=0)
        batch = batches(torch.Generator().manual_seed(99), 32)
        with torch.no_grad():
            real, fake = discriminator(batch["x"]), discriminator(model.vae(batch["x"])[0])
        assert real.mean() > fake.mean()

    def test_a_loss_that_is_not_finite_stops_it(self):
        def bad(generator, n):
            return {k: v * torch.nan if k == "x" else v for k, v in batches(generator, n).items()}

        with pytest.raises(FloatingPointError, match="at step 0"):
            fit_adversarial(
                tiny(),
                PatchDiscriminator(width=4, layers=1),
                VAELoss(),
                bad,
                FitConfig(steps=1, batch_size=2),
                start=0,
            )
