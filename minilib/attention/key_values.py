"""Keys and values of one run in another: which layer reads what from which tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..intervene.names import Names
from .intervene import When, of_call, put, replace_keys_values

KeyValue = tuple[Tensor, Tensor]


@contextmanager
def record_keys_values(
    model: nn.Module, names: Names | None = None, *, tokens: slice | Tensor | None = None
) -> Iterator[dict[str, list[KeyValue]]]:
    """Record the keys and values that each attention layer reads, as the processor gets them: after norms and positions.

    Args:
        model: holds attention layers at any depth.
        names: only these layers.
        tokens: only these of the tokens that are read: in joint attention the image's come first, then the
            text's.

    Yields:
        for each layer by name a list with one detached pair, both (b, h, m, d), a call.
    """
    records: dict[str, list[KeyValue]] = {}

    def watch(name: str, k: Tensor, v: Tensor) -> KeyValue:
        part = slice(None) if tokens is None else tokens
        kept = (k.detach()[:, :, part].clone(), v.detach()[:, :, part].clone())
        records.setdefault(name, []).append(kept)
        return k, v

    with replace_keys_values(model, watch, names):
        yield records


@contextmanager
def patch_keys_values(
    model: nn.Module,
    recorded: Mapping[str, KeyValue | list[KeyValue]],
    *,
    tokens: slice | Tensor | None = None,
    when: When | None = None,
) -> Iterator[None]:
    """Let attention layers read recorded keys and values in the place of their own.

    Patching the text's keys and values layer by layer finds the layers that decide what a generator writes
    (Staniszewski et al. 2025, arXiv 2502.09935).

    Args:
        model: holds attention layers at any depth.
        recorded: by layer a pair for every call, or a list with one for each call (``record_keys_values``).
        tokens: put them at these tokens only. What was recorded has these tokens alone.
        when: ``when(i)`` says whether to patch call number i of a layer (from 0); always by default.

    Raises:
        ValueError: no such layer; in a call, the recorded ones do not fit.
        IndexError: in a call, nothing was recorded for it.
    """
    counts: dict[str, int] = {}

    def edit(name: str, k: Tensor, v: Tensor) -> KeyValue:
        pair = of_call(recorded, name, counts, when)
        if pair is None:
            return k, v
        where = (slice(None), slice(None), slice(None) if tokens is None else tokens)
        for own, new in zip((k, v), pair, strict=True):
            if own[where].shape != new.shape:
                raise ValueError(
                    f"{name!r} has {tuple(own[where].shape)} to replace, recorded were {tuple(new.shape)}: give the "
                    "same tokens to both"
                )
        return put(k, pair[0].to(k), where), put(v, pair[1].to(v), where)

    with replace_keys_values(model, edit, list(recorded)):
        yield
