"""The autoencoders of 32-pixel scenes, half of them striped: ``vae_shapes_f2``, ``vae_shapes_f4`` and ``vae_shapes_f8``.

One design at three depths, so that only the latent differs: 1,024, 256 and 128 values for a picture of 3,072. The stripes (a
period of 3 pixels, a random phase) are what compression loses first; without them 32-pixel scenes would survive any of the three.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilib import zoo
from minilib.data import shapes
from minilib.data.shapes import Scenes, sample_scenes
from minilib.recipes.base import Recipe, rows_png, training_run
from minilib.recipes.shapes import TEST_SEED, data_line
from minilib.training import Batch, FitConfig, FitResult, MakeBatch

SIZE = 32
ORACLE = "oracle_shapes32"
#: Width of each level and channels of the latent, by downsampling factor.
DESIGNS: dict[int, dict[str, Any]] = {
    2: {"block_out_channels": [16, 32], "latent_channels": 4},
    4: {"block_out_channels": [16, 32, 48], "latent_channels": 4},
    8: {"block_out_channels": [16, 32, 48, 48], "latent_channels": 8},
}
#: At the start the perceptual term then pulls about a third as hard on the last layer as the absolute error does.
PERCEPTUAL_WEIGHT, MSE_WEIGHT = 0.5, 1.0


def mixed_scenes(n: int, generator: torch.Generator, split: str) -> Scenes:
    """Scenes of one to three objects; the first half of the scenes striped, the others plain."""
    parts = [
        sample_scenes(m, generator, objects=(1, 3), split=split, texture=striped)
        for m, striped in ((n // 2, True), (n - n // 2, False))
    ]
    return shapes.concatenate(parts)


def vae_batches(factor: int, size: int = SIZE) -> MakeBatch:
    """Fresh scenes of the training split at every step, ``x``, and the ``noise`` of their latents."""
    latent = (DESIGNS[factor]["latent_channels"], size // factor, size // factor)

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        x = shapes.render(mixed_scenes(n, generator, "train"), size)
        return {"x": x, "noise": torch.randn(n, *latent, generator=generator)}

    return make_batch


def vae_loss() -> Any:
    """Absolute and squared error, the distance in the oracle's convolution features, and the KL term at 1e-6."""
    from minilib.vae_losses import VAELoss, scene_feature_maps

    return VAELoss(
        scene_feature_maps(zoo.load(ORACLE)),
        perceptual_weight=PERCEPTUAL_WEIGHT,
        mse_weight=MSE_WEIGHT,
    )


def _run(name: str, factor: int) -> Callable[[FitConfig, Path], FitResult]:
    def build() -> nn.Module:
        from minilib.models import ConvVAE
        from minilib.vae_losses import WithLogVariance

        return WithLogVariance(ConvVAE(**DESIGNS[factor]))

    def run(config: FitConfig, checkpoint: Path) -> FitResult:
        result = training_run(name, build, vae_loss, lambda: vae_batches(factor))(config, checkpoint)
        for trained in (result.model.vae, result.ema.vae):
            trained.set_scaling(1.0 / latent_std(trained))
        return FitResult(result.model.vae, result.ema.vae, result.history)

    return run


@torch.no_grad()
def latent_std(vae: nn.Module, n: int = 1000) -> float:
    """Standard deviation of sampled latents over ``n`` training scenes: one number for all channels, as in latent diffusion."""
    generator = torch.Generator().manual_seed(0)
    x = shapes.render(mixed_scenes(n, generator, "train"), SIZE).to(next(vae.parameters()).device)
    return float(torch.cat([vae.encode(part).sample(generator) for part in x.split(250)]).std())


@torch.no_grad()
def reconstruct(vae: nn.Module, x: Tensor) -> Tensor:
    """Through the mode of the posterior, in [-1, 1]."""
    return torch.cat([vae(part)[0] for part in x.split(250)]).clamp(-1, 1)


