import math

import pytest
import torch
from torch import nn

from minilib.losses import (
    class_batches,
    denoising_loss,
    discretised_log_likelihood,
    flow_matching_loss,
    uniform_timesteps,
    vlb_term,
)
from minilib.schedulers import DDPMScheduler


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(12, 1, 4, 4).clamp(-1, 1)
Y = torch.arange(12) % 3


class Says(nn.Module):
    """A model that answers with what it was given."""

    def __init__(self, out):
        super().__init__()
        self.out, self.seen = out, []

    def forward(self, x, t, y):
        self.seen.append((x, t, y))
        return self.out


def test_batches_hold_all_the_randomness_of_a_step():
    make = class_batches(X, Y, uniform_timesteps(1000), null_class=3)
    a, b, c = (make(torch.Generator().manual_seed(s), 64) for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["noise"], c["noise"])
    assert set(a) == {"x0", "y", "noise", "t"} and all(len(v) == 64 for v in a.values())
    assert a["t"].min() >= 0 and a["t"].max() < 1000


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_stated_rate(p):
    make = class_batches(X, Y, uniform_timesteps(), null_class=3, label_dropout=p)
    y = make(torch.Generator().manual_seed(0), 20_000)["y"]
    assert float((y == 3).double().mean()) == pytest.approx(p, abs=0.01)


def test_labels_stay_with_their_images():
    make = class_batches(X, Y, uniform_timesteps(), null_class=3, label_dropout=0.0)
    batch = make(torch.Generator().manual_seed(0), 50)
    for image, label in zip(batch["x0"], batch["y"], strict=True):
        assert label == Y[(X == image).flatten(1).all(1)][0]


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="labels"):
        class_batches(X, Y[:3], uniform_timesteps(), null_class=3)
    with pytest.raises(ValueError, match="probability"):
        class_batches(X, Y, uniform_timesteps(), null_class=3, label_dropout=1.5)


def batch(t):
    return {"x0": X, "y": Y, "noise": randn(*X.shape, seed=1), "t": t}


