"""Recording, replacing and patching what modules take and give."""

import pytest
import torch
from torch import nn
from toys import randomise

from minilib.intervene import (
    patch,
    record_inputs,
    record_outputs,
    replace_input,
    replace_output,
    scale_inputs,
    scale_outputs,
    skip,
    trace_executions,
)


class TestRecord:
    def test_outputs_stay_and_what_is_recorded_is_what_flows(self, model, inputs):
        before = model(*inputs)
        with (
            record_outputs(model, "blocks.*") as outputs,
            record_inputs(model, ["blocks.*", "**.fc2"]) as ins,
        ):
            recorded = model(*inputs)
            model(*inputs)
        assert torch.equal(recorded, before)
        assert [len(outputs[f"blocks.{i}"]) for i in range(3)] == [2, 2, 2]
        assert torch.equal(outputs["blocks.0"][0], ins["blocks.1"][0])
        assert torch.equal(outputs["blocks.1"][1], ins["blocks.2"][0])
        assert ins["blocks.0.mlp.fc2"][0].shape == (2, 16, 64)
        assert not outputs["blocks.2"][0].requires_grad
        model(*inputs)
        assert len(outputs["blocks.0"]) == 2

    def test_keyword_arguments_count_as_inputs(self):
        layer = randomise(nn.Linear(3, 2))
        with record_inputs(layer, "") as ins:
            layer(input=torch.ones(1, 3))
        assert torch.equal(ins[""][0], torch.ones(1, 3))

    def test_a_later_write_in_place_does_not_reach_the_record(self):
        model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
        with record_outputs(model, "0") as outputs, record_outputs(model, "0", reduce=lambda v: v[0]) as part:
            model(torch.tensor([[-1.0, 2.0]]))
        assert outputs["0"][0].tolist() == [[-1.0, 2.0]] and part["0"][0].tolist() == [-1.0, 2.0]

    def test_reduced(self, model, inputs):
        with (
            record_outputs(model, "blocks.0") as full,
            record_outputs(model, "blocks.0", reduce=lambda v: v.mean(1)) as mean,
        ):
            model(*inputs)
        assert torch.equal(mean["blocks.0"][0], full["blocks.0"][0].mean(1))

    def test_undetached_records_take_gradients(self, model, inputs):
        with record_outputs(model, "blocks.1", detach=False) as outputs:
            loss = model(*inputs).square().sum()
        (grad,) = torch.autograd.grad(loss, outputs["blocks.1"])
        h = outputs["blocks.1"][0].detach().clone()
        delta = torch.zeros_like(h)
        delta[0, 3, 5] = 1e-2

        def moved(sign):
            with replace_output(model, {"blocks.1": lambda module, args, out: h + sign * delta}):
                return model(*inputs).double().square().sum()

        slope = (moved(1) - moved(-1)) / 2e-2
        assert abs(slope - grad[0, 3, 5]) < 1e-2 * grad.abs().max()

    def test_recording_does_not_change_gradients(self, model, inputs):
        def grads():
            return torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))

        plain = grads()
        with record_outputs(model, "**"), record_inputs(model, "blocks.*"), trace_executions(model):
            assert all(torch.equal(a, b) for a, b in zip(plain, grads(), strict=True))

    def test_tuples_are_recorded_whole(self):
        class Two(nn.Module):
            def forward(self, x):
                return x, (x + 1, None)

        with record_outputs(Two(), "") as outputs:
            pass
        two = Two()
        with record_outputs(two, "") as outputs:
            two(torch.zeros(2))
        first, (second, nothing) = outputs[""][0]
        assert torch.equal(second, torch.ones(2)) and nothing is None and torch.equal(first, torch.zeros(2))


