"""A handle on an adapter of a model: train, switch, merge, save, remove."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import adapted
from .adapted import Adapted, Tokens
from .branches import Branch, Layer

INSIDE = (
    ".adapters."  # in the name of every adapter parameter, as in blocks.0.mlp.fc1.adapters.default.lora_A
)


class Adapter:
    """One named adapter of a model: a view of its branches, wherever they are.

    ``add_lora`` and its kin return one; ``get_adapter`` makes one for a model that has the adapter already, such as
    a copy.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        _ = self.layers

    @property
    def layers(self) -> dict[str, Layer]:
        """The adapted layers by name.

        Raises:
            ValueError: there are none, after ``remove`` for example.
        """
        found = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, Adapted) and self.name in module.adapters
        }
        if not found:
            known = adapter_names(self.model)
            raise ValueError(f"no adapter is called {self.name!r}; this model has {known}")
        return found

    @property
    def branches(self) -> dict[str, Branch]:
        """What the adapter adds to each layer, by the layer's name."""
        return {name: layer.adapters[self.name] for name, layer in self.layers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the adapter."""
        return [p for branch in self.branches.values() for p in branch.parameters()]

    @property
    def num_parameters(self) -> int:
        """Their number of values: the sum of r (d_in + d_out) for LoRA on linear layers."""
        return sum(p.numel() for p in self.parameters())

    @property
    def strength(self) -> float:
        """Multiplies all that the adapter adds; 1 at first, 0 switches it off."""
        return next(iter(self.branches.values())).strength

    @strength.setter
    def strength(self, value: float) -> None:
        if self.merged:
            raise RuntimeError(f"adapter {self.name!r} is merged with a fixed strength: unmerge it first")
        for branch in self.branches.values():
            branch.strength = float(value)

    @property
    def merged(self) -> bool:
        """Whether the layers' own weights contain the adapter."""
        return any(x.merge is not None and self.name in x.merge.names for x in self.layers.values())

    def merge(self) -> None:
        """Write the adapter into the weights of its layers: from then on it costs nothing.

        Raises:
            RuntimeError: it is merged already, or limited to some tokens.
            ValueError: it shifts a layer that has no bias to hold the shift.
        """
        if self.merged:
            raise RuntimeError(f"adapter {self.name!r} is merged already")
        for name, layer in self.layers.items():
            if self.name in layer.tokens:
                raise RuntimeError(
                    f"adapter {self.name!r} acts on some tokens only, a weight acts on all: it cannot be merged"
                )
            if (
                layer.bias is None
                and layer.adapters[self.name].delta(layer.weight, layer.bias)[1] is not None
            ):
                raise ValueError(f"{name!r} has no bias to hold the shift of adapter {self.name!r}")
        for layer in self.layers.values():
            adapted.merge(layer, self.name)

    def unmerge(self) -> None:
        """Undo ``merge``: the weights are again what they were, to the bit.

        Raises:
            RuntimeError: it is not merged, or the weights were changed since.
        """
        if not self.merged:
            raise RuntimeError(f"adapter {self.name!r} is not merged")
        for layer in self.layers.values():
            adapted.unmerge(layer, self.name)

    def remove(self) -> None:
        """Take the adapter away, unmerged. With the last one the model is what it was, ``requires_grad`` included."""
        for layer in self.layers.values():
            adapted.detach(layer, self.name)
        before = self.model.__dict__.get("_trainable_before_adapters")
        if before is not None and not adapter_names(self.model):
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(before.get(name, parameter.requires_grad))
            del self.model._trainable_before_adapters

    def train_only(self) -> None:
        """Let this adapter alone have gradients; ``remove`` gives the model's own parameters their setting back."""
        flags = {n: p.requires_grad for n, p in self.model.named_parameters() if INSIDE not in f".{n}"}
        self.model.__dict__.setdefault("_trainable_before_adapters", flags)
        self.model.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    @contextmanager
    def on_tokens(self, tokens: Tokens) -> Iterator[None]:
        """Let the adapter act on some tokens only, inside a ``with`` block.

        EasyControl (Zhang et al. 2025, arXiv 2503.07027) so limits each condition's adapter to its own tokens. The
        other tokens' outputs are the frozen layer's, exactly.

        Args:
            tokens: a slice, or a mask of shape (n,) or (b, n), True for the tokens to act on; for the
                layers' outputs (b, n, d).
        """
        if self.merged:
            raise RuntimeError(f"adapter {self.name!r} is merged, so it acts on all tokens: unmerge it first")
        layers = list(self.layers.values())
        before = [layer.tokens.get(self.name) for layer in layers]
        try:
            for layer in layers:
                layer.tokens[self.name] = tokens
            yield
        finally:
            for layer, old in zip(layers, before, strict=True):
                if old is None:
                    layer.tokens.pop(self.name, None)
                else:
                    layer.tokens[self.name] = old

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the adapter's parameters; low-rank ones under peft's names, ``layer.lora_A.weight``."""
        return {key: parameter.detach().clone() for key, parameter in self._by_key().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy parameters in, as ``state_dict`` gives them; ``rank`` and ``alpha`` are not part of it.

        Raises:
            ValueError: names or shapes differ.
        """
        own = self._by_key()
        missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if missing or unknown:
            raise ValueError(
                f"adapter {self.name!r}: missing {missing[:5]}, unknown {unknown[:5]}: add it to the same layers first"
            )
        for key, parameter in own.items():
            if parameter.shape != state[key].shape:
                raise ValueError(
                    f"{key}: shape {tuple(state[key].shape)} given, expected {tuple(parameter.shape)}"
                )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    def _by_key(self) -> dict[str, nn.Parameter]:
        keyed = {}
        for layer, branch in self.branches.items():
            for path, parameter in branch.named_parameters():
                last = path.rpartition(".")[2]
                keyed[".".join(filter(None, (layer, last, "weight" * last.startswith("lora_"))))] = parameter
        return keyed


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of ``model``, sorted."""
    return sorted({n for m in model.modules() if isinstance(m, Adapted) for n in m.adapters})


def get_adapter(model: nn.Module, name: str = "default") -> Adapter:
    """The adapter ``name`` that ``model`` has already.

    Raises:
        ValueError: it has none of this name.
    """
    return Adapter(model, name)


@contextmanager
def use_adapters(model: nn.Module, strengths: Mapping[str, float] | Sequence[str]) -> Iterator[None]:
    """Let only these adapters act, at these strengths (1 if names only are given), inside a ``with`` block.

    An empty list is the frozen model, exactly.

    Raises:
        ValueError: no adapter of one of the names.
        RuntimeError: an adapter is merged.
    """
    wanted = strengths if isinstance(strengths, Mapping) else dict.fromkeys(strengths, 1.0)
    handles = [get_adapter(model, name) for name in adapter_names(model)]
    for name in wanted:
        get_adapter(model, name)
    merged = [handle.name for handle in handles if handle.merged]
    if merged:
        raise RuntimeError(f"adapters {merged} are merged with a fixed strength: unmerge them first")
    before = [handle.strength for handle in handles]
    try:
        for handle in handles:
            handle.strength = wanted.get(handle.name, 0.0)
        yield
    finally:
        for handle, strength in zip(handles, before, strict=True):
            handle.strength = strength
