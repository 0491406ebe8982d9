import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.attention import Attention
from minilib.models import DiT
from minilib.profiling import (
    count_calls,
    count_flops,
    count_parameters,
    cpu_time,
    saved_activation_bytes,
    to_meta,
)


class TestParameters:
    def test_shared_parameters_count_once(self):
        tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tied[1].weight = tied[0].weight
        assert count_parameters(tied) == 16 + 4 + 4

    def test_frozen_parameters(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        assert count_parameters(model) == 26 and count_parameters(model, trainable_only=True) == 10


class TestFlops:
    @pytest.mark.parametrize("b, n, d, heads", [(1, 4, 8, 2), (3, 16, 32, 4), (2, 64, 96, 1)])
    @pytest.mark.parametrize("variant", ["full", "naive"])
    def test_attention_to_the_integer(self, b, n, d, heads, variant):
        count = count_flops(Attention(d, heads, variant=variant), torch.zeros(b, n, d))
        assert count.macs == b * (n * 4 * d * d + 2 * n * n * d)
        assert count.flops == 2 * count.macs

    def test_convolution(self):
        assert count_flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 6, 6)).macs == 2 * 36 * 8 * 3 * 9

    def test_dit_to_the_integer(self):
        b, n, d, depth = 3, 16, 32, 2
        model = DiT(input_size=4, hidden_size=d, depth=depth, num_heads=2)
        block = n * 12 * d * d + 2 * n * n * d + 6 * d * d
        macs = b * (depth * block + n * d + 256 * d + d * d + 2 * d * d + n * d * 2)
        x, t, y = torch.zeros(b, 1, 4, 4), torch.zeros(b), torch.zeros(b, dtype=torch.long)
        assert count_flops(model, x, t, y).macs == macs
        assert count_flops(model, x, t, None, cond=torch.zeros(b, d)).macs == macs, "keyword tensors move too"

    def test_the_model_is_left_alone(self):
        model = DiT(input_size=4, hidden_size=8, depth=1, num_heads=2)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        ghost = to_meta(model)
        assert {p.device.type for p in ghost.parameters()} == {"meta"} and ghost.pos_embed.is_meta
        assert not any(p.is_meta for p in model.parameters()) and not model.pos_embed.is_meta
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_tied_parameters_stay_tied(self):
        tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tied[1].weight = tied[0].weight
        assert count_parameters(to_meta(tied)) == count_parameters(tied)


class TestCalls:
    def test_counts_calls_and_images_inside_only(self):
        layer = nn.Linear(3, 3)
        with count_calls(layer) as count:
            layer(torch.zeros(5, 3))
            layer(input=torch.zeros(2, 3))
        layer(torch.zeros(9, 3))
        assert (count.calls, count.samples) == (2, 7)

    def test_part_of_a_model(self):
        model = DiT(input_size=4, hidden_size=8, depth=2, num_heads=2)
        with count_calls(model.blocks[1]) as inner, count_calls(model) as outer:
            model(torch.zeros(4, 1, 4, 4), torch.zeros(4), torch.zeros(4, dtype=torch.long))
        assert inner == outer and inner.calls == 1 and inner.samples == 4

    def test_hook_is_removed_after_an_error(self):
        layer = nn.Linear(3, 3)
        with pytest.raises(RuntimeError), count_calls(layer):
            layer(torch.zeros(5, 4))
        assert not layer._forward_hooks


class Gelu(nn.Module):
    def forward(self, x):
        return F.gelu(x)


class TestSavedBytes:
    @pytest.mark.parametrize("b, d, h", [(1, 2, 3), (7, 8, 32)])
    def test_feed_forward_network_by_formula(self, b, d, h):
        model = nn.Sequential(nn.Linear(d, h), Gelu(), nn.Linear(h, d))
        # The input, the hidden values before and after the GELU; not the weights, not the output.
        assert saved_activation_bytes(model, torch.zeros(b, d)) == 4 * b * (d + 2 * h)

    def test_a_tensor_kept_twice_counts_once(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.a(x) + self.b(x)

        assert saved_activation_bytes(Twice(), torch.zeros(5, 4)) == 5 * 4 * 4

    def test_grows_with_the_batch_and_works_under_no_grad(self):
        model = DiT(input_size=4, hidden_size=8, depth=2, num_heads=2)

        def kept(b):
            return saved_activation_bytes(
                model, torch.zeros(b, 1, 4, 4), torch.zeros(b), torch.zeros(b, dtype=torch.long)
            )

        with torch.no_grad():
            one, two, three = kept(1), kept(2), kept(3)
        assert three - two == two - one > 0

    def test_float64_doubles_it(self):
        model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.zeros(5, 3)
        assert saved_activation_bytes(model.double(), x.double()) == 2 * saved_activation_bytes(
            model.float(), x
        )

    def test_frozen_model_is_an_error(self):
        with pytest.raises(ValueError, match="does not require a gradient"):
            saved_activation_bytes(nn.Linear(2, 2).requires_grad_(False), torch.zeros(1, 2))


class TestTime:
    def test_counts_work_not_sleep(self):
        def work():
            total = 0
            for i in range(200_000):
                total += i
            return total

        assert cpu_time(work, repeats=3) > cpu_time(lambda: time.sleep(0.01), repeats=3) >= 0

    def test_number_of_calls(self):
        calls = []
        cpu_time(lambda: calls.append(1), repeats=4, warmup=2)
        assert len(calls) == 6
        with pytest.raises(ValueError, match="at least 1, got 0"):
            cpu_time(calls.clear, repeats=0)
