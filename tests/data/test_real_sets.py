import io
import os
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minilib.data import PhotoSet, assets, caption_states, load, stereo
from minilib.data.build import emoji as emoji_build
from minilib.data.build import mnist10k as mnist_build
from minilib.data.build import photos as photos_build
from minilib.data.build.tools import archive, deb_members
from minilib.data.images import tensor_checksum

SPLITS = ("train", "validation", "test")
SOURCES = os.environ.get("MINILIB_ASSET_SOURCES", "")


def source_folder(*sources):
    """The folder with the downloaded packages, or skip."""
    if not all((Path(SOURCES) / source.file).is_file() for source in sources):
        pytest.skip(f"MINILIB_ASSET_SOURCES names no folder with {', '.join(s.file for s in sources)}")
    return Path(SOURCES)


# mnist10k


def test_mnist_splits_are_by_rank_within_the_class():
    raw = assets.open_npz("mnist10k")
    assert raw["images"].shape == (10_000, 28, 28) and raw["images"].dtype == np.uint8
    rank, seen = [], {}
    for label in raw["labels"].tolist():
        rank.append(seen.setdefault(label, 0) % 10)
        seen[label] += 1
    assert sorted(seen) == list(range(10)) and (min(seen.values()), max(seen.values())) == (863, 1127)
    belongs = {"test": (0, 1), "validation": (2,), "train": (3, 4, 5, 6, 7, 8, 9)}
    for split in SPLITS:
        s = load("mnist10k", split)
        assert s.index.tolist() == [i for i, place in enumerate(rank) if place in belongs[split]]
        np.testing.assert_array_equal(s.y.numpy(), raw["labels"][s.index])
        np.testing.assert_allclose((s.x[:, 0].numpy() + 1) * 127.5, raw["images"][s.index], atol=1e-4)
        assert s.x.min() == -1 and s.x.max() == 1 and s.checksum == tensor_checksum(s.x, s.y)


def test_mnist_has_no_image_twice_and_its_labels_fit():
    images = assets.open_npz("mnist10k")["images"].reshape(10_000, -1)
    assert len(np.unique(images, axis=0)) == 10_000
    train, test = load("mnist10k", "train"), load("mnist10k", "test")
    centres = torch.stack([train.of_class(digit).mean(0).flatten() for digit in range(10)])
    read = torch.cdist(test.x.flatten(1), centres).argmin(1)
    assert 0.79 < (read == test.y).float().mean() < 0.85  # nearest class mean: 0.82 in the literature


def test_mnist_at_32_pixels_has_a_border_of_background():
    small, large = (load("mnist10k", "validation", size=size) for size in (28, 32))
    assert torch.equal(large.x[:, :, 2:-2, 2:-2], small.x) and torch.equal(small.y, large.y)
    rim = torch.ones(32, 32, dtype=torch.bool)
    rim[2:-2, 2:-2] = False
    assert (large.x[:, 0, rim] == -1).all()
    with pytest.raises(ValueError, match="28 x 28 pixels or 32 x 32"):
        load("mnist10k", "train", size=16)


def test_full_mnist_from_the_hub_keeps_the_official_test_part(monkeypatch):
    monkeypatch.setattr("minilib.data.mnist._from_hub.__wrapped__", None, raising=False)
    from minilib.data import mnist

    def load_dataset(repository, split):
        assert repository == "ylecun/mnist"
        n = {"train": 60, "test": 7}[split]
        levels = np.arange(n, dtype=np.uint8)
        return {
            "image": [Image.fromarray(np.full((28, 28), v)) for v in levels],
            "label": [i % 2 for i in range(n)],
        }

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    mnist._from_hub.cache_clear()
    sets = {split: load("mnist10k", split, source="hub") for split in SPLITS}
    mnist._from_hub.cache_clear()
    assert [len(sets[split]) for split in SPLITS] == [54, 6, 7]
    both = sets["train"].index.tolist() + sets["validation"].index.tolist()
    assert sorted(both) == list(range(60))
    assert sets["validation"].index.tolist() == [4, 5, 24, 25, 44, 45]
    for s in sets.values():
        assert s.source == "Hugging Face hub ylecun/mnist"
        assert torch.equal(((s.x[:, 0, 0, 0] + 1) * 127.5).round().long(), s.index)
        assert torch.equal(s.y, s.index % 2)


