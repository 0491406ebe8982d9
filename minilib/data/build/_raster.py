"""A small software renderer for build scripts: z-buffer, textures, cut-outs, glass; colour, depth and normals of one camera.

Right-handed world, y up; the camera looks down its own -z, with x to the right and y up. Every pixel is cut into
``SUPERSAMPLING`` squared samples. Colour is their mean (glass is dithered over them), the normal their mean direction; depth is
that of the median sample, so that it lies on a surface. Geometry counts glass as solid, colour lets it shine through.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minilib.data.build._meshes import Mesh, face_normals, smooth_normals

SUPERSAMPLING = 4
KEY, FILL = np.array([-0.45, 0.75, 0.65]), np.array([0.85, 0.15, 0.35])
"""Directions to the two lights, in camera space: over the left shoulder, and from the right."""


@dataclass(frozen=True)
class Camera:
    """Looks at the origin from ``distance``, turned by ``yaw`` about y and raised by ``elevation`` (degrees).

    A point (x, y, z) of camera space, with -z its depth, falls on the image plane at ``focal * (x, y) / depth``; the picture
    spans -1..1 both ways.
    """

    yaw: float
    elevation: float
    distance: float
    focal: float

    def rotation(self) -> np.ndarray:
        """World to camera, (3, 3). At yaw 0 and elevation 0 the camera stands on the +z axis."""
        a, e = np.deg2rad(self.yaw), np.deg2rad(self.elevation)
        turn = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
        tilt = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
        return tilt @ turn

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """Points in camera space."""
        return points @ self.rotation().T - np.array([0.0, 0.0, self.distance])

    def project(self, points: np.ndarray) -> np.ndarray:
        """Places on the image plane, in -1..1."""
        seen = self.to_camera(points)
        return self.focal * seen[..., :2] / -seen[..., 2:]


@dataclass
class Textures:
    """All pictures of a mesh with their halvings, in one flat array, so that a lookup is one gather.

    ``texels (n, 4)`` RGBA in 0..1; per material and level ``offset``, ``width`` and ``height``; ``levels`` (m,), 0 for none.
    """

    texels: np.ndarray
    offset: np.ndarray
    width: np.ndarray
    height: np.ndarray
    levels: np.ndarray

    @classmethod
    def pack(cls, pictures: list[np.ndarray | None]) -> Textures:
        """From one RGBA picture (h, w, 4) in 0..1 a material, or None."""
        chains = [_halvings(p) if p is not None else [] for p in pictures]
        depth = max([len(c) for c in chains] + [1])
        shape = np.zeros((len(pictures), depth, 2), dtype=np.int64)
        offset, flat, at = np.zeros((len(pictures), depth), dtype=np.int64), [np.ones((1, 4))], 1
        for i, chain in enumerate(chains):
            for j, level in enumerate(chain):
                shape[i, j], offset[i, j] = level.shape[:2], at
                flat.append(level.reshape(-1, 4))
                at += len(flat[-1])
        levels = np.array([len(c) for c in chains])
        return cls(np.concatenate(flat), offset, shape[..., 1], shape[..., 0], levels)

    def lookup(self, material: np.ndarray, level: np.ndarray, uv: np.ndarray) -> np.ndarray:
        """RGBA (n, 4), bilinear, repeated beyond 0..1; materials without a picture give ones."""
        level = np.clip(level, 0, np.maximum(self.levels[material] - 1, 0))
        base = self.offset[material, level]
        width, height = self.width[material, level], self.height[material, level]
        has = self.levels[material] > 0
        w, h = np.maximum(width, 1), np.maximum(height, 1)
        x = np.mod(uv[:, 0], 1) * w - 0.5
        y = np.mod(1 - uv[:, 1], 1) * h - 0.5
        x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        total = np.zeros((len(uv), 4))
        for dy, wy in ((0, 1 - fy), (1, fy)):
            for dx, wx in ((0, 1 - fx), (1, fx)):
                at = base + np.mod(y0 + dy, h) * w + np.mod(x0 + dx, w)
                total += wx * wy * self.texels[np.where(has, at, 0)]
        return total


def _halvings(picture: np.ndarray) -> list[np.ndarray]:
    """The picture and its box-filtered halvings, down to one texel on the shorter side."""
    chain = [picture]
    while min(chain[-1].shape[:2]) > 1:
        p = chain[-1][: chain[-1].shape[0] // 2 * 2, : chain[-1].shape[1] // 2 * 2]
        chain.append((p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2]) / 4)
    return chain


@dataclass(frozen=True)
class View:
    """One rendered view, arrays of (size, size) or (size, size, c).

    ``rgba`` in 0..1 (colour not multiplied by alpha), ``mask``, ``depth`` along the optical axis (0 outside the mask) and unit
    ``normal`` in camera space, towards the camera (0 outside).
    """

    rgba: np.ndarray
    mask: np.ndarray
    depth: np.ndarray
    normal: np.ndarray


class Renderer:
    """A mesh made ready for many views. Surfaces with opacity below ``invisible`` are not there at all."""

    def __init__(self, mesh: Mesh, textures: Textures, invisible: float = 0.04) -> None:
        opacity = np.array([m.opacity for m in mesh.materials])
        seen = opacity[mesh.material] >= invisible
        self.mesh = Mesh(mesh.vertices, mesh.faces[seen], mesh.uv[seen], mesh.material[seen], mesh.materials)
        self.textures = textures
        self.opacity = opacity
        self.diffuse = np.array([m.diffuse for m in mesh.materials])
        self.specular = np.array([m.specular for m in mesh.materials])
        self.shininess = np.clip([m.shininess for m in mesh.materials], 5, 80)
        self.flat, self.areas = face_normals(self.mesh)
        self.smooth = smooth_normals(self.mesh) if len(self.mesh.faces) else np.zeros((0, 3, 3))

    def render(self, camera: Camera, size: int) -> View:
        """One view of ``size`` x ``size`` pixels. Nothing may lie behind the camera."""
        n = size * SUPERSAMPLING
        seen = camera.to_camera(self.mesh.corners())
        face, pixel, weight, depth = _fragments(seen, camera.focal, n)
        alpha = self._alpha(face, weight)
        solid = alpha >= 0.5 * np.minimum(self.opacity[self.mesh.material[face]], 1)
        geometry = _nearest(pixel, np.where(solid, depth, np.inf), n * n)
        shown = _nearest(
            pixel, np.where(alpha > _dither(pixel, self.mesh.material[face], n), depth, np.inf), n * n
        )
        rotation = camera.rotation()
        rgb = np.zeros((n * n, 4))
        at = shown[shown >= 0]
        rgb[shown >= 0, :3] = self._shade(face[at], weight[at], seen, rotation, camera.focal * n / 2)
        rgb[shown >= 0, 3] = 1
        at = geometry[geometry >= 0]
        samples = np.zeros((n * n, 4))
        samples[geometry >= 0, 0] = depth[at]
        samples[geometry >= 0, 1:] = self._normals(face[at], weight[at], seen, rotation)
        return _resolve(rgb, samples, size)

    def _uv(self, face: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return (weight[:, :, None] * self.mesh.uv[face]).sum(1)

    def _alpha(self, face: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Opacity of every fragment; only textured or glassy ones are looked up."""
        material = self.mesh.material[face]
        alpha = self.opacity[material].copy()
        textured = self.textures.levels[material] > 0
        if textured.any():
            zero = np.zeros(textured.sum(), dtype=np.int64)
            uv = self._uv(face[textured], weight[textured])
            alpha[textured] *= self.textures.lookup(material[textured], zero, uv)[:, 3]
        return alpha

    def _normals(
        self, face: np.ndarray, weight: np.ndarray, seen: np.ndarray, rotation: np.ndarray
    ) -> np.ndarray:
        """Unit normals in camera space, on the side of the face that the camera sees."""
        normal = (weight[:, :, None] * self.smooth[face]).sum(1) @ rotation.T
        flat = self.flat[face] @ rotation.T
        place = (weight[:, :, None] * seen[face]).sum(1)
        side = -np.sign((flat * place).sum(1))
        normal *= np.where((normal * flat).sum(1) < 0, -side, side)[:, None]
        length = np.linalg.norm(normal, axis=1, keepdims=True)
        return np.where(length > 1e-9, normal / np.maximum(length, 1e-9), np.array([0.0, 0.0, 1.0]))

    def _shade(
        self, face: np.ndarray, weight: np.ndarray, seen: np.ndarray, rotation: np.ndarray, pixels: float
    ) -> np.ndarray:
        """Colour from ambient light (more from above), two lights, and a highlight."""
        material = self.mesh.material[face]
        colour = self.diffuse[material].copy()
        textured = self.textures.levels[material] > 0
        if textured.any():
            level = self._level(face[textured], seen, pixels)
            uv = self._uv(face[textured], weight[textured])
            colour[textured] = self.textures.lookup(material[textured], level, uv)[:, :3]
        normal = self._normals(face, weight, seen, rotation)
        up = normal @ rotation[:, 1]
        key, fill = (np.maximum(normal @ (light / np.linalg.norm(light)), 0) for light in (KEY, FILL))
        light = 0.42 + 0.12 * up + 0.55 * key + 0.16 * fill
        place = (weight[:, :, None] * seen[face]).sum(1)
        half = KEY / np.linalg.norm(KEY) - place / np.linalg.norm(place, axis=1, keepdims=True)
        half /= np.linalg.norm(half, axis=1, keepdims=True)
        gleam = np.maximum((normal * half).sum(1), 0) ** self.shininess[material]
        sky = 0.12 + 0.12 * up
        shine = self.specular[material] * (0.3 * gleam + np.maximum(sky, 0))[:, None]
        return np.clip(colour * light[:, None] + shine, 0, 1)

    def _level(self, face: np.ndarray, seen: np.ndarray, pixels: float) -> np.ndarray:
        """The halving of its picture whose texels are about as large as a sample."""
        a, b, c = (self.mesh.uv[face][:, i] for i in range(3))
        uv_area = np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2
        material = self.mesh.material[face]
        texels = uv_area * self.textures.width[material, 0] * self.textures.height[material, 0]
        near = -seen[face][:, :, 2].mean(1)
        samples = np.maximum(self.areas[face], 1e-12) * (pixels / near) ** 2
        return np.floor(0.5 * np.log2(np.maximum(texels / samples, 1e-6))).astype(np.int64)


