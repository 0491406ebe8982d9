import tomllib

import pytest
import tomli_w
import torch
import torch.nn.functional as F
from test_unet import randomised
from torch import nn

from minilib import zoo
from minilib.losses import flow_matching_loss
from minilib.models import TextEncoder, TextMMDiT, TextUNet, token_mask

TEXT = {"vocab_size": 20, "max_length": 6, "dim": 16, "depth": 2, "num_heads": 2}
UNET = {"block_out_channels": (8, 16), "attention_levels": (1,), "norm_num_groups": 4, "num_heads": 2}
MMDIT = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
MODELS = {
    "unet": lambda **o: TextUNet(text={**TEXT, **o}, unet=UNET),
    "unet_pooled": lambda **o: TextUNet(text={**TEXT, **o}, unet={**UNET, "pooled_dim": 16}),
    "mmdit": lambda **o: TextMMDiT(text={**TEXT, **o}, mmdit=MMDIT),
    "mmdit_pooled": lambda **o: TextMMDiT(text={**TEXT, **o}, mmdit={**MMDIT, "pooled_dim": 16}),
}
TOKENS = torch.tensor([[5, 2, 7, 19, 0, 0], [3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])


def encoder(**options):
    return randomised(TextEncoder(**{**TEXT, **options}))


def model_inputs(b=3):
    return torch.randn(b, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(5, 900, b)


def reference(model, tokens):
    """The same network from torch's own transformer layers."""
    d, heads = model.dim, model.config["num_heads"]
    x = model.token_embedding.weight[tokens] + model.pos_embed[: tokens.shape[1]]
    padding = tokens == 0
    padding[:, 0] = False
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            d, heads, 4 * d, 0.0, lambda v: F.gelu(v, approximate="tanh"), batch_first=True, norm_first=True
        )
        state = block.state_dict()
        names = {
            "self_attn.in_proj_": "attn.qkv.",
            "self_attn.out_proj.": "attn.proj.",
            "linear1.": "mlp.fc1.",
            "linear2.": "mlp.fc2.",
            "norm1.": "norm1.",
            "norm2.": "norm2.",
        }
        layer.load_state_dict({a + p: state[b + p] for a, b in names.items() for p in ("weight", "bias")})
        x = layer.train()(x, src_key_padding_mask=padding)
    return F.layer_norm(x, (d,), model.final_norm.weight, model.final_norm.bias)


class TestEncoder:
    @pytest.mark.parametrize("positions", ["sincos", "learned"])
    @pytest.mark.parametrize("length", [6, 4])
    def test_equals_torchs_own_layers(self, positions, length):
        model = encoder(positions=positions)
        tokens = TOKENS[:2, :length]
        with torch.no_grad():
            states, mask, pooled = model(tokens)
            wanted = reference(model, tokens)
        assert wanted.abs().max() > 1
        assert (states - wanted)[mask].abs().max() < 1e-5
        last = torch.stack([wanted[0, 3], wanted[1, 0]])
        assert (pooled - last).abs().max() < 1e-5

    def test_padding_changes_nothing(self):
        model = encoder()
        with torch.no_grad():
            long = model(TOKENS[:1])
            short = model(TOKENS[:1, :4])
            before = model.token_embedding.weight[0].clone()
            model.token_embedding.weight[0] = 7.0
            other = model(TOKENS[:1])
            model.token_embedding.weight[0] = before
        assert (long.context[:, :4] - short.context).abs().max() < 1e-5
        assert torch.equal(long.context[:, :4], other.context[:, :4])
        assert torch.equal(long.pooled, other.pooled) and torch.equal(long.pooled, long.context[:, 3])

    def test_reading_goes_both_ways_and_order_matters(self):
        model = encoder()
        a, b, c = torch.tensor([[5, 2, 7]]), torch.tensor([[5, 2, 8]]), torch.tensor([[2, 5, 7]])
        with torch.no_grad():
            assert (model(a).context[:, 0] - model(b).context[:, 0]).abs().max() > 1e-3
            assert (model(a).pooled - model(c).pooled).abs().max() > 1e-3

    def test_positions_have_the_scale_of_the_tokens(self):
        model = TextEncoder(**TEXT)
        angles = torch.arange(6)[:, None] * 10_000.0 ** (-torch.arange(8) / 8)
        assert (model.pos_embed - torch.cat([angles.sin(), angles.cos()], 1)).abs().max() < 1e-6
        assert (
            "pos_embed" not in model.state_dict() and "pos_embed" in encoder(positions="learned").state_dict()
        )
        assert float(TextEncoder(500, 6).token_embedding.weight.detach().std()) == pytest.approx(
            1.0, abs=0.02
        )

    def test_the_first_token_always_counts(self):
        assert token_mask(torch.tensor([[0, 0], [1, 0], [1, 1]])).tolist() == [
            [True, False],
            [True, False],
            [True, True],
        ]
        tokens = torch.zeros(1, 4, dtype=torch.long)
        with torch.no_grad():
            states = encoder()(tokens)
        assert states.context.isfinite().all() and torch.equal(states.pooled, states.context[:, 0])
        assert torch.equal(tokens, torch.zeros(1, 4, dtype=torch.long))

    @pytest.mark.parametrize("null_token", [0, 4])
    def test_null_prompts(self, null_token):
        model = encoder(null_token=null_token)
        assert model.null_tokens(2).tolist() == [[null_token, 0, 0, 0, 0, 0]] * 2
        assert model.null_tokens(1, 3).tolist() == [[null_token, 0, 0]]
        with torch.no_grad():
            a, b = model(model.null_tokens(1)), model(model.null_tokens(1, 2))
        assert int(a.context_mask.sum()) == 1 and (a.pooled - b.pooled).abs().max() < 1e-5

    def test_gradients_reach_every_parameter_but_the_rows_nobody_read(self):
        model = encoder(positions="learned")
        states = model(TOKENS)
        (states.context * torch.randn(states.context.shape)).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name
        unread = torch.tensor([i not in TOKENS for i in range(20)])
        assert not model.token_embedding.weight.grad[unread].any()

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="rows of 7 tokens given, this encoder reads 1 to 6"):
            encoder()(torch.ones(1, 7, dtype=torch.long))
        with pytest.raises(ValueError, match="rows of 0 tokens given"):
            encoder()(torch.ones(1, 0, dtype=torch.long))
        for token in (20, -1):
            with pytest.raises(ValueError, match="this encoder knows 0 to 19"):
                encoder()(torch.tensor([[1, token]]))
        with pytest.raises(ValueError, match="unknown positions 'rope'"):
            encoder(positions="rope")
        with pytest.raises(ValueError, match="null_token 20 is outside the vocabulary of 20"):
            encoder(null_token=20)
        with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
            encoder(num_heads=3)


