"""What a model costs, counted: parameters, floating-point operations, calls, bytes kept for the backward pass, CPU time.

All but the time are exact and the same on every machine.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of values in the parameters; a parameter that is shared counts once.

    >>> count_parameters(nn.Linear(3, 4))
    16
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


class FlopCount(NamedTuple):
    """``flops`` floating-point operations; ``macs`` multiply-accumulates, half as many, which many papers call 'Gflops'."""

    flops: int
    macs: int


def count_flops(model: nn.Module, *inputs: Any, **kwargs: Any) -> FlopCount:
    """Operations of the matrix products, attentions and convolutions of one forward pass.

    The pass runs on the meta device: nothing is computed, so any size is cheap, and softmax attention is
    counted, which torch's counter leaves out on a CPU. Element-wise operations, norms and look-ups are not
    counted. Shapes that depend on values do not exist on the meta device; ``minilib.models.moe`` assumes an
    even load there, whose sum of operations is the same.

    Args:
        model: any module; it is left as it is.
        inputs: what to call it with; tensors may be on any device.
        kwargs: keyword arguments of the call.

    >>> count_flops(nn.Linear(3, 4), torch.zeros(5, 3))
    FlopCount(flops=120, macs=60)
    """
    ghost = to_meta(model)
    inputs, kwargs = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (inputs, kwargs))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(*inputs, **kwargs)
    flops = counter.get_total_flops()
    return FlopCount(flops, flops // 2)


def to_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device, without ever copying its values; ``model`` itself if it is there already."""
    if all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return model
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


@dataclass
class Calls:
    """How often a module ran, and on how many samples (the length of its first tensor argument) in sum."""

    calls: int = 0
    samples: int = 0


@contextmanager
def count_calls(module: nn.Module) -> Iterator[Calls]:
    """Count the forward passes of ``module`` inside a ``with`` block.

    >>> layer = nn.Linear(3, 4)
    >>> with count_calls(layer) as count:
    ...     y = layer(torch.zeros(5, 3))
    >>> count
    Calls(calls=1, samples=5)
    """
    count = Calls()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.ndim]
        count.calls += 1
        count.samples += len(tensors[0]) if tensors else 0

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def saved_activation_bytes(model: nn.Module, *inputs: Any, **kwargs: Any) -> int:
    """Bytes that one forward pass keeps for the backward pass, without the parameters themselves.

    Each piece of memory counts once, whole, however many operations keep it. The inputs count if they are
    kept.

    Raises:
        ValueError: nothing requires a gradient, so that nothing would be kept.

    >>> layer = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    >>> saved_activation_bytes(layer, torch.zeros(5, 3))   # the input, 15 floats, and ReLU's output, 20
    140
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs, **kwargs)
    if not any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(output)):
        raise ValueError(
            "the output does not require a gradient: unfreeze a parameter or let an input require one"
        )
    return sum(storage.nbytes() for storage in kept.values())


def cpu_time(function: Callable[[], Any], *, repeats: int = 5, warmup: int = 1) -> float:
    """Least CPU time of one call, in seconds, over ``repeats`` calls after ``warmup``.

    CPU time of the process, not wall time: another process on the machine disturbs it less. To compare two
    functions, measure them in turns; two separate measurements differ by 10 to 20 % on a busy machine.

    Raises:
        ValueError: ``repeats`` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)
