import copy
import re
from contextlib import ExitStack

import pytest
import torch
from snapshots import assert_untouched, bits, structure
from torch import nn

from minilib.attention import record_attention
from minilib.intervene import (
    at_steps,
    cached,
    every,
    first_tensors,
    gate,
    mask_weights,
    named_blocks,
    patch,
    record_inputs,
    record_outputs,
    replace_input,
    replace_modules,
    replace_output,
    scale_inputs,
    scale_outputs,
    skip,
    trace_executions,
    transform_weights,
)
from minilib.models import DiT
from minilib.models.mmdit import MMDiT
from minilib.models.unet import UNet
from minilib.profiling import count_flops, to_meta


def randomise(model, std=0.2):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model.eval()


@pytest.fixture(scope="module")
def shared_model():
    return randomise(DiT(input_size=4, hidden_size=16, depth=3, num_heads=2))


@pytest.fixture
def model(shared_model):
    before = structure(shared_model), bits(shared_model)
    yield shared_model
    shared_model.zero_grad()
    assert_untouched(shared_model, before)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 4, 4, generator=g), torch.tensor([3.0, 800.0]), torch.tensor([1, 10])


@pytest.fixture
def others():
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 1, 4, 4, generator=g), torch.tensor([40.0, 500.0]), torch.tensor([7, 2])


class Residual(nn.Module):
    """x + linear(x), and it counts how often it ran."""

    def __init__(self, dim=4):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x + self.linear(x)


@pytest.fixture
def stack():
    return randomise(nn.Sequential(*(Residual() for _ in range(3))), 0.5)


class TestNames:
    @pytest.mark.parametrize(
        "pattern, expected",
        [
            ("blocks.1.attn", ["blocks.1.attn"]),
            ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
            ("blocks.[02].mlp", ["blocks.0.mlp", "blocks.2.mlp"]),
            ("**.attn", ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]),
            ("**.fc?", ["t_embedder.fc1", "t_embedder.fc2"] + [f"blocks.{i}.mlp.fc{j}" for i in range(3) for j in (1, 2)]),
            (re.compile(r"blocks\.\d+\.mlp"), ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
            (["blocks.2", "x_embedder", "blocks.*"], ["x_embedder", "blocks.0", "blocks.1", "blocks.2"]),
            ("", [""]),
        ],
    )  # fmt: skip
    def test_in_the_order_of_the_model(self, model, pattern, expected):
        found = named_blocks(model, pattern)
        assert list(found) == expected
        assert all(found[name] is model.get_submodule(name) for name in expected)

    def test_everything(self, model):
        assert list(named_blocks(model, "**")) == [name for name, _ in model.named_modules() if name]

    @pytest.mark.parametrize("act", [named_blocks, record_outputs, record_inputs, skip, trace_executions])
    def test_a_name_that_matches_nothing_is_refused_with_near_names(self, model, act):
        with pytest.raises(ValueError, match="no module of DiT is called 'block.1.attn'.*'blocks.1.attn'"):
            with ExitStack() as stack:
                for_all = act(model, ["blocks.0", "block.1.attn"])
                stack.enter_context(for_all)

    @pytest.mark.parametrize(
        "act",
        [
            lambda m, n: cached(m, n, every(2)),
            lambda m, n: replace_output(m, {n: lambda module, args, out: out}),
            lambda m, n: replace_input(m, {n: lambda module, x: x}),
            lambda m, n: scale_outputs(m, {n: 1.0}),
            lambda m, n: scale_inputs(m, {n: 1.0}),
            lambda m, n: gate(m, {n: 1.0}),
            lambda m, n: patch(m, {n: torch.zeros(1)}),
            lambda m, n: replace_modules(m, {n: nn.Identity()}),
        ],
    )
    def test_every_intervention_refuses_unknown_names(self, model, act):
        with pytest.raises(ValueError, match=r"no module of DiT is called 'blocks.3'.*'blocks.0'"):
            with act(model, "blocks.3"):
                pass

    def test_a_container_is_never_called_and_is_refused(self, model):
        with pytest.raises(ValueError, match="'blocks' is a container, a ModuleList.*'blocks.0'"):
            with record_outputs(model, "blocks"):
                pass
        with record_outputs(model, "*") as records:
            pass
        assert list(records) == ["x_embedder", "t_embedder", "y_embedder", "final_layer"]

    def test_a_shared_module_is_taken_once(self):
        layer = nn.Linear(2, 2)
        model = nn.ModuleDict({"a": layer, "b": layer})
        assert list(named_blocks(model, "*")) == ["a"] and list(named_blocks(model, "b")) == ["b"]

    def test_no_name_at_all(self, model):
        with pytest.raises(ValueError, match="at least one"):
            named_blocks(model, [])


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


