"""One grammar for written words: a caption can be parsed back, and every letter is a token.

``caption := size ink face row column "on" ground quote letter+ quote``. The words about looks always stand at the same places,
so two captions that differ in their letters alone have tokens that differ there alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minilib.data.glyphs.fonts import ALPHABET, FACES
from minilib.data.glyphs.words import GROUNDS, INKS, MAX_LETTERS, SHARES, SIZES, Words, spell
from minilib.data.shapes import COLUMNS, ROWS

QUOTE = '"'
#: Inks and grounds share the words black and white.
VOCABULARY = (
    "<pad>", "<eos>", "on", QUOTE, *SIZES, *INKS, *(g for g in GROUNDS if g not in INKS), *FACES, *ROWS, *COLUMNS, *ALPHABET,
)  # fmt: skip
PAD, EOS = 0, 1
#: Seven words about looks, two quotes, six letters and <eos>.
MAX_TOKENS = 7 + 2 + MAX_LETTERS + 1
_ID = {word: i for i, word in enumerate(VOCABULARY)}
_FIRST_LETTER = len(VOCABULARY) - len(ALPHABET)


def _looks(words: Words) -> list[list[str]]:
    """The seven words about looks of each word."""
    middle = torch.tensor([(SHARES[0][1] + SHARES[1][0]) / 2])
    size = torch.bucketize(words.size, middle)
    third = (3 * words.place).long().clamp(max=2)
    columns = (words.ink, words.face, third[:, 0], third[:, 1], words.ground)
    return [
        [SIZES[s], INKS[i], FACES[f], ROWS[r], COLUMNS[c], "on", GROUNDS[g]]
        for s, i, f, r, c, g in zip(size.tolist(), *(column.tolist() for column in columns), strict=True)
    ]


def captions(words: Words) -> list[str]:
    """One sentence a word.

    >>> from minilib.data.glyphs.words import sample_words
    >>> captions(sample_words(1, torch.Generator().manual_seed(0)))
    ['large red serif top centre on white "wood"']
    """
    return [f'{" ".join(looks)} "{text}"' for looks, text in zip(_looks(words), words.texts, strict=True)]


def tokens(words: Words, length: int = MAX_TOKENS) -> Int[Tensor, "n {length}"]:
    """Token ids of the captions: words, a quote, a token for each letter, a quote, ``<eos>``, padding with 0.

    Raises:
        ValueError: ``length`` is too short; k letters need k + 10 tokens.
    """
    need = int(words.present.sum(1).max()) + 10 if len(words) else 0
    if need > length:
        raise ValueError(f"captions of these words have up to {need} tokens; got length={length}")
    out = torch.full((len(words), length), PAD)
    for row, (looks, text) in enumerate(zip(_looks(words), words.texts, strict=True)):
        ids = [_ID[word] for word in (*looks, QUOTE, *text, QUOTE, "<eos>")]
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def null_tokens(n: int, length: int = MAX_TOKENS) -> Int[Tensor, "{n} {length}"]:
    """The empty caption, ``<eos>`` alone, ``n`` times."""
    out = torch.full((n, length), PAD)
    out[:, 0] = EOS
    return out


def letter_mask(tokens: Int[Tensor, "n l"]) -> Bool[Tensor, "n l"]:
    """Which tokens are letters: what an editor of the written text replaces, and nothing else."""
    return tokens >= _FIRST_LETTER


def decode(row: Int[Tensor, " l"]) -> str:
    """The caption of one row of tokens."""
    looks = " ".join(
        VOCABULARY[i] for i in row.tolist() if EOS < i < _FIRST_LETTER and VOCABULARY[i] != QUOTE
    )
    letters = "".join(VOCABULARY[i] for i in row.tolist() if i >= _FIRST_LETTER)
    return f'{looks} "{letters}"' if letters else looks


def parse(sentences: Sequence[str]) -> Words:
    """The words that captions describe, in the middle of each named size and place: the inverse of :func:`captions`.

    Raises:
        ValueError: a sentence outside the grammar; it is quoted.

    >>> parse(['large red serif top left on black "sun"']).texts
    ['sun']
    """
    rows: list[tuple[int, int, int, float, tuple[float, float]]] = []
    texts = []
    for sentence in sentences:
        try:
            looks, text, rest = sentence.lower().split(QUOTE)
            size, ink, face, row, column, on, ground = looks.split()
            share = sum(SHARES[SIZES.index(size)]) / 2
            place = ((2 * ROWS.index(row) + 1) / 6, (2 * COLUMNS.index(column) + 1) / 6)
            rows.append((FACES.index(face), INKS.index(ink), GROUNDS.index(ground), share, place))
            if on != "on" or rest.strip():
                raise ValueError(f"{on} {rest}")
            spell([text])
        except ValueError as error:
            raise ValueError(
                f"{sentence!r}: expected 'large red serif top left on black \"sun\"'; {error}"
            ) from None
        texts.append(text)
    face, ink, ground, share, place = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    whole = [torch.tensor(values, dtype=torch.long) for values in (face, ink, ground)]
    places = torch.tensor(place, dtype=torch.float32).reshape(len(texts), 2)
    return Words(spell(texts), *whole, torch.tensor(share, dtype=torch.float32), places)
