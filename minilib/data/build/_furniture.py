"""The catalogue behind the furniture assets: Debian's ``sweethome3d-furniture``, read, cleaned, named and sorted into classes."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from minilib.data.build._meshes import Mesh, place, read_mesh
from minilib.data.build._raster import Textures
from minilib.data.build.tools import Source, archive, deb_members

SOURCE = Source(
    package="Debian sweethome3d-furniture",
    version="1.8-1",
    file="sweethome3d-furniture_1.8-1_all.deb",
    sha256="3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
    get="apt-get download sweethome3d-furniture=1.8-1",
)
FOLDER = "./usr/share/sweethome3d/furniture/"
LICENCES = {
    "BlendSwap-CC-0": "CC0 1.0",
    "BlendSwap-CC-BY": "CC BY 3.0",
    "KatorLegaz": "CC BY 3.0 US",
    "Reallusion": "CC BY 3.0 US",
    "Scopia": "CC BY 3.0",
}

# A product's name, a banknote, a mark painted on a road, one of thirty nearly equal wall plates: not in the set.
DROPPED = re.compile(
    r"\bvw\b|apple i|seat leon|peugeot|renault|yamaha|chevrolet|ford focus|smart car|playstation|joystick"
    r"|rubik|^bill \d|parking slot|^arrow |pedestrian crossing|\bplug$|switch$|wall (double )?socket"
)
DROPPED_TAGS = {"", "Blend Swap", "SCPTS", "iPad", "Velux", "Thonet"}
DROPPED_PATHS = re.compile(r"peterbilt|daftruck|apple")
RENAMED = {
    "Children chair": "Children's chair", "Children table": "Children's table", "Contemporary living room": "Wall unit",
    "Double French window 3 panes": "Double French window with 3 panes",
    "Double French window small panes": "Double French window with small panes",
    "Double window 3 panes": "Double window with 3 panes", "Double window 4 panes": "Double window with 4 panes",
    "Induction cooker 2 zones": "Induction cooker with 2 zones",
    "Induction cooker 4 zones": "Induction cooker with 4 zones",
    "Quadruple French window 3 panes": "Quadruple French window with 3 panes",
    "Quadruple French window small panes": "Quadruple French window with small panes",
    "Rectangle swimming pool": "Rectangular swimming pool", "Sofa 2 seats": "Two-seat sofa",
    "Sofa 3 seats": "Three-seat sofa", "White board": "Whiteboard", "Wood toy": "Wooden toy",
    "Air conditioning - External unit": "Outdoor air conditioning unit",
    "Air conditioning - Internal unit": "Indoor air conditioning unit",
    "Barnum": "Party tent", "Basketball net and board": "Basketball hoop", "Basketball net": "Basketball hoop",
    "Bended coconut tree": "Bent coconut tree", "CCTV": "Surveillance camera", "Children game": "Playground slide",
    "Clothes horse": "Drying rack", "Concept Sedan 01": "Car", "Concept Sedan 02": "Car",
    "Concept Sedan 02 Sport": "Sports car", "Convertible sofa BZ": "Convertible sofa", "Female": "Woman",
    "Flacon": "Perfume bottle", "Flipper": "Pinball machine", "Frame Chambord": "Picture frame",
    "Frame Hôi An": "Picture frame", "Gaz water heater": "Gas water heater", "Hashtray": "Ashtray",
    "Holding female": "Woman holding something", "Holding male": "Man holding something", "Hood": "Kitchen hood",
    "Island": "Kitchen island", "Island extension": "Kitchen island extension", "Keyboard": "Music keyboard",
    "Letters box": "Letter box", "Lip stick": "Lipstick", "Little bank": "Small bench", "Locked locker": "Locker",
    "Lying down boy": "Boy lying down", "Lying down female": "Woman lying down", "Lying down male": "Man lying down",
    "MP3 base": "Music player dock", "MP3 station": "Music player dock", "Male": "Man", "Mannequin female": "Female mannequin",
    "Mannequin male": "Male mannequin", "Milk": "Milk carton", "Mocassin": "Moccasin", "Motorbike": "Spring rider",
    "Opened convertible sofa BZ": "Opened convertible sofa", "Puff": "Pouffe", "Rigged fan": "Fan",
    "Screen": "Folding screen", "Short": "Shorts", "Sitting female": "Sitting woman", "Sitting male": "Sitting man",
    "Socket": "Sock", "Sugar": "Sugar bowl", "TV 16:9": "TV", "Table tennis": "Table tennis table",
    "Technical table": "Drawing table", "Teck chair": "Teak chair", "Toilets unit": "Toilet", "Tool": "Kitchen tool",
    "Trunck": "Trunk", "Turn window": "Roof window", "Wood bank": "Wood bench", "Woman shoes": "Women's shoes",
}  # fmt: skip

PROPER = re.compile(r"[A-Z]{2}|Japanese|French|Christmas|Siamese|Osaka|Winchester|Captain")

# The first that fits decides: a pattern of the name, or of "tag" or "category" where it starts with one.
RULES: tuple[tuple[str, str], ...] = (
    ("play and sport", r"^doll$|doll house|keyboard$|table tennis bat|tennis racket|abdominal bench|xylophone"),
    ("person", r"category Characters.*tag human"),
    ("animal", r"category Characters"),
    ("other", r"wheelchair|deer$|doormat|flower box|^folding screen|drying rack"),
    ("lamp", r"category Lights|lantern"),
    ("appliance", r"fan$|chest freezer"),
    ("bathroom", r"shower|washbasin|vanity|lavatory|\bbath\b|bathtub|toilet$|bidet|urinal|^sink|jacuzzi|potty|^basin"),
    ("cabinet", r"cabinet|wardrobe|cupboard|dress(er|ing table)|bedside|locker|changing table|tv stand|safe$|^chest$|drawers"),
    ("shelf", r"shel(f|ves)|bookcase|wall unit"),
    ("door or window", r"\bdoor|window"),
    ("sofa", r"sofa|couch"),
    ("chair", r"chair|stool|class seat|pool lounge|pouffe"),
    ("bench", r"\bbench$"),
    ("bed", r"\bbed\b|crib|futon|mattress|hammock|sleeping bag"),
    ("table", r"table\b|desk\b|workbench"),
    ("food", r"cup cake|french fries"),
    ("vessel", r"vase|bottle|\bjar\b|pottery|\bcup\b|\bmug\b|glass$|bowl$|teapot|creamer|pot$"),
    ("plant", r"^flowers|tag (plant|tree|flowers)|\bplant|tree\b|cactus|palm|bamboo|succulent"),
    ("vehicle", r"category Vehicles|\bcar$|rowboat|wheelbarrow"),
    ("electronics", r"tag (electronics|tv|television|computer)|speaker|\bphone$"),
    ("appliance", r"tag (appliance|cooker)|kettle|boiler"),
    ("food", r"tag food|steak"),
    ("heating", r"radiator|fireplace|furnace|chimney"),
    ("clothing", r"tag (clothes|shoes|jewelry)|glasses$|helmet|handbag|backpack|suit$"),
    ("play and sport", r"tag (toy|game|sport|music)"),
    ("tool", r"tag (tool|cutlery|cleaning)|knife|tool|ladder|scissors"),
    ("other", r""),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One model of the catalogue."""

    key: str
    title: str
    name: str
    kind: str
    tags: tuple[str, ...]
    author: str
    licence: str
    size_cm: tuple[float, float, float]
    rotation: tuple[float, ...] | None
    library: str
    path: str

    @property
    def seed(self) -> int:
        """A seed of the item's own, whatever else is in the catalogue."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big")


@dataclass
class Catalogue:
    """The package, opened. ``items`` are sorted by class, then name, then key."""

    folder: Path
    libraries: dict[str, zipfile.ZipFile] = field(init=False)

    def __post_init__(self) -> None:
        found = deb_members(archive(self.folder, SOURCE), FOLDER)
        self.libraries = {Path(name).stem: zipfile.ZipFile(io.BytesIO(data)) for name, data in found.items()}

    @cached_property
    def items(self) -> list[Item]:
        """Every model that is kept."""
        rows = [row for name in LICENCES for row in _items(name, self.libraries[name])]
        return sorted(rows, key=lambda item: (item.kind, item.name, item.key))

    def read(self, item: Item, path: str) -> bytes | None:
        """A file of the item's library, None where there is none of that name."""
        try:
            return self.libraries[item.library].read(path)
        except KeyError:
            return None

    def mesh(self, item: Item) -> Mesh:
        """The item's mesh, centred, in centimetres, y up, its front towards +z."""
        mesh = read_mesh(item.path, lambda path: self.read(item, path))
        width, depth, height = item.size_cm
        return place(mesh, item.rotation, (width, height, depth))

    def textures(self, item: Item, mesh: Mesh, longest: int = 512) -> Textures:
        """The pictures on the mesh; a separate opacity map becomes the picture's alpha. Larger ones are shrunk."""
        cache: dict[tuple[str | None, str | None], np.ndarray | None] = {}
        used = set(np.unique(mesh.material).tolist())
        pictures = []
        for i, material in enumerate(mesh.materials):
            key = (material.texture, material.alpha)
            if i in used and key not in cache:
                cache[key] = self._picture(item, *key, longest)
            pictures.append(cache.get(key) if i in used else None)
        return Textures.pack(pictures)

    def _picture(self, item: Item, path: str | None, alpha: str | None, longest: int) -> np.ndarray | None:
        from PIL import Image

        data = self.read(item, path) if path else None
        if data is None:
            return None
        image = Image.open(io.BytesIO(data)).convert("RGBA")
        mask = self.read(item, alpha) if alpha else None
        if mask is not None:
            opened = Image.open(io.BytesIO(mask))
            if "A" not in image.getbands() or np.asarray(image)[..., 3].min() == 255:
                band = opened.getchannel("A") if "A" in opened.getbands() else opened.convert("L")
                image.putalpha(band.resize(image.size))
        image.thumbnail((longest, longest), Image.Resampling.BOX)
        return np.asarray(image, dtype=np.float64) / 255


