"""``furniture``: 758 named meshes as clouds of 1,024 points, with class, tags, size, author and licence of each.

Points are spread evenly over the surface (inner surfaces too; holes in pictures of leaves are left out), then centred on the
box and divided by the largest distance from its centre: the unit sphere. They are a set, so they are stored in an order that
packs well: along a Z-curve, on a grid of 2^-11, as differences.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minilib.data.build._furniture import SOURCE, Catalogue, Item, classes
from minilib.data.build._meshes import Mesh, sample_surface
from minilib.data.build._raster import Textures
from minilib.data.build.tools import Built, npz_bytes

POINTS = 1024
STEPS = 2048  # grid steps from the centre to the unit sphere

CREDIT = """# furniture

{n} three-dimensional models from Debian's `sweethome3d-furniture` 1.8-1 (Sweet Home 3D's additional models, collected and
converted to OBJ by Emmanuel Puybaret, eTeks, https://www.sweethome3d.com). Changed: meshes turned into point clouds
(`furniture.npz`) and into rendered views (`furniture_views.npz`); some names corrected; models of branded products, banknotes,
road markings and wall plates left out.

Licences: CC0 1.0 (https://creativecommons.org/publicdomain/zero/1.0/), CC BY 3.0 (https://creativecommons.org/licenses/by/3.0/),
CC BY 3.0 US (https://creativecommons.org/licenses/by/3.0/us/). The clouds and the views are passed on under the licence of their
model. Each line: author and licence, then the models by their title in the catalogue.

"""


def unit_sphere(mesh: Mesh) -> float:
    """Divide the mesh, in place, by the largest distance of a used vertex from the origin; returns that distance."""
    radius = float(np.linalg.norm(mesh.vertices[np.unique(mesh.faces)], axis=1).max())
    mesh.vertices = mesh.vertices / radius
    return radius


def cloud(mesh: Mesh, textures: Textures, rng: np.random.Generator, n: int = POINTS) -> np.ndarray:
    """``n`` points of the surface, where its picture is not transparent."""
    opacity = np.array([material.opacity for material in mesh.materials])
    seen = opacity[mesh.material] >= 0.04
    shown = Mesh(mesh.vertices, mesh.faces[seen], mesh.uv[seen], mesh.material[seen], mesh.materials)

    def keep(face: np.ndarray, weight: np.ndarray) -> np.ndarray:
        uv = (weight[:, :, None] * shown.uv[face]).sum(1)
        level = np.zeros(len(face), dtype=np.int64)
        return textures.lookup(shown.material[face], level, uv)[:, 3] >= 0.5

    return sample_surface(shown, n, rng, keep if (textures.levels > 0).any() else None)


def packed(points: np.ndarray) -> np.ndarray:
    """Points of the unit sphere as differences along a Z-curve on the grid, (3, n) int16; see ``minilib.data.furniture``."""
    grid = np.round(points * STEPS).astype(np.int64).clip(-STEPS, STEPS)
    code = np.zeros(len(grid), dtype=np.int64)
    for bit in range(13):
        for axis in range(3):
            code |= ((grid[:, axis] + STEPS) >> bit & 1) << (3 * bit + axis)
    ordered = grid[np.argsort(code, kind="stable")]
    return np.diff(ordered, axis=0, prepend=0).T.astype(np.int16)


def splits(items: list[Item]) -> np.ndarray:
    """0 train, 1 validation, 2 test: seven, one and two tenths of each class, in an order set by the hash of the key.

    Models of one class, author and size (to 2 mm) are variants of each other and stay together.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(items):
        size = tuple(round(side * 5) for side in item.size_cm)
        groups.setdefault((item.kind, item.author, size), []).append(i)
    result = np.zeros(len(items), dtype=np.uint8)
    for kind in {item.kind for item in items}:
        mine = sorted((g for g in groups.items() if g[0][0] == kind), key=lambda g: items[g[1][0]].seed)
        for rank, (_, members) in enumerate(mine):
            result[members] = (2, 2, 1, 0, 0, 0, 0, 0, 0, 0)[rank % 10]
    return result


def credit_list(items: list[Item]) -> str:
    """The credits, an author a line."""
    titles: dict[tuple[str, str], list[str]] = {}
    for item in items:
        titles.setdefault((item.author, item.licence), []).append(item.title)
    rows = sorted(titles.items(), key=lambda row: (row[0][0].lower(), row[0][1]))
    lines = [f"- {author} ({licence}): {'; '.join(sorted(set(t)))}" for (author, licence), t in rows]
    return CREDIT.format(n=len(items)) + "\n".join(lines) + "\n"


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the Debian package."""
    catalogue = Catalogue(folder)
    items, names = catalogue.items, classes()
    deltas, radius = [], []
    for item in items:
        mesh = catalogue.mesh(item)
        radius.append(unit_sphere(mesh))
        rng = np.random.default_rng(item.seed)
        deltas.append(packed(cloud(mesh, catalogue.textures(item, mesh), rng)))
    stacked = np.stack(deltas)
    arrays = {
        "low": (stacked & 255).astype(np.uint8),
        "high": (stacked >> 8).astype(np.int8),
        "key": np.array([item.key for item in items]),
        "name": np.array([item.name for item in items]),
        "class": np.array([names.index(item.kind) for item in items], dtype=np.uint8),
        "classes": np.array(names),
        "split": splits(items),
        "tags": np.array(["|".join(item.tags) for item in items]),
        "author": np.array([item.author for item in items]),
        "licence": np.array([item.licence for item in items]),
        "size_cm": np.array([item.size_cm for item in items], dtype=np.float32),
        "radius_cm": np.array(radius, dtype=np.float32),
    }
    return Built(
        suffix=".npz",
        data=npz_bytes(arrays),
        what=f"{len(items)} named meshes as clouds of {POINTS} points, in {len(names)} classes",
        licence="CC0 1.0, CC BY 3.0, CC BY 3.0 US (by model)",
        credit=credit_list(items),
        sources=(SOURCE,),
        extra={"objects": len(items), "points": POINTS},
    )
