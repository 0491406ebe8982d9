"""Whole models: which layers are rounded how, calibration, and the memory that the weights would take."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor, nn

from minilib.intervene import named_blocks, replace_modules
from minilib.intervene.names import Names

from .layers import QuantConv2d, QuantLinear, Transform, quantize_layer
from .quantizers import OFF, QuantSpec
from .timewise import Clock

#: Arguments of one call of a model: positional ones, or all by name.
Call = tuple[Any, ...] | Mapping[str, Any]
QuantLayer = QuantLinear | QuantConv2d


@dataclass(frozen=True)
class QuantRule:
    """Layers by name (exact, glob or regular expression), and how their weights and inputs are rounded."""

    names: Names
    weight: QuantSpec = OFF
    activation: QuantSpec = OFF


def select_layers(model: nn.Module, names: Names = "**") -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of ``model`` whose names match, in the model's order.

    Args:
        model: any module.
        names: as ``minilib.intervene.named_blocks``: ``"**.ff.*"``, say.

    Raises:
        ValueError: a pattern matches no module, or all of them together no layer of these kinds.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    >>> list(select_layers(model)), list(select_layers(model, "1.*"))
    (['0', '1.0'], ['1.0'])
    """
    found = {
        name: m for name, m in named_blocks(model, names).items() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    if not found:
        raise ValueError(f"{names!r} names no linear layer and no 2-D convolution of {type(model).__name__}")
    return found


def uniform_rules(
    weight: QuantSpec, activation: QuantSpec, *, keep: Names = (), kept_bits: int = 8
) -> list[QuantRule]:
    """All layers alike, but for some: usually the first and the last, which hold few weights and touch the image.

    Args:
        weight: for all layers.
        activation: for all layers.
        keep: the names of the exceptions: the same specs, with ``kept_bits`` unless they have more.
        kept_bits: 32: not rounded.
    """
    rules = [QuantRule("**", weight, activation)]
    if not keep:
        return rules
    kept = [replace(spec, bits=max(spec.bits, kept_bits)) for spec in (weight, activation)]
    return [QuantRule(keep, *kept), *rules]


def applied_rules(model: nn.Module, rules: Sequence[QuantRule]) -> dict[str, QuantRule]:
    """For each layer that a rule names, the first such rule, in the model's order.

    Raises:
        ValueError: no rule, or a rule that names no layer.
    """
    if not rules:
        raise ValueError("no rule given: nothing would be quantised")
    by_name: dict[str, QuantRule] = {}
    for rule in rules:
        for name in select_layers(model, rule.names):
            by_name.setdefault(name, rule)
    return {name: by_name[name] for name in select_layers(model) if name in by_name}


@contextmanager
def quantize_model(
    model: nn.Module,
    rules: Sequence[QuantRule],
    *,
    timesteps: Sequence[float] | Num[Tensor, " n"] | None = None,
    transforms: Mapping[str, Transform] | None = None,
) -> Iterator[dict[str, QuantLayer]]:
    """Put quantised copies in the places of the named layers; the originals come back at the end.

    Args:
        model: any module. If its ``forward`` has an argument ``t``, the layers' clock is set by it.
        rules: the first rule that names a layer decides.
        timesteps: of the sampler: static input ranges become tables with one row a time. None: one range for all times.
        transforms: by the layer's full name.

    Yields:
        the quantised layers by name. Static inputs have to be calibrated before the model can run (``calibrate``).

    Raises:
        ValueError: a rule that names no layer, a transform of a layer that no rule names, ``timesteps`` for a model
            whose ``forward`` has no ``t``, or what a layer refuses.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    >>> with quantize_model(model, [QuantRule("2", QuantSpec(4, "channel"))]) as layers:
    ...     list(layers), type(model[2]).__name__
    (['2'], 'QuantLinear')
    >>> type(model[2]).__name__
    'Linear'
    """
    layers, clock = _make_layers(model, rules, timesteps, transforms)
    handle = clock.attach(model) if _wants_clock(model, timesteps) else None
    try:
        with replace_modules(model, layers):
            yield layers
    finally:
        if handle is not None:
            handle.remove()


def quantize_copy(
    model: nn.Module,
    rules: Sequence[QuantRule],
    *,
    timesteps: Sequence[float] | Num[Tensor, " n"] | None = None,
    transforms: Mapping[str, Transform] | None = None,
) -> nn.Module:
    """A copy of the model with quantised layers, to keep and to train; ``model`` itself stays as it is.

    Args, Raises: as ``quantize_model``.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    >>> type(quantize_copy(model, uniform_rules(QuantSpec(4, "channel"), OFF))[2]).__name__
    'QuantLinear'
    """
    model = deepcopy(model)
    layers, clock = _make_layers(model, rules, timesteps, transforms)
    if _wants_clock(model, timesteps):
        clock.attach(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def quant_layers(model: nn.Module, names: Names = "**") -> dict[str, QuantLayer]:
    """The quantised layers of a model by name.

    Raises:
        ValueError: there is none of these names.
    """
    found = {n: m for n, m in select_layers(model, names).items() if isinstance(m, QuantLinear | QuantConv2d)}
    if not found:
        raise ValueError(
            f"no layer named {names!r} of this {type(model).__name__} is quantised: see quantize_model"
        )
    return found


@torch.no_grad()
def calibrate(model: nn.Module, calls: Iterable[Call]) -> None:
    """Set the static input ranges of a model's quantised layers by what passes in some calls.

    All inputs pass unrounded meanwhile, weights are rounded already. Old ranges are forgotten.

    Args:
        model: with quantised layers; without static ones nothing happens.
        calls: arguments, a tuple or a mapping each.

    Raises:
        ValueError: no quantised layer, no call, or a time of the table that no call reaches.
    """
    quantizers = {name: layer.activation_quantizer for name, layer in quant_layers(model).items()}
    calls = list(calls)
    if not calls:
        raise ValueError("no call given: static ranges are set by what passes in calls of the model")
    if not any(quantizer.static for quantizer in quantizers.values()):
        return
    for quantizer in quantizers.values():
        quantizer.start()
    try:
        for call in calls:
            run_call(model, call)
    except BaseException:
        for quantizer in quantizers.values():
            quantizer._seen = None
        raise
    for name, quantizer in quantizers.items():
        try:
            quantizer.finish()
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error


def run_call(model: nn.Module, call: Call) -> Any:
    """``model`` with the arguments of a call."""
    return model(**call) if isinstance(call, Mapping) else model(*call)


@dataclass(frozen=True)
class Memory:
    """Bytes: of all parameters in floating point; the same with low-bit weights; of their scales and zero points."""

    full: int
    weights: int
    scales: int

    @property
    def ratio(self) -> float:
        """How many times smaller the model gets."""
        return self.full / (self.weights + self.scales)


def weight_memory(
    model: nn.Module, rules: Sequence[QuantRule] = (), *, float_bytes: int = 4, times: int = 1
) -> Memory:
    """What the parameters take in memory, packed.

    A rounded weight takes b bits, a range a scale of 32 bits and, unless it is symmetric, a zero point of b bits.

    Counted, not allocated: models on the ``meta`` device will do. Biases, norms and all that no rule names stay in
    floating point. A parameter in two places counts once. Static input ranges count as scales too.

    Args:
        model: as it is before it is quantised.
        rules: as ``quantize_model``; none: nothing is rounded.
        float_bytes: of a parameter in floating point: 4, or 2 for half precision.
        times: rows of the tables of static input ranges.

    >>> weight_memory(nn.Linear(64, 32, bias=False), float_bytes=2)
    Memory(full=4096, weights=4096, scales=0)
    >>> weight_memory(nn.Sequential(nn.Linear(64, 32, bias=False)), [QuantRule("0", QuantSpec(4, "channel"))])
    Memory(full=8192, weights=1024, scales=144)
    """
    sizes = {id(p): p.numel() for p in model.parameters()}
    full = float_bytes * sum(sizes.values())
    weights, scales = full, 0
    for name, rule in (applied_rules(model, rules) if rules else {}).items():
        layer = model.get_submodule(name)
        n = sizes.pop(id(layer.weight), 0)
        if n and not rule.weight.off:
            weights += ceil(n * rule.weight.bits / 8) - n * float_bytes
            scales += _range_bytes(rule.weight, layer.weight.shape[0])
        if not (rule.activation.off or rule.activation.dynamic):
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            scales += times * _range_bytes(rule.activation, inputs)
    return Memory(full, weights, scales)


def _range_bytes(spec: QuantSpec, channels: int) -> int:
    ranges = channels if spec.granularity == "channel" else 1
    return ranges * 4 + (0 if spec.symmetric else ceil(ranges * spec.bits / 8))


def _make_layers(
    model: nn.Module,
    rules: Sequence[QuantRule],
    timesteps: Sequence[float] | Tensor | None,
    transforms: Mapping[str, Transform] | None,
) -> tuple[dict[str, QuantLayer], Clock]:
    chosen, transforms = applied_rules(model, rules), dict(transforms or {})
    stray = sorted(set(transforms) - set(chosen))
    if stray:
        raise ValueError(f"transforms for layers that no rule names: {stray[:5]}")
    clock = Clock(timesteps)
    layers = {}
    for name, rule in chosen.items():
        layer = model.get_submodule(name)
        try:
            layers[name] = quantize_layer(
                layer, rule.weight, rule.activation, clock=clock, transform=transforms.get(name)
            )
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    return layers, clock


def _wants_clock(model: nn.Module, timesteps: object) -> bool:
    import inspect

    return timesteps is not None or "t" in inspect.signature(model.forward).parameters
