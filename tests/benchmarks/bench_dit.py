"""A DiT's forward and training step beside diffusers' DiTTransformer2DModel of the same shape."""

from collections.abc import Iterator
from functools import partial

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from minilib.bench import Case
from minilib.models import DiT

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 8, 1, 128, 4, 4, 10


def ours() -> DiT:
    return DiT(SIZE, PATCH, 1, WIDTH, DEPTH, HEADS, num_classes=CLASSES, learn_sigma=True)


def peer() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=1,
        out_channels=2,
        num_layers=DEPTH,
        sample_size=SIZE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    )


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, SIZE, SIZE, generator=generator)
    return x, torch.full((batch,), 500), torch.randint(CLASSES, (batch,), generator=generator)


def call(model: nn.Module, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if isinstance(model, DiT):
        return model(x, t, y)
    return model(x, timestep=t, class_labels=y, return_dict=False)[0]


@torch.no_grad()
def forward(model: nn.Module, batch: tuple) -> None:
    call(model, *batch)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple) -> None:
    loss = call(model, *batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_of(model: nn.Module, batch: tuple) -> partial:
    # Both sides get the fused optimiser: the models are compared, not the optimisers.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    return partial(train_step, model, optimizer, batch)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    mine, theirs = ours(), peer().train()
    name = f"DiT width {WIDTH}, {DEPTH} blocks, {(SIZE // PATCH) ** 2} tokens"
    for batch_size, goal in ((1, 0.75), (64, 0.95)):
        batch = inputs(batch_size)
        yield Case(
            f"{name}, forward, batch {batch_size}", "diffusers", goal,
            partial(forward, mine.eval(), batch), partial(forward, theirs.eval(), batch),
        )  # fmt: skip
    batch = inputs(64)
    yield Case(
        f"{name}, training step, batch 64", "diffusers", 1.0,
        step_of(mine.train(), batch), step_of(theirs.train(), batch),
    )  # fmt: skip