@pytest.mark.parametrize("name", sorted(MODELS))
class TestTextConditioned:
    def test_tokens_and_their_states_give_the_same(self, name):
        model = randomised(MODELS[name]())
        x, t = model_inputs()
        with torch.no_grad():
            out = model(x, t, TOKENS)
            states = model.encode_text(TOKENS)
            assert torch.equal(model(x, t, **states._asdict()), out)
            direct = states if name.endswith("pooled") else states[:2]
            assert torch.equal(model.denoiser(x, t, *direct), out)
            assert (model(x, t, TOKENS[[1, 1, 1]]) - out)[[0, 2]].abs().amax(dim=(1, 2, 3)).min() > 1e-4

    def test_padding_changes_nothing(self, name):
        model = randomised(MODELS[name]())
        x, t = model_inputs(2)
        with torch.no_grad():
            long, short = model(x, t, TOKENS[:2]), model(x, t, TOKENS[:2, :4])
        assert (long - short).abs().max() < 1e-5

    def test_the_zoo_rebuilds_it(self, name, tmp_path):
        model = randomised(MODELS[name](null_token=3))
        assert tomllib.loads(tomli_w.dumps(model.config)) == model.config
        zoo.publish("tiny", model, metadata={}, card="", root=tmp_path)
        again = zoo.load("tiny", root=tmp_path)
        x, t = model_inputs()
        assert type(again) is type(model) and again.config == model.config
        with torch.no_grad():
            assert torch.equal(again(x, t, TOKENS), model(x, t, TOKENS))
        assert torch.equal(again.null_tokens(2), torch.tensor([[3, 0, 0, 0, 0, 0]] * 2))

    def test_tokens_stand_in_for_labels_in_a_loss_and_gradients_reach_every_parameter(self, name):
        model = randomised(MODELS[name]()).train()
        x, t = model_inputs()
        flow_matching_loss(model, {"x0": x, "y": TOKENS, "noise": torch.randn_like(x), "t": t}).backward()
        for key, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, key

    def test_bad_input_is_named(self, name):
        model = MODELS[name]()
        x, t = model_inputs()
        states = model.encode_text(TOKENS)
        for arguments in ({}, {"tokens": TOKENS, "context": states.context}):
            with pytest.raises(ValueError, match="give tokens or context, one of the two"):
                model(x, t, **arguments)
        with pytest.raises(ValueError, match="tokens bring their own"):
            model(x, t, TOKENS, context_mask=states.context_mask)
        with pytest.raises(ValueError, match="tokens bring their own"):
            model(x, t, TOKENS, pooled=states.pooled)


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError, match="cross_attention_dim is 12, the text encoder's states have width 16"
    ):
        TextUNet(text=TEXT, unet={**UNET, "cross_attention_dim": 12})
    with pytest.raises(ValueError, match="pooled_dim is 8, the text encoder's states have width 16"):
        TextUNet(text=TEXT, unet={**UNET, "pooled_dim": 8})
    with pytest.raises(ValueError, match="context_dim is 12, the text encoder's states have width 16"):
        TextMMDiT(text=TEXT, mmdit={**MMDIT, "context_dim": 12})


def test_further_arguments_reach_the_denoiser():
    model = randomised(MODELS["mmdit"]())
    x, t = model_inputs(1)
    ids = model.denoiser.position_ids(4, 4)
    with torch.no_grad():
        assert torch.equal(model(x, t, TOKENS[:1], position_ids=ids), model(x, t, TOKENS[:1]))
        assert not torch.equal(model(x, t, TOKENS[:1], position_ids=ids.flip(0)), model(x, t, TOKENS[:1]))
