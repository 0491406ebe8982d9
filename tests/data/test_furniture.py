import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minilib.data import assets, furniture, load, provenance
from minilib.data.build import _furniture, furniture_views
from minilib.data.build import furniture as recipe
from minilib.data.build._raster import Camera

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def views():
    return load("furniture", "test")


@pytest.fixture(scope="module")
def catalogue():
    folder = Path(os.environ.get("MINILIB_ASSET_SOURCES", ""))
    if not (folder / _furniture.SOURCE.file).is_file():
        pytest.skip(f"MINILIB_ASSET_SOURCES names no folder with {_furniture.SOURCE.file}")
    return _furniture.Catalogue(folder)


# the vendored set


def test_splits_are_by_model_complete_and_stratified():
    sets = {split: furniture.clouds(split) for split in SPLITS}
    index = torch.cat([s.index for s in sets.values()])
    assert sorted(index.tolist()) == list(range(758))
    counts = torch.stack([s.y.bincount(minlength=23) for s in sets.values()])
    assert (counts[:, counts.sum(0) >= 3] > 0).all() and counts.sum(0).min() >= 3
    share = counts[2] / counts.sum(0)
    assert ((share - 0.2).abs() * counts.sum(0) < 3.5).all()
    variants = {}
    for s in sets.values():
        for key in zip(s.y.tolist(), s.authors, s.size_cm.mul(5).round().tolist(), strict=True):
            variants.setdefault(str(key), set()).add(s.split)
    assert all(len(where) == 1 for where in variants.values())


def test_views_and_clouds_are_the_same_models(views):
    clouds = furniture.clouds("test")
    assert torch.equal(views.object, clouds.index.repeat_interleave(6))
    assert torch.equal(views.y, clouds.y.repeat_interleave(6))
    assert views.names == tuple(name for name in clouds.names for _ in range(6))
    assert views.classes == clouds.classes and views.num_classes == clouds.num_classes == 23
    assert len(views) == len(views.captions) == 6 * len(clouds)
    assert len(views.checksum) == len(clouds.checksum) == 64
    assert "sweethome3d-furniture 1.8-1" in views.source
    assert {"furniture", "furniture_clouds"} <= set(provenance.used())
    assert torch.equal(load("furniture_clouds", "test").points, clouds.points)


def test_images_are_in_range_and_agree_with_each_other(views):
    assert views.x.shape == (len(views), 3, 64, 64) and views.x.min() >= -1 and views.x.max() <= 1
    share = views.mask.float().mean((1, 2, 3))
    assert share.min() > 0 and 0.15 < share.mean() < 0.45
    # colour, depth and normals speak of the same pixels
    assert torch.equal(views.depth > -1, views.mask)
    length = views.normal.norm(dim=1, keepdim=True)
    assert (length[views.mask] - 1).abs().max() < 1e-5 and length[~views.mask].abs().max() == 0
    assert (views.alpha[views.mask] > 0).float().mean() > 0.99
    assert (views.alpha[~views.mask] <= 0.5).float().mean() > 0.999
    nothing = (views.alpha == 0).expand_as(views.x)
    assert (views.x[nothing] - furniture.BACKGROUND).abs().max() < 1e-6
    white = views.on(1.0)
    assert (white[nothing] == 1).all() and (white - views.x).min() >= -1e-6
    # no frame cuts a model off, and every model fills its frame in some view
    border = torch.cat(
        [views.mask[..., 0, :], views.mask[..., -1, :], views.mask[..., 0], views.mask[..., -1]], -1
    )
    assert not border.any()
    rows, columns = views.mask.any(3)[:, 0].sum(1), views.mask.any(2)[:, 0].sum(1)
    widest = torch.maximum(rows, columns).view(-1, 6).amax(1).float()
    assert widest.quantile(0.02) > 45 and widest.max() <= 61


