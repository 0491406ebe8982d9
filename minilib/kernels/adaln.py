"""Adaptive layer norm: normalise a token, then scale and shift it by the condition; also right after a gated residual.

DiT (Peebles and Xie 2023, section 3.2; facebookresearch/DiT: models.py, ``modulate`` and ``DiTBlock.forward``)::

    y = LayerNorm(x) (1 + scale) + shift            # before attention
    x = x + gate * branch;  y = LayerNorm(x) (1 + scale) + shift     # between attention and the MLP

LayerNorm has no weights of its own. Both are bound by memory, not arithmetic: written as separate operations each reads and
writes all of x several times. The Triton path reads and writes it once; its statistics are float32 whatever the dtype.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .dispatch import POINTWISE, Choice, Kernel, choose_path, why_not_triton

MAX_WIDTH = 4096
"""Widest token of the Triton path, which keeps whole tokens in registers."""

Tokens = Float[Tensor, "b n d"]
PerSample = Float[Tensor, "b d"]


def modulate(x: Tokens, shift: PerSample, scale: PerSample, eps: float = 1e-6) -> Tokens:
    """LayerNorm(x) (1 + scale) + shift, one shift and one scale a sample.

    ``shift`` and ``scale`` may be views, as ``chunk(6, dim=-1)`` gives. The result has the dtype of ``x``.

    Raises:
        ValueError: the shapes do not fit.

    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> modulate(x, torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), eps=0.0)
    tensor([[[-1.,  2.]]])
    """
    _check(x, shift=shift, scale=scale)
    return MODULATE(x, shift, scale, eps)


def gated_residual_modulate(
    x: Tokens, branch: Tokens, gate: PerSample, shift: PerSample, scale: PerSample, eps: float = 1e-6
) -> tuple[Tokens, Tokens]:
    """The new residual x + gate * branch, and its ``modulate``.

    Returns:
        (residual, modulated), both with the dtype of ``x``.

    Raises:
        ValueError: the shapes do not fit.

    >>> x, one = torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 2)
    >>> gated_residual_modulate(x, x, one, 0 * one, 0 * one, eps=0.0)
    (tensor([[[2., 6.]]]), tensor([[[-1.,  1.]]]))
    """
    _check(x, gate=gate, shift=shift, scale=scale)
    if branch.shape != x.shape:
        raise ValueError(f"branch is {tuple(branch.shape)}, but x is {tuple(x.shape)}: they are added")
    return GATED_RESIDUAL_MODULATE(x, branch, gate, shift, scale, eps)


def _check(x: Tensor, **per_sample: Tensor) -> None:
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"x must be (batch, tokens, width), got {tuple(x.shape)}")
    for name, value in per_sample.items():
        if value.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name} must be (batch, width) = {(x.shape[0], x.shape[2])}, got {tuple(value.shape)}"
            )


def modulate_reference(x: Tokens, shift: PerSample, scale: PerSample, eps: float = 1e-6) -> Tokens:
    """The definition: mean and (biased) variance over the width, in float32 for half precision."""
    h = x if x.dtype == torch.float64 else x.float()
    h = h - h.mean(dim=-1, keepdim=True)
    h = h * (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (h * (1 + scale.unsqueeze(1).to(h.dtype)) + shift.unsqueeze(1).to(h.dtype)).to(x.dtype)


def gated_residual_modulate_reference(
    x: Tokens, branch: Tokens, gate: PerSample, shift: PerSample, scale: PerSample, eps: float = 1e-6
) -> tuple[Tokens, Tokens]:
    """The definition, one step after the other."""
    residual = (x + gate.unsqueeze(1) * branch).to(x.dtype)
    return residual, modulate_reference(residual, shift, scale, eps)


def _modulate_torch(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Two operations: the fused layer norm, and one multiply-add in the place of two."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1)).to(x.dtype)


def _gated_torch(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    residual = torch.addcmul(x, gate.unsqueeze(1), branch).to(x.dtype)
    return residual, _modulate_torch(residual, shift, scale, eps)


def _modulate_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    from ._triton import adaln

    return adaln.modulate(x, shift, scale, eps)


def _gated_triton(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    from ._triton import adaln

    return adaln.gated_residual_modulate(x, branch, gate, shift, scale, eps)


def _problem(x: Tensor, *others: Tensor | float, eps: float = 1e-6) -> str | None:
    if x.shape[-1] > MAX_WIDTH:
        return f"the tokens are {x.shape[-1]} wide, and its programs hold at most {MAX_WIDTH}"
    tensors = (t for t in others if isinstance(t, Tensor))
    return why_not_triton(x, *tensors, needs=POINTWISE)


def _rule(op: str) -> Callable[..., Choice]:
    def choose(x: Tensor, *others: Tensor | float, eps: float = 1e-6) -> Choice:
        problem = _problem(x, *others) if x.is_cuda else None
        if problem:
            return Choice(op, "torch", f"not Triton: {problem}")
        return choose_path(op, x, *(t for t in others if isinstance(t, Tensor)))

    return choose


MODULATE = Kernel(
    "modulate",
    {
        "reference": modulate_reference,
        "cpu": _modulate_torch,
        "torch": _modulate_torch,
        "triton": _modulate_triton,
    },
    _rule("modulate"),
    _problem,
)
GATED_RESIDUAL_MODULATE = Kernel(
    "gated_residual_modulate",
    {
        "reference": gated_residual_modulate_reference,
        "cpu": _gated_torch,
        "torch": _gated_torch,
        "triton": _gated_triton,
    },
    _rule("gated_residual_modulate"),
    _problem,
)
