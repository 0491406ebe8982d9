import inspect
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import compare, guarded
from torch._subclasses.fake_tensor import FakeTensorMode

from minilib.kernels import explain, halo, local
from minilib.kernels.halo import Axis, choose_tiling, disk_limit, reach_of


def inputs(grid, extra=0, extra_queries=0, *, b=2, h=2, d=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = [math.prod(grid) + e for e in (extra_queries, extra, extra)]
    return [torch.randn(b, h, n, d, generator=g, dtype=dtype).requires_grad_() for n in lengths]


def by_hand(grid, radius, n, m):
    """Pair by pair, from the definition."""
    size, columns = math.prod(grid), grid[1]
    sees = torch.ones(n, m, dtype=torch.bool)
    for i, j in product(range(size), range(size)):
        down, across = i // columns - j // columns, i % columns - j % columns
        sees[i, j] = math.hypot(down, across) < radius - 1e-9
    return sees


SETTINGS = [
    ((5, 7), 2.3, 0, 0),
    ((12, 11), 3, 2, 1),
    ((1, 50), 4, 0, 3),
    ((33, 3), 2, 5, 0),
    ((19, 26), 1.5, 1, 1),
    ((6, 6), 1, 0, 0),
]


class TestTiled:
    @pytest.mark.parametrize("grid, radius, extra, extra_queries", SETTINGS)
    def test_equals_softmax_attention_with_the_mask_of_the_definition(
        self, grid, radius, extra, extra_queries
    ):
        q, k, v = inputs(grid, extra, extra_queries)
        mask = by_hand(grid, radius, q.shape[2], k.shape[2])
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
        for function in (local.tiled, local.reference, local.local_attention):
            out = function(q, k, v, grid=grid, radius=radius)
            torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
            got = torch.autograd.grad((out * weights).sum(), (q, k, v))
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=0)

    @pytest.mark.parametrize(
        "tile_y, tile_x", [(1, 1), (2, 5), (3, 4), (9, 2), (4, 10), (9, 3), (8, 10), (16, 16)]
    )
    def test_the_size_of_the_tiles_changes_nothing(self, monkeypatch, tile_y, tile_x):
        grid, radius = (9, 10), 3.2
        q, k, v = inputs(grid, extra=2)
        expected = local.reference(q, k, v, grid=grid, radius=radius)
        tiling = tuple(
            Axis(size, tile, 0 if tile >= size else 3)
            for size, tile in zip(grid, (tile_y, tile_x), strict=True)
        )
        monkeypatch.setattr(local, "choose_tiling", lambda *_: tiling)
        out = local.tiled(q, k, v, grid=grid, radius=radius)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        got, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)

    def test_gradcheck(self):
        parts = inputs((3, 4), 1, 1, b=1, h=1, d=2)
        assert torch.autograd.gradcheck(
            lambda q, k, v: local.tiled(q, k, v, grid=(3, 4), radius=1.5), parts, fast_mode=True
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_every_dtype_and_nothing_beside_the_inputs(self, dtype):
        grid = (9, 12)
        parts = [guarded(x.detach().to(dtype)) for x in inputs(grid, 3, 3, d=8)]
        compare(
            lambda q, k, v: local.local_attention(q, k, v, grid=grid, radius=2.5),
            lambda q, k, v: local.reference(q, k, v, grid=grid, radius=2.5),
            parts,
            dtype,
            factor=2.0 if dtype == torch.float32 else 1.0,
        )

    def test_a_radius_beyond_the_diagonal_is_full_attention_and_one_up_to_1_the_identity(self):
        q, k, v = inputs((5, 9))
        full = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(
            local.tiled(q, k, v, grid=(5, 9), radius=math.hypot(4, 8) + 1e-3), full, atol=1e-12, rtol=0
        )
        torch.testing.assert_close(local.tiled(q, k, v, grid=(5, 9), radius=1.0), v, atol=1e-12, rtol=0)

    def test_autocast_keeps_the_attention_in_float32(self):
        q, k, v = inputs((9, 10), 2, 2, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = local.tiled(q, k, v, grid=(9, 10), radius=2)
        assert torch.equal(out, local.tiled(q, k, v, grid=(9, 10), radius=2))

    def test_what_inference_or_fake_tensors_left_behind_serves_training(self):
        q, k, v = inputs((10, 13))
        local._mask_values.cache_clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            local.tiled(*(torch.empty(1, 1, 130, 4) for _ in range(3)), grid=(10, 13), radius=2)
        with torch.inference_mode():
            local.tiled(q, k, v, grid=(10, 13), radius=2)
        local.tiled(q, k, v, grid=(10, 13), radius=2).sum().backward()
        assert v.grad.sum().item() == pytest.approx(v.numel())

    def test_the_mask_is_made_once(self):
        parts = inputs((11, 17))
        local._mask_values.cache_clear()
        for _ in range(3):
            local.tiled(*parts, grid=(11, 17), radius=2)
        assert local._mask_values.cache_info().misses == 1
        mask = local.tile_mask(choose_tiling((4, 4), 3), disk_limit(9), 0, torch.float32, torch.device("cpu"))
        assert mask is None  # all see all

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_torch_func(self):
        q, k, v = inputs((3, 5), b=1, d=2)
        run = lambda *x: local.tiled(*x, grid=(3, 5), radius=1.5)  # noqa: E731
        jacobian = torch.func.jacrev(lambda x: run(q.detach(), k.detach(), x).sum(0))(v.detach())
        assert jacobian.shape == (2, 15, 2, 1, 2, 15, 2)
        stacked = torch.func.vmap(run)(*(torch.stack([x, 2 * x]).detach() for x in (q, k, v)))
        torch.testing.assert_close(stacked[1], run(2 * q, 2 * k, 2 * v), atol=1e-12, rtol=0)


class TestMaskOfKeys:
    GRID = (7, 12)

    def masks(self, m):
        g = torch.Generator().manual_seed(3)
        some = torch.rand(2, 1, 1, m, generator=g) > 0.3
        return {
            "boolean": some,
            "one for all": some[0, 0, 0],
            "added": torch.randn(2, 1, 1, m, generator=g, dtype=torch.float64),
        }

    @pytest.mark.parametrize("name", ["boolean", "one for all", "added"])
    @pytest.mark.parametrize("radius", [3.0, 50.0])
    def test_equals_attention_with_both_masks(self, name, radius):
        q, k, v = inputs(self.GRID, 4, 2)
        mask = self.masks(k.shape[2])[name]
        disk = by_hand(self.GRID, radius, q.shape[2], k.shape[2])
        both = mask & disk if mask.dtype == torch.bool else mask.masked_fill(~disk, -torch.inf)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=both)
        for function in (local.tiled, local.reference):
            out = function(q, k, v, grid=self.GRID, radius=radius, mask=mask)
            torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("shape", [(84, 84), (2, 2, 1, 84), (1, 2, 1, 1, 84)])
    def test_others_are_refused(self, shape):
        with pytest.raises(ValueError, match="takes a mask of keys"):
            local.local_attention(*inputs(self.GRID), grid=self.GRID, radius=2, mask=torch.ones(shape) > 0)


class TestHalo:
    @pytest.mark.parametrize("tiling", [(Axis(7, 3, 2), Axis(5, 2, 4)), (Axis(4, 4, 0), Axis(9, 1, 1))])
    def test_adding_up_is_the_adjoint_of_gathering(self, tiling):
        x = torch.randn(2, 1, *(axis.size for axis in tiling), 3, dtype=torch.float64, requires_grad=True)
        windows = halo.Gather.apply(x, tiling)
        w = torch.randn_like(windows).requires_grad_()
        left, right = (windows * w).sum(), (x * halo.AddUp.apply(w, tiling)).sum()
        torch.testing.assert_close(left, right, atol=1e-10, rtol=0)
        assert torch.autograd.gradcheck(lambda t: halo.Gather.apply(t, tiling), x, fast_mode=True)
        assert torch.autograd.gradcheck(lambda t: halo.AddUp.apply(t, tiling), w, fast_mode=True)

    def test_windows_are_where_they_should_be(self):
        tiling = (Axis(5, 2, 1), Axis(4, 3, 2))
        grid = torch.arange(1.0, 21.0).view(1, 1, 5, 4, 1)
        windows = halo.gather_windows(grid, tiling).view(3, 2, 4, 7)
        for i, j, y, x in product(range(3), range(2), range(4), range(7)):
            row, column = 2 * i + y - 1, 3 * j + x - 2
            inside = 0 <= row < 5 and 0 <= column < 4
            assert windows[i, j, y, x] == (grid[0, 0, row, column, 0] if inside else 0)

    def test_tiles_go_back_to_where_they_were(self):
        tiling = (Axis(5, 2, 0), Axis(7, 3, 0))
        x = torch.randn(2, 3, 5, 7, 4)
        assert torch.equal(halo.scatter_tiles(halo.gather_windows(x, tiling), tiling), x)

    @pytest.mark.parametrize(
        "radius, reach", [(0.5, 0), (1, 0), (1.01, 1), (2, 1), (2.3, 2), (4, 3), (16, 15)]
    )
    def test_reach(self, radius, reach):
        assert reach_of(radius) == reach

    def test_tiles_are_near_8_by_8_and_cover_what_needs_no_halo(self):
        for radius in (3, 4):
            assert choose_tiling((64, 64), reach_of(radius)) == tuple(Axis(64, 8, radius - 1) for _ in "yx")
        assert choose_tiling((8, 8), 7) == (Axis(8, 8, 0), Axis(8, 8, 0))
        assert choose_tiling((40, 40), 39) == (Axis(40, 40, 0), Axis(40, 40, 0))


def test_sizes_of_the_papers_disks():
    """193, 793 and 3205 keys at radius 8, 16 and 32: what 'strictly less' gives."""
    for radius, keys in ((8, 193), (16, 793), (32, 3205)):
        side = 2 * radius + 1
        centre = side * side // 2
        row = local.disk_mask((side, side), radius, side * side, side * side)[centre] if radius < 32 else None
        if row is None:
            steps = torch.arange(-radius, radius + 1)
            row = steps[:, None] ** 2 + steps**2 < disk_limit(radius)
        assert row.sum() == keys


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sees_what_the_definition_says_and_computes_the_same():
    from torch.nn.attention.flex_attention import create_mask

    grid, radius, n, m = (5, 9), 2.3, 47, 48
    seen = create_mask(local.flex_mask(grid, radius), None, None, n, m, device="cpu")[0, 0]
    assert torch.equal(seen, by_hand(grid, radius, n, m))
    parts = [x.detach().float() for x in inputs(grid, 3, 2, d=16)]
    out = local.flex(*parts, grid=grid, radius=radius)
    torch.testing.assert_close(out, local.reference(*parts, grid=grid, radius=radius), atol=1e-6, rtol=0)


class TestChoice:
    def on_gpu(self, capability, *, d=32, dtype=torch.float16, mask=False):
        with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, "capability", lambda device: capability)
            q = torch.empty(1, 1, 64, d, device="cuda", dtype=dtype)
            mask = torch.ones(64, dtype=torch.bool, device="cuda") if mask else None
            return explain(local.LOCAL, q, q, q, grid=(8, 8), radius=2, mask=mask)

    def test_on_a_gpu(self):
        assert self.on_gpu((9, 0)).path == self.on_gpu((8, 0), dtype=torch.float32).path == "flex"
        assert "not yet measured" in self.on_gpu((9, 0)).reason
        for options, reason in (
            ({"capability": (7, 5)}, "below compute capability 8.0"),
            ({"capability": (9, 0), "mask": True}, "mask of keys"),
            ({"capability": (9, 0), "d": 24}, "heads of"),
            ({"capability": (9, 0), "dtype": torch.float64}, "not in float64"),
        ):
            choice = self.on_gpu(**options)
            assert choice.path == "torch" and reason in choice.reason

    def test_on_a_cpu(self, monkeypatch):
        parts = inputs((3, 3), dtype=torch.float32)
        assert explain("local_attention", *parts, grid=(3, 3), radius=2).path == "cpu"
        monkeypatch.setenv("MINILIB_KERNELS", "ref")
        assert explain("local_attention", *parts, grid=(3, 3), radius=2).path == "reference"

    @pytest.mark.parametrize(
        "change, reason",
        [
            ({}, "needs a CUDA GPU|not installed"),
            ({"mask": torch.ones(9) > 0}, "no mask of keys"),
            ({"d": 160}, "160"),
        ],
    )
    def test_triton_says_why_not(self, monkeypatch, change, reason):
        monkeypatch.setenv("MINILIB_KERNELS", "triton")
        change = dict(change)
        parts = inputs((3, 3), d=change.pop("d", 3), dtype=torch.float32)
        with pytest.raises(RuntimeError, match=reason):
            local.local_attention(*parts, grid=(3, 3), radius=2, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"grid": (3, 4)},
            r"grid=\(3, 4\) needs queries of shape \(b, h, 12 or more, d\), got \(2, 2, 9, 3\)",
        ),
        ({"grid": (3, 0)}, "both positive"),
        ({"radius": 0}, "radius must be positive"),
        ({"radius": math.inf}, "radius must be positive and finite"),
        ({"v": torch.zeros(2, 2, 8, 3)}, "do not fit each other"),
    ],
)
def test_errors(change, message):
    names = dict(zip("qkv", inputs((3, 3), dtype=torch.float32), strict=True))
    # Without the tests' type checker, which would be first to find a wrong shape.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(local.local_attention)(**({"grid": (3, 3), "radius": 2} | names | change))
