import pytest
import torch
from torch import nn

from minilib.data import GaussianMixture
from minilib.metrics.diffusion_classifier import LOSSES, diffusion_classifier, even_timesteps, stage_positions
from minilib.models import DiT
from minilib.profiling import count_calls
from minilib.schedulers import DDPMScheduler


def scheduler(prediction_type="epsilon"):
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def two_gaussians(stds):
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return [GaussianMixture(means[i : i + 1], std * one, one) for i, std in enumerate(stds)]


def exact_epsilon(parts, s):
    """The best noise predictor of each class, in closed form."""

    def model(x_t, t, y):
        alpha, sigma = (float(v[0]) for v in s.levels(t, x_t))
        clean = torch.stack([part.denoise(x_t, alpha, sigma) for part in parts])
        return (x_t - alpha * clean[y, torch.arange(len(y))]) / sigma

    return model


def tiny_dit(dtype=torch.float64):
    """A DiT whose output depends on everything: a fresh one returns zeros."""
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=6).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(1)))
    return model.to(dtype)


def images(n=5, dtype=torch.float64):
    return torch.randn(n, 1, 4, 4, generator=generator(2), dtype=dtype)


GRID = torch.cartesian_prod(*[torch.linspace(-2, 2, 9, dtype=torch.float64)] * 2)
# Mean zero, covariance one: the mean over these four is exact for every quadratic function of the noise.
FOUR = 2**0.5 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("stds", [(0.35, 0.35), (0.25, 0.5)])
def test_errors_integrated_over_log_snr_are_the_likelihood_ratio(stds):
    s, parts = scheduler(), two_gaussians(stds)
    t = even_timesteps(50)
    errors = diffusion_classifier(
        exact_epsilon(parts, s), s, GRID, [0, 1], t.repeat_interleave(4), noise=FOUR.repeat(len(t), 1)
    ).errors
    per_t = 2 * errors.view(len(GRID), len(t), 4, 2).mean(
        2
    )  # summed over both coordinates, averaged over noise
    log_snr = torch.logit(s.alphas_cumprod_f64[t])
    estimate = 0.5 * torch.trapezoid((per_t[..., 1] - per_t[..., 0]).flip(1), log_snr.flip(0), dim=1)
    ratio = parts[0].log_prob(GRID) - parts[1].log_prob(GRID)
    assert (estimate - ratio).abs().max() < 5e-3 * (ratio.max() - ratio.min())