def _fragments(
    seen: np.ndarray, focal: float, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every sample that a triangle covers: its face (m,), sample (m,), perspective-correct weights (m, 3) and depth (m,)."""
    inverse = 1 / -seen[..., 2]  # (f, 3)
    x = (focal * seen[..., 0] * inverse + 1) * n / 2
    y = (1 - focal * seen[..., 1] * inverse) * n / 2
    low = np.stack([np.ceil(x.min(1) - 0.5), np.ceil(y.min(1) - 0.5)], 1).clip(0, n).astype(np.int64)
    high = np.stack([np.floor(x.max(1) - 0.5), np.floor(y.max(1) - 0.5)], 1).clip(-1, n - 1).astype(np.int64)
    twice = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    box = np.maximum(high - low + 1, 0)
    count = np.where(np.abs(twice) > 1e-9, box[:, 0] * box[:, 1], 0)
    face = np.repeat(np.arange(len(count)), count)
    local = np.arange(len(face)) - np.repeat(np.cumsum(count) - count, count)
    wide = box[face, 0]
    px, py = low[face, 0] + local % wide, low[face, 1] + local // wide
    weight = []
    for i, j in ((1, 2), (2, 0)):
        slope_x, slope_y = (
            (y[:, i] - y[:, j]) / twice_or_one(twice),
            (x[:, j] - x[:, i]) / twice_or_one(twice),
        )
        constant = -(slope_x * x[:, j] + slope_y * y[:, j])
        weight.append(slope_x[face] * (px + 0.5) + slope_y[face] * (py + 0.5) + constant[face])
    inside = (weight[0] >= 0) & (weight[1] >= 0) & (weight[0] + weight[1] <= 1)
    face, pixel = face[inside], (py * n + px)[inside]
    w0, w1 = weight[0][inside], weight[1][inside]
    flat = np.stack([w0, w1, 1 - w0 - w1], 1) * inverse[face]
    total = flat.sum(1)
    return face, pixel, flat / total[:, None], 1 / total


def twice_or_one(twice: np.ndarray) -> np.ndarray:
    """Twice the signed areas, with 1 in place of (nearly) none: those triangles have no fragments."""
    return np.where(np.abs(twice) > 1e-9, twice, 1.0)


def _nearest(pixel: np.ndarray, depth: np.ndarray, n: int) -> np.ndarray:
    """For every sample the fragment of least depth, -1 for none."""
    buffer = np.full(n, np.inf)
    np.minimum.at(buffer, pixel, depth)
    winner = np.full(n, -1, dtype=np.int64)
    first = np.flatnonzero((depth == buffer[pixel]) & np.isfinite(depth))
    winner[pixel[first]] = first
    return winner


def _dither(pixel: np.ndarray, material: np.ndarray, n: int) -> np.ndarray:
    """A threshold in (0, 1) for every fragment: over the samples of a pixel, and for each material, all 16 values once."""
    s = SUPERSAMPLING
    place = (pixel // n % s) * s + pixel % n % s
    order = np.random.default_rng(0).permutation(s * s)
    return (order[(place + 5 * material) % (s * s)] + 0.5) / (s * s)


def _resolve(rgb: np.ndarray, samples: np.ndarray, size: int) -> View:
    """Samples to pixels: mean colour and coverage; mean normal and median depth where half of the pixel is covered."""
    s = SUPERSAMPLING

    def blocks(a: np.ndarray) -> np.ndarray:
        return a.reshape(size, s, size, s, -1).transpose(0, 2, 1, 3, 4).reshape(size, size, s * s, -1)

    colour, geometry = blocks(rgb), blocks(samples)
    alpha = colour[..., 3].mean(2)
    rgba = np.concatenate(
        [colour[..., :3].sum(2) / np.maximum(alpha * s * s, 1)[..., None], alpha[..., None]], -1
    )
    covered = (geometry[..., 0] > 0).sum(2)
    mask = covered >= s * s / 2
    order = np.argsort(np.where(geometry[..., 0] > 0, geometry[..., 0], np.inf), axis=2, kind="stable")
    middle = np.take_along_axis(order, np.maximum(covered - 1, 0)[..., None] // 2, axis=2)
    chosen = np.take_along_axis(geometry, middle[..., None], axis=2)[:, :, 0]
    mean = geometry[..., 1:].sum(2)  # samples that nothing covers hold zeros
    length = np.linalg.norm(mean, axis=-1, keepdims=True)
    clear = length > 0.2 * covered[..., None]  # else surfaces that face away from each other: one of them
    normal = np.where(clear, mean / np.maximum(length, 1e-9), chosen[..., 1:])
    return View(rgba, mask, chosen[..., 0] * mask, normal * mask[..., None])
