"""Mixture of experts: a feed-forward network in which a gate sends every token to a few of many experts.

After DiT-MoE (Fei et al. 2024, arXiv 2407.11633; ``feizc/DiT-MoE: models.py``):

    y = sum over the k chosen experts i of p_i E_i(x), plus S(x),    p = softmax(W x)

The kept probabilities are not renormalised, no token is dropped, and S is one shared expert that sees every
token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .layers import GeluMLP, SwiGLU, autocast_off

EXPERTS: dict[str, Callable[[int, int], nn.Module]] = {"swiglu": SwiGLU, "gelu": GeluMLP}


class Routing(NamedTuple):
    """What the gate decided for each token; the leading axes are those of the tokens.

    probs: (..., E) probabilities over all experts; indices: (..., k) the chosen experts, the likeliest first; weights: (..., k)
    the factors of their outputs.
    """

    probs: Tensor
    indices: Tensor
    weights: Tensor


class MoEGate(nn.Module):
    """A linear layer without bias, a softmax, and the k largest.

    Args:
        dim: width of a token.
        num_experts: E.
        k: experts a token is sent to.
        renormalize: divide the k kept probabilities by their sum.

    Raises:
        ValueError: k is not in 1..E.
    """

    def __init__(self, dim: int, num_experts: int, k: int, *, renormalize: bool = False) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(
                f"k = {k} experts a token out of {num_experts}: k has to lie in 1..{num_experts}"
            )
        self.k = k
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)

    def forward(self, x: Float[Tensor, "*s d"]) -> Routing:
        """Route the tokens ``x``. Half-precision autocast is switched off: near ties would be decided by rounding."""
        with autocast_off(x.device.type):
            probs = F.linear(x.to(self.weight.dtype), self.weight).softmax(dim=-1)
        weights, indices = probs.topk(self.k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(probs, indices, weights)


def load_balance_loss(
    probs: Float[Tensor, "*s e"], indices: Int[Tensor, "*s k"], *, alpha: float = 0.01
) -> Float[Tensor, ""]:
    """alpha * sum_i P_i f_i (DiT-MoE, equation 5), summed over the experts i.

    P_i is the mean probability of expert i over all tokens, f_i is E times the fraction of the token-slots
    sent to it. At uniform load the value is alpha, its least. The gradient flows through P; f is a count.

    >>> probs = torch.full((6, 3), 1 / 3)
    >>> loss = load_balance_loss(probs, torch.tensor([[0], [1], [2], [0], [1], [2]]), alpha=0.5)
    >>> round(float(loss), 6)
    0.5
    """
    num_experts = probs.shape[-1]
    fraction = F.one_hot(indices.flatten(), num_experts).to(probs.dtype).mean(dim=0)
    return alpha * num_experts * (probs.flatten(0, -2).mean(dim=0) * fraction).sum()


class MoEFeedForward(nn.Module):
    """A mixture-of-experts layer in the place of a transformer block's feed-forward network.

    Args:
        dim: width D of a token.
        hidden_dim: hidden width of one expert; the paper has 4D.
        num_experts: E.
        k: experts a token is sent to.
        shared: hidden width of the shared expert (a SwiGLU) in units of D; the paper has 2; 0 leaves it out.
        renormalize: divide the kept probabilities by their sum (the paper does not).
        dispatch: 'sparse' sorts the token-slots by expert and runs each expert on its own segment; 'dense'
            runs every expert on every token and masks, E / k times the work. Both give the same values.
        expert: 'swiglu' as in the paper, or 'gelu' to take over the weights of a plain DiT.

    Raises:
        ValueError: an unknown ``dispatch`` or ``expert``, or k not in 1..E.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        num_experts: int = 8,
        k: int = 2,
        shared: int = 2,
        renormalize: bool = False,
        dispatch: str = "sparse",
        expert: str = "swiglu",
    ) -> None:
        super().__init__()
        if dispatch not in DISPATCH:
            raise ValueError(f"unknown dispatch {dispatch!r}: choose one of {sorted(DISPATCH)}")
        if expert not in EXPERTS:
            raise ValueError(f"unknown expert {expert!r}: choose one of {sorted(EXPERTS)}")
        self.dispatch = dispatch
        self.gate = MoEGate(dim, num_experts, k, renormalize=renormalize)
        self.experts = nn.ModuleList(EXPERTS[expert](dim, hidden_dim) for _ in range(num_experts))
        self.shared = SwiGLU(dim, shared * dim) if shared else None

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """Act on each token by itself."""
        routing = self.gate(x)
        k = self.gate.k
        tokens = x.reshape(-1, x.shape[-1])
        indices, weights = routing.indices.reshape(-1, k), routing.weights.reshape(-1, k)
        out = DISPATCH[self.dispatch](self.experts, tokens, indices, weights).view_as(x)
        return out if self.shared is None else out + self.shared(x)


def sparse_dispatch(
    experts: nn.ModuleList,
    x: Float[Tensor, "t d"],
    indices: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
) -> Float[Tensor, "t d"]:
    """Sort the t * k token-slots by expert, run each expert once on its segment, add the results back up.

    An expert without tokens runs on an empty segment, so that its weights get a gradient (of zero) in every
    step.
    """
    k = indices.shape[1]
    slots = indices.flatten()
    order = slots.argsort(stable=True)
    tokens = order.div(k, rounding_mode="floor")
    # index_select, not x[tokens]: the gradient of the latter is several times slower on a CPU.
    segments = x.index_select(0, tokens).split(_counts(slots, len(experts)))
    outputs = torch.cat([expert(segment) for expert, segment in zip(experts, segments, strict=True)])
    weighted = outputs * weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x, dtype=weighted.dtype).index_add(0, tokens, weighted)


