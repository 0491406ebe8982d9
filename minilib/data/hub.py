"""Full data sets from the Hugging Face hub, for ``gpu`` runs. Needs the package ``datasets`` and a network."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilib.data.registry import HubError


def table(repository: str, split: str) -> Any:
    """A split of a hub data set: an object whose columns are had by name (``rows["image"]``).

    Raises:
        HubError: ``datasets`` is not installed, or the hub does not answer, or has no such split.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HubError(
            f"{repository} is on the Hugging Face hub, which needs the package 'datasets': pip install datasets"
        ) from error
    try:
        return load_dataset(repository, split=split)
    except Exception as error:  # the client raises a dozen unrelated types for "no network"
        raise HubError(
            f"{repository} ({split}) cannot be read from the Hugging Face hub: {type(error).__name__}: {error}"
        ) from error


def square(picture: Any, side: int) -> np.ndarray:
    """A PIL picture as ``(side, side, 3)`` uint8: the largest central square, scaled with antialiasing."""
    from PIL import ImageOps

    return np.asarray(ImageOps.fit(picture.convert("RGB"), (side, side)))
