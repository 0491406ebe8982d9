"""``emoji``: the same 1,586 concepts drawn by three teams, 32 x 32 RGBA, with English names and tags.

Styles: Noto (bitmaps of Google's colour font), Fluent 3D (Microsoft), Twemoji (Twitter). Concepts and words: emojibase, after
Unicode CLDR. Left out: flags, keycaps, skin-tone variants, skin and hair components, and what one of the three lacks.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from minilib.data.build.tools import Built, Source, archive, deb_members, npz_bytes, tar_members

STYLES = ("noto", "fluent-3d", "twemoji")
SIDE = 32

NOTO = Source(
    package="Debian fonts-noto-color-emoji",
    version="2.042-0+deb12u1",
    file="fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
    sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    get="apt-get download fonts-noto-color-emoji",
)
FLUENT = Source(
    package="npm @lobehub/fluent-emoji-3d",
    version="1.1.0",
    file="lobehub-fluent-emoji-3d-1.1.0.tgz",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    get="npm pack @lobehub/fluent-emoji-3d@1.1.0",
)
TWEMOJI = Source(
    package="npm emoji-datasource-twitter",
    version="16.0.0",
    file="emoji-datasource-twitter-16.0.0.tgz",
    sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    get="npm pack emoji-datasource-twitter@16.0.0",
)
WORDS = Source(
    package="npm emojibase-data",
    version="17.0.0",
    file="emojibase-data-17.0.0.tgz",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    get="npm pack emojibase-data@17.0.0",
)

CREDIT = """# emoji

Emoji pictures of three design teams, scaled down to 32 x 32 pixels; otherwise unchanged. Each keeps its own licence.

