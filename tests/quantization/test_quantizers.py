from dataclasses import replace

import pytest
import torch

from minilib.kernels import quant as kernels
from minilib.quantization import OFF, Quantizer, QuantSpec, grid_of_range, round_to_grid, spec_grid
from minilib.quantization.grids import SHARES

BOTH = [True, False]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def points_of(grid):
    """All points of a grid with one range, written out."""
    q = torch.arange(grid.low, grid.high + 1, dtype=grid.scale.dtype)
    return (q - grid.zero_point.flatten()) * grid.scale.flatten()


class TestSpec:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 1}, "bits = 1 given: choose 2 to 16, or 32"),
            ({"bits": 17}, "bits = 17"),
            ({"granularity": "row"}, "unknown granularity 'row'"),
            ({"scale_init": "max"}, "unknown scale_init 'max'"),
            ({"granularity": "token"}, "needs dynamic=True"),
            ({"dynamic": True, "scale_init": "mse"}, "needs dynamic=False"),
        ],
    )
    def test_bad_options_are_refused_by_name(self, options, message):
        with pytest.raises(ValueError, match=message):
            QuantSpec(**options)

    def test_thirty_two_bits_are_off(self):
        assert OFF.off and not QuantSpec(16).off
        x = draw(3, 4)
        assert Quantizer(OFF)(x) is x
        with pytest.raises(ValueError, match="no grid"):
            grid_of_range(x.amin(), x.amax(), OFF)


class TestGrid:
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("symmetric", BOTH)
    @pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
    def test_up_to_eight_bits_it_is_the_kernels_grid(self, bits, symmetric, granularity):
        x = draw(3, 5, 7, dtype=torch.float32) + 0.3
        spec = QuantSpec(bits, granularity, symmetric, dynamic=True)
        ours = spec_grid(x, spec)
        theirs = kernels.find_grid(x, bits, granularity=granularity, symmetric=symmetric, axis=-1)
        assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.zero_point, theirs.zero_point)
        assert ours[2:] == theirs[2:]
        assert torch.equal(round_to_grid(x, ours), kernels.fake_quantize(x, grid=theirs))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
    @pytest.mark.parametrize("symmetric", BOTH)
    @pytest.mark.parametrize("shift", [0.0, 1.5, 20.0])
    def test_values_go_to_the_nearest_of_at_most_2_to_the_b_points(self, bits, symmetric, shift):
        x = draw(40) + shift
        grid = spec_grid(x, QuantSpec(bits, symmetric=symmetric))
        points = points_of(grid)
        assert len(points) == (2**bits - 1 if symmetric else 2**bits)
        got = round_to_grid(x, grid)
        assert ((got - x).abs() - (x[:, None] - points).abs().amin(1)).abs().max() < 1e-12
        assert (got - x).abs().max() <= grid.scale / 2 * (1 + 1e-9)
        assert (round_to_grid(got, grid) - got).abs().max() < 1e-12 * x.abs().max()
        assert points.abs().min() == 0

    def test_a_token_is_all_channels_at_one_place_of_one_sample(self):
        maps = draw(2, 6, 3, 3)
        spec = QuantSpec(4, "token", dynamic=True)
        as_tokens = Quantizer(spec)(maps.movedim(1, -1)).movedim(-1, 1)
        assert torch.equal(Quantizer(spec, channel_axis=1)(maps), as_tokens)
        one = Quantizer(spec)(maps.movedim(1, -1)[1, 2, 0][None])[0]
        assert torch.equal(as_tokens[1, :, 2, 0], one)

    def test_a_token_does_not_depend_on_its_batch_mates_a_tensor_does(self):
        x = draw(4, 5, 8)
        x[3] *= 50
        for spec, alike in [(QuantSpec(4, "token", dynamic=True), True), (QuantSpec(4, dynamic=True), False)]:
            quantize = Quantizer(spec)
            assert torch.equal(quantize(x)[:1], quantize(x[:1])) == alike

    def test_constant_and_zero_values(self):
        assert torch.equal(Quantizer(QuantSpec(4, dynamic=True))(torch.zeros(3)), torch.zeros(3))
        got = Quantizer(QuantSpec(4, dynamic=True))(torch.full((3,), -2.5))
        assert torch.allclose(got, torch.full((3,), -2.5), atol=1e-6)

    def test_half_precision_comes_back_as_it_was(self):
        x = draw(4, 4, dtype=torch.float16) * 1e-4
        got = Quantizer(QuantSpec(8, dynamic=True))(x)
        assert got.dtype == torch.float16 and (got - x).abs().max() < 4e-6

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite_are_refused(self, value):
        with pytest.raises(ValueError, match="not finite"):
            Quantizer(QuantSpec(8, dynamic=True))(torch.tensor([1.0, value]))

    def test_empty_tensors_and_missing_axes_are_refused(self):
        with pytest.raises(ValueError, match="no values"):
            spec_grid(torch.zeros(0, 3), QuantSpec(8))
        with pytest.raises(ValueError, match="axis 1 of the channels: a tensor of 1 axes"):
            spec_grid(torch.ones(3), QuantSpec(8, "channel"), channel_axis=1)

    def test_meta_tensors_have_grids_of_the_right_shape(self):
        grid = spec_grid(torch.zeros(4, 3, device="meta"), QuantSpec(4, "channel"), channel_axis=0)
        assert grid.scale.shape == (4, 1)


