"""What the tests of kernels share: inputs between bands of NaN, errors relative to float64."""

import torch

FORWARD = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Bound of ||out - out64|| / ||out64||; gradients may have three times as much."""


def guarded(tensor, band=64):
    """The same values as a view into a larger buffer that is NaN everywhere else, also between the rows."""
    flat = torch.full((tensor.numel() // tensor.shape[-1], tensor.shape[-1] + band), torch.nan)
    buffer = torch.cat([torch.full((band,), torch.nan), flat.flatten()]).to(tensor.dtype).to(tensor.device)
    view = buffer[band:].view(*tensor.shape[:-1], tensor.shape[-1] + band)[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def relative_error(out, expected, floor=1e-30):
    """||out - expected|| / max(||expected||, floor) in float64; infinite where ``out`` is not finite."""
    out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
    assert out.shape == expected.shape
    if not out.isfinite().all():
        return float("inf")
    return float((out - expected).norm() / expected.norm().clamp_min(floor))


def values_and_gradients(function, inputs, weights=None, seed=0):
    """Outputs, gradients of a random weighting of them, and the weights (reused for the reference)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if weights is None:
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, inputs, [w.to(o) for w, o in zip(weights, outputs, strict=True)])
    return outputs, gradients, weights


def compare(function, reference, inputs, dtype, factor=1.0):
    """Assert that values and gradients agree with ``reference`` in float64, within the bounds of ``dtype``.

    A gradient below 0.05 in norm is judged as if it were that long: one that cancels to zero has no relative error.
    """
    out, grads, weights = values_and_gradients(function, inputs)
    expected, wanted, _ = values_and_gradients(reference, [t.double() for t in inputs], weights)
    for a, b in zip(out, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) <= factor * FORWARD[dtype]
    for i, (a, b) in enumerate(zip(grads, wanted, strict=True)):
        assert relative_error(a, b, 0.05) <= 3 * factor * FORWARD[dtype], f"gradient of input {i}"
