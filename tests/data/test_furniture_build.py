"""The mesh reader and the renderer behind the furniture assets, against bodies whose pictures are known in closed form."""

import numpy as np
import pytest

from minilib.data.build import furniture_views
from minilib.data.build._furniture import classes, classify
from minilib.data.build._meshes import (
    Material,
    Mesh,
    face_normals,
    parse_mtl,
    parse_obj,
    place,
    read_mesh,
    sample_surface,
    smooth_normals,
)
from minilib.data.build._raster import Camera, Renderer, Textures

RED, BLUE = Material(diffuse=(1.0, 0.0, 0.0)), Material(diffuse=(0.0, 0.0, 1.0))


def box(width=1.0, height=1.0, depth=1.0):
    """Twelve triangles; faces 0, 1: -z, 2, 3: +z, 4, 5: -y, 6, 7: +y, 8, 9: -x, 10, 11: +x."""
    v = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2 * (width, height, depth)
    quads = [(0, 4, 6, 2), (1, 3, 7, 5), (0, 1, 5, 4), (2, 6, 7, 3), (0, 2, 3, 1), (4, 5, 7, 6)]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    return Mesh(v, faces, np.zeros((12, 3, 2)), np.zeros(12, dtype=int))


def ball(rows=40, columns=80):
    """A unit sphere from a grid of latitudes."""
    theta, phi = np.meshgrid(
        np.linspace(0, np.pi, rows + 1), np.arange(columns) * 2 * np.pi / columns, indexing="ij"
    )
    v = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)], -1).reshape(-1, 3)
    at = lambda i, j: i * columns + j % columns  # noqa: E731
    faces = [
        t
        for i in range(rows)
        for j in range(columns)
        for t in ((at(i, j), at(i + 1, j), at(i + 1, j + 1)), (at(i, j), at(i + 1, j + 1), at(i, j + 1)))
    ]
    return Mesh(v, np.array(faces), np.zeros((len(faces), 3, 2)), np.zeros(len(faces), dtype=int))


def quad(z, material, size=2.0):
    """A square facing +z, with picture coordinates 0..1."""
    v = np.array([(-1, -1, z), (1, -1, z), (1, 1, z), (-1, 1, z)], dtype=float) * (size / 2, size / 2, 1)
    uv = np.array([[(0, 0), (1, 0), (1, 1)], [(0, 0), (1, 1), (0, 1)]], dtype=float)
    return Mesh(v, np.array([(0, 1, 2), (0, 2, 3)]), uv, np.zeros(2, dtype=int), [material])


def joined(*meshes):
    """Several meshes as one, each with its own (single) material."""
    starts = np.cumsum([0, *(len(m.vertices) for m in meshes[:-1])])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=True)]),
        np.concatenate([m.uv for m in meshes]),
        np.concatenate([np.full(len(m.faces), i) for i, m in enumerate(meshes)]),
        [m.materials[0] for m in meshes],
    )


def shown(mesh, camera, size=32, pictures=None):
    return Renderer(mesh, Textures.pack(pictures or [None] * len(mesh.materials))).render(camera, size)


# the renderer


def test_a_cube_from_the_front():
    view = shown(box(), Camera(0, 0, 3.0, 2.0), 40)
    half = 2.0 * 0.5 / (3.0 - 0.5) * 20  # in pixels: focal / depth of the front face
    rows, columns = np.where(view.mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 27, 12, 27) and half == 8
    assert np.abs(view.depth[view.mask] - 2.5).max() < 1e-9
    assert np.abs(view.normal[view.mask] - [0, 0, 1]).max() < 1e-9
    assert (view.depth[~view.mask] == 0).all() and (view.normal[~view.mask] == 0).all()
    assert np.array_equal(view.rgba[..., 3] > 0, view.mask)


def test_a_cube_from_its_edge_and_from_above():
    view = shown(box(), Camera(45, 0, 3.0, 2.0), 40)
    middle = view.depth[20, 20]
    assert middle == pytest.approx(3 - 0.5**0.5, abs=0.05)
    left, right = view.normal[20, 16], view.normal[20, 23]
    assert np.abs(left - [-(0.5**0.5), 0, 0.5**0.5]).max() < 1e-6
    assert np.abs(right - [0.5**0.5, 0, 0.5**0.5]).max() < 1e-6
    above = shown(box(1, 2, 1), Camera(0, 90, 3.0, 2.0), 40)
    assert np.abs(above.depth[above.mask] - 2.0).max() < 1e-9


