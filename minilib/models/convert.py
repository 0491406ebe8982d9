"""DiT weights from and to two public code bases: ``facebookresearch/DiT`` and diffusers' ``DiTTransformer2DModel``.

A conversion is a table with one row for each tensor of minilib's state dict; the row says which tensors of
the other side hold the same numbers, and how. The same table serves both directions, so a round trip is
exact.

What differs (read in ``facebookresearch/DiT: models.py`` and in diffusers 0.42,
``models/transformers/dit_transformer_2d.py``):

- The patch embedding is a strided convolution there, a linear layer on flattened patches here: the weight is
reshaped. - facebookresearch stores the fixed positions in the checkpoint. They must be the sine-cosine ones.
- diffusers splits q, k and v into three layers. - diffusers keeps a copy of the time and label embedders in
*every* block, and uses each block's own. Going there, each block gets
  the same copy. Coming back, the copies must agree; a model whose copies were trained apart is another model.
- The waves of diffusers' time embedding have slightly other frequencies (exponent i/127, not i/128). No
change of weights can
  undo that, so it is an option of the model, ``frequency_shift``.
- diffusers' norm before the feed-forward network has epsilon 1e-5 by default, all others 1e-6:
``mlp_norm_eps``.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dit import DiT
from .state_dicts import (
    ConversionError,
    Row,
    StateDict,
    check_state,
    linear_rows,
    some_names,
    to_ours,
    to_theirs,
)


def facebook_table(depth: int) -> list[Row]:
    """The rows for ``facebookresearch/DiT``, without its ``pos_embed``."""
    rows = [
        Row("x_embedder.proj.weight", ("x_embedder.proj.weight",), "patch"),
        Row("x_embedder.proj.bias", ("x_embedder.proj.bias",)),
        *linear_rows("t_embedder.fc1", "t_embedder.mlp.0"),
        *linear_rows("t_embedder.fc2", "t_embedder.mlp.2"),
        Row("y_embedder.weight", ("y_embedder.embedding_table.weight",)),
        *linear_rows("final_layer.linear", "final_layer.linear"),
        *linear_rows("final_layer.adaLN_modulation", "final_layer.adaLN_modulation.1"),
    ]
    for i in range(depth):
        block = f"blocks.{i}"
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            rows += linear_rows(f"{block}.{layer}", f"{block}.{layer}")
        rows += linear_rows(f"{block}.adaLN_modulation", f"{block}.adaLN_modulation.1")
    return rows


def diffusers_table(depth: int) -> list[Row]:
    """The rows for diffusers' ``DiTTransformer2DModel``."""
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]

    def in_every_block(name: str) -> tuple[str, ...]:
        return tuple(f"{block}.norm1.emb.{name}" for block in blocks)

    rows = [
        Row("x_embedder.proj.weight", ("pos_embed.proj.weight",), "patch"),
        Row("x_embedder.proj.bias", ("pos_embed.proj.bias",)),
        *linear_rows("t_embedder.fc1", *in_every_block("timestep_embedder.linear_1"), kind="copies"),
        *linear_rows("t_embedder.fc2", *in_every_block("timestep_embedder.linear_2"), kind="copies"),
        Row("y_embedder.weight", in_every_block("class_embedder.embedding_table.weight"), "copies"),
        *linear_rows("final_layer.adaLN_modulation", "proj_out_1"),
        *linear_rows("final_layer.linear", "proj_out_2"),
    ]
    for i, block in enumerate(blocks):
        qkv = [f"{block}.attn1.to_{name}" for name in "qkv"]
        rows += linear_rows(f"blocks.{i}.attn.qkv", *qkv, kind="split")
        rows += linear_rows(f"blocks.{i}.attn.proj", f"{block}.attn1.to_out.0")
        rows += linear_rows(f"blocks.{i}.mlp.fc1", f"{block}.ff.net.0.proj")
        rows += linear_rows(f"blocks.{i}.mlp.fc2", f"{block}.ff.net.2")
        rows += linear_rows(f"blocks.{i}.adaLN_modulation", f"{block}.norm1.linear")
    return rows


def _require_plain(model: DiT) -> None:
    config = model.config
    plain = {"mlp": "gelu", "mlp_options": None, "qk_norm": False}
    for name, value in plain.items():
        if config[name] != value:
            raise ConversionError(
                f"only a plain DiT converts: {name} is {config[name]!r}, it has to be {value!r}"
            )


def to_facebook(model: DiT) -> dict[str, Tensor]:
    """The state dict that ``facebookresearch/DiT``'s model of the same configuration loads.

    Raises:
        ConversionError: the model has parts or constants the official one has not.
    """
    _require_plain(model)
    for name, value in (("frequency_shift", 0.0), ("mlp_norm_eps", 1e-6)):
        if model.config[name] != value:
            raise ConversionError(
                f"the official DiT has {name} = {value}, this model has {model.config[name]}"
            )
    state = to_theirs(model.state_dict(), facebook_table(len(model.blocks)), patch_size=model.patch_size)
    return {"pos_embed": model.pos_embed[None].detach().clone(), **state}


