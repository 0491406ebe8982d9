"""LinFusion's layer (Liu et al. 2024, arXiv 2409.02097): linear attention with learned features, in the place of self-attention.

    q = W_q (x + f_q(x)),  k = W_k (x + f_k(x)),  v = W_v x,
    out = W_o [ phi(q) . mean_j(phi(k_j) v_j^T) / (phi(q) . mean_j phi(k_j) + 1e-4) ],  phi = ELU + 1.

Read in ``Huage001/LinFusion: src/linfusion/attention.py``. Both sums are means, so they do not grow with the number of tokens.
The variant "linear_mlp" of the registry is the same with f behind the projections, where a processor can act.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels.linear import linear_attention, linear_attention_flops
from .cross import CrossAttention
from .linear import feature_network
from .module import AttentionLayer


def generalised_linear_flops(b: int, n: int, dim: int, num_heads: int, *, features: bool = True) -> int:
    """FLOPs of a whole layer: four projections, two networks of two layers each, and the linear core.

    >>> generalised_linear_flops(1, 10, 8, 2, features=False)
    6560
    """
    rows = 2 * b * n * dim * dim
    width = dim // num_heads
    return (4 + 4 * features) * rows + linear_attention_flops(b, num_heads, n, n, width, width)


class GeneralisedLinearAttention(AttentionLayer):
    """Self-attention's replacement with the same names: ``to_q``, ``to_k``, ``to_v``, ``to_out``, so that it inherits them.

    The last layer of each network f starts at zero (torch's default in the released code): at first it is plain
    linear attention with the inherited projections.

    Args:
        dim: width of a token.
        num_heads: heads; must divide ``dim``.
        normalise: divide by the sum of the weights. False is the paper's ablation.
        scale: what an un-normalised output is multiplied with, as the weights then do not sum to 1; for instance
            1 / (tokens x width of a head), about what the division does at that number of tokens.
        features: the networks f_q and f_k. False is the paper's ablation.
        eps: added to the denominator, a mean over keys.

    Raises:
        ValueError: ``dim`` is no multiple of ``num_heads``, a scale that is not positive, a scale for normalised weights.

    >>> layer = GeneralisedLinearAttention(8, 2)
    >>> layer(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    >>> sum(p.numel() for p in layer.query_features.parameters()) == 2 * 8**2 + 4 * 8
    True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        normalise: bool = True,
        scale: float = 1.0,
        features: bool = True,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {dim}: choose a divisor of {dim}")
        if not scale > 0 or (normalise and scale != 1):
            raise ValueError(f"scale={scale} given: positive, and 1 where the weights are normalised")
        self.num_heads, self.normalise, self.scale, self.eps = num_heads, normalise, scale, eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)
        self.query_features = feature_network(dim) if features else None
        self.key_features = feature_network(dim) if features else None
        self.processor = self._mix

    @classmethod
    def from_attention(cls, layer: CrossAttention, **options: object) -> GeneralisedLinearAttention:
        """With the projections of a self-attention, as the paper starts; ``options`` are those of the class.

        Raises:
            ValueError: the layer reads a context of another width, so it is no self-attention.
        """
        dim = layer.to_out.out_features
        if layer.context_dim != dim:
            raise ValueError(
                f"a layer of width {dim} that reads width {layer.context_dim} is no self-attention"
            )
        new = cls(dim, layer.num_heads, **options)  # type: ignore[arg-type]
        new.to(layer.to_q.weight)
        with torch.no_grad():
            for name in ("to_q", "to_k", "to_v", "to_out"):
                getattr(new, name).load_state_dict(getattr(layer, name).state_dict())
        return new.train(layer.training)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise ValueError(
                "LinFusion's attention takes no mask: it would need the weights that are never formed"
            )
        out = linear_attention(q, k, v, feature="elu", normalise=self.normalise, eps=self.eps)
        return out if self.normalise else self.scale * out

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Mix the tokens; every token sees every other one."""
        b, n, dim = x.shape
        asked = x if self.query_features is None else x + self.query_features(x)
        answered = x if self.key_features is None else x + self.key_features(x)
        heads = (b, n, self.num_heads, dim // self.num_heads)
        parts = self.to_q(asked), self.to_k(answered), self.to_v(x)
        q, k, v = (part.view(heads).transpose(1, 2) for part in parts)
        return self.to_out(self.processor(q, k, v, mask=None).transpose(1, 2).reshape(b, n, dim))
