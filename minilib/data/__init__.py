"""Data sets behind one call: real ones vendored with licence and checksum, generated ones exact.

>>> digits = load("digits", "train")
>>> tuple(digits.x.shape), digits.num_classes
((1248, 1, 8, 8), 10)
"""

from minilib.data.images import ImageSet, load, names
from minilib.data.toy2d import Empirical, GaussianMixture, toy2d

__all__ = ["Empirical", "GaussianMixture", "ImageSet", "load", "names", "toy2d"]
