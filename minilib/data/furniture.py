"""``furniture``: 758 real 3-D models of furniture and household things, as rendered views and as point clouds.

Split by model, stratified by class; variants of one model (same author and size) stay together. A view comes with the truth that
a photograph lacks: coverage, depth, normals, camera. Glass is solid in the geometry and clear in the colours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from minilib.data import assets, provenance
from minilib.data.images import tensor_checksum
from minilib.data.registry import SPLITS, register

DISTANCE = 3.5
"""Of the camera from the model's centre, in radii of the model."""
BACKGROUND = 0.64
"""Light grey behind the model, in [-1, 1]: white things stand out from it."""
STEPS = 2048  # of a point's coordinate in the clouds, from the centre to the unit sphere
LICENCE = "CC0 1.0, CC BY 3.0, CC BY 3.0 US (by model; see licences/furniture.md)"

_NO_ARTICLE = re.compile(r"bread|butter|pottery|soap|steak|tape|stairs|.*(clothes|(?<![su])s)")


def caption(name: str) -> str:
    """The name with its article.

    >>> caption("armchair"), caption("urinal"), caption("tulips"), caption("SUV")
    ('an armchair', 'a urinal', 'tulips', 'an SUV')
    """
    thing = re.split(" with | on ", name)[0]
    if _NO_ARTICLE.fullmatch(thing):
        return name
    vowel = re.match(r"[aeioAEIO]|u(?!rinal|tensils)|SUV", name)
    return f"{'an' if vowel else 'a'} {name}"


@dataclass(frozen=True)
class FurnitureClouds:
    """A split of point clouds, in the order of classes, then names.

    ``points (n, 1024, 3)``: spread evenly over the surface, inner surfaces too; y up, front towards +z; centred on the box and
    divided by ``radius_cm (n,)``, so inside the unit sphere. Their order within a model means nothing (it follows a Z-curve:
    take a random subset, not the first ones). ``size_cm (n, 3)`` is width, depth and height. ``index`` counts through all splits.
    """

    name: str
    split: str
    points: Float[Tensor, "n p 3"]
    y: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    size_cm: Float[Tensor, "n 3"]
    radius_cm: Float[Tensor, " n"]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]
    authors: tuple[str, ...]
    licences: tuple[str, ...]
    classes: tuple[str, ...]
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.points)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def of_class(self, name: str) -> Float[Tensor, "m p 3"]:
        """The clouds of one class. Raises ValueError: unknown class."""
        return self.points[self.y == _class_id(name, self.classes)]


