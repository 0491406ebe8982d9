"""Run only some of the tokens: take them out, put them back, and keep the keys and values of the others.

A denoiser step can leave most tokens as they are and send a few through the transformer (region-adaptive sampling, Liu et al.
2025, arXiv 2502.10389; ``microsoft/RAS``). What the few need from the others are keys and values: ``TokenKeyValues`` holds those
of all tokens in memory that is taken once, and overwrites the rows of the tokens that ran. Everything is plain PyTorch:
indexing costs about a tenth of one linear layer on these tokens, so there is nothing to fuse.

``indices`` are whole numbers, (k,) for all samples alike or (b, k) for each its own, without repetition. On a CPU they are
checked; on a GPU that would mean to wait for it, and the device reports what is out of range.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..attention.intervene import replace_keys_values
from ..intervene.names import Names

Indices = Int[Tensor, " k"] | Int[Tensor, "b k"]


def gather_tokens(x: Float[Tensor, "b n d"], indices: Indices) -> Float[Tensor, "b k d"]:
    """The tokens at ``indices``, in their order.

    Raises:
        ValueError: indices of the wrong shape, out of range or repeated.

    >>> gather_tokens(torch.arange(3.0).view(1, 3, 1), torch.tensor([2, 0])).flatten()
    tensor([2., 0.])
    """
    _check_indices(indices, *x.shape[:2])
    if indices.ndim == 1:
        return x.index_select(1, indices)
    b, n, d = x.shape
    return x.reshape(b * n, d).index_select(0, _flat(indices, n)).view(b, -1, d)


def scatter_tokens(
    x: Float[Tensor, "b n d"], values: Float[Tensor, "b k d"], indices: Indices
) -> Float[Tensor, "b n d"]:
    """A copy of ``x`` whose tokens at ``indices`` are ``values``; gradients flow to both.

    Raises:
        ValueError: indices of the wrong shape, out of range or repeated, or values of another number.

    >>> scatter_tokens(torch.zeros(1, 3, 1), torch.ones(1, 1, 1), torch.tensor([1])).flatten()
    tensor([0., 1., 0.])
    """
    b, n, d = x.shape
    _check_indices(indices, b, n)
    if values.shape != (b, indices.shape[-1], d):
        raise ValueError(
            f"values {tuple(values.shape)} given for {indices.shape[-1]} of {n} tokens: they have to be "
            f"{(b, indices.shape[-1], d)}"
        )
    if indices.ndim == 1:
        return x.index_copy(1, indices, values.to(x.dtype))
    rows = x.reshape(b * n, d).index_copy(0, _flat(indices, n), values.to(x.dtype).reshape(-1, d))
    return rows.view(b, n, d)


def complement_indices(indices: Indices, n: int) -> Int[Tensor, "..."]:
    """The tokens of 0..n-1 that ``indices`` leaves out, ascending.

    Raises:
        ValueError: indices of the wrong shape, out of range or repeated.

    >>> complement_indices(torch.tensor([3, 1]), 5)
    tensor([0, 2, 4])
    """
    _check_indices(indices, len(indices), n)
    left = torch.ones(*indices.shape[:-1], n, dtype=torch.bool, device=indices.device)
    left.scatter_(-1, indices, False)
    # Stable, so that the True ones come first in their order; every row has n - k of them.
    return left.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : n - indices.shape[-1]]


class TokenKeyValues:
    """Keys and values of all tokens of one attention layer, of which any may be overwritten.

    They lie in memory as (b, n, h, d), the order in which a layer's projections make them, so that writing some tokens
    is one ``index_copy_``. For inference: what is written has no gradient.

    Args:
        batch, num_heads, num_tokens, head_dim: sizes, fixed.
        dtype: of what is kept.
        device: where it is kept.

    Raises:
        ValueError: a size below 1.

    >>> cache = TokenKeyValues(1, 2, 4, 8)
    >>> every, some = torch.zeros(1, 2, 4, 8), torch.ones(1, 2, 1, 8)
    >>> k, v = cache.update(every, every)
    >>> k, v = cache.update(some, some, torch.tensor([2]))
    >>> k[0, 0, :, 0]
    tensor([0., 0., 1., 0.])
    """

    def __init__(
        self,
        batch: int,
        num_heads: int,
        num_tokens: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, num_tokens, num_heads, head_dim)
        if min(shape) < 1:
            raise ValueError(f"sizes (batch, tokens, heads, width) {shape} given: each has to be at least 1")
        self.shape = shape
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self._written = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        self._complete = False

    @property
    def written(self) -> Bool[Tensor, "b n"]:
        """Which tokens have keys and values."""
        return self._written.clone()

    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self._k.nbytes + self._v.nbytes

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._written.zero_()
        self._complete = False

    def update(
        self, k: Float[Tensor, "b h k d"], v: Float[Tensor, "b h k d"], indices: Indices | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Write the keys and values of the tokens at ``indices`` (None: all), and return those of all tokens.

        What is returned are views of the memory: the next update changes them.

        Raises:
            ValueError: shapes or indices that do not fit, a gradient is asked for, or a token has none yet.
        """
        b, n, h, d = self.shape
        number = n if indices is None else indices.shape[-1]
        if k.shape != v.shape or k.shape != (b, h, number, d):
            raise ValueError(
                f"keys {tuple(k.shape)} and values {tuple(v.shape)} given: both have to be {(b, h, number, d)}"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError("kept keys and values have no gradient: run the model under torch.no_grad()")
        if indices is None:
            self._k.copy_(k.transpose(1, 2))
            self._v.copy_(v.transpose(1, 2))
            self._written.fill_(True)
            self._complete = True
        else:
            self._write(k, v, indices)
        return self._k.transpose(1, 2), self._v.transpose(1, 2)

    def _write(self, k: Tensor, v: Tensor, indices: Tensor) -> None:
        b, n, h, d = self.shape
        _check_indices(indices, b, n)
        if indices.ndim == 1:
            for store, new in ((self._k, k), (self._v, v)):
                store.index_copy_(1, indices, new.transpose(1, 2).to(store.dtype))
        else:
            rows = _flat(indices, n)
            for store, new in ((self._k, k), (self._v, v)):
                flat = new.transpose(1, 2).reshape(-1, h, d).to(store.dtype)
                store.view(b * n, h, d).index_copy_(0, rows, flat)
        if not self._complete:
            self._written.scatter_(1, indices.expand(b, -1), True)
            missing = int((~self._written).sum())
            if missing:
                raise ValueError(
                    f"{missing} of {b * n} tokens have no keys and values yet: run all tokens once first"
                )
            self._complete = True


@contextmanager
def partial_attention(
    model: nn.Module,
    caches: dict[str, TokenKeyValues],
    indices: Indices | None = None,
    names: Names | None = None,
) -> Iterator[None]:
    """Let the attention layers of ``model`` be given some of the tokens: their queries read the keys and values of all.

    A run of all tokens (``indices`` None) fills ``caches``, which may be empty before; a run of some of them then
    overwrites their rows. If the others' rows are fresh, made from the same input, the tokens that run get what they
    would have got in a full run. Positions, and anything else that depends on a token's place, have to be added before
    tokens are taken out. In joint attention the image's tokens are counted first, then the text's, and ``indices``
    have to name both.

    Args:
        model: holds attention layers at any depth.
        caches: keys and values by the layer's name; layers that are missing are added in a run of all tokens.
        indices: which tokens come.
        names: only these layers, as in ``minilib.attention.attention_modules``.

    Raises:
        ValueError: there is no such layer; in a call, a layer whose keys and values were never kept, or shapes or indices
            that do not fit.

    >>> from minilib.attention import Attention
    >>> layer = nn.Sequential(Attention(8, 2)).eval()
    >>> x, some, caches = torch.randn(1, 6, 8), torch.tensor([1, 4]), {}
    >>> with torch.no_grad():
    ...     with partial_attention(layer, caches):
    ...         full = layer(x)
    ...     with partial_attention(layer, caches, some):
    ...         part = layer(gather_tokens(x, some))
    >>> torch.allclose(part, gather_tokens(full, some), atol=1e-6)
    True
    """

    def edit(name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if name not in caches:
            if indices is not None:
                raise ValueError(
                    f"no keys and values of {name!r} were kept: run all tokens (indices=None) once first"
                )
            b, h, n, d = k.shape
            caches[name] = TokenKeyValues(b, h, n, d, dtype=k.dtype, device=k.device)
        return caches[name].update(k, v, indices)

    with replace_keys_values(model, edit, names):
        yield


def _flat(indices: Tensor, n: int) -> Tensor:
    """Indices (b, k) into n tokens of each sample as rows of all b * n."""
    return (indices + n * torch.arange(len(indices), device=indices.device)[:, None]).flatten()


def _check_indices(indices: Tensor, b: int, n: int) -> None:
    if indices.ndim == 2 and len(indices) != b:
        raise ValueError(
            f"indices {tuple(indices.shape)} given for {b} samples: one row each, or one axis for all"
        )
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    ordered = indices.sort(dim=-1).values
    low, high = int(ordered[..., 0].min()), int(ordered[..., -1].max())
    if low < 0 or high >= n:
        raise ValueError(f"indices run from {low} to {high}: there are tokens 0..{n - 1}")
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError("a token is named twice: give each index once")
