"""Encoder propagation: groups of steps, the layout of the repeated batch, sequential against parallel decoding."""

import itertools

import pytest
import torch

from minilib.guidance import classifier_free_guidance
from minilib.intervene import at_steps, cached, trace_executions
from minilib.models import TextUNet, UNet
from minilib.propagation import (
    Encoded,
    EncoderPropagation,
    decode_steps,
    encode_key,
    key_groups,
    mirrored_keys,
    repeat_for_steps,
    split_steps,
)
from minilib.recipes.scenes import ddim_scheduler
from minilib.sampling import sample, sample_final

PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator) * (p.numel() / len(p)) ** -0.5)
    return model.eval()


def build(**options):
    small = {"block_out_channels": (8, 16), "attention_levels": (1,), "norm_num_groups": 4, "num_heads": 2}
    return randomised(UNet(**{"cross_attention_dim": 12, **small, **options}))


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(b=2, seed=1):
    mask = torch.ones(b, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    return draw(b, 3, 8, 8, seed=seed), draw(b, 5, 12, seed=seed + 1), mask


def timesteps(steps):
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


class TestGroups:
    def test_the_papers_keys(self):
        groups = key_groups(50, PAPER)
        assert [len(group) for group in groups] == [1, 1, 1, 2, 5, 5, 10, 10, 15]
        assert list(itertools.chain(*groups)) == list(range(50))
        assert tuple(group[0] for group in groups) == PAPER

    def test_order_of_the_keys_does_not_matter_and_all_keys_are_singles(self):
        assert key_groups(5, (3, 0)) == key_groups(5, [0, 3]) == ((0, 1, 2), (3, 4))
        assert key_groups(3, range(3)) == ((0,), (1,), (2,))
        assert key_groups(3, (0,)) == ((0, 1, 2),)

    @pytest.mark.parametrize(
        "keys, match",
        [((), "step 0"), ((1, 2), "step 0"), ((0, 0), "different"), ((0, 4), "0 to 3"), ((-1, 0), "0 to 3")],
    )
    def test_refuses(self, keys, match):
        with pytest.raises(ValueError, match=match):
            key_groups(4, keys)

    def test_the_mirror(self):
        assert mirrored_keys(50, PAPER) == (0, 15, 25, 35, 40, 45, 47, 48, 49)
        for keys in [(0,), (0, 1), (0, 3, 4, 9), PAPER]:
            there = mirrored_keys(50, keys)
            assert mirrored_keys(50, there) == keys
            lengths = [len(group) for group in key_groups(50, keys)]
            assert [len(group) for group in key_groups(50, there)] == lengths[::-1]
        assert mirrored_keys(4, range(4)) == (0, 1, 2, 3)


class TestLayout:
    @pytest.mark.parametrize("k", [1, 2, 3])
    @pytest.mark.parametrize("halves", [1, 2])
    def test_half_then_step_then_image(self, k, halves):
        x = draw(halves * 2, 3)
        big = repeat_for_steps(x, k, halves)
        for half, step, image in itertools.product(range(halves), range(k), range(2)):
            row = (half * k + step) * 2 + image
            assert torch.equal(big[row], x[half * 2 + image])
        steps = split_steps(big, k, halves)
        assert steps.shape == (k, *x.shape)
        assert all(torch.equal(step, x) for step in steps)

    def test_split_tells_the_steps_apart(self):
        rows = torch.arange(12)  # 2 halves, 3 steps, 2 images
        assert split_steps(rows, 3, 2).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]

    def test_masks_stay_masks(self):
        assert repeat_for_steps(torch.tensor([True, False]), 2).tolist() == [True, False, True, False]

    def test_refuses(self):
        with pytest.raises(ValueError, match="3 rows given.*2 equal parts"):
            repeat_for_steps(torch.zeros(3), 2, halves=2)
        with pytest.raises(ValueError, match="6 rows.*4 equal parts"):
            split_steps(torch.zeros(6), 2, halves=2)
        for k, halves in ((0, 1), (1, 0)):
            with pytest.raises(ValueError, match="equal part"):
                repeat_for_steps(torch.zeros(2), k, halves)


