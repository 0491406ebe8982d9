"""Autoencoder weights and configurations from and to diffusers' ``AutoencoderKL``, the format of Stable Diffusion 1 to 3.

Names are almost the same on both sides. What differs (read in diffusers 0.42, ``models/autoencoders/autoencoder_kl.py``,
``models/autoencoders/vae.py``, ``models/modeling_utils.py``):

- the queries, keys and values of the middle's attention are one linear layer here and three there.
- its norm is ``norm`` here and ``group_norm`` there, its last layer ``proj`` here and ``to_out.0`` there.
- checkpoints older than diffusers 0.13, Stable Diffusion 1's among them, have ``query``, ``key``, ``value`` and
  ``proj_attn`` for these layers; they are read too.
- no shift is ``None`` there, 0 here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .state_dicts import (
    ConversionError,
    Row,
    StateDict,
    check_state,
    linear_rows,
    refuse_other_options,
    to_ours,
    to_theirs,
)
from .vae import ConvVAE

#: Options of ``AutoencoderKL`` that change what it computes, and the one value that this autoencoder computes with.
FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
#: Options that say nothing about what is computed.
IRRELEVANT = {"force_upcast", "sample_size"}
#: Options that are translated, with diffusers' defaults.
TRANSLATED: dict[str, Any] = {
    "block_out_channels": (64,),
    "down_block_types": ("DownEncoderBlock2D",),
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "up_block_types": ("UpDecoderBlock2D",),
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
#: Names in older checkpoints.
DEPRECATED = (
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
)


def vae_config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``ConvVAE`` for a configuration of ``AutoencoderKL``; options left out have diffusers' defaults.

    Args:
        config: the contents of a ``config.json`` (keys that begin with an underscore are ignored), or the
            constructor's arguments.

    Raises:
        ConversionError: an option that this autoencoder does not have; the message names it.
    """
    refuse_other_options(config, "AutoencoderKL", "this autoencoder", FIXED, IRRELEVANT | TRANSLATED.keys())
    c = {name: config.get(name, default) for name, default in TRANSLATED.items()}
    levels = len(c["block_out_channels"])
    for name in ("down_block_types", "up_block_types"):
        wanted = [TRANSLATED[name][0]] * levels
        if list(c[name]) != wanted:
            raise ConversionError(f"{name} has to be {wanted} for {levels} levels, got {list(c[name])}")
    if c["use_quant_conv"] != c["use_post_quant_conv"]:
        raise ConversionError("use_quant_conv and use_post_quant_conv differ: here both are there, or none")
    same = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    return {name: c[name] for name in same} | {
        "block_out_channels": list(c["block_out_channels"]),
        "mid_attention": c["mid_block_add_attention"],
        "quant_conv": c["use_quant_conv"],
        "scaling_factor": c["scaling_factor"],
        "shift_factor": c["shift_factor"] or 0.0,
    }


def vae_config_to_diffusers(model: ConvVAE) -> dict[str, Any]:
    """Constructor arguments of the ``AutoencoderKL`` that computes what ``model`` computes."""
    c = model.config
    levels = len(c["block_out_channels"])
    same = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    return {name: c[name] for name in same} | {
        "block_out_channels": tuple(c["block_out_channels"]),
        "down_block_types": TRANSLATED["down_block_types"] * levels,
        "up_block_types": TRANSLATED["up_block_types"] * levels,
        "mid_block_add_attention": c["mid_attention"],
        "use_quant_conv": c["quant_conv"],
        "use_post_quant_conv": c["quant_conv"],
        "scaling_factor": c["scaling_factor"],
        "shift_factor": c["shift_factor"] or None,
    }


def vae_table(model: ConvVAE) -> list[Row]:
    """One row for each tensor of ``model``, with its name or names in diffusers."""
    rows, attentions = [], []
    for name in model.state_dict():
        layer, dot, part = name.partition(".attentions.0.")
        if not dot:
            rows.append(Row(name, (name,)))
        elif part == "norm.weight":
            attentions.append(f"{layer}.attentions.0")
    for attention in attentions:
        rows += linear_rows(f"{attention}.norm", f"{attention}.group_norm")
        queries = [f"{attention}.to_{which}" for which in "qkv"]
        rows += linear_rows(f"{attention}.attn.qkv", *queries, kind="split")
        rows += linear_rows(f"{attention}.attn.proj", f"{attention}.to_out.0")
    return rows


def vae_to_diffusers(model: ConvVAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and constructor arguments of the ``AutoencoderKL`` that computes what ``model`` computes."""
    return to_theirs(model.state_dict(), vae_table(model)), vae_config_to_diffusers(model)


def vae_from_diffusers(state: StateDict, config: Mapping[str, Any]) -> ConvVAE:
    """An autoencoder with the weights of an ``AutoencoderKL``, in eval mode and in the weights' dtype.

    Args:
        state: the state dict (of ``vae/diffusion_pytorch_model.safetensors`` of SD 1.5, say).
        config: the contents of the ``config.json`` beside it.

    Raises:
        ConversionError: an option this autoencoder does not have, missing or unexpected keys, or a wrong shape.
    """
    with torch.device("meta"):
        model = ConvVAE.from_diffusers_config(config)
    table = vae_table(model)
    state = {_current_name(name): tensor for name, tensor in state.items()}
    check_state(state, to_theirs(model.state_dict(), table), "AutoencoderKL")
    copies = {name: tensor.clone() for name, tensor in to_ours(state, table).items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def _current_name(name: str) -> str:
    if ".attentions." in name:
        for old, new in DEPRECATED:
            name = name.replace(old, new)
    return name
