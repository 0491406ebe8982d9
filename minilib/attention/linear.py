"""Linear attention: features in the place of the softmax, so that the cost grows with the number of tokens, not its square.

The formulas, and the fast and the Triton path, are in :mod:`minilib.kernels.linear`. Three variants:

- "linear": phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)), phi ReLU or ELU + 1 (Katharopoulos et al. 2020, equation 5);
- "linear_conv": ReLU, plus a depth-wise 5 x 5 convolution of v on the grid, which gives back the locality that the
  low-rank weights lack (LiT, Wang et al. 2025, section 3.1);
- "linear_mlp": q and k through a small network before ELU + 1 (LinFusion, Liu et al. 2024, section 3.2).

Every token sees every other one. The weights of a head have at most rank d, the width of a head: the fewer heads, the
higher the rank, at more FLOPs (b n D^2 / h for D features in h heads) and hardly more time (LiT's "few heads").
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels.linear import (
    FEATURES,
    check_shapes,
    linear_attention,
    linear_attention_flops,
    linear_attention_reference,
)
from .grids import check_grid, refuse_mask
from .registry import Case, Mask, register_attention


def check_linear(feature: str, normalise: bool, eps: float) -> None:
    """Raise unless these options of "linear" can be.

    Raises:
        ValueError: an unknown feature map, or a negative ``eps``.
    """
    if feature not in FEATURES:
        raise ValueError(
            f"attention 'linear': feature={feature!r} is unknown: choose one of {sorted(FEATURES)}"
        )
    if eps < 0:
        raise ValueError(f"attention 'linear': eps={eps!r} has to be at least 0")


def _reference(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **options: object) -> Tensor:
    return linear_attention_reference(q, k, v, **options)


def _flops(b: int, h: int, n: int, m: int, d: int, *, normalise: bool = True, **options: object) -> int:
    return linear_attention_flops(b, h, n, m, d, d, normalise)


@register_attention(
    "linear",
    reference=_reference,
    flops=_flops,
    check=check_linear,
    cases=(
        Case({}, n=6),
        Case({"feature": "elu"}, n=5, m=7),
        Case({"feature": "elu", "normalise": False}, n=4),
        Case({"normalise": False}, n=3, m=5),
        Case({"feature": "elu"}, n=1),
    ),
)
def linear_attention_variant(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    *,
    mask: Mask | None = None,
    feature: str = "relu",
    normalise: bool = True,
    eps: float = 1e-4,
) -> Float[Tensor, "b h n d"]:
    """Non-causal linear attention, see :func:`minilib.kernels.linear.linear_attention`.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: refused; a mask would need the weights that are never formed.
        feature: "relu" or "elu" (ELU + 1).
        normalise: the weights of a query sum to 1.
        eps: added to the denominator, a mean over keys.

    Raises:
        ValueError: a mask, no keys, or shapes that do not fit.

    >>> q = torch.ones(1, 1, 2, 4)
    >>> linear_attention_variant(q, q, q, eps=0.0)[0, 0, 0]
    tensor([1., 1., 1., 1.])
    """
    refuse_mask("linear", mask)
    return linear_attention(q, k, v, feature=feature, normalise=normalise, eps=eps)


def convolve_on_grid(
    v: Float[Tensor, "b h n d"],
    weight: Float[Tensor, "h d y x"],
    bias: Float[Tensor, "h d"],
    grid: Sequence[int],
) -> Float[Tensor, "b h n d"]:
    """A depth-wise convolution of the values on their (rows, columns), padded by zeros.

    >>> v, weight = torch.arange(4.0).view(1, 1, 4, 1), torch.ones(1, 1, 3, 3)
    >>> convolve_on_grid(v, weight, torch.zeros(1, 1), (2, 2)).flatten().tolist()
    [6.0, 6.0, 6.0, 6.0]
    """
    b, h, n, d = v.shape
    size = weight.shape[-2:]
    images = v.transpose(2, 3).reshape(b, h * d, *grid)
    kernel, padding = weight.reshape(h * d, 1, *size), (size[0] // 2, size[1] // 2)
    out = F.conv2d(images, kernel, bias.reshape(h * d), padding=padding, groups=h * d)
    return out.view(b, h, d, n).transpose(2, 3)


def _conv_reference(
    module: "ConvLinearAttention", q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The convolution as a sum over offsets, of shifted copies of the grid."""
    (rows, columns), (_, _, size, _) = module.grid, module.weight.shape
    b, h, n, d = v.shape
    half = size // 2
    padded = F.pad(v.view(b, h, rows, columns, d), (0, 0, half, half, half, half))
    out = linear_attention_reference(q, k, v, feature=module.feature, eps=module.eps)
    weight, bias = (p.expand(h, *p.shape[1:]) for p in (module.weight, module.bias))
    for y in range(size):
        for x in range(size):
            piece = padded[:, :, y : y + rows, x : x + columns].reshape(b, h, n, d)
            out = out + piece * weight[:, :, y, x].unsqueeze(1)
    return out + bias.unsqueeze(1)


