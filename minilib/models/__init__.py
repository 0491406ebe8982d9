"""Denoisers, and the small networks around them."""

from .configs import DIT_CONFIGS, DIT_MOE_CONFIGS
from .convert import from_diffusers, from_facebook, to_diffusers, to_facebook
from .dit import DiT, DiTBlock, FinalLayer, build_mlp
from .layers import GeluMLP, LabelEmbedder, PatchEmbed, SwiGLU, TimestepEmbedder, modulate
from .moe import (
    ExpertLoad,
    MoEFeedForward,
    MoEGate,
    Routing,
    collect_balance_loss,
    load_balance_loss,
    record_routing,
)
from .oracle import OracleClassifier
from .positions import sincos_1d, sincos_2d, timestep_embedding
from .state_dicts import ConversionError
from .upcycle import upcycle_moe

__all__ = [
    "DIT_CONFIGS",
    "DIT_MOE_CONFIGS",
    "ConversionError",
    "DiT",
    "DiTBlock",
    "ExpertLoad",
    "FinalLayer",
    "GeluMLP",
    "LabelEmbedder",
    "MoEFeedForward",
    "MoEGate",
    "OracleClassifier",
    "PatchEmbed",
    "Routing",
    "SwiGLU",
    "TimestepEmbedder",
    "build_mlp",
    "collect_balance_loss",
    "from_diffusers",
    "from_facebook",
    "load_balance_loss",
    "modulate",
    "record_routing",
    "sincos_1d",
    "sincos_2d",
    "timestep_embedding",
    "to_diffusers",
    "to_facebook",
    "upcycle_moe",
]
