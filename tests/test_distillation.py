"""Distillation: the mask, the two feature losses, the whole loss against its parts written out, gradients, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.distillation import (
    DistillationLoss,
    feature_loss,
    last_of_each_share,
    ordinary,
    variance_distillation,
)
from minilib.losses import class_batches, denoising_loss, uniform_timesteps, vlb_term
from minilib.models import DiT
from minilib.pruning import drop_blocks
from minilib.recipes import ddpm_scheduler
from minilib.schedulers import DDPMScheduler
from minilib.training import FitConfig, fit


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_dit(depth=4, seed=0, **options):
    torch.manual_seed(seed)
    model = DiT(input_size=4, hidden_size=16, depth=depth, num_heads=2, num_classes=3, **options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture
def batch():
    g = seeded(7)
    x = torch.rand(20, 1, 4, 4, generator=g) * 2 - 1
    make = class_batches(x, torch.randint(3, (20,), generator=g), uniform_timesteps(), null_class=3)
    batch = make(g, 12)
    batch["t"][0] = 0  # the likelihood's case
    return batch


def test_ordinary_values_by_hand():
    x = torch.randn(3, 6, 5, generator=seeded())
    mask = ordinary(x, 1.5)
    for i in range(3):
        values = x[i].flatten().double()
        mean = values.sum() / 30
        deviation = ((values - mean).square().sum() / 29).sqrt()
        wanted = (values - mean).abs() < 1.5 * deviation
        assert torch.equal(mask[i].flatten(), wanted), "each example has its own mean and deviation"


def test_a_share_of_normal_values_is_not_ordinary():
    share = 1 - ordinary(torch.randn(2, 300, 300, generator=seeded())).float().mean()
    assert float(share) == pytest.approx(math.erfc(2 / math.sqrt(2)), abs=0.003)


def test_massive_activations_count_in_the_plain_loss_only():
    a, b = (torch.randn(4, 16, 96, generator=seeded(i)) for i in range(2))
    big_a, big_b = a.clone(), b.clone()
    big_a[..., 5] *= 100
    big_b[..., 5] *= 100
    plain = feature_loss(big_a, big_b) / feature_loss(a, b)
    masked = feature_loss(big_a, big_b, deviations=2.0) / feature_loss(a, b, deviations=2.0)
    assert plain > 50 and 0.5 < masked < 2


def test_feature_losses_by_hand_and_their_gradients():
    student = torch.randn(2, 3, 4, generator=seeded(), requires_grad=True)
    teacher = torch.randn(2, 3, 4, generator=seeded(1), requires_grad=True)
    loss = feature_loss(student, teacher)
    assert loss.item() == pytest.approx((student - teacher).square().sum().item() / 24, rel=1e-5)
    masked = feature_loss(student, teacher, deviations=1.0)
    kept, goal = student * ordinary(student, 1.0), teacher * ordinary(teacher, 1.0)
    assert masked.item() == pytest.approx((kept - goal).square().mean().item(), rel=1e-5)
    masked.backward()
    assert teacher.grad is None and torch.equal(student.grad != 0, ordinary(student, 1.0) & (kept != goal))
    assert float(feature_loss(student, student.detach().clone())) == 0.0


def test_the_released_pairs():
    assert last_of_each_share(14, 28) == [(i, 2 * i + 1) for i in range(14)]
    assert last_of_each_share(7, 14)[-1] == (6, 13) and last_of_each_share(3, 3) == [(0, 0), (1, 1), (2, 2)]


def test_variance_distillation_is_zero_for_the_teacher_itself_and_trains_variances_only(batch):
    scheduler = ddpm_scheduler()
    x_t = scheduler.add_noise(batch["x0"], batch["noise"], batch["t"])
    out = torch.randn(12, 2, 4, 4, generator=seeded(), requires_grad=True)
    args = (scheduler, batch["x0"], x_t, batch["t"])
    own = variance_distillation(*args, out, out.detach(), bin_width=1 / 512)
    assert own[1:].abs().max() < 1e-5 and own[0] > 0, "at t = 0 it is a likelihood, which does not vanish"
    assert torch.allclose(own[0], vlb_term(*args, out, 1 / 512)[0])
    other = torch.randn(12, 2, 4, 4, generator=seeded(1))
    value = variance_distillation(*args, out, other)
    assert (value[1:] > 0).all()
    value.mean().backward()
    assert not out.grad[:, 0].any() and out.grad[:, 1].any()


def test_variance_distillation_of_one_pixel_by_hand():
    scheduler = ddpm_scheduler()
    t = torch.tensor([500])
    shape = (1, 1, 1, 1)
    x0, x_t = torch.full(shape, 0.3), torch.full(shape, -0.2)
    student, teacher = torch.tensor([0.5, 0.4]).view(1, 2, 1, 1), torch.tensor([0.1, -0.6]).view(1, 2, 1, 1)
    bar, before = (scheduler.alphas_cumprod[i].double() for i in (500, 499))
    beta = 1 - bar / before
    small = (1 - before) / (1 - bar) * beta

    def step(out):
        epsilon, v = out.flatten().double()
        mean = (x_t.item() - beta / (1 - bar).sqrt() * epsilon) / (1 - beta).sqrt()
        return mean, ((v + 1) / 2 * beta.log() + (1 - v) / 2 * small.log()).exp()

    (m1, v1), (m2, v2) = step(teacher), step(student)
    wanted = 0.5 * (v1 / v2 - 1 - (v1 / v2).log() + (m1 - m2) ** 2 / v2) / math.log(2)
    found = variance_distillation(scheduler, x0, x_t, t, student, teacher)
    assert float(found) == pytest.approx(float(wanted), rel=1e-3)


def test_without_the_teacher_it_is_the_ordinary_loss_to_the_bit(batch):
    teacher, student = random_dit(), random_dit(2, seed=1)
    scheduler = ddpm_scheduler()
    loss = DistillationLoss(scheduler, teacher, alpha=0.0)(student, batch)
    assert torch.equal(loss, denoising_loss(scheduler, vlb_weight=1.0)(student, batch))


@pytest.mark.parametrize("deviations", [None, 2.0])
def test_the_whole_loss_is_the_sum_of_its_parts(batch, deviations):
    scheduler, teacher, student = ddpm_scheduler(), random_dit(), random_dit(2, seed=1)
    pairs = last_of_each_share(2, 4)
    loss = DistillationLoss(
        scheduler, teacher, alpha=0.7, pairs=pairs, feature_weight=0.3, deviations=deviations
    )(student, batch)
    x_t = scheduler.add_noise(batch["x0"], batch["noise"], batch["t"])
    args = (x_t, batch["t"], batch["y"])

    def features(model):
        c, h, found = F.silu(model.embed_condition(*args[1:])), model.x_embedder(x_t) + model.pos_embed, []
        for block in model.blocks:
            h = block(h, c)
            found.append(h)
        return found

    with torch.no_grad():
        out, goal, ours, theirs = student(*args), teacher(*args), features(student), features(teacher)
        kd = F.mse_loss(out[:, :1], goal[:, :1])
        kd = kd + variance_distillation(scheduler, batch["x0"], x_t, batch["t"], out, goal).mean()
        data = denoising_loss(scheduler, vlb_weight=1.0)(student, batch)
        feats = [feature_loss(ours[i], theirs[j], deviations=deviations) for i, j in ((0, 1), (1, 3))]
        wanted = 0.7 * kd + 0.3 * data + 0.3 * sum(feats) / 2
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.blocks.parameters())


def test_models_without_learned_variances_and_other_targets(batch):
    for kind in ("v_prediction", "sample"):
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
        teacher, student = random_dit(learn_sigma=False), random_dit(2, seed=1, learn_sigma=False)
        loss = DistillationLoss(scheduler, teacher, alpha=0.5)(student, batch)
        x_t = scheduler.add_noise(batch["x0"], batch["noise"], batch["t"])
        with torch.no_grad():
            kd = F.mse_loss(student(x_t, batch["t"], batch["y"]), teacher(x_t, batch["t"], batch["y"]))
            data = denoising_loss(scheduler)(student, batch)
        assert float(loss) == pytest.approx(float(0.5 * kd + 0.5 * data), rel=1e-5)


def test_a_feature_weight_of_zero_costs_nothing_and_can_be_changed(batch):
    teacher, student = random_dit(), random_dit(2, seed=1)
    loss = DistillationLoss(ddpm_scheduler(), teacher, pairs=last_of_each_share(2, 4), feature_weight=0.5)
    with_features = loss(student, batch)
    loss.feature_weight = 0.0
    assert torch.equal(loss(student, batch), DistillationLoss(ddpm_scheduler(), teacher)(student, batch))
    assert loss(student, batch) < with_features


def test_a_student_learns_from_its_teacher(batch):
    """The distance from the teacher falls by a fifth in 8 steps."""
    teacher = random_dit()
    make = lambda generator, n: {k: v[:n] for k, v in batch.items()}  # noqa: E731
    pairs = last_of_each_share(2, 4)
    loss = DistillationLoss(ddpm_scheduler(), teacher, alpha=1.0, pairs=pairs, feature_weight=0.01)
    student = drop_blocks(teacher, (0, 3))
    result = fit(student, loss, make, FitConfig(steps=8, batch_size=12, lr=5e-3, warmup=2))
    assert result.history[-1] < 0.8 * result.history[0]


def test_bad_input_is_refused_by_name(batch):
    with pytest.raises(ValueError, match=r"alpha is the teacher's share .* got 1.5"):
        DistillationLoss(ddpm_scheduler(), random_dit(), alpha=1.5)
    with pytest.raises(ValueError, match="do not fall into 3 equal shares"):
        last_of_each_share(3, 8)
    with pytest.raises(ValueError, match="a student of another width needs a projection"):
        feature_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 8))
    loss = DistillationLoss(ddpm_scheduler(), random_dit(learn_sigma=False))
    with pytest.raises(ValueError, match="both must predict the same"):
        loss(random_dit(2, seed=1), batch)
