"""Expert dispatch: run each token through the few experts it was sent to, and add up their weighted outputs.

    y_t = sum over the slots j of token t of w_tj E_{i_tj}(x_t)

No token is dropped, whatever the load: an expert may get all tokens or none. Four ways that compute the same:

- ``reference``: every expert on every token, then a weight that is zero where the token was not sent: E / k times the work;
- ``mask_loop``: for each expert the tokens of its mask, the loop one writes first. It searches all slots once for each expert;
- ``sorted_segments``: sort the slots by expert once, then each expert sees one contiguous segment (MegaBlocks, arXiv
  2211.15841, without its padding to blocks);
- ``grouped_mm``: the same order of slots, and one call of ``torch.nn.functional.grouped_mm`` for all experts: no loop, and
  no wait for the segments' lengths on a GPU.

``minilib.models.moe`` holds the layer itself, with its gate.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..models.layers import GeluMLP, SwiGLU
from .dispatch import DOTS, Choice, Kernel, capability

Expert = Callable[[Tensor], Tensor]


class StackedExperts(NamedTuple):
    """The weights of E experts of one shape: ``w_in`` (E, d, f), ``w_out`` (E, h, d) and biases or None.

    ``activation`` is "gelu" (tanh; f = h) or "swiglu" (f = 2h, the gate first).
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: str


Experts = Sequence[Expert] | nn.ModuleList | StackedExperts


def stack_experts(experts: Sequence[nn.Module] | nn.ModuleList) -> StackedExperts:
    """The weights of ``experts`` side by side, as ``grouped_mm`` takes them; gradients flow to each.

    Raises:
        ValueError: the experts are not all ``GeluMLP`` or all ``SwiGLU`` of one shape.

    >>> stack_experts([GeluMLP(8, 32), GeluMLP(8, 32)]).w_in.shape
    torch.Size([2, 8, 32])
    """
    problem = _unstackable(experts)
    if problem:
        raise ValueError(f"{problem}: use sorted_segments, which takes any experts")
    if isinstance(experts[0], GeluMLP):
        w_in, b_in, w_out, b_out = (
            torch.stack([getattr(getattr(e, layer), name) for e in experts])
            for layer in ("fc1", "fc2")
            for name in ("weight", "bias")
        )
        return StackedExperts(w_in.transpose(1, 2), b_in, w_out.transpose(1, 2), b_out, "gelu")
    w_in, w_out = (torch.stack([getattr(e, name).weight for e in experts]) for name in ("w_in", "w_down"))
    return StackedExperts(w_in.transpose(1, 2), None, w_out.transpose(1, 2), None, "swiglu")


def unstack_experts(stacked: StackedExperts) -> list[Expert]:
    """Each expert as a function of tokens (t, d), reading its part of the stacked weights."""

    def expert(i: int) -> Expert:
        w_in, b_in, w_out, b_out = (None if w is None else w[i] for w in stacked[:4])

        def run(x: Tensor) -> Tensor:
            hidden = _activate(F.linear(x, w_in.t(), b_in), stacked.activation)
            return F.linear(hidden, w_out.t(), b_out)

        return run

    return [expert(i) for i in range(len(stacked.w_in))]


def reference(
    x: Float[Tensor, "t d"],
    indices: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    experts: Experts,
) -> Float[Tensor, "t d_out"]:
    """Every expert on every token; a token sent to one expert twice counts twice.

    Raises:
        ValueError: shapes that do not belong together, no expert, or an index that is none.
    """
    experts = _each(experts)
    _check(x, indices, weights, len(experts))
    sent = weights.new_zeros(len(x), len(experts)).scatter_add(1, indices, weights)
    return sum(column[:, None] * expert(x) for column, expert in zip(sent.unbind(1), experts, strict=True))


def mask_loop(
    x: Float[Tensor, "t d"],
    indices: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    experts: Experts,
) -> Float[Tensor, "t d_out"]:
    """For each expert, look for its slots, run it on their tokens, and add the results to the output.

    Raises:
        ValueError: as ``reference``.
    """
    experts = _each(experts)
    _check(x, indices, weights, len(experts))
    out: Tensor | None = None
    for i, expert in enumerate(experts):
        token, slot = (indices == i).nonzero(as_tuple=True)
        values = expert(x.index_select(0, token)) * weights[token, slot][:, None]
        out = values.new_zeros(len(x), values.shape[-1]) if out is None else out
        out = out.index_add(0, token, values)
    return out


def sorted_segments(
    x: Float[Tensor, "t d"],
    indices: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    experts: Experts,
) -> Float[Tensor, "t d_out"]:
    """Sort the slots by expert, run each expert once on its segment, put the rows back in the tokens' order and add them up.

    An expert without tokens runs on an empty segment, so that its weights get a gradient (of zero) in every step. On
    the meta device, which knows no indices, the segments are as even as can be.

    Raises:
        ValueError: as ``reference``.
    """
    experts = _each(experts)
    _check(x, indices, weights, len(experts))
    order, inverse = _slot_order(indices)
    rows = _TakeRows.apply(x, order.div(indices.shape[1], rounding_mode="floor"), inverse)
    segments = rows.split(_counts(indices, len(experts)))
    outputs = torch.cat([expert(segment) for expert, segment in zip(experts, segments, strict=True)])
    return _combine(outputs, order, inverse, weights)


