"""Linear layers and convolutions that carry adapters.

A layer becomes adapted by taking another class. So it stays the same object, with the same parameters under the
same names, the same hooks and the same place in the model, and taking the old class again restores it exactly.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .branches import Branch, Layer

Tokens = slice | Tensor


@dataclass
class Merge:
    """The weights as they were before the adapters ``names`` were merged into them, in this order."""

    names: list[str]
    weight: Tensor
    bias: Tensor | None


class Adapted:
    """What both adapted classes share: the branches in ``adapters``, and how they act on an output."""

    adapters: nn.ModuleDict
    tokens: dict[str, Tokens]
    merge: Merge | None
    plain_class: type[nn.Module]

    def adapt(self, x: Tensor, out: Tensor) -> Tensor:
        """``out``, the layer's own output for ``x``, with what its branches add; all of them see the same plain output."""
        merged = () if self.merge is None else self.merge.names
        active = {n: b for n, b in self.adapters.items() if b.strength != 0 and n not in merged}
        plain = out
        if self.merge is not None and any(branch.reads_output for branch in active.values()):
            weight, bias = self.merge.weight, self.merge.bias
            plain = self.apply_weights(x, weight.to(out), None if bias is None else bias.to(out))
        for name, branch in active.items():
            added = branch(self, x, plain)
            if branch.strength != 1:
                added = added * branch.strength
            if name in self.tokens:
                added = added * token_mask(self.tokens[name], out)
            out = out + added.to(out.dtype)
        return out


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with adapters; see ``add_lora``."""

    def forward(self, x: Float[Tensor, "*s d_in"]) -> Float[Tensor, "*s d_out"]:
        """W x + b and what the adapters add."""
        return self.adapt(x, super().forward(x))

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer with other weights."""
        return F.linear(x, weight, bias)


class AdaptedConv2d(Adapted, nn.Conv2d):
    """A convolution with adapters; see ``add_lora``."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """The convolution and what the adapters add."""
        return self.adapt(x, super().forward(x))

    def apply_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer with other weights."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)


def token_mask(tokens: Tokens, out: Tensor) -> Tensor:
    """1 where an adapter acts on ``out`` (b, n, d), else 0: (n, 1) or (b, n, 1).

    Raises:
        ValueError: ``out`` has no axis of tokens, or a mask of another size.
    """
    if out.ndim != 3:
        raise ValueError(
            f"an adapter limited to some tokens acts on (b, n, d), this layer gives {tuple(out.shape)}"
        )
    if isinstance(tokens, slice):
        mask = torch.zeros(out.shape[1], dtype=out.dtype, device=out.device)
        mask[tokens] = 1
        return mask[:, None]
    if tuple(tokens.shape) not in (tuple(out.shape[1:2]), tuple(out.shape[:2])):
        raise ValueError(
            f"a token mask of shape {tuple(tokens.shape)} given, expected (n,) or (b, n) of {tuple(out.shape[:2])}"
        )
    return tokens.to(out)[..., None]


def can_adapt(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer or convolution that adapters know how to extend."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # inside nn.MultiheadAttention, which reads its weight and never calls it
    if isinstance(module, nn.Conv2d):
        own = isinstance(module, Adapted) or type(module).forward is nn.Conv2d.forward
        return own and module.groups == 1 and module.padding_mode == "zeros"
    own = isinstance(module, Adapted) or getattr(type(module), "forward", None) is nn.Linear.forward
    return own and isinstance(module, nn.Linear)


def attach(layer: Layer, name: str, branch: Branch, tokens: Tokens | None) -> None:
    """Give ``layer`` one more branch; a plain layer becomes an adapted one."""
    if not isinstance(layer, Adapted):
        plain = type(layer)
        layer.__class__ = AdaptedLinear if isinstance(layer, nn.Linear) else AdaptedConv2d
        layer.plain_class, layer.tokens, layer.merge = plain, {}, None
        layer.adapters = nn.ModuleDict()
    layer.adapters[name] = branch.train(layer.training)
    if tokens is not None:
        layer.tokens[name] = tokens


def detach(layer: Layer, name: str) -> None:
    """Take a branch away, unmerged; the layer becomes plain again with the last one."""
    unmerge(layer, name)
    del layer.adapters[name]
    layer.tokens.pop(name, None)
    if not layer.adapters:
        plain = layer.plain_class
        del layer.adapters, layer.plain_class, layer.tokens, layer.merge
        layer.__class__ = plain


@torch.no_grad()
def merge(layer: Layer, name: str) -> None:
    """Add what branch ``name`` does to the layer's own weight and bias."""
    if layer.merge is None:
        bias = None if layer.bias is None else layer.bias.clone()
        layer.merge = Merge([], layer.weight.clone(), bias)
    layer.merge.names.append(name)
    _write(layer, *_merged_weights(layer))


@torch.no_grad()
def unmerge(layer: Layer, name: str) -> None:
    """Undo ``merge``; with the last one the weights are again what they were, to the bit.

    Raises:
        RuntimeError: the weights, or a merged adapter, were changed since, which this would throw away.
    """
    if layer.merge is None or name not in layer.merge.names:
        return
    weight, bias = _merged_weights(layer)
    same = torch.equal(layer.weight, weight) and (bias is None or torch.equal(layer.bias, bias))
    if not same:
        raise RuntimeError(
            f"the weights or an adapter were changed after adapter {name!r} was merged: they cannot be told apart any more"
        )
    layer.merge.names.remove(name)
    _write(layer, *_merged_weights(layer))
    if not layer.merge.names:
        layer.merge = None


def _merged_weights(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with all merged branches, each of which acts on the layer as it was before any was merged."""
    plain = layer.merge
    weight, bias = plain.weight, plain.bias
    for name in plain.names:
        branch = layer.adapters[name]
        for_weight, for_bias = branch.delta(plain.weight, plain.bias)
        if for_weight is not None:
            weight = weight + branch.strength * for_weight.to(weight)
        if for_bias is not None:
            bias = bias + branch.strength * for_bias.to(weight)
    return weight, bias


def _write(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
