"""Skipping and gating modules."""

import pytest
import torch
from torch import nn
from toys import randomise

from minilib.attention import record_attention
from minilib.intervene import (
    cached,
    every,
    first_tensors,
    gate,
    mask_weights,
    record_outputs,
    skip,
    trace_executions,
)
from minilib.models import DiT
from minilib.profiling import count_flops


class TestSkip:
    def test_output_is_the_input_and_nothing_inside_runs(self, stack):
        x = torch.randn(2, 4)
        with skip(stack, "1") as skipped, trace_executions(stack) as trace:
            out = stack(x)
        assert list(skipped) == ["1"] and stack[1].runs == 0
        assert trace.order == ["0", "0.linear", "2", "2.linear"]
        assert torch.equal(out, stack[2](stack[0](x)))

    def test_a_block_with_zero_gates_can_be_skipped(self, inputs):
        torch.manual_seed(0)
        model = DiT(input_size=4, hidden_size=16, depth=3, num_heads=2)
        nn.init.normal_(model.final_layer.linear.weight)
        nn.init.normal_(model.blocks[0].adaLN_modulation.weight)
        before = model(*inputs)
        with skip(model, "blocks.[12]"):
            assert torch.equal(model(*inputs), before)
        with skip(model, "blocks.0"):
            assert (model(*inputs) - before).abs().max() > 1e-3

    def test_a_module_that_changes_the_shape_is_refused(self, model, inputs):
        with pytest.raises(
            ValueError, match=r"'x_embedder' gives \(2, 16, 16\).*would hand on \(2, 1, 4, 4\)"
        ):
            with skip(model, "x_embedder"):
                model(*inputs)
        with pytest.raises(ValueError, match="'final_layer' gives"), skip(model, "final_layer"):
            model(*inputs)
        with skip(model, "final_layer", check=False):
            assert model(*inputs).shape == (2, 16, 4, 4), "what the check is for: no error, and nonsense"

    def test_the_check_sees_and_changes_nothing_else(self, inputs):
        model = randomise(DiT(input_size=4, hidden_size=16, depth=2, num_heads=2)).train()
        state = torch.get_rng_state()
        with (
            record_outputs(model, "**") as outputs,
            record_attention(model) as weights,
            trace_executions(model) as trace,
        ):
            with mask_weights(model, {"blocks.1.mlp.fc1.weight": torch.ones(16, requires_grad=True)}):
                with cached(model, "blocks.1.attn", every(1)), skip(model, "blocks.1"):
                    model(*inputs)
        assert [len(calls) for calls in weights.values()] == [1, 0]
        assert len(outputs["blocks.1"]) == 1 and outputs["blocks.1.attn"] == []
        assert trace.counts["blocks.1.attn"].calls == 0 and trace.counts["blocks.0.attn"].calls == 1
        assert torch.equal(torch.get_rng_state(), state)

    def test_operations_counted_inside_are_those_of_a_shallower_model(self, inputs):
        three, two = (DiT(input_size=4, hidden_size=16, depth=d, num_heads=2) for d in (3, 2))
        with skip(three, "blocks.1"):
            assert count_flops(three, *inputs) == count_flops(two, *inputs)

    def test_two_streams(self):
        class Two(nn.Module):
            def forward(self, x, context, c):
                return x + c, context - c

        two, x, context = Two(), torch.ones(2, 3), torch.ones(2, 5)
        with pytest.raises(ValueError, match="cannot be left out like this"), skip(two, ""):
            two(x, context, 1.0)
        with skip(two, "", bypass=first_tensors(2)):
            out = two(x, context=context, c=1.0)
        assert out[0] is x and out[1] is context
        with gate(two, {"": 0.25}, bypass=first_tensors(2)):
            a, b = two(x, context, 1.0)
        assert torch.equal(a, torch.full((2, 3), 1.25)) and torch.equal(b, torch.full((2, 5), 0.75))

    def test_without_tensors(self):
        with pytest.raises(ValueError, match="without a tensor"), skip(stack := nn.Identity(), ""):
            stack(3)


class TestGate:
    def test_neutral_and_closed(self, model, inputs):
        before = model(*inputs)
        with gate(model, {"blocks.*": 1.0}):
            assert torch.equal(model(*inputs), before)
        with skip(model, "blocks.1"):
            without = model(*inputs)
        with gate(model, {"blocks.1": torch.tensor([0.0, 1.0])}):
            mixed = model(*inputs)
        assert torch.equal(mixed[0], without[0]) and torch.equal(mixed[1], before[1])

    def test_gradient_by_finite_differences(self, stack):
        stack, x = stack.double(), torch.randn(2, 4, dtype=torch.float64)
        g = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)

        def loss(gates):
            with gate(stack, {"1": gates[0], "2": gates[1]}):
                return stack(x).square().sum()

        assert torch.autograd.gradcheck(loss, g)

    def test_a_gate_that_does_not_fit(self, stack):
        with pytest.raises(ValueError, match="1: the gate"), gate(stack, {"1": torch.ones(3)}):
            stack(torch.zeros(2, 4))
