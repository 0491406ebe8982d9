"""Structural masks: one number for each attention head and each hidden neuron, learned, ranked, and made binary.

A *unit* is what can be removed whole: a head with its rows of the query, key and value layers and its columns of the output
layer, or a hidden neuron with its row (two rows, in a gated layer) and its column. A *site* is a layer that has units. The masks
multiply what a unit hands to the output layer; they act from outside, through ``minilib.intervene`` and the attention
processor, so the model is neither copied nor changed.

The learned kind is the hard-concrete distribution (Louizos et al. 2018, arXiv 1712.01312), as in EcoDiff (Zhang et al. 2024,
arXiv 2412.02852; constants read in ``YaNgZhAnG-V5/EcoDiff: src/sdib/utils/utils.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..attention import Attention, CrossAttention, JointAttention, scale_heads
from ..intervene import scale_inputs
from ..models.layers import GeluMLP, SwiGLU
from ..models.unet_blocks import GEGLU

Masks = Mapping[str, Shaped[Tensor, " units"]]


@dataclass(frozen=True)
class Layout:
    """Where the units of a layer lie: as rows of the linear layers ``ins``, as columns of ``outs``.

    Args:
        kind: "head" or "neuron".
        ins: name of a linear layer, and into how many equal parts its rows fall, each with rows for every unit: 3 for a fused
            qkv, 2 for the value and the gate of a GEGLU.
        outs: names of the linear layers that read the units.
    """

    kind: str
    ins: tuple[tuple[str, int], ...]
    outs: tuple[str, ...]


#: A subclass has the layout of its base. Layers that are not here (mixtures of experts, convolutions) have no units.
LAYOUTS: dict[type[nn.Module], Layout] = {
    Attention: Layout("head", (("qkv", 3),), ("proj",)),
    CrossAttention: Layout("head", (("to_q", 1), ("to_k", 1), ("to_v", 1)), ("to_out",)),
    JointAttention: Layout("head", (("qkv", 3), ("context_qkv", 3)), ("proj", "context_proj")),
    GeluMLP: Layout("neuron", (("fc1", 1),), ("fc2",)),
    SwiGLU: Layout("neuron", (("w_in", 2),), ("w_down",)),
    GEGLU: Layout("neuron", (("proj", 2),), ("out",)),
}
KINDS = ("head", "neuron")
SCOPES = ("kind", "layer", "model")


@dataclass(frozen=True)
class Site:
    """A layer with units.

    Args:
        name: of the layer in the model.
        kind: "head" or "neuron".
        units: how many.
        width: features of one unit: of a head, or 1.
        parameters: values that go with one unit when it is removed.
        ins: its linear layers that make the units, by name within the layer, with their number of parts.
        outs: those that read them.
    """

    name: str
    kind: str
    units: int
    width: int
    parameters: int
    ins: tuple[tuple[str, int], ...]
    outs: tuple[str, ...]


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout of a layer, or None if it has no units that can be removed."""
    for cls, layout in LAYOUTS.items():
        if isinstance(layer, cls):
            ins = layout.ins
            if isinstance(layer, JointAttention):  # a context that is only read may have no query
                rows = layer.context_qkv.out_features
                ins = (("qkv", 3), ("context_qkv", 3 * rows // layer.qkv.out_features))
            outs = tuple(name for name in layout.outs if getattr(layer, name) is not None)
            return Layout(layout.kind, ins, outs)
    return None


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every layer of ``model`` whose heads or hidden neurons can be masked, by name, in the model's order.

    Raises:
        ValueError: there is none.

    >>> from minilib.models import DiT
    >>> sites = find_sites(DiT(hidden_size=32, depth=1, num_heads=2))
    >>> [(s.name, s.kind, s.units, s.parameters) for s in sites.values()]
    [('blocks.0.attn', 'head', 2, 2096), ('blocks.0.mlp', 'neuron', 128, 65)]
    """
    sites: dict[str, Site] = {}
    for name, layer in model.named_modules():
        layout = layout_of(layer)
        if layout is None:
            continue
        features = getattr(layer, layout.outs[0]).in_features
        units = layer.num_heads if layout.kind == "head" else features
        width = features // units if units else 0
        rows = sum(parts * _row_size(getattr(layer, own)) for own, parts in layout.ins)
        columns = sum(getattr(layer, own).out_features for own in layout.outs)
        sites[name] = Site(name, layout.kind, units, width, width * (rows + columns), layout.ins, layout.outs)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no layer with units to mask: known are {', '.join(c.__name__ for c in LAYOUTS)}"
        )
    return sites


def _row_size(linear: nn.Linear) -> int:
    return linear.in_features + (linear.bias is not None)


@contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Multiply what each unit hands on by its mask, inside a ``with`` block: ones change no bit, a zero removes the unit.

    The biases of the output layers stay, as they do when the units are really removed (``minilib.pruning.shrink``).

    Args:
        model: any module with sites.
        masks: by site name one number a unit, of any dtype, bool included; sites left out are not masked. Masks that require
            gradients get them.

    Raises:
        ValueError: no such site, or a mask of another length.
    """
    sites = check_masks(model, masks)
    heads: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name, mask in masks.items():
        layer, site = model.get_submodule(name), sites[name]
        mask = mask.to(getattr(layer, site.outs[0]).weight)
        if site.kind == "head":
            heads[name] = mask
        else:
            columns |= {f"{name}.{own}" if name else own: mask.view(1, 1, -1) for own in site.outs}
    with (
        scale_heads(model, heads) if heads else nullcontext(),
        scale_inputs(model, columns) if columns else nullcontext(),
    ):
        yield


def check_masks(model: nn.Module, masks: Masks) -> dict[str, Site]:
    """The sites of ``model``, if the masks fit them.

    Raises:
        ValueError: no mask, no such site, or a mask of another length.
    """
    sites = find_sites(model)
    if not masks:
        raise ValueError(f"no mask given: the sites are {', '.join(sites)}")
    for name, mask in masks.items():
        if name not in sites:
            raise ValueError(f"no site is called {name!r}: there are {', '.join(sites)}")
        if mask.shape != (sites[name].units,):
            raise ValueError(
                f"{name!r} has {sites[name].units} {sites[name].kind}s: its mask needs that shape, got {tuple(mask.shape)}"
            )
    return sites


def ones(sites: Mapping[str, Site], **options: torch.dtype | torch.device | None) -> dict[str, Tensor]:
    """A mask of ones for each site: the model as it is.

    >>> from minilib.models import DiT
    >>> {name: len(mask) for name, mask in ones(find_sites(DiT(hidden_size=8, depth=1, num_heads=2))).items()}
    {'blocks.0.attn': 2, 'blocks.0.mlp': 32}
    """
    return {name: torch.ones(site.units, **options) for name, site in sites.items()}


def hard_concrete(
    logits: Float[Tensor, "*shape"],
    uniform: Float[Tensor, "*shape"] | None = None,
    *,
    temperature: float = 0.83,
    low: float = -0.1,
    high: float = 1.1,
    epsilon: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """A mask in [0, 1] that is exactly 0 or 1 with positive probability, and differentiable between.

    ``s = sigmoid((log(u + e) - log(1 - u + e) + logit) / temperature)``, stretched to (low, high) and clipped to [0, 1]. Where it
    is clipped, the gradient is zero.

    Args:
        logits: lambda in EcoDiff; infinite ones give exactly 0 and 1.
        uniform: u, in (0, 1), drawn once for an update; None: 1/2, which is the median, without noise.
        temperature: below 1 most of the mass is near the ends.
        low, high: ends of the stretched interval; below 0 and above 1.
        epsilon: e. It bounds the noise, to +-log((1 + e) / e): 0.5 in the released configuration of SDXL, 0.1 in that of FLUX.

    Raises:
        ValueError: a temperature that is not positive, or ends that do not reach beyond [0, 1].

    >>> hard_concrete(torch.tensor([-5.0, 0.0, 5.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    if temperature <= 0 or low >= 0 or high <= 1 or epsilon < 0:
        raise ValueError(
            f"need temperature > 0, low < 0, high > 1 and epsilon >= 0; got {temperature}, {low}, {high} and {epsilon}"
        )
    noise = 0.0 if uniform is None else torch.log(uniform + epsilon) - torch.log(1 - uniform + epsilon)
    s = torch.sigmoid((logits + noise) / temperature)
    return (s * (high - low) + low).clamp(0, 1)


def alive_probability(
    logits: Float[Tensor, "*shape"], *, temperature: float = 0.83, low: float = -0.1, high: float = 1.1
) -> Float[Tensor, "*shape"]:
    """The probability that :func:`hard_concrete` is not 0: its sum is the expected number of units left (Louizos, eq. 12)."""
    return torch.sigmoid(logits - temperature * math.log(-low / high))


class HardConcreteMasks(nn.Module):
    """Learned masks for sites: one logit a unit, and noise that is drawn for an update and then stays.

    Args:
        sites: as ``find_sites`` gives them, or some of them.
        init: first value of every logit; 3 gives masks that are 1 in most draws.
        options: of :func:`hard_concrete`.

    Raises:
        ValueError: no site.
    """

    def __init__(self, sites: Mapping[str, Site], *, init: float = 3.0, **options: float) -> None:
        super().__init__()
        if not sites:
            raise ValueError("no site given: HardConcreteMasks needs at least one")
        hard_concrete(torch.zeros(1), **options)
        self.sites, self.options = dict(sites), options
        self.logits = nn.ParameterList(torch.full((site.units,), float(init)) for site in sites.values())
        self.uniform: list[Tensor] | None = None

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw new noise, on the generator's device; it stays until the next call. None: no noise."""
        if generator is None:
            self.uniform = None
            return
        device = generator.device
        draws = [torch.rand(x.shape, generator=generator, device=device) for x in self.logits]
        # Away from 0 and 1, whose logarithms are infinite.
        self.uniform = [u.clamp(1e-7, 1 - 1e-7).to(x) for u, x in zip(draws, self.logits, strict=True)]

    def forward(self) -> dict[str, Float[Tensor, " units"]]:
        """The masks of this update, by site."""
        noise = self.uniform or [None] * len(self.logits)
        made = [hard_concrete(x, u, **self.options) for x, u in zip(self.logits, noise, strict=True)]
        return dict(zip(self.sites, made, strict=True))

    def scores(self) -> dict[str, Float[Tensor, " units"]]:
        """The logits, for :func:`keep_top`: they rank the units of a kind."""
        return {name: x.detach().clone() for name, x in zip(self.sites, self.logits, strict=True)}

    def of_kind(self, kind: str) -> list[nn.Parameter]:
        """The logits of the heads, or of the neurons: each kind may have its learning rate.

        Raises:
            ValueError: another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
        pairs = zip(self.sites.values(), self.logits, strict=True)
        return [x for site, x in pairs if site.kind == kind]

    def penalty(self, *, slope: float = 0.4, shift: float = 1.0) -> Float[Tensor, ""]:
        """Mean over sites of the mean of ``sigmoid(slope logit + shift)``: what pulls the logits down, gently where they are low.

        As in the released configuration of FLUX, with one mean over the sites of each kind and the sum of the two.
        """
        parts = []
        for kind in KINDS:
            means = [torch.sigmoid(slope * x + shift).mean() for x in self.of_kind(kind)]
            if means:
                parts.append(torch.stack(means).mean())
        return torch.stack(parts).sum()


def keep_top(
    scores: Masks, share: float, sites: Mapping[str, Site], *, scope: str = "kind"
) -> dict[str, Shaped[Tensor, " units"]]:
    """Binary masks that keep the units with the highest scores.

    Args:
        scores: by site one number a unit.
        share: of the units of each pool, to the nearest whole number; 1 keeps all.
        sites: the sites of these scores.
        scope: what is ranked together. "kind": all heads of the model, and all neurons, so that every method removes as many
            of each; "layer": the units of a site, so that every layer loses as many; "model": everything.

    Returns:
        boolean masks. Of equal scores the earlier unit is kept.

    Raises:
        ValueError: a share outside 0 to 1, an unknown scope, a site without its description, or a score that is not a number.

    >>> site = Site("mlp", "neuron", 4, 1, 10, (), ())
    >>> keep_top({"mlp": torch.tensor([0.1, 3.0, 2.0, 0.2])}, 0.5, {"mlp": site})
    {'mlp': tensor([False,  True,  True, False])}
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share to keep lies between 0 and 1; got {share}")
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    pools: dict[str, list[str]] = {}
    for name, score in scores.items():
        if name not in sites or score.shape != (sites[name].units,):
            raise ValueError(f"the scores of {name!r}, of shape {tuple(score.shape)}, fit no site given")
        if bool(torch.isnan(score).any()):
            raise ValueError(f"the scores of {name!r} hold NaN: nothing to rank by")
        pool = {"kind": sites[name].kind, "layer": name, "model": ""}[scope]
        pools.setdefault(pool, []).append(name)
    kept: dict[str, Tensor] = {}
    for names in pools.values():
        joined = torch.cat([scores[name] for name in names])
        best = joined.argsort(descending=True, stable=True)[: math.floor(share * len(joined) + 0.5)]
        flags = torch.zeros(len(joined), dtype=torch.bool, device=joined.device)
        flags[best] = True
        kept.update(zip(names, flags.split([len(scores[name]) for name in names]), strict=True))
    return {name: kept[name] for name in scores}


def removed_parameters(sites: Mapping[str, Site], masks: Masks) -> int:
    """Values that go when the units with mask 0 are removed: the closed form of ``shrink_model``."""
    return sum(int((mask == 0).sum()) * sites[name].parameters for name, mask in masks.items())


def maskable_parameters(sites: Mapping[str, Site]) -> int:
    """Values that belong to units: all that could go."""
    return sum(site.units * site.parameters for site in sites.values())
