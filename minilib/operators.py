"""Where the time and the arithmetic of a model go, by kind of operator; and how long the sequences of its attention are.

A model is a sequence of calls of torch's functions. ``OperatorTrace`` stands between the model and these functions and sorts
the calls into attention, convolution, linear and norm; what is left over is "other". So it is the same for every model,
whether it calls modules or functions, and a softmax attention is one call whatever kernel computes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from .costs import register_cpu_attention_flops
from .profiling import to_meta

#: The kinds, in the order in which tables and figures show them.
KINDS = ("attention", "convolution", "linear", "norm", "other")

_KIND_OF: dict[Callable[..., Any], str] = {
    F.scaled_dot_product_attention: "attention",
    F.linear: "linear",
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d), "convolution"),
    **dict.fromkeys(
        (F.layer_norm, F.group_norm, torch.group_norm, F.rms_norm, F.batch_norm, F.instance_norm), "norm"
    ),
}


class OperatorCall(NamedTuple):
    """One call of a named kind.

    ``bytes`` is what the call takes in and gives out, each tensor once: the least that has to move. ``queries`` and
    ``keys`` are the sequence lengths of an attention, else 0; ``flops`` is 0 unless it was asked for.
    """

    kind: str
    seconds: float
    flops: int
    bytes: int
    queries: int = 0
    keys: int = 0


class OperatorTrace(TorchFunctionMode):
    """Records the operator calls of a ``with`` block: kind, time, FLOPs, bytes, lengths.

    Only calls through ``torch.nn.functional`` (and the modules that use it) have a kind. Attention written out as matrix
    products is "other", and so are copies, activations and sums. The backward pass is not seen.

    Args:
        flops: count FLOPs as well (2 a multiply-add; matrix products, attention and convolutions). Counting takes time
            itself: use the times of a trace without it.

    >>> layer, norm = nn.Linear(3, 4), nn.LayerNorm(4)
    >>> with OperatorTrace(flops=True) as trace:
    ...     y = norm(layer(torch.zeros(5, 3)))
    >>> [(call.kind, call.flops) for call in trace.calls]
    [('linear', 120), ('norm', 0)]
    >>> trace.flops["linear"], trace.flops["other"]
    (120, 0)
    """

    def __init__(self, *, flops: bool = False) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []
        self.total_seconds, self.total_flops = 0.0, 0
        self._counter = FlopCounterMode(display=False) if flops else None
        self._cuda, self._start = False, 0.0
        if flops:
            register_cpu_attention_flops()

    def __enter__(self) -> OperatorTrace:
        """Begin; a trace may be entered several times, and adds up."""
        if self._counter is not None:
            self._counter.__enter__()
        super().__enter__()
        self._start = self._now()
        return self

    def __exit__(self, *error: Any) -> None:
        """End, and keep the whole time of the block."""
        self.total_seconds += self._now() - self._start
        super().__exit__(*error)
        if self._counter is not None:
            self._counter.__exit__(*error)
            self.total_flops += self._counter.get_total_flops()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call ``func``; if it has a kind, measure it."""
        kwargs = kwargs or {}
        kind = _KIND_OF.get(func)
        if kind is None:
            return func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._cuda = tensors[0].is_cuda
        before = self._counter.get_total_flops() if self._counter is not None else 0
        start = self._now()
        out = func(*args, **kwargs)
        seconds = self._now() - start
        flops = self._counter.get_total_flops() - before if self._counter is not None else 0
        moved = sum(tensor.nbytes for tensor in (*tensors, out))
        lengths = (args[0].shape[-2], args[1].shape[-2]) if kind == "attention" else ()
        self.calls.append(OperatorCall(kind, seconds, flops, moved, *lengths))
        return out

    @property
    def seconds(self) -> dict[str, float]:
        """CPU seconds by kind (wall seconds on a GPU, which is waited for); they add up to ``total_seconds``."""
        return self._sums("seconds", self.total_seconds)

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs by kind; they add up to ``total_flops``."""
        return self._sums("flops", self.total_flops)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(queries, keys) of every attention call, in order."""
        return [(call.queries, call.keys) for call in self.calls if call.kind == "attention"]

    def _sums(self, field: str, total: float) -> dict[str, Any]:
        sums = {kind: sum(getattr(c, field) for c in self.calls if c.kind == kind) for kind in KINDS}
        sums["other"] = total - sum(sums.values())
        return sums

    def _now(self) -> float:
        if not self._cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def shares(by_kind: Mapping[str, float]) -> dict[str, float]:
    """Each kind's part of the sum.

    Raises:
        ValueError: the sum is not positive.

    >>> shares({"linear": 3, "other": 1})
    {'linear': 0.75, 'other': 0.25}
    """
    total = sum(by_kind.values())
    if not total > 0:
        raise ValueError(f"the kinds sum to {total}: nothing was measured")
    return {kind: value / total for kind, value in by_kind.items()}


def count_operators(model: nn.Module, *inputs: Any, **kwargs: Any) -> OperatorTrace:
    """One forward pass on the meta device: FLOPs, bytes and sequence lengths at any size, nothing computed.

    Args:
        model: any module; it is left as it is.
        inputs: what to call it with; tensors may be on any device.
        kwargs: keyword arguments of the call.

    Returns:
        a trace whose ``flops``, ``calls`` and ``lengths`` are exact; its times mean nothing.

    >>> from minilib.attention import Attention
    >>> trace = count_operators(Attention(8, 2), torch.zeros(1, 6, 8))
    >>> trace.flops["attention"], trace.lengths
    (1152, [(6, 6)])
    """
    ghost = to_meta(model)
    inputs, kwargs = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (inputs, kwargs))
    with torch.no_grad(), OperatorTrace(flops=True) as trace:
        ghost(*inputs, **kwargs)
    return trace


def time_operators(functions: Iterable[Callable[[], Any]], *, repeats: int = 3) -> list[list[OperatorTrace]]:
    """Trace each function ``repeats`` times, in turns and in alternating order, after one warm-up each.

    Returns:
        for each function its traces, turn by turn: the traces of one turn are a pair, measured one after the other.

    Raises:
        ValueError: ``repeats`` is less than 1.
    """
    functions = list(functions)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for function in functions:
        function()
    traces: list[list[OperatorTrace]] = [[] for _ in functions]
    for turn in range(repeats):
        order = range(len(functions))
        for i in order if turn % 2 == 0 else reversed(order):
            with OperatorTrace() as trace:
                functions[i]()
            traces[i].append(trace)
    return traces
