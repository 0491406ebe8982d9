"""A conditional diffusion model as a classifier: the class under which the model predicts the noise best.

Li, Prabhudesai, Duggal, Brown and Pathak, 2023, arXiv 2303.16203; read in diffusion-classifier/diffusion-classifier@e9f772d
(``eval_prob_adaptive.py``, ``eval_prob_dit.py``). For an image x and the candidates c,

    score(x, c) = mean over (t_i, eps_i) of || eps_i - eps_theta(alpha_t x + sigma_t eps_i, t_i, c) ||,      smallest wins,

with the same pairs (t_i, eps_i) for every class: the scores differ by about a hundredth of their size, and noise that all classes
share cancels in the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``model(x_t, t, y) -> prediction`` of as many channels as ``x_t``, or of more: the rest (learned variances) is ignored."""

Stages = Sequence[tuple[int, int]]
"""``(n_samples, keep)``, one a stage: after n_samples timesteps only the ``keep`` best classes go on."""

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs}


class Classification(NamedTuple):
    """What a diffusion classifier found.

    ``predictions (n,)`` are class ids; ``errors (n, t, k)`` the loss of image, timestep and candidate, averaged over pixels, NaN
    where it was not evaluated; ``evaluations (n,)`` counts the network's forward passes an image took.
    """

    predictions: Int[Tensor, " n"]
    errors: Float[Tensor, "n t k"]
    evaluations: Int[Tensor, " n"]


def even_timesteps(n: int, num_train_timesteps: int = 1000) -> Int[Tensor, " n"]:
    """``n`` evenly spaced timesteps: the middles of n equal parts of the range, as in the released code.

    >>> even_timesteps(5)
    tensor([100, 300, 500, 700, 900])
    """
    if not 1 <= n <= num_train_timesteps:
        raise ValueError(
            f"n must lie between 1 and num_train_timesteps={num_train_timesteps}, so that no timestep comes twice; got {n}"
        )
    return (2 * torch.arange(n) + 1) * num_train_timesteps // (2 * n)


def stage_positions(total: int, stages: Stages) -> list[list[int]]:
    """Which of ``total`` timesteps each stage evaluates for the first time: an even subset of them, less those used before.

    >>> stage_positions(10, [(2, 3), (10, 1)])
    [[2, 7], [0, 1, 3, 4, 5, 6, 8, 9]]
    """
    used: set[int] = set()
    new: list[list[int]] = []
    for n, _ in stages:
        subset = even_timesteps(n, total).tolist()
        new.append([position for position in subset if position not in used])
        used.update(subset)
    return new


@torch.no_grad()
def diffusion_classifier(
    model: Denoiser,
    scheduler: Any,
    x: Float[Tensor, "n ..."],
    classes: Sequence[int] | Int[Tensor, " k"],
    timesteps: Sequence[int] | Int[Tensor, " t"],
    *,
    noise: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
    independent: bool = False,
    stages: Stages | None = None,
    loss: str = "l2",
    batch: int = 64,
    null_class: int | None = None,
) -> Classification:
    """Classify images by how well ``model`` predicts what was added to them under each class.

    Every network call holds one timestep and the classes still alive. So as long as no class is dropped, the calls are the
    same whatever the stages are. Errors are kept in the precision of ``x`` and averaged in float64: a half-precision sum
    would lose the differences between classes.

    Args:
        model: the conditional denoiser; its first channels are compared with the target of the scheduler's prediction type.
        scheduler: ``add_noise``, ``config.prediction_type`` and, for v-prediction, ``get_velocity``.
        x: clean images (or latents, or points).
        classes: candidate class ids, all different. The "no label" class is not a candidate.
        timesteps: training timesteps to average over; one may come several times (several draws of noise).
        noise: unit Gaussian ``(t, *shape)``, shared by all images and classes; or ``(n, t, *shape)``, shared by the
            classes; or ``(n, t, k, *shape)``, shared by nobody (the control). Give this or
        generator: draws it, each image its own.
        independent: draw it for each class anew. The differences between classes then carry the full variance.
        stages: ``[(n_samples, keep), ...]``; n_samples rises to all timesteps, keep falls to 1. Each stage evaluates an
            even subset of the timesteps, less those evaluated before, for the surviving classes. Then it drops classes by
            the mean over all timesteps so far, which are the same for all survivors. Default: no pruning.
        loss: ``"l2"`` (squared error) or ``"l1"``.
        batch: rows in a network call.
        null_class: refused among ``classes``; default: the model's ``num_classes``, if it has one.

    Raises:
        ValueError: no image; no, repeated or null classes; no timesteps; an unknown loss; noise of a wrong shape, or both or
            neither of ``noise`` and ``generator``; stages that do not rise to all timesteps or do not fall to one class.
    """
    ids = torch.as_tensor(classes, dtype=torch.long, device=x.device).reshape(-1)
    times = torch.as_tensor(timesteps, device=x.device).reshape(-1)
    stages = [(len(times), 1)] if stages is None else [(int(n), int(keep)) for n, keep in stages]
    null_class = getattr(model, "num_classes", None) if null_class is None else null_class
    _check_candidates(x, ids, times, null_class)
    _check_stages(stages, len(times), len(ids))
    if loss not in LOSSES or batch < 1:
        raise ValueError(
            f"loss must be one of {', '.join(sorted(LOSSES))}, batch >= 1; got {loss!r}, {batch}"
        )
    noise = _noise(x, len(times), len(ids), noise, generator, independent)

    errors = x.new_full((len(x), len(times), len(ids)), float("nan"))
    alive = torch.ones(len(x), len(ids), dtype=torch.bool, device=x.device)
    evaluations = torch.zeros(len(x), dtype=torch.long, device=x.device)
    used: list[int] = []
    for (_, keep), new in zip(stages, stage_positions(len(times), stages), strict=True):
        images, columns = alive.nonzero(as_tuple=True)
        for at in new:
            for i, j in zip(images.split(batch), columns.split(batch), strict=True):
                eps, t = _pick(noise, x.ndim, i, at, j), times[at].expand(len(i))
                errors[i, at, j] = _error(model, scheduler, x[i], eps, t, ids[j], loss)
        evaluations += len(new) * alive.sum(1)
        used = sorted(used + new)
        scores = errors[:, used].double().mean(1).masked_fill(~alive, float("inf"))
        best = scores.argsort(dim=1, stable=True)[:, :keep]
        alive = torch.zeros_like(alive).scatter(1, best, True)
    return Classification(ids[best[:, 0]], errors, evaluations)


