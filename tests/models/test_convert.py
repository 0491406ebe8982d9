import math

import official_dit
import pytest
import torch
import torch.nn.functional as F

from minilib.attention import Attention
from minilib.models import (
    ConversionError,
    DiT,
    DiTBlock,
    convert,
    dit,
    from_diffusers,
    from_facebook,
    layers,
    to_diffusers,
    to_facebook,
)

CONFIGS = [
    {},
    {"hidden": 24, "depth": 1, "patch": 1, "channels": 1, "grid": 4, "learn_sigma": False, "seed": 1},
    {"hidden": 8, "depth": 3, "patch": 4, "channels": 2, "grid": 2, "classes": 1, "ratio": 2.5, "seed": 2},
]


def inputs(state, seed=3):
    g = torch.Generator().manual_seed(seed)
    _, channels, p, _ = state["x_embedder.proj.weight"].shape
    size = round(state["pos_embed"].shape[1] ** 0.5) * p
    null = len(state["y_embedder.embedding_table.weight"]) - 1
    x = torch.randn(4, channels, size, size, generator=g)
    return x, torch.tensor([0.0, 3.25, 500.0, 999.0]), torch.tensor([0, 0, null, null])


def largest_error(state, heads=2):
    """Largest difference between minilib's DiT and the independent one, on the same official weights."""
    x, t, y = inputs(state)
    with torch.no_grad():
        ours = from_facebook(state, num_heads=heads)(x, t, y)
    theirs = official_dit.forward(state, x, t, y, heads=heads)
    assert theirs.abs().max() > 0.5, "an oracle near zero tests nothing"
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


class TestFacebook:
    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("heads", [1, 2, 4])
    def test_outputs_equal_an_independent_model(self, config, heads):
        assert largest_error(official_dit.random_state(**config), heads) < 1e-5

    @pytest.mark.parametrize("config", CONFIGS)
    def test_round_trip_is_exact(self, config):
        state = official_dit.random_state(**config)
        back = to_facebook(from_facebook(state, num_heads=2))
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)

    def test_round_trip_from_our_side_is_exact(self):
        model = randomised(
            DiT(input_size=6, patch_size=3, in_channels=2, hidden_size=16, depth=2, num_heads=4)
        )
        again = from_facebook(to_facebook(model), num_heads=4)
        assert DiT(**again.config).state_dict().keys() == model.state_dict().keys()
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )
        wanted = {**model.config, "mlp_ratio": 4.0}
        assert again.config == wanted

    def test_half_precision_checkpoints_keep_their_type(self):
        state = {k: v.half() for k, v in official_dit.random_state().items()}
        model = from_facebook(state, num_heads=2)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert all(torch.equal(v, state[k]) for k, v in to_facebook(model).items())

    def test_errors_name_the_key(self):
        state = official_dit.random_state()
        lacks = {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"}
        with pytest.raises(ConversionError, match=r"missing: blocks\.1\.mlp\.fc2\.bias; unexpected: none"):
            from_facebook(lacks, num_heads=2)
        with pytest.raises(ConversionError, match="unexpected: blocks.0.extra"):
            from_facebook({**state, "blocks.0.extra": torch.zeros(1)}, num_heads=2)
        with pytest.raises(
            ConversionError, match=r"t_embedder\.mlp\.0\.weight has shape \(16, 255\).*\(16, 256\)"
        ):
            from_facebook({**state, "t_embedder.mlp.0.weight": torch.zeros(16, 255)}, num_heads=2)
        with pytest.raises(ConversionError, match="missing: pos_embed, x_embedder.proj.weight"):
            from_facebook({}, num_heads=2)
        with pytest.raises(ConversionError, match="not the fixed sine-cosine embedding"):
            from_facebook({**state, "pos_embed": torch.randn(1, 9, 16)}, num_heads=2)
        with pytest.raises(ConversionError, match="not the fixed sine-cosine embedding"):
            from_facebook({**state, "pos_embed": torch.full((1, 9, 16), torch.nan)}, num_heads=2)
        with pytest.raises(ConversionError, match="9 output channels for 3 input channels"):
            from_facebook({**state, "final_layer.linear.weight": torch.zeros(36, 16)}, num_heads=2)
        with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
            from_facebook(state, num_heads=3)

    @pytest.mark.parametrize(
        "option, message",
        [
            ({"mlp": "swiglu"}, "mlp is 'swiglu'"),
            ({"mlp": "moe"}, "mlp is 'moe'"),
            ({"qk_norm": True}, "qk_norm is True"),
            ({"frequency_shift": 1.0}, "frequency_shift = 0.0, this model has 1.0"),
            ({"mlp_norm_eps": 1e-5}, "mlp_norm_eps = 1e-06, this model has 1e-05"),
        ],
    )
    def test_a_model_the_official_code_cannot_express_is_refused(self, option, message):
        with pytest.raises(ConversionError, match=message):
            to_facebook(DiT(hidden_size=8, depth=1, num_heads=2, **option))


def randomised(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.8 / math.sqrt(p.shape[-1]) if p.ndim > 1 else 0.3))
    return model.eval()