- `noto`: Noto Color Emoji 2.042, copyright 2013-2017 Google Inc. The bitmaps are under the Apache License 2.0
  (https://www.apache.org/licenses/LICENSE-2.0), the font that holds them under the SIL Open Font License 1.1; the
  bitmaps are used here, not the font. From the Debian package `fonts-noto-color-emoji`.
- `fluent-3d`: Fluent Emoji, copyright Microsoft Corporation, MIT licence. From npm `@lobehub/fluent-emoji-3d` 1.1.0,
  copyright 2023 LobeHub, MIT licence.
- `twemoji`: Twemoji, graphics copyright Twitter, Inc and other contributors (fork of 2021 and later: jdecked), CC BY
  4.0 (https://creativecommons.org/licenses/by/4.0/). Changed: scaled from 64 to 32 pixels. From npm
  `emoji-datasource-twitter` 16.0.0.
- Names, tags, groups: npm `emojibase-data` 17.0.0, copyright 2017-2019 Miles Johnson, MIT licence; the words are from
  the Unicode CLDR, copyright Unicode, Inc., Unicode License v3 (https://www.unicode.org/license.txt).

MIT licence: permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software,
and to permit persons to whom the Software is furnished to do so, subject to the following conditions: the above
copyright notice and this permission notice shall be included in all copies or substantial portions of the Software. The
Software is provided "as is", without warranty of any kind, express or implied, including but not limited to the
warranties of merchantability, fitness for a particular purpose and noninfringement. In no event shall the authors or
copyright holders be liable for any claim, damages or other liability, whether in an action of contract, tort or
otherwise, arising from, out of or in connection with the Software or the use or other dealings in the Software.
"""

_DROPPED_GROUPS = {None, 2, 9}  # regional letters, components (skin and hair), flags
_JOINERS = {"FE0F", "200D", "2640", "2642", "27A1"}  # presentation, join, female, male, facing right
_SAME = {
    "1F468": "1F9D1",
    "1F469": "1F9D1",
    "1F467": "1F9D2",
    "1F466": "1F9D2",
}  # man, woman: person; girl, boy: child
_FAMILIES = {
    "couple": "1F46B 1F46C 1F46D 1F9D1-1F91D-1F9D1",
    "family": "1F46A",
    "crowned": "1F934 1F478 1FAC5",
    "older": "1F474 1F475 1F9D3",
    "claus": "1F385 1F936 1F9D1-1F384",
    "dancing": "1F483 1F57A",
    "pregnant": "1F930 1FAC3 1FAC4",
}


def family(hexcode: str) -> str:
    """What a held-out concept must not share with a training one: the drawing but for gender, direction, or the hour.

    Woman running, man running and person running are one family; so are the 24 clock faces.

    >>> family("1F3C3-200D-2642-FE0F") == family("1F3C3"), family("1F40D")
    (True, '1F40D')
    """
    parts = [_SAME.get(part, part) for part in hexcode.upper().split("-") if part not in _JOINERS]
    key = "-".join(parts)
    for name, members in _FAMILIES.items():
        if key in members.split():
            return name
    if len(parts) > 1 and set(parts) <= {"1F9D1", "1F9D2"}:
        return "family"
    if "2764" in parts and len(parts) > 2:  # couple with heart, kiss
        return "1F48F" if "1F48B" in parts else "1F491"
    if len(parts) == 1 and 0x1F550 <= int(key, 16) <= 0x1F567:
        return "clock face"
    return key


def splits(rows: list[dict[str, Any]]) -> list[int]:
    """Train 0, validation 1, test 2: the rank of a concept's family within its group, modulo 10, is 4, 9 or another."""
    seen: dict[int, list[str]] = {}
    out = []
    for row in rows:
        known = seen.setdefault(row["group"], [])
        key = family(row["hexcode"])
        if key not in known:
            known.append(key)
        out.append({4: 1, 9: 2}.get(known.index(key) % 10, 0))
    return out


def concepts(path: Path) -> list[dict[str, Any]]:
    """Rows of emojibase in the order of CLDR, less the groups that are left out."""
    rows = json.loads(tar_members(path, "package/en/data.json")["package/en/data.json"])
    kept = [row for row in rows if row.get("group") not in _DROPPED_GROUPS]
    return sorted(
        (row for row in kept if not row["label"].startswith("keycap")), key=lambda row: row["order"]
    )


def plain(hexcode: str) -> str:
    """A code sequence without the presentation selector, lower case: how the packages name files, more or less."""
    return re.sub("-fe0f", "", hexcode.lower())


def noto_images(path: Path) -> dict[str, bytes]:
    """PNG bitmaps of the font's CBDT table by code sequence; sequences go through its ligatures."""
    from fontTools.ttLib import TTFont

    (data,) = deb_members(path, "./usr/share/fonts/").values()
    font = TTFont(io.BytesIO(data))
    strike, names = font["CBDT"].strikeData[0], font.getBestCmap()
    glyphs = {f"{code:04x}": name for code, name in names.items()}
    codes = {name: f"{code:04x}" for code, name in names.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = [first, *ligature.Component]
                    if all(part in codes for part in parts):
                        glyphs["-".join(codes[part] for part in parts)] = ligature.LigGlyph
    return {plain(key): strike[name].imageData for key, name in glyphs.items() if name in strike}


def tarball_images(path: Path, folder: str) -> dict[str, bytes]:
    """Picture files of an npm tarball by code sequence."""
    return {plain(PurePosixPath(name).stem): data for name, data in tar_members(path, folder).items()}


def shrink(data: bytes, side: int = SIDE) -> np.ndarray:
    """A picture file as ``(4, side, side)`` uint8: centred on a square, scaled with its colours weighted by alpha."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    square = Image.new("RGBA", (max(picture.size),) * 2)
    square.paste(picture, tuple((square.width - extent) // 2 for extent in picture.size))
    scaled = square.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    out = np.array(scaled)
    out[out[..., 3] == 0] = 0
    return out.transpose(2, 0, 1)


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the four archives."""
    pictures = {
        "noto": noto_images(archive(folder, NOTO)),
        "fluent-3d": tarball_images(archive(folder, FLUENT), "package/assets/"),
        "twemoji": tarball_images(archive(folder, TWEMOJI), "package/img/twitter/64/"),
    }
    words = archive(folder, WORDS)
    rows = [
        row for row in concepts(words) if all(plain(row["hexcode"]) in found for found in pictures.values())
    ]
    groups = json.loads(tar_members(words, "package/meta/groups.json")["package/meta/groups.json"])
    arrays = {
        style: np.stack([shrink(found[plain(row["hexcode"])]) for row in rows], axis=1)
        for style, found in pictures.items()
    }
    arrays |= {
        "hexcode": np.array([row["hexcode"] for row in rows]),
        "label": np.array([row["label"] for row in rows]),
        "tags": np.array(["|".join(row.get("tags", [])) for row in rows]),
        "group": np.array([row["group"] for row in rows], dtype=np.uint8),
        "subgroup": np.array([row["subgroup"] for row in rows], dtype=np.uint8),
        "split": np.array(splits(rows), dtype=np.uint8),
    }
    for kind in ("groups", "subgroups"):
        arrays[kind] = np.array([groups[kind][key] for key in sorted(groups[kind], key=int)])
    return Built(
        suffix=".npz",
        data=npz_bytes(arrays, zipfile.ZIP_LZMA),
        what=f"{len(rows):,} captioned emoji concepts in three styles, 32 x 32 RGBA",
        licence="Apache-2.0 (Noto), MIT (Fluent), CC BY 4.0 (Twemoji), MIT and Unicode License v3 (words)",
        credit=CREDIT,
        sources=(NOTO, FLUENT, TWEMOJI, WORDS),
        extra={"concepts": len(rows), "images": len(rows) * len(STYLES)},
    )
