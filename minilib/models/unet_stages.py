"""How the U-Net's parts are put together: resamplers, the stages of one resolution, and the units that run one by one.

Wiring and names are those of Stable Diffusion 1.5 (read in diffusers 0.42, ``models/unets/unet_2d_blocks.py``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .unet_blocks import ResnetBlock, SpatialTransformer


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2; an odd side is rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Halve height and width."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to a given size, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
        """Enlarge to ``size``: twice the sides, or one less where the encoder rounded an odd side up."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Stage(nn.Module):
    """The modules of one resolution on one side of the U-Net, by their names in Stable Diffusion.

    It is a container: the U-Net calls ``resnets[j]``, ``attentions[j]`` and the resampler one by one, so that it
    can stop or start between any two of them. ``attentions`` is empty where the level has none.
    """

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[SpatialTransformer],
        *,
        downsampler: Downsample | None = None,
        upsampler: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        if downsampler is not None:
            self.downsamplers = nn.ModuleList([downsampler])
        if upsampler is not None:
            self.upsamplers = nn.ModuleList([upsampler])


class MidBlock(nn.Module):
    """Residual block, spatial transformer, residual block, at the lowest resolution."""

    def __init__(self, resnets: list[ResnetBlock], attention: SpatialTransformer) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention])

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        emb: Float[Tensor, "b d"],
        context: Float[Tensor, "b l d_context"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Transform the deepest features."""
        h = self.resnets[0](x, emb)
        h = self.attentions[0](h, context, context_mask)
        return self.resnets[1](h, emb)


def join(h: Float[Tensor, "b c h w"], skip: Float[Tensor, "b2 c2 h2 w2"]) -> Float[Tensor, "b c3 h w"]:
    """The main branch and a skip side by side: what an up unit's residual block reads. Neither is modified.

    Raises:
        ValueError: they differ in batch, height or width.
    """
    if h.shape[0] != skip.shape[0] or h.shape[2:] != skip.shape[2:]:
        raise ValueError(
            f"the main branch {tuple(h.shape)} and the skip {tuple(skip.shape)} do not fit together: batch, height "
            "and width have to be equal; were both made from images of one size, and is start the right up unit?"
        )
    return torch.cat([h, skip], dim=1)


@dataclass(frozen=True)
class StageBuilder:
    """Makes the stages of a U-Net: the sizes of all levels, and what each side of a level consists of.

    Raises:
        ValueError: widths and groups that do not divide, levels that do not exist, lists of another length.
    """

    widths: tuple[int, ...]
    layers: int
    attention_levels: tuple[int, ...]
    num_heads: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    context_dim: int
    num_groups: int
    eps: float
    positions: bool

    def __post_init__(self) -> None:
        if not self.widths or self.layers < 1:
            raise ValueError(
                f"need at least one level and one layer; got widths {self.widths} and {self.layers} layers"
            )
        if any(width < 2 or width % self.num_groups for width in self.widths) or self.widths[0] % 2:
            raise ValueError(
                f"every width has to be a multiple of norm_num_groups = {self.num_groups}, and the first even; "
                f"got {self.widths}"
            )
        wrong = sorted(set(self.attention_levels) - set(range(len(self.widths))))
        if wrong:
            raise ValueError(
                f"attention_levels {wrong} do not exist: the levels are 0 to {len(self.widths) - 1}"
            )
        for name in ("num_heads", "transformer_layers"):
            values = getattr(self, name)
            if len(values) != len(self.widths) or min(values) < 1:
                raise ValueError(
                    f"{name} has to be a positive number, or one for each of {len(self.widths)} levels; got {values}"
                )

    @property
    def emb_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.widths[0]

    def down(self, level: int) -> Stage:
        """The encoder's side of a level; all but the last end with a downsampler."""
        width, entering = self.widths[level], self.widths[max(level - 1, 0)]
        resnets = [self._resnet(width if j else entering, width) for j in range(self.layers)]
        last = level == len(self.widths) - 1
        return Stage(
            resnets, self._transformers(level, self.layers), downsampler=None if last else Downsample(width)
        )

    def mid(self) -> MidBlock:
        """The middle, at the last level's width."""
        width = self.widths[-1]
        return MidBlock(
            [self._resnet(width, width), self._resnet(width, width)], self._transformer(len(self.widths) - 1)
        )

    def up(self, level: int) -> Stage:
        """The decoder's side of a level: one layer more, each reading a skip; all but level 0 end with an upsampler."""
        width, above = self.widths[level], self.widths[max(level - 1, 0)]
        below = self.widths[min(level + 1, len(self.widths) - 1)]
        mains = [below] + [width] * self.layers
        skips = [width] * self.layers + [above]
        resnets = [self._resnet(main + skip, width) for main, skip in zip(mains, skips, strict=True)]
        upsampler = Upsample(width) if level else None
        return Stage(resnets, self._transformers(level, self.layers + 1), upsampler=upsampler)

    def _resnet(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(in_channels, out_channels, self.emb_dim, self.num_groups, self.eps)

    def _transformer(self, level: int) -> SpatialTransformer:
        return SpatialTransformer(
            self.widths[level],
            self.num_heads[level],
            self.transformer_layers[level],
            self.context_dim,
            self.num_groups,
            positions=self.positions,
        )

    def _transformers(self, level: int, number: int) -> list[SpatialTransformer]:
        return [self._transformer(level) for _ in range(number if level in self.attention_levels else 0)]


class Unit(NamedTuple):
    """One step of the encoder or of the decoder: the modules that run, in this order, and their names in the model."""

    names: tuple[str, ...]
    resnet: nn.Module | None = None
    attention: nn.Module | None = None
    resample: nn.Module | None = None


def down_units(conv_in: nn.Module, stages: Iterable[Stage]) -> list[Unit]:
    """The units of an encoder: ``conv_in``, then each residual block with its attention, then each downsampler."""
    units = [Unit(("conv_in",), resample=conv_in)]
    for i, stage in enumerate(stages):
        units += _layers(f"down_blocks.{i}", stage)
        if hasattr(stage, "downsamplers"):
            units.append(Unit((f"down_blocks.{i}.downsamplers.0",), resample=stage.downsamplers[0]))
    return units


def up_units(stages: Iterable[Stage]) -> list[Unit]:
    """The units of a decoder: each residual block with its attention; the upsampler belongs to its level's last unit."""
    units = []
    for i, stage in enumerate(stages):
        units += _layers(f"up_blocks.{i}", stage)
        if hasattr(stage, "upsamplers"):
            names = (*units[-1].names, f"up_blocks.{i}.upsamplers.0")
            units[-1] = units[-1]._replace(names=names, resample=stage.upsamplers[0])
    return units


def _layers(name: str, stage: Stage) -> list[Unit]:
    attentions = list(stage.attentions) or [None] * len(stage.resnets)
    return [
        Unit(
            (f"{name}.resnets.{j}",) + (() if attention is None else (f"{name}.attentions.{j}",)),
            resnet,
            attention,
        )
        for j, (resnet, attention) in enumerate(zip(stage.resnets, attentions, strict=True))
    ]
