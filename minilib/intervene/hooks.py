"""Record and replace what goes into a module and what comes out of it, inside a ``with`` block.

All of these use torch's own forward hooks. A hook that was added later (an inner ``with``) sees what the
earlier ones left.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .names import Names, running_blocks
from .values import (
    Args,
    checked_broadcast,
    main_input,
    map_tensors,
    per_sample,
    with_main_input,
)

OutputEdit = Callable[[nn.Module, Args, Any], Any]
InputEdit = Callable[[nn.Module, Any], Any]
Records = dict[str, list[Any]]
Factor = float | Tensor
Reduce = Callable[[Tensor], Tensor]


def _keep(value: Tensor, detach: bool, reduce: Reduce | None) -> Tensor:
    if not detach:
        return value if reduce is None else reduce(value)
    # A copy, because a later operation may write into the original in place. A reduction may return a view.
    value = value.detach()
    kept = value if reduce is None else reduce(value)
    shared = kept.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    return kept.clone() if shared else kept


@contextmanager
def record_outputs(
    model: nn.Module, names: Names, *, detach: bool = True, reduce: Reduce | None = None
) -> Iterator[Records]:
    """Record the outputs of the named modules; the model's outputs stay bit for bit the same.

    Args:
        model: any module.
        names: see ``named_blocks``.
        detach: keep a copy outside the graph; False keeps the tensors themselves, for gradients with respect
            to them.
        reduce: keep only ``reduce(tensor)`` of every tensor, to save memory.

    Yields:
        for each module by name a list with one output a call, in the order of the calls.

    >>> import torch
    >>> model = nn.Sequential(nn.Identity(), nn.Flatten())
    >>> with record_outputs(model, "0") as outputs:
    ...     y = model(torch.ones(2, 3))
    >>> outputs["0"][0].shape
    torch.Size([2, 3])
    """
    blocks = running_blocks(model, names)
    records: Records = {name: [] for name in blocks}

    def make(calls: list[Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Args, output: Any) -> None:
            calls.append(map_tensors(lambda v: _keep(v, detach, reduce), output))

        return hook

    with ExitStack() as stack:
        for name, module in blocks.items():
            stack.callback(module.register_forward_hook(make(records[name])).remove)
        yield records


@contextmanager
def record_inputs(
    model: nn.Module, names: Names, *, detach: bool = True, reduce: Reduce | None = None
) -> Iterator[Records]:
    """Record the main input, which is the first tensor argument, of every call of the named modules.

    The arguments and what is yielded are those of ``record_outputs``.
    """
    blocks = running_blocks(model, names)
    records: Records = {name: [] for name in blocks}

    def make(calls: list[Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
            calls.append(_keep(main_input(args, kwargs), detach, reduce))

        return hook

    with ExitStack() as stack:
        for name, module in blocks.items():
            stack.callback(module.register_forward_pre_hook(make(records[name]), with_kwargs=True).remove)
        yield records


def resolve(model: nn.Module, edits: Mapping[str, Any]) -> list[tuple[str, nn.Module, Any]]:
    """Every pattern's modules with what belongs to the pattern, in the model's order; each module once.

    Raises:
        ValueError: a pattern matches nothing, or two match the same module.
    """
    chosen: dict[str, tuple[nn.Module, Any, str]] = {}
    for pattern, edit in edits.items():
        for name, module in running_blocks(model, pattern).items():
            if name in chosen:
                raise ValueError(f"{name!r} matches both {chosen[name][2]!r} and {pattern!r}: give it once")
            chosen[name] = (module, edit, pattern)
    order = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [(name, *chosen[name][:2]) for name in order if name in chosen]


@contextmanager
def replace_output(model: nn.Module, edits: Mapping[str, OutputEdit]) -> Iterator[None]:
    """Let ``edits[name](module, args, output)`` return what the module hands on instead of ``output``.

    The names may be patterns. The module still computes; ``skip`` and ``cached`` are there to save that.

    Raises:
        ValueError: no such module.
        TypeError: in a call, an edit returned None.
    """

    def make(name: str, edit: OutputEdit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Args, output: Any) -> Any:
            edited = edit(module, args, output)
            if edited is None:
                raise TypeError(f"the edit of {name!r} returned None: return the output, changed or not")
            return edited

        return hook

    with ExitStack() as stack:
        for name, module, edit in resolve(model, edits):
            stack.callback(module.register_forward_hook(make(name, edit)).remove)
        yield


@contextmanager
def replace_input(model: nn.Module, edits: Mapping[str, InputEdit]) -> Iterator[None]:
    """Let ``edits[name](module, x)`` return what the module gets instead of its main input ``x``.

    Raises:
        ValueError: no such module.
        TypeError: in a call, an edit returned None.
    """

    def make(name: str, edit: InputEdit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
            edited = edit(module, main_input(args, kwargs))
            if edited is None:
                raise TypeError(f"the edit of {name!r} returned None: return the input, changed or not")
            return with_main_input(args, kwargs, edited)

        return hook

    with ExitStack() as stack:
        for name, module, edit in resolve(model, edits):
            stack.callback(module.register_forward_pre_hook(make(name, edit), with_kwargs=True).remove)
        yield


@contextmanager
def scale_outputs(model: nn.Module, factors: Mapping[str, Factor]) -> Iterator[None]:
    """Multiply the outputs of the named modules by a factor; 1 changes no bit, 0 removes a residual branch.

    Args:
        model: any module.
        factors: by name or pattern a number, a tensor of shape (b,), one factor a sample, or a tensor that
            broadcasts to the output. A factor that requires a gradient gets one. In an output of several
            tensors each is multiplied. A tensor as long as the batch counts as (b,); give (1, 1, d) to mean
            channels where the two might be equal.
    """

    def edit(name: str, factor: Factor) -> OutputEdit:
        return lambda module, args, output: map_tensors(lambda v: _scaled(name, factor, v), output)

    resolved = {name: edit(name, factor) for name, _, factor in resolve(model, factors)}
    with replace_output(model, resolved):
        yield


@contextmanager
def scale_inputs(model: nn.Module, factors: Mapping[str, Factor]) -> Iterator[None]:
    """Multiply the main input of the named modules by a factor: with ``{"blocks.0.mlp.fc2": mask}`` it prunes hidden channels.

    The arguments are those of ``scale_outputs``.
    """

    def edit(name: str, factor: Factor) -> InputEdit:
        return lambda module, x: _scaled(name, factor, x)

    resolved = {name: edit(name, factor) for name, _, factor in resolve(model, factors)}
    with replace_input(model, resolved):
        yield


def _scaled(name: str, factor: Factor, value: Tensor) -> Tensor:
    return value * checked_broadcast(name, per_sample(factor, value), value, "the factor")