def evaluate_vae(model: nn.Module, n: int = 1000) -> dict[str, Any]:
    """What the model card lists, on ``n`` plain and ``n`` striped scenes with held-out captions.

    ``rFD`` is the distance to training scenes, and its floor that of the originals themselves; ``rFD_paired`` that to the
    originals, whose floor is 0. The oracle's lower layers also served in training: EfficientNet's features did not.
    """
    from minilib.metrics import features, frechet_distance, frechet_report
    from minilib.models.efficientnet import load_effnet_lite0

    oracle, generator = zoo.load(ORACLE), torch.Generator().manual_seed(TEST_SEED)
    metrics: dict[str, Any] = {"n_each": n}
    originals, copies = [], []
    for kind, striped in (("plain", False), ("striped", True)):
        scenes = sample_scenes(n, generator, objects=(1, 3), split="test", texture=striped)
        x = shapes.render(scenes, SIZE)
        y = reconstruct(model, x)
        metrics |= _scores(kind, striped, oracle, scenes, x, y)
        originals.append(x)
        copies.append(y)
    x, y = torch.cat(originals), torch.cat(copies)
    reference = shapes.render(mixed_scenes(5 * n, generator, "train"), SIZE)
    mix = torch.randperm(2 * n, generator=generator)  # the report may cut: let every cut hold both kinds
    report = frechet_report(oracle, y[mix], reference, x[mix])
    metrics |= {"rFD": report.value, "rFD_floor": report.floor, "rFD_ceiling": report.ceiling}
    metrics["rFD_paired"] = frechet_distance(features(oracle, y), features(oracle, x))
    half = mix[:n]
    other = frechet_report(load_effnet_lite0(), y[half], x[half], x[half])
    metrics |= {"rFD_paired_efficientnet": other.value, "rFD_paired_efficientnet_ceiling": other.ceiling}
    return metrics | _latent_metrics(model, x)


def _scores(
    kind: str, striped: bool, oracle: nn.Module, scenes: Scenes, x: Tensor, y: Tensor
) -> dict[str, float]:
    from minilib.metrics import mean_scores, psnr, read_in_batches, scene_scores

    def read(images: Tensor) -> dict[str, float]:
        return mean_scores(scene_scores(read_in_batches(oracle, images), scenes, stripes=striped))

    kept, ceiling = read(y), read(x)
    metrics = {f"psnr_{kind}_dB": float(psnr(x, y).mean())}
    for name in ("scene", "stripe") if striped else ("scene",):
        metrics |= {f"{name}_{kind}": kept[name], f"{name}_{kind}_of_originals": ceiling[name]}
    return metrics


@torch.no_grad()
def _latent_metrics(model: nn.Module, x: Tensor) -> dict[str, Any]:
    posteriors = [model.encode(part) for part in x.split(250)]
    mean = torch.cat([p.mean for p in posteriors])
    channels = mean.std((0, 2, 3))
    return {
        "latent_values": mean[0].numel(),
        "compression": x[0].numel() / mean[0].numel(),
        "latent_std": float(mean.std()),
        "latent_std_least_channel": float(channels.min()),
        "latent_std_greatest_channel": float(channels.max()),
        "posterior_std": float(torch.cat([p.std for p in posteriors]).mean()),
        "KL_nats_an_image": float(torch.cat([p.kl() for p in posteriors]).mean()),
    }


def vae_picture(model: nn.Module) -> bytes:
    """Held-out scenes, not chosen, above their reconstructions: eight plain, eight striped."""
    generator, rows = torch.Generator().manual_seed(TEST_SEED + 100), []
    for striped in (False, True):
        scenes = sample_scenes(8, generator, objects=(1, 3), split="test", texture=striped)
        x = shapes.render(scenes, SIZE)
        rows += [x, reconstruct(model, x)]
    return rows_png(torch.cat(rows), ["original", f"f = {model.downsample_factor}"] * 2)


def _recipe(factor: int, steps: int) -> Recipe:
    name, channels = f"vae_shapes_f{factor}", DESIGNS[factor]["latent_channels"]
    side = SIZE // factor
    return Recipe(
        summary=f"A convolutional autoencoder of 32 x 32 scenes with stripes, downsampling by {factor}: a latent of "
        f"{channels} x {side} x {side}. Absolute and squared error, a perceptual term in the oracle's features, KL weight 1e-6.",
        config=FitConfig(
            steps=steps, batch_size=32, lr=2e-3, ema_decay=0.995, warmup=100, decay_fraction=0.5
        ),
        run=_run(name, factor),
        evaluate=evaluate_vae,
        data=lambda: data_line(SIZE, "one to three objects, half of them striped, new scenes at each step"),
        picture=vae_picture,
        needs=(ORACLE,),
        half=True,
    )


RECIPES: dict[str, Recipe] = {
    "vae_shapes_f2": _recipe(2, 1500),
    "vae_shapes_f4": _recipe(4, 1500),
    "vae_shapes_f8": _recipe(8, 1500),
}
