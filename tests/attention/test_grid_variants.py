"""Window, proxy, spatial, temporal and latents: what each has to be in its own limits."""

import math
import subprocess
import sys

import pytest
import torch

from minilib.attention import attention_weights, full_attention, get_attention
from minilib.attention.grids import from_cells, to_cells
from minilib.attention.latents import LatentAttention
from minilib.attention.window import window_sees


def qkv(n, *, b=2, h=3, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, h, n, d, generator=g, dtype=torch.float64) for _ in range(3))


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class TestCells:
    @pytest.mark.parametrize(
        "grid, cell, shift",
        [
            ((4, 6), (2, 3), (1, 2)),
            ((5, 7), (3, 2), (2, 1)),
            ((3, 5, 4), (1, 2, 3), (0, 1, 1)),
            ((7,), (3,), (0,)),
        ],
    )
    def test_there_and_back(self, grid, cell, shift):
        x = torch.randn(2, 3, math.prod(grid), 4)
        cells = to_cells(x, grid, cell, shift=shift)
        assert cells.shape[0] == 6 and cells.shape[2] == math.prod(cell)
        assert torch.equal(from_cells(cells, grid, cell, heads=3, shift=shift), x)

    def test_order(self):
        x = torch.arange(12.0).view(1, 1, 12, 1)
        assert to_cells(x, (3, 4), (3, 2))[0, :, :, 0].tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
        rolled = to_cells(x, (3, 4), (3, 2), shift=(1, 1))
        assert rolled[0, :, :, 0].tolist() == [[5, 6, 9, 10, 1, 2], [7, 4, 11, 8, 3, 0]]
        overhanging = to_cells(x, (3, 4), (2, 4))[0, :, :, 0].tolist()
        assert overhanging == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 0, 0, 0]]