def test_normals_face_the_camera_and_follow_the_depth(views):
    agree, facing = [], []
    for i in range(0, len(views), 7):
        inside = views.mask[i, 0]
        z = furniture.DISTANCE - views.depth[i, 0]
        grid = (torch.arange(64) + 0.5) / 32 - 1
        place = torch.stack([grid[None, :] * z, -grid[:, None] * z, -z * views.focal[i]]) / views.focal[i]
        across, up = place[:, 1:-1, 2:] - place[:, 1:-1, :-2], place[:, :-2, 1:-1] - place[:, 2:, 1:-1]
        normal = torch.nn.functional.normalize(torch.linalg.cross(across, up, dim=0), dim=0)
        flat = (
            torch.nn.functional.max_pool2d(-z[None, None], 3, 1)[0, 0]
            + torch.nn.functional.max_pool2d(z[None, None], 3, 1)[0, 0]
            < 0.1
        )
        whole = -torch.nn.functional.max_pool2d(-inside[None, None].float(), 3, 1)[0, 0] > 0
        cosine = (normal * views.normal[i, :, 1:-1, 1:-1]).sum(0)[whole & flat]
        agree.append(cosine)
        ray = torch.nn.functional.normalize(-place, dim=0)
        facing.append((ray * views.normal[i]).sum(0)[inside])
    agree, facing = torch.cat(agree), torch.cat(facing)
    assert len(agree) > 10_000 and agree.median() > 0.99 and agree.quantile(0.1) > 0.75
    assert (facing > -0.02).float().mean() > 0.99


def test_seen_points_lie_on_the_clouds(views):
    """The camera, the depth and the cloud tell one story: seen points, brought back to the model's space, are near its cloud."""
    clouds = furniture.clouds("test")
    gaps, wrong = [], []
    for i in range(3, len(views), 31):
        seen = views.points(i)
        cloud = clouds.points[(clouds.index == views.object[i]).nonzero()[0, 0]]
        gaps.append(torch.cdist(seen, cloud).amin(1).median())
        others = (seen[:, [2, 1, 0]] * torch.tensor([1.0, 1.0, -1.0]), seen * torch.tensor([1.0, -1.0, 1.0]))
        wrong.append(torch.stack([torch.cdist(other, cloud).amin(1).median() for other in others]))
    assert torch.stack(gaps).median() < 0.04 and torch.stack(gaps).max() < 0.12
    turned, upside_down = torch.stack(wrong).mean(0) / torch.stack(gaps).mean()
    assert turned > 1.5 and upside_down > 1.2, (turned, upside_down)


