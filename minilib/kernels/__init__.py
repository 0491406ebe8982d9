"""Fused and reduced operations, each beside its plain PyTorch reference, and the rule that chooses between them.

Every operation has a ``reference`` that says in a few lines what it computes, a path that is fast on a CPU, and, where it
can pay, one for a GPU. :func:`explain` says which would run; ``MINILIB_KERNELS`` (auto, ref, triton) overrides it.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["adaln", "compiling", "linear", "local", "moe", "quant", "scan", "sparse", "tokens"],
    submod_attrs={
        "adaln": ["gated_residual_modulate", "modulate"],
        "dispatch": ["Choice", "Kernel", "choose_path", "explain", "kernels", "why_not_triton"],
        "linear": ["linear_attention"],
        "local": ["local_attention"],
        "moe": ["StackedExperts", "expert_dispatch", "stack_experts"],
        "quant": [
            "IntegerLinear",
            "fake_quantize",
            "has_vnni",
            "int_matmul",
            "integer_linear",
            "quantize_int8",
        ],
        "scan": ["selective_scan"],
        "sparse": ["apply_mask", "magnitude_mask", "merge_mask"],
        "tokens": [
            "TokenKeyValues",
            "complement_indices",
            "gather_tokens",
            "partial_attention",
            "scatter_tokens",
        ],
    },
)
