import math

import official_dit
import pytest
import torch

from minilib.models import sincos_1d, sincos_2d, timestep_embedding


@pytest.mark.parametrize("dim, grid", [(4, 2), (8, 3), (96, 8), (1152, 16)])
def test_grid_equals_the_official_values(dim, grid):
    expected = official_dit.sincos_positions(dim, grid).float()
    assert (
        torch.equal(sincos_2d(dim, grid, grid), expected)
        or (sincos_2d(dim, grid, grid) - expected).abs().max() < 1e-7
    )


def test_grid_equals_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(24, 5, base_size=5, output_type="pt").float()
    assert (sincos_2d(24, 5, 5) - expected).abs().max() < 1e-6


def test_raster_order_on_a_grid_that_is_not_square():
    positions = sincos_2d(8, 2, 3).view(2, 3, 8)
    assert torch.equal(positions[0, :, :4], positions[1, :, :4]), "the first half knows the column only"
    assert torch.equal(positions[:, 0, 4:], positions[:, 2, 4:]), "the second half knows the row only"
    assert torch.equal(positions[1, 2, :4], sincos_1d(torch.tensor([2]), 4)[0].float())
    assert torch.equal(positions[1, 2, 4:], sincos_1d(torch.tensor([1]), 4)[0].float())


def test_inner_product_depends_on_the_offset_only():
    e = sincos_1d(torch.arange(12), 16)
    gram = e @ e.T
    for offset in range(11):
        diagonal = gram.diagonal(offset)
        assert (diagonal - diagonal[0]).abs().max() < 1e-12


def test_timestep_embedding_against_the_formula():
    t = torch.tensor([0.0, 0.5, 17.0, 999.0])
    for shift in (0.0, 1.0):
        ours = timestep_embedding(t, 8, frequency_shift=shift)
        for b, time in enumerate(t.tolist()):
            for i in range(4):
                angle = time * 10000.0 ** (-i / (4 - shift))
                assert (
                    abs(ours[b, i] - math.cos(angle)) < 2e-4 and abs(ours[b, 4 + i] - math.sin(angle)) < 2e-4
                )


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_timestep_embedding_equals_diffusers(shift):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 3, 500, 999])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    assert (timestep_embedding(t, 256, frequency_shift=shift) - theirs).abs().max() < 1e-6


def test_integer_and_floating_times_agree_and_stay_float32():
    t = torch.tensor([1, 250, 999])
    for other in (t.float(), t.double(), t.half()):
        assert torch.equal(timestep_embedding(other, 16), timestep_embedding(t, 16))
    assert timestep_embedding(t.half(), 16).dtype == torch.float32


@pytest.mark.parametrize(
    "function, dim", [(sincos_1d, 3), (sincos_1d, 0), (timestep_embedding, 5), (timestep_embedding, 0)]
)
def test_odd_widths_are_refused(function, dim):
    with pytest.raises(ValueError, match=f"even and positive, got {dim}"):
        function(torch.arange(2), dim)


@pytest.mark.parametrize("dim", [6, 0])
def test_grid_width_must_be_a_multiple_of_four(dim):
    with pytest.raises(ValueError, match=f"multiple of 4, got {dim}"):
        sincos_2d(dim, 2, 2)