def test_a_sphere_has_its_depth_and_normals():
    distance, focal, n = 3.0, 2.2, 48
    view = shown(ball(), Camera(30, 20, distance, focal), n)
    grid = (np.arange(n) + 0.5) * 2 / n - 1
    x, y = np.meshgrid(grid / focal, -grid / focal)
    # the ray t (x, y, -1) meets |p - (0, 0, -distance)| = 1
    a, b = x**2 + y**2 + 1, distance
    root = b * b - a * (distance**2 - 1)
    hit = root > 0.3
    t = (b - np.sqrt(np.maximum(root, 0))) / a
    assert view.mask[hit].all() and not view.mask[root < -0.3].any()
    assert np.abs(view.depth - t)[hit].max() < 0.03 and np.abs(view.depth - t)[hit].mean() < 0.005
    normal = np.stack([x * t, y * t, distance - t], -1)
    assert ((normal * view.normal).sum(-1)[hit] > np.cos(np.deg2rad(4))).all()
    assert np.abs(np.linalg.norm(view.normal[view.mask], axis=1) - 1).max() < 1e-9


def test_the_camera_stands_where_it_says():
    for yaw, elevation, seen in (
        (0, 0, (0, 0, 1)),
        (90, 0, (1, 0, 0)),
        (180, 0, (0, 0, -1)),
        (0, 90, (0, 1, 0)),
    ):
        camera = Camera(yaw, elevation, 3.5, 1.0)
        assert np.abs(camera.to_camera(np.array([seen])) - [0, 0, -2.5]).max() < 1e-9
    right = Camera(0, 0, 2.0, 1.0).project(np.array([[1.0, 0.5, 0.0]]))
    assert np.abs(right - [0.5, 0.25]).max() < 1e-12
    rotation = Camera(33, 21, 2.0, 1.0).rotation()
    assert np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-12 and np.linalg.det(
        rotation
    ) == pytest.approx(1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_surface_wins_in_any_order(order):
    parts = [quad(0.3, RED, 1.0), quad(-0.3, BLUE)]
    view = shown(joined(*(parts[i] for i in order)), Camera(0, 0, 3.0, 2.0))
    inner, outer = view.rgba[16, 16], view.rgba[16, 7]
    assert inner[0] > 0.5 > inner[2] and outer[2] > 0.5 > outer[0]
    assert view.depth[16, 16] == pytest.approx(2.7) and view.depth[16, 7] == pytest.approx(3.3)


def test_a_face_has_two_sides_and_a_lit_one_is_brighter():
    back = shown(quad(0.0, RED), Camera(180, 0, 3.0, 2.0))
    assert np.abs(back.normal[back.mask] - [0, 0, 1]).max() < 1e-9
    front = shown(box(), Camera(45, 0, 3.0, 2.0), 40)
    assert front.rgba[20, 23, 0] != front.rgba[20, 16, 0]
    top, side = (
        shown(box(), Camera(0, 60, 3.0, 2.0), 40).rgba[15, 20],
        shown(box(), Camera(0, 0, 3.0, 2.0), 40).rgba[20, 20],
    )
    assert top[0] > side[0]


def test_a_picture_stands_upright():
    """Picture row 0 is its top, v = 1; column 0 its left, u = 0."""
    picture = np.ones((2, 2, 4))
    picture[0, 0, :3], picture[0, 1, :3], picture[1, 0, :3], picture[1, 1, :3] = (
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 1),
    )
    big = picture.repeat(64, 0).repeat(64, 1)
    view = shown(quad(0.0, Material()), Camera(0, 0, 3.0, 2.4), 32, [big])
    corners = [view.rgba[r, c, :3] for r, c in ((8, 8), (8, 23), (23, 8), (23, 23))]
    assert [int(c.argmax()) for c in corners[:3]] == [0, 1, 2] and corners[3].min() > 0.5
    assert corners[0][1] < 0.2 > corners[0][2]


def test_small_pictures_on_screen_use_their_halvings():
    """Black and white grains far away become grey, not noise."""
    board = np.ones((256, 256, 4))
    board[..., :3] = np.random.default_rng(0).integers(0, 2, (256, 256, 1))
    view = shown(quad(0.0, Material()), Camera(0, 0, 3.0, 2.4), 16, [board])
    inner = view.rgba[4:12, 4:12, 0]
    assert inner.std() < 0.035 and 0.25 < inner.mean() < 0.6


