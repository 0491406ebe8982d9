"""`glyphs`: what is written is what was asked for, read back by a real OCR and by comparison with every candidate."""

import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from minilib.data import glyphs, load, shapes
from minilib.data.glyphs import (
    ALPHABET,
    FACES,
    MONOSPACED,
    WORDS,
    Words,
    layout,
    render,
    render_layers,
    sample_words,
)
from minilib.data.glyphs.fonts import EM, FILES, atlas
from minilib.data.glyphs.words import GROUND_RGB, INK_RGB, MIN_CONTRAST
from minilib.metrics import ocr

CANVASES = [(16, 48), (32, 96), (64, 64), (17, 53), (40, 31)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def written(text, face="sans", size=1.0, place=(0.5, 0.5), ink="white", ground="black"):
    index = [torch.tensor([names.index(name)]) for names, name in ((FACES, face), (glyphs.INKS, ink))]
    return Words(
        glyphs.spell([text]),
        *index,
        torch.tensor([glyphs.GROUNDS.index(ground)]),
        torch.tensor([size]),
        torch.tensor([place]),
    )


def test_a_seed_is_a_set_of_words():
    a, b = (sample_words(20, generator(3)) for _ in "ab")
    assert torch.equal(render(a), render(b)) and glyphs.captions(a) == glyphs.captions(b)
    assert not torch.equal(render(a), render(sample_words(20, generator(4))))
    assert torch.equal(render(a[5:7], 16, 48), render(a, 16, 48)[5:7])


def test_the_vocabulary_and_its_splits():
    assert len(set(WORDS)) == len(WORDS) >= 300 and all(2 <= len(w) <= 6 and w.isalpha() for w in WORDS)
    parts = {s: {w for w in WORDS if glyphs.split_of(w) == s} for s in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(WORDS)
    assert 25 <= len(parts["test"]) <= 60 and 25 <= len(parts["validation"]) <= 60
    assert set("".join(parts["train"])) == set(ALPHABET)
    for split, words in parts.items():
        assert set(sample_words(200, generator(), split=split).texts) <= words
        strings = sample_words(100, generator(), split=split, random_letters=(3, 5)).texts
        assert {glyphs.split_of(s) for s in strings} == {split} and {len(s) for s in strings} == {3, 4, 5}
    # The split of a word never changes.
    fixed = {"sun": "train", "rain": "validation", "zero": "test", "ice": "train"}
    assert {word: glyphs.split_of(word) for word in fixed} == fixed


def test_every_look_is_equally_likely_and_legible():
    words = sample_words(6000, generator())
    assert (words.face.bincount(minlength=len(FACES))[: len(FILES)] - 6000 / 13).abs().max() < 100
    pairs = set(zip(words.ink.tolist(), words.ground.tolist(), strict=True))
    assert pairs == set(glyphs.PAIRS) and len(pairs) >= 20
    for ink, ground in pairs:
        lightness = []
        for rgb in (INK_RGB[ink], GROUND_RGB[ground]):
            linear = np.where(
                np.array(rgb) <= 0.04045, np.array(rgb) / 12.92, ((np.array(rgb) + 0.055) / 1.055) ** 2.4
            )
            lightness.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
        assert max(lightness) / min(lightness) >= MIN_CONTRAST
    assert (words.place.mean(0) - 0.5).abs().max() < 0.02 and words.place.amax() > 0.99
    small = sample_words(
        500, generator(), sizes=["small"], faces=["mono"], alphabet="ab", random_letters=(2, 2)
    )
    assert small.size.max() <= 0.65 and set("".join(small.texts)) == {"a", "b"}
    assert set(small.face.tolist()) == {FACES.index("mono")}


def test_grammar_round_trip():
    words = sample_words(200, generator(), faces=FACES, random_letters=(1, 6))
    sentences = glyphs.captions(words)
    again = glyphs.parse(sentences)
    assert glyphs.captions(again) == sentences and again.texts == words.texts
    for name in ("face", "ink", "ground"):
        assert torch.equal(getattr(again, name), getattr(words, name))
    assert (again.size - words.size).abs().max() <= 0.051 and (
        again.place - words.place
    ).abs().max() <= 1 / 6 + 1e-6
    tokens = glyphs.tokens(words)
    assert [glyphs.decode(row) for row in tokens] == sentences
    assert torch.equal(glyphs.letter_mask(tokens).sum(1), words.present.sum(1))
    assert torch.equal((tokens != 0).sum(1), words.present.sum(1) + 10)
    # Another word of the same length changes the letters' tokens alone.
    other = words.rewritten(["".join(ALPHABET[(ALPHABET.index(c) + 1) % 26] for c in t) for t in words.texts])
    assert torch.equal(glyphs.tokens(other) != tokens, glyphs.letter_mask(tokens))
    assert glyphs.null_tokens(2, 5).tolist() == [[1, 0, 0, 0, 0]] * 2
    assert glyphs.decode(glyphs.null_tokens(1)[0]) == "" and glyphs.tokens(words[:0]).shape == (0, 16)


def test_faces_are_what_they_are_called():
    from matplotlib import get_data_path
    from PIL import ImageFont

    called = {
        face: ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{file}", 12).getname()
        for face, file in FILES.items()
    }
    assert called == {
        "sans": ("DejaVu Sans", "Book"),
        "sans-bold": ("DejaVu Sans", "Bold"),
        "sans-oblique": ("DejaVu Sans", "Oblique"),
        "serif": ("DejaVu Serif", "Book"),
        "serif-bold": ("DejaVu Serif", "Bold"),
        "mono": ("DejaVu Sans Mono", "Book"),
        "mono-bold": ("DejaVu Sans Mono", "Bold"),
        "stix": ("STIXGeneral", "Regular"),
        "stix-bold": ("STIXGeneral", "Bold"),
        "roman": ("cmr10", "Regular"),
        "roman-bold": ("cmb10", "Regular"),
        "gothic": ("cmss10", "Regular"),
        "typewriter": ("cmtt10", "Regular"),
    }


@lru_cache
def outline_area(face, letter):
    """The area of a letter in square ems, from the font's outlines, drawn by nobody."""
    from pathlib import Path

    from matplotlib import get_data_path
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(fname=str(Path(get_data_path()) / "fonts" / "ttf" / FILES[face]))
    area = 0.0
    for x, y in (p.T for p in TextPath((0, 0), letter, size=100, prop=font).to_polygons()):
        area += float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2  # holes run the other way
    return abs(area) / 1e4


@pytest.mark.parametrize("face", ["sans", "serif-bold", "mono", "stix", "roman", "typewriter"])
def test_letters_are_those_of_the_fonts(face):
    maps = atlas().maps[FACES.index(face)]
    for index, letter in enumerate(ALPHABET):
        assert float(maps[index].sum()) / EM**2 == pytest.approx(outline_area(face, letter), rel=0.05), letter
    advance = atlas().advance[FACES.index(face)]
    assert bool((advance == advance[0]).all()) == (face in MONOSPACED)


@pytest.mark.parametrize(("height", "width"), CANVASES)
def test_pictures_agree_with_a_slow_renderer(height, width):
    """Each pixel is the mean of 12 x 12 point samples of the letters' maps, one letter at a time."""
    words, fine = sample_words(6, generator(5), faces=FACES), 12
    where, seen = layout(words, height, width), render_layers(words, height, width)
    y = ((np.arange(height * fine) + 0.5) / fine)[:, None]
    x = ((np.arange(width * fine) + 0.5) / fine)[None]
    for i in range(len(words)):
        total = np.zeros((height, width))
        for k, letter in enumerate(words.texts[i]):
            face, em = int(words.face[i]), float(where.em[i])
            maps = atlas().maps[face, ALPHABET.index(letter)].numpy()
            row = np.floor((y - float(where.top[i])) / em * EM).astype(int)
            start = float(where.pen[i, k]) - float(atlas().overhang[face, 0]) * em
            column = np.floor((x - start) / em * EM).astype(int)
            inside = (row >= 0) & (row < maps.shape[0]) & (column >= 0) & (column < maps.shape[1])
            hit = np.where(inside, maps[row.clip(0, maps.shape[0] - 1), column.clip(0, maps.shape[1] - 1)], 0)
            mask = hit.reshape(height, fine, width, fine).mean((1, 3))
            assert (
                abs(seen.masks[i, k].numpy() - mask).max() < 0.12
                and abs(seen.masks[i, k].numpy() - mask).mean() < 2e-3
            )
            total += mask
        ink = np.array(INK_RGB[words.ink[i]])[:, None, None]
        ground = np.array(GROUND_RGB[words.ground[i]])[:, None, None]
        expected = ground + total.clip(0, 1) * (ink - ground)
        assert abs((seen.image[i].numpy() + 1) / 2 - expected).max() < 0.12


@pytest.mark.parametrize(("height", "width"), CANVASES)
def test_layers_agree_with_each_other(height, width):
    words = sample_words(60, generator(6), faces=FACES)
    if width / height < 2:
        words = sample_words(60, generator(6), faces=FACES, random_letters=(1, 5))
    seen = render_layers(words, height, width)
    assert seen.image.shape == (60, 3, height, width) and seen.image.abs().max() <= 1
    area = (
        atlas().maps.sum((2, 3))[words.face[:, None], words.letters.clamp(min=0)]
        * (seen.em[:, None] / EM) ** 2
    )
    there = words.present
    assert torch.allclose(seen.masks.sum((2, 3))[there], area[there], rtol=1e-3)  # nothing is cut off
    assert seen.masks[~there].sum() == 0 and seen.boxes[~there].isnan().all()
    rows, columns = torch.arange(height), torch.arange(width)
    for i, k in there.nonzero().tolist():
        top, left, bottom, right = seen.boxes[i, k].tolist()
        on = seen.masks[i, k] > 1e-6
        assert 0 <= top < bottom <= height + 1e-3 and 0 <= left < right <= width + 1e-3
        assert not on[(rows + 1 <= top - 1e-3) | (rows >= bottom + 1e-3)].any()
        assert not on[:, (columns + 1 <= left - 1e-3) | (columns >= right + 1e-3)].any()
        assert on[int(top + 1e-3)].any() and on[:, int(left + 1e-3)].any()
    word = seen.word_box
    assert torch.allclose(word[:, :2], seen.boxes.nan_to_num(nan=9e9)[..., :2].amin(1))
    assert torch.allclose(word[:, 2:], seen.boxes.nan_to_num(nan=-9e9)[..., 2:].amax(1))
    assert (ocr.ink_of(seen.image, words) - seen.ink).abs().max() < 1e-5


def test_size_and_place_by_hand():
    large, small = written("hand"), written("hand", size=0.5)
    a, b = layout(large, 32, 96), layout(small, 32, 96)
    line = atlas().line[0]
    assert float(a.em * line) == pytest.approx(30.0) and float(b.em) == pytest.approx(float(a.em) / 2)
    assert float(layout(written("hand", size=0.5, place=(0.0, 0.0)), 32, 96).top) == pytest.approx(1.0)
    assert float(layout(written("hand", size=0.5, place=(1.0, 0.0)), 32, 96).top) == pytest.approx(31 - 15.0)
    wide = layout(written("mmmmmm"), 32, 32)  # now the width is what limits
    advance, over = atlas().advance[0, ALPHABET.index("m")], atlas().overhang[0].sum()
    assert float(wide.em) == pytest.approx(30 / float(6 * advance + over), rel=1e-5)
    left, right = (layout(written("on", size=0.5, place=(0.5, p)), 32, 96).pen[0, 0] for p in (0.0, 1.0))
    width = float(b.em) * float(atlas().advance[0, [14, 13]].sum() + over)
    assert float(right - left) == pytest.approx(96 - 2 - width, rel=1e-4)


def test_the_pixel_face_is_crisp():
    words = sample_words(80, generator(7), faces=["pixel"], random_letters=(2, 4))
    seen = render_layers(words, 16, 16)
    assert ((seen.ink < 1e-5) | (seen.ink > 1 - 1e-5)).all()
    assert set((seen.em / 6).round().int().tolist()) == {1, 2} and torch.equal(seen.em % 6, torch.zeros(80))
    j = (
        render_layers(written("j", "pixel", place=(0.0, 0.0), size=0.5), 5, 3)
        .ink[0, 0]
        .round()
        .int()
        .tolist()
    )
    assert j == [[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 1], [0, 1, 0]]
    bits = atlas().maps[FACES.index("pixel")].flatten(1)
    different = (bits[:, None] != bits[None]).sum(2) / 100
    assert different[~torch.eye(26, dtype=torch.bool)].min() >= 1
    with pytest.raises(ValueError, match="too small to write 'abcde'"):
        render(written("abcde", "pixel"), 16, 16)


def test_writing_on_a_picture():
    words = sample_words(6, generator(8))
    scene = shapes.render(shapes.sample_scenes(6, generator()), 32)
    seen = render_layers(words, 32, 32, background=scene)
    plain = seen.ink.expand_as(scene) == 0
    assert torch.equal(seen.image[plain], scene[plain])
    colour = 2 * torch.tensor(INK_RGB)[words.ink][..., None, None] - 1
    assert torch.allclose(seen.image, scene * (1 - seen.ink) + colour * seen.ink, atol=1e-6)
    with pytest.raises(ValueError, match="6 backgrounds of 3 x 32 x 16"):
        render_layers(words, 32, 16, background=scene)


@pytest.mark.parametrize(("height", "width", "noise"), [(32, 32, 0.1), (32, 96, 0.3), (16, 48, 0.2)])
def test_words_are_read_by_comparison(height, width, noise):
    words = sample_words(50, generator(9), split="test")
    candidates = [w for w in WORDS if glyphs.split_of(w) != "train"]
    image = render(words, height, width)
    image = image + noise * torch.randn(image.shape, generator=generator())
    read = ocr.read_by_template(image, words, candidates)
    assert sum(a == b for a, b in zip(read, words.texts, strict=True)) >= 49
    # The letters of `words` are not used.
    blind = words.rewritten(["zz"] * len(words))
    assert ocr.read_by_template(image[:10], blind[:10], candidates) == read[:10]


@pytest.mark.parametrize(
    ("face", "size"), [("pixel", (16, 16)), ("mono", (16, 32)), ("typewriter", (32, 64))]
)
def test_any_string_is_read_letter_by_letter(face, size):
    words = sample_words(60, generator(10), faces=[face], random_letters=(2, 4), sizes=["large"])
    image = render(words, *size)
    image = image + 0.15 * torch.randn(image.shape, generator=generator())
    read = ocr.read_letters(image, words.rewritten(["a" * len(t) for t in words.texts]))
    right = sum(a == b for r, t in zip(read, words.texts, strict=True) for a, b in zip(r, t, strict=True))
    assert right / int(words.present.sum()) >= 0.98
    assert [len(r) for r in read] == [len(t) for t in words.texts]


def test_the_ocr_network_reads_the_words():
    """Real text recognition on words at least as large as is said to be legible."""
    pytest.importorskip(
        "rapidocr_onnxruntime",
        reason="the OCR package (rapidocr-onnxruntime) or the system's libGL, which OpenCV loads, is missing",
        exc_type=ImportError,
    )
    words = sample_words(60, generator(11))
    large = layout(replace(words, size=torch.ones(60)), 32, 96).em
    # A third exactly at the limit, the rest as drawn, but not below it.
    share = torch.maximum(words.size, ocr.LEGIBLE_EM / large)
    share[:20] = ocr.LEGIBLE_EM / large[:20]
    words = replace(words, size=share)
    seen = render_layers(words, 32, 96)
    assert float(seen.em.min()) == pytest.approx(ocr.LEGIBLE_EM, rel=1e-4)
    read = ocr.read_words(seen.image, seen.word_box)
    wrong = [(a, b) for a, b in zip(read, words.texts, strict=True) if a != b]
    assert len(wrong) <= 1, wrong


def test_what_the_network_is_given(monkeypatch):
    """Four times as large, blue first, levels 0 to 255, cut to the box; its answer without spaces, in lower case."""
    given = []

    def reader(picture, use_det, use_cls):
        given.append(picture)
        return ([["Su N\u3000", 0.9]], None) if len(given) == 1 else (None, None)

    monkeypatch.setattr(ocr, "_reader", lambda: reader)
    image = (2 * torch.tensor([1.0, 0.5, 0.0]) - 1)[None, :, None, None].expand(2, 3, 20, 40)
    boxes = torch.tensor([[4.0, 10.0, 12.0, 30.0], [0.0, 0.0, 20.0, 40.0]])
    assert ocr.read_words(image, boxes) == ["sun", ""]
    assert given[0].shape == (4 * (16 - 1), 4 * (34 - 7), 3) and given[1].shape == (80, 160, 3)
    assert given[0].dtype == np.uint8 and given[0][5, 5].tolist() == [0, 128, 255]


def test_without_the_network(monkeypatch):
    ocr._reader.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ocr.ReaderMissing, match="pip install rapidocr-onnxruntime"):
        ocr.read_words(render(written("sun")))
    ocr._reader.cache_clear()


def test_distances_of_strings():
    @lru_cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in zip(WORDS[:60], WORDS[60:120], strict=True):
        assert ocr.levenshtein(a, b) == slow(a, b) == ocr.levenshtein(b, a)
    assert ocr.levenshtein("", "abc") == 3 and ocr.levenshtein("abc", "abc") == 0
    assert ocr.letter_f1("abc", "cab") == 1.0 and ocr.letter_f1("aab", "abb") == pytest.approx(2 / 3)
    assert ocr.letter_f1("", "") == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_words(2, generator(), split="dev"), "'dev'"),
        (lambda: sample_words(2, generator(), faces=["arial"]), "'arial'"),
        (lambda: sample_words(2, generator(), sizes=[]), "no size"),
        (lambda: sample_words(2, generator(), random_letters=(0, 3)), "1 to 6"),
        (lambda: sample_words(2, generator(), random_letters=(3, 7)), "1 to 6"),
        (lambda: sample_words(2, generator(), random_letters=(2, 2), alphabet=""), "empty"),
        (
            lambda: sample_words(2, generator(), random_letters=(1, 1), alphabet="a", split=ONE_LETTER),
            "no string",
        ),
        (lambda: sample_words(2, generator(), vocabulary=["sun"], split="test"), "none of the 1 words"),
        (lambda: glyphs.spell(["Sun"]), "'Sun'"),
        (lambda: glyphs.spell(["letters"]), "'letters'"),
        (lambda: glyphs.spell([""]), "''"),
        (lambda: glyphs.parse(["large red serif top left on black sun"]), "expected 'large"),
        (lambda: glyphs.parse(['large red sherif top left on black "sun"']), "sherif"),
        (lambda: glyphs.tokens(written("sun"), 12), "up to 13 tokens"),
        (lambda: render(written("yellow"), 8, 8), "too small to write 'yellow'"),
        (lambda: written("sun").rewritten(["a", "b"]), "one text for each of 1"),
        (lambda: ocr.read_by_template(render(written("sun")), written("sun"), []), "no candidate"),
        (lambda: ocr.read_by_template(render(written("sun")), written("sun")[:0], ["a"]), "1 pictures and 0"),
        (lambda: ocr.read_letters(render(written("sun")), written("sun")), "'sans' differ in width"),
        (lambda: ocr.read_words(render(written("sun")), upscale=0), "at least 1"),
        (lambda: ocr.read_words(render(written("sun")), torch.zeros(2, 4)), "2 boxes and 1"),
    ],
)
def test_bad_requests_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ONE_LETTER = next(s for s in ("test", "validation", "train") if s != glyphs.split_of("a"))


def test_missing_fonts_are_named(monkeypatch, tmp_path):
    atlas.cache_clear()
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="comes with matplotlib"):
        atlas()
    monkeypatch.undo()
    assert len(atlas().maps) == len(FACES)


@pytest.mark.parametrize(("name", "size", "shape"), [("glyphs", 64, (64, 64)), ("glyphs-wide", 16, (16, 48))])
def test_as_a_data_set(name, size, shape):
    sets = {split: load(name, split, size=size) for split in ("validation", "test")}
    test = sets["test"]
    assert len(test) == 1000 and test.x.shape == (1000, 3, *shape) and test.tokens.shape == (1000, 16)
    assert test.captions == tuple(glyphs.captions(test.words)) and "generated" in test.source
    for split, s in sets.items():
        assert {glyphs.split_of(t) for t in s.words.texts} == {split}
    assert "STIX" in test.licence and test.checksum != sets["validation"].checksum
    assert torch.equal(test.x[:20], render(test.words[:20], *shape))
    with pytest.raises(ValueError, match="size=24"):
        load(name, "test", size=24)
    assert render(sample_words(0, generator())).shape == (0, 3, 32, 32)