def classes() -> list[str]:
    """Names of the classes, sorted; ``other`` last."""
    return [*sorted({kind for kind, _ in RULES} - {"other"}), "other"]


def classify(name: str, tags: tuple[str, ...], category: str) -> str:
    """The class of a model, by the first rule that fits.

    >>> classify("Table lamp", (), "Lights"), classify("Bar stool", ("Seat",), "Kitchen")
    ('lamp', 'chair')
    """
    text = " ".join([name.lower(), f"| category {category}", *(f"tag {tag.lower()}" for tag in tags)])
    for kind, pattern in RULES:
        anchored = pattern.replace("$", r"(?= \|)")
        scope = text if "tag " in pattern or "category " in pattern else text.split(" | ")[0] + " |"
        if re.search(anchored, scope):
            return kind
    raise AssertionError("the last rule fits everything")


def _items(library: str, archive_: zipfile.ZipFile) -> list[Item]:
    """The models of one library that are kept."""
    text = archive_.read("PluginFurnitureCatalog.properties").decode("latin1")
    rows: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
        rows.setdefault(int(number), {})[key] = re.sub(
            r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value.strip()
        )
    items = []
    for number, row in sorted(rows.items()):
        if DROPPED.search(row["name"].lower()) or DROPPED_PATHS.search(row["model"].lower()):
            continue
        tags = [tag.strip() for tag in row["tags"].split(",")]
        tags = tuple(tag for tag in tags if tag not in DROPPED_TAGS)
        name = RENAMED.get(row["name"], row["name"])
        rotation = row.get("modelRotation")
        items.append(
            Item(
                key=f"{library}#{number}",
                title=row["name"],
                name=name if PROPER.match(name) else name[0].lower() + name[1:],
                kind=classify(name, tags, row["category"]),
                tags=tags,
                author=row["creator"],
                licence=LICENCES[library],
                size_cm=tuple(float(row[side]) for side in ("width", "depth", "height")),
                rotation=tuple(float(v) for v in rotation.split()) if rotation else None,
                library=library,
                path=row["model"].lstrip("/"),
            )
        )
    return items
