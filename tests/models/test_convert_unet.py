import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from test_unet import randomised

from minilib.models import (
    ConversionError,
    UNet,
    unet_config_from_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from minilib.models.convert_unet import FIXED
from minilib.profiling import count_flops, count_parameters

TINY = {
    "block_out_channels": (8, 16, 16),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "num_heads": 2,
}
OPTIONS = [
    {},
    {"attention_levels": (0, 1, 2), "transformer_layers": (1, 2, 1), "num_heads": (1, 2, 4)},
    {"attention_levels": (), "layers_per_block": 1, "norm_eps": 1e-2},
    {"block_out_channels": (8, 8, 12, 16), "attention_levels": (3,), "layers_per_block": 3},
    {"pooled_dim": 6, "in_channels": 9, "out_channels": 4},
    {"block_out_channels": (16,), "attention_levels": (0,), "norm_num_groups": 8},
]
#: Height, width, and whether some tokens are masked.
CASES = [(8, 4, False), (7, 10, True)]

#: The configuration file of Stable Diffusion 1.5's U-Net.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
#: Stable Diffusion 2.1 differs in the text encoder's width, in linear projections and in heads of one width.
SD21 = {
    **SD15,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


def small_diffusers(**options):
    torch.manual_seed(0)
    small = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "layers_per_block": 1,
    }
    return randomised(UNet2DConditionModel(**{**small, **options}))


def largest_error(ours, theirs, height, width, masked):
    g = torch.Generator().manual_seed(3)
    c = ours.config
    x = torch.randn(2, c["in_channels"], height, width, generator=g)
    t, context = torch.tensor([3.5, 981.0]), torch.randn(2, 6, c["cross_attention_dim"], generator=g)
    mask = torch.tensor([[True] * 6, [True, True, False, False, True, False]]) if masked else None
    pooled = torch.randn(2, c["pooled_dim"], generator=g) if c["pooled_dim"] else None
    with torch.no_grad():
        expected = theirs(x, t, context, class_labels=pooled, encoder_attention_mask=mask).sample
        got = ours(x, t, context, mask, pooled)
    assert expected.abs().max() > 0.1, "an oracle near zero tests nothing"
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


class TestOracle:
    @pytest.mark.parametrize("options, linear", list(zip(OPTIONS, [False, True] * 3, strict=True)), ids=str)
    def test_outputs_equal_diffusers_and_the_round_trip_is_exact(self, options, linear):
        model = randomised(UNet(**{**TINY, **options}))
        state, config = unet_to_diffusers(model, use_linear_projection=linear)
        theirs = UNet2DConditionModel(**config).eval()
        theirs.load_state_dict(state)
        for case in CASES:
            assert largest_error(model, theirs, *case) < 1e-5
        again = unet_from_diffusers(theirs.state_dict(), theirs.config)
        assert again.config == {**model.config, "transformer_layers": again.config["transformer_layers"]}
        ours, back = model.state_dict(), again.state_dict()
        assert back.keys() == ours.keys() and all(torch.equal(back[k], v) for k, v in ours.items())

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
            {"transformer_layers_per_block": (2, 1), "norm_eps": 1e-3},
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
            {"cross_attention_dim": (12, 12), "layers_per_block": [2, 2], "sample_size": (8, 16)},
        ],
    )
    def test_from_their_side_outputs_are_equal_and_the_round_trip_is_exact(self, options):
        theirs = small_diffusers(**options)
        model = unet_from_diffusers(theirs.state_dict(), theirs.config)
        for case in CASES:
            assert largest_error(model, theirs, *case) < 1e-5
        linear = options.get("use_linear_projection", False)
        back, config = unet_to_diffusers(model, use_linear_projection=linear)
        state = theirs.state_dict()
        assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
        UNet2DConditionModel(**config).load_state_dict(back)

    def test_the_epsilons_are_right_which_only_small_features_show(self):
        theirs = small_diffusers()
        model = unet_from_diffusers(theirs.state_dict(), theirs.config)
        g = torch.Generator().manual_seed(0)
        x = 2e-3 * torch.randn(2, 16, 4, 4, generator=g)
        emb, context = torch.randn(2, 32, generator=g), torch.randn(2, 6, 12, generator=g)
        with torch.no_grad():
            wanted = theirs.mid_block.attentions[0](x, context, return_dict=False)[0]
            assert (model.mid_block.attentions[0](x, context) - wanted).abs().max() < 1e-5
            wanted = theirs.mid_block.resnets[0](x, emb)
            assert (model.mid_block.resnets[0](x, F.silu(emb)) - wanted).abs().max() < 1e-5

    def test_gradients_equal_those_of_diffusers(self):
        theirs = small_diffusers()
        model = unet_from_diffusers(theirs.state_dict(), theirs.config)
        x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 700.0]), torch.randn(2, 6, 12)
        model(x, t, context).square().mean().backward()
        theirs(x, t, context).sample.square().mean().backward()
        wanted = {name: p.grad for name, p in theirs.named_parameters()}
        for name, p in model.named_parameters():
            there = name.replace(".to_out.", ".to_out.0.").replace(".ff.proj.", ".ff.net.0.proj.")
            there = there.replace(".ff.out.", ".ff.net.2.")
            error = (p.grad.flatten() - wanted[there].flatten()).abs().max()
            assert error < 1e-4 * wanted[there].abs().max().clamp(min=1e-2), name

    def test_the_weights_are_copies(self):
        theirs = small_diffusers()
        model = unet_from_diffusers(theirs.state_dict(), theirs.config)
        before = theirs.conv_in.weight.clone()
        with torch.no_grad():
            model.conv_in.weight.zero_()
        assert torch.equal(theirs.conv_in.weight, before)

    def test_half_precision_checkpoints_keep_their_type(self):
        theirs = small_diffusers().half()
        model = unet_from_diffusers(theirs.state_dict(), theirs.config)
        assert {p.dtype for p in model.parameters()} == {torch.float16} and not model.training

    def test_operations_equal_those_of_diffusers(self):
        model = UNet(**TINY)
        _, config = unet_to_diffusers(model)
        args = torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, 6, 12)
        assert count_flops(model, *args) == count_flops(UNet2DConditionModel(**config), *args)


