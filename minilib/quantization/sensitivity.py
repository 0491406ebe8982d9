"""How much the output of a model suffers when one layer alone is quantised."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from minilib.intervene import replace_modules
from minilib.intervene.names import Names

from .model import Call, QuantRule, applied_rules, calibrate, quantize_model, run_call
from .quantizers import QuantSpec

Specs = tuple[QuantSpec, QuantSpec]  # of the weight and of the input


def relative_error(out: Float[Tensor, "..."], reference: Float[Tensor, "..."]) -> float:
    """Squared error over the squared norm of the reference."""
    return float((out - reference).square().sum() / reference.square().sum())


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    specs: Specs,
    calls: Sequence[Call],
    *,
    names: Names = "**",
    timesteps: Sequence[float] | Num[Tensor, " n"] | None = None,
    error: Callable[[Tensor, Tensor], float] = relative_error,
) -> dict[str, float]:
    """The error of the model's output with one layer quantised, for each layer by itself; the model is left as it was.

    Static input ranges come from the same calls, all layers being in full precision but for their weights' rounding.

    Args:
        model: called with each of ``calls``; its output is a tensor.
        specs: of the weight and of the input of the layer whose turn it is.
        calls: arguments, a tuple or a mapping each.
        names: only these layers.
        timesteps: as ``quantize_model``.
        error: of an output against the full-precision one; averaged over the calls.

    Returns:
        by the layer's name, in the model's order.

    Raises:
        ValueError: no call, or as ``quantize_model``.
    """
    calls = list(calls)
    references = [run_call(model, call) for call in calls]
    rules = [QuantRule(names, *specs)]
    originals = {name: model.get_submodule(name) for name in applied_rules(model, rules)}
    with quantize_model(model, rules, timesteps=timesteps) as layers:
        calibrate(model, calls)
        with replace_modules(model, originals):  # all back to full precision; the clock still runs
            errors = {}
            for name, layer in layers.items():
                with replace_modules(model, {name: layer}):
                    found = [error(run_call(model, c), r) for c, r in zip(calls, references, strict=True)]
                errors[name] = sum(found) / len(found)
    return errors