class TestLeastError:
    @pytest.mark.parametrize("symmetric", BOTH)
    def test_it_is_the_best_share_found_by_hand(self, symmetric):
        x = draw(300) ** 3  # long tails
        spec = QuantSpec(3, symmetric=symmetric, scale_init="mse")
        plain = replace(spec, scale_init="minmax")
        tried = {}
        for share in SHARES:
            grid = grid_of_range(x.amin() * share, x.amax() * share, plain)
            tried[float(grid.scale)] = float((round_to_grid(x, grid) - x).square().mean())
        best = spec_grid(x, spec)
        assert tried[float(best.scale)] == min(tried.values()) < next(iter(tried.values()))

    def test_channels_are_searched_by_themselves(self):
        x = torch.stack([draw(200) ** 3, draw(200, seed=1) ** 5, torch.linspace(-1, 1, 200).double()])
        spec = QuantSpec(3, "channel", scale_init="mse")
        whole = spec_grid(x, spec, channel_axis=0)
        alone = [spec_grid(row, replace(spec, granularity="tensor")) for row in x]
        assert torch.equal(whole.scale.flatten(), torch.cat([grid.scale for grid in alone]))
        assert torch.equal(whole.zero_point.flatten(), torch.cat([grid.zero_point for grid in alone]))


class TestGradients:
    def test_straight_through_inside_and_nothing_outside(self):
        grid = grid_of_range(torch.tensor(-1.0), torch.tensor(1.0), QuantSpec(3, symmetric=True))
        x = torch.tensor([-3.0, -0.9, 0.2, 1.0, 1.1, 5.0], requires_grad=True)
        (round_to_grid(x, grid) * torch.arange(1.0, 7.0)).sum().backward()
        # 1.1 is within half a step of the last point: it is rounded, not clipped
        assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]

    def test_a_grid_of_the_values_themselves_has_gradient_one(self):
        x = draw(50).requires_grad_()
        Quantizer(QuantSpec(2, dynamic=True))(x).sum().backward()
        assert torch.equal(x.grad, torch.ones(50).double())

    @pytest.mark.parametrize("symmetric", BOTH)
    def test_the_scales_gradient_is_that_of_learned_step_sizes(self, symmetric):
        x = draw(5, 40)
        spec = QuantSpec(3, "channel", symmetric)
        grid = grid_of_range(x.amin(1, keepdim=True) / 2, x.amax(1, keepdim=True) / 2, spec)
        scale = grid.scale.clone().requires_grad_()
        weights = draw(5, 40, seed=1)
        (round_to_grid(x, grid._replace(scale=scale)) * weights).sum().backward()
        exact = x / grid.scale
        q = (exact.round() + grid.zero_point).clamp(grid.low, grid.high) - grid.zero_point
        outside = (exact.round() + grid.zero_point < grid.low) | (exact.round() + grid.zero_point > grid.high)
        assert outside.any() and not outside.all()
        slope = torch.where(outside, q, exact.round() - exact)
        assert torch.allclose(scale.grad, (weights * slope).sum(1, keepdim=True))

    def test_the_values_are_the_same_with_and_without_gradients(self):
        x = draw(64, dtype=torch.float32)
        grid = spec_grid(x, QuantSpec(4))
        with_gradient = round_to_grid(x.clone().requires_grad_(), grid)
        assert torch.equal(with_gradient.detach(), round_to_grid(x, grid))


