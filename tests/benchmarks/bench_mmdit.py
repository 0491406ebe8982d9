"""An MM-DiT's forward and training step beside diffusers' SD3Transformer2DModel of the same shape, with the same weights."""

from collections.abc import Iterator

import torch
from diffusers import SD3Transformer2DModel

from minilib.bench import Case, model_cases
from minilib.models import MMDiT, mmdit_to_diffusers

SIZE, PATCH, WIDTH, DEPTH, HEADS, TEXT, CONTEXT, POOLED = 16, 2, 96, 6, 4, 18, 64, 32


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    context = torch.randn(batch, TEXT, CONTEXT, generator=generator)
    return x, torch.full((batch,), 500.0), context, torch.randn(batch, POOLED, generator=generator)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    ours = MMDiT(
        SIZE, PATCH, 3, WIDTH, DEPTH, HEADS, context_dim=CONTEXT, pooled_dim=POOLED,
        positions="sincos_cropped", pos_embed_max_size=SIZE, unused_context_query=True,
    )  # fmt: skip
    with torch.no_grad():  # layers that start at zero would hide a difference
        for p in ours.parameters():
            p.add_(0.02 * torch.randn_like(p))
    state, config = mmdit_to_diffusers(ours)
    theirs = SD3Transformer2DModel(**config)
    theirs.load_state_dict(state)

    def call_ours(
        x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        return ours(x, t, context, None, pooled)

    def call_theirs(
        x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        return theirs(x, context, pooled, t, return_dict=False)[0]

    name = f"MM-DiT width {WIDTH}, {DEPTH} blocks, {(SIZE // PATCH) ** 2} + {TEXT} tokens"
    yield from model_cases(name, (ours, call_ours), (theirs, call_theirs), inputs)
