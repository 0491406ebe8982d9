"""Caption states: the last layer's token states of a real text encoder for every emoji name, reduced to 128 principal components.

The basis is fitted on the training concepts alone, on every token but the first (which is the same in all captions), and all
coordinates are divided by one number, so that the training tokens have a mean square of 1. Floating-point sums differ between
machines, so a rebuild elsewhere agrees to about three digits, not to the byte.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from minilib.data import assets
from minilib.data.build.tools import Built, Source, npz_bytes

COMPONENTS = 128


def unpacked(wheel: Path, prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder with the members of a wheel below ``prefix``."""
    folder = tempfile.TemporaryDirectory(prefix="states.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder.name, [name for name in archive.namelist() if name.startswith(prefix)])
    return folder


def all_states(
    encode: Callable[[torch.Tensor], torch.Tensor], ids: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Token states ``(l, d)`` of every caption. Captions of one length share a batch, so nothing is padded."""
    out: dict[int, np.ndarray] = {}
    for length in sorted({len(row) for row in ids}):
        places = [i for i, row in enumerate(ids) if len(row) == length]
        for start in range(0, len(places), 32):
            batch = places[start : start + 32]
            with torch.inference_mode():
                states = encode(torch.tensor([list(ids[i]) for i in batch]))
            out.update(zip(batch, states.double().numpy(), strict=True))
    return [out[i] for i in range(len(ids))]


def basis(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``(d,)`` and principal directions ``(d, 128)`` of tokens ``(n, d)``; each one's largest entry is positive."""
    mean = tokens.mean(0)
    values, vectors = np.linalg.eigh(np.cov(tokens - mean, rowvar=False))
    vectors = vectors[:, np.argsort(values)[::-1][:COMPONENTS]]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    return mean, vectors * signs


def kept(tokens: np.ndarray, mean: np.ndarray, vectors: np.ndarray) -> float:
    """Share of the tokens' squared distance from the mean that the basis keeps."""
    return float((((tokens - mean) @ vectors) ** 2).sum() / ((tokens - mean) ** 2).sum())


def reduced(
    states: list[np.ndarray], split: np.ndarray, what: str, licence: str, credit: str, source: Source
) -> Built:
    """The asset from the states of all captions; the last one is the empty caption."""
    train = np.concatenate([state[1:] for state, part in zip(states, split, strict=False) if part == 0])
    test = np.concatenate([state[1:] for state, part in zip(states, split, strict=False) if part == 2])
    mean, vectors = basis(train)
    scale = float(np.sqrt((((train - mean) @ vectors) ** 2).mean()))
    lengths = np.array([len(state) for state in states], dtype=np.uint8)
    values = (np.concatenate(states) - mean) @ vectors / scale
    arrays = {
        "states": values.astype(np.float16),
        "lengths": lengths,
        "mean": mean.astype(np.float32),
        "basis": vectors.astype(np.float16),
        "scale": np.array(scale, dtype=np.float32),
    }
    return Built(
        suffix=".npz",
        data=npz_bytes(arrays),
        what=what,
        licence=licence,
        credit=credit,
        sources=(source,),
        extra={
            "captions": len(states) - 1,
            "width": len(mean),
            "components": COMPONENTS,
            "max_tokens": int(lengths.max()),
            "variance_kept_train": round(kept(train, mean, vectors), 4),
            "variance_kept_test": round(kept(test, mean, vectors), 4),
            "emoji_sha256": assets.checksum("emoji"),
        },
    )


def captions() -> tuple[list[str], np.ndarray]:
    """Names of all emoji concepts with the empty caption last, and the concepts' split codes."""
    arrays = assets.open_npz("emoji")
    return [str(label) for label in arrays["label"]] + [""], arrays["split"]
