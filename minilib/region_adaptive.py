"""Sample some regions of an image more often than others (region-adaptive sampling, RAS).

Liu et al. 2025, arXiv 2502.10389; ``microsoft/RAS``. The sampler is Euler's method on the straight path of flow matching. In
its *dense* steps every token goes through the network. In the others, the *sparse* ones, only some do: they get a new velocity,
and every other token moves on with the velocity that it last got. Which ones is read off what the network said before.

A state is a sequence of tokens (b, n, f): a patch of the image each, flattened in the order (row, column, channel). The network
is a function ``run(x, sigma, indices)``: the velocities of the tokens at ``indices``, (b, k, f), or of all of them if that is
None. How it lets a few tokens see the others is its own matter: ``minilib.region_mmdit`` has one for ``minilib.models.MMDiT``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minilib.kernels.tokens import scatter_tokens

RunTokens = Callable[[Tensor, float, Tensor | None], Tensor]


class FocusState(NamedTuple):
    """What is known before a sparse step: all that a metric may look at.

    ``index`` counts steps from 0, ``sigma`` is the noise level. Tokens ``x`` (b, n, f) and ``velocity``, what each last got.
    ``change`` (b, n): by how much the velocity changed when it was last renewed, per unit of sigma (mean over the pixels of the
    norm over the channels). ``drops`` (b, n): in how many steps a token was left out. ``channels`` of a pixel.
    """

    index: int
    sigma: float
    x: Tensor
    velocity: Tensor
    change: Tensor
    drops: Tensor
    channels: int


Metric = Callable[[FocusState], Tensor]


def pixel_std(velocity: Float[Tensor, "b n f"], channels: int) -> Float[Tensor, "b n"]:
    """Standard deviation over the channels of a pixel, mean over the pixels of a token: the released metric "std".

    >>> pixel_std(torch.tensor([[[0.0, 2.0, 3.0, 3.0]]]), channels=2)
    tensor([[0.7071]])
    """
    return _pixels(velocity, channels).std(-1).mean(-1)


def pixel_norm(velocity: Float[Tensor, "b n f"], channels: int) -> Float[Tensor, "b n"]:
    """Euclidean norm over the channels of a pixel, mean over the pixels of a token: the released metric "l2norm".

    >>> pixel_norm(torch.tensor([[[3.0, 4.0, 0.0, 1.0]]]), channels=2)
    tensor([[3.]])
    """
    return _pixels(velocity, channels).norm(dim=-1).mean(-1)


def _pixels(velocity: Tensor, channels: int) -> Tensor:
    if channels < 1 or velocity.shape[-1] % channels:
        raise ValueError(f"tokens of {velocity.shape[-1]} values do not hold pixels of {channels} channels")
    return rearrange(velocity, "b n (p c) -> b n p c", c=channels)


#: Metrics by name. "change" is not in the released code.
METRICS: dict[str, Metric] = {
    "std": lambda state: pixel_std(state.velocity, state.channels),
    "norm": lambda state: pixel_norm(state.velocity, state.channels),
    "change": lambda state: state.change,
}


def random_metric(generator: torch.Generator, spread: float = 1.0) -> Metric:
    """A metric that knows nothing: uniform between ``1 - spread`` and 1.

    With a small ``spread`` and the starvation guard on, chance only breaks ties: the tokens take turns.

    Raises:
        ValueError: ``spread`` outside (0, 1].
    """
    if not 0 < spread <= 1:
        raise ValueError(f"spread must lie in (0, 1]; got {spread}")

    def metric(state: FocusState) -> Tensor:
        drawn = torch.rand(state.drops.shape, generator=generator, device=generator.device)
        return (1 - spread * drawn).to(state.x.device)

    return metric


def select_tokens(
    metric: Float[Tensor, "b n"],
    drops: Int[Tensor, "b n"],
    active: int,
    *,
    starvation: float = 0.0,
    high_share: float = 0.0,
) -> Int[Tensor, "b k"]:
    """Which tokens run in the next step, ascending: each sample has its own.

    Tokens are ranked by ``metric * exp(starvation * drops)``. Of those that are left out, a share ``1 - high_share`` comes from
    the low end of the ranking, the rest from the high end. So 0 runs the highest; 1 the lowest, which is the released default.

    Args:
        metric: what the network's focus is read off; not negative.
        drops: how often each token was left out.
        active: how many tokens run, 1 to n.
        starvation: k of the guard; a token that was left out ranks higher. That brings it back only if high ones run.
        high_share: the released ``high_ratio``. (There both ends are rounded down, so that up to one token more runs.)

    Raises:
        ValueError: ``active`` outside 1..n, ``starvation`` below 0, ``high_share`` outside [0, 1].

    >>> select_tokens(torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([[0, 2, 0]]), 1)
    tensor([[0]])
    >>> select_tokens(torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([[0, 2, 0]]), 1, starvation=1.0)
    tensor([[1]])
    """
    n = metric.shape[1]
    if not 1 <= active <= n:
        raise ValueError(f"{active} active tokens asked for: choose 1 to {n}")
    if starvation < 0 or not 0 <= high_share <= 1:
        raise ValueError(
            f"starvation must be at least 0 and high_share in [0, 1]; got {starvation} and {high_share}"
        )
    order = (metric * torch.exp(starvation * drops)).argsort(dim=1, stable=True)
    low = int((n - active) * (1 - high_share) + 1e-9)
    return order[:, low : low + active].sort(dim=1).values


def linear_ratios(steps: int, first: float, last: float) -> tuple[float, ...]:
    """A ratio for each step, on a line from ``first`` to ``last``.

    >>> linear_ratios(3, 0.75, 0.25)
    (0.75, 0.5, 0.25)
    """
    if steps < 2:
        raise ValueError(f"a line needs at least 2 steps; got {steps}")
    return tuple(first + (last - first) * i / (steps - 1) for i in range(steps))


class RegionStep(NamedTuple):
    """The state after one step.

    ``x`` (b, n, f) are the new tokens, ``velocity`` what moved each of them, ``ran`` (b, n) which ones went through the network,
    ``updates`` (b, n) in how many steps so far each did, ``metric`` (b, n) what the choice was made by; None in a dense step.
    """

    index: int
    sigma: float
    x: Tensor
    velocity: Tensor
    ran: Tensor
    updates: Tensor
    metric: Tensor | None


@dataclass(frozen=True)
class RegionAdaptiveEuler:
    """Euler's method whose sparse steps renew the velocities of some tokens only.

    Args:
        ratio: share of the tokens that run in a sparse step; or one share a step of the sampler, of which those of dense steps
            are not used.
        start: the first sparse step; all before are dense. The released scripts have 4.
        resets: further dense steps, which renew everything and so clear what errors have gathered.
        metric: name in ``METRICS``, or a function of a :class:`FocusState`.
        starvation: k of the guard, see :func:`select_tokens`.
        high_share: which end of the ranking is left out, see :func:`select_tokens`.
        forget: a dense step sets the counts of the guard to zero. Not so in the released code.

    Raises:
        ValueError: an option out of range, or an unknown metric.

    >>> sampler = RegionAdaptiveEuler(ratio=0.25, start=2, resets=(4,))
    >>> sampler.active(6, tokens=8)
    (8, 8, 2, 2, 8, 2)
    """

    ratio: float | tuple[float, ...] = 0.5
    start: int = 4
    resets: tuple[int, ...] = (12, 20)
    metric: str | Metric = "std"
    starvation: float = 0.1
    high_share: float = 0.0
    forget: bool = False

    def __post_init__(self) -> None:
        ratios = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)
        if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
            raise ValueError(f"ratios must lie in (0, 1]; got {self.ratio}")
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise ValueError(
                f"unknown metric {self.metric!r}: choose one of {', '.join(METRICS)}, or give a function"
            )
        least = 2 if self.metric == "change" else 1
        if self.start < least:
            raise ValueError(
                f"start must be at least {least}, there is nothing to choose by before; got {self.start}"
            )

    def active(self, steps: int, tokens: int) -> tuple[int, ...]:
        """How many of the tokens run in each of the steps. What is left out is rounded down.

        Raises:
            ValueError: a reset that is no step, ratios for another number of steps, or no token in a step.
        """
        ratios = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,) * steps
        outside = [step for step in self.resets if not 0 <= step < steps]
        if len(ratios) != steps or outside:
            raise ValueError(
                f"the sampler has {steps} steps: {len(ratios)} ratios and resets {self.resets} do not fit"
            )
        counts = tuple(
            tokens if step < self.start or step in self.resets else tokens - int((1 - ratio) * tokens + 1e-9)
            for step, ratio in enumerate(ratios)
        )
        if min(counts) < 1:
            raise ValueError(f"ratio {self.ratio} leaves no token of {tokens} in a step: raise it")
        return counts

    def share(self, steps: int, tokens: int) -> float:
        """Token updates over those of dense sampling: the cost, if a token always cost the same."""
        return sum(self.active(steps, tokens)) / (steps * tokens)

    def sample(
        self,
        run: RunTokens,
        x: Float[Tensor, "b n f"],
        sigmas: Float[Tensor, " levels"],
        *,
        channels: int = 1,
    ) -> Iterator[RegionStep]:
        """Go from noise to an image, a step at a time; without gradients.

        Args:
            run: the network, see the head of this module. In the first step it is asked for all tokens.
            x: unit Gaussian noise, as tokens.
            sigmas: falling noise levels from 1 to 0; one more than steps (``scheduler.sigmas``).
            channels: of a pixel: the metrics look at pixels.

        Raises:
            ValueError: levels that do not fall, or options that do not fit the number of steps.
        """
        levels = sigmas.tolist()
        if len(levels) < 2 or any(after >= before for before, after in zip(levels, levels[1:], strict=False)):
            raise ValueError(f"sigmas must fall from step to step; got {levels}")
        (b, n), steps = x.shape[:2], len(levels) - 1
        metric = METRICS[self.metric] if isinstance(self.metric, str) else self.metric
        velocity, change = torch.zeros_like(x), x.new_zeros(b, n)
        drops = torch.zeros(b, n, dtype=torch.long, device=x.device)
        renewed = x.new_full((b, n), math.inf)  # the level at which each token last ran
        updates = torch.zeros_like(drops)
        for i, active in enumerate(self.active(steps, n)):
            with torch.no_grad():
                sigma, indices, focus = levels[i], None, None
                ran = torch.ones(b, n, dtype=torch.bool, device=x.device)
                if active < n:
                    focus = metric(FocusState(i, sigma, x, velocity, change, drops, channels))
                    indices = select_tokens(
                        focus, drops, active, starvation=self.starvation, high_share=self.high_share
                    )
                    ran = torch.zeros_like(ran).scatter_(1, indices, True)
                elif self.forget:
                    drops = torch.zeros_like(drops)
                new = run(x, sigma, indices)
                fresh = new if indices is None else scatter_tokens(velocity, new, indices)
                if i:  # a token that did not run keeps its old rate
                    rate = pixel_norm(fresh - velocity, channels) / (renewed - sigma)
                    change = torch.where(ran, rate, change)
                velocity, renewed = fresh, torch.where(ran, sigma, renewed)
                drops, updates = drops + (~ran).long(), updates + ran.long()
                x = x + (levels[i + 1] - sigma) * velocity
            yield RegionStep(i, sigma, x, velocity, ran, updates, focus)


def rank_correlation(a: Float[Tensor, "*b n"], b: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Spearman's correlation along the last axis: 1 if both order the tokens alike, 0 if unrelated. Ties count as ordered.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3]))
    tensor(1.)
    """
    ranks = [v.argsort(-1).argsort(-1).double() for v in (a, b)]
    centred = [F.normalize(rank - rank.mean(-1, keepdim=True), dim=-1) for rank in ranks]
    return (centred[0] * centred[1]).sum(-1).to(a.dtype)


def update_map(
    updates: Int[Tensor, "b n"] | Bool[Tensor, "b n"], height: int, width: int
) -> Float[Tensor, "b height width"]:
    """A number for each token, laid out on the canvas of ``height`` x ``width`` patches."""
    return rearrange(updates.float(), "b (h w) -> b h w", h=height, w=width)
