"""``glyphs``: written words with exact truth. A word, its face, size, place, ink and ground; a caption; masks of the letters.

>>> import torch
>>> words = sample_words(1, torch.Generator().manual_seed(0))
>>> captions(words)
['large red serif top centre on white "wood"']
>>> render(words, 16, 48).shape
torch.Size([1, 3, 16, 48])
"""

from minilib.data.glyphs.fonts import ALPHABET, FACES, LICENCES, MONOSPACED, PIXEL
from minilib.data.glyphs.grammar import (
    MAX_TOKENS,
    VOCABULARY,
    captions,
    decode,
    letter_mask,
    null_tokens,
    parse,
    tokens,
)
from minilib.data.glyphs.render import Layers, Layout, layout, render, render_layers
from minilib.data.glyphs.sets import GlyphSet
from minilib.data.glyphs.words import (
    GROUNDS,
    INKS,
    MAX_LETTERS,
    PAIRS,
    SIZES,
    WORDS,
    Words,
    contrast,
    sample_words,
    spell,
    split_of,
)

__all__ = [
    "ALPHABET", "FACES", "GROUNDS", "INKS", "LICENCES", "MAX_LETTERS", "MAX_TOKENS", "MONOSPACED", "PAIRS", "PIXEL", "SIZES",
    "VOCABULARY", "WORDS", "GlyphSet", "Layers", "Layout", "Words", "captions", "contrast", "decode", "layout", "letter_mask",
    "null_tokens", "parse", "render", "render_layers", "sample_words", "spell", "split_of", "tokens",
]  # fmt: skip