def _error(
    model: Denoiser, scheduler: Any, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor, loss: str
) -> Tensor:
    """The loss of each row, averaged over everything but the rows."""
    prediction = model(scheduler.add_noise(x0, noise, t), t, y)[:, : x0.shape[1]].to(x0.dtype)
    kind = scheduler.config.prediction_type
    target = {"epsilon": lambda: noise, "sample": lambda: x0}.get(
        kind, lambda: scheduler.get_velocity(x0, noise, t)
    )
    return LOSSES[loss](prediction - target()).flatten(1).mean(1)


def _noise(
    x: Tensor,
    t: int,
    k: int,
    noise: Tensor | None,
    generator: torch.Generator | None,
    independent: bool,
) -> Tensor:
    """The noise that was given, once its shape is known to be right, or a fresh draw on the generator's device."""
    if (noise is None) == (generator is None):
        raise ValueError("give exactly one of noise (unit Gaussian) and generator (to draw it)")
    shapes = [(t, *x.shape[1:]), (len(x), t, *x.shape[1:]), (len(x), t, k, *x.shape[1:])]
    if noise is None:
        shape = shapes[2] if independent else shapes[1]
        return torch.randn(shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    expected = shapes[2:] if independent else shapes
    if tuple(noise.shape) not in expected:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {' or '.join(map(str, expected))}")
    return noise.to(x.device, x.dtype)


def _pick(noise: Tensor, ndim: int, image: Tensor, position: int, column: Tensor) -> Tensor:
    """The noise of these rows; it has the axes (t), (image, t) or (image, t, class) in front of a sample's own."""
    if noise.ndim == ndim:
        return noise[position].expand(len(image), *noise.shape[1:])
    here = noise[:, position]
    return here[image] if noise.ndim == ndim + 1 else here[image, column]


def _check_candidates(x: Tensor, ids: Tensor, times: Tensor, null_class: int | None) -> None:
    if len(x) == 0 or len(times) == 0:
        raise ValueError(
            f"need at least one image and one timestep; got {len(x)} images and {len(times)} timesteps"
        )
    if len(ids) == 0:
        raise ValueError("classes is empty; give the candidate class ids")
    if len(ids.unique()) != len(ids):
        raise ValueError(f"classes names one twice: {ids.tolist()}; give each candidate once")
    if null_class is not None and null_class in ids.tolist():
        raise ValueError(f"class {null_class} stands for 'no label'; leave it out of classes: {ids.tolist()}")


def _check_stages(stages: Stages, t: int, k: int) -> None:
    counts, keeps = [n for n, _ in stages], [keep for _, keep in stages]
    if not counts or counts[-1] != t or any(a >= b for a, b in zip([0, *counts], counts, strict=False)):
        raise ValueError(
            f"n_samples of the stages must rise, from 1 or more to all {t} timesteps; got {counts}"
        )
    if keeps[-1] != 1 or any(a < b for a, b in zip([k, *keeps], keeps, strict=False)):
        raise ValueError(f"keep must fall, from at most the {k} classes to 1 at the end; got {keeps}")