class TestDiffusers:
    @staticmethod
    def peer(**options):
        from diffusers import DiTTransformer2DModel

        defaults = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 3,
            "num_layers": 2,
            "sample_size": 6,
            "patch_size": 2,
            "num_embeds_ada_norm": 5,
        }
        model = randomised(DiTTransformer2DModel(**{**defaults, **options}))
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
        return model

    @pytest.mark.parametrize(
        "options",
        [
            {"out_channels": 6},
            {"out_channels": 3, "patch_size": 1, "sample_size": 3, "num_layers": 1, "norm_eps": 1e-6},
            {
                "num_attention_heads": 4,
                "attention_head_dim": 4,
                "num_layers": 3,
                "in_channels": 1,
                "norm_eps": 0.1,
            },
        ],
    )
    def test_outputs_are_equal_and_round_trips_exact(self, options):
        from diffusers import DiTTransformer2DModel

        theirs = self.peer(**options)
        ours = from_diffusers(theirs.state_dict(), theirs.config)
        g = torch.Generator().manual_seed(4)
        x = torch.randn(3, theirs.config.in_channels, *(2 * [theirs.config.sample_size]), generator=g)
        t, y = torch.tensor([0, 420, 999]), torch.tensor([0, 4, 5])
        with torch.no_grad():
            expected = theirs(x, t, y).sample
            assert expected.abs().max() > 0.5
            tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
            assert (ours(x, t, y) - expected).abs().max() < tolerance

            state, config = to_diffusers(ours)
            assert state.keys() == theirs.state_dict().keys()
            assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())
            rebuilt = DiTTransformer2DModel(**config).eval()
            rebuilt.load_state_dict(state)
            assert torch.equal(rebuilt(x, t, y).sample, expected)
        again = from_diffusers(*to_diffusers(ours))
        assert again.config == ours.config
        assert all(
            torch.equal(a, b)
            for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True)
        )

    def test_the_copies_of_the_embedder_must_agree(self):
        theirs = self.peer()
        state = theirs.state_dict()
        name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
        with pytest.raises(ConversionError, match=f"{name} differs from transformer_blocks.0"):
            from_diffusers({**state, name: state[name] + 1e-7}, theirs.config)

    def test_every_block_gets_its_own_copy(self):
        model = randomised(DiT(input_size=4, hidden_size=8, depth=2, num_heads=2, frequency_shift=1.0))
        state, _ = to_diffusers(model)
        tables = [
            state[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] for i in (0, 1)
        ]
        assert torch.equal(*tables) and tables[0].data_ptr() != tables[1].data_ptr()
        assert tables[0].data_ptr() != model.y_embedder.weight.data_ptr()

    def test_other_waves_are_refused_unless_accepted(self):
        official = randomised(DiT(input_size=4, hidden_size=8, depth=1, num_heads=2))
        with pytest.raises(ConversionError, match="frequency_shift is 0.0.*other_frequencies=True"):
            to_diffusers(official)
        state, config = to_diffusers(official, other_frequencies=True)
        shifted = from_diffusers(state, config)
        x, t, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 900]), torch.tensor([1, 2])
        with torch.no_grad():
            difference = (shifted(x, t, y) - official(x, t, y)).abs().amax((1, 2, 3))
        assert difference[0] < 1e-6, "at t = 0 all waves agree"
        assert difference[1] > 1e-3

    def test_errors(self):
        theirs = self.peer()
        state, config = theirs.state_dict(), theirs.config
        with pytest.raises(ConversionError, match="missing: proj_out_2.weight"):
            from_diffusers({k: v for k, v in state.items() if k != "proj_out_2.weight"}, config)
        with pytest.raises(ConversionError, match=r"proj_out_2\.bias has shape \(3,\)"):
            from_diffusers({**state, "proj_out_2.bias": torch.zeros(3)}, config)
        with pytest.raises(ConversionError, match="activation_fn is 'geglu' there"):
            from_diffusers(state, {**config, "activation_fn": "geglu"})
        with pytest.raises(ConversionError, match="9 output channels"):
            from_diffusers(state, {**config, "out_channels": 9})
        with pytest.raises(ConversionError, match="mlp_ratio is 2.0"):
            to_diffusers(DiT(hidden_size=8, depth=1, num_heads=2, mlp_ratio=2.0, frequency_shift=1.0))
        with pytest.raises(ConversionError, match="mlp is 'swiglu'"):
            to_diffusers(DiT(hidden_size=8, depth=1, num_heads=2, mlp="swiglu", frequency_shift=1.0))

    def test_a_full_precision_double_model_converts_to_double(self):
        theirs = self.peer().double()
        assert from_diffusers(theirs.state_dict(), theirs.config).pos_embed.dtype == torch.float64


