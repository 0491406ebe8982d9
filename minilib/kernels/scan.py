"""Selective scan: a linear recurrence whose coefficients depend on the input (Mamba, Gu and Dao 2023, arXiv 2312.00752).

For each channel, with a state h of n numbers (section 3.2, equations 2 and 4, with the simple discretisation of B that the
code of state-spaces/mamba uses: ops/selective_scan_interface.py, ``selective_scan_ref``)::

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    h_0 = 0
    y_t = C_t . h_t + D u_t

- ``cpu`` and ``torch``: an ``autograd.Function``. Time comes first, so that a step is one fused operation on contiguous
  memory; everything that is not the recurrence itself is done for a chunk of steps at once, small enough for the cache. The
  backward pass keeps the state at the start of each chunk and computes the others again.
- ``triton``: a program has 32 channels of a sequence, the state in registers; the same chunks in the backward pass.

A step of the reference costs about ten operations and keeps each of their results.
"""

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import POINTWISE, Choice, Kernel, choose_path, why_not_triton

CHUNK_VALUES = 2**17
"""States computed at once on a CPU: half a MiB in float32, which stays in the second-level cache."""
MAX_STATES = 64
"""Largest state of the Triton path."""

Sequence = Float[Tensor, "b d l"]
#: (b, n, l), shared by all channels, or (b, g, n, l), each for d / g of them.
Selection = Float[Tensor, "b n l"] | Float[Tensor, "b g n l"]


