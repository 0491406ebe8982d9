"""What makes the inputs of linear layers hard to round: how much their size varies, and along which axis.

One grid for a whole tensor has to cover its largest value; whatever is much smaller gets few of its points. So the harm along
an axis is told by the ratio of the largest size along it to the median one: 1 if all are alike. ViDiT-Q (arXiv 2406.02540)
names four axes of a diffusion transformer: tokens, condition (with and without the caption), time steps and channels.

``inject_outliers`` makes a model with large channels which computes the same function: a stress test, synthetic by
construction.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .balance import linear_layer
from .folding import fold_balance, modulated_inputs


class Call(NamedTuple):
    """One use of the model: ``run()`` calls it once, at this time and under this condition."""

    time: float
    condition: str
    run: Callable[[], Any]


class Variation(NamedTuple):
    """Ratios of one layer's input, largest over median; 1 means that nothing varies along the axis."""

    token: float
    condition: float
    time: float
    channel: float


class _Sizes(NamedTuple):
    """Of one call: sizes of the tokens (b, n), of the channels (c,)."""

    call: Call
    tokens: Tensor
    channels: Tensor


@torch.no_grad()
def audit_variation(model: nn.Module, calls: Iterable[Call], layers: Sequence[str]) -> dict[str, Variation]:
    """The variation of the inputs of some linear layers, over some calls.

    A size is the largest |value|. *token*: over the tokens of an image, mean over images and calls. *channel*: over the
    channels of a call, mean over calls. *time*: over the times, of the mean size of an image at that time, mean over
    conditions. *condition*: the larger over the smaller mean size of an image, among the conditions at one time, mean over
    times.

    Args:
        model: the module that owns the layers.
        calls: at least one; each time should come with every condition.
        layers: names of linear layers whose inputs are (b, n, c).

    Raises:
        ValueError: no call, a layer that does not exist, or one that a call did not run.
    """
    sizes: dict[str, list[_Sizes]] = {layer: [] for layer in layers}
    current: list[Call] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().abs()
            sizes[name].append(_Sizes(current[0], x.amax(-1), x.flatten(0, -2).amax(0)))

        return note

    handles = [linear_layer(model, name).register_forward_pre_hook(hook(name)) for name in layers]
    count = 0
    try:
        for call in calls:
            current[:] = [call]
            call.run()
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    silent = sorted(name for name, seen in sizes.items() if len(seen) < count)
    if not count or silent:
        raise ValueError(f"{count} calls given; layers that did not run in all of them: {silent}")
    return {name: _variation(seen) for name, seen in sizes.items()}


def _variation(seen: list[_Sizes]) -> Variation:
    by_place: dict[float, dict[str, list[Tensor]]] = {}
    for call, tokens, _ in seen:
        by_place.setdefault(call.time, {}).setdefault(call.condition, []).append(tokens.amax(-1).mean())
    size = {
        time: {condition: float(torch.stack(v).mean()) for condition, v in row.items()}
        for time, row in by_place.items()
    }
    conditions = dict.fromkeys(condition for row in size.values() for condition in row)
    over_time = [
        peak_over_median(torch.tensor([row[c] for row in size.values() if c in row])) for c in conditions
    ]
    over_condition = [max(row.values()) / max(min(row.values()), _TINY) for row in size.values()]
    return Variation(
        token=_mean([peak_over_median(s.tokens).mean() for s in seen]),
        condition=_mean(over_condition),
        time=_mean(over_time),
        channel=_mean([peak_over_median(s.channels) for s in seen]),
    )


_TINY = 1e-30


def peak_over_median(sizes: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Largest over median along the last axis (the mean of the middle two, if there are two).

    >>> peak_over_median(torch.tensor([1.0, 2.0, 3.0, 10.0]))
    tensor(4.)
    """
    return sizes.amax(-1) / sizes.quantile(0.5, dim=-1).clamp(min=_TINY)


def _mean(values: Sequence[Any]) -> float:
    return float(sum(float(v) for v in values) / len(values))


def inject_outliers(
    model: nn.Module, fraction: float, gain: float, generator: torch.Generator | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a DiT or MM-DiT with large channels before its linear layers, which computes the same function.

    In the input of each layer that reads a modulated norm, a share of the channels is multiplied by ``gain``, through the
    rows of the modulation that make their shift and scale; the columns of the layer's weight that read them are divided by
    it. (It is ``fold_balance`` with factors 1 / gain, and folding the inverse takes it back.)

    Args:
        fraction: share of the channels, rounded to the nearest number of them.
        gain: positive.
        generator: draws the channels of each layer; without one they are the first ones.

    Returns:
        the copy, and the channels of each layer.

    Raises:
        ValueError: a share outside 0..1, a gain that is not positive, or a model without such layers.
    """
    if not 0 <= fraction <= 1 or not gain > 0:
        raise ValueError(f"fraction {fraction} has to lie in 0..1 and gain {gain} to be positive")
    places = modulated_inputs(model)
    if not places:
        raise ValueError("no layer of this model reads a modulated norm: give a DiT or an MM-DiT")
    changed, channels, scales = copy.deepcopy(model), {}, {}
    for name in places:
        width = linear_layer(changed, name).in_features
        order = torch.arange(width) if generator is None else torch.randperm(width, generator=generator)
        channels[name] = order[: round(fraction * width)].sort().values
        scales[name] = torch.ones(width)
        scales[name][channels[name]] = 1 / gain
    return fold_balance(changed, scales), channels
