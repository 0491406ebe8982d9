"""``shapes``: generated scenes with exact truth. One to three objects with shape, colour, size and place; a caption; masks.

>>> import torch
>>> scenes = sample_scenes(2, torch.Generator().manual_seed(1), objects=(2, 2))
>>> captions(scenes)[0]
'small magenta cross bottom left and large yellow circle top right'
>>> render(scenes, 32).shape
torch.Size([2, 3, 32, 32])
"""

from minilib.data.shapes.grammar import (
    MAX_TOKENS,
    VOCABULARY,
    captions,
    decode,
    encode,
    null_tokens,
    parse,
    tokens,
)
from minilib.data.shapes.render import Layers, render, render_layers
from minilib.data.shapes.scenes import (
    CELLS,
    COLOURS,
    COLUMNS,
    MAX_OBJECTS,
    ROWS,
    SHAPES,
    SIZES,
    STRIPES,
    Scenes,
    concatenate,
    placements,
    sample_scenes,
    split_of,
    swap_pairs,
)
from minilib.data.shapes.sets import SceneSet

__all__ = [
    "CELLS", "COLOURS", "COLUMNS", "MAX_OBJECTS", "MAX_TOKENS", "ROWS", "SHAPES", "SIZES", "STRIPES", "VOCABULARY",
    "Layers", "SceneSet", "Scenes", "captions", "concatenate", "decode", "encode", "null_tokens", "parse", "placements", "render",
    "render_layers", "sample_scenes", "split_of", "swap_pairs", "tokens",
]  # fmt: skip
