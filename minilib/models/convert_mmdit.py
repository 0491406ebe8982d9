"""MM-DiT weights from and to diffusers' ``SD3Transformer2DModel`` (Stable Diffusion 3 and 3.5).

One table serves both directions, so that a round trip is exact. What differs (read in diffusers 0.42,
``models/transformers/transformer_sd3.py``, ``attention.py: JointTransformerBlock``, ``embeddings.py: PatchEmbed``):

- The patch embedding is a strided convolution there, a linear layer on flattened patches here.
- diffusers has q, k and v of each stream in three layers.
- The last block's text stream has a query projection there whose result is thrown away. A converted model keeps its
  weights (``unused_context_query``) and does not compute with them.
- The norm before the output, and the text's in the last block, have (scale, shift) there and (shift, scale) here.
- The position table is stored with the weights, on both sides.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .mmdit import MMDiT
from .mmdit_configs import mmdit_config_from_diffusers, mmdit_config_to_diffusers
from .state_dicts import Row, StateDict, check_state, linear_rows, to_ours, to_theirs


def sd3_table(config: Mapping[str, Any]) -> list[Row]:
    """The rows for an ``MMDiT`` with this ``config``."""
    rows = [
        Row("x_embedder.proj.weight", ("pos_embed.proj.weight",), "patch"),
        Row("x_embedder.proj.bias", ("pos_embed.proj.bias",)),
        Row("positions.table", ("pos_embed.pos_embed",)),
        *linear_rows("context_embedder", "context_embedder"),
        *linear_rows("final_layer.adaLN_modulation", "norm_out.linear"),
        *linear_rows("final_layer.linear", "proj_out"),
    ]
    for ours, theirs in (("t_embedder", "timestep_embedder"), ("pooled_embedder", "text_embedder")):
        for i in (1, 2):
            rows += linear_rows(f"{ours}.fc{i}", f"time_text_embed.{theirs}.linear_{i}")
    for i in range(config["depth"]):
        rows += _block_rows(config, i)
    return rows


def _block_rows(config: Mapping[str, Any], i: int) -> list[Row]:
    ours, theirs, last = f"blocks.{i}", f"transformer_blocks.{i}", i == config["depth"] - 1
    rows = [
        *linear_rows(f"{ours}.adaLN_modulation", f"{theirs}.norm1.linear"),
        *linear_rows(f"{ours}.context_adaLN_modulation", f"{theirs}.norm1_context.linear"),
        *_attention_rows(f"{ours}.attn", f"{theirs}.attn", config),
    ]
    added = [f"{theirs}.attn.add_{part}_proj" for part in "qkv"]
    rows += linear_rows(f"{ours}.attn.context_qkv", *added, kind="split")
    if config["qk_norm"]:
        rows += [
            Row(f"{ours}.attn.context_{p}_norm.weight", (f"{theirs}.attn.norm_added_{p}.weight",))
            for p in "qk"
        ]
    if i in config["dual_attention_layers"]:
        rows += _attention_rows(f"{ours}.attn2", f"{theirs}.attn2", config)
    if not last:
        rows += linear_rows(f"{ours}.attn.context_proj", f"{theirs}.attn.to_add_out")
    for mlp, ff in (("mlp", "ff"), *(() if last else (("context_mlp", "ff_context"),))):
        rows += linear_rows(f"{ours}.{mlp}.fc1", f"{theirs}.{ff}.net.0.proj")
        rows += linear_rows(f"{ours}.{mlp}.fc2", f"{theirs}.{ff}.net.2")
    return rows


def _attention_rows(ours: str, theirs: str, config: Mapping[str, Any]) -> list[Row]:
    rows = linear_rows(f"{ours}.qkv", *(f"{theirs}.to_{part}" for part in "qkv"), kind="split")
    rows += linear_rows(f"{ours}.proj", f"{theirs}.to_out.0")
    if config["qk_norm"]:
        rows += [Row(f"{ours}.{part}_norm.weight", (f"{theirs}.norm_{part}.weight",)) for part in "qk"]
    return rows


def _swap_halves(state: StateDict, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """(shift, scale) to (scale, shift), in minilib's names; its own inverse."""
    names = ("final_layer.adaLN_modulation", f"blocks.{config['depth'] - 1}.context_adaLN_modulation")
    swapped = dict(state)
    for name in (f"{layer}.{part}" for layer in names for part in ("weight", "bias")):
        swapped[name] = torch.cat(swapped[name].chunk(2)[::-1])
    return swapped


def mmdit_to_diffusers(model: MMDiT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and constructor arguments of the ``SD3Transformer2DModel`` that computes what ``model`` computes.

    Raises:
        ConversionError: the model has parts that diffusers' model has not (rotary positions, say).
    """
    config = mmdit_config_to_diffusers(model.config)
    ours = _swap_halves(model.state_dict(), model.config)
    state = to_theirs(ours, sd3_table(model.config), patch_size=model.patch_size)
    state["pos_embed.pos_embed"] = state["pos_embed.pos_embed"][None]
    return state, config


def mmdit_from_diffusers(state: StateDict, config: Mapping[str, Any]) -> MMDiT:
    """An MM-DiT with the weights of a diffusers ``SD3Transformer2DModel``, in eval mode and of the weights' dtype.

    Weights are taken over, not copied into a second model, where both sides store them alike.

    Args:
        state: its state dict (``safetensors`` shards merged into one dictionary).
        config: its ``config``, the content of ``config.json``. Arguments left out have diffusers' defaults.

    Raises:
        ConversionError: missing or unexpected keys, a wrong shape, or an option that minilib's MM-DiT has not.
    """
    with torch.device("meta"):
        model = MMDiT(**mmdit_config_from_diffusers(config))
    check_state(state, mmdit_to_diffusers(model)[0], "SD3Transformer2DModel")
    ours = to_ours(state, sd3_table(model.config))
    ours["positions.table"] = ours["positions.table"][0]
    model.load_state_dict(_swap_halves(ours, model.config), assign=True)
    return model.eval()
