"""Layers that start as nothing: zero-initialised ones, and the bottleneck adapter."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, weight and bias (ControlNet: Zhang et al. 2023, arXiv 2302.05543, equation 2).

    It gives zero at first, and its own weights still get a gradient, since its input is not zero. A model
    that initialises all its linear layers after it was built (``DiT.initialize_weights``) undoes the zero:
    call ``reset_parameters`` again.

    >>> import torch
    >>> ZeroLinear(2, 3)(torch.ones(1, 2)).tolist()
    [[0.0, 0.0, 0.0]]
    """

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        zero_(self)


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero, weight and bias; see ``ZeroLinear``. Of size 1 it is ControlNet's zero convolution."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        zero_(self)


def zero_(module: nn.Module) -> nn.Module:
    """Set all parameters of ``module`` to zero, in place, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class BottleneckAdapter(nn.Module):
    """x + up(activation(down x)), with ``up`` zero at first, so that it starts as the identity (Houlsby et al. 2019).

    Source: arXiv 1902.00751, figure 2; there ``up`` starts near zero.

    Args:
        dim: width of a token.
        hidden_dim: width of the bottleneck.
        activation: applied in the bottleneck; GELU by default.

    Raises:
        ValueError: ``hidden_dim`` is less than 1.
    """

    def __init__(self, dim: int, hidden_dim: int, *, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"the bottleneck needs a width of at least 1, got {hidden_dim}")
        self.down = nn.Linear(dim, hidden_dim)
        self.up = ZeroLinear(hidden_dim, dim)
        self.activation = activation

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """Act on each token by itself."""
        return x + self.up(self.activation(self.down(x)))
