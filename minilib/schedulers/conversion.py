"""What the network predicts, and how to read x_0 and the noise from it.

With ``x = alpha x_0 + sigma eps`` and ``alpha^2 + sigma^2 = 1``, a network may predict

    epsilon        eps                          (Ho et al., 2020, arXiv 2006.11239)
    sample         x_0
    v_prediction   v = alpha eps - sigma x_0    (Salimans and Ho, 2022, arXiv 2202.00512, appendix D)

(x, v) is (x_0, eps) turned by an angle, so turning back gives x_0 = alpha x - sigma v and eps = sigma x + alpha v. Each of x_0
and eps is therefore ``a x + b output`` with two numbers that depend on the level alone: these are computed once per table.
"""

from jaxtyping import Float
from torch import Tensor

from .base import choose

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def x0_coefficients(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(a, b) with ``x_0 = a x + b output``.

    >>> x0_coefficients("v_prediction", 0.6, 0.8)
    (0.6, -0.8)
    """
    choose("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    return (0.0, 1.0) if prediction_type == "sample" else (alpha, -sigma)


def epsilon_coefficients(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(a, b) with ``eps = a x + b output``.

    >>> epsilon_coefficients("v_prediction", 0.6, 0.8)
    (0.8, 0.6)
    """
    choose("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "sample":
        return 1 / sigma, -alpha / sigma
    return (0.0, 1.0) if prediction_type == "epsilon" else (sigma, alpha)


def predict_x0(
    prediction_type: str,
    output: Float[Tensor, "..."],
    x: Float[Tensor, "..."],
    alpha: float | Float[Tensor, "..."],
    sigma: float | Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """x_0 from a network's output, in any of the three forms; ``alpha`` and ``sigma`` broadcast against ``x``."""
    choose("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    return output if prediction_type == "sample" else alpha * x - sigma * output


def prediction_target(
    prediction_type: str,
    x0: Float[Tensor, "..."],
    noise: Float[Tensor, "..."],
    alpha: float | Float[Tensor, "..."],
    sigma: float | Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """What the network should have said: the inverse of :func:`predict_x0`."""
    choose("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return noise
    return x0 if prediction_type == "sample" else alpha * noise - sigma * x0