def test_mnist_is_what_the_package_holds():
    folder = source_folder(mnist_build.SOURCE)
    built = mnist_build.build(folder)
    assert built.data == assets.read("mnist10k") and built.credit == assets.licence_text("mnist10k")


# emoji


@pytest.fixture(scope="module")
def emoji():
    return {split: load("emoji", split) for split in SPLITS}


def test_emoji_concepts_are_held_out_in_all_styles(emoji):
    concepts = [set(s.concept.tolist()) for s in emoji.values()]
    assert sorted(sum(map(sorted, concepts), [])) == list(range(1586))
    assert [len(c) for c in concepts] == [1280, 157, 149]
    for s in emoji.values():
        assert len(s) == 3 * len(set(s.concept.tolist()))
        assert torch.equal(s.index, s.concept * 3 + s.style)
        first, *others = (s.of_style(style) for style in s.styles)
        assert all(torch.equal(s.concept[first], s.concept[other]) for other in others)
        captions = [s.captions[i] for i in first]
        assert all([s.captions[i] for i in other] == captions for other in others)
        shares = s.group.bincount(minlength=10) / len(s)
        assert (shares - emoji["train"].group.bincount(minlength=10) / len(emoji["train"])).abs().max() < 0.02


def test_emoji_variants_by_gender_direction_or_hour_are_on_one_side(emoji):
    """Checked on the names, where the split was made on the code sequences."""

    def base(name):
        name = re.sub(r"^(family|couple with heart|kiss)\b.*", r"\1", name)
        name = re.sub(r"\b(wo)?m[ae]n\b(?!’s)|\b(person|people)\b|: facing right", "", name)
        name = re.sub(r"^.*(o’clock|-thirty)$", "clock", name)
        return " ".join(name.replace(":", "").split())

    sides = {}
    for split, s in emoji.items():
        for name in s.captions:
            sides.setdefault(base(name), set()).add(split)
    assert [name for name, found in sides.items() if len(found) > 1] == []
    assert len(sides) < 1586 - 200  # the rule does bind


def test_emoji_have_white_ground_and_free_masks(emoji):
    for s in emoji.values():
        assert s.x.shape[1:] == (3, 32, 32) and s.alpha.shape[1:] == (1, 32, 32)
        assert s.x.min() >= -1 and s.x.max() <= 1 and s.alpha.min() == 0 and s.alpha.max() == 1
        outside = (s.alpha == 0).expand_as(s.x)
        assert outside.float().mean() > 0.2 and (s.x[outside] == 1).all()
        assert (s.alpha.flatten(1).mean(1) > 0.005).all()
        assert s.checksum == tensor_checksum(s.x, s.alpha)


@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("red circle", (1, 0, 0)),
        ("green heart", (0, 1, 0)),
        ("blue square", (0, 0, 1)),
        ("yellow heart", (1, 1, 0)),
        ("purple heart", (1, 0, 1)),
    ],
)
def test_emoji_captions_belong_to_their_pictures(emoji, name, colour):
    found = [(s, i) for s in emoji.values() for i, caption in enumerate(s.captions) if caption == name]
    assert len(found) == 3
    for s, i in found:
        rgb = (s.x[i] * s.alpha[i]).sum((1, 2)) / s.alpha[i].sum()
        for channel, bright in enumerate(colour):
            for other, dark in enumerate(colour):
                assert rgb[channel] > rgb[other] or bright <= dark, (s.styles[int(s.style[i])], rgb)