def from_facebook(state: StateDict, *, num_heads: int) -> DiT:
    """A DiT with the weights of a ``facebookresearch/DiT`` checkpoint, in eval mode.

    Args:
        state: the state dict (of ``DiT-XL-2-256x256.pt``, say, as ``torch.load`` gives it).
        num_heads: attention heads, the one thing that the shapes do not tell; 16 for DiT-XL.

    Raises:
        ConversionError: missing or unexpected keys, a wrong shape, or positions that are not the fixed
            sine-cosine ones.
    """
    config = _facebook_config(state, num_heads)
    with torch.device("meta"):
        blank = DiT(**config)
    check_state(state, to_facebook(blank), "facebookresearch/DiT")
    model = DiT(**config)
    positions = state["pos_embed"][0]
    error = float((positions.float() - model.pos_embed).abs().max())
    if not error <= (1e-5 if positions.dtype in (torch.float32, torch.float64) else 1e-2):
        raise ConversionError(
            f"pos_embed is not the fixed sine-cosine embedding: largest difference {error:.3g}"
        )
    model.load_state_dict(to_ours(state, facebook_table(config["depth"])))
    model.pos_embed.copy_(positions)
    return model.to(positions.dtype).eval()


def _facebook_config(state: StateDict, num_heads: int) -> dict[str, Any]:
    needed = (
        "pos_embed",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
    )
    needed += ("blocks.0.mlp.fc1.weight",)
    missing = [name for name in needed if name not in state]
    if missing:
        raise ConversionError(f"this is no facebookresearch/DiT state dict; missing: {some_names(missing)}")
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    grid_size = round(state["pos_embed"].shape[1] ** 0.5)
    out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
    if out_channels not in (in_channels, 2 * in_channels):
        raise ConversionError(
            f"{out_channels} output channels for {in_channels} input channels: expected 1 or 2 times"
        )
    indices = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    return {
        "input_size": grid_size * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": max(indices) + 1,
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }


def to_diffusers(model: DiT, *, other_frequencies: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and constructor arguments of the ``DiTTransformer2DModel`` that computes what ``model`` computes.

    Args:
        model: a plain DiT with ``frequency_shift=1``.
        other_frequencies: convert a model with ``frequency_shift=0`` all the same. diffusers will use its own
            waves for the time embedding, so the outputs will differ a little.

    Raises:
        ConversionError: the model has parts or constants that diffusers' model has not.
    """
    _require_plain(model)
    c = model.config
    if c["frequency_shift"] != 1 and not other_frequencies:
        raise ConversionError(
            f"frequency_shift is {c['frequency_shift']}, diffusers computes with 1: its outputs would differ; "
            "pass other_frequencies=True if you accept that"
        )
    if c["mlp_ratio"] != 4:
        raise ConversionError(f"mlp_ratio is {c['mlp_ratio']}, diffusers' DiT has 4")
    config = {
        "num_attention_heads": c["num_heads"],
        "attention_head_dim": c["hidden_size"] // c["num_heads"],
        "in_channels": c["in_channels"],
        "out_channels": model.out_channels,
        "num_layers": c["depth"],
        "sample_size": c["input_size"],
        "patch_size": c["patch_size"],
        "num_embeds_ada_norm": c["num_classes"],
        "norm_eps": c["mlp_norm_eps"],
    }
    table = diffusers_table(c["depth"])
    return to_theirs(model.state_dict(), table, patch_size=model.patch_size), config


_DIFFUSERS_FIXED = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def from_diffusers(state: StateDict, config: Mapping[str, Any]) -> DiT:
    """A DiT with the weights of a diffusers ``DiTTransformer2DModel``, in eval mode.

    Args:
        state: its state dict.
        config: its ``config``. Arguments left out have diffusers' defaults.

    Raises:
        ConversionError: missing or unexpected keys, a wrong shape, embedders that differ between blocks, or
            an option that minilib's DiT has not.
    """
    for name, value in _DIFFUSERS_FIXED.items():
        if config.get(name, value) != value:
            raise ConversionError(f"{name} is {config[name]!r} there, only {value!r} converts")
    in_channels = config.get("in_channels", 4)
    out_channels = config.get("out_channels") or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise ConversionError(
            f"{out_channels} output channels for {in_channels} input channels: expected 1 or 2 times"
        )
    ours = {
        "input_size": config.get("sample_size", 32),
        "patch_size": config.get("patch_size", 2),
        "in_channels": in_channels,
        "hidden_size": config.get("num_attention_heads", 16) * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "num_heads": config.get("num_attention_heads", 16),
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "learn_sigma": out_channels == 2 * in_channels,
        "frequency_shift": 1.0,
        "mlp_norm_eps": config.get("norm_eps", 1e-5),
    }
    with torch.device("meta"):
        blank = DiT(**ours)
    check_state(state, to_diffusers(blank)[0], "DiTTransformer2DModel")
    model = DiT(**ours)
    model.load_state_dict(to_ours(state, diffusers_table(ours["depth"])))
    return model.to(next(iter(state.values())).dtype).eval()
