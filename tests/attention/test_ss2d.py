import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from minilib.attention import Attention, make_attention_layer
from minilib.attention.ss2d import SS2D, snake_orders, ss2d_reference
from minilib.kernels.scan import reference as scan_reference

GRIDS = [(1, 1), (1, 5), (4, 1), (2, 3), (4, 4), (5, 3), (5, 5), (6, 7)]


def build(dim=6, grid=(3, 5), seed=0, **options):
    torch.manual_seed(seed)
    layer = make_attention_layer("ss2d", dim, 2, grid=grid, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer


def tokens(layer, b=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    n, dim = math.prod(layer.grid), layer.in_proj.in_features
    return torch.randn(b, n, dim, generator=g, dtype=torch.float64)


class TestOrders:
    @pytest.mark.parametrize("rows, columns", GRIDS)
    def test_each_visits_every_token_by_steps_to_a_neighbour(self, rows, columns):
        for order in snake_orders(rows, columns):
            assert order.sort().values.tolist() == list(range(rows * columns))
            y, x = order // columns, order % columns
            steps = y.diff().abs() + x.diff().abs()
            assert (steps == 1).all()

    def test_a_raster_would_jump(self):
        raster = torch.arange(20)
        steps = (raster // 5).diff().abs() + (raster % 5).diff().abs()
        assert (steps > 1).sum() == 3

    @pytest.mark.parametrize("rows, columns", GRIDS)
    def test_they_come_as_two_pairs_along_rows_and_along_columns(self, rows, columns):
        orders = snake_orders(rows, columns)
        assert torch.equal(orders[0], orders[1].flip(0)) and torch.equal(orders[2], orders[3].flip(0))
        if columns > 1 and rows > 1:
            assert (orders[0][:columns] // columns == 0).all() and (orders[2][:rows] % columns == 0).all()

    @pytest.mark.parametrize("side", [2, 4, 8])
    def test_on_even_squares_they_are_lamamba_diffs(self, side):
        """Their rule: start, direction; every other line is walked back (model/continuous_scan.py)."""
        end = side - 1

        def walk(row, column, down, right, along_rows):
            path = []
            for i in range(side):
                for j in range(side):
                    along = j if i % 2 == 0 else end - j
                    y, x = (i, along) if along_rows else (along, i)
                    path.append((row + down * y) * side + column + right * x)
            return path

        theirs = [
            walk(0, 0, 1, 1, True),
            walk(end, 0, -1, 1, True),
            walk(end, 0, -1, 1, False),
            walk(end, end, -1, -1, False),
        ]
        assert snake_orders(side, side).tolist() == theirs


@pytest.mark.parametrize("options", [{}, {"d_state": 3, "dt_rank": 2}, {"conv": 1, "expand": 1.0}])
def test_equals_the_recurrence_path_by_path(options):
    layer = build(**options)
    x = tokens(layer)
    torch.testing.assert_close(layer(x), ss2d_reference(layer, x), atol=1e-11, rtol=0)


def one_path(layer, u, i):
    """The scan along path i alone, straight from the definition."""
    order = layer.orders[i]
    made = u[:, order] @ layer.x_proj_weight[i].t()
    dt, B, C = made.split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
    dt = F.softplus(dt @ layer.dt_projs_weight[i].t() + layer.dt_projs_bias[i])
    A, D = -layer.A_logs.chunk(4)[i].exp(), layer.Ds.chunk(4)[i]
    y = torch.empty_like(u)
    y[:, order] = scan_reference(*(t.transpose(1, 2) for t in (u[:, order], dt)), A, B.mT, C.mT, D).mT
    return y


class TestOnePath:
    def test_the_four_are_summed(self):
        layer = build(d_state=2)
        u = torch.randn(2, 15, 12, dtype=torch.float64)
        torch.testing.assert_close(
            layer.scan(u), sum(one_path(layer, u, i) for i in range(4)), atol=1e-11, rtol=0
        )

    @pytest.mark.parametrize("path", range(4))
    def test_a_token_sees_those_before_it_on_the_path_and_no_other(self, path):
        layer = build(d_state=2)
        with torch.no_grad():
            # Only this path is left: the others read nothing from their states and have no direct path.
            for i in set(range(4)) - {path}:
                layer.x_proj_weight[i, -layer.d_state :] = 0
                layer.Ds[12 * i : 12 * i + 12] = 0
        u = torch.randn(1, 15, 12, dtype=torch.float64, requires_grad=True)
        out = layer.scan(u)
        time = layer.orders[path].argsort()
        for token in range(15):
            (g,) = torch.autograd.grad(out[0, token].sum(), u, retain_graph=True)
            assert torch.equal(g[0].abs().sum(1) != 0, time <= time[token])

    def test_with_all_four_every_token_sees_every_other(self):
        layer = build(conv=1)
        x = tokens(layer, b=1).requires_grad_()
        out = layer(x)
        for token in range(15):
            (g,) = torch.autograd.grad(out[0, token].sum(), x, retain_graph=True)
            assert (g[0].abs().sum(1) > 0).all()


@pytest.mark.parametrize("grid", [(3, 5), (5, 5)])
def test_turning_the_image_by_half_a_turn_exchanges_each_path_with_its_reverse(grid):
    """On a grid of odd sides; so the layer with exchanged coefficients gives the turned result."""
    layer = build(grid=grid, d_state=2)
    other = build(grid=grid, d_state=2)
    swap = [1, 0, 3, 2]
    with torch.no_grad():
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            getattr(other, name).copy_(getattr(layer, name)[swap])
        for name in ("A_logs", "Ds"):
            getattr(other, name).copy_(torch.cat([getattr(layer, name).chunk(4)[i] for i in swap]))
        other.conv2d.weight.copy_(layer.conv2d.weight.flip(2, 3))
    x = tokens(layer)
    torch.testing.assert_close(other(x.flip(1)), layer(x).flip(1), atol=1e-12, rtol=0)
    assert (layer(x.flip(1)) - layer(x).flip(1)).abs().max() > 1e-3


def test_parameters_are_those_of_the_official_layer():
    """Names and shapes of yunxiangfu2001/LaMamba-Diff: model/vmamba.py at width 320, as the XL configuration has it."""
    layer = SS2D(320, 1, grid=(2, 2))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (1280, 320),
        "conv2d.weight": (640, 1, 3, 3),
        "x_proj_weight": (4, 22, 640),
        "dt_projs_weight": (4, 640, 20),
        "dt_projs_bias": (4, 640),
        "A_logs": (2560, 1),
        "Ds": (2560,),
        "out_norm.weight": (640,),
        "out_norm.bias": (640,),
        "out_proj.weight": (320, 640),
    }
    assert set(layer.state_dict()) == set(shapes)


def test_initial_coefficients():
    layer = SS2D(32, 4, grid=(2, 2), d_state=4)
    dt = F.softplus(layer.dt_projs_bias)
    assert dt.min() >= 0.00099 and dt.max() <= 0.101 and dt.log().std() > 1
    torch.testing.assert_close(-layer.A_logs.exp(), -torch.arange(1.0, 5).expand(256, 4))
    assert (layer.Ds == 1).all()
    x = torch.randn(3, 4, 32)
    out = layer(x)
    assert out.isfinite().all() and 1e-3 < out.std() < 10


def test_it_trains_under_autocast():
    layer = SS2D(16, 2, grid=(3, 3), d_state=2)
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(out.float(), layer(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grid": (3, 0)}, "grid"),
        ({"grid": (2, 3, 4)}, "grid"),
        ({"grid": (2, 2), "d_state": 0}, "d_state=0 has to be positive"),
        ({"grid": (2, 2), "conv": 2}, "conv=2 has to be odd"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_attention_layer("ss2d", 8, 2, **options)


def test_it_is_no_processor_and_counts_its_tokens():
    with pytest.raises(ValueError, match="use make_attention_layer"):
        Attention(8, 2, variant="ss2d", variant_options={"grid": (2, 2)})
    layer = SS2D(8, 2, grid=(2, 3))
    with pytest.raises(ValueError, match=r"grid=\(2, 3\) needs 6 tokens, got 5"):
        inspect.unwrap(SS2D.forward)(layer, torch.zeros(1, 5, 8))