def test_emoji_styles_draw_the_same_concept(emoji):
    """The most similar picture of another artist is the same concept far more often than one in 149 times."""
    s = emoji["test"]
    low = F.avg_pool2d(s.x, 4).flatten(1)
    low = F.normalize(low - low.mean(0), dim=1)
    for one, other in (("noto", "twemoji"), ("noto", "fluent-3d"), ("fluent-3d", "twemoji")):
        nearest = torch.cdist(low[s.of_style(one)], low[s.of_style(other)]).argmin(1)
        assert (nearest == torch.arange(149)).float().mean() > 0.3


def test_emoji_at_16_pixels_are_scaled_with_colours_weighted_by_alpha(emoji):
    small = load("emoji", "test", size=16)
    assert small.x.shape == (447, 3, 16, 16) and small.captions == emoji["test"].captions
    arrays = assets.open_npz("emoji")
    for i in range(0, 447, 37):
        rgba = arrays[small.styles[int(small.style[i])]][:, int(small.concept[i])].transpose(1, 2, 0)
        scaled = Image.fromarray(rgba).convert("RGBa").resize((16, 16), Image.Resampling.BOX)
        premultiplied = torch.from_numpy(np.array(scaled)).permute(2, 0, 1) / 255
        assert (premultiplied[3:] - small.alpha[i]).abs().max() < 0.006
        assert ((premultiplied[:3] + 1 - premultiplied[3:]) * 2 - 1 - small.x[i]).abs().max() < 0.03


def test_emoji_words(emoji):
    s = emoji["train"]
    i = s.captions.index("grinning face")
    assert "smile" in s.tags[i] and s.groups[int(s.group[i])] == "smileys-emotion"
    assert s.subgroups[int(s.subgroup[i])] == "face-smiling"
    names = {name for each in emoji.values() for name in each.captions}
    assert len(names) == 1586
    for unwanted in ("flag:", "keycap", "skin tone"):
        assert not any(name.startswith(unwanted) or name.endswith(unwanted) for name in names), unwanted
    with pytest.raises(ValueError, match="fluent-3d"):
        s.of_style("apple")
    with pytest.raises(ValueError, match="32 x 32 pixels or 16 x 16"):
        load("emoji", size=64)


def test_photographs_stand_in_for_emoji_on_the_hub(monkeypatch):
    from minilib.data import emoji as module

    def load_dataset(repository, split):
        assert repository == "jxie/flickr8k" and split == "validation"
        pictures = [Image.new("RGB", (60, 40), (255, 0, 0)), Image.new("L", (30, 50), 0)]
        return {"image": pictures} | {f"caption_{k}": [f"a {k}", f"b {k}"] for k in range(5)}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    module._from_hub.cache_clear()
    s = load("emoji", "validation", size=16, source="hub")
    module._from_hub.cache_clear()
    assert s.x.shape == (2, 3, 16, 16) and (s.alpha == 1).all()
    assert s.x[0, :, 0, 0].tolist() == [1, -1, -1] and (s.x[1] == -1).all()
    assert s.captions == ("a 0", "b 0") and s.tags[1] == ("b 1", "b 2", "b 3", "b 4")
    assert "flickr8k" in s.source


def test_emoji_are_what_the_packages_hold():
    folder = source_folder(emoji_build.FLUENT, emoji_build.TWEMOJI, emoji_build.WORDS)
    arrays = assets.open_npz("emoji")
    rows = {row["hexcode"]: row for row in emoji_build.concepts(archive(folder, emoji_build.WORDS))}
    assert all(
        rows[str(code)]["label"] == label
        for code, label in zip(arrays["hexcode"], arrays["label"], strict=True)
    )
    assert emoji_build.splits([rows[str(code)] for code in arrays["hexcode"]]) == arrays["split"].tolist()
    prefixes = {"fluent-3d": "package/assets/1f4", "twemoji": "package/img/twitter/64/1f4"}
    for style, source in (("fluent-3d", emoji_build.FLUENT), ("twemoji", emoji_build.TWEMOJI)):
        found = emoji_build.tarball_images(archive(folder, source), prefixes[style])
        places = [i for i, code in enumerate(arrays["hexcode"]) if emoji_build.plain(str(code)) in found][
            ::40
        ]
        assert len(places) >= 4
        for i in places:
            picture = emoji_build.shrink(found[emoji_build.plain(str(arrays["hexcode"][i]))])
            np.testing.assert_array_equal(picture, arrays[style][:, i])


