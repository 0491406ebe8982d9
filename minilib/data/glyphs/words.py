"""What is written, and how it looks: word, face, size, place, ink and ground. Deterministic in a seed, split by word."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minilib.data.glyphs.fonts import ALPHABET, FACES, FILES
from minilib.data.shapes import COLOURS
from minilib.data.shapes.render import BACKGROUND, PALETTE

MAX_LETTERS = 6
SPLITS = ("train", "validation", "test")
SIZES = ("small", "large")
#: Size as a share of the largest that fits on the canvas, for small and for large words.
SHARES = ((0.55, 0.65), (0.9, 1.0))
INKS = (*COLOURS, "white", "black")
GROUNDS = ("black", "white", "navy", "grey")
INK_RGB = (*PALETTE, (0.95, 0.95, 0.95), BACKGROUND)
GROUND_RGB = (BACKGROUND, (0.95, 0.95, 0.95), (0.08, 0.10, 0.32), (0.42, 0.42, 0.42))
#: Least ratio of luminances (WCAG 2: large text) between ink and ground.
MIN_CONTRAST = 3.0

WORDS: tuple[str, ...] = tuple("""
    ace act add age air all and ant any ape arm army art ash ask aunt axe baby back bad bag ball band bank bark barn bath
    bay bead beak bean bear beat bed bee bell belt best big bird bite black blue boat body bone book born both bowl box boy
    brave bread brick bring broom brown brush bud bug bun bus bush busy cab cake call calm camel camp can candy cap car
    card care cart castle cat chair chalk cheese chin circle city clay clean clock cloud clown coat coin cold come cook
    corn cow crab crow cry cup curl cut dance dark dawn day deep deer desk dig dish do dog doll door down draw dream dress
    drum dry duck dust each ear earth east easy eat edge egg eight elbow empty end exit eye face fair fall farm fast feet
    fence fern few field film find fire fish five flag flame flat flour flute fly fog foot forest fork fox free frog from
    fruit full fun game garden gate ghost gift girl give glad glass globe glove go goat gold good grape grass green grow
    gym hair half hand happy harp hat have hawk head heart heavy hen herb here hide high hill home honey hook horse hot
    house hug ice idea in ink iron island it ivy jam jar jazz jet job join joke judge juice jump jungle just keep key kick
    kind king kite knee knife knot lake lamp land large laugh leaf learn left lemon letter light line lion list loaf long
    look loud love low luck magic mail make man map march mask maze me meal melon milk mirror mix moon mouse music my nail
    name near neck nest net new night nine no north nose now nut oak ocean of old olive one onion open orange oven owl
    page paint palm panda paper park peach pearl pen piano pig pilot pink plane plum pocket pond pony queen quick quiet
    quilt quiz rabbit rain red rice ring river road robot rock roof room rope rose round run sad sail salt sand school sea
    seed seven shark sheep ship shoe six sky sleep smile snow sock song soup spoon star stone storm sun swan table tail
    tea ten tent tiger time to toast top tower town toy train tree truck tulip two up van vase very violin walk wall warm
    water wave we west whale wheat wheel white wind window wing winter wolf wood word yard year yellow yes you young zebra
    zero zoo
