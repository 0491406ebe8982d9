"""Frequencies for longer axes: limits, and the official formulas."""

import math

import pytest
import torch

from minilib.attention import RotaryEmbedding, apply_rotary, grid_ids, interpolated
from minilib.attention.rope import rotary_frequencies
from minilib.attention.rope_scaling import (
    axis_factors,
    ntk_aware,
    position_interpolation,
    yarn,
    yarn_attention_scale,
    yarn_ramp,
)

BASE = rotary_frequencies(32)
MAKERS = {
    "interpolation": position_interpolation,
    "ntk": ntk_aware,
    "yarn": lambda s: yarn(s, 64, beta_fast=8.0),
}


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
class TestEvery:
    def test_factor_one_is_the_identity(self, make):
        close(make(1.0)(BASE, 0), BASE, atol=1e-16)
        rotary, ids = RotaryEmbedding(16), grid_ids(3, 4)
        plain = rotary(ids)
        rotary.scaling = make((1.0, 1.0))
        close(rotary(ids), plain, atol=1e-7)

    def test_each_axis_has_its_own_factor(self, make):
        scale = make((1.0, 3.0))
        close(scale(BASE, 0), BASE, atol=1e-16)
        close(scale(BASE, 1), make(3.0)(BASE, 0), atol=0)
        assert not torch.allclose(scale(BASE, 1), BASE)
        rotary, ids = RotaryEmbedding(16), grid_ids(6, 6)
        plain = rotary(ids)
        rotary.scaling = scale
        # The rows' half is that of training, the columns' is not.
        assert torch.equal(rotary(ids)[:, :4], plain[:, :4])
        assert not torch.allclose(rotary(ids)[:, 4:], plain[:, 4:])

    def test_the_slowest_frequency_is_interpolated_and_none_is_raised(self, make):
        new = make(4.0)(BASE, 0)
        close(new[-1], BASE[-1] / 4, atol=1e-18)
        assert (new <= BASE * (1 + 1e-12)).all() and (new >= BASE / 4 * (1 - 1e-12)).all()
        assert (new.diff() < 0).all()

    def test_keeps_the_dtype_and_works_on_the_meta_device(self, make):
        assert make(2.0)(BASE.float(), 0).dtype == torch.float32
        assert make(2.0)(BASE.to("meta"), 0).shape == BASE.shape

    @pytest.mark.parametrize("factors", [0.0, -1.0, math.inf, (1.0, 0.0), ()])
    def test_wrong_factors(self, make, factors):
        with pytest.raises(ValueError, match="factors have to be positive and finite"):
            make(factors)

    def test_an_axis_without_a_factor(self, make):
        with pytest.raises(ValueError, match="no factor for axis 2: 2 given"):
            make((1.0, 2.0))(BASE, 2)


class TestInterpolation:
    def test_one_factor_is_interpolated(self):
        close(position_interpolation(3.0)(BASE, 1), interpolated(3.0)(BASE, 1), atol=0)

    def test_positions_count_a_fraction(self):
        rotary, stretched = RotaryEmbedding(16), RotaryEmbedding(16)
        stretched.scaling = position_interpolation((2.0, 4.0))
        ids = grid_ids(4, 4)
        close(stretched(ids * torch.tensor([2, 4])), rotary(ids), atol=1e-6)


class TestNtk:
    @pytest.mark.parametrize("dim, theta, factor", [(32, 10_000.0, 4.0), (8, 100.0, 1.5), (4, 100.0, 7.0)])
    def test_is_the_change_of_base_of_the_official_code(self, dim, theta, factor):
        changed = rotary_frequencies(dim, theta=theta * factor ** (dim / (dim - 2)))
        close(ntk_aware(factor)(rotary_frequencies(dim, theta=theta), 0), changed)

    def test_the_fastest_frequency_stays(self):
        assert ntk_aware(16.0)(BASE, 0)[0] == BASE[0] == 1

    def test_needs_two_frequencies(self):
        with pytest.raises(ValueError, match="an axis of width 2 has only one"):
            ntk_aware(2.0)(torch.ones(1), 0)


