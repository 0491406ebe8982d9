"""Reading written words back: by a real OCR network, or by comparing with every candidate drawn by the generator itself.

The network is PP-OCRv4 in PyPI's ``rapidocr-onnxruntime``, which knows nothing of our generator. The comparison is
exact and needs no package, but must be told the looks of the word (face, size, place), as the caption gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minilib.data.glyphs.fonts import ALPHABET, FACES, MONOSPACED
from minilib.data.glyphs.render import render_layers, templates
from minilib.data.glyphs.words import GROUND_RGB, INK_RGB, Words, spell

PACKAGE = "rapidocr-onnxruntime"
#: From this size of the face on, in pixels, the network reads at least 98 % of the words of ``glyphs`` in any face and
#: colours. 300 words a size, enlarged four times: 53 % at 7 pixels, 73 at 8, 88 at 9, 96 at 10, 98 at 11; over 99 from 12 on.
LEGIBLE_EM = 12.0
#: Pixels of ground left around a box that is cut out for the network, as a share of the box's height.
BORDER = 0.25


class ReaderMissing(ImportError):
    """The OCR package is not installed; the message says how to get it."""


def read_words(
    images: Float[Tensor, "n 3 h w"], boxes: Float[Tensor, "_ 4"] | None = None, upscale: int = 4
) -> list[str]:
    """What the OCR network reads in each picture: one line, lower case, without spaces; "" where it sees none.

    Args:
        images: pictures in [-1, 1] with one line of text.
        boxes: (top, left, bottom, right) in pixels of where to read (``Layers.word_box``); a rim is added. None: everywhere.
        upscale: bicubic enlargement before reading; the network wants letters of 30 pixels and more.

    Raises:
        ReaderMissing: the package is not installed.
        ValueError: ``upscale`` below 1, or another number of boxes than of pictures.
    """
    if upscale < 1:
        raise ValueError(f"upscale is at least 1; got {upscale}")
    if boxes is not None and len(boxes) != len(images):
        raise ValueError(f"need one box a picture; got {len(boxes)} boxes and {len(images)} pictures")
    reader = _reader()
    out = []
    for i, image in enumerate(images):
        part = image if boxes is None else _cut(image, boxes[i])
        large = F.interpolate(part[None], scale_factor=upscale, mode="bicubic", align_corners=False)[0]
        levels = ((large + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        bgr = levels.flip(0).permute(1, 2, 0).contiguous().numpy()
        found, _ = reader(bgr, use_det=False, use_cls=False)
        out.append("".join(found[0][0].split()).lower() if found else "")
    return out


def _cut(image: Tensor, box: Tensor) -> Tensor:
    top, left, bottom, right = box.tolist()
    rim = BORDER * (bottom - top) + 1.0
    rows, columns = image.shape[1:]
    return image[
        :,
        max(0, int(top - rim)) : min(rows, int(bottom + rim) + 1),
        max(0, int(left - rim)) : min(columns, int(right + rim) + 1),
    ]


@lru_cache(maxsize=1)
def _reader() -> Callable[..., Any]:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ReaderMissing(
            f"reading words needs the package {PACKAGE} ({error}): pip install {PACKAGE}; "
            "minilib.metrics.ocr.read_by_template reads without it"
        ) from error
    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def read_by_template(
    images: Float[Tensor, "n 3 h w"], words: Words, candidates: Sequence[str], batch: int = 256
) -> list[str]:
    """The candidate whose drawing, in the looks of ``words``, is nearest to each picture in squared error.

    Args:
        images: pictures in [-1, 1].
        words: the looks (face, size, place, ink, ground) of each picture; their letters are not used.
        candidates: the words it may be.
        batch: candidates drawn at once.

    Raises:
        ValueError: no candidate, one that cannot be spelt, or another number of pictures than of words.
    """
    _match(images, words)
    if not candidates:
        raise ValueError("no candidate to compare with; pass the words it may be")
    letters, (height, width) = spell(candidates), images.shape[2:]
    seen = ink_of(images, words)
    out = []
    for i in range(len(images)):
        look, distance = words[i : i + 1], []
        for part in letters.split(batch):
            drawn = Words(
                part,
                *(getattr(look, name).expand(len(part)) for name in ("face", "ink", "ground", "size")),
                look.place.expand(len(part), 2),
            )
            distance.append((render_layers(drawn, height, width).ink - seen[i]).square().flatten(1).sum(1))
        out.append(candidates[int(torch.cat(distance).argmin())])
    return out


def read_letters(images: Float[Tensor, "n 3 h w"], words: Words) -> list[str]:
    """The nearest letter in every slot on its own, so that any string can be read; monospaced faces only.

    Args:
        images: pictures in [-1, 1].
        words: the looks, and the number of letters, of each picture.

    Raises:
        ValueError: a face whose letters differ in width, or another number of pictures than of words.
    """
    _match(images, words)
    names = {FACES[i] for i in words.face.tolist()}
    if not names <= set(MONOSPACED):
        wrong = sorted(names - set(MONOSPACED))[0]
        raise ValueError(
            f"letters of {wrong!r} differ in width, so their places depend on the word: use read_by_template; "
            f"monospaced faces: {', '.join(MONOSPACED)}"
        )
    seen, (height, width) = ink_of(images, words), images.shape[2:]
    out = []
    for i in range(len(images)):
        # The other letters add the same to every candidate's distance: they lie where its drawing is empty.
        error = (templates(words[i : i + 1], height, width)[0] - seen[i]).square().sum((2, 3))
        nearest = error.argmin(1)
        count = int(words.present[i].sum())
        out.append("".join(ALPHABET[k] for k in nearest[:count].tolist()))
    return out


def ink_of(images: Float[Tensor, "n 3 h w"], words: Words) -> Float[Tensor, "n 1 h w"]:
    """How much of the ink is in each pixel: 0 the ground's colour, 1 the ink's, by projection on the line between them."""
    ink, ground = torch.tensor(INK_RGB)[words.ink], torch.tensor(GROUND_RGB)[words.ground]
    line = (ink - ground)[..., None, None]
    return (((images + 1) / 2 - ground[..., None, None]) * line).sum(1, keepdim=True) / line.square().sum(
        1, keepdim=True
    )


def _match(images: Tensor, words: Words) -> None:
    if len(images) != len(words):
        raise ValueError(
            f"need the looks of every picture; got {len(images)} pictures and {len(words)} words"
        )


def levenshtein(a: str, b: str) -> int:
    """Least insertions, deletions and replacements of letters that turn ``a`` into ``b``.

    >>> levenshtein("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        previous, row = row, [i]
        for j, right in enumerate(b, start=1):
            row.append(min(row[-1] + 1, previous[j] + 1, previous[j - 1] + (left != right)))
    return row[-1]


def letter_f1(read: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of letters, each counted as often as it occurs; their order does not matter.

    >>> letter_f1("sun", "sung"), letter_f1("", "a")
    (0.8571428571428571, 0.0)
    """
    common = sum(min(read.count(letter), wanted.count(letter)) for letter in set(read))
    return 2 * common / (len(read) + len(wanted)) if common else 0.0
