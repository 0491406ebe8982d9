"""The reverse step as Gaussians, for losses that train variances and for likelihoods.

With neighbouring steps t and t - 1 of the whole chain, abar before the first being 1 (Ho et al., 2020, arXiv 2006.11239, eq. 7):

    q(x_{t-1} | x_t, x_0) = N( alpha_{t-1} beta_t / sigma_t^2 x_0 + sqrt(1 - beta_t) sigma_{t-1}^2 / sigma_t^2 x_t ,  beta~_t ),
    beta~_t = sigma_{t-1}^2 / sigma_t^2 beta_t.

beta~_0 is 0. Where its logarithm is needed, that of beta~_1 stands in (Nichol and Dhariwal, 2021, arXiv 2102.09672;
openai/improved-diffusion, gaussian_diffusion.py). The variational bound's terms are KL divergences between these and the model's.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .conversion import predict_x0
from .noising import BetaScheduler


def _coefficients(scheduler: BetaScheduler, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(on x_0, on x_t, log beta~, log beta) at t ``(b,)``, broadcastable against ``like``."""

    def terms(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bar = scheduler.alpha_bar(t)
        before = torch.where(t > 0, scheduler.alpha_bar((t - 1).clamp(min=0)), 1.0)
        return bar, before, 1 - bar / before

    bar, before, beta = terms(t)
    later_bar, later_before, later_beta = terms(t.clamp(min=1))
    log_small = torch.log((1 - later_before) / (1 - later_bar) * later_beta)
    on_x0 = before.sqrt() * beta / (1 - bar)
    on_x = (1 - beta).sqrt() * (1 - before) / (1 - bar)
    shape = (-1, *[1] * (like.ndim - 1))
    on_x0, on_x, log_small, log_large = (
        c.to(like.dtype).view(shape) for c in (on_x0, on_x, log_small, torch.log(beta))
    )
    return on_x0, on_x, log_small, log_large


def ddpm_posterior(
    scheduler: BetaScheduler, x0: Float[Tensor, "*shape"], x_t: Float[Tensor, "*shape"], t: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """(mean, log variance) of q(x_{t-1} | x_t, x_0); the log variance at t = 0 is that of t = 1."""
    on_x0, on_x, log_small, _ = _coefficients(scheduler, t.to(x0.device), x0)
    return on_x0 * x0 + on_x * x_t, log_small.expand_as(x0)


def learned_range_log_variance(
    scheduler: BetaScheduler, v: Float[Tensor, "*shape"], t: Int[Tensor, " b"]
) -> Float[Tensor, "*shape"]:
    """``f log beta_t + (1 - f) log beta~_t`` with ``f = (v + 1) / 2`` (Nichol and Dhariwal, 2021, eq. 15)."""
    _, _, small, large = _coefficients(scheduler, t.to(v.device), v)
    return 0.5 * (large - small) * v + 0.5 * (large + small)


def predicted_posterior(
    scheduler: BetaScheduler,
    model_output: Float[Tensor, "b c2 ..."],
    x_t: Float[Tensor, "b c ..."],
    t: Int[Tensor, " b"],
) -> tuple[Float[Tensor, "b c ..."], Float[Tensor, "b c ..."]]:
    """(mean, log variance) of the model's p(x_{t-1} | x_t); of 2c channels the second half are the v of ``learned_range``.

    With c channels the variance is beta~. x_0 is not clipped.

    Raises:
        ValueError: neither c nor 2c channels.
    """
    channels = x_t.shape[1]
    if model_output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"model_output has {model_output.shape[1]} channels; {channels} or {2 * channels} were expected"
        )
    output, v = model_output[:, :channels], model_output[:, channels:]
    alpha, sigma = scheduler.levels(t, x_t)
    x0 = predict_x0(scheduler.config.prediction_type, output, x_t, alpha, sigma)
    mean, log_variance = ddpm_posterior(scheduler, x0, x_t, t)
    return mean, learned_range_log_variance(scheduler, v, t) if v.shape[1] else log_variance


def gaussian_kl(
    mean1: Float[Tensor, "..."],
    log_variance1: Float[Tensor, "..."],
    mean2: Float[Tensor, "..."],
    log_variance2: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """KL(N1 || N2) of each element, in nats; the arguments broadcast.

    >>> one = torch.ones(1)
    >>> gaussian_kl(one, 0 * one, 0 * one, 0 * one)
    tensor([0.5000])
    """
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.exp(difference) - 1 - difference + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))