def official_yarn(dim, theta, length, factor, beta_fast=32, beta_slow=1):
    """FiT's frequencies, in its own terms: dimension, base, trained length."""

    def dimension(turns):
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(beta_fast)), 0), min(math.ceil(dimension(beta_slow)), dim - 1)
    out = []
    for i in range(dim // 2):
        ramp = min(max((i - low) / ((high - low) or 0.001), 0.0), 1.0)
        base = theta ** (-2 * i / dim)
        out.append(base / factor * ramp + base * (1 - ramp))
    return torch.tensor(out, dtype=torch.float64)


class TestYarn:
    @pytest.mark.parametrize(
        "dim, theta, length",
        [
            (32, 10_000.0, 2048),
            (32, 10_000.0, 16),
            (64, 500.0, 300),
            (36, 10_000.0, 256),
            (8, 100.0, 4),
            (8, 100.0, 2048),
        ],
    )
    def test_equals_the_official_formula(self, dim, theta, length):
        new = yarn(4.0, length)(rotary_frequencies(dim, theta=theta), 0)
        close(new, official_yarn(dim, theta, length, 4.0))

    def test_ramp(self):
        frequencies = rotary_frequencies(64)
        kept = yarn_ramp(frequencies, 2048)
        turns = frequencies * 2048 / (2 * math.pi)
        # Rounded outwards to whole indices, so one more on either side may be on the ramp.
        assert (kept[turns > 32][:-1] == 1).all() and (kept[turns < 1][1:] == 0).all()
        assert (kept.diff() <= 0).all() and ((kept > 0) & (kept < 1)).sum() > 5
        steps = kept.diff()[(kept[1:] > 0) & (kept[1:] < 1)]
        close(steps, steps[:1].expand_as(steps))

    def test_fast_frequencies_stay_to_the_bit(self):
        new = yarn(8.0, 2048)(BASE, 0)
        turns = BASE * 2048 / (2 * math.pi)
        assert torch.equal(new[turns > 64], BASE[turns > 64]) and (turns > 64).any()

    def test_each_axis_has_its_own_trained_length(self):
        scale = yarn(4.0, (2048, 64))
        close(scale(BASE, 0), yarn(4.0, 2048)(BASE, 0), atol=0)
        close(scale(BASE, 1), yarn(4.0, 64)(BASE, 0), atol=0)

    def test_wrong_betas(self):
        with pytest.raises(
            ValueError, match="beta_slow=32.0 has to be positive and less than beta_fast=32.0"
        ):
            yarn(2.0, 64, beta_slow=32.0)
        with pytest.raises(ValueError, match="yarn treats slow and fast"):
            yarn(2.0, 64)(torch.ones(1), 0)

    def test_attention_scale(self):
        assert yarn_attention_scale(1.0) == yarn_attention_scale((0.5, 1.0)) == 1.0
        assert yarn_attention_scale((1.0, 4.0)) == pytest.approx(0.1 * math.log(4) + 1)

    def test_scaled_tables_scale_the_logits_by_the_square(self):
        rotary, scale = RotaryEmbedding(16), yarn_attention_scale(4.0)
        table = rotary(grid_ids(3, 3))
        g = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, 2, 9, 16, generator=g) for _ in range(2))

        def logits(table):
            return apply_rotary(q, table) @ apply_rotary(k, table).transpose(-1, -2)

        close(logits(table * scale), logits(table) * scale**2, atol=1e-5)


class TestAxisFactors:
    def test_never_below_one_and_each_axis_apart(self):
        assert axis_factors((8, 32), 16) == (1.0, 2.0)
        assert axis_factors((8, 32), (4, 64)) == (2.0, 1.0)
        assert axis_factors((8, 32), 16, decoupled=False) == (2.0, 2.0)

    @pytest.mark.parametrize("sizes, trained", [((8, 8), (8,)), ((8, 0), 8), ((8, 8), 0)])
    def test_wrong_sizes(self, sizes, trained):
        with pytest.raises(ValueError, match="need one size of at least 1 an axis"):
            axis_factors(sizes, trained)
