"""Denoisers, and the small networks around them."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "configs": ["DIT_CONFIGS", "DIT_MOE_CONFIGS"],
        "convert": ["from_diffusers", "from_facebook", "to_diffusers", "to_facebook"],
        "convert_mmdit": ["mmdit_from_diffusers", "mmdit_to_diffusers"],
        "convert_unet": ["unet_config_from_diffusers", "unet_from_diffusers", "unet_to_diffusers"],
        "convert_vae": ["vae_config_from_diffusers", "vae_from_diffusers", "vae_to_diffusers"],
        "discriminator": ["PatchDiscriminator"],
        "dit": ["DiT", "DiTBlock", "FinalLayer", "build_mlp"],
        "efficientnet": ["EfficientNetLite0", "load_effnet_lite0"],
        "layers": ["GeluMLP", "LabelEmbedder", "PatchEmbed", "SwiGLU", "TimestepEmbedder", "modulate"],
        "mmdit": ["MMDiT"],
        "mmdit_blocks": ["MMDiTBlock"],
        "mmdit_configs": ["SD3_CONFIGS", "mmdit_config_from_diffusers"],
        "moe": [
            "ExpertLoad",
            "MoEFeedForward",
            "MoEGate",
            "Routing",
            "collect_balance_loss",
            "load_balance_loss",
            "record_routing",
        ],
        "oracle": ["OracleClassifier"],
        "positions": ["sincos_1d", "sincos_2d", "timestep_embedding"],
        "scene_oracle": ["GARBLED", "SceneOracle", "scene_cross_entropy"],
        "scene_reader": ["SceneReader"],
        "state_dicts": ["ConversionError"],
        "text": ["TextConditioned", "TextEncoder", "TextMMDiT", "TextStates", "TextUNet", "token_mask"],
        "unet": ["UNet"],
        "upcycle": ["upcycle_moe"],
        "vae": ["ConvVAE", "DiagonalGaussian"],
        "vit": ["ViT", "ViTBlock"],
    },
)