def _counts(slots: Int[Tensor, " n"], num_experts: int) -> list[int]:
    """Token-slots of each expert. The meta device knows no values: there, even shares, which cost the same in sum."""
    if slots.is_meta:
        share, rest = divmod(slots.numel(), num_experts)
        return [share + (i < rest) for i in range(num_experts)]
    return slots.bincount(minlength=num_experts).tolist()


def dense_dispatch(
    experts: nn.ModuleList,
    x: Float[Tensor, "t d"],
    indices: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
) -> Float[Tensor, "t d"]:
    """Run every expert on every token and multiply by a weight that is zero where the token was not sent."""
    mask = x.new_zeros(len(x), len(experts), dtype=weights.dtype).scatter(1, indices, weights)
    return sum(column[:, None] * expert(x) for column, expert in zip(mask.unbind(1), experts, strict=True))


DISPATCH: dict[str, Callable[..., Tensor]] = {"sparse": sparse_dispatch, "dense": dense_dispatch}


@contextmanager
def record_routing(model: nn.Module, *, detach: bool = True) -> Iterator[dict[str, list[Routing]]]:
    """Record what every gate inside ``model`` decides, inside a ``with`` block.

    Yields:
        for each gate by name, one ``Routing`` a call.

    Raises:
        ValueError: the model has no gate.
    """
    gates = {name: module for name, module in model.named_modules() if isinstance(module, MoEGate)}
    if not gates:
        raise ValueError(f"{type(model).__name__} contains no MoEGate: nothing is routed in it")
    records: dict[str, list[Routing]] = {name: [] for name in gates}

    def hook(name: str) -> Callable[[nn.Module, tuple, Routing], None]:
        def keep(gate: nn.Module, inputs: tuple, routing: Routing) -> None:
            records[name].append(Routing(*(t.detach() for t in routing)) if detach else routing)

        return keep

    handles = [gate.register_forward_hook(hook(name)) for name, gate in gates.items()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


class BalanceLoss:
    """The load-balance losses of the gates that ran inside ``collect_balance_loss``."""

    def __init__(self, records: dict[str, list[Routing]], alpha: float) -> None:
        self._records = records
        self._alpha = alpha

    def total(self) -> Float[Tensor, ""]:
        """The sum over layers and calls, as the official code adds it to the training loss.

        Raises:
            RuntimeError: no gate has run.
        """
        losses = [
            load_balance_loss(routing.probs, routing.indices, alpha=self._alpha)
            for calls in self._records.values()
            for routing in calls
        ]
        if not losses:
            raise RuntimeError("no gate has run: call the model inside the with block, before total()")
        return torch.stack(losses).sum()


@contextmanager
def collect_balance_loss(model: nn.Module, *, alpha: float = 0.01) -> Iterator[BalanceLoss]:
    """The load-balance loss of the forward passes inside a ``with`` block, to be added to the training loss::

        with collect_balance_loss(model) as balance:
            prediction = model(x, t, y)
        loss = mse(prediction, target) + balance.total()

    Args:
        model: holds ``MoEGate`` modules at any depth.
        alpha: weight of the loss; 0.01 in the official code, 0.005 in the paper's text.

    Raises:
        ValueError: the model has no gate.
    """
    with record_routing(model, detach=False) as records:
        yield BalanceLoss(records, alpha)


class ExpertLoad:
    """Records which experts the tokens go to, inside a ``with`` block.

    ``probs[name]``, ``top1[name]`` and ``topk[name]`` are the gate probabilities (b, n, E), the likeliest
    expert (b, n) and the chosen experts (b, n, k) of the layer ``name``, concatenated along b over the calls.

    >>> layer = nn.Sequential(MoEFeedForward(8, 32, num_experts=4))
    >>> with ExpertLoad(layer) as load:
    ...     y = layer(torch.zeros(3, 5, 8))
    >>> load.top1["0.gate"].shape, load.fractions().shape
    (torch.Size([3, 5]), torch.Size([1, 4]))
    """

    def __init__(self, model: nn.Module) -> None:
        self._context = record_routing(model)
        self._records: dict[str, list[Routing]] = {}

    def __enter__(self) -> "ExpertLoad":
        """Start recording."""
        self._records = self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop recording; what was recorded stays."""
        self._context.__exit__(*error)

    @property
    def probs(self) -> dict[str, Tensor]:
        """Gate probabilities of each layer."""
        return {name: torch.cat([r.probs for r in calls]) for name, calls in self._records.items() if calls}

    @property
    def topk(self) -> dict[str, Tensor]:
        """Chosen experts of each layer, the likeliest first."""
        return {name: torch.cat([r.indices for r in calls]) for name, calls in self._records.items() if calls}

    @property
    def top1(self) -> dict[str, Tensor]:
        """The likeliest expert of each layer."""
        return {name: indices[..., 0] for name, indices in self.topk.items()}

    def fractions(self) -> Float[Tensor, "layers e"]:
        """Fraction of the token-slots that each expert of each layer was sent; rows sum to 1, a uniform load is 1/E."""
        probs = self.probs
        rows = [
            indices.flatten().bincount(minlength=probs[name].shape[-1]) / indices.numel()
            for name, indices in self.topk.items()
        ]
        if not rows:
            raise RuntimeError("no gate has run: call the model inside the with block first")
        return torch.stack(rows)

    def coefficient_of_variation(self) -> Float[Tensor, " layers"]:
        """Standard deviation over mean of the experts' loads, for each layer; 0 is uniform."""
        load = self.fractions()
        return load.std(dim=1, correction=0) / load.mean(dim=1)
