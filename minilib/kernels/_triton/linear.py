"""Linear attention in Triton: a reduction over tokens, and a product of every token with its small result.

Forward: ``reduce_kernel`` makes S = mean phi(k)^T v and s = mean phi(k), ``apply_kernel`` phi(q) S / (phi(q) . s + eps).
Backward, with z the denominator, G = dout / z and g = -(G . out) (a number a query)::

    dq = (G S^T + g s^T) phi'(q)           input_gradient_kernel
    dS = phi(q)^T G,  ds = phi(q)^T g      reduce_kernel
    dk = (v dS^T + 1 ds^T) phi'(k) / m     input_gradient_kernel
    dv = phi(k) dS / m                     apply_kernel

Products take the dtype of the input (that is what the tensor cores do) and add up in float32; S is kept in float32. The
reduction is in two stages, partial sums and their sum: no atomics, the same result each time. Any width: it is cut into
blocks, the last one padded with zeros.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

RELU, ELU = tl.constexpr(0), tl.constexpr(1)
CODES = {"relu": 0, "elu": 1}


def config(d: int, e: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens and columns of a block, warps, stages of the pipeline: tests/kernels/aot says that these do not spill.

    float32 has no tensor cores to feed, and large blocks of it leave the registers.
    """
    most = 32 if dtype == torch.float32 else 128
    columns = [max(16, min(most, triton.next_power_of_2(width))) for width in (d, e)]
    return {
        "ROWS": 64 if max(columns) == 64 else 32,
        "COLUMNS": columns[0],
        "VALUES": columns[1],
        "num_warps": 8 if max(columns) == 128 else 4,
        "num_stages": 2,
    }


@triton.jit
@no_type_check
def _phi(x, inside, FEATURE: tl.constexpr):
    """The features in float32, zero where there is no token or column: ELU + 1 of a padded 0 would be 1."""
    x = x.to(tl.float32)
    if FEATURE == ELU:
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        x = tl.maximum(x, 0.0)
    return tl.where(inside, x, 0.0)


@triton.jit
@no_type_check
def _slope(x, FEATURE: tl.constexpr):
    """The derivative of the features."""
    x = x.to(tl.float32)
    below = tl.exp(tl.minimum(x, 0.0)) if FEATURE == ELU else tl.zeros_like(x)
    return tl.where(x > 0, 1.0, below)


