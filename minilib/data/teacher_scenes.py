"""``teacher_scenes``: pictures that a teacher drew itself, for the pages that distil students.

Self-generated pictures need no data set, and fit what the teacher can do (CLEAR, Liu et al. 2024, arXiv 2412.16112,
section 4.1, with 10,000 of them). How they were made is in ``minilib/data/build/teacher_scenes.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minilib.data import assets, provenance
from minilib.data.images import tensor_checksum
from minilib.data.shapes import null_tokens
from minilib.losses import Times
from minilib.training import Batch, MakeBatch

NAME = "teacher_scenes"


@dataclass(frozen=True)
class TeacherScenes:
    """Pictures in [-1, 1] and the tokens of their captions; captions of the two parts are of different splits.

    ``train`` and ``held_out`` are slices into both. The rest is for the record.
    """

    images: Float[Tensor, "n 3 h w"]
    tokens: Int[Tensor, "n l"]
    train: slice
    held_out: slice
    checksum: str
    licence: str
    name: str = NAME
    split: str = "all"
    source: str = "vendored"

    def __len__(self) -> int:
        return len(self.images)


@lru_cache(maxsize=1)
def _read() -> TeacherScenes:
    arrays, entry = assets.open_npz(NAME), assets.entry(NAME)
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = torch.from_numpy(arrays["tokens"]).long()
    n = entry["train"]
    images, parts = images.contiguous(), (slice(0, n), slice(n, len(images)))
    return TeacherScenes(images, tokens, *parts, checksum=tensor_checksum(images), licence=entry["licence"])


def load_teacher_scenes() -> TeacherScenes:
    """All 1,024 pictures of 32 x 32 pixels, 896 to train on and 128 held out.

    Raises:
        VerificationError: the asset is missing or changed; the message says what to do.

    >>> scenes = load_teacher_scenes()
    >>> scenes.images[scenes.train].shape, scenes.tokens[scenes.held_out].shape
    (torch.Size([896, 3, 32, 32]), torch.Size([128, 18]))
    """
    return provenance.note(_read())


def teacher_batches(scenes: TeacherScenes, times: Times, *, caption_dropout: float = 0.1) -> MakeBatch:
    """Batches of the training part: ``x0``, ``y`` (tokens; some the empty caption), ``noise``, ``t``.

    Args:
        scenes: of :func:`load_teacher_scenes`.
        times: ``(n, generator) -> t`` on the 0..1000 scale, as in :mod:`minilib.losses`.
        caption_dropout: the probability of the empty caption, in [0, 1].

    Raises:
        ValueError: a probability outside [0, 1].
    """
    if not 0.0 <= caption_dropout <= 1.0:
        raise ValueError(f"caption_dropout is a probability; got {caption_dropout}")
    images, tokens = scenes.images[scenes.train], scenes.tokens[scenes.train]

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        pick = torch.randint(len(images), (n,), generator=generator)
        drop = torch.rand(n, 1, generator=generator) < caption_dropout
        y = torch.where(drop, null_tokens(n), tokens[pick])
        noise = torch.randn(n, *images.shape[1:], generator=generator)
        return {"x0": images[pick], "y": y, "noise": noise, "t": times(n, generator)}

    return make_batch
