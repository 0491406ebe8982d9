"""A router that learns which branch of which block computes at which step of a sampler.

A **router** holds a logit for each entry of a plan (see ``minilib.cache_plans``), as in Learning-to-Cache (Ma et al. 2024,
arXiv 2406.01733) and HarmoniCa (Huang et al. 2025, arXiv 2410.01723). In training, every branch computes and hands on
``r new + (1 - r) stored`` with ``r = sigmoid(logit)``. What it hands on is stored where r exceeds a threshold (0.1 in
HarmoniCa's code, ``models/router_models.py``). At inference such a branch computes, and all others are skipped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .cache_plans import Plan, keep_largest
from .intervene import named_blocks
from .intervene.names import refuse_nested
from .intervene.overrides import Layer, override_forward


@dataclass
class SoftCache:
    """The state of ``soft_cache``.

    Attributes:
        weights: of the present step, (branches,), in [0, 1]; None: the plain model, which neither reads nor writes.
        threshold: a branch's output is stored where its weight is above it.
    """

    threshold: float
    weights: Float[Tensor, " branches"] | None = None
    _stored: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def clear(self) -> None:
        """Forget what is stored: the next call stores all branches anew."""
        self._stored.clear()

    def run(self, branch: int, fresh: Tensor) -> Tensor:
        """What branch number ``branch`` hands on, given what it has just computed."""
        if self.weights is None:
            return fresh
        stored, weight = self._stored.get(branch), self.weights[branch]
        if stored is None:
            self._stored[branch] = fresh.detach()
            return fresh
        if stored.shape != fresh.shape:
            raise RuntimeError(
                f"branch {branch} gives {tuple(fresh.shape)}, {tuple(stored.shape)} is stored: clear() the cache first"
            )
        mixed = weight * fresh + (1 - weight) * stored
        if bool(weight.detach() > self.threshold):  # compared as Router.plan does
            self._stored[branch] = mixed.detach()
        return mixed


@contextmanager
def soft_cache(model: nn.Module, names: Sequence[str], *, threshold: float = 0.1) -> Iterator[SoftCache]:
    """Let the named branches hand on ``r fresh + (1 - r) stored``, differentiable in the weights r of the present step.

    What is stored is cut from the graph, so a step's loss reaches this step's weights only. As in HarmoniCa's released code
    what is stored is what was handed on, the mixture. With weights of one the outputs are those of the model, bit for bit.

    Args:
        model: any module; its own parameters should not require gradients.
        names: the branches.
        threshold: see ``SoftCache``.

    Yields:
        a ``SoftCache``: set ``weights`` before each call.

    Raises:
        ValueError: no such branch, or one inside another.
        RuntimeError: in a call, weights for another number of branches, or a stored output of another shape.

    >>> layers = nn.Sequential(nn.Identity(), nn.Identity())
    >>> with soft_cache(layers, ["0"]) as cache:
    ...     cache.weights = torch.tensor([0.25])
    ...     layers(torch.tensor([8.0])), layers(torch.tensor([0.0])), layers(torch.tensor([0.0]))
    (tensor([8.]), tensor([6.]), tensor([4.5000]))
    """
    refuse_nested(names, "mix")
    blocks = {name: named_blocks(model, name)[name] for name in names}
    place = {name: i for i, name in enumerate(names)}
    cache = SoftCache(threshold)

    def make(name: str, module: nn.Module) -> Layer:
        def layer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if cache.weights is not None and cache.weights.shape != (len(names),):
                raise RuntimeError(
                    f"weights of shape {tuple(cache.weights.shape)} given for {len(names)} branches: give one row of the router"
                )
            return cache.run(place[name], inner(*args, **kwargs))

        return layer

    with override_forward(blocks, make):
        try:
            yield cache
        finally:
            cache.clear()


class Router(nn.Module):
    """A logit for each step but the first and each branch; ``weights = sigmoid(logits)``, and the first row is one.

    Args:
        steps: of the sampler, at least 2.
        branches: as many as ``branch_names`` gives.
        start: all logits at the beginning. A positive number starts from the model that computes everything.
        threshold: weights above it compute at inference.
        limit: logits are kept within plus and minus it by ``clamp_``.

    Raises:
        ValueError: numbers out of range.

    >>> router = Router(3, 2)
    >>> router.weights().shape, router.plan().int().tolist()
    (torch.Size([3, 2]), [[1, 1], [1, 1], [1, 1]])
    """

    def __init__(
        self, steps: int, branches: int, *, start: float = 2.0, threshold: float = 0.1, limit: float = 5.0
    ) -> None:
        super().__init__()
        if steps < 2 or branches < 1 or not 0 < threshold < 1 or not abs(start) <= limit:
            raise ValueError(
                "need steps >= 2, branches >= 1, 0 < threshold < 1 and |start| <= limit; got "
                f"steps={steps}, branches={branches}, threshold={threshold}, start={start}, limit={limit}"
            )
        self.threshold, self.limit = threshold, limit
        self.logits = nn.Parameter(torch.full((steps - 1, branches), float(start)))

    def weights(self) -> Float[Tensor, "steps branches"]:
        """The soft plan; differentiable. The released code has logits of 5 in the first row, which its sampler takes for 1."""
        return torch.cat([torch.ones_like(self.logits[:1]), self.logits.sigmoid()])

    def plan(self, reused: int | None = None) -> Plan:
        """The hard plan: weights above the threshold; or, with ``reused``, the threshold that reuses just so many entries."""
        if reused is not None:
            return keep_largest(self.weights(), reused)
        return (self.weights() > self.threshold).detach().cpu()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the logits back within the limit, in place: a weight that has saturated has to stay able to move."""
        self.logits.clamp_(-self.limit, self.limit)
