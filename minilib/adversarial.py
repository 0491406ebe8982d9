"""Training an autoencoder against a discriminator: the hinge losses and the loop with two optimisers.

``minilib.training.fit`` has one optimiser and a loss without a state. Here each step takes two: the autoencoder's, and the
discriminator's on the same reconstructions. (The official code reconstructs again between the two, with the autoencoder's new
weights; that is a third of the cost for a half-step of difference.) There are no checkpoints and one process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minilib.training import Batch, FitConfig, FitResult, MakeBatch, step_generator, update_ema
from minilib.vae_losses import VAELoss, WithLogVariance, adaptive_weight


def hinge_discriminator_loss(real: Float[Tensor, "..."], fake: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """``(E relu(1 - real) + E relu(1 + fake)) / 2`` of logits: 0 once real ones are above 1 and fake ones below -1.

    Lim and Ye 2017, arXiv 1705.02894; halved as in ``CompVis/taming-transformers: taming/modules/losses/vqperceptual.py``.

    >>> hinge_discriminator_loss(torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 0.0]))
    tensor(0.3750)
    """
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """``-E fake``."""
    return -fake.mean()


def fit_adversarial(
    model: WithLogVariance,
    discriminator: nn.Module,
    loss: VAELoss,
    make_batch: MakeBatch,
    config: FitConfig,
    *,
    start: int,
    weight: float = 0.5,
    device: torch.device | str = "cpu",
) -> FitResult:
    """Train ``model`` in place, from step ``start`` on against ``discriminator``, which is trained in place too; keep an EMA.

    Args:
        model: the autoencoder with its log variance.
        discriminator: gives logits, above 0 for real.
        loss: the rest of the loss.
        make_batch: gives ``x`` and ``noise``, as for ``fit``.
        config: of both optimisers; latent diffusion has Adam with betas (0.5, 0.9).
        start: the first step (from 0) with the discriminator; 50,001 in latent diffusion.
        weight: of the adversarial term, beside the adaptive weight.
        device: where to train.

    Returns:
        the history holds the autoencoder's loss a value, with the adversarial term.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model.to(device).train(), discriminator.to(device).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    players = (model, discriminator)
    optimisers = [
        torch.optim.AdamW(p.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay)
        for p in players
    ]
    history = []
    for step in range(config.steps):
        batch = make_batch(step_generator(config.seed, step), config.batch_size)
        batch = {key: value.to(device) for key, value in batch.items()}
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = config.lr * config.lr_factor(step)
        opponent = discriminator if step >= start else None
        value, reconstruction = autoencoder_loss(model, loss, batch, opponent, weight)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} at step {step}; lower lr or weight")
        _update(value, model.parameters(), optimisers[0], config.clip)
        if opponent is not None:
            verdict = hinge_discriminator_loss(opponent(batch["x"]), opponent(reconstruction.detach()))
            _update(verdict, opponent.parameters(), optimisers[1], config.clip)
        update_ema(ema, model, config.ema_decay, step)
        history.append(value.item())
    return FitResult(model.eval(), ema, history)


def autoencoder_loss(
    model: WithLogVariance, loss: VAELoss, batch: Batch, discriminator: nn.Module | None, weight: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "b c h w"]]:
    """The autoencoder's side: the loss a value, with the adversarial term if there is a discriminator, and the reconstruction."""
    terms = loss.terms(model, batch)
    total = terms.nll + loss.kl_weight * terms.kl
    if discriminator is not None:
        fooling = hinge_generator_loss(discriminator(terms.reconstruction))
        last_layer = model.vae.decoder.conv_out.weight
        total = total + adaptive_weight(terms.nll, fooling, last_layer, scale=weight) * fooling
    return total / batch["x"][0].numel(), terms.reconstruction


def _update(
    loss: Tensor, parameters: Iterable[nn.Parameter], optimiser: torch.optim.Optimizer, clip: float
) -> None:
    # The autoencoder's loss also reaches the discriminator's weights: only the gradients asked for are taken.
    parameters = list(parameters)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
