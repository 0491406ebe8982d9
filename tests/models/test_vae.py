import math

import pytest
import torch
from torch import nn

from minilib.attention import record_attention
from minilib.models import ConvVAE, DiagonalGaussian, PatchDiscriminator
from minilib.models.vae_blocks import PaddedDownsample, SpatialAttention
from minilib.profiling import count_flops, count_parameters

TINY = {"block_out_channels": (4, 8, 8), "norm_num_groups": 2, "latent_channels": 3}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model, seed=0):
    """Nothing zero, so that every layer matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


class TestGaussian:
    def test_kl_against_torch_and_summed_over_an_image(self):
        posterior = DiagonalGaussian(randn(3, 2, 4, 5), randn(3, 2, 4, 5, seed=1))
        p = torch.distributions.Normal(posterior.mean, posterior.std)
        wanted = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
        torch.testing.assert_close(posterior.kl(), wanted)
        standard = DiagonalGaussian(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
        assert torch.equal(standard.kl(), torch.zeros(2))

    def test_moments_are_split_and_the_log_variance_is_kept_within_bounds(self):
        moments = torch.tensor([1.0, 2.0, -100.0, 100.0]).view(1, 4, 1, 1)
        posterior = DiagonalGaussian.from_moments(moments)
        assert posterior.mean.flatten().tolist() == [1.0, 2.0]
        assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
        torch.testing.assert_close(posterior.std.flatten(), torch.tensor([math.exp(-15), math.exp(10)]))

    def test_samples_have_the_mean_and_the_spread_and_are_reproducible(self):
        posterior = DiagonalGaussian(
            torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), math.log(4.0))
        )
        a = posterior.sample(torch.Generator().manual_seed(0))
        assert torch.equal(a, posterior.sample(torch.Generator().manual_seed(0)))
        assert abs(a.mean() - 3) < 0.05 and abs(a.std() - 2) < 0.05
        assert posterior.sample().shape == a.shape and torch.equal(posterior.mode, posterior.mean)
        noise = torch.full_like(a, -1.5)
        torch.testing.assert_close(posterior.at(noise), torch.zeros_like(a))


class TestConvVAE:
    @pytest.mark.parametrize(
        "options", [{}, {"mid_attention": True}, {"quant_conv": True}, {"layers_per_block": 2}]
    )
    def test_config_rebuilds_and_any_canvas_will_do(self, options):
        model = randomised(ConvVAE(**TINY, **options))
        again = ConvVAE(**model.config).eval()
        again.load_state_dict(model.state_dict())
        for height, width in ((8, 8), (12, 20)):
            x = randn(2, 3, height, width)
            posterior = model.encode(x)
            assert posterior.mean.shape == posterior.logvar.shape == (2, 3, height // 4, width // 4)
            reconstruction, _ = model(x)
            assert reconstruction.shape == x.shape
            assert torch.equal(again(x)[0], reconstruction)
            torch.testing.assert_close(model.decode(posterior.mode), reconstruction)

    @pytest.mark.parametrize("levels, factor", [(1, 1), (2, 2), (3, 4), (4, 8)])
    def test_the_factor_is_two_to_the_levels_less_one(self, levels, factor):
        model = ConvVAE(block_out_channels=(4,) * levels, norm_num_groups=2, latent_channels=2)
        assert model.downsample_factor == factor
        assert model.encode(torch.zeros(1, 3, 16, 16)).mean.shape == (1, 2, 16 // factor, 16 // factor)

    def test_noise_moves_the_latent_by_the_posterior_s_spread(self):
        model, x, noise = randomised(ConvVAE(**TINY)), randn(2, 3, 8, 8), randn(2, 3, 2, 2, seed=1)
        posterior = model.encode(x)
        reconstruction, again = model(x, noise)
        torch.testing.assert_close(reconstruction, model.decode(posterior.mean + posterior.std * noise))
        assert torch.equal(again.mean, posterior.mean)
        assert (reconstruction - model(x)[0]).abs().max() > 1e-3

    def test_scaled_latents(self):
        model, x = randomised(ConvVAE(**TINY, scaling_factor=0.5, shift_factor=0.25)), randn(2, 3, 8, 8)
        z = model.encode(x).mode
        torch.testing.assert_close(model.encode_scaled(x), (z - 0.25) * 0.5)
        torch.testing.assert_close(model.decode_scaled(model.encode_scaled(x)), model.decode(z))
        sampled = model.encode(x).sample(torch.Generator().manual_seed(3))
        torch.testing.assert_close(
            model.encode_scaled(x, torch.Generator().manual_seed(3)), (sampled - 0.25) * 0.5
        )

    def test_the_scale_is_saved_with_the_model(self):
        model = ConvVAE(**TINY)
        assert model.scaling_factor == 1.0 and model.shift_factor == 0.0
        model.set_scaling(0.2, -1)
        again = ConvVAE(**model.config)
        assert (again.scaling_factor, again.shift_factor) == (0.2, -1.0)

    def test_gradients_reach_every_parameter(self):
        model = randomised(ConvVAE(**TINY, mid_attention=True, quant_conv=True))
        reconstruction, posterior = model(randn(2, 3, 8, 8), randn(2, 3, 2, 2, seed=1))
        (reconstruction.square().mean() + posterior.kl().mean()).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())

    def test_attention_is_found_by_the_recorder(self):
        model = randomised(ConvVAE(**TINY, mid_attention=True))
        with record_attention(model) as record:
            model(randn(1, 3, 8, 8))
        assert len(record) == 2

    def test_hooks_on_stages_see_what_passes(self):
        model, seen = ConvVAE(**TINY), {}
        for name, module in model.named_modules():
            if name in ("encoder.down_blocks.0", "encoder.mid_block", "decoder.up_blocks.2"):
                module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.shape}))
        model(torch.zeros(1, 3, 8, 8))
        assert seen == {
            "encoder.down_blocks.0": (1, 4, 4, 4),
            "encoder.mid_block": (1, 8, 2, 2),
            "decoder.up_blocks.2": (1, 4, 8, 8),
        }

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"block_out_channels": ()}, "at least one level"),
            ({"layers_per_block": 0}, "at least one level, one layer"),
            ({"latent_channels": 0}, "one latent channel"),
            ({"norm_num_groups": 3}, "multiple of norm_num_groups = 3"),
            ({"scaling_factor": 0.0}, "above 0; got 0.0"),
            ({"scaling_factor": math.nan}, "above 0; got nan"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            ConvVAE(**{**TINY, **options})

    @pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 6, 8), (1, 3, 8, 10)])
    def test_bad_images(self, shape):
        with pytest.raises(ValueError, match=r"takes 3 channels and sides that are multiples of 4"):
            ConvVAE(**TINY).encode(torch.zeros(shape))

    def test_bad_latents(self):
        with pytest.raises(ValueError, match="latents of 4 channels given, this autoencoder has 3"):
            ConvVAE(**TINY).decode(torch.zeros(1, 4, 2, 2))


def test_the_downsampler_pads_below_and_at_the_right():
    layer = PaddedDownsample(1)
    nn.init.zeros_(layer.conv.bias)
    nn.init.zeros_(layer.conv.weight)
    layer.conv.weight.data[0, 0, 2, 2] = 1.0
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [10.0, 0.0, 0.0, 0.0]
    layer.conv.weight.data = layer.conv.weight.data.flip(2, 3)
    assert layer(x).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


def test_attention_starts_as_the_identity_and_treats_places_alike():
    layer, x = SpatialAttention(4, 2), randn(2, 4, 3, 5)
    assert torch.equal(layer(x), x)
    randomised(layer)
    turned = layer(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(layer(x), turned)
    assert (layer(x) - x).abs().max() > 1e-3


#: The sizes of CompVis/stable-diffusion's first stage, kl-f8: what its checkpoint holds.
def test_stable_diffusion_s_autoencoder_has_the_published_size():
    with torch.device("meta"):
        model = ConvVAE(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            mid_attention=True,
            quant_conv=True,
            scaling_factor=0.18215,
        )
        sd3 = ConvVAE(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            mid_attention=True,
        )
    assert count_parameters(model) == 83_653_863
    assert count_parameters(model.encoder) == 34_163_592 and count_parameters(model.decoder) == 49_490_179
    # SD3 drops the 1x1 convolutions (92 values) and has 16 channels: 24 more moments, 12 more inputs.
    assert count_parameters(sd3) == 83_653_863 - 92 + 24 * (512 * 9 + 1) + 12 * 512 * 9


def test_convolutions_cost_by_the_pixel():
    with torch.device("meta"):
        model = ConvVAE(**TINY)
        costs = [count_flops(model, torch.zeros(1, 3, side, side)).flops for side in (16, 32)]
    assert costs[1] == 4 * costs[0]


class TestDiscriminator:
    def test_it_has_the_size_of_pix2pix_s(self):
        """2.769 M parameters is what pix2pix prints for its discriminator, which sees image and condition."""
        with torch.device("meta"):
            assert count_parameters(PatchDiscriminator(in_channels=6)) == 2_768_705

    def test_a_logit_sees_seventy_pixels(self):
        model = PatchDiscriminator(width=4).eval()
        x = randn(1, 3, 96, 96).requires_grad_()
        out = model(x)
        assert out.shape == (1, 1, 10, 10)
        out[0, 0, 5, 5].backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert int(rows.max() - rows.min()) + 1 == 70

    def test_config_rebuilds(self):
        model = PatchDiscriminator(1, 4, 2)
        assert PatchDiscriminator(**model.config).state_dict().keys() == model.state_dict().keys()
