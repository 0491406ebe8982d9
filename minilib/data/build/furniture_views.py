"""``furniture_views``: six views of each model of ``furniture``, 64 x 64 pixels: colour, coverage, depth, normals.

Camera k stands at a random yaw of the k-th sixth of the circle, raised by 10 to 40 degrees, 3.5 radii away; one focal length a
model makes all six views fill the frame. Per model there are two lossless WebP pictures, the views side by side: ``colour``
(RGBA) and ``geometry``: green is depth, red and blue are the normal (see ``minilib.data.furniture``).

About 20 CPU-minutes. Finished models are kept in a folder beside the package, so an interrupted build goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from minilib.data.build import _furniture, _meshes, _raster, furniture
from minilib.data.build._furniture import SOURCE, Catalogue, Item
from minilib.data.build._raster import Camera, Renderer, View
from minilib.data.build.tools import Built, npz_bytes
from minilib.resources import atomic_write

SIZE = 64
VIEWS = 6
DISTANCE = 3.5
FILL = 0.94
ELEVATION = (10.0, 40.0)

CREDIT = """# furniture_views

Renderings of models from Debian's `sweethome3d-furniture` 1.8-1, each under the licence of its model: CC0 1.0, CC BY 3.0 or
CC BY 3.0 US. Authors and models are listed in `furniture.md` beside this file. Changed: the meshes were placed before a camera of
our own, lit and rendered.
"""


def cameras(item: Item, corners: np.ndarray) -> list[Camera]:
    """The cameras of a model inside the unit sphere."""
    rng = np.random.default_rng(item.seed + 1)
    low, high = ELEVATION
    poses = [((k + rng.random()) * 360 / VIEWS, low + (high - low) * rng.random()) for k in range(VIEWS)]
    points = corners.reshape(-1, 3)
    reach = max(np.abs(Camera(*pose, DISTANCE, 1.0).project(points)).max() for pose in poses)
    return [Camera(*pose, DISTANCE, FILL / float(reach)) for pose in poses]


def encoded_colour(view: View) -> np.ndarray:
    """RGBA, uint8; nothing hides under full transparency."""
    rgba = np.round(view.rgba * 255).astype(np.uint8)
    rgba[rgba[..., 3] == 0] = 0
    return rgba


def encoded_geometry(view: View) -> np.ndarray:
    """Depth and normal as RGB, uint8; (128, 0, 128) where there is nothing.

    Green is ``128 + 127 (DISTANCE - depth)``, from 1 to 255: 128 in the plane of the object's centre, more is nearer. Red and
    blue are the normal on an octahedron unfolded to a square (Cigolle et al. 2014), ``128 + 127 (u, v)``.
    """
    n = view.normal / np.maximum(np.abs(view.normal).sum(-1, keepdims=True), 1e-9)
    uv = n[..., :2]
    folded = (1 - np.abs(uv[..., ::-1])) * np.where(uv >= 0, 1, -1)
    uv = np.round(128 + 127 * np.where(n[..., 2:] < 0, folded, uv))
    depth = np.round(128 + 127 * (DISTANCE - view.depth)).clip(1, 255)
    picture = np.stack([uv[..., 0], depth, uv[..., 1]], -1).astype(np.uint8)
    picture[~view.mask] = (128, 0, 128)
    return picture


def webp(picture: np.ndarray) -> bytes:
    """A lossless WebP file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=True, quality=90, method=4, exact=True)
    return buffer.getvalue()


def render(catalogue: Catalogue, item: Item) -> tuple[bytes, bytes, np.ndarray]:
    """Colour and geometry strips of a model, and yaw, elevation and focal length of its cameras (VIEWS, 3)."""
    mesh = catalogue.mesh(item)
    furniture.unit_sphere(mesh)
    renderer = Renderer(mesh, catalogue.textures(item, mesh))
    poses = cameras(item, mesh.corners())
    views = [renderer.render(camera, SIZE) for camera in poses]
    colour = np.concatenate([encoded_colour(view) for view in views], axis=1)
    geometry = np.concatenate([encoded_geometry(view) for view in views], axis=1)
    table = np.array([(c.yaw, c.elevation, c.focal) for c in poses], dtype=np.float32)
    return webp(colour), webp(geometry), table


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the Debian package."""
    catalogue = Catalogue(folder)
    parts = folder / f"furniture_views-{_version()}"
    columns: dict[str, list[np.ndarray]] = {"colour": [], "geometry": [], "camera": []}
    for i, item in enumerate(catalogue.items):
        path = parts / f"{item.key}.npz"
        if not path.is_file():
            colour, geometry, camera = render(catalogue, item)
            blobs = {"colour": np.frombuffer(colour, np.uint8), "geometry": np.frombuffer(geometry, np.uint8)}
            atomic_write(path, npz_bytes({**blobs, "camera": camera}, method=zipfile.ZIP_STORED))
            if i % 20 == 0:
                print(f"{i + 1} of {len(catalogue.items)}: {item.name}", flush=True)
        with np.load(path) as part:
            for key, column in columns.items():
                column.append(part[key])
    arrays = {"camera": np.stack(columns["camera"]), "key": np.array([item.key for item in catalogue.items])}
    for key in ("colour", "geometry"):
        arrays[key] = np.concatenate(columns[key])
        arrays[f"{key}_bytes"] = np.array([len(blob) for blob in columns[key]], dtype=np.int32)
    n = len(catalogue.items)
    return Built(
        suffix=".npz",
        data=npz_bytes(arrays, method=zipfile.ZIP_STORED),
        what=f"{VIEWS} views each of {n} named meshes, {SIZE} x {SIZE}: colour, coverage, depth, normals",
        licence="CC0 1.0, CC BY 3.0, CC BY 3.0 US (by model)",
        credit=CREDIT,
        sources=(SOURCE,),
        extra={"objects": n, "views": VIEWS * n, "distance": DISTANCE},
    )


def _version() -> str:
    """Changes with the code that renders, so that old parts are not taken for new ones."""
    sources = [
        Path(str(module.__file__)).read_bytes() for module in (_furniture, _meshes, _raster, furniture)
    ]
    return hashlib.sha256(b"".join([*sources, Path(__file__).read_bytes()])).hexdigest()[:12]
