"""A processor around a processor: it watches and edits keys, values, attention weights and heads."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .functional import attention_weights
from .registry import Attend

KeyValueEdit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class WeightStep:
    """One thing done with the (b, h, n, m) weights: an edit returns new ones, a watcher's result is ignored."""

    act: Callable[[Tensor], Tensor | None]
    edits: bool
    needs_graph: bool = True


@dataclass(frozen=True, eq=False)
class EditedProcessor:
    """Does its steps around ``inner``; those that were added first come first.

    The weights are computed only if a step asks for them. If no edit changes them the result is that of
    ``inner``, to the bit; otherwise it is ``weights @ v``. There is one such processor a layer, however many
    contexts are nested: each adds its steps by ``added_to``.
    """

    inner: Attend
    key_value_steps: tuple[KeyValueEdit, ...] = ()
    weight_steps: tuple[WeightStep, ...] = ()
    gains: tuple[Tensor, ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Map queries, keys and values of shape (b, h, n, d) to (b, h, n, d)."""
        for step in self.key_value_steps:
            k, v = step(k, v)
        weights = self._edited_weights(q, k, mask) if self.weight_steps else None
        out = self.inner(q, k, v, mask=mask) if weights is None else weights.to(v.dtype) @ v
        for gain in self.gains:
            out = out * gain.to(out.device)[:, None, None]
        return out

    def _edited_weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
        """Do the steps; None if the weights are what ``inner`` makes of q and k."""
        editing = any(step.edits for step in self.weight_steps)
        if not any(step.needs_graph for step in self.weight_steps):
            q, k = q.detach(), k.detach()
        weights, changed = attention_weights(q, k, mask=mask), False
        for step in self.weight_steps:
            if not step.edits:
                step.act(weights.clone() if editing else weights)
                continue
            before = None if weights.is_inference() else weights._version
            edited = step.act(weights)
            # An edit may also write into the weights in place; the version counts that.
            changed |= edited is not weights or before is None or edited._version != before
            weights = edited
        return weights if changed else None


def added_to(
    processor: Attend,
    *,
    key_value_step: KeyValueEdit | None = None,
    weight_step: WeightStep | None = None,
    gain: Tensor | None = None,
) -> EditedProcessor:
    """``processor`` with one more step."""
    edited = processor if isinstance(processor, EditedProcessor) else EditedProcessor(processor)
    return replace(
        edited,
        key_value_steps=(*edited.key_value_steps, *([key_value_step] if key_value_step else [])),
        weight_steps=(*edited.weight_steps, *([weight_step] if weight_step else [])),
        gains=(*edited.gains, *([gain] if gain is not None else [])),
    )


def require_softmax(name: str, processor: Attend) -> None:
    """Raise unless ``processor`` is softmax attention at heart, so that it has weights to act on.

    Raises:
        ValueError: it is not.
    """
    inner = processor.inner if isinstance(processor, EditedProcessor) else processor
    if not getattr(inner, "softmax", False):
        raise ValueError(
            f"{name}: the processor {inner!r} is not registered as softmax attention, so it has no weights to act on; "
            "use a model with attention 'full' or 'naive'"
        )
