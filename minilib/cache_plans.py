"""Which branch of which block computes at which step of a sampler: plans, what a plan costs, and a model that follows one.

A transformer block adds two *branches* to its tokens, attention and the feed-forward network. A **plan** is a boolean matrix,
one row a step (row 0 is the noisiest) and one column a branch: True computes and stores, False hands on what was stored last.
FORA (Selvaraju et al. 2024, arXiv 2407.01425) refreshes all branches every few steps; Learning-to-Cache (Ma et al. 2024,
arXiv 2406.01733) and HarmoniCa (Huang et al. 2025, arXiv 2410.01723) learn the matrix: see ``minilib.cache_router``.

What is stored is the branch's own output. In a DiT the gate and the residual sum come after it, so they always belong to the
present step. All of this acts on the model by name, inside a ``with`` block, through ``minilib.intervene``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .caching import uniform_refreshes
from .intervene import FeatureCache, cached, named_blocks
from .profiling import to_meta

Plan = Bool[Tensor, "steps branches"]


def branch_names(
    model: nn.Module, kinds: Sequence[str] = ("attn", "mlp"), *, blocks: str = "blocks"
) -> tuple[str, ...]:
    """The branches in the order in which they run: ``blocks.0.attn``, ``blocks.0.mlp``, ``blocks.1.attn``, ...

    Raises:
        ValueError: there is no such list of blocks, it is empty, or a block lacks one of the ``kinds``.

    >>> from minilib.models import DiT
    >>> branch_names(DiT(hidden_size=32, depth=2))
    ('blocks.0.attn', 'blocks.0.mlp', 'blocks.1.attn', 'blocks.1.mlp')
    """
    found = named_blocks(model, blocks)[blocks]
    if not isinstance(found, nn.ModuleList) or not len(found) or not kinds:
        raise ValueError(
            f"need a list of blocks and at least one kind of branch; {blocks!r} is a {type(found).__name__}, kinds are "
            f"{tuple(kinds)}"
        )
    names = [f"{blocks}.{i}.{kind}" for i in range(len(found)) for kind in kinds]
    return tuple(name for one in names for name in named_blocks(model, one))


# --- plans ---------------------------------------------------------------------------------------------------------------


def key_step_plan(steps: int, branches: int, keys: Iterable[int]) -> Plan:
    """All branches compute in the steps ``keys``, none in the others.

    Raises:
        ValueError: a key outside the steps, or step 0 is not among them.

    >>> key_step_plan(4, 2, (0, 3)).int().tolist()
    [[1, 1], [0, 0], [0, 0], [1, 1]]
    """
    keys = set(keys)
    if steps < 1 or branches < 1 or not keys <= set(range(steps)):
        raise ValueError(
            f"keys must be steps from 0 to {steps - 1} of at least one branch; got {sorted(keys)}"
        )
    plan = torch.zeros(steps, branches, dtype=torch.bool)
    plan[sorted(keys)] = True
    return checked_plan(plan)


def interval_plan(steps: int, branches: int, interval: int) -> Plan:
    """All branches compute in steps 0, n, 2n, ... (FORA); ``interval`` 1 caches nothing.

    Raises:
        ValueError: a number below 1.

    >>> interval_plan(5, 1, 2).int().flatten().tolist()
    [1, 0, 1, 0, 1]
    """
    return key_step_plan(steps, branches, uniform_refreshes(steps, interval))


def keep_largest(scores: Float[Tensor, "steps branches"], reused: int) -> Plan:
    """The plan that reuses the ``reused`` entries of the smallest score; row 0 always computes, whatever its scores.

    Of equal scores the one that comes first, in the order of running, is reused first.

    Raises:
        ValueError: more to reuse than the rows after the first hold, or less than none.

    >>> keep_largest(torch.tensor([[0.0, 0.0], [0.3, 0.2], [0.1, 0.9]]), 2).int().tolist()
    [[1, 1], [1, 0], [0, 1]]
    """
    steps, branches = scores.shape
    if not 0 <= reused <= (steps - 1) * branches:
        raise ValueError(
            f"{reused} entries to reuse: a plan of {steps} steps and {branches} branches can reuse 0 to "
            f"{(steps - 1) * branches}, since the first step computes"
        )
    plan = torch.ones(steps * branches, dtype=torch.bool)
    order = scores[1:].detach().flatten().cpu().argsort(stable=True)
    plan[branches + order[:reused]] = False
    return plan.reshape(steps, branches)


def random_plan(steps: int, branches: int, reused: int, generator: torch.Generator) -> Plan:
    """A plan that reuses exactly ``reused`` entries, drawn at random from all rows but the first.

    Raises:
        ValueError: as ``keep_largest``.
    """
    return keep_largest(torch.rand(steps, branches, generator=generator), reused)


def checked_plan(plan: Tensor) -> Plan:
    """``plan`` itself if it is boolean, has two axes, and computes all branches in step 0.

    Raises:
        ValueError: it is not so; nothing is stored before step 0, so nothing can be used again there.
    """
    if plan.dtype != torch.bool or plan.ndim != 2 or 0 in plan.shape:
        raise ValueError(
            f"a plan is a boolean matrix (steps, branches); got {plan.dtype} of shape {tuple(plan.shape)}"
        )
    if not bool(plan[0].all()):
        late = (~plan[0]).nonzero().flatten().tolist()
        raise ValueError(f"step 0 has nothing to use again, so all branches must compute; {late} do not")
    return plan


def cache_utilisation(plan: Plan) -> float:
    """The cache utilisation ratio (CUR): reused entries over all entries of the plan, the first row included.

    >>> cache_utilisation(interval_plan(4, 2, 2))
    0.5
    """
    return 1 - float(plan.double().mean())


class BranchMacs(NamedTuple):
    """Multiply-accumulates of one call: of each branch, and of all that always runs."""

    branches: tuple[int, ...]
    rest: int

    def of(self, plan: Plan) -> int:
        """Of a whole sampler that follows ``plan``: every step pays the rest, an entry pays only if it computes.

        >>> BranchMacs((10, 30), 5).of(torch.tensor([[True, True], [True, False]]))
        60
        """
        if plan.shape[1] != len(self.branches):
            raise ValueError(f"the plan has {plan.shape[1]} branches, {len(self.branches)} are known")
        computed = plan.sum(0).tolist()
        return len(plan) * self.rest + sum(n * c for n, c in zip(computed, self.branches, strict=True))

    def speed_up(self, plan: Plan) -> float:
        """How many times fewer operations than without a cache, at as many steps."""
        return self.of(torch.ones_like(plan)) / self.of(plan)


def branch_macs(model: nn.Module, names: Sequence[str], *inputs: Any) -> BranchMacs:
    """Count one call of ``model`` on the meta device, branch by branch.

    Raises:
        ValueError: no such branch.
    """
    named_blocks(model, list(names))
    ghost = to_meta(model)
    ghosts = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(*ghosts)
    counts = {where: sum(of.values()) for where, of in counter.get_flop_counts().items()}
    root = type(model).__name__
    branches = tuple(counts.get(f"{root}.{name}", 0) // 2 for name in names)
    return BranchMacs(branches, counter.get_total_flops() // 2 - sum(branches))


# --- at inference: a branch computes or does not -------------------------------------------------------------------------


@contextmanager
def follow_plan(model: nn.Module, names: Sequence[str], plan: Plan) -> Iterator[FeatureCache]:
    """Let the named branches compute and reuse as ``plan`` says; a branch that is reused executes nothing.

    Each call of the model is one step of the sampler, counted from 0 (or set ``cache.step``). After the last step call
    ``cache.clear()`` to begin again. Where guidance is two calls, not one batch, set ``cache.key`` for each half.

    Args:
        model: any module.
        names: one branch for each column, as ``branch_names`` gives them.
        plan: which compute, at which step; the first row computes all.

    Yields:
        the ``FeatureCache`` of ``minilib.intervene``: its counters say what computed and what was reused.

    Raises:
        ValueError: no such branch, one inside another, another number of branches than columns, or a plan that is refused.
        RuntimeError: in a call, the plan has no such step.
    """
    checked_plan(plan)
    if len(names) != plan.shape[1]:
        raise ValueError(f"{len(names)} branches are named, the plan has {plan.shape[1]} columns")
    named_blocks(model, list(names))
    rows = plan.cpu().tolist()

    def policy(column: int) -> Callable[[int], bool]:
        def computes(step: int) -> bool:
            if not 0 <= step < len(rows):
                raise RuntimeError(
                    f"the plan has {len(rows)} steps, this is call {step} (from 0): call clear() on the cache before another "
                    "sample, or set its key for the second call of a step"
                )
            return rows[step][column]

        return computes

    with cached(model, list(names), {name: policy(i) for i, name in enumerate(names)}) as cache:
        yield cache