""".split())  # fmt: skip


@dataclass(frozen=True)
class Words:
    """``n`` written words as a structure of arrays.

    ``letters`` index ``ALPHABET``, -1 after the end; ``face``, ``ink``, ``ground`` index ``FACES``, ``INKS``, ``GROUNDS``.
    ``size`` is a share, in (0, 1], of the largest size at which the line fits on the canvas; ``place`` is (down, right) as
    a share, in [0, 1], of the room that is left. So every word fits on every canvas.
    """

    letters: Int[Tensor, "n l"]
    face: Int[Tensor, " n"]
    ink: Int[Tensor, " n"]
    ground: Int[Tensor, " n"]
    size: Float[Tensor, " n"]
    place: Float[Tensor, "n 2"]

    def __len__(self) -> int:
        return len(self.letters)

    def __getitem__(self, index: slice | Tensor) -> Words:
        """The words at a slice, an index tensor or a boolean mask."""
        return Words(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def present(self) -> Bool[Tensor, "n l"]:
        """Which slots hold a letter."""
        return self.letters >= 0

    @property
    def texts(self) -> list[str]:
        """The words as strings."""
        return ["".join(ALPHABET[i] for i in row if i >= 0) for row in self.letters.tolist()]

    def rewritten(self, texts: Sequence[str]) -> Words:
        """Other words with the same looks. Raises ValueError as :func:`spell`, or for another number of them."""
        if len(texts) != len(self):
            raise ValueError(f"need one text for each of {len(self)} words; got {len(texts)}")
        return replace(self, letters=spell(texts))


def spell(texts: Sequence[str]) -> Int[Tensor, "n 6"]:
    """Letter indices of each word, padded with -1.

    Raises:
        ValueError: a word that is empty, has more than six letters, or anything but a to z; it is quoted.

    >>> spell(["ab"]).tolist()
    [[0, 1, -1, -1, -1, -1]]
    """
    rows = []
    for text in texts:
        if not 1 <= len(text) <= MAX_LETTERS or any(letter not in ALPHABET for letter in text):
            raise ValueError(f"a word has 1 to {MAX_LETTERS} letters from a to z; got {text!r}")
        rows.append([ALPHABET.index(letter) for letter in text] + [-1] * (MAX_LETTERS - len(text)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(texts), MAX_LETTERS)


def split_of(text: str) -> str:
    """The split of a word, by a hash of its letters: a tenth test, a tenth validation, the rest train. It never changes.

    >>> split_of("sun"), split_of("rain")
    ('train', 'validation')
    """
    return ("test", "validation", *["train"] * 8)[zlib.crc32(text.encode()) % 10]


def contrast(ink: int, ground: int) -> float:
    """Ratio of relative luminances of an ink and a ground, 1 to 21 (WCAG 2).

    >>> round(contrast(INKS.index("white"), GROUNDS.index("black")), 1)
    15.6
    """

    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = luminance(INK_RGB[ink]) + 0.05, luminance(GROUND_RGB[ground]) + 0.05
    return max(a, b) / min(a, b)


#: (ink, ground) with enough contrast to be read.
PAIRS = tuple((i, g) for i in range(len(INKS)) for g in range(len(GROUNDS)) if contrast(i, g) >= MIN_CONTRAST)


def sample_words(
    n: int,
    generator: torch.Generator,
    *,
    split: str | None = None,
    vocabulary: Sequence[str] = WORDS,
    random_letters: tuple[int, int] | None = None,
    alphabet: str = ALPHABET,
    faces: Sequence[str] = tuple(FILES),
    sizes: Sequence[str] = SIZES,
) -> Words:
    """Draw ``n`` words with random looks.

    Args:
        n: how many.
        generator: the only source of chance.
        split: only words of ``"train"``, ``"validation"`` or ``"test"`` (see :func:`split_of`); None for all.
        vocabulary: the words to draw from.
        random_letters: least and most letters; strings of random letters instead of words.
        alphabet: the letters of random strings.
        faces: names of faces; every outline face by default, not the pixel face.
        sizes: ``"small"``, ``"large"`` or both.

    Raises:
        ValueError: an unknown split, face, size or letter, a bad number of letters, or no word left to draw.

    >>> sample_words(3, torch.Generator().manual_seed(0)).texts
    ['night', 'cat', 'fun']
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}, or None")
    face = _drawn(n, generator, faces, FACES, "face")
    size = torch.tensor(SHARES)[_drawn(n, generator, sizes, SIZES, "size")]
    pairs = torch.tensor(PAIRS)[torch.randint(len(PAIRS), (n,), generator=generator)]
    share = size[:, 0] + (size[:, 1] - size[:, 0]) * torch.rand(n, generator=generator)
    place = torch.rand(n, 2, generator=generator)
    if random_letters is None:
        known = spell([word for word in vocabulary if split in (None, split_of(word))])
        if not len(known):
            raise ValueError(f"none of the {len(vocabulary)} words of this vocabulary is in {split!r}")
        letters = known[torch.randint(len(known), (n,), generator=generator)]
    else:
        letters = _random_strings(n, generator, random_letters, alphabet, split)
    return Words(letters, face, pairs[:, 0], pairs[:, 1], share, place)


def _drawn(
    n: int, generator: torch.Generator, chosen: Sequence[str], known: Sequence[str], kind: str
) -> Tensor:
    """Random indices into ``known`` of names in ``chosen``."""
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise ValueError(
            f"unknown {kind} {unknown[0]!r}; known: {', '.join(known)}" if unknown else f"no {kind} given"
        )
    index = torch.tensor([known.index(name) for name in chosen])
    return index[torch.randint(len(index), (n,), generator=generator)]


def _random_strings(
    n: int, generator: torch.Generator, length: tuple[int, int], alphabet: str, split: str | None
) -> Tensor:
    low, high = length
    if not 1 <= low <= high <= MAX_LETTERS:
        raise ValueError(
            f"a word has 1 to {MAX_LETTERS} letters; got random_letters={length}, expected (least, most)"
        )
    letters = spell(list(alphabet))[:, 0]
    if not len(letters):
        raise ValueError("random letters need an alphabet; got an empty one")
    found: list[str] = []
    for _ in range(1000):  # a tenth of all strings are in a held-out split: twenty rounds are plenty
        size = torch.randint(low, high + 1, (max(n, 16),), generator=generator).tolist()
        rows = letters[torch.randint(len(letters), (len(size), high), generator=generator)].tolist()
        texts = ("".join(ALPHABET[i] for i in row[:count]) for row, count in zip(rows, size, strict=True))
        found += [text for text in texts if split in (None, split_of(text))]
        if len(found) >= n:
            return spell(found[:n])
    raise ValueError(f"no string of {low} to {high} letters from {alphabet!r} is in {split!r}")