def test_cameras_are_spread_as_stated(views):
    yaw = views.yaw.view(-1, 6)
    assert torch.equal((yaw // 60).long(), torch.arange(6).expand_as(yaw))
    assert views.elevation.min() >= 10 and views.elevation.max() <= 40 and views.elevation.std() > 7
    assert (views.focal.view(-1, 6).std(1) < 1e-6).all()
    for i in (0, 17):
        camera = Camera(float(views.yaw[i]), float(views.elevation[i]), 3.5, 1.0)
        assert np.abs(views.rotation(i).numpy() - camera.rotation()).max() < 1e-6


def test_half_size_is_pooled(views):
    small = load("furniture", "test", size=32)
    assert small.x.shape[2:] == small.depth.shape[2:] == (32, 32)
    assert (small.x - torch.nn.functional.avg_pool2d(views.x, 2)).abs().max() < 1e-5
    assert torch.equal(small.depth > -1, small.mask)
    assert (small.normal.norm(dim=1, keepdim=True)[small.mask] - 1).abs().max() < 1e-5
    seen, full = small.points(4), views.points(4)
    assert torch.cdist(seen, full).amin(1).median() < 0.06


def test_clouds_are_centred_inside_the_unit_sphere():
    clouds = furniture.clouds("train")
    assert clouds.points.shape == (len(clouds), 1024, 3) and clouds.points.dtype == torch.float32
    reach = clouds.points.norm(dim=2).amax(1)
    assert reach.max() < 1.001 and reach.median() > 0.95
    box = clouds.points.amax(1) - clouds.points.amin(1)  # width, height, depth
    stated = clouds.size_cm[:, [0, 2, 1]] / clouds.radius_cm[:, None]
    assert ((box - stated).abs().amax(1) < 0.12).float().mean() > 0.93
    chairs = furniture.clouds("train", ["chair"])
    assert torch.equal(chairs.points, clouds.of_class("chair")) and 40 < len(chairs) < 60
    seats = chairs.points[:, :, 1]
    assert (seats.amax(1) - seats.amin(1)).min() > 0.4  # y is up: no chair is flat


def test_names_captions_and_credits():
    sets = [furniture.clouds(split) for split in SPLITS]
    names = [name for s in sets for name in s.names]
    words = " ".join(names + [tag for s in sets for tags in s.tags for tag in tags]).lower()
    brands = r"\bvw\b|apple i|peugeot|renault|yamaha|chevrolet|ford\b|playstation|sony|ipad|xbox|velux|rubik|thonet|scopia"
    assert not re.search(brands, words)
    assert all(re.match(r"(an? )?[A-Za-z][\w',. -]+$", c) for s in sets for c in s.captions)
    by_class = {
        c: {n for s in sets for n, y in zip(s.names, s.y, strict=True) if s.classes[y] == c}
        for c in sets[0].classes
    }
    assert {"armchair", "stool", "bar chair"} <= by_class["chair"] and "wheelchair" not in by_class["chair"]
    assert "desk lamp" in by_class["lamp"] and "bedside table" in by_class["cabinet"]
    assert "table fan" in by_class["appliance"] and "glass door cabinet" in by_class["cabinet"]
    assert not {"desk lamp", "table fan", "bedside table"} & by_class["table"]
    credit = assets.licence_text("furniture")
    for s in sets:
        for author, licence in zip(s.authors, s.licences, strict=True):
            assert f"- {author} ({licence}): " in credit
    assert {licence for s in sets for licence in s.licences} == {"CC0 1.0", "CC BY 3.0", "CC BY 3.0 US"}


CAPTIONS = (
    "an armchair", "an upper cabinet", "a utensils pot", "shelves", "a glass", "a bus", "a cactus", "scissors", "a dress", "a TV",
    "an SUV", "bread", "a spiral staircase", "a Christmas tree", "a urinal", "an Osaka chair", "women's shoes", "French fries",
    "a fork lift", "a double window with 4 panes", "a table on trestles", "orchids", "keys", "a cypress", "a ficus",
    "hanging clothes", "a folding screen", "an island bath",
)  # fmt: skip


@pytest.mark.parametrize("expected", CAPTIONS)
def test_caption(expected):
    name = re.sub("^an? ", "", expected)
    assert furniture.caption(name) == expected


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown class 'seat'.*chair"):
        furniture.clouds("train", ["seat"])
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        furniture.clouds("dev")
    with pytest.raises(ValueError, match="unknown class"):
        furniture.clouds("test").of_class("seat")
    with pytest.raises(ValueError, match="64 x 64 pixels or 32 x 32"):
        load("furniture", "train", size=128)


def test_packed_points_come_back():
    points = np.random.default_rng(0).uniform(-0.57, 0.57, (200, 3))
    back = np.cumsum(recipe.packed(points).astype(np.int32), 1).T / recipe.STEPS
    assert furniture.STEPS == recipe.STEPS and furniture.DISTANCE == furniture_views.DISTANCE
    nearest = np.abs(back[:, None] - points[None]).max(-1).min(0)
    assert nearest.max() <= 0.5 / recipe.STEPS + 1e-12


def test_three_models_are_derived_again(catalogue):
    items = catalogue.items
    table, stored = assets.open_npz("furniture"), assets.open_npz("furniture_views")
    assert table["key"].tolist() == [item.key for item in items]
    assert table["split"].tolist() == recipe.splits(items).tolist()
    assert assets.licence_text("furniture") == recipe.credit_list(items)
    for i in (5, 300, 640):
        mesh = catalogue.mesh(items[i])
        assert recipe.unit_sphere(mesh) == pytest.approx(float(table["radius_cm"][i]), rel=1e-6)
        deltas = recipe.packed(
            recipe.cloud(mesh, catalogue.textures(items[i], mesh), np.random.default_rng(items[i].seed))
        )
        assert np.array_equal(
            deltas, table["low"][i].astype(np.int32) + 256 * table["high"][i].astype(np.int32)
        )
        colour, geometry, camera = furniture_views.render(catalogue, items[i])
        assert np.array_equal(camera, stored["camera"][i])
        for key, blob in (("colour", colour), ("geometry", geometry)):
            end = stored[f"{key}_bytes"][: i + 1].sum()
            old = stored[key][end - stored[f"{key}_bytes"][i] : end].tobytes()
            new, old = (np.asarray(Image.open(io.BytesIO(b))).astype(int) for b in (blob, old))
            assert (new != old).mean() < 1e-3  # rounding may differ between machines
