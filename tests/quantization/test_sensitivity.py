import pytest
import torch
from torch import nn

from minilib.quantization import OFF, QuantRule, QuantSpec, calibrate, quantize_copy, sensitivity

SPECS = QuantSpec(3, "channel"), QuantSpec(4)


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))


def calls():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 6, generator=g),) for _ in range(3)]


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = stack()

    def forward(self, x, t):
        return self.body(x * t[:, None])


def test_one_layer_at_a_time_is_a_model_with_one_quantised_layer():
    model = stack()
    found = sensitivity(model, SPECS, calls())
    assert list(found) == ["0", "2", "4"]
    for name, error in found.items():
        # weights of the others are rounded while ranges are set: as there, set them with all in place
        alone = quantize_copy(model, [QuantRule("**", *SPECS)])
        calibrate(alone, calls())
        for other in set(found) - {name}:
            alone[int(other)] = model[int(other)]
        expected = [float((alone(*c) - model(*c)).square().sum() / model(*c).square().sum()) for c in calls()]
        assert error == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_the_model_is_left_as_it_was():
    model = stack()
    before = dict(model.named_modules())
    sensitivity(model, SPECS, calls(), names=["0", "4"])
    assert dict(model.named_modules()) == before


def test_full_precision_has_no_error_and_fewer_bits_more():
    model = stack()
    assert set(sensitivity(model, (OFF, OFF), calls()).values()) == {0.0}
    coarse, fine = (sensitivity(model, (QuantSpec(b, "channel"), OFF), calls()) for b in (3, 6))
    assert all(coarse[name] > 4 * fine[name] > 0 for name in coarse)


def test_time_runs_and_the_error_can_be_chosen():
    model = Timed()
    (x,) = calls()[0]
    timed = [(x, torch.full((16,), t)) for t in (1.0, 20.0)]
    by_time = sensitivity(model, (OFF, QuantSpec(4)), timed, timesteps=[1.0, 20.0])
    one = sensitivity(model, (OFF, QuantSpec(4)), timed)
    assert by_time["body.0"] < one["body.0"]  # the small inputs of t = 1 have a range of their own
    largest = sensitivity(model, (OFF, QuantSpec(4)), timed, error=lambda a, b: float((a - b).abs().max()))
    assert largest["body.0"] != one["body.0"]


def test_no_call_is_refused():
    with pytest.raises(ValueError, match="no call given"):
        sensitivity(stack(), SPECS, [])
