"""Local attention on a grid of tokens: each reads the keys in a disk around it (CLEAR, Liu et al. 2024, arXiv 2412.16112).

Image token at (y, x) sees the image tokens at (y', x') with (y' - y)^2 + (x' - x)^2 < radius^2, strictly (section 3.2;
Huage001/CLEAR: attention_processor.py, ``local_mask``). Tokens after those of the grid, such as a text's, are *extra*: every
token sees them, and they see every token. A mask over N x N saves nothing; the work has to be left out:

- ``cpu`` and ``torch``: the grid in tiles, each with its halo (``minilib.kernels.halo``), all in one batched softmax
  attention whose mask is the same for every image and is kept. Exact, differentiable, linear in the number of tokens.
- ``flex``: FlexAttention skips the blocks of keys that no query of a block sees; compiled at the first call for each shape,
  which takes a minute. The default from compute capability 8.0 on.
- ``triton``: one program a tile, walking over its halo. It has not been measured against FlexAttention, so it runs only
  with ``MINILIB_KERNELS=triton``.
"""

import math
from functools import lru_cache
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from minilib.attention.functional import fused_attention

from .dispatch import DOTS, Choice, Kernel, capability, choose_path, why_not_triton
from .halo import Grid, Tiling, choose_tiling, disk_limit, gather_windows, reach_of, scatter_tiles

FLEX_WIDTHS = (16, 32, 64, 128, 256)
Queries = Float[Tensor, "b h n d"]
Keys = Float[Tensor, "b h m d"]
KeyMask = Shaped[Tensor, "..."]


def local_attention(
    q: Queries, k: Keys, v: Keys, *, grid: Grid, radius: float, mask: KeyMask | None = None
) -> Queries:
    """Softmax attention within a disk, and with the extra tokens.

    Args:
        q: queries; the first rows x columns are the grid's, in raster order, the rest are extra.
        k: keys, in the same order; there may be more or fewer extra ones than queries.
        v: values.
        grid: (rows, columns).
        radius: of the disk, in tokens, strict: at most 1 a token sees only itself (and the extra ones).
        mask: of keys, the same for all heads and queries: broadcasts to (b, 1, 1, m), boolean with True for keys
            that may be read, or floating point, added to the logits. For the padding of a text.

    Raises:
        ValueError: fewer tokens than the grid has, a radius that is not positive, a mask that depends on the query.

    >>> q = torch.zeros(1, 1, 4, 1)
    >>> v = torch.tensor([[[[1.0], [3.0], [5.0], [7.0]]]])
    >>> local_attention(q, q, v, grid=(1, 4), radius=1.5).flatten()
    tensor([2., 3., 5., 6.])
    """
    check_options(grid=grid, radius=radius)
    _check(q, k, v, grid, mask)
    return LOCAL(q, k, v, grid=grid, radius=radius, mask=mask)


