"""Adaptive layer norm in Triton: whole tokens in registers, several a program, one read and one write of each tensor.

The forward pass keeps no statistics: the backward pass has the token in registers anyway and computes them again. The
gradients of shift, scale and gate are sums over tokens. Each program of the backward pass sums over its own tokens in a
fixed order and writes one partial sum; a second stage adds those. No atomics: the result is the same each time.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = 4
"""Loop turns of a program of the forward pass."""
BACKWARD_ROWS = 64
"""Tokens that one program of the backward pass sums over."""


def config(width: int) -> dict[str, int]:
    """Tokens and columns of a tile, and warps of a program: about 4096 values a tile, 16 to 32 a thread."""
    columns = triton.next_power_of_2(width)
    return {
        "ROWS": max(1, min(16, 2048 // columns)),
        "COLUMNS": columns,
        "num_warps": 4 if columns <= 2048 else 8,
    }


@triton.jit
@no_type_check
def _normalise(x, inside, d, eps):
    """(x - mean) / std of each row, and 1 / std. ``inside`` is False in the columns that only fill the tile."""
    mean = tl.sum(x, axis=1) / d
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / d + eps)
    return centred * rstd[:, None], rstd


@triton.jit
@no_type_check
def forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, residual_ptr, y_ptr,
    n, d, eps, x_b, x_n, branch_b, branch_n, gate_b, shift_b, scale_b,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / (ROWS TILES), batch). Without GATED, ``branch``, ``gate`` and ``residual`` are not touched."""
    sample = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    real = columns < d
    shift = tl.load(shift_ptr + sample * shift_b + columns, mask=real, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(scale_ptr + sample * scale_b + columns, mask=real, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + sample * gate_b + columns, mask=real, other=0.0).to(tl.float32)
    for tile in range(TILES):
        rows = ((tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n)[:, None] & real[None, :]
        here = (sample * n + rows)[:, None] * d + columns[None, :]
        at = sample * x_b + rows[:, None] * x_n + columns[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            at = sample * branch_b + rows[:, None] * branch_n + columns[None, :]
            x += gate[None, :] * tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            # Rounded first: what is normalised is the residual that the caller gets.
            rounded = x.to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + here, rounded, mask=inside)
            x = rounded.to(tl.float32)
        normed, _ = _normalise(x, inside, d, eps)
        y = normed * scale[None, :] + shift[None, :]
        tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def backward_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, dy_ptr, dresidual_ptr, dx_ptr, dbranch_ptr, partial_ptr,
    n, d, eps, splits, x_b, x_n, branch_b, branch_n, gate_b, scale_b, dy_b, dy_n, dr_b, dr_n,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (splits, batch). ``x`` is what was normalised; ``partial`` is (3, batch, splits, d): dshift, dscale, dgate."""
    split = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    real = columns < d
    scale = 1.0 + tl.load(scale_ptr + sample * scale_b + columns, mask=real, other=0.0).to(tl.float32)
    dshift = tl.zeros((ROWS, COLUMNS), tl.float32)
    dscale = tl.zeros((ROWS, COLUMNS), tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + sample * gate_b + columns, mask=real, other=0.0).to(tl.float32)
        dgate = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(TILES):
        rows = ((split * TILES + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n)[:, None] & real[None, :]
        here = (sample * n + rows)[:, None] * d + columns[None, :]
        at = sample * x_b + rows[:, None] * x_n + columns[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed, rstd = _normalise(x, inside, d, eps)
        at = sample * dy_b + rows[:, None] * dy_n + columns[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dshift += dy
        dscale += dy * normed
        g = dy * scale[None, :]
        along = tl.sum(g * normed, axis=1) / d
        dx = rstd[:, None] * (g - (tl.sum(g, axis=1) / d)[:, None] - normed * along[:, None])
        if GATED:
            at = sample * dr_b + rows[:, None] * dr_n + columns[None, :]
            dx += tl.load(dresidual_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dbranch = dx * gate[None, :]
            tl.store(dbranch_ptr + here, dbranch.to(dbranch_ptr.dtype.element_ty), mask=inside)
            at = sample * branch_b + rows[:, None] * branch_n + columns[None, :]
            dgate += dx * tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    size = tl.num_programs(1).to(tl.int64) * splits * d
    to = (sample * splits + split) * d + columns
    tl.store(partial_ptr + to, tl.sum(dshift, axis=0), mask=real)
    tl.store(partial_ptr + size + to, tl.sum(dscale, axis=0), mask=real)
    if GATED:
        tl.store(partial_ptr + 2 * size + to, tl.sum(dgate, axis=0), mask=real)


def _rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(
    x: Tensor, gated: tuple[Tensor, Tensor] | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    branch, gate = (_rows(t) for t in gated) if gated else (x, shift)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = torch.empty_like(y) if gated else y
    b, n, d = x.shape
    if x.numel():
        tile = config(d)
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(n, tile["ROWS"] * TILES), b)](
                x, branch, gate, shift, scale, residual, y, n, d, eps,
                x.stride(0), x.stride(1), branch.stride(0), branch.stride(1),
                gate.stride(0), shift.stride(0), scale.stride(0), GATED=gated is not None, TILES=TILES, **tile,
            )  # fmt: skip
    return residual, y


def _backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    gated: tuple[Tensor, Tensor] | None,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbranch, the sums (3 or 2, b, d)); dbranch is dx without a gate."""
    dy, x, scale = _rows(dy), _rows(x), _rows(scale)
    dresidual = dy if dresidual is None else _rows(dresidual)
    branch, gate = (_rows(t) for t in gated) if gated else (x, scale)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbranch = torch.empty(x.shape, dtype=branch.dtype, device=x.device) if gated else dx
    b, n, d = x.shape
    tile = config(d)
    splits = triton.cdiv(n, BACKWARD_ROWS)
    partial = torch.empty((3 if gated else 2, b, splits, d), dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            backward_kernel[(splits, b)](
                x, branch, gate, scale, dy, dresidual, dx, dbranch, partial, n, d, eps, splits,
                x.stride(0), x.stride(1), branch.stride(0), branch.stride(1), gate.stride(0), scale.stride(0),
                dy.stride(0), dy.stride(1), dresidual.stride(0), dresidual.stride(1),
                GATED=gated is not None, TILES=triton.cdiv(BACKWARD_ROWS, tile["ROWS"]), **tile,
            )  # fmt: skip
    return dx, dbranch, partial.sum(dim=2)


@torch.library.custom_op("minilib::modulate", mutates_args=())
def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``minilib.kernels.adaln.modulate``, with a gradient."""
    return _forward(x, None, shift, scale, eps)[1]


@torch.library.custom_op("minilib::modulate_backward", mutates_args=())
def modulate_backward(dy: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale); the last two in float32."""
    dx, _, sums = _backward(dy, None, x, None, scale, eps)
    return dx, sums[0].clone(), sums[1].clone()


@torch.library.custom_op("minilib::gated_residual_modulate", mutates_args=())
def gated_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``minilib.kernels.adaln.gated_residual_modulate``, with a gradient."""
    return _forward(x, (branch, gate), shift, scale, eps)


@torch.library.custom_op("minilib::gated_residual_modulate_backward", mutates_args=())
def gated_residual_modulate_backward(
    dresidual: Tensor, dy: Tensor, residual: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dshift, dscale); the last three in float32."""
    dx, dbranch, sums = _backward(dy, dresidual, residual, (branch, gate), scale, eps)
    return dx, dbranch, sums[2].clone(), sums[0].clone(), sums[1].clone()


def _plain(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


@modulate.register_fake
def _(x, shift, scale, eps):
    return _plain(x)


@modulate_backward.register_fake
def _(dy, x, scale, eps):
    return _plain(x), _plain(scale, torch.float32), _plain(scale, torch.float32)


@gated_residual_modulate.register_fake
def _(x, branch, gate, shift, scale, eps):
    return _plain(x), _plain(x)


@gated_residual_modulate_backward.register_fake
def _(dresidual, dy, residual, branch, gate, scale, eps):
    return _plain(residual), _plain(branch), *(_plain(scale, torch.float32) for _ in range(3))


def _save_modulate(ctx, inputs, output):
    x, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.shift_dtype = shift.dtype


def _modulate_gradient(ctx, dy):
    x, scale = ctx.saved_tensors
    dx, dshift, dscale = modulate_backward(dy, x, scale, ctx.eps)
    return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None


def _save_gated(ctx, inputs, output):
    _, branch, gate, shift, scale, ctx.eps = inputs
    # The residual is an output that the caller keeps; saving it and not x costs no memory.
    ctx.save_for_backward(output[0], branch, gate, scale)
    ctx.shift_dtype = shift.dtype


def _gated_gradient(ctx, dresidual, dy):
    residual, branch, gate, scale = ctx.saved_tensors
    dresidual = torch.zeros_like(residual) if dresidual is None else dresidual
    dy = torch.zeros_like(residual) if dy is None else dy
    dx, dbranch, dgate, dshift, dscale = gated_residual_modulate_backward(
        dresidual, dy, residual, branch, gate, scale, ctx.eps
    )
    return dx, dbranch, dgate.to(gate.dtype), dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None


modulate.register_autograd(_modulate_gradient, setup_context=_save_modulate)
gated_residual_modulate.register_autograd(_gated_gradient, setup_context=_save_gated)