def block_without(gate):
    def forward(self, x, c):
        m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        one = torch.ones_like(m[0])
        x = x + (one if gate == "attention" else m[2]) * self.attn(
            dit.modulate(F.layer_norm(x, x.shape[-1:]), m[0], m[1])
        )
        h = dit.modulate(F.layer_norm(x, x.shape[-1:]), m[3], m[4])
        return x + (one if gate == "mlp" else m[5]) * self.mlp(h)

    return forward


def rolled_modulation(self, x, c):
    """The feed-forward network's triple used for attention, and the other way round."""
    m = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
    x = x + m[5] * self.attn(dit.modulate(F.layer_norm(x, x.shape[-1:]), m[3], m[4]))
    return x + m[2] * self.mlp(dit.modulate(F.layer_norm(x, x.shape[-1:]), m[0], m[1]))


def sines_first(t, dim=256, **options):
    waves = MUTATED["timestep_embedding"](t, dim, **options)
    return torch.cat([waves[:, dim // 2 :], waves[:, : dim // 2]], 1)


def channels_first(self, tokens):
    p, g = self.patch_size, self.grid_size
    return (
        tokens.view(len(tokens), g, g, -1, p, p)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(len(tokens), -1, g * p, g * p)
    )


def interleaved_heads(self, x, *, mask=None):
    b, n, d = x.shape
    q, k, v = (a.view(b, n, -1, self.num_heads).permute(0, 3, 1, 2) for a in self.qkv(x).chunk(3, -1))
    return self.proj(self.processor(q, k, v, mask=mask).permute(0, 2, 3, 1).reshape(b, n, d))


MUTATED = {
    "timestep_embedding": layers.timestep_embedding,
    "modulate": layers.modulate,
    "sincos_2d": dit.sincos_2d,
}

MUTANTS = {
    "shift and scale swapped": (
        dit,
        "modulate",
        lambda x, shift, scale: MUTATED["modulate"](x, scale, shift),
    ),
    "1 + left out": (dit, "modulate", lambda x, shift, scale: MUTATED["modulate"](x, shift, scale - 1)),
    "no attention gate": (DiTBlock, "forward", block_without("attention")),
    "no feed-forward gate": (DiTBlock, "forward", block_without("mlp")),
    "modulations exchanged": (DiTBlock, "forward", rolled_modulation),
    "sines before cosines": (layers, "timestep_embedding", sines_first),
    "diffusers' waves": (
        layers,
        "timestep_embedding",
        lambda t, dim, **options: MUTATED["timestep_embedding"](t, dim, frequency_shift=1.0),
    ),
    "rows before columns": (
        dit,
        "sincos_2d",
        lambda d, h, w: MUTATED["sincos_2d"](d, h, w).view(h, w, d).transpose(0, 1).reshape(-1, d),
    ),
    "patches read channel first": (DiT, "unpatchify", channels_first),
    "heads interleaved": (Attention, "forward", interleaved_heads),
    "silu left out": (dit.F, "silu", lambda x: x),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_model_does_not_pass_the_oracle(name, monkeypatch):
    state = official_dit.random_state()
    assert largest_error(state) < 1e-5
    owner, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutant)
    try:
        error = largest_error(state)
    except ConversionError:
        return  # the positions of the checkpoint are not this model's: noticed as well
    assert error > 1e-3


def test_the_table_covers_every_tensor_once():
    model = DiT(hidden_size=8, depth=3, num_heads=2)
    for table in (convert.facebook_table(3), convert.diffusers_table(3)):
        assert sorted(row.ours for row in table) == sorted(model.state_dict())
        theirs = [name for row in table for name in row.theirs]
        assert len(theirs) == len(set(theirs))
