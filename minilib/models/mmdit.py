"""MM-DiT, the two-stream transformer of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206).

Image patches and text tokens are two streams with their own weights, mixed in every block by one joint attention.
Time, and a pooled text vector if there is one, modulate both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from ..attention.joint import ContextIds, joint_ids, joint_mask
from ..attention.registry import Mask
from ..attention.rope import Ids, RotaryEmbedding, grid_ids, interpolated
from .dit import FinalLayer
from .layers import PatchEmbed, TimestepEmbedder
from .mmdit_blocks import CroppedPositions, MMDiTBlock, PooledEmbedder, SincosPositions

POSITIONS = ("rope", "sincos", "sincos_cropped")


class MMDiT(nn.Module):
    """A text-conditional two-stream transformer; any canvas whose sides the patch size divides.

    ``config`` rebuilds the model: ``MMDiT(**model.config)``. The blocks are ``model.blocks[i]``, each with ``.attn``,
    ``.mlp``, ``.context_mlp`` and the two modulations, for hooks to act on; a block takes and returns (image tokens,
    context tokens). ``forward`` is ``embed``, ``run_blocks``, ``read_out`` and ``unpatchify`` in this order: call
    them yourself to run some of the tokens, to append tokens of a condition, or to stop half-way.

    Args:
        sample_size: usual height and width of the image; only ``positions="sincos_cropped"`` depends on it.
        patch_size: height and width of a patch.
        in_channels: channels of the image.
        hidden_size: width of a token; a multiple of 4 and of ``num_heads``.
        depth: number of blocks. The last one reads the context and does not change it.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward networks over ``hidden_size``.
        context_dim: width of the text states.
        pooled_dim: width of the pooled text vector; None if there is none.
        qk_norm: "rms_norm" or "" (none).
        positions: "rope": queries and keys of the image turn by their (row, column); text is not turned. "sincos":
            sines and cosines of (row, column) added to the tokens. "sincos_cropped": a stored table, of which the
            canvas uses the middle (SD3).
        rope_theta: base of the rotary frequencies; 100 spreads the waves over a grid of 8 to 32 patches.
        rope_axes_dims: share of the head's width for row and column; equal if left out.
        rope_interpolation: rotary positions are divided by this. A model that goes from 8 x 8 to 16 x 16 patches sees
            familiar places with 2 (position interpolation).
        pos_embed_max_size: side of the stored table of "sincos_cropped", in patches.
        dual_attention_layers: indices of blocks with a second attention among the image tokens (SD3.5-medium).
        out_channels: channels of the prediction; ``in_channels`` if left out.
        attention: name in ``minilib.attention.attention_variants()``; ``attention_options`` are its keyword arguments.
        unused_context_query: keep weights in the last block that nothing reads, as published checkpoints do.

    Raises:
        ValueError: sizes that do not divide, or an unknown option.

    >>> model = MMDiT(hidden_size=32, depth=2, context_dim=8)
    >>> x, t, context = torch.zeros(3, 3, 8, 16), torch.tensor([0, 500, 999]), torch.zeros(3, 5, 8)
    >>> model(x, t, context).shape
    torch.Size([3, 3, 8, 16])
    """

    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 2,
        in_channels: int = 3,
        hidden_size: int = 96,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        context_dim: int = 96,
        pooled_dim: int | None = None,
        *,
        qk_norm: str = "rms_norm",
        positions: str = "rope",
        rope_theta: float = 10_000.0,
        rope_axes_dims: Sequence[int] | None = None,
        rope_interpolation: float = 1.0,
        pos_embed_max_size: int | None = None,
        dual_attention_layers: Sequence[int] = (),
        out_channels: int | None = None,
        attention: str = "full",
        attention_options: dict[str, Any] | None = None,
        unused_context_query: bool = False,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["dual_attention_layers"] = list(dual_attention_layers)
        if patch_size < 1 or num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"patch_size {patch_size} must be positive and num_heads {num_heads} divide hidden_size {hidden_size}"
            )
        self.patch_size, self.in_channels, self.hidden_size = patch_size, in_channels, hidden_size
        self.context_dim, self.pooled_dim = context_dim, pooled_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.pooled_embedder = None if pooled_dim is None else PooledEmbedder(pooled_dim, hidden_size)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        self._build_positions(positions)
        unknown = sorted(set(dual_attention_layers) - set(range(depth)))
        if unknown:
            raise ValueError(f"dual_attention_layers {unknown} do not exist: there are {depth} blocks")
        self.blocks = nn.ModuleList(
            MMDiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                context_pre_only=i == depth - 1,
                unused_context_query=unused_context_query,
                dual_attention=i in dual_attention_layers,
                attention=attention,
                attention_options=attention_options,
            )
            for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.initialize_weights()

    def _build_positions(self, positions: str) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"unknown positions {positions!r}: choose one of {list(POSITIONS)}")
        c, dim = self.config, self.hidden_size
        self.rotary = self.positions = None
        if positions != "rope" and c["rope_interpolation"] != 1.0:
            raise ValueError(f"rope_interpolation is for positions='rope', got positions={positions!r}")
        if positions == "rope":
            head_dim = dim // c["num_heads"]
            self.rotary = RotaryEmbedding(head_dim, theta=c["rope_theta"], axes_dims=c["rope_axes_dims"])
            self.rotary.scaling = interpolated(c["rope_interpolation"])
        elif positions == "sincos":
            self.positions = SincosPositions(dim)
        elif c["pos_embed_max_size"] is None:
            raise ValueError(
                "positions='sincos_cropped' needs pos_embed_max_size, the side of the table in patches"
            )
        else:
            self.positions = CroppedPositions(
                dim, c["pos_embed_max_size"], c["sample_size"] // self.patch_size
            )

    def initialize_weights(self) -> None:
        """As DiT: the residual branches of both streams and the output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedders = [self.t_embedder] + ([] if self.pooled_embedder is None else [self.pooled_embedder])
        for linear in (part for embedder in embedders for part in (embedder.fc1, embedder.fc2)):
            nn.init.normal_(linear.weight, std=0.02)
        modulations = [m for b in self.blocks for m in (b.adaLN_modulation, b.context_adaLN_modulation)]
        for linear in (*modulations, self.final_layer.adaLN_modulation, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> "MMDiT":
        """An MM-DiT with the shape of a diffusers ``SD3Transformer2DModel`` with this ``config``, weights fresh.

        ``minilib.models.convert_mmdit.mmdit_from_diffusers`` also loads the weights.

        Raises:
            ConversionError: an option that minilib's MM-DiT has not.
        """
        from .mmdit_configs import mmdit_config_from_diffusers

        return cls(**mmdit_config_from_diffusers(config))

    def position_ids(
        self, height: int, width: int, *, device: torch.device | None = None
    ) -> Int[Tensor, "n 2"]:
        """(row, column) of each patch of a canvas of ``height`` x ``width`` patches, in raster order.

        They count from 0, or, for "sincos_cropped", from where the canvas begins in the table.
        """
        ids = grid_ids(height, width, device=device)
        if isinstance(self.positions, CroppedPositions):
            ids = ids + torch.tensor(self.positions.offset(height, width), device=device)
        return ids

    def embed(self, x: Float[Tensor, "b c h w"], position_ids: Ids | None = None) -> Float[Tensor, "b n d"]:
        """Image tokens in raster order, with their positions added unless these are rotary.

        Raises:
            ValueError: other channels than the model's, sides that the patch size does not divide, or ids that do
                not number the tokens.
        """
        height, width = self._grid(x)
        tokens = self.x_embedder(x)
        if self.positions is None:
            return tokens
        ids = self.position_ids(height, width, device=x.device) if position_ids is None else position_ids
        _check_ids(ids, height * width)
        return tokens + self.positions(ids).to(tokens.dtype)

    def embed_context(self, context: Float[Tensor, "b l d_text"]) -> Float[Tensor, "b l d"]:
        """Context tokens in the model's width.

        Raises:
            ValueError: states of another width.
        """
        if context.shape[-1] != self.context_dim:
            raise ValueError(
                f"context of width {context.shape[-1]} given, this model takes {self.context_dim}"
            )
        return self.context_embedder(context)

    def embed_condition(
        self, t: Num[Tensor, " b"], pooled: Float[Tensor, "b p"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Time embedding, plus that of the pooled text. Blocks and ``read_out`` take its SiLU.

        Raises:
            ValueError: pooled text missing, unexpected or of another width.
        """
        given = None if pooled is None else pooled.shape[-1]
        if given != self.pooled_dim:
            raise ValueError(f"pooled text of width {given} given, this model takes {self.pooled_dim}")
        c = self.t_embedder(t)
        return c if pooled is None else c + self.pooled_embedder(pooled)

    def run_blocks(
        self,
        h: Float[Tensor, "b n d"],
        c: Float[Tensor, "b d"] | Float[Tensor, "b g d"],
        context: Float[Tensor, "b l d"],
        position_ids: Ids,
        *,
        context_mask: Bool[Tensor, "b l"] | None = None,
        context_ids: ContextIds | None = None,
        mask: Mask | None = None,
        groups: Int[Tensor, " n"] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"]]:
        """Run blocks ``start`` to ``stop`` (not included; all by default) on any set of image tokens.

        Args:
            h: image tokens, all or some of them, and any tokens that go with the image stream.
            c: SiLU of ``embed_condition``; (b, g, d) for several conditions.
            context: context tokens, as ``embed_context`` gives them.
            position_ids: (row, column) of each token in ``h``, fractions allowed. Only rotary positions use them here.
            context_mask: True for a real token; others are never keys.
            context_ids: rotary positions of the context, if it has any.
            mask: further boolean mask, broadcasting to (b, heads, n + l, n + l): image tokens first.
            groups: for several conditions, which of them modulates which token of ``h``; the context has the first.
            start: first block.
            stop: the block to stop before.

        Returns:
            both streams.

        Raises:
            ValueError: ids that do not number the tokens.
        """
        _check_ids(position_ids, h.shape[1])
        if context_mask is not None:
            readable = joint_mask(h.shape[1], context_mask)
            mask = readable if mask is None else mask & readable
        rotary = None if self.rotary is None else self.rotary(joint_ids(position_ids, context_ids, context))
        for block in self.blocks[start:stop]:
            h, context = block(h, context, c, mask=mask, rotary=rotary, groups=groups)
        return h, context

    def read_out(self, h: Float[Tensor, "b n d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b n f"]:
        """Tokens to flattened patches of the prediction; ``c`` is the SiLU of ``embed_condition``."""
        return self.final_layer(h, c)

    def unpatchify(self, tokens: Float[Tensor, "b n f"], height: int, width: int) -> Float[Tensor, "b c h w"]:
        """Put ``height`` x ``width`` patches, each flattened in the order (row, column, channel), back into an image."""
        p = self.patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Num[Tensor, " b"],
        context: Float[Tensor, "b l d_text"],
        context_mask: Bool[Tensor, "b l"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
        *,
        position_ids: Ids | None = None,
        context_ids: ContextIds | None = None,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b c_out h w"]:
        """Predict the velocity of a rectified flow, or whatever the loss asked for.

        Args:
            x: noisy images.
            t: times on the scale 0 to 1000.
            context: text states.
            context_mask: True for a real token; None if all are.
            pooled: one vector for the whole text, if the model takes one.
            position_ids: (row, column) of each patch instead of its place on the canvas, fractions allowed; for
                "sincos_cropped" whole numbers that count in the table.
            context_ids: rotary positions of the context; not turned if left out.
            mask: see ``run_blocks``.

        Raises:
            ValueError: a shape that the model does not take.
        """
        height, width = self._grid(x)
        ids = self.position_ids(height, width, device=x.device) if position_ids is None else position_ids
        c = F.silu(self.embed_condition(t, pooled))
        h, _ = self.run_blocks(
            self.embed(x, ids),
            c,
            self.embed_context(context),
            ids,
            context_mask=context_mask,
            context_ids=context_ids,
            mask=mask,
        )
        return self.unpatchify(self.read_out(h, c), height, width)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        channels, height, width = x.shape[1:]
        p = self.patch_size
        if channels != self.in_channels or height % p or width % p:
            raise ValueError(
                f"images of shape {(channels, height, width)} given, this model takes {self.in_channels} channels "
                f"and sides that are multiples of {p}"
            )
        return height // p, width // p


def _check_ids(ids: Tensor, n: int) -> None:
    if ids.shape[-2] != n:
        raise ValueError(f"{ids.shape[-2]} position ids given for {n} image tokens")
