"""Distillation: a student learns from a teacher's outputs and, masked or not, from its features.

What TinyFusion (Fang et al. 2025, arXiv 2412.01199) recovers a pruned model with; constants read in ``VainF/TinyFusion``:
``diffusion/gaussian_diffusion.py`` (``training_losses_kd_rep``), ``train_masked_kd.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from minilib.intervene import record_outputs
from minilib.losses import denoising_loss, discretised_log_likelihood
from minilib.schedulers.posterior import gaussian_kl, predicted_posterior
from minilib.training import Batch


def ordinary(x: Float[Tensor, "b ..."], deviations: float = 2.0) -> Bool[Tensor, "b ..."]:
    """Where a value is less than so many standard deviations from its example's mean, both over all other axes.

    What is left out are *massive activations*, a few values far larger than all others, and the ordinary tails with
    them: of normal values 4.6 % lie beyond two deviations.

    >>> ordinary(torch.tensor([[0.0, 1.0, 0.0, -1.0, 0.0, 1.0, -1.0, 0.0, 100.0]]))[0].tolist()
    [True, True, True, True, True, True, True, True, False]
    """
    axes = tuple(range(1, x.ndim))
    variance, mean = torch.var_mean(x, dim=axes, keepdim=True)
    return (x - mean).abs() < deviations * variance.sqrt()


def feature_loss(
    student: Float[Tensor, "b ..."], teacher: Shaped[Tensor, "b ..."], *, deviations: float | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference of two features of one shape; the teacher's gets no gradient.

    Args:
        student: the feature that learns.
        teacher: the feature to be like.
        deviations: set to zero first what is not :func:`ordinary`, in each feature by its own mean and deviation
            (masked knowledge distillation: 2). None: nothing.

    Raises:
        ValueError: different shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"features of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: they must be of one shape "
            "(a student of another width needs a projection)"
        )
    teacher = teacher.detach()
    if deviations is not None:
        student = student * ordinary(student, deviations)
        teacher = teacher * ordinary(teacher, deviations)
    return F.mse_loss(student, teacher)


def last_of_each_share(student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Which block of the teacher each block of the student is compared with: the last of its equal share.

    The released script pairs DiT-D14's blocks 0, 1, ..., 13 with DiT-XL's 1, 3, ..., 27, whichever blocks were kept.

    Raises:
        ValueError: the shares are not equal.

    >>> last_of_each_share(4, 8)
    [(0, 1), (1, 3), (2, 5), (3, 7)]
    """
    if student_depth < 1 or teacher_depth % student_depth:
        raise ValueError(
            f"{teacher_depth} blocks do not fall into {student_depth} equal shares: give the pairs by hand"
        )
    share = teacher_depth // student_depth
    return [(i, (i + 1) * share - 1) for i in range(student_depth)]


def variance_distillation(
    scheduler: Any,
    x0: Float[Tensor, "b c h w"],
    x_t: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    student: Float[Tensor, "b c2 h w"],
    teacher: Float[Tensor, "b c2 h w"],
    bin_width: float = 1 / 8,
) -> Float[Tensor, " b"]:
    """The teacher's reverse step to the student's: KL a sample, in bits a dimension. Only the variances learn from it.

    At t = 0 it is the student's negative log-likelihood of the grey level, as in :func:`minilib.losses.vlb_term`.
    """
    c = x0.shape[1]
    frozen = torch.cat([student[:, :c].detach(), student[:, c:]], dim=1)
    mean, log_variance = predicted_posterior(scheduler, frozen, x_t, t)
    goal_mean, goal_log_variance = predicted_posterior(scheduler, teacher.detach(), x_t, t)
    kl = gaussian_kl(goal_mean, goal_log_variance, mean, log_variance)
    nll = -discretised_log_likelihood(x0, mean, log_variance, bin_width)
    first = (t == 0).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2.0)


