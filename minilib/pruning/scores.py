"""What a unit is worth, by the usual rules: by its weights, by its activations, by both. No gradient is needed.

They are the rivals of learned masks (``minilib.pruning.masks``), and go into ``keep_top`` like them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..intervene import record_inputs
from .masks import Site, find_sites

Scores = dict[str, Float[Tensor, " units"]]


def weight_magnitude(model: nn.Module) -> Scores:
    """The norm of all weights and biases that would go with each unit.

    >>> from minilib.models import DiT
    >>> {name: s.shape for name, s in weight_magnitude(DiT(hidden_size=8, depth=1, num_heads=2)).items()}
    {'blocks.0.attn': torch.Size([2]), 'blocks.0.mlp': torch.Size([32])}
    """
    scores: Scores = {}
    for name, site in find_sites(model).items():
        layer, total = model.get_submodule(name), torch.zeros(site.units)
        for own, parts in site.ins:
            linear = getattr(layer, own)
            squares = linear.weight.detach().square().sum(1)
            if linear.bias is not None:
                squares = squares + linear.bias.detach().square()
            total = total + squares.view(parts, site.units, site.width).sum((0, 2)).cpu()
        for own in site.outs:
            total = total + outgoing(getattr(layer, own), site).cpu()
        scores[name] = total.sqrt()
    return scores


def outgoing(linear: nn.Linear, site: Site) -> Float[Tensor, " units"]:
    """The squared norm of each unit's columns in a layer that reads the units."""
    return linear.weight.detach().square().sum(0).view(site.units, site.width).sum(1)


@torch.no_grad()
def activation_magnitude(model: nn.Module, run: Callable[[], object]) -> Scores:
    """The mean magnitude |h| of what each unit hands on, over everything that ``run`` sends through the model.

    Args:
        model: any module with sites.
        run: calls the model, as often as it likes. A call counts as one, however many samples it holds.

    Raises:
        ValueError: ``run`` never reached some site.
    """
    return _recorded(model, run, lambda h, site: h.abs().mean((0, 1)).view(site.units, site.width).mean(1))


@torch.no_grad()
def contribution(model: nn.Module, run: Callable[[], object]) -> Scores:
    """Root mean square of what each feature hands on, times the norm of the weights that read it; the rule of Wanda for columns.

    Sun et al. 2023, arXiv 2306.11695, rank single weights by |w| times the norm of the input; summed over a column in squares,
    that is this score. Arguments and errors are those of :func:`activation_magnitude`.
    """
    squares = _recorded(model, run, lambda h, site: h.square().mean((0, 1)))
    scores: Scores = {}
    for name, site in find_sites(model).items():
        weights = sum(
            getattr(model.get_submodule(name), own).weight.square().sum(0).cpu() for own in site.outs
        )
        scores[name] = (squares[name] * weights).view(site.units, site.width).sum(1).sqrt()
    return scores


def _recorded(
    model: nn.Module, run: Callable[[], object], reduce: Callable[[Tensor, Site], Tensor]
) -> Scores:
    """The mean over calls of ``reduce(input of the first layer that reads the units)``."""
    records: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for name, site in find_sites(model).items():
            reader = f"{name}.{site.outs[0]}" if name else site.outs[0]
            watch = record_inputs(model, [reader], reduce=lambda h, site=site: reduce(h, site))
            records[name] = stack.enter_context(watch)[reader]
        run()
    silent = [name for name, calls in records.items() if not calls]
    if silent:
        raise ValueError(f"run() never reached {', '.join(silent)}: call the whole model in it")
    return {name: torch.stack(calls).mean(0).cpu() for name, calls in records.items()}
