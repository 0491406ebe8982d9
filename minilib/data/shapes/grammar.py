"""One grammar for scenes: a caption is the words of its tokens, and can be parsed back.

``caption := object ("and" object)*``, ``object := size colour shape row column``. The tokens are the words' numbers, then
``<eos>``, then padding. The empty caption, ``<eos>`` alone, is the null condition of classifier-free guidance.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from minilib.data.shapes.scenes import COLOURS, COLUMNS, MAX_OBJECTS, ROWS, SHAPES, SIZES, Scenes

VOCABULARY = ("<pad>", "<eos>", "and", *SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS)
PAD, EOS, AND = 0, 1, 2
MAX_TOKENS = 6 * MAX_OBJECTS
_ID = {word: i for i, word in enumerate(VOCABULARY)}


def tokens(scenes: Scenes, length: int = MAX_TOKENS) -> Int[Tensor, "n {length}"]:
    """Token ids of the scenes' captions, padded with 0.

    Raises:
        ValueError: ``length`` is too short for a scene: k objects need 6 k tokens.
    """
    need = 6 * int(scenes.count.max()) if len(scenes) else 0
    if need > length:
        raise ValueError(f"captions of these scenes have up to {need} tokens; got length={length}")
    words = [
        (scenes.size, SIZES),
        (scenes.colour, COLOURS),
        (scenes.shape, SHAPES),
        (scenes.cell // len(COLUMNS), ROWS),
        (scenes.cell % len(COLUMNS), COLUMNS),
    ]
    ids = torch.stack([value + _ID[names[0]] for value, names in words], dim=-1)  # (n, k, 5)
    out = torch.full((len(scenes), 6 * MAX_OBJECTS), PAD)
    rows = torch.arange(len(scenes))
    for slot in range(MAX_OBJECTS):
        here = scenes.present[:, slot]
        out[here, 6 * slot : 6 * slot + 5] = ids[here, slot]
        out[here, 6 * slot + 5] = AND
    out[rows, 6 * scenes.count - 1] = EOS
    return (
        out[:, :length]
        if length <= out.shape[1]
        else torch.nn.functional.pad(out, (0, length - out.shape[1]))
    )


def null_tokens(n: int, length: int = MAX_TOKENS) -> Int[Tensor, "{n} {length}"]:
    """The empty caption, ``n`` times."""
    out = torch.full((n, length), PAD)
    out[:, 0] = EOS
    return out


def captions(scenes: Scenes) -> list[str]:
    """One sentence a scene.

    >>> from minilib.data.shapes.scenes import sample_scenes
    >>> captions(sample_scenes(1, torch.Generator().manual_seed(0)))
    ['large green triangle bottom left']
    """
    return [decode(row) for row in tokens(scenes)]


def decode(row: Int[Tensor, " l"]) -> str:
    """The words of one row of tokens, without ``<eos>`` and padding."""
    return " ".join(VOCABULARY[i] for i in row.tolist() if i > EOS)


def encode(caption: str, length: int = MAX_TOKENS) -> Int[Tensor, " {length}"]:
    """Tokens of any sequence of known words.

    Raises:
        ValueError: an unknown word (it is named), or more words than fit.
    """
    words = caption.lower().split()
    unknown = [word for word in words if word not in _ID]
    if unknown:
        raise ValueError(
            f"unknown word {unknown[0]!r} in {caption!r}; the words are: {' '.join(VOCABULARY[2:])}"
        )
    if len(words) + 1 > length:
        raise ValueError(f"{len(words)} words and <eos> do not fit into {length} tokens")
    ids = [_ID[word] for word in words] + [EOS]
    return torch.tensor(ids + [PAD] * (length - len(ids)))


def parse(sentences: list[str]) -> Scenes:
    """The scenes that captions describe, without jitter and stripes: the inverse of :func:`captions`.

    Raises:
        ValueError: a sentence outside the grammar; it is quoted.

    >>> parse(["small red circle top left"]).cell.tolist()
    [[0, -1, -1]]
    """
    n = len(sentences)
    fields = {k: torch.full((n, MAX_OBJECTS), -1) for k in ("shape", "colour", "size", "cell", "stripe")}
    for i, sentence in enumerate(sentences):
        objects = [part.split() for part in sentence.lower().split(" and ")]
        if len(objects) > MAX_OBJECTS:
            raise ValueError(f"{sentence!r} names {len(objects)} objects; a scene has at most {MAX_OBJECTS}")
        for slot, words in enumerate(objects):
            try:
                size, colour, shape, row, column = words
                fields["size"][i, slot] = SIZES.index(size)
                fields["colour"][i, slot] = COLOURS.index(colour)
                fields["shape"][i, slot] = SHAPES.index(shape)
                fields["cell"][i, slot] = ROWS.index(row) * len(COLUMNS) + COLUMNS.index(column)
            except ValueError as error:
                raise ValueError(
                    f"{sentence!r}: expected objects like 'small red circle top left' joined by 'and'; {error}"
                ) from None
            fields["stripe"][i, slot] = 0
    return Scenes(**fields, offset=torch.zeros(n, MAX_OBJECTS, 2), phase=torch.zeros(n, MAX_OBJECTS))
