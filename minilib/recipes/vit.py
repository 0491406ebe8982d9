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
from minilib.recipes.base import Recipe, rows_png, training_run
from minilib.recipes.shapes import TEST_SEED, data_line
from minilib.recipes.vae import mixed_scenes
from minilib.training import Batch, FitConfig, FitResult, LossFn

SIZE = 16
CONFIG = {"image_size": SIZE, "patch_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 4}
#: The losses of ``MaskedPrediction``.
WEIGHTS = {"pixel": 1.0, "gradient": 1.0}


def view_batches(generator: torch.Generator, n: int) -> Batch:
    """Fresh scenes of the training split, ``clean``, a ``view`` of each in other light, and the ``mask`` of hidden patches."""
    from minilib.self_supervision import random_light, random_masks

    clean = shapes.render(mixed_scenes(n, generator, "train"), SIZE)
    patches = (SIZE // CONFIG["patch_size"]) ** 2
    return {
        "clean": clean,
        "view": random_light(clean, generator),
        "mask": random_masks(n, patches, generator),
    }


def _build() -> nn.Module:
    from minilib.models import ViT
    from minilib.self_supervision import MaskedPrediction

    return MaskedPrediction(ViT(**CONFIG))


def _loss() -> LossFn:
    from minilib.self_supervision import masked_prediction_loss

    return masked_prediction_loss(WEIGHTS)


def run_vit(config: FitConfig, checkpoint: Path) -> FitResult:
    """Train, and leave the layers that predict behind."""
    result = training_run("vit", _build, _loss, lambda: view_batches)(config, checkpoint)
    return FitResult(result.model.vit, result.ema.vit, result.history)


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
    """Linear read-outs of held-out scenes, beside those of the untrained network, of the pixels and of the gradients."""
    from minilib.self_supervision import feature_spread, oriented_gradients

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
    targets = {"pixels": pictures, "gradients": [oriented_gradients(x) for x in pictures]}
    for name, (a, b) in targets.items():
        scores = probe_cells(a, scenes[0], b, scenes[1])
        metrics |= {f"{key}_{name}": value for key, value in scores.items()}
    return metrics


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
        "64 features each. It sees a view in other light with a fifth to half of the patches hidden, and says of each patch what "
        "the clean picture has there: its pixels and its histograms of oriented gradients (MaskFeat).",
        config=FitConfig(
            steps=12_000,
            batch_size=64,
            lr=1e-3,
            ema_decay=0.999,
            weight_decay=0.04,
            warmup=200,
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
