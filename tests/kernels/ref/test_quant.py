import inspect

import pytest
import torch
from torch import nn

from minilib.kernels import dispatch, quant, sparse
from minilib.kernels.quant import (
    IntegerLinear,
    fake_quantize,
    find_grid,
    int_matmul,
    integer_linear,
    quantize_int8,
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nearest(x, bits, symmetric):
    """By search: the grid's points written out, and each value's nearest. One grid for all of x."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        points = torch.arange(-top, top + 1).double() * (x.abs().max() / top)
    else:
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        step = (high - low) / (2**bits - 1)
        points = (torch.arange(2**bits).double() - round(-low / step)) * step
    return points[(x.flatten()[:, None] - points).abs().argmin(1)].view(x.shape), points


class TestFakeQuantize:
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("shift", [0.0, 1.5])
    def test_values_are_the_nearest_points_of_the_grid(self, bits, symmetric, shift):
        x = draw(7, 11, dtype=torch.float64) + shift
        expected, points = nearest(x, bits, symmetric)
        got = fake_quantize(x, bits, symmetric=symmetric)
        assert (got - expected).abs().max() < 1e-12
        assert len(got.unique()) <= len(points) == (2**bits - 1 if symmetric else 2**bits)
        step = points[1] - points[0]
        assert (got - x).abs().max() <= step / 2 * (1 + 1e-9)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_granularities_are_the_tensors_cut_into_pieces(self, symmetric):
        x = (
            draw(3, 4, 5, dtype=torch.float64)
            * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)[:, None, None]
        )

        def alone(part):
            return fake_quantize(part, 4, symmetric=symmetric)

        by_token = torch.stack([torch.stack([alone(row) for row in block]) for block in x])
        assert torch.equal(fake_quantize(x, 4, granularity="token", symmetric=symmetric), by_token)
        for axis in (0, 1, -1):
            by_channel = torch.stack([alone(part) for part in x.unbind(axis)], dim=axis)
            got = fake_quantize(x, 4, granularity="channel", axis=axis, symmetric=symmetric)
            assert torch.equal(got, by_channel)

    def test_finer_grids_err_less(self):
        x = draw(64, 32) * torch.linspace(0.1, 10, 64)[:, None]
        errors = {g: (fake_quantize(x, 4, granularity=g) - x).norm() for g in quant.GRANULARITIES}
        assert errors["token"] == errors["channel"] < errors["tensor"]
        by_bits = [(fake_quantize(x, b) - x).norm() for b in quant.BITS]
        assert all(a > b for a, b in zip(by_bits, by_bits[1:], strict=False))

    def test_again_changes_nothing_and_zero_stays_zero(self):
        x = draw(5, 6, dtype=torch.float64)
        for symmetric in (True, False):
            once = fake_quantize(x, 3, symmetric=symmetric)
            assert torch.allclose(fake_quantize(once, 3, symmetric=symmetric), once, atol=1e-12)
            assert torch.equal(fake_quantize(torch.zeros(3), 3, symmetric=symmetric), torch.zeros(3))
            assert fake_quantize(torch.tensor([2.0, 0.0, 3.0]), 2, symmetric=symmetric)[1] == 0
        assert torch.equal(fake_quantize(-x, 3), -fake_quantize(x, 3))

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("granularity", quant.GRANULARITIES)
    def test_the_gradient_passes_straight_through(self, symmetric, granularity):
        x = draw(5, 6).requires_grad_()
        out = fake_quantize(x, 2, granularity=granularity, symmetric=symmetric)
        cotangent = draw(5, 6, seed=1)
        out.backward(cotangent)
        assert torch.equal(x.grad, cotangent)
        assert torch.equal(out, fake_quantize(x.detach(), 2, granularity=granularity, symmetric=symmetric))

    def test_a_static_grid_clips_and_stops_the_gradient_there(self):
        grid = find_grid(torch.tensor([-1.0, 1.0]), 4)
        x = torch.tensor([-3.0, -1.0, 0.3, 1.0, 1.2], requires_grad=True)
        out = fake_quantize(x, grid=grid)
        assert torch.allclose(out, torch.tensor([-1.0, -1.0, 2 / 7, 1.0, 1.0]))
        out.sum().backward()
        assert x.grad.tolist() == [0, 1, 1, 1, 0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_keeps_small_steps(self, dtype):
        x = (draw(4, 8) * 1e-4).to(dtype)
        out = fake_quantize(x, 8, granularity="token")
        assert out.dtype == dtype and (out - x).float().norm() < 0.01 * x.float().norm()

    def test_refusals(self):
        for bits in (0, 1, 9):
            with pytest.raises(ValueError, match=f"bits = {bits} given: choose 2 to 8"):
                fake_quantize(torch.ones(2), bits)
        with pytest.raises(ValueError, match="unknown granularity 'row'.*tensor"):
            fake_quantize(torch.ones(2), granularity="row")
        with pytest.raises(ValueError, match=r"axis 2 .* 2 axes"):
            fake_quantize(torch.ones(2, 2), granularity="channel", axis=2)
        with pytest.raises(ValueError, match="no tensor to quantise"):
            fake_quantize(torch.ones(0))
        for bad in (float("nan"), float("inf"), -float("inf")):
            for granularity in quant.GRANULARITIES:
                x = torch.ones(3, 4)
                x[1, 2] = bad
                with pytest.raises(ValueError, match="not finite"):
                    fake_quantize(x, granularity=granularity)


class TestInt8:
    @pytest.mark.parametrize("granularity", quant.GRANULARITIES)
    def test_round_trip_within_half_a_step(self, granularity):
        x = draw(9, 13) * torch.logspace(-30, 20, 9)[:, None]
        q, scale = quantize_int8(x, granularity=granularity)
        assert q.dtype == torch.int8 and int(q.min()) >= -127
        assert ((q * scale.double() - x).abs() <= scale * 0.5 * (1 + 1e-6)).all()
        assert (q.abs().amax(1) == 127).all() or granularity == "tensor"

    def test_numbers_too_small_for_a_step_become_zero_not_garbage(self):
        x = torch.full((2, 4), 2e-43)
        q, scale = quantize_int8(x)
        assert torch.equal(q, torch.zeros_like(q)) and float(scale) == 1

    @pytest.mark.parametrize(
        "m, k, n", [(1, 1, 1), (5, 7, 3), (17, 8, 8), (64, 33, 65), (3, 1024, 2), (0, 4, 3), (4, 0, 3)]
    )
    def test_the_product_is_exact(self, m, k, n):
        generator = torch.Generator().manual_seed(m + k + n)
        a, b = (torch.randint(-128, 128, s, dtype=torch.int8, generator=generator) for s in ((m, k), (k, n)))
        expected = a.long() @ b.long()
        for run in (int_matmul, quant.padded_int_mm, quant._int_reference):
            got = run(a, b)
            assert got.dtype == torch.int32 and got.shape == (m, n) and torch.equal(got.long(), expected)
        assert torch.equal(int_matmul(b.t(), a.t()).long(), expected.t()), "transposed views too"

    @pytest.mark.parametrize("a, b", [(-128, -128), (-128, 127), (127, 127)])
    def test_the_largest_sums_that_fit(self, a, b):
        k = quant.MAX_INNER
        x, y = torch.full((1, k), a, dtype=torch.int8), torch.full((k, 1), b, dtype=torch.int8)
        assert int(int_matmul(x, y)) == a * b * k and 128 * 128 * (k + 1) > 2**31 - 1
        with pytest.raises(ValueError, match=f"a sum over {k + 1} products can overflow.*{k}"):
            int_matmul(x.expand(1, k).repeat(1, 2)[:, : k + 1], y.repeat(2, 1)[: k + 1])

    def test_shapes_that_do_not_multiply(self):
        a = torch.zeros(2, 3, dtype=torch.int8)
        for run in (quant._int_torch, quant._int_reference):
            with pytest.raises(ValueError, match="do not multiply"):
                inspect.unwrap(run)(a, a)

    def test_padding_obeys_the_rules_of_the_gpu(self, monkeypatch):
        seen = []
        whole = torch._int_mm

        def watch(a, b):
            seen.append((a.shape[0] > 16, a.shape[1] % 8, b.shape[1] % 8))
            return whole(a, b)

        monkeypatch.setattr(torch, "_int_mm", watch)
        for m, k, n in ((1, 1, 1), (16, 8, 8), (17, 8, 8), (40, 9, 15)):
            a, b = torch.ones(m, k, dtype=torch.int8), torch.ones(k, n, dtype=torch.int8)
            assert torch.equal(quant.padded_int_mm(a, b), torch.full((m, n), k, dtype=torch.int32))
        assert seen == [(True, 0, 0)] * 4

    def test_the_choice_says_whether_it_is_fast_here(self, monkeypatch):
        a = torch.zeros(1, 1, dtype=torch.int8)
        for vnni, word in ((True, "CPU with 8-bit"), (False, "CPU without 8-bit")):
            monkeypatch.setattr(quant, "has_vnni", lambda vnni=vnni: vnni)
            assert word in dispatch.explain("int_matmul", a, a).reason

    @pytest.mark.parametrize(
        "flags, expected",
        [
            ("fpu avx512_vnni", True),
            ("avx_vnni", True),
            ("amx_int8 x", True),
            ("fpu avx512f", False),
            ("", False),
        ],
    )
    def test_vnni_from_the_flags(self, monkeypatch, flags, expected):
        monkeypatch.setattr(quant, "cpu_flags", lambda: frozenset(flags.split()))
        assert quant.has_vnni.__wrapped__() is expected


class TestIntegerLinear:
    @pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 5, 6), (3, 1, 2, 6)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_the_same_sums_in_double(self, shape, bias):
        torch.manual_seed(0)
        linear = nn.Linear(6, 4, bias=bias)
        layer, x = IntegerLinear.from_linear(linear), draw(*shape)
        q, token = quantize_int8(x, granularity="token")
        weight, channel = quantize_int8(linear.weight, granularity="channel")
        expected = (q.double() @ weight.double().t()) * token.double() * channel.double().flatten()
        expected = expected + (linear.bias.double() if bias else 0)
        assert (layer(x).double() - expected).abs().max() < 1e-6 and layer(x).shape == (*shape[:-1], 4)

    def test_equals_the_simulated_layer(self):
        torch.manual_seed(0)
        linear, x = nn.Linear(64, 48), draw(10, 64)
        weight = fake_quantize(linear.weight, 8, granularity="channel")
        expected = nn.functional.linear(fake_quantize(x, 8, granularity="token"), weight, linear.bias)
        got = IntegerLinear.from_linear(linear)(x)
        assert (got - expected).norm() < 1e-6 * expected.norm()
        with torch.no_grad():
            assert 0 < (got - linear(x)).norm() < 0.02 * linear(x).norm()

    def test_a_token_does_not_depend_on_the_others(self):
        layer, x = IntegerLinear.from_linear(nn.Linear(8, 3)), draw(4, 8)
        louder = x.clone()
        louder[0] *= 1000
        assert torch.equal(layer(louder)[1:], layer(x)[1:])

    @pytest.mark.parametrize(
        "dtype, bound", [(torch.float64, 0.02), (torch.bfloat16, 0.03), (torch.float16, 0.02)]
    )
    def test_dtypes(self, dtype, bound):
        torch.manual_seed(0)
        linear, x = nn.Linear(32, 16), draw(5, 32)
        with torch.no_grad():
            got, expected = IntegerLinear.from_linear(linear)(x.to(dtype)), linear(x)
        assert got.dtype == dtype and (got - expected).norm() < bound * expected.norm()

    def test_empty_noncontiguous_and_saved(self):
        layer = IntegerLinear.from_linear(nn.Linear(6, 4))
        assert layer(torch.zeros(2, 0, 6)).shape == (2, 0, 4)
        x = draw(6, 5).t()
        assert torch.equal(layer(x), layer(x.contiguous()))
        other = IntegerLinear(6, 4)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x)) and "in_features=6" in repr(other)

    def test_refusals(self):
        layer = IntegerLinear.from_linear(nn.Linear(6, 4))
        with pytest.raises(ValueError, match="no gradient"):
            layer(torch.ones(2, 6, requires_grad=True))
        with pytest.raises(ValueError, match="width 5 given, the weight takes 6"):
            inspect.unwrap(integer_linear)(torch.ones(2, 5), layer.weight, layer.scale)
        with pytest.raises(ValueError, match="not finite"):
            layer(torch.full((1, 6), float("nan")))
        with torch.device("meta"):
            wide = nn.Linear(quant.MAX_INNER + 1, 1)
        with pytest.raises(ValueError, match="can overflow int32"):
            IntegerLinear.from_linear(wide)


class TestMasks:
    def test_two_of_four(self):
        w = draw(6, 16)
        mask = sparse.magnitude_mask(w, "2:4")
        groups, kept = w.abs().view(-1, 4), mask.view(-1, 4)
        assert (kept.sum(1) == 2).all()
        assert all(g[k].min() >= g[~k].max() for g, k in zip(groups, kept, strict=True))

    @pytest.mark.parametrize("fraction, dropped", [(0.0, 0), (0.5, 20), (0.26, 10), (0.999, 40)])
    def test_a_fraction(self, fraction, dropped):
        w = draw(5, 8)
        mask = sparse.magnitude_mask(w, fraction)
        assert int((~mask).sum()) == dropped
        if 0 < dropped < 40:
            assert w.abs()[mask].min() >= w.abs()[~mask].max()

    def test_by_row_and_ties(self):
        w = draw(5, 8) * torch.logspace(0, 4, 5)[:, None]
        assert (sparse.magnitude_mask(w, 0.25, per_row=True).sum(1) == 6).all()
        assert sparse.magnitude_mask(w, 0.25)[0].sum() == 0
        assert sparse.magnitude_mask(torch.ones(4), 0.5).tolist() == [True, True, False, False]

    def test_training_keeps_the_zeros(self):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        before = layer.weight.detach().clone()
        mask = sparse.magnitude_mask(layer.weight, "2:4")
        assert sparse.apply_mask(layer, mask) is layer
        assert torch.equal(layer.weight, before * mask) and sparse.sparsity_of(layer) == 0.5
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            layer(draw(4, 8)).square().sum().backward()
            gradient = layer.parametrizations.weight.original.grad
            assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()
            optimizer.step()
        assert (layer.weight[~mask] == 0).all() and not torch.equal(layer.weight[mask], before[mask])
        after = layer.weight.detach().clone()
        sparse.merge_mask(layer)
        assert isinstance(layer.weight, nn.Parameter) and torch.equal(layer.weight, after)

    def test_what_is_not_used_cannot_spoil(self):
        layer = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, float("inf"), 2.0, 3.0]]))
        sparse.apply_mask(layer, torch.tensor([[True, False, True, True]]))
        out = layer(torch.ones(1, 4))
        out.sum().backward()
        assert float(out) == 6 and layer.parametrizations.weight.original.grad.tolist() == [[1, 0, 1, 1]]

    def test_refusals(self):
        w = draw(3, 6)
        with pytest.raises(ValueError, match="groups of four"):
            sparse.magnitude_mask(w, "2:4")
        with pytest.raises(ValueError, match="unknown pattern '1:4'"):
            sparse.magnitude_mask(w, "1:4")
        for fraction in (-0.1, 1.0):
            with pytest.raises(ValueError, match="fraction in"):
                sparse.magnitude_mask(w, fraction)
        with pytest.raises(ValueError, match="not finite"):
            sparse.magnitude_mask(w * float("nan"))
        layer = nn.Linear(6, 3)
        with pytest.raises(ValueError, match=r"no parameter 'wight' of its own: it has \['bias', 'weight'\]"):
            sparse.apply_mask(layer, torch.ones(3, 6, dtype=torch.bool), name="wight")
        with pytest.raises(ValueError, match=r"shape \(6, 3\).*needs \(3, 6\)"):
            sparse.apply_mask(layer, torch.ones(6, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match="has no mask"):
            sparse.merge_mask(layer)
        sparse.apply_mask(layer, torch.ones(3, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match="masked already"):
            sparse.apply_mask(layer, torch.ones(3, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match="no linear layer"):
            sparse.sparsity_of(nn.ReLU())
