"""A text U-Net's forward and training step beside diffusers' UNet2DConditionModel of the same shape, with the same weights."""

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel

from minilib.bench import Case, model_cases
from minilib.models import UNet, unet_to_diffusers

SIZE, WIDTHS, TEXT, CONTEXT = 16, (24, 48, 64), 18, 96


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    return x, torch.full((batch,), 500), torch.randn(batch, TEXT, CONTEXT, generator=generator)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    ours = UNet(block_out_channels=WIDTHS, cross_attention_dim=CONTEXT)
    with torch.no_grad():  # layers that start at zero would hide a difference
        for p in ours.parameters():
            p.add_(0.02 * torch.randn_like(p))
    state, config = unet_to_diffusers(ours)
    theirs = UNet2DConditionModel(**config)
    theirs.load_state_dict(state)

    def call(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return theirs(x, t, context, return_dict=False)[0]

    yield from model_cases(f"U-Net widths {WIDTHS}, {SIZE} pixels", (ours, ours), (theirs, call), inputs)
