"""The text-conditioned U-Net of latent diffusion and Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752).

Encoder, middle and decoder can be called apart, at the grain of single skip connections. The encoder is a list of
*down units*, each of which makes one skip: ``conv_in``; then each residual block with its attention; then each downsampler. The
decoder is a list of *up units*, each of which consumes one skip: a residual block, its attention, and at the end of a level the
upsampler. There are as many of the one as of the other, and up unit j consumes skip ``num_skips - 1 - j``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from .positions import timestep_embedding
from .unet_blocks import GroupNorm, TimestepMLP
from .unet_stages import StageBuilder, Unit, down_units, join, up_units


class UNet(nn.Module):
    """A U-Net that reads text through cross-attention.

    ``config`` rebuilds the model: ``UNet(**model.config)``. A batch of any height and width will do, also an odd
    one: the model is convolutional, and ``sample_size`` only says what it was made for. Second convolutions,
    the transformers' ``proj_out`` and the last convolution start at zero, as in latent diffusion.

    Args:
        sample_size: side of the images it is meant for; information only.
        in_channels: channels of the input (more than the image has, if a mask or an image is concatenated).
        out_channels: channels of the prediction.
        block_out_channels: width of each level; each level but the last halves the resolution.
        layers_per_block: residual blocks a level (one more in the decoder).
        attention_levels: indices of the levels with transformers; the middle always has one.
        num_heads: attention heads, one number or one a level; Stable Diffusion 1 has 8 everywhere.
        transformer_layers: transformer blocks in each transformer, one number or one a level.
        cross_attention_dim: width of the text states; 0: no text, self-attention only.
        norm_num_groups: groups of the group norms; must divide every width.
        norm_eps: epsilon of the residual blocks' norms and the last one.
        attention_positions: add fixed 2-D sine-cosine positions to the tokens of each transformer. Stable
            Diffusion has none; a small model learns places from text far faster with them.
        pooled_dim: width of a pooled text vector, which is embedded and added to the time embedding; 0: none.
        patch_size: cut the image into patches of this size first, the pixels of one becoming channels, and put
            them together at the end: a 32-pixel image costs what a 16-pixel one does. Stable Diffusion has 1.

    Raises:
        ValueError: widths, heads and groups that do not divide, levels that do not exist, lists of another length.

    >>> model = UNet(cross_attention_dim=24, attention_positions=True)
    >>> model(torch.zeros(2, 3, 16, 16), torch.tensor([0, 500]), torch.zeros(2, 5, 24)).shape
    torch.Size([2, 3, 16, 16])
    >>> emb = model.embed(torch.tensor([500]))
    >>> h, skips = model.encode(torch.zeros(1, 3, 16, 16), emb, torch.zeros(1, 5, 24), stop=3)
    >>> len(skips), model.num_skips
    (3, 9)
    """

    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (32, 64, 64),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (1, 2),
        num_heads: int | Sequence[int] = 4,
        transformer_layers: int | Sequence[int] = 1,
        cross_attention_dim: int = 64,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-5,
        attention_positions: bool = False,
        pooled_dim: int = 0,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.config = {k: _plain(v) for k, v in locals().items() if k not in ("self", "__class__")}
        widths = tuple(block_out_channels)
        build = StageBuilder(
            widths,
            layers_per_block,
            tuple(attention_levels),
            _per_level(num_heads, len(widths)),
            _per_level(transformer_layers, len(widths)),
            cross_attention_dim,
            norm_num_groups,
            norm_eps,
            attention_positions,
        )
        self.in_channels, self.out_channels, self.patch_size = in_channels, out_channels, patch_size
        self.cross_attention_dim, self.pooled_dim = cross_attention_dim, pooled_dim
        self.num_skips = len(widths) * (layers_per_block + 1)
        self.time_embedding = TimestepMLP(widths[0], build.emb_dim)
        if pooled_dim:
            self.pooled_embedding = TimestepMLP(pooled_dim, build.emb_dim)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(build.down(level) for level in range(len(widths)))
        self.mid_block = build.mid()
        self.up_blocks = nn.ModuleList(build.up(level) for level in reversed(range(len(widths))))
        self.conv_norm_out = GroupNorm(norm_num_groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> "UNet":
        """An untrained model of the configuration of a ``UNet2DConditionModel`` (the ``unet/config.json`` of SD 1.5, say).

        Raises:
            minilib.models.ConversionError: an option that this U-Net does not have.
        """
        from .convert_unet import unet_config_from_diffusers

        return cls(**unet_config_from_diffusers(config))

    @property
    def down_units(self) -> list[Unit]:
        """The units of the encoder, in order; unit i makes skip i."""
        return down_units(self.conv_in, self.down_blocks)

    @property
    def up_units(self) -> list[Unit]:
        """The units of the decoder, in order; unit j consumes skip ``num_skips - 1 - j``."""
        return up_units(self.up_blocks)

    @property
    def skip_of_up_unit(self) -> tuple[int, ...]:
        """The index of the skip that each up unit consumes: the last one made comes first."""
        return tuple(reversed(range(self.num_skips)))

    def embed(
        self, t: Num[Tensor, " b"], pooled: Float[Tensor, "b d_pooled"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The embedding of the times ``t`` (0 to 1000), and of the pooled text if the model reads it, after SiLU.

        Raises:
            ValueError: a pooled vector is missing, unexpected or of another width.
        """
        waves = timestep_embedding(t, self.time_embedding.linear_1.in_features)
        emb = self.time_embedding(waves.to(self.time_embedding.linear_1.weight.dtype))
        given = 0 if pooled is None else pooled.shape[-1]
        if given != self.pooled_dim:
            raise ValueError(
                f"pooled text of width {given} given (0: none), this model reads width {self.pooled_dim}"
            )
        if pooled is not None:
            emb = emb + self.pooled_embedding(pooled)
        return F.silu(emb)

    def encode(
        self,
        x: Float[Tensor, "b c h w"],
        emb: Float[Tensor, "b d"],
        context: Float[Tensor, "b l d_text"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
        *,
        stop: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the first ``stop`` down units (None: all).

        Returns:
            the features after the last unit that ran, and the skips, one a unit: ``skips[i]`` comes from
            ``down_units[i]``. Nothing modifies them afterwards, so they may be kept.

        Raises:
            ValueError: an image of another number of channels, text that does not fit, ``stop`` outside 1..num_skips.
        """
        stop = self.num_skips if stop is None else stop
        if not 1 <= stop <= self.num_skips:
            raise ValueError(f"stop counts down units, 1 to {self.num_skips}; got {stop}")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"an input of {x.shape[1]} channels given, this model takes {self.in_channels}")
        if x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise ValueError(
                f"patches of {self.patch_size} do not tile an image of {x.shape[2]} x {x.shape[3]}"
            )
        self._check_context(context)
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        h = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for unit in self.down_units[:stop]:
            if unit.resnet is not None:
                h = unit.resnet(h, emb)
            if unit.attention is not None:
                h = unit.attention(h, context, context_mask)
            if unit.resample is not None:
                h = unit.resample(h)
            skips.append(h)
        return h, skips

    def middle(
        self,
        h: Float[Tensor, "b c h w"],
        emb: Float[Tensor, "b d"],
        context: Float[Tensor, "b l d_text"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Run the middle block on the features that ``encode`` ended with."""
        self._check_context(context)
        return self.mid_block(h, emb, context, context_mask)

    def decode(
        self,
        h: Float[Tensor, "b c h w"],
        skips: Sequence[Tensor],
        emb: Float[Tensor, "b d"],
        context: Float[Tensor, "b l d_text"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Run the up units ``start`` to ``stop - 1``; with ``stop`` None, all the rest and the output layers.

        Args:
            h: the main branch as it enters up unit ``start``: the result of ``middle`` for 0, else the result of
                an earlier ``decode(..., stop=start)``, of another time step perhaps. It is not modified.
            skips: ``skips[i]`` from down unit i; at least the first ``num_skips - start``.
            emb: as ``embed`` gives it.
            context: text states.
            context_mask: True for a real token.
            start: first up unit to run.
            stop: the up unit to stop in front of.

        Returns:
            the prediction; or, with ``stop``, the main branch as it enters up unit ``stop``.

        Raises:
            ValueError: ``start`` and ``stop`` out of order or out of range, too few skips, text that does not fit.
        """
        n = self.num_skips
        end = n if stop is None else stop
        if not 0 <= start <= end <= n or start == n:
            raise ValueError(
                f"need 0 <= start <= stop <= {n} and start < {n}; got start={start}, stop={stop}"
            )
        if len(skips) < n - start:
            raise ValueError(
                f"up units from {start} on consume the first {n - start} skips, got {len(skips)}"
            )
        self._check_context(context)
        for j, unit in enumerate(self.up_units[start:end], start):
            h = unit.resnet(join(h, skips[n - 1 - j]), emb)
            if unit.attention is not None:
                h = unit.attention(h, context, context_mask)
            if unit.resample is not None:
                h = unit.resample(h, tuple(skips[n - 2 - j].shape[-2:]))
        if stop is not None:
            return h
        out = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out if self.patch_size == 1 else F.pixel_shuffle(out, self.patch_size)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Num[Tensor, " b"],
        context: Float[Tensor, "b l d_text"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
        pooled: Float[Tensor, "b d_pooled"] | None = None,
    ) -> Float[Tensor, "b c_out h w"]:
        """Predict noise, velocity or image, whichever the loss asked for.

        Args:
            x: noisy images.
            t: times on the scale 0 to 1000.
            context: states of the text's tokens.
            context_mask: True for a real token; None: all are real.
            pooled: one vector a text, if ``pooled_dim`` is set.

        Raises:
            ValueError: a wrong number of channels, or text that does not fit.
        """
        emb = self.embed(t, pooled)
        h, skips = self.encode(x, emb, context, context_mask)
        h = self.middle(h, emb, context, context_mask)
        return self.decode(h, skips, emb, context, context_mask)

    def _check_context(self, context: Tensor | None) -> None:
        width = 0 if context is None else context.shape[-1]
        if width != self.cross_attention_dim:
            wanted = (
                f"text states (b, l, {self.cross_attention_dim})" if self.cross_attention_dim else "no text"
            )
            given = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(f"this model reads {wanted} as context, got {given}")


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else list(value)


def _per_level(value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)