class TestCache:
    def test_nothing_reused_is_bit_identical(self, model, inputs):
        before = model(*inputs)
        with cached(model, "blocks.*", every(1)) as cache:
            for cache.step in range(3):
                assert torch.equal(model(*inputs), before)
        assert cache.computed == dict.fromkeys(["blocks.0", "blocks.1", "blocks.2"], 3) and not cache.reused

    def test_reused_where_the_policy_says(self, stack):
        xs = torch.randn(7, 2, 4)
        with cached(stack, "1", every(3)) as cache, record_outputs(stack, "1") as outputs:
            for cache.step in range(7):
                out = stack(xs[cache.step])
                last = 3 * (cache.step // 3)
                kept = stack[0](xs[last])
                assert torch.equal(outputs["1"][-1], kept + stack[1].linear(kept))
                assert torch.equal(out, stack[2](outputs["1"][-1]))
        assert cache.computed["1"] == 3 and cache.reused["1"] == 4 and stack[1].runs == 3

    @pytest.mark.parametrize("n, steps", [(1, 10), (2, 10), (3, 10), (5, 9)])
    def test_number_of_refreshes(self, stack, n, steps):
        with cached(stack, ["0", "1"], every(n)) as cache:
            for _ in range(steps):
                stack(torch.ones(1, 4))
        assert cache.computed == {"0": -(-steps // n), "1": -(-steps // n)}
        assert sum(cache.reused.values()) == 2 * (steps - -(-steps // n))

    def test_listed_steps_by_module(self, stack):
        with cached(stack, "[01]", {"0": at_steps([0, 1]), "1": at_steps([0, 4])}) as cache:
            with trace_executions(stack, "*") as trace:
                for cache.step in range(5):
                    stack(torch.ones(1, 4))
        assert cache.computed == {"0": 2, "1": 2}
        assert trace.order == ["0", "1", "2", "0", "2", "2", "2", "1", "2"]
        with pytest.raises(ValueError, match=r"policies for \['0'\], modules \['0', '1'\]"):
            with cached(stack, "[01]", {"0": every(2)}):
                pass

    def test_the_first_call_computes_whatever_the_policy(self, stack):
        with cached(stack, "0", lambda step: False) as cache:
            assert torch.equal(stack[0](torch.ones(1, 4)), stack[0](torch.zeros(1, 4)))
        assert cache.computed["0"] == 1 and cache.reused["0"] == 1

    def test_what_is_kept_is_never_written_into(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
        nn.init.constant_(model[0].bias, -1.0)
        x = torch.randn(4, 3)
        with torch.no_grad():
            expected = model[0](x)
            with cached(model, "0", every(10)), record_outputs(model, "0") as outputs:
                for _ in range(3):
                    model(x)
                    model(x).mul_(0)
        assert (expected < 0).any() and all(torch.equal(out, expected) for out in outputs["0"])

    def test_each_guidance_half_has_its_own(self, stack):
        cond, uncond = torch.randn(1, 4), torch.randn(1, 4)
        with cached(stack, "1", every(2)) as cache, record_outputs(stack, "1") as outputs:
            for cache.step in range(2):
                for cache.key, x in (("cond", cond), ("uncond", uncond)):
                    stack(x + cache.step)
        c, u = (stack[1](stack[0](x)) for x in (cond, uncond))
        assert [torch.equal(a, b) for a, b in zip(outputs["1"], [c, u, c, u], strict=True)] == [True] * 4
        assert cache.computed["1"] == 2 and cache.reused["1"] == 2

    def test_each_key_counts_its_own_calls(self, stack):
        with cached(stack, "1", every(2)) as cache:
            for _ in range(4):
                for cache.key in ("cond", "uncond"):
                    stack(torch.ones(1, 4))
        assert cache.computed["1"] == 4 and cache.reused["1"] == 4

    def test_halves_under_one_key_are_refused(self, stack):
        with cached(stack, "1", every(2)) as cache:
            cache.step = 0
            stack(torch.ones(1, 4))
            with pytest.raises(RuntimeError, match="'1' is to be computed twice in step 0 under key None"):
                stack(torch.zeros(1, 4))

    def test_a_batch_of_another_size_is_refused(self, stack):
        with cached(stack, "1", every(2)):
            stack(torch.ones(1, 4))
            with pytest.raises(
                RuntimeError, match=r"'1' got \[\(2, 4\)\], its output was kept for \[\(1, 4\)\]"
            ):
                stack(torch.ones(2, 4))

    def test_gradients_reach_the_step_that_computed(self, stack):
        first, second = (torch.randn(1, 4, requires_grad=True) for _ in range(2))
        for detach in (False, True):
            with cached(stack, "1", every(2), detach=detach):
                stack(first)
                out = stack(second).sum()
            grads = (
                torch.autograd.grad(out, [first, second], allow_unused=True) if not detach else (None, None)
            )
            assert (grads[0] is not None) is not detach and grads[1] is None
            assert out.requires_grad

    def test_clear_forgets(self, stack):
        with cached(stack, "1", every(5)) as cache:
            stack(torch.ones(1, 4))
            cache.clear()
            out = stack(torch.zeros(1, 4))
        assert torch.equal(out, stack(torch.zeros(1, 4))) and cache.computed["1"] == 2

    def test_bad_arguments(self, stack):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            every(0)
        with pytest.raises(ValueError, match="'0.linear' lies inside '0'"), cached(stack, "**", every(2)):
            pass

    def test_no_grad_and_inference_mode(self, model, inputs, others):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), cached(model, "blocks.[12]", every(2)):
                first, second = model(*inputs), model(*others)
            assert torch.equal(first, model(*inputs)) and not torch.equal(second, model(*others))

    def test_operations_of_a_cached_step(self, inputs):
        model = to_meta(DiT(input_size=4, hidden_size=16, depth=3, num_heads=2))
        shallow = DiT(input_size=4, hidden_size=16, depth=1, num_heads=2)
        with cached(model, "blocks.[12]", every(2)):
            full, part = count_flops(model, *inputs), count_flops(model, *inputs)
        assert full == count_flops(DiT(input_size=4, hidden_size=16, depth=3, num_heads=2), *inputs)
        assert part == count_flops(shallow, *inputs)


class TestWeights:
    def test_a_mask_of_ones_changes_no_bit_and_rows_are_pruned(self, model, inputs):
        before = model(*inputs)
        name = "blocks.1.mlp.fc1.weight"
        with mask_weights(model, {name: torch.ones(64, 16), "blocks.0.attn.qkv.bias": torch.ones(1)}):
            assert torch.equal(model(*inputs), before)
        rows, x = (torch.arange(64) % 2).float()[:, None], torch.randn(3, 16)
        fc1 = model.blocks[1].mlp.fc1
        with mask_weights(model, {name: rows}):
            inside = fc1(x)
            assert (
                torch.equal(model.state_dict()[name], fc1.weight)
                and (model(*inputs) - before).abs().max() > 1e-4
            )
        assert torch.equal(inside[:, ::2], fc1.bias[::2].expand(3, 32))
        torch.testing.assert_close(inside[:, 1::2], fc1(x)[:, 1::2], atol=1e-6, rtol=0)

    def test_equals_a_model_whose_weights_were_multiplied(self, model, inputs):
        names = [n for n, p in model.named_parameters() if p.ndim == 2]
        g = torch.Generator().manual_seed(3)
        masks = {n: torch.rand(model.get_parameter(n).shape, generator=g) for n in names}
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            for name, mask in masks.items():
                pruned.get_parameter(name).mul_(mask)
        with mask_weights(model, masks):
            out = model(*inputs)
        assert torch.equal(out, pruned(*inputs))

    def test_gradients_of_masks_and_weights(self, stack):
        stack, x = stack.double(), torch.randn(2, 4, dtype=torch.float64)
        name = "1.linear.weight"

        def loss(mask):
            with mask_weights(stack, {name: mask}):
                return stack(x).square().sum()

        assert torch.autograd.gradcheck(loss, torch.rand(4, 1, dtype=torch.float64, requires_grad=True))
        mask = torch.rand(4, 4, dtype=torch.float64)
        (grad,) = torch.autograd.grad(loss(mask), stack[1].linear.weight)
        direct = stack[1].linear.weight.detach().mul(mask).requires_grad_()
        h = stack[0](x).detach()
        out = stack[2](h + nn.functional.linear(h, direct, stack[1].linear.bias))
        torch.testing.assert_close(grad, torch.autograd.grad(out.square().sum(), direct)[0] * mask)

    def test_masks_are_learned_step_by_step(self, stack):
        mask = nn.Parameter(torch.ones(4, 4))
        optimizer = torch.optim.SGD([mask], lr=0.1)
        x, losses = torch.randn(8, 4), []
        with mask_weights(stack, {"2.linear.weight": mask}):
            for _ in range(5):
                loss = stack(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            part = stack[2].linear(x)
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
        expected = nn.functional.linear(x, stack[2].linear.weight * mask, stack[2].linear.bias)
        assert torch.equal(part, expected)

    def test_a_weight_that_is_read_from_outside_its_layer(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(5, 3)

            def forward(self, tokens):
                return self.table(tokens) @ self.table.weight.T

        model = randomise(Tied())
        with mask_weights(model, {"table.weight": torch.zeros(3)}):
            assert torch.equal(model(torch.tensor([1, 2])), torch.zeros(2, 5))

    def test_contexts_compose_in_their_order(self, stack):
        x, name = torch.randn(2, 4), "0.linear.weight"
        weight, bias = stack[0].linear.weight, stack[0].linear.bias
        with (
            transform_weights(stack, {name: lambda w: w + 1}),
            transform_weights(stack, {name: lambda w: 2 * w}),
        ):
            for call in (stack, stack[0].linear):
                with record_outputs(stack, "0.linear") as out:
                    call(x)
                torch.testing.assert_close(
                    out["0.linear"][0], nn.functional.linear(x, 2 * (weight + 1), bias)
                )

    def test_restored_inside_the_block_already(self, stack):
        name, before = "0.linear.weight", (structure(stack[0].linear), bits(stack))
        with mask_weights(stack, {name: torch.zeros(1)}):
            with pytest.raises(RuntimeError):
                stack(torch.zeros(1, 5))
            assert "weight" not in vars(stack[0].linear)
        assert structure(stack[0].linear) == before[0]

    def test_bad_masks(self, model):
        with pytest.raises(ValueError, match=r"no parameter of DiT is called 'blocks.0.mlp.fc3.weight'.*fc"):
            with mask_weights(model, {"blocks.0.mlp.fc3.weight": torch.ones(1)}):
                pass
        with pytest.raises(ValueError, match=r"the mask \(3,\) does not broadcast to \(64, 16\)"):
            with mask_weights(model, {"blocks.0.mlp.fc1.weight": torch.ones(3)}):
                pass
        with pytest.raises(ValueError, match="keep the shape"):
            with transform_weights(model, {"blocks.0.mlp.fc1.weight": lambda w: w[:2]}):
                model.blocks[0].mlp(torch.zeros(1, 1, 16))

    def test_one_parameter_under_two_names(self):
        layer = nn.Linear(2, 2)
        model = nn.ModuleDict({"a": layer, "b": layer})
        with pytest.raises(ValueError, match="'b.weight' and 'a.weight' are one parameter"):
            with mask_weights(model, {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}):
                pass


class TestReplaceModules:
    def test_in_place_and_back(self, model, inputs):
        before, new = model(*inputs), nn.Identity()
        with replace_modules(
            model, {"blocks.1.attn": new, "blocks.0.mlp": copy.deepcopy(model.blocks[0].mlp)}
        ):
            assert model.blocks[1].attn is new
            assert (model(*inputs) - before).abs().max() > 1e-4
        assert torch.equal(model(*inputs), before)

    def test_bad_names(self, model):
        for names, message in (
            ({"blocks.*": nn.Identity()}, "is a pattern"),
            ({"": nn.Identity()}, "no module of DiT is called ''"),
            (
                {"blocks.0": nn.Identity(), "blocks.0.attn": nn.Identity()},
                "'blocks.0.attn' lies inside 'blocks.0'",
            ),
        ):
            with pytest.raises(ValueError, match=re.escape(message)), replace_modules(model, names):
                pass


def interventions(model):
    with record_outputs(model, "blocks.*") as own:
        model(torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    return {
        "record_outputs": lambda: record_outputs(model, "**"),
        "record_inputs": lambda: record_inputs(model, "blocks.*"),
        "replace_output": lambda: replace_output(model, {"blocks.1": lambda module, args, out: out}),
        "replace_input": lambda: replace_input(model, {"blocks.1": lambda module, x: x}),
        "scale": lambda: scale_outputs(model, {"blocks.1": 0.5}),
        "patch": lambda: patch(model, {name: calls[0] for name, calls in own.items()}),
        "skip": lambda: skip(model, "blocks.1"),
        "gate": lambda: gate(model, {"blocks.1": 0.5}),
        "cached": lambda: cached(model, "blocks.1", every(2)),
        "trace": lambda: trace_executions(model),
        "mask": lambda: mask_weights(model, {"blocks.1.mlp.fc1.weight": torch.zeros(1)}),
        "replace_modules": lambda: replace_modules(model, {"blocks.1.mlp": nn.Identity()}),
        "record_attention": lambda: record_attention(model),
    }


def test_everything_is_restored_after_the_block_and_after_an_error(model, inputs):
    before, out = (structure(model), bits(model)), model(*inputs)
    for name, enter in interventions(model).items():
        with enter():
            model(*inputs)
            if name != "mask":
                assert structure(model) != before[0], name
        assert_untouched(model, before)
        with pytest.raises(KeyError, match="inside"), enter():
            model(*inputs)
            raise KeyError("inside")
        assert_untouched(model, before)
        with pytest.raises(ValueError), enter():
            model(inputs[0][:, :, :3], *inputs[1:])
        assert_untouched(model, before)
    assert torch.equal(model(*inputs), out)


def test_all_at_once_in_any_order_of_leaving(model, inputs):
    before = structure(model), bits(model)
    out = model(*inputs)
    enters = {
        k: v for k, v in interventions(model).items() if k not in ("replace_modules", "record_attention")
    }
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        contexts = [enter() for enter in enters.values()]
        for context in contexts:
            context.__enter__()
        model(*inputs)
        for i in torch.randperm(len(contexts), generator=generator).tolist():
            contexts[i].__exit__(None, None, None)
            model(*inputs)
        assert_untouched(model, before)
    assert torch.equal(model(*inputs), out)


def test_leaving_takes_away_its_own_layer_and_no_other(stack):
    x = torch.randn(2, 4)
    expected, half = stack[1](x), 0.5 * (x + stack[1](x))
    skipped, gated = skip(stack, "1"), gate(stack, {"1": 0.5})
    skipped.__enter__()
    gated.__enter__()
    assert torch.equal(stack[1](x), x)
    skipped.__exit__(None, None, None)
    torch.testing.assert_close(stack[1](x), half)
    gated.__exit__(None, None, None)
    assert torch.equal(stack[1](x), expected)


def test_a_forward_that_was_replaced_by_hand_survives(stack):
    mine = lambda x: 3 * x  # noqa: E731
    stack[1].forward = mine
    with skip(stack, "1", check=False), trace_executions(stack, "1"):
        assert torch.equal(stack[1](torch.ones(1, 4)), torch.ones(1, 4))
    assert stack[1].forward is mine
    with trace_executions(stack, "1") as trace:
        assert torch.equal(stack[1](torch.ones(1, 4)), torch.full((1, 4), 3.0))
    assert trace.counts["1"].calls == 1


def test_a_setup_that_fails_half_way_leaves_nothing(model):
    before = structure(model), bits(model)
    for act in (
        lambda: replace_output(model, {"blocks.0": lambda m, a, o: o, "nothing": lambda m, a, o: o}),
        lambda: mask_weights(model, {"blocks.0.mlp.fc1.weight": torch.ones(1), "nothing": torch.ones(1)}),
        lambda: replace_modules(model, {"blocks.0.mlp": nn.Identity(), "nothing": nn.Identity()}),
    ):
        with pytest.raises(ValueError, match="nothing"), act():
            pass
        assert_untouched(model, before)


class TestUNet:
    """Feature caching by names alone gives what the U-Net's own encode and decode give."""

    @pytest.fixture
    def unet(self):
        model = UNet(
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            num_heads=2,
            cross_attention_dim=6,
            norm_num_groups=4,
        )
        return randomise(model, 0.1)

    @pytest.fixture
    def steps(self):
        g = torch.Generator().manual_seed(5)
        return [(torch.randn(2, 3, 8, 8, generator=g), torch.full((2,), 900.0 - 50 * i)) for i in range(3)]

    @pytest.fixture
    def context(self):
        return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(6))

    @pytest.mark.parametrize("branch", [0, 1, 3])
    def test_deepcache(self, unet, steps, context, branch):
        start = unet.num_skips - 1 - branch  # the up unit that consumes skip `branch`
        deep = [n for u in unet.down_units[branch + 1 :] for n in u.names] + ["mid_block"]
        deep += [n for u in unet.up_units[:start] for n in u.names]
        expected, kept = [], None
        for i, (x, t) in enumerate(steps):
            emb = unet.embed(t)
            if i == 0:
                h, skips = unet.encode(x, emb, context)
                kept = unet.decode(unet.middle(h, emb, context), skips, emb, context, stop=start)
            _, skips = unet.encode(x, emb, context, stop=branch + 1)
            expected.append(unet.decode(kept, skips, emb, context, start=start))
        with cached(unet, deep, every(3)) as cache, trace_executions(unet, deep) as trace:
            for cache.step, (x, t) in enumerate(steps):
                out = unet(x, t, context)
                assert torch.equal(out, expected[cache.step])
        assert torch.equal(expected[0], unet(*steps[0], context))
        assert sorted(trace.order) == sorted(deep), "each once, in the first step"

    def test_every_unit_is_seen(self, unet, steps, context):
        down, up = ([n for u in units for n in u.names] for units in (unet.down_units, unet.up_units))
        with trace_executions(unet, [*down, "mid_block", *up]) as trace:
            unet(*steps[0], context)
        assert trace.order == [*down, "mid_block", *up]

    def test_a_block_that_changes_the_width_cannot_be_skipped(self, unet, steps, context):
        with skip(unet, "**.transformer_blocks.0"):
            unet(*steps[0], context)
        with pytest.raises(ValueError, match="cannot be left out"), skip(unet, "up_blocks.0.resnets.0"):
            unet(*steps[0], context)


class TestMMDiT:
    def test_a_fresh_block_of_two_streams_is_skipped(self):
        torch.manual_seed(0)
        model = MMDiT(hidden_size=16, depth=3, num_heads=2, context_dim=6)
        nn.init.normal_(model.final_layer.linear.weight)
        x, t, context = torch.randn(2, 3, 16, 16), torch.tensor([5.0, 700.0]), torch.randn(2, 4, 6)
        before = model(x, t, context)
        with skip(model, "blocks.[01]", bypass=first_tensors(2)) as skipped:
            assert torch.equal(model(x, t, context), before)
        assert list(skipped) == ["blocks.0", "blocks.1"]
        with pytest.raises(ValueError, match="cannot be left out like this"), skip(model, "blocks.0"):
            model(x, t, context)
        with cached(model, "blocks.*", every(2)) as cache, record_outputs(model, "blocks.*") as outputs:
            model(x, t, context)
            model(x + 1, t, context)
        assert sum(cache.reused.values()) == 3
        assert all(torch.equal(a, b) for calls in outputs.values() for a, b in zip(*calls, strict=True))
