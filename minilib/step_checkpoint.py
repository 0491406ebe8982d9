"""Gradients through a whole sampler in the memory of one step: time-step gradient checkpointing.

A sampler is a loop ``state <- step(i, state)``. Back-propagation through the loop keeps every activation of every step. Here the
loop runs without a graph and keeps the states between the steps only. Then it is walked back: each step is run once more, from
its kept state and with a graph, and the gradient is handed through that one step (EcoDiff, Zhang et al. 2024, arXiv 2412.02852,
section 3.3; the idea is that of Chen et al. 2016, arXiv 1604.06174, with one segment a step). Memory: one step and T states.
Calls of the model: 2 T in place of T.

``torch.utils.checkpoint`` around each step does the same. What is added here: the second run is compared with the first, so that
noise drawn anew between the two is an error and not a wrong gradient, and a tensor that would silently get no gradient is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import saved_tensors_hooks

State = Tensor | tuple[Tensor, ...]
Step = Callable[[int, Any], Any]
"""``step(i, state) -> state``: a tensor, or a tuple of tensors if the solver remembers more than the sample."""


def run_steps(step: Step, state: State, steps: int) -> State:
    """The plain loop: ``step(0, state)``, then ``step(1, ...)`` and so on. With a graph it keeps all of it.

    Raises:
        ValueError: ``steps`` is not a whole number from 1 on.
        TypeError: a state that is neither a tensor nor a tuple of tensors.

    >>> run_steps(lambda i, x: x + i, torch.zeros(1), 4)
    tensor([6.])
    """
    _check_steps(steps)
    _tensors(state, "the first state")
    for i in range(steps):
        state = step(i, state)
    return state


def checkpointed_steps(
    step: Step, state: State, steps: int, parameters: Sequence[Tensor], *, tolerance: float | None = 1e-4
) -> State:
    """What :func:`run_steps` gives, with the same gradients, in the memory of one step.

    Args:
        step: ``step(i, state)`` returns the next state, of the same shapes. It may be called twice with the same arguments and
            has to give the same result: freeze its noise.
        state: floating-point tensor, or a flat tuple of them.
        steps: how many.
        parameters: the tensors inside ``step`` that are to get gradients, such as masks; each requires one. What else requires a
            gradient in there has to be frozen.
        tolerance: how far the second run of a step may be from the first, relative to the largest value; None: not compared.

    Raises:
        ValueError: ``steps`` below 1, a parameter that requires no gradient or is given twice, nothing to differentiate.
        TypeError: states that are nested, or no floating-point tensors.
        RuntimeError: in a call: a step that writes into its state, or changes shapes. In the backward pass: a step that does not
            repeat itself, that reads an unlisted tensor requiring a gradient, or a parameter changed since. There is no second
            derivative.

    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> checkpointed_steps(lambda i, x: w * x, torch.tensor(1.0), 3, [w]).backward()
    >>> w.grad
    tensor(12.)
    """
    _check_steps(steps)
    first = _tensors(state, "the first state")
    parameters = tuple(parameters)
    _check_parameters(parameters, first)
    plan = _Plan(step, steps, len(first), isinstance(state, tuple), parameters, tolerance)
    return plan.packed(_Steps.apply(plan, *first, *parameters))


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the two passes share."""

    step: Step
    steps: int
    width: int  # tensors in a state
    is_tuple: bool
    parameters: tuple[Tensor, ...]
    tolerance: float | None

    def packed(self, tensors: Sequence[Tensor]) -> State:
        return tuple(tensors) if self.is_tuple else tensors[0]

    def run(self, i: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One step, checked."""
        before = _versions(tensors)
        out = _tensors(self.step(i, self.packed(tensors)), f"what step {i} returns")
        if _versions(tensors) != before:
            raise RuntimeError(f"step {i} writes into its state in place: return a new tensor")
        given, wanted = _signature(out), _signature(tensors)
        if given != wanted:
            raise RuntimeError(
                f"step {i} makes {given} of {wanted}: a state has to keep its shapes and dtype"
            )
        return out


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        states = [tensors[: plan.width]]
        for i in range(plan.steps):
            states.append(plan.run(i, states[-1]))
        # A step may hand on what it got; an output must not be an input.
        last = tuple(t.clone() if any(t is s for s in tensors) else t for t in states[-1])
        ctx.plan, ctx.autocast = plan, _autocast_state(tensors[0].device.type)
        ctx.versions = _versions(plan.parameters)
        ctx.save_for_backward(*(t for state in [*states[:-1], last] for t in state))
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        if _versions(plan.parameters) != ctx.versions:
            raise RuntimeError(
                "a parameter was changed in place since the forward pass: call backward before the optimiser's step"
            )
        saved = ctx.saved_tensors
        states = [saved[k : k + plan.width] for k in range(0, len(saved), plan.width)]
        needs_first = any(ctx.needs_input_grad[1 : 1 + plan.width])
        total: list[Tensor | None] = [None] * len(plan.parameters)
        down: Sequence[Tensor | None] = gradients
        for i in reversed(range(plan.steps)):
            inputs = [t.detach().requires_grad_(i > 0 or needs_first) for t in states[i]]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                out = plan.run(i, inputs)
            _check_repeated(i, out, states[i + 1], plan.tolerance)
            if i == plan.steps - 1:
                _check_listed(out, (*inputs, *plan.parameters))
            down, own = _through(out, inputs, plan.parameters, down)
            total = [a if b is None else b if a is None else a + b for a, b in zip(total, own, strict=True)]
        return (None, *down, *total)


def _through(
    out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradient behind one step: with respect to its state, and to the parameters."""
    pairs = [(o, g) for o, g in zip(out, gradients, strict=True) if o.requires_grad and g is not None]
    wanted = [*(t for t in inputs if t.requires_grad), *parameters]
    if not pairs:
        found: list[Tensor | None] = [None] * len(wanted)
    else:
        outs, grads = zip(*pairs, strict=True)
        found = list(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
    split = len(wanted) - len(parameters)
    return (found[:split] or [None] * len(inputs)), found[split:]


def _check_repeated(
    i: int, again: Sequence[Tensor], first: Sequence[Tensor], tolerance: float | None
) -> None:
    if tolerance is None or any(t.is_meta for t in again):
        return
    for a, b in zip(again, first, strict=True):
        a = a.detach()
        if torch.equal(a, b):
            continue
        gap, scale = float((a - b).abs().max()), float(b.abs().max())
        if not gap <= tolerance * scale:
            raise RuntimeError(
                f"step {i} does not repeat itself: the second run is {gap:.3g} from the first, where values reach {scale:.3g}. "
                "Draw its noise once, outside the steps (or give a larger tolerance)"
            )


def _check_listed(out: Sequence[Tensor], listed: Sequence[Tensor]) -> None:
    """Refuse a leaf that requires a gradient and is not among ``listed``: it would get none."""
    known = {id(t) for t in listed}
    ends = {t.grad_fn for t in listed if t.grad_fn is not None}
    todo = [t.grad_fn for t in out if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node in ends:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                f"the steps read a tensor of shape {tuple(leaf.shape)} that requires a gradient and is not among the parameters: "
                "list it, or freeze it (requires_grad_(False))"
            )
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        todo.extend(new)


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on; got {steps!r}")


def _check_parameters(parameters: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> None:
    for i, p in enumerate(parameters):
        if not isinstance(p, Tensor) or not p.requires_grad:
            raise ValueError(f"parameter {i} requires no gradient: call requires_grad_() or leave it out")
        if any(p is q for q in (*parameters[:i], *state)):
            raise ValueError(f"parameter {i} is given twice: its gradient would count twice")
    if torch.is_grad_enabled() and not parameters and not any(t.requires_grad for t in state):
        raise ValueError("neither a parameter nor the state requires a gradient: use run_steps")


def _tensors(state: Any, what: str) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    parts = state if isinstance(state, tuple) else (state,)
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(
                f"{what} has to be a floating-point tensor or a flat tuple of them; got {kind} in it"
            )
    if not parts:
        raise TypeError(f"{what} is an empty tuple: give at least one tensor")
    return parts


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written into; inference tensors do not count."""
    return [0 if t.is_inference() else t._version for t in tensors]


def _signature(tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in tensors]


def _autocast_state(device: str) -> dict[str, Any]:
    """Arguments of ``torch.autocast`` that bring the present state back."""
    if not torch.amp.is_autocast_available(device):
        return {"device_type": "cpu", "enabled": False}
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "enabled": enabled, "dtype": torch.get_autocast_dtype(device)}


@dataclass
class SavedBytes:
    """Bytes kept for the backward pass: ``live`` now, ``peak`` the most so far, ``total`` all that was ever kept."""

    live: int = 0
    peak: int = 0
    total: int = 0
    _held: dict[int, list[int]] = field(default_factory=dict, repr=False)  # storage -> [times held, bytes]

    def reset(self) -> None:
        """Forget peak and total; what is live stays."""
        self.peak, self.total = self.live, 0

    def _hold(self, key: int, size: int) -> None:
        entry = self._held.setdefault(key, [0, size])
        if entry[0] == 0:
            self.live += size
            self.total += size
            self.peak = max(self.peak, self.live)
        entry[0] += 1

    def _release(self, key: int) -> None:
        entry = self._held[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.live -= entry[1]
            del self._held[key]


class _Held:
    """A tensor in the graph, counted as long as the graph holds it."""

    def __init__(self, meter: SavedBytes, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Not the address of the data, which is 0 for every tensor on the meta device.
        self.meter, self.tensor, self.key = meter, tensor, storage._cdata
        meter._hold(self.key, storage.nbytes())

    def __del__(self) -> None:
        self.meter._release(self.key)


@contextmanager
def watch_saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count the bytes that the graphs made inside the block keep, forward and backward, for as long as they keep them.

    Unlike ``profiling.saved_activation_bytes``, which looks at one forward pass, it follows what is freed: its peak is what
    decides whether a backward pass fits. Each piece of memory counts once. It works on the meta device too.

    Args:
        exclude: tensors that are there anyway, such as the parameters of the model.

    >>> x = torch.ones(10, requires_grad=True)
    >>> with watch_saved_bytes(exclude=[x]) as saved:
    ...     y = x.exp().exp()     # exp keeps its result
    ...     before = saved.live
    ...     y.sum().backward()
    >>> before, saved.live, saved.peak
    (80, 0, 80)
    """
    meter, excluded = SavedBytes(), tuple(exclude)
    known = {t.untyped_storage()._cdata for t in excluded}

    def pack(tensor: Tensor) -> Tensor | _Held:
        return tensor if tensor.untyped_storage()._cdata in known else _Held(meter, tensor)

    with saved_tensors_hooks(pack, lambda held: held.tensor if isinstance(held, _Held) else held):
        yield meter
    del excluded  # kept until here: a storage that is freed could lend its address to another
