"""Region-adaptive sampling: the sampler against a plain loop, the choice of tokens, and the metrics."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minilib.kernels.tokens import gather_tokens
from minilib.region_adaptive import (
    METRICS,
    FocusState,
    RegionAdaptiveEuler,
    RegionStep,
    linear_ratios,
    pixel_norm,
    pixel_std,
    random_metric,
    rank_correlation,
    select_tokens,
    update_map,
)
from minilib.region_mmdit import image_to_tokens
from minilib.sampling import sample_final
from minilib.schedulers import FlowMatchEulerDiscreteScheduler


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1)


def toy(x: Tensor, sigma: float, indices: Tensor | None) -> Tensor:
    """A velocity field in which no token sees another."""
    velocity = torch.sin(3 * x + 5 * sigma) + x * sigma
    return velocity if indices is None else gather_tokens(velocity, indices)


def final(sampler: RegionAdaptiveEuler, x: Tensor, steps: int, run=toy, channels: int = 3) -> RegionStep:
    return list(sampler.sample(run, x, levels(steps), channels=channels))[-1]


def plain_loop(sampler: RegionAdaptiveEuler, x: Tensor, steps: int) -> Iterator[dict]:
    """The same in Python numbers, one sample and one token after the other."""
    sigmas = levels(steps).tolist()
    samples, n = [[row.clone() for row in tokens] for tokens in x], x.shape[1]
    velocity = [[torch.zeros_like(row) for row in tokens] for tokens in samples]
    drops, rates = [[0] * n for _ in samples], [[0.0] * n for _ in samples]
    last, updates = [[None] * n for _ in samples], [[0] * n for _ in samples]
    for i in range(steps):
        ratio = sampler.ratio[i] if isinstance(sampler.ratio, tuple) else sampler.ratio
        dense = i < sampler.start or i in sampler.resets
        out = 0 if dense else math.floor((1 - ratio) * n + 1e-9)
        for s, tokens in enumerate(samples):
            if out == 0:
                chosen = range(n)
                if sampler.forget:
                    drops[s] = [0] * n
            else:
                score = []
                for token in range(n):
                    pixels = velocity[s][token].view(-1, 3)
                    value = {
                        "std": pixels.std(1).mean().item(),
                        "norm": pixels.norm(dim=1).mean().item(),
                        "change": rates[s][token],
                    }[sampler.metric]
                    score.append(value * math.exp(sampler.starvation * drops[s][token]))
                ranking = sorted(range(n), key=lambda token: score[token])
                low = math.floor(out * (1 - sampler.high_share) + 1e-9)
                high = out - low
                chosen = set(ranking) - set(ranking[:low]) - set(ranking[n - high :])
            for token in range(n):
                if token in chosen:
                    new = toy(tokens[token], sigmas[i], None)
                    if i:
                        moved = (new - velocity[s][token]).view(-1, 3).norm(dim=1).mean().item()
                        rates[s][token] = moved / (last[s][token] - sigmas[i])
                    velocity[s][token], last[s][token] = new, sigmas[i]
                    updates[s][token] += 1
                else:
                    drops[s][token] += 1
                tokens[token] = tokens[token] + (sigmas[i + 1] - sigmas[i]) * velocity[s][token]
        yield {
            "x": torch.stack([torch.stack(tokens) for tokens in samples]),
            "updates": torch.tensor(updates),
        }


class TestSampler:
    @pytest.mark.parametrize("metric", list(METRICS))
    @pytest.mark.parametrize(
        "options",
        [
            {"ratio": 0.5, "starvation": 0.0},
            {"ratio": 0.3, "starvation": 1.0},
            {"ratio": 0.4, "starvation": 0.2, "high_share": 1.0},
            {"ratio": 0.5, "starvation": 0.5, "high_share": 0.3},
            {"ratio": 0.5, "starvation": 0.5, "forget": True},
            {"ratio": linear_ratios(9, 0.9, 0.2), "starvation": 0.1},
        ],
    )
    def test_equals_a_loop_over_samples_and_tokens(self, metric, options):
        sampler = RegionAdaptiveEuler(start=2, resets=(5,), metric=metric, **options)
        x = draw(3, 11, 6)
        ours = sampler.sample(toy, x, levels(9), channels=3)
        for step, expected in zip(ours, plain_loop(sampler, x, 9), strict=True):
            assert torch.allclose(step.x, expected["x"], atol=1e-5)
            assert torch.equal(step.updates, expected["updates"])

    def test_ratio_one_is_eulers_method(self):
        x, scheduler = draw(2, 12, 4), FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(10)
        ours = list(RegionAdaptiveEuler(1.0, resets=()).sample(toy, x, scheduler.sigmas))[-1].x
        theirs = sample_final(
            lambda y, t: toy(y, float(t[0]) / 1000, None), scheduler, x, num_inference_steps=10
        )
        assert (ours - theirs).abs().max() <= 1e-6

    def test_a_constant_field_needs_one_dense_step(self):
        """With a velocity that never changes old velocities are no error: the straight path."""
        noise, data = draw(2, 9, 3), draw(2, 9, 3, seed=1)

        def straight(x: Tensor, sigma: float, indices: Tensor | None) -> Tensor:
            return noise - data if indices is None else gather_tokens(noise - data, indices)

        end = final(RegionAdaptiveEuler(0.25, start=1, resets=()), noise, 7, straight)
        assert torch.allclose(end.x, data, atol=1e-5)

    def test_a_token_that_does_not_run_keeps_its_velocity_and_moves(self):
        before = None
        for step in RegionAdaptiveEuler(0.4, start=2, resets=(4,)).sample(
            toy, draw(3, 10, 3), levels(8), channels=3
        ):
            idle = ~step.ran
            assert int(step.ran.sum()) == 3 * (10 if step.index in (0, 1, 4) else 4)
            assert (step.metric is None) == (step.index in (0, 1, 4))
            if before is not None:
                assert torch.equal(step.velocity[idle], before.velocity[idle])
                assert bool((step.velocity[step.ran] != before.velocity[step.ran]).any())
                assert bool((step.x != before.x).any(-1).all())
            before = step

    def test_each_sample_has_its_own_tokens(self):
        sampler, x = RegionAdaptiveEuler(0.3, start=2, resets=(), starvation=0.3), draw(4, 13, 3)
        together = final(sampler, x, 8)
        assert len({tuple(row.tolist()) for row in together.updates}) > 1
        for i in range(4):
            alone = final(sampler, x[i : i + 1], 8)
            assert torch.equal(alone.updates[0], together.updates[i])
            assert torch.allclose(alone.x[0], together.x[i], atol=1e-6)

    def test_change_is_a_rate_whatever_the_age(self):
        """A velocity that is linear in sigma has the same rate for a token renewed a step ago and one renewed long ago."""
        slope = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).view(1, 5, 1).expand(1, 5, 3)
        seen = []

        def linear(x: Tensor, sigma: float, indices: Tensor | None) -> Tensor:
            return slope * sigma if indices is None else gather_tokens(slope * sigma, indices)

        def turns(state: FocusState) -> Tensor:
            seen.append(state.change)
            return random_metric(torch.Generator().manual_seed(len(seen)))(state)

        final(RegionAdaptiveEuler(0.4, start=2, resets=(), metric=turns), draw(1, 5, 3), 9, linear)
        expected = slope.norm(dim=-1)
        assert len(seen) == 7 and all(torch.allclose(rate, expected, atol=1e-4) for rate in seen)

    def test_metric_sees_the_state_before_the_step(self):
        states, steps, x = [], [], draw(2, 6, 3)

        def spy(state: FocusState) -> Tensor:
            states.append(state)
            return pixel_std(state.velocity, state.channels)

        sampler = RegionAdaptiveEuler(0.5, start=1, resets=(3,), metric=spy)
        steps = list(sampler.sample(toy, x, levels(5), channels=3))
        assert [state.index for state in states] == [1, 2, 4]
        for state in states:
            assert torch.equal(state.x, steps[state.index - 1].x)
            assert torch.equal(state.velocity, steps[state.index - 1].velocity)
            assert state.sigma == pytest.approx(1 - state.index / 5) and state.channels == 3
            assert torch.equal(state.drops, state.index - steps[state.index - 1].updates)
        named = list(RegionAdaptiveEuler(0.5, start=1, resets=(3,)).sample(toy, x, levels(5), channels=3))
        assert torch.equal(named[-1].x, steps[-1].x) and torch.equal(named[2].metric, steps[2].metric)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"ratio": 0.0}, "ratios must lie"),
            ({"ratio": 1.2}, "ratios must lie"),
            ({"ratio": ()}, "ratios must lie"),
            ({"metric": "variance"}, "unknown metric 'variance': choose one of std, norm, change"),
            ({"start": 0}, "start must be at least 1"),
            ({"start": 1, "metric": "change"}, "start must be at least 2"),
        ],
    )
    def test_refuses_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            RegionAdaptiveEuler(**options)

    def test_refuses_what_does_not_fit_the_run(self):
        with pytest.raises(ValueError, match="8 steps"):
            RegionAdaptiveEuler(resets=(8,)).active(8, 10)
        with pytest.raises(ValueError, match="3 ratios"):
            RegionAdaptiveEuler((0.5, 0.5, 0.5), resets=()).active(8, 10)
        with pytest.raises(ValueError, match="leaves no token of 3"):
            RegionAdaptiveEuler(1e-12, resets=()).active(8, 3)
        for wrong in ([1.0], [1.0, 0.5, 0.5], [0.0, 1.0]):
            with pytest.raises(ValueError, match="fall"):
                list(RegionAdaptiveEuler().sample(toy, draw(1, 4, 3), torch.tensor(wrong)))

    def test_counts_and_share(self):
        sampler = RegionAdaptiveEuler(0.5, start=4, resets=(12, 20))
        counts = sampler.active(28, 256)
        assert counts == tuple(256 if i < 4 or i in (12, 20) else 128 for i in range(28))
        assert sampler.share(28, 256) == pytest.approx((6 + 22 * 0.5) / 28)
        # (1 - 0.9) 10 is a little less than 1 in floating point: one token is left out all the same.
        assert RegionAdaptiveEuler(0.9, start=1, resets=()).active(2, 10) == (10, 9)
        assert RegionAdaptiveEuler(0.5, start=1, resets=()).active(2, 7) == (
            7,
            4,
        )  # what is left out is rounded down
        ramp = RegionAdaptiveEuler(linear_ratios(5, 1.0, 0.2), start=1, resets=(3,))
        assert ramp.active(5, 10) == (10, 8, 6, 10, 2)
        with pytest.raises(ValueError, match="at least 2 steps"):
            linear_ratios(1, 0.5, 0.5)


class TestSelection:
    @pytest.mark.parametrize("high_share", [0.0, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize("active", [1, 4, 9, 10])
    def test_by_sorting(self, high_share, active):
        metric, drops = draw(5, 10).abs(), torch.randint(0, 4, (5, 10))
        chosen = select_tokens(metric, drops, active, starvation=0.5, high_share=high_share)
        for row, score in zip(chosen, metric * torch.exp(0.5 * drops), strict=True):
            ranking = sorted(range(10), key=lambda token: score[token])
            low = math.floor((10 - active) * (1 - high_share) + 1e-9)
            assert row.tolist() == sorted(ranking[low : low + active])

    def test_zero_runs_the_highest_and_one_the_lowest(self):
        metric, drops = torch.tensor([[0.1, 0.4, 0.2, 0.3]]), torch.zeros(1, 4, dtype=torch.long)
        assert select_tokens(metric, drops, 2).tolist() == [[1, 3]]
        assert select_tokens(metric, drops, 2, high_share=1.0).tolist() == [[0, 2]]

    def test_the_guard_brings_tokens_back_if_high_ones_run_and_starves_them_if_low_ones_do(self):
        metric = torch.tensor([[3.0, 2.0, 1.0]])
        for high_share, ran_often in ((0.0, False), (1.0, True)):
            drops = torch.zeros(1, 3, dtype=torch.long)
            for _ in range(30):
                chosen = select_tokens(metric, drops, 1, starvation=1.0, high_share=high_share)
                drops += 1
                drops.scatter_add_(1, chosen, -torch.ones_like(chosen))
            starved = int(drops.max() - drops.min()) > 20
            assert starved == ran_often

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"active": 0}, "choose 1 to 4"),
            ({"active": 5}, "choose 1 to 4"),
            ({"active": 2, "starvation": -1.0}, "at least 0"),
            ({"active": 2, "high_share": 1.5}, r"in \[0, 1\]"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            select_tokens(torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.long), **options)


class TestMetrics:
    def test_std_and_norm_on_the_image_as_released(self):
        """Over the channels of each pixel of an image, then the mean over a patch."""
        image = draw(2, 3, 8, 12)
        tokens = image_to_tokens(image, 2)
        for ours, per_pixel in (
            (pixel_std(tokens, 3), image.std(1)),
            (pixel_norm(tokens, 3), image.norm(dim=1)),
        ):
            patches = F.avg_pool2d(per_pixel[:, None], 2).flatten(1)
            assert torch.allclose(ours, patches, atol=1e-6)

    def test_refuses_pixels_that_do_not_fit(self):
        with pytest.raises(ValueError, match="12 values do not hold pixels of 5 channels"):
            pixel_std(draw(1, 2, 12), 5)

    def test_random_metric(self):
        state = FocusState(
            0, 1.0, draw(2, 500, 3), draw(2, 500, 3), draw(2, 500), torch.zeros(2, 500, dtype=torch.long), 3
        )
        one, same = (random_metric(torch.Generator().manual_seed(3))(state) for _ in range(2))
        assert torch.equal(one, same) and 0 <= float(one.min()) < 0.05 and 0.95 < float(one.max()) <= 1
        close = random_metric(torch.Generator().manual_seed(3), 0.01)(state)
        assert float(close.min()) >= 0.99 and not torch.equal(close, torch.ones_like(close))
        with pytest.raises(ValueError, match="spread"):
            random_metric(torch.Generator(), 0.0)

    def test_taking_turns(self):
        turns = random_metric(torch.Generator().manual_seed(0), 1e-3)
        sampler = RegionAdaptiveEuler(0.5, start=1, resets=(), metric=turns, starvation=1.0)
        updates = final(sampler, draw(3, 16, 3), 9).updates
        assert bool((updates == 5).all())

    def test_rank_correlation_is_scipys(self):
        from scipy.stats import spearmanr

        a, b = draw(3, 50), draw(3, 50, seed=1) + draw(3, 50)
        for ours, one, other in zip(rank_correlation(a, b), a, b, strict=True):
            assert float(ours) == pytest.approx(float(spearmanr(one, other).statistic), abs=1e-5)
        assert torch.allclose(rank_correlation(a, -a.exp()), -torch.ones(3))

    def test_update_map(self):
        assert update_map(torch.arange(6)[None], 2, 3).tolist() == [[[0, 1, 2], [3, 4, 5]]]
