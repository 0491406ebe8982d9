"""``photos``: photographs with clear licences from Debian's lomiri wallpapers, scikit-image and scikit-learn, and a stereo pair.

Each is scaled down to at most 640 pixels on its long side and stored as JPEG. Left out: pictures that are no photographs, those
whose licence the package does not state, and the faces of LFW.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minilib.data.build.tools import Built, Source, archive, deb_members, npz_bytes

LONG_SIDE = 640
QUALITY = 92

LOMIRI = Source(
    package="Debian lomiri-wallpapers-16.04",
    version="20.04.0-2",
    file="lomiri-wallpapers-16.04_20.04.0-2_all.deb",
    sha256="a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    get="apt-get download lomiri-wallpapers-16.04",
)
SKIMAGE = Source(
    package="PyPI scikit-image",
    version="0.26.0",
    file="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    get="pip download --no-deps scikit-image==0.26.0",
)
SKLEARN = Source(
    package="PyPI scikit-learn",
    version="1.9.1",
    file="scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    get="pip download --no-deps scikit-learn==1.9.1",
)


@dataclass(frozen=True)
class Photo:
    """Name in the set, file in its archive, split, photographer, licence."""

    name: str
    file: str
    split: str
    author: str
    licence: str


_W, _K, _L = "./usr/share/backgrounds/", "skimage/data/", "sklearn/datasets/images/"
_AITZOL, _SA, _BY, _FREE = "Aitzol Berasategi", "CC BY-SA 4.0", "CC BY 4.0", "CC0 1.0"

PHOTOS = (
    Photo("aitzgorri", f"{_W}aitzgorri_by_Aitzol_Berasategi.jpg", "train", _AITZOL, _BY),
    Photo("astronaut", f"{_K}astronaut.png", "train", "NASA", "public domain"),
    Photo("brick", f"{_K}brick.png", "train", "CC0Textures", _FREE),
    Photo("bridge", f"{_W}Bridge_by_Sander_Klootwijk.jpg", "train", "Sander Klootwijk", _SA),
    Photo("brushes", f"{_W}Picture_1A_by_freespace.jpg", "train", 'Trevor "Freespace"', _BY),
    Photo("camera", f"{_K}camera.png", "train", "Lav Varshney", _FREE),
    Photo("chelsea", f"{_K}chelsea.png", "test", "Stefan van der Walt", _FREE),
    Photo("china", f"{_L}china.jpg", "test", "danielbuechele", "CC BY 2.0"),
    Photo("clock", f"{_W}greentock_by_Peter_Nerlich.jpg", "train", "Peter Nerlich", _SA),
    Photo("coffee", f"{_K}coffee.png", "test", "Rachel Michetti", _FREE),
    Photo("coins", f"{_K}coins.png", "train", "Brooklyn Museum", "no known copyright restrictions"),
    Photo("dandelions", f"{_W}seeding_by_Clements_Engelhardt.jpg", "test", "Clemens Engelhardt", _FREE),
    Photo("dogs", f"{_W}friends_by_Aitzol_Berasategi.jpg", "test", _AITZOL, _BY),
    Photo("dragonfly", f"{_W}Dragonfly_by_Bolly.jpg", "train", "Bolly", _SA),
    Photo("fig", f"{_W}Picture_0B_by_freespace.jpg", "train", 'Trevor "Freespace"', _BY),
    Photo("flower", f"{_L}flower.jpg", "validation", "vultilion", "CC BY 2.0"),
    Photo("grass", f"{_K}grass.png", "train", "linolafett", _FREE),
    Photo("gravel", f"{_K}gravel.png", "train", "CC0Textures", _FREE),
    Photo("hubble", f"{_K}hubble_deep_field.jpg", "train", "NASA", "public domain"),
    Photo("lamp", f"{_W}free_by_Peter_Nerlich.jpg", "train", "Peter Nerlich", _SA),
    Photo("picosdeeuropa", f"{_W}picosdeeuropa_by_Aitzol_Berasategi.jpg", "validation", _AITZOL, _BY),
    Photo("retina", f"{_K}retina.jpg", "train", "Mikael Häggström", _FREE),
    Photo("rocket", f"{_K}rocket.jpg", "train", "SpaceX", "public domain"),
    Photo("stream", f"{_W}life_by_Aitzol_Berasategi.jpg", "test", _AITZOL, _BY),
    Photo("sunset", f"{_W}sunset_by_Aitzol_Berasategi.jpg", "train", _AITZOL, _BY),
    Photo("wine", f"{_W}Wine_by_Jakkub_Mede.jpg", "validation", "Jakub Mede", _BY),
)

CREDIT = """# photos

Photographs, each under its own licence. Changed: scaled down to at most 640 pixels on the long side, stored as JPEG again. The
share-alike licences of some photographs hold for those files; the code of the library is not affected.

