import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib import operators
from minilib.attention import Attention, full_attention, naive_attention
from minilib.attention.backends import BACKENDS, attention_backend
from minilib.models import DiT, UNet
from minilib.models.video import FactorisedBlock
from minilib.operators import KINDS, OperatorTrace, count_operators, shares, time_operators
from minilib.profiling import count_flops


class Mixed(nn.Module):
    """One of each kind, with hand-countable sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.attn = Attention(8, 2)
        self.last = nn.LayerNorm(8)

    def forward(self, x):
        h = F.silu(self.norm(self.conv(x)))
        tokens = self.attn(h.flatten(2).transpose(1, 2))
        return self.last(tokens) @ torch.ones(8, 8, device=x.device)


def mixed_flops(b, n):
    return {
        "attention": 4 * b * n * n * 8,
        "convolution": 2 * b * n * 9 * 3 * 8,
        "linear": 2 * b * n * 8 * (24 + 8),
        "norm": 0,
        "other": 2 * b * n * 8 * 8,
    }


class TestFlops:
    @pytest.mark.parametrize("b, side", [(1, 4), (3, 5)])
    def test_by_kind_on_meta_and_on_the_machine(self, b, side):
        model, x = Mixed(), torch.zeros(b, 3, side, side)
        assert count_operators(model, x).flops == mixed_flops(b, side * side)
        for name in BACKENDS:
            with attention_backend(name), OperatorTrace(flops=True) as trace:
                model(x)
            assert trace.flops == mixed_flops(b, side * side), name

    def test_they_add_up_to_the_counter_of_profiling(self):
        model = UNet(block_out_channels=(16, 32), attention_levels=(1,), cross_attention_dim=12)
        args = torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, 5, 12)
        assert sum(count_operators(model, *args).flops.values()) == count_flops(model, *args).flops

    def test_without_asking_they_are_zero(self):
        with OperatorTrace() as trace:
            nn.Linear(3, 4)(torch.zeros(5, 3))
        assert trace.flops == dict.fromkeys(KINDS, 0)

    def test_entered_twice_it_adds_up(self):
        trace, layer = OperatorTrace(flops=True), nn.Linear(3, 4)
        for _ in range(2):
            with trace:
                layer(torch.zeros(5, 3))
        assert trace.flops == {**dict.fromkeys(KINDS, 0), "linear": 240}
        assert len(trace.calls) == 2


class TestKinds:
    def test_norms_as_functions_and_as_modules(self):
        x = torch.randn(2, 8, 4, 4)
        with OperatorTrace() as trace:
            F.layer_norm(x, (4,))
            F.group_norm(x, 2)
            torch.group_norm(x, 2, eps=1e-5)
            nn.RMSNorm(4)(x)
            nn.BatchNorm2d(8)(x)
            nn.InstanceNorm2d(8)(x)
        assert [call.kind for call in trace.calls] == ["norm"] * 6

    def test_convolutions_of_all_kinds(self):
        x = torch.randn(1, 2, 8)
        with OperatorTrace() as trace:
            nn.Conv1d(2, 2, 3)(x)
            nn.Conv2d(2, 2, 3)(torch.randn(1, 2, 8, 8))
            nn.Conv3d(2, 2, 3)(torch.randn(1, 2, 8, 8, 8))
            nn.ConvTranspose2d(2, 2, 3)(torch.randn(1, 2, 8, 8))
        assert [call.kind for call in trace.calls] == ["convolution"] * 4

    def test_written_out_attention_is_other(self):
        q = torch.randn(1, 2, 4, 8)
        with OperatorTrace(flops=True) as trace:
            naive_attention(q, q, q)
        assert trace.calls == [] and trace.flops["other"] == 4 * 2 * 4 * 4 * 8

    def test_an_attention_is_one_call_whatever_computes_it(self):
        q = torch.randn(1, 2, 4, 8)
        for name in BACKENDS:
            with attention_backend(name), OperatorTrace() as trace:
                full_attention(q, q, q)
            assert [call.kind for call in trace.calls] == ["attention"]


class TestLengths:
    def test_queries_and_keys_in_order(self):
        model = UNet(
            block_out_channels=(16, 32), attention_levels=(0, 1), cross_attention_dim=12, layers_per_block=1
        )
        lengths = count_operators(
            model, torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 5, 12)
        ).lengths
        sides = (64, 16, 16, 16, 16, 64, 64)
        assert lengths == [pair for n in sides for pair in ((n, n), (n, 5))]

    def test_factorised_attention_shows_what_it_really_runs(self):
        block = FactorisedBlock(8, 2, (3, 2, 2))
        assert count_operators(block, torch.zeros(2, 12, 8)).lengths == [(4, 4), (3, 3)]


class TestTime:
    def test_kinds_add_up_to_the_whole(self):
        model, x = Mixed(), torch.randn(2, 3, 16, 16)
        trace = time_operators([lambda: model(x)], repeats=2)[0][1]
        assert set(trace.seconds) == set(KINDS)
        assert sum(trace.seconds.values()) == pytest.approx(trace.total_seconds)
        assert all(value >= 0 for value in trace.seconds.values())
        assert sum(shares(trace.seconds).values()) == pytest.approx(1)

    def test_time_goes_to_the_operator_that_took_it(self, monkeypatch):
        ticks = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0])  # enter; linear 1 to 3; norm 10 to 14; leave
        monkeypatch.setattr(operators.time, "process_time", lambda: next(ticks))
        with OperatorTrace() as trace:
            F.layer_norm(F.linear(torch.zeros(2, 3), torch.zeros(4, 3)), (4,))
        assert trace.seconds == {"attention": 0, "convolution": 0, "linear": 2, "norm": 4, "other": 14}

    def test_functions_run_in_turns_after_a_warm_up(self):
        order = []
        traces = time_operators([lambda: order.append("a"), lambda: order.append("b")], repeats=3)
        assert order == list("ab") + list("ab") + list("ba") + list("ab")
        assert [len(own) for own in traces] == [3, 3]

    def test_traces_come_turn_by_turn(self, monkeypatch):
        # Two functions; enter and leave: a, b, then b, a.
        ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0, 30.0, 31.0])
        monkeypatch.setattr(operators.time, "process_time", lambda: next(ticks))
        traces = time_operators([lambda: None, lambda: None], repeats=2)
        assert [[trace.total_seconds for trace in own] for own in traces] == [[5, 1], [2, 9]]

    def test_no_repeats_are_refused(self):
        with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
            time_operators([lambda: None], repeats=0)


class TestBytes:
    def test_what_goes_in_and_comes_out(self):
        with OperatorTrace() as trace:
            F.linear(torch.zeros(5, 3), torch.zeros(4, 3), torch.zeros(4))
            q = torch.zeros(1, 2, 6, 8)
            F.scaled_dot_product_attention(q, q.clone(), q.clone())
        assert [call.bytes for call in trace.calls] == [4 * (15 + 12 + 4 + 20), 4 * 4 * 96]


def test_the_output_does_not_change_and_nothing_stays_behind():
    model = DiT(hidden_size=32, depth=2).eval()
    args = torch.randn(2, 1, 8, 8), torch.tensor([0, 5]), torch.tensor([1, 2])
    with torch.no_grad():
        plain = model(*args)
        with OperatorTrace() as trace:
            inside = model(*args)
        number = len(trace.calls)
        assert torch.equal(plain, inside) and torch.equal(plain, model(*args))
    assert len(trace.calls) == number


def test_gradients_pass_through():
    model, x = Mixed(), torch.randn(1, 3, 4, 4, requires_grad=True)
    model(x).square().sum().backward()
    before, x.grad = x.grad, None
    with OperatorTrace():
        out = model(x)
    out.square().sum().backward()
    assert torch.equal(before, x.grad)


def test_an_error_inside_leaves_the_mode():
    with pytest.raises(ZeroDivisionError), OperatorTrace(flops=True) as trace:
        raise ZeroDivisionError
    nn.Linear(2, 2)(torch.zeros(1, 2))
    assert trace.calls == []


def test_shares_of_nothing_are_refused():
    with pytest.raises(ValueError, match="nothing was measured"):
        shares(dict.fromkeys(KINDS, 0.0))
