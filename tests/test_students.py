"""The loss of a student: its parts against formulas written out, both processes, features, gradients, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.intervene import record_outputs
from minilib.losses import (
    class_batches,
    denoising_loss,
    flow_matching_loss,
    uniform_timesteps,
)
from minilib.models import DiT
from minilib.schedulers import DDPMScheduler
from minilib.students import StudentLoss, prediction_errors
from minilib.training import FitConfig, fit


def random_dit(seed=0, learn_sigma=False):
    torch.manual_seed(seed)
    model = DiT(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3, learn_sigma=learn_sigma)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def make_batches():
    g = torch.Generator().manual_seed(7)
    x = torch.rand(20, 1, 4, 4, generator=g) * 2 - 1
    return class_batches(x, torch.randint(3, (20,), generator=g), uniform_timesteps(), null_class=3)


@pytest.fixture
def batch():
    batch = make_batches()(torch.Generator().manual_seed(1), 12)
    batch["t"][0] = 0
    return batch


PROCESSES = {
    "flow": (None, False),
    "epsilon": (DDPMScheduler(), False),
    "v": (DDPMScheduler(prediction_type="v_prediction"), False),
    "learned variance": (DDPMScheduler(), True),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_the_data_term_alone_is_the_ordinary_loss_to_the_bit(process, batch):
    scheduler, learned = PROCESSES[process]
    model, teacher = random_dit(0, learn_sigma=learned), random_dit(1, learn_sigma=learned)
    plain = flow_matching_loss if scheduler is None else denoising_loss(scheduler, vlb_weight=float(learned))
    assert StudentLoss(scheduler, teacher, noise=0.0)(model, batch) == plain(model, batch)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_sum_is_its_parts(process, batch):
    scheduler, learned = PROCESSES[process]
    model, teacher = random_dit(0, learn_sigma=learned), random_dit(1, learn_sigma=learned)
    layers, weights = ("blocks.0.attn", "blocks.1.attn"), (0.7, 0.5, 0.3 * learned, 0.2)
    data, noise, variance, features = weights
    loss = StudentLoss(
        scheduler, teacher, data=data, noise=noise, variance=variance, features=features, layers=layers
    )
    x0, t = batch["x0"], batch["t"]
    if scheduler is None:
        s = (t / 1000).view(-1, 1, 1, 1)
        x_t, plain = x0 + s * (batch["noise"] - x0), flow_matching_loss
    else:
        level = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = level.sqrt() * x0 + (1 - level).sqrt() * batch["noise"]
        plain = denoising_loss(scheduler, vlb_weight=float(learned))
    with torch.no_grad(), record_outputs(model, layers) as ours, record_outputs(teacher, layers) as theirs:
        a, b = model(x_t, t, batch["y"]), teacher(x_t, t, batch["y"])
    wanted = data * plain(model, batch) + noise * (a - b)[:, :1].square().mean()
    if learned:
        wanted = wanted + variance * (a - b)[:, 1:].square().mean()
    distances = [(ours[name][0] - theirs[name][0]).square().mean() for name in layers]
    wanted = wanted + features * sum(distances) / 2
    torch.testing.assert_close(loss(model, batch), wanted, rtol=1e-5, atol=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(batch):
    model, teacher = random_dit(3), random_dit(3)
    loss = StudentLoss(None, teacher, data=0.0, noise=1.0, features=1.0, layers=["blocks.1"])
    assert loss(model, batch) == 0
    errors = prediction_errors(None, model, teacher, batch)
    assert errors["teacher"] == 0 and errors["data"] == pytest.approx(flow_matching_loss(model, batch).item())


def test_errors_are_ratios_of_squares_of_predictions_alone(batch):
    scheduler = DDPMScheduler()
    model, teacher = random_dit(0, learn_sigma=True), random_dit(1, learn_sigma=True)
    x_t = scheduler.add_noise(batch["x0"], batch["noise"], batch["t"])
    with torch.no_grad():
        a, b = (m(x_t, batch["t"], batch["y"])[:, :1] for m in (model, teacher))
    errors = prediction_errors(scheduler, model, teacher, batch)
    assert errors["teacher"] == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-5)
    assert errors["data"] == pytest.approx(float(F.mse_loss(a, batch["noise"])), rel=1e-5)


def test_gradients_reach_the_student_alone(batch):
    model, teacher = random_dit(0, learn_sigma=True), random_dit(1, learn_sigma=True)
    terms = {
        "noise": {},
        "variance": {"variance": 1.0},
        "features": {"features": 1.0, "layers": ["blocks.0"]},
    }
    for term, options in terms.items():
        model.zero_grad()
        noise = float(term == "noise")
        StudentLoss(DDPMScheduler(), teacher, data=0.0, noise=noise, **options)(model, batch).backward()
        rows = model.final_layer.linear.weight.grad
        assert all(p.grad is None for p in teacher.parameters())
        if term == "features":
            assert rows is None or not rows.any()
            assert model.blocks[0].attn.qkv.weight.grad.any(), "the first block learns"
        else:
            assert rows.any()


def test_training_brings_the_student_nearer(batch):
    model, teacher = random_dit(0), random_dit(1)
    before = prediction_errors(None, model, teacher, batch)["teacher"]
    loss = StudentLoss(None, teacher, data=0.0, noise=1.0, features=0.1, layers=["blocks.0"])
    fit(model, loss, make_batches(), FitConfig(steps=60, batch_size=16, lr=1e-2, warmup=5))
    after = prediction_errors(None, model.eval(), teacher, batch)["teacher"]
    assert after < before / 2


@pytest.mark.parametrize(
    "options, text",
    [
        ({"noise": -1.0}, "at least 0"),
        ({"data": 0.0, "noise": 0.0}, "not all of them 0"),
        ({"features": 0.5}, "needs a sequence"),
        ({"layers": ["blocks.0"]}, "needs a sequence"),
        ({"features": 0.5, "layers": "blocks.0"}, "needs a sequence"),
    ],
)
def test_bad_weights_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        StudentLoss(None, random_dit(), **options)


def test_models_that_do_not_fit_are_refused(batch):
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="must predict the same"):
        StudentLoss(scheduler, random_dit(learn_sigma=True))(random_dit(), batch)
    with pytest.raises(ValueError, match="a rectified flow has no variances"):
        StudentLoss(None, random_dit(learn_sigma=True))(random_dit(learn_sigma=True), batch)
    with pytest.raises(ValueError, match="learn_sigma"):
        StudentLoss(scheduler, random_dit(), variance=0.05)(random_dit(), batch)
    with pytest.raises(ValueError, match="must predict the same"):
        prediction_errors(scheduler, random_dit(), random_dit(learn_sigma=True), batch)
