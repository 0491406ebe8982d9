"""Read, edit or replace attention from outside, for a while: no copy of the model, and always put back.

All of it goes through the processor of each ``AttentionLayer``, so it is the same for self-, cross- and joint
attention. Contexts nest: what an outer one does comes first, so an inner ``record_attention`` sees the weights
that an outer edit left. They must end in the reverse order, as ``with`` blocks do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..intervene.names import Names, matching_names
from .edited import KeyValueEdit, WeightStep, added_to, require_softmax
from .module import AttentionLayer
from .registry import Attend

Factory = Callable[[str, AttentionLayer], Attend | None]
When = Callable[[int], bool]
WeightEdit = Callable[[str, Tensor], Tensor]


def attention_modules(model: nn.Module, names: Names | None = None) -> dict[str, AttentionLayer]:
    """Every ``AttentionLayer`` inside ``model`` by its name, as in ``model.named_modules()``.

    Args:
        model: holds attention layers at any depth.
        names: only these: names or patterns as in ``minilib.intervene.named_blocks``.

    Raises:
        ValueError: there is none, or a name matches none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, AttentionLayer)}
    if not found:
        raise ValueError(f"{type(model).__name__} contains no minilib.attention.AttentionLayer to act on")
    if names is None:
        return found
    return {name: found[name] for name in matching_names(found, names, "attention layer")}


