"""Plans and costs of caching, the similarity of features, and PSNR to a reference."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minilib.caching import (
    cosine_between_samples,
    cosine_between_steps,
    equal_cost_steps,
    plan_cost,
    power_centred_refreshes,
    uniform_refreshes,
)
from minilib.intervene import at_steps, every
from minilib.metrics import psnr_to_reference


class TestUniform:
    @pytest.mark.parametrize("steps", [1, 7, 10, 50])
    @pytest.mark.parametrize("interval", [1, 2, 3, 5, 10, 60])
    def test_count_start_and_policy(self, steps: int, interval: int) -> None:
        plan = uniform_refreshes(steps, interval)
        assert len(plan) == math.ceil(steps / interval)
        assert [at_steps(plan)(i) for i in range(steps)] == [every(interval)(i) for i in range(steps)]

    @pytest.mark.parametrize("steps, interval", [(0, 1), (5, 0), (-1, 2)])
    def test_refuses(self, steps: int, interval: int) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            uniform_refreshes(steps, interval)


class TestPowerCentred:
    # Printed by the released function sample_from_quad_center(total, n, center, pow), run apart.
    @pytest.mark.parametrize(
        "refreshes, released",
        [
            (10, (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)),
            (17, (0, 3, 6, 8, 11, 13, 15, 17, 20, 22, 25, 28, 32, 35, 38, 42, 46)),
            (5, (0, 9, 17, 26, 37)),
        ],
    )
    def test_principal_root_is_the_released_code(self, refreshes: int, released: tuple[int, ...]) -> None:
        assert power_centred_refreshes(50, refreshes, 15, 1.4, root="principal") == released

    @pytest.mark.parametrize("centre", [5, 15, 25, 40])
    def test_signed_root_by_hand_and_densest_at_the_centre(self, centre: int) -> None:
        plan = power_centred_refreshes(50, 10, centre, 1.4)
        low, high = -(centre ** (1 / 1.4)), (50 - centre) ** (1 / 1.4)
        points = [low + (high - low) * k / 10 for k in range(1, 10)]
        by_hand = [centre + math.trunc(math.copysign(abs(u) ** 1.4, u)) for u in points]
        assert plan == (0, *by_hand)
        gaps = np.diff([*plan, 50])
        middle = np.abs(np.array(plan) + gaps / 2 - centre)
        assert gaps[middle.argmin()] == gaps.min() and gaps[middle.argmax()] > gaps.min()

    def test_power_is_lowered_where_points_coincide(self) -> None:
        plan = power_centred_refreshes(20, 12, 10, 2.0)
        assert len(plan) == len(set(plan)) == 12 and plan[0] == 0 and plan[-1] < 20
        assert list(plan) == sorted(plan)

    def test_valid_over_many_settings(self) -> None:
        draw = random.Random(0)
        for _ in range(200):
            steps = draw.randint(10, 100)
            refreshes, centre = draw.randint(2, steps // 3), draw.randint(0, steps - 1)
            plan = power_centred_refreshes(steps, refreshes, centre, 1.3)
            assert len(set(plan)) == refreshes and min(plan) == 0 and max(plan) < steps

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="unknown root"):
            power_centred_refreshes(50, 5, 10, root="real")
        with pytest.raises(ValueError, match="0 <= centre < steps"):
            power_centred_refreshes(50, 5, 50)
        with pytest.raises(ValueError, match="refreshes=51"):
            power_centred_refreshes(50, 51, 5)
        with pytest.raises(ValueError, match="no power between 1 and 1.0"):
            power_centred_refreshes(50, 5, 10, 1.0)


class TestCost:
    def test_plan_cost_by_counting(self) -> None:
        for steps, interval in [(50, 3), (7, 10), (10, 1)]:
            plan = uniform_refreshes(steps, interval)
            counted = sum(7.0 if i in plan else 2.0 for i in range(steps))
            assert plan_cost(steps, plan, 7.0, 2.0) == counted

    @pytest.mark.parametrize("plan", [(0, 10), (0, 0), (-1,)])
    def test_plan_cost_refuses(self, plan: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="different steps"):
            plan_cost(10, plan, 1.0, 1.0)

    def test_the_rival_never_costs_less_and_less_than_a_step_more(self) -> None:
        for cost in (1.0, 99.9, 100.0, 100.1, 250.0, 0.3 * 1000):
            steps = equal_cost_steps(cost, 100.0)
            assert 0 <= steps * 100.0 - cost + 1e-6 < 100.0 + 1e-5
        assert equal_cost_steps(3 * 0.1, 0.1) == 3  # 0.30000000000000004 must not cost a step

    def test_equal_cost_refuses(self) -> None:
        with pytest.raises(ValueError, match="positive"):
            equal_cost_steps(0.0, 1.0)


class TestCosine:
    def test_against_torch_pair_by_pair(self) -> None:
        features = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)) + 0.3
        flat = features.flatten(2)
        between = cosine_between_steps(features)
        for s in range(4):
            for r in range(4):
                assert between[s, r] == pytest.approx(
                    float(F.cosine_similarity(flat[s], flat[r], dim=1).mean()), abs=1e-6
                )
        apart = cosine_between_samples(features)
        for s in range(4):
            pairs = [F.cosine_similarity(flat[s, i], flat[s, j], dim=0) for i in range(3) for j in range(i)]
            assert apart[s] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)

    def test_one_sample_has_no_other(self) -> None:
        with pytest.raises(ValueError, match="at least two"):
            cosine_between_samples(torch.ones(3, 1, 4))


class TestPsnr:
    def test_by_hand_per_image_and_clamped(self) -> None:
        reference = torch.zeros(3, 1, 2, 2)
        samples = torch.stack([torch.full((1, 2, 2), 0.02), torch.full((1, 2, 2), 5.0), reference[0]])
        got = psnr_to_reference(samples, reference)
        by_hand = [10 * math.log10(4 / 0.02**2), 10 * math.log10(4 / 1.0), 100.0]
        assert got.tolist() == pytest.approx(by_hand, abs=1e-4)

    def test_cap_and_symmetry(self) -> None:
        x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        y = x + 1e-3
        assert torch.equal(psnr_to_reference(x, y, cap=40.0), torch.full((2,), 40.0))
        assert torch.equal(psnr_to_reference(x, y), psnr_to_reference(y, x))

    def test_refuses_shapes_that_would_broadcast(self) -> None:
        with pytest.raises((ValueError, TypeError)):
            psnr_to_reference(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