def _conv_flops(b: int, h: int, n: int, m: int, d: int, *, kernel_size: int = 5, **options: object) -> int:
    """Those of "linear", and 2 b n h d kernel_size^2."""
    return linear_attention_flops(b, h, n, m, d, d) + 2 * b * n * h * d * kernel_size**2


def check_conv(
    num_heads: int, head_dim: int, grid: Sequence[int], kernel_size: int, feature: str, eps: float, share_heads: bool
) -> None:  # fmt: skip
    """Raise unless these options of "linear_conv" can be.

    Raises:
        ValueError: no grid of rows and columns, an even kernel, or what "linear" refuses.
    """
    check_grid("linear_conv", grid, axes=(2,))
    check_linear(feature, True, eps)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"attention 'linear_conv': kernel_size={kernel_size!r} has to be odd, so that it has a centre"
        )


@register_attention(
    "linear_conv",
    reference=_conv_reference,
    flops=_conv_flops,
    check=check_conv,
    cases=(
        Case({"grid": (3, 4)}, n=12),
        Case({"grid": (2, 5), "kernel_size": 3, "share_heads": False}, n=10),
        Case({"grid": (1, 1), "feature": "elu"}, n=1),
    ),
)
class ConvLinearAttention(nn.Module):
    """Linear attention plus a depth-wise convolution of v on the grid of tokens (LiT): out = linear(q, k, v) + conv(v).

    LiT's code could not be read. The width of the kernel is the paper's; that all heads share the d filters is how
    the line of work does it that it takes the branch from (FLatten, Han et al. 2023; LeapLabTHU/FLatten-Transformer:
    models/flatten_swin.py). ``share_heads=False`` gives each head its own.

    Args:
        num_heads: of the layer it is the processor of.
        head_dim: width of a head there.
        grid: (rows, columns) of the tokens.
        kernel_size: of the convolution; odd.
        feature: "relu" (the paper) or "elu".
        eps: added to the denominator.
        share_heads: one set of filters for all heads.

    >>> attend = ConvLinearAttention(2, 4, grid=(3, 3))
    >>> q = torch.ones(1, 2, 9, 4)
    >>> attend(q, q, q).shape
    torch.Size([1, 2, 9, 4])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        grid: Sequence[int],
        kernel_size: int = 5,
        feature: str = "relu",
        eps: float = 1e-4,
        share_heads: bool = True,
    ) -> None:
        super().__init__()
        check_conv(num_heads, head_dim, grid, kernel_size, feature, eps, share_heads)
        self.num_heads, self.grid, self.feature, self.eps = num_heads, tuple(grid), feature, eps
        heads = 1 if share_heads else num_heads
        # As torch initialises a convolution of one input channel.
        bound = 1 / kernel_size
        self.weight = nn.Parameter(
            torch.empty(heads, head_dim, kernel_size, kernel_size).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(heads, head_dim).uniform_(-bound, bound))

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        *,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """Mix the tokens; every token sees every other one.

        Raises:
            ValueError: a mask, not one token for each place of the grid, or other heads than it was made for.
        """
        refuse_mask("linear_conv", mask)
        check_shapes(q, k, v, self.feature)
        expected = (self.num_heads, prod(self.grid), self.weight.shape[1])
        if v.shape[1:] != expected or q.shape != v.shape:
            raise ValueError(
                f"attention 'linear_conv' on grid={self.grid} needs q, k and v of shape (b, {', '.join(map(str, expected))}),"
                f" got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        heads = self.num_heads
        weight, bias = (p.expand(heads, *p.shape[1:]) for p in (self.weight, self.bias))
        out = linear_attention(q, k, v, feature=self.feature, eps=self.eps)
        return out + convolve_on_grid(v, weight, bias, self.grid)


def feature_network(dim: int) -> nn.Sequential:
    """LinFusion's map of features; its last layer starts at zero, not as torch has it: it begins as "linear"."""
    network = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.LeakyReLU(), nn.Linear(dim, dim))
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


