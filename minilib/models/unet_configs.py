"""The published sizes of Stable Diffusion's U-Nets, as keyword arguments of ``UNet``.

Read in the ``unet/config.json`` of the released checkpoints. Attention levels are the indices of ``CrossAttnDownBlock2D``
among the ``down_block_types``; what diffusers calls ``attention_head_dim`` is there the number of heads.
"""

from typing import Any

_LATENT = {"in_channels": 4, "out_channels": 4, "norm_num_groups": 32, "layers_per_block": 2}

#: ``UNet(**UNET_CONFIGS["SDXL"])``. SDXL's pooled input is its pooled text (1280) and six sizes and offsets, of 256 waves each.
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        **_LATENT,
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_levels": (0, 1, 2),
        "num_heads": 8,
        "cross_attention_dim": 768,
    },
    "SDXL": {
        **_LATENT,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_levels": (1, 2),
        "num_heads": (5, 10, 20),
        "transformer_layers": (1, 2, 10),
        "cross_attention_dim": 2048,
        "pooled_dim": 1280 + 6 * 256,
    },
}
