"""A small text encoder, and the wrapper that makes a text-conditioned denoiser look like a class-conditional one.

Tokens are integers; 0 is padding, always at the end. Training and guidance pass token rows around where they would pass
labels: ``model(x, t, tokens)``. The first token of a row always counts, even if it is padding. So a row of zeros is
a legal, empty prompt, which reads as one token: it is the null prompt unless ``null_token`` names another token
(the end mark, say), which then stands alone in front of the padding.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from ..attention import Attention
from .layers import GeluMLP
from .mmdit import MMDiT
from .positions import sincos_1d
from .unet import UNet

PAD = 0


class TextStates(NamedTuple):
    """What a denoiser reads of a text; the names are those of its arguments."""

    context: Float[Tensor, "b l d"]
    context_mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b d"]


def token_mask(tokens: Int[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
    """True for a real token; the first one always counts, so that no row is empty.

    >>> token_mask(torch.tensor([[5, 2, 0], [0, 0, 0]]))
    tensor([[ True,  True, False],
            [ True, False, False]])
    """
    mask = tokens != PAD
    mask[:, 0] = True
    return mask


class TextBlock(nn.Module):
    """Self-attention and a GELU network, each after a layer norm and each added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GeluMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b 1 1 l"]) -> Float[Tensor, "b l d"]:
        """Transform the tokens; none reads where ``mask`` is False."""
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Token embeddings plus positions, bidirectional transformer blocks, a last layer norm.

    ``config`` rebuilds it: ``TextEncoder(**encoder.config)``. Embeddings start at unit variance, the scale of the
    positions.

    Args:
        vocab_size: number of token ids, padding (0) included.
        max_length: longest row of tokens.
        dim: width of a state; even for sine-cosine positions.
        depth: transformer blocks.
        num_heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden width of the feed-forward network over ``dim``.
        positions: 'sincos' (fixed, unit scale) or 'learned'.
        null_token: the one token of the null prompt; 0: a row of padding.

    Raises:
        ValueError: sizes that do not divide, unknown ``positions``, a ``null_token`` outside the vocabulary.

    >>> encoder = TextEncoder(vocab_size=30, max_length=6, dim=16)
    >>> states = encoder(torch.tensor([[5, 2, 7, 0, 0, 0]]))
    >>> states.context.shape, states.pooled.shape
    (torch.Size([1, 6, 16]), torch.Size([1, 16]))
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        dim: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        positions: str = "sincos",
        null_token: int = PAD,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if positions not in ("sincos", "learned"):
            raise ValueError(f"unknown positions {positions!r}: choose 'sincos' or 'learned'")
        if not 0 <= null_token < vocab_size:
            raise ValueError(f"null_token {null_token} is outside the vocabulary of {vocab_size} tokens")
        self.vocab_size, self.max_length, self.dim = vocab_size, max_length, dim
        self.token_embedding = nn.Embedding(vocab_size, dim)
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.randn(max_length, dim) * dim**-0.5)
        else:
            fixed = sincos_1d(torch.arange(max_length), dim).float()
            self.register_buffer("pos_embed", fixed, persistent=False)
        self.blocks = nn.ModuleList(TextBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.final_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Int[Tensor, "b l"]) -> TextStates:
        """Encode rows of tokens.

        Returns:
            the states (b, l, dim), the mask (b, l) that is False on padding, and the state of the last real token
            (b, dim). States under the padding mean nothing; whoever reads the states has to use the mask.

        Raises:
            ValueError: a row longer than ``max_length``, an empty row, or a token outside the vocabulary (seen on a CPU).
        """
        length = tokens.shape[1]
        if not 1 <= length <= self.max_length:
            raise ValueError(f"rows of {length} tokens given, this encoder reads 1 to {self.max_length}")
        mask = token_mask(tokens)
        try:
            x = self.token_embedding(tokens) + self.pos_embed[:length]
        except IndexError as error:
            raise ValueError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())}; this encoder knows 0 to {self.vocab_size - 1}"
            ) from error
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        x = self.final_norm(x)
        last = (mask * torch.arange(length, device=mask.device)).argmax(dim=1)
        return TextStates(x, mask, x[torch.arange(len(x), device=x.device), last])

    def null_tokens(self, b: int, length: int | None = None) -> Int[Tensor, "b l"]:
        """``b`` rows of the null prompt, each of ``length`` tokens (None: ``max_length``)."""
        tokens = torch.full((b, length or self.max_length), PAD, device=self.token_embedding.weight.device)
        tokens[:, 0] = self.config["null_token"]
        return tokens