class TestAudit:
    @pytest.mark.parametrize("config, parameters", [(SD15, 859_520_964), (SD21, 865_910_724)])
    def test_stable_diffusion_has_the_published_size_and_the_very_tensors(self, config, parameters):
        with torch.device("meta"):
            model = UNet.from_diffusers_config(config)
            known = {k: v for k, v in config.items() if not k.startswith("_")}
            theirs = UNet2DConditionModel(**known).state_dict()
        assert count_parameters(model) == parameters
        ours, back = unet_to_diffusers(
            model, use_linear_projection=config.get("use_linear_projection", False)
        )
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        assert model.num_skips == 12
        assert back["attention_head_dim"] == (8 if config is SD15 else (5, 10, 20, 20))

    def test_share_of_the_encoder_in_stable_diffusion(self):
        # Faster Diffusion's saving needs it: encoder and middle are about a third of the work at 64 x 64 latents.
        with torch.device("meta"):
            model = UNet.from_diffusers_config(SD15)
            args = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
            emb = model.embed(args[1])
        whole = count_flops(model, *args).flops
        encoder = count_flops(Encoder(model), args[0], emb, args[2]).flops
        assert 0.30 < encoder / whole < 0.35
        assert whole / 2e9 == pytest.approx(401.6, abs=0.1)


class Encoder(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, emb, context):
        return self.unet.middle(self.unet.encode(x, emb, context)[0], emb, context)


class TestErrors:
    @pytest.mark.parametrize("name", sorted(FIXED))
    def test_options_this_model_lacks_are_refused_by_name(self, name):
        assert unet_config_from_diffusers({**SD15, name: FIXED[name]}) == unet_config_from_diffusers(SD15)
        with pytest.raises(
            ConversionError, match=f"computes with {name} = .*, the configuration has 'other'"
        ):
            unet_config_from_diffusers({**SD15, name: "other"})

    def test_every_option_of_diffusers_is_known(self):
        theirs = small_diffusers().config
        assert unet_config_from_diffusers(theirs)["in_channels"] == 4, diffusers.__version__
        assert unet_config_from_diffusers({}) == {
            **unet_config_from_diffusers(SD15),
            "cross_attention_dim": 1280,
        }

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"novel": 1}, "unknown option 'novel'"),
            ({"layers_per_block": [2, 2, 2, 1]}, "layers_per_block has to be the same at every level"),
            ({"cross_attention_dim": [1, 2, 3, 4]}, "cross_attention_dim has to be the same"),
            ({"norm_num_groups": None}, "norm_num_groups is None"),
            ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
            ({"class_embed_type": "projection"}, "width None"),
            ({"down_block_types": ["AttnDownBlock2D"] * 4}, r"unknown block types \['AttnDownBlock2D'\]"),
            ({"up_block_types": ["CrossAttnUpBlock2D"] * 4}, "attention at the same of 4 levels"),
            ({"block_out_channels": [320, 640]}, "attention at the same of 2 levels"),
        ],
    )
    def test_configurations_without_a_counterpart_are_refused(self, options, message):
        with pytest.raises(ConversionError, match=message):
            unet_config_from_diffusers({**SD15, **options})

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"attention_positions": True}, "attention_positions = False, this model has True"),
            ({"patch_size": 2}, "patch_size = 1, this model has 2"),
            ({"cross_attention_dim": 0}, "cross_attention_dim is 0"),
        ],
    )
    def test_a_model_diffusers_cannot_express_is_refused(self, options, message):
        with pytest.raises(ConversionError, match=message):
            unet_to_diffusers(UNet(**{**TINY, **options}))

    def test_states_that_do_not_fit_are_refused(self):
        theirs = small_diffusers()
        state = theirs.state_dict()
        lacks = {k: v for k, v in state.items() if k != "mid_block.attentions.0.proj_in.bias"}
        with pytest.raises(
            ConversionError, match=r"missing: mid_block\.attentions\.0\.proj_in\.bias; unexpected: none"
        ):
            unet_from_diffusers(lacks, theirs.config)
        with pytest.raises(ConversionError, match="unexpected: extra"):
            unet_from_diffusers({**state, "extra": torch.zeros(1)}, theirs.config)
        with pytest.raises(ConversionError, match=r"conv_in\.weight has shape \(8, 4, 3, 1\)"):
            unet_from_diffusers({**state, "conv_in.weight": torch.zeros(8, 4, 3, 1)}, theirs.config)
        # Linear weights under a configuration of convolutions: the shape tells.
        linear = small_diffusers(use_linear_projection=True)
        with pytest.raises(ConversionError, match=r"proj_in\.weight has shape \(8, 8\)"):
            unet_from_diffusers(linear.state_dict(), theirs.config)