class DistillationLoss:
    """A loss for ``fit``: ``a L_teacher + (1 - a) L_data + feature_weight L_features``.

    ``L_teacher`` is the squared distance of the student's prediction from the teacher's, and for learned variances
    :func:`variance_distillation` too; ``L_data`` the ordinary loss, ``denoising_loss(scheduler, vlb_weight=1)``;
    ``L_features`` the mean of :func:`feature_loss` over pairs of blocks. With ``alpha = 0`` and no pairs this is the
    ordinary loss, to the bit.

    Args:
        scheduler: as in ``denoising_loss``.
        teacher: called without gradients; put it in eval mode.
        alpha: the teacher's share, in [0, 1]; 0.9 in the released code.
        pairs: (block of the student, block of the teacher); see :func:`last_of_each_share`.
        feature_weight: an attribute, to be lowered as training goes on (the released script: from 1e-2 to 0, once an
            epoch; with ``fit``, in a callback).
        deviations: see :func:`feature_loss`; None compares all of the features.
        blocks: name of the lists of blocks.
        bin_width: as in ``denoising_loss``.

    Raises:
        ValueError: ``alpha`` outside [0, 1].
    """

    def __init__(
        self,
        scheduler: Any,
        teacher: nn.Module,
        *,
        alpha: float = 0.9,
        pairs: Sequence[tuple[int, int]] = (),
        feature_weight: float = 1e-2,
        deviations: float | None = 2.0,
        blocks: str = "blocks",
        bin_width: float = 1 / 8,
    ) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is the teacher's share of the loss, in [0, 1]; got {alpha}")
        self.scheduler, self.teacher, self.alpha = scheduler, teacher, alpha
        self.pairs, self.feature_weight, self.deviations = list(pairs), feature_weight, deviations
        self.blocks, self.bin_width = blocks, bin_width

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch ``x0, y, noise, t``.

        Raises:
            ValueError: student and teacher give different shapes.
        """
        x0, t = batch["x0"], batch["t"]
        x_t = self.scheduler.add_noise(x0, batch["noise"], t)
        inputs = (x_t, t, batch["y"])
        # Under accelerate a parallel model holds the student one level deeper.
        student = getattr(model, "module", model)
        names = [f"{self.blocks}.{i}" for i, _ in self.pairs]
        goals = [f"{self.blocks}.{j}" for _, j in self.pairs]
        use_features = bool(self.pairs) and self.feature_weight != 0
        if use_features:
            with record_outputs(student, names, detach=False) as ours:
                out = model(*inputs).float()
            with torch.no_grad(), record_outputs(self.teacher, goals) as theirs:
                goal = self.teacher(*inputs).float()
        else:
            out = model(*inputs).float()
            with torch.no_grad():
                goal = self.teacher(*inputs).float()
        if out.shape != goal.shape:
            raise ValueError(
                f"the student gives {tuple(out.shape)}, the teacher {tuple(goal.shape)}: both must predict the same"
            )
        loss = self.alpha * self._from_teacher(batch, x_t, out, goal)
        loss = loss + (1 - self.alpha) * self._from_data(batch, out)
        if use_features:
            parts = [
                feature_loss(ours[a][-1], theirs[b][-1], deviations=self.deviations)
                for a, b in zip(names, goals, strict=True)
            ]
            loss = loss + self.feature_weight * torch.stack(parts).mean()
        return loss

    def _from_teacher(self, batch: Batch, x_t: Tensor, out: Tensor, goal: Tensor) -> Tensor:
        x0, c = batch["x0"], batch["x0"].shape[1]
        loss = F.mse_loss(out[:, :c], goal[:, :c])
        if out.shape[1] == 2 * c:
            variance = variance_distillation(self.scheduler, x0, x_t, batch["t"], out, goal, self.bin_width)
            loss = loss + variance.mean()
        return loss

    def _from_data(self, batch: Batch, out: Tensor) -> Tensor:
        learned = out.shape[1] == 2 * batch["x0"].shape[1]
        plain = denoising_loss(self.scheduler, vlb_weight=float(learned), bin_width=self.bin_width)
        return plain(_Answer(out), batch)


class _Answer(nn.Module):
    """A model that has given its answer already."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, *_: Tensor) -> Tensor:
        return self.out
