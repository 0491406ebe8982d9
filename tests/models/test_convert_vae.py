import pytest
import torch
from diffusers import AutoencoderKL

from minilib.models import (
    ConversionError,
    ConvVAE,
    vae_config_from_diffusers,
    vae_from_diffusers,
    vae_to_diffusers,
)
from minilib.profiling import count_parameters

CONFIGS = {
    "sd": {"block_out_channels": (4, 8, 8), "layers_per_block": 2, "latent_channels": 4},
    "sd3": {
        "block_out_channels": (8, 8),
        "latent_channels": 6,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0609,
        "scaling_factor": 1.5305,
    },
    "no attention": {
        "block_out_channels": (4, 4, 6, 8),
        "mid_block_add_attention": False,
        "in_channels": 1,
        "out_channels": 2,
    },
    "one level": {"block_out_channels": (6,), "layers_per_block": 1},
}


def theirs(name, seed=0):
    config = CONFIGS[name]
    levels = len(config["block_out_channels"])
    model = AutoencoderKL(
        **{"norm_num_groups": 2, **config},
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    return randomised(model, seed)


def randomised(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def largest_error(ours, other, x, noise):
    with torch.no_grad():
        wanted = other.encode(x).latent_dist
        got = ours.encode(x)
        z = wanted.mean + wanted.std * noise
        pairs = [
            (got.mean, wanted.mean),
            (got.logvar, wanted.logvar),
            (got.kl(), wanted.kl()),
            (got.at(noise), z),
            (ours.decode(z), other.decode(z).sample),
        ]
    assert all(b.abs().max() > 0.1 for _, b in pairs), "an oracle near zero tests nothing"
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_diffusers_and_the_round_trip_is_exact(name, size):
    other = theirs(name)
    ours = vae_from_diffusers(other.state_dict(), other.config)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, other.config.in_channels, *size, generator=g)
    f = ours.downsample_factor
    noise = torch.randn(2, other.config.latent_channels, size[0] // f, size[1] // f, generator=g)
    assert largest_error(ours, other, x, noise) < 1e-5
    assert count_parameters(ours) == count_parameters(other)
    state, config = vae_to_diffusers(ours)
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())
    assert all(other.config[key] == value for key, value in config.items())


@pytest.mark.parametrize(
    "options", [{"mid_attention": True, "quant_conv": True, "shift_factor": 0.3}, {"layers_per_block": 2}]
)
def test_our_models_run_in_diffusers(options):
    ours = randomised(ConvVAE(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=3, **options))
    state, config = vae_to_diffusers(ours)
    other = AutoencoderKL(**config).eval()
    other.load_state_dict(state)
    x, noise = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 4, 6)
    assert largest_error(ours, other, x, noise) < 1e-5
    again = vae_from_diffusers(state, other.config)
    assert again.config == ours.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True)
    )


def test_names_of_old_checkpoints_are_read():
    other = theirs("sd")
    old = {}
    for name, tensor in other.state_dict().items():
        if ".attentions." in name:
            for now, then in (
                (".to_q.", ".query."),
                (".to_k.", ".key."),
                (".to_v.", ".value."),
                (".to_out.0.", ".proj_attn."),
            ):
                name = name.replace(now, then)
        old[name] = tensor
    assert old.keys() != other.state_dict().keys()
    new, ours = vae_from_diffusers(other.state_dict(), other.config), vae_from_diffusers(old, other.config)
    assert all(
        torch.equal(a, b) for a, b in zip(new.state_dict().values(), ours.state_dict().values(), strict=True)
    )


def test_stable_diffusion_s_config_file():
    """The contents of ``vae/config.json`` of Stable Diffusion 1.5, which leaves many options out."""
    config = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    with torch.device("meta"):
        model = ConvVAE.from_diffusers_config(config)
    assert count_parameters(model) == 83_653_863
    assert model.scaling_factor == 0.18215 and model.shift_factor == 0.0 and model.downsample_factor == 8


def test_half_precision_checkpoints_keep_their_type():
    other = theirs("one level").half()
    assert {p.dtype for p in vae_from_diffusers(other.state_dict(), other.config).parameters()} == {
        torch.float16
    }


@pytest.mark.parametrize(
    "option, message",
    [
        ({"act_fn": "relu"}, "computes with act_fn = 'silu', the configuration has 'relu'"),
        ({"latents_mean": [0.0]}, "latents_mean = None"),
        ({"colour": 1}, "unknown option 'colour' of AutoencoderKL"),
        ({"block_out_channels": (4, 8)}, "down_block_types has to be"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",)}, "up_block_types has to be"),
        ({"use_quant_conv": False}, "use_quant_conv and use_post_quant_conv differ"),
    ],
)
def test_options_it_does_not_have_are_refused(option, message):
    with pytest.raises(ConversionError, match=message):
        vae_config_from_diffusers({"force_upcast": True, **option})


def test_errors_name_the_key():
    other = theirs("one level")
    state = other.state_dict()
    lacks = {k: v for k, v in state.items() if k != "decoder.conv_in.bias"}
    with pytest.raises(ConversionError, match="missing: decoder.conv_in.bias; unexpected: none"):
        vae_from_diffusers(lacks, other.config)
    with pytest.raises(ConversionError, match="unexpected: extra"):
        vae_from_diffusers({**state, "extra": torch.zeros(1)}, other.config)
    with pytest.raises(ConversionError, match="decoder.conv_in.bias has shape"):
        vae_from_diffusers({**state, "decoder.conv_in.bias": torch.zeros(1)}, other.config)
