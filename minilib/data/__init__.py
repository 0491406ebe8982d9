"""Data sets behind one call: real ones vendored with licence and checksum, generated ones exact.

>>> digits = load("digits", "train")
>>> tuple(digits.x.shape), digits.num_classes
((1248, 1, 8, 8), 10)
"""

import lazy_loader as lazy

# A function with its module's name: imported here, or whoever imports the module first would put the module in its place.
from minilib.data.toy2d import toy2d  # noqa: F401

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["bounce", "glyphs", "mnist", "moving_mnist", "shapes"],
    submod_attrs={
        "emoji": ["CaptionedImageSet"],
        "furniture": ["FurnitureClouds", "FurnitureViews"],
        "images": ["ImageSet", "load", "names"],
        "photos": ["PhotoSet", "stereo"],
        "text_states": ["CaptionStates", "caption_states"],
        "toy2d": ["Empirical", "GaussianMixture", "toy2d"],
    },
)
