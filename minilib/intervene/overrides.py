"""Layers around a module's ``forward``: the one mechanism that can keep a module from computing at all.

A forward hook sees a module's output, but only after it was computed. Skipping and caching must come before
that, so they put a callable in the place of ``module.forward`` on this one instance. Several of them share
it: each context adds its own layer and takes it away again, in whatever order the contexts end. Ordinary hooks
run outside all layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Layer = Callable[..., Any]  # layer(inner, *args, **kwargs) -> output; inner(*args, **kwargs) computes


class LayeredForward:
    """What stands in the place of ``module.forward`` while at least one layer is there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous = module.__dict__.get("forward")
        self.layers: list[Layer] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers from the outermost in, and the module's own ``forward`` inside them all."""
        return self._run(len(self.layers), args, kwargs)

    def _run(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if depth == 0:
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)
        layer = self.layers[depth - 1]
        return layer(lambda *a, **k: self._run(depth - 1, a, k), *args, **kwargs)


@contextmanager
def override_forward(
    modules: Mapping[str, nn.Module], make: Callable[[str, nn.Module], Layer], *, innermost: bool = False
) -> Iterator[None]:
    """Put a layer around the ``forward`` of each module inside a ``with`` block.

    Args:
        modules: by name.
        make: ``make(name, module)`` returns the layer, a function ``(inner, *args, **kwargs) -> output``.
        innermost: put it inside the layers that are there already, next to the computation itself.
    """
    added: list[tuple[nn.Module, Layer]] = []
    try:
        for name, module in modules.items():
            layer = make(name, module)
            _add(module, layer, innermost)
            added.append((module, layer))
        yield
    finally:
        for module, layer in reversed(added):
            _remove(module, layer)


def _add(module: nn.Module, layer: Layer, innermost: bool) -> None:
    layered = module.__dict__.get("forward")
    if not isinstance(layered, LayeredForward):
        layered = LayeredForward(module)
        module.forward = layered
    layered.layers.insert(0 if innermost else len(layered.layers), layer)


def _remove(module: nn.Module, layer: Layer) -> None:
    layered = module.__dict__["forward"]
    layered.layers.remove(layer)
    if not layered.layers:
        if layered.previous is None:
            del module.forward
        else:
            module.forward = layered.previous