@triton.jit
@no_type_check
def reduce_kernel(
    x_ptr, y_ptr, weight_ptr, state_ptr, sums_ptr,
    n, d, e, heads, splits, turns, x_b, x_h, x_n, y_b, y_h, y_n,
    FEATURE: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Partial phi(x)^T y and phi(x)^T weight (weight 1 if not WEIGHTED). Grid (splits, batch heads, blocks of d and e)."""
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(e, VALUES)
    columns = (tl.program_id(2) // blocks) * COLUMNS + tl.arange(0, COLUMNS)
    values = (tl.program_id(2) % blocks) * VALUES + tl.arange(0, VALUES)
    x_ptr += (head // heads) * x_b + (head % heads) * x_h
    y_ptr += (head // heads) * y_b + (head % heads) * y_h
    state = tl.zeros((COLUMNS, VALUES), tl.float32)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for turn in range(0, turns):
        rows = ((split * turns + turn) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_n + columns[None, :], mask=inside, other=0.0)
        features = _phi(x, inside, FEATURE)
        at = rows[:, None] * y_n + values[None, :]
        y = tl.load(y_ptr + at, mask=(rows < n)[:, None] & (values < e)[None, :], other=0.0)
        state = tl.dot(tl.trans(features.to(y.dtype)), y, state, input_precision="ieee")
        if WEIGHTED:
            weight = tl.load(weight_ptr + head * n + rows, mask=rows < n, other=0.0)
            sums += tl.sum(features * weight[:, None], axis=0)
        else:
            sums += tl.sum(features, axis=0)
    part = head * splits + split
    to = part * d * e + columns[:, None] * e + values[None, :]
    tl.store(state_ptr + to, state, mask=(columns < d)[:, None] & (values < e)[None, :])
    if tl.program_id(2) % blocks == 0:
        tl.store(sums_ptr + part * d + columns, sums, mask=columns < d)


@triton.jit
@no_type_check
def apply_kernel(
    x_ptr, state_ptr, sums_ptr, out_ptr, z_ptr,
    n, d, e, heads, eps, scale, x_b, x_h, x_n, out_b, out_h, out_n,
    FEATURE: tl.constexpr, NORMALISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """phi(x) state scale, or, if NORMALISE, divided by z = phi(x) . sums + eps. Grid (tokens, batch heads, blocks of e)."""
    head = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    values = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    x_ptr += (head // heads) * x_b + (head % heads) * x_h
    out = tl.zeros((ROWS, VALUES), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_n + columns[None, :], mask=inside, other=0.0)
        features = _phi(x, inside, FEATURE)
        at = head * d * e + columns[:, None] * e + values[None, :]
        state = tl.load(state_ptr + at, mask=(columns < d)[:, None] & (values < e)[None, :], other=0.0)
        out = tl.dot(features.to(x.dtype), state, out, input_precision="ieee")
        if NORMALISE:
            sums = tl.load(sums_ptr + head * d + columns, mask=columns < d, other=0.0)
            z += tl.sum(features * sums[None, :], axis=1)
    if NORMALISE:
        z += eps
        out = out / z[:, None]
        if tl.program_id(2) == 0:
            tl.store(z_ptr + head * n + rows, z, mask=rows < n)
    else:
        out = out * scale
    to = (head // heads) * out_b + (head % heads) * out_h + rows[:, None] * out_n + values[None, :]
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (values < e)[None, :])


@triton.jit
@no_type_check
def input_gradient_kernel(
    x_ptr, y_ptr, weight_ptr, state_ptr, sums_ptr, out_ptr,
    n, d, e, heads, scale, x_b, x_h, x_n, y_b, y_h, y_n, out_b, out_h, out_n,
    FEATURE: tl.constexpr, SUMS: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """(y state^T scale + weight sums^T) phi'(x), without the second term if not SUMS. Grid (tokens, batch heads, blocks of d)."""
    head = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    x_ptr += (head // heads) * x_b + (head % heads) * x_h
    y_ptr += (head // heads) * y_b + (head % heads) * y_h
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, e, VALUES):
        values = start + tl.arange(0, VALUES)
        at = rows[:, None] * y_n + values[None, :]
        y = tl.load(y_ptr + at, mask=(rows < n)[:, None] & (values < e)[None, :], other=0.0)
        at = head * d * e + columns[:, None] * e + values[None, :]
        state = tl.load(state_ptr + at, mask=(columns < d)[:, None] & (values < e)[None, :], other=0.0)
        out = tl.dot(y, tl.trans(state), out, input_precision="ieee")
    out = out * scale
    if SUMS:
        sums = tl.load(sums_ptr + head * d + columns, mask=columns < d, other=0.0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + head * n + rows, mask=rows < n, other=0.0)
            out += weight[:, None] * sums[None, :]
        else:
            out += sums[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_n + columns[None, :], mask=inside, other=0.0)
    out = out * _slope(x, FEATURE)
    to = (head // heads) * out_b + (head % heads) * out_h + rows[:, None] * out_n + columns[None, :]
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=inside)


def _rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _heads_last(like: Tensor, width: int) -> Tensor:
    """Room for (b, h, n, width), in memory (b, n, h, width): joining the heads again then costs no copy."""
    b, h, n, _ = like.shape
    return torch.empty(b, n, h, width, dtype=like.dtype, device=like.device).transpose(1, 2)


def _reduce(x: Tensor, y: Tensor, weight: Tensor | None, code: int) -> tuple[Tensor, Tensor]:
    """(phi(x)^T y / n, phi(x)^T weight / n) in float32, (b h, d, e) and (b h, d)."""
    b, h, n, d = x.shape
    e = y.shape[-1]
    block = config(d, e, x.dtype)
    # About 512 programs, whatever the GPU, so that the order of the sums depends on the shapes alone.
    tokens = min(2048, max(2 * block["ROWS"], triton.next_power_of_2(max(1, b * h * n // 512))))
    turns = min(tokens // block["ROWS"], triton.cdiv(n, block["ROWS"]))
    splits = triton.cdiv(n, turns * block["ROWS"]) if turns else 0
    state = torch.empty(b * h, splits, d, e, dtype=torch.float32, device=x.device)
    sums = torch.empty(b * h, splits, d, dtype=torch.float32, device=x.device)
    if state.numel():
        grid = (splits, b * h, triton.cdiv(d, block["COLUMNS"]) * triton.cdiv(e, block["VALUES"]))
        reduce_kernel[grid](
            x, y, sums if weight is None else weight, state, sums, n, d, e, h, splits, turns,
            *x.stride()[:3], *y.stride()[:3], FEATURE=code, WEIGHTED=weight is not None, **block,
        )  # fmt: skip
    return state.sum(dim=1) / max(n, 1), sums.sum(dim=1) / max(n, 1)


def _apply(
    x: Tensor, state: Tensor, sums: Tensor | None, code: int, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """phi(x) state, divided by z if there are ``sums`` and else multiplied by ``scale``; and z, (b h, n)."""
    b, h, n, d = x.shape
    e = state.shape[-1]
    out = _heads_last(x, e)
    z = torch.empty(b * h, n if sums is not None else 0, dtype=torch.float32, device=x.device)
    block = config(d, e, x.dtype)
    if out.numel():
        apply_kernel[(triton.cdiv(n, block["ROWS"]), b * h, triton.cdiv(e, block["VALUES"]))](
            x, state.to(x.dtype), state if sums is None else sums, out, z, n, d, e, h, eps, scale,
            *x.stride()[:3], *out.stride()[:3], FEATURE=code, NORMALISE=sums is not None, **block,
        )  # fmt: skip
    return out, z


def _input_gradient(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    state: Tensor,
    sums: Tensor | None,
    code: int,
    scale: float,
) -> Tensor:
    b, h, n, d = x.shape
    e = y.shape[-1]
    out = _heads_last(x, d)
    block = config(d, e, x.dtype)
    if out.numel():
        input_gradient_kernel[(triton.cdiv(n, block["ROWS"]), b * h, triton.cdiv(d, block["COLUMNS"]))](
            x, y, state if weight is None else weight, state.to(y.dtype), state if sums is None else sums, out,
            n, d, e, h, scale, *x.stride()[:3], *y.stride()[:3], *out.stride()[:3],
            FEATURE=code, SUMS=sums is not None, WEIGHTED=weight is not None, **block,
        )  # fmt: skip
    return out


@torch.library.custom_op("minilib::linear_attention", mutates_args=())
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature: str, normalise: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, z, S, s); the last three in float32, for the backward pass; s and z are empty if not ``normalise``."""
    q, k, v, code = _rows(q), _rows(k), _rows(v), CODES[feature]
    with torch.cuda.device_of(q):
        state, sums = _reduce(k, v, None, code)
        out, z = _apply(q, state, sums if normalise else None, code, eps, float(k.shape[2]))
    return out, z, state, sums if normalise else sums.new_empty(0)


@torch.library.custom_op("minilib::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, z: Tensor, state: Tensor, sums: Tensor, feature: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    q, k, v, code = _rows(q), _rows(k), _rows(v), CODES[feature]
    n, m = q.shape[2], k.shape[2]
    normalise = sums.numel() > 0 or z.numel() > 0
    if normalise:
        g = dout.float() / z.view(*dout.shape[:3], 1)
        weight = -(g * out).sum(dim=-1).flatten(0, 1).contiguous()
        y, kept, scale = g.to(q.dtype), sums, 1.0
    else:
        y, weight, kept, scale = _rows(dout), None, None, float(m)
    with torch.cuda.device_of(q):
        dq = _input_gradient(q, y, weight, state, kept, code, scale)
        dstate, dsums = _reduce(q, y, weight, code)
        # _reduce gives means over the n queries. What is wanted is the sum, over m if S was a mean over the m keys.
        scale = n / m if normalise else float(n)
        dk = _input_gradient(k, v, None, dstate, dsums * scale if normalise else None, code, scale)
        dv, _ = _apply(k, dstate, None, code, 0.0, scale)
    return dq, dk, dv


@linear_attention.register_fake
def _(q, k, v, feature, normalise, eps):
    b, h, n, d = q.shape
    e = v.shape[-1]
    single = {"dtype": torch.float32, "device": q.device}
    z = torch.empty(b * h, n if normalise else 0, **single)
    sums = torch.empty((b * h, d) if normalise else (0,), **single)
    return _heads_last(q, e), z, torch.empty(b * h, d, e, **single), sums


@linear_attention_backward.register_fake
def _(dout, q, k, v, out, z, state, sums, feature):
    return _heads_last(q, q.shape[-1]), _heads_last(k, k.shape[-1]), _heads_last(k, v.shape[-1])


def _save(ctx, inputs, output):
    q, k, v, ctx.feature, _, _ = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx, dout, *of_what_is_kept):
    q, k, v, out, z, state, sums = ctx.saved_tensors
    grads = linear_attention_backward(dout, q, k, v, out, z, state, sums, ctx.feature)
    return *grads, None, None, None


linear_attention.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.minilib.linear_attention)
def _flops(q_shape, k_shape, v_shape, feature, normalise, *args, out_shape=None, **kwargs) -> int:
    b, h, n, d = q_shape
    m, e = v_shape[2:]
    return 2 * b * h * d * (m * e + n * e + (n if normalise else 0))


@register_flop_formula(torch.ops.minilib.linear_attention_backward)
def _backward_flops(dout, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    b, h, n, d = q_shape
    m, e = v_shape[2:]
    return 2 * b * h * d * e * (2 * n + 2 * m)