class TestReplace:
    def test_an_output_and_an_input(self, stack):
        x = torch.randn(2, 4)
        with replace_output(stack, {"1": lambda module, args, out: out - args[0]}):
            h = stack[0](x)
            torch.testing.assert_close(stack(x), stack[2](stack[1].linear(h)))
        with replace_input(stack, {"2": lambda module, v: 0 * v}):
            torch.testing.assert_close(stack(x), stack[2].linear.bias.expand(2, 4))

    def test_forgetting_the_return_is_refused(self, stack):
        for act in (
            replace_output(stack, {"1": lambda module, args, out: None}),
            replace_input(stack, {"1": lambda module, x: None}),
        ):
            with pytest.raises(TypeError, match="the edit of '1' returned None"), act:
                stack(torch.zeros(1, 4))

    def test_two_patterns_for_one_module(self, stack):
        same = lambda module, args, out: out  # noqa: E731
        with pytest.raises(ValueError, match=r"'0' matches both '\*' and '0'"):
            with replace_output(stack, {"*": same, "0": same}):
                pass

    def test_scaling_by_one_changes_no_bit_and_by_zero_prunes(self, model, inputs):
        before = model(*inputs)
        with scale_outputs(model, {"**.attn": 1.0}), scale_inputs(model, {"**.mlp.fc2": torch.ones(64)}):
            assert torch.equal(model(*inputs), before)
        with scale_outputs(model, {"blocks.*.attn": 0.0, "blocks.*.mlp": torch.zeros(())}):
            without = model(*inputs)
        with skip(model, "blocks.*"):
            assert torch.equal(model(*inputs), without)

    def test_one_factor_a_sample(self, model, inputs):
        before = model(*inputs)
        with scale_outputs(model, {"blocks.1.attn": torch.tensor([1.0, 0.5])}):
            out = model(*inputs)
        assert torch.equal(out[0], before[0]) and (out[1] - before[1]).abs().max() > 1e-4

    def test_pruned_hidden_channels_equal_a_smaller_network(self, model, inputs):
        mlp, x, mask = model.blocks[0].mlp, torch.randn(2, 5, 16), torch.rand(64) > 0.5
        with scale_inputs(model, {"blocks.0.mlp.fc2": mask.float()}):
            out = mlp(x)
        hidden = nn.functional.gelu(mlp.fc1(x)[..., mask], approximate="tanh")
        expected = nn.functional.linear(hidden, mlp.fc2.weight[:, mask], mlp.fc2.bias)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)

    def test_factors_get_gradients(self, stack):
        factor, x = torch.tensor(0.7, requires_grad=True), torch.randn(3, 4)
        with scale_outputs(stack, {"2": factor}):
            stack(x).sum().backward()
        torch.testing.assert_close(factor.grad, stack(x).sum())

    def test_a_factor_that_does_not_fit(self, stack):
        with pytest.raises(ValueError, match=r"2: the factor \(3,\) does not broadcast to \(2, 4\)"):
            with scale_outputs(stack, {"2": torch.ones(3)}):
                stack(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="does not broadcast"):
            with scale_outputs(stack, {"2": torch.ones(5, 2, 4)}):
                stack(torch.zeros(2, 4))


class TestPatch:
    def test_own_recording_is_the_identity(self, model, inputs):
        before = model(*inputs)
        with record_outputs(model, "blocks.*") as own:
            model(*inputs)
        with patch(model, own):
            assert torch.equal(model(*inputs), before)

    def test_last_block_of_another_run_gives_the_other_image(self, model, inputs, others):
        x, t, y = inputs
        with record_outputs(model, "blocks.2") as other:
            expected = model(others[0], t, y)
        with patch(model, {"blocks.2": other["blocks.2"][0]}):
            assert torch.equal(model(x, t, y), expected)
            assert torch.equal(model(2 * x, t, y), expected)
        assert not torch.equal(model(x, t, y), expected)

    def test_a_part_only(self, model, inputs, others):
        with record_outputs(model, "blocks.0") as own, record_outputs(model, "blocks.0.attn"):
            model(*inputs)
        with record_outputs(model, "blocks.0") as other:
            model(*others)
        some = (slice(None), slice(2, 5))
        with patch(model, other, index=some), record_outputs(model, "blocks.0") as mixed:
            model(*inputs)
        a, b, c = (r["blocks.0"][0] for r in (own, other, mixed))
        assert torch.equal(c[:, 2:5], b[:, 2:5])
        assert torch.equal(c[:, :2], a[:, :2]) and torch.equal(c[:, 5:], a[:, 5:])

    def test_calls_one_by_one_and_only_some(self, stack):
        recorded = {"0": [torch.full((1, 4), float(i)) for i in range(3)]}
        x = torch.ones(1, 4)
        with patch(stack, recorded, when=lambda call: call != 1), record_inputs(stack, "1") as seen:
            for _ in range(3):
                stack(x)
            with pytest.raises(IndexError, match="call 4 of '0', but only 3 calls were recorded"):
                stack(x)
        assert torch.equal(seen["1"][0], torch.zeros(1, 4)) and torch.equal(
            seen["1"][2], torch.full((1, 4), 2.0)
        )
        assert torch.equal(seen["1"][1], stack[0](x))

    def test_a_pattern_counts_each_module_by_itself(self, stack):
        values = [torch.full((1, 4), 1.0), torch.full((1, 4), 2.0)]
        with patch(stack, {"*": values}), record_outputs(stack, "*") as outputs:
            stack(torch.zeros(1, 4))
        assert all(torch.equal(calls[0], values[0]) for calls in outputs.values())

    def test_another_shape_is_refused(self, stack):
        with pytest.raises(ValueError, match=r"'0' gives \[\(2, 4\)\], the recording has \[\(1, 4\)\]"):
            with patch(stack, {"0": torch.zeros(1, 4)}):
                stack(torch.zeros(2, 4))

    def test_gradients_flow_around_and_into_the_patch(self, stack):
        new, x = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
        with patch(stack, {"1": new}, index=(slice(None), 0)):
            stack(x).sum().backward()
        assert (new.grad[:, 0] != 0).all() and (new.grad[:, 1:] == 0).all() and x.grad.abs().max() > 0
        with patch(stack, {"1": new}):
            assert torch.autograd.grad(stack(x).sum(), x, allow_unused=True) == (None,)