class TestStatic:
    def test_it_asks_for_calibration(self):
        quantizer = Quantizer(QuantSpec(8))
        assert quantizer.static and not quantizer.ready
        with pytest.raises(ValueError, match=r"calibrate\(model, calls\)"):
            quantizer(torch.ones(3))

    @pytest.mark.parametrize("granularity", ["tensor", "channel"])
    @pytest.mark.parametrize("axis", [-1, 1])
    def test_watched_calls_set_the_range_of_them_all(self, granularity, axis):
        shape = (4, 6, 3, 3) if axis == 1 else (4, 3, 6)
        parts = [draw(*shape, seed=i) * (1 + i) for i in range(3)]
        quantizer = Quantizer(QuantSpec(5, granularity), channel_axis=axis)
        quantizer.start()
        for part in parts:
            assert quantizer(part) is part
        quantizer.finish()
        expected = spec_grid(torch.cat(parts), quantizer.spec, channel_axis=axis)
        got = quantizer.grid(parts[0])
        assert torch.allclose(got.scale, expected.scale) and torch.equal(got.zero_point, expected.zero_point)
        assert got.scale.shape == expected.scale.shape
        out = quantizer(parts[2])
        assert ((out - parts[2]).abs() <= got.scale / 2 * (1 + 1e-6)).all()

    def test_a_search_over_watched_values_clips(self):
        x = draw(100, 4)
        x[0, 0] = 20.0
        scales = {}
        for init in ("mse", "minmax"):
            quantizer = Quantizer(QuantSpec(3, scale_init=init))
            quantizer.start()
            quantizer(x)
            quantizer.finish()
            scales[init] = float(quantizer.log_scale.detach().exp())
        assert scales["mse"] < 0.95 * scales["minmax"]

    def test_a_learned_scale_stays_positive(self):
        quantizer = Quantizer(QuantSpec(4))
        quantizer.set_range(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
        optimizer = torch.optim.SGD([quantizer.log_scale], lr=5.0)
        quantizer(draw(20, dtype=torch.float32)).square().sum().backward()
        optimizer.step()
        assert quantizer.grid(torch.ones(2)).scale > 0

    def test_learning_the_scale_lowers_the_error(self):
        x = draw(500) ** 3
        quantizer = Quantizer(QuantSpec(3)).double()
        quantizer.set_range(4 * x.amin().reshape(1, 1), 4 * x.amax().reshape(1, 1))
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
        errors = []
        for _ in range(60):
            optimizer.zero_grad()
            error = (quantizer(x) - x).square().mean()
            error.backward()
            optimizer.step()
            errors.append(float(error.detach()))
        assert errors[-1] < 0.6 * errors[0]

    def test_ranges_of_a_wrong_shape_are_refused(self):
        with pytest.raises(ValueError, match=r"expected \(1, 1 or channels\)"):
            Quantizer(QuantSpec(4)).set_range(torch.zeros(2, 1), torch.ones(2, 1))
        with pytest.raises(ValueError, match="keeps no range"):
            Quantizer(QuantSpec(4, dynamic=True)).set_range(torch.zeros(1, 1), torch.ones(1, 1))

    def test_nothing_seen_is_refused(self):
        quantizer = Quantizer(QuantSpec(4))
        quantizer.start()
        with pytest.raises(ValueError, match="no values seen"):
            quantizer.finish()

    def test_it_says_what_it_is(self):
        assert "4 bits, channel, symmetric, static" in repr(Quantizer(QuantSpec(4, "channel", True)))
        assert "32 bits" in repr(Quantizer(OFF))
