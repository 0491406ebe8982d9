"""Add adapters to a model, in place."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..intervene.names import Names, Pattern, named_blocks
from .adapted import Tokens, attach, can_adapt
from .branches import AffineBranch, AffinerBranch, Branch, Layer, LoRABranch
from .handle import Adapter, adapter_names


def add_adapter(
    model: nn.Module,
    names: Names,
    make: Callable[[Layer], Branch],
    *,
    name: str = "default",
    tokens: Tokens | None = None,
    freeze: bool = True,
) -> Adapter:
    """Add a branch to every linear layer and convolution whose name matches; the model changes no output.

    Args:
        model: any module. Its layers stay the same objects, its parameters keep their names.
        names: see ``minilib.intervene.named_blocks``; matching modules of other kinds are passed over.
        make: ``make(layer)`` returns the branch.
        name: of the adapter; a model can have several, whose contributions are added.
        tokens: act on these tokens only, always; see ``Adapter.on_tokens``.
        freeze: let only this adapter have gradients.

    Raises:
        ValueError: a pattern matches no layer that can have an adapter, or the name is taken or no identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"an adapter's name is letters, digits and _, got {name!r}")
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter {name!r} already: choose another name, or remove it")
    patterns: Sequence[Pattern] = (
        [names] if not isinstance(names, Sequence) or isinstance(names, str) else names
    )
    for pattern in patterns:
        found = named_blocks(model, pattern)
        if not any(can_adapt(module) for module in found.values()):
            first = next(iter(found))
            raise ValueError(
                f"{pattern!r} matches no linear layer or convolution (groups 1) to adapt: {first!r} is a "
                f"{type(found[first]).__name__}"
            )
    layers = {n: m for n, m in named_blocks(model, patterns).items() if can_adapt(m)}
    branches = {layer_name: make(layer) for layer_name, layer in layers.items()}
    for layer_name, layer in layers.items():
        attach(layer, name, branches[layer_name], tokens)
    handle = Adapter(model, name)
    if freeze:
        handle.train_only()
    return handle


def add_lora(
    model: nn.Module,
    names: Names,
    rank: int,
    alpha: float | None = None,
    *,
    name: str = "default",
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    tokens: Tokens | None = None,
    freeze: bool = True,
) -> Adapter:
    """Low-rank adapters: W x becomes W x + scale B A x, with B zero at first (Hu et al. 2022, arXiv 2106.09685).

    Args:
        model: any module, changed in place.
        names: which linear layers and convolutions, see ``add_adapter``.
        rank: r.
        alpha: the scale is ``alpha / rank``; ``rank`` by default.
        name: of the adapter.
        rank_stabilized: the scale is ``alpha / sqrt(rank)``.
        dropout: on the input of A, in training.
        generator: source of A's values.
        tokens: see ``Adapter.on_tokens``.
        freeze: let only this adapter have gradients.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
    >>> lora = add_lora(model, "*", rank=2)
    >>> lora.num_parameters == 2 * (4 + 3) + 2 * (3 + 2)
    True
    >>> lora.remove()
    """

    def make(layer: Layer) -> Branch:
        return LoRABranch(
            layer,
            rank,
            rank if alpha is None else alpha,
            rank_stabilized=rank_stabilized,
            dropout=dropout,
            generator=generator,
        )

    return add_adapter(model, names, make, name=name, tokens=tokens, freeze=freeze)


def add_affine(
    model: nn.Module,
    names: Names,
    *,
    scale: bool = True,
    shift: bool = True,
    name: str = "default",
    freeze: bool = True,
) -> Adapter:
    """A learned scale and shift for every output of the layers, the identity at first. See ``add_adapter``."""
    return add_adapter(
        model, names, lambda layer: AffineBranch(layer, scale=scale, shift=shift), name=name, freeze=freeze
    )


def add_affiner(
    model: nn.Module,
    names: Names,
    rank: int,
    *,
    name: str = "default",
    generator: torch.Generator | None = None,
    freeze: bool = True,
) -> Adapter:
    """Scale, shift and a low-rank product: the Affiner of Diffscaler (arXiv 2404.09976). See ``add_adapter``."""
    return add_adapter(
        model, names, lambda layer: AffinerBranch(layer, rank, generator=generator), name=name, freeze=freeze
    )
