"""Leave modules out: skip them, or blend them with their input; and see which modules really ran."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ..attention.module import AttentionLayer
from ..profiling import Calls
from .hooks import Factor, resolve
from .names import Names, running_blocks
from .overrides import Layer, LayeredForward, override_forward
from .values import Args, Kwargs, checked_broadcast, main_input, map_tensors, per_sample, shapes

Bypass = Callable[[Args, Kwargs], Any]


def first_tensors(number: int) -> Bypass:
    """For ``skip`` and ``gate``: the first ``number`` tensors of a call as a tuple, as a block of several streams returns.

    >>> first_tensors(2)((torch.zeros(1), torch.ones(1), torch.ones(1)), {})
    (tensor([0.]), tensor([1.]))
    """
    return lambda args, kwargs: tuple(
        [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)][:number]
    )


@contextmanager
def skip(
    model: nn.Module, names: Names, *, bypass: Bypass = main_input, check: bool = True
) -> Iterator[dict[str, nn.Module]]:
    """Leave the named modules out: each hands on its main input and computes nothing.

    Args:
        model: any module.
        names: see ``named_blocks``.
        bypass: ``bypass(args, kwargs)`` gives what is handed on; the first tensor by default. A block of two
            streams needs ``first_tensors(2)``.
        check: in the first call with inputs of a shape, run the module once on the meta device, where nothing
            is computed, and compare the shapes of its outputs with what is handed on.

    Yields:
        the skipped modules by name.

    Raises:
        ValueError: no such module; in a call, the module's output has another shape than what is handed on.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    >>> with skip(model, "0"):
    ...     model[0](torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    blocks = running_blocks(model, names)

    def make(name: str, module: nn.Module) -> Layer:
        checked: set[tuple[tuple[int, ...], ...]] = set()

        def layer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            handed_on = bypass(args, kwargs)
            key = tuple(shapes((args, kwargs)))
            if check and key not in checked:
                _check_shapes(name, module, args, kwargs, handed_on)
                checked.add(key)
            return handed_on

        return layer

    with override_forward(blocks, make):
        yield blocks


@contextmanager
def gate(
    model: nn.Module, gates: Mapping[str, Factor], *, bypass: Bypass = main_input
) -> Iterator[dict[str, nn.Module]]:
    """Blend the named modules with what they get: ``g module(x) + (1 - g) x``.

    At 1 this is the model, at 0 it is ``skip``, though all is computed; between, it is differentiable in the
    gate. TinyFusion (Fang et al. 2025, arXiv 2412.01199) learns such gates for blocks.

    Args:
        model: any module.
        gates: by name or pattern a number, or a tensor: a scalar, (b,), or what broadcasts to the output.
        bypass: see ``skip``.

    Yields:
        the gated modules by name.

    Raises:
        ValueError: no such module; in a call, output and input differ in shape, or a gate does not broadcast.
    """
    resolved = resolve(model, gates)
    by_module = {name: g for name, _, g in resolved}

    def blend(name: str, out: Any, x: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        g = checked_broadcast(name, per_sample(by_module[name], out), out, "the gate")
        return g * out + (1 - g) * x

    def make(name: str, module: nn.Module) -> Layer:
        def layer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x, out = bypass(args, kwargs), inner(*args, **kwargs)
            _compare(name, shapes(out), x)
            return tree_map(lambda a, b: blend(name, a, b), out, x)

        return layer

    blocks = {name: module for name, module, _ in resolved}
    with override_forward(blocks, make):
        yield blocks


@dataclass
class Executions:
    """Which modules computed: their names in the order in which they began, and how often each (see ``Calls``)."""

    order: list[str] = field(default_factory=list)
    counts: dict[str, Calls] = field(default_factory=dict)


@contextmanager
def trace_executions(model: nn.Module, names: Names = "**") -> Iterator[Executions]:
    """Count how often the named modules really compute.

    A module that is skipped, or whose cached output is used, does not count, however the contexts are nested;
    neither does anything inside it. (``profiling.count_calls`` counts the calls of a single module, skipped
    or not.)

    Yields:
        an ``Executions``, which may be read at any time.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> with skip(model, "0"), trace_executions(model) as trace:
    ...     y = model(torch.ones(3, 2))
    >>> trace.order, trace.counts["0"], trace.counts["1"]
    (['1'], Calls(calls=0, samples=0), Calls(calls=1, samples=3))
    """
    blocks = running_blocks(model, names)
    trace = Executions(counts={name: Calls() for name in blocks})

    def make(name: str, module: nn.Module) -> Layer:
        def layer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.ndim]
            trace.order.append(name)
            trace.counts[name].calls += 1
            trace.counts[name].samples += len(tensors[0]) if tensors else 0
            return inner(*args, **kwargs)

        return layer

    with override_forward(blocks, make, innermost=True):
        yield trace


def _compare(name: str, given: list[tuple[int, ...]], handed_on: Any) -> None:
    if given != shapes(handed_on):
        raise ValueError(
            f"{name!r} gives {_text(given)}, its input would hand on {_text(shapes(handed_on))}: it cannot be left "
            "out like this; choose another module, or give bypass="
        )


def _text(found: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, found)) or "no tensor"


def _check_shapes(name: str, module: nn.Module, args: Args, kwargs: Kwargs, handed_on: Any) -> None:
    """Compare the shapes of ``module``'s own output, found on the meta device, with those of ``handed_on``."""
    ghost = _bare_ghost(module)
    args, kwargs = map_tensors(lambda v: v.detach().to("meta"), (args, kwargs))
    # Without the modes in force, so that a counter of operations does not see this.
    with _disable_current_modes(), torch.no_grad():
        try:
            output = ghost(*args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"{name!r} cannot run on the meta device ({error}), so its shapes are unknown: give check=False"
            ) from error
    _compare(name, shapes(output), handed_on)


def _bare_ghost(module: nn.Module) -> nn.Module:
    """A meta copy of ``module`` without values, hooks, layers and attention processors."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False), *vars(part).values())
        memo |= {id(v): v.detach().to("meta") for v in tensors if isinstance(v, Tensor)}
        memo |= {id(p): nn.Parameter(memo[id(p)], False) for p in part.parameters(recurse=False)}
        layered = part.__dict__.get("forward")
        if isinstance(layered, LayeredForward):
            memo[id(layered)] = None
    ghost = copy.deepcopy(module, memo)
    for part in ghost.modules():
        if part.__dict__.get("forward", part) is None:
            del part.forward
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
        if isinstance(part, AttentionLayer):
            part.processor = _shape_of_attention
    return ghost


def _shape_of_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])
