"""From words to pictures, on any canvas, with the exact masks and boxes of the letters.

A pixel's coverage is the exact integral of the letter's map over the pixel's square: rows and columns of the map are
weighted by how much of them lies in the pixel. So a letter can stand anywhere, at any size, between the pixels too,
and no hinting moves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minilib.data.glyphs.fonts import ALPHABET, EM, FACES, PIXEL, PIXEL_EM, atlas
from minilib.data.glyphs.words import GROUND_RGB, INK_RGB, Words

#: Least pixels between a line and the rim of the canvas.
MARGIN = 1.0
#: Letters drawn at once: bounds the memory.
CHUNK = 512


@dataclass(frozen=True)
class Layout:
    """Where the letters stand, in pixels: ``em`` the size of the face, ``top`` of the line, ``pen`` each letter's pen place."""

    em: Float[Tensor, " n"]
    top: Float[Tensor, " n"]
    pen: Float[Tensor, "n l"]


@dataclass(frozen=True)
class Layers:
    """Everything that is exactly known about rendered words.

    ``image`` in [-1, 1]; ``ink`` coverage of all letters, ``masks`` of each, in [0, 1]; ``boxes`` (top, left, bottom, right)
    of each letter's ink and ``word_box`` of all, in pixels, real-valued, NaN for empty slots; ``em`` the face's size in pixels.
    """

    image: Float[Tensor, "n 3 h w"]
    ink: Float[Tensor, "n 1 h w"]
    masks: Float[Tensor, "n l h w"]
    boxes: Float[Tensor, "n l 4"]
    word_box: Float[Tensor, "n 4"]
    em: Float[Tensor, " n"]


def render(words: Words, height: int = 32, width: int | None = None) -> Float[Tensor, "n 3 h w"]:
    """Pictures of the words in [-1, 1].

    Args:
        words: what to draw.
        height: canvas height in pixels.
        width: canvas width; as the height by default.

    Raises:
        ValueError: a canvas too small for a word (the pixel face needs 4 pixels a letter, outline faces 3 of an em).

    >>> from minilib.data.glyphs.words import sample_words
    >>> render(sample_words(2, torch.Generator().manual_seed(0)), 16, 48).shape
    torch.Size([2, 3, 16, 48])
    """
    return render_layers(words, height, width).image


def render_layers(
    words: Words,
    height: int = 32,
    width: int | None = None,
    background: Float[Tensor, "n 3 h w"] | None = None,
) -> Layers:
    """Pictures with their masks and boxes; arguments as in :func:`render`.

    Args:
        background: pictures in [-1, 1] to write on, instead of the plain ground.

    Raises:
        ValueError: a canvas too small, or a background of another size.
    """
    width = height if width is None else width
    if background is not None and background.shape != (len(words), 3, height, width):
        raise ValueError(
            f"{len(words)} backgrounds of 3 x {height} x {width} expected; got {tuple(background.shape)}"
        )
    where = layout(words, height, width)
    masks = torch.zeros(*words.letters.shape, height, width)
    n, slot = words.present.nonzero(as_tuple=True)
    for part in torch.arange(len(n)).split(CHUNK):
        i, k = n[part], slot[part]
        masks[i, k] = coverage(
            words.face[i], words.letters[i, k], where.em[i], where.top[i], where.pen[i, k], height, width
        )
    ink = masks.sum(1, keepdim=True).clamp(max=1.0)
    colour = 2 * torch.tensor(INK_RGB)[words.ink][..., None, None] - 1
    if background is None:
        background = 2 * torch.tensor(GROUND_RGB)[words.ground][..., None, None] - 1
    boxes = _boxes(words, where)
    filled = boxes.nan_to_num(nan=torch.inf)
    far = boxes.nan_to_num(nan=-torch.inf)
    word_box = torch.cat([filled[..., :2].amin(1), far[..., 2:].amax(1)], dim=1)
    return Layers(background + ink * (colour - background), ink, masks, boxes, word_box, where.em)