def check_options(*, grid: Grid, radius: float) -> None:
    """Raise a ValueError for a grid or a radius that cannot be."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"local attention: grid must be (rows, columns), both positive, got {grid}")
    if not (0 < radius < math.inf):
        raise ValueError(f"local attention: radius must be positive and finite, got {radius}")


def _check(q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None) -> None:
    size = grid[0] * grid[1]
    for name, tensor in (("queries", q), ("keys", k)):
        if tensor.ndim != 4 or tensor.shape[2] < size:
            shape = tuple(tensor.shape)
            raise ValueError(
                f"local attention on grid={grid} needs {name} of shape (b, h, {size} or more, d), got {shape}"
            )
    if v.shape[:3] != k.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"local attention: queries, keys and values do not fit each other: {shapes}")
    if mask is None:
        return
    per_key = mask.ndim < 2 or (mask.shape[-2] == 1 and (mask.ndim < 3 or mask.shape[-3] == 1))
    if not per_key or mask.ndim > 4:
        raise ValueError(
            f"local attention takes a mask of keys that broadcasts to (b, 1, 1, m), got {tuple(mask.shape)}: who sees "
            "whom is the disk's business. Use 'full' attention for other masks"
        )


def disk_mask(grid: Grid, radius: float, n: int, m: int) -> Bool[Tensor, "n m"]:
    """Which of ``m`` keys each of ``n`` queries sees; tokens beyond the grid are extra.

    >>> disk_mask((1, 3), 1.5, 3, 4).int().tolist()
    [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    """
    rows, columns = grid
    y, x = (
        part.flatten() for part in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    )
    distance = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    sees = torch.ones(n, m, dtype=torch.bool)
    sees[: rows * columns, : rows * columns] = distance < disk_limit(radius)
    return sees


def reference(
    q: Queries, k: Keys, v: Keys, *, grid: Grid, radius: float, mask: KeyMask | None = None
) -> Queries:
    """The definition: all N x M logits, and -inf where a query does not see a key."""
    exact = q.dtype if q.dtype == torch.float64 else torch.float32
    logits = (q.to(exact) @ k.to(exact).transpose(-1, -2)) * q.shape[-1] ** -0.5
    seen = disk_mask(grid, radius, q.shape[2], k.shape[2]).to(q.device)
    logits = logits.masked_fill(~seen, -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return (logits.softmax(-1) @ v.to(exact)).to(q.dtype)


def tile_mask(
    tiling: Tiling, limit: int, extra: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "tiles 1 tile keys"] | None:
    """0 where a query of a tile sees a key of its window, or one of the ``extra`` keys, else -inf; None if all see all."""
    if device.type not in ("cpu", "meta"):
        return _mask_on_device(tiling, limit, extra, dtype, device)
    values = _mask_values(tiling, limit, extra, dtype == torch.float64)
    return None if values is None else torch.from_numpy(values).to(device, dtype)


@lru_cache(maxsize=32)
def _mask_on_device(
    tiling: Tiling, limit: int, extra: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    values = _mask_values(tiling, limit, extra, dtype == torch.float64)
    # Made in inference mode it could not be used in training later.
    with torch.inference_mode(False):
        return None if values is None else torch.from_numpy(values).to(device, dtype)


@lru_cache(maxsize=32)
def _mask_values(tiling: Tiling, limit: int, extra: int, double: bool) -> np.ndarray | None:
    """An array, not a tensor: a tensor that is kept remembers the mode (inference, fake) it was made in."""
    y, x = (axis.squared_steps() for axis in tiling)
    distance = y[:, None, :, None, :, None] + x[None, :, None, :, None, :]
    tiles, queries, keys = (math.prod(distance.shape[i : i + 2]) for i in (0, 2, 4))
    seen = (distance < limit).reshape(tiles, 1, queries, keys)
    if seen.all():
        return None
    added = np.zeros((tiles, 1, queries, keys + extra), dtype=np.float64 if double else np.float32)
    added[..., :keys][~seen] = -np.inf
    return added


def tiled(q: Queries, k: Keys, v: Keys, *, grid: Grid, radius: float, mask: KeyMask | None = None) -> Queries:
    """The grid in tiles, each attending to its window and the extra keys, in one batched attention; see the module."""
    size = grid[0] * grid[1]
    extra = k.shape[2] - size
    tiling = choose_tiling(grid, reach_of(radius), extra)
    queries = gather_windows(q[:, :, :size].unflatten(2, grid), _without_halo(tiling))
    keys, values = (_window_keys(x, grid, tiling) for x in (k, v))
    half_on_cpu = q.device.type == "cpu" and q.dtype != torch.float64
    dtype = torch.float32 if half_on_cpu else q.dtype
    seen = tile_mask(tiling, disk_limit(radius), extra, dtype, q.device)
    if mask is None:
        # Heads and images as one axis: the mask of a tile is the same for all.
        parts = (x.flatten(1, 2) for x in (queries, keys, values))
    else:
        parts = (x.flatten(0, 1) for x in (queries, keys, values))
        mask = _additive(mask, len(q), k.shape[2], dtype)
        of_keys = _window_keys(mask.unsqueeze(-1), grid, tiling).movedim(-1, -2)
        seen = (of_keys if seen is None else of_keys + seen.unsqueeze(1)).flatten(0, 1)
    out = fused_attention(*parts, mask=seen)
    out = out.view(*queries.shape[:-1], v.shape[-1])
    image = scatter_tiles(out, tiling).flatten(2, 3)
    if q.shape[2] == size:
        return image
    rest = fused_attention(q[:, :, size:], k, v, mask=None if mask is None else mask.unsqueeze(-2))
    return torch.cat([image, rest], dim=2)


def _without_halo(tiling: Tiling) -> Tiling:
    y, x = tiling
    return type(y)(y.size, y.tile, 0), type(x)(x.size, x.tile, 0)


def _window_keys(x: Tensor, grid: Grid, tiling: Tiling) -> Tensor:
    """(b, h, m, d) -> (tiles, b, h, keys of the window and the extra ones, d)."""
    size = grid[0] * grid[1]
    windows = gather_windows(x[:, :, :size].unflatten(2, grid), tiling)
    if x.shape[2] == size:
        return windows
    return torch.cat([windows, x[:, :, size:].expand(len(windows), -1, -1, -1, -1)], dim=3)


def _additive(mask: Tensor, b: int, m: int, dtype: torch.dtype) -> Tensor:
    """(b, 1, m), added to the logits."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.to(dtype).expand(b, 1, 1, m).squeeze(2)


def flex_mask(grid: Grid, radius: float) -> Any:
    """The disk as a ``mask_mod`` of FlexAttention: (batch, head, query, key) -> may it look?"""
    size, columns, limit = grid[0] * grid[1], grid[1], disk_limit(radius)

    @no_type_check  # FlexAttention counts its arguments, which a type checker's wrapper hides
    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down, across = query // columns - key // columns, query % columns - key % columns
        return (down * down + across * across < limit) | (query >= size) | (key >= size)

    return sees


@lru_cache(maxsize=32)
def _block_mask(grid: Grid, radius: float, n: int, m: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled on a GPU it never holds the n x m mask.
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    with torch.inference_mode(False):
        return create(flex_mask(grid, radius), None, None, n, m, device=device)


@lru_cache
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def flex(q: Queries, k: Keys, v: Keys, *, grid: Grid, radius: float, mask: KeyMask | None = None) -> Queries:
    """FlexAttention with a block mask that is made once for each grid, radius and number of extra tokens."""
    if mask is not None:
        raise ValueError("the FlexAttention path takes no mask of keys")
    blocks = _block_mask(grid, float(radius), q.shape[2], k.shape[2], q.device)
    return _flex_attention(q.device.type)(q, k, v, block_mask=blocks)


def _triton(
    q: Queries, k: Keys, v: Keys, *, grid: Grid, radius: float, mask: KeyMask | None = None
) -> Queries:
    from ._triton import local

    size = grid[0] * grid[1]
    image = local.local_attention(q[:, :, :size], k, v, *grid, disk_limit(radius), reach_of(radius))[0]
    if q.shape[2] == size:
        return image
    return torch.cat([image, fused_attention(q[:, :, size:], k, v)], dim=2)


def _problem(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, radius: float, mask: Tensor | None = None
) -> str | None:
    if mask is not None:
        return "its kernel takes no mask of keys"
    if q.shape[-1] > 128 or q.shape[-1] != v.shape[-1]:
        return f"heads are {q.shape[-1]} and {v.shape[-1]} wide, and it takes equal widths up to 128"
    return why_not_triton(q, k, v, needs=DOTS)


def _choose(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, radius: float, mask: Tensor | None = None
) -> Choice:
    if not q.is_cuda:
        return choose_path("local_attention", q, k, v)
    if mask is not None:
        return Choice("local_attention", "torch", "tiles with halos: there is a mask of keys")
    if capability(q.device) < DOTS:
        return Choice("local_attention", "torch", "tiles with halos: a GPU below compute capability 8.0")
    if q.shape[-1] not in FLEX_WIDTHS or v.shape[-1] != q.shape[-1] or q.dtype == torch.float64:
        why = f"FlexAttention is used for heads of {FLEX_WIDTHS} and not in float64"
        return Choice("local_attention", "torch", f"tiles with halos: {why}")
    why = "FlexAttention with a cached block mask; the Triton kernel, not yet measured, needs MINILIB_KERNELS=triton"
    return Choice("local_attention", "flex", why)


LOCAL = Kernel(
    "local_attention",
    {"reference": reference, "cpu": tiled, "torch": tiled, "flex": flex, "triton": _triton},
    _choose,
    _problem,
)
