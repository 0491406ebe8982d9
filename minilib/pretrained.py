"""One setting for the model of a page: a name of the zoo, or real weights from the Hugging Face hub or from a folder.

Real weights come in diffusers' layout, ``config.json`` beside safetensors, and are converted to this library's models. So a page
that acts on ``load_pretrained("unet_shapes32")`` acts, in a ``gpu`` run with a network, on
``load_pretrained("hub:stable-diffusion-v1-5/stable-diffusion-v1-5/unet")``: the same class, with the same parts to hook into.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HUB, FOLDER = "hub:", "folder:"
WEIGHTS = "diffusion_pytorch_model"

Convert = Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module]


class PretrainedError(RuntimeError):
    """Real weights cannot be had; the message says why and what to do."""


def load_pretrained(name: str, device: torch.device | str = "cpu", *, variant: str = "") -> nn.Module:
    """A model in eval mode, its parameters frozen.

    Args:
        name: a model of the zoo; or ``hub:OWNER/NAME``, if need be with ``/SUBFOLDER`` and ``@REVISION``; or ``folder:PATH`` of a
            folder with ``config.json`` and weights.
        device: where the model should be.
        variant: of the files of real weights, ``"fp16"`` for instance; they keep their dtype. Models of the zoo are float32.

    Raises:
        PretrainedError: no network, no such repository or file, or a class that does not convert.
        minilib.zoo.UnknownCheckpoint: the zoo has no model of that name.
        minilib.models.ConversionError: weights or options that this library's model has not.
    """
    if name.startswith(HUB):
        model = from_folder(_download(name, variant), variant)
    elif name.startswith(FOLDER):
        model = from_folder(Path(name.removeprefix(FOLDER)).expanduser(), variant)
    else:
        from minilib import zoo

        return zoo.load(name, device)
    return model.to(device).requires_grad_(False)


def from_folder(folder: Path, variant: str = "") -> nn.Module:
    """The model of a folder with ``config.json`` and ``diffusion_pytorch_model[.variant].safetensors``, whole or in shards.

    Raises:
        PretrainedError: a file is missing, or the class of the configuration does not convert.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise PretrainedError(
            f"{folder} has no config.json; name the folder of one model, such as .../unet or .../transformer"
        )
    config = json.loads(path.read_text())
    name, known = config.get("_class_name"), converters()
    if name not in known:
        raise PretrainedError(f"{path} is of a {name!r}; these convert: {', '.join(sorted(known))}")
    state = _read(folder, variant)
    return known[name](state, {key: value for key, value in config.items() if not key.startswith("_")})


def converters() -> dict[str, Convert]:
    """By diffusers' name of the class: what turns a state dict and a configuration into this library's model."""
    from minilib import models

    return {
        "AutoencoderKL": models.vae_from_diffusers,
        "DiTTransformer2DModel": models.from_diffusers,
        "SD3Transformer2DModel": models.mmdit_from_diffusers,
        "Transformer2DModel": models.from_diffusers,  # what DiT was called when its weights were published
        "UNet2DConditionModel": models.unet_from_diffusers,
    }


def _read(folder: Path, variant: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    stem = f"{WEIGHTS}.{variant}" if variant else WEIGHTS
    whole = folder / f"{stem}.safetensors"
    index = folder / ".".join(part for part in (WEIGHTS, "safetensors.index", variant, "json") if part)
    if whole.is_file():
        return load_file(whole)
    if not index.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise PretrainedError(
            f"{folder} has neither {whole.name} nor {index.name}, but {there}; only safetensors are read"
        )
    state: dict[str, Tensor] = {}
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        if not (folder / shard).is_file():
            raise PretrainedError(f"{index} names {shard}, which is not there")
        state |= load_file(folder / shard)
    return state


def _download(name: str, variant: str) -> Path:
    """The folder of a model in the hub's cache, with its configuration and weights and nothing else."""
    match = re.fullmatch(r"hub:([^/@]+/[^/@]+)(?:/([^@]*[^@/]))?/?(?:@(.+))?", name)
    if not match:
        raise PretrainedError(
            f"{name!r} is no address; expected hub:OWNER/NAME, with /SUBFOLDER and @REVISION if need be"
        )
    repository, subfolder, revision = match.groups()
    from huggingface_hub import snapshot_download

    stem = f"{WEIGHTS}.{variant}" if variant else WEIGHTS
    files = [f"{stem}.safetensors", f"{stem}-*.safetensors"]
    files += ["config.json", f"{WEIGHTS}.safetensors.index*.json"]
    within = f"{subfolder}/" if subfolder else ""
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=[within + file for file in files]
        )
    except Exception as error:  # the client raises a dozen unrelated types for "no network"
        raise PretrainedError(
            f"{name} cannot be had from the Hugging Face hub ({type(error).__name__}: {error}); "
            "offline, use a model of the zoo or folder:PATH"
        ) from error
    return Path(folder) / within
