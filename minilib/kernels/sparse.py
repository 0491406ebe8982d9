"""Weights of which some are zero, and stay zero: masks by magnitude, and a mask that gradients respect.

A mask saves no time by itself: the product still multiplies by the zeros. What it shows is how much quality is left at a given
number of weights; GPUs from 8.0 on run the pattern 2:4 up to twice as fast through their own kernels.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize


def magnitude_mask(
    weight: Float[Tensor, "..."], sparsity: float | str = 0.5, *, per_row: bool = False
) -> Bool[Tensor, "..."]:
    """True where a weight is kept: the largest by magnitude (Han et al. 2015, arXiv 1506.02626); of equal ones the first.

    Args:
        weight: any shape for a fraction; for "2:4", and with ``per_row``, at least one axis.
        sparsity: the fraction of weights that are dropped, in [0, 1), rounded to a whole number of weights; or "2:4": in
            every four neighbours along the last axis the two largest are kept (Mishra et al. 2021, arXiv 2104.08378).
        per_row: drop the same number in every row of the last axis, not over the whole tensor.

    Raises:
        ValueError: an unknown pattern, a fraction outside [0, 1), a last axis that four does not divide, or weights that are
            not finite.

    >>> magnitude_mask(torch.tensor([[1.0, -3.0, 0.5, 2.0]]), "2:4")
    tensor([[False,  True, False,  True]])
    """
    size = weight.detach().abs()
    if not bool(torch.isfinite(size).all()):
        raise ValueError("weights that are not finite have no order of magnitude: find where they come from")
    if isinstance(sparsity, str):
        if sparsity != "2:4":
            raise ValueError(f"unknown pattern {sparsity!r}: choose '2:4', or a fraction in [0, 1)")
        if size.ndim == 0 or size.shape[-1] % 4:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} cannot be cut into groups of four")
        return _largest(size.reshape(-1, 4), 2).view(weight.shape)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} given: choose a fraction in [0, 1), or '2:4'")
    groups = size.reshape(-1, size.shape[-1]) if per_row and size.ndim else size.reshape(1, -1)
    width = groups.shape[1]
    return _largest(groups, width - round(sparsity * width)).view(weight.shape)


def _largest(size: Tensor, keep: int) -> Tensor:
    order = size.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, order[:, :keep], True)


class Masked(nn.Module):
    """The parametrisation w -> w where the mask is True, else 0, with the same for the gradient."""

    def __init__(self, mask: Bool[Tensor, "..."]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The masked weight."""
        return torch.where(self.mask, weight, 0.0)


def apply_mask(module: nn.Module, mask: Bool[Tensor, "..."], *, name: str = "weight") -> nn.Module:
    """Let ``module`` use its parameter ``name`` with a mask, from now on; returns ``module``.

    ``module.weight`` is the masked weight, computed anew at each use; the parameter itself becomes
    ``module.parametrizations.weight.original``, and its gradient is zero where the mask is False: training changes nothing
    there that could be seen. ``merge_mask`` ends it.

    Raises:
        ValueError: no such parameter, it is masked already, or a mask of another shape or dtype.
    """
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{name!r} of {type(module).__name__} is masked already: call merge_mask first")
    weight = module._parameters.get(name)
    if weight is None:
        known = sorted(n for n, p in module._parameters.items() if p is not None)
        raise ValueError(f"{type(module).__name__} has no parameter {name!r} of its own: it has {known}")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} and dtype {mask.dtype} given: {name!r} needs {tuple(weight.shape)}, bool"
        )
    parametrize.register_parametrization(module, name, Masked(mask.to(weight.device)))
    return module


def merge_mask(module: nn.Module, *, name: str = "weight") -> nn.Module:
    """Undo ``apply_mask``: the masked weight becomes an ordinary parameter again, with its zeros; returns ``module``.

    Raises:
        ValueError: there is no mask on ``name``.
    """
    if not parametrize.is_parametrized(module, name):
        raise ValueError(f"{name!r} of {type(module).__name__} has no mask")
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return module


def sparsity_of(module: nn.Module) -> float:
    """The fraction of zeros among the weights that ``module`` and its parts compute with, masks applied; biases left out.

    >>> layer = nn.Linear(8, 8)
    >>> sparsity_of(apply_mask(layer, magnitude_mask(layer.weight, 0.25)))
    0.25
    """
    weights = [
        m.weight.detach() for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
    ]
    total = sum(w.numel() for w in weights)
    if total == 0:
        raise ValueError(f"{type(module).__name__} has no linear layer or convolution")
    return sum(int((w == 0).sum()) for w in weights) / total
