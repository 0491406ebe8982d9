"""Other weights and other sub-modules for a while: masking, any function of a weight, swapped modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .names import find_parameter, matching_names, refuse_nested
from .overrides import Layer, override_forward
from .values import checked_broadcast

WeightEdit = Callable[[Tensor], Tensor]
Edits = list[tuple[str, str, WeightEdit]]  # full name, name within the owner, edit


@contextmanager
def transform_weights(model: nn.Module, edits: Mapping[str, WeightEdit]) -> Iterator[None]:
    """Compute with ``edits[name](parameter)`` in the place of the named parameters.

    The parameters themselves are never touched: ``state_dict``, ``parameters`` and optimisers see them as
    ever, and gradients reach them, and whatever the edit depends on, through the edit. It is evaluated anew
    in each forward pass of ``model``, or of the module that owns the parameter if that is called by itself.
    What reads a parameter outside both, as a method of its own might, sees the original.

    Args:
        model: any module.
        edits: by the parameter's full name, as in ``named_parameters``, a function to a tensor of the same
            shape. A parameter tied to another module's is edited in the named module only.

    Raises:
        ValueError: no such parameter; in a call, an edit changes the shape.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with transform_weights(layer, {"weight": torch.ones_like}):
    ...     layer(torch.ones(1, 2)).item()
    2.0
    """
    by_owner: dict[str, tuple[nn.Module, Edits]] = {}
    taken: dict[tuple[int, str], str] = {}
    for name, edit in edits.items():
        owner, own = find_parameter(model, name)
        other = taken.setdefault((id(owner), own), name)
        if other != name:
            raise ValueError(f"{name!r} and {other!r} are one parameter of one shared module: edit it once")
        by_owner.setdefault(name.rpartition(".")[0], (owner, []))[1].append((name, own, edit))
    active = False

    def make(parts: list[tuple[nn.Module, Edits]]) -> Layer:
        def layer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal active
            if active:  # a module inside a call that has set everything up already
                return inner(*args, **kwargs)
            with ExitStack() as stack:
                for owner, found in parts:
                    stack.enter_context(_shadowed(owner, found))
                active = True
                try:
                    return inner(*args, **kwargs)
                finally:
                    active = False

        return layer

    owners = {path: owner for path, (owner, _) in by_owner.items() if owner is not model}
    # Next to the computation, so that a later context edits what an earlier one made of the parameter.
    with (
        override_forward(owners, lambda path, _: make([by_owner[path]]), innermost=True),
        override_forward({"": model}, lambda path, _: make(list(by_owner.values())), innermost=True),
    ):
        yield


@contextmanager
def _shadowed(owner: nn.Module, found: Edits) -> Iterator[None]:
    """Plain attributes that hide parameters of ``owner``: Python finds them first, torch does not know them."""
    with ExitStack() as stack:
        for name, own, edit in found:
            before = getattr(owner, own)
            value = edit(before)
            if value.shape != before.shape:
                raise ValueError(
                    f"the edit of {name!r} makes {tuple(value.shape)} of {tuple(before.shape)}: keep the shape"
                )
            stack.callback(partial(_restore, owner.__dict__, own, owner.__dict__.get(own)))
            owner.__dict__[own] = value
        yield


def _restore(attributes: dict[str, Any], name: str, before: Any) -> None:
    if before is None:
        del attributes[name]
    else:
        attributes[name] = before


@contextmanager
def mask_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the named parameters by masks; a mask of ones changes no bit.

    The masks may be learned: they get gradients, as the parameters do, and each forward pass uses their
    values of the moment. A mask broadcasts to its parameter: (d_out, 1) prunes rows of a linear layer, (d_in,)
    its columns.

    Args:
        model: any module.
        masks: by the parameter's full name.

    Raises:
        ValueError: no such parameter, or a mask that does not broadcast to its parameter.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with mask_weights(layer, {"weight": torch.zeros(2)}):
    ...     layer(torch.ones(1, 2)).item()
    0.0
    """

    def edit(mask: Tensor) -> WeightEdit:
        return lambda weight: weight * mask.to(weight.device)

    edits: dict[str, WeightEdit] = {}
    for name, mask in masks.items():
        owner, own = find_parameter(model, name)
        checked_broadcast(name, mask, getattr(owner, own), "the mask")
        edits[name] = edit(mask)
    with transform_weights(model, edits):
        yield


@contextmanager
def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of the named ones; the originals come back, in their places and order.

    Only the named place is changed, also of a module that the model holds in two places. Contexts that
    replace the same place must end in the reverse order.

    Raises:
        ValueError: no such module, the model itself, or one name inside another.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    >>> with replace_modules(model, {"1": nn.Identity()}):
    ...     model[1]
    Identity()
    >>> model[1]
    GELU(approximate='none')
    """
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for name in modules:
        if name not in known:
            matching_names(known, name, f"module of {type(model).__name__}")
            raise ValueError(f"{name!r} is a pattern: give exact names, one module for each")
    refuse_nested(modules, "replace")
    with ExitStack() as stack:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            places = model.get_submodule(parent)._modules
            stack.callback(places.__setitem__, child, places[child])
            places[child] = module
        yield