def test_it_finds_the_bayes_class_of_two_equal_gaussians():
    s, parts = scheduler(), two_gaussians((0.35, 0.35))
    x = GRID[GRID[:, 0] != 0]
    for noise in ({"generator": generator()}, {"noise": torch.zeros(20, 2, dtype=torch.float64)}):
        found = diffusion_classifier(exact_epsilon(parts, s), s, x, [0, 1], even_timesteps(20), **noise)
        assert torch.equal(found.predictions, (x[:, 0] > 0).long())


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_full_evaluation_equals_plain_loops(loss):
    s, model, x, classes, t = scheduler(), tiny_dit(), images(3), [4, 0, 2], torch.tensor([30, 500, 900])
    noise = torch.randn(3, 3, 1, 4, 4, generator=generator(3), dtype=torch.float64)
    found = diffusion_classifier(model, s, x, classes, t, noise=noise, loss=loss)
    for i in range(3):
        for j, time in enumerate(t.tolist()):
            for k, label in enumerate(classes):
                a = s.alphas_cumprod_f64[time]
                x_t = a.sqrt() * x[i] + (1 - a).sqrt() * noise[i, j]
                with torch.no_grad():
                    out = model(x_t[None], torch.tensor([time]), torch.tensor([label]))[
                        0, :1
                    ]  # not the variance
                gap = noise[i, j] - out
                expected = gap.abs().mean() if loss == "l1" else (gap * gap).mean()
                assert float(found.errors[i, j, k]) == pytest.approx(float(expected), rel=1e-9)
    best = found.errors.mean(1).argmin(1)
    assert found.predictions.tolist() == [classes[k] for k in best]
    assert found.evaluations.tolist() == [9, 9, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeping_all_classes_changes_no_bit(dtype):
    s, model, x, t = scheduler(), tiny_dit(dtype), images(dtype=dtype), even_timesteps(12)
    full = diffusion_classifier(model, s, x, range(6), t, generator=generator())
    staged = diffusion_classifier(
        model, s, x, range(6), t, generator=generator(), stages=[(3, 6), (5, 6), (12, 1)]
    )
    assert torch.equal(full.errors, staged.errors) and torch.equal(full.predictions, staged.predictions)
    assert torch.equal(full.evaluations, staged.evaluations) and full.evaluations.tolist() == [72] * 5


def test_stages_prune_on_common_timesteps():
    s, model, x, t = scheduler(), tiny_dit(), images(20), even_timesteps(20)
    stages = [(1, 3), (10, 2), (20, 1)]
    full = diffusion_classifier(model, s, x, range(6), t, generator=generator())
    adaptive = diffusion_classifier(model, s, x, range(6), t, generator=generator(), stages=stages)
    first, second, third = stage_positions(20, stages)
    assert adaptive.evaluations.tolist() == [len(first) * 6 + len(second) * 3 + len(third) * 2] * 20
    changed = 0
    for errors, seen, prediction in zip(
        full.errors, adaptive.errors, adaptive.predictions.tolist(), strict=True
    ):
        alive = list(range(6))
        used: list[int] = []
        for new, (_, keep) in zip((first, second, third), stages, strict=True):
            used += new
            assert not seen[new][:, alive].isnan().any()
            alive = sorted(alive, key=lambda k: float(errors[used, k].mean()))[:keep]
        assert alive == [prediction]
        counts = (~seen.isnan()).sum(0)
        assert sorted(counts.tolist()) == sorted([1, 1, 1, 1 + len(second), 20, 20])
        assert torch.allclose(seen[~seen.isnan()], errors[~seen.isnan()], rtol=1e-9)
        changed += prediction != int(errors.mean(0).argmin())
    assert 0 < changed < 20  # a first stage of one timestep is too short: dropping classes does something


@pytest.mark.parametrize("stages", [None, [(2, 4), (8, 1)], [(3, 2), (4, 2), (8, 1)]])
def test_calls_are_counted_and_bounded_by_the_batch(stages):
    s, model, x, t = scheduler(), tiny_dit(), images(5), even_timesteps(8)
    with count_calls(model) as count:
        found = diffusion_classifier(model, s, x, range(6), t, generator=generator(), stages=stages, batch=7)
    plan = stages or [(8, 1)]
    alive = [6, *[keep for _, keep in plan]]
    expected = [len(new) * k for new, k in zip(stage_positions(8, plan), alive, strict=False)]
    assert count.samples == 5 * sum(expected) == int(found.evaluations.sum())
    assert count.calls == sum(n // k * -(-5 * k // 7) for n, k in zip(expected, alive, strict=False))
    assert count.samples == int((~found.errors.isnan()).sum())


@pytest.mark.parametrize("stages", [None, [(2, 3), (5, 1)]])
def test_order_of_classes_and_batch_size_do_not_matter(stages):
    s, model, x, t = scheduler(), tiny_dit(), images(6), even_timesteps(5)
    common = {"stages": stages, "noise": torch.randn(6, 5, 1, 4, 4, generator=generator(), dtype=x.dtype)}
    base = diffusion_classifier(model, s, x, range(6), t, **common)
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    turned = diffusion_classifier(model, s, x, order, t, **common)
    assert torch.equal(turned.predictions, base.predictions)
    assert torch.allclose(turned.errors, base.errors[:, :, order], rtol=1e-9, equal_nan=True)
    for batch in (1, 10, 1000):
        again = diffusion_classifier(model, s, x, range(6), t, **common, batch=batch)
        assert torch.equal(again.predictions, base.predictions)
        assert torch.allclose(again.errors, base.errors, rtol=1e-9, equal_nan=True)


class Blind(nn.Module):
    """Ignores the class."""

    def forward(self, x, t, y):
        return 0.3 * x


def test_shared_noise_cancels_and_independent_noise_does_not():
    s, x, t = scheduler(), images(50), even_timesteps(10)
    paired = diffusion_classifier(Blind(), s, x, range(6), t, generator=generator())
    alone = diffusion_classifier(Blind(), s, x, range(6), t, generator=generator(), independent=True)
    assert torch.equal(paired.errors, paired.errors[..., :1].expand(-1, -1, 6))
    assert (alone.errors.mean(1).var(dim=1) > 0).all()
    assert paired.errors.mean() == pytest.approx(float(alone.errors.mean()), rel=0.05)
    # independent draws of a class-blind model pick any class
    assert len(alone.predictions.unique()) == 6 and paired.predictions.tolist() == [0] * 50


def test_three_shapes_of_noise():
    s, model, x, t = scheduler(), tiny_dit(), images(3), even_timesteps(4)
    one = torch.randn(4, 1, 4, 4, generator=generator(), dtype=x.dtype)
    run = lambda noise, **k: diffusion_classifier(model, s, x, range(6), t, noise=noise, **k)  # noqa: E731
    base = run(one)
    assert torch.equal(run(one.expand(3, 4, 1, 4, 4)).errors, base.errors)
    spread = one[None, :, None].expand(3, 4, 6, 1, 4, 4)
    assert torch.equal(run(spread, independent=True).errors, base.errors)
    drawn = torch.randn(3, 4, 1, 4, 4, generator=generator(7), dtype=x.dtype)
    assert torch.equal(
        run(drawn).errors, diffusion_classifier(model, s, x, range(6), t, generator=generator(7)).errors
    )
    with pytest.raises(ValueError, match=r"noise has shape \(4, 1, 4, 4\); expected \(3, 4, 6, 1, 4, 4\)"):
        run(one, independent=True)


def test_prediction_types_weight_the_same_error_differently():
    parts, t = two_gaussians((0.35, 0.5)), torch.tensor([100, 400, 800])
    errors = {}
    for kind in ("epsilon", "sample", "v_prediction"):
        s = scheduler(kind)
        epsilon = exact_epsilon(parts, s)

        def model(x_t, t, y, kind=kind, s=s, epsilon=epsilon):
            alpha, sigma = s.levels(t, x_t)
            eps = epsilon(x_t, t, y)
            x0 = (x_t - sigma * eps) / alpha
            return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]

        errors[kind] = diffusion_classifier(model, s, GRID, [0, 1], t, generator=generator()).errors
    a = s.alphas_cumprod_f64[t][None, :, None]
    # v differs from its target by the noise error / alpha, x0 by the noise error times sigma / alpha
    assert torch.allclose(errors["v_prediction"] * a, errors["epsilon"], rtol=1e-9)
    assert torch.allclose(errors["sample"] * a / (1 - a), errors["epsilon"], rtol=1e-9)


def test_even_timesteps_and_stages():
    assert even_timesteps(50).tolist() == list(
        range(10, 1000, 20)
    )  # the released code: T // N // 2, then every T // N
    assert even_timesteps(250).tolist() == list(range(2, 1000, 4))
    assert even_timesteps(1).tolist() == [500] and even_timesteps(1000).tolist() == list(range(1000))
    for n in (3, 7, 30, 999):
        t = even_timesteps(n)
        assert len(t.unique()) == n and t.min() >= 0 and t.max() < 1000
        assert float((t.double() + 0.5 - 500).mean().abs()) <= 1.0
    assert stage_positions(50, [(10, 3), (50, 1)])[0] == list(range(2, 50, 5))
    for stages in ([(50, 1)], [(10, 3), (50, 1)], [(4, 9), (7, 5), (20, 2), (50, 1)]):
        new = stage_positions(50, stages)
        assert sorted(sum(new, [])) == list(range(50)) and len(new) == len(stages)
    for n in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and num_train_timesteps=1000"):
            even_timesteps(n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": []}, "classes is empty"),
        ({"classes": [0, 1, 0]}, "names one twice"),
        ({"classes": [0, 6]}, "class 6 stands for 'no label'"),
        ({"classes": [0, 1], "null_class": 1}, "class 1 stands for 'no label'"),
        ({"timesteps": []}, "at least one image and one timestep"),
        ({"x": torch.zeros(0, 1, 4, 4)}, "at least one image and one timestep"),
        ({"loss": "huber"}, "one of l1, l2, .*'huber'"),
        ({"batch": 0}, "batch >= 1"),
        ({"generator": None}, "exactly one of noise"),
        ({"noise": torch.zeros(10, 1, 4, 4)}, "exactly one of noise"),
        ({"generator": None, "noise": torch.zeros(9, 1, 4, 4)}, "noise has shape"),
        ({"stages": []}, "must rise"),
        ({"stages": [(10, 3), (5, 1)]}, r"must rise, .* all 10 timesteps; got \[10, 5\]"),
        ({"stages": [(5, 3), (5, 2), (10, 1)]}, "must rise"),
        ({"stages": [(0, 3), (10, 1)]}, "must rise"),
        ({"stages": [(5, 1)]}, "must rise"),
        ({"stages": [(5, 2), (10, 2)]}, r"to 1 at the end; got \[2, 2\]"),
        ({"stages": [(5, 7), (10, 1)]}, "at most the 6 classes"),
        ({"stages": [(2, 2), (5, 3), (10, 1)]}, "keep must fall"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": images(2, torch.float32), "classes": range(6), "timesteps": even_timesteps(10)}
    arguments |= {"generator": generator(), **change}
    x, classes, timesteps = (arguments.pop(name) for name in ("x", "classes", "timesteps"))
    with pytest.raises(ValueError, match=message):
        diffusion_classifier(tiny_dit(torch.float32), scheduler(), x, list(classes), timesteps, **arguments)