def test_holes_in_a_picture_are_holes_and_glass_is_clear():
    leaf = np.ones((64, 64, 4))
    leaf[:, :32, 3] = 0
    view = shown(quad(0.0, RED), Camera(0, 0, 3.0, 2.4), 32, [leaf])
    assert view.mask[16, 22] and not view.mask[16, 9] and view.rgba[16, 9, 3] == 0
    pane = Material(diffuse=(0.0, 0.0, 1.0), opacity=0.5)
    glass = shown(joined(quad(0.4, pane, 1.2), quad(-0.4, RED)), Camera(0, 0, 3.0, 2.0))
    through = glass.rgba[16, 16]
    assert glass.depth[16, 16] == pytest.approx(2.6)
    assert 0.3 < through[0] / glass.rgba[16, 7, 0] < 0.7 and through[2] > 0.2 and through[3] == 1
    alone = shown(quad(0.0, pane), Camera(0, 0, 3.0, 2.0))
    assert alone.rgba[16, 16, 3] == 0.5 and alone.mask[16, 16]
    gone = shown(quad(0.0, Material(opacity=0.0)), Camera(0, 0, 3.0, 2.0))
    assert not gone.mask.any() and gone.rgba.max() == 0


def test_edges_are_smooth_in_colour():
    view = shown(ball(), Camera(0, 0, 3.0, 2.2), 32)
    partial = (view.rgba[..., 3] > 0) & (view.rgba[..., 3] < 1)
    assert partial.sum() > 30 and len(np.unique(view.rgba[..., 3])) > 8
    area = np.pi * (2.2 / np.sqrt(8)) ** 2 / 4  # a sphere's outline: tan of asin(1 / 3), times focal
    assert view.rgba[..., 3].mean() == pytest.approx(area, rel=0.01)


def test_geometry_pictures_hold_depth_and_normals():
    view = shown(ball(), Camera(0, 0, 3.5, 2.2), 48)
    picture = furniture_views.encoded_geometry(view).astype(float)
    assert (picture[~view.mask] == (128, 0, 128)).all() and (picture[view.mask][:, 1] > 0).all()
    depth = 3.5 - (picture[..., 1] - 128) / 127
    assert np.abs(depth - view.depth)[view.mask].max() <= 0.5 / 127 + 1e-9
    u, v = ((picture[..., c] - 128) / 127 for c in (0, 2))
    z = 1 - np.abs(u) - np.abs(v)
    normal = np.stack([u - np.sign(u) * np.maximum(-z, 0), v - np.sign(v) * np.maximum(-z, 0), z], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    assert ((normal * view.normal).sum(-1)[view.mask] > np.cos(np.deg2rad(1.2))).all()


# meshes


def test_obj_files_are_read_in_all_their_notations():
    text = b"""mtllib a.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
vt 0.25 0.5
usemtl wood
f 1/1 2/1 3/1 4/1
usemtl glass
f -4//1 -3//1 -2//1
f 1 2 9
f 1/1/1 2/-1/1 3
"""
    mesh, names, libraries = parse_obj(text)
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 2], [0, 1, 2]] and libraries == ["a.mtl"]
    assert [names[i] for i in mesh.material] == ["wood", "wood", "glass", "glass"]
    assert (mesh.uv[:2] == (0.25, 0.5)).all() and (mesh.uv[2] == 0).all()
    assert mesh.uv[3].tolist() == [[0.25, 0.5], [0.25, 0.5], [0, 0]]


def test_materials_and_missing_files():
    mtl = b"newmtl wood\nKd 0.1 0.2 0.3\nd 0.5\nNs 12\n map_Kd oak.png\nnewmtl plain\n"
    found = parse_mtl(mtl, "house/chair")
    assert found["wood"] == Material((0.1, 0.2, 0.3), (0.0, 0.0, 0.0), 12.0, 0.5, "house/chair/oak.png")
    assert found["plain"] == Material()
    obj = b"mtllib a.mtl\nmtllib gone.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl wood\nf 1 2 3\nusemtl none\nf 1 2 3\n"
    mesh = read_mesh("house/chair/c.obj", {"house/chair/c.obj": obj, "house/chair/a.mtl": mtl})
    assert [mesh.materials[i].shininess for i in mesh.material] == [12.0, 20.0]
    with pytest.raises(KeyError, match="no mesh at"):
        read_mesh("x.obj", {})


def test_placing_turns_then_stretches():
    turned = place(box(1, 2, 4), (0, 0, 1, 0, 1, 0, -1, 0, 0), (40, 60, 10))
    extent = turned.vertices.max(0) - turned.vertices.min(0)
    assert np.abs(extent - [40, 60, 10]).max() < 1e-9 and np.abs(turned.vertices.mean(0)).max() < 1e-9
    # a corner at +z goes to +x: the first row takes z
    corner = np.flatnonzero((box().vertices > 0).all(1))[0]
    assert turned.vertices[corner].tolist() == [20, 30, -5]
    flat = place(quad(5.0, RED), None, (10, 20, 3))
    assert np.ptp(flat.vertices[:, 2]) == 0 and np.ptp(flat.vertices[:, 1]) == pytest.approx(20)


