"""What an optimiser step and a moving average cost as one call over all parameters, beside a loop over them."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from minilib.bench import Case
from minilib.models import DiT
from minilib.training import update_ema

DECAY = 0.995


def adamw(model: nn.Module, **options: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, **options)
    results = tuple(p.detach() for p in model.parameters())

    def step() -> tuple[torch.Tensor, ...]:
        optimizer.step()
        return results

    return step


Tensors = list[torch.Tensor]


def loop_lists(ema: Tensors, current: Tensors) -> None:
    for mine, theirs in zip(ema, current, strict=True):
        mine.mul_(DECAY).add_(theirs, alpha=1 - DECAY)


def foreach_lists(ema: Tensors, current: Tensors) -> None:
    torch._foreach_lerp_(ema, current, 1 - DECAY)


def loop_modules(ema: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
            mine.mul_(DECAY).add_(theirs, alpha=1 - DECAY)


def our_modules(ema: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        update_ema(ema, model, DECAY, step=10**6)


def averaging(
    update: Callable[..., None], start: nn.Module, model: nn.Module, *, lists: bool
) -> Callable[[], Tensors]:
    """A step of ``update`` on the modules, or on the lists of their parameters, which saves finding them each time."""
    ema = copy.deepcopy(start)
    results, current = ([p.detach() for p in m.parameters()] for m in (ema, model))
    arguments = (results, current) if lists else (ema, model)

    def step() -> Tensors:
        update(*arguments)
        return results

    return step


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    model = DiT(hidden_size=128, depth=4, num_heads=4)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    fused, loop = (copy.deepcopy(model) for _ in range(2))
    yield Case(
        f"AdamW fused, {millions:.2f} M parameters", "torch loop", 0.4,
        adamw(fused, fused=True), adamw(loop, foreach=False, fused=False), same=1e-6,
    )  # fmt: skip
    target = DiT(hidden_size=128, depth=4, num_heads=4)
    for label, lists, pair in (
        ("foreach, lists of parameters", True, (foreach_lists, loop_lists)),
        ("update_ema, modules", False, (our_modules, loop_modules)),
    ):
        ours, theirs = (averaging(update, model, target, lists=lists) for update in pair)
        yield Case(f"moving average, {millions:.2f} M, {label}", "torch loop", 0.4, ours, theirs, same=1e-6)
