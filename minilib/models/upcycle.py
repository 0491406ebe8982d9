"""Turning a trained dense DiT into a mixture of experts that starts as the same function."""

import torch
from torch import nn

from .dit import DiT


def upcycle_moe(
    dense: DiT,
    *,
    num_experts: int = 8,
    k: int = 2,
    renormalize: bool = True,
    dispatch: str = "sparse",
    gate_std: float = 0.02,
    generator: torch.Generator | None = None,
) -> DiT:
    """A mixture-of-experts DiT whose experts all start as copies of ``dense``'s feed-forward networks.

    The gates start at random, N(0, gate_std^2) (``feizc/DiT-MoE: upcycle.py``), and there is no shared
    expert. With ``renormalize`` the weights of a token's experts sum to 1, so the new model computes what the
    dense one does until training drives the experts apart. Without it, as in the paper, the routed output
    shrinks to about k / num_experts at first.

    Args:
        dense: a DiT with ``mlp`` 'gelu' or 'swiglu'; it is left unchanged.
        num_experts: experts a layer.
        k: experts a token.
        renormalize: see above.
        dispatch: 'sparse' or 'dense'.
        gate_std: standard deviation of the gates' weights.
        generator: source of the gates' randomness.

    Raises:
        ValueError: ``dense`` is a mixture already, or k is not in 1..num_experts.
    """
    kind = dense.config["mlp"]
    if kind not in ("gelu", "swiglu"):
        raise ValueError(
            f"a dense model with mlp 'gelu' or 'swiglu' can be upcycled, this one has mlp {kind!r}"
        )
    options = {
        **(dense.config["mlp_options"] or {}),
        "num_experts": num_experts,
        "k": k,
        "shared": 0,
        "renormalize": renormalize,
        "dispatch": dispatch,
        "expert": kind,
    }
    sparse = DiT(**{**dense.config, "mlp": "moe", "mlp_options": options})
    weights = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    sparse.load_state_dict(weights, strict=False)
    for ours, theirs in zip(sparse.blocks, dense.blocks, strict=True):
        nn.init.normal_(ours.mlp.gate.weight, std=gate_std, generator=generator)
        for expert in ours.mlp.experts:
            expert.load_state_dict(theirs.mlp.state_dict())
    return sparse.to(dense.pos_embed.device, dense.pos_embed.dtype).train(dense.training)