def selective_scan(
    u: Sequence,
    dt: Sequence,
    A: Float[Tensor, "d n"],
    B: Selection,
    C: Selection,
    D: Float[Tensor, " d"] | None = None,
) -> Sequence:
    """Scan ``u`` along its last axis. All inputs get gradients, which cannot be differentiated again.

    Args:
        u: input.
        dt: step size of each channel at each time, positive (after the softplus).
        A: of the recurrence, negative where the state is to decay.
        B: what enters the state; (b, n, l), or (b, g, n, l) for g groups of d / g consecutive channels.
        C: what is read from the state, shaped as ``B``.
        D: weight of the direct path; none if None.

    Returns:
        ``y``, with the dtype of ``u``. Half precision is computed in float32.

    Raises:
        ValueError: the shapes do not fit.

    >>> one = torch.ones(1, 1, 4)
    >>> selective_scan(one, one, torch.full((1, 1), -0.6931472), one, one).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    _check(u, dt, A, B, C, D)
    return SCAN(u, dt, A, B, C, D)


def _check(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    if u.ndim != 3 or dt.shape != u.shape:
        raise ValueError(
            f"u and dt must both be (batch, channels, length), got {tuple(u.shape)}, {tuple(dt.shape)}"
        )
    b, d, length = u.shape
    if A.ndim != 2 or len(A) != d or A.shape[1] < 1:
        raise ValueError(f"A must be (channels = {d}, states), got {tuple(A.shape)}")
    n = A.shape[1]
    for name, part in (("B", B), ("C", C)):
        groups = part.shape[1] if part.ndim == 4 else 1
        expected = (b, groups, n, length) if part.ndim == 4 else (b, n, length)
        if part.shape != expected or groups < 1 or d % groups:
            raise ValueError(
                f"{name} must be {(b, n, length)}, or (batch, groups, states, length) with groups that divide the "
                f"{d} channels, got {tuple(part.shape)}"
            )
    if B.shape != C.shape:
        raise ValueError(f"B and C must have the same shape, got {tuple(B.shape)} and {tuple(C.shape)}")
    if D is not None and D.shape != (d,):
        raise ValueError(f"D must be ({d},), got {tuple(D.shape)}")


def reference(
    u: Sequence,
    dt: Sequence,
    A: Float[Tensor, "d n"],
    B: Selection,
    C: Selection,
    D: Float[Tensor, " d"] | None = None,
) -> Sequence:
    """The recurrence, step by step. No indexing in the loop: its backward pass would take time quadratic in the length."""
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = [x.to(exact).unbind(-1) for x in (u, dt, _by_channel(B, len(A)), _by_channel(C, len(A)))]
    A = A.to(exact)
    h = torch.zeros(len(u), *A.shape, dtype=exact, device=u.device)
    ys = []
    for ut, dtt, Bt, Ct in zip(*inputs, strict=True):
        h = torch.exp(dtt.unsqueeze(-1) * A) * h + (dtt * ut).unsqueeze(-1) * Bt
        ys.append((h * Ct).sum(-1))
    y = torch.stack(ys, dim=-1) if ys else torch.zeros_like(u, dtype=exact)
    return (y if D is None else y + D.to(exact).unsqueeze(-1) * u).to(u.dtype)


def _by_channel(part: Tensor, d: int) -> Tensor:
    """(b, n, l) or (b, g, n, l) -> (b, d or 1, n, l)."""
    return part.unsqueeze(1) if part.ndim == 3 else part.repeat_interleave(d // part.shape[1], dim=1)


def chunked(
    u: Sequence,
    dt: Sequence,
    A: Float[Tensor, "d n"],
    B: Selection,
    C: Selection,
    D: Float[Tensor, " d"] | None = None,
) -> Sequence:
    """The recurrence by :class:`ChunkedScan`: groups of channels become sequences of their own, time comes first."""
    b, d, length = u.shape
    if not u.numel():
        return u * 1 + 0 * dt
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    groups = B.shape[1] if B.ndim == 4 else 1
    u_t, dt_t, B_t, C_t = (x.movedim(-1, 0).to(exact).contiguous() for x in (u, dt, B, C))
    per_group = A.to(exact).unflatten(0, (groups, -1)).transpose(1, 2).expand(b, -1, -1, -1).flatten(0, 1)
    of_groups = (x.view(length, b * groups, -1) for x in (u_t, dt_t, B_t, C_t))
    y = ChunkedScan.apply(per_group.contiguous(), *of_groups).view(length, b, d)
    if D is not None:
        y = torch.addcmul(y, u_t, D.to(exact))
    return y.movedim(0, -1).to(u.dtype)


class ChunkedScan(torch.autograd.Function):
    """The scan of p sequences of e channels with n states: A (p, n, e), ``u`` and ``dt`` (l, p, e), B and C (l, p, n)."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """``y`` (l, p, e), without D."""
        ctx.chunk = min(len(u), max(1, CHUNK_VALUES // A.numel()))
        h, y, starts = torch.zeros_like(A), torch.empty_like(u), []
        decay, hs = (A.new_empty(ctx.chunk, *A.shape) for _ in range(2))
        with _without_autocast(u):
            for part in _chunks(len(u), ctx.chunk):
                starts.append(h)
                _states(h, u[part], dt[part], A, B[part], decay, hs)
                size = part.stop - part.start
                h = hs[size - 1].clone()
                y[part] = (C[part].unsqueeze(2) @ hs[:size]).squeeze(2)
        # One chunk holds them all: keep the states, rather than make them again.
        ctx.kept = 2 if ctx.chunk == len(u) else 0
        ctx.save_for_backward(A, u, dt, B, C, *(decay, hs)[: ctx.kept], *starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """The adjoint recurrence g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}, where g_t is the gradient of h_t."""
        A, u, dt, B, C, *rest = ctx.saved_tensors
        kept, starts = rest[: ctx.kept], rest[ctx.kept :]
        dy = dy.contiguous()  # the gradient of a sum has stride 0, and bmm would copy it matrix by matrix
        du, ddt, dB, dC = (torch.empty_like(x) for x in (u, dt, B, C))
        dA, later = torch.zeros_like(A), torch.zeros_like(A)
        memory = [A.new_empty(ctx.chunk, *A.shape) for _ in range(3)]  # two to work in, one for the gradients
        with _without_autocast(u):
            for part, start in reversed(list(zip(_chunks(len(u), ctx.chunk), starts, strict=True))):
                exponent, product, g = (x[: part.stop - part.start] for x in memory)
                decay, hs = kept or (exponent, product)
                x = dt[part] * u[part] if kept else _states(start, u[part], dt[part], A, B[part], decay, hs)
                dC[part] = (hs @ dy[part].unsqueeze(3)).squeeze(3)
                later = _adjoint(later, C[part], dy[part], decay, g)
                dB[part] = (g @ x.unsqueeze(3)).squeeze(3)
                dx = (B[part].unsqueeze(2) @ g).squeeze(2)
                # Gradient of dt A: g_t h_{t-1} decay_t, in the memory of the decay unless that is kept.
                torch.mul(decay[1:], hs[:-1], out=exponent[1:])
                torch.mul(decay[0], start, out=exponent[0])
                exponent.mul_(g)
                dA += torch.mul(exponent, dt[part].unsqueeze(2), out=product).sum(0)
                du[part] = dx * dt[part]
                ddt[part] = torch.addcmul(exponent.mul_(A).sum(2), dx, u[part])
        return dA, du, ddt, dB, dC


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _without_autocast(x: Tensor) -> Any:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _states(start: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, decay: Tensor, hs: Tensor) -> Tensor:
    """Of a chunk, into ``decay`` and ``hs`` (l, p, n, e): exp(dt A) and the state after each step. Returns dt u."""
    torch.mul(dt.unsqueeze(2), A, out=decay[: len(u)]).exp_()
    x = dt * u
    torch.mul(B.unsqueeze(3), x.unsqueeze(2), out=hs[: len(u)])
    h = start
    for now, by in zip(hs[: len(u)].unbind(0), decay.unbind(0), strict=False):
        h = now.addcmul_(by, h)
    return x


def _adjoint(later: Tensor, C: Tensor, dy: Tensor, decay: Tensor, g: Tensor) -> Tensor:
    """Of a chunk, into ``g`` (l, p, n, e): the gradients of its states. Returns what the chunk before it gets."""
    torch.mul(C.unsqueeze(3), dy.unsqueeze(2), out=g)
    gs, decays = g.unbind(0), decay.unbind(0)
    gs[-1].add_(later)
    for t in range(len(gs) - 1, 0, -1):
        gs[t - 1].addcmul_(decays[t], gs[t])
    return decays[0] * gs[0]


def _triton(
    u: Sequence,
    dt: Sequence,
    A: Float[Tensor, "d n"],
    B: Selection,
    C: Selection,
    D: Float[Tensor, " d"] | None = None,
) -> Sequence:
    from ._triton import scan

    groups = [x if x.ndim == 4 else x.unsqueeze(1) for x in (B, C)]
    # Channels last: neighbouring threads have neighbouring channels.
    y = scan.selective_scan(u.transpose(1, 2), dt.transpose(1, 2), A, *(x.transpose(2, 3) for x in groups))[0]
    y = y.transpose(1, 2)
    return (y if D is None else torch.addcmul(y, u.float(), D.float().unsqueeze(-1))).to(u.dtype)


def _problem(*tensors: Tensor | None) -> str | None:
    if tensors[2].shape[1] > MAX_STATES:
        return f"A has {tensors[2].shape[1]} states, and its programs hold at most {MAX_STATES}"
    return why_not_triton(*(t for t in tensors if t is not None), needs=POINTWISE)


def _choose(*tensors: Tensor | None) -> Choice:
    given = [t for t in tensors if t is not None]
    problem = _problem(*tensors) if given[0].is_cuda else None
    if problem:
        return Choice("selective_scan", "torch", f"not Triton: {problem}")
    return choose_path("selective_scan", *given, needs=POINTWISE)


SCAN = Kernel(
    "selective_scan",
    {"reference": reference, "cpu": chunked, "torch": chunked, "triton": _triton},
    _choose,
    _problem,
)
