"""Token states of real text encoders for every emoji name, computed once and vendored (the encoders weigh 90 MB each).

``minilm``: the sentence encoder all-MiniLM-L6-v2; ``smollm2``: the decoder-only language model SmolLM2-135M-Instruct. States are
128 principal components of the last layer, one a token: models attend to the tokens, never to their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minilib.data import assets, emoji, provenance
from minilib.data.images import tensor_checksum
from minilib.data.registry import SPLITS
from minilib.verified import VerificationError

ENCODERS = ("minilm", "smollm2")


@dataclass(frozen=True)
class CaptionStates:
    """States of a split's concepts: ``states`` ``(n, l, 128)``, zero where ``mask`` ``(n, l)`` is False; True is a token.

    ``concept`` holds the concept ids of the set ``emoji``, ascending. ``null`` ``(1, l, 128)`` and ``null_mask`` are the empty
    caption, for guidance. ``l`` is the same in every split. Training tokens have a mean square of 1.
    """

    name: str
    split: str
    captions: tuple[str, ...]
    states: Float[Tensor, "n l d"]
    mask: Bool[Tensor, "n l"]
    concept: Int[Tensor, " n"]
    null: Float[Tensor, "1 l d"]
    null_mask: Bool[Tensor, "1 l"]
    source: str
    licence: str
    checksum: str

    def __len__(self) -> int:
        return len(self.states)

    def of(self, concept: Int[Tensor, " m"]) -> tuple[Float[Tensor, "m l d"], Bool[Tensor, "m l"]]:
        """States and mask for concept ids, as of an image set's ``concept``.

        Raises:
            ValueError: an id is not of this split.
        """
        place = torch.searchsorted(self.concept, concept).clamp(max=len(self) - 1)
        if not torch.equal(self.concept[place], concept):
            strange = concept[self.concept[place] != concept].tolist()
            raise ValueError(f"concepts {strange[:5]} are not in the {self.split} split of {self.name}")
        return self.states[place], self.mask[place]


def caption_states(encoder: str, split: str = "train") -> CaptionStates:
    """Caption states of the concepts of a split of ``emoji``.

    Args:
        encoder: ``"minilm"`` or ``"smollm2"``.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
        KeyError: unknown encoder. ValueError: unknown split.

    >>> states = caption_states("minilm", "test")
    >>> states.captions[0], int(states.mask[0].sum()), states.states.shape[2]
    ('upside-down face', 6, 128)
    """
    if encoder not in ENCODERS:
        raise KeyError(f"unknown encoder {encoder!r}; known: {', '.join(ENCODERS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    return provenance.note(_vendored(encoder, split))


@lru_cache(maxsize=len(SPLITS) * len(ENCODERS))
def _vendored(encoder: str, split: str) -> CaptionStates:
    name = f"{encoder}_states"
    item = assets.entry(name)
    if item["emoji_sha256"] != assets.checksum("emoji"):
        raise VerificationError(
            f"{name} was built for another emoji.npz; build it again: python -m minilib.data.build {name}"
        )
    arrays, words = assets.open_npz(name), emoji.arrays()
    lengths = torch.from_numpy(arrays["lengths"]).long()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    states = torch.zeros(*mask.shape, arrays["states"].shape[1])
    states[mask] = torch.from_numpy(arrays["states"]).float()
    concept = torch.from_numpy((words["split"] == SPLITS.index(split)).nonzero()[0])
    return CaptionStates(
        name=name,
        split=split,
        captions=tuple(words["label"][concept.numpy()].tolist()),
        states=states[concept],
        mask=mask[concept],
        concept=concept,
        null=states[-1:],
        null_mask=mask[-1:],
        source=assets.source(item),
        licence=item["licence"],
        checksum=tensor_checksum(states[concept], mask[concept]),
    )
