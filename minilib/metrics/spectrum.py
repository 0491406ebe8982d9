"""Radial power spectrum of images: how much of their energy is coarse, and how much is fine.

The mean square of an image is the sum over its Fourier modes of ``|X|^2 / (h w)^2`` (Parseval). Modes are put together by the
length of their frequency ``(v / h, u / w)``, in cycles per pixel: stripes of period p lie at 1 / p. Along an axis the finest
frequency is 1/2; towards the corners lengths reach ``sqrt(1/2)``, and these modes count too, so that no energy is lost.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class RadialSpectrum(NamedTuple):
    """Energy by length of frequency.

    Attributes:
        energy: ``(n, bins)``; over all bins it sums to the mean square of the image, mean over channels.
        edges: ``(bins + 1,)`` in cycles per pixel; a bin holds its lower edge and not its upper one.
        modes: ``(bins,)`` Fourier modes in each bin; they sum to h w.
    """

    energy: Float[Tensor, "n bins"]
    edges: Float[Tensor, " edges"]
    modes: Int[Tensor, " bins"]

    @property
    def density(self) -> Float[Tensor, "n bins"]:
        """Mean energy of a mode: flat for white noise, where it is the variance over h w; 0 in a bin without modes."""
        return self.energy / self.modes.clamp(min=1)

    @property
    def centres(self) -> Float[Tensor, " bins"]:
        """The middle of each bin, in cycles per pixel."""
        return (self.edges[:-1] + self.edges[1:]) / 2


def radial_spectrum(
    x: Float[Tensor, "n c h w"], bins: int | None = None, *, window: str = "none"
) -> RadialSpectrum:
    """Energy of each image by length of frequency, in bins of equal width.

    Args:
        x: images of any range.
        bins: how many between 0 and 1/2; as many more of the same width follow as cover the corners. None: half the
            longer side, which makes the width one cycle per image. The mean lies in bin 0.
        window: "none" takes the image as periodic: a jump from one edge to the opposite one counts as fine detail. "hann"
            takes off each channel's mean and fades to the edges; it is scaled so that white noise keeps its energy.

    Raises:
        ValueError: no pixels, ``bins`` below 1, an unknown window.

    >>> stripes = torch.cos(2 * torch.pi * 3 / 16 * torch.arange(16.0)).expand(1, 1, 16, 16)
    >>> spectrum = radial_spectrum(stripes)
    >>> spectrum.energy.shape, spectrum.energy[0].argmax().item(), round(spectrum.energy[0, 3].item(), 6)
    (torch.Size([1, 12]), 3, 0.5)
    """
    index, edges = _bin_of_modes(*x.shape[-2:], bins)
    power = _power(x, window)
    count = len(edges) - 1
    index = index.to(x.device)
    energy = power.new_zeros(len(x), count).index_add(1, index, power)
    return RadialSpectrum(energy, edges.to(power), torch.bincount(index, minlength=count))


def energy_above(
    x: Float[Tensor, "n c h w"], frequency: float = 1 / 3, *, window: str = "none"
) -> Float[Tensor, " n"]:
    """Energy of each image at frequencies of at least this length, corners included.

    Args:
        x: images of any range.
        frequency: in cycles per pixel; 1/3 leaves the top third of the frequencies along an axis.
        window: as in ``radial_spectrum``.

    Raises:
        ValueError: a frequency that is not between 0 and ``sqrt(1/2)``, no pixels, an unknown window.

    >>> board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(1, 1, 4, 4)
    >>> energy_above(board), energy_above(torch.ones(1, 1, 8, 8))
    (tensor([1.]), tensor([0.]))
    """
    if not 0 <= frequency <= math.sqrt(0.5):
        raise ValueError(f"frequency is in cycles per pixel, 0 to {math.sqrt(0.5):.3f}; got {frequency}")
    high = _lengths(*x.shape[-2:]) >= frequency - 1e-9
    return _power(x, window)[:, high.to(x.device)].sum(1)


def _power(x: Tensor, window: str) -> Tensor:
    """``|X|^2 / (h w)^2`` of each mode, mean over channels: ``(n, h w)``."""
    h, w = x.shape[-2:]
    if window not in ("none", "hann"):
        raise ValueError(f"unknown window {window!r}: choose 'none' or 'hann'")
    if window == "hann":
        fade = torch.outer(*(torch.hann_window(side, dtype=x.dtype, device=x.device) for side in (h, w)))
        x = (x - x.mean((-2, -1), keepdim=True)) * (fade / fade.square().mean().sqrt())
    modes = torch.fft.fft2(x) / (h * w)
    return (modes.real.square() + modes.imag.square()).mean(1).flatten(1)


def _lengths(h: int, w: int) -> Tensor:
    """The length of each mode's frequency, in cycles per pixel, in the order of ``fft2``: ``(h w,)``."""
    if h < 1 or w < 1:
        raise ValueError(f"an image of {h} x {w} pixels has no spectrum")
    v, u = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (h, w))
    return torch.hypot(v[:, None], u[None, :]).flatten()


def _bin_of_modes(h: int, w: int, bins: int | None) -> tuple[Tensor, Tensor]:
    """The bin of each mode, and the edges of the bins."""
    lengths = _lengths(h, w)
    bins = max(1, max(h, w) // 2) if bins is None else bins
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    # A length on an edge may come out an ulp below it.
    index = torch.floor(lengths * (2 * bins) + 1e-9).long()
    count = math.floor(math.sqrt(0.5) * 2 * bins + 1e-9) + 1
    return index, torch.arange(count + 1, dtype=torch.float64) / (2 * bins)
