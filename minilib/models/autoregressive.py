"""A decoder-only transformer over discrete tokens, with prefill and decoding: what an autoregressive image model runs.

Wiring as in GPT-2 (norm before each branch, GELU), over image tokens as in Parti (Yu et al. 2022, arXiv 2206.10789) and
LlamaGen (Sun et al. 2024, arXiv 2406.06525). Positions are fixed sines and cosines.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..attention.causal import CausalAttention, KVCache
from .layers import GeluMLP
from .positions import sincos_1d

#: LlamaGen's widths, depths, heads (FoundationVision/LlamaGen: autoregressive/models/gpt.py); 16384 codes, 576 tokens (24 x 24).
AUTOREGRESSIVE_CONFIGS = {
    f"LlamaGen-{name}": {
        "vocab_size": 16384,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "max_length": 576,
    }
    for name, width, depth, heads in (
        ("B", 768, 12, 12),
        ("L", 1024, 24, 16),
        ("XL", 1280, 36, 20),
    )
}


class CausalBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); a token sees itself and those before it."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GeluMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b n d"], cache: KVCache | None = None) -> Float[Tensor, "b n d"]:
        """Transform the tokens ``x``, which follow those in ``cache``."""
        x = x + self.attn(self.norm1(x), cache=cache)
        return x + self.mlp(self.norm2(x))


class AutoregressiveTransformer(nn.Module):
    """Predicts each token from those before it.

    ``config`` rebuilds the model. In *prefill* all known tokens go through at once, and keys and values are kept; in
    *decoding* one token at a time does, as the next one depends on it.

    Args:
        vocab_size: number of different tokens: codes of an image tokeniser, and classes or words in front of them.
        hidden_size: width of a token; even, and a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        max_length: the longest sequence.
        mlp_ratio: hidden width of the feed-forward network over ``hidden_size``.

    Raises:
        ValueError: sizes that do not divide.

    >>> model = AutoregressiveTransformer(vocab_size=10, hidden_size=16, depth=2, num_heads=2, max_length=6)
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    >>> model.generate(torch.tensor([[7]]), 6, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([1, 6])
    """

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 96,
        depth: int = 4,
        num_heads: int = 4,
        max_length: int = 256,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if min(vocab_size, depth, max_length) < 1:
            raise ValueError(
                f"vocabulary, depth and length have to be positive; got {vocab_size}, {depth} and {max_length}"
            )
        self.max_length, self.vocab_size = max_length, vocab_size
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        positions = sincos_1d(torch.arange(max_length), hidden_size).float()
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(
            CausalBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)

    def make_caches(self, batch: int, capacity: int | None = None) -> list[KVCache]:
        """Empty caches, one a block, with room for ``capacity`` tokens (None: the longest sequence)."""
        heads, weight = self.config["num_heads"], self.head.weight
        size = (batch, heads, capacity or self.max_length, weight.shape[1] // heads)
        return [KVCache(*size, dtype=weight.dtype, device=weight.device) for _ in self.blocks]

    def features(
        self, tokens: Int[Tensor, "b n"], caches: Sequence[KVCache] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The normalised tokens after the last block; ``tokens`` follow those in the ``caches``, to which they are added.

        Raises:
            ValueError: longer than ``max_length``, or not one cache a block.
        """
        if caches is not None and len(caches) != len(self.blocks):
            raise ValueError(
                f"{len(caches)} caches given: this model needs one for each of {len(self.blocks)} blocks"
            )
        start = 0 if caches is None else len(caches[0])
        end = start + tokens.shape[1]
        if end > self.max_length:
            raise ValueError(f"a sequence of {end} tokens given, this model's longest has {self.max_length}")
        x = self.embedding(tokens) + self.positions[start:end]
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return self.norm(x)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """Logits of the token after each of ``tokens``, as in training."""
        return self.head(self.features(tokens))

    @torch.no_grad()
    def prefill(self, tokens: Int[Tensor, "b n"], caches: Sequence[KVCache]) -> Float[Tensor, "b v"]:
        """Run all ``tokens`` at once into the caches; logits of the token after the last."""
        return self.head(self.features(tokens, caches)[:, -1])

    @torch.no_grad()
    def decode(self, token: Int[Tensor, " b"], caches: Sequence[KVCache]) -> Float[Tensor, "b v"]:
        """Run one token a sequence: one query, and as many keys as there are tokens so far; logits of the next."""
        return self.prefill(token[:, None], caches)

    @torch.no_grad()
    def generate(
        self, prompt: Int[Tensor, "b n"], length: int, *, generator: torch.Generator, temperature: float = 1.0
    ) -> Int[Tensor, "b length"]:
        """Continue ``prompt`` to ``length`` tokens: one prefill, then decoding.

        Args:
            prompt: at least one token.
            length: of the result, the prompt included.
            generator: draws the tokens.
            temperature: divides the logits; 0 takes the likeliest token.

        Raises:
            ValueError: an empty prompt, a length below its own, or a negative temperature.
        """
        if prompt.shape[1] < 1 or length < prompt.shape[1] or temperature < 0:
            raise ValueError(
                f"need a prompt of 1 to {length} tokens and a temperature >= 0; got {prompt.shape[1]} and {temperature}"
            )
        tokens, caches = prompt, self.make_caches(len(prompt), length)
        if length > prompt.shape[1]:
            logits = self.prefill(prompt, caches)
        while tokens.shape[1] < length:
            if tokens.shape[1] > prompt.shape[1]:
                logits = self.decode(tokens[:, -1], caches)
            tokens = torch.cat([tokens, _draw(logits, temperature, generator)], dim=1)
        return tokens


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
