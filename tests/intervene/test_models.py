"""Interventions on the U-Net and the MM-DiT."""

import pytest
import torch
from torch import nn
from toys import randomise

from minilib.intervene import (
    cached,
    every,
    first_tensors,
    record_outputs,
    skip,
    trace_executions,
)
from minilib.models.mmdit import MMDiT
from minilib.models.unet import UNet


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