def test_smooth_normals_round_a_ball_and_keep_a_box():
    sphere = ball()
    normals, corners = smooth_normals(sphere), sphere.corners()
    _, area = face_normals(sphere)
    assert ((normals * corners).sum(-1)[area > 1e-6] > 0.995).all() or (
        np.abs((normals * corners).sum(-1)[area > 1e-6]) > 0.995
    ).mean() > 0.99
    cube = smooth_normals(box())
    assert np.abs(cube - face_normals(box())[0][:, None]).max() < 1e-9
    wound = ball()
    wound.faces[::2] = wound.faces[::2, ::-1]
    agree = np.abs((smooth_normals(wound) * wound.corners()).sum(-1))[area > 1e-6]
    assert np.median(agree) > 0.995


@pytest.mark.parametrize(("bend", "smooth"), [(30, True), (44, True), (46, False), (80, False), (120, False)])
def test_a_crease_is_a_bend_of_45_degrees(bend, smooth):
    a = np.deg2rad(bend)
    vertices = np.array(
        [
            (-1, 0, 0),
            (-1, 0, 1),
            (0, 0, 0),
            (0, 0, 1),
            (np.cos(a), -np.sin(a), 0),
            (np.cos(a), -np.sin(a), 1.0),
        ]
    )
    faces = np.array([(0, 1, 3), (0, 3, 2), (2, 3, 5), (2, 5, 4)])
    mesh = Mesh(vertices, faces, np.zeros((4, 3, 2)), np.zeros(4, dtype=int))
    moved = np.abs(smooth_normals(mesh) - face_normals(mesh)[0][:, None]).max()
    assert moved > 0.1 if smooth else moved < 1e-9


def test_points_spread_evenly_over_a_box():
    mesh = box(1.0, 2.0, 3.0)
    points = sample_surface(mesh, 40_000, np.random.default_rng(0))
    half = np.array([0.5, 1.0, 1.5])
    on = np.isclose(np.abs(points), half)
    assert on.any(1).all() and (np.abs(points) <= half + 1e-9).all()
    counts, areas = on.sum(0), np.array([2 * 6, 2 * 3, 2 * 2.0])
    expected = 40_000 * areas / areas.sum()
    assert (((counts - expected) ** 2 / expected).sum()) < 14  # chi-square, 2 degrees of freedom, p = 0.001
    side = points[on[:, 0]][:, 1:] / half[1:]  # even in a 2 x 2 square
    assert np.abs(side.mean(0)).max() < 0.03 and np.abs((side**2).mean(0) - 1 / 3).max() < 0.01
    corner = (np.abs(side) > 0.9).all(1).mean()
    assert corner == pytest.approx(0.01, abs=0.003)


def test_sampling_one_triangle_has_the_moments_of_the_triangle():
    mesh = Mesh(np.eye(3), np.array([[0, 1, 2]]), np.zeros((1, 3, 2)), np.zeros(1, dtype=int))
    points = sample_surface(mesh, 60_000, np.random.default_rng(1))
    assert np.abs(points.mean(0) - 1 / 3).max() < 0.004
    assert np.abs((points**2).mean(0) - 1 / 6).max() < 0.004  # Dirichlet(1, 1, 1)


def test_sampling_refuses_and_keeps():
    flat = Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]]), np.zeros((1, 3, 2)), np.zeros(1, dtype=int))
    with pytest.raises(ValueError, match="no area"):
        sample_surface(flat, 3, np.random.default_rng(0))
    with pytest.raises(ValueError, match="only 0 of 3"):
        sample_surface(box(), 3, np.random.default_rng(0), lambda face, weight: np.zeros(len(face), bool))
    top = sample_surface(box(), 100, np.random.default_rng(0), lambda face, weight: face == 6)
    assert len(top) == 100 and np.allclose(top[:, 1], 0.5)


def test_class_rules():
    assert len(classes()) == 23 and classes()[-1] == "other"
    cases = {
        ("Desk lamp", (), "Lights"): "lamp",
        ("Table fan", ("Appliance",), "Miscellaneous"): "appliance",
        ("Bedside table", ("Nightstand",), "Bedroom"): "cabinet",
        ("Bar stool", ("Chair", "Seat"), "Living room"): "chair",
        ("Wheelchair", (), "Miscellaneous"): "other",
        ("Sofa", ("Couch",), "Living room"): "sofa",
        ("Ficus", ("Tree",), "Living room"): "plant",
        ("Beer glass", ("Drink",), "Kitchen"): "vessel",
        ("Man", ("Human", "People"), "Characters"): "person",
        ("Cat", ("Animal",), "Characters"): "animal",
        ("Xylophone", ("Toy", "Music"), "Bedroom"): "play and sport",
        ("Gift", ("Decoration",), "Miscellaneous"): "other",
    }
    assert {case: classify(*case) for case in cases} == cases
