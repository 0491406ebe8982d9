"""Non-causal linear attention: with features phi > 0 in the place of the softmax, the n x m weights are never formed.

For queries q (n, d), keys k (m, d) and values v (m, e) of one head::

    out_i = sum_j phi(q_i) . phi(k_j) v_j / (m z_i),    z_i = phi(q_i) . mean_j phi(k_j) + eps
          = phi(q_i) S / z_i,                           S = mean_j phi(k_j)^T v_j,   a d x e matrix

(Katharopoulos et al. 2020, equation 4.) phi is ReLU (LiT, Wang et al. 2025, section 3.1) or ELU + 1 (LinFusion, Liu et al.
2024, equation 6; Huage001/LinFusion: src/linfusion/attention.py, whose eps is 1e-4 too). Numerator and denominator are
*means* over the keys, as there: eps weighs the same at every resolution, so that repeating all tokens changes nothing, and
no sum overflows in float16. A formula with sums and an eps' is this one with eps = eps' / m. ReLU can be zero in all
features of a query; its output is then zero, and eps keeps the gradient finite.

``normalise=False`` leaves the denominator and the 1/m out: phi(q) phi(k)^T v.

Backward in Triton: the same two kernels, a reduction over tokens and a product with a small matrix, in the other order.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .dispatch import DOTS, Choice, Kernel, choose_path, why_not_triton

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "elu": lambda x: F.elu(x) + 1}
"""The feature maps by name; "elu" is ELU + 1."""

Queries = Float[Tensor, "b h n d"]
Keys = Float[Tensor, "b h m d"]
Values = Float[Tensor, "b h m e"]


def linear_attention(
    q: Queries, k: Keys, v: Values, *, feature: str = "relu", normalise: bool = True, eps: float = 1e-4
) -> Float[Tensor, "b h n e"]:
    """phi(q) (phi(k)^T v), divided by phi(q) . sum phi(k) if ``normalise``; linear in the number of tokens.

    Args:
        q: queries; any strides.
        k: keys.
        v: values; may have another width than the keys.
        feature: "relu" or "elu" (ELU + 1).
        normalise: divide, so that the weights of a query sum to 1 (up to ``eps``).
        eps: added to phi(q) . mean phi(k).

    Raises:
        ValueError: unknown feature, no keys, or shapes that do not fit.

    >>> q, v = torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0], [3.0]]]])
    >>> linear_attention(q, q, v, eps=0.0).flatten()
    tensor([2., 2.])
    >>> linear_attention(q, q, v, normalise=False).flatten()
    tensor([8., 8.])
    """
    check_shapes(q, k, v, feature)
    return LINEAR_ATTENTION(q, k, v, feature=feature, normalise=normalise, eps=eps)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, feature: str) -> None:
    """Raise a ValueError that says what does not fit."""
    if feature not in FEATURES:
        raise ValueError(f"unknown feature {feature!r}: choose one of {sorted(FEATURES)}")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v must be (batch, heads, tokens, width), got {[tuple(t.shape) for t in (q, k, v)]}"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: batch and heads agree, q and k "
            "have one width, k and v one number of tokens"
        )
    if k.shape[2] == 0:
        raise ValueError("there are no keys: linear attention is a mean over at least one")


def linear_attention_reference(
    q: Queries, k: Keys, v: Values, *, feature: str = "relu", normalise: bool = True, eps: float = 1e-4
) -> Float[Tensor, "b h n e"]:
    """The definition: the n x m weights are formed. In float32 for half precision."""
    phi = FEATURES[feature]
    q, k, values = (t if t.dtype == torch.float64 else t.float() for t in (q, k, v))
    weights = phi(q) @ phi(k).transpose(-1, -2)
    if normalise:
        weights = weights / k.shape[2]
        weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    return (weights @ values).to(v.dtype)


def linear_attention_flops(b: int, h: int, n: int, m: int, d: int, e: int, normalise: bool = True) -> int:
    """FLOPs of the matrix products: S, its product with the queries and, if ``normalise``, the denominators.

    >>> linear_attention_flops(1, 1, 4096, 4096, 64, 64) / 10**6
    67.633152
    """
    return 2 * b * h * d * (m * e + n * e + (n if normalise else 0))


def _two_products(
    q: Tensor, k: Tensor, v: Tensor, *, feature: str = "relu", normalise: bool = True, eps: float = 1e-4
) -> Tensor:
    phi = FEATURES[feature]
    q, k = phi(q), phi(k)
    if not normalise:
        return q @ (k.transpose(-1, -2) @ v)
    m = k.shape[2]
    if k.dtype == torch.float16:  # a sum over many tokens would leave its range
        state = (k * m**-0.5).transpose(-1, -2) @ (v * m**-0.5)
    else:
        state = k.transpose(-1, -2) @ v / m
    return (q @ state) / (q @ k.mean(dim=2).unsqueeze(-1) + eps)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, *, feature: str = "relu", normalise: bool = True, eps: float = 1e-4
) -> Tensor:
    from ._triton import linear

    return linear.linear_attention(q, k, v, feature, normalise, eps)[0]


def _problem(q: Tensor, k: Tensor, v: Tensor, **options: object) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v have different dtypes, {q.dtype}, {k.dtype} and {v.dtype}"
    return why_not_triton(q, k, v, needs=DOTS)


def _choose(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Choice:
    op = "linear_attention"
    if q.is_cuda:
        problem = _problem(q, k, v)
        if q.dtype == torch.float32:
            problem = "in float32 it would not use the tensor cores"
        if problem:
            return Choice(op, "torch", f"not Triton: {problem}")
    return choose_path(op, q, k, v, needs=DOTS)


LINEAR_ATTENTION = Kernel(
    "linear_attention",
    {
        "reference": linear_attention_reference,
        "cpu": _two_products,
        "torch": _two_products,
        "triton": _triton,
    },
    _choose,
    _problem,
)