class TestWindow:
    @pytest.mark.parametrize("window, shift", [((4, 5), 0), ((4, 5), (3, 2)), (9, 0), (9, 8)])
    def test_a_window_that_covers_the_grid_is_full_attention(self, window, shift):
        q, k, v = qkv(20)
        close(
            get_attention("window", grid=(4, 5), window=window, shift=shift)(q, k, v), full_attention(q, k, v)
        )

    def test_windows_of_one_token_give_back_the_values(self):
        q, k, v = qkv(20)
        close(get_attention("window", grid=(4, 5), window=1)(q, k, v), v)

    def test_is_full_attention_in_each_window(self):
        q, k, v = qkv(24)
        out = get_attention("window", grid=(4, 6), window=(2, 3))(q, k, v)
        for rows in (range(0, 2), range(2, 4)):
            for columns in (range(0, 3), range(3, 6)):
                own = [6 * r + c for r in rows for c in columns]
                close(out[:, :, own], full_attention(*(x[:, :, own] for x in (q, k, v))))

    @pytest.mark.parametrize(
        "grid, window, shift", [((6, 6), 3, 1), ((8, 4), (4, 2), (2, 1)), ((5, 7), 3, 2)]
    )
    def test_who_sees_whom_in_plain_words(self, grid, window, shift):
        """Cuts lie at the shift and every window from there; nobody sees across a cut, nor round the border."""
        windows = window if isinstance(window, tuple) else (window,) * 2
        shifts = shift if isinstance(shift, tuple) else (shift,) * 2
        places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]

        def cut_between(a, b, axis):
            low, high = sorted((a, b))
            return any((p - shifts[axis]) % windows[axis] == 0 for p in range(low + 1, high + 1))

        wanted = [
            [not any(cut_between(a[axis], b[axis], axis) for axis in (0, 1)) for b in places] for a in places
        ]
        n = len(places)
        assert window_sees(n, n, grid=grid, window=window, shift=shift).tolist() == wanted

    def test_equals_swin_by_its_own_recipe(self):
        """Roll, cut, mask by the nine regions of the rolled image, roll back: Swin's figure 4."""
        size, window, shift = 6, 3, 1
        q, k, v = qkv(size * size, b=1, h=1)
        out = get_attention("window", grid=(size, size), window=window, shift=shift)(q, k, v)
        regions = torch.zeros(size, size)
        bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for number, (rows, columns) in enumerate((r, c) for r in bands for c in bands):
            regions[rows, columns] = number

        def cut(x):
            x = x.view(size // window, window, size // window, window, -1)
            return x.transpose(1, 2).reshape(-1, window * window, x.shape[-1])

        def rolled(x):
            return cut(x.view(size, size, -1).roll((-shift, -shift), (0, 1)))

        region = cut(regions[..., None])
        mask = (region == region.transpose(1, 2))[None]
        weights = attention_weights(rolled(q)[None], rolled(k)[None], mask=mask)[0]
        own = (weights @ rolled(v)).view(2, 2, window, window, 4)
        back = own.transpose(1, 2).reshape(size, size, 4).roll((shift, shift), (0, 1))
        close(out[0, 0], back.reshape(-1, 4))

    def test_shifted_and_plain_windows_together_reach_further(self):
        options = {"grid": (6, 6), "window": 2}
        plain, shifted = (window_sees(36, 36, **options, shift=s).double() for s in (0, 1))
        assert ((plain @ shifted) > 0).sum() > (plain > 0).sum()
        assert torch.equal((plain @ plain) > 0, plain > 0)

    def test_is_one_call(self, monkeypatch):
        calls = []
        from minilib.attention import window as module

        def counted(*args, **options):
            calls.append(args[0].shape)
            return real(*args, **options)

        real = module.fused_attention
        monkeypatch.setattr(module, "fused_attention", counted)
        get_attention("window", grid=(6, 4), window=2, shift=1)(*qkv(24))
        assert calls == [(6, 6, 4, 4)]

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"grid": (0, 4), "window": 2}, r"'window': grid=\(0, 4\)"),
            ({"grid": (4, 4), "window": 0}, "'window': window=0"),
            ({"grid": (4, 4), "window": (2, 2, 2)}, r"window=\(2, 2, 2\).*2 axes of grid=\(4, 4\)"),
            ({"grid": (4, 4), "window": 2, "shift": 2}, "shift=2 has to be smaller than window=2"),
            ({"grid": (4, 4), "window": 2, "shift": -1}, "'window': shift=-1"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            get_attention("window", **options)

    def test_a_mask_is_refused(self):
        q, k, v = qkv(16)
        with pytest.raises(ValueError, match=r"'window' takes no mask, got one of shape \(16, 16\)"):
            get_attention("window", grid=(4, 4), window=2)(q, k, v, mask=torch.ones(16, 16, dtype=torch.bool))


class TestProxy:
    def test_cells_of_one_token_are_softmax_applied_twice(self):
        q, k, v = qkv(12)
        weights = attention_weights(q, k)
        close(get_attention("proxy", grid=(3, 4), cell=1)(q, k, v), weights @ (weights @ v))

    @pytest.mark.parametrize("cell", [(3, 4), 7])
    def test_one_cell_gives_every_token_the_mean_value(self, cell):
        q, k, v = qkv(12)
        close(get_attention("proxy", grid=(3, 4), cell=cell)(q, k, v), v.mean(2, keepdim=True).expand_as(v))

    def test_tokens_that_are_equal_in_each_cell_see_what_full_attention_sees(self):
        small = qkv(4)
        q, k, v = (
            x.view(2, 3, 2, 2, 4).repeat_interleave(2, 2).repeat_interleave(3, 3).flatten(2, 3) for x in small
        )
        out = get_attention("proxy", grid=(4, 6), cell=(2, 3))(q, k, v)
        weights = attention_weights(*small[:2])
        expected = (weights @ (weights @ small[2])).view(2, 3, 2, 2, 4)
        close(out, expected.repeat_interleave(2, 2).repeat_interleave(3, 3).flatten(2, 3))

    def test_costs_what_the_paper_counts(self):
        """2 M M d + 2 N M d multiply-adds, with M = N / 16 proxies for cells of 4 x 4."""
        from minilib.attention import attention_variants

        n, d = 64 * 64, 72
        flops = attention_variants()["proxy"].flops(1, 16, n, n, d, grid=(64, 64), cell=4)
        proxies, width = n // 16, 16 * d
        assert flops == 2 * (2 * proxies**2 * width + 2 * n * proxies * width)

    def test_options(self):
        with pytest.raises(ValueError, match="'proxy': cell=0"):
            get_attention("proxy", grid=(4, 4), cell=0)


class TestFactorised:
    @pytest.mark.parametrize(
        "name, grid", [("spatial", (1, 3, 4)), ("temporal", (12, 1)), ("spatial", (1, 12))]
    )
    def test_one_frame_or_one_place_is_full_attention(self, name, grid):
        q, k, v = qkv(12)
        close(get_attention(name, grid=grid)(q, k, v), full_attention(q, k, v))

    @pytest.mark.parametrize("name, grid", [("spatial", (12, 1, 1)), ("temporal", (1, 3, 4))])
    def test_one_token_each_gives_back_the_values(self, name, grid):
        q, k, v = qkv(12)
        close(get_attention(name, grid=grid)(q, k, v), v)

    def test_frame_by_frame_and_place_by_place(self):
        q, k, v = qkv(12)
        spatial, temporal = (get_attention(n, grid=(3, 2, 2))(q, k, v) for n in ("spatial", "temporal"))
        for frame in range(3):
            own = slice(4 * frame, 4 * frame + 4)
            close(spatial[:, :, own], full_attention(*(x[:, :, own] for x in (q, k, v))))
        for place in range(4):
            close(temporal[:, :, place::4], full_attention(*(x[:, :, place::4] for x in (q, k, v))))

    def test_the_two_are_each_other_with_the_axes_exchanged(self):
        q, k, v = qkv(12)
        swapped = [x.unflatten(2, (3, 4)).transpose(2, 3).flatten(2, 3) for x in (q, k, v)]
        out = (
            get_attention("spatial", grid=(4, 3))(*swapped).unflatten(2, (4, 3)).transpose(2, 3).flatten(2, 3)
        )
        close(get_attention("temporal", grid=(3, 4))(q, k, v), out)

    def test_grids_have_two_or_three_axes(self):
        for name in ("spatial", "temporal"):
            with pytest.raises(ValueError, match=f"'{name}': grid=.*has 1 axes, expected 2 or 3"):
                get_attention(name, grid=(12,))


class TestLatents:
    def build(self, **changes):
        torch.manual_seed(0)
        options = {"grid": (4, 4), "group": 2, "latents": 2} | changes
        return LatentAttention(3, 4, **options).double()

    def test_is_windows_when_nothing_is_read_back(self):
        attend = self.build()
        with torch.no_grad():
            attend.to_kv.weight.zero_()
            attend.to_kv.bias.zero_()
        q, k, v = qkv(16)
        close(attend(q, k, v), get_attention("window", grid=(4, 4), window=2)(q, k, v))

    def test_without_the_latents_exchange_groups_stay_apart(self):
        attend = self.build()
        with torch.no_grad():
            attend.to_qkv.weight.zero_()
            attend.to_qkv.bias.zero_()
        q, k, v = qkv(16)
        near = window_sees(16, 16, grid=(4, 4), window=2)
        changed = v.clone()
        changed[:, :, 0] += 1
        moved = (attend(q, k, changed) - attend(q, k, v)).abs().amax((0, 1, 3))
        assert torch.equal(moved != 0, near[0])

    def test_groups_differ_by_their_latents_only(self):
        attend = self.build()
        q, k, v = (x[:, :, :1].expand(-1, -1, 16, -1) for x in qkv(16))
        out = attend(q, k, v)
        assert not torch.allclose(out[:, :, 0], out[:, :, -1])
        with torch.no_grad():
            attend.latents.copy_(attend.latents[:1].expand_as(attend.latents).clone())
        out = attend(q, k, v)
        close(out, out[:, :, :1].expand_as(out))

    @pytest.mark.parametrize("exponent", [4 / 3])
    def test_pairs_grow_as_the_paper_says(self, exponent):
        """n L + (L m / n)**2 pairs, at the best n: L**(4/3) (section 3.1)."""

        def pairs(length, latents=4):
            return min(
                length * n + (length * latents // n) ** 2 for n in (2**i for i in range(2, 12)) if n <= length
            )

        rise = math.log(pairs(2**18) / pairs(2**9)) / math.log(2**9)
        assert abs(rise - exponent) < 0.02

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"group": 3}, r"groups of \(3, 3\) do not divide grid=\(4, 4\)"),
            ({"latents": 0}, "latents=0 has to be a whole number"),
            ({"grid": (4, 0)}, r"grid=\(4, 0\)"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.build(**options)

    def test_other_heads(self):
        with pytest.raises(ValueError, match="made for 3 heads of width 4, got 2 of width 6"):
            self.build()(*qkv(16, h=2, d=6))

    def test_under_autocast(self):
        attend, inputs = self.build().float(), [x.float() for x in qkv(16)]
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*(x.bfloat16() for x in inputs))
        assert out.dtype == torch.bfloat16
        close(out.float(), attend(*inputs), atol=0.05)


COMPILED = """
import warnings
import torch
from minilib.attention import get_attention
warnings.simplefilter("ignore")
options = {
    "window": {"grid": (5, 7), "window": 3, "shift": 1},
    "causal": {},
    "latents": {"num_heads": 2, "head_dim": 4, "grid": (5, 7), "group": (5, 1), "latents": 1},
}
for name in ("window", "causal", "latents"):
    attend = get_attention(name, **options[name])
    q, k, v = torch.randn(3, 2, 2, 35, 4)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    print(name, torch.allclose(compiled(q, k, v), attend(q, k, v), atol=1e-6))
"""


def test_compiles_into_one_graph():
    """In a process of its own: the tests' type checks are no part of the graph."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout.split() == ["window", "True", "causal", "True", "latents", "True"], done.stderr[-2000:]
