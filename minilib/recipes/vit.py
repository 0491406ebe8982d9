"""``vit``: patch features of 16-pixel scenes, learned without labels; the encoder that later pages align to.

It must not be a judge as well: a model aligned to these features would be measured with its own teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minilib.data import shapes
from minilib.data.shapes import Scenes
from minilib.recipes.base import Recipe, progress_log, rows_png
from minilib.recipes.shapes import TEST_SEED, data_line
from minilib.recipes.vae import mixed_scenes
from minilib.training import Batch, FitConfig, FitResult, fit

SIZE = 16
CONFIG = {"image_size": SIZE, "patch_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 4}
#: The losses of ``SelfDistillation``. Errors of pixels are small numbers; at this weight their gradient is felt.
WEIGHTS = {"pooled": 1.0, "patch": 1.0, "pixel": 5.0}


def view_batches(generator: torch.Generator, n: int) -> Batch:
    """Two views in different light of fresh scenes of the training split, ``a`` and ``b``, and what is hidden in each."""
    from minilib.self_supervision import random_light, random_masks

    x = shapes.render(mixed_scenes(n, generator, "train"), SIZE)
    patches = (SIZE // CONFIG["patch_size"]) ** 2
    return {
        "a": random_light(x, generator),
        "b": random_light(x, generator),
        "mask_a": random_masks(n, patches, generator),
        "mask_b": random_masks(n, patches, generator),
    }


def run_vit(config: FitConfig, checkpoint: Path) -> FitResult:
    """Train; student and teacher come back as ``model`` and ``ema``."""
    from minilib.models import ViT
    from minilib.self_supervision import SelfDistillation, self_distillation_loss

    torch.manual_seed(config.seed)
    patches = (SIZE // CONFIG["patch_size"]) ** 2
    result = fit(
        SelfDistillation(ViT(**CONFIG), patches=patches, steps=config.steps),
        self_distillation_loss(WEIGHTS),
        view_batches,
        config,
        checkpoint=checkpoint,
        checkpoint_every=500,
        callback=progress_log("vit"),
        callback_every=250,
    )
    # The teacher is an average itself; it is taken from the model, not from fit's average of it.
    return FitResult(result.model.student["vit"], result.model.teacher["vit"], result.history)


def cell_windows(maps: Float[Tensor, "n d g g"]) -> Float[Tensor, "n 9 f"]:
    """What a read-out of each of the nine cells looks at: the features of the 8 x 8 reference pixels around it.

    Half the side, at every quarter: 2 x 2 tokens of a 4 x 4 grid, or 8 x 8 pixels of a 16-pixel picture.

    Raises:
        ValueError: a side that is no multiple of 4.
    """
    side = maps.shape[-1]
    if side % 4:
        raise ValueError(f"windows at every quarter need a side that is a multiple of 4, got {side}")
    return F.unfold(maps, side // 2, stride=side // 4).transpose(1, 2)


@torch.no_grad()
def token_maps(vit: nn.Module, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d g g"]:
    """The patch features as maps."""
    tokens = torch.cat([vit.features(part) for part in x.split(500)])
    side = x.shape[-1] // vit.patch_size
    return rearrange(tokens, "n (r c) d -> n d r c", r=side)


def probe_cells(
    train: Float[Tensor, "n d g g"], train_scenes: Scenes, test: Float[Tensor, "m d g g"], test_scenes: Scenes
) -> dict[str, float]:
    """Accuracy of linear read-outs of a cell: is there an object, and of those that are there shape, colour, size, stripes."""
    from minilib.metrics import linear_probe

    sides = [
        (cell_windows(maps).flatten(0, 1), scenes.grid().flatten(0, 1))
        for maps, scenes in ((train, train_scenes), (test, test_scenes))
    ]
    (a, ya), (b, yb) = sides
    scores = {"present": linear_probe(a, (ya[:, 0] >= 0).long(), b, (yb[:, 0] >= 0).long())}
    here, there = ya[:, 0] >= 0, yb[:, 0] >= 0
    for index, name in enumerate(("shape", "colour", "size", "stripe")):
        scores[name] = linear_probe(a[here], ya[here, index], b[there], yb[there, index])
    return scores


def evaluate_vit(model: nn.Module, n: int = 3000) -> dict[str, Any]:
    """Linear read-outs of held-out scenes, beside those of the untrained network and of the raw pixels; and signs of collapse."""
    from minilib.self_supervision import feature_spread

    generator = torch.Generator().manual_seed(TEST_SEED)
    scenes = [mixed_scenes(n, generator, split) for split in ("train", "test")]
    pictures = [shapes.render(part, SIZE) for part in scenes]
    arms = {"trained": model, "untrained": _untrained(model)}
    metrics: dict[str, Any] = {"n_train": n, "n_test": n}
    for arm, vit in arms.items():
        maps = [token_maps(vit, x) for x in pictures]
        scores = probe_cells(maps[0], scenes[0], maps[1], scenes[1])
        metrics |= {f"{name}_{arm}": value for name, value in scores.items()}
        places = rearrange(maps[1], "n d r c -> (r c) n d")
        metrics[f"spread_{arm}"] = sum(feature_spread(place) for place in places) / len(places)
    scores = probe_cells(pictures[0], scenes[0], pictures[1], scenes[1])
    return metrics | {f"{name}_pixels": value for name, value in scores.items()}


def vit_picture(model: nn.Module) -> bytes:
    """Held-out scenes, not chosen, above the first three principal components of their patches: trained and untrained."""
    generator = torch.Generator().manual_seed(TEST_SEED + 100)
    x = shapes.render(mixed_scenes(256, generator, "test"), SIZE)
    pick = torch.cat([torch.arange(8), torch.arange(128, 136)])  # striped ones, then plain ones
    colours = [principal_colours(token_maps(vit, x), SIZE)[pick] for vit in (model, _untrained(model))]
    rows = [
        part for row in zip(x[pick].split(8), *(c.split(8) for c in colours), strict=True) for part in row
    ]
    return rows_png(torch.cat(rows), ["scene", "trained", "untrained"] * 2)


def principal_colours(maps: Float[Tensor, "n d g g"], size: int) -> Float[Tensor, "n 3 {size} {size}"]:
    """Three principal components of the patches as red, green and blue in [-1, 1], each place's mean taken away first."""
    centred = maps - maps.mean(0)
    flat = rearrange(centred, "n d r c -> (n r c) d")
    components = torch.linalg.svd(flat.T @ flat).U[:, :3]
    scores = torch.einsum("n d r c, d k -> n k r c", centred, components)
    scores = scores / scores.abs().flatten(2).transpose(0, 1).flatten(1).quantile(0.98, dim=1)[:, None, None]
    return F.interpolate(scores.clamp(-1, 1), size=(size, size), mode="nearest")


def _untrained(model: nn.Module) -> nn.Module:
    """The same network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return type(model)(**model.config).eval()


RECIPES: dict[str, Recipe] = {
    "vit": Recipe(
        summary="A vision transformer for scenes of 16 x 16 pixels, trained without labels: 16 patches of 4 x 4 pixels, "
        "64 features each. It predicts, from a view with a third to two thirds of the patches hidden, what its own moving "
        "average makes of another view (DINO, iBOT), and the hidden pixels (SimMIM).",
        config=FitConfig(
            steps=8000,
            batch_size=64,
            lr=1e-3,
            weight_decay=0.04,
            warmup=300,
            decay_fraction=0.5,
            clip=3.0,
        ),
        run=run_vit,
        evaluate=evaluate_vit,
        data=lambda: data_line(SIZE, "one to three objects, half of them striped, without their captions"),
        picture=vit_picture,
        half=True,
    )
}
