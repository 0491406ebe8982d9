"""``photos``: 26 real photographs, split by photograph, and a stereo pair with measured disparity. Patches on demand."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from minilib.data import assets, provenance
from minilib.data.registry import register


def _decode(file: bytes) -> UInt8[Tensor, "3 h w"]:
    from PIL import Image

    return (
        torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1).contiguous()
    )


def _unit(image: Tensor) -> Tensor:
    """Levels 0..255 to [-1, 1]."""
    return image.float().div(127.5).sub(1)


@dataclass(frozen=True)
class PhotoSet:
    """A split of photographs of different sizes. A photograph is decoded when it is first asked for, then kept (as bytes).

    ``names``, ``authors``, ``licences`` have an entry a photograph. Random crops are for training,
    :meth:`grid` is for evaluation.
    """

    name: str
    split: str
    names: tuple[str, ...]
    authors: tuple[str, ...]
    licences: tuple[str, ...]
    files: tuple[bytes, ...] = field(repr=False)
    source: str
    licence: str
    checksum: str
    _decoded: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.files)

    def levels(self, i: int) -> UInt8[Tensor, "3 h w"]:
        """Photograph ``i`` as 0..255. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} photographs; got {i}")
        if i not in self._decoded:
            self._decoded[i] = _decode(self.files[i])
        return self._decoded[i]

    def image(self, i: int) -> Float[Tensor, "3 h w"]:
        """Photograph ``i`` in [-1, 1]."""
        return _unit(self.levels(i))

    @property
    def images(self) -> list[Float[Tensor, "3 h w"]]:
        """All photographs, ``(3, h, w)`` each, in [-1, 1]."""
        return [self.image(i) for i in range(len(self))]

    def patches(
        self, n: int, size: int, generator: torch.Generator | None = None, scale: int = 1
    ) -> Float[Tensor, "n 3 size size"]:
        """Random square crops in [-1, 1]: a photograph at random, then a place in it at random.

        Args:
            n: how many.
            size: side of a patch in pixels.
            generator: of the random choices.
            scale: crops of ``size * scale`` pixels are averaged down by this factor, which also removes noise and JPEG marks.

        Raises:
            ValueError: a crop is larger than some photograph.
        """
        side = self._side(size, scale)
        chosen = torch.randint(len(self), (n,), generator=generator).tolist()
        places = torch.rand(n, 2, generator=generator, dtype=torch.float64).tolist()
        out = torch.empty(n, 3, side, side, dtype=torch.uint8)
        for row, (i, (down, across)) in enumerate(zip(chosen, places, strict=True)):
            image = self.levels(i)
            top, left = int(down * (image.shape[1] - side + 1)), int(across * (image.shape[2] - side + 1))
            out[row] = image[:, top : top + side, left : left + side]
        return _shrunk(out, scale)

    def grid(self, size: int, scale: int = 1) -> tuple[Float[Tensor, "n 3 size size"], Int[Tensor, " n"]]:
        """All patches of a centred grid without overlap, and each one's photograph. No randomness, so good for evaluation."""
        side = self._side(size, scale)
        patches, photo = [], []
        for i in range(len(self)):
            image = self.levels(i)
            rows, columns = image.shape[1] // side, image.shape[2] // side
            top, left = (image.shape[1] - rows * side) // 2, (image.shape[2] - columns * side) // 2
            inner = image[:, top : top + rows * side, left : left + columns * side]
            cells = inner.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
            patches.append(cells)
            photo.append(torch.full((len(cells),), i))
        return _shrunk(torch.cat(patches), scale), torch.cat(photo)

    def _side(self, size: int, scale: int) -> int:
        smallest = min(min(self.levels(i).shape[1:]) for i in range(len(self)))
        if size < 1 or scale < 1 or size * scale > smallest:
            raise ValueError(
                f"patches of size {size} at scale {scale} need {size * scale} pixels; "
                f"the photographs of {self.split} have at least {smallest} on the short side"
            )
        return size * scale


def _shrunk(patches: Tensor, scale: int) -> Tensor:
    x = _unit(patches)
    return F.avg_pool2d(x, scale) if scale > 1 else x


@lru_cache(maxsize=1)
def _arrays() -> dict[str, np.ndarray]:
    return assets.open_npz("photos")


@lru_cache(maxsize=3)
def _vendored(split: str, size: int | None) -> PhotoSet:
    """17 photographs train, 3 validation, 6 test; five training photographs are grey."""
    arrays, item = _arrays(), assets.entry("photos")
    chosen = (arrays["split"] == split).nonzero()[0]
    columns = {key: tuple(arrays[key][chosen].tolist()) for key in ("name", "author", "licence")}
    files = tuple(arrays[f"photo_{name}"].tobytes() for name in columns["name"])
    return PhotoSet(
        name="photos",
        split=split,
        names=columns["name"],
        authors=columns["author"],
        licences=columns["licence"],
        files=files,
        source=assets.source(item),
        licence=item["licence"],
        checksum=hashlib.sha256(b"".join(files)).hexdigest(),
    )


@dataclass(frozen=True)
class StereoPair:
    """Two rectified views in [-1, 1] and the left one's disparity in pixels, nan where it was not measured.

    ``left[:, y, x]`` shows what ``right[:, y, x - disparity[y, x]]`` shows. Depth in mm is :meth:`depth`.
    """

    name: str
    split: str
    left: Float[Tensor, "3 h w"]
    right: Float[Tensor, "3 h w"]
    disparity: Float[Tensor, "h w"]
    focal_length: float
    baseline: float
    offset: float
    source: str
    licence: str
    checksum: str

    def depth(self) -> Float[Tensor, "h w"]:
        """Distance from the camera plane in mm, nan where unknown: ``baseline * focal_length / (disparity + offset)``."""
        return self.baseline * self.focal_length / (self.disparity + self.offset)


def stereo() -> StereoPair:
    """The motorcycle pair of the Middlebury 2014 benchmark at 250 x 370 pixels (Scharstein et al., GCPR 2014).

    >>> stereo().disparity.shape
    torch.Size([250, 370])
    """
    arrays = _arrays()
    left, right = (_decode(arrays[f"motorcycle_{side}"].tobytes()) for side in ("left", "right"))
    return provenance.note(
        StereoPair(
            name="photos",
            split="stereo",
            left=_unit(left),
            right=_unit(right),
            disparity=torch.from_numpy(arrays["motorcycle_disparity"].astype(np.float32)),
            focal_length=994.978 / 2,
            baseline=193.001,
            offset=31.086 / 2,
            source=assets.source(assets.entry("photos")),
            licence="no licence named by the benchmark; cite Scharstein et al. 2014",
            checksum=assets.checksum("photos"),
        )
    )


register("photos", _vendored, sizes=())
