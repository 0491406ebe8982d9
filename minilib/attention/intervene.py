"""Read or replace attention from outside, for a while: no copy of the model, and always put back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .functional import Attend, attention_weights
from .module import Attention

Factory = Callable[[str, Attention], Attend | None]


def attention_modules(model: nn.Module) -> dict[str, Attention]:
    """Every ``Attention`` inside ``model`` by its name, as in ``model.named_modules()``.

    Raises:
        ValueError: there is none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not found:
        raise ValueError(f"{type(model).__name__} contains no minilib.attention.Attention module to act on")
    return found


@contextmanager
def attention_processor(model: nn.Module, factory: Factory) -> Iterator[dict[str, Attention]]:
    """Replace the attention processors of ``model`` inside a ``with`` block; they are restored however the block ends.

    Args:
        model: holds ``Attention`` modules at any depth.
        factory: ``factory(name, attention)`` returns the processor to use there, with the signature
            ``(q, k, v, *, mask=None) -> out``, or None to leave that one alone. The one in force is
            ``attention.processor``.

    Yields:
        the modules whose processor was replaced, by name.
    """
    modules = attention_modules(model)
    originals = {name: module.processor for name, module in modules.items()}
    replaced: dict[str, Attention] = {}
    try:
        for name, module in modules.items():
            processor = factory(name, module)
            if processor is not None:
                module.processor = processor
                replaced[name] = module
        yield replaced
    finally:
        for name, module in modules.items():
            module.processor = originals[name]


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record the attention weights of every call inside a ``with`` block; the model's outputs stay bit for bit the same.

    Yields:
        for each ``Attention`` by name, a list with one detached (b, h, n, m) tensor a call, in the order of
        the calls.

    Raises:
        ValueError: a processor is not softmax attention, so that it has no such weights.

    >>> import torch
    >>> layer = nn.ModuleDict({"attn": Attention(8, 2)})
    >>> with record_attention(layer) as weights:
    ...     y = layer["attn"](torch.zeros(1, 4, 8))
    >>> weights["attn"][0][0, 0, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    records: dict[str, list[Tensor]] = {}

    def recorder(name: str, module: Attention) -> Attend:
        inner = module.processor
        if not getattr(inner, "softmax", False):
            raise ValueError(
                f"{name}: the processor {inner!r} is not registered as softmax attention, so it has no weights to record; "
                "record a model with attention 'full' or 'naive'"
            )
        calls = records.setdefault(name, [])

        def process(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
            calls.append(attention_weights(q.detach(), k.detach(), mask=mask))
            return inner(q, k, v, mask=mask)

        process.softmax = True
        return process

    with attention_processor(model, recorder):
        yield records
