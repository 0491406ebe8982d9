"""A DiT's forward and training step beside diffusers' DiTTransformer2DModel of the same shape, with the same weights."""

from collections.abc import Iterator

import torch
from diffusers import DiTTransformer2DModel

from minilib.bench import Case, model_cases
from minilib.models import DiT, to_diffusers

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 8, 1, 128, 4, 4, 10


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, SIZE, SIZE, generator=generator)
    return x, torch.full((batch,), 500), torch.randint(CLASSES, (batch,), generator=generator)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    ours = DiT(SIZE, PATCH, 1, WIDTH, DEPTH, HEADS, num_classes=CLASSES, learn_sigma=True, frequency_shift=1)
    with torch.no_grad():  # layers that start at zero would hide a difference
        for p in ours.parameters():
            p.add_(0.02 * torch.randn_like(p))
    state, config = to_diffusers(ours)
    theirs = DiTTransformer2DModel(**config)
    theirs.load_state_dict(state)

    def call(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return theirs(x, timestep=t, class_labels=y, return_dict=False)[0]

    name = f"DiT width {WIDTH}, {DEPTH} blocks, {(SIZE // PATCH) ** 2} tokens"
    yield from model_cases(name, (ours, ours), (theirs, call), inputs)