def test_flow_matching_loss_by_hand():
    b = batch(torch.linspace(0, 1000, 12))
    model = Says(randn(*X.shape, seed=2))
    s = torch.linspace(0, 1, 12).reshape(-1, 1, 1, 1)
    expected = ((model.out - (b["noise"] - X)) ** 2).mean()
    assert torch.allclose(flow_matching_loss(model, b), expected)
    assert torch.allclose(model.seen[0][0], (1 - s) * X + s * b["noise"])
    assert flow_matching_loss(Says(b["noise"] - X), b) == 0


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_denoising_loss_is_zero_at_its_target_and_nowhere_else(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    b = batch(torch.arange(12) * 80)
    a = scheduler.alphas_cumprod[b["t"]].reshape(-1, 1, 1, 1).float()
    targets = {"epsilon": b["noise"], "sample": X, "v_prediction": a.sqrt() * b["noise"] - (1 - a).sqrt() * X}
    for name, target in targets.items():
        value = denoising_loss(scheduler)(Says(target), b)
        assert (float(value) < 1e-10) == (name == kind)
    model = Says(targets[kind])
    denoising_loss(scheduler)(model, b)
    assert torch.allclose(model.seen[0][0], a.sqrt() * X + (1 - a).sqrt() * b["noise"], atol=1e-5)


def hybrid(kind="epsilon"):
    return DDPMScheduler(
        prediction_type=kind, variance_type="learned_range", beta_schedule="squaredcos_cap_v2"
    )


def test_the_variational_term_is_the_kl_of_torch_distributions():
    scheduler = hybrid()
    t = torch.arange(1, 13) * 70
    b = batch(t)
    x_t = scheduler.add_noise(X, b["noise"], t)
    v = randn(*X.shape, seed=3)
    out = torch.cat([b["noise"] + 0.1, v], 1)
    got = vlb_term(scheduler, X, x_t, t, out, 1 / 8)
    # in float64 from alphas_cumprod alone
    bar = scheduler.alphas_cumprod.double()
    bar_t, bar_p = bar[t].reshape(-1, 1, 1, 1), bar[t - 1].reshape(-1, 1, 1, 1)
    beta = 1 - bar_t / bar_p

    def mean(x0):
        return (
            bar_p.sqrt() * beta / (1 - bar_t) * x0
            + (1 - beta).sqrt() * (1 - bar_p) / (1 - bar_t) * x_t.double()
        )

    small = (1 - bar_p) / (1 - bar_t) * beta
    x0_hat = (x_t.double() - (1 - bar_t).sqrt() * (b["noise"].double() + 0.1)) / bar_t.sqrt()
    log_variance = (v.double() + 1) / 2 * beta.log() + (1 - v.double()) / 2 * small.log()
    q = torch.distributions.Normal(mean(X.double()), small.sqrt())
    p = torch.distributions.Normal(mean(x0_hat), torch.exp(0.5 * log_variance))
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    assert ((got - expected) / expected).abs().max() < 2e-3


def test_at_time_zero_the_term_is_the_likelihood_of_the_grey_level():
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0]).reshape(4, 1, 1, 1)
    mean, log_variance = torch.zeros_like(x) + 0.1, torch.full_like(x, -3.0)
    normal = torch.distributions.Normal(0.1, math.exp(-1.5))
    masses = [
        normal.cdf(torch.tensor(-1 + 1 / 16)),
        normal.cdf(torch.tensor(-0.5 + 1 / 16)) - normal.cdf(torch.tensor(-0.5 - 1 / 16)),
        normal.cdf(torch.tensor(1 / 16)) - normal.cdf(torch.tensor(-1 / 16)),
        1 - normal.cdf(torch.tensor(1 - 1 / 16)),
    ]
    got = discretised_log_likelihood(x, mean, log_variance, 1 / 8).flatten()
    assert (got - torch.stack(masses).log()).abs().max() < 1e-4
    # over all grey levels the masses sum to one
    levels = torch.linspace(-1, 1, 17).reshape(-1, 1, 1, 1)
    whole = discretised_log_likelihood(
        levels, torch.full_like(levels, 0.3), torch.full_like(levels, -2.0), 1 / 8
    )
    assert float(whole.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_hybrid_loss_trains_variances_without_moving_means():
    scheduler = hybrid()
    b = batch(torch.arange(12) * 80)
    out = torch.cat([b["noise"] + 0.2, randn(*X.shape, seed=3)], 1).requires_grad_()
    simple_only = torch.autograd.grad(denoising_loss(scheduler)(Says(out), b), out)[0]
    both = torch.autograd.grad(denoising_loss(scheduler, vlb_weight=1.0)(Says(out), b), out)[0]
    assert torch.allclose(simple_only[:, :1], both[:, :1]) and simple_only[:, 1:].abs().max() == 0
    assert both[:, 1:].abs().max() > 0
    with pytest.raises(ValueError, match="learn_sigma"):
        denoising_loss(scheduler, vlb_weight=1.0)(Says(b["noise"]), b)


def test_the_best_variance_minimises_the_term():
    """With the exact mean the KL is smallest where the predicted variance is the posterior's: v = -1."""
    scheduler, t = hybrid(), torch.full((12,), 500)
    b = batch(t)
    x_t = scheduler.add_noise(X, b["noise"], t)
    values = [
        float(vlb_term(scheduler, X, x_t, t, torch.cat([b["noise"], torch.full_like(X, v)], 1), 1 / 8).mean())
        for v in (-3.0, -1.0, 1.0)
    ]
    assert min(values) == values[1] and abs(values[1]) < 1e-5


def test_batches_are_not_changed():
    b = batch(torch.arange(12) * 80)
    before = {k: v.clone() for k, v in b.items()}
    flow_matching_loss(Says(b["noise"]), b)
    denoising_loss(hybrid(), vlb_weight=1.0)(Says(torch.cat([b["noise"], b["noise"]], 1)), b)
    assert all(torch.equal(b[k], before[k]) for k in b)