| name | photographer | licence | from |
|---|---|---|---|
{rows}
| motorcycle (stereo pair, disparity) | Middlebury College | see below | PyPI scikit-image 0.26.0 |

Licences: CC BY 2.0 https://creativecommons.org/licenses/by/2.0/, CC BY 4.0 https://creativecommons.org/licenses/by/4.0/,
CC BY-SA 4.0 https://creativecommons.org/licenses/by-sa/4.0/, CC0 1.0 https://creativecommons.org/publicdomain/zero/1.0/.

- `astronaut` is NASA's portrait of Eileen Collins, `hubble` NASA's Hubble eXtreme Deep Field. Works of NASA are not
  under copyright in the United States; their use here implies no endorsement.
- `rocket`: launch of DSCOVR, put into the public domain by SpaceX. `retina`: Medical gallery of Mikael Häggström 2014.
- `motorcycle`: from the Middlebury 2014 stereo benchmark (D. Scharstein, H. Hirschmüller, Y. Kitajima, G. Krathwohl, N.
  Nesic, X. Wang, P. Westling: High-resolution stereo datasets with subpixel-accurate ground truth, GCPR 2014), made by
  Nera Nesic, Porter Westling, Xi Wang, York Kitajima, Greg Krathwohl and Daniel Scharstein. The benchmark names no
  licence; scikit-image passes the pair on among its sample data, and so do we, at half the size. Cite the paper when
  you use it.
"""


def scaled(data: bytes) -> Image.Image:
    """A picture file as RGB, its long side at most 640 pixels, antialiased."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    ratio = LONG_SIDE / max(picture.size)
    if ratio >= 1:
        return picture
    width, height = (round(extent * ratio) for extent in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def encoded(picture: Image.Image, kind: str) -> np.ndarray:
    """A picture as the bytes ``(n,)`` of a JPEG or PNG file, without metadata."""
    buffer = io.BytesIO()
    options = (
        {"quality": QUALITY, "subsampling": 0, "optimize": True} if kind == "JPEG" else {"optimize": True}
    )
    Image.fromarray(np.asarray(picture)).save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def stereo(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """The motorcycle pair and its disparity at half size; disparities are in pixels of the half-size images."""
    arrays = {}
    for side in ("left", "right"):
        picture = Image.open(io.BytesIO(wheel.read(f"{_K}motorcycle_{side}.png"))).convert("RGB")
        even = picture.crop((0, 0, picture.width // 2 * 2, picture.height // 2 * 2))
        arrays[f"motorcycle_{side}"] = encoded(even.reduce(2), "PNG")
    disparity = np.load(io.BytesIO(wheel.read(f"{_K}motorcycle_disp.npz")))["arr_0"].astype(np.float64)
    height, width = (extent // 2 for extent in disparity.shape)
    blocks = disparity[: 2 * height, : 2 * width].reshape(height, 2, width, 2).transpose(0, 2, 1, 3)
    values = np.sort(np.where(np.isfinite(blocks), blocks, np.nan).reshape(height, width, 4), axis=-1)
    known = np.isfinite(values).sum(-1)  # nan sorts last; the lower median is a disparity that was measured
    middle = np.take_along_axis(values, np.maximum(known - 1, 0)[..., None] // 2, axis=-1)[..., 0]
    return arrays | {"motorcycle_disparity": (middle / 2).astype(np.float16)}


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the three archives."""
    found, pair = dict(deb_members(archive(folder, LOMIRI), _W)), {}
    packages = {photo.file: "Debian lomiri-wallpapers-16.04" for photo in PHOTOS}
    for source in (SKIMAGE, SKLEARN):
        with zipfile.ZipFile(archive(folder, source)) as wheel:
            inside = [photo.file for photo in PHOTOS if photo.file in wheel.namelist()]
            found |= {file: wheel.read(file) for file in inside}
            packages |= {file: f"{source.package} {source.version}" for file in inside}
            if source is SKIMAGE:
                pair = stereo(wheel)
    arrays = {f"photo_{photo.name}": encoded(scaled(found[photo.file]), "JPEG") for photo in PHOTOS} | pair
    for key in ("name", "split", "author", "licence"):
        arrays[key] = np.array([getattr(photo, key) for photo in PHOTOS])
    rows = [f"| {p.name} | {p.author} | {p.licence} | {packages[p.file]} |" for p in PHOTOS]
    return Built(
        suffix=".npz",
        data=npz_bytes(arrays),
        what=f"{len(PHOTOS)} photographs of at most 640 pixels, and a stereo pair with disparity",
        licence="per photograph: CC0, public domain, CC BY 2.0, CC BY 4.0, CC BY-SA 4.0 (see the credits)",
        credit=CREDIT.format(rows="\n".join(rows)),
        sources=(LOMIRI, SKIMAGE, SKLEARN),
        extra={"photographs": len(PHOTOS)},
    )
