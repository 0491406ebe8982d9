"""A student with another attention learns to answer as its teacher: one loss for LiT, LinFusion and CLEAR.

All three add up the ordinary loss, the distance of the two predictions, and a third term:

- LiT (Wang et al. 2025, arXiv 2501.12976): the distance of the learned variances;
- LinFusion (Liu et al. 2024, arXiv 2409.02097; ``Huage001/LinFusion``: src/train/distill.py) and CLEAR (Liu et al.
  2024, arXiv 2412.16112; ``Huage001/CLEAR``: distill.py): the distance of the outputs of attention layers.

The distillation of a pruned model, with its masks and projections, is in :mod:`minilib.distillation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilib.distillation import feature_loss
from minilib.intervene import record_outputs
from minilib.losses import denoising_loss, flow_matching_loss
from minilib.training import Batch, LossFn


class StudentLoss:
    """A loss for ``fit``: ``data L_data + noise L_noise + variance L_variance + features L_features``.

    ``L_data`` is the ordinary loss; for a model that gives 2c channels it includes the variational bound. ``L_noise`` is
    the mean squared distance of the student's prediction from the teacher's; ``L_variance`` that of the last c of 2c
    channels, the learned variances as the network gives them; ``L_features`` the mean over ``layers`` of the mean squared
    distance of their outputs, each in its own model's forward pass.

    Args:
        scheduler: gives ``add_noise`` and the target, as in :func:`minilib.losses.denoising_loss`; None: the straight path
            of a rectified flow, as in :func:`minilib.losses.flow_matching_loss`.
        teacher: called without gradients; put it in eval mode.
        data: weight of the ordinary loss.
        noise: weight of the distance of predictions; 0.5 in all three papers.
        variance: weight of the distance of variances; LiT's is 0.05.
        features: weight of the distance of features; 0.5 in LinFusion and CLEAR.
        layers: names of the modules whose outputs are compared, equal in student and teacher.
        bin_width: of the likelihood at t = 0, see :func:`minilib.losses.denoising_loss`.

    Raises:
        ValueError: a negative weight, all weights 0, or a weight of features without layers (or the reverse).
    """

    def __init__(
        self,
        scheduler: Any | None,
        teacher: nn.Module,
        *,
        data: float = 1.0,
        noise: float = 0.5,
        variance: float = 0.0,
        features: float = 0.0,
        layers: Sequence[str] = (),
        bin_width: float = 1 / 8,
    ) -> None:
        weights = {"data": data, "noise": noise, "variance": variance, "features": features}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"weights have to be at least 0, and not all of them 0; got {weights}")
        if isinstance(layers, str) or bool(layers) != bool(features):
            raise ValueError(
                f"features={features} and layers={layers!r} given: a weight needs a sequence of module names, and names a weight"
            )
        self.scheduler, self.teacher, self.bin_width = scheduler, teacher, bin_width
        self.data, self.noise, self.variance, self.features = data, noise, variance, features
        self.layers = list(layers)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch ``x0, y, noise, t``; models are called ``model(x_t, t, y)``.

        Raises:
            ValueError: predictions or features of different shapes, a variance term for a model without variances, or
                variances in a rectified flow.
        """
        inputs = _inputs(self.scheduler, batch)
        # Under accelerate a parallel model holds the student one level deeper.
        student = getattr(model, "module", model)
        if self.features:
            with record_outputs(student, self.layers, detach=False) as ours:
                out = model(*inputs).float()
        else:
            ours, out = {}, model(*inputs).float()
        loss = (
            self.data * _data_loss(self.scheduler, out, batch, self.bin_width)
            if self.data
            else out.new_zeros(())
        )
        if not (self.noise or self.variance or self.features):
            return loss
        goal, theirs = self._from_teacher(inputs)
        _same_shape(out, goal)
        c = batch["x0"].shape[1]
        if self.noise:
            loss = loss + self.noise * F.mse_loss(out[:, :c], goal[:, :c])
        if self.variance:
            if out.shape[1] != 2 * c:
                raise ValueError(
                    f"variance={self.variance} needs 2 x {c} output channels (learn_sigma=True); the models gave {out.shape[1]}"
                )
            loss = loss + self.variance * F.mse_loss(out[:, c:], goal[:, c:])
        if self.features:
            parts = [feature_loss(_last(ours, name), _last(theirs, name)) for name in self.layers]
            loss = loss + self.features * torch.stack(parts).mean()
        return loss

    @torch.no_grad()
    def _from_teacher(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, list[Any]]]:
        if not self.features:
            return self.teacher(*inputs).float(), {}
        with record_outputs(self.teacher, self.layers) as theirs:
            goal = self.teacher(*inputs).float()
        return goal, theirs


@torch.no_grad()
def prediction_errors(
    scheduler: Any | None, student: nn.Module, teacher: nn.Module, batch: Batch
) -> dict[str, float]:
    """How far a student is from the truth and from its teacher, on one batch ``x0, y, noise, t``.

    Args:
        scheduler: as in :class:`StudentLoss`.
        student, teacher: called ``model(x_t, t, y)``; of 2c channels the first c count.
        batch: see ``minilib.losses``.

    Returns:
        ``data``: the mean squared error against the training target; ``teacher``: ``|s - t|^2 / |t|^2`` over the batch.

    Raises:
        ValueError: predictions of different shapes.
    """
    inputs = _inputs(scheduler, batch)
    ours, theirs = student(*inputs).float(), teacher(*inputs).float()
    _same_shape(ours, theirs)
    c = batch["x0"].shape[1]
    ours, theirs = ours[:, :c], theirs[:, :c]
    return {
        "data": float(_data_loss(scheduler, ours, batch)),
        "teacher": float((ours - theirs).square().sum() / theirs.square().sum()),
    }


def _inputs(scheduler: Any | None, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    x0, noise, t = batch["x0"], batch["noise"], batch["t"]
    if scheduler is not None:
        return scheduler.add_noise(x0, noise, t), t, batch["y"]
    s = (t / 1000.0).reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0 + s * noise, t, batch["y"]


def _data_loss(scheduler: Any | None, out: Tensor, batch: Batch, bin_width: float = 1 / 8) -> Tensor:
    learned = out.shape[1] == 2 * batch["x0"].shape[1]
    loss: LossFn = flow_matching_loss
    if scheduler is None and learned:
        raise ValueError(
            f"the model gave {out.shape[1]} channels for {batch['x0'].shape[1]}: a rectified flow has no variances"
        )
    if scheduler is not None:
        loss = denoising_loss(scheduler, vlb_weight=float(learned), bin_width=bin_width)
    return loss(_Answer(out), batch)


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}: both must predict the same"
        )


def _last(outputs: dict[str, list[Any]], name: str) -> Tensor:
    value = outputs[name][-1]
    return value[0] if isinstance(value, tuple) else value


class _Answer(nn.Module):
    """A model that has given its answer already."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, *_: Tensor) -> Tensor:
        return self.out
