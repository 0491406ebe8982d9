"""Letters as coverage maps: thirteen faces from the fonts in matplotlib's package, and a face of 3 x 5 pixels drawn here.

The fonts are used where they lie and are not shipped: DejaVu (Bitstream Vera licence), STIX (SIL Open Font License 1.1),
Computer Modern in its TrueType form (BaKoMa licence). Each allows any use of pictures made with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
#: Face -> file in matplotlib's font folder.
FILES = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
    "stix": "STIXGeneral.ttf",
    "stix-bold": "STIXGeneralBol.ttf",
    "roman": "cmr10.ttf",
    "roman-bold": "cmb10.ttf",
    "gothic": "cmss10.ttf",
    "typewriter": "cmtt10.ttf",
}
PIXEL = "pixel"
FACES = (*FILES, PIXEL)
#: All letters of these are equally wide, so the place of a letter does not depend on the others.
MONOSPACED = ("mono", "mono-bold", "typewriter", PIXEL)
LICENCES = {
    "DejaVu": "Bitstream Vera licence",
    "STIX": "SIL Open Font License 1.1",
    "Computer Modern": "BaKoMa licence",
}
#: Rows of the coverage maps to one em.
EM = 60
#: Letters are drawn this many times larger and averaged down, so that hinting hardly shows.
OVERSAMPLING = 4
#: Height of an em of the pixel face: five pixels and one of space.
PIXEL_EM = 6

# Five rows of three pixels each, from the top, as octal digits: 4 is the left pixel, 1 the right one.
_PIXEL_ROWS = {
    "a": "25755", "b": "65656", "c": "34443", "d": "65556", "e": "74647", "f": "74644", "g": "34553",
    "h": "55755", "i": "72227", "j": "11152", "k": "55655", "l": "44447", "m": "57755", "n": "65555",
    "o": "25552", "p": "65644", "q": "25573", "r": "65655", "s": "34216", "t": "72222", "u": "55557",
    "v": "55552", "w": "55775", "x": "55255", "y": "55222", "z": "71247",
}  # fmt: skip


@dataclass(frozen=True)
class Atlas:
    """The letters of all faces, ``EM`` rows to an em. Rows count from the top of the line, columns from the farthest overhang.

    ``maps`` coverage in [0, 1]; ``advance`` from one letter's pen place to the next; ``line`` rows from the highest ink of a
    face to its lowest; ``overhang`` the farthest that ink reaches left of the pen and right of the advance; ``ink`` each
    letter's box (top, left, bottom, right), left and right counted from the pen. Lengths are in ems.
    """

    maps: Float[Tensor, "face letter row column"]
    advance: Float[Tensor, "face letter"]
    line: Float[Tensor, " face"]
    overhang: Float[Tensor, "face 2"]
    ink: Float[Tensor, "face letter 4"]


@lru_cache(maxsize=1)
def atlas() -> Atlas:
    """All faces, drawn once a process (about 50 ms).

    Raises:
        FileNotFoundError: matplotlib's fonts are not where they should be.

    >>> atlas().advance[FACES.index("pixel"), :2] * PIXEL_EM
    tensor([4., 4.])
    """
    drawn = [_outline(face) for face in FILES] + [_pixel()]
    rows = max(maps.shape[1] for maps, *_ in drawn)
    columns = max(maps.shape[2] for maps, *_ in drawn)
    together = torch.zeros(len(drawn), len(ALPHABET), rows, columns)
    advance, line, overhang, ink = [], [], [], []
    for index, (maps, steps, pen) in enumerate(drawn):
        together[index, :, : maps.shape[1], : maps.shape[2]] = maps
        boxes = _boxes(maps, pen)
        advance.append(steps / EM)
        line.append(maps.shape[1] / EM)
        overhang.append(torch.stack([-boxes[:, 1].min(), (boxes[:, 3] - steps / EM).max()]).clamp(min=0.0))
        ink.append(boxes)
    # The maps begin where the farthest overhang begins, so that a column's place is known from the face alone.
    return Atlas(together, torch.stack(advance), torch.tensor(line), torch.stack(overhang), torch.stack(ink))


def _outline(face: str) -> tuple[Tensor, Tensor, int]:
    """Coverage maps of a font's letters, their advances and the pen's column, in rows of the atlas; without empty rims."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    path = Path(get_data_path()) / "fonts" / "ttf" / FILES[face]
    if not path.is_file():
        raise FileNotFoundError(
            f"the face {face!r} needs {path}, which comes with matplotlib: install it from PyPI again"
        )
    fine, pen, side = OVERSAMPLING, EM // 2, 2 * EM
    font = ImageFont.truetype(str(path), EM * fine, layout_engine=ImageFont.Layout.BASIC)
    pictures, steps = [], []
    for letter in ALPHABET:
        picture = Image.new("L", (side * fine, side * fine))
        origin = (pen * fine, (EM + EM // 4) * fine)
        ImageDraw.Draw(picture).text(origin, letter, fill=255, font=font, anchor="ls")
        pictures.append(np.asarray(picture.reduce(fine)))
        steps.append(font.getlength(letter) / fine)
    maps = torch.from_numpy(np.stack(pictures)).float() / 255.0
    down, across = maps.amax((0, 2)).nonzero()[:, 0], maps.amax((0, 1)).nonzero()[:, 0]
    left = min(int(across.min()), pen)
    cut = maps[:, int(down.min()) : int(down.max()) + 1, left : int(across.max()) + 1]
    return cut, torch.tensor(steps), pen - left


def _pixel() -> tuple[Tensor, Tensor, int]:
    """The same for the pixel face."""
    rows = [[int(digit) for digit in _PIXEL_ROWS[letter]] for letter in ALPHABET]
    bits = torch.tensor(rows)[..., None] & torch.tensor([4, 2, 1])
    side = EM // PIXEL_EM
    maps = (bits > 0).float().repeat_interleave(side, 1).repeat_interleave(side, 2)
    return maps, torch.full((len(ALPHABET),), 4.0 * side), 0


def _boxes(maps: Tensor, pen: int) -> Tensor:
    """Where each letter's ink is: (top, left, bottom, right) in ems, left and right from the pen."""
    rows, columns = maps.amax(2) > 0, maps.amax(1) > 0

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(line.shape[1])
        return torch.where(line, place, line.shape[1]).amin(1), torch.where(line, place + 1, 0).amax(1)

    (top, bottom), (left, right) = ends(rows), ends(columns)
    return torch.stack([top, left - pen, bottom, right - pen], dim=1) / EM
