"""The released sizes of Stable Diffusion 3, and how a diffusers configuration becomes one of ``MMDiT``."""

from collections.abc import Mapping
from typing import Any

from .state_dicts import ConversionError

#: The defaults of diffusers' ``SD3Transformer2DModel`` (``models/transformers/transformer_sd3.py``, diffusers 0.42).
SD3_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}


def _released(depth: int, pos_embed_max_size: int, **options: Any) -> dict[str, Any]:
    return {
        **SD3_DEFAULTS,
        "num_layers": depth,
        "num_attention_heads": depth,
        "caption_projection_dim": 64 * depth,
        "pos_embed_max_size": pos_embed_max_size,
        **options,
    }


#: The ``config.json`` of the released transformers, in diffusers' names: ``MMDiT.from_diffusers_config(SD3_CONFIGS[...])``.
SD3_CONFIGS: dict[str, dict[str, Any]] = {
    "SD3-medium": _released(24, 192),
    "SD3.5-medium": _released(24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "SD3.5-large": _released(38, 192, qk_norm="rms_norm"),
}


def mmdit_config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``MMDiT`` for a diffusers ``SD3Transformer2DModel``'s ``config``.

    Arguments left out have diffusers' defaults; names that begin with an underscore, which diffusers stores for
    itself, are passed over.

    Raises:
        ConversionError: an unknown name, or a value that minilib's MM-DiT has not.

    >>> mmdit_config_from_diffusers(SD3_CONFIGS["SD3-medium"])["hidden_size"]
    1536
    """
    unknown = sorted(k for k in config if k not in SD3_DEFAULTS and not k.startswith("_"))
    if unknown:
        raise ConversionError(
            f"unknown options {unknown}: an SD3Transformer2DModel has {sorted(SD3_DEFAULTS)}"
        )
    c = {**SD3_DEFAULTS, **config}
    hidden_size = c["num_attention_heads"] * c["attention_head_dim"]
    if c["caption_projection_dim"] != hidden_size:
        raise ConversionError(
            f"caption_projection_dim is {c['caption_projection_dim']}, it has to be the width of a token, {hidden_size}"
        )
    if c["qk_norm"] not in (None, "rms_norm"):
        raise ConversionError(f"qk_norm is {c['qk_norm']!r}, only None and 'rms_norm' convert")
    if not c["pos_embed_max_size"]:
        raise ConversionError("pos_embed_max_size is missing: only a position table that is cropped converts")
    return {
        "sample_size": c["sample_size"],
        "patch_size": c["patch_size"],
        "in_channels": c["in_channels"],
        "hidden_size": hidden_size,
        "depth": c["num_layers"],
        "num_heads": c["num_attention_heads"],
        "context_dim": c["joint_attention_dim"],
        "pooled_dim": c["pooled_projection_dim"],
        "qk_norm": c["qk_norm"] or "",
        "positions": "sincos_cropped",
        "pos_embed_max_size": c["pos_embed_max_size"],
        "dual_attention_layers": list(c["dual_attention_layers"]),
        "out_channels": c["out_channels"] or c["in_channels"],
        "unused_context_query": True,
    }


def mmdit_config_to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``SD3Transformer2DModel`` arguments for an ``MMDiT`` with this ``config``.

    Raises:
        ConversionError: an option that diffusers' model has not.
    """
    fixed = {"positions": "sincos_cropped", "mlp_ratio": 4.0, "unused_context_query": True}
    for name, value in fixed.items():
        if config[name] != value:
            raise ConversionError(f"{name} is {config[name]!r}, diffusers' SD3 has {value!r}")
    if config["pooled_dim"] is None:
        raise ConversionError("pooled_dim is None, diffusers' SD3 needs a pooled text vector")
    return {
        "sample_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": config["in_channels"],
        "num_layers": config["depth"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "num_attention_heads": config["num_heads"],
        "joint_attention_dim": config["context_dim"],
        "caption_projection_dim": config["hidden_size"],
        "pooled_projection_dim": config["pooled_dim"],
        "out_channels": config["out_channels"] or config["in_channels"],
        "pos_embed_max_size": config["pos_embed_max_size"],
        "dual_attention_layers": tuple(config["dual_attention_layers"]),
        "qk_norm": config["qk_norm"] or None,
    }
