"""Channel factors that cost nothing: written into the modulation of an adaptive layer norm and into the weight that reads it.

In a DiT or an MM-DiT the inputs of many linear layers are ``norm(x) (1 + scale) + shift``, where a small linear layer makes
scale and shift of the condition. Dividing a channel of that by s only changes rows of that small layer, and the columns of
the next weight take s: the model computes what it did. ViDiT-Q (arXiv 2406.02540) balances channels so; the same move, made
the other way, gives a model large channels (``audit``).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilib.models.dit import DiTBlock
from minilib.models.mmdit_blocks import MMDiTBlock

from .balance import linear_layer


class ModulatedInput(NamedTuple):
    """Where a layer's input gets its scale and shift: a modulation layer, and the places of the two vectors in its output."""

    modulation: str
    shift: int
    scale: int


def modulated_inputs(model: nn.Module) -> dict[str, ModulatedInput]:
    """The linear layers that alone read a modulated layer norm: projections to q, k, v, and first layers of MLPs.

    >>> from minilib.models import DiT
    >>> modulated_inputs(DiT(hidden_size=16, depth=1))["blocks.0.mlp.fc1"]
    ModulatedInput(modulation='blocks.0.adaLN_modulation', shift=3, scale=4)
    """
    found: dict[str, ModulatedInput] = {}
    for name, block in model.named_modules():
        if not isinstance(block, DiTBlock | MMDiTBlock):
            continue
        readers = {"attn.qkv": ("adaLN_modulation", 0), "mlp.fc1": ("adaLN_modulation", 3)}
        if isinstance(block, MMDiTBlock):
            readers |= {
                "attn.context_qkv": ("context_adaLN_modulation", 0),
                "context_mlp.fc1": ("context_adaLN_modulation", 3),
                "attn2.qkv": ("adaLN_modulation", 6),
            }
        inside = dict(block.named_modules())
        for reader, (modulation, first) in readers.items():
            if isinstance(inside.get(reader), nn.Linear):
                found[_join(name, reader)] = ModulatedInput(_join(name, modulation), first, first + 1)
    return found


@torch.no_grad()
def fold_balance(model: nn.Module, scales: Mapping[str, Float[Tensor, " c"]]) -> nn.Module:
    """Write balances into the weights, in place: the layers read channels over s, with columns times s, at no cost.

    The modulated norm gives ``x (1 + scale) + shift``, both linear in the condition. Over s it is the same expression with
    ``shift / s`` and ``(1 + scale) / s - 1``: rows of the modulation over s, and a shifted bias.

    Args:
        model: a DiT or MM-DiT, or a model with one inside.
        scales: s of some layers, which have to be among ``modulated_inputs(model)``.

    Returns:
        the model; its outputs are what they were, up to rounding.

    Raises:
        ValueError: a layer whose input is no modulated norm, or factors that are not positive.
    """
    known = modulated_inputs(model)
    strange = sorted(set(scales) - set(known))
    if strange:
        raise ValueError(
            f"{strange} do not read a modulated norm: apply their balance as a transform; these can be folded: {sorted(known)}"
        )
    for name, scale in scales.items():
        if not bool((scale > 0).all()):
            raise ValueError(f"factors of {name} are not all positive")
        layer, place = linear_layer(model, name), known[name]
        modulation = linear_layer(model, place.modulation)
        s = scale.to(layer.weight)
        for part, offset in ((place.shift, 0.0), (place.scale, 1.0)):
            own = slice(part * len(s), (part + 1) * len(s))
            modulation.weight[own] /= s[:, None]
            modulation.bias[own] = (modulation.bias[own] + offset) / s - offset
        layer.weight *= s
    return model


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
