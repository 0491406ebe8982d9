"""The registry of attention: every variant has the signature ``attend(q, k, v, *, mask=None) -> out``.

``q`` is (b, h, n, d), ``k`` and ``v`` are (b, h, m, d), the result is (b, h, n, d). A mask broadcasts to (b,
h, n, m): boolean with True where a query may look, or floating point, added to the logits. A variant that
cannot take a mask refuses it.

A new variant is one decorated function, or ``nn.Module`` if it has parameters. It brings what is needed to
test it: a slow reference, who sees whom, the exact number of FLOPs, and small cases::

    @register_attention("mine", reference=slow, sees=who, flops=count, cases=(Case({"radius": 2}, n=5),))
    def mine(q, k, v, *, radius, mask=None): ...

``get_attention("mine", radius=2)`` is then the processor. Built-in variants are imported when first asked for.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Shaped
from torch import Tensor, nn

Mask = Shaped[Tensor, "..."]


@runtime_checkable
class Attend(Protocol):
    """What an attention variant, or a processor that replaces one, has to be."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Map queries, keys and values of shape (b, h, n, d) to (b, h, n, d)."""


@dataclass(frozen=True)
class Case:
    """A small example that every test of the registry runs; ``num_heads`` and ``head_dim`` are filled in there."""

    options: Mapping[str, Any]
    n: int
    m: int | None = None  # None: as many as queries


@dataclass(frozen=True)
class Variant:
    """One entry of the registry.

    Args:
        name: in the registry.
        make: ``make(**options)`` checks the options and returns the processor; None if there is a ``layer``.
        softmax: exactly softmax(q k^T / sqrt(d) + mask) v, so that ``attention_weights`` describes it.
        reference: slow and obvious, in the dtype it is given: ``reference(q, k, v, *, mask=None, **options)``;
            ``reference(module, q, k, v)`` if the processor is an ``nn.Module``; ``reference(layer, x)`` for a layer.
        sees: ``sees(n, m, **options)``, boolean (n, m): which key can influence which query; None: all.
        flops: ``flops(b, h, n, m, d, **options)``: those of matrix products and convolutions, 2 a multiply-add,
            of the processor's call, or of the whole layer where there is a ``layer``.
        cases: small examples.
        option_names: what ``make`` or ``layer`` takes.
        layer: ``layer(dim, num_heads, **options)``, a module from (b, n, dim) to (b, n, dim), for mixers of tokens.
    """

    name: str
    make: Callable[..., Attend] | None
    softmax: bool
    reference: Callable[..., Tensor]
    sees: Callable[..., Bool[Tensor, "n m"]] | None
    flops: Callable[..., int]
    cases: tuple[Case, ...]
    option_names: tuple[str, ...] = field(default=())
    layer: Callable[..., nn.Module] | None = None

    def build(self, num_heads: int, head_dim: int, **options: Any) -> Attend | nn.Module:
        """The processor for heads of this number and width, or the layer if the variant is one."""
        if self.layer is not None:
            return self.layer(num_heads * head_dim, num_heads, **options)
        sizes = {"num_heads": num_heads, "head_dim": head_dim}
        own = {key: value for key, value in sizes.items() if key in self.option_names}
        return self.make(**(own | options))


ATTENTION: dict[str, Variant] = {}

#: Built-in variants and the module of this package that registers each.
BUILT_IN: dict[str, str] = {
    "full": "functional",
    "naive": "functional",
    "causal": "causal",
    "window": "window",
    "local": "local",
    "proxy": "proxy",
    "spatial": "factorised",
    "temporal": "factorised",
    "latents": "latents",
    "linear": "linear",
    "linear_conv": "linear",
    "linear_mlp": "linear",
    "ss2d": "ss2d",
}


def register_attention(
    name: str,
    *,
    softmax: bool = False,
    reference: Callable[..., Tensor] | None = None,
    sees: Callable[..., Bool[Tensor, "n m"]] | None = None,
    flops: Callable[..., int] | None = None,
    cases: tuple[Case, ...] = (),
    check: Callable[..., None] | None = None,
    layer: bool = False,
) -> Callable[[Any], Any]:
    """Decorator that adds a function, or a class of ``nn.Module``, to ``ATTENTION`` under ``name``.

    Its keyword arguments are the options of the variant; a class that needs to know the heads takes ``num_heads``
    and ``head_dim`` among them. The arguments here are those of ``Variant``, and

    Args:
        check: ``check(**options)`` raises a ValueError for options that cannot be right; it gets every option,
            defaults included, when the processor is built.
        layer: the class is a whole layer: ``cls(dim, num_heads, **options)``.

    Raises:
        ValueError: the name is taken; reference, FLOPs or cases are missing; a layer that is no ``nn.Module``.
    """
    needed = {"reference": reference, "flops": flops, "cases": cases}
    missing = [key for key, value in needed.items() if not value]

    def add(target: Any) -> Any:
        if name in ATTENTION or BUILT_IN.get(name, _module(target)) != _module(target):
            raise ValueError(f"attention {name!r} is registered already: choose another name")
        if missing:
            raise ValueError(
                f"attention {name!r} is registered without {', '.join(missing)}: the tests of the registry need a "
                "slow reference, the exact FLOPs and at least one Case"
            )
        if layer and not _is_module_class(target):
            raise ValueError(f"{name!r} is registered as a layer, but {target!r} is no class of nn.Module")
        known = _option_parameters(target, layer)
        build = _builder(name, target, known, check, layer)
        target.softmax = softmax
        ATTENTION[name] = Variant(
            name=name,
            make=None if layer else build,
            softmax=softmax,
            reference=reference,
            sees=sees,
            flops=flops,
            cases=tuple(cases),
            option_names=tuple(known),
            layer=build if layer else None,
        )
        return target

    return add


