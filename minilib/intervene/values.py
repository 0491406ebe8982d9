"""Small functions on what goes into a module and what comes out: the main input, copies, broadcasting."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def main_input(args: Args, kwargs: Kwargs) -> Tensor:
    """The first tensor that a module was called with: in a block the tokens or the image.

    Raises:
        ValueError: there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ValueError("the module was called without a tensor: there is no main input")


def with_main_input(args: Args, kwargs: Kwargs, value: Any) -> tuple[Args, Kwargs]:
    """The same call with ``value`` in the place of the main input."""
    old = main_input(args, kwargs)
    for i, arg in enumerate(args):
        if arg is old:
            return (*args[:i], value, *args[i + 1 :]), kwargs
    return args, {k: value if v is old else v for k, v in kwargs.items()}


def map_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    """Apply ``function`` to every tensor in a tensor, tuple, list or dict of them; leave the rest."""
    return tree_map(lambda v: function(v) if isinstance(v, Tensor) else v, values)


def shapes(values: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors in ``values``, in order."""
    return [tuple(v.shape) for v in tree_leaves(values) if isinstance(v, Tensor)]


def copied(values: Any, *, detach: bool) -> Any:
    """Copies of all tensors, cut from the graph or with it."""
    return map_tensors(lambda v: (v.detach() if detach else v).clone(), values)


def per_sample(factor: float | Tensor, like: Tensor) -> float | Tensor:
    """A factor of shape (b,) made to broadcast over the other axes of ``like`` (b, ...); any other is left."""
    if isinstance(factor, Tensor):
        factor = factor.to(like.device)
        if factor.ndim == 1 and factor.shape[0] == like.shape[0]:
            return factor.reshape(-1, *[1] * (like.ndim - 1))
    return factor


def checked_broadcast(name: str, factor: float | Tensor, like: Tensor, what: str) -> float | Tensor:
    """``factor`` if it broadcasts to the shape of ``like``.

    Raises:
        ValueError: it does not.
    """
    if isinstance(factor, Tensor):
        try:
            fits = torch.broadcast_shapes(factor.shape, like.shape) == like.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name}: {what} {tuple(factor.shape)} does not broadcast to {tuple(like.shape)}"
            )
        factor = factor.to(like.device)
    return factor
