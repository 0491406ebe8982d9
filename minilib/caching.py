"""Plans for caching features across the steps of a sampler: when to refresh, what it costs, how much there is to gain.

What is cached, and how, is a matter of each method (DeepCache, Ma et al. 2024, arXiv 2312.00858; Faster Diffusion, Li et al.
2024, arXiv 2312.09608; and their kin). The questions here are common to all of them. A *refresh* is a step in which
everything is computed; steps count from 0, the noisiest one. For ``minilib.intervene.cached`` a plan becomes a policy with
``at_steps(plan)``.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def uniform_refreshes(steps: int, interval: int) -> tuple[int, ...]:
    """Refresh in steps 0, n, 2n, ...: ``ceil(steps / interval)`` of them.

    Raises:
        ValueError: ``steps`` or ``interval`` below 1.

    >>> uniform_refreshes(10, 3)
    (0, 3, 6, 9)
    """
    if steps < 1 or interval < 1:
        raise ValueError(f"steps and interval must be at least 1; got {steps} and {interval}")
    return tuple(range(0, steps, interval))


def power_centred_refreshes(
    steps: int, refreshes: int, centre: int, power: float = 1.2, *, root: str = "signed"
) -> tuple[int, ...]:
    """Refreshes that lie closest together around step ``centre`` (DeepCache's non-uniform 1:N plan).

    Points are spread evenly over ``u`` from ``(-centre)^(1/power)`` to ``(steps - centre)^(1/power)``, and step
    ``centre + u^power``, cut to an integer, is refreshed: the larger ``power``, the denser the middle. Step 0 is
    always refreshed. If two points fall into one step, ``power`` is lowered by 0.02 until none do, as in the released code.

    Args:
        steps: of the sampler.
        refreshes: how many; at least 1.
        centre: where they are densest; 0 to ``steps - 1``.
        power: above 1.
        root: how the power of a negative number is meant. "signed": ``sign(u) |u|^p``. "principal": the complex
            principal value, of which the real part is used. The released code does the latter, by numpy's cast from
            complex to integer (``DeepCache/sd/pipeline_stable_diffusion.py``, ``sample_from_quad_center``); its plans
            are nearer to uniform.

    Raises:
        ValueError: numbers out of range, an unknown ``root``, or no power above 1 that gives so many refreshes.

    >>> power_centred_refreshes(50, 10, centre=15, power=1.4)
    (0, 6, 11, 14, 15, 19, 24, 29, 35, 42)
    """
    if not 1 <= refreshes <= steps or not 0 <= centre < steps:
        raise ValueError(
            f"need 1 <= refreshes <= steps and 0 <= centre < steps; got steps={steps}, refreshes={refreshes}, centre={centre}"
        )
    if root not in ("signed", "principal"):
        raise ValueError(f"unknown root {root!r}: choose 'signed' or 'principal'")
    given = power
    while power > 1:
        ends = _power(np.array([-centre, steps - centre]), 1 / power, root)
        points = _power(np.linspace(ends[0], ends[1], refreshes + 1), power, root).real
        plan = (0, *(int(p) + centre for p in np.unique(np.trunc(points))[1:-1]))
        if len(plan) == refreshes == len(set(plan)):
            return plan
        power -= 0.02
    raise ValueError(
        f"no power between 1 and {given} spreads {refreshes} refreshes over {steps} steps around {centre}: ask for fewer, or "
        "use uniform_refreshes"
    )


def _power(u: np.ndarray, exponent: float, root: str) -> np.ndarray:
    if root == "signed":
        return np.sign(u) * np.abs(u) ** exponent
    return u.astype(complex) ** exponent


def plan_cost(steps: int, refreshes: tuple[int, ...], full: float, cached: float) -> float:
    """Cost of a sampler that makes full calls in the refreshes and cached calls in all other steps, in the unit of the two.

    Raises:
        ValueError: a refresh outside the steps, or one twice.

    >>> plan_cost(10, (0, 5), full=100, cached=10)
    280
    """
    if len(set(refreshes)) != len(refreshes) or not all(0 <= step < steps for step in refreshes):
        raise ValueError(f"refreshes must be different steps from 0 to {steps - 1}; got {refreshes}")
    return len(refreshes) * full + (steps - len(refreshes)) * cached


def equal_cost_steps(cost: float, step: float) -> int:
    """The fewest steps of ``step`` each that cost at least ``cost``: the rival that simply takes fewer steps.

    Rounding is in the rival's favour: it may cost up to one step more, never less.

    >>> equal_cost_steps(280, 100), equal_cost_steps(300, 100)
    (3, 3)
    """
    if cost <= 0 or step <= 0:
        raise ValueError(f"costs must be positive; got {cost} and {step}")
    return math.ceil(cost / step - 1e-9)


def cosine_between_steps(features: Float[Tensor, "steps n ..."]) -> Float[Tensor, "steps steps"]:
    """Cosine similarity of each sample's features at two steps, mean over samples.

    Near 1 says little alone, since features of *different* samples may be alike too: see ``cosine_between_samples``.

    >>> cosine_between_steps(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    unit = F.normalize(features.flatten(2), dim=2)
    return torch.einsum("s n d, r n d -> s r", unit, unit) / unit.shape[1]


def cosine_between_samples(features: Float[Tensor, "steps n ..."]) -> Float[Tensor, " steps"]:
    """Mean cosine similarity of the features of two different samples at the same step: the floor of the above.

    Raises:
        ValueError: fewer than two samples.

    >>> cosine_between_samples(torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [3.0, 0.0]]]))
    tensor([0., 1.])
    """
    n = features.shape[1]
    if n < 2:
        raise ValueError(f"need at least two samples to compare; got {n}")
    unit = F.normalize(features.flatten(2), dim=2)
    return (unit.sum(1).square().sum(1) - n) / (n * (n - 1))