# photos


@pytest.fixture(scope="module")
def photos():
    return {split: load("photos", split) for split in SPLITS}


def test_photographs_are_on_one_side_and_all_credited(photos):
    everything = sum((s.names for s in photos.values()), ())
    assert [len(s) for s in photos.values()] == [17, 3, 6] and len(set(everything)) == 26
    credit = assets.licence_text("photos")
    for s in photos.values():
        for name, author, licence in zip(s.names, s.authors, s.licences, strict=True):
            assert f"| {name} | {author} | {licence} |" in credit
            assert re.match(r"CC0|CC BY|public domain|no known copyright", licence)
    assert not any("lfw" in name for name in everything)


def test_photographs_are_large_and_have_contrast(photos):
    for s in photos.values():
        for i, image in enumerate(s.images):
            assert image.shape[0] == 3 and 300 <= min(image.shape[1:]) and max(image.shape[1:]) <= 640
            assert -1 <= image.min() < image.max() <= 1 and image.std() > 0.1, s.names[i]
            assert s.levels(i) is s.levels(i)  # decoded once
    with pytest.raises(IndexError, match="17 photographs"):
        photos["train"].image(17)
    with pytest.raises(ValueError, match="leave size out"):
        load("photos", "train", size=64)


def test_patches_are_crops_and_come_again_with_the_seed(photos):
    s = photos["validation"]
    x = s.patches(12, 24, torch.Generator().manual_seed(3))
    assert torch.equal(x, s.patches(12, 24, torch.Generator().manual_seed(3))) and x.shape == (12, 3, 24, 24)
    assert not torch.equal(x, s.patches(12, 24, torch.Generator().manual_seed(4)))
    windows = [image.unfold(1, 24, 1).unfold(2, 24, 1) for image in s.images]
    for patch in x:
        places = [(w[:, :, :, 0, 0] == patch[:, None, None, 0, 0]).all(0).nonzero().tolist() for w in windows]
        assert any(
            torch.equal(w[:, i, j], patch) for w, found in zip(windows, places, strict=True) for i, j in found
        )


def tiny_photos(*shapes):
    """Photographs whose red and green say where a pixel is, and whose blue says which photograph."""

    def file(i, height, width):
        levels = np.zeros((height, width, 3), dtype=np.uint8)
        levels[..., 0], levels[..., 1] = np.mgrid[:height, :width]
        levels[..., 2] = i
        buffer = io.BytesIO()
        Image.fromarray(levels).save(buffer, "PNG")
        return buffer.getvalue()

    files = tuple(file(i, *shape) for i, shape in enumerate(shapes))
    names = tuple("abc"[: len(files)])
    return PhotoSet("tiny", "train", names, names, names, files, "", "", "")


def test_every_place_of_every_photograph_is_drawn_equally_often():
    s = tiny_photos((6, 9), (5, 4))
    x = s.patches(8000, 4, torch.Generator().manual_seed(0))
    top, left, photo = ((x[:, :, 0, 0] + 1) * 127.5).round().long().unbind(1)
    for i, (rows, columns) in enumerate(((3, 6), (2, 1))):
        counts = torch.zeros(rows, columns)
        for a, b in zip(top[photo == i].tolist(), left[photo == i].tolist(), strict=True):
            counts[a, b] += 1
        expected = 4000 / (rows * columns)
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_scaled_patches_are_averages(photos):
    s = photos["test"]
    full = s.patches(5, 64, torch.Generator().manual_seed(1))
    half = s.patches(5, 32, torch.Generator().manual_seed(1), scale=2)
    mean = full.reshape(5, 3, 32, 2, 32, 2).mean((3, 5))
    assert half.shape == (5, 3, 32, 32) and (half - mean).abs().max() < 1e-6
    grid, photo = s.grid(32, scale=2)
    assert len(grid) == len(photo) and (grid.mean() - s.grid(64)[0].mean()).abs() < 1e-6