class TextConditioned(nn.Module):
    """A denoiser with its own text encoder: ``model(x, t, tokens)``.

    The denoiser is called as ``denoiser(x, t, context, context_mask, pooled)``; its ``pooled_dim`` says whether it
    reads a pooled vector. A subclass builds both parts from plain dictionaries and sets ``config``, so that the zoo
    can rebuild it.
    """

    config: dict[str, Any]

    def __init__(self, denoiser: nn.Module, text_encoder: TextEncoder) -> None:
        super().__init__()
        if denoiser.pooled_dim and denoiser.pooled_dim != text_encoder.dim:
            raise ValueError(
                f"pooled_dim is {denoiser.pooled_dim}, the text encoder's states have width {text_encoder.dim}"
            )
        self.denoiser = denoiser
        self.text_encoder = text_encoder

    def encode_text(self, tokens: Int[Tensor, "b l"]) -> TextStates:
        """States, mask and pooled vector of rows of tokens: encode a text once, and hand them to ``forward`` at each step."""
        return self.text_encoder(tokens)

    def null_tokens(self, b: int, length: int | None = None) -> Int[Tensor, "b l"]:
        """``b`` rows of the null prompt: what a dropped caption becomes in training, and what guidance moves away from."""
        return self.text_encoder.null_tokens(b, length)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Num[Tensor, " b"],
        tokens: Int[Tensor, "b l"] | None = None,
        *,
        context: Float[Tensor, "b l d_text"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
        pooled: Float[Tensor, "b d_pooled"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b c_out h w"]:
        """Predict for noisy images ``x`` at times ``t`` (0 to 1000) under texts, given as tokens or as states.

        Args:
            x: noisy images.
            t: times.
            tokens: rows of token ids, in place of labels; None if ``context`` is given.
            context: states as ``encode_text`` gives them, or edited ones; ``context_mask`` and ``pooled`` belong to them.
            context_mask: True for a real token; None: all are.
            pooled: one vector a text; left alone if the denoiser does not read it.
            options: further arguments of the denoiser.

        Raises:
            ValueError: both or neither of ``tokens`` and ``context``, or a mask or pooled vector beside ``tokens``.

        >>> model = TextUNet(text={"vocab_size": 30, "max_length": 6, "dim": 24}, unet={})
        >>> x, t, tokens = torch.zeros(1, 3, 16, 16), torch.tensor([500]), torch.tensor([[5, 2, 7, 0, 0, 0]])
        >>> states = model.encode_text(tokens)
        >>> torch.equal(model(x, t, tokens), model(x, t, **states._asdict()))
        True
        """
        if (tokens is None) == (context is None):
            raise ValueError("give tokens or context, one of the two; 'no text' is model.null_tokens(b)")
        if tokens is not None:
            if context_mask is not None or pooled is not None:
                raise ValueError("context_mask and pooled go with context; tokens bring their own")
            context, context_mask, pooled = self.encode_text(tokens)
        return self.denoiser(
            x, t, context, context_mask, pooled if self.denoiser.pooled_dim else None, **options
        )


class TextUNet(TextConditioned):
    """A ``UNet`` with its ``TextEncoder``; ``TextUNet(**model.config)`` rebuilds it.

    Args:
        text: keyword arguments of ``TextEncoder``.
        unet: keyword arguments of ``UNet``. ``cross_attention_dim`` is the text's ``dim``; so is ``pooled_dim``, if used.

    Raises:
        ValueError: widths that do not fit.

    >>> model = TextUNet(text={"vocab_size": 30, "max_length": 6, "dim": 24}, unet={"attention_positions": True})
    >>> model(torch.zeros(2, 3, 16, 16), torch.tensor([0, 500]), model.null_tokens(2)).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(self, text: dict[str, Any], unet: dict[str, Any]) -> None:
        encoder = TextEncoder(**text)
        denoiser = UNet(**{"cross_attention_dim": encoder.dim, **unet})
        _check_width("cross_attention_dim", denoiser.cross_attention_dim, encoder)
        super().__init__(denoiser, encoder)
        self.config = {"text": encoder.config, "unet": denoiser.config}


class TextMMDiT(TextConditioned):
    """An ``MMDiT`` with its ``TextEncoder``; ``TextMMDiT(**model.config)`` rebuilds it.

    Args:
        text: keyword arguments of ``TextEncoder``.
        mmdit: keyword arguments of ``MMDiT``. ``context_dim`` is the text's ``dim``; so is ``pooled_dim``, if used.

    Raises:
        ValueError: widths that do not fit.
    """

    def __init__(self, text: dict[str, Any], mmdit: dict[str, Any]) -> None:
        encoder = TextEncoder(**text)
        denoiser = MMDiT(**{"context_dim": encoder.dim, **mmdit})
        _check_width("context_dim", denoiser.context_dim, encoder)
        super().__init__(denoiser, encoder)
        # TOML has no null: a value that is None is left out, and is None again when the model is rebuilt.
        kept = {name: value for name, value in denoiser.config.items() if value is not None}
        self.config = {"text": encoder.config, "mmdit": kept}


def _check_width(name: str, width: int, encoder: TextEncoder) -> None:
    if width != encoder.dim:
        raise ValueError(f"{name} is {width}, the text encoder's states have width {encoder.dim}")
