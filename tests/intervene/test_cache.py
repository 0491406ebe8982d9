"""Feature caching: bit-identical where nothing is cached, and it runs what it says."""

import pytest
import torch
from torch import nn

from minilib.intervene import (
    at_steps,
    cached,
    every,
    record_outputs,
    trace_executions,
)
from minilib.models import DiT
from minilib.profiling import count_flops, to_meta


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
