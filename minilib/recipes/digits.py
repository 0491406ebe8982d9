"""``oracle_digits`` and ``dit_digits``: the judge and the generator of 8 x 8 handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilib import zoo
from minilib.data import ImageSet, load
from minilib.recipes.base import Recipe, image_set_line, rows_png
from minilib.training import Batch, FitConfig, FitResult, fit


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to one pixel either way, the new edge filled with the background (-1)."""
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    dx, dy = torch.randint(3, (2, len(x)), generator=generator)
    size = x.shape[-1]
    rows = (dy[:, None] + torch.arange(size))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(size))[:, None, None, :]
    return padded[torch.arange(len(x))[:, None, None, None], torch.zeros(1, dtype=torch.long), rows, columns]


def _run_oracle(config: FitConfig, checkpoint: Path) -> FitResult:
    return train_oracle(load("digits", "train"), config, checkpoint)


def train_oracle(data: ImageSet, config: FitConfig, checkpoint: Path) -> FitResult:
    """A classifier of ``data``, trained on images moved by up to a pixel and with a little noise, as generated ones have."""
    from minilib.models import OracleClassifier

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        pick = torch.randint(len(data), (n,), generator=generator)
        x = shifted(data.x[pick], generator)
        return {"x": x + 0.15 * torch.randn(x.shape, generator=generator), "y": data.y[pick]}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=0.05)

    torch.manual_seed(config.seed)
    return fit(
        OracleClassifier(image_size=data.x.shape[-1], num_classes=data.num_classes),
        loss,
        make_batch,
        config,
        checkpoint=checkpoint,
        checkpoint_every=1000,
        progress="oracle",
    )


def _evaluate_oracle(model: nn.Module) -> dict[str, Any]:
    return judge_oracle(model, load("digits", "train"), load("digits", "test"))


def judge_oracle(model: nn.Module, train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """Accuracy of a judge on real held-out images, and the floor and ceiling of its Fréchet distance."""
    from minilib.metrics import class_accuracy, features, frechet_distance

    noise = torch.Generator().manual_seed(0)
    f_train = features(model, train.x)
    random = torch.randn(test.x.shape, generator=noise).clamp(-1, 1)
    return {
        "accuracy_test": class_accuracy(model, test.x, test.y),
        "n_test": len(test),
        "FD_floor_test_against_train": frechet_distance(features(model, test.x), f_train),
        "FD_ceiling_noise_against_train": frechet_distance(features(model, random), f_train),
    }


def ddpm_scheduler() -> Any:
    """The schedule ``dit_digits`` is trained with: 1,000 steps, cosine, epsilon prediction, learned variance range."""
    from minilib.schedulers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        variance_type="learned_range",
        clip_sample=True,
    )


def _run_dit(config: FitConfig, checkpoint: Path) -> FitResult:
    from minilib.losses import class_batches, denoising_loss, uniform_timesteps
    from minilib.models import DiT

    data = load("digits", "train")
    torch.manual_seed(config.seed)
    model = DiT(
        input_size=8, patch_size=1, hidden_size=96, depth=8, num_heads=4, num_classes=10, learn_sigma=True
    )
    batches = class_batches(data.x, data.y, uniform_timesteps(), null_class=10)
    loss = denoising_loss(ddpm_scheduler(), vlb_weight=1.0)
    return fit(
        model, loss, batches, config, checkpoint=checkpoint, checkpoint_every=500, progress="dit_digits"
    )


def sampling_scheduler() -> Any:
    """The solver to sample ``dit_digits`` with: DPM-Solver++ 2M that starts at a log-SNR the network can still use.

    The cosine schedule ends with almost no signal (alpha = 5e-5). There an error of the epsilon prediction, and above all a
    guided one, becomes an error of x_0 that is 20,000 times larger. So the chain starts where log(alpha / sigma) = -5.1, the
    value that Lu et al. (2022, arXiv 2211.01095) give for this schedule.
    """
    from minilib.schedulers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)


