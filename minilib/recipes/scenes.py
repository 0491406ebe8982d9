"""What all generators of scenes share: their batches, their schedulers, how they are sampled, judged and shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilib import zoo
from minilib.data import shapes
from minilib.data.shapes import Scenes, sample_scenes
from minilib.recipes.base import rows_png
from minilib.recipes.shapes import TEST_SEED
from minilib.training import Batch, MakeBatch

#: The noise schedule of the U-Nets: Stable Diffusion's betas, velocity prediction.
UNET_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}


def scene_batches(
    size: int,
    times: Callable[[int, torch.Generator], Tensor],
    *,
    objects: tuple[int, int] = (1, 3),
    texture: bool = False,
    caption_dropout: float = 0.1,
) -> MakeBatch:
    """Fresh scenes of the training split at every step: ``x0``, ``y`` (tokens; a tenth the empty caption), ``noise``, ``t``."""

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        scenes = sample_scenes(n, generator, objects=objects, split="train", texture=texture)
        x0 = shapes.render(scenes, size)
        drop = torch.rand(n, 1, generator=generator) < caption_dropout
        y = torch.where(drop, shapes.null_tokens(n), shapes.tokens(scenes))
        noise = torch.randn(x0.shape, generator=generator)
        return {"x0": x0, "y": y, "noise": noise, "t": times(n, generator)}

    return make_batch


def unet_scheduler() -> Any:
    """What the U-Nets are trained with, as Stable Diffusion 2 is: 1,000 steps, scaled linear betas, velocity prediction.

    Epsilon prediction has to copy the noise through the network. A narrow one that works on patches (``unet_shapes32``: 12
    values in 24 channels) does it badly, and at high noise the error is multiplied by sigma / alpha = 15: scenes came out
    with a coloured haze.
    """
    from minilib.schedulers import DDPMScheduler

    return DDPMScheduler(**UNET_SCHEDULE)


def ddim_scheduler() -> Any:
    """The solver to sample the U-Nets with: DDIM on the same betas."""
    from minilib.schedulers import DDIMScheduler

    return DDIMScheduler(**UNET_SCHEDULE, set_alpha_to_one=False, timestep_spacing="trailing")


def flow_scheduler() -> Any:
    """The solver to sample the rectified-flow models with: Euler's method."""
    from minilib.schedulers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


@torch.no_grad()
def draw_scenes(
    model: nn.Module,
    tokens: Tensor,
    scheduler: Any,
    *,
    size: int,
    guidance_scale: float = 3.0,
    steps: int = 25,
    seed: int = 0,
    batch: int = 128,
) -> Tensor:
    """Pictures of captions, in [-1, 1].

    The states of the captions are computed once. Picture ``i`` starts from the same noise whatever the batch.

    Args:
        model: a text-conditioned denoiser, ``TextUNet`` or ``TextMMDiT``.
        tokens: ``(n, l)`` captions.
        scheduler: :func:`ddim_scheduler` or :func:`flow_scheduler`.
        size: side of the picture in pixels.
        guidance_scale: 1 is the plain conditional model.
        steps: of the scheduler.
        seed: of the noise.
        batch: pictures at a time.
    """
    from minilib.guidance import classifier_free_guidance
    from minilib.sampling import initial_noise, sample_final

    generator = torch.Generator().manual_seed(seed)
    noise = initial_noise((len(tokens), 3, size, size), generator, device=tokens.device)
    done = []
    for y, x in zip(tokens.split(batch), noise.split(batch), strict=True):
        text = model.encode_text(y)._asdict()
        null = model.encode_text(model.null_tokens(len(y), y.shape[1]))._asdict()
        guided = classifier_free_guidance(model, cond=text, null=null, guidance_scale=guidance_scale)
        done.append(sample_final(guided, scheduler, x, num_inference_steps=steps))
    return torch.cat(done).clamp(-1, 1)


def judge_scenes(
    draw: Callable[[Tensor], Tensor],
    oracle: nn.Module,
    *,
    size: int,
    objects: int,
    n: int,
    seed: int = TEST_SEED,
) -> dict[str, float]:
    """Scores of pictures of ``n`` held-out captions with ``objects`` objects each; seed and split fix the captions."""
    from minilib.metrics import mean_scores, read_in_batches, scene_scores

    generator = torch.Generator().manual_seed(seed + objects)
    scenes = sample_scenes(n, generator, objects=(objects, objects), split="test")
    x = draw(shapes.tokens(scenes))
    return mean_scores(scene_scores(read_in_batches(oracle, x), scenes))


def evaluate_scenes(
    size: int,
    scheduler: Callable[[], Any],
    label: str,
    *,
    n: int = 300,
    guidance: tuple[float, ...] = (1.0, 3.0),
) -> Callable[[nn.Module], dict[str, Any]]:
    """What the model card of a generator of scenes lists."""

    def evaluate(model: nn.Module) -> dict[str, Any]:
        oracle = zoo.load(f"oracle_shapes{size}")
        metrics: dict[str, Any] = {"sampler": label, "n_each": n}
        for scale in guidance:
            for objects in (1, 2, 3):
                scores = judge_scenes(
                    lambda y, w=scale: draw_scenes(model, y, scheduler(), size=size, guidance_scale=w),
                    oracle,
                    size=size,
                    objects=objects,
                    n=n,
                )
                kept = ("scene", "object", "colour_leak", "shape_leak") if objects > 1 else ("scene",)
                metrics |= {f"{k}_{objects}_objects_guidance_{scale:g}": scores[k] for k in kept}
            metrics |= _distance(model, oracle, size, scheduler, scale)
        return metrics

    return evaluate


def _distance(
    model: nn.Module, oracle: nn.Module, size: int, scheduler: Callable[[], Any], scale: float, n: int = 500
) -> dict[str, float]:
    """Fréchet distance to 5,000 training scenes; other captions than those of the accuracy, one to three objects."""
    from minilib.metrics import frechet_report

    generator = torch.Generator().manual_seed(TEST_SEED)
    train = sample_scenes(5000, generator, objects=(1, 3), split="train")
    test = sample_scenes(n, generator, objects=(1, 3), split="test")
    held_out = sample_scenes(n, generator, objects=(1, 3), split="test")
    x = draw_scenes(model, shapes.tokens(test), scheduler(), size=size, guidance_scale=scale, seed=1)
    report = frechet_report(oracle, x, shapes.render(train, size), shapes.render(held_out, size))
    key = f"guidance_{scale:g}"
    return {f"FD_{key}": report.value, f"FD_floor_{key}": report.floor, f"FD_ceiling_{key}": report.ceiling}


def scene_grid(
    size: int, scheduler: Callable[[], Any], *, guidance_scale: float = 3.0
) -> Callable[[nn.Module], bytes]:
    """Samples, not chosen: held-out captions with one, two and three objects, eight each; above each row what was asked for."""

    def picture(model: nn.Module) -> bytes:
        scenes = _grid_scenes()
        drawn = draw_scenes(
            model, shapes.tokens(scenes), scheduler(), size=size, guidance_scale=guidance_scale, seed=7
        )
        asked = shapes.render(scenes, size)
        rows = [part for pair in zip(asked.split(8), drawn.split(8), strict=True) for part in pair]
        return rows_png(torch.cat(rows), ["asked", "drawn"] * 3)

    return picture


def _grid_scenes() -> Scenes:
    generator = torch.Generator().manual_seed(TEST_SEED + 100)
    return shapes.concatenate(
        [sample_scenes(8, generator, objects=(k, k), split="test", jitter=0.0) for k in (1, 2, 3)]
    )
