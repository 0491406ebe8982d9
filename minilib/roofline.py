"""The roofline of a machine (Williams et al. 2009): work is limited by arithmetic, or by the bytes that it moves.

A machine does at most P operations and moves at most B bytes a second. Work of intensity I, operations per byte, cannot run
faster than min(P, I B). Both numbers are measured here, by a product of two square matrices and by a plain copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import bench


@dataclass(frozen=True)
class Roofline:
    """``peak``: FLOP/s; ``bandwidth``: bytes read plus bytes written, a second.

    >>> roof = Roofline(peak=100.0, bandwidth=10.0)
    >>> roof.ridge, roof.attainable(2.0), roof.attainable(50.0)
    (10.0, 20.0, 100.0)
    """

    peak: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (self.peak > 0 and self.bandwidth > 0):
            raise ValueError(f"a roof has positive rates; got peak {self.peak}, bandwidth {self.bandwidth}")

    @property
    def ridge(self) -> float:
        """The intensity in FLOP a byte below which memory is the limit."""
        return self.peak / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """The most FLOP/s at this intensity.

        Raises:
            ValueError: a negative intensity.
        """
        if intensity < 0:
            raise ValueError(f"an intensity is at least 0 FLOP a byte, got {intensity}")
        return min(self.peak, intensity * self.bandwidth)

    def fastest(self, flops: float, nbytes: float) -> float:
        """The least seconds for so many operations and bytes.

        >>> Roofline(100.0, 10.0).fastest(flops=100, nbytes=20)
        2.0
        """
        return max(flops / self.peak, nbytes / self.bandwidth)


def measure_roofline(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int = 1024,
    megabytes: float = 64.0,
    repeats: int = 5,
) -> Roofline:
    """Measure both roofs, in turns, on as many threads as torch has.

    Args:
        device: where.
        dtype: of the matrices.
        size: rows of the two square matrices.
        megabytes: of the copy, into memory that is there already; far more than the caches hold.
        repeats: samples of each; the fastest counts.

    Raises:
        ValueError: sizes that are not positive.
    """
    if size < 1 or megabytes <= 0:
        raise ValueError(f"need a positive size and a positive copy; got {size} and {megabytes} MB")
    device = torch.device(device)
    a = torch.rand(size, size, device=device, dtype=dtype)
    source = torch.ones(int(megabytes * 1e6 / 4), device=device)
    target = torch.ones_like(source)

    def product() -> None:
        a @ a
        _wait(device)

    def copy() -> None:
        target.copy_(source)
        _wait(device)

    seconds, copying = bench.times([product, copy], repeats=repeats)
    return Roofline(2 * size**3 / seconds, 2 * source.nbytes / copying)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