@dataclass(frozen=True)
class FurnitureViews:
    """A split of rendered views, six a model, model by model. Images are decoded at first use and then kept.

    ``y``, ``object`` (counts through all splits), ``yaw`` and ``elevation`` in degrees and ``focal`` have an entry a view, and so
    have ``names`` and ``captions``. A point (x, y, -z) of camera space, z its depth, is seen at ``focal * (x, y) / z`` of a
    picture that spans -1..1 both ways, y up.
    """

    name: str
    split: str
    rgba: UInt8[Tensor, "n 4 h w"] = field(repr=False)
    geometry: UInt8[Tensor, "n 3 h w"] = field(repr=False)
    size: int
    y: Int[Tensor, " n"]
    object: Int[Tensor, " n"]
    yaw: Float[Tensor, " n"]
    elevation: Float[Tensor, " n"]
    focal: Float[Tensor, " n"]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    classes: tuple[str, ...]
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.rgba)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @cached_property
    def x(self) -> Float[Tensor, "n 3 h w"]:
        """Colours in [-1, 1] on light grey."""
        return self.on(BACKGROUND)

    @cached_property
    def alpha(self) -> Float[Tensor, "n 1 h w"]:
        """How much of a pixel the model covers, in [0, 1]; glass covers a part of it."""
        return self._small(self.rgba[:, 3:].float() / 255)

    @cached_property
    def mask(self) -> Bool[Tensor, "n 1 h w"]:
        """Where there is a surface, clear or not."""
        return self._small((self.geometry[:, 1:2] > 0).float()) >= 0.5

    @cached_property
    def depth(self) -> Float[Tensor, "n 1 h w"]:
        """Nearness in [-1, 1], in radii: 1 nearest, 0 in the plane of the centre; -1 where there is nothing.

        The distance along the optical axis is ``DISTANCE - depth``. At half size the nearest of four.
        """
        near = (self.geometry[:, 1:2].float() - 128).clamp(min=-127) / 127
        return near if self.size == near.shape[-1] else F.max_pool2d(near, 2).where(self.mask, -1.0)

    @cached_property
    def normal(self) -> Float[Tensor, "n 3 h w"]:
        """Unit normals in camera space (x right, y up, z towards the camera), 0 where there is nothing."""
        u, v = (self.geometry[:, c].float().sub(128).div(127) for c in (0, 2))
        z = 1 - u.abs() - v.abs()
        fold = (-z).clamp(min=0)
        n = F.normalize(torch.stack([u - u.sign() * fold, v - v.sign() * fold, z], 1), dim=1)
        small = self._small(n * (self.geometry[:, 1:2] > 0))
        return F.normalize(small, dim=1) * self.mask

    def on(self, background: float) -> Float[Tensor, "n 3 h w"]:
        """Colours on a grey of ``background`` in [-1, 1]."""
        rgba = self.rgba.float() / 255
        return self._small((rgba[:, :3] * 2 - 1 - background) * rgba[:, 3:] + background)

    def points(self, i: int) -> Float[Tensor, "m 3"]:
        """The seen surface of view ``i`` as points of the model's own space, that of the clouds."""
        row, column = self.mask[i, 0].nonzero(as_tuple=True)
        z = DISTANCE - self.depth[i, 0, row, column]
        across, down = ((place + 0.5) * 2 / self.size - 1 for place in (column, row))
        seen = torch.stack([across * z / self.focal[i], -down * z / self.focal[i], DISTANCE - z], 1)
        return seen @ self.rotation(i)

    def rotation(self, i: int) -> Float[Tensor, "3 3"]:
        """From the model's axes to the camera's: ``camera = rotation @ model``, before the camera steps back."""
        (sa, ca), (se, ce) = (
            (a.deg2rad().sin(), a.deg2rad().cos()) for a in (self.yaw[i], self.elevation[i])
        )
        zero = torch.zeros(())
        return torch.stack([ca, zero, -sa, -se * sa, ce, -se * ca, ce * sa, se, ce * ca]).view(3, 3)

    def _small(self, image: Tensor) -> Tensor:
        return image if image.shape[-1] == self.size else F.avg_pool2d(image, image.shape[-1] // self.size)


def clouds(split: str = "train", classes: Sequence[str] | None = None) -> FurnitureClouds:
    """Point clouds of a split, of some classes or of all (class ids stay the same).

    Raises:
        ValueError: unknown split or class.

    >>> chairs = clouds("test", ["chair"])
    >>> tuple(chairs.points.shape[1:]), chairs.captions[0]
    ((1024, 3), 'an Osaka chair')
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of 'furniture'; expected one of {', '.join(SPLITS)}")
    return provenance.note(_clouds(split, None if classes is None else tuple(classes)))


def _class_id(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise ValueError(f"unknown class {name!r}; expected one of {', '.join(classes)}")
    return list(classes).index(name)


@lru_cache(maxsize=1)
def _models() -> dict[str, np.ndarray]:
    return assets.open_npz("furniture")


@lru_cache(maxsize=8)
def _clouds(split: str, classes: tuple[str, ...] | None) -> FurnitureClouds:
    table = _models()
    names = tuple(table["classes"].tolist())
    chosen = table["split"] == SPLITS.index(split)
    if classes is not None:
        chosen &= np.isin(table["class"], [_class_id(name, names) for name in classes])
    rows = chosen.nonzero()[0]
    steps = table["low"][rows].astype(np.int32) + 256 * table["high"][rows].astype(np.int32)
    points = torch.from_numpy(steps.cumsum(2).transpose(0, 2, 1).astype(np.float32) / STEPS)
    y = torch.from_numpy(table["class"][rows].astype(np.int64))
    words = {key: tuple(table[key][rows].tolist()) for key in ("name", "tags", "author", "licence")}
    return FurnitureClouds(
        name="furniture_clouds",
        split=split,
        points=points.contiguous(),
        y=y,
        index=torch.from_numpy(rows),
        size_cm=torch.from_numpy(table["size_cm"][rows]),
        radius_cm=torch.from_numpy(table["radius_cm"][rows]),
        names=words["name"],
        captions=tuple(caption(name) for name in words["name"]),
        tags=tuple(tuple(filter(None, tags.split("|"))) for tags in words["tags"]),
        authors=words["author"],
        licences=words["licence"],
        classes=names,
        source=assets.source(assets.entry("furniture")),
        licence=LICENCE,
        checksum=tensor_checksum(points, y),
    )


@lru_cache(maxsize=3)
def _decoded(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """RGBA (n, 4, h, w) and geometry (n, 3, h, w), uint8, and cameras (n, 3), of all views of a split."""
    from PIL import Image

    stored, rows = (
        assets.open_npz("furniture_views"),
        (_models()["split"] == SPLITS.index(split)).nonzero()[0],
    )
    if stored["key"].tolist() != _models()["key"].tolist():
        raise RuntimeError(
            "furniture and furniture_views were built from different catalogues: build both again"
        )
    views = stored["camera"].shape[1]
    strips = []
    for key in ("colour", "geometry"):
        ends = stored[f"{key}_bytes"].cumsum()
        files = [stored[key][ends[i] - stored[f"{key}_bytes"][i] : ends[i]].tobytes() for i in rows]
        pictures = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
        n, h, w, c = pictures.shape
        parted = pictures.reshape(n, h, views, w // views, c).transpose(0, 2, 4, 1, 3)
        strips.append(torch.from_numpy(np.ascontiguousarray(parted)).flatten(0, 1))
    return strips[0], strips[1], torch.from_numpy(stored["camera"][rows]).flatten(0, 1)


@lru_cache(maxsize=6)
def _views(split: str, size: int | None) -> FurnitureViews:
    table = _models()
    rgba, geometry, camera = _decoded(split)
    views = len(rgba) // int((table["split"] == SPLITS.index(split)).sum())
    index = torch.from_numpy((table["split"] == SPLITS.index(split)).nonzero()[0]).repeat_interleave(views)
    names = tuple(table["name"][index.numpy()].tolist())
    return FurnitureViews(
        name="furniture",
        split=split,
        rgba=rgba,
        geometry=geometry,
        size=size or rgba.shape[-1],
        y=torch.from_numpy(table["class"].astype(np.int64))[index],
        object=index,
        yaw=camera[:, 0],
        elevation=camera[:, 1],
        focal=camera[:, 2],
        names=names,
        captions=tuple(caption(name) for name in names),
        classes=tuple(table["classes"].tolist()),
        source=assets.source(assets.entry("furniture_views")),
        licence=LICENCE,
        checksum=tensor_checksum(rgba, geometry),
    )


register("furniture", _views, sizes=(64, 32))
register("furniture_clouds", lambda split, size: _clouds(split, None), sizes=())