def _heads_apart(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``network`` on all heads of a token together."""
    b, h, n, d = x.shape
    joined = x.transpose(1, 2).reshape(b, n, h * d)
    return (joined + network(joined)).view(b, n, h, d).transpose(1, 2)


def _mlp_reference(
    module: "FeatureLinearAttention", q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Token by token through the networks, then the explicit weights."""

    def mapped(network: nn.Sequential, x: Tensor) -> Tensor:
        first, norm, _, last = network
        tokens = []
        for token in range(x.shape[2]):
            joined = x[:, :, token].flatten(1)
            h = joined @ first.weight.T + first.bias
            h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
            h = h * norm.weight + norm.bias
            h = torch.where(h > 0, h, 0.01 * h) @ last.weight.T + last.bias
            tokens.append((joined + h).view(x.shape[0], x.shape[1], x.shape[3]))
        return torch.stack(tokens, dim=2) if tokens else x

    q, k = mapped(module.query_features, q), mapped(module.key_features, k)
    return linear_attention_reference(q, k, v, feature="elu", normalise=module.normalise, eps=module.eps)


def _mlp_flops(b: int, h: int, n: int, m: int, d: int, *, normalise: bool = True, **options: object) -> int:
    """Those of "linear", and two linear layers for every query and key: 4 b (n + m) (h d)^2."""
    return linear_attention_flops(b, h, n, m, d, d, normalise) + 4 * b * (n + m) * (h * d) ** 2


def check_mlp(num_heads: int, head_dim: int, normalise: bool, eps: float) -> None:
    """Raise unless these options of "linear_mlp" can be.

    Raises:
        ValueError: heads or width below 1, or a negative ``eps``.
    """
    if num_heads < 1 or head_dim < 1:
        raise ValueError(f"attention 'linear_mlp' needs heads and a width, got {num_heads} and {head_dim}")
    check_linear("elu", normalise, eps)


@register_attention(
    "linear_mlp",
    reference=_mlp_reference,
    flops=_mlp_flops,
    check=check_mlp,
    cases=(Case({}, n=5), Case({"normalise": False}, n=3, m=6), Case({}, n=1)),
)
class FeatureLinearAttention(nn.Module):
    """Linear attention with learned features (LinFusion): phi(x) = ELU(x + f(x)) + 1, f a small network for q, one for k.

    The official module applies f to the tokens, before the projections to q and k: W_q (x + f_q(x)). A processor
    sees q and k only, so here f comes after: q + f_q(q), with all heads of a token together. The number of new
    parameters, 2 (2 D^2 + 4 D), is the same.

    Args:
        num_heads: of the layer it is the processor of.
        head_dim: width of a head there.
        normalise: the weights of a query sum to 1; False is the paper's ablation.
        eps: added to the denominator.

    >>> attend = FeatureLinearAttention(2, 4)
    >>> q = torch.ones(1, 2, 9, 4)
    >>> attend(q, q, q).shape
    torch.Size([1, 2, 9, 4])
    """

    def __init__(self, num_heads: int, head_dim: int, *, normalise: bool = True, eps: float = 1e-4) -> None:
        super().__init__()
        check_mlp(num_heads, head_dim, normalise, eps)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.normalise, self.eps = normalise, eps
        self.query_features = feature_network(num_heads * head_dim)
        self.key_features = feature_network(num_heads * head_dim)

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """Mix the tokens; every query sees every key.

        Raises:
            ValueError: a mask, no keys, or other heads than it was made for.
        """
        refuse_mask("linear_mlp", mask)
        check_shapes(q, k, v, "elu")
        if (q.shape[1], q.shape[3]) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"attention 'linear_mlp' was made for {self.num_heads} heads of width {self.head_dim}, got q of shape "
                f"{tuple(q.shape)}"
            )
        q, k = _heads_apart(self.query_features, q), _heads_apart(self.key_features, k)
        return linear_attention(q, k, v, feature="elu", normalise=self.normalise, eps=self.eps)
