"""What a denoiser is trained on: the batches and the losses, kept apart so that every random number is drawn in one place.

``make_batch(generator, n)`` draws images, labels (some dropped for classifier-free guidance), noise and times;
``loss(model, batch)`` is a plain function of them. Label dropout is here, in the open, and not hidden in ``model.train()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilib.models.text import TextStates
from minilib.schedulers.densities import TimestepDensity
from minilib.training import Batch, LossFn, MakeBatch

Times = Callable[[int, torch.Generator], Tensor]


def uniform_timesteps(num_train_timesteps: int = 1000) -> Times:
    """Integer times, all equally likely: DDPM's choice (Ho et al., 2020, algorithm 1)."""
    return lambda n, generator: torch.randint(num_train_timesteps, (n,), generator=generator)


def density_timesteps(density: TimestepDensity) -> Times:
    """Times of a density on (0, 1), on the 0..1000 scale (:mod:`minilib.schedulers.densities`)."""
    return lambda n, generator: 1000.0 * density.sample(n, generator)


def class_batches(
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " _"],
    times: Times,
    *,
    null_class: int,
    label_dropout: float = 0.1,
) -> MakeBatch:
    """Batches of a labelled set: ``x0, y, noise, t``; a tenth of the labels become the null class.

    Args:
        times: ``(n, generator) -> t`` on the 0..1000 scale.
        null_class: the id that stands for "no label".
        label_dropout: the probability of dropping a label, in [0, 1].

    Raises:
        ValueError: an empty set, or a probability outside [0, 1].
    """
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"need as many labels as images, at least one; got {len(x)} images and {len(y)} labels"
        )
    if not 0.0 <= label_dropout <= 1.0:
        raise ValueError(f"label_dropout is a probability; got {label_dropout}")

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        pick = torch.randint(len(x), (n,), generator=generator)
        drop = torch.rand(n, generator=generator) < label_dropout
        labels = torch.where(drop, torch.full((n,), null_class), y[pick])
        noise = torch.randn(n, *x.shape[1:], generator=generator)
        return {"x0": x[pick], "y": labels, "noise": noise, "t": times(n, generator)}

    return make_batch


def flow_matching_loss(model: nn.Module, batch: Batch) -> Tensor:
    """``E || v(x_t, t) - (noise - x0) ||^2`` on the straight path ``x_t = (1 - s) x0 + s noise``, ``s = t / 1000``.

    Lipman et al., 2023, arXiv 2210.02747; Liu et al., 2023, arXiv 2209.03003; in the direction of Esser et al., 2024,
    arXiv 2403.03206 (s = 1 is noise). The condition is ``y`` (labels or token rows), or text states under the names that the
    model gives its arguments (the fields of :class:`minilib.models.TextStates`).
    """
    s = (batch["t"] / 1000.0).reshape(-1, *[1] * (batch["x0"].ndim - 1))
    x_t = (1 - s) * batch["x0"] + s * batch["noise"]
    states = {name: batch[name] for name in TextStates._fields if name in batch}
    prediction = model(x_t, batch["t"], **states) if states else model(x_t, batch["t"], batch["y"])
    return F.mse_loss(prediction.float(), batch["noise"] - batch["x0"])


def denoising_loss(scheduler: Any, *, vlb_weight: float = 0.0, bin_width: float = 1 / 8) -> LossFn:
    """The plain mean-squared error of DDPM, and with learned variances the hybrid loss of improved DDPM.

    ``L = || prediction - target ||^2 + vlb_weight * L_vlb`` (Nichol and Dhariwal, 2021, arXiv 2102.09672, eq. 16), where the
    target follows ``scheduler.config.prediction_type``, and ``L_vlb`` trains the variances alone: the mean is detached in it.

    Args:
        scheduler: gives ``add_noise``, ``get_velocity`` and the posterior.
        vlb_weight: 0 for a model of c output channels; above 0 the model must return 2c.
        bin_width: the step between grey levels in [-1, 1], for the discretised likelihood at t = 0 (digits: 1/8).
    """
    kind = scheduler.config.prediction_type

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x0, noise, t = batch["x0"], batch["noise"], batch["t"]
        x_t = scheduler.add_noise(x0, noise, t)
        out = model(x_t, t, batch["y"]).float()
        c = x0.shape[1]
        targets = {"epsilon": lambda: noise, "sample": lambda: x0}
        target = targets[kind]() if kind in targets else scheduler.get_velocity(x0, noise, t)
        simple = F.mse_loss(out[:, :c], target)
        if not vlb_weight:
            return simple
        if out.shape[1] != 2 * c:
            raise ValueError(
                f"vlb_weight > 0 needs 2 x {c} output channels (learn_sigma=True); the model gave {out.shape[1]}"
            )
        frozen = torch.cat([out[:, :c].detach(), out[:, c:]], dim=1)
        return simple + vlb_weight * vlb_term(scheduler, x0, x_t, t, frozen, bin_width).mean()

    return loss


def vlb_term(
    scheduler: Any,
    x0: Float[Tensor, "b c h w"],
    x_t: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    out: Float[Tensor, "b c2 h w"],
    bin_width: float,
) -> Float[Tensor, " b"]:
    """One term of the variational bound a sample, in bits a dimension: KL of the true and the predicted reverse step.

    At t = 0 it is the negative log-likelihood of the grey level instead (Ho et al., 2020, eq. 13).
    """
    from minilib.schedulers.posterior import ddpm_posterior, gaussian_kl, predicted_posterior

    true_mean, true_log_variance = ddpm_posterior(scheduler, x0, x_t, t)
    mean, log_variance = predicted_posterior(scheduler, out, x_t, t)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretised_log_likelihood(x0, mean, log_variance, bin_width)
    first = (t == 0).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2.0)


def discretised_log_likelihood(
    x0: Float[Tensor, "*shape"],
    mean: Float[Tensor, "*shape"],
    log_variance: Float[Tensor, "*shape"],
    bin_width: float,
) -> Float[Tensor, "*shape"]:
    """Log of a Gaussian's mass in the bin around ``x0``; the outermost bins of [-1, 1] reach to infinity."""
    inv_std = torch.exp(-0.5 * log_variance)

    def cdf(edge: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf((edge - mean) * inv_std / math.sqrt(2.0)))

    edge = 1 - bin_width / 2
    upper = torch.where(x0 > edge, torch.ones_like(x0), cdf(x0 + bin_width / 2))
    lower = torch.where(x0 < -edge, torch.zeros_like(x0), cdf(x0 - bin_width / 2))
    return torch.log((upper - lower).clamp(min=1e-12))
