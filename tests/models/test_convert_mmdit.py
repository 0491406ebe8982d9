"""MM-DiT beside diffusers' SD3Transformer2DModel: equal outputs, exact round trips, published sizes."""

import inspect

import pytest
import torch
from diffusers import SD3Transformer2DModel

from minilib.models import DIT_CONFIGS, ConversionError, DiT
from minilib.models.convert_mmdit import mmdit_from_diffusers, mmdit_to_diffusers
from minilib.models.mmdit import MMDiT
from minilib.models.mmdit_configs import (
    SD3_CONFIGS,
    SD3_DEFAULTS,
    mmdit_config_from_diffusers,
    mmdit_config_to_diffusers,
)
from minilib.profiling import count_flops, count_parameters

BASE = {
    "sample_size": 8,
    "in_channels": 3,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "out_channels": 3,
    "pos_embed_max_size": 7,
}
CONFIGS = {
    "sd3": {},
    "qk_norm": {"qk_norm": "rms_norm"},
    "dual": {"dual_attention_layers": (0, 2)},
    "dual_qk_norm": {"qk_norm": "rms_norm", "dual_attention_layers": (1,), "num_layers": 2},
    "shape": {
        "patch_size": 1,
        "in_channels": 2,
        "out_channels": 5,
        "num_layers": 1,
        "pos_embed_max_size": 12,
    },
    "heads": {"attention_head_dim": 4, "num_attention_heads": 4, "sample_size": 16},
}


