"""Really remove masked units: a smaller model that computes what the masked one does.

Heads lose their rows of the query, key and value layers and their columns of the output layer; hidden neurons their rows and
columns, in a gated feed-forward network the row of the value and that of the gate. The output layers' biases stay: a layer
that lost all its units adds its bias, as it does when it is masked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..attention import Attention, CrossAttention, JointAttention
from ..attention.edited import EditedProcessor
from ..attention.joint import JointTable, rows
from ..attention.module import AttentionLayer
from ..attention.registry import Mask
from ..attention.rope import apply_rotary
from ..profiling import count_parameters
from .masks import Masks, Site, check_masks, removed_parameters


def shrink_model(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of ``model`` without the units whose mask is 0.

    Its attention layers are of the classes below, which know the width of a head apart from the width of a token. ``config``
    still describes the model as it was. The copy can be shrunk again, and moved to the meta device.

    Args:
        model: left as it is.
        masks: by site one number a unit, 0 or 1 only, bool or not; sites left out stay whole. See ``keep_top``.

    Raises:
        ValueError: no such site, a mask of another length or with a value between, a kind of attention that cannot
            be shrunk, or one that is inside a ``masked`` block.

    >>> from minilib.models import DiT
    >>> from minilib.pruning import find_sites, ones, shrink_model
    >>> model = DiT(hidden_size=32, depth=1, num_heads=2)
    >>> masks = ones(find_sites(model)) | {"blocks.0.attn": torch.tensor([1, 0])}
    >>> count_parameters(model) - count_parameters(shrink_model(model, masks))
    2096
    """
    sites = check_masks(model, masks)
    for name, mask in masks.items():
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"the mask of {name!r} has values between 0 and 1: make it binary first (keep_top)"
            )
    small = copy.deepcopy(model)
    for name, mask in masks.items():
        if bool((mask == 1).all()):
            continue
        layer = small.get_submodule(name)
        new = _without(layer, sites[name], mask.nonzero().flatten().cpu())
        if name == "":
            return new
        parent, _, own = name.rpartition(".")
        setattr(small.get_submodule(parent), own, new)
    return small


def shrunk_parameters(model: nn.Module, masks: Masks) -> int:
    """Parameters of ``shrink_model(model, masks)`` by the closed form: each unit takes a known number of values with it."""
    return count_parameters(model) - removed_parameters(check_masks(model, masks), masks)


def _without(layer: nn.Module, site: Site, kept: Int[Tensor, " k"]) -> nn.Module:
    """The layer with these units only."""
    if site.kind == "neuron":
        new: nn.Module = layer
    elif isinstance(layer.processor, EditedProcessor):
        raise ValueError(
            f"{site.name!r} is being masked, edited or watched: leave the with block before shrinking"
        )
    elif type(layer) in SHRUNK:
        new = SHRUNK[type(layer)](layer, site.width, len(kept))
    else:
        raise ValueError(
            f"{site.name!r} is {type(layer).__name__}, whose heads can be masked but not removed: known are "
            f"{', '.join(cls.__name__ for cls in SHRUNK)}"
        )
    # Feature k of the units that stay, in one part.
    features = (kept[:, None] * site.width + torch.arange(site.width)).flatten()
    for own, parts in site.ins:
        offsets = torch.arange(parts)[:, None] * site.units * site.width
        setattr(new, own, _rows(getattr(layer, own), (offsets + features).flatten()))
    for own in site.outs:
        setattr(new, own, _columns(getattr(layer, own), features))
    return new


def _rows(linear: nn.Linear, index: Int[Tensor, " k"]) -> nn.Linear:
    """The outputs ``index`` of a linear layer."""
    bias = None if linear.bias is None else linear.bias.detach()[index.to(linear.bias.device)]
    return _linear(linear, linear.weight.detach()[index.to(linear.weight.device)], bias)


def _columns(linear: nn.Linear, index: Int[Tensor, " k"]) -> nn.Linear:
    """A linear layer that reads the inputs ``index`` only; its bias stays."""
    bias = None if linear.bias is None else linear.bias.detach()
    return _linear(linear, linear.weight.detach()[:, index.to(linear.weight.device)].contiguous(), bias)


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    new = nn.Linear(1, 1, bias=bias is not None, device="meta")
    new.out_features, new.in_features = weight.shape
    new.weight = nn.Parameter(weight, like.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias, like.bias.requires_grad)
    return new.train(like.training)


