"""U-Net weights and configurations from and to diffusers' ``UNet2DConditionModel``, the format of Stable Diffusion 1 and 2.

Names are almost the same on both sides. What differs (read in diffusers 0.42, ``models/unets/unet_2d_condition.py``,
``models/transformers/transformer_2d.py``, ``models/attention.py``):

- ``proj_in`` and ``proj_out`` of a transformer are linear layers here. There they are 1x1 convolutions (SD 1) or
  linear layers (SD 2, ``use_linear_projection``): the weight is reshaped.
- ``attn1.to_out.0`` there is ``attn1.to_out`` here; ``ff.net.0.proj`` and ``ff.net.2`` are ``ff.proj`` and ``ff.out``.
- ``class_embedding`` with ``class_embed_type="projection"`` is ``pooled_embedding`` here.
- ``attention_head_dim`` there means the *number* of heads; the misnomer is theirs, and public checkpoints depend on it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .state_dicts import (
    ConversionError,
    Row,
    StateDict,
    check_state,
    refuse_other_options,
    to_ours,
    to_theirs,
)
from .unet import UNet

#: Options of ``UNet2DConditionModel`` that change what it computes, and the one value that this U-Net computes with.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
#: Options that say nothing about what is computed (``upcast_attention``: softmax is taken in float32 here anyway).
IRRELEVANT = {"addition_embed_type_num_heads", "addition_time_embed_dim", "sample_size", "upcast_attention"}
#: Options that are translated, with diffusers' defaults.
TRANSLATED: dict[str, Any] = {
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "class_embed_type": None,
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": False,
}


def unet_config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``UNet`` for a configuration of ``UNet2DConditionModel``; options left out have diffusers' defaults.

    Args:
        config: the contents of a ``config.json`` (keys that begin with an underscore are ignored), or the
            constructor's arguments.

    Raises:
        ConversionError: an option that this U-Net does not have; the message names it.
    """
    refuse_other_options(config, "UNet2DConditionModel", "this U-Net", FIXED, IRRELEVANT | TRANSLATED.keys())
    c = {name: _one_value(name, config.get(name, default)) for name, default in TRANSLATED.items()}
    levels = len(c["block_out_channels"])
    size = config.get("sample_size")
    return {
        "sample_size": size if isinstance(size, int) else max(size) if size else 64,
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "block_out_channels": list(c["block_out_channels"]),
        "layers_per_block": c["layers_per_block"],
        "attention_levels": _attention_levels(c["down_block_types"], c["up_block_types"], levels),
        "num_heads": c["attention_head_dim"],
        "transformer_layers": c["transformer_layers_per_block"],
        "cross_attention_dim": c["cross_attention_dim"],
        "norm_num_groups": c["norm_num_groups"],
        "norm_eps": c["norm_eps"],
        "pooled_dim": _pooled_dim(c["class_embed_type"], c["projection_class_embeddings_input_dim"]),
    }


def _one_value(name: str, value: Any) -> Any:
    """A list of equal numbers, one a level, is one number where this U-Net has one for all levels."""
    if name in ("layers_per_block", "cross_attention_dim") and isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ConversionError(f"{name} has to be the same at every level here, got {value}")
        return value[0]
    if name == "norm_num_groups" and value is None:
        raise ConversionError("norm_num_groups is None: this U-Net always normalises")
    return list(value) if isinstance(value, (list, tuple)) else value


def _attention_levels(down: Iterable[str], up: Iterable[str], levels: int) -> list[int]:
    down, up = list(down), list(up)
    known = {
        "CrossAttnDownBlock2D": True,
        "DownBlock2D": False,
        "CrossAttnUpBlock2D": True,
        "UpBlock2D": False,
    }
    unknown = sorted(set(down + up) - known.keys())
    if unknown:
        raise ConversionError(f"unknown block types {unknown}: this U-Net has {sorted(known)}")
    with_attention = [known[name] for name in down]
    if [known[name] for name in reversed(up)] != with_attention or len(down) != levels:
        raise ConversionError(
            f"encoder and decoder have to have attention at the same of {levels} levels, got {down} and {up}"
        )
    return [level for level in range(levels) if with_attention[level]]


