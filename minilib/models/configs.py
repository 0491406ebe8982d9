"""The published sizes, as keyword arguments of ``DiT``, for 32 x 32 x 4 latents and the 1000 classes of ImageNet."""

from typing import Any

_SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "G": (1408, 40, 16),
}


def _latent_dit(size: str, patch_size: int) -> dict[str, Any]:
    hidden_size, depth, num_heads = _SIZES[size]
    return {
        "input_size": 32,
        "patch_size": patch_size,
        "in_channels": 4,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": 1000,
    }


#: Peebles and Xie 2023, table 1; ``DiT(**DIT_CONFIGS["DiT-XL/2"])``.
DIT_CONFIGS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch_size}": _latent_dit(size, patch_size)
    for size in ("S", "B", "L", "XL")
    for patch_size in (2, 4, 8)
}

#: Fei et al. 2024, table 1: 8E2A are 8 experts, of which each token activates 2.
DIT_MOE_CONFIGS: dict[str, dict[str, Any]] = {
    f"DiT-MoE-{size}/2-{num_experts}E2A": {
        **_latent_dit(size, 2),
        "mlp": "moe",
        "mlp_options": {"num_experts": num_experts, "k": 2},
    }
    for size, num_experts in (("S", 8), ("S", 16), ("B", 8), ("L", 8), ("XL", 8), ("G", 16))
}
