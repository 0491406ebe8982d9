"""The generators of scenes, ``unet_shapes16``, ``unet_shapes32``, ``mmdit_shapes`` and its continuation ``mmdit_shapes32``;
and the text encoder they start from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minilib import zoo
from minilib.data import shapes
from minilib.data.shapes import sample_scenes
from minilib.recipes.base import Recipe, flow_matching, logit_normal_times, training_run
from minilib.recipes.scenes import (
    ddim_scheduler,
    evaluate_scenes,
    flow_scheduler,
    scene_batches,
    scene_grid,
    unet_scheduler,
)
from minilib.recipes.shapes import TEST_SEED, data_line
from minilib.training import Batch, FitConfig, LossFn, MakeBatch

#: The text encoder of every generator of scenes: three blocks, so that a word can learn which object it belongs to.
TEXT = {
    "vocab_size": len(shapes.VOCABULARY),
    "max_length": shapes.MAX_TOKENS,
    "dim": 96,
    "depth": 3,
    "num_heads": 4,
    "null_token": 1,
}


def _build_reader() -> nn.Module:
    from minilib.models import SceneReader

    return SceneReader(text=TEXT)


def _reading() -> LossFn:
    from minilib.models import scene_cross_entropy

    return lambda model, batch: scene_cross_entropy(model(batch["tokens"]), batch["grid"])


def caption_batches() -> MakeBatch:
    """Captions of fresh scenes of the training split, ``tokens``, and what they put into each cell, ``grid``."""

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        scenes = sample_scenes(n, generator, objects=(1, 3), split="train")
        return {"tokens": shapes.tokens(scenes), "grid": scenes.grid()}

    return make_batch


def _evaluate_reader(model: nn.Module) -> dict[str, Any]:
    from minilib.metrics import mean_scores, scene_scores

    metrics: dict[str, Any] = {"n_each": 1000}
    for objects in (1, 2, 3):
        generator = torch.Generator().manual_seed(TEST_SEED + objects)
        scenes = sample_scenes(1000, generator, objects=(objects, objects), split="test")
        scores = mean_scores(scene_scores(model.read(shapes.tokens(scenes)), scenes))
        metrics |= {f"{k}_{objects}_objects": scores[k] for k in ("scene", "object")}
    return metrics


def with_trained_text(model: nn.Module) -> nn.Module:
    """The model, its text encoder started from ``text_shapes``: as a large text-to-image model starts from a trained encoder."""
    model.text_encoder.load_state_dict(zoo.load("text_shapes").text_encoder.state_dict())
    return model


def _build_unet(patch_size: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from minilib.models import TextUNet

        unet = {
            "sample_size": 16 * patch_size,
            "block_out_channels": (24, 48, 64),
            "attention_positions": True,
            "patch_size": patch_size,
        }
        return with_trained_text(TextUNet(text=TEXT, unet=unet))

    return build


def _denoising() -> LossFn:
    from minilib.losses import denoising_loss

    return denoising_loss(unet_scheduler())


def _unet_batches(size: int) -> Callable[[], MakeBatch]:
    def batches() -> MakeBatch:
        from minilib.losses import uniform_timesteps

        return scene_batches(size, uniform_timesteps())

    return batches


def _build_mmdit() -> nn.Module:
    from minilib.models import TextMMDiT

    mmdit = {
        "sample_size": 16,
        "patch_size": 2,
        "hidden_size": 96,
        "depth": 6,
        "num_heads": 4,
        "rope_theta": 100.0,
    }
    return with_trained_text(TextMMDiT(text=TEXT, mmdit=mmdit))


def _build_mmdit_on() -> nn.Module:
    """``mmdit_shapes`` on a canvas of 32 x 32 pixels: the same weights, 16 x 16 tokens, positions at every half.

    Without interpolation it places nothing at first; with it all objects are at once in place and in their colours.
    """
    from minilib.models import TextMMDiT

    small = zoo.load("mmdit_shapes")
    model = TextMMDiT(
        small.config["text"], {**small.config["mmdit"], "sample_size": 32, "rope_interpolation": 2.0}
    )
    model.load_state_dict(small.state_dict())
    return model


def _mmdit_batches(size: int) -> Callable[[], MakeBatch]:
    return lambda: scene_batches(size, logit_normal_times())


def _unet(size: int, patch_size: int, steps: int) -> Recipe:
    name = f"unet_shapes{size}"
    return Recipe(
        summary=f"A text U-Net as in Stable Diffusion, for scenes of {size} x {size} pixels: three levels, nine skip "
        "connections, self- and cross-attention at the two lower levels and in the middle, velocity prediction on the scaled "
        "linear schedule, 10 % caption dropout.",
        config=FitConfig(
            steps=steps, batch_size=32, lr=1e-3, ema_decay=0.999, warmup=300, decay_fraction=0.4
        ),
        run=training_run(name, _build_unet(patch_size), _denoising, _unet_batches(size)),
        evaluate=evaluate_scenes(size, ddim_scheduler, "DDIM, 25 steps"),
        data=lambda: data_line(size, "one to three objects, new scenes at each step"),
        picture=scene_grid(size, ddim_scheduler),
        needs=(f"oracle_shapes{size}", "text_shapes"),
        half=True,
    )


RECIPES: dict[str, Recipe] = {
    "text_shapes": Recipe(
        summary="Reads captions of scenes: a text encoder of three blocks, trained to say what a caption puts into each of nine "
        "cells. Generators of scenes start from it.",
        config=FitConfig(steps=1000, batch_size=64, lr=1e-3, ema_decay=0.99),
        run=training_run("text_shapes", _build_reader, _reading, caption_batches),
        evaluate=_evaluate_reader,
        data=lambda: (
            "generated: captions of `minilib.data.shapes`, one to three objects, training split. Licence: Apache-2.0."
        ),
        half=True,
    ),
    "unet_shapes16": _unet(16, 1, 7_000),
    "unet_shapes32": _unet(32, 2, 12_000),
    "mmdit_shapes": Recipe(
        summary="A text MM-DiT as in Stable Diffusion 3, for scenes of 16 x 16 pixels: two streams, 64 image tokens of 2 x 2 "
        "pixels with 2-D rotary positions, width 96, 6 blocks, rectified flow with logit-normal times, 10 % caption dropout.",
        config=FitConfig(
            steps=6_000,
            batch_size=64,
            lr=1.5e-3,
            ema_decay=0.999,
            warmup=300,
            decay_fraction=0.4,
            mixed_precision="bf16",
        ),
        run=training_run("mmdit_shapes", _build_mmdit, flow_matching, _mmdit_batches(16)),
        evaluate=evaluate_scenes(16, flow_scheduler, "Euler, 25 steps"),
        data=lambda: data_line(16, "one to three objects, new scenes at each step"),
        picture=scene_grid(16, flow_scheduler),
        needs=("oracle_shapes16", "text_shapes"),
        half=True,
    ),
    "mmdit_shapes32": Recipe(
        summary="`mmdit_shapes` trained on for a short time with scenes of 32 x 32 pixels: 256 image tokens of 2 x 2 pixels, "
        "their rotary positions interpolated by 2.",
        config=FitConfig(
            steps=1_500,
            batch_size=32,
            lr=5e-4,
            ema_decay=0.998,
            warmup=100,
            decay_fraction=0.6,
            mixed_precision="bf16",
        ),
        run=training_run("mmdit_shapes32", _build_mmdit_on, flow_matching, _mmdit_batches(32)),
        evaluate=evaluate_scenes(32, flow_scheduler, "Euler, 25 steps", n=100, guidance=(3.0,)),
        data=lambda: data_line(32, "one to three objects, new scenes at each step"),
        picture=scene_grid(32, flow_scheduler),
        needs=("mmdit_shapes", "oracle_shapes32"),
        half=True,
    ),
}