def _heads(x: Float[Tensor, "b n f"], num_heads: int) -> Float[Tensor, "b h n d"]:
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _joined(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n f"]:
    return x.transpose(1, 2).flatten(2)


class _Shrunk:
    """What the three have in common: the parts of the layer they come from, and the width of a head."""

    head_dim: int

    def _take_over(self, layer: AttentionLayer, head_dim: int, num_heads: int) -> None:
        AttentionLayer.__init__(self)
        for name, part in layer.named_children():
            if name != "processor":
                setattr(self, name, part)
        for name, value in vars(layer).items():  # options, and parts that are None
            if not name.startswith("_") and name not in ("processor", "training", "num_heads"):
                setattr(self, name, value)
        self.processor = layer.processor
        self.head_dim, self.num_heads = head_dim, num_heads
        self.train(layer.training)


class ShrunkAttention(_Shrunk, Attention):
    """Self-attention with fewer heads than the width of a token would hold."""

    def __init__(self, layer: Attention, head_dim: int, num_heads: int) -> None:
        self._take_over(layer, head_dim, num_heads)

    def forward(self, x: Float[Tensor, "b n d"], *, mask: Mask | None = None) -> Float[Tensor, "b n d"]:
        """Mix the tokens of ``x``."""
        if not self.num_heads:
            return self.proj(x[..., :0])
        q, k, v = (_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(_joined(self.processor(self.q_norm(q), self.k_norm(k), v, mask=mask)))


class ShrunkCrossAttention(_Shrunk, CrossAttention):
    """Attention to a context with fewer heads than the width of a token would hold."""

    def __init__(self, layer: CrossAttention, head_dim: int, num_heads: int) -> None:
        self._take_over(layer, head_dim, num_heads)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b l d_context"] | None = None,
        context_mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Let each token of ``x`` read from ``context``, or from ``x``."""
        if not self.num_heads:
            return self.to_out(x[..., :0])
        context = x if context is None else context
        q = _heads(self.to_q(x), self.num_heads)
        k, v = (_heads(layer(context), self.num_heads) for layer in (self.to_k, self.to_v))
        mask = None if context_mask is None else context_mask[:, None, None, :]
        return self.to_out(_joined(self.processor(q, k, v, mask=mask)))


class ShrunkJointAttention(_Shrunk, JointAttention):
    """Joint attention of image and text with fewer heads than the width of a token would hold."""

    def __init__(self, layer: JointAttention, head_dim: int, num_heads: int) -> None:
        self._take_over(layer, head_dim, num_heads)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b l d"],
        *,
        mask: Mask | None = None,
        rotary: JointTable | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"] | None]:
        """Mix the tokens of both streams; see ``JointAttention``."""
        n = x.shape[1]
        if not self.num_heads:
            return self.proj(x[..., :0]), None if self.context_pre_only else self.context_proj(
                context[..., :0]
            )
        size = self.num_heads * self.head_dim
        q, k, v = self.qkv(x).split(size, dim=-1)
        *other_q, other_k, other_v = self.context_qkv(context).split(size, dim=-1)
        if self.context_pre_only:
            mask = rows(mask, n)
        else:
            q = torch.cat([q, other_q[0]], dim=1)
        k, v = torch.cat([k, other_k], dim=1), torch.cat([v, other_v], dim=1)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (q, k, v))
        if self.qk_norm:
            q = self.q_norm(q, gain=_gains([self.q_norm, self.context_q_norm], [n, q.shape[1] - n]))
            k = self.k_norm(k, gain=_gains([self.k_norm, self.context_k_norm], [n, k.shape[1] - n]))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if rotary is not None:
            q, k = apply_rotary(q, rotary[..., : q.shape[2], :]), apply_rotary(k, rotary)
        out = _joined(self.processor(q, k, v, mask=mask))
        return self.proj(out[:, :n]), None if self.context_pre_only else self.context_proj(out[:, n:])


def _gains(norms: Sequence[nn.Module | None], lengths: Sequence[int]) -> Float[Tensor, "n 1 d"]:
    """The gain of each token's stream."""
    pairs = zip(norms, lengths, strict=True)
    return torch.cat([norm.weight.expand(n, 1, -1) for norm, n in pairs if n])


#: Exact classes: a subclass may use its heads in another way.
SHRUNK: dict[type[nn.Module], Callable[..., nn.Module]] = {
    Attention: ShrunkAttention,
    CrossAttention: ShrunkCrossAttention,
    JointAttention: ShrunkJointAttention,
    ShrunkAttention: ShrunkAttention,
    ShrunkCrossAttention: ShrunkCrossAttention,
    ShrunkJointAttention: ShrunkJointAttention,
}
