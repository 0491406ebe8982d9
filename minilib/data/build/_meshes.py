"""Triangle meshes for build scripts: Wavefront OBJ and MTL, placement, smooth normals, points spread evenly over the surface."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

CREASE_COS = float(np.cos(np.deg2rad(45)))
"""Faces that meet at a sharper angle than this stay flat-shaded along their edge."""


@dataclass(frozen=True)
class Material:
    """What an MTL file says of a surface: colour, highlight, opacity (1 is solid) and the path of its texture."""

    diffuse: tuple[float, float, float] = (0.8, 0.8, 0.8)
    specular: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shininess: float = 20.0
    opacity: float = 1.0
    texture: str | None = None
    alpha: str | None = None


@dataclass
class Mesh:
    """Triangles. ``vertices (v, 3)``; ``faces (f, 3)`` into them; ``uv (f, 3, 2)``; ``material (f,)`` into ``materials``."""

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    materials: list[Material] = field(default_factory=lambda: [Material()])

    def corners(self) -> np.ndarray:
        """Positions of the triangles' corners, (f, 3, 3)."""
        return self.vertices[self.faces]


def parse_obj(text: bytes) -> tuple[Mesh, list[str], list[str]]:
    """A mesh from an OBJ file, polygons cut into fans, with the names of its materials and of its material libraries.

    Lines, free-form surfaces, smoothing groups and the file's own normals are left out. Faces that name a missing vertex are
    dropped. ``materials`` holds defaults until :func:`read_mesh` fills them in.
    """
    positions: list[bytes] = []
    texels: list[tuple[bytes, bytes]] = []
    faces: list[tuple[int, ...]] = []
    names, libraries, current = [""], [], 0
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == b"v":
            positions += words[1:4]
        elif words[0] == b"vt":
            texels.append((words[1], words[2] if len(words) > 2 else b"0"))
        elif words[0] == b"f":
            corners = [_corner(word, len(positions) // 3, len(texels)) for word in words[1:]]
            for b, c in zip(corners[1:-1], corners[2:], strict=True):
                faces.append((*corners[0], *b, *c, current))
        elif words[0] in (b"usemtl", b"mtllib"):
            name = line.split(None, 1)[1].strip().decode("latin1") if len(words) > 1 else ""
            if words[0] == b"mtllib":
                libraries.append(name)
                continue
            if name not in names:
                names.append(name)
            current = names.index(name)
    vertices = np.array(positions, dtype=np.float64).reshape(-1, 3)
    table = np.array(faces, dtype=np.int64).reshape(-1, 7)
    index, texel = table[:, 0:6:2], table[:, 1:6:2]
    good = ((index >= 0) & (index < len(vertices))).all(1)
    coordinates = np.array([*texels, (b"0", b"0")], dtype=np.float64)  # the last row stands for "none"
    uv = coordinates[np.where((texel < 0) | (texel >= len(texels)), len(texels), texel)]
    mesh = Mesh(vertices, index[good], uv[good], table[good, 6], [Material()] * len(names))
    return mesh, names, libraries


def _corner(word: bytes, vertices: int, texels: int) -> tuple[int, int]:
    """Indices from 0 of ``v``, ``v/vt``, ``v//vn`` or ``v/vt/vn``; -1 for none. Negative ones count from the end."""
    parts = word.split(b"/")
    v = int(parts[0])
    t = int(parts[1]) if len(parts) > 1 and parts[1] else 0
    return (v - 1 if v > 0 else v + vertices), (t - 1 if t > 0 else t + texels if t < 0 else -1)


def parse_mtl(text: bytes, folder: str) -> dict[str, Material]:
    """The materials of an MTL file by name; texture paths are joined to ``folder``."""
    found: dict[str, dict[str, object]] = {}
    current: dict[str, object] = {}
    for line in text.splitlines():
        key, _, value = line.strip().decode("latin1").partition(" ")
        value = value.strip()
        if key == "newmtl":
            current = found.setdefault(value, {})
        elif key in ("Kd", "Ks"):
            rgb = tuple(float(v) for v in value.split()[:3])
            current["diffuse" if key == "Kd" else "specular"] = rgb
        elif key in ("Ns", "d"):
            current["shininess" if key == "Ns" else "opacity"] = float(value.split()[-1])
        elif key in ("map_Kd", "map_d"):
            current["texture" if key == "map_Kd" else "alpha"] = posixpath.join(folder, value)
    return {name: Material(**values) for name, values in found.items()}  # type: ignore[arg-type]


def read_mesh(path: str, files: Mapping[str, bytes] | Callable[[str], bytes | None]) -> Mesh:
    """The mesh at ``path`` with its materials; a library or texture that is not there is passed over."""
    get = files.get if isinstance(files, Mapping) else files
    text = get(path)
    if text is None:
        raise KeyError(f"no mesh at {path!r}")
    mesh, names, libraries = parse_obj(text)
    folder, known = posixpath.dirname(path), {}
    for library in libraries:
        known |= parse_mtl(get(posixpath.join(folder, library)) or b"", folder)
    mesh.materials = [known.get(name, Material()) for name in names]
    return mesh


def place(mesh: Mesh, rotation: Iterable[float] | None, size: Iterable[float]) -> Mesh:
    """The mesh turned by a 3 x 3 matrix (row by row), then stretched to a box of ``size`` (width, height, depth), centred on 0.

    An axis along which the mesh is flat keeps its scale.
    """
    vertices = mesh.vertices
    if rotation is not None:
        vertices = vertices @ np.array(list(rotation)).reshape(3, 3).T
    used = vertices[np.unique(mesh.faces)]
    low, high = used.min(0), used.max(0)
    extent = high - low
    target = np.array(list(size))
    scale = np.where(extent > 1e-6 * extent.max(), target / np.maximum(extent, 1e-12), 1.0)
    return Mesh((vertices - (low + high) / 2) * scale, mesh.faces, mesh.uv, mesh.material, mesh.materials)


def face_normals(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (f, 3), zero for a face without area, and areas (f,)."""
    corners = mesh.corners()
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(cross, axis=1)
    return cross / np.maximum(length, 1e-300)[:, None], length / 2


def smooth_normals(mesh: Mesh, max_share: int = 64) -> np.ndarray:
    """A unit normal for every corner, (f, 3, 3): the mean over the faces around it that bend by less than 45 degrees.

    Vertices at the same place count as one. Faces wound the other way round count with their normal turned. Where more than
    ``max_share`` faces meet, the corner keeps its face's normal.
    """
    normal, area = face_normals(mesh)
    scale = np.abs(mesh.vertices).max() + 1e-12
    _, weld = np.unique(np.round(mesh.vertices / scale * 1e5).astype(np.int64), axis=0, return_inverse=True)
    vertex = weld.reshape(-1)[mesh.faces].reshape(-1)  # one entry a corner
    order = np.argsort(vertex, kind="stable")
    count = np.bincount(vertex, minlength=vertex.max() + 1)
    start = np.cumsum(count) - count
    shared = np.where(count[vertex] <= max_share, count[vertex], 1)
    first = np.where(shared > 1, start[vertex], 0)
    mine = np.repeat(np.arange(len(vertex)), shared)
    step = np.arange(len(mine)) - np.repeat(np.cumsum(shared) - shared, shared)
    other = order[first[mine] + step]
    other = np.where(shared[mine] > 1, other, mine)
    mine_face, other_face = mine // 3, other // 3
    cosine = (normal[mine_face] * normal[other_face]).sum(1)
    weight = np.where(np.abs(cosine) > CREASE_COS, np.sign(cosine) * area[other_face], 0.0)
    total = np.stack([np.bincount(mine, weight * normal[other_face, i], len(vertex)) for i in range(3)], 1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    flat = np.repeat(normal, 3, axis=0)
    return np.where(length > 1e-12, total / np.maximum(length, 1e-300), flat).reshape(-1, 3, 3)


def sample_surface(
    mesh: Mesh,
    n: int,
    rng: np.random.Generator,
    keep: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """``n`` points spread evenly over the surface, (n, 3): a face by its area, then uniform inside it.

    Args:
        keep: of faces (m,) and barycentric weights (m, 3), which points count (a leaf's picture has holes); others are redrawn.

    Raises:
        ValueError: the mesh has no area, or ``keep`` refuses nearly everything.
    """
    _, area = face_normals(mesh)
    total = area.sum()
    if not total > 0:
        raise ValueError("a surface of no area cannot be sampled")
    corners, found = mesh.corners(), np.empty((0, 3))
    edges = np.cumsum(area / total)
    for _ in range(50):
        face = np.minimum(np.searchsorted(edges, rng.random(n)), len(edges) - 1)
        root, second = np.sqrt(rng.random(n)), rng.random(n)
        weight = np.stack([1 - root, root * (1 - second), root * second], 1)
        points = (weight[:, :, None] * corners[face]).sum(1)
        found = np.concatenate([found, points if keep is None else points[keep(face, weight)]])
        if len(found) >= n:
            return found[:n]
    raise ValueError(f"only {len(found)} of {n} points found a place on the surface")
