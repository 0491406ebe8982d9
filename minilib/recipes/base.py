"""What a recipe is, and how it is carried out: train, judge on the test split, write weights, card and entry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilib import machine, zoo
from minilib.data import ImageSet
from minilib.data.emoji import CaptionedImageSet
from minilib.training import FitConfig, FitResult, LossFn, MakeBatch, fit


@dataclass(frozen=True)
class Recipe:
    """A zoo model: how it is built, trained and judged.

    ``run(config, checkpoint)`` trains, or goes on from the checkpoint; ``evaluate(model)`` returns what the card lists, numbers
    or words; ``picture(model)`` is a PNG of samples that nobody chose; ``data()`` is a line about the training data.
    ``needs`` are zoo models that must be there first. ``half`` stores the weights in 16 bits.
    """

    summary: str
    config: FitConfig
    run: Callable[[FitConfig, Path], FitResult]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    data: Callable[[], str]
    picture: Callable[[nn.Module], bytes] | None = None
    needs: tuple[str, ...] = ()
    half: bool = False


def carry_out(name: str, recipe: Recipe, *, steps: int | None, out: Path | None, work: Path) -> None:
    """Train a zoo model, judge it on the test split, and write weights, card and entry.

    An interrupted run goes on from its last checkpoint in ``work``, with the same weights as if it had not been interrupted.

    Raises:
        minilib.zoo.UnknownCheckpoint: a model that this one needs is not in the zoo.
    """
    for needed in recipe.needs:
        zoo.entry(needed)
    config = recipe.config if steps is None else FitConfig(**(asdict(recipe.config) | {"steps": steps}))
    result = recipe.run(config, work / f"{name}-{config.steps}.safetensors")
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    model = result.ema.cpu()
    metrics = recipe.evaluate(model)
    trained = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": machine.gpu_model() or machine.cpu_model(),
        **asdict(config),
    }
    trained["betas"] = list(config.betas)
    metadata = {"summary": recipe.summary, "recipe": trained, "metrics": metrics}
    if recipe.needs:
        metadata["needs"] = {needed: zoo.checksum(needed) for needed in recipe.needs}
    card = model_card(name, recipe, model, trained, metrics)
    picture = recipe.picture(model) if recipe.picture else None
    zoo.publish(name, model, metadata=metadata, card=card, picture=picture, half=recipe.half, root=out)
    print(card)


def model_card(
    name: str, recipe: Recipe, model: nn.Module, trained: dict[str, Any], metrics: dict[str, Any]
) -> str:
    """The card in Markdown: what it is, data, recipe, what was measured, licence, how to train it again."""
    parameters = sum(p.numel() for p in model.parameters())
    config = ", ".join(f"{k}={v}" for k, v in model.config.items() if v is not None)
    needs = f" It needs {', '.join(f'`{needed}`' for needed in recipe.needs)}." if recipe.needs else ""
    lines = [
        f"# {name}",
        "",
        recipe.summary,
        "",
        f"- **Model**: `{type(model).__name__}({config})`, {parameters:,} parameters.",
        f"- **Data**: {recipe.data()}",
        f"- **Recipe**: {', '.join(f'{k}={v}' for k, v in trained.items())}.",
        f"- **Train it again**: `python -m minilib.zoo train {name}`, or under `accelerate launch -m`.{needs}",
        "- **Licence of the weights**: Apache-2.0.",
        "",
        "## Measured on the test split",
        "",
        "| what | value |",
        "|---|---|",
        *[f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in metrics.items()],
        "",
        *([f"![Samples of {name}, not chosen]({name}.png)", ""] if recipe.picture else []),
    ]
    return "\n".join(lines)


def image_set_line(data: ImageSet | CaptionedImageSet) -> str:
    """The card's line about an image set."""
    return (
        f"{data.name}, training split only ({len(data)} images; sha256 `{data.checksum[:16]}`). "
        f"Source: {data.source}. Licence of the data: {data.licence}."
    )


@dataclass(frozen=True)
class Cycle:
    """A further cycle of training: its length in lengths of the first, and what else it changes in the first's settings."""

    length: float
    changes: Mapping[str, Any]

    def config(self, first: FitConfig) -> FitConfig:
        """The settings of this cycle after a first one with these."""
        return replace(first, steps=max(1, round(self.length * first.steps)), **self.changes)


def training_run(
    name: str,
    build: Callable[[], nn.Module],
    loss: Callable[[], LossFn],
    batches: Callable[[], MakeBatch],
    then: Cycle | None = None,
) -> Callable[[FitConfig, Path], FitResult]:
    """A ``Recipe.run``: seed, model, loss and batches put together, with a checkpoint and a line of progress every 250 steps.

    The parts come as functions, so that a recipe can be listed without building them. A second cycle, ``then``, starts from the
    average of the first, with a learning rate that rises and falls once more, and a checkpoint of its own (``...-second``).
    """

    def cycle(model: nn.Module, config: FitConfig, checkpoint: Path, label: str) -> FitResult:
        return fit(
            model,
            loss(),
            batches(),
            config,
            checkpoint=checkpoint,
            checkpoint_every=250,
            callback=progress_log(label),
            callback_every=250,
        )

    def run(config: FitConfig, checkpoint: Path) -> FitResult:
        torch.manual_seed(config.seed)
        first = cycle(build(), config, checkpoint, name)
        if then is None:
            return first
        model = first.ema.requires_grad_(True).train()
        second = checkpoint.with_stem(f"{checkpoint.stem}-second")
        result = cycle(model, then.config(config), second, f"{name}, second cycle")
        return FitResult(result.model, result.ema, first.history + result.history)

    return run


def flow_matching() -> LossFn:
    """The loss of rectified flow."""
    from minilib.losses import flow_matching_loss

    return flow_matching_loss


def logit_normal_times() -> Callable[[int, torch.Generator], Tensor]:
    """Training times as of Stable Diffusion 3: the middle of the path more often than its ends."""
    from minilib.losses import density_timesteps
    from minilib.schedulers import timestep_density

    return density_timesteps(timestep_density("logit_normal"))


def progress_log(name: str) -> Callable[[int, nn.Module, float], None]:
    """A callback for ``fit`` that writes a line a call to stderr: step, loss, CPU seconds a step. For runs without a terminal."""
    state: dict[str, float] = {}

    def log(step: int, ema: nn.Module, loss: float) -> None:
        now = time.process_time()
        rate = f"{(now - state['cpu']) / (step - state['step']):.3f}" if state else "-"
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {name} step {step} loss {loss:.4f} {rate} CPU-s/step", file=sys.stderr, flush=True)
        state.update(step=step, cpu=now)

    return log


def rows_png(x: Tensor, rows: list[str], columns: int = 8, column_labels: Sequence[str] = ()) -> bytes:
    """Square pictures in rows with labels, as a PNG."""
    import io

    import matplotlib.pyplot as plt

    from minilib.plotting import finish, show_images, style

    with style():
        fig, ax = plt.subplots(figsize=(6.4, 6.4 * len(rows) / columns))
        show_images(x, columns, ax=ax, row_labels=rows, column_labels=column_labels)
        buffer = io.BytesIO()
        finish(fig).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