def _pooled_dim(kind: str | None, width: int | None) -> int:
    if kind is None:
        return 0
    if kind != "projection" or not width:
        raise ConversionError(
            f"class_embed_type is {kind!r} (width {width}): this U-Net has None and 'projection'"
        )
    return width


def unet_config_to_diffusers(model: UNet, *, use_linear_projection: bool = False) -> dict[str, Any]:
    """Constructor arguments of the ``UNet2DConditionModel`` that computes what ``model`` computes.

    Raises:
        ConversionError: the model has parts that diffusers' has not.
    """
    c = model.config
    for name, value in (("attention_positions", False), ("patch_size", 1)):
        if c[name] != value:
            raise ConversionError(f"diffusers' U-Net has {name} = {value}, this model has {c[name]}")
    if not c["cross_attention_dim"]:
        raise ConversionError("diffusers' U-Net always reads text: cross_attention_dim is 0 here")
    levels = range(len(c["block_out_channels"]))
    cross = ["CrossAttn" if level in c["attention_levels"] else "" for level in levels]
    pooled = c["pooled_dim"]
    return {
        "sample_size": c["sample_size"],
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "block_out_channels": tuple(c["block_out_channels"]),
        "layers_per_block": c["layers_per_block"],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in cross),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(cross)),
        "attention_head_dim": _tuple(c["num_heads"]),
        "transformer_layers_per_block": _tuple(c["transformer_layers"]),
        "cross_attention_dim": c["cross_attention_dim"],
        "norm_num_groups": c["norm_num_groups"],
        "norm_eps": c["norm_eps"],
        "use_linear_projection": use_linear_projection,
        **(
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": pooled}
            if pooled
            else {}
        ),
    }


def _tuple(value: int | list[int]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


RENAMED = ((".to_out.", ".to_out.0."), (".ff.proj.", ".ff.net.0.proj."), (".ff.out.", ".ff.net.2."))


def unet_table(model: UNet, *, use_linear_projection: bool = False) -> list[Row]:
    """One row for each tensor of ``model``, with its name and shape in diffusers."""
    rows = []
    for ours in model.state_dict():
        theirs = ours.replace("pooled_embedding.", "class_embedding.")
        for here, there in RENAMED:
            theirs = theirs.replace(here, there)
        projection = ours.endswith((".proj_in.weight", ".proj_out.weight")) and not use_linear_projection
        rows.append(Row(ours, (theirs,), "patch" if projection else "same"))
    return rows


def unet_to_diffusers(
    model: UNet, *, use_linear_projection: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and constructor arguments of the ``UNet2DConditionModel`` that computes what ``model`` computes.

    Args:
        model: without positions and patches.
        use_linear_projection: write the transformers' projections as linear layers (SD 2), not as convolutions.

    Raises:
        ConversionError: the model has parts that diffusers' has not.
    """
    config = unet_config_to_diffusers(model, use_linear_projection=use_linear_projection)
    table = unet_table(model, use_linear_projection=use_linear_projection)
    return to_theirs(model.state_dict(), table), config


def unet_from_diffusers(state: StateDict, config: Mapping[str, Any]) -> UNet:
    """A U-Net with the weights of a ``UNet2DConditionModel``, in eval mode and in the weights' dtype.

    Args:
        state: the state dict (of ``unet/diffusion_pytorch_model.safetensors`` of SD 1.5, say).
        config: the contents of the ``config.json`` beside it.

    Raises:
        ConversionError: an option this U-Net does not have, missing or unexpected keys, or a wrong shape.
    """
    linear = bool(config.get("use_linear_projection", False))
    with torch.device("meta"):
        model = UNet.from_diffusers_config(config)
    table = unet_table(model, use_linear_projection=linear)
    check_state(state, to_theirs(model.state_dict(), table), "UNet2DConditionModel")
    copies = {name: tensor.clone() for name, tensor in to_ours(state, table).items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()
