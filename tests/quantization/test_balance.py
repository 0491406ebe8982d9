"""Channel balance: closed forms, exactness, statistics over time, what is refused."""

import pytest
import torch
from torch import nn

from minilib.models import MMDiT
from minilib.quantization import (
    ChannelBalance,
    ChannelMaxima,
    QuantRule,
    QuantSpec,
    TimeRanges,
    balance_scale,
    channel_balance,
    quantize_model,
    watch_channels,
)

OUTPUTS = QuantSpec(8, "channel", dynamic=True)
TOKENS = QuantSpec(8, "token", dynamic=True)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Timed(nn.Module):
    """A layer that is told the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_ranges_are_half_open_and_agree_for_one_and_many() -> None:
    ranges = TimeRanges((250.0, 500.0))
    times = [0.0, 249.999, 250.0, 250.001, 499.0, 500.0, 1000.0]
    assert [ranges.index(t) for t in times] == [0, 0, 1, 1, 1, 2, 2]
    assert ranges.indices(torch.tensor(times)).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert len(ranges) == 3 and len(TimeRanges()) == 1
    for edges in ((5.0, 5.0), (7.0, 3.0)):
        with pytest.raises(ValueError, match="rise"):
            TimeRanges(edges)


def test_maxima_are_those_of_all_values_seen() -> None:
    x = drawn(5, 4, 6, seed=1)
    seen = ChannelMaxima(6)
    for part in x.split(2):
        seen.update(part)
    assert torch.equal(seen.values[0], x.abs().amax((0, 1)))
    seen.update(x[:0])  # nothing changes nothing
    assert torch.equal(seen.values[0], x.abs().amax((0, 1)))
    with pytest.raises(ValueError, match="width 5"):
        seen.update(drawn(2, 5))


def test_momentum_averages_the_maxima_of_batches() -> None:
    seen = ChannelMaxima(1, momentum=0.75)
    for value in (4.0, -8.0, 0.0):
        seen.update(torch.tensor([[value]]))
    # 4; 0.75 * 4 + 0.25 * 8 = 5; 0.75 * 5 = 3.75
    assert seen.values.item() == pytest.approx(3.75)
    for momentum in (1.0, -0.1):
        with pytest.raises(ValueError, match="momentum"):
            ChannelMaxima(1, momentum=momentum)


def test_watching_sorts_samples_by_their_time_and_leaves_the_model_alone() -> None:
    model, x, t = Timed(), drawn(4, 2, 3, seed=2), torch.tensor([100.0, 600.0, 499.0, 900.0])
    before = model(x, t)
    with watch_channels(model, ["layer"], ranges=TimeRanges((500.0,))) as maxima:
        model(x[:2], t[:2])
        after = model(x, t=t)  # the time may come by name
    assert torch.equal(before, after)
    early, late = x[[0, 2]].abs().amax((0, 1)), x[[1, 3]].abs().amax((0, 1))
    assert torch.equal(maxima["layer"].values, torch.stack([early, late]))
    model(10 * x, t)  # no longer watched
    assert torch.equal(maxima["layer"].values, torch.stack([early, late]))


def test_watching_refuses_what_is_no_linear_layer() -> None:
    with (
        pytest.raises(ValueError, match="'missing' is no linear layer"),
        watch_channels(Timed(), ["missing"]),
    ):
        pass


@pytest.mark.parametrize("alpha", [0.0, 0.11, 0.5, 1.0])
def test_scale_is_the_formula(alpha: float) -> None:
    largest, weight = drawn(7, seed=3).abs() + 0.1, drawn(4, 7, seed=4)
    s = balance_scale(largest, weight, alpha)
    for c in range(7):
        assert s[c].item() == pytest.approx(
            largest[c].item() ** alpha / weight[:, c].abs().max().item() ** (1 - alpha), rel=1e-5
        )
    # What s evens out: all activation channels at alpha = 1, all weight columns at alpha = 0, both to the same at 1/2.
    levelled, columns = largest / s, weight.abs().amax(0) * s
    if alpha == 1.0:
        assert torch.allclose(levelled, torch.ones(7))
    if alpha == 0.0:
        assert torch.allclose(columns, torch.ones(7))
    if alpha == 0.5:
        assert torch.allclose(levelled, columns)


def test_dead_channels_keep_a_factor_of_one() -> None:
    weight = torch.tensor([[1.0, 0.0, 4.0]])
    s = balance_scale(torch.tensor([0.0, 3.0, 4.0]), weight, 0.5)
    assert s.tolist() == [1.0, 1.0, 1.0]
    assert torch.isfinite(s).all()


def test_scale_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="alpha 1.5"):
        balance_scale(torch.ones(2), torch.ones(1, 2), 1.5)
    with pytest.raises(ValueError, match="3 channels given, the weight reads 2"):
        balance_scale(torch.ones(3), torch.ones(1, 2))


def test_the_layer_computes_what_it_did() -> None:
    x, w = drawn(5, 9, 12, seed=5).double(), drawn(8, 12, seed=6).double()
    balance = ChannelBalance(drawn(12, seed=7).abs() + 0.05)
    out = balance.activation(x) @ balance.weight(w).T
    assert float((out - x @ w.T).abs().max()) < 1e-5 * float((x @ w.T).abs().max())
    assert not torch.equal(balance.activation(x), x)


def test_balance_is_exact_where_factors_are_powers_of_two() -> None:
    x, w = drawn(4, 6, seed=8), drawn(5, 6, seed=9)
    balance = ChannelBalance(torch.tensor([1.0, 2.0, 0.5, 8.0, 0.25, 4.0]))
    assert torch.equal(balance.activation(x) * balance.scale, x)
    assert torch.equal(balance.weight(w) / balance.scale, w)


def test_gradients_pass() -> None:
    balance = ChannelBalance(torch.tensor([2.0, 4.0]))
    x, w = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    (balance.activation(x).sum() + balance.weight(w).sum()).backward()
    assert x.grad.tolist() == [[0.5, 0.25]] and w.grad.tolist() == [[2.0, 4.0]]


def test_ranges_of_time_pick_their_row() -> None:
    balance = ChannelBalance(torch.tensor([[1.0, 1.0], [2.0, 4.0]]), TimeRanges((500.0,)))
    x = torch.ones(1, 2)
    assert balance.activation(x, torch.tensor([499.0])).tolist() == [[1.0, 1.0]]
    assert balance.activation(x, torch.tensor([500.0, 900.0])).tolist() == [[0.5, 0.25]]
    assert balance.weight(x, torch.tensor([500.0])).tolist() == [[2.0, 4.0]]
    assert balance.key(torch.tensor([3.0])) == 0 and balance.key(torch.tensor([700.0])) == 1
    with pytest.raises(ValueError, match="several ranges: call once"):
        balance.activation(x, torch.tensor([100.0, 900.0]))
    with pytest.raises(ValueError, match="needs to know the time"):
        balance.weight(x)


def test_bad_factors_are_refused() -> None:
    for scale in ([1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="positive and finite"):
            ChannelBalance(torch.tensor(scale))
    with pytest.raises(ValueError, match="2 rows of factors given for 1 ranges"):
        ChannelBalance(torch.ones(2, 3))


def test_from_statistics_to_a_quantised_model_with_one_weight_a_range() -> None:
    torch.manual_seed(0)
    model, x = Timed(), drawn(6, 5, 3, seed=10) * torch.tensor([1.0, 30.0, 0.1])
    ranges = TimeRanges((500.0,))
    with watch_channels(model, ["layer"], ranges=ranges) as maxima, torch.no_grad():
        model(x, torch.full((6,), 100.0))
        with pytest.raises(ValueError, match="no activation in time range \\[1\\]"):
            channel_balance(model, maxima, ranges=ranges)
        model(3 * x, torch.full((6,), 900.0))
    balances = channel_balance(model, maxima, alpha=0.7, ranges=ranges)
    for row, seen in enumerate(maxima["layer"].values):
        assert torch.equal(balances["layer"].scale[row], balance_scale(seen, model.layer.weight, 0.7))
    with (
        torch.no_grad(),
        quantize_model(model, [QuantRule("layer", OUTPUTS, TOKENS)], transforms=balances) as layers,
    ):
        for t in (100.0, 900.0, 200.0):
            model(x, torch.full((6,), t))
        assert len(layers["layer"]._rounded) == 2


def test_balancing_helps_where_one_channel_is_large() -> None:
    torch.manual_seed(0)
    model = Timed()
    x = drawn(8, 16, 3, seed=11) * torch.tensor([50.0, 1.0, 1.0])
    t, true = torch.zeros(8), model(x, torch.zeros(8)).detach()
    with watch_channels(model, ["layer"]) as maxima, torch.no_grad():
        model(x, t)
    balances, errors = channel_balance(model, maxima), {}
    for name, transforms in {"plain": None, "balanced": balances}.items():
        rule = [
            QuantRule("layer", QuantSpec(6, "channel", dynamic=True), QuantSpec(6, "token", dynamic=True))
        ]
        with torch.no_grad(), quantize_model(model, rule, transforms=transforms):
            errors[name] = float((model(x, t) - true).square().mean())
    assert errors["balanced"] < 0.5 * errors["plain"]


def test_without_rounding_a_transformed_mmdit_is_the_model() -> None:
    torch.manual_seed(0)
    model = MMDiT(hidden_size=32, depth=2, num_heads=4, context_dim=8).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    call = (drawn(2, 3, 8, 8, seed=12), torch.tensor([100.0, 700.0]), drawn(2, 5, 8, seed=13))
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n and "adaLN" not in n
    ]
    with torch.no_grad():
        with watch_channels(model, names) as maxima:
            true = model(*call)
        with quantize_model(model, [QuantRule(names)], transforms=channel_balance(model, maxima)):
            out = model(*call)
    assert 0 < float((out - true).abs().max()) < 1e-4 * float(true.abs().max())
