"""Local attention in Triton: a program has the queries of one tile and walks over the keys of its window and the extra ones.

Online softmax in float32, logits in base 2; the products are taken in the dtype of the inputs, so that the tensor cores do
them. The backward pass computes the weights again from the saved log-sum-exp. A disk is symmetric: who reads a tile's keys lies
in the same window, so that the gradients of keys and values walk over the same places as those of queries. No atomics.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

TILE = 8
"""Rows and columns of a tile: 64 tokens a program."""
LOG2E = 1.4426950408889634


def config(d: int, *, backward: bool = False) -> dict[str, int]:
    """For heads of width d: tile, keys a turn, padded width, warps and stages, so that nothing leaves the registers."""
    return {
        "TILE": TILE,
        "BLOCK": 64 if d <= (32 if backward else 64) else 32,
        "WIDTH": max(16, triton.next_power_of_2(d)),
        "num_warps": 8 if backward and d > 64 else 4,
        "num_stages": 2,
    }


@triton.jit
@no_type_check
def _tile(TILE: tl.constexpr, rows, columns):
    """Positions of a program's tile of tokens, their index in the grid, and which are inside it."""
    across = tl.cdiv(columns, TILE)
    inside = tl.arange(0, TILE * TILE)
    y = (tl.program_id(0) // across) * TILE + inside // TILE
    x = (tl.program_id(0) % across) * TILE + inside % TILE
    return y, x, y * columns + x, (y < rows) & (x < columns)


@triton.jit
@no_type_check
def _window(step, TILE: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr, rows, columns):
    """Positions of the window's tokens of one turn, their index in the grid, and which are inside it."""
    SIDE: tl.constexpr = TILE + 2 * REACH
    across = tl.cdiv(columns, TILE)
    place = step + tl.arange(0, BLOCK)
    y = (tl.program_id(0) // across) * TILE - REACH + place // SIDE
    x = (tl.program_id(0) % across) * TILE - REACH + place % SIDE
    real = (place < SIDE * SIDE) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    return y, x, y * columns + x, real


@triton.jit
@no_type_check
def _near(y, x, other_y, other_x, limit):
    down = y[:, None] - other_y[None, :]
    across = x[:, None] - other_x[None, :]
    return down * down + across * across < limit


@triton.jit
@no_type_check
def _rows(ptr, token, real, stride, d, WIDTH: tl.constexpr):
    """(tokens, WIDTH), zero where a token is not real."""
    column = tl.arange(0, WIDTH)
    mask = real[:, None] & (column < d)[None, :]
    return tl.load(ptr + token[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def _put(ptr, values, token, real, stride, d, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = real[:, None] & (column < d)[None, :]
    tl.store(ptr + token[:, None] * stride + column[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _read(top, total, acc, q, keys, values, seen, scale):
    """One turn of the online softmax."""
    logits = tl.where(seen, tl.dot(q, tl.trans(keys), input_precision="ieee") * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    # A query that has seen nothing yet: not inf - inf.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    keep = tl.exp2(top - base)
    acc = acc * keep[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_top, total * keep + tl.sum(weights, axis=1), acc


@triton.jit
@no_type_check
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows, columns, m, d, limit, scale, heads,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    REACH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, batch heads). ``out`` (b, h, rows columns, d) is contiguous; ``lse`` is in base 2."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    size = rows * columns
    y, x, token, real = _tile(TILE, rows, columns)
    q = _rows(q_ptr + batch * q_b + head * q_h, token, real, q_n, d, WIDTH)
    k_ptr += batch * k_b + head * k_h
    v_ptr += batch * v_b + head * v_h
    top = tl.full((TILE * TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE * TILE,), tl.float32)
    acc = tl.zeros((TILE * TILE, WIDTH), tl.float32)
    SIDE: tl.constexpr = TILE + 2 * REACH
    for step in range(0, SIDE * SIDE, BLOCK):
        key_y, key_x, key, inside = _window(step, TILE, REACH, BLOCK, rows, columns)
        seen = inside[None, :] & _near(y, x, key_y, key_x, limit)
        keys = _rows(k_ptr, key, inside, k_n, d, WIDTH)
        values = _rows(v_ptr, key, inside, v_n, d, WIDTH)
        top, total, acc = _read(top, total, acc, q, keys, values, seen, scale)
    for step in range(size, m, BLOCK):
        key = step + tl.arange(0, BLOCK)
        keys = _rows(k_ptr, key, key < m, k_n, d, WIDTH)
        values = _rows(v_ptr, key, key < m, v_n, d, WIDTH)
        top, total, acc = _read(top, total, acc, q, keys, values, (key < m)[None, :], scale)
    total = tl.where(real, total, 1.0)
    _put(out_ptr + pair * size * d, acc / total[:, None], token, real, d, d, WIDTH)
    tl.store(lse_ptr + pair * size + token, top + tl.log2(total), mask=real)


@triton.jit
@no_type_check
def _turn_queries(acc, q, keys, values, dout, lse, delta, seen, scale):
    """One turn of the gradient of queries."""
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    weights = tl.where(seen, tl.exp2(logits - lse[:, None]), 0.0)
    dweights = tl.dot(dout, tl.trans(values), input_precision="ieee")
    dlogits = weights * (dweights - delta[:, None])
    return acc + tl.dot(dlogits.to(keys.dtype), keys, input_precision="ieee")


@triton.jit
@no_type_check
def queries_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, rows, columns, m, d, limit, scale, heads,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    REACH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries. Grid and walk of the forward kernel; ``dout`` and ``dq`` are contiguous."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    size = rows * columns
    y, x, token, real = _tile(TILE, rows, columns)
    q = _rows(q_ptr + batch * q_b + head * q_h, token, real, q_n, d, WIDTH)
    dout = _rows(dout_ptr + pair * size * d, token, real, d, d, WIDTH)
    lse = tl.load(lse_ptr + pair * size + token, mask=real, other=0.0)
    delta = tl.load(delta_ptr + pair * size + token, mask=real, other=0.0)
    k_ptr += batch * k_b + head * k_h
    v_ptr += batch * v_b + head * v_h
    acc = tl.zeros((TILE * TILE, WIDTH), tl.float32)
    SIDE: tl.constexpr = TILE + 2 * REACH
    for step in range(0, SIDE * SIDE, BLOCK):
        key_y, key_x, key, inside = _window(step, TILE, REACH, BLOCK, rows, columns)
        seen = real[:, None] & inside[None, :] & _near(y, x, key_y, key_x, limit)
        keys = _rows(k_ptr, key, inside, k_n, d, WIDTH)
        values = _rows(v_ptr, key, inside, v_n, d, WIDTH)
        acc = _turn_queries(acc, q, keys, values, dout, lse, delta, seen, scale)
    for step in range(size, m, BLOCK):
        key = step + tl.arange(0, BLOCK)
        keys = _rows(k_ptr, key, key < m, k_n, d, WIDTH)
        values = _rows(v_ptr, key, key < m, v_n, d, WIDTH)
        seen = real[:, None] & (key < m)[None, :]
        acc = _turn_queries(acc, q, keys, values, dout, lse, delta, seen, scale)
    # scale is log2(e) / sqrt(d): undo the base.
    _put(dq_ptr + pair * size * d, acc * (scale * 0.6931471805599453), token, real, d, d, WIDTH)


@triton.jit
@no_type_check
def keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    rows, columns, m, d, limit, scale, heads,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    EXTRA: tl.constexpr, REACH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. A program has a tile of the grid's keys and walks over the queries of its window;

    with EXTRA it has TILE TILE of the extra keys, and walks over all queries. ``dk`` and ``dv`` are contiguous.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    size = rows * columns
    SIDE: tl.constexpr = TILE + 2 * REACH
    if EXTRA:
        token = size + tl.program_id(0) * TILE * TILE + tl.arange(0, TILE * TILE)
        real = token < m
        turns = size
    else:
        y, x, token, real = _tile(TILE, rows, columns)
        turns = SIDE * SIDE
    keys = _rows(k_ptr + batch * k_b + head * k_h, token, real, k_n, d, WIDTH)
    values = _rows(v_ptr + batch * v_b + head * v_h, token, real, v_n, d, WIDTH)
    q_ptr += batch * q_b + head * q_h
    dk = tl.zeros((TILE * TILE, WIDTH), tl.float32)
    dv = tl.zeros((TILE * TILE, WIDTH), tl.float32)
    for step in range(0, turns, BLOCK):
        if EXTRA:
            query = step + tl.arange(0, BLOCK)
            inside = query < size
            seen = real[:, None] & inside[None, :]
        else:
            query_y, query_x, query, inside = _window(step, TILE, REACH, BLOCK, rows, columns)
            seen = real[:, None] & inside[None, :] & _near(y, x, query_y, query_x, limit)
        q = _rows(q_ptr, query, inside, q_n, d, WIDTH)
        dout = _rows(dout_ptr + pair * size * d, query, inside, d, d, WIDTH)
        lse = tl.load(lse_ptr + pair * size + query, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + pair * size + query, mask=inside, other=0.0)
        logits = tl.dot(keys, tl.trans(q), input_precision="ieee") * scale
        weights = tl.where(seen, tl.exp2(logits - lse[None, :]), 0.0)
        dv += tl.dot(weights.to(dout.dtype), dout, input_precision="ieee")
        dweights = tl.dot(values, tl.trans(dout), input_precision="ieee")
        dlogits = weights * (dweights - delta[None, :])
        dk += tl.dot(dlogits.to(q.dtype), q, input_precision="ieee")
    _put(dk_ptr + pair * m * d, dk * (scale * 0.6931471805599453), token, real, d, d, WIDTH)
    _put(dv_ptr + pair * m * d, dv, token, real, d, d, WIDTH)


def _strided(x: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _common(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, limit: int) -> list[int | float]:
    """The arguments that all kernels take; the limit must fit into 32 bits."""
    h, d = q.shape[1], q.shape[3]
    limit = min(limit, rows * rows + columns * columns)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    return [rows, columns, k.shape[2], d, limit, LOG2E * d**-0.5, h, *strides]


def _reach(reach: int, rows: int, columns: int) -> int:
    return min(reach, max(rows, columns) - 1)


def _tiles(rows: int, columns: int) -> int:
    return triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE)


@torch.library.custom_op("minilib::local_attention", mutates_args=())
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, limit: int, reach: int
) -> tuple[Tensor, Tensor]:
    """Queries of the grid, all keys and values -> the result and the log-sum-exp (b, h, rows columns) in base 2."""
    q, k, v = (_strided(x) for x in (q, k, v))
    out, lse = _empty(q)
    b, h, _, d = q.shape
    if q.numel():
        options = {"REACH": _reach(reach, rows, columns), **config(d)}
        common = _common(q, k, v, rows, columns, limit)
        forward_kernel[(_tiles(rows, columns), b * h)](q, k, v, out, lse, *common, **options)
    return out, lse


@torch.library.custom_op("minilib::local_attention_backward", mutates_args=())
def local_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rows: int, columns: int, limit: int, reach: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous."""
    q, k, v, dout = (*(_strided(x) for x in (q, k, v)), dout.contiguous())
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    b, h, size, d = q.shape
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    delta = (dout.float() * out.float()).sum(-1)
    m = k.shape[2]
    common = _common(q, k, v, rows, columns, limit)
    options = {"REACH": _reach(reach, rows, columns), **config(d, backward=True)}
    tiles = _tiles(rows, columns)
    queries_kernel[(tiles, b * h)](q, k, v, dout, lse, delta, dq, *common, **options)
    keys_kernel[(tiles, b * h)](q, k, v, dout, lse, delta, dk, dv, *common, EXTRA=False, **options)
    if m > size:
        blocks = triton.cdiv(m - size, TILE * TILE)
        keys_kernel[(blocks, b * h)](q, k, v, dout, lse, delta, dk, dv, *common, EXTRA=True, **options)
    return dq, dk, dv


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@local_attention.register_fake
def _(q, k, v, rows, columns, limit, reach):
    return _empty(q)


@local_attention_backward.register_fake
def _(dout, q, k, v, out, lse, rows, columns, limit, reach):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx, inputs, output):
    *tensors, ctx.rows, ctx.columns, ctx.limit, ctx.reach = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, _):
    grads = local_attention_backward(dout, *ctx.saved_tensors, ctx.rows, ctx.columns, ctx.limit, ctx.reach)
    return *grads, None, None, None, None


local_attention.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.minilib.local_attention)
def _flops(q_shape, k_shape, v_shape, rows, columns, limit, reach, *args, out_shape=None, **kwargs) -> int:
    """The products that are taken, masked or not: those of every tile with its window and the extra keys."""
    b, h, size, d = q_shape
    side = TILE + 2 * _reach(reach, rows, columns)
    return 4 * b * h * d * _tiles(rows, columns) * TILE**2 * (side**2 + k_shape[2] - size)


@register_flop_formula(torch.ops.minilib.local_attention_backward)
def _backward_flops(dout_shape, q_shape, k_shape, v_shape, out_shape_, lse_shape, *args, **kwargs) -> int:
    """Seven products where the forward pass has two: three for the queries, four for keys and values."""
    rows, columns, limit, reach = args[:4]
    return 7 * _flops(q_shape, k_shape, v_shape, rows, columns, limit, reach) // 2
