"""What the blocks of the papers cost, by formula: floating-point operations, parameters, bytes kept for the backward pass.

The formulas give the integers that ``minilib.profiling`` counts, at any size and without a model: a formula shows which term
grows with what. One multiply-add is two operations, in every count here; papers on transformers often
print multiply-adds ("118.6 Gflops" for DiT-XL/2 at 256 pixels are 118.6 GMAC). Only matrix products, attention and
convolutions count.

Letters: b images, n image tokens, l text tokens, d width of a token, h heads.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


def linear_flops(rows: int, d_in: int, d_out: int) -> int:
    """A linear layer on so many rows.

    >>> linear_flops(5, 3, 4)
    120
    """
    return 2 * rows * d_in * d_out


def attention_flops(b: int, h: int, n: int, m: int, d: int) -> int:
    """softmax(q k^T) v with queries (b, h, n, d) and keys and values (b, h, m, d): two products of n m d.

    >>> attention_flops(1, 1, 10, 20, 3)
    2400
    """
    return 4 * b * h * n * m * d


def attention_backward_flops(b: int, h: int, n: int, m: int, d: int, *, recompute: bool = True) -> int:
    """The backward pass of ``attention_flops``: the gradients of the weights, of q, k and v.

    Args:
        b, h, n, m, d: as in ``attention_flops``.
        recompute: a fused kernel did not keep the weights, and makes q k^T a second time: five products, not four.
    """
    return (10 if recompute else 8) * b * h * n * m * d


def transformer_flops(b: int, n: int, d: int, *, mlp_ratio: float = 4.0) -> int:
    """Self-attention with its four projections, and a two-layer feed-forward network: 2 b (4 + 2r) n d^2 + 4 b n^2 d.

    The two parts are equal at n = (2 + r) d tokens; below, the projections dominate.
    """
    hidden = int(d * mlp_ratio)
    return 2 * b * n * (4 * d * d + 2 * d * hidden) + attention_flops(b, 1, n, n, d)


def dit_block_flops(b: int, n: int, d: int, *, mlp_ratio: float = 4.0) -> int:
    """A ``DiTBlock``: the transformer and its modulation, which is one row an image."""
    return transformer_flops(b, n, d, mlp_ratio=mlp_ratio) + linear_flops(b, d, 6 * d)


def dit_flops(config: Mapping[str, Any], *, batch: int = 1) -> int:
    """One forward pass of ``DiT(**config)``, label look-up not counted.

    Raises:
        ValueError: a configuration with another feed-forward network or attention than DiT's.

    >>> from minilib.models import DIT_CONFIGS
    >>> round(dit_flops(DIT_CONFIGS["DiT-XL/2"]) / 2e9, 1)
    118.6
    """
    c = _dit(config)
    b, d, n = batch, c["hidden_size"], (c["input_size"] // c["patch_size"]) ** 2
    patch = c["patch_size"] ** 2 * c["in_channels"]
    ends = linear_flops(b * n, patch, d) + linear_flops(b * n, d, patch * (1 + c["learn_sigma"]))
    condition = linear_flops(b, 256, d) + linear_flops(b, d, d) + linear_flops(b, d, 2 * d)
    return c["depth"] * dit_block_flops(b, n, d, mlp_ratio=c["mlp_ratio"]) + ends + condition


def dit_parameters(config: Mapping[str, Any]) -> int:
    """Trained values of ``DiT(**config)``; positions are fixed.

    Raises:
        ValueError: as ``dit_flops``.

    >>> from minilib.models import DIT_CONFIGS
    >>> round(dit_parameters(DIT_CONFIGS["DiT-XL/2"]) / 1e6)
    675
    """
    c = _dit(config)
    d, patch = c["hidden_size"], c["patch_size"] ** 2 * c["in_channels"]
    hidden = int(d * c["mlp_ratio"])
    block = _linear(d, 3 * d) + _linear(d, d) + _linear(d, hidden) + _linear(hidden, d) + _linear(d, 6 * d)
    embedders = _linear(patch, d) + _linear(256, d) + _linear(d, d) + (c["num_classes"] + 1) * d
    return (
        embedders + c["depth"] * block + _linear(d, 2 * d) + _linear(d, patch * (1 + bool(c["learn_sigma"])))
    )


def mmdit_block_flops(
    b: int,
    n: int,
    l: int,  # noqa: E741
    d: int,
    *,
    mlp_ratio: float = 4.0,
    context_pre_only: bool = False,
    unused_context_query: bool = False,
    dual_attention: bool = False,
) -> int:
    """An ``MMDiTBlock``: n image and l text tokens, each stream with its own weights, and one joint attention.

    ``context_pre_only``: the text gives keys and values only, as in the last block; ``unused_context_query``: and yet
    its query is computed. ``dual_attention``: a second attention of the image tokens among themselves.
    """
    hidden = int(d * mlp_ratio)
    if context_pre_only:
        parts = 3 if unused_context_query else 2
        flops = linear_flops(b * n, d, 4 * d + 2 * hidden) + linear_flops(b * l, d, parts * d)
        flops += attention_flops(b, 1, n, n + l, d) + linear_flops(b, d, 8 * d)
    else:
        flops = transformer_flops(b, n + l, d, mlp_ratio=mlp_ratio) + linear_flops(b, d, 12 * d)
    if dual_attention:
        flops += linear_flops(b * n, d, 4 * d) + attention_flops(b, 1, n, n, d) + linear_flops(b, d, 3 * d)
    return flops


def mmdit_flops(config: Mapping[str, Any], height: int, width: int, l: int, *, batch: int = 1) -> int:  # noqa: E741
    """One forward pass of ``MMDiT(**config)`` on latents of ``height`` x ``width`` and l text tokens.

    Raises:
        ValueError: a configuration with another attention, or sides that the patch size does not divide.
    """
    c = _mmdit(config)
    b, d, p = batch, c["hidden_size"], c["patch_size"]
    if height % p or width % p:
        raise ValueError(f"latents of {height} x {width} given: patches of {p} do not tile them")
    n = (height // p) * (width // p)
    flops = linear_flops(b * n, p * p * c["in_channels"], d) + linear_flops(b * l, c["context_dim"], d)
    flops += linear_flops(b, 256, d) + linear_flops(b, d, d)
    if c["pooled_dim"] is not None:
        flops += linear_flops(b, c["pooled_dim"], d) + linear_flops(b, d, d)
    for i in range(c["depth"]):
        flops += mmdit_block_flops(
            b,
            n,
            l,
            d,
            mlp_ratio=c["mlp_ratio"],
            context_pre_only=i == c["depth"] - 1,
            unused_context_query=c["unused_context_query"],
            dual_attention=i in c["dual_attention_layers"],
        )
    out = p * p * (c["out_channels"] or c["in_channels"])
    return flops + linear_flops(b, d, 2 * d) + linear_flops(b * n, d, out)


def mmdit_parameters(config: Mapping[str, Any]) -> int:
    """Trained values of ``MMDiT(**config)``; stored position tables are not.

    Raises:
        ValueError: a configuration with another attention.
    """
    c = _mmdit(config)
    d, patch = c["hidden_size"], c["patch_size"] ** 2
    hidden, gain = int(d * c["mlp_ratio"]), d // c["num_heads"] if c["qk_norm"] else 0
    stream = _linear(d, 3 * d) + _linear(d, d) + _linear(d, hidden) + _linear(hidden, d) + _linear(d, 6 * d)
    total = _linear(patch * c["in_channels"], d) + _linear(256, d) + _linear(d, d)
    total += _linear(c["context_dim"], d)
    if c["pooled_dim"] is not None:
        total += _linear(c["pooled_dim"], d) + _linear(d, d)
    total += c["depth"] * (2 * stream + 4 * gain)
    # The last block only reads the text: no output layer, no feed-forward network, and two modulations of six.
    total -= _linear(d, d) + _linear(d, hidden) + _linear(hidden, d) + _linear(d, 4 * d) - 4 * d + 4 * d
    if not c["unused_context_query"]:
        total -= _linear(d, d) + gain
    dual = _linear(d, 3 * d) + _linear(d, d) + 2 * gain + _linear(d, 3 * d)
    total += len(set(c["dual_attention_layers"])) * dual
    return total + _linear(d, 2 * d) + _linear(d, patch * (c["out_channels"] or c["in_channels"]))


def spatial_transformer_flops(b: int, n: int, d: int, l: int, context_dim: int, *, depth: int = 1) -> int:  # noqa: E741
    """A ``SpatialTransformer`` of a text U-Net on n pixels: two projections, and ``depth`` blocks.

    A block is self-attention, cross-attention to l text tokens and a GEGLU of hidden width 4 d; with ``context_dim`` 0
    there is no text.
    """
    own = linear_flops(b * n, d, 4 * d) + attention_flops(b, 1, n, n, d)
    feed_forward = linear_flops(b * n, d, 8 * d) + linear_flops(b * n, 4 * d, d)
    cross = 0
    if context_dim:
        cross = linear_flops(b * n, d, 2 * d) + linear_flops(b * l, context_dim, 2 * d)
        cross += attention_flops(b, 1, n, l, d)
    return depth * (own + cross + feed_forward) + linear_flops(b * n, d, 2 * d)


def dit_block_activation_bytes(
    b: int, n: int, d: int, h: int, *, mlp_ratio: float = 4.0, itemsize: int = 4
) -> int:
    """Bytes that a ``DiTBlock`` keeps for its backward pass, inside a model (input and condition need gradients).

    In values a token: the input d, the two norms' results 2d and what the modulation makes of them 2d, q, k and v 3d, the
    attention's result d, the tokens after it d, both branches before their gates 2d, and the hidden layer before and after the
    GELU 2 r d: 12 d + 2 r d, which is 20 d at r = 4. Beside these a mean and a deviation for each norm, one logarithm of a
    sum for each query and head (the fused attention keeps it in the place of the n x n weights), and for each image the six
    modulations, the two of them that are 1 + scale, and the condition.

    Args:
        b, n, d, h: images, tokens, width, heads.
        mlp_ratio: hidden width over d.
        itemsize: bytes of a value; 4 for float32, the only one for which this is exact on a CPU.

    >>> dit_block_activation_bytes(1, 256, 1152, 16)
    23654912
    """
    tokens = b * n * (12 * d + 2 * int(d * mlp_ratio) + 4 + h)
    return itemsize * (tokens + 9 * b * d)


def attention_weight_bytes(b: int, h: int, n: int, m: int, *, itemsize: int = 4) -> int:
    """Bytes of the n x m weights that a fused attention never makes."""
    return itemsize * b * h * n * m


def register_cpu_attention_flops() -> None:
    """Teach torch's ``FlopCounterMode`` the fused attention of the CPU, forward and backward; it counts 0 for it otherwise.

    The formulas are torch's own for fused attention on a GPU: the backward pass makes q k^T a second time (five products).
    On the meta device attention runs as plain products, so a backward pass counted there has four. Calling it again
    changes nothing, nor does it where torch has formulas of its own.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)