def layout(words: Words, height: int, width: int) -> Layout:
    """Where the letters stand on a canvas; arguments and errors as of :func:`render`.

    The line is as high as the face's highest and lowest letters, and as wide as its advances and overhangs, whatever the
    letters are. In a monospaced face it therefore depends on their number alone.
    """
    letters = atlas()
    steps = letters.advance[words.face[:, None], words.letters.clamp(min=0)] * words.present
    before, after = letters.overhang[words.face].unbind(1)
    wide, high = steps.sum(1) + before + after, letters.line[words.face]
    most = torch.minimum((height - 2 * MARGIN) / high, (width - 2 * MARGIN) / wide)
    pixel = words.face == FACES.index(PIXEL)
    # The pixel face has no margin: at its own size, a line is 5 pixels high and 4 a letter wide, less the last gap.
    gap = 1.0 / PIXEL_EM
    whole = torch.minimum(height / high, width / (wide - gap)) * words.size / PIXEL_EM
    em = torch.where(pixel, PIXEL_EM * (whole + 1e-4).floor().clamp(min=1.0), most * words.size)
    room_down = height - em * high
    room_right = width - em * torch.where(pixel, wide - gap, wide)
    least = torch.where(pixel, 0.0, 3.0)
    bad = (room_down < -1e-3) | (room_right < -1e-3) | (em < least)
    if bad.any():
        text = words[bad].texts[0]
        raise ValueError(
            f"a canvas of {height} x {width} pixels is too small to write {text!r}: make it larger"
        )
    inset = torch.where(pixel, 0.0, MARGIN)
    top = inset + (room_down - 2 * inset).clamp(min=0.0) * words.place[:, 0]
    left = inset + (room_right - 2 * inset).clamp(min=0.0) * words.place[:, 1]
    top, left = (torch.where(pixel, side.round(), side) for side in (top, left))
    pen = left[:, None] + em[:, None] * (before[:, None] + steps.cumsum(1) - steps)
    return Layout(em, top, pen)


def coverage(
    face: Tensor, letter: Tensor, em: Tensor, top: Tensor, pen: Tensor, height: int, width: int
) -> Float[Tensor, "m h w"]:
    """The share of every pixel that each of ``m`` letters inks. All arguments but the last two have shape (m,)."""
    letters = atlas()
    scale = em / EM
    left = pen - letters.overhang[face, 0] * em
    maps = letters.maps[face, letter]
    down = _overlap(top, scale, maps.shape[1], height)
    across = _overlap(left, scale, maps.shape[2], width)
    return (down @ maps @ across.mT).clamp(max=1.0)


def _overlap(start: Tensor, scale: Tensor, cells: int, pixels: int) -> Float[Tensor, "m pixels cells"]:
    """Length that each pixel shares with each row (or column) of a map which begins at ``start``."""
    edges = start[:, None] + scale[:, None] * torch.arange(cells + 1)
    pixel = torch.arange(pixels)[None, :, None]
    upper = torch.minimum(edges[:, None, 1:], pixel + 1.0)
    return (upper - torch.maximum(edges[:, None, :-1], pixel)).clamp(min=0.0)


def _boxes(words: Words, where: Layout) -> Tensor:
    """(top, left, bottom, right) of each letter's ink in pixels."""
    ink = atlas().ink[words.face[:, None], words.letters.clamp(min=0)] * where.em[:, None, None]
    origin = torch.stack([where.top[:, None].expand_as(where.pen), where.pen], dim=-1)
    boxes = ink + torch.cat([origin, origin], dim=-1)
    return torch.where(words.present[..., None], boxes, torch.nan)


def templates(words: Words, height: int, width: int) -> Float[Tensor, "n l a h w"]:
    """The coverage of every letter of the alphabet in every slot; unused slots are zero.

    Only in monospaced faces does the place of a slot not depend on the letters before it.
    """
    where, count = layout(words, height, width), len(ALPHABET)
    out = torch.zeros(*words.letters.shape, count, height, width)
    for i, k in words.present.nonzero().tolist():
        same = torch.full((count,), i)
        out[i, k] = coverage(
            words.face[same],
            torch.arange(count),
            where.em[same],
            where.top[same],
            where.pen[same, k],
            height,
            width,
        )
    return out