class TestDecodeSteps:
    @pytest.mark.parametrize("options", [{}, {"patch_size": 2, "attention_positions": True}], ids=str)
    @pytest.mark.parametrize("halves", [1, 2])
    def test_each_step_is_the_decoder_alone_at_its_time(self, options, halves):
        unet = build(**options)
        x, context, mask = inputs(4)
        times = torch.tensor([700, 300, 20])
        with torch.no_grad():
            kept = encode_key(unet, x, times[:1].expand(4), context, mask)
            at_once = decode_steps(unet, kept, times, context, mask, halves=halves)
            for t, got in zip(times, at_once, strict=True):
                alone = unet.decode(kept.h, kept.skips, unet.embed(t.expand(4)), context, mask)
                assert (alone - got).abs().max() < 2e-5 * alone.abs().max()
            assert (at_once[0] - unet(x, times[:1].expand(4), context, mask)).abs().max() < 1e-4
            apart = (at_once[0] - at_once[2]).abs().max()
        assert apart > 1e-3  # the time matters

    def test_one_after_another_is_bit_for_bit_the_decoder(self):
        unet = build()
        x, context, mask = inputs(4)
        times = torch.tensor([700, 300, 20])
        with torch.no_grad():
            kept = encode_key(unet, x, times[:1].expand(4), context, mask)
            got = decode_steps(unet, kept, times, context, mask, halves=2, at_once=1)
            for i, t in enumerate(times):
                alone = unet.decode(kept.h, kept.skips, unet.embed(t.expand(4)), context, mask)
                assert torch.equal(got[i], alone)

    @pytest.mark.parametrize("at_once, calls", [(None, 1), (1, 5), (2, 3), (5, 1), (9, 1)])
    def test_number_of_calls(self, at_once, calls):
        unet = build()
        x, context, mask = inputs()
        with torch.no_grad():
            kept = encode_key(unet, x, torch.tensor([900, 900]), context, mask)
            with trace_executions(unet, ["conv_in", "mid_block", "conv_out"]) as trace:
                out = decode_steps(unet, kept, torch.arange(5), context, mask, at_once=at_once)
        assert trace.counts["conv_out"].calls == calls
        assert trace.counts["conv_in"].calls == trace.counts["mid_block"].calls == 0
        assert out.shape == (5, *x.shape)

    def test_pooled_text_goes_along(self):
        unet = build(pooled_dim=6)
        x, context, mask = inputs()
        pooled = draw(2, 6)
        times = torch.tensor([500, 100])
        with torch.no_grad():
            kept = encode_key(unet, x, times[:1].expand(2), context, mask, pooled)
            got = decode_steps(unet, kept, times, context, mask, pooled, halves=2)[1]
            alone = unet.decode(kept.h, kept.skips, unet.embed(times[1:].expand(2), pooled), context, mask)
        assert (got - alone).abs().max() < 1e-4

    def test_without_text(self):
        unet = build(cross_attention_dim=0)
        x = draw(2, 3, 8, 8)
        with torch.no_grad():
            kept = encode_key(unet, x, torch.tensor([900, 900]))
            assert decode_steps(unet, kept, torch.tensor([900.0, 100.0])).shape == (2, 2, 3, 8, 8)

    def test_gradients_reach_the_key_image_through_each_step(self):
        unet = build().double()
        x, context, mask = (v.double() if v.is_floating_point() else v for v in inputs())
        x.requires_grad_()
        times = torch.tensor([600, 300])
        kept = encode_key(unet, x, times[:1].expand(2), context, mask)
        out = decode_steps(unet, kept, times, context, mask)
        for step in out:
            (grad,) = torch.autograd.grad(step.square().sum(), x, retain_graph=True)
            assert grad.abs().sum() > 1e-6

    def test_refuses(self):
        unet = build()
        x, context, mask = inputs(3)
        kept = Encoded(draw(3, 16, 4, 4), [])
        with pytest.raises(ValueError, match="0 times"):
            decode_steps(unet, kept, torch.tensor([]), context)
        with pytest.raises(ValueError, match="at_once=0"):
            decode_steps(unet, kept, torch.tensor([5]), context, at_once=0)
        with pytest.raises(ValueError, match="equal parts"):
            decode_steps(unet, kept, torch.tensor([5]), context, halves=2)