class Exponent(NamedTuple):
    """A fitted power law time = c * size^value, and an interval for the exponent."""

    value: float
    low: float
    high: float


def fit_exponent(sizes: Sequence[float], times: Sequence[float], *, level: float = 0.90) -> Exponent:
    """The slope of log time over log size, by least squares, with the t-interval of the fit.

    The interval holds what the fit's own scatter says: it does not know that small sizes pay a fixed cost. Leave these
    out.

    Args:
        sizes: at least three, not all equal.
        times: as many, in any unit.
        level: of the interval.

    Raises:
        ValueError: too few points, values that are not positive, or equal sizes.

    >>> fit_exponent([1, 2, 4, 8], [3, 12, 48, 192]).value
    2.0
    """
    from scipy.stats import t as student

    if len(sizes) != len(times) or len(sizes) < 3:
        raise ValueError(f"{len(sizes)} sizes and {len(times)} times given: as many of both, at least 3")
    if not all(math.isfinite(v) and v > 0 for v in (*sizes, *times)):
        raise ValueError("sizes and times have to be positive: their logarithms are fitted")
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((v - mean_x) ** 2 for v in x)
    if spread == 0:
        raise ValueError(f"all sizes are {sizes[0]}: an exponent needs different ones")
    slope = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True)) / spread
    residual = sum((v - mean_y - slope * (u - mean_x)) ** 2 for u, v in zip(x, y, strict=True))
    freedom = len(x) - 2
    half = float(student.ppf((1 + level) / 2, freedom)) * math.sqrt(residual / freedom / spread)
    return Exponent(slope, slope - half, slope + half)


def _linear(d_in: int, d_out: int) -> int:
    return d_in * d_out + d_out


def _dit(config: Mapping[str, Any]) -> dict[str, Any]:
    from .models import DiT

    return _filled(DiT, config, {"mlp": "gelu", "attention": "full", "qk_norm": False})


def _mmdit(config: Mapping[str, Any]) -> dict[str, Any]:
    from .models import MMDiT

    return _filled(MMDiT, config, {"attention": "full"})


def _filled(model: type, config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the model's defaults; options that the formulas do not know are refused."""
    import inspect

    defaults = {k: p.default for k, p in inspect.signature(model).parameters.items()}
    unknown = sorted(set(config) - set(defaults))
    if unknown:
        raise ValueError(f"unknown options {unknown}: {model.__name__} has {sorted(defaults)}")
    filled = defaults | dict(config)
    for name, value in known.items():
        if filled[name] != value:
            raise ValueError(
                f"{name} = {filled[name]!r} given: the formulas are for {value!r}; count others by minilib.profiling"
            )
    return filled