def grouped_mm(
    x: Float[Tensor, "t d"],
    indices: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    experts: Experts,
) -> Float[Tensor, "t d_out"]:
    """``sorted_segments`` with one grouped matrix product for all experts, float32, bfloat16 or float16.

    Experts kept as ``StackedExperts`` save the copy that ``stack_experts`` makes at each call.

    Raises:
        ValueError: as ``reference``, or experts that cannot be stacked.
    """
    stacked = experts if isinstance(experts, StackedExperts) else stack_experts(experts)
    _check(x, indices, weights, len(stacked.w_in))
    order, inverse = _slot_order(indices)
    rows = _TakeRows.apply(x, order.div(indices.shape[1], rounding_mode="floor"), inverse)
    slots = indices.flatten()
    # Counted by hand: bincount waits for the GPU to learn how long its result is.
    counts = torch.zeros(len(stacked.w_in), dtype=torch.int32, device=x.device)
    counts = counts.index_add(0, slots, torch.ones_like(slots, dtype=torch.int32))
    ends, owner = counts.cumsum(0, dtype=torch.int32), slots.index_select(0, order)
    hidden = _grouped_linear(rows, stacked.w_in, stacked.b_in, ends, owner)
    hidden = _activate(hidden, stacked.activation)
    outputs = _grouped_linear(hidden, stacked.w_out, stacked.b_out, ends, owner)
    return _combine(outputs, order, inverse, weights)


def _choose(x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Choice:
    if x.device.type != "cuda":
        return Choice("expert_dispatch", "cpu", f"the tensors are on {x.device.type}: sorted segments")
    problem = _not_grouped(experts, x.dtype, capability(x.device))
    if problem:
        return Choice("expert_dispatch", "cpu", f"sorted segments, also on a GPU: {problem}")
    return Choice("expert_dispatch", "torch", "grouped_mm: bfloat16 experts of one shape on a GPU")


def _not_grouped(experts: Experts, dtype: torch.dtype, have: tuple[int, int]) -> str | None:
    """Why grouped_mm cannot run on a GPU of this capability; None if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if have < DOTS:
        return f"grouped_mm needs compute capability 8.0, this GPU has {have[0]}.{have[1]}"
    if dtype != torch.bfloat16:
        return f"grouped_mm on a GPU takes bfloat16, not {dtype}"
    return None if isinstance(experts, StackedExperts) else _unstackable(experts)


#: ``expert_dispatch(x, indices, weights, experts)``: the path for these arguments, see the module's text.
expert_dispatch = Kernel(
    "expert_dispatch", {"reference": reference, "cpu": sorted_segments, "torch": grouped_mm}, _choose
)


class _TakeRows(torch.autograd.Function):
    """x[source], every row of x being taken the same number of times; ``inverse`` finds the places where it went.

    index_select's own gradient adds the rows up one by one, on a GPU in no fixed order. Knowing the inverse, the
    gradient is a second selection and a sum over the copies: the same bits in every run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(source, inverse)
        ctx.rows = len(x)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        back = grad.index_select(0, inverse)
        if ctx.rows in (0, len(back)):
            return back[: ctx.rows], None, None
        return back.view(ctx.rows, -1, back.shape[-1]).sum(1), None, None


class _Contiguous(torch.autograd.Function):
    """The identity, whose gradient lies in memory in full: grouped_mm refuses the expanded one of a plain sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, owner: Tensor) -> Tensor:
    out = _Contiguous.apply(F.grouped_mm(rows, weight, offs=ends))
    return out if bias is None else out + bias.index_select(0, owner)


def _slot_order(indices: Tensor) -> tuple[Tensor, Tensor]:
    """(order, inverse): slot ``order[i]`` is the i-th by expert, and slot j is at ``inverse[j]``."""
    order = indices.flatten().argsort(stable=True)
    places = torch.arange(order.numel(), device=order.device)
    return order, torch.empty_like(order).scatter_(0, order, places)


def _combine(outputs: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """Rows by expert to rows by token, weighted and summed over a token's slots."""
    back = _TakeRows.apply(outputs, inverse, order)
    return (back.view(*weights.shape, outputs.shape[-1]) * weights[..., None]).sum(1)


def _counts(indices: Tensor, num_experts: int) -> list[int]:
    if indices.is_meta:
        share, rest = divmod(indices.numel(), num_experts)
        return [share + (i < rest) for i in range(num_experts)]
    return indices.flatten().bincount(minlength=num_experts).tolist()


def _each(experts: Experts) -> Sequence[Expert]:
    return unstack_experts(experts) if isinstance(experts, StackedExperts) else list(experts)


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def _check(x: Tensor, indices: Tensor, weights: Tensor, num_experts: int) -> None:
    if indices.shape != weights.shape or indices.shape[0] != x.shape[0] or indices.shape[1] < 1:
        raise ValueError(
            f"x {tuple(x.shape)}, indices {tuple(indices.shape)} and weights {tuple(weights.shape)} given: they have to "
            "be (t, d), (t, k) and (t, k) with k >= 1"
        )
    if num_experts < 1:
        raise ValueError("no experts given: there has to be at least one")
    # On a GPU looking at the values would wait for it; index errors are reported there by the device.
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(
                f"indices run from {low} to {high}: with {num_experts} experts they lie in 0..{num_experts - 1}"
            )


def _unstackable(experts: Sequence[Any] | nn.ModuleList) -> str | None:
    kinds = {type(e) for e in experts}
    if len(kinds) != 1 or not kinds <= {GeluMLP, SwiGLU}:
        return f"only experts that are all GeluMLP or all SwiGLU can be stacked, not {sorted(k.__name__ for k in kinds)}"
    shapes = {tuple(p.shape for p in e.parameters()) for e in experts}
    return None if len(shapes) == 1 else f"experts of {len(shapes)} different shapes cannot be stacked"
