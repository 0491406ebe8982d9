from copy import deepcopy

import pytest
import torch
from torch import nn

from minilib.quantization import Clock, QuantSpec, TimewiseQuantizer


class Timed(nn.Module):
    def forward(self, x, t, scale=1.0):
        return x * scale


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(times=(900.0, 500.0, 100.0), bits=4, **options):
    clock = Clock(times)
    return TimewiseQuantizer(QuantSpec(bits, **options), clock), clock


class TestClock:
    def test_a_time_belongs_to_the_nearest_of_the_table(self):
        clock = Clock([900.0, 500.0, 100.0])
        for t, row in [(999.0, 0), (701.0, 0), (700.0, 0), (699.0, 1), (0.0, 2), (500, 1)]:
            clock.set(torch.tensor([t]))
            assert clock.row == row

    def test_one_row_for_all_samples_is_a_number(self):
        clock = Clock([900.0, 100.0])
        clock.set(torch.tensor([800.0, 950.0]))
        assert clock.row == 0
        clock.set(torch.tensor([100.0, 900.0]))
        assert clock.row.tolist() == [1, 0]

    def test_a_table_needs_different_times(self):
        for times in ([], [1.0, 1.0]):
            with pytest.raises(ValueError, match="different times"):
                Clock(times)

    def test_no_table_and_no_time_are_refused(self):
        with pytest.raises(ValueError, match="no table"):
            _ = Clock().row
        with pytest.raises(ValueError, match="no time yet"):
            _ = Clock([1.0]).row

    @pytest.mark.parametrize("by_name", [True, False])
    def test_it_is_set_by_the_models_calls(self, by_name):
        model, clock = Timed(), Clock([900.0, 100.0])
        handle = clock.attach(model)
        t = torch.tensor([120.0])
        model(torch.ones(1), t=t) if by_name else model(torch.ones(1), t)
        assert clock.row == 1 and torch.equal(clock.t, t)
        handle.remove()
        model(torch.ones(1), torch.tensor([900.0]))
        assert clock.row == 1

    def test_a_model_without_time_is_refused(self):
        with pytest.raises(ValueError, match="no argument 't'"):
            Clock().attach(nn.Linear(2, 2))

    def test_a_deep_copy_has_a_clock_of_its_own(self):
        model, clock = Timed(), Clock([900.0, 100.0])
        model.quantizer = TimewiseQuantizer(QuantSpec(4), clock)
        clock.attach(model)
        copied = deepcopy(model)
        copied(torch.ones(1), torch.tensor([100.0]))
        assert copied.quantizer.clock.row == 1
        assert copied.quantizer.clock is not clock and clock.t is None


class TestTimewise:
    @pytest.mark.parametrize("granularity", ["tensor", "channel"])
    @pytest.mark.parametrize("scale_init", ["minmax", "mse"])
    def test_each_time_has_the_range_of_its_own_calls(self, granularity, scale_init):
        rows, clock = quantizer(granularity=granularity, scale_init=scale_init)
        parts = {t: draw(3, 5, 6, seed=int(t)) * t for t in clock.timesteps}
        rows.start()
        for t, part in parts.items():
            clock.set(t)
            rows(part)
        rows.finish()
        for t, part in parts.items():
            alone = TimewiseQuantizer(rows.spec, Clock([t]))
            alone.clock.set(t)
            alone.start()
            alone(part)
            alone.finish()
            clock.set(t)
            assert torch.equal(rows(part), alone(part))

    def test_samples_at_different_times_are_rounded_as_if_alone(self):
        rows, clock = quantizer()
        rows.set_range(-torch.tensor([[9.0], [3.0], [1.0]]), torch.tensor([[9.0], [3.0], [1.0]]))
        x, times = draw(4, 5, 6), torch.tensor([900.0, 100.0, 500.0, 900.0])
        clock.set(times)
        together = rows(x)
        for i in range(4):
            clock.set(times[i])
            assert torch.equal(rows(x[i : i + 1]), together[i : i + 1])

    def test_samples_at_different_times_are_watched_apart(self):
        rows, clock = quantizer(granularity="channel")
        x, times = draw(6, 5, 4), torch.tensor([900.0, 100.0, 500.0, 900.0, 500.0, 100.0])
        rows.start()
        clock.set(times)
        rows(x)
        rows.finish()
        clock.set(500.0)
        assert torch.allclose(
            rows.grid(x).scale.flatten(),
            (x[[2, 4]].amax((0, 1)).clamp(min=0) - x[[2, 4]].amin((0, 1)).clamp(max=0)) / 15,
        )

    def test_only_the_row_of_the_time_learns(self):
        rows, clock = quantizer()
        rows.set_range(-torch.ones(3, 1), torch.ones(3, 1))
        clock.set(500.0)
        rows(draw(2, 3)).square().sum().backward()
        assert (rows.log_scale.grad != 0).flatten().tolist() == [False, True, False]

    def test_a_time_that_no_call_reached_is_named(self):
        rows, clock = quantizer()
        rows.start()
        clock.set(500.0)
        rows(draw(2, 3))
        with pytest.raises(ValueError, match=r"2 of 3 times \(900, 100\)"):
            rows.finish()

    def test_a_batch_of_another_size_is_refused(self):
        rows, clock = quantizer()
        rows.set_range(-torch.ones(3, 1), torch.ones(3, 1))
        clock.set(torch.tensor([900.0, 100.0]))
        with pytest.raises(ValueError, match="2 samples at different times"):
            rows(draw(3, 4))

    def test_a_dynamic_spec_and_a_clock_without_table_are_refused(self):
        with pytest.raises(ValueError, match="dynamic=False"):
            TimewiseQuantizer(QuantSpec(4, dynamic=True), Clock([1.0]))
        with pytest.raises(ValueError, match="table of times"):
            TimewiseQuantizer(QuantSpec(4), Clock())