def test_the_grid_covers_the_middle_once(photos):
    s = photos["test"]
    x, photo = s.grid(64)
    i = s.names.index("coffee")  # 400 x 600: six by nine patches, margins of 8 and 12
    cells = x[photo == i].reshape(6, 9, 3, 64, 64).permute(2, 0, 3, 1, 4).reshape(3, 384, 576)
    assert torch.equal(cells, s.image(i)[:, 8:392, 12:588])
    assert photo.bincount().tolist() == [(im.shape[1] // 64) * (im.shape[2] // 64) for im in s.images]


@pytest.mark.parametrize(
    "arguments", [{"size": 0}, {"size": 301}, {"size": 64, "scale": 5}, {"size": 8, "scale": 0}]
)
def test_patches_that_do_not_fit_are_refused(photos, arguments):
    for call in (photos["test"].grid, lambda **kwargs: photos["test"].patches(2, **kwargs)):
        with pytest.raises(ValueError, match=r"at least 300 on the short side"):
            call(**arguments)


def test_the_stereo_pair_agrees_with_its_disparity():
    pair = stereo()
    known = ~pair.disparity.isnan()
    height, width = pair.disparity.shape
    assert 0.9 < known.float().mean() < 1
    rows = torch.arange(height)[:, None].expand(height, width)

    def error(disparity):
        across = (torch.arange(width) - disparity.nan_to_num()).round().long()
        inside = known & (across >= 0) & (across < width)
        return float((pair.right[:, rows, across.clamp(0, width - 1)] - pair.left)[:, inside].abs().mean())

    right = error(pair.disparity)
    assert (
        right < 0.1 < 0.15 < min(error(-pair.disparity), error(pair.disparity + 3), error(pair.disparity * 2))
    )
    depth = pair.depth()[known]
    assert 2000 < depth.min() < depth.max() < 6000  # millimetres, in a garage


def test_sample_images_of_scikit_learn_are_re_derived():
    """The installed package has the two files that the asset was built from."""
    from sklearn.datasets import load_sample_images

    raw = load_sample_images()
    arrays = assets.open_npz("photos")
    for picture, path in zip(raw.images, raw.filenames, strict=True):
        name = Path(path).stem
        stored = np.array(Image.open(io.BytesIO(arrays[f"photo_{name}"].tobytes())))
        assert stored.shape == picture.shape and np.abs(stored.astype(int) - picture).mean() < 3


def test_photos_are_what_the_packages_hold():
    folder = source_folder(photos_build.SKIMAGE, photos_build.LOMIRI)
    arrays = assets.open_npz("photos")
    files = {p.name: p.file for p in photos_build.PHOTOS}
    with zipfile.ZipFile(archive(folder, photos_build.SKIMAGE)) as wheel:
        for key, value in photos_build.stereo(wheel).items():
            np.testing.assert_array_equal(value, arrays[key])
        picture = photos_build.scaled(wheel.read(files["coffee"]))
        np.testing.assert_array_equal(photos_build.encoded(picture, "JPEG"), arrays["photo_coffee"])
    (data,) = deb_members(archive(folder, photos_build.LOMIRI), files["brushes"]).values()
    np.testing.assert_array_equal(
        photos_build.encoded(photos_build.scaled(data), "JPEG"), arrays["photo_brushes"]
    )


# caption states


@pytest.fixture(scope="module", params=["minilm", "smollm2"])
def states(request):
    return {split: caption_states(request.param, split) for split in SPLITS}


def test_caption_states_are_aligned_with_the_emoji(states, emoji):
    for split in SPLITS:
        s, pictures = states[split], emoji[split]
        assert s.captions == tuple(pictures.captions[i] for i in pictures.of_style("noto"))
        taken, mask = s.of(pictures.concept)
        assert taken.shape == (len(pictures), *s.states.shape[1:]) and mask.dtype == torch.bool
        assert torch.equal(taken[::3], s.states) and torch.equal(taken[2::3], s.states)
        assert s.checksum == tensor_checksum(s.states, s.mask)
    with pytest.raises(ValueError, match="not in the test split"):
        states["test"].of(emoji["train"].concept[:3])


def test_caption_states_are_padded_after_the_tokens(states):
    for s in states.values():
        lengths = s.mask.sum(1)
        assert s.states.shape[1:] == states["train"].states.shape[1:] and s.states.shape[2] == 128
        assert torch.equal(s.mask, torch.arange(s.mask.shape[1]) < lengths[:, None])
        assert (s.states[~s.mask] == 0).all() and (s.states[s.mask].abs().amax(1) > 0).all()
        assert s.null.shape == (1, *s.states.shape[1:]) and s.null_mask.shape == (1, s.mask.shape[1])
        assert 1 <= s.null_mask.sum() < lengths.float().mean()
        assert (s.null[~s.null_mask] == 0).all() and (s.null[s.null_mask].abs().amax(1) > 0).all()
        words = torch.tensor([len(name.split()) for name in s.captions])
        assert (lengths > words).all() and torch.corrcoef(torch.stack([lengths, words]).float())[0, 1] > 0.6


def test_caption_states_have_unit_scale_and_decreasing_components(states):
    s = states["train"]
    tokens = s.states[:, 1:][s.mask[:, 1:]]
    assert abs((tokens**2).mean() - 1) < 2e-3 and tokens.mean(0).abs().max() < 2e-2
    variance = tokens.var(0)
    assert (variance[1:] <= variance[:-1] * 1.001).all()
    item = assets.entry(s.name)
    assert 0.6 < item["variance_kept_test"] <= item["variance_kept_train"] < 1
    gram = torch.from_numpy(assets.open_npz(s.name)["basis"]).double()
    assert (gram.T @ gram - torch.eye(128)).abs().max() < 5e-3


def test_caption_states_know_what_a_name_means(states, emoji):
    """The nearest training name by mean state is of the same group far more often than by chance."""

    def pooled(s):
        return F.normalize(
            (s.states * s.mask[..., None])[:, 1:].sum(1) / (s.mask.sum(1, keepdim=True) - 1), dim=1
        )

    group = {split: emoji[split].group[::3] for split in SPLITS}
    nearest = (pooled(states["test"]) @ pooled(states["train"]).T).argmax(1)
    right = (group["train"][nearest] == group["test"]).float().mean()
    assert (
        right > {"minilm_states": 0.7, "smollm2_states": 0.42}[states["test"].name]
    )  # the largest group has 0.22


def test_a_decoder_s_states_depend_on_what_came_before_alone():
    s = caption_states("smollm2", "train")
    assert (s.states[:, 0] - s.null[:, 0]).abs().max() < 1e-2 and s.null_mask.sum() == 1
    one, other = (s.captions.index(f"woman {word}") for word in ("running", "walking"))
    assert (s.states[one, :2] - s.states[other, :2]).abs().max() < 2e-2
    assert (s.states[one, 2] - s.states[other, 2]).abs().max() > 0.5


def test_an_encoder_s_states_depend_on_the_whole_name():
    s = caption_states("minilm", "train")
    one, other = (s.captions.index(f"woman {word}") for word in ("running", "walking"))
    assert (s.states[one, 1] - s.states[other, 1]).abs().max() > 0.1 and s.null_mask.sum() == 2


def test_unknown_caption_states_are_refused(monkeypatch):
    with pytest.raises(KeyError, match="minilm, smollm2"):
        caption_states("clip")
    with pytest.raises(ValueError, match="validation"):
        caption_states("minilm", "dev")
    from minilib.data.text_states import _vendored

    stale = assets.entry("minilm_states") | {"emoji_sha256": "0" * 64}
    monkeypatch.setattr(assets, "entry", lambda name, root=None: stale)
    with pytest.raises(RuntimeError, match="another emoji.npz"):
        _vendored.__wrapped__("minilm", "train")
