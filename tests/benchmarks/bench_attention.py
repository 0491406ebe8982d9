"""Attention that leaves work out, beside torch's fused attention over all pairs, and how each grows with the tokens.

The outputs differ by design, except for FlexAttention, which computes the same disk.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from shutil import which

import torch
import torch.nn.functional as F

from minilib.bench import Case, Missing, Scaling
from minilib.kernels.linear import linear_attention
from minilib.kernels.local import flex_mask, local_attention

HEADS, WIDTH, RADIUS, SIDE = 4, 32, 4.0, 64
SIZES = (1024, 2304, 4096)
Attend = Callable[..., torch.Tensor]


def draw(n: int, *, gradient: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, n, WIDTH, generator=generator).requires_grad_(gradient) for _ in range(3)]


def forward(attend: Attend, n: int) -> Callable[[], torch.Tensor]:
    return partial(attend, *draw(n))


def step(attend: Attend, n: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    qkv = draw(n, gradient=True)
    cotangent = draw(n)[0]
    return lambda: torch.autograd.grad(attend(*qkv), qkv, cotangent)


def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    side = round(q.shape[2] ** 0.5)
    return local_attention(q, k, v, grid=(side, side), radius=RADIUS)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(q.shape[2]))


@lru_cache
def dense_mask(n: int) -> torch.Tensor:
    from minilib.kernels.local import disk_mask

    side = round(n**0.5)
    return disk_mask((side, side), RADIUS, n, n)


@lru_cache
def compiled_flex(n: int) -> Attend:
    """FlexAttention with the disk as its block mask, compiled: minutes at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    side = round(n**0.5)
    blocks = create_block_mask(flex_mask((side, side), RADIUS), None, None, n, n, device="cpu")
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return compiled_flex(q.shape[2])(q, k, v)


def cases() -> Iterator[Case | Missing | Scaling]:
    sdpa, n = F.scaled_dot_product_attention, SIDE**2
    name = f"local attention, radius {RADIUS:g}, {n} tokens"
    yield Case(f"{name}, forward", "torch SDPA", 0.2, forward(local, n), forward(sdpa, n))
    yield Case(f"{name}, forward and backward", "torch SDPA", 0.2, step(local, n), step(sdpa, n))
    yield Case(
        f"{name}, forward, masked",
        "torch SDPA with a mask",
        0.2,
        forward(local, n),
        forward(masked, n),
        same=1e-5,
    )
    flex_name, peer = f"{name}, forward, FlexAttention", "torch FlexAttention, compiled"
    if which("g++") or which("clang++"):
        yield Case(flex_name, peer, 0.5, forward(local, n), forward(flex, n), same=1e-5, slow=True)
    else:
        yield Missing(flex_name, peer, 0.5, "there is no C++ compiler for torch.compile")
    for n, goal in ((256, 1.0), (1024, 0.5), (4096, 0.1)):
        yield Case(
            f"linear attention, {n} tokens, forward",
            "torch SDPA",
            goal,
            forward(linear_attention, n),
            forward(sdpa, n),
        )
    yield Case(
        "linear attention, 256 tokens, forward and backward",
        "torch SDPA",
        1.0,
        step(linear_attention, 256),
        step(sdpa, 256),
    )
    for label, attend, goal in (
        ("full attention", sdpa, (1.8, 2.2)),
        ("full attention with a disk as its mask", masked, (1.8, 2.2)),
        (f"local attention, radius {RADIUS:g}", local, (0.8, 1.15)),
        ("linear attention", linear_attention, (0.8, 1.15)),
    ):
        yield Scaling(f"{label}, forward: tokens", goal, SIZES, partial(forward, attend))
        yield Scaling(f"{label}, forward and backward: tokens", goal, SIZES, partial(step, attend))
