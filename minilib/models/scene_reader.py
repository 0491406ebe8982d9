"""Reads a *caption* of ``minilib.data.shapes``: which object it puts into each of the nine cells."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilib.attention.cross import CrossAttention
from minilib.models.scene_oracle import HEADS, most_likely_grid
from minilib.models.text import TextEncoder

CELLS = 9


class SceneReader(nn.Module):
    """A text encoder, and one layer of cross-attention from nine learned queries, one a cell, to its states.

    To answer, a state of the encoder has to say which place its word belongs to: the binding of words that a denoiser needs,
    learned from text alone. ``text_encoder`` is what a denoiser takes over.

    Args:
        text: keyword arguments of ``TextEncoder``.
        num_heads: heads of the cross-attention.

    >>> reader = SceneReader(text={"vocab_size": 21, "max_length": 6, "dim": 16})
    >>> reader(torch.tensor([[3, 5, 11, 15, 18, 1]]))["shape"].shape
    torch.Size([1, 9, 6])
    """

    def __init__(self, text: dict[str, Any], num_heads: int = 4) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(**text)
        self.config = {"text": self.text_encoder.config, "num_heads": num_heads}
        dim = self.text_encoder.dim
        self.queries = nn.Parameter(torch.randn(CELLS, dim))
        self.attn = CrossAttention(dim, dim, num_heads)
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, answers) for name, answers in HEADS.items()})

    def forward(self, tokens: Int[Tensor, "b l"]) -> dict[str, Float[Tensor, "b 9 _"]]:
        """Logits by head, in the form of ``SceneOracle``'s: the same loss trains both."""
        states = self.text_encoder(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        hidden = self.norm(self.attn(queries, states.context, context_mask=states.context_mask))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, tokens: Int[Tensor, "b l"]) -> Int[Tensor, "b 9 4"]:
        """(shape, colour, size, stripe) of each cell, -1 where it is empty: the form of ``Scenes.grid()``."""
        return most_likely_grid(self(tokens))
