"""What a frozen feature knows: the accuracy of a linear read-out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear_probe(
    train_x: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    test_y: Int[Tensor, " m"],
    *,
    ridge: float = 1e-3,
) -> float:
    """Share of test samples that a linear classifier gets right. It is fitted in closed form, so there is nothing to tune.

    Features are standardised on the training set; then ridge regression on one-hot labels, with a penalty of ``ridge`` times
    the number of samples; the largest output wins.

    Raises:
        ValueError: no samples, or a negative ridge.

    >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    >>> linear_probe(x, torch.tensor([0, 0, 1, 1]), x, torch.tensor([0, 0, 1, 0]))
    0.75
    """
    if not len(train_x) or not len(test_x) or ridge < 0:
        raise ValueError(
            f"need samples on both sides and ridge >= 0; got {len(train_x)}, {len(test_x)}, {ridge}"
        )
    train_x, test_x = train_x.double(), test_x.double()
    mean, std = train_x.mean(0), train_x.std(0, correction=0).clamp(min=1e-6)
    a, b = (train_x - mean) / std, (test_x - mean) / std
    classes = int(max(train_y.max(), test_y.max())) + 1
    wanted = torch.nn.functional.one_hot(train_y, classes).double()
    bias = wanted.mean(0)
    penalty = ridge * len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    weight = torch.linalg.solve(a.T @ a + penalty, a.T @ (wanted - bias))
    return float(((b @ weight + bias).argmax(1) == test_y).double().mean())
