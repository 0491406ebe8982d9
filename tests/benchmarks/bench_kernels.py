"""Operations of ``minilib.kernels`` beside what one would write, or install, instead."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minilib.bench import Case, Missing, Scaling, package_problem
from minilib.kernels.adaln import modulate
from minilib.kernels.moe import expert_dispatch
from minilib.kernels.quant import IntegerLinear, has_vnni
from minilib.kernels.scan import reference as scan_loop
from minilib.kernels.scan import selective_scan
from minilib.kernels.tokens import gather_tokens, partial_attention, scatter_tokens
from minilib.models import DiTBlock
from minilib.models.layers import GeluMLP
from minilib.models.vit import ViTBlock

BATCH, CHANNELS, STATES, LENGTH = 4, 128, 8, 256
TOKENS, DIM, EXPERTS, K = 4096, 128, 8, 2
Cases = Iterator[Case | Missing | Scaling]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], *fixed
) -> tuple[torch.Tensor, ...]:
    """Forward and backward."""
    out = function(*inputs, *fixed)
    return torch.autograd.grad(out, inputs, torch.ones_like(out))


def scan_inputs(length: int, states: int = STATES) -> list[torch.Tensor]:
    dt = F.softplus(random(BATCH, CHANNELS, length, seed=1) - 3)
    decay = -torch.arange(1.0, states + 1).repeat(CHANNELS, 1)
    select = [random(BATCH, states, length, seed=seed) for seed in (2, 3)]
    inputs = [random(BATCH, CHANNELS, length), dt, decay, *select, torch.ones(CHANNELS)]
    return [x.requires_grad_() for x in inputs]


def mambapy_scan(u, dt, A, B, C, D) -> torch.Tensor:
    """``MambaBlock.selective_scan`` of alxndrTL/mamba.py, whose time axis is the second; it uses nothing of the block."""
    from mambapy.mamba import MambaBlock

    u, dt, B, C = (x.transpose(1, 2) for x in (u, dt, B, C))
    return MambaBlock.selective_scan(None, u, dt, A, B, C, D).transpose(1, 2)


def scans() -> Cases:
    size = f"{CHANNELS} channels, {STATES} states"
    name = f"selective scan, {size}, length {LENGTH}, forward and backward"
    ours = partial(step, selective_scan, scan_inputs(LENGTH))
    yield Case(
        f"{name}, loop", "torch loop", 0.5, ours, partial(step, scan_loop, scan_inputs(LENGTH)), same=1e-4
    )
    problem = package_problem("mambapy")
    for length, states in ((64, STATES), (256, STATES), (1024, STATES), (256, 1)):
        label = f"selective scan, {CHANNELS} channels, {states} states, length {length}, forward and backward, mambapy"
        if problem:
            yield Missing(label, "mambapy", 0.8, problem)
            continue
        ours, theirs = (partial(step, f, scan_inputs(length, states)) for f in (selective_scan, mambapy_scan))
        yield Case(label, "mambapy", 0.8, ours, theirs, same=1e-4)
    make = lambda length: partial(step, selective_scan, scan_inputs(length))  # noqa: E731
    yield Scaling(
        f"selective scan, {size}, forward and backward: length", (0.8, 1.15), (256, 1024, 4096), make
    )


def mixtures() -> Cases:
    """One expert of 4 D, two a token, beside a dense network of 8 D: the same products."""
    torch.manual_seed(0)
    experts = nn.ModuleList(GeluMLP(DIM, 4 * DIM) for _ in range(EXPERTS))
    dense, x = GeluMLP(DIM, 4 * DIM * K), random(TOKENS, DIM).requires_grad_()
    weights, indices = random(TOKENS, EXPERTS, seed=1).softmax(-1).topk(K)
    name, peer = f"mixture of {EXPERTS} experts, {K} a token, {TOKENS} tokens", "torch dense network"

    def sparse(x: torch.Tensor) -> torch.Tensor:
        return expert_dispatch(x, indices, weights, experts)

    no_grad = torch.no_grad()
    yield Case(f"{name}, forward", peer, 1.4, partial(no_grad(sparse), x), partial(no_grad(dense.forward), x))
    # Over all weights, as in training.
    ours, theirs = [x, *experts.parameters()], [x, *dense.parameters()]
    yield Case(
        f"{name}, forward and backward", peer, 1.4,
        lambda: torch.autograd.grad(sparse(x).square().sum(), ours),
        lambda: torch.autograd.grad(dense(x).square().sum(), theirs),
    )  # fmt: skip


def quantised() -> Cases:
    name, peer, goal = "W8A8 linear 1152 to 1152, 4096 tokens", "torch float32 linear", 0.45
    if not has_vnni():
        yield Missing(
            name, peer, goal, "this CPU has no 8-bit dot products (VNNI): speed is claimed only with them"
        )
        return
    torch.manual_seed(0)
    linear, x = nn.Linear(1152, 1152).requires_grad_(False), random(4096, 1152)
    yield Case(name, peer, goal, partial(IntegerLinear.from_linear(linear), x), partial(linear, x), same=0.05)


def regions(batch: int) -> Cases:
    """A quarter of the tokens through a block, the other keys and values kept."""
    torch.manual_seed(0)
    n, dim = 256, 384
    block = DiTBlock(dim, 6).eval().requires_grad_(False)
    for p in block.parameters():
        p.add_(0.02 * torch.randn_like(p))
    x, c, indices = random(batch, n, dim), random(batch, dim, seed=1), torch.randperm(n)[: n // 4]
    caches = {}
    with partial_attention(block, caches):
        full = block(x, c)

    def part() -> torch.Tensor:
        with partial_attention(block, caches, indices):
            return scatter_tokens(full, block(gather_tokens(x, indices), c), indices)

    name = f"a quarter of {n} tokens through a block, batch {batch}"
    yield Case(name, "minilib, all tokens", 0.4, part, partial(block, x, c), same=1e-5)


def modulation() -> Cases:
    x, shift, scale = random(8, 256, 384), random(8, 384, seed=1), random(8, 384, seed=2)

    def eager(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    yield Case(
        "adaLN modulate, 8 x 256 x 384, forward", "torch eager", 1.0,
        partial(modulate, x, shift, scale), partial(eager, x, shift, scale), same=1e-5,
    )  # fmt: skip


def shim_torchvision() -> None:
    """timm needs torchvision, whose wheel for CUDA declares operators for kernels that a torch for CPUs does not have."""
    from torch.library import Library

    schemas = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
    schemas += ("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
    if not hasattr(torch.ops.torchvision, "nms"):
        library = Library("torchvision", "DEF")
        for schema in schemas:
            library.define(schema)
        KEEP.append(library)  # its operators go when it goes


KEEP: list[object] = []


def blocks() -> Cases:
    name = "ViT block width 128, 64 tokens, forward"
    problem = package_problem("timm")
    if problem and "nms" in problem:
        shim_torchvision()
        problem = package_problem("timm")
    if problem:
        for batch in (1, 64):
            yield Missing(f"{name}, {batch} images", "timm", 1.0, problem)
        return
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    ours = ViTBlock(128, 4, 4.0).eval().requires_grad_(False)
    theirs = Block(
        128,
        4,
        qkv_bias=True,
        act_layer=partial(nn.GELU, approximate="tanh"),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    theirs = theirs.eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    for batch in (1, 64):
        x = random(batch, 64, 128)
        yield Case(f"{name}, {batch} images", "timm", 1.0, partial(ours, x), partial(theirs, x), same=1e-5)


def cases() -> Cases:
    yield from scans()
    yield from mixtures()
    yield from quantised()
    yield from regions(1)
    yield from regions(8)
    yield from modulation()
    yield from blocks()