@contextmanager
def attention_processor(
    model: nn.Module, factory: Factory, names: Names | None = None
) -> Iterator[dict[str, AttentionLayer]]:
    """Replace the attention processors of ``model`` inside a ``with`` block; they are restored however the block ends.

    Args:
        model: holds attention layers at any depth.
        factory: ``factory(name, attention)`` returns the processor to use there, with the signature
            ``(q, k, v, *, mask=None) -> out``, or None to leave that one alone. The one in force is
            ``attention.processor``. Layers pass the mask they were called with, None without one, so a mask
            bound beforehand (``partial(full_attention, mask=m)``) is overwritten: write a function that sets it.
        names: only these layers, see ``attention_modules``.

    Yields:
        the modules whose processor was replaced, by name.
    """
    modules = attention_modules(model, names)
    originals = {name: module.processor for name, module in modules.items()}
    replaced: dict[str, AttentionLayer] = {}
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
def record_attention(
    model: nn.Module,
    names: Names | None = None,
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    detach: bool = True,
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the attention weights of every call inside a ``with`` block; the model's outputs stay bit for bit the same.

    Args:
        model: holds attention layers at any depth.
        names: only these layers.
        reduce: keep only ``reduce(weights)``, such as the mean over the heads, to save memory.
        detach: False keeps the weights in the graph, for a loss on them.

    Yields:
        for each layer by name, a list with one (b, h, n, m) tensor a call, in the order of the calls.

    Raises:
        ValueError: a processor is not softmax attention, so that it has no such weights.

    >>> import torch
    >>> from minilib.attention import Attention
    >>> layer = nn.ModuleDict({"attn": Attention(8, 2)})
    >>> with record_attention(layer) as weights:
    ...     y = layer["attn"](torch.zeros(1, 4, 8))
    >>> weights["attn"][0][0, 0, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    records: dict[str, list[Tensor]] = {}

    def watcher(calls: list[Tensor]) -> WeightStep:
        def keep(weights: Tensor) -> None:
            weights = weights.detach() if detach else weights
            calls.append(weights if reduce is None else reduce(weights).clone())

        return WeightStep(keep, edits=False, needs_graph=not detach)

    def factory(name: str, module: AttentionLayer) -> Attend:
        require_softmax(name, module.processor)
        return added_to(module.processor, weight_step=watcher(records.setdefault(name, [])))

    with attention_processor(model, factory, names):
        yield records


@contextmanager
def replace_attention_weights(
    model: nn.Module, edit: WeightEdit, names: Names | None = None
) -> Iterator[None]:
    """Let ``edit(name, weights)`` return the attention weights to use instead of ``weights`` (b, h, n, m).

    This is the control of prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626). An edit that returns the
    weights it was given, unchanged, leaves the layer as it was to the bit.

    Raises:
        ValueError: a processor is not softmax attention; in a call, the edit changes the shape.
        TypeError: in a call, the edit returned None.
    """

    def factory(name: str, module: AttentionLayer) -> Attend:
        require_softmax(name, module.processor)
        return added_to(module.processor, weight_step=WeightStep(_checked_edit(name, edit), edits=True))

    with attention_processor(model, factory, names):
        yield


def _checked_edit(name: str, edit: WeightEdit) -> Callable[[Tensor], Tensor]:
    def act(weights: Tensor) -> Tensor:
        shape = weights.shape
        edited = edit(name, weights)
        if edited is None:
            raise TypeError(f"the edit of {name!r} returned None: return the weights, changed or not")
        if edited.shape != shape:
            raise ValueError(
                f"the edit of {name!r} makes {tuple(edited.shape)} of {tuple(shape)}: keep the shape"
            )
        return edited

    return act


def of_call(recorded: Mapping[str, Any], name: str, counts: dict[str, int], when: When | None) -> Any:
    """What was recorded for this call of ``name``, which is counted; None if ``when`` leaves it alone.

    Raises:
        IndexError: nothing was recorded for it.
    """
    call = counts.get(name, 0)
    counts[name] = call + 1
    if when is not None and not when(call):
        return None
    source = recorded[name]
    if not isinstance(source, list):
        return source
    if call >= len(source):
        raise IndexError(f"call {call + 1} of {name!r}, but only {len(source)} calls were recorded")
    return source[call]


def put(own: Tensor, new: Tensor, where: Any) -> Tensor:
    """A copy of ``own`` with ``new`` at ``where``."""
    out = own.clone()
    out[where] = new
    return out


@contextmanager
def patch_attention(
    model: nn.Module,
    recorded: Mapping[str, Tensor | list[Tensor]],
    *,
    keys: slice | Tensor | None = None,
    when: When | None = None,
) -> Iterator[None]:
    """Use recorded attention weights in the place of the model's own.

    Args:
        model: holds attention layers at any depth.
        recorded: by layer weights for every call, or a list with those of each call (see
            ``record_attention``).
        keys: replace only the weights on these keys, the tokens two prompts share, say; the rows then no
            longer sum to 1.
        when: ``when(i)`` says whether to patch call number i of a layer (from 0); always by default.

    Raises:
        ValueError: no such layer; in a call, the recorded weights have another shape.
        IndexError: in a call, nothing was recorded for it.
    """
    counts: dict[str, int] = {}

    def edit(name: str, weights: Tensor) -> Tensor:
        new = of_call(recorded, name, counts, when)
        if new is None:
            return weights
        if new.shape != weights.shape:
            raise ValueError(f"{name!r} has weights {tuple(weights.shape)}, recorded were {tuple(new.shape)}")
        where = (..., slice(None) if keys is None else keys)
        return put(weights, new.to(weights)[where], where)

    with replace_attention_weights(model, edit, list(recorded)):
        yield


@contextmanager
def reweight_attention(
    model: nn.Module, scale: Tensor, names: Names | None = None, *, renormalize: bool = False
) -> Iterator[None]:
    """Multiply the attention weights by a factor for each key: prompt-to-prompt's reweighting of words.

    Args:
        model: holds attention layers at any depth.
        scale: (m,), one factor a key, or what broadcasts to (b, h, n, m). All ones change no bit, unless
            the scale requires a gradient, which it then gets.
        names: only these layers; those with another number of keys have to be left out.
        renormalize: divide by the new sum over the keys.

    Raises:
        ValueError: in a call, the scale does not fit the weights.
    """
    neutral = not scale.requires_grad and bool((scale == 1).all())

    def edit(name: str, weights: Tensor) -> Tensor:
        if scale.shape[-1] not in (1, weights.shape[-1]):
            raise ValueError(
                f"{name!r} reads {weights.shape[-1]} keys, the scale is for {scale.shape[-1]}: choose other names"
            )
        if neutral:
            return weights
        scaled = weights * scale.to(weights.device)
        return scaled / scaled.sum(-1, keepdim=True) if renormalize else scaled

    with replace_attention_weights(model, edit, names):
        yield


@contextmanager
def scale_heads(model: nn.Module, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply what each head gives, before the output layer, by a factor: 0 prunes the head, 1 changes no bit.

    Args:
        model: holds attention layers at any depth; any variant of attention will do.
        scales: by layer name or pattern one factor a head, (h,). They get gradients if they require them.

    Raises:
        ValueError: no such layer, a layer named twice, or a wrong number of factors.
    """
    chosen: dict[str, Tensor] = {}
    for pattern, scale in scales.items():
        for name, module in attention_modules(model, pattern).items():
            heads = getattr(module, "num_heads", scale.numel())
            if name in chosen or scale.shape != (heads,):
                raise ValueError(
                    f"{name!r} needs one scale for each of its {heads} heads; {pattern!r} gives {tuple(scale.shape)}"
                )
            chosen[name] = scale

    def factory(name: str, module: AttentionLayer) -> Attend:
        return added_to(module.processor, gain=chosen[name])

    with attention_processor(model, factory, list(chosen)):
        yield


@contextmanager
def replace_keys_values(
    model: nn.Module, edit: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]], names: Names | None = None
) -> Iterator[None]:
    """Let ``edit(name, k, v)`` return the keys and values (b, h, m, d) to attend to, whatever the variant."""

    def step(name: str) -> KeyValueEdit:
        return lambda k, v: edit(name, k, v)

    def factory(name: str, module: AttentionLayer) -> Attend:
        return added_to(module.processor, key_value_step=step(name))

    with attention_processor(model, factory, names):
        yield
