"""What an adapter adds to the output of one frozen layer: a low-rank product, a scale and a shift, or both.

Every branch starts as exactly zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d
Delta = tuple[Tensor | None, Tensor | None]  # of the weight, of the bias


class Branch(nn.Module):
    """One named adapter at one layer. Subclasses give ``forward`` and ``delta``, which must agree.

    Attributes:
        strength: multiplies what the branch adds; 0 switches it off.
        reads_output: whether ``forward`` uses ``out``.
    """

    strength: float = 1.0
    reads_output: bool = True

    def forward(self, layer: Layer, x: Tensor, out: Tensor) -> Tensor:
        """What to add to the plain layer's output for ``x``, which is ``out``."""
        raise NotImplementedError

    def delta(self, weight: Tensor, bias: Tensor | None) -> Delta:
        """What to add to a layer's ``weight`` and ``bias`` to the same effect, without the strength."""
        raise NotImplementedError


class LoRABranch(Branch):
    """scale B A x with A (r, d_in) random and B (d_out, r) zero (Hu et al. 2022, arXiv 2106.09685, equation 3).

    For a convolution A is one of the same shape with r output channels, and B is 1x1. Names, shapes, initial
    distribution and scale are those of ``peft`` (``tuners/lora/layer.py``).

    Args:
        layer: the frozen layer.
        rank: r.
        alpha: the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rank_stabilized``
            (Kalajdzievski 2023, arXiv 2312.03732).
        dropout: probability with which an input of A is dropped in training.
        generator: source of A's values.
    """

    reads_output = False

    def __init__(
        self,
        layer: Layer,
        rank: int,
        alpha: float,
        *,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        self.rank, self.scale = rank, alpha / (math.sqrt(rank) if rank_stabilized else rank)
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        d_out, d_in, *kernel = layer.weight.shape
        self.lora_A = nn.Parameter(torch.empty(rank, d_in, *kernel, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, *[1] * len(kernel), **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.dropout = nn.Dropout(dropout)

    def forward(self, layer: Layer, x: Tensor, out: Tensor) -> Tensor:
        """The scaled low-rank product; without bias, so tokens that are zero give zero."""
        x = self.dropout(x.to(self.lora_A.dtype))
        if isinstance(layer, nn.Linear):
            low = F.linear(F.linear(x, self.lora_A), self.lora_B)
        else:
            low = F.conv2d(x, self.lora_A, None, layer.stride, layer.padding, layer.dilation)
            low = F.conv2d(low, self.lora_B)
        return low * self.scale

    def delta(self, weight: Tensor, bias: Tensor | None) -> Delta:
        """scale B A in the shape of the weight; none for the bias."""
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return self.scale * product.view(weight.shape), None

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"rank={self.rank}, scale={self.scale:g}, strength={self.strength:g}"


class AffineBranch(Branch):
    """A scale and a shift for each output, (1 + scale) (W x + b) + shift, both zero at first.

    The scale is stored as its distance from 1, so that it is exactly the identity at first and decays to it.
    """

    def __init__(self, layer: Layer, *, scale: bool = True, shift: bool = True) -> None:
        super().__init__()
        if not (scale or shift):
            raise ValueError("neither a scale nor a shift: nothing is left to learn")
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        width = layer.weight.shape[0]
        self.affine_scale = nn.Parameter(torch.zeros(width, **like)) if scale else None
        self.affine_shift = nn.Parameter(torch.zeros(width, **like)) if shift else None

    def forward(self, layer: Layer, x: Tensor, out: Tensor) -> Tensor:
        """What scale and shift add to ``out``."""
        trailing = () if isinstance(layer, nn.Linear) else (1, 1)
        added: Tensor | float = 0.0
        if self.affine_scale is not None:
            added = self.affine_scale.view(-1, *trailing) * out
        if self.affine_shift is not None:
            added = added + self.affine_shift.view(-1, *trailing)
        return added.expand_as(out)

    def delta(self, weight: Tensor, bias: Tensor | None) -> Delta:
        """scale W for the weight, scale b + shift for the bias."""
        for_weight = for_bias = None
        if self.affine_scale is not None:
            for_weight = self.affine_scale.view(-1, *[1] * (weight.ndim - 1)) * weight
            for_bias = None if bias is None else self.affine_scale * bias
        if self.affine_shift is not None:
            for_bias = self.affine_shift if for_bias is None else for_bias + self.affine_shift
        return for_weight, for_bias


class AffinerBranch(Branch):
    """Scale, shift and low rank together: (1 + s)(W x + b) + d + U V x, the Affiner (Nair et al. 2024, arXiv 2404.09976)."""

    def __init__(self, layer: Layer, rank: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.affine = AffineBranch(layer)
        self.low_rank = LoRABranch(layer, rank, rank, generator=generator)

    def forward(self, layer: Layer, x: Tensor, out: Tensor) -> Tensor:
        """The sum of both parts; the scale acts on the frozen layer's output only."""
        return self.affine(layer, x, out) + self.low_rank(layer, x, out)

    def delta(self, weight: Tensor, bias: Tensor | None) -> Delta:
        """The sum of both parts."""
        for_weight, for_bias = self.affine.delta(weight, bias)
        return for_weight + self.low_rank.delta(weight, bias)[0], for_bias
