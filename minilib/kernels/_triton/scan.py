"""Selective scan in Triton: a program has ``CHANNELS`` channels of one sequence, their states in registers, and walks along it.

The forward pass writes the state at the start of every chunk. The backward pass takes the chunks from the last to the first:
it computes the states of a chunk again from its start, into memory that only this program uses, then walks back over them. What
is summed over channels (dB, dC) or over sequences (dA) is written as partial sums and added by torch: no atomics.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 32
CHUNK = 64
MAX_STATES = 64
"""Largest state that a program holds."""


@triton.jit
@no_type_check
def _step(h, dt, x, a, bt):
    """The state one step later: exp(dt A) h + B x, with x = dt u."""
    return tl.exp(dt[:, None] * a) * h + x[:, None] * bt[None, :]


@triton.jit
@no_type_check
def forward_kernel(
    u_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, y_ptr, starts_ptr, length, groups, width,
    N: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (width / CHANNELS, batch groups). u, dt, y (b, l, g width); A (g width, N); B, C (b, g, l, N)."""
    row = tl.program_id(1).to(tl.int64)
    group = row % groups
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATES)
    real = channel < width
    both = real[:, None] & (state < N)[None, :]
    within = channel[:, None] * N + state[None, :]
    a = tl.load(a_ptr + group * width * N + within, mask=both, other=0.0).to(tl.float32)
    h = tl.zeros((CHANNELS, STATES), tl.float32)
    here = (row // groups) * length * groups * width + group * width + channel
    select = row * length * N + state
    start = row * tl.cdiv(length, CHUNK) * width * N + within
    for first in range(0, length, CHUNK):
        tl.store(starts_ptr + start, h, mask=both)
        start += width * N
        for _ in range(first, tl.minimum(first + CHUNK, length)):
            dt = tl.load(dt_ptr + here, mask=real, other=0.0).to(tl.float32)
            x = dt * tl.load(u_ptr + here, mask=real, other=0.0).to(tl.float32)
            bt = tl.load(b_ptr + select, mask=state < N, other=0.0).to(tl.float32)
            ct = tl.load(c_ptr + select, mask=state < N, other=0.0).to(tl.float32)
            h = _step(h, dt, x, a, bt)
            tl.store(y_ptr + here, tl.sum(h * ct[None, :], axis=1), mask=real)
            here += groups * width
            select += N


@triton.jit
@no_type_check
def backward_kernel(
    u_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, dy_ptr, starts_ptr, before_ptr,
    du_ptr, ddt_ptr, da_ptr, db_ptr, dc_ptr, length, groups, width,
    N: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid as forward. ``before`` (b g, CHUNK, width, N) is scratch; dA (b g, width, N); dB, dC (blocks, b g, l, N)."""
    row = tl.program_id(1).to(tl.int64)
    group = row % groups
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATES)
    real = channel < width
    both = real[:, None] & (state < N)[None, :]
    within = channel[:, None] * N + state[None, :]
    a = tl.load(a_ptr + group * width * N + within, mask=both, other=0.0).to(tl.float32)
    base = (row // groups) * length * groups * width + group * width + channel
    select = row * length * N + state
    partial = tl.program_id(0).to(tl.int64) * tl.num_programs(1) * length * N + select
    chunks = tl.cdiv(length, CHUNK)
    scratch = before_ptr + row * CHUNK * width * N + within
    later = tl.zeros((CHANNELS, STATES), tl.float32)
    da = tl.zeros((CHANNELS, STATES), tl.float32)
    for i in range(chunks):
        first = (chunks - 1 - i) * CHUNK
        size = tl.minimum(CHUNK, length - first)
        at = starts_ptr + (row * chunks + chunks - 1 - i) * width * N + within
        h = tl.load(at, mask=both, other=0.0)
        for j in range(size):
            tl.store(scratch + j * width * N, h, mask=both)
            here = base + (first + j) * groups * width
            dt = tl.load(dt_ptr + here, mask=real, other=0.0).to(tl.float32)
            x = dt * tl.load(u_ptr + here, mask=real, other=0.0).to(tl.float32)
            bt = tl.load(b_ptr + select + (first + j) * N, mask=state < N, other=0.0).to(tl.float32)
            h = _step(h, dt, x, a, bt)
        tl.debug_barrier()
        for j in range(size):
            t = first + size - 1 - j
            here = base + t * groups * width
            dt = tl.load(dt_ptr + here, mask=real, other=0.0).to(tl.float32)
            u = tl.load(u_ptr + here, mask=real, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + here, mask=real, other=0.0).to(tl.float32)
            bt = tl.load(b_ptr + select + t * N, mask=state < N, other=0.0).to(tl.float32)
            ct = tl.load(c_ptr + select + t * N, mask=state < N, other=0.0).to(tl.float32)
            carried = tl.exp(dt[:, None] * a) * tl.load(
                scratch + (size - 1 - j) * width * N, mask=both, other=0.0
            )
            g = later + dy[:, None] * ct[None, :]
            h = carried + (dt * u)[:, None] * bt[None, :]
            tl.store(dc_ptr + partial + t * N, tl.sum(h * dy[:, None], axis=0), mask=state < N)
            tl.store(db_ptr + partial + t * N, tl.sum(g * (dt * u)[:, None], axis=0), mask=state < N)
            dx = tl.sum(g * bt[None, :], axis=1)
            exponent = g * carried
            tl.store(ddt_ptr + here, tl.sum(exponent * a, axis=1) + dx * u, mask=real)
            tl.store(du_ptr + here, dx * dt, mask=real)
            da += exponent * dt[:, None]
            later = g * tl.exp(dt[:, None] * a)
        tl.debug_barrier()
    tl.store(da_ptr + row * width * N + within, da, mask=both)


def config(n: int) -> dict[str, int]:
    """For n states: block sizes and warps, so that all states of a program stay in registers."""
    return {
        "N": n,
        "STATES": triton.next_power_of_2(n),
        "CHANNELS": CHANNELS,
        "CHUNK": CHUNK,
        "num_warps": 1 if n <= 16 else 4,
    }


def _sizes(u: Tensor, a: Tensor, b: Tensor) -> tuple[int, int, int, int, int]:
    """batch, length, groups, channels a group, states."""
    return len(u), u.shape[1], b.shape[1], len(a) // b.shape[1], a.shape[1]


@torch.library.custom_op("minilib::selective_scan", mutates_args=())
def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """u, dt (b, l, d), A (d, n), B, C (b, g, l, n) -> ``y`` (b, l, d) without D, and the states at the chunks' starts."""
    u, dt, a, b, c = (x.contiguous() for x in (u, dt, a, b, c))
    batch, length, groups, width, n = _sizes(u, a, b)
    y, starts = _empty(u, a, b)
    if u.numel():
        grid = (triton.cdiv(width, CHANNELS), batch * groups)
        forward_kernel[grid](u, dt, a, b, c, y, starts, length, groups, width, **config(n))
    return y, starts


@torch.library.custom_op("minilib::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddt, dA, dB, dC), all in float32."""
    dy, u, dt, a, b, c = (x.contiguous() for x in (dy, u, dt, a, b, c))
    batch, length, groups, width, n = _sizes(u, a, b)
    blocks = triton.cdiv(width, CHANNELS)
    du, ddt = (torch.empty(u.shape, dtype=torch.float32, device=u.device) for _ in range(2))
    da = starts.new_zeros(batch, groups, width, n)
    db, dc = (starts.new_zeros(blocks, *b.shape) for _ in range(2))
    if u.numel():
        before = starts.new_empty(batch * groups, CHUNK, width, n)
        backward_kernel[(blocks, batch * groups)](
            u, dt, a, b, c, dy, starts, before, du, ddt, da, db, dc, length, groups, width, **config(n)
        )  # fmt: skip
    return du, ddt, da.sum(0).flatten(0, 1), db.sum(0), dc.sum(0)


def _empty(u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, groups, width, n = _sizes(u, a, b)
    y = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    return y, y.new_empty(batch * groups, -(-length // CHUNK), width, n)


@selective_scan.register_fake
def _(u, dt, a, b, c):
    return _empty(u, a, b)


@selective_scan_backward.register_fake
def _(dy, u, dt, a, b, c, starts):
    return tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (u, dt, a, b, c))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, _):
    *inputs, starts = ctx.saved_tensors
    grads = selective_scan_backward(dy, *inputs, starts)
    return tuple(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


selective_scan.register_autograd(_gradient, setup_context=_save)
