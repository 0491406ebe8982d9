"""Replace attention layers, or their processors, for good; what fits of their weights goes over.

For a change that ends with a ``with`` block there is ``attention_processor``.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .intervene import attention_modules
from .module import AttentionLayer
from .registry import Attend

Predicate = Callable[[str, AttentionLayer], bool]
NewFactory = Callable[[str, AttentionLayer], Attend | nn.Module | None]


@dataclass(frozen=True)
class Replacement:
    """What ``replace_attention`` did; parameters and buffers by their names in the model.

    Args:
        replaced: the layers, by name.
        inherited: took their values from what was there before.
        new: are as the factory made them.
        left: were there before and are gone: no equal name, or another shape.
    """

    replaced: tuple[str, ...]
    inherited: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{len(self.inherited)} tensors inherited, {len(self.new)} new, {len(self.left)} left behind"
        return f"{len(self.replaced)} attention layers replaced ({', '.join(self.replaced)}): {counts}"


def replace_attention(model: nn.Module, predicate: Predicate, factory: NewFactory) -> Replacement:
    """Replace attention in ``model``, in place.

    A new layer takes the place of the old one, and every parameter and buffer of equal name and shape takes the old
    value; it also takes over whether it is trained (``requires_grad``), the mode (train or eval), device and dtype.
    Forward hooks of the old layer are not taken over, nor is the model's ``config``, which still describes the
    model as it was built.

    Args:
        model: holds attention layers at any depth.
        predicate: ``predicate(name, layer)`` says whether to replace it.
        factory: ``factory(name, layer)`` returns either a processor, so that the layer stays and keeps its weights,
            or a new layer. What is called as ``(q, k, v, *, mask=None)`` is a processor. None leaves that layer alone.

    Returns:
        what was replaced, and where the parameters are now.

    Raises:
        ValueError: no attention layer, none that the predicate chooses, none that the factory replaces, or a new
            layer for a model that is itself the attention layer.
        TypeError: the factory returned something that is neither. In either case nothing was replaced.

    >>> from minilib.attention import Attention, get_attention
    >>> model = nn.Sequential(Attention(8, 2), Attention(8, 2))
    >>> done = replace_attention(model, lambda name, layer: name == "1", lambda name, layer: get_attention("causal"))
    >>> done.replaced, model[1].processor.__name__
    (('1',), 'causal_attention')
    """
    layers = attention_modules(model)
    chosen = {name: layer for name, layer in layers.items() if predicate(name, layer)}
    if not chosen:
        raise ValueError(f"the predicate chooses none of the attention layers: there are {', '.join(layers)}")
    made = {name: factory(name, layer) for name, layer in chosen.items()}
    made = {name: new for name, new in made.items() if new is not None}
    if not made:
        raise ValueError(f"the factory returned None for each of {', '.join(chosen)}: nothing to replace")
    for name, new in made.items():
        if not callable(new):
            raise TypeError(f"the factory returned {new!r} for {name!r}: return a processor, a layer or None")
        if name == "" and not is_processor(new):
            raise ValueError("the model itself is the attention layer: it can get a new processor only")
    report = [_replace(model, name, chosen[name], new) for name, new in made.items()]
    inherited, new, left = (
        tuple(key for part in parts for key in part) for parts in zip(*report, strict=True)
    )
    return Replacement(tuple(made), inherited, new, left)


def is_processor(new: Attend | nn.Module) -> bool:
    """Whether it is called with q, k and v: every function is taken for a processor, a module by its ``forward``."""
    if not isinstance(new, nn.Module):
        return True
    return list(inspect.signature(new.forward).parameters)[:3] == ["q", "k", "v"]


def _replace(
    model: nn.Module, name: str, layer: AttentionLayer, new: Attend | nn.Module
) -> tuple[list[str], ...]:
    """Put ``new`` in, and say which tensors are inherited, new and left."""
    processor = is_processor(new)
    old = getattr(layer.processor, "inner", layer.processor) if processor else layer
    prefix = ".".join(part for part in (name, "processor" if processor else "") if part)
    before = _tensors(old) if isinstance(old, nn.Module) else {}
    after = _tensors(new) if isinstance(new, nn.Module) else {}
    fits = [key for key, value in after.items() if key in before and before[key].shape == value.shape]
    if isinstance(new, nn.Module):
        _settle(new, layer)
        _inherit(new, {key: before[key] for key in fits})
    if processor:
        layer.processor = new
    else:
        _put(model, layer, new)
    named = {key: f"{prefix}.{key}" for key in {**before, **after}}
    inherited = [named[key] for key in fits]
    return (
        inherited,
        [named[key] for key in after if key not in fits],
        [named[key] for key in before if key not in fits],
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers."""
    return {key: x for key, x in module.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}


def _settle(new: nn.Module, layer: AttentionLayer) -> None:
    """Device, dtype and mode of the layer that was there."""
    sample = next((x for x in layer.parameters() if x.is_floating_point()), None)
    if sample is not None:
        new.to(device=sample.device, dtype=sample.dtype)
    new.train(layer.training)


def _inherit(new: nn.Module, values: dict[str, Tensor]) -> None:
    own = _tensors(new)
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
            if isinstance(own[key], nn.Parameter):
                own[key].requires_grad_(value.requires_grad)


def _put(model: nn.Module, layer: AttentionLayer, new: nn.Module) -> None:
    """In every place where the layer is, should it be shared."""
    places = [
        (parent, key)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is layer
    ]
    for parent, key in places:
        setattr(parent, key, new)
