"""Activation patching: the output of one run in another run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .hooks import OutputEdit, replace_output, resolve
from .values import Args, shapes


@contextmanager
def patch(
    model: nn.Module,
    recorded: Mapping[str, Any],
    *,
    index: Any = None,
    when: Callable[[int], bool] | None = None,
) -> Iterator[None]:
    """Activation patching: put recorded outputs in the place of the named modules' own.

    Args:
        model: any module.
        recorded: by name what to put in: an output, used in every call, or a list of outputs, one for each
            call, as ``record_outputs`` gives them.
        index: put in only this part, ``output[index] = recorded[index]``, such as
            ``(slice(None), slice(0, 16))`` for the first 16 tokens.
        when: ``when(i)`` says whether to patch call number i of a module (from 0); always by default.

    Raises:
        ValueError: no such module; in a call, the recording has another shape.
        IndexError: in a call, a list has no entry for it.

    >>> import torch
    >>> layer = nn.Identity()
    >>> with patch(layer, {"": torch.zeros(1, 2)}, index=(slice(None), 0)):
    ...     layer(torch.ones(1, 2))
    tensor([[0., 1.]])
    """

    def edit(name: str, source: Any) -> OutputEdit:
        count = 0

        def put(module: nn.Module, args: Args, output: Any) -> Any:
            nonlocal count
            call, count = count, count + 1
            if when is not None and not when(call):
                return output
            value = _of_call(name, source, call)
            if shapes(value) != shapes(output):
                raise ValueError(
                    f"{name!r} gives {shapes(output)}, the recording has {shapes(value)}: record with the same inputs"
                )
            return _put_in(output, value, index)

        return put

    edits = {name: edit(name, source) for name, _, source in resolve(model, recorded)}
    with replace_output(model, edits):
        yield


def _of_call(name: str, source: Any, call: int) -> Any:
    if not isinstance(source, list):
        return source
    if call >= len(source):
        raise IndexError(f"call {call + 1} of {name!r}, but only {len(source)} calls were recorded")
    return source[call]


def _put_in(output: Any, value: Any, index: Any) -> Any:
    own, structure = tree_flatten(output)
    new, _ = tree_flatten(value)
    return tree_unflatten([_put_tensor(a, b, index) for a, b in zip(own, new, strict=True)], structure)


def _put_tensor(own: Any, new: Any, index: Any) -> Any:
    if not isinstance(own, Tensor):
        return own
    new = new.to(own)
    if index is None:
        return new.clone()
    out = own.clone()
    out[index] = new[index]
    return out