def sample_digits(
    model: nn.Module, y: Tensor, guidance_scale: float, steps: int = 25, seed: int = 0
) -> Tensor:
    """Digits of the classes ``y`` from a model with ``dit_digits``' schedule and prediction, in [-1, 1]."""
    from minilib.guidance import classifier_free_guidance
    from minilib.sampling import initial_noise, sample_final

    guided = classifier_free_guidance(model, y, guidance_scale=guidance_scale)
    noise = initial_noise((len(y), 1, 8, 8), torch.Generator().manual_seed(seed), device=y.device)
    return sample_final(guided, sampling_scheduler(), noise, num_inference_steps=steps).clamp(-1, 1)


def judge_samples(oracle: nn.Module, x: Tensor, held_out: ImageSet, train: ImageSet) -> dict[str, float]:
    """Accuracy, Fréchet distance over its floor, precision to coverage, and the copy check of one set of samples.

    ``x`` are samples of the classes ``held_out.y``, in that order.
    """
    from minilib.metrics import class_accuracy, features, frechet_report, memorisation
    from minilib.metrics import precision_recall_density_coverage as prdc

    fd = frechet_report(oracle, x, train.x, held_out.x)
    manifold = prdc(features(oracle, held_out.x), features(oracle, x))
    copies = memorisation(x, train.x, held_out.x)
    return {
        "accuracy": class_accuracy(oracle, x, held_out.y),
        "FD": fd.value,
        "FD_floor": fd.floor,
        "FD_ceiling": fd.ceiling,
        "precision": manifold.precision,
        "recall": manifold.recall,
        "density": manifold.density,
        "coverage": manifold.coverage,
        "nearest_train_ratio": copies.ratio,
        "copied": copies.copied,
    }


def judge_digits(
    model: nn.Module, held_out: ImageSet, guidance_scale: float, seed: int = 0
) -> dict[str, float]:
    """:func:`judge_samples` of a model with ``dit_digits``' schedule and prediction."""
    x = sample_digits(model, held_out.y, guidance_scale, seed=seed)
    return judge_samples(zoo.load("oracle_digits"), x, held_out, load("digits", "train"))


def _evaluate_dit(model: nn.Module) -> dict[str, Any]:
    test = load("digits", "test")
    metrics: dict[str, Any] = {"sampler": "DPM-Solver++ 2M, 25 steps", "n": len(test)}
    for scale in (1.0, 2.0):
        metrics |= {f"{k}_guidance_{scale:g}": v for k, v in judge_digits(model, test, scale).items()}
    return metrics


def _picture_dit(model: nn.Module) -> bytes:
    return class_grid(lambda y, scale: sample_digits(model, y, scale, seed=0))


def class_grid(draw: Callable[[Tensor, float], Tensor], guidance: tuple[float, float] = (1.0, 2.0)) -> bytes:
    """Samples, not chosen: ten columns, one a class; three rows for each guidance scale."""
    y = torch.arange(10).repeat(3)
    x = torch.cat([draw(y, scale) for scale in guidance])
    rows = [label for scale in guidance for label in (f"guidance {scale:g}", "", "")]
    return rows_png(x, rows, columns=10, column_labels=[str(i) for i in range(10)])


RECIPES: dict[str, Recipe] = {
    "oracle_digits": Recipe(
        summary="Reads 8x8 handwritten digits: the judge of generated digits, and the feature net of their Fréchet distance.",
        config=FitConfig(steps=4000, batch_size=128, lr=2e-3, ema_decay=0.99, weight_decay=1e-4),
        run=_run_oracle,
        evaluate=_evaluate_oracle,
        data=lambda: image_set_line(load("digits", "train")),
    ),
    "dit_digits": Recipe(
        summary="A class-conditional DiT on 8x8 handwritten digits: patch 1, 64 tokens, width 96, 8 blocks, "
        "epsilon prediction on the cosine schedule, learned variance, 10 % label dropout.",
        config=FitConfig(
            steps=7_000,
            batch_size=64,
            lr=1e-3,
            ema_decay=0.999,
            warmup=200,
            decay_fraction=0.5,
            mixed_precision="bf16",
        ),
        run=_run_dit,
        evaluate=_evaluate_dit,
        data=lambda: image_set_line(load("digits", "train")),
        picture=_picture_dit,
        half=True,
    ),
}
