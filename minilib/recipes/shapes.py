"""The judges of generated scenes, ``oracle_shapes16`` and ``oracle_shapes32``, and what the generators of scenes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilib.data import shapes
from minilib.data.shapes import Scenes, sample_scenes
from minilib.recipes.base import Recipe, training_run
from minilib.training import Batch, FitConfig, LossFn, MakeBatch

#: Scenes the published figures are measured on: held-out captions, this seed, used for nothing else.
TEST_SEED, VALIDATION_SEED = 20_001, 20_002


def garble(scenes: Scenes, size: int, generator: torch.Generator) -> Tensor:
    """Pictures of what a confused generator draws: each object half one thing and half another, of other shape and colour."""
    n = len(scenes)
    other = replace(
        scenes,
        shape=torch.where(scenes.present, (scenes.shape + torch.randint(1, 4, (n, 1), generator=generator)) % 4, -1),
        colour=torch.where(scenes.present, (scenes.colour + torch.randint(6, (n, 1), generator=generator)) % 6, -1),
    )  # fmt: skip
    weight = 0.35 + 0.3 * torch.rand(n, 1, 1, 1, generator=generator)
    return weight * shapes.render(scenes, size) + (1 - weight) * shapes.render(other, size)


def oracle_batches(size: int) -> MakeBatch:
    """Scenes with and without stripes, a tenth of them garbled, with noise of a random strength up to 0.15."""

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        parts = [
            sample_scenes(m, generator, objects=(1, 3), split="train", texture=striped)
            for m, striped in ((n // 2, True), (n - n // 2, False))
        ]
        scenes = shapes.concatenate(parts)
        x, grid = shapes.render(scenes, size), scenes.grid()
        bad = torch.rand(n, generator=generator) < 0.1
        x = torch.where(bad[:, None, None, None], garble(scenes, size, generator), x)
        garbled = bad[:, None] & (grid[..., 0] >= 0)
        grid[..., 0] = torch.where(garbled, 4, grid[..., 0])
        grid[..., 1:] = torch.where(garbled[..., None], -1, grid[..., 1:])  # a mixture has no one colour
        strength = 0.15 * torch.rand(n, 1, 1, 1, generator=generator)
        return {"x": x + strength * torch.randn(x.shape, generator=generator), "grid": grid}

    return make_batch


def _build_oracle(size: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from minilib.models import SceneOracle

        return SceneOracle(size)

    return build


def _reading() -> LossFn:
    from minilib.models import scene_cross_entropy

    return lambda model, batch: scene_cross_entropy(model(batch["x"]), batch["grid"], label_smoothing=0.02)


def _evaluate_oracle(size: int) -> Callable[[nn.Module], dict[str, Any]]:
    def evaluate(model: nn.Module) -> dict[str, Any]:
        from minilib.metrics import features, frechet_distance, mean_scores, read_in_batches, scene_scores

        generator, n = torch.Generator().manual_seed(TEST_SEED), 2000
        metrics: dict[str, Any] = {"n_test": n}
        for kind, striped in (("plain", False), ("striped", True)):
            scenes = sample_scenes(n, generator, objects=(1, 3), split="test", texture=striped)
            x = shapes.render(scenes, size)
            scores = mean_scores(scene_scores(read_in_batches(model, x), scenes, stripes=striped))
            metrics |= {f"{k}_{kind}": scores[k] for k in ("scene", "object", "shape", "colour", "size")}
            if striped:
                metrics["stripe_striped"] = scores["stripe"]
        garbled = read_in_batches(model, garble(scenes, size, generator))
        metrics["garbled_seen"] = float((garbled[..., 0] == 4).sum() / (garbled[..., 0] >= 0).sum())
        a, b = (
            shapes.render(sample_scenes(1000, generator, objects=(1, 2), split="train"), size) for _ in "ab"
        )
        noise = torch.randn(b.shape, generator=generator).clamp(-1, 1)
        metrics["FD_floor_n1000"] = frechet_distance(features(model, a), features(model, b))
        metrics["FD_ceiling_noise"] = frechet_distance(features(model, noise), features(model, b))
        return metrics

    return evaluate


def data_line(size: int, objects: str) -> str:
    """The card's line about generated scenes."""
    return (
        f"generated: `minilib.data.shapes` at {size} pixels, {objects}, captions of the training split "
        "(18 of 20 by a hash of the caption). Licence of the data: Apache-2.0, like the code that draws them."
    )


def _oracle(size: int, steps: int) -> Recipe:
    name = f"oracle_shapes{size}"
    return Recipe(
        summary=f"Reads scenes of {size} x {size} pixels back, cell by cell: shape, colour, size, stripes, and 'garbled'. "
        "The judge of generated scenes, and the feature net of their Fréchet distance.",
        config=FitConfig(steps=steps, batch_size=64, lr=2e-3, ema_decay=0.99),
        run=training_run(name, _build_oracle(size), _reading, lambda: oracle_batches(size)),
        evaluate=_evaluate_oracle(size),
        data=lambda: data_line(size, "one to three objects, half of them striped, a tenth garbled"),
        half=True,
    )


RECIPES: dict[str, Recipe] = {
    "oracle_shapes16": _oracle(16, 2500),
    "oracle_shapes32": _oracle(32, 1500),
}