def peer(name, seed=0):
    """A random SD3Transformer2DModel: also its biases, gains and the position table are random."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(**{**BASE, **CONFIGS[name]}).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return model


def inputs(config, size=(8, 12), n=3):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, config["in_channels"], *size, generator=g),
        torch.tensor([0.0, 333.3, 999.0])[:n],
        torch.randn(n, 5, config["joint_attention_dim"], generator=g),
        torch.randn(n, config["pooled_projection_dim"], generator=g),
    )


def call(model, x, t, context, pooled):
    with torch.no_grad():
        if isinstance(model, MMDiT):
            return model(x, t, context, pooled=pooled)
        return model(x, context, pooled, t, return_dict=False)[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (6, 2)])
def test_outputs_equal(name, size):
    theirs = peer(name)
    ours = mmdit_from_diffusers(theirs.state_dict(), theirs.config)
    batch = inputs(theirs.config, size)
    expected = call(theirs, *batch)
    assert expected.abs().max() > 0.5, "an oracle near zero tests nothing"
    torch.testing.assert_close(call(ours, *batch), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(name):
    theirs = peer(name)
    state, config = mmdit_to_diffusers(mmdit_from_diffusers(theirs.state_dict(), theirs.config))
    expected = theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert {k: theirs.config[k] for k in config} == config
    assert set(config) == set(SD3_DEFAULTS)


@pytest.mark.parametrize("qk_norm", ["", "rms_norm"])
def test_round_trip_from_our_side_and_fresh_positions(qk_norm):
    torch.manual_seed(2)
    model = MMDiT(
        6, 2, 4, 16, 2, 2, context_dim=5, pooled_dim=3, positions="sincos_cropped", pos_embed_max_size=5,
        qk_norm=qk_norm, dual_attention_layers=[1], unused_context_query=True,
    )  # fmt: skip
    state, config = mmdit_to_diffusers(model)
    theirs = SD3Transformer2DModel(**config).eval()
    torch.testing.assert_close(theirs.pos_embed.pos_embed[0], model.positions.table, atol=1e-6, rtol=0)
    theirs.load_state_dict(state)
    again = mmdit_from_diffusers(theirs.state_dict(), config)
    assert again.config == {**model.config, "out_channels": 4}
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert count_parameters(model) == count_parameters(theirs)


def test_state_is_copied_and_keeps_its_dtype():
    theirs = peer("qk_norm").to(torch.bfloat16)
    ours = mmdit_from_diffusers(theirs.state_dict(), theirs.config)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16} and not ours.training
    state = mmdit_to_diffusers(ours)[0]
    before = ours.context_embedder.weight.clone()
    state["context_embedder.weight"].zero_()
    assert torch.equal(ours.context_embedder.weight, before)


def test_defaults_are_those_of_diffusers():
    signature = inspect.signature(SD3Transformer2DModel.__init__).parameters
    assert {k: v.default for k, v in signature.items() if k != "self"} == SD3_DEFAULTS


class TestErrors:
    def test_keys(self):
        theirs = peer("sd3")
        state = theirs.state_dict()
        del state["proj_out.bias"]
        state["extra"] = torch.zeros(1)
        with pytest.raises(ConversionError, match="missing: proj_out.bias; unexpected: extra"):
            mmdit_from_diffusers(state, theirs.config)

    def test_shape(self):
        theirs = peer("sd3")
        with pytest.raises(ConversionError, match="transformer_blocks.0.norm1.linear.weight has shape"):
            mmdit_from_diffusers(
                theirs.state_dict() | {"transformer_blocks.0.norm1.linear.weight": torch.zeros(2)},
                theirs.config,
            )

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"qk_norm": "layer_norm"}, "only None and 'rms_norm' convert"),
            (
                {"caption_projection_dim": 8},
                "caption_projection_dim is 8, it has to be the width of a token, 16",
            ),
            ({"pos_embed_max_size": None}, "pos_embed_max_size is missing"),
            ({"norm_type": "x"}, r"unknown options \['norm_type'\]"),
        ],
    )
    def test_options_of_theirs(self, options, message):
        with pytest.raises(ConversionError, match=message):
            mmdit_config_from_diffusers({**BASE, **options})

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"positions": "rope"}, "positions is 'rope', diffusers' SD3 has 'sincos_cropped'"),
            ({"mlp_ratio": 2.0}, "mlp_ratio is 2.0"),
            ({"unused_context_query": False}, "unused_context_query is False"),
            ({"pooled_dim": None}, "pooled_dim is None"),
        ],
    )
    def test_options_of_ours(self, options, message):
        with pytest.raises(ConversionError, match=message):
            mmdit_config_to_diffusers({**mmdit_config_from_diffusers(BASE), "mlp_ratio": 4.0, **options})


class TestAudit:
    """The released sizes, on the meta device."""

    #: Parameters as diffusers counts them, and with the stored position table the published size in billions.
    SIZES = {
        "SD3-medium": (2_028_328_000, "2.1"),
        "SD3.5-medium": (2_243_171_520, "2.5"),
        "SD3.5-large": (8_056_627_520, "8.1"),
    }

    @pytest.mark.parametrize("name", SD3_CONFIGS)
    def test_parameters(self, name):
        with torch.device("meta"):
            ours = MMDiT.from_diffusers_config(SD3_CONFIGS[name])
            theirs = SD3Transformer2DModel(**SD3_CONFIGS[name])
        exact, billions = self.SIZES[name]
        assert count_parameters(ours) == count_parameters(theirs) == exact
        assert f"{(exact + ours.positions.table.numel()) / 1e9:.1f}" == billions
        state, _ = mmdit_to_diffusers(ours)
        expected = {k: v.shape for k, v in theirs.state_dict().items()}
        assert {k: v.shape for k, v in state.items()} == expected

    def test_cost_by_formula(self):
        """Multiply-accumulates of SD3-medium at 1024 pixels: 4096 image and 333 text tokens."""
        with torch.device("meta"):
            model = MMDiT.from_diffusers_config(SD3_CONFIGS["SD3-medium"])
            batch = torch.zeros(1, 16, 128, 128), torch.zeros(1), torch.zeros(1, 333, 4096)
            counted = count_flops(model, *batch, pooled=torch.zeros(1, 2048)).macs
        d, depth, n, text = 1536, 24, 4096, 333
        full = (n + text) * (4 * d * d + 8 * d * d) + 2 * (n + text) ** 2 * d + 12 * d * d
        last = n * 12 * d * d + text * 3 * d * d + 2 * n * (n + text) * d + 8 * d * d
        around = n * 64 * d + text * 4096 * d + (256 + d) * d + (2048 + d) * d + 2 * d * d + n * d * 64
        assert counted == (depth - 1) * full + last + around

    def test_sit_xl_2_is_dit_xl_2(self):
        """SiT keeps the network of DiT, learned sigma included (Ma et al. 2024, arXiv 2401.08740: 675 million)."""
        with torch.device("meta"):
            model = DiT(**DIT_CONFIGS["DiT-XL/2"])
        stored = count_parameters(model) + model.pos_embed.numel()
        assert count_parameters(model) == 674_834_720 and stored == 675_129_632
        assert round(stored / 1e6) == 675
