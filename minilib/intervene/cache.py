"""Feature caching: use a module's earlier output again instead of computing it.

DeepCache (Ma et al. 2024, arXiv 2312.00858), Faster Diffusion (Li et al. 2024, arXiv 2312.09608) and their
kin differ in which modules they cache and when they refresh them; both are arguments here.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .names import Names, refuse_nested, running_blocks
from .overrides import Layer, override_forward
from .values import copied, shapes

Policy = Callable[[int], bool]


def every(interval: int) -> Policy:
    """Refresh in steps 0, n, 2n, ...; ``every(1)`` never uses the cache.

    Raises:
        ValueError: ``interval`` is less than 1.

    >>> [step for step in range(7) if every(3)(step)]
    [0, 3, 6]
    """
    if interval < 1:
        raise ValueError(f"the interval must be at least 1, got {interval}")
    return lambda step: step % interval == 0


def at_steps(steps: Iterable[int]) -> Policy:
    """Refresh in these steps (0 is the first, noisiest one)."""
    chosen = frozenset(steps)
    return lambda step: step in chosen


@dataclass
class _Entry:
    output: Any
    input_shapes: list[tuple[int, ...]]


@dataclass
class FeatureCache:
    """The state of ``cached``: the caller sets ``step`` and ``key``, and reads the counters.

    Attributes:
        step: the step the policy is asked about. None (the default): every module counts its own calls under
            the present key.
        key: outputs are kept apart by key. Where the two halves of guidance are two calls, not one batch,
            give each its own key.
        computed: by module, how often it computed.
        reused: by module, how often its kept output was used.
    """

    step: int | None = None
    key: Hashable = None
    computed: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    _entries: dict[tuple[str, Hashable], _Entry] = field(default_factory=dict, repr=False)
    _calls: Counter[tuple[str, Hashable]] = field(default_factory=Counter, repr=False)
    _refreshed_in: dict[tuple[str, Hashable], int] = field(default_factory=dict, repr=False)

    def clear(self) -> None:
        """Forget all kept outputs and call counts; the counters ``computed`` and ``reused`` stay."""
        self._entries.clear()
        self._calls.clear()
        self._refreshed_in.clear()

    def run(self, name: str, policy: Policy, detach: bool, compute: Callable[[], Any], inputs: Any) -> Any:
        """One call of module ``name``: the kept output, or ``compute()``, which is then kept."""
        place = (name, self.key)
        step = self._calls[place] if self.step is None else self.step
        self._calls[place] += 1
        entry = self._entries.get(place)
        if entry is not None and not policy(step):
            if entry.input_shapes != shapes(inputs):
                raise RuntimeError(
                    f"{name!r} got {shapes(inputs)}, its output was kept for {entry.input_shapes}: refresh in "
                    "this step, or set another key for these calls"
                )
            self.reused[name] += 1
            return copied(entry.output, detach=False)
        self._refuse_second_refresh(name, place)
        output = compute()
        self.computed[name] += 1
        # Copies both ways: whatever the model writes into its own tensors, what is kept stays as it was.
        self._entries[place] = _Entry(copied(output, detach=detach), shapes(inputs))
        return output

    def _refuse_second_refresh(self, name: str, place: tuple[str, Hashable]) -> None:
        if self.step is not None:
            if self._refreshed_in.get(place) == self.step:
                raise RuntimeError(
                    f"{name!r} is to be computed twice in step {self.step} under key {self.key!r}, so one output would "
                    "overwrite the other: set a key for each half of guidance, or count the second call as a step"
                )
            self._refreshed_in[place] = self.step


@contextmanager
def cached(
    model: nn.Module, names: Names, policy: Policy | Mapping[str, Policy], *, detach: bool = False
) -> Iterator[FeatureCache]:
    """Let the named modules hand on copies of earlier outputs, except in the steps in which ``policy`` refreshes them.

    A module whose output is used again does not compute, nor does anything inside it. What is kept is never
    written into: it is copied when it is stored and when it is used. The first call always computes. With
    ``every(1)`` the model's outputs stay bit for bit the same.

    Args:
        model: any module.
        names: see ``named_blocks``; none inside another.
        policy: ``policy(step)`` says whether to compute in this step, for all modules or by exact name. See
            ``every`` and ``at_steps``.
        detach: cut what is kept from the graph. By default gradients flow through a kept output to the step
            that computed it.

    Yields:
        the ``FeatureCache``: set its ``step`` before each step of a sampler, or leave it, to count calls.

    Raises:
        ValueError: no such module, one inside another, or no policy for one of them.
        RuntimeError: in a call, a kept output belongs to inputs of another shape, or one step computes the
            same module twice under one key.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> with cached(model, "0", every(3)) as cache:
    ...     for cache.step in range(7):
    ...         y = model(torch.ones(1, 2))
    >>> cache.computed["0"], cache.reused["0"]
    (3, 4)
    """
    blocks = running_blocks(model, names)
    refuse_nested(blocks, "cache")
    policies = policy if isinstance(policy, Mapping) else dict.fromkeys(blocks, policy)
    if set(policies) != set(blocks):
        raise ValueError(
            f"policies for {sorted(policies)}, modules {sorted(blocks)}: give one policy for each"
        )
    cache = FeatureCache()

    def make(name: str, module: nn.Module) -> Layer:
        def layer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return cache.run(name, policies[name], detach, lambda: inner(*args, **kwargs), (args, kwargs))

        return layer

    with override_forward(blocks, make):
        try:
            yield cache
        finally:
            cache.clear()
