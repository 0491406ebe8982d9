"""Pruning: which parts of a model can go, chosen by scores or learned, and a smaller model without them."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "depth": [
            "NMGates",
            "block_influence",
            "depth_candidates",
            "drop_blocks",
            "gated_blocks",
            "gumbel_noise",
            "gumbel_temperature",
            "keep_highest",
            "mask_patterns",
            "one_hot_mask",
        ],
        "masks": [
            "HardConcreteMasks",
            "Layout",
            "Site",
            "alive_probability",
            "find_sites",
            "hard_concrete",
            "keep_top",
            "maskable_parameters",
            "masked",
            "ones",
            "removed_parameters",
        ],
        "scores": ["activation_magnitude", "contribution", "weight_magnitude"],
        "shrink": ["shrink_model", "shrunk_parameters"],
    },
)