class TestSampling:
    def model(self):
        text = {"vocab_size": 9, "max_length": 5, "dim": 12, "depth": 1, "num_heads": 2}
        unet = {
            "block_out_channels": (8, 16),
            "attention_levels": (1,),
            "norm_num_groups": 4,
            "num_heads": 2,
        }
        return randomised(TextUNet(text=text, unet=unet))

    def propagation(self, model, keys, steps, guidance_scale=3.0, at_once=None, b=2):
        tokens = torch.tensor([[3, 4, 2, 0, 0], [5, 1, 0, 0, 0]])[:b]
        both = torch.cat([tokens, model.null_tokens(b, 5)]) if guidance_scale is not None else tokens
        with torch.no_grad():
            context, mask, _ = model.encode_text(both)
        return tokens, EncoderPropagation(
            model.denoiser,
            keys,
            timesteps(steps),
            context,
            mask,
            guidance_scale=guidance_scale,
            at_once=at_once,
        )

    def test_every_step_a_key_is_the_plain_guided_sampler(self):
        model, x = self.model(), draw(2, 3, 8, 8)
        tokens, predict = self.propagation(model, range(6), 6)
        plain = classifier_free_guidance(model, tokens, model.null_tokens(2, 5), guidance_scale=3.0)
        a, b = (sample_final(f, ddim_scheduler(), x, num_inference_steps=6) for f in (predict, plain))
        assert torch.equal(a, b)
        assert predict.encoder_calls == predict.decoder_calls == 6

    def test_without_guidance_too(self):
        model, x = self.model(), draw(2, 3, 8, 8)
        tokens, predict = self.propagation(model, range(4), 4, guidance_scale=None)
        a = sample_final(predict, ddim_scheduler(), x, num_inference_steps=4)
        b = sample_final(lambda x, t: model(x, t, tokens), ddim_scheduler(), x, num_inference_steps=4)
        assert torch.equal(a, b)

    @pytest.mark.parametrize("at_once, depth", [(None, 3), (1, 10), (2, 6), (3, 4)])
    def test_parallel_is_sequential_with_fewer_calls_in_a_row(self, at_once, depth):
        model, x = self.model(), draw(2, 3, 8, 8)
        keys = (0, 1, 4)  # groups of 1, 3 and 6
        unet = model.denoiser
        _, predict = self.propagation(model, keys, 10, at_once=at_once)
        with torch.no_grad(), trace_executions(unet, ["conv_in", "mid_block", "conv_out"]) as trace:
            got = sample_final(predict, ddim_scheduler(), x, num_inference_steps=10)
        assert [trace.counts[n].calls for n in ("conv_in", "mid_block", "conv_out")] == [3, 3, depth]
        assert (predict.encoder_calls, predict.decoder_calls) == (3, depth)

        # The same with the library's general cache: the encoder and the middle hand out what they computed in the last key step.
        encoder = [name for unit in unet.down_units for name in unit.names] + ["mid_block"]
        tokens, _ = self.propagation(model, keys, 10)
        plain = classifier_free_guidance(model, tokens, model.null_tokens(2, 5), guidance_scale=3.0)
        with cached(unet, encoder, at_steps(keys)):
            reference = sample_final(plain, ddim_scheduler(), x, num_inference_steps=10)
        assert (got - reference).abs().max() < 1e-4 * reference.abs().max()

    def test_between_keys_the_image_is_not_read(self):
        model = self.model()
        _, predict = self.propagation(model, (0, 2), 4)
        times = timesteps(4)
        noise = [draw(2, 3, 8, 8, seed=s) for s in range(4)]
        a = [predict(x, t.expand(2)) for x, t in zip(noise, times, strict=True)]
        _, again = self.propagation(model, (0, 2), 4)
        noise[1] = torch.full_like(noise[1], torch.nan)
        noise[3] = noise[3] * 100
        b = [again(x, t.expand(2)) for x, t in zip(noise, times, strict=True)]
        assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))

    def test_yields_one_step_a_timestep(self):
        model = self.model()
        _, predict = self.propagation(model, (0, 3), 5)
        steps = list(sample(predict, ddim_scheduler(), draw(2, 3, 8, 8), num_inference_steps=5))
        assert [step.index for step in steps] == list(range(5))

    def test_refuses_other_times_more_steps_and_rows_that_do_not_fit(self):
        model = self.model()
        x = draw(2, 3, 8, 8)
        _, predict = self.propagation(model, (0,), 2)
        with pytest.raises(ValueError, match="step 0 is at t = 999, got t = 998"):
            predict(x, torch.tensor([998, 998]))
        with pytest.raises(ValueError, match="1 images need 2 rows of text; got 4"):
            predict(x[:1], torch.tensor([999]))
        sample_final(predict, ddim_scheduler(), x, num_inference_steps=2)
        with pytest.raises(RuntimeError, match="all 2 steps are done"):
            predict(x, torch.tensor([999, 999]))

    def test_refuses_bad_construction(self):
        unet, context = build(), draw(3, 5, 12)
        with pytest.raises(ValueError, match="two halves.*3 rows"):
            EncoderPropagation(unet, (0,), timesteps(3), context, guidance_scale=2.0)
        with pytest.raises(ValueError, match="at_once must be at least 1"):
            EncoderPropagation(unet, (0,), timesteps(3), context, at_once=0)
        with pytest.raises(ValueError, match="0 to 2"):
            EncoderPropagation(unet, (0, 3), timesteps(3), context)
        with pytest.raises(ValueError, match="different steps"):
            EncoderPropagation(unet, (0,), torch.tensor([]), context)