def _module(target: Any) -> str:
    package, _, module = getattr(target, "__module__", "").rpartition(".")
    return module if package == __name__.rpartition(".")[0] else ""


def _is_module_class(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, nn.Module)


def _option_parameters(target: Any, layer: bool) -> dict[str, inspect.Parameter]:
    """The options that a function or class takes, by name, without what every call brings."""
    brought = ("dim", "num_heads") if layer else () if _is_module_class(target) else ("q", "k", "v", "mask")
    parameters = inspect.signature(target).parameters
    return {key: value for key, value in parameters.items() if key not in brought}


def _builder(
    name: str,
    target: Any,
    known: dict[str, inspect.Parameter],
    check: Callable[..., None] | None,
    layer: bool,
) -> Callable[..., Any]:
    """``make`` of a variant, or ``layer``: check the options, then bind them."""
    defaults = {key: value.default for key, value in known.items() if value.default is not value.empty}
    open_ended = any(value.kind is value.VAR_KEYWORD for value in known.values())

    def build(*sizes: int, **options: Any) -> Any:
        # A model's config may have been through JSON, which knows no tuples.
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        unknown = [] if open_ended else sorted(set(options) - set(known))
        required = [key for key, value in known.items() if value.kind is not value.VAR_KEYWORD]
        lacking = [key for key in required if key not in options and key not in defaults]
        if unknown or lacking:
            problem = f"has no option {unknown[0]!r}" if unknown else f"needs the option {lacking[0]!r}"
            raise ValueError(f"attention {name!r} {problem}: its options are {', '.join(known) or 'none'}")
        if check is not None:
            check(**(defaults | options))
        if layer or _is_module_class(target):
            return target(*sizes, **options)
        if not options:
            return target
        bound = partial(target, **options)
        bound.softmax = target.softmax
        return bound

    return build


def _variant(name: str) -> Variant:
    if name not in ATTENTION and name in BUILT_IN:
        import_module(f"{__package__}.{BUILT_IN[name]}")
    if name not in ATTENTION:
        raise ValueError(f"unknown attention {name!r}: choose one of {sorted({*BUILT_IN, *ATTENTION})}")
    return ATTENTION[name]


def attention_variants() -> dict[str, Variant]:
    """Every variant by name, the built-in ones first: this imports the modules of all of them."""
    return {name: _variant(name) for name in [*BUILT_IN, *ATTENTION]}


def get_attention(name: str, **options: Any) -> Attend:
    """The processor of the variant called ``name``: its function with ``options`` bound, or its module, built with them.

    Raises:
        ValueError: no such variant, an unknown, missing or wrong option, or a variant that is a layer.

    >>> import torch
    >>> q = torch.ones(1, 2, 3, 4)
    >>> get_attention("full")(q, q, q).shape
    torch.Size([1, 2, 3, 4])
    """
    variant = _variant(name)
    if variant.make is None:
        raise ValueError(
            f"attention {name!r} mixes the tokens themselves, not q, k and v: use make_attention_layer({name!r}, ...)"
        )
    return variant.make(**options)


def make_attention_layer(name: str, dim: int, num_heads: int, **options: Any) -> nn.Module:
    """A layer from (b, n, dim) to (b, n, dim) that mixes its tokens by the variant called ``name``.

    ``options`` are those of the variant; a processor with parameters is told the heads' number and width.

    Raises:
        ValueError: no such variant, a wrong option, or heads that do not divide ``dim``.

    >>> import torch
    >>> make_attention_layer("full", 8, 2)(torch.ones(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """
    from .module import Attention

    variant = _variant(name)
    if variant.layer is not None:
        return variant.layer(dim, num_heads, **options)
    layer = Attention(dim, num_heads)
    layer.processor = variant.build(num_heads, dim // num_heads, **options)
    return layer
