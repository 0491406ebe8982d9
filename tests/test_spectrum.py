"""Radial power spectrum: waves in closed form, Parseval, bins, windows, white noise."""

import cmath
import math

import pytest
import torch

from minilib.metrics import energy_above, radial_spectrum


def wave(v, u, h=16, w=16, amplitude=1.0, phase=0.4):
    """A plane wave of v cycles down and u across the image."""
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    return (amplitude * torch.cos(2 * torch.pi * (v * y / h + u * x / w) + phase))[None, None]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestWaves:
    @pytest.mark.parametrize("v, u", [(0, 3), (3, 0), (3, 4), (5, -2), (7, 7), (1, 1)])
    def test_falls_into_the_bin_of_its_length_with_half_its_squared_amplitude(self, v, u):
        spectrum = radial_spectrum(wave(v, u, amplitude=3.0))
        expected = torch.zeros_like(spectrum.energy)
        expected[0, int(math.hypot(v, u) + 1e-9)] = 4.5
        assert (spectrum.energy - expected).abs().max() < 1e-12

    @pytest.mark.parametrize("h, w", [(24, 24), (12, 24), (15, 9), (30, 21)])
    def test_lengths_are_in_cycles_per_pixel_on_any_canvas(self, h, w):
        # 1/3 of a cycle per pixel, down or across, lies on the lower edge of its bin whatever the canvas.
        for x in (wave(h // 3, 0, h, w), wave(0, w // 3, h, w)):
            spectrum = radial_spectrum(x, bins=9)
            assert spectrum.energy[0].argmax() == 6 and abs(float(spectrum.energy[0, 6]) - 0.5) < 1e-12
            assert abs(float(spectrum.edges[6]) - 1 / 3) < 1e-12

    @pytest.mark.parametrize(
        "side", [14, 18, 24, 28]
    )  # sides at which some v / side comes out an ulp below its edge
    def test_every_wave_along_an_axis_has_the_bin_of_its_number(self, side):
        for v in range(1, side // 2):
            assert int(radial_spectrum(wave(v, 0, side, side)).energy[0].argmax()) == v
            assert int(radial_spectrum(wave(0, v, side, side)).energy[0].argmax()) == v

    def test_the_mean_is_in_bin_0_and_the_finest_board_in_the_corner(self):
        spectrum = radial_spectrum(torch.full((1, 2, 8, 8), 0.5))
        assert abs(float(spectrum.energy[0, 0]) - 0.25) < 1e-7 and float(spectrum.energy[0, 1:].sum()) < 1e-12
        board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(1, 1, 4, 4)
        spectrum = radial_spectrum(board)
        assert abs(float(spectrum.energy[0, int(math.sqrt(0.5) * 8)]) - 1.0) < 1e-6

    def test_against_the_sum_by_hand(self):
        x = noise(2, 3, 5, 4)
        bins, expected = 3, torch.zeros(2, 5, dtype=torch.float64)
        for v in range(5):
            for u in range(4):
                fv, fu = (v if v <= 2 else v - 5) / 5, (u if u < 2 else u - 4) / 4
                index = int(math.hypot(fv, fu) * 2 * bins)
                for i in range(2):
                    for c in range(3):
                        mode = sum(
                            float(x[i, c, y, z]) * cmath.exp(-2j * cmath.pi * (v * y / 5 + u * z / 4))
                            for y in range(5)
                            for z in range(4)
                        )
                        expected[i, index] += abs(mode) ** 2 / 20**2 / 3
        assert (radial_spectrum(x, bins).energy - expected).abs().max() < 1e-12


class TestSums:
    @pytest.mark.parametrize("h, w", [(8, 8), (7, 9), (1, 6), (16, 5)])
    @pytest.mark.parametrize("bins", [None, 1, 4, 50])
    def test_parseval_and_every_mode_counts_once(self, h, w, bins):
        x = noise(3, 2, h, w)
        spectrum = radial_spectrum(x, bins)
        assert (spectrum.energy.sum(1) - x.square().mean((1, 2, 3))).abs().max() < 1e-12
        assert int(spectrum.modes.sum()) == h * w
        assert len(spectrum.edges) == len(spectrum.modes) + 1 == len(spectrum.centres) + 1
        assert float(spectrum.edges[0]) == 0 and float(spectrum.edges[-1]) > math.sqrt(0.5)
        assert (spectrum.edges.diff() - spectrum.edges[1]).abs().max() < 1e-12
        assert torch.allclose(spectrum.centres - spectrum.edges[:-1], spectrum.edges[1] / 2)

    def test_default_bins_are_one_cycle_per_image_wide(self):
        assert float(radial_spectrum(noise(1, 1, 8, 20)).edges[1]) == 1 / 20
        assert float(radial_spectrum(noise(1, 1, 1, 1)).energy.sum()) > 0

    @pytest.mark.parametrize("window", ["none", "hann"])
    def test_white_noise_is_flat_with_its_variance_over_the_modes(self, window):
        spectrum = radial_spectrum(0.3 * noise(4000, 1, 8, 8), window=window)
        skip = 2 if window == "hann" else 0  # its mean is taken off, which leaks into the next bin
        mean = spectrum.density.mean(0)[skip : int((spectrum.modes > 0).sum())]
        assert (mean / (0.09 / 64) - 1).abs().max() < 0.06

    def test_empty_bins_have_density_0(self):
        spectrum = radial_spectrum(noise(1, 1, 4, 4), bins=20)
        assert int((spectrum.modes == 0).sum()) > 0
        assert torch.isfinite(spectrum.density).all()
        assert float(spectrum.density[0][spectrum.modes == 0].abs().max()) == 0

    def test_a_quarter_turn_and_a_cyclic_shift_change_nothing(self):
        x = noise(2, 3, 8, 8)
        reference = radial_spectrum(x).energy
        for other in (x.rot90(1, (2, 3)), x.flip(3), x.roll((3, 5), (2, 3))):
            assert (radial_spectrum(other).energy - reference).abs().max() < 1e-12

    def test_each_image_by_itself(self):
        x = noise(3, 2, 8, 8)
        together = radial_spectrum(x).energy
        for i in range(3):
            assert torch.allclose(radial_spectrum(x[i : i + 1]).energy[0], together[i])


class TestWindow:
    def test_hides_a_jump_at_the_edge(self):
        ramp = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(1, 1, 32, 32)
        open_, faded = (energy_above(ramp, 0.25, window=window) for window in ("none", "hann"))
        assert float(faded) < 1e-2 * float(open_)

    def test_takes_off_the_mean_of_each_channel(self):
        x = noise(1, 2, 8, 8)
        shift = torch.tensor([5.0, -3.0], dtype=torch.float64)[None, :, None, None]
        a, b = (radial_spectrum(y, window="hann").energy for y in (x, x + shift))
        assert (a - b).abs().max() < 1e-12


class TestEnergyAbove:
    @pytest.mark.parametrize("cut", [0.0, 0.1, 1 / 3, 0.5, 0.7])
    @pytest.mark.parametrize("h, w", [(12, 12), (9, 14)])
    def test_is_the_upper_end_of_the_spectrum(self, cut, h, w):
        x = noise(2, 3, h, w)
        fine = radial_spectrum(x, bins=600)
        from_bins = fine.energy[:, fine.edges[:-1] >= cut - 1e-9].sum(1)
        # A bin that the cut goes through may hold modes on either side: 600 bins have none such but at the cut itself.
        assert (energy_above(x, cut) - from_bins).abs().max() < 1e-12

    def test_a_wave_on_the_cut_is_above_it(self):
        assert abs(float(energy_above(wave(0, 4, 12, 12), 1 / 3)) - 0.5) < 1e-12
        assert float(energy_above(wave(0, 4, 12, 12), 1 / 3 + 1e-6)) < 1e-12
        assert abs(float(energy_above(wave(0, 4, 12, 12))) - 0.5) < 1e-12

    def test_gradient(self):
        x = noise(1, 1, 4, 5).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: energy_above(x, 0.2), x)
        assert torch.autograd.gradcheck(lambda x: radial_spectrum(x, 3, window="hann").energy, x)


class TestRefuses:
    def test_bad_input(self):
        x = noise(1, 1, 4, 4)
        for f in (radial_spectrum, energy_above):
            with pytest.raises(ValueError, match="unknown window 'welch'"):
                f(x, window="welch")
            with pytest.raises(ValueError, match="0 x 4"):
                f(x[:, :, :0])
        with pytest.raises(ValueError, match="bins must be at least 1; got 0"):
            radial_spectrum(x, 0)
        for frequency in (-0.1, 0.8):
            with pytest.raises(ValueError, match="cycles per pixel"):
                energy_above(x, frequency)
