"""Classifier-free guidance: extrapolate from the unconditional to the conditional prediction.

``prediction = uncond + guidance_scale (cond - uncond)`` (Ho and Salimans, 2022, arXiv 2207.12598, eq. 6 with ``w + 1`` written as
``guidance_scale``): 1 is the plain conditional model, 0 the unconditional one. Guidance can be limited to an interval of noise
levels (Kynkäänniemi et al., 2024, arXiv 2404.07724): outside it the conditional model runs alone, at half the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

#: Embeddings: one tensor, which the model takes as ``cond``, or several by the names of the model's arguments (text states).
Condition = Float[Tensor, "b d"] | Mapping[str, Tensor]


def conditional(
    model: nn.Module, y: Int[Tensor, "b ..."] | None = None, *, cond: Condition | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Bind a condition: class ids or token rows ``y``, or embeddings ``cond``. Returns ``model(x, t)``."""
    _one_of(y, cond)
    return lambda x, t: _call(model, x, t, y, cond)


def classifier_free_guidance(
    model: nn.Module,
    y: Int[Tensor, "b ..."] | None = None,
    null: Int[Tensor, "b ..."] | Condition | int | None = None,
    *,
    cond: Condition | None = None,
    guidance_scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1000.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """A guided model, to be handed to :func:`minilib.sampling.sample`.

    Args:
        model: ``model(x, t, y, cond=...)``; both predictions come from one call with a doubled batch.
        y: class ids ``(b,)`` or token rows ``(b, l)``; or
        cond: condition embeddings ``(b, d)``, or a mapping of keyword arguments of the model, such as the states of a text
            (``model.encode_text(tokens)._asdict()``), which are then computed once and not at each step.
        null: the condition to move away from: a class id (one or ``(b,)``) or token rows with ``y``, embeddings with ``cond``, in
            the form of ``cond``. A class id defaults to the model's ``num_classes``. Another class is a *negative* condition.
        guidance_scale: 1 runs the conditional model alone.
        interval: guide only where ``interval[0] <= t <= interval[1]``, t on the 0..1000 scale.

    Raises:
        ValueError: neither or both of ``y`` and ``cond``; no ``null`` for embeddings; an empty interval.

    A learned-variance half of the output is guided like the mean half is not: it is taken from the conditional prediction, as
    a variance has no business being extrapolated.
    """
    _one_of(y, cond)
    low, high = interval
    if low > high:
        raise ValueError(f"guidance interval is empty: {interval}; expected (low, high) with low <= high")
    positive = y if cond is None else cond
    negative = _negative(model, positive, null)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if guidance_scale == 1.0 or not low <= float(t.reshape(-1)[0]) <= high:
            return _call(model, x, t, y, cond)
        both = _join(positive, negative)
        twice = torch.cat([x, x]), torch.cat([t, t])
        out = _call(model, *twice, both if cond is None else None, None if cond is None else both)
        conditional_half, unconditional_half = out.chunk(2)
        mean = unconditional_half + guidance_scale * (conditional_half - unconditional_half)
        c = x.shape[1]
        return mean if out.shape[1] == c else torch.cat([mean[:, :c], conditional_half[:, c:]], dim=1)

    return guided


def _one_of(y: Tensor | None, cond: Condition | None) -> None:
    if (y is None) == (cond is None):
        raise ValueError("give exactly one of y (class ids) and cond (embeddings)")


def _call(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, cond: Condition | None) -> Tensor:
    if cond is None:
        return model(x, t, y)
    return model(x, t, **cond) if isinstance(cond, Mapping) else model(x, t, None, cond=cond)


def _join(a: Tensor | Mapping[str, Tensor], b: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """Both conditions as one batch."""
    if isinstance(a, Mapping):
        return {name: torch.cat([a[name], b[name]]) for name in a}
    return torch.cat([a, b])


def _negative(
    model: nn.Module, positive: Tensor | Mapping[str, Tensor], null: Condition | Tensor | int | None
) -> Tensor | Mapping[str, Tensor]:
    """The null condition in the same form and shape as the positive one."""
    if isinstance(positive, Mapping):
        if not isinstance(null, Mapping) or set(null) != set(positive):
            raise ValueError(
                f"guidance with a mapping needs null with the same keys: {', '.join(sorted(positive))}"
            )
        return {name: value.expand_as(positive[name]) for name, value in null.items()}
    if positive.is_floating_point():
        if null is None or isinstance(null, int):
            raise ValueError("guidance with embeddings needs null embeddings of the same shape as cond")
        return null.expand_as(positive)
    if null is None:
        null = int(model.config["num_classes"])
    return torch.full_like(positive, null) if isinstance(null, int) else null.expand_as(positive)
